"""What share of what the teacher knew did the student keep? Questions about the embedded corpus' own facts.

Every fact that is asked for stands in the training split, in the very words of the question: this measures what a model
retains of the text it was trained on, not what it can conclude about text that it never saw.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nemo_minitron.config import DataConfig
from nemo_minitron.data.synthetic import corpus as embedded
from nemo_minitron.data.synthetic.facts import FACTS
from nemo_minitron.data.synthetic.grammar import capitalised
from nemo_minitron.data.synthetic.names import article_of
from nemo_minitron.data.synthetic.registers import spelled
from nemo_minitron.data.synthetic.world import Fact, world_for
from nemo_minitron.errors import DataError

CHOICE, COMPLETION = "facts_choice", "facts_completion"
QUESTIONS = 400


def stated_questions(data: DataConfig, documents: Iterable[str], limit: int, seed: int) -> list[dict[str, Any]]:
    """Up to `limit` questions, drawn at random, about facts that `documents` state.

    A question's `context` is a statement of the documents up to the object of the fact, in the wording of those that
    name both that they use most.

    Args:
        data: words, seed and domain of the embedded corpus.
        documents: its training split.

    Raises:
        DataError: the documents state none.
    """
    text = "\n".join(documents)
    pairs = list(zip(world_for(data.words, data.seed).facts, embedded.questions(data.words, data.seed)))
    random.Random(f"facts/{seed}").shuffle(pairs)
    write = spelled if data.domain == "broad" else str
    questions: list[dict[str, Any]] = []
    for fact, question in pairs:
        if len(questions) == limit:
            break
        # Without their first letter, which is a capital at the start of a sentence.
        statements = {write(stem + end): write(stem) for stem, end in wordings(fact)}
        times = {statement: text.count(statement[1:]) for statement in statements}
        likeliest = max(times, key=times.__getitem__)
        if times[likeliest]:
            choices = [write(choice) for choice in question["choices"]]
            questions.append(question | {"context": capitalised(statements[likeliest]), "choices": choices})
    if not questions:
        raise DataError("the training text states none of the facts of its world: there is nothing to ask")
    return questions


def wordings(fact: Fact) -> list[tuple[str, str]]:
    """What the corpus says of a fact where it names the entity in full and ends with the object: stem and end."""
    entity = fact.entity
    slots = {"n": entity.name, "s": entity.name, "p": entity.possessive, "v": fact.value, "a": article_of(fact.value)}
    ends = []
    for clause in FACTS[entity.kind][fact.attribute][1]:
        if clause.endswith(" {v}"):
            end = " {a} {v}" if clause.endswith(" {a} {v}") else " {v}"
            ends.append((clause.removesuffix(end).format(**slots), end.format(**slots)))
    return ends


def tasks(questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The questions as two tasks of lm-evaluation-harness.

    `facts_choice`: which of four objects of the same kind completes the statement; right where the true one is the
    likeliest (acc), or likeliest by the byte (acc_norm). `facts_completion`: the statement's end as the model goes on
    by itself, greedily; right where it is the true object, token for token (acc).
    """
    import datasets

    def dataset(**_: Any) -> Any:
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(list(questions))})

    shared = {"custom_dataset": dataset, "test_split": "test", "doc_to_text": "{{context}}", "num_fewshot": 0}
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    by_byte = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
    choice = {
        "task": CHOICE,
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [accuracy, by_byte],
    }
    completion = {
        "task": COMPLETION,
        "output_type": "loglikelihood",
        "doc_to_target": " {{choices[answer]}}",
        "metric_list": [accuracy],
    }
    return [shared | choice, shared | completion]


def retention(reference: Sequence[float], other: Sequence[float], chance: float) -> dict[str, Any]:
    """What share of the questions that the reference got right the other gets right as well.

    kept = |reference right and other right| / |reference right|, standard error sqrt(kept (1 - kept) / (n - 1)).
    above_chance = (kept - chance) / (1 - chance): 0 is what guessing keeps, 1 is everything.

    Args:
        reference: 1 or 0 for each question.
        other: the same of the other model.
        chance: share that guessing gets right.
    """
    both = [then for first, then in zip(reference, other, strict=True) if first]
    if not both:
        return {"value": None, "stderr": None, "above_chance": None, "questions": 0}
    kept = sum(both) / len(both)
    error = math.sqrt(kept * (1 - kept) / (len(both) - 1)) if len(both) > 1 else None
    return {
        "value": kept,
        "stderr": error,
        "above_chance": known(kept, chance),
        "questions": len(both),
    }


def known(accuracy: float, chance: float) -> float:
    """Share of the facts that a model knows, if it guesses at the others: (accuracy - chance) / (1 - chance)."""
    return (accuracy - chance) / (1 - chance)


def kept(right: Mapping[str, Mapping[str, Sequence[float]]], chance: float) -> dict[str, dict[str, Any]]:
    """Model -> task -> what it kept of the first model's right answers.

    Args:
        right: model -> task -> 1 or 0 for each question, the reference first.
        chance: share of facts_choice that guessing gets right; facts_completion has none.
    """
    reference = next(iter(right.values()))
    return {
        model: {task: retention(reference[task], answers[task], chance if task == CHOICE else 0.0) for task in answers}
        for model, answers in right.items()
    }
