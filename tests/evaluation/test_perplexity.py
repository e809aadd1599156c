"""Perplexities against the models' own logits, in float64."""

import gc
import json
import math
import random
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_minitron.cli.main import main
from nemo_minitron.evaluation import command as harness
from nemo_minitron.evaluation.perplexity import ratio

LENGTH = 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents with known boundaries; one is longer than the models' context, and its windows are all alike."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = ["The quay of Sivland is closed .", "Nobody knew the way ; the boats came late .\nThey left .", "x " * 120]
    (folder / "train.jsonl").write_text(json.dumps({"text": "unused"}) + "\n")
    (folder / "validation.jsonl").write_text(json.dumps({"text": "unused as well"}) + "\n")
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder, texts


def losses(folder, texts, window: int = LENGTH) -> list[float]:
    """Negative log-likelihood of each text; windows that share one token, the last one full."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float64).eval()
    totals = []
    for text in texts:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        padded, total, end = [tokenizer.bos_token_id, *tokens], 0.0, 0
        while end < len(tokens):
            last = min(end + window, len(tokens))
            first = max(0, last - window)
            with torch.no_grad():
                logits = model(torch.tensor([padded[first:last]])).logits[0].double()
            scores = logits.log_softmax(-1).gather(1, torch.tensor(tokens[first:last])[:, None])[:, 0]
            total -= float(scores[end - first :].sum())
            end = last
        totals.append(total)
    return totals


@pytest.mark.parametrize(
    ("given", "same_as"),
    [("nemo2", "llama2"), ("nemotron", "nemotron"), ("depth", "depth"), ("mistral-depth", "mistral-depth")],
)
def test_perplexities_are_those_of_the_logits(small_models, corpus, capsys, given, same_as):
    folder, texts = corpus
    arguments = [str(small_models[given]), "tasks=perplexity", f"corpus={folder}", "--json"]
    assert main(["evaluate", *arguments]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    values = {name: entry["value"] for name, entry in next(iter(results.values()))["perplexity"].items()}
    loss = sum(losses(small_models[same_as], texts))
    tokenizer = AutoTokenizer.from_pretrained(small_models[same_as])
    # A trailing blank starts a last, empty word for lm-evaluation-harness.
    words = sum(text.count(" ") + text.count("\n") + 1 for text in texts)
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    assert values["word_perplexity"] == pytest.approx(math.exp(loss / words), rel=1e-3)
    assert values["byte_perplexity"] == pytest.approx(math.exp(loss / size), rel=1e-4)
    assert values["bits_per_byte"] == pytest.approx(loss / size / math.log(2), rel=1e-5)
    assert values["token_loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert values["token_perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)


def test_the_text_is_read_by_its_key(small_models, corpus, tmp_path, capsys):
    folder, texts = corpus
    for split in ("train", "validation", "test"):
        rows = [json.loads(line)["text"] for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        (tmp_path / f"{split}.json").write_text(json.dumps([{"body": {"en": text}} for text in rows]))
    results = []
    for source, key in ((folder, "text"), (tmp_path, "body.en")):
        arguments = [str(small_models["llama2"]), "tasks=perplexity", f"corpus={source}", f"text_key={key}", "--json"]
        assert main(["evaluate", *arguments]) == 0
        results.append(json.loads(capsys.readouterr().out)["results"])
    assert results[0] == results[1]


def test_the_standard_error_is_that_of_a_bootstrap_over_documents():
    rng = random.Random(3)
    counts = [rng.randint(50, 400) for _ in range(300)]
    sums = [count * rng.gauss(3.0, 0.4) + rng.gauss(0, 20) for count in counts]
    mean, error = ratio(sums, counts)
    assert mean == pytest.approx(sum(sums) / sum(counts))
    drawn = []
    for _ in range(2000):
        chosen = rng.choices(range(300), k=300)
        drawn.append(sum(sums[i] for i in chosen) / sum(counts[i] for i in chosen))
    middle = sum(drawn) / len(drawn)
    spread = math.sqrt(sum((value - middle) ** 2 for value in drawn) / len(drawn))
    assert error == pytest.approx(spread, rel=0.1)
    assert ratio([3.0], [2]) == (1.5, None)


def test_the_corpus_of_a_data_folder_is_the_one_it_was_made_from(small_models, corpus, tmp_path, capsys):
    folder, texts = corpus
    made = tmp_path / "made"
    assert main(["data", f"output={made}", f"source={folder}", f"tokenizer={small_models['tokenizer']}"]) == 0
    capsys.readouterr()
    results = []
    for place in (folder, made):
        assert main(["evaluate", str(small_models["llama2"]), f"corpus={place}", "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out)["results"])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("given", "used"), [("window=16", 16), ("window=64", 64), ("window=1000", 64), ("max_length=24", 24)]
)
def test_documents_are_read_in_windows_that_the_results_name(small_models, corpus, tmp_path, capsys, given, used):
    folder, texts = corpus
    output = tmp_path / "found"
    assert main(["evaluate", str(small_models["llama2"]), f"corpus={folder}", f"output={output}", given]) == 0
    assert f"perplexity in windows of {used} tokens" in capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    [measured] = results["results"].values()
    tokenizer = AutoTokenizer.from_pretrained(small_models["llama2"])
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    expected = sum(losses(small_models["llama2"], texts, used)) / tokens
    assert results["window"] == used
    assert measured["perplexity"]["token_loss"]["value"] == pytest.approx(expected, rel=1e-5)


def test_models_of_different_lengths_are_read_in_the_same_windows_and_freed_one_after_the_other(
    small_models, corpus, tmp_path, capfd, monkeypatch
):
    folder, texts = corpus
    short = tmp_path / "short"
    model = AutoModelForCausalLM.from_pretrained(small_models["llama2"])
    model.config.max_position_embeddings = 32
    model.save_pretrained(short)
    AutoTokenizer.from_pretrained(small_models["llama2"]).save_pretrained(short)
    load, seen = harness.load, []

    def watched(*args, **options):
        assert not [one for one in seen if one() is not None]
        loaded = load(*args, **options)
        seen.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(harness, "load", watched)
    del model
    gc.collect()
    assert main(["evaluate", str(small_models["llama2"]), str(short), f"corpus={folder}", "--json"]) == 0
    out, said = capfd.readouterr()
    results = json.loads(out)
    first, second = (entry["perplexity"]["token_loss"]["value"] for entry in results["results"].values())
    assert len(seen) == 2 and results["window"] == 32
    assert first == second
    last = [line for line in said.splitlines() if line.startswith("evaluate short, log-likelihoods: sequence ")][-1]
    assert last.endswith("0:00 left")


@pytest.mark.parametrize("given", ["batch_memory_gb=0", "window=1", "log_every_n_steps=0", "batch_size=0"])
def test_settings_of_batches_that_cannot_be_are_refused(small_models, given, capsys):
    assert main(["evaluate", str(small_models["llama2"]), given]) == 2
    assert given.partition("=")[0] in capsys.readouterr().err
