"""A model of transformers as lm-evaluation-harness asks it, in a bounded amount of memory.

Bounded answers for any class of the harness's that has a `model` and a `tokenizer`; TransformersLM is one of our own,
for where the harness has none that works: NVIDIA's fork of lm-evaluation-harness serves endpoints, and its own class
for models of transformers, HFLM, imports helpers that the fork removed. It answers the same questions as HFLM of
0.4.13, for causal models on one device. This module is imported where lm_eval is.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nemo_minitron.errors import DataError
from nemo_minitron.evaluation.likelihoods import batches, last_hidden, token_log_likelihoods
from nemo_minitron.jobs.progress import Progress, Silent

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: What a request is about, its context and its continuation, the latter two in tokens.
TokenRequest = tuple[tuple[str | None, str | None], list[int], list[int]]
#: Tokens that are written at most where a task does not say.
NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a forward pass may hold.

    Attributes:
        window: tokens of a window of texts that are scored whole.
        room: bytes of a batch's activations.
        a_token: bytes of them a token.
        cache: bytes a token of keys and values.
        most: sequences a batch at most; None: no limit but `room`.
        watched: gives, for what is done and how many there are of it, what is told of each batch.
    """

    window: int
    room: float
    a_token: int
    cache: int = 0
    most: int | None = None
    watched: Callable[[str, int], Progress] = lambda what, total: Silent()


class Bounded(TemplateLM):
    """Log-likelihoods and texts of a language model batch by batch, as many sequences in one as `bounds` allow.

    Put it before a class of lm-evaluation-harness's: it answers what that class would, to rounding, and never holds the
    logits of a batch.
    """

    bounds: Bounds
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int

    def loglikelihood_rolling(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text: every token predicted once, in windows; the last one ends with the text.

        A special token that the tokenizer puts before a text is the first window's context, and is not predicted.
        """
        asked: list[TokenRequest] = []
        owners: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=min(self.bounds.window, self.max_length),
                context_len=1,
            )
            asked += [((None, None), *make_disjoint_window(window)) for window in windows]
            owners += [number] * (len(asked) - len(owners))
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(asked)):
            totals[number] += value
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[TokenRequest], *_: Any, **__: Any) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation) in tokens: the continuation's log-likelihood, and whether it is what
        the model would write. Requests for the same tokens share a forward pass."""
        wanted: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            tokens = tuple((context + continuation)[-(self.max_length + 1) : -1])
            wanted.setdefault(tokens, []).append(number)
        sequences = sorted(wanted, key=len, reverse=True)
        likelihoods = [(0.0, False)] * len(requests)
        with self.bounds.watched("log-likelihoods", len(sequences)) as progress:
            for batch in self._batches([len(tokens) for tokens in sequences], self.bounds.a_token):
                some = [sequences[place] for place in batch]
                for tokens, hidden in zip(some, self._hidden(some)):
                    for number in wanted[tokens]:
                        likelihoods[number] = self._likelihood(hidden, requests[number][2])
                progress.advance(len(some), tokens=sum(map(len, some)))
        return likelihoods

    def _batches(self, lengths: Sequence[int], bytes_a_token: int) -> list[range]:
        return batches(lengths, bytes_a_token, self.bounds.room, self.bounds.most)

    def _hidden(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """What the output layer reads [s, h] of each sequence; shorter ones are filled up behind their end, where
        nothing looks."""
        tokens = [torch.tensor(sequence) for sequence in sequences]
        inputs = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(self.model.device)
        hidden = last_hidden(self.model, inputs)  # [b, s, h]
        return [row[: len(sequence)] for row, sequence in zip(hidden, sequences)]

    def _likelihood(self, hidden: torch.Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
        """Log-likelihood of the last tokens of a sequence, and whether each is the likeliest."""
        if len(continuation) > len(hidden):
            raise DataError(
                f"an answer has {len(continuation)} tokens, the model takes {self.max_length}: give a larger "
                "max_length, or a model that takes more"
            )
        tokens = torch.tensor(list(continuation), device=hidden.device)
        logs, likeliest = token_log_likelihoods(self.model, hidden[-len(tokens) :], tokens)
        return float(logs.sum(dtype=torch.float64)), bool(likeliest.all())

    def generate_until(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context until one of the request's texts, its end token, or so many
        tokens."""

        def tokens_of(request: "Instance") -> int:
            context, settings = request.args
            made = int(settings.get("max_gen_toks", NEW_TOKENS))
            return min(len(self.tok_encode(context)) + made, self.max_length)

        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        written = [""] * len(requests)
        a_token = self.bounds.a_token + self.bounds.cache
        with self.bounds.watched("texts", len(requests)) as progress:
            for numbers in alike.values():
                lengths = {number: tokens_of(requests[number]) for number in numbers}
                numbers.sort(key=lengths.__getitem__, reverse=True)
                for batch in self._batches([lengths[number] for number in numbers], a_token):
                    some = [numbers[place] for place in batch]
                    texts = super().generate_until([requests[number] for number in some], disable_tqdm=True)
                    for number, text in zip(some, texts):
                        written[number] = text
                    progress.advance(len(some))
        return written


class OneBatch(TemplateLM):
    """Texts of one causal model, all that are asked for at once; log-likelihoods are Bounded's.

    Args:
        pretrained: the model, on its device.
        tokenizer: as transformers loads it; it decides whether text begins with a special token.
        max_length: tokens that the model takes.
    """

    def __init__(self, *, pretrained: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", max_length: int):
        super().__init__()
        self.model, self.tokenizer, self.max_length = pretrained, tokenizer, max_length

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

    def loglikelihood(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each context and continuation; a continuation without a context follows the prefix token."""
        asked: list[TokenRequest] = []
        for context, continuation in (request.args for request in requests):
            if context:
                encoded = self._encode_pair(context, continuation)
            else:
                tokens = self.tok_encode(continuation, add_special_tokens=False)
                begun = tokens[0] == self.prefix_token_id
                encoded = (tokens[:1], tokens[1:]) if begun else ([self.prefix_token_id], tokens)
            asked.append(((context, continuation), *encoded))
        return self._loglikelihood_tokens(asked)

    def generate_until(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context; all requests with the same settings."""
        contexts, settings = zip(*(request.args for request in requests))
        return self._write(contexts, dict(settings[0]))

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


class TransformersLM(Bounded, OneBatch):
    """Log-likelihoods and greedy text of one causal model.

    Args:
        bounds: what a forward pass may hold.
        pretrained, tokenizer, max_length: as OneBatch takes them.
    """

    def __init__(self, *, bounds: Bounds, **model: Any):
        super().__init__(**model)
        self.bounds = bounds


def _listed(until: str | Sequence[str] | None) -> Sequence[str]:
    return [until] if isinstance(until, str) else until or []


def _before(text: str, ends: Iterable[str]) -> str:
    """The text up to the first of its ends."""
    for end in ends:
        text = text.split(end)[0]
    return text
