"""experiments/template.py: the measure by hand, and that it runs."""

import pytest
import torch

from dictionary import Dictionary
from experiments import run_all, template
from tests.lab_fixtures import corpus, open_lab, save_run, tiny


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """An untrained run: its opposites share nothing."""
    data = corpus(tmp_path_factory.mktemp("data"))
    return open_lab(save_run(tmp_path_factory.mktemp("out") / "tiny", tiny(), data))


def test_the_overlap_equals_the_long_way():
    codes = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    found = template.overlap(Dictionary("native", codes, torch.eye(20)))
    centred = codes - codes.mean(0)
    tops = [set(row.abs().argsort()[-8:].tolist()) for row in centred]
    words, opposites = tops[:6], tops[6:]
    for i in range(6):
        shares = [len(words[i] & opposite) / 8 for opposite in opposites]
        assert found["own"][i].item() == pytest.approx(shares[i])
        assert found["others"][i].item() == pytest.approx((sum(shares) - shares[i]) / 5)


def test_it_writes_a_result_in_which_an_untrained_model_shows_nothing(lab):
    report = template.run(lab)
    result = report.save()
    assert [(claim.key, claim.kind) for claim in result.claims] == [
        ("shared", "effect"),
        ("privileged", "signals"),
    ]
    assert {claim.verdict for claim in result.claims} == {"not supported"}
    assert sorted(path.name for path in report.folder.iterdir()) == [
        "overlap.png",
        "result.json",
        "rows.csv",
        "units.npz",
    ]


def test_it_is_short_and_none_of_the_twelve():
    assert "template" not in run_all.NAMES
    with open(template.__file__, encoding="utf-8") as file:
        assert len(file.readlines()) <= 61
