"""What a cut keeps of a real model: `prune_quality.py --model DIR`.

For each seed the teacher is scored, scanned and cut by the package's own stages to shapes of about the same shares of
its parameters by width, by depth and by both; the seed decides the calibration samples and the batches. Every student
is then distilled in plain PyTorch by the same number of steps of the same batches (forward KL on the teacher's logits),
with the first seed at each of several learning rates; of these the one of least loss on the validation text counts, for
all seeds, and of it the loss on the test text. Each run stands in the folder at once, and one that is there is not made
again: processes that share a folder share the work, with `--steps 0` and a seed each for the cuts, and then with
`--part i/n` of the students.
"""

import dataclasses
import itertools
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import students as s

#: Name -> settings of the cut; the first is what the others are compared with.
METHODS: dict[str, dict[str, str]] = {
    "minitron": {"method": "minitron"},
    "compensated": {"method": "compensated", "refit": "sequential"},
    "refitted once": {"method": "compensated", "refit": "once"},
    "layers by loss": {"method": "compensated", "refit": "sequential", "depth_by": "compensated_loss"},
}


@dataclasses.dataclass
class Settings:
    """Lengths of a run; windows and steps in tokens of the teacher's tokenizer."""

    samples: int = 64
    length: int = 512
    test_windows: int = 64
    steps: int = 60
    batch: int = 4
    training_length: int = 256
    warmup: float = 0.1
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    accelerator: str = "cpu"


def shapes_of(architecture: Any, shares: list[float], grid: dict[str, int]) -> dict[str, dict[str, int]]:
    """Targets by name for shares of the parameters in percent: every width in proportion, every depth, half of each."""
    from nemo_minitron.architecture import PruningGrid
    from nemo_minitron.pruning.shares import sizes_of

    a, found = architecture, {}
    sizes = PruningGrid(**{name.removesuffix("_divisor"): value for name, value in grid.items()})
    for share in shares:
        wanted = share / 100 * a.parameters()
        layers = min(range(1, a.num_layers), key=lambda n: abs(a.with_sizes(num_layers=n).parameters() - wanted))
        width = {"parameters": f"{share:g}%"}
        between = {"num_layers": round((layers + a.num_layers) / 2)}
        found[f"width {share:g} %"] = sizes_of(width, a, sizes)
        found[f"depth {share:g} %"] = {"num_layers": layers}
        found[f"both {share:g} %"] = sizes_of(between | width, a, sizes)
    return found


class Bench:
    """One teacher, its students, and the file of what was measured."""

    def __init__(
        self, model: Path, folder: Path, settings: Settings, shapes: dict[str, dict[str, int]], grid: Any, first: int
    ):
        self.model, self.folder, self.settings, self.shapes, self.grid = model, folder, settings, shapes, grid
        self.data, self.first = folder / "data", first
        self.runs = folder / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)

    def has(self, shape: str, method: str) -> bool:
        """Whether a method has something to choose at a shape."""
        return "depth_by" not in METHODS[method] or "num_layers" in self.shapes[shape]

    def windows(self, split: str) -> Any:
        """The first windows of a split; as many as it has."""
        from nemo_minitron.data.samples import token_stream

        has = (len(token_stream(str(self.data / split))) - 1) // self.settings.length
        return s.test_windows(self.data, min(has, self.settings.test_windows), self.settings.length, split)

    def kept(self, name: str, measure: Any) -> dict[str, Any]:
        """What is in the file of a run, or what `measure` finds, put there."""
        file = self.runs / f"{name.replace(' ', '_').replace('%', '')}.json"
        if not file.exists():
            found = measure()
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(found))
            partial.rename(file)
        return json.loads(file.read_text())

    def load(self, folder: Path) -> Any:
        import torch

        device = "cuda" if self.settings.accelerator == "gpu" else "cpu"
        return s.load(folder).to(device, torch.float32).requires_grad_(False)

    def cut(self, seed: int, shape: str, method: str) -> Path:
        """A student, by the package's stages."""
        from nemo_minitron.pruning.command import prune

        output = self.folder / f"seed-{seed}" / f"{shape}-{method}".replace(" ", "-").replace("%", "")
        if output.exists():
            return output
        config = s.prune_config(
            self.model, self.data, output, self.settings.samples, seed, length=self.settings.length, batch=4,
            accelerator=self.settings.accelerator, **METHODS[method], **self.grid, **self.shapes[shape],
            scores_path=str(self.folder / f"seed-{seed}" / "scores"),
        )  # fmt: skip
        prune(config)
        return output

    def just_cut(self, seed: int, shape: str, method: str) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            started = time.perf_counter()
            folder = self.cut(seed, shape, method)
            seconds = time.perf_counter() - started
            model = self.load(folder)
            losses = {split: s.loss_of(model, self.windows(split), 4) for split in ("validation", "test")}
            return {"seed": seed, "shape": shape, "method": method, "parameters": s.parameters_of(model),
                    "seconds": seconds, **losses}  # fmt: skip

        return self.kept(f"cut {seed} {shape} {method}", measure)

    def teacher(self) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            model = self.load(self.model)
            losses = {split: s.loss_of(model, self.windows(split), 4) for split in ("validation", "test")}
            return {"parameters": s.parameters_of(model), **losses}

        return self.kept("teacher", measure)

    def distilled(self, seed: int, shape: str, method: str, rate: float) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            folder = self.cut(seed, shape, method)
            student, teacher, how = self.load(folder), self.load(self.model), self.settings
            student.requires_grad_(True)
            started = time.perf_counter()
            s.train(
                student, how.steps, rate, how.batch, self.data / "train", seed + 1000, teacher, plain_kl,
                length=how.training_length, warmup=how.warmup,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            losses = {split: s.loss_of(student, self.windows(split), 4) for split in ("validation", "test")}
            return {"seed": seed, "shape": shape, "method": method, "rate": rate, "seconds": seconds, **losses}

        return self.kept(f"distilled {seed} {shape} {method} {rate:g} {self.settings.steps}", measure)

    def best(self, seed: int, shape: str, method: str) -> dict[str, Any]:
        """The distilled student at the best learning rate of the first seed, by the loss on the validation text."""
        tried = [self.distilled(self.first, shape, method, rate) for rate in self.settings.rates]
        return self.distilled(seed, shape, method, min(tried, key=lambda run: run["validation"])["rate"])


def plain_kl(student: Any, teacher: Any, labels: Any) -> Any:
    """Forward KL on logits [tokens, v], a mean over tokens, in one expression."""
    import torch

    log_p, log_q = teacher.float().log_softmax(-1), torch.log_softmax(student.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def summary(bench: Bench, seeds: list[int], methods: list[str]) -> list[dict[str, Any]]:
    """Means over seeds: losses, gaps to the teacher, and gaps over the first method's at the same shape."""
    teacher, found = bench.teacher(), []
    for shape in bench.shapes:
        means: dict[str, dict[str, Any]] = {}
        for method in (name for name in methods if bench.has(shape, name)):
            cuts = [bench.just_cut(seed, shape, method) for seed in seeds]
            values = {
                "share": cuts[0]["parameters"] / teacher["parameters"],
                "just_cut": statistics.mean(cut["test"] for cut in cuts),
                "seconds": statistics.mean(cut["seconds"] for cut in cuts),
            }
            if bench.settings.steps:
                best = [bench.best(seed, shape, method) for seed in seeds]
                losses = [run["test"] for run in best]
                values |= {
                    "distilled": statistics.mean(losses), "rate": best[0]["rate"],
                    "spread": statistics.stdev(losses) if len(losses) > 1 else 0.0,
                }  # fmt: skip
            for when in ("just_cut", "distilled"):
                if when in values:
                    values[f"{when}_gap"] = values[when] - teacher["test"]
            means[method] = values
        for method, values in means.items():
            base = means[methods[0]]
            ratios = {
                f"{when}_ratio": values[f"{when}_gap"] / base[f"{when}_gap"]
                for when in ("just_cut", "distilled") if f"{when}_gap" in values
            }  # fmt: skip
            found.append({"shape": shape, "targets": bench.shapes[shape], "method": method, **values, **ratios})
    return found


COLUMNS = ("just cut", "gap", "of minitron's", "distilled", "gap", "of its", "spread", "rate")
HEADER = f"{'shape':<12}{'of teacher':>10}  {'method':<17}" + "".join(
    f"{name:>{width}}" for name, width in zip(COLUMNS, (9, 8, 15, 11, 8, 8, 8, 8))
)


def line(row: dict[str, Any]) -> str:
    after = ""
    if "distilled" in row:
        after = (
            f"{row['distilled']:>11.4f}{row['distilled_gap']:>8.4f}{row['distilled_ratio']:>8.2f}"
            f"{row['spread']:>8.4f}{row['rate']:>8g}"
        )
    return (
        f"{row['shape']:<12}{row['share']:>10.1%}  {row['method']:<17}{row['just_cut']:>9.4f}"
        f"{row['just_cut_gap']:>8.4f}{row['just_cut_ratio']:>15.3f}{after}"
    )


def run(options: Any) -> None:
    """The benchmark with the options of prune_quality.py."""
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint

    settings = Settings(
        steps=options.steps, accelerator=options.accelerator, rates=tuple(options.rates), samples=options.samples,
        test_windows=options.test_windows, batch=options.batch, training_length=options.training_length,
    )  # fmt: skip
    if options.quick:
        settings = dataclasses.replace(settings, samples=8, length=64, test_windows=2, steps=2, training_length=32)
    model, folder = Path(options.model), Path(options.folder)
    architecture = open_checkpoint(model, "teacher").architecture
    grid = {"hidden_size_divisor": 32, "ffn_hidden_size_divisor": 64, "num_layers_divisor": 1}
    shapes = shapes_of(architecture, options.shares, grid)
    for name, *sizes in options.shape or []:
        shapes[name] = {key: int(value) for key, value in (size.split("=") for size in sizes)}
    shapes = {name: shapes[name] for name in options.shapes or shapes}
    s.prepared(folder / "data", options.source, tokenizer=str(model))
    bench = Bench(model, folder, settings, shapes, grid, options.seeds[0])
    share, parts = (int(number) for number in options.part.split("/"))
    bench.teacher()
    every = itertools.product(options.seeds, shapes, options.methods)
    work = [(seed, shape, method) for seed, shape, method in every if bench.has(shape, method)]
    for number, (seed, shape, method) in enumerate(work):
        if number % parts != share - 1:
            continue
        found = bench.just_cut(seed, shape, method)
        said = [f"cut {found['test']:.4f} in {found['seconds']:.0f} s"]
        if settings.steps:
            best = bench.best(seed, shape, method)
            said.append(f"distilled {best['test']:.4f} at {best['rate']:g} in {best['seconds']:.0f} s")
        print(f"seed {seed}  {shape:<12} {method:<17} {'  '.join(said)}", flush=True)
    if parts > 1:
        return
    rows = summary(bench, options.seeds, options.methods)
    machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
    if settings.accelerator == "gpu":
        import torch

        machine["gpu"] = torch.cuda.get_device_name()
    found = {
        "teacher": bench.teacher(), "summary": rows, "settings": dataclasses.asdict(settings), "seeds": options.seeds,
        "runs": [json.loads(file.read_text()) for file in sorted(bench.runs.glob("*.json"))], "machine": machine,
    }  # fmt: skip
    Path(options.json).write_text(json.dumps(found, indent=2) + "\n")
    print(f"\nteacher {bench.teacher()['test']:.4f}; nats a token on the test text; means over seeds {options.seeds}")
    print("\n".join([HEADER, *map(line, rows)]))
