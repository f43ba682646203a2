"""
The studies that need many runs: train them (three kinds x three sizes x three seeds), then compare them.

    python experiments/studies.py            50 minutes on two cores; killed, it goes on where it was

Every run sees the same number of tokens, runs of one seed the same tokens in the same order. Then
hard_sparsity.py, convergence.py and stability.py compare all runs under out/studies; each takes any other set
by --runs=.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import subprocess

import checkpoint
import configurator
from configurator import UserError
from experiments import study

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"factored": "reflow_nano", "dense": "gpt2_new_nano", "topk": "reflow_nano_topk"}
SIZES = {"2x64": (2, 64, 32), "3x96": (3, 96, 48), "4x128": (4, 128, 64)}  # layers, width, signals


@dataclass
class StudiesConfig:
    out: str = "out/studies"  # folder of the runs
    seeds: int = 3  # runs of each kind and size
    steps: int = 240  # of 512 tokens each


def plan(c):
    """[(folder, arguments of train.py)] of all runs; seeds outermost, so that an interruption leaves sets."""
    runs = []
    for seed in range(c.seeds):
        for size, (layers, width, signals) in SIZES.items():
            for kind, config in KINDS.items():
                folder = Path(c.out) / f"{kind}-{size}-seed{seed}"
                shape = {"n_layer": layers, "n_embd": width, "n_head": width // 32}
                if kind != "dense":
                    shape["n_signal"] = signals
                if kind == "topk":
                    shape["top_k"] = signals // 8
                schedule = {
                    "max_steps": c.steps,
                    "warmup_steps": c.steps // 10,
                    "eval_interval": c.steps // 8,
                }
                schedule |= {"eval_sequences": 16, "save_interval": c.steps, "seed": seed, "out_dir": folder}
                settings = [f"--{key}={value}" for key, value in (shape | schedule).items()]
                runs.append((folder, [str(ROOT / "config" / f"{config}.py"), *settings, "--resume"]))
    return runs


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
            raise UserError(f"training of {folder} failed: see above; the same command goes on from here")
    for script in study.NAMES:
        command = [sys.executable, str(ROOT / "experiments" / f"{script}.py"), f"--runs={c.out}/*"]
        if subprocess.run(command).returncode:
            raise UserError(f"{script} failed: see above")


if __name__ == "__main__":
    configurator.run(main)
