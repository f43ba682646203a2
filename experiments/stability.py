"""
Do two seeds learn the same signals, or only the same space?

    python experiments/stability.py --runs='out/studies/*'

Claims
  effect   the space is shared: a word has the same nearest neighbours in the recipes of another seed.
  effect   signals are shared: a signal's codes correlate with those of its partner in another seed, matched
           one to one.
  signals  they are shared because they are these signals: native ones match better than with one side
           rotated, and than PCA, ICA, and, where they are as many, coordinates of E and of the plain GPT.

Method. The largest factored shape that has two seeds or more, every pair of them in both directions. Codes of
the tokens that all runs know, freed of their regression on log frequency and its square (signal_codebook.py):
frequency alone makes any two seeds alike, and a mean over signals then favours dictionaries that smear it
over all of them. Correlations, which do not depend on a signal's sign or scale; partners by the Hungarian
method on their absolute values. The same with frequency left in is given as a number, as is linear CKA of E
(Kornblith et al., 1905.00414). Neighbours: the share of a word's ten nearest others, by centred cosine, that
both seeds have. Chance: the two runs before training, and recipes of one side exchanged among tokens of like
frequency. The other kinds and shapes stand beside their own rotations.

Unit: a word; a signal of a seed, over its pairs. They are not independent: words share neighbours, partners
exclude each other, and the seeds are few. Intervals are about these seeds.

Cost: under a minute for three seeds of nine kinds and shapes of the nano size; a fit of ICA a seed.
"""

import functools
import sys
from itertools import permutations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from configurator import UserError
from experiments import lab, study
from experiments.nearest_neighbors import cosines
from experiments.signal_codebook import without

WORDS, NEIGHBOURS = 1000, 10


def standardised(codes):
    """codes (n, S) with mean 0 and length 1 of every column; a constant one stays 0."""
    x = codes - codes.mean(0)
    length = np.linalg.norm(x, axis=0)
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)


def matched(a, b):
    """|correlation| of each column of a (n, S) with its partner in b (n, S'), 0 without one, (S,)."""
    correlation = np.abs(standardised(a).T @ standardised(b))  # (S, S')
    ours, theirs = linear_sum_assignment(correlation, maximize=True)
    found = np.zeros(len(correlation))
    found[ours] = correlation[ours, theirs]
    return found


def in_common(a, b, k=NEIGHBOURS):
    """Share of each row's k nearest others, by centred cosine, common to codes a and b (n, S), (n,)."""
    near = []
    for codes in (a, b):
        cosine = cosines(codes, codes.mean(0)).fill_diagonal_(-torch.inf)
        near.append(torch.zeros_like(cosine, dtype=torch.bool).scatter(1, cosine.topk(k).indices, True))
    return lab.array((near[0] & near[1]).sum(1) / k)


def cka(a, b):
    """Linear CKA of a (n, d) and b (n, d'), 1 if equal up to a rotation and a scale."""
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.linalg.norm
    return float(norm(a.T @ b) ** 2 / (norm(a.T @ a) * norm(b.T @ b)))


def coordinates(room):
    """The coordinates of a lab's E, as a dictionary."""
    E = room.reflow.E
    return lab.Dictionary("E", E, torch.eye(E.size(1)).to(E))


class Seeds:
    """The runs {seed: (loss, parameters, folder)} of one kind and shape, and the tokens that all know."""

    def __init__(self, runs):
        self.labs = [lab.Lab(lab.LabConfig(run=str(runs[seed][2]))) for seed in sorted(runs)]
        self.pairs = list(permutations(range(len(self.labs)), 2))
        known = [room.known_tokens() for room in self.labs]
        self.known = known[0][np.isin(known[0], functools.reduce(np.intersect1d, known))]  # commonest first
        self.frequency = np.log(np.mean([room.counts[self.known] for room in self.labs], axis=0))
        self.native = self.codes(lambda room: room.reflow.dictionary)

    def codes(self, dictionary_of):
        """Codes of the known tokens in the dictionary that dictionary_of(lab) gives, one (n, S) a seed."""
        return [lab.array(dictionary_of(room).codes[self.known]) for room in self.labs]

    def freed(self, codes):
        """The same codes less what log frequency explains."""
        return [without(c, self.frequency) for c in codes]

    def over_pairs(self, measure, ours, theirs=None):
        """measure(codes of one seed, of another) for every pair, (pairs, units)."""
        theirs = ours if theirs is None else theirs
        return np.stack([measure(ours[i], theirs[j]) for i, j in self.pairs])

    def rotations(self):
        """Native codes with the signals of every seed rotated, [(n, S) a seed], 19 times."""
        parts = [
            lab.Dictionary("native", room.reflow.dictionary.codes[self.known], room.reflow.dictionary.atoms)
            for room in self.labs
        ]
        spins = zip(*(room.rotations(d) for room, d in zip(self.labs, parts, strict=True)), strict=True)
        return [[lab.array(d.codes) for d in turned] for turned in spins]

    def matches(self):
        """({"freed": (pairs, S), "raw": (pairs, S)}, the same with one side rotated (19, pairs, S))."""
        native, rotated = {}, {}
        spins = self.rotations()
        for name, prepare in (("freed", self.freed), ("raw", list)):
            ours = prepare(self.native)
            native[name] = self.over_pairs(matched, ours)
            rotated[name] = np.stack([self.over_pairs(matched, ours, prepare(turned)) for turned in spins])
        return native, rotated


def run(runs):
    table = {key: seeds for key, seeds in runs.by_shape().items() if len(seeds) > 1}
    sizes = [size for kind, size in table if kind == "factored"]
    if not sizes:
        raise UserError("no two factored runs that differ in their seed alone among --runs")
    size = max(sizes, key=lambda s: next(iter(table["factored", s].values()))[1])
    report = lab.Report(runs, "stability")
    seeds = {key: Seeds(found) for key, found in table.items()}
    ours, plain = seeds["factored", size], seeds.get(("dense", size))
    first = ours.labs[0]
    start = ours.codes(lambda room: room.step0.dictionary)
    shuffled = ours.codes(lambda room: room.shuffled.dictionary)

    # Neighbours
    words = np.flatnonzero(np.isin(ours.known, first.known_words()))[:WORDS]  # rows of the codes

    def common(codes, theirs=None):
        pick = [[torch.from_numpy(c[words]) for c in side] for side in (codes, theirs or codes)]
        return ours.over_pairs(in_common, *pick).mean(0)  # (words,)

    near = {
        "native": common(ours.native),
        "step 0": common(start),
        "shuffled": common(ours.native, shuffled),
    }
    report.claim(
        lab.effect(
            f"words have the same neighbours in the recipes of two seeds (share of {NEIGHBOURS} in common)",
            near["native"],
            {name: near[name] for name in ("step 0", "shuffled")},
            "words",
        )
    )

    # Signals
    found = {key: s.matches() for key, s in seeds.items()}
    native, rotated = found["factored", size]
    n_signals = native["freed"].shape[1]
    codes = {name: ours.codes(lambda r, n=name: r.rivals(r.reflow)[n]) for name in ("pca", "ica")}
    codes["E"] = ours.codes(coordinates)
    if plain:
        codes["baseline"] = plain.native
    # More columns than dimensions or other rivals have always match better: only equal numbers compare.
    codes = {name: c for name, c in codes.items() if c[0].shape[1] == n_signals}
    values = {"native": native["freed"], "step 0": ours.over_pairs(matched, ours.freed(start))}
    values["shuffled"] = ours.over_pairs(matched, ours.freed(ours.native), ours.freed(shuffled))
    values |= {name: ours.over_pairs(matched, ours.freed(c)) for name, c in codes.items()}
    groups = np.concatenate([i * n_signals + np.arange(n_signals) for i, _ in ours.pairs])
    report.claim(
        lab.effect(
            "signals have partners in another seed (|correlation| beyond frequency, matched one to one)",
            values["native"].ravel(),
            {name: values[name].ravel() for name in ("step 0", "shuffled")},
            "signals",
            groups,
        )
    )
    rng = first.rng("pairs")
    report.claim(
        lab.signals(
            "native signals match across seeds better than others do (|correlation| beyond frequency)",
            values["native"].ravel(),
            rotated["freed"].reshape(lab.ROTATIONS, -1),
            {name: np.concatenate([rng.permutation(row) for row in values[name]]) for name in codes},
            "signals",
            groups,
        )
    )

    raw = {"native": native["raw"], "shuffled": ours.over_pairs(matched, ours.native, shuffled)}
    raw |= {name: ours.over_pairs(matched, c) for name, c in codes.items()}
    E = ours.codes(coordinates)
    moved = [c @ lab.array(r.reflow.dictionary.atoms) for c, r in zip(shuffled, ours.labs, strict=True)]
    alike = {"E": (E, E), "E, shuffled": (E, moved), "E beyond frequency": (ours.freed(E), ours.freed(E))}
    alike["E beyond frequency, shuffled"] = ours.freed(E), ours.freed(moved)
    spun = {name: {"rotated": rotated[name]} for name in rotated}
    report.numbers = {
        "size": size,
        "seeds": len(ours.labs),
        "tokens": len(ours.known),
        "words": len(words),
        "matched": means(values | spun["freed"]),
        "matched_with_frequency": {
            n: float(v.mean()) for n, v in (raw | {"rotated": rotated["raw"]}).items()
        },
        "largest": float(native["freed"].max()),
        "neighbours": means(near),
        "cka": {name: float(ours.over_pairs(cka, *sides).mean()) for name, sides in alike.items()},
        "shapes": {
            f"{kind} {shape}": {
                "seeds": len(seeds[kind, shape].labs),
                **{
                    name: {"native": float(own[name].mean()), "rotated": spun[name].mean((1, 2)).tolist()}
                    for name in own
                },
            }
            for (kind, shape), (own, spun) in found.items()
        },
    }
    for name, table in (("|correlation|", values), ("|correlation|, frequency left in", raw)):
        for dictionary, lines in table.items():
            for (i, j), row in zip(ours.pairs, lines, strict=True):
                where = {"dictionary": dictionary, "control": f"seed {i} to {j}"}
                for signal, value in enumerate(row):
                    report.row(name, value, signal=signal, **where)
    for name, v in near.items():
        report.row("neighbours in common", v.mean(), dictionary=name)
    for name, value in report.numbers["cka"].items():
        report.row("linear CKA", value, control=name)
    report.gallery = gallery(report.numbers["shapes"])
    report.notes.append(
        f"With frequency left in, mean |correlation|: {listed(report.numbers['matched_with_frequency'])}."
    )
    report.notes.append(f"Linear CKA: {listed(report.numbers['cka'])}.")
    figure(report, values | {"rotated": rotated["freed"][0]})
    return report


def means(values):
    return {name: float(v.mean()) for name, v in values.items()}


def listed(values):
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def gallery(shapes):
    """The kinds and shapes as a table, native beside its own rotations."""
    titles = ("kind", "size", "seeds", "beyond frequency: native, rotated", "with frequency: native, rotated")
    lines = ["{:9} {:7} {:5}  {:37}  {}".format(*titles)]
    for name, values in shapes.items():
        cells = []
        for part in (values["freed"], values["raw"]):
            spun = part["rotated"]
            cells.append(f"{part['native']:.3f}  {np.mean(spun):.3f} ({min(spun):.3f} to {max(spun):.3f})")
        kind, size = name.split()
        lines.append(f"{kind:9} {size:7} {values['seeds']:5}  {cells[0]:37}  {cells[1]}")
    return "\n".join(lines)


def figure(report, shown):
    plt = lab.pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for name, values in shown.items():
        y = np.sort(values.ravel())[::-1]
        left.plot(np.linspace(0, 100, len(y)), y, color=lab.COLOURS[name], label=name)
    left.set(xlabel="signals, best first, %", ylabel="|correlation| with the partner", ylim=(0, None))
    left.legend(ncols=2, fontsize=7)
    shapes = report.numbers["shapes"]
    for i, values in enumerate(shapes.values()):
        low, high = min(values["freed"]["rotated"]), max(values["freed"]["rotated"])
        right.plot([i, i], [low, high], color=lab.COLOURS["rotated"], lw=7, alpha=0.45)
        right.scatter(i, values["freed"]["native"], color=lab.COLOURS["native"], marker="D", zorder=3)
    names = [name.replace("factored", "fact.").replace(" ", "\n") for name in shapes]
    right.set_xticks(range(len(shapes)), names, fontsize=7)
    right.set(ylabel="mean |correlation|", title="native (diamond) against rotations (band)", ylim=(0, None))
    n, m = report.numbers, report.numbers["matched"]
    title = (
        f"Signals of two seeds beyond frequency, matched one to one: |correlation| {m['native']:.3f}, "
        f"rotated {m['rotated']:.3f} ({n['size']}, {n['seeds']} seeds)"
    )
    report.figure(fig, "stability", title)


if __name__ == "__main__":
    study.compare(run)
