"""
The factorization E = recipes @ basis as matrices: ranks, coherence, balance, what E does not see.
"""

import numpy as np
import torch

from experiments.lab.claims import to_numpy
from experiments.lab.spaces import cosines

ROUNDING = 1e-6  # of the largest singular value: smaller ones are rounding


def factors(net):
    """(recipes (n_tokens, S), basis (S, d)) as they are in the model, float64; a dense one has a basis I."""
    recipes = net.vocab.recipes().detach()[: net.config.n_tokens].double()
    basis = getattr(net.vocab, "basis", None)
    if basis is None:
        return recipes, torch.eye(recipes.size(1)).to(recipes)
    return recipes, basis.detach().double()


def spectrum(matrix):
    """Singular values of a matrix, largest first; min(rows, columns) of them."""
    tall = matrix if len(matrix) >= matrix.size(1) else matrix.T
    return to_numpy(torch.linalg.eigvalsh(tall.T @ tall).clamp(min=0).sqrt().flip(0))


def without_rounding(s):
    """Singular values (n,), largest first, that are more than rounding."""
    return s[s > s[0] * ROUNDING]


def ranks(s):
    """{measure: value} of singular values s, largest first."""
    s = without_rounding(s)
    p = s / s.sum()
    return {
        "rank": len(s),
        "effective rank": float(np.exp(-(p * np.log(p)).sum())),
        "stable rank": float((s**2).sum() / s[0] ** 2),
        "condition number": float(s[0] / s[-1]),
    }


def coherences(rows):
    """Largest |cosine| of each row (S, d) with another one, (S,)."""
    return to_numpy(cosines(rows).abs().fill_diagonal_(0).amax(1))


def welch(n, d):
    """The least coherence that n directions in d dimensions can have."""
    return float(np.sqrt((n - d) / (d * (n - 1)))) if n > d else 0.0


def imbalance(a, b):
    """|A - B| / (|A| + |B|) of two matrices: 0 if they are equal, at most 1."""
    return float((a - b).norm() / (a.norm() + b.norm()).clamp(min=1e-30))


def balance(recipes, basis):
    """(Wr'Wr, WbWb'), (S, S) each: gradient flow changes both by the same."""
    return recipes.T @ recipes, basis @ basis.T


def balances(now, start):
    """Imbalance of two factors (recipes, basis), and of their changes since another pair of them."""
    codes, signals = balance(*now)
    first_codes, first_signals = balance(*start)
    changes = imbalance(codes - first_codes, signals - first_signals)
    return {"imbalance": imbalance(codes, signals), "imbalance of changes": changes}


def unseen(recipes, basis):
    """Share of the recipes' energy that E never sees: the part that the basis maps to zero."""
    u, s, _ = torch.linalg.svd(basis, full_matrices=False)
    seen = recipes @ u[:, s > s[0] * 1e-9]
    return float(1 - (seen**2).sum() / (recipes**2).sum())


def anisotropy(basis):
    """|G - cI| / |G| of G = WbWb' with the best c: 0 if recipe cosines are E's cosines."""
    g = basis @ basis.T
    return float((g - g.trace() / len(g) * torch.eye(len(g)).to(g)).norm() / g.norm())


def agreement(codes, E):
    """Correlation and mean difference of the cosines of all pairs of rows in codes (n, S) and in E (n, d)."""
    i, j = torch.triu_indices(len(E), len(E), 1)
    of_codes = to_numpy(cosines(codes)[i, j])
    of_E = to_numpy(cosines(E)[i, j])
    return float(np.corrcoef(of_codes, of_E)[0, 1]), float(np.abs(of_codes - of_E).mean())
