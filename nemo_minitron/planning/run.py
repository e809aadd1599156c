"""What a plan is about: a layout, its sequence length, and what is installed where it runs."""

import dataclasses

from nemo_minitron.architecture import Architecture
from nemo_minitron.megatron.layout import Layout
from nemo_minitron.megatron.session import uneven_stages
from nemo_minitron.packages.versions import core_source

#: Families whose gated activation Megatron fuses (NeMo's configs of them set bias_activation_fusion).
FUSED_GATE = ("llama",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Core:
    """What a version of Megatron Core keeps of a layer; the defaults are those of 0.15.

    Attributes:
        gate_offset: adds an offset to the linear half of a gated FFN, and keeps the sum; before 0.15 there is none.
        takes_gate: takes the gate of the local spec from this package, which keeps its input alone; from 0.15 on.
    """

    gate_offset: bool = True
    takes_gate: bool = True


def installed_core() -> Core:
    """The Megatron Core that is installed, or 0.15 where none is."""
    ffn = core_source("transformer/mlp.py")
    if ffn is None:
        return Core()
    return Core(gate_offset="glu_linear_offset" in ffn, takes_gate="submodules.activation_func" in ffn)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a stage.

    Attributes:
        layout: ranks, parallel sizes, precision and batch, as the engine takes them.
        seq_length: tokens a sample.
        transformer_engine: whether Transformer Engine is there; on a GPU it brings its layer spec.
        fused_loss: distillation: whether the loss is worked out together with the output layer (kd.form).
        statistics: scoring: whether second moments are gathered.
        threads: of torch on a CPU; each has its share of the loss's buffers.
        device_bytes: memory of a rank's device, where it is known.
        core: what is known of Megatron Core's version.
    """

    layout: Layout
    seq_length: int
    transformer_engine: bool = True
    fused_loss: bool = True
    statistics: bool = True
    threads: int = 1
    device_bytes: float | None = None
    core: Core = dataclasses.field(default_factory=installed_core)

    @property
    def local_spec(self) -> bool:
        """Whether Megatron's local layer spec runs, its norms and attention PyTorch's."""
        return not (self.layout.cuda and self.transformer_engine)

    @property
    def bytes(self) -> int:
        """Of a parameter or an activation."""
        return 2 if self.layout.bf16 else 4

    @property
    def tokens(self) -> int:
        """Of a micro batch on a rank."""
        return self.layout.micro_batch_size * self.seq_length // self.layout.context_parallel

    @property
    def data_parallel(self) -> int:
        layout = self.layout
        return layout.world_size // (layout.tensor_parallel * layout.pipeline_parallel * layout.context_parallel)

    @property
    def micro_batches(self) -> int:
        """Micro batches that a rank works on in an optimizer step."""
        return max(1, self.layout.global_batch_size // (self.layout.micro_batch_size * self.data_parallel))

    def in_flight(self, stage: int) -> int:
        """Micro batches whose activations the pipeline stage `stage` holds at once (one forward, one backward)."""
        return min(self.layout.pipeline_parallel - stage, self.micro_batches)


def stage_layers(num_layers: int, stages: int) -> list[int]:
    """Layers of each pipeline stage, as the engine tells Megatron."""
    told = uneven_stages(num_layers, stages)
    first = told.get("num_layers_in_first_pipeline_stage")
    last = told.get("num_layers_in_last_pipeline_stage")
    outer = [layers for layers in (first, last) if layers is not None]
    inner = stages - len(outer)
    each = (num_layers - sum(outer)) // inner if inner else 0
    return ([first] if first is not None else []) + [each] * inner + ([last] if last is not None else [])


def rank_parameters(a: Architecture, layout: Layout, stage: int) -> int:
    """Parameters that a rank of the pipeline stage `stage` holds.

    Matrices are shared by the tensor-parallel ranks; norms, and biases added after a sum over ranks, are on each.
    """
    tensor, pipeline = layout.tensor_parallel, layout.pipeline_parallel
    h, norm = a.hidden_size, a.hidden_size * (2 if a.normalization == "LayerNorm" else 1)
    whole = a.norm_parameters() + (2 * h if a.add_bias_linear else 0)
    total = stage_layers(a.num_layers, pipeline)[stage] * (whole + (a.layer_parameters() - whole) // tensor)
    matrix = a.vocab_size // tensor * h
    first, last = stage == 0, stage == pipeline - 1
    total += matrix if first else 0
    if last:
        total += norm + (0 if first and a.share_embeddings_and_output_weights else matrix)
    return total


def largest_parameter(a: Architecture, layout: Layout, stage: int) -> int:
    """Elements of the largest parameter that a rank of a pipeline stage holds."""
    tensor = layout.tensor_parallel
    fc1 = a.ffn_hidden_size * (2 if a.gated_linear_unit else 1)
    rows = max(fc1, a.qkv_rows()) // tensor
    if stage in (0, layout.pipeline_parallel - 1):
        rows = max(rows, a.vocab_size // tensor)
    return rows * a.hidden_size
