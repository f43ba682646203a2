"""run_all: what is up to date, failures that stop nothing, several runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint import write_atomically
from configurator import UserError
from experiments import ablate_signal, run_all, signal_lens
from experiments.lab import Report
from tests.lab_fixtures import corpus, open_lab, save_run, tiny

ROOT = Path(run_all.__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path):
    data = corpus(tmp_path / "data", repeats=2)
    save_run(tmp_path / "out" / "dense", tiny(vocab="dense"), data)
    return save_run(tmp_path / "out" / "tiny", tiny(), data)


def empty(lab, name="ablate_signal"):
    """A report that claims nothing."""
    return Report(lab, name, {})


def change(path, **fields):
    """Write other fields into a result.json."""
    write_atomically(path, json.dumps(json.loads(path.read_text()) | fields))


def test_a_result_is_up_to_date_for_the_same_weights_seed_and_code_alone(run, tmp_path):
    lab = open_lab(run)
    empty(lab).save()
    assert run_all.up_to_date(lab, "ablate_signal") and not run_all.up_to_date(lab, "signal_lens")
    assert not run_all.up_to_date(open_lab(run, seed=1), "ablate_signal")
    assert not run_all.up_to_date(open_lab(run / "step_000001"), "ablate_signal")  # a step has its own
    data = tmp_path / "data"
    save_run(run.parent / "dense", tiny(1, vocab="dense"), data)
    assert not run_all.up_to_date(open_lab(run), "ablate_signal")  # the baseline was trained again
    save_run(run.parent / "dense", tiny(vocab="dense"), data)
    assert run_all.up_to_date(open_lab(run), "ablate_signal")
    save_run(run, tiny(1), data)
    assert not run_all.up_to_date(open_lab(run), "ablate_signal")


@pytest.mark.parametrize(
    "fields",
    [{"code_sha256": "0"}, {"code_sha256": None}, {"options": {"prompt": "x"}}, {"claims": 1}],
)
def test_a_result_of_other_code_or_with_options_is_not_up_to_date(run, fields):
    lab = open_lab(run)
    report = empty(lab)
    report.save()
    change(report.folder / "result.json", **fields)
    assert not run_all.up_to_date(lab, "ablate_signal")


def test_the_age_of_files_does_not_matter(run, monkeypatch):
    """A result stays up to date when the script is written again as it was."""
    lab = open_lab(run)
    empty(lab).save()
    script = Path(ablate_signal.__file__)
    before = script.stat()
    os.utime(script)
    try:
        assert run_all.up_to_date(lab, "ablate_signal")
    finally:
        os.utime(script, ns=(before.st_atime_ns, before.st_mtime_ns))


def start(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["run_all.py", *arguments])
    run_all.main()


def test_a_failure_is_shown_and_stops_nothing(run, monkeypatch, capsys):
    def broken(lab):
        raise RuntimeError("planted")

    monkeypatch.setattr(signal_lens, "run", broken)
    monkeypatch.setattr(ablate_signal, "run", empty)
    with pytest.raises(SystemExit) as stop:
        start(monkeypatch, f"--run={run}", "--only=signal_lens,ablate_signal", "--device=cpu")
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert "RuntimeError: planted" in printed.err and "failed: signal_lens" in printed.err
    assert "1 of 2 experiments" in printed.out
    assert (run / "experiments" / "ablate_signal" / "result.json").exists()


def test_a_full_disk_is_one_line(run, monkeypatch, capsys):
    """As in any other command; the next experiment is tried all the same."""

    def full(lab):
        raise OSError(28, "No space left on device", "result.json")

    monkeypatch.setattr(signal_lens, "run", full)
    monkeypatch.setattr(ablate_signal, "run", empty)
    with pytest.raises(SystemExit):
        start(monkeypatch, f"--run={run}", "--only=signal_lens,ablate_signal", "--device=cpu")
    printed = capsys.readouterr()
    line = "signal_lens failed: result.json: No space left on device: free some space, or write elsewhere"
    assert line in printed.err and "Traceback" not in printed.err and "1 of 2" in printed.out


def test_nobody_reads_on(run, monkeypatch):
    """`run_all.py | head`: the experiment is saved, none is called failed."""
    monkeypatch.setattr(ablate_signal, "run", empty)

    def table(result):
        raise BrokenPipeError

    monkeypatch.setattr("experiments.lab.report.table", table)
    with pytest.raises(BrokenPipeError):
        start(monkeypatch, f"--run={run}", "--only=ablate_signal", "--device=cpu")
    assert (run / "experiments" / "ablate_signal" / "result.json").exists()


ODD = """
import sys
sys.argv = ["run_all.py", "--run=" + sys.argv[1], "--only=ablate_signal", "--device=cpu"]
import configurator
from experiments import ablate_signal, run_all
from experiments.lab import Report

def odd(lab):
    report = Report(lab, "ablate_signal", {})
    report.gallery = "a \u2500 b"
    return report

ablate_signal.run = odd
configurator.run(run_all.main)
"""


def test_a_gallery_that_stdout_cannot_encode_fails_nothing(run):
    env = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ODD, run], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a \\u2500 b" in done.stdout and "1 of 1 experiments" in done.stdout


def test_several_runs_one_after_the_other(run, tmp_path, monkeypatch, capsys):
    """The second run's weights do not fit its configuration: the first one is done all the same."""
    other = save_run(run.parent / "other", tiny(1), tmp_path / "data")
    done = []

    def count(lab):
        done.append(lab.checkpoint.name)
        return empty(lab)

    monkeypatch.setattr(ablate_signal, "run", count)
    both = f"--run={run},{other}"
    start(monkeypatch, both, "--only=ablate_signal")
    start(monkeypatch, both, "--only=ablate_signal")
    printed = capsys.readouterr().out
    assert done == ["tiny", "other"] and printed.count("ablate_signal: up to date") == 2
    start(monkeypatch, both, "--only=ablate_signal", "--again")
    assert done == ["tiny", "other"] * 2

    state = other / "step_000001" / "state.json"
    config = json.loads(state.read_text())["config"]
    config["model"]["n_layer"] = 3
    change(state, config=config)
    with pytest.raises(SystemExit):
        start(monkeypatch, f"--run={other},{run}", "--only=ablate_signal", "--again")
    printed = capsys.readouterr()
    assert done[-1] == "tiny" and len(done) == 5
    assert f"failed: ablate_signal ({other})" in printed.err and "1 of 2 experiments" in printed.out


def test_a_wrong_name_is_an_error_before_the_first_experiment(run, monkeypatch):
    monkeypatch.setattr(ablate_signal, "run", None)
    with pytest.raises(UserError, match="did you mean ablate_signal"):
        start(monkeypatch, f"--run={run}", "--only=ablate")
    with pytest.raises(UserError, match="did you mean .*tiny"):
        start(monkeypatch, f"--run={run},{run}y", "--only=ablate_signal")
    with pytest.raises(UserError, match="no run .*did you mean .*dense"):
        start(monkeypatch, f"--run={run}", f"--baseline={run.parent / 'dens'}")
    with pytest.raises(UserError, match="no plain GPT .* its vocabulary is factored"):
        start(monkeypatch, f"--run={run}", f"--baseline={run}")
