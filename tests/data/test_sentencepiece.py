"""A tokenizer that is a SentencePiece model (Llama 2, Mistral 0.1): its own ids, whatever reads it."""

import json
from pathlib import Path

import numpy
import pytest
import sentencepiece
import torch

import models
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.cli.main import main
from nemo_minitron.data.samples import token_stream
from nemo_minitron.data.synthetic.corpus import documents
from nemo_minitron.data.tokenizer import load_tokenizer

MODEL = "tokenizer.model"
PROMPT = "The old lighthouse  keeper's naïve 猫 is"
TOKENS = 480


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A small Llama 2 in Hugging Face's format with a SentencePiece model as its whole tokenizer."""
    folder = tmp_path_factory.mktemp("sentencepiece") / "llama"
    models.save("llama2", torch.float32, folder, vocab_size=TOKENS)
    (folder.parent / "text").write_text("\n".join(documents("encyclopedic", "train", 20_000, 1234)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder.parent / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=TOKENS,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.fixture(scope="module")
def piece(llama) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(llama / MODEL))


def test_data_has_sentencepieces_own_ids(llama, piece, tmp_path):
    texts = [f"{text} {PROMPT}" for text in documents("encyclopedic", "test", 6_000, 1)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    tokenizer, output = tmp_path / "tokenizer", tmp_path / "data"
    tokenizer.mkdir()
    (tokenizer / MODEL).write_bytes((llama / MODEL).read_bytes())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    assert main(["data", f"source={tmp_path}", f"output={output}", f"tokenizer={tokenizer}"]) == 0
    expected = [token for text in texts for token in [*piece.encode(text), piece.eos_id()]]
    assert len(texts) > 1 and texts[0][0] == " "
    assert numpy.array_equal(token_stream(str(output / "train")), expected)
    assert (output / "tokenizer" / MODEL).read_bytes() == (llama / MODEL).read_bytes()


def say(checkpoint: Path, capsys) -> dict:
    capsys.readouterr()
    assert main(["generate", str(checkpoint), PROMPT, "max_new_tokens=8", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_nemo_archive_takes_it_there_and_back_and_generates_the_same(llama, piece, tmp_path, capsys):
    archive, nemo2, end = tmp_path / "llama.nemo", tmp_path / "nemo2", tmp_path / "end"
    for source, output in ((llama, archive), (archive, nemo2), (nemo2, end)):
        to = ["to=hf"] if output == end else []
        assert main(["convert", str(source), str(output), "verify=tensors", *to]) == 0
        assert open_checkpoint(output).tokenizer_files.files[MODEL].read() == (llama / MODEL).read_bytes()
        tokenizer = load_tokenizer(open_checkpoint(output).tokenizer)
        for text in (PROMPT, f"  {PROMPT} ", "\n\n= A title =\n"):
            assert tokenizer.encode(text) == [piece.bos_id(), *piece.encode(text)]
    first, *others = (say(checkpoint, capsys) for checkpoint in (llama, archive, nemo2, end))
    assert first["prompt_tokens"] == 1 + len(piece.encode(PROMPT))  # and the beginning of the sequence
    assert all(other["token_ids"] == first["token_ids"] for other in others)
    assert all(other["text"] == first["text"] for other in others)
    assert first["text"].startswith(PROMPT)
