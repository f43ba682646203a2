"""Dictionaries: every one is the same embedding; PCA and ICA find what is planted."""

import numpy as np
import pytest
import torch

import dictionary
from configurator import UserError
from dictionary import Dictionary
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


def test_ica_that_degenerates_is_fitted_again_or_refused(monkeypatch):
    """In fp32 FastICA may silently end near a singular matrix: that is no dictionary of E."""
    from sklearn.decomposition import FastICA

    whole = FastICA.fit
    E = tiny().vocab.matrix().detach()

    def fit(bad):
        def degenerate(self, x):
            whole(self, x)
            if x.dtype in bad:
                self.components_[0] = self.components_[1] * (1 + 1e-9)

        return degenerate

    monkeypatch.setattr(FastICA, "fit", fit([np.float32]))
    found = dictionary.ica(E, torch.arange(4000))
    assert torch.allclose(found.codes @ found.atoms, E, atol=1e-5)
    monkeypatch.setattr(FastICA, "fit", fit([np.float32, np.float64]))
    with pytest.raises(UserError, match="ICA of this embedding failed"):
        dictionary.ica(E, torch.arange(4000))


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
