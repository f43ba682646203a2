"""The experiments and the studies on corpora without what they measure: whole windows, listed words."""

import importlib
import json
import warnings

import numpy as np
import pytest

import checkpoint
from configurator import UserError
from data.shards import Writer
from data.tokenizer import END_OF_TEXT, gpt2
from experiments import concept_inception, crystallization, emotion_surgery, sparsity_profile, template
from experiments.lab import Lab, LabConfig, Report
from experiments.lab.claims import TooFew
from experiments.lab.lab import check_writable, train_baseline
from experiments.lab.probes import labelled
from experiments.lab.report import measure, table
from experiments.run_all import NAMES
from experiments.studies import STUDIES
from tests.lab_fixtures import open_lab, save_run, tiny, words
from tests.studies_fixtures import open_study, save_trained


def write(folder, documents):
    """Write a dataset of texts, every fourth for validation."""
    writer = Writer(folder, source="short texts", licence="none", recipe={})
    for i, text in enumerate(documents):
        split = "val" if i % 4 == 1 else "train"
        if writer.wants(split, i):
            tokens = np.append(gpt2().encode(text), END_OF_TEXT).astype("uint16")
            writer.add(split, i, tokens, len(text.encode()))
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    """{name: Lab} of tiny runs over one-sentence documents, over numbers and Chinese, over almost nothing."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    vocabulary = words(250) * 12
    sentences = [" " + " ".join(part) for part in np.array_split(rng.permutation(vocabulary), 330)]
    digits = [" ".join(map(str, rng.integers(0, 99, 12))) + "\u4e2d\u6587\u3002" * 3 for _ in range(300)]
    corpora = {"sentences": sentences, "digits": digits, "nothing": ["1 2 3"] * 20}
    found = {}
    for name, documents in corpora.items():
        data = write(folder / f"data-{name}", documents)
        found[name] = open_lab(save_run(folder / name, tiny(block_size=32), data))
    return found


@pytest.fixture
def quick(monkeypatch):
    """Less of what takes time and is not tested here."""
    monkeypatch.setattr(concept_inception, "GRID", (0.25, 1.0, 64.0))
    monkeypatch.setattr(crystallization, "MAX_LAYERS", 3)
    monkeypatch.setattr(emotion_surgery, "CHOICES", (1.0,))
    monkeypatch.setattr(sparsity_profile, "DIVISORS", (8,))


@pytest.mark.parametrize("corpus", ["sentences", "digits", "nothing"])
@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_says_what_it_lacks_and_goes_on(labs, quick, corpus, name):
    script = importlib.import_module(f"experiments.{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a mean of nothing
        report = measure(script.run, labs[corpus])
    result = report.save()
    assert {claim.key for claim in result.claims} == set(script.CLAIMS)
    for claim in result.claims:
        if claim.n < 20:
            assert claim.verdict == "inconclusive" and "only " in claim.reason
    json.loads((report.folder / "result.json").read_text())


@pytest.fixture(scope="module")
def studies(labs, tmp_path_factory):
    """{name of a corpus: glob of two seeds of each kind of run on it}."""
    folder = tmp_path_factory.mktemp("studies")
    kinds = {"factored": {}, "dense": {}, "topk": {"top_k": 4}}
    for name, lab in labs.items():
        for seed in range(2):
            for kind, options in kinds.items():
                net = tiny(seed, vocab=kind, block_size=32, **options)
                save_trained(
                    folder / name / f"{kind}{seed}", net, lab.checkpoint.train_config["dataset"], seed
                )
    return {name: f"{folder}/{name}/*" for name in labs}


@pytest.mark.parametrize("corpus", ["sentences", "digits", "nothing"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_says_what_it_lacks_and_goes_on(studies, tmp_path, corpus, name):
    study = importlib.import_module(f"experiments.studies.{name}")
    report = measure(study.run, open_study(studies[corpus], tmp_path))
    result = report.save()
    assert {claim.key for claim in result.claims} <= set(study.CLAIMS)
    for claim in result.claims:
        if claim.verdict == "inconclusive":
            assert claim.reason.startswith("only ")
    verdicts = {claim.key: claim.verdict for claim in result.claims}
    if corpus == "digits" and name == "stability":  # signals need tokens, neighbours need words
        assert verdicts["neighbours"] == "inconclusive" != verdicts["partners"]
    if corpus == "nothing":
        assert set(verdicts.values()) == {"inconclusive"}


def test_windows_of_short_documents_are_packed_as_in_training(labs):
    """A document's end is inside some windows, never at their last token or the next one."""
    lab = labs["sentences"]
    report = measure(lambda lab: Report(lab, "template", template.CLAIMS), lab)
    x, y = lab.heldout(100, 24)
    assert len(x) >= 20 and (x == END_OF_TEXT).any() and not (x[:, -1] == END_OF_TEXT).any()
    assert not (y[:, -1] == END_OF_TEXT).any()
    assert report.numbers["windows of 24 tokens packed"] >= len(x)
    x, _ = lab.heldout(100, 4)  # whole ones are enough
    assert not (x == END_OF_TEXT).any() and "windows of 4 tokens packed" not in report.numbers
    with pytest.raises(TooFew, match="only 0 windows of 200 tokens"):
        labs["nothing"].heldout(100, 200)


def test_what_was_decided_before_stays(labs):
    """sparsity_profile without held-out text: two claims of three."""
    lab = open_lab(labs["sentences"].checkpoint.run)

    def heldout(n, length):
        raise TooFew("only 3 windows")

    lab.heldout = heldout
    report = measure(sparsity_profile.run, lab)
    truncation = report["truncation"]
    assert (truncation.verdict, truncation.reason) == ("inconclusive", "only 3 windows")
    assert truncation.kind == "signals" and report["sparse"].n > 20 and report["privileged"].n > 20
    assert "only 3 windows" in table(report.result())


def test_probes_of_ones_own(labs, tmp_path):
    """Numbers in two classes on the corpus of numbers: measured, and another result than with ours."""
    lab = labs["digits"]
    known = [lab.words.text(token).strip() for token in lab.words.known_tokens()]
    numbers = [text for text in known if lab.words.known(text)][:40]
    lists = {"even": {"words": numbers[::2]}, "odd": {"words": numbers[1::2]}}
    (tmp_path / "categories.json").write_text(json.dumps(lists))
    config = LabConfig(run=str(lab.checkpoint.run), device="cpu", probes=str(tmp_path))
    own = Lab(config)
    _, _, names = labelled(own)
    assert names == ["even", "odd"] and own.probe("agreement") == lab.probe("agreement")
    assert own.identity()["made_from"].items() > lab.identity()["made_from"].items()
    before = own.identity()
    (tmp_path / "categories.json").write_text(json.dumps(lists | {"all": {"words": numbers}}))
    assert Lab(config).identity() != before


@pytest.mark.parametrize(
    "text, fault",
    [
        (None, "holds none of categories.json"),
        ('{"even": ["2", "4"]}', "categories.json: even"),
        ("{", "categories.json: : Invalid JSON"),
    ],
)
def test_damaged_probes_are_refused_before_the_work(labs, tmp_path, text, fault):
    if text:
        (tmp_path / "categories.json").write_text(text)
    with pytest.raises(UserError, match=fault):
        Lab(LabConfig(run=str(labs["digits"].checkpoint.run), device="cpu", probes=str(tmp_path)))


def test_results_elsewhere(labs, tmp_path):
    run = labs["digits"].checkpoint.run
    lab = Lab(LabConfig(run=str(run), device="cpu", results=str(tmp_path)))
    assert Report(lab, "template", {}).folder == tmp_path / "digits" / "template"
    step = Lab(LabConfig(run=str(run / "step_000001"), device="cpu", results=str(tmp_path)))
    assert step.results == tmp_path / "digits" / "step_000001"


def test_a_place_that_cannot_be_written_is_named_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written .*: give --results=FOLDER"):
        check_writable(tmp_path / "file" / "experiments")
    check_writable(tmp_path / "new")


def test_the_missing_baseline_is_named_by_its_command(labs):
    """The shape and data of the run, in place of those of a shipped file."""
    command = train_baseline(labs["digits"].checkpoint)
    assert command.startswith("python train.py config/gpt2_new")
    for setting in ("dataset=", "n_layer=2", "n_embd=16", "block_size=32", "out_dir=out/digits-baseline"):
        assert f"--{setting}" in command
    assert "--vocab" not in command
    shipped = train_baseline(checkpoint.open_run(checkpoint.RELEASES / "reflow-mini"))
    assert shipped == "python train.py config/gpt2_new_mini.py"
