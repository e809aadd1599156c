"""Summaries against rouge_score on what transformers generates."""

import json

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_minitron.cli.main import main
from nemo_minitron.evaluation.summarization import rouge

ARTICLES = [
    {
        "article": "The quay of Sivland is closed . The boats came late and nobody knew why .",
        "highlights": "The quay .",
    },
    {"article": "In the town of Navstad the market opens in spring . " * 8, "highlights": "market in town opens"},
    {"article": "A cup broke .", "highlights": "the cup"},
]


@pytest.fixture(scope="module")
def articles(tmp_path_factory):
    path = tmp_path_factory.mktemp("articles") / "articles.jsonl"
    path.write_text("".join(json.dumps(article) + "\n" for article in ARTICLES))
    return path


def test_rouge_is_that_of_the_text_that_transformers_generates(small_models, articles, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = [str(small_models["nemo1"]), "tasks=summarization", f"articles={articles}", "max_new_tokens=10"]
    assert main(["evaluate", *arguments, f"output={output}"]) == 0
    table = capsys.readouterr().out
    assert "summarization rougeLsum" in table and "tokens_per_second" in table
    (metrics,) = json.loads((output / "results.json").read_text())["results"].values()
    metrics = metrics["summarization"]
    folder = small_models["nemotron"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    suffix = tokenizer.encode(" TL;DR: ")
    scores, count, summaries = [], 0, []
    for article in ARTICLES:
        tokens = tokenizer.encode(article["article"])[: 64 - 10 - len(suffix)] + suffix
        made = model.generate(torch.tensor([tokens]), max_new_tokens=10, do_sample=False, pad_token_id=0)
        count += made.shape[1] - len(tokens)
        summaries.append(tokenizer.decode(made[0, len(tokens) :], skip_special_tokens=True))
        scores.append(RougeScorer(["rouge1", "rougeLsum"]).score(article["highlights"], summaries[-1]))
    for kind in ("rouge1", "rougeLsum"):
        assert metrics[kind]["value"] == pytest.approx(100 * sum(score[kind].fmeasure for score in scores) / 3)
    assert metrics["output_tokens"]["value"] == count
    seconds = metrics["total_latency_seconds"]["value"]
    assert metrics["tokens_per_second"]["value"] == pytest.approx(count / seconds)
    samples = [json.loads(line)["answer"] for line in (output / "samples.jsonl").read_text().splitlines()]
    assert samples == summaries


def test_rouge_of_equal_texts_is_100_and_of_unlike_ones_0():
    metrics = rouge(["the cup broke", "one two"], ["the cup broke", "three four"])
    assert {kind: entry["value"] for kind, entry in metrics.items()} == dict.fromkeys(metrics, 50.0)
    assert metrics["rouge1"]["stderr"] == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "does not exist"),
        ("", "holds no articles"),
        ('{"article": "x"}\n', "article 1 has no text"),
        ("[1]\n", "no JSON objects"),
        ("{", "cannot be read"),
    ],
)
def test_bad_articles_are_refused(small_models, tmp_path, capsys, text, expected):
    path = tmp_path / "a.jsonl"
    if text is not None:
        path.write_text(text)
    assert main(["evaluate", str(small_models["llama2"]), "tasks=summarization", f"articles={path}"]) == 1
    assert expected in capsys.readouterr().err


def test_the_news_that_is_not_here_says_how_to_get_it(small_models, capsys):
    assert main(["evaluate", str(small_models["llama2"]), "tasks=summarization"]) == 1
    said = capsys.readouterr().err
    assert "hf download --repo-type dataset abisee/cnn_dailymail" in said and "articles=FILE.jsonl" in said
