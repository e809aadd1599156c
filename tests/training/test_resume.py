"""Runs that are killed, or asked to stop, at any moment: the next one ends in the same bits as one left alone."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GRID

from hf import read_weights
from nemo_minitron import config as c
from nemo_minitron.artifacts import Manifest
from nemo_minitron.cli.main import run as command
from nemo_minitron.distillation.command import distill
from nemo_minitron.errors import NonFiniteLossError, PreemptedError
from nemo_minitron.launch.preemption import STOP_FILE
from nemo_minitron.megatron import weights
from nemo_minitron.pruning.command import prune
from nemo_minitron.training import history

STEPS, KILLS = 4, 3


@pytest.fixture(scope="module")
def student(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("students") / "student"
    prune(tiny.pruning(path, drop_layers=[2, 3]))
    return path


def distillation(tiny, student, output, steps=STEPS, **fields) -> c.DistillConfig:
    training = tiny.training(
        output, steps, restore_from_path=str(student), kd_teacher_restore_from_path=str(tiny.teacher)
    )
    return c.DistillConfig(**training, **fields)


def finetuning(tiny, student, output) -> c.FinetuneConfig:
    return c.FinetuneConfig(**tiny.training(output, STEPS, restore_from_path=str(student)))


def instructing(tiny, student, output) -> c.FinetuneConfig:
    """LoRA with dropout on rows of instructions; the file lies beside the output."""
    rows = output.parent / "rows.jsonl"
    pairs = [{"input": f"Where is {n}?", "output": f"{n} lies on river {n % 3}."} for n in range(30)]
    rows.write_text("\n".join(map(json.dumps, pairs)))
    training = tiny.training(output, STEPS, restore_from_path=str(student))
    training["model"].data = c.ModelDataConfig(instructions=str(rows), seq_length=64, num_workers=0)
    return c.FinetuneConfig(**training, peft=c.PeftConfig(scheme="lora", dim=4, alpha=8, dropout=0.2))


def searching(tiny, student, output) -> c.SearchConfig:
    """Of the pruned student: cuts measured, then one round of two candidates."""
    training = tiny.training(output, STEPS, restore_from_path=str(student))
    training["model"].nemo_path = None
    narrow = {"num_attention_heads": 4, "ffn_hidden_size": [64, 128], "tolerance": 0.3}
    searched = c.SearchSettings(parameters="70%", candidates=2, steps=1, samples=8, speed_rounds=0, **narrow)
    cut = c.SearchCutConfig(num_samples=16, num_block_samples=8, **GRID)
    return c.SearchConfig(output=str(output), search=searched, prune=cut, **training)


def same(one, other) -> bool:
    first, second = read_weights(one), read_weights(other)
    return first.keys() == second.keys() and all(torch.equal(second[name], value) for name, value in first.items())


STAGES = {
    "distill": (distillation, "nemo_minitron.distillation.command:distill", "nemo_minitron.config:DistillConfig"),
    "finetune": (finetuning, "nemo_minitron.training.finetune:finetune", "nemo_minitron.config:FinetuneConfig"),
    "search": (searching, "nemo_minitron.search.command:search", "nemo_minitron.config:SearchConfig"),
    "instruct": (instructing, "nemo_minitron.training.finetune:finetune", "nemo_minitron.config:FinetuneConfig"),
}


@pytest.fixture(scope="module")
def killed(tiny, student, tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """Stage -> its folder, and what `killing.py` said of it; one process imports the engines for all of them."""
    jobs = {}
    for name, (make, stage, kind) in STAGES.items():
        folder = tmp_path_factory.mktemp(name)
        config = dataclasses.asdict(make(tiny, student, folder / "alone"))
        jobs[name] = {"stage": stage, "config_class": kind, "config": config, "folder": str(folder), "kills": KILLS,
                      "seed": 0 if name == "distill" else 1}  # fmt: skip
    folder = tmp_path_factory.mktemp("killing")
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), str(folder / "jobs.json")]
    with (folder / "said").open("w") as said:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=said, text=True)
    assert done.returncode == 0, (folder / "said").read_text()[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {name: (Path(job["folder"]), line) for (name, job), line in zip(jobs.items(), lines, strict=True)}


@pytest.mark.parametrize("name", STAGES)
def test_a_run_killed_at_any_moment_ends_in_the_same_bits(killed, name):
    folder, run = killed[name]
    assert run["events"] > 30 and run["killed"] == [True, False] * KILLS
    whole = Manifest.read(folder / "alone").metrics
    for moment in run["moments"]:
        made = "student" if name == "search" else ""
        assert same(folder / "alone" / made, folder / f"killed-{moment}" / made), moment
        assert Manifest.read(folder / f"killed-{moment}").metrics == whole, moment
        assert not (folder / f".killed-{moment}.partial").exists()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_sigterm_saves_and_the_same_command_goes_on(tiny, student, tmp_path, monkeypatch, step):
    """Step 2 ends in a validation, the others do not."""
    whole = distill(distillation(tiny, student, tmp_path / "whole"))
    begin = history.History.on_train_batch_start

    def asked(self, trainer, *arguments):
        if trainer.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        begin(self, trainer, *arguments)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(history.History, "on_train_batch_start", asked)
        with pytest.raises(PreemptedError, match=f"after step {step} of {STEPS}") as caught:
            distill(distillation(tiny, student, tmp_path / "asked"))
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "asked").exists()
    resumed = distill(distillation(tiny, student, tmp_path / "asked"))
    assert same(tmp_path / "whole", tmp_path / "asked")
    assert resumed.metrics == whole.metrics


@pytest.mark.usefixtures("forked_ranks")
def test_two_ranks_stop_together_when_their_parent_is_asked(tiny, student, tmp_path, monkeypatch):
    stop = tmp_path / "stop"
    stop.touch()
    config = distillation(tiny, student, tmp_path / "asked")
    config.trainer.devices = 2
    original = subprocess.run

    def with_stop_file(*arguments, env, **options):
        return original(*arguments, env={**env, STOP_FILE: str(stop)}, **options)

    monkeypatch.setattr("nemo_minitron.launch.ranks.subprocess.run", with_stop_file)
    with pytest.raises(PreemptedError, match="after step 1 of"):
        distill(config)
    assert (tmp_path / ".asked.partial" / "checkpoints" / "step-1").is_dir() and not (tmp_path / "asked").exists()


def test_the_command_ends_with_the_documented_code(tiny, student, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nemo_minitron.distillation.command.distill", lambda config: (_ for _ in ()).throw(
        PreemptedError("stopped by SIGTERM after step 1 of 2")))  # fmt: skip
    settings = [f"model.restore_from_path={student}", f"model.kd_teacher_restore_from_path={tiny.teacher}"]
    settings += [f"model.data.data_prefix={tiny.data}", f"model.nemo_path={tmp_path / 'out'}"]
    assert command("distill", settings) == 75
    assert "SIGTERM" in capsys.readouterr().err


def test_the_best_validation_becomes_the_result(tiny, student, tmp_path, monkeypatch):
    """A learning rate that spoils the student: the first validation is the best one."""
    reloaded = []
    reload = weights.reload

    def spy(model, folder):
        reload(model, folder)
        reloaded.append((folder.name, {name: value.clone() for name, value in model.named_parameters()}))

    monkeypatch.setattr(weights, "reload", spy)
    spoiling = distillation(tiny, student, tmp_path / "best", steps=6)
    spoiling.model.optim.lr, spoiling.trainer.val_check_interval = 1.0, 1
    manifest = distill(spoiling)
    losses = {entry["step"]: entry["kd_loss"] for entry in manifest.metrics["validation"]}
    best = min(losses, key=losses.get)
    assert best < 6 and manifest.metrics["result_step"] == best
    [(name, kept)] = reloaded
    assert name == f"step-{best}"
    stored = read_weights(tmp_path / "best")
    assert torch.equal(stored["module.embedding.word_embeddings.weight"], kept["embedding.word_embeddings.weight"])
    assert torch.equal(stored["module.decoder.final_layernorm.weight"], kept["decoder.final_layernorm.weight"])
    spoiling.monitor, spoiling.model.nemo_path = "last", str(tmp_path / "last")
    assert distill(spoiling).metrics["result_step"] == 6
    assert not same(tmp_path / "best", tmp_path / "last")


def test_a_loss_that_is_not_finite_names_step_batch_and_the_last_good_checkpoint(tiny, student, tmp_path, monkeypatch):
    """The third batch has a poisoned token weight."""
    from nemo_minitron.training import losses

    make, seen = losses.token_loss_reduction, []

    def poisoned(names, weights, per_token, sink):
        def spoil(batch, output):
            given = per_token(batch, output)
            if torch.is_grad_enabled():
                seen.append(1)
                if len(seen) > 2 * 2:  # two micro batches a step
                    shown = {name: value * float("nan") for name, value in given.shown.items()}
                    given = losses.Losses(given.total * float("nan"), shown)
            return given

        return make(names, weights, spoil, sink)

    monkeypatch.setattr("nemo_minitron.training.losses.token_loss_reduction", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"kd_loss is nan at step 3 \(batch 2\); .*step-2"):
        distill(distillation(tiny, student, tmp_path / "kd"))
    assert not (tmp_path / "kd").exists()
    assert (tmp_path / ".kd.partial" / "checkpoints" / "step-2").is_dir()
