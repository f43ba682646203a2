"""
What does the factored vocabulary cost or gain in loss, at equal depth and at equal parameters?

    python experiments/convergence.py --runs='out/studies/*'

Claims
  effect   at equal depth and width the factored model's loss is less than 3 % above the dense one's (the
           reference system: about 3 % at 464M, about 1 % at 515M).
  effect   at equal parameters the factored model has the lower loss.
  effect   the gap at equal depth shrinks from the smallest size to the largest.

Method. Runs are paired by seed, so that both models of a pair saw the same tokens in the same order; losses
are nats per token over the whole validation split. Equal parameters: the dense loss at the factored model's
number of parameters, by linear interpolation in log parameters between the dense sizes of that seed, beyond
them by extrapolation, which is said. Rule: a claim is supported if the 95 % t interval over pairs lies on its
side, inconclusive with fewer than three pairs. With three seeds that is a weak test; the values of all pairs
are in rows.csv. No scaling law: three sizes span a factor of four in parameters at one budget of tokens.

Cost: seconds, reads metrics only.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json

import numpy as np

from configurator import UserError
from experiments import lab, study

PUBLISHED = "about 3 % at 464M, about 1 % at 515M (OpenWebText)"
COLOURS = {"factored": lab.COLOURS["native"], "dense": lab.COLOURS["baseline"], "topk": lab.COLOURS["ica"]}


def curve(folder):
    """(steps, validation losses) of a run's metrics.jsonl; the last entry of a step counts."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("val_loss") is not None:
            found[row["step"]] = row["val_loss"]
    steps = sorted(found)
    return np.array(steps), np.array([found[s] for s in steps])


def gaps(table, kind, size):
    """{seed: relative loss of `kind` over dense at equal depth and width}, for the seeds that both have."""
    ours, dense = table.get((kind, size), {}), table.get(("dense", size), {})
    return {s: ours[s][0] / dense[s][0] - 1 for s in sorted(ours.keys() & dense.keys())}


def gaps_at_equal_parameters(table, kind, size, sizes):
    """(the same at equal parameters [n], whether any is extrapolated)."""
    out, beyond = [], False
    for seed, (loss, parameters, _) in sorted(table.get((kind, size), {}).items()):
        dense = [table.get(("dense", s), {}).get(seed) for s in sizes]
        points = sorted((d[1], d[0]) for d in dense if d is not None)
        if len(points) < 2:
            continue
        n, y = np.log([p for p, _ in points]), [v for _, v in points]
        x = np.log(parameters)
        beyond |= not n[0] <= x <= n[-1]
        i = int(np.clip(np.searchsorted(n, x), 1, len(n) - 1))
        dense = y[i - 1] + (y[i] - y[i - 1]) * (x - n[i - 1]) / (n[i] - n[i - 1])
        out.append(loss / dense - 1)
    return np.array(out), beyond


def run(runs):
    table = runs.by_shape()
    order = sorted(
        {size for _, size in table},
        key=lambda s: min(v[1] for k in table if k[1] == s for v in table[k].values()),
    )
    both = [s for s in order if len(gaps(table, "factored", s))]
    if not both:
        raise UserError(
            "no factored and dense runs of one shape and seed among --runs: python experiments/studies.py"
        )
    report = lab.Report(runs, "convergence")
    equal = {}
    for (kind, size), seeds in sorted(table.items()):
        for seed, (loss, parameters, run_folder) in sorted(seeds.items()):
            where = {"model": run_folder.name, "control": f"{kind} {size} seed {seed}"}
            report.row("validation loss", loss, **where)
            report.row("parameters", parameters, **where)
    for kind in ("factored", "topk"):
        for size in order:
            values = np.array(list(gaps(table, kind, size).values()))
            same, beyond = gaps_at_equal_parameters(table, kind, size, order)
            equal[kind, size] = values, same, beyond
            for metric, found in (("gap at equal depth", values), ("gap at equal parameters", same)):
                for value in found:
                    report.row(metric, value, model=kind, control=size)

    largest = both[-1]
    each = {s: study.t_interval(equal["factored", s][0]) for s in both}
    report.claim(
        study.below(
            f"at equal depth and width ({largest}) the factored loss is less than 3 % above the dense one",
            equal["factored", largest][0],
            0.03,
            "seeds",
            {f"gap at {s}": each[s] for s in both[:-1]},
            PUBLISHED,
        )
    )
    same = equal["factored", largest][1]
    report.claim(
        study.below(
            f"at equal parameters ({largest}) the factored loss is below the dense one",
            same,
            0.0,
            "seeds",
            {f"gap at {s}": study.t_interval(equal["factored", s][1]) for s in both[:-1]},
        )
    )
    if len(both) > 1:
        early, late = gaps(table, "factored", both[0]), gaps(table, "factored", largest)
        change = np.array([late[s] - early[s] for s in sorted(early.keys() & late.keys())])
        report.claim(
            study.below(
                f"the gap at equal depth shrinks from {both[0]} to {largest}", change, 0.0, "seeds", {}
            )
        )

    titles = (
        "kind",
        "size",
        "parameters",
        "loss, mean (range over seeds)",
        "equal depth",
        "equal parameters",
    )
    lines = ["{:9} {:7} {:>11} {:30} {:24} {}".format(*titles)]
    for (kind, size), seeds in sorted(table.items(), key=lambda kv: (order.index(kv[0][1]), kv[0][0])):
        losses = [v[0] for v in seeds.values()]
        text = f"{np.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f}), n = {len(losses)}"
        columns = ["", ""]
        if kind != "dense":
            values, same, beyond = equal[kind, size]
            columns = [percent(values), percent(same) + (" extrapolated" if beyond else "")]
        parameters = next(iter(seeds.values()))[1]
        lines.append(f"{kind:9} {size:7} {parameters:>11,} {text:30} {columns[0]:24} {columns[1]}".rstrip())
    report.gallery = "\n".join(lines)
    report.numbers = {
        f"{kind} {size}": {
            "equal_depth": vars(study.t_interval(v)),
            "equal_parameters": vars(study.t_interval(s)),
        }
        for (kind, size), (v, s, _) in equal.items()
    }
    figure(report, table, order, each)
    return report


def percent(values):
    found = study.t_interval(values)
    if not len(values):
        return ""
    if len(values) < 3:
        return f"{found.value:+.2%}"
    return f"{found.value:+.2%} [{found.low:+.2%}, {found.high:+.2%}]"


def figure(report, table, order, each):
    plt = lab.pyplot()
    fig, axes = plt.subplots(1, len(order) + 1, figsize=(3 * len(order) + 3.2, 3.4))
    for ax, size in zip(axes, order, strict=False):
        for kind, colour in COLOURS.items():
            curves = [curve(v[2]) for v in table[kind, size].values()] if (kind, size) in table else []
            for i, (steps, losses) in enumerate(curves):
                ax.plot(steps[1:], losses[1:], color=colour, lw=1, label=kind if i == 0 else None)
        ax.set(title=size, xlabel="step", ylabel="validation loss, nats per token")
        ax.legend()
    for kind, colour in COLOURS.items():
        found = [(v[1] / 1e6, v[0]) for size in order for v in table.get((kind, size), {}).values()]
        if found:
            axes[-1].scatter(*zip(*found, strict=True), color=colour, s=14, label=kind)
    axes[-1].set(
        xlabel="parameters, millions", ylabel="final loss, whole split", xscale="log", title="all runs"
    )
    axes[-1].set_xticks([2, 4, 8], ["2", "4", "8"])
    axes[-1].minorticks_off()
    text = ", ".join(f"{e.value:+.1%} at {s}" for s, e in each.items())
    report.figure(fig, "curves", f"Factored against dense at equal depth: {text}")


if __name__ == "__main__":
    study.compare(run)
