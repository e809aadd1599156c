"""`minitron data`: a corpus becomes Megatron's indexed datasets, with its tokenizer beside them."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.artifacts import Manifest
from nemo_minitron.config import DataConfig
from nemo_minitron.data.sources import SPLITS, Corpus, open_corpus, read_through
from nemo_minitron.jobs.job import Job

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER, QUESTIONS = "tokenizer", "questions.jsonl"


def prepare(config: DataConfig) -> Manifest:
    """Makes `config.output`: {train,validation,test}.{bin,idx}, tokenizer/, questions.jsonl, manifest.json.

    Raises:
        DataError: the corpus or the tokenizer cannot be used; before anything is written.
        OutputExistsError: the output was made from something else.
    """
    from nemo_minitron.data.tokenizer import load_tokenizer

    corpus = open_corpus(config)
    given = load_tokenizer(config.tokenizer) if config.tokenizer else None
    local: dict[str, str | os.PathLike[str]] = (
        {"tokenizer": config.tokenizer} if config.tokenizer and Path(config.tokenizer).is_dir() else {}
    )
    job = Job(
        stage="data",
        output=Path(config.output),
        config=dataclasses.asdict(config),
        inputs={**corpus.inputs, **local},
        seed=config.seed,
        overwrite=config.overwrite,
        ignore=("output", "overwrite", "workers", *(("source",) if corpus.inputs else ()), *local),
    )
    return job.run(lambda partial: _made(partial, config, corpus, given))


def _made(partial: Path, config: DataConfig, corpus: Corpus, given: "PreTrainedTokenizerBase | None") -> dict[str, Any]:
    """Fills the partial folder; returns what the manifest says of it.

    Args:
        given: the tokenizer that config.tokenizer names, or None to train one.
    """
    from nemo_minitron.data.indexed import write_indexed
    from nemo_minitron.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe

    read_through(corpus)
    folder = partial / TOKENIZER
    if given is None or config.tokenizer is None:
        train_bpe(corpus.splits["train"](), config.vocab_size, folder)
    else:
        save_tokenizer(given, config.tokenizer, folder)
    metrics: dict[str, Any] = {"vocab_size": len(load_tokenizer(str(folder)))}
    for split in SPLITS:
        written = write_indexed(corpus.splits[split](), str(folder), partial / split, config.workers)
        metrics[split] = written._asdict() | {"bytes": (partial / f"{split}.bin").stat().st_size}
    metrics["unigram_perplexity"] = unigram_perplexity(partial / "train", partial / "test", metrics["vocab_size"])
    if config.source == "embedded":
        metrics["questions"] = _write_questions(config, partial / QUESTIONS)
    return {
        "metrics": metrics,
        "details": {"prefixes": {split: split for split in SPLITS}, "tokenizer": TOKENIZER, "notes": corpus.notes},
    }


def unigram_perplexity(train: Path, test: Path, vocab_size: int) -> float:
    """Perplexity a token of the test split under the training split's token frequencies, with add-one smoothing."""
    import numpy

    from nemo_minitron.data.samples import token_stream

    counts = numpy.bincount(token_stream(str(train)), minlength=vocab_size) + 1.0
    losses = numpy.log(counts.sum()) - numpy.log(counts)
    return math.exp(float(losses[token_stream(str(test))].mean()))


def _write_questions(config: DataConfig, path: Path) -> int:
    from nemo_minitron.data.synthetic import corpus as embedded

    questions = embedded.questions(config.words, config.seed)
    path.write_text("".join(f"{json.dumps(question, ensure_ascii=False)}\n" for question in questions), "utf-8")
    return len(questions)
