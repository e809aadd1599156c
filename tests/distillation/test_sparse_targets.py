"""What is kept of teachers' distributions, and losses on it and on mixtures, against plain float64 arithmetic.

Legend: t tokens, v vocabulary, h hidden (student's), g hidden (teacher's), k entries kept.
"""

import pytest
import torch
from test_losses import (
    BETA,
    OURS,
    G,
    T,
    V,
    layers,
    logits,
    on_expressions,  # noqa: F401, a fixture
    plain,
    upstream,
    value_and_gradient,
)

from nemo_minitron.distillation.losses import api as losses
from nemo_minitron.distillation.losses import divergences, fused, targets
from nemo_minitron.distillation.losses.targets import Dense, Sparse, drawn, joined, largest
from nemo_minitron.errors import ConfigError


@pytest.fixture(autouse=True)
def blocks_of_three(monkeypatch):
    """Blocks of three tokens, which divide no number of tokens here."""
    monkeypatch.setattr(divergences, "CPU_BLOCK", 3 * V * 4 // torch.get_num_threads())
    monkeypatch.setattr(targets, "BLOCK", 3 * V * 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def teacher_logits(tokens=T, seed=1):
    return torch.randn(tokens, V, generator=seeded(seed), dtype=torch.float64) * 2


def dense_p(teacher):
    """The probabilities [t, v] of a Sparse's entries."""
    p = torch.zeros(len(teacher.entries), V, dtype=torch.float64)
    return p.scatter_add(1, teacher.entries, teacher.probabilities.double())


def plain_sparse(student, teacher):
    """The definitions, in float64 by autograd."""
    q, p = student.double().softmax(-1), dense_p(teacher)
    if teacher.rest is None:
        return -(p * q.log()).sum(-1) - teacher.entropy.double()
    others = torch.where(p > 0, 0.0, q).sum(-1)
    kept = torch.where(p > 0, p * (p.clamp(min=1e-300) / q).log(), 0.0).sum(-1)
    rest = teacher.rest.double()
    return kept + torch.where(rest > 0, rest * (rest.clamp(min=1e-300) / others.clamp(min=1e-300)).log(), 0.0)


@pytest.mark.parametrize("stratified", [True, False])
def test_draws_are_those_of_the_distribution(stratified):
    z = teacher_logits()
    z[1, 3:30] = -torch.inf
    z[2, 1:] = -torch.inf
    z[3] = z[3].roll(5) * 20
    n = 20_000
    kept, p = drawn(z, n, seeded(), stratified=stratified), z.softmax(-1)
    own = dense_p(kept)
    torch.testing.assert_close(own.sum(-1), torch.ones(T, dtype=torch.float64), rtol=1e-6, atol=0.0)
    assert ((own - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-6).all() and (p[own > 0] > 0).all()
    assert (own * n - (own * n).round()).abs().max() < 1e-2
    assert ((own - p).abs() * n < 2.01).all() == stratified
    torch.testing.assert_close(kept.entropy, torch.distributions.Categorical(p).entropy().float())
    used = kept.probabilities > 0
    assert (kept.entries[:, 1:] > kept.entries[:, :-1])[used[:, 1:]].all() and kept.rest is None
    assert used.sum(-1)[2] == 1 and kept.entries.shape == used.shape and used.any(0).all()


def test_draws_depend_on_the_seed_alone(monkeypatch):
    z = teacher_logits()
    first = drawn(z, 8, seeded(4))
    monkeypatch.setattr(targets, "BLOCK", 1 << 20)
    for again in (drawn(z, 8, seeded(4)), drawn(z.float(), 8, seeded(4))):
        assert torch.equal(again.entries, first.entries) and torch.equal(again.probabilities, first.probabilities)
    fewer, other = drawn(z[:5], 8, seeded(4)), drawn(z, 8, seeded(5))
    assert torch.equal(dense_p(fewer), dense_p(first)[:5]) and not torch.equal(dense_p(other), dense_p(first))
    assert first.entries.dtype == torch.int64 and first.probabilities.dtype == first.entropy.dtype == torch.float32
    assert drawn(z[:0], 8, seeded()).entries.shape == (0, 1)
    with pytest.raises(ConfigError, match="draws = 0 must be at least 1"):
        drawn(z, 0, seeded())


def test_a_draw_at_the_very_end_has_probability(monkeypatch):
    z = teacher_logits()
    z[:, 20:] = -torch.inf
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64).expand(T, 2)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: ends)
    assert (dense_p(drawn(z, 2, seeded())).nonzero()[:, 1].view(T, 2) == torch.tensor([0, 19])).all()


def test_the_largest_and_their_rest():
    z = teacher_logits()
    z[0], z[0, 7] = -40.0, 0.0
    p = z.softmax(-1)
    for k in (1, 4, V):
        kept = largest(z, k)
        values, entries = p.topk(k)
        torch.testing.assert_close(kept.probabilities, values.float())
        assert torch.equal(dense_p(kept) > 0, torch.zeros_like(p).scatter(1, kept.entries, 1.0) > 0)
        beyond = p.sort(dim=-1, descending=True).values[:, k:].sum(-1)
        torch.testing.assert_close(kept.rest, beyond.float(), rtol=1e-6, atol=0.0)
        torch.testing.assert_close(kept.entropy, torch.distributions.Categorical(p).entropy().float())
    assert (kept.rest == 0).all() and largest(z[:1], 1).rest > 0
    with pytest.raises(ConfigError, match=f"vocabulary of {V}"):
        largest(z, V + 1)


def kept_of(name, seed=1):
    z = teacher_logits(seed=seed)
    return drawn(z, 9, seeded(seed)) if name == "drawn" else largest(z, {"largest": 5, "all": V}[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["drawn", "largest", "all"])
def test_the_loss_on_kept_entries_is_that_of_the_definition(name, dtype):
    student, _ = logits(T, V, dtype=dtype)
    teacher, weights = kept_of(name), upstream(T)
    weights[3] = 0
    ours = value_and_gradient(losses.sparse_divergence(student, teacher), weights, student)
    reference = value_and_gradient(plain_sparse(student, teacher), weights, student)
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32) and ours[1].dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(ours[0].double(), reference[0], rtol=tolerance, atol=tolerance)
    rounding = 2**-7 if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(ours[1].double(), reference[1].double(), rtol=rounding, atol=tolerance)
    soft = losses.sparse_divergence(student, teacher, "soft_cross_entropy")
    torch.testing.assert_close(soft, ours[0] + teacher.entropy.to(soft.dtype))
    over = value_and_gradient(losses.sparse_divergence(student, teacher, overwrite_student=True), weights, student)
    assert torch.equal(over[1], ours[1]) and over[1].data_ptr() == student.data_ptr()


@pytest.mark.parametrize("name", ["drawn", "largest"])
def test_gradcheck_of_kept_entries(name):
    student, _ = logits(T, V)
    teacher = kept_of(name)
    assert torch.autograd.gradcheck(lambda student: losses.sparse_divergence(student, teacher), student)


def test_a_student_that_leaves_the_rest_next_to_nothing():
    """1 - sum q down to 1e-87 and to nothing, in float32, with and without a rest of the teacher's."""
    teacher = kept_of("largest")
    student = torch.zeros(T, V).scatter(1, teacher.entries, torch.linspace(0, 200, T).unsqueeze(-1).expand(T, 5))
    student[:, 0] += 0.5
    teacher.rest[::2] = 0.0
    exact = student.double().requires_grad_()
    ours = value_and_gradient(losses.sparse_divergence(student.requires_grad_(), teacher), torch.ones(T), student)
    reference = value_and_gradient(plain_sparse(exact, teacher), torch.ones(T), exact)
    torch.testing.assert_close(ours[0].double(), reference[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1].double(), reference[1], rtol=1e-5, atol=1e-6)
    shut = student.detach().masked_fill(dense_p(teacher) == 0, -torch.inf).requires_grad_()
    value, gradient = value_and_gradient(losses.sparse_divergence(shut, teacher), torch.ones(T), shut)
    assert value[::2].isfinite().all() and (value[1::2] == torch.inf).all() and gradient[::2].isfinite().all()


def test_a_student_like_its_teacher_has_next_to_no_loss():
    z = teacher_logits().float().requires_grad_()
    value = losses.sparse_divergence(z, largest(z, 5))
    assert value.abs().max() < 2e-6 and torch.autograd.grad(value.sum(), z)[0].abs().max() < 1e-6


def test_the_largest_bound_the_kl_from_below():
    student, _ = logits(T, V)
    z = teacher_logits()
    bounds = torch.stack([losses.sparse_divergence(student, largest(z, k)) for k in (1, 5, 20, V)])
    kl = plain("forward_kl", student, z)
    assert (bounds.diff(dim=0) > -1e-6).all() and (bounds[0] < kl).all()
    torch.testing.assert_close(bounds[-1], kl, rtol=1e-6, atol=1e-6)


def test_places_that_are_not_used_count_for_nothing():
    student, _ = logits(T, V)
    for name in ("drawn", "largest"):
        kept = kept_of(name)
        nothing = torch.zeros(T, 2, dtype=torch.int64)
        padded = kept._replace(
            entries=torch.cat((nothing, kept.entries), 1),
            probabilities=torch.cat((nothing.float(), kept.probabilities), 1),
        )
        pairs = [
            value_and_gradient(losses.sparse_divergence(student, one), upstream(T), student) for one in (kept, padded)
        ]
        torch.testing.assert_close(*pairs)


@pytest.mark.parametrize("name", ["drawn", "largest"])
def test_joined_samples_are_as_each_is(name):
    z = teacher_logits()
    parts = (
        [drawn(z[:4], 3, seeded()), drawn(z[4:], 40, seeded())]
        if name == "drawn"
        else [largest(z[:4], 2), largest(z[4:], 6)]
    )
    whole = joined(parts)
    assert torch.equal(dense_p(whole), torch.cat([dense_p(part) for part in parts])) and whole.share == 1
    student, _ = logits(T, V)
    each = torch.cat([losses.sparse_divergence(s, part) for s, part in zip(student.split([4, T - 4]), parts)])
    torch.testing.assert_close(losses.sparse_divergence(student, whole), each)
    with pytest.raises(ValueError, match="cannot be joined"):
        joined([drawn(z, 3, seeded()), largest(z, 3)])


def test_an_entry_outside_the_vocabulary_costs_infinitely_much():
    student, _ = logits(T, V)
    kept = kept_of("largest")
    kept.entries[1, 2], kept.entries[2, 3] = V, -1
    value = losses.sparse_divergence(student, kept)
    assert (value[1:3] == torch.inf).all() and value[[0, *range(3, T)]].isfinite().all()


@pytest.mark.parametrize("stratified", [True, False])
def test_draws_are_unbiased_and_the_largest_are_not(stratified):
    """The mean over draws comes within its standard error of the exact loss and gradient; the k largest stay off."""
    count, z = 4000, teacher_logits(1)
    student, _ = logits(1, V)
    many = student.detach().expand(count, V).contiguous().requires_grad_()
    exact = value_and_gradient(plain("forward_kl", student, z), torch.ones(1), student)
    ours = value_and_gradient(
        losses.sparse_divergence(many, drawn(z.expand(count, V), 8, seeded(), stratified=stratified)),
        torch.ones(count),
        many,
    )
    for own, expected in zip(ours, exact):
        error = own.std(dim=0) / count**0.5
        assert ((own.mean(dim=0) - expected[0]).abs() < 4 * error + 1e-6).all()
    bias = value_and_gradient(losses.sparse_divergence(student, largest(z, 8)), torch.ones(1), student)
    assert abs(bias[0] - exact[0]) > 20 * ours[0].std() / count**0.5
    assert (bias[1] - exact[1]).norm() > 5 * (ours[1].mean(dim=0) - exact[1][0]).norm()


SHARES = (0.5, 1.5)


def several(dtype=torch.float64):
    """Two dense teachers of different widths, and their logits."""
    dense = []
    for seed, (width, share) in enumerate(zip((G, G + 3), SHARES)):
        states = [torch.randn(n, width, generator=seeded(10 * seed + n), dtype=torch.float64).to(dtype) for n in (T, V)]
        dense.append(Dense(*states, share))
    return dense, [(one.hidden.double() @ one.weight.double().t()) for one in dense]


def plain_mixture(teachers, shares, temperature=1.0):
    p = sum(share * (z / temperature).softmax(-1) for z, share in zip(teachers, shares)) / sum(shares)
    return temperature * p.log()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", OURS)
def test_several_teachers_are_their_mixture(kind, temperature):
    inputs, labels, kd_weights, lm_weights = layers()
    dense, teachers = several()
    options = {"kind": kind, "beta": BETA, "temperature": temperature}
    loss = fused.fused_divergence(
        *inputs[:2], dense, kd_weights=kd_weights, labels=labels, lm_weights=lm_weights, chunk_tokens=4, **options
    )
    student, mixed = inputs[0] @ inputs[1].t(), plain_mixture(teachers, SHARES, temperature)
    kd = plain(kind, student, mixed, temperature)
    lm = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close((loss.kd, loss.lm), (kd, lm))
    total = (kd * kd_weights + lm * lm_weights).sum()
    gradients = [torch.autograd.grad(one, inputs[:2], retain_graph=True) for one in (loss.total, total)]
    torch.testing.assert_close(*gradients)
    unfused = losses.mixture([z.view(1, T, V) for z in teachers], SHARES, temperature=temperature)
    torch.testing.assert_close(unfused, mixed.view(1, T, V))


def test_a_mixture_in_float32_and_of_entries_without_probability():
    _, teachers = several()
    teachers[0][:, 3:], teachers[1][:, 5] = -torch.inf, -torch.inf
    mixed = losses.mixture([z.bfloat16() for z in teachers], SHARES)
    assert mixed.dtype == torch.float32 and (mixed[:, 5] == -torch.inf).all()
    torch.testing.assert_close(mixed, plain_mixture([z.bfloat16().double() for z in teachers], SHARES).float())
    assert losses.mixture(teachers[:1], [0.3]) is not None and torch.equal(
        losses.mixture(teachers[:1], [3.0]), teachers[0]
    )


MIXTURES = {
    "drawn": (0, ("drawn",)),
    "largest": (0, ("largest",)),
    "two kept": (0, ("drawn", "largest")),
    "dense and drawn": (1, ("drawn",)),
    "two dense and two kept": (2, ("largest", "drawn")),
}


def mixed_case(name):
    """Dense and sparse teachers, and the plain loss of each token from the student's logits."""
    count, names = MIXTURES[name]
    dense, teachers = several()
    dense, teachers = dense[:count], teachers[:count]
    sparse = [kept_of(kept, seed)._replace(share=0.7 + seed) for seed, kept in enumerate(names)]

    def loss(student):
        shares = [one.share for one in (*dense, *sparse)]
        values = [plain_sparse(student, one) * one.share for one in sparse]
        if dense:
            values.append(plain("forward_kl", student, plain_mixture(teachers, SHARES[:count])) * sum(shares[:count]))
        return sum(values) / sum(shares)

    return dense, sparse, loss


@pytest.mark.parametrize("trained", [True, False], ids=["lm trained", "lm shown"])
@pytest.mark.parametrize("name, chunk", [*((name, 4) for name in MIXTURES), ("drawn", None), ("dense and drawn", 1)])
def test_the_fused_loss_on_kept_entries_is_output_layer_and_loss(name, chunk, trained):
    inputs, labels, kd_weights, lm_weights = layers()
    dense, sparse, loss_of = mixed_case(name)
    loss = fused.fused_divergence(
        *inputs[:2], dense, sparse=sparse, kd_weights=kd_weights, labels=labels,
        lm_weights=lm_weights if trained else None, chunk_tokens=chunk,
    )  # fmt: skip
    student = inputs[0] @ inputs[1].t()
    kd, lm = loss_of(student), torch.nn.functional.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close((loss.kd, loss.lm), (kd, lm))
    total = (kd * kd_weights).sum() + (lm * lm_weights).sum() * trained
    gradients = [torch.autograd.grad(-3 * one, inputs[:2], retain_graph=True) for one in (loss.total, total)]
    torch.testing.assert_close(*gradients)
    assert trained or (gradients[0][0][2] == 0).all()


@pytest.mark.parametrize("name", MIXTURES)
def test_the_fused_loss_on_kept_entries_with_compiled_passes(name, request):
    inputs, labels, kd_weights, _ = layers()
    dense, sparse, loss_of = mixed_case(name)
    calls = request.getfixturevalue("on_expressions")
    loss = fused.fused_divergence(*inputs[:2], dense, sparse=sparse, kd_weights=kd_weights, chunk_tokens=6)
    expected = torch.autograd.grad((loss_of(inputs[0] @ inputs[1].t()) * kd_weights).sum(), inputs[:2])
    torch.testing.assert_close(torch.autograd.grad(loss.total, inputs[:2]), expected)
    assert ("gradient" in calls) == bool(dense)


def test_a_masked_token_may_hold_anything_where_entries_are_kept():
    inputs, _, kd_weights, _ = layers()
    dense, sparse, _ = mixed_case("two dense and two kept")
    options = {"sparse": sparse, "kd_weights": kd_weights, "chunk_tokens": 4}
    expected = fused.fused_divergence(*inputs[:2], dense, **options)
    dense[0].hidden[2] = sparse[0].rest[2] = sparse[1].entropy[2] = torch.nan
    loss = fused.fused_divergence(*inputs[:2], dense, **options)
    assert loss.kd[2].isnan()
    torch.testing.assert_close(loss[:2], expected[:2])
    torch.testing.assert_close(*(torch.autograd.grad(one.total, inputs[:2]) for one in (loss, expected)))
    inputs[0].detach()[2] = torch.nan
    nan = fused.fused_divergence(*inputs[:2], sparse=sparse, kd_weights=kd_weights, chunk_tokens=4)
    assert (torch.autograd.grad(nan.total, inputs[0])[0][2] == 0).all() and nan.total.isfinite()


def test_one_dense_teacher_is_worked_out_as_if_there_were_no_others():
    """To the bit: per chunk two products, the divergence, its gradient, and two products; any share is all."""
    for dtype in (torch.float32, torch.bfloat16):
        (hidden, weight, *teacher), _, kd_weights, _ = layers(dtype)
        loss = fused.fused_divergence(
            hidden, weight, [Dense(*teacher, share=0.3)], kd_weights=kd_weights, chunk_tokens=4
        )
        d, scale, values, of_hidden = divergences.Divergence(), kd_weights.float(), [], []
        of_weight = torch.zeros_like(weight)
        for start in range(0, T, 4):
            rows = slice(start, start + 4)
            student, target = hidden.detach()[rows] @ weight.detach().t(), teacher[0][rows] @ teacher[1].t()
            work = divergences.Workspace(student, 3)
            measured = divergences.measure(student, target, d, None, work)
            values.append(measured.value)
            for block, gradient in divergences.scaled_gradient(student, target, measured, scale[rows], d, work):
                student[block] = gradient
            of_hidden.append(student @ weight.detach())
            of_weight.addmm_(student.t(), hidden.detach()[rows], beta=float(start > 0))
        assert torch.equal(loss.kd, torch.cat(values))
        gradients = torch.autograd.grad(loss.total, (hidden, weight))
        assert torch.equal(gradients[0], torch.cat(of_hidden)) and torch.equal(gradients[1], of_weight)


def test_teachers_that_do_not_fit_are_refused():
    (hidden, weight, *teacher), *_ = layers()
    dense, kept = Dense(*teacher), kept_of("drawn")

    def refused(message, teachers=(), **options):
        with pytest.raises(ValueError, match=message):
            fused.fused_divergence(hidden, weight, teachers, **options)

    refused("shares of teachers must be above 0")
    refused("shares of teachers must be above 0", [dense, dense._replace(share=0.0)])
    refused("shares of teachers must be above 0", sparse=[kept._replace(share=torch.nan)])
    refused("forward_kl and soft_cross_entropy at temperature 1, not reverse_kl", sparse=[kept], kind="reverse_kl")
    refused("at temperature 1, not forward_kl at 2.0", [dense], sparse=[kept], temperature=2.0)
    refused(r"probabilities \[11, 1\].* do not fit", sparse=[kept._replace(probabilities=kept.probabilities[:, :1])])
    refused(
        r"entropy \[10\] must be \[11\]",
        sparse=[Sparse(*(part[1:] if part is not None else None for part in kept[:4]))],
    )
    refused("of one dtype", [dense, dense._replace(hidden=teacher[0].float(), weight=teacher[1].float())])
    refused("tokens and vocabulary", [dense, Dense(teacher[0][1:], teacher[1])])
    student, _ = logits(T, V)
    with pytest.raises(ValueError, match="at temperature 1, not forward_kl at 2.0"):
        losses.sparse_divergence(student, kept, temperature=2.0)
    with pytest.raises(ValueError, match="do not fit the teacher's"):
        losses.sparse_divergence(student[1:], kept)
    with pytest.raises(ValueError, match="shares of teachers"):
        losses.mixture([student, student], [1.0, -1.0])
