"""
Train a reFlow model.

    python train.py                                    the nano model on the embedded corpus, on whatever is here
    python train.py config/reflow_1.py --dry_run       what a run needs; trains nothing
    python train.py config/reflow_nano.py --resume     go on after a kill, bit for bit (or start, if nothing is there)
    torchrun --standalone --nproc_per_node=4 train.py config/reflow_1.py                                         4 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...     two machines

A run is a pure function of its configuration: the batch, the learning rate and the dropout of a step depend on the
seed and the step number alone, so the curve does not depend on the number of processes (up to rounding), nor on how
often the run was evaluated, killed and resumed.
"""

import configurator

if __name__ == "__main__":
    configurator.help(__file__, "model.py")

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
from configurator import UserError
from data.shards import Dataset
from model import ModelConfig, ReFlow, flops_per_token, parameter_table, pick_device, pick_dtype


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
    beta1: float = 0.9  # AdamW's first-moment decay
    beta2: float = 0.95  # AdamW's second-moment decay
    grad_clip: float = 1.0  # largest gradient norm; 0 turns clipping off
    eval_interval: int = 250  # steps between evaluations
    eval_sequences: int = 64  # validation sequences of an evaluation; the last step's takes the whole split
    save_interval: int = 500  # steps between checkpoints, a multiple of eval_interval
    keep: int = 2  # newest checkpoints to keep, beside step 0 and the best
    log_interval: int = 10  # steps between lines of metrics.jsonl
    max_bad_steps: int = 50  # stop after so many steps in a row with a non-finite loss or gradient
    seed: int = 0  # of weights, batches and dropout
    device: str = "auto"  # auto: cuda, then mps, then cpu
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where hardware has it, fp16 on older GPUs
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: replicate, or shard a model that outgrows one card
    activation_checkpointing: bool = False  # recompute blocks in backward: a third more work, far less memory
    compile: bool = False  # torch.compile the blocks, if a trial step agrees with the plain one
    logger: Literal["none", "wandb", "tensorboard"] = "none"  # beside metrics.jsonl
    resume: bool = False  # go on from the newest whole checkpoint in out_dir
    verify_data: bool = False  # check every shard's SHA-256 first
    dry_run: bool = False  # print parameters, FLOPs, memory and time, and stop

    def __post_init__(self):
        positive = ("batch_size", "micro_batch_size", "max_steps", "eval_interval", "eval_sequences", "save_interval")
        for name in (*positive, "keep", "log_interval", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.save_interval % self.eval_interval:
            raise ValueError(f"save_interval={self.save_interval} must be a multiple of {self.eval_interval=}")


# What may differ between a run and its resumption without changing what it computes.
FREE_TO_CHANGE = {
    *("out_dir", "dataset", "micro_batch_size", "keep", "log_interval", "max_bad_steps", "device", "dtype", "parallel"),
    *("activation_checkpointing", "compile", "logger", "resume", "verify_data", "dry_run"),
}

# Dense peak in the precision used here, FLOP/s, from the makers' data sheets; for the utilisation column (MFU).
PEAK_FLOPS = {
    **{"T4": 65e12, "V100": 125e12, "A100": 312e12, "A10": 125e12, "L4": 121e12, "L40S": 362e12, "H100": 989e12},
    **{"H200": 989e12, "B200": 2250e12, "RTX 3090": 71e12, "RTX 4090": 165e12},
}


def learning_rate(step, c):
    """Of the update that follows `step` updates: linear warm-up, then half a cosine down to min_lr at the last one."""
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    progress = (step - c.warmup_steps) / max(1, c.max_steps - 1 - c.warmup_steps)
    return c.min_lr + 0.5 * (c.lr - c.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(model, c, device):
    """AdamW (Loshchilov & Hutter, 2019), fused where that exists, with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), fused=device.type in ("cuda", "cpu"))


def evaluate(model, dataset, n_sequences, batch_size, device, autocast, rank, world):
    """Mean validation loss in nats per token over the first `n_sequences` windows, shared by all processes."""
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
    model.train()
    return (total[0] / total[1]).item()


# ---------------------------------------------------------------------------------------------------------------------
# State, to and from flat dicts of plain CPU tensors: the same files for one process, DDP and FSDP


def whole(tensor):
    """A parameter or optimiser tensor as a plain contiguous one on the CPU, gathered if it is sharded."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().cpu().contiguous()


def gather_state(model, optimizer):
    """({name: weight}, {"name.exp_avg": ...}). Every process must call it."""
    weights, moments = {}, {}
    for name, p in model.named_parameters():
        weights[name] = whole(p)
        for key, value in optimizer.state[p].items():
            moments[f"{name}.{key}"] = whole(value)
    return weights, moments


def restore_state(model, optimizer, weights, moments):
    """Undo `gather_state`, into parameters that may be sharded."""

    def like(parameter, tensor):
        if isinstance(parameter, DTensor):
            return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
        return tensor.to(parameter.device)

    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(like(p, weights[name]))
            state = {key: moments.get(f"{name}.{key}") for key in ("exp_avg", "exp_avg_sq", "step")}
            if state["step"] is not None:  # none of it exists before the first update
                step = state.pop("step").to(p.device if optimizer.defaults["fused"] else "cpu")
                optimizer.state[p] = {key: like(p, value) for key, value in state.items()} | {"step": step}


def versions():
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit.stdout.strip() or None}


# ---------------------------------------------------------------------------------------------------------------------
# --dry_run


def activation_bytes(c, half):
    """Bytes that a token leaves in a block for the backward pass: inputs of norms in fp32, of products in `half`."""
    b, d, kv = (2 if half else 4), c.n_embd, c.kv_heads * c.head_dim
    norms = 8 * d  # the residual stream before each norm
    attention = b * (d + d + 2 * kv + d + d)  # normed input; q, k, v rotated; output; output with heads side by side
    return norms + attention + b * (d + 4 * c.hidden)  # and the MLP: normed input, gate, up, silu(gate), product


def memory_plan(model, m, c, half, world):
    """{part: bytes} of the peak on one device."""
    n, tokens = sum(p.numel() for p in model.parameters()), c.micro_batch_size * m.block_size
    shards = world if c.parallel == "fsdp" else 1
    layer, chunk = activation_bytes(m, half), min(tokens, model.vocab.chunk)
    layers = layer * tokens + m.n_layer * 4 * m.n_embd * tokens if c.activation_checkpointing else m.n_layer * layer * tokens
    columns = m.n_embd if m.vocab == "dense" else m.signals
    return {
        "weights, fp32": 4 * n / shards,
        "gradients, fp32": 4 * n / shards,
        "AdamW moments, fp32": 8 * n / shards,
        "weights in half precision": 2 * n * half,
        "activations": layers,
        "loss: one chunk of logits": chunk * m.vocab_size * (4 + 4 + 2 * half),
        "loss: gradient of the vocabulary": 4 * m.vocab_size * columns,
    }


def dry_run(m, c):
    """Print what the run needs. Returns nothing, trains nothing, reads no data."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    with torch.device("meta"):
        model = ReFlow(m)
    table = parameter_table(model)
    for part, n in table.items():
        print(f"  {part:10} {n:>13,} parameters")
    print(f"  {'total':10} {sum(table.values()):>13,} parameters")

    tokens, flops = c.batch_size * m.block_size, flops_per_token(m, m.block_size)
    print(f"  {tokens:,} tokens a step, {tokens * c.max_steps:,} in {c.max_steps:,} steps")
    print(f"  {flops:,} FLOPs a token in training, {flops * tokens * c.max_steps:.3g} in all")

    device = torch.device(pick_device(c.device))
    half = pick_dtype(device, c.dtype) != torch.float32
    plans = [(f"this run, {world} x {device.type}", half, world)]
    if device.type != "cuda":
        plans.append(("a CUDA card, fp16 or bf16", True, world))
    for title, is_half, n in plans:
        plan = memory_plan(model, m, c, is_half, n)
        print(f"  memory on {title}: about {sum(plan.values()) / 2**30:.2f} GiB, with")
        for part, size in plan.items():
            print(f"    {part:34} {size / 2**30:6.2f} GiB")

    # A third of the data sheet's 65 TFLOP/s is what well-run fp16 training reaches on a T4; an assumption, not a result.
    work = flops * tokens * c.max_steps * (4 / 3 if c.activation_checkpointing else 1)
    print(f"  time on 4 x T4: about {work / (4 * PEAK_FLOPS['T4'] / 3) / 3600:.3g} h, if a third of 65 TFLOP/s is reached")
    for cards in (1, 2, 4, 8):
        share = c.batch_size / (cards * c.micro_batch_size)
        fits = f"{share:g} micro-batches" if share.is_integer() else "does not divide"
        print(f"  on {cards} processes: {fits} a step")


# ---------------------------------------------------------------------------------------------------------------------


class Metrics:
    """metrics.jsonl, and wandb or tensorboard if asked for. Only the first process writes."""

    def __init__(self, run, logger, config, start):
        self.path, self.send = run / "metrics.jsonl", None
        rows = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= start] if start else []
        checkpoint.write_atomically(self.path, "".join(row + "\n" for row in kept))  # what follows is computed again
        try:
            if logger == "wandb":
                import wandb

                wandb.init(project="reflow", name=run.name, config=config, dir=run, id=run.name, resume="allow")
                self.send = lambda row: wandb.log(row, step=row["step"])
            elif logger == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                board = SummaryWriter(run / "tensorboard", purge_step=start + 1)
                self.send = lambda row: [board.add_scalar(k, v, row["step"]) for k, v in row.items() if v is not None]
        except ImportError:
            raise UserError(f"--logger={logger} needs a package: pip install {logger}") from None

    def write(self, **row):
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        if self.send:
            self.send(row)


def compile_blocks(model, x, y, autocast):
    """Compile each block in place if a trial step works and agrees with the plain model; else say so and do not."""
    with autocast:
        plain = model(x, y)[1].item()
    try:
        for block in model.blocks:
            block.compile()
        with autocast:
            loss = model(x, y)[1]
        loss.backward()
        if abs(loss.item() - plain) > 1e-2 * abs(plain):
            raise RuntimeError(f"loss {loss.item():.4f} instead of {plain:.4f}")
    except Exception as error:  # whatever a compiler can throw: the run does not depend on it
        for block in model.blocks:
            block._compiled_call_impl = None
        print(f"--compile is off: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    model.zero_grad(set_to_none=True)


def check_same_run(before, m, c, data_sha256):
    """Raise UserError unless the checkpoint `before` belongs to this model and data; say what else is new."""
    old = before["config"]
    if changed := [f"{k}={v} (was {old['model'].get(k)})" for k, v in asdict(m).items() if old["model"].get(k) != v]:
        raise UserError(f"{c.out_dir} holds another model: {', '.join(changed)}: give another --out_dir")
    if before["data_sha256"] != data_sha256:
        raise UserError(f"{c.out_dir} was trained on other data than {c.dataset} holds now: give another --out_dir")
    for key, value in asdict(c).items():
        if key not in FREE_TO_CHANGE and value != old["train"].get(key):
            print(f"resuming with another {key}: {old['train'].get(key)} -> {value}")


def find_dataset(name):
    """The folder of a data set; the embedded corpus is prepared when it is missing. UserError if there is none."""
    folder = Path(__file__).parent / "data" / name if "/" not in name else Path(name)
    if name == "sotu" and not (folder / "meta.json").exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        from data.sotu.prepare import prepare

        prepare()
    if dist.is_initialized():
        dist.barrier()
    return folder


def main():
    m, c = configurator.parse(ModelConfig, TrainConfig, default_config=Path(__file__).parent / "config/reflow_nano.py")
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    first = rank == 0
    say = tqdm.write if first else lambda text: None
    say(configurator.describe(m, c))
    if c.dry_run:
        return dry_run(m, c) if first else None
    if c.batch_size % (world * c.micro_batch_size):
        raise UserError(f"batch_size={c.batch_size} must be a multiple of {world} processes x {c.micro_batch_size=}")
    accumulate = c.batch_size // (world * c.micro_batch_size)

    # -- devices and precision
    device = torch.device(pick_device(c.device))
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # only what autocast leaves in fp32; no effect before Ampere
    if world > 1:
        nccl = device.type == "cuda"
        dist.init_process_group("nccl" if nccl else "gloo", device_id=device if nccl else None)
    dtype = pick_dtype(device, c.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # -- data, model, optimiser
    folder = find_dataset(c.dataset)
    train_set = Dataset(folder, "train", m.block_size, c.verify_data)
    val_set = Dataset(folder, "val", m.block_size, c.verify_data)
    bits_per_byte = val_set.tokens / val_set.bytes / math.log(2)  # of one nat per token

    torch.manual_seed(c.seed)
    model = raw = ReFlow(m).to(device)
    raw.activation_checkpointing = c.activation_checkpointing
    if c.compile:
        compile_blocks(raw, *(t[: c.micro_batch_size].to(device) for t in train_set.windows(0, 1)), autocast)
    if world > 1 and c.parallel == "fsdp":
        for block in raw.blocks:
            fully_shard(block)
        fully_shard(raw)
    elif world > 1:
        model = DistributedDataParallel(raw, device_ids=[local] if nccl else None, gradient_as_bucket_view=True)
    optimizer = make_optimizer(raw, c, device)

    # -- a new run, or the newest whole checkpoint of an old one
    run = Path(c.out_dir)
    newest, before, damaged = checkpoint.newest_whole(run)
    for message in damaged if c.resume else []:
        say(f"passed over: {message}")
    if newest and not c.resume:
        raise UserError(f"{run} holds a run at step {before['step']}: add --resume, or give another --out_dir")
    step, best, val_loss, skipped = 0, math.inf, None, 0
    if newest:
        check_same_run(before, m, c, train_set.data_sha256)
        step, best, val_loss, skipped = (before[key] for key in ("step", "best_val_loss", "val_loss", "skipped"))
        restore_state(raw, optimizer, *(checkpoint.load_tensors(newest / file) for file in checkpoint.WEIGHTS))
        scaler.load_state_dict(before["scaler"]) if scaler.is_enabled() and before["scaler"] else None
        say(f"resumed {run} at step {step} of {c.max_steps}")
    elif c.resume:
        say(f"nothing to resume in {run}: starting anew")
    metrics = None
    if first and step < c.max_steps:
        run.mkdir(parents=True, exist_ok=True)
        metrics = Metrics(run, c.logger, asdict(m) | asdict(c), step)

    def save(is_best):
        weights, moments = gather_state(raw, optimizer)  # on every process
        if first:
            state = {"config": {"model": asdict(m), "train": asdict(c)}, "data_sha256": train_set.data_sha256}
            state |= {"val_loss": val_loss, "best_val_loss": best, "skipped": skipped, "scaler": scaler.state_dict()}
            checkpoint.save(run, step, weights, moments, state | {"versions": versions()}, c.keep, is_best)
        if world > 1:
            dist.barrier()

    def validate(n_sequences):
        loss = evaluate(raw, val_set, n_sequences, c.micro_batch_size, device, autocast, rank, world)
        say(f"step {step:>6}: validation loss {loss:.4f}, {loss * bits_per_byte:.4f} bits per byte")
        if first:
            metrics.write(step=step, val_loss=loss, bits_per_byte=loss * bits_per_byte)
        return loss

    def fetch(step):
        """This process's share of a step's batch, on its way to the device."""
        batch = train_set.batch(step, c.batch_size, c.seed, rank, world)
        pin = device.type == "cuda"
        return [(t.pin_memory() if pin else t).to(device, non_blocking=True).split(c.micro_batch_size) for t in batch]

    # A signal asks for a checkpoint at the end of the step; the processes agree on it there.
    asked = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: asked.append(signal.Signals(number).name))

    peak = next((v for k, v in PEAK_FLOPS.items() if nccl_name(device).find(k) >= 0), None)
    bad, clock, timed_tokens = 0, time.perf_counter(), 0
    bar = tqdm(total=c.max_steps, initial=step, desc=run.name, unit="step", disable=None if first else True)
    if step == 0:
        val_loss = validate(c.eval_sequences)
        save(is_best=False)
    batch = fetch(step) if step < c.max_steps else None
    clock = time.perf_counter()

    while step < c.max_steps:
        torch.manual_seed(hash((c.seed, step, rank)))  # dropout is a function of the step: nothing to save
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c)
        loss = torch.zeros((), device=device)
        for i, (x, y) in enumerate(zip(*batch, strict=True)):
            last = i == accumulate - 1
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
            wait = isinstance(model, DistributedDataParallel) and not last
            with model.no_sync() if wait else contextlib.nullcontext():
                with autocast:
                    micro_loss = model(x, y, scaler.get_scale() / accumulate)[1] / accumulate
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        batch = fetch(step + 1)  # while the device is still at work

        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), c.grad_clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        summary = torch.stack((loss / world, loss.new_tensor(float(bool(asked)))))
        if world > 1:
            dist.all_reduce(summary)
        loss, stop, norm = *summary.tolist(), norm.item()
        scale = scaler.get_scale()
        if math.isfinite(loss) and math.isfinite(norm):
            scaler.step(optimizer)
            bad = 0
        else:  # the same on every process, so none of them steps
            bad, skipped = bad + 1, skipped + 1
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step, timed_tokens = step + 1, timed_tokens + c.batch_size * m.block_size
        if bad >= c.max_bad_steps:
            raise UserError(
                f"step {step}: loss or gradient was not finite {bad} times in a row: the last checkpoint of {run} is "
                f"whole; lower --lr, or try --dtype=fp32"
            )

        bar.update()
        if first and (step % c.log_interval == 0 or step == c.max_steps):
            rate = timed_tokens / (time.perf_counter() - clock)
            mfu = rate * flops_per_token(m, m.block_size) / (peak * world) if peak else None
            memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
            row = {"step": step, "loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
            row = {k: v if math.isfinite(v) else None for k, v in row.items()}  # JSON knows no NaN
            metrics.write(**row, loss_scale=scale, skipped=skipped, tokens_per_s=rate, mfu=mfu, memory_gib=memory)
            bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{rate:,.0f}")
            if bar.disable and step % (10 * c.log_interval) == 0:
                say(f"step {step:>6}: loss {loss:.4f}, {rate:,.0f} tokens/s")
        if step == c.max_steps or step % c.eval_interval == 0:
            paused = time.perf_counter()
            val_loss = validate(val_set.n_windows if step == c.max_steps else c.eval_sequences)
            if step == c.max_steps or step % c.save_interval == 0:
                is_best, best = val_loss < best, min(val_loss, best)
                save(is_best)
            clock += time.perf_counter() - paused
        if stop and step < c.max_steps:
            save(is_best=False)
            say(f"stopped by {asked[0] if asked else 'another process'} at step {step}: saved; go on with --resume")
            break
    bar.close()
    if step >= c.max_steps and val_loss is not None:
        say(f"finished {run} at step {step}: validation loss {val_loss:.4f}, {val_loss * bits_per_byte:.4f} bits per byte")
    if world > 1:
        dist.destroy_process_group()


def nccl_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


if __name__ == "__main__":
    configurator.run(main)
