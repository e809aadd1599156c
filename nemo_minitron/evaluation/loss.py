"""Token loss and perplexity of a checkpoint on the splits of a corpus."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.config import LossConfig
from nemo_minitron.data.module import paths
from nemo_minitron.jobs.progress import Progress, Silent
from nemo_minitron.training.inputs import LOG, Inputs, stated_path, training_inputs
from nemo_minitron.training.stage import run_training_stage

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from torch import Tensor


def evaluate_loss(config: LossConfig) -> Manifest:
    """Loss on `config.splits`, consecutive windows from the start of each, every token predicted once.

    The manifest's metrics hold, for each split, the mean negative log-likelihood in nats a token, its exponential
    (the perplexity a token) and the number of tokens.

    Raises:
        ConfigError, CheckpointError, DataError, EngineError: before any work.
    """
    path = stated_path(config.model.restore_from_path, "model.restore_from_path")
    checkpoint = open_checkpoint(path, quantized=True)
    inputs = training_inputs(config, checkpoint.architecture, checkpoint.tokenizer)
    return run_training_stage(
        "evaluate",
        evaluate_loss,
        config,
        {"checkpoint": path} | inputs.files(),
        lambda partial: measure_splits(partial, config, checkpoint, inputs),
        resumable=False,
    )


def measure_splits(partial: Path, config: LossConfig, checkpoint: Checkpoint, inputs: Inputs) -> dict[str, Any]:
    """The job's work: the loss on each split; every rank calls it."""
    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.session import engine

    metrics: dict[str, Any] = {}
    started = time.perf_counter()
    with engine(config.seed, partial / LOG, cuda=inputs.layout.cuda), parallel_ranks(inputs.layout, config.seed):
        model = load_model(checkpoint.architecture, inputs.layout, checkpoint)
        for split in config.splits:
            if inputs.sources:
                metrics[split] = _blended(model, config, inputs, split)
            else:
                metrics[split] = _measured(model, config, inputs, split, paths(inputs.prefixes[split]))
    metrics["parameters"] = checkpoint.architecture.parameters()
    return {"metrics": metrics, "timings": {"evaluation_seconds": time.perf_counter() - started}}


def _measured(
    model: "GPTModel", config: LossConfig, inputs: Inputs, split: str, prefixes: list[str], source: str = ""
) -> dict[str, Any]:
    """Loss, perplexity and tokens of the first windows of a split's datasets."""
    from nemo_minitron.data.samples import consecutive_sequences

    limit = config.limit_batches * config.model.global_batch_size
    sequences = consecutive_sequences(prefixes, inputs.seq_length, limit)
    told = f"{split} of {source}" if source else split
    loss = mean_loss(model, sequences, config.model.micro_batch_size, _progress(config, told))
    return _said(loss, int(sequences[:, 1:].numel()))


def _blended(model: "GPTModel", config: LossConfig, inputs: Inputs, split: str) -> dict[str, Any]:
    """The same of each source of a blend, `by_source`, and of all as their shares weigh them."""
    parts = {
        source.name: _measured(model, config, inputs, split, paths(source.prefixes[split]), source.name)
        for source in inputs.sources
    }
    loss = math.fsum(source.share * parts[source.name]["loss"] for source in inputs.sources)
    return _said(loss, sum(part["tokens"] for part in parts.values())) | {"by_source": parts}


def _said(loss: float, tokens: int) -> dict[str, Any]:
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}


def _progress(config: LossConfig, split: str) -> Callable[[int], Progress]:
    """What is told of the samples of a split on this rank, by how many there are."""
    name, every = f"evaluate {Path(config.output).name}, {split}", config.trainer.log_every_n_steps
    return lambda samples: Progress(name, samples, unit="sample", every=every)


def mean_loss(
    model: "GPTModel", sequences: "Tensor", batch: int, watched: Callable[[int], Progress] | None = None
) -> float:
    """Mean negative log-likelihood in nats a token over token sequences [n, s + 1], on every rank.

    Args:
        batch: samples a forward pass.
        watched: gives, for the number of samples of this rank, what is told of each batch.
    """
    import torch
    from megatron.core import parallel_state

    from nemo_minitron.megatron.forward import run_forward
    from nemo_minitron.training.losses import from_last_stage

    ranks = parallel_state.get_data_parallel_world_size()
    mine = sequences[parallel_state.get_data_parallel_rank() :: ranks]
    total = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)

    def take(losses: "Tensor", index: int) -> None:
        total[0] += losses.double().sum()
        total[1] += losses.numel()

    if len(mine):
        with watched(len(mine)) if watched else Silent() as progress:
            run_forward(model, mine, batch, take, progress)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    total = from_last_stage(total, 2)
    return float(total[0] / total[1])
