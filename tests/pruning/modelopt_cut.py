"""The same cut by ModelOpt, on a loaded Megatron model."""

from typing import Any

from nemo_minitron.artifacts import ImportanceScores, PruningPlan
from nemo_minitron.config import PruneTargets


def cut(model: Any, plan: PruningPlan, scores: ImportanceScores | None, targets: PruneTargets) -> None:
    """Prunes `model` in place: width first, by the scores, then the layers of the plan.

    The scores are handed to ModelOpt's estimators in place of a forward pass.
    """
    import modelopt.torch.prune as mtp
    from modelopt.torch.opt import ModeloptStateManager
    from modelopt.torch.prune.plugins.mcore_minitron import (
        drop_mcore_language_model_layers,
        get_mcore_minitron_config,
    )

    from nemo_minitron.runtime.modelopt_norms import local_norms_prunable

    if plan.width:
        divisors = {
            "hidden_size_divisor": targets.hidden_size_divisor,
            "ffn_hidden_size_divisor": targets.ffn_hidden_size_divisor,
            "num_layers_divisor": 1,
        }
        with local_norms_prunable():
            mtp.prune(
                model,
                mode=[("mcore_minitron", get_mcore_minitron_config(**divisors))],
                constraints={"export_config": dict(plan.width)},
                dummy_input=None,
                config={"forward_loop": lambda dynamic: restore(dynamic, scores)},
            )
        if ModeloptStateManager.is_converted(model):
            ModeloptStateManager.remove_state(model)
    if plan.drop_layers:
        drop_mcore_language_model_layers(model, layers_to_drop=plan.drop_layers)


def restore(model: Any, scores: ImportanceScores) -> None:
    """Gives saved scores to ModelOpt's estimators on a converted model, as if it had run over the samples."""
    for index, layer in enumerate(model.decoder.layers):
        layer._scores = float(scores.block_influence[index])
        layer.mlp._activations = scores.ffn[index].clone()
        layer.self_attention._activations = scores.heads[index].clone()
    model._activations = dict(enumerate(scores.hidden.clone()))
