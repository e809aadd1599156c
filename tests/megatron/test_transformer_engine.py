"""With Transformer Engine, which a container has and this machine has not: its spec, its checkpoints, its layouts.

A stand-in on PyTorch takes its place in processes of their own; NeMo, Megatron and ModelOpt are the real ones.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from hf import llama
from models import build, save
from nemo_minitron import config as c
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.names import extra_states
from nemo_minitron.conversion.convert import convert
from nemo_minitron.errors import EngineError
from nemo_minitron.launch.ranks import free_port
from nemo_minitron.megatron.layout import layout_of, transformer_engine_runs
from nemo_trainer import CPU

TESTS = Path(__file__).parents[1]
STAND_IN = TESTS / "transformer_engine_stand_in"
LAYERS = ["RMSNorm", "TEDotProductAttention", "TELayerNormColumnParallelLinear", "TERowParallelLinear"]
ATTENTION = "decoder.layers.self_attention.core_attention._extra_state"
STEPS = 3
FUNCTIONS = {
    c.FinetuneConfig: "nemo_minitron.training.finetune:finetune",
    c.PruneConfig: "nemo_minitron.pruning.command:prune",
    c.DistillConfig: "nemo_minitron.distillation.command:distill",
    c.LossConfig: "nemo_minitron.evaluation.loss:evaluate_loss",
}
LAYOUTS = {
    "sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "context parallel": {"context_parallel_size": 2},
}


def fields(tiny, output: Path, ranks: int = 1, **model: Any) -> dict[str, Any]:
    """Of a training stage in steps so small that rounding stays rounding."""
    values = tiny.training(output, STEPS, **{"restore_from_path": str(tiny.teacher), **model})
    values["trainer"].devices = ranks
    values["model"].optim = c.OptimConfig(lr=1e-4, sched=c.SchedConfig(warmup_steps=1, min_lr=1e-5))
    return values


def stage(config: Any) -> list[Any]:
    """A stage as the other process takes it."""
    kind = type(config)
    return [FUNCTIONS[kind], f"nemo_minitron.config:{kind.__name__}", dataclasses.asdict(config)]


def student_stages(tiny, name: str, folder: Path, student: Path, ranks: int = 1, **layout: Any) -> dict[str, Any]:
    """Distillation of the cut student, and the loss of what came of it; by `name` and what they are."""
    teacher = {"restore_from_path": str(student), "kd_teacher_restore_from_path": str(tiny.teacher)}
    distilled = c.DistillConfig(**fields(tiny, folder / "distilled", ranks, **teacher, **layout))
    loss = fields(tiny, folder / "loss", ranks, restore_from_path=str(folder / "distilled"), **layout)
    measured = c.LossConfig(**loss, limit_batches=1, splits=["test"])
    return {f"{name}: distilled": stage(distilled), f"{name}: loss": stage(measured)}


def beside_transformer_engine(settings: dict[str, Any], file: Path, ranks: int = 1) -> dict[str, Any]:
    """Runs a process, or one a rank, with the stand-in on its path; what it found."""
    file.write_text(json.dumps(settings))
    command = [sys.executable, str(TESTS / "megatron" / "beside_transformer_engine.py"), str(file)]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
        command[1:1] = torchrun
    path = os.pathsep.join(map(str, (STAND_IN, TESTS, TESTS.parent)))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(file.with_suffix(".found").read_text())


@pytest.fixture(scope="module")
def container(tiny, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """What a process with Transformer Engine wrote and found; and before it, files written without."""
    root = tmp_path_factory.mktemp("container")
    convert(c.ConvertConfig(source=str(tiny.teacher), output=str(root / "t.nemo"), weights="zarr", verify="none"))
    convert(c.ConvertConfig(source=str(root / "t.nemo"), output=str(root / "streamed"), verify="none"))
    with tarfile.open(root / "t.nemo") as archive:
        archive.extractall(root / "unpacked", filter="data")
    save("qwen3", torch.float32, root / "qwen3-hf")
    convert(c.ConvertConfig(source=str(root / "qwen3-hf"), output=str(root / "qwen3"), to="nemo2", verify="none"))
    finetune = c.FinetuneConfig(**fields(tiny, root / "finetuned"))
    prune = tiny.pruning(root / "student", hidden_size=96, ffn_hidden_size=192, drop_layers=[2])
    plain = {
        "folder": str(root),
        "fields": dataclasses.asdict(finetune),
        "paths": [str(tiny.teacher), str(root / "streamed")],
        "others": [str(root / "qwen3")],
        "zarr": str(root / "unpacked" / "model_weights"),
    }
    wanted = {"finetuned": stage(finetune), "student": stage(prune)}
    wanted |= student_stages(tiny, "one rank", root, root / "student")
    return root, beside_transformer_engine({"stages": wanted, "plain": plain}, root / "settings.json")


def assert_same_losses(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part in ("train", "validation"):
        assert len(one[part]) == len(other[part]) == STEPS
        for expected, got in zip(one[part], other[part]):
            assert got == pytest.approx(expected, abs=1e-5), part


def test_its_layers_are_chosen_where_it_runs(container):
    _, results = container
    assert results["layers"] == LAYERS
    assert [loaded["layers"] for loaded in results["by context"]] == [LAYERS] * 3  # by NeMo itself


def test_the_local_spec_has_no_layer_of_its(container):
    """Scoring and checks run on a CPU beside it, too, where its final norm would not."""
    assert container[1]["local layers"] == []


def test_training_and_cutting_beside_it_come_out_as_without(tiny, tmp_path, container):
    from nemo_minitron.pruning.command import prune
    from nemo_minitron.training.finetune import finetune

    root, results = container
    without = finetune(c.FinetuneConfig(**fields(tiny, tmp_path / "finetuned"))).metrics
    assert_same_losses(without, results["finetuned"])
    prune(tiny.pruning(tmp_path / "student", hidden_size=96, ffn_hidden_size=192, drop_layers=[2]))
    here, there = (open_checkpoint(path / "student").tensors for path in (tmp_path, root))
    assert here.keys() == there.keys()
    assert all(torch.equal(value.read(), there[name].read()) for name, value in here.items())


@pytest.mark.parametrize("name", ["finetuned", "distilled", "by-nemo"])
def test_what_was_written_with_it_converts_here_with_the_default_check(container, tmp_path, name):
    """By Megatron's own save of a trained model, and by NeMo's trainer with its optimizer."""
    root, _ = container
    manifest = convert(c.ConvertConfig(source=str(root / name), output=str(tmp_path / "hf")))
    assert manifest.metrics["logits_relative_difference"] < 1e-4
    if name == "by-nemo":
        for key, value in torch.load(root / "by-nemo.pt").items():
            assert torch.equal(open_checkpoint(root / name).tensors[key].read(), value), key


@pytest.mark.parametrize("number", [0, 1], ids=["Megatron's save", "streamed"])
def test_plain_nemo_with_it_loads_what_was_written_without(tiny, container, number):
    """With NeMo's default strictness; by the context alone, where the file lacks nothing that is asked for."""
    root, results = container
    teacher = open_checkpoint(tiny.teacher)
    restored = torch.load(root / f"restored-{number}.pt")
    assert restored.keys() == teacher.tensors.keys()
    assert all(torch.equal(teacher.tensors[name].read(), value) for name, value in restored.items())
    loaded = results["by context"][number]
    assert loaded["missing"] == []
    assert set(loaded["left over"]) <= {f"module.{ATTENTION}"}  # which Megatron core asks for before 0.15
    with torch.no_grad():
        expected = llama(tiny.teacher, teacher.architecture)(torch.arange(24)[None]).logits
    assert torch.allclose(torch.load(root / f"logits-{number}.pt"), expected, rtol=1e-4, atol=1e-4)


def test_norms_of_queries_and_keys_are_loaded_with_their_extra_states(container):
    root, results = container
    loaded = results["by context"][2]
    assert loaded["missing"] == [] and set(loaded["left over"]) <= {f"module.{ATTENTION}"}
    with torch.no_grad():
        expected = build("qwen3", torch.float32)(torch.arange(24)[None]).logits
    assert torch.allclose(torch.load(root / "logits-2.pt"), expected, rtol=1e-4, atol=1e-4)


def test_an_archive_in_zarr_has_the_extra_states_that_it_asks_for(tiny, container):
    states = {name for name in container[1]["zarr"] if name.endswith("_extra_state")}
    layers = open_checkpoint(tiny.teacher).architecture.num_layers
    assert len(states) >= 4 * layers + 1 and "model.decoder.final_layernorm._extra_state" in states


@pytest.mark.parametrize("kind", ["Megatron's save", "streamed", "zarr"])
def test_every_extra_state_that_any_version_asks_for_is_there_and_empty(tiny, tmp_path, container, kind):
    """The attention's, too, which the installed Megatron core does not ask for."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from nemo_minitron.megatron.forward import parallel_ranks
    from nemo_minitron.megatron.session import engine

    root, _ = container
    weights, prefix = {
        "Megatron's save": (tiny.teacher / "weights", "module."),
        "streamed": (root / "streamed" / "weights", "module."),
        "zarr": (root / "unpacked" / "model_weights", "model."),
    }[kind]
    wanted = {}
    for unique in extra_states(open_checkpoint(tiny.teacher).architecture.num_layers):
        key, _, shard = unique.partition("/")
        _, offset, shape = shard.split("_")
        wanted[unique] = ShardedObject(f"{prefix}{key}", "not loaded", (int(shape),), (int(offset),))
    assert sum("core_attention" in unique for unique in wanted) == 4
    with engine(3, tmp_path / "log"), parallel_ranks(CPU, 3):
        loaded = dist_checkpointing.load(wanted, str(weights))
    assert set(loaded) == set(wanted) and set(loaded.values()) == {None}


@pytest.fixture(scope="module")
def two_ranks(tiny, container, tmp_path_factory) -> dict[str, Any]:
    """What two ranks found that ran the stages in each layout, one after the other."""
    folder, student, wanted = tmp_path_factory.mktemp("ranks"), container[0] / "student", {}
    for name, layout in LAYOUTS.items():
        wanted |= student_stages(tiny, name, folder / name.replace(" ", "-"), student, 2, **layout)
    return beside_transformer_engine({"stages": wanted}, folder / "settings.json", ranks=2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_have_the_losses_of_one(container, two_ranks, name):
    """Of distillation, and of the result's evaluation, read back from the file that both ranks wrote."""
    one = container[1]
    assert {"kd_loss", "lm_loss"} <= set(two_ranks[f"{name}: distilled"]["train"][0])
    assert_same_losses(one["one rank: distilled"], two_ranks[f"{name}: distilled"])
    measured, expected = two_ranks[f"{name}: loss"]["test"], one["one rank: loss"]["test"]
    assert measured == pytest.approx(expected, abs=1e-4)


def test_without_it_what_needs_it_is_refused():
    assert not transformer_engine_runs(False)
    for needs in ({"sequence_parallel": True}, {"context_parallel_size": 2}):
        with pytest.raises(EngineError, match="Transformer Engine"):
            layout_of(c.TrainerConfig(accelerator="cpu", devices=2), c.ModelConfig(**needs))
