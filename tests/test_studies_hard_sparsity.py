"""Hard sparsity: the cut, pairing by seed, and verdicts that fail on untrained models."""

import pytest
import torch

from configurator import UserError
from dictionary import Dictionary
from experiments.lab import Subject
from experiments.lab.results import read_result
from experiments.studies import hard_sparsity
from tests.lab_fixtures import corpus, tiny
from tests.studies_fixtures import open_study, save_trained


def test_the_positive_cut_is_what_the_topk_model_keeps():
    net = tiny(vocab="topk", top_k=3)
    free = Dictionary("native", net.vocab.recipe.detach(), torch.eye(16))
    cut = hard_sparsity.cut_models(Subject("reflow", net, dictionary=free), 3, {})
    assert torch.equal(cut["positive"].vocab.matrix(), net.vocab.recipes().detach())


def test_a_cut_keeps_k_entries_of_every_rival():
    """Kept whole (k = S), every dictionary of one E gives the model back; k = 1 leaves one atom a token."""
    torch.manual_seed(0)
    net = tiny()
    subject = Subject("reflow", net)
    q = torch.linalg.qr(torch.randn(16, 16)).Q
    rival = Dictionary("pca", subject.dictionary.codes @ q, q.T @ subject.dictionary.atoms)
    whole = hard_sparsity.cut_models(subject, 16, {"pca": rival})
    assert torch.allclose(whole["by size"].vocab.matrix(), subject.E, atol=1e-6)
    assert torch.allclose(whole["pca"].vocab.matrix(), subject.E, atol=1e-6)
    one = hard_sparsity.cut_models(subject, 1, {"pca": rival})["pca"].vocab.matrix()  # (V, d)
    along = (one[:100] @ rival.atoms.pinverse()).abs() > 1e-4
    assert (along.sum(1) == 1).all()


def save_study(folder):
    """Three seeds of untrained models of both kinds."""
    data = corpus(folder / "data", repeats=6)
    for seed in range(3):
        factored, topk = tiny(seed), tiny(seed, vocab="topk", top_k=2)
        save_trained(folder / "runs" / f"factored{seed}", factored, data, seed, 5.1 + 0.01 * seed)
        save_trained(folder / "runs" / f"topk{seed}", topk, data, seed, 5.5 + 0.01 * seed)


def test_from_files_to_a_result(tmp_path, monkeypatch):
    """Losses are compared by seed; every claim about meaning fails on untrained models."""
    monkeypatch.setattr(hard_sparsity, "N_WINDOWS", 20)
    monkeypatch.setattr(hard_sparsity, "WINDOW", 8)
    save_study(tmp_path)
    hard_sparsity.run(open_study(f"{tmp_path}/runs/*", tmp_path / "results")).save()
    result = read_result(tmp_path / "results" / "experiments" / "hard_sparsity" / "result.json")
    claims = {claim.key: claim for claim in result.claims}
    assert list(claims) == list(hard_sparsity.CLAIMS)
    assert claims["loss"].measured.value == pytest.approx(5.1 / 5.5 - 1, abs=1e-3)
    assert claims["loss"].verdict == "supported"
    assert claims["categories"].verdict == claims["analogies"].verdict == "not supported"
    assert set(claims["trained_beats_cut"].controls) == {
        f"cut, {n}" for n in ("by size", "positive", "pca", "ica")
    }
    assert result.numbers["loss"]["topk"] == pytest.approx([5.5, 5.51, 5.52])
    with pytest.raises(UserError, match="no top-k and factored runs"):
        hard_sparsity.run(open_study(f"{tmp_path}/runs/topk*", tmp_path))
