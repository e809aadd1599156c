"""SentencePiece's BPE as a tokenizer.json: the scores of its pieces, which llama.cpp merges by, out of its merges.

tokenizer.json merges the pair that stands first in its list; SentencePiece and llama.cpp merge the pair whose whole has
the highest score, whatever its halves. The two are the same where the list has every pair of pieces that makes a piece,
and those that make the same one follow each other: as a conversion from tokenizer.model leaves it, and no training by
merges. The score is then the negative rank, as in SentencePiece's own models.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from nemo_minitron.checkpoints import sentencepiece
from nemo_minitron.checkpoints.formats.gguf.splits import steps_of
from nemo_minitron.checkpoints.sentencepiece import BYTE, NORMAL, UNKNOWN, UNUSED, SentencePieceModel
from nemo_minitron.checkpoints.untrusted import shown
from nemo_minitron.errors import CheckpointError

SPACE = "▁"
BYTES = [f"<0x{number:02X}>" for number in range(256)]
UNIGRAM = (
    "Unigram (tokenizer.json), which llama.cpp's `llama` does not compute: it merges pairs by their scores, Unigram "
    "takes the likeliest split of all"
)


def is_pieces(definition: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of SentencePiece's kind: BPE that falls back to bytes, or Unigram."""
    model = definition.get("model")
    return isinstance(model, dict) and (
        model.get("type") == "Unigram" or (model.get("type") == "BPE" and model.get("byte_fallback") is True)
    )


def read(definition: Mapping[str, Any]) -> SentencePieceModel:
    """The model that makes the same ids; which of its pieces are added tokens is not said in it.

    Raises:
        CheckpointError: it does what SentencePiece's BPE, as llama.cpp computes it, does not.
    """
    model = definition["model"]
    problem = UNIGRAM if model["type"] == "Unigram" else _problem(definition, model)
    if problem:
        raise CheckpointError(
            f"the tokenizer is {problem}; a directory with its tokenizer.model, as tokenizer=DIR, may be written"
        )
    vocabulary: dict[str, int] = model["vocab"]
    by_id = {number: token for token, number in vocabulary.items()}
    pieces = [by_id.get(number, f"[PAD{number}]") for number in range(max(by_id) + 1)]
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs(model["merges"])):
        first.setdefault(left + right, rank)
    unknown, known = model["unk_token"], {*BYTES}
    kinds = [
        UNUSED if number not in by_id else UNKNOWN if piece == unknown else BYTE if piece in known else NORMAL
        for number, piece in enumerate(pieces)
    ]
    return SentencePieceModel(
        pieces=tuple(pieces),
        ids={"unk": vocabulary[unknown]},
        scores=tuple(float(-first.get(piece, len(model["merges"]))) for piece in pieces),
        kinds=tuple(kinds),
        algorithm=sentencepiece.BPE,
        space_before=bool(_space_before(definition)),
    )


def _problem(definition: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    """What keeps a BPE that falls back to bytes from being SentencePiece's, or None."""
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not all(
        type(number) is int and number >= 0 for number in vocabulary.values()
    ):
        return "not whole: tokenizer.json has no mapping of tokens to ids"
    if len({*vocabulary.values()}) != len(vocabulary) or max(vocabulary.values(), default=0) > 2 * len(vocabulary):
        return "not whole: ids of tokenizer.json are there twice, or far beyond its tokens"
    if model.get("unk_token") not in vocabulary or not vocabulary.keys() >= {*BYTES}:
        return "BPE that falls back to bytes (tokenizer.json), and has no unknown token or not all 256 bytes"
    if (
        model.get("dropout")
        or model.get("ignore_merges")
        or any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    ):
        return "BPE that falls back to bytes (tokenizer.json), and not SentencePiece's: it drops or passes over merges"
    if _space_before(definition) is None:
        return (
            "BPE that falls back to bytes (tokenizer.json), and changes or splits texts otherwise than llama.cpp's "
            f"`llama`: that writes spaces as {SPACE}, splits nothing, and puts one before each text between special "
            "tokens, or before none"
        )
    return _problem_of_merges(vocabulary, merges)


def _problem_of_merges(vocabulary: Mapping[str, int], merges: Any) -> str | None:
    """What keeps merges from being those of scores, or None."""
    if not isinstance(merges, list) or any(len(pair) != 2 for pair in pairs(merges)):
        return "not whole: its merges are no pairs"
    made: dict[str, set[str]] = {}
    last = None
    for left, right in pairs(merges):
        piece = left + right
        if piece not in vocabulary or left not in vocabulary or right not in vocabulary:
            return "not whole: its merges are not of its tokens"
        if piece != last and piece in made:
            return (
                "BPE that falls back to bytes (tokenizer.json), whose merges are not in the order of scores: "
                f"{shown(piece)} is made at several places of the list"
            )
        made.setdefault(piece, set()).add(left)
        last = piece
    for piece, lefts in made.items():
        there = {piece[:cut] for cut in range(1, len(piece)) if piece[:cut] in vocabulary and piece[cut:] in vocabulary}
        if there - lefts:
            left = min(there - lefts)
            return (
                "BPE that falls back to bytes (tokenizer.json), trained by merges and not by scores: it never merges "
                f"{shown(left)} and {shown(piece[len(left) :])}, which llama.cpp would, as {shown(piece)} is a token"
            )
    return None


def pairs(merges: Iterable[Any]) -> Iterable[tuple[str, ...]]:
    """The merges as pairs of texts; what is none is a tuple of another length."""
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        whole = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
        yield tuple(parts) if whole else ()


def _space_before(definition: Mapping[str, Any]) -> bool | None:
    """Whether a space is put before each text between special tokens; None where texts are changed or split otherwise
    than by writing spaces as SPACE."""
    changes = steps_of(definition.get("normalizer"), "normalizers")
    splits = steps_of(definition.get("pre_tokenizer"), "pretokenizers")
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not splits and changes and changes[-1] == replaced:
        before = changes[:-1]
        return bool(before) if before in ([], [{"type": "Prepend", "prepend": SPACE}]) else None
    if changes or len(splits) != 1 or splits[0].get("type") != "Metaspace":
        return None
    only = splits[0]
    schemes = {"always": True, "never": False}
    if only.get("replacement") != SPACE or only.get("split", True):
        return None
    return schemes.get(str(only.get("prepend_scheme", "always")))
