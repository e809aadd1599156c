"""Arguments of Megatron-LM, a namespace in a checkpoint's common state, in the words of Megatron Core's fields."""

from typing import Any

from nemo_minitron.architecture import SAME_IN_MEGATRON
from nemo_minitron.checkpoints.formats.bridge.run_config import TOKENIZER_TYPES, hub_name
from nemo_minitron.checkpoints.storage.pickles import StandIn
from nemo_minitron.checkpoints.tokenizer import HUGGINGFACE
from nemo_minitron.errors import CheckpointError

ARGUMENTS = "args"
#: Field -> argument, where they have other names.
RENAMED = {
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
KEPT = (
    *SAME_IN_MEGATRON, "position_embedding_type", "rope_scaling_factor", "window_size", "make_vocab_size_divisible_by",
    "tensor_model_parallel_size", "multi_latent_attention", "qk_l2_norm", "mtp_num_layers",
    "is_hybrid_model", "heterogeneous_layers_config_path", "rotary_interleaved", "no_rope_freq",
    "window_attn_skip_freq", "softmax_scale", "softmax_type", "attention_output_gate", "experimental_attention_variant",
    "activation_func_clamp_value", "glu_linear_offset", "apply_residual_connection_post_layernorm",
)  # fmt: skip
#: Flag -> activation that it stands for, and whether it is gated; none is set for GELU.
ACTIVATIONS = {"swiglu": ("silu", True), "squared_relu": ("squared_relu", False)}
#: Flags of other activations, which are not known here.
OTHER_ACTIVATIONS = ("quick_geglu", "openai_gelu", "onnx_safe")


def read(namespace: Any, source: str) -> dict[str, Any]:
    """Fields of a model, by Megatron Core's names.

    Args:
        namespace: `args` of the common state, as an inert object.
        source: the checkpoint, for messages.

    Raises:
        CheckpointError: it is no namespace, or its activation is not known here.
    """
    if not isinstance(namespace, StandIn):
        raise CheckpointError(f"{source}: args is no namespace of arguments")
    given = vars(namespace)
    values = {name: given[name] for name in KEPT if name in given}
    values |= {name: given[argument] for name, argument in RENAMED.items() if argument in given}
    others = [name for name in OTHER_ACTIVATIONS if given.get(name)]
    if others:
        raise CheckpointError(f"{source}: args.{others[0]} asks for an activation that is not known here")
    kinds = [kind for flag, kind in ACTIVATIONS.items() if given.get(flag)] or [("gelu", False)]
    values["activation_func"], values["gated_linear_unit"] = kinds[0]
    values["layernorm_epsilon"] = given.get("layernorm_epsilon", given.get("norm_epsilon"))
    values["layernorm_zero_centered_gamma"] = bool(
        given.get("layernorm_zero_centered_gamma", given.get("apply_layernorm_1p", False))
    )
    values["share_embeddings_and_output_weights"] = not given.get("untie_embeddings_and_output_weights", False)
    values["seq_length"] = given.get("max_position_embeddings") or given.get("seq_length")
    values["num_query_groups"] = given.get("num_query_groups") if given.get("group_query_attention") else None
    values["add_qkv_bias"] = bool(given.get("add_qkv_bias", False))
    values["qk_layernorm"] = bool(given.get("qk_layernorm", False))
    return values


def tokenizer_name(namespace: StandIn) -> str | None:
    """The tokenizer's name on the hub; Megatron-LM's checkpoints do not hold its files."""
    given = vars(namespace)
    if given.get("tokenizer_type") != TOKENIZER_TYPES[HUGGINGFACE]:
        return None
    return hub_name(given.get("tokenizer_model"))
