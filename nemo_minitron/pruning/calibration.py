"""The samples that scores, scans and refits rest on, and the stage that runs a teacher over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.artifacts import MANIFEST, Manifest
from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.config import PruneConfig, missing_data
from nemo_minitron.data.blend_sources import Source, drawn_windows, open_sources
from nemo_minitron.data.module import check_fits as check_data
from nemo_minitron.data.module import paths, resolve_prefixes
from nemo_minitron.errors import ConfigError, EngineError
from nemo_minitron.jobs.job import Job
from nemo_minitron.launch.ranks import run_stage
from nemo_minitron.megatron.layout import Layout
from nemo_minitron.training.inputs import data_files, data_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

#: Every so many samples one is held out of a fit, to choose its ridge on.
HOLD_OUT = 4


def given(config: PruneConfig, folder: Path) -> bool:
    """Whether what lies in `folder` is to be used as it is: it is there, and no data is named to make it from."""
    return not config.model.data.names_text and (folder / MANIFEST).is_file()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """The text that samples are drawn from.

    Attributes:
        files: the training split's datasets, weights before them as Megatron writes blends.
        length: tokens a sample.
        sources: of a blend, in place of `files`.
    """

    files: list
    length: int
    sources: Sequence[Source] = ()

    def inputs(self) -> dict[str, str]:
        """Name -> file that is read, for the manifest."""
        files = data_files({"data": self.files})
        for source in self.sources:
            files |= source.files()
        return files

    def sequences(self, count: int, seed: int) -> tuple[Any, dict[str, Any]]:
        """Random windows of full length [n, length + 1], and what names them."""
        from nemo_minitron.data.samples import random_sequences

        if self.sources:
            sequences, named = drawn_windows(self.sources, count, self.length, seed)
            shares = {source.name: source.share for source in self.sources}
            drawn = {"data": list(shares), "shares": shares, "seed": seed, "seq_length": self.length}
            return sequences, {**drawn, "tokens": int(sequences[:, :-1].numel()), **named}
        prefixes = paths(self.files)
        sequences, starts = random_sequences(prefixes, count, self.length, seed)
        tokens = int(sequences[:, :-1].numel())
        names = [Path(prefix).name for prefix in prefixes]
        named = {"data": names, "seed": seed, "seq_length": self.length, "tokens": tokens, "starts": starts}
        return sequences, named


def calibration_of(config: PruneConfig, teacher: Checkpoint) -> Calibration:
    """The calibration text of a configuration, checked to fit the teacher.

    Raises:
        ConfigError, DataError: none is named, or it does not fit.
    """
    length = config.model.data.seq_length or config.model.encoder_seq_length or teacher.architecture.seq_length
    if config.model.data.blend is not None:
        sources = open_sources(
            config.model.data,
            config.instruct,
            teacher.tokenizer or data_tokenizer(config),
            seq_length=length,
            vocab_size=teacher.architecture.vocab_size,
            seed=config.seed,
            splits=["train"],
            whole_rows=True,
        )
        return Calibration(files=[], length=length, sources=sources)
    problems = missing_data(config.model.data)
    if problems:
        raise ConfigError(
            [
                f"{problems[0]}, to run the teacher on; without data there are prune.drop_layers with "
                "prune.method=minitron, and scores made before (prune.scores_path)"
            ],
            "prune",
        )
    prefixes = resolve_prefixes(config.model.data.data_prefix)
    check_data({"train": prefixes["train"]}, seq_length=length, vocab_size=teacher.architecture.vocab_size)
    return Calibration(files=prefixes["train"], length=length)


def check_block_samples(config: PruneConfig, layout: Layout, otherwise: str = "") -> None:
    """Raises EngineError where prune.num_block_samples are too few to hold any out on each data-parallel rank.

    Args:
        otherwise: what the message says of a way without them.
    """
    ranks = layout.world_size // (layout.tensor_parallel * layout.pipeline_parallel)
    count = config.prune.num_block_samples
    if count < HOLD_OUT * ranks:
        raise EngineError(
            f"prune.num_block_samples = {count}: {HOLD_OUT} a rank are needed, {HOLD_OUT} x {ranks} = "
            f"{HOLD_OUT * ranks}; one in {HOLD_OUT} is held out{otherwise}"
        )


def dealt(sequences: Tensor) -> Tensor:
    """This data-parallel rank's share of samples [n, ..]; call it inside ``parallel_ranks()``."""
    from megatron.core import parallel_state

    ranks = parallel_state.get_data_parallel_world_size()
    return sequences[parallel_state.get_data_parallel_rank() :: ranks]


def run_on_samples(
    config: PruneConfig,
    calibration: Calibration,
    layout: Layout,
    work: Callable[[Path], dict[str, Any]],
    *,
    stage: str,
    function: str,
    output: Path,
    **settings: Any,
) -> Manifest:
    """Runs a stage that passes the teacher over samples; its layout does not tell one result from another.

    Args:
        work: as run_stage takes it.
        stage, function: the stage's name, and where ranks find it.
        settings: what tells its results apart, beyond teacher, text and precision.
    """
    job = Job(
        stage=stage,
        output=output,
        config={
            **settings,
            "seq_length": calibration.length,
            "bf16": layout.bf16,
            **({"blend": {one.name: one.share for one in calibration.sources}} if calibration.sources else {}),
            "layout": dataclasses.asdict(layout),
            "command": dataclasses.asdict(config),
        },
        inputs={"teacher": config.teacher, **calibration.inputs()},
        seed=config.seed,
        overwrite=config.overwrite,
        ignore=("overwrite", "layout", "command"),
    )
    return run_stage(job, work, stage=function, config=config, trainer=config.trainer, resumable=False)
