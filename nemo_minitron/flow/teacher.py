"""The teacher of a flow: a checkpoint that is given, or random weights of stated sizes that are pretrained here."""

import dataclasses
from pathlib import Path

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture, padded_vocab_size
from nemo_minitron.errors import CheckpointError, ConfigError
from nemo_minitron.published import stated_fields


def given_checkpoint(config: c.FlowConfig) -> str | None:
    """The checkpoint that the teacher is; None where it is made here."""
    return config.model.restore_from_path if config.model.init == "checkpoint" else None


def pretrains_on_broad(config: c.FlowConfig) -> bool:
    """Whether the teacher is made here, on a corpus of its own."""
    return config.model.init == "random" and config.data.source == "embedded"


def check_teacher(config: c.FlowConfig) -> None:
    """Checks, before any work, that a teacher that is to come from a checkpoint is there."""
    place = given_checkpoint(config)
    if place is None:
        return
    if not Path(place).exists():
        sources = (config.model.download or "").split(" or ")
        where = f" Get it, {' or '.join(f'`minitron download {source} {place}`' for source in sources)}, or"
        raise CheckpointError(
            f"the teacher model.restore_from_path={place} does not exist.{where if config.model.download else ''} name "
            "its place, model.restore_from_path=PATH"
        )
    if config.data.tokenizer is None:
        from nemo_minitron.checkpoints.checkpoint import open_checkpoint

        if open_checkpoint(place, "teacher").tokenizer is None:
            raise ConfigError("the teacher's checkpoint has no tokenizer: give it, data.tokenizer=DIR", "flow")


def teacher_architecture(config: c.FlowConfig) -> Architecture:
    """The teacher's sizes: those of its checkpoint where that is here, those of the preset otherwise."""
    path = given_checkpoint(config)
    if path is not None and Path(path).exists():
        from nemo_minitron.checkpoints.checkpoint import open_checkpoint

        return open_checkpoint(path, "teacher").architecture
    if not config.model.architecture:
        check_teacher(config)
    fields = stated_fields(config.model.architecture, "flow")
    if fields.get("vocab_size") is None:
        fields["vocab_size"] = padded_vocab_size(config.data.vocab_size)
    return Architecture.from_settings(fields, "flow")


def with_own_tokenizer(config: c.FlowConfig) -> c.FlowConfig:
    """The configuration with the tokenizer of the teacher's checkpoint, where none is named.

    Out of an archive it is copied to the user's cache: for a flow that runs, not for one that is only planned.
    """
    path = given_checkpoint(config)
    if path is None or config.data.tokenizer is not None:
        return config
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint

    tokenizer = open_checkpoint(path, "teacher").tokenizer
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
