"""What is installed: the wheel with its core dependencies alone, what the extras name, and the locks."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import models
from nemo_minitron.packages.extras import CORE, EXTRAS, NAME

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = PROJECT["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
PYTHONS = ("3.10", "3.11", "3.12")
SOURCES = ("nemo_minitron", "requirements", "pyproject.toml", "README.rst", "LICENSE")


def requirements(*files: str, python: str | None = None) -> list[Requirement]:
    """What requirements files ask for on a Python (None: this one), those that they name with -r included."""
    wanted = []
    for file in files:
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            if line.startswith("-r "):
                wanted += requirements(line.removeprefix("-r "), python=python)
            elif line and not line.startswith("#"):
                wanted.append(Requirement(line))
    environment = {"python_version": python} if python else {}
    return [each for each in wanted if each.marker is None or each.marker.evaluate(environment)]


def closure(wanted: list[Requirement]) -> set[str]:
    """Names of all that `wanted` brings in this environment, by the metadata of what is installed."""
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(each.name), extra) for each in wanted for extra in ("", *each.extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen or name in without_cuda():
            continue
        seen.add((name, extra))
        for line in metadata.requires(name) or ():
            each = Requirement(line)
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(each.name), more) for more in ("", *each.extras)]
    return {name for name, _ in seen}


def without_cuda() -> set[str]:
    return {each.name for each in requirements("requirements/without-cuda.txt")}


def lock(python: str) -> dict[str, str]:
    """Name -> version of a lock; every line is one pin and nothing else."""
    lines = (ROOT / f"requirements/lock-{python}.txt").read_text(encoding="utf-8").splitlines()
    pins = [re.fullmatch(r"([a-z0-9-]+)==([\w.]+)", line) for line in lines if not line.startswith("#")]
    assert all(pins)
    return dict(pin.groups() for pin in pins)


@pytest.mark.parametrize("python", PYTHONS)
def test_a_lock_holds_every_pin_and_nothing_of_cuda(python):
    locked = lock(python)
    for each in requirements("requirements.txt", python=python):
        assert str(each.specifier) == f"=={locked[canonicalize_name(each.name)]}"
    assert not without_cuda() & locked.keys()
    assert {name for name in locked if name.startswith("nvidia-")} == {"nvidia-ml-py", "nvidia-modelopt"}
    for each in map(Requirement, PROJECT["project"]["dependencies"]):
        assert each.specifier.contains(locked[canonicalize_name(each.name)])


def test_the_lock_of_this_python_is_complete():
    locked = lock(f"{sys.version_info[0]}.{sys.version_info[1]}")
    assert closure(requirements("requirements.txt")) <= locked.keys()


def test_requirements_are_those_of_all_extras_together():
    named = {str(each) for files in PINS.values() for file in files["file"] for each in requirements(file)}
    assert named == {str(each) for each in requirements("requirements.txt")}
    assert PINS.keys() == {*EXTRAS, "dev"}


def imported() -> set[str]:
    """Top-level modules that the package imports anywhere, beyond its own and Python's."""
    modules = set()
    for file in (ROOT / "nemo_minitron").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            modules |= {name.partition(".")[0] for name in names}
    return modules - sys.stdlib_module_names - {"nemo_minitron"}


def test_every_module_that_is_imported_has_its_extra():
    assert imported() <= {*CORE, *(module for modules in EXTRAS.values() for module in modules)}
    holders = metadata.packages_distributions()
    core = closure([Requirement(line) for line in PROJECT["project"]["dependencies"]])
    brought = {extra: closure(requirements(*PINS[extra]["file"])) for extra in EXTRAS}
    for module in CORE:
        assert {canonicalize_name(name) for name in holders[module]} & core, module
    for extra, modules in EXTRAS.items():
        for module in modules:
            assert {canonicalize_name(name) for name in holders[module]} & brought[extra], (extra, module)
            assert not {canonicalize_name(name) for name in holders[module]} & core, module


class Installed:
    """The wheel in a virtual environment that sees the core dependencies and nothing else."""

    def __init__(self, folder: Path):
        self.folder, self.wheel = folder, build(folder)
        run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
        self.python = folder / "venv" / "bin" / "python"
        site = Path(run(self.python, "-c", "import site; print(site.getsitepackages()[0])").stdout.strip())
        for name in closure([Requirement(line) for line in PROJECT["project"]["dependencies"]]):
            link(name, site)
        run(*self.pip, "install", "--quiet", "--no-index", "--no-deps", self.wheel)

    @property
    def pip(self) -> list:
        return [sys.executable, "-m", "pip", "--python", self.python]

    def minitron(self, *arguments, expected: int = 0) -> str:
        """What the command prints, on standard error where it is to fail."""
        done = run(self.python.with_name("minitron"), *arguments, cwd=self.folder, check=False)
        assert done.returncode == expected, done.stdout + done.stderr
        return done.stderr if expected else done.stdout


def run(*command, cwd=None, check: bool = True) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def build(folder: Path) -> Path:
    """Builds the wheel from a copy of what it is made of: nothing that lies about in the tree gets into it."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        path, ignore = ROOT / name, shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, source / name, ignore=ignore) if path.is_dir() else shutil.copy(path, source / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source)
    return next(folder.glob("*.whl"))


def link(name: str, site: Path) -> None:
    """Makes a distribution of this environment visible in another's site-packages."""
    distribution = metadata.distribution(name)
    for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
        (site / top).symlink_to(distribution.locate_file(top))


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def llama(installed) -> Path:
    """A small Hugging Face directory, converted and cut by the installed command."""
    folder = models.save("llama3", torch.bfloat16, installed.folder / "llama")
    installed.minitron("convert", folder, "nemo2")
    installed.minitron(
        "prune", "model.restore_from_path=nemo2", "prune.drop_layers=[2]", "prune.num_layers_divisor=1",
        "export.save_path=cut",
    )  # fmt: skip
    return folder


def test_the_wheel_holds_the_whole_package(installed):
    held = {name for name in zipfile.ZipFile(installed.wheel).namelist() if not name.startswith("nemo_minitron-")}
    package = {*(ROOT / "nemo_minitron").rglob("*.*")}
    files = {str(file.relative_to(ROOT)) for file in package if file.is_file() and file.suffix != ".pyc"}
    assert held == files


def test_conf_shows_the_presets_that_are_installed():
    presets = ROOT / "nemo_minitron" / "config" / "presets"
    shown = {file.relative_to(ROOT / "conf"): file.read_bytes() for file in (ROOT / "conf").rglob("*.yaml")}
    assert shown == {file.relative_to(presets): file.read_bytes() for file in presets.rglob("*.yaml")}


def test_its_core_dependencies_are_enough_for_pip_and_hold_no_engine(installed):
    assert "No broken requirements" in run(*installed.pip, "check").stdout
    lacking = (
        "import importlib.util as u; print([name for name in ('torch', 'transformers', 'nemo') if u.find_spec(name)])"
    )
    assert run(installed.python, "-c", lacking).stdout == "[]\n"


def test_what_needs_no_engine_works(installed, llama):
    assert "commands:" in installed.minitron("--help")
    assert "hidden 3072, FFN 9216" in installed.minitron("plan", "minitron_4b")
    assert "all finite" in installed.minitron("inspect", llama, "--values")
    assert "prune depth: drop_layers=['16-31']" in installed.minitron("flow", "model=llama31_8b", "--dry-run")
    assert "usage: minitron convert SRC DST" in installed.minitron("convert", "--help")
    cut = json.loads(installed.minitron("inspect", "cut", "--json"))
    assert cut["architecture"]["num_layers"] == 1
    assert "page: cut/report.html" in installed.minitron("report", "cut")


def test_conversions_keep_every_bit_and_round_as_torch_does(installed, llama):
    for source, output, *more in (
        ("nemo2", "llama.nemo"),
        ("nemo2", "zarr.nemo", "weights=zarr"),
        ("llama.nemo", "same", "--to", "hf"),
        ("zarr.nemo", "wide", "--to", "hf", "dtype=32"),
        ("wide", "half", "--to", "hf", "dtype=fp16"),
    ):
        installed.minitron("convert", source, output, *more)
    start, same, wide, half = (models.stored(installed.folder / name) for name in ("llama", "same", "wide", "half"))
    assert models.equal(start, same)
    assert models.equal({name: tensor.float() for name, tensor in start.items()}, wide)
    assert models.equal({name: tensor.half() for name, tensor in start.items()}, half)


TRAINING = ["model.data.data_prefix=data", "model.nemo_path=trained"]
#: Command -> arguments, the first module that is missing, and the extras that bring it.
MORE = {
    "data": (["output=data"], "tokenizers", "engine"),
    "finetune": (["model.restore_from_path=nemo2", *TRAINING], "torch", "engine"),
    "distill": (
        ["model.restore_from_path=cut", "model.kd_teacher_restore_from_path=nemo2", *TRAINING, "--launch", "torchrun"],
        "nemo_run", "engine",
    ),
    "flow": (["output_dir=flow"], "torch", "engine,evaluate"),
    "convert": (["nemo2", "checked", "verify=logits"], "torch", "engine"),
    "quantize": (["llama", "output=quantised", "data.source=embedded"], "modelopt", "engine"),
    "evaluate": (["llama", "tasks=facts", "tokenizer=llama"], "torch", "evaluate"),
    "generate": (["cut", "text", "tokenizer=llama"], "torch", "evaluate"),
    "benchmark": (["llama"], "torch", "evaluate"),
}  # fmt: skip


@pytest.mark.parametrize("command", MORE)
def test_a_command_that_needs_more_names_the_extra(installed, llama, command):
    arguments, module, extras = MORE[command]
    last = installed.minitron(command, *arguments, expected=1).splitlines()[-1]
    assert last == f"minitron {command} needs {module}: pip install '{NAME}[{extras}]'"


def test_ranks_need_it_too(installed, llama):
    arguments = ["model.restore_from_path=nemo2", *TRAINING, "trainer.devices=2"]
    assert f"needs torch: pip install '{NAME}[engine]'" in installed.minitron("finetune", *arguments, expected=1)
