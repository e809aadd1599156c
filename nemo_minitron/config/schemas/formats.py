"""Formats of checkpoints as settings name them: what they make on disk, and which settings of a conversion they take.

A format itself is read and written in `checkpoints.formats`; its table there has the same names as this one.
"""

import dataclasses
from pathlib import Path

from nemo_minitron.config.schemas.base import one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputFormat:
    """What settings have to know of a format.

    Attributes:
        name: what `to` calls it.
        makes: what a result of it is on disk, for messages.
        suffix: how the names of its results end; empty where a result is a directory.
        options: settings of `minitron convert` that it takes, of those that not every format takes.
    """

    name: str
    makes: str = "a directory"
    suffix: str = ""
    options: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A setting of `minitron convert` that not every format takes.

    Attributes:
        takers: whose setting it is, for messages.
        remedy: what to do where the result is of another format.
    """

    takers: str
    remedy: str


#: By name; the first is what a result is where neither its name nor `to` says another.
OUTPUT_FORMATS = {
    entry.name: entry
    for entry in (
        OutputFormat(name="nemo2", options=frozenset({"pad_vocab_to_multiple_of"})),
        OutputFormat(
            name="nemo1",
            makes="an archive",
            suffix=".nemo",
            options=frozenset({"pad_vocab_to_multiple_of", "weights"}),
        ),
        OutputFormat(name="hf", options=frozenset({"vocab_size"})),
        OutputFormat(name="bridge", options=frozenset({"pad_vocab_to_multiple_of"})),
        OutputFormat(name="gguf", makes="a GGUF file", suffix=".gguf", options=frozenset({"gguf_type"})),
    )
}
FORMATS = tuple(OUTPUT_FORMATS)
OPTIONS = {
    "weights": Option(takers="weights = zarr is for .nemo archives", remedy="output=NAME.nemo, or leave it"),
    "vocab_size": Option(takers="vocab_size is for Hugging Face", remedy="to=hf, or leave it"),
    "gguf_type": Option(takers="gguf_type is for gguf", remedy="output=NAME.gguf, or leave it"),
    "pad_vocab_to_multiple_of": Option(
        takers="pad_vocab_to_multiple_of is for nemo1, nemo2 and bridge", remedy="leave it"
    ),
}


#: Types of a GGUF's matrices that are written here; llama.cpp's own tool makes all others of F16, BF16 or F32.
GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0")
#: How the names of such others begin.
LLAMA_QUANTIZE = ("Q", "IQ", "TQ", "MXFP")


def gguf_type_problems(wanted: str | None, output: str) -> list[str]:
    """What is wrong with a type of a GGUF's matrices."""
    if wanted is None or wanted in GGUF_TYPES:
        return []
    if wanted.upper() not in GGUF_TYPES and wanted.upper().startswith(LLAMA_QUANTIZE):
        plain, kind = str(Path(output).with_suffix(".gguf")), wanted.upper()
        made = str(Path(output).with_suffix(f".{kind}.gguf"))
        return [
            f"gguf_type = {wanted} is made by llama.cpp, of a file in F16 or BF16: leave it here, then "
            f"`llama-quantize {plain} {made} {kind}`; written here are {', '.join(GGUF_TYPES)}"
        ]
    return one_of("gguf_type", wanted, GGUF_TYPES)


def _named_like(path: str) -> OutputFormat | None:
    """The format that the end of a result's name stands for, if any."""
    suffix = Path(path).suffix
    return next((entry for entry in OUTPUT_FORMATS.values() if entry.suffix and entry.suffix == suffix), None)


def output_format(path: str, to: str | None = None) -> str:
    """The format of a result at `path`: `to`, or else the one that its name ends like, or nemo2."""
    named = _named_like(path)
    return to or (named.name if named else FORMATS[0])


def makes_file(form: str) -> bool:
    """Whether a result of the format `form` is one file, beside which nothing can lie in it."""
    return form in OUTPUT_FORMATS and bool(OUTPUT_FORMATS[form].suffix)


def format_problems(path: str, to: str | None) -> list[str]:
    """What is wrong with writing the format `to` at `path`: an unknown format, or a name that says another one."""
    if to is None:
        return []
    if to not in OUTPUT_FORMATS:
        return one_of("to", to, FORMATS)
    wanted, named = OUTPUT_FORMATS[to], _named_like(path)
    if named not in (None, wanted):
        return [
            f"to = {to} makes {wanted.makes}, but {path} is named like {named.makes}: "
            f"leave {named.suffix} off, or to={named.name}"
        ]
    if wanted.suffix and named is None:
        return [
            f"to = {to} makes {wanted.makes}, but {path} is not named like one: "
            f"name it {path.rstrip('/')}{wanted.suffix}"
        ]
    return []


def option_problems(form: str, given: list[str]) -> list[str]:
    """A problem for each of the settings `given`, names in OPTIONS, that the format `form` has no use for."""
    return [
        f"{OPTIONS[name].takers}; the result is {form}: {OPTIONS[name].remedy}"
        for name in given
        if name not in OUTPUT_FORMATS[form].options
    ]
