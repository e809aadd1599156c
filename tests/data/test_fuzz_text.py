"""Hundreds of damaged files of text, seeded: each is refused in words or read whole; none crashes or hangs."""

import contextlib
import gzip
import json
import random
import struct
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from nemo_minitron.config import InstructConfig
from nemo_minitron.data.instructions import read_instructions
from nemo_minitron.data.module import read_header
from nemo_minitron.data.sources import read_documents
from nemo_minitron.errors import DataError
from time_limit import no_longer_than

CASES = 60
SECONDS = 20
TEXTS = [f"Nr. {number} ü ist {number * number} groß .  »{'ab' * (number % 7)}« {number}" for number in range(30)]
#: What damage puts into text on purpose.
INSERTED = (
    b"\xef\xbb\xbf", b"\0", b"\\ud83d", b"\xed\xa0\xbd", b"\xff\xfe", b"1" * 5000, b"[" * 100_000, b'{"a":' * 100_000,
    b"NaN", b"1e999", b"\r", b"\n", b"\n\n", b'"', b"null", b"{}", b"version https://git-lfs.github.com/spec/v1\n",
)  # fmt: skip


def json_lines(rows: list) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def lmflow(rows: list) -> bytes:
    return json.dumps({"type": "text_only", "instances": rows}, ensure_ascii=False, indent=1).encode()


def table(rows: list, **settings) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    written = pyarrow.table({name: [row[name] for row in rows] for name in rows[0]})
    parquet.write_table(written, buffer, row_group_size=9, write_page_checksum=True, **settings)
    return buffer.getvalue().to_pybytes()


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


ROWS = [{"text": text} for text in TEXTS]
PAIRS = [{"input": text, "output": text[::-1]} for text in TEXTS]
CORPORA = {
    "a.txt": "\n\n".join(TEXTS).encode(),
    "a.jsonl": json_lines(ROWS),
    "a.json": json.dumps(ROWS, ensure_ascii=False, indent=1).encode(),
    "lmflow.json": lmflow(ROWS),
    "lines.json": json_lines(ROWS),
    "a.parquet": table(ROWS),
    "plain.parquet": table(ROWS, use_dictionary=False, compression="none"),
    "a.txt.gz": gzip.compress("\n\n".join(TEXTS).encode(), mtime=0),
    "a.jsonl.gz": gzip.compress(json_lines(ROWS), mtime=0),
    "a.jsonl.zst": zstd(json_lines(ROWS)),
}
INSTRUCTIONS = {
    "a.jsonl": json_lines(PAIRS),
    "a.json": json.dumps(PAIRS, ensure_ascii=False).encode(),
    "lmflow.json": lmflow(ROWS),
    "a.parquet": table(PAIRS),
    "a.json.gz": gzip.compress(json.dumps(PAIRS).encode(), mtime=0),
}


def damage(data: bytes, chance: random.Random, *, text: bool) -> bytes:
    """One seeded change."""
    changed, size = bytearray(data), len(data)
    where = chance.randrange(size)
    what = chance.choice(["bit", "byte", "cut", "remove", "insert", "swap"] + ["put"] * (6 if text else 0))
    if what == "bit":
        changed[where] ^= 1 << chance.randrange(8)
    elif what == "byte":
        changed[where] = chance.randrange(256)
    elif what == "cut":
        del changed[where:]
    elif what == "remove":
        del changed[where : where + chance.choice([1, 4, 100])]
    elif what == "insert":
        changed[where:where] = chance.randbytes(chance.choice([1, 4, 100]))
    elif what == "swap":
        other = chance.randrange(size)
        changed[where], changed[other] = changed[other], changed[where]
    else:
        starts = [0, *(place + 1 for place in range(size) if data[place : place + 1] == b"\n")]
        where = chance.choice([where, chance.choice(starts)])
        changed[where:where] = chance.choice(INSERTED)
    return bytes(changed)


def documents(path: Path) -> list[str]:
    return list(read_documents(path))


def conversations(path: Path) -> list[str]:
    found = read_instructions(str(path), InstructConfig(), 1)
    return [turn.text for row in found.train + found.validation for turn in row]


@pytest.mark.parametrize(
    ("name", "data", "read"),
    [(name, data, documents) for name, data in CORPORA.items()]
    + [(name, data, conversations) for name, data in INSTRUCTIONS.items()],
    ids=[f"corpus-{name}" for name in CORPORA] + [f"instructions-{name}" for name in INSTRUCTIONS],
)
def test_damaged_files_are_refused_or_read_whole(tmp_path, name, data, read):
    """What is read holds every text whose bytes are there still; all texts, where the bytes are under a checksum."""
    chance, path = random.Random(f"3 {name} {read.__name__}"), tmp_path / name
    path.write_bytes(data)
    texts = read(path)
    assert set(TEXTS) <= set(texts)
    plain = path.suffix in (".txt", ".jsonl", ".json")
    outcomes: Counter[str] = Counter()
    for case in range(CASES):
        changed = damage(data, chance, text=plain)
        path.write_bytes(changed)
        try:
            with no_longer_than(SECONDS):
                found = read(path)
        except DataError as error:
            assert name in str(error) and len(str(error)) < 2000, str(error)[:3000]
            outcomes["refused"] += 1
            continue
        except BaseException as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {error!s:.300}") from error
        kept = [text for text in TEXTS if not plain or text.encode() in changed]
        whole = "\n".join(found)
        missing = [text for text in kept if text not in whole]
        assert path.suffix == ".zst" or not missing, f"case {case}: {missing} of {changed[:200]}"
        outcomes["read"] += 1
    assert outcomes["refused"] > CASES // 10, outcomes


POINTERS_END = 70


def index() -> bytes:
    """What Megatron writes for three documents of two, one and three tokens."""
    lengths, pointers, firsts = (2, 1, 3), (0, 4, 6), (0, 1, 2, 3)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    return head + struct.pack("<3i3q4q", *lengths, *pointers, *firsts)


def test_damaged_indices_of_tokens_are_refused(tmp_path):
    """All but what another code of as many bytes a token says, and other ends of documents."""
    chance, path = random.Random("3 index"), tmp_path / "a.idx"
    path.write_bytes(index())
    (tmp_path / "a.bin").write_bytes(bytes(12))
    good = read_header(str(tmp_path / "a"))
    assert (good.tokens, good.sequences, good.documents) == (6, 3, 4)
    for _ in range(4 * CASES):
        changed = damage(index(), chance, text=False)
        path.write_bytes(changed)
        with contextlib.suppress(DataError):
            found = read_header(str(tmp_path / "a"))
            assert found._replace(code=8) == good
            assert changed[:17] + changed[18:POINTERS_END] == index()[:17] + index()[18:POINTERS_END]
