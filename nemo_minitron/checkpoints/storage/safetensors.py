"""safetensors: the header read and checked by itself, tensors written one after the other.

The library loads whole files or maps them; here bytes are wanted in order, in bounded memory. Format: 8 bytes with the
length of the header, a JSON header {name: {dtype, shape, data_offsets}}, then the data, row-major and without gaps.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

from nemo_minitron.checkpoints.file_bytes import Bytes
from nemo_minitron.checkpoints.precision import ITEM_SIZES
from nemo_minitron.checkpoints.tensors import BLOCK, Lazy, Runs
from nemo_minitron.errors import CheckpointError

DTYPES = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "U8": "uint8", "I8": "int8",
    "I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}  # fmt: skip
NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
HEADER_LIMIT = 100_000_000
METADATA = "__metadata__"


def read(data: Bytes) -> dict[str, Runs]:
    """Name -> tensor of a safetensors file.

    Raises:
        CheckpointError: the header is damaged or lies about the data, or the file is truncated.
    """
    header, start = _header(data)
    tensors, ends = {}, []
    for name, entry in header.items():
        if name == METADATA:
            continue
        try:
            dtype, shape, (first, last) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            honest = all(type(size) is int and size >= 0 for size in (*shape, first, last))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{data.path}: the header's entry for {name!r} is damaged; copy it again") from None
        if not honest or last - first != math.prod(shape) * ITEM_SIZES[dtype]:
            raise CheckpointError(
                f"{data.path}: {name} of shape {shape} does not have {first}..{last} bytes of {dtype}"
            )
        if start + last > data.length:
            raise CheckpointError(
                f"{data.path} is truncated: {name} ends at byte {start + last}, the file at {data.length}; copy again"
            )
        tensors[name] = Runs(shape, dtype, (data.part(start + first, last - first),))
        ends.append((first, last))
    position = 0
    for first, last in sorted(ends):
        if first != position:
            raise CheckpointError(
                f"{data.path}: the header leaves a gap or an overlap at {position}; the file is damaged"
            )
        position = last
    if start + position != data.length:
        raise CheckpointError(f"{data.path} has {data.length} bytes, its header describes {start + position}")
    return tensors


def _header(data: Bytes) -> tuple[dict[str, Any], int]:
    if data.length < 8:
        raise CheckpointError(f"{data.path} is no safetensors file: it has {data.length} bytes")
    length = int.from_bytes(data.part(0, 8).read(), "little")
    if length > min(HEADER_LIMIT, data.length - 8):
        raise CheckpointError(f"{data.path} is truncated or no safetensors file: its header would have {length} bytes")
    try:
        header = json.loads(data.part(8, length).read().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{data.path}: the header is not JSON ({type(error).__name__}); copy it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{data.path}: the header is not a mapping")
    return header, 8 + length


def write(file: BinaryIO, tensors: Mapping[str, Lazy]) -> None:
    """Writes a safetensors file, one tensor at a time."""
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    buffer = memoryview(bytearray(BLOCK))
    for tensor in tensors.values():
        for block in tensor.blocks(buffer):
            file.write(block)
