"""What every layer has: an extra state, which without FP8 is an empty tensor of bytes."""

from typing import Any

import torch


class WithExtraState(torch.nn.Module):
    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        if state is not None and state.numel() > 0:
            raise NotImplementedError("the stand-in for Transformer Engine has no FP8, this state holds its scales")
