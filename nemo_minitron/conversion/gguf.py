"""A GGUF file (llama.cpp's format), dequantised to a Hugging Face directory in bf16.

The `gguf` library reads and dequantises, transformers gives the tensors their Hugging Face names and order. What either
would pass over in silence is refused: another family, tensors that have no place, rotary scaling, sizes that contradict
each other. The tokenizer is built from the file's own lists: transformers 4.57 takes the first token of a text for its
last (`eos_token`), adds a first token whatever the file says, and splits all texts as GPT-2 does.

Source of the keys' meaning: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import collections
import contextlib
import io
import math
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.formats.huggingface.config import read_config
from nemo_minitron.errors import CheckpointError
from nemo_minitron.packages import extras as packages

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

#: Families of GGUF that are read -> the family here.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2"}
TENSORS = re.compile(
    r"token_embd\.weight|output_norm\.weight|output\.weight|"
    r"blk\.\d+\.(attn_(norm|q|k|v|output)|ffn_(norm|gate|up|down))\.(weight|bias)"
)
#: Factors of Llama 3.1's rotary scaling, one a frequency.
ROPE_FACTORS = "rope_freqs.weight"
SPECIAL = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}  # fmt: skip
#: Kinds of tokens: control tokens are special, what a user defined is matched whole but stays in decoded text.
CONTROL, USER_DEFINED = 3, 4
#: How a text is split before its bytes are merged: `tokenizer.ggml.pre` -> patterns, one after the other.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
SPLITS = {
    "default": (_GPT2,),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3 % "{1,3}",),
    "qwen2": (_LLAMA3 % "",),
}
SHOWN = 4


def check_packages(who: str) -> None:
    """Raises MissingPackageError where what reads a GGUF is not installed."""
    for module in ("gguf", "torch", "transformers"):
        packages.require(module, who, (packages.EVALUATE,))


def to_huggingface(source: Path, folder: Path, called: str) -> dict[str, Any]:
    """Writes the model in `source` into `folder`: config.json, safetensors in bf16, tokenizer, generation settings.

    Args:
        called: what messages call it.

    Returns:
        `stored`: tensors by their precision in the file ({"Q4_1": 210}), and `name`, what it calls itself.

    Raises:
        CheckpointError: it is no GGUF, is damaged, or holds what cannot be converted.
    """
    with _readable(called):
        reader = _reader(source)
        stored = collections.Counter(tensor.tensor_type.name for tensor in reader.tensors)
        _check(reader, called)
        _check_sizes(reader, source, called)
        tokenizer = _tokenizer(reader, called)
        _model(source, called).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _as_readable_as(folder / "config.json", folder.glob("*.safetensors"))
    return {"stored": dict(stored.most_common()), "name": str(_value(reader, "general.name") or "")}


def _as_readable_as(model: Path, files: Iterable[Path]) -> None:
    """Gives `files` the permissions of `model`: safetensors makes its files for their owner alone."""
    for file in files:
        file.chmod(stat.S_IMODE(model.stat().st_mode))


@contextlib.contextmanager
def _readable(called: str) -> Iterator[None]:
    """Turns what a damaged file does to the libraries into one message, and keeps their bars to terminals."""
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            yield
    except (CheckpointError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # transformers raises some of no number
            raise
        raise CheckpointError(
            f"{called} is no GGUF file that can be read ({type(error).__name__}: {error}): it is damaged, or of "
            "a kind that is not known here"
        ) from error


def _reader(source: Path) -> "GGUFReader":
    from gguf import GGUFReader

    return GGUFReader(source)


def _value(reader: "GGUFReader", key: str) -> Any:
    """The value of a key; None where the file does not say."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _check(reader: "GGUFReader", called: str) -> None:
    """Raises CheckpointError for what would be lost on the way."""
    kind = _value(reader, "general.architecture")
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"{called} holds a model of the family {kind!r}; read from GGUF are {', '.join(ARCHITECTURES)}"
        )
    names = [tensor.name for tensor in reader.tensors]
    scaling = _value(reader, f"{kind}.rope.scaling.type")
    if ROPE_FACTORS in names or scaling not in (None, "none"):
        raise CheckpointError(
            f"{called} scales its rotary frequencies ({ROPE_FACTORS if ROPE_FACTORS in names else scaling}), "
            "which is not read from GGUF: take the model in safetensors, hf://org/name"
        )
    left = [name for name in names if not TENSORS.fullmatch(name)]
    if left:
        raise CheckpointError(
            f"{called} has tensors that no {kind} model here has: {', '.join(left[:SHOWN])}"
            f"{', ...' if len(left) > SHOWN else ''}"
        )
    if len({*names}) != len(names):
        raise CheckpointError(f"{called} names a tensor twice")


def _check_sizes(reader: "GGUFReader", source: Path, called: str) -> None:
    """Holds the sizes that transformers reads in the file against those of its tensors, before any is read.

    Raises:
        CheckpointError: they contradict each other.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(source.parent), gguf_file=source.name, local_files_only=True)
    a = read_config(config.to_dict(), called)
    kind = _value(reader, "general.architecture")
    tensors = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    sizes = {
        f"{kind}.block_count": (a.num_layers, len({name.split(".")[1] for name in tensors if name[:4] == "blk."})),
        "shape of token_embd.weight": ((a.vocab_size, a.hidden_size), tensors.get("token_embd.weight")),
        "parameters": (a.parameters(), sum(math.prod(shape) for shape in tensors.values())),
    }
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        stated = _value(reader, f"{kind}.{key}")
        sizes[f"{kind}.{key}"] = (a.kv_channels, a.kv_channels if stated is None else stated)
    wrong = [
        f"{what}: {said} by its description, {there} found" for what, (said, there) in sizes.items() if said != there
    ]
    if wrong:
        raise CheckpointError(f"{called} contradicts itself: {'; '.join(wrong)}")


def _model(source: Path, called: str) -> "PreTrainedModel":
    """The transformers model of the file, every tensor in its place.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(source.parent),
            gguf_file=source.name,
            dtype=torch.bfloat16,
            local_files_only=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(level)
    lost = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
    if lost:
        raise CheckpointError(f"{called} lacks tensors of its model, or has them in another shape: {lost[:SHOWN]}")
    vars(model.config).pop("_model_name_or_path", None)
    # transformers 5 takes a model that it has dequantised for a quantised one still, and does not save it.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    return model


def _tokenizer(reader: "GGUFReader", called: str) -> "PreTrainedTokenizerFast":
    """The byte-level BPE of the file as a transformers tokenizer, with its own special tokens and chat template.

    Raises:
        CheckpointError: it is of another kind, splits texts in a way that is not known here, or is not whole.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    kind, split = (_value(reader, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2" or (split or "default") not in SPLITS:
        raise CheckpointError(
            f"{called} has a tokenizer of the kind {kind!r}, split as {split!r}; read from GGUF are byte-level "
            f"ones (gpt2), split as {', '.join(SPLITS)}"
        )
    tokens, merges = (_value(reader, f"tokenizer.ggml.{key}") or [] for key in ("tokens", "merges"))
    special = {name: tokens[number] for name, number in _special_ids(reader, tokens, called).items()}
    bpe = models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ", 1)) for merge in merges],
        ignore_merges=split == "llama-bpe",
    )
    tokenizer = Tokenizer(bpe)
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(SPLITS[split or "default"])
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, tokens, _value(reader, "tokenizer.ggml.token_type") or [])
    if _value(reader, "tokenizer.ggml.add_bos_token") and "bos_token" in special:
        first = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, tokens.index(first))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    made.chat_template = _value(reader, "tokenizer.chat_template")
    made.model_max_length = _value(reader, f"{_value(reader, 'general.architecture')}.context_length")
    return made


def _special_ids(reader: "GGUFReader", tokens: list[str], called: str) -> dict[str, int]:
    """Name of a special token -> its id, of those that the file names."""
    if len({*tokens}) != len(tokens) or not tokens:
        raise CheckpointError(f"{called} has a tokenizer that is not whole: {len(tokens)} tokens, some of them twice")
    ids = {name: _value(reader, f"tokenizer.ggml.{key}") for name, key in SPECIAL.items()}
    ids = {name: number for name, number in ids.items() if number is not None}
    beyond = {name: number for name, number in ids.items() if not 0 <= number < len(tokens)}
    if beyond:
        raise CheckpointError(f"{called}: {beyond} are no tokens of its {len(tokens)}")
    return ids


def _pre_tokenizer(patterns: tuple[str, ...]) -> "pre_tokenizers.Sequence":
    """Splits by each pattern, then writes bytes as characters."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _add_tokens(tokenizer: "Tokenizer", tokens: list[str], kinds: list[int]) -> None:
    """Marks the tokens that are matched whole, before a text is split."""
    from tokenizers import AddedToken

    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(tokens, kinds)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
