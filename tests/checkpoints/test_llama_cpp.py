"""llama.cpp on what `convert` writes, where llama-cpp-python is installed: ids, greedy tokens, logits, its server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy
import pytest
import torch
from test_gguf import sentencepiece_tokenizer, without_its_model

from models import build, save
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.transformers_model import load_model
from nemo_minitron.config import ConvertConfig, validated
from nemo_minitron.conversion.convert import convert
from nemo_minitron.data.synthetic.corpus import documents
from nemo_minitron.data.tokenizer import train_bpe

llama_cpp = pytest.importorskip("llama_cpp")

PAGE = (
    "\n".join(documents("encyclopedic", "train", 400, 7))
    + " I'LL go; 12345 x\t\ty don't 3.14  Überall Eis… 你好 ١٢٣ \n\n"
)
PROMPT = "The river was cold"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
NEW = 16


def written(family: str, folder: Path, kind: str, **sizes) -> Path:
    """A tiny model with a tokenizer, as a GGUF."""
    start = save(family, torch.float32, folder / "start", **{"vocab_size": 304, **sizes})
    train_bpe([PAGE] * 2, 300, start)
    settings = json.loads((start / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (start / "tokenizer_config.json").write_text(json.dumps(settings))
    file = folder / "model.gguf"
    convert(validated(ConvertConfig(source=str(start), output=str(file), gguf_type=kind, verify="tensors")))
    return file


def opened(file: Path, **settings):
    """llama.cpp's model, with keys and values in float32."""
    return llama_cpp.Llama(
        str(file), n_ctx=256, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0, **settings
    )


@pytest.mark.parametrize("kind", ["F32", "BF16"])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [("llama2", {}), ("llama31", {}), ("llama32-tied", {}), ("llama-biases", {}), ("mistral-nemo", {}), ("qwen2", {}),
     ("qwen25-tied", {"head_dim": 16}), ("nemotron", {}), ("minitron-width", {"hidden_size": 128}),
     ("modelopt-105", {}), ("nemo-14487", {}), ("qwen3", {}), ("qwen3-tied", {}),
     ("qwen3", {"hidden_size": 40, "intermediate_size": 88, "num_attention_heads": 3, "num_key_value_heads": 1})],
)  # fmt: skip
def test_it_computes_what_transformers_does(family, sizes, kind, tmp_path):
    """Widths that are no multiple of the heads, biases, norms of query and key, rotary scaling and partial rotation
    among them; Qwen3 untied, tied, and pruned in width with its head size kept."""
    from transformers import AutoTokenizer

    file = written(family, tmp_path, kind, **sizes)
    model, llama = load_model(open_checkpoint(file), torch.float32), opened(file)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "start")
    ids = tokenizer(PROMPT, add_special_tokens=False).input_ids
    assert llama.tokenize(PAGE.encode(), add_bos=False) == tokenizer(PAGE, add_special_tokens=False).input_ids
    llama.eval(ids)
    found = numpy.array(llama.scores[: len(ids)])
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    scale = numpy.abs(expected).max()
    assert numpy.abs(found - expected).max() <= (1e-4 if kind == "F32" else 2e-2) * scale
    if kind == "F32":
        assert (
            greedy(llama, ids)
            == model.generate(
                torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, len(ids) :].tolist()
        )


@pytest.mark.parametrize("before", [True, False])
def test_pieces_that_were_told_from_their_merges_are_split_as_transformers_splits(before, tmp_path):
    """SentencePiece's BPE that only a tokenizer.json is left of."""
    from transformers import AutoTokenizer

    start = without_its_model(sentencepiece_tokenizer(tmp_path / "start"), before)
    save("llama2", torch.float32, start, vocab_size=640)
    convert(validated(ConvertConfig(source=str(start), output=str(tmp_path / "model.gguf"), verify="none")))
    llama, tokenizer = opened(tmp_path / "model.gguf"), AutoTokenizer.from_pretrained(start)
    for text in (PAGE, "x", " two  spaces", "Überall 你好 <|tool|>x"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids


def greedy(llama, ids: list[int]) -> list[int]:
    """The most likely tokens, one after the other."""
    llama.reset()
    made = llama.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0)
    return [token for token, _ in zip(made, range(NEW))]


def test_the_scaled_frequencies_matter(tmp_path):
    """Of Llama 3.1's: without its factors llama.cpp's logits are others."""
    file = written("llama31", tmp_path, "F32")
    llama = opened(file)
    ids = llama.tokenize(PAGE.encode(), add_bos=False)[:60]
    llama.eval(ids)
    plain = build("llama31", torch.float32, vocab_size=304, rope_scaling=None)
    with torch.no_grad():
        other = plain(torch.tensor([ids])).logits[0].numpy()
    assert numpy.abs(numpy.array(llama.scores[: len(ids)]) - other).max() > 1e-2 * numpy.abs(other).max()


def test_its_server_answers_a_conversation(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("sse_starlette")
    file = written("llama2", tmp_path, "F16")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        "-m",
        "llama_cpp.server",
        "--model",
        str(file),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server,
    ):
        try:
            answer = asked(server, f"http://127.0.0.1:{port}/v1", tmp_path / "log")
        finally:
            server.terminate()
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] >= 1


def asked(server: subprocess.Popen, address: str, log: Path) -> dict:
    """The answer to a conversation, once the server is up."""
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        except OSError:
            time.sleep(0.25)
    raise AssertionError(log.read_text())
