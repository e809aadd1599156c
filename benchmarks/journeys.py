"""How far a reader has to go: the files of this package that a command calls, and the calls from one to another.

Each command runs on a small model with a profiler on every call. A hop is a distinct pair (file of the caller, file of
the callee), both in the package and not the same; between rooms, a pair of packages. Imports are not counted.

    python benchmarks/journeys.py --json journeys.json
"""

import argparse
import functools
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import nemo_minitron

PACKAGE = f"{Path(nemo_minitron.__file__).resolve().parent}{os.sep}"
MODEL = (
    "{num_layers:4,hidden_size:64,ffn_hidden_size:128,num_attention_heads:4,num_query_groups:2,kv_channels:16,"
    "vocab_size:1024,seq_length:32}"
)
TRAINING = (
    "trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=1", "trainer.accelerator=cpu",
    "model.global_batch_size=2", "model.micro_batch_size=2", "model.data.seq_length=32", "model.data.data_prefix=data",
)  # fmt: skip
#: What the journeys need, made without the profiler.
BEFORE = (
    ("data", "source=embedded", "words=20000", "vocab_size=1000", "workers=1", "output=data"),
    ("finetune", "model.init=random", f"model.architecture={MODEL}", "model.nemo_path=teacher", *TRAINING),
)
JOURNEYS = {
    "prune": (
        "model.restore_from_path=teacher", "model.data.data_prefix=data", "model.data.seq_length=32",
        "trainer.accelerator=cpu", "prune.num_layers=2", "prune.hidden_size=32", "prune.hidden_size_divisor=16",
        "prune.num_samples=4", "prune.num_block_samples=4", "export.save_path=student",
    ),
    "distill": (
        "model.restore_from_path=student", "model.kd_teacher_restore_from_path=teacher", "model.nemo_path=distilled",
        *TRAINING,
    ),
    "convert": ("teacher", "hf", "to=hf"),
    "quantize": ("teacher", "qformat=fp8", "data.source=data", "num_samples=4", "accelerator=cpu", "output=quantized"),
    "flow --dry-run": (),
}  # fmt: skip


class Hops:
    """Counts calls between the package's files while it is active."""

    def __init__(self) -> None:
        self.pairs: set[tuple[str, str]] = set()
        self.files: set[str] = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or frame.f_code.co_name == "<module>":
            return
        callee = frame.f_code.co_filename
        if not callee.startswith(PACKAGE):
            return
        self.files.add(callee)
        caller = frame.f_back.f_code if frame.f_back else None
        if caller and caller.co_filename.startswith(PACKAGE) and caller.co_filename != callee:
            self.pairs.add((caller.co_filename, callee))


def profiled(run: Callable[[], int]) -> Hops:
    """Runs with the profiler; raises RuntimeError where the command fails."""
    hops = Hops()
    threading.setprofile(hops)
    sys.setprofile(hops)
    try:
        code = run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    if code:
        raise RuntimeError(f"the command ended with exit code {code}")
    return hops


def room(file: str) -> str:
    """The package right in this one that a file lies in; a loose file is one of its own."""
    return file.partition(os.sep)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args()
    target = Path(options.json).absolute() if options.json else None
    from nemo_minitron.cli.main import main as minitron

    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for command, *arguments in BEFORE:
            if minitron([command, *arguments]):
                raise SystemExit(f"minitron {command} failed")
        for name, arguments in JOURNEYS.items():
            hops = profiled(functools.partial(minitron, [*name.split(), *arguments]))
            pairs = sorted([one.removeprefix(PACKAGE), other.removeprefix(PACKAGE)] for one, other in hops.pairs)
            rooms = {(one, other) for one, other in (map(room, pair) for pair in pairs) if one != other}
            figures[name] = {
                "files": len(hops.files), "hops": len(pairs), "hops_between_rooms": len(rooms), "pairs": pairs,
            }  # fmt: skip
        os.chdir("/")
    top = sorted(Path(PACKAGE).glob("*.py"))
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in top)
    print(f"{'journey':<16}{'files':>7}{'hops':>7}{'between rooms':>15}")
    for name, figure in figures.items():
        print(f"{name:<16}{figure['files']:>7}{figure['hops']:>7}{figure['hops_between_rooms']:>15}")
    print(f"at the top of the package: {len(top)} files, {lines} lines")
    if target:
        target.write_text(json.dumps({"journeys": figures, "top": {"files": len(top), "lines": lines}}, indent=1))


if __name__ == "__main__":
    main()
