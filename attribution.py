"""
What each signal does to a prediction, in closed form: no forward pass, no approximation.

With h the normalised final state, A = h @ atoms.T the activations and W the codes, every logit is
z_v = sum_s A_s W_vs. Removing signal s at the output subtracts A_s W_vs from every logit, so that

    logit difference of t and f   changes by   -A_s (W_ts - W_fs)
    log p_t                       changes by   -A_s W_ts - K_s,   K_s = log E_p[exp(-A_s W_vs)]
    KL(p || p')                   is           K_s + A_s E_p[W_vs]
"""

from dataclasses import dataclass

import torch

import hooks


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


def contributions(pred, dictionary):
    """What each signal adds to logit[target] - logit[foil], (N, S); the sum over signals is exact."""
    W = dictionary.codes
    return dictionary.activations(pred.h) * (W[pred.target] - W[pred.foil])


def first_order_change(pred, dictionary):
    """First-order change of log p[target] when each signal is removed, (N, S)."""
    W = dictionary.codes
    expected = pred.p.to(W) @ W  # (N, S), E_p[W_s]
    return -dictionary.activations(pred.h) * (W[pred.target] - expected)


def exact_change(activation, column, p, target):
    """Exact (change of log p[target], KL(p || p')), nats, (N,) each, when one signal a row is removed.

    activation (N,) of that signal, column (N, n_tokens) its codes, p (N, n_tokens), target (N,).
    The result has the dtype of p.
    """
    activation = activation.to(p)[:, None]
    column = column.to(p)
    column = column - (p * column).sum(1, keepdim=True)  # centred first: a small KL is not lost to rounding
    log_normalizer = torch.logsumexp(
        p.log() - activation * column, 1
    )  # exp alone overflows for large signals
    change = (-activation * column.gather(1, target[:, None]))[:, 0] - log_normalizer
    return change, log_normalizer


def remove_signals(pred, dictionary, signal, batch=64):
    """`exact_change` when prompt i loses signal[i], ids (N,): (change of log p[target] (N,), KL (N,))."""
    changes, divergences = [], []
    for i in torch.arange(len(pred), device=signal.device).split(batch):
        part = pred[i]
        activation = (part.h * dictionary.atoms[signal[i]]).sum(1)
        change, divergence = exact_change(activation, dictionary.codes[:, signal[i]].T, part.p, part.target)
        changes.append(change)
        divergences.append(divergence)
    return torch.cat(changes), torch.cat(divergences)
