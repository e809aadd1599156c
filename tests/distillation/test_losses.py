"""Distillation losses against plain float64 arithmetic, ModelOpt's loss, and two ranks against one.

Legend: s sequence, b micro batch, v vocabulary, t tokens, h hidden.
"""

import math
import subprocess
import sys
import types

import pytest
import torch

from nemo_minitron.distillation.layer_pairs import match_layers, outer_pairs
from nemo_minitron.distillation.losses import api as losses
from nemo_minitron.distillation.losses import compiled, divergences, fused
from nemo_minitron.distillation.losses.hidden import cosine_loss, mse_loss, projection
from nemo_minitron.distillation.losses.targets import Dense, Sparse, drawn, largest
from nemo_minitron.errors import ConfigError

S, B, V = 5, 2, 37
BETA = 0.3
OURS = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "jensen_shannon": lambda *logits, **options: losses.jensen_shannon(*logits, beta=BETA, **options),
    "soft_cross_entropy": losses.soft_cross_entropy,
}


def plain(kind, student, teacher, temperature=1.0, beta=BETA):
    """The definition, in float64 by autograd; 0 log 0 = 0."""
    log_p = (teacher.double() / temperature).log_softmax(-1)
    log_q = (student.double() / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))

    def expected(weights, values):
        return torch.where(weights > 0, weights * torch.where(weights > 0, values, 0.0), 0.0).sum(-1)

    return {
        "forward_kl": lambda: expected(p, log_p - log_q),
        "reverse_kl": lambda: expected(q, log_q - log_p),
        "jensen_shannon": lambda: beta * expected(p, log_p - log_m) + (1 - beta) * expected(q, log_q - log_m),
        "soft_cross_entropy": lambda: -expected(p, log_q),
    }[kind]()


def logits(*shape, seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def upstream(*shape, seed=9):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_gradient(loss, weights, *wanted):
    return loss, *torch.autograd.grad((loss * weights.to(loss.dtype)).sum(), wanted)


@pytest.fixture(autouse=True)
def blocks_of_three(monkeypatch):
    """Blocks of three tokens, which divide no number of tokens here."""
    monkeypatch.setattr(divergences, "CPU_BLOCK", 3 * V * 4 // torch.get_num_threads())


@pytest.fixture
def on_expressions(monkeypatch):
    """The passes that a GPU compiles, as graphs that torch.compile captures whole; no compiler is needed for them."""
    monkeypatch.setattr(compiled, "DEVICES", ("cpu",))
    monkeypatch.setattr(compiled, "ELEMENTS", 4 * V)
    calls = []

    def capture(function):
        graph = torch.compile(function, fullgraph=True, backend="eager")
        return lambda *arguments: calls.append(function.__name__) or graph(*arguments)

    monkeypatch.setattr(compiled, "_compiled", capture)
    yield calls
    torch._dynamo.reset()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", OURS)
def test_values_and_gradients_are_those_of_the_definition(kind, dtype, temperature):
    student, teacher = logits(S, B, V, dtype=dtype)
    weights = upstream(S, B)
    ours = value_and_gradient(OURS[kind](student, teacher, temperature=temperature), weights, student)
    reference = value_and_gradient(plain(kind, student, teacher, temperature), weights, student)
    assert ours[0].shape == (S, B) and ours[0].dtype == ours[1].dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    for own, expected in zip(ours, reference):
        torch.testing.assert_close(own, expected.to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "soft_cross_entropy"])
def test_compiled_passes_give_the_definition(on_expressions, kind, dtype, temperature):
    student, teacher = logits(S, B, V, dtype=dtype)
    teacher[1, 0, 3:] = -torch.inf
    weights = upstream(S, B)
    weights[0] = 0.0
    if kind == "reverse_kl":
        student.detach()[1, 0, 3:] = -torch.inf
    ours = value_and_gradient(OURS[kind](student, teacher, temperature=temperature), weights, student)
    reference = value_and_gradient(plain(kind, student, teacher, temperature), weights, student)
    assert on_expressions == ["sums"] * 3 + ["gradient"] * 3
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2**-7, "atol": 1e-5}
    finite = reference[1].isfinite()
    torch.testing.assert_close(ours[0].double(), reference[0], **tolerance)
    torch.testing.assert_close(ours[1].double()[finite], reference[1].double()[finite], **tolerance)
    assert (ours[1][0] == 0).all() and ours[1].isfinite().all()


def test_the_fused_loss_with_compiled_passes_is_that_of_the_loops(monkeypatch, request):
    inputs, labels, kd_weights, lm_weights = layers()
    options = {"labels": labels, "kd_weights": kd_weights, "chunk_tokens": 6}

    def losses_and_gradients(**more):
        loss = fused_loss_of(inputs, **options, **more)
        return loss.kd, loss.lm, *torch.autograd.grad(loss.total, inputs[:2])

    expected = [losses_and_gradients(), losses_and_gradients(lm_weights=lm_weights)]
    calls = request.getfixturevalue("on_expressions")
    torch.testing.assert_close([losses_and_gradients(), losses_and_gradients(lm_weights=lm_weights)], expected)
    assert "gradient" in calls


@pytest.mark.parametrize("works_until", [0, 1, 4])
def test_the_loops_go_on_where_compiling_ends(on_expressions, monkeypatch, caplog, works_until):
    """Also where the gradient has already been written over some of the logits."""
    student, teacher = logits(11, V)
    weights = upstream(11)
    reference = value_and_gradient(plain("forward_kl", student, teacher), weights, student)
    graph, calls = compiled._compiled, []

    def breaks(function):
        calls.append(function)
        if len(calls) > works_until:
            raise RuntimeError("no compiler here")
        return graph(function)

    monkeypatch.setattr(compiled, "_compiled", breaks)
    monkeypatch.setattr(compiled, "_failed", set())
    value = losses.forward_kl(student * 1.0, teacher, overwrite_student=True)
    torch.testing.assert_close(value, reference[0])
    torch.testing.assert_close(torch.autograd.grad((value * weights).sum(), student)[0], reference[1])
    assert len(calls) == works_until + 1 and not compiled.compiles(student.device, "forward_kl")


@pytest.mark.parametrize("kind", OURS)
def test_gradcheck(kind):
    student, teacher = logits(4, 7)
    assert torch.autograd.gradcheck(lambda student: OURS[kind](student, teacher, temperature=1.5), student)
    kept = losses.top_k(teacher, 3)
    assert torch.autograd.gradcheck(lambda student: losses.top_k_forward_kl(student, kept, temperature=1.5), student)


@pytest.mark.parametrize("kind", OURS)
def test_bf16_logits_lose_no_more_than_the_gradients_rounding(kind):
    student, teacher = logits(S, B, V, dtype=torch.bfloat16)
    weights = upstream(S, B)
    value, gradient = value_and_gradient(OURS[kind](student, teacher), weights, student)
    reference = value_and_gradient(plain(kind, student, teacher), weights, student)
    assert value.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value, reference[0].float(), rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(gradient, reference[1].to(torch.bfloat16), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(kind, dtype):
    student, _ = logits(S, V, dtype=dtype)
    value = OURS[kind](student, student.detach().clone(), temperature=0.7)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    exact = 0.0 if kind != "jensen_shannon" else 1e-6
    assert value.abs().max() <= exact and gradient.abs().max() <= exact


@pytest.mark.parametrize("kind", OURS)
def test_t_squared_is_a_choice(kind):
    student, teacher = logits(S, V)
    scaled = OURS[kind](student, teacher, temperature=3.0, times_t_squared=True)
    bare = OURS[kind](student, teacher, temperature=3.0)
    torch.testing.assert_close(scaled, 9 * bare)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), student)[0] for loss in (scaled, 9 * bare)))


def test_jensen_shannon_has_the_kls_as_limits():
    student, teacher = logits(S, V, scale=1.0)
    torch.testing.assert_close(losses.jensen_shannon(student, teacher, 0), losses.forward_kl(student, teacher))
    torch.testing.assert_close(losses.jensen_shannon(student, teacher, 1), losses.reverse_kl(student, teacher))
    near_0, near_1 = (losses.jensen_shannon(student, teacher, beta) for beta in (1e-7, 1 - 1e-7))
    torch.testing.assert_close(near_0 / 1e-7, losses.forward_kl(student, teacher), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(near_1 / 1e-7, losses.reverse_kl(student, teacher), rtol=1e-3, atol=1e-3)
    even = losses.jensen_shannon(student, teacher, 0.5)
    torch.testing.assert_close(even, losses.jensen_shannon(teacher, student, 0.5))
    assert (even < torch.log(torch.tensor(2.0))).all()


@pytest.mark.parametrize(
    "kind, options", [("forward", {}), ("jensen_shannon", {"beta": 1.5}), ("forward_kl", {"temperature": 0.0})]
)
def test_a_wrong_divergence_is_refused(kind, options):
    student, teacher = logits(S, V)
    with pytest.raises(ConfigError, match="distillation loss"):
        losses.divergence(student, teacher, kind, **options)


def test_logits_of_different_shapes_are_refused():
    student, teacher = logits(S, V)
    with pytest.raises(ValueError, match="differ in shape"):
        losses.forward_kl(student, teacher[:, 1:])


@pytest.mark.parametrize("kind", OURS)
def test_huge_logits_and_temperatures(kind):
    """Differences of 1e4, and distributions next to uniform, in float32."""
    for scale, temperature in ((1e4, 1.0), (1e4, 300.0), (1.0, 1e4)):
        student, teacher = logits(S, V, scale=scale, dtype=torch.float32)
        ours = value_and_gradient(OURS[kind](student, teacher, temperature=temperature), torch.ones(S), student)
        expected = value_and_gradient(plain(kind, student, teacher, temperature), torch.ones(S), student)
        largest = expected[1].abs().max().clamp(min=3e-5 / temperature)
        torch.testing.assert_close(ours[0], expected[0].float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[1] / largest, expected[1] / largest, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", OURS)
def test_entries_without_probability(kind):
    """-inf in the teacher, in both; a whole block and single entries."""
    student, teacher = (tensor.detach() for tensor in logits(S, V))
    teacher[1, 3:9] = -torch.inf
    teacher[2, :-1] = -torch.inf
    student[1, 5:8] = -torch.inf
    student.requires_grad_()
    value, gradient = value_and_gradient(OURS[kind](student, teacher), torch.ones(S), student)
    torch.testing.assert_close(value, plain(kind, student, teacher))
    if kind == "reverse_kl":
        assert value[1:3].isinf().all() and value[[0, 3, 4]].isfinite().all()
        return
    assert value.isfinite().all() and gradient.isfinite().all()
    assert (gradient[1, 5:8] == 0).all()
    finite, floor = student.detach().clamp(min=-1e5).requires_grad_(), teacher.clamp(min=-1e5)
    (expected,) = torch.autograd.grad(plain(kind, finite, floor).sum(), finite)
    torch.testing.assert_close(gradient, expected)


def test_what_only_the_student_rules_out_costs_infinitely_much():
    student, teacher = (tensor.detach() for tensor in logits(S, V))
    student[0, 2] = -torch.inf
    teacher[1] = -torch.inf
    value = losses.forward_kl(student, teacher)
    assert value[0] == torch.inf and value[1].isnan() and value[2:].isfinite().all()


def test_masked_tokens_count_for_nothing():
    student, teacher = (tensor.detach() for tensor in logits(S, B, V))
    student[0, 1], teacher[2, 0] = torch.nan, -torch.inf
    student.requires_grad_()
    mask = torch.ones(S, B)
    mask[0, 1] = mask[2, 0] = mask[4, 1] = 0
    mean = losses.masked_mean(losses.forward_kl(student, teacher), mask)
    kept = mask.bool()
    torch.testing.assert_close(mean, plain("forward_kl", student[kept], teacher[kept]).mean())
    (gradient,) = torch.autograd.grad(mean, student)
    assert (gradient[~kept] == 0).all() and (gradient[kept] != 0).any(-1).all()


def test_a_fully_masked_batch_has_no_loss():
    student, teacher = logits(S, B, V)
    mean = losses.masked_mean(losses.forward_kl(student, teacher), torch.zeros(S, B, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(mean, student)
    assert mean == 0 and (gradient == 0).all()


def test_evaluation_keeps_no_graph_and_any_layout_is_read():
    student, teacher = logits(B, S, V)
    with torch.no_grad():
        assert not losses.forward_kl(student, teacher).requires_grad
    turned = student.transpose(0, 1)
    weights = upstream(S, B)
    ours = value_and_gradient(losses.forward_kl(turned, teacher.transpose(0, 1)), weights, student)
    reference = value_and_gradient(plain("forward_kl", turned, teacher.transpose(0, 1)), weights, student)
    for own, expected in zip(ours, reference):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*OURS, "top_k"])
def test_the_gradient_may_take_the_logits_place(kind, dtype):
    student, teacher = logits(S, B, V, dtype=dtype)
    loss = OURS.get(kind) or (
        lambda student, teacher, **o: losses.top_k_forward_kl(student, losses.top_k(teacher, 4), **o)
    )
    weights = upstream(S, B)
    beside = value_and_gradient(loss(student, teacher), weights, student)
    over = value_and_gradient(loss(student, teacher, overwrite_student=True), weights, student)
    assert torch.equal(over[0], beside[0]) and torch.equal(over[1], beside[1])
    assert over[1].data_ptr() == student.data_ptr()


def test_overwritten_logits_are_not_read_unnoticed():
    leaf, teacher = logits(S, V)
    student = leaf * 1
    total = student.square().sum() + losses.forward_kl(student, teacher, overwrite_student=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_is_the_kl_to_the_renormalised_distribution(temperature):
    student, teacher = logits(S, B, V)
    weights = upstream(S, B)
    for k in (1, 5, V):
        kept = losses.top_k(teacher, k)
        restricted = torch.full_like(teacher, -torch.inf).scatter(-1, kept.entries, kept.values)
        ours = value_and_gradient(losses.top_k_forward_kl(student, kept, temperature=temperature), weights, student)
        reference = value_and_gradient(plain("forward_kl", student, restricted, temperature), weights, student)
        for own, expected in zip(ours, reference):
            torch.testing.assert_close(own, expected)
    torch.testing.assert_close(ours[0], losses.forward_kl(student, teacher, temperature=temperature))
    with pytest.raises(ConfigError, match=f"vocabulary of {V}"):
        losses.top_k(teacher, V + 1)


def test_mixing_with_the_language_model_loss():
    kd, lm = torch.tensor(2.0), torch.tensor(4.0)
    assert losses.mixed(kd, lm, 1.0) == 2 and losses.mixed(kd, lm, 0.0) == 4 and losses.mixed(kd, lm, 0.25) == 3.5
    with pytest.raises(ConfigError, match="alpha = 2"):
        losses.mixed(kd, lm, 2)


def test_the_dynamic_scale_lifts_the_intermediate_loss_to_the_logits_loss():
    kd, states = torch.tensor(2.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    scale = losses.dynamic_scale(kd, states)
    assert scale == 4 and not scale.requires_grad
    assert losses.dynamic_scale(kd, states, running=torch.tensor(8.0), decay=0.75) == 7
    assert losses.dynamic_scale(kd, torch.tensor(0.0)) == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_equals_modelopts_loss(kind, temperature):
    from nemo.collections.llm.modelopt.distill.loss import LogitsKLLoss

    student, teacher = logits(S, B, V, dtype=torch.float32)
    config = types.SimpleNamespace(tensor_model_parallel_size=1)
    theirs = LogitsKLLoss(config, temperature=temperature, reverse=kind == "reverse_kl")
    weights = upstream(S, B)
    ours = value_and_gradient(OURS[kind](student, teacher, temperature=temperature), weights, student)
    expected = value_and_gradient(theirs(student, teacher)[0].transpose(0, 1), weights, student)
    for own, other in zip(ours, expected):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


H, G, T = 6, 8, 11


def layers(dtype=torch.float64, tokens=T):
    """Hidden states and output weights of both, labels (one token has none), weights of both losses."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = (random(tokens, H).requires_grad_(), random(V, H).requires_grad_(), random(tokens, G), random(V, G))
    labels = torch.randint(0, V, (tokens,), generator=generator)
    labels[4] = -100
    kd_weights, lm_weights = torch.rand(2, tokens, generator=generator, dtype=torch.float64)
    kd_weights[2] = lm_weights[5] = 0
    return inputs, labels, kd_weights, lm_weights


def fused_loss_of(inputs, **options):
    return fused.fused_divergence(*inputs[:2], [Dense(*inputs[2:])], **options)


def plain_output(inputs, labels, kind, temperature):
    """Divergence and cross entropy of each token, float64 by autograd."""
    hidden, weight, teacher_hidden, teacher_weight = (tensor.double() for tensor in inputs)
    student, teacher = hidden @ weight.t(), teacher_hidden @ teacher_weight.t()
    lm = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    return plain(kind, student, teacher, temperature), lm


@pytest.mark.parametrize("trained", [True, False], ids=["lm trained", "lm shown"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind, chunk", [*((kind, 4) for kind in OURS), ("forward_kl", None), ("forward_kl", 1)])
def test_the_fused_loss_is_output_layer_and_loss(kind, chunk, temperature, trained):
    inputs, labels, kd_weights, lm_weights = layers()
    options = {"lm_weights": lm_weights} if trained else {}
    fused_loss = fused_loss_of(
        inputs, kind=kind, beta=BETA, temperature=temperature, kd_weights=kd_weights, labels=labels,
        chunk_tokens=chunk, **options,
    )  # fmt: skip
    kd, lm = plain_output(inputs, labels, kind, temperature)
    kd_sum, lm_sum = (kd * kd_weights).sum(), (lm * lm_weights).sum() * trained
    for own, expected in zip(fused_loss, (kd_sum + lm_sum, kd_sum, lm_sum, kd, lm)):
        torch.testing.assert_close(own, expected.to(own.dtype))
    assert not any(part.requires_grad for part in fused_loss[1:])
    ours = torch.autograd.grad(-3 * fused_loss.total, inputs[:2])
    for own, expected in zip(ours, torch.autograd.grad(-3 * (kd_sum + lm_sum), inputs[:2])):
        torch.testing.assert_close(own, expected)
    assert trained or (ours[0][2] == 0).all()


def test_the_fused_loss_in_float32_and_bf16():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        inputs, labels, kd_weights, lm_weights = layers(dtype)
        fused_loss = fused_loss_of(inputs, kd_weights=kd_weights, labels=labels, lm_weights=lm_weights, chunk_tokens=4)
        kd, lm = plain_output(inputs, labels, "forward_kl", 1.0)
        total = (kd * kd_weights).sum() + (lm * lm_weights).sum()
        torch.testing.assert_close(fused_loss.total, total.float(), rtol=tolerance, atol=0.0)
        reference = torch.autograd.grad(total, inputs[:2])
        for own, expected in zip(torch.autograd.grad(fused_loss.total, inputs[:2]), reference):
            assert own.dtype == dtype
            assert (own.double() - expected.double()).norm() < tolerance * expected.double().norm()


def test_the_fused_loss_gives_what_is_wanted_and_no_more():
    inputs, labels, _, lm_weights = layers()
    frozen = (inputs[0], inputs[1].detach(), *inputs[2:])
    fused_loss = fused_loss_of(frozen, chunk_tokens=4)
    torch.testing.assert_close(fused_loss.kd_sum, fused_loss.kd.sum())
    expected = torch.autograd.grad(plain_output(inputs, labels, "forward_kl", 1.0)[0].sum(), inputs[0])
    torch.testing.assert_close(torch.autograd.grad(fused_loss.total, inputs[0]), expected)
    assert fused_loss.lm is None and fused_loss.lm_sum == 0
    labels[1] = V
    assert fused_loss_of(inputs, labels=labels).lm[1] == torch.inf
    with pytest.raises(ValueError, match="lm_weights without labels"):
        fused_loss_of(inputs, lm_weights=lm_weights)
    with pytest.raises(ValueError, match="do not fit"):
        fused_loss_of((inputs[0].float(), *inputs[1:]))
    with pytest.raises(ValueError, match="tokens and vocabulary"):
        fused_loss_of((*inputs[:2], inputs[2][1:], inputs[3]))
    with pytest.raises(ValueError, match=r"kd_weights \[10\] must be \[11\]"):
        fused_loss_of(inputs, kd_weights=torch.ones(T - 1))


def test_the_fused_evaluation_works_out_no_gradient(monkeypatch):
    inputs, *_ = layers()
    expected = fused_loss_of(inputs)
    monkeypatch.setattr(fused, "scaled_gradient", None)
    with torch.no_grad():
        fused_loss = fused_loss_of(inputs)
    assert torch.equal(fused_loss.kd, expected.kd) and not fused_loss.total.requires_grad


def test_a_masked_token_may_hold_anything_in_the_fused_loss():
    inputs, labels, kd_weights, _ = layers()
    expected = fused_loss_of(inputs, kd_weights=kd_weights, chunk_tokens=4)
    inputs[2][2] = torch.nan
    fused_loss = fused_loss_of(inputs, kd_weights=kd_weights, chunk_tokens=4)
    torch.testing.assert_close(fused_loss[:2], expected[:2])
    gradients = [torch.autograd.grad(loss.total, inputs[:2]) for loss in (fused_loss, expected)]
    torch.testing.assert_close(*gradients)


def test_a_fully_masked_fused_batch_has_no_loss():
    inputs, labels, _, _ = layers()
    nothing = torch.zeros(T)
    fused_loss = fused_loss_of(inputs, kd_weights=nothing, labels=labels, lm_weights=nothing, chunk_tokens=4)
    assert fused_loss.total == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(fused_loss.total, inputs[:2]))


def test_backward_twice_through_the_fused_loss_is_refused():
    inputs, *_ = layers()
    total = fused_loss_of(inputs).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


PARALLEL_V, RANKS = 38, 2


def parallel_cases(group, part):
    """Every form on this rank's part of the vocabulary (`part` cuts the last axis): name -> values and gradients."""
    weights, results = upstream(S, B), {}
    for dtype in (torch.float64, torch.float32):
        student, teacher = logits(S, B, PARALLEL_V, dtype=dtype)
        teacher[0, 0, PARALLEL_V // RANKS :] = -torch.inf  # all that one rank has
        own = part(student.detach()).clone().requires_grad_()
        for kind, loss in OURS.items():
            if kind == "reverse_kl":
                teacher = teacher.clamp(min=-50.0)
            value = loss(own, part(teacher), temperature=1.5, group=group)
            results[kind, dtype] = value_and_gradient(value, weights, own)
        kept = losses.top_k(part(teacher), 5, group=group)
        results["kept", dtype] = kept
        value = losses.top_k_forward_kl(own, kept, temperature=1.5, group=group)
        results["top_k", dtype] = value_and_gradient(value, weights, own)
        for name, sparse in sparse_teachers(teacher.flatten(0, 1).double()).items():
            sparse = Sparse(*(None if part is None else part.unflatten(0, (S, B)) for part in sparse[:4]))
            value = losses.sparse_divergence(own, sparse, group=group)
            results[name, dtype] = value_and_gradient(value, weights, own)
        mixed = losses.mixture([part(teacher), part(student.detach())], [1.0, 3.0], temperature=1.5, group=group)
        results["mixture", dtype] = (mixed, mixed)
    generator = torch.Generator().manual_seed(5)
    states = [torch.randn(T, width, generator=generator, dtype=torch.float64) for width in (H, G)]
    outputs = [torch.randn(PARALLEL_V, width, generator=generator, dtype=torch.float64) for width in (H, G)]
    labels = torch.randint(0, PARALLEL_V, (T,), generator=generator)
    own, other = (part(output.t()).t().contiguous() for output in outputs)
    dense, sparse = Dense(states[1], other), [*sparse_teachers(states[1] @ outputs[1].t()).values()]
    several = {"teachers": [dense, dense._replace(hidden=-states[1], share=2.0)], "sparse": sparse}
    for reduce, given in (
        (True, {"teachers": [dense], "temperature": 1.5}), (False, {"teachers": [dense], "temperature": 1.5}),
        ("several", several), ("sparse", {"sparse": sparse}),
    ):  # fmt: skip
        hidden, weight = states[0].clone().requires_grad_(), own.clone().requires_grad_()
        result = fused.fused_divergence(
            hidden, weight, labels=labels, lm_weights=torch.full((T,), 0.5), group=group,
            reduce_hidden_grad=bool(reduce), chunk_tokens=4, **given,
        )  # fmt: skip
        grad_hidden, grad_weight = torch.autograd.grad(2 * result.total, (hidden, weight))
        results["fused", reduce] = (*result, grad_weight.t(), grad_hidden)
    return results


def sparse_teachers(whole):
    return {"drawn": drawn(whole, 9, torch.Generator().manual_seed(2)), "largest": largest(whole, 5)}


def one_rank(rank, folder):
    torch.set_num_threads(1)
    divergences.CPU_BLOCK = 3 * V * 4
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    group = torch.distributed.new_group(range(RANKS))
    results = parallel_cases(group, lambda tensor: tensor.chunk(RANKS, dim=-1)[rank])
    torch.save({**results, "collectives": collectives(group)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def collectives(group):
    """How many all-reduces forward KL takes, forward and backward, over several blocks."""
    calls, all_reduce = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *arguments, **options: calls.append(1) or all_reduce(*arguments, **options)
    student, teacher = logits(S, B, V)
    losses.forward_kl(student, teacher, group=group).sum().backward()
    torch.distributed.all_reduce = all_reduce
    return len(calls)


def test_two_ranks_that_share_the_vocabulary_equal_one(tmp_path):
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=RANKS)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    assert [part["collectives"] for part in parts] == [2, 2]
    for name, whole in parallel_cases(None, lambda tensor: tensor).items():
        tolerance = 3e-6 if name[1] == torch.float32 else 1e-12
        shared = [part[name] for part in parts]
        split = {"kept": (), "fused": (5,), "mixture": (0, 1)}.get(name[0], (1,))
        for index, expected in enumerate(whole):
            own = [values[index] for values in shared]
            if index in split:
                own = [torch.cat(own, dim=-1)]
            elif name == ("fused", False) and index == 6:
                own = [sum(own)]
            for value in own:
                torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


def test_hidden_state_losses():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(S, B, H, generator=generator).bfloat16().requires_grad_()
    teacher = torch.randn(S, B, G, generator=generator).bfloat16()
    fit = projection(H, G, dtype=torch.bfloat16)
    assert fit.bias is None and fit.weight.shape == (G, H)
    wide = fit(student).double()
    product = (wide * teacher.double()).sum(-1) / (wide.norm(dim=-1) * teacher.double().norm(dim=-1))
    pairs = ((cosine_loss, 1 - product), (mse_loss, (wide - teacher.double()).pow(2).mean(-1)))
    for loss, expected in pairs:
        value = loss(student, teacher, fit)
        torch.testing.assert_close(value, expected.float())
        ours = torch.autograd.grad(value.sum(), (student, fit.weight))
        reference = torch.autograd.grad(expected.sum(), (student, fit.weight), retain_graph=True)
        for own, other in zip(ours, reference):
            torch.testing.assert_close(own, other, rtol=2e-2, atol=2e-2)
        assert loss(teacher, teacher, projection(G, G)).abs().max() < 1e-6
    with pytest.raises(ValueError, match="a projection is needed"):
        cosine_loss(student, teacher)


@pytest.mark.parametrize(
    "teacher, student, options, expected",
    [
        (4, 4, {}, [(1, 1), (2, 2), (3, 3), (4, 4)]),
        (32, 4, {}, [(1, 8), (2, 16), (3, 24), (4, 32)]),
        (5, 2, {}, [(1, 3), (2, 5)]),
        (7, 1, {}, [(1, 7)]),
        (6, 4, {"drop_layers": [4, 2]}, [(1, 1), (2, 3), (3, 5), (4, 6)]),
        (4, 2, {"drop_layers": range(2, 4)}, [(1, 1), (2, 4)]),
        (6, 4, {"pairs": [(4, 6), (0, 0), (2, 3)]}, [(0, 0), (2, 3), (4, 6)]),
    ],
)
def test_layers_that_go_together(teacher, student, options, expected):
    assert match_layers(teacher, student, **options) == expected


def test_layers_of_every_student_are_distinct_and_end_together():
    for teacher in range(1, 20):
        for student in range(1, teacher + 1):
            numbers = [pair[1] for pair in match_layers(teacher, student)]
            assert numbers == sorted(set(numbers)) and numbers[-1] == teacher and numbers[0] >= 1
    assert outer_pairs(32, 16) == [(0, 0), (16, 32)]


@pytest.mark.parametrize(
    "teacher, student, options, message",
    [
        (4, 6, {}, "6 layers cannot come from a teacher of 4"),
        (6, 4, {"drop_layers": [2]}, "6 layers - 1 dropped = 5, not 4"),
        (6, 4, {"drop_layers": [0, 7]}, "names layer 7; the teacher has 1 to 6"),
        (6, 4, {"drop_layers": [2, 2]}, "names a layer twice"),
        (6, 4, {"pairs": []}, "no pair"),
        (6, 4, {"pairs": [(1, 2, 3)]}, "is no pair of layers"),
        (6, 4, {"pairs": [(5, 6)]}, "the student has no layer 5; 0 (embeddings) to 4"),
        (6, 4, {"pairs": [(1, 7)]}, "the teacher has no layer 7"),
        (6, 4, {"pairs": [(1, 1), (1, 2)]}, "the student's layer 1 is in 2 pairs"),
        (6, 4, {"pairs": [(1, 3), (2, 2)]}, "(1, 3) and (2, 2) cross"),
    ],
)
def test_layers_that_cannot_go_together(teacher, student, options, message):
    with pytest.raises(ConfigError) as error:
        match_layers(teacher, student, **options)
    assert message in str(error.value)


def test_importing_the_losses_does_not_import_torch():
    code = "import sys, nemo_minitron.distillation.losses.api, nemo_minitron.distillation.losses.hidden; "
    code += "import nemo_minitron.distillation.losses.targets; "
    code += "import nemo_minitron.distillation.layer_pairs as i; "
    code += "i.match_layers(4, 2); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
