"""The basis: measurements by hand, planted structure, verdicts that fail on an untrained model."""

import numpy as np
import pytest
import torch

from experiments import basis_geometry, lab
from model import ReFlow
from tests.lab_fixtures import corpus, open_lab, save_run, tiny

# -- planted models


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus") / "words", repeats=10)


def start_of(net):
    """The step 0 that `save_run` gives to a run of this model."""
    torch.manual_seed(999)
    return ReFlow(net.config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    made["untrained"] = save_run(folder / "untrained", tiny(3, n_embd=32, n_signal=32), text, step=0)
    made["dense"] = save_run(folder / "dense", tiny(4, n_embd=32, vocab="dense"), text)
    laboratories = {}

    def get(name):
        if name not in laboratories:
            laboratories[name] = open_lab(made[name])
            laboratories[name].__dict__["baseline"] = None
        return laboratories[name]

    return get


EXPERIMENTS = (basis_geometry,)
DRAWN = [(basis_geometry, "figures")]


@pytest.fixture
def small(monkeypatch):
    """Fewer permutations, questions and words."""
    monkeypatch.setattr(basis_geometry, "TOKENS", 300)


@pytest.fixture
def quick(small, monkeypatch):
    """The same, and no figures."""
    for module, name in DRAWN:
        monkeypatch.setattr(module, name, lambda *_: None)


def verdicts(report):
    return [(c.kind, c.verdict) for c in report.claims]


# -- basis_geometry


def test_spectrum_and_ranks():
    x = torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = basis_geometry.spectrum(x)
    assert s == pytest.approx(torch.linalg.svdvals(x).numpy())
    assert basis_geometry.spectrum(x.T) == pytest.approx(s)
    even = basis_geometry.ranks(basis_geometry.spectrum(torch.eye(5, dtype=torch.float64)))
    expected = {"rank": 5, "effective rank": 5, "stable rank": 5, "condition number": 1}
    assert even == pytest.approx(expected)
    low = x[:, :2] @ torch.randn(2, 7, dtype=torch.float64)
    assert basis_geometry.ranks(basis_geometry.spectrum(low))["rank"] == 2


def test_coherence_meets_welch_for_an_even_frame():
    angles = torch.tensor([0.0, 2, 4]) * torch.pi / 3  # three directions at 120 degrees
    frame = torch.stack([angles.cos(), angles.sin()], 1)
    assert basis_geometry.coherences(frame) == pytest.approx(basis_geometry.welch(3, 2), abs=1e-6)
    assert basis_geometry.welch(3, 4) == 0


def test_gradient_flow_conserves_the_balance():
    generator = torch.Generator().manual_seed(0)
    shapes = ((30, 6), (6, 5), (30, 5))
    recipes, basis, target = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in shapes)
    error = recipes @ basis - target
    moved = recipes - 1e-6 * error @ basis.T, basis - 1e-6 * recipes.T @ error
    pairs = zip(basis_geometry.balance(*moved), basis_geometry.balance(recipes, basis), strict=True)
    changes = [after - before for after, before in pairs]
    assert basis_geometry.imbalance(*changes) < 1e-3
    assert basis_geometry.imbalance(changes[0], -changes[1]) == pytest.approx(1, abs=1e-3)


def test_energy_that_E_never_sees():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64, generator=generator)).Q  # S = 8, d = 3
    recipes = torch.randn(5000, 8, dtype=torch.float64, generator=generator)
    assert basis_geometry.unseen(recipes, basis) == pytest.approx(5 / 8, abs=0.02)
    assert basis_geometry.unseen(recipes @ basis @ basis.T, basis) == pytest.approx(0, abs=1e-12)
    assert basis_geometry.unseen(recipes[:, :3], basis.T[:, :3].contiguous()) == pytest.approx(0, abs=1e-12)


def test_where_the_basis_is_orthonormal_recipe_cosines_are_those_of_E():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(9, 6, dtype=torch.float64, generator=generator)).Q.T  # (6, 9)
    recipes = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    assert basis_geometry.anisotropy(2 * basis) < 1e-12
    assert basis_geometry.agreement(recipes, recipes @ basis) == pytest.approx((1, 0))
    assert basis_geometry.anisotropy(basis * torch.arange(1, 7)[:, None]) > 0.3


def test_movement_in_common_directions_and_alone():
    rng, found = np.random.default_rng(0), 0
    for _ in range(20):
        alone, other = (basis_geometry.shared_movement(rng.standard_normal((40, 48)), rng) for _ in "ab")
        found += lab.effect("", alone, {"alone": other}, "signals").verdict == "supported"
        assert alone.mean() == pytest.approx(1 / 16, abs=0.025)
    assert found <= 3
    common = rng.standard_normal((40, 2)) @ rng.standard_normal((2, 48))
    assert basis_geometry.shared_movement(common, rng).min() > 0.999
    assert basis_geometry.shared_movement(np.zeros((40, 48)), rng).max() == 0


def test_two_sided_p_is_exact():
    values = np.random.default_rng(0).standard_normal((4000, 20))
    p = np.array([basis_geometry.two_sided(v[0], v[1:]) for v in values])
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.015)
    assert basis_geometry.two_sided(-9, np.linspace(-1, 1, 19)) == pytest.approx(0.05)
    assert basis_geometry.two_sided(0.0, np.linspace(-1, 1, 19)) == 1


def test_geometry_finds_a_privileged_basis_that_training_moved(tmp_path, text, quick):
    net = tiny(1, n_embd=32, n_signal=64)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        sparse = torch.zeros(len(net.vocab.recipe), 64)
        columns = torch.from_numpy(rng.random(sparse.shape).argsort(1)[:, :3])
        sparse.scatter_(1, columns, torch.from_numpy(rng.standard_normal(columns.shape)).float())
        net.vocab.recipe.copy_(sparse)
        push = torch.from_numpy(0.1 * rng.standard_normal((64, 1)) * rng.standard_normal(32)).float()
        net.vocab.basis.copy_(start_of(net).vocab.basis + push)
    laboratory = open_lab(save_run(tmp_path / "run", net, text))
    laboratory.__dict__["baseline"] = None
    report = basis_geometry.run(laboratory)
    assert verdicts(report) == [("effect", "supported"), ("signals", "supported")]
    assert report.numbers["row_kurtosis"]["reflow"]["p_two_sided"] == pytest.approx(0.05)
    assert 0.2 < report.numbers["shape"]["basis"]["energy unseen"] < 0.8


def test_without_its_own_start_a_run_shows_no_movement(tmp_path, text, quick):
    net = tiny(3, n_embd=32)
    folder = save_run(tmp_path / "run", net, text)
    (folder / "step_000000").rename(tmp_path / "elsewhere")
    laboratory = open_lab(folder)
    laboratory.__dict__["baseline"] = None
    report = basis_geometry.run(laboratory)
    assert verdicts(report) == [("effect", "inconclusive"), ("signals", "not supported")]


# -- all four where there is nothing to find


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.__name__.split(".")[-1])
def test_no_verdict_is_positive_before_training(runs, small, experiment):
    report = experiment.run(runs("untrained"))
    assert {verdict for _, verdict in verdicts(report)} == {"not supported"}
    report.save()
    assert all((report.folder / figure["file"]).exists() for figure in report.figures)
    assert report.figures and (report.folder / "rows.csv").exists()


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.__name__.split(".")[-1])
def test_a_dense_model_runs_too(runs, quick, experiment):
    report = experiment.run(runs("dense"))
    assert {verdict for _, verdict in verdicts(report)} == {"not supported"}
