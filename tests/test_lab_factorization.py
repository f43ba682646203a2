"""Measures of recipes @ basis: by hand, against known bounds, and what gradient flow conserves."""

import pytest
import torch

from experiments.lab import factorization


def normal(*shape, seed=0):
    """A Gaussian matrix, float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_spectrum_equals_torch_and_ranks_of_an_even_and_of_a_low_one():
    x = normal(40, 7)
    s = factorization.spectrum(x)
    assert s == pytest.approx(torch.linalg.svdvals(x).numpy())
    assert factorization.spectrum(x.T) == pytest.approx(s)
    even = factorization.ranks(factorization.spectrum(torch.eye(5, dtype=torch.float64)))
    expected = {"rank": 5, "effective rank": 5, "stable rank": 5, "condition number": 1}
    assert even == pytest.approx(expected)
    low = x[:, :2] @ normal(2, 7, seed=1)
    assert factorization.ranks(factorization.spectrum(low))["rank"] == 2


def test_coherence_meets_welch_for_an_even_frame():
    angles = torch.tensor([0.0, 2, 4]) * torch.pi / 3  # three directions at 120 degrees
    frame = torch.stack([angles.cos(), angles.sin()], 1)
    assert factorization.coherences(frame) == pytest.approx(factorization.welch(3, 2), abs=1e-6)
    assert factorization.welch(3, 4) == 0


def test_gradient_flow_conserves_the_balance():
    """One small step of gradient descent changes Wr'Wr and WbWb' by the same."""
    recipes, basis, target = normal(30, 6), normal(6, 5, seed=1), normal(30, 5, seed=2)
    error = recipes @ basis - target
    moved = (recipes - 1e-6 * error @ basis.T, basis - 1e-6 * recipes.T @ error)
    assert factorization.balances(moved, (recipes, basis))["imbalance of changes"] < 1e-3
    pairs = zip(factorization.balance(*moved), factorization.balance(recipes, basis), strict=True)
    of_recipes, of_basis = [after - before for after, before in pairs]
    assert factorization.imbalance(of_recipes, of_basis) < 1e-3
    assert factorization.imbalance(of_recipes, -of_basis) == pytest.approx(1, abs=1e-3)


def test_energy_that_E_never_sees():
    basis = torch.linalg.qr(normal(8, 3)).Q  # S = 8, d = 3
    recipes = normal(5000, 8, seed=1)
    assert factorization.unseen(recipes, basis) == pytest.approx(5 / 8, abs=0.02)
    assert factorization.unseen(recipes @ basis @ basis.T, basis) == pytest.approx(0, abs=1e-12)
    square = basis.T[:, :3].contiguous()
    assert factorization.unseen(recipes[:, :3], square) == pytest.approx(0, abs=1e-12)


def test_where_the_basis_is_orthonormal_recipe_cosines_are_those_of_E():
    basis = torch.linalg.qr(normal(9, 6)).Q.T  # (6, 9)
    recipes = normal(50, 6, seed=1)
    assert factorization.anisotropy(2 * basis) < 1e-12
    assert factorization.agreement(recipes, recipes @ basis) == pytest.approx((1, 0))
    assert factorization.anisotropy(basis * torch.arange(1, 7)[:, None]) > 0.3
