"""Activation patching: the layer that moves a decision is found; crossings and means by hand."""

import numpy as np
import pytest
import torch

from data.tokenizer import gpt2
from experiments.lab import Subject, patching
from experiments.lab.probes import probe
from tests.lab_fixtures import averaging, silent, tiny


def test_crossing_is_where_a_curve_rises_for_good():
    layers = [0, 2, 4, 6]
    curves = [[0, 0, 1, 1], [0, 0.25, 0.75, 1], [0.6, 0.2, 0.3, 1], [0.5, 0.6, 0.7, 1], [0, 0, 0, 1]]
    expected = [3, 3, 4 + 2 * 0.2 / 0.7, 0, 5]
    assert patching.crossing(curves, layers) == pytest.approx(expected)


def test_the_mean_weighs_pairs_by_their_size_whatever_the_sign():
    change = np.array([[0.0, 3.0, 4.0], [0.0, -1.0, -1.0]])
    whole = np.array([4.0, -1.0])
    assert patching.mean_recovery(change, whole) == pytest.approx([0, 4 / 5, 1])
    weights = np.array([[2, 0], [0, 2], [1, 1]])
    assert patching.mean_recovery(change, whole, weights)[:, 1] == pytest.approx([0.75, 1, 0.8])


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("length", ["short", "long"])
def test_the_layer_that_moves_the_decision_is_found(layer, length):
    """One block alone takes the mean of all tokens: before it the changed ones decide, after it the last."""
    subject = Subject("planted", averaging(silent(tiny(0, n_layer=4)), layer))
    agreement = probe("agreement")
    texts = [pair for pair in agreement["pairs"] if pair["template"] == "subject_of"]
    contexts = agreement["contexts"] if length == "long" else None
    pairs = patching.Pairs(texts, gpt2(), 64, "cpu", contexts)
    found = patching.recover(subject, pairs, np.random.default_rng(0))
    step = (np.arange(5) > layer).astype(float)
    assert np.abs(found.curve - step).max() < 1e-3
    assert found.points == pytest.approx(layer + 0.5, abs=0.01)
    assert found.crossing.low == pytest.approx(layer + 0.5, abs=0.01)
    if length == "short":
        change = patching.patch_places(subject, pairs, pairs.places(), range(5))
        means = (change / torch.from_numpy(found.whole)).mean(2).numpy()  # (places, layers)
        assert np.abs(means - np.stack([1 - step, 0 * step, step])).max() < 1e-3
