"""The paper is made of results: behind every number, table and figure is a file, and it is the right one."""

import hashlib
import json
import re
import shutil
from dataclasses import asdict

import pytest
import torch
from lab_fixtures import corpus, save_run, tiny
from safetensors.torch import save_file

import checkpoint
from data.shards import Dataset
from data.tokenizer import encoding
from experiments import lab
from paper import build, collect

PAPER = build.PAPER
TEXT = (PAPER / "paper.typ").read_text(encoding="utf-8")
RESULTS = sorted(build.RESULTS.glob("*/*.json"))


def runs():
    return json.loads((build.RESULTS / "runs.json").read_text(encoding="utf-8"))


def sha256(config):
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("name", runs())
def test_a_run_s_hash_is_that_of_its_configuration(name):
    assert runs()[name]["config_sha256"] == sha256(runs()[name]["config"])


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_result_belongs_to_the_run_it_names(path):
    """Configuration, step, data and weights of a result are those of the run in runs.json."""
    result = json.loads(path.read_text(encoding="utf-8"))
    named = result.get("runs") or [result["run"]]  # a study compares many
    assert "runs" in result or path.parent.name == named[0]["name"]
    for run in named:
        known = runs()[run["name"]]
        for key in ("config_sha256", "data_sha256", "step"):
            assert run[key] == known[key], f"{path} was made from another {run['name']}: {key}"
    for name, weights in result["made_from"].items():
        assert runs()[name]["weights_sha256"] == weights, f"{path} was made from another {name}"


def test_every_figure_and_file_of_the_paper_exists_and_is_drawn_by_the_script():
    images = re.findall(r'image\("([^"]+)"', TEXT)
    assert images
    for image in images:
        assert (PAPER / image).exists(), f"{image}: run python paper/build.py"
    drawn = set(re.findall(r'save\(fig, "(\w+)"\)', (PAPER / "build.py").read_text(encoding="utf-8")))
    assert drawn == {re.sub(r"figures/(\w+)\.svg", r"\1", i) for i in images if i.startswith("figures/")}
    for file in re.findall(r'json\("([^"]+)"\)', TEXT):
        assert (PAPER / file).exists()


def prose(text):
    """The paper's text without code, mathematics, citations, comments and names: what somebody typed."""
    text = text[text.index("*Abstract.*") :]
    text = re.sub(r"#let [^\n]*(\n[ )}\]][^\n]*)*", "", text)  # definitions and their indented lines
    text = re.sub(r"`[^`]*`|\$[^$]*\$|//[^\n]*|<[\w-]+>|@[\w-]+", "", text)
    text = re.sub(r'"[^"\n]*"', "", text)
    text = re.sub(r"\b(GPT-2|3CosAdd|bfloat16)\b", "", text)
    text = re.sub(r"\w+: \([^()]*\)", "", text)
    for _ in range(8):  # calls in code, from the inside out; what stands in brackets in a sentence stays
        text = re.sub(r"(?<=[\w)\]])\([^()]*\)", "", text)
    text = re.sub(r"#(set|show|v|h|pagebreak|counter|place|block|for|if)\b[^\n]*", "", text)
    text = re.sub(r"\b(fp32|columns: \d)|[\d.]+(pt|cm|em|fr)\b", "", text)
    return text


# Said of the published system (parameters in millions, layers), and the level of all intervals.
GIVEN = {"464", "515", "32", "95"}


def test_no_number_is_typed_into_the_text():
    typed = re.findall(r"\d[\d.,]*\d|\d", prose(TEXT))
    assert set(typed) <= GIVEN
    assert prose('*Abstract.* The gain is 0.38 nats, #sig(x.y, n: 3) in #pct(a.at("b"))').count("0.38") == 1


def test_the_readme_shows_these_results():
    """The README's two blocks are what paper/build.py writes from the committed results."""
    assert build.readme() == build.README.read_text(encoding="utf-8"), "run python paper/build.py"


def test_the_figures_are_those_of_the_results(tmp_path, monkeypatch):
    """Every committed figure was drawn from these very results, and all of them can be drawn again."""
    monkeypatch.setattr(build, "FIGURES", tmp_path)
    build.draw()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (PAPER / "figures").iterdir()}
    for name in drawn:
        for folder in (tmp_path, PAPER / "figures"):
            text = (folder / name).read_text(encoding="utf-8")
            assert build.fingerprint() in text, f"{name} is out of date: run python paper/build.py"


def test_it_builds_and_a_missing_result_stops_it(tmp_path):
    typst = pytest.importorskip("typst")
    pdf = typst.compile(PAPER / "paper.typ", root=PAPER.parent)
    assert pdf[:5] == b"%PDF-" and len(pdf) > 100_000
    for folder in ("paper", "assets"):
        shutil.copytree(PAPER.parent / folder, tmp_path / folder)
    (tmp_path / "paper" / "results" / "bench.json").unlink()
    with pytest.raises(typst.TypstError, match="bench.json"):
        typst.compile(tmp_path / "paper" / "paper.typ", root=tmp_path)


def test_the_released_model_is_the_run_of_the_paper():
    """release/reflow-mini, under 40 MB, has the configuration and step of runs.json, and predicts English."""
    folder = PAPER.parent / "release" / "reflow-mini"
    assert sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) < 40e6
    model, state = checkpoint.load_model(checkpoint.find(folder))
    run = runs()["reflow-mini"]
    assert (sha256(state["config"]), state["step"]) == (run["config_sha256"], run["step"])
    assert checkpoint.load_tensors(folder / lab.COUNTS)["counts"].sum() == run["tokens"]
    tokens = encoding().encode_ordinary("The President of the United States is elected by the people of the")
    with torch.no_grad():
        _, loss = model(torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]]))
    assert loss < 6  # a guess costs 10.8


def test_the_committed_results_are_small():
    size = sum(
        p.stat().st_size
        for folder in (build.RESULTS, build.FIGURES)
        for p in folder.rglob("*")
        if p.is_file()
    )
    assert size < 5e6


def collected(monkeypatch, results, *arguments):
    monkeypatch.setattr(collect, "RESULTS", results)
    monkeypatch.setattr(collect.sys, "argv", ["collect.py", *arguments])
    collect.main()


def test_collect_keeps_no_result_of_another_checkpoint(tmp_path, monkeypatch):
    """A run goes on, or is trained again: results made before, new ones or those collected, are refused."""
    run = save_run(tmp_path / "run", tiny(), data := corpus(tmp_path / "data", repeats=1))
    sha = Dataset(data, "val", 1).data_sha256

    def state(**changes):
        file = checkpoint.find(run) / "state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def experiment():
        report = lab.Report(lab.Lab(lab.LabConfig(run=str(run), device="cpu")), "ablate_signal")
        report.save()

    state(data_sha256=sha)
    train = checkpoint.read_state(checkpoint.find(run))["config"]["train"]
    experiment()
    results = tmp_path / "results"
    collected(monkeypatch, results, f"--runs={run}")
    before = {p: p.read_bytes() for p in results.rglob("*.*")}
    assert {p.name for p in before} == {
        "runs.json",
        "methods.json",
        "ablate_signal.json",
        "ablate_signal.csv",
    }
    state(best_val_loss=1.0)  # nothing that a result depends on
    collected(monkeypatch, results, f"--runs={run}")
    assert before == {p: p.read_bytes() for p in results.rglob("*.*")}

    state(val_loss=1.0, config={"model": asdict(tiny().config), "train": train | {"lr": 1}})
    with pytest.raises(collect.UserError, match="another checkpoint or configuration of run"):
        collected(monkeypatch, results, f"--runs={run}")
    experiment()
    collected(monkeypatch, results, f"--runs={run}")
    weights = checkpoint.find(run) / "model.safetensors"
    save_file(dict(tiny(seed=1).state_dict()), weights)  # the same configuration, trained again
    lab.file_sha256.cache_clear()
    before = {p: p.read_bytes() for p in results.rglob("*.*")}
    for _ in range(2):  # the run's own results, then those that were collected before
        with pytest.raises(collect.UserError, match="was made from another run"):
            collected(monkeypatch, results, f"--runs={run}")
        shutil.rmtree(run / "experiments", ignore_errors=True)
    assert before == {p: p.read_bytes() for p in results.rglob("*.*")}


def test_a_named_checkpoint_brings_its_own_results(tmp_path, monkeypatch):
    """--runs=<run>/step_... collects what the experiments wrote there, not what they wrote for the run."""
    data = corpus(tmp_path / "data", repeats=1)
    run = save_run(tmp_path / "run", tiny(), data)
    (step,) = [s for s in checkpoint.steps(run) if s.name != "step_000000"]
    sha = Dataset(data, "val", 1).data_sha256
    file = step / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data_sha256": sha}))
    for folder, mark in ((run, "run"), (step, "step")):
        result = folder / "experiments" / "nearest_neighbors"
        result.mkdir(parents=True)
        identity = lab.run_identity(step, checkpoint.read_state(step))
        (result / "result.json").write_text(json.dumps({"run": identity, "made_from": {}, "mark": mark}))
        (result / "rows.csv").write_text(mark)
    for given, mark in ((run, "run"), (step, "step")):
        collected(monkeypatch, tmp_path / "results", f"--runs={given}")
        kept = tmp_path / "results" / "run" / "nearest_neighbors"
        assert json.loads(kept.with_suffix(".json").read_text())["mark"] == mark
        assert kept.with_suffix(".csv").read_text() == mark


def test_a_run_whose_data_is_not_here_is_not_collected(tmp_path, monkeypatch):
    """Sources and tokens are those of the data it was trained on; without it nothing is written."""
    run = save_run(tmp_path / "run", tiny(), corpus(tmp_path / "data", repeats=1))  # of another hash
    with pytest.raises(collect.UserError, match="data that the run was trained on is not here"):
        collected(monkeypatch, tmp_path / "results", f"--runs={run}")
    file = checkpoint.find(run) / "state.json"  # nor is one that is not finished
    file.write_text(json.dumps(json.loads(file.read_text()) | {"whole_val_loss": None}))
    with pytest.raises(collect.UserError, match="no loss over the whole validation split"):
        collected(monkeypatch, tmp_path / "results", f"--runs={run}")
    assert not (tmp_path / "results").exists()


def test_what_is_missing_is_named_before_anything_is_written(tmp_path, monkeypatch):
    """Studies or a bench that were not run, and a result that was deleted: one line, nothing half written."""
    for option in ("studies", "minis", "bench"):
        with pytest.raises(collect.UserError, match="nothing was collected"):
            collected(monkeypatch, tmp_path / "results", f"--{option}={tmp_path / 'nothing'}")
    assert not (tmp_path / "results").exists()
    shutil.copytree(build.RESULTS, tmp_path / "results")
    run = build.SUBJECT["runs"]["factored"]
    (tmp_path / "results" / run / "sparsity_profile.csv").unlink()
    monkeypatch.setattr(build, "RESULTS", tmp_path / "results")
    with pytest.raises(build.UserError, match="sparsity_profile.csv"):
        build.sparsity(run)
