"""Losses between hidden states of student and teacher, a token, and which layers go together.

Legend: s sequence, b micro batch, h hidden (student's), g hidden (teacher's).

Hidden states [..., h] of any leading shape ([s, b] in Megatron); a rank needs whole states, of all or of its own
tokens (sequence parallel). Layers count from 1, as in prune.drop_layers; 0 stands for the embeddings' output.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from nemo_minitron.errors import ConfigError


def cosine_loss(student: Any, teacher: Any, projection: Any = None) -> Any:
    """1 - cos(P h_s, h_t) of each token [...], from 0 to 2, in float32 (float64 for float64 states).

    Source: arXiv 2407.14679, section 3 (L_is).

    Args:
        student, teacher: hidden states [..., h], [..., g].
        projection: P, from `projection`; None: the identity.
    """
    from torch.nn.functional import cosine_similarity

    return 1 - cosine_similarity(*_comparable(student, teacher, projection), dim=-1)


def mse_loss(student: Any, teacher: Any, projection: Any = None) -> Any:
    """mean_g (P h_s - h_t)^2 of each token [...]; NeMo's MSELoss has the sum over g. Else as `cosine_loss`."""
    own, other = _comparable(student, teacher, projection)
    return (own - other).square().mean(dim=-1)


def projection(student_width: int, teacher_width: int, dtype: Any = None) -> Any:
    """P: h -> g, a trained linear map without bias where the widths differ; the identity where they agree."""
    import torch

    if student_width == teacher_width:
        return torch.nn.Identity()
    return torch.nn.Linear(student_width, teacher_width, bias=False, dtype=dtype)


def match_layers(
    teacher_layers: int,
    student_layers: int,
    *,
    drop_layers: Sequence[int] | None = None,
    pairs: Iterable[tuple[int, int]] | None = None,
) -> list[tuple[int, int]]:
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


def outer_pairs(teacher_layers: int, student_layers: int) -> list[tuple[int, int]]:
    """Embeddings and last block alone, as in arXiv 2407.14679, section 4, for a depth that is cut a lot."""
    return match_layers(teacher_layers, student_layers, pairs=[(0, 0), (student_layers, teacher_layers)])


def _comparable(student: Any, teacher: Any, projection: Any) -> tuple[Any, Any]:
    """The projected student's and the teacher's states in the accumulation dtype."""
    import torch

    if projection is not None:
        student = projection(student)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student's states {[*student.shape]} and teacher's {[*teacher.shape]} differ in shape; "
            "where widths differ, a projection is needed"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def _kept(teacher_layers: int, student_layers: int, drop_layers: Sequence[int]) -> list[tuple[int, int]]:
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


def _checked(pairs: list[tuple[int, ...]], teacher_layers: int, student_layers: int) -> list[tuple[int, int]]:
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
    ordered = sorted(pairs)
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
