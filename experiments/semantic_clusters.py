"""
Do the recipes of a word class lie together, and more so than the embeddings do?

    python experiments/semantic_clusters.py --run=out/reflow-nano

Method
    Silhouette s = (b - a) / max(a, b) of each word (Rousseeuw, 1987): a is the mean distance to its own
    category, b the mean distance to the nearest other one. A silhouette means nothing without three
    statements. Space: all signals, centred on 2,000 frequent words. Distance: 1 - cosine. Labels: our word
    lists. Clusters that are found in the data score well above 0 even on noise in a plane (shown). Chance is
    below 0: b is a minimum over many categories, so random labels score negative, more so when distances
    vary. Spaces are therefore compared by the excess over the same word's mean under 99 permutations of the
    labels in the same space. k-means clusters, as many as categories, are judged by V-measure (Rosenberg &
    Hirschberg, 2007) against permuted labels. The picture shows a plane, so its own silhouette is printed
    with that of permuted labels there. Spaces and gauges, a description: lab/spaces.py. Unit: a word; words
    of one category are resampled together.

Cost
    Silhouettes of 100 labellings in 26 spaces. Without the fit of ICA: 4 s on one core for 64 signals and
    1,000 words, 15 s for 1,024 signals.
"""

import sys
from operator import itemgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
import numpy as np
import torch

from experiments.lab import Lab, Report, run_experiment
from experiments.lab.plots import COLOURS, plot_heat_map
from experiments.lab.probes import labelled
from experiments.lab.spaces import POOL, centred, compare_spaces, cosines, spaces, split

CLAIMS = {
    "silhouette": "recipes of a word class lie together (excess silhouette by all signals and given labels)",
    "best_space": "excess silhouette in recipe space beside random gauges and other spaces",
}
PUBLISHED = "silhouette 0.105, space, distance and labels not stated (464M, OpenWebText)"
PERMUTATIONS = 99
N_SHOWN = 6  # categories in the figures: those with the most known words
N_TEXTS, N_ROWS = 4, 10  # words of a category with their text in the plane, and in the heat map
STYLES = list(zip(("native", "ica", "baseline", "step 0", "pca", "shuffled"), "osD^vP", strict=True))


def silhouette(distance, labels):
    """Silhouette of every item: distance (n, n), labels (n,) or (P, n) -> the shape of `labels`.

    Every label from 0 to the largest must occur at least twice.
    """
    many = np.atleast_2d(labels).T  # (n, P)
    own = many[:, :, None] == np.arange(many.max() + 1)  # (n, P, C)
    sizes = own.sum(0)  # (P, C)
    sums = (distance @ own.reshape(len(own), -1).astype(distance.dtype)).reshape(own.shape)  # (n, P, C)
    to_own = np.take_along_axis(sums, many[:, :, None], 2)[:, :, 0]  # (n, P)
    own_size = np.take_along_axis(sizes, many.T, 1).T  # (n, P)
    a = to_own / (own_size - 1)
    b = np.where(own, np.inf, sums / sizes).min(2)
    return ((b - a) / np.maximum(np.maximum(a, b), 1e-30)).T.reshape(np.shape(labels))


def k_means(points, k, seed):
    """Number of the cluster of each of the points (n, dims), (n,)."""
    from sklearn.cluster import KMeans  # takes a second to import

    return KMeans(k, n_init=2, random_state=seed).fit_predict(points)


def v_measure(codes, labels, rng, seed=0):
    """V-measure of k-means of codes (n, dims) at length 1: value, mean over permuted labels, p-value."""
    from sklearn.metrics import v_measure_score

    rows = torch.nn.functional.normalize(codes, dim=1).cpu().numpy()
    found = k_means(rows, labels.max() + 1, seed)
    value = v_measure_score(labels, found)
    null = np.array([v_measure_score(rng.permutation(labels), found) for _ in range(PERMUTATIONS)])
    return {"value": value, "permuted": null.mean(), "p": p_value(value, null)}


def p_value(value, null):
    """Probability of a value as high as this one, if it were one of the null (P,)."""
    return (1 + (null >= value).sum()) / (1 + len(null))


def distances(codes):
    """1 - cosine of the rows of codes (n, dims), (n, n)."""
    return 1 - cosines(codes).double().cpu().numpy()


def euclidean(points):
    """Distances (n, n) of points (n, 2)."""
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def plane(codes):
    """Coordinates (n, 2) of codes (n, dims) on their two principal axes, and the share of variance there."""
    x = (codes - codes.mean(0)).double().cpu().numpy()
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return u[:, :2] * s[:2], float((s[:2] ** 2).sum() / (s**2).sum())


def leaf_order(distance):
    """Order of items in which neighbours are alike: average linkage, leaves turned to best fit, (n,)."""
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    condensed = squareform(np.maximum(distance, 0), checks=False)  # ignores the diagonal
    return leaves_list(optimal_leaf_ordering(linkage(condensed, "average"), condensed))


def run(lab: Lab) -> Report:
    report = Report(lab, "semantic_clusters", CLAIMS)
    rng = lab.rng("permutations")
    words, labels, names = labelled(lab)
    n = len(words)
    permuted = np.stack([rng.permutation(labels) for _ in range(PERMUTATIONS)])  # (P, n)

    def measure(codes):
        distance = distances(centred(codes, n))
        value = silhouette(distance, labels)  # (n,)
        null = silhouette(distance, permuted)  # (P, n)
        return {"excess": value - null.mean(0), "raw": value, "permuted": null.mean(1)}

    tokens = np.append(words, lab.words.known_words()[:POOL])
    found = compare_spaces(lab, measure, tokens)
    excess, raw, null = found["excess"], found["raw"], found["permuted"]
    against_chance, best_space = split(excess)
    against_chance["permuted labels"] = np.zeros(n)
    report.effect("silhouette", against_chance, "categories", groups=labels, published=PUBLISHED)
    report.gauge("best_space", best_space, "categories", groups=labels)
    report.scores("raw silhouette", raw)
    report.scores("permuted", null)
    for i, name in enumerate(names):
        of_category = itemgetter(labels == i)
        report.scores("excess silhouette", excess.map(of_category), prompt=name)

    codes = {name: centred(rows, n) for name, rows in spaces(lab, tokens).items()}
    judged = [name for name in ("native", "E", "baseline", "step 0") if name in codes]
    v = {name: v_measure(codes[name], labels, rng, lab.seed) for name in judged}
    for name, values in v.items():
        for metric, value in values.items():
            report.row(f"v-measure, {metric}", value, dictionary=name)
    p = p_value(raw.native.mean(), null.native)
    report.numbers |= {"words": n, "p_permutation": p, "v_measure": v}
    report.notes += [
        f"Silhouette of {n} words in {len(names)} categories {raw.native.mean():.3f}, permuted labels "
        f"{null.native.mean():.3f} (p = {p:.2f}); in E {raw['E'].mean():.3f}, {null['E'].mean():.3f}.",
        f"V-measure of {len(names)} k-means clusters (permuted labels; p): "
        + ", ".join(f"{s} {x['value']:.3f} ({x['permuted']:.3f}; {x['p']:.2f})" for s, x in v.items()),
    ]
    report.gallery = gallery(excess, labels, names)
    draw(report, lab, codes["native"], codes["step 0"], words, labels, names, rng)
    return report


def gallery(excess, labels, names):
    """Text: the excess silhouette of every category."""
    lines = ["Excess silhouette of every category", f"  {'':14} words  recipes        E  before training"]
    for i, name in enumerate(names):
        cells = [f"{excess[space][labels == i].mean():7.3f}" for space in ("native", "E", "step 0")]
        lines.append(f"  {name:14} {(labels == i).sum():5}  {'  '.join(cells)}")
    return "\n".join(lines)


def draw(report, lab, native, untrained, words, labels, names, rng):
    """The categories with the most known words in a plane and in a heat map; their silhouettes."""
    shown = np.sort(np.argsort(-np.bincount(labels), kind="stable")[:N_SHOWN])
    kept = np.flatnonzero(np.isin(labels, shown))
    words = words[kept]
    labels = np.searchsorted(shown, labels[kept])  # (m,), 0 to N_SHOWN - 1
    names = [names[i] for i in shown]
    native = native[torch.from_numpy(kept)]  # (m, dims)
    picture = picture_silhouettes(native, untrained[torch.from_numpy(kept)], labels, rng, lab.seed)
    for name, value in picture.items():
        report.row("silhouette", value, dictionary="native", control=f"words of the picture, {name}")
    points, share = plane(native)
    report.numbers["picture"] = picture | {"share of variance": share}
    values = "; ".join(f"{name} {value:.3f}" for name, value in picture.items())
    report.notes.append(f"Silhouette of the {len(words)} words of the picture {values}.")
    texts = np.array([lab.words.text(token).strip() for token in words])
    draw_plane(report, points, labels, names, texts)
    by_count = np.argsort(-lab.words.counts[words], kind="stable")
    frequent = np.concatenate([by_count[labels[by_count] == i][:N_ROWS] for i in range(len(names))])
    draw_heat_map(report, distances(native[frequent]), labels[frequent], names, texts[frequent])


def picture_silhouettes(own, untrained, labels, rng, seed):
    """{name: mean silhouette} of the words of the picture, with codes `own` and `untrained` (m, dims)."""
    permuted = np.stack([rng.permutation(labels) for _ in range(PERMUTATIONS)])  # (P, m)
    flat, full = euclidean(plane(own)[0]), distances(own)
    noise, _ = plane(untrained)
    clusters = k_means(noise, labels.max() + 1, seed)
    found = {
        "in the plane": silhouette(flat, labels),
        "in the plane, permuted labels": silhouette(flat, permuted),
        "in the full space": silhouette(full, labels),
        "in the full space, permuted labels": silhouette(full, permuted),
        "in the plane before training, labels by k-means": silhouette(euclidean(noise), clusters),
    }
    return {name: float(values.mean()) for name, values in found.items()}


def draw_plane(report, points, labels, names, texts):
    """The words in the plane of most variance, with the text of the outermost ones of each category."""
    picture = report.numbers["picture"]
    title = (
        f"Words of {len(names)} classes in the plane of most variance ({picture['share of variance']:.0%} of "
        f"it): silhouette {picture['in the plane']:.3f} (permuted labels "
        f"{picture['in the plane, permuted labels']:.3f}); in the full space "
        f"{picture['in the full space']:.3f} ({picture['in the full space, permuted labels']:.3f})"
    )
    outermost_first = np.argsort(-np.linalg.norm(points - points.mean(0), axis=1))
    with report.figure("plane", title, size=(8, 6.4)) as ax:
        for i, (colour, marker) in enumerate(STYLES[: len(names)]):
            ax.plot(*points[labels == i].T, marker, color=COLOURS[colour], ms=5, label=names[i], alpha=0.8)
            for word in outermost_first[labels[outermost_first] == i][:N_TEXTS]:
                ax.annotate(texts[word], points[word], (4, 3), textcoords="offset points", fontsize=7)
        ax.set(xlabel="first principal axis (length in the residual stream)", ylabel="second principal axis")
        ax.margins(x=0.14)
        ax.figure.legend(ncols=len(names), loc="outside lower center", columnspacing=1)


def draw_heat_map(report, distance, labels, names, texts):
    """Cosines of words in leaf order, from distances (m, m)."""
    order = leaf_order(distance)
    cosine = 1 - distance[np.ix_(order, order)]
    part = labels[order]
    neighbours = (part[1:] == part[:-1]).mean()
    by_chance = ((part[:, None] == part).sum(1) - 1).mean() / (len(part) - 1)
    report.row("leaf neighbours of one category", neighbours, dictionary="native")
    report.row("leaf neighbours of one category", by_chance, dictionary="native", control="random order")
    title = (
        f"Recipes in the leaf order of average linkage: {neighbours:.0%} of neighbours in the order share a "
        f"category, in a random order {by_chance:.0%}"
    )
    rows = [f"{text} ({names[i]})" for text, i in zip(texts[order], part, strict=True)]
    limit = np.abs(cosine[~np.eye(len(cosine), dtype=bool)]).max()
    with report.figure("heat_map", title, size=(8.8, 8)) as ax:
        plot_heat_map(ax, cosine, texts, rows, "cosine of two recipes, centred", limit, fontsize=6)


if __name__ == "__main__":
    run_experiment(run)
