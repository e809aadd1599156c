"""Run as a script: the smallest flow with one rank and with two, whose losses have to be the same.

Too slow for the tests: each stage of two ranks starts processes that import NeMo. `make test-container` runs it.
"""

import json
import sys
import tempfile
from pathlib import Path

from test_flow import SMALL

from nemo_minitron.cli.main import main

TOLERANCE = 2e-4


def losses(folder: Path, ranks: int) -> dict[str, float]:
    """Test loss of each model of a flow."""
    chosen = ["distill.control=false", "hardware=cpu", "hardware.micro_batch_size=4", f"hardware.devices={ranks}"]
    if main(["flow", f"output_dir={folder}", *SMALL, *chosen]):
        sys.exit(f"the flow failed with {ranks} rank(s)")
    table = json.loads((folder / "report.json").read_text(encoding="utf-8"))["table"]
    return {row["model"]: row["test"]["loss"] for row in table}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="minitron-") as place:
        one, two = (losses(Path(place) / f"ranks-{ranks}", ranks) for ranks in (1, 2))
    apart = {model: abs(one[model] - two[model]) for model in one}
    print(json.dumps({"one rank": one, "two ranks": two, "largest difference": max(apart.values())}, indent=2))
    sys.exit(one.keys() != two.keys() or max(apart.values()) > TOLERANCE)
