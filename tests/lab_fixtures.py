"""A small corpus and small runs for the experiments' tests: real files, opened as a user's are."""

import re
from dataclasses import asdict

import numpy as np
import torch

import checkpoint
from data.shards import Writer
from data.tokenizer import END_OF_TEXT, encode, encoding
from experiments import lab
from model import ModelConfig, ReFlow


def words(n=None):
    """The first n words of the probe lists (None: all), every one a single token."""
    probes = [lab.Lab.probe(None, name) for name in ("categories", "analogies", "sentiment")]
    found = dict.fromkeys(re.findall(r"[A-Za-z]+", str([w["words"] for w in probes[0].values()])))
    found |= dict.fromkeys(w for r in probes[1].values() for pair in r["pairs"] for w in pair)
    return list(found)[:n]


def corpus(folder, seed=0, repeats=12, n_words=None):
    """Write a dataset: every probe word `repeats` times in random order, in documents of 200 words."""
    rng = np.random.default_rng(seed)
    vocabulary = words(n_words)
    text = rng.permutation(np.repeat(vocabulary, repeats))
    writer = Writer(folder, source="words in random order", licence="none", recipe={"seed": seed})
    for i, part in enumerate(np.array_split(text, max(2, len(text) // 200))):
        split = "val" if i % 4 == 1 else "train"
        if writer.wants(split, i):
            line = "".join(f" {w}" for w in part)
            writer.add(split, i, np.append(encode(line), END_OF_TEXT).astype("uint16"), len(line))
    writer.finish()
    return folder


def save_run(folder, model, data, step=1, val_loss=9.0, start=999):
    """Save a model as the run `folder`, after another start as its step 0, unless it is that itself."""
    train = {"dataset": str(data), "seed": 0, "batch_size": 0}
    state = {
        "config": {"model": asdict(model.config), "train": train},
        "val_loss": val_loss,
        "whole_val_loss": val_loss,
        "bits_per_byte": 2.0,
        "data_sha256": "0",
    }
    if step:
        torch.manual_seed(start)
        untrained = ReFlow(model.config)
        checkpoint.save(folder, 0, dict(untrained.state_dict()), {}, state, keep=1, best=False)
    checkpoint.save(folder, step, dict(model.state_dict()), {}, state, keep=1, best=True)
    return folder


def tiny(seed=0, **changes):
    """An untrained model over GPT-2's vocabulary: 16 signals, width 16, 2 layers."""
    torch.manual_seed(seed)
    shape = {"block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_hidden": 32}
    return ReFlow(ModelConfig(**shape | {"recipe_init_std": 0.1} | changes))


def open_lab(run, baseline=None, seed=0):
    """The lab of a run on the CPU."""
    return lab.Lab(lab.LabConfig(run=str(run), baseline=baseline and str(baseline), seed=seed, device="cpu"))


def token(word):
    """The id of " word"."""
    (found,) = encoding().encode_ordinary(" " + word)
    return found
