"""
What does each signal mean? A codebook of all signals, and a test against the signals of other dictionaries.

    python experiments/signal_codebook.py --run=out/reflow-nano

Method
    A signal's column of codes ranks all tokens. The codebook lists both ends, of tokens seen 5 times or more.

    Enrichment: rank-sum test of a category's words among all labelled words. z has the variance of the
    observed ranks, which is right for ties; p is of the normal approximation. Discoveries are those of
    Benjamini and Hochberg, over signals x categories, at 5 %. The test takes the residuals of a regression of
    the codes on log frequency and its square: words for money are more frequent than those for crops, and
    signals follow frequency (Spearman is on every card), which would look like meaning.

    Held-out z: a signal's category and sign are chosen on half of every category's words, z is of the other
    half; mean of both ways. By chance its mean is 0. Dictionaries share no signals, so a rival's values are
    paired at random (`pair_up`). Unit: a signal. The intervals hold for this word list, not for others.

    Class of a column, after Bloom & Lin's reading of logit weights (2024; thresholds ours): prediction or
    suppression, by the sign of the skew, if the excess kurtosis is above 3, a Laplace distribution's; else
    partition if (skew^2 + 1) / kurtosis is above 5/9, a uniform distribution's; else diffuse.

Cost
    No forward pass. 36 rankings of about a thousand words by S signals.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
import numpy as np

from data.words import Words
from dictionary import Dictionary
from experiments.lab import Lab, Report, Scores, run_experiment
from experiments.lab.claims import to_numpy
from experiments.lab.plots import COLOURS, plot_heat_map
from experiments.lab.probes import labelled
from experiments.lab.stats import benjamini_hochberg, kurtosis, rank_sums, regress_out

CLAIMS = {
    "enriched": "more signals are enriched for a category of words than in null models or by random labels",
    "separates": "a native signal separates its category from other words better than other signals do",
}
PUBLISHED = "one strong signal's codebook: the, a, in, to, an, at (464M, OpenWebText)"
CONTROLS = ("shuffled", "permuted labels")  # beside the null models
LABELLINGS = 10  # permuted labels
SAMPLE = 5000  # tokens of the column statistics


def p_values(z):
    """Two-sided, normal approximation."""
    from scipy.special import erfc

    return erfc(np.abs(z) / np.sqrt(2))


def discoveries(z):
    """Which categories are discoveries at which signals: z (C, S) -> bool (C, S)."""
    return benjamini_hochberg(p_values(z).ravel()).reshape(z.shape)


def halves(labels, rng):
    """Half of the words of every category, at random, bool (n,)."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by category, at random within
    first = np.zeros(len(labels), bool)
    first[order[::2]] = True
    return first


def heldout_z(codes, labels, first):
    """Mean over both ways of z on one half of the category and sign chosen on the other, (S,)."""
    z = [rank_sums(codes[half], labels[half]) for half in (first, ~first)]  # (C, S) each
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


def column_shapes(codes, log_frequency):
    """{quantity: (S,)} of the columns of codes (n, S) of tokens with log_frequency (n,)."""
    from scipy.stats import rankdata

    ranks = rankdata(np.column_stack([log_frequency, codes]), axis=0)
    ranks -= ranks.mean(0)
    norms = np.sqrt((ranks**2).sum(0))
    spearman = ranks[:, 0] @ ranks[:, 1:] / np.maximum(norms[0] * norms[1:], 1e-30)
    x = codes - codes.mean(0)
    skew = (x**3).mean(0) / np.maximum((x**2).mean(0) ** 1.5, 1e-30)
    excess = kurtosis(codes.T)
    flat = np.where((skew**2 + 1) / np.maximum(excess + 3, 1) > 5 / 9, "partition", "diffuse")
    sharp = np.where(skew > 0, "prediction", "suppression")
    kind = np.where(excess > 3, sharp, flat)
    return {"Spearman with log frequency": spearman, "skew": skew, "excess kurtosis": excess, "class": kind}


@dataclass
class Codebook:
    """The signals of one dictionary, each with its tokens, its categories and the shape of its column."""

    dictionary: Dictionary
    words: Words
    names: list[str]  # of the categories
    z: np.ndarray  # of every category, (C, S)
    heldout: np.ndarray  # held-out z, (S,)
    shapes: dict[str, np.ndarray]  # of column_shapes

    def ends(self, s):
        """The most promoted and the most suppressed tokens of signal s, as text."""
        column = self.dictionary.codes[:, s]
        return {"promoted": self.words.top(column, 8), "suppressed": self.words.top(-column, 8)}

    def cards(self, title, signals):
        """Three lines of text for each of `signals`, under a title."""
        lines = [f"{title}:"]
        for s in signals:
            spearman, skew, excess, kind = (column[s] for column in self.shapes.values())
            best = np.argsort(-np.abs(self.z[:, s]))[:3]
            categories = ", ".join(f"{self.names[c]} {self.z[c, s]:+.1f}" for c in best)
            ends = self.ends(s)
            lines.append(
                f"  {s:4d}  {categories} (held out {self.heldout[s]:+.1f}); {kind}, "
                f"frequency {spearman:+.2f}, skew {skew:+.1f}, kurtosis {excess:+.1f}"
            )
            lines += [f"        + {ends['promoted']}", f"        - {ends['suppressed']}"]
        return "\n".join(lines) + "\n"

    def write(self, report):
        """Rows of every signal."""
        found = discoveries(self.z)
        for s in range(self.dictionary.n_signals):
            values = {name: column[s] for name, column in self.shapes.items()} | self.ends(s)
            values |= {f"z of {self.names[c]}": self.z[c, s] for c in np.flatnonzero(found[:, s])}
            for metric, value in values.items():
                report.row(metric, value, signal=s)


def other_dictionaries(lab):
    """{name: Dictionary}: of null models, shuffled recipes, coordinates of E and of the plain GPT's E."""
    E = lab.model.E
    found = {name: subject.dictionary for name, subject in (lab.nulls | {"shuffled": lab.shuffled}).items()}
    found["E"] = Dictionary("E", E, E.new_ones(E.size(1)).diag())
    if lab.baseline:
        found["baseline"] = lab.baseline.dictionary
    return found


def run(lab: Lab, config=None) -> Report:
    report = Report(lab, "signal_codebook", CLAIMS)
    native = lab.model.dictionary
    ids, labels, names = labelled(lab)
    rng = lab.rng("codebook")
    half = halves(labels, rng)
    sample = np.sort(rng.permutation(lab.words.known_tokens())[:SAMPLE])

    def residuals(d):
        """Codes (n, S) of the labelled words alone, without what frequency explains."""
        return regress_out(to_numpy(d.codes), np.log(lab.words.counts[ids]))

    def measure(d):
        codes = residuals(d)
        is_enriched = discoveries(rank_sums(codes, labels)).any(0)
        return {"enriched share": is_enriched, "held-out z": heldout_z(codes, labels, half)}

    # In every dictionary: which signals are enriched, and how well they separate words not used to choose.
    found = lab.compare(measure, tokens=ids)
    for name, d in other_dictionaries(lab).items():
        for metric, values in measure(d.part(ids)).items():
            found[metric][name] = values
    for metric, scores in found.items():
        for name, values in {**scores, "rotated": scores.gauges}.items():
            report.numbers.setdefault(name, {})[metric] = values.mean()

    share, held = found["enriched share"], found["held-out z"]
    codes = residuals(native.part(ids))
    permuted = [discoveries(rank_sums(codes, rng.permutation(labels))) for _ in range(LABELLINGS)]
    share["permuted labels"] = np.mean([each.any(0) for each in permuted], axis=0)
    report.effect("enriched", share, "signals", [*lab.nulls, *CONTROLS], published=PUBLISHED)
    paired = Scores({"native": held.native}, held.gauges, missing=held.missing)
    for name in ("pca", "ica", "E", "baseline"):
        if name in held:
            paired[name] = pair_up(held[name], native.n_signals, rng)
    report.signals("separates", paired, "signals")

    # How many signals would be enriched if the codes kept what frequency explains.
    raw = discoveries(rank_sums(to_numpy(native.part(ids).codes), labels)).any(0).mean()
    report.row("enriched share, frequency left in", raw, dictionary="native")
    report.numbers["native"]["enriched share, frequency left in"] = raw
    report.numbers |= {"words": len(ids), "categories": names}
    report.notes.append(f"With frequency left in, {raw:.0%} of the native signals would count as enriched.")

    # The codebook, of the native signals and of one random rotation.
    log_frequency = np.log(lab.words.counts[sample])
    for name, d in {"native": native, "rotated": next(lab.gauges(native))}.items():
        codes = residuals(d.part(ids))
        chosen = np.abs(rank_sums(codes[half], labels[half])).max(0)  # (S,)
        best = np.argsort(-chosen, kind="stable")[:5]
        z, held_z = rank_sums(codes, labels), heldout_z(codes, labels, half)
        shapes = column_shapes(to_numpy(d.part(sample).codes), log_frequency)
        book = Codebook(d, lab.words, names, z, held_z, shapes)
        kinds, counts = np.unique(shapes["class"], return_counts=True)
        report.numbers[name] |= dict(zip(kinds, counts, strict=True))
        report.numbers[name]["largest |Spearman|"] = np.abs(shapes["Spearman with log frequency"]).max()
        report.gallery += book.cards(f"{name} signals, the five best on half of the words", best)
        report.gallery += book.cards(f"{name} signals, not chosen", range(min(10, d.n_signals)))
        if name == "native":
            book.write(report)
            draw(report, z, held, names)
    return report


def draw(report, z, held, names):
    """Enrichment of the first signals in all categories; distributions of the held-out z."""
    share, separates = report["enriched"], report["separates"]
    title = (
        f"{share.measured.value:.0%} of signals are enriched for a category ({share.verdict}); held-out z "
        f"{held.native.mean():.2f} against {held.gauges.mean():.2f} of random rotations ({separates.verdict})"
    )
    shown = np.arange(min(32, z.shape[1]))
    shown = shown[np.argsort(np.abs(z[:, shown]).argmax(0), kind="stable")]
    curves = {name: held[name] for name in ("native", "pca", "ica", "baseline", "step 0") if name in held}
    curves["rotated"] = held.gauges.ravel()
    with report.figure("codebook", title, 1, 2, size=(11, 5.2), width_ratios=(1.7, 1)) as (left, right):
        plot_heat_map(left, z[:, shown], shown, names, "enrichment, rank-sum z")
        left.set(xlabel=f"signal (the first {len(shown)}, ordered by their category)")
        for name, values in curves.items():
            below = np.linspace(0, 1, len(values))
            right.plot(np.sort(values), below, color=COLOURS[name], label=f"{name}, mean {values.mean():.2f}")
        right.set(xlabel="held-out z of a signal's category", ylabel="share of signals below")
        right.legend(loc="lower right")


if __name__ == "__main__":
    run_experiment(run)
