"""Small runs as a flow leaves them, written by the package's own manifests and scores."""

from pathlib import Path

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import ImportanceScores, Manifest
from nemo_minitron.evaluation.facts import kept

TEACHER = Architecture(
    num_layers=4, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2, kv_channels=16,
    vocab_size=256, seq_length=32,
)  # fmt: skip
STUDENTS = {
    "depth": (TEACHER.with_sizes(num_layers=2), [2, 3], {}),
    "width": (TEACHER.with_sizes(hidden_size=32, ffn_hidden_size=64), [], {"hidden_size": 32, "ffn_hidden_size": 64}),
}
#: Test losses of the models.
LOSSES = {
    "teacher": 4.5, "teacher-corrected": 1.0, "depth-pruned": 2.0, "depth-distilled": 1.25, "depth-control": 1.5,
    "width-pruned": 1.4, "width-distilled": 1.1, "width-control": 1.2,
}  # fmt: skip
INFLUENCE = [5.0, 0.5, 0.25, 2.0]
BLOCKS = [
    {"first": 1, "last": 2, "loss": 5.0},
    {"first": 2, "last": 3, "loss": 2.5},
    {"first": 3, "last": 4, "loss": 3.0},
]


def stage(folder: Path, kind: str, minute: int, **fields) -> Manifest:
    """Writes a stage's folder with its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(
        stage=kind,
        key=f"key of {folder.name}",
        inputs=fields.pop("inputs", {}),
        config=fields.pop("config", {}),
        seed=7,
        versions={"python": "3.11.7", "torch": "2.13.0"},
        timings={"total_seconds": fields.pop("seconds", 10.0 + minute)},
        peak_memory_bytes=(200 + minute) << 20,
        created=f"2030-01-01T00:{minute:02}:00+00:00",
        **fields,
    )
    manifest.write(folder)
    return manifest


def history(start: float, steps: int = 20, kd: bool = False) -> dict:
    """Metrics of a training whose losses fall from `start`."""

    def line(step: int, shift: float) -> dict:
        value = start / (1 + 0.1 * step) + shift
        return {"step": step, **({"kd_loss": value / 4} if kd else {}), "lm_loss": value}

    return {
        "steps": steps,
        "result_step": steps,
        "train": [{**line(step, 0.0), "lr": 1e-3} for step in range(1, steps + 1)],
        "validation": [line(step, 0.1) for step in (steps // 2, steps)],
    }


def evaluation(run: Path, name: str, minute: int, architecture: Architecture, loss: float) -> None:
    splits = {
        split: {"loss": value, "perplexity": 2.718281828459045**value, "tokens": 512}
        for split, value in (("validation", loss - 0.05), ("test", loss))
    }
    stage(run / "evaluations" / name, "evaluate", minute, metrics={**splits, "parameters": architecture.parameters()})


#: Model -> right choices and right completions of eight questions; the first is the reference.
KNOWN = {
    "teacher corrected": ([1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]),
    "teacher": ([1, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]),
    "width distilled": ([1, 1, 1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0, 1]),
}


def knowledge() -> dict:
    """Metrics of an evaluation that asked for facts."""
    right = {name: dict(zip(("facts_choice", "facts_completion"), answers)) for name, answers in KNOWN.items()}
    return {
        "models": [{"name": name, "path": name, "parameters": TEACHER.parameters()} for name in right],
        "reference": "teacher corrected",
        "results": {
            name: {task: {"acc": {"value": sum(each) / len(each), "stderr": 0.125}} for task, each in answers.items()}
            for name, answers in right.items()
        },
        "facts": {"questions": 8, "chance": 0.25, "kept": kept(right, 0.25)},
    }


def scores(folder: Path, minute: int = 4) -> None:
    import torch

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    a = TEACHER
    ImportanceScores(
        hidden=torch.rand(2 * a.num_layers, a.hidden_size) + 0.1,
        ffn=torch.rand(a.num_layers, a.ffn_hidden_size) + 0.1,
        heads=torch.rand(a.num_layers, a.num_attention_heads * a.kv_channels) + 0.1,
        block_influence=torch.tensor(INFLUENCE, dtype=torch.float64),
        teacher="teacher",
    ).save(folder)
    stage(folder, "score", minute, metrics={"samples": 8, "tokens": 256, "block_influence": INFLUENCE},
          details={"architecture": a.to_dict(), "samples": {"seq_length": 32}})  # fmt: skip


def cut(folder: Path, name: str, minute: int) -> None:
    student, dropped, width = STUDENTS[name]
    plan = {"teacher": TEACHER.to_dict(), "student": student.to_dict(), "drop_layers": dropped, "width": width,
            "method": "minitron"}  # fmt: skip
    metrics = {"method": "minitron", "parameters": student.parameters(), "dropped_layers": dropped}
    stage(folder, "prune", minute, metrics=metrics, details={"plan": plan})


def flow(run: Path, students: tuple = ("depth", "width"), shift: float = 0.0) -> Path:
    """A whole flow's folder, without report.json; `shift` is added to the students' losses."""
    stage(run / "data", "data", 1, metrics={"vocab_size": 256})
    stage(run / "teacher-pretrained", "finetune", 2, metrics=history(6.0))
    stage(run / "teacher", "finetune", 3, metrics=history(3.0), config={"model": {"optim": {"lr": 1e-3 + shift}}})
    evaluation(run, "teacher", 3, TEACHER, LOSSES["teacher"])
    evaluation(run, "teacher-corrected", 3, TEACHER, LOSSES["teacher-corrected"])
    scores(run / "scores")
    stage(run / "scores.depth-block-loss-2", "scan", 5, metrics={"dropped_layers": [2, 3], "teacher_loss": 1.0},
          details={"blocks": BLOCKS, "report": {"teacher_loss": 1.0}})  # fmt: skip
    minute = 6
    for name in students:
        cut(run / f"{name}-pruned", name, minute)
        stage(run / f"{name}-distilled", "distill", minute + 1, metrics=history(2.0 + shift, kd=True))
        stage(run / f"{name}-control", "distill", minute + 2, metrics=history(2.5 + shift))
        for kind in ("pruned", "distilled", "control"):
            evaluation(run, f"{name}-{kind}", minute + 3, STUDENTS[name][0], LOSSES[f"{name}-{kind}"] + shift)
        minute += 4
    stage(run / "evaluations" / "facts", "evaluate tasks", minute, metrics=knowledge())
    return run


def small(run: Path) -> Path:
    """A flow that got as far as the corrected teacher: few pictures, quickly drawn."""
    stage(run / "data", "data", 1)
    stage(run / "teacher", "finetune", 3, metrics=history(3.0))
    evaluation(run, "teacher", 4, TEACHER, LOSSES["teacher"])
    return run
