"""From losses a token to what Megatron's schedule, the logs and the manifest want.

Legend: b micro batch, s sequence, k sources of a blend.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from nemo.lightning.megatron_parallel import MegatronLossReduction
    from torch import Tensor

#: A batch of NeMo's data module by name; it holds `loss_mask` [b, s] in any case, and in a run on a blend `source`
#: [b, k], 1 where a sample is of a source.
Batch = Mapping[str, Any]
LM_LOSS = "lm_loss"


class Losses(NamedTuple):
    """The losses of a micro batch.

    Attributes:
        total: what is trained on: masked, weighed and summed over tokens; it alone needs a gradient.
        shown: name -> loss a token [b, s], in nats, of each component that logs and the manifest show.
    """

    total: "Tensor"
    shown: dict[str, "Tensor"]


def weighed(shown: dict[str, "Tensor"], weights: Mapping[str, float], mask: "Tensor") -> Losses:
    """Losses that are trained on as they are shown: sum over names of weight sum_t mask loss.

    Args:
        weights: of each component; one without a weight, or of weight 0, is only shown.
        mask: [b, s], float.
    """
    import torch

    total = sum(weights[name] * masked_sum(value, mask) for name, value in shown.items() if weights.get(name))
    if not torch.is_tensor(total):  # nothing is trained on
        total = masked_sum(next(iter(shown.values())), mask) * 0.0
    return Losses(total, shown)


def masked_sum(losses: "Tensor", mask: "Tensor") -> "Tensor":
    """sum_t mask loss of losses a token and a float mask [b, s], in float32 at least."""
    return (losses.float() * mask).sum()


def sums_by_source(losses: "Sequence[Tensor]", mask: "Tensor", source: "Tensor") -> "Tensor":
    """Masked sums of each loss [b, s], then the tokens, of each source [k, losses + 1].

    Args:
        mask: [b, s], float.
        source: [b, k], 1 where a sample is of a source.
    """
    import torch

    samples = torch.stack([*((loss.float() * mask).sum(dim=1) for loss in losses), mask.sum(dim=1)], dim=1)
    return source.t().to(samples) @ samples


#: The losses of a batch and the model's output.
LossFunction = Callable[[Batch, "Tensor"], Losses]


class TokenLossesMixin:
    """Of a NeMo module: training and validation go by the losses a token that `token_losses` gives.

    Attributes:
        loss_names: the components, in the order of the sums.
        loss_weights: component -> weight in the loss that is trained on.
        sources: of a blend, by whose names losses are shown besides.
        sums: of the last global batch, on the last pipeline stage: each component summed over tokens, then the number
            of tokens, then the same of each source [(k + 1) (names + 1)].
    """

    loss_names: tuple[str, ...]
    loss_weights: dict[str, float]
    sources: tuple[str, ...] = ()
    sums: "Tensor | None" = None

    def token_losses(self, batch: Batch, output: "Tensor") -> Losses:
        """The losses of a batch and the model's output; a module's own."""
        raise NotImplementedError

    def weights_at(self, means: Mapping[str, float]) -> dict[str, float]:
        """The weights of a step whose components have these means."""
        return self.loss_weights

    def keep_sums(self, sums: "Tensor") -> None:
        self.sums = sums

    def gathered_sums(self) -> "Tensor":
        """The sums of the last global batch, on every rank; every rank calls it."""
        return from_last_stage(self.sums, (len(self.sources) + 1) * (len(self.loss_names) + 1))

    @property
    def training_loss_reduction(self) -> "MegatronLossReduction":
        return token_loss_reduction(self.loss_names, self.loss_weights, self.token_losses, self.keep_sums)

    @property
    def validation_loss_reduction(self) -> "MegatronLossReduction":
        return self.training_loss_reduction


def token_loss_reduction(
    names: tuple[str, ...],
    weights: Mapping[str, float],
    token_losses: LossFunction,
    keep_sums: Callable[["Tensor"], None],
) -> "MegatronLossReduction":
    """A MegatronLossReduction: sums the named losses, and averages them over all tokens of a global batch.

    Args:
        names: the components, in the order of the sums.
        weights: component -> weight in the loss that is trained on.
        token_losses: of a batch and the model's output.
        keep_sums: takes, on the last pipeline stage, the tensor [len(names) + 1] of the sums over the global batch:
            each component's, then the number of tokens; behind it the same of each source of a blend.
    """
    import torch
    from megatron.core import parallel_state
    from nemo.lightning.megatron_parallel import MegatronLossReduction

    class TokenLossReduction(MegatronLossReduction):
        def forward(self, batch: Batch, forward_out: "Tensor") -> tuple["Tensor", "Tensor", dict[str, "Tensor"]]:
            mask = batch["loss_mask"].float()  # [b, s]
            losses = token_losses(batch, forward_out)
            tokens = mask.sum()
            with torch.no_grad():
                sums = torch.stack([*(masked_sum(losses.shown[name], mask) for name in names), tokens.detach()])
                if "source" in batch:
                    shown = [losses.shown[name] for name in names]
                    sums = torch.cat([sums, sums_by_source(shown, mask, batch["source"]).flatten()])
            return losses.total, tokens.detach().to(torch.int), {"sums": sums}

        def reduce(self, outputs: list[dict[str, "Tensor"]]) -> "Tensor":
            sums = torch.stack([output["sums"] for output in outputs]).sum(dim=0)
            torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            keep_sums(sums)
            return sum(weights.get(name, 0.0) * sums[i] for i, name in enumerate(names)) / sums[len(names)]

    return TokenLossReduction()


def from_last_stage(sums: "Tensor | None", length: int) -> "Tensor":
    """The sums of the last pipeline stage, on every rank; every rank calls it."""
    import torch
    from megatron.core import parallel_state

    if sums is None:  # not the last stage
        sums = torch.zeros(length, device=torch.cuda.current_device())
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return sums
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(sums, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return sums
