"""Models that run forward without a trainer, on Megatron's parallel state: for scoring, cutting and evaluating."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.jobs.progress import Progress, Silent
from nemo_minitron.launch.ranks import rank
from nemo_minitron.megatron.chunks import output_in_chunks
from nemo_minitron.megatron.layout import Layout
from nemo_minitron.megatron.session import model_config
from nemo_minitron.megatron.weights import WeightSource, build_model

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from torch import Tensor


@contextlib.contextmanager
def parallel_ranks(layout: Layout, seed: int) -> Iterator[None]:
    """Process group and Megatron's parallel state for `layout`; call it inside ``engine()``."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if layout.cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
        if not torch.distributed.is_initialized():
            init = "env://" if world > 1 else f"file://{folder}/store"
            backend = "nccl" if layout.cuda else "gloo"
            torch.distributed.init_process_group(backend, init_method=init, rank=rank(), world_size=world)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_parallel,
            pipeline_model_parallel_size=layout.pipeline_parallel,
            context_parallel_size=layout.context_parallel,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            if world == 1:
                torch.distributed.destroy_process_group()


def load_model(
    architecture: Architecture, layout: Layout, checkpoint: WeightSource | None, *, local_spec: bool = False
) -> "GPTModel":
    """A Megatron GPTModel in evaluation mode with the weights of `checkpoint` (None: random)."""
    import torch

    config = model_config(architecture, layout, local_spec=local_spec)
    config.tensor_model_parallel_size = layout.tensor_parallel
    config.pipeline_model_parallel_size = layout.pipeline_parallel
    config.sequence_parallel = layout.sequence_parallel
    config.context_parallel_size = layout.context_parallel
    config.variable_seq_lengths = False
    model = build_model(config, architecture, checkpoint)
    if layout.bf16:
        model = model.bfloat16()
    if layout.cuda:
        model = model.cuda(torch.cuda.current_device())
    return model.eval()


def run_forward(
    model: "GPTModel",
    sequences: "Tensor",
    batch: int,
    take: Callable[["Tensor", int], None] | None = None,
    progress: Progress | None = None,
    states: "Callable[[Tensor], None] | None" = None,
) -> None:
    """Runs `model` forward over token sequences through Megatron's schedule, any pipeline layout.

    Logits are worked out a few tokens at a time, and only where losses are taken.

    Args:
        sequences: tokens [n, s + 1]; the last column is only a label.
        batch: samples a forward pass.
        take: called on the last stage with (losses a token [b, s], batch's index); s is this rank's share of the
            tokens under context parallel.
        progress: is told of each batch.
        states: called on the last stage, before `take`, with a batch's last hidden states [s, b, h].
    """
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_batch_on_this_cp_rank

    length = sequences.shape[1] - 1
    schedule = get_forward_backward_func()
    device = next(model.parameters()).device

    def step(iterator: "Iterator[tuple[int, Tensor]]", model: "GPTModel") -> "tuple[Tensor, Callable[..., Any]]":
        index, tokens = next(iterator)
        tokens = tokens.to(device)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # [b, s]
        positions = torch.arange(length, device=device).expand_as(inputs)
        share = get_batch_on_this_cp_rank({"input_ids": inputs, "position_ids": positions, "labels": labels})
        output = model(**share, attention_mask=None)

        def collect(output: "Tensor") -> "tuple[Tensor, dict[str, Any]]":
            if take is not None:
                take(output.float(), index)
            return output.float().mean(), {}

        return output, collect

    batches = (progress or Silent()).over(sequences.split(batch))
    with torch.no_grad(), output_in_chunks(model, losses=take is not None, states=states):
        for index, tokens in enumerate(batches):
            schedule(
                forward_step_func=step,
                data_iterator=iter([(index, tokens)]),
                model=[model],
                num_microbatches=1,
                seq_length=length,
                micro_batch_size=tokens.shape[0],
                forward_only=True,
            )
