"""
Are words with similar recipes similar words, and does recipe space add anything to the embedding?

    python experiments/nearest_neighbors.py --run=out/reflow-nano --words=three,France,good

Claims
  effect   the nearest neighbours of a labelled word share its category: precision@5 is above that before
           training, with recipes shuffled among words of like frequency, and with permuted labels.
  effect   the same when forms of one word (law, laws, lawful) are no candidates for one another.
  signals  precision@5 in recipe space is above that in 19 other gauges of the same model, in E, in E whitened
           by PCA and by ICA, and in the embedding of a plain GPT.

Method. Cosine of recipes (codes of atoms of length 1) less their mean over frequent words: otherwise a few
directions that all words share dominate it (Timkey & van Schijndel, 2109.04404); raw cosine is in rows.csv.
Candidates are the labelled words that the model has seen, not the vocabulary, hence the chance level.
Orthogonal rotations of the signals change no cosine (printed), so they are no control: a gauge here is a
random non-orthogonal change of signals, of condition number 10, which leaves E and every logit as they are,
yet changes cosines (Steck et al., 2403.05440). Whitening by PCA and by ICA differ by little but a rotation,
so their cosines nearly agree. Two words share a stem if the shorter one's first max(3, length - 2) letters
begin the other, or if the probe lists have them as singular and plural. Hubness: skewness of how often a word
is among the 10 nearest of others. Unit: a query word; words of one category are resampled together.

Cost beside ICA: 50 cosine matrices of at most 1,000 labelled and 2,000 frequent words: 4 s on one core for 64
signals, 35 s for 1,024 (50,257 tokens each).
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from scipy.stats import rankdata, skew, spearmanr

from experiments import lab

PUBLISHED = "all top-20 pairs valid; three-four 0.76, king-queen 0.54 (464M, OpenWebText)"
K = 5  # neighbours a claim is about
POOL = 2000  # frequent words: the mean to subtract, the gallery, hubness


@dataclass
class NearestNeighborsConfig:
    words: str = "three,king,France,good,red,walked,law,river"  # whose neighbours to show, if known


# -- words and spaces, shared with semantic_clusters.py and semantic_algebra.py


def spaces(laboratory, tokens):
    """{name: codes (n, dims)} of `tokens` (n,) in every space; of PCA and ICA, whitened."""
    own = laboratory.reflow
    every = {"native": own.dictionary.codes, "E": own.E}
    every |= {name: d.codes for name, d in laboratory.rivals(own).items()}
    if laboratory.baseline:
        every["baseline"] = laboratory.baseline.E
    every |= {"step 0": laboratory.step0.dictionary.codes, "shuffled": laboratory.shuffled.dictionary.codes}
    at = torch.as_tensor(tokens)
    every = {name: codes[at.to(codes.device)] for name, codes in every.items()}
    return every | {name: every[name] / every[name].std(0) for name in ("pca", "ica")}


def gauges(laboratory, tokens):
    """Codes (n, S) of `tokens` after 19 random non-orthogonal changes of signals, one at a time."""
    d = laboratory.reflow.dictionary
    part = lab.Dictionary("native", d.codes[torch.as_tensor(tokens).to(d.codes.device)], d.atoms)
    return (skewed.codes for skewed in laboratory.rotations(part, lab.skewed))


def cosines(codes, mean=0.0):
    """Cosines (n, n) of the rows of codes (n, dims) less `mean`."""
    rows = torch.nn.functional.normalize(codes - mean, dim=1)
    return rows @ rows.T


# -- measurements


def share_stem(words, plurals=()):
    """Which of `words` are forms of one word, (n, n) bool; `plurals` are further (word, word) pairs."""
    lower = np.array([w.lower() for w in words])
    same = np.eye(len(words), dtype=bool)
    for i, a in enumerate(lower):  # begins which words at least as long?
        begun = np.char.startswith(lower, a[: max(3, len(a) - 2)])
        same[i] |= begun & (np.char.str_len(lower) >= len(a))
    for a, b in plurals:
        same |= np.outer(lower == a.lower(), lower == b.lower())
    return same | same.T


def precision(cosine, labels, k, barred=None):
    """Share of each row's k nearest, itself and `barred` (n, n) left out, that have its label, (n,)."""
    own = torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)
    out = own if barred is None else own | torch.as_tensor(barred, device=cosine.device)
    nearest = cosine.masked_fill(out, -torch.inf).topk(k, dim=1).indices.cpu().numpy()  # (n, k)
    return (labels[nearest] == labels[:, None]).mean(1)


def chance(labels, barred=None):
    """Mean of `precision` over random rankings, in closed form, (n,)."""
    own = np.eye(len(labels), dtype=bool)
    free = ~own if barred is None else ~(own | barred)
    return (free & (labels[:, None] == labels)).sum(1) / free.sum(1)


def hubness(cosine, k=10):
    """Skewness over words of how many others have it among their k nearest; 0 is even."""
    nearest = cosine.clone().fill_diagonal_(-torch.inf).topk(k, dim=1).indices
    return float(skew(np.bincount(nearest.flatten().cpu().numpy(), minlength=len(cosine))))


def auc(cosine, labels):
    """Probability that two words of one category are more alike than two of different ones."""
    i, j = np.triu_indices(len(labels), 1)
    ranks, same = rankdata(cosine.cpu().numpy()[i, j]), labels[i] == labels[j]
    return float((ranks[same].mean() - (same.sum() + 1) / 2) / (~same).sum())


def similarity_sets():
    """{name: [(word, word, human rating)]} from gensim's test data where gensim is installed."""
    spec = importlib.util.find_spec("gensim")
    if spec is None:
        return {}
    folder, found = Path(spec.origin).parent / "test/test_data", {}
    for name in ("simlex999.txt", "wordsim353.tsv"):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        rows = [line.split("\t") for line in lines if not line.startswith("#")]
        found[name.split(".")[0]] = [(r[0], r[1], float(r[2])) for r in rows if len(r) >= 3]
    return found


def run(laboratory, c=None):
    c = c or NearestNeighborsConfig()
    report = lab.Report(laboratory, "nearest_neighbors")
    categories = laboratory.categories()
    labelled = np.array([t for ids in categories.values() for t in ids])
    labels = np.repeat(np.arange(len(categories)), [len(ids) for ids in categories.values()])
    plurals = laboratory.probe("analogies")["singular_plural"]["pairs"]
    barred = share_stem([lab.show(t).strip() for t in labelled], plurals)
    n, pool = len(labelled), laboratory.known_words()[:POOL]
    codes = spaces(laboratory, np.append(labelled, pool))
    means = {name: x[n:].mean(0) for name, x in codes.items()}

    measured, apart = {}, {}
    for name, x in codes.items():
        for kind, mean in (("centred", means[name]), ("raw", 0.0)):
            cosine, where = cosines(x[:n], mean), {"dictionary": name, "control": kind}
            for k in (1, K, 10):
                report.row(f"precision@{k}", precision(cosine, labels, k).mean(), **where)
                report.row(f"precision@{k} apart", precision(cosine, labels, k, barred).mean(), **where)
            report.row("category auc", auc(cosine, labels), **where)
            report.row("hubness", hubness(cosines(x[n:], mean)), **where)
            if kind == "centred":
                measured[name] = precision(cosine, labels, K)
                apart[name] = precision(cosine, labels, K, barred)
    skewed = [
        precision(cosines(x[:n], x[n:].mean(0)), labels, K)
        for x in gauges(laboratory, np.append(labelled, pool))
    ]
    for i, values in enumerate(skewed):
        report.row(f"precision@{K}", values.mean(), dictionary="skewed", control=f"centred, gauge {i}")

    for claim, values, bar in (
        (f"words with similar recipes share a category (precision@{K})", measured, None),
        (f"so they do when forms of one word do not count (precision@{K})", apart, barred),
    ):
        null = {"permuted labels": chance(labels, bar)} | {k: values[k] for k in ("step 0", "shuffled")}
        report.claim(lab.effect(claim, values["native"], null, "categories", labels, published=PUBLISHED))
    report.claim(
        lab.signals(
            f"recipe space knows categories better than any other space of the embedding (precision@{K})",
            measured["native"],
            skewed,
            {name: measured[name] for name in ("E", "pca", "ica", "baseline") if name in measured},
            "categories",
            labels,
            gauges="gauges",
        )
    )

    own = codes["native"][:n].double().cpu()
    turned = lab.rotated(lab.Dictionary("", own, torch.eye(own.size(1)).double()), torch.Generator()).codes
    error = float((cosines(own) - cosines(turned)).abs().max())
    report.notes.append(f"An orthogonal rotation of the signals changes cosines by at most {error:.1g}.")
    report.numbers = {
        "words": n,
        "precision": {name: float(v.mean()) for name, v in measured.items()},
        "precision_apart": {name: float(v.mean()) for name, v in apart.items()},
        "chance": float(chance(labels).mean()),
        "gauges": [float(v.mean()) for v in skewed],
        "hubness": {r["dictionary"]: r["value"] for r in report.rows if r["metric"] == "hubness"},
        "rotation_changes_cosine": error,
    }
    similarity(laboratory, report, means)
    seen = {name: x[n:] - means[name] for name, x in codes.items() if name in ("native", "E", "baseline")}
    report.gallery = gallery(laboratory, c.words, pool, seen)
    figures(report, labels, measured, apart, skewed, cosines(codes["native"][:n], means["native"]), barred)
    return report


def similarity(laboratory, report, means):
    """Spearman correlation of cosine and human ratings, where gensim brings the ratings."""
    sets = similarity_sets()
    if not sets:
        report.notes.append("No word similarity: pip install gensim for SimLex-999 and WordSim-353.")
    for name, rows in sets.items():
        ids = [(laboratory.known(a), laboratory.known(b), rating) for a, b, rating in rows]
        ids = np.array([row for row in ids if None not in row[:2]])  # (pairs, 3)
        if len(ids) < lab.LEAST:
            report.notes.append(f"{name}: the model knows only {len(ids)} pairs.")
            continue
        tokens = ids[:, :2].astype(int).T.flatten()
        for space, codes in spaces(laboratory, tokens).items():
            a, b = torch.nn.functional.normalize(codes - means[space], dim=1).chunk(2)  # (pairs, dims)
            rho = spearmanr((a * b).sum(1).cpu().numpy(), ids[:, 2]).statistic
            report.row(f"spearman {name}", rho, dictionary=space, control=f"{len(ids)} pairs")
            report.numbers.setdefault(f"spearman_{name}", {})[space] = float(rho)


def gallery(laboratory, chosen, pool, codes):
    """The most similar pairs of the pool; neighbours of chosen words and of words drawn at random; text."""
    names = [lab.show(t).strip() for t in pool]
    tables = {name: cosines(x).fill_diagonal_(-torch.inf) for name, x in codes.items()}
    i, j = torch.triu_indices(len(pool), len(pool), 1, device=tables["native"].device)
    best = tables["native"][i, j].topk(20).indices.tolist()
    lines = [f"Most similar recipes of the {len(pool)} most frequent words (cosine; in E)"]
    for a, b in ((int(i[p]), int(j[p])) for p in best):
        lines.append(f"  {names[a]:>14} {names[b]:14} {tables['native'][a, b]:.2f} {tables['E'][a, b]:.2f}")
    drawn = laboratory.rng("random words").choice(len(pool), min(8, len(pool)), replace=False)
    for title, words in (
        ("Neighbours of chosen words", chosen.split(",")),
        ("Neighbours of words drawn at random", [names[w] for w in drawn]),
    ):
        lines += ["", title]
        for word in words:
            if word not in names:
                lines.append(f"  {word}: not among these words")
                continue
            for space, table in tables.items():
                top = table[names.index(word)].topk(5)
                found = (f"{names[t]} {v:.2f}" for t, v in zip(top.indices, top.values, strict=True))
                lines.append(f"  {word if space == 'native' else '':>12}  {space:8} {', '.join(found)}")
    return "\n".join(lines)


def figures(report, labels, measured, apart, skewed, cosine, barred):
    plt = lab.pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    rows = ["native", "19 gauges", *(name for name in measured if name != "native")]
    for y, name in enumerate(rows):
        if name == "19 gauges":
            left.plot([v.mean() for v in skewed], [y] * len(skewed), "|", color=lab.COLOURS["rotated"], ms=10)
            continue
        colour = lab.COLOURS.get(name, "k")
        for values, marker, shift in ((measured[name], "o", -0.14), (apart[name], "s", 0.14)):
            e = lab.estimate(values, labels)
            filled = colour if marker == "o" else "white"
            left.errorbar(e.value, y + shift, xerr=e.bars, fmt=marker, color=colour, mfc=filled, ms=5)
    left.axvline(chance(labels).mean(), color="k", ls=":", lw=1)
    left.set_yticks(range(len(rows)), rows)
    left.invert_yaxis()
    left.set(xlabel=f"precision@{K}, with 95 % interval\n(open: forms of one word left out; dotted: chance)")
    left.set_xlim(left=0)
    i, j = np.triu_indices(len(labels), 1)
    values, same = cosine.cpu().numpy()[i, j], labels[i] == labels[j]
    forms = barred[i, j]
    edges = np.linspace(values.min(), 1, 50)
    for name, part, colour in (
        ("same category", same & ~forms, lab.COLOURS["native"]),
        ("different categories", ~same & ~forms, lab.COLOURS["random"]),
    ):
        right.hist(values[part], edges, density=True, histtype="step", color=colour, label=name, lw=1.5)
    right.set(xlabel="cosine of two recipes, centred", ylabel="density of pairs")
    right.set_ylim(top=1.25 * right.get_ylim()[1])
    right.legend(loc="upper left")
    number = report.numbers["precision"]
    title = (
        f"{number['native']:.0%} of a word's {K} nearest recipes share its category (in E {number['E']:.0%}, "
        f"before training {number['step 0']:.0%}, chance {report.numbers['chance']:.0%})"
    )
    report.figure(fig, "neighbors", title)


if __name__ == "__main__":
    lab.main(run, NearestNeighborsConfig)
