"""
All twelve experiments on one run, or on several.

    python experiments/run_all.py                                  the newest run with signals
    python experiments/run_all.py --run=out/reflow-1 --only=ablate_signal,signal_lens
    python experiments/run_all.py --run=out/a,out/b,out/c          one after the other, then pooled

An experiment is skipped if the run has its result for the same code, weights, baseline and seed. If one
fails, the error is shown, the others still run, and the exit status is 1. `python experiments/report.py`
then makes a page of the results.

Runs that differ in nothing but their seed are then pooled, into pooled/ beside them: a claim about training
is a claim about models, and one run is one model.
"""

import importlib
import sys
import time
import traceback
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
from tqdm import tqdm

import checkpoint
import configurator
from configurator import UserError
from experiments.lab import Lab, LabConfig, pooling
from experiments.lab.lab import check_writable, open_baseline, results_folder, run_identity
from experiments.lab.report import code_sha256, measure, save_and_print
from experiments.lab.results import read_result

NAMES = (
    "nearest_neighbors",
    "semantic_clusters",
    "semantic_algebra",
    "sparsity_profile",
    "basis_geometry",
    "signal_codebook",
    "ablate_signal",
    "signal_lens",
    "emotion_surgery",
    "concept_inception",
    "gene_tampering",
    "crystallization",
)


@dataclass
class RunAllConfig:
    only: str = ""  # names of experiments, separated by commas; empty: all
    again: bool = False  # also those that are up to date


def split(text):
    """The parts of a text between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def chosen(only):
    """The names in --only; all names if it is empty. Raises UserError for an unknown one."""
    names = split(only) or NAMES
    for name in names:
        if name not in NAMES:
            nearest = get_close_matches(name, NAMES, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"one of {', '.join(NAMES)}"
            raise UserError(f"--only={name}: no such experiment: {hint}")
    return names


def up_to_date(lab, name):
    """Whether the run has this experiment's result for its weights, baseline, seed and code."""
    path = lab.results / name / "result.json"
    try:
        result = read_result(path)
    except UserError:  # none, or one of an earlier version
        return False
    same = [getattr(result, field) == value for field, value in lab.identity().items()]
    return all(same) and not result.options and result.code_sha256 == code_sha256(name)


def run_one(lab, name, again):
    """Run an experiment and save its result, unless that is up to date."""
    if not again and up_to_date(lab, name):
        tqdm.write(f"{name}: up to date")
        return
    print("-" * 100, flush=True)
    experiment = importlib.import_module(f"experiments.{name}")
    save_and_print(measure(experiment.run, lab))


def run_many(config, names, again):
    """Run experiments on the run of a LabConfig, show each failure, return the names that failed."""
    try:
        lab = Lab(config)
    except UserError as error:
        print(f"{config.run}: {error}", file=sys.stderr)
        return names
    failed = []
    print(f"{lab.checkpoint.name}, step {lab.checkpoint.step}", flush=True)
    for name in tqdm(names, unit="experiment", disable=not sys.stderr.isatty()):
        try:
            run_one(lab, name, again)
        except BrokenPipeError:  # run_all.py | head: nobody reads on
            raise
        except Exception as error:
            line = error if isinstance(error, UserError) else configurator.explain(error)
            if line is None:
                traceback.print_exc()
            print(f"{name} failed: {line or error}", file=sys.stderr)
            failed.append(name)
    return failed


def pool_runs(config, checkpoints, names):
    """Pool the results of several runs, save them and print one table; or say why they are not pooled."""
    if reason := pooling.why_not(checkpoints):
        print(f"not pooled, because these are not seeds of one configuration: {reason}")
        return
    folders = [results_folder(ckpt, config.results) for ckpt in checkpoints]
    names = [name for name in names if all((folder / name / "result.json").exists() for folder in folders)]
    results = [pooling.pool(name, folders, [run_identity(ckpt) for ckpt in checkpoints]) for name in names]
    where = pooling.pooled_folder(checkpoints, config.results)
    for result in results:
        pooling.save(result, where)
    print(f"{len(checkpoints)} models: {', '.join(ckpt.name for ckpt in checkpoints)}\n")
    print(pooling.table(results))
    print(f"\n{where}/")


def main():
    config, own = configurator.parse(LabConfig, RunAllConfig)
    names = chosen(own.only)
    runs = split(config.run or "") or [str(checkpoint.default_run())]
    checkpoints = [checkpoint.open_run(run) for run in runs]
    for ckpt in checkpoints:  # a mistyped name is an error now, not after hours of work
        check_writable(results_folder(ckpt, config.results))
        if config.baseline is not None:
            open_baseline(config.baseline, ckpt)
    start = time.perf_counter()
    failed = {run: run_many(replace(config, run=run), names, own.again) for run in runs}
    n_all = len(runs) * len(names)
    n_failed = sum(map(len, failed.values()))
    print("-" * 100)
    print(f"{n_all - n_failed} of {n_all} experiments in {time.perf_counter() - start:.0f} s")
    for run, lost in failed.items():
        if lost:
            print(f"failed: {', '.join(lost)} ({run})", file=sys.stderr)
    if len(runs) > 1:
        done = [name for name in names if not any(name in lost for lost in failed.values())]
        pool_runs(config, checkpoints, done)
    if n_failed:
        sys.exit(1)


if __name__ == "__main__":
    configurator.run(main)
