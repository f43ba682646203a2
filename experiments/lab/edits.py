"""
Edits of rows of the embedding, and what they change: efficacy, locality, side effects.

The measures are those of ROME (Meng et al., 2202.05262). An edit of a token's recipe is an edit of its row of
E. At the input it changes what the blocks read where the token stands. At the output it changes where the
token is predicted.
"""

from dataclasses import dataclass

import numpy as np
import torch

import hooks
from dictionary import top_k
from experiments.lab import sentiment
from experiments.lab.claims import TooFew

SIDES = {"input": (True, False), "output": (False, True), "both": (True, True)}
N_TOKENS, N_CONTEXTS, LENGTH = 64, 2, 8  # exchanged tokens; contexts of each; tokens of a context
COMPARISONS = ("efficacy", "paraphrase", "log-odds, nats", "KL reduction, nats")  # of new and old token

# ----------------------------------------------------------------------------------------------------
# Editing


def edit(subject, rows, change, side="both"):
    """The subject's model with `change` (n, d) added to rows (n,) of E at a side."""
    E = subject.E.index_add(0, rows, change)
    E_in, E_out = (E if is_edited else subject.E for is_edited in SIDES[side])
    return hooks.with_embedding(subject.net, E_in, E_out)


def exchange(d, old, new, k=None):
    """What turns rows `old` (n,) of E into `new`, (n, d); k: the largest entries of each change alone."""
    change = d.codes[new] - d.codes[old]  # (n, S)
    return (change if k is None else top_k(change, k)) @ d.atoms


def random_like(d, change, generator):
    """For each row of change (n, d), a random direction in the span of the atoms, of its length, (n, d)."""
    codes = torch.randn(len(change), d.n_signals, generator=generator).to(change)
    random = codes @ d.atoms
    return random * (change.norm(dim=1) / random.norm(dim=1))[:, None]


# ----------------------------------------------------------------------------------------------------
# What edits are measured on


@dataclass
class Task:
    """Tokens to exchange, and texts in which an edit is measured."""

    old: torch.Tensor  # (n,), tokens
    new: torch.Tensor  # (n,), the token that each is exchanged for: its neighbour in `old`
    contexts: torch.Tensor  # (n, N_CONTEXTS, LENGTH + 1), held-out texts that end in `old`
    prompts: list  # templates, lists of ids
    words: torch.Tensor  # (2, m), pairs of held-out words of sentiment
    x: torch.Tensor  # (B, T), held-out text
    y: torch.Tensor  # (B, T), its next tokens

    @property
    def renamed(self):
        """The contexts with `new` in place of the last token."""
        last = self.new[:, None, None].expand(-1, N_CONTEXTS, 1)
        return torch.cat([self.contexts[..., :-1], last], 2)


def find_contexts(x, y, eligible, n_tokens, rng):
    """Tokens that end N_CONTEXTS contexts of LENGTH tokens in windows x, y (n, T), and the contexts.

    Returns ids (n,), an even number, and contexts (n, N_CONTEXTS, LENGTH + 1) whose last token is the id.
    """
    windows = torch.cat([x, y[:, -1:]], 1).unfold(1, LENGTH + 1, 1).flatten(0, 1)  # (N, LENGTH + 1)
    last = windows[:, -1].cpu().numpy()
    counts = np.bincount(last, minlength=int(eligible.max()) + 1)
    enough = eligible[counts[eligible] >= N_CONTEXTS]
    chosen = rng.permutation(enough)[:n_tokens]
    chosen = chosen[: len(chosen) // 2 * 2]
    where = [rng.permutation(np.flatnonzero(last == token))[:N_CONTEXTS] for token in chosen]
    return chosen, windows[np.array(where, int).reshape(len(chosen), -1)]


def find_task(lab, words, barred):
    """The Task of a run. Tokens `barred` (n,) are not exchanged: renaming words of sentiment would tilt."""
    eligible = lab.words.known_words(letters=1)
    free = eligible[~np.isin(eligible, barred)]
    if not len(free):
        raise TooFew("only 0 words of the training text are one token")
    tokens, contexts = find_contexts(*lab.heldout(2000, 4 * LENGTH), free, N_TOKENS, lab.rng("tokens"))
    if not len(tokens):
        raise TooFew(f"only 0 words: none of the training text is {N_CONTEXTS} times in the held-out text")
    old = torch.from_numpy(tokens).to(lab.device)
    new = old.view(-1, 2).flip(1).flatten()
    return Task(old, new, contexts, sentiment.templates(lab, "test"), words, *lab.heldout(12, 8))


# ----------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def next_log_probs(net, contexts):
    """Log-probabilities of the token after the first context of each token (n, C, T), (n, n_tokens)."""
    return hooks.log_probs(net, net.encode(contexts[:, 0])[:, -1])


@torch.no_grad()
def states_before(net, contexts):
    """Normalised final states before the last token of contexts (n, C, T), (n, C, d)."""
    h = torch.cat([net.encode(part)[:, -1] for part in contexts[..., :-1].flatten(0, 1).split(128)])
    return h.unflatten(0, contexts.shape[:2])


def token_log_odds(net, h, old, new):
    """Logit of `new` (n,) minus that of `old` at normalised final states h (n, C, d), (n, C)."""
    E = net.vocab.matrix()
    return (h * (E[new] - E[old])[:, None]).sum(-1).double().cpu().numpy()


def kl_reduction(target, before, after):
    """KL(target || before) - KL(target || after) of log-probabilities (n, n_tokens), nats, (n,)."""
    return (target.exp() * (after - before)).sum(-1)


def damage(before, after, y):
    """Loss added and KL(before || after), (B, T) each: log-probabilities (B, T, n_tokens), next tokens y."""
    added = (before - after).gather(-1, y[..., None])[..., 0]
    return added, hooks.kl(before, after)


@dataclass
class Reading:
    """What a model predicts in a Task."""

    log_odds: np.ndarray  # (n, N_CONTEXTS), new over old token where the old one is next
    log_p: torch.Tensor  # (n, N_CONTEXTS), of the old token there
    after: torch.Tensor  # (n, n_tokens), log-probabilities after the old token
    tilt: float  # log-odds of positive over negative words, nats, mean over the templates
    text: torch.Tensor  # (B, T, n_tokens), log-probabilities in held-out text


@torch.no_grad()
def read(net, task):
    """The Reading of a model."""
    h = states_before(net, task.contexts)
    rows = torch.arange(len(h))
    logits = sentiment.word_logits(net, net.vocab.matrix(), task.prompts, task.words)
    return Reading(
        log_odds=token_log_odds(net, h, task.old, task.new),
        log_p=hooks.log_probs(net, h)[rows, :, task.old],
        after=next_log_probs(net, task.contexts),
        tilt=sentiment.log_odds(logits).mean(),
        text=hooks.log_probs(net, net.encode(task.x)),
    )


def effects(before, after, target, task, rows):
    """{metric: value} of an edit of `rows` (n,), from the Readings before and after it.

    `target` (n, n_tokens): unedited log-probabilities after the new token.
    """
    half = N_CONTEXTS // 2
    found = {
        "efficacy": (after.log_odds[:, :half] > 0).mean(),
        "paraphrase": (after.log_odds[:, half:] > 0).mean(),
        "log-odds, nats": (after.log_odds - before.log_odds).mean(),
        "log p lost": (before.log_p - after.log_p).mean().item(),
        "KL reduction, nats": kl_reduction(target, before.after, after.after).mean().item(),
        "tilt, nats": after.tilt - before.tilt,
    }
    loss, kl = damage(before.text, after.text, task.y)
    touched = (torch.isin(task.x, rows) | torch.isin(task.y, rows)).any(1)  # (B,)
    for part, mask in (("with", touched), ("without", ~touched)):
        if mask.any():
            found[f"loss added, text {part}"] = loss[mask].mean().item()
            found[f"KL, text {part}"] = kl[mask].mean().item()
    return found
