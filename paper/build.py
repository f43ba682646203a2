"""
Build paper/paper.pdf from paper/results: draw the figures, set the text, write the README's two blocks.

    make paper
    python paper/build.py

Nothing is typed in: the text reads its numbers from the same files. `python paper/collect.py` refreshes them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import csv
import hashlib
import io
import json
import textwrap
import time

import numpy as np

import bench
import configurator
from checkpoint import write_atomically
from configurator import UserError
from experiments.convergence import COLOURS as KINDS
from experiments.lab import COLOURS, pyplot
from experiments.run_all import NAMES

PAPER = Path(__file__).resolve().parent
RESULTS, FIGURES = PAPER / "results", PAPER / "figures"
README = PAPER.parent / "README.md"
SUBJECT = json.loads((PAPER / "subject.json").read_text(encoding="utf-8"))  # which runs the paper is about


# ----------------------------------------------------------------------------------------------------
# Results


def read(file):
    """The text of a file of paper/results. Raises UserError if it is missing."""
    try:
        return (RESULTS / file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no paper/results/{file}: python paper/collect.py makes it") from None


def load(name):
    """A file of paper/results as JSON. UserError."""
    return json.loads(read(f"{name}.json"))


def claims(run):
    """(experiment, claim) of a run's twelve experiments."""
    return [(name, c) for name in NAMES for c in load(f"{run}/{name}")["claims"]]


def signals(run):
    """The claims about a run's signals."""
    return [c for _, c in claims(run) if c["kind"] == "signals"]


def rows(name, **where):
    """The lines of an experiment's rows as dicts, those that have these values; `value` as a number."""
    table = csv.DictReader(io.StringIO(read(f"{name}.csv")))
    found = [row for row in table if all(row[k] == str(v) for k, v in where.items())]
    return [row | {"value": float(row["value"])} for row in found]


def by_layer(name, **where):
    """(layers, values) of rows that have a layer."""
    found = rows(name, **where)
    return [int(r["layer"]) for r in found], [r["value"] for r in found]


# ----------------------------------------------------------------------------------------------------
# Figures


def fingerprint():
    """SHA-256 of all results; every figure says from which it was drawn."""
    digest = hashlib.sha256()
    for path in sorted(RESULTS.rglob("*.*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def save(fig, name):
    fig.set_layout_engine("constrained")
    FIGURES.mkdir(exist_ok=True)
    # No date and a fixed salt: the same results give the same bytes.
    fig.savefig(FIGURES / f"{name}.svg", format="svg", metadata={"Date": None, "Source": fingerprint()})
    pyplot().close(fig)


def rivals(run):
    """Every claim about signals on one scale: native, PCA, ICA and others against 19 gauges."""
    shown = signals(run)
    fig, ax = pyplot().subplots(figsize=(7, 0.32 * len(shown) + 0.9))
    marks = {"native": "D", "pca": "o", "ica": "o", "E": "s", "baseline": "s"}
    for i, claim in enumerate(shown):
        y, sign = len(shown) - i, -1 if claim["lower"] else 1
        spread = next(v for k, v in claim["controls"].items() if k.endswith("(range)"))
        middle, half = (spread["low"] + spread["high"]) / 2, (spread["high"] - spread["low"]) / 2
        ax.plot([-1, 1], [y, y], color=COLOURS["rotated"], lw=7, alpha=0.45, solid_capstyle="butt", zorder=1)
        points = {"native": claim["measured"]} | claim["controls"]
        for name, value in points.items():
            if name in marks and value["value"] is not None and half:
                x = sign * (value["value"] - middle) / half
                x = np.sign(x) * (abs(x) if abs(x) <= 3 else 3 + np.log10(abs(x) / 3))  # far ones move in
                big = name == "native"
                ax.scatter(x, y, 46 if big else 26, COLOURS[name], marker=marks[name], zorder=3 if big else 2)
    labels = [textwrap.fill(c["claim"].partition(" (")[0], 62) for c in shown]
    ax.set_yticks(range(len(shown), 0, -1), labels, fontsize=7)
    ax.set_xlabel("worse  ←  half ranges of the gauges (logarithmic beyond 3)  →  better")
    ax.axvline(1, color="#999999", lw=0.8, ls=":")
    handles = [ax.scatter([], [], 30, COLOURS[n], marker=m, label=n) for n, m in marks.items()]
    handles.append(ax.plot([], [], color=COLOURS["rotated"], lw=7, alpha=0.45, label="random gauges")[0])
    ax.legend(handles=handles, ncols=6, loc="lower center", bbox_to_anchor=(0.2, 1), fontsize=7)
    save(fig, "rivals")


def sparsity(run):
    """The functional curve: loss added when only the k largest signals of each recipe are kept."""
    fig, (left, right) = pyplot().subplots(1, 2, figsize=(7, 2.6))
    name = f"{run}/sparsity_profile"
    shown = ("native", "rotated", "pca", "ica")
    for dictionary in shown:
        found = [r for r in rows(name, dictionary=dictionary) if r["metric"].startswith("loss added, top ")]
        k, loss = [int(r["metric"].rsplit(" ", 1)[1]) for r in found], [r["value"] for r in found]
        left.plot(k, loss, "o-", ms=3, color=COLOURS[dictionary], label=dictionary)
    for dictionary, active in load(name)["numbers"]["active"].items():
        x, y = [float(t) for t in active], [100 * v for v in active.values()]
        if dictionary == "gaussian":
            right.plot(x, y, "k--", lw=1, label="Gaussian")
        elif dictionary in shown:
            right.plot(x, y, "o-", ms=3, color=COLOURS[dictionary])
    left.set(xlabel="signals kept of each recipe", ylabel="loss added, nats per token", xscale="log")
    left.set_xticks(k, [str(n) for n in k])
    left.minorticks_off()
    right.set(xlabel="threshold, root mean squares of the recipe", ylabel="signals above it, %", yscale="log")
    right.set(ylim=(0.01, 150))
    left.legend()
    right.legend()
    save(fig, "sparsity")


def layers(run):
    """Where things happen: the logit lens, recovery by patching, and injections, layer by layer."""
    fig, (lens, patch, inject) = pyplot().subplots(1, 3, figsize=(7, 2.5))
    for model in ("reflow", "baseline", "step 0"):
        how = {"color": COLOURS[model], "ms": 3, "label": model}
        lens.plot(*by_layer(f"{run}/signal_lens", model=model, metric="KL(final || lens)"), "o-", **how)
        where = {"model": model, "metric": "recovery, last token"}
        patch.plot(*by_layer(f"{run}/crystallization", control="short", **where), "o-", **how)
        long = by_layer(f"{run}/crystallization", control="long", **where)
        patch.plot(*long, "o:", **how | {"label": None})
        where = {"model": model, "metric": "change of logit difference", "pos": "all"}
        inject.plot(*by_layer(f"{run}/crystallization", control="1.0 norms", **where), "o-", **how)
    lens.set(xlabel="layer", ylabel="KL(final || logit lens), nats", yscale="symlog")
    patch.set(xlabel="layer", ylabel="recovery at the last token")
    patch.axhline(0.5, color="#999999", lw=0.8, ls=":")
    inject.set(xlabel="layer of the injection", ylabel="logit difference, change")
    lens.legend(fontsize=7)
    save(fig, "layers")


def interventions(run):
    """Doses: the tilt of a sentiment direction by its strength; how many pairs an injection has forced."""
    fig, (dose, force) = pyplot().subplots(1, 2, figsize=(7, 2.5))
    names = {"native": "reflow", "diffmean": "diffmean", "baseline": "baseline", "step 0": "step 0"}
    colours = COLOURS | {"diffmean": COLOURS["ica"]}
    for dictionary, label in names.items():
        found = rows(f"{run}/emotion_surgery", dictionary=dictionary, metric="tilt, nats")
        points = sorted([(float(r["control"].split()[1]), r["value"]) for r in found] + [(0, 0)])
        dose.plot(*zip(*points, strict=True), "o-", ms=3, color=colours[dictionary], label=label)
    dose.set(xlabel="strength, residual norms", ylabel="tilt, nats")
    layer = load(f"{run}/concept_inception")["numbers"]["layer"]
    for model in ("reflow", "baseline", "step 0"):
        found = rows(f"{run}/concept_inception", model=model, layer=layer, metric="alpha*")
        alpha = np.sort([r["value"] for r in found])
        x = np.append(alpha[np.isfinite(alpha)], 64)
        share = np.append(np.arange(1, len(x)), len(x) - 1) / len(alpha)
        force.step(x, share, where="post", color=COLOURS[model], label=model)
    force.set(xlabel="dose, residual norms", ylabel="share of pairs forced", xscale="log", ylim=(0, 1.02))
    dose.legend(fontsize=7)
    force.legend(fontsize=7)
    save(fig, "interventions")


def curves(subject):
    """Losses of the main runs by tokens, and the gap over the dense model in the study of many runs."""
    runs = load("runs")
    fig, (left, right) = pyplot().subplots(1, 2, figsize=(7, 2.6))
    for kind, name in subject["runs"].items():
        if name in runs:
            run = runs[name]
            tokens = run["tokens"] / run["step"]
            points = [(s * tokens / 1e6, v) for s, v in run["curve"] if s]
            left.plot(*zip(*points, strict=True), color=KINDS[kind], label=kind)
    left.set(xlabel="million tokens", ylabel="validation loss, nats per token")
    left.legend()
    numbers = load("studies/convergence")["numbers"]
    sizes = sorted({key.split()[1] for key in numbers}, key=lambda s: int(s.split("x")[1]))
    for shift, kind in ((-0.08, "factored"), (0.08, "topk")):
        for i, size in enumerate(sizes):
            e = numbers[f"{kind} {size}"]["equal_depth"]
            bars = None  # fewer than three seeds
            if e["low"] is not None:
                bars = [[100 * (e["value"] - e["low"])], [100 * (e["high"] - e["value"])]]
            label = kind if i == 0 else None
            right.errorbar(i + shift, 100 * e["value"], bars, fmt="o", color=KINDS[kind], label=label)
    right.axhline(0, color="#999999", lw=0.8)
    right.set_xticks(range(len(sizes)), sizes)
    right.set(xlabel="layers x width", ylabel="loss above the dense model, %")
    right.legend()
    save(fig, "curves")


def seeds():
    """How well signals of two seeds match, beside rotated ones, for every kind and shape with seeds."""
    shapes = {}
    for name in ("studies/stability", "minis/stability"):
        shapes |= load(name)["numbers"]["shapes"]
    kinds, sizes = (list(dict.fromkeys(names)) for names in zip(*map(str.split, shapes), strict=True))
    fig, axes = pyplot().subplots(1, 2, figsize=(3.5, 2.1))
    for ax, part, title in zip(
        axes, ("raw", "freed"), ("frequency left in", "beyond frequency"), strict=True
    ):
        for name, values in shapes.items():
            kind, size = name.split()
            x, spun = sizes.index(size) + 0.25 * (kinds.index(kind) - 1), values[part]["rotated"]
            ax.plot([x - 0.1, x + 0.1], [np.mean(spun)] * 2, color=COLOURS["rotated"], lw=2)
            ax.plot([x, x], [min(spun), max(spun)], color=COLOURS["rotated"], lw=2)
            label = kind if size == sizes[0] else None
            ax.scatter(x, values[part]["native"], 12, KINDS[kind], marker="D", zorder=3, label=label)
        ax.set_xticks(range(len(sizes)), sizes, fontsize=6.5)
        ax.set(title=title, ylim=(0, 1.08 * ax.get_ylim()[1]))
    axes[0].set(ylabel="mean |correlation|")
    axes[1].legend(fontsize=6.5, loc="lower left")
    save(fig, "seeds")


def draw():
    """All figures of the paper."""
    plt = pyplot()
    plt.rcParams.update({"svg.hashsalt": "reflow", "font.size": 7.5, "axes.labelsize": 7.5})
    run = SUBJECT["runs"]["factored"]
    rivals(run), sparsity(run), layers(run), interventions(run), curves(SUBJECT), seeds()


# ----------------------------------------------------------------------------------------------------
# The README's blocks


def number(e):
    return f"{e['value']:.3g} [{e['low']:.3g}, {e['high']:.3g}]"


def supported(found):
    """How many of these claims are supported."""
    return sum(c["verdict"] == "supported" for c in found)


def tested(run):
    """The claims about a run's signals in which random rotations are among the rivals."""
    return [c for c in signals(run) if any(name.endswith("rotations (range)") for name in c["controls"])]


def privilege(run):
    """How often a run's signals beat all rotations, beside the coordinates of the plain model's embedding."""
    plain = SUBJECT["coordinates"]
    native, other = (sum(c["reason"].startswith("beats") for c in tested(r)) for r in (run, plain))
    own = sum("E" in c["controls"] or "baseline" in c["controls"] for c in signals(plain))
    return (
        f"Random rotations are among the rivals in {len(tested(run))} claims of kind signals. The learned"
        f" signals beat all 19 in {native} of these; the coordinates of the plain GPT's embedding, which has"
        f" no factors (`{plain}`), in {other}, and all rivals in {supported(signals(plain))} ({own} it cannot"
        " win, being among the rivals itself). Claims with a published counterpart:"
    )


def beside(run):
    """What the second seed and the run with hard sparsity say, as Markdown."""
    hard, second = SUBJECT["runs"]["topk"], SUBJECT["second"]
    pairs = list(zip(claims(run), claims(second), strict=True))
    same = sum(a["verdict"] == b["verdict"] for (_, a), (_, b) in pairs)
    held = [b for (_, a), (_, b) in pairs if a["verdict"] == "supported"]
    effects = [c for _, c in claims(hard) if c["kind"] == "effect"]
    return (
        f"A second seed, `{second}`, has the same verdict in {same} of {len(pairs)} claims and supports"
        f" {supported(held)} of the {len(held)} supported ones. Recipes held sparse in training, `{hard}`:"
        f" {supported(effects)} of {len(effects)} and {supported(signals(hard))} of {len(signals(hard))},"
        " most of the latter because few entries are all they have."
    )


def section():
    """The README's results: what was published, what was measured, what decided, as Markdown."""
    run = SUBJECT["runs"]["factored"]
    runs, found = load("runs"), claims(run)
    effects = [c for _, c in found if c["kind"] == "effect"]
    losses = ", ".join(
        f"`{name}` {runs[name]['whole_val_loss']:.3f}" for name in SUBJECT["runs"].values() if name in runs
    )
    r = runs[run]
    lines = [
        f"`{run}`, {r['parameters']:,} parameters, {r['tokens'] / 1e6:.2f}M tokens of training.",
        f"Validation loss, nats per token, one seed each: {losses}.",
        f"Supported: {supported(effects)} of {len(effects)} claims of kind effect,"
        f" {supported(signals(run))} of {len(signals(run))} of kind signals.",
        beside(run),
        privilege(run),
        "",
        "| claim | published | measured, 95 % interval | decided by | verdict |",
        "|---|---|---|---|---|",
    ]
    for name, c in found:
        if c["published"]:
            cells = (
                f"`{name}`: {c['claim']}",
                c["published"],
                number(c["measured"]),
                c["reason"],
                c["verdict"],
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        "All claims about signals on one scale: the learned signals (diamond) against 19 random changes of"
        " them that leave the function as it is (band), and against PCA, ICA, E and the plain GPT:",
        "",
        "![Each claim about signals beside its rivals](paper/figures/rivals.svg)",
        "",
        "Keeping only the largest signals of each recipe, and how many are active at which threshold:",
        "",
        "![Loss added by truncation, and activation rates](paper/figures/sparsity.svg)",
    ]
    return "\n".join(lines)


def speed():
    """The README's speed figures: what bench.py printed, as Markdown."""
    found = load("bench")
    c = found.pop("config")
    shape = (
        f"{c['config'].removeprefix('config/').removesuffix('.py')}, {c['batch_size']} x {c['length']} tokens"
    )
    lines = [f"{shape}; medians (lowest to highest) of {c['rounds']} interleaved rounds", ""]
    for part, numbers in found.items():
        lines += [part, *(f"  {line}" for line in bench.show(part, numbers))]
    return "\n".join(["```", *lines, "```"])


def readme():
    """The README with its two generated blocks as they should be."""
    text = README.read_text(encoding="utf-8")
    for name, block in (("results", section()), ("speed", speed())):
        begin, end = f"<!-- {name}: written by paper/build.py -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, mark, after = rest.partition(end)
        if not mark:
            raise UserError(f"{README} has no marks '{begin}' and '{end}' around its {name}")
        text = f"{before}{begin}\n{block}\n{end}{after}"
    return text


def main():
    configurator.parse()  # no settings: only --help
    start = time.perf_counter()
    load("methods"), load("bench")  # for the text; the figures ask for the rest
    draw()
    try:
        import typst
    except ImportError:
        raise UserError("the paper needs a package: pip install -r requirements-dev.txt") from None
    try:
        typst.compile(PAPER / "paper.typ", output=PAPER / "paper.pdf", root=PAPER.parent)
    except typst.TypstError as error:
        raise UserError(f"paper/paper.typ does not compile:\n{error.diagnostic}") from None
    write_atomically(README, readme())
    print(f"paper/paper.pdf, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    configurator.run(main)
