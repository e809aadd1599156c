"""Settings of `minitron prune`."""

import dataclasses
from dataclasses import field
from typing import Any

from nemo_minitron.config.schemas.base import Config, at_least, one_of
from nemo_minitron.config.schemas.formats import format_problems, output_format
from nemo_minitron.config.schemas.hardware import TrainerConfig
from nemo_minitron.config.schemas.instructions import InstructConfig
from nemo_minitron.config.schemas.training import ModelDataConfig

METHODS = ("minitron", "compensated")
CHOICES = ("saliency", "importance")
REFITS = ("sequential", "once")
DEPTH_BY = ("block_loss", "block_influence", "compensated_loss")


@dataclasses.dataclass(kw_only=True)
class PruneTargets(Config):
    """What to cut (NeMo 24.07's `prune`)."""

    drop_layers: Any = None
    """Layers to drop, 1-based: [16,17,31] or ranges [16-31]."""
    num_layers: int | None = None
    """Layers to keep, chosen by importance."""
    hidden_size: int | None = None
    """Width of the residual stream to keep."""
    ffn_hidden_size: int | None = None
    """FFN neurons to keep."""
    num_attention_heads: int | None = None
    """Attention heads to keep; a multiple of the query groups. The head size stays."""
    method: str | None = None
    """`minitron`: what is not important is dropped (the published cut). `compensated`: the rest makes up for it, by a
    rotation of the residual stream and least squares. None: compensated; minitron where only layers are named and there
    is no data to run the teacher on."""
    depth_by: str = "block_influence"
    """How num_layers are chosen. `block_loss`: the contiguous block without which the loss is least. `block_influence`:
    the layers that change the stream least, one by one. `compensated_loss`: one layer after the other, the one that
    costs least loss with linear maps in the place of all that go; far more to compute."""
    depth_beam: int = 1
    """depth_by=compensated_loss: sets of layers that are kept in each round; above 1 it is a beam search."""
    depth_samples: int = 8
    """depth_by=compensated_loss: held-out samples to choose layers on; one in four of num_block_samples at most."""
    num_query_groups: int | None = None
    """Kept for NeMo 24.07's overrides; ModelOpt no longer prunes it, so only the teacher's own value is taken."""
    num_samples: int = 1024
    """Calibration samples: random sequences of full length from the training split."""
    num_block_samples: int = 256
    """Samples on which blocks of layers are left out and the student is refitted, one in four of them to choose the
    ridge on."""
    statistics: bool = True
    """While scoring, gather the second moments that method=compensated needs."""
    ridge: float = 1e-3
    """Compensated: ridge of the least squares, over the mean of the moments' diagonal."""
    merge_heads: bool = False
    """Compensated: merge the residual of dropped heads into the queries that stay (arXiv 2407.14679, section 2.3)
    instead of refitting linear_proj."""
    untie: bool = False
    """Compensated, tied embeddings: give the student an output matrix of its own, which takes in the final norm's
    gain."""
    gain_tolerance: float = 0.1
    """Compensated, tied embeddings: a rotation mixes only channels whose final gains lie within this share of a common
    value, 0 to 1; with 0 only equal gains, so that nothing is approximated."""
    choose_by: str = "saliency"
    """Compensated: neurons and heads by `saliency`, what removing one costs once the rest is refitted, or by
    `importance`, ModelOpt's, as method=minitron does."""
    refit: str | None = None
    """Compensated: `sequential` fits each layer of the student once more, to what the layers before it produce as they
    are cut; `once` leaves it at the refit to the teacher's own activations, and runs no model for a further student.
    None: sequential where there is data to run it on."""
    scores_path: str | None = None
    """Folder of importance scores to reuse or to make; none: beside the teacher's checkpoint, `<teacher>.scores`."""
    hidden_size_divisor: int | None = None
    """Grid of hidden_size; none: 256, or the largest power of two that gives a smaller model 12 steps (at least 8)."""
    ffn_hidden_size_divisor: int | None = None
    """Grid of ffn_hidden_size; none: 512, or the largest power of two that gives a smaller model 12 steps (at least
    16)."""
    num_layers_divisor: int = 2
    """Grid of num_layers."""

    @property
    def width(self) -> bool:
        """Whether a width is cut."""
        sizes = (self.hidden_size, self.ffn_hidden_size, self.num_attention_heads)
        return any(size is not None for size in sizes)

    @property
    def needs_scores(self) -> bool:
        """Whether importance scores decide what is cut."""
        return self.width or (self.num_layers is not None and self.depth_by == "block_influence")

    @property
    def chooses_block(self) -> bool:
        """Whether the loss without blocks of layers decides which go."""
        return self.num_layers is not None and self.depth_by in ("block_loss", "compensated_loss")

    @property
    def chooses_by_maps(self) -> bool:
        """Whether layers are chosen by the loss with maps in place of those that go."""
        return self.chooses_block and self.depth_by == "compensated_loss"

    def problems(self) -> list[str]:
        problems = at_least(
            1,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_samples=self.num_samples,
            num_block_samples=self.num_block_samples,
            depth_beam=self.depth_beam,
            depth_samples=self.depth_samples,
            hidden_size_divisor=self.hidden_size_divisor,
            ffn_hidden_size_divisor=self.ffn_hidden_size_divisor,
            num_layers_divisor=self.num_layers_divisor,
        )
        problems += one_of("method", self.method or "minitron", METHODS)
        problems += one_of("choose_by", self.choose_by, CHOICES) + one_of("refit", self.refit or "once", REFITS)
        if not 0 <= self.gain_tolerance <= 1:
            problems.append(f"gain_tolerance = {self.gain_tolerance} must lie from 0 to 1")
        problems += one_of("depth_by", self.depth_by, DEPTH_BY)
        if self.method == "minitron" and self.chooses_block and self.depth_by == "compensated_loss":
            problems.append(
                "depth_by = compensated_loss chooses layers with linear maps in their place, which method = minitron "
                "leaves out: give method=compensated, or depth_by=block_loss"
            )
        if not 0 < self.ridge < 1:
            problems.append(f"ridge = {self.ridge} must be above 0 and below 1")
        if not self.drop_layers and not self.width and self.num_layers is None:
            problems.append(
                "drop_layers is missing, and so are num_layers, hidden_size, ffn_hidden_size and num_attention_heads: "
                "name at least one of them"
            )
        if self.drop_layers and self.num_layers is not None:
            problems.append("drop_layers and num_layers are both given: name the layers, or have them chosen, not both")
        return problems


@dataclasses.dataclass(kw_only=True)
class ExportConfig(Config):
    """The result of pruning."""

    save_path: str = "???"
    """Checkpoint to make."""

    def problems(self) -> list[str]:
        return ["save_path is missing: name the checkpoint to make"] if self.save_path == "???" else []


@dataclasses.dataclass(kw_only=True)
class InferenceConfig(Config):
    """Calibration batches."""

    batch_size: int = 1
    """Samples a forward pass. Scores are the same for any size: L2 over samples, mean over the sequence."""

    def problems(self) -> list[str]:
        return at_least(1, batch_size=self.batch_size)


@dataclasses.dataclass(kw_only=True)
class PruneModelConfig(Config):
    """The teacher to prune, and the data to score it on."""

    restore_from_path: str | None = None
    """The teacher's checkpoint."""
    tensor_model_parallel_size: int = 1
    """ModelOpt scores with 1; of no effect where the layers to drop are named and nothing is scored."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers while scoring."""
    encoder_seq_length: int | None = None
    """Tokens a calibration sample; data.seq_length wins; none: the model's own length."""
    data: ModelDataConfig = field(default_factory=ModelDataConfig)

    def problems(self) -> list[str]:
        problems = at_least(1, pipeline_model_parallel_size=self.pipeline_model_parallel_size)
        if not self.restore_from_path:
            problems.append("restore_from_path is missing: name the teacher's checkpoint")
        return problems


@dataclasses.dataclass(kw_only=True)
class PruneConfig(Config):
    """Depth and width pruning."""

    seed: int = 1234
    """Seed of the choice of calibration samples."""
    overwrite: bool = False
    """Replace an output that was made from something else."""
    to: str | None = None
    """Format of the result: nemo2, nemo1, hf, bridge or gguf; none: *.nemo is an archive (NeMo-1 layout), *.gguf a GGUF
    file, else a NeMo-2 directory."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: PruneModelConfig = field(default_factory=PruneModelConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    instruct: InstructConfig = field(default_factory=InstructConfig)
    prune: PruneTargets = field(default_factory=PruneTargets)
    export: ExportConfig = field(default_factory=ExportConfig)

    @property
    def teacher(self) -> str:
        """The teacher's checkpoint; a configuration without one is not valid."""
        assert self.model.restore_from_path is not None
        return self.model.restore_from_path

    @property
    def output(self) -> str:
        """The checkpoint that the stage makes."""
        return self.export.save_path

    @property
    def target_format(self) -> str:
        """The format of the result."""
        return output_format(self.output, self.to)

    @property
    def method(self) -> str:
        """How the cut is made."""
        if self.prune.method:
            return self.prune.method
        layers_alone = not self.prune.width and self.prune.num_layers is None
        return "minitron" if layers_alone and not self.model.data.names_text else "compensated"

    @property
    def refits(self) -> bool:
        """Whether the student is refitted layer by layer before it is written."""
        if self.method != "compensated":
            return False
        return self.prune.refit == "sequential" or (self.prune.refit is None and self.model.data.names_text)

    @property
    def needs_scan(self) -> bool:
        """Whether blocks of layers have to be left out while the teacher runs: to choose one, or to stand in for it."""
        depth = bool(self.prune.drop_layers) or self.prune.num_layers is not None
        return self.prune.chooses_block or (self.method == "compensated" and depth)

    def problems(self) -> list[str]:
        problems = [] if self.output == "???" else format_problems(self.output, self.to)
        if self.model.data.dynamic:
            problems.append("model.data.dynamic is for finetune and distill")
        if self.prune.refit == "sequential" and self.method == "minitron":
            problems.append(
                "prune.refit=sequential is part of prune.method=compensated; method=minitron refits nothing"
            )
        elif self.prune.refit == "sequential" and not self.model.data.names_text:
            problems.append(
                "prune.refit=sequential needs text to run on, model.data.data_prefix; prune.refit=once needs none"
            )
        if self.prune.needs_scores and self.model.tensor_model_parallel_size != 1:
            problems.append(
                f"model.tensor_model_parallel_size = {self.model.tensor_model_parallel_size}: ModelOpt scores with 1 "
                "only; spread the layers instead, model.pipeline_model_parallel_size=N"
            )
            return problems
        return problems + self._rank_problems()

    def _rank_problems(self) -> list[str]:
        """What is wrong with the ranks that run the teacher."""
        world = self.trainer.devices * self.trainer.num_nodes
        tensor, pipeline = self.model.tensor_model_parallel_size, self.model.pipeline_model_parallel_size
        if not (self.prune.needs_scores or self.needs_scan) or (tensor * pipeline and world % (tensor * pipeline) == 0):
            return []
        return [
            f"world size {world} = trainer.devices {self.trainer.devices} x trainer.num_nodes {self.trainer.num_nodes} "
            f"must be a multiple of tensor {tensor} x pipeline {pipeline} parallel = {tensor * pipeline}"
        ]
