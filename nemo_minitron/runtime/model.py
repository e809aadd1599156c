"""The Lightning module that trains and validates one GPT model."""

from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints import Checkpoint
from nemo_minitron.config import PeftConfig
from nemo_minitron.runtime.engine import spread_layers
from nemo_minitron.runtime.lora import add_adapters, trained_part
from nemo_minitron.runtime.losses import token_loss_reduction
from nemo_minitron.runtime.weights import bare, load_weights

LM_LOSS = "lm_loss"


def gpt_module(
    config: Any,
    architecture: Architecture,
    *,
    weights: Checkpoint | None,
    optim: Any = None,
    tokenizer: Any = None,
    peft: PeftConfig | None = None,
) -> Any:
    """NeMo's GPTModel that starts from the checkpoint `weights` (or at random) and keeps the sums of its losses.

    With `peft` of scheme lora only adapters train, and only they are in the checkpoints to resume from.

    Attributes of the result beyond GPTModel's: `loss_names`; `loss_weights`, and `weights_at` the means of a step; and
    `sums`, the tensor [names + 1] of the last global batch (each loss summed over tokens, then the number of tokens) on
    the last pipeline stage.
    """
    from nemo.collections import llm

    adapted = peft is not None and peft.scheme == "lora"

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
            if adapted:
                add_adapters(self, peft)

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

    class AdaptedGPTModel(MinitronGPTModel):
        strict_loading = False

        def sharded_state_dict(self, prefix: str = "", **options: Any) -> dict[str, Any]:
            return trained_part(bare(self).sharded_state_dict(prefix=f"{prefix}module.", **options))

    return (AdaptedGPTModel if adapted else MinitronGPTModel)(config, optim=optim, tokenizer=tokenizer)
