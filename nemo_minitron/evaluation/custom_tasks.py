"""Tasks of the published suite that are defined here: XLSum, which lm-evaluation-harness has not, and HumanEval, whose
checker it would fetch from the hub."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

XLSUM, HUMANEVAL = "csebuetnlp/xlsum", "openai/openai_humaneval"
HUMANEVAL_SECONDS = 10
#: What a function's end looks like: the first line that is no part of it.
HUMANEVAL_ENDS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```"]
#: One article in so many: the papers evaluate on 20 % of XLSum's English test set.
XLSUM_EVERY = 5


def folder_of(task_data: str, dataset: str) -> Path:
    """Where a data set lies under `task_data`; raises FileNotFoundError where it does not."""
    folder = Path(task_data).expanduser() / dataset
    if not folder.is_dir() or not any(folder.iterdir()):
        raise FileNotFoundError(f"{folder} is not there")
    return folder.absolute()


_kept: dict[str, tempfile.TemporaryDirectory] = {}


@contextlib.contextmanager
def own_cache() -> Iterator[None]:
    """In the body, datasets keeps what it makes of files in a folder of this process.

    In its usual one it takes a folder of files for another that it saw before where their names are the same.
    """
    from datasets import config

    if "cache" not in _kept:
        _kept["cache"] = tempfile.TemporaryDirectory(prefix="minitron-", ignore_cleanup_errors=True)
    before, config.HF_DATASETS_CACHE = config.HF_DATASETS_CACHE, Path(_kept["cache"].name)
    try:
        yield
    finally:
        config.HF_DATASETS_CACHE = before


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def xlsum(task_data: str | None) -> dict[str, Any]:
    """XLSum, English, one test article in five, ROUGE-L; prompt and stops are of this package's own choice."""
    rows = {split: _xlsum_rows(task_data, split) for split in ("train", "test")}
    rows["test"] = rows["test"][::XLSUM_EVERY]
    return {
        "custom_dataset": _given(rows),
        "output_type": "generate_until",
        "training_split": "train",
        "fewshot_split": "train",
        "test_split": "test",
        "doc_to_text": "Article: {{text}}\nSummary:",
        "doc_to_target": "{{summary}}",
        "process_results": rouge_l,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 64, "do_sample": False},
        "metric_list": [{"metric": "rougeL", "aggregation": "mean", "higher_is_better": True}],
    }


def rouge_l(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE-L's F1 of a summary, in per cent."""
    from rouge_score.rouge_scorer import RougeScorer

    return {"rougeL": 100 * RougeScorer(["rougeL"]).score(doc["summary"], results[0])["rougeL"].fmeasure}


def _xlsum_rows(task_data: str | None, split: str) -> list[dict[str, str]]:
    import datasets

    if task_data is None:
        articles = datasets.load_dataset(XLSUM, "english", split=split, revision="refs/convert/parquet")
        return [{"text": row["text"], "summary": row["summary"]} for row in articles]
    from nemo_minitron.data.files import files_in, kind
    from nemo_minitron.data.rows import records
    from nemo_minitron.data.sources import split_of

    folder = folder_of(task_data, XLSUM)
    files = [
        file
        for file in files_in(folder)
        if kind(file) in (".parquet", ".jsonl") and split_of(file.relative_to(folder)) == split
        and "english" in str(file.relative_to(folder))
    ]  # fmt: skip
    rows = [row for file in files for row in records(file) if row.get("text") and row.get("summary")]
    if not rows:
        raise FileNotFoundError(f"{folder} holds no English {split} articles with text and summary")
    return [{"text": row["text"], "summary": row["summary"]} for row in rows]


def _given(rows: dict[str, list[dict[str, Any]]]) -> Callable[..., Any]:
    import datasets

    given_splits = datasets.DatasetDict({split: datasets.Dataset.from_list(given) for split, given in rows.items()})
    return lambda **_: given_splits


def humaneval(task_data: str | None) -> dict[str, Any]:
    """HumanEval, greedy, pass@1; each program runs in a process and a folder of its own."""
    return {
        "dataset_path": str(folder_of(task_data, HUMANEVAL)) if task_data is not None else HUMANEVAL,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}",
        "process_results": pass_at_1,
        "unsafe_code": True,
        "generation_kwargs": {"until": HUMANEVAL_ENDS, "max_gen_toks": 512, "do_sample": False},
        "metric_list": [{"metric": "pass_at_1", "aggregation": "mean", "higher_is_better": True}],
    }


def pass_at_1(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the program passes its tests, else 0."""
    program = (
        f"{doc['prompt']}{results[0]}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\nopen('passed', 'w').close()\n"
    )
    with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
        (Path(folder) / "program.py").write_text(program, encoding="utf-8")
        try:
            subprocess.run(
                [sys.executable, "-I", "program.py"], cwd=folder, timeout=HUMANEVAL_SECONDS,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"pass_at_1": 0.0}
        return {"pass_at_1": float((Path(folder) / "passed").is_file())}


#: Name -> the task's configuration, from the folder with downloaded data or None.
CUSTOM_TASKS: dict[str, Callable[[str | None], dict[str, Any]]] = {"xlsum_en": xlsum, "humaneval": humaneval}
