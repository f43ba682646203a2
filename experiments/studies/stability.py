"""
Do two seeds learn the same signals, or only the same space?

    python experiments/studies/stability.py --runs='out/studies/*'

Method
    The claims are about the largest factored shape with two seeds or more; every pair of seeds is compared in
    both directions. Codes are those of the tokens that all runs have seen. Log frequency and its square are
    regressed out: frequency alone makes any two seeds alike, and a mean over signals would favour
    dictionaries that spread it over all signals. A signal's partner is found by the Hungarian method on
    absolute correlations, which depend on neither sign nor scale. A dictionary with more columns always finds
    better partners, so only dictionaries of equal size are compared: rotations of one side, PCA, ICA and, if
    there are as many, coordinates of E and of the plain GPT. The result also has the same with frequency left
    in, and linear CKA of E (Kornblith et al., 1905.00414). Neighbours: the share of a word's ten nearest
    others, by centred cosine, that both seeds have. Chance controls: the two runs before training, and
    recipes of one side exchanged among tokens of like frequency. The table compares every other kind and
    shape with its own rotations. Unit: a word; a signal of a seed, over its pairs. Units are not independent:
    words share neighbours, partners exclude each other, and the seeds are few. The intervals are about these
    seeds.

Cost
    Under a minute for three seeds of nine kinds and shapes of the nano size. ICA is fitted once
    for each seed.
"""

import functools
import sys
from itertools import permutations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import threads
import numpy as np
import torch

from configurator import UserError
from data.words import LEAST_COUNT
from dictionary import Dictionary
from experiments.lab import Report, Scores
from experiments.lab.claims import LEAST_UNITS, TooFew, missing, to_numpy
from experiments.lab.matching import partner_correlation
from experiments.lab.plots import COLOURS
from experiments.lab.spaces import cosines
from experiments.lab.stats import regress_out
from experiments.studies.runs import Study, run_study, sizes

CLAIMS = {
    "neighbours": "words have the same nearest neighbours in the recipes of two seeds",
    "partners": "signals have partners in another seed: their codes correlate beyond word frequency",
    "native_match": "native signals match those of another seed better than signals of other dictionaries do",
}
N_WORDS, N_NEIGHBOURS = 1000, 10


def neighbours_in_common(a, b, k=N_NEIGHBOURS):
    """Share of each row's k nearest others, by centred cosine, common to codes a and b (n, S), (n,)."""
    near = []
    for codes in (torch.as_tensor(a), torch.as_tensor(b)):
        cosine = cosines(codes, codes.mean(0)).fill_diagonal_(-torch.inf)
        near.append(torch.zeros_like(cosine, dtype=torch.bool).scatter(1, cosine.topk(k).indices, True))
    return to_numpy((near[0] & near[1]).sum(1)) / k


def cka(a, b):
    """Linear CKA of a (n, d) and b (n, d'), 1 if equal up to a rotation and a scale."""
    a = a - a.mean(0)
    b = b - b.mean(0)
    norm = np.linalg.norm
    return float(norm(a.T @ b) ** 2 / (norm(a.T @ a) * norm(b.T @ b)))


def coordinates(lab):
    """The coordinates of E of a run, as a dictionary."""
    E = lab.model.E
    return Dictionary("E", E, torch.eye(E.size(1)).to(E))


RIVALS = {
    "pca": lambda lab: lab.rivals()["pca"],
    "ica": lambda lab: lab.rivals()["ica"],
    "E": coordinates,
}


class Seeds:
    """The runs {seed: TrainedRun} of one kind and shape, and the tokens that all of them know."""

    def __init__(self, runs):
        self.labs = [runs[seed].lab() for seed in sorted(runs)]
        self.pairs = list(permutations(range(len(self.labs)), 2))
        known = [lab.words.known_tokens() for lab in self.labs]
        self.known = known[0][np.isin(known[0], functools.reduce(np.intersect1d, known))]  # commonest first
        counts = [lab.words.counts[self.known] for lab in self.labs]
        self.log_frequency = np.log(np.mean(counts, axis=0))
        self.native = self.codes(lambda lab: lab.model.dictionary)

    def codes(self, dictionary_of):
        """Codes of the known tokens in the dictionary that dictionary_of(lab) gives, one (n, S) a seed."""
        return [to_numpy(dictionary_of(lab).codes[self.known]) for lab in self.labs]

    def freed(self, codes):
        """The codes of every seed with log frequency regressed out."""
        return [regress_out(part, self.log_frequency) for part in codes]

    def over_pairs(self, measure, ours, theirs=None):
        """measure(codes of one seed, codes of another) for every pair, (pairs, units)."""
        theirs = ours if theirs is None else theirs
        return np.stack([measure(ours[i], theirs[j]) for i, j in self.pairs])

    def in_common(self, rows, ours, theirs=None):
        """Share of neighbours that these rows of the codes have in common, mean over pairs, (rows,)."""

        def measure(a, b):
            return neighbours_in_common(a[rows], b[rows])

        return self.over_pairs(measure, ours, theirs).mean(0)

    def matched(self, ours, theirs=None):
        """|correlation| of every signal with its partner in another seed, (pairs, S)."""
        return self.over_pairs(partner_correlation, ours, theirs)

    def matches(self):
        """Scores (pairs, S) of native signals with their partners, frequency regressed out and left in."""
        native = {"freed": self.freed(self.native), "raw": self.native}
        gauges = {"freed": [], "raw": []}
        parts = [lab.gauges(lab.model.dictionary.part(self.known)) for lab in self.labs]
        for dictionaries in zip(*parts, strict=True):  # 19 times one a seed
            rotated = [to_numpy(d.codes) for d in dictionaries]
            gauges["freed"].append(self.matched(native["freed"], self.freed(rotated)))
            gauges["raw"].append(self.matched(native["raw"], rotated))
        return {name: Scores({"native": self.matched(native[name])}, gauges[name]) for name in native}


def run(study: Study) -> Report:
    table = {shape: runs for shape, runs in study.by_shape().items() if len(runs) > 1}
    if not sizes(table, "factored"):
        raise UserError("no two factored runs that differ in their seed alone among --runs")
    size = sizes(table, "factored")[-1]
    report = Report(study, "stability", CLAIMS)
    seeds = {shape: Seeds(runs) for shape, runs in table.items()}
    ours = seeds["factored", size]
    if len(ours.known) < LEAST_UNITS:
        raise TooFew(
            f"only {len(ours.known)} tokens were seen {LEAST_COUNT} times in training with each seed"
        )
    lab = ours.labs[0]
    start = ours.codes(lambda lab: lab.step0.dictionary)
    shuffled = ours.codes(lambda lab: lab.shuffled.dictionary)
    words = np.flatnonzero(np.isin(ours.known, lab.words.known_words()))[:N_WORDS]  # rows of the codes

    # The space: does a word have the same neighbours?
    if len(words) < LEAST_UNITS:  # neighbours are among these words
        why = f"only {len(words)} words were seen {LEAST_COUNT} times in training with each seed"
        report.claim("neighbours", missing("effect", why))
    else:
        near = {"native": ours.in_common(words, ours.native), "step 0": ours.in_common(words, start)}
        near["shuffled"] = ours.in_common(words, ours.native, shuffled)
        report.effect("neighbours", Scores(near), "words")

    # The signals: has each a partner, and a better one than the signals of other dictionaries have?
    matches = {shape: found.matches() for shape, found in seeds.items()}
    freed, raw = matches["factored", size]["freed"], matches["factored", size]["raw"]
    every = [lab.rivals() for lab in ours.labs]
    freed.missing = {name: why for lab in ours.labs for name, why in lab.missing.get("reflow", {}).items()}
    found = {
        name: find for name, find in RIVALS.items() if name == "E" or all(name in some for some in every)
    }
    rivals = {name: ours.matched(ours.freed(ours.codes(find))) for name, find in found.items()}
    if ("dense", size) in matches:
        rivals["baseline"] = matches["dense", size]["freed"].native
    rivals = {name: values for name, values in rivals.items() if values.shape == freed.native.shape}
    freed |= rivals
    freed["step 0"] = ours.matched(ours.freed(start))
    freed["shuffled"] = ours.matched(ours.freed(ours.native), ours.freed(shuffled))
    raw["shuffled"] = ours.matched(ours.native, shuffled)
    report.numbers["matched"] = {name: values.mean() for name, values in freed.items()}
    report.scores("matched_with_frequency", raw)
    claim_partners(report, ours, freed, list(rivals))

    report.numbers |= {"size": size, "seeds": len(ours.labs), "tokens": len(ours.known), "words": len(words)}
    report.numbers["cka"] = cka_of_E(ours, shuffled)
    shapes = {" ".join(shape): {"seeds": len(found.labs)} for shape, found in seeds.items()}
    for shape, found in matches.items():
        for name, scores in found.items():
            means = {"native": scores.native.mean(), "rotated": scores.means()["gauges"]}
            shapes[" ".join(shape)][name] = means
    report.numbers["shapes"] = shapes
    report.gallery = gallery(shapes)
    listed = ", ".join(f"{name} {value:.3f}" for name, value in report.numbers["cka"].items())
    report.notes.append(f"Linear CKA: {listed}.")
    draw(report, freed)
    return report


def claim_partners(report, seeds, matched, rivals):
    """The claims about signals, from Scores (pairs, S); the unit is a signal of a seed, over its pairs."""
    n_signals = matched.native.shape[1]
    signal = np.concatenate([i * n_signals + np.arange(n_signals) for i, _ in seeds.pairs])
    partners = Scores({name: matched[name].ravel() for name in ("native", "step 0", "shuffled")})
    report.effect("partners", partners, "signals", groups=signal)
    rng = seeds.labs[0].rng("pairs")
    native_match = Scores({"native": matched.native.ravel()}, matched.map(np.ravel).gauges)
    native_match.missing = matched.missing
    for name in rivals:  # native signals and those of a rival are not paired
        native_match[name] = np.concatenate([rng.permutation(values) for values in matched[name]])
    report.signals("native_match", native_match, "signals", groups=signal)


def cka_of_E(seeds, shuffled):
    """{name: mean linear CKA over pairs} of E, as it is and with log frequency regressed out."""
    E = seeds.codes(coordinates)
    atoms = [to_numpy(lab.model.dictionary.atoms) for lab in seeds.labs]
    exchanged = [codes @ part for codes, part in zip(shuffled, atoms, strict=True)]
    sides = {
        "E": (E, E),
        "E, shuffled": (E, exchanged),
        "E beyond frequency": (seeds.freed(E), seeds.freed(E)),
        "E beyond frequency, shuffled": (seeds.freed(E), seeds.freed(exchanged)),
    }
    return {name: float(seeds.over_pairs(cka, *pair).mean()) for name, pair in sides.items()}


def gallery(shapes):
    """A table of the kinds and shapes: native |correlation| beside that of its rotations."""
    lines = ["kind, size       beyond frequency: native, rotations   frequency left in: native, rotations"]
    for name, found in shapes.items():
        cells = []
        for part in (found["freed"], found["raw"]):
            low, high = min(part["rotated"]), max(part["rotated"])
            cells.append(f"{part['native']:.3f}, {low:.3f} to {high:.3f}")
        lines.append(f"{name:16} {cells[0]:37} {cells[1]}")
    return "\n".join(lines)


def draw(report, matched):
    """The signals of the largest shape, best first, and the means of all shapes."""
    numbers = report.numbers
    title = (
        f"|correlation| of matched signals of two seeds beyond frequency: {matched.native.mean():.3f}, "
        f"rotated {matched.gauges.mean():.3f} ({numbers['size']}, {numbers['seeds']} seeds)"
    )
    with report.figure("stability", title, 1, 2, size=(9, 3.2)) as (left, right):
        draw_sorted(left, matched)
        draw_shapes(right, numbers["shapes"])


def draw_sorted(ax, scores):
    """|correlation| with the partner, the best matched signals first, for every dictionary."""
    for name, values in [*scores.items(), ("rotated", scores.gauges[0])]:
        y = np.sort(values.ravel())[::-1]
        ax.plot(np.linspace(0, 100, len(y)), y, color=COLOURS[name], label=name)
    ax.set(xlabel="signals, best first, %", ylabel="|correlation| with the partner", ylim=(0, None))
    ax.legend(ncols=2, fontsize=7)


def draw_shapes(ax, shapes):
    """Mean |correlation| of every kind and shape (diamond) over the band of its rotations."""
    for i, found in enumerate(shapes.values()):
        rotated = found["freed"]["rotated"]
        ax.plot([i, i], [min(rotated), max(rotated)], color=COLOURS["rotated"], lw=7, alpha=0.45)
        ax.scatter(i, found["freed"]["native"], color=COLOURS["native"], marker="D", zorder=3)
    names = [name.replace("factored", "fact.").replace(" ", "\n") for name in shapes]
    ax.set_xticks(range(len(shapes)), names, fontsize=7)
    ax.set(ylabel="mean |correlation|", title="native (diamond) against rotations (band)")
    ax.set_ylim(0, 1.05 * ax.get_ylim()[1])


if __name__ == "__main__":
    run_study(run)
