"""The presets of published models: what they say, and random weights of their sizes with one layer."""

import json
import re
from pathlib import Path

import pytest
import torch

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.formats.huggingface.config import read_config
from nemo_minitron.config.compose import compose, conf_dir
from nemo_minitron.errors import ConfigError
from nemo_minitron.flow.dry_run import describe
from nemo_minitron.flow.models import student_architecture, teacher_architecture
from nemo_minitron.flow.settle import settle
from nemo_minitron.integrations.notebooks import PRESETS, Tutorial
from nemo_minitron.planning.command import work_out
from nemo_minitron.published import KNOWN, stated_fields
from nemo_minitron.training.finetune import finetune, random_architecture

ROOT = Path(__file__).resolve().parents[2]
MODELS = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml") if path.stem != "auto")
#: What NVIDIA's nvidia/Minitron-4B-Base says in config.json, but for the layers and the vocabulary.
MINITRON_4B = {
    "model_type": "nemotron", "hidden_size": 3072, "intermediate_size": 9216, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "relu2", "norm_eps": 1e-05, "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False,
}  # fmt: skip
#: What the config.json of models says on the hub, of what makes up their sizes.
LLAMA32 = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-06,
    "max_position_embeddings": 40960, "rope_theta": 1000000, "rope_scaling": None, "hidden_act": "silu",
    "attention_bias": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28,
}  # fmt: skip
SIZES = {
    "llama32_1b": {**LLAMA32, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                   "num_attention_heads": 32, "head_dim": 64},
    "llama32_3b": {**LLAMA32, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                   "num_attention_heads": 24, "head_dim": 128},
    "smollm2_135m": {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
                     "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                     "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000,
                     "rope_scaling": None, "tie_word_embeddings": True},
    "qwen3_0.6b": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "tie_word_embeddings": True},
    "qwen3_1.7b": {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "tie_word_embeddings": True},
    "qwen3_4b": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": True},
    "qwen3_8b": {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": False},
}  # fmt: skip
PARAMETERS = {
    "llama32_1b": 1_235_814_400, "llama32_3b": 3_212_749_824, "smollm2_135m": 134_515_008,
    "qwen3_0.6b": 596_049_920, "qwen3_1.7b": 1_720_574_976, "qwen3_4b": 4_022_468_096, "qwen3_8b": 8_190_735_360,
}  # fmt: skip
#: The hardware that each preset is made for, and what it plans with.
FITS = {
    "llama32_1b": "1x24gb", "llama32_3b": "1x80gb", "qwen3_0.6b": "1x24gb", "qwen3_1.7b": "1x80gb",
    "qwen3_4b": "8x80gb", "qwen3_8b": "8x80gb",
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_a_known_model_has_the_sizes_of_its_config_json(name):
    published = read_config(SIZES[name], name)
    assert KNOWN[name].with_sizes(seq_length=published.seq_length) == published
    assert KNOWN[name].parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", FITS)
def test_a_preset_fits_the_hardware_it_is_made_for(name):
    config = compose("flow", [f"model={name}", f"hardware={FITS[name]}"])
    plan = ["layouts=false", f"model={name}", f"hardware={FITS[name]}", f"seq_length={config.model.seq_length}"]
    for student in config.prune.students:
        sizes = [f"student.{key}={value}" for key, value in config.prune.students[student].items()]
        found = work_out(compose("plan", [*plan, *sizes, f"global_batch_size={config.distill.global_batch_size}"]))
        assert {name: stage["fits"] for name, stage in found["stages"].items()} == {
            "finetune": True, "prune": True, "distill": True,
        }  # fmt: skip


def test_the_demo_on_a_real_model_takes_an_hour_at_most():
    """On two cores of 0.05 TFLOP/s each, as the Makefile runs it."""
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "flow model=smollm2" in line)
    settings = [word for word in line.split() if "=" in word]
    config = compose("flow", [*settings, "hardware.tflops=0.1"])
    minutes = re.search(r"time: about (\d+) min in all", describe(settle(config)))
    assert 30 < int(minutes[1]) <= 60


@pytest.mark.parametrize("name", MODELS)
def test_a_flow_can_be_planned_for_every_model_preset(name):
    config = compose("flow", [f"model={name}"])
    teacher = teacher_architecture(config)
    assert teacher == KNOWN[name]
    for student in config.prune.students:
        assert student_architecture(config, teacher, student).parameters() < 0.7 * teacher.parameters()


@pytest.mark.parametrize("name", sorted(set(PRESETS) & set(MODELS)))
def test_the_notebooks_preset_is_the_flows(name, tmp_path):
    assert Tutorial(name, str(tmp_path)).teacher == KNOWN[name]


def test_the_width_student_of_minitron_8b_is_minitron_4b():
    config = compose("flow", ["model=minitron_8b"])
    assert student_architecture(config, teacher_architecture(config), "width") == KNOWN["minitron_4b"]


def test_what_is_stated_beside_a_known_model_wins():
    fields = stated_fields({"known": "minitron_8b", "num_layers": 2}, "test")
    assert Architecture.from_dict(fields) == KNOWN["minitron_8b"].with_sizes(num_layers=2)
    assert stated_fields({"num_layers": 2}, "test") == {"num_layers": 2}
    with pytest.raises(ConfigError, match="model.architecture.known = minitron_9b is none of .*minitron_8b, "):
        stated_fields({"known": "minitron_9b"}, "test")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("num_layers", "x", "'x' is not a whole number"), ("hidden_size", 64.0, "64.0 is not a whole number"),
     ("num_query_groups", True, "True is not a whole number or null"), ("rotary_base", "big", "'big' is not a number"),
     ("rope_scaling", 3, "3 is not a mapping {factor:...} or null"), ("family", None, "None is not text"),
     ("rope_scaling", {"factor": "x"}, "rope_scaling.factor = 'x' is not a number")],
)  # fmt: skip
def test_a_size_of_another_kind_is_named(name, value, said):
    with pytest.raises(ConfigError) as caught:
        Architecture.from_settings(stated_fields({"known": "llama31_8b", name: value}, "test"), "test")
    assert f"model.architecture.{name}" in str(caught.value) and said in str(caught.value)
    with pytest.raises(ConfigError, match="none of the known models"):
        stated_fields({"known": [name]}, "test")


def random_weights(tiny, output: Path, name: str, **changes) -> c.FinetuneConfig:
    """One step of one sample from random weights of a known model with one layer."""
    sizes = {"known": name, "num_layers": 1, "vocab_size": None, **changes}
    fields = tiny.training(output, steps=1, init="random", architecture=sizes)
    fields["model"].micro_batch_size = fields["model"].global_batch_size = 1
    fields["trainer"].limit_val_batches = 1
    return c.FinetuneConfig(**fields)


def test_the_vocabulary_is_the_known_models_unless_null_is_stated(tiny, tmp_path):
    config = random_weights(tiny, tmp_path, "minitron_8b")
    assert random_architecture(config).vocab_size == 512
    del config.model.architecture["vocab_size"]
    assert random_architecture(config).vocab_size == 256000


def test_minitron_4b_of_random_weights_is_trained_and_read_by_transformers(tiny, tmp_path):
    """The published sizes at one layer, through Megatron and the export."""
    from transformers import AutoModelForCausalLM

    config = random_weights(tiny, tmp_path / "4b", "minitron_4b")
    config.to = "hf"
    losses = finetune(config).metrics["train"]
    assert len(losses) == 1 and 5.5 < losses[0]["lm_loss"] < 7.5  # log 512 = 6.2
    said = json.loads((tmp_path / "4b" / "config.json").read_text())
    assert {name: said[name] for name in MINITRON_4B} == MINITRON_4B
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "4b", torch_dtype=torch.float32)
    sizes = KNOWN["minitron_4b"].with_sizes(num_layers=1, vocab_size=512)
    assert sum(parameter.numel() for parameter in model.parameters()) == sizes.parameters()
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(64)[None]).logits).all()
