"""What paper/collect.py gathers belongs together, or nothing is written."""

import json
import shutil
from dataclasses import asdict

import pytest
from safetensors.torch import save_file

import checkpoint
from data.shards import Dataset
from experiments.lab import Report
from experiments.lab.results import read_result
from paper import collect
from tests.lab_fixtures import corpus, open_lab, save_run, tiny


def collected(monkeypatch, results, *arguments):
    monkeypatch.setattr(collect, "RESULTS", results)
    monkeypatch.setattr(collect.sys, "argv", ["collect.py", *arguments])
    collect.main()


def change_state(step, **changes):
    """Write other entries into a checkpoint's state.json."""
    file = step / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def files(folder):
    """{path: content} of all files below a folder."""
    return {p: p.read_bytes() for p in folder.rglob("*.*")}


def test_collect_keeps_no_result_of_another_checkpoint(tmp_path, monkeypatch):
    """A run goes on, or is trained again: results made before, new ones or those collected, are refused."""
    data = corpus(tmp_path / "data", repeats=1)
    run = save_run(tmp_path / "run", tiny(), data)
    step = checkpoint.find(run)
    change_state(step, data_sha256=Dataset(data, "val", 1).data_sha256)
    train = checkpoint.read_state(step)["config"]["train"]

    def experiment():
        Report(open_lab(run), "ablate_signal", {}).save()

    experiment()
    results = tmp_path / "results"
    collected(monkeypatch, results, f"--runs={run}")
    before = files(results)
    assert {p.name for p in before} == {"runs.json", "ablate_signal.json", "ablate_signal.csv"}
    change_state(step, best_val_loss=1.0)  # nothing that a result depends on
    collected(monkeypatch, results, f"--runs={run}")
    assert before == files(results)

    config = {"model": asdict(tiny().config), "train": train | {"lr": 1}}
    change_state(step, val_loss=1.0, config=config)
    with pytest.raises(collect.UserError, match="another checkpoint or configuration of run"):
        collected(monkeypatch, results, f"--runs={run}")
    experiment()
    collected(monkeypatch, results, f"--runs={run}")
    weights = step / "model.safetensors"
    save_file(dict(tiny(seed=1).state_dict()), weights)  # the same configuration, trained again
    before = files(results)
    for _ in range(2):  # the run's own results, then those that were collected before
        with pytest.raises(collect.UserError, match="was made from another run"):
            collected(monkeypatch, results, f"--runs={run}")
        shutil.rmtree(run / "experiments", ignore_errors=True)
    assert before == files(results)


def test_a_named_checkpoint_brings_its_own_results(tmp_path, monkeypatch):
    """--runs=<run>/step_... collects what the experiments wrote there, not what they wrote for the run."""
    data = corpus(tmp_path / "data", repeats=1)
    run = save_run(tmp_path / "run", tiny(), data)
    step = checkpoint.find(run)
    change_state(step, data_sha256=Dataset(data, "val", 1).data_sha256)
    for folder in (run, step):
        report = Report(open_lab(folder), "nearest_neighbors", {})
        report.notes.append(f"made from {folder.name}")
        report.row("where", len(folder.name))
        report.save()
    for given in (run, step):
        collected(monkeypatch, tmp_path / "results", f"--runs={given}")
        kept = tmp_path / "results" / "run" / "nearest_neighbors"
        assert read_result(kept.with_suffix(".json")).notes == [f"made from {given.name}"]
        assert kept.with_suffix(".csv").read_text().strip().endswith(f",{len(given.name)}")


def test_a_metric_with_very_many_rows_stays_with_the_run(tmp_path, monkeypatch):
    """Other rows are collected as they are."""
    monkeypatch.setattr(collect, "MOST_ROWS", 5)
    lines = ["metric,value"] + ["few,1"] * 5 + ["many,2"] * 6
    text = [",".join(collect.COLUMNS)] + ["," * 9 + line for line in lines[1:]]
    (tmp_path / "rows.csv").write_text("\n".join(text) + "\n")
    collect.copy_rows(tmp_path / "rows.csv", tmp_path / "kept.csv")
    assert (tmp_path / "kept.csv").read_text().splitlines() == text[:6]


def test_results_of_a_release_belong_to_its_run(tmp_path, monkeypatch):
    """--released takes results of rounded weights of a run that runs.json has, and of no other run."""
    data = corpus(tmp_path / "data", repeats=1)
    run = save_run(tmp_path / "run", tiny(), data)
    step = checkpoint.find(run)
    change_state(step, data_sha256=Dataset(data, "val", 1).data_sha256)
    release = tmp_path / "released" / "run"
    shutil.copytree(run, release)
    rounded = {name: tensor.half().float() for name, tensor in tiny().state_dict().items()}
    save_file(rounded, checkpoint.find(release) / "model.safetensors")
    change_state(checkpoint.find(release), sha256={})
    Report(open_lab(release), "ablate_signal", {}).save()
    results = tmp_path / "results"
    with pytest.raises(collect.UserError, match="is no release of a run in runs.json"):
        collected(monkeypatch, results, f"--released={release}")
    collected(monkeypatch, results, f"--runs={run}")
    collected(monkeypatch, results, f"--released={release}")
    entry = json.loads((results / "runs.json").read_text())["run"]
    kept = read_result(results / "run" / "ablate_signal.json")
    assert list(kept.made_from.values()) == [entry["released_sha256"]] != [entry["weights_sha256"]]

    change_state(checkpoint.find(release), whole_val_loss=0.5)
    before = files(results)
    with pytest.raises(collect.UserError, match="is no release of a run in runs.json"):
        collected(monkeypatch, results, f"--released={release}")
    assert before == files(results)


def test_a_run_whose_data_is_not_here_is_not_collected(tmp_path, monkeypatch):
    """Sources and tokens are those of the data it was trained on; without it nothing is written."""
    run = save_run(tmp_path / "run", tiny(), corpus(tmp_path / "data", repeats=1))  # of another hash
    with pytest.raises(collect.UserError, match="that the run was trained on is not here"):
        collected(monkeypatch, tmp_path / "results", f"--runs={run}")
    change_state(checkpoint.find(run), whole_val_loss=None)  # nor is one that is not finished
    with pytest.raises(collect.UserError, match="no loss over the whole validation split"):
        collected(monkeypatch, tmp_path / "results", f"--runs={run}")
    assert not (tmp_path / "results").exists()


def test_an_imported_model_is_collected_without_a_corpus_of_its_own(tmp_path, monkeypatch):
    """Nobody here knows what it was trained on, and it has no loss over a whole split."""
    data = corpus(tmp_path / "data", repeats=1)
    run = save_run(tmp_path / "run", tiny(vocab="dense"), data, step=0, imported_from="elsewhere")
    change_state(checkpoint.find(run), whole_val_loss=None)
    collected(monkeypatch, tmp_path / "results", f"--runs={run}")
    entry = json.loads((tmp_path / "results" / "runs.json").read_text())["run"]
    assert entry["corpus"] is None and entry["tokens"] == 0 and entry["bits_per_byte"] == 2.0


def test_a_result_of_an_older_form_is_refused(tmp_path, monkeypatch):
    """A result without keys is named in one line, and nothing is written."""
    data = corpus(tmp_path / "data", repeats=1)
    run = save_run(tmp_path / "run", tiny(), data)
    change_state(checkpoint.find(run), data_sha256=Dataset(data, "val", 1).data_sha256)
    folder = run / "experiments" / "ablate_signal"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"experiment": "ablate_signal", "claims": [{"claim": "it is so"}]}')
    with pytest.raises(collect.UserError, match="no result of this version .*: run it again"):
        collected(monkeypatch, tmp_path / "results", f"--runs={run}")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("option", ["studies", "bench"])
def test_what_is_missing_is_named_before_anything_is_written(tmp_path, monkeypatch, option):
    with pytest.raises(collect.UserError, match="nothing was collected"):
        collected(monkeypatch, tmp_path / "results", f"--{option}={tmp_path / 'nothing'}")
    assert not (tmp_path / "results").exists()
