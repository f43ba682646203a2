"""The word lists as a model knows them."""

from types import SimpleNamespace

import numpy as np

from data.words import Words
from experiments.lab.probes import LEAST_WORDS, categories, labelled, probe
from tests.lab_fixtures import token


def test_a_category_has_the_known_words_of_its_list():
    """All words are known but one of the animals and all but three of the metals."""
    animals, metals = (probe("categories")[name]["words"] for name in ("animals", "metals"))
    counts = np.full(50257, 100.0)
    counts[[token(animals[0]), *(token(word) for word in metals[LEAST_WORDS - 1 :])]] = 0
    found = categories(SimpleNamespace(words=Words(counts), probe=probe))
    assert found["animals"] == [token(word) for word in animals[1:]]
    assert found.keys() == probe("categories").keys() - {"metals"}


def test_labels_number_the_categories_in_their_order():
    lab = SimpleNamespace(words=Words(np.full(50257, 100.0)), probe=probe)
    ids, labels, names = labelled(lab)
    assert names == list(probe("categories"))
    for number, (name, expected) in enumerate(categories(lab).items()):
        assert ids[labels == number].tolist() == expected, name
    assert len(ids) == len(labels) == sum(map(len, categories(lab).values()))
