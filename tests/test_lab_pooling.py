"""Pooled results: models are resampled, two decide nothing, one contrary model of three is enough to fail."""

import numpy as np
import pytest

from experiments import run_all, template
from experiments.lab import Report, Scores, pooling
from experiments.lab.lab import run_identity
from experiments.lab.results import read_result
from tests.lab_fixtures import corpus, open_lab, save_run, tiny

SENTENCES = {"effect": "it is there", "ways": "it is there in both", "special": "it is special"}


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    """Labs of three seeds of one configuration."""
    out = tmp_path_factory.mktemp("out")
    data = corpus(tmp_path_factory.mktemp("data"), repeats=2)
    return [open_lab(save_run(out / f"seed{i}", tiny(i), data, seed=i)) for i in range(3)]


def result(lab, shift, n=50):
    """Save a report whose mean gains over chance, rotations and PCA are `shift`, and return its Lab."""
    report = Report(lab, "template", SENTENCES)
    rng = np.random.default_rng(lab.checkpoint.train_config["seed"])
    noise = 0.1 * rng.standard_normal((4, n))
    scores = Scores({"native": noise[0] + shift, "chance": noise[1]})
    report.effect("effect", scores, "words")
    report.effect("ways", {"a": scores, "b": Scores({"native": noise[2] + 9, "chance": noise[3]})}, "words")
    gauges = 0.1 * rng.standard_normal((19, n))
    report.signals("special", Scores({"native": noise[0] + shift, "pca": noise[1]}, gauges), "words")
    report.save()
    return lab


def pooled(labs, shifts):
    """{key: Claim} of the pooled results of models with these gains."""
    folders = [result(lab, shift).results for lab, shift in zip(labs, shifts, strict=True)]
    found = pooling.pool("template", folders, [run_identity(lab.checkpoint) for lab in labs])
    return {claim.key: claim for claim in found.claims}


def test_what_three_models_show_is_supported(labs):
    claims = pooled(labs, [1.0, 1.1, 0.9])
    assert {claim.verdict for claim in claims.values()} == {"supported"}
    assert claims["effect"].rests_on == {"models": 3} and claims["effect"].n == 150
    assert claims["ways"].decided_by == "a" and claims["special"].p == 0.05
    assert claims["effect"].measured.value == pytest.approx(1.0, abs=0.05)


def test_one_contrary_model_of_three_is_enough_to_fail(labs):
    """Its interval over words alone would be far from zero."""
    claims = pooled(labs, [1.0, 1.0, -0.2])
    assert {claim.verdict for claim in claims.values()} == {"not supported"}
    assert claims["effect"].measured.low < 0 < 0.4 < claims["effect"].measured.value


def test_models_that_differ_much_do_not_speak_for_others(labs):
    """All three gain, but of three the bootstrap is too narrow: the t interval over models contains zero."""
    claim = pooled(labs, [0.1, 0.2, 2.0])["effect"]
    assert claim.gain.low > 0 and claim.verdict == "not supported" and "(t)" in claim.reason


def test_two_models_decide_nothing(labs):
    claims = pooled(labs[:2], [1.0, 1.0])
    assert {claim.verdict for claim in claims.values()} == {"inconclusive"}
    assert claims["effect"].reason.startswith("only 2 models")


def test_a_claim_that_a_model_could_not_measure_is_inconclusive(labs):
    folders = [result(lab, 1.0).results for lab in labs]
    report = Report(labs[2], "template", SENTENCES)
    report.stop("only 3 words")
    report.save()
    found = pooling.pool("template", folders, [run_identity(lab.checkpoint) for lab in labs])
    assert {claim.verdict for claim in found.claims} == {"inconclusive"}
    assert "only 3 words" in found.claims[0].reason


def test_run_all_pools_seeds_of_one_configuration_alone(labs, tmp_path, monkeypatch, capsys):
    runs = [str(lab.checkpoint.run) for lab in labs]

    def start(names):
        arguments = [f"--run={','.join(names)}", "--only=template", "--again"]
        monkeypatch.setattr("sys.argv", ["run_all.py", *arguments])
        run_all.main()
        return capsys.readouterr().out

    def fake(lab):
        report = Report(lab, "template", {"effect": "it is there"})
        report.effect("effect", Scores({"native": np.ones(30), "chance": np.zeros(30)}), "words")
        return report

    monkeypatch.setattr(run_all, "NAMES", ("template",))
    monkeypatch.setattr(template, "run", fake)
    printed = start(runs)
    folder = labs[0].checkpoint.run.parent / "pooled" / "seed0+seed1+seed2"
    assert "3 models: seed0, seed1, seed2" in printed and str(folder) in printed
    claim = read_result(folder / "template" / "result.json").claims[0]
    assert (claim.verdict, claim.rests_on) == ("supported", {"models": 3})

    data = labs[0].checkpoint.train_config["dataset"]
    other = save_run(tmp_path / "wide", tiny(3, n_embd=32), data, seed=3)
    assert "not seeds of one configuration: n_embd is 16 and 32" in start([runs[0], str(other)])
    again = save_run(tmp_path / "again", tiny(4), data)
    assert "their seeds are 0, 0" in start([runs[0], str(again)])
