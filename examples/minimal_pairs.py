"""
Minimal pairs with our own code: how often a run finds the grammatical sentence of a pair likelier.

    python examples/minimal_pairs.py --run=out/reflow-nano

lm-evaluation-harness gives the same number for an exported run (pip install -r requirements-interop.txt):

    python export.py --run=out/reflow-nano --to=out/hf-nano
    HF_HUB_OFFLINE=1 lm_eval run --model hf --model_args pretrained=out/hf-nano,dtype=float32 --device cpu \
        --tasks minimal_pairs --include_path examples/lm_eval --batch_size 16
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import json
import math
from dataclasses import dataclass

import threads
import torch

import checkpoint
import configurator
from data.tokenizer import kept

PAIRS = Path(__file__).parent / "lm_eval/minimal_pairs.jsonl"


@dataclass
class PairsConfig:
    run: str | None = None  # a run's folder or one of its step_... folders; None: the newest with signals


@torch.no_grad()
def log_likelihood(model, tokenizer, text):
    """log p(text) in nats, as the beginning of a document."""
    tokens = torch.tensor([tokenizer.end_of_text, *tokenizer.encode_ordinary(text)])
    logits, _ = model(tokens[None, :-1])  # (1, T, V)
    return logits[0].log_softmax(-1).gather(1, tokens[1:, None]).sum().item()


def score(model, tokenizer):
    """[(log p(good), log p(bad)) of every pair]."""
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    return [tuple(log_likelihood(model, tokenizer, pair[side]) for side in ("good", "bad")) for pair in pairs]


def main():
    (c,) = configurator.parse(PairsConfig)
    step = checkpoint.find(c.run)
    model, state = checkpoint.load_model(step)
    right = [good > bad for good, bad in score(model, kept(step, state))]
    accuracy = sum(right) / len(right)
    error = math.sqrt(accuracy * (1 - accuracy) / (len(right) - 1))  # as lm-eval has it
    print(f"{sum(right)} of {len(right)} pairs: accuracy {accuracy:.4f}, standard error {error:.4f}")


if __name__ == "__main__":
    configurator.run(main)
