"""Settings of `minitron teach`: those of a training that say which samples are read, and what is kept of each."""

import dataclasses
from dataclasses import field

from nemo_minitron.config.schemas.base import Config, at_least, one_of
from nemo_minitron.config.schemas.formats import makes_file
from nemo_minitron.config.schemas.training import TrainingConfig

KEEP = ("hidden", "sampled", "topk")
PRECISIONS = ("bf16", "fp8", "fp32")


@dataclasses.dataclass(kw_only=True)
class AnswersConfig(Config):
    """What is kept of a teacher."""

    keep: str = "hidden"
    """`hidden`: the last hidden states and, once, the output matrix; any loss on logits is then exact. `sampled`:
    tokens drawn from the teacher's distribution with their counts, unbiased and far smaller. `topk`: its likeliest
    tokens, and what the others have together."""
    precision: str = "bf16"
    """Of hidden states: `bf16`, `fp8` (e4m3, with a scale a token) or `fp32`."""
    draws: int = 64
    """keep=sampled: draws a token."""
    top_k: int = 64
    """keep=topk: tokens kept of each distribution."""
    tokens: int | None = None
    """Of the training split, the first so many tokens in the order that distill reads them; none: all."""
    shard_megabytes: int = 256
    """Size of a file, about. A run that was stopped goes on after the last whole one."""

    def problems(self) -> list[str]:
        problems = one_of("keep", self.keep, KEEP) + one_of("precision", self.precision, PRECISIONS)
        problems += at_least(
            1, draws=self.draws, top_k=self.top_k, tokens=self.tokens, shard_megabytes=self.shard_megabytes
        )
        if max(self.draws, self.top_k) > 1 << 16:
            problems.append("draws and top_k must be at most 65536")
        return problems


@dataclasses.dataclass(kw_only=True)
class TeachConfig(TrainingConfig):
    """One pass of a teacher, model.restore_from_path, over the samples that distill reads.

    The training split and as much of validation as trainer.limit_val_batches x model.global_batch_size takes.
    model.sequence_parallel changes nothing here: it saves memory of training.
    """

    teach: AnswersConfig = field(default_factory=AnswersConfig)

    @property
    def fixed_windows(self) -> bool:
        return True

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.model.data.windows == "shuffled":
            problems.append(
                "model.data.windows = shuffled: answers can be kept only of windows that are the same in each pass; "
                "give fixed or auto"
            )
        if self.model.context_parallel_size > 1:
            problems.append(
                "model.context_parallel_size: teach takes none, since a rank must have whole sequences; spread the "
                "teacher by model.tensor_model_parallel_size and model.pipeline_model_parallel_size"
            )
        if self.model.init == "random":
            problems.append("model.init = random: teach runs a checkpoint, model.restore_from_path")
        if self.to is not None or makes_file(self.target_format):
            problems.append("the result is a folder of answers and no checkpoint: give no `to`, and no file's name")
        return problems
