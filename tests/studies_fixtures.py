"""Small finished runs for the tests of the studies."""

import json
from pathlib import Path

import checkpoint
from experiments.studies.runs import Study, TrainedRun, find_runs
from tests.lab_fixtures import save_run


def save_trained(folder, model, data, seed, loss=5.0):
    """A run of a study: finished, with metrics and a loss over the whole split."""
    save_run(folder, model, data, start=999 + seed)
    step = folder / "step_000001"
    state = json.loads((step / "state.json").read_text())
    state["config"]["train"]["seed"] = seed
    checkpoint.write_atomically(step / "state.json", json.dumps(state | {"whole_val_loss": loss}))
    lines = [{"step": 0, "val_loss": 11.0}, {"step": 1, "val_loss": 9.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def open_study(pattern, out):
    """The Study of all runs that match a glob, with its results under `out`."""
    return Study(Path(out), find_runs(str(pattern)))


def table_of(losses):
    """The table of a study from {(kind, size, seed): (loss, parameters)}, without any files."""
    table = {}
    for (kind, size, seed), (loss, n_parameters) in losses.items():
        run = TrainedRun(kind, size, seed, loss, n_parameters, checkpoint=None)
        table.setdefault((kind, size), {})[seed] = run
    return table
