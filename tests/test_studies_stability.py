"""Seeds: partners by brute force, neighbours and CKA by hand, shared signals told from a shared space."""

import itertools

import numpy as np
import pytest
import torch

from configurator import UserError
from experiments.lab.results import read_result
from experiments.studies import stability
from tests.lab_fixtures import corpus, tiny
from tests.studies_fixtures import open_study, save_trained


def test_partners_are_the_best_assignment_by_brute_force():
    """Five signals against six: no other one-to-one matching has a larger sum of |correlation|."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 5)), rng.standard_normal((40, 6))
    a[:, 3] = 7.0  # a dead signal has no correlation with anything
    with np.errstate(invalid="ignore"):
        r = np.nan_to_num(np.abs(np.corrcoef(a.T, b.T)[:5, 5:]))
    best = max(sum(r[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(6), 5))
    found = stability.partner_correlation(a, b)
    assert found.sum() == pytest.approx(best) and found[3] == 0
    backwards = stability.partner_correlation(b, a)
    assert np.count_nonzero(backwards) == 4  # one signal has no partner, one a dead one


def test_neighbours_in_common_and_cka_by_hand():
    """A rotation changes neither; neighbours are counted as by sorting; unrelated codes share few."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 60, 4))
    q = np.linalg.qr(rng.standard_normal((4, 4))).Q
    assert np.allclose(stability.neighbours_in_common(a, a @ q, 10), 1)
    near = []
    for x in (a, b):
        x = x - x.mean(0)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        near.append([set(np.argsort(-(x @ x[i]))[:11]) - {i} for i in range(60)])
    by_hand = [len(one & other) / 10 for one, other in zip(*near, strict=True)]
    assert np.allclose(stability.neighbours_in_common(a, b, 10), by_hand)
    assert stability.cka(a, 3 * a @ q) == pytest.approx(1) and stability.cka(a, b) < 0.5


def save_pair(folder, data, change):
    """Two runs of one function: the second has its signals changed by an orthogonal matrix (24, 24)."""
    first, second = (tiny(0, n_signal=24, n_embd=24) for _ in range(2))
    with torch.no_grad():  # signals of unequal strength: their rotations are then other signals
        first.vocab.recipe *= torch.logspace(0, -1, 24)
        second.vocab.recipe.copy_(first.vocab.recipe @ change.T)
        second.vocab.basis.copy_(change @ first.vocab.basis)
    for seed, model in enumerate((first, second)):
        save_trained(folder / str(seed), model, data, seed)


def test_stability_tells_shared_signals_from_a_shared_space(tmp_path):
    """A second "seed" that is the first with its signals in another order and sign has the same signals; one
    that is the first after a rotation has the same neighbours, but signals only as good as rotated ones."""
    data = corpus(tmp_path / "data", repeats=6)
    torch.manual_seed(0)
    order, sign = torch.randperm(24), torch.randint(0, 2, (24,)) * 2 - 1
    q = torch.linalg.qr(torch.randn(24, 24)).Q
    changes = {"permuted": torch.eye(24)[order] * sign[:, None], "rotated": q}
    reports = {}
    for name, change in changes.items():
        save_pair(tmp_path / name, data, change)
        report = stability.run(open_study(f"{tmp_path / name}/*", tmp_path))
        assert report.numbers["neighbours"]["native"] == pytest.approx(1)
        assert report["neighbours"].verdict == "supported"
        reports[name] = report
    assert reports["permuted"].numbers["matched"]["native"] == pytest.approx(1, abs=1e-3)
    assert reports["rotated"].numbers["matched"]["native"] < 0.8
    assert reports["permuted"]["native_match"].beats_gauges
    assert not reports["rotated"]["native_match"].beats_gauges


def test_untrained_seeds_share_nothing(tmp_path):
    """From files to a result: every claim fails; the plain GPT of equal size is a rival."""
    data = corpus(tmp_path / "data", repeats=6)
    for seed in range(3):
        for kind in ("factored", "dense"):
            save_trained(tmp_path / "runs" / f"{kind}{seed}", tiny(seed, vocab=kind), data, seed)
    stability.run(open_study(f"{tmp_path}/runs/*", tmp_path / "results")).save()
    result = read_result(tmp_path / "results" / "experiments" / "stability" / "result.json")
    claims = {claim.key: claim for claim in result.claims}
    assert list(claims) == list(stability.CLAIMS)
    assert [claim.verdict for claim in claims.values()] == ["not supported"] * 3
    assert set(claims["native_match"].controls) == {"pca", "ica", "E", "baseline"}
    assert set(result.numbers["shapes"]) == {"dense 2x16", "factored 2x16"}
    with pytest.raises(UserError, match="differ in their seed alone"):
        stability.run(open_study(f"{tmp_path}/runs/dense*", tmp_path))
