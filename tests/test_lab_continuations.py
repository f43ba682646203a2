"""Continuations: fluency by hand, and samples that follow the seed."""

import pytest
import torch

import hooks
from data.tokenizer import gpt2
from experiments.lab import continuations
from tests.lab_fixtures import tiny


def test_fluency_of_known_text():
    net = tiny()
    prompts, texts = [[1, 2], [3, 4, 5]], [[6, 7, 6, 7], [8, 9]]
    found = continuations.fluency(net, prompts, texts, gpt2())
    losses = []
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.no_grad():
            log_p = hooks.log_probs(net, net.encode(torch.tensor([prompt + text])))[0]
        losses += [-log_p[len(prompt) - 1 + i, token] for i, token in enumerate(text)]
    assert found["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert found["distinct-2"] == pytest.approx(3 / 4)
    repeated = continuations.fluency(net, [[1]], [[6, 7] * 20], gpt2())
    assert repeated["zlib ratio"] < 0.5 and repeated["distinct-2"] == pytest.approx(2 / 39)


def test_samples_follow_the_seed():
    net, prompts = tiny(), [[1, 2], [3, 4, 5]]
    first = continuations.sample(net, prompts, 0)
    assert [len(text) for text in first] == [continuations.NEW_TOKENS] * 2
    assert first == continuations.sample(net, prompts, 0)
    assert first != continuations.sample(net, prompts, 1)
