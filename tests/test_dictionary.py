"""Dictionaries: every one is the same embedding; PCA and ICA find what is planted."""

import numpy as np
import pytest
import torch

import dictionary
import hardware
from configurator import UserError
from dictionary import Dictionary
from experiments.lab.stats import gini
from tests.lab_fixtures import tiny


@pytest.mark.parametrize("shape", [{}, {"n_signal": 8}, {"n_signal": 24}, {"vocab": "topk", "top_k": 4}])
def test_every_dictionary_is_the_same_embedding(shape):
    """codes @ atoms = E: the learned dictionary, rotated, skewed, PCA, ICA; also when S is not d."""
    net = tiny(**shape)
    E = net.vocab.matrix().detach()[: net.config.n_tokens]
    native = dictionary.native(net)
    generator = torch.Generator().manual_seed(0)
    fit = torch.arange(500)
    others = [dictionary.rotated(native, generator), dictionary.skewed(native, generator)]
    others += [dictionary.pca(E, fit), dictionary.ica(E, fit)]
    for d in (native, *others):
        assert torch.allclose(d.codes @ d.atoms, E, atol=2e-5), d.name
        assert torch.equal(d.matrix(), d.codes @ d.atoms), d.name
        assert torch.allclose(d.atoms.norm(dim=1), torch.ones(d.n_signals), atol=1e-4), d.name


def test_a_dense_model_has_the_coordinates_of_E_as_signals():
    net = tiny(vocab="dense")
    d = dictionary.native(net)
    assert d.atoms.equal(torch.eye(16))
    assert torch.equal(d.codes, net.vocab.matrix().detach()[: net.config.n_tokens])


def test_the_core_and_the_mean_of_sparse_recipes_are_no_signals():
    """`native` is all of E. `readable` leaves out the last columns, which are not read."""
    net = tiny(vocab="sparse", n_signal=24, n_nonzero=3, n_core=2)
    E = net.vocab.matrix().detach()[: net.config.n_tokens]
    native, signals = dictionary.native(net), dictionary.readable(net)
    assert torch.allclose(native.matrix(), E, atol=1e-5) and native.n_signals == 24 + 2 + 1
    assert signals.n_signals == 24 and ((signals.codes != 0).sum(1) == 3).all()
    rest = net.vocab.core.detach() @ net.vocab.basis[24:26].detach() + net.vocab.basis[26].detach()
    assert torch.allclose(signals.matrix(), E - rest[: len(E)], atol=1e-5)
    plain = tiny()
    assert torch.equal(dictionary.readable(plain).codes, dictionary.native(plain).codes)


def test_a_rotation_keeps_cosines_and_a_skewed_one_does_not():
    net = tiny()
    net.vocab.basis.data = torch.linalg.qr(net.vocab.basis.data).Q  # orthonormal, so that atoms are the basis
    native = dictionary.native(net)
    generator = torch.Generator().manual_seed(0)

    def cosines(d):
        unit = torch.nn.functional.normalize(d.codes[:50], dim=1)
        return unit @ unit.T

    # Lengths of rotated atoms are one again, because the atoms were orthonormal.
    assert torch.allclose(cosines(dictionary.rotated(native, generator)), cosines(native), atol=1e-5)
    assert (cosines(dictionary.skewed(native, generator)) - cosines(native)).abs().max() > 0.1


def anisotropic(seed, v=300, n=16):
    """Gaussian recipes without any axes; one singular value of the basis is ten times the others."""
    generator = torch.Generator().manual_seed(seed)
    stretch = torch.ones(n)
    stretch[0] = 10.0
    left, right = (dictionary.random_orthogonal(n, generator).float() for _ in range(2))
    return Dictionary("native", torch.randn(v, n, generator=generator), (left * stretch) @ right)


def test_a_dictionary_without_axes_is_one_of_its_rotations():
    """Whatever the basis, Gaussian recipes rank anywhere among 19 rotations: in 60 draws about 3 are first.

    Rotated codes, which carry the lengths of the atoms, would rank last in most draws.
    """
    first = 0
    for seed in range(60):
        native = anisotropic(seed)
        generator = torch.Generator().manual_seed(seed)
        values = [gini(d.codes.numpy()).mean() for d in (native, *(rotated19(native, generator)))]
        first += values[0] == max(values)
    assert first <= 8  # 3 expected, standard deviation 1.7


def rotated19(native, generator):
    """19 rotations of a dictionary."""
    return [dictionary.rotated(native, generator) for _ in range(19)]


def test_a_rotation_turns_the_factors_of_the_model_not_codes_of_length_one():
    """Turning back gives the recipes and the basis again, unequal lengths and a dead signal included."""
    native = anisotropic(0)
    native = Dictionary("native", native.recipes, native.basis * torch.arange(16.0)[:, None])
    turned = dictionary.rotated(native, torch.Generator().manual_seed(0))
    q = torch.linalg.lstsq(native.recipes, turned.recipes).solution
    assert torch.allclose(q @ q.T, torch.eye(16), atol=1e-5)
    assert torch.allclose(q @ turned.basis, native.basis, atol=1e-3)
    assert native.codes[:, 0].abs().max() == 0 and native.recipes[:, 0].abs().max() > 0


def test_ica_that_degenerates_is_refused(monkeypatch):
    """What FastICA returns must be a rotation of whitened rows: else it is no rival, and that is said."""
    from sklearn.decomposition import FastICA

    whole = FastICA.fit

    def degenerate(self, x):
        whole(self, x)
        self.components_[0] = self.components_[1]
        return self

    monkeypatch.setattr(FastICA, "fit", degenerate)
    with pytest.raises(UserError, match="ICA of this embedding failed"):
        dictionary.ica(tiny().vocab.matrix().detach(), torch.arange(4000))


def test_ica_that_fails_in_fp32_is_tried_in_fp64(monkeypatch):
    """With many axes the decorrelation of fp32 can overflow; fp64 then finds the planted atoms."""
    from sklearn.decomposition import FastICA

    whole = FastICA.fit

    def overflow(self, x):
        if x.dtype == np.float32:
            raise ValueError("array must not contain infs or NaNs")
        return whole(self, x)

    monkeypatch.setattr(FastICA, "fit", overflow)
    codes = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) ** 3
    found = dictionary.ica(codes, torch.arange(4000))
    assert found.atoms.abs().amax(1).min() > 0.95
    monkeypatch.setattr(FastICA, "fit", lambda self, x: overflow(self, x.astype(np.float32)))
    with pytest.raises(UserError, match="failed: array must not contain"):
        dictionary.ica(codes, torch.arange(4000))


@pytest.mark.parametrize("find", [dictionary.pca, dictionary.ica])
def test_a_direction_that_all_rows_share_is_an_atom_of_its_own(find):
    """A constant coordinate cannot be whitened. What is left is found as if it were not there."""
    generator = torch.Generator().manual_seed(0)
    E = torch.randn(3000, 12, generator=generator) ** 3
    E[:, 5] = 7.0
    E[2500:, 6] = 0.0
    found = find(E, torch.arange(2000))
    assert torch.allclose(found.matrix(), E, atol=1e-4)
    assert found.n_signals == 12 and found.atoms[-1].abs().argmax() == 5
    assert found.atoms[:-1, 5].abs().max() < 1e-5


def test_ica_says_how_it_went():
    """All rows that it was given are fitted. Many Gaussian rows have no independent axes to converge to."""
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(3000, 8, generator=generator) ** 3
    found = dictionary.ica(sparse, torch.arange(2500)).fit
    assert found["rows"] == 2500 and found["threads"] == 1 and found["converged"]
    assert found["iterations"] < 200 and found["reconstruction error"] < 1e-5
    assert not dictionary.ica(torch.randn(3000, 32, generator=generator), torch.arange(3000)).fit["converged"]


def test_ica_does_not_depend_on_the_number_of_threads():
    """The same bits with one thread and with two, also where it has not converged."""
    E = torch.randn(3000, 48, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    found = []
    for n in (1, 2):
        torch.set_num_threads(n)
        found.append(dictionary.ica(E, torch.arange(3000)))
        assert torch.get_num_threads() == n
    torch.set_num_threads(before)
    assert torch.equal(found[0].codes, found[1].codes) and torch.equal(found[0].atoms, found[1].atoms)


def test_ica_finds_planted_independent_signals():
    """Sparse independent codes behind a random mixture: ICA's atoms are the planted ones."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(4000, 12, generator=generator) ** 3
    atoms = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    planted = Dictionary("native", codes, atoms)
    found = dictionary.ica(codes @ atoms, torch.arange(4000))
    match = (found.atoms @ atoms.T).abs().amax(1)
    assert match.min() > 0.95
    assert (dictionary.rotated(planted, generator).atoms @ atoms.T).abs().amax(1).min() < 0.9


def test_top_k_keeps_the_codes_of_largest_size():
    codes = torch.tensor([[3.0, -5.0, 1.0]])
    assert dictionary.top_k(codes, 2).tolist() == [[3.0, -5.0, 0.0]]
    assert torch.equal(dictionary.top_k(codes, 9), codes)


def test_a_part_has_the_codes_of_its_tokens_and_the_same_atoms():
    native = dictionary.native(tiny())
    part = native.part(np.array([7, 3]))
    assert torch.allclose(part.codes, native.codes[[7, 3]])
    assert torch.allclose(part.atoms, native.atoms)


def planted_codes(seed, v=2000, s=48, d=24):
    """(E, codes, atoms): one to five entries a row, of size 0.5 to 1.5 and either sign; twice as many atoms
    as dimensions."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(s, d, generator=generator), dim=1)
    n_kept = torch.randint(1, 6, (v, 1), generator=generator)
    chosen = torch.rand(v, s, generator=generator).argsort(1).argsort(1) < n_kept
    size = 0.5 + torch.rand(v, s, generator=generator)
    codes = chosen * size * torch.randn(v, s, generator=generator).sign()
    return codes @ atoms, codes, atoms


def test_sparse_finds_planted_atoms():
    """Twice as many atoms as dimensions: atoms match at 0.9 or more, random ones at less than 0.6. An E of
    the same covariance without planted codes is not written so well, and its starts disagree."""
    E, codes, atoms = planted_codes(0)
    found = dictionary.sparse(E, 48, 3, starts=2)
    generator = torch.Generator().manual_seed(1)
    assert dictionary.partners(atoms, found.atoms).mean() > 0.9
    assert dictionary.partners(codes.T, found.codes.T).mean() > 0.8
    assert dictionary.partners(atoms, torch.randn(48, 24, generator=generator)).mean() < 0.6
    gaussian = torch.randn(2000, 24, generator=generator) @ torch.linalg.cholesky(E.T @ E / 2000).T
    null = dictionary.sparse(gaussian, 48, 3, starts=2)
    assert found.fit["missed"] < 0.05 < 0.2 < null.fit["missed"]
    assert found.fit["agreement of starts"] > 0.85 > 0.8 > null.fit["agreement of starts"]


def test_a_pursuit_is_that_of_scikit_learn():
    """The same atoms in the same order, and the same codes, for a number of entries that all rows share."""
    from sklearn.linear_model import orthogonal_mp

    E, _, atoms = planted_codes(1, v=200)
    index, gain = dictionary.pursue(E, atoms, 4)
    codes = dictionary.least_squares(E, atoms, index, torch.full((200,), 4))
    truth = torch.from_numpy(
        orthogonal_mp(atoms.T.double().numpy(), E.T.double().numpy(), n_nonzero_coefs=4).T
    )
    assert torch.allclose(codes.double(), truth, atol=1e-3)
    error = ((E - codes @ atoms) ** 2).sum(1)
    assert torch.allclose((E**2).sum(1) - gain.sum(1), error, atol=1e-3)


def test_rows_that_stop_early_and_rows_side_by_side_have_the_same_codes(monkeypatch):
    """A row that is not followed further than its entries are worth has those of the whole pursuit."""
    E, _, atoms = planted_codes(5)
    weights = torch.linspace(0.01, 1, len(E))
    index, gain = dictionary.pursue(E, atoms, 10)
    n_kept, _ = dictionary.share_out(gain * weights[:, None], 5 * len(E), 1)
    whole = dictionary.least_squares(E, atoms, index, n_kept)
    found = {}
    for threads in (1, 3):
        monkeypatch.setattr(hardware, "THREADS", threads)
        found[threads] = dictionary.encode(E, atoms, 5, weights)
    assert torch.equal(found[1], found[3])
    assert torch.allclose(found[1], whole, atol=1e-6) and (whole != 0).sum() > 4.9 * len(E)
    worth = torch.zeros(len(E)).index_fill(0, torch.arange(1000), float(gain.max()))
    taken = (dictionary.pursue(E, atoms, 10, worth)[1] != 0).sum(1)
    assert (taken[:1000] <= 8).all() and (taken[1000:] > 8).any()  # so some did stop


def test_tokens_that_are_mixtures_of_tokens_are_coded_in_these():
    """An anchor is its own signal alone, and what is mixed of two anchors has these two."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(16, 24, generator=generator)
    mixed = torch.zeros(400, 16)
    mixed[torch.arange(400)[:, None], torch.rand(400, 16, generator=generator).topk(2).indices] = 1.0
    E = torch.cat([own, mixed @ own])
    found = dictionary.anchored(E, torch.arange(16), 2, torch.ones(416))
    assert torch.allclose(found.matrix(), E, atol=1e-3)
    assert torch.allclose(found.codes[:16], own.norm(dim=1).diag(), atol=1e-2)
    assert torch.equal(found.codes[16:] > 0.1, mixed == 1)


def test_sparse_misses_no_more_than_scikit_learn():
    """Where every entry of a row counts the same, at the same number of entries, on a small planted E."""
    from sklearn.decomposition import MiniBatchDictionaryLearning

    E, _, _ = planted_codes(2, v=600, s=24, d=16)
    learner = MiniBatchDictionaryLearning(
        24, alpha=0.3, max_iter=15, transform_algorithm="omp", transform_n_nonzero_coefs=3, random_state=0
    )
    theirs = torch.from_numpy(learner.fit_transform(E.numpy()) @ learner.components_).float()
    ours = dictionary.sparse(E, 24, 3, starts=2)
    assert ours.fit["missed"] < float(((E - theirs) ** 2).sum() / (E**2).sum())


def test_the_budget_is_one_of_the_whole_matrix():
    """As many entries as the budget has, more of them in rows that need and weigh more, some in every row."""
    E, codes, _ = planted_codes(3)
    weights = torch.ones(2000)
    weights[1000:] = 0.01
    n_kept = (dictionary.sparse(E, 48, 4, weights, starts=1, rounds=5).codes != 0).sum(1).float()
    assert n_kept.sum() <= 4 * 2000 and n_kept.sum() > 3.9 * 2000 and n_kept.min() >= 1
    assert n_kept[:1000].mean() > 1.5 * n_kept[1000:].mean()
    needed = (codes != 0).sum(1)[:1000]
    assert n_kept[:1000][needed == 5].mean() > n_kept[:1000][needed == 1].mean()


def test_sparse_is_a_function_of_its_seed_and_needs_rows():
    E, _, _ = planted_codes(4, v=300)
    first, again = (dictionary.sparse(E, 48, 3, starts=1, rounds=3) for _ in range(2))
    assert torch.equal(first.codes, again.codes)
    assert not torch.equal(first.atoms, dictionary.sparse(E, 48, 3, seed=1, starts=1, rounds=3).atoms)
    with pytest.raises(UserError, match="48 atoms need as many rows"):
        dictionary.sparse(E[:20], 48, 3)


def test_two_matrices_determine_the_recipes_of_a_model_with_gains():
    """From E at the input and at the output alone, with noise of a thousandth, eigenvectors find the planted
    recipes up to order, sign and scale; rotations of them match at less than 0.6. Gains alike fix nothing."""
    torch.manual_seed(0)
    vocab = tiny(vocab="gains", vocab_size=2000, n_token=2000).double().vocab
    found = {}
    for name, spread in (("spread", 1.0), ("alike", 0.0)):
        with torch.no_grad():
            gain = vocab.gain[0].clone() if spread else torch.ones(16).double()
            E = vocab.recipe @ vocab.basis
            E_in = (vocab.recipe * gain) @ vocab.basis
            E, E_in = (x + 1e-3 * x.std() * torch.randn_like(x) for x in (E, E_in))
            turn = torch.linalg.eig(torch.linalg.lstsq(E, E_in).solution).eigenvectors.real  # basis^-1
        found[name] = dictionary.partners(vocab.recipe.detach().T, (E @ turn).T).mean()
    rotation = dictionary.random_orthogonal(16, torch.Generator().manual_seed(0))
    null = dictionary.partners(vocab.recipe.detach().T, (vocab.recipe.detach() @ rotation).T).mean()
    assert found["spread"] > 0.9 > 0.6 > max(null, found["alike"])


def test_a_dense_model_of_planted_recipes_becomes_a_sparse_one_with_these():
    """Beside a mean row and a strong core, planted recipes are found in E: signals match at 0.9 or more,
    recipes of random places at less than 0.3, and the model stays nearly the same."""
    import export

    rest, codes, atoms = planted_codes(5, v=1500, s=32, d=32)
    generator = torch.Generator().manual_seed(1)
    core = 3.0 * torch.randn(1500, 2, generator=generator) @ torch.randn(2, 32, generator=generator)
    net = tiny(vocab="dense", n_embd=32, vocab_size=1500, n_token=1500)
    net.vocab.weight.data = rest + core + 5.0 * torch.randn(32, generator=generator)
    found = export.sparse(net, np.full(1500, 10), 32, 3, 2)
    signals = dictionary.readable(found)
    assert dictionary.partners(codes.T, signals.codes.T).mean() > 0.9
    start = tiny(vocab="sparse", n_embd=32, n_signal=32, n_nonzero=3, vocab_size=1500, n_token=1500)
    assert dictionary.partners(codes.T, dictionary.readable(start).codes.T).mean() < 0.3
    E = net.vocab.matrix()
    assert (found.vocab.matrix() - E).norm() < 0.1 * E.norm()
