"""
Run directories: out/<run>/step_000500/ holds model.safetensors, optimizer.safetensors and state.json.

A checkpoint appears whole or not at all: it is written under a temporary name, flushed to the disk, then
renamed. `latest` and `best` are small text files naming one. Step 0 is kept always (the control of many
experiments), with it the best and the last `keep`. Nothing is ever unpickled.
"""

import json
import os
import shutil
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


def save(run, step, model, optimizer, state, keep, best):
    """Write checkpoint `step` of the folder `run` and point `latest` at it, `best` too if `best`.

    `model` and `optimizer` are flat dicts of tensors, `state` is JSON. Older ones beyond `keep` are removed.
    """
    name = f"step_{step:06d}"
    temporary, final = run / f".{name}.tmp", run / name
    for stale in run.glob(".step_*.tmp"):  # left by a kill
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)
    for file, tensors in zip(WEIGHTS, (model, optimizer), strict=True):
        save_file(tensors, temporary / file)
        flush(temporary / file)
    sizes = {file: (temporary / file).stat().st_size for file in WEIGHTS}
    write_atomically(temporary / "state.json", json.dumps(state | {"step": step, "sizes": sizes}, indent=1))
    flush(temporary)
    shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
    os.rename(temporary, final)
    flush(run)
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
        sizes = {file: state["sizes"][file] for file in WEIGHTS}
        state["step"], state["config"]["model"]
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


def find(run=None, out="out"):
    """The checkpoint folder that `run` means. Raises UserError.

    `run` is a run's folder (its best checkpoint, else its latest), a step_... folder, or None: the newest run
    under `out`.
    """
    make_one = "make one with: python train.py"
    if run is None:
        runs = [p.parent for p in Path(out).glob("*/latest")]
        if not runs:
            raise UserError(f"no trained model under {out}/: {make_one}")
        run = max(runs, key=lambda r: (r / "latest").stat().st_mtime)
    run = Path(run)
    if run.is_file():
        raise UserError(
            f"{run} is a file: --run takes a folder such as out/reflow-nano; pickles are never loaded"
        )
    if not run.is_dir():
        raise UserError(f"no run {run}: {make_one}")
    if (run / "state.json").exists():
        return run
    for name in (pointed(run, "best"), pointed(run, "latest")):
        if name and (run / name).is_dir():
            return run / name
    newest, _, _ = newest_whole(run)  # a kill may have come before the pointers
    if newest is None:
        raise UserError(f"{run} holds no checkpoint: {make_one}")
    return newest


def load_model(step, device="cpu"):
    """(ReFlow in eval mode on `device`, state) of a checkpoint folder. Raises UserError."""
    state = read_state(step)
    try:
        with torch.device("meta"):
            model = ReFlow(ModelConfig(**state["config"]["model"]))
        model.load_state_dict(load_tensors(step / "model.safetensors", device), assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{step} does not fit this version of reFlow: {str(error).splitlines()[0]}") from None
    return model.eval(), state
