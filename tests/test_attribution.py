"""Attribution in closed form equals brute force: signals removed the long way."""

import pytest
import torch

import attribution
import dictionary
import hooks
from attribution import Prediction
from dictionary import Dictionary
from tests.lab_fixtures import ids, tiny


def random_prediction(n=6, v=40, s=8, d=8, seed=0):
    """(Prediction, Dictionary) in float64, of a head without a backbone."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = Dictionary("native", normal(v, s), normal(s, d))
    h = normal(n, d)
    p = (h @ found.matrix().T).softmax(-1)
    return Prediction(h, p, *p.topk(2).indices.T), found


def logits_without(h, d, s):
    """Logits after signal s is removed, the long way."""
    codes = d.codes.clone()
    codes[:, s] = 0
    return h @ (codes @ d.atoms).T


def logits_projected(h, d, s):
    """Logits after the atom of signal s is projected out of the final state, the long way."""
    atom = d.atoms[s]
    return (h - (h @ atom)[:, None] * atom) @ d.matrix().T


@pytest.mark.parametrize("removal, remove", [("term", logits_without), ("direction", logits_projected)])
def test_closed_forms_equal_brute_force(removal, remove):
    pred, d = random_prediction()
    rows = torch.arange(len(pred))
    before = pred.h @ d.matrix().T
    W = d.codes[pred.target] - d.codes[pred.foil]
    contributions = d.activations(pred.h) * attribution.mixed(W, d, removal)
    first_order = attribution.first_order_change(pred, d, removal)
    for s in range(d.n_signals):
        after = remove(pred.h, d, s)
        difference = (after - before)[rows, pred.target] - (after - before)[rows, pred.foil]
        assert torch.allclose(-contributions[:, s], difference, atol=1e-12)
        log_p = after.log_softmax(-1)
        signal = torch.full((len(pred),), s)
        change, kl = attribution.remove_signals(pred, d, signal, removal, batch=4)
        assert torch.allclose(change, (log_p - pred.p.log())[rows, pred.target], atol=1e-12)
        assert torch.allclose(kl, (pred.p * (pred.p.log() - log_p)).sum(1), atol=1e-12)
        assert torch.allclose(first_order[:, s], change, atol=kl.max().item() + 1e-9)  # log p' = first - KL


def test_contributions_sum_to_the_logit_difference():
    pred, d = random_prediction()
    logits = pred.h @ d.matrix().T
    rows = torch.arange(len(pred))
    expected = logits[rows, pred.target] - logits[rows, pred.foil]
    assert torch.allclose(attribution.contributions(pred, d).sum(1), expected, atol=1e-12)


def test_both_removals_are_one_if_atoms_are_orthogonal():
    pred, d = random_prediction()
    d = Dictionary("native", d.codes, 3 * torch.linalg.qr(d.atoms).Q)
    signal = attribution.first_order_change(pred, d).argmin(1)
    term, direction = (attribution.remove_signals(pred, d, signal, how) for how in attribution.REMOVALS)
    assert torch.allclose(term[0], direction[0]) and torch.allclose(term[1], direction[1])


def test_each_prompt_loses_the_signal_chosen_for_it():
    pred, d = random_prediction()
    signal = torch.tensor([3, 0, 7, 7, 1, 2])
    change, kl = attribution.remove_signals(pred, d, signal)
    for i, s in enumerate(signal):
        alone = attribution.remove_signals(pred[i : i + 1], d, s[None])
        assert (change[i], kl[i]) == (pytest.approx(alone[0].item()), pytest.approx(alone[1].item()))


def test_the_change_of_a_very_large_signal_is_finite():
    """exp(-A_s W_vs) alone would overflow."""
    pred, d = random_prediction()
    huge = Dictionary("native", 1e4 * d.codes, d.atoms)
    signal = torch.zeros(len(pred), dtype=torch.long)
    assert all(values.isfinite().all() for values in attribution.remove_signals(pred, huge, signal))


def test_a_prediction_is_the_models_two_likeliest_tokens_at_the_end():
    net = tiny()
    prompts = ids(5, 8)
    pred = attribution.predict(net, prompts, batch=2)
    with torch.no_grad():
        h = net.encode(prompts)[:, -1]
        p = net(prompts)[0][:, -1, : net.config.n_tokens].softmax(-1)
    assert torch.allclose(pred.h, h, atol=1e-6) and torch.allclose(pred.p, p, atol=1e-6)
    assert torch.equal(torch.stack([pred.target, pred.foil], 1), p.topk(2).indices)
    part = pred[::2]
    assert len(pred) == 5 and len(part) == 3 and torch.equal(part.target, pred.target[::2])
    sums = attribution.contributions(pred, dictionary.native(net)).sum(1)
    logits = hooks.unembed(net, h)
    difference = logits.gather(1, pred.target[:, None]) - logits.gather(1, pred.foil[:, None])
    assert torch.allclose(sums, difference[:, 0], atol=1e-5)
