"""reflow.py: cards that are exact, controls beside them, and one line for every mistake."""

import sys

import pytest
import torch

import hooks
import reflow
from configurator import UserError
from data.tokenizer import encoding
from tests.lab_fixtures import token

RELEASE = reflow.checkpoint.RELEASES / "reflow-mini"
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def model():
    return reflow.load(RELEASE, "cpu")


def test_contributions_sum_to_the_logit_difference_of_the_forward_pass(model):
    found = model.attribute(PROMPT, "Paris", foil="London")
    with torch.no_grad():
        logits = model.net(torch.tensor([encoding().encode(PROMPT)]))[0][0, -1]
    exact = (logits[token("Paris")] - logits[token("London")]).item()
    rows = found.top(5).rows
    assert found.contributions.sum() == pytest.approx(exact, abs=1e-4)
    assert sum(row[1] for row in rows[:-1]) == pytest.approx(rows[-1][1], abs=1e-5)
    assert rows[-1][1] == pytest.approx(exact, abs=1e-4)


def test_the_default_foil_is_the_likeliest_other_token(model):
    best = model.attribute(PROMPT)
    other = model.attribute(PROMPT, "Paris")
    assert other.foil == best.target and best.foil != best.target


def test_steered_generation_equals_steering_by_hand(model):
    ids = encoding().encode(PROMPT)
    text = model.generate(PROMPT, {" peace": 0.5, 17: -0.5}, range(0, 2), max_new_tokens=8, temperature=0)
    word = hooks.steer(model.net, model.net.vocab.matrix()[token("peace")].detach(), 0.5, range(0, 2))
    signal = hooks.steer(model.net, model.net.vocab.basis[17].detach(), -0.5, range(0, 2))
    with word, signal:
        (new,) = model.net.generate([ids], 8, temperature=0, stop=50256)
    assert text == PROMPT + encoding().decode(new)


def test_the_cache_holds_the_streams_by_both_spellings(model):
    cache = model.cache(PROMPT)
    ids = torch.tensor([encoding().encode(PROMPT)])
    assert torch.equal(cache["blocks.2.hook_resid_post"], cache["blocks.2.resid_post"])
    assert torch.equal(cache["blocks.3.resid_pre"], hooks.resid_pre(model.net, ids, 3))
    assert torch.equal(cache["ln_final"], model.net.encode(ids))
    with pytest.raises(UserError, match="no stream"):
        cache["blocks.9.resid_post"]


@pytest.mark.parametrize(
    ("look", "match"),
    [
        (lambda m: m.token("antidisestablishment"), "tokens: take a word.*pieces: ' ant"),
        (lambda m: m.attribute(""), "empty"),
        (lambda m: m.attribute(" people" * 300), "the context holds 256"),
        (lambda m: m.signal(192), "signals are 0 to 191"),
    ],
)
def test_mistakes_are_one_line(model, look, match):
    with pytest.raises(UserError, match=match) as error:
        look(model)
    assert "\n" not in str(error.value)


def test_cards_fit_a_terminal_and_say_what_they_are(model):
    cards = [model.attribute(PROMPT).top(5), model.signal(17), model.token("king"), model.neighbors(" king")]
    for card in cards:
        assert "a look, not a claim" in repr(card) and "a look, not a claim" in card._repr_html_()
        assert max(map(len, repr(card).splitlines()[1:])) <= 100


def test_without_pandas_it_says_so(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        model.signal(17).to_pandas()


def test_the_command_line_prints_the_same_card(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reflow.py", "token", "king", f"--run={RELEASE}", "--k=4"])
    reflow.main()
    assert capsys.readouterr().out.rstrip() == repr(model.token("king", 4))
