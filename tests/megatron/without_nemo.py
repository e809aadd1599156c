"""Runs commands of `minitron` as on a machine that has no NeMo, no Lightning and no NeMo-Run.

    python without_nemo.py COMMANDS

COMMANDS is a JSON file: a list of argument lists. Prints one JSON line a command: exit code, and what it printed on
standard output and standard error. A module that is None in sys.modules is neither found nor imported.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

ABSENT = ("nemo", "lightning", "pytorch_lightning", "nemo_run")


def run(arguments: list[str]) -> dict:
    from nemo_minitron.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(ABSENT))
    import nemo_minitron.integrations.connectors  # noqa: F401

    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(run(arguments)), flush=True)
