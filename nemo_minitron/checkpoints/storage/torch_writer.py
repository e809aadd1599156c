"""Files of torch.save, written without torch: a zip archive of uncompressed records, checksums included.

The checksum of a block is worked out on another core while the block is written.
"""

import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

from nemo_minitron.checkpoints.chunked import checksums
from nemo_minitron.checkpoints.precision import ITEM_SIZES
from nemo_minitron.checkpoints.storage.pickle_writer import Call, Global, Persistent, dumps
from nemo_minitron.errors import CheckpointError

STORAGE_NAMES = {
    "bfloat16": "BFloat16Storage", "float16": "HalfStorage", "float32": "FloatStorage", "float64": "DoubleStorage",
    "uint8": "ByteStorage", "int8": "CharStorage", "int16": "ShortStorage", "int32": "IntStorage",
    "int64": "LongStorage", "bool": "BoolStorage",
}  # fmt: skip
LARGE = 0xFFFFFFFF
LOCAL, CENTRAL = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I")
END, END64, LOCATOR64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
#: Of every record: 1980-01-01, so that equal tensors make equal files.
DATE, TIME = 0x21, 0
ALIGNMENT = 64


class _Zip:
    """Writes stored records one after the other; the file may begin in the middle of another."""

    def __init__(self, file: BinaryIO):
        self.file, self.start = file, file.tell()
        self.directory = bytearray()
        self.records = 0

    def add(self, name: str, size: int, blocks: Iterable[memoryview | bytes], align: bool = False) -> int:
        """Writes a record of `size` bytes; returns its CRC-32."""
        encoded = f"archive/{name}".encode()
        offset = self.file.tell() - self.start
        large = size >= LARGE
        extra = struct.pack("<2H2Q", 1, 16, size, size) if large else b""
        if align:
            missing = -(offset + LOCAL.size + len(encoded) + len(extra) + 4) % ALIGNMENT
            extra += struct.pack("<2H", 0x4246, missing) + b"Z" * missing  # "FB", the padding that torch writes
        short = LARGE if large else size
        head = [b"PK\x03\x04", 45 if large else 20, 0, 0, TIME, DATE, 0, short, short, len(encoded), len(extra)]
        self.file.write(LOCAL.pack(*head) + encoded + extra)
        checksum, written = self._copy(blocks)
        if written != size:
            raise CheckpointError(f"{name}: {written} bytes came where {size} were announced")
        end = self.file.tell()
        self.file.seek(self.start + offset + 14)
        self.file.write(struct.pack("<I", checksum))
        self.file.seek(end)
        self._list(encoded, checksum, size, offset)
        return checksum

    def _copy(self, blocks: Iterable[memoryview | bytes]) -> tuple[int, int]:
        checksum, written = 0, 0
        for block in blocks:
            pending = checksums.submit(zlib.crc32, block, checksum)
            self.file.write(block)
            checksum = pending.result()
            written += len(block)
        return checksum, written

    def _list(self, name: bytes, checksum: int, size: int, offset: int) -> None:
        """Notes a record for the directory."""
        wide = [value for value in (size, size, offset) if value >= LARGE]
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        short = [min(value, LARGE) for value in (size, size)]
        version = 45 if wide else 20
        self.directory += CENTRAL.pack(
            b"PK\x01\x02", version, version, 0, 0, TIME, DATE, checksum, *short, len(name), len(extra), 0, 0, 0, 0,
            min(offset, LARGE),
        )  # fmt: skip
        self.directory += name + extra
        self.records += 1

    def close(self) -> None:
        """Writes the directory."""
        offset, size, count = self.file.tell() - self.start, len(self.directory), self.records
        self.file.write(self.directory)
        if offset >= LARGE:
            self.file.write(END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset))
            self.file.write(LOCATOR64.pack(b"PK\x06\x07", 0, offset + size, 1))
        self.file.write(END.pack(b"PK\x05\x06", 0, 0, count, count, size, min(offset, LARGE), 0))


def describe_tensor(shape: tuple[int, ...], dtype: str, key: int = 0) -> Call:
    """A contiguous tensor over the storage `key`, as torch.save describes it."""
    if dtype not in STORAGE_NAMES:
        raise CheckpointError(f"weights of {dtype} cannot be written; known are {', '.join(STORAGE_NAMES)}")
    storage = ("storage", Global("torch", STORAGE_NAMES[dtype]), str(key), "cpu", math.prod(shape))
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    hooks = Call(Global("collections", "OrderedDict"), ())
    arguments = (Persistent(storage), 0, tuple(shape), stride, False, hooks)
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)


def write_tensor(file: BinaryIO, shape: tuple[int, ...], dtype: str, blocks: Iterable[memoryview]) -> int:
    """Writes one tensor at the file's position, as torch.save does, its bytes from `blocks`; returns their CRC-32.

    Args:
        file: seekable.
    """
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    return _write(file, describe_tensor(shape, dtype), [(nbytes, blocks)])[0]


def write_numbers(file: BinaryIO, numbers: Mapping[str, tuple[str, bytes]]) -> None:
    """Writes a dict of tensors without axes, as torch.save does.

    Args:
        numbers: name -> dtype, and the number's bytes, little-endian.
    """
    tensors = {name: describe_tensor((), dtype, key) for key, (name, (dtype, _)) in enumerate(numbers.items())}
    _write(file, tensors, [(len(data), [data]) for _, data in numbers.values()])


def write_object(file: BinaryIO, value: Any) -> None:
    """Writes a plain value without tensors, as torch.save does."""
    _write(file, value, [])


def _write(file: BinaryIO, value: Any, storages: Sequence[tuple[int, Iterable[memoryview | bytes]]]) -> list[int]:
    """Writes a value and the storages, of so many bytes, that its tensors lie in; returns their CRC-32."""
    archive = _Zip(file)
    description = dumps(value)
    archive.add("data.pkl", len(description), [description])
    archive.add("byteorder", 6, [b"little"])
    found = [archive.add(f"data/{key}", size, blocks, align=True) for key, (size, blocks) in enumerate(storages)]
    archive.add("version", 2, [b"3\n"])
    archive.close()
    return found
