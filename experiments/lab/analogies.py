"""
Questions "a is to b as c is to ?" from the word lists, and the rank of the answer among candidates.
"""

import numpy as np
import torch
import torch.nn.functional as F

from experiments.lab.claims import TooFew

QUESTIONS = 600
CANDIDATES = 10_000  # the most frequent known words


def cos_mul(a, b, c):
    """Levy & Goldberg, 2014: the ratio of cosines that are moved to [0, 1]."""
    a, b, c = ((cosine + 1) / 2 for cosine in (a, b, c))
    return b * c / (a + 1e-3)


# The score of a candidate from its cosines with the words a, b and c. Many published successes need no
# difference at all (Linzen, 1606.07736): "only c", the neighbours of the word asked about, is his Only-b;
# "b + c" is his Ignore-a.
METHODS = {
    "3CosAdd": lambda a, b, c: b - a + c,
    "3CosMul": cos_mul,
    "only b": lambda a, b, c: b,
    "only c": lambda a, b, c: c,
    "b + c": lambda a, b, c: b + c,
}


def candidates(words):
    """Ids of the most frequent known words (n,), and a function: word -> its place among them, or None."""
    pool = words.known_words()[:CANDIDATES]
    place = {int(token): i for i, token in enumerate(pool)}
    return pool, lambda word: place.get(words.known(word))


def relations(lab):
    """{relation: [(a, b), ...]} of probes/analogies.json."""
    return {name: relation["pairs"] for name, relation in lab.probe("analogies").items()}


def known_pairs(lab, relation):
    """[[id, id], ...] of the pairs of a relation that a lab's model knows. TooFew for fewer than two."""
    pairs = [lab.words.known_all(pair) for pair in relations(lab).get(relation, ())]
    pairs = [pair for pair in pairs if len(pair) == 2]
    if len(pairs) < 2:
        raise TooFew(
            f"only {len(pairs)} pairs of {relation} in analogies.json are words that training has seen"
        )
    return pairs


def build(relations, known, rng, total):
    """About `total` questions (Q, 4), evenly over relations; the target pair (Q,) and relation (Q,) of each.

    relations {name: [[a, b]]}; known: word -> id, or None. The four words of a question differ. Raises TooFew
    if no question is left.
    """
    every = {}
    for name, pairs in relations.items():
        ids = [[known(word) for word in pair] for pair in pairs]
        ids = [pair for pair in ids if None not in pair]
        asked = [(*p, *q) for p in ids for q in ids if len({*p, *q}) == 4]
        if asked:
            every[name] = np.array(asked)
    if not every:
        raise TooFew(
            "only 0 questions: no relation of analogies.json has two pairs of words that training has seen "
            "often (own words: experiments/probes/README.md)"
        )
    share = -(-total // len(every))  # rounded up
    questions = [np.zeros((0, 4), int)]
    relation = []
    for name, asked in every.items():
        chosen = np.sort(rng.permutation(len(asked))[:share])
        questions.append(asked[chosen])
        relation += [name] * len(chosen)
    questions = np.concatenate(questions)
    target = np.array([f"{c} {d}" for c, d in questions[:, 2:]])
    return questions, target, np.array(relation)


def ranks(codes, questions, methods=tuple(METHODS), honest=False, batch=200):
    """{method: rank of the answer (Q,)}, 1 is best, of codes (n, dims), already centred.

    questions (Q, 4): rows of `codes` for a, b, c and the answer. Ties share their mean rank. The words a, b
    and c are no candidates, unless `honest`: then b or c itself often wins.
    """
    rows = F.normalize(codes, dim=1)
    found = {name: [] for name in methods}
    for part in torch.as_tensor(questions).to(codes.device).split(batch):
        a, b, c = (rows[part[:, i]] @ rows.T for i in range(3))  # (batch, n) each
        for name in methods:
            scores = METHODS[name](a, b, c)
            answer = scores.gather(1, part[:, 3:])  # (batch, 1)
            if not honest:
                scores = scores.scatter(1, part[:, :3], -torch.inf)
            above = (scores > answer).sum(1)
            equal = (scores == answer).sum(1)
            found[name].append(above + (equal + 1) / 2)
    return {name: torch.cat(parts).double().cpu().numpy() for name, parts in found.items()}
