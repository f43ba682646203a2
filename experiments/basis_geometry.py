"""
What shape has the learned basis, did training shape it, and are its axes privileged?

    python experiments/basis_geometry.py --run=out/reflow-nano

Claims
  effect   training moved the basis in a coordinated way: more of a row's movement lies in the main
           directions of the other rows' movement than if every row had moved as far in one of its own.
  signals  the axes are privileged: the rows of the recipes have more excess kurtosis in the native signals
           than in random rotations of them, in PCA and in ICA.

Method. W_basis (S, d) and E: singular values, effective rank exp(entropy) (Roy & Vetterli, 2007), stable
rank, condition number. Coherence: the largest |cosine| of two signals, beside a Gaussian matrix and Welch's
lower bound. Anisotropy: how far G = WbWb' is from a multiple of I, where recipe cosines would be E's.
Balance: the gradient flow of a product conserves Wr'Wr - WbWb', so the changes of the two are compared.
Unseen energy: the recipes' part in the left null space of W_basis, if S > d. Drift: 1 - cosine of a row with
its start. Movement: rows fall in two random halves; the main directions, d/16 of them, are the right singular
vectors of one half's change, and are applied to the other. Independent movement gives 1/16.
Kurtosis: an optimiser that works coordinate by coordinate can favour axes (Elhage et al., "Privileged bases
in the transformer residual stream", 2023). Either way: recipes may also be *less* kurtotic than all their
rotations, so the notes have an exact two-sided randomisation p (at least 1/20), by the distance from the mean
of all twenty; the same for a plain GPT. Unit of movement: a row of the basis; of kurtosis: a token seen in
training.

Cost beside ICA: 40 singular value decompositions, 19 rotations for each model, the spectra of E: on one core
4 s for 64 signals, 90 s for 1,024.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import numpy as np
import torch

from experiments import lab

PUBLISHED = '"continuous, low-redundancy" basis, no numbers (464M, OpenWebText)'
DIRECTIONS = 1 / 16  # of d: the main directions of movement
TOKENS = 2000  # whose kurtosis is measured


def factors(net):
    """(recipes (n_tokens, S), basis (S, d)) as they are in the model, float64; a dense one has a basis I."""
    recipes = net.vocab.recipes().detach()[: net.config.n_tokens].double()
    basis = getattr(net.vocab, "basis", None)
    return recipes, torch.eye(recipes.size(1)).to(recipes) if basis is None else basis.detach().double()


def spectrum(matrix):
    """Singular values of a matrix, largest first; min(rows, columns) of them."""
    tall = matrix if len(matrix) >= matrix.size(1) else matrix.T
    return torch.linalg.eigvalsh(tall.T @ tall).clamp(min=0).sqrt().flip(0).cpu().numpy()


def ranks(s):
    """{measure: value} of singular values s; those below a millionth of the largest are rounding."""
    s = s[s > s[0] * 1e-6]
    p = s / s.sum()
    return {
        "rank": len(s),
        "effective rank": float(np.exp(-(p * np.log(p)).sum())),
        "stable rank": float((s**2).sum() / s[0] ** 2),
        "condition number": float(s[0] / s[-1]),
    }


def coherences(rows):
    """Largest |cosine| of each row (S, d) with another one, (S,)."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    return (unit @ unit.T).abs().fill_diagonal_(0).amax(1).cpu().numpy()


def welch(n, d):
    """The least coherence that n directions in d dimensions can have."""
    return float(np.sqrt((n - d) / (d * (n - 1)))) if n > d else 0.0


def imbalance(a, b):
    """|A - B| / (|A| + |B|) of two matrices: 0 if they are equal, at most 1."""
    return float((a - b).norm() / (a.norm() + b.norm()).clamp(min=1e-30))


def balance(recipes, basis):
    """(Wr'Wr, WbWb'), (S, S) each: gradient flow changes both by the same."""
    return recipes.T @ recipes, basis @ basis.T


def unseen(recipes, basis):
    """Share of the recipes' energy that E never sees: the part that the basis maps to zero."""
    u, s, _ = torch.linalg.svd(basis, full_matrices=False)
    seen = recipes @ u[:, s > s[0] * 1e-9]
    return float(1 - (seen**2).sum() / (recipes**2).sum())


def anisotropy(basis):
    """|G - cI| / |G| of G = WbWb' with the best c: 0 if recipe cosines are E's cosines."""
    g = basis @ basis.T
    return float((g - g.trace() / len(g) * torch.eye(len(g)).to(g)).norm() / g.norm())


def agreement(codes, E):
    """Correlation and mean difference of the cosines of all pairs of rows in codes (n, S) and in E (n, d)."""
    i, j = torch.triu_indices(len(E), len(E), 1)
    a, b = ((u := torch.nn.functional.normalize(x, dim=1)) @ u.T for x in (codes, E))
    a, b = a[i, j].cpu().numpy(), b[i, j].cpu().numpy()
    return float(np.corrcoef(a, b)[0, 1]), float(np.abs(a - b).mean())


def shared_movement(change, rng):
    """Share of each row's movement (S, d) in the main directions of the other half's, (S,); 0 if still."""
    n, d = change.shape
    halves, share = np.array_split(rng.permutation(n), 2), np.zeros(n)
    for here, there in (halves, halves[::-1]):
        directions = np.linalg.svd(change[there], full_matrices=False)[2][: max(1, round(d * DIRECTIONS))]
        energy = (change[here] ** 2).sum(1)
        share[here] = ((change[here] @ directions.T) ** 2).sum(1) / np.maximum(energy, 1e-30)
    return share


def own_start(laboratory):
    """The run's model before training: the run itself at step 0; None if it did not keep that step."""
    if laboratory.state["step"] == 0:
        return laboratory.reflow
    return laboratory.step0 if (laboratory.folder / "step_000000").is_dir() else None


def two_sided(value, others):
    """Exact p that `value` is one of the exchangeable `others`, by its distance from the mean of them all."""
    every = np.append(value, others)
    far = np.abs(every - every.mean())
    return float((far >= far[0] * (1 - 1e-12)).mean())


def row_kurtosis(dictionary, tokens=slice(None)):
    """Excess kurtosis of the codes of each token, (n,)."""
    return lab.kurtosis(dictionary.codes[tokens].double().cpu().numpy())


def run(laboratory):
    report = lab.Report(laboratory, "basis_geometry")
    subject, start = laboratory.reflow, own_start(laboratory)
    recipes, basis = factors(subject.net)
    n_signals, d = basis.shape
    rng = laboratory.rng("basis")
    gaussian = torch.from_numpy(rng.standard_normal(basis.shape)).to(basis)

    matrices = {
        "basis": basis,
        "basis, step 0": factors(laboratory.step0.net)[1],
        "basis, gaussian": gaussian,
    }
    matrices |= {f"E, {s.name}": s.E.double() for s in laboratory.subjects}
    spectra = {name: spectrum(m) for name, m in matrices.items()}
    shape = {name: ranks(s) for name, s in spectra.items()}
    for name in ("basis", "basis, step 0", "basis, gaussian"):
        shape[name]["coherence"] = float(coherences(matrices[name]).max())
        shape[name]["anisotropy"] = anisotropy(matrices[name])
    now, then = balance(recipes, basis), balance(*factors((start or laboratory.step0).net))
    changes = imbalance(now[0] - then[0], now[1] - then[1])
    shape["basis"] |= {"imbalance": imbalance(*now), "imbalance of changes": changes}
    shape["basis"]["energy unseen"] = unseen(recipes, basis)
    for name, values in shape.items():
        for metric, value in values.items():
            report.row(metric, value, control=name)

    # Movement
    origin = factors((start or laboratory.step0).net)[1]
    change = (basis - origin).cpu().numpy()
    drift = (1 - torch.nn.functional.cosine_similarity(basis, origin)).cpu().numpy()
    moved = shared_movement(change, laboratory.rng("halves"))
    length = np.linalg.norm(change, axis=1, keepdims=True)
    free = rng.standard_normal((lab.ROTATIONS, *change.shape))
    free *= length / np.linalg.norm(free, axis=2, keepdims=True)
    alone = np.mean([shared_movement(x, laboratory.rng("halves")) for x in free], axis=0)
    report.claim(
        lab.effect(
            "training moved the signals in common directions (share of movement in the main ones of others)",
            moved,
            {"moved independently": alone} if start else {},
            "signals",
            published=PUBLISHED,
        )
    )

    # Privileged axes
    tokens = np.sort(laboratory.rng("tokens").permutation(laboratory.known_tokens())[:TOKENS])
    kurtoses, p = {}, {}
    for s in laboratory.subjects:
        part = lab.Dictionary("native", s.dictionary.codes[tokens], s.dictionary.atoms)
        turned = np.stack([row_kurtosis(r) for r in laboratory.rotations(part)])
        kurtoses[s.name] = row_kurtosis(part), turned
        own, others = kurtoses[s.name][0].mean(), kurtoses[s.name][1].mean(1)
        p[s.name] = two_sided(own, others)
        report.row("row kurtosis", own, model=s.name, dictionary="native")
        report.row("row kurtosis p, two-sided", p[s.name], model=s.name, dictionary="native")
        for i, value in enumerate(others):
            report.row("row kurtosis", value, model=s.name, dictionary="rotated", control=f"rotation {i}")
    rivals = {name: row_kurtosis(r, tokens) for name, r in laboratory.rivals(subject).items()}
    for name, values in rivals.items():
        report.row("row kurtosis", values.mean(), model=subject.name, dictionary=name)
    report.claim(
        lab.signals(
            "the axes are privileged: recipes are more kurtotic in the native signals than in any others",
            *kurtoses[subject.name],
            rivals,
            "tokens",
        )
    )

    some = torch.from_numpy(tokens[:1000]).to(subject.E.device)
    r, difference = agreement(subject.dictionary.codes[some], subject.E[some])
    projector = torch.linalg.svd(origin, full_matrices=False)[2]  # (min(S, d), d)
    E = matrices[f"E, {subject.name}"]
    outside = float(1 - ((E @ projector.T) ** 2).sum() / (E**2).sum())
    report.numbers = {
        "signals": n_signals,
        "n_embd": d,
        "shape": shape,
        "welch_bound": welch(n_signals, d),
        "drift": dict(zip(("mean", "min", "max"), (drift.mean(), drift.min(), drift.max()), strict=True)),
        "recipe_and_E_cosine": {"correlation": r, "mean_difference": difference},
        "E_outside_the_span_of_the_start": outside,
        "row_kurtosis": {
            name: {"native": own.mean(), "rotations": others.mean(1).tolist(), "p_two_sided": p[name]}
            for name, (own, others) in kurtoses.items()
        },
    }
    report.notes += notes(report.numbers, subject.name)
    if start is None:
        report.notes.append("The run's own step 0 was not kept: its drift is unknown.")
    report.gallery = gallery(shape)
    figures(report, spectra, basis, gaussian, kurtoses, rivals)
    return report


def notes(numbers, subject):
    basis, null = numbers["shape"]["basis"], numbers["shape"]["basis, gaussian"]
    k, cosine, drift = numbers["row_kurtosis"][subject], numbers["recipe_and_E_cosine"], numbers["drift"]
    side = "more" if k["native"] > np.mean(k["rotations"]) else "less"
    lines = [
        f"Signals: coherence {basis['coherence']:.3f} (Gaussian {null['coherence']:.3f}, least possible "
        f"{numbers['welch_bound']:.3f}), condition number {basis['condition number']:.3g} (Gaussian "
        f"{null['condition number']:.3g}), |G - cI| / |G| = {basis['anisotropy']:.3f}.",
        f"Recipe cosine against E cosine, pairs of 1,000 tokens: correlation {cosine['correlation']:.3f}, "
        f"mean difference {cosine['mean_difference']:.3f}.",
        f"Drift of a row, 1 - cosine: mean {drift['mean']:.3f}, {drift['min']:.3f} to {drift['max']:.3f}; "
        f"{numbers['E_outside_the_span_of_the_start']:.1%} of E's energy is outside the span of the start.",
        f"Balance, |a - b| / (|a| + |b|) of Wr'Wr and WbWb': {basis['imbalance']:.3f}, of their changes "
        f"{basis['imbalance of changes']:.3f} (0 under gradient flow); recipes' energy that E never sees: "
        f"{basis['energy unseen']:.2%}.",
        f"Two-sided: recipes are {side} kurtotic than the mean rotation, p = {k['p_two_sided']:.2f}.",
    ]
    if "baseline" in numbers["row_kurtosis"]:
        p = numbers["row_kurtosis"]["baseline"]["p_two_sided"]
        lines.append(f"Two-sided, rows of the plain GPT's E in its own coordinates: p = {p:.2f}.")
    return lines


def gallery(shape):
    columns = ("rank", "effective rank", "stable rank", "condition number", "coherence")
    lines = [f"{'':18}" + "".join(f"{c:>18}" for c in columns)]
    for name, values in shape.items():
        cells = (f"{values[c]:18.4g}" if c in values else f"{'':18}" for c in columns)
        lines.append(f"{name:18}" + "".join(cells))
    return "\n".join(lines)


def figures(report, spectra, basis, gaussian, kurtoses, rivals):
    plt = lab.pyplot()
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.6))
    styles = {"basis": ("native", "-"), "basis, step 0": ("step 0", "-"), "basis, gaussian": ("random", "-")}
    styles |= {
        "E, reflow": ("native", "--"),
        "E, baseline": ("baseline", "--"),
        "E, step 0": ("step 0", "--"),
    }
    for name, s in spectra.items():
        s = s[s > s[0] * 1e-6]
        colour, line = styles[name]
        left.plot(np.arange(1, len(s) + 1), s / s[0], line, color=lab.COLOURS[colour], label=name)
    left.set(xlabel="number of singular value", ylabel="singular value / largest", yscale="log", xscale="log")
    left.legend(fontsize=7)

    values = {"learned": coherences(basis), "Gaussian": coherences(gaussian)}
    edges = np.linspace(0, max(v.max() for v in values.values()), 30)
    for (label, v), colour in zip(values.items(), ("native", "random"), strict=True):
        middle.hist(v, edges, histtype="step", color=lab.COLOURS[colour], label=label, lw=1.5)
    middle.axvline(welch(*basis.shape), color="k", ls=":", lw=1, label="Welch bound")
    middle.set(xlabel="largest |cosine| of a signal with another", ylabel="signals")
    middle.legend(fontsize=7)

    points = {"native": kurtoses["reflow"], **{k: (v, None) for k, v in rivals.items()}}
    points |= {name: kurtoses[name] for name in ("baseline", "step 0") if name in kurtoses}
    for y, (name, (own, others)) in enumerate(points.items()):
        if others is not None:
            right.plot(others.mean(1), [y] * len(others), "|", color=lab.COLOURS["rotated"], ms=10)
        right.plot(own.mean(), y, "o", color=lab.COLOURS[name])
    right.set_yticks(range(len(points)), list(points))
    right.set_ylim(len(points) - 0.5, -0.5)
    right.set_xscale("symlog", linthresh=1)
    right.set_xlim(right=max(1.5, 1.6 * right.dataLim.x1))
    ticks = [t for t in (-1, 0, 1, 3, 10, 30, 100) if right.get_xlim()[0] <= t <= right.get_xlim()[1]]
    right.set_xticks(ticks, ticks)
    right.minorticks_off()
    right.set(xlabel="excess kurtosis of a recipe, mean\n(grey: 19 rotations of the same)")
    k = report.numbers["row_kurtosis"]["reflow"]
    b = report.numbers["shape"]["basis"]
    title = (
        f"Effective rank {b['effective rank']:.1f} of {len(basis)} signals, coherence {b['coherence']:.2f}; "
        f"row kurtosis {k['native']:.3f}, rotations {min(k['rotations']):.3f} to {max(k['rotations']):.3f}"
    )
    report.figure(fig, "basis", title)


if __name__ == "__main__":
    lab.main(run)
