"""A model of transformers as lm-evaluation-harness asks it, for where the harness has no class that works.

NVIDIA's fork of lm-evaluation-harness serves endpoints: its own class for models of transformers, HFLM, imports helpers
that the fork removed. This one answers the same questions as HFLM of 0.4.13, for causal models on one device. It is
imported where lm_eval is.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

#: Tokens that are written at most where a task does not say.
NEW_TOKENS = 256


class TransformersLM(TemplateLM):
    """Log-likelihoods and greedy text of one causal model.

    Args:
        pretrained: the model, on its device.
        tokenizer: as transformers loads it; it decides whether text begins with a special token.
        batch_size: sequences in one forward pass.
        max_length: tokens that the model takes.
    """

    def __init__(self, *, pretrained: Any, tokenizer: Any, batch_size: int, max_length: int):
        super().__init__()
        self.model, self.tokenizer = pretrained, tokenizer
        self.batch_size, self.max_length = batch_size, max_length

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            begun = string.startswith(self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = not begun
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each context and continuation; a continuation without a context follows the prefix token."""
        asked = []
        for context, continuation in (request.args for request in requests):
            if context:
                encoded = self._encode_pair(context, continuation)
            else:
                tokens = self.tok_encode(continuation, add_special_tokens=False)
                begun = tokens[0] == self.prefix_token_id
                encoded = (tokens[:1], tokens[1:]) if begun else ([self.prefix_token_id], tokens)
            asked.append(((context, continuation), *encoded))
        return self._loglikelihood_tokens(asked)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text: every token predicted once, in windows of the model's length."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            asked = [((None, None), *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(asked)))
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation) in tokens: the continuation's log-likelihood, and whether it is what
        the model would write. Requests for the same tokens share a forward pass."""
        wanted: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            tokens = tuple((context + continuation)[-(self.max_length + 1) : -1])
            wanted.setdefault(tokens, []).append(number)
        found: list[Any] = [None] * len(requests)
        for batch in _batches(sorted(wanted, key=len, reverse=True), self.batch_size):
            for tokens, logits in zip(batch, self._logits(batch)):
                for number in wanted[tokens]:
                    found[number] = _likelihood(logits, requests[number][2])
        return found

    @torch.no_grad()
    def _logits(self, batch: Sequence[Sequence[int]]) -> Iterator[Any]:
        """Logits [s, v] of each sequence; shorter ones are filled up behind their end, where nothing looks."""
        inputs = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens in batch], batch_first=True)
        logits = self.model(inputs.to(self.model.device)).logits  # [b, s, v]
        return (row[: len(tokens)] for row, tokens in zip(logits, batch))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context until one of the request's texts, its end token, or so many
        tokens."""
        contexts, settings = zip(*(request.args for request in requests))
        alike: dict[str, list[int]] = {}
        for number, wanted in enumerate(settings):
            alike.setdefault(repr(wanted), []).append(number)
        found = [""] * len(contexts)
        for numbers in alike.values():
            numbers.sort(key=lambda number: len(contexts[number]), reverse=True)
            for batch in _batches(numbers, self.batch_size):
                texts = self._write([contexts[number] for number in batch], dict(settings[batch[0]]))
                for number, text in zip(batch, texts):
                    found[number] = text
        return found

    @torch.no_grad()
    def _write(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = [stop for stop in [*_listed(settings.pop("until", None)), end] if stop]
        new = int(settings.pop("max_gen_toks", NEW_TOKENS))
        if not settings.get("do_sample") and not settings.get("temperature"):
            settings["do_sample"] = False
            settings.pop("temperature", None)
        tokens = [self.tok_encode(context)[-(self.max_length - new) :] for context in contexts]
        longest = max(map(len, tokens))
        inputs = torch.zeros(len(tokens), longest, dtype=torch.long)  # [b, s], filled up in front
        mask = torch.zeros_like(inputs)
        for row, context in enumerate(tokens):
            inputs[row, longest - len(context) :] = torch.tensor(context)
            mask[row, longest - len(context) :] = 1
        written = self.model.generate(
            input_ids=inputs.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=new,
            stop_strings=until,
            tokenizer=self.tokenizer,
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eot_token_id,
            **settings,
        )
        texts = [self.tokenizer.decode(row[longest:], skip_special_tokens=True) for row in written]
        return [_before(text, until) for text in texts]


def _likelihood(logits: Any, continuation: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of the last tokens of a sequence whose logits are [s, v], and whether each is the likeliest."""
    logs = torch.log_softmax(logits[-len(continuation) :], dim=-1)  # [c, v]
    tokens = torch.tensor(list(continuation), device=logs.device)
    value = logs.gather(1, tokens[:, None]).sum()
    return float(value), bool((logs.argmax(dim=-1) == tokens).all())


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def _listed(until: str | Sequence[str] | None) -> Sequence[str]:
    return [until] if isinstance(until, str) else until or []


def _before(text: str, ends: Iterable[str]) -> str:
    """The text up to the first of its ends."""
    for end in ends:
        text = text.split(end)[0]
    return text
