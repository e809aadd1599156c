"""The header of a GGUF file, read and written by itself: metadata, and where each tensor lies.

The gguf library maps a file and believes its counts; here nothing is believed before the file is seen to hold it, and a
vocabulary's strings are read at once instead of one array each.

Format, little-endian: ``GGUF``, version (u32), number of tensors and of keys (u64); each key: name, kind (u32), value;
each tensor: name, number of dimensions (u32), dimensions, the fastest first (u64), type (u32), offset into the data
(u64). A string is its length (u64) and UTF-8; an array its elements' kind (u32), their number (u64) and they. The data
begin at the next multiple of `general.alignment`, and so does each tensor in it.
"""

import dataclasses
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from nemo_minitron.checkpoints.file_bytes import Bytes
from nemo_minitron.checkpoints.formats.gguf.numbers import Kind, kind_of
from nemo_minitron.checkpoints.tensors import BLOCK, Lazy
from nemo_minitron.checkpoints.untrusted import shown
from nemo_minitron.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY, ALIGNMENT = "general.alignment", 32
LARGEST_ALIGNMENT = 1 << 16
STRING, ARRAY, BOOL = 8, 9, 7
#: Kind of a value -> how `struct` reads it.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "B", 10: "Q", 11: "q", 12: "d"}
UNSIGNED, SIGNED, FLOAT = 4, 5, 6
#: How deep arrays may lie in arrays; llama.cpp has none in any key.
DEPTH = 4
MOST_DIMENSIONS = 4
#: Fewest bytes that a key and a tensor can have: what a count may claim at most.
LEAST_KEY, LEAST_TENSOR = 13, 24
#: Bytes of a file that are read at a time while its header goes on.
STEP = 1 << 20


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor of a file.

    Attributes:
        name: GGUF's name.
        kind: its type of numbers.
        shape: as everywhere here, the slowest dimension first.
        data: its bytes.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    data: Bytes


@dataclasses.dataclass(frozen=True)
class Header:
    """What the header of a file says.

    Attributes:
        path: the file.
        metadata: key -> number, truth, text, or list of such.
        tensors: by name.
        size: bytes of the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, FileTensor]
    size: int


class _Cursor:
    """Reads a header in order, and no further than the file goes."""

    def __init__(self, data: Bytes):
        self.file, self.place, self.read = data, 0, bytearray()

    @property
    def left(self) -> int:
        return self.file.length - self.place

    def take(self, length: int) -> memoryview:
        """The next bytes."""
        if length > self.left:
            raise CheckpointError(
                f"{self.file.path} is truncated or damaged: its header asks for {length} bytes at byte {self.place}, "
                f"the file ends at {self.file.length}; copy it again"
            )
        end = self.place + length
        if end > len(self.read):
            more = min(max(end - len(self.read), STEP, len(self.read)), self.file.length - len(self.read))
            self.read += self.file.part(len(self.read), more).read()
        start, self.place = self.place, end
        return memoryview(self.read)[start:end].toreadonly()

    def number(self, code: str) -> Any:
        """A number, as `struct` calls it."""
        # The view ends with this line: a buffer that is looked at cannot grow.
        return struct.unpack(f"<{code}", bytes(self.take(struct.calcsize(f"<{code}"))))[0]

    def text(self) -> str:
        """A string."""
        data = bytes(self.take(self.number("Q")))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged("a string of it is not UTF-8") from None

    def count(self, least: int, what: str) -> int:
        """A number of things of at least so many bytes each."""
        stated = self.number("Q")
        if stated * least > self.left:
            raise self.damaged(f"it claims {stated} {what}, for which it is too short")
        return stated

    def value(self, kind: int, depth: int = 0) -> Any:
        """The value of a key."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(depth + 1)
        if kind not in SCALARS:
            raise self.damaged(f"a key has a value of the unknown kind {kind}")
        number = self.number(SCALARS[kind])
        return bool(number) if kind == BOOL else number

    def array(self, depth: int) -> list[Any]:
        """An array."""
        kind = self.number("I")
        if depth > DEPTH:
            raise self.damaged(f"it has arrays in arrays, more than {DEPTH} deep")
        if kind in SCALARS:
            size = struct.calcsize(SCALARS[kind])
            number = self.count(size, "numbers")
            values = list(struct.unpack(f"<{number}{SCALARS[kind]}", bytes(self.take(number * size))))
            return [bool(value) for value in values] if kind == BOOL else values
        if kind not in (STRING, ARRAY):
            raise self.damaged(f"an array has elements of the unknown kind {kind}")
        number = self.count(8 if kind == STRING else 12, "elements of an array")
        return self.texts(number) if kind == STRING else [self.value(kind, depth) for _ in range(number)]

    def texts(self, number: int) -> list[str]:
        """So many strings, which a vocabulary has in hundreds of thousands: those that are in memory already are taken
        without asking for each."""
        strings: list[str] = []
        while len(strings) < number:
            ends = _ends(self.read, self.place, number - len(strings))
            read, starts = bytes(self.read), (self.place, *ends)
            try:
                strings += [read[start + 8 : end].decode() for start, end in zip(starts, ends)]
            except UnicodeDecodeError:
                raise self.damaged("a string of it is not UTF-8") from None
            self.place = starts[-1]
            if len(strings) < number:
                strings.append(self.text())
        return strings

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path} is damaged, or no GGUF file: {what}; copy it again")


def _ends(read: bytearray, place: int, number: int) -> list[int]:
    """Where the strings from `place` on end, of so many at most those that are wholly in `read`."""
    ends: list[int] = []
    last, length_at = len(read) - 8, struct.Struct("<Q").unpack_from
    for _ in range(number):
        if place > last:
            break
        place += 8 + length_at(read, place)[0]
        ends.append(place)
    if ends and ends[-1] > len(read):
        ends.pop()
    return ends


def read(data: Bytes) -> Header:
    """The header of a file.

    Raises:
        CheckpointError: it is no GGUF, is truncated, of a version that is not known, or contradicts itself.
    """
    cursor = _Cursor(data)
    if data.length < len(MAGIC) or bytes(cursor.take(len(MAGIC))) != MAGIC:
        raise CheckpointError(f"{data.path} is no GGUF file: it does not begin with {MAGIC.decode()}")
    _check_version(cursor)
    tensors, keys = cursor.number("Q"), cursor.count(LEAST_KEY, "keys")
    if tensors * LEAST_TENSOR > cursor.left:
        raise cursor.damaged(f"it claims {tensors} tensors, for which it is too short")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text()
        if key in metadata:
            raise cursor.damaged(f"the key {shown(key)} is there twice")
        metadata[key] = cursor.value(cursor.number("I"))
    entries = [_entry(cursor) for _ in range(tensors)]
    return Header(data.path, metadata, _placed(entries, data, cursor, _alignment(metadata, cursor)), data.length)


def _check_version(cursor: _Cursor) -> None:
    version = cursor.number("I")
    if version in VERSIONS:
        return
    path = cursor.file.path
    if struct.unpack("<I", struct.pack(">I", version))[0] in VERSIONS:
        raise CheckpointError(f"{path} is a big-endian GGUF; take the little-endian one")
    raise CheckpointError(f"{path} is of GGUF version {version}; known here are {' and '.join(map(str, VERSIONS))}")


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], Kind, int]:
    """Name, shape, type and offset of a tensor."""
    name, dimensions = cursor.text(), cursor.number("I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise cursor.damaged(f"the tensor {shown(name)} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    return name, shape, kind_of(kind, f"{cursor.file.path}: {shown(name)}"), offset


def _alignment(metadata: Mapping[str, Any], cursor: _Cursor) -> int:
    stated = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    if type(stated) is not int or not 0 < stated <= LARGEST_ALIGNMENT or stated & (stated - 1):
        raise cursor.damaged(f"{ALIGNMENT_KEY} = {shown(stated)} is no power of two up to {LARGEST_ALIGNMENT}")
    return stated


def _placed(
    entries: Iterable[tuple[str, tuple[int, ...], Kind, int]], data: Bytes, cursor: _Cursor, alignment: int
) -> dict[str, FileTensor]:
    """The tensors, once they follow each other without gap or overlap up to the end of the file, as llama.cpp wants."""
    start = _aligned(cursor.place, alignment)
    tensors: dict[str, FileTensor] = {}
    position = end = 0
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise cursor.damaged(f"the tensor {shown(name)} is there twice")
        if shape[-1] % kind.block:
            raise cursor.damaged(f"{shown(name)} of shape {shape} has no whole blocks of {kind.block} for {kind.name}")
        if offset != position:
            raise cursor.damaged(f"{shown(name)} lies at byte {offset} of the data, not at {position}")
        end = offset + kind.bytes_of(shape)
        if start + end > data.length:
            raise CheckpointError(
                f"{data.path} is truncated: {shown(name)} ends at byte {start + end}, the file at {data.length}; copy "
                "it again"
            )
        tensors[name] = FileTensor(name, kind, shape, data.part(start + offset, end - offset))
        position = _aligned(end, alignment)
    if tensors and data.length > start + position:
        raise cursor.damaged(f"it has {data.length} bytes, its header describes {start + position}")
    return tensors


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def write(
    file: BinaryIO, metadata: Mapping[str, Any], tensors: Sequence[tuple[str, Kind, tuple[int, ...], Lazy]]
) -> None:
    """Writes a file, one tensor at a time.

    Args:
        metadata: key -> truth, whole number, number, text, or list of one of the last three.
        tensors: name, type, shape, and the bytes that are stored.
    """
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _text(key) + _value(value)
    position = 0
    for name, kind, shape, _ in tensors:
        head += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", kind.number, position)
        position = _aligned(position + kind.bytes_of(shape), ALIGNMENT)
    file.write(head + bytes(-len(head) % ALIGNMENT))
    buffer = memoryview(bytearray(BLOCK))
    for _, kind, shape, data in tensors:
        for block in data.blocks(buffer):
            file.write(block)
        file.write(bytes(-kind.bytes_of(shape) % ALIGNMENT))


def _encoded(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError(f"{shown(text)} has half a character in it, which no GGUF can hold") from None


def _text(text: str) -> bytes:
    data = _encoded(text)
    return len(data).to_bytes(8, "little") + data


def _texts(texts: list[str]) -> bytes:
    """Strings, which a vocabulary has in hundreds of thousands."""
    try:
        data = [text.encode() for text in texts]
    except UnicodeEncodeError:
        data = [_encoded(text) for text in texts]  # which says of which
    lengths = {length: length.to_bytes(8, "little") for length in {*map(len, data)}}
    return b"".join([part for text in data for part in (lengths[len(text)], text)])


def _value(value: Any) -> bytes:
    """Kind and value of a key."""
    if isinstance(value, list):
        kind, code = _kind(value[0]) if value else (SIGNED, "i")
        kind, code = (SIGNED, "i") if kind == UNSIGNED else (kind, code)
        elements = _texts(value) if kind == STRING else struct.pack(f"<{len(value)}{code}", *value)
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + elements
    kind, code = _kind(value)
    return struct.pack("<I", kind) + (_text(value) if kind == STRING else struct.pack(f"<{code}", value))


def _kind(value: Any) -> tuple[int, str]:
    """The kind of a value, and how `struct` writes it."""
    if isinstance(value, bool):
        return BOOL, "B"
    if isinstance(value, int):
        return UNSIGNED, "I"
    return (FLOAT, "f") if isinstance(value, float) else (STRING, "")
