"""Students as shares of a teacher: nearest on the grid, in proportion, whatever the family."""

import dataclasses
import itertools

import pytest

from nemo_minitron.architecture import Architecture, PruningGrid, natural_divisor
from nemo_minitron.pruning.shares import in_proportion, parse_share, share_problems, sizes_of
from nemo_minitron.published import KNOWN

SMOLLM2 = Architecture(
    num_layers=30, hidden_size=576, ffn_hidden_size=1536, num_attention_heads=9, num_query_groups=3, kv_channels=64,
    vocab_size=49152, share_embeddings_and_output_weights=True,
)  # fmt: skip
TEACHERS = {
    "smollm2": SMOLLM2,
    "untied": dataclasses.replace(SMOLLM2, share_embeddings_and_output_weights=False),
    "with biases": dataclasses.replace(SMOLLM2, family="gpt", add_bias_linear=True, normalization="LayerNorm"),
    **{name: KNOWN[name] for name in ("tiny", "llama31_8b", "minitron_4b", "minitron_8b", "mistral_nemo_12b")},
}
PERCENTS = (5, 20, 33.3, 50, 60, 75, 90, 99)


@pytest.fixture(params=TEACHERS)
def teacher(request) -> Architecture:
    return TEACHERS[request.param]


def cut(teacher: Architecture, grid: PruningGrid | None = None, **targets) -> Architecture:
    sizes = sizes_of(targets, teacher, grid or PruningGrid())
    return teacher.with_sizes(**{"num_layers": 18 if targets.get("drop_layers") else None} | without_drop(sizes))


def without_drop(sizes: dict) -> dict:
    return {name: value for name, value in sizes.items() if name != "drop_layers"}


def by_hand(teacher: Architecture, grid: PruningGrid) -> set[tuple[int, int]]:
    """The shapes that a fine sweep of the scale meets."""
    choices = [grid.choices(teacher, name) for name in ("hidden_size", "ffn_hidden_size")]
    found = set()
    for step in range(20001):
        sizes = (step / 20000 * teacher.hidden_size, step / 20000 * teacher.ffn_hidden_size)
        found.add(tuple(min(legal, key=lambda choice, x=x: abs(choice - x)) for legal, x in zip(choices, sizes)))
    return found


@pytest.mark.parametrize("grid", [PruningGrid(), PruningGrid(hidden_size=32, ffn_hidden_size=96)], ids=["own", "given"])
def test_the_shape_is_the_nearest_of_those_in_proportion(teacher, grid):
    shapes = in_proportion(teacher, grid)
    assert {(shape.hidden_size, shape.ffn_hidden_size) for shape in shapes} >= by_hand(teacher, grid)
    for shape in shapes:
        assert (
            grid.problems(teacher, {"hidden_size": shape.hidden_size, "ffn_hidden_size": shape.ffn_hidden_size}) == []
        )
        off = shape.hidden_size / teacher.hidden_size - shape.ffn_hidden_size / teacher.ffn_hidden_size
        steps = [grid.step(teacher, name) / getattr(teacher, name) for name in ("hidden_size", "ffn_hidden_size")]
        assert abs(off) <= sum(steps) or min(shape.hidden_size, shape.ffn_hidden_size) in (
            grid.step(teacher, "hidden_size"), grid.step(teacher, "ffn_hidden_size"),
        )  # fmt: skip
    for percent in PERCENTS:
        asked = percent / 100 * teacher.parameters()
        chosen = cut(teacher, grid, parameters=f"{percent}%")
        assert abs(chosen.parameters() - asked) == min(abs(shape.parameters() - asked) for shape in shapes)


def test_a_larger_share_is_no_smaller_student_and_all_of_it_is_the_teacher(teacher):
    students = [cut(teacher, parameters=f"{percent}%") for percent in range(1, 101)]
    for smaller, larger in itertools.pairwise(students):
        assert smaller.hidden_size <= larger.hidden_size and smaller.ffn_hidden_size <= larger.ffn_hidden_size
    assert students[-1] == teacher == cut(teacher, layers="100%", parameters="100.0 %")
    for student in students:
        assert student.with_sizes(hidden_size=teacher.hidden_size, ffn_hidden_size=teacher.ffn_hidden_size) == teacher


def test_the_share_of_a_real_model_is_met_within_five_points(teacher):
    if teacher.parameters() < 1e8:
        return
    for percent in range(25, 100):
        assert cut(teacher, parameters=f"{percent}%").parameters() / teacher.parameters() == pytest.approx(
            percent / 100, abs=0.05
        )


def test_layers_are_the_nearest_on_their_grid():
    assert [sizes_of({"layers": share}, SMOLLM2, PruningGrid())["num_layers"] for share in ("1%", "50%", "60%")] == [
        2, 14, 18,
    ]  # fmt: skip
    assert sizes_of({"layers": "50%"}, SMOLLM2, PruningGrid(num_layers=1)) == {"num_layers": 15}


def test_both_shares_meet_the_parameters_together_and_named_sizes_stay():
    both = cut(SMOLLM2, layers="60%", parameters="50%")
    assert both.num_layers == 18 and both.parameters() / SMOLLM2.parameters() == pytest.approx(0.5, abs=0.04)
    assert cut(SMOLLM2, num_layers=18, parameters="50%") == cut(SMOLLM2, drop_layers="19-30", parameters="50%") == both
    heads = cut(SMOLLM2, num_attention_heads=6, parameters="50%")
    assert (heads.num_attention_heads, heads.num_query_groups, heads.kv_channels) == (6, 3, 64)
    assert heads.hidden_size >= cut(SMOLLM2, parameters="50%").hidden_size
    untied = sizes_of({"parameters": "60%", "untie": True}, SMOLLM2, PruningGrid())
    assert untied["hidden_size"] < cut(SMOLLM2, parameters="60%").hidden_size
    published = sizes_of({"parameters": "60%", "untie": True, "method": "minitron"}, SMOLLM2, PruningGrid())
    assert published["hidden_size"] == cut(SMOLLM2, parameters="60%").hidden_size


@pytest.mark.parametrize("text", ["0%", "101%", "abc", "60", 0.6, "-5%", "%", "", "nan%", "1e9%", "0.0 %", []])
def test_what_is_no_share_is_one_message(text):
    with pytest.raises(ValueError, match="is not a share"):
        parse_share(text)
    for name in ("parameters", "layers"):
        assert len(share_problems({name: text})) == 1


def test_a_share_and_the_sizes_that_it_decides_are_not_both_given():
    (problem,) = share_problems({"parameters": "60%", "hidden_size": 448})
    assert problem.startswith("parameters and hidden_size are given: the share decides hidden_size and ffn_hidden_size")
    assert len(share_problems({"layers": "60%", "num_layers": 3, "parameters": "x"})) == 2
    assert share_problems({"parameters": "60%", "num_layers": 3, "num_attention_heads": 3}) == []


@pytest.mark.parametrize("name, own", [("hidden_size", 256), ("ffn_hidden_size", 512)])
def test_the_grid_follows_the_models_size(name, own):
    for size in (7, 64, 96, 192, 576, 1536, 2048, 2560, 3071, 3072, 4096, 6144, 14336, 10**6):
        divisor = natural_divisor(name, size)
        least = {"hidden_size": 8, "ffn_hidden_size": 16}[name]
        assert least <= divisor <= own and divisor & (divisor - 1) == 0
        assert divisor == least or size >= 12 * divisor
        assert divisor == own or size < 24 * divisor
    for model in KNOWN.values():
        if model.hidden_size >= 3072 and model.ffn_hidden_size >= 6144:
            assert natural_divisor(name, getattr(model, name)) == own
    assert PruningGrid(hidden_size=300, ffn_hidden_size=7).step(SMOLLM2, "hidden_size") == 300
    assert PruningGrid().choices(SMOLLM2, "hidden_size")[-3:] == [512, 544, 576]
