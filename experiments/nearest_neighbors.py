"""
Are words with similar recipes similar words, and does recipe space add anything to the embedding?

    python experiments/nearest_neighbors.py --run=out/reflow-nano
    python experiments/nearest_neighbors.py --words=three,France,good

Method
    Precision@5: the share of a word's 5 nearest neighbours, by cosine of recipes (codes of atoms of length
    1), that have its category. Codes are centred on 2,000 frequent words; rows.csv has raw cosines too.
    Candidates are the labelled words that the model knows, not the vocabulary, hence the chance level.
    "Apart" leaves out forms of one word: the shorter one's first max(3, length - 2) letters begin the other,
    or the word lists have the two as singular and plural. Controls: permuted labels (their mean in closed
    form), null models, recipes shuffled among words of like frequency. Spaces and gauges, a
    description: lab/spaces.py. Hubness: skewness of how often a word is among the 10 nearest of others. Unit:
    a word; words of one category are resampled together.

Cost
    Cosines of at most 1,000 labelled and 2,000 frequent words in 26 spaces. Without the fit of ICA: 2 s on
    one core for 64 signals, 15 s for 1,024.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
import numpy as np
import torch

from dictionary import Dictionary, rotated
from experiments.lab import Lab, Report, run_experiment
from experiments.lab.analogies import relations
from experiments.lab.plots import COLOURS, plot_scores
from experiments.lab.probes import labelled
from experiments.lab.spaces import POOL, chance, compare_spaces, cosines, precision, spaces, split

CLAIMS = {
    "category": "words with similar recipes share a category (precision@5)",
    "category_apart": "they share a category when forms of one word do not count (precision@5)",
    "best_space": "categories in recipe space beside random gauges and other spaces (precision@5)",
}
PUBLISHED = "all top-20 pairs valid; three-four 0.76, king-queen 0.54 (464M, OpenWebText)"
K = 5  # neighbours
N_PAIRS, N_RANDOM_WORDS = 20, 8  # of the gallery
GALLERY = ("native", "E", "baseline")


@dataclass
class NearestNeighborsConfig:
    words: str = "three,king,France,good,red,walked,law,river"  # whose neighbours to show, if known


def share_stem(words, plurals=()):
    """Which of `words` are forms of one word, (n, n) bool; `plurals` are further (word, word) pairs."""
    lower = np.array([word.lower() for word in words])
    length = np.char.str_len(lower)
    same = np.eye(len(words), dtype=bool)
    for i, word in enumerate(lower):
        stem = word[: max(3, len(word) - 2)]
        same[i] |= np.char.startswith(lower, stem) & (length >= len(word))
    for a, b in plurals:
        same |= np.outer(lower == a.lower(), lower == b.lower())
    return same | same.T


def hubness(cosine, k=10):
    """Skewness over words of how many others have it among their k nearest; 0 is even."""
    nearest = cosine.clone().fill_diagonal_(-torch.inf).topk(k, dim=1).indices  # (n, k)
    counts = np.bincount(nearest.flatten().cpu().numpy(), minlength=len(cosine))
    deviation = counts - counts.mean()
    return (deviation**3).mean() / counts.std() ** 3


def rotation_error(codes):
    """The largest change of a cosine of codes (n, S) by a random rotation of the signals: rounding alone."""
    d = Dictionary("native", codes, torch.eye(codes.size(1)).to(codes))
    turned = rotated(d, torch.Generator())
    return float((cosines(d.codes) - cosines(turned.codes)).abs().max())


def run(lab: Lab, config: NearestNeighborsConfig | None = None) -> Report:
    config = config or NearestNeighborsConfig()
    report = Report(lab, "nearest_neighbors", CLAIMS)
    words, labels, _ = labelled(lab)
    pool = lab.words.known_words()[:POOL]
    n = len(words)
    plurals = relations(lab).get("singular_plural", ())
    barred = share_stem([lab.words.text(token).strip() for token in words], plurals)

    def measure(codes):
        own, frequent = codes[:n], codes[n:]
        mean = frequent.mean(0)
        cosine = cosines(own, mean)
        raw = cosines(own)
        return {
            "category": precision(cosine, labels, K),
            "category_apart": precision(cosine, labels, K, barred),
            "category, raw cosine": precision(raw, labels, K),
            "hubness": hubness(cosines(frequent, mean)),
        }

    tokens = np.append(words, pool)
    found = compare_spaces(lab, measure, tokens)
    category, best_space = split(found["category"])
    apart, _ = split(found["category_apart"])
    category["permuted labels"] = chance(labels)
    apart["permuted labels"] = chance(labels, barred)
    report.effect("category", category, "categories", groups=labels, published=PUBLISHED)
    report.effect("category_apart", apart, "categories", groups=labels, published=PUBLISHED)
    report.gauge("best_space", best_space, "categories", groups=labels)
    for metric in ("category, raw cosine", "hubness"):
        report.scores(metric, found[metric])

    codes = spaces(lab, tokens)
    means = found["category"].means()
    by_chance = category["permuted labels"].mean()
    report.numbers |= {
        "words": n,
        "gauges": means.pop("gauges"),
        "precision": means,
        "chance": by_chance,
        "rotation_changes_cosine": rotation_error(codes["native"][:n].double().cpu()),
    }
    report.notes.append(
        "An orthogonal rotation of the signals changes cosines by at most "
        f"{report.numbers['rotation_changes_cosine']:.1g}."
    )
    tables = {name: cosines(codes[name][n:], codes[name][n:].mean(0)) for name in GALLERY if name in codes}
    report.gallery = gallery(lab, config.words, pool, tables)

    title = (
        f"{means['native']:.0%} of a word's {K} nearest recipes share its category (in E {means['E']:.0%}, "
        f"before training {means['step 0']:.0%}, chance {by_chance:.0%})"
    )
    with report.figure("neighbors", title, 1, 3, size=(12, 3.8)) as (left, middle, right):
        plot_scores(left, found["category"], labels, f"precision@{K}\n(dotted: chance)")
        plot_scores(middle, found["category_apart"], labels, f"precision@{K}, forms of one word left out")
        for ax, scores in ((left, category), (middle, apart)):
            ax.axvline(scores["permuted labels"].mean(), color="k", ls=":", lw=1)
            ax.set_xlim(left=0)
        native = cosines(codes["native"][:n], codes["native"][n:].mean(0)).cpu().numpy()
        plot_pairs(right, native, labels, barred)
    return report


def plot_pairs(ax, cosine, labels, barred):
    """Histograms of cosines (n, n): pairs of one category, and of two. Forms of one word are left out."""
    i, j = np.triu_indices(len(labels), 1)
    kept = ~barred[i, j]
    same = labels[i] == labels[j]
    values = cosine[i, j]
    edges = np.linspace(values.min(), 1, 50)
    style = {"density": True, "histtype": "step", "lw": 1.5}
    ax.hist(values[same & kept], edges, color=COLOURS["native"], label="same category", **style)
    ax.hist(values[~same & kept], edges, color=COLOURS["random"], label="different categories", **style)
    ax.set(xlabel="cosine of two recipes, centred", ylabel="density of pairs")
    ax.legend(loc="upper left")


def gallery(lab, chosen, pool, tables):
    """Text: the most similar pairs of the pool, neighbours of chosen words and of words drawn at random."""
    names = [lab.words.text(token).strip() for token in pool]
    native = tables["native"]
    i, j = torch.triu_indices(len(pool), len(pool), 1, device=native.device)
    lines = [f"Most similar recipes of the {len(pool)} most frequent words (cosine; in E)"]
    for pair in native[i, j].topk(N_PAIRS).indices:
        a, b = int(i[pair]), int(j[pair])
        lines.append(f"  {names[a]:>14} {names[b]:14} {native[a, b]:.2f} {tables['E'][a, b]:.2f}")
    drawn = lab.rng("random words").choice(len(pool), min(N_RANDOM_WORDS, len(pool)), replace=False)
    lines += ["", "Neighbours of chosen words"]
    lines += neighbors(names, chosen.split(","), tables)
    lines += ["", "Neighbours of words drawn at random"]
    lines += neighbors(names, [names[w] for w in drawn], tables)
    return "\n".join(lines)


def neighbors(names, words, tables):
    """Lines of text: the 5 nearest of `words` among `names` (m,), by tables {space: cosines (m, m)}."""
    lines = []
    for word in words:
        if word not in names:
            lines.append(f"  {word}: not among these words")
            continue
        for space, cosine in tables.items():
            cosine = cosine[names.index(word)].clone()
            cosine[names.index(word)] = -torch.inf
            top = cosine.topk(5)
            found = [f"{names[t]} {value:.2f}" for t, value in zip(top.indices, top.values, strict=True)]
            lines.append(f"  {word if space == 'native' else '':>12}  {space:8} {', '.join(found)}")
    return lines


if __name__ == "__main__":
    run_experiment(run, NearestNeighborsConfig)
