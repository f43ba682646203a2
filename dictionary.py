"""
One embedding, many ways to write it: codes (V x S) @ atoms (S x d) = E.

A *dictionary* is such a pair. `native` is the learned one. For every invertible R, (recipes R)(R^-1 basis) is
the *same function*, so a result that also holds for `rotated` is not evidence about the learned signals.
`pca` and `ica` find a dictionary of E after the fact.
"""

import warnings
from dataclasses import dataclass, field

import numpy as np
import torch

from configurator import UserError
from hardware import one_thread

RANK = 1e-12  # of the largest squared singular value: smaller ones are rounding
VARIANCE = 1e-10  # of the largest variance: directions with less are not whitened, their rounding would grow
ICA_STEPS = 200


@dataclass
class Dictionary:
    """recipes (V, S) @ basis (S, d) = E, and the same with atoms of length 1.

    codes (V, S) are the recipes times the lengths of the basis rows: a code is a length in the residual
    stream. Changes of signals (`rotated`, `skewed`) act on the factors as they are in the model. Rotated
    *codes* would mix atoms of unlike length, so that native codes would stand out among them without axes.
    """

    name: str
    recipes: torch.Tensor
    basis: torch.Tensor
    fit: dict = field(default_factory=dict)  # how it was found: {quantity: value}

    def __post_init__(self):
        length = self.basis.norm(dim=1)  # (S,)
        self.codes = self.recipes * length
        self.atoms = self.basis / length.clamp(min=1e-30)[:, None]

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
        return Dictionary(self.name, self.recipes[index], self.basis)


def top_k(codes, k):
    """codes (..., S) with all but the k entries of largest size in each row set to zero; k > S keeps all."""
    index = codes.abs().topk(min(k, codes.size(-1)), dim=-1, sorted=False).indices
    return torch.zeros_like(codes).scatter(-1, index, codes.gather(-1, index))


def native(net):
    """The learned dictionary of a ReFlow; of a dense one, the coordinates of E. Padding rows are left out."""
    recipes = net.vocab.recipes().detach()[: net.config.n_tokens]
    basis = getattr(net.vocab, "basis", None)
    basis = torch.eye(net.config.n_embd, device=recipes.device) if basis is None else basis.detach()
    return Dictionary("native", recipes, basis)


def random_orthogonal(n, generator):
    """An orthogonal matrix (n, n) with Haar measure (Mezzadri, math-ph/0609050), float64."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def rotated(dictionary, generator):
    """The dictionary after a uniformly random rotation of its signals: the gauge control."""
    q = random_orthogonal(dictionary.n_signals, generator).to(dictionary.recipes)
    return Dictionary("rotated", dictionary.recipes @ q, q.T @ dictionary.basis)


def skewed(dictionary, generator, condition=10.0):
    """The dictionary after a random *non-orthogonal* change of signals, which changes cosines, not E."""
    n = dictionary.n_signals
    stretch = torch.logspace(-0.5, 0.5, n, base=condition, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    change = ((u * stretch) @ v).to(dictionary.recipes)
    inverse = ((v.T / stretch) @ u.T).to(dictionary.recipes)
    return Dictionary("skewed", dictionary.recipes @ change, inverse @ dictionary.basis)


def principal_axes(E, fit):
    """(axes (r, d), variances (k,)): the k axes in which the rows `fit` of E (V, d) vary, then r - k others.

    Orthonormal, largest variance first. The others complete the row space of E: they are the same in all
    fitted rows, or only other tokens have them.
    """
    rows = E[fit] - E[fit].mean(0)
    variances, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))  # smallest first
    varies = variances > VARIANCE * variances[-1]
    energy = E.T @ E  # (d, d)
    still = vectors[:, ~varies]  # (d, d - k)
    seen, turn = torch.linalg.eigh(still.T @ energy @ still)
    others = still @ turn[:, seen > RANK * torch.linalg.eigvalsh(energy)[-1]]  # (d, r - k)
    axes = torch.cat([vectors[:, varies].flip(1), others.flip(1)], 1).T
    return axes, variances[varies].flip(0)


@one_thread()
def pca(E, fit):
    """Principal axes of the rows `fit` (token ids) of E (V, d): a dictionary of rank(E) atoms."""
    rows = E.cpu().double()
    axes, _ = principal_axes(rows, fit.cpu())
    return Dictionary("pca", (rows @ axes.T).to(E), axes.to(E))


@one_thread()
def ica(E, fit, seed=0):
    """Independent components of the rows `fit` of E (V, d) (FastICA; Hyvarinen, 1999).

    Independent axes of embeddings are interpretable (Yamagiwa et al., 2305.13175), so this is the rival that
    a learned basis has to beat. Axes in which the rows do not vary are atoms of their own. All runs on one
    thread: where the fit has not converged, rounding decides where it ends. `fit` of the result says how it
    went. Raises UserError if it fails.
    """
    from sklearn.decomposition import FastICA  # takes a second to import
    from sklearn.exceptions import ConvergenceWarning

    rows, fit = E.cpu().double(), fit.cpu()
    axes, variances = principal_axes(rows, fit)
    k = len(variances)
    z = rows @ axes.T  # (V, r)
    z[:, :k] /= variances.sqrt()
    white = (z[fit, :k] - z[fit, :k].mean(0)).numpy()  # (n, k)
    fast = FastICA(whiten=False, random_state=seed, max_iter=ICA_STEPS, tol=1e-3)
    for precision in (np.float32, np.float64):  # fp32 takes half the time; Gaussian rows may need more
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # `fit` of the result says it
            try:
                u, s, v = np.linalg.svd(fast.fit(white.astype(precision)).components_.astype(float))  # (k, k)
            except (ValueError, np.linalg.LinAlgError) as error:
                raise UserError(f"ICA of this embedding failed: {error}") from None
        if np.abs(s - 1).max() < 1e-2:
            break
    else:
        raise UserError("ICA of this embedding failed: what it found is no rotation")
    turn = torch.from_numpy(u @ v)  # exactly orthogonal, so that its transpose undoes it
    z[:, :k] = z[:, :k] @ turn.T
    axes[:k] = turn @ (variances.sqrt()[:, None] * axes[:k])
    found = Dictionary("ica", z.to(E), axes.to(E))
    found.fit = {
        "rows": len(white),
        "axes without variance": len(axes) - k,
        "converged": fast.n_iter_ < ICA_STEPS,
        "iterations": fast.n_iter_,
        "reconstruction error": float((found.matrix() - E).abs().max() / E.abs().max()),
        "threads": 1,
    }
    return found
