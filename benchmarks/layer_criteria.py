"""Which layers a cut in depth drops: criteria of others beside the package's (`retraining.py --criteria`).

Shortened LLaMA (arXiv 2402.02834) ranks the layers once and drops the least:

    perplexity    by the loss of the model without the layer
    Taylor        by the sum of |weight x gradient of the loss| over the layer's weights, gradients summed over samples
    Taylor+       the same, but the first four layers and the last two stay

and the package's prune.depth_by: block_influence, block_loss, compensated_loss. All of a seed see the same few samples,
but for compensated_loss and for method=compensated, which must fit maps and have more. The layers that each names are
cut by `minitron prune prune.drop_layers=..`; sets of layers that several name are cut once. Losses are nats a token on
the test text, just cut.
"""

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import students as s

METHODS = ("minitron", "compensated")
OURS = ("block_influence", "block_loss", "compensated_loss")
CRITERIA = ("perplexity", "Taylor", "Taylor+", *OURS)
#: reproduce.py's words -> those of an arm that no paper prefers.
VERDICTS = {"agrees": "better", "does not agree": "worse"}
#: What Taylor+ keeps: layers at the start and at the end.
FIRST, LAST = 4, 2


def losses_without_each(model: Any, tokens: Any, batch: int) -> list[float]:
    """The loss of the model without each of its layers alone, on windows [n, length + 1]."""
    import torch

    layers, found = model.model.layers, []
    for i in range(len(layers)):
        model.model.layers = torch.nn.ModuleList([layer for j, layer in enumerate(layers) if j != i])
        found.append(s.loss_of(model, tokens, batch))
    model.model.layers = layers
    return found


def taylor(model: Any, tokens: Any, batch: int) -> list[float]:
    """The sum over each layer's weights of |weight x gradient of the loss on windows [n, length + 1]|."""
    import torch

    model.requires_grad_(True)
    for part in tokens.split(batch):
        logits = model(part[:, :-1], use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        (loss / tokens[:, 1:].numel()).backward()
    sums = [
        sum(float((weight.detach() * weight.grad).abs().sum(dtype=torch.float64)) for weight in layer.parameters())
        for layer in model.model.layers
    ]
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return sums


def least(scores: list[float], count: int, first: int = 0, last: int = 0) -> list[int]:
    """The layers of least score, 1-based; none of the `first` and `last` ones."""
    free = range(first, len(scores) - last)
    return sorted(i + 1 for i in sorted(free, key=lambda i: scores[i])[:count])


def scores_of(bench: Any, seed: int) -> dict[str, Any]:
    """The scores of perplexity and Taylor, and their CPU seconds."""

    def measure() -> dict[str, Any]:
        import torch

        from nemo_minitron.data.samples import random_sequences

        how = bench.settings
        model = s.load(bench.model).to(torch.float32).requires_grad_(False)
        tokens, _ = random_sequences([str(bench.data / "train")], how.criteria_samples, how.length, seed)
        found: dict[str, Any] = {}
        for name, score in (("perplexity", losses_without_each), ("Taylor", taylor)):
            started = time.process_time()
            found[name] = {"scores": score(model, tokens, how.batch), "cpu": time.process_time() - started}
        return found

    return bench.kept(f"scores {seed}", measure)


def ours(bench: Any, seed: int, criterion: str, count: int) -> dict[str, Any]:
    """The layers that the package drops, and the CPU seconds of scoring and choosing."""
    from nemo_minitron.artifacts import Manifest
    from nemo_minitron.pruning.command import prune

    def measure() -> dict[str, Any]:
        layers, started = total(bench) - count, time.process_time()
        fits = criterion == "compensated_loss"
        method = {"method": "compensated", "refit": "once"} if fits else {"method": "minitron"}
        output = bench.folder / f"{criterion}-{seed}-{count}"
        prune(config(bench, seed, output, num_layers=layers, depth_by=criterion, **method))
        found = {"dropped": Manifest.read(output).metrics["dropped_layers"], "cpu": time.process_time() - started}
        shutil.rmtree(output, ignore_errors=True)
        return found

    return bench.kept(f"chosen {seed} {criterion} {count}", measure)


def config(bench: Any, seed: int, output: Path, **targets: Any) -> Any:
    """Settings of a cut; scores and scans of few and of more samples lie apart."""
    how = bench.settings
    samples = how.refit_samples if targets["method"] == "compensated" else how.criteria_samples
    return s.prune_config(
        bench.model, bench.data, output, samples, seed, length=how.length, batch=how.batch, num_layers_divisor=1,
        scores_path=str(bench.folder / f"criteria-{seed}-{samples}" / "scores"), **targets,
    )  # fmt: skip


def total(bench: Any) -> int:
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint

    return open_checkpoint(bench.model).architecture.num_layers


def dropped(bench: Any, seed: int, criterion: str, count: int) -> list[int]:
    if criterion in OURS:
        return list(ours(bench, seed, criterion, count)["dropped"])
    scores = scores_of(bench, seed)
    if criterion == "perplexity":
        return least(scores["perplexity"]["scores"], count)
    stay = (FIRST, LAST) if criterion == "Taylor+" else (0, 0)
    return least(scores["Taylor"]["scores"], count, *stay)


def just_cut(bench: Any, seed: int, layers: list[int], method: str) -> float:
    """The loss of the student without `layers`. Without a refit the seed is of no consequence."""
    from nemo_minitron.pruning.command import prune

    named = "-".join(map(str, layers))

    def measure() -> dict[str, Any]:
        output = bench.folder / f"{method}-{seed}-{named}"
        shutil.rmtree(output, ignore_errors=True)
        started = time.process_time()
        prune(config(bench, seed, output, drop_layers=layers, method=method))
        found = {"layers": layers, "method": method, "cpu": time.process_time() - started, "loss": bench.loss(output)}
        shutil.rmtree(output, ignore_errors=True)
        return found

    who = "" if method == "minitron" else f" {seed}"
    return float(bench.kept(f"dropped{who} {method} {named}", measure)["loss"])


def run(bench: Any, seeds: list[int], counts: list[int] | None, methods: list[str], names: list[str]) -> dict[str, Any]:
    """The criteria `names`; prints the table."""
    from reproduce import comparison

    layers = total(bench)
    counts = counts or [round(layers / 5), round(layers / 3)]
    rows: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    for count in counts:
        usable = [name for name in names if name != "Taylor+" or layers - FIRST - LAST >= count]
        found = {name: [dropped(bench, seed, name, count) for seed in seeds] for name in usable}
        for method in methods:
            losses = {
                name: [just_cut(bench, seed, chosen, method) for seed, chosen in zip(seeds, found[name])]
                for name in usable
            }
            for name in usable:
                values = losses[name]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                rows.append(
                    {"count": count, "criterion": name, "method": method, "mean": statistics.mean(values),
                     "spread": spread, "dropped": found[name]}
                )  # fmt: skip
            compared += [
                {"count": count, "method": method, "preferred": mine, "other": other}
                | comparison(losses[mine], losses[other])
                for mine in OURS
                for other in ("perplexity", "Taylor+")
                if {mine, other} <= set(usable)
            ]
    print(table(rows, compared, len(seeds)))
    return {"rows": rows, "compared": compared}


def in_words(one: dict[str, Any]) -> str:
    """The verdict; none where every seed gave the same layers, and nothing spreads."""
    if not one["half_interval"]:
        return "the same layers for every seed, no verdict"
    return VERDICTS.get(one["verdict"], str(one["verdict"]))


def table(rows: list[dict[str, Any]], compared: list[dict[str, Any]], seeds: int) -> str:
    lines = [f"{'dropped':>7}  {'criterion':<17}{'method':<12}{'just cut':>9}{'+-':>8}  layers, first seed"]
    for row in rows:
        named = " ".join(map(str, row["dropped"][0]))
        lines.append(
            f"{row['count']:>7}  {row['criterion']:<17}{row['method']:<12}{row['mean']:>9.4f}{row['spread']:>8.4f}"
            f"  {named}"
        )
    if seeds > 1:
        lines += [
            f"{one['count']} dropped, {one['method']}: {one['preferred']} against {one['other']}: "
            f"{one['difference']:+.4f} +- {one['half_interval']:.4f}, {in_words(one)}"
            for one in compared
        ]
    return "\n".join(lines)
