"""Works out what to cut, without loading a model: targets checked against the teacher and the grid."""

from nemo_minitron.architecture import Architecture, PruningGrid, layer_problems, parse_layers
from nemo_minitron.artifacts import DepthScan, ImportanceScores, PruningPlan
from nemo_minitron.config import PruneTargets
from nemo_minitron.errors import ConfigError

WIDTH = ("hidden_size", "ffn_hidden_size", "num_attention_heads")


def target_problems(architecture: Architecture, targets: PruneTargets) -> list[str]:
    """Everything that is wrong with `targets` for a teacher of this architecture."""
    grid = PruningGrid.of(targets)
    sizes = {name: getattr(targets, name) for name in (*WIDTH, "num_layers")}
    problems = grid.problems(architecture, sizes)
    groups = targets.num_query_groups
    if groups is not None and groups != architecture.num_query_groups:
        problems.append(
            f"num_query_groups {groups} differs from the teacher's {architecture.num_query_groups}: "
            "ModelOpt no longer prunes query groups"
        )
    if targets.merge_heads and architecture.qk_layernorm and targets.num_attention_heads is not None:
        problems.append(
            "merge_heads: this model normalises each query after linear_qkv, which takes away what a merged one gains; "
            "leave merge_heads out, and linear_proj is refitted"
        )
    try:
        problems += layer_problems(parse_layers(targets.drop_layers), architecture.num_layers)
    except ValueError as error:
        problems.append(f"drop_layers: {error}")
    return problems


def check_targets(architecture: Architecture, targets: PruneTargets) -> None:
    """Raises one ConfigError with every problem of `targets`."""
    problems = target_problems(architecture, targets)
    if problems:
        raise ConfigError([f"prune.{problem}" for problem in problems], "prune")


def plan_cut(
    architecture: Architecture,
    targets: PruneTargets,
    scores: ImportanceScores | None,
    scan: DepthScan | None = None,
    method: str = "minitron",
) -> PruningPlan:
    """The plan: which layers go and what the student's sizes are.

    Layers are those given, those that the scan chose by the loss without them (arXiv 2408.11796, section 2.3, or with
    maps in their place), or those of the least block influence (arXiv 2407.14679, section 2.2).

    Args:
        scan: needed where it chooses.
    """
    check_targets(architecture, targets)
    drop = sorted(set(parse_layers(targets.drop_layers)))
    if scan is not None and targets.chooses_block:
        drop = list(scan.drop_layers)
    elif scores is not None and targets.num_layers is not None:
        drop = sorted(scores.layers_by_importance()[targets.num_layers :])
    width = {
        name: getattr(targets, name)
        for name in WIDTH
        if getattr(targets, name) is not None and getattr(targets, name) != getattr(architecture, name)
    }
    student = architecture.with_sizes(num_layers=architecture.num_layers - len(drop), **width)
    if targets.untie and method == "compensated":
        student = student.with_sizes(share_embeddings_and_output_weights=False)
    return PruningPlan(
        teacher=architecture.to_dict(), student=student.to_dict(), drop_layers=drop, width=width, method=method
    )
