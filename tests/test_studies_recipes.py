"""Recipes of a dense model: learned atoms find what is planted, rivals share all else; autoencoders learn."""

import numpy as np
import pytest
import torch

import dictionary
from configurator import UserError
from experiments.lab import Lab, LabConfig, sae
from experiments.studies import recipes
from tests.lab_fixtures import averaging, corpus, save_run, tiny


def planted(n, n_atoms, d, k, seed):
    """(rows (n, d), atoms): rows of k positive codes each."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(n_atoms, d, generator=generator), dim=1)
    codes = torch.zeros(n, n_atoms)
    places = torch.rand(n, n_atoms, generator=generator).topk(k).indices
    codes.scatter_(1, places, 1 + torch.rand(n, k, generator=generator))
    return codes @ atoms, atoms


def test_an_autoencoder_finds_planted_atoms_and_does_not_depend_on_the_state_of_random_numbers():
    """Scale and mean of the rows are those of the data: what it gives back is close to them."""
    rows, atoms = planted(4000, 24, 32, 3, 0)
    rows = 7 * rows + 2
    before = torch.random.get_rng_state()
    found = sae.train(rows, torch.ones(4000), 24, 3, steps=1500, batch=256, lr=3e-3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert dictionary.partners(atoms, found.atoms.detach()).mean() > 0.9
    missed = (rows - found(rows)).square().sum() / (rows - rows.mean(0)).square().sum()
    assert missed < 0.1 and (found.codes(rows) > 0).sum(1).max() <= 3
    again = sae.train(rows, torch.ones(4000), 24, 3, steps=5, batch=256, seed=1)
    other = sae.train(rows, torch.ones(4000), 24, 3, steps=5, batch=256, seed=1)
    assert torch.equal(again.atoms, other.atoms)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A dense run with planted recipes in a small vocabulary, and its text."""
    folder = tmp_path_factory.mktemp("dense")
    net = averaging(tiny(vocab="dense", n_embd=16), 0)
    rows, _ = planted(len(net.vocab.weight), 24, 16, 2, 1)
    net.vocab.weight.data = rows
    return save_run(folder / "run", net, corpus(folder / "text", repeats=8))


def test_the_study_at_toy_size(run, monkeypatch):
    """Every rival has every budget; with its planted atoms the model is nearer than with random ones."""
    monkeypatch.setattr(recipes.recoding, "SAMPLE", 1000)
    monkeypatch.setattr(recipes, "NMF_ROWS", 400)
    options = {"tokens": 1024, "budgets": "1,2", "n_signal": 24, "starts": 1, "rounds": 15, "windows": 20}
    c = recipes.RecipesConfig(**options, length=16, steps=50)
    report = recipes.run(Lab(LabConfig(run=str(run), device="cpu", dtype="fp32")), c)
    kl = report.numbers["KL"]
    assert set(kl) == {"1 entries", "2 entries"}
    most = kl["2 entries"]
    names = {"native", "tokens", "Gaussian", "autoencoder", "NMF", "PCA", "coordinates"}
    assert set(most) >= names
    assert most["native"] < 0.9 * min(most["Gaussian"], most["PCA"], most["coordinates"])
    assert report["learned"].n == 20 and report["halves"].n == 24
    rows = [row for row in report.rows if row["metric"] == "missed"]
    assert len(rows) == 2 * len(most) and all(0 <= row["value"] <= 1 for row in rows)
    explained = [row["value"] for row in report.rows if row["metric"] == "explained"]
    assert 0.8 < max(explained) <= 1 and np.isfinite(explained).all()
    cards = report.numbers["gallery"]
    assert set(cards) == {"strongest", "most alike in two halves", "random"}
    strongest = [card["energy"] for card in cards["strongest"]]
    assert strongest == sorted(strongest, reverse=True) and len(strongest) == recipes.N_SHOWN
    alike = [card["alike"] for card in cards["most alike in two halves"]]
    assert min(alike) >= np.median([card["alike"] for card in cards["random"]])
    assert all(card["tokens"]["high"] or card["tokens"]["low"] for card in cards["strongest"])
    assert all(len(card["contexts"]) == recipes.N_CONTEXTS for card in cards["random"])
    entries = report.numbers["examples"]["king"]
    assert all(entry["code"] for entry in entries) and sum(e["share"] for e in entries) == pytest.approx(1)


@pytest.mark.parametrize(("argument", "match"), [("--budgets=", "give numbers"), ("--rounds=0", "rounds")])
def test_bad_options_are_refused(argument, match):
    import configurator

    with pytest.raises(UserError, match=match):
        configurator.parse(recipes.RecipesConfig, argv=[argument])


def test_a_factored_model_is_refused(tmp_path):
    run = save_run(tmp_path / "run", tiny(), corpus(tmp_path / "text", repeats=1))
    lab = Lab(LabConfig(run=str(run), device="cpu"))
    with pytest.raises(UserError, match="vocabulary factored: only a dense one"):
        recipes.run(lab, recipes.RecipesConfig())
