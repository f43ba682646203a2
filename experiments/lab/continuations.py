"""
Sampled continuations of prompts, and how fluent they are.
"""

import zlib

import torch

import hooks

NEW_TOKENS = 12  # of a continuation


def sample(net, prompts, seed):
    """A sampled continuation of each prompt, lists of ids; the same seed draws the same random numbers."""
    generator = torch.Generator(net.norm.weight.device).manual_seed(seed)
    return net.generate(prompts, NEW_TOKENS, generator=generator)


def fluency(net, prompts, texts, tokenizer):
    """Continuations `texts` of prompts (ids of a Tokenizer), judged by the model `net`: {measure: value}.

    loss: mean cross-entropy of their tokens, nats. zlib ratio: compressed over plain size in bytes.
    distinct-2: share of distinct bigrams (Li et al., 1510.03055). Repetitive text is low in all three.
    """
    rows = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    idx = hooks.padded(rows, net.norm.weight.device)
    at = torch.arange(1, idx.size(1), device=idx.device)
    first = torch.tensor([len(prompt) for prompt in prompts], device=idx.device)
    end = torch.tensor([len(row) for row in rows], device=idx.device)
    is_new = (at >= first[:, None]) & (at < end[:, None])  # (B, T - 1)
    losses = hooks.token_losses(net, idx[:, :-1], idx[:, 1:])[is_new]
    text = "\n".join(tokenizer.decode(text) for text in texts).encode()
    bigrams = [pair for text in texts for pair in zip(text, text[1:], strict=False)]
    return {
        "loss": losses.double().mean().item(),
        "zlib ratio": len(zlib.compress(text, 9)) / max(len(text), 1),
        "distinct-2": len(set(bigrams)) / max(len(bigrams), 1),
    }


def as_text(ids, tokenizer):
    """Ids of a Tokenizer as text on one line."""
    return repr(tokenizer.decode(ids))[1:-1]
