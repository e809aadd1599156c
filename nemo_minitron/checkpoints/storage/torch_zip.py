"""Files of torch.save, read without loading.

Such a file is a zip archive of uncompressed records: `data.pkl`, a pickle that describes tensors, and `data/N`, the
bytes of each storage. The pickle is read as data, and tensors become places in the file.
"""

import dataclasses
import io
import math
import pickle
import zipfile
import zlib
from typing import Any

from nemo_minitron.checkpoints.chunked import Chunk, Chunked
from nemo_minitron.checkpoints.file_bytes import Bytes
from nemo_minitron.checkpoints.precision import ITEM_SIZES
from nemo_minitron.checkpoints.storage.pickles import Functions, read_pickle
from nemo_minitron.errors import CheckpointError

STORAGES = {
    "BFloat16Storage": "bfloat16", "HalfStorage": "float16", "FloatStorage": "float32", "DoubleStorage": "float64",
    "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16", "IntStorage": "int32",
    "LongStorage": "int64", "BoolStorage": "bool",
}  # fmt: skip
UNTYPED = "UntypedStorage"
#: Classes that are met in checkpoints beside tensors (extra states, arguments): kept as inert objects.
BESIDE_TENSORS = (
    "io", "_io", "argparse", "signal", "pathlib", "pathlib.", "megatron.", "transformer_engine.", "modelopt.",
    "omegaconf.", "nemo.",
)  # fmt: skip
PICKLE_LIMIT = 512 << 20
LOCAL_HEADER = 30


class _Window(io.RawIOBase):
    """A run of bytes as a seekable file."""

    def __init__(self, data: Bytes):
        super().__init__()
        self.data, self.position = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.data.length}[whence]
        if base + offset < 0:
            raise OSError(22, "seek before the start")
        self.position = base + offset
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        left = max(self.data.length - self.position, 0)
        count = left if size is None or size < 0 else min(size, left)
        block = self.data.part(self.position, count).read() if count else b""
        self.position += count
        return block


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str | None


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor inside a file of torch.save."""

    shape: tuple[int, ...]
    dtype: str
    data: Bytes
    checksum: int | None

    def lazy(self, name: str) -> Chunked:
        """It as a tensor to read."""
        start = (0,) * len(self.shape)
        chunk = Chunk(start, self.shape, lambda: (self.data, self.checksum))
        return Chunked(self.shape, self.dtype, (chunk,), name)


def read_torch_file(data: Bytes, source: str) -> Any:
    """What torch.save wrote: tensors as StoredTensor, dicts as dicts, anything else inert.

    Args:
        source: what is being read, for messages.

    Raises:
        CheckpointError: the file is damaged, of the format before torch 1.6, or its pickle names anything else.
    """
    records, prefix = _records(data, source)
    if records.get("byteorder") is not None and _content(data, records["byteorder"], source).strip() != b"little":
        raise CheckpointError(f"{source} was written on a big-endian machine; it cannot be read here")
    if "data.pkl" not in records:
        raise CheckpointError(f"{source} has no {prefix}data.pkl: it is not a file of torch.save")
    if records["data.pkl"].file_size > PICKLE_LIMIT:
        raise CheckpointError(f"{source}: its description has {records['data.pkl'].file_size} bytes, too many")

    def tensor(storage: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
        dtype = storage.dtype or (rest[2] if len(rest) > 2 else None)
        return _place(data, records, storage, dtype, (offset, tuple(shape), tuple(stride)), source)

    functions: Functions = {
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_tensor_v3"): tensor,
        ("torch._utils", "_rebuild_parameter"): lambda inner, *_: inner,
        ("torch.serialization", "_get_layout"): lambda name: name,
        ("torch", "device"): lambda *_: None,
        ("_codecs", "encode"): lambda *_: b"",  # bytes in pickles of protocol 2
        ("builtins", "set"): lambda values=(): list(values),
        ("__builtin__", "set"): lambda values=(): list(values),
        **{("torch", name): name for name in STORAGES},
        ("torch.storage", UNTYPED): UNTYPED,
    }
    return read_pickle(
        _content(data, records["data.pkl"], source),
        source,
        functions=functions,
        modules=BESIDE_TENSORS,
        persistent=_storage,
    )


def _storage(key: Any) -> _Storage:
    kind, storage_type, name, _, elements = key
    if kind != "storage" or not isinstance(name, str) or storage_type not in (*STORAGES, UNTYPED):
        raise pickle.UnpicklingError("a storage of an unknown kind")
    return _Storage(name, STORAGES.get(storage_type))


def _records(data: Bytes, source: str) -> tuple[dict[str, zipfile.ZipInfo], str]:
    """Name inside the archive's one folder -> record, and that folder's name."""
    try:
        with zipfile.ZipFile(_Window(data)) as archive:
            infos = archive.infolist()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{source} is not a file of torch.save (zip), or is truncated ({type(error).__name__}); copy it again"
        ) from None
    prefix = infos[0].filename.partition("/")[0] + "/" if infos else ""
    records = {}
    for info in infos:
        name = info.filename.removeprefix(prefix)
        if name in records or info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError(f"{source}: record {info.filename!r} is not what torch.save writes")
        records[name] = info
    return records, prefix


def _bytes_of(data: Bytes, info: zipfile.ZipInfo, source: str) -> Bytes:
    header = data.part(info.header_offset, LOCAL_HEADER).read()
    if header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{source}: record {info.filename!r} is not where the directory says; copy it again")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return data.part(info.header_offset + LOCAL_HEADER + lengths, info.file_size)


def _content(data: Bytes, info: zipfile.ZipInfo, source: str) -> bytes:
    content = _bytes_of(data, info, source).read()
    if info.CRC and zlib.crc32(content) != info.CRC:
        raise CheckpointError(
            f"{source}: record {info.filename!r} fails its checksum; the file is damaged, copy it again"
        )
    return content


def _place(
    data: Bytes,
    records: dict[str, zipfile.ZipInfo],
    storage: _Storage,
    dtype: str | None,
    view: tuple[int, tuple[int, ...], tuple[int, ...]],
    source: str,
) -> StoredTensor:
    offset, shape, stride = view
    info = records.get(f"data/{storage.key}")
    if info is None or dtype not in ITEM_SIZES:
        raise CheckpointError(
            f"{source}: storage {storage.key!r} of {dtype} is missing or of no kind that weights have"
        )
    if len(stride) != len(shape) or not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *stride)):
        raise CheckpointError(f"{source}: a tensor of shape {shape} is damaged")
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride)):
        if size != 1 and step != expected:
            raise CheckpointError(
                f"{source}: a tensor of shape {shape} is stored with strides {stride}, not row by row"
            )
        expected *= size
    size = ITEM_SIZES[dtype]
    stored = _bytes_of(data, info, source)
    place = stored.part(offset * size, math.prod(shape) * size)
    # torch leaves the checksum 0 since 2.8; one that is there counts.
    checksum = info.CRC if info.CRC and place.length == stored.length else None
    return StoredTensor(shape, dtype, place, checksum)
