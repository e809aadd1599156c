"""`minitron teach`: one pass of a teacher over a dataset."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Manifest, sampled_fingerprint
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.config import AnswersConfig, TeachConfig, TrainingConfig
from nemo_minitron.distillation.teach.forms import form_of
from nemo_minitron.distillation.teach.header import Header, tokenizer_fingerprint
from nemo_minitron.distillation.teach.listing import Listing
from nemo_minitron.distillation.teach.reading import what_is_read
from nemo_minitron.launch.ranks import rank
from nemo_minitron.training.inputs import LOG, Inputs, stated_path, training_inputs
from nemo_minitron.training.stage import run_training_stage


def teach(config: TeachConfig) -> Manifest:
    """Writes the teacher's answers to the samples that distill reads into the folder `config.output`.

    Raises:
        ConfigError, CheckpointError, DataError, EngineError: before any work.
        OutputExistsError: the output was made from something else.
        MinitronError: the disk is full; what is whole stays, and the same command goes on.
    """
    path = stated_path(config.model.restore_from_path, "model.restore_from_path")
    teacher = open_checkpoint(path, "teacher")
    inputs = training_inputs(config, teacher.architecture, teacher.tokenizer)
    return run_training_stage(
        "teach",
        teach,
        config,
        {"teacher": path} | inputs.files(),
        lambda partial: keep_answers(partial, config, teacher, inputs),
    )


def keep_answers(partial: Path, config: TeachConfig, teacher: Checkpoint, inputs: Inputs) -> dict[str, Any]:
    """The job's work: runs the teacher; every rank calls it."""
    from nemo_minitron.distillation.teach.writer import measured

    started = time.perf_counter()
    listing = what_is_read(config, inputs, None, config.teach.tokens)
    header, speed = answer(partial, config, config.teach, teacher, inputs, listing, f"teach {Path(config.output).name}")
    return {
        "metrics": measured(partial, header, listing) if rank() == 0 else {},
        "timings": {"teaching_seconds": time.perf_counter() - started, "tokens_per_second": speed},
        "details": {"architecture": teacher.architecture.to_dict()},
    }


def answer(
    folder: Path,
    config: TrainingConfig,
    asked: AnswersConfig,
    teacher: Checkpoint,
    inputs: Inputs,
    listing: Listing,
    what: str,
) -> tuple[Header, float]:
    """Has the teacher answer a listing into `folder`, as far as it is not there yet; every rank calls it.

    Args:
        what: the work, as progress shows it.

    Returns:
        the folder's header, and tokens a second.
    """
    from nemo_minitron.data.tokenizer import load_tokenizer
    from nemo_minitron.distillation.teach.writer import write_answers
    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.session import engine

    header = header_of(asked, teacher, inputs, listing, config.model.micro_batch_size)
    layout = dataclasses.replace(inputs.layout, sequence_parallel=False)
    with engine(config.seed, folder / LOG, cuda=layout.cuda), parallel_ranks(layout, config.seed):
        model = load_model(teacher.architecture, layout, teacher)
        begun = time.perf_counter()
        tokens = write_answers(
            folder,
            header,
            listing,
            model,
            batch=config.model.micro_batch_size,
            padding=load_tokenizer(inputs.tokenizer).eos_token_id,
            seed=config.seed,
            what=what,
            every=config.trainer.log_every_n_steps,
        )
        seconds = time.perf_counter() - begun
    return header, tokens / max(seconds, 1e-9)


def header_of(asked: AnswersConfig, teacher: Checkpoint, inputs: Inputs, listing: Listing, batch: int) -> Header:
    """What a folder of answers to a listing says of itself."""
    fields: dict[str, Any] = {
        "keep": asked.keep,
        "precision": asked.precision,
        "draws": asked.draws,
        "top_k": asked.top_k,
        "hidden_size": teacher.architecture.hidden_size,
        "vocab_size": teacher.architecture.vocab_size,
        "seq_length": inputs.seq_length,
        "text": not inputs.has_rows,
        "teacher": teacher.content,
        "tokenizer": tokenizer_fingerprint(inputs.tokenizer),
        "data": {name: sampled_fingerprint(path) for name, path in inputs.files().items() if name != "tokenizer"},
    }
    plan = form_of(Header(**fields, samples=[], tokens=[])).token_bytes
    shards = listing.shards(asked.shard_megabytes << 20, plan, batch)
    tokens = [int(listing.tokens[shard.start : shard.stop].sum()) for shard in shards]
    return Header(**fields, samples=[len(shard) for shard in shards], tokens=tokens)
