"""`minitron convert`: a checkpoint of any format into any other, tensor by tensor, checked before it is in place."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint, place_in, write_checkpoint
from nemo_minitron.checkpoints.formats.base import WriteOptions
from nemo_minitron.checkpoints.formats.table import FORMATS
from nemo_minitron.checkpoints.names import EMBEDDING, OUTPUT
from nemo_minitron.checkpoints.tensors import Cast, Lazy, Resized
from nemo_minitron.config import ConvertConfig
from nemo_minitron.conversion import verify
from nemo_minitron.conversion.writing import check_room, progress, total_bytes
from nemo_minitron.errors import ConfigError
from nemo_minitron.jobs.job import Job

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "32": "float32"}
#: Largest relative difference of logits once values were rounded to another dtype.
ROUNDED = {"bfloat16": 5e-2, "float16": 5e-3, "float32": verify.TOLERANCE}
#: The same for weights that were quantised to eight bits.
QUANTISED = 1e-1


def convert(config: ConvertConfig) -> Manifest:
    """Converts `config.source` to `config.output`.

    Raises:
        CheckpointError: the source is damaged or unknown, or the result is not what it should be.
        ConfigError: the settings ask for something that this model or format cannot do.
        OutputExistsError: the output was made from something else.
    """
    source = open_checkpoint(config.source, "source", quantized=True)
    architecture, tensors = plan(source, config)
    options = write_options(config)
    FORMATS[config.target_format].check(architecture, source.dtype)
    if config.tokenizer:
        tokenizers.from_directory(config.tokenizer)
    check_room(config.output, total_bytes(tensors))
    how = verify.resolve(config.verify, source)
    if how == "logits" and source.quantization is not None:
        raise ConfigError(
            "verify = logits: neither transformers nor Megatron runs quantised weights; leave it, or verify=tensors",
            "minitron convert",
        )
    settings = dataclasses.asdict(config) | {"format": config.target_format, "verify": how}
    job = Job(
        stage="convert",
        output=Path(config.output),
        config=settings,
        inputs={"source": source.path, **({"tokenizer": config.tokenizer} if config.tokenizer else {})},
        seed=config.seed,
        overwrite=config.overwrite,
        ignore=("overwrite", "source", "output", "to", "verify", "tokenizer"),
        sampled=("source",),
    )

    def write(partial: Path) -> dict[str, Any]:
        place = place_in(partial, config.output, config.target_format)
        tokenizer = choose_tokenizer(source, config)
        for note in FORMATS[config.target_format].notes(architecture, options):
            print(f"note: {note}", file=sys.stderr)
        with progress(tensors, f"{source.format} -> {config.target_format}") as watched:
            write_checkpoint(
                place,
                config.target_format,
                architecture,
                watched,
                tokenizer,
                source.generation,
                options,
            )
        checked = check_result(source, place, tensors, how, config)
        return {
            "metrics": {"parameters": architecture.parameters(), "bytes": total_bytes(tensors), **checked},
            "details": {"architecture": architecture.to_dict(), "format": config.target_format},
        }

    done = job.finished()
    if done is None:
        return job.run(write)
    if verify.STRENGTH.index(how) > verify.STRENGTH.index(done.metrics["verified"]):
        done.metrics |= check_result(source, Path(config.output), tensors, how, config)
    return done


def write_options(config: ConvertConfig) -> WriteOptions:
    """How the result is written."""
    return WriteOptions(weights=config.weights, shard_bytes=int(config.shard_size_gb * 1e9), gguf_type=config.gguf_type)


def plan(source: Checkpoint, config: ConvertConfig) -> tuple[Architecture, Mapping[str, Lazy]]:
    """The architecture and tensors that are to be written: dtype and vocabulary as the settings ask for."""
    architecture, tensors = source.architecture, dict(source.tensors)
    rows, tokens = architecture.vocab_size, architecture.vocab_size - architecture.vocab_padding
    if config.vocab_size is not None:
        if config.vocab_size > rows:
            raise ConfigError(f"vocab_size = {config.vocab_size}: the embedding has {rows} rows", "minitron convert")
        tokens = config.vocab_size
    if config.pad_vocab_to_multiple_of:
        step = config.pad_vocab_to_multiple_of
        rows = -(-tokens // step) * step
    if rows != architecture.vocab_size:
        for name in {EMBEDDING, OUTPUT} & tensors.keys():
            tensors[name] = Resized(Resized(tensors[name], tokens), rows)
    if config.dtype and any(tensor.dtype != DTYPES[config.dtype] for tensor in tensors.values()):
        tensors = {name: Cast(tensor, DTYPES[config.dtype]) for name, tensor in tensors.items()}
    return dataclasses.replace(architecture, vocab_size=rows, vocab_padding=rows - tokens), tensors


def choose_tokenizer(source: Checkpoint, config: ConvertConfig) -> tokenizers.Tokenizer | None:
    """The tokenizer that goes into the result: the one asked for, or the source's, with its files if it can."""
    if config.tokenizer:
        return tokenizers.from_directory(config.tokenizer)
    tokenizer = source.tokenizer_files
    if tokenizer is None or tokenizer.files:
        return tokenizer
    return tokenizers.from_hub(tokenizer, lambda message: print(message, file=sys.stderr))


def check_result(
    source: Checkpoint, place: Path, expected: Mapping[str, Lazy], how: str, config: ConvertConfig
) -> dict[str, Any]:
    """Opens what was written, which checks every name and shape, and compares it as `how` says."""
    if how == "none":
        return {"verified": "none"}
    result = open_checkpoint(place, "result", quantized=True)
    held = result.kind.kept(expected, result.architecture, write_options(config))
    checked = {"verified": how, **verify.compare_tensors(held, result, config.seed)}
    if how == "logits":
        checked |= verify.compare_logits(source, result, config.seed, tolerance(source, result))
    return checked


def tolerance(source: Checkpoint, result: Checkpoint) -> float:
    """Largest relative difference of logits that the result's precision explains."""
    if result.quantization is not None:
        return QUANTISED
    return verify.TOLERANCE if result.dtype == source.dtype else ROUNDED[result.dtype]
