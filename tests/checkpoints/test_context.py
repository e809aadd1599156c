"""The context that is written without NeMo: plain NeMo rebuilds from it what it would have written itself."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemo_minitron.architecture import Architecture, RopeScaling, vocab_multiple
from nemo_minitron.checkpoints.formats.nemo2.classes import CLASSES
from nemo_minitron.checkpoints.formats.nemo2.context_writer import TokenizerRef, write_context
from nemo_minitron.checkpoints.formats.nemo2.engine import nemo_config
from nemo_minitron.errors import CheckpointError
from sizes import NEMOTRON, SMALL

ARCHITECTURES = {
    "llama": {"family": "llama", "rotary_base": 500000.0},
    "llama31": {"family": "llama", "rope_scaling": RopeScaling(factor=32.0, original_length=4096)},
    "tied": {"family": "llama", "share_embeddings_and_output_weights": True},
    "biases": {"family": "llama", "add_bias_linear": True, "add_qkv_bias": True},
    "mistral": {"family": "mistral"},
    "window": {"family": "mistral", "sliding_window": 16},
    "nemotron": NEMOTRON,
    "pruned": {**NEMOTRON, "hidden_size": 48, "ffn_hidden_size": 80, "num_layers": 1},
    "qwen2": {"family": "qwen2", "add_qkv_bias": True, "layernorm_epsilon": 1e-6},
    "qwen3": {"family": "qwen3", "qk_layernorm": True, "layernorm_epsilon": 1e-6},
    "gpt": {"family": "gpt", "activation": "gelu", "normalization": "LayerNorm", "gated_linear_unit": False},
    "padded": {"family": "llama", "vocab_size": 384, "vocab_padding": 100},
    "padded for ranks": {**NEMOTRON, "vocab_size": 1024, "vocab_padding": 500},
    "padded oddly": {"family": "qwen2", "vocab_size": 259, "vocab_padding": 3},
    "odd rows": {"family": "llama", "vocab_size": 259},
}  # fmt: skip


def architecture_of(name: str) -> Architecture:
    made = Architecture(**{**SMALL, **ARCHITECTURES[name]})
    assert made.problems() == []
    return made


def nemos_config(name: str, dtype: str = "bfloat16"):
    """The config by the other way: NeMo's classes, called here."""
    import torch
    from nemo.collections.llm.gpt.model.base import HAVE_TE

    made = architecture_of(name)
    engine = {} if HAVE_TE else {"apply_rope_fusion": False}
    stated = {"bf16": dtype == "bfloat16", "fp16": dtype == "float16", "params_dtype": getattr(torch, dtype)}
    config = nemo_config(made, make_vocab_size_divisible_by=vocab_multiple(made), **stated, **engine)
    if made.sliding_window is not None:
        config.cp_comm_type = "a2a"  # as NeMo's importer: no other way of context parallel takes a window
    return config


def differing(one, other) -> list[str]:
    """Fields in which two configs differ."""
    names = [field.name for field in dataclasses.fields(other)]
    return [name for name in names if not same(getattr(one, name), getattr(other, name))]


def same(one, other) -> bool:
    """Whether two values of a config are equal; of the two squared ReLUs, NeMo's and Megatron's, either will do."""
    import torch

    if isinstance(one, functools.partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    if getattr(one, "__name__", None) == getattr(other, "__name__", 0) == "squared_relu":
        values = torch.linspace(-3, 3, 100)
        return torch.equal(one(values), other(values))
    return one == other


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<unk>", "<eos>", "to", "be", "or", "not"])}
    bare = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    return folder


def model_yaml(context: Path) -> dict:
    return yaml.safe_load((context / "model.yaml").read_text())


def labels(node: dict) -> dict:
    """Items of an object in io.json by their labels; none of a tuple of names."""
    return {item[0]: item[1] for item in node["items"] if isinstance(item, list)}


def copy_into(context: Path, tokenizer: Path, name: str = "nemo_tokenizer") -> None:
    (context / name).mkdir(parents=True)
    for file in tokenizer.iterdir():
        (context / name / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nemo_rebuilds_its_own_config(name, tmp_path):
    from nemo.collections import llm
    from nemo.lightning.io import load_context

    write_context(tmp_path / "context", architecture_of(name), tokenizer=None, dtype="bfloat16")
    model, expected = load_context(tmp_path / "context", subpath="model"), nemos_config(name)
    assert type(model) is getattr(llm, CLASSES[architecture_of(name).family][0])
    assert type(model.config) is type(expected)
    assert model.tokenizer is None
    assert differing(model.config, expected) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_precision_is_that_of_the_weights(dtype, tmp_path):
    from nemo.lightning.io import load_context

    write_context(tmp_path, architecture_of("mistral"), tokenizer=None, dtype=dtype)
    config, expected = load_context(tmp_path, subpath="model.config"), nemos_config("mistral", dtype)
    assert differing(config, expected) == []
    assert str(config.params_dtype) == f"torch.{dtype}"
    assert (config.bf16, config.fp16) == (dtype == "bfloat16", dtype == "float16")


def test_the_whole_context_loads(tokenizer, tmp_path):
    from nemo.lightning.io import load_context

    context = tmp_path / "context"
    copy_into(context, tokenizer)
    reference = TokenizerRef("huggingface", "nemo_tokenizer")
    write_context(context, architecture_of("padded"), tokenizer=reference, dtype="float32")
    loaded = load_context(context)
    assert (type(loaded).__name__, type(loaded.trainer).__name__) == ("TrainerContext", "Trainer")
    assert (type(loaded.model).__name__, type(loaded.model.tokenizer).__name__) == ("LlamaModel", "AutoTokenizer")
    assert loaded.extra == {"vocab_padding": 100}
    # Without its last folder, as NeMo's own connectors name a checkpoint.
    assert differing(load_context(tmp_path).model.config, loaded.model.config) == []


def test_the_fusion_that_needs_transformer_engine_is_on_where_that_is(tmp_path, monkeypatch):
    from megatron.core.models.common.embeddings import rope_utils
    from nemo.collections.llm.gpt.model import base
    from nemo.lightning.io import load_context

    write_context(tmp_path / "llama", architecture_of("llama"), tokenizer=None, dtype="bfloat16")
    write_context(tmp_path / "qwen2", architecture_of("qwen2"), tokenizer=None, dtype="bfloat16")
    for installed in (True, False):
        monkeypatch.setattr(base, "HAVE_TE", installed)
        monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", print if installed else None)
        assert load_context(tmp_path / "llama", subpath="model").config.apply_rope_fusion is installed
        assert load_context(tmp_path / "qwen2", subpath="model").config.apply_rope_fusion is False


@pytest.mark.parametrize("name", ["padded", "padded for ranks", "padded oddly", "odd rows"])
def test_nemo_builds_just_the_rows_that_there_are(name, tokenizer, tmp_path):
    from nemo.lightning import get_vocab_size
    from nemo.lightning.io import load_context

    from nemo_minitron.megatron.forward import parallel_ranks
    from nemo_minitron.megatron.layout import Layout
    from nemo_minitron.megatron.session import WITHOUT_FUSIONS, engine

    made = architecture_of(name)
    copy_into(tmp_path / "context", tokenizer)
    reference = TokenizerRef("huggingface", "nemo_tokenizer")
    write_context(tmp_path / "context", made, tokenizer=reference, dtype="float32")
    with engine(3, tmp_path / "log"), parallel_ranks(Layout(cuda=False, bf16=False), 3):
        model = load_context(tmp_path / "context", subpath="model")
        for field, value in {**WITHOUT_FUSIONS, "use_cpu_initialization": True}.items():
            setattr(model.config, field, value)
        model.config.layernorm_zero_centered_gamma = False
        module = model.config.configure_model(model.tokenizer)
        assert module.embedding.word_embeddings.weight.shape == (made.vocab_size, made.hidden_size)
        assert module.output_layer.weight.shape == (made.vocab_size, made.hidden_size)
        tokens = made.vocab_size - made.vocab_padding
        padded = get_vocab_size(model.config, tokens, model.config.make_vocab_size_divisible_by)
        assert padded == made.vocab_size


def test_a_tokenizer_of_files_is_found_wherever_the_checkpoint_is(tokenizer, tmp_path):
    from nemo.lightning.io import load_context

    copy_into(tmp_path / "made" / "context", tokenizer)
    reference = TokenizerRef("huggingface", "nemo_tokenizer")
    write_context(tmp_path / "made" / "context", architecture_of("llama"), tokenizer=reference, dtype="bfloat16")
    (tmp_path / "made").rename(tmp_path / "moved")
    context = tmp_path / "moved" / "context"
    for loaded in (load_context(context, subpath="model").tokenizer, load_context(context, subpath="model.tokenizer")):
        assert type(loaded).__name__ == "AutoTokenizer"
        assert loaded.tokenizer.name_or_path == str(context / "nemo_tokenizer")
        assert loaded.text_to_ids("to be or not to be") == [2, 3, 4, 5, 2, 3]
    assert model_yaml(context)["tokenizer"]["pretrained_model_name"] == "nemo_tokenizer"


def test_nemo_takes_a_tokenizer_that_transformers_5_wrote(tokenizer, tmp_path, monkeypatch):
    from nemo_minitron.training.inputs import nemo_tokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy_into(tmp_path, tokenizer, "newer")
    config = json.loads((tmp_path / "newer" / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<eos>"]}
    (tmp_path / "newer" / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = nemo_tokenizer(str(tmp_path / "newer"))
    assert loaded.text_to_ids("to be or not to be") == [2, 3, 4, 5, 2, 3] and loaded.eos_id == 1


def test_a_sentencepiece_model_is_found_wherever_the_checkpoint_is(tmp_path):
    import sentencepiece
    from nemo.lightning.io import load_context

    (tmp_path / "text").write_text("to be or not to be that is the question\n" * 50)
    (tmp_path / "made" / "context").mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "made" / "context" / "tokenizer"),
        vocab_size=19,
        minloglevel=2,
    )
    reference = TokenizerRef("sentencepiece", "tokenizer.model")
    write_context(tmp_path / "made" / "context", architecture_of("nemotron"), tokenizer=reference, dtype="bfloat16")
    (tmp_path / "made").rename(tmp_path / "moved")
    loaded = load_context(tmp_path / "moved" / "context", subpath="model").tokenizer
    assert type(loaded).__name__ == "SentencePieceTokenizer"
    assert loaded.vocab_size == 19
    assert loaded.ids_to_text(loaded.text_to_ids("to be")) == "to be"
    config = load_context(tmp_path / "moved" / "context", subpath="model", build=False)
    assert config.tokenizer.model_path == str(tmp_path / "moved" / "context" / "tokenizer.model")


def test_a_name_on_the_hub_stays_one(tmp_path):
    from nemo.lightning.io import load_context

    reference = TokenizerRef("huggingface", "meta-llama/Llama-3.1-8B")
    write_context(tmp_path, architecture_of("llama31"), tokenizer=reference, dtype="bfloat16")
    # Not built: that would ask the hub for it.
    assert load_context(tmp_path, subpath="model", build=False).tokenizer.pretrained_model_name == reference.name
    assert load_context(tmp_path, build=False).model.tokenizer.pretrained_model_name == reference.name
    assert differing(load_context(tmp_path, subpath="model.config"), nemos_config("llama31")) == []
    assert model_yaml(tmp_path)["tokenizer"]["pretrained_model_name"] == reference.name


@pytest.mark.parametrize("name", ["llama31", "window", "nemotron", "padded"])
def test_it_is_the_file_that_fiddle_writes(name, tmp_path):
    """Read and written again by fiddle, the file says the same but for the order of arguments."""
    from fiddle._src.experimental import serialization
    from nemo.lightning import io  # noqa: F401  registers what fiddle has to know of NeMo

    reference = TokenizerRef("huggingface", "meta-llama/Llama-3.1-8B")
    write_context(tmp_path, architecture_of(name), tokenizer=reference, dtype="bfloat16")
    text = (tmp_path / "io.json").read_text()
    again = json.loads(serialization.dump_json(serialization.load_json(text)))
    written = json.loads(text)
    assert list(written["objects"]) == list(again["objects"])
    for document in (written, again):
        for key, node in document["objects"].items():
            items = [value for _, value in node["items"]] if key.startswith("tuple") else node["items"]
            node["items"] = sorted(items, key=str)
    rope = "Attr(name='apply_rope_fusion')"
    for ours, theirs in zip(written["objects"].values(), again["objects"].values()):
        if rope in labels(ours):  # a constant's name; a value once it was looked up
            assert labels(ours)[rope]["name"] == "HAVE_TE"
            assert labels(theirs)[rope]["value"] is nemos_config(name).apply_rope_fusion
            ours["items"], theirs["items"] = ([i for i in node["items"] if i[0] != rope] for node in (ours, theirs))
    assert written == again


def test_the_yaml_says_what_the_json_says(tmp_path):
    write_context(tmp_path, architecture_of("llama31"), tokenizer=None, dtype="bfloat16")
    model = model_yaml(tmp_path)
    config = model["config"]
    assert model["_target_"] == "nemo.collections.llm.gpt.model.llama.LlamaModel"
    assert config["_target_"] == "nemo.collections.llm.gpt.model.llama.Llama31Config"
    assert config["activation_func"] == {"_target_": "torch.nn.functional.silu", "_call_": False}
    assert (config["num_layers"], config["scale_factor"], config["old_context_len"]) == (2, 32.0, 4096)


def test_what_nemo_cannot_express_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not of float64"):
        write_context(tmp_path, architecture_of("llama"), tokenizer=None, dtype="float64")
    scaled = dataclasses.replace(architecture_of("qwen2"), rope_scaling=RopeScaling())
    with pytest.raises(CheckpointError, match="Qwen2Config has no scaled rotary embedding"):
        write_context(tmp_path, scaled, tokenizer=None, dtype="bfloat16")
    missing = TokenizerRef("sentencepiece", "tokenizer.model")
    with pytest.raises(CheckpointError, match="has no tokenizer.model"):
        write_context(tmp_path, architecture_of("llama"), tokenizer=missing, dtype="bfloat16")
    assert not list(tmp_path.iterdir())


def test_writing_imports_no_engine(tmp_path):
    script = f"""
import sys
from pathlib import Path
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.formats.nemo2.context_writer import TokenizerRef, write_context
reference = TokenizerRef("huggingface", "meta-llama/Llama-3.1-8B")
write_context(Path({str(tmp_path)!r}), Architecture(**{SMALL!r}), tokenizer=reference, dtype="bfloat16")
engines = {{"nemo", "megatron", "fiddle", "torch", "transformers", "transformer_engine"}}
assert not engines & {{name.partition(".")[0] for name in sys.modules}}
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["io.json", "model.yaml"]
