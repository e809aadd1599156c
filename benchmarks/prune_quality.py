"""What a cut keeps: test loss of students of one teacher, just cut and after equal distillation, method by method.

    python benchmarks/prune_quality.py --source DIR [--model DIR] [--seeds 0 1 2] [--steps 150] [--json FILE] [--quick]

With --model, any checkpoint is the teacher: real_model.py says what is done. Without, small ones are trained.

For each seed: a Llama-shaped teacher is trained on the training text of DIR (a folder with train.txt or valid.txt and
test.txt, or any text that `minitron data` takes), scored once, and cut to each shape by each method; each student is
then distilled by the same number of steps of the same batches (forward KL on the teacher's logits). The seed decides
the teacher's weights, the calibration samples, the random cut and the batches. Training is plain PyTorch on
transformers' models; scores, scans and cuts are the package's own stages.

Methods: `random` drops channels, neurons, heads and layers at random; `magnitude` those of the least norm of weights;
`minitron` those of the least importance (ModelOpt's estimators; layers by block influence); `compensated` the same with
`prune.method=compensated`; `minitron block` and `compensated block` drop the contiguous block of layers of least loss.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import real_model

from students import (
    load,
    loss_of,
    made_up_scores,
    new_model,
    parameters_of,
    prepared,
    prune_config,
    save,
    test_windows,
    train,
)

TEACHER = {
    "family": "llama", "num_layers": 6, "hidden_size": 192, "ffn_hidden_size": 512, "num_attention_heads": 8,
    "num_query_groups": 4, "kv_channels": 24, "seq_length": 128,
}  # fmt: skip
SHAPES: dict[str, dict[str, int]] = {
    "width 75 %": {"hidden_size": 160, "ffn_hidden_size": 416},
    "width 50 %": {"hidden_size": 128, "ffn_hidden_size": 320},
    "width 35 %": {"hidden_size": 96, "ffn_hidden_size": 288, "num_attention_heads": 4},
    "depth 75 %": {"num_layers": 4},
    "depth 50 %": {"num_layers": 3},
    "both 35 %": {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 320},
}
METHODS = ("random", "magnitude", "minitron", "minitron block", "compensated", "compensated block")
GRID = {"hidden_size_divisor": 16, "ffn_hidden_size_divisor": 16, "num_layers_divisor": 1}


@dataclasses.dataclass
class Recipe:
    """Lengths of a run."""

    teacher_steps: int = 900
    steps: int = 150
    samples: int = 128
    test_windows: int = 256


def cut(run: Path, recipe: Recipe, seed: int, shape: str, method: str) -> Path:
    """A student, by the package's stages."""
    from nemo_minitron.pruning.command import prune
    from nemo_minitron.pruning.student import cut_student

    output = run / f"{shape}-{method}".replace(" ", "-").replace("%", "")
    own = method in ("random", "magnitude")
    config = prune_config(
        run / "teacher", run.parent / "data", output, recipe.samples, seed, **GRID, **SHAPES[shape],
        method="compensated" if method.startswith("compensated") else "minitron",
        depth_by="block_loss" if method.endswith(" block") else "block_influence",
        scores_path=str(run / ("scores" if not own else f"scores-{method}")),
    )  # fmt: skip
    if own:
        if not (run / f"scores-{method}").exists():
            made_up_scores(run / f"scores-{method}", run / "teacher", method, seed)
        cut_student(config)
    else:
        prune(config)
    return output


def run_seed(folder: Path, recipe: Recipe, seed: int, shapes: list[str]) -> list[dict[str, Any]]:
    """All students of one teacher."""
    data, run = folder / "data", folder / f"seed-{seed}"
    test = test_windows(data, recipe.test_windows)
    teacher = new_model(TEACHER, seed)
    train(teacher, recipe.teacher_steps, 2e-3, 16, data / "train", seed)
    run.mkdir()
    save(teacher, run / "teacher")
    base = loss_of(teacher, test)
    print(f"seed {seed}: teacher {base:.4f}", flush=True)
    rows = []
    for shape in shapes:
        for method in METHODS:
            if method.endswith(" block") and "num_layers" not in SHAPES[shape]:
                continue
            student = load(cut(run, recipe, seed, shape, method))
            parameters = parameters_of(student)
            just_cut = loss_of(student, test)
            train(student, recipe.steps, 5e-4, 8, data / "train", seed + 1000, teacher)
            rows.append(
                {
                    "seed": seed, "shape": shape, "method": method, "parameters": parameters, "teacher_loss": base,
                    "share": parameters / parameters_of(teacher),
                    "just_cut": just_cut, "distilled": loss_of(student, test),
                }
            )  # fmt: skip
            print(f"  {shape:<11} {method:<15} {just_cut:.4f} {rows[-1]['distilled']:.4f}", flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds: losses, gaps to the teacher, and gaps over minitron's at the same shape."""
    found = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        means = {}
        for method in METHODS:
            mine = [row for row in rows if row["shape"] == shape and row["method"] == method]
            if mine:
                means[method] = {
                    "share": mine[0]["share"],
                    **{when: statistics.mean(row[when] for row in mine) for when in ("just_cut", "distilled")},
                    **{
                        f"{when}_gap": statistics.mean(row[when] - row["teacher_loss"] for row in mine)
                        for when in ("just_cut", "distilled")
                    },
                    "distilled_spread": statistics.stdev([row["distilled"] for row in mine]) if len(mine) > 1 else 0.0,
                }
        for method, values in means.items():
            ratios = {
                f"{when}_to_minitron": values[f"{when}_gap"] / means["minitron"][f"{when}_gap"]
                for when in ("just_cut", "distilled")
            }
            found.append({"shape": shape, "method": method, **values, **ratios})
    return found


HEADER = (
    f"{'shape':<12}{'of teacher':>10}  {'method':<15}{'just cut':>9}{'gap':>8}{'to minitron':>12}"
    f"{'distilled':>11}{'gap':>8}{'to minitron':>12}"
)


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['shape']:<12}{row['share']:>10.0%}  {row['method']:<15}"
        f"{row['just_cut']:>9.3f}{row['just_cut_gap']:>8.3f}"
        f"{row['just_cut_to_minitron']:>12.2f}{row['distilled']:>11.4f}{row['distilled_gap']:>8.4f}"
        f"{row['distilled_to_minitron']:>12.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="text, as minitron data's source")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150, help="distillation steps of each student")
    parser.add_argument("--shapes", nargs="+", default=None, help="names of shapes; default: all")
    real = parser.add_argument_group("with --model")
    real.add_argument("--model", help="the teacher: a checkpoint of any format")
    real.add_argument("--shares", nargs="+", type=float, default=[75, 62, 50], help="percent of the parameters")
    real.add_argument("--shape", nargs="+", action="append", metavar="NAME SIZE=N", help="a shape of one's own")
    real.add_argument("--methods", nargs="+", default=list(real_model.METHODS))
    real.add_argument("--rates", nargs="+", type=float, default=list(real_model.Settings.rates), help="peak rates")
    real.add_argument("--samples", type=int, default=64, help="calibration samples of 512 tokens")
    real.add_argument("--test-windows", type=int, default=64, help="of 512 tokens")
    real.add_argument("--batch", type=int, default=4, help="samples of a distillation step")
    real.add_argument("--training-length", type=int, default=256, help="tokens of such a sample")
    real.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    real.add_argument("--part", default="1/1", help="i/n: this process takes part i of n of the students")
    parser.add_argument("--folder", default="prune_quality", help="where to work; must not exist")
    parser.add_argument("--json", default="prune_quality.json", help="file to write")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    if options.model:
        real_model.run(options)
        return
    shapes = options.shapes or list(SHAPES)
    recipe = Recipe(20, 3, 16, 16) if options.quick else Recipe(steps=options.steps)
    folder = Path(options.folder)
    if folder.exists():
        sys.exit(f"{folder} exists; give another --folder")
    prepared(folder / "data", options.source)
    started, rows = time.perf_counter(), []
    for seed in options.seeds:
        rows += run_seed(folder, recipe, seed, shapes)
        found = {
            "summary": summary(rows), "rows": rows, "recipe": dataclasses.asdict(recipe), "teacher": TEACHER,
            "seconds": time.perf_counter() - started,
            "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        }  # fmt: skip
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")
    print(
        f"\nmeans over seeds {options.seeds}; losses in nats a token on the test text; gap: loss - teacher's\n{HEADER}"
    )
    for row in summary(rows):
        print(line(row))


if __name__ == "__main__":
    main()
