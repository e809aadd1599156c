"""Documents into Megatron's indexed datasets (.bin with tokens, .idx with lengths), by several processes."""

import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

CHUNK = 64
_tokenizer: Any = None


class Written(NamedTuple):
    """What was written: documents, words between spaces, and tokens with the end-of-document ones."""

    documents: int
    words: int
    tokens: int


def write_indexed(documents: Iterable[str], tokenizer_dir: str, prefix: Path, workers: int = 1) -> Written:
    """Tokenises documents, ends each with the end-of-document token, and writes `prefix`.bin and .idx.

    The files are the same for any number of workers.
    """
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from tqdm import tqdm

    from nemo_minitron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_dir)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(len(tokenizer)))
    counts = [0, 0, 0]
    bar = tqdm(desc=f"tokenise {prefix.name}", unit=" documents", disable=None if sys.stderr.isatty() else True)
    for words, ids in _encoded(documents, tokenizer_dir, workers):
        builder.add_document(torch.tensor(ids), [len(ids)])
        counts = [counts[0] + 1, counts[1] + words, counts[2] + len(ids)]
        bar.update(1)
    bar.close()
    builder.finalize(f"{prefix}.idx")
    return Written(*counts)


def _encoded(documents: Iterable[str], tokenizer_dir: str, workers: int) -> Iterator[tuple[int, list[int]]]:
    if workers == 1:
        _start(tokenizer_dir)
        for chunk in _chunks(documents):
            yield from _encode(chunk)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _start, (tokenizer_dir,)) as pool:
        for encoded in pool.imap(_encode, _chunks(documents), chunksize=1):
            yield from encoded


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for document in documents:
        chunk.append(document)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _start(tokenizer_dir: str) -> None:
    global _tokenizer
    from nemo_minitron.data.tokenizer import load_tokenizer

    _tokenizer = load_tokenizer(tokenizer_dir)


def _encode(chunk: list[str]) -> list[tuple[int, list[int]]]:
    encoded = _tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
    return [(len(text.split()), [*ids, _tokenizer.eos_token_id]) for text, ids in zip(chunk, encoded)]
