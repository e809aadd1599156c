"""Whether a flow's teacher answers once for all students, its answers kept (minitron teach), or beside each of them."""

import shutil
from pathlib import Path
from typing import NamedTuple

from nemo_minitron import config as c
from nemo_minitron.artifacts import MANIFEST
from nemo_minitron.flow.models import chosen, place, teacher_architecture
from nemo_minitron.flow.work import text_bytes
from nemo_minitron.planning.answers import matrix_bytes, token_bytes

#: Of the free disk, what answers may take.
DISK_SHARE = 0.25
#: Bytes of English a token of a real model's tokenizer.
TOKEN_BYTES = 4.0


class Decision(NamedTuple):
    """Whether answers are kept, and why."""

    keeps: bool
    why: str


def keeps_answers(config: c.FlowConfig) -> bool:
    """Whether the flow has the step `teach`."""
    return decided(config).keeps


def decided(config: c.FlowConfig) -> Decision:
    """distill.teach, and what `auto` becomes: what a run was begun with, or else what pays and fits the disk."""
    asked, kd = config.distill.teach, config.distill.kd
    if asked != "auto":
        return Decision(asked == "always", f"distill.teach={asked}")
    if not kd.kd_weight or kd.folders or kd.hidden.weight or kd.top_k is not None or config.data.dynamic:
        return Decision(False, "the losses want no teacher, or one that runs")
    if (place(config, "teach") / MANIFEST).is_file():
        return Decision(True, "as this run was begun")
    if any((place(config, "distill", name) / MANIFEST).is_file() for name in config.prune.students):
        return Decision(False, "as this run was begun")
    students, epochs = len(config.prune.students), _epochs(config)
    if students < 2 and epochs <= 1:
        return Decision(False, "one student that reads its text once")
    size, free = answers_bytes(config), _free(Path(config.output_dir))
    pays = f"{students} students" if students > 1 else f"{epochs:.1f} epochs"
    fits = size <= DISK_SHARE * free
    above = "" if fits else f", above {DISK_SHARE:.0%}"
    return Decision(fits, f"{pays}, {size / 1e9:.3g} GB of {free / 1e9:.3g} GB free{above}")


def answered_tokens(config: c.FlowConfig) -> int:
    """Tokens that the distillation of a student reads, each once where the text has so many."""
    recipe = config.distill
    return chosen(recipe.max_steps) * chosen(recipe.global_batch_size) * chosen(config.model.seq_length)


def answers_bytes(config: c.FlowConfig) -> float:
    """At most what the answers of a run take."""
    recipe, teacher = config.distill, teacher_architecture(config)
    validation = chosen(recipe.limit_val_batches) * chosen(recipe.global_batch_size) * chosen(config.model.seq_length)
    tokens = min(answered_tokens(config), _text_tokens(config)) + validation
    return tokens * token_bytes(teacher, c.AnswersConfig()) + matrix_bytes(teacher, c.AnswersConfig(), bf16=False)


def _epochs(config: c.FlowConfig) -> float:
    return answered_tokens(config) / max(_text_tokens(config), 1.0)


def _text_tokens(config: c.FlowConfig) -> float:
    """Tokens of the text at a guess; more than any run reads where its size is not known."""
    size = text_bytes(config.data)
    return float("inf") if size is None else size / TOKEN_BYTES


def _free(folder: Path) -> int:
    """Free bytes of the disk that a folder lies on, or will."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
