"""
Gather what the paper is made of into paper/results, which is committed: enough to build it anywhere.

    python paper/collect.py --runs=out/reflow-mini,out/gpt2-new-mini,out/reflow-nano,out/gpt2-new-nano
    python paper/collect.py --studies=out/studies --bench=out/bench.json
    python paper/collect.py --released=release/reflow-mini      results of the rounded weights of a run

Of a run it takes the configuration, the losses and the curve (runs.json), and the results of its experiments.
What is not named stays as it is. Nothing is written unless every result, new or kept, belongs to the weights
that runs.json describes.
"""

import csv
import json
import shutil
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkpoint
import configurator
import metrics
from checkpoint import write_atomically
from configurator import UserError
from data.datasets import dataset_of, is_imported
from experiments.lab.lab import run_identity
from experiments.lab.report import COLUMNS
from experiments.lab.results import read_result
from experiments.run_all import NAMES
from experiments.studies import STUDIES
from experiments.studies.runs import find_runs, loss_curve
from files import file_sha256
from hardware import count_parameters
from model import ModelConfig

RESULTS = Path(__file__).parent / "results"
MOST_ROWS = 10_000  # of a metric


@dataclass
class CollectConfig:
    runs: str = ""  # folders of runs, separated by commas
    studies: str = ""  # folder of train_runs.py's runs, with the results of all studies
    bench: str = ""  # bench.py's file; bf16 and fp32 are kept side by side
    released: str = ""  # folder of a release of a run that runs.json describes


def corpus(ckpt):
    """Source and tokens of the data that a run was trained on. Raises UserError if that is not there."""
    data = dataset_of(ckpt.state)
    if data is None:
        name = ckpt.train_config["dataset"]
        raise UserError(f"the dataset {name} that the run was trained on is not here: prepare it again")
    tokens = {f"{split}_tokens": s["tokens"] for split, s in data.meta["splits"].items()}
    return {"source": data.meta["source"]} | tokens


def describe(ckpt):
    """The entry of a run in runs.json. A run that export.py made of another has no curve and no speed.

    Of an imported model nobody here knows corpus and tokens; its bits per byte are of some windows.
    """
    state = ckpt.state
    imported = is_imported(state)
    if state["whole_val_loss"] is None and not imported:
        raise UserError(
            f"{ckpt.path} has no loss over the whole validation split:"
            " name the last checkpoint of a finished run"
        )
    steps, losses = loss_curve(ckpt.run)
    speeds = [row["tokens_per_s"] for row in metrics.rows(ckpt.run) if row.get("tokens_per_s")]
    return asdict(run_identity(ckpt)) | {
        "weights_sha256": file_sha256(ckpt.weights),
        "config": state["config"],
        "corpus": None if imported else corpus(ckpt),
        "dtype": state.get("dtype"),
        "parameters": count_parameters(ModelConfig(**ckpt.model_config)),
        "tokens": ckpt.step * ckpt.train_config.get("batch_size", 0) * ckpt.model_config["block_size"],
        "tokens_per_s": median(speeds) if speeds else None,
        "whole_val_loss": state["whole_val_loss"],
        "bits_per_byte": state["bits_per_byte"],
        "curve": [[int(step), float(loss)] for step, loss in zip(steps, losses, strict=True)],
    }


def describe_release(ckpt, runs):
    """The entry of a run with the hash of its released weights. Raises UserError if they are of another."""
    known = runs.get(ckpt.name, {})
    own = asdict(run_identity(ckpt)) | {"whole_val_loss": ckpt.state["whole_val_loss"]}
    if any(known.get(key) != value for key, value in own.items()):
        raise UserError(f"{ckpt.path} is no release of a run in runs.json: name the run in --runs first")
    return known | {"released_sha256": file_sha256(ckpt.weights)}


def check(result, origin, runs):
    """Raise UserError unless the Result in the file `origin` was made from the runs of runs.json."""
    for name, weights in result.made_from.items():
        run = runs.get(name)
        if run and weights not in (run["weights_sha256"], run.get("released_sha256")):
            raise UserError(
                f"{origin} was made from another {name}: run that experiment again and name it here"
            )
    for identity in result.runs or [result.run]:
        known = runs.get(identity.name)
        if known is None:
            raise UserError(f"{origin} was made from {identity.name}: name that in --runs")
        if any(known[key] != value for key, value in asdict(identity).items()):
            raise UserError(
                f"{origin} belongs to another checkpoint or configuration of {identity.name}:"
                " run that experiment again and name it here"
            )


def results_in(folder, names):
    """{name: folder of the result} of those experiments that have one in `folder`."""
    return {name: folder / name for name in names if (folder / name / "result.json").exists()}


def all_studies(folder):
    """{name: folder of the result} of all studies. Raises UserError if one is missing."""
    found = results_in(Path(folder) / "experiments", STUDIES)
    for name in STUDIES:
        if name not in found:
            raise UserError(
                f"no {Path(folder) / 'experiments' / name}: make studies writes it; nothing was collected"
            )
    return found


def copy_rows(source, target):
    """Copy a rows.csv without the metrics that have more than MOST_ROWS: parts x signals of a large model."""
    with open(source, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    many = Counter(row["metric"] for row in rows)
    with open(target, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(row for row in rows if many[row["metric"]] <= MOST_ROWS)


def gather(c, runs):
    """{place in paper/results, without an ending: folder of a result}. Adds the runs to `runs`."""
    places = {}
    named = [(name, False) for name in c.runs.split(",")] + [(c.released, True)]
    for name, is_release in named:
        if not name:
            continue
        ckpt = checkpoint.open_run(name)
        runs[ckpt.name] = describe_release(ckpt, runs) if is_release else describe(ckpt)
        found = results_in(ckpt.results, NAMES)
        places |= {f"{ckpt.name}/{experiment}": folder for experiment, folder in found.items()}
        print(f"{ckpt.name}: step {ckpt.step}, {len(found)} experiments")
    if c.studies:
        places |= {f"studies/{name}": folder for name, folder in all_studies(c.studies).items()}
        for ckpt in find_runs(f"{c.studies}/*"):
            runs[ckpt.name] = describe(ckpt)
    return places


def main():
    (c,) = configurator.parse(CollectConfig)
    if c.bench and not Path(c.bench).exists():
        raise UserError(f"no {c.bench}: make bench writes it; nothing was collected")
    path = RESULTS / "runs.json"
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    places = gather(c, runs)

    # Everything is checked before anything is written.
    files = {str(p.relative_to(RESULTS).with_suffix("")): p for p in RESULTS.glob("*/*.json")}
    files |= {place: folder / "result.json" for place, folder in places.items()}
    for file in files.values():
        check(read_result(file), file, runs)

    RESULTS.mkdir(parents=True, exist_ok=True)
    for place, folder in places.items():
        (RESULTS / place).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / "result.json", RESULTS / f"{place}.json")
        copy_rows(folder / "rows.csv", RESULTS / f"{place}.csv")
    if c.bench:
        machine = json.loads(Path(c.bench).read_text(encoding="utf-8")).get("machine", {})
        is_bf16 = machine.get("dtype") == "bfloat16"
        shutil.copyfile(c.bench, RESULTS / ("bench-bf16.json" if is_bf16 else "bench.json"))
    write_atomically(path, json.dumps(runs, indent=1, sort_keys=True))
    print(f"{path}: {len(runs)} runs")


if __name__ == "__main__":
    configurator.run(main)
