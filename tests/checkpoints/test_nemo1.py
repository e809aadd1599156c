"""NeMo-1 archives as Megatron and NeMo wrote them: zarr, torch_dist and single files, however they are packed."""

import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from models import equal
from nemo_minitron.architecture import Architecture, RopeScaling
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.errors import CheckpointError
from nemo_minitron.megatron.layout import Layout

CPU = Layout(cuda=False, bf16=False)
ARCHITECTURE = Architecture(
    family="llama", num_layers=3, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2,
    kv_channels=16, vocab_size=256, seq_length=32, rotary_base=500000.0, rope_scaling=RopeScaling(),
)  # fmt: skip
#: model_config.yaml as NeMo 24.07's converters leave it for Llama 3.1 (the interpolation factor is their mistake).
LLAMA31 = {
    "mcore_gpt": True, "transformer_engine": True, "num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 96,
    "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": None, "activation": "fast-swiglu",
    "normalization": "rmsnorm", "layernorm_epsilon": 1e-5, "position_embedding_type": "rope",
    "rotary_percentage": 1.0, "rotary_base": 500000, "scale_positional_embedding": True,
    "seq_len_interpolation_factor": 8, "share_embeddings_and_output_weights": False, "bias": False,
    "encoder_seq_length": 32, "max_position_embeddings": 32, "make_vocab_size_divisible_by": 128,
    "tokenizer": {"library": "huggingface", "type": "meta-llama/Meta-Llama-3.1-8B", "model": None, "use_fast": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """model_weights/ written by Megatron in both backends, model_weights.ckpt by torch, and the model's own state."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy

    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.session import engine

    root = tmp_path_factory.mktemp("nemo1")
    with engine(5, root / "log"), parallel_ranks(CPU, 5):
        model = load_model(ARCHITECTURE, CPU, None).bfloat16()
        for backend in ("zarr", "torch_dist"):
            folder = root / backend / "model_weights"
            folder.mkdir(parents=True)
            strategy = get_default_save_sharded_strategy(backend)
            dist_checkpointing.save(model.sharded_state_dict(prefix="model."), str(folder), strategy)
        state = model.state_dict()
        (root / "ckpt").mkdir()
        torch.save(in_transformer_engines_names(state), root / "ckpt" / "model_weights.ckpt")
    for kind in ("zarr", "torch_dist", "ckpt"):
        (root / kind / "model_config.yaml").write_text(yaml.safe_dump(LLAMA31))
    return root, {name: value for name, value in state.items() if torch.is_tensor(value)}


def in_transformer_engines_names(state: dict) -> dict:
    """The keys of a model with Transformer Engine's layers, with extra states, as model_weights.ckpt has them."""
    import io

    renamed = {}
    for name, value in state.items():
        name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        renamed[f"model.{name.replace('pre_mlp_layernorm.', 'mlp.linear_fc1.layer_norm_')}"] = value
    renamed["model.decoder.layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"fp8")
    renamed["model.decoder.layers.0.mlp.linear_fc2._extra_state"] = None
    return renamed


def opened(path: Path) -> tuple[Architecture, str, dict[str, torch.Tensor]]:
    """What is read there: architecture, dtype, and every tensor."""
    checkpoint = open_checkpoint(path)
    tensors = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    return checkpoint.architecture, checkpoint.dtype, tensors


def in_canonical_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Megatron's own tensors in bf16; only names are normalised."""
    return {
        name.removeprefix("model."): value.bfloat16()
        for name, value in in_transformer_engines_names(state).items()
        if torch.is_tensor(value)
    }


def pack(folder: Path, target: Path, mode: str = "w", prefix: str = "./") -> Path:
    with tarfile.open(target, mode) as archive:
        for path in sorted(folder.rglob("*")):
            archive.add(path, f"{prefix}{path.relative_to(folder).as_posix()}", recursive=False)
    return target


@pytest.mark.parametrize("kind", ["zarr", "torch_dist", "ckpt"])
@pytest.mark.parametrize("packed", ["w", "w:gz", "no ./", "in a folder", "unpacked", "from NGC"])
def test_what_megatron_wrote_is_read_bit_for_bit(saved, kind, packed, tmp_path):
    root, state = saved
    if packed == "unpacked":
        path = root / kind
    elif packed == "from NGC":
        path = tmp_path / "llama-3_1-8b-nemo_v1.0"
        path.mkdir()
        pack(root / kind, path / "llama3_1_8b.nemo")
    else:
        prefix = {"no ./": "", "in a folder": "model/"}.get(packed, "./")
        path = pack(root / kind, tmp_path / "a.nemo", packed if packed.startswith("w") else "w", prefix)
    architecture, dtype, tensors = opened(path)
    assert (architecture, dtype) == (ARCHITECTURE, "bfloat16")
    assert equal(tensors, in_canonical_names(state))


def test_a_tokenizer_that_is_only_a_name_travels_as_that_name(saved, tmp_path):
    root, _ = saved
    tokenizer = open_checkpoint(root / "zarr").tokenizer_files
    assert (tokenizer.name, dict(tokenizer.files)) == ("meta-llama/Meta-Llama-3.1-8B", {})


@pytest.mark.parametrize("style", ["per layer", "halves", "halves stacked"])
def test_every_style_of_keys_is_read(saved, style, tmp_path):
    """Keys by layer number, and fc1 in `_w` and `_v`, as singleton_local_shards saves it."""
    root, state = saved
    flat = {k: v for k, v in in_transformer_engines_names(state).items() if torch.is_tensor(v)}
    if style != "per layer":
        for name in [name for name in flat if name.endswith("linear_fc1.weight")]:
            flat[f"{name}_w"], flat[f"{name}_v"] = (half.contiguous() for half in flat.pop(name).chunk(2))
    if style == "halves stacked":
        stacked: dict = {}
        for name, value in flat.items():
            parts = name.split(".")
            if parts[2:3] != ["layers"]:
                stacked[name] = value
                continue
            stacked.setdefault(".".join([*parts[:3], *parts[4:]]), {})[int(parts[3])] = value
        flat = {
            name: torch.stack([value[i] for i in sorted(value)]) if isinstance(value, dict) else value
            for name, value in stacked.items()
        }
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(LLAMA31))
    torch.save(flat, tmp_path / "model_weights.ckpt")
    architecture, dtype, tensors = opened(tmp_path)
    assert (architecture, dtype) == (ARCHITECTURE, "bfloat16")
    assert equal(tensors, in_canonical_names(state))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mcore_gpt": False}, "mcore_gpt is false"),
        ({"position_embedding_type": "learned_absolute"}, "known is rope"),
        ({"num_layers": 4}, "3 layers, the configuration says 4"),
        ({"ffn_hidden_size": 128}, "of another shape: decoder.layers.0.mlp.linear_fc1.weight"),
        ({"share_embeddings_and_output_weights": True}, "left over: output_layer.weight"),
        ({"bias": True}, "missing: decoder.layers.0.mlp.linear_fc1.bias"),
        ({"activation": "reglu"}, "activation 'reglu' is not known"),
        ({"scale_positional_embedding": False}, "seq_len_interpolation_factor"),
        ({"hidden_size": "big"}, "hidden_size = 'big' is not a size"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_name(saved, changes, message, tmp_path):
    root, _ = saved
    for name in ("model_weights.ckpt",):
        (tmp_path / name).write_bytes((root / "ckpt" / name).read_bytes())
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump({**LLAMA31, **changes}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_keys_from_before_megatron_core_are_named(tmp_path):
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(LLAMA31))
    key = "model.language_model.encoder.layers.0.self_attention.dense.weight"
    torch.save({key: torch.zeros(2)}, tmp_path / "model_weights.ckpt")
    with pytest.raises(CheckpointError, match="before Megatron core"):
        open_checkpoint(tmp_path)


def test_families_are_told_apart(saved, tmp_path):
    """A configuration names no family; what it describes does."""
    from nemo_minitron.checkpoints.files import folder_files
    from nemo_minitron.checkpoints.formats.nemo1 import config as nemo1

    root, _ = saved
    config = nemo1.read_yaml(folder_files(root / "zarr"))
    cases = {
        "nemotron": {"normalization": "layernorm1p", "activation": "squared-relu"},
        "qwen2": {"qkv_bias": True},
        "qwen3": {"qk_layernorm": True},
        "mistral": {"tokenizer": {"type": "mistralai/Mistral-Nemo-Base-2407"}},
        "gpt": {"activation": "gelu"},
        "llama": {},
    }
    for family, changes in cases.items():
        assert nemo1.read_architecture({**config, **changes}, 256, "test").family == family
