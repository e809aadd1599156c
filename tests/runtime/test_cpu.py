"""The piece that lets Megatron run without CUDA: contained, listed, and gone when it is left."""

import pytest
import torch

from nemo_minitron.runtime import cpu


def replaced() -> dict[tuple[str, str], object]:
    """What stands at each place that is redirected."""
    return {
        (redirect.owner, redirect.name): getattr(cpu._resolve(redirect.owner), redirect.name)
        for redirect in cpu.redirects()
    }


def test_every_redirect_is_undone_even_after_an_error():
    before = replaced()
    own = {key: vars(cpu._resolve(key[0])).get(key[1], None) for key in before}
    with pytest.raises(RuntimeError, match="inside"), cpu.megatron_on_cpu() as active:
        assert active
        inside = replaced()
        assert all(inside[key] is not before[key] for key in before)
        raise RuntimeError("inside")
    after = replaced()
    assert all(after[key] == before[key] for key in before)
    assert own == {key: vars(cpu._resolve(key[0])).get(key[1], None) for key in before}


def test_every_redirect_says_why():
    assert all(len(redirect.why) > 10 for redirect in cpu.redirects())


def test_nothing_is_touched_where_cuda_is_available(monkeypatch):
    before = replaced()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with cpu.megatron_on_cpu() as active:
        assert not active
        assert all(value is before[key] for key, value in replaced().items() if key[0] != "torch.Tensor")
        assert "cuda" not in vars(torch.Tensor) or torch.Tensor.cuda is before[("torch.Tensor", "cuda")]


def test_an_inner_entry_leaves_the_outer_one_in_place():
    with cpu.megatron_on_cpu():
        with cpu.megatron_on_cpu():
            pass
        assert torch.zeros(2, device="cuda").device.type == "cpu"


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


def test_the_random_state_of_the_device_is_the_cpus():
    with cpu.megatron_on_cpu():
        torch.cuda.manual_seed(7)
        state = torch.cuda.get_rng_state()
        drawn = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), drawn)
