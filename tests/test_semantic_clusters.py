"""Word classes: silhouettes against scikit-learn, planted clusters that only recipes show, or all gauges."""

import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_samples

from experiments import semantic_clusters
from tests.spaces_fixtures import files_are_there, open_planted, verdicts


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    return open_planted(tmp_path_factory.mktemp("clusters"))


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(semantic_clusters, "PERMUTATIONS", 9)
    monkeypatch.setattr(semantic_clusters, "POOL", 300)


def test_silhouette_against_scikit_learn():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((40, 3))
    distance = semantic_clusters.euclidean(points)
    labels = np.stack([rng.permutation(np.repeat([0, 1, 2, 3], [4, 8, 12, 16])) for _ in range(3)])
    found = semantic_clusters.silhouette(distance, labels)
    for values, row in zip(found, labels, strict=True):
        assert values == pytest.approx(silhouette_samples(distance, row, metric="precomputed"))
    assert semantic_clusters.silhouette(distance, labels[0]) == pytest.approx(found[0])


def test_v_measure_finds_clusters_and_leaf_order_joins_them():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(5), 10))
    codes = torch.from_numpy(np.eye(8)[labels] + 0.05 * rng.standard_normal((50, 8)))
    found = semantic_clusters.v_measure(codes, labels, rng)
    assert found["value"] > 0.99
    assert found["permuted"] < 0.4
    assert found["p"] == pytest.approx(0.01)
    noise = semantic_clusters.v_measure(torch.from_numpy(rng.standard_normal((50, 8))), labels, rng)
    assert noise["value"] < 0.5
    order = semantic_clusters.leaf_order(semantic_clusters.distances(codes))
    assert (labels[order][1:] != labels[order][:-1]).sum() == 4


def test_plane_keeps_the_most_variance():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 5, dtype=torch.float64, generator=generator) * torch.tensor(
        [5.0, 3.0, 1.0, 0.1, 0.1]
    )
    points, share = semantic_clusters.plane(x)
    variances = np.linalg.eigvalsh(np.cov(x.numpy().T))
    assert share == pytest.approx(variances[-2:].sum() / variances.sum())
    assert points.var(0, ddof=1) == pytest.approx(variances[:-3:-1])


def test_clusters_that_only_recipes_show_are_an_effect_and_stand_out_among_gauges(labs, fast):
    report = semantic_clusters.run(labs("crooked"))
    assert verdicts(report) == {"silhouette": "supported", "best_space": "description"}
    described = report["best_space"]
    assert described.measured.value > described.gauges.high
    assert described.measured.value > described.controls["E"].value
    assert report.numbers["p_permutation"] == pytest.approx(0.1)  # the least of nine permutations
    raw = report.numbers["raw silhouette"]["native"] - report.numbers["permuted"]["native"]
    assert report["silhouette"].measured.value == pytest.approx(raw)


def test_a_description_has_no_p_whatever_it_shows(labs, fast):
    """With an orthonormal basis recipes and E have the same cosines, above those of all skewed gauges."""
    report = semantic_clusters.run(labs("straight"))
    assert report["silhouette"].verdict == "supported"
    described = report["best_space"]
    assert described.controls["E"].value == pytest.approx(described.measured.value, abs=1e-6)
    assert described.measured.value > described.gauges.high
    assert (described.kind, described.verdict) == ("gauge", "description")
    assert described.p is described.beats_gauges is described.gain is None


@pytest.mark.parametrize("name", ["untrained", "dense"])
def test_no_verdict_is_positive_where_there_is_nothing_to_find(labs, fast, name):
    """An untrained model, and a plain GPT, whose recipes are coordinates of E."""
    report = semantic_clusters.run(labs(name))
    assert verdicts(report) == {"silhouette": "not supported", "best_space": "description"}
    assert files_are_there(report)
