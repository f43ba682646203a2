"""Behind every number of the paper is a result, of the run that it is said to be of."""

import hashlib
import json

import pytest
import torch

import checkpoint
from data.datasets import COUNTED, COUNTS
from data.tokenizer import kept
from experiments.lab.results import read_result
from files import file_sha256
from paper import reading
from tests.paper_fixtures import PAPER, RUN, committed_runs

RESULTS = sorted(reading.RESULTS.glob("*/*.json"))
FIGURES = PAPER / "figures"


def sha256(config):
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("name", committed_runs())
def test_a_run_s_hash_is_that_of_its_configuration(name):
    assert committed_runs()[name]["config_sha256"] == sha256(committed_runs()[name]["config"])


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_result_belongs_to_the_run_it_names(path):
    """Configuration, step, data and weights of a result are those of the run in runs.json."""
    result = read_result(path)
    assert result.experiment == path.stem
    assert {claim.experiment for claim in result.claims} == {path.stem}
    assert result.runs or path.parent.name == result.run.name  # a study compares many
    for identity in result.runs or [result.run]:
        known = committed_runs()[identity.name]
        for key in ("config_sha256", "data_sha256", "step"):
            assert getattr(identity, key) == known[key], f"{path}: another {identity.name}: {key}"
    for name, weights in result.made_from.items():
        known = committed_runs()[name]
        of_run = (known["weights_sha256"], known.get("released_sha256"))
        assert weights in of_run, f"{path} was made from another {name}"


def test_the_released_model_is_the_run_of_the_paper():
    """release/reflow-mini, at most 12 MB, has configuration and step of runs.json, and predicts English."""
    folder = PAPER.parent / "release" / "reflow-mini"
    assert sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) <= 12e6
    model, state = checkpoint.load_model(checkpoint.find(folder))
    run = committed_runs()["reflow-mini"]
    assert (sha256(state["config"]), state["step"]) == (run["config_sha256"], run["step"])
    assert file_sha256(folder / "model.safetensors") == run["released_sha256"]
    counted = min(run["tokens"], COUNTED * model.config.block_size)
    assert checkpoint.load_tensors(folder / COUNTS)["counts"].sum() == counted
    text = "The President of the United States is elected by the people of the"
    tokens = kept(folder, state).encode_ordinary(text)
    with torch.no_grad():
        _, loss = model(torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]]))
    assert loss < 4  # a guess costs 9.0


def test_the_committed_results_are_small():
    files = [p for folder in (reading.RESULTS, FIGURES) for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 6e6


def test_rows_are_found_by_their_columns():
    """Numbers are numbers; a column that is not asked for may hold anything."""
    found = reading.rows(RUN, "crystallization", model="reflow", pos="all", strength=1.0, dictionary="")
    changes = [row for row in found if row["metric"] == "change of logit difference"]
    n_layer = committed_runs()[RUN]["config"]["model"]["n_layer"]
    assert [row["layer"] for row in changes] == list(range(n_layer + 1))
    assert all(isinstance(row["value"], float) for row in changes)
    assert reading.claims(RUN)["ablate_signal", "strongest"].gauge == "rotation"
