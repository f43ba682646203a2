"""ablate_signal: the input side equals an edited embedding, planted signals are found, verdicts that fail."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

import dictionary
import hooks
from attribution import Prediction, contributions
from configurator import UserError
from experiments import ablate_signal
from experiments.lab import Scores
from experiments.lab.claims import N_GAUGES, effect, signals
from experiments.lab.results import read_result
from hardware import flops_per_token
from tests.lab_fixtures import corpus, open_lab, planted_recipes, save_run, tiny


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """An untrained run with a dense one beside it: nothing is there to be found."""
    out = tmp_path_factory.mktemp("out")
    data = corpus(tmp_path_factory.mktemp("data"))
    save_run(out / "dense", tiny(vocab="dense"), data)
    return open_lab(save_run(out / "tiny", tiny(), data))


def test_the_input_side_equals_an_edited_embedding(lab):
    """Taking a signal out of every embedding is reading from E without that signal; the head keeps it."""
    net = lab.model.net
    d = lab.model.dictionary
    prompt = lab.heldout(1, 12)[0][0]
    some = torch.tensor([0, 7, 9, 15])
    states = ablate_signal.ablate_input(net, d, prompt, some, batch=3)
    for i, s in enumerate(some):
        codes = d.codes.clone()
        codes[:, s] = 0
        edited = hooks.with_embedding(net, codes @ d.atoms, lab.model.E)
        with torch.no_grad():
            assert torch.allclose(states[i], edited.encode(prompt[None])[0, -1], atol=1e-4)


def test_removing_a_signal_at_both_sides_is_a_model_without_it(lab):
    """Mean size over signals of the change of the logit difference, by where a signal is removed."""
    net = lab.model.net
    d = lab.model.dictionary
    prompts = lab.heldout(2, 10)[0]
    sizes = ablate_signal.input_output_sizes(lab.model, prompts, torch.arange(d.n_signals))
    pred = ablate_signal.predict(net, prompts)
    rows = torch.arange(2)

    def difference(E_in, E_out):
        with torch.no_grad():
            edited = hooks.with_embedding(net, E_in, E_out)
            logits = hooks.unembed(edited, edited.encode(prompts)[:, -1])
        return logits[rows, pred.target] - logits[rows, pred.foil]

    E = lab.model.E
    changes = {"input": [], "output": [], "both": []}
    for s in range(d.n_signals):
        codes = d.codes.clone()
        codes[:, s] = 0
        less = codes @ d.atoms
        for place, pair in (("input", (less, E)), ("output", (E, less)), ("both", (less, less))):
            changes[place].append(difference(*pair) - difference(E, E))
    for place, values in changes.items():
        expected = torch.stack(values).abs().mean(0).numpy()
        assert sizes[place] == pytest.approx(expected, abs=1e-5), place


def test_large_models_lose_some_signals_at_the_input_small_ones_all():
    rng = np.random.default_rng(0)
    assert ablate_signal.input_signals(tiny().config, 16, rng).tolist() == list(range(16))
    big = replace(tiny().config, n_layer=30, n_embd=576, n_head=9, n_signal=576)
    some = ablate_signal.input_signals(big, 576, rng)
    forward = flops_per_token(big, ablate_signal.PROMPT_LENGTH) / 3
    tokens = len(some) * ablate_signal.N_INPUT_PROMPTS * ablate_signal.PROMPT_LENGTH
    assert 20 < len(set(some)) < 576 and tokens * forward <= ablate_signal.INPUT_BUDGET
    huge = replace(big, n_layer=300)
    assert len(ablate_signal.input_signals(huge, 576, rng)) == 20


def test_n_90_by_hand():
    rows = torch.tensor([[9.0, 0.5, -0.5], [1.0, 1.0, 1.0], [-5.0, 5.0, 0.0]])
    assert ablate_signal.n_90(rows).tolist() == [1, 3, 2]


def concentration(d, seed, n=60):
    """n_90 of the logit difference of random token pairs at random streams, (n,)."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d.atoms.size(1), generator=generator)
    target, foil = torch.randint(len(d.codes), (2, n), generator=generator)
    p = (h @ d.matrix().T).softmax(-1)
    return ablate_signal.n_90(contributions(Prediction(h, p, target, foil), d))


def count_special(is_sparse):
    """In how many of 20 seeds a planted dictionary is found more concentrated than its rotations."""
    n_found = 0
    for seed in range(20):
        d = planted_recipes(seed, is_sparse)
        generator = torch.Generator().manual_seed(100 + seed)
        gauges = [concentration(dictionary.rotated(d, generator), seed) for _ in range(N_GAUGES)]
        claim = signals(Scores({"native": concentration(d, seed)}, gauges), "prompts", lower=True)
        n_found += claim["verdict"] == "supported"
    return n_found


def test_planted_signals_are_found_and_a_rotation_of_nothing_is_not():
    assert count_special(True) == 20
    assert count_special(False) <= 4  # 1 of 20 expected; more than 4 has a probability below 0.3 %


def test_the_signal_that_alone_drives_one_token_is_the_strongest():
    d = planted_recipes(0, is_sparse=True)
    h = 8 * d.atoms[[3, 11]] + 0.1 * d.atoms[[5, 6]]
    p = (h @ d.matrix().T).softmax(-1)
    pred = Prediction(h, p, target=torch.tensor([3, 11]), foil=torch.tensor([5, 6]))
    signal, change, kl = ablate_signal.strongest(pred, d, d.n_signals)
    assert signal.tolist() == [3, 11] and (change < -1).all() and (kl > 0.5).all()


def heads(d, h):
    """The Prediction of final states h (n, d) under a Dictionary, without a backbone."""
    p = (h @ d.matrix().T).softmax(-1)
    return Prediction(h, p, *p.topk(2).indices.T)


def one_signal_drives(scale, seed=0, n=80):
    """(Prediction, Dictionary): Gaussian recipes, and signal 5 alone makes every prompt predict token 0."""
    d = planted_recipes(seed, is_sparse=False)
    recipes = 0.1 * d.recipes
    recipes[0, 5] = 2.0
    d = dictionary.Dictionary("native", recipes, d.basis)
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d.n_signals, generator=generator) + 4 * d.atoms[5]
    return heads(d, scale * h), d


def generalizes(pred, d):
    """{removal: verdict} against the best of 19 rotations of the dictionary."""
    generator = torch.Generator().manual_seed(9)
    rotations = [dictionary.rotated(d, generator) for _ in range(N_GAUGES)]
    found = {}
    for removal in ablate_signal.REMOVALS:
        native, *drops = (ablate_signal.chosen_signal(pred, r, removal)[1] for r in (d, *rotations))
        best = max(drops, key=torch.mean)
        found[removal] = effect(Scores({"native": native, "random directions": best}), "prompts")["verdict"]
    return found


@pytest.mark.parametrize("scale", [0.25, 1, 4])
def test_a_signal_that_drives_every_prompt_is_found_at_any_scale(scale):
    assert generalizes(*one_signal_drives(scale)) == {"term": "supported", "direction": "supported"}


def test_chance_signals_of_stretched_recipes_are_not_found():
    """Gaussian recipes have no axes, also where one singular value of the basis is ten times the others."""
    false = {"term": 0, "direction": 0}
    for seed in range(20):
        d = planted_recipes(seed, is_sparse=False)
        stretched = torch.diag(torch.tensor([10.0] + [1.0] * (d.n_signals - 1)))
        u = dictionary.random_orthogonal(d.n_signals, torch.Generator().manual_seed(seed)).float()
        d = dictionary.Dictionary("native", d.recipes, u @ stretched @ d.basis)
        h = torch.randn(60, d.n_signals, generator=torch.Generator().manual_seed(50 + seed))
        for removal, verdict in generalizes(heads(d, 0.3 * h), d).items():
            false[removal] += verdict == "supported"
    assert max(false.values()) <= 4  # at most 1 of 20 expected; more than 4 has a probability below 0.3 %


def test_a_larger_dictionary_is_compared_by_random_parts_of_it():
    """Of half of the signals the strongest of all is found on half of the prompts."""
    pred, d = one_signal_drives(1.0, n=400)
    signal, _, _ = ablate_signal.strongest(pred, d, d.n_signals)
    assert (signal == 5).double().mean() > 0.9
    signal, _, _ = ablate_signal.strongest(pred, d, d.n_signals // 2)
    assert 0.4 < (signal == 5).double().mean() < 0.6


def test_an_untrained_run_supports_nothing(lab):
    """From the files to the verdicts: no effect and no signals where nothing was learned."""
    report = ablate_signal.run(lab)
    report.save()
    result = read_result(report.folder / "result.json")
    assert {claim.key: claim.verdict for claim in result.claims} == {
        "generalizes": "not supported",
        "strongest": "not supported",
        "concentrated": "not supported",
    }
    assert result.figures
    assert all((report.folder / figure.file).stat().st_size > 10_000 for figure in result.figures)
    with open(report.folder / "rows.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert "baseline" in {row["dictionary"] for row in rows}
    example = [float(row["value"]) for row in rows if row["metric"] == "contribution"]
    net, tokenizer = lab.model.net, lab.words.tokenizer
    prompt = torch.tensor([tokenizer.encode_ordinary("The capital of France is")])
    logits = hooks.unembed(net, net.encode(prompt)[0, -1].detach())
    top, second = logits.topk(2).values
    assert sum(example) == pytest.approx((top - second).item(), abs=1e-4)  # the waterfall sums exactly


def test_an_empty_prompt_is_refused(lab):
    with pytest.raises(UserError, match="--prompt is empty"):
        ablate_signal.run(lab, ablate_signal.AblateConfig(prompt=""))


def test_a_word_of_several_tokens_is_refused_before_the_work(lab, monkeypatch):
    monkeypatch.setattr(lab, "heldout", None)
    with pytest.raises(UserError, match="' unbelievableness' is 3 tokens.*' unbeliev' 'abl' 'eness'"):
        ablate_signal.run(lab, ablate_signal.AblateConfig(target="unbelievableness"))
