"""signal_codebook, signal_lens and crystallization: closed forms, planted truth found, verdicts that fail."""

import json

import numpy as np
import pytest
import torch
from lab_fixtures import corpus, open_lab, save_run, tiny
from scipy.stats import mannwhitneyu

from experiments import crystallization, lab, signal_codebook, signal_lens


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def room(tmp_path_factory, data):
    """An untrained run with a dense one beside it: nothing is there to be found."""
    out = tmp_path_factory.mktemp("out")
    save_run(out / "dense", tiny(1, n_embd=32, vocab="dense"), data)
    return open_lab(save_run(out / "tiny", tiny(0, n_embd=32), data))


def verdicts(report):
    report.save()
    result = json.loads((report.folder / "result.json").read_text())
    assert all((report.folder / f["file"]).exists() for f in result["figures"])
    assert result["gallery"] and (report.folder / "rows.csv").stat().st_size > 1000
    return [c["verdict"] for c in result["claims"]]


def silent(net):
    """The same net with blocks that add nothing."""
    for block in net.blocks:
        torch.nn.init.zeros_(block.attn.o.weight)
        torch.nn.init.zeros_(block.mlp.down.weight)
    return net


def averaging(net, layer, value=None, gain=1.0):
    """Block `layer`'s attention adds gain * value @ the mean of all normalised streams so far."""
    attn, d = net.blocks[layer].attn, net.config.n_embd
    torch.nn.init.zeros_(attn.q.weight)
    attn.v.weight.data = torch.eye(d) if value is None else value
    attn.o.weight.data = gain * torch.eye(d)
    return net


# -- signal_codebook --------------------------------------------------------------------------------


def test_enrichment_is_the_rank_sum_test_with_ties():
    rng = np.random.default_rng(0)
    codes = np.maximum(rng.normal(size=(60, 5)), 0).round(1)  # many ties, as in a sparse recipe
    labels = rng.permutation(np.repeat([0, 1, 2], 20))
    p = signal_codebook.p_values(signal_codebook.enrichment(codes, labels))
    for c in range(3):
        for s in range(5):
            own, rest = codes[labels == c, s], codes[labels != c, s]
            expected = mannwhitneyu(own, rest, use_continuity=False, method="asymptotic").pvalue
            assert p[c, s] == pytest.approx(expected, rel=1e-9)
    assert (signal_codebook.enrichment(np.ones((60, 1)), labels) == 0).all()


def test_frequency_alone_is_not_meaning():
    """Columns that follow frequency, where one category is commoner: enriched until that is taken out."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 40)
    frequency = rng.normal(size=120) + 2 * (labels == 0)
    codes = frequency[:, None] * rng.normal(size=30) + 0.3 * rng.normal(size=(120, 30))
    found = signal_codebook.enriched(signal_codebook.enrichment(codes, labels))
    assert found[0].mean() > 0.8
    freed = signal_codebook.without(codes, frequency)
    assert signal_codebook.enriched(signal_codebook.enrichment(freed, labels)).mean() < 0.05


def test_heldout_z_is_zero_by_chance_and_not_for_a_planted_category():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 20)
    codes = rng.normal(size=(100, 400))
    first = signal_codebook.halves(labels, rng)
    assert all(first[labels == c].sum() == 10 for c in range(5))
    null = lab.estimate(signal_codebook.heldout_z(codes, labels, first))
    assert null.low < 0 < null.high
    assert (signal_codebook.heldout_z(codes - 3 * (labels == 2)[:, None], labels, first) > 2).all()


def test_pairing_keeps_the_mean_and_forgets_the_order():
    rng = np.random.default_rng(0)
    values = rng.normal(size=128)
    for n in (64, 128, 100, 200):
        paired = signal_codebook.pair_up(values, n, rng)
        assert len(paired) == n and paired.mean() == pytest.approx(values.mean())
    assert np.allclose(np.sort(signal_codebook.pair_up(values, 128, rng)), np.sort(values))


def test_columns_have_the_class_of_their_shape():
    rng = np.random.default_rng(0)
    sharp = rng.normal(size=2000) + 8 * (np.arange(2000) < 20)
    two = rng.normal(size=2000) + 8 * (np.arange(2000) < 1000)
    plain = rng.normal(size=2000)
    columns = np.stack([sharp, -sharp, two, plain], axis=1)
    spearman, *_, kinds = signal_codebook.column_shape(columns, -np.exp(plain))
    assert list(kinds) == ["prediction", "suppression", "partition", "diffuse"]
    assert spearman[3] == pytest.approx(-1) and abs(spearman[0]) < 0.1


def planted_codebook(folder, data, room, turn):
    """A run in which signal s marks the words of one category; `turn` hides that in a rotation."""
    net = tiny(0, n_embd=32)
    ids = list(room.categories().values())
    with torch.no_grad():
        for s in range(32):
            net.vocab.recipe[ids[s % len(ids)], s] += 0.4
        if turn:
            q = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(5))).Q
            net.vocab.recipe.data = net.vocab.recipe.data @ q
    return open_lab(save_run(folder, net, data))


@pytest.mark.parametrize("turn", [False, True])
def test_codebook_finds_planted_categories_and_sees_through_a_rotation(
    tmp_path, data, room, turn, monkeypatch
):
    monkeypatch.setattr(signal_codebook, "figures", lambda *_: None)
    report = signal_codebook.run(planted_codebook(tmp_path / "planted", data, room, turn))
    meaning, privileged = report.claims
    assert meaning.verdict == "supported"  # the same function has the meaning in any rotation
    beats = privileged.reason.startswith("beats 19 rotations")
    assert beats != turn and (not turn or privileged.verdict == "not supported")
    if not turn:
        best = [r for r in report.rows if r["metric"].startswith("z of ")]
        names = list(room.categories())
        assert all(
            f"z of {names[s % len(names)]}" in [r["metric"] for r in best if r["signal"] == s]
            for s in range(32)
        )


def test_codebook_finds_nothing_before_training(room):
    assert verdicts(signal_codebook.run(room)) == ["not supported", "not supported"]


# -- signal_lens ------------------------------------------------------------------------------------


def test_attributions_sum_to_signals_and_logits():
    net = tiny(3).double()
    torch.nn.init.normal_(net.norm.weight, mean=1, std=0.3)
    x = torch.randint(1000, (4, 9), generator=torch.Generator().manual_seed(0))
    d = lab.native(net)
    parts = signal_lens.written(net, x)
    assert parts.shape == (4, len(signal_lens.names_of(net)), 16)
    contributions = signal_lens.attribution(net, parts, d)
    with torch.no_grad():
        h = net.encode(x)[:, -1]
        streams = lab.run_blocks(net, net.vocab.embed(x))
        expected = torch.stack([s[:, -1] for s in streams], 1)
        assert torch.allclose(contributions.sum(1), h @ d.atoms.T, atol=1e-12)
        assert torch.allclose(contributions.sum(1) @ d.codes.T, lab.logits(net, h), atol=1e-12)
        assert torch.allclose(signal_lens.streams_of(parts), expected, atol=1e-12)


def test_the_block_that_writes_a_signal_is_named():
    net, x = silent(tiny(0)), torch.randint(1000, (50, 6), generator=torch.Generator().manual_seed(0))
    net.vocab.recipe.data[:, 3] = 0  # no token brings signal 3 along
    d = lab.native(net)
    torch.nn.init.normal_(net.blocks[1].attn.v.weight)
    net.blocks[1].attn.o.weight.data = torch.outer(d.atoms[3], torch.randn(16))
    contributions = signal_lens.attribution(net, signal_lens.written(net, x).double(), d)
    shares = signal_lens.writers(contributions).detach()
    assert torch.allclose(shares.sum(0), torch.ones(16).double())
    assert shares[signal_lens.names_of(net).index("attn 1"), 3] > 0.999
    assert (shares[0, [s for s in range(16) if s != 3]] > 0.999).all()
    assert signal_lens.largest_share(contributions[:, :, 3:4]).min() > 0.999


def test_lens_and_overlap_equal_the_long_way():
    net = tiny(2)
    for p in net.blocks.parameters():
        p.data *= 5
    x = torch.randint(1000, (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        streams = signal_lens.streams_of(signal_lens.written(net, x))
        top, kl = signal_lens.lens(net, streams)
        logits = lab.read_out(net, streams).double()  # (n, L, V)
        p = logits[:, -1:].softmax(-1)
        expected = (p * (p.log() - logits.log_softmax(-1))).sum(-1)
        assert torch.allclose(kl, expected, atol=1e-6) and (kl[:, -1].abs() < 1e-9).all()
        assert (top == logits.argmax(-1)).all()
        d = lab.native(net)
        share = signal_lens.overlap(net, streams, top[:, -1], d, 4)
        for i in range(3):
            raises = (net.norm(streams[i]) @ d.atoms.T * d.codes[top[i, -1]]).tolist()
            sets = [set(np.argsort(row)[-4:]) for row in raises]
            assert share[i].tolist() == pytest.approx([len(s & sets[-1]) / 4 for s in sets])


def test_lens_sees_a_first_half_that_decides(tmp_path, data, monkeypatch):
    """Block 0 turns the token into another, block 1 adds nothing; and signals are those of any rotation."""
    monkeypatch.setattr(signal_lens, "figures", lambda *_: None)
    net = silent(tiny(0))
    for weight in net.blocks[0].mlp.parameters():
        torch.nn.init.normal_(weight)
    claims = signal_lens.run(open_lab(save_run(tmp_path / "run", net, data))).claims
    assert [c.verdict for c in claims] == ["supported", "not supported", "not supported"]
    assert claims[0].measured.value > 0.9


def test_lens_finds_nothing_before_training(room):
    """All layers of an untrained model agree: that must not count."""
    report = signal_lens.run(room)
    assert report.numbers["agreement"]["reflow"][1] > 0.9
    assert report.numbers["largest error of the sum"] < 1e-5
    assert verdicts(report) == ["not supported"] * 3


# -- crystallization --------------------------------------------------------------------------------


def test_last_token_alone_equals_the_whole_pass():
    net = tiny(1, n_layer=3, n_kv_head=1)
    for p in net.blocks.parameters():
        p.data *= 5
    lengths = [4, 9, 6]
    idx = torch.randint(1000, (3, 9), generator=torch.Generator().manual_seed(0))
    rows, last = torch.arange(3), torch.tensor(lengths) - 1
    with torch.no_grad():
        run = crystallization.last_token(net, idx, lengths)
        streams = lab.run_blocks(net, net.vocab.embed(idx))
        got = run(streams[0][rows, last])
        assert torch.allclose(got, torch.stack([s[rows, last] for s in streams]), atol=1e-5)
        for layer in (1, 2, 3):
            x = streams[layer].clone()
            x[rows, last] = torch.randn(3, 16, generator=torch.Generator().manual_seed(layer))
            expected = lab.run_blocks(net, x, layer)[-1][rows, last]
            assert torch.allclose(run(x[rows, last], layer)[-1], expected, atol=1e-5)


@pytest.mark.parametrize("where", ["all", "last"])
def test_injection_is_steering(where):
    net = tiny(1)
    for p in net.blocks.parameters():
        p.data *= 5
    idx = torch.randint(1000, (1, 7), generator=torch.Generator().manual_seed(0))
    unit, plus, minus = torch.eye(16)[:1], torch.tensor([5]), torch.tensor([9])
    E = net.vocab.matrix().detach()
    before, after = crystallization.injection(net, E, idx, unit, plus, minus, [0.5, 2.0], [0, 1, 2], where)

    def outcome():
        with torch.no_grad():
            z = net(idx)[0][0, -1]
        return (z[5] - z[9]).item()

    assert before.item() == pytest.approx(outcome(), abs=1e-5)
    for i, strength in enumerate([0.5, 2.0]):
        for layer in (0, 1, 2):
            place = slice(None) if where == "all" else slice(-1, None)
            with lab.steering(net, unit[0], strength, [layer], place):
                assert after[0, i, layer].item() == pytest.approx(outcome(), abs=1e-5)


def test_an_early_injection_that_is_amplified_counts_more():
    """Targets live in half of the stream, contexts in the other; block 0 amplifies the targets' half."""
    half = torch.diag((torch.arange(16) < 8).float())
    net = averaging(silent(tiny(0, n_layer=3)), 0, value=half, gain=10.0)
    generator = torch.Generator().manual_seed(0)
    E = torch.randn(200, 16, generator=generator)
    E[:100, 8:], E[100:, :8] = 0, 0
    net = lab.with_matrix(net, E)
    idx = torch.randint(100, 200, (30, 8), generator=generator)
    target, top = torch.arange(30), idx[:, -1]
    unit = E[target] / E[target].norm(dim=1, keepdim=True)
    before, after = crystallization.injection(net, E, idx, unit, target, top, [1.0], [0, 1, 2, 3], "all")
    change = after[:, 0] - before[:, None]
    assert (change[:, 0] > change[:, 1] + 0.1).all()
    assert torch.allclose(change[:, 1], change[:, 3], atol=1e-4)  # later blocks add nothing
    one = [v[3:4] for v in (idx, unit, target, top)]  # every row has its own direction
    assert torch.allclose(crystallization.injection(net, E, *one, [1.0], [0], "all")[1], after[3:4, :, :1])


def test_crossing_is_where_a_curve_rises_for_good():
    layers = [0, 2, 4, 6]
    curves = [[0, 0, 1, 1], [0, 0.25, 0.75, 1], [0.6, 0.2, 0.3, 1], [0.5, 0.6, 0.7, 1], [0, 0, 0, 1]]
    expected = [3, 3, 4 + 2 * 0.2 / 0.7, 0, 5]
    assert crystallization.crossing(curves, layers) == pytest.approx(expected)
    depths = crystallization.lens_depth(np.array([[9, 9, 0.1, 0], [0.1, 9, 0.1, 0], [0.1, 0.1, 0.1, 0]]))
    assert depths.tolist() == [2, 2, 0]
    assert crystallization.layers_of(36).tolist() == list(range(0, 37, 3))


def test_ratio_weighs_pairs_by_their_size_whatever_the_sign():
    change = np.array([[0.0, 3.0, 4.0], [0.0, -1.0, -1.0]])
    curve, resampled = crystallization.ratio(change, np.array([4.0, -1.0]), np.random.default_rng(0), 50)
    assert curve == pytest.approx([0, 4 / 5, 1])
    assert resampled.shape == (50, 3) and set(resampled[:, 1].round(3)) <= {0.75, 0.8, 1.0}


@pytest.mark.parametrize("layer", [0, 2])
def test_the_layer_that_moves_the_decision_is_found(layer):
    net = averaging(silent(tiny(0, n_layer=4)), layer)
    probe = lab.Lab.probe(None, "agreement")
    texts = [p for p in probe["pairs"] if p["template"] == "subject_of"]
    E = net.vocab.matrix()[: net.config.n_tokens].detach()
    subject = lab.Subject("planted", net, None)
    for contexts in (None, probe["contexts"]):
        pairs = crystallization.Pairs(texts, contexts, 64, "cpu")
        found = crystallization.patch(subject, pairs, np.random.default_rng(0))
        step = (np.arange(5) > layer).astype(float)
        assert np.abs(found.curve - step).max() < 1e-3
        assert found.points == pytest.approx(layer + 0.5, abs=0.01)
        assert found.crossing.low == pytest.approx(layer + 0.5, abs=0.01)
        if contexts is None:
            places = pairs.places()
            change = crystallization.place_recovery(net, E, pairs, list(places.values()), range(5))
            means = (change / torch.from_numpy(found.whole)).mean(2).numpy()  # (places, layers)
            assert np.abs(means - np.stack([1 - step, 0 * step, step])).max() < 1e-3


def test_crystallization_finds_nothing_before_training(room):
    assert verdicts(crystallization.run(room)) == ["not supported"] * 3
