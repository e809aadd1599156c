"""Hundreds of damaged checkpoints, seeded: each is refused in words or read rightly; none crashes, hangs or runs."""

import contextlib
import dataclasses
import random
import resource
import shutil
import signal
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_hostile import make, weights

from nemo_minitron.checkpoints import Checkpoint, open_checkpoint
from nemo_minitron.errors import MinitronError

CASES = 300
SECONDS = 20
MEMORY = 512 << 20
KINDS = ("nemo1", "zarr", "ckpt", "nemo2", "hf", "archive", "gzip")
#: Where every byte of a tensor is under a checksum, or the file is too short: values are right or refused.
CHECKED = ("nemo1", "ckpt", "nemo2", "gzip")
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


@contextlib.contextmanager
def no_longer_than(seconds: float):
    def late(*_):
        raise TimeoutError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
    chance = random.Random(f"20 {kind}")
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
