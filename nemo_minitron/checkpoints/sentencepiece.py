"""SentencePiece models (tokenizer.model), read without the sentencepiece package: pieces and special ids.

The file is a protocol buffer, ModelProto of google/sentencepiece's sentencepiece_model.proto: field 1 is a piece, whose
own fields 1, 2 and 3 are its text, score and kind; field 2 is the trainer's specification, whose field 3 is the
algorithm and fields 40 to 43 are the ids below; field 3 is how texts are normalised (1 a name, 2 a map of characters,
3 whether a space is put before a text, 4 whether superfluous spaces go). Protocol
buffers: a key (field << 3 | kind) before each value; kind 0 is a varint, 1 eight bytes, 2 a length and so many bytes,
5 four bytes.
"""

import dataclasses
import struct
from collections.abc import Iterator

from nemo_minitron.errors import CheckpointError

PIECE, TRAINER, NORMALIZER = 1, 2, 3
TEXT, SCORE, KIND = 1, 2, 3
ALGORITHM, BYTE_FALLBACK = 3, 35
RULE, CHARACTERS, SPACE_BEFORE, FEWER_SPACES = 1, 2, 3, 4
UNIGRAM, BPE = 1, 2
#: Kinds of pieces.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
#: Field of the trainer's specification -> (name, what it is where the file does not say; -1: there is none).
IDS = {40: ("unk", 0), 41: ("bos", 1), 42: ("eos", 2), 43: ("pad", -1)}
FIXED = {1: 8, 5: 4}


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """A model's vocabulary.

    Attributes:
        pieces: text of each id.
        ids: ``unk``, ``bos``, ``eos``, ``pad`` -> id, of those that the model has.
        scores: of each piece; of two that could be merged the higher one is.
        kinds: of each piece, NORMAL to BYTE.
        algorithm: UNIGRAM, BPE or another.
        space_before: whether a space is put before a text.
        changes_texts: whether texts are normalised otherwise, so that other characters are split than were written.
    """

    pieces: tuple[str, ...]
    ids: dict[str, int]
    scores: tuple[float, ...] = ()
    kinds: tuple[int, ...] = ()
    algorithm: int = UNIGRAM
    space_before: bool = True
    changes_texts: bool = False


def read(data: bytes) -> SentencePieceModel:
    """The model in a file's bytes; raises CheckpointError where they are none, or are cut off."""
    pieces: list[tuple[str, float, int]] = []
    numbers: dict[int, int] = {}
    normalizer: dict[int, int | memoryview] = {}
    for field, value in _fields(memoryview(data)):
        if isinstance(value, int):
            continue
        if field == PIECE:
            pieces.append(_piece(value))
        elif field == TRAINER:
            numbers |= {inner: number for inner, number in _fields(value) if isinstance(number, int)}
        elif field == NORMALIZER:
            normalizer |= dict(_fields(value))
    if not pieces:
        raise CheckpointError("it is no SentencePiece model: it has no pieces")
    ids = dict(IDS.values()) | {IDS[field][0]: number for field, number in numbers.items() if field in IDS}
    texts, scores, kinds = zip(*pieces, strict=True)
    return SentencePieceModel(
        pieces=texts,
        ids={name: number for name, number in ids.items() if 0 <= number < len(pieces)},
        scores=scores,
        kinds=kinds,
        algorithm=numbers.get(ALGORITHM, UNIGRAM),
        space_before=bool(normalizer.get(SPACE_BEFORE, True)),
        changes_texts=bool(normalizer.get(FEWER_SPACES, True) or normalizer.get(CHARACTERS)),
    )


def _piece(data: memoryview) -> tuple[str, float, int]:
    """Text, score and kind of a piece."""
    text, score, kind = "", 0.0, NORMAL
    for field, value in _fields(data):
        if field == TEXT and not isinstance(value, int):
            text = bytes(value).decode("utf-8", "replace")
        elif field == SCORE and not isinstance(value, int) and len(value) == FIXED[5]:
            score = struct.unpack("<f", value)[0]
        elif field == KIND and isinstance(value, int):
            kind = value
    return text, score, kind


def write(model: SentencePieceModel) -> bytes:
    """The bytes of a model's file; texts are not normalised but for the space before them."""
    made = bytearray()
    for text, score, kind in zip(model.pieces, model.scores, model.kinds, strict=True):
        made += _bytes(
            PIECE, _bytes(TEXT, text.encode()) + _key(SCORE, 5) + struct.pack("<f", score) + _int(KIND, kind)
        )
    ids = b"".join(_int(field, model.ids.get(name, -1)) for field, (name, _) in IDS.items())
    fallback = _int(BYTE_FALLBACK, int(BYTE in model.kinds))
    made += _bytes(TRAINER, _int(ALGORITHM, model.algorithm) + fallback + ids)
    before = _int(SPACE_BEFORE, int(model.space_before)) + _int(FEWER_SPACES, 0)
    return bytes(made + _bytes(NORMALIZER, _bytes(RULE, b"identity") + before))


def _key(field: int, kind: int) -> bytes:
    return _written_varint(field << 3 | kind)


def _int(field: int, number: int) -> bytes:
    """A field with a number."""
    return _key(field, 0) + _written_varint(number & ((1 << 64) - 1))


def _bytes(field: int, data: bytes) -> bytes:
    """A field with bytes."""
    return _key(field, 2) + _written_varint(len(data)) + data


def _written_varint(number: int) -> bytes:
    """A number of 7 bits a byte, the lowest first."""
    made = bytearray()
    while number > 127:
        made.append(number & 127 | 128)
        number >>= 7
    return bytes([*made, number])


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value of each field: a number, or its bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value - (1 << 64) if value >> 63 else value
            continue
        length = FIXED.get(kind)
        if kind == 2:
            length, place = _varint(data, place)
        if length is None or place + length > len(data):
            raise CheckpointError("it is no SentencePiece model, or it was cut off; copy it again")
        yield key >> 3, data[place : place + length]
        place += length


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and the place behind it."""
    number = 0
    for shift in range(0, 64, 7):
        if place >= len(data):
            break
        byte = data[place]
        number |= (byte & 127) << shift
        place += 1
        if byte < 128:
            return number & ((1 << 64) - 1), place
    raise CheckpointError("it is no SentencePiece model, or it was cut off; copy it again")
