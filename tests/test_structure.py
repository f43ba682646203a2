"""Neighbours, clusters, algebra and the basis: measurements against brute force, planted structure, verdicts
that fail on an untrained model and on structure that every gauge shows.
"""

import sys

import numpy as np
import pytest
import torch
from scipy.stats import skew
from sklearn.metrics import silhouette_samples

from experiments import basis_geometry, lab, nearest_neighbors, semantic_algebra, semantic_clusters
from model import ReFlow
from tests.lab_fixtures import corpus, open_lab, save_run, tiny, token

# -- planted models


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus") / "words", repeats=10)


def set_recipes(net, recipes):
    """Recipes {token: vector} on a background of small noise."""
    with torch.no_grad():
        for t, vector in recipes.items():
            net.vocab.recipe[t] = torch.as_tensor(vector, dtype=torch.float32)


def start_of(net):
    """The step 0 that `save_run` gives to a run of this model."""
    torch.manual_seed(999)
    return ReFlow(net.config)


def categories():
    lists = lab.Lab.probe(None, "categories")
    return {name: [token(w) for w in c["words"]] for name, c in lists.items()}


def clustered(crooked, seed=1):
    """Recipes of a category lie around a centre, in 12 of 32 signals; the rest is weak noise.

    With a crooked basis all atoms are nearly parallel, so that E hides what the recipes show, and whitening
    raises the noise. Otherwise the basis is orthonormal, and E shows the same.
    """
    net = tiny(seed, n_embd=32, n_signal=32)
    rng = np.random.default_rng(seed)
    planted = {}
    for ids in categories().values():
        centre = rng.standard_normal(12)
        for t in ids:
            strong = centre + 0.45 * rng.standard_normal(12)
            planted[t] = np.append(strong, 0.1 * rng.standard_normal(20))
    set_recipes(net, planted)
    if crooked:
        with torch.no_grad():
            net.vocab.basis.mul_(0.15).add_(torch.ones(32) / 32**0.5)
    return net


def parallelogram(seed=1):
    """a = b + the relation's own offset, for every pair whose words no earlier relation has placed.

    The offset is on the side of a, and large: so c is nearer to the other words like a than to its answer.
    """
    net = tiny(seed, n_embd=32, n_signal=32)
    rng, planted = np.random.default_rng(seed), {}
    for relation in lab.Lab.probe(None, "analogies").values():
        offset = 1.5 * rng.standard_normal(32)
        for a, b in relation["pairs"]:
            a, b = token(a), token(b)
            start = planted.setdefault(b, rng.standard_normal(32))
            planted.setdefault(a, start + offset)
    set_recipes(net, planted)
    return net


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("runs")
    models = {"crooked": clustered(True), "straight": clustered(False), "parallelogram": parallelogram()}
    made = {name: save_run(folder / name, net, text) for name, net in models.items()}
    made["untrained"] = save_run(folder / "untrained", tiny(3, n_embd=32, n_signal=32), text, step=0)
    made["dense"] = save_run(folder / "dense", tiny(4, n_embd=32, vocab="dense"), text)
    laboratories = {}

    def get(name):
        if name not in laboratories:
            laboratories[name] = open_lab(made[name])
            laboratories[name].__dict__["baseline"] = None
            known = laboratories[name].categories()
            laboratories[name].categories = lambda: {k: ids[:12] for k, ids in known.items()}  # for speed
        return laboratories[name]

    return get


EXPERIMENTS = (nearest_neighbors, semantic_clusters, semantic_algebra, basis_geometry)
DRAWN = [(module, "figures") for module in EXPERIMENTS if module is not semantic_clusters]
DRAWN += [(semantic_clusters, "picture_of"), (semantic_clusters, "heat_map")]


@pytest.fixture
def small(monkeypatch):
    """Fewer permutations, questions and words."""
    monkeypatch.setattr(semantic_clusters, "PERMUTATIONS", 9)
    monkeypatch.setattr(semantic_algebra, "QUESTIONS", 200)
    monkeypatch.setattr(nearest_neighbors, "POOL", 300)
    monkeypatch.setattr(semantic_clusters, "POOL", 300)
    monkeypatch.setattr(basis_geometry, "TOKENS", 300)


@pytest.fixture
def quick(small, monkeypatch):
    """The same, and no figures."""
    for module, name in DRAWN:
        monkeypatch.setattr(module, name, lambda *_: None)


def verdicts(report):
    return [(c.kind, c.verdict) for c in report.claims]


# -- nearest_neighbors


def test_precision_and_its_chance_against_brute_force():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [4, 7, 9])
    n = len(labels)
    barred = rng.random((n, n)) < 0.2
    barred |= barred.T
    cosine = torch.from_numpy(rng.standard_normal((n, n)))
    for bar in (None, barred):
        found = nearest_neighbors.precision(cosine, labels, 3, bar)
        for i in range(n):
            free = [j for j in range(n) if j != i and (bar is None or not bar[i, j])]
            best = sorted(free, key=lambda j: -cosine[i, j])[:3]
            assert found[i] == pytest.approx(np.mean(labels[best] == labels[i]))
        many = [
            nearest_neighbors.precision(torch.from_numpy(rng.standard_normal((n, n))), labels, 3, bar)
            for _ in range(3000)
        ]
        assert np.mean(many, 0) == pytest.approx(nearest_neighbors.chance(labels, bar), abs=0.03)


def test_precision_of_perfect_and_of_opposite_clusters():
    labels = np.repeat([0, 1, 2], 6)
    same = torch.from_numpy((labels[:, None] == labels).astype(float))
    assert nearest_neighbors.precision(same, labels, 5).mean() == 1
    assert nearest_neighbors.precision(-same, labels, 5).mean() == 0
    assert nearest_neighbors.auc(same + 0.01 * torch.randn(18, 18), labels) > 0.99


def test_words_of_one_stem():
    words = ["law", "laws", "river", "France", "foot", "feet", "Three", "thirty", "industry", "industries"]
    shared = nearest_neighbors.share_stem(words, [("foot", "feet")])
    pairs = {(words[i], words[j]) for i, j in zip(*np.nonzero(np.triu(shared, 1)), strict=True)}
    assert pairs == {("law", "laws"), ("foot", "feet"), ("industry", "industries")}


def test_hubness_sees_a_hub():
    x = torch.nn.functional.normalize(torch.randn(200, 30, generator=torch.Generator().manual_seed(0)), dim=1)
    even = x @ x.T
    nearest = [sorted(set(range(200)) - {i}, key=lambda j: -even[i, j])[:10] for i in range(200)]
    counts = np.bincount(np.concatenate(nearest), minlength=200)
    assert nearest_neighbors.hubness(even) == pytest.approx(skew(counts))
    hub = even.clone()
    hub[:, 0] = 2
    assert nearest_neighbors.hubness(hub) > nearest_neighbors.hubness(even) + 1


def test_whole_words_are_whole_and_frequent_first(runs):
    laboratory = runs("straight")
    found = laboratory.known_words()[:50]
    assert len(found) == 50
    assert all(lab.show(t)[0] == " " and lab.show(t)[1:].isalpha() for t in found)
    assert (np.diff(laboratory.counts[found]) <= 0).all()


def test_ratings_are_read_where_gensim_is_installed(tmp_path, monkeypatch):
    assert nearest_neighbors.similarity_sets() == {} or "gensim" in sys.modules
    folder = tmp_path / "gensim" / "test" / "test_data"
    folder.mkdir(parents=True)
    (tmp_path / "gensim" / "__init__.py").write_text("")
    (folder / "simlex999.txt").write_text("# comment\nold\tnew\t1.58\n")
    (folder / "wordsim353.tsv").write_text("# comment\nlove\tsex\t6.77\ntiger\tcat\t7.35\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = nearest_neighbors.similarity_sets()
    assert found == {
        "simlex999": [("old", "new", 1.58)],
        "wordsim353": [("love", "sex", 6.77), ("tiger", "cat", 7.35)],
    }


def test_neighbors_finds_clusters_that_only_recipes_show(runs, quick):
    report = nearest_neighbors.run(runs("crooked"))
    assert verdicts(report) == [("effect", "supported"), ("effect", "supported"), ("signals", "supported")]
    assert report.numbers["rotation_changes_cosine"] < 1e-12
    assert "king" in report.gallery


def test_neighbors_of_clusters_in_every_gauge_are_no_fact_about_signals(runs, quick):
    report = nearest_neighbors.run(runs("straight"))
    assert verdicts(report) == [
        ("effect", "supported"),
        ("effect", "supported"),
        ("signals", "not supported"),
    ]


def test_random_codes_rarely_have_an_effect():
    labels = np.repeat(np.arange(25), 12)
    found = 0
    for seed in range(20):
        codes = torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(seed))
        values = nearest_neighbors.precision(nearest_neighbors.cosines(codes), labels, 5)
        null = {"permuted labels": nearest_neighbors.chance(labels)}
        found += lab.effect("", values, null, "categories", labels).verdict == "supported"
    assert found <= 3


# -- semantic_clusters


def test_silhouette_against_scikit_learn():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((40, 3))
    distance = semantic_clusters.euclidean(points)
    labels = np.stack([rng.permutation(np.repeat([0, 1, 2, 3], [4, 8, 12, 16])) for _ in range(3)])
    found = semantic_clusters.silhouette(distance, labels)
    for values, row in zip(found, labels, strict=True):
        assert values == pytest.approx(silhouette_samples(distance, row, metric="precomputed"))
    assert semantic_clusters.silhouette(distance, labels[0]) == pytest.approx(found[0])


def test_v_measure_finds_clusters_and_leaf_order_joins_them():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(5), 10))
    codes = torch.from_numpy(np.eye(8)[labels] + 0.05 * rng.standard_normal((50, 8)))
    found = semantic_clusters.v_measure(codes, labels, rng)
    assert found["value"] > 0.99 and found["permuted"] < 0.4 and found["p"] == pytest.approx(0.01)
    noise = semantic_clusters.v_measure(torch.from_numpy(rng.standard_normal((50, 8))), labels, rng)
    assert noise["value"] < 0.5
    order = semantic_clusters.leaf_order(semantic_clusters.distances(codes))
    assert (labels[order][1:] != labels[order][:-1]).sum() == 4


def test_plane_keeps_the_most_variance():
    x = torch.randn(100, 5, dtype=torch.float64) * torch.tensor([5.0, 3.0, 1.0, 0.1, 0.1])
    points, share = semantic_clusters.plane(x)
    variances = np.linalg.eigvalsh(np.cov(x.numpy().T))
    assert share == pytest.approx(variances[-2:].sum() / variances.sum())
    assert points.var(0, ddof=1) == pytest.approx(variances[:-3:-1])


def test_clusters_of_recipes_only_and_of_every_gauge(runs, quick):
    report = semantic_clusters.run(runs("crooked"))
    assert verdicts(report) == [("effect", "supported"), ("signals", "supported")]
    assert report.numbers["p_permutation"] == pytest.approx(0.1)  # the least of nine permutations
    report = semantic_clusters.run(runs("straight"))
    assert verdicts(report) == [("effect", "supported"), ("signals", "not supported")]


# -- semantic_algebra


@pytest.mark.parametrize("honest", [False, True])
def test_ranks_against_brute_force(honest):
    codes = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    questions = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [8, 3, 2, 29]])
    found = semantic_algebra.ranks(codes, questions, honest=honest, chunk=2)
    x = (codes / codes.norm(dim=1, keepdim=True)).numpy()
    for q, (a, b, c, d) in enumerate(questions):
        allowed = [i for i in range(30) if honest or i not in (a, b, c)]

        def rank(target, allowed=allowed, d=d):
            return 1 + sum(target[i] > target[d] for i in allowed)

        to = {w: x @ x[w] for w in (a, b, c)}
        assert found["3CosAdd"][q] == rank(x @ (x[b] - x[a] + x[c]))
        moved = {w: (v + 1) / 2 for w, v in to.items()}
        assert found["3CosMul"][q] == rank(moved[b] * moved[c] / (moved[a] + 1e-3))
        assert found["only b"][q] == rank(to[b]) and found["only c"][q] == rank(to[c])
        assert found["b + c"][q] == rank(to[b] + to[c])


def test_ties_share_their_mean_rank():
    codes = torch.eye(6)[[0, 1, 2, 3, 3, 3]]  # the answer and two more are equal to one another
    assert semantic_algebra.ranks(codes, [[0, 1, 2, 3]], ["3CosAdd"])["3CosAdd"].tolist() == [2.0]


def test_questions_are_even_over_relations_and_use_four_known_words():
    relations = {"r": [["a", "b"], ["c", "d"], ["e", "b"]], "s": [[f"x{i}", f"y{i}"] for i in range(30)]}
    ids = {w: i for i, w in enumerate(sorted({w for pairs in relations.values() for p in pairs for w in p}))}
    known = {**ids, "x3": None}.get
    questions, target, relation = semantic_algebra.build(relations, known, np.random.default_rng(0), 40)
    assert (relation == "r").sum() == 4 and (relation == "s").sum() == 20
    assert all(len(set(q)) == 4 for q in questions.tolist())
    assert None not in questions and len(target) == len(questions)
    assert len(np.unique(questions, axis=0)) == len(questions)
    assert len(semantic_algebra.build({"r": []}, known, np.random.default_rng(0), 9)[0]) == 0


def test_algebra_finds_a_parallelogram_that_every_gauge_shows(runs, quick):
    report = semantic_algebra.run(runs("parallelogram"))
    assert verdicts(report) == [("effect", "supported"), ("signals", "not supported")]
    native = report.numbers["spaces"]["native"]
    assert native["3CosAdd"]["mrr"] > 2 * native["b + c"]["mrr"]
    assert report.numbers["candidates"] > 500


def test_nearness_of_pairs_alone_is_no_algebra(runs, quick):
    """Clusters put b near a and d near c, but no difference is shared."""
    report = semantic_algebra.run(runs("straight"))
    assert report.claims[0].verdict == "not supported"


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
