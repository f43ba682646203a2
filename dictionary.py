"""
One embedding, many ways to write it: codes (V x S) @ atoms (S x d) = E.

A *dictionary* is such a pair. `native` is the learned one. For every invertible R, (codes R)(R^-1 atoms) is
the *same function*, so a result that also holds for `rotated` is not evidence about the learned signals.
`pca` and `ica` find a dictionary of E after the fact.
"""

import warnings
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from configurator import UserError


@dataclass
class Dictionary:
    """codes (V, S) @ atoms (S, d) = E. Atoms have length 1, so a code is a length in the residual stream."""

    name: str
    codes: torch.Tensor
    atoms: torch.Tensor

    def __post_init__(self):
        length = self.atoms.norm(dim=1)  # (S,)
        self.codes = self.codes * length
        self.atoms = self.atoms / length.clamp(min=1e-30)[:, None]

    @property
    def n_signals(self):
        return len(self.atoms)

    @property
    def eighth(self):
        """An eighth of the signals, at least one: the size at which cut recipes are compared."""
        return max(1, self.n_signals // 8)

    def matrix(self):
        """E (V, d)."""
        return self.codes @ self.atoms

    def activations(self, h):
        """A (..., S) of normalised final states h (..., d): logits are A @ codes.T, exactly."""
        return h @ self.atoms.T

    def part(self, tokens):
        """The same dictionary of some tokens alone, ids (n,): codes (n, S)."""
        index = torch.as_tensor(tokens).to(self.codes.device)
        return Dictionary(self.name, self.codes[index], self.atoms)


def top_k(codes, k):
    """codes (..., S) with all but the k entries of largest size in each row set to zero; k > S keeps all."""
    index = codes.abs().topk(min(k, codes.size(-1)), dim=-1, sorted=False).indices
    return torch.zeros_like(codes).scatter(-1, index, codes.gather(-1, index))


def native(net):
    """The learned dictionary of a ReFlow; of a dense one, the coordinates of E. Padding rows are left out."""
    codes = net.vocab.recipes().detach()[: net.config.n_tokens]
    basis = getattr(net.vocab, "basis", None)
    atoms = torch.eye(net.config.n_embd, device=codes.device) if basis is None else basis.detach()
    return Dictionary("native", codes, atoms)


def random_orthogonal(n, generator):
    """An orthogonal matrix (n, n) with Haar measure (Mezzadri, math-ph/0609050), float64."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def rotated(dictionary, generator):
    """The dictionary after a uniformly random rotation of its signals: the gauge control."""
    q = random_orthogonal(dictionary.n_signals, generator).to(dictionary.codes)
    return Dictionary("rotated", dictionary.codes @ q, q.T @ dictionary.atoms)


def skewed(dictionary, generator, condition=10.0):
    """The dictionary after a random *non-orthogonal* change of signals, which changes cosines, not E."""
    n = dictionary.n_signals
    stretch = torch.logspace(-0.5, 0.5, n, base=condition, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    change = ((u * stretch) @ v).to(dictionary.codes)
    inverse = ((v.T / stretch) @ u.T).to(dictionary.codes)
    return Dictionary("skewed", dictionary.codes @ change, inverse @ dictionary.atoms)


def row_space(E):
    """(orthonormal basis (r, d) of the row space of E (V, d), coordinates (V, r)); r: the numerical rank."""
    values, vectors = torch.linalg.eigh(E.double().T @ E.double())
    keep = values > values[-1] * 1e-9
    basis = vectors[:, keep].T.to(E)
    return basis, E @ basis.T


def pca(E, fit):
    """Principal axes of the rows `fit` (token ids) of E (V, d): a dictionary of rank(E) atoms."""
    basis, z = row_space(E)
    _, _, axes = torch.linalg.svd(z[fit] - z[fit].mean(0), full_matrices=False)  # (r, r)
    if len(axes) < z.size(1):  # fewer tokens than dimensions: any completion will do
        axes = torch.linalg.qr(torch.cat([axes, torch.eye(z.size(1)).to(z)]).T).Q.T
    return Dictionary("pca", z @ axes.T, axes @ basis)


def ica(E, fit, seed=0):
    """Independent components of the rows `fit` of E (V, d) (FastICA; Hyvarinen, 1999).

    Independent axes of embeddings are interpretable (Yamagiwa et al., 2305.13175), so this is the rival that
    a learned basis has to beat. Raises UserError if it finds no change of basis that reproduces E.
    """
    from sklearn.decomposition import FastICA  # takes a second to import

    basis, z = row_space(E)
    rows = z[fit[: max(4000, 8 * z.size(1))]].cpu().numpy()
    fast = FastICA(whiten="unit-variance", random_state=seed, max_iter=200, tol=1e-3)
    for precision in (np.float32, np.float64):  # fp32 takes half the time, but may end in a singular matrix
        with warnings.catch_warnings(), suppress(ValueError, torch.linalg.LinAlgError):
            warnings.simplefilter("ignore")  # not converged after 200 iterations: still a fair rotation
            fast.fit(rows.astype(precision))
            unmix = torch.as_tensor(fast.components_, dtype=torch.float64)  # (r, r)
            found = Dictionary("ica", z @ unmix.T.to(z), torch.linalg.inv(unmix.T).to(z) @ basis)
            if torch.allclose(found.matrix(), E, rtol=0, atol=1e-3 * E.abs().max().item()):
                return found
    raise UserError(f"ICA of this embedding failed: give another --seed than {seed}")
