"""What an earlier version wrote opens unchanged: a run, its shards, a release, results (tests/previous)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import sample
from data.datasets import run_words
from data.shards import Dataset
from data.tokenizer import gpt2
from experiments.lab.results import read_result

ROOT = Path(__file__).resolve().parents[1]
PREVIOUS = ROOT / "tests" / "previous"
RUN = PREVIOUS / "run"
PAPER = ROOT / "paper" / "results"
METRICS = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]


def command(script, *arguments, folder):
    """Run a script of the root in `folder` on the CPU; its output."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def copy(tmp_path):
    """A folder with a copy of everything, for commands that write."""
    return shutil.copytree(PREVIOUS, tmp_path / "previous")


def test_a_run_opens_with_its_configuration():
    ckpt = checkpoint.open_run(RUN)
    assert ckpt.step == 2 and ckpt.path.name == "step_000002" and ckpt.train_config["max_steps"] == 4
    net = ckpt.load_model()
    assert net.config.n_signal == 1 and net.vocab.matrix().shape == (50257, 2)


def test_shards_are_whole_and_hold_the_same_text():
    dataset = Dataset(PREVIOUS / "text", "train", 32, verify=True)
    assert dataset.data_sha256 == checkpoint.open_run(RUN).state["data_sha256"]
    x, y = dataset.windows(0, 1)
    assert torch.equal(x[0, 1:], y[0, :-1])
    assert gpt2().decode(x[0].tolist()).isprintable() or "\n" in gpt2().decode(x[0].tolist())


def test_a_release_is_the_run_in_half_precision_with_counts():
    release = checkpoint.open_run(PREVIOUS / "release")
    weights = checkpoint.open_run(RUN).load_model().state_dict()
    for name, w in release.load_model().state_dict().items():
        assert torch.allclose(w, weights[name], atol=1e-3), name
    counts = run_words(release.path, release.state).counts
    assert counts.sum() == 2 * 4 * 32  # steps, sequences, tokens


@pytest.mark.parametrize("folder", ["run", "release"])
def test_one_token_can_be_sampled(folder, monkeypatch, capsys):
    arguments = [f"--run={PREVIOUS / folder}", "--max_new_tokens=1", "--num_samples=1", "--device=cpu"]
    monkeypatch.setattr("sys.argv", ["sample.py", *arguments])
    sample.main()
    assert "The American people" in capsys.readouterr().out


def test_training_goes_on_where_it_stopped(copy):
    """The two steps that were left have the losses that the earlier version found."""
    state = checkpoint.open_run(RUN).state["config"]
    settings = state["model"] | state["train"] | {"resume": True}
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    out = command("train.py", *arguments, folder=copy)
    assert "resumed run at step 2 of 4" in out
    found = [json.loads(line) for line in (copy / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == [row["step"] for row in METRICS]
    for before, after in zip(METRICS, found, strict=True):
        for name in ("loss", "val_loss", "whole_val_loss"):
            assert (name in after) == (name in before)
            if name in before:
                assert after[name] == pytest.approx(before[name], rel=1e-4)


def test_it_can_be_exported_to_hugging_face(copy):
    """transformers' Llama computes the same logits from the exported folder."""
    transformers = pytest.importorskip("transformers")
    command("export.py", "--run=run", "--to=hf", folder=copy)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(copy / "hf").eval()
    ids = torch.tensor([gpt2().encode_ordinary("The American people")])
    with torch.no_grad():
        ours, _ = checkpoint.open_run(RUN).load_model()(ids)
        assert torch.allclose(theirs(ids).logits, ours, atol=1e-4)


@pytest.mark.parametrize(
    "path", sorted(PAPER.glob("*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_results_of_the_paper_can_be_read(path):
    result = read_result(path)
    assert result.claims and all(
        claim.key and claim.experiment == result.experiment for claim in result.claims
    )
