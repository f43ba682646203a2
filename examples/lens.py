"""
An exported run in TransformerLens 4: checked against our own model, then read layer by layer.

    pip install -r requirements-interop.txt
    python export.py --run=out/reflow-nano --to=out/hf-nano
    python examples/lens.py --export=out/hf-nano --run=out/reflow-nano --prompt="The United States of"

Our module names and the hooks that see the same values are in HOOKS. Two things differ, both from the order
in which Llama rotates a head: hook_q and hook_k hold our values permuted within each head (to_halves of
formats/llama.py; attention scores and everything else are the same). Do not call enable_compatibility_mode()
with its weight processing before comparing: it centres the logits.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import os
from dataclasses import dataclass

import threads
import torch

import checkpoint
import configurator
from configurator import UserError
from data.tokenizer import kept

# The output of one of our modules -> the hook of a TransformerLens 4 bridge. Heads lie side by side in ours.
HOOKS = {
    "blocks.{i}": "blocks.{i}.hook_resid_post",
    "blocks.{i}.norm1": "blocks.{i}.ln1.hook_out",
    "blocks.{i}.norm2": "blocks.{i}.ln2.hook_out",
    "blocks.{i}.attn": "blocks.{i}.hook_attn_out",
    "blocks.{i}.attn.q": "blocks.{i}.attn.hook_q",  # permuted
    "blocks.{i}.attn.k": "blocks.{i}.attn.hook_k",  # permuted
    "blocks.{i}.attn.v": "blocks.{i}.attn.hook_v",
    "blocks.{i}.mlp": "blocks.{i}.hook_mlp_out",
    "blocks.{i}.mlp.gate": "blocks.{i}.mlp.hook_pre",
    "blocks.{i}.mlp.up": "blocks.{i}.mlp.hook_pre_linear",
    "norm": "ln_final.hook_out",
}


@dataclass
class LensConfig:
    export: str = "out/hf-nano"  # a folder that export.py wrote
    run: str | None = None  # the run it was made of; None: the newest with signals
    prompt: str = "The United States of"  # what to read


def open_bridge(folder):
    """The TransformerBridge of an exported folder, on the CPU, without network. UserError."""
    if not (Path(folder) / "config.json").exists():
        raise UserError(f"no export {folder}: make one with: python export.py --to={folder}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        raise UserError("TransformerLens 4 is missing: pip install -r requirements-interop.txt") from None
    return TransformerBridge.boot_transformers(str(folder), device="cpu")


@torch.no_grad()
def main():
    (c,) = configurator.parse(LensConfig)
    bridge = open_bridge(c.export)
    step = checkpoint.find(c.run)
    model, state = checkpoint.load_model(step)
    tokenizer = kept(step, state)
    idx = torch.tensor([tokenizer.encode_ordinary(c.prompt)])  # (1, T)
    logits, cache = bridge.run_with_cache(idx)
    print(f"largest difference of a logit to our model: {(logits - model(idx)[0]).abs().max():.1e}")
    for i in range(model.config.n_layer):  # the logit lens
        h = model.norm(cache[f"blocks.{i}.hook_resid_post"][0, -1])  # (d,)
        best = model.vocab.logits(h)[: model.config.n_tokens].topk(5).indices.tolist()
        print(f"after block {i}: {[tokenizer.token_shown(token) for token in best]}")


if __name__ == "__main__":
    configurator.run(main)
