"""Settings of `minitron distill`: those of every training, and the losses."""

import dataclasses
import math
from dataclasses import field
from typing import Any

from nemo_minitron.config.schemas.base import Config, at_least, one_of
from nemo_minitron.config.schemas.training import TrainingConfig

#: In kd.teachers: the teacher that runs, model.kd_teacher_restore_from_path.
LIVE = "live"
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "soft_cross_entropy")


@dataclasses.dataclass(kw_only=True)
class HiddenLossConfig(Config):
    """Losses between hidden states of student and teacher, beside the one on logits."""

    weight: float = 0.0
    """Weight of their mean over all pairs; 0: none. The papers gained by them only where depth is cut a lot."""
    loss: str = "cosine"
    """`cosine`, 1 - cos(P h_student, h_teacher), or `mse`. P is trained along where the widths differ."""
    pairs: Any = "outer"
    """`outer`: the embeddings and the last block. `auto`: each of the student's layers with the one it was in the
    teacher, or evenly spread where that is not known. Or pairs, [[0,0],[8,16]]: the student's layer and the teacher's,
    from 1; 0 for the embeddings."""
    scale: str = "fixed"
    """`fixed`, or `dynamic`: times L_kd / L_hidden of the micro batch, which lifts them to the size of L_kd."""

    def problems(self) -> list[str]:
        problems = at_least(0, weight=self.weight)
        problems += one_of("loss", self.loss, ("cosine", "mse")) + one_of("scale", self.scale, ("fixed", "dynamic"))
        listed = isinstance(self.pairs, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(type(layer) is int for layer in pair)
            for pair in self.pairs
        )
        if self.pairs not in ("outer", "auto") and not (listed and self.pairs):
            problems.append(
                f"pairs = {self.pairs!r} must be outer, auto, or a list of [student's layer, teacher's layer]"
            )
        return problems


@dataclasses.dataclass(kw_only=True)
class KDConfig(Config):
    """The distillation loss."""

    loss: str = "forward_kl"
    """`forward_kl`, `reverse_kl`, `jensen_shannon` or `soft_cross_entropy`, of the teacher's and the student's
    distributions of the next token. The papers found forward KL best."""
    beta: float = 0.5
    """With jensen_shannon: the teacher's share of the mixture, 0 to 1."""
    top_k: int | None = None
    """Only the teacher's so many likeliest tokens, renormalised (forward_kl); none: all. The papers gained nothing."""
    temperature: float = 1.0
    """Softmax temperature of both; the papers found 1 best."""
    times_t_squared: bool = False
    """Multiply by the temperature squared, so that gradients keep their size when it changes."""
    kd_weight: float = 1.0
    """Weight of the distillation loss; 0 trains on the LM loss alone, without a teacher (the control)."""
    lm_weight: float = 0.0
    """Weight of the language-model loss; the papers found the KL alone best."""
    form: str = "auto"
    """`fused`: with the output layer, so that logits of a whole sequence never exist. `chunked`: on the logits. auto:
    fused wherever it can be (not with top_k, nor with sequence parallel)."""
    teacher: str | None = None
    """Folder of a teacher's answers (minitron teach), which are read; no teacher is loaded then."""
    teachers: Any = None
    """Several such folders with their shares, {FOLDER_A:0.5,FOLDER_B:0.5}: the mixture of their distributions is
    learnt. The name `live` stands for model.kd_teacher_restore_from_path."""
    fill: bool = False
    """With kd.teacher: have model.kd_teacher_restore_from_path, the same teacher, answer first what is missing."""
    hidden: HiddenLossConfig = field(default_factory=HiddenLossConfig)

    @property
    def metric(self) -> str:
        """The validation loss of what is learnt: the distance from the teacher, or the text's where there is no KD."""
        return "kd_loss" if self.kd_weight else "lm_loss"

    @property
    def shares(self) -> dict[str, float]:
        """Folder, or LIVE, of each teacher -> its share; none for the control."""
        if not self.kd_weight:
            return {}
        if self.teacher:
            return {self.teacher: 1.0}
        return dict(self.teachers) if isinstance(self.teachers, dict) else {LIVE: 1.0}

    @property
    def folders(self) -> list[str]:
        """The folders of answers that are read."""
        return [name for name in self.shares if name != LIVE]

    def problems(self) -> list[str]:
        problems = [] if self.temperature > 0 else [f"temperature = {self.temperature} must be above 0"]
        problems += one_of("loss", self.loss, DIVERGENCES) + one_of("form", self.form, ("auto", "fused", "chunked"))
        problems += at_least(1, top_k=self.top_k)
        if not 0 <= self.beta <= 1:
            problems.append(f"beta = {self.beta} must be from 0 to 1")
        if self.top_k is not None and (self.loss != "forward_kl" or self.form == "fused"):
            problems.append("top_k goes with loss=forward_kl, and not with form=fused")
        problems += at_least(0, kd_weight=self.kd_weight, lm_weight=self.lm_weight)
        if self.hidden.weight and not self.kd_weight:
            problems.append("hidden.weight needs the teacher: kd_weight must be above 0")
        if not self.kd_weight and not self.lm_weight:
            problems.append("kd_weight and lm_weight are both 0: there is no loss to train on")
        return problems + self._teacher_problems()

    def _teacher_problems(self) -> list[str]:
        """What is wrong with the teachers that are named."""
        if self.teacher and self.teachers:
            return ["teacher and teachers: give one"]
        named = isinstance(self.teachers, dict) and all(
            type(name) is str and type(share) in (int, float) and 0 < share < math.inf
            for name, share in self.teachers.items()
        )
        if self.teachers is not None and not (named and self.teachers):
            return [f"teachers = {self.teachers!r:.80} must be {{FOLDER:SHARE,..}}, each share a number above 0"]
        problems = []
        if self.fill and not self.teacher:
            problems.append("fill = true needs the folder whose gaps are filled, kd.teacher=FOLDER")
        if self.folders and self.top_k is not None:
            problems.append("top_k is of a teacher that runs; of kept answers, minitron teach teach.keep=topk")
        if self.folders and LIVE in self.shares and self.form == "chunked":
            problems.append("teachers with `live` among them go with form=fused (auto)")
        return problems


@dataclasses.dataclass(kw_only=True)
class DistillConfig(TrainingConfig):
    """Knowledge distillation of a pruned student."""

    kd: KDConfig = field(default_factory=KDConfig)

    @property
    def metric(self) -> str:
        """The validation loss by which the best step is chosen."""
        return self.monitor or self.kd.metric

    @property
    def fixed_windows(self) -> bool:
        if self.model.data.windows == "auto":
            return bool(self.kd.teacher or self.kd.teachers)
        return super().fixed_windows

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher runs beside the model."""
        return self.kd.kd_weight > 0

    def problems(self) -> list[str]:
        problems = super().problems()
        if (LIVE in self.kd.shares or self.kd.fill) and not self.model.kd_teacher_restore_from_path:
            problems.append("model.kd_teacher_restore_from_path is missing: name the teacher's checkpoint")
        if self.kd.folders:
            problems += self._kept_problems()
        if self.kd.form == "fused" and self.model.sequence_parallel:
            problems.append("kd.form = fused takes no model.sequence_parallel: give kd.form=chunked")
        if self.kd.hidden.weight:
            problems += self._hidden_problems()
        if self.model.init == "random":
            problems.append("model.init = random: distill starts from a pruned checkpoint, model.restore_from_path")
        return problems

    def _kept_problems(self) -> list[str]:
        problems = []
        if self.model.data.windows == "shuffled":
            problems.append(
                "model.data.windows = shuffled: a teacher's answers are kept of windows that are the same in each "
                "pass; give fixed or auto"
            )
        if self.model.context_parallel_size > 1:
            problems.append("kd.teacher takes no model.context_parallel_size above 1: each rank reads whole sequences")
        if self.kd.hidden.weight and LIVE not in self.kd.shares:
            problems.append("kd.hidden.weight needs a teacher that runs, kept answers are those of its last layer")
        if LIVE in self.kd.shares and self.model.sequence_parallel:
            problems.append("kd.teachers with `live` among them take no model.sequence_parallel")
        return problems

    def _hidden_problems(self) -> list[str]:
        problems = []
        if self.model.pipeline_model_parallel_size > 1:
            problems.append(
                "kd.hidden.weight needs model.pipeline_model_parallel_size=1: ModelOpt compares only what lies on the "
                "last pipeline stage of both models"
            )
        if self.model.sequence_parallel:
            problems.append(
                "kd.hidden.weight takes no model.sequence_parallel: a rank then has hidden states of other tokens than "
                "its loss mask"
            )
        return problems
