"""
What does each signal mean? A codebook of all signals, and whether their meanings are those of any rotation.

    python experiments/signal_codebook.py --run=out/reflow-nano

Claims
  effect   signals carry meaning: more of them are enriched for a category of words than before training, than
           with recipes shuffled among tokens of like frequency, and than with permuted labels.
  signals  they carry more of it than other signals do: a native signal separates its category from the other
           words better than a signal of a random rotation, of PCA, of ICA, and than a coordinate of E and of
           the plain GPT's E.

Method. A signal's column of codes ranks all tokens: the codebook lists both ends. Enrichment: rank-sum test
of a category's words among all labelled words, z with the variance of the ranks at hand (right for ties), a
normal approximation, Benjamini-Hochberg over signals x categories at 5 %. Before, codes are freed of their
regression on log frequency and its square: words for money are commoner than those for crops and signals
follow frequency (Spearman is on every card), which would pass for meaning. Held-out z: a signal's category
and sign are chosen on half of every category's words, z is taken from the other half, both ways; by chance
its mean is 0. Class, after Bloom & Lin's reading of logit weights (2024; thresholds ours): prediction or
suppression, by the sign of the skew, if the excess kurtosis is above 3, a Laplace distribution's; else
partition if the bimodality coefficient (skew^2 + 1) / kurtosis is above 5/9, a uniform one's; else diffuse.

Unit: a signal. Dictionaries share no signals, so rivals are paired at random (`pair_up`): an unpaired test.

Cost: no forward pass; 36 rankings of about a thousand words by S signals.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import numpy as np
from scipy.special import erfc
from scipy.stats import rankdata

from experiments import lab

PUBLISHED = "one strong signal's codebook: the, a, in, to, an, at (464M, OpenWebText)"
LABELLINGS = 10  # permuted labels
SAMPLE = 5000  # tokens of the column statistics


def enrichment(codes, labels):
    """Rank-sum z of each category (labels (n,), 0 to C - 1) in each column of codes (n, S), (C, S)."""
    n, ranks = len(codes), rankdata(codes, axis=0)  # (n, S)
    member = np.equal.outer(np.arange(labels.max() + 1), labels).astype(float)  # (C, n)
    size = member.sum(1)[:, None]  # (C, 1)
    excess = member @ ranks - size * (n + 1) / 2  # (C, S)
    spread = np.sqrt(size * (n - size) / (n - 1) * ranks.var(0))
    return np.divide(excess, spread, out=np.zeros_like(excess), where=spread > 0)


def without(codes, nuisance):
    """codes (n, S) less their least squares fit on 1, nuisance (n,) and its square."""
    q = np.linalg.qr(np.vander(nuisance - nuisance.mean(), 3)).Q  # (n, 3)
    return codes - q @ (q.T @ codes)


def p_values(z):
    """Two-sided, normal approximation."""
    return erfc(np.abs(z) / np.sqrt(2))


def enriched(z):
    """Which categories are discoveries at which signals: z (C, S) -> bool (C, S)."""
    return lab.benjamini_hochberg(p_values(z).ravel()).reshape(z.shape)


def halves(labels, rng):
    """Half of the words of every category, at random, bool (n,)."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by category, at random within
    first = np.zeros(len(labels), bool)
    first[order[::2]] = True
    return first


def heldout_z(codes, labels, first):
    """Mean over both ways of z on one half of the category and sign chosen on the other, (S,)."""
    z = [enrichment(codes[half], labels[half]) for half in (first, ~first)]  # (C, S) each
    values = []
    for chosen, tested in (z, z[::-1]):
        best = np.abs(chosen).argmax(0)[None]  # (1, S)
        sign = np.sign(np.take_along_axis(chosen, best, 0))
        values.append(sign * np.take_along_axis(tested, best, 0))
    return np.mean(values, axis=0)[0]


def pair_up(values, n, rng):
    """values (m,) as n means of equal shares of them, in random order: same mean, no pairing, (n,)."""
    total = np.append(0, np.cumsum(np.sort(values))) / len(values)
    at = np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, len(values) + 1), total)
    return rng.permutation(np.diff(at) * n)


def column_shape(codes, log_frequency):
    """Of each column of codes (n, S): Spearman with frequency, skew, excess kurtosis, class, each (S,)."""
    ranks = rankdata(np.column_stack([log_frequency, codes]), axis=0)
    ranks -= ranks.mean(0)
    norms = np.sqrt((ranks**2).sum(0))
    spearman = ranks[:, 0] @ ranks[:, 1:] / np.maximum(norms[0] * norms[1:], 1e-30)
    x = codes - codes.mean(0)
    skew = (x**3).mean(0) / np.maximum((x**2).mean(0) ** 1.5, 1e-30)
    kurtosis = lab.kurtosis(codes.T)
    kinds = np.where((skew**2 + 1) / (kurtosis + 3) > 5 / 9, "partition", "diffuse")
    sharp = np.where(skew > 0, "prediction", "suppression")
    return spearman, skew, kurtosis, np.where(kurtosis > 3, sharp, kinds)


def run(laboratory):
    report = lab.Report(laboratory, "signal_codebook")
    subject, baseline = laboratory.reflow, laboratory.baseline
    words = laboratory.categories()
    names = list(words)
    ids = np.concatenate([words[c] for c in names])
    labels = np.repeat(np.arange(len(names)), [len(words[c]) for c in names])
    rng = laboratory.rng("codebook")
    first = halves(labels, rng)
    known = laboratory.known_tokens()
    sample = np.sort(rng.permutation(known)[:SAMPLE])
    log_frequency = np.log(laboratory.counts[sample])

    def codes_of(dictionary, tokens=ids):
        return dictionary.codes[tokens].double().cpu().numpy()  # (n, S)

    spins = list(laboratory.rotations(subject.dictionary))
    dictionaries = {"native": subject.dictionary, **laboratory.rivals(subject)}
    dictionaries |= {"step 0": laboratory.step0.dictionary, "shuffled": laboratory.shuffled.dictionary}
    dictionaries["E"] = lab.Dictionary("E", subject.E, subject.E.new_ones(subject.E.size(1)).diag())
    if baseline:
        dictionaries["baseline"] = baseline.dictionary
    dictionaries |= {f"rotated {i}": d for i, d in enumerate(spins)}
    frequency = np.log(laboratory.counts[ids])
    codes = {name: without(codes_of(d), frequency) for name, d in dictionaries.items()}
    z = {name: enrichment(c, labels) for name, c in codes.items()}  # (C, S) each
    found = {name: enriched(values) for name, values in z.items()}
    held = {name: heldout_z(c, labels, first) for name, c in codes.items()}
    permuted = [enriched(enrichment(codes["native"], rng.permutation(labels))) for _ in range(LABELLINGS)]

    n_signals = len(subject.dictionary.atoms)
    numbers, spun = {}, [f"rotated {i}" for i in range(len(spins))]
    for name, like in ({n: [n] for n in codes if n not in spun} | {"rotated": spun}).items():
        values = {
            "enriched share": [found[n].any(0).mean() for n in like],
            "best |z|": [np.abs(z[n]).max(0).mean() for n in like],
            "held-out z": [held[n].mean() for n in like],
        }
        numbers[name] = {metric: float(np.mean(v)) for metric, v in values.items()}
        for metric, value in numbers[name].items():
            report.row(metric, value, dictionary=name)
    report.row("enriched share", np.mean([p.any(0).mean() for p in permuted]), control="permuted labels")

    report.claim(
        lab.effect(
            f"signals are enriched for one of {len(names)} categories of words (share of signals)",
            found["native"].any(0).astype(float),
            {"step 0": found["step 0"].any(0), "shuffled": found["shuffled"].any(0)}
            | {"permuted labels": np.mean([p.any(0) for p in permuted], axis=0)},
            "signals",
            published=PUBLISHED,
        )
    )
    rivals = [name for name in ("pca", "ica", "E", "baseline") if name in held]
    report.claim(
        lab.signals(
            "a native signal separates its category better than any other signal does (held-out z)",
            held["native"],
            [held[name] for name in spun],
            {name: pair_up(held[name], n_signals, rng) for name in rivals},
            "signals",
        )
    )

    shapes = {}
    for name, d in {"native": subject.dictionary, "rotated": spins[0]}.items():
        shapes[name] = column_shape(codes_of(d, sample), log_frequency)
        spearman, _, _, kinds = shapes[name]
        numbers[name] |= {"largest |Spearman|": float(np.abs(spearman).max())}
        numbers[name] |= {kind: int(n) for kind, n in zip(*np.unique(kinds, return_counts=True), strict=True)}
    raw = enriched(enrichment(codes_of(subject.dictionary), labels)).any(0).mean()
    report.row("enriched share, frequency left in", raw, dictionary="native")
    numbers["native"]["enriched share, frequency left in"] = float(raw)
    report.numbers = numbers | {"words": len(ids), "categories": names}
    ends = {"native": codebook(subject.dictionary, known), "rotated": codebook(spins[0], known)}
    for s in range(n_signals):
        spearman, skew, kurtosis, kinds = (values[s] for values in shapes["native"])
        report.row("Spearman with log frequency", spearman, signal=s)
        report.row("skew", skew, signal=s)
        report.row("excess kurtosis", kurtosis, signal=s)
        report.row("class", kinds, signal=s)
        report.row("promoted", "|".join(ends["native"][0][s]), signal=s)
        report.row("suppressed", "|".join(ends["native"][1][s]), signal=s)
        for c in np.flatnonzero(found["native"][:, s]):
            report.row(f"z of {names[c]}", z["native"][c, s], signal=s)

    parts = []
    for name, label in (("native", "native"), ("rotated", "rotated 0")):
        chosen = np.abs(enrichment(codes[label][first], labels[first])).max(0)  # (S,)
        best = np.argsort(-chosen, kind="stable")[:5]
        for title, which in (("the five best on half of the words", best), ("not chosen", range(10))):
            parts.append(f"{name} signals, {title}:")
            parts += [
                card(s, ends[name], shapes[name], z[label], held[label], names)
                for s in which
                if s < n_signals
            ]
    report.gallery = "\n".join(parts)
    report.notes.append(f"With frequency left in, {raw:.0%} of the native signals would count as enriched.")
    report.notes.append(
        "Enrichment counts discoveries at 5 % of signals x categories. Signals of one dictionary share their "
        "words, so intervals over signals are of this word list, not of others."
    )
    figures(report, z["native"], held, names)
    return report


def codebook(dictionary, known, k=8):
    """The k most promoted and k most suppressed known tokens of each signal, as text: two (S, k) lists."""
    part = dictionary.codes[known]  # (n, S)
    ends = (part.topk(k, dim=0, largest=largest).indices.T.tolist() for largest in (True, False))
    return [[[lab.show(known[i]) for i in row] for row in rows] for rows in ends]


def card(s, ends, shape, z, held, names):
    """One signal as three lines of text."""
    spearman, skew, kurtosis, kind = (values[s] for values in shape)
    best = np.argsort(-np.abs(z[:, s]))[:3]
    labels = ", ".join(f"{names[c]} {z[c, s]:+.1f}" for c in best)
    return (
        f"  {s:4d}  {labels} (held out {held[s]:+.1f}); {kind}, frequency {spearman:+.2f}, "
        f"skew {skew:+.1f}, kurtosis {kurtosis:+.1f}\n"
        f"        + {'|'.join(ends[0][s])}\n        - {'|'.join(ends[1][s])}"
    )


def figures(report, z, held, names):
    plt = lab.pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), width_ratios=(1.7, 1), layout="constrained")
    shown = np.arange(min(32, z.shape[1]))
    shown = shown[np.argsort(np.abs(z[:, shown]).argmax(0), kind="stable")]
    limit = np.abs(z[:, shown]).max()
    image = left.imshow(z[:, shown], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    left.set(xlabel="signal (the first 32, ordered by their category)", yticks=range(len(names)))
    left.set_yticklabels(names, fontsize=7)
    left.set_xticks(range(len(shown)), shown, fontsize=6, rotation=90)
    left.grid(False)
    fig.colorbar(image, ax=left, label="enrichment, rank-sum z", shrink=0.8)
    spins = np.concatenate([v for name, v in held.items() if name.startswith("rotated")])
    curves = {"rotated": spins} | {n: held[n] for n in ("pca", "ica", "baseline", "step 0") if n in held}
    for name, values in {"native": held["native"], **curves}.items():
        values = np.sort(values)
        right.plot(
            values,
            np.linspace(0, 1, len(values)),
            color=lab.COLOURS[name],
            label=f"{name}, mean {values.mean():.2f}",
            lw=2 if name == "native" else 1.2,
        )
    right.set(xlabel="held-out z of a signal's category", ylabel="share of signals below")
    right.legend(loc="lower right")
    share, numbers = report.claims[0], report.numbers
    title = (
        f"{share.measured.value:.0%} of signals are enriched for a category ({share.verdict}); held-out z "
        f"{numbers['native']['held-out z']:.2f} against {numbers['rotated']['held-out z']:.2f} of random "
        f"rotations ({report.claims[1].verdict})"
    )
    report.figure(fig, "codebook", title)


if __name__ == "__main__":
    lab.main(run)
