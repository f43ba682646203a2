"""
Statistics. Everything that a claim is about is a mean over units: words, questions, prompts, tokens.
"""

import functools

import numpy as np

from experiments.lab.results import Estimate


def estimate(values, groups=None, clusters=None, resamples=2000, seed=0):
    """Mean of values (n,) and its 95 % percentile bootstrap interval.

    `groups` (n,): units that are resampled whole. `clusters` (n,): what units share (the signal, the model),
    the same in a whole group. Clusters are resampled first, then the units within each: if few clusters hold
    most units, the interval is wide.
    """
    values = np.asarray(values, float)
    if not len(values):
        return Estimate(np.nan, np.nan, np.nan)
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    _, first, groups = np.unique(groups, return_index=True, return_inverse=True)
    sums = np.bincount(groups, values)
    sizes = np.bincount(groups)
    cluster = np.zeros(len(sums), int)
    if clusters is not None:
        cluster = np.unique(np.asarray(clusters)[first], return_inverse=True)[1]
    draws = bootstrap_draws(cluster.tobytes(), resamples, seed)
    means = [(w @ sums) / (w @ sizes) for w in map(np.float64, np.array_split(draws, resamples // 100))]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


@functools.lru_cache(maxsize=4)  # controls, gauges and figures of a claim have the same units
def bootstrap_draws(clusters, resamples, seed):
    """How often each unit is in each bootstrap sample, (resamples, n). `clusters`: int64 ids (n,), bytes."""
    cluster = np.frombuffer(clusters, int)
    members = [np.flatnonzero(cluster == c) for c in range(cluster.max() + 1)]
    n = len(members)
    rng = np.random.default_rng(seed)
    draws = np.empty((resamples, len(cluster)), np.uint16)
    for some in np.split(draws, resamples // 100):  # (100, n)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=100)  # (100, clusters)
        for part, times in zip(members, drawn.T, strict=True):
            some[:, part] = rng.multinomial(times * len(part), np.full(len(part), 1 / len(part)))
    return draws


def t_interval(values):
    """Mean of values (n,) with its 95 % t interval; unbounded for fewer than three."""
    from scipy.stats import t  # takes half a second to import

    n = len(values)
    mean = float(np.mean(values)) if n else np.nan
    if n < 3:
        return Estimate(mean, -np.inf, np.inf)
    half = t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return Estimate(mean, float(mean - half), float(mean + half))


def random_mask(n, size, kept, seed=0):
    """In each of n rows `kept` random entries of `size` are True, (n, size); all if there are no more.

    The largest of few is smaller than the largest of many: maxima over sets of unlike size are compared over
    random subsets of equal size.
    """
    ranks = np.random.default_rng(seed).random((n, size)).argsort(1).argsort(1)
    return ranks < kept


def regress_out(codes, nuisance):
    """codes (n, S) less their least squares fit on 1, nuisance (n,) and its square."""
    q = np.linalg.qr(np.vander(nuisance - nuisance.mean(), 3)).Q  # (n, 3)
    return codes - q @ (q.T @ codes)


def rank_sums(codes, labels, n_categories=None):
    """Rank-sum z of each category (labels (n,), 0 to C - 1) in each column of codes (n, S), (C, S).

    Ties are corrected for. n_categories: C, if the last ones may have no members; their z is 0.
    """
    from scipy.stats import rankdata  # takes a second to import

    n = len(codes)
    n_categories = labels.max() + 1 if n_categories is None else n_categories
    ranks = rankdata(codes, axis=0)  # (n, S)
    member = np.equal.outer(np.arange(n_categories), labels).astype(float)  # (C, n)
    size = member.sum(1)[:, None]  # (C, 1)
    excess = member @ ranks - size * (n + 1) / 2  # (C, S)
    spread = np.sqrt(size * (n - size) / (n - 1) * ranks.var(0))
    return np.divide(excess, spread, out=np.zeros_like(excess), where=spread > 0)


def exchanged(counts, rng):
    """A random permutation (V,) of tokens among those of like frequency: within an octave of counts (V,)."""
    octave = np.log2(np.maximum(counts, 0.5)).astype(int)  # -1 if never seen
    permutation = np.arange(len(octave))
    for i in np.unique(octave):
        part = np.flatnonzero(octave == i)
        permutation[part] = rng.permutation(part)
    return permutation


def benjamini_hochberg(p, rate=0.05):
    """Which p-values (n,) are discoveries at a rate of false ones, (n,) bool (Benjamini & Hochberg, 1995)."""
    p = np.asarray(p)
    order = np.argsort(p)
    passed = np.nonzero(p[order] <= rate * np.arange(1, len(p) + 1) / len(p))[0]
    n_found = passed[-1] + 1 if len(passed) else 0
    found = np.zeros(len(p), bool)
    found[order[:n_found]] = True
    return found


def two_sided(value, others):
    """Exact p that `value` is one of the exchangeable `others`, by its distance from the mean of them all."""
    every = np.append(value, others)
    distance = np.abs(every - every.mean())
    return float((distance >= distance[0] * (1 - 1e-12)).mean())


def gini(rows):
    """Gini coefficient of |rows| (n, S), 0 for even to 1 for sparse, (n,): Hurley & Rickard, 0811.4706."""
    x = np.sort(np.abs(rows), axis=1)
    n = x.shape[1]
    return 2 * (x * np.arange(1, n + 1)).sum(1) / (n * x.sum(1)) - (n + 1) / n


def kurtosis(rows):
    """Excess kurtosis of rows (n, S), 0 for a Gaussian, -3 for a constant row, (n,)."""
    x = rows - rows.mean(1, keepdims=True)
    square = x * x  # x**4 takes ten times as long
    return (square * square).mean(1) / np.maximum(square.mean(1) ** 2, 1e-30) - 3
