"""What every format of checkpoints offers: it tells its own, reads one as Contents, and writes a Model."""

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.tensors import Lazy
from nemo_minitron.checkpoints.tokenizer import Tokenizer
from nemo_minitron.config import OUTPUT_FORMATS

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000
#: Engines that run a model: each with its own names of tensors.
MEGATRON, TRANSFORMERS = "megatron", "transformers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """How stored weights are quantised.

    Attributes:
        algorithm: its name where it comes from (ModelOpt's ``W4A16_AWQ``).
        group_size: columns that share a scale, where the algorithm has groups.
        kv_cache: format of the KV cache that the server is to use, or None.
        producer: who made it (``modelopt 0.43.0``).
    """

    algorithm: str
    group_size: int | None = None
    kv_cache: str | None = None
    producer: str = "modelopt"

    def describe(self) -> str:
        """One line for people."""
        groups = f", groups of {self.group_size}" if self.group_size else ""
        cache = f", KV cache {self.kv_cache}" if self.kv_cache else ""
        return f"{self.algorithm}{groups}{cache}, by {self.producer}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What every format holds, in words of none.

    Attributes:
        architecture: family and sizes.
        tensors: canonical name -> tensor that is read when asked for, in the order of a forward pass.
        tokenizer_files: the tokenizer, or None.
        generation: settings of generation (`eos_token_id`...), where they are known.
    """

    architecture: Architecture
    tensors: Mapping[str, Lazy]
    tokenizer_files: Tokenizer | None
    generation: Mapping[str, Any]

    @property
    def dtype(self) -> str:
        """Dtype of the first tensor, the embedding (``bfloat16``)."""
        return next(iter(self.tensors.values())).dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents(Model):
    """What a format reads of a checkpoint: the model, and how it lies on disk.

    Attributes:
        size: bytes of its files.
        layout: how the weights lie (``torch_dist``, ``zarr``, ``ckpt``, ``safetensors``).
        quantization: how the stored weights are quantised, or None; `tensors` are then what they stand for.
        stored_precisions: dtype -> tensors as they lie on disk, where that is another than of `tensors`.
        remarks: what a user may stumble over in how it is stored.
        keep: what has to live as long as the tensors, such as a temporary folder.
    """

    size: int
    layout: str
    quantization: Quantization | None = None
    stored_precisions: Mapping[str, int] | None = None
    remarks: tuple[str, ...] = ()
    keep: object = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How a checkpoint is written, beyond its format; each format takes what concerns it.

    Attributes:
        weights: backend of the weights inside an archive: ``torch_dist`` or ``zarr``.
        shard_bytes: size of a file of weights, where there are several.
        gguf_type: type of a GGUF's matrices (``F16``, ``Q8_0``...); None: as they are.
    """

    weights: str = "torch_dist"
    shard_bytes: int = SHARD_BYTES
    gguf_type: str | None = None


DEFAULTS = WriteOptions()


class Format(abc.ABC):
    """A format of checkpoints.

    Attributes:
        name: as settings call it, in config's table of formats too.
        title: what people call it.
        folder_mark: what tells a folder of it, for messages; empty where none is one.
        file_mark: the same for a file.
        engine: whose side it is on: the engine that runs a model of it to check a conversion.
        keeps_precision: whether tensors come back in the precision that they were written in; where not, it is their
            numbers that stay.
        quantized_remark: what is to be known of a checkpoint of it whose weights are quantised.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    folder_mark: ClassVar[str] = ""
    file_mark: ClassVar[str] = ""
    engine: ClassVar[str] = MEGATRON
    keeps_precision: ClassVar[bool] = True
    quantized_remark: ClassVar[str] = (
        "for a server; convert and evaluate read them as the numbers that they stand for, without the rounding of "
        "activations that the server adds"
    )

    @property
    def suffix(self) -> str:
        """How the name of a file of it ends; empty where its checkpoints are folders."""
        return OUTPUT_FORMATS[self.name].suffix

    def place_in(self, partial: Path, output: str | Path) -> Path:
        """Where a stage writes the checkpoint `output` inside its partial folder."""
        return partial / Path(output).name if self.suffix else partial

    @abc.abstractmethod
    def detect(self, path: Path) -> bool:
        """Whether what lies at `path` is of this format, by names and first bytes; the table asks in its order."""

    def first_of(self, path: Path) -> Path:
        """The file that stands for the checkpoint which the file `path` belongs to, where one may be in several."""
        return path

    @abc.abstractmethod
    def read(self, path: Path) -> Contents:
        """Reads descriptions and headers; weights are read when they are asked for.

        Raises:
            CheckpointError: a description is incomplete or unknown here, or weights are missing, damaged or of
                another model.
        """

    def check(self, architecture: Architecture, dtype: str) -> None:
        """Raises CheckpointError where it is known before any work that the format cannot express a model."""
        del architecture, dtype

    def notes(self, architecture: Architecture, options: WriteOptions) -> list[str]:
        """What a user may want to know of a model before it is written."""
        del architecture, options
        return []

    def kept(
        self, tensors: Mapping[str, Lazy], architecture: Architecture, options: WriteOptions
    ) -> Mapping[str, Lazy]:
        """Tensors as they are once the format holds them: rounded, where it is to hold them in less."""
        del architecture, options
        return tensors

    @abc.abstractmethod
    def write(self, path: Path, model: Model, options: WriteOptions) -> None:
        """Writes a checkpoint, one tensor at a time.

        Args:
            path: a folder, which may exist, or the file itself where the format has a suffix.
            model: its tensors are those of its architecture, in the order of a forward pass.

        Raises:
            CheckpointError: the format cannot express the model, or its tokenizer does not go with it.
        """

    def mapped(self, path: Path, architecture: Architecture) -> "dict[str, torch.Tensor] | None":
        """The tensors of a plain checkpoint by transformers' names, as views of its files; None where its files do
        not hold them so."""
        del path, architecture
        return None


class MegatronFormat(Format):
    """A format whose weights are a distributed checkpoint that Megatron itself saves and loads.

    Attributes:
        weights: the folder of that inside the checkpoint.
        prefix: what Megatron's names have before them there.
    """

    weights: ClassVar[str]
    prefix: ClassVar[str]

    @abc.abstractmethod
    def write_description(self, path: Path, model: Model) -> None:
        """Writes all but the weights: what they are the weights of, tokenizer, settings of generation."""
