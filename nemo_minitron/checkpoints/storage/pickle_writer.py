"""Pickles written without what they name: protocol 2, so that torch and Megatron find their own classes in them."""

import dataclasses
import struct
from typing import Any


@dataclasses.dataclass(frozen=True)
class Global:
    """A class, function or dtype by its name."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """What a function or class returns for these arguments."""

    function: Global
    arguments: tuple


@dataclasses.dataclass(frozen=True)
class Instance:
    """An object of a class without arguments, with this state."""

    kind: Global
    state: Any


@dataclasses.dataclass(frozen=True)
class Persistent:
    """A reference that the reader resolves: in files of torch.save, a storage."""

    key: tuple


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A dict whose keys are objects, as pairs."""

    items: list[tuple[Any, Any]]


def dumps(value: Any) -> bytes:
    """The pickle of plain values, lists, tuples, dicts and the classes above."""
    out = bytearray(b"\x80\x02")
    _write(out, value)
    return bytes(out + b".")


def _write(out: bytearray, value: Any) -> None:
    if value is None or isinstance(value, bool):
        out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
    elif isinstance(value, int):
        _write_int(out, value)
    elif isinstance(value, float):
        out += b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        text = value.encode()
        out += b"X" + struct.pack("<I", len(text)) + text
    elif isinstance(value, Global):
        out += f"c{value.module}\n{value.name}\n".encode()
    elif isinstance(value, Persistent):
        _write(out, value.key)
        out += b"Q"
    elif isinstance(value, Call):
        _write(out, value.function)
        _write(out, value.arguments)
        out += b"R"
    elif isinstance(value, Instance):
        _write(out, value.kind)
        out += b")\x81"
        _write(out, value.state)
        out += b"b"
    else:
        _write_many(out, value)


def _write_int(out: bytearray, value: int) -> None:
    if -(1 << 31) <= value < 1 << 31:
        out += b"J" + struct.pack("<i", value)
        return
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    out += b"\x8a" + bytes([len(data)]) + data


def _write_many(out: bytearray, values: Any) -> None:
    """A tuple, list or dict."""
    if isinstance(values, tuple):
        out += b"("
        for value in values:
            _write(out, value)
        out += b"t"
        return
    pairs = isinstance(values, dict | Pairs)
    out += b"}(" if pairs else b"]("
    for value in (values.items if isinstance(values, Pairs) else values.items()) if pairs else values:
        for part in value if pairs else (value,):
            _write(out, part)
    out += b"u" if pairs else b"e"
