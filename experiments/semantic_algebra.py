"""
Does b - a + c lead to d in recipe space, and is it the difference that does it?

    python experiments/semantic_algebra.py --run=out/reflow-nano

Method
    Questions "a is to b as c is to ?" pair up the facts of probes/analogies.json whose words the model knows:
    at most 600, evenly over relations. 3CosAdd maximises cos(d,b) - cos(d,a) + cos(d,c), 3CosMul (Levy &
    Goldberg, 2014) the ratio cos(d,b) cos(d,c) / (cos(d,a) + 0.001) of cosines moved to [0, 1]. Candidates:
    the 10,000 most frequent words of one token seen at least five times, without a, b and c. With "query
    words kept" b or c itself often wins. Many published successes need no difference at all (Linzen,
    1606.07736), so the controls are the neighbours of c alone (his Only-b), of b alone and of b + c (his
    Ignore-a). Codes are centred. Spaces and gauges, a description: lab/spaces.py. Unit: a question; questions
    with one target pair c : d are resampled together. rows.csv has every relation and space.

Cost
    26 tables of 600 x 10,000 scores. Without the fit of ICA: 3 s on one core for 64 signals, 30 s for 1,024.
"""

import sys
from operator import itemgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
import numpy as np
import torch.nn.functional as F

from experiments.lab import Lab, Report, run_experiment
from experiments.lab.analogies import METHODS, QUESTIONS, build, candidates, ranks, relations
from experiments.lab.plots import plot_dot, plot_scores
from experiments.lab.spaces import UNTAUGHT, compare_spaces, spaces, split

CLAIMS = {
    "analogies": "b - a + c ranks the answer higher than b, c or b + c do (reciprocal rank, recipes)",
    "best_space": "analogies in recipe space beside random gauges and other spaces (reciprocal rank)",
}
PUBLISHED = "3 of 3 examples: queen and ran at rank 1, Beijing at rank 2 (464M, OpenWebText)"
CONTROLS = ("only b", "only c", "b + c")
EXAMPLES = (
    ("man", "king", "woman", "queen"),
    ("walking", "walked", "running", "ran"),
    ("France", "Paris", "China", "Beijing"),
)
N_DRAWN = 8  # questions of the gallery that are drawn at random


def accuracy(k):
    """A function: ranks (n,) -> whether each is at most k, (n,)."""
    return lambda rank: rank <= k


def run(lab: Lab) -> Report:
    report = Report(lab, "semantic_algebra", CLAIMS)
    pool, known = candidates(lab.words)
    questions, target, relation = build(relations(lab), known, lab.rng("questions"), QUESTIONS)

    # 3CosAdd in every space.
    def measure(codes):
        return ranks(codes - codes.mean(0), questions, ("3CosAdd",))

    rank = compare_spaces(lab, measure, pool)["3CosAdd"]
    scores = rank.map(np.reciprocal)
    analogies, best_space = split(scores)

    # Other methods in recipe space.
    codes = {name: rows - rows.mean(0) for name, rows in spaces(lab, pool).items()}
    for method, found in ranks(codes["native"], questions, list(METHODS)[1:]).items():
        analogies[method] = 1 / found
    kept = ranks(codes["native"], questions, ("3CosAdd",), honest=True)["3CosAdd"]
    analogies["query words kept"] = 1 / kept

    controls = [*CONTROLS, *(name for name in UNTAUGHT if name in analogies)]
    report.effect("analogies", analogies, "target pairs", controls, groups=target, published=PUBLISHED)
    report.gauge("best_space", best_space, "target pairs", groups=target)
    for k in (1, 5):
        report.scores(f"accuracy@{k}", rank.map(accuracy(k)))
    for name in np.unique(relation):
        of_relation = itemgetter(relation == name)
        report.scores("reciprocal rank", scores.map(of_relation), prompt=name)
    random_order = float((1 / np.arange(1, len(pool) + 1)).mean())
    report.numbers |= {
        "questions": len(questions),
        "relations": len(np.unique(relation)),
        "candidates": len(pool),
        "mrr_of_a_random_order": random_order,
    }
    report.notes.append(
        f"{len(questions)} questions of {report.numbers['relations']} relations, {len(np.unique(target))} "
        f"target pairs; {len(pool)} candidates. Mean reciprocal rank of a random order: {random_order:.4f}."
    )
    shown = {name: codes[name] for name in ("native", "E", "baseline") if name in codes}
    report.gallery = gallery(lab, shown, pool, known, questions)
    draw(report, scores, analogies, target, relation)
    return report


def gallery(lab, codes, pool, known, questions):
    """The answer's rank and the best candidates, as text: published examples, questions drawn at random."""
    names = [lab.words.text(token).strip() for token in pool]
    drawn = lab.rng("drawn").permutation(len(questions))[:N_DRAWN]
    lines = ["The published examples (3CosAdd, query words left out)"]
    for words in EXAMPLES:
        lines += example(codes, names, words, [known(word) for word in words])
    lines += ["", "Questions drawn at random"]
    for question in questions[drawn].tolist():
        lines += example(codes, names, [names[i] for i in question], question)
    return "\n".join(lines)


def example(codes, names, words, question):
    """Lines of text: one question, its words (4,) and their places (4,) in codes, None if unknown."""
    a, b, c, d = words
    lines = [f"  {b} - {a} + {c} = {d}"]
    if None in question:
        missing = [word for word, i in zip(words, question, strict=True) if i is None]
        return [*lines, f"      not known to this model: {', '.join(missing)}"]
    for space, rows in codes.items():
        unit = F.normalize(rows, dim=1)
        cosines = [unit @ unit[i] for i in question[:3]]
        scores = METHODS["3CosAdd"](*cosines)
        scores[question[:3]] = -np.inf
        best = ", ".join(names[i] for i in scores.topk(3).indices)
        rank = ranks(rows, [question], ("3CosAdd",))["3CosAdd"][0]
        lines.append(f"      {space:8} rank {rank:5.0f} of {len(names)}; best: {best}")
    return lines


def draw(report, scores, analogies, target, relation):
    title = (
        f"{len(relation)} analogies: mean reciprocal rank {scores.native.mean():.3f} by b - a + c, "
        f"{analogies['only c'].mean():.3f} by c alone, {scores['E'].mean():.3f} by b - a + c in E"
    )
    with report.figure("algebra", title, 1, 3, size=(12, 4.6)) as (left, middle, right):
        plot_scores(left, scores, target, "mean reciprocal rank by 3CosAdd in every space")
        plot_scores(middle, analogies, target, "mean reciprocal rank in recipe space\n(native: 3CosAdd)")
        names = np.unique(relation)
        for y, name in enumerate(names):
            part = relation == name
            plot_dot(right, y - 0.15, scores.native[part], "native", target[part])
            plot_dot(right, y + 0.15, analogies["only c"][part], "only c", target[part], marker=".")
        right.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=7)
        right.invert_yaxis()
        right.set(xlabel="mean reciprocal rank in recipe space\n(blue: 3CosAdd; black: only c)")
        for ax in (left, middle, right):
            ax.set_xlim(left=0)


if __name__ == "__main__":
    run_experiment(run)
