"""
Run directories: out/<run>/step_000500/ holds model.safetensors, optimizer.safetensors and state.json.

A checkpoint appears whole or not at all: it is written under a temporary name, flushed to the disk, then
renamed. `latest` and `best` are small text files naming one. Step 0 is kept always (the control of many
experiments), with it the best and the last `keep`. Nothing is ever unpickled.
"""

import contextlib
import json
import os
import shutil
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configurator import UserError
from model import ModelConfig, ReFlow

WEIGHTS = ("model.safetensors", "optimizer.safetensors")


def write_atomically(path, text):
    """Replace the file at `path` by `text`: a reader sees the old or the new one, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def flush(path):
    """fsync a file, or the names in a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def whole_folder(final):
    """Yield a temporary folder that becomes `final` when all of it is written and flushed, or not at all."""
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            file.chmod(temporary.stat().st_mode & 0o666)  # safetensors' are private, whatever the umask
            flush(file)
        flush(temporary)
        shutil.rmtree(final, ignore_errors=True)  # a damaged or an earlier one of the same name
        os.rename(temporary, final)
        flush(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save(run, step, model, optimizer, state, keep, best):
    """Write checkpoint `step` of the folder `run` and point `latest` at it, `best` too if `best`.

    `model` and `optimizer` are flat dicts of tensors, `state` is JSON. Older ones beyond `keep` are removed.
    """
    name = f"step_{step:06d}"
    for stale in run.glob(".step_*.tmp"):  # left by a kill
        shutil.rmtree(stale)
    with whole_folder(run / name) as folder:
        for file, tensors in zip(WEIGHTS, (model, optimizer), strict=True):
            save_file(tensors, folder / file)
        sizes = {file: (folder / file).stat().st_size for file in WEIGHTS}
        text = json.dumps(state | {"step": step, "sizes": sizes}, indent=1)
        (folder / "state.json").write_text(text, encoding="utf-8")
    for pointer in ("latest", "best") if best else ("latest",):
        point(run, pointer, name)

    kept = {"step_000000", name, pointed(run, "best")}
    for old in [p for p in steps(run) if p.name not in kept][: -(keep - 1) or None]:
        shutil.rmtree(old)


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
            raise UserError(f"{step / file} {what}: use another checkpoint of this run (--run=.../step_...)")
    return state


def newest_whole(run):
    """(folder, state, [messages about damaged ones]) of the newest whole checkpoint; folder None if none."""
    messages = []
    for step in reversed(steps(run)):
        try:
            return step, read_state(step), messages
        except UserError as error:
            messages.append(str(error))
    return None, None, messages


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


# ----------------------------------------------------------------------------------------------------
# Reading a run


def runs(out="out"):
    """The folders of the runs under `out`, newest first."""
    newest = sorted(Path(out).glob("*/latest"), key=os.path.getmtime, reverse=True)
    return [pointer.parent for pointer in newest]


def find(run=None, out="out"):
    """The checkpoint folder that `run` means. Raises UserError.

    `run` is a run's folder (its best checkpoint, else its latest), a step_... folder, or None: the newest run
    under `out`.
    """
    make_one = "make one with: python train.py"
    if run is None:
        run = next(iter(runs(out)), None)
        if run is None:
            raise UserError(f"no trained model under {out}/: {make_one}")
    run = Path(run)
    if run.is_file():
        raise UserError(
            f"{run} is a file: --run takes a folder such as out/reflow-nano; pickles are never loaded"
        )
    if not run.is_dir():
        beside = [p.name for p in run.parent.iterdir() if p.is_dir()] if run.parent.is_dir() else []
        near = get_close_matches(run.name, beside, n=1)
        raise UserError(f"no run {run}: {f'did you mean {run.parent / near[0]}?' if near else make_one}")
    if (run / "state.json").exists():
        return run
    for name in (pointed(run, "best"), pointed(run, "latest")):
        if name and (run / name).is_dir():
            return run / name
    newest, _, _ = newest_whole(run)  # a kill may have come before the pointers
    if newest is None:
        raise UserError(f"{run} holds no checkpoint: {make_one}")
    return newest


def build_model(config, weights, source="the model"):
    """A ReFlow in eval mode, fp32, that holds `weights` from `source`. UserError if they do not fit."""
    with torch.device("meta"):
        model = ReFlow(config)
    try:
        model.load_state_dict({name: w.float() for name, w in weights.items()}, assign=True)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: its weights do not fit the model it describes: {why}") from None
    return model.eval()


def load_model(step, device="cpu"):
    """(ReFlow in eval mode on `device`, state) of a checkpoint folder. Raises UserError."""
    state = read_state(step)
    try:
        config = ModelConfig(**state["config"]["model"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{step} does not fit this version of reFlow: {error}") from None
    return build_model(config, load_tensors(step / "model.safetensors", device), step), state
