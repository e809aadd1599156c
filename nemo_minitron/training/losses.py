"""From losses a token to what Megatron's schedule, the logs and the manifest want."""

from collections.abc import Callable
from typing import Any

#: The loss to train on, masked, weighed and summed already, where the components carry no gradient of their own.
TOTAL = "total"
#: component name -> loss a token [b, s], in nats
TokenLosses = Callable[[dict[str, Any], Any], dict[str, Any]]


class LossesInSight:
    """Of a NeMo module: training and validation go by the losses a token that `token_losses` gives.

    Attributes:
        loss_names: the components, in the order of the sums.
        loss_weights: component -> weight in the loss that is trained on.
        token_losses: of a batch and the model's output; a module's own method.
        sums: of the last global batch, on the last pipeline stage: each component summed over tokens, then the number
            of tokens [names + 1].
    """

    loss_names: tuple[str, ...]
    loss_weights: dict[str, float]
    token_losses: TokenLosses
    sums: Any = None

    def weights_at(self, means: dict[str, float]) -> dict[str, float]:
        """The weights of a step whose components have these means."""
        return self.loss_weights

    def take_sums(self, sums: Any) -> None:
        self.sums = sums

    @property
    def training_loss_reduction(self) -> Any:
        return token_loss_reduction(self.loss_names, self.loss_weights, self.token_losses, self.take_sums)

    @property
    def validation_loss_reduction(self) -> Any:
        return self.training_loss_reduction


def token_loss_reduction(
    names: tuple[str, ...], weights: dict[str, float], per_token: TokenLosses, sink: Callable[[Any], None]
) -> Any:
    """A MegatronLossReduction: masks, sums, weighs and averages the named losses over all tokens of a global batch.

    Args:
        names: the components, in the order of the sums.
        weights: component -> weight in the loss that is trained on.
        per_token: gives each component's loss a token [b, s] for a batch and the model's output.
        sink: takes, on the last pipeline stage, the tensor [len(names) + 1] of the sums over the global batch:
            each component's, then the number of tokens.
    """
    import torch
    from megatron.core import parallel_state
    from nemo.lightning.megatron_parallel import MegatronLossReduction

    class TokenLossReduction(MegatronLossReduction):
        def forward(self, batch: dict[str, Any], forward_out: Any) -> tuple[Any, Any, dict[str, Any]]:
            mask = batch["loss_mask"].float()  # [b, s]
            losses = per_token(batch, forward_out)
            sums = [(losses[name].float() * mask).sum() for name in names]
            total = losses.get(TOTAL)
            if total is None:
                total = sum(weights.get(name, 0.0) * value for name, value in zip(names, sums) if weights.get(name))
            if not torch.is_tensor(total):
                total = sums[0] * 0.0
            tokens = mask.sum()
            report = torch.stack([*(value.detach() for value in sums), tokens.detach()])
            return total, tokens.detach().to(torch.int), {"sums": report}

        def reduce(self, outputs: list[dict[str, Any]]) -> Any:
            sums = torch.stack([output["sums"] for output in outputs]).sum(dim=0)
            torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            sink(sums)
            return sum(weights.get(name, 0.0) * sums[i] for i, name in enumerate(names)) / sums[-1]

    return TokenLossReduction()


def from_last_stage(sums: Any, length: int) -> Any:
    """The sums of the last pipeline stage, on every rank; every rank calls it."""
    import torch
    from megatron.core import parallel_state

    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return sums
    if sums is None:
        sums = torch.zeros(length, device=torch.cuda.current_device())
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(sums, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return sums
