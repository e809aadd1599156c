"""Fails where a notebook was saved with an error, without the outputs of a whole run, or with another preset.

    python notebooks/check.py [NOTEBOOK ...]

Part of `make check`. A notebook is committed as a run from its top to its end left it: code cells have numbers that
ascend from 1, and no output is an error.
"""

import json
import sys
from pathlib import Path

PRESET_LINE = 'PRESET = "tiny"'
#: Notebooks that are saved with another preset.
OTHERS = {"00_a_real_model": 'PRESET = "smollm2"'}


def problems(path: Path) -> list[str]:
    """What is wrong with the notebook at `path`."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"is no notebook: {error!r}"]
    code = [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    found = []
    if not code:
        found.append("has no code")
    line = OTHERS.get(path.stem, PRESET_LINE)
    if not any("".join(cell["source"]).startswith(line) for cell in code):
        found.append(f"has no cell that starts with {line}")
    if not any(cell["outputs"] for cell in code):
        found.append("was saved without outputs")
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("was not saved after one run from top to end")
    for number, cell in enumerate(code, 1):
        errors = [output for output in cell["outputs"] if output["output_type"] == "error"]
        found += [f"code cell {number} ended with {error['ename']}: {error['evalue']}" for error in errors]
    return found


def main(names: list[str]) -> int:
    """Checks the notebooks named, or all beside this file; returns the exit code."""
    paths = [Path(name) for name in names] or sorted(Path(__file__).parent.glob("*.ipynb"))
    found = [f"{path}: {problem}" for path in paths for problem in problems(path)]
    if not paths:
        found.append(f"{Path(__file__).parent}: there is no notebook")
    print("\n".join(found) or f"{len(paths)} notebooks saved whole", file=sys.stderr if found else sys.stdout)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
