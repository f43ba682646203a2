"""One signal at a time: planted meaning and planted effects are found, chance is not."""

import numpy as np
import pytest
import torch

from experiments.lab.facts import acts, enriched, halves, missed
from experiments.lab.stats import rank_sums


def test_rank_sums_are_those_of_scipy():
    from scipy.stats import mannwhitneyu, norm

    rng = np.random.default_rng(0)
    codes, labels = rng.standard_normal((60, 3)), np.repeat([0, 1, 2], 20)
    z = rank_sums(codes, labels, 3)
    for c in range(3):
        for s in range(3):
            test = mannwhitneyu(
                codes[labels == c, s], codes[labels != c, s], method="asymptotic", use_continuity=False
            )
            assert 2 * norm.sf(abs(z[c, s])) == pytest.approx(test.pvalue)


def test_planted_meaning_is_found_and_chance_is_not():
    """Of 40 signals ten are high or low for one category each: those are found, with category and sign. The
    same number of words without meaning gives at most one in twenty."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(10), 20)
    codes = rng.standard_normal((200, 40))
    for s in range(10):
        codes[labels == s, s] += 2.0 * (-1) ** s
    first = halves(labels, rng)
    assert all((first & (labels == c)).sum() == 10 for c in range(10))
    found = enriched(codes, labels, first)
    assert found.found[:10].all() and found.found[10:].sum() <= 2
    assert np.array_equal(found.category[:10], np.arange(10))
    assert np.array_equal(found.sign[:10], np.tile([1.0, -1.0], 5))
    shares = [enriched(rng.standard_normal((200, 40)), labels, first).found.mean() for _ in range(20)]
    assert np.mean(shares) < 0.05


def test_atoms_in_which_E_is_sparse_miss_less():
    """E of one atom a row: its atoms miss nothing with one entry, rotated ones much; weights count."""
    generator = torch.Generator().manual_seed(0)
    atoms, turn = (torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q for _ in range(2))
    E = 2.0 * atoms[torch.randint(8, (200,), generator=generator)]
    assert missed(E, atoms, 1, torch.ones(200)) < 1e-5
    assert missed(E, turn, 1, torch.ones(200)) > 0.2
    weights = torch.ones(200)
    weights[100:] = 0.0
    E[100:] = torch.randn(100, 8, generator=generator)
    assert missed(E, atoms, 1, weights) < 1e-5 < missed(E, atoms, 1, torch.ones(200))


def test_a_signal_that_alone_writes_words_acts_on_them():
    """Its removal lowers its words at least twice as much as any other; that of a signal that has nothing to
    do with them does not."""
    generator = torch.Generator().manual_seed(0)
    codes = 0.3 * torch.randn(300, 12, generator=generator)
    members = np.arange(30)
    codes[:, 3] = 0.0
    codes[members, 3] = 1.5
    atoms = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    h = 1.0 + 0.1 * torch.randn(64, 12, generator=generator)
    h = h @ atoms  # every signal is active
    rng = np.random.default_rng(0)
    assert acts(codes @ atoms, atoms, codes, h, 3, members, rng) > 2
    assert not acts(codes @ atoms, atoms, codes, h, 5, members, rng) > 2
