"""Analogies: a planted parallelogram is found, nearness of pairs alone is none, nothing is found in noise."""

import pytest

from experiments import semantic_algebra
from experiments.lab.report import measure
from tests.spaces_fixtures import files_are_there, open_planted, verdicts


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    return open_planted(tmp_path_factory.mktemp("algebra"))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(semantic_algebra, "QUESTIONS", 200)


def test_a_parallelogram_that_every_gauge_shows_is_an_effect_only(labs):
    report = semantic_algebra.run(labs("parallelogram"))
    assert verdicts(report) == {"analogies": "supported", "best_space": "description"}
    ranks = report.numbers["analogies"]
    assert ranks["native"] > 2 * ranks["b + c"]
    assert ranks["query words kept"] <= ranks["native"]
    untaught = {"step 0", "noise", "shuffled"}
    assert report["analogies"].controls.keys() == {*semantic_algebra.CONTROLS, *untaught}
    assert report.numbers["candidates"] > 500
    assert report.numbers["accuracy@1"]["native"] <= report.numbers["accuracy@5"]["native"]


def test_nearness_of_pairs_alone_is_no_algebra(labs):
    """Clusters put b near a and d near c, but no difference is shared."""
    report = semantic_algebra.run(labs("straight"))
    assert report["analogies"].verdict == "not supported"


def test_the_gallery_has_the_published_examples_and_the_answers_rank(labs):
    gallery = semantic_algebra.run(labs("parallelogram")).gallery
    assert "king - man + woman = queen" in gallery
    assert gallery.count(" = ") == len(semantic_algebra.EXAMPLES) + semantic_algebra.N_DRAWN
    assert "native   rank " in gallery


@pytest.mark.parametrize("name", ["untrained", "dense"])
def test_no_verdict_is_positive_where_there_is_nothing_to_find(labs, name):
    """An untrained model, and a plain GPT, whose recipes are coordinates of E."""
    report = semantic_algebra.run(labs(name))
    assert verdicts(report) == {"analogies": "not supported", "best_space": "description"}
    assert files_are_there(report)


def test_a_model_that_knows_no_words_of_the_questions_gives_no_verdict(labs, monkeypatch):
    monkeypatch.setattr(semantic_algebra, "relations", lambda lab: {"r": []})
    report = measure(semantic_algebra.run, labs("untrained"))
    assert set(verdicts(report).values()) == {"inconclusive"}
    assert not report.figures
