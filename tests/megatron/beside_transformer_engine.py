"""Runs in a process of its own, with the stand-in for Transformer Engine on its path: what a container does.

Runs stages of this package, on one rank or several; and on one, if asked, what plain NeMo does with files of its own
and with files written without Transformer Engine. Says what it found.
"""

import json
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.launch.ranks import from_dict
from nemo_minitron.megatron.forward import load_model, parallel_ranks
from nemo_minitron.megatron.session import engine
from nemo_trainer import CPU, restore, train_and_save, weights_of


def stages(wanted: dict[str, list[Any]]) -> dict[str, Any]:
    """Runs each (function, configuration class, configuration); their metrics."""
    return {
        name: resolve_name(function)(from_dict(resolve_name(kind), values)).metrics
        for name, (function, kind, values) in wanted.items()
    }


def layers_of(model: torch.nn.Module) -> list[str]:
    """The kinds of layers that are of the stand-in."""
    kinds = {type(module) for module in model.modules()}
    return sorted(
        kind.__name__ for kind in kinds if any("transformer_engine" in one.__module__ for one in kind.__mro__)
    )


def plain_nemo(
    folder: Path, fields: dict[str, Any], teacher: str, paths: list[str], others: list[str], zarr: Path
) -> dict[str, Any]:
    """Trains and saves; restores each of `paths`; loads them and `others` by their contexts, and an archive's weights
    in zarr."""
    architecture = open_checkpoint(teacher).architecture
    with engine(3, folder / "log"):
        model = train_and_save(fields, architecture, folder / "run", folder / "by-nemo")
        torch.save(weights_of(model), folder / "by-nemo.pt")
        results: dict[str, Any] = {"layers": layers_of(model)}
        for number, path in enumerate(paths):
            restored = restore(fields, architecture, folder / f"run-{number}", Path(path), None)
            torch.save(weights_of(restored), folder / f"restored-{number}.pt")
    with engine(3, folder / "log"), parallel_ranks(CPU, 3):
        results["by context"] = [
            by_context(Path(path), folder / f"logits-{n}.pt") for n, path in enumerate(paths + others)
        ]
        model = load_model(architecture, CPU, None)
        results["zarr"] = megatron_loads(model.sharded_state_dict(prefix="model."), zarr)
        results["local layers"] = layers_of(load_model(architecture, CPU, open_checkpoint(teacher), local_spec=True))
    return results


def by_context(path: Path, logits: Path) -> dict[str, Any]:
    """Builds a model from its context alone and loads it; which keys only the file has, and which only the model."""
    from nemo.lightning.io import load_context

    context = load_context(path / "context", subpath="model")
    context.config.use_cpu_initialization = True
    model = context.config.configure_model(context.tokenizer).eval()
    shards = {"state_dict": model.sharded_state_dict(prefix="module.")}
    loaded, left_over, missing = megatron_loads(shards, path / "weights", strict="return_all")
    state = {name.removeprefix("module."): value for name, value in loaded["state_dict"].items()}
    model.load_state_dict(state, strict=True)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        torch.save(model(input_ids=tokens, position_ids=tokens, attention_mask=None), logits)
    return {"left over": sorted(left_over), "missing": sorted(missing), "layers": layers_of(model)}


def megatron_loads(shards: dict[str, Any], weights: Path, **settings: Any) -> Any:
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load(shards, str(weights), **settings)


def main(settings: dict[str, Any]) -> dict[str, Any]:
    results = stages(settings["stages"])
    if "plain" in settings:
        plain = settings["plain"]
        config = from_dict(resolve_name("nemo_minitron.config:FinetuneConfig"), plain["fields"])
        fields = {name: getattr(config, name) for name in ("trainer", "model")}
        folder, zarr = Path(plain["folder"]), Path(plain["zarr"])
        loaded = plain_nemo(folder, fields, config.model.restore_from_path, plain["paths"], plain["others"], zarr)
        results |= loaded | {"zarr": sorted(loaded["zarr"])}
    return results


if __name__ == "__main__":
    given = Path(sys.argv[1])
    results = json.dumps(main(json.loads(given.read_text())))
    given.with_suffix(".found").write_text(results)
