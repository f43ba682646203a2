"""
What does the factored vocabulary cost or gain in loss, at equal depth and at equal parameters?

    python experiments/studies/convergence.py --runs='out/studies/*'

Method
    Runs are paired by seed: both models of a pair saw the same tokens in the same order. A gap is the
    relative difference in loss to the dense model (whole validation split). Equal parameters: the dense loss
    at the factored model's number of parameters, on a line in log parameters through the two nearest dense
    sizes of that seed. Below the smallest and above the largest size this is an extrapolation, which the
    table marks. The claims are about the largest size, and about its change from the smallest. A claim is
    supported if the 95 % t interval over pairs lies on its side of the limit, and inconclusive with fewer
    than three pairs. With three seeds this is a weak test; rows.csv has the values of all pairs. This is no
    scaling law: three sizes span a factor of four in parameters, at one number of tokens.

Cost
    Seconds: it reads losses, no weights.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import threads
import numpy as np

from configurator import UserError
from experiments.lab import Report
from experiments.lab.claims import below
from experiments.lab.plots import COLOURS
from experiments.lab.stats import t_interval
from experiments.studies.runs import Study, common_seeds, loss_curve, run_study, sizes

CLAIMS = {
    "equal_depth": "at equal depth and width the factored loss is less than 3 % above the dense one",
    "equal_parameters": "at equal parameters the factored loss is below the dense one",
    "shrinks": "the gap at equal depth shrinks from the smallest size to the largest",
}
PUBLISHED = "about 3 % at 464M, about 1 % at 515M (OpenWebText)"
KINDS = ("factored", "dense", "topk")


def gaps_at_equal_depth(table, kind, size):
    """{seed: relative loss of `kind` above the dense model of equal depth and width}, for seeds of both."""
    seeds = common_seeds(table, size, kind, "dense")
    return {seed: table[kind, size][seed].loss / table["dense", size][seed].loss - 1 for seed in seeds}


def gaps_at_equal_parameters(table, kind, size):
    """(relative losses above a dense model of equal parameters (n,), whether one is extrapolated)."""
    found = []
    extrapolated = False
    for _, run in sorted(table.get((kind, size), {}).items()):
        dense = [runs[run.seed] for key, runs in table.items() if key[0] == "dense" and run.seed in runs]
        if len(dense) > 1:
            numbers = sorted(other.n_parameters for other in dense)
            extrapolated |= not numbers[0] <= run.n_parameters <= numbers[-1]
            found.append(run.loss / loss_at(run.n_parameters, dense) - 1)
    return np.array(found), extrapolated


def loss_at(n_parameters, runs):
    """Loss at a number of parameters, on a line in log parameters through the two nearest of the runs."""
    runs = sorted(runs, key=lambda run: run.n_parameters)
    x = np.log([run.n_parameters for run in runs])
    right = int(np.clip(np.searchsorted(x, np.log(n_parameters)), 1, len(x) - 1))
    left = right - 1
    share = (np.log(n_parameters) - x[left]) / (x[right] - x[left])  # outside 0 to 1: beyond all runs
    return runs[left].loss + share * (runs[right].loss - runs[left].loss)


def run(study: Study) -> Report:
    table = study.by_shape()
    shapes = [(kind, size) for kind in ("factored", "topk") for size in sizes(table)]
    depth = {shape: gaps_at_equal_depth(table, *shape) for shape in shapes}
    equal = {shape: gaps_at_equal_parameters(table, *shape) for shape in shapes}
    both = sizes(table, "factored", "dense")
    if not both:
        command = "python experiments/studies/train_runs.py"
        raise UserError(
            f"no factored and dense runs of one shape and seed among --runs: make some with {command}"
        )
    report = Report(study, "convergence", CLAIMS)

    # The gap over the dense model at the largest size; the smaller sizes beside it.
    smallest, largest = both[0], both[-1]
    values = {size: list(depth["factored", size].values()) for size in both}
    controls = {f"gap at {size}": t_interval(values[size]) for size in both[:-1]}
    report.claim("equal_depth", below(np.array(values[largest]), 0.03, "seeds", controls), PUBLISHED)
    controls = {f"gap at {size}": t_interval(equal["factored", size][0]) for size in both[:-1]}
    report.claim("equal_parameters", below(equal["factored", largest][0], 0.0, "seeds", controls))
    if len(both) > 1:
        early, late = depth["factored", smallest], depth["factored", largest]
        change = [late[seed] - early[seed] for seed in sorted(early.keys() & late.keys())]
        report.claim("shrinks", below(np.array(change), 0.0, "seeds"))

    for (kind, size), runs in sorted(table.items()):
        for seed, trained in sorted(runs.items()):
            where = {"model": trained.name, "control": f"{kind} {size} seed {seed}"}
            report.row("validation loss", trained.loss, **where)
            report.row("parameters", trained.n_parameters, **where)
    for kind, size in shapes:
        for value in depth[kind, size].values():
            report.row("gap at equal depth", value, model=kind, control=size)
        for value in equal[kind, size][0]:
            report.row("gap at equal parameters", value, model=kind, control=size)
        report.numbers[f"{kind} {size}"] = {
            "equal_depth": vars(t_interval(list(depth[kind, size].values()))),
            "equal_parameters": vars(t_interval(equal[kind, size][0])),
        }
    report.notes.append(
        f"The largest size (layers x width) of both kinds is {largest}, the smallest {smallest}."
    )
    report.gallery = gallery(table, depth, equal)

    each = ", ".join(f"{np.mean(values[size]):+.1%} at {size}" for size in both)
    title = f"Factored against dense at equal depth: {each}"
    n_panels = len(sizes(table)) + 1
    with report.figure("curves", title, 1, n_panels, size=(3 * n_panels + 0.2, 3.4)) as axes:
        draw_curves(axes, table)
    return report


def gallery(table, depth, equal):
    """One line for each kind and size: losses over seeds, and the gaps over the dense model."""
    form = "{:9} {:7} {:>11} {:30} {:30} {}"
    lines = [
        form.format("kind", "size", "parameters", "loss, mean (range)", "equal depth", "equal parameters")
    ]
    for size in sizes(table):
        for kind in sorted(KINDS):
            runs = list(table.get((kind, size), {}).values())
            if not runs:
                continue
            losses = [run.loss for run in runs]
            loss = f"{np.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f}), n = {len(losses)}"
            gaps = ["", ""]
            if kind != "dense":
                same, extrapolated = equal[kind, size]
                gaps = [f"{t_interval(list(depth[kind, size].values()))}", f"{t_interval(same)}"]
                gaps[1] += " extrapolated" if extrapolated else ""
            lines.append(form.format(kind, size, f"{runs[0].n_parameters:,}", loss, *gaps).rstrip())
    return "\n".join(lines)


def draw_curves(axes, table):
    """Validation loss by step, one panel a size; in the last panel the final losses by parameters."""
    for ax, size in zip(axes, sizes(table), strict=False):
        for kind in KINDS:
            for i, run in enumerate(table.get((kind, size), {}).values()):
                steps, losses = loss_curve(run.checkpoint.run)
                label = kind if i == 0 else None
                ax.plot(steps[1:], losses[1:], color=COLOURS[kind], lw=1, label=label)
        ax.set(title=size, xlabel="step", ylabel="validation loss, nats per token")
        ax.legend()
    last = axes[-1]
    for kind in KINDS:
        runs = [run for key, found in table.items() if key[0] == kind for run in found.values()]
        numbers = [run.n_parameters / 1e6 for run in runs]
        last.scatter(numbers, [run.loss for run in runs], color=COLOURS[kind], s=14, label=kind)
    last.set(xlabel="parameters, millions", ylabel="final loss, whole split", title="all runs")


if __name__ == "__main__":
    run_study(run)
