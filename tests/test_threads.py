"""How threads wait: set before torch is loaded, and only where the user has set nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hardware import pick_threads
from model import ModelConfig, ReFlow

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def spins(**environment):
    """GOMP_SPINCOUNT after `import threads` in a process of this environment."""
    clean = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    command = [sys.executable, "-c", "import os, threads; print(os.environ.get('GOMP_SPINCOUNT'))"]
    done = subprocess.run(
        command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_waiting_thread_soon_sleeps():
    assert spins() == "2000"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [("OMP_WAIT_POLICY", "ACTIVE", "None"), ("KMP_BLOCKTIME", "0", "None"), ("GOMP_SPINCOUNT", "7", "7")],
)
def test_what_the_user_set_stays(variable, value, expected):
    assert spins(**{variable: value}) == expected


@pytest.mark.parametrize(
    ("vocab_size", "rows", "environment", "expected"),
    [(64, 1, None, 1), (64, 1, "2", 2), (2**23, 1, None, 2), (64, 2**20, None, 2)],
)
def test_a_small_model_generates_with_one_thread(vocab_size, rows, environment, expected, monkeypatch):
    """Unless it is large, many rows are generated together, or OMP_NUM_THREADS is set."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    chosen = [2]
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    with torch.device("meta"):
        config = ModelConfig(
            block_size=8, n_layer=1, n_head=1, n_embd=8, vocab_size=vocab_size, vocab="dense"
        )
        pick_threads(ReFlow(config), rows)
    assert chosen[-1] == expected
