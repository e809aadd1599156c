"""What differs between the versions that users have: NeMo, Megatron Core, ModelOpt, NeMo-Run, transformers, lm-eval.

Each question is asked of what is installed (a class, a parameter, a module that is there or not), by version number
only where nothing else tells. What a version cannot do is refused by name, with the version that can.
"""

import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import EngineError

if TYPE_CHECKING:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase


def installed(package: str) -> str | None:
    """The version of a distribution that is installed, such as ``megatron-core``; None where it is not."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_installed(module: str) -> None:
    """Raises ModuleNotFoundError where a top-level module is not installed, as its import would; it is not imported."""
    if not has_module(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def has_module(name: str) -> bool:
    """Whether a module can be imported; it is not imported, only the packages around it are."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package around it is not installed
        return False


def accepts(function: Callable[..., Any], parameter: str) -> bool:
    """Whether a function, or a class when it is called, has a parameter of this name."""
    return parameter in inspect.signature(function).parameters


def known_keywords(function: Callable[..., Any], **keywords: Any) -> dict[str, Any]:
    """Those of `keywords` that the installed version of a function or class has."""
    return {name: value for name, value in keywords.items() if accepts(function, name)}


@contextlib.contextmanager
def optimizer_as_nemo_asks() -> Iterator[None]:
    """In the body, Megatron makes the optimizer that NeMo 2.7 asks for, though Core 0.16 dropped three of its keywords.

    At the values below they ask for what Core 0.16 does by itself: biases and norms do not decay, and there is one
    learning rate.

    Raises:
        EngineError: in the body, where a keyword that is gone is given another value.
    """
    import megatron.core.optimizer

    make = megatron.core.optimizer.get_megatron_optimizer
    neutral = {"no_weight_decay_cond": None, "scale_lr_cond": None, "lr_mult": 1.0}
    gone = {name: value for name, value in neutral.items() if not accepts(make, name)}

    @functools.wraps(make)
    def call(*args: Any, **kwargs: Any) -> Any:
        asked = [name for name, value in gone.items() if kwargs.pop(name, value) != value]
        if asked:
            raise EngineError(f"megatron-core {installed('megatron-core')} has no {', '.join(asked)}; 0.15 has")
        return make(*args, **kwargs)

    megatron.core.optimizer.get_megatron_optimizer = call if gone else make
    try:
        yield
    finally:
        megatron.core.optimizer.get_megatron_optimizer = make


@functools.lru_cache(maxsize=8)
def core_source(file: str) -> str | None:
    """The text of a file of the installed Megatron Core, such as ``transformer/mlp.py``; None where there is none.

    It is read and not imported, which would take seconds.
    """
    package = importlib.util.find_spec("megatron")
    places = [Path(place, "core", file) for place in (package.submodule_search_locations or [])] if package else []
    return next((place.read_text(encoding="utf-8") for place in places if place.is_file()), None)


def local_attention_takes_windows() -> bool:
    """Whether the local attention of the installed Megatron Core knows sliding windows; before 0.15 it refuses them."""
    from megatron.core.transformer import utils

    return hasattr(utils, "get_sliding_window_causal_mask")


def ffn_takes_activation() -> bool:
    """Whether Megatron's FFN takes the module of its activation from a layer spec, as it does from 0.15 on."""
    from megatron.core.transformer.mlp import MLPSubmodules

    return hasattr(MLPSubmodules, "activation_func")


def has_nemo() -> bool:
    """Whether NeMo's LLM collection is installed, which ended with NeMo 2.7; only its parent packages are imported."""
    return has_module("nemo.collections.llm")


def modelopt_takes_local_layers() -> bool:
    """Whether ModelOpt's Minitron pruning is there, and takes models of Megatron's local layer spec.

    From 0.44 on it takes those of Transformer Engine only, which has to be installed for it to be imported.
    """
    try:
        from modelopt.torch.nas.plugins import megatron
    except ImportError:
        return False
    return not hasattr(megatron, "_DynamicTEQKVLayerNormColumnParallelLinear")


def check_training(what: str) -> None:
    """Raises EngineError where `what` cannot train here: training is NeMo's; ModuleNotFoundError without any engine."""
    for module in ("torch", "megatron"):
        check_installed(module)
    if not has_nemo():
        raise EngineError(
            f"{what} trains with NeMo's LLM collection (nemo.collections.llm), which is not installed here: it ended "
            "with NeMo 2.7, and NVIDIA's containers from 26.04 on have none. Train in a NeMo container up to 26.02 "
            "(nvcr.io/nvidia/nemo:26.02), or where requirements.txt is installed; checkpoints go from one to the other "
            "as they are. What trains nothing works here: data, plan, inspect, convert, prune, teach, evaluate, "
            "generate, benchmark, quantize"
        )


def tokenizer_class(folder: Path) -> "type[PreTrainedTokenizerBase] | type[AutoTokenizer]":
    """transformers' class that loads the tokenizer in `folder` as its tokenizer.json says.

    AutoTokenizer does in transformers 4. In 5 it takes the class that tokenizer_config.json names, and some of these (a
    Llama's) build normaliser, pre-tokenizer and decoder anew, whatever tokenizer.json has: other tokens, and no word.
    """
    import transformers

    rebuilds = hasattr(transformers, "TokenizersBackend")
    has_pipeline = (folder / "tokenizer.json").is_file()
    return transformers.PreTrainedTokenizerFast if rebuilds and has_pipeline else transformers.AutoTokenizer
