"""Documents into Megatron's indexed datasets (.bin with tokens, .idx with lengths), by several processes."""

import multiprocessing
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_minitron.errors import EngineError
from nemo_minitron.megatron.cpu import without_toolkit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Documents a task.
CHUNK = 64
#: Tasks a worker may have waiting: bounds the memory.
AHEAD = 4

Encode = Callable[[list[str]], list[list[int]]]


class Written(NamedTuple):
    """What was written: documents, words between spaces, and tokens with the end-of-document ones."""

    documents: int
    words: int
    tokens: int


def indexed_datasets() -> Any:
    """Megatron's module of indexed datasets; at its import Megatron warns of what a machine without CUDA lacks."""
    with without_toolkit(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def write_indexed(documents: Iterable[str], tokenizer_dir: str, prefix: Path, workers: int = 1) -> Written:
    """Tokenises documents, ends each with the end-of-document token, and writes `prefix`.bin and .idx.

    The files are the same for any number of workers.
    """
    from tqdm import tqdm

    from nemo_minitron.data.tokenizer import load_tokenizer

    megatron = indexed_datasets()
    tokenizer = load_tokenizer(tokenizer_dir)
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=megatron.DType.optimal_dtype(len(tokenizer)))
    counts = [0, 0, 0]
    bar = tqdm(desc=f"tokenise {prefix.name}", unit=" documents", disable=None if sys.stderr.isatty() else True)
    for words, ids in _encoded(documents, Encoder(tokenizer, tokenizer_dir), workers):
        builder.add_document(ids, [len(ids)])
        counts = [counts[0] + 1, counts[1] + words, counts[2] + len(ids)]
        bar.update(1)
    bar.close()
    builder.finalize(f"{prefix}.idx")
    return Written(*counts)


def _encoded(documents: Iterable[str], encoder: "Encoder", workers: int) -> Iterator[tuple[int, list[int]]]:
    """Words and tokens of each document, in the order of the documents."""
    if workers == 1:
        encode = encoder.ready()
        for chunk in _chunks(documents):
            yield from _counted(chunk, encode(chunk), encoder.end)
        return
    spawn = multiprocessing.get_context("spawn")
    waiting: deque = deque()
    try:
        with ProcessPoolExecutor(workers, spawn, initializer=_start, initargs=(encoder,)) as pool:
            for chunk in _chunks(documents):
                waiting.append((chunk, pool.submit(_encode, chunk)))
                if len(waiting) > AHEAD * workers:
                    chunk, task = waiting.popleft()
                    yield from _counted(chunk, task.result(), encoder.end)
            while waiting:
                chunk, task = waiting.popleft()
                yield from _counted(chunk, task.result(), encoder.end)
    except BrokenExecutor:
        raise EngineError(
            "a process that tokenises died: there was too little memory, or the calling script starts its work without "
            '`if __name__ == "__main__":`. Use workers=1'
        ) from None


def _counted(chunk: list[str], encoded: list[list[int]], end: int) -> Iterator[tuple[int, list[int]]]:
    for text, ids in zip(chunk, encoded):
        yield len(text.split()), [*ids, end]


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for document in documents:
        chunk.append(document)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Encoder:
    """A tokenizer that can be sent to other processes.

    A fast tokenizer travels as its definition, so that the workers need not import transformers.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", folder: str):
        self.folder = folder
        self.end = tokenizer.eos_token_id
        self.definition = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None

    def ready(self) -> Encode:
        if self.definition is None:
            from nemo_minitron.data.tokenizer import load_tokenizer

            slow = load_tokenizer(self.folder)
            return lambda texts: slow(texts, add_special_tokens=False, verbose=False)["input_ids"]
        from tokenizers import Tokenizer

        fast = Tokenizer.from_str(self.definition)
        fast.no_truncation()
        fast.no_padding()
        return lambda texts: [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)]


def _not_started(texts: list[str]) -> list[list[int]]:
    raise RuntimeError("the process was not started with an encoder")


_encode_here: Encode = _not_started


def _start(encoder: Encoder) -> None:
    global _encode_here
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encode_here = encoder.ready()


def _encode(chunk: list[str]) -> list[list[int]]:
    return _encode_here(chunk)
