"""Second moments of a transformers model's activations, by plain hooks, in float64."""

from collections import defaultdict

import torch


def moments(model: torch.nn.Module, tokens: torch.Tensor, centred: bool, epsilon: float) -> dict[str, torch.Tensor]:
    """By the names of ImportanceScores.moments: of norms' inputs, normalised, and of what o_proj and down_proj read."""
    found = defaultdict(list)
    core, layers = model.model, model.model.layers

    def normalised(x):
        x = x - x.mean(-1, keepdim=True) if centred else x
        return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()

    def watch(module, name, change=lambda x: x):
        return module.register_forward_pre_hook(lambda _, args: found[name].append(change(args[0].double())))

    handles = [watch(core.norm, f"stream.{2 * len(layers)}", normalised)]
    for number, layer in enumerate(layers):
        handles += [
            watch(layer.input_layernorm, f"stream.{2 * number}", normalised),
            watch(layer.post_attention_layernorm, f"stream.{2 * number + 1}", normalised),
            watch(layer.self_attn.o_proj, f"attention.{number}"),
            watch(layer.mlp.down_proj, f"ffn.{number}"),
        ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    rows = {name: torch.cat(values).flatten(0, -2) for name, values in found.items()}
    return {name: (value.T @ value / len(value)).float() for name, value in rows.items()}
