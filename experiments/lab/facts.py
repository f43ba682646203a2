"""
Is a signal a fact? Measures of one signal at a time: does it mean something, and does it act?

Words of categories are split in halves: one half chooses, for every signal, the category and the sign that it
is about; the other half tests that choice.
"""

from dataclasses import dataclass

import numpy as np
import torch

from dictionary import pursue
from experiments.lab.stats import benjamini_hochberg, rank_sums

N_OTHERS = 16  # signals that the removal of one is compared with


@dataclass
class Enriched:
    """What the signals of a dictionary are about, one entry a signal: arrays (S,)."""

    category: np.ndarray  # number of the category that one half of the words chose
    sign: np.ndarray  # whether its words are high or low on the signal, 1 or -1
    p: np.ndarray  # of the other half, one-sided
    found: np.ndarray  # discoveries at a rate of 5 % false ones (Benjamini & Hochberg, 1995)


def halves(labels, rng):
    """A random half of every category, (n,) bool, for labels (n,)."""
    first = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        first[members[: len(members) // 2]] = True
    return first


def enriched(codes, labels, first):
    """The Enriched of codes (n, S) of words with labels (n,), of which the half `first` (n,) chooses."""
    from scipy.stats import norm

    n_categories = labels.max() + 1
    chosen = rank_sums(codes[first], labels[first], n_categories)  # (C, S)
    category = np.abs(chosen).argmax(0)
    signals = np.arange(codes.shape[1])
    sign = np.sign(chosen[category, signals])
    tested = rank_sums(codes[~first], labels[~first], n_categories)[category, signals] * sign
    p = norm.sf(tested)
    return Enriched(category, sign, p, benjamini_hochberg(p))


def missed(E, atoms, k, weights):
    """Weighted share of the energy of E (V, d) that k atoms (S, d) a row leave, by matching pursuit."""
    E, atoms, weights = (torch.as_tensor(x).float() for x in (E, atoms, weights))
    _, gain = pursue(E, torch.nn.functional.normalize(atoms, dim=1), k)
    energy = (E**2).sum(1)
    return float(((energy - gain.sum(1)) * weights).sum() / (energy * weights).sum())


def removed(p, activation, codes, t):
    """Change of log p (n, V) if t times a signal is taken out: activation (n,) of it, its codes (V,)."""
    shift = -t * activation[:, None] * codes  # (n, V)
    return shift - (p * shift.exp()).sum(1, keepdim=True).log()


def acts(E, atoms, codes, h, signal, members, rng):
    """How much removing a signal lowers the log-probability of `members` (ids), over what others do.

    E (V, d), atoms (S, d), codes (V, S); h (n, d): normalised final states of neutral text. The others are
    N_OTHERS random signals, removed as strongly as gives the same KL; that is taken to second order, so that
    the strength is known in closed form. The result is the drop, divided by the largest drop of another: 2
    means twice the effect. If no other lowers them, it is infinite, or not a number if this one does not.
    """
    log_p = (h @ E.T).double().log_softmax(-1)  # (n, V)
    p = log_p.exp()
    codes = codes.double()
    others = rng.permutation(np.delete(np.arange(len(atoms)), signal))[:N_OTHERS]
    tried = torch.from_numpy(np.append(signal, others))
    activation = (h @ atoms[tried].T).double()  # (n, m)
    variance = p @ codes[:, tried] ** 2 - (p @ codes[:, tried]) ** 2  # (n, m), of codes among next tokens
    kl = (activation**2 * variance).mean(0) / 2  # (m,)
    strength = (kl[0] / kl.clamp(min=1e-30)).sqrt()
    drops = [
        -removed(p, activation[:, i], codes[:, s], strength[i])[:, members].mean()
        for i, s in enumerate(tried)
    ]
    largest = max(drop.item() for drop in drops[1:])
    return drops[0].item() / largest if largest > 0 else np.inf if drops[0] > 0 else np.nan
