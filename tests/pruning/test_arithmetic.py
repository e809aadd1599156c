"""The compensation's linear algebra against torch's own least squares on the samples themselves, in float64."""

import pytest
import torch

from nemo_minitron.pruning import arithmetic
from nemo_minitron.pruning.ridge import ridge

TINY = 1e-12


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def samples(generator, count: int, width: int) -> torch.Tensor:
    """Correlated samples."""
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing


def moments(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def test_ridge_is_least_squares_with_rows_of_the_square_root_of_lambda(generator):
    a, b = samples(generator, 50, 8), samples(generator, 50, 3)
    strength = 0.1
    scale = (a.T @ a).diagonal().mean() * strength
    stacked = torch.cat([a, scale.sqrt() * torch.eye(8, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([b, torch.zeros(8, 3, dtype=torch.float64)])).solution
    assert torch.allclose(ridge(a.T @ a, a.T @ b, strength), expected, atol=1e-10)


def test_ridge_of_singular_moments_is_finite_and_fits(generator):
    a, b = samples(generator, 4, 8), samples(generator, 4, 3)
    found = ridge(a.T @ a, a.T @ b, 0.0)
    assert found.isfinite().all() and torch.allclose(a @ found, b, atol=1e-3)
    assert not ridge(torch.zeros(3, 3), torch.ones(3, 2), 1e-3).any()


def test_columns_that_stay_reproduce_the_output_as_well_as_any_matrix_can(generator):
    x, weight = samples(generator, 200, 12), torch.randn(5, 12, generator=generator, dtype=torch.float64)
    keep = torch.tensor([7, 2, 9, 4, 0, 11])
    refitted = weight @ arithmetic.columns_map(moments(x), keep, TINY)
    best = torch.linalg.lstsq(x[:, keep], x @ weight.T).solution.T
    assert torch.allclose(refitted, best, atol=1e-6)
    plain = weight @ arithmetic.columns_map(moments(x), keep, 1e12)
    assert torch.allclose(plain, weight[:, keep], atol=1e-6)
    everything = torch.randperm(12, generator=generator)
    assert torch.equal(weight @ arithmetic.columns_map(moments(x), everything, 1e-3), weight[:, everything])


def test_columns_that_are_combinations_of_others_cost_nothing(generator):
    x = samples(generator, 100, 6)
    x = torch.cat([x, x @ torch.randn(6, 4, generator=generator, dtype=torch.float64)], dim=1)
    weight = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    keep = torch.arange(6)
    refitted = weight @ arithmetic.columns_map(moments(x), keep, TINY)
    assert torch.allclose(x[:, keep] @ refitted.T, x @ weight.T, atol=1e-5)


@pytest.mark.parametrize("size", [3, 8])
def test_the_basis_keeps_the_most_energy_and_is_orthonormal(generator, size):
    x = samples(generator, 300, 8)
    basis = arithmetic.stream_basis(moments(x), size, centred=False)
    assert torch.allclose(basis.T @ basis, torch.eye(size, dtype=torch.float64), atol=1e-10)
    values = torch.linalg.svdvals(x)
    assert torch.isclose((x @ basis).pow(2).sum(), values[:size].pow(2).sum())


@pytest.mark.parametrize("size", [3, 8])
def test_a_centred_basis_leaves_every_vector_with_mean_zero(generator, size):
    x = samples(generator, 300, 8)
    centred = x - x.mean(dim=1, keepdim=True)
    basis = arithmetic.stream_basis(moments(centred), size, centred=True)
    assert (x @ basis).mean(dim=1).abs().max() < 1e-10
    values = torch.linalg.svdvals(centred)
    assert torch.isclose((x @ basis).pow(2).sum(), values[: size - 1].pow(2).sum())
    if size == 8:  # nothing is lost but the mean
        assert torch.allclose((x @ basis).norm(dim=1), centred.norm(dim=1))


def test_equal_moments_give_the_same_basis_whatever_signs_the_library_chooses(generator, monkeypatch):
    c = moments(samples(generator, 300, 8))
    basis = arithmetic.stream_basis(c, 4, centred=False)
    eigh = torch.linalg.eigh

    def other_signs(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)

    monkeypatch.setattr(torch.linalg, "eigh", other_signs)
    assert torch.equal(arithmetic.stream_basis(c, 4, centred=False), basis)


def test_the_gain_is_the_scale_that_the_norm_loses(generator):
    x = samples(generator, 300, 8)
    x = x / x.pow(2).mean(dim=1, keepdim=True).sqrt()
    basis = arithmetic.stream_basis(moments(x), 5, centred=False)
    expected = (x @ basis).pow(2).mean().sqrt()
    assert arithmetic.norm_gain(moments(x), basis) == pytest.approx(float(expected))
    assert arithmetic.norm_gain(moments(x), arithmetic.stream_basis(moments(x), 8, centred=False)) == pytest.approx(1.0)


def test_a_reader_of_what_stays_is_the_least_squares_one(generator):
    x, other = samples(generator, 300, 8), samples(generator, 300, 8)
    weight = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    basis = arithmetic.stream_basis(moments(other), 5, centred=False)  # not the basis of x itself
    found = weight @ arithmetic.reader_map(moments(x), basis, TINY)
    best = torch.linalg.lstsq(x @ basis, x @ weight.T).solution.T
    assert torch.allclose(found, best, atol=1e-6)
    own = arithmetic.stream_basis(moments(x), 5, centred=False)
    assert torch.allclose(arithmetic.reader_map(moments(x), own, 1e-3), own, atol=1e-8)


def test_the_tied_gain_is_the_best_diagonal(generator):
    x, embedding = samples(generator, 300, 8), torch.randn(20, 8, generator=generator, dtype=torch.float64)
    gain = torch.rand(8, generator=generator, dtype=torch.float64) + 0.5
    basis = arithmetic.stream_basis(moments(x), 5, centred=False)
    found = arithmetic.tied_gain(embedding, gain, moments(x), basis, strength=TINY)
    small = embedding @ basis
    design = torch.stack([torch.outer(x @ basis[:, j], small[:, j]).flatten() for j in range(5)], dim=1)
    best = torch.linalg.lstsq(design, ((x * gain) @ embedding.T).flatten()[:, None]).solution.flatten()
    assert torch.allclose(found, best, atol=1e-8)
    ones = arithmetic.tied_gain(embedding, torch.ones(8), moments(x), torch.eye(8, dtype=torch.float64), TINY)
    assert torch.allclose(ones, torch.ones(8, dtype=torch.float64), atol=1e-6)


def test_groups_hold_gains_within_the_tolerance_and_every_channel_once(generator):
    gain = torch.cat([samples(generator, 40, 1).flatten(), torch.tensor([0.0, 0.0, 1.0, 1.0, -1.0])]).double()
    for tolerance in (0.0, 0.05, 0.5, 1.0):
        groups = arithmetic.gain_groups(gain, tolerance)
        assert torch.equal(torch.cat(groups).sort().values, torch.arange(45))
        for group in groups:
            values = gain[group]
            middle = (values.min() + values.max()) / 2
            assert (values - middle).abs().max() <= tolerance * middle.abs() + 1e-12
            assert len(set(values.sign().tolist())) == 1
        assert [40, 41] in [group.tolist() for group in groups]  # zeros
    assert sorted(len(group) for group in arithmetic.gain_groups(gain, 0.0)) == [1] * 41 + [2, 2]
    assert len(arithmetic.gain_groups(gain, 1.0)) == 3


def test_the_largest_group_is_the_largest_there_can_be(generator):
    gain = samples(generator, 30, 1).flatten().abs().double() + 0.1
    found = max(len(group) for group in arithmetic.gain_groups(gain, 0.2))
    windows = [((gain >= low) & (gain <= low * 1.2 / 0.8)).sum() for low in gain]
    assert found == max(windows)


def test_a_grouped_basis_mixes_within_groups_and_commutes_with_equal_gains(generator):
    pooled = moments(samples(generator, 200, 9))
    gain = torch.tensor([1.0, 1, 1, 1, 2, 2, -1, -1, 0]).double()
    groups = arithmetic.gain_groups(gain, 0.0)
    basis = arithmetic.stream_basis(pooled, 9, False, groups)
    assert torch.allclose(basis.T @ basis, torch.eye(9).double(), atol=1e-12)
    new = arithmetic.grouped_gain(gain, basis)
    assert torch.allclose(basis @ torch.diag(new) @ basis.T, torch.diag(gain), atol=1e-12)
    # The five directions that stay have the most energy of all that lie within a group.
    energies = [torch.linalg.eigvalsh(pooled[group][:, group].double()) for group in groups]
    small = arithmetic.stream_basis(pooled, 5, False, groups)
    best = torch.cat(energies).sort(descending=True).values[:5].sum()
    assert torch.isclose(((pooled.double() @ small) * small).sum(), best)


@pytest.mark.parametrize("unit", [1, 2])
def test_saliency_is_what_the_best_refit_without_the_inputs_leaves(generator, unit):
    """Least squares without the inputs of each unit, in float64, against the formula."""
    x = samples(generator, 300, 6).double()
    writer = samples(generator, 4, 6).double()
    found = arithmetic.saliency(writer, moments(x), TINY, unit)
    for number in range(6 // unit):
        gone = range(number * unit, (number + 1) * unit)
        stay = [index for index in range(6) if index not in gone]
        refit = torch.linalg.lstsq(x[:, stay], x @ writer.T).solution
        left = (x[:, stay] @ refit - x @ writer.T).square().sum() / len(x)
        assert torch.isclose(found[number], left, rtol=1e-4), number


def test_a_norms_bias_is_read_as_before_where_that_is_possible(generator):
    weight, bias = torch.randn(10, 6, generator=generator), torch.randn(6, generator=generator)
    student = torch.randn(10, 4, generator=generator)
    best = torch.linalg.lstsq(student.double(), (weight.double() @ bias.double())[:, None]).solution.flatten()
    assert torch.allclose(arithmetic.input_bias(weight, bias, student), best, atol=1e-8)


def test_merged_queries_are_those_of_the_paper():
    """Eight heads to six: the last two become 2 H_5 - H_8 and 2 H_6 - H_7."""
    heads = torch.arange(8.0).view(8, 1, 1) ** 2
    ranking = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    merged = arithmetic.merged_queries(heads, ranking, 6).flatten()
    h = heads.flatten()[ranking]
    assert torch.equal(merged, torch.stack([h[0], h[1], h[2], h[3], 2 * h[4] - h[7], 2 * h[5] - h[6]]))
    assert torch.equal(arithmetic.merged_queries(heads, ranking, 8).flatten(), h)
    few = arithmetic.merged_queries(heads, ranking, 2).flatten()
    assert torch.equal(few, torch.stack([2 * h[0] - h[3], 2 * h[1] - h[2]]))
