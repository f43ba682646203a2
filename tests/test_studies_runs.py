"""The runs that a study compares: which are found, which are refused, how they are paired."""

import pytest

from configurator import UserError
from experiments.studies.runs import Study, common_seeds, find_runs, loss_curve, sizes
from tests.lab_fixtures import corpus, save_run, tiny
from tests.studies_fixtures import open_study, save_trained, table_of


def test_a_pattern_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no finished run matches"):
        find_runs(f"{tmp_path}/nothing/*")


def test_a_curve_ends_before_a_line_that_a_kill_cut(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "val_loss": 9.0}\n{"step": 2, "loss": 8.5}\n{"step": 4, "val_loss": 8.0}\n{"step": 8'
    )
    assert [part.tolist() for part in loss_curve(tmp_path)] == [[0, 4], [9.0, 8.0]]


def test_runs_that_do_not_compare_are_refused(tmp_path):
    """Equal in all but the name, unlike in more than the seed, other data: the user must choose."""
    data = corpus(tmp_path / "data", repeats=1)
    for name, n_signal in (("a", 16), ("b", 16), ("c", 8)):
        save_trained(tmp_path / "runs" / name, tiny(n_signal=n_signal), data, seed=0)
    save_run(tmp_path / "runs" / "made", tiny(), data)  # not trained: no metrics
    a, b, c = find_runs(f"{tmp_path}/runs/*")
    assert [ckpt.name for ckpt in (a, b, c)] == ["a", "b", "c"]
    with pytest.raises(UserError, match="a and b differ in nothing: both are factored 2x16, seed 0"):
        Study(tmp_path, [a, b]).by_shape()
    with pytest.raises(UserError, match="a and c .* more than their seed"):
        Study(tmp_path, [a, c]).by_shape()
    b.state["config"]["train"]["seed"] = 1
    del b.state["config"]["model"]["n_core"]  # of a version that had no such setting
    Study(tmp_path, [a, b]).by_shape()
    b.state["data_sha256"] = "another"
    with pytest.raises(UserError, match="a and b differ in data, steps"):
        Study(tmp_path, [a, b]).by_shape()


def test_the_table_and_the_identity_of_a_study(tmp_path):
    """Runs stand by kind, size and seed; the result names every run with the hash of its weights."""
    data = corpus(tmp_path / "data", repeats=1)
    for seed in (0, 1):
        save_trained(tmp_path / "runs" / f"{seed}", tiny(seed), data, seed, loss=5.0 + seed)
    study = open_study(f"{tmp_path}/runs/*", tmp_path / "results")
    table = study.by_shape()
    assert list(table) == [("factored", "2x16")]
    runs = table["factored", "2x16"]
    assert [(run.seed, run.loss, run.name) for run in runs.values()] == [(0, 5.0, "0"), (1, 6.0, "1")]
    lab = runs[1].lab()
    assert lab.checkpoint.path == runs[1].checkpoint.path
    identity = study.identity()
    assert [part.name for part in identity["runs"]] == list(identity["made_from"]) == ["0", "1"]
    assert identity["run"].name == str(tmp_path / "results") and identity["run"].step == 1


def test_sizes_are_ordered_by_parameters_and_need_a_common_seed():
    losses = {("dense", "9x9", 0): (5.0, 10), ("factored", "9x9", 0): (5.0, 8)}
    losses |= {("dense", "1x1", 0): (5.0, 20), ("factored", "1x1", 1): (5.0, 9)}
    table = table_of(losses)
    assert sizes(table) == ["9x9", "1x1"]
    assert sizes(table, "factored", "dense") == ["9x9"]
    assert common_seeds(table, "9x9", "factored", "dense") == [0]
    assert common_seeds(table, "1x1", "factored", "topk") == []
