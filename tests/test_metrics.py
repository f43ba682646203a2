"""Loggers beside metrics.jsonl: valid ids, one line when one is not to be had; statistics of signals."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from configurator import UserError
from experiments.lab.stats import gini
from metrics import Metrics, SignalStatistics, curves, rows, tracker_id
from model import ModelConfig, ReFlow


def tracker(**functions):
    """A module with the three calls of wandb and trackio."""
    nothing = {"init": lambda **how: None, "log": lambda row, step: None, "finish": lambda: None}
    return SimpleNamespace(**nothing | functions)


@pytest.fixture
def run(tmp_path):
    """A run's folder, with a name that wandb refuses as an id."""
    folder = tmp_path / "out" / "lr=3e-3,bs:2"
    folder.mkdir(parents=True)
    return folder


def named(monkeypatch, logger, run, token="a"):
    """What init of a logger is told of a run."""
    told = {}
    monkeypatch.setitem(sys.modules, logger, tracker(init=lambda **how: told.update(how)))
    Metrics(run, logger, {}, 0, token)
    return told


def test_an_id_is_valid_and_a_runs_own(tmp_path):
    """The same whenever the run is resumed; another in a copy of its folder, or at this path elsewhere."""
    run = tmp_path / "out" / "lr=3e-3,bs:2"
    found = {tracker_id(run, "a"), tracker_id(tmp_path / "copy" / run.name, "a"), tracker_id(run, "b")}
    assert len(found) == 3 and all(id.isalnum() and len(id) == 16 for id in found)
    assert tracker_id(run, "a") in found


@pytest.mark.parametrize("logger, identity", [("wandb", "id"), ("trackio", "name")])
def test_what_a_logger_is_told(run, tmp_path, monkeypatch, logger, identity):
    """Runs of one name in different folders have different identities; each is resumed under its own."""
    other = tmp_path / "elsewhere" / run.name
    other.mkdir(parents=True)
    told = [named(monkeypatch, logger, folder) for folder in (run, run, other)]
    assert told[0] == told[1] and told[0][identity] != told[2][identity]
    assert told[0]["name"].startswith(run.name) and told[0]["resume"] == "allow"
    assert told[0].get("dir", run) == run


@pytest.mark.parametrize("logger", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package(run, monkeypatch, logger):
    """One line with the remedy, and the rows of the run are as they were."""
    (run / "metrics.jsonl").write_text('{"step": 9}\n')
    monkeypatch.setitem(sys.modules, logger, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=f"^--logger={logger} needs a package: pip install {logger}$"):
        Metrics(run, logger, {}, 0, "a")
    assert (run / "metrics.jsonl").read_text() == '{"step": 9}\n'


def test_wandb_without_login(run, monkeypatch):
    """Whatever the service says is one line with the remedy."""

    def init(**how):
        raise RuntimeError("No API key configured. Use `wandb login` to log in.\nand more")

    monkeypatch.setitem(sys.modules, "wandb", tracker(init=init))
    with pytest.raises(UserError) as error:
        Metrics(run, "wandb", {}, 0, "a")
    remedy = "`wandb login` logs in, WANDB_MODE=offline does without"
    said = "No API key configured. Use `wandb login` to log in"
    assert str(error.value) == f"--logger=wandb: {said}: {remedy}"


def test_rows_after_the_start_are_written_anew(run):
    """Those up to it stay; a line that a kill cut goes."""
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    metrics = Metrics(run, "none", {}, 2, "a")
    metrics.write(step=3, loss=float("nan"))
    metrics.close()
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": null}\n'


@pytest.fixture
def vocab():
    torch.manual_seed(0)
    return ReFlow(ModelConfig(block_size=8, n_layer=1, n_head=1, n_embd=16, n_signal=8, vocab_size=64)).vocab


def test_statistics_of_signals_are_those_of_planted_factors(vocab):
    """One signal a recipe: Gini (S - 1) / S. One that no recipe uses is dead. Orthogonal rows: rank S."""
    found = SignalStatistics(vocab, 64)
    with torch.no_grad():
        vocab.recipe.copy_(torch.eye(8).repeat(8, 1))
        vocab.recipe[:, 3] = 0
        vocab.recipe[::8, 0] = -1
        vocab.basis.copy_(torch.eye(8, 16))
    values = found.measure()
    assert values["signal_gini"] == pytest.approx(7 / 8 * 7 / 8)  # an eighth of the rows is zero
    assert values["dead_signals"] == pytest.approx(1 / 8)
    assert values["basis_rank"] == pytest.approx(8, rel=1e-3)
    with torch.no_grad():
        vocab.basis[1:] = 0
    assert found.measure()["basis_rank"] == pytest.approx(1, rel=1e-2)


def test_gini_agrees_with_that_of_the_experiments(vocab):
    expected = gini(vocab.recipe.detach().numpy()).mean()
    assert SignalStatistics(vocab, 64).measure()["signal_gini"] == pytest.approx(expected, rel=1e-4)


def test_the_change_of_signals_is_from_step_0_also_after_a_restart(vocab, tmp_path):
    save_file({"vocab.recipe": vocab.recipe.detach()}, tmp_path / "start")
    found = SignalStatistics(vocab, 64)
    assert found.measure()["signal_change"] == 0
    with torch.no_grad():
        vocab.recipe *= 3
    again = SignalStatistics(vocab, 64, tmp_path / "start")
    assert found.measure()["signal_change"] == again.measure()["signal_change"] == pytest.approx(2)
    assert SignalStatistics(vocab, 64, tmp_path / "gone").measure()["signal_change"] is None


def test_curves_are_thinned_and_a_cut_line_is_passed_over(tmp_path):
    assert curves(tmp_path) == {}
    lines = [{"step": i, "loss": i / 10, "mfu": None} for i in range(1000)]
    text = "".join(json.dumps(row) + "\n" for row in lines) + '{"step": 1'
    (tmp_path / "metrics.jsonl").write_text(text)
    found = curves(tmp_path)
    assert rows(tmp_path) == lines
    assert list(found) == ["training loss, nats per token"]
    (points,) = found.values()
    assert len(points) == 250 and points[3] == [12, 1.2]
