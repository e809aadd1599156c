"""`minitron generate`: a text continued by a checkpoint of any format."""

import json
import time
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.tokenizer import SPECIAL_TOKENS
from nemo_minitron.checkpoints.transformers_model import last_line
from nemo_minitron.config import GenerateConfig
from nemo_minitron.errors import CheckpointError, ConfigError
from nemo_minitron.evaluation.loading import Loaded, check_tokens, load, open_all

if TYPE_CHECKING:
    from torch import Tensor


def generate(config: GenerateConfig) -> None:
    """Prints the prompt with its continuation, or JSON.

    Raises:
        CheckpointError, ConfigError, DataError, EngineError: before any weight is read, where that can be seen then.
    """
    (checkpoint,) = open_all([config.model], config)
    loaded = load(checkpoint, config)
    started = time.perf_counter()
    tokens, prompt_tokens = continuation(loaded, config)
    seconds = time.perf_counter() - started
    text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    if not config.json:
        print(text)
        return
    made = tokens[prompt_tokens:]
    answer = {
        "model": config.model,
        "prompt": config.prompt,
        "text": text,
        "continuation": loaded.tokenizer.decode(made, skip_special_tokens=True),
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(made),
        "token_ids": made,
        "seconds": seconds,
        "tokens_per_second": len(made) / seconds,
        "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }
    print(json.dumps(answer, indent=2, ensure_ascii=False))


def continuation(loaded: Loaded, config: GenerateConfig) -> tuple[list[int], int]:
    """Tokens of the prompt and its continuation, and how many of them are the prompt's.

    Raises:
        ConfigError: the prompt fills the model's length.
        DataError: one of its tokens has no row in the embedding.
    """
    import torch

    encoded = loaded.tokenizer(config.prompt, return_tensors="pt").to(loaded.model.device)
    check_tokens(encoded.input_ids[0].tolist(), loaded)
    prompt_tokens = encoded.input_ids.shape[1]
    longest = loaded.checkpoint.architecture.seq_length
    if prompt_tokens >= longest:
        raise ConfigError(
            f"prompt has {prompt_tokens} tokens, the model's length is {longest}: shorten it", "minitron generate"
        )
    torch.manual_seed(config.seed)
    options = {"max_new_tokens": min(config.max_new_tokens, longest - prompt_tokens), **_decoding(config, loaded)}
    return generated(loaded, encoded.input_ids, encoded.attention_mask, **options), prompt_tokens


def generated(loaded: Loaded, tokens: "Tensor", mask: "Tensor", **options: Any) -> list[int]:
    """The tokens [1, s] and what the model makes of them.

    Args:
        options: of transformers' generate; they go before the checkpoint's own settings.

    Raises:
        CheckpointError: transformers does not generate with the checkpoint's settings.
    """
    import torch

    one_text = {"num_return_sequences": 1, "return_dict_in_generate": False}
    try:
        with torch.no_grad():
            made = loaded.model.generate(input_ids=tokens, attention_mask=mask, **one_text, **options)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        if not loaded.checkpoint.generation.keys() - SPECIAL_TOKENS:
            raise
        raise CheckpointError(
            f"{loaded.checkpoint.path}: transformers does not generate with its settings of generation "
            f"({last_line(error)}); mend or remove generation_config.json"
        ) from error
    return made[0].tolist()


def ends_and_padding(loaded: Loaded) -> dict[str, Any]:
    """Tokens that end a text, the model's own where it names some, and the one that pads."""
    tokenizer, named = loaded.tokenizer, loaded.model.generation_config.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {"pad_token_id": pad, "eos_token_id": tokenizer.eos_token_id if named is None else named}


def _decoding(config: GenerateConfig, loaded: Loaded) -> dict[str, Any]:
    shared = ends_and_padding(loaded)
    if not config.do_sample:
        return shared | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return shared | {
        "do_sample": True,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k or 0,
    }
