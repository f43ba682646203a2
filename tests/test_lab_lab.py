"""The lab of a run: its controls are what they say, and its words and text are those of the run."""

import json
import shutil
import weakref

import numpy as np
import pytest
import torch

import checkpoint
import dictionary
from configurator import UserError
from data.shards import Dataset
from experiments.lab import LabConfig
from experiments.lab.probes import categories
from formats.release import write_release
from tests.lab_fixtures import corpus, open_lab, save_run, tiny, token


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny factored run with a dense one beside it, and the text of both."""
    out = tmp_path_factory.mktemp("out")
    data = corpus(tmp_path_factory.mktemp("data"))
    save_run(out / "dense", tiny(vocab="dense"), data)
    return save_run(out / "tiny", tiny(), data)


@pytest.fixture(scope="module")
def lab(run):
    return open_lab(run)


# -- models


def test_the_lab_finds_its_controls(lab, run):
    assert lab.baseline.net.config.vocab == "dense"
    assert not torch.equal(lab.step0.E, lab.model.E)
    kept = lab.shuffled.E.sort(0).values
    assert torch.allclose(kept, lab.model.E.sort(0).values, atol=1e-6)  # the same rows, elsewhere
    assert (lab.shuffled.E != lab.model.E).any(1).float().mean() > 0.9
    assert open_lab(run.parent / "dense").model.dictionary.atoms.equal(torch.eye(16))
    names = [subject.name for subject in (*lab.subjects, lab.shuffled)]
    assert names == ["reflow", "baseline", "step 0", "shuffled"]


def test_the_shuffled_model_differs_in_its_embedding_alone(lab):
    net = lab.shuffled.net
    assert net.blocks is lab.model.net.blocks
    assert torch.equal(net.vocab.matrix(), lab.shuffled.E)


def test_shuffled_recipes_stay_among_like_frequencies(lab):
    """A token seen 8 to 15 times gets the recipe of another such token."""
    counts = lab.words.counts
    part = torch.from_numpy(np.flatnonzero((counts >= 8) & (counts < 16)))
    rows, moved = (s.dictionary.codes[part].double() for s in (lab.model, lab.shuffled))
    assert len(part) > 50 and torch.cdist(moved, rows).amin(1).max() < 1e-4


def test_the_baseline_is_taken_at_the_step_of_the_run(tmp_path):
    """The best checkpoints of two finished runs may be of different steps; models of one step compare."""
    data = corpus(tmp_path / "data", repeats=1)
    run = save_run(tmp_path / "factored", tiny(), data, step=1)
    dense = save_run(tmp_path / "dense", tiny(vocab="dense"), data, step=2)
    assert open_lab(run).baseline is None
    same = dense / "step_000001"
    shutil.copytree(dense / "step_000002", same)
    state = json.loads((same / "state.json").read_text())
    (same / "state.json").write_text(json.dumps(state | {"step": 1}))
    assert checkpoint.find(dense).name == "step_000002"
    assert open_lab(run).baseline.checkpoint.path == same


def test_an_imported_run_has_no_baseline_of_its_own_and_no_advice_to_train_one(tmp_path, capsys):
    """A model of the same shape beside it may be the same model; one that is named counts."""
    data = corpus(tmp_path / "data")
    imported = {"imported_from": "elsewhere"}
    run = save_run(tmp_path / "run", tiny(), data, step=0, **imported)
    dense = save_run(tmp_path / "dense", tiny(vocab="dense"), data, step=0, **imported)
    lab = open_lab(run)
    assert lab.baseline is None and not capsys.readouterr().out
    assert list(lab.nulls) == ["step 0", "noise", "frequencies"] and lab.words.where != "training"
    assert open_lab(run, dense).baseline.checkpoint.run == dense


def test_a_baseline_of_ones_own_must_be_a_plain_gpt_of_the_same_shape(tmp_path):
    data = corpus(tmp_path / "data", repeats=1)
    run = save_run(tmp_path / "run", tiny(), data)
    other = save_run(tmp_path / "other", tiny(1), data)
    wide = save_run(tmp_path / "wide" / "dense", tiny(vocab="dense", n_embd=32), data)
    good = save_run(tmp_path / "elsewhere" / "dense", tiny(vocab="dense"), data)
    assert open_lab(run, good).baseline.checkpoint.run == good
    for baseline, fault in ((other, "its vocabulary is factored"), (wide, "n_embd is 32, not 16")):
        with pytest.raises(UserError, match=fault):
            _ = open_lab(run, baseline).baseline


# -- dictionaries


def test_compare_measures_native_its_rotations_pca_and_ica(lab):
    """Every dictionary gives the logits of the same model; their codes differ."""
    h = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    found = lab.compare(lambda d: {"logits": d.activations(h) @ d.codes.T, "first": d.codes[:5, 0]})
    logits = found["logits"]
    assert list(logits) == ["native", "pca", "ica"] and logits.gauges.shape == (19, 4, 50257)
    for values in (*logits.rivals.values(), *logits.gauges):
        assert np.abs(values - logits.native).max() < 1e-3
    assert len(np.unique(found["first"].gauges.round(6), axis=0)) == 19
    assert logits.gauge == "rotation"


def test_one_random_dictionary_is_in_memory_at_a_time(lab):
    """Each is gone before the next but one is measured: a large vocabulary has room for two."""
    seen = []

    def measure(d):
        alive = [ref for ref in seen if ref() is not None and ref().name == "rotated"]
        assert len(alive) <= 1
        seen.append(weakref.ref(d))
        return d.codes[:5, 0]

    assert len(lab.compare(measure, n_gauges=30).gauges) == 30


def test_compare_of_some_tokens_is_that_part_of_the_whole(lab):
    tokens = np.array([11, 7, 300])
    whole = lab.compare(lambda d: d.codes[tokens], change=dictionary.skewed)
    part = lab.compare(lambda d: d.codes, tokens=tokens, change=dictionary.skewed)
    assert part.gauge == "skewed"
    assert np.abs(part.gauges - whole.gauges).max() < 1e-5
    for name, values in whole.items():
        assert np.abs(part[name] - values).max() < 1e-5, name


def test_compare_measures_another_model(lab):
    found = lab.compare(lambda d: d.matrix()[:10], subject=lab.baseline)
    expected = lab.baseline.E[:10].numpy()
    assert all(np.abs(values - expected).max() < 1e-4 for values in (*found.values(), *found.gauges))


def test_random_choices_depend_on_the_seed_and_the_key_alone(run, lab):
    again = open_lab(run)
    other = open_lab(run, seed=1)
    assert lab.rng("a").random() == again.rng("a").random()
    assert lab.rng("a").random() not in (lab.rng("b").random(), other.rng("a").random())
    first, same, different = (next(x.gauges(x.model.dictionary)).codes for x in (lab, again, other))
    assert torch.equal(first, same) and not torch.allclose(first, different, atol=1e-3)


# -- words and text


def test_counts_are_of_the_training_text(lab):
    assert lab.words.counts.sum() > 10_000
    assert lab.words.known("king") == token("king")
    assert lab.words.known("antidisestablishmentarianism") is None
    assert lab.words.known("zebra", least=10**6) is None
    assert min(len(ids) for ids in categories(lab).values()) >= 4


def test_heldout_windows_are_followed_by_their_next_tokens(lab):
    x, y = lab.heldout(5, 20)
    assert x.shape == (5, 20) and torch.equal(x[:, 1:], y[:, :-1])


def test_a_release_brings_its_counts(tmp_path, capsys):
    """Where the training text is gone, words are still known by what the model was trained on."""
    data = corpus(tmp_path / "data", repeats=8)
    run = save_run(tmp_path / "run", tiny(), data)
    state = run / "step_000001" / "state.json"
    sha = Dataset(data, "val", 1).data_sha256
    checkpoint.write_atomically(state, json.dumps(json.loads(state.read_text()) | {"data_sha256": sha}))
    write_release(checkpoint.open_run(run), tmp_path / "release", "fp16")
    expected = open_lab(run).words.counts
    assert expected.sum() > 1000
    assert (open_lab(tmp_path / "release").words.counts == expected).all()
    shutil.rmtree(data)
    released = checkpoint.open_run(tmp_path / "release")
    write_release(released, tmp_path / "again", "fp16")  # a release of a release keeps them
    again = open_lab(tmp_path / "again")
    assert (again.words.counts == expected).all()
    assert again.text.name == "sotu"
    assert "text from data/sotu" in capsys.readouterr().err
    assert (open_lab(run).words.counts != expected).any()  # without a release: the embedded corpus


def test_a_seed_that_cannot_seed_is_refused():
    with pytest.raises(ValueError, match="seed=-1: must satisfy 0 <= seed"):
        LabConfig(seed=-1)
