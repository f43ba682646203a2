"""The studies over many runs: pairing by seed, gaps that are known, verdicts, from files to results."""

import json

import numpy as np
import pytest
import torch
from lab_fixtures import corpus, save_run, tiny

import checkpoint
import configurator
from configurator import UserError
from experiments import convergence, hard_sparsity, lab, studies
from model import ModelConfig
from train import TrainConfig


def test_every_planned_run_is_a_command_that_train_understands(tmp_path):
    """27 runs, each folder once; all of a seed share seed, schedule and tokens, whatever kind and size."""
    runs = studies.plan(studies.StudiesConfig(out=str(tmp_path)))
    assert len({folder for folder, _ in runs}) == 27
    seen = set()
    for folder, arguments in runs:
        assert arguments.pop() == "--resume"
        m, c = configurator.parse(ModelConfig, TrainConfig, argv=arguments)
        assert folder.name == f"{m.vocab}-{m.n_layer}x{m.n_embd}-seed{c.seed}" and c.out_dir == str(folder)
        seen.add((c.seed, c.max_steps, c.batch_size, m.block_size, c.lr, c.dataset))
    assert len(seen) == 3


def table(gap):
    """Losses of 5 - 0.1 log(parameters) for dense models, `gap` above it for factored ones, noise by seed."""
    rng, found = np.random.default_rng(0), {}
    for i, size in enumerate(("2x64", "3x96", "4x128")):
        for kind, parameters in (("dense", 10e6 * 2**i), ("factored", 8e6 * 2**i)):
            for seed in range(3):
                noise = 1 + 0.01 * np.random.default_rng(seed).standard_normal()  # shared by a pair
                loss = (5 - 0.1 * np.log(parameters)) * noise * (1 + (kind == "factored") * gap)
                loss *= 1 + 1e-4 * rng.standard_normal()
                found.setdefault((kind, size), {})[seed] = loss, parameters, None
    return found


def test_gaps_are_paired_by_seed():
    """Noise of 1 % that both models of a seed share does not hide a gap of 2 %."""
    t = table(0.02)
    expected = (5 - 0.1 * np.log(8e6 * 4)) / (5 - 0.1 * np.log(10e6 * 4)) * 1.02 - 1
    found = convergence.gaps(t, "factored", "4x128")
    assert np.allclose(found, expected, atol=5e-4)
    del t["factored", "4x128"][1]
    assert len(convergence.gaps(t, "factored", "4x128")) == 2


def test_gap_at_equal_parameters_is_the_planted_one():
    sizes = ["2x64", "3x96", "4x128"]
    same, beyond = convergence.gaps_at_equal_parameters(table(0.02), "factored", "4x128", sizes)
    assert np.allclose(same, 0.02, atol=1e-3) and not beyond
    _, beyond = convergence.gaps_at_equal_parameters(table(0.02), "factored", "2x64", sizes)
    assert beyond


def test_t_interval_and_its_verdicts():
    found = convergence.t_interval(np.array([1.0, 2.0, 3.0]))
    assert (found.value, found.low) == (pytest.approx(2), pytest.approx(2 - 4.3027 / np.sqrt(3), abs=1e-3))
    assert convergence.below("", np.array([-1.0, -1.1, -0.9]), 0.0, "seeds", {}).verdict == "supported"
    assert convergence.below("", np.array([-1.0, 1.1, -0.9]), 0.0, "seeds", {}).verdict == "not supported"
    assert convergence.below("", np.array([-1.0, -1.1]), 0.0, "seeds", {}).verdict == "inconclusive"


def test_positive_top_is_what_the_topk_model_keeps():
    net = tiny(vocab="topk", top_k=3)
    free = lab.Dictionary("native", net.vocab.recipe.detach(), torch.eye(16))
    assert torch.equal(hard_sparsity.positive_top(free, 3), net.vocab.recipes().detach())


def test_the_studies_run_on_saved_runs(tmp_path, capsys):
    """Three seeds of untrained models: every claim about meaning fails, and what is missing is said."""
    data = corpus(tmp_path / "data", repeats=6)
    shapes = {"factored": {}, "dense": {"vocab": "dense"}, "topk": {"vocab": "topk", "top_k": 2}}
    for seed in range(3):
        for kind, shape in shapes.items():
            folder = save_run(tmp_path / "runs" / f"{kind}{seed}", tiny(seed, **shape), data)
            step = folder / "step_000001"
            state = json.loads((step / "state.json").read_text())
            state["config"]["train"]["seed"] = seed
            state["whole_val_loss"] = {"factored": 5.1, "dense": 5.0, "topk": 5.5}[kind] + 0.01 * seed
            checkpoint.write_atomically(step / "state.json", json.dumps(state))
            lines = [{"step": 0, "val_loss": 11.0}, {"step": 1, "val_loss": 9.0}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    runs = lab.find_runs(f"{tmp_path}/runs/*")
    assert len(runs) == 9
    for study in (convergence, hard_sparsity):
        study.run(runs, tmp_path / "runs").save()
    folder = tmp_path / "runs" / "experiments"
    result = json.loads((folder / "convergence" / "result.json").read_text())
    assert result["claims"][0]["verdict"] == "supported"  # 2 % is below 3 %
    assert result["claims"][0]["measured"]["value"] == pytest.approx(0.02, abs=1e-3)
    assert result["claims"][1]["verdict"] == "inconclusive"  # one size: nothing to interpolate between
    result = json.loads((folder / "hard_sparsity" / "result.json").read_text())
    assert result["claims"][0]["measured"]["value"] == pytest.approx(5.1 / 5.5 - 1, abs=1e-3)
    assert [c["verdict"] for c in result["claims"][1:3]] == ["not supported"] * 2
    with pytest.raises(UserError, match="no finished run matches"):
        lab.find_runs(f"{tmp_path}/nothing/*")
    with pytest.raises(UserError, match="no factored and dense runs"):
        convergence.run([r for r in runs if r[0].parent.name.startswith("topk")], tmp_path / "runs")
