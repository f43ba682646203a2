"""signal_lens: contributions sum exactly, a planted writer is named, verdicts that fail."""

import numpy as np
import pytest
import torch

import dictionary
import hooks
from experiments import signal_lens
from experiments.lab.results import read_result
from tests.lab_fixtures import corpus, ids, loud, open_lab, save_run, silent, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("data"))


def test_contributions_sum_to_signals_and_logits():
    net = tiny(3).double()
    torch.nn.init.normal_(net.norm.weight, mean=1, std=0.3)
    x = ids(4, 9)
    d = dictionary.native(net)
    depth = signal_lens.read_depth(net, x)
    assert depth.parts.shape == (4, len(signal_lens.part_names(net)), 16)
    contributions = signal_lens.attribute(net, depth.parts, d)
    with torch.no_grad():
        h = net.encode(x)[:, -1]
        expected = torch.stack([s[:, -1] for s in hooks.resid_streams(net, net.vocab.embed(x))], 1)
        assert torch.allclose(contributions.sum(1), d.activations(h), atol=1e-12)
        assert torch.allclose(contributions.sum(1) @ d.codes.T, hooks.unembed(net, h), atol=1e-12)
        assert torch.allclose(depth.resid, expected, atol=1e-12)


def test_the_block_that_writes_a_signal_is_named():
    """Signal 3 is written by the attention of block 1 alone, all others by the embedding."""
    net = silent(tiny(0))
    net.vocab.recipe.data[:, 3] = 0  # no token brings signal 3 along
    d = dictionary.native(net)
    torch.nn.init.normal_(net.blocks[1].attn.v.weight)
    net.blocks[1].attn.o.weight.data = torch.outer(d.atoms[3], torch.randn(16))
    parts = signal_lens.decompose_resid(net, ids(50, 6)).double()
    contributions = signal_lens.attribute(net, parts, d).detach()
    shares = signal_lens.variance_shares(contributions)
    assert torch.allclose(shares.sum(0), torch.ones(16).double())
    assert shares[signal_lens.part_names(net).index("attn 1"), 3] > 0.999
    assert (shares[0, [s for s in range(16) if s != 3]] > 0.999).all()
    assert signal_lens.largest_share(contributions[:, :, 3:4]).min() > 0.999


def test_overlap_equals_the_long_way():
    net = loud(tiny(2))
    d = dictionary.native(net)
    with torch.no_grad():
        depth = signal_lens.read_depth(net, ids(3, 8))
        share = signal_lens.overlap(net, depth.resid, depth.top[:, -1], d, 16, k=4)
        for i in range(3):
            raises = (d.activations(net.norm(depth.resid[i])) * d.codes[depth.top[i, -1]]).tolist()
            sets = [set(np.argsort(row)[-4:]) for row in raises]
            assert share[i].tolist() == pytest.approx([len(s & sets[-1]) / 4 for s in sets])


def test_of_a_larger_dictionary_a_random_part_counts():
    """Ten of 16 are met by chance, ten of 8 are all: a part of 8 has nothing left to miss."""
    net = loud(tiny(2))
    d = dictionary.native(net)
    with torch.no_grad():
        depth = signal_lens.read_depth(net, ids(30, 8))
        shares = [signal_lens.overlap(net, depth.resid, depth.top[:, -1], d, n) for n in (16, 12, 8)]
    means = [share[:, 0].mean().item() for share in shares]
    assert means[0] < means[1] < means[2] == 1


def test_a_first_half_that_decides_is_seen(tmp_path, data):
    """Block 0 turns the token into another, block 1 writes where no token reads; noise writes everywhere."""
    net = silent(tiny(0))
    net.vocab.basis.data[:, 8:] = 0  # tokens read and write one half of the stream
    for block in net.blocks:
        for weight in block.mlp.parameters():
            torch.nn.init.normal_(weight)
    net.blocks[1].mlp.down.weight.data[:8] = 0
    claims = signal_lens.run(open_lab(save_run(tmp_path / "run", net, data))).claims
    assert [claim.verdict for claim in claims] == ["supported", "not supported", "not supported"]
    assert claims[0].measured.value > 0.9


def test_nothing_is_found_before_training(tmp_path, data):
    """All layers of an untrained model agree: that must not count."""
    save_run(tmp_path / "dense", tiny(1, n_embd=32, vocab="dense"), data)
    report = signal_lens.run(open_lab(save_run(tmp_path / "tiny", tiny(0, n_embd=32), data)))
    report.save()
    result = read_result(report.folder / "result.json")
    assert [claim.verdict for claim in result.claims] == ["not supported"] * 3
    assert result.numbers["agreement"]["reflow"][1] > 0.9
    assert result.numbers["largest error of the sum"] < 1e-5
    rivals = {"pca", "ica", "baseline", "baseline ica"}
    assert result.numbers["overlap_half"].keys() == {"native", "gauges", *rivals}
    assert result.claims[1].controls.keys() == result.claims[2].controls.keys() == rivals
    assert result.gallery and [(report.folder / figure.file).exists() for figure in result.figures] == [True]
