"""
Prepared data sets by name: where one is, whether it trained a run, a model's loss on it, its tokens' counts.
"""

import contextlib
import os
import sys

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
from configurator import UserError
from data.shards import Dataset, locate, read_name
from data.sotu.prepare import embedded, prepare
from data.tokenizer import gpt2, kept, load
from data.words import Words
from model import ModelConfig

COUNTS = "counts.safetensors"  # what a release says of its training text: counts (n_tokens,)
COUNTED = 50_000  # windows of training text, at most, in which tokens are counted


def find_dataset(name, tokenizer=None):
    """The folder that `--dataset=name` means, see `locate`.

    `sotu` is the embedded corpus in the tokens of `tokenizer`. It is prepared if it is missing, like
    sotu-gpt2-8192. Under torchrun every process must call it: the first one prepares, the others wait.
    """
    if name == "sotu":
        name = embedded(tokenizer or gpt2())
    tokenizer = tokenizer or load(read_name(name)[1])
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if name == embedded(tokenizer) and first and not (locate(name) / "meta.json").exists():
        prepare(tokenizer=tokenizer)
    if dist.is_initialized():
        dist.barrier()
    return locate(name)


def tokenizer_of(name):
    """The Tokenizer of the data set `name`, prepared or not."""
    folder = locate(name)
    if (folder / "meta.json").exists():
        return Dataset(folder, "val", 1).tokenizer
    return load(read_name(folder.name)[1])


def dataset_of(state):
    """The validation split of the data that a checkpoint's run was trained on; None if that is not here."""
    name = state["config"].get("train", {}).get("dataset", "sotu")
    with contextlib.suppress(UserError):
        dataset = Dataset(find_dataset(name), "val", block_size=1)
        if dataset.data_sha256 == state.get("data_sha256"):
            return dataset
    return None


def mean_loss(model, dataset, n_sequences, batch_size, device, autocast=None, rank=0, world=1):
    """Mean loss, nats per token, over the first `n_sequences` windows; all processes share the work."""
    autocast = autocast or contextlib.nullcontext()
    was_training = model.training
    model.eval()
    n = min(n_sequences, dataset.n_windows)
    total = torch.zeros(2, dtype=torch.float64)  # loss, windows
    with torch.no_grad(), autocast:
        for start in range(rank * batch_size, n + rank * batch_size, world * batch_size):
            x, y = dataset.windows(start, min(start + batch_size, n))
            weight = len(x)
            if not weight:  # FSDP needs every process in every forward pass
                x, y = dataset.windows(0, 1)
            loss = model(x.to(device), y.to(device))[1].item()
            total += torch.tensor([loss * weight, weight])
    if world > 1:
        total = total.to(device)
        dist.all_reduce(total)
    model.train(was_training)
    return (total[0] / total[1]).item()


def text_folder(path, state):
    """The folder of the text for a checkpoint in the folder `path`.

    It is its own data set, else the embedded corpus in the run's tokens. Raises UserError if its own data set
    holds those of another tokenizer.
    """
    name = state["config"].get("train", {}).get("dataset", "sotu")
    tokenizer = kept(path, state)
    if name != embedded(tokenizer):
        folder = find_dataset(name)
        if (folder / "meta.json").exists():
            Dataset(folder, "val", 1).check_tokenizer(tokenizer, path)
            return folder
        print(f"the run's dataset {name} is not here: text from data/sotu", file=sys.stderr)
    return find_dataset("sotu", tokenizer)


def is_imported(state):
    """Whether a run's `state` is that of an imported model as it came: its training text is not known."""
    return bool(state["config"].get("train", {}).get("imported_from")) and not state["step"]


def run_words(path, state):
    """The Words of a checkpoint in the folder `path`; a release brings the counts of its training along."""
    tokenizer = kept(path, state)
    if (path / COUNTS).exists():
        return Words(checkpoint.load_tensors(path / COUNTS)["counts"].numpy(), tokenizer)
    folder = text_folder(path, state)
    where = f"the text {folder.name}" if is_imported(state) else "training"
    return Words(token_counts(state, folder), tokenizer, where)


def token_counts(state, folder):
    """How often each token was in a run's training text, its first COUNTED windows, (n_tokens,) int64."""
    model = ModelConfig(**state["config"]["model"])
    train = state["config"].get("train", {})
    dataset = Dataset(folder, "train", model.block_size)
    seen = state["step"] * train.get("batch_size", 1) or dataset.n_windows
    seen = min(seen, dataset.n_windows, COUNTED)
    counts = np.zeros(model.n_tokens, np.int64)
    part = 1000
    for i in range(0, seen, part):
        _, y = dataset.batch(i // part, part, train.get("seed", 0))
        ids = y[: seen - i].flatten().numpy()
        counts += np.bincount(ids, minlength=len(counts))[: len(counts)]
    return counts
