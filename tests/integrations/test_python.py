"""The Python face: what it offers, what it costs to import, and that it does what the commands do."""

import ast
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
import nemo_minitron
from nemo_minitron import Architecture, compose, convert, open_checkpoint, plan, prune
from nemo_minitron.cli.main import main
from nemo_minitron.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_importing_it_loads_nothing_heavy():
    code = "import sys, nemo_minitron; print({'torch', 'numpy', 'hydra', 'megatron', 'nemo'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_what_it_names_is_there_and_nothing_else():
    assert {*nemo_minitron.__all__} <= {*dir(nemo_minitron)}
    assert all(getattr(nemo_minitron, name) is not None for name in nemo_minitron.__all__)
    with pytest.raises(AttributeError, match="nemo_minitron.*no attribute 'prunes'"):
        nemo_minitron.prunes  # noqa: B018


def test_a_cut_and_a_conversion_are_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models.save("llama3", torch.float32, tmp_path / "teacher")
    settings = ["model.restore_from_path=teacher", "prune.drop_layers=[2]", "prune.num_layers_divisor=1"]
    manifest = prune(compose("prune", [*settings, "export.save_path=student"]))
    assert main(["prune", *settings, "export.save_path=by-command"]) == 0
    assert isinstance(open_checkpoint("student").architecture, Architecture)
    assert manifest.metrics["parameters"] == open_checkpoint("by-command").architecture.parameters()
    convert(compose("convert", ["source=student", "output=hf", "to=hf", "verify=none"]))
    assert open_checkpoint("hf").content == open_checkpoint("by-command").content


def test_a_plan_is_returned_and_not_printed(capsys):
    assert main(["plan", "minitron_4b", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert plan(compose("plan", ["model=minitron_4b", "json=true"])) == printed
    assert capsys.readouterr().out == ""


def test_what_is_wrong_with_a_configuration_is_said_first():
    config = compose("convert", ["source=nowhere", "output=there"])
    config.shard_size_gb = -1
    with pytest.raises(ConfigError, match="shard_size_gb = -1 must be above 0"):
        convert(config)


def test_a_search_is_the_command(tmp_path, monkeypatch, capsys):
    from nemo_minitron.integrations.python import search

    monkeypatch.chdir(tmp_path)
    models.save("llama3", torch.float32, tmp_path / "teacher")
    settings = ["model.restore_from_path=teacher", "search.parameters=90%", "search.tolerance=0.2"]
    assert main(["search", *settings, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert search(compose("search", [*settings, "dry_run=true"])) is None
    assert capsys.readouterr().out == printed and "shapes on the grid" in printed


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_prints_what_it_promises(example, tmp_path, monkeypatch, capsys):
    """Each as it stands, in a folder that has what its first lines say."""
    monkeypatch.chdir(tmp_path)
    models.save("llama3", torch.float32, tmp_path / "teacher")
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    PRINTED[example.stem](printed)


def a_plan(printed: list[str]) -> None:
    sizes = ["student.hidden_size=3072", "student.ffn_hidden_size=9216", "hardware=8x80gb"]
    stages = plan(compose("plan", ["model=llama31_8b", *sizes]))["stages"]
    assert printed == [f"{stage}: {needs['total'] / 1e9:.1f} GB on the fullest rank" for stage, needs in stages.items()]
    assert {*stages} == {"finetune", "prune", "distill"}


def a_cut(printed: list[str]) -> None:
    teacher, student = (open_checkpoint(name).architecture for name in ("teacher", "student-hf"))
    assert student.num_layers == teacher.num_layers - 1
    assert printed[-1] == student.describe()


def a_distillation(printed: list[str]) -> None:
    results = ast.literal_eval(printed[-1])
    assert [model["name"] for model in results["models"]] == ["made", "width", "width-distilled"]
    losses = [results["results"][model["name"]]["perplexity"]["token_loss"]["value"] for model in results["models"]]
    assert max(losses) < math.log(500)  # better than guessing among the tokens
    assert len({*losses}) == 3


PRINTED = {"plan": a_plan, "cut_layers": a_cut, "distill": a_distillation}
