"""
A release: a run of one checkpoint without its optimiser, in half precision if you like.
"""

import json
import shutil

import torch
from safetensors.torch import save_file

import checkpoint
from data.datasets import COUNTS, dataset_of, token_counts
from data.tokenizer import kept
from formats.cards import model_card, text_licence
from hardware import DTYPES

LOSSES = ("val_loss", "best_val_loss", "whole_val_loss", "bits_per_byte")
KEPT = ("step", "config", "data_sha256", "dtype", *LOSSES)  # of state.json


def write_release(ckpt, to, dtype="fp32"):
    """Write the Checkpoint `ckpt` to the folder `to`, its weights in `dtype`. Raises UserError."""
    net = ckpt.load_model(verified=True)
    weights = {}
    for name, weight in net.state_dict().items():
        whole = weight.to(DTYPES[dtype]) if weight.is_floating_point() else weight  # places are integers
        weights[name] = whole.contiguous()
    with checkpoint.whole_folder(to) as folder:
        save_file(weights, folder / "model.safetensors")
        write_counts(ckpt, folder)
        state = {key: ckpt.state.get(key) for key in KEPT}
        tokenizer = kept(ckpt.path, ckpt.state)
        state |= tokenizer.entry
        for name, content in tokenizer.files.items():
            (folder / name).write_bytes(content)
        state["text_licence"] = text_licence(ckpt)
        state["versions"] = checkpoint.versions()
        state |= checkpoint.fingerprints(folder)
        state["release"] = dtype
        (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(ckpt, net, to, "reflow", dtype), encoding="utf-8")


def write_counts(ckpt, folder):
    """Write how often each token was in training, (n_tokens,) int32: experiments leave out what was rare."""
    if (ckpt.path / COUNTS).exists():  # a release of a release
        shutil.copyfile(ckpt.path / COUNTS, folder / COUNTS)
        return
    dataset = dataset_of(ckpt.state)
    if dataset is None:
        print("the data it was trained on is not here: no word counts in this release")
        return
    counts = token_counts(ckpt.state, dataset.folder).astype("int32")
    save_file({"counts": torch.from_numpy(counts)}, folder / COUNTS)
