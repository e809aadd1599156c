"""Instructions: every format gives the same conversations, masks mark answers, bad rows are named."""

import json

import pytest
import torch

from nemo_minitron.config import InstructConfig
from nemo_minitron.data.instruction_samples import Segment, check_vocabulary, make_samples, padded_length, segments
from nemo_minitron.data.instructions import Turn, read_instructions
from nemo_minitron.errors import DataError

PAIRS = [(f"What is {n} and {n}?", f"It is {2 * n}.") for n in range(12)]
WANTED = [[Turn("user", asked), Turn("assistant", answer)] for asked, answer in PAIRS]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def lmflow(kind: str, instances: list) -> str:
    return json.dumps({"type": kind, "instances": instances})


def lines(rows: list) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


def messages(asked: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


FILES = {
    "lmflow-text2text": ("a.json", lmflow("text2text", [{"input": a, "output": b} for a, b in PAIRS])),
    "lmflow-conversation": ("a.json", lmflow("conversation", [messages(a, b) for a, b in PAIRS])),
    "nemo": ("training.jsonl", lines([{"input": a, "output": b} for a, b in PAIRS])),
    "messages": ("a.jsonl", lines([messages(a, b) for a, b in PAIRS])),
    "alpaca-json": ("a.json", json.dumps([{"instruction": a, "input": "", "output": b} for a, b in PAIRS])),
    "alpaca-jsonl": ("a.jsonl", lines([{"instruction": a, "output": b} for a, b in PAIRS])),
}


def put(folder, **files: str):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE; like Llama's it puts a beginning-of-sequence token before a text only where it is asked to."""
    from nemo_minitron.data.tokenizer import load_tokenizer, train_bpe

    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([f"{a}\n{b}" for a, b in PAIRS], 300, folder)
    return load_tokenizer(str(folder))


def samples(rows, tokenizer, length=64, path=None, **settings):
    config = InstructConfig(**settings)
    return make_samples(read_instructions(rows, config, 1), config, tokenizer, length)


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_conversations(tmp_path, name):
    file, content = FILES[name]
    (tmp_path / file).write_text(content)
    for path in (tmp_path, tmp_path / file):
        found = read_instructions(str(path), InstructConfig(validation_share=0.25), 7)
        assert len(found.validation) == 3
        assert sorted(found.train + found.validation) == sorted(WANTED)
        assert found.alpaca == name.startswith("alpaca")
        assert list(found.files.values()) == [str(tmp_path / file)]


def test_the_split_is_the_seeds(tmp_path):
    path = put(tmp_path / "d", **{"all.jsonl": FILES["nemo"][1]})
    one, again, other = (read_instructions(path, InstructConfig(validation_share=0.25), seed) for seed in (1, 1, 2))
    assert one == again and one.validation != other.validation


def test_named_splits_are_kept_apart_and_the_test_split_is_not_read(tmp_path):
    half = lines([{"input": a, "output": b} for a, b in PAIRS[:6]])
    rest = lines([{"input": a, "output": b} for a, b in PAIRS[6:]])
    nemo = put(tmp_path / "nemo", training__jsonl=half, validation__jsonl=rest, test__jsonl="not read\n")
    (tmp_path / "lmflow").mkdir()
    for split, rows in (("train", PAIRS[:6]), ("valid", PAIRS[6:])):
        put(tmp_path / "lmflow" / split, some__json=lmflow("text2text", [{"input": a, "output": b} for a, b in rows]))
    put(tmp_path / "lmflow" / "test", some__json="not read")
    for path in (nemo, str(tmp_path / "lmflow")):
        found = read_instructions(path, InstructConfig(), 1)
        assert (found.train, found.validation) == (WANTED[:6], WANTED[6:])


def test_text_only_counts_whole_and_a_system_message_comes_first(tmp_path, tokenizer):
    path = put(tmp_path / "t", a__json=lmflow("text_only", [{"text": "It is 4."}, {"text": "It is 6."}]))
    found = samples(path, tokenizer)
    for sample in (*found.train, *found.validation):
        assert all(sample.learnt) and sample.ids[-1] == tokenizer.eos_token_id
    row = {"system": "Be brief.", **messages("2 and 2?", "4")}
    path = put(tmp_path / "c", a__json=lmflow("conversation", [row, row]))
    [turns] = read_instructions(path, InstructConfig(), 1).train
    assert turns[0] == Turn("system", "Be brief.")
    assert segments(turns, "plain", "#") == [
        Segment("Be brief.\n", False), Segment("2 and 2?\n", False), Segment("4#", True),
    ]  # fmt: skip


BAD = {
    "b.jsonl": [
        ('{"input": "a", "output": 3}\n', "b.jsonl, row 1: field output is a number, not text"),
        ('{"input": "a", "output": "b"}\n{"input": "a"}\n', "b.jsonl, row 2: field output is missing"),
        ('{"input": "a", "output": "b"}\n\n{oops\n', "b.jsonl, row 3: not JSON"),
        ('{"question": "a"}\n', "b.jsonl, row 1: has the fields question"),
        ('{"instruction": ["a"], "output": "b"}\n', "row 1: field instruction is a list"),
        ('[1, 2]\n"a"\n', "row 1: is not an object"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "no message of the assistant"),
        ('{"messages": [{"role": "bot", "content": "a"}]}\n', "message 1: role is 'bot'"),
        ("\n", "no rows"),
        ('{"input": "a", "output": "b"}\n', "too few"),
    ],
    "b.json": [
        ('{"type": "image", "instances": []}', "b.json: type is 'image'"),
        ('{"type": "text_only", "instances": {}}', "instances is not a list"),
        ('{"type": "text_only", "instances": []}', "no rows"),
        ('{"type": "text2text", "instances": [{"input": "a", "output": "b"}, {"input": "a"}]}', "row 2: field output"),
        ('{"type": "text_only", "instances": [{"text": ""}]}', "row 1: field text is empty"),
        ('{"type": "conversation", "instances": [{"messages": "a"}]}', "row 1: field messages"),
    ],
    "b.txt": [("a", "neither .json nor .jsonl")],
}


@pytest.mark.parametrize(("name", "content", "message"), [(name, *case) for name in BAD for case in BAD[name]])
def test_bad_rows_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        read_instructions(str(tmp_path / name), InstructConfig(), 1)
    assert message in str(caught.value)


def test_many_bad_rows_are_one_message(tmp_path):
    path = put(tmp_path / "many", a__jsonl=lines([{"input": "a"}] * 9))
    with pytest.raises(DataError, match="row 5: field output is missing\n  and 4 more"):
        read_instructions(path, InstructConfig(), 1)
    with pytest.raises(DataError, match="does not exist"):
        read_instructions(str(tmp_path / "nowhere"), InstructConfig(), 1)
    (tmp_path / "bytes.jsonl").write_bytes(b'{"input": "\xff"}')
    with pytest.raises(DataError, match="byte 11 is not UTF-8"):
        read_instructions(str(tmp_path / "bytes.jsonl"), InstructConfig(), 1)
    with pytest.raises(DataError, match="has no training data"):
        read_instructions(put(tmp_path / "only", test__jsonl=FILES["nemo"][1]), InstructConfig(), 1)
    with pytest.raises(DataError, match="not an object with `type`"):
        read_instructions(put(tmp_path / "n", a__jsonl=FILES["nemo"][1]), InstructConfig(format="lmflow"), 1)


def test_the_mask_marks_the_answer_and_its_end(tmp_path, tokenizer):
    path = put(tmp_path / "d", training__jsonl=FILES["nemo"][1], validation__jsonl=FILES["nemo"][1])
    found = samples(path, tokenizer)
    assert found.template == "plain"
    for (asked, answer), sample in zip(PAIRS, found.train, strict=True):
        learnt = [token for token, flag in zip(sample.ids, sample.learnt) if flag]
        rest = [token for token, flag in zip(sample.ids, sample.learnt) if not flag]
        assert tokenizer.decode(learnt) == f"{answer}{tokenizer.eos_token}"
        assert tokenizer.decode(rest) == f"{asked}\n"
        assert sample.ids == rest + learnt
    both = samples(path, tokenizer, answers_only=False)
    assert all(all(sample.learnt) for sample in both.train)
    assert [sample.ids for sample in both.train] == [sample.ids for sample in found.train]


def test_alpacas_template_is_alpacas(tmp_path, tokenizer):
    """The prompts of the Stanford Alpaca project, with and without an input."""
    rows = [{"instruction": "Add.", "input": "2 2", "output": "4"}, {"instruction": "Say hi.", "output": "hi"}]
    path = put(tmp_path / "d", training__jsonl=lines(rows), validation__jsonl=lines(rows))
    found = samples(path, tokenizer, length=400)
    assert found.template == "alpaca"
    assert [tokenizer.decode(sample.ids) for sample in found.train] == [
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2 2\n\n"
        "### Response:\n4<|endoftext|>",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:\nhi<|endoftext|>",
    ]


def test_a_chat_template_is_taken_where_there_is_one(tmp_path, tokenizer):
    talk = {"messages": messages("a?", "b.")["messages"] + messages("c?", "d.")["messages"]}
    path = put(tmp_path / "d", training__jsonl=lines([talk]), validation__jsonl=lines([talk]))
    with pytest.raises(DataError, match="no chat template"):
        samples(path, tokenizer, template="chat")
    tokenizer.chat_template = CHAT
    try:
        found = samples(path, tokenizer, length=200)
        [sample] = found.train
        learnt = [token for token, flag in zip(sample.ids, sample.learnt) if flag]
        assert found.template == "chat"
        assert tokenizer.decode(sample.ids) == "<user>a?</user>\n<assistant>b.</assistant>\n" + (
            "<user>c?</user>\n<assistant>d.</assistant>\n"
        )
        assert tokenizer.decode(learnt) == "b.</assistant>\nd.</assistant>\n"
        tokenizer.chat_template = "{{ messages[-1].content }}"
        with pytest.raises(DataError, match="shows earlier turns otherwise"):
            samples(path, tokenizer)
        tokenizer.chat_template = "{{ raise_exception('no such role') }}"
        with pytest.raises(DataError, match="refuses the conversation that begins with 'a\\?': no such role"):
            samples(path, tokenizer)
    finally:
        tokenizer.chat_template = None


def test_a_tokenizer_that_begins_texts_begins_samples(tmp_path, tokenizer):
    from tokenizers.processors import TemplateProcessing

    path = put(tmp_path / "d", training__jsonl=FILES["nemo"][1], validation__jsonl=FILES["nemo"][1])
    plain = samples(path, tokenizer).train
    before = tokenizer.backend_tokenizer.post_processor
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    try:
        begun = samples(path, tokenizer).train
        cut = samples(path, tokenizer, length=len(begun[0].ids) - 4).train
    finally:
        tokenizer.backend_tokenizer.post_processor = before
    for one, other in zip(plain, begun, strict=True):
        assert other.ids == [tokenizer.bos_token_id, *one.ids] and other.learnt == [False, *one.learnt]
    assert cut[0].ids == [tokenizer.bos_token_id, *begun[0].ids[4:]]


def test_rows_that_are_too_long_lose_the_start_of_their_prompt(tmp_path, tokenizer):
    rows = [{"input": "a " * 40, "output": "b b"}, {"input": "a", "output": "b " * 40}, {"input": "a", "output": "b"}]
    path = put(tmp_path / "d", training__jsonl=lines(rows), validation__jsonl=lines(rows[2:]))
    whole, cut, dropped = (
        samples(path, tokenizer, length=length, too_long=how)
        for length, how in ((200, "truncate"), (16, "truncate"), (16, "drop"))
    )
    assert cut.train == [whole.train[0]._replace(ids=whole.train[0].ids[-17:], learnt=whole.train[0].learnt[-17:]),
                         whole.train[2]]  # fmt: skip
    assert cut.counts["train"] == {"rows": 3, "truncated": 1, "split": 0, "dropped": 1}
    assert dropped.train == [whole.train[2]]
    assert dropped.counts["train"] == {"rows": 3, "truncated": 0, "split": 0, "dropped": 2}
    assert padded_length(whole, 200) == 128 and padded_length(cut, 16) == 16
    with pytest.raises(DataError, match="all 3 rows of the train split are longer than 1 token"):
        samples(path, tokenizer, length=1)
    text = put(tmp_path / "t", a__json=lmflow("text_only", [{"text": "a b " * 30}] * 2))
    pieces = samples(text, tokenizer, length=16)
    labels = [token for piece in pieces.train for token in piece.ids[1:]]
    assert [pieces.train[0].ids[0], *labels] == samples(text, tokenizer, length=500).train[0].ids
    assert all(len(piece.ids) <= 17 for piece in pieces.train) and pieces.counts["train"]["split"] == 1


def test_tokens_beyond_the_embedding_are_refused(tmp_path, tokenizer):
    path = put(tmp_path / "d", training__jsonl=FILES["nemo"][1])
    found = samples(path, tokenizer)
    check_vocabulary(found, 300)
    with pytest.raises(DataError, match="embedding has 50 rows"):
        check_vocabulary(found, 50)


def test_a_pass_gives_every_sample_once_and_padding_weighs_nothing(tmp_path, tokenizer):
    from nemo_minitron.data.sample_module import SampleDataset
    from nemo_minitron.data.sample_sets import Once, Passes, Rows

    path = put(tmp_path / "d", training__jsonl=FILES["nemo"][1], validation__jsonl=FILES["nemo"][1])
    found = samples(path, tokenizer).train
    rows = Rows(found, 32, "training")
    data = SampleDataset(rows, Passes(len(found), seed=5), 3 * len(found), padding=0)
    read = [data[number] for number in range(len(data))]
    seen = [tuple(item["tokens"].tolist()) for item in read]
    passes = [seen[start : start + len(found)] for start in range(0, len(seen), len(found))]
    assert len(set(passes[0])) == len(found) and all(sorted(one) == sorted(passes[0]) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert [tuple(data[number]["tokens"].tolist()) for number in reversed(range(len(data)))] == seen[::-1]
    for item in read:
        assert item["tokens"].shape == item["labels"].shape == (32,)
        assert torch.equal(item["tokens"][1:], item["labels"][:-1])
        answer = item["labels"][item["loss_mask"].bool()]
        assert tokenizer.decode(answer).startswith("It is ") and answer[-1] == tokenizer.eos_token_id
    once = SampleDataset(rows, Once(len(found)), 16, padding=0)
    assert [float(once[number]["loss_mask"].sum()) > 0 for number in range(16)] == [True] * 12 + [False] * 4


def test_rows_are_packed_whole_and_each_once(tmp_path, tokenizer):
    from nemo_minitron.data.sample_module import SampleDataset
    from nemo_minitron.data.sample_sets import Once, Packed, Rows

    told = [(f"What is {n}?", " ".join(["It is so."] * (1 + n % 7))) for n in range(40)]
    data = lines([{"input": asked, "output": answer} for asked, answer in told])
    found = samples(put(tmp_path / "d", training__jsonl=data, validation__jsonl=data), tokenizer, length=96)
    rows, packed = Rows(found.train, 96, "training"), found.packed(96)["train"]
    assert sorted(number for sequence in packed.sequences for number in sequence) == list(range(40))
    assert packed.sequences == sorted(packed.sequences) and packed[0][0] is found.train[0]
    numbers = [number + 1 for number in packed.sequences[1]]
    assert packed.place(1) == f"rows {', '.join(map(str, numbers))} of the training split, as they were read"
    assert Packed(Rows(found.train[::-1], 96, "training")).__len__() == len(packed)
    read = SampleDataset(packed, Once(len(packed)), len(packed) + 1, padding=7, packed=True)
    alone = SampleDataset(rows, Once(40), 40, padding=7)
    for number, sequence in enumerate(packed.sequences):
        item = read[number]
        ends = item["cu_seqlens"].tolist()
        assert ends[0] == 0 and ends[-1] == 96 and int(item["max_seqlen"]) == max(torch.tensor(ends).diff())
        for row, (start, stop) in zip(sequence, zip(ends, ends[1:]), strict=False):
            own, count = alone[row], stop - start
            for field in ("tokens", "labels", "loss_mask", "position_ids"):
                assert torch.equal(item[field][start:stop], own[field][:count])
            assert count == len(found.train[row].ids) - 1
        filled = sum(len(found.train[row].ids) - 1 for row in sequence)
        assert not item["loss_mask"][filled:].any() and (item["labels"][filled:] == 7).all()
    empty = read[len(packed)]
    assert not empty["loss_mask"].any() and empty["cu_seqlens"].tolist() == [0, 96]


def test_the_best_fit_leaves_no_more_bins_than_its_bound_and_says_its_padding(tmp_path, tokenizer):
    """At most 11/9 of the fewest bins and 6/9 more (Johnson 1973, Dosa 2007), of which the sum of sizes is a bound."""
    import random

    from nemo_minitron.data.instruction_samples import packing_counts, packing_note
    from nemo_minitron.data.sample_sets import best_fit

    assert best_fit([5, 4, 3, 3, 1], 8) == [[0, 2], [1, 3, 4]]
    assert best_fit([8, 1, 8], 8) == [[0], [1], [2]] and best_fit([2, 6, 3, 5], 8) == [[0, 1], [2, 3]]
    for seed in range(20):
        sizes = [random.Random(seed * 1000 + n).randint(1, 64) for n in range(300)]
        bins = best_fit(sizes, 64)
        assert sorted(item for items in bins for item in items) == list(range(300))
        assert all(sum(sizes[item] for item in items) <= 64 for items in bins)
        assert len(bins) <= 11 / 9 * -(-sum(sizes) // 64) + 6 / 9
    found = samples(
        put(tmp_path / "d", training__jsonl=FILES["nemo"][1], validation__jsonl=FILES["nemo"][1]), tokenizer
    )
    counts = packing_counts(found, found.packed(64))
    labels = sum(len(one.ids) - 1 for one in found.train)
    assert counts["padding"] == pytest.approx(1 - labels / (counts["sequences"] * 64))
    assert counts["padding_unpacked"] == pytest.approx(1 - labels / (12 * 64))
    note = packing_note(412, 512, counts | {"sequences": 57, "padding": 0.034, "padding_unpacked": 0.61})
    assert note == "packed: 412 rows in 57 sequences of 512: 3% padding, 61% unpacked"


def test_files_are_read_compressed_in_any_case_and_as_parquet_and_others_are_named(tmp_path):
    import gzip

    import pyarrow
    from pyarrow import parquet

    rows = [{"input": asked, "output": answer} for asked, answer in PAIRS]
    folder = tmp_path / "d"
    (folder / "more").mkdir(parents=True)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines(rows[:3]).encode()))
    (folder / "b.JSON").write_text(json.dumps(rows[3:5], indent=1))
    (folder / "b.json.gz").write_bytes(gzip.compress(json.dumps(rows[5:6]).encode()))
    (folder / "c.json.zst").write_bytes(pyarrow.compress(lines(rows[6:8]).encode(), codec="zstd", asbytes=True))
    parquet.write_table(pyarrow.Table.from_pylist(rows[8:10]), folder / "more" / "train-00000-of-00001.parquet")
    (folder / "valid-1.jsonl").write_text(lines(rows[10:]))
    (folder / "valid-1.jsonl.gz").write_bytes(gzip.compress(lines(rows[10:]).encode()))
    (folder / "test-00000-of-00001.jsonl").write_text("not read\n")
    (folder / "README.md").write_text("about")
    (folder / "notes.csv").write_text("input,output\n")
    found = read_instructions(str(folder), InstructConfig(), 1)
    assert (sorted(found.train), found.validation) == (sorted(WANTED[:10]), WANTED[10:])
    assert len(found.files) == 6 and len(found.notes) == 3
    for place, note in enumerate(
        ("left out, .csv: 1 (notes.csv)", "valid-1.jsonl.gz is left out: it holds", "is not read")
    ):
        assert note in found.notes[place]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"input": "a", "output": "b \\udc00"}\n', r"a.jsonl, row 1: field output holds \udc00 (its char"),
        ("a.json", b'[{"input": "a",\n "output" 3}]', "a.json, row 1: not JSON (Expecting ':' delimiter: line 2, colu"),
        ("a.json", b"[" * 100_000, "a.json, row 1: not JSON that can be read (nested too deeply)"),
        ("a.jsonl", b'\n{"input": "a"\n', "a.jsonl, row 2: not JSON"),
        ("a.jsonl", b'{"input": "a", "output": "b"}\n{"input": "a\xff"}\n', "a.jsonl:2: byte 42 is not UTF-8"),
        ("a.jsonl.gz", b"{}", "a.jsonl.gz is not a whole gzip file"),
        ("a.parquet", b"PAR1", "a.parquet is not a parquet file that can be read"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_instructions(str(tmp_path / name), InstructConfig(), 1)
    assert message in str(caught.value)
