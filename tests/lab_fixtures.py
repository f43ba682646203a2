"""A small corpus and small runs for the experiments' tests: real files, opened as a user's are."""

import numpy as np
import torch

from dictionary import Dictionary
from experiments.lab import Lab, LabConfig, plants
from experiments.lab.plants import averaging, corpus_of_pairs, save_run, silent, tiny, token, words

__all__ = ["averaging", "corpus_of_pairs", "save_run", "silent", "tiny", "token", "words"]


def corpus(folder, seed=0, repeats=12, n_words=None):
    """Write a dataset: every probe word `repeats` times in random order, in documents of 200 words."""
    rng = np.random.default_rng(seed)
    vocabulary = words(n_words)
    text = rng.permutation(np.repeat(vocabulary, repeats))
    documents = np.array_split(text, max(2, len(text) // 200))
    return plants.write_documents(folder, documents, "words in random order", {"seed": seed}, every=4)


def loud(net, factor=5):
    """The same net with larger weights in its blocks: an untrained one hardly changes its stream."""
    for parameter in net.blocks.parameters():
        parameter.data *= factor
    return net


def ids(*shape, seed=0, low=0, high=1000):
    """Random token ids of a shape."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def open_lab(run, baseline=None, seed=0):
    """The lab of a run on the CPU."""
    return Lab(LabConfig(run=str(run), baseline=baseline and str(baseline), seed=seed, device="cpu"))


def planted_pairs(pairs, sides=(), turn=False, aside=False):
    """Blocks that do nothing; the words of a pair share most of a sparse recipe; rows of length 1.

    `sides`: two lists of words that have +1 and -1 of signal 0. `turn`: the same E and the same function,
    with the signals rotated at random. `aside`: block 0 writes the context where no token reads it, so that
    little is needed to force a token.
    """
    n_embd = 32 if aside else 16
    model = silent(tiny(n_embd=n_embd, n_signal=16))
    generator = torch.Generator().manual_seed(1)
    codes = 0.02 * torch.randn(model.vocab.recipe.shape, generator=generator)
    for i, pair in enumerate(pairs):
        for word in pair:
            own = torch.randint(1, 16, (1,), generator=generator)
            codes[token(word), 1 + i % 15] += 1.0
            codes[token(word), own] += 0.5
    for side, sign in zip(sides, (1, -1), strict=False):
        codes[[token(word) for word in side], 0] = sign * 1.0
    used = sorted({token(word) for pair in pairs for word in pair})
    codes[used] /= codes[used].norm(dim=1, keepdim=True)  # of equal rows none outdoes another along itself
    frame = torch.linalg.qr(torch.randn(n_embd, n_embd, generator=generator)).Q
    basis, unread = frame[:16], frame[16:]
    if aside:
        averaging(model, 0, value=unread.T @ basis, gain=4.0)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q if turn else torch.eye(16)
    with torch.no_grad():
        model.vocab.recipe.copy_(codes @ rotation)
        model.vocab.basis.copy_(rotation.T @ basis)
    return model


def planted_recipes(seed, is_sparse, v=400, s=16):
    """A Dictionary: recipes of one strong signal each, or Gaussian ones, which are alike in any rotation."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(v, s, generator=generator)
    if is_sparse:
        codes = 0.05 * codes
        codes[torch.arange(v), torch.arange(v) % s] = 1.0
    return Dictionary("native", codes, torch.linalg.qr(torch.randn(s, s, generator=generator)).Q)
