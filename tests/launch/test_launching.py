"""Hardware presets of single stages; `--launch`: what torchrun and Slurm are given, and ranks started that way."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hf import read_weights
from nemo_minitron import config as c
from nemo_minitron.artifacts import Manifest
from nemo_minitron.cli import main as cli
from nemo_minitron.config.compose import compose, read_launch
from nemo_minitron.errors import ConfigError
from nemo_minitron.launch import launcher as launching
from nemo_minitron.pruning.command import prune

STAGES = {
    "finetune": ["model.restore_from_path=/teacher", "model.data.data_prefix=/data", "model.nemo_path=out"],
    "distill": [
        "model.restore_from_path=/student",
        "model.kd_teacher_restore_from_path=/teacher",
        "model.data.data_prefix={train:[1.0,/a b],validation:[$v],test:[t]}",
        "model.nemo_path=out",
    ],
    "prune": ["model.restore_from_path=/teacher", "prune.num_layers=16", "export.save_path=out"],
    "flow": ["output_dir=out"],
}
CLUSTER = ["slurm.partition=batch", "slurm.account=me", "slurm.time=01:00:00", "slurm.sbatch.qos=high"]
CONTAINER = ["slurm.container=/images/nemo.sqsh", "slurm.mounts=[/lustre,/data:/mnt]"]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty working folder and an empty home, without Slurm."""
    work, home = tmp_path / "work", tmp_path / "home"
    for folder in (work, home):
        folder.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    return tmp_path


def printed(capsys, *arguments: str) -> str:
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    assert cli.main(list(arguments)) == 2
    return capsys.readouterr().err


def directives(script: str) -> dict[str, str]:
    pairs = (line.removeprefix("#SBATCH --").partition("=") for line in script.splitlines() if line.startswith("#SBA"))
    return {name: value for name, _, value in pairs}


def step(script: str) -> tuple[dict[str, str], list[str]]:
    """Options of the srun line that runs the command, and the command."""
    [line] = [line for line in script.splitlines() if "nemo_minitron.cli.main" in line]
    words = shlex.split(line)[1:]
    options = {}
    while words[0].startswith("--"):
        name, equals, value = words.pop(0).partition("=")
        options[name] = value if equals else words.pop(0)
    return options, words


# Hardware presets.


@pytest.mark.parametrize("stage", ["finetune", "distill"])
def test_a_preset_gives_the_layout_and_overrides_win(stage):
    config = compose(stage, [*STAGES[stage], "hardware=8x80gb"])
    hardware = compose("flow", ["hardware=8x80gb"]).hardware
    assert (config.trainer.devices, config.trainer.precision) == (8, "bf16") == (hardware.devices, hardware.precision)
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel", "micro_batch_size"):
        assert getattr(config.model, name) == getattr(hardware, name)
    assert config.model.data.num_workers == hardware.num_workers == 8
    changed = ["model.micro_batch_size=2", "hardware.num_nodes=2", "trainer.precision=bf16-mixed"]
    config = compose(stage, [*STAGES[stage], "hardware=8x80gb", *changed])
    assert (config.model.micro_batch_size, config.trainer.num_nodes, config.trainer.precision) == (2, 2, "bf16-mixed")


def test_scoring_spreads_layers_and_nothing_else():
    config = compose("prune", [*STAGES["prune"], "hardware=8x80gb"])
    assert (config.trainer.devices, config.model.pipeline_model_parallel_size) == (8, 8)
    assert (config.trainer.num_nodes, config.model.tensor_model_parallel_size) == (1, 1)


@pytest.mark.parametrize("stage", ["finetune", "distill", "prune"])
def test_without_a_preset_all_is_as_the_fields_say(stage):
    config = compose(stage, STAGES[stage])
    trainer = c.TrainerConfig(max_steps=config.trainer.max_steps, val_check_interval=config.trainer.val_check_interval)
    assert config.trainer == trainer
    assert config.model.data.num_workers == 2 and config.model.pipeline_model_parallel_size == 1


def test_settings_of_a_file_win_over_the_preset_that_it_names(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "defaults:\n  - distill\n  - override hardware: slurm\n  - _self_\nhardware: {num_nodes: 4}\n"
        "model: {micro_batch_size: 1}\nslurm: {partition: batch, sbatch: {qos: high}}\n"
    )
    config = compose("distill", STAGES["distill"], config_name=str(file))
    assert (config.trainer.num_nodes, config.trainer.devices, config.model.micro_batch_size) == (4, 8, 1)
    slurm = read_launch("distill", STAGES["distill"], config_name=str(file)).slurm
    assert (slurm.partition, slurm.sbatch) == ("batch", {"exclusive": True, "mem": 0, "qos": "high"})


def test_presets_are_checked_and_shown(capsys):
    assert "there are 1x24gb, 1x80gb, 8x80gb, auto, cpu, slurm" in refused(
        capsys, "distill", *STAGES["distill"], "hardware=9x"
    )
    said = refused(capsys, "distill", "hardware.devcies=2", "slurm.time_=1", "hardware.devices=two")
    assert "did you mean hardware.devices" in said and "did you mean slurm.time" in said
    assert "hardware.devices = 'two' is not a whole number" in said
    text = printed(capsys, "distill", "--help", "hardware=8x80gb", "slurm.partition=batch")
    assert "\n  hardware=1x24gb|1x80gb|8x80gb|auto|cpu|slurm\n" in text
    assert "\n  trainer.devices=8\n" in text and "\n  model.tensor_model_parallel_size=8\n" in text
    assert "\n  slurm.partition=batch\n" in text and "[--launch torchrun|slurm]" in text


def test_a_flow_for_a_machine_that_is_not_known_is_refused(capsys):
    named = ["model.restore_from_path=/teacher", "data.source=/text", "slurm.partition=batch"]
    assert "hardware.devices is open" in refused(capsys, "flow", *named, "--launch", "slurm", "--dry-run")


def test_a_stage_knows_nothing_of_where_it_was_launched():
    """So that neither its key nor its manifest depends on it."""
    here = compose("distill", STAGES["distill"])
    assert compose("distill", [*STAGES["distill"], *CLUSTER, *CONTAINER]) == here
    assert not {"hardware", "slurm"} & {*vars(here)}


# The script for Slurm.


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("container", [True, False])
def test_the_slurm_script(capsys, empty, nodes, container):
    cluster = [*CLUSTER, *(CONTAINER if container else [])]
    chosen = [*STAGES["distill"], "hardware=slurm", f"hardware.num_nodes={nodes}"]
    script = printed(capsys, "distill", *chosen, *cluster, "--launch", "slurm", "--dry-run")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    sbatch = directives(script)
    folder = empty / "work" / "out.slurm" / "distill"
    assert sbatch == {
        "account": "me",
        "exclusive": "",
        "gpus-per-node": "8",
        "job-name": "minitron-distill",
        "mem": "0",
        "nodes": str(nodes),
        "ntasks-per-node": "1",
        "open-mode": "append",
        "output": f"{folder}/sbatch_minitron-distill_%j.out",
        "partition": "batch",
        "qos": "high",
        "requeue": "",
        "signal": "TERM@300",
        "time": "01:00:00",
    }
    options, command = step(script)
    assert options["--kill-on-bad-exit"] == "1"
    if container:
        assert options["--container-image"] == "/images/nemo.sqsh"
        here = empty / "work"
        assert options["--container-mounts"] == f"/lustre:/lustre,/data:/mnt,{here}:{here},{folder}:/nemo_run"
    else:
        assert not any(name.startswith("--container") for name in options)
    python = "python" if container else sys.executable
    assert command[:4] == [python, "-m", "nemo_minitron.launch.agent", str(empty / "work")]
    at = command.index("-m", 2)
    assert Path(command[4]).name == "torchrun" and command[at + 1] == "nemo_minitron.cli.main"
    torchrun = dict(zip(command[5:at:2], command[6:at:2]))
    assert re.fullmatch(r"\d+", torchrun.pop("--rdzv-id"))
    assert torchrun == {
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "localhost:0" if nodes == 1 else "$head_node_ip:29500",
        "--nnodes": str(nodes),
        "--nproc-per-node": "8",
        "--node-rank": "0" if nodes == 1 else "$SLURM_NODEID",
        "--tee": "3",
    }
    assert command[at + 2 :] == ["distill", *chosen]
    assert not [*empty.rglob("*.slurm"), *(empty / "work").iterdir(), *(empty / "home").iterdir()]


def test_what_can_be_set_is_in_the_script(capsys, empty):
    settings = ["slurm.job_name=mine", "slurm.job_dir=/jobs/mine", "slurm.save_seconds=60", "slurm.retries=0"]
    settings += ["slurm.env={note:'a b',HF_HOME:/hf}", "slurm.setup=module load cuda", "slurm.gpus_per_node=0"]
    settings += ["slurm.sbatch={requeue:false,cpus-per-task:32}", "slurm.srun={mpi:pmix,label:true,export:null}"]
    script = printed(capsys, "finetune", *STAGES["finetune"], *CLUSTER[:1], *settings, "--launch", "slurm", "--dry-run")
    sbatch = directives(script)
    assert (sbatch["job-name"], sbatch["signal"], sbatch["cpus-per-task"]) == ("mine", "TERM@60", "32")
    assert sbatch["output"] == "/jobs/mine/finetune/sbatch_mine_%j.out"
    assert not {"requeue", "gpus-per-node", "account", "exclusive"} & {*sbatch}
    assert "\nexport note='a b'\nexport HF_HOME=/hf\nmodule load cuda\n" in script
    assert "export TORCHX_MAX_RETRIES=0\n" in script
    line = next(line for line in script.splitlines() if "nemo_minitron.cli.main" in line)
    assert " --mpi=pmix --label " in line and "--export" not in line


def test_a_flow_is_one_task_of_one_node(capsys, empty):
    chosen = ["model=llama31_8b", "hardware=slurm", "output_dir=out"]
    script = printed(capsys, "flow", *chosen, *CLUSTER, "--launch", "slurm", "--dry-run")
    assert directives(script)["nodes"] == directives(script)["ntasks-per-node"] == "1"
    assert directives(script)["gpus-per-node"] == "8"
    command = step(script)[1]
    agent = ["-m", "nemo_minitron.launch.agent", str(empty / "work")]
    assert command == [sys.executable, *agent, sys.executable, "-m", "nemo_minitron.cli.main", "flow", *chosen]
    said = refused(capsys, "flow", *chosen, "hardware.num_nodes=2", *CLUSTER, "--launch", "slurm", "--dry-run")
    assert "a flow runs on one node" in said and "one by one" in said
    assert "by itself" in refused(capsys, "flow", *chosen, "--launch", "torchrun")


def test_a_file_of_settings_goes_with_the_job(capsys, empty):
    Path("mine.yaml").write_text("defaults:\n  - finetune\n  - _self_\nseed: 7\n")
    arguments = [*STAGES["finetune"], *CLUSTER, "--config-name", "mine.yaml", "--launch", "slurm", "--dry-run"]
    command = step(printed(capsys, "finetune", *arguments))[1]
    assert command[-2:] == ["--config-name", str(empty / "work" / "mine.yaml")]


def test_a_folder_that_nemo_run_would_replace_stays_what_it_is(capsys, empty, monkeypatch):
    here = empty / "nemo_run" / "work"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    launched = [*STAGES["finetune"], *CLUSTER, "--launch", "slurm", "--dry-run"]
    assert "give another slurm.job_dir" in refused(capsys, "finetune", *launched)
    script = printed(capsys, "finetune", *launched, f"slurm.job_dir={empty / 'jobs'}")
    assert step(script)[1][3] == str(here)


@pytest.fixture
def slurm(empty, monkeypatch):
    """Commands that stand for Slurm's on one node: sbatch keeps the script, srun runs its command here."""
    programs = {
        "sbatch": 'printf "%s\\n" "$@" > "$HOME/sbatch"\necho 4711',
        "scontrol": 'if [ "$1" = show ]; then echo node1; else echo "$@" > "$HOME/scontrol"; fi',
        "srun": 'case "$*" in *hostname*) echo 127.0.0.1; exit;; esac\n'
        'while [ "${1#--}" != "$1" ]; do case "$1" in *=*) shift;; *) shift 2;; esac; done\n'
        '"$@"',
    }
    folder = empty / "programs"
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[2]))
    return empty


def test_a_job_is_submitted_and_its_script_brings_back_the_exit_code(slurm, capsys, monkeypatch):
    """The stage fails on two ranks, as its checkpoint is not there; the script asks Slurm to start it again."""
    from nemo_run.run.torchx_backend.schedulers import slurm as scheduler

    monkeypatch.setattr(scheduler, "SLURM_JOB_DIRS", str(slurm / "home" / "jobs"))
    stage = ["finetune", *STAGES["finetune"][:2], "model.nemo_path=a b/out", "hardware=cpu", "trainer.devices=2"]
    stage += ["trainer.accelerator=cpu", *CLUSTER, "--launch", "slurm"]
    assert "none with spaces" in refused(capsys, *stage)
    stage.append("slurm.job_dir=jobs/out")
    shown = printed(capsys, *stage, "--dry-run")
    said = printed(capsys, *stage, "model.global_batch_size=128")
    folder = slurm / "work" / "jobs" / "out"
    assert said == f"submitted job 4711\n  script: {folder}/finetune_sbatch.sh\n  logs: {folder}/finetune\n"
    script = (folder / "finetune_sbatch.sh").read_text()
    assert directives(script) == directives(shown) and "gpus-per-node" not in directives(script)
    assert "--container" not in script
    sbatch = ["--requeue", "--parsable", f"{folder}/finetune_sbatch.sh"]
    assert (slurm / "home" / "sbatch").read_text().splitlines() == sbatch
    environment = {**os.environ, "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node1", "SLURM_NODEID": "0"}
    done = subprocess.run(
        ["bash", str(folder / "finetune_sbatch.sh")], env=environment, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "job exited with code 1\n" in done.stdout
    assert "/teacher" in done.stderr and "does not exist" in done.stderr
    assert (slurm / "home" / "scontrol").read_text() == "requeue 4711\n"


def test_without_slurm_here_nothing_is_written(capsys, empty, monkeypatch):
    monkeypatch.setenv("PATH", str(empty))
    assert cli.main(["finetune", *STAGES["finetune"], *CLUSTER, "--launch", "slurm"]) == 1
    assert "there is no sbatch here" in capsys.readouterr().err
    assert not [*(empty / "work").iterdir()]


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["slurm.account=me"], "partition is missing: name the partition to run in, slurm.partition=NAME"),
        ([*CLUSTER, "trainer.num_nodes=0"], "num_nodes = 0 must be at least 1"),
        ([*CLUSTER, "hardware.num_nodes=0"], "num_nodes = 0 must be at least 1"),
        ([*CLUSTER, "slurm.mounts=[/a]"], "mounts are for a container"),
        ([*CLUSTER, "slurm.container=i", "slurm.mounts=[a:b]"], "'a:b' is neither /PATH nor /SRC:/DST"),
        ([*CLUSTER, "slurm.retries=-1"], "retries = -1 must be at least 0"),
    ],
)
def test_bad_settings_are_refused(capsys, empty, arguments, said):
    assert said in refused(capsys, "finetune", *STAGES["finetune"], *arguments, "--launch", "slurm", "--dry-run")


def test_several_nodes_by_torchrun_need_a_master(capsys, empty, monkeypatch):
    arguments = [*STAGES["finetune"], "trainer.num_nodes=2", "trainer.devices=8", "--launch", "torchrun", "--dry-run"]
    assert "MASTER_ADDR" in refused(capsys, "finetune", *arguments, "model.micro_batch_size=1")
    for name, value in {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    command = printed(capsys, "finetune", *arguments, "model.micro_batch_size=1")
    assert "--rdzv-endpoint node0:29500" in command and "--nnodes 2 --nproc-per-node 8 --node-rank 1" in command


@pytest.mark.parametrize("arguments", [["finetune", "--launch", "pbs"], ["inspect", "m", "--launch", "slurm"]])
def test_unknown_launchers_and_other_commands_end_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "--launch" in capsys.readouterr().err


# Dry runs of single stages.


@pytest.mark.parametrize("stage", ["finetune", "distill", "prune"])
def test_a_dry_run_of_a_stage_says_what_it_reads_and_writes(capsys, empty, stage):
    text = printed(capsys, stage, *STAGES[stage], "hardware=8x80gb", "--dry-run")
    assert "  checkpoint: /" in text and "(not there)" in text and "  out: nemo2, new" in text
    assert "8 rank(s) = 1 node(s) x 8" in text and "\nconfiguration:\n" in text
    assert ("30 steps x 128 samples x 8192 = 31.46M tokens" in text) == (stage != "prune")
    assert not [*(empty / "work").iterdir(), *(empty / "home").iterdir()]


@pytest.mark.parametrize("launcher", launching.LAUNCHERS)
def test_dry_runs_load_no_engine_and_touch_nothing(empty, launcher):
    arguments = ["distill", *STAGES["distill"], *CLUSTER[:1], "--launch", launcher, "--dry-run"]
    code = (
        f"import sys; from nemo_minitron.cli.main import main; code = main({arguments!r})\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'nemo', 'megatron', 'modelopt'}), code)"
    )
    environment = {**os.environ, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("\n[] 0\n"), done.stderr
    assert not [*(empty / "work").iterdir(), *(empty / "home").iterdir()]


# Ranks.


def stop_and_save(code: int, stop: str) -> list[str]:
    """A command that, as torchrun's ranks do, tells its exit code by the file once `stop` is there."""
    text = (
        "import os, sys, time\nfrom nemo_minitron.errors import PreemptedError\n"
        "from nemo_minitron.launch.ranks import tell_parent\nprint('ready', flush=True)\n"
        f"while not os.path.exists({stop}): time.sleep(0.02)\n"
        f"tell_parent(PreemptedError('saved'))\nsys.exit({code})"
    )
    return [sys.executable, "-c", text]


def test_the_agent_turns_sigterm_into_the_file_and_brings_back_the_exit_code(tmp_path):
    command = stop_and_save(1, "os.environ['NEMO_MINITRON_STOP_FILE']")
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    agent = [sys.executable, "-m", "nemo_minitron.launch.agent", str(tmp_path), *command]
    with subprocess.Popen(agent, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 75


@pytest.fixture(scope="module")
def student(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("students") / "student"
    prune(tiny.pruning(path, drop_layers=[3]))
    return path


def test_two_ranks_by_torchrun_stop_and_go_on_and_equal_one(tiny, student, tmp_path):
    """`--launch torchrun` twice: stopped by SIGTERM after a step, then to the end; against one rank in this process."""
    from nemo_minitron.distillation.command import distill

    fields = tiny.training(
        tmp_path / "one", 3, restore_from_path=str(student), kd_teacher_restore_from_path=str(tiny.teacher)
    )
    one = distill(c.DistillConfig(**fields))
    settings = [
        f"model.restore_from_path={student}",
        f"model.kd_teacher_restore_from_path={tiny.teacher}",
        f"model.nemo_path={tmp_path / 'two'}",
        "model.micro_batch_size=4",
        "model.global_batch_size=8",
        f"model.data={{data_prefix:{tiny.data},seq_length:{fields['model'].data.seq_length},num_workers:0}}",
        "model.optim={lr:2e-3,sched:{warmup_steps:2,min_lr:2e-4}}",
        "trainer.max_steps=3",
        "trainer.val_check_interval=1",
        "trainer.limit_val_batches=2",
        "hardware=cpu",
        "hardware.devices=2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    command = [sys.executable, "-m", "nemo_minitron", "distill", *settings, "--launch", "torchrun"]

    def start(log: Path) -> subprocess.Popen:
        return subprocess.Popen(command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)

    with start(tmp_path / "log") as process:
        while not (tmp_path / ".two.partial").exists() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 75, (tmp_path / "log").read_text()[-3000:]
    assert "after step 1 of 3" in (tmp_path / "log").read_text()
    with start(tmp_path / "log") as process:
        pass
    assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    assert f"distill: {tmp_path / 'two'}\n" in (tmp_path / "log").read_text()
    manifest = Manifest.read(tmp_path / "two")
    for expected, got in zip(one.metrics["train"], manifest.metrics["train"], strict=True):
        assert got == pytest.approx(expected, abs=2e-4)
    weights, other = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    assert weights.keys() == other.keys()
    assert all(torch.allclose(other[name], tensor, atol=5e-4) for name, tensor in weights.items())


def test_pruning_by_torchrun_cuts_once(tiny, tmp_path):
    """Scores, scan and refit on two ranks, the cut by the first; against a cut of the same scores in this process."""
    settings = [
        f"model.restore_from_path={tiny.teacher}",
        f"model.data={{data_prefix:{tiny.data},seq_length:64}}",
        f"prune.scores_path={tmp_path / 'scores'}",
        "prune.num_layers=3",
        "prune.num_layers_divisor=1",
        "prune.num_samples=16",
        "prune.num_block_samples=16",
        "inference.batch_size=8",
        f"export.save_path={tmp_path / 'two'}",
        "hardware=cpu",
        "hardware.prune_pipeline_model_parallel_size=2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    command = [sys.executable, "-m", "nemo_minitron", "prune", *settings, "--launch", "torchrun"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two = Manifest.read(tmp_path / "two")
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("scores*/manifest.json")}
    again = tiny.pruning(tmp_path / "one", num_layers=3, method="compensated", scores_path=str(tmp_path / "scores"))
    again.trainer.devices = again.model.pipeline_model_parallel_size = 2
    one = prune(again)
    found = {path: path.stat().st_mtime_ns for path in tmp_path.glob("scores*/manifest.json")}
    assert len(made) == 3 and found == made
    assert two.details["plan"] == one.details["plan"]
    weights, other = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    assert weights.keys() == other.keys()
    assert all(torch.allclose(other[name], tensor, atol=1e-5) for name, tensor in weights.items())


def test_a_config_is_checked_before_anything_is_launched():
    config = compose("finetune", STAGES["finetune"])
    with pytest.raises(ConfigError, match="partition"):
        launching.check("finetune", config, c.SlurmConfig(), "slurm")
