"""
Null models: what a model shows though no text has taught it. An effect has to beat every one of them.

    step 0          the run before training: what its architecture and its start show
    noise           step 0 plus Gaussian noise as long as what training added: what any change shows
    shuffled text   step 0 trained on the run's own tokens in random order: what frequencies of tokens show
    frequencies     in place of the last one: noise, and rows of tokens of the frequencies that the run's have

The noise is as long as the trained difference row by row in the vocabulary, and matrix by matrix elsewhere.

The shuffled text has every token as often as the run has read it, in random order. The null model is trained
on it by train.py, with the run's start, settings, seed and number of steps. It is kept beside the run, in
nulls/, or in the user's cache where that cannot be written, and it is a run like any other. A run that needs
more than BUDGET operations gets fewer steps, on a schedule as much shorter; the result says so.

There is no such null model of a model whose training is unknown, or that is too large for LEAST_STEPS. If it
is imported or too large, the model of frequencies takes its place: the rows of its vocabulary are a
least-squares fit of the run's own rows on 1, log count and its square, plus noise as long as what the fit
leaves. All else is the noise model. It knows what all rows share and what frequency tells of them, and
nothing else. It is untrained, and therefore the weaker control.
"""

import copy
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import checkpoint
import files
from checkpoint import Checkpoint
from configurator import UserError
from data.datasets import is_imported
from data.shards import Writer, user_cache
from data.tokenizer import kept
from experiments.lab.stats import exchanged, regress_out
from hardware import flops_per_token
from model import ModelConfig, SparseVocab

NAMES = ("step 0", "noise", "shuffled text", "frequencies")
TRAIN = Path(__file__).resolve().parents[2] / "train.py"
BUDGET = 2e13  # floating-point operations of training: 3 minutes on two cores with bf16 instructions
LEAST_STEPS = 100  # of a training that BUDGET cuts short
VAL_WINDOWS = 16  # of shuffled text, for the loss
KEPT = (
    "batch_size",
    "micro_batch_size",
    "optimizer",
    "lr",
    "min_lr",
    "weight_decay",
    "beta1",
    "beta2",
    "grad_clip",
    "seed",
)


def add_noise(start, trained, generator):
    """A copy of the ReFlow `start` plus Gaussian noise as long as `trained` less `start`.

    Each row of the vocabulary's matrices has its own length, any other weight one.
    """
    net = copy.deepcopy(start)
    goal = dict(trained.named_parameters())
    with torch.no_grad():
        for name, weight in net.named_parameters():
            is_matrix = name.startswith("vocab.") and weight.dim() == 2
            by_row = {"dim": 1, "keepdim": True} if is_matrix else {}
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            length = (goal[name] - weight).norm(**by_row)
            weight += noise * (length / noise.norm(**by_row))
    return net


def has_substitute(ckpt):
    """Whether the model of frequencies may stand for shuffled text: beside imported and too large models."""
    return is_imported(ckpt.state) or (ckpt.step > 0 and "lr" in ckpt.train_config)


def frequencies(noise, trained, counts, generator):
    """A copy of the ReFlow `noise` whose rows of tokens are as frequency makes those of the ReFlow `trained`.

    counts (n_tokens,): how often each token is in the text at hand. Sparse recipes stay sparse: each signal's
    entries are exchanged among tokens of like frequency, those of another signal in another order.
    """
    net = copy.deepcopy(noise)
    if net.config.vocab == "sparse":
        net = with_exchanged_entries(net, trained, counts, generator)
    log_count = np.log(np.maximum(counts, 0.5))
    goal = dict(trained.vocab.named_parameters())
    with torch.no_grad():
        for name, weight in net.vocab.named_parameters():
            if weight.dim() < 2 or len(weight) < len(counts):  # a basis has no rows of tokens
                continue
            rows = goal[name][: len(counts)].double().cpu()  # (n_tokens, d or S)
            left = torch.from_numpy(regress_out(rows.numpy(), log_count))
            drawn = torch.randn(left.shape, generator=generator, dtype=left.dtype)
            drawn *= left.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
            weight[: len(counts)] = (rows - left + drawn).to(weight)
    return net


def with_exchanged_entries(net, trained, counts, generator):
    """The ReFlow `net` with the sparse entries of `trained`, each signal's exchanged: see `frequencies`."""
    config = net.config
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    codes = trained.vocab.recipes().detach().cpu()[:, : config.signals]  # (V, S)
    for column in codes[: len(counts)].T:
        column.copy_(column[torch.from_numpy(exchanged(counts, rng))])
    core, basis = net.vocab.core.detach(), net.vocab.basis.detach()
    tensors = SparseVocab.tensors(codes, core.cpu(), basis.cpu(), config.n_nonzero)
    return checkpoint.with_vocab(net, config, tensors).to(basis.device)


def steps_of(ckpt):
    """(steps of training on shuffled text for a Checkpoint, ""), or (0, why there are none)."""
    config, train = ModelConfig(**ckpt.model_config), ckpt.train_config
    per_step = train.get("batch_size", 0) * config.block_size  # tokens
    if not per_step or "lr" not in train:
        return 0, "how the run was trained is not known"
    if not ckpt.step:
        return 0, "the run is untrained"
    steps = min(ckpt.step, int(BUDGET / (per_step * flops_per_token(config, config.block_size))))
    if steps < min(ckpt.step, LEAST_STEPS):
        return 0, f"{LEAST_STEPS} steps of this model need more than {BUDGET:.0e} floating-point operations"
    return steps, ""


def shuffled_tokens(counts, rng):
    """Every token as often as in counts (n_tokens,), in random order, uint16."""
    return rng.permutation(np.repeat(np.arange(len(counts), dtype=np.uint16), counts))


def settings_of(ckpt, steps):
    """{option: value} of train.py that trains a Checkpoint's run anew, in so many steps."""
    found = {key: ckpt.train_config[key] for key in KEPT if key in ckpt.train_config}
    warmup = ckpt.train_config.get("warmup_steps", 0) * steps / max(ckpt.train_config["max_steps"], ckpt.step)
    once = dict.fromkeys(("max_steps", "eval_interval", "save_interval"), steps)
    return found | once | {"warmup_steps": round(warmup), "eval_sequences": VAL_WINDOWS, "keep": 1}


def fingerprint(ckpt, net, settings, counts):
    """Eight digits that stand for the start `net`, the settings and the counts of a training.

    They decide the order of the text, which is another one for the null model of a null model.
    """
    null = {"null": ckpt.state["null"]} if "null" in ckpt.state else {}
    digest = hashlib.sha256(json.dumps(settings | null, sort_keys=True).encode())
    for name, weight in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().numpy().tobytes())
    digest.update(counts.astype("<i8").tobytes())
    return digest.hexdigest()[:8]


def shuffled_text(ckpt, start, counts, folder):
    """The Checkpoint of a run's model trained on shuffled text from the ReFlow `start`; None: see steps_of.

    counts (n_tokens,): how often the run has read each token. It is kept in `folder`, or in the user's cache
    if nothing can be written there, and trained if it is in neither. Raises UserError if training fails.
    """
    steps, _ = steps_of(ckpt)
    if not steps:
        return None
    settings = settings_of(ckpt, steps)
    name = f"shuffled-{fingerprint(ckpt, start, settings, counts)}"
    places = [place / name / f"step_{steps:06d}" for place in (folder, user_cache() / "nulls")]
    if not any(place.is_dir() for place in places):
        place = places[0] if files.why_unwritable(folder) is None else places[1]
        with files.lock(place.parent, wait=True):  # another process may be training it
            if not place.is_dir():
                train(place.parent, ckpt, start, settings, counts)
    place = next(place for place in places if place.is_dir())
    return Checkpoint(place, checkpoint.read_state(place))


def train(folder, ckpt, start, settings, counts):
    """Train `start` on shuffled tokens and save it as the run `folder`, with `start` as its step 0."""
    steps, block = settings["max_steps"], ckpt.model_config["block_size"]
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)  # left by a kill
    print(
        f"training the null model of shuffled text, {steps} steps, once: {files.shortest(folder)}", flush=True
    )
    rng = np.random.default_rng(int(folder.name[-8:], 16))
    text = shuffled_tokens(counts, rng)[: steps * settings["batch_size"] * block + 1]
    text = np.resize(text, max(len(text), block + 1))
    config = {"model": ckpt.model_config, "train": ckpt.train_config | settings | {"init_from": None}}
    state = {"config": config, "val_loss": None}
    state |= {"data_sha256": ckpt.state.get("data_sha256"), "null": "shuffled text"}
    tokenizer = kept(ckpt.path, ckpt.state)
    state |= tokenizer.entry
    try:
        about = ("tokens of a run in random order", "that of the run", {})
        writer = Writer(work / "text", *about, len(text) + 1, tokenizer)
        for split, tokens in (("train", text), ("val", rng.choice(text, VAL_WINDOWS * block))):
            writer.add(split, 0, tokens, len(tokens))
        writer.finish()
        checkpoint.save(work / "start", 0, plain(start), {}, state, 1, True, tokenizer.files)
        # Not the optimiser of the configuration that train.py reads, where the run is older than the choice.
        options = {"optimizer": "adamw"} | settings
        options |= {
            "init_from": work / "start",
            "dataset": (work / "text").resolve(),
            "out_dir": work / "run",
            "device": next(start.parameters()).device.type,
        }
        command = [sys.executable, TRAIN, *(f"--{key}={value}" for key, value in options.items())]
        status = subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL).returncode
        if status:
            raise UserError(f"training the null model of shuffled text ended with status {status}: see above")
        net, trained = checkpoint.load_model(work / "run" / f"step_{steps:06d}")
        loss = {key: trained[key] for key in ("val_loss", "whole_val_loss", "bits_per_byte")}
        checkpoint.save(folder, 0, plain(start), {}, state, 1, False, tokenizer.files)
        checkpoint.save(folder, steps, plain(net), {}, state | loss, 1, True, tokenizer.files)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def plain(net):
    """The weights of a ReFlow as fp32 tensors on the CPU, by name."""
    return {name: weight.detach().float().cpu().contiguous() for name, weight in net.state_dict().items()}
