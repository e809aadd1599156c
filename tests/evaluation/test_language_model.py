"""What lm-evaluation-harness is told of a model is what transformers computes, by its own class and by ours."""

import importlib.util

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance

from nemo_minitron.evaluation import lm_eval_api
from nemo_minitron.evaluation.language_model import TransformersLM

ASKED = [
    ("The river", " flows"),
    ("The river", " flows south"),
    ("", "A town"),
    ("The", " river"),
    ("The town ", "lies"),
]
TEXT = "The river flows from the town to the sea. " * 8
MAX_LENGTH = 48


@pytest.fixture(scope="module")
def loaded(small_models):
    folder = str(small_models["llama2"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float64).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["the harness's", "ours"])
def asked(request, loaded):
    """The class that is used with the installed harness, and ours, which the fork in NeMo's containers needs."""
    model, tokenizer = loaded
    settings = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 2, "max_length": MAX_LENGTH}
    if request.param == "ours":
        return TransformersLM(**settings)
    found = lm_eval_api.language_model(**settings, reuse=True, check=lambda ids: None)
    whole = importlib.util.find_spec("lm_eval.models.utils_hf") is not None
    assert isinstance(found, TransformersLM) != whole
    return found


def requests(kind, arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def likelihood(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logs = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    after = [logs[len(context) - 1 + place] for place in range(len(continuation))]
    greedy = all(int(row.argmax()) == token for row, token in zip(after, continuation))
    return sum(float(row[token]) for row, token in zip(after, continuation)), greedy


def test_continuations(loaded, asked):
    model, tokenizer = loaded
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    found = asked.loglikelihood(requests("loglikelihood", ASKED))
    for (context, continuation), (value, greedy) in zip(ASKED, found):
        bare = context.rstrip()
        known = tokenizer.encode(bare) if bare else [first]
        tokens = tokenizer.encode(f"{context}{continuation}") if bare else tokenizer.encode(continuation)
        expected = likelihood(model, known, tokens[len(known) :] if bare else tokens)
        assert value == pytest.approx(expected[0], rel=1e-6) and greedy == expected[1], (context, continuation)


def test_whole_texts_in_windows(loaded, asked):
    """Each window ends where the last one did and begins one window's length before its own end."""
    model, tokenizer = loaded
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(tokens) > 2 * MAX_LENGTH
    expected, done = 0.0, 0
    while done < len(tokens):
        end = min(done + MAX_LENGTH, len(tokens))
        start = max(end - MAX_LENGTH, 0)
        context = [tokens[start - 1] if start else first, *tokens[start:done]]
        expected += likelihood(model, context, tokens[done:end])[0]
        done = end
    [found] = asked.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXT,)]))
    assert found == pytest.approx(expected, rel=1e-6)


def test_greedy_text_ends_where_it_is_told(loaded, asked):
    model, tokenizer = loaded

    def written(context: str, count: int) -> str:
        tokens = tokenizer(context, return_tensors="pt").input_ids[:, -(MAX_LENGTH - count) :]
        made = model.generate(tokens, max_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(tokens))
        return tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True)

    contexts = ["The river", "A town lies on the river", TEXT]
    settings = {"until": ["\n\n\n"], "max_gen_toks": 12, "do_sample": False}
    found = asked.generate_until(requests("generate_until", [(context, dict(settings)) for context in contexts]))
    assert found == [written(context, 12) for context in contexts]
    end = found[0][3:5]
    shorter = settings | {"until": [end]}
    assert asked.generate_until(requests("generate_until", [(contexts[0], shorter)])) == [found[0].split(end)[0]]
