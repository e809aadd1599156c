"""Conversations as tokens with a mask: which of them are learnt.

A conversation becomes segments, text that is learnt (answers) or not (prompts); each segment is tokenised on its own,
as the prompt will be when the model is asked. A sample of s tokens holds tokens t_0 .. t_{s-1}, labels t_1 .. t_s, and
a mask that is 1 where the label belongs to what is learnt.
"""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_minitron.config import InstructConfig
from nemo_minitron.data.instructions import TEXT, Instructions, Turn
from nemo_minitron.data.sample_sets import Packed, Piece, Rows, padding
from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Samples are padded to a multiple of this, as far as the sequence length allows.
MULTIPLE = 64
ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
PAIRED = ", paired with an input that provides further context"


class Segment(NamedTuple):
    """A piece of text, and whether its tokens are learnt."""

    text: str
    learnt: bool


@dataclasses.dataclass(kw_only=True)
class Samples:
    """Samples of a run.

    Attributes:
        template: the template that was used.
        counts: rows, and what became of those that were too long, by split.
        files: files that were read, for the manifest.
        notes: what a user should know of files that were not, and of packing.
    """

    train: list[Piece]
    validation: list[Piece]
    template: str
    counts: dict[str, dict[str, int]]
    files: dict[str, str]
    notes: list[str]

    def sets(self, length: int) -> dict[str, Rows]:
        """Split -> its samples, padded to `length` labels."""
        return {
            "train": Rows(self.train, length, "training"),
            "validation": Rows(self.validation, length, "validation"),
        }

    def packed(self, length: int) -> dict[str, Packed]:
        """Split -> its samples, packed into sequences of `length` labels."""
        return {split: Packed(rows) for split, rows in self.sets(length).items()}

    def longest(self) -> int:
        """Labels of the longest sample."""
        return max(len(sample.ids) for sample in (*self.train, *self.validation)) - 1


def make_samples(
    data: Instructions, config: InstructConfig, tokenizer: "PreTrainedTokenizerBase", seq_length: int
) -> Samples:
    """Tokenises every conversation.

    Args:
        tokenizer: a Hugging Face tokenizer.
        seq_length: labels a sample may have.

    Raises:
        DataError: nothing is left of a split, or the tokenizer has no template that was asked for.
    """
    template = chosen_template(config.template, tokenizer, data.alpaca)
    samples: dict[str, list[Piece]] = {}
    counts: dict[str, dict[str, int]] = {}
    for split, rows in (("train", data.train), ("validation", data.validation)):
        counts[split] = dict.fromkeys(("rows", "truncated", "split", "dropped"), 0) | {"rows": len(rows)}
        samples[split] = []
        for row, sample in zip(rows, tokenised(rows, template, tokenizer)):
            kept = _fitted(row, sample, config.too_long, seq_length, tokenizer, counts[split])
            samples[split] += kept if config.answers_only else [Piece(one.ids, [True] * len(one.ids)) for one in kept]
        if not samples[split]:
            raise DataError(
                f"all {len(rows)} rows of the {split} split are longer than {seq_length} tokens or have nothing to "
                "learn; give a longer model.data.seq_length"
            )
    return Samples(**samples, template=template, counts=counts, files=data.files, notes=data.notes)


def chosen_template(name: str, tokenizer: "PreTrainedTokenizerBase", alpaca: bool) -> str:
    """The template that `name` stands for with this tokenizer and data."""
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if name == "chat" and not has_chat:
        raise DataError("instruct.template=chat: the tokenizer has no chat template; give plain or alpaca")
    if name != "auto":
        return name
    return "chat" if has_chat else "alpaca" if alpaca else "plain"


def segments(
    turns: list[Turn], template: str, end: str, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> list[Segment]:
    """The text of a conversation in order, prompts and answers apart.

    Args:
        end: the text of the end-of-sequence token, which ends each answer; a chat template has marks of its own.
        tokenizer: with template=chat.
    """
    if turns[0].role == TEXT:
        return [Segment(turn.text + end, True) for turn in turns]
    if template == "chat":
        return _chat(turns, tokenizer)
    show = _alpaca_prompt if template == "alpaca" else _plain_prompt
    pieces = []
    for number, turn in enumerate(turns):
        answer = turn.role == "assistant"
        pieces.append(Segment(turn.text + end, True) if answer else Segment(show(turn, first=number == 0), False))
    return pieces


def _plain_prompt(turn: Turn, *, first: bool) -> str:
    return "".join(f"{part}\n" for part in (turn.text, turn.context) if part)


def _alpaca_prompt(turn: Turn, *, first: bool) -> str:
    if turn.role == "system":
        return f"{turn.text}\n\n"
    head = ALPACA.format(PAIRED if turn.context else "") + "\n\n" if first else ""
    context = f"### Input:\n{turn.context}\n\n" if turn.context else ""
    return f"{head}### Instruction:\n{turn.text}\n\n{context}### Response:\n"


def _chat(turns: list[Turn], tokenizer: "PreTrainedTokenizerBase") -> list[Segment]:
    """What the tokenizer's template makes of the conversation, cut before and after each answer."""
    from jinja2.exceptions import TemplateError

    messages = [
        {"role": turn.role, "content": f"{turn.text}\n\n{turn.context}" if turn.context else turn.text}
        for turn in turns
    ]

    def shown(count: int, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        except TemplateError as error:
            begin = messages[0]["content"][:60]
            raise DataError(
                f"the tokenizer's chat template refuses the conversation that begins with {begin!r}: {error}"
            ) from None

    pieces, before = [], ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = shown(number, True), shown(number + 1, False)
        if not (asked.startswith(before) and answered.startswith(asked)):
            raise DataError(
                "the tokenizer's chat template shows earlier turns otherwise once later ones follow, so that answers "
                "cannot be told apart; give instruct.template=plain or alpaca"
            )
        pieces += [Segment(asked[len(before) :], False), Segment(answered[len(asked) :], True)]
        before = answered
    return pieces


def tokenised(rows: list[list[Turn]], template: str, tokenizer: "PreTrainedTokenizerBase") -> Iterable[Piece]:
    """Each conversation's tokens in one piece, begun as the tokenizer begins a text, its answers marked."""
    begin = [] if template == "chat" else _begin(tokenizer)
    parts = [segments(row, template, tokenizer.eos_token, tokenizer) for row in rows]
    flat = [segment.text for row in parts for segment in row]
    encoded = iter(tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
    for row in parts:
        ids, learnt = list(begin), [False] * len(begin)
        for segment in row:
            piece = next(encoded)
            ids += piece
            learnt += [segment.learnt] * len(piece)
        yield Piece(ids, learnt)


def _begin(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that the tokenizer puts before a text: its beginning-of-sequence token, or none."""
    alone, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    first = tokenizer.bos_token_id
    return [first] if first is not None and whole[:1] == [first] and alone[:1] != [first] else []


def _fitted(
    row: list[Turn],
    sample: Piece,
    too_long: str,
    length: int,
    tokenizer: "PreTrainedTokenizerBase",
    counts: dict[str, int],
) -> list[Piece]:
    """The sample as it is, its end, its pieces, or nothing; counts which."""
    if len(sample.ids) <= length + 1:
        kept = [sample]
    elif too_long == "drop":
        kept = []
    elif row[0].role == TEXT:
        starts = range(0, len(sample.ids) - 1, length)
        kept = [sample.part(start, start + length + 1) for start in starts]
        counts["split"] += 1
    else:
        kept = _end_of(sample, length, tokenizer)
        counts["truncated"] += bool(kept)
    kept = [one for one in kept if any(one.learnt[1:])]
    counts["dropped"] += not kept
    return kept


def _end_of(sample: Piece, length: int, tokenizer: "PreTrainedTokenizerBase") -> list[Piece]:
    """The end of the sample, behind its beginning-of-sequence token; nothing where the last answer would be cut."""
    keep = 1 if sample.ids[0] == tokenizer.bos_token_id else 0
    start = len(sample.ids) - (length + 1 - keep)
    if all(sample.learnt[start:]):
        return []
    ids, learnt = ([*part[:keep], *part[start:]] for part in sample)
    return [Piece(ids, learnt)]


def padded_length(samples: Samples, seq_length: int) -> int:
    """Tokens a sample, once padded: as few as hold the longest, in multiples of 64, at most `seq_length`."""
    return min(seq_length, -(-samples.longest() // MULTIPLE) * MULTIPLE)


def packing_counts(samples: Samples, packed: dict[str, Packed]) -> dict[str, Any]:
    """How many sequences the rows fill, and the training rows' share of padding packed and each on its own."""
    train = packed["train"]
    alone = samples.sets(padded_length(samples, train.length))["train"]
    return {
        "sequences": len(train),
        "validation_sequences": len(packed["validation"]),
        "padding": padding(train),
        "padding_unpacked": padding(alone),
    }


def packing_note(rows: int, length: int, counts: dict[str, Any]) -> str:
    """What packing saves, in words."""
    return (
        f"packed: {rows} rows in {counts['sequences']} sequences of {length}: {counts['padding']:.0%} padding, "
        f"{counts['padding_unpacked']:.0%} unpacked"
    )


def check_vocabulary(samples: Samples, vocab_size: int) -> None:
    """Raises DataError where a token has no row in the embedding."""
    highest = max(max(sample.ids) for sample in (*samples.train, *samples.validation))
    if highest >= vocab_size:
        raise DataError(
            f"the instructions hold the token {highest}, but the model's embedding has {vocab_size} rows: the "
            "tokenizer is another, larger one; give the model's own, model.tokenizer=DIR"
        )
