"""
The tokens of a run by how often its training text holds them.

The row of a rare token stays close to its random start.
"""

import functools

import numpy as np
import torch

from data.tokenizer import gpt2

LEAST_COUNT = 5  # sightings in training from which a token counts as known
SHOWN_COUNT = 100  # sightings from which a table for the eye lists a token; rarer rows are mostly noise
FEWEST_SHOWN = 1000  # tokens that such a table chooses from at least, if so many are known


def sightings(n):
    """How often a token was seen, in words."""
    return {0: "never seen", 1: "seen once"}.get(int(n), f"seen {int(n):,} times")


class Words:
    """The tokens of a run by how often its training text holds them, `counts` (n_tokens,).

    `tokenizer` is the run's Tokenizer, None: GPT-2's. `where`: what text was counted, in words.
    """

    def __init__(self, counts, tokenizer=None, where="training"):
        self.counts = counts
        self.where = where
        self.tokenizer = tokenizer or gpt2()

    def text(self, token):
        """A token as text for a table or a figure."""
        return self.tokenizer.token_text(token)

    @functools.cached_property
    def by_count(self):
        """All token ids, the most frequent in training first, (n_tokens,)."""
        return np.argsort(-self.counts, kind="stable")

    def known_tokens(self, least=LEAST_COUNT):
        """Ids of the tokens seen at least `least` times in training, most frequent first, (n,)."""
        return self.by_count[self.counts[self.by_count] >= least]

    def tokens_to_fit(self, width):
        """Ids of the tokens that a dictionary of E (n_tokens, width) is fitted to, most frequent first, (n,).

        The known ones, or four times the width if these are more: even after a few steps.
        """
        return self.by_count[: max(len(self.known_tokens()), 4 * width)]

    def shown_tokens(self):
        """Ids of the tokens that a table for the eye lists, most frequent first, (n,).

        Seen at least SHOWN_COUNT times, or the FEWEST_SHOWN most frequent known ones if these are more. Of a
        model whose training text nobody here has: all but control tokens.
        """
        if self.where != "training":
            return self.by_count[~np.isin(self.by_count, list(self.tokenizer.vocabulary.control))]
        known = self.known_tokens()
        return known[: max(FEWEST_SHOWN, len(self.known_tokens(SHOWN_COUNT)))]

    def known_words(self, letters=2):
        """Those known tokens that are a space and at least so many letters, most frequent first, (n,)."""
        known = self.known_tokens()
        texts = [self.tokenizer.decode([token]) for token in known]
        is_word = [text[0] == " " and text[1:].isalpha() and len(text) > letters for text in texts]
        return known[is_word]

    def known(self, word, least=LEAST_COUNT):
        """The id of " word" if it is one token, seen at least `least` times in training; else None."""
        tokens = self.tokenizer.encode_ordinary(" " + word)
        return tokens[0] if len(tokens) == 1 and self.counts[tokens[0]] >= least else None

    def known_all(self, words, least=LEAST_COUNT):
        """The ids of those of `words` that are known, in order, a list."""
        found = [self.known(word, least) for word in words]
        return [token for token in found if token is not None]

    def top(self, scores, k=6, tokens=None):
        """The k of `tokens` (ids; None: the known ones) with the highest scores (n_tokens,), as text."""
        tokens = torch.from_numpy(self.known_tokens() if tokens is None else tokens).to(scores.device)
        best = tokens[scores[tokens].topk(min(k, len(tokens))).indices]
        return " ".join(self.text(token).strip() for token in best)
