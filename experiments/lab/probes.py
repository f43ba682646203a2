"""
The word lists of experiments/probes/, or of a folder of one's own, as far as a model knows their words.

A folder of one's own may hold some of the files alone; the others are those of experiments/probes/, whose
README describes every file.
"""

import functools
import hashlib
from pathlib import Path
from typing import NotRequired

import numpy as np
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from configurator import UserError
from experiments.lab.claims import LEAST_UNITS, TooFew

PROBES = Path(__file__).resolve().parents[1] / "probes"
LEAST_WORDS = 4  # known words that a category must have


class Category(TypedDict):
    words: list[str]


class Relation(TypedDict):
    pairs: list[tuple[str, str]]


class Side(TypedDict):
    build: list[str]  # words that make a direction
    held_out: list[str]  # words that measure it


class Lexicon(TypedDict):
    positive: list[str]
    negative: list[str]


class Templates(TypedDict):
    dev: list[str]
    test: list[str]


class Sentiment(TypedDict):
    positive: Side
    negative: Side
    lexicon: Lexicon
    templates: Templates


class MinimalPair(TypedDict):
    clean: str
    corrupted: str
    correct: str
    other: str
    context: NotRequired[int]
    template: NotRequired[str]


class Agreement(TypedDict):
    pairs: list[MinimalPair]
    contexts: list[str]


FORMATS = {
    "categories": TypeAdapter(dict[str, Category]),
    "analogies": TypeAdapter(dict[str, Relation]),
    "sentiment": TypeAdapter(Sentiment),
    "agreement": TypeAdapter(Agreement),
}


@functools.cache
def probe(name, folder=PROBES):
    """The contents of <folder>/<name>.json, else of experiments/probes/<name>.json. Raises UserError."""
    path = folder / f"{name}.json"
    path = path if path.exists() else PROBES / path.name
    try:
        return FORMATS[name].validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}: see experiments/probes/README.md") from None


def own_probes(folder):
    """{"probes <folder>": SHA-256} of the word lists in a folder of one's own. Raises UserError."""
    found = [folder / f"{name}.json" for name in FORMATS if (folder / f"{name}.json").exists()]
    if not found:
        names = ", ".join(f"{name}.json" for name in FORMATS)
        raise UserError(f"--probes={folder} holds none of {names}: see experiments/probes/README.md")
    for path in found:
        probe(path.stem, folder)
    text = b"".join(path.name.encode() + path.read_bytes() for path in found)
    return {f"probes {folder}": hashlib.sha256(text).hexdigest()}


def categories(lab):
    """{category: [ids]} of the labelled words that a lab's model knows."""
    found = {name: lab.words.known_all(entry["words"]) for name, entry in lab.probe("categories").items()}
    return {name: ids for name, ids in found.items() if len(ids) >= LEAST_WORDS}


def labelled(lab):
    """(ids (n,), number of the category of each (n,), names of the categories) of `categories`.

    Raises TooFew for less than two categories or 20 words.
    """
    found = categories(lab)
    ids = np.array([token for part in found.values() for token in part], int)
    labels = np.repeat(np.arange(len(found)), [len(part) for part in found.values()])
    if len(found) < 2 or len(ids) < LEAST_UNITS:
        words = f"{len(ids)} words in {len(found)} categories of categories.json"
        raise TooFew(
            f"only {words} are tokens that training has seen often (own words: experiments/probes/README.md)"
        )
    return ids, labels, list(found)
