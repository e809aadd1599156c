"""Independent of the package: a NeMo-2 checkpoint read with torch alone, and the same model in transformers."""

from pathlib import Path

import torch


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a NeMo-2 checkpoint by its key, read with torch.distributed.checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(str(Path(checkpoint) / "weights"))
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def llama(checkpoint: Path, architecture) -> torch.nn.Module:
    """transformers' LlamaForCausalLM with the checkpoint's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    a = architecture
    model = LlamaForCausalLM(LlamaConfig(**_sizes(a), rms_norm_eps=a.layernorm_epsilon))
    target = _common(checkpoint, a)
    for name, weight in list(target.items()):
        if name.endswith("mlp.fc1.weight"):
            prefix = name.removesuffix("fc1.weight")
            target[f"{prefix}gate_proj.weight"], target[f"{prefix}up_proj.weight"] = weight.chunk(2)
            del target[name]
    model.load_state_dict(target, strict=True)
    return model.eval()


def nemotron(checkpoint: Path, architecture) -> torch.nn.Module:
    """transformers' NemotronForCausalLM with the checkpoint's weights."""
    from transformers import NemotronConfig, NemotronForCausalLM

    a = architecture
    partial = {"partial_rotary_factor": a.rotary_percent, "norm_eps": a.layernorm_epsilon, "hidden_act": "relu2"}
    model = NemotronForCausalLM(NemotronConfig(**_sizes(a), **partial))
    target = _common(checkpoint, a)
    model.load_state_dict(
        {name.replace("mlp.fc1", "mlp.up_proj"): value for name, value in target.items()}, strict=True
    )
    return model.eval()


def _sizes(a) -> dict:
    return {
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.kv_channels,
        "rope_theta": a.rotary_base,
        "tie_word_embeddings": False,
        "max_position_embeddings": a.seq_length,
    }


def _common(checkpoint: Path, a) -> dict[str, torch.Tensor]:
    """Weights by transformers' names; the first projection of each MLP whole, as mlp.fc1."""
    state, layer = read_weights(checkpoint), "module.decoder.layers."
    target = {
        "model.embed_tokens.weight": state["module.embedding.word_embeddings.weight"],
        "lm_head.weight": state["module.output_layer.weight"],
    }
    for kind in ("weight", "bias"):
        if f"module.decoder.final_layernorm.{kind}" in state:
            target[f"model.norm.{kind}"] = state[f"module.decoder.final_layernorm.{kind}"]
    for number in range(a.num_layers):
        hf = f"model.layers.{number}."
        q, k, v = split_qkv(state[f"{layer}self_attention.linear_qkv.weight"][number], a)
        target |= {
            f"{hf}self_attn.q_proj.weight": q,
            f"{hf}self_attn.k_proj.weight": k,
            f"{hf}self_attn.v_proj.weight": v,
            f"{hf}self_attn.o_proj.weight": state[f"{layer}self_attention.linear_proj.weight"][number],
            f"{hf}mlp.fc1.weight": state[f"{layer}mlp.linear_fc1.weight"][number],
            f"{hf}mlp.down_proj.weight": state[f"{layer}mlp.linear_fc2.weight"][number],
        }
        for kind in ("weight", "bias"):
            for ours, theirs in (("self_attention.linear_qkv", "input"), ("mlp.linear_fc1", "post_attention")):
                if f"{layer}{ours}.layer_norm_{kind}" in state:
                    target[f"{hf}{theirs}_layernorm.{kind}"] = state[f"{layer}{ours}.layer_norm_{kind}"][number]
    return target


def split_qkv(weight: torch.Tensor, a) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value rows of a fused projection [(n + 2g) * d, h]: each group's queries, its key, its value."""
    per_group = a.num_attention_heads // a.num_query_groups
    grouped = weight.view(a.num_query_groups, per_group + 2, a.kv_channels, -1)
    query, key, value = grouped[:, :per_group], grouped[:, per_group], grouped[:, per_group + 1]
    return tuple(part.reshape(-1, weight.shape[1]).contiguous() for part in (query, key, value))
