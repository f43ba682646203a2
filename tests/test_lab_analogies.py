"""Analogies: ranks by brute force, ties, questions drawn evenly from known words."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.lab.analogies import METHODS, build, candidates, ranks, relations
from experiments.lab.claims import TooFew
from experiments.lab.probes import probe
from tests.lab_fixtures import token
from tests.spaces_fixtures import known_everywhere


@pytest.mark.parametrize("honest", [False, True])
def test_ranks_against_brute_force(honest):
    codes = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    questions = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [8, 3, 2, 29]])
    found = ranks(codes, questions, honest=honest, batch=2)
    assert set(found) == set(METHODS)
    x = (codes / codes.norm(dim=1, keepdim=True)).numpy()
    for q, (a, b, c, d) in enumerate(questions):
        allowed = [i for i in range(30) if honest or i not in (a, b, c)]

        def rank(score, allowed=allowed, d=d):
            return 1 + sum(score[i] > score[d] for i in allowed)

        to = {word: x @ x[word] for word in (a, b, c)}
        moved = {word: (cosine + 1) / 2 for word, cosine in to.items()}
        assert found["3CosAdd"][q] == rank(x @ (x[b] - x[a] + x[c]))
        assert found["3CosMul"][q] == rank(moved[b] * moved[c] / (moved[a] + 1e-3))
        assert found["only b"][q] == rank(to[b])
        assert found["only c"][q] == rank(to[c])
        assert found["b + c"][q] == rank(to[b] + to[c])


def test_ties_share_their_mean_rank():
    codes = torch.eye(6)[[0, 1, 2, 3, 3, 3]]  # the answer and two more are equal to one another
    assert ranks(codes, [[0, 1, 2, 3]], ["3CosAdd"])["3CosAdd"].tolist() == [2.0]


def test_questions_are_even_over_relations_and_use_four_known_words():
    pairs = {"r": [["a", "b"], ["c", "d"], ["e", "b"]], "s": [[f"x{i}", f"y{i}"] for i in range(30)]}
    words = sorted({word for part in pairs.values() for pair in part for word in pair})
    known = ({word: i for i, word in enumerate(words)} | {"x3": None}).get
    questions, target, relation = build(pairs, known, np.random.default_rng(0), 40)
    assert (relation == "r").sum() == 4 and (relation == "s").sum() == 20
    assert all(len(set(question)) == 4 for question in questions.tolist())
    assert known("x7") in questions and words.index("x3") not in questions
    assert len(target) == len(questions)
    assert target.tolist() == [f"{c} {d}" for c, d in questions[:, 2:]]
    assert len(np.unique(questions, axis=0)) == len(questions)


def test_no_question_of_unknown_words():
    known = SimpleNamespace(probe=probe)
    with pytest.raises(TooFew, match="only 0 questions"):
        build(relations(known), lambda word: None, np.random.default_rng(0), 9)


def test_candidates_are_known_words_in_their_places():
    words = known_everywhere()
    words.counts[token("queen")] = 1000
    words.counts[token("king")] = 4  # one too few
    pool, known = candidates(words)
    assert len(pool) == 10_000
    assert known("queen") == 0 and pool[0] == token("queen")
    assert known("king") is None
    assert known("kingdomless") is None  # two tokens
