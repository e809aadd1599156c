"""The work of each stage of a flow: the plan's operations a token times its tokens; of the text, its bytes."""

import os
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture
from nemo_minitron.flow.configs import pretrains_on_broad, prune_config, student_architecture
from nemo_minitron.planning.flops import cut_flops, forward_flops, refit_flops, scan_flops, stage_flops, training_flops
from nemo_minitron.planning.pace import Work

#: Splits that an evaluation reads.
SPLITS = 2
#: Bytes of English text a word, and of WikiText-103.
WORD_BYTES = 6
WIKITEXT103_BYTES = 540e6
#: Compressed text takes about a third.
COMPRESSED = {".gz": 3.0, ".zst": 3.0, ".parquet": 3.0}
#: A question of the facts: answers to choose from, and tokens of each with the question.
ANSWERS, ANSWER_TOKENS = 4, 24


def flow_work(config: c.FlowConfig, teacher: Architecture) -> dict[str, Work]:
    """Step of the flow -> its work.

    Args:
        config: with nothing left open.
    """
    return dict(_steps(config, teacher))


def _steps(config: c.FlowConfig, teacher: Architecture) -> Iterator[tuple[str, Work]]:
    length, run = config.model.seq_length, Path(config.output_dir)

    def trained(recipe: c.RecipeConfig, model: Architecture, above: Architecture | None = None) -> Work:
        forward = forward_flops(model, length)
        other = forward_flops(above, length) if above else 0.0
        samples = recipe.max_steps * recipe.global_batch_size
        validated = recipe.max_steps // min(recipe.val_check_interval, recipe.max_steps) * recipe.limit_val_batches
        tokens, seen = length * samples, length * validated * recipe.global_batch_size
        training = training_flops(model, length)
        return Work("train", tokens * (training + other) + seen * (forward + other))

    def evaluated(model: Architecture) -> Work:
        tokens = SPLITS * config.limit_test_batches * config.distill.global_batch_size * length
        return Work("run", tokens * forward_flops(model, length))

    if pretrains_on_broad(config):
        yield "data (broad)", Work("text", WORD_BYTES * 1.2 * config.data.pretrain_words)
    yield "data", Work("text", text_bytes(config.data) or 0.0)
    if config.model.init == "random":
        yield "pretrain teacher", trained(config.pretrain, teacher)
    yield "teacher correction", trained(config.finetune, teacher)
    for name in ("teacher", "teacher corrected"):
        yield f"evaluate {name}", evaluated(teacher)
    scoring = stage_flops("prune", teacher, None, length)
    yield "importance", Work("run", config.prune.num_samples * length * scoring)
    questions = config.facts if config.data.source == "embedded" else 0
    asked = 2 * forward_flops(teacher, ANSWER_TOKENS)
    for name in config.prune.students:
        student, pruning = student_architecture(config, teacher, name), prune_config(config, run, name)
        if pruning.needs_scan:
            dropped = teacher.num_layers - student.num_layers
            blocks = teacher.num_layers - dropped + 1 if pruning.prune.chooses_block else dropped
            each = scan_flops(teacher, dropped, blocks, length, every_block=pruning.prune.chooses_block)
            yield f"scan blocks for {name}", Work("run", config.prune.num_block_samples * length * each)
        if pruning.refits:
            each = refit_flops(teacher, student, length)
            yield f"refit {name}", Work("run", config.prune.num_block_samples * length * each)
        yield f"prune {name}", Work("cut", cut_flops(teacher, student))
        yield f"evaluate {name} pruned", evaluated(student)
        yield f"distil {name}", trained(config.distill, student, teacher if config.distill.kd.kd_weight else None)
        yield f"evaluate {name} distilled", evaluated(student)
        if config.distill.control:
            yield f"retrain (LM loss alone) {name}", trained(config.distill, student)
            yield f"evaluate {name} control", evaluated(student)
        kinds = 3 if config.distill.control else 2
        asked += kinds * forward_flops(student, ANSWER_TOKENS)
    if config.instruct.data:
        for name in config.prune.students:
            yield f"instruct {name}", trained(config.instruct, student_architecture(config, teacher, name))
    if questions:
        yield "evaluate facts", Work("run", questions * ANSWERS * ANSWER_TOKENS * asked)


def text_bytes(data: c.FlowDataConfig) -> float | None:
    """Bytes of the flow's text, all splits, decompressed at a guess; None: not known."""
    if data.source == "embedded":
        return WORD_BYTES * 1.2 * data.words
    if data.source == "wikitext103":
        return WIKITEXT103_BYTES
    place = os.path.expanduser(data.source)
    if os.path.isfile(place):
        return _size(place)
    if not os.path.isdir(place):
        return None
    found = (os.path.join(root, name) for root, _, names in os.walk(place) for name in names if name[0] != ".")
    return sum(_size(path) for path in found if os.path.isfile(path))


def _size(path: str) -> float:
    return os.path.getsize(path) * COMPRESSED.get(os.path.splitext(path)[1].lower(), 1.0)
