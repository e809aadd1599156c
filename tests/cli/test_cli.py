"""The command line: help, exit codes, one message an error, ranks, and its other doors."""

import io
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from nemo_minitron import __version__
from nemo_minitron.artifacts import Manifest
from nemo_minitron.cli import main as cli
from nemo_minitron.cli import reference
from nemo_minitron.config import FlowConfig
from nemo_minitron.config.commands import COMMANDS
from nemo_minitron.config.compose import presets, read, read_launch
from nemo_minitron.config.reflect import leaf_values, setting_docs
from nemo_minitron.errors import CheckpointError, ConfigError
from nemo_minitron.packages.extras import NAME

ROOT = Path(__file__).resolve().parents[2]
NAMED = ["model.restore_from_path=teacher", "prune.drop_layers=[1]", "export.save_path=cut"]
HEAVY = ("torch", "numpy", "hydra", "omegaconf", "nemo", "megatron", "modelopt", "transformers")


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def stage(monkeypatch):
    """Stands in for every stage: records the configuration it is called with, returns or raises `result`."""

    class Stage:
        result = None
        config = None

        def __call__(self, config):
            self.config = config
            if isinstance(self.result, BaseException):
                raise self.result
            return self.result

    stub = Stage()
    monkeypatch.setattr(cli.pkgutil, "resolve_name", lambda reference: stub)
    return stub


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_overview_names_every_command(arguments, capsys):
    assert cli.main(arguments) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in COMMANDS)


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert cli.main(["\udce9ü"]) == cli.USAGE_ERROR
    cli.say("caf\udce9 ± ü")
    assert sys.stdout.buffer.getvalue() == b"caf\\udce9 \\xb1 \\xfc\n"
    assert b"\\xfc' is not a command" in sys.stderr.buffer.getvalue()


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"minitron {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name, capsys):
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: minitron {name} ")
    settings = leaf_values(read(name))
    docs = setting_docs(COMMANDS[name].schema)
    assert settings and all(f"\n  {key}=" in text and f"\n      {docs[key]}\n" in f"{text}\n" for key in settings)
    shown = [place for _, place in COMMANDS[name].positionals] + [o.flag for o in COMMANDS[name].options]
    assert all(word in text for word in shown)


def test_help_shows_presets_and_the_settings_as_chosen(capsys):
    assert cli.main(["flow", "--help", "model=llama31_8b"]) == 0
    text = capsys.readouterr().out
    names = "auto|llama31_8b|llama32_1b|llama32_3b|minitron_4b|minitron_8b|qwen3_0.6b|qwen3_1.7b|qwen3_4b|qwen3_8b"
    assert f"model={names}|smollm2_135m|tiny" in text
    assert "model.seq_length=8192" in text
    assert "data.limit_documents=null" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_function_without_loading_the_engine(name):
    code = f"import pkgutil, sys; f = pkgutil.resolve_name({COMMANDS[name].function!r})"
    done = python("-c", f"{code}; assert callable(f); sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_help_and_version_load_nothing_heavy():
    code = "import sys; from nemo_minitron.cli.main import main; main(['--help']); print(*sys.modules)"
    loaded = python("-c", code).stdout.splitlines()[-1].split()
    assert "nemo_minitron.cli.main" in loaded
    assert not {*HEAVY} & {*loaded}


def test_a_mistyped_command_is_suggested(capsys):
    assert cli.main(["prnue"]) == 2
    assert capsys.readouterr().err == "minitron: 'prnue' is not a command; did you mean prune?\n"
    assert cli.main(["zzz"]) == 2
    assert "there are data, finetune" in capsys.readouterr().err


def test_an_unknown_option_exits_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["prune", "--verbose"])
    assert caught.value.code == 2


def test_a_wrong_configuration_is_one_message(stage, capsys):
    assert cli.main(["data", "wrods=3", "workers=many"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "wrods is not a setting; did you mean words?" in captured.err
    assert "workers = 'many' is not a whole number" in captured.err
    assert "Traceback" not in captured.err
    assert stage.config is None


def test_success_tells_where_and_what(stage, capsys):
    metrics = {"loss": 1.23456789, "tokens": 12, "table": [1]}
    stage.result = Manifest(stage="data", key="k", inputs={}, config={}, seed=0, metrics=metrics)
    assert cli.main(["data", "output=/out", "seed=3"]) == 0
    assert capsys.readouterr().out == "data: /out\n  loss: 1.23457\n  tokens: 12\n"
    assert stage.config.seed == 3


def test_options_stand_anywhere_between_overrides(stage):
    assert cli.main(["flow", "seed=3", "--debug", "dry_run=true", "--local-rank=0", "--config-name", "flow"]) == 0
    assert stage.config == FlowConfig(**{**vars(stage.config), "seed": 3, "dry_run": True})


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["convert", "in.nemo", "out"], {"source": "in.nemo", "output": "out", "to": None}),
        (["convert", "--to", "hf", "in.nemo", "out"], {"source": "in.nemo", "output": "out", "to": "hf"}),
        (["convert", "in.nemo", "--to=hf", "seed=3", "out"], {"output": "out", "to": "hf", "seed": 3}),
        (["convert", "source=a", "output=b", "to=nemo2"], {"source": "a", "output": "b", "to": "nemo2"}),
        (["convert", "output=b", "a"], {"source": "a", "output": "b"}),
        (["convert", "+seed=3", "~seed", "./lr=1e-4/m", "runs/x=1,y.nemo"], {"source": "./lr=1e-4/m", "seed": 1234}),
        (["convert", "/a/b (1)", "3=4", "weights=torch_dist"], {"source": "/a/b (1)", "output": "3=4"}),
        (["inspect", "m"], {"source": "m", "json": False, "values": False}),
        (["inspect", "--values", "m", "--json"], {"source": "m", "json": True, "values": True}),
        (["download", "hf://acme/llama@v1"], {"source": "hf://acme/llama@v1", "output": None}),
        (["report", "run a", "b,c", "output=x.html"], {"runs": ["run a", "b,c"], "output": "x.html"}),
        (["download", "ngc://acme/llama:1.0", "here"], {"source": "ngc://acme/llama:1.0", "output": "here"}),
        (["flow", "--dry-run"], {"dry_run": True}),
    ],
)
def test_positional_arguments_and_options_are_settings(stage, arguments, expected):
    assert cli.main(arguments) == 0
    assert {name: getattr(stage.config, name) for name in expected} == expected


def test_one_argument_too_many_says_the_usage(stage, capsys):
    assert cli.main(["convert", "a", "b", "to=hf", "c"]) == 2
    assert capsys.readouterr().err == (
        "minitron convert: 'c' is one argument too many; usage: minitron convert SRC DST [--to FORMAT] "
        "[key=value ...] [--config-name NAME] [--debug] [--help]\n"
    )
    assert cli.main(["inspect"]) == 2
    assert capsys.readouterr().err.startswith("minitron inspect: source is missing: ")
    assert cli.main(["data", "corpus.txt"]) == 2
    assert "'corpus.txt' is not of the form key=value" in capsys.readouterr().err
    assert stage.config is None


def test_help_takes_positional_arguments_too(capsys):
    assert cli.main(["convert", "a", "b", "--to", "hf", "--help"]) == 0
    text = capsys.readouterr().out
    assert "\n  source=a\n" in text and "\n  output=b\n" in text and "\n  to=hf\n" in text


def test_options_belong_to_their_commands(capsys):
    for arguments in (["inspect", "m", "--dry-run"], ["prune", "--json"], ["convert", "a", "b", "--to"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        assert f"usage: minitron {arguments[0]} " in capsys.readouterr().err


def test_a_download_names_the_command_to_run_next(stage, capsys):
    stage.result = Manifest(stage="download", key="k", inputs={}, config={}, seed=0, metrics={"files": 2})
    assert cli.main(["download", "ngc://acme/llama:1.0"]) == 0
    assert capsys.readouterr().out == "download: llama_v1.0\n  files: 2\nnext: minitron inspect llama_v1.0\n"


@pytest.mark.parametrize(
    "raised, code, message",
    [
        (CheckpointError("no weights in /x"), 1, "no weights in /x\n"),
        (RuntimeError("bad\nthing"), 70, "internal error: RuntimeError: bad (run again with --debug)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_are_one_message_and_a_code(stage, capsys, raised, code, message):
    stage.result = raised
    assert cli.main(["flow"]) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    "command, missing, code, message",
    [
        ("flow", "torch.nothing", 1, f"lacks: pip install '{NAME}[engine,evaluate]'\n"),
        ("evaluate", "torch.nothing", 1, f"lacks: pip install '{NAME}[evaluate]'\n"),
        ("evaluate", "megatron.nothing", 1, f"lacks: pip install '{NAME}[engine]'\n"),
        ("prune", "numpy.nothing", 1, f"lacks: pip install {NAME}\n"),
        ("prune", "transformer_engine.pytorch", 1, "needs transformer_engine, which is not installed here\n"),
        ("prune", "nemo_minitron.nothing", 70, "No module named 'nemo_minitron.nothing' (run again with --debug)\n"),
        ("prune", "packaging.nothing", 70, "No module named 'packaging.nothing' (run again with --debug)\n"),
    ],
)
def test_a_missing_module_says_what_to_install(stage, capsys, command, missing, code, message):
    stage.result = ModuleNotFoundError(f"No module named {missing!r}", name=missing)
    needed = {"evaluate": ["models=[m]"], "prune": NAMED}.get(command, [])
    assert cli.main([command, *needed]) == code
    told = capsys.readouterr().err
    assert told.endswith(message) and told.count("\n") == 1
    if message.startswith("lacks"):
        package = missing.partition(".")[0].replace("megatron", "megatron-core")
        held = f"{package} {metadata.version(package)}, installed here"
        assert told.startswith(f"minitron {command} needs {missing}, which {held}, lacks")


@pytest.mark.parametrize("raised", [CheckpointError("no weights"), RuntimeError("bad")])
def test_debug_shows_the_traceback(stage, capsys, raised):
    stage.result = raised
    assert cli.main(["flow", "--debug"]) != 0
    assert "Traceback" in capsys.readouterr().err


def test_other_ranks_tell_only_errors_of_their_own(stage, capsys, monkeypatch):
    monkeypatch.setattr(cli, "GRACE_SECONDS", 0)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    stage.result = Manifest(stage="flow", key="k", inputs={}, config={}, seed=0)
    assert cli.main(["flow"]) == 0
    assert capsys.readouterr() == ("", "")
    stage.result = RuntimeError("bad")
    assert cli.main(["flow"]) == 70
    assert capsys.readouterr().err.startswith("rank 3: internal error")


NEMO = [name for name, command in COMMANDS.items() if command.nemo_names]


def test_every_command_with_nemos_names_has_its_script():
    assert {path.stem for path in (ROOT / "scripts").glob("*.py")} == {f"megatron_{name}" for name in NEMO}


@pytest.mark.parametrize("name", NEMO)
def test_scripts_are_the_same_commands(name):
    done = python(f"scripts/megatron_{name}.py", "trainer.devices=abc")
    assert (done.returncode, done.stderr) == (2, f"minitron {name}: trainer.devices = 'abc' is not a whole number\n")


def test_the_module_is_the_same_command():
    assert python("-m", "nemo_minitron", "--version").stdout == f"minitron {__version__}\n"


def test_nemo_run_offers_the_commands():
    nemo = Path(sys.executable).with_name("nemo")
    done = python(str(nemo), "minitron", "data", "wrods=3", "--debug")
    assert done.returncode == 2
    assert "wrods is not a setting; did you mean words?" in done.stderr


def test_what_can_be_launched_is_what_may_hold_settings_of_launching():
    for name, command in COMMANDS.items():
        if command.launched:
            assert read_launch(name, ["slurm.partition=batch"]).slurm.partition == "batch"
        else:
            with pytest.raises(ConfigError, match="slurm.partition is not a setting"):
                read_launch(name, ["slurm.partition=batch"])


def test_the_documentation_is_what_the_table_of_commands_gives(tmp_path, capsys):
    """And names every command, option, preset's group and setting."""
    file = ROOT / "docs" / "commands.rst"
    assert reference.main(["--check", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        section = text.split(f"\n{name}\n{'-' * len(name)}\n")[1].split("\n---")[0]
        flags = [f"``{option.shown}``" for option in command.flags]
        names = [f"``{setting}``: " for setting in leaf_values(read(name))]
        assert all(word in section for word in [*flags, *names, *(f"``{group}=``" for group in presets(name))])
    (tmp_path / "commands.rst").write_text(text.replace("Softmax", "softmax"), encoding="utf-8")
    assert reference.main(["--check", str(tmp_path / "commands.rst")]) == 1
    assert "is not what the table of commands gives" in capsys.readouterr().err
    assert reference.main([str(tmp_path / "commands.rst")]) == 0
    assert (tmp_path / "commands.rst").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("arguments", "code"),
    [("--help", 0), ("plan llama31_8b hardware=8x80gb 2>&1", 0), ("plan nowhere 2>&1", cli.USAGE_ERROR)],
)
def test_a_reader_that_leaves_is_no_error(arguments, code):
    """Where a command itself prints, too, and where it tells of an error."""
    command = f"{sys.executable} -m nemo_minitron {arguments} | true; echo ${{PIPESTATUS[0]}}"
    for _ in range(3):
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == (f"{code}\n", "")
