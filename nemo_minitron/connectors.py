"""NeMo model connectors: pruning and distillation as importers of NeMo's own `llm.import_ckpt`.

::

    import nemo_minitron.connectors  # registers them
    llm.import_ckpt(model, "minitron-depth:///path/teacher", output_path="student", drop_layers=["16-31"])
    llm.import_ckpt(model, "minitron-width:///path/teacher", output_path="student", hidden_size=3072, data="data")
    llm.import_ckpt(model, "minitron-distill:///path/student", output_path="kd", teacher="/path/teacher", data="data")

The source's path is the checkpoint to start from; the keywords are those of the functions below. `model` only names
the family. The checkpoint's own sizes count.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_minitron import config as c
from nemo_minitron.errors import ConfigError

FAMILIES = ("GPTModel", "LlamaModel", "MistralModel", "NemotronModel", "Qwen2Model")


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
    from nemo_minitron.distillation.stage import distill as run

    values = _Arguments(arguments)
    model = values.build(
        c.ModelConfig,
        restore_from_path=str(source),
        kd_teacher_restore_from_path=values.take("teacher"),
        nemo_path=str(output),
        data=values.build(c.ModelDataConfig, data_prefix=values.take("data")),
        optim=values.build(c.OptimConfig, sched=values.build(c.SchedConfig)),
    )
    config = c.DistillConfig(
        seed=values.take("seed", 1234), trainer=values.build(c.TrainerConfig), model=model, kd=values.build(c.KDConfig)
    )
    values.finish("minitron-distill")
    run(c.validated(config, "minitron-distill"))


def _prune(source: Path, output: Path, arguments: dict[str, Any], required: tuple[str, ...]) -> None:
    from nemo_minitron.flow import prune

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

    def build(self, kind: type, **fixed: Any) -> Any:
        names = [
            field.name for field in dataclasses.fields(kind) if field.name in self.left and field.name not in fixed
        ]
        return kind(**fixed, **{name: self.left.pop(name) for name in names})

    def finish(self, what: str) -> None:
        if self.left:
            raise ConfigError(f"unknown keyword(s) {', '.join(sorted(self.left))}", what)


CONNECTORS: dict[str, Callable[..., None]] = {
    "minitron-depth": depth,
    "minitron-width": width,
    "minitron-distill": distill,
}


def register() -> None:
    """Registers the importers for every dense GPT family of NeMo; imports NeMo."""
    from nemo.collections import llm
    from nemo.lightning import io

    for name, function in CONNECTORS.items():
        connector = _connector(io.ModelConnector, name, function)
        for family in FAMILIES:
            getattr(llm, family).register_importer(name)(connector)


def _connector(base: type, name: str, function: Callable[..., None]) -> type:
    class MinitronConnector(base):
        """Importer that calls a stage of nemo_minitron."""

        def init(self) -> Any:
            from nemo_minitron.checkpoints import open_checkpoint
            from nemo_minitron.checkpoints.nemo2 import nemo_model

            return nemo_model(open_checkpoint(Path(self)).architecture)

        def apply(self, output_path: Path, **arguments: Any) -> Path:
            function(Path(str(self)), Path(output_path), **arguments)
            return output_path

        def on_import_ckpt(self, model: Any) -> None:
            """The checkpoint is complete; nothing is left to set up."""

    MinitronConnector.__name__ = MinitronConnector.__qualname__ = "".join(part.title() for part in name.split("-"))
    return MinitronConnector


register()
