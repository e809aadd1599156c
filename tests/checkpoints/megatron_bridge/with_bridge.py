"""Megatron-Bridge itself saves and loads checkpoints, on a CPU: what the folders beside this were made with.

    python with_bridge.py save HF_DIR OUTPUT [HF_DIR OUTPUT ...]
    python with_bridge.py load CHECKPOINT HF_DIR [CHECKPOINT HF_DIR ...]

`save` imports a Hugging Face directory by AutoBridge and saves it by save_megatron_model. `load` loads by
load_megatron_model. It wants no tensor missing and none left over, but for extra states, some of which Transformer
Engine alone has, and transformers' logits of the same model, to 1e-4 of the largest.

Needs megatron-bridge 0.6.2 and a megatron-core that goes with it (0.19.2). Stand-ins are for what a CPU does not have,
and for nothing that reads or writes: Transformer Engine (the local layer spec, and a norm that takes zero-centred
gamma) and CUDA (random states, streams, current device).
"""

import builtins
import contextlib
import importlib
import sys
import types
from pathlib import Path

import torch

TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine_torch")
#: What Bridge and ModelOpt import at their start and do not use here.
UNUSED = ("pulp", "megatron.energon")
TOLERANCE = 1e-4


class Empty(types.ModuleType):
    """A module in which every class is an empty one."""

    __path__: list[str] = []
    __version__ = "2.8.0"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        value = empty(f"{self.__name__}.{name}") if name.islower() else type(name, (torch.nn.Module,), {})
        setattr(self, name, value)
        return value


MODULES: dict[str, Empty] = {}
importing = builtins.__import__


def empty(name: str) -> Empty:
    return MODULES.setdefault(name, Empty(name))


def without_transformer_engine(name, globals=None, locals=None, fromlist=(), level=0):
    """import: Transformer Engine is empty to Bridge, which imports it unasked, and absent to all others."""
    if level == 0 and name.startswith(UNUSED):
        return empty(name if fromlist else name.partition(".")[0])
    if level == 0 and name.partition(".")[0] in TRANSFORMER_ENGINE:
        if not (globals or {}).get("__name__", "").startswith("megatron.bridge"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return empty(name if fromlist else name.partition(".")[0])
    return importing(name, globals, locals, fromlist, level)


class OnCpu(torch.overrides.TorchFunctionMode):
    """What is made on a CUDA device is made on the CPU."""

    def __torch_function__(self, function, kinds, arguments=(), settings=None):
        settings = settings or {}
        if settings.get("device") == "cuda":
            settings = {**settings, "device": "cpu"}
        return function(*arguments, **settings)


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm, its gamma stored minus one where it is zero-centred."""

    def __init__(self, config, hidden_size, eps=1e-5, **_):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))
        self.bias = None if config.normalization == "RMSNorm" else torch.nn.Parameter(torch.zeros(hidden_size))
        self.shift, self.eps = float(config.layernorm_zero_centered_gamma), eps

    def forward(self, x):
        gamma = self.weight + self.shift
        if self.bias is None:
            return torch.nn.functional.rms_norm(x, gamma.shape, gamma, self.eps)
        return torch.nn.functional.layer_norm(x, gamma.shape, gamma, self.bias, self.eps)


def prepare():
    """Bridge's module of loading and saving, once the stand-ins are in place."""
    builtins.__import__ = without_transformer_engine
    bridge = importlib.import_module("megatron.bridge.training.model_load_save")
    importlib.import_module("megatron.core.transformer.transformer_block").LayerNormImpl = Norm
    for name in ("models.gpt.gpt_layer_specs", "models.backends", "transformer.torch_norm"):
        module = importlib.import_module(f"megatron.core.{name}")
        for norm in {"WrappedTorchNorm", "LNImpl"} & vars(module).keys():
            setattr(module, norm, Norm)
    tracker = importlib.import_module("megatron.core.tensor_parallel.random").CudaRNGStatesTracker
    tracker.fork = lambda self, name=None: contextlib.nullcontext()
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_, **__: None
    return bridge


def local(provider) -> None:
    """The model without Transformer Engine."""
    from megatron.bridge.models.gpt_provider import local_layer_spec

    provider.transformer_layer_spec = local_layer_spec
    for fusion in ("apply_rope_fusion", "masked_softmax_fusion", "persist_layer_norm", "bias_activation_fusion",
                   "bias_dropout_fusion", "gradient_accumulation_fusion", "cross_entropy_loss_fusion"):  # fmt: skip
        setattr(provider, fusion, False)


def save(bridge, source: str, output: str) -> None:
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import default_layer_spec
    from megatron.core.process_groups_config import ProcessGroupCollection

    auto = AutoBridge.from_hf_pretrained(source)
    provider = auto.to_megatron_provider(load_weights=False)
    local(provider)
    provider.use_cpu_initialization = True
    provider.finalize()
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    model = provider.provide(pre_process=True, post_process=True).to(provider.params_dtype)
    auto.load_hf_weights([model])
    provider.transformer_layer_spec = default_layer_spec  # as it is noted where Transformer Engine is
    tokenizer = source if (Path(source) / "tokenizer_config.json").is_file() else None
    bridge.save_megatron_model([model], output, hf_tokenizer_path=tokenizer)
    print(f"saved {output}", flush=True)


def load(bridge, checkpoint: str, source: str) -> None:
    import transformers
    from megatron.bridge.training import checkpointing

    folder = checkpointing.find_checkpoint_rank_0(
        checkpoint, *checkpointing._resolve_checkpoint_iteration(checkpoint, None)
    )
    tokens = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(1))
    model = loaded(bridge, checkpointing, folder)
    mask = torch.ones(12, 12, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad(), OnCpu():
        found = model(input_ids=tokens, position_ids=torch.arange(12).expand_as(tokens), attention_mask=mask)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
    difference = float((found[..., : expected.shape[-1]] - expected).abs().max() / expected.abs().max())
    assert difference < TOLERANCE, f"{checkpoint}: logits differ by {difference}"
    said = "no tokenizer"
    if (tokenizer := Path(folder) / "tokenizer").is_dir():
        ids = bridge.load_tokenizer(folder, tokenizer_model=str(tokenizer)).tokenize("to be or not to be")
        assert ids == transformers.AutoTokenizer.from_pretrained(source)("to be or not to be").input_ids
        said = f"{len(ids)} tokens"
    print(f"loaded {checkpoint}: logits differ by {difference:.1g} of the largest, {said}", flush=True)


def loaded(bridge, checkpointing, folder: str):
    """The model in fp32, by Bridge's load_megatron_model."""
    build, read = bridge.build_and_load_model, checkpointing.dist_checkpointing.load

    def build_locally(path, config, *rest, **settings):
        local(config)
        return build(path, config, *rest, **settings)

    def strictly(shards, path, strategy, strict):
        state, *differing = read(shards, path, strategy, strict="return_all")
        weights = [name for names in differing for name in names if "_extra_state" not in name]
        assert not weights, f"missing or left over: {weights}"
        return state

    bridge.build_and_load_model, checkpointing.dist_checkpointing.load = build_locally, strictly
    try:
        model = bridge.load_megatron_model(folder, model_type="gpt", use_cpu_init=True, skip_temp_dist_context=True)
    finally:
        bridge.build_and_load_model, checkpointing.dist_checkpointing.load = build, read
    model = model[0] if isinstance(model, list) else model
    while hasattr(model, "module"):
        model = model.module
    for module in model.modules():
        if (config := getattr(module, "config", None)) is not None:
            config.bf16, config.fp16, config.params_dtype = False, False, torch.float32
    return model.float().eval()


def main(command: str, *paths: str) -> None:
    bridge = prepare()
    with bridge.temporary_distributed_context("gloo"):
        for first, second in zip(paths[::2], paths[1::2], strict=True):
            (save if command == "save" else load)(bridge, first, second)


if __name__ == "__main__":
    main(*sys.argv[1:])
