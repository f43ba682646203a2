"""upcycle.py gives a dense model sparse recipes: the same function, or one that distillation brings near."""

from dataclasses import replace

import pytest
import torch

import checkpoint
import dictionary
import upcycle
from configurator import UserError
from data.datasets import mean_loss, text_folder
from data.shards import Dataset
from formats.cards import model_card
from tests.lab_fixtures import averaging, corpus, save_run, tiny

SMALL = ["--n_signal=32", "--n_nonzero=4", "--rounds=4", "--starts=1", "--device=cpu", "--dtype=fp32"]
SMALL += ["--tokens=1024", "--block_size=32", "--test_windows=4"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run whose output depends on its input, and its text."""
    folder = tmp_path_factory.mktemp("dense")
    net = averaging(tiny(vocab="dense"), 0)
    net.vocab.weight.data = torch.randn(net.vocab.weight.shape, generator=torch.Generator().manual_seed(0))
    net.vocab.weight.data += 0.3
    return save_run(folder / "run", net, corpus(folder / "text", repeats=4))


def run(monkeypatch, dense, to, *options):
    """upcycle.py with these options: the model that it writes, and its measurements."""
    command = ["upcycle.py", f"--run={dense}", f"--to={to}", *SMALL, *options]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr(upcycle, "STEP", 32)
    monkeypatch.setattr(upcycle, "SAMPLE", 1000)
    upcycle.main()
    ckpt = checkpoint.open_run(to)
    return ckpt.load_model(), ckpt.state["upcycled"]["measured"]


def test_the_gradient_of_the_divergence_is_that_of_autograd():
    """In float64, for states and E; equal models have no divergence."""
    generator = torch.Generator().manual_seed(0)
    h, target = (torch.randn(300, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    E, teacher_E = (torch.randn(50, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    h.requires_grad_()
    E.requires_grad_()
    log_p, log_q = (target @ teacher_E.T).log_softmax(-1), (h @ E.T).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    expected.backward()
    kl, grad_h, grad_E = upcycle.divergence(h.detach(), E.detach(), target, teacher_E)
    assert abs(kl - expected.item()) < 1e-5
    torch.testing.assert_close(grad_h, h.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(grad_E, E.grad.float(), rtol=1e-4, atol=1e-7)
    assert upcycle.divergence(target, teacher_E, target, teacher_E)[0] < 1e-7


def test_with_the_rest_it_is_the_same_function(dense, tmp_path, monkeypatch):
    """The core is no signal; the share of the variance of logits that signals explain is between 0 and 1."""
    net, measured = run(monkeypatch, dense, tmp_path / "exact", "--keep_rest=True")
    before = checkpoint.open_run(dense).load_model()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(net(ids)[0], before(ids)[0], rtol=1e-4, atol=1e-4)
    assert measured["with the rest"]["KL"] < 1e-6
    assert dictionary.readable(net).n_signals == 32
    assert 0 < measured["explained"] < 1


def test_distillation_brings_the_sparse_model_nearer(dense, tmp_path, monkeypatch, capsys):
    """On held-out text that of the output falls, then the whole; entries stay in their places and budget."""
    net, measured = run(monkeypatch, dense, tmp_path / "near", "--output_steps=60", "--whole_steps=60")
    first, output, whole = (measured[name] for name in ("sparse", "output distilled", "whole distilled"))
    assert output["KL, output alone"] < first["KL, output alone"]
    assert whole["KL"] < 0.9 * min(first["KL"], output["KL"])
    codes = dictionary.readable(net).codes
    assert (codes != 0).sum() <= 4 * net.config.rows
    before = checkpoint.open_run(dense).load_model()
    assert torch.equal(net.blocks[0].attn.q.weight, before.blocks[0].attn.q.weight)
    assert net.config.n_core == 0 and "wrote" in capsys.readouterr().out

    found = checkpoint.open_run(tmp_path / "near")
    text = Dataset(text_folder(found.path, found.state), "val", net.config.block_size)
    loss = mean_loss(net, text, upcycle.SEQUENCES, 1, torch.device("cpu"))
    assert found.state["val_loss"] == pytest.approx(loss, rel=1e-5)
    state = found.state | {"config": found.state["config"] | {"train": {"imported_from": "smollm2: file"}}}
    card = model_card(replace(found, state=state), net, tmp_path / "card", "reflow", "fp16")
    assert f"by a KL of {whole['KL']:.3f} nats per token on held-out text" in card


def test_a_stopped_command_goes_on_to_the_same_bits(dense, tmp_path, monkeypatch):
    """Stopped in the middle of a distillation, between two savings."""
    options = ["--output_steps=70", "--whole_steps=10"]
    whole, _ = run(monkeypatch, dense, tmp_path / "whole", *options)
    loss, calls = upcycle.Distillation.loss, []

    def stop(self, *arguments):
        calls.append(arguments)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    monkeypatch.setattr(upcycle.Distillation, "loss", stop)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, dense, tmp_path / "stopped", *options)
    assert (tmp_path / ".stopped.work").is_dir() and not (tmp_path / "stopped").exists()
    n_before = len(calls)
    stopped, _ = run(monkeypatch, dense, tmp_path / "stopped", *options)
    assert len(calls) - n_before == 20 + 10  # from step 50 on
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, stopped.state_dict()[name]), name
    assert not (tmp_path / ".stopped.work").exists()


def test_what_cannot_be_upcycled_is_named(dense, tmp_path, monkeypatch):
    factored = save_run(tmp_path / "run", tiny(), corpus(tmp_path / "text", repeats=1))
    with pytest.raises(UserError, match="vocabulary factored: only a dense one"):
        run(monkeypatch, factored, tmp_path / "new")
    with pytest.raises(UserError, match="is there already"):
        run(monkeypatch, dense, tmp_path / "run")
    with pytest.raises(UserError, match="n_nonzero=40 must be"):
        run(monkeypatch, dense, tmp_path / "new", "--n_nonzero=40")
