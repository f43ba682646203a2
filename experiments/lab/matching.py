"""
Do two models have the same signals? And what do they share at all?

Tokens are the frame that all models of one vocabulary share: a signal of one model is compared with a signal
of another by their columns of codes. Two models never share more signals than directions of E, so
`shared_directions` is the ceiling of `matches`.
"""

import numpy as np
import torch

from data.words import SHOWN_COUNT
from dictionary import ica, partners, random_orthogonal, sparse
from experiments.lab.claims import to_numpy
from experiments.lab.stats import exchanged, regress_out

SHARED = 0.5  # a signal, or a direction of E, with a larger correlation counts as shared
RECOVERED = 0.7  # mean match from which an independent method has found the signals
RIDGE = 0.1  # of the mean variance of a direction


def partner_correlation(a, b):
    """|correlation| of each column of a (n, S) with its partner in b (n, S'), 0 without one, (S,)."""
    return partners(*(torch.from_numpy(codes - codes.mean(0)).T for codes in (a, b)))


def freed(codes, counts):
    """codes (V, S) of the tokens seen at least SHOWN_COUNT times, log frequency and its square regressed out.

    counts (V,): how often training had each token. Frequency alone makes any two models alike, and the rows
    of rare tokens are mostly their random start. Result (n, S).
    """
    often = np.flatnonzero(counts >= SHOWN_COUNT)
    return regress_out(codes[often], np.log(counts[often]))


def matches(a, b, counts):
    """|correlation| of signals of a (V, S) with their partners in b (V, S'), beyond frequency, (S,)."""
    return partner_correlation(freed(a, counts), freed(b, counts))


def null_matches(a, b, counts, rng, null, draws=19):
    """`matches` of a with b where b has no axes, or no tokens, of its own, (draws, S).

    `null`: "rotation" of b's signals, the same function, where there are as many signals as dimensions; or
    "exchange" of b's rows among tokens of like frequency, which keeps how sparse each row is.
    """
    found = []
    for _ in range(draws):
        if null == "rotation":
            generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
            changed = b @ random_orthogonal(b.shape[1], generator).numpy()
        else:
            changed = b[exchanged(counts, rng)]
        found.append(matches(a, changed, counts))
    return np.stack(found)


def recovered(d, counts, seed, starts, compared=None, most=None):
    """Mean match of a Dictionary's signals with those found in its product anew, the worst of the starts.

    By ICA, or by sparse codes (of at most `most` rows) where there are more signals than dimensions. Tokens
    weigh by counts (V,); `compared` (V,): other counts for the match, zero for tokens that are left out.
    """
    E = d.matrix()
    often = torch.from_numpy(np.flatnonzero(counts >= SHOWN_COUNT))
    found = []
    for start in range(starts):
        if d.n_signals > E.size(1):
            n = round(float((d.codes != 0).sum()) / len(d.codes))
            weights = torch.from_numpy(counts + 1.0)
            other = sparse(E, d.n_signals, n, weights, seed * 100 + start + 1, starts=1, most=most)
        else:
            other = ica(E, often, seed * 100 + start + 1)
        ours, theirs = to_numpy(d.codes), to_numpy(other.codes)
        found.append(matches(ours, theirs, counts if compared is None else compared).mean())
    return min(found)


def inverse_root(x):
    """(X'X / n + ridge)^(-1/2) of x (n, d), (d, d)."""
    covariance = x.T @ x / len(x)
    values, vectors = np.linalg.eigh(
        covariance + RIDGE * np.trace(covariance) / len(covariance) * np.eye(x.shape[1])
    )
    return (vectors / np.sqrt(values)) @ vectors.T


def shared_directions(a, b, counts, rng):
    """Correlations of the directions that E of two models share, largest first, (d,): the ceiling.

    Ridge CCA (Vinod, 1976) of a (V, d) and b (V, d') beyond frequency, fitted on one half of the tokens; the
    correlations are those of the other half, mean over the two halves. d is the smaller width.
    """
    a, b = freed(a, counts), freed(b, counts)
    halves = np.array_split(rng.permutation(len(a)), 2)
    found = []
    for fit, test in (halves, halves[::-1]):
        (x, x_test), (y, y_test) = (((m - m[fit].mean(0))[fit], (m - m[fit].mean(0))[test]) for m in (a, b))
        left, right = inverse_root(x), inverse_root(y)
        u, _, v = np.linalg.svd(left @ (x.T @ y) @ right, full_matrices=False)
        ours, theirs = x_test @ left @ u, y_test @ right @ v.T  # (n, d)
        found.append([np.corrcoef(*pair)[0, 1] for pair in zip(ours.T, theirs.T, strict=True)])
    return np.sort(np.mean(found, axis=0))[::-1]
