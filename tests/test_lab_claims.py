"""Scores, and the rules that turn them into verdicts: they err as rarely as they say."""

import numpy as np
import pytest
import torch

from experiments.lab import Scores
from experiments.lab.claims import ROUNDING, below, effect, gauge, make_claim, signals, weaker


def test_scores_hold_numpy_values_whatever_they_are_given():
    scores = Scores({"native": torch.ones(3, requires_grad=True)}, gauges=[torch.zeros(3), np.ones(3)])
    scores["baseline"] = torch.tensor([True, False, True])
    assert scores.native.dtype == scores["baseline"].dtype == scores.gauges.dtype == np.float64
    assert scores["baseline"].tolist() == [1, 0, 1]
    assert scores.gauges.shape == (2, 3)


def test_three_questions_are_told_apart():
    """What ICA of the own E does as well can be privileged and worth training for; random signals are not;
    what the plain GPT's ICA does as well was not worth training for. Of two ways the weaker one counts."""
    rng = np.random.default_rng(0)

    def noise():
        return 0.1 * rng.standard_normal(40)

    found = {"native": 1 + noise(), "pca": noise(), "ica": 1 + noise(), "baseline": noise()}
    gauges = rng.standard_normal((19, 40)) * 0.1
    fields = signals(Scores(found, gauges), "words")
    asked = {question: part.verdict for question, part in fields["questions"].items()}
    assert fields["verdict"] == "not supported"
    assert asked == {"privileged": "supported", "worth training for": "supported"}

    rival = signals(Scores(found | {"baseline ica": 1.05 + noise()}, gauges), "words")
    assert rival["questions"]["worth training for"].verdict == "not supported"
    random = signals(Scores(found, gauges + 1), "words")
    assert random["questions"]["privileged"].verdict == "not supported"
    alone = signals(Scores({"native": found["native"], "pca": found["pca"]}, gauges), "words")
    assert alone["questions"]["worth training for"].verdict == "inconclusive"
    few = signals(Scores(found, gauges[:3]), "words")
    assert few["questions"]["privileged"].verdict == "inconclusive"
    both = weaker({"one": fields, "other": rival})["questions"]
    assert both["privileged"].verdict == "supported"
    assert both["worth training for"].verdict == "not supported"


def test_rivals_are_all_but_the_native_values():
    scores = Scores({"native": [1], "pca": [2], "baseline": [3]}, gauges=[[4]])
    assert {name: values.tolist() for name, values in scores.rivals.items()} == {"pca": [2], "baseline": [3]}


def test_map_changes_every_entry_and_every_gauge():
    """One column of values (n, L), in every dictionary; the kind of gauge stays."""
    rng = np.random.default_rng(0)
    native, pca = rng.normal(size=(2, 5, 3))
    gauges = rng.normal(size=(19, 5, 3))
    scores = Scores({"native": native, "pca": pca}, gauges, "skewed")
    found = scores.map(lambda values: values[:, 1])
    assert isinstance(found, Scores) and list(found) == ["native", "pca"]
    assert found.native.tolist() == native[:, 1].tolist()
    assert found["pca"].tolist() == pca[:, 1].tolist()
    assert found.gauges.tolist() == gauges[:, :, 1].tolist()
    assert found.gauge == "skewed"
    assert scores.native.shape == (5, 3)


def test_map_without_gauges_has_none():
    found = Scores({"native": [1.0, 2.0]}).map(np.negative)
    assert found.native.tolist() == [-1, -2] and found.gauges is None


def test_means_are_those_of_every_entry_and_a_list_of_the_gauges():
    scores = Scores({"native": [1, 3], "pca": [[1, 2], [3, 6]]}, gauges=[[0, 1], [2, 4]])
    assert scores.means() == {"native": 2, "pca": 3, "gauges": [0.5, 3]}
    assert Scores({"native": [1, 3]}).means() == {"native": 2}


def test_an_effect_that_is_not_there_is_rarely_supported():
    """One chance control, one side: 2.5 % are expected in 200 trials."""
    rng = np.random.default_rng(1)
    supported = 0
    for _ in range(200):
        a, b = rng.standard_normal((2, 60))
        supported += effect(Scores({"native": a, "b": b}), "words")["verdict"] == "supported"
    assert supported <= 10


@pytest.mark.parametrize("names", ["ab", "ba"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_gain_that_is_not_a_number_supports_nothing(names, value):
    """A control that overflowed was not beaten, wherever it stands among the controls."""
    controls = {"a": np.full(50, 2.0), "b": np.full(50, value)}
    scores = Scores({"native": np.ones(50)} | {name: controls[name] for name in names})
    found = effect(scores, "units", lower=True)
    assert found["verdict"] == "inconclusive"
    assert found["reason"] == "the gain over b is not a number"


def test_an_effect_that_is_there_is_supported_in_its_direction_only():
    rng = np.random.default_rng(2)
    high = rng.standard_normal(100) + 1
    low = rng.standard_normal(100)

    def verdict(measured, controls, **how):
        return effect(Scores({"native": measured} | controls), "words", **how)["verdict"]

    assert verdict(high, {"low": low}) == "supported"
    assert verdict(high, {"low": low}, lower=True) == "not supported"
    assert verdict(low, {"high": high}, lower=True) == "supported"
    assert verdict(high, {"low": low, "better": high + 0.1}) == "not supported"
    assert verdict(high, {"low": low, "better": high + 0.1}, against=["low"]) == "supported"
    assert verdict(high[:19], {"low": low[:19]}) == "inconclusive"
    assert verdict(high, {"low": low}, groups=np.arange(100) // 10) == "inconclusive"
    assert verdict(high, {}) == "inconclusive"


def test_the_weakest_control_is_the_hardest_to_beat():
    found = effect(Scores({"native": np.ones(50), "far": np.zeros(50), "near": np.full(50, 0.5)}), "words")
    assert found["weakest"] == "near" and found["gain"].value == 0.5
    assert found["controls"].keys() == {"far", "near"}


@pytest.mark.parametrize("scale", [1, 1000, -1000])
def test_a_gain_of_the_size_of_rounding_is_no_gain(scale):
    """The limit is 1e-5 of the mean measured size: of the sizes, so that negative values do not lower it."""
    measured = np.full(50, float(scale))
    for size, verdict in ((0.5, "not supported"), (2, "supported")):
        gain = size * ROUNDING * abs(scale)
        assert effect(Scores({"native": measured, "other": measured - gain}), "words")["verdict"] == verdict
        found = effect(Scores({"native": measured, "other": measured + gain}), "words", lower=True)
        assert found["verdict"] == verdict


def test_a_dictionary_that_is_one_rotation_among_others_is_supported_once_in_twenty():
    """The null hypothesis of the gauge test itself: native is exchangeable with its rotations."""
    rng = np.random.default_rng(3)
    trials = rng.standard_normal((400, 20, 30))
    found = [signals(Scores({"native": v[0]}, v[1:]), "words")["verdict"] for v in trials]
    assert 5 <= found.count("supported") <= 35  # 20 expected, standard deviation 4.4


def test_signals_must_beat_rotations_and_rivals():
    rng = np.random.default_rng(4)
    gauges = rng.standard_normal((19, 50)) * 0.1
    better = np.ones(50) + rng.standard_normal(50) * 0.1

    def found(native, gauges, lower=False, **rivals):
        return signals(Scores({"native": native} | rivals, gauges), "words", lower=lower)

    assert found(better, gauges, pca=better - 0.5)["verdict"] == "supported"
    assert found(better, gauges, pca=better + 0.5)["verdict"] == "not supported"
    assert found(better, gauges, pca=better + 0.5)["beats_gauges"]
    assert found(-better, -gauges, lower=True)["verdict"] == "supported"
    assert found(better, gauges[:18])["verdict"] == "inconclusive"
    assert found(better[:19], gauges[:, :19])["verdict"] == "inconclusive"
    worse = found(gauges.mean(0), gauges)
    assert worse["verdict"] == "not supported" and not worse["beats_gauges"]


def test_the_gauges_of_a_claim_are_their_mean_and_range_and_their_kind():
    gauges = np.arange(19.0)[:, None].repeat(30, 1)
    found = signals(Scores({"native": np.full(30, 18.0)}, gauges, "skewed"), "words")
    assert (found["gauges"].value, found["gauges"].low, found["gauges"].high) == (9, 0, 18)
    assert (found["gauge"], found["n_gauges"], found["p"]) == ("skewed", 19, 0.1)  # ties count against it
    assert "19 skewed gauges" in found["reason"]


def test_p_counts_the_gauges_that_do_as_well_and_one_that_is_not_a_number_is_not_beaten():
    def found(*means):
        gauges = np.array(means)[:, None].repeat(30, 1)
        return signals(Scores({"native": np.ones(30)}, gauges), "words")

    few_as_good = [2.0] * 4 + [0.0] * 95
    assert found(*few_as_good)["p"] == pytest.approx(0.05) and found(*few_as_good)["beats_gauges"]
    assert "beats 95 of 99 rotations" in found(*few_as_good)["reason"]
    assert not found(2.0, *few_as_good[:-1])["beats_gauges"]
    assert not found(*[0.0] * 18, np.nan)["beats_gauges"]


def test_a_missing_rival_is_not_beaten():
    """PCA is beaten, ICA could not be found: inconclusive, whatever the measures are taken from."""
    native = np.ones(30)
    scores = Scores({"native": native, "pca": native - 1}, np.zeros((19, 30)), missing={"ica": "it failed"})
    found = signals(scores.map(np.negative).map(np.negative), "words")
    assert found["verdict"] == "inconclusive" and found["reason"] == "ica is missing: it failed"
    assert signals(scores, "words", against=["pca"])["verdict"] == "supported"


def test_a_description_has_values_and_ranges_but_no_verdict():
    scores = Scores(
        {"native": np.ones(30), "E": np.zeros(30)}, np.arange(19.0)[:, None].repeat(30, 1), "skewed"
    )
    claim = make_claim("experiment", "key", "so it is", gauge(scores, "words"))
    assert (claim.kind, claim.verdict, claim.measured.value) == ("gauge", "description", 1)
    assert (claim.gauges.low, claim.gauges.high, claim.controls["E"].value) == (0, 18, 0)
    assert claim.p is claim.beats_gauges is claim.gain is claim.weakest is None


def test_a_claim_of_several_measurements_is_the_weakest_of_them():
    """One failure refutes, else one doubt leaves it open, else the smaller relative gain counts."""

    def outcome(gain, n=30, scale=1.0):
        rng = np.random.default_rng(0)
        control = rng.standard_normal(n) * 0.1 * scale
        return effect(Scores({"native": np.full(n, scale * gain), "control": control}), "words")

    strong, weak, lost, few = outcome(9), outcome(0.5, scale=100), outcome(-1), outcome(9, n=10)
    assert strong["verdict"] == weak["verdict"] == "supported"
    for named, decided_by, verdict in (
        ({"a": strong, "b": weak}, "b", "supported"),
        ({"a": lost, "b": few}, "a", "not supported"),
        ({"a": strong, "b": few}, "b", "inconclusive"),
    ):
        claim = make_claim("experiment", "key", "so it is", weaker(named))
        assert (claim.decided_by, claim.verdict) == (decided_by, verdict)
        assert claim.measured == named[decided_by]["measured"]
        assert {name: part.verdict for name, part in claim.outcomes.items()} == {
            name: part["verdict"] for name, part in named.items()
        }
        assert all(f"{name}: {part['verdict']}" in claim.reason for name, part in named.items())


def test_the_evidence_of_one_signal_is_that_of_one():
    """30 prompts gain, 28 of them by one signal; the other signals lose. Prompts alone would support it."""
    which = np.array([0] * 28 + [1, 2])
    native = np.where(which == 0, 1.0, -3.0)
    scores = Scores({"native": native, "control": np.zeros(30)})
    assert effect(scores, "prompts")["verdict"] == "supported"
    found = effect(scores, "prompts", clusters=("signals", which))
    assert found["verdict"] == "not supported" and found["rests_on"] == {"signals": 3}
    assert "rests on 3 distinct signals" in found["reason"] and found["n"] == 30


def test_a_mean_is_below_a_limit_if_its_whole_interval_is():
    def verdict(*values):
        return below(np.array(values), 0.0, "seeds")["verdict"]

    assert verdict(-1.0, -1.1, -0.9) == "supported"
    assert verdict(-1.0, 1.1, -0.9) == "not supported"
    assert verdict(-1.0, -1.1) == "inconclusive"


def test_a_claim_has_its_sentence_and_the_fields_of_its_rule():
    fields = effect(Scores({"native": np.ones(30), "chance": np.zeros(30)}), "words")
    claim = make_claim("experiment", "key", "it is so", fields, published="0.5")
    assert (claim.key, claim.claim, claim.published) == ("key", "it is so", "0.5")
    assert (claim.kind, claim.verdict, claim.unit, claim.n) == ("effect", "supported", "words", 30)
