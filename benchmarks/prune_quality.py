"""What a cut keeps: test loss of students of one teacher, just cut and after equal distillation, method by method.

    python benchmarks/prune_quality.py --source DIR [--seeds 0 1 2] [--steps 150] [--json FILE] [--quick]

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
VOCABULARY, LENGTH = 1024, 128


@dataclasses.dataclass
class Recipe:
    """Lengths of a run."""

    teacher_steps: int = 900
    steps: int = 150
    samples: int = 128
    test_windows: int = 256


def windows(prefix: Path, count: int, generator: Any) -> Any:
    """Random training windows [count, LENGTH + 1]."""
    import numpy
    import torch

    from nemo_minitron.data.samples import token_stream

    stream = token_stream(str(prefix))
    starts = torch.randint(0, len(stream) - LENGTH, (count,), generator=generator)
    return torch.stack([torch.from_numpy(stream[start : start + LENGTH + 1].astype(numpy.int64)) for start in starts])


def loss_of(model: Any, tokens: Any) -> float:
    """Mean loss a token on windows [n, LENGTH + 1], nats."""
    import torch

    total = 0.0
    with torch.no_grad():
        for part in tokens.split(32):
            logits = model(part[:, :-1]).logits
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            )
    return total / (len(tokens) * LENGTH)


def train(model: Any, steps: int, lr: float, batch: int, prefix: Path, seed: int, teacher: Any = None) -> None:
    """AdamW with a cosine and clipping; on the text, or by forward KL on a teacher's logits."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=max(1, steps // 20))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - steps // 20), eta_min=lr / 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decay], [max(1, steps // 20)])
    model.train()
    for _ in range(steps):
        tokens = windows(prefix, batch, generator)
        logits = model(tokens[:, :-1]).logits.flatten(0, 1)
        if teacher is None:
            loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        else:
            with torch.no_grad():
                target = teacher(tokens[:, :-1]).logits.flatten(0, 1).log_softmax(-1)
            own = logits.log_softmax(-1)
            loss = torch.nn.functional.kl_div(own, target, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def make_teacher(folder: Path, data: Path, recipe: Recipe, seed: int) -> None:
    """A teacher from random weights, saved as a Hugging Face directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    t = TEACHER
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=t["hidden_size"], intermediate_size=t["ffn_hidden_size"],
            num_hidden_layers=t["num_layers"], num_attention_heads=t["num_attention_heads"],
            num_key_value_heads=t["num_query_groups"], head_dim=t["kv_channels"], max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    train(model, recipe.teacher_steps, 2e-3, 16, data / "train", seed)
    model.save_pretrained(folder)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def prune_config(run: Path, recipe: Recipe, seed: int, output: Path, **targets: Any) -> Any:
    """Settings of `minitron prune` for this run's teacher."""
    from nemo_minitron import config as c

    return c.validated(
        c.PruneConfig(
            seed=seed,
            to="hf",
            trainer=c.TrainerConfig(accelerator="cpu"),
            model=c.PruneModelConfig(
                restore_from_path=str(run / "teacher"),
                data=c.ModelDataConfig(data_prefix=str(run.parent / "data"), seq_length=LENGTH),
            ),
            inference=c.InferenceConfig(batch_size=16),
            prune=c.PruneTargets(**GRID, num_samples=recipe.samples, num_block_samples=recipe.samples, **targets),
            export=c.ExportConfig(save_path=str(output)),
        )
    )


def made_up_scores(folder: Path, teacher: Path, method: str, seed: int) -> None:
    """Scores at random, or by the norms of weights: of a channel's rows and columns, of a layer's matrices."""
    import torch

    from nemo_minitron.artifacts import ImportanceScores
    from nemo_minitron.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(teacher)
    a, generator = checkpoint.architecture, torch.Generator().manual_seed(seed)
    folder.mkdir()
    if method == "random":
        shapes = {
            "hidden": (2 * a.num_layers, a.hidden_size), "ffn": (a.num_layers, a.ffn_hidden_size),
            "heads": (a.num_layers, a.num_attention_heads * a.kv_channels), "block_influence": (a.num_layers,),
        }  # fmt: skip
        scores = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    else:
        inside = [
            {name: checkpoint.tensors[f"decoder.layers.{layer}.{name}.weight"].read() for name in (
                "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")}
            for layer in range(a.num_layers)
        ]  # fmt: skip
        qkv, proj, fc1, fc2 = zip(*(matrices.values() for matrices in inside))
        reads = [matrix.pow(2).sum(0) for pair in zip(qkv, fc1) for matrix in pair]
        writes = [matrix.pow(2).sum(1) for pair in zip(proj, fc2) for matrix in pair]
        gates = [matrix.view(2, a.ffn_hidden_size, -1).pow(2).sum((0, 2)) for matrix in fc1]
        scores = {
            "hidden": torch.stack([(sum(reads) + sum(writes)).clone()] * (2 * a.num_layers)),
            "ffn": torch.stack([gate + matrix.pow(2).sum(0) for gate, matrix in zip(gates, fc2)]),
            "heads": torch.stack([matrix.pow(2).sum(0) for matrix in proj]),
            "block_influence": torch.stack([sum(m.pow(2).sum() for m in matrices.values()) for matrices in inside]),
        }
    ImportanceScores(**scores).save(folder)


def cut(run: Path, recipe: Recipe, seed: int, shape: str, method: str) -> Path:
    """A student, by the package's stages."""
    from nemo_minitron.flow import score_and_scan
    from nemo_minitron.pruning.stage import prune

    output = run / f"{shape}-{method}".replace(" ", "-").replace("%", "")
    own = method in ("random", "magnitude")
    config = prune_config(
        run, recipe, seed, output, **SHAPES[shape],
        method="compensated" if method.startswith("compensated") else "minitron",
        depth_by="block_loss" if method.endswith(" block") else "block_influence",
        scores_path=str(run / ("scores" if not own else f"scores-{method}")),
    )  # fmt: skip
    if own:
        if not (run / f"scores-{method}").exists():
            made_up_scores(run / f"scores-{method}", run / "teacher", method, seed)
        prune(config, run / f"scores-{method}")
    else:
        prune(config, *score_and_scan(config))
    return output


def run_seed(folder: Path, recipe: Recipe, seed: int, shapes: list[str]) -> list[dict[str, Any]]:
    """All students of one teacher."""
    import torch

    from nemo_minitron.data.samples import consecutive_sequences

    data, run = folder / "data", folder / f"seed-{seed}"
    test = consecutive_sequences([str(data / "test")], LENGTH, recipe.test_windows)
    make_teacher(run / "teacher", data, recipe, seed)
    teacher = load(run / "teacher")
    base = loss_of(teacher, test)
    print(f"seed {seed}: teacher {base:.4f}", flush=True)
    rows = []
    for shape in shapes:
        for method in METHODS:
            if method.endswith(" block") and "num_layers" not in SHAPES[shape]:
                continue
            student = load(cut(run, recipe, seed, shape, method))
            torch.manual_seed(seed)
            parameters = sum(parameter.numel() for parameter in student.parameters())
            just_cut = loss_of(student, test)
            train(student, recipe.steps, 5e-4, 8, data / "train", seed + 1000, teacher)
            rows.append(
                {
                    "seed": seed, "shape": shape, "method": method, "parameters": parameters, "teacher_loss": base,
                    "share": parameters / sum(parameter.numel() for parameter in teacher.parameters()),
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
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--folder", default="prune_quality", help="where to work; must not exist")
    parser.add_argument("--json", default="prune_quality.json", help="file to write")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    recipe = Recipe(20, 3, 16, 16) if options.quick else Recipe(steps=options.steps)
    folder = Path(options.folder)
    if folder.exists():
        sys.exit(f"{folder} exists; give another --folder")
    from nemo_minitron.config import DataConfig
    from nemo_minitron.data.stage import prepare

    prepare(DataConfig(output=str(folder / "data"), source=options.source, vocab_size=VOCABULARY))
    started, rows = time.perf_counter(), []
    for seed in options.seeds:
        rows += run_seed(folder, recipe, seed, options.shapes)
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
