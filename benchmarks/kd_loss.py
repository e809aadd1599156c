"""Time and memory of the distillation loss, forward and backward, beside plain autograd, ModelOpt's and Liger's.

    python benchmarks/kd_loss.py [--tokens 2048] [--vocabulary 128256] [--hidden 1024] [--dtypes fp32 bf16]
                                 [--cases NAME ...] [--repeats 3] [--threads 1] [--json FILE] [--quick]

The loss is the mean forward KL. From logits, the gradient is that of the student's logits; from hidden states, output
layers and loss are measured together and the gradients are those of the student's hidden states and output weight.
Plain autograd takes log_softmax of both in float32. Each case runs in a process of its own, the cases take turns, and
the fastest of the repeats counts. Memory is the peak over what was held before, inputs and libraries: resident on a
CPU, allocated on CUDA, which is used where there is one. It includes the gradients, whose size stands beside it.
Liger's loss is measured where liger_kernel can be imported.

2048 tokens of 128,256 entries in float32 take plain autograd 8 GB in all.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LOGITS, HIDDEN = "from logits", "from hidden states"
WARM_UP_TOKENS = 8
LIGER_CHUNKS = (1024, 128)


def plain(student: Any, teacher: Any) -> Any:
    import torch

    q, p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()


def modelopt(student: Any, teacher: Any) -> Any:
    """The loss that NeMo gives ModelOpt's distillation model; logits [s, 1, v]."""
    from nemo_minitron.megatron.cpu import without_toolkit

    with without_toolkit():
        from nemo.collections.llm.modelopt.distill.loss import LogitsKLLoss

    criterion = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1))
    return criterion(student.unsqueeze(1), teacher.unsqueeze(1))[0].mean()


def chunked(student: Any, teacher: Any, **options: Any) -> Any:
    from nemo_minitron.distillation.losses.api import forward_kl

    return forward_kl(student, teacher, **options).mean()


def plain_output(hidden: Any, weight: Any, teacher_hidden: Any, teacher_weight: Any, labels: Any) -> Any:
    return plain(hidden @ weight.t(), teacher_hidden @ teacher_weight.t())


def liger(chunk: int) -> Callable:
    def loss(*inputs: Any) -> Any:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        settings = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 0.0}
        return LigerFusedLinearJSDLoss(**settings, compiled=False, chunk_size=chunk)(*inputs)

    return loss


def fused(hidden: Any, weight: Any, teacher_hidden: Any, teacher_weight: Any, labels: Any) -> Any:
    """With the labels' cross entropy shown, as in training."""
    from nemo_minitron.distillation.losses.fused import fused_divergence
    from nemo_minitron.distillation.losses.targets import Dense

    share = hidden.new_full((len(hidden),), 1 / len(hidden)).float()
    teachers = [Dense(teacher_hidden, teacher_weight)]
    return fused_divergence(hidden, weight, teachers, kd_weights=share, labels=labels).total


CASES: dict[str, tuple[str, Callable]] = {
    "plain autograd": (LOGITS, plain),
    "ModelOpt LogitsKLLoss": (LOGITS, modelopt),
    "ours, chunked": (LOGITS, chunked),
    "ours, chunked, overwriting": (LOGITS, lambda *logits: chunked(*logits, overwrite_student=True)),
    "plain autograd, output layer": (HIDDEN, plain_output),
    **{f"Liger, chunks of {chunk}": (HIDDEN, liger(chunk)) for chunk in LIGER_CHUNKS},
    "ours, fused": (HIDDEN, fused),
}
BASELINE = {LOGITS: "plain autograd", HIDDEN: "plain autograd, output layer"}


def inputs(start: str, options: argparse.Namespace, tokens: int) -> tuple[tuple, tuple]:
    """Arguments of a case's function, and those that want a gradient."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtypes[0]]
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Any:
        made = torch.empty(shape, dtype=dtype, device=device)
        for rows in made.split(16):  # or the float32 draw would more than double the memory
            rows.copy_(torch.randn(rows.shape, generator=generator, device=device) * scale)
        return made

    if start == LOGITS:
        student, teacher = (random(tokens, options.vocabulary, scale=3.0) for _ in range(2))
        return (student.requires_grad_(), teacher), (student,)
    weights = [random(options.vocabulary, options.hidden, scale=3 * options.hidden**-0.5) for _ in range(2)]
    states = [random(tokens, options.hidden) for _ in range(2)]
    labels = torch.randint(0, options.vocabulary, (tokens,), generator=generator, device=device)
    wanted = (states[0].requires_grad_(), weights[0].requires_grad_())
    return (states[0], weights[0], states[1], weights[1], labels), wanted


def run_case(name: str, options: argparse.Namespace) -> None:
    """One case; prints what it measured as JSON. Runs in a process of its own."""
    import torch

    from nemo_minitron.jobs.memory import peak_memory_bytes, reset_peak_memory

    torch.set_num_threads(options.threads)
    start, loss = CASES[name]
    torch.autograd.grad(loss(*(few := inputs(start, options, WARM_UP_TOKENS))[0]), few[1])
    del few
    arguments, wanted = inputs(start, options, options.tokens)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    reset_peak_memory()
    before, started = peak_memory_bytes(), time.perf_counter()
    value = loss(*arguments)
    gradients = torch.autograd.grad(value, wanted)
    synchronize()
    found = {"seconds": time.perf_counter() - started, "extra_bytes": peak_memory_bytes() - before}
    found["gradient_bytes"] = sum(gradient.nbytes for gradient in gradients)
    found["loss"] = value.item()
    found["gradient_norm"] = float(torch.linalg.vector_norm(gradients[0], dtype=torch.float32))
    print(json.dumps(found))


def measure(name: str, dtype: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", name, "--dtypes", dtype, "--threads", str(options.threads)]
    for size in ("tokens", "vocabulary", "hidden"):
        command += [f"--{size}", str(getattr(options, size))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(dtype: str, names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases in one dtype, taking turns."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.repeats):
        for name in names:
            runs[name].append(measure(name, dtype, options))
    rows = []
    for name in names:
        row = {"case": name, "from": CASES[name][0], "dtype": dtype, **min(runs[name], key=lambda run: run["seconds"])}
        row["all_seconds"] = [run["seconds"] for run in runs[name]]
        rows.append(row)
    best = {row["case"]: row for row in rows}
    for row in rows:
        baseline = best.get(BASELINE[row["from"]])
        for quantity in ("seconds", "extra_bytes"):
            row[f"{quantity}_of_plain"] = row[quantity] / baseline[quantity] if baseline else None
    return rows


HEADER = (
    f"{'case':<30}{'dtype':>6}{'s':>9}{'of plain':>10}{'extra MiB':>11}{'of plain':>10}{'gradients':>11}"
    f"{'loss':>11}{'|gradient|':>12}"
)


def line(row: dict[str, Any]) -> str:
    ratios = ["" if row[name] is None else f"{row[name]:.3f}" for name in ("seconds_of_plain", "extra_bytes_of_plain")]
    return (
        f"{row['case']:<30}{row['dtype']:>6}{row['seconds']:>9.2f}{ratios[0]:>10}{row['extra_bytes'] / 2**20:>11.0f}"
        f"{ratios[1]:>10}{row['gradient_bytes'] / 2**20:>11.0f}{row['loss']:>11.5f}{row['gradient_norm']:>12.4e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument(
        "--cases", nargs="+", metavar="NAME", choices=CASES, default=list(CASES), help="some cases only"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--quick", action="store_true", help="256 tokens, 32,000 entries, hidden size 512, two repeats")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_case(options.case, options)
        return
    if options.quick:
        options.tokens, options.vocabulary, options.hidden, options.repeats = 256, 32000, 512, 2
    names = list(options.cases)
    if importlib.util.find_spec("liger_kernel") is None and any("Liger" in name for name in names):
        names = [name for name in names if "Liger" not in name]
        print("liger_kernel is not installed: its loss is left out")
    print(f"{options.tokens} tokens, {options.vocabulary} entries, hidden size {options.hidden}\n{HEADER}", flush=True)
    rows = []
    for dtype in options.dtypes:
        rows += (of_dtype := table(dtype, names, options))
        print("\n".join(line(row) for row in of_dtype), flush=True)
    if options.json:
        machine = {"cpus": os.cpu_count(), "threads": options.threads, "platform": platform.platform()}
        sizes = {name: getattr(options, name) for name in ("tokens", "vocabulary", "hidden", "repeats")}
        Path(options.json).write_text(json.dumps({"rows": rows, "sizes": sizes, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    main()
