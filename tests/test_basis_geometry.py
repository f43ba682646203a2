"""basis_geometry: planted movement and axes are found, verdicts that fail where there is nothing to find."""

import numpy as np
import pytest
import torch

import dictionary
from configurator import UserError
from experiments import basis_geometry
from experiments.lab.claims import Scores, effect
from experiments.lab.stats import two_sided
from model import ReFlow
from tests.lab_fixtures import corpus, open_lab, save_run, tiny
from tests.spaces_fixtures import files_are_there, open_planted, verdicts

START = 999  # seed of the step 0 that a planted model has moved from


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus") / "words", repeats=10)


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    return open_planted(tmp_path_factory.mktemp("geometry"))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(basis_geometry, "TOKENS", 300)


def test_independent_movement_has_the_share_of_chance_and_is_rarely_supported():
    rng = np.random.default_rng(0)
    n_supported = 0
    for _ in range(20):
        alone = basis_geometry.shared_movement(rng.standard_normal((40, 48)), rng)
        other = basis_geometry.shared_movement(rng.standard_normal((40, 48)), rng)
        found = effect(Scores({"native": alone, "alone": other}), "signals")
        n_supported += found["verdict"] == "supported"
        assert alone.mean() == pytest.approx(1 / 16, abs=0.025)
    assert n_supported <= 3


def test_movement_in_common_directions_is_all_shared_and_none_without_movement():
    rng = np.random.default_rng(0)
    common = rng.standard_normal((40, 2)) @ rng.standard_normal((2, 48))
    assert basis_geometry.shared_movement(common, rng).min() > 0.999
    assert basis_geometry.shared_movement(np.zeros((40, 48)), rng).max() == 0


def test_two_sided_p_is_exact():
    values = np.random.default_rng(0).standard_normal((4000, 20))
    p = np.array([two_sided(row[0], row[1:]) for row in values])
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.015)
    assert two_sided(-9, np.linspace(-1, 1, 19)) == pytest.approx(0.05)
    assert two_sided(0.0, np.linspace(-1, 1, 19)) == 1


def moved_and_sparse():
    """A model of 64 signals in width 32: three entries a recipe, a basis that moved along one direction."""
    net = tiny(1, n_embd=32, n_signal=64)
    torch.manual_seed(START)
    start = ReFlow(net.config)
    rng = np.random.default_rng(1)
    recipes = torch.zeros(net.vocab.recipe.shape)
    columns = torch.from_numpy(rng.random(recipes.shape).argsort(1)[:, :3])
    recipes.scatter_(1, columns, torch.from_numpy(rng.standard_normal(columns.shape)).float())
    push = torch.from_numpy(0.1 * rng.standard_normal((64, 1)) * rng.standard_normal(32)).float()
    with torch.no_grad():
        net.vocab.recipe.copy_(recipes)
        net.vocab.basis.copy_(start.vocab.basis + push)
    return net


def test_a_privileged_basis_that_training_moved_is_found(tmp_path, text):
    report = basis_geometry.run(open_lab(save_run(tmp_path / "run", moved_and_sparse(), text, start=START)))
    assert verdicts(report) == {"movement": "supported", "privileged": "supported"}
    assert set(report["movement"].controls) == {"moved independently", "noise"}
    assert report["privileged"].n_gauges == 99 and report["privileged"].p == pytest.approx(0.01)
    assert report.numbers["row_kurtosis"]["reflow"]["p_two_sided"] == pytest.approx(0.01)
    assert 0.2 < report.numbers["shape"]["basis"]["energy unseen"] < 0.8
    assert any("Too few tokens" in note for note in report.notes) and "recovered" not in report.numbers
    assert report.numbers["signals"] == 64 and report.numbers["n_embd"] == 32


def test_without_ica_the_experiment_goes_on_and_its_signals_claim_is_open(tmp_path, text, monkeypatch):
    """A rival that cannot be found was not beaten; all else is decided and drawn."""

    def fail(E, fit, seed):
        raise UserError("ICA of this embedding failed: no luck")

    monkeypatch.setattr(dictionary, "ica", fail)
    report = basis_geometry.run(open_lab(save_run(tmp_path / "run", moved_and_sparse(), text, start=START)))
    assert verdicts(report) == {"movement": "supported", "privileged": "inconclusive"}
    assert "ica is missing: ICA of this embedding failed: no luck" in report["privileged"].reason
    assert report["privileged"].beats_gauges and "no luck" in report.numbers["fit of ICA"]["reflow"]
    assert files_are_there(report)


def test_how_ica_went_is_in_the_numbers(tmp_path, text):
    report = basis_geometry.run(open_lab(save_run(tmp_path / "run", moved_and_sparse(), text, start=START)))
    fit = report.numbers["fit of ICA"]["reflow"]
    assert fit["rows"] == len(report.lab.words.known_tokens()) and fit["threads"] == 1
    assert isinstance(fit["converged"], bool) and fit["reconstruction error"] < 1e-4


def test_without_its_own_start_a_run_shows_no_movement(tmp_path, text):
    folder = save_run(tmp_path / "run", tiny(3, n_embd=32), text)
    (folder / "step_000000").rename(tmp_path / "elsewhere")
    report = basis_geometry.run(open_lab(folder))
    assert verdicts(report) == {"movement": "inconclusive", "privileged": "not supported"}
    assert report["movement"].reason == "the run has no step 0 of its own"


def test_the_plain_model_is_measured_in_its_own_rotations_and_is_no_rival(tmp_path, text):
    save_run(tmp_path / "dense", tiny(4, n_embd=32, vocab="dense"), text)
    report = basis_geometry.run(open_lab(save_run(tmp_path / "run", tiny(3, n_embd=32), text)))
    assert set(report["privileged"].controls) == {"pca", "ica"}
    baseline = report.numbers["row_kurtosis"]["baseline"]
    assert len(baseline["rotations"]) == 99 and 0.01 <= baseline["p_two_sided"] <= 1
    assert "E, baseline" in report.numbers["shape"]


@pytest.mark.parametrize("name", ["untrained", "dense"])
def test_no_verdict_is_positive_where_there_is_nothing_to_find(labs, name):
    """An untrained model, and a plain GPT, whose basis is the identity."""
    report = basis_geometry.run(labs(name))
    assert report["privileged"].verdict == "not supported"
    assert report["movement"].verdict in ("not supported", "inconclusive")  # step 0 itself has not moved
    assert files_are_there(report)
