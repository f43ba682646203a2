"""audit: every claim has a plant that it finds; noise, shuffled text and rotated plants are refused."""

from importlib import import_module

import pytest

from experiments import audit
from experiments.run_all import NAMES

GAUGES = {"best_space"}  # descriptions: they have no verdict


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(folder of the draws, their text)."""
    out = tmp_path_factory.mktemp("audit")
    return out, audit.make_text(out / "text")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    audit.shrink(monkeypatch.setattr)


def test_every_claim_has_a_plant():
    keys = {name: set() for name in NAMES}
    for case in audit.CASES:
        keys[case.experiment].update(case.effects, case.signals)
    assert keys == {name: set(import_module(f"experiments.{name}").CLAIMS) - GAUGES for name in NAMES}


@pytest.mark.parametrize("number", range(len(audit.CASES)))
def test_a_plant_is_found(number, place):
    case = audit.CASES[number]
    found = audit.verdicts(number, "plant", 0, *place)
    assert {found[key] for key in (*case.effects, *case.signals)} == {"supported"}


@pytest.mark.parametrize("number", [2, 5, 8])
def test_noise_as_long_as_a_plant_is_refused(number, place):
    found = audit.verdicts(number, "noise", 0, *place)
    assert {found[key] for key in audit.CASES[number].effects} == {"not supported"}


@pytest.mark.parametrize("number", [4, 5, 10])
def test_signals_of_a_rotated_plant_are_refused_and_its_effects_are_not(number, place):
    case = audit.CASES[number]
    found = audit.verdicts(number, "turned", 0, *place)
    assert {found[key] for key in case.signals} == {"not supported"}
    assert {found[key] for key in case.effects} - {found.get("movement")} <= {"supported"}


def test_a_model_trained_on_shuffled_text_is_refused_by_one_trained_on_another_order(place, monkeypatch):
    monkeypatch.setattr(audit, "STEPS", 6)
    run = audit.train_shuffled(0, *place)
    found = audit.verdicts(2, "shuffled text", 0, *place)
    assert found["analogies"] == "not supported"
    (own,) = (run / "nulls").glob("shuffled-*")
    assert own.name != run.name


def test_a_rate_has_an_interval_and_counts_what_was_decided():
    found = [{"key": "supported"}] + 19 * [{"key": "not supported"}] + [{"key": "inconclusive"}]
    assert audit.rate(found, "key") == "1 of 20 [0.00, 0.25]"
    assert audit.rate(found[-1:], "key") == "inconclusive"


def test_the_table_is_in_the_readme():
    text = audit.README.read_text(encoding="utf-8")
    rows = text.partition(audit.BEGIN)[2].partition(audit.END)[0].splitlines()
    for case in audit.CASES:
        for key in (*case.effects, *case.signals):
            assert any(row.startswith(f"| `{case.experiment}` | `{key}` |") for row in rows), key
