"""run_config.yaml of a Megatron-Bridge checkpoint, read as data and written so that Bridge makes the model of it.

Bridge calls what its `_target_` name; here they are names.
"""

from typing import Any

import yaml

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.checkpoints import untrusted
from nemo_minitron.checkpoints.files import Files
from nemo_minitron.checkpoints.formats.bridge import fields
from nemo_minitron.checkpoints.formats.bridge.classes import (
    FAMILY_OF_CLASS,
    KNOWN_CLASSES,
    RUN_CONFIG,
    TOKENIZER_FOLDER,
)
from nemo_minitron.errors import CheckpointError

TRAINING = "megatron.bridge.training"
TOKENIZER_TYPES = {tokenizers.HUGGINGFACE: "HuggingFaceTokenizer", tokenizers.SENTENCEPIECE: "SentencePieceTokenizer"}


def read(files: Files) -> tuple[str | None, dict[str, Any], str | None]:
    """Family, or None where the fields tell it; fields of the model; name of the tokenizer on the hub, or None.

    Raises:
        CheckpointError: it is no plain YAML, or describes a model or checkpoint of a kind that is not known here.
    """
    source = f"{files.where}/{RUN_CONFIG}"
    config = untrusted.plain_yaml(files.text(RUN_CONFIG), source)
    model = config.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{source} describes no model")
    if isinstance(adapters := config.get("peft"), dict):
        kind = untrusted.shown(str(adapters.get("_target_", "")).rpartition(".")[2])
        raise CheckpointError(
            f"{files.where} holds adapters only ({kind}), not a whole model; merge them in Megatron-Bridge first "
            "(examples/peft/merge_lora.py)"
        )
    inner = model.get("transformer")
    values = {**inner, **model} if isinstance(inner, dict) else model
    return _family(model.get("_target_"), source), values, _tokenizer_name(config.get("tokenizer"))


def _family(target: Any, source: str) -> str | None:
    name = target.rpartition(".")[2] if isinstance(target, str) else ""
    for pattern, family in FAMILY_OF_CLASS:
        if pattern.fullmatch(name):
            return family
    raise CheckpointError(f"{source} names the model {untrusted.shown(target)}; known are {KNOWN_CLASSES}")


def _tokenizer_name(settings: Any) -> str | None:
    """The tokenizer's name, where it is one of the hub and no path."""
    if not isinstance(settings, dict) or settings.get("tokenizer_type") != TOKENIZER_TYPES[tokenizers.HUGGINGFACE]:
        return None
    return hub_name(settings.get("tokenizer_model"))


def hub_name(value: Any) -> str | None:
    """A name on the hub; None for what can only be a path."""
    named = isinstance(value, str) and value != TOKENIZER_FOLDER and tokenizers.HUB_NAME.fullmatch(value)
    return value if named else None


def write(architecture: Architecture, dtype: str, tokenizer: tokenizers.Tokenizer | None) -> str:
    """The text of run_config.yaml; raises CheckpointError where Bridge's model cannot be that."""
    config = {
        "model": fields.write_model(architecture, dtype),
        "tokenizer": _tokenizer_settings(tokenizer),
        # What Bridge asks of a checkpoint before it loads the weights into a model that is to be trained.
        "checkpoint": {
            "_target_": f"{TRAINING}.config.CheckpointConfig",
            "ckpt_format": "torch_dist",
            "save_optim": False,
            "save_rng": False,
            "fully_parallel_save": True,
        },
    }
    return yaml.safe_dump(config, sort_keys=False)


def _tokenizer_settings(tokenizer: tokenizers.Tokenizer | None) -> dict[str, Any] | None:
    """Bridge's settings of a tokenizer: its name on the hub, or the place of its files in the iteration's folder."""
    if tokenizer is None:
        return None
    place = tokenizer.name or TOKENIZER_FOLDER
    if tokenizer.kind == tokenizers.SENTENCEPIECE:
        place = f"{TOKENIZER_FOLDER}/{tokenizers.MODEL}"
    return {
        "_target_": f"{TRAINING}.tokenizers.config.TokenizerConfig",
        "tokenizer_type": TOKENIZER_TYPES[tokenizer.kind],
        "tokenizer_model": place,
    }
