"""What a flow leaves open: chosen for teacher, text and machine, with reasons; what is given stays."""

import dataclasses
import json
import shlex

import pytest
import torch

from models import save
from nemo_minitron.architecture import Architecture
from nemo_minitron.cli.main import main
from nemo_minitron.config.command_line import repeat
from nemo_minitron.config.compose import compose, presets
from nemo_minitron.flow.models import student_architecture
from nemo_minitron.flow.settle import CHOSEN, OPEN, settle
from nemo_minitron.flow.settle.state import State
from nemo_minitron.flow.steps import steps
from nemo_minitron.planning.fitting import fits
from nemo_minitron.planning.machine import Machine, free_memory
from nemo_minitron.planning.pace import Pace, Work, in_words
from nemo_minitron.published import KNOWN

LAPTOP = Machine(gpus=0, cores=2, free_bytes=12e9)
SMALL = Machine(gpus=0, cores=2, free_bytes=6e9)
GPUS = Machine(gpus=8, cores=64, free_bytes=85e9, capability=9)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("A sentence of the text. " * 400_000)
    return folder


@pytest.fixture(scope="module")
def checkpoints(small_models):
    """Name -> a checkpoint with its tokenizer, of several families and formats."""
    return {name: small_models[name] for name in ("llama2", "nemotron", "mistral-nemo", "nemo2", "nemo1")}


def asked(teacher, text, *further):
    """A flow on `teacher`, without a preset."""
    return compose("flow", [f"model.restore_from_path={teacher}", f"data.source={text}", *further])


def sized(monkeypatch, model: Architecture) -> None:
    """Checkpoints that are opened from here on are of these sizes."""
    monkeypatch.setattr("nemo_minitron.flow.settle.teacher_architecture", lambda config: model)


SMOLLM2 = Architecture(
    num_layers=30, hidden_size=576, ffn_hidden_size=1536, num_attention_heads=9, num_query_groups=3, kv_channels=64,
    vocab_size=49152, seq_length=8192, share_embeddings_and_output_weights=True,
)  # fmt: skip


@pytest.mark.parametrize("name", ["llama2", "nemotron", "mistral-nemo", "nemo2", "nemo1"])
def test_any_checkpoint_is_settled_and_nothing_is_left_open(checkpoints, text, name):
    settled = settle(asked(checkpoints[name], text), LAPTOP)
    assert settled.teacher.num_layers == 2 and settled.teacher.hidden_size == 64
    for setting in OPEN:
        value = settled.config
        for part in setting.split("."):
            value = getattr(value, part)
        assert isinstance(value, int) and value > 0, setting
    assert settled.config.model.seq_length == 64
    assert settled.config.prune.students["depth"] == {"num_layers": 1}
    for student in settled.config.prune.students:
        assert (
            student_architecture(settled.config, settled.teacher, student).parameters() < settled.teacher.parameters()
        )
    assert all(choice.why for choice in settled.choices)


def test_every_step_of_a_flow_has_its_work(checkpoints, text, tmp_path):
    settled = settle(asked(checkpoints["llama2"], text, f"output_dir={tmp_path}", "distill.control=true"), LAPTOP)
    assert [step.name for step in steps(settled.config)] == list(settled.work)
    tiny = settle(compose("flow", [f"output_dir={tmp_path}"]))
    assert tiny.choices == [] and tiny.config == compose("flow", [f"output_dir={tmp_path}"])
    assert [step.name for step in steps(tiny.config)] == list(tiny.work)
    assert all(work.amount > 0 for work in [*tiny.work.values(), *settled.work.values()])


@pytest.mark.parametrize("machine", [LAPTOP, SMALL, GPUS], ids=["laptop", "small", "gpus"])
def test_what_is_chosen_fits_and_more_would_not(checkpoints, text, monkeypatch, machine):
    sized(monkeypatch, SMOLLM2 if not machine.gpus else KNOWN["llama31_8b"])
    config = settle(asked(checkpoints["llama2"], text), machine).config
    again = State(config, machine)
    again.teacher = SMOLLM2 if not machine.gpus else KNOWN["llama31_8b"]
    again.insists = False  # what was chosen is looked at as if it were open
    (limit, _), models, run = again.limit(), again.models(), again.run()
    scoring = (config.hardware.prune_pipeline_model_parallel_size, config.prune.batch_size)
    assert fits(models, run, ("finetune", "distill", "prune"), limit, scoring)
    assert config.hardware.devices == (8 if machine.gpus else 1)
    assert config.finetune.global_batch_size % (run.layout.micro_batch_size * run.data_parallel) == 0
    if machine is SMALL:
        double = dataclasses.replace(run, seq_length=2 * run.seq_length)
        larger = dataclasses.replace(run, layout=dataclasses.replace(run.layout, micro_batch_size=8))
        assert not fits(models, double, ("finetune",), limit) or not fits(models, larger, ("finetune",), limit)


def test_time_text_and_the_least_bound_the_steps(checkpoints, text, tmp_path, monkeypatch):
    sized(monkeypatch, SMOLLM2)
    teacher = checkpoints["llama2"]

    def steps(*further, source=text, machine=LAPTOP):
        settled = settle(asked(teacher, source, *further), machine)
        recipe = settled.config.finetune
        assert recipe.max_steps % recipe.val_check_interval == 0 and recipe.max_steps // recipe.val_check_interval == 3
        return recipe.max_steps * recipe.global_batch_size, settled

    hour, settled = steps()
    seconds = sum(settled.pace.seconds(work) for work in settled.work.values())
    assert seconds == pytest.approx(3600, rel=0.35)
    assert steps("minutes=600")[0] == pytest.approx(10 * hour, rel=0.25)
    assert steps("minutes=1")[1].config.finetune.max_steps == 21
    assert steps("hardware.tflops=1", "minutes=6")[0] == pytest.approx(hour, rel=0.25)
    short = tmp_path / "short.txt"
    short.write_text("A sentence. " * 20_000)
    read, settled = steps("minutes=600", source=short)
    assert read * 512 * 4.0 <= 4 * 240_000 and settled.config.finetune.max_steps >= 21
    assert any("4 times over" in choice.why for choice in settled.choices)


def test_what_is_given_wins(checkpoints, text):
    given = {
        "model.seq_length": 32, "hardware.micro_batch_size": 2, "finetune.max_steps": 5,
        "finetune.global_batch_size": 6, "distill.max_steps": 4, "distill.val_check_interval": 2,
        "limit_test_batches": 3, "prune.num_samples": 9, "prune.batch_size": 3, "prune.num_block_samples": 8,
    }  # fmt: skip
    students = ["~prune.students.width.parameters", "prune.students.width.hidden_size=48"]
    overrides = [*(f"{name}={value}" for name, value in given.items()), *students]
    settled = settle(asked(checkpoints["llama2"], text, *overrides), LAPTOP)
    assert not given.keys() & {choice.setting for choice in settled.choices}
    assert settled.config.finetune.max_steps == 5 and settled.config.finetune.global_batch_size == 6
    assert settled.config.finetune.val_check_interval in (2, 5)
    assert settled.config.prune.students["width"] == {"hidden_size": 48}
    assert settled.config.distill.global_batch_size % 2 == 0


def test_a_search_may_be_taken_back(checkpoints, text):
    taken = [f"prune.students.best.{value}" for value in ("search.parameters=60%", "search=null", "hidden_size=32")]
    settled = settle(asked(checkpoints["llama2"], text, *taken), LAPTOP)
    assert settled.config.prune.students["best"] == {"hidden_size": 32}


def test_a_share_may_be_taken_back(checkpoints, text):
    back = ["prune.students.width.parameters=null", "prune.students.width.hidden_size=48"]
    assert settle(asked(checkpoints["llama2"], text, *back), LAPTOP).config.prune.students["width"] == {
        "hidden_size": 48
    }


def test_batches_follow_what_the_hardware_gives(checkpoints, text):
    config = settle(asked(checkpoints["llama2"], text, "hardware=cpu", "hardware.devices=2"), LAPTOP).config
    assert config.hardware.micro_batch_size == 8 and config.distill.global_batch_size % 16 == 0
    both = ["model.seq_length=64", "hardware.micro_batch_size=4", "hardware.memory_gb=0.001"]
    config = settle(asked(checkpoints["llama2"], text, *both), LAPTOP).config  # who gives both insists
    assert (config.model.seq_length, config.hardware.micro_batch_size) == (64, 4)


def test_a_run_goes_on_with_what_was_chosen_for_it(checkpoints, text, tmp_path, monkeypatch):
    sized(monkeypatch, SMOLLM2)
    config = asked(checkpoints["llama2"], text, f"output_dir={tmp_path / 'run'}")
    first = settle(config, LAPTOP)
    first.keep()
    busy = settle(config, Machine(gpus=0, cores=1, free_bytes=5e9))
    assert busy.config == first.config
    assert {choice.why for choice in busy.choices if choice.setting in OPEN} == {f"as this run was begun ({CHOSEN})"}
    assert settle(dataclasses.replace(config, overwrite=True), SMALL).config.hardware != first.config.hardware
    kept = tmp_path / "run" / CHOSEN
    for damaged in ("{", "[]", '{"model.seq_length": -1}', '{"model.name": 3}', '{"prune.batch_size": "8"}'):
        kept.write_text(damaged)
        with pytest.raises(Exception, match=f"{CHOSEN}.*remove it"):
            settle(config, LAPTOP)


def test_the_command_that_repeats_it_says_what_was_chosen(checkpoints, text):
    settled = settle(asked(checkpoints["llama2"], text), LAPTOP)
    command = repeat("flow", dataclasses.asdict(settled.config))
    assert "model=auto" in command
    assert compose("flow", shlex.split(command)[2:]) == settled.config


def test_a_dry_run_prints_every_choice_with_its_reason_and_touches_nothing(
    checkpoints, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = [f"model.restore_from_path={checkpoints['nemotron']}", f"data.source={text}"]
    assert (
        main(["flow", *arguments, "--dry-run", "prune.students.both.parameters=70%", "prune.students.both.layers=50%"])
        == 0
    )
    shown = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    for setting in (
        "model.seq_length = 64: ",
        "hardware.micro_batch_size = ",
        "finetune.max_steps = ",
        "prune.students.both = num_layers 1, hidden_size ",
        "prune.hidden_size_divisor = 8: ",
    ):
        assert f"  {setting}" in shown
    assert "time: about" in shown and "  distil both: about" in shown


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["prune.students.width.parameters=0%"], "width: parameters = 0% is not a share of the teacher: above 0%"),
        (["prune.students.depth.layers=101%"], "depth: layers = 101% is not a share of the teacher: above 0%"),
        (["prune.students.width.parameters=abc"], "width: parameters = 'abc' is not a share in percent, such as 60%"),
        (["prune.students.width.parameters=[1]"], "width: parameters = "),
        (["prune.students.width.hidden_size=48"], "width: parameters and hidden_size are given"),
        (["prune.students.width.num_layers=abc"], "width.num_layers = 'abc' is not a whole number"),
        (["prune.students.width.num_layers=7"], "num_layers 7 is above the teacher's 2"),
        (["prune.students.width.num_attention_heads=3"], "num_attention_heads 3 is not on the pruning grid"),
        (["prune.students.width.drop_layers=9"], "drop_layers [9] out of range"),
        (["prune.students.best={search:{parameters:60%,stepz:3}}"], "best.search.stepz is not a setting; known are"),
        (["prune.students.best.search.steps=3"], "best.search.parameters is missing: give a budget"),
        (["prune.students.best={search:{parameters:60%,steps:x}}"], "best.search.steps = 'x' is not a whole number"),
        (["prune.students.best={search:60%}"], "best.search = '60%' is no budget: give search={parameters:60%}"),
        (["prune.students.best={search:{parameters:60%},hidden_size:32,refit:once}"], "give no hidden_size, refit"),
        (
            ["prune.students.best={search:{parameters:150%}}"],
            "best: search.parameters = 150% is no cut: the teacher has",
        ),
        (["prune.students.best={search:{parameters:1%}}"], "best: the budget is below the smallest shape"),
        (["prune.students.depth.depth_beam=x"], "depth.depth_beam = 'x' is not a whole number"),
        (["data.source=/nowhere/text"], "data.source = /nowhere/text does not exist"),
        (["model.restore_from_path=/nowhere/model"], "/nowhere/model does not exist"),
        (["hardware.memory_gb=0.001"], "nothing fits 0.001 GB a rank (hardware.memory_gb): "),
        (["hardware=8x80gb", "hardware.tensor_model_parallel_size=3"], "8 rank(s) cannot be divided into tensor 3"),
        (["hardware=8x80gb"], "num_attention_heads 4 is not a multiple of tensor parallel 8"),
        (
            ["finetune.global_batch_size=3", "hardware.micro_batch_size=2"],
            "finetune.global_batch_size 3 must be a multiple of hardware.micro_batch_size 2 x data parallel 1 = 2",
        ),
        (["minutes=0"], "minutes = 0.0 must be above 0"),
        (["minutes=inf"], "minutes = inf must be above 0"),
        (["hardware.tflops=-1"], "hardware.tflops = -1.0 must be above 0"),
        (["prune.hidden_size_divisor=0"], "prune.hidden_size_divisor = 0 must be at least 1"),
        (["finetune.global_batch_size=0"], "finetune.global_batch_size = 0 must be at least 1"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry", "run"])
def test_bad_input_is_one_message_and_nothing_is_written(checkpoints, text, tmp_path, capsys, overrides, said, dry):
    run = tmp_path / "run"
    base = [f"model.restore_from_path={checkpoints['llama2']}", f"data.source={text}", f"output_dir={run}"]
    code = main(["flow", *base, *overrides, *dry])
    err = capsys.readouterr().err
    assert code in (1, 2) and said in err, err
    assert not run.exists()


def test_a_teacher_of_no_family_is_one_message(tmp_path, text, capsys):
    folder = save("llama2", torch.float32, tmp_path / "model")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"model_type": "mamba", "architectures": ["Mamba"]}))
    arguments = [f"model.restore_from_path={folder}", f"data.source={text}", f"output_dir={tmp_path / 'run'}"]
    for dry in (["--dry-run"], []):
        assert main(["flow", *arguments, *dry]) == 1
        assert "mamba" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_estimates_come_from_what_ran():
    pace = Pace(1e9, "assumed", processes=2)
    assert pace.seconds(Work("train", 1e10)) == pytest.approx(10, abs=5)
    pace.learn(Work("train", 1e10), 2.0)  # nothing but set-up
    assert pace.rate("train") == 1e9
    pace.learn(Work("train", 1e10), 104.0)
    assert pace.rate("train") == pace.rate("run") == pytest.approx(1e8)
    assert pace.rate("text") == 2e6 and pace.rate("cut") < 1e9
    pace.learn(Work("run", 1e10), 24.0)
    assert pace.rate("run") == pytest.approx(5e8) and pace.rate("train") == pytest.approx(1e8)
    assert [in_words(seconds) for seconds in (5, 89, 90, 3600, 9000)] == [
        "about 5 s", "about 89 s", "about 2 min", "about 60 min", "about 2.5 h",
    ]  # fmt: skip


def test_free_memory_is_the_least_of_machine_and_group(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert free_memory(tmp_path) == 4000 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    for name, value in (("memory.max", "max"), ("memory.current", "5"), ("memory.stat", "anon 1\ninactive_file 500\n")):
        (group / name).write_text(value)
    assert free_memory(tmp_path) == 4000 * 1024
    (group / "memory.max").write_text("3000000")
    (group / "memory.current").write_text("1000000")
    assert free_memory(tmp_path) == 2_000_500
    assert (free_memory() or 0) > 1e6


def test_presets_leave_nothing_open_but_auto():
    for model in presets("flow")["model"]:
        if model != "auto":
            config = compose("flow", [f"model={model}", "hardware=8x80gb"])
            assert settle(config, GPUS).choices == []
