"""FP8: off."""

from typing import Any


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def fp8_autocast(*arguments: Any, **settings: Any) -> Any:
    raise NotImplementedError("the stand-in for Transformer Engine has no FP8")
