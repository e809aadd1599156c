"""Perplexity of whole documents: every token predicted once, and standard errors over documents."""

import math
from collections.abc import Sequence
from typing import Any

TASK = "perplexity"


def task(documents: Sequence[str]) -> dict[str, Any]:
    """The documents as a task of lm-evaluation-harness: log-likelihood in rolling windows of the model's length."""
    import datasets

    def dataset(**_: Any) -> Any:
        return datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": list(documents)})})

    names = {"word_perplexity": "weighted_perplexity", "byte_perplexity": "weighted_perplexity",
             "bits_per_byte": "bits_per_byte"}  # fmt: skip
    return {
        "task": TASK,
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "num_fewshot": 0,
        "metric_list": [{"metric": name, "aggregation": way, "higher_is_better": False} for name, way in names.items()],
    }


def ratio(losses: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """Sum of losses over sum of counts, and its standard error over documents.

    L = sum_d l_d / sum_d n_d; to first order its variance is D / (D - 1) * sum_d (l_d - L n_d)^2 / (sum_d n_d)^2
    (the ratio estimator of cluster sampling, a document being a cluster; Cochran, Sampling Techniques, section 6.5).

    Args:
        losses: negative log-likelihood of each document, in nats.
        counts: tokens, words or bytes of each.
    """
    total, documents = math.fsum(counts), len(losses)
    mean = math.fsum(losses) / total
    if documents < 2:
        return mean, None
    spread = math.fsum((loss - mean * count) ** 2 for loss, count in zip(losses, counts, strict=True))
    return mean, math.sqrt(documents / (documents - 1) * spread) / total


def metrics(samples: Sequence[dict[str, Any]], tokens: Sequence[int]) -> dict[str, dict[str, float | None]]:
    """Name -> value and standard error, from what lm-evaluation-harness logged of each document.

    Perplexities are exp(L), their errors exp(L) times that of L; token_loss is in nats, bits_per_byte is L / ln 2.

    Args:
        tokens: tokens of each document.
    """
    losses = [-sample["word_perplexity"][0] for sample in samples]
    words, size = ([sample[name][1] for sample in samples] for name in ("word_perplexity", "byte_perplexity"))
    loss, loss_error = ratio(losses, tokens)
    by_word, word_error = ratio(losses, words)
    by_byte, byte_error = ratio(losses, size)
    return {
        "token_loss": _entry(loss, loss_error, 1.0),
        "token_perplexity": _entry(_exp(loss), loss_error, _exp(loss)),
        "word_perplexity": _entry(_exp(by_word), word_error, _exp(by_word)),
        "byte_perplexity": _entry(_exp(by_byte), byte_error, _exp(by_byte)),
        "bits_per_byte": _entry(by_byte / math.log(2), byte_error, 1 / math.log(2)),
    }


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _entry(value: float, error: float | None, slope: float) -> dict[str, float | None]:
    return {"value": value, "stderr": None if error is None else error * slope}
