"""
What the machine gives, and what a model asks of it: devices, processes, precisions, FLOPs, memory, time.
"""

import contextlib
import ctypes
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import torch

from configurator import UserError
from model import ReFlow

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the names of settings

THREADS = torch.get_num_threads()  # at the start of a process: OMP_NUM_THREADS, else one for each core

# Dense half-precision peak, TFLOP/s, from the makers' data sheets; for the utilisation column (MFU).
PEAK_TFLOPS = {
    "T4": 65,
    "V100": 125,
    "A100": 312,
    "A10": 125,
    "L40S": 362,
    "L4": 121,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "RTX 3090": 71,
    "RTX 4090": 165,
}


def peak_flops(device):
    """FLOP/s that the data sheet of a CUDA card promises, None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((1e12 * peak for card, peak in PEAK_TFLOPS.items() if card in name), None)


def parameter_table(model):
    """Parameters by part: {"recipe": ..., "basis": ..., "attention": ..., "mlp": ..., "norms": ...}."""
    part = {"recipe": "recipe", "value": "recipe", "core": "core", "basis": "basis", "gain": "gains"}
    part |= {"vocab": "embedding", "attn": "attention", "mlp": "mlp"}
    table = {}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        key = next((part[word] for word in part if word in words), "norms")
        table[key] = table.get(key, 0) + parameter.numel()
    return table


def count_parameters(config):
    """Parameters of the model that a ModelConfig describes; no memory is taken for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in ReFlow(config).parameters())


def flops_per_token(config, length):
    """Floating-point operations of a training step per token, at sequences of `length`: three times the
    forward pass, which spends 2 on each weight of each product and 4 * length * d a layer on attention
    (not halved for causality, as in Chowdhery et al., 2022, appendix B). A sparse vocabulary forms E once for
    all tokens, which is not counted."""
    c, d = config, config.n_embd
    layer = 2 * d * d + 2 * d * c.kv_heads * c.head_dim + 3 * d * c.hidden
    vocab = c.rows * c.signals + (2 + c.n_layer * c.reinject) * c.signals * d
    if c.vocab in ("dense", "sparse"):
        vocab = c.rows * d
    return 3 * (2 * (c.n_layer * layer + vocab) + 4 * c.n_layer * length * d)


def pick_device(name="auto"):
    """The torch.device that `name` means; `auto` is cuda, then mps, then cpu. UserError if it is not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind, _, index = name.partition(":")
    last = torch.cuda.device_count() - 1 if kind == "cuda" else 0
    if name != "auto" and not (here.get(kind) and (index or "0").isdecimal() and int(index or 0) <= last):
        raise UserError(
            f"no device {name} here: --device is one of auto, {', '.join(k for k in here if here[k])}"
        )
    return torch.device(next(k for k in here if here[k]) if name == "auto" else name)


def processes():
    """(rank, local rank, number of processes) as torchrun sets them; (0, 0, 1) without it.

    UserError for an environment that a scheduler left half set: it would train alone, or wait for ever.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    numbers = [found.get(name, default) for name, default in zip(names, ("0", "0", "1"), strict=False)]
    whole = all(number.isdecimal() for number in numbers)
    rank, local, world = map(int, numbers) if whole else (0, 0, 1)
    if not whole or not local <= rank < world or (world > 1 and len(found) < len(names)):
        given = " ".join(f"{name}={value}" for name, value in found.items())
        remedy = f"start with torchrun, or `unset {' '.join(found)}`"
        raise UserError(f"{given} is set, but not as torchrun sets it: {remedy}")
    return rank, local, world


def keep_freed_memory():
    """Let glibc keep large freed blocks for the next tensors of a training step.

    Otherwise each goes back to the system, and the kernel zeroes fresh pages for the next: a seventh of a
    step's CPU time where it was measured (LOG.md). Does nothing where there is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


ONE_THREAD = 2**27  # bytes of weights, times rows, up to which one thread generates as fast as two (LOG.md)


@contextlib.contextmanager
def one_thread():
    """torch and numpy on one thread of the CPU: results do not depend on how many it has."""
    from threadpoolctl import threadpool_limits  # of scikit-learn

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def side_by_side(work, parts):
    """Call work(part) for all parts, several at a time on the CPU, each with one thread to itself.

    The result does not depend on their number.
    """
    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(work, parts):
            pass  # an error in a part is raised here


def pick_threads(model, rows=1):
    """Let one thread compute where threads would mostly wait: generation of few rows with a small model.

    OMP_NUM_THREADS decides where it is set.
    """
    size = rows * sum(p.numel() * p.element_size() for p in model.parameters())
    if "OMP_NUM_THREADS" not in os.environ and size <= ONE_THREAD:
        torch.set_num_threads(1)


def pick_dtype(device, name="auto"):
    """The precision to compute in on `device`: bf16 where hardware has it, fp16 on older GPUs, else fp32.

    torch.cuda.is_bf16_supported() is no guide: it says True on a T4, which emulates bf16 slowly.
    """
    if name == "auto":
        kind = torch.device(device).type
        if kind == "cuda":
            name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
        elif kind == "cpu":
            has = torch.cpu.get_capabilities()
            name = "bf16" if any(has.get(k) for k in ("avx512_bf16", "amx_bf16", "amx_tile")) else "fp32"
        else:
            name = "fp32"
    return DTYPES[name]


def activation_bytes(c, half):
    """Bytes that a token leaves in a block for the backward pass; inputs of norms stay fp32."""
    b, d, kv = (2 if half else 4), c.n_embd, c.kv_heads * c.head_dim
    norms = 4 * (d + d)  # the residual stream before each norm
    attention = b * (d + d + kv + kv + d + d)  # normed input; q, k, v rotated; output; its heads side by side
    mlp = b * (d + 4 * c.hidden)  # normed input; gate, up, silu(gate), product
    return norms + attention + mlp


def memory_plan(model, m, c, half, world):
    """{part: bytes} of the peak on one of `world` devices: in the loss, when every activation is alive."""
    n, tokens = sum(p.numel() for p in model.parameters()), c.micro_batch_size * m.block_size
    shards = world if c.parallel == "fsdp" else 1
    of_muon = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2) * (c.optimizer == "muon")
    layer, chunk = activation_bytes(m, half), min(tokens, model.vocab.chunk)
    layers = m.n_layer * layer
    if c.activation_checkpointing:  # a block at a time, and each one's input
        layers = layer + m.n_layer * 4 * m.n_embd
    columns = m.n_embd if m.vocab in ("dense", "sparse") else m.signals
    # The loss holds logits and, in fp32, probabilities; the gradient summed so far and one chunk's share.
    chunk_bytes, gradient_bytes = (2 + 4, 4 + 2) if half else (4 + 4, 4)
    plan = {
        "weights, fp32": 4 * n / shards,
        "gradients, fp32": 4 * n / shards,
        "moments of the optimiser, fp32": (8 * n - 4 * of_muon) / shards,
        "weights in half precision": 2 * n * half,
        "activations": layers * tokens,
        "tokens of two steps": 2 * 2 * 8 * m.block_size * c.batch_size / world,
        "loss: a chunk of logits": chunk_bytes * chunk * m.rows,
        "loss: gradient of the vocabulary": gradient_bytes * m.rows * columns,
    }
    if m.vocab == "topk":  # after ReLU, after Top-K, and the places of the k largest
        plan["sparse recipes"] = m.rows * (8 * columns + 8 * m.top_k)
    if m.vocab == "sparse":  # E and its gradient
        plan["E"] = 8 * m.rows * columns
    return plan


def check_room(m, c, device, half, world, run):
    """UserError if a run cannot fit: it needs twice the memory of its device, or more disk than is left."""
    with torch.device("meta"):
        model = ReFlow(m)
    need, have = sum(memory_plan(model, m, c, half, world).values()), math.inf
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):  # not on Windows
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > 2 * have:  # the plan is an estimate
        sizes = f"about {need / 2**30:,.0f} GiB of memory, {device} has {have / 2**30:,.0f}"
        raise UserError(f"this run needs {sizes}: see --dry_run, and lower a size or --micro_batch_size")
    folder = next(path for path in (run, *run.resolve().parents) if path.exists())
    need, have = 12 * sum(p.numel() for p in model.parameters()), shutil.disk_usage(folder).free
    if need > have:
        sizes = f"a checkpoint takes {need / 1e9:,.2f} GB, the disk has {have / 1e9:,.2f} GB left"
        raise UserError(f"--out_dir={run}: {sizes}: free some, or give another")


def trace_steps(path, steps, say):
    """A started torch.profiler whose step() ends each step: it writes the second to the fourth to `path`.

    None if so many steps are not to come.
    """
    if steps < 4:
        say("no profile: it takes 4 steps")
        return None
    from torch.profiler import profile, schedule  # most runs need none

    def write(profiler):
        profiler.export_chrome_trace(str(path))
        say(f"profile of 3 steps in {path}: open it at https://ui.perfetto.dev or chrome://tracing")

    profiler = profile(schedule=schedule(wait=0, warmup=1, active=3, repeat=1), on_trace_ready=write)
    profiler.start()
    return profiler


def dry_run(m, c):
    """Print what a run needs; train nothing, read no data, write nothing."""
    _, _, world = processes()
    with torch.device("meta"):
        model = ReFlow(m)
    table = parameter_table(model)
    for part, n in table.items():
        print(f"  {part:10} {n:>13,} parameters")
    print(f"  {'total':10} {sum(table.values()):>13,} parameters")

    tokens, flops = c.batch_size * m.block_size, flops_per_token(m, m.block_size)
    print(f"  {tokens:,} tokens a step, {tokens * c.max_steps:,} in {c.max_steps:,} steps")
    print(f"  {flops:,} FLOPs a token in training, {flops * tokens * c.max_steps:.3g} in all")

    device = pick_device(c.device)
    half = pick_dtype(device, c.dtype) != torch.float32
    plans = [(f"this run, {world} x {device.type}", half, world)]
    if device.type != "cuda":
        plans.append(("a CUDA card, fp16 or bf16", True, world))
    for title, is_half, n in plans:
        plan = memory_plan(model, m, c, is_half, n)
        print(f"  memory on {title}: about {sum(plan.values()) / 2**30:.2f} GiB, with")
        for part, size in plan.items():
            print(f"    {part:34} {size / 2**30:6.2f} GiB")

    # An assumption, not a measurement: fp16 training reaches a third of the data sheet's peak on a T4.
    work = flops * tokens * c.max_steps * (4 / 3 if c.activation_checkpointing else 1)
    hours = work / (4 * 1e12 * PEAK_TFLOPS["T4"] / 3) / 3600
    print(
        f"  time on 4 x T4: about {hours:,.1f} h, if a third of {PEAK_TFLOPS['T4']} TFLOP/s each is reached"
    )
    for cards in (1, 2, 4, 8):
        share = c.batch_size / (cards * c.micro_batch_size)
        fits = f"{share:g} micro-batches" if share.is_integer() else "does not divide"
        print(f"  on {cards} process{'es' * (cards > 1)}: {fits} a step")
