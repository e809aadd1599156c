"""One teacher a seed and the students cut from it, each measured once: what `reproduce.py` compares.

Students are cut by the package's stages with prune.method=minitron and trained in plain PyTorch; a student that several
claims need is trained once.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import students as s

TEACHER = {
    "num_layers": 8, "hidden_size": 128, "ffn_hidden_size": 352, "num_attention_heads": 8, "num_query_groups": 4,
    "kv_channels": 16,
}  # fmt: skip
#: Shares of the teacher's 1.74M parameters: 75.1 %, 50.1 %; and `equal` has those of half the layers, 57.5 %.
SHAPES: dict[str, dict[str, int]] = {
    "three quarters": {"hidden_size": 112, "ffn_hidden_size": 272},
    "half": {"hidden_size": 80, "ffn_hidden_size": 240},
    "equal": {"hidden_size": 96, "ffn_hidden_size": 220},
    "depth": {"num_layers": 4},
}
GRID = {"hidden_size_divisor": 16, "ffn_hidden_size_divisor": 4, "num_layers_divisor": 1}
PEAK, STUDENT_PEAK = 2e-3, 1e-3


@dataclasses.dataclass
class Recipe:
    """Lengths of a run; a teacher's batch is 16 windows, a student's 8, of 128 tokens.

    Attributes:
        steps: of each student; `steps` (the claim) has twice as many, in one part or in two.
        correction_steps: of the teacher on the other text, at a fifth of its peak learning rate (B).
        words: of the other text, where it is the embedded corpus.
    """

    teacher_steps: int = 600
    steps: int = 80
    correction_steps: int = 80
    samples: int = 128
    test_windows: int = 256
    words: int = 200_000


def with_cross_entropy(other: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """CE + a loss between logits, weights 1 (A, section 3: L = L_CLM + L_logits)."""
    return lambda student, teacher, labels: s.cross_entropy(student, None, labels) + other(student, teacher).mean()


def objectives() -> dict[str, Callable[[Any, Any, Any], Any]]:
    """The losses that are compared; each is a mean over tokens, of logits at temperature 1."""
    from nemo_minitron.distillation.losses.api import forward_kl, reverse_kl
    from nemo_minitron.distillation.losses.hidden import cosine_loss, mse_loss

    return {
        "KL": s.kl,
        "CE + KL": with_cross_entropy(forward_kl),
        "CE + cosine": with_cross_entropy(cosine_loss),
        "CE + reverse KL": with_cross_entropy(reverse_kl),
        "CE + MSE": with_cross_entropy(mse_loss),
        "CE": s.cross_entropy,
    }


class Store:
    """What is measured, in a JSON file that is complete at any moment."""

    def __init__(self, path: Path, head: dict[str, Any]):
        self.path = path
        self.content: dict[str, Any] = {**head, "runs": {}, "claims": {}}
        if path.exists():
            before = json.loads(path.read_text())
            if any(before.get(name) != value for name, value in head.items()):
                sys.exit(f"{path} was measured with other settings; give another --json, or remove it")
            self.content = before

    def run(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured under `key`, or is now."""
        if key not in self.content["runs"]:
            started = time.perf_counter()
            found = measure()
            self.content["runs"][key] = found | {"seconds": round(time.perf_counter() - started, 1)}
            self.write()
            print(f"  {key}: {found}", flush=True)
        return self.content["runs"][key]

    def write(self) -> None:
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps(self.content, indent=2) + "\n")
        partial.replace(self.path)


class Bench:
    """One seed's teacher and students; every model is made when it is first asked for."""

    def __init__(self, folder: Path, recipe: Recipe, seed: int, store: Store):
        self.data, self.other, self.folder = folder / "data", folder / "other", folder / f"seed-{seed}"
        self.recipe, self.seed, self.store = recipe, seed, store
        self.folder.mkdir(exist_ok=True)
        self.tests = {data: s.test_windows(data, recipe.test_windows) for data in (self.data, self.other)}

    def teacher(self) -> Path:
        folder = self.folder / "teacher"
        if not folder.exists():
            model = s.new_model(TEACHER, self.seed)
            s.train(model, self.recipe.teacher_steps, PEAK, 16, self.data / "train", self.seed)
            s.save(model, folder)
        self.store.run(f"{self.seed} teacher", lambda: self.measured(folder))
        return folder

    def corrected(self) -> Path:
        """The teacher, trained on the other text too."""
        folder = self.folder / "teacher-corrected"
        if not folder.exists():
            model = s.load(self.teacher())
            s.train(model, self.recipe.correction_steps, PEAK / 5, 16, self.other / "train", self.seed + 500)
            s.save(model, folder)
        self.store.run(f"{self.seed} teacher corrected", lambda: self.measured(folder))
        return folder

    def measured(self, folder: Path) -> dict[str, Any]:
        model = s.load(folder)
        losses = {"loss": s.loss_of(model, self.tests[self.data]), "other": s.loss_of(model, self.tests[self.other])}
        return {**losses, "parameters": s.parameters_of(model)}

    def config(self, output: Path, teacher: Path, data: Path, scores: str = "", **targets: Any) -> Any:
        name = f"{teacher.name}.scores-{data.name}{scores}"
        return s.prune_config(
            teacher, data, output, self.recipe.samples, self.seed, **GRID, **targets, method="minitron",
            statistics=False, scores_path=str(self.folder / name),
        )  # fmt: skip

    def cut(self, shape: str, how: str, teacher: Path, data: Path) -> tuple[Path, list[int]]:
        """A student, and the layers dropped.

        Args:
            how: `importance`, `random`, `magnitude`; of layers `influence`, `contiguous` or `loss`, the last those
                without each of which the loss is least.
        """
        from nemo_minitron.pruning.command import prune
        from nemo_minitron.pruning.student import cut_student

        output = self.folder / f"{teacher.name}-{data.name}-{shape}-{how}".replace(" ", "-")
        targets = dict(SHAPES[shape])
        if how == "loss":
            targets = {"drop_layers": self.least_loss(teacher, data, TEACHER["num_layers"] - targets["num_layers"])}
        elif "num_layers" in targets:
            targets["depth_by"] = "block_loss" if how == "contiguous" else "block_influence"
        made_up = how in ("random", "magnitude")
        config = self.config(output, teacher, data, f"-{how}" if made_up else "", **targets)
        if made_up:
            scores = Path(config.prune.scores_path)
            if not scores.exists():
                s.made_up_scores(scores, teacher, how, self.seed)
            manifest = cut_student(config)
        else:
            manifest = prune(config)
        return output, manifest.metrics["dropped_layers"]

    def least_loss(self, teacher: Path, data: Path, count: int) -> list[int]:
        """The layers, 1-based, without each of which alone the loss is least."""
        from nemo_minitron.artifacts import DepthScan
        from nemo_minitron.pruning.folders import scan_folder
        from nemo_minitron.pruning.importance.scan import scan

        config = self.config(
            self.folder / "none", teacher, data, num_layers=TEACHER["num_layers"] - 1, depth_by="block_loss"
        )
        scan(config)
        blocks = sorted(DepthScan.load(scan_folder(config)).blocks, key=lambda block: block["loss"])
        return sorted(block["first"] for block in blocks[:count])

    def student(
        self,
        shape: str,
        how: str = "importance",
        objective: str = "KL",
        *,
        source: Callable[[], Path] | None = None,
        teacher: Callable[[], Path] | None = None,
        other: bool = False,
        parts: int = 1,
        keep: str | None = None,
        name: str = "",
    ) -> dict[str, Any]:
        """Cuts and trains one student; measured once for all claims.

        Args:
            source: what is cut; none: the teacher.
            teacher: whose logits train; none: the teacher.
            other: scored, trained and measured on the other text.
            parts: times recipe.steps.
            keep: the trained student's folder, where something is cut from it.
            name: tells students apart whose other arguments in words are equal.
        """
        words = [shape, how, objective, *(["other text"] if other else []), *([f"x{parts}"] if parts > 1 else []), name]
        key = f"{self.seed} {', '.join(word for word in words if word)}"
        data = self.other if other else self.data

        def measure() -> dict[str, Any]:
            folder, dropped = self.cut(shape, how, (source or self.teacher)(), data)
            model, guide = s.load(folder), s.load((teacher or self.teacher)())
            found = {"parameters": s.parameters_of(model), "just_cut": s.loss_of(model, self.tests[data])}
            s.train(
                model, parts * self.recipe.steps, STUDENT_PEAK, 8, data / "train", self.seed + 1000, guide,
                objectives()[objective],
            )  # fmt: skip
            if keep and not (self.folder / keep).exists():
                s.save(model, self.folder / keep)
            return found | {"trained": s.loss_of(model, self.tests[data]), "dropped_layers": dropped}

        if keep and not (self.folder / keep).exists():
            self.store.content["runs"].pop(key, None)
        return self.store.run(key, measure)
