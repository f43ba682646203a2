"""
Does b - a + c lead to d in recipe space, and is it the difference that does it?

    python experiments/semantic_algebra.py --run=out/reflow-nano

Claims
  effect   the answer of "a is to b as c is to ?" ranks higher by 3CosAdd than by the neighbours of b, of c or
           of b + c alone, than before training and than with shuffled recipes (reciprocal rank).
  signals  it ranks higher in recipe space than in 19 other gauges of the same model, in E, in E whitened by
           PCA and by ICA, and in the embedding of a plain GPT.

Method. Questions pair up the facts of probes/analogies.json whose words the model has seen: at most 600,
evenly over relations. 3CosAdd maximises cos(d,b) - cos(d,a) + cos(d,c), 3CosMul (Levy & Goldberg, 2014) the
ratio cos(d,b) cos(d,c) / (cos(d,a) + 0.001) of cosines moved to [0, 1]. Candidates: the 10,000 most frequent
words of one token seen at least five times, less a, b and c; "honest" keeps these in, where b or c itself
often wins. Many published successes need no difference at all (Linzen, 1606.07736), hence the controls: only
c (his Only-b: the nearest neighbours of the word asked about), only b, and b + c (his Ignore-a). Recipes are
centred; gauges and whitening as in nearest_neighbors.py. Unit: a question; those with one target pair c : d
are resampled together. Every relation and space is in rows.csv.

Cost beside ICA: 28 tables of 600 x 10,000 scores: on one core 7 s for 64 signals, 77 s for 1,024.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F

from experiments import lab
from experiments.nearest_neighbors import gauges, spaces

PUBLISHED = "3 of 3 examples: queen and ran at rank 1, Beijing at rank 2 (464M, OpenWebText)"
QUESTIONS, CANDIDATES = 600, 10_000
EXAMPLES = (
    ("man", "king", "woman", "queen"),
    ("walking", "walked", "running", "ran"),
    ("France", "Paris", "China", "Beijing"),
)


def score(name, a, b, c):
    """Scores (Q, n) of candidates from their cosines a, b, c (Q, n) with the words of the question."""
    if name == "3CosMul":
        a, b, c = ((x + 1) / 2 for x in (a, b, c))
        return b * c / (a + 1e-3)
    return {"3CosAdd": b - a + c, "only b": b, "only c": c, "b + c": b + c}[name]


METHODS = ("3CosAdd", "3CosMul", "only b", "only c", "b + c")


def ranks(codes, questions, methods=METHODS, honest=False, chunk=200):
    """{method: rank of the answer (Q,)}, 1 is best, of codes (n, dims), already centred.

    questions (Q, 4): rows of `codes` for a, b, c and the answer. Ties share their mean rank.
    """
    unit = F.normalize(codes, dim=1)
    found = {name: [] for name in methods}
    for part in torch.as_tensor(questions).to(codes.device).split(chunk):
        cosines = [unit[part[:, i]] @ unit.T for i in range(3)]  # (Q, n) each
        for name in methods:
            scores = score(name, *cosines)
            answer = scores.gather(1, part[:, 3:])  # (Q, 1)
            if not honest:
                scores.scatter_(1, part[:, :3], -torch.inf)
            above, equal = (scores > answer).sum(1), (scores == answer).sum(1)
            found[name].append(above + (equal + 1) / 2)
    return {name: torch.cat(parts).double().cpu().numpy() for name, parts in found.items()}


def build(relations, known, rng, total):
    """About `total` questions (Q, 4), evenly over relations; the target pair (Q,) and relation (Q,) of each.

    relations {name: [[a, b]]}; known: word -> id, or None. The four words of a question differ.
    """
    every = {}
    for name, pairs in relations.items():
        ids = [p for p in ([known(w) for w in pair] for pair in pairs) if None not in p]
        asked = [(*p, *q) for p in ids for q in ids if len({*p, *q}) == 4]
        if asked:
            every[name] = np.array(asked)
    share = -(-total // max(1, len(every)))
    rows, relation = [], []
    for name, asked in every.items():
        rows.append(asked[np.sort(rng.permutation(len(asked))[:share])])
        relation += [name] * len(rows[-1])
    questions = np.concatenate(rows) if rows else np.zeros((0, 4), int)
    return questions, np.array([f"{c} {d}" for c, d in questions[:, 2:]]), np.array(relation)


def measures(rank):
    """{metric: mean} of ranks (n,)."""
    return {"mrr": (1 / rank).mean(), "accuracy@1": (rank <= 1).mean(), "accuracy@5": (rank <= 5).mean()}


def run(laboratory):
    report = lab.Report(laboratory, "semantic_algebra")
    pool = laboratory.known_words()[:CANDIDATES]
    place = {int(t): i for i, t in enumerate(pool)}

    def known(word):
        return place.get(laboratory.known(word))

    relations = {name: r["pairs"] for name, r in laboratory.probe("analogies").items()}
    questions, target, relation = build(relations, known, laboratory.rng("questions"), QUESTIONS)
    codes = {name: x - x.mean(0) for name, x in spaces(laboratory, pool).items()}
    found = {
        name: ranks(x, questions, METHODS if name in ("native", "E") else METHODS[:2])
        for name, x in codes.items()
    }
    honest = {name: ranks(x, questions, METHODS[:2], honest=True) for name, x in codes.items()}
    skewed = [ranks(x - x.mean(0), questions, METHODS[:1])["3CosAdd"] for x in gauges(laboratory, pool)]

    def rows(rank, **where):
        for metric, value in measures(rank).items():
            report.row(metric, value, **where)

    for space in codes if len(questions) else ():
        for method, rank in found[space].items():
            rows(rank, dictionary=space, control=method)
        for method, rank in honest[space].items():
            rows(rank, dictionary=space, control=f"{method}, honest")
        for name in np.unique(relation):
            rows(found[space]["3CosAdd"][relation == name], dictionary=space, control=f"3CosAdd, {name}")
    for i, rank in enumerate(skewed):
        rows(rank, dictionary="skewed", control=f"3CosAdd, gauge {i}")

    measured = 1 / found["native"]["3CosAdd"]
    null = {method: 1 / found["native"][method] for method in METHODS[2:]}
    null |= {space: 1 / found[space]["3CosAdd"] for space in ("step 0", "shuffled")}
    report.claim(
        lab.effect(
            "b - a + c leads nearer to the answer than b, c or b + c (reciprocal rank, recipes)",
            measured,
            null,
            "target pairs",
            target,
            published=PUBLISHED,
        )
    )
    report.claim(
        lab.signals(
            "analogies are solved better in recipe space than in any other space of the embedding",
            measured,
            [1 / rank for rank in skewed],
            {k: 1 / found[k]["3CosAdd"] for k in ("E", "pca", "ica", "baseline") if k in found},
            "target pairs",
            target,
            gauges="gauges",
        )
    )
    report.numbers = {
        "questions": len(questions),
        "relations": len(np.unique(relation)),
        "candidates": len(pool),
        "mrr_of_a_random_order": float((1 / np.arange(1, len(pool) + 1)).mean()),
        "gauges_mrr": [float((1 / rank).mean()) for rank in skewed],
        "spaces": {s: {m: measures(r) for m, r in table.items()} for s, table in found.items()},
        "honest": {s: {m: measures(r) for m, r in table.items()} for s, table in honest.items()},
    }
    report.notes.append(
        f"{len(questions)} questions of {report.numbers['relations']} relations, {len(np.unique(target))} "
        f"target pairs; {len(pool)} candidates; the reciprocal rank of a random order is "
        f"{report.numbers['mrr_of_a_random_order']:.4f}."
    )
    shown = {name: x for name, x in codes.items() if name in ("native", "E", "baseline")}
    report.gallery = gallery(laboratory, shown, pool, known, questions)
    if len(questions):
        figures(report, found, skewed, target, relation)
    return report


def gallery(laboratory, codes, pool, known, questions):
    """The published examples and as many questions drawn at random: ranks and best candidates, as text."""
    names = [lab.show(t).strip() for t in pool]
    drawn = laboratory.rng("drawn").permutation(len(questions))[:8]
    lines = []
    for title, asked in (
        ("The published examples (3CosAdd, query words left out)", EXAMPLES),
        ("Questions drawn at random", [[names[i] for i in questions[q]] for q in drawn]),
    ):
        lines += ["", title]
        for words in asked:
            a, b, c, d = words
            lines.append(f"  {b} - {a} + {c} = {d}")
            at = [known(w) for w in words]
            if None in at:
                missing = ", ".join(w for w, i in zip(words, at, strict=True) if i is None)
                lines.append(f"      not known to this model: {missing}")
                continue
            for space, x in codes.items():
                unit = F.normalize(x, dim=1)
                scores = score("3CosAdd", *(unit @ unit[i] for i in at[:3]))
                scores[at[:3]] = -torch.inf
                best = ", ".join(names[i] for i in scores.topk(3).indices)
                rank = ranks(x, [at], METHODS[:1])["3CosAdd"][0]
                lines.append(f"      {space:8} rank {rank:5.0f} of {len(pool)}; best: {best}")
    return "\n".join(lines[1:])


def figures(report, found, skewed, target, relation):
    plt = lab.pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6))

    def dot(axis, y, rank, groups, colour, marker="o"):
        e = lab.estimate(1 / rank, groups, resamples=500)
        axis.errorbar(e.value, y, xerr=e.bars, fmt=marker, color=colour, ms=5, capsize=2)

    bars = {name: (found[name]["3CosAdd"], lab.COLOURS.get(name, "k")) for name in found}
    bars |= {f"native, {m}": (found["native"][m], "k") for m in METHODS[1:]}
    for y, (rank, colour) in enumerate(bars.values()):
        dot(left, y, rank, target, colour)
    y = len(bars)
    left.plot([(1 / r).mean() for r in skewed], [y] * len(skewed), "|", color=lab.COLOURS["rotated"], ms=10)
    left.set_yticks(range(y + 1), [*bars, "19 gauges"])
    left.invert_yaxis()
    left.set(xlabel="mean reciprocal rank, with 95 % interval\n(3CosAdd unless named)", xlim=(0, None))
    names = np.unique(relation)
    for y, name in enumerate(names):
        part = relation == name
        dot(right, y - 0.15, found["native"]["3CosAdd"][part], target[part], lab.COLOURS["native"])
        dot(right, y + 0.15, found["native"]["only c"][part], target[part], "k", ".")
    right.set_yticks(range(len(names)), [n.replace("_", " ") for n in names], fontsize=7)
    right.invert_yaxis()
    right.set(xlabel="mean reciprocal rank in recipe space\n(blue: 3CosAdd; black: neighbours of c alone)")
    right.set_xlim(left=0)
    own, dense = (report.numbers["spaces"][k] for k in ("native", "E"))
    title = (
        f"{len(relation)} analogies: mean reciprocal rank {own['3CosAdd']['mrr']:.3f} by b - a + c, "
        f"{own['only c']['mrr']:.3f} by c alone, {dense['3CosAdd']['mrr']:.3f} by b - a + c in E"
    )
    report.figure(fig, "algebra", title)


if __name__ == "__main__":
    lab.main(run)
