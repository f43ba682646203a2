"""The paper's figures are drawn from paper/results, always in the same way."""

import re

import matplotlib
import pytest

from configurator import UserError
from paper import draw
from tests.paper_fixtures import PAPER, RUN, copy_results

TEXT = (PAPER / "paper.typ").read_text(encoding="utf-8")


def test_every_figure_of_the_paper_is_drawn_by_the_script(tmp_path, monkeypatch):
    """Every committed figure was drawn from these very results; drawing changes no setting of matplotlib."""
    monkeypatch.setattr(draw, "FIGURES", tmp_path)
    settings = dict(matplotlib.rcParams)
    draw.draw()
    assert dict(matplotlib.rcParams) == settings
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (PAPER / "figures").iterdir()}
    images = re.findall(r'image\("([^"]+)"', TEXT)
    assert drawn == {image.removeprefix("figures/") for image in images if image.startswith("figures/")}
    assert all((PAPER / image).exists() for image in images)
    for name in drawn:
        for folder in (tmp_path, PAPER / "figures"):
            text = (folder / name).read_text(encoding="utf-8")
            assert draw.fingerprint() in text, f"{name} is out of date: run python paper/build.py"


def test_the_same_results_give_the_same_figure(tmp_path, monkeypatch):
    files = []
    for folder in ("a", "b"):
        monkeypatch.setattr(draw, "FIGURES", tmp_path / folder)
        draw.draw_curves()
        files.append((tmp_path / folder / "curves.svg").read_bytes())
    assert files[0] == files[1]


def test_a_missing_result_stops_the_figures(tmp_path, monkeypatch):
    results = copy_results(tmp_path, monkeypatch)
    (results / RUN / "sparsity_profile.json").unlink()
    with pytest.raises(UserError, match="no paper/results/.*profile.json: python paper/collect"):
        draw.draw_sparsity(RUN)
