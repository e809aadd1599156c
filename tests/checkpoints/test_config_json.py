"""One meaning of a config.json, whoever wrote it: what is described is what is computed, converted and written."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from models import FAMILIES, LLAMA31, build, save
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.formats.huggingface.config import write_config
from nemo_minitron.checkpoints.transformers_model import load_model
from nemo_minitron.cli.main import main
from nemo_minitron.config import ConvertConfig
from nemo_minitron.conversion.convert import convert
from nemo_minitron.errors import CheckpointError

TOKENS = torch.arange(3, 43).reshape(2, 20)
ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def edit(folder: Path, change) -> dict:
    config = json.loads((folder / "config.json").read_text())
    config = change(config) or config
    (folder / "config.json").write_text(json.dumps(config))
    return config


def as_transformers_5(config: dict) -> dict:
    """The keys of transformers 5: one mapping of rotary parameters, `dtype`."""
    config = dict(config)
    values = {name: config.pop(name, None) for name in ROPE}
    scaling = values.pop("rope_scaling") or {"rope_type": "default"}
    config["rope_parameters"] = {**scaling, **{name: value for name, value in values.items() if value is not None}}
    config["dtype"] = config.pop("torch_dtype", None) or config["dtype"]
    return config


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(open_checkpoint(folder), torch.float32)(TOKENS).logits


@pytest.fixture
def saved(tmp_path):
    """Saves a model of models.FAMILIES, with further changes to its configuration; its logits by transformers."""

    def make(name: str, **changes):
        kind, own = FAMILIES[name]
        FAMILIES["changed"] = (kind, {**own, **changes})
        try:
            folder = save("changed", torch.float32, tmp_path / name)
            with torch.no_grad():
                return folder, build("changed", torch.float32)(TOKENS).logits
        finally:
            del FAMILIES["changed"]

    return make


@pytest.mark.parametrize("name", ["llama3", "llama31", "mistral-window", "minitron-width", "qwen2", "qwen3"])
def test_a_directory_of_transformers_5_computes_what_the_classic_one_does(name, saved):
    folder, expected = saved(name, rope_theta=500000.0)
    assert torch.equal(logits(folder), expected)
    described = open_checkpoint(folder).architecture
    edit(folder, as_transformers_5)
    assert open_checkpoint(folder).architecture == described
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize("key", ["partial_rotary_factor", "rope_percent", "rope_percentage"])
def test_the_share_of_a_head_that_nemotron_rotates_has_three_names(key, saved):
    folder, expected = saved("nemotron", partial_rotary_factor=0.25)
    edit(folder, lambda config: config.update({key: config.pop("partial_rotary_factor")}))
    assert open_checkpoint(folder).architecture.rotary_percent == 0.25
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize(
    ("name", "own", "change"),
    [
        ("minitron-width", {}, {"head_dim": None, "kv_channels": 32}),
        ("minitron-width", {}, {"kv_channels": 32}),
        ("llama2", {}, {"num_key_value_heads": None}),
        ("mistral", {"num_key_value_heads": 4}, {"num_key_value_heads": None}),
        ("nemotron", {"num_key_value_heads": 4}, {"num_key_value_heads": None}),
        ("qwen2", {}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "layer_types": None}),
        ("qwen2", {}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0,
                       "layer_types": ["full_attention"] * 2}),
        ("qwen2", {}, {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0,
                       "layer_types": None}),
        ("qwen3", {"head_dim": 128}, {"head_dim": None}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, {"attention_bias": None}),
        ("llama3", {}, {"quantization_config": {}}),
        # As Llama-3.1-Nemotron-70B-Instruct-HF and Nemotron-Mini-4B-Instruct have it.
        ("llama31", {}, {"head_dim": 16, "pretraining_tp": 1, "attention_bias": False, "mlp_bias": False,
                         "rope_scaling": {**LLAMA31, "type": "llama3"}}),
        ("nemotron", {}, {"head_dim": None, "kv_channels": 16, "rope_theta": 10000, "attention_bias": None,
                          "mlp_bias": None, "attention_dropout": None, "transformers_version": "4.32.0.dev0"}),
        ("llama31", {}, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0}}),
    ],
)  # fmt: skip
def test_the_same_model_in_other_words_computes_the_same(name, own, change, saved):
    folder, expected = saved(name, **own)
    edit(folder, lambda config: config.update(change))
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama3", {"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta = 500000.0 and rope_parameters"),
        ("llama31", {"rope_parameters": {"rope_type": "default"}}, "rope_type = 'default' and rope_scaling.rope_type"),
        ("llama31", {"rope_parameters": {"factor": 2.0}}, "rope_parameters.factor = 2.0 and rope_scaling.factor = 8.0"),
        ("llama3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "not a mapping of numbers"),
        ("llama3", {"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "contradict each other"),
        ("nemotron", {"rope_percent": 0.25}, "partial_rotary_factor = 0.5 and rope_percent = 0.25"),
        ("minitron-width", {"kv_channels": 16}, "head_dim = 32 and kv_channels = 16"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None},
         "on some layers only"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4,
                   "layer_types": ["full_attention", "sliding_attention"]}, "on some layers only"),
    ],
)  # fmt: skip
def test_what_two_readers_would_read_differently_is_refused(name, change, message, tmp_path):
    folder = save(name, torch.float32, tmp_path / "start")
    edit(folder, lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_says_the_same_in_the_words_of_both_versions(name, tmp_path):
    checkpoint = open_checkpoint(save(name, torch.bfloat16, tmp_path / "start"))
    a = checkpoint.architecture
    written = write_config(a, "bfloat16", checkpoint.generation)
    older = getattr(transformers, f"{FAMILIES[name][0]}Config")(**written)  # passes rope_parameters over
    assert older.rope_theta == a.rotary_base and older.dtype == torch.bfloat16
    assert getattr(older, "partial_rotary_factor", 1.0) == a.rotary_percent
    newer = written["rope_parameters"]
    assert newer["rope_theta"] == a.rotary_base and newer.get("partial_rotary_factor", 1.0) == a.rotary_percent
    scaling = {key: value for key, value in newer.items() if key not in ("rope_theta", "partial_rotary_factor")}
    assert scaling == (written["rope_scaling"] or {"rope_type": "default"})
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    for left_out in (("rope_parameters", "dtype"), (*ROPE, "torch_dtype")):  # only one version's words
        config = {key: value for key, value in written.items() if key not in left_out}
        (tmp_path / "start" / "config.json").write_text(json.dumps(config))
        assert open_checkpoint(tmp_path / "start").architecture == a


def test_every_command_takes_a_directory_of_transformers_5(small_models, tmp_path, capsys):
    """Converted with its own check of logits, and continued as the classic directory is."""
    import shutil

    folder = shutil.copytree(small_models["llama2"], tmp_path / "start")
    edit(folder, lambda config: config.update({"rope_theta": 500000.0}))
    options = ["To be or not to be,", "max_new_tokens=12", "--json"]
    assert main(["generate", str(folder), *options]) == 0
    expected = json.loads(capsys.readouterr().out)
    edit(folder, as_transformers_5)
    assert main(["generate", str(folder), *options]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == expected["token_ids"]
    assert main(["evaluate", str(folder), "tasks=[perplexity]", "limit=2", "--json"]) == 0
    settings = {"source": str(folder), "output": str(tmp_path / "nemo2")}
    assert convert(ConvertConfig(**settings, verify="logits")).metrics["logits_relative_difference"] < 1e-5


def test_an_adapter_beside_the_weights_does_not_change_what_is_run(saved):
    """transformers takes adapter_config.json for a reason to load another model, the one that it names."""
    folder, expected = saved("llama3")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/nowhere"}')
    assert torch.equal(logits(folder), expected)
