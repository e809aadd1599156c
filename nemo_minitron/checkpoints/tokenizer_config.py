"""tokenizer_config.json in words that every version of transformers reads, and what stands in for one."""

import json
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.sentencepiece import SentencePieceModel
from nemo_minitron.errors import CheckpointError

CONFIG = "tokenizer_config.json"
#: Names of transformers 5 -> those that transformers 4 has for the same, and transformers 5 takes too.
CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
EXTRA, ADDITIONAL = "extra_special_tokens", "additional_special_tokens"


def for_sentencepiece(model: SentencePieceModel) -> dict[str, Any]:
    """tokenizer_config.json that lets transformers take a bare SentencePiece model.

    `legacy` gives SentencePiece's own ids to text that begins with a space.
    """
    texts = {f"{name}_token": model.pieces[number] for name, number in model.ids.items()}
    stated = {f"{name}_token": texts.get(f"{name}_token") for name in ("bos", "eos", "unk")}
    pad = {"pad_token": texts["pad_token"]} if "pad_token" in texts else {}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": stated["bos_token"] is not None,
        "add_eos_token": False,
        **stated,
        **pad,
    }


def check_same_class(tokenizer_config: bytes, path: Path) -> None:
    """Raises CheckpointError where two config.json stand for different classes of tokenizers."""
    kinds = [_kind(data) for data in (tokenizer_config, path.read_bytes())]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"the tokenizer is that of a {kinds[0]} model, and the model a {kinds[1]}; its {CONFIG} names no "
            "tokenizer_class, so transformers would take the model's: state the class there"
        )


def _kind(data: bytes) -> Any:
    """The class of tokenizers, or else the kind of models, that a config.json names."""
    try:
        loaded = json.loads(data)
        return loaded.get("tokenizer_class") or loaded.get("model_type")
    except (ValueError, AttributeError, RecursionError):
        return None


def common_words(config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json in words that transformers 4 and 5 both read."""
    common = dict(config)
    if isinstance(kind := common.get("tokenizer_class"), str):
        common["tokenizer_class"] = CLASSES.get(kind, kind)
    if isinstance(common.get(EXTRA), list):
        tokens, known = common.pop(EXTRA), common.get(ADDITIONAL)
        known = known if isinstance(known, list) else []
        common[ADDITIONAL] = [*known, *(token for token in tokens if token not in known)]
    return common
