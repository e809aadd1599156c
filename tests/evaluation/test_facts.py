"""Questions about the embedded corpus: what knows the text gets all of them right, what does not, one in four."""

import hashlib
import json
import math
import random

import pytest
from lm_eval.api.model import LM

from nemo_minitron.cli.main import main
from nemo_minitron.config import DataConfig, EvaluateConfig
from nemo_minitron.data.synthetic import corpus as embedded
from nemo_minitron.errors import DataError
from nemo_minitron.evaluation import command as harness
from nemo_minitron.evaluation import facts, lm_eval_api

WORDS = 300_000
CONFIG = EvaluateConfig(models=["-"], tasks="facts")


class Stub(LM):
    """A language model that needs to know nothing but how likely a text is."""

    def loglikelihood(self, requests):
        return [self.score(*request.args) for request in requests]

    def generate_until(self, requests):
        raise AssertionError("facts are asked by likelihood")

    loglikelihood_rolling = generate_until


class Oracle(Stub):
    """Has the training split at hand: likely is what stands in it, and it says nothing else."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def score(self, context, continuation):
        known = f"{context}{continuation}"[1:] in self.text
        return (0.0 if known else -50.0), known


class Ignorant(Stub):
    """Finds everything as likely as its hash says."""

    def score(self, context, continuation):
        digest = hashlib.sha256(f"{context}|{continuation}".encode()).digest()
        return -float(digest[0] + digest[1] / 256), False


@pytest.fixture(scope="module", params=["encyclopedic", "broad"])
def asked(request):
    data = DataConfig(output="-", words=WORDS, seed=7, domain=request.param)
    train = list(embedded.documents(request.param, "train", WORDS, 7))
    return "\n".join(train), facts.stated_questions(data, train, 600, 1)


def accuracy(model, questions) -> dict:
    loaded = lm_eval_api.load(lm_eval_api.task_manager(include_defaults=False), facts.tasks(questions))
    return harness.run_harness(model, loaded, CONFIG)


def test_every_question_stands_in_the_training_text_with_its_answer(asked):
    text, questions = asked
    assert len(questions) == 600
    for question in questions:
        right = question["choices"][question["answer"]]
        assert f"{question['context']} {right}"[1:] in text
        assert len(set(question["choices"])) == 4
    assert {question["answer"] for question in questions} == {0, 1, 2, 3}
    assert len({question["context"] for question in questions}) > 590


def test_who_has_the_text_knows_all_and_who_has_not_guesses(asked):
    text, questions = asked
    metrics, answers = accuracy(Oracle(text), questions)
    # A town may have two landmarks in the text of another fact's wording; one in a hundred at most.
    assert metrics["facts_choice"]["acc"]["value"] > 0.99 and metrics["facts_completion"]["acc"]["value"] == 1.0
    assert len(answers) == 2 * len(questions)
    metrics, _ = accuracy(Ignorant(), questions)
    entry = metrics["facts_choice"]["acc"]
    assert abs(entry["value"] - 0.25) < 4 * entry["stderr"]
    assert entry["stderr"] == pytest.approx(math.sqrt(entry["value"] * (1 - entry["value"]) / 599), rel=1e-3)
    assert metrics["facts_completion"]["acc"]["value"] == 0


def test_wrong_answers_stand_nowhere(asked):
    """The distractors complete the statement in no document: nobody is led astray by the text itself."""
    text, questions = asked
    wrong = [
        f"{question['context']} {choice}"
        for question in questions
        for number, choice in enumerate(question["choices"])
        if number != question["answer"]
    ]
    assert sum(f"{statement[1:]} " in text for statement in wrong) <= len(wrong) / 200


def test_a_text_that_states_nothing_is_no_ground_for_questions():
    with pytest.raises(DataError, match="states none of the facts"):
        facts.stated_questions(DataConfig(output="-", words=WORDS, seed=7), ["Nothing at all ."], 5, 1)


def test_what_is_kept_is_counted_among_what_the_reference_knew():
    kept = facts.retention([1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0], 0.25)
    assert kept["value"] == 0.75 and kept["questions"] == 4
    assert kept["stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert kept["above_chance"] == pytest.approx((0.75 - 0.25) / 0.75)
    assert facts.retention([0, 0], [1, 0], 0.25)["value"] is None
    rng = random.Random(5)
    teacher = [rng.random() < 0.6 for _ in range(4000)]
    guesses = [rng.random() < 0.25 for _ in range(4000)]
    assert abs(facts.retention(teacher, guesses, 0.25)["above_chance"]) < 0.05


def test_models_side_by_side(small_models, tmp_path, capsys):
    """The same weights in another format keep all; a second run measures nothing."""
    output = tmp_path / "facts"
    models = [str(small_models[name]) for name in ("llama2", "nemo2", "nemotron")]
    arguments = [*models, "tasks=facts", "words=60000", "limit=120", f"output={output}"]
    assert main(["evaluate", *arguments]) == 0
    table = capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["llama2", "llama-nemo2", "nemotron"]
    assert all(name in table for name in ("llama2", "llama-nemo2", "nemotron", "kept")) and "±" in table
    kept = results["facts"]["kept"]
    assert kept["llama-nemo2"]["facts_choice"]["value"] == 1.0
    assert kept["nemotron"]["facts_choice"]["value"] < 1.0
    entry = results["results"]["nemotron"]["facts_choice"]["acc"]
    assert abs(entry["value"] - 0.25) < 4 * entry["stderr"]
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * 2 * 120
    mine = [one["acc"] for one in samples if (one["model"], one["task"]) == ("nemotron", "facts_choice")]
    assert sum(mine) / 120 == pytest.approx(entry["value"])
    before = (output / "manifest.json").stat().st_mtime_ns
    assert main(["evaluate", *arguments]) == 0
    assert (output / "manifest.json").stat().st_mtime_ns == before
    assert main(["evaluate", *arguments, "limit=100"]) == 1
    assert "overwrite=true" in capsys.readouterr().err


def test_facts_want_the_embedded_corpus(small_models, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n\n".join(f"text {number}" for number in range(40)))
    arguments = [str(small_models["llama2"]), "tasks=facts", f"corpus={tmp_path / 'a.txt'}"]
    assert main(["evaluate", *arguments]) == 1
    assert "corpus=embedded" in capsys.readouterr().err
