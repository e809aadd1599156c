"""`minitron search` against the shapes that it has to beat, budget by budget and seed by seed.

    python benchmarks/search.py --teacher DIR --data DIR --output runs/search --budgets 75 60 50 --seeds 3

Of each budget: the search's winner (of each seed), the uniform shape, the shapes cut in depth alone and in width alone,
and what ModelOpt's own search picks: its grid, its ten largest candidates within the parameters, from the same scores,
each scored by the loss of its own cut on the same held-out samples. All are cut the same way (compensated, refitted
once) and distilled for the same steps on the same samples of the seed, from the same kept answers. Losses are nats a
token on the first windows of the test text; beside them the KD loss on validation text, by which the search ranks. With
--ranks N the N best cuts are all distilled to the end, and Kendall's tau of their ranks at each validation with those
at the end is printed.

What is measured is kept in the output's folder; the same command goes on. Prints a table and writes table.json.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: ModelOpt 0.43's defaults: of the legal widths the largest 40 % are looked at, of the depths 20 %; where no shape is
#: small enough, more.
REACH = ((0.4, 0.2), (0.6, 0.4), (0.8, 0.6))
TOP = 10


class Bench:
    """Settings, and what was measured so far."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.folder = arguments, Path(arguments.output)
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, name: str) -> Path:
        return self.folder / "measured" / f"{name.replace(' ', '-')}.json"

    def has(self, name: str) -> bool:
        return self.file(name).exists()

    def kept(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of that name, measured unless they were before; with wall and CPU seconds."""
        file = self.file(name)
        if not file.exists():
            started, cpu = time.perf_counter(), time.process_time()
            found = measure()
            found |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(found, indent=1))
            print(name, json.dumps({key: value for key, value in found.items() if key != "validation"}), flush=True)
        return dict(json.loads(file.read_text()))

    def training(self, steps: int, seed: int) -> dict[str, Any]:
        """Fields of a stage that trains or runs a model."""
        from nemo_minitron import config as c

        how = self.arguments
        return {
            "seed": seed,
            "trainer": c.TrainerConfig(
                max_steps=steps, val_check_interval=steps, limit_val_batches=how.validation_batches, precision="32"
            ),
            "model": c.ModelConfig(
                restore_from_path=how.teacher,
                micro_batch_size=how.batch,
                global_batch_size=how.batch,
                data=c.ModelDataConfig(data_prefix=how.data, seq_length=how.length, num_workers=0, windows="fixed"),
                optim=c.OptimConfig(
                    lr=how.lr, sched=c.SchedConfig(warmup_steps=max(1, steps // 4), min_lr=how.lr / 10)
                ),
            ),
        }

    def search_config(self, budget: int, seed: int, **fields: Any) -> Any:
        from nemo_minitron import config as c

        how = self.arguments
        training = self.training(how.steps, seed)
        return c.validated(
            c.SearchConfig(
                output=str(self.folder / f"search-{budget}-{seed}"),
                search=c.SearchSettings(
                    parameters=f"{budget}%", measured=how.measured, samples=how.samples, candidates=how.candidates,
                    steps=how.first, speed_rounds=0, **fields
                ),
                prune=self.cut(),
                **training,
            )
        )  # fmt: skip

    def cut(self) -> Any:
        from nemo_minitron import config as c

        how = self.arguments
        return c.SearchCutConfig(
            num_samples=how.calibration, num_block_samples=how.block_samples, seed=how.calibration_seed,
            scores_path=how.scores or str(self.folder / "scores"),
        )  # fmt: skip


def searched(bench: Bench, budget: int, seed: int) -> dict[str, Any]:
    """search.json of a search, and what each part took."""
    from nemo_minitron.search.command import search

    def measure() -> dict[str, Any]:
        config = bench.search_config(budget, seed)
        search(config)
        return dict(json.loads((Path(config.output) / "search.json").read_text()))

    return bench.kept(f"search {budget} {seed}", measure)


def answers(bench: Bench, seed: int) -> Path:
    """The teacher's answers to what a distillation of the seed reads."""
    from nemo_minitron import config as c
    from nemo_minitron.distillation.teach.command import teach

    how = bench.arguments
    folder = bench.folder / f"answers-{seed}"

    def measure() -> dict[str, Any]:
        fields = bench.training(how.steps, seed)
        fields["model"].nemo_path = str(folder)
        asked = c.AnswersConfig(tokens=how.steps * how.batch * how.length, precision="fp32")
        teach(c.validated(c.TeachConfig(**fields, teach=asked)))
        return {"folder": str(folder)}

    bench.kept(f"teach {seed}", measure)
    return folder


def cut_of(bench: Bench, name: str, sizes: dict[str, int]) -> Path:
    """The cut of a shape, as `minitron prune` makes it of the same scores."""
    from nemo_minitron.pruning.command import prune
    from nemo_minitron.search.measuring import prune_config

    place = bench.folder / "cuts" / name
    if not place.exists():
        config = bench.search_config(bench.arguments.budgets[0], bench.arguments.calibration_seed)
        prune(prune_config(config, sizes, str(place)))
    return place


def distilled(bench: Bench, name: str, sizes: dict[str, int], seed: int, every: int | None = None) -> dict[str, Any]:
    """Test loss of a shape, cut and distilled; its validation losses on the way, every so many steps."""
    from nemo_minitron import config as c
    from nemo_minitron.artifacts import Manifest
    from nemo_minitron.distillation.command import distill

    how = bench.arguments

    def measure() -> dict[str, Any]:
        cut, output = cut_of(bench, name, sizes), bench.folder / f"student-{name}-{seed}"
        fields = bench.training(how.steps, seed)
        fields["trainer"].val_check_interval = every or how.steps
        fields["model"].restore_from_path, fields["model"].nemo_path = str(cut), str(output)
        kd = c.KDConfig(teacher=str(answers(bench, seed)))
        distill(c.validated(c.DistillConfig(**fields, kd=kd, monitor="last")))
        manifest = Manifest.read(output)
        found = {"validation": manifest.metrics["validation"], "loss": test_loss(bench, output)}
        found |= {"distill_seconds": manifest.timings["total_seconds"]}
        shutil.rmtree(output, ignore_errors=True)
        return found

    on_the_way = f"ranked {name} {seed}"
    if every or bench.has(on_the_way):
        return bench.kept(on_the_way, measure)
    return bench.kept(f"distilled {name} {seed}", measure)


def just_cut(bench: Bench, name: str, sizes: dict[str, int]) -> float:
    """Test loss of a shape's cut."""
    return float(bench.kept(f"cut {name}", lambda: {"loss": test_loss(bench, cut_of(bench, name, sizes))})["loss"])


def test_loss(bench: Bench, path: Path) -> float:
    """Nats a token on the first windows of the test text."""
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint
    from nemo_minitron.data.samples import consecutive_sequences
    from nemo_minitron.evaluation.loss import mean_loss
    from nemo_minitron.megatron.forward import load_model

    how, checkpoint = bench.arguments, open_checkpoint(path)
    text = consecutive_sequences([f"{how.data}/test"], how.length, how.test_samples)
    with ranks(bench) as layout:
        return mean_loss(load_model(checkpoint.architecture, layout, checkpoint), text, how.batch)


@contextlib.contextmanager
def ranks(bench: Bench) -> Any:
    from nemo_minitron.megatron.forward import parallel_ranks
    from nemo_minitron.megatron.layout import layout_of
    from nemo_minitron.megatron.session import engine

    fields = bench.training(1, 1)
    layout = layout_of(fields["trainer"], fields["model"])
    with engine(1, bench.folder / "log", cuda=layout.cuda), parallel_ranks(layout, 1):
        yield layout


def modelopts_pick(bench: Bench, budget: int) -> dict[str, Any]:
    """What ModelOpt's search picks from the package's scores, the loss of a candidate's cut as its score."""

    def measure() -> dict[str, Any]:
        import modelopt.torch.prune as mtp
        from modelopt.torch.prune.plugins.mcore_minitron import MCoreMinitronConfig

        from nemo_minitron.data.samples import random_sequences
        from nemo_minitron.evaluation.loss import mean_loss
        from nemo_minitron.megatron.forward import load_model
        from nemo_minitron.megatron.modelopt_norms import local_norms_prunable
        from nemo_minitron.pruning.importance.scoring import with_values
        from nemo_minitron.search.measuring import prune_config, read_scores
        from nemo_minitron.search.task import resolved

        how, config = bench.arguments, bench.search_config(budget, 1)
        task = resolved(config)
        teacher, choices = task.teacher, task.space.choices
        scores = read_scores(prune_config(config, {"num_layers": 2}), teacher)
        held_out, _ = random_sequences([f"{how.data}/validation"], how.samples, how.length, how.calibration_seed)
        steps = {name: choices[name][1] - choices[name][0] for name in choices}
        divisors = {f"{name}_divisor": steps[name] for name in ("hidden_size", "ffn_hidden_size", "num_layers")}

        def calibrate(model: Any) -> None:
            for index, layer in enumerate(model.decoder.layers):
                layer._scores = float(scores.block_influence[index])
                layer.mlp._activations = scores.ffn[index].clone()
                layer.self_attention._activations = scores.heads[index].clone()
            model._activations = dict(enumerate(scores.hidden.clone()))

        for width, depth in REACH:
            with ranks(bench) as layout, local_norms_prunable():
                model = load_model(teacher.architecture, layout, teacher, local_spec=True)
                try:
                    mtp.prune(
                        model,
                        mode=[("mcore_minitron", with_values(MCoreMinitronConfig(), divisors))],
                        constraints={"params": task.budgets[0].limit},
                        dummy_input=None,
                        config={
                            "forward_loop": calibrate,
                            "score_func": lambda one: -mean_loss(one, held_out, how.batch),
                            "max_width_pruning": width, "max_depth_pruning": depth, "top_k": TOP,
                        },
                    )  # fmt: skip
                except AssertionError as error:
                    if "No subnets" not in str(error):
                        raise
                    continue
                names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
                sizes = {name: int(getattr(model.config, name)) for name in names}
                return {"sizes": sizes, "max_width_pruning": width, "max_depth_pruning": depth}
        raise SystemExit(f"ModelOpt finds no shape within {budget} %")

    return bench.kept(f"modelopt {budget}", measure)


def contenders(bench: Bench, budget: int) -> dict[str, list[Any]]:
    """Kind -> its shape for each seed; the winner's depends on the seed."""
    from nemo_minitron.search.task import resolved

    task = resolved(bench.search_config(budget, 1))
    seeds, teacher = range(1, bench.arguments.seeds + 1), task.teacher.architecture
    shapes = task.by_name()
    found: dict[str, list[Any]] = {
        "search": [shapes[searched(bench, budget, seed)["winner"]["name"]] for seed in seeds]
    }
    if bench.arguments.modelopt:
        found["modelopt"] = [teacher.with_sizes(**modelopts_pick(bench, budget)["sizes"]) for _ in seeds]
    for kind, shape in task.rivals.items():
        found[kind] = [shape for _ in seeds]
    return found


def compared(bench: Bench, budget: int) -> list[dict[str, Any]]:
    """The rows of a budget's table."""
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint
    from nemo_minitron.search.space import name_of, sizes_of

    teacher, rows = open_checkpoint(bench.arguments.teacher).architecture, []
    for kind, shapes in contenders(bench, budget).items():
        runs = [
            distilled(bench, name_of(shape), sizes_of(shape, teacher), seed) for seed, shape in enumerate(shapes, 1)
        ]
        rows.append(
            {
                "budget": budget, "kind": kind, "shapes": [name_of(shape) for shape in shapes],
                "parameters": [shape.parameters() for shape in shapes],
                "cut": [just_cut(bench, name_of(shape), sizes_of(shape, teacher)) for shape in shapes],
                "losses": [run["loss"] for run in runs],
                "kd": [run["validation"][-1]["kd_loss"] for run in runs],
                "seconds": [run["distill_seconds"] for run in runs],
            }
        )  # fmt: skip
    return rows


def verdict(winner: list[float], other: list[float]) -> str:
    """The mean difference of pairs of a seed, and whether it exceeds what it spreads (one standard deviation)."""
    pairs = [b - a for a, b in zip(winner, other, strict=True)]
    spread = statistics.stdev(pairs) if len(pairs) > 1 else 0.0
    difference = statistics.mean(pairs)
    words = "same shape" if not any(pairs) else "better" if difference > spread else "not better"
    return f"{difference:+.4f} +- {spread:.4f}, {words}"


def ranked(bench: Bench, budget: int, seed: int) -> dict[str, Any]:
    """Kendall's tau between ranks of the best cuts after so many steps and at the end, by each loss.

    All are distilled to the end, in one run each, so that learning rates on the way are those of the whole run.

    Returns:
        `losses`: of each shape, at each validation and of the test text at the end; `tau`: kd_loss, lm_loss or cut ->
        steps -> with its own ranks at the end, and with those of the test text's loss.
    """
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint
    from nemo_minitron.search.rounds import kendall_tau
    from nemo_minitron.search.space import sizes_of
    from nemo_minitron.search.task import resolved

    how, result = bench.arguments, searched(bench, budget, seed)
    shapes = resolved(bench.search_config(budget, seed)).by_name()
    teacher = open_checkpoint(how.teacher).architecture
    cuts = {one["name"]: one["loss"] for one in result["shapes"] if one["loss"] and one["predicted"]}
    names = sorted(cuts, key=lambda name: cuts[name])[: how.ranks]
    cuts = {name: cuts[name] for name in names}
    every = max(1, how.steps // 8)
    runs = {name: distilled(bench, name, sizes_of(shapes[name], teacher), seed, every=every) for name in names}
    test = {name: run["loss"] for name, run in runs.items()}
    tau: dict[str, Any] = {"cut": {0: {"test": kendall_tau(cuts, test)}}}
    for metric in ("kd_loss", "lm_loss"):
        at: dict[int, dict[str, float]] = {}
        for name, run in runs.items():
            for line in run["validation"]:
                at.setdefault(line["step"], {})[name] = line[metric]
        last = at[max(at)]
        tau["cut"][0][metric] = kendall_tau(cuts, last)
        tau[metric] = {
            step: {"own": kendall_tau(losses, last), "test": kendall_tau(losses, test)} for step, losses in at.items()
        }
    losses = {name: {"cut": cuts[name], "validation": runs[name]["validation"], "test": test[name]} for name in names}
    return {"budget": budget, "seed": seed, "losses": losses, "tau": tau}


def settling(found: dict[str, Any]) -> str:
    """The taus of `ranked` as a table."""
    tau = found["tau"]
    lines = [f"{len(found['losses'])} shapes at {found['budget']} %, Kendall's tau with the ranks at the end"]
    lines.append(f"{'after':>9}{'KD to KD':>10}{'KD to test':>12}{'LM to LM':>10}{'LM to test':>12}")
    cut = tau["cut"][0]
    lines.append(
        f"{'the cut':>9}{cut['kd_loss']:>10.2f}{cut['test']:>12.2f}{cut['lm_loss']:>10.2f}{cut['test']:>12.2f}"
    )
    for step, kd in tau["kd_loss"].items():
        lm = tau["lm_loss"][step]
        lines.append(f"{step:>9}{kd['own']:>10.2f}{kd['test']:>12.2f}{lm['own']:>10.2f}{lm['test']:>12.2f}")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    head = (
        f"{'budget':>6}  {'kind':<9}{'parameters':>11}{'just cut':>10}{'distilled':>11}{'+-':>8}{'KD loss':>9}{'+-':>8}"
    )
    lines = [f"{head}  shape, verdict on the distilled, on the KD loss"]
    for row in rows:
        winner = next(one for one in rows if one["budget"] == row["budget"] and one["kind"] == "search")
        spreads = [statistics.stdev(row[what]) if len(row[what]) > 1 else 0.0 for what in ("losses", "kd")]
        verdicts = [verdict(winner[what], row[what]) for what in ("losses", "kd")]
        lines.append(
            f"{row['budget']:>5}%  {row['kind']:<9}{statistics.mean(row['parameters']) / 1e6:>10.1f}M"
            f"{statistics.mean(row['cut']):>10.4f}{statistics.mean(row['losses']):>11.4f}{spreads[0]:>8.4f}"
            f"{statistics.mean(row['kd']):>9.4f}{spreads[1]:>8.4f}  {', '.join(dict.fromkeys(row['shapes']))}"
            f"{'' if row is winner else '  ' + '; '.join(verdicts)}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="checkpoint with its tokenizer")
    parser.add_argument("--data", required=True, help="folder that `minitron data` made with its tokenizer")
    parser.add_argument("--output", default="runs/search")
    parser.add_argument("--budgets", type=int, nargs="+", default=[75, 60, 50], help="parameters, %% of the teacher's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="of a student's final distillation")
    parser.add_argument("--first", type=int, default=10, help="steps of the first round of the search")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--measured", type=int, default=64)
    parser.add_argument("--samples", type=int, default=24, help="held-out samples of a cut's loss")
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--block-samples", type=int, default=32)
    parser.add_argument("--calibration-seed", type=int, default=1234)
    parser.add_argument("--scores", help="folder of scores; none: in the output's")
    parser.add_argument("--validation-batches", type=int, default=8)
    parser.add_argument("--test-samples", type=int, default=96)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--no-modelopt", dest="modelopt", action="store_false")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="also how soon ranks of the N best cuts settle, first budget and seed"
    )
    bench = Bench(parser.parse_args())
    told: dict[str, Any] = {"settings": vars(bench.arguments)}
    if bench.arguments.ranks:
        told["ranks"] = ranked(bench, bench.arguments.budgets[0], 1)
        print(settling(told["ranks"]), flush=True)
    rows: list[dict[str, Any]] = []
    for budget in bench.arguments.budgets:
        rows += compared(bench, budget)
        print(table(rows), flush=True)
    (bench.folder / "table.json").write_text(json.dumps(told | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
