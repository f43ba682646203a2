"""
Train the runs that the studies compare, three kinds x three sizes x three seeds; then compare them.

    python experiments/studies/train_runs.py
    python experiments/studies/train_runs.py --out=out/longer-studies --steps=2000

Method
    Every run sees the same number of tokens. Runs of one seed see the same tokens in the same order. Then
    hard_sparsity.py, convergence.py and stability.py compare all runs under --out; each takes any other runs
    with --runs=. After a kill the same command continues where it stopped.

Cost
    50 minutes on two cores.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import threads

import checkpoint
import configurator
from configurator import UserError
from experiments.studies import STUDIES

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
KINDS = {"factored": "reflow_nano", "dense": "gpt2_new_nano", "topk": "reflow_nano_topk"}
SIZES = {"2x64": (2, 64, 32), "3x96": (3, 96, 48), "4x128": (4, 128, 64)}  # layers, width, signals


@dataclass
class StudiesConfig:
    out: str = "out/studies"  # folder of the runs
    seeds: int = 3  # runs of each kind and size
    steps: int = 240  # of 1,024 tokens each; evaluated every eighth of them

    def __post_init__(self):
        configurator.check(self, "seeds >= 1", "steps >= 8", "steps % 8 == 0")


def plan(c):
    """[(folder, arguments of train.py)] of all runs, one seed after the other: a kill leaves whole seeds."""
    runs = []
    for seed in range(c.seeds):
        for size in SIZES:
            for kind, config in KINDS.items():
                folder = Path(c.out).expanduser() / f"{kind}-{size}-seed{seed}"
                options = shape_options(kind, size) | {
                    "max_steps": c.steps,
                    "warmup_steps": c.steps // 10,
                    "eval_interval": c.steps // 8,
                    "eval_sequences": 16,
                    "save_interval": c.steps,
                    "seed": seed,
                    "out_dir": folder,
                }
                settings = [f"--{key}={value}" for key, value in options.items()]
                runs.append((folder, [str(ROOT / "config" / f"{config}.py"), *settings, "--resume"]))
    return runs


def shape_options(kind, size):
    """{option: value} of the shape of a model."""
    layers, width, signals = SIZES[size]
    shape = {"n_layer": layers, "n_embd": width, "n_head": width // 32}
    if kind != "dense":
        shape["n_signal"] = signals
    if kind == "topk":
        shape["top_k"] = signals // 8
    return shape


def finished(folder, steps):
    """Whether a run has its last checkpoint and the loss over the whole validation split."""
    if not folder.is_dir():
        return False
    _, state, _ = checkpoint.newest_whole(folder)
    return state is not None and state["step"] == steps and state["whole_val_loss"] is not None


def main():
    (c,) = configurator.parse(StudiesConfig)
    runs = plan(c)
    for i, (folder, arguments) in enumerate(runs):
        if finished(folder, c.steps):
            continue
        print(f"\n{folder} ({i + 1} of {len(runs)})", flush=True)
        if subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments]).returncode:
            raise UserError(f"training of {folder} failed: see above; the same command continues from here")
    for name in STUDIES:
        command = [sys.executable, str(FOLDER / f"{name}.py"), f"--runs={c.out}/*"]
        if subprocess.run(command).returncode:
            raise UserError(f"{name} failed: see above")


if __name__ == "__main__":
    configurator.run(main)
