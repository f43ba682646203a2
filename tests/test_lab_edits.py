"""Edits of rows of E: a swap renames, no edit does no damage, contexts end in their tokens."""

import numpy as np
import pytest
import torch

import hooks
from data.words import Words
from experiments.lab import Subject, edits
from tests.lab_fixtures import open_lab, save_run, tiny
from tests.sentiment_fixtures import sentiment_corpus


def log_odds(net, contexts, old):
    return edits.token_log_odds(net, edits.states_before(net, contexts), old, old.flip(0))


def test_a_swap_at_the_output_exchanges_logits_and_at_the_input_renames():
    subject = Subject("reflow", tiny(2))
    old = torch.tensor([5, 6])
    contexts = torch.tensor([[[1, 2, 3, 5]], [[9, 8, 7, 6]]])  # (n, C, T)
    change = edits.exchange(subject.dictionary, old, old.flip(0))
    plain = hooks.with_embedding(subject.net, subject.E)
    before = log_odds(plain, contexts, old)
    at_output = edits.edit(subject, old, change, "output")
    np.testing.assert_allclose(log_odds(at_output, contexts, old), -before, atol=1e-5)
    renamed = contexts.clone()
    renamed[:, 0, -1] = old.flip(0)
    target, after_old = (edits.next_log_probs(plain, texts) for texts in (renamed, contexts))
    at_input = edits.edit(subject, old, change, "input")
    gain = edits.kl_reduction(target, after_old, edits.next_log_probs(at_input, contexts))
    torch.testing.assert_close(gain, hooks.kl(target, after_old), atol=1e-5, rtol=1e-4)  # all of it
    assert log_odds(at_input, contexts, old) == pytest.approx(before, abs=1e-5)


def test_few_entries_of_an_exchange_are_the_largest_and_all_are_the_exchange():
    d = Subject("reflow", tiny(2)).dictionary
    old = torch.arange(20)
    new = old.view(-1, 2).flip(1).flatten()
    whole = edits.exchange(d, old, new)
    E = d.matrix()
    torch.testing.assert_close(E[old] + whole, E[new])
    torch.testing.assert_close(edits.exchange(d, old, new, 16), whole)
    change = d.codes[new] - d.codes[old]
    most = change.abs().argmax(1)
    expected = change.gather(1, most[:, None]) * d.atoms[most]
    torch.testing.assert_close(edits.exchange(d, old, new, 1), expected)


def test_a_random_edit_has_the_length_of_the_one_it_is_compared_with():
    d = Subject("reflow", tiny(2)).dictionary
    change = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    random = edits.random_like(d, change, torch.Generator().manual_seed(1))
    torch.testing.assert_close(random.norm(dim=1), change.norm(dim=1))
    assert torch.nn.functional.cosine_similarity(random, change).abs().max() < 0.9


def test_no_edit_does_no_damage():
    subject = Subject("reflow", tiny(2))
    plain, x = hooks.with_embedding(subject.net, subject.E), torch.arange(12).view(2, 6)
    rows, none = torch.tensor([50, 60]), torch.zeros(2, 16)

    def damage(change, side):
        with torch.no_grad():
            edited = edits.edit(subject, rows, change, side)
            before, after = (hooks.log_probs(net, net.encode(x)) for net in (plain, edited))
            return edits.damage(before, after, x)

    loss, kl = damage(none, "both")
    assert loss.abs().max() < 1e-6 and kl.abs().max() < 1e-6
    loss, kl = damage(50 + none, "output")
    assert kl.min() >= 0 and kl.max() > 1e-3


def test_contexts_end_in_their_tokens(tmp_path):
    lab = open_lab(save_run(tmp_path / "run", tiny(), sentiment_corpus(tmp_path / "data")))
    rng = np.random.default_rng(0)
    tokens, contexts = edits.find_contexts(*lab.heldout(500, 32), lab.words.known_tokens(), 10, rng)
    assert len(set(tokens)) == 10 and contexts.shape == (10, edits.N_CONTEXTS, edits.LENGTH + 1)
    assert (contexts[:, :, -1].numpy() == tokens[:, None]).all()
    barred = np.append(tokens, 0)
    task = edits.find_task(lab, torch.zeros(2, 1, dtype=torch.long), barred)
    assert not set(task.old.tolist()) & set(tokens.tolist())
    assert set(task.old.tolist()) <= set(Words(lab.words.counts).known_words(letters=1).tolist())
    assert torch.equal(task.new[::2], task.old[1::2]) and torch.equal(task.new[1::2], task.old[::2])
    assert (task.renamed[:, :, -1] == task.new[:, None]).all()
    assert torch.equal(task.renamed[..., :-1], task.contexts[..., :-1])
