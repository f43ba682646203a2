"""
Speed and memory beside what the hardware allows, and beside the alternatives, in one run.

    python bench.py                        everything, about half an hour on two CPU cores
    python bench.py --only=train,sample    parts: train, memory, sample, start, data, experiments
    python bench.py --config=config/reflow_nano.py --rounds=5

Every row is measured in processes of its own, the rows of a part taking turns for some rounds, so that a
noisy minute hits all of them; the table gives medians, ranges and ratios, and each row's limit, measured in
the same run: the matrix-product peak over the very shapes of a training step, or the bandwidth at which
memory is read. Where `transformers` is installed, its Llama of the same shape runs beside ours. Run nothing
else meanwhile.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Literal

import configurator
import files

ROOT = Path(__file__).resolve().parent
INSTRUCTIONS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")
SHIPPED = ", as shipped"  # ending of rows that run as their users run them, without our settings


@dataclass
class BenchConfig:
    only: str = ""  # parts, separated by commas; empty: all
    config: str = "config/reflow_1_small.py"  # the model of the training and sampling rows
    batch_size: int = 4  # sequences of a training step
    length: int = 512  # tokens of a sequence
    rounds: int = 3  # turns of each row
    seconds: float = 20.0  # least time measured in a turn of a training row
    device: str = "auto"  # auto: cuda, then mps, then cpu
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # bf16 if the hardware has it, fp16 on older GPUs
    out: str = "out/bench.json"  # every number of the run
    row: str = ""  # internal: measure this row in this process and print it as JSON

    def __post_init__(self):
        sizes = (f"{name} >= 1" for name in ("batch_size", "length", "rounds"))
        configurator.check(self, *sizes, "batch_size * length < 2**31", "0 <= seconds < 1e6")


def timed(f, seconds, least=3):
    """Median time of f() in seconds, after one call to warm up, over at least `least` calls and `seconds`."""
    f()
    times, start = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - start < seconds:
        t = time.perf_counter()
        f()
        times.append(time.perf_counter() - t)
    return median(times)


def peak_gib():
    """Largest resident memory of this process so far (on CUDA: allocated there)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def setup(c, stock=False):
    """(ModelConfig of --config, device, dtype). Freed memory is kept, as in train.py, unless `stock`."""
    from data.datasets import tokenizer_of
    from hardware import keep_freed_memory, pick_device, pick_dtype
    from model import ModelConfig
    from train import TrainConfig, fitted

    m, t = configurator.parse(ModelConfig, TrainConfig, argv=[c.config])
    m = fitted(m, tokenizer_of(t.dataset))
    device = pick_device(c.device)
    if device.type == "cpu" and not stock:
        keep_freed_memory()
    return m, device, pick_dtype(device, c.dtype)


def machine_row(c, _):
    """What the numbers belong to: processor or card, instructions, precision, threads, versions."""
    import torch

    from checkpoint import versions

    _, device, dtype = setup(c)
    has = torch.cpu.get_capabilities()
    name = has.get("cpu_name") or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": f"{device.type} ({name})",
        "instructions": [key for key in INSTRUCTIONS if has.get(key)],
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


# ----------------------------------------------------------------------------------------------------
# Training


def train_row(c, kind):
    """Tokens a second of whole training steps (forward, backward, clipping, AdamW) and the peak memory."""
    import torch

    m, device, dtype = setup(c, stock=kind.endswith(SHIPPED))
    m = replace(m, block_size=max(m.block_size, c.length))
    name = kind.removesuffix(SHIPPED)
    if name.endswith(" fp32"):
        dtype = torch.float32
    torch.manual_seed(0)
    net, loss_of, optimizer = contender(name.removesuffix(" fp32"), m, c, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    x = torch.randint(m.n_tokens, (c.batch_size, c.length + 1), device=device)

    def step():
        with autocast:
            loss = loss_of(x[:, :-1], x[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    seconds = timed(step, c.seconds)
    return {"tokens_per_s": c.batch_size * c.length / seconds, "peak_gib": peak_gib()}


def contender(kind, m, c, device):
    """(model, loss(x, y), optimiser) of a training row."""
    import torch

    from model import ReFlow
    from train import TrainConfig, make_optimizer

    if kind == "gpt-2 block":
        net = gpt2(m).to(device).train()
        return net, net, torch.optim.AdamW(net.parameters(), lr=6e-4, betas=(0.9, 0.95))
    if kind == "llama":
        net = llama(m).to(device).train()

        def loss_of(x, y):
            return net(input_ids=x, labels=x).loss

        return net, loss_of, torch.optim.AdamW(net.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)
    if kind == "dense":
        m = replace(m, vocab="dense", n_signal=None)
    net = ReFlow(m).to(device).train()
    if kind == "E built each step":
        build_each_step(net)
    if kind == "full logits":
        net.vocab.chunk = c.batch_size * c.length
        net.vocab.loss = lambda h, y, scale: torch.nn.functional.cross_entropy(net.vocab.logits(h).float(), y)
    return net, lambda x, y: net(x, y)[1], make_optimizer(net, TrainConfig(out_dir=""), device)


def gpt2(m):
    """GPT-2's block at this width and depth, as a plain training loop has it; forward(x, y) is the loss.

    Learned positions, LayerNorm, fused attention, a GELU layer of four widths, biases, tied full logits
    (Radford et al., 2019).
    """
    import torch.nn.functional as F
    from torch import arange, nn

    d, n_head = m.n_embd, m.n_head

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def forward(self, x):
            heads = [
                t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(d, 2)
            ]
            y = F.scaled_dot_product_attention(*heads, is_causal=True)  # (B, H, T, D)
            x = x + self.out(y.transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class GPT2(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(m.rows, d), nn.Embedding(m.block_size, d)
            self.blocks = nn.Sequential(*(Block() for _ in range(m.n_layer)))
            self.norm = nn.LayerNorm(d)
            nn.init.normal_(self.tokens.weight, std=0.02)

        def forward(self, x, y):
            h = self.tokens(x) + self.places(arange(x.size(1), device=x.device))
            logits = F.linear(self.norm(self.blocks(h)), self.tokens.weight)  # (B, T, V)
            return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    return GPT2()


def build_each_step(net):
    """E = recipe @ basis formed anew for each use, the way it is written down; the same function."""
    import torch.nn.functional as F

    from model import ChunkedCrossEntropy

    def loss(h, y, scale=1.0):
        return ChunkedCrossEntropy.apply(h, net.vocab.matrix(), y, scale, net.vocab.chunk, True)

    net.vocab.embed = lambda idx: F.embedding(idx, net.vocab.matrix())
    net.vocab.loss = loss


def llama(m):
    """transformers' Llama of the same shape, E one tied matrix."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from formats.llama import llama_config

    return LlamaForCausalLM(LlamaConfig(**llama_config(m, torch.float32), use_cache=False))


def products(m, tokens, chunk):
    """[(rows, inner, columns, times)] of a training step's matrix products, forward and both gradients."""
    d, kv = m.n_embd, m.kv_heads * m.head_dim
    linear = [
        (d, d, 2 * m.n_layer),
        (d, kv, 2 * m.n_layer),
        (d, m.hidden, 2 * m.n_layer),
        (m.hidden, d, m.n_layer),
    ]
    shapes = []
    if m.vocab != "dense":
        linear += [(m.signals, d, 1), (d, m.signals, 1)]
    for inner, columns, times in linear:
        shapes += [
            (tokens, inner, columns, times),
            (tokens, columns, inner, times),
            (columns, tokens, inner, times),
        ]
    width, parts, rows = m.signals, max(1, tokens // chunk), min(chunk, tokens)
    shapes += [
        (rows, width, m.rows, parts),
        (rows, m.rows, width, parts),
        (m.rows, rows, width, parts),
    ]
    return shapes


def peak_row(c, _):
    """FLOP/s of bare matrix products at the shapes of a step, weighted as they occur in it."""
    import torch

    from hardware import flops_per_token
    from model import Vocab

    m, device, dtype = setup(c)
    tokens, work, spent = c.batch_size * c.length, 0, 0.0
    for n, k, columns, times in products(m, tokens, Vocab.chunk):
        a, b = (
            torch.randn(n, k, device=device, dtype=dtype),
            torch.randn(columns, k, device=device, dtype=dtype),
        )
        out = torch.empty(n, columns, device=device, dtype=dtype)

        def product(a=a, b=b, out=out):
            torch.mm(a, b.T, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize()

        spent += times * timed(product, 0.2)
        work += times * 2 * n * k * columns
    step = flops_per_token(replace(m, block_size=c.length), c.length) * tokens
    return {"flop_per_s": work / spent, "step_flop": step, "tokens": tokens, "share_of_step": work / step}


def loss_row(c, kind):
    """Memory of head and loss alone, forward and backward, and their error: "tokens, chunk"."""
    import torch

    from model import ReFlow

    m, device, dtype = setup(c)
    tokens, chunk = map(int, kind.split(", "))
    net = ReFlow(replace(m, n_layer=1)).to(device)
    net.vocab.chunk = chunk
    h = torch.randn(tokens, m.n_embd, device=device, requires_grad=True)
    y = torch.randint(m.n_tokens, (tokens,), device=device)
    before = peak_gib()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = net.vocab.loss(h, y)
    loss.backward()
    peak = peak_gib() - before
    with torch.no_grad():
        z, w = net.vocab.signals(h).double(), net.vocab.recipes().double()
        parts = zip(z.split(128), y.split(128), strict=True)
        exact = sum(torch.nn.functional.cross_entropy(a @ w.T, b, reduction="sum").item() for a, b in parts)
    return {"peak_gib": peak, "error": abs(loss.item() - exact / tokens)}


# ----------------------------------------------------------------------------------------------------
# Sampling


def bandwidth_row(c, _):
    """Bytes a second at which memory is read: the best of a sum and a matrix-vector product of 1 GiB."""
    import torch

    _, device, _ = setup(c)
    x = torch.ones(2**14, 2**14, device=device)  # 1 GiB
    v = torch.ones(2**14, device=device)

    def wait(value):
        return value.flatten()[0].item()

    best = min(timed(lambda: wait(x.sum()), 1.0), timed(lambda: wait(x @ v), 1.0))
    return {"bytes_per_s": x.numel() * 4 / best}


def sample_row(c, kind):
    """Greedy tokens a second: "cached 1" and "llama 1" after a prompt of 16, "uncached 1" at 512 tokens."""
    import torch

    from hardware import pick_threads
    from model import ReFlow

    m, device, dtype = setup(c)
    how, batch = kind.split()
    batch, new = int(batch), 64
    torch.manual_seed(0)
    prompt = torch.randint(m.n_tokens, (16,)).tolist()
    if how == "llama":
        net = llama(m).to(device, dtype).eval()
        ids = torch.tensor([prompt] * batch, device=device)
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True}
        with torch.no_grad():
            seconds = timed(lambda: net.generate(ids, pad_token_id=0, **settings), 5.0, least=2)
    else:
        net = ReFlow(m).to(device, dtype).eval()
        if device.type == "cpu":
            pick_threads(net, batch)  # as sample.py does
        if how == "uncached":
            prompt, new = torch.randint(m.n_tokens, (min(512, m.block_size - 8),)).tolist(), 4
        settings = {"temperature": 0, "use_cache": how == "cached"}
        seconds = timed(lambda: net.generate([prompt] * batch, new, **settings), 5.0, least=2)
    weights = sum(p.numel() for p in net.parameters()) * torch.finfo(dtype).bits // 8
    return {"tokens_per_s": batch * new / seconds, "weight_bytes": weights}


# ----------------------------------------------------------------------------------------------------
# Start, data, experiments


def start_row(c, kind):
    """Seconds: of a command's --help; of opening a checkpoint of reflow_1's size, reading its bytes."""
    if kind != "load":
        command = [sys.executable, str(ROOT / kind), "--help"]
        return {"seconds": timed(lambda: subprocess.run(command, capture_output=True, check=True), 2.0)}
    import torch

    import checkpoint
    from model import ModelConfig, ReFlow
    from train import TrainConfig

    m, _ = configurator.parse(ModelConfig, TrainConfig, argv=["config/reflow_1.py"])
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            shapes = ReFlow(m).state_dict()
        model = {name: torch.zeros(w.shape) for name, w in shapes.items()}
        state = {"config": {"model": asdict(m)}}
        checkpoint.save(Path(folder), 0, model, {"none": torch.zeros(1)}, state, keep=1, best=True)
        del model
        file = Path(folder) / "step_000000" / "model.safetensors"

        def read():
            with open(file, "rb", buffering=0) as f:
                while f.read(2**24):
                    pass

        plain = timed(read, 1.0)
        seconds = timed(lambda: checkpoint.load_model(file.parent), 1.0)
        return {"seconds": seconds, "plain_read_s": plain, "bytes": file.stat().st_size}


def data_row(c, kind):
    """Preparation against raw tiktoken on the same text, MB/s; a training batch's time in the loader."""
    from data.datasets import find_dataset
    from data.shards import Dataset
    from data.sotu.prepare import speeches
    from data.tokenizer import gpt2

    texts = [path.read_text(encoding="utf-8") for path in speeches()]
    size = sum(len(t.encode()) for t in texts) / 1e6
    pieces = [[t[i : i + 5000] for i in range(0, len(t), 5000)] for t in texts]
    if kind == "tiktoken":
        parts = sum(pieces, [])
        seconds = timed(lambda: gpt2().encoding.encode_ordinary_batch(parts, num_threads=os.cpu_count()), 3.0)
        return {"mb_per_s": size / seconds}
    if kind == "loader":
        dataset = Dataset(find_dataset("sotu"), "train", c.length)
        steps = iter(range(10**9))
        return {"seconds": timed(lambda: dataset.batch(next(steps), c.batch_size, 0), 1.0)}
    seconds, copies = [], (2, 10)  # the difference of two sizes is free of the start of the process
    for n in copies:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "text"
            source.mkdir()
            for i, parts in enumerate(pieces * n):
                (source / f"{i}.txt").write_text("<|endoftext|>".join(parts), encoding="utf-8")
            command = [sys.executable, str(ROOT / "data/openwebtext/prepare.py"), f"--source={source}/*.txt"]
            start = time.perf_counter()
            subprocess.run([*command, f"--out={folder}/out"], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
    return {"mb_per_s": (copies[1] - copies[0]) * size / (seconds[1] - seconds[0])}


def experiments_row(c, kind):
    """Seconds to ablate each of 1,024 signals on 200 prompts at reflow_1's head: closed form, brute force."""
    import torch

    import attribution
    from dictionary import Dictionary
    from model import N_TOKENS

    _, device, _ = setup(c)
    torch.manual_seed(0)
    V, S, n = N_TOKENS, 1024, 200 if kind == "closed form" else 2
    d = Dictionary("native", torch.randn(V, S, device=device), torch.eye(S, device=device))
    h = torch.randn(n, S, device=device) / 32
    z = d.activations(h) @ d.codes.T  # (n, V), logits
    target, foil = z.topk(2).indices.T
    pred = attribution.Prediction(h, z.softmax(-1), target, foil)
    start = time.perf_counter()
    if kind == "closed form":
        strongest = attribution.first_order_change(pred, d).argmin(1)
        attribution.remove_signals(pred, d, strongest)
        return {"seconds": time.perf_counter() - start}
    change = -attribution.contributions(pred, d)  # (n, S), of the logit difference
    start = time.perf_counter()
    rows, worst = torch.arange(n), 0.0
    for s in range(64):
        after = h @ (d.codes.index_fill(1, torch.tensor([s], device=device), 0)).T
        brute = (after - z)[rows, target] - (after - z)[rows, foil]
        worst = max(worst, (brute - change[:, s]).abs().max().item())
    seconds = (time.perf_counter() - start) / 64 * S  # of this many prompts; nearly the same for 200
    return {"seconds": seconds, "worst_difference": worst}


# ----------------------------------------------------------------------------------------------------
# The parts and their tables

MEASURES = {
    "machine": machine_row,
    "train": train_row,
    "peak": peak_row,
    "loss": loss_row,
    "bandwidth": bandwidth_row,
    "sample": sample_row,
    "start": start_row,
    "data": data_row,
    "experiments": experiments_row,
}


def rows_of(part):
    """The rows of a part, as "measure: argument"."""
    with_llama = bool(find_spec("transformers"))
    return {
        "train": [
            "peak: ",
            "train: factored",
            "train: dense",
            "train: E built each step",
            "train: full logits",
        ]
        + ["train: llama", f"train: llama{SHIPPED}"] * with_llama
        + [f"train: gpt-2 block{SHIPPED}", f"train: gpt-2 block fp32{SHIPPED}"],
        "memory": [
            f"loss: {n}, {c}" for n, c in ((1024, 256), (1024, 1024), (4096, 256), (4096, 1024), (4096, 4096))
        ],
        "sample": ["bandwidth: ", "sample: cached 1", "sample: cached 16", "sample: uncached 1"]
        + ["sample: llama 1", "sample: llama 16"] * with_llama,
        "start": ["start: sample.py", "start: train.py", "start: load"],
        "data": ["data: tiktoken", "data: prepare", "data: loader"],
        "experiments": ["experiments: closed form", "experiments: brute force"],
    }[part]


def measure(rows, c):
    """{row: {number: [one a round]}}, the rows taking turns, each in a process of its own."""
    found = {row: {} for row in rows}
    for turn in range(c.rounds):
        for row in rows:
            print(f"\r  round {turn + 1} of {c.rounds}: {row:40}", end="", file=sys.stderr, flush=True)
            command = [sys.executable, str(ROOT / "bench.py"), *sys.argv[1:], f"--row={row}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise configurator.UserError(f"row {row} failed:\n{done.stderr[-2000:]}")
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                found[row].setdefault(name, []).append(value)
    print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
    return found


def spread(values, form="{:.3g}"):
    """Median (lowest to highest)."""
    low, mid, high = (form.format(v) for v in (min(values), median(values), max(values)))
    return f"{mid} ({low} to {high})"


def show(part, found):
    """The table of a part, as lines."""

    def mid(row, name):
        return median(found[row][name])

    lines = []
    if part == "train":
        limit, step = mid("peak: ", "flop_per_s"), mid("peak: ", "step_flop")
        lines.append(f"limit: {limit / 1e9:.0f} GFLOP/s, matrix products at a step's own shapes")
        for row, numbers in found.items():
            if row != "peak: ":
                rates = numbers["tokens_per_s"]
                ratios = [a / b for a, b in zip(rates, found["train: factored"]["tokens_per_s"], strict=True)]
                tokens = found["peak: "]["tokens"][0]
                share, name = median(rates) * step / tokens / limit, row.split(": ")[1]
                lines.append(
                    f"{name:32} {spread(rates, '{:,.0f}'):26} tokens/s  x{median(ratios):<5.2f} "
                    f"{share:>4.0%} of the limit  {median(numbers['peak_gib']):.2f} GiB"
                )
    elif part == "memory":
        for row, numbers in found.items():
            tokens, chunk = row.split(": ")[1].split(", ")
            error = max(numbers["error"])
            peak = median(numbers["peak_gib"])
            lines.append(f"{tokens:>5} tokens, chunks of {chunk:>5}: {peak:.2f} GiB, loss off by {error:.1e}")
    elif part == "sample":
        bandwidth = mid("bandwidth: ", "bytes_per_s")
        lines.append(f"limit: {bandwidth / 1e9:.1f} GB/s, reading memory")
        for row, numbers in found.items():
            if row != "bandwidth: ":
                rates, batch = numbers["tokens_per_s"], int(row.split()[-1])
                limit = bandwidth / numbers["weight_bytes"][0] * batch
                ratio = median(rates) / mid("sample: cached 1", "tokens_per_s")
                lines.append(
                    f"{row.split(': ')[1]:12} {spread(rates, '{:,.1f}'):26} tokens/s  x{ratio:<6.2f} "
                    f"{median(rates) / limit:>4.0%} of reading the weights once a token"
                )
    elif part == "start":
        for row, numbers in found.items():
            text = f"{row.split(': ')[1]:12} {spread(numbers['seconds'], '{:.2f}')} s"
            if "bytes" in numbers:
                gb, plain = numbers["bytes"][0] / 1e9, median(numbers["plain_read_s"])
                text += f" for {gb:.2f} GB of checkpoint; reading the file takes {plain:.2f} s"
            else:
                text += " for --help"
            lines.append(text)
    elif part == "data":
        raw, own = found["data: tiktoken"]["mb_per_s"], found["data: prepare"]["mb_per_s"]
        ratio = median([a / b for a, b in zip(own, raw, strict=True)])
        lines.append(f"tiktoken, all cores  {spread(raw, '{:.1f}')} MB/s")
        lines.append(f"prepare.py           {spread(own, '{:.1f}')} MB/s, x{ratio:.2f}")
        lines.append(f"loader               {mid('data: loader', 'seconds') * 1e3:.2f} ms a batch")
    else:
        closed, brute = (found[f"experiments: {kind}"] for kind in ("closed form", "brute force"))
        lines.append(
            f"200 prompts x 1,024 signals, V = 50,257: closed form {spread(closed['seconds'], '{:.1f}')} s"
        )
        lines.append(
            f"brute force, scaled up from 64 signals: {spread(brute['seconds'], '{:.0f}')} s for 2; "
            f"they differ by at most {max(brute['worst_difference']):.1e}"
        )
    return lines


def describe(machine):
    """What the numbers belong to, a line."""
    instructions = " ".join(machine["instructions"]) or "none of " + " ".join(INSTRUCTIONS)
    where = f"{machine['dtype']} on {machine['device']}, {instructions}, {machine['threads']} threads"
    return f"{where}; torch {machine['versions']['torch']}"


def main():
    (c,) = configurator.parse(BenchConfig)
    if c.row:
        kind, _, argument = c.row.partition(": ")
        if not argument.endswith(SHIPPED):
            import threads
        print(json.dumps(MEASURES[kind](c, argument)))
        return
    parts = ("train", "memory", "sample", "start", "data", "experiments")
    chosen = [p.strip() for p in c.only.split(",") if p.strip()] or parts
    if unknown := [p for p in chosen if p not in parts]:
        raise configurator.UserError(f"--only={unknown[0]}: one of {', '.join(parts)}")
    from checkpoint import write_atomically

    with files.lock(Path(c.out)):  # also an error now, not after half an hour, if it cannot be written
        machine = measure(["machine: "], replace(c, rounds=1))["machine: "]
        results = {"config": asdict(c), "machine": {key: values[0] for key, values in machine.items()}}
        print(describe(results["machine"]))
        for part in chosen:
            found = measure(rows_of(part), c)
            results[part] = found
            print(f"\n{part}", *show(part, found), sep="\n  ", flush=True)
            write_atomically(Path(c.out), json.dumps(results, indent=1))
    print(f"\n{c.out}")


if __name__ == "__main__":
    configurator.run(main)
