"""
What the studies share: finished runs whose losses can be compared, by kind, size and seed.

The report of a study takes a Study in place of a Lab. Its result has the same form as an experiment's.
"""

import glob
import os
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

import checkpoint
import configurator
import metrics
from checkpoint import Checkpoint
from configurator import UserError
from experiments.lab import Lab, LabConfig
from experiments.lab.lab import run_identity
from experiments.lab.report import measure, save_and_print
from experiments.lab.results import Identity
from files import check_writable, file_sha256
from hardware import count_parameters
from model import ModelConfig

SCHEDULE = ("lr", "min_lr", "warmup_steps", "weight_decay", "beta1", "beta2", "grad_clip", "init_from")


@dataclass
class StudyConfig:
    runs: str = "out/studies/*"  # folders of runs, a glob in quotes
    out: str | None = None  # folder for the result, in its experiments/; None: the one that the runs are in


@dataclass(frozen=True)
class TrainedRun:
    """A finished run. Two that differ only in their seed have the same kind and size."""

    kind: str  # of vocabulary: factored, topk or dense
    size: str  # layers x width, for example 4x128
    seed: int
    loss: float  # nats per token over the whole validation split
    n_parameters: int
    checkpoint: Checkpoint

    @property
    def name(self):
        return self.checkpoint.name

    def lab(self):
        """The Lab of this very checkpoint."""
        return Lab(LabConfig(run=str(self.checkpoint.path)))


def trained_run(ckpt):
    """The TrainedRun of the Checkpoint of a finished run."""
    m = ckpt.model_config
    return TrainedRun(
        kind=m["vocab"],
        size=f"{m['n_layer']}x{m['n_embd']}",
        seed=ckpt.train_config["seed"],
        loss=ckpt.state["whole_val_loss"],
        n_parameters=count_parameters(ModelConfig(**m)),
        checkpoint=ckpt,
    )


def find_runs(pattern):
    """The last Checkpoint of every finished run that matches a glob, by name. Raises UserError if none does.

    Exports of other runs are left out: they were not trained and have no metrics.
    """
    found = []
    for folder in map(Path, sorted(glob.glob(os.path.expanduser(pattern)))):
        if (folder / "latest").exists() and (folder / metrics.FILE).exists():
            path, state, _ = checkpoint.newest_whole(folder)
            if path is not None and state.get("whole_val_loss") is not None:
                found.append(Checkpoint(path, state))
    if not found:
        command = "python experiments/studies/train_runs.py"
        raise UserError(f"no finished run matches --runs={pattern}: make some with {command}")
    return found


def loss_curve(folder):
    """(steps, validation losses) of a run's metrics.jsonl; the last entry of a step counts."""
    losses = {}
    for row in metrics.rows(folder):
        if row.get("val_loss") is not None:
            losses[row["step"]] = row["val_loss"]
    steps = sorted(losses)
    return np.array(steps), np.array([losses[step] for step in steps])


# ----------------------------------------------------------------------------------------------------
# Runs that can be compared


def check_comparable(checkpoints):
    """Raise UserError if two runs do not compare: they differ in data or batches; or they have one kind and
    size and differ in more than the seed, or in nothing."""
    for a, b in combinations(checkpoints, 2):
        one, other = trained_run(a), trained_run(b)
        fault = None
        if batches(a) != batches(b):
            fault = "data, steps, batch_size or block_size"
        elif (one.kind, one.size) == (other.kind, other.size):
            if settings(a) != settings(b):
                fault = "more than their seed"
            elif one.seed == other.seed:
                fault = f"nothing: both are {one.kind} {one.size}, seed {one.seed}"
        if fault:
            raise UserError(f"{a.name} and {b.name} differ in {fault}: give a narrower --runs")


def batches(ckpt):
    """What all runs of a study have in common."""
    data = ckpt.state.get("data_sha256")
    return data, ckpt.step, ckpt.train_config["batch_size"], ckpt.model_config["block_size"]


def settings(ckpt):
    """What the runs of one kind and size have in common."""
    model = asdict(ModelConfig(**ckpt.model_config))  # with defaults for what an older run does not name
    return model, [ckpt.train_config.get(key) for key in SCHEDULE]


def common_seeds(table, size, *kinds):
    """The seeds with which the table of a study has runs of each of `kinds` of a size, ascending."""
    seeds = [set(table.get((kind, size), {})) for kind in kinds]
    return sorted(set.intersection(*seeds))


def sizes(table, *kinds):
    """The sizes of which the table of a study has runs of each of `kinds` with one seed, smallest first."""
    n_parameters = {}  # size -> fewest parameters of a run of that size
    for (_, size), runs in table.items():
        fewest = min(run.n_parameters for run in runs.values())
        n_parameters[size] = min(fewest, n_parameters.get(size, fewest))
    found = [size for size in n_parameters if not kinds or common_seeds(table, size, *kinds)]
    return sorted(found, key=n_parameters.get)


class Study:
    """The runs of a study, its Checkpoints; the report takes it where that of an experiment takes a lab."""

    def __init__(self, folder, checkpoints):
        self.folder = folder
        self.results = folder / "experiments"
        self.checkpoints = checkpoints

    def by_shape(self):
        """The runs as a table {(kind, size): {seed: TrainedRun}}. Raises UserError if they do not compare."""
        check_comparable(self.checkpoints)
        table = {}
        for run in map(trained_run, self.checkpoints):
            table.setdefault((run.kind, run.size), {})[run.seed] = run
        return table

    def identity(self):
        """What the result belongs to and is made from."""
        return {
            "run": Identity(str(self.folder), max(ckpt.step for ckpt in self.checkpoints)),
            "runs": [run_identity(ckpt) for ckpt in self.checkpoints],
            "made_from": {ckpt.name: file_sha256(ckpt.weights) for ckpt in self.checkpoints},
            "val_loss": {},
        }


def run_study(run):
    """A study's last line: compare the runs asked for, save and print the report."""

    def main():
        (config,) = configurator.parse(StudyConfig)
        folder = Path(config.out or Path(config.runs).parent).expanduser()
        study = Study(folder, find_runs(config.runs))
        check_writable(study.results)
        save_and_print(measure(run, study))

    configurator.run(main)
