"""What README, CONTRIBUTING and docs/ name is there: files, modules, pages, commands and targets of make."""

import importlib.util
import itertools
import re
from pathlib import Path

import pytest

from nemo_minitron.config.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.rst"))
PAGES = [ROOT / "README.rst", ROOT / "CONTRIBUTING.md", *DOCS]
#: Words in code style that are the path of a Python file, of a test or of a page, from the root or from the package.
FILE = re.compile(r"`([\w./-]+/[\w.-]+\.(?:py|rst|md|ipynb|txt|sh))(?:::\w+)?(?:`| )")
LINK = re.compile(r"<([\w./-]+\.(?:rst|md|png))>|image:: (\S+)|\]\(([\w./-]+\.md)\)")
MODULE = re.compile(r"(?<![\w./-])nemo_minitron(?:\.\w+)+")
COMMAND = re.compile(r"(?:`|^    |\$ )minitron ([a-z]\w*)", re.MULTILINE)
TARGET = re.compile(r"(?:`|^    )make ([a-z][\w-]*)", re.MULTILINE)
#: Lines that may be longer: what is printed or typed as it stands, a link, a command.
WHOLE = re.compile(r"^ {4}|<http\S+>|^``[^`]+``:$")
WIDTH = 120
WRITTEN = "commands.rst"  # by nemo_minitron.cli.reference


def there(path: str, page: Path) -> bool:
    return any((folder / path).exists() for folder in (ROOT, ROOT / "nemo_minitron", page.parent))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_pages_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    links = {next(filter(None, groups)) for groups in LINK.findall(text)}
    named = {path for path in FILE.findall(text) if not path.startswith(("examples/nemotron", "/"))}
    assert [path for path in sorted(named) if not there(path, page)] == []
    assert [path for path in sorted(links) if not (page.parent / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_are_named_exist(page):
    lost = []
    for name in sorted(set(MODULE.findall(page.read_text(encoding="utf-8")))):
        parts = name.split(".")
        known = next(n for n in range(len(parts), 0, -1) if _is_module(".".join(parts[:n])))
        lost += [name] if len(parts) - known > 1 else []  # a name inside a module is at most one step below it
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_targets_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {*COMMAND.findall(text)} <= {*COMMANDS}
    assert {*TARGET.findall(text)} <= targets


@pytest.mark.parametrize("page", [page for page in DOCS if page.name != WRITTEN], ids=lambda page: page.name)
def test_prose_is_no_wider_than_code(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > WIDTH and not WHOLE.search(line)] == []


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".rst"], ids=lambda page: page.name)
def test_titles_are_underlined_whole(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    short = [
        title
        for title, under in itertools.pairwise(lines)
        if title.strip() and re.fullmatch(r"={3,}|-{3,}|~{3,}", under) and not re.fullmatch(r"[=~ -]+", title)
        and len(under) < len(title)
    ]  # fmt: skip
    assert short == []
