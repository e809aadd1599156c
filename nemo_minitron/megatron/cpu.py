"""Megatron Core, NeMo and ModelOpt on a CPU: on a machine without CUDA, or beside it.

These libraries name the device ``cuda`` in their code. Inside ``megatron_on_cpu()`` each such name means the CPU: the
attributes listed by ``redirects()`` are replaced on entry and put back on exit. Where CUDA is used nothing is touched.
Nothing of the engines' arithmetic is changed; only where tensors live, and calls about streams and events, which mean
nothing on a CPU.

Attributes are replaced, rather than each operation intercepted by a ``TorchFunctionMode``, because the latter costs
microseconds on every operation and follows neither threads nor processes.
"""

import contextlib
import functools
import importlib
import os
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from nemo_minitron.errors import EngineError
from nemo_minitron.packages.versions import has_module

FACTORIES = (
    "tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "linspace", "eye", "rand", "randn", "randint",
    "randperm", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
)  # fmt: skip
LIBRARIES = ("torch", "megatron.core", "nemo.lightning")
MISSING = object()
_active = False


class Redirect(NamedTuple):
    """One attribute that is replaced.

    Attributes:
        owner: dotted path of the module or class. A library that is not installed has nothing to redirect.
        name: the attribute.
        build: makes the replacement from the original.
        why: the reason.
        needed: whether every version that is supported has the attribute, so that its absence is an error; otherwise
            a version without it, or without its owner, is left as it is.
        only_missing: the attribute is made where it does not exist (`build` gets MISSING), and kept where it does.
    """

    owner: str
    name: str
    build: Callable[[Any], Any]
    why: str
    needed: bool = True
    only_missing: bool = False


def is_cuda_device(value: Any) -> bool:
    """Whether `value` names a CUDA device: ``"cuda"``, ``"cuda:0"`` or such a ``torch.device``."""
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    return getattr(value, "type", None) == "cuda"


def _to_cpu(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    args = tuple("cpu" if is_cuda_device(value) else value for value in args)
    if is_cuda_device(kwargs.get("device")):
        kwargs = {**kwargs, "device": "cpu"}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    return args, kwargs


def _on_cpu(original: Callable) -> Callable:
    """`original` with CUDA devices among its arguments replaced by the CPU, and no pinned memory."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _to_cpu(args, kwargs)
        return original(*args, **kwargs)

    return call


def _identity(original: Callable) -> Callable:
    return lambda self, *args, **kwargs: self


def _returns(value: Any) -> Callable:
    return lambda original: lambda *args, **kwargs: value


def _cpu_device(original: Callable) -> Callable:
    import torch

    return _returns(torch.device("cpu"))(original)


def _tensor_type(original: Callable) -> Callable:
    """``Tensor.type()``: answers the CUDA names that Megatron's optimizers compare with, and accepts them."""

    @functools.wraps(original)
    def call(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return original(self, dtype, *args, **kwargs)

    return call


class _Stream:
    """Stand-in for a stream or an event: on a CPU everything has happened when a call returns."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    record = wait = wait_stream = wait_event = record_event = synchronize = _nothing


def _stream_class(original: Any) -> Any:
    return _Stream


def _random_state(name: str) -> Callable:
    def build(original: Callable) -> Callable:
        import torch

        cpu = getattr(torch.random, name)
        if name == "get_rng_state":
            return lambda device=None: cpu()
        if name == "set_rng_state":
            return lambda state, device=None: cpu(state)
        return cpu

    return build


def _seed_model_parallel(original: Callable) -> Callable:
    """NeMo seeds Megatron's model-parallel random states only where it counts a CUDA device."""

    @functools.wraps(original)
    def call(seed_: int, *args: Any, **kwargs: Any) -> Any:
        import torch
        from megatron.core import parallel_state, tensor_parallel

        result = original(seed_, *args, **kwargs)
        if seed_ is not None and seed_ > 0:
            pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
            state = torch.get_rng_state()
            tensor_parallel.model_parallel_cuda_manual_seed(seed_ + 100 * pipeline_rank)
            torch.set_rng_state(state)
        return result

    return call


def _gather_flat(original: Callable) -> Callable:
    """gloo's all_gather_into_tensor takes no 0-d input, and an output of the input's shape only, larger in the first
    dimension; NCCL's counts elements. ModelOpt's layer drop passes a scalar, its importance (2, 4) for (8)."""

    @functools.wraps(original)
    def call(output_tensor: Any, input_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if output_tensor.is_contiguous():
            output_tensor, input_tensor = output_tensor.view(-1), input_tensor.reshape(-1)
        return original(output_tensor, input_tensor, *args, **kwargs)

    return call


def _memory(pages: str) -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)


def _properties(original: Callable) -> Callable:
    """What is asked of a device's properties, answered for this machine, which has no compute capability."""
    properties = types.SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=_memory("SC_PHYS_PAGES"), multi_processor_count=os.cpu_count() or 1
    )
    return _returns(properties)(original)


def _free_memory(original: Callable) -> Callable:
    return lambda device=None: (_memory("SC_AVPHYS_PAGES"), _memory("SC_PHYS_PAGES"))


def redirects() -> list[Redirect]:
    """Each thing that is redirected on a CPU, and why."""
    device = "names the CUDA device or asks for pinned memory"
    streams = "streams and events order work on a GPU; on a CPU each call has finished when it returns"
    torch_cuda = "torch.cuda"
    set_rng_state = _random_state("set_rng_state")(None)
    table = [Redirect("torch", name, _on_cpu, f"a factory call in Megatron or NeMo {device}") for name in FACTORIES]
    table += [
        Redirect("torch.Tensor", "to", _on_cpu, f"a call {device}"),
        Redirect("torch.Tensor", "cuda", _identity, "tensors are moved to the GPU; here they stay"),
        Redirect("torch.Tensor", "pin_memory", _identity, "pinned memory serves copies to a GPU"),
        Redirect("torch.Tensor", "type", _tensor_type, "Megatron's optimizers compare type names with CUDA's"),
        Redirect("torch.Tensor", "new_empty", _on_cpu, f"a call {device}"),
        Redirect("torch.Tensor", "new_zeros", _on_cpu, f"a call {device}"),
        Redirect("torch.Tensor", "new_tensor", _on_cpu, f"a call {device}"),
        Redirect("torch.nn.Module", "to", _on_cpu, "models are moved to the GPU; here they stay"),
        Redirect("torch.nn.Module", "cuda", _identity, "models are moved to the GPU; here they stay"),
        Redirect(torch_cuda, "is_available", _returns(False), "a run on the CPU of a machine that has GPUs"),
        Redirect(torch_cuda, "device_count", _returns(0), "a run on the CPU of a machine that has GPUs"),
        Redirect(torch_cuda, "current_device", _cpu_device, "is passed as device= throughout Megatron"),
        Redirect(torch_cuda, "set_device", _returns(None), "there is one device"),
        Redirect(torch_cuda, "is_initialized", _returns(True), "NeMo's checkpoint reader asserts it"),
        Redirect(torch_cuda, "synchronize", _returns(None), streams),
        Redirect(torch_cuda, "empty_cache", _returns(None), "there is no caching allocator"),
        *(
            Redirect(torch_cuda, name, _returns(0), "there is no caching allocator")
            for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
        ),
        Redirect(torch_cuda, "mem_get_info", _free_memory, "ModelOpt asks how much is free; on a CPU, of the machine"),
        Redirect(torch_cuda, "get_device_properties", _properties, "ModelOpt and NeMo ask for memory and kind"),
        Redirect(torch_cuda, "get_device_capability", _returns((0, 0)), "NeMo chooses by the kind of GPU"),
        Redirect(torch_cuda, "Stream", _stream_class, streams),
        Redirect(torch_cuda, "Event", _stream_class, streams),
        Redirect(torch_cuda, "stream", _stream_class, streams),
        Redirect(torch_cuda, "current_stream", _stream_class, streams),
        Redirect(torch_cuda, "default_stream", _stream_class, streams),
        *(
            Redirect(owner, name, _random_state(name), "Megatron forks and seeds the device's random state")
            for owner in ("torch.cuda", "torch.cuda.random")
            for name in ("get_rng_state", "set_rng_state", "manual_seed")
        ),
        Redirect(
            "megatron.core.tensor_parallel.random", "_set_cuda_rng_state",
            lambda original: lambda new_state, device=-1, graph_safe=False: set_rng_state(new_state),
            "sets the state of a CUDA generator",
        ),
        Redirect(
            "torch.distributed", "all_gather_into_tensor", _gather_flat,
            "gloo refuses 0-d inputs and outputs of another shape",
        ),
        Redirect(
            "megatron.core.inference.communication_utils", "_is_cuda", _returns(None),
            "asserts that a tensor is on a CUDA device", needed=False,
        ),
        Redirect(
            "megatron.core.transformer.moe.moe_utils", "te_general_gemm", lambda original: None,
            "mixture-of-experts routing asks whether it is None, which is imported with Transformer Engine only",
            needed=False, only_missing=True,
        ),
        Redirect(
            "nemo.lightning.megatron_init", "_set_random_seed", _seed_model_parallel,
            "NeMo seeds Megatron's random states only where it counts CUDA devices",
        ),
        Redirect(
            "nemo.lightning.io.pl", "_fix_tensors_device", lambda original: lambda checkpoint: checkpoint,
            "moves loaded tensors to the rank's CUDA device",
        ),
    ]  # fmt: skip
    return table


def _resolve(path: str) -> Any:
    """The module or class of a dotted path, MISSING where there is none."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise  # the module is there, what it imports is not
        parent, _, name = path.rpartition(".")
        return getattr(_resolve(parent), name, MISSING) if parent else MISSING


def _installed(path: str) -> bool:
    """Whether the library that a dotted path begins with is installed."""
    return has_module(next(name for name in LIBRARIES if f"{path}.".startswith(f"{name}.")))


def places() -> Iterator[tuple[Any, Redirect]]:
    """Each redirect that has something to replace in the installed versions, with its owner.

    Raises:
        EngineError: an attribute that every supported version has is missing.
    """
    for redirect in redirects():
        if not _installed(redirect.owner):
            continue
        owner = _resolve(redirect.owner)
        exists = hasattr(owner, redirect.name)
        if redirect.needed and not (exists or redirect.only_missing):
            raise EngineError(
                f"{redirect.owner}.{redirect.name} does not exist in the installed version; "
                "running without CUDA needs the versions of requirements.txt"
            )
        if owner is not MISSING and exists != redirect.only_missing:
            yield owner, redirect


@contextlib.contextmanager
def without_toolkit() -> Iterator[None]:
    """In the body, torch finds no CUDA toolkit on a machine without GPUs.

    Megatron Core compiles a CUDA allocator when it is imported; where a toolkit is installed and no GPU is there to say
    for which one, torch ends that in an IndexError that Megatron does not expect.
    """
    import torch

    if torch.cuda.is_available():
        yield
        return
    from torch.utils import cpp_extension

    toolkit, cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME, None
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = toolkit


@contextlib.contextmanager
def megatron_on_cpu(cuda: bool | None = None) -> Iterator[bool]:
    """Runs the body with the redirects in place; yields whether they are.

    Re-entrant: an inner entry does nothing. The replaced attributes are process-wide, so keep the body to engine work.

    Args:
        cuda: whether the body runs on GPUs, where nothing is touched; None: where there are any. A run on the CPU of a
            machine with GPUs needs the redirects as well, and is told that there is no GPU.
    """
    import torch

    global _active
    if _active or (torch.cuda.is_available() if cuda is None else cuda):
        yield _active
        return
    replaced: list[tuple[Any, str, Any]] = []
    _active = True
    try:
        for owner, redirect in places():
            original = getattr(owner, redirect.name, MISSING)
            replaced.append((owner, redirect.name, vars(owner).get(redirect.name, MISSING)))
            setattr(owner, redirect.name, redirect.build(original))
        with torch.compiler.set_stance("force_eager"):
            # Megatron compiles small functions with torch.compile, which asks CUDA for its device.
            yield True
    finally:
        for owner, name, original in reversed(replaced):
            if original is MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        _active = False
