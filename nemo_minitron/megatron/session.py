"""The one place that builds configs and trainers for a model on the hardware at hand.

Transformer Engine's layer spec where it is installed and runs on the hardware at hand, Megatron's local spec otherwise.
Without NeMo models run forward, by Megatron Core alone (megatron.config).
"""

import contextlib
import gc
import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.formats.nemo2.engine import nemo_config
from nemo_minitron.megatron.config import core_config, torch_layers
from nemo_minitron.megatron.cpu import megatron_on_cpu, without_toolkit
from nemo_minitron.megatron.layout import Layout, transformer_engine_runs
from nemo_minitron.packages import versions
from nemo_minitron.packages.versions import has_nemo

if TYPE_CHECKING:
    import lightning.pytorch as pl
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer import TransformerConfig
    from nemo import lightning as nl
    from torch import Tensor

#: Fields of NeMo's configs that need Transformer Engine or CUDA kernels, and their values without them.
WITHOUT_FUSIONS = {
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "cross_entropy_loss_fusion": False,
}

#: Fields of a batch that NeMo's own data step shares out.
NEMO_FIELDS = {
    "tokens", "labels", "loss_mask", "position_ids", "attention_mask", "cu_seqlens", "cu_seqlens_argmin", "max_seqlen",
}  # fmt: skip
#: Set it where a process runs stages and holds nothing else: what is alive when one begins stays frozen for the garbage
#: collector (``gc.freeze()``), and no later one looks through the engines' million objects again.
stages_alone = False
LAUNCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE", "GROUP_RANK")


@contextlib.contextmanager
def engine(seed: int, log: Path | None = None, *, cuda: bool | None = None) -> Iterator[None]:
    """Megatron ready to use for the body, and no trace of its global state afterwards.

    What a host has frozen for the garbage collector (``gc.freeze()``) stays so, and nothing is frozen beside it.

    Args:
        seed: seeds Python, NumPy and torch; Megatron's own states are seeded by NeMo, or by ``parallel_ranks()``.
        log: file that takes the chatter of NeMo, Megatron, ModelOpt and Lightning.
        cuda: whether the body runs on GPUs (the layout says so); None: where there are any.
    """
    with (
        _same_environment(),
        without_toolkit(),
        quiet(log),
        megatron_on_cpu(cuda),
        versions.optimizer_as_nemo_asks(),
    ):
        reset_parallel_state()
        gc.collect()  # what a stage before this one still holds in cycles
        by_host = not stages_alone and gc.get_freeze_count() > 0
        if not by_host:
            gc.freeze()  # the engines' own million objects are not looked through again for what the body leaves
        _seed_everything(seed)
        try:
            yield
        finally:
            reset_parallel_state()
            gc.collect()
            if not (by_host or stages_alone):
                gc.unfreeze()


def _seed_everything(seed: int) -> None:
    """Lightning's way, which the workers of its data loaders follow; without it the same generators."""
    if has_nemo():
        import lightning.pytorch as pl

        pl.seed_everything(seed, workers=True, verbose=False)
        return
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """Takes back what Lightning sets for its ranks: a child process would meet the port that its parent listens on."""
    before = {name: os.environ.get(name) for name in LAUNCH_VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def reset_parallel_state() -> None:
    """Clears what NeMo and Megatron keep in module globals, so that one process can run one stage after another."""
    import torch
    from megatron.core import num_microbatches_calculator, parallel_state

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    if has_nemo():
        from nemo.utils import AppState

        AppState()._is_megatron_initialized = False
        AppState().model_parallel_size = None
    if torch.distributed.is_initialized() and "TORCHELASTIC_RUN_ID" not in os.environ:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def quiet(log: Path | None) -> Iterator[None]:
    """Sends log records and Python-level prints of the engines to the file `log`, warnings and errors included."""
    if log is None:
        yield
        return
    import warnings

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        # The root first: the engines' imports below have things to say already.
        saved = [_send_to(handler, logging.getLogger())]
        if has_nemo():
            saved.append(_send_to(handler, _import_apart("nemo.utils").logging._logger))
            _import_apart("nemo.collections.llm", "nemo.collections.llm.modelopt.distill.model")
        noisy = [logging.getLogger(name) for name in ("lightning.pytorch", "megatron", "nv_one_logger", "py.warnings")]
        saved += [_send_to(handler, logger) for logger in noisy]
        logging.captureWarnings(True)
        try:
            with contextlib.redirect_stdout(file), warnings.catch_warnings():
                yield
        finally:
            logging.captureWarnings(False)
            for logger, handlers, propagate in saved:
                logger.handlers, logger.propagate = handlers, propagate


def _import_apart(*names: str) -> ModuleType:
    """Imports modules in a thread of its own; returns the first.

    NeMo keeps the errors of what could not be imported, and they keep the frames above them: in this thread those of a
    stage, and with them its model for as long as the process lives.
    """
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as apart:
        return list(apart.map(importlib.import_module, names))[0]


def _send_to(handler: logging.Handler, logger: logging.Logger) -> tuple[logging.Logger, list[logging.Handler], bool]:
    """Makes `handler` the logger's only one; returns what was there before."""
    before = logger, logger.handlers[:], logger.propagate
    logger.handlers, logger.propagate = [handler], False
    return before


def model_config(architecture: Architecture, layout: Layout, *, local_spec: bool = False) -> "TransformerConfig":
    """NeMo's config of `architecture`, with the layer spec, fusions and precision for the hardware at hand.

    Without NeMo it is Megatron Core's, for the local layer spec.

    Args:
        local_spec: use Megatron's local layer spec even where Transformer Engine is installed.
    """
    import torch

    nemo = has_nemo()
    engine_fields: dict[str, Any] = {"forward_step_fn": forward_step, "data_step_fn": data_step} if nemo else {}
    if local_spec or not (nemo and transformer_engine_runs(layout.cuda)):
        engine_fields |= WITHOUT_FUSIONS | ({"transformer_layer_spec": torch_layers} if nemo else {})
        if architecture.gated_linear_unit and architecture.activation == "silu" and versions.ffn_takes_activation():
            engine_fields["use_te_activation_func"] = True  # the layer spec's, megatron.local_layers.SwiGLU
        if architecture.layernorm_zero_centered_gamma:
            # Megatron's local LayerNorm has no zero-centred gamma: megatron.weights adds the 1 on load instead.
            engine_fields["layernorm_zero_centered_gamma"] = False
    if not layout.cuda:
        engine_fields["use_cpu_initialization"] = True
    if layout.bf16:
        engine_fields |= {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    else:
        engine_fields |= {"params_dtype": torch.float32, "pipeline_dtype": torch.float32}
    fields = {name: value for name, value in engine_fields.items() if name != "layernorm_zero_centered_gamma"}
    config = (nemo_config if nemo else core_config)(architecture, **fields)
    if "layernorm_zero_centered_gamma" in engine_fields:
        config.layernorm_zero_centered_gamma = False
    if architecture.sliding_window is not None:
        # Checkpoints state the window as NeMo does; Megatron counts the tokens before the query's own.
        config.window_size = (architecture.sliding_window - 1, 0)
    return config


def spread_layers(config: "TransformerConfig") -> None:
    """Tells Megatron how layers that do not divide evenly lie over the pipeline stages; call it before building.

    NeMo's strategy resets these fields of a model's config to its own, which are one for student and teacher.
    """
    for name, layers in uneven_stages(config.num_layers, config.pipeline_model_parallel_size).items():
        setattr(config, name, layers)


def uneven_stages(num_layers: int, stages: int) -> dict[str, int]:
    """Megatron takes layers that do not divide evenly if it is told what the first and last stage get."""
    if stages == 1 or num_layers % stages == 0:
        return {}
    per_stage = num_layers // stages
    if stages == 2:
        return {"num_layers_in_first_pipeline_stage": num_layers - per_stage}
    outer = num_layers - per_stage * (stages - 2)
    return {
        "num_layers_in_first_pipeline_stage": outer - outer // 2,
        "num_layers_in_last_pipeline_stage": outer // 2,
    }


def data_step(batches: Iterator[Any]) -> dict[str, Any]:
    """The next batch, each field on the pipeline stages that need it; fields that NeMo does not know go to the last.

    These are not shared out over context-parallel ranks.
    """
    from megatron.core import parallel_state
    from nemo.collections.llm.gpt.model.base import gpt_data_step

    batch = next(batches)
    batch = batch[0] if isinstance(batch, tuple) else batch
    known = {name: value for name, value in batch.items() if name in NEMO_FIELDS}
    fields: dict[str, Any] = gpt_data_step(iter([known]))
    if parallel_state.is_pipeline_last_stage():
        fields |= {name: value.cuda(non_blocking=True) for name, value in batch.items() if name not in NEMO_FIELDS}
    return fields


def forward_step(model: "GPTModel", batch: Mapping[str, Any]) -> "Tensor":
    """Forward pass of a GPT model on a batch of NeMo's data module; the causal mask is the layers' own.

    Without Transformer Engine NeMo's own step insists on a mask in the batch, which Megatron then does not need.
    """
    packed = {"packed_seq_params": packed_rows(batch)} if "cu_seqlens" in batch else {}
    output: Tensor = model(
        input_ids=batch["tokens"],  # [b, s]
        position_ids=batch["position_ids"],  # [b, s]
        attention_mask=batch.get("attention_mask"),
        labels=batch["labels"],  # [b, s]
        **packed,
    )
    return output


def packed_rows(batch: Mapping[str, Any]) -> "PackedSeqParams":
    """Where the rows of a packed sequence begin and end, for attention and rotary positions of every layer.

    NeMo's own gives the longest row's length as a tensor, for which Megatron works positions out anew each time.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    ends, longest = batch["cu_seqlens"].squeeze(0), int(batch["max_seqlen"])  # [rows + 1], b = 1
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def build_trainer(layout: Layout, *, callbacks: "list[pl.Callback] | None" = None, **arguments: Any) -> "pl.Trainer":
    """NeMo's trainer for `layout`: no logger, bar or checkpoints of its own, they are callbacks here.

    Args:
        arguments: further arguments of the trainer (max_steps, val_check_interval, limit_val_batches...).
    """
    from megatron.core.distributed import DistributedDataParallelConfig
    from nemo import lightning as nl

    strategy = _strategy_class()(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        context_parallel_size=layout.context_parallel,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=_dtype(layout) if layout.pipeline_parallel > 1 else None,
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=layout.cuda, grad_reduce_in_fp32=True, check_for_nan_in_grad=False
        ),
        ckpt_async_save=False,
        replace_progress_bar=False,
    )
    precision = nl.MegatronMixedPrecision(precision="bf16-mixed") if layout.bf16 else None
    with _in_notebooks_too():
        return nl.Trainer(
            accelerator="gpu" if layout.cuda else "cpu",
            devices=layout.devices,
            num_nodes=layout.num_nodes,
            strategy=strategy,
            plugins=precision,
            callbacks=callbacks or [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=arguments.pop("num_sanity_val_steps", 0),
            **arguments,
        )


def _strategy_class() -> "type[nl.MegatronStrategy]":
    """NeMo's strategy, or where ranks are joined already one that sets Megatron up all the same."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from nemo_minitron.megatron.joined import JoinedStrategy

        return JoinedStrategy
    from nemo import lightning as nl

    return nl.MegatronStrategy


@contextlib.contextmanager
def _in_notebooks_too() -> Iterator[None]:
    """Lightning refuses, in an interactive interpreter, strategies that start further processes of the same script.

    Here all ranks are there before a trainer is made, and it starts none.
    """
    from lightning.pytorch.trainer.connectors import accelerator_connector

    interactive = accelerator_connector._IS_INTERACTIVE
    accelerator_connector._IS_INTERACTIVE = False
    try:
        yield
    finally:
        accelerator_connector._IS_INTERACTIVE = interactive


def _dtype(layout: Layout) -> "torch.dtype":
    import torch

    return torch.bfloat16 if layout.bf16 else torch.float32
