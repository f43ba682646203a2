"""The study of facts: a plan that train.py understands; at toy size it trains, resumes and decides."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import configurator
import export
import train
from configurator import UserError
from data.shards import Writer
from data.tokenizer import load
from experiments.lab.results import read_result
from experiments.studies import facts
from model import ModelConfig
from tests.lab_fixtures import words
from train import TrainConfig

TOY = """
n_layer = 1
n_head = 2
n_embd = 8
n_hidden = 16
block_size = 32
lr = 1e-2
min_lr = 1e-3
eval_sequences = 8
log_interval = 10
device = "cpu"
dtype = "fp32"
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Arguments of a study that takes seconds; its commands run in this process and are listed."""
    small = load("gpt2-8192")
    one = [w for w in words() if len(small.encode_ordinary(" " + w)) == 1][:60]
    rng = np.random.default_rng(0)
    writer = Writer(tmp_path / "data", "words", "none", {"seed": 0}, tokenizer=small)
    for split, n in (("train", 200), ("val", 20)):
        for i in range(n):
            if writer.wants(split, i):
                writer.add(split, i, small.encode("".join(f" {w}" for w in rng.permutation(one))), 400)
    writer.finish()
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setitem(facts.ARMS, "sparse", {"n_nonzero": 3, "n_core": 2})
    monkeypatch.setattr(facts, "SHAPE", {"n_embd": 8})
    commands = []

    def run_here(command):
        commands.append(command)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            main = export.main if "export.py" in command[1] else train.main
            main()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(facts, "subprocess", SimpleNamespace(run=run_here))
    arguments = [f"--out={tmp_path / 'out'}", "--arms=dense,sparse", "--seeds=2"]
    arguments += ["--steps=48", "--starts=1"]
    arguments += [f"--dataset={tmp_path / 'data'}", f"--config={tmp_path / 'toy.py'}"]
    return SimpleNamespace(arguments=arguments, commands=commands, out=tmp_path / "out")


def go(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["facts.py", *arguments])
        facts.main()


def test_every_planned_run_is_a_command_that_its_script_understands(tmp_path):
    """Each folder once; all arms of a seed share tokens and schedule; a sparse run begins as the dense one of
    its seed at half time, with a start of its own."""
    c = facts.FactsConfig(out=str(tmp_path))
    runs = facts.plan(c)
    assert len({folder for folder, _ in runs}) == len(runs) == 15
    seen = set()
    for folder, commands in runs:
        if folder.name.startswith("sparse"):
            (own,) = configurator.parse(export.ExportConfig, argv=commands[0][1:])
            assert own.run.endswith(f"dense-seed{own.seed}/step_001000") and own.to == str(folder)
            assert own.factor == "sparse"
            assert commands[1][1:] == [f"--out_dir={folder}", "--resume"]
            continue
        assert commands[0][-1] == "--resume"
        m, t = configurator.parse(ModelConfig, TrainConfig, argv=[str(a) for a in commands[0][1:-1]])
        assert folder.name.startswith(m.vocab) and t.max_steps == 2000 and t.save_interval == 1000
        seen.add((t.seed, t.batch_size, m.block_size, t.lr, t.dataset, m.n_layer, m.n_embd))
    assert len(seen) == 3
    later = facts.plan(facts.FactsConfig(out=str(tmp_path), first_seed=3, seeds=5))
    assert {folder.name[-1] for folder, _ in later} == set("34567")


@pytest.mark.parametrize(
    ("argument", "match"),
    [("--arms=dense,gold", "gold is none of"), ("--arms=sparse", "must name dense"), ("--steps=9", "steps")],
)
def test_impossible_options_are_refused_before_anything_is_trained(argument, match):
    with pytest.raises(UserError, match=match):
        configurator.parse(facts.FactsConfig, argv=[argument])


def test_the_study_at_toy_size(toy):
    """From nothing to a result with every hypothesis of every arm; a second time nothing is trained. Losses
    pair by seed, the protocol's hash is in the result, and untrained seeds share no signals."""
    go(toy.arguments)
    assert len(toy.commands) == 2 * 3
    result = read_result(toy.out / "experiments" / "facts" / "result.json")
    assert {c.key for c in result.claims} == {
        f"{a}_{h}" for a in ("dense", "sparse") for h in facts.HYPOTHESES
    }
    assert result.numbers["protocol_sha256"] and set(result.numbers["rivals"]) >= {
        "E",
        "pca",
        "sparse",
        "anchors",
    }
    arms = result.numbers["arms"]
    assert arms["dense"]["price"] == 0 and len(arms["sparse"]["facts"]) == 2
    claims = {c.key: c for c in result.claims}
    assert claims["sparse_equal_loss"].verdict == "inconclusive"  # two seeds
    assert claims["sparse_equal_loss"].measured.value == pytest.approx(
        np.mean([facts_price(toy.out, seed) for seed in (0, 1)])
    )
    (c,) = configurator.parse(facts.FactsConfig, argv=toy.arguments)
    facts.make_runs(c)
    assert len(toy.commands) == 2 * 3


def facts_price(out, seed):
    """Loss of the sparse run of a seed above the dense one, from their files."""
    sparse, dense = (
        json.loads((out / f"{arm}-seed{seed}" / "step_000048" / "state.json").read_text())["whole_val_loss"]
        for arm in ("sparse", "dense")
    )
    return sparse / dense - 1
