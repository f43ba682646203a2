"""bench.py: what it counts is right and its rows run; it asserts no times."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import bench
from configurator import UserError
from hardware import flops_per_token
from model import ModelConfig, ReFlow

SMALL = ModelConfig(block_size=32, n_layer=2, n_head=2, n_embd=16, n_signal=8, vocab_size=96, n_kv_head=1)


@pytest.mark.parametrize("shape", [{}, {"vocab": "dense", "n_signal": None}])
def test_the_products_are_all_flops_of_a_step_but_attention(shape):
    m, tokens = replace(SMALL, **shape), 64
    work = sum(2 * n * k * columns * times for n, k, columns, times in bench.products(m, tokens, chunk=16))
    attention = 3 * 4 * m.n_layer * m.block_size * m.n_embd
    assert work == tokens * (flops_per_token(m, m.block_size) - attention)


def test_building_e_each_step_is_the_same_function():
    torch.manual_seed(0)
    net, other = ReFlow(SMALL), ReFlow(SMALL)
    other.load_state_dict(net.state_dict())
    bench.build_each_step(other)
    x = torch.randint(96, (2, 17))
    losses = [n(x[:, :-1], x[:, 1:])[1] for n in (net, other)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, atol=1e-6)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


@pytest.mark.parametrize("kind", [row.partition(": ")[2] for row in bench.rows_of("train")[1:]])
def test_every_rival_takes_a_training_step(kind):
    """Which moves all of its weights: none is left out by its optimiser."""
    torch.manual_seed(0)
    kind = kind.removesuffix(bench.SHIPPED).removesuffix(" fp32")
    c = bench.BenchConfig(batch_size=2, length=16)
    net, loss_of, optimizer = bench.contender(kind, SMALL, c, torch.device("cpu"))
    before = [p.detach().clone() for p in net.parameters()]
    x = torch.randint(SMALL.n_tokens, (2, 17))
    loss_of(x[:, :-1], x[:, 1:]).backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_spread_and_ratios_are_medians():
    assert bench.spread([3.0, 1.0, 2.0], "{:.0f}") == "2 (1 to 3)"
    numbers = {"tokens_per_s": [100.0, 300.0, 200.0], "peak_gib": [1.0] * 3}
    half = {"tokens_per_s": [50.0, 150.0, 10.0], "peak_gib": [1.0] * 3}
    peak = {"flop_per_s": [1e9], "step_flop": [1e6], "tokens": [100]}
    lines = bench.show("train", {"peak: ": peak, "train: factored": numbers, "train: dense": half})
    assert "200 (100 to 300)" in lines[1] and "x1.00" in lines[1]
    assert "x0.50" in lines[2]  # the median of paired ratios, not the ratio of medians
    assert " 0% of the limit" in lines[1]  # 200 tokens/s * 10 kFLOP / 1 GFLOP/s


def test_every_part_has_a_row_that_runs_and_is_written(tmp_path, monkeypatch, capsys):
    """In a process each, as users run it: the smallest parts on the nano shape."""
    out = tmp_path / "bench.json"
    arguments = [
        "--config=config/reflow_nano.py",
        "--rounds=1",
        "--only=bench",
        f"--out={out}",
        "--device=cpu",
        "--dtype=fp32",
    ]
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(UserError, match="one of train, memory"):
        bench.main()
    monkeypatch.setattr(bench, "rows_of", lambda part: ["loss: 64, 16", "loss: 64, 64"])
    monkeypatch.setattr(sys, "argv", ["bench.py", *(a.replace("=bench", "=memory") for a in arguments)])
    bench.main()
    assert capsys.readouterr().out.count("loss off by") == 2
    found = json.loads(out.read_text())["memory"]
    assert all(row["error"][0] < 1e-5 for row in found.values())


@pytest.mark.parametrize("kind", ["closed form", "brute force"])
def test_the_closed_form_of_ablation_is_the_brute_force(kind, monkeypatch):
    """On a small vocabulary: both rows run, and what they compute is the same."""
    monkeypatch.setattr("model.N_TOKENS", 500)
    found = bench.experiments_row(bench.BenchConfig(device="cpu"), kind)
    assert found["seconds"] > 0
    assert found.get("worst_difference", 0) < 1e-4


def test_help_imports_neither_torch_nor_the_experiments():
    code = "import sys, bench; print([m for m in ('torch', 'experiments', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=bench.ROOT)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("argument", ["--rounds=0", "--seconds=-1", "--batch_size=1e12", "--length=0"])
def test_sizes_that_cannot_be_measured_are_refused(argument, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", argument])
    with pytest.raises(UserError, match="must satisfy"):
        bench.main()
