"""
Are recipes sparse, and are they sparse in the learned signals more than in any others?

    python experiments/sparsity_profile.py --run=out/reflow-nano

Claims
  effect   a recipe is sparser than a Gaussian vector: the Gini coefficient of its row is above that of
           a Gaussian row and above the same row's before training.
  signals  it is sparser in the native signals than in random rotations of them, in PCA and in ICA.
  signals  a few signals carry the function: keeping the largest eighth of each recipe costs less validation
           loss natively than under random rotations, PCA and ICA.

Method. An activation rate means nothing without its threshold (a Gaussian row has 11.4 % of its entries above
1.58 of its root mean square), so the rate is given as a curve. Rows: Gini, Hoyer, excess kurtosis and
participation ratio (Hurley & Rickard, 0811.4706), by decile of token frequency, because rare tokens stay near
their start. Columns: the same over tokens, how selective a signal is. Usage: Gini over signals of their total
load, evenness of use, which is not sparsity. Function: loss of the same model with E' = top_k(codes) @ atoms
on both sides. Unit of the row statistics: a token seen in training; of the loss: 16 held-out tokens in a row.

Cost: 36 forward passes over 512 tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import numpy as np

from experiments import lab

PUBLISHED = "11.38 % active, usage Gini 0.085 (464M, OpenWebText, threshold not stated)"
THRESHOLDS = (0.25, 0.5, 1.0, 1.58, 2.0, 3.0, 4.0)  # in root mean squares of the row


def hoyer(rows):
    """(sqrt S - |x|_1 / |x|_2) / (sqrt S - 1) of rows (n, S), 0 for even to 1 for one entry, (n,)."""
    root = np.sqrt(rows.shape[1])
    return (root - np.abs(rows).sum(1) / np.sqrt((rows**2).sum(1))) / (root - 1)


def participation(rows):
    """(sum x^2)^2 / (S sum x^4) of rows (n, S), 1 for even to 1/S for one entry, (n,)."""
    return (rows**2).sum(1) ** 2 / (rows**4).sum(1) / rows.shape[1]


MEASURES = {"gini": lab.gini, "hoyer": hoyer, "kurtosis": lab.kurtosis, "participation": participation}


def active(rows, threshold):
    """Share of entries of rows (n, S) above `threshold` root mean squares of their row."""
    return (np.abs(rows) > threshold * np.sqrt((rows**2).mean(1, keepdims=True))).mean()


def run(laboratory):
    report = lab.Report(laboratory, "sparsity_profile")
    subject = laboratory.reflow
    known = laboratory.known_tokens()
    tokens = np.sort(laboratory.rng("tokens").permutation(known)[:2000])

    def rows_of(dictionary):
        return dictionary.codes[tokens].double().cpu().numpy()  # (n, S)

    own = rows_of(subject.dictionary)
    rivals = {name: rows_of(d) for name, d in laboratory.rivals(subject).items()}
    spins = list(laboratory.rotations(subject.dictionary))
    turned = [rows_of(d) for d in spins]
    rng = laboratory.rng("nulls")
    nulls = {
        "gaussian": rng.standard_normal(own.shape),
        "laplace": rng.laplace(size=own.shape),
        "step 0": rows_of(laboratory.step0.dictionary),
    }
    everything = {"native": own, "rotated": turned[0], **rivals, **nulls}
    if laboratory.baseline:
        everything["baseline"] = rows_of(laboratory.baseline.dictionary)
    for name, rows in everything.items():
        for metric, measure in MEASURES.items():
            report.row(f"row {metric}", measure(rows).mean(), dictionary=name)
            report.row(f"column {metric}", measure(rows.T).mean(), dictionary=name)
        report.row("usage gini", lab.gini(np.abs(rows).sum(0)[None])[0], dictionary=name)
        for t in THRESHOLDS:
            report.row(f"active above {t} rms", active(rows, t), dictionary=name)
    order = np.argsort(-laboratory.counts[tokens], kind="stable")
    deciles = [lab.gini(own[part]).mean() for part in np.array_split(order, 10)]
    for i, value in enumerate(deciles):
        report.row("row gini", value, dictionary="native", control=f"frequency decile {i + 1}")

    measured = lab.gini(own)
    report.claim(
        lab.effect(
            "recipes are sparser than Gaussian rows and than before training (Gini)",
            measured,
            {name: lab.gini(nulls[name]) for name in ("gaussian", "step 0")},
            "tokens",
            published=PUBLISHED,
        )
    )
    report.claim(
        lab.signals(
            "recipes are sparser in the native signals than in any others (Gini)",
            measured,
            [lab.gini(rows) for rows in turned],
            {name: lab.gini(rows) for name, rows in rivals.items()},
            "tokens",
        )
    )

    # What truncation costs. The claim is tested at one k, fixed beforehand: an eighth of the signals.
    x, y = laboratory.heldout(32, 16)
    groups = np.repeat(np.arange(len(x)), x.size(1))

    def loss(dictionary, k):
        net = lab.with_matrix(subject.net, lab.largest(dictionary.codes, k) @ dictionary.atoms)
        return lab.token_losses(net, x, y).flatten().cpu().numpy()

    n_signals = len(subject.dictionary.atoms)
    test_k, ks = max(1, n_signals // 8), sorted({max(1, n_signals // s) for s in (16, 8, 4, 2)})
    whole = lab.token_losses(subject.net, x, y).flatten().cpu().numpy()
    curves = {}
    for name, d in {"native": subject.dictionary, **laboratory.rivals(subject)}.items():
        curves[name] = {k: loss(d, min(k, len(d.atoms))) - whole for k in ks}
    rotated = np.stack([loss(d, test_k) - whole for d in spins])
    curves["rotated"] = {
        k: np.mean([loss(d, k) - whole for d in spins[:2]], axis=0) for k in ks if k != test_k
    }
    curves["rotated"] = dict(sorted({**curves["rotated"], test_k: rotated.mean(0)}.items()))
    for name, curve in curves.items():
        for k, values in curve.items():
            report.row(f"loss added, top {k}", values.mean(), dictionary=name)
    report.claim(
        lab.signals(
            f"keeping the {test_k} largest of {n_signals} signals of a recipe costs less than in any others",
            curves["native"][test_k],
            rotated,
            {name: curves[name][test_k] for name in ("pca", "ica")},
            "windows",
            groups,
            lower=True,
        )
    )

    report.numbers = {
        "gini": {name: float(lab.gini(rows).mean()) for name, rows in everything.items()},
        "usage_gini": {
            name: float(lab.gini(np.abs(rows).sum(0)[None])[0]) for name, rows in everything.items()
        },
        "active": {
            name: {t: float(active(rows, t)) for t in THRESHOLDS} for name, rows in everything.items()
        },
        "gini_by_frequency_decile": deciles,
        "loss_added": {
            name: {k: float(v.mean()) for k, v in curve.items()} for name, curve in curves.items()
        },
        "loss": float(whole.mean()),
    }
    report.notes.append(
        f"11.38 % of a Gaussian row lie above 1.58 rms; of the native rows, {active(own, 1.58):.2%} do."
    )
    figures(report, everything, curves, groups, whole.mean())
    return report


def figures(report, everything, curves, groups, loss):
    plt = lab.pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    grid = np.linspace(0, 4, 81)
    for name in ("native", "rotated", "pca", "ica", "gaussian", "laplace", "step 0"):
        style = {"gaussian": ("k", "--"), "laplace": ("k", ":")}.get(name) or (lab.COLOURS[name], "-")
        left.plot(grid, [active(everything[name], t) for t in grid], style[1], color=style[0], label=name)
    left.set(xlabel="threshold, root mean squares of the row", ylabel="share of entries above", yscale="log")
    left.set_ylim(1e-3, 1)
    left.legend()
    for name, curve in curves.items():
        means = [lab.estimate(v, groups) for v in curve.values()]
        errors = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
        right.errorbar(
            list(curve), [m.value for m in means], errors, color=lab.COLOURS[name], label=name, capsize=2
        )
    right.set_xscale("log", base=2)
    right.set(xlabel="signals kept in each recipe", ylabel=f"loss added to {loss:.2f}, nats per token")
    right.legend()
    gini = report.numbers["gini"]
    title = (
        f"Row Gini {gini['native']:.3f} against {gini['rotated']:.3f} rotated and {gini['gaussian']:.3f} for "
        f"a Gaussian; {report.claims[2].verdict}: native signals survive truncation better"
    )
    report.figure(fig, "sparsity", title)


if __name__ == "__main__":
    lab.main(run)
