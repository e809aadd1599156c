"""`minitron evaluate`: checkpoints side by side on tasks, through EleutherAI's lm-evaluation-harness."""

import contextlib
import dataclasses
import gc
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.artifacts import Manifest, write_json
from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.config import EvaluateConfig
from nemo_minitron.evaluation import facts, likelihoods, lm_eval_api, perplexity, suite, summarization
from nemo_minitron.evaluation.loading import Loaded, check_tokens, display_names, load, open_all, quiet_transformers
from nemo_minitron.evaluation.results import render, rows_of
from nemo_minitron.evaluation.tasks import OWN, PreparedTasks
from nemo_minitron.jobs.job import Job
from nemo_minitron.jobs.progress import Progress

if TYPE_CHECKING:
    from lm_eval.api.model import LM

RESULTS, TABLE, SAMPLES = "results.json", "table.txt", "samples.jsonl"


def evaluate(config: EvaluateConfig) -> Manifest | None:
    """Measures every checkpoint on every task and prints the table, or JSON.

    Raises:
        CheckpointError, ConfigError, DataError, EngineError: before any weight is read.
        OutputExistsError: the output was made from something else.
    """
    results, manifest = measure(config)
    print(json.dumps(results, indent=2, ensure_ascii=False) if config.json else render(results))
    return None if config.json else manifest


def measure(config: EvaluateConfig) -> tuple[dict[str, Any], Manifest | None]:
    """As evaluate, and prints nothing: the results, and their manifest where there is an output."""
    checkpoints = open_all(config.models, config)
    suite.check_names(config.task_names, OWN)
    if config.output is None:
        return run_tasks(config, checkpoints, PreparedTasks(config))[0], None
    job = _job(config, config.output)
    if job.finished() is None:
        prepared = PreparedTasks(config)
        job.run(lambda partial: write_results(partial, config, checkpoints, prepared))
    results = json.loads((Path(config.output) / RESULTS).read_text(encoding="utf-8"))
    return results, Manifest.read(config.output)


def _job(config: EvaluateConfig, output: str) -> Job:
    inputs = {f"model{number}": path for number, path in enumerate(config.models, 1)}
    local = {"corpus": config.corpus, "articles": config.articles, "tokenizer": config.tokenizer}
    read = {name: path for name, path in local.items() if path is not None and Path(path).expanduser().exists()}
    settings = dataclasses.asdict(config) | {"tasks": config.task_names}
    settings["names"] = display_names(config.models, config.names)
    return Job(
        stage="evaluate tasks",
        output=Path(output),
        config=settings,
        inputs=inputs | {name: Path(path).expanduser() for name, path in read.items()},
        seed=config.seed,
        overwrite=config.overwrite,
        ignore=("output", "overwrite", "json", "models", "batch_memory_gb", "log_every_n_steps", *read),
        sampled=tuple(inputs),
    )


def write_results(
    partial: Path, config: EvaluateConfig, checkpoints: list[Checkpoint], prepared: PreparedTasks
) -> dict[str, Any]:
    """The job's work: runs all tasks and writes results, table and answers."""
    started = time.perf_counter()
    results, samples = run_tasks(config, checkpoints, prepared)
    write_json(partial / RESULTS, results)
    (partial / TABLE).write_text(render(results) + "\n", encoding="utf-8")
    lines = (json.dumps(sample, ensure_ascii=False, default=str) for sample in samples)
    (partial / SAMPLES).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    seconds = time.perf_counter() - started
    return {"metrics": results, "timings": {"evaluation_seconds": seconds}}


def run_tasks(
    config: EvaluateConfig, checkpoints: list[Checkpoint], prepared: PreparedTasks
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results of all checkpoints, one loaded after the other, and what each answered to each question."""
    names = display_names(config.models, config.names)
    measured: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    right: dict[str, dict[str, list[float]]] = {}
    models = []
    window = window_of(config, checkpoints)
    for name, path, checkpoint in zip(names, config.models, checkpoints):
        started = time.perf_counter()
        loaded = load(checkpoint, config)
        measured[name], answers = run_model(config, loaded, prepared, name=name, window=window)
        samples += [{"model": name} | answer for answer in answers]
        right[name] = {
            task: [answer["acc"] for answer in answers if answer["task"] == task]
            for task in (facts.CHOICE, facts.COMPLETION)
        }
        models.append(
            {
                "name": name,
                "path": path,
                "format": checkpoint.kind.title,
                "parameters": checkpoint.architecture.parameters(),
                "device": str(loaded.model.device),
                "dtype": str(loaded.model.dtype).removeprefix("torch."),
                "seconds": time.perf_counter() - started,
            }
        )
        del loaded
        gc.collect()  # the model, which the harness's view of it keeps in cycles
    results: dict[str, Any] = {
        "models": models,
        "reference": names[0],
        "results": measured,
        "shown": rows_of(measured, prepared.shown),
        "notes": prepared.notes,
    }
    if prepared.has_windows:
        results["window"] = window
    if prepared.questions:
        chance = sum(1 / len(question["choices"]) for question in prepared.questions) / len(prepared.questions)
        results["facts"] = {
            "questions": len(prepared.questions),
            "chance": chance,
            "kept": facts.kept(right, chance),
        }
    return results, samples


def run_model(
    config: EvaluateConfig, loaded: Loaded, prepared: PreparedTasks, *, name: str, window: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One checkpoint: task -> metric -> value and standard error; and its answers."""
    measured: dict[str, Any] = {}
    answers: list[dict[str, Any]] = []
    with quiet_transformers(), _to_stderr():
        if prepared.loaded["tasks"]:
            model = language_model(loaded, config, name=name, window=window)
            measured, answers = run_harness(model, prepared.loaded, config)
        if prepared.documents:
            tokens = [len(loaded.tokenizer(text, add_special_tokens=False).input_ids) for text in prepared.documents]
            documents = [answer for answer in answers if answer["task"] == perplexity.TASK]
            measured[perplexity.TASK] = perplexity.metrics(documents, tokens)
        if prepared.articles:
            made = summarization.summarize(loaded, prepared.articles, config, name)
            measured[summarization.TASK] = made["metrics"]
            answers += [
                {"task": summarization.TASK, "doc_id": number, "answer": summary}
                for number, summary in enumerate(made["summaries"])
            ]
    return measured, answers


def language_model(loaded: Loaded, config: EvaluateConfig, *, name: str, window: int) -> "LM":
    """lm-evaluation-harness's view of a loaded model.

    Args:
        name: what lines of progress call it.
        window: tokens of the windows of texts that are scored whole.

    Raises:
        DataError: later, where a text has a token that the model's embedding has no row for.
    """
    from nemo_minitron.evaluation.language_model import Bounds

    architecture, element = loaded.checkpoint.architecture, loaded.model.dtype.itemsize
    bounds = Bounds(
        window=window,
        room=config.batch_memory_gb * 1e9,
        a_token=likelihoods.activation_bytes(architecture, element),
        cache=likelihoods.cache_bytes(architecture, element),
        most=config.batch_size,
        watched=lambda what, total: Progress(
            f"evaluate {name}, {what}", total, unit="sequence", every=config.log_every_n_steps
        ),
    )
    return lm_eval_api.language_model(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        max_length=config.max_length or architecture.seq_length,
        bounds=bounds,
        check=lambda ids: check_tokens(ids, loaded),
    )


def window_of(config: EvaluateConfig, checkpoints: Sequence[Checkpoint]) -> int:
    """Tokens of the windows of perplexity: one number for all models, at most the shortest model's length."""
    lengths = [checkpoint.architecture.seq_length for checkpoint in checkpoints]
    return min([config.window, *lengths, *([config.max_length] if config.max_length else [])])


def run_harness(
    model: "LM", loaded: dict[str, Any], config: EvaluateConfig
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """lm-evaluation-harness on one model.

    Args:
        model: an `lm_eval.api.model.LM`.
        loaded: tasks and groups, as lm_eval_api loads them.

    Returns:
        task or group -> metric -> value and standard error; and the answer to each question.
    """
    import lm_eval

    done = lm_eval.evaluate(
        lm=model,
        task_dict=lm_eval_api.for_evaluation(loaded),
        limit=config.limit,
        bootstrap_iters=1000,
        confirm_run_unsafe_code=config.allow_code,
    )
    metrics = {name: _metrics(measured) for name, measured in done["results"].items()}
    answers = [
        {"task": task, "doc_id": sample["doc_id"], "target": sample["target"]}
        | {"answer": sample["filtered_resps"]}
        | {name: sample[name] for name in sample["metrics"]}
        for task, samples in done["samples"].items()
        for sample in samples
    ]
    for answer in answers:
        if answer["task"] == perplexity.TASK:
            del answer["target"]
    return {name: values for name, values in metrics.items() if values}, answers


def _metrics(measured: dict[str, Any]) -> dict[str, Any]:
    """`acc,none` and `acc_stderr,none` as one entry, `acc`; another filter than none stands behind the name."""
    metrics = {}
    for key, value in measured.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = measured.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric} ({kind})"
        metrics[name] = {"value": value, "stderr": error if isinstance(error, int | float) else None}
    return metrics


@contextlib.contextmanager
def _to_stderr() -> Iterator[None]:
    """In the body, what libraries print does not mix with results; bars only on a terminal."""
    stream = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield
