"""Sentiment: pairs of like frequency, directions of recipes and of activations, log-odds by hand."""

import numpy as np
import pytest
import torch

from configurator import UserError
from data.words import Words
from experiments.lab import Subject, sentiment
from experiments.lab.probes import probe
from tests.lab_fixtures import corpus, open_lab, save_run, tiny
from tests.sentiment_fixtures import planted


def test_pairs_are_words_of_like_frequency(tmp_path):
    """Counts of both sides are permutations of one another: every word has a partner of its own frequency."""
    lab = open_lab(save_run(tmp_path / "run", tiny(), "none"))
    counts = np.zeros(50257)
    rng = np.random.default_rng(0)
    for side in sentiment.SIDES:
        ids = Words(counts + 9).known_all(probe("sentiment")[side]["build"])
        counts[ids] = 10.0 + rng.permutation(len(ids))
    lab.words = Words(counts)
    pairs = sentiment.word_pairs(lab, "build").numpy()
    assert pairs.shape == (2, 44) and len(set(pairs.flatten())) == 88
    assert np.array_equal(counts[pairs[0]], counts[pairs[1]])
    with pytest.raises(UserError, match="only . positive and . negative words of sentiment.json"):
        sentiment.word_pairs(lab, "held_out")


def test_words_that_build_and_words_that_measure_are_disjoint(tmp_path):
    lab = open_lab(save_run(tmp_path / "run", tiny(), "none"))
    lab.words = Words(np.full(50257, 9.0))
    build, held_out = (sentiment.word_pairs(lab, part).flatten().tolist() for part in ("build", "held_out"))
    assert len(set(build + held_out)) == 4 * 44
    lexicon = sentiment.lexicon(lab, barred=build)
    ids = np.concatenate(list(lexicon.values()))
    assert set(held_out) <= set(ids) and not set(build) & set(ids)


def test_the_direction_in_recipes_is_that_of_embeddings():
    subject = Subject("reflow", planted(turn=True))
    chosen = torch.arange(20).view(2, 10)
    v = sentiment.direction(subject.dictionary, chosen)
    torch.testing.assert_close(v, subject.E[chosen[0]].mean(0) - subject.E[chosen[1]].mean(0))
    torch.testing.assert_close(v, sentiment.direction(subject.dictionary, chosen, 16))
    one = sentiment.direction(subject.dictionary, chosen, 1)
    along = (subject.dictionary.atoms @ (one / one.norm())).abs()
    assert along.max().item() == pytest.approx(1, abs=1e-5)  # one signal is one atom


def test_diff_mean_at_the_embedding_is_the_direction():
    """The stream entering block 0 is E of the word, whatever came before."""
    subject = Subject("reflow", tiny(5))
    chosen = torch.arange(40, 60).view(2, 10)
    found = sentiment.diff_mean(subject.net, [[1, 2, 3], [4, 5]], chosen, 0)
    torch.testing.assert_close(found, sentiment.direction(subject.dictionary, chosen))


def test_diff_mean_behind_a_block_is_that_of_one_pass_at_a_time():
    net = tiny(5)
    prompts, chosen = [[1, 2, 3], [4, 5]], torch.arange(40, 46).view(2, 3)
    means = []
    with torch.no_grad():
        for side in chosen.tolist():
            idx = torch.tensor([[*prompt[-2:], word] for prompt in prompts for word in side])
            streams = []
            handle = net.blocks[0].register_forward_hook(lambda _, args, out, seen=streams: seen.append(out))
            net.encode(idx)
            handle.remove()
            means.append(streams[0][:, -1].mean(0))
    torch.testing.assert_close(sentiment.diff_mean(net, prompts, chosen, 1), means[0] - means[1])


def test_word_logits_are_those_of_the_model():
    net = tiny(2)
    prompts, chosen = [[1, 2, 3], [4, 5]], torch.tensor([[10, 11], [12, 13]])
    found = sentiment.word_logits(net, Subject("reflow", net).E, prompts, chosen)
    with torch.no_grad():
        expected = [net(torch.tensor([prompt]))[0][0, -1][chosen] for prompt in prompts]
    np.testing.assert_allclose(found, torch.stack(expected).numpy(), atol=1e-5)


def test_log_odds_and_differences_by_hand():
    logits = np.log(np.array([[[2.0, 4.0], [1.0, 1.0]]]))  # (P, 2, n)
    assert sentiment.log_odds(logits) == pytest.approx(np.log(3))
    assert sentiment.pair_difference(logits) == pytest.approx(np.log([2.0, 4.0]))


def test_words_are_needed(tmp_path):
    lab = open_lab(save_run(tmp_path / "run", tiny(), corpus(tmp_path / "data", n_words=60)))
    with pytest.raises(UserError, match="only . positive and . negative words of sentiment.json"):
        sentiment.word_pairs(lab, "build")
