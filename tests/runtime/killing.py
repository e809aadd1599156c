"""Runs a stage again and again in forked processes, and kills each at an event of its own choice.

    python killing.py JOBS

JOBS is a JSON file: a list of {"stage", "config_class", "config", "partial", "kill_at"}. An event: a file opened for
writing, renamed or removed under `partial`, or a training step begun. Before event number `kill_at` the process and its
children are killed. Prints one JSON line a job: events seen, or null where it was killed. The engines are imported
once, before any fork; no thread is started until then.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

COUNTED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def run(job: dict, write: int) -> None:
    """The stage, in a process group of its own."""
    from nemo_minitron.runtime import history
    from nemo_minitron.runtime.launch import _load, from_dict

    seen, main = 0, os.getpid()

    def event() -> None:
        nonlocal seen
        seen += 1
        if seen == job["kill_at"]:
            os.killpg(0, signal.SIGKILL)

    def audit(name: str, arguments: tuple) -> None:
        if name in COUNTED and os.getpid() == main and job["partial"] in str(arguments[0]):
            reading = name == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
            if not reading:
                event()

    begin = history.History.on_train_batch_start

    def on_train_batch_start(self, *arguments) -> None:
        event()
        begin(self, *arguments)

    history.History.on_train_batch_start = on_train_batch_start
    sys.addaudithook(audit)
    _load(job["stage"])(from_dict(_load(job["config_class"]), job["config"]))
    os.write(write, str(seen).encode())


def main() -> None:
    import modelopt.torch.distill  # noqa: F401
    from nemo.collections import llm  # noqa: F401

    import nemo_minitron.runtime.history  # noqa: F401

    for job in json.loads(Path(sys.argv[1]).read_text()):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()
            status = 1
            try:
                run(job, write)
                status = 0
            finally:
                os._exit(status)
        os.close(write)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(
                child, signal.SIGKILL
            )  # Megatron's process for write results outlives a stage, and holds its pipes
        said = os.read(read, 64)
        os.close(read)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and status:
            sys.exit(f"a stage failed with status {status}")
        print(json.dumps({"killed": killed, "events": int(said) if said else None}), flush=True)


if __name__ == "__main__":
    main()
