"""`minitron data`: a corpus becomes Megatron's indexed datasets, with its tokenizer beside them."""

import dataclasses
import itertools
import json
import math
import os
import shutil
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

    Of several sources each has such a folder in it, but for the manifest; the tokenizer is one.

    Raises:
        DataError: the corpus or the tokenizer cannot be used; before anything is written.
        OutputExistsError: the output was made from something else.
    """
    from nemo_minitron.data.tokenizer import load_tokenizer

    sources = {
        name: dataclasses.replace(config, source=path, sources=None) for name, path in sources_of(config).items()
    }
    corpora = {name: open_corpus(own) for name, own in sources.items()}
    given = load_tokenizer(config.tokenizer) if config.tokenizer else None
    local: dict[str, str | os.PathLike[str]] = (
        {"tokenizer": config.tokenizer} if config.tokenizer and Path(config.tokenizer).is_dir() else {}
    )
    read = {f"{name}-{key}" if name else key: path for name, one in corpora.items() for key, path in one.inputs.items()}
    told_by_content = all(corpus.inputs for corpus in corpora.values())
    job = Job(
        stage="data",
        output=Path(config.output),
        config=dataclasses.asdict(config),
        inputs={**read, **local},
        seed=config.seed,
        overwrite=config.overwrite,
        ignore=("output", "overwrite", "workers", *(("source", "sources") if told_by_content else ()), *local),
    )
    return job.run(lambda partial: _made(partial, config, sources, corpora, given))


def sources_of(config: DataConfig) -> dict[str, str]:
    """Folder in the output -> what it is made of; one source lies in the output itself, under no name."""
    return {"": config.source} if config.sources is None else {str(name): path for name, path in config.sources.items()}


def _made(
    partial: Path,
    config: DataConfig,
    sources: dict[str, DataConfig],
    corpora: dict[str, Corpus],
    given: "PreTrainedTokenizerBase | None",
) -> dict[str, Any]:
    """Fills the partial folder; returns what the manifest says of it.

    Args:
        sources: folder -> the configuration of its source alone.
        given: the tokenizer that config.tokenizer names, or None to train one.
    """
    from nemo_minitron.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe

    for corpus in corpora.values():
        read_through(corpus)
    folder = partial / TOKENIZER
    if given is None or config.tokenizer is None:
        train_bpe(
            itertools.chain.from_iterable(corpus.splits["train"]() for corpus in corpora.values()),
            config.vocab_size,
            folder,
        )
    else:
        save_tokenizer(given, config.tokenizer, folder)
    size = len(load_tokenizer(str(folder)))
    made = {name: _written(partial / name, sources[name], corpus, folder, size) for name, corpus in corpora.items()}
    notes = [note for corpus in corpora.values() for note in corpus.notes]
    if config.sources is None:
        prefixes: dict[str, Any] = {split: split for split in SPLITS}
        return {
            "metrics": {"vocab_size": size, **made[""]},
            "details": {"prefixes": prefixes, "tokenizer": TOKENIZER, "notes": notes},
        }
    for name in made:
        shutil.copytree(folder, partial / name / TOKENIZER)
    prefixes = {name: {split: f"{name}/{split}" for split in SPLITS} for name in made}
    return {
        "metrics": {"vocab_size": size, "sources": made},
        "details": {"prefixes": prefixes, "tokenizer": TOKENIZER, "notes": notes},
    }


def _written(place: Path, config: DataConfig, corpus: Corpus, tokenizer: Path, vocab_size: int) -> dict[str, Any]:
    """Writes the splits of a corpus into a folder; returns what was counted."""
    from nemo_minitron.data.indexed import write_indexed

    place.mkdir(exist_ok=True)
    metrics: dict[str, Any] = {}
    for split in SPLITS:
        written = write_indexed(corpus.splits[split](), str(tokenizer), place / split, config.workers)
        metrics[split] = written._asdict() | {"bytes": (place / f"{split}.bin").stat().st_size}
    metrics["unigram_perplexity"] = unigram_perplexity(place / "train", place / "test", vocab_size)
    if config.source == "embedded":
        metrics["questions"] = _write_questions(config, place / QUESTIONS)
    return metrics


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
