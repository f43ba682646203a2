"""ablate_signal and sparsity_profile: closed forms, planted signals found, verdicts that fail."""

import json

import numpy as np
import pytest
import torch
from lab_fixtures import corpus, open_lab, save_run, tiny

from experiments import ablate_signal, lab, sparsity_profile


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """An untrained run with a dense one beside it: nothing is there to be found."""
    out = tmp_path_factory.mktemp("out")
    data = corpus(tmp_path_factory.mktemp("data"))
    save_run(out / "dense", tiny(vocab="dense"), data)
    return open_lab(save_run(out / "tiny", tiny(), data))


def random_state(n=6, v=40, s=8, d=8, seed=0):
    """(h, dictionary, p, target, foil) in float64, of a head without a backbone."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dictionary = lab.Dictionary("native", normal(v, s), normal(s, d))
    h = normal(n, d)
    p = (h @ (dictionary.codes @ dictionary.atoms).T).softmax(-1)
    top = p.topk(2).indices
    return h, dictionary, p, top[:, 0], top[:, 1]


def without(h, d, s):
    """Logits after signal s is removed, the long way."""
    codes = d.codes.clone()
    codes[:, s] = 0
    return h @ (codes @ d.atoms).T


def test_output_closed_forms_equal_brute_force():
    h, d, p, target, foil = random_state()
    A, change, first = ablate_signal.output_side(h, d, p, target, foil)
    rows, z = torch.arange(len(h)), h @ (d.codes @ d.atoms).T
    for s in range(d.codes.size(1)):
        after = without(h, d, s)
        difference = (after - z)[rows, target] - (after - z)[rows, foil]
        assert torch.allclose(change[:, s], difference, atol=1e-12)
        log_p = after.log_softmax(-1)
        own, kl = ablate_signal.exact(A[:, s], d.codes[:, s].expand(len(h), -1), p, target)
        assert torch.allclose(own, (log_p - p.log())[rows, target], atol=1e-12)
        assert torch.allclose(kl, (p * (p.log() - log_p)).sum(1), atol=1e-12)
        assert torch.allclose(first[:, s], own, atol=kl.max().item() + 1e-9)  # log p' = first order - KL
    assert torch.allclose(-change.sum(1), z[rows, target] - z[rows, foil], atol=1e-12)  # complete


def test_input_side_equals_an_edited_embedding(room):
    """Taking a signal out of every embedding is reading from E without that signal; the head keeps it."""
    net, d = room.reflow.net, room.reflow.dictionary
    x = room.heldout(1, 12)[0][0]
    hidden = ablate_signal.input_side(net, d, x, part=5)
    for s in (0, 7, 15):
        codes = d.codes.clone()
        codes[:, s] = 0
        with torch.no_grad():
            expected = lab.with_matrix(net, codes @ d.atoms, room.reflow.E).encode(x[None])[0, -1]
        assert torch.allclose(hidden[s], expected, atol=1e-4)


def test_attribution_is_the_derivative_of_the_input_ablation(room):
    net, x = room.reflow.net, room.heldout(3, 10)[0]
    h, _, target, foil = ablate_signal.measure(room.reflow, x)
    gradient = ablate_signal.attribution(net, x, target, foil)
    E, rows = room.reflow.E, torch.arange(3)
    step = 1e-3 * torch.randn(3, 10, net.config.n_embd)
    with torch.no_grad():
        ends = [
            net.norm(lab.run_blocks(net, net.vocab.embed(x) + sign * step)[-1][:, -1]) for sign in (1, -1)
        ]
    values = [((e @ E.T)[rows, target] - (e @ E.T)[rows, foil]).double() for e in ends]
    assert torch.allclose(
        (values[0] - values[1]) / 2, (gradient * step).sum((1, 2)).double(), rtol=0.02, atol=1e-5
    )


def test_n_90_by_hand():
    assert ablate_signal.n_90(
        torch.tensor([[9.0, 0.5, -0.5], [1.0, 1.0, 1.0], [-5.0, 5.0, 0.0]])
    ).tolist() == [1, 3, 2]


def planted(seed, sparse, v=400, s=16):
    """Recipes of one strong signal each, or Gaussian ones, which are alike in any rotation."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(v, s, generator=generator)
    if sparse:
        codes = 0.05 * codes
        codes[torch.arange(v), torch.arange(v) % s] = 1.0
    return lab.Dictionary("native", codes, torch.linalg.qr(torch.randn(s, s, generator=generator)).Q)


def concentration(d, seed, n=60):
    """n_90 of the logit difference of random token pairs at random streams, (n,)."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d.atoms.size(1), generator=generator)
    target, foil = torch.randint(len(d.codes), (2, n), generator=generator)
    p = (h @ (d.codes @ d.atoms).T).softmax(-1)
    return ablate_signal.n_90(ablate_signal.output_side(h, d, p, target, foil)[1])


def verdicts(measure, lower):
    """(how often a planted sparse dictionary, a Gaussian one, is found special) in 20 seeds."""
    found = {}
    for sparse in (True, False):
        counted = 0
        for seed in range(20):
            d = planted(seed, sparse)
            generator = torch.Generator().manual_seed(100 + seed)
            turned = [measure(lab.rotated(d, generator), seed) for _ in range(lab.ROTATIONS)]
            counted += (
                lab.signals("", measure(d, seed), turned, {}, "prompts", lower=lower).verdict == "supported"
            )
        found[sparse] = counted
    return found[True], found[False]


@pytest.mark.parametrize(
    ("measure", "lower"),
    [(concentration, True), (lambda d, seed: lab.gini(d.codes.numpy()), False)],
    ids=["concentration", "gini"],
)
def test_planted_signals_are_found_and_a_rotation_of_nothing_is_not(measure, lower):
    sparse, gaussian = verdicts(measure, lower)
    assert sparse == 20 and gaussian <= 4  # 1 of 20 expected; more than 4 has a probability below 0.3 %


def test_the_signal_that_alone_drives_one_token_is_the_strongest():
    d = planted(0, sparse=True)
    h = 8 * d.atoms[[3, 11]] + 0.1 * d.atoms[[5, 6]]
    p = (h @ (d.codes @ d.atoms).T).softmax(-1)
    target, foil = torch.tensor([3, 11]), torch.tensor([5, 6])
    signal, change, kl = ablate_signal.strongest(h, d, p, target, foil)
    assert signal.tolist() == [3, 11] and (change < -1).all() and (kl > 0.5).all()


def test_active_share_of_a_gaussian_row():
    rows = np.random.default_rng(0).standard_normal((50, 4000))
    assert sparsity_profile.active(rows, 1.58) == pytest.approx(0.114, abs=3e-3)
    assert sparsity_profile.active(rows, 2.0) == pytest.approx(0.0455, abs=2e-3)
    assert sparsity_profile.hoyer(rows).mean() == pytest.approx(0.205, abs=0.01)
    assert sparsity_profile.participation(rows).mean() == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("script", [ablate_signal, sparsity_profile])
def test_an_untrained_run_supports_nothing(script, room):
    """From the files to the verdicts: no effect and no signals where nothing was learned."""
    script.run(room).save()
    folder = room.folder / "experiments" / script.__name__.rpartition(".")[2]
    result = json.loads((folder / "result.json").read_text())
    kinds = {c["kind"]: c["verdict"] for c in result["claims"]}
    assert kinds == {"effect": "not supported", "signals": "not supported"}
    assert all((folder / f["file"]).stat().st_size > 10_000 for f in result["figures"])
    assert "baseline" in (folder / "rows.csv").read_text()
