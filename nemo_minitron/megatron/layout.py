"""Layout: the hardware at hand and how a model is spread over it."""

import dataclasses

from nemo_minitron.architecture import Architecture
from nemo_minitron.config import ModelConfig, PruneModelConfig, TrainerConfig, is_bf16
from nemo_minitron.errors import EngineError
from nemo_minitron.packages.versions import has_module, installed

TRANSFORMER_ENGINE = "transformer_engine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks, parallel sizes, precision and batch of one run.

    Attributes:
        cuda: whether the run uses GPUs; otherwise gloo ranks on the CPU.
        bf16: whether parameters and activations are bf16 (with fp32 main parameters); otherwise all fp32.
        micro_batch_size: samples a rank works on at once.
        global_batch_size: samples an optimizer step, over all data-parallel ranks.
    """

    cuda: bool
    bf16: bool
    devices: int = 1
    num_nodes: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    global_batch_size: int = 1

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes


def transformer_engine_runs(cuda: bool) -> bool:
    """Whether Transformer Engine is installed for the hardware at hand; it is not imported.

    Its kernels are CUDA's, but for a build whose version says otherwise, as PyTorch's do (``2.5.0+cpu``).
    """
    if not has_module(TRANSFORMER_ENGINE):
        return False
    return cuda or (installed(TRANSFORMER_ENGINE) or "").endswith("+cpu")


def layout_of(trainer: TrainerConfig, model: ModelConfig | PruneModelConfig) -> Layout:
    """The layout that a configuration asks for, on the hardware at hand.

    Raises:
        EngineError: GPUs are asked for and there are none, or too few; or the layout needs Transformer Engine.
    """
    import torch

    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda = trainer.accelerator == "gpu" or (trainer.accelerator == "auto" and available > 0)
    if cuda and available < trainer.devices:
        raise EngineError(
            f"trainer.devices = {trainer.devices} GPUs asked for, {available} found; "
            "on a machine without GPUs give trainer.accelerator=cpu (or hardware=cpu)"
        )
    if not transformer_engine_runs(cuda):
        if getattr(model, "sequence_parallel", False):
            raise EngineError(
                "model.sequence_parallel needs Transformer Engine on a GPU: Megatron's local norms refuse it; "
                "give model.sequence_parallel=false"
            )
        if getattr(model, "context_parallel_size", 1) > 1:
            raise EngineError("model.context_parallel_size above 1 needs Transformer Engine on a GPU")
    return Layout(
        cuda=cuda,
        bf16=is_bf16(str(trainer.precision), cuda),
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        tensor_parallel=model.tensor_model_parallel_size,
        pipeline_parallel=model.pipeline_model_parallel_size,
        context_parallel=getattr(model, "context_parallel_size", 1),
        sequence_parallel=getattr(model, "sequence_parallel", False),
        micro_batch_size=getattr(model, "micro_batch_size", 1),
        global_batch_size=getattr(model, "global_batch_size", 1),
    )


def check_length(tokens: int, layout: Layout) -> None:
    """Checks that a sample's tokens can be spread as the layout asks: context parallel deals 2 chunks to every rank.

    Raises:
        EngineError: with the equation that fails.
    """
    chunks = 2 * layout.context_parallel if layout.context_parallel > 1 else 1
    chunks *= layout.tensor_parallel if layout.sequence_parallel else 1
    rest = tokens % chunks
    if rest:
        raise EngineError(
            f"samples of {tokens} tokens do not fit the layout: sequence and context parallel need a multiple of "
            f"{chunks} ({tokens} mod {chunks} = {rest}); give model.data.seq_length={tokens - rest or chunks}"
        )


def check_fits(architecture: Architecture, layout: Layout, role: str = "model") -> None:
    """Checks that the sizes of a model can be divided as the layout asks.

    Raises:
        EngineError: with the equation that fails.
    """
    tensor, pipeline = layout.tensor_parallel, layout.pipeline_parallel
    problems = [
        f"{name} {value} is not a multiple of tensor parallel {tensor} ({value} mod {tensor} = {value % tensor})"
        for name, value in (
            ("num_attention_heads", architecture.num_attention_heads),
            ("num_query_groups", architecture.num_query_groups),
            ("ffn_hidden_size", architecture.ffn_hidden_size),
            ("vocabulary rows", architecture.vocab_size),
        )
        if value % tensor
    ]
    if architecture.num_layers < pipeline:
        problems.append(f"{architecture.num_layers} layers cannot be spread over {pipeline} pipeline stages")
    if problems:
        raise EngineError(f"the {role} does not fit the layout: " + "; ".join(problems))
