"""NeMo's own objects for an architecture: its config and its model, without weights. All functions import NeMo."""

from typing import Any

from nemo_minitron.architecture import SAME_IN_MEGATRON, Architecture
from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.checkpoints.formats.nemo2.classes import CLASSES, ROPE_SCALING


def activation_functions() -> dict[str, Any]:
    """Name in Architecture -> the function that Megatron's configs hold; imports Megatron."""
    import torch.nn.functional as functional
    from megatron.core.activations import squared_relu

    return {"silu": functional.silu, "gelu": functional.gelu, "squared_relu": squared_relu}


def nemo_config(architecture: Architecture, **engine: Any) -> Any:
    """NeMo's config object (a dataclass of nemo.collections.llm) for `architecture`; imports NeMo.

    Args:
        engine: further fields that say how to run and not what to run (fusions, initialization...).
    """
    from nemo.collections import llm
    from nemo.collections.llm.gpt.model import llama

    fields = {name: getattr(architecture, name) for name in SAME_IN_MEGATRON}
    fields |= {
        "vocab_size": architecture.vocab_size,
        "activation_func": activation_functions()[architecture.activation],
        "position_embedding_type": "rope",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    class_name = CLASSES[architecture.family][1]
    if architecture.family == "mistral":
        window = [architecture.sliding_window, 0] if architecture.sliding_window else None
        fields |= {"window_size": window, "cp_comm_type": "a2a" if window else None}
    if architecture.rope_scaling is not None:
        class_name = "Llama31Config"
        fields |= {theirs: getattr(architecture.rope_scaling, ours) for theirs, ours in ROPE_SCALING.items()}
    # Llama31Config without sizes is not among llm's own names.
    kind = getattr(llm, class_name, None) or getattr(llama, class_name)
    return kind(**fields, **engine)


def nemo_model(architecture: Architecture, tokenizer_dir: str | None = None) -> Any:
    """NeMo's model object for `architecture`, without weights, as plain NeMo would load it; imports NeMo.

    Where Transformer Engine is not installed, the one fusion that NeMo's configs refuse without it is left off.
    """
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.llm.gpt.model.base import HAVE_TE

    config = nemo_config(architecture, **({} if HAVE_TE else {"apply_rope_fusion": False}))
    tokenizer = AutoTokenizer(tokenizers.loadable(tokenizer_dir), use_fast=True) if tokenizer_dir else None
    return getattr(llm, CLASSES[architecture.family][0])(config, tokenizer=tokenizer)
