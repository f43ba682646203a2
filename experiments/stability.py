"""
Do two seeds learn the same signals, or only the same space?

    python experiments/stability.py --runs='out/studies/*'

Claims
  effect   the space is shared: a word has the same nearest neighbours in the recipes of another seed.
  effect   signals are shared: a signal's codes correlate with those of its partner in another seed, matched
           one to one.
  signals  they are shared because they are these signals: native ones match better than with one side
           rotated, and than PCA, ICA, coordinates of E and of the plain GPT of the same two seeds.

Method. The largest factored shape that has two seeds or more, every pair of them. Codes of the tokens that
all runs know, each signal standardised over them; partners by the Hungarian method on absolute correlations
(as for features of sparse autoencoders: Paulo & Belrose, 2501.16615). Correlations do not depend on a
signal's sign or scale. Neighbours: the share of a word's ten nearest others, by centred cosine, that both
seeds have. Chance: the two runs before training, and recipes of one side shuffled among tokens of like
frequency, which leaves what frequency alone makes two seeds share. Codes freed of log frequency, linear CKA
(Kornblith et al., 1905.00414) and the other kinds and shapes are given as numbers.

Unit: a word; a signal, over all of its pairs. Seeds are few: an interval is about signals of these seeds.

Cost: a minute for three seeds of nine kinds and shapes of the nano size; a fit of ICA a seed.
"""

import functools
import sys
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import configurator

if __name__ == "__main__":
    configurator.help(__file__, "study.py")

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from configurator import UserError
from experiments import lab, study
from experiments.nearest_neighbors import cosines
from experiments.signal_codebook import pair_up, without

PUBLISHED = "30 % of an autoencoder's latents have a partner above 0.7 in another seed (131k, Llama-3-8B)"
WORDS, NEIGHBOURS, SHARED = 1000, 10, 0.7


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
        self.pairs = list(combinations(range(len(self.labs)), 2))
        known = [room.known_tokens() for room in self.labs]
        self.known = known[0][np.isin(known[0], functools.reduce(np.intersect1d, known))]  # commonest first
        self.frequency = np.log(np.mean([room.counts[self.known] for room in self.labs], axis=0))

    def codes(self, dictionary_of):
        """Codes of the known tokens in the dictionary that dictionary_of(lab) gives, one (n, S) a seed."""
        return [lab.array(dictionary_of(room).codes[self.known]) for room in self.labs]

    @functools.cached_property
    def native(self):
        return self.codes(lambda room: room.reflow.dictionary)

    def over_pairs(self, measure, ours, theirs=None):
        """measure(codes of the first seed, of the second) for every pair, (pairs, units)."""
        theirs = ours if theirs is None else theirs
        return np.stack([measure(ours[i], theirs[j]) for i, j in self.pairs])

    def freed(self, codes):
        """The same codes less their regression on log frequency and its square (signal_codebook.py)."""
        return [without(c, self.frequency) for c in codes]

    def rotated(self, prepare=lambda codes: codes):
        """`matched` of every pair, signals of its second run rotated, (K, pairs, S)."""
        parts = [
            lab.Dictionary("native", room.reflow.dictionary.codes[self.known], room.reflow.dictionary.atoms)
            for room in self.labs
        ]
        spins = zip(*(room.rotations(d) for room, d in zip(self.labs, parts, strict=True)), strict=True)
        turned = ([lab.array(d.codes) for d in spin] for spin in spins)
        native = prepare(self.native)
        return np.stack([self.over_pairs(matched, native, prepare(codes)) for codes in turned])


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

    # Neighbours
    words = np.flatnonzero(np.isin(ours.known, first.known_words()))[:WORDS]  # rows of the codes

    def shared(codes, theirs=None):
        pick = [[torch.from_numpy(c[words]) for c in side] for side in (codes, theirs or codes)]
        return ours.over_pairs(in_common, *pick).mean(0)  # (words,)

    shuffled = ours.codes(lambda room: room.shuffled.dictionary)
    start = ours.codes(lambda room: room.step0.dictionary)
    near = {"native": shared(ours.native), "step 0": shared(start)}
    near["shuffled"] = shared(ours.native, shuffled)
    report.claim(
        lab.effect(
            f"words have the same neighbours in the recipes of two seeds (share of {NEIGHBOURS} in common)",
            near["native"],
            {name: near[name] for name in ("step 0", "shuffled")},
            "words",
        )
    )

    # Signals
    codes = {"native": ours.native, "step 0": start}
    codes |= {name: ours.codes(lambda r, n=name: r.rivals(r.reflow)[n]) for name in ("pca", "ica")}
    codes["E"] = [
        c @ lab.array(r.reflow.dictionary.atoms) for c, r in zip(ours.native, ours.labs, strict=True)
    ]
    if plain:
        codes["baseline"] = plain.codes(lambda room: room.reflow.dictionary)
    found = {name: ours.over_pairs(matched, c) for name, c in codes.items()}  # (pairs, S) each
    found["shuffled"] = ours.over_pairs(matched, ours.native, shuffled)
    n_signals = found["native"].shape[1]
    groups = np.concatenate([i * n_signals + np.arange(n_signals) for i, _ in ours.pairs])
    rotated = {key: s.rotated() for key, s in seeds.items()}
    report.claim(
        lab.effect(
            "signals have partners in another seed (|correlation| of codes, matched one to one)",
            found["native"].ravel(),
            {name: found[name].ravel() for name in ("step 0", "shuffled")},
            "signals",
            groups,
            published=PUBLISHED,
        )
    )
    rng = first.rng("pairs")
    rivals = [name for name in ("pca", "ica", "E", "baseline") if name in found]
    report.claim(
        lab.signals(
            "native signals match across seeds better than any others do (|correlation|, one to one)",
            found["native"].ravel(),
            rotated["factored", size].reshape(lab.ROTATIONS, -1),
            {n: np.concatenate([pair_up(v, n_signals, rng) for v in found[n]]) for n in rivals},
            "signals",
            groups,
        )
    )

    freed = {name: ours.over_pairs(matched, ours.freed(codes[name])).mean() for name in ("native", *rivals)}
    freed["rotated"] = ours.rotated(ours.freed).mean()
    report.numbers = {
        "size": size,
        "seeds": len(ours.labs),
        "tokens": len(ours.known),
        "words": len(words),
        "threshold": SHARED,
        "matched": {name: float(values.mean()) for name, values in found.items()},
        "shared": {name: float((values > SHARED).mean()) for name, values in found.items()},
        "frequency_removed": {name: float(v) for name, v in freed.items()},
        "neighbours": {name: float(values.mean()) for name, values in near.items()},
        "shapes": {},
    }
    lines = [
        f"{'kind':9} {'size':7} {'seeds':>5}  matched, native  rotated (range of {lab.ROTATIONS})  CKA of E"
    ]
    for (kind, shape), s in seeds.items():
        native, spun = s.over_pairs(matched, s.native).mean(), rotated[kind, shape].mean((1, 2))
        E = s.codes(coordinates)
        alike = float(np.mean([cka(E[i], E[j]) for i, j in s.pairs]))
        report.numbers["shapes"][f"{kind} {shape}"] = {
            "seeds": len(s.labs),
            "native": float(native),
            "rotated": [float(spun.min()), float(spun.mean()), float(spun.max())],
            "cka": alike,
        }
        span = f"{spun.mean():.3f} ({spun.min():.3f} to {spun.max():.3f})"
        lines.append(f"{kind:9} {shape:7} {len(s.labs):>5}  {native:<15.3f}  {span:27}  {alike:.3f}")
    report.gallery = "\n".join(lines)
    for name, values in found.items():
        for (i, j), row in zip(ours.pairs, values, strict=True):
            for signal, value in enumerate(row):
                report.row("|correlation|", value, dictionary=name, control=f"seeds {i}, {j}", signal=signal)
    for name, values in near.items():
        report.row("neighbours in common", values.mean(), dictionary=name)
    report.notes.append(
        f"Signals with a partner above {SHARED}: "
        + ", ".join(f"{name} {share:.0%}" for name, share in report.numbers["shared"].items())
        + ". With log frequency regressed out, mean |correlation|: "
        + ", ".join(f"{name} {v:.3f}" for name, v in freed.items())
        + "."
    )
    figure(report, found, rotated["factored", size])
    return report


def figure(report, found, rotated):
    plt = lab.pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    shown = found | {"rotated": rotated[0]}
    for name, values in shown.items():
        y = np.sort(values.ravel())[::-1]
        left.plot(np.linspace(0, 100, len(y)), y, color=lab.COLOURS[name], label=name)
    left.set(xlabel="signals, best first, %", ylabel="|correlation| with the partner", ylim=(0, 1))
    left.legend(ncols=2, fontsize=7)
    shapes = report.numbers["shapes"]
    for i, values in enumerate(shapes.values()):
        low, _, high = values["rotated"]
        right.plot([i, i], [low, high], color=lab.COLOURS["rotated"], lw=7, alpha=0.45)
        right.scatter(i, values["native"], color=lab.COLOURS["native"], marker="D", zorder=3)
    names = [name.replace("factored", "fact.").replace(" ", "\n") for name in shapes]
    right.set_xticks(range(len(shapes)), names, fontsize=7)
    right.set(ylabel="mean |correlation|", title="native (diamond) against rotations (band)")
    m = report.numbers["matched"]
    title = (
        f"Signals of two seeds, matched one to one: |correlation| {m['native']:.2f}, rotated "
        f"{rotated.mean():.2f}, coordinates of E {m['E']:.2f}, PCA {m['pca']:.2f} ({report.numbers['size']}, "
        f"{report.numbers['seeds']} seeds)"
    )
    report.figure(fig, "stability", title)


if __name__ == "__main__":
    study.compare(run)
