"""
Run directories: out/<run>/step_000500/ holds model.safetensors, optimizer.safetensors and state.json.

A checkpoint appears whole or not at all: it is written under a temporary name, flushed to the disk, then
renamed. state.json keeps the size and the SHA-256 of its files: `train.py --resume` verifies all of them.
Weights of up to 64 MiB are verified whenever they are loaded; larger ones by what takes long anyway or hands
them on (experiments, export.py, --init_from), and by `sample.py --verify`. `latest` and `best` are small text
files naming one. Step 0 is kept always (the control of many experiments), with it the best and the last
`keep`. Nothing is ever unpickled.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configurator import UserError
from files import file_sha256, replace_file, sha256, shortest
from model import ModelConfig, ReFlow

WEIGHTS = ("model.safetensors", "optimizer.safetensors")
VERIFIED = 2**26  # bytes: weights up to this size are verified whenever they are loaded, in 0.1 s or less
ANOTHER = "use another checkpoint of this run (--run=.../step_...)"
RELEASES = Path(__file__).resolve().parent / "release"  # trained models in this repository


@contextlib.contextmanager
def writing(path):
    """An error of the disk in this block is an OSError that names `path`, safetensors' own error included."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = re.search(r"os error (\d+)", str(error))  # in a SafetensorError
        number = int(code[1]) if code else getattr(error, "errno", None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def write_atomically(path, text):
    """Replace the file at `path` by `text`: a reader sees the old or the new one, never half. OSError."""
    with writing(path):
        replace_file(path, text.encode())


def flush(path):
    """fsync a file, or the names in a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def whole_folder(final):
    """Yield a temporary folder that becomes `final` when all of it is written and flushed, or not at all.

    OSError that names `final` if the disk does not take it, also in place of safetensors' own error.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
    with writing(final):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            mode = temporary.stat().st_mode & 0o666  # safetensors' files are private, whatever the umask
            for path in temporary.rglob("*"):
                if path.is_file():
                    path.chmod(mode)
                flush(path)
            flush(temporary)
            shutil.rmtree(final, ignore_errors=True)  # a damaged or an earlier one of the same name
            os.rename(temporary, final)
            flush(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def save(run, step, model, optimizer, state, keep, best, others=None):
    """Write checkpoint `step` of the folder `run` and point `latest` at it, `best` too if `best`.

    `model` and `optimizer` are flat dicts of tensors, `state` is JSON, `others` {name: bytes} of
    further files. Older ones beyond `keep` are removed.
    """
    name = f"step_{step:06d}"
    for stale in run.glob(".step_*.tmp"):  # left by a kill
        shutil.rmtree(stale)
    with whole_folder(run / name) as folder:
        for file, tensors in zip(WEIGHTS, (model, optimizer), strict=True):
            save_file(tensors, folder / file)
        for file, content in (others or {}).items():
            (folder / file).write_bytes(content)
        text = json.dumps(state | {"step": step} | fingerprints(folder), indent=1)
        (folder / "state.json").write_text(text, encoding="utf-8")
    for pointer in ("latest", "best") if best else ("latest",):
        point(run, pointer, name)

    kept = {"step_000000", name, pointed(run, "best")}
    older = [path for path in steps(run) if path.name not in kept]  # oldest first
    n_delete = max(0, len(older) - (keep - 1))
    for path in older[:n_delete]:
        shutil.rmtree(path)


def save_run(run, step, net, state, tokenizer, moments=None):
    """Write `net` with its Tokenizer, and an optimiser's moments, as the only checkpoint of the run."""
    weights = {name: weight.cpu().contiguous() for name, weight in net.state_dict().items()}
    state = state | tokenizer.entry
    save(run, step, weights, moments or {}, state, keep=1, best=True, others=tokenizer.files)


def steps(run):
    """The checkpoint folders of a run, oldest first."""
    numbered = [p for p in run.glob("step_*") if p.name.removeprefix("step_").isdecimal()]
    return sorted(numbered, key=lambda p: int(p.name.removeprefix("step_")))


def point(run, pointer, name):
    """Let `latest` or `best` hold the name of a checkpoint."""
    write_atomically(run / pointer, name + "\n")


def pointed(run, pointer):
    """The name that `latest` or `best` holds, or None."""
    path = run / pointer
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def fingerprints(folder):
    """{"sizes": bytes, "sha256": hash} of each file in a folder, for its state.json."""
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    return {"sizes": {f.name: f.stat().st_size for f in files}, "sha256": {f.name: sha256(f) for f in files}}


def read_state(step):
    """state.json of a checkpoint folder, after a check that its files are whole. Raises UserError."""
    try:
        state = json.loads((step / "state.json").read_text(encoding="utf-8"))
        sizes = state["sizes"]  # of model.safetensors alone in a release
        sizes[WEIGHTS[0]], state["step"], state["config"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{step} is no checkpoint: its state.json is missing or damaged") from None
    for file, size in sizes.items():
        found = (step / file).stat().st_size if (step / file).exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
            raise UserError(f"{step / file} {what}: {ANOTHER}")
    return state


def verify(step, state, files=WEIGHTS):
    """Read `files` of a checkpoint folder. UserError if one has not the SHA-256 that `state` has for it."""
    for file, expected in state.get("sha256", {}).items():  # none in a checkpoint of earlier versions
        if file in files and file_sha256(step / file) != expected:
            raise UserError(f"{step / file} is damaged: its SHA-256 is not that in state.json: {ANOTHER}")


def newest_whole(run, verified=False):
    """(folder, state, [messages about damaged ones]) of the newest whole checkpoint; folder None if none.

    `verified`: its files are read, too.
    """
    messages = []
    for step in reversed(steps(run)):
        try:
            state = read_state(step)
            if verified:
                verify(step, state)
            return step, state, messages
        except UserError as error:
            messages.append(str(error))
    return None, None, messages


def versions():
    """What a checkpoint was made with: Python, torch, and the commit if git is here."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    commit = None
    with contextlib.suppress(OSError):  # no git here
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit}


# ----------------------------------------------------------------------------------------------------
# Training state, to and from flat dicts of plain CPU tensors: the same files for one process, DDP and FSDP


def whole(tensor):
    """A parameter or optimiser tensor as a plain contiguous one on the CPU, gathered if FSDP shards it."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().cpu().contiguous()


def gather_state(model, optimizer):
    """({name: weight}, {"name.exp_avg": ...}). Every process must call it."""
    weights, moments = {}, {}
    if hasattr(model, "reshard"):
        # An evaluation leaves FSDP's root unsharded: parameters that the optimiser does not know.
        model.reshard()
    for name, parameter in model.named_parameters():
        weights[name] = whole(parameter)
        for key, value in optimizer.state[parameter].items():
            moments[f"{name}.{key}"] = whole(value)
    weights |= {name: whole(buffer) for name, buffer in model.named_buffers()}
    return weights, moments


def shard_like(tensor, parameter):
    """`tensor` on the device of `parameter`, sharded as that is."""
    tensor = tensor.to(parameter.device)
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # half a second to import

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def restore_state(model, optimizer, weights, moments):
    """Undo `gather_state`, into parameters that may be sharded."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(weights[name])
        for name, parameter in model.named_parameters():
            parameter.copy_(shard_like(weights[name], parameter))
            state = {}  # no moments exist before the first update
            for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):  # AdamW's, Muon's
                if (moment := moments.get(f"{name}.{key}")) is not None:
                    state[key] = shard_like(moment, parameter)
            if (step := moments.get(f"{name}.step")) is not None:
                state["step"] = step.to(parameter.device if optimizer.defaults["fused"] else "cpu")
            if state:
                optimizer.state[parameter] = state


# ----------------------------------------------------------------------------------------------------
# Reading a run


def load_tensors(path, device="cpu"):
    """The tensors of a safetensors file. Raises UserError for anything else, a pickle above all."""
    try:
        return load_file(path, device=str(device))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); pickles are never loaded"
        ) from None


def runs(out="out"):
    """The folders of the runs under `out`, newest first."""
    newest = sorted(Path(out).glob("*/latest"), key=os.path.getmtime, reverse=True)
    return [pointer.parent for pointer in newest]


def releases():
    """The folders of the trained models in this repository."""
    return [path.parent for path in sorted(RELEASES.glob("*/state.json"))]


def default_run(out="out"):
    """The folder that stands for no --run; stderr says which one, and why. Raises UserError.

    The newest run under `out` with signals, else the newest, else the first release.
    """
    newest = runs(out)
    with_signals = (run for run in newest if read_state(find(run))["config"]["model"]["vocab"] != "dense")
    if run := next(with_signals, None):
        why = f"the newest run with signals under {out}/"
    elif newest:
        run, why = newest[0], f"the newest run under {out}/, none has signals"
    elif released := releases():
        run, why = released[0], f"no run under {out}/, so the release"
    else:
        raise UserError(f"no trained model under {out}/: {remedy()}")
    print(f"--run={shortest(run)}: {why}", file=sys.stderr)
    return run


def find(run=None, out="out"):
    """The checkpoint folder that `run` means. Raises UserError.

    `run` is a run's folder (its best checkpoint, else its latest), a step_... folder, a release, or None: see
    `default_run`.
    """
    run = default_run(out) if run is None else Path(run).expanduser()
    if run.is_file():
        raise UserError(
            f"{run} is a file: --run takes a folder such as out/reflow-nano; pickles are never loaded"
        )
    if not run.is_dir():
        raise UserError(f"no run {run}: {remedy(run, out)}")
    if (run / "state.json").exists():
        return run
    for name in (pointed(run, "best"), pointed(run, "latest")):
        if name and (run / name).is_dir():
            return run / name
    newest, _, _ = newest_whole(run)  # a kill may have come before the pointers
    if newest is None:
        raise UserError(f"{run} holds no checkpoint: {remedy(run, out)}")
    return newest


def remedy(run=None, out="out"):
    """What to do about a missing run: the nearest name, else how to train one, or a release."""
    if run is not None:
        places = {path.name: path for path in places_of_runs(out, run.parent) if path != run}
        if near := get_close_matches(run.name, places, n=1):
            return f"did you mean {shortest(places[near[0]])}?"
    trained = "".join(f", or use the trained --run={shortest(path)}" for path in releases()[:1])
    return f"make one with: python train.py{trained}"


def places_of_runs(*folders):
    """The runs, step_... folders and releases where these live, in the current folder and in `folders`."""
    own = RELEASES.parent / "out"
    found = []
    for folder in (RELEASES, own / "studies", own, ".", *folders):  # of two of a name, the later one wins
        for content in ("latest", "state.json"):
            found += [path.parent for path in sorted(Path(folder).glob(f"*/{content}"))]
    return found


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: a step_... folder of a run, or a release, which is a run of one checkpoint."""

    path: Path  # the folder that holds model.safetensors
    state: dict  # its state.json
    named: bool = False  # whether a user named this very folder, not its run

    @property
    def run(self):
        """The run's folder."""
        return self.path.parent if self.path.name.startswith("step_") else self.path

    @property
    def name(self):
        return self.run.name

    @property
    def step(self):
        """Optimiser steps so far."""
        return self.state["step"]

    @property
    def results(self):
        """The folder of its experiments' results. A step_... folder that a user named has its own."""
        return (self.path if self.named else self.run) / "experiments"

    @property
    def model_config(self):
        """A dict, as it was saved."""
        return self.state["config"]["model"]

    @property
    def train_config(self):
        """A dict, as it was saved; empty for a model without one."""
        return self.state["config"].get("train", {})

    @property
    def weights(self):
        """The file of its weights."""
        return self.path / WEIGHTS[0]

    def converted(self, config, val_loss, bits_per_byte):
        """The state of its model in another form, a ModelConfig, with what was measured on some windows."""
        return self.state | {
            "config": self.state["config"] | {"model": asdict(config)},
            "val_loss": val_loss,
            "best_val_loss": val_loss,
            "whole_val_loss": None,
            "bits_per_byte": bits_per_byte,
            "token": None,
        }

    def load_model(self, device="cpu", verified=False):
        """The ReFlow in eval mode on `device`, fp32; `verified`: see `load_model`. Raises UserError."""
        return load_model(self.path, device, verified)[0]


def open_run(run=None, out="out"):
    """The Checkpoint that `run` means, see `find`. Raises UserError."""
    path = find(run, out)
    named = run is not None and Path(run).expanduser().resolve() == path.resolve()
    return Checkpoint(path, read_state(path), named)


def to_fp32(weight):
    """A weight in fp32; places of entries, which are integers, in 32 bits."""
    return weight.float() if weight.is_floating_point() else weight.int()


def build_model(config, weights, source="the model"):
    """A ReFlow in eval mode, fp32, that holds `weights` from `source`. UserError if they do not fit."""
    with torch.device("meta"):
        model = ReFlow(config)
    try:
        model.load_state_dict({name: to_fp32(w) for name, w in weights.items()}, assign=True)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: its weights do not fit the model it describes: {why}") from None
    return model.eval()


def with_vocab(net, config, tensors):
    """The blocks of the ReFlow `net` under another vocabulary, of a ModelConfig and with these tensors."""
    weights = {name: w.cpu() for name, w in net.state_dict().items() if not name.startswith("vocab.")}
    return build_model(config, weights | {f"vocab.{name}": tensor for name, tensor in tensors.items()})


def load_model(step, device="cpu", verified=False):
    """(ReFlow in eval mode on `device`, state) of a checkpoint folder. Raises UserError.

    `verified`: the SHA-256 of weights above 64 MiB is checked, too.
    """
    state = read_state(step)
    if verified or (step / WEIGHTS[0]).stat().st_size <= VERIFIED:
        verify(step, state, WEIGHTS[:1])
    try:
        config = ModelConfig(**state["config"]["model"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{step} does not fit this version of reFlow: {error}") from None
    weights = load_tensors(step / WEIGHTS[0], device)
    if "base" in state:
        theirs = base_weights(step, state["base"], device, verified)
        with torch.device("meta"):
            names = ReFlow(config).state_dict().keys()
        weights = {name: theirs[name] for name in names if name in theirs} | weights
    return build_model(config, weights, step), state


def base_weights(step, base, device, verified):
    """The weights of the run that a release at `step` shares its blocks with. Raises UserError."""
    folder = {path.name: path for path in places_of_runs("out")}.get(base["run"])
    if folder is None:
        how = remedy_of_base(base["run"], base["imported_from"])
        raise UserError(f"{step} shares its blocks with a run: {how}")
    found = open_run(folder)
    same_file = found.state.get("sha256", {}).get(WEIGHTS[0]) == base["sha256"]
    origin = found.train_config.get("imported_from")
    if not same_file and (origin is None or origin != base["imported_from"]):
        raise UserError(f"{step} was made with another {shortest(found.run)} than the one that is here")
    if verified:
        verify(found.path, found.state, WEIGHTS[:1])
    return load_tensors(found.weights, device)


def remedy_of_base(run, imported_from):
    """How to get the run that a release shares its blocks with."""
    if imported_from is None:
        return f"put it at out/{run}"
    return f"make it with: python export.py --from={imported_from.partition(':')[0]} --to=out/{run}"
