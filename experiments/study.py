"""
What the studies share: runs that compare, their shapes, and intervals over a few seeds.

A *study* compares many runs where an experiment looks into one. Its result has the form of an experiment's.
"""

import glob
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpoint
import configurator
from configurator import UserError
from experiments import lab
from hardware import count_parameters
from model import ModelConfig

SCHEDULE = ("lr", "min_lr", "warmup_steps", "weight_decay", "beta1", "beta2", "grad_clip", "init_from")
NAMES = ("hard_sparsity", "convergence", "stability")


@dataclass
class StudyConfig:
    runs: str = "out/studies/*"  # folders of runs, a glob in quotes
    out: str | None = None  # folder for the result, in its experiments/; None: the one that the runs are in


def find_runs(pattern):
    """[(checkpoint folder, state)] of the finished runs that match a glob. Raises UserError if none.

    What export.py made of another run was not trained, has no metrics and is left out.
    """
    found = []
    for folder in map(Path, sorted(glob.glob(pattern))):
        if (folder / "latest").exists() and (folder / "metrics.jsonl").exists():
            step, state, _ = checkpoint.newest_whole(folder)
            if step is not None and state.get("whole_val_loss") is not None:
                found.append((step, state))
    if not found:
        raise UserError(f"no finished run matches --runs={pattern}: python experiments/studies.py makes some")
    return found


class Study:
    """Stands for a lab in the report of a comparison of runs [(step, state)]."""

    def __init__(self, folder, runs):
        self.folder, self.results, self.runs = folder, folder / "experiments", runs

    def by_shape(self):
        """{(kind, size): {seed: (loss, parameters, folder)}}; size is "layers x width".

        Raises UserError for runs whose losses do not compare: other data or batches, one kind and size but
        other settings than the seed, or one of each.
        """
        table, alike = {}, {}
        for step, state in self.runs:
            m, train = state["config"]["model"], state["config"]["train"]
            name, kind, size = step.parent.name, m["vocab"], f"{m['n_layer']}x{m['n_embd']}"
            batches = [state.get("data_sha256"), state["step"], train["batch_size"], m["block_size"]]
            settings = [m, *(train.get(key) for key in SCHEDULE)]
            for key, value, what in (
                ((), batches, "data, steps, batch_size or block_size"),
                ((kind, size), settings, "more than their seed"),
                ((kind, size, train["seed"]), name, f"nothing: {kind} {size}, seed {train['seed']}"),
            ):
                other, expected = alike.setdefault(key, (name, value))
                if value != expected:
                    raise UserError(f"{other} and {name} differ in {what}: give a narrower --runs")
            seeds = table.setdefault((kind, size), {})
            seeds[train["seed"]] = state["whole_val_loss"], count_parameters(ModelConfig(**m)), step.parent
        return table

    def identity(self):
        return {
            "run": {"name": str(self.folder), "step": max(state["step"] for _, state in self.runs)},
            "runs": [lab.run_identity(step, state) for step, state in self.runs],
            "made_from": {
                step.parent.name: lab.file_sha256(step / "model.safetensors") for step, _ in self.runs
            },
            "val_loss": {},
        }


def t_interval(values):
    """Mean of values (n,) with its 95 % t interval; unbounded for fewer than three."""
    from scipy.stats import t

    if len(values) < 3:
        return lab.Estimate(float(np.mean(values)) if len(values) else np.nan, -np.inf, np.inf)
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return lab.Estimate(float(np.mean(values)), float(np.mean(values) - half), float(np.mean(values) + half))


def below(text, values, limit, unit, controls, published=""):
    """A claim that the mean of `values` is below `limit`."""
    found = t_interval(values)
    verdict = "inconclusive" if len(values) < 3 else "supported" if found.high < limit else "not supported"
    reason = f"the interval is {'' if found.high < limit else 'not '}below {limit:g}"
    return lab.Claim(text, "effect", verdict, reason, unit, len(values), found, controls, published)


def compare(run):
    """The last line of a study: compare the runs asked for, save and print the report."""

    def go():
        (c,) = configurator.parse(StudyConfig)
        run(Study(Path(c.out or Path(c.runs).parent), find_runs(c.runs))).save()

    configurator.run(go)
