"""signal_codebook: closed forms, planted truth found, verdicts that fail."""

import json

import numpy as np
import pytest
import torch
from lab_fixtures import corpus, open_lab, save_run, tiny
from scipy.stats import mannwhitneyu

from experiments import lab, signal_codebook


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
