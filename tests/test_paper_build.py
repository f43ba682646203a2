"""The paper builds from its results; sentences are for people, and nothing reads them."""

import json
from html import escape

import pytest

import checkpoint
from experiments import report
from experiments.lab.results import read_result
from experiments.run_all import NAMES
from experiments.studies import STUDIES
from paper import build, reading, readme
from tests.paper_fixtures import PAPER, RUN, change_claims, copy_results


def texts(node):
    """The text nodes of an element as typst.query gives it, in order."""
    if isinstance(node, list):
        return [text for part in node for text in texts(part)]
    if not isinstance(node, dict):
        return []
    own = [node["text"]] if isinstance(node.get("text"), str) else []
    return own + [text for key, part in node.items() if key != "text" for text in texts(part)]


def paper_texts(root):
    """Every piece of text in paragraphs, then in tables and captions, of the paper in a folder."""
    typst = pytest.importorskip("typst")
    parts = ("par", "figure")
    found = [typst.query(root / "paper" / "paper.typ", part, root=root) for part in parts]
    return [text for part in found for text in texts(json.loads(part))]


def page():
    """The page of experiments/report.py for the released model with the paper's results."""
    record = {name: reading.result(RUN, name) for name in NAMES}
    ckpt = checkpoint.open_run(PAPER.parent / "release" / RUN)
    return report.page(ckpt, ckpt.results, record, {}, {}, {})


def test_rewording_every_claim_changes_nothing_but_the_sentences(tmp_path, monkeypatch):
    """Paper, README's block and page have the same numbers and verdicts when every sentence is another."""
    results = copy_results(tmp_path, monkeypatch)
    found = {claim.claim for path in results.glob("*/*.json") for claim in read_result(path).claims}
    paper_before = [text if text not in found else "(reworded)" for text in paper_texts(tmp_path)]
    block_before = " ".join((readme.trained_block() + readme.results_block()).split())
    page_before = page()
    for sentence in sorted(found, key=len, reverse=True):
        block_before = block_before.replace(sentence.replace("|", "\\|"), "(reworded)")
        page_before = page_before.replace(escape(sentence), "(reworded)")
    for before in (block_before, paper_before, page_before):
        assert before.count("(reworded)") > 10

    change_claims(results, lambda claim: setattr(claim, "claim", "(reworded)"))
    assert " ".join((readme.trained_block() + readme.results_block()).split()) == block_before
    assert paper_texts(tmp_path) == paper_before
    assert page() == page_before


def test_a_claim_without_its_key_stops_the_paper(tmp_path, monkeypatch):
    results = copy_results(tmp_path, monkeypatch)
    typst = pytest.importorskip("typst")
    path = results / reading.SUBJECT["coordinates"] / "ablate_signal.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"generalizes"', '"general"'), encoding="utf-8")
    with pytest.raises(typst.TypstError, match="ablate_signal of .* has no claim generalizes"):
        typst.compile(tmp_path / "paper" / "paper.typ", root=tmp_path)


def test_it_builds_and_a_missing_result_stops_it(tmp_path, monkeypatch):
    results = copy_results(tmp_path, monkeypatch)
    typst = pytest.importorskip("typst")
    pdf = typst.compile(PAPER / "paper.typ", root=PAPER.parent)
    assert pdf[:5] == b"%PDF-" and len(pdf) > 100_000
    (results / "bench.json").unlink()
    with pytest.raises(typst.TypstError, match="bench.json"):
        typst.compile(tmp_path / "paper" / "paper.typ", root=tmp_path)


def test_the_appendix_is_what_the_scripts_say():
    """methods.json has a question and a method of every experiment and study, those of the docstrings."""
    assert build.methods() == build.METHODS.read_text(encoding="utf-8"), "run python paper/build.py"
    found = json.loads(build.methods())
    assert list(found["experiments"]) == list(NAMES) and list(found["studies"]) == list(STUDIES)
    for name, parts in (found["experiments"] | found["studies"]).items():
        assert "?" in parts["question"] and sum(map(len, parts["method"])) > 200, name
