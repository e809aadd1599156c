"""Tokenised data for NeMo's data module: prefixes resolved and checked without torch, then the module itself."""

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron.artifacts import fingerprint
from nemo_minitron.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")
HEADER = b"MMIDIDX\x00\x00"
VERSION = 1
#: Megatron's codes of token types -> NumPy's names; it has floating-point ones besides, which no token is.
TOKEN_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
TOKEN_BYTES = {code: int(name[-1]) for code, name in TOKEN_TYPES.items()}


class IndexHeader(NamedTuple):
    """What an .idx file says: the code of its token type, sequences, documents and tokens."""

    code: int
    sequences: int
    documents: int
    tokens: int


def resolve_prefixes(data: str | dict | Sequence) -> dict[str, list]:
    """Split -> prefixes of indexed datasets.

    Args:
        data: a folder that `minitron data` made; a dict {train: ..., validation: ..., test: ...} of prefixes or blends
            ([0.5, prefix, 0.5, prefix2]), as NeMo 24.07 takes it; or one prefix or blend for training alone.

    Raises:
        DataError: nothing is there, or a .bin or .idx is missing or truncated.
        ConfigError: a split's name or a blend is not of that form.
    """
    if isinstance(data, dict):
        unknown = sorted(set(data) - set(SPLITS))
        if unknown:
            raise ConfigError(f"model.data.data_prefix has the splits {unknown}; known are {', '.join(SPLITS)}")
        prefixes = {split: _blend(data[split]) for split in SPLITS if data.get(split)}
    elif isinstance(data, str) and Path(data).is_dir():
        prefixes = {split: [str(Path(data) / split)] for split in SPLITS if (Path(data) / f"{split}.idx").exists()}
        if "train" not in prefixes:
            raise DataError(f"{data} holds no train.idx: it is not a folder that `minitron data` made")
    else:
        prefixes = {"train": _blend(data)}
    for entries in prefixes.values():
        for prefix in paths(entries):
            read_header(prefix)
    return prefixes


def _blend(entries: Any) -> list:
    """A blend as [weight, prefix, weight, prefix...] with weights as floats, or [prefix]."""
    values = [entries] if isinstance(entries, str | os.PathLike) else list(entries)
    blend = [_weight(value) for value in values]
    weighted = [isinstance(value, float) for value in blend]
    if any(weighted) and weighted != [True, False] * (len(blend) // 2):
        raise ConfigError(f"model.data.data_prefix = {values}: weights and prefixes must alternate, [0.5,a,0.5,b]")
    return blend


def paths(blend: list) -> list[str]:
    """The prefixes of a resolved blend, without its weights."""
    return [entry for entry in blend if not isinstance(entry, float)]


def _weight(value: Any) -> float | str:
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def read_header(prefix: str) -> IndexHeader:
    """Reads the header of `prefix`.idx and checks the sizes of both files against it.

    Raises:
        DataError: a file is missing, not Megatron's, or truncated.
    """
    import numpy

    index, tokens_file = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, tokens_file):
        if not path.is_file():
            raise DataError(f"{path} is missing: {prefix} is no indexed dataset; make one with `minitron data`")
    with index.open("rb") as file:
        head = file.read(len(HEADER) + 25)
        if not head.startswith(HEADER) or len(head) < len(HEADER) + 25:
            raise DataError(
                f"{index} is not an index of Megatron's, or is truncated; make it again with `minitron data`"
            )
        version, code, sequences, documents = struct.unpack("<QBQQ", head[len(HEADER) :])
        expected = len(head) + 12 * sequences + 8 * documents
        whole = version == VERSION and code in TOKEN_BYTES and index.stat().st_size >= expected
        rest = file.read(expected - len(head)) if whole else b""
    if not whole or not _consistent(rest, sequences, TOKEN_BYTES[code]):
        raise DataError(f"{index} is truncated or damaged; make it again with `minitron data`")
    tokens = int(numpy.frombuffer(rest, dtype="<i4", count=sequences).sum(dtype=numpy.int64))
    if tokens_file.stat().st_size != tokens * TOKEN_BYTES[code]:
        raise DataError(
            f"{tokens_file} is truncated, or {index.name} is another's: {tokens_file.stat().st_size} bytes, the index "
            f"says {tokens} tokens of {TOKEN_BYTES[code]}; make it again with `minitron data`"
        )
    return IndexHeader(code, sequences, documents, tokens)


def _consistent(data: bytes, sequences: int, token_bytes: int) -> bool:
    """Whether an index's lengths, the pointers behind them and the documents' first sequences are of one dataset."""
    import numpy

    lengths = numpy.frombuffer(data, dtype="<i4", count=sequences)
    pointers = numpy.frombuffer(data, dtype="<i8", count=sequences, offset=4 * sequences)
    firsts = numpy.frombuffer(data, dtype="<i8", offset=12 * sequences)
    ends = numpy.cumsum(lengths, dtype=numpy.int64) * token_bytes
    return (
        bool((lengths >= 0).all())
        and numpy.array_equal(pointers[1:], ends[:-1])
        and not pointers[:1].any()
        and len(firsts) > 0
        and (firsts[0], firsts[-1]) == (0, sequences)
        and bool((numpy.diff(firsts) >= 0).all())
    )


def check_fits(prefixes: dict[str, list], *, seq_length: int, vocab_size: int) -> None:
    """Checks that each split holds a sequence and no token that the embedding has no row for.

    Raises:
        DataError: with the split, the numbers, and what to do.
    """
    import numpy

    for split, entries in prefixes.items():
        own = paths(entries)
        headers = [read_header(path) for path in own]
        tokens = sum(header.tokens for header in headers)
        if tokens < seq_length + 1:
            raise DataError(
                f"the {split} split holds {tokens} tokens, fewer than one sequence of {seq_length} + 1 "
                f"({', '.join(own)}); give a shorter model.data.seq_length or more text"
            )
        for path, header in zip(own, headers):
            if not header.tokens:
                continue
            stream = numpy.memmap(f"{path}.bin", dtype=TOKEN_TYPES[header.code], mode="r", shape=(header.tokens,))
            lowest, highest = int(stream.min()), int(stream.max())
            if lowest < 0:
                raise DataError(f"{path}.bin is damaged: it holds the token {lowest}; make it again, `minitron data`")
            if highest >= vocab_size:
                raise DataError(
                    f"{path} holds the token {highest}, but the model's embedding has {vocab_size} rows: the data was "
                    "made with another, larger tokenizer; make it again with the model's own"
                )


def data_module(
    prefixes: dict[str, list],
    tokenizer: Any,
    *,
    seq_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    num_workers: int,
    seed: int,
    index_dir: str,
) -> Any:
    """NeMo's PreTrainingDataModule on resolved prefixes; without a test split the validation split stands for it.

    Args:
        index_dir: where Megatron keeps the sample order, in a folder for each state of the data; never beside the data.
    """
    from nemo_minitron.data.pretraining import TextDataModule

    blends = {split: _weighted(prefixes.get(split, prefixes["validation"])) for split in SPLITS}
    folder = Path(index_dir) / _index_key(blends)
    folder.mkdir(parents=True, exist_ok=True)
    return TextDataModule(
        paths={split: [str(entry) for entry in blend] for split, blend in blends.items()},
        seq_length=seq_length,
        tokenizer=tokenizer,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        index_mapping_dir=str(folder),
        seed=seed,
        split=None,
    )


def _weighted(blend: list) -> list:
    """Several prefixes without weights get their tokens as weights: Megatron reads unweighted ones only once."""
    if len(blend) == 1 or isinstance(blend[0], float):
        return blend
    return [part for prefix in blend for part in (float(read_header(prefix).tokens), prefix)]


def _index_key(blends: dict[str, list]) -> str:
    """Changes with the lengths of the documents: Megatron would reuse the sample order of data that was replaced."""
    digest = hashlib.sha256()
    for blend in blends.values():
        for prefix in paths(blend):
            digest.update(fingerprint(f"{prefix}.idx").encode())
    return digest.hexdigest()[:16]
