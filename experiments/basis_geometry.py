"""
What shape does the learned basis have, did training shape it, and are its axes privileged?

    python experiments/basis_geometry.py --run=out/reflow-nano

Method
    W_basis (S, d) and E: singular values, effective rank exp(entropy) (Roy & Vetterli, 2007), stable rank,
    condition number. Coherence: the largest |cosine| of two signals, beside that of a Gaussian matrix and
    Welch's lower bound. Anisotropy: how far G = WbWb' is from a multiple of I, where recipe cosines would be
    those of E. Balance: the gradient flow of a product conserves Wr'Wr - WbWb', so the changes of the two are
    compared. Unseen energy: the recipes' part in the left null space of W_basis, if S > d. Drift: 1 - cosine
    of a row of W_basis and its start.

    Movement: rows of W_basis fall in two random halves. The main directions, d/16 of them, are the first
    right singular vectors of one half's change. They are applied to the other half. Control: every row moves
    as far, in a random direction of its own. Independent movement has a share of 1/16.

    Kurtosis: an optimiser that works coordinate by coordinate can favour axes (Elhage et al., "Privileged
    bases in the transformer residual stream", 2023). Recipes are taken less the median of the 2,000 most
    frequent tokens, which all share; rows.csv has them as they are, too. They may also be less kurtotic than
    all their 99 rotations, so the notes have an exact two-sided randomisation p (at least 1/100), by the
    distance from the mean of all hundred; the same for a plain GPT.

    Recovery: ICA of E, or sparse codes where S > d, from two starts. |correlation| of a signal's recipes with
    those of its partner, mean over signals, log frequency regressed out; of the worse start.

    Unit of movement: a row of the basis; of kurtosis: a token seen in training.

Cost
    Beside ICA: 40 singular value decompositions, 99 rotations for each model, the spectra of E. On one core
    4 s for 64 signals, 90 s for 1,024.
"""

import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
import numpy as np
import torch
import torch.nn.functional as F

from configurator import UserError
from data.words import SHOWN_COUNT
from dictionary import readable
from experiments.lab import Lab, Report, Scores, run_experiment
from experiments.lab.claims import missing, to_numpy
from experiments.lab.factorization import (
    agreement,
    anisotropy,
    balances,
    coherences,
    factors,
    ranks,
    spectrum,
    unseen,
    welch,
    without_rounding,
)
from experiments.lab.matching import RECOVERED, recovered
from experiments.lab.plots import COLOURS, plot_dot
from experiments.lab.spaces import POOL, less_shared
from experiments.lab.stats import kurtosis, two_sided

CLAIMS = {
    "movement": "training moved the signals in common directions (share of movement in those of others)",
    "privileged": "the axes are privileged: recipes are more kurtotic in native signals than in any others",
}
PUBLISHED = '"continuous, low-redundancy" basis, no numbers (464M, OpenWebText)'
DIRECTIONS = 1 / 16  # of d: the main directions of movement
N_ALONE = 19  # draws of independent movement
STARTS = 2  # of the method that looks for the signals in E
N_GAUGES = 99  # rotations that the kurtosis is compared with
TOKENS = 2000  # whose kurtosis is measured
PAIRS_OF = 1000  # tokens whose cosines are compared in recipes and in E
STYLES = {  # of spectra: colour and line
    "basis": ("native", "-"),
    "basis, step 0": ("step 0", "-"),
    "basis, gaussian": ("random", "-"),
    "E, reflow": ("native", "--"),
    "E, baseline": ("baseline", "--"),
    "E, step 0": ("step 0", "--"),
}


def shared_movement(change, rng):
    """Share of each row's movement (S, d) in the main directions of the other half's, (S,); 0 if still."""
    n, d = change.shape
    share = np.zeros(n)
    halves = np.array_split(rng.permutation(n), 2)
    for here, there in (halves, halves[::-1]):
        _, _, axes = np.linalg.svd(change[there], full_matrices=False)
        directions = axes[: max(1, round(d * DIRECTIONS))]
        energy = (change[here] ** 2).sum(1)
        share[here] = ((change[here] @ directions.T) ** 2).sum(1) / np.maximum(energy, 1e-30)
    return share


def moved_alone(change, lab, rng):
    """The same share if each row moves as far in a random direction, mean of N_ALONE draws, (S,)."""
    length = np.linalg.norm(change, axis=1, keepdims=True)
    free = rng.standard_normal((N_ALONE, *change.shape))
    free *= length / np.linalg.norm(free, axis=2, keepdims=True)
    return np.mean([shared_movement(each, lab.rng("halves")) for each in free], axis=0)


def own_start(lab):
    """The run's model before training; None if it did not keep that step, was imported or is untrained."""
    return lab.step0 if lab.step0.checkpoint else None


def compare_kurtosis(lab, tokens):
    """{subject: Scores} of the kurtosis of each token's recipe; of the run's own model in PCA and ICA too."""
    n = len(tokens)
    with_frequent = np.append(tokens, lab.words.known_tokens()[:POOL])

    def measure(d):
        return kurtosis(to_numpy(less_shared(d.codes, n)))  # (n,)

    found = {"reflow": lab.compare(measure, tokens=with_frequent, n_gauges=N_GAUGES)}
    for subject in lab.subjects[1:]:
        d = subject.dictionary.part(with_frequent)
        rotations = [measure(turned) for turned in lab.gauges(d, n=N_GAUGES)]
        found[subject.name] = Scores({"native": measure(d)}, rotations)
    return found


def run(lab: Lab, config=None) -> Report:
    report = Report(lab, "basis_geometry", CLAIMS)
    recipes, basis = factors(lab.model.net)
    start = own_start(lab)
    start_factors = factors((start or lab.step0).net)
    rng = lab.rng("basis")

    # The shape of the basis and of E.
    gaussian = torch.from_numpy(rng.standard_normal(basis.shape)).to(basis)
    bases = {"basis": basis, "basis, step 0": factors(lab.step0.net)[1], "basis, gaussian": gaussian}
    spectra = {name: spectrum(matrix) for name, matrix in bases.items()}
    spectra |= {f"E, {subject.name}": spectrum(subject.E.double()) for subject in lab.subjects}
    shape = {name: ranks(s) for name, s in spectra.items()}
    for name, matrix in bases.items():
        shape[name]["coherence"] = float(coherences(matrix).max())
        shape[name]["anisotropy"] = anisotropy(matrix)
    shape["basis"] |= balances((recipes, basis), start_factors)
    shape["basis"]["energy unseen"] = unseen(recipes, basis)
    for name, values in shape.items():
        for metric, value in values.items():
            report.row(metric, value, control=name)

    # Where training moved it.
    origin = start_factors[1]
    change = to_numpy(basis - origin)
    drift = to_numpy(1 - F.cosine_similarity(basis, origin))  # (S,)
    if start is None:
        report.claim("movement", missing("effect", "the run has no step 0 of its own"), PUBLISHED)
    else:
        movement = Scores({"native": shared_movement(change, lab.rng("halves"))})
        movement["moved independently"] = moved_alone(change, lab, rng)
        for name in lab.nulls.keys() - {"step 0"}:  # which has not moved
            moved = to_numpy(factors(lab.nulls[name].net)[1] - origin)
            movement[name] = shared_movement(moved, lab.rng("halves"))
        report.effect("movement", movement, "signals", published=PUBLISHED)

    # Whether its axes are privileged.
    tokens = np.sort(lab.rng("tokens").permutation(lab.words.known_tokens())[:TOKENS])
    kurtoses = compare_kurtosis(lab, tokens)
    report.signals("privileged", kurtoses["reflow"], "tokens")
    as_they_are = lab.compare(lambda d: kurtosis(to_numpy(d.codes)), tokens=tokens)
    report.scores("row kurtosis, not centred", as_they_are)
    report.numbers["row_kurtosis"] = {}
    for name, scores in kurtoses.items():
        rotations = scores.gauges.mean(1)
        p = two_sided(scores.native.mean(), rotations)
        found = {"native": scores.native.mean(), "rotations": rotations, "p_two_sided": p}
        report.numbers["row_kurtosis"][name] = found
        report.scores("row kurtosis", scores, model=name)
        report.row("row kurtosis p, two-sided", p, model=name, dictionary="native")

    # Whether an independent method finds the signals in E.
    signals, counts = readable(lab.model.net), lab.words.counts
    if (counts >= SHOWN_COUNT).sum() >= 2 * signals.n_signals:
        with suppress(UserError):
            most = max(4096, 2 * signals.n_signals)
            report.numbers["recovered"] = recovered(signals, counts, lab.seed, STARTS, most=most)

    some = lab.model.dictionary.part(tokens[:PAIRS_OF])
    correlation, difference = agreement(some.codes, some.matrix())
    report.numbers |= {
        "signals": len(basis),
        "n_embd": basis.size(1),
        "shape": shape,
        "welch_bound": welch(*basis.shape),
        "drift": {"mean": drift.mean(), "min": drift.min(), "max": drift.max()},
        "recipe_and_E_cosine": {"correlation": correlation, "mean_difference": difference},
    }
    report.notes += notes(report.numbers)
    if start is None:
        report.notes.append("This run has no step 0 of its own: its movement and drift are unknown.")
    report.gallery = gallery(shape)
    draw(report, spectra, basis, gaussian, kurtoses)
    return report


def notes(numbers):
    """Sentences about the shape, and the two-sided p of every model."""
    basis, cosine, drift = numbers["shape"]["basis"], numbers["recipe_and_E_cosine"], numbers["drift"]
    p = {name: f"{found['p_two_sided']:.2f}" for name, found in numbers["row_kurtosis"].items()}
    match = numbers.get("recovered")
    recovery = f"Too few tokens were seen {SHOWN_COUNT} times to look for the signals in E anew."
    if match is not None:
        verdict = "recoverable" if match >= RECOVERED else "not recoverable"
        recovery = f"Signals found in E anew match at {match:.3f}: {verdict} (limit {RECOVERED})."
    return [
        recovery,
        f"|G - cI| / |G| = {basis['anisotropy']:.3f}. Least possible coherence {numbers['welch_bound']:.3f}. "
        f"Cosines of recipes and of E, pairs of {PAIRS_OF:,} tokens: correlation "
        f"{cosine['correlation']:.3f}, mean difference {cosine['mean_difference']:.3f}.",
        f"Drift of a row, 1 - cosine: mean {drift['mean']:.3f}, {drift['min']:.3f} to {drift['max']:.3f}.",
        f"Balance, |a - b| / (|a| + |b|) of Wr'Wr and WbWb': {basis['imbalance']:.3f}, of their changes "
        f"{basis['imbalance of changes']:.3f} (0 under gradient flow). Energy of the recipes that E never "
        f"sees: {max(0, basis['energy unseen']):.2%}.",
        "Two-sided p of the kurtosis: " + ", ".join(f"{name} {value}" for name, value in p.items()) + ".",
    ]


def gallery(shape):
    """Text: the ranks of every matrix, and the coherence of bases."""
    columns = [*shape["basis, step 0"]][:5]
    lines = [" " * 18 + "".join(f"{column:>18}" for column in columns)]
    for name, values in shape.items():
        cells = [f"{values[column]:18.4g}" if column in values else " " * 18 for column in columns]
        lines.append(f"{name:18}" + "".join(cells))
    return "\n".join(lines)


def draw(report, spectra, basis, gaussian, kurtoses):
    """Singular values; coherence of signals beside a Gaussian matrix; kurtosis beside rotations."""
    shape, privileged = report.numbers["shape"]["basis"], report["privileged"]
    title = (
        f"Effective rank {shape['effective rank']:.1f} of {len(basis)} signals, coherence "
        f"{shape['coherence']:.2f}; row kurtosis {privileged.measured.value:.3f}, rotations "
        f"{privileged.gauges.low:.3f} to {privileged.gauges.high:.3f}"
    )
    with report.figure("basis", title, 1, 3, size=(10, 3.6)) as (left, middle, right):
        for name, (colour, line) in STYLES.items():
            if name in spectra:
                s = without_rounding(spectra[name])
                left.plot(np.arange(1, len(s) + 1), s / s[0], line, color=COLOURS[colour], label=name)
        left.set(xlabel="number of singular value", ylabel="singular value / largest")
        left.set(xscale="log", yscale="log")
        learned, random = coherences(basis), coherences(gaussian)
        edges = np.linspace(0, max(learned.max(), random.max()), 30)
        middle.hist(learned, edges, histtype="step", color=COLOURS["native"], label="learned", lw=1.5)
        middle.hist(random, edges, histtype="step", color=COLOURS["random"], label="Gaussian", lw=1.5)
        middle.axvline(welch(*basis.shape), color="k", ls=":", lw=1, label="Welch bound")
        middle.set(xlabel="largest |cosine| of a signal with another", ylabel="signals")
        for ax in (left, middle):
            ax.legend(fontsize=7)
        draw_kurtoses(right, kurtoses)


def draw_kurtoses(ax, kurtoses):
    """One row for each dictionary and each other model: mean with interval; rotations as grey ticks."""
    others = {name: scores for name, scores in kurtoses.items() if name != "reflow"}
    means = kurtoses["reflow"] | {name: scores.native for name, scores in others.items()}
    rotations = {"native": kurtoses["reflow"].gauges}
    rotations |= {name: scores.gauges for name, scores in others.items()}
    for y, (name, values) in enumerate(means.items()):
        for kurtosis_of_one in rotations.get(name, ()):
            ax.plot(kurtosis_of_one.mean(), y, "|", color=COLOURS["gauges"], ms=10)
        plot_dot(ax, y, values, name)
    ax.set_yticks(range(len(means)), means)
    ax.set_ylim(len(means) - 0.5, -0.5)
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xlim(right=max(1.5, 1.6 * ax.dataLim.x1))
    ticks = [t for t in (-1, 0, 1, 3, 10, 30, 100) if ax.get_xlim()[0] <= t <= ax.get_xlim()[1]]
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.set(xlabel="excess kurtosis of a recipe, mean\n(grey: rotations of the same)")


if __name__ == "__main__":
    run_experiment(run)
