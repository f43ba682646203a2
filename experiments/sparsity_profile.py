"""
Are recipes sparse, and are they sparser in the learned signals than in any others?

    python experiments/sparsity_profile.py --run=out/reflow-nano

Method
    An activation rate means nothing without its threshold: a Gaussian row has 11.4 % of its entries above
    1.58 of its root mean square. The rate is therefore given at seven thresholds. Rows, the recipes of 2,000
    tokens: Gini, Hoyer, excess kurtosis and participation ratio (Hurley & Rickard, 0811.4706), and Gini by
    decile of token frequency, because rare tokens stay near their start. Columns: the same over tokens, which
    is how selective a signal is. Usage: Gini over signals of their total load. It says how evenly signals are
    used, which is not sparsity. All are of codes less m, each signal's median over the 2,000 most frequent
    tokens: a vector that all recipes share would make every one of them look dense. rows.csv has the codes as
    they are, too. Controls of "sparse" are Gaussian rows, also with the covariance of the recipes: columns of
    unequal size raise the Gini without sparsity.

    Function: the loss of the same model with E' = (m + top_k(codes - m)) @ atoms at input and output. The
    claim is about one k, fixed beforehand: an eighth of the signals. At that k all 19 rotations are cut, at
    the other sizes, and of codes as they are, two of them. The Gini is compared with 99 rotations.

    Unit: a token seen in training; for the loss, a held-out window of 16 tokens.

Cost
    43 forward passes of 512 tokens, each with its own E.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
import numpy as np
import torch

import hooks
from dictionary import top_k
from experiments.lab import Lab, Report, Scores, run_experiment
from experiments.lab.claims import to_numpy
from experiments.lab.plots import COLOURS, plot_band
from experiments.lab.spaces import POOL, less_shared
from experiments.lab.stats import gini, kurtosis

CLAIMS = {
    "sparse": "recipes are sparser than Gaussian rows and than in null models (Gini)",
    "privileged": "recipes are sparser in the native signals than in any others (Gini)",
    "truncation": "keeping the largest eighth of each recipe costs less loss than in any other signals",
}
PUBLISHED = "11.38 % active, usage Gini 0.085 (464M, OpenWebText, threshold not stated)"
CONTROLS = ("gaussian", "gaussian, same covariance")  # beside the null models
N_TOKENS = 2000
N_GAUGES = 99  # rotations that the Gini is compared with
THRESHOLDS = (0.25, 0.5, 1.0, 1.58, 2.0, 3.0, 4.0)  # in root mean squares of the row
DIVISORS = (16, 8, 4, 2)  # recipes keep S / divisor of their S entries
N_ROTATIONS = 2  # that are cut at other sizes than an eighth
N_WINDOWS, WINDOW = 32, 16  # held-out text
DASHES = {"gaussian": "--", "laplace": ":"}  # of the activation curves


def hoyer(rows):
    """(sqrt S - |x|_1 / |x|_2) / (sqrt S - 1) of rows (n, S), 0 for even to 1 for one entry, (n,)."""
    root = np.sqrt(rows.shape[1])
    return (root - np.abs(rows).sum(1) / np.sqrt((rows**2).sum(1))) / (root - 1)


def participation(rows):
    """(sum x^2)^2 / (S sum x^4) of rows (n, S), 1 for even to 1/S for one entry, (n,)."""
    square = rows * rows
    return square.sum(1) ** 2 / (square * square).sum(1) / rows.shape[1]


MEASURES = {"gini": gini, "hoyer": hoyer, "kurtosis": kurtosis, "participation": participation}


def active_share(rows, threshold):
    """Share of entries of rows (n, S) above `threshold` root mean squares of their row, (n,)."""
    rms = np.sqrt((rows**2).mean(1, keepdims=True))
    return (np.abs(rows) > threshold * rms).mean(1)


def measure(rows):
    """{metric: values} of rows (n, S): one value a row, one a signal, or one of all."""
    found = {f"row {name}": f(rows) for name, f in MEASURES.items()}
    found |= {f"column {name}": f(rows.T) for name, f in MEASURES.items()}
    found["usage_gini"] = gini(np.abs(rows).sum(0)[None])
    found["active"] = np.stack([active_share(rows, t) for t in THRESHOLDS], axis=1)  # (n, thresholds)
    return found


def rows_of(d, n):
    """Codes of the first n tokens of a dictionary, less what the others, frequent ones, share."""
    return to_numpy(less_shared(d.codes, n))


def random_rows(native, rng):
    """{name: random rows (n, S)} beside the native ones, rows (n, S)."""
    gaussian = rng.standard_normal(native.shape)
    root = np.linalg.qr(native, mode="r") / np.sqrt(len(native))  # root.T @ root: mean of x x^T over rows x
    return {
        "gaussian": gaussian,
        "laplace": rng.laplace(size=native.shape),
        "gaussian, same covariance": rng.standard_normal((len(native), len(root))) @ root,
    }


def losses_of_cut_recipes(lab):
    """({k: Scores of the losses of held-out windows with k entries a recipe}, ...).

    Then the Scores at an eighth if what recipes share is cut as well, and the losses of the whole model.
    """
    x, y = lab.heldout(N_WINDOWS, WINDOW)
    native = lab.model.dictionary
    frequent = torch.from_numpy(lab.words.known_tokens()[:POOL].copy()).to(lab.device)

    def window_losses(net):
        return to_numpy(hooks.token_losses(net, x, y)).mean(1)  # (windows,)

    def cut(d, k, keep_shared=True):
        shared = d.codes[frequent].median(0).values if keep_shared else 0.0  # (S,)
        codes = shared + top_k(d.codes - shared, k)
        return window_losses(hooks.with_embedding(lab.model.net, codes @ d.atoms))

    def cut_some(*how):
        """Scores with few rotations."""
        named = {"native": native, **lab.rivals()}
        rotations = lab.gauges(native, n=N_ROTATIONS)
        return Scores({name: cut(d, *how) for name, d in named.items()}, [cut(d, *how) for d in rotations])

    losses = {}
    for k in sorted({max(1, native.n_signals // divisor) for divisor in DIVISORS}):
        is_claim = k == native.eighth
        losses[k] = lab.compare(functools.partial(cut, k=k)) if is_claim else cut_some(k)
    return losses, cut_some(native.eighth, False), window_losses(lab.model.net)


def run(lab: Lab, config=None) -> Report:
    report = Report(lab, "sparsity_profile", CLAIMS)
    native = lab.model.dictionary
    tokens = np.sort(lab.rng("tokens").permutation(lab.words.known_tokens())[:N_TOKENS])

    # How sparse recipes are, in every dictionary and beside rows that are no recipes.
    n = len(tokens)
    with_frequent = np.append(tokens, lab.words.known_tokens()[:POOL])
    found = lab.compare(lambda d: measure(rows_of(d, n)), tokens=with_frequent)
    rows = random_rows(rows_of(native.part(with_frequent), n), lab.rng("nulls"))
    for name, subject in lab.models.items():
        if subject is not lab.model:
            rows[name] = rows_of(subject.dictionary.part(with_frequent), n)
    for name, values_of in ((name, measure(part)) for name, part in rows.items()):
        for metric, values in values_of.items():
            found[metric][name] = values
    sparsity = found.pop("row gini")
    nothing = Scores({name: sparsity[name] for name in ("native", *CONTROLS, *lab.nulls)})
    report.effect("sparse", nothing, "tokens", published=PUBLISHED)
    privileged = lab.compare(lambda d: gini(rows_of(d, n)), tokens=with_frequent, n_gauges=N_GAUGES)
    report.signals("privileged", privileged, "tokens")
    as_they_are = lab.compare(lambda d: gini(to_numpy(d.codes)), tokens=tokens)
    report.scores("row gini, not centred", as_they_are)
    active = found.pop("active")
    for metric, scores in found.items():
        report.scores(metric, scores)
    report.numbers["active"] = {
        name: dict(zip(THRESHOLDS, values.mean(0), strict=True))
        for name, values in {**active, "rotated": active.gauges[0]}.items()
    }
    for name, shares in report.numbers["active"].items():
        for threshold, share in shares.items():
            report.row(f"active above {threshold} rms", share, dictionary=name)

    by_count = np.argsort(-lab.words.counts[tokens], kind="stable")
    deciles = [sparsity.native[part].mean() for part in np.array_split(by_count, 10)]
    for i, value in enumerate(deciles):
        report.row("row gini", value, dictionary="native", control=f"frequency decile {i + 1}")

    # What it costs to keep only the largest entries of each recipe.
    losses, not_centred, whole = losses_of_cut_recipes(lab)
    report.scores("truncation, not centred", not_centred.map(lambda loss: loss - whole))
    added = {k: scores.map(lambda loss: loss - whole) for k, scores in losses.items()}
    report.signals("truncation", added[native.eighth], "windows", lower=True)
    curves = {name: np.stack([scores[name] for scores in added.values()], 1) for name in added[native.eighth]}
    curves["rotated"] = np.stack([scores.gauges.mean(0) for scores in added.values()], 1)  # (windows, sizes)
    report.numbers["loss_added"] = {
        name: dict(zip(added, values.mean(0), strict=True)) for name, values in curves.items()
    }
    for name, curve in report.numbers["loss_added"].items():
        for k, value in curve.items():
            report.row("loss added", value, dictionary=name, n_signals=k)

    report.numbers |= {"gini_by_frequency_decile": deciles, "loss": whole.mean()}
    share = report.numbers["active"]["native"][1.58]
    report.notes.append(
        f"Above 1.58 root mean squares: 11.4 % of a Gaussian row, {share:.1%} of the recipes."
    )
    draw(report, list(added), curves)
    return report


def draw(report, kept, curves):
    """Left: the share of entries above a threshold. Right: loss added by the number of entries kept."""
    sparse, truncation = report["sparse"], report["truncation"]
    title = (
        f"Row Gini {sparse.measured.value:.3f}, in random rotations {report['privileged'].gauges.value:.3f}, "
        f"Gaussian {sparse.controls['gaussian'].value:.3f}. An eighth of the signals adds "
        f"{truncation.measured.value:.2f} nats to the loss, in random rotations "
        f"{truncation.gauges.value:.2f} ({truncation.verdict})"
    )
    with report.figure("sparsity", title, 1, 2) as (left, right):
        for name, shares in report.numbers["active"].items():
            heights = [share or np.nan for share in shares.values()]  # the scale has no place for zero
            colour = COLOURS.get(name, "k")
            left.plot(THRESHOLDS, heights, DASHES.get(name, "o-"), ms=3, color=colour, label=name)
        left.set(
            xlabel="threshold, root mean squares of the row", ylabel="share of entries above", yscale="log"
        )
        left.set_ylim(1e-4, 1.2)
        left.legend(fontsize=7)
        for name, values in curves.items():
            plot_band(right, kept, values, name, label=name)
        right.set(xlabel="signals kept of each recipe", xscale="log")
        right.set_xticks(kept, kept)
        right.minorticks_off()
        right.set(ylabel=f"loss added to {report.numbers['loss']:.2f}, nats per token")
        right.legend()


if __name__ == "__main__":
    run_experiment(run)
