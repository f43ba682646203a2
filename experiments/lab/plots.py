"""
What figures share: one style, one colour a meaning, curves with intervals, scores beside their rivals.

Figures are drawn without pyplot, so that nobody's plotting backend or style changes.
"""

import functools
import io
import textwrap
from contextlib import contextmanager

import numpy as np

from experiments.lab.claims import PLURAL
from experiments.lab.stats import estimate

# Okabe and Ito's colours, told apart by colour-blind readers; one meaning each in all figures.
COLOURS = {
    "native": "#0072B2",
    "reflow": "#0072B2",
    "rotated": "#999999",
    "gauges": "#999999",
    "random": "#999999",
    "pca": "#E69F00",
    "ica": "#D55E00",
    "baseline": "#009E73",
    "baseline ica": "#7FCEB9",  # the same, lighter: of the same model
    "step 0": "#CC79A7",
    "noise": "#999999",
    "shuffled text": "#F0E442",
    "frequencies": "#F0E442",
    "shuffled": "#56B4E9",
    "shuffled labels": "#56B4E9",
    "diffmean": "#F0E442",
    "other": "#F0E442",
    "E": "#000000",
    "factored": "#0072B2",
    "dense": "#009E73",
    "topk": "#D55E00",
}


STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.dpi": 150,
}


@contextmanager
def figure(rows=1, columns=1, size=(9, 3.6), style=None, **grid):
    """Yield (figure, axes) in the style of all figures; what is drawn must be drawn inside the context.

    `style`: rcParams that replace those of STYLE.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | (style or {})):
        fig = Figure(figsize=size, layout="constrained")
        yield fig, fig.subplots(rows, columns, **grid)


def set_title(fig, title):
    """Write a title over a figure, broken into lines that fit."""
    width = int(fig.get_figwidth() * 13)
    fig.suptitle("\n".join(textwrap.wrap(readable(title), width)), x=0.01, ha="left", fontsize=10)


@functools.cache
def glyphs():
    """The characters of the font of all figures, a set of code points."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return {ord("\n"), *get_font(findfont(FontProperties())).get_charmap()}


def readable(text):
    """A text in which characters without a glyph are given as U+4E2D."""
    return "".join(c if ord(c) in glyphs() else f"U+{ord(c):04X}" for c in text)


def readable_label(func, x, position):
    """The label of a tick that func gives, readable."""
    return readable(str(func(x, position)))


def show_as_typed(fig):
    """Texts may be those of users, so no $ begins mathematics. Numbers that matplotlib writes stay."""
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter

    numbers = set()
    for axis in (axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)):
        labels = {*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)}  # makes them first
        if isinstance(formatter := axis.get_major_formatter(), FuncFormatter):  # labels that were given
            formatter.func = functools.partial(readable_label, formatter.func)
        else:
            numbers |= labels
    for text in set(fig.findobj(Text)) - numbers:
        text.set_parse_math(False)
        text.set_text(readable(text.get_text()))


def to_png(fig):
    """A figure as the bytes of a PNG file."""
    show_as_typed(fig)
    fig.get_layout_engine().execute(fig)
    fig.set_layout_engine("none")  # else savefig draws everything twice, once for the layout alone
    picture = io.BytesIO()
    fig.savefig(picture, format="png")
    return picture.getvalue()


def to_svg(fig, source):
    """A figure as the text of an SVG file that names its source. The same figure gives the same text."""
    import matplotlib

    show_as_typed(fig)
    picture = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "reflow"}):  # otherwise ids are random
        fig.savefig(picture, format="svg", metadata={"Date": None, "Source": source})
    return picture.getvalue()


def plot_band(ax, x, values, name, dash="o-", label=None):
    """Draw the mean of values (n, len(x)) over x with its 95 % interval."""
    band = [estimate(column, resamples=500) for column in np.asarray(values).T]
    ax.plot(x, [e.value for e in band], dash, ms=3, color=COLOURS[name], label=label)
    ax.fill_between(x, [e.low for e in band], [e.high for e in band], color=COLOURS[name], alpha=0.15, lw=0)


def plot_curves(ax, x, scores):
    """Draw the means of Scores of values (n, len(x)) over x; the range of the gauges' means in grey."""
    if scores.gauges is not None:
        means = scores.gauges.mean(1)  # (K, len(x))
        label = f"{len(means)} {PLURAL[scores.gauge]}, range"
        ax.fill_between(x, means.min(0), means.max(0), color=COLOURS["gauges"], alpha=0.5, lw=0, label=label)
    for name, values in scores.items():
        ax.plot(x, values.mean(0), "o-", ms=3, color=COLOURS[name], label=name)


def plot_dot(ax, y, values, name, groups=None, marker="o", filled=True):
    """Draw the mean of values (n,) at height y with its 95 % interval."""
    e = estimate(values, groups)
    colour = COLOURS.get(name, "k")
    face = colour if filled else "white"
    ax.errorbar(e.value, y, xerr=e.error, fmt=marker, color=colour, mfc=face, ms=5, capsize=2)


def plot_scores(ax, scores, groups=None, xlabel=""):
    """One row for each entry of Scores: a dot with its 95 % interval; the gauges as grey ticks in one row."""
    names = list(scores)
    if scores.gauges is not None:
        names.insert(1, "gauges")
    for y, name in enumerate(names):
        if name == "gauges":
            means = scores.gauges.mean(1)
            ax.plot(means, [y] * len(means), "|", color=COLOURS["gauges"], ms=10)
        else:
            plot_dot(ax, y, scores[name], name, groups)
    labels = [f"{len(scores.gauges)} {PLURAL[scores.gauge]}" if name == "gauges" else name for name in names]
    ax.set_yticks(range(len(names)), labels)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set(xlabel=xlabel)


def plot_heat_map(ax, values, xlabels, ylabels, label, limit=None, fontsize=7):
    """Draw values (rows, columns) in red and blue about zero, with a colour bar if it has a `label`."""
    limit = np.abs(values).max() if limit is None else limit
    image = ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    ax.set_xticks(range(len(xlabels)), xlabels, fontsize=fontsize, rotation=90)
    ax.set_yticks(range(len(ylabels)), ylabels, fontsize=fontsize)
    ax.grid(False)
    if label:
        ax.figure.colorbar(image, ax=ax, label=label, shrink=0.8)
    return image


def plot_waterfall(ax, contributions, xlabel, top=12):
    """Bars of the `top` largest contributions (S,), of all others together, and of their sum."""
    largest = np.argsort(-np.abs(contributions))[:top]
    total = contributions.sum()
    values = [*contributions[largest], total - contributions[largest].sum(), total]
    labels = [f"signal {s}" for s in largest]
    labels += [f"{len(contributions) - len(largest)} others", "logit difference"]
    starts = [0, *np.cumsum(values[:-2]), 0]
    colours = [COLOURS["native"] if value > 0 else COLOURS["ica"] for value in values[:-1]]
    ax.barh(labels, values, left=starts, color=[*colours, "k"])
    ax.invert_yaxis()
    ax.axvline(0, color="k", lw=0.5)
    ax.set(xlabel=xlabel)
