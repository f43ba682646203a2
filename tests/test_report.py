"""The page of a run: only results that belong together, looks apart."""

import json
import re

import pytest

from checkpoint import write_atomically
from configurator import UserError
from experiments import report
from experiments.lab import Report, Scores
from experiments.run_all import NAMES
from tests.lab_fixtures import corpus, open_lab, save_run, tiny

SENTENCES = {"key": "a & b < c"}


@pytest.fixture
def run(tmp_path):
    data = corpus(tmp_path / "data", repeats=2)
    save_run(tmp_path / "out" / "dense", tiny(vocab="dense"), data)
    return save_run(tmp_path / "out" / "tiny", tiny(), data)


def save_result(lab, name, **options):
    """The saved report of an experiment with one supported claim and one figure."""
    found = Report(lab, name, SENTENCES, options)
    found.effect("key", Scores({"native": [1] * 30, "chance": [0] * 30}), "words", published="0.5")
    with found.figure("picture", "what it shows") as ax:
        ax.plot([0, 1])
    found.save()
    return found


def make_page(run, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report.py", f"--run={run}"])
    report.main()
    return (run / "experiments" / "report.html").read_text()


def change(found, **fields):
    """Write other fields into the result.json of a saved report."""
    path = found.folder / "result.json"
    write_atomically(path, json.dumps(json.loads(path.read_text()) | fields))


def test_the_page_holds_claims_and_figures_and_loads_nothing(run, monkeypatch):
    lab = open_lab(run)
    for name in ("ablate_signal", "signal_lens"):
        save_result(lab, name)
    page = make_page(run, monkeypatch)
    assert page.count("data:image/png;base64,") == 2 and "http" not in page
    assert "a &amp; b &lt; c" in page and "published: 0.5" in page and "2 claims: 2 supported" in page
    assert "Validation loss, nats per token: reflow 9.000, baseline 9.000" in page
    assert "earlier version of the code" not in page and "Left out" not in page and "Looks" not in page
    missing = ",".join(name for name in NAMES if name not in ("ablate_signal", "signal_lens"))
    assert f"--run={run} --only={missing}</code>" in page  # what to do about those not run


def test_the_page_begins_in_words_and_every_claim_links_to_its_method(run, monkeypatch):
    lab = open_lab(run)
    found = Report(lab, "ablate_signal", {"good": "one holds", "bad": "one does not", "few": "too few"})
    found.effect("good", Scores({"native": [1] * 30, "chance": [0] * 30}), "words")
    found.effect("bad", Scores({"native": [0] * 30, "chance": [2] * 30}), "words", published="0.5")
    found.effect("few", Scores({"native": [0] * 3, "chance": [2] * 3}), "words")
    found.save()
    page = make_page(run, monkeypatch)
    words = page.split('<h2 id="summary">')[1].split('<h2 id="claims">')[0]
    assert "in 1 of 3 claims. It holds that:" in words and "Inconclusive: 1" in words
    assert "one does not</a>: chance does better, by 2" in words
    for key in ("good", "bad", "few"):
        assert f'href="#claim-ablate_signal-{key}"' in words and f'id="claim-ablate_signal-{key}"' in page
    for anchor in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{anchor}"' in page
    assert "<dt>recipe</dt>" in page  # the glossary of the experiments' README


def test_a_claims_figure_is_legible_at_the_width_of_a_phone(run, monkeypatch):
    lab = open_lab(run)
    scores = Scores({"native": [1.91755] * 30, "a control with a name that is long": [0] * 30})
    found = Report(lab, "ablate_signal", SENTENCES)
    found.effect("key", scores, "words")
    found.save()
    item = (
        make_page(run, monkeypatch).split('class=item id="claim-ablate_signal-key"')[1].split("</details>")[0]
    )
    assert 'viewBox="0 0 360' in item and ">1.92<" in item and "10^" not in item
    assert "a control with a …<title>a control with a name that is long" in item
    assert all(0 <= float(x) <= 360 for x in re.findall(r'(?:x|x1|x2|cx)="([\d.]+)"', item))


def test_every_signal_has_a_card_beside_a_rotated_one(tmp_path, monkeypatch):
    run = save_run(tmp_path / "out" / "tiny", tiny(), corpus(tmp_path / "data"))
    save_result(open_lab(run), "ablate_signal")
    page = make_page(run, monkeypatch)
    signals = page.split('<h2 id="signals">')[1].split('<h2 id="glossary">')[0]
    assert signals.count("random rotation: the control") == signals.count("<h4>signal ") == 16
    assert signals.count("strongest at") == 32 and signals.count("<mark>") == 128


def test_a_run_without_results_says_what_to_run(run, monkeypatch):
    with pytest.raises(UserError, match=f"run python experiments/run_all.py --run={run}"):
        make_page(run, monkeypatch)


def test_results_of_other_weights_are_left_out(run, tmp_path, monkeypatch):
    save_result(open_lab(run), "ablate_signal")
    save_run(run, tiny(1), tmp_path / "data")  # trained again
    save_result(open_lab(run), "signal_lens")
    page = make_page(run, monkeypatch)
    assert "<li>ablate_signal: made from other weights of tiny</li>" in page
    assert "1 claims: 1 supported" in page and 'id="ablate_signal"' not in page
    save_run(run, tiny(2), tmp_path / "data")
    with pytest.raises(UserError, match="no results of this run .*made from other weights"):
        make_page(run, monkeypatch)


def test_a_result_of_another_step_is_left_out(run, monkeypatch):
    lab = open_lab(run)
    save_result(lab, "signal_lens")
    found = save_result(lab, "ablate_signal")
    old = json.loads((found.folder / "result.json").read_text())["run"]
    change(found, run=old | {"step": 7})
    assert "made from another run or configuration: tiny, step 7" in make_page(run, monkeypatch)


def test_seed_and_baseline_are_those_of_the_most_results(run, monkeypatch):
    lab = open_lab(run)
    for name in ("ablate_signal", "signal_lens", "gene_tampering"):
        save_result(lab, name)
    save_result(open_lab(run, seed=1), "signal_codebook")
    alone = save_result(lab, "crystallization")
    weights = json.loads((alone.folder / "result.json").read_text())["made_from"]["tiny"]
    change(alone, made_from={"tiny": weights})
    page = make_page(run, monkeypatch)
    assert "signal_codebook: made with seed 1; the others have seed 0" in page
    assert "crystallization: made with another baseline or word lists (none) than the others" in page
    assert "3 claims: 3 supported" in page


def test_old_code_is_marked(run, monkeypatch):
    lab = open_lab(run)
    save_result(lab, "signal_lens")
    change(save_result(lab, "ablate_signal"), code_sha256="0")
    page = make_page(run, monkeypatch)
    assert "Made by an earlier version of the code: ablate_signal. Run" in page
    assert "2 claims: 2 supported" in page and page.count("earlier version of the code") == 2


def test_a_look_is_shown_apart_and_never_as_the_record(run, monkeypatch):
    """Looks lie in a folder of their own; a result with options in the record's folder is refused."""
    lab = open_lab(run)
    save_result(lab, "ablate_signal")
    save_result(lab, "ablate_signal", prompt="The capital of")
    change(save_result(lab, "signal_lens"), options={"prompt": "x"})
    page = make_page(run, monkeypatch)
    record, looks = page.split("<h1>Looks</h1>")
    assert "1 claims: 1 supported" in record and record.count("class=mark") == 1
    assert "signal_lens: made with --prompt=x: a look, not the record" in record
    assert "ablate signal, a look: &#x27;--prompt=The capital of&#x27;" in looks
    assert 'class="v ' not in looks and looks.count("data:image/png;base64,") == 1


def test_what_is_missing_or_cannot_be_read_says_what_to_run(run, monkeypatch):
    lab = open_lab(run)
    found = save_result(lab, "ablate_signal")
    (found.folder / "picture.png").unlink()
    broken = save_result(lab, "signal_lens")
    (broken.folder / "result.json").write_text("{}")
    page = make_page(run, monkeypatch)
    command = f"<code>python experiments/ablate_signal.py --run={run}</code>"
    assert f"The figure picture.png is missing. Run {command}" in page
    assert "is no result of this version" in page
