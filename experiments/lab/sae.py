"""
A sparse autoencoder, the usual way to find a dictionary of vectors after the fact.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from dictionary import top_k

DEAD = 200  # steps without a code from which a latent is dead
N_AUXILIARY = 256  # dead latents, at most, that the auxiliary loss trains


class SAE(nn.Module):
    """TopK autoencoder (Gao et al., 2406.04093): x is close to bias + codes @ atoms, with k codes above zero.

    atoms (S, d) have length 1. codes(x) = the k largest of relu((x - bias) @ encoder + threshold).
    """

    def __init__(self, rows, n_atoms, k):
        super().__init__()
        self.k = k
        atoms = F.normalize(torch.randn(n_atoms, rows.size(1)), dim=1)
        self.atoms = nn.Parameter(atoms)
        self.encoder = nn.Parameter(atoms.T.clone())  # tied at the start: few latents die
        self.threshold = nn.Parameter(torch.zeros(n_atoms))
        self.bias = nn.Parameter(rows.mean(0).clone())

    def before_top_k(self, x):
        """(n, S) of x (n, d)."""
        return F.relu((x - self.bias) @ self.encoder + self.threshold)

    def codes(self, x):
        """(n, S) of x (n, d)."""
        return top_k(self.before_top_k(x), self.k)

    def forward(self, x):
        return self.codes(x) @ self.atoms + self.bias


def train(rows, weights, n_atoms, k, steps=2000, batch=1024, lr=1e-3, seed=0):
    """An SAE of rows (V, d), each drawn as often as weights (V,) say. Errors are relative to their variance.

    Latents without a code for DEAD steps learn from what the others miss (the auxiliary loss of the paper, a
    32nd of the whole). The learning rate falls to zero over the last fifth of the steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scale = (rows - rows.mean(0)).square().sum(1).mean().sqrt()
        rows = rows / scale
        sae = SAE(rows, n_atoms, k)
        adam = torch.optim.Adam(sae.parameters(), lr=lr, betas=(0.9, 0.999))
        idle = torch.zeros(n_atoms, dtype=torch.long)  # steps since a latent had a code
        for step in tqdm(range(steps), "autoencoder", disable=None, leave=False):
            adam.param_groups[0]["lr"] = lr * min(1.0, 5 * (steps - step) / steps)
            x = rows[torch.multinomial(weights, batch, replacement=True)]  # (n, d)
            before = sae.before_top_k(x)
            codes = top_k(before, k)
            missed = x - codes @ sae.atoms - sae.bias
            loss = missed.square().sum(1).mean()
            dead = idle > DEAD
            if dead.any():
                spare = top_k(before * dead, min(N_AUXILIARY, int(dead.sum())))
                loss = loss + (missed.detach() - spare @ sae.atoms).square().sum(1).mean() / 32
            loss.backward()
            adam.step()
            adam.zero_grad(set_to_none=True)
            with torch.no_grad():
                sae.atoms.copy_(F.normalize(sae.atoms, dim=1))
            idle = torch.where((codes > 0).any(0), 0, idle + 1)
        with torch.no_grad():
            sae.bias.mul_(scale)
            sae.threshold.mul_(scale)
    return sae.eval()
