"""A Megatron GPTModel by Megatron Core alone, for where NeMo's LLM collection is not: containers from 26.04 on.

It runs forward (scores, scans of blocks, logits); training is NeMo's. Megatron's local layer spec without fusions.
"""

from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import SAME_IN_MEGATRON, Architecture, RopeScaling
from nemo_minitron.checkpoints.formats.nemo2.engine import activation_functions

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from torch import Tensor

#: Fields of Architecture that are arguments of GPTModel and no fields of its config.
OF_THE_MODEL = ("seq_length", "share_embeddings_and_output_weights", "rotary_base", "rotary_percent")


def core_config(architecture: Architecture, **engine: Any) -> "TransformerConfig":
    """Megatron Core's config of `architecture`, with the values that NeMo's config of it has.

    Args:
        engine: further fields that say how to run and not what to run (fusions, initialization...).
    """
    from megatron.core.transformer import TransformerConfig

    fields = {name: getattr(architecture, name) for name in SAME_IN_MEGATRON if name not in OF_THE_MODEL}
    fields |= {
        "activation_func": activation_functions()[architecture.activation],
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": False,
        "deallocate_pipeline_outputs": True,
        "cp_comm_type": "a2a" if architecture.sliding_window else None,
    }
    return TransformerConfig(**{**fields, **engine})


def torch_layers(config: "TransformerConfig") -> "TransformerBlockSubmodules":
    """Megatron's local layer spec with norms, gates and attention of ours: this stage's layers and the final norm.

    Left to itself Megatron takes Apex's LayerNorm and Transformer Engine's final norm wherever these are installed,
    which run on a GPU only.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    from nemo_minitron.megatron.attention import TorchAttention
    from nemo_minitron.megatron.local_layers import LocalNorm, SwiGLU

    layer = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = LocalNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = TorchAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = LocalNorm
    if getattr(config, "use_te_activation_func", False):  # which says that the activation is one of the submodules
        layer.submodules.mlp.submodules.activation_func = SwiGLU
    layers = [layer] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=LocalNorm)


def core_model(config: "TransformerConfig", architecture: Architecture) -> "GPTModel":
    """This pipeline stage's part of the GPTModel; call it inside ``parallel_ranks()``."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    model = GPTModel(
        config,
        transformer_layer_spec=torch_layers(config),
        vocab_size=architecture.vocab_size,
        max_sequence_length=architecture.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=architecture.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=architecture.rotary_percent,
        rotary_base=architecture.rotary_base,
    )
    if architecture.rope_scaling is not None:
        rope = model.rotary_pos_emb
        rope.inv_freq = scaled_frequencies(rope.inv_freq, architecture.rope_scaling)
    return model


def scaled_frequencies(frequencies: "Tensor", scaling: RopeScaling) -> "Tensor":
    """Rotary frequencies of Llama 3.1 and later [d/2]; Megatron's own `rope_scaling` fixes all values but the factor.

    With wavelength w = 2 pi / f, original length L, low and high frequency factors a and b:
    f where w < L/b, f / factor where w > L/a, between them (1 - t) f / factor + t f with t = (L/w - a) / (b - a)
    (Llama 3.1's reference code, github.com/meta-llama/llama-models, models/llama3/model.py).
    """
    import math

    import torch

    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_length / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    slowed = torch.where(wavelengths > scaling.original_length / low, frequencies / scaling.factor, between)
    return torch.where(wavelengths < scaling.original_length / high, frequencies, slowed)
