"""
Activation patching (interchange) of minimal pairs of prompts, Zhang & Nanda, 2309.16042.

The clean stream replaces the corrupted one at one layer and place. Recovery is (patched - corrupted) /
(clean - corrupted) of the logit difference between two words. `layer` is the block that a stream enters.
"""

from dataclasses import dataclass

import numpy as np
import torch

import hooks
from experiments.lab.claims import LEAST_UNITS, TooFew, to_numpy
from experiments.lab.results import Estimate

PLACES = ("changed", "between", "last")


def minimal_pairs(pairs, tokenizer):
    """Those of `pairs` that are minimal in the tokens of a Tokenizer, a list. Raises TooFew.

    Both prompts have as many tokens and the same last one; each answer is one token.
    """
    found = []
    for pair in pairs:
        clean, corrupted = (tokenizer.encode(pair[side]) for side in ("clean", "corrupted"))
        words = [tokenizer.encode(" " + pair[side]) for side in ("correct", "other")]
        same = len(clean) == len(corrupted) and clean[-1] == corrupted[-1]
        if same and all(len(word) == 1 for word in words):
            found.append(pair)
    if len(found) < LEAST_UNITS:
        raise TooFew(f"only {len(found)} of {len(pairs)} pairs of agreement.json are minimal in its tokens")
    return found


class Pairs:
    """Minimal pairs in the tokens of a Tokenizer.

    Prompts clean, corrupted (B, T), padded on the right; words correct, other (B,).

    `contexts` are texts to come before the prompts, which keep their last `block_size` tokens.
    """

    def __init__(self, pairs, tokenizer, block_size, device, contexts=None):
        def prompts(side):
            heads = [contexts[pair["context"]] + " " if contexts else "" for pair in pairs]
            texts = [head + pair[side] for head, pair in zip(heads, pairs, strict=True)]
            return [tokenizer.encode_ordinary(text)[-block_size:] for text in texts]

        def words(side):
            ids = [tokenizer.encode_ordinary(" " + pair[side])[0] for pair in pairs]
            return torch.tensor(ids, dtype=torch.long, device=device)

        clean = prompts("clean")
        self.lengths = [len(prompt) for prompt in clean]  # those of the corrupted prompts as well
        self.last = torch.tensor(self.lengths, device=device) - 1  # (B,)
        self.clean = hooks.padded(clean, device)
        self.corrupted = hooks.padded(prompts("corrupted"), device)
        self.correct = words("correct")
        self.other = words("other")

    def places(self):
        """Masks (B, T) of PLACES: the tokens that differ; those after the first of them; the last token."""
        at = torch.arange(self.clean.size(1), device=self.clean.device)
        changed = self.clean != self.corrupted
        between = (changed.cumsum(1) > 0) & ~changed & (at < self.last[:, None])
        return [changed, between, at == self.last[:, None]]


def logit_difference(subject, resid, plus, minus):
    """logit[plus] - logit[minus] of final streams resid (B, d), ids plus and minus (B,) -> (B,)."""
    return (subject.net.norm(resid) * (subject.E[plus] - subject.E[minus])).sum(-1)


@torch.no_grad()
def patch_last(subject, pairs):
    """Patch the last token: patched - corrupted (B, n_layer + 1), and clean - corrupted (B,)."""

    def outcome(resid):
        return logit_difference(subject, resid, pairs.correct, pairs.other)

    clean = hooks.LastToken(subject.net, pairs.clean, pairs.lengths)
    corrupted = hooks.LastToken(subject.net, pairs.corrupted, pairs.lengths)
    streams = clean.streams(clean.embed())  # (n_layer + 1, B, d)
    base = outcome(corrupted.streams(corrupted.embed())[-1])
    patched = [outcome(corrupted.streams(resid, layer)[-1]) for layer, resid in enumerate(streams)]
    return torch.stack(patched, 1) - base[:, None], outcome(streams[-1]) - base


@torch.no_grad()
def patch_places(subject, pairs, masks, layers):
    """Patch the places of each mask (B, T): patched - corrupted, (len(masks), len(layers), B)."""
    net = subject.net
    clean = hooks.resid_streams(net, net.vocab.embed(pairs.clean))
    corrupted = hooks.resid_streams(net, net.vocab.embed(pairs.corrupted))
    rows = torch.arange(len(pairs.clean))

    def outcome(resid):
        return logit_difference(subject, resid[rows, pairs.last], pairs.correct, pairs.other)

    def patched(mask, layer):
        resid = torch.where(mask[..., None], clean[layer], corrupted[layer])  # (B, T, d)
        return outcome(hooks.resid_streams(net, resid, layer)[-1]) - outcome(corrupted[-1])

    return torch.stack([torch.stack([patched(mask, layer) for layer in layers]) for mask in masks])


def mean_recovery(change, whole, weights=None):
    """Mean of change (B, L) over that of whole (B,), (L,). With weights (R, B) of the pairs: (R, L).

    Each pair counts with the sign of its `whole`, so that the mean is defined even where a model prefers the
    wrong word.
    """
    weights = np.ones(len(whole)) if weights is None else weights
    aligned = change * np.sign(whole)[:, None]
    return (weights @ aligned) / (weights @ np.abs(whole))[..., None]


def crossing(curves, layers):
    """Where curves (..., L) over layers (L,) rise above one half for good, interpolated, (...)."""
    curves = np.asarray(curves, float)
    layers = np.asarray(layers, float)
    below = curves[..., :-1] < 0.5  # the last value is 1
    i = below.shape[-1] - 1 - below[..., ::-1].argmax(-1)  # the last layer below
    a, b = (np.take_along_axis(curves, j[..., None], -1)[..., 0] for j in (i, i + 1))
    share = np.divide(0.5 - a, b - a, out=np.zeros_like(a), where=b > a).clip(0, 1)
    return np.where(below.any(-1), layers[i] + share * (layers[i + 1] - layers[i]), layers[0])


@dataclass
class Recovery:
    """Recovery by layer when the last token of minimal pairs is patched in one model."""

    whole: np.ndarray  # clean - corrupted, (B,)
    points: np.ndarray  # crossing of each pair, (B,)
    curve: np.ndarray  # mean recovery, (n_layer + 1,)
    band: np.ndarray  # its 95 % interval over pairs, (2, n_layer + 1)
    crossing: Estimate  # of the curve


def recover(subject, pairs, rng, resamples=2000):
    """The Recovery of a model; `rng` resamples the pairs."""
    change, whole = map(to_numpy, patch_last(subject, pairs))  # (B, L), (B,)
    layers = np.arange(change.shape[1])
    n = len(whole)
    each = np.divide(change, whole[:, None], out=np.zeros_like(change), where=whole[:, None] != 0)
    curve = mean_recovery(change, whole)
    resampled = mean_recovery(change, whole, rng.multinomial(n, np.full(n, 1 / n), size=resamples))
    band = np.percentile(resampled, [2.5, 97.5], axis=0)
    low, high = np.percentile(crossing(resampled, layers), [2.5, 97.5])
    crossed = Estimate(float(crossing(curve, layers)), float(low), float(high))
    return Recovery(whole, crossing(each, layers), curve, band, crossed)
