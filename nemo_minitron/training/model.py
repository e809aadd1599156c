"""The Lightning module that trains and validates one GPT model."""

from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.config import PeftConfig
from nemo_minitron.megatron.lora import add_adapters, trained_part
from nemo_minitron.megatron.weights import bare, build_model
from nemo_minitron.training.inputs import Inputs
from nemo_minitron.training.losses import LM_LOSS, Batch, Losses, TokenLossesMixin, weighed

if TYPE_CHECKING:
    from nemo.collections import llm
    from nemo.collections.llm import GPTConfig
    from nemo.lightning import MegatronOptimizerModule
    from torch import Tensor


def training_config(architecture: Architecture, inputs: Inputs) -> "GPTConfig":
    """NeMo's config of a model that trains, or teaches, on `inputs`."""
    from nemo_minitron.megatron.session import model_config

    config = model_config(architecture, inputs.layout)
    # Answers differ in length: each of their tokens weighs the same, whatever micro batch it is in.
    config.calculate_per_token_loss = inputs.has_rows
    return config


def gpt_module(
    config: "GPTConfig",
    architecture: Architecture,
    *,
    weights: Checkpoint | None,
    optim: "MegatronOptimizerModule | None" = None,
    tokenizer: Any = None,
    peft: PeftConfig | None = None,
) -> "llm.GPTModel":
    """NeMo's GPTModel that starts from the checkpoint `weights` (or at random), which shows its loss.

    With `peft` of scheme lora only adapters train, and only they are in the checkpoints to resume from.
    """
    from nemo.collections import llm

    adapters = peft if peft is not None and peft.scheme == "lora" else None

    class MinitronGPTModel(TokenLossesMixin, llm.GPTModel):
        loss_names = (LM_LOSS,)
        loss_weights = {LM_LOSS: 1.0}

        def configure_model(self, vp_stage: int | None = None) -> None:
            if hasattr(self, "module"):
                return
            self.module = build_model(self.config, architecture, weights, self.tokenizer, vp_stage=vp_stage)
            if adapters is not None:
                add_adapters(self, adapters)

        def token_losses(self, batch: Batch, output: "Tensor") -> Losses:
            return weighed({LM_LOSS: output}, self.loss_weights, batch["loss_mask"].float())

    class AdaptedGPTModel(MinitronGPTModel):
        strict_loading = False

        def sharded_state_dict(self, prefix: str = "", **options: Any) -> dict[str, Any]:
            return trained_part(bare(self).sharded_state_dict(prefix=f"{prefix}module.", **options))

    return (MinitronGPTModel if adapters is None else AdaptedGPTModel)(config, optim=optim, tokenizer=tokenizer)
