"""The plan of the studies' runs."""

import pytest

import configurator
from configurator import UserError
from experiments.studies import train_runs
from model import ModelConfig
from tests.lab_fixtures import corpus, save_run, tiny
from tests.studies_fixtures import save_trained
from train import TrainConfig


def test_every_planned_run_is_a_command_that_train_understands(tmp_path):
    """27 runs, each folder once; all of a seed share seed, schedule and tokens, whatever kind and size."""
    runs = train_runs.plan(train_runs.StudiesConfig(out=str(tmp_path)))
    assert len({folder for folder, _ in runs}) == 27
    seen = set()
    for folder, arguments in runs:
        assert arguments.pop() == "--resume"
        m, c = configurator.parse(ModelConfig, TrainConfig, argv=arguments)
        assert folder.name == f"{m.vocab}-{m.n_layer}x{m.n_embd}-seed{c.seed}" and c.out_dir == str(folder)
        seen.add((c.seed, c.max_steps, c.batch_size, m.block_size, c.lr, c.dataset))
    assert len(seen) == 3


@pytest.mark.parametrize("argument", ["--seeds=0", "--steps=0", "--steps=-8", "--steps=4", "--steps=100"])
def test_impossible_numbers_are_refused_before_anything_is_trained(argument):
    with pytest.raises(UserError, match=f"{argument[2:7]}.* must satisfy"):
        configurator.parse(train_runs.StudiesConfig, argv=[argument])


def test_a_run_is_finished_at_its_last_step_with_its_final_loss(tmp_path):
    """What is finished is not trained again; another number of steps, or no final loss, is not finished."""
    data = corpus(tmp_path / "data", repeats=1)
    save_trained(tmp_path / "run", tiny(), data, seed=0)
    assert train_runs.finished(tmp_path / "run", steps=1)
    assert not train_runs.finished(tmp_path / "run", steps=2)
    assert not train_runs.finished(tmp_path / "nothing", steps=1)
    save_run(tmp_path / "killed", tiny(), data, val_loss=None)
    assert not train_runs.finished(tmp_path / "killed", steps=1)
