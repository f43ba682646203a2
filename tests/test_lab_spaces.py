"""Spaces of words: precision and its chance by brute force, every space once, few effects of random codes."""

import numpy as np
import pytest
import torch

from dictionary import skewed
from experiments.lab import Scores
from experiments.lab.claims import effect
from experiments.lab.spaces import chance, compare_spaces, cosines, precision, spaces, split
from tests.lab_fixtures import corpus, open_lab, save_run, tiny


def test_precision_and_its_chance_against_brute_force():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [4, 7, 9])
    n = len(labels)
    barred = rng.random((n, n)) < 0.2
    barred |= barred.T
    cosine = torch.from_numpy(rng.standard_normal((n, n)))
    for bar in (None, barred):
        found = precision(cosine, labels, 3, bar)
        for i in range(n):
            free = [j for j in range(n) if j != i and (bar is None or not bar[i, j])]
            best = sorted(free, key=lambda j: -cosine[i, j])[:3]
            assert found[i] == pytest.approx(np.mean(labels[best] == labels[i]))
        random = torch.from_numpy(rng.standard_normal((3000, n, n)))
        mean = np.mean([precision(table, labels, 3, bar) for table in random], 0)
        assert mean == pytest.approx(chance(labels, bar), abs=0.03)


def test_precision_of_perfect_and_of_opposite_clusters():
    labels = np.repeat([0, 1, 2], 6)
    same = torch.from_numpy((labels[:, None] == labels).astype(float))
    assert precision(same, labels, 5).mean() == 1
    assert precision(-same, labels, 5).mean() == 0


def test_cosines_less_a_mean_by_hand():
    codes = torch.tensor([[4.0, 1], [1, 3], [1, -1]])
    expected = torch.tensor([[1.0, 0, 0], [0, 1, -1], [0, -1, 1]])
    assert torch.allclose(cosines(codes, torch.tensor([1.0, 1])), expected)


def test_random_codes_rarely_have_an_effect():
    """The category claim of 20 sets of random codes is supported about as often as 2.5 % says."""
    labels = np.repeat(np.arange(25), 12)
    found = 0
    for seed in range(20):
        codes = torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(seed))
        values = precision(cosines(codes), labels, 5)
        scores = Scores({"native": values, "permuted labels": chance(labels)})
        found += effect(scores, "categories", groups=labels)["verdict"] == "supported"
    assert found <= 3


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A tiny run with a plain GPT of the same shape and data, which is found as its baseline."""
    folder = tmp_path_factory.mktemp("runs")
    text = corpus(folder / "text", repeats=6)
    save_run(folder / "dense", tiny(4, vocab="dense"), text)
    return open_lab(save_run(folder / "factored", tiny(1), text))


def test_every_space_is_measured_once_on_the_chosen_tokens(lab):
    """The codes are those of the models' own dictionaries, of whitened PCA and ICA, of 19 skewed gauges."""
    tokens = lab.words.known_words()[:40]
    seen = []

    def measure(codes):
        seen.append(codes)
        return {"mean": codes.double().mean(1), "size": codes.double().norm(dim=1)}

    found = compare_spaces(lab, measure, tokens)
    own = spaces(lab, tokens)
    assert set(own) == {"native", "E", "baseline", "step 0", "noise", "shuffled"}
    assert set(found["mean"]) == {*own, "pca", "ica"} and len(seen) == 8 + 19
    assert all(len(codes) == 40 for codes in seen)
    for name, codes in own.items():
        assert found["mean"][name] == pytest.approx(codes.double().mean(1).numpy(), abs=1e-6)
    index = torch.from_numpy(tokens)
    assert torch.equal(own["E"], lab.model.E[index])
    assert torch.equal(own["baseline"], lab.baseline.E[index])
    assert torch.equal(own["step 0"], lab.step0.dictionary.codes[index])
    pca = lab.rivals()["pca"].codes[index]
    assert found["size"]["pca"] == pytest.approx((pca / pca.std(0)).norm(dim=1).numpy(), rel=1e-4)
    first = next(lab.gauges(lab.model.dictionary, skewed)).codes[index]
    assert found["size"].gauges[0] == pytest.approx(first.norm(dim=1).numpy(), rel=1e-4)
    assert found["size"].gauge == "skewed"


def test_a_rotation_changes_no_cosine_and_a_skewed_gauge_does(lab):
    tokens = lab.words.known_words()[:40]
    rotation = lab.compare(lambda d: cosines(d.codes), tokens=tokens)
    skew = lab.compare(lambda d: cosines(d.codes), tokens=tokens, change=skewed)
    assert np.abs(rotation.gauges - rotation.native).max() < 1e-5
    assert np.abs(skew.gauges - skew.native).max(axis=(1, 2)).min() > 0.1


def test_scores_are_split_into_controls_of_chance_and_rival_spaces():
    names = ("native", "pca", "E", "step 0", "shuffled")
    scores = Scores({name: [float(i)] for i, name in enumerate(names)}, [[7.0], [8.0]], "skewed")
    untrained, rivals = split(scores)
    assert set(untrained) == {"native", "step 0", "shuffled"} and untrained.gauges is None
    assert set(rivals) == {"native", "pca", "E"} and rivals.gauge == "skewed"
    assert rivals.gauges.tolist() == [[7.0], [8.0]]
