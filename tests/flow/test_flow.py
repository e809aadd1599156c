"""The whole flow through the command line, at the smallest size."""

import dataclasses
import json
import shlex
import signal
import subprocess
import sys

import pytest

from hf import read_weights
from nemo_minitron.artifacts import Manifest
from nemo_minitron.artifacts.stages import stage_name
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.cli.main import main
from nemo_minitron.config.compose import compose
from nemo_minitron.report.stages import log_files

SMALL = [
    "data.words=20000", "data.pretrain_words=20000", "data.vocab_size=400", "data.workers=1",
    "model.seq_length=32",
    "model.architecture.num_layers=3", "model.architecture.hidden_size=64", "model.architecture.ffn_hidden_size=128",
    "model.architecture.num_attention_heads=4", "model.architecture.num_query_groups=2",
    "model.architecture.kv_channels=16", "model.architecture.seq_length=32",
    "prune.num_samples=8", "prune.students.depth.num_layers=2", "prune.students.width.hidden_size=32",
    "prune.students.width.ffn_hidden_size=64", "limit_test_batches=1", "facts=20",
    *(f"{stage}.{key}" for stage in ("pretrain", "finetune", "distill")
      for key in ("max_steps=2", "val_check_interval=1", "limit_val_batches=1", "warmup_steps=1")),
]  # fmt: skip
STAGES = (
    "data-broad", "data", "teacher-pretrained", "teacher", "scores", "depth-pruned", "depth-distilled", "depth-control",
    "width-pruned", "width-distilled", "width-control", "answers",
)  # fmt: skip

#: The command line, killed as soon as the teacher's training has left its first checkpoint. The group is killed:
#: Megatron's process for write results would outlive its parent, and hold its pipes.
KILLED = """
import os, signal, sys
from nemo_minitron.cli.main import main

replace = os.replace

def replace_and_die(source, target, **options):
    replace(source, target, **options)
    if "/.teacher.partial/checkpoints/step-" in str(target):
        os.killpg(0, signal.SIGKILL)

os.replace = replace_and_die
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow") / "run"
    assert main(["flow", f"output_dir={folder}", *SMALL]) == 0
    return folder


def stamps(folder) -> dict:
    return {str(path.parent.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("**/manifest.json")}


def steps(folder) -> list[dict]:
    """The training history: a line for each step."""
    return Manifest.read(folder).metrics["train"]


def test_the_report_holds_every_model_and_stage(run):
    report = json.loads((run / "report.json").read_text())
    cuts = report["cuts"]
    assert {name: cut["method"] for name, cut in cuts.items()} == {"depth": "compensated", "width": "compensated"}
    assert 0 < cuts["width"]["compensation"]["kept_energy"] < 1
    assert cuts["depth"]["depth"]["held_out_loss"] <= cuts["depth"]["depth"]["held_out_loss_plain"]
    assert "scan blocks for depth" in [stage["stage"] for stage in report["stages"]]
    kinds = [(row["student"], row["kind"]) for row in report["table"]]
    students = [(name, kind) for name in ("depth", "width") for kind in ("pruned", "distilled", "control")]
    assert kinds == [(None, "teacher"), (None, "corrected"), *students]
    for row in report["table"]:
        evaluation = Manifest.read(run / "evaluations" / row["model"].replace(" ", "-")).metrics
        assert row["test"] == evaluation["test"] and row["validation"] == evaluation["validation"]
    assert all(stage["seconds"] > 0 and stage["peak_memory_bytes"] > 1e6 for stage in report["stages"])
    assert {name for name in STAGES if not (run / name / "manifest.json").is_file()} == set()
    assert len(report["verdicts"]) == 2


def test_the_dry_run_lists_what_ran(run, capsys):
    """Each step by its name, in its order; and how long each takes."""
    assert main(["flow", f"output_dir={run}", *SMALL, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    ran = [stage["stage"] for stage in json.loads((run / "report.json").read_text())["stages"]]
    stages, _, rest = shown.partition(f"stages, under {run}:\n")[2].partition("\nthen the table")
    times = rest.partition("\ntime: ")[2].partition("\n\n")[0].splitlines()[1:]
    assert [line.strip().split(": ")[0] for line in stages.splitlines()] == ran
    assert [line.strip().split(": ")[0] for line in times] == ran


def test_every_model_is_asked_what_the_text_states(run):
    """The corrected teacher is what the others are compared with; the figures are those of the evaluation's folder."""
    facts = json.loads((run / "report.json").read_text())["facts"]
    assert facts == json.loads((run / "evaluations" / "facts" / "results.json").read_text())
    rows = [row["model"] for row in json.loads((run / "report.json").read_text())["table"]]
    assert facts["reference"] == "teacher corrected" and sorted(facts["facts"]["kept"]) == sorted(rows)
    assert facts["facts"]["questions"] == 20 and facts["facts"]["chance"] == 0.25


def test_the_report_repeats_the_run_and_shows_it(run, capsys):
    """Every command composes to what the manifest says was run; the page is there, names and numbers are the flow's."""
    report = json.loads((run / "report.json").read_text())
    recorded = {stage["stage"]: stage["config"] for stage in report["stages"]} | {"the whole run": report["config"]}
    assert {"the whole run", "data", "teacher correction", "importance", "prune width", "distil depth"} <= set(
        report["commands"]
    )
    for name, command in report["commands"].items():
        program, subcommand, *overrides = shlex.split(command)
        config = recorded[name].get("command", recorded[name])
        assert program == "minitron"
        assert json.loads(json.dumps(dataclasses.asdict(compose(subcommand, overrides)))) == config
    for stage in report["stages"]:
        assert stage["stage"] == stage_name(stage["folder"], stage["kind"]) or stage["kind"] in ("scan", "refit")
    assert {"shapes", "kept", "cost", "block-influence", "losses-depth-distilled"} <= {
        picture["name"] for picture in report["pictures"]
    }
    assert report["missing"] == [] and report["environment"]["processors"] > 0
    page = (run / "report.html").read_text()
    assert all(f"{row['test']['loss']:.4f}" in page for row in report["table"])
    assert set(log_files(run)) >= {"teacher", "scores", "depth-distilled", "evaluations/teacher"}
    before = (run / "report.html").read_bytes()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_bytes() == before


def test_parameters_in_the_table_are_those_on_disk(run):
    report = json.loads((run / "report.json").read_text())
    on_disk = {
        "teacher corrected": "teacher", "depth pruned": "depth-pruned", "width distilled": "width-distilled",
    }  # fmt: skip
    rows = {row["model"]: row for row in report["table"]}
    for name, folder in on_disk.items():
        assert rows[name]["parameters"] == sum(tensor.numel() for tensor in read_weights(run / folder).values())


def test_a_second_run_does_nothing_again(run, capsys):
    before = stamps(run)
    assert main(["flow", f"output_dir={run}", *SMALL]) == 0
    assert stamps(run) == before


def test_a_stage_that_is_gone_is_made_again_with_the_same_bits(run):
    before, weights = stamps(run), read_weights(run / "width-distilled")
    for path in sorted((run / "width-distilled").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (run / "width-distilled").rmdir()
    assert main(["flow", f"output_dir={run}", *SMALL]) == 0
    after, again = stamps(run), read_weights(run / "width-distilled")
    assert all((again[name] == tensor).all() for name, tensor in weights.items())
    assert {name for name in before if before[name] != after[name]} == {"width-distilled"}


def test_a_flow_may_end_with_instruction_tuning(run, tmp_path, capsys):
    """Only the students' own step runs; what the others made stays."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"instruction": f"Say {n}", "output": f"{n}!"}) for n in range(10)))
    before = stamps(run)
    recipe = ["max_steps=2", "val_check_interval=1", "limit_val_batches=1", "warmup_steps=1", "peft.scheme=lora"]
    settings = [f"instruct.data={rows}", "instruct.rows.template=plain", *(f"instruct.{entry}" for entry in recipe)]
    assert main(["flow", f"output_dir={run}", *SMALL, *settings]) == 0
    after = stamps(run)
    assert after.items() >= before.items() and set(after) - set(before) == {"depth-instruct", "width-instruct"}
    instructed = json.loads((run / "report.json").read_text())["instructed"]
    assert [entry["step"] for entry in instructed["depth"]] == [1, 2]
    assert "width instructed: loss of the answers in validation" in capsys.readouterr().out
    rows.write_text('{"instruction": 1, "output": "a"}')
    assert main(["flow", f"output_dir={tmp_path / 'bad'}", *SMALL, *settings]) == 1
    assert "row 1: field instruction" in capsys.readouterr().err and not (tmp_path / "bad").exists()


def test_a_searched_student_goes_the_way_of_the_others(run, capsys):
    """Of sizes that the search found, on from the weights that its rounds left; what others made stays."""
    search = "{parameters:60%,tolerance:0.2,measured:3,candidates:2,steps:1,samples:2}"
    settings = ["facts=0", "distill.control=false", f"prune.students.best={{search:{search}}}"]
    before = stamps(run)
    assert main(["flow", f"output_dir={run}", *SMALL, *settings]) == 0
    assert "winner: " in capsys.readouterr().out
    after = stamps(run)
    assert after.items() >= before.items()
    made = {name for name in set(after) - set(before) if not name.startswith("scores.depth")}
    results = {f"{place}best-{kind}" for kind in ("pruned", "distilled") for place in ("", "evaluations/")}
    assert made == {*results, "best-search", "best-search/student"}
    winner = json.loads((run / "best-search" / "search.json").read_text())["winner"]["architecture"]
    for folder in ("best-search/student", "best-pruned", "best-distilled"):
        assert open_checkpoint(run / folder).architecture.to_dict() == winner, folder
    assert Manifest.read(run / "best-distilled").config["model"]["restore_from_path"] == f"{run}/best-search/student"
    report = json.loads((run / "report.json").read_text())
    assert {"best pruned", "best distilled"} <= {row["model"] for row in report["table"]}
    repeated = compose("flow", shlex.split(report["commands"]["the whole run"])[2:])
    assert repeated.prune.students["best"]["search"]["measured"] == 3 and {*repeated.prune.students["best"]} == {
        "search"
    }
    assert main(["flow", f"output_dir={run}", *SMALL, *settings]) == 0
    assert stamps(run) == after


def test_a_flow_that_is_killed_goes_on_where_it_was(run, tmp_path):
    """SIGKILL between two steps of a training; the next run goes on there and leaves no half.

    All of it, made a second time, has the same bits as the first.
    """
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, "flow", f"output_dir={folder}", *SMALL]
    with (tmp_path / "said").open("w") as said:
        killed = subprocess.run(command, stdout=said, stderr=said, start_new_session=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, (tmp_path / "said").read_text()[-2000:]
    assert [path.name for path in folder.glob(".*.partial")] == [".teacher.partial"]
    assert (folder / ".teacher.partial" / "checkpoints" / "step-1").is_dir()
    before = stamps(folder)
    assert set(before) == {"data-broad", "data", "teacher-pretrained"}
    assert main(["flow", f"output_dir={folder}", *SMALL]) == 0
    assert stamps(folder).items() >= before.items()
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    # Two runs of one step each wrote here; a training that starts anew throws the first one's file away.
    assert len(list((folder / "teacher" / "tensorboard").iterdir())) == 2
    assert steps(folder / "teacher") == steps(run / "teacher")
    for name in ("teacher", "depth-distilled", "depth-control", "width-distilled", "width-control"):
        first, again = read_weights(run / name), read_weights(folder / name)
        assert first.keys() == again.keys()
        assert all((again[key] == tensor).all() for key, tensor in first.items()), name


def test_another_setting_is_refused_and_nothing_is_lost(run, capsys):
    before = stamps(run)
    assert main(["flow", f"output_dir={run}", *SMALL, "finetune.lr=5e-4"]) == 1
    message = capsys.readouterr().err
    assert "model.optim.lr" in message and "overwrite=true" in message
    assert stamps(run) == before


@pytest.mark.parametrize("name", ["mistral-nemo", "nemo1"])
def test_any_checkpoint_goes_the_whole_way_without_a_preset(small_models, tmp_path, capsys, name):
    """Mistral, and Nemotron in an archive, of sizes below ModelOpt's own grid.

    Every step's time is told before it starts, and a second run does nothing.
    """
    (tmp_path / "text.txt").write_text("\n\n".join(f"Document {n} says that {n} is {n}." for n in range(3000)))
    settings = [
        f"model.restore_from_path={small_models[name]}",
        f"data.source={tmp_path / 'text.txt'}",
        f"output_dir={tmp_path / 'run'}",
        "limit_test_batches=1",
        "prune.num_samples=8",
        "distill.control=false",
    ]
    settings += [
        f"{stage}.{key}" for stage in ("finetune", "distill") for key in ("max_steps=2", "limit_val_batches=1")
    ]
    assert main(["flow", *settings]) == 0
    told = capsys.readouterr().err.splitlines()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "stages: about" in told[0] and sum(" ... about " in line for line in told) == len(report["stages"])
    sizes = {row["model"]: row["parameters"] for row in report["table"]}
    assert max(sizes["depth distilled"], sizes["width distilled"]) < sizes["teacher"]
    assert (
        report["config"]["model"]["seq_length"] == 64
        and report["config"]["prune"]["students"]["depth"]["num_layers"] == 1
    )
    assert "model=auto" in report["commands"]["the whole run"]
    before = stamps(tmp_path / "run")
    assert main(["flow", *settings]) == 0
    assert stamps(tmp_path / "run") == before
    again = capsys.readouterr().err
    assert f"{len(report['stages'])} of them done before" in again and again.count(" ... done before") == len(before)


@pytest.mark.parametrize("preset", [["model=tiny"], ["model=llama31_8b", "hardware=8x80gb"]])
def test_a_dry_run_touches_nothing(tmp_path, monkeypatch, capsys, preset):
    monkeypatch.chdir(tmp_path)
    assert main(["flow", *preset, "--dry-run"]) == 0
    assert not list(tmp_path.iterdir())
    shown = capsys.readouterr().out
    if "model=llama31_8b" in preset:
        assert "8.03B" in shown and "4.54B" in shown and "4.51B" in shown


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("prune.students.width.hidden_size=100", "hidden_size 100 is not on the pruning grid"),
        ("prune.students.depth.num_layers=99", "num_layers 99 is above the teacher's 6"),
        ("prune.students.depth.hiden_size=64", "hiden_size is not a target"),
        ("model.init=checkpoint", "restore_from_path is missing"),
        ("finetune.max_stepz=3", "max_steps"),
        ("data.source=/nowhere/at/all", "/nowhere/at/all"),
    ],
)
def test_bad_input_ends_before_any_work(tmp_path, capsys, override, expected):
    assert main(["flow", f"output_dir={tmp_path / 'run'}", override]) != 0
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_teacher_says_where_to_get_it(tmp_path, capsys):
    arguments = ["flow", f"output_dir={tmp_path / 'run'}", "model=llama31_8b", "hardware=cpu"]
    assert main(arguments) == 1
    assert "ngc://nvidia/nemo/llama-3_1-8b" in capsys.readouterr().err
