"""Nearest neighbours: stems and hubness by hand, planted classes that only recipes show, or all gauges."""

import numpy as np
import pytest
import torch
from scipy.stats import skew

from experiments import nearest_neighbors
from experiments.lab.report import table
from experiments.lab.spaces import cosines
from tests.spaces_fixtures import files_are_there, open_planted, verdicts


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    return open_planted(tmp_path_factory.mktemp("neighbors"))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(nearest_neighbors, "POOL", 300)


def test_words_of_one_stem():
    words = ["law", "laws", "river", "France", "foot", "feet", "Three", "thirty", "industry", "industries"]
    shared = nearest_neighbors.share_stem(words, [("foot", "feet")])
    pairs = {(words[i], words[j]) for i, j in zip(*np.nonzero(np.triu(shared, 1)), strict=True)}
    assert pairs == {("law", "laws"), ("foot", "feet"), ("industry", "industries")}
    assert (shared == shared.T).all() and shared.diagonal().all()


def test_hubness_is_the_skewness_of_counts_and_sees_a_hub():
    even = cosines(torch.randn(200, 30, generator=torch.Generator().manual_seed(0)))
    nearest = [sorted(set(range(200)) - {i}, key=lambda j: -even[i, j])[:10] for i in range(200)]
    counts = np.bincount(np.concatenate(nearest), minlength=200)
    assert nearest_neighbors.hubness(even) == pytest.approx(skew(counts))
    hub = even.clone()
    hub[:, 0] = 2
    assert nearest_neighbors.hubness(hub) > nearest_neighbors.hubness(even) + 1


EFFECT = {"category": "supported", "category_apart": "supported", "best_space": "description"}


def test_classes_that_only_recipes_show_are_an_effect_and_stand_out_among_gauges(labs):
    report = nearest_neighbors.run(labs("crooked"))
    assert verdicts(report) == EFFECT
    described = report["best_space"]
    assert described.measured.value > described.gauges.high
    assert described.measured.value > described.controls["E"].value
    assert report.numbers["rotation_changes_cosine"] < 1e-12
    assert "king" in report.gallery
    precision = report.numbers["precision"]
    assert precision["native"] == pytest.approx(report["best_space"].measured.value)
    assert precision["E"] == pytest.approx(report["best_space"].controls["E"].value)
    assert len(report.numbers["gauges"]) == 19
    assert "19 skewed gauges (range)" in table(report.result())
    assert report["category"].controls["permuted labels"].value == pytest.approx(report.numbers["chance"])


def test_classes_in_every_space_are_an_effect_like_those_of_E(labs):
    report = nearest_neighbors.run(labs("straight"))
    assert verdicts(report) == EFFECT
    described = report["best_space"]
    assert described.measured.value == pytest.approx(described.controls["E"].value, abs=1e-6)


def test_neighbours_of_words_of_ones_own_are_listed(labs):
    config = nearest_neighbors.NearestNeighborsConfig(words="house,nosuchword")
    gallery = nearest_neighbors.run(labs("straight"), config).gallery
    chosen = gallery.split("Neighbours of chosen words\n")[1].split("\n\n")[0]
    assert "nosuchword: not among these words" in chosen
    drawn = gallery.split("Neighbours of words drawn at random\n")[1]
    assert drawn.count("native") == nearest_neighbors.N_RANDOM_WORDS


@pytest.mark.parametrize("name", ["untrained", "dense"])
def test_no_verdict_is_positive_where_there_is_nothing_to_find(labs, name):
    """An untrained model, and a plain GPT, whose recipes are coordinates of E."""
    report = nearest_neighbors.run(labs(name))
    assert set(verdicts(report).values()) == {"not supported", "description"}
    assert files_are_there(report)
