"""
What does hard sparsity (ReLU, then the k largest entries of a recipe) do to loss and to meaning?

    python experiments/hard_sparsity.py --runs='out/studies/*'

Claims
  effect   at equal data the top-k model has the higher loss.
  effect   its recipes know categories worse (precision@5) than the factored model's.
  effect   its recipes solve analogies worse (reciprocal rank by 3CosAdd) than the factored model's.
  effect   training with k entries loses less than cutting the factored model's recipes to k afterwards,
           in its own signals or in those of PCA or ICA of the same E.

Method. The largest shape of which both kinds are among the runs, paired by seed. Raw cosines fall by mere
arithmetic when supports shrink, so meaning is judged by ranks only; cosines are given as numbers. Rows of
zeros (a token whose recipe has no positive entry) are counted. Sign is confounded with sparsity in a ReLU
model, so the cut is made both ways: the k largest by size, and the k largest positive ones. A factored model
did not choose its gauge to be cut in, so PCA and ICA of its E are cut as well. Losses: over runs, rule as in
convergence.py; on 64 held-out windows of 32 tokens for the cut. Units of the others: a word, resampled by
category, or a question, by target pair; values averaged over seeds first.

Cost: half a minute for three seeds of the nano shape.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import checkpoint
from configurator import UserError
from experiments import lab, study
from experiments.nearest_neighbors import chance, cosines, precision
from experiments.semantic_algebra import CANDIDATES, QUESTIONS, build, ranks

PUBLISHED = "cosine 0.76 to 0.30, analogies 3/3 to 0/3, silhouette -0.02 (464M, OpenWebText, Top-64)"


def positive_top(dictionary, k):
    """The codes (V, S) with only the k largest positive entries of each row, as ReLU and top-k keep them."""
    return lab.largest(dictionary.codes.clamp(min=0), k)


def meaning(codes, words, labels, questions, pool):
    """(precision@5 of each word, reciprocal rank of each question, mean cosine of nearest neighbours)."""
    own = codes[words]
    near = cosines(own, own.mean(0))
    rows = codes[pool]
    rank = ranks(rows - rows.mean(0), questions, methods=("3CosAdd",))["3CosAdd"]
    raw = cosines(own).fill_diagonal_(-1)
    return precision(near, labels, 5), 1 / rank, raw.amax(1).mean().item()


def run(runs):
    table = runs.by_shape()
    sizes = {size for kind, size in table if kind == "topk"} & {
        size for kind, size in table if kind == "factored"
    }
    if not sizes:
        raise UserError("no top-k and factored runs of one shape among --runs: python experiments/studies.py")
    size = max(sizes, key=lambda s: next(iter(table["factored", s].values()))[1])
    pairs = {
        seed: {kind: table[kind, size][seed][2] for kind in ("factored", "topk")}
        for seed in sorted(table["factored", size].keys() & table["topk", size].keys())
    }
    if not pairs:
        raise UserError(f"no seed that both a top-k and a factored run of {size} have among --runs")
    report = lab.Report(runs, "hard_sparsity")
    room = lab.Lab(lab.LabConfig(run=str(pairs[min(pairs)]["factored"])))
    categories = room.categories()
    words = torch.tensor([i for ids in categories.values() for i in ids], device=room.device)
    labels = np.repeat(list(categories), [len(ids) for ids in categories.values()])
    pool = room.known_words()[:CANDIDATES]
    place = {int(t): i for i, t in enumerate(pool)}
    relations = {name: r["pairs"] for name, r in room.probe("analogies").items()}
    questions, target, _ = build(
        relations, lambda w: place.get(room.known(w)), room.rng("questions"), QUESTIONS
    )
    x, y = room.heldout(64, 32)

    found = {kind: [] for kind in ("factored", "topk")}
    cut = {"trained": [], "by size": [], "positive": [], "pca": [], "ica": []}
    for seed, folders in pairs.items():
        subjects = {}
        for kind, run_folder in folders.items():
            step = checkpoint.newest_whole(run_folder)[0]
            subjects[kind], _ = lab.open_subject(run_folder.name, step, room.device)
            codes = subjects[kind].dictionary.codes
            found[kind].append(
                meaning(codes, words, labels, questions, torch.as_tensor(pool).to(room.device))
            )
            report.row("rows of zeros", (codes == 0).all(1).double().mean().item(), model=run_folder.name)
            report.row("mean cosine of the nearest neighbour", found[kind][-1][2], model=run_folder.name)
        k, d = subjects["topk"].net.config.top_k, subjects["factored"].dictionary
        nets = {
            "trained": subjects["topk"].net,
            "by size": lab.with_matrix(subjects["factored"].net, lab.largest(d.codes, k) @ d.atoms),
            "positive": lab.with_matrix(subjects["factored"].net, positive_top(d, k) @ d.atoms),
        }
        for name, rival in room.rivals(subjects["factored"]).items():
            nets[name] = lab.with_matrix(subjects["factored"].net, lab.largest(rival.codes, k) @ rival.atoms)
        for name, net in nets.items():
            losses = lab.token_losses(net, x, y).double().mean(1).cpu().numpy()  # (windows,)
            cut[name].append(losses)
            report.row("loss, held-out windows", losses.mean(), model=f"seed {seed}", control=name)

    gap = np.array([table["factored", size][s][0] / table["topk", size][s][0] - 1 for s in pairs])
    text = f"at equal data the factored model's loss is below the top-k model's ({size}, k = {k}; relative)"
    report.claim(study.below(text, gap, 0.0, "seeds", {}))
    mean = {kind: [np.mean([f[i] for f in found[kind]], axis=0) for i in range(2)] for kind in found}
    for i, (text, unit, groups) in enumerate(
        (
            (
                "hard sparsity costs recipes their categories (precision@5, factored against top-k)",
                "categories",
                labels,
            ),
            (
                "hard sparsity costs recipes their analogies (reciprocal rank, factored against top-k)",
                "pairs",
                target,
            ),
        )
    ):
        measured, controls = mean["factored"][i], {"top-k": mean["topk"][i]}
        if i == 0:  # what is no better than chance cannot be lost
            controls["chance"] = chance(labels)
        report.claim(lab.effect(text, measured, controls, unit, groups, published=PUBLISHED))
    report.claim(
        lab.effect(
            f"training with {k} entries loses less than cutting recipes to {k} afterwards (held-out loss)",
            np.mean(cut["trained"], axis=0),
            {f"cut, {name}": np.mean(cut[name], axis=0) for name in cut if name != "trained"},
            "windows",
            lower=True,
        )
    )
    report.numbers = {
        "size": size,
        "k": k,
        "seeds": len(pairs),
        "loss": {kind: [table[kind, size][s][0] for s in pairs] for kind in found},
        "gap": vars(study.t_interval(gap)),
        "precision@5": {kind: [float(f[0].mean()) for f in found[kind]] for kind in found},
        "mrr": {kind: [float(f[1].mean()) for f in found[kind]] for kind in found},
        "neighbour_cosine": {kind: [f[2] for f in found[kind]] for kind in found},
        "held_out_loss": {name: [float(v.mean()) for v in cut[name]] for name in cut},
    }
    cosine = report.numbers["neighbour_cosine"]
    near = {kind: np.mean(values) for kind, values in cosine.items()}
    report.notes.append(
        f"{len(pairs)} seeds, {len(words)} words, {len(questions)} questions. Mean raw cosine of the nearest "
        f"neighbour: factored {near['factored']:.2f}, top-k {near['topk']:.2f}."
    )
    figure(report)
    return report


def figure(report):
    plt = lab.pyplot()
    n = report.numbers
    fig, axes = plt.subplots(1, 4, figsize=(10, 3))
    colours = {"factored": lab.COLOURS["native"], "topk": lab.COLOURS["ica"]}
    panels = ("loss", "precision@5", "mrr")
    for ax, name in zip(axes, panels, strict=False):
        for i, (kind, values) in enumerate(n[name].items()):
            ax.scatter(np.full(len(values), i), values, color=colours[kind])
        ax.set_xticks([0, 1], list(n[name]))
        ax.set(
            xlim=(-0.5, 1.5),
            ylabel={"loss": "validation loss, nats per token", "mrr": "analogy MRR"}.get(name, name),
        )
    for i, (name, values) in enumerate(n["held_out_loss"].items()):
        colour = colours["topk" if name == "trained" else "factored"]
        axes[3].scatter(np.full(len(values), i), values, color=colour)
    axes[3].set_xticks(range(5), ["trained", "cut", "positive", "PCA", "ICA"], fontsize=7)
    axes[3].set(xlim=(-0.5, 4.5), ylabel="loss on held-out windows")
    loss = {kind: np.mean(v) for kind, v in n["loss"].items()}
    title = (
        f"Top-{n['k']} recipes: loss {loss['topk']:.2f} against {loss['factored']:.2f}, precision@5 "
        f"{np.mean(n['precision@5']['topk']):.3f} against {np.mean(n['precision@5']['factored']):.3f} "
        f"({n['seeds']} seeds, one dot each)"
    )
    report.figure(fig, "hard_sparsity", title)


if __name__ == "__main__":
    study.compare(run)
