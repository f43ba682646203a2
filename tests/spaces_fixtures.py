"""Small models with planted word classes or analogies, for the tests of what compares words."""

import numpy as np
import torch

from data.words import Words
from experiments.lab.probes import probe
from tests.lab_fixtures import corpus, open_lab, save_run, tiny, token


def known_everywhere():
    """Words of a model that has seen every token often."""
    return Words(np.full(50257, 100.0))


def set_recipes(net, recipes):
    """Recipes {token: vector} on a background of small noise."""
    with torch.no_grad():
        for t, vector in recipes.items():
            net.vocab.recipe[t] = torch.as_tensor(vector, dtype=torch.float32)
    return net


def clustered(crooked, seed=1):
    """Recipes of a category lie around a centre, in 12 of 32 signals; the rest is weak noise.

    With a crooked basis all atoms are nearly parallel, so that E hides what the recipes show, and whitening
    raises the noise. Otherwise the basis is orthonormal, and E shows the same.
    """
    net = tiny(seed, n_embd=32, n_signal=32)
    rng = np.random.default_rng(seed)
    planted = {}
    for entry in probe("categories").values():
        centre = rng.standard_normal(12)
        for word in entry["words"]:
            strong = centre + 0.45 * rng.standard_normal(12)
            planted[token(word)] = np.append(strong, 0.1 * rng.standard_normal(20))
    if crooked:
        with torch.no_grad():
            net.vocab.basis.mul_(0.15).add_(torch.ones(32) / 32**0.5)
    return set_recipes(net, planted)


def parallelogram(seed=1):
    """a = b + the relation's own offset, for every pair whose words no earlier relation has placed.

    The offset is on the side of a, and large: so c is nearer to the other words like a than to its answer.
    """
    net = tiny(seed, n_embd=32, n_signal=32)
    rng = np.random.default_rng(seed)
    planted = {}
    for relation in probe("analogies").values():
        offset = 1.5 * rng.standard_normal(32)
        for a, b in relation["pairs"]:
            start = planted.setdefault(token(b), rng.standard_normal(32))
            planted.setdefault(token(a), start + offset)
    return set_recipes(net, planted)


MODELS = {
    "crooked": lambda: clustered(True),
    "straight": lambda: clustered(False),
    "parallelogram": parallelogram,
    "untrained": lambda: tiny(3, n_embd=32, n_signal=32),
    "dense": lambda: tiny(4, n_embd=32, vocab="dense"),
}


def open_planted(folder, *names):
    """A function: the name of one of MODELS -> its lab, saved under `folder` and opened on first use.

    Every run has a folder to itself, so that the dense one is not the baseline of the others.
    """
    text = corpus(folder / "text", repeats=10)
    labs = {}

    def get(name):
        if name not in labs:
            step = 0 if name == "untrained" else 1
            labs[name] = open_lab(save_run(folder / name / "run", MODELS[name](), text, step))
        return labs[name]

    return get


def verdicts(report):
    """{key: verdict} of the claims."""
    return {claim.key: claim.verdict for claim in report.claims}


def files_are_there(report):
    """Whether a report, saved, has its figures and tables in its folder."""
    report.save()
    names = [figure.file for figure in report.figures] + ["rows.csv", "result.json"]
    return bool(report.figures) and all((report.folder / name).exists() for name in names)
