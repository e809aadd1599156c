"""Published tasks: the suite of the Minitron papers under one name, and any task of lm-evaluation-harness."""

import contextlib
import difflib
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.evaluation import lm_eval_api
from nemo_minitron.evaluation.custom_tasks import CUSTOM_TASKS, HUMANEVAL, XLSUM, first_line, folder_of, own_cache

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


class Part(NamedTuple):
    """A task of a suite.

    Attributes:
        name: of lm-evaluation-harness's task or group, or of one made here.
        shots: examples before each question.
        dataset: on the Hugging Face hub.
    """

    name: str
    shots: int
    dataset: str


#: Papers: arXiv 2408.11796 v4, table 1, and 2407.14679; cards: nvidia/Minitron-8B-Base and its siblings.
SUITES: dict[str, tuple[Part, ...]] = {
    "minitron": (
        Part("mmlu", 5, "cais/mmlu"),
        Part("hellaswag", 10, "Rowan/hellaswag"),
        Part("winogrande", 5, "allenai/winogrande"),
        Part("arc_challenge", 25, "allenai/ai2_arc"),
        Part("gsm8k", 5, "openai/gsm8k"),
        Part("xlsum_en", 3, XLSUM),
        Part("humaneval", 0, HUMANEVAL),
    )
}
#: Name -> data set; the fork of lm-evaluation-harness in NeMo's containers still has the hub's old names of some.
PUBLISHED = {part.name: part.dataset for part in SUITES["minitron"]}
SUITES["minitron_card"] = tuple(part._replace(shots=5 if part.name == "mmlu" else 0) for part in SUITES["minitron"])


class Requested(NamedTuple):
    """What `tasks` asks for beyond the tasks made here.

    Attributes:
        names: as they were asked for, with suites taken apart.
        loaded: lm-evaluation-harness's tasks and groups.
        left_out: name -> why.
    """

    names: list[str]
    loaded: dict[str, Any]
    left_out: dict[str, str]


def check_names(names: list[str], known: tuple[str, ...]) -> None:
    """Raises ConfigError for a task that nobody knows, with those that look like it."""
    unknown = [name for name in names if name not in (*known, *SUITES)]
    if not unknown:
        return
    listed = _index().all_tasks
    problems = []
    for name in unknown:
        if name in listed:
            continue
        nearest = difflib.get_close_matches(name, [*known, *SUITES, *listed], n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"there are {', '.join((*known, *SUITES))}"
        problems.append(f"{name} is not a task: {hint}; `lm-eval ls tasks` lists lm-evaluation-harness's own")
    if problems:
        raise ConfigError(problems, "tasks")


def load_tasks(names: list[str], *, task_data: str | None, shots: int | None, allow_code: bool) -> Requested:
    """Loads every task with its data.

    Args:
        names: suites, or tasks of lm-evaluation-harness.
        task_data: folder with downloaded data sets; None: the hub, or what it left in its cache.
        shots: examples before each question; None: as each task says.
        allow_code: tasks that run code which the model wrote are wanted.

    Raises:
        DataError: data is missing; it says of all tasks what to download to where.
        ConfigError: a task would run code, and that is not allowed.
    """
    parts, left_out = _parts(names, shots, allow_code)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    missing: dict[str, str] = {}
    for part in parts:
        try:
            with own_cache() if task_data is not None else contextlib.nullcontext():
                tasks_of_part = _load(part, task_data)
        except _missing_data_errors() as error:
            missing |= dict.fromkeys(_datasets(part) or [f"the data of {part.name}"], first_line(error))
            continue
        for kind, entries in loaded.items():
            entries |= tasks_of_part.get(kind, {})
    if missing:
        raise DataError(_missing_message(missing, task_data))
    if not allow_code:
        refuse_code(loaded["tasks"])
    return Requested([part.name for part in parts], loaded, left_out)


def refuse_code(tasks: dict[str, Any]) -> None:
    """Raises ConfigError where a task would run code that the model writes."""
    unsafe = sorted(name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False))
    if unsafe:
        raise ConfigError(f"{', '.join(unsafe)}: runs code that the model writes; allow_code=true lets it", "tasks")


def _parts(names: list[str], shots: int | None, allow_code: bool) -> tuple[list[Part], dict[str, str]]:
    parts: dict[str, Part] = {}
    left_out = {}
    for name in names:
        for part in SUITES.get(name, (Part(name, -1, ""),)):
            if name in SUITES and part.name == "humaneval" and not allow_code:
                left_out["humaneval"] = "it runs code that the model writes; allow_code=true lets it"
                continue
            parts.setdefault(part.name, part if shots is None else part._replace(shots=shots))
    return list(parts.values()), left_out


def _load(part: Part, task_data: str | None) -> dict[str, Any]:
    """The task or group with its data, from the folder or the hub."""
    index = _index()
    if part.dataset and part.name in CUSTOM_TASKS:
        return lm_eval_api.load(
            index, [CUSTOM_TASKS[part.name](task_data) | {"task": part.name, "num_fewshot": part.shots}]
        )
    changes: dict[str, Any] = {} if part.shots < 0 else {"num_fewshot": part.shots}
    datasets = _datasets(part)
    if task_data is not None:
        if len(datasets) != 1:
            raise ConfigError(
                f"{part.name} reads {len(datasets)} data sets ({', '.join(datasets)}): task_data works for one; leave "
                "task_data, or name the group's tasks one by one",
                "tasks",
            )
        changes["dataset_path"] = str(folder_of(task_data, datasets[0]))
    return lm_eval_api.load_named(index, part.name, changes)


_kept: "dict[str, TaskManager]" = {}


def _index() -> "TaskManager":
    """lm-evaluation-harness's tasks by name; finding them takes seconds, so it is done once."""
    if "index" not in _kept:
        _kept["index"] = lm_eval_api.task_manager()
    return _kept["index"]


def _datasets(part: Part) -> list[str]:
    """The data sets that a task, or all of a group or tag, reads."""
    if part.name in PUBLISHED:
        return [PUBLISHED[part.name]]
    return sorted(set(lm_eval_api.data_sets(_index(), part.name)))


def _missing_data_errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # datasets says ConnectionError and FileNotFoundError, both OSError; ValueError: a configuration it cannot find.
    return (OSError, DatasetsError, HfHubHTTPError, LocalEntryNotFoundError, ValueError)


def _missing_message(missing: dict[str, str], task_data: str | None) -> str:
    place = task_data or "DIR"
    lines = ["these tasks' data is neither here nor could it be had from the Hugging Face hub:"]
    lines += [f"  {dataset}: {reason}" for dataset, reason in missing.items()]
    lines.append("On a machine with a network run, and then give task_data=" + place + " (a copy of that folder):")
    for dataset in missing:
        extra = " --revision refs/convert/parquet --include 'english/*'" if dataset == XLSUM else ""
        lines.append(f"  hf download --repo-type dataset {dataset}{extra} --local-dir {place}/{dataset}")
    return "\n".join(lines)
