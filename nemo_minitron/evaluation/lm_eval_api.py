"""The one place that knows what differs between lm-evaluation-harness 0.4.13 and NVIDIA's fork of 0.4.8.

NeMo's containers ship the fork (nvidia-lm-eval) under the same name, lm_eval. Which one is there is asked of its task
manager. Tasks have one form here: `tasks` by name, `groups` by name, and `group_map` from a group to its members; the
fork's own form nests them instead.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nemo_minitron.evaluation.language_model import Bounded, Bounds

#: Sequences a batch that HFLM does not make smaller: how many there are is said by what they hold.
LARGEST_BATCH = 1 << 16


def task_manager(include_defaults: bool = True) -> "TaskManager":
    """lm-evaluation-harness's tasks by name; with its own, finding them takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def load(manager: "TaskManager", described: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tasks that are described by configurations, with their data."""
    if hasattr(manager, "load"):
        return manager.load(list(described))
    from lm_eval.api.task import ConfigurableTask

    # The fork's manager takes a name that it knows for a change of its own task, and does not tell a task its name.
    return _flat({one["task"]: ConfigurableTask(config=dict(one)) for one in described})


def load_named(manager: "TaskManager", name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The task, or all tasks of the group or tag, of this name, with their data.

    Args:
        changes: to the configuration of each.
    """
    if hasattr(manager, "load"):
        # TaskManager.load takes changes to a task, but not to a group; the factory that it uses takes both.
        built = manager._factory.build(manager.task_index[name], overrides=dict(changes), registry=manager.task_index)
        return manager.load(built if isinstance(built, list) else [built])
    return _flat(manager.load_task_or_group([{"task": name, **changes} if changes else name]))


def data_sets(manager: "TaskManager", name: str) -> Iterator[str]:
    """The data set of a task, or of each task of a group or tag; none where the name is not known."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    path, members = _described(entry)
    if path is None:
        for member in members:
            yield from data_sets(manager, member)
        return
    described = _configuration(path)
    if isinstance(described.get("task"), list):
        for member in described["task"]:
            inner = member if isinstance(member, str) else member.get("task") or member.get("group")
            if isinstance(inner, str):
                yield from data_sets(manager, inner)
    elif isinstance(described.get("dataset_path"), str):
        yield described["dataset_path"]


def members(manager: "TaskManager", tag: str) -> list[str]:
    """The tasks of a tag."""
    return _described(manager.task_index[tag])[1]


def for_evaluation(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks as the installed lm_eval.evaluate takes them."""
    from lm_eval.tasks import TaskManager

    return dict(loaded) if hasattr(TaskManager, "load") else _nested(loaded)


def language_model(
    *,
    pretrained: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    bounds: "Bounds",
    check: Callable[[Sequence[int]], None],
) -> "Bounded":
    """The harness's view of a model of transformers: its own HFLM where that works, ours where it does not.

    The fork ships HFLM, but not the helpers that it imports. Log-likelihoods are ours in both (language_model.Bounded).

    Args:
        bounds: what a forward pass may hold, language_model.Bounds.
        check: is given the tokens of each text before the model is.
    """
    from nemo_minitron.evaluation.language_model import Bounded, TransformersLM

    model = {"pretrained": pretrained, "tokenizer": tokenizer, "max_length": max_length}
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        return _checked(TransformersLM, check)(**model, bounds=bounds)

    class BoundedHFLM(Bounded, HFLM):
        """HFLM, whose batches Bounded makes."""

    model_view = _checked(BoundedHFLM, check)(**model, backend="causal", batch_size=bounds.most or LARGEST_BATCH)
    model_view.bounds = bounds
    return model_view


def _checked(kind: Any, check: Callable[[Sequence[int]], None]) -> "type[Bounded]":
    """A class of language models that shows the tokens of each text to `check`."""

    class Checked(kind):
        def tok_encode(self, *arguments: Any, **options: Any) -> list[int]:
            ids = super().tok_encode(*arguments, **options)
            check(ids)
            return ids

        def tok_batch_encode(self, *arguments: Any, **options: Any) -> Any:
            ids, mask = super().tok_batch_encode(*arguments, **options)
            check([int(ids.max())])
            return ids, mask

    return Checked


def _described(entry: Any) -> tuple[Any, list[str]]:
    """Of an entry in the index: the file that describes it, or None for a tag, and a tag's tasks."""
    if not isinstance(entry, dict):
        return entry.yaml_path, sorted(entry.tags) if entry.yaml_path is None else []
    named = entry["type"] == "tag" or entry["yaml_path"] == -1
    return (None, sorted(entry["task"])) if named else (entry["yaml_path"], [])


def _configuration(path: Any) -> dict[str, Any]:
    try:
        from lm_eval.tasks._yaml_loader import load_yaml
    except ModuleNotFoundError:
        from lm_eval.utils import load_yaml_config

        return load_yaml_config(path, mode="simple")
    return load_yaml(path, resolve_func=False)


def _flat(nested: Mapping[Any, Any]) -> dict[str, Any]:
    """The fork's {group: {task name: task}} with the groups inside each other taken apart."""
    flat: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for key, value in nested.items():
        if not isinstance(value, Mapping):
            flat["tasks"][key] = value
            continue
        inner = _flat(value)
        for kind, entries in inner.items():
            flat[kind] |= entries
        flat["groups"][key.group_name] = key
        flat["group_map"][key.group_name] = [getattr(member, "group_name", member) for member in value]
    return flat


def _nested(loaded: Mapping[str, Any]) -> dict[Any, Any]:
    """The reverse of _flat, without groups of whose tasks none is there."""
    tasks, groups, members_of = loaded["tasks"], loaded["groups"], loaded["group_map"]
    inside = {member for listed in members_of.values() for member in listed}

    def group(name: str) -> dict[Any, Any]:
        inside_group: dict[Any, Any] = {}
        for member in members_of[name]:
            if member in groups:
                inside_group |= group(member)
            elif member in tasks:
                inside_group[member] = tasks[member]
        return {groups[name]: inside_group} if inside_group else {}

    nested = {name: task for name, task in tasks.items() if name not in inside}
    for name in groups:
        if name not in inside:
            nested |= group(name)
    return nested
