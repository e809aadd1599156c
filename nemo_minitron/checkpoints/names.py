"""The canonical view of a model's weights: Megatron's names, one tensor a layer, nothing before them.

Legend: h hidden, f FFN, n heads, g query groups, d head size, v vocabulary rows, l layers.

::

    embedding.word_embeddings.weight                           [v, h]
    decoder.layers.0.self_attention.linear_qkv.layer_norm_weight  [h]      input norm
    decoder.layers.0.self_attention.linear_qkv.weight          [(n+2g)d, h]  each group's queries, its key, its value
    decoder.layers.0.self_attention.q_layernorm.weight         [d]         norms of each head's query and key, where
    decoder.layers.0.self_attention.k_layernorm.weight         [d]         the architecture has them
    decoder.layers.0.self_attention.linear_proj.weight         [h, nd]
    decoder.layers.0.mlp.linear_fc1.layer_norm_weight          [h]         norm before the MLP
    decoder.layers.0.mlp.linear_fc1.weight                     [2f, h] gate above up; [f, h] where there is no gate
    decoder.layers.0.mlp.linear_fc2.weight                     [h, f]
    decoder.final_layernorm.weight                             [h]
    output_layer.weight                                        [v, h]      absent where it is the embedding

and the biases where the architecture has them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.chunked import Chunked
from nemo_minitron.checkpoints.tensors import Joined, Lazy
from nemo_minitron.errors import CheckpointError

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
LAYERS = "decoder.layers."
GATE, UP = "_w", "_v"
#: What checkpoints carry beside weights: Transformer Engine's extra states, optimizer, random states, buffers.
NOT_WEIGHTS = re.compile(
    r"_extra_state|^(chained_\d+\.)?(optimizer|opt_state|opt_param_scheduler)\b|^(rng_state|rerun_state|modelopt_state)"
    r"|rotary_pos_emb\.inv_freq|^(iteration|args|checkpoint_version|content_metadata)\b"
)
SHOWN = 6
EXTRA_STATE = "_extra_state"
#: Modules of a layer that have an extra state with Transformer Engine, for FP8's scales: Megatron asks for it whenever
#: it loads. The attention's is asked for by Megatron core before 0.15, the final norm's with Transformer Engine 2.
WITH_EXTRA_STATE = (
    "self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj", "mlp.linear_fc1",
    "mlp.linear_fc2",
)  # fmt: skip
#: Norms of each head's query and key, which some families have; they have an extra state as well.
QK_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")
FINAL_NORM = "decoder.final_layernorm"


def layer_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name inside a layer -> shape."""
    a = architecture
    fc1 = a.ffn_hidden_size * (2 if a.gated_linear_unit else 1)
    shapes: dict[str, tuple[int, ...]] = {
        "self_attention.linear_qkv.layer_norm_weight": (a.hidden_size,),
        "self_attention.linear_qkv.weight": (a.qkv_rows(), a.hidden_size),
        **{f"{norm}.weight": (a.kv_channels,) for norm in QK_NORMS if a.qk_layernorm},
        "self_attention.linear_proj.weight": (a.hidden_size, a.num_attention_heads * a.kv_channels),
        "mlp.linear_fc1.layer_norm_weight": (a.hidden_size,),
        "mlp.linear_fc1.weight": (fc1, a.hidden_size),
        "mlp.linear_fc2.weight": (a.hidden_size, a.ffn_hidden_size),
    }
    if a.normalization == "LayerNorm":
        shapes["self_attention.linear_qkv.layer_norm_bias"] = (a.hidden_size,)
        shapes["mlp.linear_fc1.layer_norm_bias"] = (a.hidden_size,)
        shapes |= {f"{norm}.bias": (a.kv_channels,) for norm in QK_NORMS if a.qk_layernorm}
    if a.add_bias_linear or a.add_qkv_bias:
        shapes["self_attention.linear_qkv.bias"] = (a.qkv_rows(),)
    if a.add_bias_linear:
        shapes["self_attention.linear_proj.bias"] = (a.hidden_size,)
        shapes["mlp.linear_fc1.bias"] = (fc1,)
        shapes["mlp.linear_fc2.bias"] = (a.hidden_size,)
    return shapes


def outer_shapes(architecture: Architecture) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of what comes before the layers and of what comes after them."""
    a = architecture
    after: dict[str, tuple[int, ...]] = {f"{FINAL_NORM}.weight": (a.hidden_size,)}
    if a.normalization == "LayerNorm":
        after[f"{FINAL_NORM}.bias"] = (a.hidden_size,)
    if not a.share_embeddings_and_output_weights:
        after[OUTPUT] = (a.vocab_size, a.hidden_size)
    return {EMBEDDING: (a.vocab_size, a.hidden_size)}, after


def canonical_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every weight, in the order of a forward pass."""
    before, after = outer_shapes(architecture)
    layer = layer_shapes(architecture)
    layers = {
        f"{LAYERS}{number}.{name}": shape for number in range(architecture.num_layers) for name, shape in layer.items()
    }
    return before | layers | after


def by_canonical_name(tensors: Mapping[str, Chunked], source: str | Path) -> dict[str, Lazy]:
    """Tensors under Megatron's keys, of any style, by their canonical names.

    Takes stacked layers (`decoder.layers.mlp...` [l, ...]), layers by number, fc1 in two halves (`_w`, `_v`), and any
    prefix (`model.`, `module.`); passes over what is no weight.

    Raises:
        CheckpointError: there is no embedding, so this is no GPT model of Megatron.
    """
    prefix = prefix_of(tensors, source)
    named: dict[str, Lazy] = {}
    for key, tensor in tensors.items():
        if NOT_WEIGHTS.search(key):
            continue
        name = key.removeprefix(prefix) if key.startswith(prefix) else key
        inner = name.removeprefix(LAYERS)
        if name.startswith(LAYERS) and not inner[:1].isdigit():
            for number in range(tensor.shape[0] if tensor.shape else 0):
                named[f"{LAYERS}{number}.{inner}"] = tensor.layer(number)
        else:
            named[name] = tensor.checked()
    return _joined(named, source)


def prefix_of(names: Iterable[str], source: str | Path) -> str:
    """What stands before Megatron's names: ``model.``, ``module.``, or more, by what wrapped the model.

    Raises:
        CheckpointError: there is no embedding, so this is no GPT model of Megatron.
    """
    for name in names:
        if name.endswith(EMBEDDING) and not NOT_WEIGHTS.search(name):
            return name.removesuffix(EMBEDDING)
    raise CheckpointError(f"{source} has no tensor {EMBEDDING}: it holds no GPT model with Megatron-core's names")


def _joined(tensors: dict[str, Lazy], source: str | Path) -> dict[str, Lazy]:
    """Halves of fc1 put together, the gate above."""
    for name in [name for name in tensors if name.endswith(GATE) and "linear_fc1." in name]:
        whole, gate = name.removesuffix(GATE), tensors.pop(name)
        up = tensors.pop(f"{whole}{UP}", None)
        if up is None or up.dtype != gate.dtype or up.shape[1:] != gate.shape[1:]:
            raise CheckpointError(f"{source}: {name} has no fitting other half {whole}{UP}")
        tensors[whole] = Joined((gate, up))
    return tensors


def layers_in(names: Iterable[str]) -> int:
    """Layers that canonical names mention: the highest number and one."""
    numbers = [int(number) for name in names if name.startswith(LAYERS) and (number := name.split(".")[2]).isdecimal()]
    return max(numbers, default=-1) + 1


def checked(tensors: Mapping[str, Lazy], architecture: Architecture, source: str | Path) -> dict[str, Lazy]:
    """The tensors in the order of a forward pass, once they are just those of the architecture.

    Raises:
        CheckpointError: a tensor is missing, is left over, or has another shape; they are named.
    """
    layers = layers_in(tensors)
    if layers != architecture.num_layers:
        raise CheckpointError(f"{source} has {layers} layers, the configuration says {architecture.num_layers}")
    expected = canonical_shapes(architecture)
    problems = []
    missing, left_over = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    for title, names in (("missing", missing), ("left over", left_over)):
        if names:
            problems.append(f"{title}: {_some(sorted(names))}")
    wrong = [
        f"{name} is {tensors[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        problems.append(f"of another shape: {_some(wrong)}")
    if problems:
        raise CheckpointError(
            f"{source} does not hold the weights that its configuration describes; {'; '.join(problems)}"
        )
    return {name: tensors[name] for name in expected}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def extra_states(num_layers: int, weights: Iterable[str] = ()) -> Iterator[str]:
    """Keys of the extra states of a model with Transformer Engine, one a shard, as Megatron stacks them.

    Args:
        weights: the model's stacked keys, which tell whether it has norms of queries and keys.
    """
    modules = {key.removeprefix(LAYERS).rpartition(".")[0] for key in weights}
    names = (*WITH_EXTRA_STATE, *(norm for norm in QK_NORMS if norm in modules))
    for layer in range(num_layers):
        for name in names:
            yield f"{LAYERS}{name}.{EXTRA_STATE}/shard_{layer}_{num_layers}"
    yield f"{FINAL_NORM}.{EXTRA_STATE}/shard_0_1"


def stacked(tensors: Mapping[str, Lazy], num_layers: int) -> Iterator[tuple[str, int, int, Lazy]]:
    """(key, layer or -1, layers of the stack, tensor) as Megatron stacks them, the layers of a key in order."""
    layer_keys = dict.fromkeys(name.split(".", 3)[3] for name in tensors if name.startswith(LAYERS))
    for name, tensor in tensors.items():
        if not name.startswith(LAYERS):
            yield name, -1, 1, tensor
    for key in layer_keys:
        for number in range(num_layers):
            yield f"{LAYERS}{key}", number, num_layers, tensors[f"{LAYERS}{number}.{key}"]
