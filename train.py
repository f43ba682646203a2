"""
Train a reFlow model.

    python train.py                               the nano model on the embedded corpus
    python train.py config/reflow_1.py --dry_run  what a run needs; trains nothing
    python train.py --init_from=out/reflow-nano --out_dir=out/tuned --dataset=books       fine-tune a run
    python train.py --recipes_from=out/reflow-nano --recipe_rate=0 --out_dir=out/student  another's recipes
    python train.py --out_dir=out/tuned --resume  go on after a kill, on a CPU with the same bits; else start

    torchrun --standalone --nproc_per_node=4 train.py config/reflow_1.py        four GPUs; several machines:
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py CONFIG

The batch and the learning rate of a step depend only on the configuration and the step number, the dropout
also on the process. So the curve does not depend on how often a run was evaluated, killed and resumed, nor,
without dropout and up to rounding, on the number of processes.
"""

import contextlib
import math
import os
import shlex
import signal
import sys
import time
import uuid
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import threads
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import configurator
import files
from configurator import SEED, UserError, check
from data.datasets import find_dataset, mean_loss, tokenizer_of
from data.shards import Dataset
from data.sotu.prepare import embedded
from data.tokenizer import kept
from hardware import (
    check_room,
    dry_run,
    flops_per_token,
    keep_freed_memory,
    peak_flops,
    pick_device,
    pick_dtype,
    processes,
    trace_steps,
)
from metrics import Metrics, SignalStatistics
from model import FactoredVocab, ModelConfig, ReFlow


@dataclass
class TrainConfig:
    out_dir: str  # the run's folder: checkpoints, metrics.jsonl
    dataset: str = "sotu"  # a folder under data/, or the path of any prepared one
    batch_size: int = 32  # sequences per optimiser step, over all processes
    micro_batch_size: int = 8  # sequences a process computes at once; the rest of its share is accumulated
    max_steps: int = 1000  # optimiser steps of the whole run
    lr: float = 6e-4  # peak learning rate
    min_lr: float = 6e-5  # learning rate at the end of the cosine
    warmup_steps: int = 100  # linear warm-up from 0
    weight_decay: float = 0.1  # on matrices only
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for matrices in blocks, with AdamW for the rest
    beta1: float = 0.9  # AdamW's first-moment decay
    beta2: float = 0.95  # AdamW's second-moment decay
    grad_clip: float = 1.0  # largest gradient norm; 0 turns clipping off
    eval_interval: int = 250  # steps between evaluations
    eval_sequences: int = 64  # validation sequences of an evaluation; the last step also takes all
    save_interval: int = 500  # steps between checkpoints, a multiple of eval_interval
    keep: int = 2  # newest checkpoints to keep, besides step 0 and the best
    log_interval: int = 10  # steps between lines of metrics.jsonl
    max_bad_steps: int = 50  # stop after so many steps in a row with a non-finite loss or gradient
    seed: int = 0  # of initial weights, batches and dropout
    device: str = "auto"  # auto: cuda, then mps, then cpu
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # bf16 if the hardware has it, fp16 on older GPUs
    parallel: Literal["ddp", "fsdp"] = "ddp"  # torchrun: replicate, or shard a model that outgrows one card
    activation_checkpointing: bool = False  # recompute blocks in backward: a third more work, far less memory
    compile: bool = False  # torch.compile the blocks, if a trial step agrees with the plain one
    logger: Literal["none", "wandb", "trackio", "tensorboard"] = "none"  # beside metrics.jsonl
    init_from: str | None = None  # start from the model of this run, or of one of its step_... folders
    recipes_from: str | None = None  # take the recipes of this run, and its kind of vocabulary and tokens
    recipe_rate: float = 1.0  # times the learning rate, for recipes; 0: they stay as they are
    resume: bool = False  # go on from the newest whole checkpoint in out_dir, with its settings
    verify_data: bool = False  # check every shard's SHA-256 first
    profile: bool = False  # write a torch.profiler trace of three steps to out_dir/trace.json
    dry_run: bool = False  # print parameters, FLOPs, memory and time, and stop

    def __post_init__(self):
        self.out_dir = os.path.expanduser(self.out_dir)  # a shell leaves the ~ of --out_dir=~/run as it is
        counts = "batch_size micro_batch_size max_steps eval_interval eval_sequences save_interval keep"
        check(self, *(f"{name} >= 1" for name in f"{counts} log_interval max_bad_steps".split()))
        check(self, "save_interval % eval_interval == 0", "0 <= warmup_steps <= max_steps", SEED)
        check(self, "0 <= lr <= 100", "0 <= min_lr <= 100", "0 <= beta1 < 1", "0 <= beta2 < 1")
        check(self, "0 <= weight_decay <= 100", "grad_clip >= 0", "0 <= recipe_rate <= 100")
        if self.init_from is not None and self.recipes_from is not None:
            raise ValueError("--init_from takes the recipes, too: leave out --recipes_from")


# Settings that change the loss curve: --resume accepts another value and prints the change.
CURVE = {"batch_size", "max_steps", "lr", "min_lr", "warmup_steps", "weight_decay", "beta1", "beta2"}
CURVE |= {"grad_clip", "seed", "dtype"}


# What --recipes_from decides of a ModelConfig, and the parameters that hold recipes.
VOCABULARY = ("vocab", "n_signal", "top_k", "n_nonzero", "n_core", "vocab_size", "n_token")
RECIPES = ("recipe", "value", "core")
GAIN_RATE = 10.0  # times the learning rate, for gains of signals: at 1 they hardly change (LOG.md)


def learning_rate(step, c):
    """The rate of the update after `step` updates: linear warm-up, then half a cosine down to min_lr."""
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    progress = (step - c.warmup_steps) / max(1, c.max_steps - 1 - c.warmup_steps)
    return c.min_lr + 0.5 * (c.lr - c.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


def step_seed(seed, step, rank):
    """The seed of a process's random numbers in one step, the same on every machine."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


class Together:
    """Several optimisers, each of its own parameters, used as one; they share one dictionary of states."""

    def __init__(self, *parts):
        self.parts = parts
        self.defaults = parts[0].defaults
        self.state = parts[0].state
        for part in parts:
            part.state = self.state

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)


def recipe_parameters(model):
    """The parameters that hold the recipes of a ReFlow."""
    return [p for name, p in model.vocab.named_parameters() if name in RECIPES]


def make_optimizer(model, c, device):
    """AdamW (Loshchilov & Hutter, 2019), fused where that exists, with weight decay on matrices only.

    With optimizer=muon, Muon (Jordan et al., 2024) updates the matrices of the blocks. Its updates are scaled
    to the size of AdamW's (Liu et al., 2502.16982), so that both take the same learning rate.
    """
    of_muon = [p for p in model.blocks.parameters() if p.dim() == 2 and c.optimizer == "muon"]
    known = set(map(id, of_muon))
    parameters = [p for p in model.parameters() if id(p) not in known]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if gains := list(getattr(model.vocab, "gain", ())):
        groups[1]["params"] = [p for p in groups[1]["params"] if all(p is not gain for gain in gains)]
        groups.append({"params": gains, "weight_decay": 0.0, "rate": GAIN_RATE})
    if c.recipe_rate not in (0, 1):  # frozen ones need no rate
        slow = {id(p) for p in recipe_parameters(model)}
        for group in groups[:2]:
            own = [p for p in group["params"] if id(p) in slow]
            group["params"] = [p for p in group["params"] if id(p) not in slow]
            groups.append({"params": own, "weight_decay": group["weight_decay"], "rate": c.recipe_rate})
    adamw = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), fused=device.type in ("cuda", "cpu"))
    if not of_muon:
        return adamw
    muon = torch.optim.Muon(of_muon, lr=c.lr, weight_decay=c.weight_decay, adjust_lr_fn="match_rms_adamw")
    return Together(adamw, muon)


def compile_blocks(model, x, y, autocast):
    """Compile each block in place if a trial step works and gives the same states; else print why not."""
    model.eval()  # no dropout
    with autocast, torch.no_grad():
        plain = model.encode(x)  # not the loss: at the start that is log V, whatever the blocks do
    try:
        for block in model.blocks:
            block.forward = torch.compile(block.forward)
        with autocast, torch.no_grad():
            after = model.encode(x)
        model.train()
        with autocast:
            loss = model(x, y)[1]
        loss.backward()
        if not (difference := ((after - plain).norm() / plain.norm()).item()) <= 2e-2:  # also true of NaN
            raise RuntimeError(f"a trial step differs by {difference:.1%}")
    except Exception as error:  # a compiler may raise anything, and the run does not need it
        for block in model.blocks:
            block.__dict__.pop("forward", None)  # the class's own again
        print(f"--compile is off: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    model.train().zero_grad(set_to_none=True)


def check_same_run(before, m, c, data_sha256, dtype):
    """Raise UserError unless the checkpoint `before` has this model and data; print what else changed."""
    old = before["config"]
    was = asdict(ModelConfig(**old["model"]))  # defaults for fields of later versions
    if changed := [f"{k}={v} (was {was[k]})" for k, v in asdict(m).items() if was[k] != v]:
        raise UserError(f"{c.out_dir} holds another model: {', '.join(changed)}: give another --out_dir")
    if before["data_sha256"] != data_sha256:
        raise UserError(
            f"{c.out_dir} was trained on other data than {c.dataset} holds now: give another --out_dir"
        )
    if (other := old["train"].get("optimizer", "adamw")) != c.optimizer:
        raise UserError(f"{c.out_dir} was trained with --optimizer={other}: give another --out_dir")
    then, now = old["train"] | {"dtype": before.get("dtype", dtype)}, asdict(c) | {"dtype": dtype}
    for key, value in now.items():
        if key in CURVE and value != then.get(key):
            print(f"resuming with another {key}: {then.get(key)} -> {value}")


def fitted(m, tokenizer):
    """The ModelConfig for tokens of a Tokenizer. UserError if it has too few rows."""
    if m.vocab_size is not None and m.vocab_size < tokenizer.n_tokens:
        raise UserError(f"vocab_size={m.vocab_size} is too small for {tokenizer}: leave it out")
    m = tokenizer.rows_of(m)
    return replace(m, vocab_size=m.rows)


def read_origin(m, c):
    """(the model that --init_from names, the ModelConfig to train it with, its Tokenizer). UserError.

    The configuration is the model's own, except dropout, which the run sets.
    """
    step = checkpoint.find(c.init_from)
    origin, state = checkpoint.load_model(step, verified=True)
    return origin, replace(origin.config, dropout=m.dropout), kept(step, state)


def read_recipes(m, c):
    """({name: tensor} of the recipes of --recipes_from, `m` with that vocabulary, its Tokenizer). UserError.

    Blocks and width stay those of `m`.
    """
    step = checkpoint.find(c.recipes_from)
    teacher, state = checkpoint.load_model(step, verified=True)
    theirs = teacher.config
    if theirs.vocab not in ("factored", "topk", "sparse"):
        raise UserError(f"--recipes_from={c.recipes_from} has no recipes: its vocabulary is {theirs.vocab}")
    own = {name: getattr(theirs, name) for name in VOCABULARY}
    own |= {"n_signal": theirs.signals, "vocab_size": theirs.rows, "reinject": False}
    try:
        m = replace(m, **own)
    except ValueError as error:
        raise UserError(f"--recipes_from={c.recipes_from}: {error}") from None
    tensors = {name: t for name, t in teacher.vocab.state_dict().items() if name != "basis"}
    return tensors, m, kept(step, state)


@torch.no_grad()
def give_recipes(model, tensors):
    """Put recipes in a new ReFlow, scaled so that its E has the standard deviation that it had."""
    before = model.vocab.matrix().std()
    model.vocab.load_state_dict(tensors, strict=False)
    scale = before / model.vocab.matrix().std()
    for p in recipe_parameters(model):
        p *= scale


def refuse_a_shape(option, value, decided):
    """UserError if the command line gives fields of a model that another `option` has decided."""
    if given := [a for a in sys.argv[1:] if a.startswith(tuple(f"--{name}=" for name in decided))]:
        raise UserError(f"--{option}={value} decides the model: leave out {' '.join(given)}")


def own_settings(given):
    """The settings of the run that --resume goes on with, {} without one; `given` are the command's."""
    run = Path(given.get("out_dir", "")).expanduser()
    newest, state, _ = checkpoint.newest_whole(run) if given.get("resume") else (None, None, [])
    if newest is None:
        return {}
    saved = state["config"]["model"] | state["config"].get("train", {})
    once = ("resume", "profile", "verify_data")  # these belong to one command, not to the run
    return {key: value for key, value in saved.items() if key not in once} | {"out_dir": str(run)}


def command(c):
    """The command that resumes a run."""
    python = "python" if processes()[2] == 1 else "torchrun ..."
    return f"{python} {shlex.quote(sys.argv[0])} --out_dir={shlex.quote(c.out_dir)} --resume"


def main():
    nano = Path(__file__).parent / "config/reflow_nano.py"
    m, c = configurator.parse(ModelConfig, TrainConfig, default_config=nano, saved=own_settings)
    if c.init_from is not None:
        decided = [f.name for f in fields(ModelConfig) if f.name != "dropout"]
        refuse_a_shape("init_from", c.init_from, decided)
    elif c.recipes_from is not None:
        refuse_a_shape("recipes_from", c.recipes_from, VOCABULARY)
    elif m.vocab_size is None:
        m = fitted(m, tokenizer_of(c.dataset))
    run, rank = Path(c.out_dir), processes()[0]
    if c.dry_run:
        if c.init_from is not None:
            m = read_origin(m, c)[1]
        elif c.recipes_from is not None:
            m = read_recipes(m, c)[1]
        if rank == 0:
            print(configurator.describe(m, c), flush=True)
            dry_run(m, c)
        return
    if c.resume and run.is_dir() and files.why_unwritable(run):
        newest, state, _ = checkpoint.newest_whole(run)
        if newest and state["step"] >= c.max_steps:  # nothing has to be written
            if rank == 0:
                print(f"finished {run} at step {state['step']}")
            return
    try:
        with files.lock(run) if rank == 0 else contextlib.nullcontext():
            status = train(m, c, run)
    except BrokenPipeError:  # train.py | head
        raise
    except OSError as error:  # mostly a full disk
        kept, _, _ = checkpoint.newest_whole(run)
        remedy = f"{kept} is whole; go on from it with: {command(c)}" if kept else "no checkpoint was saved"
        raise UserError(f"{error.filename or run}: {error.strerror or error}: {remedy}") from None
    leave(status)


def train(m, c, run):
    """Train the model `m` by the settings `c` in the folder `run`, from the newest whole checkpoint there.

    Returns the exit status: 0 at the last step, 128 + the signal's number if a signal came before.
    """
    rank, local, world = processes()
    first = rank == 0

    def say(text):
        if first:
            tqdm.write(text)
            sys.stdout.flush()  # a log file shows it now

    # -- a new run, or the newest whole checkpoint of an old one
    if (run / "state.json").exists():
        raise UserError(f"{run} is one checkpoint, not a run: give another --out_dir, and --init_from={run}")
    newest, before, damaged = checkpoint.newest_whole(run, verified=c.resume)
    for message in damaged if c.resume else []:
        say(f"passed over: {message}")
    if newest and not c.resume:
        raise UserError(f"{run} is at step {before['step']} already: add --resume, or give another --out_dir")
    origin, recipes, tokenizer = None, None, kept(newest, before) if newest else None
    if c.init_from is not None and newest:
        m = replace(ModelConfig(**before["config"]["model"]), dropout=m.dropout)
    elif c.init_from is not None:
        origin, m, tokenizer = read_origin(m, c)
    elif c.recipes_from is not None and newest:
        m = replace(m, **{name: before["config"]["model"][name] for name in VOCABULARY})
    elif c.recipes_from is not None:
        recipes, m, tokenizer = read_recipes(m, c)
    if c.dataset == "sotu" and tokenizer is not None:
        c = replace(c, dataset=embedded(tokenizer))
    say(configurator.describe(m, c))
    if c.batch_size % (world * c.micro_batch_size):
        share = f"{world} processes x micro_batch_size={c.micro_batch_size}"
        raise UserError(f"batch_size={c.batch_size} must be a multiple of {share}")
    accumulate = c.batch_size // (world * c.micro_batch_size)

    sharded = world > 1 and c.parallel == "fsdp"
    if sharded and c.optimizer == "muon":
        raise UserError("--optimizer=muon needs whole matrices: give --parallel=ddp or --optimizer=adamw")

    # -- devices and precision
    device = pick_device(c.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index if device.index is not None else local)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # products that autocast leaves in fp32
    on_cuda = device.type == "cuda"
    if device.type == "cpu":
        keep_freed_memory()
    if world > 1:
        dist.init_process_group("nccl" if on_cuda else "gloo", device_id=device if on_cuda else None)
    dtype = pick_dtype(device, c.dtype)
    precision = str(dtype).removeprefix("torch.")
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if not newest or before["step"] < c.max_steps:
        check_room(m, c, device, dtype != torch.float32, world, run)

    # -- data, model, optimiser
    folder = find_dataset(c.dataset, tokenizer)
    train_set = Dataset(folder, "train", m.block_size, c.verify_data)
    if tokenizer is not None:
        train_set.check_tokenizer(tokenizer, run if newest else c.init_from or c.recipes_from)
    tokenizer = train_set.tokenizer
    m = fitted(m, tokenizer)
    val_set = Dataset(folder, "val", m.block_size, c.verify_data)
    bits_per_byte = val_set.tokens / val_set.bytes / math.log(2)  # of one nat per token

    torch.manual_seed(c.seed)
    model = raw = ReFlow(m).to(device)
    if origin is not None:
        raw.load_state_dict(origin.state_dict())
        del origin
    if recipes is not None:
        give_recipes(raw, recipes)
    if c.recipe_rate == 0:
        for p in recipe_parameters(raw):
            p.requires_grad_(False)
    raw.activation_checkpointing = c.activation_checkpointing
    if c.compile:
        compile_blocks(raw, *(t.to(device) for t in train_set.windows(0, c.micro_batch_size)), autocast)
    if sharded:
        from torch.distributed.fsdp import fully_shard  # takes most of a second to import

        for block in raw.blocks:
            fully_shard(block)
        fully_shard(raw)
    elif world > 1:
        # Bucket views hold gradients only once. Buffers, the places of a sparse vocabulary, never change.
        model = DistributedDataParallel(raw, gradient_as_bucket_view=True, broadcast_buffers=False)
    optimizer = make_optimizer(raw, c, device)

    # -- the state of the run
    step, skipped, val_loss, best, whole_val_loss = 0, 0, None, None, None
    token = (before or {}).get("token") or uuid.uuid4().hex  # makes the run's id at wandb unique
    if newest:
        check_same_run(before, m, c, train_set.data_sha256, precision)
        step, skipped = before["step"], before["skipped"]
        val_loss, best = before["val_loss"], before["best_val_loss"]
        whole_val_loss = before["whole_val_loss"] if step >= c.max_steps else None  # else it is out of date
        checkpoint.restore_state(
            raw, optimizer, *(checkpoint.load_tensors(newest / f) for f in checkpoint.WEIGHTS)
        )
        if scaler.is_enabled() and before["scaler"]:
            scaler.load_state_dict(before["scaler"])
        if first and val_loss == best and step % c.save_interval == 0:  # a kill came before the pointer
            checkpoint.point(run, "best", newest.name)
        say(f"resumed {run} at step {step} of {c.max_steps}")
    elif c.resume:
        say(f"nothing to resume in {run}: starting anew")
    metrics = None
    if first and step < c.max_steps:
        run.mkdir(parents=True, exist_ok=True)
        metrics = Metrics(run, c.logger, asdict(m) | asdict(c), step, token)

    # Under FSDP no process holds all signals; a sparse vocabulary stores its recipes in another form.
    statistics = None
    if first and isinstance(raw.vocab, FactoredVocab) and not sharded:
        start = run / "step_000000" / checkpoint.WEIGHTS[0] if step else None
        statistics = SignalStatistics(raw.vocab, m.n_tokens, start)

    def save(is_best):
        weights, moments = checkpoint.gather_state(raw, optimizer)  # on every process
        if first:
            state = {
                "val_loss": val_loss,
                "best_val_loss": best,
                "whole_val_loss": whole_val_loss,
                "bits_per_byte": bits_per_byte * (whole_val_loss or val_loss),
                "config": {"model": asdict(m), "train": asdict(c)},
                "data_sha256": train_set.data_sha256,
                **tokenizer.entry,
                "dtype": precision,
                "scaler": scaler.state_dict(),
                "skipped": skipped,
                "token": token,
                "versions": checkpoint.versions(),
            }
            checkpoint.save(run, step, weights, moments, state, c.keep, is_best, tokenizer.files)
        if world > 1:
            dist.barrier()

    def validate(n_sequences, key="val_loss"):
        loss = mean_loss(raw, val_set, n_sequences, c.micro_batch_size, device, autocast, rank, world)
        if first:
            about_signals = statistics.measure() if statistics and key == "val_loss" else {}
            metrics.write(step=step, **{key: loss}, **about_signals)
        return loss

    def show(loss):
        return f"validation loss {loss:.4f}, {loss * bits_per_byte:.4f} bits per byte"

    def fetch(step):
        """This process's share of a step's batch, on its way to the device."""
        batch = train_set.batch(step, c.batch_size, c.seed, rank, world)
        batch = [t.pin_memory() for t in batch] if on_cuda else batch
        return [t.to(device, non_blocking=True).split(c.micro_batch_size) for t in batch]

    # SIGTERM or SIGINT asks for a checkpoint; at the end of a step the processes learn whether any was asked.
    asked = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: asked.append(signal.Signals(number)))

    peak, bad, timed_tokens = peak_flops(device), 0, 0
    bar = tqdm(total=c.max_steps, initial=step, desc=run.name, unit="step", disable=None if first else True)
    if step == 0:
        val_loss = best = validate(c.eval_sequences)
        say(f"step {step:>6}: {show(val_loss)}")
        save(is_best=True)
    batch = fetch(step)
    tracer = trace_steps(run / "trace.json", c.max_steps - step, say) if c.profile and first else None
    clock = time.perf_counter()

    while step < c.max_steps:
        torch.manual_seed(step_seed(c.seed, step, rank))  # dropout is a function of the step: nothing to save
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c) * group.get("rate", 1.0)
        loss = torch.zeros((), device=device)
        scale = scaler.get_scale()  # waits for a GPU, so once a step
        for i, (x, y) in enumerate(zip(*batch, strict=True)):
            last = i == accumulate - 1
            if sharded:
                model.set_requires_gradient_sync(last)
            wait = isinstance(model, DistributedDataParallel) and not last
            with model.no_sync() if wait else contextlib.nullcontext():
                with autocast:
                    micro_loss = model(x, y, scale / accumulate)[1] / accumulate
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        batch = fetch(step + 1)  # while the device is still at work

        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), c.grad_clip or math.inf)
        norm = norm.full_tensor() if sharded else norm
        summary = torch.stack((loss / world, loss.new_tensor(float(bool(asked)))))
        if world > 1:
            dist.all_reduce(summary)
        loss, stop, norm = *summary.tolist(), norm.item()
        if math.isfinite(loss) and math.isfinite(norm):
            scaler.step(optimizer)
            bad = 0
        else:  # the same on every process, so none of them steps
            bad, skipped = bad + 1, skipped + 1
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step, timed_tokens = step + 1, timed_tokens + c.batch_size * m.block_size
        if bad >= c.max_bad_steps:
            what = f"step {step}: loss or gradient was not finite {bad} times in a row"
            raise UserError(f"{what}: {run} keeps its last checkpoint; lower --lr, or try --dtype=fp32")

        bar.update()
        if tracer:
            tracer.step()
        if first and (step % c.log_interval == 0 or step == c.max_steps):
            rate = timed_tokens / (time.perf_counter() - clock)
            mfu = rate * flops_per_token(m, m.block_size) / (peak * world) if peak else None
            memory = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None
            row = {"step": step, "loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
            row |= {"loss_scale": scale, "skipped": skipped}
            metrics.write(**row, tokens_per_s=rate, mfu=mfu, memory_gib=memory)
            bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{rate:,.0f}")
            if bar.disable and step % (10 * c.log_interval) == 0:
                say(f"step {step:>6}: loss {loss:.4f}, {rate:,.0f} tokens/s")
        if step == c.max_steps or step % c.eval_interval == 0:
            paused = time.perf_counter()
            val_loss = validate(c.eval_sequences)
            say(f"step {step:>6}: {show(val_loss)}")
            if step == c.max_steps:
                whole_val_loss = validate(val_set.n_windows, "whole_val_loss")
            if step == c.max_steps or step % c.save_interval == 0:
                is_best = val_loss < best  # False for NaN
                best = val_loss if is_best else best
                save(is_best)
            clock += time.perf_counter() - paused
        if stop and step < c.max_steps:
            if step % c.save_interval:  # otherwise it was just saved
                save(is_best=False)
            break
    bar.close()
    if tracer:
        tracer.stop()
    if metrics:
        metrics.close()
    if step < c.max_steps:
        name = asked[0].name if asked else "another process"
        say(f"stopped by {name} at step {step}: saved; go on with: {command(c)}")
    else:
        whole = f"; over the whole validation split: {show(whole_val_loss)}" if whole_val_loss else ""
        say(f"finished {run} at step {step}{whole}")
    if step < c.max_steps:
        return 128 + (asked[0] if asked else signal.SIGTERM)  # not 0, so that `make demo` stops, too
    return 0


def leave(status):
    """End this process with an exit status.

    Under torchrun it skips Python's finalization: threads of the process group are still running then, and if
    one asks for the interpreter while that shuts down, the process aborts although its work is done
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    configurator.run(main)
