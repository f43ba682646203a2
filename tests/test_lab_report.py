"""A report: what an experiment found is written whole, printed, shown; scripts tell what they do."""

import csv
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from experiments.lab import Report, Scores
from experiments.lab import report as lab_report
from experiments.lab.report import COLUMNS, code_sha256, method, plain, save_and_print, table
from experiments.lab.results import read_result
from tests.lab_fixtures import corpus, open_lab, save_run, tiny

SENTENCES = {"key": "a & b < c", "other": "native signals are special"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The lab of a tiny run with a dense one beside it."""
    out = tmp_path_factory.mktemp("out")
    data = corpus(tmp_path_factory.mktemp("data"), repeats=2)
    save_run(out / "dense", tiny(vocab="dense"), data)
    return open_lab(save_run(out / "tiny", tiny(), data))


def make_report(lab, **options):
    """A report with one supported claim and one figure."""
    report = Report(lab, "ablate_signal", SENTENCES, options)
    report.effect("key", Scores({"native": [1] * 30, "chance": [0] * 30}), "words", published="0.5")
    with report.figure("picture", "what it shows") as ax:
        ax.plot([0, 1])
    return report


def rows_of(report):
    """The lines of a saved report's rows.csv, as dicts without empty cells."""
    with open(report.folder / "rows.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert all(list(row) == list(COLUMNS) for row in rows)
    return [{name: value for name, value in row.items() if value} for row in rows]


def test_a_result_is_written_whole(lab, capsys):
    """Identity and losses, rows under all columns, no temporary files; printed with its verdict."""
    report = make_report(lab)
    report.row("metric", 1.5, layer=2)
    save_and_print(report)
    assert "-> supported" in capsys.readouterr().out
    result = read_result(report.folder / "result.json")
    assert result.run.config_sha256 and result.val_loss == {"reflow": 9.0, "baseline": 9.0}
    assert [(claim.key, claim.verdict) for claim in result.claims] == [("key", "supported")]
    assert rows_of(report)[-1] == {"metric": "metric", "value": "1.5", "layer": "2"}
    assert (report.folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert not list(lab.results.glob(".*"))


def test_two_at_once_do_not_spoil_each_other(lab):
    """Both save; the result is whole at the end, one of theirs."""
    reports = [make_report(lab) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda report: [report.save() for _ in range(20)], reports))
    assert len(read_result(reports[0].folder / "result.json").claims) == 1
    assert not list(lab.results.glob(".*"))


def test_a_claim_brings_its_scores_as_rows_and_numbers(lab):
    """The mean of every entry and of every gauge, under the key of the claim."""
    gauges = np.arange(19.0)[:, None].repeat(30, 1)
    report = Report(lab, "ablate_signal", SENTENCES)
    report.signals("other", Scores({"native": [20] * 30, "pca": [3] * 30}, gauges), "words")
    report.scores("size", Scores({"native": [7]}), layer=1)
    assert report["other"].verdict == "supported"
    assert report["other"].claim == "native signals are special"
    assert report.numbers == {"other": {"native": 20, "pca": 3, "gauges": list(range(19))}}  # none by layer
    report.save()
    rows = rows_of(report)
    assert rows[0] == {"dictionary": "native", "metric": "other", "value": "20.0"}
    assert rows[2] == {"dictionary": "rotation", "control": "0", "metric": "other", "value": "0.0"}
    assert rows[-1] == {"dictionary": "native", "metric": "size", "value": "7.0", "layer": "1"}
    assert len(rows) == 1 + 1 + 19 + 1


def test_a_row_has_known_columns_only(lab):
    with pytest.raises(AssertionError, match="colour"):
        Report(lab, "ablate_signal", SENTENCES).row("metric", 1, colour="red")


def test_options_of_ones_own_leave_the_record_alone(lab):
    record = make_report(lab)
    look = make_report(lab, prompt="The capital of")
    assert record.folder == lab.results / "ablate_signal"
    assert look.folder == lab.results / "looks" / "ablate_signal"
    assert look.result().options == {"prompt": "The capital of"}


def test_a_result_as_text_has_every_value_and_what_decided(lab):
    report = make_report(lab)
    report.gallery = "  an example\n"
    report.notes.append("a caveat")
    text = table(report.result())
    assert text.startswith("ablate_signal: tiny, step 1 (validation loss: reflow 9.000, baseline 9.000)")
    for part in ("effect: a & b < c", "measured  1 [1, 1]", "chance    0 [0, 0]", "published  0.5"):
        assert part in text
    assert "-> supported: gain over chance: 1 [1, 1] (n = 30 words of one model)" in text
    assert "  an example" in text and text.endswith("a caveat")


def test_a_result_with_null_intervals_can_be_printed(lab):
    """As read from a file that held an unbounded interval."""
    result = make_report(lab).result()
    result.claims[0].measured.low = None
    result.claims[0].measured.high = None
    assert "measured  1 (no interval)" in table(result)


def test_a_notebook_shows_claims_and_figures(lab):
    html = make_report(lab)._repr_html_()
    assert "a &amp; b &lt; c" in html and "supported" in html
    assert html.count("data:image/png;base64,") == 1 and 'alt="what it shows"' in html


def test_numbers_become_what_json_can_hold():
    found = plain({1: np.float32(2), "a": [np.nan, np.inf, np.int64(3)], "b": np.array([[1, 2]]), "c": "x"})
    assert found == {"1": 2.0, "a": [None, None, 3], "b": [[1, 2]], "c": "x"}


def test_results_of_one_code_have_one_hash():
    assert code_sha256("ablate_signal") == code_sha256("ablate_signal") != code_sha256("signal_lens")


def test_a_script_tells_its_question_method_and_cost():
    question, paragraphs = method("signal_lens")
    assert question.endswith("which block wrote it?") and len(paragraphs) == 3
    assert paragraphs[0].startswith("Signal lens: A_l") and paragraphs[2].startswith("Unit: a held-out")
    _, cost = method("signal_lens", "Cost")
    assert len(cost) == 1 and cost[0].startswith("One forward pass") and "\n" not in cost[0]


def test_the_code_of_a_result_is_that_of_its_start(lab, monkeypatch):
    """A file that changes while an experiment runs does not pass for the code that ran."""
    found = Report(lab, "ablate_signal", SENTENCES)
    before = lab_report.code_sha256("ablate_signal")
    monkeypatch.setattr(lab_report, "CODE", ("model.py",))  # other code from here on
    assert lab_report.code_sha256("ablate_signal") != before
    assert found.result().code_sha256 == before


@pytest.mark.parametrize("name", ["reflow.py", "attribution.py", "dictionary.py", "hooks.py", "model.py"])
def test_the_code_of_a_result_covers_what_it_calls(name, tmp_path, monkeypatch):
    before = lab_report.code_sha256("ablate_signal")
    whole = lab_report.file_sha256
    monkeypatch.setattr(lab_report, "file_sha256", lambda path: "0" if path.name == name else whole(path))
    assert lab_report.code_sha256("ablate_signal") != before


def test_code_that_no_result_depends_on_leaves_it_up_to_date(monkeypatch):
    before = lab_report.code_sha256("ablate_signal")
    whole = lab_report.file_sha256
    others = ("export.py", "train.py", "sample.py", "signal_lens.py")
    monkeypatch.setattr(
        lab_report,
        "file_sha256",
        lambda path: "0" if path.name in others or "formats" in path.parts else whole(path),
    )
    assert lab_report.code_sha256("ablate_signal") == before


def test_rows_name_groups_in_prompt_and_counts_in_n_signals(lab):
    """Scores of one group go to rows.csv with its name under `prompt`; an unknown column is refused."""
    found = Report(lab, "ablate_signal", SENTENCES)
    scores = Scores({"native": [1.0, 3.0]}, gauges=[[0.0, 1.0]])
    found.scores("accuracy", scores, prompt="capitals")
    found.row("loss", 1.5, n_signals=8)
    assert found.rows[0] == {"metric": "accuracy", "value": 2.0, "dictionary": "native", "prompt": "capitals"}
    assert found.rows[1]["control"] == "0" and found.rows[1]["prompt"] == "capitals"
    assert found.rows[2]["n_signals"] == 8 and "accuracy" not in found.numbers
    with pytest.raises(AssertionError, match="unknown columns"):
        found.row("loss", 1.5, group="capitals")
