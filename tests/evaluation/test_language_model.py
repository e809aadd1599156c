"""What lm-evaluation-harness is told of a model is what transformers computes, by its own class and by ours."""

import importlib.util

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance

import models
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.errors import DataError
from nemo_minitron.evaluation import likelihoods, lm_eval_api
from nemo_minitron.evaluation.language_model import Bounds, TransformersLM

ASKED = [
    ("The river", " flows"),
    ("The river", " flows south"),
    ("", "A town"),
    ("The", " river"),
    ("The town ", "lies"),
]
TEXT = "The river flows from the town to the sea. " * 8
MAX_LENGTH = 48
#: Whether the harness has a class of its own that works; the fork in NeMo's containers has not.
WHOLE = importlib.util.find_spec("lm_eval.models.utils_hf") is not None


@pytest.fixture(scope="module")
def loaded(small_models):
    folder = str(small_models["llama2"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float64).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["the harness's", "ours"])
def asked(request, loaded):
    """The class that is used with the installed harness, and ours, which the fork in NeMo's containers needs."""
    model, tokenizer = loaded
    settings = {"pretrained": model, "tokenizer": tokenizer, "max_length": MAX_LENGTH, "bounds": bounds(most=2)}
    if request.param == "ours":
        return TransformersLM(**settings)
    view = lm_eval_api.language_model(**settings, check=lambda ids: None)
    assert isinstance(view, TransformersLM) != WHOLE
    return view


def bounds(window: int = MAX_LENGTH, **fields) -> Bounds:
    return Bounds(window=window, **{"room": 1e9, "a_token": 1, **fields})


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
    likelihoods_of = asked.loglikelihood(requests("loglikelihood", ASKED))
    for (context, continuation), (value, greedy) in zip(ASKED, likelihoods_of):
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
    [total] = asked.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXT,)]))
    assert total == pytest.approx(expected, rel=1e-6)


def test_greedy_text_ends_where_it_is_told(loaded, asked):
    model, tokenizer = loaded

    def written(context: str, count: int) -> str:
        tokens = tokenizer(context, return_tensors="pt").input_ids[:, -(MAX_LENGTH - count) :]
        made = model.generate(tokens, max_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(tokens))
        return tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True)

    contexts = ["The river", "A town lies on the river", TEXT]
    settings = {"until": ["\n\n\n"], "max_gen_toks": 12, "do_sample": False}
    texts = asked.generate_until(requests("generate_until", [(context, dict(settings)) for context in contexts]))
    assert texts == [written(context, 12) for context in contexts]
    end = texts[0][3:5]
    shorter = settings | {"until": [end]}
    assert asked.generate_until(requests("generate_until", [(contexts[0], shorter)])) == [texts[0].split(end)[0]]


@pytest.mark.parametrize("name", ["llama31", "llama32-tied", "mistral-window", "nemotron", "qwen2", "qwen3"])
def test_every_family_answers_what_the_harness_does_with_whole_logits(small_models, name, monkeypatch):
    """Its own class where there is one, float64 logits otherwise; logits of a few tokens at a time, one sequence or all
    in a batch."""
    model = models.build(name, torch.float64, vocab_size=259)
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_models["tokenizer"])
    pairs, texts = requests("loglikelihood", ASKED), requests("loglikelihood_rolling", [(TEXT,), ("A town.",), (TEXT,)])
    settings = {"pretrained": model, "tokenizer": tokenizer, "max_length": MAX_LENGTH}
    if WHOLE:
        from lm_eval.models.huggingface import HFLM

        reference = HFLM(**settings, backend="causal", batch_size=1, logits_cache=False)
    else:
        reference = TransformersLM(**settings, bounds=bounds())
    expected, rolling = reference.loglikelihood(pairs), reference.loglikelihood_rolling(texts)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda layer, args, logits: seen.append(logits.numel()))
    monkeypatch.setattr(likelihoods, "CHUNK", 4 * 259 * 5)
    for room in (1, 4 * MAX_LENGTH):
        view = lm_eval_api.language_model(**settings, bounds=bounds(room=room), check=lambda ids: None)
        for (value, greedy), (wanted, as_written) in zip(view.loglikelihood(pairs), expected, strict=True):
            assert value == pytest.approx(wanted, rel=1e-9) and greedy == as_written
        assert view.loglikelihood_rolling(texts) == pytest.approx(rolling, rel=1e-9)
    assert max(seen) == 5 * 259


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_log_likelihoods_in_chunks_are_those_of_whole_logits(dtype, error, monkeypatch):
    model = models.build("nemotron", dtype)
    hidden = torch.randn(23, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        weight = model.get_output_embeddings().weight.double()
        logs = (hidden.double() @ weight.T).log_softmax(-1)
        likeliest = model.get_output_embeddings()(hidden).argmax(-1)
        targets = torch.where(torch.arange(23) % 2 == 0, likeliest, (likeliest + 1) % 259)
        for rows in (1, 7, 23, 100):
            monkeypatch.setattr(likelihoods, "CHUNK", 4 * 259 * rows)
            own, greedy = likelihoods.token_log_likelihoods(model, hidden, targets)
            expected = logs.gather(1, targets[:, None])[:, 0]
            assert torch.allclose(own.double(), expected, rtol=error, atol=error)
            assert greedy.tolist() == [number % 2 == 0 for number in range(23)]


def test_a_batch_holds_as_many_sequences_as_fit_and_one_at_least():
    lengths = [50, 40, 40, 9, 5, 5, 1]
    alone = [range(number, number + 1) for number in range(7)]
    assert likelihoods.batches(lengths, 10, 100) == [*alone[:4], range(4, 6), alone[6]]
    assert likelihoods.batches(lengths, 1, 100) == [range(2), range(2, 4), range(4, 7)]
    assert likelihoods.batches(lengths, 1, 100, most=1) == alone
    assert likelihoods.batches([], 1, 100) == []


@pytest.mark.parametrize("name", ["llama2", "mistral", "nemotron", "qwen2", "qwen3"])
def test_attention_is_told_that_it_is_causal_and_gets_no_mask(name, monkeypatch):
    masks = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, is_causal=False, **options):
        masks.append((attn_mask, is_causal))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        likelihoods.last_hidden(models.build(name, torch.float32), torch.zeros(2, 16, dtype=torch.long))
    assert masks == [(None, True)] * 2


@pytest.mark.parametrize("name", ["llama2", "nemotron"])
def test_a_batch_takes_about_what_it_is_said_to(name, tmp_path):
    """Tensors that are alive at once, in a model whose layers are wide against everything else."""
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = models.build(name, torch.float32, **sizes)
    model.save_pretrained(tmp_path)
    alive, most = {}, [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in own and storage.data_ptr() not in alive:
                        alive[storage.data_ptr()] = storage.nbytes()
                        weakref.finalize(storage, alive.pop, storage.data_ptr(), None)
            most[0] = max(most[0], sum(alive.values()))
            return out

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tokens = torch.zeros(4, 64, dtype=torch.long)
    with torch.no_grad(), Watch():
        likelihoods.last_hidden(model, tokens)
    said = likelihoods.activation_bytes(open_checkpoint(tmp_path).architecture, 4) * tokens.numel()
    assert 0.6 < most[0] / said < 1.2


def test_an_answer_longer_than_the_model_is_refused(loaded):
    model, tokenizer = loaded
    asked = TransformersLM(pretrained=model, tokenizer=tokenizer, max_length=4, bounds=bounds())
    with pytest.raises(DataError, match="an answer has .* tokens, the model takes 4: give a larger max_length"):
        asked.loglikelihood(requests("loglikelihood", [("The river", " flows from the town to the sea.")]))
