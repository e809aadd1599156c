"""GGUF files, whole or split: what llama.cpp, Ollama and LM Studio read."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.split_files import PART, part
from nemo_minitron.checkpoints import generation
from nemo_minitron.checkpoints.file_bytes import whole
from nemo_minitron.checkpoints.files import refuse_pointer
from nemo_minitron.checkpoints.formats.base import TRANSFORMERS, Contents, Format, Model, Quantization, WriteOptions
from nemo_minitron.checkpoints.formats.gguf import config, header, mapping, tokenizer
from nemo_minitron.checkpoints.formats.gguf.families import ARCHITECTURES, architecture_of
from nemo_minitron.checkpoints.formats.gguf.header import FileTensor, Header
from nemo_minitron.checkpoints.formats.gguf.numbers import BF16, F16, F32, Q8_0, Kind, Stored
from nemo_minitron.checkpoints.tensors import Lazy
from nemo_minitron.checkpoints.untrusted import shown
from nemo_minitron.errors import CheckpointError
from nemo_minitron.packages import extras

SUFFIX = ".gguf"
PART_COUNT, PART_NUMBER, ALL_TENSORS = "split.count", "split.no", "split.tensors.count"
#: Types that are written, by their names in settings.
KINDS = {kind.name: kind for kind in (F32, F16, BF16, Q8_0)}
#: Type of most matrices -> llama.cpp's number for such a file.
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
QUANTIZATION_VERSION = 2
PRODUCER = "llama.cpp"


class Gguf(Format):
    """GGUF files of llama.cpp."""

    name = "gguf"
    title = "GGUF file (llama.cpp)"
    file_mark = "a GGUF file"
    engine = TRANSFORMERS
    keeps_precision = False
    quantized_remark = (
        "the file holds weights only, no scales of activations; convert and evaluate read them as the numbers that "
        "they stand for, in float32, and what quantising lost stays lost"
    )

    def detect(self, path: Path) -> bool:
        if not path.is_file():
            return False
        if path.suffix == SUFFIX:
            return True
        with path.open("rb") as file:
            return file.read(len(header.MAGIC)) == header.MAGIC

    def first_of(self, path: Path) -> Path:
        return part(path, 1) if PART.fullmatch(path.name) and part(path, 1).exists() else path

    def read(self, path: Path) -> Contents:
        return read(path)

    def check(self, architecture: Architecture, dtype: str) -> None:
        config.check(architecture)

    def notes(self, architecture: Architecture, options: WriteOptions) -> list[str]:
        a, kind = architecture, _wanted(options)
        name = architecture_of(a.family)
        notes = []
        if name is not None and ARCHITECTURES[name].family != a.family:
            notes.append(
                f"{a.family} is {name} in GGUF: read back, it is {ARCHITECTURES[name].family}, which computes the same"
            )
        rows = mapping.rows_without_blocks(a, kind) if kind else []
        if kind and rows:
            lengths = ", ".join(map(str, rows))
            notes.append(f"rows of {lengths} numbers have no whole blocks of {kind.block}: such matrices are F16")
        return notes

    def kept(self, tensors: Mapping[str, Lazy], architecture: Architecture, options: WriteOptions) -> dict[str, Lazy]:
        return mapping.kept(tensors, architecture, _wanted(options))

    def write(self, path: Path, model: Model, options: WriteOptions) -> None:
        write(path, model, _wanted(options))


def _wanted(options: WriteOptions) -> Kind | None:
    return KINDS[options.gguf_type] if options.gguf_type else None


def read(path: Path) -> Contents:
    """What a file, or the parts of a split one, hold; reads headers, and one-dimensional tensors.

    Raises:
        CheckpointError: a part is missing, a header is damaged, or the model is not one that is read.
        MissingPackageError: it is quantised, and the gguf library is not installed.
    """
    first, tensors, size = _headers(path)
    metadata = first.metadata
    name, entry = config.entry_of(metadata, path)
    factors = _rope_factors(tensors, metadata, path)
    mapping.check_names(tensors, entry, name, path)
    architecture = config.read_architecture(metadata, tensors, factors, path)
    precisions = dict(Counter(tensor.kind.name for tensor in tensors.values()).most_common())
    found = tokenizer.read(metadata, path)
    return Contents(
        architecture=architecture,
        tensors=mapping.import_tensors(tensors, architecture, path),
        tokenizer_files=found,
        generation=tokenizer.generation(metadata, path) if found else {},
        size=size,
        layout="GGUF",
        quantization=_quantization(tensors),
        stored_precisions=precisions,
    )


def _headers(path: Path) -> tuple[Header, dict[str, FileTensor], int]:
    """The header with the metadata, the tensors of all parts, and their bytes."""
    one = _header(path)
    count = one.metadata.get(PART_COUNT, 1)
    if count in (0, 1):
        return one, dict(one.tensors), one.size
    named = PART.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise CheckpointError(
            f"{path} is a part of a GGUF split in {shown(count)}; parts are found by their names, as llama-gguf-split "
            "gives them (NAME-00001-of-00003.gguf): name them so"
        )
    places = [part(path, number) for number in range(1, count + 1)]
    missing = [place.name for place in places if not place.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more parts" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path} is a part of a split GGUF of {count}: {missing[0]}{more} is not beside it; copy it there"
        )
    headers = [_header(place) for place in places]
    tensors: dict[str, FileTensor] = {}
    for number, found in enumerate(headers):
        if found.metadata.get(PART_NUMBER) != number or found.metadata.get(PART_COUNT) != count:
            raise CheckpointError(f"{found.path} is not part {number + 1} of {count}, as its name says; copy it again")
        twice = tensors.keys() & found.tensors.keys()
        if twice:
            raise CheckpointError(f"{found.path} has the tensor {shown(min(twice))}, which another part has as well")
        tensors |= found.tensors
    stated = headers[0].metadata.get(ALL_TENSORS, len(tensors))
    if stated != len(tensors):
        raise CheckpointError(
            f"{path}: its {count} parts have {len(tensors)} tensors, not {shown(stated)}; copy them again"
        )
    return headers[0], tensors, sum(found.size for found in headers)


def _header(path: Path) -> Header:
    data = whole(path)
    refuse_pointer(data, str(path))
    return header.read(data)


def _rope_factors(tensors: Mapping[str, FileTensor], metadata: Mapping[str, Any], path: Path) -> Any:
    """The factors of the rotary frequencies, float32 [d / 2], or None."""
    tensor = tensors.get(config.ROPE_FACTORS)
    if tensor is None:
        return None
    if len(tensor.shape) != 1 or tensor.kind is not F32:
        raise CheckpointError(f"{path}: {config.ROPE_FACTORS} is {tensor.kind.name} {tensor.shape}, no list of factors")
    return mapping.values(Stored(tensor.shape, "float32", tensor.data, F32))


def _quantization(tensors: Mapping[str, FileTensor]) -> Quantization | None:
    """The types of the quantised tensors, the most frequent first; None where all are plain."""
    kinds = Counter(tensor.kind.name for tensor in tensors.values() if tensor.kind.dtype is None)
    names = [name for name, _ in kinds.most_common()]
    return Quantization(algorithm=", ".join(names), producer=PRODUCER) if names else None


def write(path: Path, model: Model, wanted: Kind | None) -> None:
    """Writes a file.

    Args:
        wanted: type of the matrices; None: as they are. One-dimensional tensors are F32, as llama.cpp has them.

    Raises:
        CheckpointError: llama.cpp has no architecture or tokenizer that does the same, or there is no tokenizer.
        MissingPackageError: Q8_0 is wanted, and the gguf library is not installed.
    """
    a = model.architecture
    config.check(a)
    if wanted is Q8_0:
        extras.require("gguf", "Q8_0", (extras.EVALUATE,))
    if model.tokenizer_files is None:
        raise CheckpointError("a GGUF holds its tokenizer, and the model has none; tokenizer=DIR puts one in")
    rows = a.vocab_size - a.vocab_padding
    settings = generation.completed(model.generation, model.tokenizer_files, rows)
    tensors = mapping.written(model.tensors, a, wanted)
    common = Counter(kind.name for _, kind, shape, _ in tensors if len(shape) > 1).most_common(1)[0][0]
    metadata = {
        **config.write_metadata(a, path.stem),
        "general.file_type": FILE_TYPES[common],
        **({"general.quantization_version": QUANTIZATION_VERSION} if wanted is Q8_0 else {}),
        **tokenizer.write(model.tokenizer_files, rows, settings),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        header.write(file, metadata, tensors)
