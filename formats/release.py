"""
A release: a run of one checkpoint without its optimiser, in half precision if you like.

A release with a base leaves out the weights that it shares with another run, so that new recipes for a large
model take a few megabytes. checkpoint.py takes the others from that run.
"""

import json
import shutil

import torch
from safetensors.torch import save_file

import checkpoint
from configurator import UserError
from data.datasets import COUNTS, dataset_of, is_imported, token_counts
from data.tokenizer import kept
from files import file_sha256
from formats.cards import model_card, text_licence
from hardware import DTYPES

LOSSES = ("val_loss", "best_val_loss", "whole_val_loss", "bits_per_byte")
KEPT = ("step", "config", "data_sha256", "dtype", *LOSSES)  # of state.json
OWN = ("chat_template", "end_of_turn", "upcycled")  # what some models have there


def write_release(ckpt, to, dtype="fp32", base=None):
    """Write the Checkpoint `ckpt` to the folder `to`, its weights in `dtype`. Raises UserError.

    Weights that the Checkpoint `base` has, too, are left out.
    """
    net = ckpt.load_model(verified=True)
    shared = shared_weights(net, base) if base else set()
    weights = {
        name: compact(weight, DTYPES[dtype]).contiguous()
        for name, weight in net.state_dict().items()
        if name not in shared
    }
    with checkpoint.whole_folder(to) as folder:
        save_file(weights, folder / "model.safetensors")
        write_counts(ckpt, folder)
        state = {key: ckpt.state.get(key) for key in KEPT}
        state |= {key: ckpt.state[key] for key in OWN if key in ckpt.state}
        tokenizer = kept(ckpt.path, ckpt.state)
        state |= tokenizer.entry
        for name, content in tokenizer.files.items():
            (folder / name).write_bytes(content)
        state["text_licence"] = text_licence(ckpt)
        state["versions"] = checkpoint.versions()
        state |= checkpoint.fingerprints(folder)
        state["release"] = dtype
        if base:
            state["base"] = {
                "run": base.name,
                "imported_from": base.train_config.get("imported_from"),
                "sha256": file_sha256(base.weights),
            }
        (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(ckpt, net, to, "reflow", dtype, base), encoding="utf-8")


def shared_weights(net, base):
    """Names of the weights that a ReFlow has in common with the Checkpoint `base`. UserError if none."""
    theirs = base.load_model(verified=True).state_dict()
    found = {name for name, w in net.state_dict().items() if name in theirs and torch.equal(w, theirs[name])}
    if not found:
        raise UserError(f"--base={base.path}: it has no weight in common with this run")
    return found


def compact(weight, dtype):
    """A weight in `dtype`; integers, which are places of entries, in 16 bits if that suffices."""
    if weight.is_floating_point():
        return weight.to(dtype)
    return weight.short() if weight.numel() and weight.max() < 2**15 else weight


def write_counts(ckpt, folder):
    """Write how often each token was in training, (n_tokens,) int32: experiments leave out what was rare."""
    if (ckpt.path / COUNTS).exists():  # a release of a release
        shutil.copyfile(ckpt.path / COUNTS, folder / COUNTS)
        return
    if is_imported(ckpt.state):  # its training text is not known: counts of another one would pass for it
        return
    dataset = dataset_of(ckpt.state)
    if dataset is None:
        print("the data it was trained on is not here: no word counts in this release")
        return
    counts = token_counts(ckpt.state, dataset.folder).astype("int32")
    save_file({"counts": torch.from_numpy(counts)}, folder / COUNTS)
