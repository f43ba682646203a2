"""What figures show is what they were given; drawing changes nobody's settings."""

import matplotlib
import numpy as np
import pytest

from experiments.lab import Scores, plots


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    before = dict(matplotlib.rcParams)
    with plots.figure(1, 2, style={"font.size": 30}) as (fig, (left, _)):
        left.plot([0, 1])
        plots.set_title(fig, "a title that says what was found " * 5)
        png = plots.to_png(fig)
        assert matplotlib.rcParams["font.size"] == 30
    assert dict(matplotlib.rcParams) == before
    assert png.startswith(b"\x89PNG")
    assert "\n" in fig.get_suptitle()


def test_the_same_figure_gives_the_same_svg_with_its_source():
    def drawn():
        with plots.figure() as (fig, ax):
            ax.plot([0, 1])
            return plots.to_svg(fig, "where it is from")

    assert drawn() == drawn() and "where it is from" in drawn()


def test_scores_have_a_row_each_and_the_gauges_one_row_after_native():
    rng = np.random.default_rng(0)
    scores = Scores({"native": rng.random(30), "pca": rng.random(40)}, rng.random((19, 30)))
    with plots.figure() as (_, ax):
        plots.plot_scores(ax, scores, xlabel="nats")
        labels = [label.get_text() for label in ax.get_yticklabels()]
        ticks = next(line for line in ax.lines if line.get_marker() == "|" and len(line.get_xdata()) == 19)
    assert labels == ["native", "19 rotations", "pca"] and ax.get_xlabel() == "nats"
    assert ticks.get_xdata() == pytest.approx(scores.gauges.mean(1))
    assert set(ticks.get_ydata()) == {1}


def test_a_waterfall_ends_at_the_sum():
    contributions = np.random.default_rng(0).normal(size=40)
    with plots.figure() as (_, ax):
        plots.plot_waterfall(ax, contributions, "nats", top=5)
    bars = ax.patches
    assert len(bars) == 7  # five signals, all others, the sum
    assert bars[0].get_width() == contributions[np.abs(contributions).argmax()]
    assert bars[5].get_x() + bars[5].get_width() == pytest.approx(contributions.sum())
    assert (bars[6].get_x(), bars[6].get_width()) == (0, pytest.approx(contributions.sum()))


def test_curves_are_the_means_of_every_entry_over_the_range_of_the_gauges():
    rng = np.random.default_rng(0)
    scores = Scores({"native": rng.random((30, 4)), "ica": rng.random((20, 4))}, rng.random((19, 30, 4)))
    with plots.figure() as (_, ax):
        plots.plot_curves(ax, range(4), scores)
    for line, values in zip(ax.lines, scores.values(), strict=True):
        assert line.get_ydata() == pytest.approx(values.mean(0))
    means = scores.gauges.mean(1)
    ends = ax.collections[0].get_paths()[0].get_extents()
    assert (ends.ymin, ends.ymax) == (pytest.approx(means.min()), pytest.approx(means.max()))


def test_a_heat_map_is_white_at_zero():
    values = np.array([[1.0, -3.0], [0.0, 2.0]])
    with plots.figure() as (_, ax):
        image = plots.plot_heat_map(ax, values, "ab", "cd", label="z")
    assert image.get_clim() == (-3, 3)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["c", "d"]


def test_texts_of_users_are_shown_as_typed():
    """$ begins no mathematics and a character without a glyph is readable; numbers of the axes stay."""
    import warnings

    typed = ["Costs: $5 % of $", "$5 to $10", r"a\$b_{2}"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with plots.figure(1, 2) as (fig, (left, right)):
            plots.plot_heat_map(left, np.eye(3), typed, typed, "label of $5 and $6")
            left.set(xlabel='logit("\u4e2d") - logit("$")')
            left.plot([0], [0], label="$x$")
            left.legend()
            right.plot([1, 1e4], [1, 1e4])
            right.set(xscale="log", yscale="log")
            plots.set_title(fig, "$5 to $10 \u4e2d\u6587")
            plots.to_png(fig)
            plots.to_png(fig)  # again: the same
    assert fig._suptitle.get_text() == "$5 to $10 U+4E2DU+6587" and not fig._suptitle.get_parse_math()
    assert left.get_xlabel() == 'logit("U+4E2D") - logit("$")'
    labels = left.get_xticklabels()
    assert [label.get_text() for label in labels] == typed
    assert not any(label.get_parse_math() for label in labels)
    assert all(label.get_parse_math() for label in right.get_xticklabels())
