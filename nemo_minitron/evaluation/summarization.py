"""Summaries: ROUGE, latency and tokens a second, as TensorRT-LLM's summarize example reports them."""

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_minitron.config import EvaluateConfig
from nemo_minitron.errors import DataError
from nemo_minitron.evaluation.custom_tasks import first_line, folder_of, own_cache
from nemo_minitron.evaluation.loading import Loaded, check_tokens
from nemo_minitron.jobs.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

TASK = "summarization"
DATASET = "abisee/cnn_dailymail"
ARTICLES = 20
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
TEXT_FIELDS, SUMMARY_FIELDS = ("article", "text", "document"), ("highlights", "summary")


class Article(NamedTuple):
    """An article and the summary that somebody wrote of it."""

    text: str
    summary: str


def load_articles(config: EvaluateConfig) -> list[Article]:
    """The first articles of the test split, or of the file.

    Raises:
        DataError: there are none; for cnn_dailymail it says what to download to where.
    """
    limit = config.limit or ARTICLES
    rows = _cnn_dailymail(config.task_data) if config.articles == "cnn_dailymail" else _file(Path(config.articles))
    articles = []
    for number, row in enumerate(rows[:limit], 1):
        text, summary = (
            next((row[name] for name in names if isinstance(row.get(name), str) and row[name].strip()), None)
            for names in (TEXT_FIELDS, SUMMARY_FIELDS)
        )
        if text is None or summary is None:
            raise DataError(
                f"{config.articles}: article {number} has no text ({', '.join(TEXT_FIELDS)}) or no summary "
                f"({', '.join(SUMMARY_FIELDS)})"
            )
        articles.append(Article(text, summary))
    if not articles:
        raise DataError(f"{config.articles} holds no articles")
    return articles


def _file(path: Path) -> list[dict[str, Any]]:
    from nemo_minitron.data.files import kind
    from nemo_minitron.data.rows import KINDS, records

    path = path.expanduser()
    if not path.is_file() or kind(path) not in KINDS:
        what = f"is no {', '.join(KINDS)} file" if path.is_file() else "does not exist"
        raise DataError(f"articles={path} {what}; give a .jsonl file with article and highlights, or cnn_dailymail")
    return records(path)


def _cnn_dailymail(task_data: str | None) -> list[dict[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if task_data is None:
            return list(datasets.load_dataset(DATASET, "3.0.0", split="test"))
        with own_cache():
            return list(datasets.load_dataset(str(folder_of(task_data, DATASET)), "3.0.0", split="test"))
    except (OSError, ValueError, DatasetsError, HfHubHTTPError) as error:
        place = f"{task_data or 'DIR'}"
        raise DataError(
            f"cnn_dailymail is neither here nor could it be had from the Hugging Face hub ({first_line(error)}). On a "
            f"machine with a network run `hf download --repo-type dataset {DATASET} --exclude '[12].0.0/*' "
            f"--local-dir {place}/{DATASET}`, then give task_data={place}; or give a file of your own, "
            "articles=FILE.jsonl"
        ) from None


def summarize(loaded: Loaded, articles: Sequence[Article], config: EvaluateConfig, name: str) -> dict[str, Any]:
    """Greedy summaries, one article at a time, and what was measured of them.

    ROUGE is the mean F1 over articles, in per cent, without stemming (TensorRT-LLM's script takes the median of
    bootstrap means, which is within their noise). total_latency_seconds counts generation alone, after one article
    that is not counted.

    Args:
        name: what lines of progress call the model.

    Returns:
        `metrics`: name -> value and standard error; `summaries`: what was written.
    """
    prompts = [_prompt(loaded, article, config) for article in articles]
    _generate(loaded, prompts[0], config)
    summaries, seconds, tokens = [], 0.0, 0
    every = config.log_every_n_steps
    with Progress(f"evaluate {name}, summaries", len(prompts), unit="article", every=every) as progress:
        for prompt in prompts:
            started = time.perf_counter()
            made = _generate(loaded, prompt, config)
            seconds += time.perf_counter() - started
            tokens += len(made)
            summaries.append(loaded.tokenizer.decode(made, skip_special_tokens=True))
            progress.advance(tokens=len(made))
    measured = rouge(summaries, [article.summary for article in articles])
    measured |= {
        "total_latency_seconds": {"value": seconds, "stderr": None},
        "output_tokens": {"value": tokens, "stderr": None},
        "tokens_per_second": {"value": tokens / seconds, "stderr": None},
    }
    return {"metrics": measured, "summaries": summaries}


def rouge(summaries: Sequence[str], references: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Mean F1 in per cent of each kind of ROUGE, and its standard error over articles."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE))
    scores = [scorer.score(reference, summary) for summary, reference in zip(summaries, references, strict=True)]
    measured = {}
    for kind in ROUGE:
        values = [100 * score[kind].fmeasure for score in scores]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        measured[kind] = {"value": statistics.fmean(values), "stderr": error}
    return measured


def _prompt(loaded: Loaded, article: Article, config: EvaluateConfig) -> "Tensor":
    """Tokens [1, s] of the article, cut at its end where it is too long, and of what follows it."""
    import torch

    longest = config.max_length or loaded.checkpoint.architecture.seq_length
    suffix = loaded.tokenizer(config.prompt_suffix, add_special_tokens=False).input_ids
    room = min(config.max_input_tokens, longest - config.max_new_tokens) - len(suffix)
    if room < 1:
        raise DataError(
            f"the model's length of {longest} tokens has no room for an article beside max_new_tokens="
            f"{config.max_new_tokens}: give a smaller max_new_tokens"
        )
    article_tokens = loaded.tokenizer(article.text, truncation=True, max_length=room).input_ids
    check_tokens(article_tokens + suffix, loaded)
    return torch.tensor([article_tokens + suffix], device=loaded.model.device)


def _generate(loaded: Loaded, prompt: "Tensor", config: EvaluateConfig) -> list[int]:
    import torch

    from nemo_minitron.evaluation.generate import ends_and_padding, generated

    made = generated(
        loaded,
        prompt,
        torch.ones_like(prompt),
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        **ends_and_padding(loaded),
    )
    return made[prompt.shape[1] :]
