"""Draw the paper's figures from paper/results."""

import functools
import hashlib
import textwrap
from contextlib import contextmanager

import numpy as np

from experiments.lab import plots
from experiments.lab.plots import COLOURS
from paper import reading
from paper.reading import PAPER, SUBJECT, claims, load, of_kind, result, rows

FIGURES = PAPER / "figures"
PRINT = {"font.size": 7.5, "axes.labelsize": 7.5}  # sizes in print
MARKS = {"native": "D", "pca": "o", "ica": "o", "E": "s", "baseline": "s"}  # of draw_rivals


def fingerprint():
    """SHA-256 of all results. Every figure holds it, so that a figure older than its results is found."""
    digest = hashlib.sha256()
    for path in sorted(reading.RESULTS.rglob("*.*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def figure(name, rows=1, columns=1, size=(7, 2.6)):
    """Yield axes to draw on; they become figures/<name>.svg."""
    with plots.figure(rows, columns, size, style=PRINT) as (fig, axes):
        yield axes
        FIGURES.mkdir(exist_ok=True)
        (FIGURES / f"{name}.svg").write_text(plots.to_svg(fig, source=fingerprint()), encoding="utf-8")


def squeezed(x):
    """x; beyond 3 on either side of zero the scale is logarithmic."""
    return x if abs(x) <= 3 else np.sign(x) * (3 + np.log10(abs(x) / 3))


def draw_rivals(run):
    """Every signals claim on one scale: native, PCA, ICA and other rivals against the range of rotations."""
    shown = of_kind("signals", claims(run).values())
    with figure("rivals", size=(7, 0.36 * len(shown) + 0.9)) as ax:
        for i, claim in enumerate(shown):
            draw_claim(ax, len(shown) - i, claim)
        labels = [textwrap.fill(claim.claim, 64) for claim in shown]
        ax.set_yticks(range(len(shown), 0, -1), labels, fontsize=7)
        ax.set_xlabel("worse  ←  half ranges of the rotations (logarithmic beyond 3)  →  better")
        ax.axvline(1, color="#999999", lw=0.8, ls=":")
        named = {"native"}.union(*(claim.controls for claim in shown))
        marks = {name: mark for name, mark in MARKS.items() if name in named}
        handles = [ax.scatter([], [], 30, COLOURS[n], marker=m, label=n) for n, m in marks.items()]
        handles += ax.plot([], [], color=COLOURS["gauges"], lw=7, alpha=0.45, label="random rotations")
        ax.legend(handles=handles, ncols=6, loc="lower center", bbox_to_anchor=(0.2, 1), fontsize=7)


def draw_claim(ax, y, claim):
    """A signals claim at height y: its rotations span -1 to 1; better is to the right."""
    band = {"lw": 7, "alpha": 0.45, "solid_capstyle": "butt", "zorder": 1}
    ax.plot([-1, 1], [y, y], color=COLOURS["gauges"], **band)
    middle = (claim.gauges.low + claim.gauges.high) / 2
    half = (claim.gauges.high - claim.gauges.low) / 2
    sign = -1 if claim.lower else 1
    for name, estimate in ({"native": claim.measured} | claim.controls).items():
        if name not in MARKS or estimate.value is None or not half:
            continue
        x = squeezed(sign * (estimate.value - middle) / half)
        size, zorder = (46, 3) if name == "native" else (26, 2)
        ax.scatter(x, y, size, COLOURS[name], marker=MARKS[name], zorder=zorder)


def draw_sparsity(run):
    """Left: loss added when each recipe keeps only its k largest signals. Right: share of active signals."""
    numbers = result(run, "sparsity_profile").numbers
    dictionaries = ("native", "rotated", "pca", "ica")
    with figure("sparsity", columns=2) as (left, right):
        for name in dictionaries:
            added = numbers["loss_added"][name]
            kept = [int(k) for k in added]
            left.plot(kept, list(added.values()), "o-", ms=3, color=COLOURS[name], label=name)
        left.set(xlabel="signals kept of each recipe", ylabel="loss added, nats per token", xscale="log")
        left.set_xticks(kept, [str(k) for k in kept])
        left.minorticks_off()
        left.legend()
        for name in (*dictionaries, "gaussian"):
            active = numbers["active"][name]
            x = [float(threshold) for threshold in active]
            y = [100 * share or np.nan for share in active.values()]  # the scale has no place for zero
            if name == "gaussian":
                right.plot(x, y, "k--", lw=1, label="Gaussian")
            else:
                right.plot(x, y, "o-", ms=3, color=COLOURS[name])
        right.set(xlabel="threshold, root mean squares of the recipe", ylabel="signals above it, %")
        right.set(yscale="log", ylim=(0.01, 150))
        right.legend()


def draw_layers(run):
    """The logit lens, recovery by patching, and the effect of injections, layer by layer."""

    plot = functools.partial(draw_rows, run=run)
    with figure("layers", columns=3, size=(7, 2.5)) as (lens, patch, inject):
        for model in ("reflow", "baseline", "step 0"):
            plot(lens, experiment="signal_lens", label=model, model=model, metric="KL(final || lens)")
            recovery = {"model": model, "metric": "recovery, last token"}
            plot(patch, experiment="crystallization", control="short", **recovery)
            plot(patch, experiment="crystallization", dash="o:", control="long", **recovery)
            change = {"model": model, "metric": "change of logit difference", "pos": "all"}
            plot(inject, experiment="crystallization", dictionary="", strength=1.0, **change)
        lens.set(xlabel="layer", ylabel="KL(final || logit lens), nats", yscale="symlog")
        lens.legend(fontsize=7)
        patch.set(xlabel="layer", ylabel="recovery at the last token")
        patch.axhline(0.5, color="#999999", lw=0.8, ls=":")
        inject.set(xlabel="layer of the injection", ylabel="change of logit difference, nats")


def draw_interventions(run):
    """Left: tilt of a sentiment direction by strength. Right: share of pairs that an injection has forced."""
    with figure("interventions", columns=2, size=(7, 2.5)) as (dose, force):
        draw_tilt(dose, run)
        draw_forced(force, run)


def draw_tilt(ax, run):
    """Tilt by the strength of the direction; without a direction the tilt is 0."""
    labels = {"native": "reflow", "diffmean": "diffmean", "baseline": "baseline", "step 0": "step 0"}
    colours = COLOURS | {"diffmean": COLOURS["ica"]}
    for dictionary, label in labels.items():
        found = rows(run, "emotion_surgery", dictionary=dictionary, metric="tilt, nats")
        if not found:  # no plain model stood beside the run
            continue
        points = sorted([(row["strength"], row["value"]) for row in found] + [(0, 0)])
        x, y = zip(*points, strict=True)
        ax.plot(x, y, "o-", ms=3, color=colours[dictionary], label=label)
    ax.set(xlabel="strength, residual norms", ylabel="tilt, nats")
    ax.legend(fontsize=7)


def draw_forced(ax, run):
    """Share of pairs whose token is forced, by dose, entering the middle layer."""
    layer = result(run, "concept_inception").numbers["layer"]
    for model in ("reflow", "baseline", "step 0"):
        found = rows(run, "concept_inception", model=model, layer=layer, metric="alpha*")
        if not found:  # no plain model stood beside the run
            continue
        alpha = np.sort([row["value"] for row in found])  # infinite where no dose forces the token
        forced = alpha[np.isfinite(alpha)]
        x = np.append(forced, 64)  # the largest dose
        share = np.append(np.arange(1, len(forced) + 1), len(forced)) / len(alpha)
        ax.step(x, share, where="post", color=COLOURS[model], label=model)
    ax.set(xlabel="dose, residual norms", ylabel="share of pairs forced", xscale="log", ylim=(0, 1.02))
    ax.legend(fontsize=7)


def draw_trained(run):
    """A trained model: injections and patching by layer, tilt by dose, the signals of one prediction."""
    with figure("trained", 2, 2, size=(7, 4.8)) as axes:
        (inject, patch), (dose, waterfall) = axes.reshape(2, 2)
        for model in ("reflow", "step 0"):
            for where, dash in (("all", "o-"), ("last", "o:")):
                change = {"model": model, "metric": "change of logit difference", "dictionary": ""}
                draw_rows(inject, run, "crystallization", dash, f"{model}, {where}", pos=where, **change)
            for length, dash in (("short", "o-"), ("long", "o:")):
                recovery = {"model": model, "metric": "recovery, last token", "control": length}
                draw_rows(patch, run, "crystallization", dash, f"{model}, {length}", **recovery)
        inject.set(xlabel="layer of the injection", ylabel="change of logit difference, nats")
        patch.set(xlabel="layer patched at the last token", ylabel="recovery")
        patch.axhline(0.5, color="#999999", lw=0.8, ls=":")
        for ax in (inject, patch):
            ax.legend(fontsize=6.5)
        draw_tilt(dose, run)
        parts = rows(run, "ablate_signal", metric="contribution")
        values = np.array([row["value"] for row in sorted(parts, key=lambda row: int(row["signal"]))])
        plots.plot_waterfall(waterfall, values, "contribution, nats; sums exactly", top=8)
        waterfall.set_title(parts[0]["prompt"], fontsize=6.5)


def draw_rows(ax, run, experiment, dash="o-", label=None, **where):
    """The values of some rows of a run by layer; nothing where there are none."""
    if found := rows(run, experiment, **where):
        x = [row["layer"] for row in found]
        y = [row["value"] for row in found]
        ax.plot(x, y, dash, ms=3, color=COLOURS[where["model"]], label=label)


def draw_curves():
    """Left: losses of the main runs. Right: the gap over the dense model in the small runs of the study."""
    with figure("curves", columns=2) as (left, right):
        draw_losses(left)
        draw_gaps(right)


def draw_losses(ax):
    """Validation losses of the main runs by tokens."""
    runs = load("runs")
    for kind, name in SUBJECT["runs"].items():
        if name in runs:
            run = runs[name]
            tokens = run["tokens"] / run["step"]
            x = [step * tokens / 1e6 for step, _ in run["curve"] if step]
            y = [loss for step, loss in run["curve"] if step]
            ax.plot(x, y, color=COLOURS[kind], label=kind)
    ax.set(xlabel="million tokens", ylabel="validation loss, nats per token")
    ax.legend()


def draw_gaps(ax):
    """Loss above the dense model at equal depth, by size, with the 95 % t interval over seeds."""
    numbers = result("studies", "convergence").numbers
    sizes = sorted({shape.split()[1] for shape in numbers}, key=lambda size: int(size.split("x")[1]))
    for shift, kind in ((-0.08, "factored"), (0.08, "topk")):
        for i, size in enumerate(sizes):
            gap = numbers[f"{kind} {size}"]["equal_depth"]
            bars = None  # fewer than three seeds
            if gap["low"] is not None:
                bars = [[100 * (gap["value"] - gap["low"])], [100 * (gap["high"] - gap["value"])]]
            label = kind if i == 0 else None
            ax.errorbar(i + shift, 100 * gap["value"], bars, fmt="o", color=COLOURS[kind], label=label)
    ax.axhline(0, color="#999999", lw=0.8)
    ax.set_xticks(range(len(sizes)), sizes)
    ax.set(xlabel="layers x width", ylabel="loss above the dense model, %")
    ax.legend()


def draw_seeds():
    """How well signals of two seeds match, beside rotated ones, for every kind and shape with two seeds."""
    shapes = result("studies", "stability").numbers["shapes"]
    kinds = list(dict.fromkeys(shape.split()[0] for shape in shapes))
    sizes = list(dict.fromkeys(shape.split()[1] for shape in shapes))
    titles = {"raw": "frequency left in", "freed": "beyond frequency"}
    with figure("seeds", columns=2, size=(3.5, 2.1)) as axes:
        for ax, (part, title) in zip(axes, titles.items(), strict=True):
            for shape, values in shapes.items():
                kind, size = shape.split()
                x = sizes.index(size) + 0.25 * (kinds.index(kind) - 1)
                rotated = values[part]["rotated"]
                ax.plot([x - 0.1, x + 0.1], [np.mean(rotated)] * 2, color=COLOURS["rotated"], lw=2)
                ax.plot([x, x], [min(rotated), max(rotated)], color=COLOURS["rotated"], lw=2)
                label = kind if size == sizes[0] else None
                style = {"marker": "D", "zorder": 3, "label": label}
                ax.scatter(x, values[part]["native"], 12, COLOURS[kind], **style)
            ax.set_xticks(range(len(sizes)), sizes, fontsize=6.5)
            ax.set(title=title, ylim=(0, 1.08 * ax.get_ylim()[1]))
        axes[0].set(ylabel="mean |correlation|")
        axes[1].legend(fontsize=6.5, loc="lower left")


def draw():
    """Draw all figures of the paper."""
    run = SUBJECT["runs"]["factored"]
    draw_rivals(run)
    draw_sparsity(run)
    draw_layers(run)
    draw_interventions(run)
    draw_curves()
    draw_seeds()
    draw_trained(next(iter(reading.gauges().values())))
