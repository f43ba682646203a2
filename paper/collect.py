"""
Gather what the paper is made of into paper/results, which is committed: enough to build it anywhere.

    python paper/collect.py --runs=out/reflow-mini,out/gpt2-new-mini,out/reflow-nano,out/gpt2-new-nano
    python paper/collect.py --studies=out/studies --minis=out/minis --bench=out/bench.json

A run brings its configuration, losses and curve (runs.json), and its experiments, if it has any. What is not
named stays as it is. Nothing is written unless every result, new or kept, belongs to the very weights that
runs.json tells of.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ast
import json
import shutil
from statistics import median

import checkpoint
import configurator
from checkpoint import write_atomically
from configurator import UserError
from data.datasets import dataset_of
from experiments import lab, study
from experiments.convergence import curve
from experiments.run_all import NAMES
from hardware import count_parameters
from model import ModelConfig

RESULTS = Path(__file__).parent / "results"


@dataclass
class CollectConfig:
    runs: str = ""  # folders of runs, separated by commas
    studies: str = ""  # folder of the runs of experiments/studies.py, with the results of all studies
    minis: str = ""  # folder with results of studies of the main runs (their --out)
    bench: str = ""  # bench.py's file


def corpus(state):
    """Source and tokens of the data that a run was trained on. UserError if that is not there."""
    data = dataset_of(state)
    if data is None:
        name = state["config"]["train"]["dataset"]
        raise UserError(f"the dataset {name} that the run was trained on is not here: prepare it again")
    tokens = {f"{split}_tokens": s["tokens"] for split, s in data.meta["splits"].items()}
    return {"source": data.meta["source"]} | tokens


def describe(step, state):
    """What runs.json holds of a run; one that export.py made of another has no curve and no speed."""
    config, metrics = state["config"], step.parent / "metrics.jsonl"
    if state["whole_val_loss"] is None:
        raise UserError(
            f"{step} has no loss over the whole validation split: name the last checkpoint of a finished run"
        )
    rows, steps, losses = [], (), ()
    if metrics.exists():
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        steps, losses = curve(step.parent)
    speeds = [r["tokens_per_s"] for r in rows if r.get("tokens_per_s")]
    return lab.run_identity(step, state) | {
        "weights_sha256": lab.file_sha256(step / "model.safetensors"),
        "config": config,
        "corpus": corpus(state),
        "dtype": state.get("dtype"),
        "parameters": count_parameters(ModelConfig(**config["model"])),
        "tokens": state["step"] * config["train"]["batch_size"] * config["model"]["block_size"],
        "tokens_per_s": median(speeds) if speeds else None,
        "whole_val_loss": state["whole_val_loss"],
        "bits_per_byte": state["bits_per_byte"],
        "curve": [[int(s), float(v)] for s, v in zip(steps, losses, strict=True)],
    }


def check(result, origin, runs):
    """UserError unless a result, from `origin`, was made from the runs of runs.json, weights and all."""
    for name, weights in result["made_from"].items():
        if name in runs and runs[name]["weights_sha256"] != weights:
            raise UserError(
                f"{origin} was made from another {name}: run that experiment again and name it here"
            )
    for made_from in result.get("runs") or [result["run"]]:
        known = runs.get(made_from["name"])
        if known is None:
            raise UserError(f"{origin} was made from {made_from['name']}: name that in --runs")
        if any(known[key] != value for key, value in made_from.items()):
            raise UserError(
                f"{origin} belongs to another checkpoint or configuration of {made_from['name']}:"
                " run that experiment again and name it here"
            )


def methods():
    """{experiment: [its question, the paragraphs of its method]}, from the docstrings."""
    found = {}
    for name in (*NAMES, *study.NAMES):
        source = (Path(lab.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        parts = [
            " ".join(p.split()).replace("*", "").replace("`", "")
            for p in ast.get_docstring(ast.parse(source)).split("\n\n")
        ]
        found[name] = [p for p in parts if not p.startswith(("python ", "Claims ", "Cost"))]
    return found


def results_in(folder, names, needed=()):
    """{name: folder} of the results that `folder`/experiments has; UserError if a needed one is missing."""
    found = {name: folder / "experiments" / name for name in names}
    found = {name: path for name, path in found.items() if (path / "result.json").exists()}
    for name in needed:
        if name not in found:
            raise UserError(
                f"no {folder / 'experiments' / name}: make studies writes it; nothing was collected"
            )
    return found


def main():
    (c,) = configurator.parse(CollectConfig)
    path = RESULTS / "runs.json"
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    copies = {}  # file of paper/results, without its ending -> folder of the result
    for name in filter(None, c.runs.split(",")):
        step = checkpoint.find(name)
        run = step.parent.name
        runs[run] = describe(step, checkpoint.read_state(step))
        found = results_in(lab.results_folder(name, step).parent, NAMES)
        copies |= {f"{run}/{name}": folder for name, folder in found.items()}
        print(f"{run}: step {runs[run]['step']}, {len(found)} experiments")
    if c.studies:
        found = results_in(Path(c.studies), study.NAMES, needed=study.NAMES)
        copies |= {f"studies/{name}": folder for name, folder in found.items()}
        for step, state in study.find_runs(f"{c.studies}/*"):
            runs[step.parent.name] = describe(step, state)
    if c.minis:
        found = results_in(Path(c.minis), study.NAMES, needed=study.NAMES)
        copies |= {f"minis/{name}": folder for name, folder in found.items()}
    if c.bench and not Path(c.bench).exists():
        raise UserError(f"no {c.bench}: make bench writes it; nothing was collected")

    kept = {str(p.relative_to(RESULTS).with_suffix("")): p for p in RESULTS.glob("*/*.json")}
    new = {name: folder / "result.json" for name, folder in copies.items()}
    for origin in (kept | new).values():
        check(json.loads(origin.read_text(encoding="utf-8")), origin, runs)
    for name, folder in copies.items():
        (RESULTS / name).parent.mkdir(parents=True, exist_ok=True)
        for file, ending in (("result.json", "json"), ("rows.csv", "csv")):
            shutil.copyfile(folder / file, RESULTS / f"{name}.{ending}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    if c.bench:
        shutil.copyfile(c.bench, RESULTS / "bench.json")
    write_atomically(RESULTS / "methods.json", json.dumps(methods(), indent=1))
    write_atomically(path, json.dumps(runs, indent=1, sort_keys=True))
    print(f"{path}: {len(runs)} runs")


if __name__ == "__main__":
    configurator.run(main)
