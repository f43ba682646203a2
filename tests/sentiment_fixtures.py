"""A corpus of word pairs, and small models with a planted signal of sentiment."""

import functools

import numpy as np
import torch

from data.shards import Writer
from data.tokenizer import END_OF_TEXT, encode
from experiments.lab.probes import probe
from tests.lab_fixtures import open_lab, save_run, silent, tiny, token, words

COMMON = ["was", "is", "been", "seemed", "as", "found", "change", "argument", "country", "sounded"]


def sides():
    """The lists of positive and of negative words, both those that build and those that measure."""
    lists = probe("sentiment")
    return [lists[side]["build"] + lists[side]["held_out"] for side in ("positive", "negative")]


@functools.cache
def pairs():
    """Words in fixed pairs: in the corpus the second always follows the first."""
    used = {word for side in sides() for word in side} | set(COMMON)
    plain = [word for word in words(400) if word not in used]
    lists = [COMMON, plain, *sides()]
    return [pair for part in lists for pair in zip(part[::2], part[1::2], strict=False)]


def corpus_of_pairs(folder):
    """Write a dataset: the pairs in random order, those of common words three times as often as others."""
    rng = np.random.default_rng(0)
    times = [40 if pair[0] in COMMON else 12 for pair in pairs()]
    order = rng.permutation(np.repeat(np.arange(len(times)), times))
    writer = Writer(folder, source="pairs of words in random order", licence="none", recipe={})
    for i, part in enumerate(np.array_split(order, len(order) // 100)):
        split = "val" if i % 3 == 1 else "train"
        if writer.wants(split, i):
            line = "".join(f" {word}" for j in part for word in pairs()[j])
            writer.add(split, i, np.append(encode(line), END_OF_TEXT).astype("uint16"), len(line))
    writer.finish()
    return folder


def planted(turn=False):
    """Blocks that do nothing; signal 0 is sentiment; words of a pair are alike; sparse recipes of length 1.

    `turn`: the same E and the same function, with the signals rotated at random.
    """
    model = silent(tiny())
    generator = torch.Generator().manual_seed(1)
    codes = 0.02 * torch.randn(model.vocab.recipe.shape, generator=generator)
    for i, pair in enumerate(pairs()):
        for word in pair:
            own = torch.randint(1, 16, (1,), generator=generator)
            codes[token(word), 1 + i % 15] += 1.0
            codes[token(word), own] += 0.5
    for side, sign in zip(sides(), (1, -1), strict=True):
        codes[[token(word) for word in side], 0] = sign * 1.0
    used = sorted({token(word) for pair in pairs() for word in pair})
    codes[used] /= codes[used].norm(dim=1, keepdim=True)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q if turn else torch.eye(16)
    with torch.no_grad():
        model.vocab.recipe.copy_(codes @ rotation)
        model.vocab.basis.copy_(rotation.T @ basis)
    return model


def planted_labs(folder):
    """{name: Lab}: a planted run with a plain GPT, the same with its signals rotated, an untrained run."""
    text = corpus_of_pairs(folder / "text")
    dense = save_run(folder / "dense", tiny(3, vocab="dense"), text)
    models = {"planted": planted(), "turned": planted(turn=True), "untrained": tiny(5)}
    labs = {}
    for name, model in models.items():  # a folder for each run, so that only "planted" has a baseline
        run = save_run(folder / name / "run", model, text, step=int(name != "untrained"))
        labs[name] = open_lab(run, dense if name == "planted" else None)
    return labs


def verdicts(report):
    """{key: verdict} of the claims."""
    return {claim.key: claim.verdict for claim in report.claims}
