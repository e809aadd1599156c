"""Settings of `minitron quantize`."""

import dataclasses
from dataclasses import field

from nemo_minitron.config.schemas.base import Config, at_least, one_of, text_key_problems
from nemo_minitron.config.schemas.checkpoints import missing_source, overlap, unnamed
from nemo_minitron.config.schemas.formats import OUTPUT_FORMATS, output_format

QFORMATS = ("fp8", "int4_awq", "int8_sq", "bf16")
EXPORTS = ("hf", "trtllm")
SERVERS = ("trtllm", "vllm", "sglang")
#: (export, qformat) -> servers that load it; sources in docs/deployment.rst.
LOADS = {
    ("hf", "fp8"): SERVERS,
    ("hf", "int4_awq"): ("trtllm",),
    ("hf", "int8_sq"): (),
    ("hf", "bf16"): SERVERS,
    **{("trtllm", qformat): ("trtllm",) for qformat in QFORMATS},
}
NAMES = {"trtllm": "TensorRT-LLM", "vllm": "vLLM", "sglang": "SGLang"}


@dataclasses.dataclass(kw_only=True)
class CalibrationDataConfig(Config):
    """The text on which the ranges of activations are measured."""

    source: str | None = None
    """A folder that `minitron data` made, a text file or a folder of them as in `minitron data`, `embedded`,
    `prose` or `wikitext103`; not needed with qformat=bf16."""
    text_key: str = "text"
    """Field of JSON rows, or column of parquet files, that holds the text; a field inside another behind a dot, a.b."""
    tokenizer: str | None = None
    """Tokenizer of a text: Hugging Face name or directory; none: the checkpoint's own."""

    def problems(self) -> list[str]:
        return text_key_problems(self.text_key)


@dataclasses.dataclass(kw_only=True)
class QuantizeConfig(Config):
    """What `minitron quantize` does: a checkpoint in fewer bits, in the layout that a server loads."""

    source: str = "???"
    """Checkpoint to quantise: a .nemo archive, or a NeMo-2 or Hugging Face directory."""
    output: str = "???"
    """Folder to make."""
    qformat: str = "fp8"
    """`fp8` (weights and activations), `int4_awq` (weights in groups of 128), `int8_sq` (SmoothQuant: weights and
    activations) or `bf16` (no quantisation)."""
    export: str = "hf"
    """`hf`: a Hugging Face directory, which TensorRT-LLM 1.x, vLLM and SGLang load; `trtllm`: the checkpoint of older
    TensorRT-LLM releases (config.json, rank*.safetensors) for trtllm-build."""
    server: str | None = None
    """`trtllm`, `vllm` or `sglang`: refuse what this server cannot load, and print only its commands."""
    tp_size: int = 1
    """GPUs that share each matrix when the model is served."""
    pp_size: int = 1
    """GPUs that share the layers when the model is served."""
    data: CalibrationDataConfig = field(default_factory=CalibrationDataConfig)
    num_samples: int = 512
    """Random sequences to calibrate on."""
    seq_length: int | None = None
    """Tokens a sequence; none: 512, or the model's own length where that is shorter."""
    batch_size: int = 4
    """Sequences a forward pass."""
    accelerator: str = "auto"
    """`auto`, `gpu` or `cpu`: where calibration runs."""
    seed: int = 1234
    """Seed of the choice of sequences."""
    overwrite: bool = False
    """Replace an output that was made from something else."""

    @property
    def calibrates(self) -> bool:
        """Whether the model is run on data."""
        return self.qformat != "bf16"

    def problems(self) -> list[str]:
        problems = missing_source(self.source, "the checkpoint to quantise, source=PATH")
        if self.output == "???":
            problems.append("output is missing: name the folder to make, output=DIR")
        else:
            problems += unnamed(self.output)
            named = OUTPUT_FORMATS[output_format(self.output)]
            if named.suffix:
                problems.append(
                    f"output = {self.output} is named like {named.makes}, but a folder is made: "
                    f"leave {named.suffix} off"
                )
        if "???" not in (self.source, self.output):
            problems += overlap(self.source, self.output)
        choices = one_of("qformat", self.qformat, QFORMATS) + one_of("export", self.export, EXPORTS)
        choices += [] if self.server is None else one_of("server", self.server, SERVERS)
        problems += one_of("accelerator", self.accelerator, ("auto", "gpu", "cpu"))
        problems += at_least(1, tp_size=self.tp_size, pp_size=self.pp_size, num_samples=self.num_samples)
        problems += at_least(1, batch_size=self.batch_size) + at_least(2, seq_length=self.seq_length)
        return problems + (choices or self._server_problems() + self._data_problems())

    def _data_problems(self) -> list[str]:
        if self.data.source or not self.calibrates:
            return []
        return [
            f"data.source is missing: {self.qformat} measures the model's activations on text; name a folder that "
            "`minitron data` made or a text file, data.source=PATH"
        ]

    def _server_problems(self) -> list[str]:
        """A problem where the server that was chosen cannot load what would be written."""
        loaders = LOADS[self.export, self.qformat]
        if self.server is None or self.server in loaders:
            return []
        name = NAMES[self.server]
        if self.export == "trtllm":
            return [f"server = {self.server}: {name} loads Hugging Face directories only: give export=hf"]
        remedy = {
            "int4_awq": f"TensorRT-LLM loads it (server=trtllm); for {name} give qformat=fp8",
            "int8_sq": "trtllm-build of older TensorRT-LLM releases takes it (export=trtllm); else give qformat=fp8",
        }[self.qformat]
        return [f"server = {self.server}: {name} does not load ModelOpt's {self.qformat} directories: {remedy}"]
