"""Hooks: reading a stream and running from a layer equal the whole forward pass."""

import pytest
import torch

import hooks
from configurator import UserError
from tests.lab_fixtures import ids, loud, tiny


def test_last_token_alone_equals_the_whole_pass():
    """Rows of three lengths; the stream of the last token is replaced at each layer."""
    net = loud(tiny(1, n_layer=3, n_kv_head=1))
    lengths = [4, 9, 6]
    idx = ids(3, 9)
    rows, last = torch.arange(3), torch.tensor(lengths) - 1
    with torch.no_grad():
        token = hooks.LastToken(net, idx, lengths)
        streams = hooks.resid_streams(net, net.vocab.embed(idx))
        assert torch.allclose(token.embed(), streams[0][rows, last])
        expected = torch.stack([stream[rows, last] for stream in streams])
        assert torch.allclose(token.streams(token.embed()), expected, atol=1e-5)
        for layer in (1, 2, 3):
            changed = streams[layer].clone()
            changed[rows, last] = torch.randn(3, 16, generator=torch.Generator().manual_seed(layer))
            expected = hooks.resid_streams(net, changed, layer)[-1][rows, last]
            assert torch.allclose(token.streams(changed[rows, last], layer)[-1], expected, atol=1e-5)


def test_the_lens_by_layer_is_the_logit_lens_of_all_layers_at_once():
    net = loud(tiny(2))
    with torch.no_grad():
        streams = hooks.resid_streams(net, net.vocab.embed(ids(3, 8)))
        resid = torch.stack(streams, dim=1)[:, :, -1]  # (n, L, d)
        top, kl = hooks.lens_by_layer(net, resid)
        logits = hooks.logit_lens(net, resid).double()  # (n, L, V)
    p = logits[:, -1:].softmax(-1)
    expected = (p * (p.log() - logits.log_softmax(-1))).sum(-1)
    assert torch.allclose(kl, expected, atol=1e-6)
    assert (kl[:, -1].abs() < 1e-9).all() and (kl[:, 0] > 0.01).all()
    assert torch.equal(top, logits.argmax(-1))


@pytest.mark.parametrize("vocab", ["factored", "dense"])
def test_with_embedding_is_the_same_model_with_another_embedding(vocab):
    net = tiny(vocab=vocab)
    x = ids(4, 16)
    with torch.no_grad():
        E = net.vocab.matrix()[: net.config.n_tokens]
        same = hooks.with_embedding(net, E)
        expected = net(x)[0][..., : net.config.n_tokens]
        assert torch.allclose(hooks.unembed(same, net.encode(x)), expected, atol=1e-4)
        input_only = hooks.with_embedding(net, E, torch.zeros_like(E))
        assert torch.equal(input_only.encode(x), same.encode(x))
        assert hooks.unembed(input_only, input_only.encode(x)).abs().max() == 0
    assert net.vocab is not input_only.vocab and net.blocks is input_only.blocks


def test_streams_are_those_of_the_models_own_forward_pass():
    net = tiny()
    x = ids(4, 16)
    with torch.no_grad():
        streams = hooks.resid_streams(net, net.vocab.embed(x))
        assert torch.allclose(net.norm(streams[-1]), net.encode(x), atol=1e-6)
        assert torch.equal(hooks.resid_streams(net, streams[1], layer=1)[-1], streams[-1])
        for layer, stream in enumerate(streams):
            assert torch.allclose(hooks.resid_pre(net, x, layer), stream, atol=1e-6)


def test_token_losses_average_to_the_loss():
    """Over the real tokens only: the padding rows take no probability."""
    net = tiny()
    x, y = ids(8, 16), ids(8, 16, seed=1)
    with torch.no_grad():
        logits = net(x)[0][..., : net.config.n_tokens].double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    assert hooks.token_losses(net, x, y).double().mean().item() == pytest.approx(expected.item(), abs=1e-5)


def test_final_states_ignore_the_padding():
    net = tiny()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    with torch.no_grad():
        alone = torch.stack([net.encode(torch.tensor([p]))[0, -1] for p in prompts])
    assert torch.allclose(hooks.final_states(net, prompts, batch=2), alone, atol=1e-6)


def test_steering_adds_residual_norms_and_leaves_no_trace():
    net = tiny()
    x = ids(2, 8)
    direction = torch.randn(net.config.n_embd, generator=torch.Generator().manual_seed(0))
    last = net.config.n_layer
    with torch.no_grad():
        before = net.encode(x)
        clean = hooks.resid_streams(net, net.vocab.embed(x))[-1]
        with hooks.steer(net, direction, 3.0, [last]):
            moved = hooks.resid_pre(net, x, last) - clean
        assert torch.allclose(moved.norm(dim=-1), 3 * clean.norm(dim=-1), rtol=1e-4)
        assert torch.allclose(hooks.unit(moved), hooks.unit(direction).expand_as(moved), atol=1e-4)
        assert torch.equal(net.encode(x), before)


def test_steering_with_a_strength_for_each_row_at_some_positions():
    """Strength 0 changes nothing, strength 2 at the last position changes that one alone."""
    net = tiny()
    x = ids(2, 8)
    direction = torch.randn(net.config.n_embd, generator=torch.Generator().manual_seed(0))
    strengths = torch.tensor([0.0, 2.0])[:, None, None]
    with torch.no_grad():
        before = net.encode(x)
        with hooks.steer(net, direction, strengths, [0], positions=slice(-1, None)):
            steered = net.encode(x)
    assert torch.allclose(steered[0], before[0], atol=1e-6)
    assert torch.equal(steered[:, :-1], before[:, :-1])
    assert not torch.allclose(steered[1, -1], before[1, -1], atol=1e-2)


def test_what_gains_make_another_model_is_refused():
    """Embeddings before every block: nothing runs from a layer alone. Gains at the input: no E is both."""
    layered, gains = tiny(vocab="gains", reinject=True), tiny(vocab="gains")
    idx = torch.tensor([[1, 2, 3]])
    for use in (
        lambda: hooks.resid_streams(layered, layered.vocab.embed(idx)),
        lambda: hooks.LastToken(layered, idx),
        lambda: hooks.with_embedding(layered, layered.vocab.matrix(), layered.vocab.matrix()),
        lambda: hooks.with_embedding(gains, gains.vocab.matrix()),
    ):
        with pytest.raises(UserError, match="embeddings before every block|gains at its input"):
            use()
    both = hooks.with_embedding(gains, gains.vocab.input_matrix(), gains.vocab.matrix())
    assert torch.allclose(both(idx)[0], gains(idx)[0], atol=1e-5)
    assert torch.allclose(hooks.resid_streams(gains, gains.vocab.embed(idx))[0], gains.vocab.embed(idx))
