"""
Do a word and its opposite share their strongest signals?

    python experiments/template.py --run=release/reflow-mini

Method
    The share of the eight largest entries of a word's centred recipe that are among its opposite's. Controls:
    opposites of other words, the null models. Unit: a pair. To make it yours: copy, rename, change.

Cost
    Seconds, mostly for the fit of ICA.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
import torch

from experiments.lab import Lab, Report, Scores, run_experiment
from experiments.lab.analogies import known_pairs
from experiments.lab.plots import plot_scores

CLAIMS = {
    "shared": "a word shares more of its strongest signals with its opposite than with those of other words",
    "privileged": "the excess over those of other words is larger than in other dictionaries of the same E",
}
TOP = 8  # signals


def overlap(d):
    """{metric: shares (n,)} for codes (2n, S) of n words and then of their opposites."""
    centred = d.codes - d.codes.mean(0)
    chosen = torch.zeros_like(centred).scatter(1, centred.abs().topk(TOP).indices, 1.0)
    words, opposites = chosen.chunk(2)
    shares = words @ opposites.T / TOP  # (n, n)
    own = shares.diagonal()
    others = (shares.sum(1) - own) / (len(own) - 1)
    return {"own": own, "others": others, "excess": own - others}


def run(lab: Lab, config=None) -> Report:
    report = Report(lab, "template", CLAIMS)
    tokens = torch.tensor(known_pairs(lab, "opposites")).T.flatten()  # (2n,)
    found = lab.compare(overlap, tokens=tokens)
    shared = Scores({"native": found["own"].native, "others": found["others"].native})
    for name, subject in lab.nulls.items():
        shared[name] = overlap(subject.dictionary.part(tokens))["own"]
    report.effect("shared", shared, "pairs")
    report.signals("privileged", found["excess"], "pairs")
    title = f"A word and its opposite share {shared.native.mean():.0%} of their {TOP} strongest signals"
    with report.figure("overlap", title, 1, 2) as (left, right):
        plot_scores(left, shared, xlabel=f"share of the {TOP} strongest signals")
        plot_scores(right, found["excess"], xlabel="the same, less that with the opposites of other words")
    return report


if __name__ == "__main__":
    run_experiment(run)
