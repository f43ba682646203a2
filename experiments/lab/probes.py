"""
The word lists of experiments/probes/, as far as a model knows their words.
"""

import functools
import json
from pathlib import Path

import numpy as np

PROBES = Path(__file__).resolve().parents[1] / "probes"
LEAST_WORDS = 4  # known words that a category must have


@functools.cache
def probe(name):
    """The contents of probes/<name>.json."""
    return json.loads((PROBES / f"{name}.json").read_text(encoding="utf-8"))


def categories(words):
    """{category: [ids]} of the labelled words that a model knows (data.words.Words)."""
    found = {name: words.known_all(entry["words"]) for name, entry in probe("categories").items()}
    return {name: ids for name, ids in found.items() if len(ids) >= LEAST_WORDS}


def labelled(words):
    """(ids (n,), number of the category of each (n,), names of the categories) of `categories`."""
    found = categories(words)
    ids = np.array([token for part in found.values() for token in part], int)
    labels = np.repeat(np.arange(len(found)), [len(part) for part in found.values()])
    return ids, labels, list(found)
