"""A distillation step with the teacher's answers kept, beside one with the teacher that runs: time and memory.

    python benchmarks/kept_step.py --model DIR --text FILE [--drop-layers [..]] [--length 256] [--batch 4] [--steps 8]
                                   [--rounds 2] [--threads 1] [--json FILE]

The teacher is a checkpoint of any format; its student is the teacher without the layers --drop-layers, half of its
parameters for SmolLM2-135M. One pass of the teacher keeps its hidden states, another one what is drawn from it
(minitron teach); then the same student learns from the teacher that runs and from either folder (minitron distill), on
the same samples. Each run is a process of its own, in rounds. Times are medians over all steps but each run's first
two: on the clock, and of the processor, which other work on the machine leaves nearly alone. Peaks of memory are the
most that a process held, interpreter and libraries included.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nemo_minitron import config as c

#: 11 of SmolLM2-135M's 30 layers stay, 67.3M of 134.5M parameters.
HALF = "[3-9,12-23]"
TEACHERS = ("live", "hidden", "sampled")
WARM_UP = 2


def stage_fields(options: argparse.Namespace, output: Path, **model: Any) -> dict[str, Any]:
    trainer = c.TrainerConfig(max_steps=options.steps, val_check_interval=options.steps, limit_val_batches=1)
    data = c.ModelDataConfig(data_prefix=str(options.folder / "data"), seq_length=options.length, num_workers=0)
    sizes = {"micro_batch_size": options.batch, "global_batch_size": options.batch}
    data.windows = "auto" if model.pop("kept", True) else "fixed"
    return {"trainer": trainer, "model": c.ModelConfig(nemo_path=str(output), data=data, **sizes, **model)}


def prepare(options: argparse.Namespace) -> None:
    """The data, the student, and the folders of answers."""
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint
    from nemo_minitron.data.command import prepare as tokenise
    from nemo_minitron.pruning.command import prune

    tokenizer = open_checkpoint(options.model).tokenizer
    tokenise(c.DataConfig(output=str(options.folder / "data"), source=options.text, tokenizer=tokenizer))
    prune(
        c.validated(
            c.PruneConfig(
                model=c.PruneModelConfig(restore_from_path=options.model),
                prune=c.PruneTargets(method="minitron", drop_layers=options.drop_layers, num_layers_divisor=1),
                export=c.ExportConfig(save_path=str(options.folder / "student")),
            )
        )
    )


def teach_once(options: argparse.Namespace, keep: str) -> Any:
    from nemo_minitron.distillation.teach.command import teach

    tokens = options.steps * options.batch * options.length
    fields = stage_fields(options, options.folder / keep, restore_from_path=options.model)
    return teach(c.validated(c.TeachConfig(**fields, teach=c.AnswersConfig(keep=keep, tokens=tokens))))


def distill_once(options: argparse.Namespace, teacher: str, round_: int) -> dict[str, Any]:
    """Seconds of each step, peak memory, and the losses."""
    import lightning.pytorch as pl

    from nemo_minitron.distillation.command import distill
    from nemo_minitron.training import loop

    seconds: list[float] = []
    processor: list[float] = []

    class Stopwatch(pl.Callback):
        started = (0.0, 0.0)

        def on_train_batch_start(self, *arguments: Any) -> None:
            self.started = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, *arguments: Any) -> None:
            seconds.append(time.perf_counter() - self.started[0])
            processor.append(time.process_time() - self.started[1])

    build = loop.build_trainer
    loop.build_trainer = lambda layout, callbacks, **given: build(layout, callbacks=[Stopwatch(), *callbacks], **given)
    live = {"kd_teacher_restore_from_path": options.model, "kept": False} if teacher == "live" else {}
    output = options.folder / f"{teacher}-student-{round_}"
    fields = stage_fields(options, output, restore_from_path=str(options.folder / "student"), **live)
    kd = c.KDConfig(teacher=None if teacher == "live" else str(options.folder / teacher))
    manifest = distill(c.validated(c.DistillConfig(**fields, kd=kd)))
    losses = [entry["kd_loss"] for entry in manifest.metrics["train"]]
    return {"seconds": seconds, "processor": processor, "peak": manifest.peak_memory_bytes, "losses": losses}


def part(options: argparse.Namespace, *arguments: str) -> dict[str, Any]:
    """What this file prints, run in a process of its own."""
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in SHARED]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, __file__, *given, f"--folder={options.folder}", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


SHARED = ("model", "text", "drop_layers", "length", "batch", "steps", "threads")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All parts, one after another."""
    part(options, "--part=prepare")
    taught = {keep: part(options, f"--part=teach:{keep}") for keep in TEACHERS[1:]}
    runs: dict[str, list[dict[str, Any]]] = {teacher: [] for teacher in TEACHERS}
    for round_ in range(options.rounds):
        for teacher in TEACHERS:
            runs[teacher].append(part(options, f"--part=distill:{teacher}:{round_}"))
    rows = {}
    for teacher, found in runs.items():
        rows[teacher] = {
            name: statistics.median(second for run in found for second in run[name][WARM_UP:])
            for name in ("seconds", "processor")
        } | {
            "peak": max(run["peak"] for run in found),
            "losses": found[0]["losses"],
        }
    for row in rows.values():
        row["ratios"] = {name: row[name] / rows["live"][name] for name in ("seconds", "processor", "peak")}
    return {"taught": taught, "rows": rows}


def run_part(options: argparse.Namespace) -> dict[str, Any]:
    name, *which = options.part.split(":")
    if name == "prepare":
        prepare(options)
        return {}
    if name == "teach":
        manifest = teach_once(options, which[0])
        return {**manifest.metrics, **manifest.timings, "peak": manifest.peak_memory_bytes}
    return distill_once(options, which[0], int(which[1]))


def shown(found: dict[str, Any]) -> str:
    lines = [
        f"{'teacher':<10}{'a step':>10}{'ratio':>8}{'processor':>12}{'ratio':>8}{'peak':>10}{'ratio':>8}"
        f"{'first loss':>12}{'last':>9}"
    ]
    for teacher, row in found["rows"].items():
        ratios = row["ratios"]
        lines.append(
            f"{teacher:<10}{row['seconds']:>8.2f} s{ratios['seconds']:>8.2f}{row['processor']:>10.2f} s"
            f"{ratios['processor']:>8.2f}{row['peak'] / 1e9:>7.2f} GB{ratios['peak']:>8.2f}"
            f"{row['losses'][0]:>12.4f}{row['losses'][-1]:>9.4f}"
        )
    for keep, one in found["taught"].items():
        lines.append(
            f"teach {keep}: {one['tokens_per_second']:.0f} tokens/s, {one['bytes_per_token']:.1f} bytes a token, "
            f"peak {one['peak'] / 1e9:.2f} GB"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="the teacher, a checkpoint")
    parser.add_argument("--text", required=True, metavar="FILE", help="plain text, or a folder of it")
    parser.add_argument("--drop-layers", default=HALF, help="layers that the student lacks")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        import torch

        torch.set_num_threads(options.threads)
        found = run_part(options)
        print(json.dumps(found), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        found = measure(options)
    print(shown(found))
    if options.json:
        machine = {"cpus": os.cpu_count(), "threads": options.threads, "platform": platform.platform()}
        Path(options.json).write_text(json.dumps({**found, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    main()
