"""Runs stages again and again in forked processes, and kills them at events of its own choice.

    python killing.py JOBS

JOBS is a JSON file: a list of {"stage", "config_class", "config", "folder", "kills", "seed"}. An event: a file opened
for writing, renamed or removed in the output's hidden folder, or a training step begun. Each stage runs to its end in
`folder`/alone; then, for each of `kills` moments drawn among its events, to `folder`/killed-MOMENT: the process and its
children are killed before that event, and the same stage runs once more. Prints one JSON line a job: events, moments,
and whether each of the runs after the first was killed. The engines are imported once, before any fork; no thread is
started until then.
"""

import contextlib
import gc
import json
import os
import pkgutil
import random
import signal
import sys
from pathlib import Path

COUNTED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def run(job: dict, output: Path, kill_at: int, write: int) -> None:
    """The stage, in a process group of its own."""
    from nemo_minitron.launch.ranks import from_dict
    from nemo_minitron.training import history

    seen, main, partial = 0, os.getpid(), str(output.with_name(f".{output.name}.partial"))

    def event() -> None:
        nonlocal seen
        seen += 1
        if seen == kill_at:
            os.killpg(0, signal.SIGKILL)

    def audit(name: str, arguments: tuple) -> None:
        if name in COUNTED and os.getpid() == main and partial in str(arguments[0]):
            reading = name == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
            if not reading:
                event()

    begin = history.History.on_train_batch_start

    def on_train_batch_start(self, *arguments) -> None:
        event()
        begin(self, *arguments)

    history.History.on_train_batch_start = on_train_batch_start
    sys.addaudithook(audit)
    config = from_dict(pkgutil.resolve_name(job["config_class"]), job["config"])
    if hasattr(config, "search"):
        config.output = str(output)
    else:
        config.model.nemo_path = str(output)
    pkgutil.resolve_name(job["stage"])(config)
    os.write(write, str(seen).encode())


def attempt(job: dict, output: Path, kill_at: int = 0) -> int | None:
    """Events seen, or None where it was killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        status = 1
        try:
            run(job, output, kill_at, write)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    _, status = os.waitpid(child, 0)
    # Megatron's process for write results outlives a stage, and holds its pipes.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    said = os.read(read, 64)
    os.close(read)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status:
        sys.exit(f"a stage failed with status {status}")
    return int(said)


def main() -> None:
    import modelopt.torch.distill  # noqa: F401
    from nemo.collections import llm  # noqa: F401

    import nemo_minitron.training.history  # noqa: F401
    from nemo_minitron.megatron import session

    session.stages_alone = True
    gc.collect()
    gc.freeze()  # no child looks through them, and copies their pages
    for job in json.loads(Path(sys.argv[1]).read_text()):
        folder = Path(job["folder"])
        events = attempt(job, folder / "alone")
        moments = sorted(random.Random(job["seed"]).sample(range(1, events + 1), job["kills"]))
        killed = [attempt(job, folder / f"killed-{moment}", at) is None for moment in moments for at in (moment, 0)]
        print(json.dumps({"events": events, "moments": moments, "killed": killed}), flush=True)


if __name__ == "__main__":
    main()
