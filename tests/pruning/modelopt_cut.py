"""The same cut by ModelOpt, of whichever version, on a loaded Megatron model."""

from typing import Any

from nemo_minitron.artifacts import ImportanceScores, PruningPlan
from nemo_minitron.config import PruneTargets
from nemo_minitron.pruning.importance.scoring import with_values


def cut(model: Any, plan: PruningPlan, scores: ImportanceScores | None, targets: PruneTargets) -> None:
    """Prunes `model` in place: width first, by the scores, then the layers of the plan.

    The scores are handed to ModelOpt's estimators in place of a forward pass.
    """
    import modelopt.torch.prune as mtp
    from modelopt.torch.opt import ModeloptStateManager
    from modelopt.torch.prune.plugins.mcore_minitron import SUPPORTED_HPARAMS, MCoreMinitronConfig

    from nemo_minitron.megatron.modelopt_norms import local_norms_prunable

    if plan.width:
        divisors = {
            "hidden_size_divisor": targets.hidden_size_divisor,
            "ffn_hidden_size_divisor": targets.ffn_hidden_size_divisor,
            "num_layers_divisor": 1,
        }
        sizes, groups = dict(plan.width), []
        old = "num_query_groups" in SUPPORTED_HPARAMS
        if old and "num_attention_heads" in sizes:
            sizes["num_query_groups"] = model.config.num_query_groups

        def calibrate(dynamic: Any) -> None:
            restore(dynamic, scores)
            if "num_query_groups" in sizes:
                groups.extend(group_order(layer.self_attention) for layer in dynamic.decoder.layers)

        with local_norms_prunable():
            mtp.prune(
                model,
                mode=[("mcore_minitron", with_values(MCoreMinitronConfig(), divisors))],
                constraints={"export_config": sizes},
                dummy_input=None,
                config={"forward_loop": calibrate},
            )
        if ModeloptStateManager.is_converted(model):
            ModeloptStateManager.remove_state(model)
        for layer, order in zip(model.decoder.layers, groups):
            put_back(layer.self_attention, order)
    if plan.drop_layers:
        dropper()(model, layers_to_drop=plan.drop_layers)


def dropper() -> Any:
    """ModelOpt's function that drops layers; it moved with 0.41."""
    try:
        from modelopt.torch.prune.plugins.mcore_minitron import drop_mcore_language_model_layers
    except ImportError:
        from modelopt.torch.nas.plugins.megatron import drop_mcore_language_model_layers
    return drop_mcore_language_model_layers


def restore(model: Any, scores: ImportanceScores) -> None:
    """Gives saved scores to ModelOpt's estimators on a converted model, as if it had run over the samples."""
    for index, layer in enumerate(model.decoder.layers):
        layer._scores = float(scores.block_influence[index])
        layer.mlp._activations = scores.ffn[index].clone()
        layer.self_attention._activations = scores.heads[index].clone()
    model._activations = dict(enumerate(scores.hidden.clone()))


def group_order(attention: Any) -> Any:
    """How ModelOpt before 0.41 sorts the query groups [g], by an importance of theirs: it prunes them too."""
    return attention._estimate_query_group_importance().argsort(descending=True)


def put_back(attention: Any, order: Any) -> None:
    """Puts sorted query groups back in their places; a model computes the same with its groups in any order."""
    import torch

    qkv, projection = attention.linear_qkv, attention.linear_proj
    for parameter, axis in ((qkv.weight, 0), (qkv.bias, 0), (projection.weight, 1)):
        if parameter is not None:
            groups = parameter.data.chunk(len(order), dim=axis)
            parameter.data = torch.cat([groups[place] for place in order.argsort()], dim=axis)
