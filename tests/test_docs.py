"""What README, CONTRIBUTING and docs/ name is there: files, modules and pages."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.rst", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.rst"))]
#: Words in code style that are the path of a Python file, of a test or of a page, from the root or from the package.
FILE = re.compile(r"`([\w./-]+/[\w.-]+\.(?:py|rst|md|ipynb|txt|sh))(?:::\w+)?(?:`| )")
LINK = re.compile(r"<([\w./-]+\.(?:rst|md|png))>|image:: (\S+)|\]\(([\w./-]+\.md)\)")
MODULE = re.compile(r"(?<![\w./-])nemo_minitron(?:\.\w+)+")


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


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
