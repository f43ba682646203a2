"""What the tests of the paper share: its results, and a copy of them that may be changed."""

import json
import shutil

from experiments.lab.results import read_result, to_json
from paper import reading

PAPER = reading.PAPER
RUN = reading.SUBJECT["runs"]["factored"]


def committed_runs():
    """runs.json as committed."""
    return json.loads((PAPER / "results" / "runs.json").read_text(encoding="utf-8"))


def copy_results(folder, monkeypatch):
    """Copy the paper with its results to a folder; they are read there from now on. Their new place."""
    for name in ("paper", "assets"):
        shutil.copytree(PAPER.parent / name, folder / name)
    monkeypatch.setattr(reading, "RESULTS", folder / "paper" / "results")
    return folder / "paper" / "results"


def change_results(paths, change):
    """Apply change(Claim) to every claim of these results."""
    for path in paths:
        result = read_result(path)
        for claim in result.claims:
            change(claim)
        path.write_text(to_json(result), encoding="utf-8")


def change_claims(results, change):
    """Apply change(Claim) to every claim of every result in a folder."""
    change_results(results.glob("*/*.json"), change)
