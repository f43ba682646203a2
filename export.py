"""
Take a trained model to other people's tools, and bring theirs here.

    python export.py --run=out/reflow-nano --to=out/hf-nano                    a Hugging Face Llama folder
    python export.py --from=out/hf-nano --to=out/imported                      such a folder as a run
    python export.py --run=out/reflow-nano --form=gguf --to=out/nano.gguf      a file for llama.cpp
    python export.py --run=out/reflow-nano --form=gguf --vector=peace --to=out/peace.gguf   to steer llama.cpp
    python export.py --from=FILE.gguf --to=out/x       such a file; --from=smollm2: SmolLM2-135M, from pip
    python export.py --from=ckpt.pt --to=out/reference                         a reference system's checkpoint
    python export.py --run=out/reflow-nano --form=saelens --to=out/sae-nano    signals, for SAELens
    python export.py --run=out/gpt2-new-nano --factor=pca --to=out/gpt2-pca    a dense run as a factored one
    python export.py --run=out/gpt2-new-nano/step_000350 --factor=sparse --to=out/sparse  with sparse recipes
    python export.py --run=out/reflow-nano --form=reflow --dtype=fp16 --to=release/nano  weights only
    python export.py --run=out/reflow-smol --form=reflow --dtype=fp16 --base=out/smollm2 --to=release/smol

What --from and --factor write is a run like any other: sample.py, the experiments and `train.py --init_from`
take it. One with sparse recipes is close to the dense run, not equal. `train.py --out_dir=out/sparse
--resume` goes on with the dense run's steps, text and learning rates: so a run changes from dense to sparse
at half time. The formats are in formats/.
"""

import contextlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import threads
import torch

import checkpoint
import configurator
import dictionary
import files
from configurator import UserError
from data.datasets import find_dataset, mean_loss, run_words, text_folder
from data.gguf import is_gguf
from data.shards import Dataset
from data.sotu.prepare import embedded
from data.tokenizer import gpt2, kept
from formats.gguf import BUNDLED, bundled, is_ours, read_gguf, write_gguf, write_vector
from formats.llama import Imported, fitted, read_llama, write_llama
from formats.reference import read_reference
from formats.release import write_release
from formats.saelens import write_saelens
from model import SparseVocab

TRIED = 256  # tokens of context, at most, in which readings of a reference checkpoint are compared
MEASURED = 1024  # the same for the loss of an import: memory grows with its square


@dataclass
class ExportConfig:
    to: str | None = None  # the folder, or GGUF file, to write; --from and --factor write a run
    run: str | None = None  # a run's folder or one of its step_... folders; None: the newest with signals
    from_: str | None = None  # --from=...: a Hugging Face Llama folder, a GGUF file, smollm2, a reference .pt
    form: Literal["llama", "reflow", "gguf", "saelens"] = "llama"  # reflow: a run without optimiser, for us
    dtype: Literal["fp32", "bf16", "fp16", "q8_0"] = "fp32"  # of the exported weights; q8_0: gguf alone
    base: str | None = None  # --form=reflow: weights that this run has, too, are left out; it must be there
    vector: str | None = None  # gguf: this word or signal (s17) as a control vector, instead of the model
    factor: Literal["identity", "rotation", "pca", "ica", "sparse"] | None = None  # how a dense E is written
    n_signal: int | None = None  # --factor=sparse: signals; None: 4 n_embd
    n_nonzero: int = 32  # --factor=sparse: signals of a recipe, on average over all rows
    n_core: int = 16  # --factor=sparse: rank of the dense part beside the recipes
    seed: int = 0  # of a random rotation, ICA or the start of a dictionary
    dataset: str = "sotu"  # --from: the text that ambiguities are tried on and the loss is measured on
    sequences: int = 8  # --from: how many validation sequences of it

    def __post_init__(self):
        if self.to is None:
            raise ValueError("--to is missing: name the folder to write, for example --to=out/hf-nano")
        if self.from_ is not None and (self.run is not None or self.factor is not None):
            raise ValueError("--from brings a model here, --run and --factor take one from here: give one")
        if (self.from_ or self.factor) is not None and (self.form, self.dtype) != ("llama", "fp32"):
            raise ValueError(
                "--form and --dtype are for what goes out: --from and --factor make runs, in fp32"
            )
        if self.dtype == "q8_0" and self.form != "gguf":
            raise ValueError("--dtype=q8_0 is for --form=gguf")
        if self.form == "saelens" and self.dtype != "fp32":
            raise ValueError("--form=saelens writes fp32")
        if self.base is not None and self.form != "reflow":
            raise ValueError("--base is for --form=reflow")
        if self.vector is not None and self.form != "gguf":
            raise ValueError("--vector is for --form=gguf")
        if self.form == "gguf" and not self.to.endswith(".gguf"):
            raise ValueError(f"--form=gguf writes one file: give it a name such as --to={self.to}.gguf")
        configurator.check(self, "sequences >= 1", configurator.SEED)


def is_export(folder):
    """Whether `folder` is an export that this script wrote: a folder or a GGUF file."""
    if folder.is_file():
        return is_ours(folder)
    marks = (("config.json", "reflow"), ("state.json", "release"), ("reading/cfg.json", "metadata"))
    for file, key in marks:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((folder / file).read_text(encoding="utf-8"))
            if isinstance(found, dict) and key in found:
                return True
    return False


def import_model(source, to, dataset, n_sequences):
    """Write the model at `source`, other people's folder or file, as a run. UserError."""
    origin = source
    if str(source) in BUNDLED:
        source = bundled(str(source))
        origin = f"{origin}: {source.parent.name}/{source.name}"
    if not source.exists():
        raise UserError(f"--from={source}: no such file or folder")
    if source.suffix in (".safetensors", ".json"):
        raise UserError(f"--from={source} is one file of a model: name its folder, --from={source.parent}")

    def loss(config, weights, longest=TRIED, tokenizer=None):
        """Nats per token over the first validation sequences."""
        text = validation(dataset, tokenizer or gpt2(), min(config.block_size, longest), source)
        net = checkpoint.build_model(config, weights, source)
        return mean_loss(net, text, n_sequences, 8, torch.device("cpu"))

    if source.is_dir():
        found = read_llama(source)
    elif is_gguf(source) or source.suffix == ".gguf":
        found = read_gguf(source)
    else:
        found = Imported(*read_reference(source, loss), gpt2(), {})
        fitted(found.config, found.tokenizer, source)
    config, tokenizer = found.config, found.tokenizer
    dataset = embedded(tokenizer) if dataset == "sotu" else dataset
    val_loss = loss(config, found.weights, MEASURED, tokenizer)
    text = validation(dataset, tokenizer, min(config.block_size, MEASURED), source)
    bits = val_loss * text.tokens / text.bytes / math.log(2)
    n = min(n_sequences, text.n_windows)
    print(
        f"loss {val_loss:.4f} nats per token, {bits:.4f} bits per byte over {n} sequences "
        f"of {text.block_size} tokens of {dataset}"
    )
    state = {
        "val_loss": val_loss,
        "best_val_loss": val_loss,
        "whole_val_loss": None,
        "bits_per_byte": bits,
        "config": {"model": asdict(config), "train": {"dataset": dataset, "imported_from": str(origin)}},
        "data_sha256": text.data_sha256,
        **found.chat,
        "scaler": {},
        "skipped": 0,
        "versions": checkpoint.versions(),
    }
    checkpoint.save_run(to, 0, checkpoint.build_model(config, found.weights, source), state, tokenizer)


def validation(name, tokenizer, block_size, source):
    """The validation split of a data set in the tokens of `source`. UserError if it has others."""
    text = Dataset(find_dataset(name, tokenizer), "val", block_size)
    text.check_tokenizer(tokenizer, source)
    return text


def factor(net, kind, seed=0):
    """A factored ReFlow of the same function as a dense one: recipes E Q, basis Q^-1 (both d wide).

    Q: the identity, a random rotation, the principal axes of E or its independent components; the last two
    fitted to real tokens (dictionary.py). Raises UserError.
    """
    c = net.config
    if c.vocab != "dense":
        raise UserError(f"--factor={kind} takes a dense model, this one is {c.vocab} already")
    E = net.vocab.matrix().detach()  # (V, d)
    fit = torch.arange(c.n_tokens)  # ICA takes the first thousands: ids come in order of frequency
    found = dictionary.Dictionary("identity", E, torch.eye(c.n_embd))
    if kind == "rotation":
        found = dictionary.rotated(found, torch.Generator().manual_seed(seed))
    elif kind == "pca":
        found = dictionary.pca(E, fit)
    elif kind == "ica":
        found = dictionary.ica(E, fit, seed)
    if found.n_signals < c.n_embd:
        raise UserError(f"--factor={kind}: the embedding does not fill its {c.n_embd} dimensions: no basis")
    config = replace(c, vocab="factored", n_signal=c.n_embd)
    return checkpoint.with_vocab(net, config, {"recipe": found.codes, "basis": found.atoms})


def sparse(net, counts, n_signal, n_nonzero, n_core, seed=0):
    """A sparse ReFlow close to a dense one: mean row, core and a dictionary of the rest (dictionary.sparse).

    counts (n_tokens,): how often each token was seen; tokens weigh by them. Raises UserError.
    """
    c = net.config
    if c.vocab != "dense":
        raise UserError(f"sparse recipes are made of a dense model, this one is {c.vocab} already")
    try:
        config = replace(
            c, vocab="sparse", n_signal=n_signal or 4 * c.n_embd, n_nonzero=n_nonzero, n_core=n_core
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    E = net.vocab.matrix().detach().double()  # (V, d)
    seen = torch.zeros(c.rows, dtype=torch.float64)
    seen[: c.n_tokens] = torch.from_numpy(counts) + 1.0
    mean = (seen @ E) / seen.sum()
    rest = E - mean
    axes = torch.linalg.eigh(rest.T @ (rest * seen[:, None])).eigenvectors[:, c.n_embd - n_core :].T
    core = rest @ axes.T  # (V, n_core)
    found = dictionary.sparse((rest - core @ axes).float(), config.signals, n_nonzero, seen, seed, starts=1)
    basis = torch.cat([found.atoms.double(), axes, mean[None]])
    print(f"dictionary: {', '.join(f'{name} {value:.4g}' for name, value in found.fit.items())}")
    return checkpoint.with_vocab(net, config, SparseVocab.tensors(found.codes, core, basis, n_nonzero))


def write_sparse(ckpt, to, c):
    """Write the Checkpoint of a dense run as one of a sparse run, which --resume goes on with. UserError."""
    net = ckpt.load_model(verified=True)
    tokenizer = kept(ckpt.path, ckpt.state)
    counts = run_words(ckpt.path, ckpt.state).counts
    found = sparse(net, counts, c.n_signal, c.n_nonzero, c.n_core, c.seed)
    folder = text_folder(ckpt.path, ckpt.state)
    text = Dataset(folder, "val", net.config.block_size)
    n = ckpt.train_config.get("eval_sequences", c.sequences)
    before, after = (mean_loss(model, text, n, 8, torch.device("cpu")) for model in (net, found))
    print(f"loss {before:.4f} nats per token as a dense model, {after:.4f} as a sparse one")
    moments = {}
    if (ckpt.path / checkpoint.WEIGHTS[1]).exists():  # a release has none
        moments = checkpoint.load_tensors(ckpt.path / checkpoint.WEIGHTS[1])
    moments = {name: moment for name, moment in moments.items() if not name.startswith("vocab.")}
    state = ckpt.converted(found.config, after, after * text.tokens / text.bytes / math.log(2))
    checkpoint.save_run(to, ckpt.step, found, state, tokenizer, moments)


def main():
    (c,) = configurator.parse(ExportConfig)
    to = Path(c.to).expanduser()
    makes_run = c.from_ is not None or c.factor is not None
    if to.exists() and (makes_run or not is_export(to)):
        raise UserError(f"--to={to} is there already; only an export replaces an export: give another folder")
    ckpt = checkpoint.open_run(c.run) if c.from_ is None else None
    with files.lock(to):  # also an error now, not after the work, if it cannot be written
        if ckpt is None:
            import_model(Path(c.from_).expanduser(), to, c.dataset, c.sequences)
        elif c.factor == "sparse":
            write_sparse(ckpt, to, c)
        elif c.factor is not None:
            net = factor(ckpt.load_model(verified=True), c.factor, c.seed)
            state = ckpt.state | {"config": ckpt.state["config"] | {"model": asdict(net.config)}}
            checkpoint.save_run(to, ckpt.step, net, state, kept(ckpt.path, ckpt.state))
        elif c.form == "llama":
            write_llama(ckpt, to, c.dtype)
        elif c.form == "saelens":
            write_saelens(ckpt, to)
        elif c.vector is not None:
            write_vector(ckpt, to, c.vector)
        elif c.form == "gguf":
            write_gguf(ckpt, to, c.dtype)
        else:
            write_release(ckpt, to, c.dtype, checkpoint.open_run(c.base) if c.base else None)
    print(f"wrote {to}")


if __name__ == "__main__":
    configurator.run(main)
