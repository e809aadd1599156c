"""Where NeMo is not installed, as in NVIDIA's containers from 26.04 on: what works, and what says what to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_minitron.artifacts import DepthScan, ImportanceScores
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.pruning.importance.scan import scan
from nemo_minitron.pruning.importance.scoring import score


@pytest.fixture(scope="module")
def commands(tiny, tmp_path_factory):
    """Name -> folder or archive that a command made, and what it said; all of them in one process without NeMo."""
    folder = tmp_path_factory.mktemp("without-nemo")
    teacher, data = f"model.restore_from_path={tiny.teacher}", f"model.data.data_prefix={tiny.data}"
    sizes = ["prune.hidden_size_divisor=32", "prune.ffn_hidden_size_divisor=64", "prune.num_layers_divisor=1"]
    samples = ["prune.num_samples=16", "prune.num_block_samples=16", "inference.batch_size=8"]
    pruning = ["prune", teacher, data, "model.data.seq_length=64", f"prune.scores_path={folder}/scores"]
    pruning += [*sizes, *samples, "hardware=cpu"]
    text = folder / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    asked = {
        "width": [*pruning, "prune.hidden_size=96", "prune.ffn_hidden_size=128", f"export.save_path={folder}/width"],
        "depth": [*pruning, "prune.num_layers=2", "prune.depth_by=block_loss", f"export.save_path={folder}/depth.nemo"],
        "teach": ["teach", teacher, data, "teach.tokens=128", f"model.nemo_path={folder}/teach"]
        + [
            "model.data.seq_length=64",
            "model.global_batch_size=4",
            "trainer.limit_val_batches=1",
            "trainer.accelerator=cpu",
        ],
        "hf": ["convert", f"{folder}/width", f"{folder}/hf", "--to", "hf"],
        "nemo2": ["convert", f"{folder}/depth.nemo", f"{folder}/nemo2"],
        "inspect": ["inspect", f"{folder}/depth.nemo"],
        "plan": ["plan", str(tiny.teacher), "hardware=cpu"],
        "evaluate": ["evaluate", f"{folder}/width", "tasks=perplexity", f"corpus={tiny.data}", "limit=2", "--json"],
        "generate": ["generate", f"{folder}/nemo2", "The town of", "max_new_tokens=4", "--json"],
        "quantize": ["quantize", f"{folder}/depth.nemo", "qformat=fp8", f"output={folder}/quantize"]
        + [f"data.source={text}", "num_samples=2", "seq_length=32"],
        "flow": ["flow"],
        "finetune": ["finetune", teacher, data, f"model.nemo_path={folder}/finetune"],
        "distill": ["distill", teacher, f"model.kd_teacher_restore_from_path={tiny.teacher}", data]
        + [f"model.nemo_path={folder}/distill"],
        "launch": ["finetune", teacher, data, f"model.nemo_path={folder}/finetune", "--launch", "torchrun"],
        "dry run": ["flow", "--dry-run"],
    }
    (folder / "commands.json").write_text(json.dumps(list(asked.values())))
    script = [sys.executable, str(Path(__file__).with_name("without_nemo.py")), str(folder / "commands.json")]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, dict(zip(asked, map(json.loads, done.stdout.splitlines()), strict=True))


def test_what_trains_nothing_works(commands):
    folder, said = commands
    works = [name for name in said if name not in ("flow", "finetune", "distill", "launch")]
    assert {name: said[name]["err"] for name in works if said[name]["code"]} == {}
    assert "verified: logits" in said["hf"]["out"] and "verified: logits" in said["nemo2"]["out"]
    assert json.loads(said["generate"]["out"])["new_tokens"] == 4
    (measured,) = json.loads(said["evaluate"]["out"])["results"].values()
    assert 0 < measured["perplexity"]["token_loss"]["value"] < 10
    cut = open_checkpoint(folder / "width").architecture
    assert (cut.hidden_size, cut.ffn_hidden_size) == (96, 128)
    assert open_checkpoint(folder / "depth.nemo").architecture.num_layers == 2
    assert open_checkpoint(folder / "quantize", quantized=True).quantization


@pytest.mark.parametrize("name", ["flow", "finetune", "distill"])
def test_training_says_what_to_do(commands, name):
    folder, said = commands
    assert said[name]["code"] == 1 and said[name]["out"] == ""
    assert said[name]["err"].startswith(f"minitron {name} trains with NeMo's LLM collection")
    assert "container up to 26.02" in said[name]["err"]
    assert not list(folder.glob(f"*{name}*"))


def test_launching_says_what_is_missing(commands):
    said = commands[1]["launch"]
    assert said["code"] == 1 and "needs nemo_run: pip install" in said["err"]


def test_scores_and_scan_are_those_with_nemo(tiny, commands, tmp_path):
    folder, _ = commands
    config = tiny.pruning(
        tmp_path / "unused", num_layers=2, depth_by="block_loss", scores_path=str(tmp_path / "scores")
    )
    score(config)
    scan(config)
    one, other = (ImportanceScores.load(place / "scores") for place in (folder, tmp_path))
    for name in ImportanceScores.names():
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert all(torch.equal(one.moments[name], other.moments[name]) for name in other.moments)
    one, other = (DepthScan.load(place / "scores.depth-block-loss-2") for place in (folder, tmp_path))
    assert (one.blocks, one.drop_layers) == (other.blocks, other.drop_layers)
