"""Minitron pruning and knowledge distillation for the NVIDIA NeMo framework.

What a program uses stands here, and is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_minitron.architecture import Architecture
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint
    from nemo_minitron.config.compose import compose
    from nemo_minitron.integrations.python import convert, distill, evaluate, finetune, plan, prune, quantize

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "__version__",
    "compose",
    "convert",
    "distill",
    "evaluate",
    "finetune",
    "open_checkpoint",
    "plan",
    "prune",
    "quantize",
]

_ELSEWHERE = {
    "Architecture": "nemo_minitron.architecture",
    "compose": "nemo_minitron.config.compose",
    "open_checkpoint": "nemo_minitron.checkpoints.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "nemo_minitron.integrations.python")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
