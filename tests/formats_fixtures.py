"""Models, runs and folders for the tests of formats/, export.py and examples/."""

import functools
import os
import sys
from dataclasses import asdict

os.environ["HF_HUB_OFFLINE"] = "1"  # before any of these libraries is imported

import pytest
import torch

import checkpoint
import export
from data.shards import Writer
from data.tokenizer import END_OF_TEXT, gpt2
from formats.llama import BLOCK, to_halves
from model import ModelConfig, ReFlow

SHAPE = {"block_size": 256, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_hidden": 48}
KINDS = {
    "factored": {"n_signal": 24},
    "wide": {"n_signal": 40, "rope_base": 500.0, "norm_eps": 1e-4},
    "topk": {"vocab": "topk", "n_signal": 24, "top_k": 5},
    "sparse": {"vocab": "sparse", "n_signal": 40, "n_nonzero": 4, "n_core": 3},
    "gains": {"vocab": "gains", "n_signal": 24},
    "dense": {"vocab": "dense"},
    "gqa": {"n_kv_head": 2, "block_size": 1024},
}


def random_model(kind, seed=0, **more):
    """A model whose every weight matters: norms that are not 1, attention neither flat nor sharp."""
    torch.manual_seed(seed)
    model = ReFlow(ModelConfig(**SHAPE | KINDS[kind] | more))
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(0.5, 1.5) if p.dim() == 1 else p.normal_(std=p.size(1) ** -0.5)
        for block in model.blocks:
            block.attn.q.weight *= 0.5
    return model.eval()


def save(model, run, **train_settings):
    """`model` as step 0 of a run; the run."""
    state = {"config": {"model": asdict(model.config), "train": {"dataset": "sotu"} | train_settings}}
    state |= {"val_loss": 5.0, "whole_val_loss": None, "best_val_loss": 5.0, "bits_per_byte": 1.5}
    weights = {name: w.contiguous() for name, w in model.state_dict().items()}
    checkpoint.save(run, 0, weights, {}, state, keep=1, best=True)
    return run


def go(*arguments, main=export.main):
    """`python export.py arguments` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        main()


def logits(model, idx):
    with torch.no_grad():
        out = model(idx)
    return out[0] if isinstance(model, ReFlow) else out.logits.float()


def ids(model, batch=2):
    """Real tokens, as long as the context."""
    high = min(model.config.rows, END_OF_TEXT)
    return torch.randint(high, (batch, model.config.block_size), generator=torch.Generator().manual_seed(1))


def export_folder(home):
    """The Hugging Face folder home/hf of a random factored model, the run home/run."""
    run = save(random_model("factored"), home / "run", max_steps=7)
    go(f"--run={run}", f"--to={home / 'hf'}")
    return home / "hf"


def write_corpus(path, tokenizer=None):
    """A small prepared data set of real tokens."""
    tokenizer = tokenizer or gpt2()
    writer = Writer(path, "words", "none", {}, shard_tokens=4096, tokenizer=tokenizer)
    for split in ("train", "val"):
        writer.add(split, 0, tokenizer.encode("The people of the United States " * 400), 12_800)
    writer.finish()
    return path


# A language that needs every part of a model: a token is a permutation of the one three before it (so
# attention, and its positions), with some noise.
PERMUTATION = torch.randperm(64, generator=torch.Generator().manual_seed(3))


def language(rows, length, seed):
    """(rows, length + 1) ids below 64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(64, (rows, length + 1), generator=generator)
    noise = torch.rand(rows, length + 1, generator=generator) < 0.1
    for t in range(3, length + 1):
        x[:, t] = torch.where(noise[:, t], x[:, t], PERMUTATION[x[:, t - 3]])
    return x


def loss(config, weights):
    x = language(32, 32, seed=10_000)  # of the length trained on: beyond it a wrong reading may do better
    with torch.no_grad():
        return checkpoint.build_model(config, weights)(x[:, :-1], x[:, 1:])[1].item()


TRAINED = {
    "factored": {},  # its basis is square
    "topk": {"vocab": "topk", "top_k": 12, "n_layer": 1},
    "dense": {"vocab": "dense", "n_layer": 1},
    "gqa": {"n_kv_head": 1, "n_layer": 1},
}


@functools.cache
def trained_model(kind):
    """A model that has learned the language; one for all tests, which leave it as it is."""
    torch.manual_seed(0)
    shape = {"block_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 64, "n_hidden": 96, "vocab_size": 128}
    model = ReFlow(ModelConfig(**shape | TRAINED[kind]))
    for block in model.blocks:  # so that the two cannot be mistaken for each other
        torch.nn.init.uniform_(block.norm1.weight, 0.5, 2.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, fused=True)
    for step in range(160):
        x = language(8, 32, seed=step)
        model(x[:, :-1], x[:, 1:])[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 160)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert loss(model.config, model.state_dict()) < 2.8, kind  # without attention it would be log 64 = 4.16
    return model


def reference(
    model, attn="fused", mlp=("w1", "w2", "w3"), norms=("ln_1", "ln_2"), halves=False, basis="S x d"
):
    """A checkpoint of the reference system that computes what `model` does, with names and conventions of
    one's choice; `mlp` names gate, down and up."""
    c, ours, out = model.config, model.state_dict(), {}
    if c.vocab == "dense":
        out["wte.weight"] = ours["vocab.weight"]
    else:
        out["wte.vocab_to_signals.weight"] = ours["vocab.recipe"]
        transposed = basis == "d x S"
        out["wte.signal_basis"] = ours["vocab.basis"].T if transposed else ours["vocab.basis"]
    for i in range(c.n_layer):
        w = {role: ours[f"blocks.{i}.{role}.weight"] for role in BLOCK}
        if halves:
            w |= {role: to_halves(w[role], c.head_dim) for role in ("attn.q", "attn.k")}
        q, k, v, o = (w[f"attn.{x}"] for x in "qkvo")
        heads = {"c_attn": torch.cat([q, k, v]), "c_proj": o}
        if attn != "fused":
            heads = dict(zip(attn, (q, k, v, o), strict=True))
        block = {f"attn.{name}": weight for name, weight in heads.items()}
        block |= zip([f"mlp.{n}" for n in mlp], (w["mlp.gate"], w["mlp.down"], w["mlp.up"]), strict=True)
        block |= zip(norms, (w["norm1"], w["norm2"]), strict=True)
        out |= {f"h.{i}.{name}.weight": weight for name, weight in block.items()}
    out["ln_f.weight"] = ours["norm.weight"]
    return {f"transformer.{name}": weight.clone() for name, weight in out.items()}
