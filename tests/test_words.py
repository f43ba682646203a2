"""Tokens by how often training saw them."""

import numpy as np

from data.words import LEAST_COUNT, Words


def test_known_words_are_whole_words_seen_often_enough_most_frequent_first():
    counts = np.random.default_rng(0).integers(0, 100, 50257)
    words = Words(counts)
    found = words.known_words()
    assert len(found) > 10_000
    texts = [words.text(token) for token in found]
    assert all(text[0] == " " and text[1:].isalpha() and len(text) > 2 for text in texts)
    assert (np.diff(counts[found]) <= 0).all()
    assert counts[found].min() == LEAST_COUNT
