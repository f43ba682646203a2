"""The lab: dictionaries are exact, interventions do what they say, verdicts err as rarely as stated."""

import json
import shutil

import numpy as np
import pytest
import torch
from lab_fixtures import corpus, open_lab, save_run, tiny, token

import checkpoint
import export
from configurator import UserError
from data.shards import Dataset
from experiments import lab


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tiny factored run with a dense one beside it, and the text of both."""
    out = tmp_path_factory.mktemp("out")
    data = corpus(tmp_path_factory.mktemp("data"))
    save_run(out / "dense", tiny(vocab="dense"), data)
    return save_run(out / "tiny", tiny(), data)


@pytest.fixture(scope="module")
def room(runs):
    return open_lab(runs)


# -- dictionaries


@pytest.mark.parametrize("shape", [{}, {"n_signal": 8}, {"n_signal": 24}, {"vocab": "topk", "top_k": 4}])
def test_every_dictionary_is_the_same_embedding(shape):
    """codes @ atoms = E: the learned dictionary, rotated, skewed, PCA, ICA; also when S is not d."""
    net = tiny(**shape)
    E = net.vocab.matrix().detach()[: net.config.n_tokens]
    own = lab.native(net)
    generator = torch.Generator().manual_seed(0)
    fit = torch.arange(500)
    others = [lab.rotated(own, generator), lab.skewed(own, generator), lab.pca(E, fit), lab.ica(E, fit)]
    for d in (own, *others):
        assert torch.allclose(d.codes @ d.atoms, E, atol=2e-5), d.name
        assert torch.allclose(d.atoms.norm(dim=1), torch.ones(len(d.atoms)), atol=1e-4), d.name


def test_a_rotation_keeps_cosines_and_a_skewed_one_does_not():
    net = tiny()
    net.vocab.basis.data = torch.linalg.qr(net.vocab.basis.data).Q  # orthonormal, so that atoms are the basis
    own, generator = lab.native(net), torch.Generator().manual_seed(0)

    def cosines(d):
        unit = torch.nn.functional.normalize(d.codes[:50], dim=1)
        return unit @ unit.T

    # Lengths of rotated atoms are one again, because the atoms were orthonormal.
    assert torch.allclose(cosines(lab.rotated(own, generator)), cosines(own), atol=1e-5)
    assert (cosines(lab.skewed(own, generator)) - cosines(own)).abs().max() > 0.1


def test_ica_that_degenerates_is_fitted_again_or_refused(monkeypatch):
    """In fp32 FastICA may end near a singular matrix without a word: that is no dictionary of E."""
    from sklearn.decomposition import FastICA

    whole, E = FastICA.fit, tiny().vocab.matrix().detach()

    def fit(bad):
        def degenerate(self, x):
            whole(self, x)
            if x.dtype in bad:
                self.components_[0] = self.components_[1] * (1 + 1e-9)

        return degenerate

    monkeypatch.setattr(FastICA, "fit", fit([np.float32]))
    found = lab.ica(E, torch.arange(4000))
    assert torch.allclose(found.codes @ found.atoms, E, atol=1e-5)
    monkeypatch.setattr(FastICA, "fit", fit([np.float32, np.float64]))
    with pytest.raises(UserError, match="ICA of this embedding failed"):
        lab.ica(E, torch.arange(4000))


def test_ica_finds_planted_independent_signals():
    """Sparse independent codes behind a random mixture: ICA's atoms are the planted ones."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(4000, 12, generator=generator) ** 3
    atoms = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    planted = lab.Dictionary("native", codes, atoms)
    found = lab.ica(codes @ atoms, torch.arange(4000))
    match = (found.atoms @ atoms.T).abs().amax(1)
    assert match.min() > 0.95
    assert (lab.rotated(planted, generator).atoms @ atoms.T).abs().amax(1).min() < 0.9


def test_top_keeps_the_largest_codes():
    assert lab.largest(torch.tensor([[3.0, -5.0, 1.0]]), 2).tolist() == [[3.0, -5.0, 0.0]]


# -- models and interventions


def test_with_matrix_is_the_same_model_with_another_embedding(room):
    net, x = room.reflow.net, room.heldout(4, 16)[0]
    with torch.no_grad():
        expected = net(x)[0][..., : net.config.n_tokens]
        assert torch.allclose(
            lab.logits(lab.with_matrix(net, room.reflow.E), net.encode(x)), expected, atol=1e-4
        )
        output_only = lab.with_matrix(net, room.reflow.E, torch.zeros_like(room.reflow.E))
        assert torch.equal(output_only.encode(x), lab.with_matrix(net, room.reflow.E).encode(x))
        assert lab.logits(output_only, output_only.encode(x)).abs().max() == 0
    assert net.vocab is not output_only.vocab and net.blocks is output_only.blocks


def test_run_blocks_is_the_models_own_forward_pass(room):
    net, x = room.reflow.net, room.heldout(4, 16)[0]
    with torch.no_grad():
        streams = lab.run_blocks(net, net.vocab.embed(x))
        assert torch.allclose(net.norm(streams[-1]), net.encode(x), atol=1e-6)
        assert torch.equal(lab.run_blocks(net, streams[1], start=1)[-1], streams[-1])


def test_token_losses_average_to_the_loss(room):
    """Over the real tokens only: the padding rows take no probability."""
    net, (x, y) = room.reflow.net, room.heldout(8, 16)
    with torch.no_grad():
        logits = net(x)[0][..., : net.config.n_tokens].double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    assert lab.token_losses(net, x, y).double().mean().item() == pytest.approx(expected.item(), abs=1e-5)


def test_last_hidden_ignores_the_padding(room):
    net = room.reflow.net
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    with torch.no_grad():
        alone = torch.stack([net.encode(torch.tensor([p]))[0, -1] for p in prompts])
    assert torch.allclose(lab.last_hidden(net, prompts, batch=2), alone, atol=1e-6)


def test_steering_adds_residual_norms_and_leaves_no_trace(room):
    net, x = room.reflow.net, room.heldout(2, 8)[0]
    direction = torch.randn(net.config.n_embd)
    seen = {}
    with torch.no_grad():
        before = net.encode(x)
        clean = lab.run_blocks(net, net.vocab.embed(x))
        hook = net.norm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
        with lab.steering(net, direction, 3.0, [net.config.n_layer]):
            hook2 = net.norm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
            net.encode(x)
        hook.remove(), hook2.remove()
        moved = (seen["x"] - clean[-1]).norm(dim=-1)
        assert torch.allclose(moved, 3 * clean[-1].norm(dim=-1), rtol=1e-4)
        assert torch.equal(net.encode(x), before)
        with lab.steering(
            net, direction, torch.tensor([0.0, 2.0])[:, None, None], [0], positions=slice(-1, None)
        ):
            steered = net.encode(x)
    assert torch.allclose(steered[0], before[0], atol=1e-6) and torch.equal(steered[:, :-1], before[:, :-1])
    assert not torch.allclose(steered[1, -1], before[1, -1], atol=1e-2)


def test_the_lab_finds_its_controls(room, runs):
    assert room.baseline.net.config.vocab == "dense"
    assert not torch.equal(room.step0.E, room.reflow.E)
    kept = room.shuffled.E.sort(0).values
    assert torch.allclose(kept, room.reflow.E.sort(0).values, atol=1e-6)  # the same rows, elsewhere
    assert (room.shuffled.E != room.reflow.E).any(1).float().mean() > 0.9
    assert open_lab(runs.parent / "dense").reflow.dictionary.atoms.equal(torch.eye(16))


def test_the_baseline_is_taken_at_the_step_of_the_run(tmp_path):
    """The best checkpoints of two finished runs may be of different steps; models of one step compare."""
    data = corpus(tmp_path / "data", repeats=1)
    run, dense = (
        save_run(tmp_path / name, tiny(vocab=name), data, step=step)
        for name, step in (("factored", 1), ("dense", 2))
    )
    assert open_lab(run).baseline is None
    same = dense / "step_000001"
    shutil.copytree(dense / "step_000002", same)
    state = json.loads((same / "state.json").read_text())
    (same / "state.json").write_text(json.dumps(state | {"step": 1}))
    assert checkpoint.find(dense).name == "step_000002" and open_lab(run)._find_baseline() == same


def test_shuffled_recipes_stay_among_like_frequencies(room):
    """A token seen 8 to 15 times gets the recipe of another such token."""
    part = torch.from_numpy(np.flatnonzero((room.counts >= 8) & (room.counts < 16)))
    rows, moved = (s.dictionary.codes[part].double() for s in (room.reflow, room.shuffled))
    assert len(part) > 50 and torch.cdist(moved, rows).amin(1).max() < 1e-4


def test_a_release_brings_its_counts(tmp_path, capsys):
    """Where the training text is gone, words are still known by what the model was trained on."""
    data = corpus(tmp_path / "data", repeats=8)
    run = save_run(tmp_path / "run", tiny(), data)
    state = run / "step_000001" / "state.json"
    sha = Dataset(data, "val", 1).data_sha256
    checkpoint.write_atomically(state, json.dumps(json.loads(state.read_text()) | {"data_sha256": sha}))
    export.release(checkpoint.find(run), tmp_path / "release", "fp16")
    expected = open_lab(run).counts
    assert expected.sum() > 1000 and (open_lab(tmp_path / "release").counts == expected).all()
    shutil.rmtree(data)
    export.release(tmp_path / "release", tmp_path / "again", "fp16")  # a release of a release keeps them
    room = open_lab(tmp_path / "again")
    assert (room.counts == expected).all() and room.data.name == "sotu"
    assert "held-out text from data/sotu" in capsys.readouterr().out
    assert (open_lab(run).counts != expected).any()  # without a release: the embedded corpus


def test_counts_are_of_the_training_text(room):
    assert room.counts.sum() > 10_000 and room.known("king") == token("king")
    assert room.known("antidisestablishmentarianism") is None and room.known("zebra", least=10**6) is None
    assert 4 <= min(len(ids) for ids in room.categories().values())
    x, y = room.heldout(5, 20)
    assert x.shape == (5, 20) and torch.equal(x[:, 1:], y[:, :-1])


# -- statistics


def test_the_interval_covers_the_truth_as_often_as_stated():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(300):
        e = lab.estimate(rng.exponential(size=80), seed=i)
        hits += e.low <= 1 <= e.high
    assert 0.90 <= hits / 300 <= 0.98


def test_groups_widen_the_interval():
    """Ten equal values from each of 20 groups hold no more information than 20 values."""
    values = np.repeat(np.random.default_rng(0).standard_normal(20), 10)
    alone, grouped = lab.estimate(values), lab.estimate(values, np.repeat(np.arange(20), 10))
    assert (grouped.high - grouped.low) > 2 * (alone.high - alone.low)
    assert grouped.value == pytest.approx(values.mean())


def test_benjamini_hochberg_by_hand():
    p = np.array([0.01, 0.02, 0.03, 0.04, 0.05])
    assert lab.benjamini_hochberg(p).all()
    assert lab.benjamini_hochberg([0.011, 0.9, 0.5, 0.7, 0.6]).sum() == 0
    assert lab.benjamini_hochberg([0.009, 0.9, 0.5, 0.7, 0.6]).tolist() == [True] + [False] * 4


def test_gini_and_kurtosis_of_known_rows():
    rng = np.random.default_rng(0)
    gauss, one = rng.standard_normal((20, 20000)), np.eye(1, 1000)
    assert lab.gini(gauss).mean() == pytest.approx(np.sqrt(2) - 1, abs=5e-3)
    assert lab.gini(np.ones((1, 50)))[0] == pytest.approx(0) and lab.gini(one)[0] == pytest.approx(0.999)
    assert lab.kurtosis(gauss).mean() == pytest.approx(0, abs=0.05)
    assert lab.kurtosis(rng.laplace(size=(20, 20000))).mean() == pytest.approx(3, abs=0.2)


def test_an_effect_that_is_not_there_is_rarely_supported():
    """One chance control, one side: 2.5 % are expected in 200 trials."""
    rng = np.random.default_rng(1)
    supported = 0
    for _ in range(200):
        a, b = rng.standard_normal((2, 60))
        supported += lab.effect("", a, {"b": b}, "words").verdict == "supported"
    assert supported <= 10


@pytest.mark.parametrize("names", ["ab", "ba"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_no_number_supports_nothing(names, value):
    """A control that overflowed is no control that was beaten, wherever it stands."""
    controls = {"a": np.full(50, 2.0), "b": np.full(50, value)}
    claim = lab.effect("", np.ones(50), {name: controls[name] for name in names}, "units", lower=True)
    assert claim.verdict == "inconclusive" and claim.reason == "the gain over b is not a number"


def test_an_effect_that_is_there_is_supported_in_its_direction_only():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal(100) + 1, rng.standard_normal(100)
    assert lab.effect("", a, {"b": b}, "words").verdict == "supported"
    assert lab.effect("", a, {"b": b}, "words", lower=True).verdict == "not supported"
    assert lab.effect("", b, {"a": a}, "words", lower=True).verdict == "supported"
    assert lab.effect("", a, {"b": b, "better": a + 0.1}, "words").verdict == "not supported"
    assert lab.effect("", a[:19], {"b": b[:19]}, "words").verdict == "inconclusive"
    assert lab.effect("", a, {"b": b}, "words", groups=np.arange(100) // 10).verdict == "inconclusive"
    assert lab.effect("", a, {}, "words").verdict == "inconclusive"


def test_a_dictionary_that_is_one_rotation_among_others_is_supported_once_in_twenty():
    """The null hypothesis of the gauge test itself: native is exchangeable with its rotations."""
    rng = np.random.default_rng(3)
    verdicts = [lab.signals("", v[0], v[1:], {}, "words").verdict for v in rng.standard_normal((400, 20, 30))]
    assert 5 <= verdicts.count("supported") <= 35  # 20 expected, sd 4.4


def test_signals_must_beat_rotations_and_rivals():
    rng = np.random.default_rng(4)
    turned, better = rng.standard_normal((19, 50)) * 0.1, np.ones(50) + rng.standard_normal(50) * 0.1
    assert lab.signals("", better, turned, {"pca": better - 0.5}, "words").verdict == "supported"
    assert lab.signals("", better, turned, {"pca": better + 0.5}, "words").verdict == "not supported"
    assert lab.signals("", -better, -turned, {}, "words", lower=True).verdict == "supported"
    assert lab.signals("", better, turned[:18], {}, "words").verdict == "inconclusive"
