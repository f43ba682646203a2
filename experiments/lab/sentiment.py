"""
Sentiment: words that build a direction, words that measure it, and the log-odds between them.

Words and templates are those of probes/sentiment.json. Positive and negative words are paired by their
frequency in training, so that a difference between the two is not one of frequency. The words that build a
direction ("build") and those that measure it ("held_out") are disjoint. So are "dev" and "test" templates.
"""

import numpy as np
import torch

import hooks
from dictionary import top_k
from experiments.lab.claims import TooFew

SIDES = ("positive", "negative")
LEAST_COUNT = 3  # sightings in training that a word needs


def templates(lab, part):
    """The prompts of a part, "dev" or "test", as lists of ids."""
    return [lab.words.tokenizer.encode_ordinary(text) for text in lab.probe("sentiment")["templates"][part]]


def word_pairs(lab, part):
    """Ids of the known positive and negative words of "build" or "held_out", paired by frequency, (2, n)."""
    from scipy.optimize import linear_sum_assignment  # takes half a second to import

    lists = [lab.probe("sentiment")[side][part] for side in SIDES]
    sides = [np.array(lab.words.known_all(words, LEAST_COUNT), int) for words in lists]
    if not all(map(len, sides)):
        found = " and ".join(f"{len(ids)} {side}" for side, ids in zip(SIDES, sides, strict=True))
        raise TooFew(
            f"only {found} words of sentiment.json ({part}) are tokens that training has seen {LEAST_COUNT} "
            "times (own words: experiments/probes/README.md)"
        )
    positive, negative = (np.log(lab.words.counts[ids]) for ids in sides)
    chosen = linear_sum_assignment(np.abs(positive[:, None] - negative))
    pairs = np.stack([ids[index] for ids, index in zip(sides, chosen, strict=True)])
    return torch.from_numpy(pairs).to(lab.device)


def lexicon(lab, barred):
    """{side: ids (n,)} of the words of VADER's lexicon that training has seen, without the ids `barred`."""
    lists = lab.probe("sentiment")["lexicon"]
    return {side: np.setdiff1d(lab.words.known_all(lists[side], least=1), barred) for side in SIDES}


def direction(d, pairs, k=None):
    """(Mean code of pairs[0] - mean code of pairs[1], its k largest entries or all of it) @ atoms, (d,)."""
    code = d.codes[pairs[0]].mean(0) - d.codes[pairs[1]].mean(0)  # (S,)
    return (code if k is None else top_k(code, k)) @ d.atoms


def diff_mean(net, prompts, pairs, layer):
    """Mean stream entering `layer` at a word of pairs[0] after a prompt, less that of pairs[1], (d,)."""
    length = min(map(len, prompts))
    tails = torch.tensor([prompt[-length:] for prompt in prompts], device=pairs.device)  # (P, length)
    words = pairs.flatten()  # (2n,)
    idx = torch.cat([tails.repeat_interleave(len(words), 0), words.repeat(len(tails))[:, None]], 1)
    resid = torch.cat([hooks.resid_pre(net, part, layer)[:, -1] for part in idx.split(256)])  # (P * 2n, d)
    positive, negative = resid.view(len(tails), *pairs.shape, -1).mean((0, 2))  # (d,) each
    return positive - negative


def word_logits(net, E, prompts, words, batch=64):
    """Logits of `words` (2, n), by their rows of E, after each prompt (lists of ids), (P, 2, n), in numpy."""
    h = hooks.final_states(net, prompts, batch)  # (P, d)
    return (h @ E[words.flatten()].T).unflatten(-1, words.shape).double().cpu().numpy()


def pair_difference(logits):
    """Logits (P, 2, n) -> that of a positive word less its partner's, mean over prompts, (n,)."""
    return (logits[:, 0] - logits[:, 1]).mean(0)


def log_odds(logits):
    """Logits (..., 2, n) -> log-odds of any positive word against any negative one, nats, (...)."""
    positive, negative = np.moveaxis(np.logaddexp.reduce(logits, axis=-1), -1, 0)
    return positive - negative
