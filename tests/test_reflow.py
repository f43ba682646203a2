"""reflow.py: cards that are exact, controls beside them, and one line for every mistake."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import configurator
import hooks
import reflow
from configurator import UserError
from data.tokenizer import gpt2
from data.words import FEWEST_SHOWN, LEAST_COUNT, SHOWN_COUNT, Words, sightings
from experiments import template
from tests.lab_fixtures import corpus, open_lab, save_run, tiny, token

RELEASE = reflow.checkpoint.RELEASES / "reflow-mini"
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def model():
    return reflow.load(RELEASE, "cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: folder} of an untrained run and a dense one on the same small corpus."""
    out = tmp_path_factory.mktemp("out")
    data = corpus(tmp_path_factory.mktemp("data"))
    return {
        "tiny": save_run(out / "tiny", tiny(), data),
        "dense": save_run(out / "dense", tiny(vocab="dense"), data),
        "sparse": save_run(out / "sparse", tiny(vocab="sparse", n_signal=24, n_nonzero=2, n_core=3), data),
    }


def test_contributions_sum_to_the_logit_difference_of_the_forward_pass(model):
    found = model.attribute(PROMPT, "Paris", foil="London")
    with torch.no_grad():
        logits = model.net(torch.tensor([gpt2().encode_ordinary(PROMPT)]))[0][0, -1]
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
    ids = gpt2().encode_ordinary(PROMPT)
    text = model.generate(PROMPT, {" peace": 0.5, 17: -0.5}, range(0, 2), max_new_tokens=8, temperature=0)
    word = hooks.steer(model.net, model.net.vocab.matrix()[token("peace")].detach(), 0.5, range(0, 2))
    signal = hooks.steer(model.net, model.net.vocab.basis[17].detach(), -0.5, range(0, 2))
    with word, signal:
        (new,) = model.net.generate([ids], 8, temperature=0, stop=50256)
    assert text == PROMPT + gpt2().decode(new)


def test_the_cache_holds_the_streams_by_both_spellings(model):
    cache = model.cache(PROMPT)
    ids = torch.tensor([gpt2().encode_ordinary(PROMPT)])
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
        (lambda m: m.signal(256), "signals are 0 to 255"),
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


def test_tables_list_frequent_tokens_alone(model):
    counts = model.words.counts
    assert model.least_shown == counts[model.shown].min() >= SHOWN_COUNT
    texts = {model.tokenizer.token_text(i) for i in model.shown}
    signal, neighbors = model.signal(17), model.neighbors(" king")
    assert {row[i] for row in signal.rows for i in (0, 2)} <= texts
    assert {row[i] for row in neighbors.rows for i in (0, 2, 4)} <= texts - {" king"}
    stripped = {text.strip() for text in texts}
    for card, columns in ((model.token("king"), (2, 3)), (model.attribute(PROMPT).top(3), (5, 6))):
        assert {word for row in card.rows for i in columns for word in row[i].split()} <= stripped
    for card in (signal, neighbors, model.token("king"), model.attribute(PROMPT).top(3)):
        assert f"Tokens seen fewer than {model.least_shown} times in training are left out." in card.notes


def test_tables_of_a_short_run_list_its_most_frequent_tokens():
    counts = np.arange(50257)[::-1] // 1000  # at most 50 sightings
    shown = Words(counts).shown_tokens()
    assert shown.tolist() == list(range(FEWEST_SHOWN))
    few = np.where(np.arange(50257) < 7, LEAST_COUNT, 0)
    assert len(Words(few).shown_tokens()) == 7


def test_tables_of_a_model_of_unknown_training_list_all_tokens(monkeypatch):
    """A word that is rare in the text at hand may be well known. Control tokens are no words."""
    words = Words(np.zeros(50257, np.int64), where="the text sotu")
    assert sorted(words.shown_tokens()) == [i for i in range(50257) if i != words.tokenizer.end_of_text]
    found = reflow.load(RELEASE, "cpu")
    monkeypatch.setattr(found, "words", words)
    assert "not known: tables choose from all" in found.left_out() and not found.is_rare(7)


def test_a_rare_token_is_marked_in_every_card_that_is_about_it(model):
    counts = model.words.counts
    once, never, often = (int(np.flatnonzero(rule)[0]) for rule in (counts == 1, counts == 0, counts > 999))
    assert model.name(once).endswith(" (rare: seen once in training)")
    assert model.name(never).endswith(" (rare: never seen in training)")
    assert "rare" not in model.name(often)
    assert sightings(2) == "seen 2 times" and sightings(1234) == "seen 1,234 times"
    mark = '" Google" (rare: seen 36 times in training)'
    assert counts[model.token_id("Google")] == 36
    assert model.token("Google").title.startswith(mark)
    assert model.neighbors("Google").title.endswith(mark)
    assert mark in model.attribute(PROMPT, "Google").top(3).notes
    assert "rare" not in repr(model.token("king")) + repr(model.attribute(PROMPT, "king").top(3))


def test_the_rotated_control_has_a_mean_and_a_largest(model):
    found = model.attribute(PROMPT)
    control = found.rotated(4)
    assert control.shape == (reflow.N_ROTATIONS, 4)
    rows = found.top(4).rows[:4]
    assert [row[3] for row in rows] == pytest.approx(control.mean(0).tolist())
    assert [row[4] for row in rows] == pytest.approx(control.max(0).values.tolist())


def test_rotations_of_two_rows_are_those_of_the_whole_dictionary(model):
    found = model.attribute(PROMPT)
    generator = torch.Generator().manual_seed(reflow.N_ROTATIONS - 1)
    whole = reflow.dictionary.rotated(model.dictionary, generator)
    sizes = reflow.attribution.contributions(found.prediction, whole)[0].abs().topk(4).values
    assert found.rotated(4)[-1].tolist() == pytest.approx(sizes.tolist(), rel=1e-4)


def test_what_is_no_signal_of_a_sparse_vocabulary_says_so(runs):
    sparse = reflow.load(runs["sparse"], "cpu")
    assert [sparse.label(s) for s in (23, 24, 26, 27)] == ["23", "24 core", "26 core", "27 mean"]
    shown = [row[0] for row in sparse.token("king", k=28).rows]
    assert sorted(shown) == sorted(map(sparse.label, range(28)))
    assert sparse.signal(27).title == "signal 27 mean"


def test_a_plain_gpt_has_coordinates_and_says_so(runs):
    dense = reflow.load(runs["dense"], "cpu")
    assert "16 coordinates (a plain GPT has no signals)" in repr(dense)
    found = dense.attribute(PROMPT, "Paris", foil="London")
    E = dense.net.vocab.matrix().detach()
    h = dense.net.encode(dense.encode(PROMPT))[0, -1].detach()
    by_coordinate = (h * (E[token("Paris")] - E[token("London")])).numpy()
    assert found.contributions == pytest.approx(by_coordinate, abs=1e-5)
    for card in (found.top(3), dense.signal(5), dense.token("king"), dense.neighbors("king")):
        assert "A plain GPT has no signals: these are the coordinates of its embedding E." in card.notes
    assert dense.signal(5).title == "coordinate 5" and found.top(3).columns[0] == "coordinate"
    with pytest.raises(UserError, match="no coordinate 16: coordinates are 0 to 15"):
        dense.signal(16)
    with pytest.raises(UserError, match="no signals, only words"):
        dense.generate(PROMPT, {3: 0.5})


def test_cards_become_data_frames(model):
    pytest.importorskip("pandas")
    cards = [model.attribute(PROMPT).top(5), model.signal(17), model.token("king"), model.neighbors(" king")]
    for card in cards:
        frame = card.to_pandas()
        assert list(frame.columns) == card.columns == [name.strip() for name in card.columns]
        assert frame.columns.is_unique
        assert frame.values.shape == (len(card.rows), len(card.columns))
    frame = cards[0].to_pandas()
    assert frame["rotated"].dtype == frame["nats"].dtype == float and frame["rotated"].isna().sum() == 2


def test_without_pandas_it_says_so(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        model.signal(17).to_pandas()


def command(monkeypatch, *arguments):
    """Run reflow.py in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["reflow.py", *arguments])
    try:
        configurator.run(reflow.main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize(
    ("arguments", "look"),
    [
        (
            ["why", PROMPT, "--target=Paris", "--foil", "London"],
            lambda m: m.attribute(PROMPT, "Paris", "London").top(4),
        ),
        (["why", PROMPT], lambda m: m.attribute(PROMPT).top(4)),
        (["signal", "189"], lambda m: m.signal(189, 4)),
        (["token", "king"], lambda m: m.token("king", 4)),
        (["neighbors", "king"], lambda m: m.neighbors("king", 4)),
    ],
)
def test_the_command_line_prints_the_same_card(model, monkeypatch, capsys, arguments, look):
    assert command(monkeypatch, *arguments, f"--run={RELEASE}", "--k=4", "--device=cpu") == 0
    assert capsys.readouterr().out.rstrip() == repr(look(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["signal", "256"], "no signal 256: signals are 0 to 255"),
        (["signal", "king"], "give the number of a signal"),
        (["token", "antidisestablishment"], "pieces: ' ant' 'id'"),
        (["why", PROMPT, "--target=antidisestablishment"], "pieces: ' ant' 'id'"),
        (["why", PROMPT, "--target=Paris", "--foil=Paris"], "give two tokens"),
        (["why", ""], "the prompt is empty"),
        (["why", " people" * 300], "the prompt has 300 tokens: the context holds 256"),
        (["neighbors", "king", "--k=0"], "--k=0: at least 1"),
        (["because", "king"], "usage: python reflow.py why"),
        ([], "usage: python reflow.py why"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_status_2(monkeypatch, capsys, arguments, message):
    assert command(monkeypatch, *arguments, f"--run={RELEASE}", "--device=cpu") == 2
    shown = capsys.readouterr()
    assert shown.out == "" and message in shown.err
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1


def test_the_command_line_from_a_shell():
    script = [sys.executable, str(reflow.checkpoint.RELEASES.parent / "reflow.py")]
    done = subprocess.run([*script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "python reflow.py signal 17" in done.stdout and "--target" in done.stdout


def test_a_report_shows_itself_in_a_notebook_and_leaves_the_backend_alone(runs):
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.get_backend()
    report = template.run(open_lab(runs["tiny"]))
    html = report._repr_html_()
    assert matplotlib.get_backend() == before
    assert all(claim.claim in html and claim.verdict in html for claim in report.claims)
    assert report.claims and report.figures
    assert html.count("data:image/png;base64,") == len(report.figures)
