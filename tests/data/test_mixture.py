"""Blends without an engine: exact shares, shares that follow losses, the order of validation, and what is refused."""

import json
import math
import random

import numpy
import pytest
import torch

from nemo_minitron.artifacts import Manifest
from nemo_minitron.config import DataConfig, DistillConfig, FinetuneConfig, InstructConfig, ModelDataConfig, validated
from nemo_minitron.data.blend import Blend, Drawn, Mixture, Shares, Turns, followed, normalised
from nemo_minitron.data.blend_sources import drawn_windows, open_sources
from nemo_minitron.data.module import resolve_prefixes
from nemo_minitron.data.sample_sets import Passes, Piece, Rows
from nemo_minitron.errors import ConfigError, DataError


def deviation(drawn: list[int], shares: list[list[float]]) -> float:
    """How far any source ever is from its share, in samples; `shares` of each sample."""
    taken, due, worst = [0] * len(shares[0]), [0.0] * len(shares[0]), 0.0
    for source, now in zip(drawn, shares, strict=True):
        taken[source] += 1
        due = [sum(pair) for pair in zip(due, now)]
        worst = max(worst, *(abs(one - other) for one, other in zip(taken, due)))
    return worst


def test_shares_are_exact_at_every_prefix():
    generator = random.Random(1)
    for _ in range(60):
        shares = normalised([generator.random() ** 3 + 1e-3 for _ in range(generator.randint(2, 9))])
        drawn = Drawn([7] * len(shares), Shares(shares), 1).sources(500)
        assert deviation(drawn, [shares] * 500) < 1
    assert Drawn([3, 3], Shares([0.5, 0.5]), 1).sources(6) in ([0, 1] * 3, [1, 0] * 3)


def test_shares_that_change_stay_near_their_sum_and_wait_for_their_period():
    generator = random.Random(2)
    shares = Shares([0.25, 0.75], samples=10, periods=8)
    given = [[0.25, 0.75]] * 2 + [normalised([generator.random(), generator.random()]) for _ in range(6)]
    order = Drawn([4, 4], shares, 1)
    assert order.sources(20).count(0) == 5
    with pytest.raises(RuntimeError, match="period 2"):
        order.sources(21)
    for period, values in enumerate(given[2:], 2):
        shares.set(period, values)
    assert deviation(order.sources(80), [values for values in given for _ in range(10)]) < 1.5
    again = Drawn([4, 4], shares, 1)
    assert [again[number] for number in (79, 3, 40)] == [order[number] for number in (79, 3, 40)]


def test_each_source_is_read_in_its_own_passes():
    order = Drawn([5, 3], Shares([0.6, 0.4]), 7)
    read = [order[number] for number in range(100)]
    for source, count, start in ((0, 5, 0), (1, 3, 5)):
        own = [number - start for number in read if start <= number < start + count]
        passes = Passes(count, 7)
        assert own == [passes[number] for number in range(len(own))] and len(own) == (60 if source == 0 else 40)


def test_validation_takes_the_sources_in_turn_once():
    turns = Turns([2, 4], 5)
    assert [turns[number] for number in range(7)] == [0, 2, 1, 3, 4, None, None]
    assert turns.taken == [2, 3] and len(turns) == 5


def test_shares_follow_the_excess_of_losses():
    shares, losses, reference = [0.3, 0.5, 0.2], [2.9, 1.1, 3.4], [2.1, 1.4, 3.3]
    weights = [0.3 * math.exp(0.8), 0.5, 0.2 * math.exp(0.1)]
    assert followed(shares, losses, reference) == pytest.approx([weight / sum(weights) for weight in weights])
    assert followed(shares, reference, losses)[0] < 0.3 and sum(followed(shares, losses, reference)) == pytest.approx(1)
    assert followed([0.5, 0.5], [2000.0, 1.0], [1.0, 1.0]) == pytest.approx([1.0, 0.0])


def rows(count: int, first: int) -> Rows:
    return Rows([Piece([first, number], [True, True]) for number in range(count)], 4, "training")


def test_a_blend_numbers_the_samples_of_its_sources():
    blend = Blend({"wiki": rows(3, 100), "code": rows(2, 200)})
    assert [list(blend[number][0].ids) for number in (2, 3)] == [[100, 2], [200, 0]]
    assert [blend.source(number) for number in range(5)] == [0, 0, 0, 1, 1] and len(blend) == 5
    assert blend.place(4) == "code: row 2 of the training split, as they were read"
    mixture = Mixture(blend, blend, [0.25, 0.75], batch=4, steps=10, interval=5, limit=1, seed=1)
    assert mixture.weights() == [0.125, 0.375]
    assert {name: told["samples"] for name, told in mixture.told(10).items()} == {"wiki": 10, "code": 30}


TWO = {"wiki": 0.5, "code": 1}


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (FinetuneConfig, {"blend": {"wiki": 0, "code": 1}}, "weight of wiki is 0"),
        (FinetuneConfig, {"blend": {"wiki": -1, "code": 1}}, "weight of wiki is -1"),
        (FinetuneConfig, {"blend": {"wiki": "much"}}, "weight of wiki is 'much'"),
        (FinetuneConfig, {"blend": {"wiki": True}}, "weight of wiki is True"),
        (FinetuneConfig, {"blend": {"wiki": math.nan}}, "weight of wiki is nan"),
        (FinetuneConfig, {"blend": {}}, "must be sources with weights"),
        (FinetuneConfig, {"blend": "wiki"}, "must be sources with weights"),
        (FinetuneConfig, {"blend": TWO, "instructions": "chat"}, "blend and instructions: give one"),
        (FinetuneConfig, {"blend": TWO, "windows": "shuffled"}, "fixed windows"),
        (FinetuneConfig, {"blend": TWO, "data_prefix": {"train": "a"}}, "must be the folder"),
        (FinetuneConfig, {"blend": TWO, "dynamic": True}, "needs a loss to reach"),
        (FinetuneConfig, {"blend": TWO, "reference": {"wiki": 1, "code": 2}}, "reference goes with dynamic"),
        (FinetuneConfig, {"data_prefix": "data", "dynamic": True}, "dynamic goes with blend"),
        (DistillConfig, {"blend": {"wiki": 1}, "dynamic": True}, "only one source"),
        (DistillConfig, {"blend": TWO, "dynamic": True, "reference": {"wiki": 1}}, "a loss for each source"),
        (DistillConfig, {"blend": TWO, "dynamic": True, "reference": {"wiki": 1, "code": "x"}}, "a loss for each"),
    ],
)
def test_settings_that_make_no_blend_are_refused(kind, data, message):
    config = kind()
    config.model.data = ModelDataConfig(**data)
    with pytest.raises(ConfigError, match=message):
        validated(config)


def test_dynamic_shares_need_more_than_two_intervals():
    config = DistillConfig()
    config.model.data = ModelDataConfig(blend=TWO, dynamic=True)
    config.trainer.max_steps = 2 * config.trainer.val_check_interval
    with pytest.raises(ConfigError, match="count after 2 x val_check_interval = 20 steps, and max_steps = 20"):
        validated(config)


def text(path, name, count) -> str:
    path.mkdir()
    for split in ("train", "validation", "test"):
        documents = [f"{split} {name} number {number} of {count}, {number * number}." for number in range(count)]
        (path / f"{split}.txt").write_text("\n\n".join(documents))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data/wiki, data/code and data/novalid of text, data/chat of rows, data/empty, and data/tokenizer."""
    from nemo_minitron.data.command import prepare

    texts = tmp_path_factory.mktemp("texts")
    root = tmp_path_factory.mktemp("blend") / "data"
    sources = {"wiki": text(texts / "a", "article", 80), "code": text(texts / "b", "function", 120)}
    manifest = prepare(validated(DataConfig(output=str(root), sources=sources, vocab_size=300)))
    assert manifest.metrics["sources"]["code"]["train"]["documents"] == 120
    assert {"wiki-file0", "code-file2"} < set(manifest.inputs)
    (root / "novalid").mkdir()
    for name in ("train.bin", "train.idx"):
        (root / "novalid" / name).write_bytes((root / "wiki" / name).read_bytes())
    (root / "chat").mkdir()
    lines = [json.dumps({"input": f"{number}?", "output": f"It is {number}."}) for number in range(20)]
    (root / "chat" / "train.jsonl").write_text("\n".join(lines))
    (root / "empty").mkdir()
    return root


def test_each_of_several_sources_is_a_folder_of_its_own(folder, tmp_path):
    """With the common tokenizer each is, byte for byte, what its source alone becomes."""
    from nemo_minitron.data.command import prepare

    source = Manifest.read(folder).config["sources"]["code"]
    prepare(DataConfig(output=str(tmp_path / "alone"), source=source, tokenizer=str(folder / "tokenizer")))
    names = [f"{split}.{kind}" for split in ("train", "validation", "test") for kind in ("bin", "idx")]
    for name in (*names, "tokenizer/tokenizer.json"):
        assert (folder / "code" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert resolve_prefixes(str(folder / "wiki")).keys() == {"train", "validation", "test"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": {}}, "must be names with paths"),
        ({"sources": "wiki"}, "must be names with paths"),
        ({"sources": {"tokenizer": "a"}}, "'tokenizer' cannot be the name"),
        ({"sources": {"a/b": "a"}}, "'a/b' cannot be the name"),
        ({"sources": {"wiki": 1}}, "wiki is 1, and must be a path"),
        ({"sources": {"wiki": "a"}, "source": "b"}, "source and sources: give one"),
    ],
)
def test_sources_that_are_none_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        validated(DataConfig(output="data", **fields))


def test_calibration_draws_exact_shares_of_text_and_rows(folder):
    sources = opened(folder, {"wiki": 0.5, "code": 0.3, "chat": 0.2}, splits=["train"], whole_rows=True)
    tokens, named = drawn_windows(sources, 20, 16, 1)
    assert tokens.shape == (20, 17)
    assert {name: named["sources"].count(name) for name in ("wiki", "code", "chat")} == {
        "wiki": 10,
        "code": 6,
        "chat": 4,
    }
    streams = {source.name: numpy.concatenate(source.streams()) for source in sources}
    for row, name, start in zip(tokens, named["sources"], named["starts"], strict=True):
        assert row.tolist() == streams[name][start : start + 17].tolist()
    assert sum(len(row.ids) for row in sources[2].rows.train) == len(streams["chat"])
    assert torch.equal(drawn_windows(sources, 20, 16, 1)[0], tokens)
    with pytest.raises(DataError, match="wiki: [0-9]+ different windows, and its share are 2500"):
        drawn_windows(sources, 5000, 16, 1)


def opened(folder, blend, vocab_size=300, **options):
    data = ModelDataConfig(data_prefix=str(folder), blend=blend)
    tokenizer = str(folder / "tokenizer")
    return open_sources(data, InstructConfig(), tokenizer, seq_length=32, vocab_size=vocab_size, seed=1, **options)


def test_text_and_rows_stand_in_one_blend(folder):
    wiki, chat = opened(folder, {"wiki": 3, "chat": 1})
    assert (wiki.share, chat.share) == (0.75, 0.25) and wiki.rows is None and chat.rows is not None
    assert {"wiki-train0", "wiki-validation0"} == set(wiki.files()) and "chat-instructions-train0" in chat.files()
    assert len(chat.set("train", 32)) == 19 and chat.set("train", 32).length == 32
    alone = opened(folder, {str(folder / "wiki"): 1})
    assert alone[0].name == "wiki" and alone[0].prefixes == wiki.prefixes


@pytest.mark.parametrize(
    ("blend", "message"),
    [
        ({"wiki": 1, "news": 1}, "names news, but .*news is not there: .* it holds chat, code, empty"),
        ({"novalid": 1}, "model.data.blend, novalid: .* has no validation split"),
        ({"empty": 1}, "model.data.blend, empty: .* has no training data"),
        ({"wiki": 1, "./wiki/": 1}, "two sources that are called wiki"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(folder, blend, message):
    with pytest.raises(DataError, match=message):
        opened(folder, blend)
    with pytest.raises(DataError, match="model.data.blend, wiki: .* 100 rows"):
        opened(folder, {"wiki": 1}, vocab_size=100)
