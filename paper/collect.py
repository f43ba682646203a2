"""
Gather what the paper is made of into paper/results, which is committed: enough to build it anywhere.

    python paper/collect.py --runs=out/reflow-mini,out/gpt2-new-mini,out/reflow-nano,out/gpt2-new-nano
    python paper/collect.py --studies=out/studies --bench=out/bench.json

A run brings its configuration, losses and curve (runs.json), and its experiments, if it has any, which must
belong to the very checkpoint that the run stands at. What is not named stays as it is.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import configurator

if __name__ == "__main__":
    configurator.help(__file__)

import ast
import json
import shutil
from statistics import median

import checkpoint
from checkpoint import write_atomically
from configurator import UserError
from experiments import lab, study
from experiments.convergence import curve
from experiments.run_all import NAMES
from hardware import count_parameters
from model import ModelConfig
from train import find_data

RESULTS = Path(__file__).parent / "results"


@dataclass
class CollectConfig:
    runs: str = ""  # folders of runs, separated by commas
    studies: str = ""  # folders with results of studies, and perhaps their runs, separated by commas
    bench: str = ""  # bench.py's file


def corpus(state):
    """Source and tokens of the data that a run was trained on. UserError if that is not there."""
    data = find_data(state)
    if data is None:
        name = state["config"]["train"]["dataset"]
        raise UserError(f"the dataset {name} that the run was trained on is not here: prepare it again")
    tokens = {f"{split}_tokens": s["tokens"] for split, s in data.meta["splits"].items()}
    return {"source": data.meta["source"]} | tokens


def describe(step, state):
    """What runs.json holds of a run; one that export.py made of another has no curve and no speed."""
    config, metrics = state["config"], step.parent / "metrics.jsonl"
    rows, steps, losses = [], (), ()
    if metrics.exists():
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        steps, losses = curve(step.parent)
    speeds = [r["tokens_per_s"] for r in rows if r.get("tokens_per_s")]
    return lab.run_identity(step, state) | {
        "config": config,
        "corpus": corpus(state),
        "parameters": count_parameters(ModelConfig(**config["model"])),
        "tokens": state["step"] * config["train"]["batch_size"] * config["model"]["block_size"],
        "tokens_per_s": median(speeds) if speeds else None,
        "whole_val_loss": state["whole_val_loss"],
        "bits_per_byte": state["bits_per_byte"],
        "curve": [[int(s), float(v)] for s, v in zip(steps, losses, strict=True)],
    }


def copy(result, folder):
    """Copy result.json and rows.csv of an experiment's folder as <name>.json and <name>.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, ending in (("result.json", "json"), ("rows.csv", "csv")):
        shutil.copyfile(result / file, folder / f"{result.name}.{ending}")


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


def study_results(folder):
    """The folders of those results of studies that `folder` has. UserError if it has none."""
    found = [folder / "experiments" / name for name in study.NAMES]
    found = [result for result in found if (result / "result.json").exists()]
    if not found:
        raise UserError(f"no studies in {folder / 'experiments'}: make studies; nothing was collected")
    return found


def main():
    (c,) = configurator.parse(CollectConfig)
    compared = {Path(folder): study_results(Path(folder)) for folder in c.studies.split(",") if folder}
    if c.bench and not Path(c.bench).exists():
        raise UserError(f"no {c.bench}: make bench writes it; nothing was collected")
    path = RESULTS / "runs.json"
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    copies = []  # (result's folder, where it goes): all are checked before anything is written
    for name in filter(None, c.runs.split(",")):
        step = checkpoint.find(name)
        state = checkpoint.read_state(step)
        found = [step.parent / "experiments" / n for n in NAMES]
        found = [folder for folder in found if (folder / "result.json").exists()]
        identity = lab.run_identity(step, state)
        for folder in found:
            made_from = json.loads((folder / "result.json").read_text(encoding="utf-8"))["run"]
            if made_from != identity:
                again = f"python experiments/run_all.py --run={step.parent}"
                raise UserError(f"{folder} belongs to another checkpoint or configuration: {again}")
        runs[step.parent.name] = describe(step, state)
        copies += [(folder, step.parent.name) for folder in found]
        print(f"{step.parent.name}: step {state['step']}, {len(found)} experiments")
    for folder, found in compared.items():
        if any(folder.glob("*/latest")):  # those that are not here must be among --runs, now or before
            for step, state in study.find_runs(f"{folder}/*"):
                runs[step.parent.name] = describe(step, state)
        for result in found:
            for made_from in json.loads((result / "result.json").read_text(encoding="utf-8"))["runs"]:
                known = runs.get(name := made_from["name"], {})
                if any(known.get(key) != value for key, value in made_from.items()):
                    raise UserError(f"{result}: its {name} is not the one known here: name it in --runs")
            copies.append((result, folder.name))
    for folder, name in copies:
        copy(folder, RESULTS / name)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if c.bench:
        shutil.copyfile(c.bench, RESULTS / "bench.json")
    write_atomically(RESULTS / "methods.json", json.dumps(methods(), indent=1))
    write_atomically(path, json.dumps(runs, indent=1, sort_keys=True))
    print(f"{path}: {len(runs)} runs")


if __name__ == "__main__":
    configurator.run(main)
