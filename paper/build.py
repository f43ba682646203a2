"""
Build paper/paper.pdf from paper/results: draw the figures, set the text, write the README's two blocks.

    make paper
    python paper/build.py

No number is typed in: text, figures and blocks read claims by their keys. `python paper/collect.py` refreshes
the results.
"""

import ast
import csv
import hashlib
import json
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import bench
import configurator
from checkpoint import write_atomically
from configurator import UserError, read_docstring
from experiments.lab import plots
from experiments.lab.plots import COLOURS
from experiments.lab.report import script
from experiments.lab.results import read_result
from experiments.run_all import NAMES
from experiments.studies import STUDIES

PAPER = Path(__file__).resolve().parent
RESULTS = PAPER / "results"
FIGURES = PAPER / "figures"
METHODS = PAPER / "methods.json"  # the appendix: what the scripts say of themselves
README = PAPER.parent / "README.md"
SUBJECT = json.loads((PAPER / "subject.json").read_text(encoding="utf-8"))  # which runs the paper is about
PRINT = {"font.size": 7.5, "axes.labelsize": 7.5}  # of the figures
SHOWN_SPEED = ("train", "sample")  # parts of bench.py in the README


# ----------------------------------------------------------------------------------------------------
# Results


def result_file(name):
    """The path of a file of paper/results. Raises UserError if it is missing."""
    path = RESULTS / name
    if not path.exists():
        raise UserError(f"no paper/results/{name}: python paper/collect.py makes it")
    return path


def load(name):
    """runs.json or bench.json. Raises UserError."""
    return json.loads(result_file(f"{name}.json").read_text(encoding="utf-8"))


def result(run, experiment):
    """The Result of an experiment on a run, or of a study on the "studies" or "minis". Raises UserError."""
    return read_result(result_file(f"{run}/{experiment}.json"))


def rows(run, experiment, **where):
    """The lines of a rows.csv that have these values, as dicts; layer, strength and value are numbers."""
    found = []
    with open(result_file(f"{run}/{experiment}.csv"), newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            for column in ("layer", "strength", "value"):
                row[column] = float(row[column]) if row[column] else None
            if all(row[column] == value for column, value in where.items()):
                found.append(row)
    return found


def claims(run):
    """{(experiment, key): Claim} of a run's twelve experiments."""
    found = [claim for name in NAMES for claim in result(run, name).claims]
    return {(claim.experiment, claim.key): claim for claim in found}


def of_kind(kind, found):
    """The claims of one kind."""
    return [claim for claim in found if claim.kind == kind]


def supported(found):
    """Those of these claims that are supported."""
    return [claim for claim in found if claim.verdict == "supported"]


def tested(found):
    """Those of these claims in which random rotations are a control. Skewed gauges test nothing."""
    return [claim for claim in found if claim.gauge == "rotation"]


# ----------------------------------------------------------------------------------------------------
# Figures


def fingerprint():
    """SHA-256 of all results; every figure says from which it was drawn."""
    digest = hashlib.sha256()
    for path in sorted(RESULTS.rglob("*.*")):
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
    """x, with distances beyond 3 from zero on a logarithmic scale."""
    return x if abs(x) <= 3 else np.sign(x) * (3 + np.log10(abs(x) / 3))


def draw_rivals(run):
    """Every claim about signals on one scale: native, PCA, ICA and others against 19 gauges."""
    shown = of_kind("signals", claims(run).values())
    marks = {"native": "D", "pca": "o", "ica": "o", "E": "s", "baseline": "s"}
    with figure("rivals", size=(7, 0.36 * len(shown) + 0.9)) as ax:
        for i, claim in enumerate(shown):
            y = len(shown) - i
            sign = -1 if claim.lower else 1
            middle = (claim.gauges.low + claim.gauges.high) / 2
            half = (claim.gauges.high - claim.gauges.low) / 2
            band = {"lw": 7, "alpha": 0.45, "solid_capstyle": "butt", "zorder": 1}
            ax.plot([-1, 1], [y, y], color=COLOURS["gauges"], **band)
            for name, estimate in ({"native": claim.measured} | claim.controls).items():
                if name not in marks or estimate.value is None or not half:
                    continue
                x = squeezed(sign * (estimate.value - middle) / half)
                size, zorder = (46, 3) if name == "native" else (26, 2)
                ax.scatter(x, y, size, COLOURS[name], marker=marks[name], zorder=zorder)
        labels = [textwrap.fill(claim.claim, 64) for claim in shown]
        ax.set_yticks(range(len(shown), 0, -1), labels, fontsize=7)
        ax.set_xlabel("worse  ←  half ranges of the gauges (logarithmic beyond 3)  →  better")
        ax.axvline(1, color="#999999", lw=0.8, ls=":")
        handles = [ax.scatter([], [], 30, COLOURS[n], marker=m, label=n) for n, m in marks.items()]
        handles += ax.plot([], [], color=COLOURS["gauges"], lw=7, alpha=0.45, label="random gauges")
        ax.legend(handles=handles, ncols=6, loc="lower center", bbox_to_anchor=(0.2, 1), fontsize=7)


def draw_sparsity(run):
    """The functional curve: loss added when only the k largest signals of each recipe are kept."""
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
    """Where things happen: the logit lens, recovery by patching, and injections, layer by layer."""

    def by_layer(ax, experiment, dash="o-", label=None, **where):
        found = rows(run, experiment, **where)
        x = [row["layer"] for row in found]
        y = [row["value"] for row in found]
        ax.plot(x, y, dash, ms=3, color=COLOURS[where["model"]], label=label)

    with figure("layers", columns=3, size=(7, 2.5)) as (lens, patch, inject):
        for model in ("reflow", "baseline", "step 0"):
            by_layer(lens, "signal_lens", label=model, model=model, metric="KL(final || lens)")
            recovery = {"model": model, "metric": "recovery, last token"}
            by_layer(patch, "crystallization", control="short", **recovery)
            by_layer(patch, "crystallization", "o:", control="long", **recovery)
            change = {"model": model, "metric": "change of logit difference", "pos": "all"}
            by_layer(inject, "crystallization", dictionary="", strength=1.0, **change)
        lens.set(xlabel="layer", ylabel="KL(final || logit lens), nats", yscale="symlog")
        lens.legend(fontsize=7)
        patch.set(xlabel="layer", ylabel="recovery at the last token")
        patch.axhline(0.5, color="#999999", lw=0.8, ls=":")
        inject.set(xlabel="layer of the injection", ylabel="change of logit difference, nats")


def draw_interventions(run):
    """Doses: the tilt of a sentiment direction by its strength; how many pairs an injection has forced."""
    names = {"native": "reflow", "diffmean": "diffmean", "baseline": "baseline", "step 0": "step 0"}
    colours = COLOURS | {"diffmean": COLOURS["ica"]}
    layer = result(run, "concept_inception").numbers["layer"]
    with figure("interventions", columns=2, size=(7, 2.5)) as (dose, force):
        for dictionary, label in names.items():
            found = rows(run, "emotion_surgery", dictionary=dictionary, metric="tilt, nats")
            points = sorted([(row["strength"], row["value"]) for row in found] + [(0, 0)])
            x, y = zip(*points, strict=True)
            dose.plot(x, y, "o-", ms=3, color=colours[dictionary], label=label)
        dose.set(xlabel="strength, residual norms", ylabel="tilt, nats")
        dose.legend(fontsize=7)
        for model in ("reflow", "baseline", "step 0"):
            found = rows(run, "concept_inception", model=model, layer=layer, metric="alpha*")
            alpha = np.sort([row["value"] for row in found])  # infinite where no dose forces the token
            forced = alpha[np.isfinite(alpha)]
            x = np.append(forced, 64)  # the largest dose
            share = np.append(np.arange(1, len(forced) + 1), len(forced)) / len(alpha)
            force.step(x, share, where="post", color=COLOURS[model], label=model)
        force.set(xlabel="dose, residual norms", ylabel="share of pairs forced", xscale="log", ylim=(0, 1.02))
        force.legend(fontsize=7)


def draw_curves():
    """Losses of the main runs by tokens, and the gap over the dense model in the study of many runs."""
    runs = load("runs")
    numbers = result("studies", "convergence").numbers
    sizes = sorted({shape.split()[1] for shape in numbers}, key=lambda size: int(size.split("x")[1]))
    with figure("curves", columns=2) as (left, right):
        for kind, name in SUBJECT["runs"].items():
            if name in runs:
                run = runs[name]
                tokens = run["tokens"] / run["step"]
                x = [step * tokens / 1e6 for step, _ in run["curve"] if step]
                y = [loss for step, loss in run["curve"] if step]
                left.plot(x, y, color=COLOURS[kind], label=kind)
        left.set(xlabel="million tokens", ylabel="validation loss, nats per token")
        left.legend()
        for shift, kind in ((-0.08, "factored"), (0.08, "topk")):
            for i, size in enumerate(sizes):
                gap = numbers[f"{kind} {size}"]["equal_depth"]
                bars = None  # fewer than three seeds
                if gap["low"] is not None:
                    bars = [[100 * (gap["value"] - gap["low"])], [100 * (gap["high"] - gap["value"])]]
                label = kind if i == 0 else None
                right.errorbar(i + shift, 100 * gap["value"], bars, fmt="o", color=COLOURS[kind], label=label)
        right.axhline(0, color="#999999", lw=0.8)
        right.set_xticks(range(len(sizes)), sizes)
        right.set(xlabel="layers x width", ylabel="loss above the dense model, %")
        right.legend()


def draw_seeds():
    """How well signals of two seeds match, beside rotated ones, for every kind and shape with seeds."""
    shapes = {}
    for folder in ("studies", "minis"):
        shapes |= result(folder, "stability").numbers["shapes"]
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
    """All figures of the paper."""
    run = SUBJECT["runs"]["factored"]
    draw_rivals(run)
    draw_sparsity(run)
    draw_layers(run)
    draw_interventions(run)
    draw_curves()
    draw_seeds()


# ----------------------------------------------------------------------------------------------------
# The appendix


def methods():
    """{"experiments" or "studies": {name: {"question", "method"}}}, from the docstrings of the scripts."""

    groups = {"experiments": NAMES, "studies": STUDIES}
    found = {group: {name: method_of(script(name)) for name in names} for group, names in groups.items()}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def method_of(path):
    """{"question", "method"} of a script: the first line of its docstring, and its section `Method`."""
    question, _, rest = read_docstring(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))
    sections = {}
    for paragraph in rest.split("\n\n"):
        heading, _, text = paragraph.partition("\n")
        sections[heading] = text
    return {"question": " ".join(question.split()), "method": " ".join(sections.get("Method", rest).split())}


# ----------------------------------------------------------------------------------------------------
# The README's blocks


def number(e):
    """An Estimate as text, three digits."""
    if e.value is None:
        return "–"
    return f"{e.value:.3g} [{e.low:.3g}, {e.high:.3g}]"


def n_claims(found):
    """How many claims, as text."""
    return f"{len(found)} claim{'' if len(found) == 1 else 's'}"


def paragraph(*sentences):
    """Sentences as a paragraph of lines that fit."""
    return textwrap.fill(" ".join(sentences), 120, break_long_words=False, break_on_hyphens=False)


def finding(run):
    """What the experiments on a run found, in words that hold for whatever they found, as Markdown."""
    found = claims(run).values()
    effects = of_kind("effect", found)
    signals = of_kind("signals", found)
    special = supported(signals)
    rotated = tested(signals)
    beats = [claim for claim in rotated if claim.beats_gauges]
    beaten = [claim for claim in beats if claim.verdict != "supported"]
    sentences = [
        f"**Of {len(found)} claims, {len(supported(found))} hold against their controls:"
        f" {len(supported(effects))} of {len(effects)} that the model does something (effect claims), and"
        f" {len(special)} of {len(signals)} that its learned signals are special (signals claims).**",
        f"Random rotations of the signals are a control in {len(rotated)} of the {len(signals)}.",
        f"The learned signals beat all rotations in {len(beats)} of these {len(rotated)}.",
    ]
    if beaten:
        rivals = "PCA, ICA, the embedding itself or the plain GPT"
        sentences.append(f"In {len(beaten)} of these {len(beats)} they do not clearly beat {rivals}.")
    sentences += [f"Supported is: {claim.claim} (`{claim.experiment}`)." for claim in special]
    return paragraph(*sentences)


def of_plain(run):
    """How the coordinates of the plain GPT's embedding do in the claims about signals, as Markdown."""
    plain = SUBJECT["coordinates"]
    own = of_kind("signals", claims(run).values())
    other = of_kind("signals", claims(plain).values())
    n_own = sum(bool(claim.beats_gauges) for claim in tested(own))
    n_other = sum(bool(claim.beats_gauges) for claim in tested(other))
    is_rival = [claim for claim in other if "E" in claim.controls or "baseline" in claim.controls]
    sentences = [
        f"`{plain}` is a plain GPT whose embedding coordinates are taken for signals; it has no factors.",
        f"Its coordinates beat all of their rotations in {n_other} of {n_claims(tested(other))}.",
    ]
    if n_other >= n_own:
        sentences.append("So a basis can be privileged without a factored vocabulary.")
    sentences += [
        f"They beat every control in {len(supported(other))} of {n_claims(other)}.",
        f"In {n_claims(is_rival)} this model is one of the controls, so it cannot win.",
    ]
    return paragraph(*sentences)


def of_other_runs(run):
    """What the second seed and the run with hard sparsity say, as Markdown."""
    second_name = SUBJECT["second"]
    hard_name = SUBJECT["runs"]["topk"]
    found = claims(run)
    second = claims(second_name)
    both = [name for name in found if name in second]
    same = [name for name in both if second[name].verdict == found[name].verdict]
    held = [name for name in both if found[name].verdict == "supported"]
    held_again = supported([second[name] for name in held])
    hard = claims(hard_name).values()
    effects = of_kind("effect", hard)
    signals = of_kind("signals", hard)
    special = supported(signals)
    by_construction = [c for c in special if [c.experiment, c.key] in SUBJECT["favours_few_entries"]]
    sentences = [
        f"A second seed, `{second_name}`, has the same verdict in {len(same)} of {n_claims(both)}.",
        f"It supports {len(held_again)} of the {len(held)} supported ones.",
        f"`{hard_name}` was trained with hard top-k sparsity. It supports {len(supported(effects))} of"
        f" {len(effects)} effect claims and {len(special)} of {len(signals)} signals claims.",
    ]
    if by_construction:
        sentences.append(
            f"Of these {len(special)}, {len(by_construction)} favour it by construction,"
            " because its recipes have few nonzero entries."
        )
    return paragraph(*sentences)


def table(found):
    """The claims with a published counterpart, as Markdown."""
    lines = [
        "| claim | published | measured, 95 % interval | decided by | verdict |",
        "|---|---|---|---|---|",
    ]
    for claim in found:
        if claim.published:
            sentence = f"`{claim.experiment}`: {claim.claim}"
            cells = (sentence, claim.published, number(claim.measured), claim.reason, claim.verdict)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def results_block():
    """The README's results: the finding in words, then claims with a published counterpart, one figure."""
    run = SUBJECT["runs"]["factored"]
    runs = load("runs")
    names = [name for name in SUBJECT["runs"].values() if name in runs]
    losses = ", ".join(f"`{name}` {runs[name]['whole_val_loss']:.3f}" for name in names)
    model = paragraph(
        f"These are results of `{run}`: {runs[run]['parameters']:,} parameters,"
        f" {runs[run]['tokens'] / 1e6:.2f}M tokens of training.",
        f"Validation losses in nats per token, one seed each: {losses}.",
    )
    parts = [
        finding(run),
        of_plain(run),
        of_other_runs(run),
        model,
        "The claims with a published counterpart:",
        table(claims(run).values()),
        paragraph(
            "All signals claims on one scale. The band is the range of random changes of the signals that"
            " leave the model's function as it is. The diamond is the learned signals."
        ),
        "![Each claim about signals: learned signals against random changes, PCA, ICA, E and the plain GPT]"
        "(paper/figures/rivals.svg)",
    ]
    return "\n\n".join(parts)


def speed_block():
    """The README's speed figures: rows that bench.py printed, as Markdown."""
    found = load("bench")
    c = found["config"]
    name = c["config"].removeprefix("config/").removesuffix(".py")
    lines = [
        f"{name}, {c['batch_size']} x {c['length']} tokens;"
        f" medians (lowest to highest) of {c['rounds']} interleaved rounds",
        "",
    ]
    for part in SHOWN_SPEED:
        lines.append(part)
        lines += [f"  {line}" for line in bench.show(part, found[part])]
    return "\n".join(["```", *lines, "```"])


def readme():
    """The README with its two generated blocks as they should be. Raises UserError if it has no marks."""
    text = README.read_text(encoding="utf-8")
    for name, block in (("results", results_block()), ("speed", speed_block())):
        begin = f"<!-- {name}: written by paper/build.py -->"
        end = f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, mark, after = rest.partition(end)
        if not mark:
            raise UserError(f"{README} has no marks '{begin}' and '{end}' around its {name}")
        text = f"{before}{begin}\n{block}\n{end}{after}"
    return text


def main():
    configurator.parse()  # no settings: only --help
    start = time.perf_counter()
    load("bench")  # for the text; the figures ask for the rest
    draw()
    write_atomically(METHODS, methods())
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
