"""The comparison of results: two measurements of a tiny run are the same; every kind of change is found."""

import json
import shutil

import pytest

from experiments import semantic_algebra, signal_lens
from tests import compare_results
from tests.lab_fixtures import corpus, open_lab, save_run, tiny


def measure(folder, data):
    """The results of two experiments on a new run in `folder`."""
    run = save_run(folder / "tiny", tiny(), data)
    for experiment in (semantic_algebra, signal_lens):
        experiment.run(open_lab(run)).save()
    return run / "experiments"


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    data = corpus(tmp_path_factory.mktemp("data"))
    return [measure(tmp_path_factory.mktemp(name), data) for name in ("old", "new")]


@pytest.fixture
def changed(twice, tmp_path):
    """f(change) -> a copy of the second results, after change(result.json of signal_lens as a dict)."""

    def make(change):
        copy = shutil.copytree(twice[1], tmp_path / "experiments")
        path = copy / "signal_lens" / "result.json"
        result = json.loads(path.read_text())
        change(result)
        path.write_text(json.dumps(result))
        return copy

    return make


def compare(monkeypatch, *arguments):
    """Exit status of the script."""
    monkeypatch.setattr("sys.argv", ["compare_results.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        compare_results.main()
    return stop.value.code


def test_two_measurements_of_one_run_are_the_same(twice, monkeypatch, capsys):
    assert not compare(monkeypatch, *twice)
    assert capsys.readouterr().out == "semantic_algebra: no differences\nsignal_lens: no differences\n"


def test_a_changed_number_is_found(twice, changed, monkeypatch, capsys):
    def change(result):
        result["claims"][0]["measured"]["value"] += 1e-4

    new = changed(change)
    assert compare(monkeypatch, twice[0], new) == 1
    assert "signal_lens: 1 differences\n  lens_half.measured.value: " in capsys.readouterr().out
    assert not compare(monkeypatch, twice[0], new, "--tolerance=1e-3")


def test_a_changed_verdict_is_found(twice, changed, monkeypatch, capsys):
    def change(result):
        verdicts = {"supported": "not supported"}
        result["claims"][1]["verdict"] = verdicts.get(result["claims"][1]["verdict"], "supported")

    assert compare(monkeypatch, twice[0], changed(change)) == 1
    assert "  overlap_half.verdict: " in capsys.readouterr().out


def test_a_missing_claim_is_found(twice, changed, monkeypatch, capsys):
    new = changed(lambda result: result["claims"].pop())
    assert compare(monkeypatch, twice[0], new) == 1
    assert "  one_writer.verdict: only before: " in capsys.readouterr().out
    assert not compare(monkeypatch, twice[0], new, "--shared")


def test_a_reworded_claim_is_no_difference_and_a_missing_result_is(twice, changed, monkeypatch, capsys):
    def reword(result):
        result["claims"][0]["claim"] = "In other words."

    new = changed(reword)
    assert not compare(monkeypatch, twice[0], new)
    assert compare(monkeypatch, twice[0], new, "--words") == 1
    shutil.rmtree(new / "signal_lens")
    capsys.readouterr()
    assert compare(monkeypatch, twice[0], new) == 1
    assert "signal_lens: no result in " in capsys.readouterr().out
