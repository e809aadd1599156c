"""Fixed shares of two sources beside dynamic ones: a teacher cut in depth, distilled on each, seed by seed.

    python benchmarks/blend.py --teacher DIR --wiki DIR --output runs/blend

The sources are a folder of text (WikiText-2) and the Python source of the installed packages that `--code` names, which
have little in common. The cut is the package's, `prune.num_layers`; both arms of a seed start from it, with the given
shares, the same steps and the same samples validated on. Prints, and writes to table.json, each source's validation
loss at the end of each run, its excess over the teacher's, and whether dynamic shares end with the lower worst excess.
"""

import argparse
import importlib.util
import json
from pathlib import Path
from statistics import mean
from typing import Any

WIKI, CODE = "wiki", "code"


def code_corpus(packages: list[str], folder: Path, files: int) -> Path:
    """The Python source of installed packages as rows of text, the first `files` of them by name."""
    found = []
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{name} is not an installed package with source")
        found += sorted(Path(next(iter(spec.submodule_search_locations))).rglob("*.py"))
    folder.mkdir(parents=True, exist_ok=True)
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in found[:files])
    (folder / "code.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts if text.strip()))
    return folder


def distilled(arguments: argparse.Namespace, folder: Path, student: Path, seed: int, dynamic: bool) -> dict[str, Any]:
    """The metrics of one run."""
    from nemo_minitron import config as c
    from nemo_minitron.distillation.command import distill

    data = c.ModelDataConfig(
        data_prefix=str(folder / "data"), blend=dict(arguments.shares), seq_length=arguments.length, num_workers=0
    )
    data.dynamic = dynamic
    config = c.DistillConfig(
        seed=seed,
        monitor="last",
        trainer=c.TrainerConfig(
            max_steps=arguments.steps,
            val_check_interval=max(1, arguments.steps // arguments.validations),
            limit_val_batches=arguments.validation_batches,
        ),
        model=c.ModelConfig(
            restore_from_path=str(student),
            kd_teacher_restore_from_path=arguments.teacher,
            nemo_path=str(folder / f"{'dynamic' if dynamic else 'fixed'}-{seed}"),
            micro_batch_size=arguments.batch,
            global_batch_size=arguments.batch,
            data=data,
            optim=c.OptimConfig(
                lr=arguments.lr,
                sched=c.SchedConfig(warmup_steps=max(1, arguments.steps // 10), min_lr=arguments.lr / 10),
            ),
        ),
    )
    return dict(distill(c.validated(config)).metrics)


def compared(arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes the corpora and the student, and runs both arms of each seed."""
    from nemo_minitron import config as c
    from nemo_minitron.data.command import prepare
    from nemo_minitron.pruning.command import prune

    folder = Path(arguments.output)
    code = code_corpus(arguments.code.split(","), folder / "text", arguments.files)
    sources = {WIKI: arguments.wiki, CODE: str(code)}
    prepare(c.validated(c.DataConfig(output=str(folder / "data"), sources=sources, tokenizer=arguments.teacher)))
    student = folder / "student"
    cut = c.PruneConfig(
        model=c.PruneModelConfig(
            restore_from_path=arguments.teacher,
            data=c.ModelDataConfig(
                data_prefix=str(folder / "data"), blend=dict(arguments.shares), seq_length=arguments.length
            ),
        ),
        inference=c.InferenceConfig(batch_size=arguments.batch),
        prune=c.PruneTargets(
            num_layers=arguments.layers, num_samples=64, num_block_samples=16, scores_path=str(folder / "scores")
        ),
        export=c.ExportConfig(save_path=str(student)),
    )
    prune(c.validated(cut))
    runs: list[dict[str, Any]] = []
    for seed in range(1, arguments.seeds + 1):
        arms = {dynamic: distilled(arguments, folder, student, seed, dynamic) for dynamic in (True, False)}
        reference = {name: told["reference"] for name, told in arms[True]["blend"].items()}
        for dynamic, metrics in arms.items():
            last = metrics["validation"][-1]
            losses = {name: last[f"lm_loss/{name}"] for name in reference}
            runs.append(
                {
                    "seed": seed,
                    "shares": "dynamic" if dynamic else "fixed",
                    "samples": {name: told["samples"] for name, told in metrics["blend"].items()},
                    "losses": losses,
                    "kd_losses": {name: last[f"kd_loss/{name}"] for name in reference},
                    "excess": {name: losses[name] - reference[name] for name in reference},
                    "reference": reference,
                }
            )
            print(json.dumps(runs[-1]), flush=True)
    return {"settings": vars(arguments), "runs": runs, **agreement(runs)}


def agreement(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and in how many seeds dynamic shares end with the lower largest excess."""
    arms = {arm: [run for run in runs if run["shares"] == arm] for arm in ("fixed", "dynamic")}
    means = {
        arm: {name: mean(run["excess"][name] for run in own) for name in own[0]["excess"]} for arm, own in arms.items()
    }
    pairs = list(zip(arms["fixed"], arms["dynamic"], strict=True))
    better = sum(max(dynamic["excess"].values()) < max(fixed["excess"].values()) for fixed, dynamic in pairs)
    return {"mean_excess": means, "seeds_with_lower_largest_excess": better, "seeds": len(pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="checkpoint with its tokenizer")
    parser.add_argument("--wiki", required=True, help="folder of text, the first source")
    parser.add_argument("--code", default="transformers,torch", help="packages whose source is the second")
    parser.add_argument("--files", type=int, default=400, help="files of it at most")
    parser.add_argument("--output", default="runs/blend")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--validations", type=int, default=15, help="in a run; shares follow each")
    parser.add_argument("--validation-batches", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--share", type=float, default=0.5, help="of the first source at the start")
    arguments = parser.parse_args()
    arguments.shares = {WIKI: arguments.share, CODE: 1 - arguments.share}
    table = compared(arguments)
    Path(arguments.output, "table.json").write_text(json.dumps(table, indent=1))
    print(json.dumps({key: value for key, value in table.items() if key not in ("runs", "settings")}, indent=1))


if __name__ == "__main__":
    main()
