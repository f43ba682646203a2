"""What the machine gives: processes as torchrun starts them, devices that are here, room for a run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hardware
from configurator import UserError
from hardware import check_room, pick_device, processes
from model import ModelConfig
from train import TrainConfig

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SMALL = ModelConfig(block_size=8, n_layer=1, n_head=2, n_embd=8, vocab_size=64)


@pytest.fixture
def environment(monkeypatch):
    """environment(**env) sets these of torchrun's variables and no others."""

    def environment(**env):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)

    return environment


def test_processes(environment):
    environment(**TORCHRUN)
    assert processes() == (3, 1, 4)
    environment()
    assert processes() == (0, 0, 1)
    environment(WORLD_SIZE="1", RANK="0", LOCAL_RANK="")
    assert processes() == (0, 0, 1)


@pytest.mark.parametrize(
    "env, named",
    [
        ({"RANK": "1"}, "RANK=1"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, "RANK=0 LOCAL_RANK=0 WORLD_SIZE=4"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4"),
        ({"RANK": "abc"}, "RANK=abc"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ],
)
def test_an_environment_that_a_scheduler_left(environment, env, named):
    environment(**env)
    with pytest.raises(UserError) as error:
        processes()
    message = str(error.value)
    assert message.startswith(named) and "start with torchrun, or `unset RANK" in message.replace(
        f"unset {' '.join(env)}", "unset RANK"
    )


@pytest.mark.parametrize("name", ["cpu:x", "cuda:99", "tpu", "cpu:-1", ""])
def test_a_device_that_is_not_here(name):
    with pytest.raises(UserError, match=f"no device {name} here: --device is one of auto, .*cpu"):
        pick_device(name)


def test_room_for_a_checkpoint(tmp_path, monkeypatch):
    """Weights and two moments, 12 bytes a parameter, must fit on the disk that the folder will be on."""
    asked = []

    def usage(path):
        asked.append(Path(path))
        return SimpleNamespace(free=free)

    monkeypatch.setattr(hardware.shutil, "disk_usage", usage)
    c, cpu = TrainConfig(out_dir="x"), torch.device("cpu")
    needed = 12 * hardware.count_parameters(SMALL)
    free = needed
    check_room(SMALL, c, cpu, False, 1, tmp_path / "a" / "b")
    free = needed - 1
    with pytest.raises(
        UserError, match=f"--out_dir={tmp_path}/a/b: a checkpoint takes 0.00 GB, the disk has 0.00"
    ):
        check_room(SMALL, c, cpu, False, 1, tmp_path / "a" / "b")
    assert asked == [tmp_path, tmp_path]
