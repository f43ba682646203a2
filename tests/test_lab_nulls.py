"""Null models: noise as long as the training; shuffled text of the run's own tokens, trained on once."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import checkpoint
from experiments.lab import Report, nulls
from tests.lab_fixtures import corpus, open_lab, save_run, tiny

HOW = {
    "batch_size": 64,
    "micro_batch_size": 16,
    "max_steps": 3,
    "warmup_steps": 1,
    "lr": 1e-2,
    "min_lr": 1e-3,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps, as if it had been trained on a corpus."""
    data = corpus(tmp_path_factory.mktemp("data"))
    return save_run(tmp_path_factory.mktemp("out") / "run", tiny(), data, step=3, **HOW)


@pytest.fixture(scope="module")
def lab(run):
    return open_lab(run)


def moved(subject, start):
    """{name: how far each weight is from the start, rows of the vocabulary one by one}."""
    origin = dict(start.net.named_parameters())
    found = {}
    for name, weight in subject.net.named_parameters():
        rows = {"dim": 1} if name.startswith("vocab.") and weight.dim() == 2 else {}
        found[name] = (weight - origin[name]).detach().norm(**rows)
    return found


def test_noise_moves_every_weight_as_far_as_training_did_in_another_direction(lab):
    trained, noise = moved(lab.model, lab.step0), moved(lab.noise, lab.step0)
    for name, length in trained.items():
        torch.testing.assert_close(noise[name], length, rtol=1e-3, atol=1e-5)
    change = (lab.model.net.vocab.recipe - lab.step0.net.vocab.recipe).flatten()
    other = (lab.noise.net.vocab.recipe - lab.step0.net.vocab.recipe).flatten()
    assert abs(torch.cosine_similarity(change, other, dim=0)) < 0.01


OTHERS = {
    "topk": {"top_k": 3},
    "gains": {"reinject": True},
    "sparse": {"n_signal": 24, "n_nonzero": 3, "n_core": 2},
    "dense": {},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_every_vocabulary_has_noise_and_frequencies(kind, tmp_path):
    """Also one whose weights are not all matrices: noise is as long, and the models compute something."""
    run = save_run(tmp_path / "run", tiny(vocab=kind, **OTHERS[kind]), corpus(tmp_path / "data"), step=3)
    lab = open_lab(run)
    trained, noise = moved(lab.model, lab.step0), moved(lab.noise, lab.step0)
    for name, length in trained.items():
        torch.testing.assert_close(noise[name], length, rtol=1e-3, atol=1e-5)
    for subject in (lab.noise, lab.frequencies):
        assert subject.net(torch.tensor([[1, 2, 3]]))[0].isfinite().all()


def test_frequencies_of_sparse_recipes_exchange_each_signals_entries_among_tokens_of_like_frequency(tmp_path):
    """How sparse recipes are stays; which signals a token has together does not."""
    vocab = {"vocab": "sparse", "n_signal": 24, "n_nonzero": 3, "n_core": 2}
    run = save_run(tmp_path / "run", tiny(**vocab), corpus(tmp_path / "data"), step=3)
    lab = open_lab(run)
    n = lab.model.net.config.n_tokens
    ours, theirs = (subject.net.vocab.recipes()[:n, :24].detach() for subject in (lab.model, lab.frequencies))
    assert (theirs.sort(0).values == ours.sort(0).values).all()
    octave = np.log2(np.maximum(lab.words.counts, 0.5)).astype(int)
    for i in np.unique(octave):
        part = torch.from_numpy(octave == i)
        assert (theirs[part].sort(0).values == ours[part].sort(0).values).all()
    both = ((ours != 0).float(), (theirs != 0).float())
    together, apart = ((part.T @ part).triu(1).sum() for part in both)
    assert ((ours != 0) & (theirs != 0)).float().mean() < 0.5 * (ours != 0).float().mean()
    assert apart != together, "rows have other numbers of entries"
    rows = lab.frequencies.net.vocab.basis, lab.noise.net.vocab.basis
    assert torch.equal(*rows), "the basis is the noise model's"


def test_shuffled_tokens_are_the_tokens_of_the_run_in_another_order():
    counts = np.array([3, 0, 2, 5])
    text = nulls.shuffled_tokens(counts, np.random.default_rng(0))
    assert np.bincount(text, minlength=4).tolist() == counts.tolist()
    assert (np.diff(text.astype(int)) < 0).any()


def test_a_run_has_three_nulls_and_trains_the_last_one_once(run, lab, monkeypatch):
    assert list(lab.nulls) == ["step 0", "noise", "shuffled text"]
    found = lab.nulls["shuffled text"]
    assert found.checkpoint.step == 3 and found.val_loss < lab.step0.net.config.rows
    assert found.checkpoint.run.parent == run / "nulls"
    start = checkpoint.load_model(found.checkpoint.run / "step_000000")[0]
    for name, weight in lab.step0.net.state_dict().items():
        assert torch.equal(weight, start.state_dict()[name]), name
    assert any(length.max() > 0 for length in moved(found, lab.step0).values())
    assert not list(run.glob("nulls/.*")), "what the training left behind"
    assert checkpoint.runs(run.parent) == [run], "the newest run is never a null model"

    monkeypatch.setattr(nulls, "train", None)  # a second lab must not train again
    again = open_lab(run, seed=1).shuffled_text
    assert torch.equal(again.E, found.E)


def test_a_run_that_cannot_be_written_keeps_its_null_in_the_cache(run, lab, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nulls.files, "why_unwritable", lambda folder: "Read-only file system")
    folders = []

    def train(folder, *rest):
        folders.append(folder)
        save_run(folder, tiny(2), tmp_path, step=3)

    monkeypatch.setattr(nulls, "train", train)
    found = nulls.shuffled_text(lab.checkpoint, lab.step0.net, lab.words.counts, tmp_path / "elsewhere")
    assert folders == [found.run] and found.run.parent == tmp_path / "reflow" / "nulls"


def test_what_cannot_be_trained_is_missing_and_the_report_says_why(run, lab, monkeypatch):
    state = lab.checkpoint.state
    unknown = replace(lab.checkpoint, state=state | {"config": state["config"] | {"train": {}}})
    untrained = replace(lab.checkpoint, state=state | {"step": 0})
    assert nulls.steps_of(lab.checkpoint) == (3, "")
    assert nulls.steps_of(unknown) == (0, "how the run was trained is not known")
    assert nulls.steps_of(untrained) == (0, "the run is untrained")
    long = replace(lab.checkpoint, state=state | {"step": 10**9})
    steps, _ = nulls.steps_of(long)
    assert nulls.LEAST_STEPS < steps < 10**9
    monkeypatch.setattr(nulls, "BUDGET", 1e9)
    assert nulls.steps_of(long)[0] == 0 and "need more than 1e+09" in nulls.steps_of(long)[1]
    fresh = open_lab(run)
    assert list(fresh.nulls) == ["step 0", "noise", "frequencies"]
    assert fresh.about_nulls()["shuffled text"].startswith("missing: ")
    report = Report(fresh, "template", {})
    assert list(fresh.nulls) == ["step 0", "noise", "frequencies"]
    assert report.numbers["nulls"] == fresh.about_nulls()
    assert len(report.notes) == 1 and "shuffled text" in report.notes[0]


def test_frequencies_keep_what_counts_tell_of_rows_and_nothing_else(lab):
    """Of rows that are a plant of log count plus a part of each token's own, the plant alone comes back."""
    counts = lab.words.counts
    generator = torch.Generator().manual_seed(0)
    log_count = torch.from_numpy(np.log(np.maximum(counts, 0.5))).float()
    trained = copy.deepcopy(lab.model.net)
    own = torch.randn(len(counts), trained.vocab.recipe.size(1), generator=generator)
    plant = 3 + torch.outer(log_count, torch.linspace(-1, 1, own.size(1)))
    trained.vocab.recipe.data[: len(counts)] = plant + own
    found = nulls.frequencies(lab.noise.net, trained, counts, generator)
    left = found.vocab.recipe.detach()[: len(counts)] - plant
    assert abs(torch.cosine_similarity(left.flatten(), own.flatten(), dim=0)) < 0.02
    torch.testing.assert_close(left.norm(dim=1).mean(), own.norm(dim=1).mean(), rtol=0.02, atol=0)
    assert torch.equal(found.vocab.basis, lab.noise.net.vocab.basis)
    assert all(map(torch.equal, found.blocks.parameters(), lab.noise.net.blocks.parameters()))


def test_a_run_cut_short_warms_up_for_the_same_share_of_its_steps_under_its_own_optimiser(lab):
    state = lab.checkpoint.state
    train = state["config"]["train"] | {"max_steps": 1000, "warmup_steps": 100, "optimizer": "muon"}
    long = replace(lab.checkpoint, state=state | {"step": 1000, "config": state["config"] | {"train": train}})
    settings = nulls.settings_of(long, 250)
    assert settings["max_steps"] == 250 and settings["warmup_steps"] == 25 and settings["lr"] == 1e-2
    assert settings["optimizer"] == "muon"
