"""Pickles read as data: an allow-list of names, and nothing of what they name is imported or run.

A pickle is a program. Here its names stand for inert objects made for this one read: classes keep their state as
attributes, the functions on the list are ours, and any other name raises. Python's own implementation of the unpickler
is used, whose memo is a dict: the one in C allocates whatever index a damaged file asks for.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from nemo_minitron.checkpoints.precision import ITEM_SIZES
from nemo_minitron.errors import CheckpointError

OTHER_TORCH_NAMES = ("strided", "contiguous_format", "preserve_format")


class StandIn:
    """Takes the place of an instance: keeps its state as attributes, or as `state`, and does nothing."""

    arguments: tuple[Any, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> "StandIn":
        instance = super().__new__(cls)
        instance.arguments = args
        return instance

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments are kept by __new__."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class Plain(dict):
    """Takes the place of an OrderedDict; attributes that were pickled with it are passed over."""

    def __setstate__(self, state: Any) -> None:
        """State dicts of modules carry `_metadata`."""


class _Call:
    """A function on the allow-list; a pickle can call it and change nothing about it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("state for a function")


Functions = Mapping[tuple[str, str], Any]


class _DataUnpickler(pickle._Unpickler):
    def __init__(self, data: bytes, functions: Functions, modules: tuple[str, ...], persistent: Callable | None):
        super().__init__(io.BytesIO(data))
        self.functions, self.modules, self.persistent = functions, modules, persistent

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.functions:
            known = self.functions[module, name]
            return _Call(known) if callable(known) else known
        if module == "torch" and (name in ITEM_SIZES or name in OTHER_TORCH_NAMES):
            return name
        if (module, name) == ("torch", "Size"):
            return _Call(tuple)
        if (module, name) == ("collections", "OrderedDict"):
            return _Call(Plain)
        if any(module == known or (known.endswith(".") and module.startswith(known)) for known in self.modules):
            return type(name, (StandIn,), {})
        raise CheckpointError(f"names {module}.{name}, which has no place there; it was not run")

    def persistent_load(self, key: Any) -> Any:
        if self.persistent is None:
            raise pickle.UnpicklingError("a persistent id")
        return self.persistent(key)


def read_pickle(
    data: bytes,
    source: str,
    *,
    functions: Functions,
    modules: tuple[str, ...] = (),
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """What the pickle `data` holds, made of plain values, StandIns, and what `functions` return.

    Args:
        source: what is being read, for messages.
        functions: (module, name) -> function that is called in its place, or a constant that it stands for.
        modules: modules whose classes become StandIns; one that ends with a dot stands for all below it.
        persistent: is called with each persistent id.

    Raises:
        CheckpointError: the pickle is damaged, or names anything else.
    """
    try:
        return _DataUnpickler(data, functions, modules, persistent).load()
    except CheckpointError as error:
        raise CheckpointError(f"{source} {error}") from None
    except RecursionError:
        raise CheckpointError(f"{source} is damaged (nested too deeply)") from None
    except Exception as error:
        raise CheckpointError(f"{source} is damaged or truncated ({type(error).__name__}); copy it again") from None
