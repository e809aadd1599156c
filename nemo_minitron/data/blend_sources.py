"""The sources that model.data.blend names, opened and checked: tokenised text, or rows of instructions."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import InstructConfig, ModelDataConfig
from nemo_minitron.data.blend import Blend, Drawn, Shares, normalised
from nemo_minitron.data.instruction_samples import Samples, check_vocabulary, make_samples, padded_length
from nemo_minitron.data.instructions import read_instructions
from nemo_minitron.data.module import check_fits, paths, resolve_prefixes
from nemo_minitron.data.sample_sets import SampleSet, Windows
from nemo_minitron.data.samples import random_windows, token_stream
from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SPLITS = ("train", "validation")
#: Labels that no row has: none is cut.
WHOLE = 1 << 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A source of a blend: text or rows.

    Attributes:
        name: by which losses are shown.
        share: of the samples.
        prefixes: split -> prefixes of the indexed datasets of text.
        rows: instructions.
        packed: whether its rows are packed into sequences.
    """

    name: str
    share: float
    prefixes: dict[str, list[str]]
    rows: Samples | None = None
    packed: bool = False

    def set(self, split: str, length: int) -> SampleSet:
        """The samples of a split, `length` labels each."""
        if self.rows is not None:
            return (self.rows.packed if self.packed else self.rows.sets)(length)[split]
        return Windows(paths(self.prefixes[split]), length)

    def streams(self) -> "list[np.ndarray]":
        """The tokens of the training split, documents or rows one after another [tokens]."""
        import numpy

        if self.rows is not None:
            return [numpy.concatenate([numpy.asarray(row.ids, dtype=numpy.int64) for row in self.rows.train])]
        return [token_stream(prefix) for prefix in paths(self.prefixes["train"])]

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
    """Labels a sample: all of the sequence where there is text or packed rows, else as few as hold the longest."""
    rows = [source.rows for source in sources if source.rows is not None and not source.packed]
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
    """The folder of that name in `folder`, or else the path itself."""
    own = Path(name).expanduser()
    if folder is not None and (folder / own).exists():
        return folder / own
    if own.exists():
        return own
    if folder is None:
        raise DataError(
            f"model.data.blend names {name}, which is no folder or file; names are paths, or with "
            "model.data.data_prefix folders in it"
        )
    known = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    there = f"it holds {', '.join(known)}" if known else "which is no folder"
    raise DataError(f"model.data.blend names {name}, but {folder / own} is not there: {folder}, {there}")


def shown_name(name: str) -> str:
    """What a source is called where its losses are shown: the last part of its path, without a suffix."""
    return Path(name).stem if Path(name).suffix in (".json", ".jsonl", ".parquet") else Path(name).name


def open_sources(
    data: ModelDataConfig,
    instruct: InstructConfig | None,
    tokenizer: str | None,
    *,
    seq_length: int,
    vocab_size: int,
    seed: int,
    splits: Sequence[str] = SPLITS,
    whole_rows: bool = False,
) -> list[Source]:
    """Opens and checks every source of `data.blend`.

    Args:
        instruct: how rows are read; None: there may be none.
        tokenizer: directory or hub name, for rows.
        seq_length: labels a sample may have.
        vocab_size: rows of the embedding.
        seed: of validation rows that are drawn.
        splits: of text, that are read.
        whole_rows: whether rows longer than that stay whole.

    Raises:
        DataError: with the name of the source: it is missing, has no validation split, or does not fit the model.
    """
    from nemo_minitron.data.tokenizer import load_tokenizer

    places = source_places(data)
    weights: Mapping[str, float] = {str(name): float(weight) for name, weight in data.blend.items()}
    sources = []
    for (name, place), share in zip(places.items(), normalised(list(weights.values()))):
        prefixes, rows = {}, None
        try:
            if (place / "train.idx").is_file():
                found = resolve_prefixes(str(place))
                for split in splits:
                    if split not in found:
                        raise DataError(f"{place} has no {split} split, {split}.idx; make one with `minitron data`")
                prefixes = {split: found[split] for split in splits}
                check_fits(prefixes, seq_length=seq_length, vocab_size=vocab_size)
            else:
                if instruct is None:
                    raise DataError(f"{place} has no train.idx, and the loss of a split is measured on text alone")
                read = read_instructions(str(place), instruct, seed)
                if tokenizer is None:
                    raise DataError("it holds rows, and there is no tokenizer for them: the checkpoint has none")
                longest = WHOLE if whole_rows else seq_length
                rows = make_samples(read, instruct, load_tokenizer(tokenizer), longest)
                check_vocabulary(rows, vocab_size)
        except DataError as error:
            raise DataError(f"model.data.blend, {name}: {error}") from None
        sources.append(Source(name=shown_name(name), share=share, prefixes=prefixes, rows=rows))
    return sources


def drawn_windows(sources: Sequence[Source], count: int, length: int, seed: int) -> "tuple[Tensor, dict[str, Any]]":
    """Random windows of the training splits in the sources' exact shares, rows one after another as documents.

    Returns:
        tokens [count, length + 1] (int64), and what names them: the source and the start in it of each.

    Raises:
        DataError: a source has fewer different windows than its share asks for.
    """
    import torch

    order = Drawn([1] * len(sources), Shares([source.share for source in sources]), seed).sources(count)
    windows, starts = [], []
    for number, source in enumerate(sources):
        asked = order.count(number)
        found, places = (
            random_windows(source.streams(), source.name, asked, length, seed)
            if asked
            else (torch.empty(0, length + 1, dtype=torch.int64), [])
        )
        if len(found) < asked:
            raise DataError(
                f"model.data.blend, {source.name}: {len(found)} different windows, and its share are {asked}"
            )
        windows.append(iter(found))
        starts.append(iter(places))
    tokens = torch.stack([next(windows[number]) for number in order])
    names = [source.name for source in sources]
    named = {"sources": [names[number] for number in order], "starts": [next(starts[number]) for number in order]}
    return tokens, named
