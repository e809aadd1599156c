"""What a search found, as JSON and as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.architecture import human
from nemo_minitron.report.table import aligned
from nemo_minitron.search.budgets import load
from nemo_minitron.search.distilling import Standing
from nemo_minitron.search.finals import errors_of
from nemo_minitron.search.measuring import Measured
from nemo_minitron.search.rounds import kendall_tau
from nemo_minitron.search.space import name_of
from nemo_minitron.search.task import Task

RESULT = "search.json"


def told(
    task: Task, measured: Measured, history: Sequence[Standing], finals: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The result as plain values: every shape with its loss, every round, the rivals, the winner, the finalists."""
    shapes = task.by_name()
    winner = history[-1].stay[0]
    rankings = {"cut": {name: measured.losses[name] for name in history[0].losses}}
    rankings |= {f"round {one.round.number}": one.losses for one in history}
    final = history[-1].losses
    return {
        "teacher": {
            "architecture": task.teacher.architecture.to_dict(),
            "parameters": task.teacher.architecture.parameters(),
            "loss": measured.teacher_loss,
        },
        "budgets": [
            {"name": budget.name, "limit": budget.limit, "teacher": budget.cost(task.teacher.architecture)}
            for budget in task.budgets
        ],
        "space": {"shapes": len(task.space), "within": len(task.shapes), "choices": task.space.choices},
        "shapes": [
            {
                "name": name,
                "parameters": shape.parameters(),
                "load": load(task.budgets, shape),
                "loss": measured.losses.get(name),
                "predicted": measured.predicted.get(name),
            }
            for name, shape in shapes.items()
        ],
        "rounds": [
            {
                "number": one.round.number,
                "steps": one.round.steps,
                "ranked_by": one.ranked_by,
                "losses": one.losses,
                "validation": one.validation,
                "stay": one.stay,
                "seconds": one.seconds,
            }
            for one in history
        ],
        "kendall_tau": {
            f"{before} to {after}": kendall_tau(rankings[before], rankings[after])
            for before, after in _pairs([*rankings])
        },
        "rivals": {
            what: {
                "name": name_of(shape),
                "loss": measured.losses.get(name_of(shape)),
                "parameters": shape.parameters(),
            }
            for what, shape in task.rivals.items()
        },
        "winner": {
            "name": winner,
            "architecture": task.student(shapes[winner]).to_dict(),
            "parameters": shapes[winner].parameters(),
            "loss": final[winner],
            "cut_loss": measured.losses[winner],
        },
        "finalists": list(finals),
        "speed_errors": errors_of(finals),
        "seconds": measured.seconds | {"distillation_seconds": sum(one.seconds for one in history)},
    }


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(before, after) for index, before in enumerate(names) for after in names[index + 1 :]]


def render(result: Mapping[str, Any]) -> str:
    """The candidates by the round that they reached, the winner first, and the rivals' cuts."""
    rounds = result["rounds"]
    sizes = {entry["name"]: entry for entry in result["shapes"]}
    reached = {name: one["number"] for one in rounds for name in one["losses"]}
    order = sorted(reached, key=lambda name: (-reached[name], rounds[reached[name] - 1]["losses"][name]))
    head = ["shape", "parameters", "cut", *(f"{one['steps']} steps" for one in rounds)]
    rows = [
        [
            name,
            human(sizes[name]["parameters"]),
            _number(sizes[name]["loss"]),
            *(_number(one["losses"].get(name)) for one in rounds),
        ]
        for name in order
    ]
    rows += [
        [f"({what}) {entry['name']}", human(entry["parameters"]), _number(entry["loss"]), *("" for _ in rounds)]
        for what, entry in result["rivals"].items()
    ]
    parts = [aligned([head, *rows]), *_finals(result["finalists"])]
    parts += [
        f"{kind}: the table of layers was {error:.1%} off at most" for kind, error in result["speed_errors"].items()
    ]
    return "\n".join([*parts, f"winner: {result['winner']['name']}"])


def _finals(finals: Sequence[Mapping[str, Any]]) -> list[str]:
    """The teacher and the finalists, as a table."""
    kinds = [kind for kind in ("prefill", "decode") if any(kind in entry["speed"] for entry in finals)]
    head = ["finalist", "parameters", "validation", "test", "served bytes", *(f"{kind} x teacher" for kind in kinds)]
    rows = [
        [
            entry["name"],
            human(entry["parameters"]),
            _number(entry["validation_loss"]),
            _number(entry["test_loss"]),
            human(entry["memory_bytes"]),
            *(f"{entry['speed'][kind]['of_teacher']:.2f}" if kind in entry["speed"] else "" for kind in kinds),
        ]
        for entry in finals
    ]
    return [aligned([head, *rows])]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
