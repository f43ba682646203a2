"""signal_codebook: closed forms, planted meaning is found, verdicts that fail, lists of known tokens only."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from experiments import signal_codebook
from experiments.lab.probes import categories, probe
from experiments.lab.results import read_result
from experiments.lab.stats import estimate, rank_sums, regress_out
from tests.lab_fixtures import corpus, open_lab, save_run, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory, data):
    """An untrained run with a dense one beside it: nothing is there to be found."""
    out = tmp_path_factory.mktemp("out")
    save_run(out / "dense", tiny(1, n_embd=32, vocab="dense"), data)
    return open_lab(save_run(out / "tiny", tiny(0, n_embd=32), data))


def test_enrichment_is_the_rank_sum_test_with_ties():
    rng = np.random.default_rng(0)
    codes = np.maximum(rng.normal(size=(60, 5)), 0).round(1)  # many ties, as in a sparse recipe
    labels = rng.permutation(np.repeat([0, 1, 2], 20))
    p = signal_codebook.p_values(rank_sums(codes, labels))
    for c in range(3):
        for s in range(5):
            own = codes[labels == c, s]
            rest = codes[labels != c, s]
            expected = mannwhitneyu(own, rest, use_continuity=False, method="asymptotic").pvalue
            assert p[c, s] == pytest.approx(expected, rel=1e-9)
    assert (rank_sums(np.ones((60, 1)), labels) == 0).all()


def test_frequency_alone_is_not_meaning():
    """Columns that follow frequency, where one category is commoner: enriched until that is regressed out."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 40)
    frequency = rng.normal(size=120) + 2 * (labels == 0)
    codes = frequency[:, None] * rng.normal(size=30) + 0.3 * rng.normal(size=(120, 30))
    found = signal_codebook.discoveries(rank_sums(codes, labels))
    assert found[0].mean() > 0.8
    residuals = regress_out(codes, frequency)
    assert signal_codebook.discoveries(rank_sums(residuals, labels)).mean() < 0.05


def test_heldout_z_is_zero_by_chance_and_not_for_a_planted_category():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 20)
    codes = rng.normal(size=(100, 400))
    first = signal_codebook.halves(labels, rng)
    assert all(first[labels == c].sum() == 10 for c in range(5))
    null = estimate(signal_codebook.heldout_z(codes, labels, first))
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
    constant = np.full(2000, 0.3)  # the mean of a sparse vocabulary
    columns = np.stack([sharp, -sharp, two, plain, constant], axis=1)
    with np.errstate(all="raise"):
        shapes = signal_codebook.column_shapes(columns, -np.exp(plain))
    assert list(shapes["class"][:4]) == ["prediction", "suppression", "partition", "diffuse"]
    assert all(np.isfinite(values).all() for key, values in shapes.items() if key != "class")
    spearman = shapes["Spearman with log frequency"]
    assert spearman[3] == pytest.approx(-1) and abs(spearman[0]) < 0.1


def planted(folder, data, words, is_rotated):
    """A run in which signal s marks the words of one category, unless a rotation hides that."""
    net = tiny(0, n_embd=32)
    ids = list(categories(SimpleNamespace(words=words, probe=probe)).values())
    with torch.no_grad():
        for s in range(32):
            net.vocab.recipe[ids[s % len(ids)], s] += 0.4
        if is_rotated:
            q = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(5))).Q
            net.vocab.recipe.data = net.vocab.recipe.data @ q
    return open_lab(save_run(folder, net, data))


@pytest.mark.parametrize("is_rotated", [False, True])
def test_planted_categories_are_found_and_a_rotation_of_them_is_not_privileged(
    tmp_path, data, untrained, is_rotated
):
    report = signal_codebook.run(planted(tmp_path / "run", data, untrained.words, is_rotated))
    assert report["enriched"].verdict == "supported"  # the same function has the meaning in any rotation
    separates = report["separates"]
    assert separates.beats_gauges != is_rotated
    if is_rotated:
        assert separates.verdict == "not supported"
    else:
        names = list(categories(untrained))
        found = {(row["signal"], row["metric"]) for row in report.rows if row["metric"].startswith("z of ")}
        assert {(s, f"z of {names[s % len(names)]}") for s in range(32)} <= found


def test_nothing_is_found_before_training(untrained):
    report = signal_codebook.run(untrained)
    report.save()
    result = read_result(report.folder / "result.json")
    assert [claim.verdict for claim in result.claims] == ["not supported", "not supported"]
    assert result.figures and all((report.folder / figure.file).exists() for figure in result.figures)
    assert result.gallery and (report.folder / "rows.csv").stat().st_size > 1000
    assert report["enriched"].controls.keys() == {"step 0", "noise", "shuffled", "permuted labels"}
    assert report["separates"].controls.keys() == {"pca", "ica", "E", "baseline"}


def test_numbers_are_of_every_dictionary_by_name(untrained):
    """Shares and held-out z of each, the mean over the random rotations, and the claims' own means."""
    report = signal_codebook.run(untrained)
    numbers = report.numbers
    for name in ("native", "rotated", "pca", "ica", "step 0", "shuffled", "E", "baseline"):
        assert numbers[name].keys() >= {"enriched share", "held-out z"}, name
    for name in ("native", "rotated"):
        assert 0 < numbers[name]["largest |Spearman|"] <= 1
    assert numbers["native"]["enriched share, frequency left in"] >= 0
    assert numbers["native"]["enriched share"] == report["enriched"].measured.value
    assert numbers["rotated"]["held-out z"] == pytest.approx(report["separates"].gauges.value)


def test_lists_show_no_token_that_training_hardly_saw(tmp_path, data):
    """Tokens that were never seen have the largest codes of every signal, and are in no list."""
    net = tiny(0, n_embd=32)
    lab = open_lab(save_run(tmp_path / "run", net, data))
    unseen = torch.from_numpy(np.flatnonzero(lab.words.counts < 5))
    with torch.no_grad():
        lab.model.dictionary.codes[unseen] += 100 * torch.randn(len(unseen), 1).sign()
    book = signal_codebook.Codebook(lab.model.dictionary, lab.words, [], None, None, {})
    known = {lab.words.text(token).strip() for token in lab.words.known_tokens()}
    for s in range(32):
        for text in book.ends(s).values():
            assert len(text.split()) == 8 and known.issuperset(text.split())
