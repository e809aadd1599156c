"""What a training stage reads, checked before any long work: data, tokenizer, layout."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.tokenizer import loadable
from nemo_minitron.config import LossConfig, PruneConfig, StageConfig, TrainingConfig
from nemo_minitron.data.blend import Blend, Mixture
from nemo_minitron.data.blend_sources import SPLITS, Source, blend_of, common_length, open_sources, source_places
from nemo_minitron.data.instruction_samples import (
    Samples,
    check_vocabulary,
    make_samples,
    packing_counts,
    packing_note,
    padded_length,
)
from nemo_minitron.data.instructions import read_instructions
from nemo_minitron.data.module import check_fits as check_data
from nemo_minitron.data.module import data_module, paths, resolve_prefixes
from nemo_minitron.data.sample_sets import SampleSet, Windows
from nemo_minitron.errors import ConfigError
from nemo_minitron.megatron.layout import Layout, check_fits, check_length, layout_of

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    from nemo_minitron.data.sample_module import Fields

logger = logging.getLogger(__name__)
LOG = "logs/engine.log"
TOKENIZER, CHECKPOINTS, TENSORBOARD = "tokenizer", "checkpoints", "tensorboard"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Checked inputs of a training stage.

    Attributes:
        prefixes: split -> prefixes of indexed datasets, weights before them as Megatron writes blends.
        seq_length: tokens a sample.
        tokenizer: directory or hub name.
        samples: of instructions, in place of prefixes.
        packing: what packing the samples came to, of a blend by source; None: they are not packed.
        fixed: whether text is read in windows as it lies, in place of Megatron's samples.
        sources: of a blend, in place of prefixes and samples.
    """

    prefixes: dict[str, list[str]]
    seq_length: int
    tokenizer: str
    layout: Layout
    samples: Samples | None = None
    packing: dict[str, Any] | None = None
    fixed: bool = False
    sources: Sequence[Source] = ()

    @property
    def has_rows(self) -> bool:
        """Whether there are instructions, whose answers differ in length."""
        return self.samples is not None or any(source.rows is not None for source in self.sources)

    def sets(self) -> dict[str, SampleSet] | None:
        """Samples of the training and the validation split; None: Megatron makes its own."""
        if self.samples is not None:
            return {**(self.samples.sets if self.packing is None else self.samples.packed)(self.seq_length)}
        if self.sources:
            return {split: blend_of(self.sources, split, self.seq_length) for split in ("train", "validation")}
        if not self.fixed:
            return None
        return {split: Windows(paths(self.prefixes[split]), self.seq_length) for split in ("train", "validation")}

    def row_counts(self) -> dict[str, Any]:
        """What became of the rows of instructions, for the manifest's metrics; nothing where there are none."""
        if self.samples is None:
            return {} if self.packing is None else {"packing": self.packing}
        counts = self.samples.counts
        total = {name: sum(split[name] for split in counts.values()) for name in counts["train"]}
        rows = {f"rows_{name}" if name != "rows" else name: count for name, count in total.items()}
        validation = {"validation_rows": counts["validation"]["rows"]}
        return {"template": self.samples.template, **rows, **validation, **(self.packing or {})}

    def files(self) -> dict[str, str]:
        """Name -> file of the data and the tokenizer, for the manifest."""
        files = data_files(self.prefixes) | (self.samples.files if self.samples else {})
        for source in self.sources:
            files |= source.files()
        return files | ({"tokenizer": self.tokenizer} if Path(self.tokenizer).is_dir() else {})


def data_files(prefixes: dict[str, list[str]]) -> dict[str, str]:
    """Name -> file of the tokens of each split, for the manifest."""
    return {
        f"{split}{number}": f"{path}.bin"
        for split, blend in prefixes.items()
        for number, path in enumerate(paths(blend))
    }


def data_tokenizer(config: StageConfig | PruneConfig) -> str | None:
    """The tokenizer that lies in the data folder that `minitron data` made, if it is one."""
    data = config.model.data
    folders = [Path(data.data_prefix)] if isinstance(data.data_prefix, str) else []
    folders += source_places(data).values() if data.blend else ()
    return next((str(folder / TOKENIZER) for folder in folders if (folder / TOKENIZER).is_dir()), None)


def stated_path(path: str | None, field: str) -> str:
    """The path in a field of the configuration; raises ConfigError where it is not stated."""
    if path is None:
        raise ConfigError(f"{field} is missing: name a checkpoint")
    return path


def training_inputs(config: StageConfig, architecture: Architecture, own_tokenizer: str | None) -> Inputs:
    """Checks and resolves the inputs of a training stage for a model of `architecture`.

    Args:
        own_tokenizer: the checkpoint's tokenizer.

    Raises:
        ConfigError, DataError, EngineError: before any long work.
    """
    layout = layout_of(config.trainer, config.model)
    check_fits(architecture, layout)
    tokenizer = config.model.tokenizer or own_tokenizer or data_tokenizer(config)
    if tokenizer is None:
        raise ConfigError("no tokenizer: neither checkpoint nor data folder has one; give model.tokenizer=DIR")
    length = config.model.data.seq_length or config.model.encoder_seq_length or architecture.seq_length
    if config.model.data.blend and isinstance(config, TrainingConfig | LossConfig):
        sources = blend_sources(config, architecture, tokenizer, length)
        if config.model.data.packing:
            sources = [dataclasses.replace(source, packed=source.rows is not None) for source in sources]
        length = common_length(sources, length)
        check_length(length, layout)
        packing = _packing_of(sources, length) if config.model.data.packing else None
        return Inputs(
            prefixes={}, seq_length=length, tokenizer=tokenizer, layout=layout, sources=sources, packing=packing
        )
    if config.model.data.instructions and isinstance(config, TrainingConfig):
        samples = _samples(config, config.model.data.instructions, architecture, tokenizer, length)
        packing = _packing(samples, length) if config.model.data.packing else None
        padded = padded_length(samples, length) if packing is None else length
        check_length(padded, layout)
        return Inputs(
            prefixes={}, seq_length=padded, tokenizer=tokenizer, layout=layout, samples=samples, packing=packing
        )
    prefixes = resolve_prefixes(config.model.data.data_prefix)
    missing = [split for split in ("train", "validation") if split not in prefixes]
    if missing:
        raise ConfigError(f"model.data.data_prefix has no {' and no '.join(missing)} split")
    check_length(length, layout)
    check_data(prefixes, seq_length=length, vocab_size=architecture.vocab_size)
    return Inputs(prefixes=prefixes, seq_length=length, tokenizer=tokenizer, layout=layout, fixed=config.fixed_windows)


def blend_sources(
    config: TrainingConfig | LossConfig, architecture: Architecture, tokenizer: str, length: int
) -> list[Source]:
    """The sources of model.data.blend, checked to fit the model and the run.

    Raises:
        ConfigError, DataError: before any long work.
    """
    sources = open_sources(
        config.model.data,
        config.instruct if isinstance(config, TrainingConfig) else None,
        tokenizer,
        seq_length=length,
        vocab_size=architecture.vocab_size,
        seed=config.seed,
        splits=SPLITS if isinstance(config, TrainingConfig) else config.splits,
    )
    if isinstance(config, LossConfig):
        return sources
    validated = config.trainer.limit_val_batches * config.model.global_batch_size
    if validated < len(sources):
        raise ConfigError(
            f"a validation of trainer.limit_val_batches {config.trainer.limit_val_batches} x model.global_batch_size "
            f"{config.model.global_batch_size} = {validated} samples has none for some of the {len(sources)} sources"
        )
    return sources


def _samples(
    config: TrainingConfig, instructions: str, architecture: Architecture, tokenizer: str, length: int
) -> Samples:
    """Reads and tokenises the instructions; a sample is as long as the longest of them, `length` at most."""
    from nemo_minitron.data.tokenizer import load_tokenizer

    rows = read_instructions(instructions, config.instruct, config.seed)
    samples = make_samples(rows, config.instruct, load_tokenizer(tokenizer), length)
    check_vocabulary(samples, architecture.vocab_size)
    return samples


def _packing_of(sources: Sequence[Source], length: int) -> dict[str, Any]:
    """What packing the rows of a blend comes to, by source."""
    return {source.name: _packing(source.rows, length) for source in sources if source.rows is not None}


def _packing(samples: Samples, length: int) -> dict[str, Any]:
    """What packing the samples into sequences of `length` comes to, which it says, here and in the samples' notes."""
    counts = packing_counts(samples, samples.packed(length))
    note = packing_note(len(samples.train), length, counts)
    logger.warning("%s", note)
    samples.notes.append(note)
    return counts


def nemo_tokenizer(name: str) -> "AutoTokenizer":
    """NeMo's wrapper of a Hugging Face tokenizer."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    return AutoTokenizer(loadable(name), use_fast=True)


def build_data(
    config: StageConfig, inputs: Inputs, tokenizer: "AutoTokenizer", partial: Path, fields: "Fields | None" = None
) -> "pl.LightningDataModule":
    """NeMo's data module for a training stage.

    Args:
        fields: gives further fields of each sample's batch; the inputs must have sets of samples.
    """
    sets = inputs.sets()
    settings: dict[str, Any] = {
        "seq_length": inputs.seq_length,
        "micro_batch_size": config.model.micro_batch_size,
        "global_batch_size": config.model.global_batch_size,
        "num_workers": config.model.data.num_workers,
        "seed": config.seed,
    }
    if sets is not None:
        from nemo_minitron.data.sample_module import SampleDataModule

        return SampleDataModule(
            sets["train"],
            sets["validation"],
            files=[*inputs.files().values()],
            padding=tokenizer.eos_id,
            packed=inputs.packing is not None,
            fields=fields,
            mixture=mixture_of(config, inputs.sources, sets) if inputs.sources else None,
            tokenizer=tokenizer,
            persistent_workers=config.model.data.num_workers > 0,
            **settings,
        )
    index_dir = config.model.data.index_mapping_dir or str(partial / CHECKPOINTS / "index")
    return data_module(inputs.prefixes, tokenizer, index_dir=index_dir, **settings)


def mixture_of(config: StageConfig, sources: Sequence[Source], sets: dict[str, SampleSet]) -> Mixture:
    """The orders in which a run reads its sources."""
    train, validation = sets["train"], sets["validation"]
    assert isinstance(train, Blend) and isinstance(validation, Blend)
    data, trainer = config.model.data, config.trainer
    return Mixture(
        train,
        validation,
        [source.share for source in sources],
        batch=config.model.global_batch_size,
        steps=trainer.max_steps,
        interval=min(trainer.val_check_interval, trainer.max_steps),
        limit=trainer.limit_val_batches,
        seed=config.seed,
        dynamic=data.dynamic,
        reference=None if data.reference is None else [float(data.reference[name]) for name in data.blend],
        facts=[source.facts() for source in sources],
    )
