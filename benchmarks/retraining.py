"""Ways to retrain a student after one cut, at equal tokens and at equal time; and criteria of which layers to drop.

    python benchmarks/retraining.py --source DIR --model DIR [--seeds 0 1 2] [--steps 12] [--folder DIR] [--json FILE]
        [--picture FILE] [--criteria [NAME ...]] [--quick]

What Shortened LLaMA (arXiv 2402.02834) compares, and distillation beside it. The teacher is a checkpoint, or without
--model a small one that is trained first. Its student is cut once by `minitron prune` in depth, by block influence and,
as in the paper, without a refit (--cut compensated has one). Each arm trains that student on the same samples in the
same order, which the seed decides:

    LoRA               adapters of rank 32, LM loss
    LM loss            all weights, LM loss: the paper's continued pretraining
    KD, live           forward KL, the teacher runs beside
    KD, kept hidden    forward KL on the teacher's last hidden states in bf16, read from a folder
    KD, kept sampled   forward KL on 64 tokens drawn of each distribution, read from a folder

LoRA, the LM loss and KD (kept hidden, for the three) each get the better of two learning rates with the first seed. It
rises and then stays, so that a run which is cut short is what a shorter run would have been: runs are
validated on the way, and at equal time each is read where the one that ends first has ended. Time is CPU seconds of
the training steps on one thread, validation left out: other work on the machine does not count. What the teacher's
answers cost is told apart: a second student of the same teacher, or a second trial, pays nothing.

Losses are the LM loss in nats a token on the first windows of the test text. A verdict is the paired difference over
seeds with its 95 % interval, as in reproduce.py. With --criteria also layer_criteria.py's tables.

What is done stands in the folder at once and is not done again; several processes may share a folder, each with its
own --seeds or --arms, and a last call with all of them prints the tables. With --arms nothing is printed but progress.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import layer_criteria
from reproduce import comparison

import students as s
from nemo_minitron import config as c

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = {
    "lora": "LoRA",
    "lm": "LM loss",
    "live": "KD, live",
    "hidden": "KD, kept hidden",
    "sampled": "KD, kept sampled",
}
PLAIN, KEPT = ("lora", "lm"), ("hidden", "sampled")
#: The arm that is expected to be the better, and the other.
COMPARED = (("lm", "lora"), ("live", "lm"), ("hidden", "lm"), ("hidden", "live"), ("sampled", "hidden"))
TEACHER = {
    "num_layers": 6, "hidden_size": 128, "ffn_hidden_size": 352, "num_attention_heads": 8, "num_query_groups": 4,
    "kv_channels": 16,
}  # fmt: skip


@dataclasses.dataclass
class Settings:
    """Lengths of a run.

    Attributes:
        layers: that the student keeps.
        cut: prune.method.
        samples: of calibration, of `length` tokens.
        criteria_samples: of layer_criteria, and `refit_samples` where maps are fitted.
        rates: tried with the first seed; the first is that of config/presets/distill/smollm2_135m.yaml.
        lora_rates: likewise, of the adapters.
        validations: of a run, at equal distances.
        windows: of the test text.
    """

    layers: int = 18
    cut: str = "minitron"
    samples: int = 64
    criteria_samples: int = 6
    refit_samples: int = 24
    length: int = 256
    batch: int = 2
    steps: int = 12
    validations: int = 3
    windows: int = 12
    warmup: int = 4
    rates: tuple[float, ...] = (2e-4, 6e-4)
    lora_rates: tuple[float, ...] = (2e-4, 1e-3)


class Bench:
    """One teacher, its student, and a file for everything that was measured."""

    def __init__(self, model: Path, folder: Path, settings: Settings, first: int):
        self.model, self.folder, self.settings, self.first = model, folder, settings, first
        self.data, self.runs = folder / "data", folder / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)

    def kept(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is in the file of a run, or what `measure` finds, put there."""
        file = self.runs / f"{name.replace(' ', '_')}.json"
        if not file.exists():
            found = measure()
            beside = file.with_suffix(f".{os.getpid()}")
            beside.write_text(json.dumps(found, indent=1) + "\n")
            beside.rename(file)
            print(f"  {name}", flush=True)
        return json.loads(file.read_text())

    def windows(self) -> Any:
        return s.test_windows(self.data, self.settings.windows, self.settings.length)

    def loss(self, folder: Path) -> float:
        import torch

        return s.loss_of(s.load(folder).to(torch.float32), self.windows(), self.settings.batch)

    def cut(self) -> Path:
        """The student, by the package's stages."""
        from nemo_minitron.pruning.command import prune

        how, output = self.settings, self.folder / "student"

        def measure() -> dict[str, Any]:
            started = time.process_time()
            if not output.exists():
                config = s.prune_config(
                    self.model, self.data, output, how.samples, 0, length=how.length, batch=how.batch,
                    num_layers=how.layers, num_layers_divisor=1, method=how.cut,
                    scores_path=str(self.folder / "scores"),
                )  # fmt: skip
                prune(config)
            seconds = time.process_time() - started
            sizes = {name: s.parameters_of(s.load(one)) for name, one in (("teacher", self.model), ("student", output))}
            return {"parameters": sizes, "cpu": seconds, "teacher": self.loss(self.model), "loss": self.loss(output)}

        self.kept("cut", measure)
        return output

    def fields(self, seed: int, output: Path, rate: float, **model: Any) -> dict[str, Any]:
        """What all training stages are given; the test text is what they validate on."""
        how = self.settings
        train, test = (str(self.data / split) for split in ("train", "test"))
        data = c.ModelDataConfig(
            data_prefix={"train": [1.0, train], "validation": [test], "test": [test]},
            seq_length=how.length, windows="fixed", num_workers=0,
        )  # fmt: skip
        schedule = c.SchedConfig(warmup_steps=min(how.warmup, how.steps - 1), min_lr=rate)
        return {
            "seed": seed,
            "monitor": "last",
            "trainer": c.TrainerConfig(
                accelerator="cpu", precision="32", max_steps=how.steps,
                val_check_interval=how.steps // how.validations, limit_val_batches=how.windows // how.batch,
            ),
            "model": c.ModelConfig(
                nemo_path=str(output), data=data, micro_batch_size=how.batch, global_batch_size=how.batch,
                tokenizer=str(self.data / "tokenizer"), optim=c.OptimConfig(lr=rate, sched=schedule), **model,
            ),
        }  # fmt: skip

    def taught(self, seed: int, keep: str) -> Path:
        """The teacher's answers to all that a run reads."""
        from nemo_minitron.distillation.teach.command import teach

        how, output = self.settings, self.folder / f"answers-{seed}-{keep}"

        def measure() -> dict[str, Any]:
            started = time.process_time()
            fields = self.fields(seed, output, how.rates[0], restore_from_path=str(self.model))
            asked = c.AnswersConfig(keep=keep, tokens=how.steps * how.batch * how.length)
            manifest = teach(c.validated(c.TeachConfig(**fields, teach=asked)))
            return {"cpu": time.process_time() - started, **manifest.metrics, **manifest.timings}

        self.kept(f"taught {seed} {keep}", measure)
        return output

    def trained(self, arm: str, seed: int, rate: float) -> dict[str, Any]:
        """One run: its validations, and the seconds of each step."""
        from nemo_minitron.distillation.command import distill
        from nemo_minitron.training.finetune import finetune

        output = self.folder / f"trained-{arm}-{seed}-{rate:g}"
        student = {"restore_from_path": str(self.cut())}
        live = {"kd_teacher_restore_from_path": str(self.model)} if arm == "live" else {}
        fields = self.fields(seed, output, rate, **student, **live)
        if arm in PLAIN:
            peft = c.PeftConfig(scheme="lora" if arm == "lora" else "none")
            call = partial(finetune, c.validated(c.FinetuneConfig(**fields, peft=peft)))
        else:
            kd = c.KDConfig(teacher=None if arm == "live" else str(self.taught(seed, arm)))
            call = partial(distill, c.validated(c.DistillConfig(**fields, kd=kd)))

        def measure() -> dict[str, Any]:
            for left in (output, output.with_name(f".{output.name}.partial")):  # steps of before would not be timed
                shutil.rmtree(left, ignore_errors=True)
            manifest, seconds = timed(call)
            shutil.rmtree(output, ignore_errors=True)
            validation = [(entry["step"], entry["lm_loss"]) for entry in manifest.metrics["validation"]]
            return {
                "arm": arm, "seed": seed, "rate": rate, "validation": validation, "peak": manifest.peak_memory_bytes,
                **seconds,
            }  # fmt: skip

        return self.kept(f"trained {arm} {seed} {rate:g}", measure)

    def tried(self, arm: str) -> list[dict[str, Any]]:
        """The first seed's runs at each rate, of the arm that an arm takes its rate from."""
        rates = self.settings.lora_rates if arm == "lora" else self.settings.rates
        return [self.trained(arm if arm in PLAIN else KEPT[0], self.first, rate) for rate in rates]

    def arm(self, arm: str, seed: int) -> dict[str, Any]:
        """The run of an arm at the better of its rates."""
        best = min(self.tried(arm), key=lambda run: run["validation"][-1][1])
        return self.trained(arm, seed, best["rate"])


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, list[float]]]:
    """What a training stage returns, and CPU and wall seconds of its steps, validation left out."""
    import lightning.pytorch as pl

    from nemo_minitron.training import loop

    clocks = {"cpu": time.process_time, "wall": time.perf_counter}
    seconds: dict[str, list[float]] = {name: [] for name in clocks}

    class Stopwatch(pl.Callback):
        def on_train_batch_start(self, *arguments: Any) -> None:
            self.started = {name: clock() for name, clock in clocks.items()}

        def on_train_batch_end(self, *arguments: Any) -> None:
            for name, clock in clocks.items():
                seconds[name].append(clock() - self.started[name])

    build = loop.build_trainer
    loop.build_trainer = lambda layout, callbacks, **given: build(layout, callbacks=[Stopwatch(), *callbacks], **given)
    try:
        return call(), seconds
    finally:
        loop.build_trainer = build


def curve(run: dict[str, Any], start: float) -> list[tuple[float, float]]:
    """CPU seconds of training and loss, from the cut on."""
    return [(0.0, start), *((sum(run["cpu"][:step]), loss) for step, loss in run["validation"])]


def at(points: list[tuple[float, float]], seconds: float) -> float:
    """The loss after so many seconds, on the line between two validations."""
    for (before, high), (after, low) in zip(points, points[1:]):
        if seconds <= after:
            return high + (low - high) * (seconds - before) / (after - before)
    return points[-1][1]


def summary(bench: Bench, seeds: list[int]) -> dict[str, Any]:
    """Rows by arm, and the arms compared."""
    bench.cut()
    cut = bench.kept("cut", dict)
    runs = {arm: [bench.arm(arm, seed) for seed in seeds] for arm in ARMS}
    curves = {arm: [curve(run, cut["loss"]) for run in each] for arm, each in runs.items()}
    shortest = min(points[-1][0] for each in curves.values() for points in each)
    measured = {
        "tokens": {arm: [points[-1][1] for points in each] for arm, each in curves.items()},
        "time": {arm: [at(points, shortest) for points in each] for arm, each in curves.items()},
    }
    rows = []
    for arm in ARMS:
        row: dict[str, Any] = {"arm": arm, "rate": runs[arm][0]["rate"]}
        row["step"] = statistics.median(second for run in runs[arm] for second in run["cpu"][1:])
        row["peak"] = max(run["peak"] or 0 for run in runs[arm])
        row["teaching"] = 0.0
        if arm in KEPT:
            row["teaching"] = statistics.mean(bench.kept(f"taught {seed} {arm}", dict)["cpu"] for seed in seeds)
        for name, values in measured.items():
            losses = values[arm]
            row[name] = {"mean": statistics.mean(losses), "spread": statistics.stdev(losses) if len(seeds) > 1 else 0.0}
        rows.append(row)
    compared = [
        {"preferred": mine, "other": other, "at": name} | comparison(measured[name][mine], measured[name][other])
        for mine, other in COMPARED
        for name in measured
    ]
    points = {arm: [list(map(statistics.mean, zip(*each))) for each in zip(*curves[arm])] for arm in ARMS}
    tried = {
        arm: {f"{run['rate']:g}": run["validation"][-1][1] for run in bench.tried(arm)} for arm in (*PLAIN, KEPT[0])
    }
    return {"cut": cut, "seconds": shortest, "rows": rows, "compared": compared, "curves": points, "tried": tried}


def table(found: dict[str, Any], settings: Settings) -> str:
    cut, sizes = found["cut"], found["cut"]["parameters"]
    tokens = settings.steps * settings.batch * settings.length
    by_tokens, by_time = f"{tokens} tokens", f"{found['seconds']:.0f} s"
    lines = [
        f"teacher {cut['teacher']:.4f}, {sizes['teacher'] / 1e6:.1f}M parameters; student {cut['loss']:.4f} just cut, "
        f"{sizes['student'] / 1e6:.1f}M, {sizes['student'] / sizes['teacher']:.0%}",
        f"{'':<18}{'rate':>7}{'s a step':>10}{'peak GB':>9}{by_tokens:>16}{'+-':>8}"
        f"{by_time:>9}{'+-':>8}{'teaching':>11}",
    ]
    for row in found["rows"]:
        teaching = f"{row['teaching']:.0f} s" if row["teaching"] else ""
        lines.append(
            f"{ARMS[row['arm']]:<18}{row['rate']:>7g}{row['step']:>10.2f}{row['peak'] / 1e9:>9.2f}"
            f"{row['tokens']['mean']:>16.4f}{row['tokens']['spread']:>8.4f}"
            f"{row['time']['mean']:>9.4f}{row['time']['spread']:>8.4f}{teaching:>11}"
        )
    for each in found["compared"]:
        verdict = layer_criteria.VERDICTS.get(each["verdict"], each["verdict"])
        lines.append(
            f"{ARMS[each['preferred']]} against {ARMS[each['other']]}, equal {each['at']}: "
            f"{each['difference']:+.4f} +- {each['half_interval']:.4f}, {verdict}"
        )
    for arm, losses in found["tried"].items():
        each = ", ".join(f"{loss:.4f} at {rate}" for rate, loss in losses.items())
        lines.append(f"{ARMS[arm]}, rates with the first seed: {each}")
    return "\n".join(lines)


def drawing(found: dict[str, Any]) -> "Figure":
    """Loss by CPU seconds of training, a line an arm, means over seeds."""
    from nemo_minitron.report.style import NARROW, new_figure, picture

    looks = {
        "lora": ("faint", "s", ":"),
        "lm": ("orange", "^", "--"),
        "live": ("blue", "o", "-"),
        "hidden": ("red", "v", "-."),
        "sampled": ("ink", "D", (0, (1, 1))),
    }

    @picture
    def draw(*, theme: Any) -> "Figure":
        figure, axes = new_figure(1.2 * NARROW, 0.8 * NARROW)
        for arm, (colour, marker, dash) in looks.items():
            seconds, losses = zip(*found["curves"][arm])
            axes.plot(seconds, losses, color=getattr(theme, colour), marker=marker, linestyle=dash, label=ARMS[arm])
        axes.axvline(found["seconds"], color=theme.faint, linewidth=0.8)
        axes.set_xlabel("CPU seconds of training, one thread")
        axes.set_ylabel("LM loss on the test text, nats a token")
        axes.set_title("Retraining after one cut")
        axes.legend()
        return figure

    return draw()


def small_teacher(folder: Path, steps: int) -> Path:
    """A teacher of TEACHER's shape, trained for a few steps."""
    if not folder.exists():
        model = s.new_model(TEACHER, 0)
        s.train(model, steps, 2e-3, 16, folder.parent / "data" / "train", 0)
        s.save(model, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="text, as minitron data's source")
    parser.add_argument("--model", help="the teacher, a checkpoint; none: a small one is trained")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="only these, and no table")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--cut", choices=layer_criteria.METHODS, default=Settings.cut, help="prune.method")
    parser.add_argument("--folder", help="where to work, and to go on; none: runs/retraining")
    parser.add_argument("--json", help="file to write; none: the folder's name with .json")
    parser.add_argument("--picture", help="PNG to write")
    parser.add_argument(
        "--criteria", nargs="*", choices=layer_criteria.CRITERIA, metavar="NAME",
        help="compare these criteria of layers (none named: all), and do not retrain",
    )  # fmt: skip
    parser.add_argument("--drop", nargs="+", type=int, help="with --criteria: numbers of layers to drop")
    parser.add_argument("--methods", nargs="+", choices=layer_criteria.METHODS, default=list(layer_criteria.METHODS))
    parser.add_argument("--quick", action="store_true", help="a small teacher and a few steps, to see that it runs")
    options = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    folder = Path(options.folder or f"runs/retraining{'-quick' if options.quick else ''}")
    settings = Settings(steps=options.steps, cut=options.cut)
    if not options.model:
        settings = dataclasses.replace(settings, layers=4, length=s.LENGTH)
    if options.quick:
        settings = dataclasses.replace(
            settings, samples=8, refit_samples=8, steps=4, validations=2, windows=4, warmup=1
        )
        options.seeds = options.seeds[:2]
    s.prepared(folder / "data", options.source, **({"tokenizer": options.model} if options.model else {}))
    model = Path(options.model) if options.model else small_teacher(folder / "teacher", 20 if options.quick else 600)
    bench = Bench(model, folder, settings, options.seeds[0])
    started = time.perf_counter()
    if options.criteria is not None:
        names = options.criteria or list(layer_criteria.CRITERIA)
        found = layer_criteria.run(bench, options.seeds, options.drop, options.methods, names)
    elif options.arms:
        for seed in options.seeds:
            for arm in options.arms:
                bench.arm(arm, seed)
        return
    else:
        found = summary(bench, options.seeds)
        print(table(found, settings))
        if options.picture:
            from nemo_minitron.report.style import png

            Path(options.picture).write_bytes(png(drawing(found)))
    machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
    head = {"settings": dataclasses.asdict(settings), "seeds": options.seeds, "machine": machine}
    content = {**head, "seconds_here": time.perf_counter() - started, **found}
    name = options.json or f"{folder}{'' if options.criteria is None else '-criteria'}.json"
    Path(name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
