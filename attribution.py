"""
What each signal does to a prediction, in closed form: no forward pass, no approximation.

With h the normalised final state, A = h @ atoms.T the activations and W the codes, every logit is
z_v = sum_s A_s W_vs. To remove signal s at the output can mean two things. Both take A_s C_vs from a logit.

    term         take its term out of the sum over signals:           C = W
    direction    project its atom, of length 1, out of the state h:   C = E @ atoms.T = W @ atoms @ atoms.T

They are the same if the atoms are orthogonal. Otherwise terms overlap: they can be far larger than their sum,
and a large term may stand for little of the state. A claim should hold in both. With C of either kind,

    logit difference of t and f   changes by   -A_s (C_ts - C_fs)
    log p_t                       changes by   -A_s C_ts - K_s,   K_s = log E_p[exp(-A_s C_vs)]
    KL(p || p')                   is           K_s + A_s E_p[C_vs]
"""

from dataclasses import dataclass

import torch

import hooks

REMOVALS = ("term", "direction")  # what to remove a signal can mean


@dataclass
class Prediction:
    """A model's prediction at the end of N prompts."""

    h: torch.Tensor  # (N, d), normalised final states
    p: torch.Tensor  # (N, n_tokens)
    target: torch.Tensor  # (N,), ids; the likeliest token if not said otherwise
    foil: torch.Tensor  # (N,), ids; the second likeliest

    def __len__(self):
        return len(self.h)

    def __getitem__(self, index):
        """The Prediction of some prompts."""
        return Prediction(self.h[index], self.p[index], self.target[index], self.foil[index])


@torch.no_grad()
def predict(net, prompts, batch=64):
    """The Prediction of a model at the end of prompts, ids (N, T)."""
    h = torch.cat([net.encode(part)[:, -1] for part in prompts.split(batch)])
    p = hooks.unembed(net, h).softmax(-1)
    target, foil = p.topk(2).indices.T
    return Prediction(h, p, target, foil)


def mixed(W, dictionary, removal):
    """Rows W (..., S) of codes, or mixtures of such -> the same rows of C for a removal, (..., S)."""
    return W if removal == "term" else W @ dictionary.atoms @ dictionary.atoms.T


def columns(dictionary, signal, removal="term"):
    """Columns `signal`, ids (n,), of C for a removal, (n, n_tokens)."""
    if removal == "term":
        return dictionary.codes.T[signal]
    return (dictionary.atoms[signal] @ dictionary.atoms.T) @ dictionary.codes.T


def contributions(pred, dictionary):
    """What each signal's term adds to logit[target] - logit[foil], (N, S); the sum over signals is exact."""
    W = dictionary.codes
    return dictionary.activations(pred.h) * (W[pred.target] - W[pred.foil])


def first_order_change(pred, dictionary, removal="term"):
    """First-order change of log p[target] when each signal is removed, (N, S)."""
    W = dictionary.codes
    expected = pred.p.to(W) @ W  # (N, S), E_p[W_s]
    return -dictionary.activations(pred.h) * mixed(W[pred.target] - expected, dictionary, removal)


def exact_change(activation, column, p, target):
    """Exact (change of log p[target], KL(p || p')), nats, (N,) each, when one signal a row is removed.

    activation (N,) of that signal, column (N, n_tokens) of C, p (N, n_tokens), target (N,).
    The result has the dtype of p.
    """
    added = column.to(p) * -activation.to(p)[:, None]  # (N, n_tokens), to the logits
    added -= (p * added).sum(1, keepdim=True)  # centred first: a small KL is not lost to rounding
    at_target = added.gather(1, target[:, None])[:, 0]
    largest = added.amax(1)  # exp alone overflows for large signals
    log_normalizer = largest + (p * added.sub_(largest[:, None]).exp_()).sum(1).log()
    return at_target - log_normalizer, log_normalizer


def remove_signals(pred, dictionary, signal, removal="term", batch=64):
    """`exact_change` when prompt i loses signal[i], ids (N,): (change of log p[target] (N,), KL (N,))."""
    changes, divergences = [], []
    for i in torch.arange(len(pred), device=signal.device).split(batch):
        part = pred[i]
        activation = (part.h * dictionary.atoms[signal[i]]).sum(1)
        column = columns(dictionary, signal[i], removal)  # (batch, n_tokens)
        change, divergence = exact_change(activation, column, part.p, part.target)
        changes.append(change)
        divergences.append(divergence)
    return torch.cat(changes), torch.cat(divergences)
