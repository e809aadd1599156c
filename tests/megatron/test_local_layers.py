"""Norms and gates that keep little beside PyTorch's own, in values and gradients."""

import pytest
import torch
from torch.nn.functional import silu


@pytest.fixture(scope="module")
def layers():
    from nemo_minitron.megatron import local_layers

    return local_layers


def drawn(*shape, dtype, seed=0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).requires_grad_()


def kept(function, *inputs):
    """The result, and what its backward pass holds beside the inputs, in elements."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda t: t):
        result = function(*inputs)
    known = {tensor.data_ptr() for tensor in (*inputs, result)}
    return result, sum(tensor.numel() for tensor in saved if tensor.data_ptr() not in known)


def gradients(result, *leaves):
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.autograd.grad(result, leaves, upstream.to(result.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gate_is_silu_times_the_other_half_bit_for_bit(layers, dtype):
    both = drawn(5, 3, 2 * 16, dtype=dtype)
    result, more = kept(layers.SwiGLUFunction.apply, both)
    gate, linear = both.chunk(2, dim=-1)
    expected = silu(gate) * linear
    assert more == 0
    assert torch.equal(result, expected)
    assert torch.equal(*(gradients(one, both)[0] for one in (result, expected)))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_norm_is_pytorchs(layers, dtype, tolerance, weights):
    x = drawn(7, 3, 24, dtype=dtype)
    ours, theirs = layers.RMSNorm(24, eps=1e-2), torch.nn.RMSNorm(24, eps=1e-2)
    for norm in (ours, theirs):
        norm.weight.data = drawn(24, dtype=dtype if dtype == torch.float64 else weights, seed=3).detach()
    result, more = kept(ours, x)
    expected = theirs(x)
    assert more == 7 * 3 + 24  # a number a row, and the gains
    assert result.dtype == x.dtype
    for one, other in zip(
        [result, *gradients(result, x, ours.weight)], [expected, *gradients(expected, x, theirs.weight)]
    ):
        scale = other.double().abs().max()
        assert (one.double() - other.double()).abs().max() < tolerance * scale


def test_gradients_are_those_of_the_function(layers):
    x, gamma = drawn(4, 6, dtype=torch.float64), drawn(6, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda *inputs: layers.RMSNormFunction.apply(*inputs, 0.1), (x, gamma))
    assert torch.autograd.gradcheck(layers.SwiGLUFunction.apply, (x,))
