"""What differs between the versions that users have: NeMo, Megatron Core, ModelOpt, NeMo-Run, transformers, lm-eval.

Each question is asked of what is installed (a class, a parameter, a module that is there or not), by version number
only where nothing else tells. What a version cannot do is refused by name, with the version that can.
"""

import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any


def installed(package: str) -> str | None:
    """The version of a distribution that is installed, such as ``megatron-core``; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_module(name: str) -> bool:
    """Whether a top-level module can be imported; it is not imported."""
    return importlib.util.find_spec(name) is not None


def accepts(function: Callable[..., Any], parameter: str) -> bool:
    """Whether a function, or a class when it is called, has a parameter of this name."""
    return parameter in inspect.signature(function).parameters
