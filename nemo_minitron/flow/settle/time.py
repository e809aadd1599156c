"""Batches, steps and samples that there is time for, and the micro batch that fits."""

import math

from nemo_minitron.architecture import human
from nemo_minitron.flow.models import chosen, student_models
from nemo_minitron.flow.settle.state import State
from nemo_minitron.flow.work import text_bytes
from nemo_minitron.planning.fitting import fits, with_batch
from nemo_minitron.planning.flops import forward_flops, scan_flops, stage_flops, training_flops

#: Of the flow's minutes.
TRAINING, TESTING, SCORING = 0.65, 0.2, 0.15
#: More tokens in a micro batch make a CPU no faster.
CPU_TOKENS = 2048
#: Steps: at least LEAST_STEPS; beyond AIMED_STEPS the batch grows, up to that of NVIDIA's tutorial.
LEAST_STEPS, AIMED_STEPS, LEAST_BATCH, MOST_BATCH = 21, 60, 4, 128
#: A text may be read so often before more steps bring little (arXiv 2305.16264).
EPOCHS = 4
#: Bytes of English a token of a real model's tokenizer.
TOKEN_BYTES = 4.0
VALIDATIONS = 3
#: Tokens of a split that is tested, of the calibration, and samples of the scan of blocks.
TESTED, CALIBRATED, SCANNED = (2**14, 2**18), (2**15, 1024), (2**14, 256)
#: Samples a forward pass while scoring.
SCORING_BATCH = 16


def settle_recipes(state: State) -> None:
    """Batches, steps and validations: each training sees as many tokens."""
    length, each = chosen(state.config.model.seq_length), state.run().data_parallel
    each *= state.config.hardware.micro_batch_size or 1
    tokens, bound = _tokens(state)
    batch = each * _power_of_two(tokens / (AIMED_STEPS * length * each), LEAST_BATCH / each, MOST_BATCH / each)
    for name in state.used():
        times = f"{each} times " if each > 1 else ""
        why = f"{times}a power of two for {AIMED_STEPS} steps or more, {LEAST_BATCH} to {MOST_BATCH}"
        state.choose(f"{name}.global_batch_size", batch, why)
    _settle_micro_batch(state)
    for name in state.used():
        recipe = getattr(state.config, name)
        steps = int(tokens / (recipe.global_batch_size * length)) // VALIDATIONS * VALIDATIONS
        why = bound if steps >= LEAST_STEPS else f"the least that is offered; {bound} would be {steps}"
        state.choose(f"{name}.max_steps", max(steps, LEAST_STEPS), why)
        state.choose(f"{name}.warmup_steps", max(1, recipe.max_steps // 10), "a tenth of the steps")
        state.choose(f"{name}.val_check_interval", _interval(recipe.max_steps), f"{VALIDATIONS} times, also at the end")
        most = min(max(2, recipe.max_steps // 10), 32)
        state.choose(f"{name}.limit_val_batches", most, "a tenth of the training's arithmetic, 2 to 32")


def _tokens(state: State) -> tuple[float, str]:
    """Tokens of each training whose steps are open, and what bounds them."""
    length, each = chosen(state.config.model.seq_length), _trainings(state)
    left = state.operations(TRAINING)
    for name, flops in each.items():
        recipe = getattr(state.config, name)
        if recipe.max_steps is not None:
            left -= recipe.max_steps * (recipe.global_batch_size or MOST_BATCH) * length * flops
    flops = sum(value for name, value in each.items() if getattr(state.config, name).max_steps is None)
    tokens = max(left, 0.0) / flops if flops else 0.0
    read = EPOCHS * (text_bytes(state.config.data) or math.inf) / TOKEN_BYTES
    rate, why = state.rate()
    if read < tokens:
        return read, f"the text {EPOCHS} times over, about {human(read)} tokens"
    minutes = f"{TRAINING:.0%} of {state.config.minutes:g} minutes"
    return tokens, f"{minutes}, {human(tokens)} tokens a training at {rate / 1e12:.3g} TFLOP/s ({why})"


def _trainings(state: State) -> dict[str, float]:
    """Recipe -> operations of a token in all its trainings together."""
    config, length = state.config, chosen(state.config.model.seq_length)
    teacher = forward_flops(state.teacher, length)
    each = [training_flops(student, length) for student in state.shapes()]
    with_teacher = teacher if config.distill.kd.kd_weight else 0.0
    operations = {"pretrain": 3 * teacher, "finetune": 3 * teacher, "instruct": sum(each)}
    operations["distill"] = sum(each) * (len(student_models(config)) - 1) + with_teacher * len(each)
    return {name: operations[name] for name in state.used()}


def _settle_micro_batch(state: State) -> None:
    """The largest power of two that divides every global batch and fits."""
    (limit, whose), models, run = state.limit(), state.models(), state.run()
    samples = math.gcd(*(getattr(state.config, name).global_batch_size for name in state.used()))
    size, why = 1, f"the most that fit {whose}"
    while samples % (2 * size * run.data_parallel) == 0:
        larger = with_batch(run, micro_batch=2 * size)
        if not fits(models, larger, ("finetune", "distill"), limit):
            break
        if not state.cuda() and larger.tokens > CPU_TOKENS:
            why = f"{CPU_TOKENS} tokens: more make a CPU no faster; fits {whose}"
            break
        size *= 2
    else:
        why = f"all samples of a step; fits {whose}"
    state.choose("hardware.micro_batch_size", size, why)


def settle_tests(state: State) -> None:
    """Batches of an evaluation: every model, two splits."""
    length = chosen(state.config.model.seq_length)
    models = [state.teacher] * 2 + state.shapes() * len(student_models(state.config))
    each = 2 * sum(forward_flops(model, length) for model in models)
    tokens = min(max(state.operations(TESTING) / each, TESTED[0]), TESTED[1])
    batches = max(1, int(tokens / (chosen(state.config.distill.global_batch_size) * length)))
    why = f"{TESTING:.0%} of {state.config.minutes:g} minutes for {len(models)} evaluations, 2^14 to 2^18 tokens each"
    state.choose("limit_test_batches", batches, why)


def settle_calibration(state: State) -> None:
    """Samples of scoring and of the scan of blocks, and how many go at once."""
    (limit, whose), length, run = state.limit(), chosen(state.config.model.seq_length), state.run()
    scoring, size = chosen(state.config.hardware.prune_pipeline_model_parallel_size), 1
    while size < SCORING_BATCH and (state.cuda() or 2 * size * length <= CPU_TOKENS):
        if not fits(state.models(), run, ("prune",), limit, (scoring, 2 * size)):
            break
        size *= 2
    most = "2048 tokens" if not state.cuda() else f"{SCORING_BATCH}"
    state.choose("prune.batch_size", size, f"as many as fit {whose}, up to {most}")
    each = stage_flops("prune", state.teacher, None, length)
    samples = int(state.operations(SCORING * 2 / 3) / (each * length))
    least = -(-CALIBRATED[0] // length)
    why = f"{SCORING * 2 / 3:.0%} of {state.config.minutes:g} minutes, between 2^15 tokens and 1024 samples"
    state.choose("prune.num_samples", min(max(samples, least), max(CALIBRATED[1], least)), why)
    layers = [state.teacher.num_layers - student.num_layers for student in state.shapes()]
    every = state.config.prune.depth_by == "block_loss"
    each = sum(
        scan_flops(state.teacher, dropped, state.teacher.num_layers - dropped + 1 if every else dropped, length,
                   every_block=every)
        for dropped in layers if dropped
    )  # fmt: skip
    ranks = 4 * chosen(state.config.hardware.devices) * state.config.hardware.num_nodes
    least = -(-SCANNED[0] // length)
    samples = int(state.operations(SCORING / 3) / (each * length)) if each else least
    samples = min(max(samples, least), max(SCANNED[1], least))
    why = f"{SCORING / 3:.0%} of {state.config.minutes:g} minutes, between 2^14 tokens and {SCANNED[1]} samples"
    state.choose("prune.num_block_samples", max(ranks, samples // ranks * ranks), why)


def _power_of_two(value: float, least: float, most: float) -> int:
    """The largest power of two up to `value`, within bounds, at least 1."""
    bounded = min(max(value, least, 1.0), max(most, 1.0))
    return 1 << int(math.log2(bounded))


def _interval(steps: int) -> int:
    """The least interval that validates no more often than VALIDATIONS times, and after the last step."""
    return next(every for every in range(max(1, -(-steps // VALIDATIONS)), steps + 1) if steps % every == 0)
