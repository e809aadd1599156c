"""Hundreds of damaged checkpoints, seeded: each is refused in words or read rightly; none crashes, hangs or runs."""

import dataclasses
import json
import random
import resource
import shutil
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_hostile import make, weights

from models import save
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.cli.main import main
from nemo_minitron.data.tokenizer import train_bpe
from nemo_minitron.errors import MinitronError
from time_limit import no_longer_than

CASES = 300
#: Of directories whose descriptions are damaged, each run by transformers.
RUNS = 120
TEXT = "to be or not to be, that is the question"
#: What nobody expects in place of a value.
JUNK = (None, True, False, -1, 0, 1, 7, 2**31 - 1, 2**31, 2**63, -(2**70), 0.0, -0.5, 1e308, float("nan"), float("inf"),
        "", "x", "0", "\ud800", "a" * 300, [], [None], [[]], [0, 1], {}, {"": None}, {"content": 3})  # fmt: skip
SECONDS = 20
MEMORY = 512 << 20
KINDS = ("nemo1", "zarr", "ckpt", "nemo2", "bridge", "megatron-lm", "hf", "archive", "gzip", "gguf")
#: Where every byte of a tensor is under a checksum, or the file is too short: values are right or refused.
CHECKED = ("nemo1", "ckpt", "nemo2", "bridge", "megatron-lm", "gzip")
#: Fields of an architecture that a damaged number or word changes into another model of the same tensors.
SHAPES = ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_size", "gated_linear_unit", "normalization")


def prepared(kind: str, folder: Path) -> Path:
    if kind not in ("archive", "gzip"):
        return make(folder / kind, kind)
    inside = make(folder / f"{kind}-files", "zarr" if kind == "archive" else "nemo1")
    with tarfile.open(folder / f"{kind}.nemo", "w:gz" if kind == "gzip" else "w") as opened:
        opened.add(inside, ".")
    return folder / f"{kind}.nemo"


def damage(data: bytearray, chance: random.Random) -> bytearray:
    """One seeded change, at the start and the end of a file more often than in its middle."""
    size = len(data)
    where = min(size - 1, int(size * chance.choice([chance.random(), chance.random() ** 4, 1 - chance.random() ** 4])))
    what = chance.choice(["bit", "bit", "byte", "word", "cut", "insert", "remove", "swap"])
    if what == "bit":
        data[where] ^= 1 << chance.randrange(8)
    elif what == "byte":
        data[where] = chance.randrange(256)
    elif what == "word":
        data[where : where + 4] = chance.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"])[: size - where]
    elif what == "cut":
        del data[where:]
    elif what == "insert":
        data[where:where] = chance.randbytes(chance.choice([1, 4, 512]))
    elif what == "remove":
        del data[where : where + chance.choice([1, 4, 512])]
    else:
        other = chance.randrange(size)
        data[where], data[other] = data[other], data[where]
    return data


def pick(path: Path, chance: random.Random) -> Path:
    """A file of the checkpoint; descriptions as often as weights."""
    if path.is_file():
        return path
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    small = [file for file in files if file.suffix in (".json", ".yaml") or file.name.startswith(".")]
    return chance.choice(chance.choice([files, small]))


def judge(found: Checkpoint, values: dict[str, torch.Tensor], original: Checkpoint, checked: bool) -> None:
    """What a damaged checkpoint that is accepted must still be."""
    for name in SHAPES:
        assert getattr(found.architecture, name) == getattr(original.architecture, name), name
    expected = weights()
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert value.shape == expected[name].shape
        if checked and found.architecture == dataclasses.replace(original.architecture, **neutral(found)):
            assert value.dtype == expected[name].dtype
            assert torch.equal(value, expected[name]), f"{name} was read wrongly without a word"


def neutral(found: Checkpoint) -> dict:
    """Fields that damage may change without a trace: they are plain numbers and words in a text."""
    names = ("family", "seq_length", "layernorm_epsilon", "rotary_base", "rotary_percent", "rope_scaling",
             "init_method_std", "vocab_padding", "sliding_window", "activation")  # fmt: skip
    return {name: getattr(found.architecture, name) for name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoints_are_refused_or_read_rightly(kind, tmp_path):
    chance = random.Random(f"4 {kind}")
    good = prepared(kind, tmp_path)
    original = open_checkpoint(good)
    outcomes: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(CASES):
        victim = pick(good, chance)
        whole = victim.read_bytes()
        victim.write_bytes(damage(bytearray(whole), chance))
        try:
            with no_longer_than(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = open_checkpoint(good)
                values = {name: tensor.read() for name, tensor in found.tensors.items()}
            judge(found, values, original, kind in CHECKED)
            outcomes["read"] += 1
        except MinitronError as error:
            assert str(error).strip() and len(str(error)) < 4000
            outcomes["refused"] += 1
        except BaseException as error:
            kept = shutil.copy(victim, tmp_path / f"case-{case}")
            raise AssertionError(f"case {case}, {victim.name} ({kept}): {type(error).__name__}: {error}") from error
        finally:
            victim.write_bytes(whole)
    assert outcomes["refused"] > CASES // 10, outcomes
    assert open_checkpoint(good).architecture == original.architecture
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def places(value, path=()) -> list[tuple]:
    """The path of every value in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, child in items for found in ((*path, key), *places(child, (*path, key)))]


def other_words(data: bytes, chance: random.Random) -> bytes:
    """A JSON document with one value, near its root more often than not, gone or replaced."""
    document = json.loads(data)
    found = places(document)
    depth = chance.choice(sorted({len(path) for path in found}))
    path = chance.choice([path for path in found if len(path) == depth])
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    if chance.random() < 0.2:
        del holder[path[-1]]
    else:
        holder[path[-1]] = chance.choice(JUNK)
    return json.dumps(document).encode()


@pytest.fixture(scope="module")
def described(request, tmp_path_factory) -> Path:
    """A small model with a tokenizer, and the words that transformers 5 has for some of it."""
    folder = save(request.param, torch.float32, tmp_path_factory.mktemp("described") / "model")
    train_bpe([TEXT] * 10, 259, folder)
    config = json.loads((folder / "config.json").read_text())
    if "rope_parameters" not in config:  # written by transformers 4
        config["rope_parameters"] = {**(config["rope_scaling"] or {}), "rope_theta": config["rope_theta"]}
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    settings = {"bos_token_id": 0, "eos_token_id": [0, 1], "temperature": 0.7, "top_p": 0.9, "top_k": 5,
                "repetition_penalty": 1.1, "max_length": 32}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(settings))
    added = json.loads((folder / "tokenizer_config.json").read_text())
    added |= {"extra_special_tokens": ["<|endoftext|>"], "tokenizer_class": "TokenizersBackend"}
    (folder / "tokenizer_config.json").write_text(json.dumps(added))
    return folder


DESCRIPTIONS = {
    "config": ("config.json",),
    "generation": ("generation_config.json",),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
}


def present(folder: Path, kind: str) -> list[str]:
    """The files of that kind; transformers 5 writes no special_tokens_map.json."""
    return [name for name in DESCRIPTIONS[kind] if (folder / name).is_file()]


@pytest.mark.parametrize(
    ("described", "kind"), [*(("llama31", kind) for kind in DESCRIPTIONS), ("qwen3", "config")], indirect=["described"]
)
def test_damaged_descriptions_are_refused_or_lose_nothing(kind, described, tmp_path, monkeypatch, capsys):
    """Through `generate`: one message, or the same model. What a tokenizer's files say leaves as it came, and means to
    this package what it means to transformers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chance = random.Random(f"4 {kind}")
    original = open_checkpoint(described)
    outcomes: Counter[str] = Counter()
    for case in range(RUNS):
        victim = described / chance.choice(present(described, kind))
        whole = victim.read_bytes()
        damaged = other_words(whole, chance) if chance.random() < 0.7 else bytes(damage(bytearray(whole), chance))
        victim.write_bytes(damaged)
        try:
            with no_longer_than(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = main(["generate", str(described), TEXT, "max_new_tokens=2", "--json"])
                said = capsys.readouterr()
                assert code in (0, 1, 2), said.err
                assert code == 0 or (said.err.strip() and len(said.err) < 4000 and not said.out)
                outcomes["read" if code == 0 else "refused"] += 1
                if code == 0:
                    found = open_checkpoint(described)
                    judge_shape(found, original)
                    if kind == "tokenizer":
                        judge_tokenizer(found, described, victim.name, damaged, json.loads(said.out))
                    elif kind == "generation":
                        kept = json.loads(damaged)
                        assert all(found.generation[name] == kept[name] or kept[name] != kept[name] for name in kept)
        except BaseException as error:
            kept = shutil.copy(victim, tmp_path / f"case-{case}")
            raise AssertionError(f"case {case}, {victim.name} ({kept}): {type(error).__name__}: {error}") from error
        finally:
            victim.write_bytes(whole)
    assert outcomes["refused"] > RUNS // 10 and outcomes["read"] > RUNS // 10, outcomes


def judge_shape(found: Checkpoint, original: Checkpoint) -> None:
    assert found.tensors.keys() == original.tensors.keys()
    for name in SHAPES:
        assert getattr(found.architecture, name) == getattr(original.architecture, name), name


def judge_tokenizer(found: Checkpoint, folder: Path, name: str, damaged: bytes, said: dict) -> None:
    """What is used is what lies there: the same bytes, and the tokens that transformers makes of them."""
    from transformers import AutoTokenizer

    contents = found.tokenizer_files.contents()
    if name != "tokenizer_config.json":
        assert contents[name] == damaged
    theirs = AutoTokenizer.from_pretrained(found.tokenizer)
    assert said["prompt_tokens"] == len(theirs(TEXT).input_ids)
