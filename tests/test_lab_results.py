"""The form of result.json: typed, documented, the same as the committed schema."""

import json
import math
from pathlib import Path

import pytest

from configurator import UserError
from experiments.lab.results import SCHEMA, Estimate, read_result, schema, to_json

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = sorted((ROOT / "paper" / "results").glob("*/*.json"))
SAMPLE = ROOT / "paper" / "results" / "reflow-mini" / "ablate_signal.json"


def test_the_committed_schema_is_that_of_the_dataclasses():
    assert SCHEMA.read_text(encoding="utf-8") == schema(), "run python experiments/lab/results.py"


def test_the_schema_documents_what_is_not_plain():
    """Every field of a claim that has no self-evident meaning carries a description."""
    fields = json.loads(schema())["$defs"]["Claim"]["properties"]
    for name in ("key", "kind", "reason", "unit", "gain", "weakest", "gauges", "beats_gauges", "p", "lower"):
        assert fields[name].get("description"), name


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_committed_result_is_valid_and_its_claims_are_consistent(path):
    """It loads, and what claims say in fields agrees with their numbers."""
    result = read_result(path)
    keys = [claim.key for claim in result.claims]
    assert keys and len(set(keys)) == len(keys)
    for claim in result.claims:
        assert (claim.gauge is None) == (claim.kind == "effect")
        sign = -1 if claim.lower else 1
        if claim.kind == "signals":
            worst = claim.gauges.low if claim.lower else claim.gauges.high  # the gauge hardest to beat
            beats_all = sign * (claim.measured.value - worst) > 0
            assert beats_all == (claim.p * (claim.n_gauges + 1) < 1.5)
            assert claim.beats_gauges == (claim.p <= 0.05)
        if claim.kind == "gauge":
            assert claim.verdict == "description" and claim.p is claim.gain is None
        if claim.weakest is not None:
            gain = sign * (claim.measured.value - claim.controls[claim.weakest].value)
            assert math.isclose(gain, claim.gain.value, rel_tol=1e-3, abs_tol=1e-6)


def test_a_result_survives_writing_and_reading(tmp_path):
    result = read_result(SAMPLE)
    (tmp_path / "result.json").write_text(to_json(result), encoding="utf-8")
    assert read_result(tmp_path / "result.json") == result


def test_nan_and_infinity_are_stored_as_null(tmp_path):
    result = read_result(SAMPLE)
    result.claims[0].measured = Estimate(math.nan, -math.inf, math.inf)
    (tmp_path / "result.json").write_text(to_json(result), encoding="utf-8")
    read = read_result(tmp_path / "result.json").claims[0].measured
    assert read == Estimate(None, None, None) and str(read) == "not a number"


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(1.23456, 1, 2), "1.235 [1, 2]"),
        (Estimate(2, -math.inf, math.inf), "2 [-inf, inf]"),
        (Estimate(2, None, None), "2 (no interval)"),
        (Estimate(2, None, 3), "2 (no interval)"),
        (Estimate(2, 1, None), "2 (no interval)"),
        (Estimate(None, None, None), "not a number"),
    ],
)
def test_an_estimate_is_text_whatever_is_missing(estimate, text):
    """An unbounded interval, as of two seeds, is null on both sides when it is read back."""
    assert str(estimate) == text


def test_error_bars_are_the_distances_to_both_ends():
    assert Estimate(2.0, 1.5, 4.0).error == [[0.5], [2.0]]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda data: data.update(colour="red"), "colour"),
        (lambda data: data["claims"][0].update(verdict="probably"), "claims.0.verdict"),
        (lambda data: data["claims"][0].update(n="many"), "claims.0.n"),
        (lambda data: data["claims"][1]["measured"].update(median=1.0), "claims.1.measured.median"),
        (lambda data: data.pop("claims"), "claims"),
        (lambda data: data["claims"][0].pop("key"), "claims.0.key"),
    ],
)
def test_an_unknown_field_or_a_wrong_type_is_refused_in_one_line(tmp_path, change, where):
    data = json.loads(SAMPLE.read_text(encoding="utf-8"))
    change(data)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_result(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message and f"({where}: " in message and message.endswith("run it again")


def test_a_file_that_is_no_json_is_refused_in_one_line(tmp_path):
    for name, text in (("missing.json", None), ("broken.json", "{")):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=name) as error:
            read_result(tmp_path / name)
        assert "\n" not in str(error.value)
