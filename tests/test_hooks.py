"""Hooks: reading a stream and running from a layer equal the whole forward pass."""

import torch

import hooks
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
