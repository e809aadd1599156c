"""Students as shares of the teacher, or as a search's budget, become sizes."""

from typing import Any

from nemo_minitron.architecture import PruningGrid, human, natural_divisor
from nemo_minitron.errors import ConfigError
from nemo_minitron.flow.models import searches, student_architecture, student_problems, without_sizes
from nemo_minitron.flow.searching import known_sizes
from nemo_minitron.flow.settle.state import Choice, State
from nemo_minitron.pruning.shares import SHARES, share_problems, sizes_of

#: What a share builds on, where it is named beside it.
NAMED = ("num_layers", "drop_layers", "num_attention_heads")


def settle_students(state: State) -> None:
    """Every share becomes the nearest shape on the grid; raises ConfigError with what is wrong with any of them."""
    students, problems = state.config.prune.students, []
    for name, targets in students.items():
        if searches(state.config, name):
            problems += [f"prune.students.{name}: {problem}" for problem in _take_search(state, name)]
            continue
        asked = {share: targets[share] for share in SHARES if targets.get(share) is not None}
        wrong = share_problems(targets)
        students[name] = {key: value for key, value in targets.items() if key not in (*SHARES, "search")}
        if asked and not wrong and any(targets.get(size) is not None for size in NAMED):
            wrong = student_problems(state.config, state.teacher, name)
        problems += [f"prune.students.{name}: {problem}" for problem in wrong]
        if asked and not wrong:
            _take_shares(state, name, asked)
    if problems:
        raise ConfigError(problems, "flow")


def _take_search(state: State, name: str) -> list[str]:
    """Puts the sizes that are known into the student `name`, and says which; returns what is wrong with its search."""
    if state.config.data.sources is not None:
        return ["a search reads one text, and data.sources names several"]
    targets = without_sizes(state.config.prune.students[name])
    try:
        sizes, why = known_sizes(state.config, state.teacher, name)
    except ConfigError as error:
        return error.problems
    state.config.prune.students[name] = targets | sizes
    state.choices.append(Choice(f"prune.students.{name}", _in_words(sizes), why))
    return []


def _in_words(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{size} {value}" for size, value in sizes.items())


def _take_shares(state: State, name: str, asked: dict[str, Any]) -> None:
    """Puts sizes where the student `name` asks for shares, and says which."""
    prune, teacher = state.config.prune, state.teacher
    widths = {"hidden_size": prune.hidden_size_divisor, "ffn_hidden_size": prune.ffn_hidden_size_divisor}
    if "parameters" in asked:
        for size, given in widths.items():
            _say_divisor(state, size, given)
    grid = PruningGrid.of(prune)
    named = prune.students[name]
    all_sizes = sizes_of({"method": prune.method} | named | asked, teacher, grid)
    sizes = {size: value for size, value in all_sizes.items() if size not in named and size != "method"}
    prune.students[name] = named | sizes
    student = student_architecture(state.config, teacher, name)
    state.choices.append(
        Choice(
            f"prune.students.{name}",
            _in_words(sizes),
            f"{' and '.join(f'{value} of the {share}' for share, value in asked.items())}, the nearest on the grid; "
            f"{student.parameters() / teacher.parameters():.1%} of the parameters, {human(student.parameters())}",
        )
    )


def _say_divisor(state: State, size: str, given: int | None) -> None:
    """Says which grid holds, once."""
    setting, own = f"prune.{size}_divisor", getattr(state.teacher, size)
    if given is None and setting not in [choice.setting for choice in state.choices]:
        why = f"the largest power of two of which the teacher's {own} has 12 steps, within bounds"
        state.choices.append(Choice(setting, natural_divisor(size, own), why))
