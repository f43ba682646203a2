"""
Another embedding for a trained model: in what metric it has to be close, and what it costs in predictions.
"""

from dataclasses import dataclass

import torch
from tqdm import tqdm

from model import FixedVocab

PART = 256  # tokens whose logits are held at a time
SAMPLE = 16_384  # rows, at most, that atoms are fitted to


@torch.no_grad()
def read(net, windows, autocast):
    """Normalised final states of windows of ids (n, T), (n, T, d) in bf16."""
    found = []
    for part in tqdm(windows.split(8), "reading", disable=None):
        with autocast():
            found.append(net.encode(part.to(net.norm.weight.device)).to(torch.bfloat16).cpu())
    return torch.cat(found)


@torch.no_grad()
def statistics(states, E):
    """(H (d, d), the mean of h h'; p (V,), how often each token is predicted) from states (n, T, d)."""
    h = states.flatten(0, 1).float()
    H = h.T @ h / len(h)
    p = torch.zeros(len(E))
    some = h[:: max(1, len(h) // 16_384)]
    for part in some.split(PART):
        p += (part @ E.T).softmax(-1).sum(0)
    return H, p / len(some)


def root(M):
    """(M^(1/2), M^(-1/2)) of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(M.double())
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


@dataclass
class Rows:
    """The rows of E (V, d) as KL sees them: E = mean + rows @ back, close rows give close predictions."""

    rows: torch.Tensor  # (V, d)
    back: torch.Tensor  # (d, d)
    mean: torch.Tensor  # (d,)
    weights: torch.Tensor  # (V,): how much the error of a row counts

    def matrix(self, codes, atoms):
        """E (V, d) of codes (V, S) and atoms (S, d) of these rows."""
        return self.mean + codes @ (atoms @ self.back)


def rows_of(E, H, p):
    """The Rows of E (V, d), from the `statistics` of a model."""
    d = E.size(1)
    E = E.double()
    mean = p.double() @ E / p.double().sum()
    M = d * H.double() / (2 * H.diagonal().double().sum()) + torch.eye(d, dtype=torch.float64) / 2
    there, back = root(M)
    weights = (p + p.mean() / 100).sqrt()  # a token that is never predicted is one, too
    return Rows(((E - mean) @ there).float(), back.float(), mean.float(), weights)


@torch.no_grad()
def final_states(net, windows, autocast):
    """Normalised final states (n, T, d), fp32, of the inputs of windows of ids (n, T + 1), one by one."""
    found = []
    for ids in windows.to(net.norm.weight.device)[:, :-1].split(1):
        with autocast():
            found.append(net.encode(ids).float())
    return torch.cat(found)


@torch.no_grad()
def measure(net, h, E_new, windows, autocast):
    """{quantity: (n,), nats per token of each window} of the dense model with E_new (V, d) for its own E.

    KL to the model as it is, with the new one at both ends and at one of them. windows (n, T + 1): ids;
    h (n, T, d): their `final_states` in the model as it is.
    """
    n, E = net.config.n_tokens, net.vocab.matrix()
    total = {
        name: torch.zeros(len(windows), dtype=torch.float64)
        for name in ("loss", "KL", "KL, input alone", "KL, output alone")
    }
    for i, ids in enumerate(windows.to(E.device)):
        with autocast():
            h_new = net.encode(ids[None, :-1], vocab=FixedVocab(E_new))[0].float()  # (T, d)
        for part in torch.arange(len(h_new), device=E.device).split(PART):
            log_p = (h[i, part] @ E[:n].T).log_softmax(-1)
            p = log_p.exp()
            for name, state, head in (
                ("KL", h_new, E_new),
                ("KL, input alone", h_new, E),
                ("KL, output alone", h[i], E_new),
            ):
                log_q = (state[part] @ head[:n].T).log_softmax(-1)
                total[name][i] += (p * (log_p - log_q)).double().sum().item() / len(h_new)
                if name == "KL":
                    nll = -log_q.gather(1, ids[1:][part, None]).double()
                    total["loss"][i] += nll.sum().item() / len(h_new)
    return total


@torch.no_grad()
def explained(net, h, E_read):
    """Share of the variance of logits over tokens, in each context, that E_read (n_tokens, d) explains.

    h (n, T, d): `final_states` of the contexts.
    """
    E = net.vocab.matrix()[: net.config.n_tokens]
    missed = whole = 0.0
    for window in h:
        for part in window.split(PART):
            logits = part @ E.T
            rest = logits - part @ E_read.T
            missed += float(rest.var(1).sum())
            whole += float(logits.var(1).sum())
    return 1 - missed / whole
