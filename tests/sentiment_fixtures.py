"""A corpus of word pairs, and small models with a planted signal of sentiment."""

from experiments.lab import plants
from experiments.lab.plants import COMMON, sides
from tests.lab_fixtures import corpus_of_pairs, open_lab, planted_pairs, save_run, tiny


def pairs():
    """Words in fixed pairs: in the corpus the second always follows the first."""
    return plants.pairs(400)


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
