"""NeMo model connectors: pruning, distillation and checkpoint formats through NeMo's own `import_ckpt`, `export_ckpt`.

::

    import nemo_minitron.integrations.connectors  # registers them
    llm.import_ckpt(model, "minitron-depth:///path/teacher", output_path="student", drop_layers=["16-31"])
    llm.import_ckpt(model, "minitron-width:///path/teacher", output_path="student", hidden_size=3072, data="data")
    llm.import_ckpt(model, "minitron-distill:///path/student", output_path="kd", teacher="/path/teacher", data="data")

    llm.import_ckpt(model, "minitron-search:///path/teacher", output_path="search", parameters="60%", data="data")

    llm.import_ckpt(model, "nemo1:///path/llama3_1_8b.nemo", output_path="llama")  # a NeMo-1 archive
    llm.import_ckpt(model, "hf:///path/Llama-3.1-8B", output_path="llama")         # also without Transformer Engine
    llm.export_ckpt("student", "hf", output_path="student-hf")                     # pruned shapes as well
    llm.export_ckpt("student", "nemo1", output_path="student.nemo")

Without NeMo's LLM collection importing this registers nothing; the functions below work as they are.

The source's path is the checkpoint to start from; the keywords are those of the functions below. `model` only names
the family. The checkpoint's own sizes count.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nemo_minitron import config as c
from nemo_minitron.checkpoints.formats.nemo2.classes import CLASSES
from nemo_minitron.errors import ConfigError
from nemo_minitron.packages.versions import has_nemo

Settings = TypeVar("Settings", bound=c.Config)


def depth(source: Path, output: Path, **arguments: Any) -> None:
    """Drops layers.

    Args:
        source: the teacher's checkpoint.
        output: the student's checkpoint.
        arguments: ``drop_layers`` (1-based, ranges accepted), or ``num_layers`` and ``data`` to have them chosen;
            further fields of PruneTargets, TrainerConfig and ModelDataConfig by their names.
    """
    _prune(source, output, arguments, required=("drop_layers", "num_layers"))


def width(source: Path, output: Path, **arguments: Any) -> None:
    """Prunes sizes by importance.

    Args:
        source: the teacher's checkpoint.
        output: the student's checkpoint.
        arguments: ``data`` (the folder that `minitron data` made) and any of ``hidden_size``, ``ffn_hidden_size``,
            ``num_attention_heads``; further fields of PruneTargets, TrainerConfig and ModelDataConfig by their names.
    """
    _prune(source, output, arguments, required=("hidden_size", "ffn_hidden_size", "num_attention_heads"))


def distill(source: Path, output: Path, **arguments: Any) -> None:
    """Distils.

    Args:
        source: the student's checkpoint.
        output: the distilled checkpoint.
        arguments: ``teacher`` (its checkpoint) and ``data``; further fields of KDConfig, TrainerConfig, ModelConfig,
            OptimConfig and SchedConfig by their names (max_steps, lr, global_batch_size...).
    """
    from nemo_minitron.distillation.command import distill as run

    values = _Arguments(arguments)
    model = values.model(
        restore_from_path=str(source), kd_teacher_restore_from_path=values.take("teacher"), nemo_path=str(output)
    )
    config = c.DistillConfig(
        seed=values.take("seed", 1234), trainer=values.build(c.TrainerConfig), model=model, kd=values.build(c.KDConfig)
    )
    values.finish("minitron-distill")
    run(c.validated(config, "minitron-distill"))


def search(source: Path, output: Path, **arguments: Any) -> Path:
    """Finds the best student of a budget.

    Args:
        source: the teacher's checkpoint.
        output: the folder with search.json and the finalists.
        arguments: ``data`` and a budget (``parameters="60%"``, ``memory="6GB"``, ``flops``, ``decode="1.8x"``...);
            further fields of SearchSettings, SearchCutConfig, KDConfig, TrainerConfig, ModelConfig, OptimConfig and
            SchedConfig by their names (candidates, steps, num_samples, lr, global_batch_size...).

    Returns:
        the winner's checkpoint, in `output`.
    """
    from nemo_minitron.search.command import search as run
    from nemo_minitron.search.distilling import STUDENT

    values = _Arguments(arguments)
    config = c.SearchConfig(
        output=str(output),
        seed=values.take("seed", 1234),
        search=values.build(c.SearchSettings),
        prune=values.build(c.SearchCutConfig),
        kd=values.build(c.KDConfig),
        trainer=values.build(c.TrainerConfig),
        model=values.model(restore_from_path=str(source)),
    )
    values.finish("minitron-search")
    run(c.validated(config, "minitron-search"))
    return output / STUDENT


def _prune(source: Path, output: Path, arguments: dict[str, Any], required: tuple[str, ...]) -> None:
    from nemo_minitron.pruning.command import prune

    if not any(arguments.get(name) is not None for name in required):
        raise ConfigError(
            f"give one of {', '.join(required)}", "minitron-depth" if "num_layers" in required else "minitron-width"
        )
    values = _Arguments(arguments)
    config = c.PruneConfig(
        seed=values.take("seed", 1234),
        prune=values.build(c.PruneTargets),
        inference=values.build(c.InferenceConfig),
        trainer=values.build(c.TrainerConfig),
        model=values.build(
            c.PruneModelConfig,
            restore_from_path=str(source),
            data=values.build(c.ModelDataConfig, data_prefix=values.take("data")),
        ),
        export=c.ExportConfig(save_path=str(output)),
    )
    values.finish("minitron pruning")
    prune(c.validated(config, "minitron pruning"))


class _Arguments:
    """Keywords of an import, handed out to the configuration classes that have a field of that name."""

    def __init__(self, arguments: dict[str, Any]):
        self.left = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}

    def take(self, name: str, default: Any = None) -> Any:
        return self.left.pop(name, default)

    def build(self, kind: "type[Settings]", **fixed: Any) -> "Settings":
        """An object of `kind`, of the fields that are given and are left."""
        names = [
            field.name for field in dataclasses.fields(kind) if field.name in self.left and field.name not in fixed
        ]
        return kind(**fixed, **{name: self.left.pop(name) for name in names})

    def model(self, **fields: Any) -> c.ModelConfig:
        """The model, data and optimizer of a training stage."""
        return self.build(
            c.ModelConfig,
            **fields,
            data=self.build(c.ModelDataConfig, data_prefix=self.take("data")),
            optim=self.build(c.OptimConfig, sched=self.build(c.SchedConfig)),
        )

    def finish(self, what: str) -> None:
        if self.left:
            raise ConfigError(f"unknown keyword(s) {', '.join(sorted(self.left))}", what)


#: Name -> what makes the checkpoint; it returns its path where that is not the output's own.
CONNECTORS: dict[str, Callable[..., Path | None]] = {
    "minitron-depth": depth,
    "minitron-width": width,
    "minitron-distill": distill,
    "minitron-search": search,
}


def import_checkpoint(source: Path, output: Path, **arguments: Any) -> None:
    """Converts a checkpoint of any format to NeMo 2.

    Args:
        source: a path, or the name of a repository on the Hugging Face hub.
        output: the NeMo-2 checkpoint.
        arguments: fields of ConvertConfig by their names (verify, tokenizer, dtype...).
    """
    _convert(source, output, "nemo2", arguments)


def export_nemo1(source: Path, output: Path, **arguments: Any) -> None:
    """Converts a checkpoint to a NeMo-1 archive; the output's name must end in .nemo."""
    _convert(source, output, "nemo1", arguments)


def export_hf(source: Path, output: Path, **arguments: Any) -> None:
    """Converts a checkpoint to a Hugging Face directory."""
    _convert(source, output, "hf", arguments)


def _convert(source: Path, output: Path, to: str, arguments: dict[str, Any]) -> None:
    from nemo_minitron.conversion.convert import convert

    values = _Arguments(arguments)
    fields = {"source": str(_local(source)), "output": str(output), "to": to}
    config = values.build(c.ConvertConfig, **fields)
    values.finish(f"conversion to {to}")
    convert(c.validated(config, f"conversion to {to}"))


def _local(source: Path) -> Path:
    """The checkpoint on disk: itself, or the hub's in its cache."""
    if source.exists() or source.is_absolute():
        return source
    from nemo_minitron.conversion.sources.hub import cached

    return cached(str(source))


def register() -> None:
    """Registers the connectors for every dense GPT family of NeMo; imports NeMo's LLM collection.

    NeMo's own `hf` connectors stay in charge of what they can do: with Transformer Engine, and shapes in which the head
    size is the hidden size over the heads. Everything else goes to the conversion here.
    """
    from nemo.collections import llm
    from nemo.lightning import io

    for model_class, _ in CLASSES.values():
        model = getattr(llm, model_class)
        for name, function in CONNECTORS.items():
            model.register_importer(name)(_connector(io.ModelConnector, name, function))
        model.register_importer("nemo1")(_connector(io.ModelConnector, "nemo1", import_checkpoint))
        model.register_exporter("nemo1")(_connector(io.ModelConnector, "nemo1", export_nemo1))
        importer, exporter = (
            known.get(f"{model}hf", io.ModelConnector) for known in (model._IMPORTERS, model._EXPORTERS)
        )
        model.register_importer("hf")(_connector(importer, "hf", import_checkpoint))
        model.register_exporter("hf")(_connector(exporter, "hf", export_hf))


def nemo_can(source: Path) -> bool:
    """Whether NeMo's own hf connectors take this checkpoint: they need Transformer Engine and unpruned heads."""
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint
    from nemo_minitron.megatron.layout import TRANSFORMER_ENGINE
    from nemo_minitron.packages.versions import has_module

    if not has_module(TRANSFORMER_ENGINE):
        return False
    if not source.exists():
        return True
    a = open_checkpoint(source).architecture
    return a.num_attention_heads * a.kv_channels == a.hidden_size


def _connector(base: type, name: str, function: Callable[..., Path | None]) -> type:
    class MinitronConnector(base):
        """Importer or exporter that calls a function of nemo_minitron, or NeMo's own where that is in charge."""

        @property
        def source(self) -> Path:
            return Path(str(self))

        @property
        def nemo_in_charge(self) -> bool:
            return hasattr(base, "convert_state") and nemo_can(self.source)

        def init(self, *args: Any, **kwargs: Any) -> Any:
            if self.nemo_in_charge:
                return super().init(*args, **kwargs)
            from nemo_minitron.checkpoints.checkpoint import open_checkpoint
            from nemo_minitron.checkpoints.formats.nemo2.engine import nemo_model

            return nemo_model(open_checkpoint(_local(self.source)).architecture)

        def apply(self, output_path: Path, **arguments: Any) -> Path:
            if self.nemo_in_charge and not arguments:
                return super().apply(output_path)
            return function(self.source, Path(output_path), **arguments) or output_path

        def nemo_load(self, *args: Any, **kwargs: Any) -> Any:
            """llm.export_ckpt loads the model to see whether ModelOpt quantised it; RuntimeError sends it to apply."""
            if not self.nemo_in_charge:
                raise RuntimeError("converted tensor by tensor; the model is not loaded")
            return super().nemo_load(*args, **kwargs)

        def on_import_ckpt(self, model: Any) -> None:
            """The checkpoint is complete; only NeMo's own importers have something left to set up."""
            if self.nemo_in_charge:
                super().on_import_ckpt(model)

    MinitronConnector.__name__ = MinitronConnector.__qualname__ = "".join(
        part.title() for part in f"minitron-{name.removeprefix('minitron-')}".split("-")
    )
    return MinitronConnector


if has_nemo():
    register()
