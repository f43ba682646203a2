"""Matching: planted signals and planted shared directions are found, unrelated ones are at their null."""

import numpy as np
import pytest
import torch

from dictionary import Dictionary, random_orthogonal
from experiments.lab.matching import SHARED, freed, matches, null_matches, recovered, shared_directions
from experiments.lab.stats import exchanged

V, S = 3000, 24


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def counts(rng):
    """How often each token was seen: Zipf's law; two thirds of the tokens at least 100 times."""
    return rng.permutation((2e5 / np.arange(1, V + 1)).astype(int))


def codes_with_axes(rng):
    return rng.standard_normal((V, S)) ** 3


def test_the_same_signals_in_another_order_and_sign_match_at_one(rng, counts):
    """Whatever frequency adds to both; and the null does not reach them."""
    a = codes_with_axes(rng)
    b = (a * rng.choice([-1.0, 1.0], S))[:, rng.permutation(S)]
    a, b = (x + np.log(counts + 1)[:, None] * rng.standard_normal(S) for x in (a, b))
    found = matches(a, b, counts)
    assert np.allclose(found, 1, atol=1e-6)
    for null in ("rotation", "exchange"):
        assert found.mean() > null_matches(a, b, counts, rng, null, draws=5).mean(1).max() + 0.3


def test_independent_signals_are_at_the_null(rng, counts):
    """Codes that share frequency alone: the match is one of its nulls, and no direction is shared."""
    a, b = (codes_with_axes(rng) + np.log(counts + 1)[:, None] * rng.standard_normal(S) for _ in range(2))
    found = matches(a, b, counts).mean()
    for null in ("rotation", "exchange"):
        drawn = null_matches(a, b, counts, rng, null, draws=9).mean(1)
        assert drawn.min() - 0.01 < found < drawn.max() + 0.01
    assert shared_directions(a, b, counts, rng).max() < 0.2


def test_rare_tokens_count_for_nothing(rng, counts):
    """Signals that agree on rare tokens alone do not match."""
    a, b = codes_with_axes(rng), codes_with_axes(rng)
    rare = counts < 100
    b[rare] = a[rare]
    assert len(freed(a, counts)) == (~rare).sum() < V
    assert matches(a, b, counts).max() < 0.5


@pytest.mark.parametrize("n_shared", [0, 5, 24])
def test_the_ceiling_is_the_number_of_planted_shared_directions(rng, counts, n_shared):
    """Two spaces with so many directions in common, each turned at random: that many correlate on tokens
    that were not fitted. A space and its rotation share all, though none of their signals."""
    a, b = rng.standard_normal((2, V, S))
    b[:, :n_shared] = a[:, :n_shared]
    turns = [random_orthogonal(S, torch.Generator().manual_seed(i)).numpy() for i in range(2)]
    found = shared_directions(a @ turns[0], b @ turns[1], counts, rng)
    assert (found > SHARED).sum() == n_shared
    assert len(found) == S and np.all(np.diff(found) <= 0)
    if n_shared:
        assert found[n_shared - 1] > 0.9


def test_an_exchange_stays_within_octaves(rng, counts):
    moved = exchanged(counts, rng)
    assert sorted(moved) == list(range(V)) and (moved != np.arange(V)).mean() > 0.9
    ratio = np.maximum(counts, 0.5) / np.maximum(counts[moved], 0.5)
    assert 0.5 <= ratio.min() and ratio.max() <= 2


@pytest.mark.parametrize("wide", [False, True])
def test_signals_with_axes_are_found_in_their_product_and_those_without_are_not(wide):
    """By ICA of as many independent sources as dimensions, by sparse codes where signals are more."""
    generator = torch.Generator().manual_seed(0)
    n, S, d = 2000, 24 if wide else 16, 16
    places = torch.rand(n, S, generator=generator) < 0.1
    sparse_codes = torch.randn(n, S, generator=generator) * places
    basis = torch.nn.functional.normalize(torch.randn(S, d, generator=generator), dim=1)
    counts = np.full(n, 200) + np.arange(n)
    found = recovered(Dictionary("native", sparse_codes, basis), counts, 0, 2)
    blind = Dictionary("native", torch.randn(n, S, generator=generator), basis)
    assert found > 0.8 > 0.6 > recovered(blind, counts, 0, 1)
    left_out = np.where(np.arange(n) < 1000, 0, counts)
    assert recovered(Dictionary("native", sparse_codes, basis), counts, 0, 1, left_out, most=1500) > 0.7
