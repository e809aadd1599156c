"""The streamed cut equals ModelOpt's own (mcore_minitron, layer drop), bit for bit, for the same scores."""

import pytest
import torch

from modelopt_cut import cut as modelopt_cut
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import ImportanceScores
from nemo_minitron.checkpoints.checkpoint import write_checkpoint
from nemo_minitron.checkpoints.names import canonical_shapes
from nemo_minitron.checkpoints.tensors import in_memory
from nemo_minitron.config import PruneTargets
from nemo_minitron.megatron.layout import Layout
from nemo_minitron.pruning.cut import choose, cut
from nemo_minitron.pruning.plan import plan_cut
from sizes import NEMOTRON

CPU = Layout(cuda=False, bf16=False)
SIZES = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8, "num_query_groups": 2,
    "kv_channels": 16, "vocab_size": 128, "seq_length": 32,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "nemotron": NEMOTRON,
    "qwen2": {"family": "qwen2", "add_qkv_bias": True},
    "qwen3": {"family": "qwen3", "qk_layernorm": True},
    "tied": {"share_embeddings_and_output_weights": True},
    "biases": {"add_bias_linear": True},
}  # fmt: skip
TARGETS = {
    "hidden": {"hidden_size": 32},
    "ffn": {"ffn_hidden_size": 48},
    "heads": {"num_attention_heads": 4},
    "depth": {"drop_layers": [2, 3]},
    "all": {"hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 6, "drop_layers": [1]},
}
GRID = {"hidden_size_divisor": 16, "ffn_hidden_size_divisor": 16, "num_layers_divisor": 1}


def random_scores(a: Architecture) -> ImportanceScores:
    generator = torch.Generator().manual_seed(3)
    return ImportanceScores(
        hidden=torch.rand(2 * a.num_layers, a.hidden_size, generator=generator),
        ffn=torch.rand(a.num_layers, a.ffn_hidden_size, generator=generator),
        heads=torch.rand(a.num_layers, a.num_attention_heads * a.kv_channels, generator=generator),
        block_influence=torch.rand(a.num_layers, generator=generator, dtype=torch.float64),
    )


def canonical_names(model) -> dict[str, torch.Tensor]:
    """A Megatron model's tensors by canonical names."""
    found = {}
    for name, value in model.state_dict().items():
        if torch.is_tensor(value):
            name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
            found[name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")] = value
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def teacher(request, tmp_path_factory):
    """A teacher of random weights, on disk."""
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint

    architecture = Architecture(**SIZES, **FAMILIES[request.param])
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: in_memory(torch.randn(shape, generator=generator))
        for name, shape in canonical_shapes(architecture).items()
    }
    path = tmp_path_factory.mktemp("modelopt") / request.param
    write_checkpoint(path, "nemo2", architecture, tensors, None, {})
    return open_checkpoint(path)


@pytest.mark.parametrize("what", TARGETS)
def test_the_cut_is_modelopts_own(teacher, what, tmp_path):
    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.session import engine

    a, targets = teacher.architecture, PruneTargets(**GRID, **TARGETS[what])
    scores = random_scores(a)
    plan = plan_cut(a, targets, scores)
    with engine(1, tmp_path / "log"), parallel_ranks(CPU, 1):
        model = load_model(a, CPU, teacher, local_spec=True)
        modelopt_cut(model, plan, scores, targets)
        expected = canonical_names(model)
    ours = cut(teacher.tensors, plan, choose(scores, a, plan.width))
    student = Architecture.from_dict(plan.student)
    assert {name: tensor.shape for name, tensor in ours.items()} == canonical_shapes(student)
    assert ours.keys() == expected.keys() - (
        {"output_layer.weight"} if a.share_embeddings_and_output_weights else set()
    )
    for name, tensor in ours.items():
        value = tensor.read()
        if a.layernorm_zero_centered_gamma and name.endswith(("layernorm.weight", "layer_norm_weight")):
            value = value + 1.0  # as it is loaded for Megatron's local norm
        assert torch.equal(value, expected[name]), name
