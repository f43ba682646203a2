"""The paper and the README's blocks are made of results: behind every number is a file, the right one."""

import hashlib
import json
import re
import shutil
from dataclasses import asdict

import matplotlib
import pytest
import torch

import checkpoint
from data.datasets import COUNTS
from data.tokenizer import encoding
from experiments.lab.results import read_result, to_json
from paper import build

PAPER = build.PAPER
TEXT = (PAPER / "paper.typ").read_text(encoding="utf-8")
RESULTS = sorted(build.RESULTS.glob("*/*.json"))
RUN = build.SUBJECT["runs"]["factored"]


def runs():
    return json.loads((build.RESULTS / "runs.json").read_text(encoding="utf-8"))


def sha256(config):
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A copy of paper/results that build.py reads instead; with the paper beside it, for typst."""
    for folder in ("paper", "assets"):
        shutil.copytree(PAPER.parent / folder, tmp_path / folder)
    monkeypatch.setattr(build, "RESULTS", tmp_path / "paper" / "results")
    return tmp_path / "paper" / "results"


def change_claims(results, change):
    """Apply change(Claim) to every claim of every result in a folder."""
    for path in results.glob("*/*.json"):
        result = read_result(path)
        for claim in result.claims:
            change(claim)
        path.write_text(to_json(result), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------
# Behind every number is a result, of the run that it is said to be of


@pytest.mark.parametrize("name", runs())
def test_a_run_s_hash_is_that_of_its_configuration(name):
    assert runs()[name]["config_sha256"] == sha256(runs()[name]["config"])


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_result_belongs_to_the_run_it_names(path):
    """Configuration, step, data and weights of a result are those of the run in runs.json."""
    result = read_result(path)
    assert result.experiment == path.stem
    assert {claim.experiment for claim in result.claims} == {path.stem}
    assert result.runs or path.parent.name == result.run.name  # a study compares many
    for identity in result.runs or [result.run]:
        known = runs()[identity.name]
        for key in ("config_sha256", "data_sha256", "step"):
            assert getattr(identity, key) == known[key], f"{path}: another {identity.name}: {key}"
    for name, weights in result.made_from.items():
        assert runs()[name]["weights_sha256"] == weights, f"{path} was made from another {name}"


def test_the_released_model_is_the_run_of_the_paper():
    """release/reflow-mini, under 40 MB, has the configuration and step of runs.json, and predicts English."""
    folder = PAPER.parent / "release" / "reflow-mini"
    assert sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) < 40e6
    model, state = checkpoint.load_model(checkpoint.find(folder))
    run = runs()["reflow-mini"]
    assert (sha256(state["config"]), state["step"]) == (run["config_sha256"], run["step"])
    assert checkpoint.load_tensors(folder / COUNTS)["counts"].sum() == run["tokens"]
    tokens = encoding().encode_ordinary("The President of the United States is elected by the people of the")
    with torch.no_grad():
        _, loss = model(torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]]))
    assert loss < 6  # a guess costs 10.8


def test_the_committed_results_are_small():
    files = [p for folder in (build.RESULTS, build.FIGURES) for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 5e6


# ----------------------------------------------------------------------------------------------------
# Sentences are for people: no reader looks for one


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


def test_rewording_every_claim_changes_nothing_but_the_sentences(results):
    """Paper and README's block have the same numbers and verdicts when all sentences are the same one."""
    found = {claim.claim for path in results.glob("*/*.json") for claim in read_result(path).claims}
    root = results.parents[1]
    paper_before = [text if text not in found else "(reworded)" for text in paper_texts(root)]
    block_before = " ".join(build.results_block().split())
    for sentence in sorted(found, key=len, reverse=True):
        block_before = block_before.replace(sentence.replace("|", "\\|"), "(reworded)")
    assert block_before.count("(reworded)") > 13 and paper_before.count("(reworded)") > 10

    change_claims(results, lambda claim: setattr(claim, "claim", "(reworded)"))
    assert " ".join(build.results_block().split()) == block_before
    assert paper_texts(root) == paper_before


def test_a_claim_without_its_key_stops_the_paper(results):
    typst = pytest.importorskip("typst")
    path = results / build.SUBJECT["second"] / "ablate_signal.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"concentrated"', '"dense"'), encoding="utf-8")
    root = results.parents[1]
    with pytest.raises(typst.TypstError, match="ablate_signal of .* has no claim concentrated"):
        typst.compile(root / "paper" / "paper.typ", root=root)


def test_what_the_block_says_follows_the_results(results):
    """Its sentences count what is there; those that would not hold are left out."""

    def fail(claim):
        claim.verdict = "not supported"
        claim.beats_gauges = None if claim.gauge is None else False

    def win(claim):
        claim.verdict = "supported"
        claim.beats_gauges = None if claim.gauge is None else True

    n = len(build.claims(RUN))
    change_claims(results, fail)
    block = " ".join(build.results_block().split())
    assert block.startswith(f"**Of {n} claims, 0 hold against their controls: 0 of")
    for words in ("Supported is", "do not clearly beat", "by construction"):
        assert words not in block
    assert "privileged without" in block  # the plain GPT does as well as none
    change_claims(results, win)
    block = " ".join(build.results_block().split())
    assert block.startswith(f"**Of {n} claims, {n} hold against their controls")
    assert "Supported is" in block and "do not clearly beat" not in block and "7 favour it by" in block
    for path in results.glob(f"{build.SUBJECT['coordinates']}/*.json"):
        result = read_result(path)
        for claim in result.claims:
            fail(claim)
        path.write_text(to_json(result), encoding="utf-8")
    assert "privileged without" not in build.results_block()


# ----------------------------------------------------------------------------------------------------
# What is committed is what these results make


def test_the_readme_shows_these_results():
    """The README's two blocks are what paper/build.py writes from the committed results."""
    assert build.readme() == build.README.read_text(encoding="utf-8"), "run python paper/build.py"


def test_the_block_says_its_finding_in_words_first_and_in_lines_that_fit():
    block = build.results_block()
    finding, table = block.split("\n|", 1)
    assert finding.startswith("**") and len(finding.split()) > 50
    assert len(block.splitlines()) <= 45 and len(build.speed_block().splitlines()) <= 20
    for line in (block + build.speed_block()).splitlines():
        assert line.startswith("|") or len(line) <= 160, line


def test_the_appendix_is_what_the_scripts_say():
    """methods.json has a question and a method of every experiment and study, those of the docstrings."""
    assert build.methods() == build.METHODS.read_text(encoding="utf-8"), "run python paper/build.py"
    found = json.loads(build.methods())
    assert list(found["experiments"]) == list(build.NAMES) and list(found["studies"]) == list(build.STUDIES)
    for name, parts in (found["experiments"] | found["studies"]).items():
        assert "?" in parts["question"] and len(parts["method"]) > 200, name


def test_the_method_is_one_section_of_a_docstring(tmp_path):
    doc = "Is it so?\n\n    python it.py\n\nMethod\n    One\n    way.\n\nCost\n    1 s."
    script = tmp_path / "it.py"
    script.write_text(f'"""\n{doc}\n"""\n')
    assert build.method_of(script) == {"question": "Is it so?", "method": "One way."}


def test_every_figure_of_the_paper_is_drawn_by_the_script(tmp_path, monkeypatch):
    """Every committed figure was drawn from these very results; drawing changes no setting of matplotlib."""
    monkeypatch.setattr(build, "FIGURES", tmp_path)
    settings = dict(matplotlib.rcParams)
    build.draw()
    assert dict(matplotlib.rcParams) == settings
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (PAPER / "figures").iterdir()}
    images = re.findall(r'image\("([^"]+)"', TEXT)
    assert drawn == {image.removeprefix("figures/") for image in images if image.startswith("figures/")}
    assert all((PAPER / image).exists() for image in images)
    for name in drawn:
        for folder in (tmp_path, PAPER / "figures"):
            text = (folder / name).read_text(encoding="utf-8")
            assert build.fingerprint() in text, f"{name} is out of date: run python paper/build.py"


def test_the_same_results_give_the_same_figure(tmp_path, monkeypatch):
    files = []
    for folder in ("a", "b"):
        monkeypatch.setattr(build, "FIGURES", tmp_path / folder)
        build.draw_curves()
        files.append((tmp_path / folder / "curves.svg").read_bytes())
    assert files[0] == files[1]


def test_it_builds_and_a_missing_result_stops_it(results):
    typst = pytest.importorskip("typst")
    pdf = typst.compile(PAPER / "paper.typ", root=PAPER.parent)
    assert pdf[:5] == b"%PDF-" and len(pdf) > 100_000
    (results / "bench.json").unlink()
    root = results.parents[1]
    with pytest.raises(typst.TypstError, match="bench.json"):
        typst.compile(root / "paper" / "paper.typ", root=root)
    (results / RUN / "sparsity_profile.json").unlink()
    with pytest.raises(build.UserError, match="no paper/results/.*profile.json: python paper/collect"):
        build.draw_sparsity(RUN)


def test_rows_are_found_by_their_columns():
    """Numbers are numbers; a column that is not asked for may hold anything."""
    found = build.rows(RUN, "crystallization", model="reflow", pos="all", strength=1.0, dictionary="")
    changes = [row for row in found if row["metric"] == "change of logit difference"]
    n_layer = runs()[RUN]["config"]["model"]["n_layer"]
    assert [row["layer"] for row in changes] == list(range(n_layer + 1))
    assert all(isinstance(row["value"], float) for row in changes)
    assert asdict(build.claims(RUN)["ablate_signal", "strongest"])["gauge"] == "rotation"
