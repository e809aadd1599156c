"""The tokenizer in a GGUF's metadata: rebuilt as the files that transformers reads, and written from such.

`tokenizer.ggml.model` is ``gpt2`` for byte-level BPE (a tokenizer.json: tokens, merges, and a name for how texts are
split first) and ``llama`` for SentencePiece's BPE (a tokenizer.model, or a tokenizer.json made of one: tokens and
scores).
"""

import json
import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints import sentencepiece
from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.checkpoints.file_bytes import Bytes, InMemory
from nemo_minitron.checkpoints.formats.gguf import pieces, splits
from nemo_minitron.checkpoints.sentencepiece import CONTROL, NORMAL, UNUSED, USER_DEFINED, SentencePieceModel
from nemo_minitron.checkpoints.tokenizer import DEFINITION, MODEL, SPECIAL_MAP, TEMPLATES, Tokenizer
from nemo_minitron.checkpoints.tokenizer_config import CONFIG
from nemo_minitron.checkpoints.untrusted import shown
from nemo_minitron.errors import CheckpointError

GGML = "tokenizer.ggml."
BYTES, PIECES = "gpt2", "llama"
#: What stands for a model without a tokenizer.
NONE = ("no_vocab", "none")
TEMPLATE, TEMPLATE_FILE = "tokenizer.chat_template", "chat_template.jinja"
TEMPLATE_NAMES = "tokenizer.chat_templates"
TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
#: transformers' name -> key, behind GGML.
SPECIAL = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}  # fmt: skip
#: What ends a turn of a conversation, where that is another token than what ends a text.
TURN_END = "eot_token_id"
#: Kinds that are matched whole in a text, before it is split.
WHOLE = (CONTROL, USER_DEFINED)
#: The score of tokens that were added to SentencePiece's.
ADDED_SCORE = -1000.0


def read(metadata: Mapping[str, Any], path: Path) -> Tokenizer | None:
    """The tokenizer of a file, or None where it has none.

    Raises:
        CheckpointError: it is of another kind, splits texts in a way that is not known here, or is not whole.
    """
    kind = metadata.get(f"{GGML}model")
    if kind is None or kind in NONE:
        return None
    split = metadata.get(f"{GGML}pre") or "default"
    if kind not in (BYTES, PIECES) or (kind == BYTES and split not in splits.SPLITS):
        raise CheckpointError(
            f"{path} has a tokenizer of the kind {shown(kind)}, split as {shown(split)}; read from GGUF are "
            f"SentencePiece's ({PIECES}) and byte-level ones ({BYTES}), split as {', '.join(splits.SPLITS)}"
        )
    tokens, kinds = _tokens(metadata, path)
    special = {name: tokens[number] for name, number in special_ids(metadata, len(tokens), path).items()}
    added = _added(tokens, kinds)
    if kind == BYTES:
        files = {DEFINITION: _dumped(_definition(metadata, tokens, kinds, special, path))}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    else:
        files = {MODEL: _sentencepiece(metadata, tokens, kinds, path)}
        first, last = (bool(metadata.get(f"{GGML}add_{name}_token", name == "bos")) for name in ("bos", "eos"))
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": first, "add_eos_token": last,
                  "clean_up_tokenization_spaces": False}  # fmt: skip
        if metadata.get(f"{GGML}add_space_prefix") is False:  # transformers does not ask the model for it
            config["add_prefix_space"] = False
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    longest = {"model_max_length": length} if type(length) is int else {}
    files[CONFIG] = _dumped({**config, **longest, **special, "added_tokens_decoder": added})
    files[SPECIAL_MAP] = _dumped(special)
    files |= _templates(metadata, path)
    return Tokenizer(files={name: _in_memory(path, data) for name, data in files.items()})


def _tokens(metadata: Mapping[str, Any], path: Path) -> tuple[list[str], list[int]]:
    """Tokens and their kinds."""
    tokens: Any = metadata.get(f"{GGML}tokens")
    kinds: Any = metadata.get(f"{GGML}token_type")
    if not _all_are(tokens, str) or len({*tokens}) != len(tokens):
        count = len(tokens) if isinstance(tokens, list) else 0
        raise CheckpointError(f"{path} has a tokenizer that is not whole: {count} tokens, some of them none or twice")
    kinds = [NORMAL] * len(tokens) if kinds is None else kinds
    if not _all_are(kinds, int) or len(kinds) != len(tokens):
        raise CheckpointError(
            f"{path} has a tokenizer that is not whole: its tokens' kinds are not those of its tokens"
        )
    return tokens, kinds


def _all_are(values: Any, kind: type) -> bool:
    """Whether it is a list of at least one value, all of that kind."""
    return isinstance(values, list) and {*map(type, values)} == {kind}


def special_ids(metadata: Mapping[str, Any], tokens: int, path: Path) -> dict[str, int]:
    """``bos_token``, ``eos_token``... -> id, of those that a file names."""
    ids: dict[str, Any] = {name: metadata.get(f"{GGML}{key}") for name, key in SPECIAL.items()}
    ids = {name: number for name, number in ids.items() if number is not None}
    beyond = {name: number for name, number in ids.items() if type(number) is not int or not 0 <= number < tokens}
    if beyond:
        raise CheckpointError(f"{path}: {str(beyond)[:200]} are no tokens of its {tokens}")
    return ids


def generation(metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Settings of generation: the special tokens; what ends a turn ends a text as well."""
    tokens = metadata.get(f"{GGML}tokens")
    ids = special_ids(metadata, len(tokens) if isinstance(tokens, list) else 0, path)
    settings: dict[str, Any] = {
        f"{name}_id": ids[name] for name in ("bos_token", "eos_token", "pad_token") if name in ids
    }
    turn = metadata.get(f"{GGML}{TURN_END}")
    if (
        isinstance(tokens, list)
        and type(turn) is int
        and 0 <= turn < len(tokens)
        and turn != ids.get("eos_token", turn)
    ):
        settings["eos_token_id"] = [ids["eos_token"], turn]
    return settings


def _added(tokens: list[str], kinds: list[int]) -> dict[str, dict[str, Any]]:
    """added_tokens_decoder of tokenizer_config.json: tokens that are matched whole."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        str(number): {"content": token, **flags, "special": kind == CONTROL}
        for number, (token, kind) in enumerate(zip(tokens, kinds))
        if kind in WHOLE
    }


def _definition(
    metadata: Mapping[str, Any], tokens: list[str], kinds: list[int], special: dict[str, str], path: Path
) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE; tokens that only fill the embedding are left out."""
    merges = metadata.get(f"{GGML}merges") or []
    known = {*tokens}
    if not isinstance(merges, list) or not all(isinstance(merge, str) and _is_merge(merge, known) for merge in merges):
        raise CheckpointError(f"{path} has a tokenizer that is not whole: its merges are not of its tokens")
    split = splits.SPLITS[metadata.get(f"{GGML}pre") or "default"]
    added = [{"id": int(number), **entry} for number, entry in _added(tokens, kinds).items()]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if split.composed else None,
        "pre_tokenizer": splits.pre_tokenizer(split),
        "post_processor": _post_processor(metadata, tokens, special),
        "decoder": {"type": splits.BYTE_LEVEL, "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split.whole,
            "vocab": {token: number for number, token in enumerate(tokens) if kinds[number] != UNUSED},
            "merges": merges,
        },
    }


def _is_merge(merge: str, known: Set[str]) -> bool:
    """Whether it is two tokens that make a third."""
    first, space, second = merge.partition(" ")
    return bool(space) and {first, second, first + second} <= known


def _post_processor(metadata: Mapping[str, Any], tokens: list[str], special: dict[str, str]) -> dict[str, Any] | None:
    """Puts the first and the last token around a text, where the file says so."""
    around = [special[f"{name}_token"] if metadata.get(f"{GGML}add_{name}_token") and f"{name}_token" in special
              else None for name in ("bos", "eos")]  # fmt: skip
    if around == [None, None]:
        return None

    def one(letter: str, number: int) -> list[dict[str, Any]]:
        before, after = ([{"SpecialToken": {"id": text, "type_id": number}}] if text else [] for text in around)
        return [*before, {"Sequence": {"id": letter, "type_id": number}}, *after]

    used = {text: {"id": text, "ids": [tokens.index(text)], "tokens": [text]} for text in around if text}
    return {"type": "TemplateProcessing", "single": one("A", 0), "pair": [*one("A", 0), *one("B", 1)],
            "special_tokens": used}  # fmt: skip


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int], path: Path) -> bytes:
    """tokenizer.model of a SentencePiece BPE."""
    scores: Any = metadata.get(f"{GGML}scores")
    if not _all_are(scores, float) or len(scores) != len(tokens):
        raise CheckpointError(
            f"{path} has a tokenizer of the kind '{PIECES}' that is not whole: its {len(tokens)} tokens have no scores"
        )
    ids = {name.removesuffix("_token"): number for name, number in special_ids(metadata, len(tokens), path).items()}
    before = metadata.get(f"{GGML}add_space_prefix", True)
    model = SentencePieceModel(
        tuple(tokens), ids, tuple(scores), tuple(kinds), sentencepiece.BPE, space_before=bool(before)
    )
    return sentencepiece.write(model)


def _templates(metadata: Mapping[str, Any], path: Path) -> dict[str, bytes]:
    """Files of templates of conversations: the one, and further ones by their names."""
    found = {TEMPLATE_FILE: metadata.get(TEMPLATE)}
    for key, text in metadata.items():
        if key.startswith(f"{TEMPLATE}."):
            name = key.removeprefix(f"{TEMPLATE}.")
            if not TEMPLATE_NAME.fullmatch(name):
                raise CheckpointError(f"{path}: {shown(key)} is no name of a template of conversations")
            found[f"{TEMPLATES}/{name}.jinja"] = text
    wrong = [name for name, text in found.items() if text is not None and not isinstance(text, str)]
    if wrong:
        raise CheckpointError(f"{path}: its template of conversations ({wrong[0]}) is no text")
    return {name: text.encode() for name, text in found.items() if isinstance(text, str)}


def _dumped(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _in_memory(path: Path, data: bytes) -> Bytes:
    return InMemory(path, 0, len(data), data)


def write(tokenizer: Tokenizer, rows: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a tokenizer.

    Args:
        rows: of the embedding: as many tokens are listed, those that there are not as unused ones.
        settings: of generation, completed with the tokenizer's special tokens.

    Raises:
        CheckpointError: llama.cpp has no tokenizer that does the same.
    """
    if not tokenizer.files:
        raise CheckpointError(
            f"a GGUF holds its tokenizer, and this one is only named ({tokenizer.name}); tokenizer=DIR puts its files "
            "in"
        )
    contents = tokenizer.contents()
    definition, config = (_json(contents, name) for name in (DEFINITION, CONFIG))
    if splits.is_byte_level(definition):
        made = _write_bytes(definition, rows)
    elif MODEL in contents:
        made = _write_pieces(_piece_model(contents[MODEL]), contents, definition, config, rows)
    elif pieces.is_pieces(definition):
        model = pieces.read(definition)
        made = _write_pieces(model, contents, definition, config, rows)
        config = {"unk_token": model.pieces[model.ids["unk"]], **config}
    else:
        raise CheckpointError(
            _not_known("neither byte-level BPE (tokenizer.json) nor SentencePiece's (tokenizer.model)")
        )
    tokens = made[f"{GGML}tokens"]
    filled = [f"[PAD{number}]" for number in range(len(tokens), rows)]
    tokens += filled
    made[f"{GGML}token_type"] += [UNUSED] * len(filled)
    if f"{GGML}scores" in made:
        made[f"{GGML}scores"] += [ADDED_SCORE] * len(filled)
    return made | _written_special(tokens, definition, config, settings) | _written_templates(contents, config)


def _not_known(what: str) -> str:
    return f"the tokenizer is {what}, for which llama.cpp has no name here; tokenizer=DIR puts another one in"


def _check_ids(ids: Iterable[Any], rows: int) -> None:
    """Raises CheckpointError where ids are none, or beyond the rows: before a list of so many tokens is made."""
    numbers = [*ids]
    wrong = [number for number in numbers if type(number) is not int or number < 0]
    if wrong:
        raise CheckpointError(f"the tokenizer is not whole: {shown(wrong[0])} is no id of a token")
    if max(numbers, default=-1) >= rows:
        raise CheckpointError(
            f"the tokenizer has {max(numbers) + 1} tokens, the embedding only {rows} rows; GGUF lists one a row"
        )


def _json(contents: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        loaded = json.loads(contents.get(name, b"{}"))
    except (ValueError, RecursionError):
        loaded = None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"the tokenizer's {name} is no mapping in JSON")
    return loaded


def _listed(ids: Mapping[str, int], added: Mapping[str, bool]) -> tuple[list[str], list[int]]:
    """Tokens by id, gaps filled, and their kinds.

    Args:
        ids: token -> id.
        added: token that is matched whole -> whether it is special.
    """
    by_id = {number: token for token, number in ids.items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(max(by_id, default=-1) + 1)]
    kinds = [
        UNUSED if number not in by_id else NORMAL if token not in added else CONTROL if added[token] else USER_DEFINED
        for number, token in enumerate(tokens)
    ]
    return tokens, kinds


def _added_tokens(definition: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    """Token that is matched whole -> id, and whether it is special; of tokenizer.json, or else of its configuration."""
    listed, decoder = definition.get("added_tokens"), config.get("added_tokens_decoder")
    entries = listed if isinstance(listed, list) else []
    if not entries and isinstance(decoder, dict):
        entries = [{**entry, "id": int(number)} for number, entry in decoder.items()
                   if number.isdecimal() and isinstance(entry, dict)]  # fmt: skip
    return {
        entry["content"]: (entry["id"], bool(entry.get("special")))
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int
    }


def _write_bytes(definition: dict[str, Any], rows: int) -> dict[str, Any]:
    """Of a tokenizer.json of byte-level BPE."""
    model, split = definition.get("model"), splits.named(definition)
    vocabulary, merges = ((model.get(key) if isinstance(model, dict) else None) for key in ("vocab", "merges"))
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(vocabulary, dict):
        raise CheckpointError(_not_known("no BPE"))
    if split is None:
        raise CheckpointError(
            f"the tokenizer splits texts in a way for which llama.cpp has no name here; known are "
            f"{', '.join(splits.SPLITS)}"
        )
    joined = [" ".join(pair) for pair in pieces.pairs(merges)] if isinstance(merges, list) else []
    if any(merge.count(" ") > 1 for merge in joined):
        raise CheckpointError(_not_known("one whose merges have spaces in them"))
    if not isinstance(merges, list) or not all(_is_merge(merge, vocabulary.keys()) for merge in joined):
        raise CheckpointError("the tokenizer is not whole: its merges are not of its tokens")
    added = _added_tokens(definition, {})
    ids = {**vocabulary, **{token: number for token, (number, _) in added.items()}}
    _check_ids(ids.values(), rows)
    if len({*ids.values()}) != len(ids):
        raise CheckpointError("the tokenizer is not whole: an id of tokenizer.json stands for two tokens")
    tokens, kinds = _listed(ids, {token: special for token, (_, special) in added.items()})
    return {f"{GGML}model": BYTES, f"{GGML}pre": split, f"{GGML}tokens": tokens, f"{GGML}token_type": kinds,
            f"{GGML}merges": joined}  # fmt: skip


def _piece_model(data: bytes) -> SentencePieceModel:
    """A tokenizer.model of SentencePiece's BPE."""
    model = sentencepiece.read(data)
    if model.algorithm != sentencepiece.BPE:
        raise CheckpointError(_not_known("SentencePiece's, but not its BPE"))
    if model.changes_texts:
        raise CheckpointError(_not_known("SentencePiece's, and normalises texts before it splits them"))
    return model


def _write_pieces(
    model: SentencePieceModel,
    contents: Mapping[str, bytes],
    definition: Mapping[str, Any],
    config: Mapping[str, Any],
    rows: int,
) -> dict[str, Any]:
    """Of SentencePiece's BPE, and tokens that were added to it."""
    tokens, scores, kinds = list(model.pieces), list(model.scores), list(model.kinds)
    added = _added_tokens(definition, config)
    numbers = [number for number, _ in added.values()]
    _check_ids([len(tokens) - 1, *numbers, *_json(contents, tokenizers.ADDED).values()], rows)
    beyond = {number: token for token, (number, _) in added.items() if number >= len(tokens)}
    beyond |= {number: token for token, number in _json(contents, tokenizers.ADDED).items()
               if number >= len(tokens)}  # fmt: skip
    for number in range(len(tokens), max(beyond, default=-1) + 1):
        tokens.append(beyond.get(number, f"[PAD{number}]"))
        kinds.append(USER_DEFINED if number in beyond else UNUSED)
        scores.append(ADDED_SCORE)
    for token, (number, special) in added.items():
        if tokens[number] == token and kinds[number] in (NORMAL, *WHOLE):
            kinds[number] = CONTROL if special else USER_DEFINED
    return {f"{GGML}model": PIECES, f"{GGML}pre": "default", f"{GGML}tokens": tokens, f"{GGML}scores": scores,
            f"{GGML}token_type": kinds, f"{GGML}add_space_prefix": model.space_before}  # fmt: skip


def _written_special(
    tokens: list[str], definition: Mapping[str, Any], config: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Special tokens, and which of them are put around a text.

    What ends a text is what ends generation, where settings say it, as a server stops there; the others are the
    tokenizer's.
    """
    place = {token: number for number, token in enumerate(tokens)}
    stated = {name: _text_of(config.get(name)) for name in SPECIAL}
    ids = {name: place[text] for name, text in stated.items() if text in place}
    said = {name: number for name in SPECIAL if type(number := settings.get(f"{name}_id")) is int}
    ids = said | ids | {name: number for name, number in said.items() if name == "eos_token"}
    made: dict[str, Any] = {}
    ends = settings.get("eos_token_id")
    if isinstance(ends, list) and ends:
        ids["eos_token"] = ids["eos_token"] if ids.get("eos_token") in ends else ends[0]
        made |= {f"{GGML}{TURN_END}": number for number in [end for end in ends if end != ids["eos_token"]][:1]}
    first, last = _around(definition, config)
    if first in place:
        ids["bos_token"] = place[first]
    made |= {f"{GGML}{key}": ids[name] for name, key in SPECIAL.items() if 0 <= ids.get(name, -1) < len(tokens)}
    return made | {f"{GGML}add_bos_token": first is not None, f"{GGML}add_eos_token": last is not None}


def _text_of(token: Any) -> str | None:
    """The text of a special token as tokenizer_config.json has it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _around(definition: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The tokens that are put before and after a text: by LlamaTokenizer's settings, or the template in
    tokenizer.json."""
    if str(config.get("tokenizer_class")).startswith("LlamaTokenizer"):
        return tuple(  # type: ignore[return-value]
            _text_of(config.get(f"{name}_token")) if config.get(f"add_{name}_token", name == "bos") else None
            for name in ("bos", "eos")
        )
    node = definition.get("post_processor")
    nodes = node.get("processors", [node]) if isinstance(node, dict) else []
    for step in nodes if isinstance(nodes, list) else []:
        single = step.get("single") if isinstance(step, dict) else None
        if isinstance(single, list) and single:
            first, last = (_special_of(part) for part in (single[0], single[-1]))
            return first, last
    return None, None


def _special_of(part: Any) -> str | None:
    """The special token that a part of a template is, or None."""
    token = part.get("SpecialToken") if isinstance(part, dict) else None
    return _text_of(token.get("id")) if isinstance(token, dict) else None


def _written_templates(contents: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, Any]:
    """Templates of conversations; a file of its own goes before what tokenizer_config.json says, as in transformers."""
    stated = config.get("chat_template", _json(contents, "chat_template.json").get("chat_template"))
    named = {"default": stated} if isinstance(stated, str) else {}
    if isinstance(stated, list):
        entries = [(entry.get("name"), entry.get("template")) for entry in stated if isinstance(entry, dict)]
        named = {name: text for name, text in entries if isinstance(name, str) and isinstance(text, str)}
    named |= {
        Path(name).stem: data.decode("utf-8", "replace")
        for name, data in contents.items()
        if name.startswith(TEMPLATES)
    }
    if TEMPLATE_FILE in contents:
        named["default"] = contents[TEMPLATE_FILE].decode("utf-8", "replace")
    further = {name: text for name, text in named.items() if name != "default" and TEMPLATE_NAME.fullmatch(name)}
    made = {TEMPLATE: named["default"]} if "default" in named else {}
    listed = {TEMPLATE_NAMES: sorted(further)} if further else {}
    return made | listed | {f"{TEMPLATE}.{name}": text for name, text in further.items()}
