"""What `minitron search` found (search.json), for the page and its pictures.

The file is data: a value that is no finite number is left out and counted, and so is an entry without its name.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_minitron.architecture import human
from nemo_minitron.config.schemas.searching import RANKED_BY
from nemo_minitron.report.stages import number

RESULT = "search.json"
#: Numbers above this are none that a search writes.
LARGEST = 1e18
#: Candidates that are shown, the best; a search has 16 unless it is told otherwise.
MAX_CANDIDATES = 64
#: What the first rung is called, and the first of the finalists.
CUT, TEACHER = "cut", "teacher"
#: Budget -> what stands behind its numbers.
UNITS = {"memory": "B", "flops": " operations a token", "prefill": " s a pass", "decode": " s a pass"}
LOSSES = {"kd_loss": "KD loss", "lm_loss": "LM loss", None: "loss"}


class _Reader:
    """Takes values out of parsed JSON, and counts what cannot be taken."""

    def __init__(self) -> None:
        self.wrong: Counter[str] = Counter()

    def mapping(self, value: object, where: str) -> Mapping[str, Any]:
        if isinstance(value, dict):
            return value
        self.wrong[where] += 1
        return {}

    def entries(self, told: Mapping[str, Any], where: str, read: Callable[..., dict[str, Any] | None]) -> list[Any]:
        """What `read` makes of each entry of a list; None: left out."""
        value = told.get(where)
        if not isinstance(value, list):
            self.wrong[where] += 1
            return []
        found = [read(self, entry) if isinstance(entry, dict) else None for entry in value]
        self.wrong[where] += sum(entry is None for entry in found)
        return [entry for entry in found if entry is not None]

    def number(self, entry: Mapping[str, Any], name: str, where: str, least: float = -LARGEST) -> float | None:
        """A number, or None where there is none; JSON's null is no fault."""
        value = entry.get(name, "")
        found = number(value)
        if found is not None and least <= found <= LARGEST:
            return found
        self.wrong[f"{where}.{name}"] += value is not None
        return None

    def numbers(self, entry: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, float | None]:
        return {name: self.number(entry, name, where) for name in names}

    def sentences(self, path: object) -> list[str]:
        return [
            f"{path}: {where}, {count} {'value is' if count == 1 else 'values are'} missing or not what a search "
            "writes, and left out"
            for where, count in self.wrong.items()
            if count
        ]


def search_of(told: object, config: Mapping[str, Any], path: object, missing: list[str]) -> dict[str, Any] | None:
    """A search's result with nothing in it but text and finite numbers; None where nothing of it can be shown.

    Args:
        told: what search.json holds.
        config: the search's; says which loss its rounds have.
        path: of the file, for what is said.
        missing: takes a sentence for each part that is damaged.

    Returns:
        ``teacher``: ``parameters``, ``loss``; ``budgets``; ``space``; ``shapes``; ``rounds``; ``kendall_tau``: (from,
        to, tau) of each pair; ``rivals``; ``winner``, or None; ``finalists``; ``loss``: which one the rounds have, or
        None. Numbers that are not known are None.
    """
    if not isinstance(told, dict):
        missing.append(f"{path} is not there, or holds no result of a search")
        return None
    reader = _Reader()
    winner = reader.mapping(told.get("winner"), "winner")
    teacher = reader.mapping(told.get("teacher"), "teacher")
    space = reader.mapping(told.get("space"), "space")
    found: dict[str, Any] = {
        "teacher": {
            "parameters": reader.number(teacher, "parameters", "teacher", 1),
            "loss": reader.number(teacher, "loss", "teacher"),
        },
        "budgets": reader.entries(told, "budgets", _budget),
        "space": reader.numbers(space, ("shapes", "within"), "space"),
        "shapes": reader.entries(told, "shapes", _shape),
        "rounds": sorted(reader.entries(told, "rounds", _round), key=lambda one: one["number"]),
        "kendall_tau": _taus(reader, told),
        "rivals": _rivals(reader, told),
        "winner": _shape(reader, winner, ("loss", "cut_loss"), "winner"),
        "finalists": reader.entries(told, "finalists", _finalist),
        "loss": _loss_of(config),
    }
    reader.wrong["winner"] += found["winner"] is None and bool(winner)
    missing += reader.sentences(path)
    return found if found["shapes"] or found["rounds"] or found["finalists"] else None


def _loss_of(config: Mapping[str, Any]) -> str | None:
    """The loss by which rounds rank: the stated one, or KD's where there is KD."""
    kd, settings = config.get("kd"), config.get("search")
    stated = settings.get("rank_by") if isinstance(settings, dict) else None
    if stated in RANKED_BY:
        return str(stated)
    weight = number(kd.get("kd_weight")) if isinstance(kd, dict) else None
    return None if weight is None else "kd_loss" if weight else "lm_loss"


def _budget(reader: _Reader, entry: Mapping[str, Any]) -> dict[str, Any] | None:
    found = {name: reader.number(entry, name, "budgets", 0) for name in ("limit", "teacher")}
    return {"name": entry["name"], **found} if isinstance(entry.get("name"), str) else None


def _shape(
    reader: _Reader,
    entry: Mapping[str, Any],
    losses: Sequence[str] = ("loss", "predicted", "load"),
    where: str = "shapes",
) -> dict[str, Any] | None:
    parameters = reader.number(entry, "parameters", where, 1) if entry else None
    if not isinstance(entry.get("name"), str) or parameters is None:
        return None
    return {"name": entry["name"], "parameters": parameters, **reader.numbers(entry, losses, where)}


def _round(reader: _Reader, entry: Mapping[str, Any]) -> dict[str, Any] | None:
    losses = reader.mapping(entry.get("losses"), "rounds.losses")
    known = {name: reader.number(losses, name, "rounds.losses") for name in losses}
    numbers = {name: reader.number(entry, name, "rounds", 0) for name in ("number", "steps", "seconds")}
    stay = entry.get("stay")
    stay = [name for name in stay if isinstance(name, str)] if isinstance(stay, list) else []
    if numbers["number"] is None:
        return None
    return {**numbers, "losses": {name: loss for name, loss in known.items() if loss is not None}, "stay": stay}


def _rivals(reader: _Reader, told: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    rivals = reader.mapping(told.get("rivals"), "rivals")
    found = {what: _shape(reader, reader.mapping(entry, "rivals"), ("loss",), "rivals")
             for what, entry in rivals.items()}  # fmt: skip
    return {what: rival for what, rival in found.items() if rival is not None}


def _taus(reader: _Reader, told: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    taus = reader.mapping(told.get("kendall_tau"), "kendall_tau")
    found = []
    for label in taus:
        before, between, after = label.partition(" to ")
        tau = reader.number(taus, label, "kendall_tau", -1)
        if tau is not None and (tau > 1 or not between):
            reader.wrong["kendall_tau"] += 1
        elif tau is not None:
            found.append((before, after, tau))
    return found


def _finalist(reader: _Reader, entry: Mapping[str, Any]) -> dict[str, Any] | None:
    names = ("validation_loss", "test_loss", "memory_bytes")
    found = _shape(reader, entry, names, "finalists")
    if found is None:
        return None
    speeds = reader.mapping(entry.get("speed"), "finalists.speed")
    known = {
        kind: reader.numbers(reader.mapping(speed, "finalists.speed"), SPEED, f"finalists.speed.{kind}")
        for kind, speed in speeds.items()
        if kind in ("prefill", "decode")
    }
    return {**found, "speed": known}


SPEED = ("tokens_per_second", "of_teacher", "predicted")


def candidates(search: Mapping[str, Any]) -> list[str]:
    """The shapes that were distilled: those of the last round first, by their loss in the last that they were in."""
    reached = {name: (-index, loss, name) for index, one in enumerate(search["rounds"])
               for name, loss in one["losses"].items()}  # fmt: skip
    return sorted(reached, key=reached.__getitem__)


def standings(search: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Rung (cut, round 1, ...) -> name -> loss, of the candidates of each."""
    cuts = {entry["name"]: entry["loss"] for entry in search["shapes"] if entry["loss"] is not None}
    first = search["rounds"][0]["losses"] if search["rounds"] else {}
    rungs = {CUT: {name: cuts[name] for name in first if name in cuts}}
    return rungs | {f"round {one['number']:.0f}": one["losses"] for one in search["rounds"]}


def ranks(losses: Mapping[str, float]) -> dict[str, int]:
    """Name -> rank by loss, from 1."""
    order = sorted(losses, key=lambda name: (losses[name], name))
    return {name: place for place, name in enumerate(order, 1)}


def front(shapes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The measured shapes to which no other is at least equal in both parameters and loss, the smallest first."""
    best: list[Mapping[str, Any]] = []
    measured = (entry for entry in shapes if entry["loss"] is not None)
    for entry in sorted(measured, key=lambda entry: (entry["parameters"], entry["loss"])):
        if not best or entry["loss"] < best[-1]["loss"]:
            best.append(entry)
    return best


def distilled(search: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The finalists with a validation loss, without the teacher."""
    return [entry for entry in search["finalists"] if entry["name"] != TEACHER and entry["validation_loss"] is not None]


def texts(search: Mapping[str, Any]) -> list[str]:
    """What was searched, and what came out, in sentences."""
    return [*_asked(search), *_won(search), *_correlated(search)]


def _asked(search: Mapping[str, Any]) -> list[str]:
    parts = []
    for budget in search["budgets"]:
        limit, own = budget["limit"], budget["teacher"]
        if limit is not None:
            share = f" ({limit / own:.0%} of the teacher's)" if own else ""
            parts.append(f"{budget['name'].replace('_', ' ')} at most {_amount(limit, budget['name'])}{share}")
    lines = [f"Budget: {', '.join(parts)}."] if parts else []
    space = search["space"]
    measured = sum(entry["loss"] is not None for entry in search["shapes"])
    if space["shapes"] is not None and space["within"] is not None:
        lines.append(f"{space['shapes']:.0f} shapes on the grid, {space['within']:.0f} within the budget's tolerance, "
                     f"{measured} cut and measured, rivals among them.")  # fmt: skip
    return lines


def _amount(value: float, budget: str) -> str:
    return f"{human(value) if value >= 1 else format(value, '.3g')}{UNITS.get(budget, '')}"


def _won(search: Mapping[str, Any]) -> list[str]:
    winner = search["winner"]
    if winner is None:
        return []
    line = f"Winner: {winner['name']}, {human(winner['parameters'])} parameters"
    if winner["cut_loss"] is None:
        return [f"{line}."]
    above = [f"{what} {loss(rival['loss'] - winner['cut_loss'], signed=True)}" for what, rival in
             search["rivals"].items() if rival["loss"] is not None]  # fmt: skip
    beside = f"; rivals' cuts beside it: {', '.join(above)}" if above else ""
    return [f"{line}; loss of its cut {loss(winner['cut_loss'])}{beside}."]


def _correlated(search: Mapping[str, Any]) -> list[str]:
    taus = search["kendall_tau"]
    if len(taus) != 1:  # more are a picture
        return []
    before, after, tau = taus[0]
    return [f"Kendall's tau of the ranks, {before} to {after}: {tau:.2f}."]


def distilled_note(search: Mapping[str, Any]) -> str:
    """What a picture says of the losses after distillation: other text than the cuts', where the teacher's differ."""
    finals = distilled(search)
    if not finals:
        return ""
    there = next((entry["validation_loss"] for entry in search["finalists"] if entry["name"] == TEACHER), None)
    own = search["teacher"]["loss"]
    if there is None or own is None or abs(there - own) < 5e-5:
        return "The arrow leads to the winner after its rounds of distillation."
    return (
        "The arrow leads to the winner after its rounds of distillation, on more of the validation text: there the "
        f"teacher has {loss(there)}, and {loss(own)} where the cuts were measured."
    )


def losses_in_words(search: Mapping[str, Any]) -> str:
    """The front, the teacher and the finalists."""
    parts = [f"{entry['name']}: {human(entry['parameters'])} parameters, loss of the cut {loss(entry['loss'])}"
             for entry in front(search["shapes"])[:MAX_CANDIDATES]]  # fmt: skip
    parts += [f"{entry['name']} distilled: {loss(entry['validation_loss'])}" for entry in distilled(search)]
    if search["teacher"]["loss"] is not None:
        parts.append(f"teacher: {loss(search['teacher']['loss'])}")
    return "; ".join(parts)


def ranks_in_words(search: Mapping[str, Any]) -> str:
    """The best of each rung, in order."""
    return "; ".join(
        f"{rung}: {', '.join(list(ranks(losses))[:4])}" for rung, losses in standings(search).items() if losses
    )


def loss(value: float | None, *, signed: bool = False) -> str:
    """A loss as tables have it; nothing where it is not known."""
    if value is None:
        return ""
    form = ".4f" if abs(value) < 1e4 else ".4g"
    return f"{value:+{form}}" if signed else f"{value:{form}}"


def candidate_cells(search: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the candidates: parameters, the cut's loss, the loss after each round."""
    sizes = {entry["name"]: entry for entry in search["shapes"]}
    what = LOSSES[search["loss"]]
    steps = [f"{what}, round {one['number']:.0f}" + ("" if one["steps"] is None else f" ({one['steps']:.0f} steps)")
             for one in search["rounds"]]  # fmt: skip
    lines = []
    for name in candidates(search)[:MAX_CANDIDATES]:
        size = sizes.get(name)
        own = [human(size["parameters"]), loss(size["loss"])] if size else ["", ""]
        lines.append([name, *own, *(loss(one["losses"].get(name)) for one in search["rounds"])])
    return ["shape", "parameters", "loss of the cut", *steps], lines


def rival_cells(search: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the rivals: the shape of its kind nearest to the budget, its cut beside the winner's."""
    winner = search["winner"]
    own = winner["cut_loss"] if winner else None
    lines = []
    for what, rival in search["rivals"].items():
        above = None if own is None or rival["loss"] is None else rival["loss"] - own
        measured = loss(rival["loss"]) or "not measured"
        lines.append([what, rival["name"], human(rival["parameters"]), measured, loss(above, signed=True)])
    return ["rival", "shape", "parameters", "loss of the cut", "beside the winner's"], lines


def finalist_cells(search: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the teacher and the finalists: losses, bytes, speeds beside the table of layers."""
    finalists = search["finalists"]
    kinds = [kind for kind in ("prefill", "decode") if any(kind in entry["speed"] for entry in finalists)]
    columns = ["model", "parameters", "val loss", "test loss", "memory"]
    for kind in kinds:
        columns += [f"{kind} tokens/s", "of teacher", "predicted", "error"]
    lines = []
    for entry in finalists:
        memory = entry["memory_bytes"]
        line = [entry["name"], human(entry["parameters"]), loss(entry["validation_loss"]), loss(entry["test_loss"]),
                "" if memory is None else f"{memory / 2**20:.1f} MiB"]  # fmt: skip
        for kind in kinds:
            line += _speed(entry["speed"].get(kind, dict.fromkeys(SPEED)))
        lines.append(line)
    return columns, lines


def _speed(speed: Mapping[str, float | None]) -> list[str]:
    measured, predicted = speed["of_teacher"], speed["predicted"]
    error = "" if not measured or predicted is None else f"{predicted / measured - 1:+.1%}"
    return [
        "" if speed["tokens_per_second"] is None else f"{speed['tokens_per_second']:.0f}",
        *("" if ratio is None else f"{ratio:.2f}x" for ratio in (measured, predicted)),
        error,
    ]
