"""The context that is written without NeMo, as NeMo rebuilds it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.architecture import Architecture, RopeScaling
from nemo_minitron.checkpoints import nemo2, tokenizers
from nemo_minitron.checkpoints.write import write_context

SMALL = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 32, "vocab_size": 256, "seq_length": 32,
}  # fmt: skip
CASES = {
    "llama": {"rotary_base": 500000.0},
    "llama31": {"rope_scaling": RopeScaling(factor=32.0)},
    "tied": {"share_embeddings_and_output_weights": True},
    "biases": {"add_bias_linear": True},
    "odd vocabulary": {"vocab_size": 259},
    "padding": {"vocab_padding": 6},
    "mistral": {"family": "mistral"},
    "window": {"family": "mistral", "sliding_window": 8},
    "nemotron": {
        "family": "nemotron", "normalization": "LayerNorm", "layernorm_zero_centered_gamma": True,
        "activation": "squared_relu", "gated_linear_unit": False, "rotary_percent": 0.5,
    },
    "qwen2": {"family": "qwen2", "add_qkv_bias": True, "layernorm_epsilon": 1e-6},
    "gpt": {"family": "gpt", "activation": "gelu", "gated_linear_unit": False, "normalization": "LayerNorm"},
}  # fmt: skip
#: What the context states beyond NeMo's config of the same architecture.
STATED = ("bf16", "params_dtype", "autocast_dtype", "pipeline_dtype", "make_vocab_size_divisible_by")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> tokenizers.Tokenizer:
    from nemo_minitron.data.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["to be or not to be"] * 10, 300, folder)
    return tokenizers.from_directory(folder)


@pytest.mark.parametrize("case", CASES)
def test_nemo_rebuilds_the_model_that_was_described(case, tokenizer, tmp_path):
    from nemo.lightning.io import load_context

    architecture = Architecture(**{**SMALL, **CASES[case]})
    write_context(tmp_path, architecture, tokenizer, {"eos_token_id": 2}, "bfloat16")
    model = load_context(tmp_path / "context", subpath="model")
    expected = nemo2.nemo_model(architecture)
    assert type(model) is type(expected)
    assert type(model.config) is type(expected.config)
    for field in dataclasses.fields(expected.config):
        if field.name not in STATED:
            assert repr(getattr(model.config, field.name)) == repr(getattr(expected.config, field.name)), field.name
    assert model.config.bf16
    assert str(model.config.params_dtype) == "torch.bfloat16"
    assert architecture.vocab_size % model.config.make_vocab_size_divisible_by == 0
    assert Path(model.tokenizer.tokenizer.name_or_path) == tmp_path / "context" / "nemo_tokenizer"
    context = load_context(tmp_path / "context")
    assert type(context.trainer).__name__ == "Trainer"
    assert context.extra == ({"vocab_padding": 6} if case == "padding" else {})


def test_sentencepiece_and_hub_names_are_rebuilt(tmp_path):
    import sentencepiece
    from nemo.lightning.io import load_context

    from nemo_minitron.checkpoints.tensors import whole

    (tmp_path / "text").write_text("to be or not to be that is the question\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "sp"), vocab_size=18, minloglevel=2
    )
    model = tokenizers.Tokenizer(kind="sentencepiece", files={"tokenizer.model": whole(tmp_path / "sp.model")})
    write_context(tmp_path / "sp", Architecture(**SMALL), model, {}, "float32")
    rebuilt = load_context(tmp_path / "sp" / "context", subpath="model").tokenizer
    assert (type(rebuilt).__name__, rebuilt.vocab_size) == ("SentencePieceTokenizer", 18)
    assert rebuilt.text_to_ids("to be") == rebuilt.tokenizer.encode_as_ids("to be")


def test_writing_imports_no_engine(tmp_path):
    script = f"""
import sys
from pathlib import Path
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.write import write_context
write_context(Path({str(tmp_path)!r}), Architecture(**{SMALL!r}), None, {{}}, "float32")
loaded = [name for name in ("nemo", "megatron", "fiddle", "torch", "transformers") if name in sys.modules]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "context" / "io.json").is_file()
