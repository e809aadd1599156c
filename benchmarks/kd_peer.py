"""The whole distillation step beside what a user would write instead; kd_step.py --peer runs it.

The peer is plain PyTorch with transformers' models: SDPA attention, torch's AdamW, forward KL in one expression over
the whole logits, the same clipping. Each runs in a process of its own, by turns, on the same batches: the peer reads
the tokens that the package's run saw. A step is all from its start to the next one's: data, logging and callbacks are
in it. CPU seconds are those of the process, all threads together; they mean more than wall time where others work
beside.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WARM_UP = 2
MIB = 2**20


class Marks:
    """Wall and CPU seconds of each step, and peaks of resident memory.

    Attributes:
        at: (wall, CPU) at the start of each step, and at the end of the last.
        loading: peak until the first step, bytes.
        steps: peak of the steps.
    """

    def __init__(self) -> None:
        self.at: list[tuple[float, float]] = []
        self.loading = self.steps = 0

    def start(self) -> None:
        from nemo_minitron.jobs.memory import peak_memory_bytes, reset_peak_memory

        self.loading = peak_memory_bytes()
        reset_peak_memory()

    def mark(self) -> None:
        self.at.append((time.perf_counter(), time.process_time()))

    def end(self) -> None:
        from nemo_minitron.jobs.memory import peak_memory_bytes

        self.mark()
        self.steps = peak_memory_bytes()

    def found(self, losses: list[float]) -> dict[str, Any]:
        wall, cpu = ([later[i] - one[i] for one, later in zip(self.at, self.at[1:])] for i in (0, 1))
        return {"wall": wall, "cpu": cpu, "loading": self.loading, "steps": self.steps, "losses": losses}


def ours(case: dict[str, Any], place: Path) -> dict[str, Any]:
    """The package's own training; leaves the tokens that the student sees."""
    import kd_step
    import torch

    from nemo_minitron import config as c

    fields = kd_step.stage_fields(
        Path(case["data"]), place / "out", case["length"], case["samples"], case["steps"],
        restore_from_path=case["student"],
    )  # fmt: skip
    fields["model"].kd_teacher_restore_from_path = case["teacher"]
    marks, seen = Marks(), []
    config = c.DistillConfig(**fields)
    trained = kd_step.run_training(config, place, [watcher(marks, seen)])[1]
    torch.save(torch.stack(seen[: case["steps"]]), place / "tokens.pt")
    return marks.found([step["kd_loss"] for step in trained.train])


def watcher(marks: Marks, seen: list[Any]) -> Any:
    """A callback that marks the steps and keeps the tokens [b, s] of each."""
    import lightning.pytorch as pl

    from nemo_minitron.megatron.weights import bare

    def look(embedding: Any, arguments: Any, named: dict[str, Any]) -> None:
        seen.append((named["input_ids"] if "input_ids" in named else arguments[0]).clone())

    class Watcher(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            bare(module).embedding.register_forward_pre_hook(look, with_kwargs=True)
            marks.start()

        def on_train_batch_start(self, *arguments: Any) -> None:
            marks.mark()

        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == trainer.max_steps:
                marks.end()

    return Watcher()


def peer(case: dict[str, Any], place: Path) -> dict[str, Any]:
    """What a user would write."""
    import torch
    from torch.nn.functional import kl_div
    from transformers import AutoModelForCausalLM

    batches = torch.load(place / "tokens.pt")
    options = {"attn_implementation": "sdpa", "torch_dtype": torch.float32}
    teacher = AutoModelForCausalLM.from_pretrained(case["teacher"], **options).eval()
    student = AutoModelForCausalLM.from_pretrained(case["student"], **options).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.01)
    marks, losses = Marks(), []
    marks.start()
    for tokens in batches:
        marks.mark()
        with torch.no_grad():
            target = teacher(tokens, use_cache=False).logits
        logits = student(tokens, use_cache=False).logits
        loss = kl_div(
            logits.log_softmax(-1).flatten(0, 1), target.log_softmax(-1).flatten(0, 1), log_target=True,
            reduction="batchmean",
        )  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    marks.end()
    return marks.found(losses)


def compare(name: str, case: dict[str, Any], rounds: int, folder: Path) -> dict[str, Any]:
    """Both by turns, `rounds` times; medians of the steps after the first two, and the larger peaks."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for _ in range(rounds):
        for side, runs in found.items():
            runs.append(apart(side, case, folder))
    first = [runs[0]["losses"][0] for runs in found.values()]
    if abs(first[0] - first[1]) > 1e-3 * abs(first[1]) + 1e-6:
        raise SystemExit(f"{name}: the first step's losses differ, ours {first[0]}, the peer's {first[1]}")
    row: dict[str, Any] = {"shape": name, "tokens": case["length"] * case["samples"], "loss": first}
    for side, runs in found.items():
        for clock in ("wall", "cpu"):
            row[f"{side}, {clock}"] = statistics.median(seconds for one in runs for seconds in one[clock][WARM_UP:])
        for moment in ("loading", "steps"):
            row[f"{side}, {moment}"] = max(one[moment] for one in runs)
        row[f"{side}, peak"] = max(row[f"{side}, {moment}"] for moment in ("loading", "steps"))
    for what in ("wall", "cpu", "steps", "peak"):
        row[f"ratio, {what}"] = row[f"ours, {what}"] / row[f"peer, {what}"]
    return row | {"samples": found}


def apart(side: str, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One side in a process of its own."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(case["threads"]))
    command = [sys.executable, __file__, side, json.dumps(case), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"wall"')]
    if done.returncode or not lines:
        raise SystemExit(done.stderr[-3000:] or done.stdout[-3000:])
    return json.loads(lines[-1])


HEADER = f"{'shape':<24}{'tokens':>7}{'':>7}{'CPU s':>8}{'wall s':>8}{'peak MiB':>10}{'in steps':>10}\n" + "-" * 74


def table(row: dict[str, Any]) -> str:
    """Three lines: ours, the peer's, the ratio."""
    lines = []
    for side in ("ours", "peer"):
        place = f"{row['shape']:<24}{row['tokens']:>7}" if side == "ours" else f"{'':>31}"
        seconds = "".join(f"{row[f'{side}, {clock}']:>8.2f}" for clock in ("cpu", "wall"))
        peaks = "".join(f"{row[f'{side}, {moment}'] / MIB:>10.0f}" for moment in ("peak", "steps"))
        lines.append(f"{place}{side:>7}{seconds}{peaks}")
    seconds = "".join(f"{row[f'ratio, {clock}']:>8.2f}" for clock in ("cpu", "wall"))
    peaks = "".join(f"{row[f'ratio, {moment}']:>10.2f}" for moment in ("peak", "steps"))
    return "\n".join([*lines, f"{'':>31}{'ratio':>7}{seconds}{peaks}"])


def main() -> None:
    import torch

    side, case, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(case["threads"])
    with contextlib.redirect_stdout(sys.stderr):
        found = {"ours": ours, "peer": peer}[side](case, folder)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
