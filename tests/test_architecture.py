"""Architectures: parameter counts of published models, the pruning grid, layer lists."""

import pytest

from nemo_minitron.architecture import (
    Architecture,
    PruningGrid,
    RopeScaling,
    human,
    layer_problems,
    padded_vocab_size,
    parse_layers,
)

LLAMA31_8B = Architecture(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    seq_length=8192,
    rope_scaling=RopeScaling(),
)
NEMOTRON = {"normalization": "LayerNorm", "activation": "squared_relu", "gated_linear_unit": False}
MINITRON_4B = Architecture(
    family="nemotron",
    num_layers=32,
    hidden_size=3072,
    ffn_hidden_size=9216,
    num_attention_heads=24,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=256000,
    **NEMOTRON,
)
MISTRAL_NEMO_12B = Architecture(
    family="mistral",
    num_layers=40,
    hidden_size=5120,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=131072,
)


def test_llama31_8b_has_its_published_parameters():
    assert LLAMA31_8B.parameters() == 8_030_261_248
    assert LLAMA31_8B.kv_channels == 128


@pytest.mark.parametrize(
    "architecture, total",
    [
        (MINITRON_4B, "4.19B"),
        (MISTRAL_NEMO_12B, "12.25B"),
        (LLAMA31_8B.with_sizes(num_layers=16), "4.54B"),
        (LLAMA31_8B.with_sizes(hidden_size=3072, ffn_hidden_size=9216), "4.51B"),
        (MISTRAL_NEMO_12B.with_sizes(hidden_size=4096, ffn_hidden_size=11520), "8.41B"),
    ],
)
def test_published_sizes(architecture, total):
    assert not architecture.problems()
    assert human(architecture.parameters()) == total


def test_the_head_size_stays_when_the_width_is_cut():
    narrow = LLAMA31_8B.with_sizes(hidden_size=3072, num_attention_heads=24)
    assert narrow.kv_channels == 128
    assert narrow.qkv_rows() == (24 + 16) * 128
    assert LLAMA31_8B.with_sizes(hidden_size=None) == LLAMA31_8B


def test_tied_embeddings_biases_and_norms_are_counted():
    sizes = {"num_layers": 1, "hidden_size": 4, "ffn_hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10}
    plain = Architecture(**sizes)
    assert plain.layer_parameters() == 3 * 16 + 16 + 2 * 32 + 32 + 2 * 4
    assert plain.parameters() == 2 * 40 + plain.layer_parameters() + 4
    tied = Architecture(**sizes, share_embeddings_and_output_weights=True)
    assert plain.parameters() - tied.parameters() == 40
    assert tied.non_embedding_parameters() == plain.non_embedding_parameters()
    assert Architecture(**sizes, add_qkv_bias=True).parameters() - plain.parameters() == 12
    assert Architecture(**sizes, add_bias_linear=True).parameters() - plain.parameters() == 12 + 4 + 16 + 4
    assert Architecture(**sizes, normalization="LayerNorm").parameters() - plain.parameters() == 3 * 4


def test_a_dictionary_round_trip_keeps_everything():
    assert Architecture.from_dict(LLAMA31_8B.to_dict()) == LLAMA31_8B


def test_all_that_is_wrong_is_named():
    wrong = Architecture(
        family="gru", num_layers=0, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, vocab_size=8
    )
    assert {problem.split()[0] for problem in wrong.problems()} == {"family", "num_layers"}
    uneven = Architecture(
        num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=3, num_query_groups=2, vocab_size=8
    )
    assert uneven.problems() == ["num_attention_heads 3 must be a multiple of num_query_groups 2"]


def test_the_grid_ends_with_the_models_own_size():
    assert PruningGrid().choices(LLAMA31_8B, "hidden_size")[-2:] == [3840, 4096]
    assert PruningGrid().choices(LLAMA31_8B, "num_attention_heads") == [8, 16, 24, 32]
    assert PruningGrid(hidden_size=300).choices(LLAMA31_8B, "hidden_size")[-2:] == [3900, 4096]


def test_targets_on_the_grid_pass():
    targets = {"hidden_size": 3072, "ffn_hidden_size": 9216, "num_layers": 16, "num_attention_heads": None}
    assert PruningGrid().problems(LLAMA31_8B, targets) == []


@pytest.mark.parametrize(
    "targets, message",
    [
        (
            {"hidden_size": 3000},
            "hidden_size 3000 is not on the pruning grid: multiples of 256 up to 4096 (3000 mod 256 = 184); "
            "nearest 2816 and 3072",
        ),
        (
            {"num_attention_heads": 12},
            "num_attention_heads 12 is not on the pruning grid: multiples of the teacher's query groups, 8 up to 32 "
            "(12 mod 8 = 4); nearest 8 and 16",
        ),
        ({"num_layers": 64}, "num_layers 64 is above the teacher's 32: pruning only makes a model smaller"),
        ({"num_layers": 0}, "num_layers 0 is not on the pruning grid: multiples of 2 up to 32; nearest 2"),
    ],
)
def test_targets_off_the_grid_name_the_rule_and_the_nearest(targets, message):
    assert PruningGrid().problems(LLAMA31_8B, targets) == [message]


def test_every_target_off_the_grid_is_named():
    assert len(PruningGrid().problems(LLAMA31_8B, {"hidden_size": 1, "ffn_hidden_size": 1, "num_layers": 1})) == 3


@pytest.mark.parametrize(
    "layers, numbers",
    [
        (None, []),
        (7, [7]),
        ("7", [7]),
        ("1-3", [1, 2, 3]),
        ("[1,3-5]", [1, 3, 4, 5]),
        ([1, "3-5"], [1, 3, 4, 5]),
        (["1, 2", 4], [1, 2, 4]),
        ((16, "17-17"), [16, 17]),
    ],
)
def test_layer_lists(layers, numbers):
    assert parse_layers(layers) == numbers


@pytest.mark.parametrize(
    "layers, message", [("five", "neither"), ("3-", "neither"), ([2.5], "neither"), ("5-3", "3-5")]
)
def test_layer_lists_that_cannot_be_read(layers, message):
    with pytest.raises(ValueError, match=message):
        parse_layers(layers)


@pytest.mark.parametrize(
    "layers, message",
    [
        ([0, 33], "drop_layers [0, 33] out of range: the teacher's layers are 1 to 32 (1-based)"),
        ([3, 3], "drop_layers [3] dropped twice"),
        (list(range(1, 33)), "drop_layers would drop all 32 layers; at least one must stay"),
    ],
)
def test_layers_that_cannot_be_dropped(layers, message):
    assert layer_problems(layers, 32) == [message]
    assert layer_problems([16, 31], 32) == []


@pytest.mark.parametrize(
    "size, parallel, rows", [(128256, 1, 128256), (32001, 1, 32128), (32000, 8, 32768), (1, 1, 128)]
)
def test_vocabulary_padding(size, parallel, rows):
    assert padded_vocab_size(size, tensor_parallel=parallel) == rows


def test_counts_read_as_people_write_them():
    assert [human(count) for count in (8.03e9, 3_220_000, 1500, 12)] == ["8.03B", "3.22M", "1.50K", "12"]
    assert "8.03B parameters" in LLAMA31_8B.describe()


def test_a_model_smaller_than_the_grid_is_told_the_grids_own_step():
    small = Architecture(
        num_layers=4, hidden_size=192, ffn_hidden_size=576, num_attention_heads=6, num_query_groups=2, vocab_size=512
    )
    (problem,) = PruningGrid(hidden_size=256).problems(small, {"hidden_size": 100})
    assert "multiples of 256 up to 192 (100 mod 256 = 100); nearest 192" in problem
