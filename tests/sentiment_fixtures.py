"""A corpus of word pairs, and small models with a planted signal of sentiment."""

import functools

from experiments.lab.probes import probe
from tests.lab_fixtures import corpus_of_pairs, open_lab, planted_pairs, save_run, tiny, words

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


def sentiment_corpus(folder):
    """Write a dataset: the pairs in random order, those of common words three times as often as others."""
    return corpus_of_pairs(folder, pairs(), [40 if pair[0] in COMMON else 12 for pair in pairs()])


def planted(turn=False):
    """`planted_pairs` whose signal 0 is sentiment."""
    return planted_pairs(pairs(), sides(), turn)


def planted_labs(folder):
    """{name: Lab}: a planted run with a plain GPT, the same with its signals rotated, an untrained run."""
    text = sentiment_corpus(folder / "text")
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
