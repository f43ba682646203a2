"""
What does hard sparsity (ReLU, then the k largest entries of a recipe) do to loss and to meaning?

    python experiments/studies/hard_sparsity.py --runs='out/studies/*'

Method
    The study takes the largest shape that has runs of both kinds, paired by seed. Meaning is judged by ranks:
    precision@5 of the categories of words, and reciprocal ranks of analogies by 3CosAdd. Raw cosines are
    given as numbers only, because they fall by arithmetic alone when supports shrink. rows.csv has the share
    of recipes without a positive entry. The cut keeps the k largest entries of the factored model's recipes
    after training, by absolute value or the largest positive ones: in a ReLU model sign is confounded with
    sparsity. The factored model did not choose its signals to be cut in, so PCA and ICA of its E are cut as
    well. Losses of cut models are over 64 held-out windows of 32 tokens. Unit: a run for the loss, by the
    rule of convergence.py; a word, resampled by category; a question, resampled by target pair; a window.
    The values of words, questions and windows are averaged over seeds first.

Cost
    Half a minute for three seeds of the nano shape.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import threads
import numpy as np
import torch

import hooks
from configurator import UserError
from dictionary import top_k
from experiments.lab import Report, Scores
from experiments.lab.analogies import QUESTIONS, build, candidates, ranks, relations
from experiments.lab.claims import below
from experiments.lab.lab import open_subject
from experiments.lab.plots import COLOURS
from experiments.lab.probes import labelled
from experiments.lab.spaces import chance, cosines, precision
from experiments.lab.stats import t_interval
from experiments.studies.runs import Study, common_seeds, run_study, sizes

CLAIMS = {
    "loss": "at equal data the factored model's loss is below the top-k model's",
    "categories": "hard sparsity costs recipes their categories (precision@5, factored against top-k)",
    "analogies": "hard sparsity costs recipes their analogies (reciprocal rank, factored against top-k)",
    "trained_beats_cut": "training with k entries a recipe loses less than cutting recipes to k afterwards",
}
PUBLISHED = "cosine 0.76 to 0.30, analogies 3/3 to 0/3, silhouette -0.02 (464M, OpenWebText, Top-64)"
KINDS = ("factored", "topk")
N_WINDOWS, WINDOW = 64, 32  # held-out text


@dataclass
class Probes:
    """The words and questions whose tokens the runs have seen."""

    words: torch.Tensor  # (n,), ids of labelled words
    labels: np.ndarray  # (n,), their categories
    pool: torch.Tensor  # (m,), ids of the candidates of the analogies
    questions: np.ndarray  # (Q, 4), places in pool
    target: np.ndarray  # (Q,), the target pair of each question


def known_probes(lab):
    """The Probes whose words a lab's run has seen in training."""
    words, labels, _ = labelled(lab)
    pool, place_of = candidates(lab.words)
    questions, target, _ = build(relations(lab), place_of, lab.rng("questions"), QUESTIONS)
    return Probes(torch.from_numpy(words), labels, torch.from_numpy(pool), questions, target)


def meaning(codes, probes):
    """(precision@5 of each word, reciprocal rank of each question, mean cosine of nearest neighbours)."""
    own = codes[probes.words]  # (n, S)
    pool = codes[probes.pool]  # (m, S)
    centred = cosines(own, own.mean(0))
    rank = ranks(pool - pool.mean(0), probes.questions, methods=("3CosAdd",))["3CosAdd"]
    raw = cosines(own).fill_diagonal_(-1)
    return precision(centred, probes.labels, 5), 1 / rank, raw.amax(1).mean().item()


def cut_models(factored, k, rivals):
    """{name: model} of a factored Subject with recipes cut to k entries, its own and those of rivals."""
    d = factored.dictionary
    matrices = {
        "by size": top_k(d.codes, k) @ d.atoms,
        "positive": top_k(d.codes.clamp(min=0), k) @ d.atoms,  # as ReLU and top-k keep them
    }
    matrices |= {name: top_k(rival.codes, k) @ rival.atoms for name, rival in rivals.items()}
    return {name: hooks.with_embedding(factored.net, E) for name, E in matrices.items()}


def measure(report, runs, lab, probes):
    """{metric: {kind or model: values}} of the runs {kind: TrainedRun} of one seed; writes its rows."""
    subjects = {kind: open_subject(run.name, run.checkpoint, lab.device) for kind, run in runs.items()}
    found = {metric: {} for metric in ("precision@5", "mrr", "neighbour_cosine", "held_out_loss")}
    for kind, subject in subjects.items():
        codes = subject.dictionary.codes
        by_word, by_question, nearest = meaning(codes, probes)
        found["precision@5"][kind] = by_word
        found["mrr"][kind] = by_question
        found["neighbour_cosine"][kind] = nearest
        report.row("rows of zeros", (codes == 0).all(1).double().mean().item(), model=subject.name)
        report.row("mean cosine of the nearest neighbour", nearest, model=subject.name)

    k = subjects["topk"].net.config.top_k
    nets = {"trained": subjects["topk"].net}
    nets |= cut_models(subjects["factored"], k, lab.rivals(subjects["factored"]))
    x, y = lab.heldout(N_WINDOWS, WINDOW)
    for name, net in nets.items():
        losses = hooks.token_losses(net, x, y).double().mean(1).cpu().numpy()  # (windows,)
        found["held_out_loss"][name] = losses
        report.row("loss, held-out windows", losses.mean(), model=f"seed {runs['topk'].seed}", control=name)
    return found


def by_seed(found, metric):
    """{name: [value of every seed]} of a metric: means over words, questions or windows."""
    return {name: [float(np.mean(part[metric][name])) for part in found] for name in found[0][metric]}


def over_seeds(found, metric):
    """{name: values (n,)} of a metric, averaged over seeds."""
    return {name: np.mean([part[metric][name] for part in found], axis=0) for name in found[0][metric]}


def run(study: Study) -> Report:
    table = study.by_shape()
    if not sizes(table, *KINDS):
        command = "python experiments/studies/train_runs.py"
        raise UserError(
            f"no top-k and factored runs of one shape and seed among --runs: make some with {command}"
        )
    size = sizes(table, *KINDS)[-1]
    seeds = common_seeds(table, size, *KINDS)
    report = Report(study, "hard_sparsity", CLAIMS)
    loss = {kind: [table[kind, size][seed].loss for seed in seeds] for kind in KINDS}
    gap = np.array(loss["factored"]) / loss["topk"] - 1
    report.claim("loss", below(gap, 0.0, "seeds"))
    lab = table["factored", size][seeds[0]].lab()
    probes = known_probes(lab)
    found = []
    for seed in seeds:
        runs = {kind: table[kind, size][seed] for kind in KINDS}
        found.append(measure(report, runs, lab, probes))

    words = over_seeds(found, "precision@5")
    categories = Scores({"native": words["factored"], "top-k": words["topk"]})
    categories["chance"] = chance(probes.labels)  # what is no better than chance cannot be lost
    report.effect("categories", categories, "categories", groups=probes.labels, published=PUBLISHED)
    questions = over_seeds(found, "mrr")
    analogies = Scores({"native": questions["factored"], "top-k": questions["topk"]})
    report.effect("analogies", analogies, "pairs", groups=probes.target, published=PUBLISHED)

    windows = over_seeds(found, "held_out_loss")
    cut = Scores({"native": windows.pop("trained")})
    cut |= {f"cut, {name}": losses for name, losses in windows.items()}
    report.effect("trained_beats_cut", cut, "windows", lower=True)

    k = table["topk", size][seeds[0]].checkpoint.model_config["top_k"]
    report.numbers |= {"size": size, "k": k, "seeds": len(seeds), "loss": loss}
    report.numbers["gap"] = vars(t_interval(gap))
    report.numbers |= {metric: by_seed(found, metric) for metric in found[0]}
    cosine = {kind: np.mean(values) for kind, values in report.numbers["neighbour_cosine"].items()}
    report.notes.append(
        f"{size} (layers x width), k = {k}, seeds: {len(seeds)}, words: {len(probes.words)}, questions: "
        f"{len(probes.questions)}. Mean raw cosine of a word's nearest neighbour: factored "
        f"{cosine['factored']:.2f}, top-k {cosine['topk']:.2f}."
    )
    draw(report)
    return report


def draw(report):
    """Loss, meaning and cut models: one dot for each seed."""
    numbers = report.numbers
    loss = {kind: np.mean(numbers["loss"][kind]) for kind in KINDS}
    precision = {kind: np.mean(numbers["precision@5"][kind]) for kind in KINDS}
    title = (
        f"Top-{numbers['k']} recipes: loss {loss['topk']:.2f} against {loss['factored']:.2f}, "
        f"precision@5 {precision['topk']:.3f} against {precision['factored']:.3f} "
        f"({numbers['seeds']} seeds, one dot each)"
    )
    with report.figure("hard_sparsity", title, 1, 4, size=(10, 3), width_ratios=(2, 2, 2, 3)) as axes:
        draw_dots(axes[0], numbers["loss"], "validation loss, nats per token")
        draw_dots(axes[1], numbers["precision@5"], "precision@5")
        draw_dots(axes[2], numbers["mrr"], "analogies, mean reciprocal rank")
        draw_dots(axes[3], numbers["held_out_loss"], "loss on held-out windows, nats per token")


def draw_dots(ax, values, label):
    """One dot for each seed, one column for each entry of values; top-k models have their own colour."""
    for x, (name, found) in enumerate(values.items()):
        kind = "topk" if name in ("topk", "trained") else "factored"
        colour = COLOURS[kind]
        ax.scatter([x] * len(found), found, color=colour)
    ax.set_xticks(range(len(values)), values, fontsize=7)
    ax.set(xlim=(-0.5, len(values) - 0.5), ylabel=label)


if __name__ == "__main__":
    run_study(run)
