"""SentencePiece models (tokenizer.model), read without the sentencepiece package: pieces and special ids.

The file is a protocol buffer, ModelProto of google/sentencepiece's sentencepiece_model.proto: field 1 is a piece, whose
own field 1 is its text; field 2 is the trainer's specification, whose fields 40 to 43 are the ids below. Protocol
buffers: a key (field << 3 | kind) before each value; kind 0 is a varint, 1 eight bytes, 2 a length and so many bytes,
5 four bytes.
"""

import dataclasses
from collections.abc import Iterator

from nemo_minitron.errors import CheckpointError

PIECE, TRAINER, TEXT = 1, 2, 1
#: Field of the trainer's specification -> (name, what it is where the file does not say; -1: there is none).
IDS = {40: ("unk", 0), 41: ("bos", 1), 42: ("eos", 2), 43: ("pad", -1)}
FIXED = {1: 8, 5: 4}


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """A model's vocabulary.

    Attributes:
        pieces: text of each id.
        ids: ``unk``, ``bos``, ``eos``, ``pad`` -> id, of those that the model has.
    """

    pieces: tuple[str, ...]
    ids: dict[str, int]


def read(data: bytes) -> SentencePieceModel:
    """The model in a file's bytes; raises CheckpointError where they are none, or are cut off."""
    pieces: list[str] = []
    ids = dict(IDS.values())
    for field, value in _fields(memoryview(data)):
        if field == PIECE and not isinstance(value, int):
            texts = [bytes(text) for inner, text in _fields(value) if inner == TEXT and not isinstance(text, int)]
            pieces.append(texts[-1].decode("utf-8", "replace") if texts else "")
        elif field == TRAINER and not isinstance(value, int):
            numbers = {inner: number for inner, number in _fields(value) if isinstance(number, int)}
            ids |= {IDS[inner][0]: number for inner, number in numbers.items() if inner in IDS}
    if not pieces:
        raise CheckpointError("it is no SentencePiece model: it has no pieces")
    return SentencePieceModel(
        tuple(pieces), {name: number for name, number in ids.items() if 0 <= number < len(pieces)}
    )


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
