"""crystallization: injection is steering, an early one that is amplified counts more, verdicts that fail."""

import numpy as np
import pytest
import torch

import hooks
from experiments import crystallization
from experiments.lab import Subject
from experiments.lab.results import read_result
from tests.lab_fixtures import averaging, corpus, ids, loud, open_lab, save_run, silent, tiny


@pytest.mark.parametrize("where", ["all", "last"])
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_injection_is_steering(where, strength):
    """The same change of the outcome as when the steering hook adds the direction to the whole model."""
    net = loud(tiny(1))
    idx = ids(1, 7)
    direction = 3 * torch.eye(16)[:1]  # its length does not matter
    plus, minus = torch.tensor([5]), torch.tensor([9])
    layers = [0, 1, 2]
    subject = Subject("planted", net)
    change = crystallization.injection(subject, idx, direction, plus, minus, layers, where, strength)

    def outcome():
        with torch.no_grad():
            logits = net(idx)[0][0, -1]
        return (logits[5] - logits[9]).item()

    before = outcome()
    place = slice(None) if where == "all" else slice(-1, None)
    for layer in layers:
        with hooks.steer(net, direction[0], strength, [layer], place):
            assert change[0, layer].item() == pytest.approx(outcome() - before, abs=1e-5)


def test_an_early_injection_that_is_amplified_counts_more():
    """Targets live in half of the stream, contexts in the other; block 0 amplifies the targets' half."""
    half = torch.diag((torch.arange(16) < 8).float())
    E = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    E[:100, 8:] = 0
    E[100:, :8] = 0
    net = averaging(silent(tiny(0, n_layer=3)), 0, value=half, gain=10.0)
    subject = Subject("planted", hooks.with_embedding(net, E))
    idx = ids(30, 8, low=100, high=200)
    target, top = torch.arange(30), idx[:, -1]
    change = crystallization.injection(subject, idx, E[target], target, top, [0, 1, 2, 3], "all")
    assert (change[:, 0] > change[:, 1] + 0.1).all()
    assert torch.allclose(change[:, 1], change[:, 3], atol=1e-4)  # later blocks add nothing
    row = slice(3, 4)  # every row has its own direction
    one = crystallization.injection(subject, idx[row], E[target[row]], target[row], top[row], [0], "all")
    assert torch.allclose(one, change[row, :1])


def test_lens_depth_is_the_first_layer_from_which_the_lens_stays_near():
    kl = np.array([[9, 9, 0.1, 0], [0.1, 9, 0.1, 0], [0.1, 0.1, 0.1, 0]])
    assert crystallization.lens_depth(kl).tolist() == [2, 2, 0]


def test_at_most_thirteen_layers_are_swept():
    assert crystallization.swept_layers(4).tolist() == [0, 1, 2, 3, 4]
    assert crystallization.swept_layers(36).tolist() == list(range(0, 37, 3))


def test_a_target_is_no_model_s_top_token(tmp_path):
    lab = open_lab(save_run(tmp_path / "run", tiny(), corpus(tmp_path / "data")))
    common = lab.words.known_tokens()[:500]
    tops = np.stack([np.resize(common[:5], 40), np.resize(common[5:9], 40)], 1)
    targets = crystallization.choose_targets(lab, tops).numpy()
    assert not (targets[:, None] == tops).any() and set(targets) <= set(common)


def test_nothing_is_found_before_training(tmp_path):
    data = corpus(tmp_path / "data")
    save_run(tmp_path / "dense", tiny(1, n_embd=32, vocab="dense"), data)
    report = crystallization.run(open_lab(save_run(tmp_path / "tiny", tiny(0, n_embd=32), data)))
    report.save()
    result = read_result(report.folder / "result.json")
    assert [claim.verdict for claim in result.claims] == ["not supported"] * 3
    assert result.claims[1].controls.keys() == {"baseline", "step 0", "noise"}
    assert result.numbers["crossing"].keys() == {
        f"{name}, {length}"
        for name in ("reflow", "baseline", "step 0", "noise")
        for length in ("short", "long")
    }
    assert result.gallery and all((report.folder / figure.file).exists() for figure in result.figures)
