"""concept_inception: closed forms and brute force, planted rows that force, verdicts that fail."""

import numpy as np
import pytest
import torch

import hooks
from experiments import concept_inception
from experiments.lab import Subject
from tests.lab_fixtures import (
    corpus_of_pairs,
    ids,
    loud,
    open_lab,
    planted_pairs,
    save_run,
    silent,
    tiny,
    token,
    words,
)

COARSE = (0.25, 1.0, 4.0, 64.0)  # a grid that takes less time


def pairs():
    """Words in fixed pairs: in the corpus the second always follows the first."""
    found = words(300)
    return list(zip(found[::2], found[1::2], strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A corpus of word pairs in random order."""
    return corpus_of_pairs(tmp_path_factory.mktemp("data"), pairs(), 12)


def planted(turn=False):
    return planted_pairs(pairs(), turn=turn, aside=True)


@pytest.fixture(scope="module")
def report(data, tmp_path_factory):
    """The report on a planted run with a plain GPT beside it."""
    out = tmp_path_factory.mktemp("out")
    save_run(out / "dense", tiny(3, n_embd=32, vocab="dense"), data)
    lab = open_lab(save_run(out / "planted", planted(), data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concept_inception, "N_TARGETS", 24)
        return concept_inception.run(lab)


@pytest.fixture
def coarse(monkeypatch):
    """A search that takes less time."""
    monkeypatch.setattr(concept_inception, "N_TARGETS", 24)
    monkeypatch.setattr(concept_inception, "HALVINGS", 2)
    monkeypatch.setattr(concept_inception, "GRID", COARSE)


def test_the_closed_form_agrees_with_brute_force():
    torch.manual_seed(0)
    E, weight = torch.randn(30, 6).double(), torch.rand(6).double() + 0.5
    resid, targets = torch.randn(30, 6).double(), torch.arange(30)
    direction = E[targets] + 0.5 * torch.randn(30, 6)
    low, high = concept_inception.closed_form(E, weight, resid, direction, targets)
    alpha = torch.linspace(0, 20, 4001).double()
    x = hooks.add_direction(resid[:, None], direction[:, None], alpha[:, None])  # (n, A, d)
    wins = ((x * weight) @ E.T).argmax(-1) == targets[:, None]
    inside = (alpha > low[:, None]) & (alpha < high[:, None])
    away = ((alpha - low[:, None]).abs() > 1e-6) & ((alpha - high[:, None]).abs() > 1e-6)
    assert (wins == inside)[away].all()
    assert wins.any(1).sum() > 5 and (~wins.any(1)).sum() > 2
    assert (torch.isfinite(high) & (low < high)).any()  # a target that is lost again


def test_the_search_agrees_with_the_closed_form_through_silent_blocks():
    subject = Subject("reflow", planted_pairs(pairs()))
    idx = torch.tensor([[token(word) for word in pair] for pair in pairs()[:20]])
    targets = torch.tensor([token(pair[0]) for pair in pairs()[20:40]])
    direction = subject.E[targets]
    contexts = concept_inception.Contexts(subject.net, idx)
    exact = concept_inception.exact_dose(subject, subject.E[idx[:, -1]], direction, targets)
    assert np.isfinite(exact).sum() > 8
    for layer in range(3):
        found, _ = concept_inception.critical_dose(contexts, targets, direction, layer)
        both = np.isfinite(exact) & (exact > concept_inception.GRID[0])
        assert (np.isfinite(found) == np.isfinite(exact)).all()
        assert (np.abs(found / exact - 1)[both] < 0.07).all()


def test_cached_contexts_give_the_stream_of_a_whole_forward_pass():
    net = loud(tiny()).double()
    idx = ids(4, 10)
    direction = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).double()
    dose = torch.tensor([0.0, 1.0, 2.0, 5.0]).double()
    with torch.no_grad():
        contexts = concept_inception.Contexts(net, idx)
        for layer in range(3):
            where = [layer], slice(-1, None)
            with hooks.steer(net, direction[:, None], dose[:, None, None], *where):
                whole = net.encode(idx)[:, -1]
            torch.testing.assert_close(contexts.final(direction, dose, layer), whole)


def test_a_target_that_is_lost_at_a_larger_dose_is_not_steady():
    """Along a mixture of rows, target 1 wins from 1 / 0.9 norms on; row 2 overtakes it at 2 / 0.42 norms."""
    net = silent(tiny(vocab="dense"))
    E = torch.zeros_like(net.vocab.matrix())
    E[0, 0] = 1.0  # the context
    E[1, 1] = 1.0
    E[2, 2], E[2, 0] = 3.0, -2.0
    net = hooks.with_embedding(net, E)
    mixture = torch.tensor([0, 0.9, 0.44, *[0.0] * 13])
    direction = torch.stack([mixture / mixture.norm(), E[1]])
    contexts = concept_inception.Contexts(net, torch.zeros(2, 2, dtype=torch.long))
    alpha, steady = concept_inception.critical_dose(contexts, torch.tensor([1, 1]), direction, 2)
    assert alpha == pytest.approx([1 / 0.9, 1.0], rel=0.02)
    assert steady.tolist() == [False, True]


def test_survival_by_hand():
    doses, share = concept_inception.survival(np.array([1.0, 2.0, 2.0, np.inf]))
    assert doses.tolist() == [1, 2] and share == pytest.approx([0.75, 0.25])
    assert concept_inception.survival(np.full(3, np.inf))[0].size == 0


def test_planted_rows_force_their_tokens(report):
    assert report["forces"].verdict == "supported"
    assert report["few_signals"].beats_gauges and report["few_signals"].lower
    assert report.numbers["closed_form_largest_relative_error"] < 0.07
    assert report.numbers["share_forced_controls"]["random"] < 0.2
    assert [figure.file for figure in report.figures] == ["critical_alpha.png"]


def test_the_paper_finds_its_rows_and_numbers(report):
    """paper/build.py reads every alpha* of a model at numbers["layer"]; paper.typ the shares forced there."""
    numbers = report.result().numbers  # as JSON: keys are text
    layer = numbers["layer"]
    for model in ("reflow", "baseline", "step 0"):
        at = {"model": model, "layer": layer, "metric": "alpha*"}
        alpha = [row["value"] for row in report.rows if at.items() <= row.items()]
        assert len(alpha) == 24
        assert np.isfinite(alpha).mean() == numbers["share_forced"][model][str(layer)]


def test_forcing_is_no_sign_of_training(coarse, data, tmp_path):
    """Geometry forces tokens in an untrained model as well, so its claim fails against another such."""
    report = concept_inception.run(open_lab(save_run(tmp_path / "untrained", tiny(5), data, step=0)))
    assert report["forces"].verdict == "not supported"


def test_rotated_signals_force_no_better_than_rotations(coarse, data, tmp_path):
    """The same E and the same function as the planted run: only the claim about signals changes."""
    report = concept_inception.run(open_lab(save_run(tmp_path / "turned", planted(turn=True), data)))
    assert report["few_signals"].verdict == "not supported"
