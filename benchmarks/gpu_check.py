"""Does everything that needs a GPU work on this one, and how fast? One command, no network, at most eight minutes.

    python benchmarks/gpu_check.py [--json gpu_check.json] [--seconds 480] [--parts NAME ...] [--folder DIR]

In order, each in a process of its own, which a failure of another does not stop:

- small: finetune, score, cut, distil (fused and chunked), convert and generate on small Llama and Nemotron shapes, on
  the GPU and, in a process that sees no GPU, on the CPU: equal within rounding.
- loss: the distillation loss in bf16, 8192 tokens of 128,256 entries, forward and backward: plain autograd's,
  ModelOpt's, Liger's and ours.
- shape: distillation and scoring of a model of Llama 3.2 1B's shape: tokens a second, and peak memory beside what
  `minitron plan` says.
- quantized: FP8 and INT4 exports, calibrated on the GPU, read back and asked for tokens.

Prints a table and writes JSON; a run that is cut off prints and writes what it has. benchmarks/gpu_kit.py packs what a
bare CUDA machine lacks for it. Without a GPU it is a rehearsal: the same code, shapes of the last two cut down.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PARTS = ("small", "loss", "shape", "quantized")
CHILD = Path(__file__).with_name("gpu_parts.py")
#: Seconds that a part may take at most, of a run of 480.
LIMITS = {"prepare": 90, "small": 210, "loss": 120, "shape": 180, "quantized": 90}
REFERENCE = "small on the CPU"
#: More threads than this make small steps slower, and two processes that spin side by side many times so.
THREADS = {"OMP_NUM_THREADS": str(max(1, min(4, (os.cpu_count() or 2) // 2)))}


class Child:
    """One part in a process of its own."""

    def __init__(self, part: str, device: str, folder: Path, results: Path, **environment: str):
        self.part, self.name = part, REFERENCE if environment else part
        self.log = folder / f"{self.name.replace(' ', '-')}.log"
        command = [sys.executable, str(CHILD), part, device, str(folder), str(results)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**THREADS, **os.environ, **environment}, start_new_session=True
            )

    def wait(self, seconds: float) -> str | None:
        """What went wrong, if anything did; ends it after so many seconds."""
        try:
            code = self.process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            self.stop()
            return f"cut off after {seconds:.0f} s"
        return None if code == 0 else f"exit code {code}: {self.log.read_text(errors='replace')[-1500:]}"

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Check:
    """Runs the parts and keeps what they found."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder, self.results = options, folder, folder / "results.jsonl"
        self.ends = time.monotonic() + options.seconds
        self.results.touch()
        self.problems: list[dict[str, str]] = []
        self.children: list[Child] = []
        self.machine = machine()
        self.device = "cuda" if self.machine["gpu"] else "cpu"

    def run(self) -> None:
        if set(self.options.parts) - {"loss"}:
            self.part("prepare")
        reference = None
        if "small" in self.options.parts:
            reference = self.start("small", "cpu", CUDA_VISIBLE_DEVICES="")
            if self.device == "cpu":  # a rehearsal on few cores: not side by side
                self.finish(reference)
        for part in self.options.parts:
            self.part(part)
        if reference is not None and self.device == "cuda":
            self.finish(reference)

    def start(self, part: str, device: str, **environment: str) -> Child:
        child = Child(part, device, self.folder, self.results, **environment)
        self.children.append(child)
        return child

    def part(self, name: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        self.finish(self.start(name, self.device if name != "prepare" else "cpu"))

    def finish(self, child: Child) -> None:
        left = self.ends - time.monotonic()
        problem = child.wait(min(left, LIMITS[child.part] * self.options.seconds / 480))
        if problem:
            self.problems.append({"part": child.name, "error": problem})
        self.write()

    def stop(self) -> None:
        for child in self.children:
            if child.process.poll() is None:
                child.stop()
                self.problems.append({"part": child.name, "error": "cut off"})

    def rows(self) -> list[dict[str, Any]]:
        """What was found on the device, with the CPU's beside it where that was measured, and a verdict."""
        found = []
        for line in self.results.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a process that was killed at its last line
                found.append(json.loads(line))
        reference = {row["name"]: row for row in found if row["part"] == "small" and row["device"] == "cpu"}
        rows = [row for row in found if row["part"] != "small" or row["device"] == self.device]
        if self.device == "cpu":  # the reference comes first, then the same again
            small = [row for row in rows if row["part"] == "small"]
            rows = [row for row in rows if row["part"] != "small"] + small[len(small) // 2 :]
        return [judged(row, reference) for row in rows]

    def write(self) -> None:
        made = {"machine": self.machine, "rows": self.rows(), "problems": self.problems}
        partial = Path(f"{self.options.json}.partial")
        partial.write_text(json.dumps(made, indent=1) + "\n")
        partial.replace(self.options.json)


def judged(row: dict[str, Any], reference: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The row with what it is compared with, their difference, and whether that is within its tolerance."""
    if "error" in row:
        return row | {"ok": False}
    if "at_most" in row:
        return row | {"ok": row["value"] <= row["at_most"]}
    if row["part"] == "small" and "value" in row:
        other = reference.get(row.get("of", row["name"]))
        if other is None or "value" not in other:
            return row | {"ok": None}
        row = row | {"reference": other["value"]}
    if "reference" not in row:
        return row
    if row.get("exact"):
        return row | {"ok": row["value"] == row["reference"]}
    difference = abs(row["value"] - row["reference"])
    if not row.get("absolute"):
        difference /= max(abs(row["reference"]), 1e-12)
    return row | {"difference": difference, "ok": math.isfinite(difference) and difference <= row["tolerance"]}


def machine() -> dict[str, Any]:
    """What this is run on; asked in a process of its own, so that this one never imports torch."""
    question = (
        "import json, torch; n = torch.cuda.is_available();"
        "print(json.dumps({'torch': torch.__version__, 'gpu': torch.cuda.get_device_name(0) if n else None,"
        "'gpu_gib': round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if n else None}))"
    )
    done = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=True)
    own = {"python": platform.python_version(), "cpus": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
    return own | json.loads(done.stdout.splitlines()[-1]) | {"versions": versions()}


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("nemo-toolkit", "megatron-core", "nvidia-modelopt", "transformers", "numpy", "lightning", "triton",
                 "liger_kernel", "transformer-engine"):  # fmt: skip
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value) if len(str(value)) < 24 else f"{str(value)[:21]}..."
    return f"{value:.6g}"


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in row:
        return f"{row['name']:<64} FAILED  {row['error'][:300]}"
    verdict = {True: "ok", False: "DIFFERS", None: "?"}[row.get("ok")] if "ok" in row else ""
    shown = [f"{row['name']:<64}"]
    if "value" in row:
        shown.append(f"{number(row['value']):>14}")
    for key, text in (
        ("reference", "reference {}"), ("difference", "difference {}"), ("at_most", "at most {}"),
        ("milliseconds", "{} ms"), ("of_plain", "{} of plain"), ("extra_mib", "{} MiB"),
        ("memory_of_plain", "{} of plain"), ("tokens_per_second", "{} tokens/s"), ("step_seconds", "{} s"),
        ("held_mib", "held before {} MiB"), ("peak_mib", "peak {} MiB"),
        ("planned_mib", "planned {} MiB"), ("planned_of_measured", "planned/peak {}"),
        ("seconds", "{} s"),
    ):  # fmt: skip
        if key in row:
            shown.append(text.format(number(row[key]) if isinstance(row[key], list) else f"{row[key]:.4g}"))
    return "  ".join([*shown, verdict]).rstrip()


def summary(check: Check) -> int:
    """Prints the table, what failed in full, and the count; returns the exit code."""
    rows = check.rows()
    for part in dict.fromkeys(row["part"] for row in rows):
        print(f"\n{part}")
        steps = [row for row in rows if row["part"] == part]
        judgements = [row for row in steps if "ok" in row]
        for row in steps:
            equal = row.get("ok") is True and part == "small"
            if not equal and not (row["name"].endswith(": seconds") and part == "small"):
                print(f"  {line(row)}")
        if part == "small":
            widest: dict[str, float] = {}
            for row in judgements:
                if "difference" in row:
                    kind = row["name"].partition(",")[0]
                    widest[kind] = max(widest.get(kind, 0.0), row["difference"])
            for kind, difference in widest.items():
                print(f"  {kind:<62} largest difference {difference:.2g}")
    for row in rows:
        if "traceback" in row:
            print(f"\n{row['name']}\n{row['traceback']}")
    for problem in check.problems:
        print(f"\n{problem['part']}: {problem['error']}")
    judgements = [row["ok"] for row in rows if "ok" in row]
    print(
        f"\n{judgements.count(True)} within tolerance, {judgements.count(False)} not, {judgements.count(None)} not "
        f"compared; {len(check.problems)} parts cut off; {check.machine['gpu'] or 'no GPU: a rehearsal'}; "
        f"{check.options.json}"
    )
    return 0 if judgements and all(judgements) and not check.problems else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="gpu_check.json", help="file to write")
    parser.add_argument("--seconds", type=float, default=480, help="for all of it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, help="where to work; none: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        check = Check(options, folder)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        try:
            check.run()
        finally:
            check.stop()
            check.write()
            code = summary(check)
    return code


if __name__ == "__main__":
    sys.exit(main())
