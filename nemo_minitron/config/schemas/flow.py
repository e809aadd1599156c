"""Settings of `minitron flow`."""

import dataclasses
import typing
from dataclasses import field
from typing import Any

from nemo_minitron.config.schemas.base import Config, above_zero, at_least, one_of, text_key_problems
from nemo_minitron.config.schemas.data import DataConfig
from nemo_minitron.config.schemas.distillation import KDConfig
from nemo_minitron.config.schemas.hardware import HardwareConfig
from nemo_minitron.config.schemas.instructions import InstructConfig, PeftConfig
from nemo_minitron.config.schemas.pruning import PruneTargets
from nemo_minitron.config.schemas.searching import SearchSettings
from nemo_minitron.config.schemas.training import ModelDataConfig, dynamic_problems


@dataclasses.dataclass(kw_only=True)
class FlowModelConfig(Config):
    """The teacher of a flow (conf/model/)."""

    name: str = "tiny"
    """What the report calls it."""
    init: str = "random"
    """`random`: make the teacher from random weights by the pretrain stage; `checkpoint`: start from one."""
    restore_from_path: str | None = None
    """With init=checkpoint: the teacher's checkpoint. Where it is given and no model= is, model=auto holds."""
    download: str | None = None
    """Where the teacher comes from when restore_from_path does not exist yet: shown in messages."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Fields of nemo_minitron.architecture.Architecture, or `known`, a known model, and what differs from it; a
    checkpoint's own sizes win."""
    seq_length: int | None = 128
    """Tokens a sample, in every stage; null: what fits."""

    def problems(self) -> list[str]:
        problems = one_of("init", self.init, ("random", "checkpoint")) + at_least(2, seq_length=self.seq_length)
        if self.init == "checkpoint" and not self.restore_from_path:
            problems.append("restore_from_path is missing: name the teacher's checkpoint")
        if self.init == "random" and self.restore_from_path:
            problems.append(
                f"init = random makes a teacher, but restore_from_path = {self.restore_from_path} names one: give "
                "model.init=checkpoint, or model.restore_from_path=null"
            )
        return problems


@dataclasses.dataclass(kw_only=True)
class FlowDataConfig(Config):
    """The corpora of a flow (conf/data/)."""

    source: str = "embedded"
    """`embedded`, `prose`, `wikitext103`, or a path, as in `minitron data`."""
    sources: Any = None
    """Several of them in place of source, {wiki:PATH,code:PATH}, as in `minitron data`; with blend."""
    blend: Any = None
    """With sources: their weights, and those of files or folders of rows, {wiki:0.3,code:0.5,rows.jsonl:0.2}, as
    in model.data.blend. All stages that train or score read it; losses in the table are of its text."""
    dynamic: bool = False
    """With blend: shares follow the losses while students are distilled, as in model.data.dynamic."""
    text_key: str = "text"
    """With a path: field or column that holds the text, as in `minitron data`."""
    pretrain_words: int = 2_000_000
    """Words of the broad embedded corpus, on which the teacher of init=random is made when source=embedded."""
    words: int = 1_000_000
    """Words of the encyclopedic embedded corpus."""
    limit_documents: int | None = None
    """Use only the first so many documents of each split."""
    tokenizer: str | None = None
    """Hugging Face name or directory; none: the teacher's own, or a BPE trained on the training split."""
    vocab_size: int = 2048
    """Size of the BPE that is trained."""
    workers: int = 2
    """Processes that tokenise."""

    def problems(self) -> list[str]:
        problems = at_least(1, words=self.words, pretrain_words=self.pretrain_words, workers=self.workers)
        if self.source == "???" and self.sources is None:
            problems.append("source is missing: name the text to teach on, data.source=PATH")
        return problems + text_key_problems(self.text_key) + self._blend_problems()

    def _blend_problems(self) -> list[str]:
        """What is wrong with several sources and their blend."""
        if self.sources is None and self.blend is None:
            return ["dynamic goes with blend and sources"] if self.dynamic else []
        if not isinstance(self.sources, dict) or not isinstance(self.blend, dict):
            return ["sources and blend go together, 'data.sources={wiki:PATH,code:PATH}' 'data.blend={wiki:1,code:2}'"]
        problems = DataConfig(output="data", sources=self.sources).problems()
        problems += ModelDataConfig(blend=self.blend, dynamic=self.dynamic).problems()
        left = [str(name) for name in self.sources if name not in self.blend]
        return problems + ([f"blend gives {', '.join(left)} of sources no weight"] if left else [])


@dataclasses.dataclass(kw_only=True)
class RecipeConfig(Config):
    """A training run of the flow (conf/pretrain/, conf/finetune/, conf/distill/)."""

    max_steps: int | None = 100
    """Optimizer steps; null: as many as there is time for (minutes)."""
    global_batch_size: int | None = 8
    """Samples a step; null: chosen with the steps."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-4
    """Learning rate at the end of the cosine."""
    warmup_steps: int | None = 10
    """Steps of linear warm-up; null: a tenth."""
    val_check_interval: int | None = 50
    """Validate every so many steps; null: three times in all."""
    limit_val_batches: int | None = 8
    """Global batches a validation; null: a tenth of the training's arithmetic."""
    log_every_n_steps: int = 10
    """Write to TensorBoard every so many steps."""

    def problems(self) -> list[str]:
        problems = at_least(
            1,
            max_steps=self.max_steps,
            global_batch_size=self.global_batch_size,
            val_check_interval=self.val_check_interval,
            limit_val_batches=self.limit_val_batches,
        )
        if self.min_lr > self.lr:
            problems.append(f"min_lr = {self.min_lr} is above lr = {self.lr}")
        return problems


@dataclasses.dataclass(kw_only=True)
class DistillRecipeConfig(RecipeConfig):
    """Distillation of each student."""

    kd: KDConfig = field(default_factory=KDConfig)
    teach: str = "auto"
    """`always`: the teacher answers once (minitron teach), and every student reads its answers; `never`: it runs beside
    each student. auto: always for two students or more, or where the text is read more than once, and a quarter of the
    free disk holds the answers."""
    control: bool = True
    """Also retrain each student with the LM loss alone for the same steps, to compare with."""

    def problems(self) -> list[str]:
        problems = super().problems() + one_of("teach", self.teach, ("auto", "always", "never"))
        if self.teach == "always" and (self.kd.hidden.weight or self.kd.top_k is not None or self.kd.folders):
            problems.append("teach = always goes with no kd.hidden.weight, kd.top_k or kd.teacher: give teach=never")
        return problems


@dataclasses.dataclass(kw_only=True)
class InstructRecipeConfig(RecipeConfig):
    """Instruction tuning of each distilled student, where there is data for it."""

    data: str | None = None
    """File or folder of instructions and answers, as in finetune's model.data.instructions; none: no such step."""
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    rows: InstructConfig = field(default_factory=InstructConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)


@dataclasses.dataclass(kw_only=True)
class FlowPruneConfig(Config):
    """The students of a flow (conf/prune/)."""

    method: str | None = None
    """`minitron` or `compensated`, for every student that names none; none: compensated."""
    depth_by: str = "block_influence"
    """`block_loss`, `block_influence` or `compensated_loss`, for every student that names none."""
    num_samples: int | None = 1024
    """Calibration samples; null: as many as there is time for (minutes)."""
    num_block_samples: int | None = 256
    """Samples on which blocks of layers are left out; null: as many as there is time for (minutes)."""
    batch_size: int | None = 1
    """Samples a forward pass while scoring; null: as many as fit."""
    hidden_size_divisor: int | None = None
    """Grid of hidden_size; none: as in `minitron prune`."""
    ffn_hidden_size_divisor: int | None = None
    """Grid of ffn_hidden_size; none: as in `minitron prune`."""
    num_layers_divisor: int = 2
    """Grid of num_layers."""
    students: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> targets: sizes (drop_layers, num_layers, hidden_size, ffn_hidden_size, num_attention_heads) or shares of
    the teacher (parameters=60%, embeddings included, by hidden size and FFN in proportion; layers=60%), and how to cut
    (method, depth_by, depth_beam, depth_samples, merge_heads, untie, refit, choose_by, gain_tolerance). Or
    search={parameters:60%}, with any setting of `minitron search` below search, and method, untie, choose_by,
    gain_tolerance: a search finds the sizes. `pruned` is its winner's cut; `distilled` goes on, for all of its steps,
    from the winner as the rounds of the search left it, and `control` from the cut."""

    def problems(self) -> list[str]:
        problems = at_least(
            1,
            num_samples=self.num_samples,
            num_block_samples=self.num_block_samples,
            batch_size=self.batch_size,
            hidden_size_divisor=self.hidden_size_divisor,
            ffn_hidden_size_divisor=self.ffn_hidden_size_divisor,
            num_layers_divisor=self.num_layers_divisor,
        )
        if not self.students:
            problems.append("students is empty: name at least one, students.depth.num_layers=N")
        for name, targets in self.students.items():
            problems += [f"students.{name}.{problem}" for problem in _student_problems(targets or {})]
        return problems


COUNTS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
#: What a student of a flow may say.
TARGETS = (
    "search",
    "drop_layers",
    *COUNTS,
    "parameters",
    "layers",
    "method",
    "depth_by",
    "depth_beam",
    "depth_samples",
    "refit",
    "choose_by",
    "gain_tolerance",
    "merge_heads",
    "untie",
)


#: What goes with a search: how its candidates are cut.
SEARCHED = ("search", "method", "untie", "choose_by", "gain_tolerance")


def _student_problems(targets: dict[str, Any]) -> list[str]:
    """Targets that are not known, or of another kind than they have to be."""
    problems = [f"{key} is not a target; known are {', '.join(TARGETS)}" for key in targets if key not in TARGETS]
    problems += _kind_problems(PruneTargets, {key: value for key, value in targets.items() if value is not None})
    return problems + (_search_problems(targets) if targets.get("search") is not None else [])


def _search_problems(targets: dict[str, Any]) -> list[str]:
    """What is wrong with a student whose sizes a search is to find, whatever its teacher."""
    beside = [name for name in targets if name in TARGETS and name not in SEARCHED and targets[name] is not None]
    problems = [f"search finds the sizes: give no {', '.join(beside)} beside it"] if beside else []
    asked = targets["search"]
    if not isinstance(asked, dict):
        return [*problems, f"search = {asked!r} is no budget: give search={{parameters:60%}}"]
    known = [field.name for field in dataclasses.fields(SearchSettings)]
    wrong = [f"{name} is not a setting; known are {', '.join(known)}" for name in asked if name not in known]
    wrong += _kind_problems(SearchSettings, asked)
    wrong = wrong or SearchSettings(**asked).problems()
    return problems + [f"search.{problem}" for problem in wrong]


def _kind_problems(schema: type, values: dict[str, Any]) -> list[str]:
    """A problem for each value of another kind than the field of that name in `schema` takes."""
    from nemo_minitron.config.reflect import describe_type

    problems = []
    for name, annotation in typing.get_type_hints(schema).items():
        kinds = typing.get_args(annotation) or (annotation,)
        allowed = (*kinds, int) if float in kinds else kinds
        if name in values and Any not in kinds and type(values[name]) not in allowed:
            problems.append(f"{name} = {values[name]!r} is not {describe_type(annotation)}")
    return problems


@dataclasses.dataclass(kw_only=True)
class FlowConfig(Config):
    """The whole flow: data, teacher, teacher correction, pruning, distillation, table."""

    output_dir: str = "runs/tiny"
    """Folder of the run; each stage has a folder in it."""
    seed: int = 1234
    """Seed of everything random."""
    overwrite: bool = False
    """Replace stages that were made with other settings."""
    dry_run: bool = False
    """Print the resolved plan and touch nothing."""
    minutes: float = 60.0
    """What is left open (null) is chosen so that the flow takes about so long, by the plan's arithmetic."""
    limit_test_batches: int | None = 32
    """Global batches of each evaluation in the table; null: as many as there is time for (minutes)."""
    facts: int = 400
    """Questions about the embedded corpus' facts that every model is asked at the end; 0: none."""
    model: FlowModelConfig = field(default_factory=FlowModelConfig)
    data: FlowDataConfig = field(default_factory=FlowDataConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    pretrain: RecipeConfig = field(default_factory=RecipeConfig)
    finetune: RecipeConfig = field(default_factory=RecipeConfig)
    prune: FlowPruneConfig = field(default_factory=FlowPruneConfig)
    distill: DistillRecipeConfig = field(default_factory=DistillRecipeConfig)
    instruct: InstructRecipeConfig = field(default_factory=InstructRecipeConfig)

    def problems(self) -> list[str]:
        problems = at_least(1, limit_test_batches=self.limit_test_batches) + at_least(0, facts=self.facts)
        if self.data.dynamic and self.distill.max_steps and self.distill.val_check_interval:
            steps = dynamic_problems(self.distill.max_steps, self.distill.val_check_interval)
            problems += [f"distill: {problem}" for problem in steps]
        return problems + above_zero(minutes=self.minutes)
