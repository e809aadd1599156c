"""What differs between the versions that users have: NeMo, Megatron Core, ModelOpt, NeMo-Run, transformers, lm-eval.

Each question is asked of what is installed (a class, a parameter, a module that is there or not), by version number
only where nothing else tells. What a version cannot do is refused by name, with the version that can.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from nemo_minitron.errors import EngineError


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


def known_keywords(function: Callable[..., Any], **keywords: Any) -> dict[str, Any]:
    """Those of `keywords` that the installed version of a function or class has."""
    return {name: value for name, value in keywords.items() if accepts(function, name)}


@contextlib.contextmanager
def called_as_it_is(owner: Any, name: str, **neutral: Any) -> Iterator[None]:
    """In the body, the function `owner`.`name` is called without those of `neutral` that the installed version lacks.

    For a caller that passes keywords of another version than the one installed.

    Args:
        neutral: keyword -> the value with which it changes nothing.

    Raises:
        EngineError: in the body, where the caller gives such a keyword another value.
    """
    original = getattr(owner, name)
    lacking = {keyword: value for keyword, value in neutral.items() if not accepts(original, keyword)}

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        asked = [
            f"{keyword}={kwargs[keyword]!r}"
            for keyword, value in lacking.items()
            if kwargs.get(keyword, value) != value
        ]
        if asked:
            raise EngineError(f"the installed {owner.__name__}.{name} has no {' and no '.join(asked)}")
        return original(*args, **{keyword: value for keyword, value in kwargs.items() if keyword not in lacking})

    if not lacking:
        yield
        return
    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)
