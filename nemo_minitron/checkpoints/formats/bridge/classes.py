"""What a Megatron-Bridge checkpoint calls things: files, Bridge's classes of each family, fields of their models."""

import re
from typing import Any

#: Of an iteration's folder.
RUN_CONFIG, TRAIN_STATE, TOKENIZER_FOLDER = "run_config.yaml", "train_state.pt", "tokenizer"
#: Of the folder above it: the iteration that is the latest.
TRACKER, LATEST_STATE = "latest_checkpointed_iteration.txt", "latest_train_state.pt"
#: What Megatron-LM calls a checkpoint that is of no iteration.
RELEASE = "release"
#: Weights of Megatron-LM that are no distributed checkpoint: a file a rank.
LEGACY = "model_optim_rng.pt"

MODELS = "megatron.bridge.models"
GPT_PROVIDER = f"{MODELS}.gpt_provider.GPTModelProvider"
#: Family -> the provider that is written, where it is another than GPTModelProvider.
PROVIDERS = {"mistral": f"{MODELS}.mistral.mistral_provider.MistralModelProvider"}
#: Names of Bridge's model classes, of all versions so far -> family; None: the fields tell.
FAMILY_OF_CLASS = (
    (re.compile(r"GPTModel(Provider|Config)|GPTProvider\w+"), None),
    (re.compile(r"(Code)?Llama(2|3|31|32)?ModelProvider\w*"), "llama"),
    (re.compile(r"Mistral(Small3)?ModelProvider\w*"), "mistral"),
    (re.compile(r"Nemotron[34]?ModelProvider\w*"), "nemotron"),
    (re.compile(r"Qwen(2|25)ModelProvider\w*"), "qwen2"),
    (re.compile(r"Qwen3ModelProvider\w*"), "qwen3"),
)
KNOWN_CLASSES = "GPTModelProvider, GPTModelConfig, and those of Llama, Mistral, Nemotron, Qwen2 and Qwen3"

#: Last name of the function in `activation_func` -> name in Architecture.
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "squared_relu": "squared_relu"}
WRITTEN_ACTIVATIONS = {
    "silu": "torch.nn.functional.silu",
    "gelu": "torch.nn.functional.gelu",
    "squared_relu": "megatron.core.activations.squared_relu",
}
#: Field -> what it says of a dense model with rotary positions; absent and null are taken too. Any other value is of
#: another kind of models.
DENSE: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "num_moe_experts": (),
    "multi_latent_attention": (False,),
    "qk_l2_norm": (False,),
    "mtp_num_layers": (0,),
    "is_hybrid_model": (False,),
    "heterogeneous_block_specs": (False,),
    "heterogeneous_layers_config_path": (),
    "rotary_interleaved": (False,),
    "seq_len_interpolation_factor": (1,),
    "no_rope_freq": (),
    "window_attn_skip_freq": (),
    "softmax_scale": (),
    "softmax_type": ("vanilla",),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (),
    "activation_func_clamp_value": (),
    "glu_linear_offset": (0,),
    "apply_residual_connection_post_layernorm": (False,),
}
