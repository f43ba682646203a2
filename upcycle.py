"""
A trained model gets sparse recipes: its embedding becomes mean + recipes @ atoms, with few signals a token.

    python upcycle.py --run=out/smollm2 --to=out/reflow-smol --dataset=offline-smollm
    python upcycle.py --run=out/smollm2 --to=out/reflow-smol-128 --n_nonzero=128
    python upcycle.py --run=out/smollm2 --to=out/smollm2-exact --keep_rest     the same function as before

The model stays as it is but for its vocabulary. A stop is no loss: the same command goes on.

Method
    1. The model reads `tokens` tokens of text. Its final states h give the metric in which an error of E
       costs KL: M = d H / (2 tr H) + I / 2, where H is the mean of h h'. One half is for the output, one for
       the input.
    2. Sparse codes of the rows of (E - mean) M^(1/2) (dictionary.sparse), weighted by how often a token is
       predicted: recipes, and atoms, which M^(-1/2) brings back.
    3. Distillation of the output: entries, atoms and mean learn to give the next-token probabilities that the
       model gives from its own final states. The places of the entries stay. It harms the input: 0 steps.
    4. Distillation of the whole: the input has the new embedding, too. Blocks and norms stay.

    After each it measures on held-out text: bits per byte, and KL to the model as it was, nats per token.
    --keep_rest leaves 3 and 4 out and keeps what the recipes miss as a dense core, which is no signal: the
    function is that of the model, but for rounding.

Cost
    A model of 5.5M parameters, 32 of 1,024 signals, --rounds=10: 4 minutes of CPU time, two thirds of it the
    dictionary. It grows with rows x entries x signals. SmolLM2-135M, 64 of 2,304 signals: an hour on two
    cores (reading 4 minutes, dictionary 30, distillation 15), 6 GB of memory.
"""

import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import threads
import torch
from safetensors.torch import save as save_tensors

import checkpoint
import configurator
import dictionary
import files
from configurator import UserError
from data.datasets import find_dataset, mean_loss, text_folder
from data.shards import Dataset
from data.tokenizer import kept
from hardware import keep_freed_memory, pick_device, pick_dtype
from model import SparseVocab
from recoding import PART, SAMPLE, explained, final_states, measure, read, rows_of, statistics


@dataclass
class UpcycleConfig:
    run: str | None = None  # a dense run's folder or one of its step_... folders
    to: str | None = None  # the folder of the new run
    n_signal: int | None = None  # signals, S; None: 4 n_embd
    n_nonzero: int = 64  # signals of a recipe, on average over all rows
    keep_rest: bool = False  # the same function: what the recipes miss stays as a dense core
    dataset: str | None = None  # text that it learns from; None: the run's, else the embedded corpus
    test: str | None = None  # text that it is measured on, its validation split; None: that of --dataset
    block_size: int = 256  # tokens of a window, at most the run's
    tokens: int = 262_144  # of text that the model reads
    starts: int = 2  # random starts of the dictionary
    rounds: int = 12  # of the dictionary
    output_steps: int = 0  # of distillation of the output, 1,024 tokens each
    whole_steps: int = 250  # of distillation of the whole, 1,024 tokens each
    lr: float = 3e-3  # times the root mean square of what is trained, falling to zero in each distillation
    test_windows: int = 32  # that measurements are made on
    seed: int = 0
    device: str = "auto"  # auto: cuda, then mps, then cpu
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of products in distillation

    def __post_init__(self):
        if self.to is None:
            raise ValueError("--to is missing: name the folder of the new run, for example --to=out/upcycled")
        counts = ("n_nonzero", "block_size", "starts", "rounds", "test_windows")
        rules = [f"{name} >= 1" for name in counts]
        rules += [f"{name} >= 0" for name in ("output_steps", "whole_steps")]
        configurator.check(self, *rules, "tokens >= block_size", "0 < lr < 1", configurator.SEED)


STEP = 1024  # tokens of a step of distillation
SEQUENCES, MEASURED = 8, 1024  # for the loss of the new run: sequences and their tokens
SAVED = 50  # steps of distillation between two savings
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of Adam


# ----------------------------------------------------------------------------------------------------
# Sparse recipes


def sparse_codes(E, H, p, c):
    """{"mean": (d,), "codes": (V, S), "atoms": (S, d)}, codes @ atoms close to E - mean as KL sees it."""
    seen = rows_of(E, H, p)
    how = (c.n_signal or 4 * E.size(1), c.n_nonzero, seen.weights, c.seed, c.starts, c.rounds, SAMPLE)
    found = dictionary.sparse(seen.rows, *how)
    print(f"dictionary: {', '.join(f'{key} {value:.4g}' for key, value in found.fit.items())}", flush=True)
    return {"mean": seen.mean, "codes": found.codes, "atoms": found.atoms @ seen.back}


def with_recipes(net, config, found):
    """The ReFlow `net` with the vocabulary that sparse_codes has found; a core, if any, keeps the rest."""
    E = net.vocab.matrix().detach().float().cpu()  # (V, d)
    atoms, mean = found["atoms"], found["mean"]
    codes = torch.zeros(len(E), len(atoms))  # of padding rows: none
    codes[: len(found["codes"])] = found["codes"]
    core = E - mean - codes @ atoms if config.n_core else E.new_zeros(len(E), 0)
    basis = torch.cat([atoms, torch.eye(config.n_embd)[: config.n_core], mean[None]])
    return checkpoint.with_vocab(net, config, SparseVocab.tensors(codes, core, basis, config.n_nonzero))


# ----------------------------------------------------------------------------------------------------
# Distillation


def divergence(h, E, target, teacher_E):
    """Mean KL(p || q), nats: q of the states h (n, d) and E (V, d), p of `target` (n, d) and `teacher_E`.

    Returns it and its gradients with respect to h and E. The logits of PART states are held at a time.
    """
    total = 0.0
    grad_E = torch.zeros(E.shape, device=E.device)
    grad_h = torch.empty_like(h)
    for part in range(0, len(h), PART):
        chosen = slice(part, part + PART)
        log_p = (target[chosen] @ teacher_E.T).float().log_softmax(-1)  # (n, V)
        log_q = (h[chosen] @ E.T).float().log_softmax(-1)
        p = log_p.exp()
        total += float((p * (log_p - log_q)).sum()) / len(h)
        gradient = ((log_q.exp() - p) / len(h)).to(E.dtype)
        grad_h[chosen] = gradient @ E
        grad_E += (gradient.T @ h[chosen]).float()
    return total, grad_h, grad_E


class Distillation:
    """The training of a sparse vocabulary to predict as the dense one did, from the same text."""

    def __init__(self, net, teacher_E, windows, states, c, dtype):
        self.net, self.windows, self.states, self.c = net, windows, states, c
        self.dtype, self.device = dtype, teacher_E.device
        self.teacher_E = teacher_E.to(dtype)
        self.trained = {name: p for name, p in net.vocab.named_parameters() if p.numel()}
        net.blocks.requires_grad_(False)
        net.norm.requires_grad_(False)

    def order(self, n_steps, whole):
        """Which windows each step reads, (n_steps, windows of a step)."""
        generator = torch.Generator().manual_seed(self.c.seed * 2 + whole)
        each = max(1, STEP // self.windows.size(1))
        times = math.ceil(n_steps * each / len(self.windows))
        found = [torch.randperm(len(self.windows), generator=generator) for _ in range(times)]
        return torch.cat(found)[: n_steps * each].view(n_steps, each)

    def loss(self, chosen, whole):
        """Mean KL over the windows `chosen`, and its gradient in every trained parameter."""
        target = self.states[chosen].flatten(0, 1).to(self.device, self.dtype)  # (n, d)
        vocab = self.net.vocab.built()
        n = len(self.teacher_E)
        h = target
        if whole:
            with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
                h = self.net.encode(self.windows[chosen].to(self.device), vocab=vocab).flatten(0, 1)
        E = vocab.weight[:n]
        kl, grad_h, grad_E = divergence(
            h.detach().to(self.dtype), E.detach().to(self.dtype), target, self.teacher_E
        )
        outputs = [(E, grad_E)] + ([(h, grad_h.to(h.dtype))] if whole else [])
        torch.autograd.backward(*map(list, zip(*outputs, strict=True)))
        return kl

    def run(self, n_steps, whole, path):
        """Train for n_steps, from where the file `path` says that an earlier run stopped."""
        adam = torch.optim.Adam(
            [{"params": [p]} for p in self.trained.values()], betas=(0.9, 0.99), eps=1e-12
        )
        rates = [self.c.lr * p.detach().square().mean().sqrt().item() for p in self.trained.values()]
        first = 0
        if path.exists():
            first, rates = self.restore(path, adam)
        order = self.order(n_steps, whole)
        what = "distilling the whole" if whole else "distilling the output"
        found = []  # KL of each step since the last line
        for step in range(first, n_steps):
            for group, rate in zip(adam.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / n_steps)) / 2
            found.append(self.loss(order[step], whole))
            adam.step()
            adam.zero_grad(set_to_none=True)
            if (step + 1) % SAVED == 0 or step + 1 == n_steps:
                self.save(path, adam, step + 1, rates)
                print(f"{what}: step {step + 1} of {n_steps}, KL {sum(found) / len(found):.4f}", flush=True)
                found.clear()

    def save(self, path, adam, step, rates):
        """Write all that `restore` needs to the file `path`."""
        tensors = {"step": torch.tensor(step), "rates": torch.tensor(rates, dtype=torch.float64)}
        for name, p in self.trained.items():
            tensors |= {name: p.detach()} | {f"{name} {key}": adam.state[p][key] for key in MOMENTS}
        files.replace_file(path, save_tensors({name: t.cpu().contiguous() for name, t in tensors.items()}))

    def restore(self, path, adam):
        """Go on from the file `path`; returns (steps done, learning rates at the start)."""
        tensors = checkpoint.load_tensors(path)
        for name, p in self.trained.items():
            p.data.copy_(tensors[name])
            adam.state[p] = {key: tensors[f"{name} {key}"].to(p.device) for key in MOMENTS}
        return int(tensors["step"]), tensors["rates"].tolist()


# ----------------------------------------------------------------------------------------------------
# The whole


class Work:
    """The folder of what has been done, so that a stop loses little; gone when all is done."""

    def __init__(self, to, settings):
        self.folder = to.with_name(f".{to.name}.work")
        note = self.folder / "settings.json"
        if self.folder.exists() and (not note.exists() or json.loads(note.read_text("utf-8")) != settings):
            print(f"{self.folder} is of other settings: it starts anew")
            shutil.rmtree(self.folder)
        files.check_writable(self.folder)
        files.replace_file(note, json.dumps(settings).encode())

    def once(self, name, make):
        """The tensors that make() returns, kept as a file: made once."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            files.replace_file(path, save_tensors({key: t.contiguous() for key, t in make().items()}))
        return checkpoint.load_tensors(path)


def texts(c, ckpt, tokenizer, block_size):
    """(training split, validation split) that --dataset and --test name."""
    folder = find_dataset(c.dataset, tokenizer) if c.dataset else text_folder(ckpt.path, ckpt.state)
    held = find_dataset(c.test, tokenizer) if c.test else folder
    found = Dataset(folder, "train", block_size), Dataset(held, "val", block_size)
    for dataset in found:
        dataset.check_tokenizer(tokenizer, ckpt.path)
    return found


def upcycle(c, ckpt, to):
    """Write the run `to`: that of a Checkpoint with a sparse vocabulary."""
    device = pick_device(c.device)
    dtype = pick_dtype(device, c.dtype)
    net = ckpt.load_model(device, verified=True)
    config = net.config
    if config.vocab != "dense":
        raise UserError(f"{ckpt.run} has the vocabulary {config.vocab}: only a dense one can be upcycled")
    signals, n_core = c.n_signal or 4 * config.n_embd, config.n_embd if c.keep_rest else 0
    try:
        wanted = replace(config, vocab="sparse", n_signal=signals, n_nonzero=c.n_nonzero, n_core=n_core)
    except ValueError as error:
        raise UserError(str(error)) from None
    tokenizer = kept(ckpt.path, ckpt.state)
    train, test = texts(c, ckpt, tokenizer, min(c.block_size, config.block_size))

    def autocast():
        return torch.autocast(device.type, dtype, dtype != torch.float32)

    made_from = {"weights": files.file_sha256(ckpt.weights), "text": train.data_sha256}
    work = Work(to, asdict(c) | {"to": "", "device": "", "dtype": str(dtype)} | made_from)
    E = net.vocab.matrix().detach().float()[: config.n_tokens]
    windows = train.batch(0, max(1, min(c.tokens // train.block_size, train.n_windows)), c.seed)[0]
    states = work.once("states", lambda: {"states": read(net, windows, autocast)})["states"]
    found = work.once("dictionary", lambda: sparse_codes(E.cpu(), *statistics(states, E.cpu()), c))
    student = with_recipes(net, wanted, found).to(device)

    x, y = test.windows(0, min(c.test_windows, test.n_windows))
    held = torch.cat([x, y[:, -1:]], 1)  # (n, T + 1)
    h = final_states(net, held, autocast)
    rows = {}

    def note(name):
        found = measure(net, h, student.vocab.matrix().detach(), held, autocast)
        now = {quantity: values.mean().item() for quantity, values in found.items()}
        now["bits per byte"] = now["loss"] * test.tokens / test.bytes / math.log(2)
        rows[name] = now
        print(f"{name}: {', '.join(f'{key} {value:.4f}' for key, value in now.items())}", flush=True)

    if c.keep_rest:
        note("with the rest")
        share = explained(net, h, (found["codes"] @ found["atoms"] + found["mean"]).to(device))
        rows["explained"] = share
        print(f"mean and signals explain {share:.1%} of the variance of logits; the core has the rest")
    else:
        note("sparse")
        training = Distillation(student, E, windows, states, c, dtype)
        for name, n_steps in (("output", c.output_steps), ("whole", c.whole_steps)):
            if n_steps:
                training.run(n_steps, name == "whole", work.folder / f"{name}.safetensors")
                note(f"{name} distilled")
    own = Dataset(text_folder(ckpt.path, ckpt.state), "val", min(MEASURED, config.block_size))
    loss = mean_loss(student, own, SEQUENCES, 1, device)  # on the run's own text, whatever --test is
    state = ckpt.converted(student.config, loss, loss * own.tokens / own.bytes / math.log(2))
    state["upcycled"] = {"from": made_from, "settings": asdict(c), "measured": rows}
    checkpoint.save_run(to, ckpt.step, student, state, tokenizer)
    shutil.rmtree(work.folder)


def main():
    (c,) = configurator.parse(UpcycleConfig)
    to = Path(c.to).expanduser()
    if to.exists():
        raise UserError(f"--to={to} is there already: give another folder")
    keep_freed_memory()
    with files.lock(to):
        upcycle(c, checkpoint.open_run(c.run), to)
    print(f"wrote {to}")


if __name__ == "__main__":
    configurator.run(main)
