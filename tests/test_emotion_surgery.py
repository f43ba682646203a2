"""emotion_surgery: slopes by hand, a planted sentiment that steers, verdicts that fail."""

import numpy as np
import pytest
import torch

import hooks
from experiments import emotion_surgery
from experiments.lab import Scores, Subject, claims, continuations, sentiment
from experiments.lab.results import read_result
from tests.lab_fixtures import ids, loud, tiny
from tests.sentiment_fixtures import planted_labs, verdicts


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    return planted_labs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def reports(labs):
    """The reports on the three runs, with continuations of one token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuations, "NEW_TOKENS", 1)
        return {name: emotion_surgery.run(lab) for name, lab in labs.items()}


def test_slopes_by_hand():
    strengths = (-2.0, -1.0, 1.0, 2.0)
    y = np.array([3 * s + 7 for s in strengths])
    assert emotion_surgery.slope(y[:, None], strengths) == pytest.approx(3)


def test_a_summary_has_the_slopes_of_pairs_and_of_prompts():
    """Logits of the positive words rise by 2 for one strength; those of the negative ones stay."""
    strengths = np.array(emotion_surgery.STRENGTHS)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1, 3, 2, 5)).repeat(len(strengths), axis=0)  # (strengths, P, 2, n)
    logits[:, :, 0] += 2 * strengths[:, None, None]
    found = emotion_surgery.summarize(logits)
    assert found["slope"] == pytest.approx(np.full(5, 2))
    assert found["slope of a prompt"] == pytest.approx(np.full(3, 2))
    assert np.diff(found["tilt"][0])[[0, 2]] == pytest.approx([2, 2])
    both = emotion_surgery.mean([found, {metric: 3 * values for metric, values in found.items()}])
    assert both["slope"] == pytest.approx(np.full(5, 4))


def test_a_dose_of_every_row_is_a_dose_of_the_model():
    """Prompts of two lengths under four strengths at once equal one prompt and one strength at a time."""
    subject = Subject("reflow", loud(tiny(1)))
    prompts = [[1, 2, 3, 4], [5, 6]]
    v = torch.randn(16, generator=torch.Generator().manual_seed(0))
    words = ids(2, 3)
    found = emotion_surgery.dose_response(subject, prompts, v, [0, 1], words)
    for i, strength in enumerate(emotion_surgery.STRENGTHS):
        for j, prompt in enumerate(prompts):
            with hooks.steer(subject.net, v, strength, [0, 1]), torch.no_grad():
                logits = subject.net(torch.tensor([prompt]))[0][0, -1]
            np.testing.assert_allclose(found[i, j], logits[words].numpy(), atol=1e-4)


def test_judgement_by_hand():
    """A strength of 1 triples the odds at either sign and costs a loss of log 2; one of 2 ruins the text."""
    tilts = {0.0: np.zeros(2), 1.0: np.full(2, np.log(3)), -1.0: np.full(2, -np.log(3))}
    tilts |= {2.0: np.full(2, -1.0), -2.0: np.full(2, 1.0)}
    losses = {0.0: 5.0, 1.0: 5.0 + np.log(2), -1.0: 5.0 + np.log(2), 2.0: 30.0, -2.0: 30.0}
    scores = emotion_surgery.judge(tilts, losses)
    assert scores[1.0] == pytest.approx({"concept": 0.5, "fluency": 0.5, "harmonic": 0.5})
    assert scores[2.0]["concept"] < 0 and scores[2.0]["harmonic"] == 0
    assert emotion_surgery.harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert emotion_surgery.harmonic_mean(-0.1, 1.0) == 0


def test_kl_on_neutral_text_grows_with_the_strength():
    net = loud(tiny(1))
    kl = emotion_surgery.neutral_kl(net, ids(3, 6), torch.ones(16), [0], (0.0, 0.5, 2.0))
    assert kl[0.0] == 0 and 0 < kl[0.5] < kl[2.0]


def test_a_planted_sentiment_signal_steers(reports):
    report = reports["planted"]
    assert verdicts(report)["steers"] == "supported"
    assert report.numbers["slope"]["native"] > 0.5
    assert report["few_signals"].beats_gauges and report["few_signals"].lower
    assert report.numbers["anti_steerable_share"]["native"] == 0
    assert report["beats_diffmean"].controls.keys() == {"diffmean", "baseline"}
    report.save()
    result = read_result(report.folder / "result.json")
    assert [figure.file for figure in result.figures] == ["surgery.png"]
    assert (report.folder / "surgery.png").exists() and result.gallery


def test_rows_have_the_tilt_by_dictionary_and_strength(reports):
    """What the paper's figure reads: one value for each dictionary and strength."""
    rows = [row for row in reports["planted"].rows if row["metric"] == "tilt, nats"]
    for name in ("native", "diffmean", "baseline", "step 0"):
        strengths = [row["strength"] for row in rows if row["dictionary"] == name]
        assert strengths == list(emotion_surgery.STRENGTHS)


def test_rotated_signals_steer_no_better_than_rotations(reports):
    """The very same function: only the claim about signals may change."""
    report = reports["turned"]
    assert verdicts(report)["steers"] == "supported"
    assert verdicts(report)["few_signals"] == "not supported"
    same = reports["planted"].numbers["slope"]["native"]
    assert report.numbers["slope"]["native"] == pytest.approx(same, rel=1e-3)
    assert report["beats_diffmean"].controls.keys() == {"diffmean"}  # there is no baseline beside this run


def test_an_untrained_model_has_no_sentiment(reports, labs):
    assert verdicts(reports["untrained"])["steers"] == "not supported"
    build, words = (sentiment.word_pairs(labs["untrained"], part) for part in ("build", "held_out"))
    prompts = sentiment.templates(labs["untrained"], "test")[:4]
    false = 0
    for seed in range(20):
        subject = Subject("seed", tiny(seed, n_layer=1))
        noise = torch.randn(16, generator=torch.Generator().manual_seed(seed))
        found = Scores()
        for name, v in (("native", sentiment.direction(subject.dictionary, build)), ("random", noise)):
            response = emotion_surgery.dose_response(subject, prompts, v, [0], words)
            found[name] = emotion_surgery.summarize(response)["slope"]
        false += claims.effect(found, "word pairs")["verdict"] == "supported"
    assert false <= 3  # of 20, each with a chance of 2.5 %
