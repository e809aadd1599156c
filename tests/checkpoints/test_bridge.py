"""Megatron-Bridge checkpoints: what Bridge itself wrote is read, and what is written is what Bridge reads.

`megatron_bridge/` holds what Bridge 0.6.2 saved, with megatron-core 0.19.2, by its `with_bridge.py`. The numbers in
there are made here again.
"""

import argparse
import enum
import json
import pathlib
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from models import LLAMA31, equal, save, stored
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.checkpoint import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.formats.bridge.directory import COMMON
from nemo_minitron.checkpoints.names import canonical_shapes
from nemo_minitron.checkpoints.storage.torch_dist import BACKEND
from nemo_minitron.checkpoints.tensors import in_memory
from nemo_minitron.config import ConvertConfig, validated
from nemo_minitron.conversion.convert import convert
from nemo_minitron.conversion.inspect import describe
from nemo_minitron.errors import CheckpointError

WRITTEN_BY_BRIDGE = Path(__file__).parent / "megatron_bridge"
TINY = {
    "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 16, "dtype": "bfloat16",
}  # fmt: skip
SCALING = {**LLAMA31, "original_max_position_embeddings": 8192}
#: Folder beside this -> transformers' class and what its configuration says beside TINY.
BY_BRIDGE = {
    "llama": ("Llama", {"rope_scaling": SCALING, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}),
    "mistral": ("Mistral", {"sliding_window": 8, "head_dim": 8}),
    "nemotron": ("Nemotron", {"head_dim": 8, "num_hidden_layers": 3}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": ("Qwen3", {"head_dim": 8, "num_hidden_layers": 3, "rope_theta": 1e6}),
}


def made_by_transformers(name: str, folder: Path) -> Path:
    """The Hugging Face directory that a folder of Bridge's was made of: numbers from NumPy's frozen generator."""
    import transformers

    kind, changes = BY_BRIDGE[name]
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            numbers = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(numbers * 0.1))
    model.save_pretrained(folder)
    return folder


def run(source: Path, output: Path, **settings) -> Path:
    convert(validated(ConvertConfig(source=str(source), output=str(output), **{"verify": "tensors", **settings})))
    return output


@pytest.mark.parametrize("name", BY_BRIDGE)
def test_what_bridge_wrote_is_read_bit_for_bit(name, tmp_path):
    start = made_by_transformers(name, tmp_path / "start")
    checkpoint = open_checkpoint(WRITTEN_BY_BRIDGE / name)
    expected = open_checkpoint(start).architecture
    assert checkpoint.format == "bridge"
    assert checkpoint.architecture == expected
    end = run(checkpoint.path, tmp_path / "end", to="hf")
    assert equal(stored(start), stored(end))
    assert json.loads((end / "config.json").read_text())["architectures"] == [f"{BY_BRIDGE[name][0]}ForCausalLM"]


def test_the_tokenizer_that_bridge_kept_is_read():
    tokenizer = open_checkpoint(WRITTEN_BY_BRIDGE / "llama").tokenizer_files
    assert set(tokenizer.files) == {"tokenizer.json", "tokenizer_config.json"}
    assert tokenizer.size() == 258


@pytest.mark.parametrize("name", BY_BRIDGE)
def test_what_is_written_describes_the_model_as_bridge_does(name, tmp_path):
    """Every field of the model that is written has the value that Bridge itself gave it."""
    again = run(WRITTEN_BY_BRIDGE / name, tmp_path / "again", to="bridge")
    theirs, ours = (
        yaml.safe_load((path / "iter_0000000" / "run_config.yaml").read_text())["model"]
        for path in (WRITTEN_BY_BRIDGE / name, again)
    )
    different = {key: (value, theirs[key]) for key, value in ours.items() if theirs[key] != value}
    # Bridge pads no vocabulary that is stated whole; where it would, it divides by what suits the size.
    assert different.keys() <= {"make_vocab_size_divisible_by"}, different
    assert not ours["should_pad_vocab"]


@pytest.mark.parametrize("name", ["train_state.pt", "../latest_train_state.pt"])
def test_the_state_of_training_is_what_bridge_writes(name, tmp_path):
    again = run(WRITTEN_BY_BRIDGE / "llama", tmp_path / "again", to="bridge")
    theirs, ours = (
        torch.load(path / "iter_0000000" / name, weights_only=True) for path in (WRITTEN_BY_BRIDGE / "llama", again)
    )
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key].to(value.dtype)), key
    assert ours["step"].dtype == theirs["step"].dtype
    tracker = "latest_checkpointed_iteration.txt"
    assert (again / tracker).read_text() == (WRITTEN_BY_BRIDGE / "llama" / tracker).read_text() == "0"


def test_megatron_core_reads_what_is_written(tmp_path):
    """Keys, shapes, bits and common state by its own reader, without a model."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    again = run(WRITTEN_BY_BRIDGE / "llama", tmp_path / "again", to="bridge") / "iter_0000000"
    assert dist_checkpointing.load_common_state_dict(again) == COMMON
    found = TorchDistLoadShardedStrategy().load_tensors_metadata(again)
    stated = {name: (tuple(tensor.global_shape), tensor.dtype) for name, tensor in found.items()}
    theirs = open_checkpoint(WRITTEN_BY_BRIDGE / "llama").tensors
    assert stated["decoder.layers.mlp.linear_fc1.weight"] == ((2, 48, 16), torch.bfloat16)
    assert stated["embedding.word_embeddings.weight"] == ((32, 16), torch.bfloat16)
    assert len(stated) == len({name.replace(".1.", ".").replace(".0.", ".") for name in theirs})


def bridge(folder: Path, **changes) -> Path:
    """A valid checkpoint of Bridge's, which is written here."""
    architecture = Architecture(
        num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, kv_channels=4,
        vocab_size=32, seq_length=16, **changes,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: in_memory(torch.randn(shape, generator=generator).bfloat16())
        for name, shape in canonical_shapes(architecture).items()
    }
    write_checkpoint(folder, "bridge", architecture, tensors, None, {})
    return folder


def describe_otherwise(folder: Path, **changes) -> None:
    path = folder / "iter_0000000" / "run_config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"] |= changes
    path.write_text(yaml.safe_dump(config))


REFUSED = {
    "num_moe_experts": (8, "num_moe_experts = 8"),
    "multi_latent_attention": (True, "multi_latent_attention = True"),
    "position_embedding_type": ("yarn", "position_embedding_type = 'yarn'"),
    "window_attn_skip_freq": ([1, 0], "window_attn_skip_freq = a list"),
    "activation_func": ({"_target_": "megatron.core.activations.fast_gelu"}, "fast_gelu' is not known here"),
    "gated_linear_unit": ("yes", "gated_linear_unit = 'yes' is neither true nor false"),
    "window_size": (8, "window_size = 8 is not a pair"),
    "rope_scaling": ({"factor": 8}, "rope_scaling = a dict is neither true nor false"),
    "hidden_size": (None, "does not state hidden_size"),
    "num_layers": (3, "has 2 layers, the configuration says 3"),
    "_target_": (
        "megatron.bridge.models.qwen.qwen_provider.Qwen3MoEModelProvider30B_A3B",
        "Qwen3MoEModelProvider30B_A3B'; known are GPTModelProvider",
    ),
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_model_of_another_kind_is_refused_by_name(field, tmp_path):
    value, message = REFUSED[field]
    folder = bridge(tmp_path / "c")
    describe_otherwise(folder, **{field: value})
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("target", "family"),
    [
        ("megatron.bridge.models.gpt_provider.GPTModelProvider", "llama"),
        ("megatron.training.models.gpt.GPTModelConfig", "llama"),
        ("megatron.bridge.models.llama.llama_provider.Llama31ModelProvider8B", "llama"),
        ("megatron.bridge.models.mistral.mistral_provider.MistralSmall3ModelProvider24B", "mistral"),
        ("megatron.bridge.models.qwen.qwen_provider.Qwen25ModelProvider7B", "qwen2"),
        ("megatron.bridge.models.nemotron.nemotron_provider.Nemotron4ModelProvider15B", "nemotron"),
    ],
)
def test_classes_of_all_versions_of_bridge_are_known(target, family, tmp_path):
    folder = bridge(tmp_path / "c")
    describe_otherwise(folder, _target_=target)
    assert open_checkpoint(folder).architecture.family == family


@pytest.mark.parametrize(
    "target",
    [
        "megatron.bridge.models.llama.llama_provider.Llama4ModelProvider",
        "megatron.bridge.models.nemotronh.nemotron_h_provider.NemotronHModelProvider",
        "megatron.bridge.models.qwen_vl.qwen25_vl_provider.Qwen25VLModelProvider",
        "megatron.bridge.models.gpt_oss.gpt_oss_provider.GPTOSSProvider",
        "os.system",
        7,
    ],
)
def test_other_classes_are_refused_by_name(target, tmp_path):
    folder = bridge(tmp_path / "c")
    describe_otherwise(folder, _target_=target)
    with pytest.raises(CheckpointError, match="names the model .*; known are GPTModelProvider"):
        open_checkpoint(folder)


def test_fields_inside_a_transformer_config_are_read(tmp_path):
    """As Bridge's builders keep them, from 0.6 on."""
    folder = bridge(tmp_path / "c")
    expected = open_checkpoint(folder).architecture
    path = folder / "iter_0000000" / "run_config.yaml"
    config = yaml.safe_load(path.read_text())
    outside = ("seq_length", "vocab_size", "share_embeddings_and_output_weights", "position_embedding_type",
               "rotary_base", "rotary_percent", "should_pad_vocab")  # fmt: skip
    model = {name: config["model"].pop(name) for name in outside}
    model |= {
        "_target_": "megatron.training.models.gpt.GPTModelConfig",
        "_builder_": "megatron.training.models.gpt.GPTModelBuilder",
        "transformer": config["model"],
    }
    path.write_text(yaml.safe_dump({**config, "model": model}))
    assert open_checkpoint(folder).architecture == expected


def test_adapters_alone_are_refused(tmp_path):
    folder = bridge(tmp_path / "c")
    path = folder / "iter_0000000" / "run_config.yaml"
    config = {**yaml.safe_load(path.read_text()), "peft": {"_target_": "megatron.bridge.peft.lora.LoRA"}}
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match=r"adapters only \('LoRA'\)"):
        open_checkpoint(folder)


def renamed(folder: Path, number: int) -> Path:
    return (folder / "iter_0000000").rename(folder / f"iter_{number:07d}")


def test_the_iteration_is_the_one_that_is_named_or_given(tmp_path):
    folder = bridge(tmp_path / "c")
    (folder / "latest_train_state.pt").unlink()
    shutil.copytree(folder / "iter_0000000", folder / "iter_0000020")
    describe_otherwise(folder, rotary_base=77)
    bases = {}
    for text in ("0", "20\n"):
        (folder / "latest_checkpointed_iteration.txt").write_text(text)
        found = open_checkpoint(folder)
        bases[text] = found.architecture.rotary_base
        assert "it holds 2 iterations; this is iter_" in "".join(describe(found)["warnings"])
    assert bases == {"0": 77, "20\n": 10000}
    assert open_checkpoint(folder / "iter_0000000").architecture.rotary_base == 77
    (folder / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match="holds iter_0000000, iter_0000020 and no latest_checkpointed_iteration"):
        open_checkpoint(folder)
    shutil.rmtree(folder / "iter_0000020")
    assert open_checkpoint(folder).architecture.rotary_base == 77


def test_a_checkpoint_of_another_iteration_is_refused(tmp_path):
    folder = bridge(tmp_path / "c")
    tracker = folder / "latest_checkpointed_iteration.txt"
    tracker.write_text("5")
    with pytest.raises(CheckpointError, match=r"\.txt names iter_0000005, latest_train_state.pt names iter_0000000"):
        open_checkpoint(folder)
    (folder / "latest_train_state.pt").unlink()
    with pytest.raises(CheckpointError, match="names iter_0000005, which is not there: iter_0000000; "):
        open_checkpoint(folder)
    for text in ("five", "-1", "9" * 99, "²", ""):
        tracker.write_text(text)
        with pytest.raises(CheckpointError, match="names no iteration"):
            open_checkpoint(folder)
    shutil.rmtree(folder / "iter_0000000")
    tracker.write_text("5")
    with pytest.raises(CheckpointError, match="there is no iteration"):
        open_checkpoint(folder)


def test_a_folder_without_a_description_is_refused(tmp_path):
    folder = bridge(tmp_path / "c")
    (folder / "iter_0000000" / "run_config.yaml").unlink()
    for path in (folder, folder / "iter_0000000"):
        with pytest.raises(CheckpointError, match="nothing that says of which model: neither run_config.yaml"):
            open_checkpoint(path)


def test_what_megatron_cannot_say_is_refused_before_anything_is_written(tmp_path):
    start = save("llama31", torch.bfloat16, tmp_path / "start")
    with pytest.raises(CheckpointError, match="original_length 8192 only.*has 1, 4 and 32"):
        run(start, tmp_path / "end", to="bridge")
    assert not (tmp_path / "end").exists()


def test_padding_of_the_vocabulary_is_said_and_read(tmp_path):
    start = save("llama2", torch.bfloat16, tmp_path / "start")
    padded = run(start, tmp_path / "padded", to="bridge", pad_vocab_to_multiple_of=128)
    model = yaml.safe_load((padded / "iter_0000000" / "run_config.yaml").read_text())["model"]
    assert (model["vocab_size"], model["should_pad_vocab"], model["make_vocab_size_divisible_by"]) == (259, True, 128)
    assert open_checkpoint(padded).architecture.vocab_padding == 125
    assert equal(stored(start), stored(run(padded, tmp_path / "end", to="hf")))


class Backend(enum.Enum):
    """Stands for Megatron's enums among its arguments."""

    auto = 5


Backend.__module__, Backend.__qualname__ = "megatron.core.transformer.enums", "AttnBackend"


def arguments(**changes) -> argparse.Namespace:
    """What Megatron-LM keeps of `--swiglu --normalization RMSNorm --group-query-attention ...`."""
    given = {
        "num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 4, "kv_channels": 4,
        "group_query_attention": True, "num_query_groups": 2, "seq_length": 8, "max_position_embeddings": 16,
        "normalization": "RMSNorm", "norm_epsilon": 1e-5, "apply_layernorm_1p": False, "swiglu": True,
        "squared_relu": False, "openai_gelu": False, "add_bias_linear": False, "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": True, "position_embedding_type": "rope", "rotary_base": 10000,
        "rotary_percent": 1.0, "use_rope_scaling": False, "rope_scaling_factor": 8.0, "init_method_std": 0.02,
        "num_experts": None, "multi_latent_attention": False, "qk_layernorm": False, "rotary_interleaved": False,
        "window_size": None, "vocab_size": None, "padded_vocab_size": 32, "make_vocab_size_divisible_by": 128,
        "tensor_model_parallel_size": 1, "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": "meta-llama/Llama-3.1-8B", "params_dtype": torch.bfloat16,
        "exit_signal": signal.SIGTERM, "cp_comm_type": ["p2p"], "data_path": pathlib.PurePosixPath("data"),
        "attention_backend": Backend.auto, "skip": {1, 2},
    }  # fmt: skip
    return argparse.Namespace(**{**given, **changes})


def megatron_lm(folder: Path, namespace: argparse.Namespace, **architecture) -> Path:
    """A checkpoint as Megatron-LM saves one: arguments in its common state, and no tokenizer."""
    import sys
    import types

    bridge(folder, **architecture)
    made = renamed(folder, 1000)
    for name in ("run_config.yaml", "train_state.pt"):
        (made / name).unlink()
    (folder / "latest_train_state.pt").unlink()
    (folder / "latest_checkpointed_iteration.txt").write_text("1000")
    enums = types.ModuleType("megatron.core.transformer.enums")
    enums.AttnBackend = Backend
    known = sys.modules.get(enums.__name__)
    sys.modules[enums.__name__] = enums
    try:
        torch.save({"args": namespace, "checkpoint_version": 3.0, "iteration": 1000}, made / "common.pt")
    finally:
        sys.modules.pop(enums.__name__)
        if known is not None:
            sys.modules[enums.__name__] = known
    return folder


def test_megatron_lms_arguments_are_read_as_data(tmp_path):
    folder = megatron_lm(tmp_path / "c", arguments())
    found = open_checkpoint(folder)
    assert found.architecture == open_checkpoint(bridge(tmp_path / "b")).architecture
    assert found.tokenizer_files.name == "meta-llama/Llama-3.1-8B"
    assert "Megatron-LM" in "".join(describe(found)["warnings"])
    for name, tensor in open_checkpoint(tmp_path / "b").tensors.items():
        assert torch.equal(found.tensors[name].read(), tensor.read())


def test_megatron_lms_arguments_in_other_words(tmp_path):
    """Nemotron's: layernorm1p, squared ReLU, no groups, half of the head rotated, tied, released."""
    stated = {
        "normalization": "LayerNorm", "layernorm_zero_centered_gamma": True, "activation": "squared_relu",
        "gated_linear_unit": False, "rotary_percent": 0.5, "share_embeddings_and_output_weights": True,
    }  # fmt: skip
    given = arguments(
        normalization="LayerNorm", apply_layernorm_1p=True, swiglu=False, squared_relu=True, rotary_percent=0.5,
        untie_embeddings_and_output_weights=False, window_size=(7, 0), use_rope_scaling=True,
    )  # fmt: skip
    folder = megatron_lm(tmp_path / "c", given, **stated)
    (folder / "iter_0001000").rename(folder / "release")
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n")
    found = open_checkpoint(folder).architecture
    assert found.family == "nemotron"
    assert {name: getattr(found, name) for name in stated} == stated
    assert (found.sliding_window, found.rope_scaling.factor, found.layernorm_epsilon) == (8, 8.0, 1e-5)


MEGATRON_LM_REFUSED = {
    "num_experts": (8, "num_moe_experts = 8"),
    "openai_gelu": (True, "openai_gelu asks for an activation"),
    "position_embedding_type": ("learned_absolute", "position_embedding_type = 'learned_absolute'"),
    "num_layers": (None, "does not state num_layers"),
    "norm_epsilon": ("small", "layernorm_epsilon = 'small' is not a number"),
}


@pytest.mark.parametrize("name", MEGATRON_LM_REFUSED)
def test_arguments_of_another_kind_of_model_are_refused(name, tmp_path):
    value, message = MEGATRON_LM_REFUSED[name]
    folder = megatron_lm(tmp_path / "c", arguments(**{name: value}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_file_for_each_rank_is_refused_with_what_to_do(tmp_path):
    folder = tmp_path / "c"
    rank = folder / "iter_0000100" / "mp_rank_00"
    rank.mkdir(parents=True)
    (rank / "model_optim_rng.pt").write_bytes(b"PK")
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    with pytest.raises(CheckpointError, match="--ckpt-convert-format torch_dist"):
        open_checkpoint(folder)


def test_metadata_says_what_megatron_says(tmp_path):
    folder = bridge(tmp_path / "c")
    assert json.loads((folder / "iter_0000000" / "metadata.json").read_text()) == BACKEND
