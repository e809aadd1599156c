"""Teacher and students drawn to scale."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture, human
from nemo_minitron.report.figures import unit_of
from nemo_minitron.report.style import NARROW, Theme, new_figure, picture, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@picture
def shapes(models: Sequence[tuple[str, Architecture, Sequence[int]]], *, theme: Theme) -> "Figure":
    """Models to scale: a box is as wide as the hidden size, and its area is its share of the parameters.

    The height of a box is therefore its parameters over the hidden size. Each student's layers stand where the
    teacher's are, dashed outlines show the teacher's.

    Args:
        models: name, architecture and layers dropped (1-based); the teacher first.
    """
    from matplotlib.patches import Rectangle

    teacher = models[0][1]
    embedding, layer, output = _heights(teacher)
    total = embedding + layer * teacher.num_layers + output
    scale, unit = unit_of(total)
    gap = 0.35 * teacher.hidden_size
    made, axes = new_figure(max(NARROW, 1.2 + 1.4 * len(models)), 4.4)

    def box(x: float, y: float, width: float, height: float, **look: Any) -> None:
        axes.add_patch(Rectangle((x, y / scale), width, height / scale, **look))

    centres = []
    for index, (_, model, dropped) in enumerate(models):
        left = index * (teacher.hidden_size + gap) + (teacher.hidden_size - model.hidden_size) / 2
        outline = index * (teacher.hidden_size + gap)
        centres.append(outline + teacher.hidden_size / 2)
        own = _heights(model)
        places = [place for place in range(teacher.num_layers) if place + 1 not in dropped]
        if index:
            for place in range(teacher.num_layers):
                box(outline, embedding + place * layer, teacher.hidden_size, layer, fill=False, linestyle=(0, (2, 2)),
                    edgecolor=theme.faint, linewidth=0.8)  # fmt: skip
        box(left, 0, model.hidden_size, own[0], facecolor=theme.fill, edgecolor=theme.ink, hatch="///")
        attention = _attention_height(model)
        for place in places[: model.num_layers]:
            y = embedding + place * layer
            box(left, y, model.hidden_size, attention, facecolor=theme.orange, edgecolor=theme.ink, linewidth=0.8)
            box(left, y + attention, model.hidden_size, own[1] - attention, facecolor=theme.blue, edgecolor=theme.ink,
                linewidth=0.8)  # fmt: skip
        if own[2]:
            box(left, embedding + teacher.num_layers * layer, model.hidden_size, own[2], facecolor=theme.fill,
                edgecolor=theme.ink, hatch="\\\\\\")  # fmt: skip
    axes.set_xlim(-gap / 2, len(models) * (teacher.hidden_size + gap) - gap / 2)
    axes.set_ylim(0, total / scale * 1.02)
    axes.set_xticks(centres, [_shape_label(name, model, teacher) for name, model, _ in models])
    axes.tick_params(axis="x", length=0)
    axes.grid(False)
    axes.set_xlabel("width of a box: hidden size (channels); its area: parameters")
    axes.set_ylabel(f"parameters / hidden size ({unit} of rows)" if scale > 1 else "parameters / hidden size (rows)")
    axes.set_title("Teacher and students, to scale")
    _shape_legend(made, theme)
    return made


def _heights(model: Architecture) -> tuple[float, float, float]:
    """Rows of hidden_size that the embedding, a layer, and the output with the final norm have."""
    embedding = model.vocab_size * model.hidden_size
    output = model.embedding_parameters() - embedding
    h = model.hidden_size
    return embedding / h, model.layer_parameters() / h, output / h


def _attention_height(model: Architecture) -> float:
    return model.qkv_rows() + model.num_attention_heads * model.kv_channels


def _shape_label(name: str, model: Architecture, teacher: Architecture) -> str:
    share = "" if model is teacher else f" ({model.parameters() / teacher.parameters():.0%})"
    return (
        f"{short(name)}\n{human(model.parameters())}{share}\n{model.num_layers} layers\n"
        f"hidden {model.hidden_size}\nFFN {model.ffn_hidden_size}"
    )


def _shape_legend(made: "Figure", theme: Theme) -> None:
    from matplotlib.patches import Patch

    made.legend(
        handles=[
            Patch(facecolor=theme.fill, edgecolor=theme.ink, hatch="\\\\\\", label="output"),
            Patch(facecolor=theme.blue, edgecolor=theme.ink, label="FFN"),
            Patch(facecolor=theme.orange, edgecolor=theme.ink, label="attention"),
            Patch(facecolor=theme.fill, edgecolor=theme.ink, hatch="///", label="embedding"),
            Patch(fill=False, edgecolor=theme.faint, linestyle=(0, (2, 2)), label="the teacher's layer"),
        ],
        loc="outside lower center",
        ncols=3,
    )
