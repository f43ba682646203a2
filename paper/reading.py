"""Read paper/results: runs, results, their rows and claims. No number is typed in."""

import csv
import json
from pathlib import Path

from configurator import UserError
from experiments.lab.results import read_result
from experiments.run_all import NAMES

PAPER = Path(__file__).resolve().parent
RESULTS = PAPER / "results"
SUBJECT = json.loads((PAPER / "subject.json").read_text(encoding="utf-8"))  # which runs the paper is about


def result_file(name):
    """The path of a file of paper/results. Raises UserError if it is missing."""
    path = RESULTS / name
    if not path.exists():
        raise UserError(f"no paper/results/{name}: python paper/collect.py makes it")
    return path


def load(name):
    """runs.json or bench.json. Raises UserError."""
    return json.loads(result_file(f"{name}.json").read_text(encoding="utf-8"))


def result(run, experiment):
    """The Result of an experiment on a run, or of one of the "studies". Raises UserError."""
    return read_result(result_file(f"{run}/{experiment}.json"))


def rows(run, experiment, **where):
    """The lines of a rows.csv that have these values, as dicts; layer, strength and value are numbers."""
    found = []
    with open(result_file(f"{run}/{experiment}.csv"), newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            for column in ("layer", "strength", "value"):
                row[column] = float(row[column]) if row[column] else None
            if all(row[column] == value for column, value in where.items()):
                found.append(row)
    return found


def claims(run):
    """{(experiment, key): Claim} of a run's twelve experiments."""
    found = [claim for name in NAMES for claim in result(run, name).claims]
    return {(claim.experiment, claim.key): claim for claim in found}


def gauges():
    """{signals, in words: run} of the trained model in several dictionaries, its own coordinates first."""
    return {words: run for words, run in SUBJECT["trained"].items() if run in load("runs")}


def has_plain(run):
    """Whether a plain GPT stood beside the run in its experiments, as a control and a rival."""
    return any("baseline" in claim.controls for claim in claims(run).values())


def judged(found):
    """Those of these claims that have a verdict: what skewed gauges show is a description."""
    return [claim for claim in found if claim.gauge != "skewed"]


def of_kind(kind, found):
    """The claims of one kind, "effect" or "signals"."""
    return [claim for claim in judged(found) if claim.kind == kind]


def supported(found):
    """Those of these claims that are supported."""
    return [claim for claim in found if claim.verdict == "supported"]
