"""sparsity_profile: measures of known rows, planted sparsity is found, cuts and verdicts that fail."""

import csv

import numpy as np
import pytest
import torch

import hooks
from dictionary import rotated
from experiments import sparsity_profile
from experiments.lab.claims import N_GAUGES, Scores, effect, signals
from experiments.lab.results import read_result
from experiments.lab.stats import gini
from tests.lab_fixtures import corpus, open_lab, planted_recipes, save_run, silent, tiny, token, words
from tests.spaces_fixtures import files_are_there, verdicts


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(sparsity_profile, "N_TOKENS", 300)


def noise_and_one_entry(net, signal):
    """The same net; the recipe of each token has one large entry, at signal (V,), beside weak noise."""
    shape = net.vocab.recipe.shape
    recipes = 0.15 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    recipes[torch.arange(len(recipes)), signal] += 3.0
    with torch.no_grad():
        net.vocab.recipe.copy_(recipes)
    return net


def test_measures_of_gaussian_rows():
    rows = np.random.default_rng(0).standard_normal((50, 4000))
    assert sparsity_profile.active_share(rows, 1.58).mean() == pytest.approx(0.114, abs=3e-3)
    assert sparsity_profile.active_share(rows, 2.0).mean() == pytest.approx(0.0455, abs=2e-3)
    assert sparsity_profile.hoyer(rows).mean() == pytest.approx(0.205, abs=0.01)
    assert sparsity_profile.participation(rows).mean() == pytest.approx(1 / 3, abs=0.01)


def test_measures_of_even_rows_and_of_rows_with_one_entry():
    even, single = np.ones((1, 50)), np.eye(50)[:1]
    assert sparsity_profile.hoyer(even)[0] == pytest.approx(0)
    assert sparsity_profile.hoyer(single)[0] == pytest.approx(1)
    assert sparsity_profile.participation(even)[0] == pytest.approx(1)
    assert sparsity_profile.participation(single)[0] == pytest.approx(1 / 50)


@pytest.mark.parametrize(("sparse", "least", "most"), [(True, 20, 20), (False, 0, 4)])
def test_planted_sparsity_is_special_and_a_rotation_of_nothing_is_not(sparse, least, most):
    """By chance 1 of 20 Gaussian ones is expected; more than 4 have a probability below 0.3 %."""
    n_supported = 0
    for seed in range(20):
        d = planted_recipes(seed, sparse)
        generator = torch.Generator().manual_seed(100 + seed)
        gauges = [gini(rotated(d, generator).codes.numpy()) for _ in range(N_GAUGES)]
        found = signals(Scores({"native": gini(d.codes.numpy())}, gauges), "tokens")
        n_supported += found["verdict"] == "supported"
    assert least <= n_supported <= most


def test_recipes_of_one_signal_are_sparser_than_in_any_other_dictionary(tmp_path, data):
    net = tiny(0)
    net = noise_and_one_entry(net, torch.arange(len(net.vocab.recipe)) % 16)
    report = sparsity_profile.run(open_lab(save_run(tmp_path / "run", net, data)))
    assert list(verdicts(report)) == list(sparsity_profile.CLAIMS)
    assert verdicts(report)["sparse"] == verdicts(report)["privileged"] == "supported"
    assert report.numbers["active"]["native"][3.0] == pytest.approx(1 / 16, abs=0.01)


def test_a_function_in_one_signal_survives_the_cut_and_does_not_in_rotations(tmp_path, data):
    """Words of the text share signal 0, so the model expects them."""
    net = silent(tiny(0))
    signal = torch.arange(len(net.vocab.recipe)) % 15 + 1
    signal[[token(word) for word in words()]] = 0
    net = noise_and_one_entry(net, signal)
    report = sparsity_profile.run(open_lab(save_run(tmp_path / "run", net, data)))
    claim = report["truncation"]
    assert report.numbers["loss"] < 8 < np.log(50257)
    assert report.numbers["loss_added"]["native"][2] == pytest.approx(claim.measured.value)
    assert claim.lower and claim.measured.value < 0.02
    assert claim.gauges.value > 0.2  # mean of 19 rotations; in some the signal is near an axis
    assert claim.beats_gauges and claim.verdict == "supported"


def test_a_cut_equals_a_model_with_other_recipes_and_keeping_half_costs_less(tmp_path, data):
    lab = open_lab(save_run(tmp_path / "run", tiny(0), data))
    losses, not_centred, whole = sparsity_profile.losses_of_cut_recipes(lab)
    assert list(losses) == [1, 2, 4, 8]  # of 16 signals
    assert [len(scores.gauges) for scores in losses.values()] == [2, N_GAUGES, 2, 2]
    x, y = lab.heldout(sparsity_profile.N_WINDOWS, sparsity_profile.WINDOW)
    assert whole == pytest.approx(hooks.token_losses(lab.model.net, x, y).mean(1).numpy(), abs=1e-5)
    native = lab.model.dictionary
    length = native.basis.norm(dim=1)
    shared = native.codes[lab.words.known_tokens()[:2000].copy()].median(0).values
    for k, subtracted, found in ((8, shared, losses[8]), (2, 0 * shared, not_centred)):
        cut = tiny(0)
        with torch.no_grad():
            codes = native.codes - subtracted
            smallest = codes.abs().argsort(1)[:, : 16 - k]
            codes = codes.scatter(1, smallest, 0.0) + subtracted
            cut.vocab.recipe[: len(codes)] = codes / length
        expected = hooks.token_losses(cut, x, y).mean(1).numpy()
        assert found.native == pytest.approx(expected, abs=1e-4)


def test_a_vector_that_all_rows_share_hides_no_sparsity(tmp_path, data):
    """Recipes of one entry each stay sparse, kurtotic and cheap to cut if E is shifted as a whole."""
    reports = []
    for shift in (0.0, 3.0):
        net = tiny(0)
        net = noise_and_one_entry(net, torch.arange(len(net.vocab.recipe)) % 16)
        with torch.no_grad():
            net.vocab.recipe += shift * torch.randn(16, generator=torch.Generator().manual_seed(2))
        reports.append(sparsity_profile.run(open_lab(save_run(tmp_path / f"{shift}", net, data))))
    same, shifted = reports
    assert verdicts(shifted)["sparse"] == verdicts(shifted)["privileged"] == "supported"
    assert shifted["privileged"].measured.value == pytest.approx(same["privileged"].measured.value, abs=1e-4)
    as_they_are = [report.numbers["row gini, not centred"]["native"] for report in reports]
    assert as_they_are[0] > as_they_are[1] + 0.1


def test_columns_of_unequal_size_are_not_sparse_recipes():
    """Gaussian rows of which one signal is ten times the others beat Gaussian rows, not such as they are."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 16)) * np.where(np.arange(16) == 0, 10.0, 1.0)
    random = sparsity_profile.random_rows(rows, rng)
    scores = Scores({"native": gini(rows)} | {name: gini(part) for name, part in random.items()})
    assert effect(scores, "tokens", ["gaussian"])["verdict"] == "supported"
    assert effect(scores, "tokens", ["gaussian, same covariance"])["verdict"] == "not supported"


def test_an_untrained_run_supports_nothing(tmp_path, data):
    """From the files to the verdicts, with the plain GPT beside: it is measured, but is no rival."""
    save_run(tmp_path / "dense", tiny(vocab="dense"), data)
    report = sparsity_profile.run(open_lab(save_run(tmp_path / "tiny", tiny(), data)))
    assert set(verdicts(report).values()) == {"not supported"}
    assert files_are_there(report)
    result = read_result(report.folder / "result.json")
    named = {"native", "rotated", "pca", "ica"}
    others = {"gaussian", "gaussian, same covariance", "laplace", "step 0", "noise", "baseline"}
    assert named | others == set(result.numbers["active"])
    assert "1.58" in result.numbers["active"]["gaussian"]
    assert named == set(result.numbers["loss_added"])
    assert set(result.claims[1].controls) == {"pca", "ica"}
    with open(report.folder / "rows.csv", encoding="utf-8") as f:
        rows = [row for row in csv.DictReader(f) if row["metric"] == "loss added"]
    assert {row["dictionary"] for row in rows} == named
    assert {row["n_signals"] for row in rows} == {"1", "2", "4", "8"}


def test_a_plain_model_supports_nothing_beyond_what_pca_and_ica_show(tmp_path, data):
    report = sparsity_profile.run(open_lab(save_run(tmp_path / "dense", tiny(2, vocab="dense"), data)))
    assert "supported" not in verdicts(report).values()
