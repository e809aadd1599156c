"""The piece that lets Megatron run without CUDA: contained, listed, and gone when it is left."""

import gc
import re
import sys
import types

import pytest
import torch

from nemo_minitron.errors import EngineError
from nemo_minitron.megatron import cpu


def attributes_of(places: list) -> dict[tuple[str, str], object]:
    """What stands at each place that is redirected."""
    return {(redirect.owner, redirect.name): getattr(owner, redirect.name, cpu.MISSING) for owner, redirect in places}


def test_every_redirect_is_undone_even_after_an_error():
    places = list(cpu.places())
    before = attributes_of(places)
    own = [vars(owner).get(redirect.name, cpu.MISSING) for owner, redirect in places]
    with pytest.raises(RuntimeError, match="inside"), cpu.megatron_on_cpu() as active:
        assert active
        inside = attributes_of(places)
        assert all(inside[key] is not before[key] for key in before)
        raise RuntimeError("inside")
    after = attributes_of(places)
    assert all(after[key] == before[key] for key in before)
    assert own == [vars(owner).get(redirect.name, cpu.MISSING) for owner, redirect in places]


def test_every_redirect_says_why():
    assert all(len(redirect.why) > 10 for redirect in cpu.redirects())


def test_nothing_is_touched_where_cuda_is_available(monkeypatch):
    places = list(cpu.places())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = attributes_of(places)
    with cpu.megatron_on_cpu() as active:
        assert not active
        assert all(value is before[key] for key, value in attributes_of(places).items() if key[0] != "torch.Tensor")
        assert "cuda" not in vars(torch.Tensor) or torch.Tensor.cuda is before[("torch.Tensor", "cuda")]


def test_a_run_on_the_cpu_of_a_machine_with_gpus_is_told_of_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with cpu.megatron_on_cpu(cuda=False) as active:
        assert active and not torch.cuda.is_available() and torch.cuda.device_count() == 0
        assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.cuda.is_available() and torch.cuda.device_count() == 2


def test_a_toolkit_is_not_found_on_a_machine_without_gpus(monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    with cpu.without_toolkit():
        assert cpp_extension.CUDA_HOME is None
    assert cpp_extension.CUDA_HOME == "/usr/local/cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with cpu.without_toolkit():
        assert cpp_extension.CUDA_HOME == "/usr/local/cuda"


def test_an_inner_entry_leaves_the_outer_one_in_place():
    with cpu.megatron_on_cpu():
        with cpu.megatron_on_cpu():
            pass
        assert torch.zeros(2, device="cuda").device.type == "cpu"


@pytest.fixture
def library(monkeypatch) -> types.ModuleType:
    """A library of another version: it has `kept`, and nothing else."""
    module = types.ModuleType("other_version")
    module.kept = 1
    monkeypatch.setitem(sys.modules, "other_version", module)
    module.__spec__ = types.SimpleNamespace(name="other_version")
    monkeypatch.setattr(cpu, "LIBRARIES", (*cpu.LIBRARIES, "other_version", "not_installed.at_all"))
    return module


def only(monkeypatch, owner: str, name: str, **arguments: bool) -> None:
    """Makes one redirect, to the value 2, the only one."""
    redirect = cpu.Redirect(owner, name, lambda original: 2, "another version", **arguments)
    monkeypatch.setattr(cpu, "redirects", lambda: [redirect])


@pytest.mark.parametrize("owner", ["other_version", "other_version.module", "other_version.module.Class"])
def test_what_another_version_lacks_is_left_alone_or_an_error_that_names_it(monkeypatch, library, owner):
    only(monkeypatch, owner, "gone", needed=False)
    with cpu.megatron_on_cpu():
        assert not hasattr(library, "gone")
    only(monkeypatch, owner, "gone")
    with pytest.raises(EngineError, match=f"{owner}.gone does not exist"), cpu.megatron_on_cpu():
        pass


def test_a_name_that_is_missing_is_made_and_one_that_is_there_is_kept(monkeypatch, library):
    only(monkeypatch, "other_version", "gone", only_missing=True)
    with cpu.megatron_on_cpu():
        assert library.gone == 2
    assert not hasattr(library, "gone")
    only(monkeypatch, "other_version", "kept", only_missing=True)
    with cpu.megatron_on_cpu():
        assert library.kept == 1
    assert library.kept == 1


def test_a_library_that_is_not_installed_has_nothing_to_redirect(monkeypatch, library):
    only(monkeypatch, "not_installed.at_all.module", "name")
    with cpu.megatron_on_cpu() as active:
        assert active


def test_a_module_that_lacks_what_it_imports_is_no_missing_module(monkeypatch, tmp_path):
    (tmp_path / "broken_module.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        cpu._resolve("broken_module")


def test_cuda_names_mean_the_cpu_inside_and_fail_outside():
    with cpu.megatron_on_cpu():
        made = [
            torch.zeros(2, device="cuda"),
            torch.tensor([1.0], device=torch.cuda.current_device(), pin_memory=True),
            torch.ones(2).cuda(),
            torch.ones(2).to("cuda:0"),
            torch.ones(2).to(torch.device("cuda")),
            torch.ones(2).pin_memory(),
            torch.nn.Linear(2, 2).cuda().weight,
        ]
        assert {tensor.device.type for tensor in made} == {"cpu"}
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1).type("torch.cuda.BFloat16Tensor").dtype == torch.bfloat16
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.synchronize()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_the_device_is_this_machine():
    with cpu.megatron_on_cpu():
        free, total = torch.cuda.mem_get_info()
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        assert 0 < free < total == properties.total_memory
        assert (properties.major, properties.minor) == torch.cuda.get_device_capability()
        assert properties.major not in range(7, 13), "no kernel of a GPU's kind is chosen"
        assert torch.cuda.memory_allocated() == torch.cuda.max_memory_reserved() == 0


def test_the_random_state_of_the_device_is_the_cpus():
    with cpu.megatron_on_cpu():
        torch.cuda.manual_seed(7)
        state = torch.cuda.get_rng_state()
        drawn = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize(("put", "taken"), [((), (1,)), ((2, 4), (8,)), ((8,), (2, 4)), ((2, 4), (1, 2, 4))])
def test_a_gather_counts_elements_as_nccl_does(tmp_path, put, taken):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        given, gathered = torch.randn(put), torch.zeros(taken)
        with cpu.megatron_on_cpu():
            torch.distributed.all_gather_into_tensor(gathered, given)
        assert torch.equal(gathered.flatten(), given.flatten())
    finally:
        torch.distributed.destroy_process_group()


def test_tensors_that_megatron_sends_need_not_be_on_a_gpu():
    from megatron.core.inference import communication_utils

    with cpu.megatron_on_cpu():
        communication_utils._is_cuda(torch.ones(2))
    with pytest.raises(AssertionError):
        communication_utils._is_cuda(torch.ones(2))


def gpt(experts: int | None) -> torch.nn.Module:
    """A GPT of two layers, dense or with a mixture of so many experts, two of them a token."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, add_bias_linear=False,
        normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0, num_moe_experts=experts,
        moe_ffn_hidden_size=48 if experts else None, moe_router_topk=2, moe_router_load_balancing_type="none",
    )  # fmt: skip
    layers = get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False, normalization="RMSNorm")
    return GPTModel(config, layers, vocab_size=64, max_sequence_length=16, position_embedding_type="rope")


def test_a_mixture_of_equal_experts_is_the_dense_model_forward_and_backward(tmp_path):
    """A token's two experts weigh 1 together: so do their gradients."""
    from nemo_minitron.megatron.forward import parallel_ranks
    from nemo_minitron.megatron.layout import Layout
    from nemo_minitron.megatron.session import engine

    with engine(3, tmp_path / "log"), parallel_ranks(Layout(cuda=False, bf16=False), 3):
        dense, mixture = gpt(None), gpt(4)
        given = dict(dense.named_parameters())
        with torch.no_grad():
            for name, parameter in mixture.named_parameters():
                if "router" not in name:
                    parameter.copy_(given[plain(name)])
        tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(16).expand_as(tokens)
        losses = [model(tokens, positions, None, labels=tokens.roll(-1, 1)) for model in (dense, mixture)]
        for loss in losses:
            loss.mean().backward()
    assert torch.allclose(*losses, atol=1e-5)
    summed: dict[str, torch.Tensor] = {}
    for name, parameter in mixture.named_parameters():
        summed[plain(name)] = summed.get(plain(name), 0) + parameter.grad
    for name, parameter in given.items():
        assert torch.allclose(summed[name], parameter.grad, atol=1e-5), name
    assert any("router" in name and gradient.shape == (4, 32) for name, gradient in summed.items())


def plain(name: str) -> str:
    """The parameter of the dense model that an expert's stands for."""
    return re.sub(r"experts\.local_experts\.\d+\.", "", name)


def test_what_a_host_froze_for_the_garbage_collector_stays_frozen(monkeypatch):
    """And what it did not is looked through again after a stage."""
    from nemo_minitron.megatron import session

    monkeypatch.setattr(session, "stages_alone", False)
    for by_host in (True, False):
        (gc.freeze if by_host else gc.unfreeze)()
        with session.engine(1):
            assert gc.get_freeze_count() > 0
        assert (gc.get_freeze_count() > 0) == by_host
