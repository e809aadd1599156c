"""Budgets, shapes and their rivals: arithmetic on sizes, without a model."""

import dataclasses
import json

import pytest

from nemo_minitron.architecture import PruningGrid
from nemo_minitron.config import KDConfig, SearchConfig, SearchSettings, all_problems
from nemo_minitron.config.schemas.searching import parse_amount
from nemo_minitron.errors import ConfigError
from nemo_minitron.evaluation.layers import PartTimes
from nemo_minitron.planning.deployment import deployment_bytes
from nemo_minitron.planning.flops import forward_flops
from nemo_minitron.published import KNOWN
from nemo_minitron.search.budgets import budgets_of, load
from nemo_minitron.search.space import Space, name_of, proportional, rivals, sizes_of
from nemo_minitron.search.speeds import SpeedTable, tables

SMOLLM2, LLAMA = KNOWN["smollm2_135m"], KNOWN["llama31_8b"]


def space(teacher=SMOLLM2, **settings) -> Space:
    return Space.of(teacher, PruningGrid(), SearchSettings(**settings))


@pytest.mark.parametrize(
    ("given", "amount"),
    [
        ("60%", 0.6e8),
        ("12.5 %", 0.125e8),
        ("82M", 82e6),
        (82e6, 82e6),
        ("1.5B", 1.5e9),
        ("8.2e7", 8.2e7),
        (1000, 1000.0),
    ],
)
def test_amounts_are_shares_or_numbers(given, amount):
    assert parse_amount("parameters", given, 1e8) == pytest.approx(amount)


def test_bytes_have_units():
    assert parse_amount("memory", "6GB", 1.0) == 6e9 and parse_amount("memory", "512 MB", 1.0) == 512e6


@pytest.mark.parametrize(
    "given", ["sixty", "-5%", "0%", "60%%", True, "", "1e999", "nan", float("inf"), -3, "6 XB", [1]]
)
def test_what_is_no_budget_is_refused(given):
    problems = SearchSettings(parameters=given).problems()
    assert len(problems) == 1 and "is no budget: give 60%, 82M or 4B" in problems[0]


def test_a_search_without_budget_or_with_ranges_that_are_none_is_refused():
    problems = all_problems(
        SearchConfig(search=SearchSettings(hidden_size=[512, 256], num_layers="many", finalists=20, tolerance=0))
    )
    text = "\n".join(problems)
    for part in (
        "give a budget",
        "runs backwards: give [256,512]",
        "num_layers = 'many'",
        "finalists = 20",
        "tolerance = 0",
    ):
        assert part in text


def test_every_shape_is_on_the_grid_and_all_of_them_are_there():
    found = space()
    shapes = [*found.shapes()]
    grid = PruningGrid()
    assert len(shapes) == len(found) == len({name_of(shape) for shape in shapes}) == 15 * 18 * 12 * 3
    assert not any(grid.problems(SMOLLM2, sizes_of(shape, SMOLLM2)) for shape in shapes[::97])


def test_shapes_within_a_budget_are_those_that_arithmetic_finds():
    settings = SearchSettings(parameters="60%", tolerance=0.05)
    found = space()
    fitting = found.fitting(budgets_of(settings, SMOLLM2), 0.05)
    limit = 0.6 * SMOLLM2.parameters()
    expected = {name_of(one) for one in found.shapes() if 0.95 * limit <= one.parameters() <= limit}
    assert {name_of(shape) for shape in fitting} == expected and len(expected) > 100


def test_several_budgets_hold_together():
    settings = SearchSettings(parameters="60%", flops="50%", memory="70%", length=2048)
    budgets = budgets_of(settings, SMOLLM2)
    assert [budget.name for budget in budgets] == ["parameters", "memory", "flops"]
    fitting = space().fitting(budgets, 0.05)
    for shape in fitting:
        shares = (
            shape.parameters() / (0.6 * SMOLLM2.parameters()),
            forward_flops(shape, 2048) / (0.5 * forward_flops(SMOLLM2, 2048)),
            deployment_bytes(shape, "bf16", batch=1, length=2048)
            / (0.7 * deployment_bytes(SMOLLM2, "bf16", batch=1, length=2048)),
        )
        assert max(shares) == pytest.approx(load(budgets, shape)) and 0.95 <= max(shares) <= 1


def test_deployment_counts_weights_and_cache_by_hand():
    bf16 = deployment_bytes(LLAMA, "bf16", batch=4, length=8192)
    assert bf16 == 2 * LLAMA.parameters() + 2 * (2 * 32 * 8 * 128 * 4 * 8192)
    int4 = deployment_bytes(LLAMA, "int4", batch=1, length=1)
    linear = 32 * (4096 * (32 + 16) * 128 + 4096 * 4096 + 3 * 4096 * 14336)
    rest = LLAMA.parameters() - linear
    assert int4 == pytest.approx((0.5 + 2 / 128) * linear + 2 * rest + 2 * 2 * 32 * 8 * 128)
    windowed = dataclasses.replace(LLAMA, sliding_window=1024)
    assert deployment_bytes(windowed, "bf16", batch=1, length=8192) == deployment_bytes(
        LLAMA, "bf16", batch=1, length=1024
    )


def test_a_speed_up_is_a_share_of_the_teachers_seconds_and_nothing_else():
    assert parse_amount("decode", "1.8x", 3.6) == pytest.approx(2.0)
    for given in ("1x", "0.5x", "50%", "2", 2.0):
        assert "give 1.8x" in SearchSettings(prefill=given).problems()[0]
    assert "give 60%, 82M or 4B" in SearchSettings(parameters="2x").problems()[0]


def test_times_of_layers_add_up_to_those_of_models():
    """Every part's time is given: the table finds each pair of sizes, and a shape's time is the sum of its parts."""

    def attention(h, a):
        return h * a * 1e-6

    def mlp(h, f):
        return h * f * 1e-7

    def measure(shape):
        h = shape.hidden_size
        parts = PartTimes(attention(h, shape.num_attention_heads), mlp(h, shape.ffn_hidden_size), 1e-4, h * 1e-5)
        return {"prefill": parts, "decode": PartTimes(*(value / 100 for value in parts))}

    found = tables(space(), measure, every=1000)
    kept = {kind: SpeedTable.from_list(json.loads(json.dumps(table.to_list()))) for kind, table in found.items()}
    assert kept == found
    for shape in [*space().shapes()][::503]:
        layer = attention(shape.hidden_size, shape.num_attention_heads) + mlp(shape.hidden_size, shape.ffn_hidden_size)
        expected = shape.num_layers * (layer + 1e-4) + shape.hidden_size * 1e-5
        assert found["prefill"].seconds(shape) == pytest.approx(expected)
        assert found["decode"].seconds(shape) == pytest.approx(expected / 100)
    budgets = budgets_of(SearchSettings(decode="2x"), SMOLLM2, found)
    fitting = space().fitting(budgets, 0.05)
    own = found["decode"].seconds(SMOLLM2)
    assert fitting and all(abs(found["decode"].seconds(shape) / own * 2 - 1) <= 0.05 for shape in fitting)


def test_a_budget_at_or_above_the_teacher_is_no_cut():
    with pytest.raises(ConfigError, match=r"search.parameters = 200M is no cut: the teacher has 134.52M"):
        budgets_of(SearchSettings(parameters="200M"), SMOLLM2)


def test_a_budget_below_the_smallest_shape_names_the_nearest():
    settings = SearchSettings(parameters="1%")
    with pytest.raises(ConfigError, match=r"below the smallest shape: .*nearest: l2-h32-f128-a3"):
        space().fitting(budgets_of(settings, SMOLLM2), 0.05)


def test_a_range_off_the_grid_names_the_nearest():
    with pytest.raises(ConfigError, match=r"search.hidden_size = \[430, 440\] holds no size .* nearest 416 and 448"):
        space(hidden_size=[430, 440])
    only = space(hidden_size=448, num_layers=[20, 24])
    assert only.choices["hidden_size"] == [448] and only.choices["num_layers"] == [20, 22, 24]


@pytest.mark.parametrize(
    ("teacher", "limit", "expected"),
    [
        ("llama31_8b", "4.53B", "l32-h3072-f9216-a32"),
        ("llama31_8b", "4.6B", "l16-h4096-f14336-a32"),
        ("nemotron4_15b", "8.3B", "l32-h4096-f16384-a48"),
        ("llama31_8b", "7B", None),
        ("smollm2_135m", "60%", None),
    ],
)
def test_the_published_shape_of_a_size_is_among_the_rivals(teacher, limit, expected):
    """Llama-3.1-Minitron-4B-Width and -Depth, and Minitron-8B."""
    settings = SearchSettings(parameters=limit)
    found = rivals(Space.of(KNOWN[teacher], PruningGrid(), settings), budgets_of(settings, KNOWN[teacher]))
    assert (name_of(found["published"]) if "published" in found else None) == expected


def test_a_range_that_leaves_out_the_teachers_size_leaves_out_its_rival():
    budgets = budgets_of(SearchSettings(parameters="60%"), SMOLLM2)
    assert "depth" not in rivals(space(hidden_size=[416, 544]), budgets)
    assert "width" not in rivals(space(num_layers=[20, 28]), budgets)


def test_the_teacher_is_no_rival_of_its_own_size():
    budgets = budgets_of(SearchSettings(parameters="95%"), LLAMA)
    assert "published" not in rivals(space(LLAMA), budgets)


def test_answers_of_a_folder_are_not_what_a_search_learns_from():
    for given in ({"teacher": "folder"}, {"teachers": {"a": 1}}, {"fill": True, "teacher": "folder"}):
        config = SearchConfig(output="out", dry_run=True, kd=KDConfig(**given))
        assert "a search has its teacher answer once by itself" in "; ".join(all_problems(config))


def test_rivals_are_in_proportion_depth_alone_and_width_alone():
    budgets = budgets_of(SearchSettings(parameters="60%"), SMOLLM2)
    found = rivals(space(), budgets)
    assert found["depth"].hidden_size == 576 and found["depth"].ffn_hidden_size == 1536
    assert found["width"].num_layers == 30 and 0.97 < load(budgets, found["width"]) <= 1
    uniform = found["uniform"]
    shares = [
        getattr(uniform, name) / getattr(SMOLLM2, name) for name in ("num_layers", "hidden_size", "ffn_hidden_size")
    ]
    assert max(shares) - min(shares) < 0.1 and 0.9 < load(budgets, uniform) <= 1
    ordered = [shape.parameters() for shape in proportional(space())]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize(
    ("kd", "rank_by", "ranked"),
    [
        ({}, None, "kd_loss"),
        ({}, "lm_loss", "lm_loss"),
        ({"kd_weight": 0.0, "lm_weight": 1.0}, None, "lm_loss"),
        ({"kd_weight": 0.0, "lm_weight": 1.0}, "kd_loss", "search.rank_by = kd_loss needs KD"),
        ({}, "loss", "rank_by = 'loss' must be one of kd_loss, lm_loss"),
    ],
)
def test_a_round_ranks_by_the_loss_that_is_trained_on_or_a_stated_one(kd, rank_by, ranked):
    settings = SearchSettings(parameters="60%", rank_by=rank_by)
    config = SearchConfig(output="out", dry_run=True, kd=KDConfig(**kd), search=settings)
    problems = "; ".join(all_problems(config))
    if " " in ranked:
        assert ranked in problems
    else:
        assert config.ranked_by == ranked and "rank_by" not in problems
