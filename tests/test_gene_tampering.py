"""gene_tampering: edits of planted recipes work, edits of untrained ones do not."""

import pytest

from experiments import gene_tampering
from experiments.lab import continuations
from experiments.lab.results import read_result
from tests.sentiment_fixtures import planted_labs, verdicts


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The reports on the three runs, with continuations of one token."""
    labs = planted_labs(tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuations, "NEW_TOKENS", 1)
        return {name: gene_tampering.run(lab) for name, lab in labs.items()}


def test_edits_of_planted_recipes_work(reports):
    report = reports["planted"]
    found = verdicts(report)
    assert found["swap"] == found["tilt"] == "supported"
    assert report["few_signals"].beats_gauges and report["few_signals"].lower
    assert report.numbers["few_signals"]["native"] < 0.5 * min(report.numbers["few_signals"]["gauges"])
    assert report["swap"].controls.keys() == {"random", "step 0", "noise"}
    assert report["few_signals"].controls.keys() == {"pca", "ica", "baseline", "baseline ica"}
    assert report.numbers["swap"].keys() == {"native", "random", "step 0", "noise", "baseline"}
    report.save()
    result = read_result(report.folder / "result.json")
    assert [figure.file for figure in result.figures] == ["edits.png"]
    assert (report.folder / "edits.png").exists() and result.gallery


def test_sides_of_an_edit_do_what_they_can(reports):
    edits = reports["planted"].numbers["edits"]
    assert edits["reflow, swap, input"]["KL, text without"] < 1e-6  # no token of it was read
    assert edits["reflow, add, output"]["tilt, nats"] == pytest.approx(0, abs=1e-6)
    assert edits["reflow, swap, both"]["log-odds, nats"] > 1
    assert "efficacy" not in edits["reflow, zero, both"]  # two zero rows have equal logits
    assert "baseline, swap, both" in edits


def test_untrained_recipes_carry_nothing(reports):
    found = verdicts(reports["untrained"])
    assert found["swap"] == found["tilt"] == "not supported"


def test_rotated_signals_keep_no_more_than_rotations(reports):
    """The very same function: only the claim about signals may change."""
    expected = {"swap": "supported", "tilt": "supported", "few_signals": "not supported"}
    assert verdicts(reports["turned"]) == expected
