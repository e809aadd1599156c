"""Attention without Transformer Engine beside Megatron's own, plain float64 arithmetic and transformers."""

import copy

import pytest
import torch

from attentions import GROUPS, HEADS, LENGTH, SIZE, Made, close, core_attention, drawn, padded_rows, plain, run
from nemo_minitron.megatron import attention
from nemo_minitron.megatron.layout import Layout

CPU = Layout(cuda=False, bf16=False)


@pytest.fixture(scope="module")
def megatron(tmp_path_factory):
    """Makes attentions of one rank: (class or name, changes of the config, changes of the call) -> module."""
    from nemo_minitron.megatron.forward import parallel_ranks
    from nemo_minitron.megatron.session import engine

    with engine(1, tmp_path_factory.mktemp("engine") / "log"), parallel_ranks(CPU, 1):
        yield core_attention


CASES = {
    "groups": {},
    "one group": {"num_query_groups": 1},
    "no groups": {"num_query_groups": HEADS},
    "every key": {"mask": "no_mask"},
    "scale": {"softmax_scale": 0.3},
    "scaling by layer": {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True},
}
MASKS = {
    "none": lambda: None,
    "samples": padded_rows,
    "all alike": lambda: padded_rows()[1:],
    "heads": lambda: torch.cat([padded_rows()[:1], padded_rows()[1:]], dim=1).repeat(1, 2, 1, 1),
    "plain": lambda: padded_rows()[1, 0],
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", MASKS)
def test_it_is_megatrons_attention_forward_and_backward(megatron, name, dtype, tolerance, kind):
    groups, mask = CASES[name].get("num_query_groups", GROUPS), MASKS[kind]()
    made = {kind: megatron(kind, **CASES[name]) for kind in ("torch", "megatron")}
    results, expected = (run(module, mask, groups=groups, dtype=dtype) for module in made.values())
    assert close(results, expected, tolerance)
    again = run(made["torch"], mask, groups=groups, dtype=dtype)
    assert all(torch.equal(one, other) for one, other in zip(results, again))


def test_half_precision_is_nearer_to_the_truth_than_megatrons(megatron):
    exact = run(megatron("megatron"), None)
    errors = {
        kind: [
            float((one.double() - other).abs().mean())
            for one, other in zip(run(megatron(kind, bf16=True), None, dtype=torch.bfloat16), exact)
        ]
        for kind in ("torch", "megatron")
    }
    assert all(ours < 1.05 * megatrons for ours, megatrons in zip(*errors.values()))


def test_rows_that_see_nothing_are_finite(megatron):
    hidden = padded_rows()
    hidden[1, :, :8] = True
    result = run(megatron("torch"), hidden)
    expected = run(megatron("torch"), padded_rows())
    assert all(tensor.isfinite().all() for tensor in result)
    assert torch.equal(result[0][8:], expected[0][8:])


def test_dropout_leaves_out_keys_and_scales_the_rest(megatron):
    """With the identity as values the result is the weights of the keys."""
    module = megatron("torch", attention_dropout=0.25)
    _, (query, key, _) = drawn(length=SIZE, batch=64)
    values = torch.eye(SIZE, dtype=torch.float64)[:, None, None].expand(SIZE, 64, GROUPS, SIZE)
    expected = megatron("megatron")(query, key, values, None)
    once, again = module(query, key, values, None), module(query, key, values, None)
    assert torch.allclose(module.eval()(query, key, values, None), expected)
    assert not torch.equal(once, again)
    kept = once != 0
    assert torch.allclose(once[kept], expected[kept] / 0.75)
    assert 0.24 < float((~kept)[expected != 0].double().mean()) < 0.26


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("block", [8, 20, 1024])
@pytest.mark.parametrize("window", [0, 6, 46, 47])
def test_a_window_is_plain_arithmetic(megatron, monkeypatch, window, block, refuses):
    monkeypatch.setattr(attention, "BLOCK", block)
    if refuses:  # as Megatron Core before 0.15
        monkeypatch.setattr(attention, "local_attention_takes_windows", lambda: False)
    hidden = attention.outside(LENGTH, LENGTH, window, torch.device("cpu"))
    expected = run(lambda *inputs: plain(*inputs, hidden, SIZE**-0.5))
    assert close(run(megatron("torch", window_size=(window, 0)), None), expected)
    both = padded_rows() | hidden
    both = both & ~both.all(-1, keepdim=True)  # a query's own token is always seen
    expected = run(lambda *inputs: plain(*inputs, both, SIZE**-0.5))
    assert close(run(megatron("torch", window_size=(window, 0)), padded_rows()), expected)


def test_later_queries_alone_see_what_they_see_among_all(megatron):
    """As with keys kept from before."""
    for changes in ({}, {"window_size": (6, 0)}):
        module, (_, (query, key, value)) = megatron("torch", **changes), drawn()
        whole = module(query, key, value, None)
        for count in (1, 5):
            assert torch.allclose(module(query[-count:], key, value, None), whole[-count:])


def test_packed_sequences_see_themselves_alone(megatron):
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = torch.tensor([0, 5, 6, 30, LENGTH], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    _, inputs = drawn(batch=1)
    result = megatron("torch")(*(tensor[:, 0] for tensor in inputs), None, packed_seq_params=packed)
    each = torch.arange(len(bounds) - 1).repeat_interleave(bounds.diff())
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool() | (each[:, None] != each)
    assert torch.allclose(result.unsqueeze(1), plain(*inputs, hidden, SIZE**-0.5), rtol=1e-12, atol=1e-12)
    result.sum().backward()


def test_context_parallel_and_sinks_are_refused(megatron):
    from nemo_minitron.errors import EngineError

    with pytest.raises(AssertionError, match="Context parallel"):
        megatron("torch", context_parallel_size=2)
    with pytest.raises(EngineError, match="bias"):
        megatron("torch")(*drawn()[1], None, attention_bias=torch.zeros(1))
    config = copy.copy(megatron("torch").config)
    config.softmax_type = "off-by-one"
    with pytest.raises(EngineError, match="off-by-one"):
        attention.TorchAttention(config, 1, None, "self")


@pytest.mark.parametrize("changes", [{}, {"window_size": (20, 0)}], ids=["causal", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_tensor_is_as_large_as_the_scores(megatron, monkeypatch, changes, dtype):
    monkeypatch.setattr(attention, "BLOCK", 32)
    length, module = 512, megatron("torch", **changes)
    _, inputs = drawn(dtype=dtype, length=length, batch=1)
    with Made() as made:
        module(*inputs, None).sum().backward()
    assert any("flash_attention_for_cpu" in name for name in made.names)
    assert length * HEADS * SIZE <= made.largest < length**2


def test_a_window_hides_what_comes_after_and_what_lies_too_far_before():
    expected = [[column > row or row - column > 2 for column in range(5)] for row in range(5)]
    assert attention.outside(5, 5, 2, torch.device("cpu")).tolist() == expected
    assert attention.outside(1, 5, 2, torch.device("cpu")).tolist() == expected[-1:]
