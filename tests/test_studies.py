"""The studies over many runs: pairing by seed, gaps that are known, verdicts, from files to results."""

import itertools
import json

import numpy as np
import pytest
import torch
from lab_fixtures import corpus, save_run, tiny

import checkpoint
import configurator
from configurator import UserError
from experiments import convergence, hard_sparsity, lab, stability, studies, study
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
    assert np.allclose(list(found.values()), expected, atol=5e-4)
    del t["factored", "4x128"][1]
    assert list(convergence.gaps(t, "factored", "4x128")) == [0, 2]


def test_gap_at_equal_parameters_is_the_planted_one():
    sizes = ["2x64", "3x96", "4x128"]
    same, beyond = convergence.gaps_at_equal_parameters(table(0.02), "factored", "4x128", sizes)
    assert np.allclose(same, 0.02, atol=1e-3) and not beyond
    _, beyond = convergence.gaps_at_equal_parameters(table(0.02), "factored", "2x64", sizes)
    assert beyond


def test_t_interval_and_its_verdicts():
    found = study.t_interval(np.array([1.0, 2.0, 3.0]))
    assert (found.value, found.low) == (pytest.approx(2), pytest.approx(2 - 4.3027 / np.sqrt(3), abs=1e-3))
    assert study.below("", np.array([-1.0, -1.1, -0.9]), 0.0, "seeds", {}).verdict == "supported"
    assert study.below("", np.array([-1.0, 1.1, -0.9]), 0.0, "seeds", {}).verdict == "not supported"
    assert study.below("", np.array([-1.0, -1.1]), 0.0, "seeds", {}).verdict == "inconclusive"


def test_positive_top_is_what_the_topk_model_keeps():
    net = tiny(vocab="topk", top_k=3)
    free = lab.Dictionary("native", net.vocab.recipe.detach(), torch.eye(16))
    assert torch.equal(hard_sparsity.positive_top(free, 3), net.vocab.recipes().detach())


def save_trained(folder, model, data, seed, loss=5.0):
    """A run of a study: finished, with metrics and a loss over the whole split."""
    save_run(folder, model, data, start=999 + seed)
    step = folder / "step_000001"
    state = json.loads((step / "state.json").read_text())
    state["config"]["train"]["seed"] = seed
    checkpoint.write_atomically(step / "state.json", json.dumps(state | {"whole_val_loss": loss}))
    lines = [{"step": 0, "val_loss": 11.0}, {"step": 1, "val_loss": 9.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def opened(pattern, out):
    return study.Study(out, study.find_runs(str(pattern)))


def test_the_studies_run_on_saved_runs(tmp_path, capsys):
    """Three seeds of untrained models: every claim about meaning fails, and what is missing is said."""
    data = corpus(tmp_path / "data", repeats=6)
    shapes = {"factored": {}, "dense": {"vocab": "dense"}, "topk": {"vocab": "topk", "top_k": 2}}
    losses = {"factored": 5.1, "dense": 5.0, "topk": 5.5}
    for seed in range(3):
        for kind, shape in shapes.items():
            folder = tmp_path / "runs" / f"{kind}{seed}"
            save_trained(folder, tiny(seed, **shape), data, seed, losses[kind] + 0.01 * seed)
    runs = opened(f"{tmp_path}/runs/*", tmp_path / "results")
    assert len(runs.runs) == 9
    found = {}
    for script in (convergence, hard_sparsity, stability):
        script.run(runs).save()
        path = tmp_path / "results" / "experiments" / script.__name__.rpartition(".")[2] / "result.json"
        found[script] = json.loads(path.read_text())["claims"]
    gap, equal, _ = (*found[convergence], None)
    assert gap["verdict"] == "supported"  # 2 % is below 3 %
    assert gap["measured"]["value"] == pytest.approx(0.02, abs=1e-3)
    assert equal["verdict"] == "inconclusive"  # one size: nothing to interpolate between
    loss, precision, analogies, _ = found[hard_sparsity]
    assert loss["measured"]["value"] == pytest.approx(5.1 / 5.5 - 1, abs=1e-3)
    assert precision["verdict"] == analogies["verdict"] == "not supported"
    assert [c["verdict"] for c in found[stability]] == ["not supported"] * 3
    with pytest.raises(UserError, match="no finished run matches"):
        study.find_runs(f"{tmp_path}/nothing/*")
    topk = opened(f"{tmp_path}/runs/topk*", tmp_path)
    with pytest.raises(UserError, match="no factored and dense runs"):
        convergence.run(topk)
    with pytest.raises(UserError, match="differ in their seed alone"):
        stability.run(topk)


def test_runs_that_do_not_compare_are_refused(tmp_path):
    """Equal but for nothing, unlike in more than the seed, other data: which are meant, the user must say."""
    data = corpus(tmp_path / "data", repeats=1)
    for name, n_signal in (("a", 16), ("b", 16), ("c", 8)):
        save_trained(tmp_path / "runs" / name, tiny(n_signal=n_signal), data, seed=0)
    save_run(tmp_path / "runs" / "made", tiny(), data)  # not trained: no metrics
    a, b, c = study.find_runs(f"{tmp_path}/runs/*")
    assert [step.parent.name for step, _ in (a, b, c)] == ["a", "b", "c"]
    cases = {
        "a and b differ in nothing: factored 2x16, seed 0": (a, b),
        "a and c .* more than their seed": (a, c),
    }
    for match, runs in cases.items():
        with pytest.raises(UserError, match=match):
            study.Study(tmp_path, runs).by_shape()
    b[1]["data_sha256"] = "another"
    with pytest.raises(UserError, match="a and b differ in data, steps"):
        study.Study(tmp_path, (a, b)).by_shape()


def test_partners_are_the_best_assignment_by_brute_force():
    """Five signals against six: no other one-to-one matching has a larger sum of |correlation|."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 5)), rng.standard_normal((40, 6))
    a[:, 3] = 7.0  # a dead signal has no correlation with anything
    with np.errstate(invalid="ignore"):
        r = np.nan_to_num(np.abs(np.corrcoef(a.T, b.T)[:5, 5:]))
    best = max(sum(r[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(6), 5))
    found = stability.matched(a, b)
    assert found.sum() == pytest.approx(best) and found[3] == 0
    assert np.count_nonzero(stability.matched(b, a)) == 4  # one signal has no partner, one a dead one


def test_neighbours_in_common_and_cka_by_hand():
    """A rotation changes neither; neighbours are counted as by sorting; unrelated codes share k / (n - 1)."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 60, 4))
    turn = np.linalg.qr(rng.standard_normal((4, 4))).Q
    at, bt, turned = (torch.from_numpy(x) for x in (a, b, a @ turn))
    assert (stability.in_common(at, turned, 10) == 1).all()
    near = []
    for x in (a, b):
        x = x - x.mean(0)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        near.append([set(np.argsort(-(x @ x[i]))[:11]) - {i} for i in range(60)])
    by_hand = [len(one & other) / 10 for one, other in zip(*near, strict=True)]
    assert np.allclose(stability.in_common(at, bt, 10), by_hand)
    assert stability.cka(a, 3 * a @ turn) == pytest.approx(1) and stability.cka(a, b) < 0.5


def test_stability_tells_shared_signals_from_a_shared_space(tmp_path):
    """A second "seed" that is the first with its signals in another order and sign has the same signals; one
    that is the first after a rotation has the same neighbours, but signals only as good as rotated ones."""
    data = corpus(tmp_path / "data", repeats=6)
    torch.manual_seed(0)
    order, sign = torch.randperm(24), torch.randint(0, 2, (24,)) * 2 - 1
    turn = torch.linalg.qr(torch.randn(24, 24)).Q
    changes = {"permuted": torch.eye(24)[order] * sign[:, None], "rotated": turn}
    signals = {}
    for name, change in changes.items():
        first, second = (tiny(0, n_signal=24, n_embd=24) for _ in "ab")
        with torch.no_grad():  # signals of unequal strength: their rotations are then other signals
            first.vocab.recipe *= torch.logspace(0, -1, 24)
            second.vocab.recipe.copy_(first.vocab.recipe @ change.T)
            second.vocab.basis.copy_(change @ first.vocab.basis)
        for seed, model in enumerate((first, second)):
            save_trained(tmp_path / name / str(seed), model, data, seed)
        report = stability.run(opened(f"{tmp_path / name}/*", tmp_path))
        signals[name] = report.claims[2].reason
        assert report.numbers["neighbours"]["native"] == pytest.approx(1)
        matched = report.numbers["matched"]["native"]
        assert matched == pytest.approx(1, abs=1e-3) if name == "permuted" else matched < 0.8
        assert report.claims[0].verdict == "supported"
    assert signals["rotated"].startswith("random rotations do as well")
    assert signals["permuted"].startswith("beats 19 rotations")
