"""
The spaces in which words are compared, and how well the neighbours of a word know its category.

A space is a matrix of codes (n, dims), one row for each word. Orthogonal rotations of the signals change no
cosine, so a measure of cosines cannot see whether the axes are special. The random gauges here are
non-orthogonal (dictionary.skewed): they leave E and every logit as they are, but change cosines (Steck et
al., 2403.05440). They are centred on the learned gauge, and a rotated one is as far from them. So a space is
described beside them, and no p or verdict comes of it. PCA and ICA are whitened; they then differ by little
but a rotation, so their cosines nearly agree.
"""

import numpy as np
import torch

from dictionary import skewed
from experiments.lab import nulls
from experiments.lab.claims import Scores

POOL = 2000  # frequent words or tokens, whose mean is subtracted from the codes
UNTAUGHT = (*nulls.NAMES, "shuffled")  # spaces without structure: the controls of an effect


def spaces(lab, tokens):
    """{name: codes (n, dims)} of `tokens` (n,): recipes, E, the plain GPT, those of UNTAUGHT."""
    codes = {"native": lab.model.dictionary.codes, "E": lab.model.E}
    if lab.baseline:
        codes["baseline"] = lab.baseline.E
    codes |= {name: subject.dictionary.codes for name, subject in lab.nulls.items()}
    codes["shuffled"] = lab.shuffled.dictionary.codes
    index = torch.as_tensor(tokens).to(lab.device)
    return {name: rows[index] for name, rows in codes.items()}


def compare_spaces(lab, measure, tokens):
    """{metric: Scores} of measure(codes (n, dims)) -> {metric: values} for the codes of `tokens` (n,).

    The spaces are those of `spaces`, PCA and ICA of E, whitened, and 19 skewed gauges of the recipes.
    """

    def measure_dictionary(d):
        is_whitened = d.name in ("pca", "ica")
        return measure(d.codes / d.codes.std(0) if is_whitened else d.codes)

    found = lab.compare(measure_dictionary, tokens=tokens, change=skewed)
    for name, codes in spaces(lab, tokens).items():
        if name != "native":
            for metric, values in measure(codes).items():
                found[metric][name] = values
    return found


def split(scores):
    """Scores in two parts, both with the native values: (those of UNTAUGHT; gauges and rival spaces)."""
    controls = {name: scores[name] for name in ("native", *UNTAUGHT) if name in scores}
    rivals = {name: values for name, values in scores.items() if name not in UNTAUGHT}
    return Scores(controls), Scores(rivals, scores.gauges, scores.gauge, scores.missing)


def centred(codes, n):
    """The first n rows of codes (m, dims) less the mean of the others, of frequent tokens, (n, dims)."""
    return codes[:n] - codes[n:].mean(0)


def less_shared(codes, n):
    """The first n rows of codes (m, dims) less every column's median over the others, (n, dims).

    A vector that all rows share would make every one of them look dense. Where most entries of a column are
    zero its median is zero, unlike its mean: entries that are zero stay so. The others: frequent tokens.
    """
    return codes[:n] - codes[n:].median(0).values


def cosines(codes, mean=0.0):
    """Cosines (n, n) of the rows of codes (n, dims) less `mean`.

    The mean over frequent words is one to subtract: otherwise a few directions that all words share dominate
    the cosines (Timkey & van Schijndel, 2109.04404).
    """
    rows = torch.nn.functional.normalize(codes - mean, dim=1)
    return rows @ rows.T


def precision(cosine, labels, k, barred=None):
    """Share of each row's k nearest, itself and `barred` (n, n) left out, that have its label, (n,)."""
    excluded = torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)
    if barred is not None:
        excluded |= torch.as_tensor(barred, device=cosine.device)
    nearest = cosine.masked_fill(excluded, -torch.inf).topk(k, dim=1).indices.cpu().numpy()  # (n, k)
    return (labels[nearest] == labels[:, None]).mean(1)


def chance(labels, barred=None):
    """Mean of `precision` over random rankings, in closed form, (n,)."""
    allowed = ~np.eye(len(labels), dtype=bool)
    if barred is not None:
        allowed &= ~barred
    same = labels[:, None] == labels
    return (allowed & same).sum(1) / allowed.sum(1)
