"""The work of each kind of step: the plan's operations a token times its tokens; of the text, its bytes.

Every estimate takes the flow's configuration, the teacher's sizes and the step.
"""

import dataclasses
import math
import os
from typing import TYPE_CHECKING

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture
from nemo_minitron.flow.models import chosen, model_architecture, student_architecture, student_models
from nemo_minitron.flow.searching import measured_shapes
from nemo_minitron.planning.flops import cut_flops, forward_flops, refit_flops, scan_flops, stage_flops, training_flops
from nemo_minitron.planning.pace import Work
from nemo_minitron.search.rounds import schedule, total_steps

if TYPE_CHECKING:
    from nemo_minitron.flow.steps import Step

#: Bytes of English text a word, and of WikiText-103.
WORD_BYTES = 6
WIKITEXT103_BYTES = 540e6
#: Compressed text takes about a third.
COMPRESSED = {".gz": 3.0, ".zst": 3.0, ".parquet": 3.0}
#: A question of the facts: answers to choose from, and tokens of each with the question.
ANSWERS, ANSWER_TOKENS = 4, 24


def text_work(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.DataConfig]") -> Work:
    """All of the text is read, and tokenised."""
    return Work("text", text_bytes(step.config) or 0.0)


def training_work(
    flow: c.FlowConfig, teacher: Architecture, step: "Step[c.FinetuneConfig] | Step[c.DistillConfig]"
) -> Work:
    """Steps and validations; the teacher's forward pass beside them where it teaches, or of kept answers its output
    layer's alone."""
    trainer, model = step.config.trainer, step.config.model
    length, sizes = _length(flow), model_architecture(flow, teacher, step.student)
    beside = forward_flops(teacher, length) if getattr(model, "kd_teacher_restore_from_path", None) else 0.0
    if isinstance(step.config, c.DistillConfig) and step.config.kd.folders:
        beside = 2.0 * teacher.vocab_size * teacher.hidden_size
    validations = trainer.max_steps // min(trainer.val_check_interval, trainer.max_steps) * trainer.limit_val_batches
    trained = length * trainer.max_steps * model.global_batch_size
    validated = length * validations * model.global_batch_size
    forward, training = forward_flops(sizes, length), training_flops(sizes, length)
    return Work("train", trained * (training + beside) + validated * (forward + beside))


def teach_work(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.TeachConfig]") -> Work:
    """A forward pass over what a student reads, and validates on."""
    length, trainer = _length(flow), step.config.trainer
    tokens = chosen(step.config.teach.tokens) + trainer.limit_val_batches * step.config.model.global_batch_size * length
    return Work("run", tokens * forward_flops(teacher, length))


def search_work(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.SearchConfig]") -> Work:
    """Cuts, each run on held-out text, and the rounds: all candidates as large as the shape that stands for them, the
    teacher once over what they read."""
    length, shape, settings = _length(flow), model_architecture(flow, teacher, step.student), step.config.search
    rounds = schedule(settings.candidates, settings.finalists, settings.steps)
    batch = step.config.model.global_batch_size * length
    validated = step.config.trainer.limit_val_batches * batch
    forward, training = forward_flops(shape, length), training_flops(shape, length)
    head = 2.0 * teacher.vocab_size * teacher.hidden_size
    measured = measured_shapes(flow, teacher, chosen(step.student))
    cuts = measured * (settings.samples * length * forward + cut_flops(teacher, shape))
    taught = (batch * sum(one.steps for one in rounds) + validated) * forward_flops(teacher, length)
    learnt = batch * total_steps(rounds) * (training + head)
    tested = validated * sum(one.candidates for one in rounds) * (forward + head)
    return Work("train", cuts + taught + learnt + tested)


def loss_work(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.LossConfig]") -> Work:
    """A forward pass over the batches of each split."""
    length, sizes = _length(flow), model_architecture(flow, teacher, step.student)
    samples = len(step.config.splits) * step.config.limit_batches * step.config.model.global_batch_size
    return Work("run", samples * length * forward_flops(sizes, length))


def score_work(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.PruneConfig]") -> Work:
    """The calibration pass, with second moments."""
    length = _length(flow)
    return Work("run", step.config.prune.num_samples * length * stage_flops("prune", teacher, None, length))


def scan_work(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.PruneConfig]") -> Work:
    """The teacher without each block of layers."""
    length, targets = _length(flow), step.config.prune
    dropped = teacher.num_layers - model_architecture(flow, teacher, step.student).num_layers
    blocks = teacher.num_layers - dropped + 1 if targets.chooses_block else dropped
    each = scan_flops(teacher, dropped, blocks, length, every_block=targets.chooses_block)
    return Work("run", targets.num_block_samples * length * each)


def refit_work(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.PruneConfig]") -> Work:
    """Teacher and student, layer by layer."""
    length, student = _length(flow), model_architecture(flow, teacher, step.student)
    return Work("run", step.config.prune.num_block_samples * length * refit_flops(teacher, student, length))


def cut_work(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.PruneConfig]") -> Work:
    """Rotation and least squares."""
    return Work("cut", cut_flops(teacher, model_architecture(flow, teacher, step.student)))


def facts_work(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.EvaluateConfig]") -> Work:
    """Every answer to every question, by both teachers and all models of the students."""
    asked = 2 * forward_flops(teacher, ANSWER_TOKENS)
    for name in flow.prune.students:
        student = student_architecture(flow, teacher, name)
        asked += len(student_models(flow)) * forward_flops(student, ANSWER_TOKENS)
    return Work("run", flow.facts * ANSWERS * ANSWER_TOKENS * asked)


def _length(flow: c.FlowConfig) -> int:
    return chosen(flow.model.seq_length)


def text_bytes(data: c.FlowDataConfig | c.DataConfig) -> float | None:
    """Bytes of the text, all splits, decompressed at a guess; None: not known."""
    if data.sources is not None:
        sizes = [text_bytes(dataclasses.replace(data, source=path, sources=None)) for path in data.sources.values()]
        return None if None in sizes else math.fsum(size for size in sizes if size)
    if data.source == "embedded":
        return WORD_BYTES * 1.2 * data.words
    if data.source == "wikitext103":
        return WIKITEXT103_BYTES
    place = os.path.expanduser(data.source)
    if os.path.isfile(place):
        return _size(place)
    if not os.path.isdir(place):
        return None
    paths = (os.path.join(root, name) for root, _, names in os.walk(place) for name in names if name[0] != ".")
    return sum(_size(path) for path in paths if os.path.isfile(path))


def _size(path: str) -> float:
    return os.path.getsize(path) * COMPRESSED.get(os.path.splitext(path)[1].lower(), 1.0)
