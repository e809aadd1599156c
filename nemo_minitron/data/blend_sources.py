"""The sources that model.data.blend names, opened and checked: tokenised text, or rows of instructions."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import InstructConfig, ModelDataConfig
from nemo_minitron.data.blend import Blend, normalised
from nemo_minitron.data.instruction_samples import Samples, check_vocabulary, make_samples, padded_length
from nemo_minitron.data.instructions import read_instructions
from nemo_minitron.data.module import check_fits, paths, resolve_prefixes
from nemo_minitron.data.sample_sets import SampleSet, Windows
from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A source of a blend: text or rows.

    Attributes:
        name: by which losses are shown.
        share: of the samples.
        prefixes: split -> prefixes of the indexed datasets of text.
        rows: instructions.
    """

    name: str
    share: float
    prefixes: dict[str, list[str]]
    rows: Samples | None = None

    def set(self, split: str, length: int) -> SampleSet:
        """The samples of a split, `length` labels each."""
        if self.rows is not None:
            return self.rows.sets(length)[split]
        return Windows(paths(self.prefixes[split]), length)

    def facts(self) -> dict[str, Any]:
        """What became of its rows, for the manifest."""
        if self.rows is None:
            return {}
        return {"template": self.rows.template, "notes": self.rows.notes, **self.rows.counts}

    def files(self) -> dict[str, str]:
        """Name -> file that is read, for the manifest."""
        files = {
            f"{split}{number}": f"{path}.bin"
            for split in SPLITS
            for number, path in enumerate(paths(self.prefixes.get(split, [])))
        }
        return {f"{self.name}-{name}": file for name, file in (files | (self.rows.files if self.rows else {})).items()}


def blend_of(sources: Sequence[Source], split: str, length: int) -> Blend:
    """A split of all sources."""
    return Blend({source.name: source.set(split, length) for source in sources})


def common_length(sources: Sequence[Source], seq_length: int) -> int:
    """Labels a sample: all of the sequence where there is text; for rows alone as few as hold the longest."""
    rows = [source.rows for source in sources if source.rows is not None]
    return seq_length if len(rows) < len(sources) else max(padded_length(samples, seq_length) for samples in rows)


def source_places(data: ModelDataConfig) -> dict[str, Path]:
    """Name in the blend -> the folder or file that it stands for.

    Raises:
        DataError: there is none, or two are called alike.
    """
    folder = Path(str(data.data_prefix)).expanduser() if data.data_prefix else None
    places = {name: _place(name, folder) for name in map(str, data.blend or {})}
    shown = [shown_name(name) for name in places]
    for name in shown:
        if shown.count(name) > 1:
            raise DataError(f"model.data.blend has two sources that are called {name}: rename one of the folders")
    return places


def _place(name: str, folder: Path | None) -> Path:
    own = Path(name).expanduser()
    if folder is None or own.is_absolute():
        if own.exists():
            return own
        raise DataError(
            f"model.data.blend names {name}, which is no folder or file; names are paths, or with "
            "model.data.data_prefix folders in it"
        )
    inside = folder / name
    if not inside.exists():
        known = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        there = f"it holds {', '.join(known)}" if known else "which is no folder"
        raise DataError(f"model.data.blend names {name}, but {inside} is not there: {folder}, {there}")
    return inside


def shown_name(name: str) -> str:
    """What a source is called where its losses are shown: the last part of its path, without a suffix."""
    return Path(name).stem if Path(name).suffix in (".json", ".jsonl", ".parquet") else Path(name).name


def open_sources(
    data: ModelDataConfig,
    instruct: InstructConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_length: int,
    vocab_size: int,
    seed: int,
) -> list[Source]:
    """Opens and checks every source of `data.blend`.

    Args:
        instruct: how rows are read.
        seq_length: labels a sample may have.
        vocab_size: rows of the embedding.
        seed: of validation rows that are drawn.

    Raises:
        DataError: with the name of the source: it is missing, has no validation split, or does not fit the model.
    """
    places = source_places(data)
    weights: Mapping[str, float] = {str(name): float(weight) for name, weight in data.blend.items()}
    sources = []
    for (name, place), share in zip(places.items(), normalised(list(weights.values()))):
        shown = shown_name(name)
        try:
            if (place / "train.idx").is_file():
                prefixes = resolve_prefixes(str(place))
                if "validation" not in prefixes:
                    raise DataError(f"{place} has no validation split, validation.idx; make one with `minitron data`")
                check_fits({split: prefixes[split] for split in SPLITS}, seq_length=seq_length, vocab_size=vocab_size)
                sources.append(Source(name=shown, share=share, prefixes=prefixes))
                continue
            read = read_instructions(str(place), instruct, seed)
            rows = make_samples(read, instruct, tokenizer, seq_length)
            check_vocabulary(rows, vocab_size)
        except DataError as error:
            raise DataError(f"model.data.blend, {name}: {error}") from None
        sources.append(Source(name=shown, share=share, prefixes={}, rows=rows))
    return sources
