"""Repeats at small scale what the Minitron papers claim: one table a claim, the papers' figures beside ours.

    python benchmarks/reproduce.py --source DIR [--claims losses shapes ...] [--seeds 0 1 2] [--steps 80]
        [--json FILE] [--quick]

A: arXiv 2407.14679 v2, B: arXiv 2408.11796 v4. For each seed a Llama-shaped teacher is trained on the training text of
DIR (a folder with train.txt or valid.txt and test.txt, or any text that `minitron data` takes); students are cut from
it by the package's own stages with prune.method=minitron, the published cut, and trained in plain PyTorch by the same
number of steps of the same batches. Losses are nats a token on the test text.

Claims: losses (KL alone or with others), shapes (width or depth at equal parameters), block (contiguous layers or one
by one), importance (or random, or magnitude), correction (of the teacher), steps (one cut or two).

A verdict compares the arm that the papers prefer with each other arm: the difference of their losses, seed by seed, its
mean and the half width of its 95 % interval (Student's t). `agrees`: the preferred arm is better by more than that;
`within the spread`: by less, or worse by less; `does not agree`: worse by more.

Every student that is done stands in FILE at once, every model in --folder: a run that was stopped, or that is started
again with more claims or seeds, goes on from there.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import students as s
from measured import PEAK, SHAPES, STUDENT_PEAK, TEACHER, Bench, Recipe, Store, objectives


def losses(bench: Bench) -> dict[str, dict[str, Any]]:
    return {name: bench.student("half", objective=name) for name in objectives()}


def shapes(bench: Bench) -> dict[str, dict[str, Any]]:
    return {
        "width": bench.student("equal"),
        "depth, loss without each layer": bench.student("depth", "loss"),
        "depth, block influence": bench.student("depth", "influence"),
    }


def block(bench: Bench) -> dict[str, dict[str, Any]]:
    return {
        "contiguous, least loss": bench.student("depth", "contiguous"),
        "one by one, least loss": bench.student("depth", "loss"),
        "one by one, block influence": bench.student("depth", "influence"),
    }


def importance(bench: Bench) -> dict[str, dict[str, Any]]:
    return {how: bench.student("half", how) for how in ("importance", "random", "magnitude")}


def correction(bench: Bench) -> dict[str, dict[str, Any]]:
    both = {"source": bench.corrected, "teacher": bench.corrected}
    return {
        "corrected; student cut from it": bench.student("half", other=True, **both, name="corrected"),
        "corrected; cut from it as it was": bench.student(
            "half", other=True, teacher=bench.corrected, name="corrected teacher"
        ),
        "as it was": bench.student("half", other=True),
    }


def steps(bench: Bench) -> dict[str, dict[str, Any]]:
    def middle() -> Path:
        bench.student("three quarters", keep="three-quarters-trained")
        return bench.folder / "three-quarters-trained"

    return {
        "two cuts; teacher of both the largest": bench.student("half", source=middle, name="from three quarters"),
        "two cuts; the first student teaches the second": bench.student(
            "half", source=middle, teacher=middle, name="from three quarters and by it"
        ),
        "one cut": bench.student("half", parts=2),
    }


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a paper says, and how it is repeated.

    Attributes:
        paper: arm -> the paper's figure.
        preferred: the arms that the paper prefers; each is compared with every other arm.
        when: the losses that verdicts are given on.
    """

    run: Callable[[Bench], dict[str, dict[str, Any]]]
    title: str
    figure: str
    paper: dict[str, str]
    preferred: tuple[str, ...]
    when: tuple[str, ...] = ("trained",)


CLAIMS = {
    "losses": Claim(
        losses, "KL on logits alone trains best", "LM loss (A)",
        {"KL": "2.107", "CE + KL": "2.117", "CE + cosine": "2.134", "CE + reverse KL": "2.140", "CE + MSE": "2.144"},
        ("KL",),
    ),
    "shapes": Claim(
        shapes, "Width beats depth at equal parameters", "LM loss (A); MMLU (B)",
        {
            "width": "2.049; 60.5", "depth, loss without each layer": "2.155 (by perplexity)",
            "depth, block influence": "2.177",
        },
        ("width",),
    ),
    "block": Claim(
        block, "A contiguous block of layers beats layers picked one by one", "Winogrande (B)",
        {"contiguous, least loss": "0.595", "one by one, least loss": "0.5", "one by one, block influence": "0.5"},
        ("contiguous, least loss",), ("just_cut", "trained"),
    ),
    "importance": Claim(
        importance, "What is cut by importance of activations is better than at random or by magnitude", "-", {},
        ("importance",), ("just_cut", "trained"),
    ),
    "correction": Claim(
        correction, "A teacher corrected on the distillation text makes better students", "LM loss (B)",
        {"corrected; student cut from it": "more than 6 % lower", "as it was": "0 %"},
        ("corrected; student cut from it", "corrected; cut from it as it was"),
    ),
    "steps": Claim(
        steps, "Cutting and distilling in two steps beats one cut", "MMLU (A)",
        {"two cuts; teacher of both the largest": "42.45 (via 8B)", "one cut": "37.81"},
        ("two cuts; teacher of both the largest", "two cuts; the first student teaches the second"),
    ),
}  # fmt: skip
AGREES, NOT, WITHIN, ALONE = "agrees", "does not agree", "within the spread", "one seed, no verdict"
MEASURES = {"just_cut": "just cut", "trained": "trained"}


def comparison(preferred: list[float], other: list[float]) -> dict[str, Any]:
    """The paired difference other - preferred of losses over seeds: mean, half of its 95 % interval, verdict."""
    from scipy.stats import t

    differences = [there - here for here, there in zip(preferred, other)]
    mean, half, verdict = statistics.mean(differences), 0.0, ALONE
    count = len(differences)
    if count > 1:
        half = float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5
        verdict = WITHIN if abs(mean) <= half else AGREES if mean > 0 else NOT
    return {"difference": mean, "half_interval": half, "relative": mean / statistics.mean(other), "verdict": verdict}


def evaluated(claim: Claim, seeds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Means and spreads of every arm, and the preferred arms against the others."""
    arms = {}
    for arm in seeds[0]:
        values = {when: [found[arm][when] for found in seeds] for when in MEASURES}
        arms[arm] = {
            "parameters": seeds[0][arm]["parameters"],
            "dropped_layers": [found[arm]["dropped_layers"] for found in seeds],
            **{
                when: {"mean": statistics.mean(each), "spread": statistics.stdev(each) if len(each) > 1 else 0.0}
                for when, each in values.items()
            },
        }
    compared = [
        {"preferred": mine, "other": arm, "when": when}
        | comparison([found[mine][when] for found in seeds], [found[arm][when] for found in seeds])
        for when in claim.when
        for mine in claim.preferred
        for arm in arms
        if arm not in claim.preferred
    ]
    return {"title": claim.title, "seeds": len(seeds), "arms": arms, "compared": compared}


def table(claim: Claim, found: dict[str, Any]) -> str:
    """The claim's table as text."""
    wide = max(len(arm) for arm in found["arms"])
    figures = max([len(claim.figure), *(len(figure) for figure in claim.paper.values())])
    lines = [f"{claim.title}", f"{'':<{wide}}  {claim.figure:<{figures}}  parameters  just cut   +-     trained   +-"]
    for arm, row in found["arms"].items():
        cells = f"{row['parameters']:>10}  {row['just_cut']['mean']:>8.4f} {row['just_cut']['spread']:>6.4f}"
        cells += f"  {row['trained']['mean']:>8.4f} {row['trained']['spread']:>6.4f}"
        lines.append(f"{arm:<{wide}}  {claim.paper.get(arm, '-'):<{figures}}  {cells}")
    for each in found["compared"]:
        against = f"{each['preferred']} against {each['other']}, {MEASURES[each['when']]}:"
        number = f"{each['difference']:+.4f} +- {each['half_interval']:.4f} ({each['relative']:+.1%})"
        lines.append(f"{against} {number}, {each['verdict']}")
    return "\n".join(lines)


def text_of(data: Path) -> str:
    """What tells a text, as it was tokenised, from another."""
    content = b"".join((data / f"{split}.bin").read_bytes() for split in ("train", "test"))
    return hashlib.sha256(content).hexdigest()[:16]


def check_settings(folder: Path, head: dict[str, Any]) -> None:
    """Ends the run where the folder's models were made by other settings."""
    path = folder / "settings.json"
    if path.exists() and json.loads(path.read_text()) != head:
        sys.exit(f"{folder} holds models of other settings; give another --folder, or remove it")
    path.write_text(json.dumps(head, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="text, as minitron data's source")
    parser.add_argument("--other", default="embedded", help="text of another kind, for correction; likewise")
    parser.add_argument("--claims", nargs="+", default=list(CLAIMS), choices=list(CLAIMS), metavar="CLAIM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", help="where models and data lie, to go on from; none: runs/reproduce")
    parser.add_argument("--json", help="file to write, and to go on from; none: the folder's name with .json")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps of each student")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed, to see that it runs")
    options = parser.parse_args()
    recipe, seeds = Recipe(steps=options.steps), options.seeds
    folder = Path(options.folder or f"runs/reproduce{'-quick' if options.quick else ''}")
    if options.quick:
        recipe, seeds = Recipe(20, 2, 2, 16, 16, 20_000), seeds[:1]
    s.prepared(folder / "data", options.source)
    s.prepared(folder / "other", options.other, words=recipe.words, tokenizer=str(folder / "data" / "tokenizer"))
    head = {
        "recipe": dataclasses.asdict(recipe), "teacher": TEACHER, "shapes": SHAPES, "peaks": [PEAK, STUDENT_PEAK],
        "texts": {name: text_of(folder / name) for name in ("data", "other")},
    }  # fmt: skip
    check_settings(folder, head)
    store = Store(Path(options.json or f"{folder}.json"), head)
    store.content["machine"] = {
        "cpus": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    tables = []
    for name in options.claims:
        print(name, flush=True)
        found = evaluated(CLAIMS[name], [CLAIMS[name].run(Bench(folder, recipe, seed, store)) for seed in seeds])
        store.content["claims"][name] = found
        store.write()
        tables.append(table(CLAIMS[name], found))
    print("\n" + "\n\n".join(tables))
    print(
        f"\nseeds {seeds}; losses in nats a token on the test text; +-: standard deviation over seeds, of a difference"
    )
    print("half of its 95 % interval; a difference is the other arm's loss less the preferred one's, seed by seed")


if __name__ == "__main__":
    main()
