"""The Lightning module that trains and validates one GPT model."""

from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints import Checkpoint
from nemo_minitron.runtime.engine import spread_layers
from nemo_minitron.runtime.losses import token_loss_reduction
from nemo_minitron.runtime.weights import load_weights

LM_LOSS = "lm_loss"


def gpt_module(
    config: Any,
    architecture: Architecture,
    *,
    weights: Checkpoint | None,
    optim: Any = None,
    tokenizer: Any = None,
) -> Any:
    """NeMo's GPTModel that starts from the checkpoint `weights` (or at random) and keeps the sums of its losses.

    Attributes of the result beyond GPTModel's: `loss_names`; `loss_weights`, and `weights_at` the means of a step; and
    `sums`, the tensor [names + 1] of the last global batch (each loss summed over tokens, then the number of tokens) on
    the last pipeline stage.
    """
    from nemo.collections import llm

    class MinitronGPTModel(llm.GPTModel):
        loss_names = (LM_LOSS,)
        loss_weights = {LM_LOSS: 1.0}
        sums: Any = None

        def configure_model(self, vp_stage: int | None = None) -> None:
            if hasattr(self, "module"):
                return
            spread_layers(self.config)
            self.module = self.config.configure_model(self.tokenizer, vp_stage=vp_stage)
            if weights is not None:
                load_weights(self.module, architecture, weights)

        def weights_at(self, means: dict[str, float]) -> dict[str, float]:
            return self.loss_weights

        def take_sums(self, sums: Any) -> None:
            self.sums = sums

        def token_losses(self, batch: dict[str, Any], output: Any) -> dict[str, Any]:
            return {LM_LOSS: output}

        @property
        def training_loss_reduction(self) -> Any:
            return token_loss_reduction(self.loss_names, self.loss_weights, self.token_losses, self.take_sums)

        @property
        def validation_loss_reduction(self) -> Any:
            return self.training_loss_reduction

    return MinitronGPTModel(config, optim=optim, tokenizer=tokenizer)
