"""Watches over a command that runs ranks on this node: `python -m nemo_minitron.launch.agent FOLDER COMMAND ...`

torchrun, on SIGTERM, kills its ranks 30 seconds later, which is too short for a large model to save; and its own exit
code says nothing of theirs. So this process takes SIGTERM, makes the file that every rank looks at after each step,
and ends with the exit code of the rank that failed first. Slurm's usual process tracking (proctrack/cgroup) signals the
task that it started, which is this one, and not the processes below it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.jobs.progress import ERROR_FILE
from nemo_minitron.launch.preemption import STOP_FILE, passed_on

#: What torchrun itself takes to end its ranks after an interrupt, and some more.
END_SECONDS = 45


def supervise(command: Sequence[str], environment: dict[str, str] | None = None, directory: str | None = None) -> int:
    """Runs `command`, its output going where this process's goes, and returns the exit code of the stage it runs."""
    with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
        stop_file, error_file = Path(folder) / "stop", Path(folder) / "error.json"
        told = {STOP_FILE: str(stop_file), ERROR_FILE: str(error_file)}
        with passed_on(stop_file):
            code = _run(command, {**os.environ, **(environment or {}), **told}, directory)
        if code and error_file.exists():
            return json.loads(error_file.read_text(encoding="utf-8"))["exit_code"]
        return code if code >= 0 else 128 - code


def _run(command: Sequence[str], environment: dict[str, str], directory: str | None) -> int:
    with subprocess.Popen(command, env=environment, cwd=directory) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.wait(END_SECONDS)  # the terminal interrupts it as well
            raise
        finally:
            if child.poll() is None:
                child.kill()


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[2:], directory=sys.argv[1]))
