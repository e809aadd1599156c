"""Which layers of student and teacher have their hidden states compared.

Layers count from 1, as in prune.drop_layers; 0 stands for the embeddings' output.
"""

from collections.abc import Iterable, Sequence

from nemo_minitron.architecture import Architecture
from nemo_minitron.config import HiddenLossConfig
from nemo_minitron.errors import ConfigError

#: (student's layer, teacher's layer)
Pair = tuple[int, int]


def layer_pairs(
    config: HiddenLossConfig, teacher: Architecture, student: Architecture, drop_layers: Sequence[int] | None
) -> list[Pair]:
    """The pair of each loss on hidden states; none where they are not asked for.

    Args:
        drop_layers: the layers that the student lacks, where its manifest says so.

    Raises:
        ConfigError: a pair does not exist.
    """
    if not config.weight:
        return []
    if config.pairs == "outer":
        return outer_pairs(teacher.num_layers, student.num_layers)
    if config.pairs == "auto":
        return match_layers(teacher.num_layers, student.num_layers, drop_layers=drop_layers)
    return match_layers(teacher.num_layers, student.num_layers, pairs=config.pairs)


def match_layers(
    teacher_layers: int,
    student_layers: int,
    *,
    drop_layers: Sequence[int] | None = None,
    pairs: Iterable[Sequence[int]] | None = None,
) -> list[Pair]:
    """Pairs (student's layer, teacher's layer) whose outputs are compared, ascending.

    Where `pairs` are given, they are checked and returned. Where the dropped layers are known, the student's i-th layer
    goes with the i-th layer that stayed. Else layers are spread evenly, round(i teacher_layers / student_layers), the
    last with the last; a student cut in width alone is matched layer by layer.

    Args:
        drop_layers: the teacher's layers that the student lacks.
        pairs: (student's layer, teacher's layer); 0 for the embeddings.
    """
    if min(teacher_layers, student_layers) < 1 or student_layers > teacher_layers:
        raise _error([f"a student of {student_layers} layers cannot come from a teacher of {teacher_layers}"])
    if pairs is not None:
        return _checked([tuple(pair) for pair in pairs], teacher_layers, student_layers)
    if drop_layers is not None:
        return _kept(teacher_layers, student_layers, drop_layers)
    # half a layer rounds up
    return [
        (layer, (2 * layer * teacher_layers + student_layers) // (2 * student_layers))
        for layer in range(1, student_layers + 1)
    ]


def outer_pairs(teacher_layers: int, student_layers: int) -> list[Pair]:
    """Embeddings and last block alone, as in arXiv 2407.14679, section 4, for a depth that is cut a lot."""
    return match_layers(teacher_layers, student_layers, pairs=[(0, 0), (student_layers, teacher_layers)])


def _kept(teacher_layers: int, student_layers: int, drop_layers: Sequence[int]) -> list[Pair]:
    problems = [
        f"drop_layers names layer {layer}; the teacher has 1 to {teacher_layers}"
        for layer in drop_layers
        if not 1 <= layer <= teacher_layers
    ]
    if len(set(drop_layers)) < len(drop_layers):
        problems.append(f"drop_layers {list(drop_layers)} names a layer twice")
    if problems:
        raise _error(problems)
    kept = [layer for layer in range(1, teacher_layers + 1) if layer not in set(drop_layers)]
    if len(kept) != student_layers:
        raise _error([f"{teacher_layers} layers - {len(drop_layers)} dropped = {len(kept)}, not {student_layers}"])
    return list(enumerate(kept, start=1))


def _checked(pairs: list[tuple[int, ...]], teacher_layers: int, student_layers: int) -> list[Pair]:
    if not pairs:
        raise _error(["no pair of layers is given"])
    malformed = [f"{pair} is no pair of layers" for pair in pairs if len(pair) != 2]
    if malformed:
        raise _error(malformed)
    problems = []
    for model, layers, numbers in (
        ("student", student_layers, [pair[0] for pair in pairs]),
        ("teacher", teacher_layers, [pair[1] for pair in pairs]),
    ):
        problems += [
            f"the {model} has no layer {number}; 0 (embeddings) to {layers}"
            for number in numbers
            if not 0 <= number <= layers
        ]
        problems += [
            f"the {model}'s layer {number} is in {numbers.count(number)} pairs"
            for number in dict.fromkeys(numbers)
            if numbers.count(number) > 1
        ]
    ordered = sorted((own, other) for own, other in pairs)
    problems += [
        f"{first} and {second} cross: layers go together in the models' order"
        for first, second in zip(ordered, ordered[1:])
        if first[0] < second[0] and first[1] > second[1]
    ]
    if problems:
        raise _error(problems)
    return ordered


def _error(problems: list[str]) -> ConfigError:
    return ConfigError(problems, "layers to compare")
