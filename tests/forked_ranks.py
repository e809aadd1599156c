"""Ranks as torchrun starts them, forked from a process that has the engines imported.

    python forked_ranks.py

Each line of standard input is {"ranks", "port", "arguments", "environment", "said"}: so many ranks run
nemo_minitron.launch.ranks with these arguments, in torchrun's variables, and write what they say to the file `said`.
The first that fails ends the others, as torchrun does. A line of standard output is the exit code.

Importing the engines takes each rank ten seconds; tests/launch/ has ranks of torchrun itself.
"""

import contextlib
import gc
import json
import os
import signal
import sys
import traceback


def rank(job: dict, number: int) -> int:
    from nemo_minitron.launch import ranks

    said = os.open(job["said"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.clear()
    os.environ.update(job["environment"])
    own = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"],
           "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"],
           "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
    os.environ.update({name: str(value) for name, value in own.items()})
    return ranks.worker(*job["arguments"])


def start(job: dict, number: int) -> int:
    child = os.fork()
    if child == 0:
        os.setsid()
        status = 1
        try:
            status = rank(job, number)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return child


def run(job: dict) -> int:
    children = {start(job, number) for number in range(job["ranks"])}
    groups, code = set(children), 0
    while children:
        child, status = os.wait()
        children.discard(child)
        failed = os.waitstatus_to_exitcode(status)
        if failed and not code:
            code = 1
            for other in children:
                os.killpg(other, signal.SIGTERM)
    for group in groups:  # Megatron's process for write results outlives a rank
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    return code


def main() -> None:
    import modelopt.torch.distill  # noqa: F401
    import modelopt.torch.prune  # noqa: F401
    from nemo.collections import llm  # noqa: F401

    import nemo_minitron.training.history  # noqa: F401
    from nemo_minitron.megatron import session

    session.stages_alone = True
    gc.collect()
    gc.freeze()  # no child looks through them, and copies their pages
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(run(json.loads(line)), file=answers, flush=True)


if __name__ == "__main__":
    main()
