"""Training: the same weights however often killed, the same curve on any number of processes, no silent fault

Most tests call train.main() here, with sys.argv set. Where a process is the point, it is forked from a server
that has imported torch already, so that a kill and a resume cost milliseconds instead of seconds.
"""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import checkpoint
import configurator
import export
import files
import train
from configurator import UserError
from data import tokenizer
from data.shards import Writer
from model import ModelConfig, ReFlow

ROOT = Path(train.__file__).resolve().parent
SETTINGS = {
    **{"n_layer": 2, "n_head": 2, "n_embd": 32, "n_hidden": 64, "vocab_size": 320, "block_size": 16},
    **{
        "batch_size": 8,
        "micro_batch_size": 4,
        "max_steps": 12,
        "warmup_steps": 3,
        "lr": 3e-3,
        "min_lr": 3e-4,
    },
    **{"eval_interval": 4, "save_interval": 4, "eval_sequences": 13, "log_interval": 1, "keep": 2},
    **{"device": "cpu", "dtype": "fp32", "parallel": "ddp", "compile": False, "logger": "none"},
}


def write_corpus(folder, seed=0):
    """A corpus of ids below 128 of a small tokenizer, where a token tells most of the next."""
    rng = np.random.default_rng(seed)
    small = tokenizer.load("gpt2-300")
    writer = Writer(folder, "arithmetic", "none", {"seed": seed}, shard_tokens=512, tokenizer=small)
    for split, shards in (("train", 4), ("val", 1)):
        noise = rng.integers(0, 4, shards * 512)
        writer.add(split, 0, (np.cumsum(1 + noise // 3 * 5) % 128).astype(np.uint16), shards * 512)
    writer.finish()
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The path of a config file for a run of a second."""
    folder = tmp_path_factory.mktemp("tiny")
    settings = SETTINGS | {"dataset": str(write_corpus(folder / "corpus"))}
    config = folder / "tiny.py"
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))
    return config


@pytest.fixture(autouse=True)
def one_thread():
    """Two test processes do not fight for two cores, and sums have one order everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def go(config, run, *arguments):
    """`python train.py config --out_dir=run arguments` in this process; its signal handlers do not stay."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", str(config), f"--out_dir={run}", *arguments])
        try:
            train.main()
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)
    return run


def child(argv, env, log):
    """`python train.py argv` in a forked process, its output in the file `log`."""
    os.environ.update(env)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1), os.dup2(fd, 2)
    torch.set_num_threads(1)
    sys.argv = ["train.py", *argv]
    if "FAULT" in env and env["RANK"] == "1":
        FAULTS[env["FAULT"]](pytest.MonkeyPatch())
    configurator.run(train.main)


@pytest.fixture(scope="session")
def fork():
    """fork(config, run, *arguments, **env) starts train.py and returns its multiprocessing.Process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # which the first optimiser imports
    processes = []

    def start(config, run, *arguments, **env):
        if str(config).startswith("--"):  # a command as it is
            argv, run = [config, run, *arguments], config.partition("=")[2]
        else:
            argv = [str(config), f"--out_dir={run}", *arguments]
        process = context.Process(target=child, args=(argv, env, f"{run}.log"))
        with pytest.MonkeyPatch.context() as patch:  # for the server, which the first call starts
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
            process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()


def parallel(fork, config, run, *arguments, world=2, **more):
    """What torchrun does on one machine: `world` processes; wait for them all."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(s.getsockname()[1]),
            "WORLD_SIZE": str(world),
            **more,
        }
    ranks = [fork(config, run, *arguments, RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(world)]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0] * world, Path(f"{run}.log").read_text()
    return run


def overflow_in_a_shard(patch):
    """In step 2, one element of the gradients this process holds is infinite."""
    unscale, steps = torch.amp.GradScaler.unscale_, itertools.count()

    def overflowed(self, optimizer):
        if next(steps) == 2:
            optimizer.param_groups[1]["params"][0].grad.to_local()[0] = math.inf
        return unscale(self, optimizer)

    patch.setattr(torch.amp.GradScaler, "unscale_", overflowed)


def overflow_in_a_loss(patch):
    """In step 2, this process's loss is infinite."""
    sabotage(patch, lambda step, loss: loss * math.inf if step == 2 else loss)


FAULTS = {"fsdp": overflow_in_a_shard, "ddp": overflow_in_a_loss}  # on one of several processes


def rows(run):
    """metrics.jsonl without what a clock measured."""
    timing = ("tokens_per_s", "mfu", "memory_gib")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


def column(run, key):
    """{step: value} of a column of metrics.jsonl."""
    return {row["step"]: row[key] for row in rows(run) if key in row}


def weights(run, step=None):
    """The bytes of the model and the optimiser at the newest checkpoint, or at `step`."""
    folder = run / (f"step_{step:06d}" if step is not None else checkpoint.pointed(run, "latest"))
    return {file: (folder / file).read_bytes() for file in checkpoint.WEIGHTS}


def assert_same(run, reference):
    """Bit for bit the same weights, moments, metrics, checkpoints and best loss."""
    assert rows(run) == rows(reference)
    assert weights(run) == weights(reference)
    assert [p.name for p in checkpoint.steps(run)] == [p.name for p in checkpoint.steps(reference)]
    states = [checkpoint.read_state(checkpoint.steps(folder)[-1]) for folder in (run, reference)]
    for state in states:
        del state["versions"], state["token"], state["config"]["train"]
    assert states[0] == states[1]


def sabotage(patch, act):
    """Hand every training loss to act(step, loss) and use what that returns."""
    learning_rate, forward, now = train.learning_rate, ReFlow.forward, []

    def noted(step, c):
        now[:] = [step]
        return learning_rate(step, c)

    def sabotaged(self, *args):
        logits, loss = forward(self, *args)
        return logits, act(now[0], loss) if self.training and loss is not None else loss

    patch.setattr(train, "learning_rate", noted)
    patch.setattr(ReFlow, "forward", sabotaged)


# ----------------------------------------------------------------------------------------------------
# Killed and resumed


class Crash(BaseException):
    """The process dies here."""


SPARSE = ["--vocab=sparse", "--n_signal=48", "--n_nonzero=4", "--n_core=2"]
GAINS = ["--vocab=gains", "--reinject=True"]
PRECISIONS = {
    "fp32": ["--dtype=fp32"],
    "fp32 dropout": ["--dtype=fp32", "--dropout=0.1"],
    "bf16 dropout": ["--dtype=bf16", "--dropout=0.1"],
    "fp16 after an overflow": ["--dtype=fp16"],
    "recomputed": ["--dtype=fp32", "--dropout=0.1", "--activation_checkpointing"],
    "muon": ["--dtype=fp32", "--optimizer=muon"],
    "sparse": ["--dtype=fp32", *SPARSE],
    "gains": ["--dtype=fp32", *GAINS],
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_resume_is_bit_exact(tiny, tmp_path, monkeypatch, name):
    """Killed amid steps 1, 6 and 9 and the last save, and resumed each time: all as if never interrupted."""
    crashes, micro = [], []

    def act(step, loss):
        micro.append(step)
        if crashes and step == crashes[0] and micro.count(step) % 2 == 0:  # between the two micro-steps
            crashes.pop(0)
            raise Crash
        return loss * math.inf if step == 2 and "fp16" in name else loss

    sabotage(monkeypatch, act)
    reference = go(tiny, tmp_path / "reference", *PRECISIONS[name])
    crashes[:], micro[:], run = [1, 6, 9], [], tmp_path / "run"
    for _ in range(3):
        with pytest.raises(Crash):
            go(tiny, run, "--resume", *PRECISIONS[name])
        micro.clear()
    with (
        monkeypatch.context() as patch,
        pytest.raises(Crash),
    ):  # in the save of step 12: half of the weights are there
        patch.setattr(checkpoint, "save_file", lambda *a: (_ for _ in ()).throw(Crash()))
        go(tiny, run, "--resume", *PRECISIONS[name])
    go(tiny, run, "--resume", *PRECISIONS[name])
    assert_same(run, reference)
    assert checkpoint.pointed(run, "best") == checkpoint.pointed(reference, "best")
    if "fp16" in name:
        assert column(run, "loss_scale")[12] == 32768


def test_resume_of_a_finished_run_changes_nothing(tiny, tmp_path, capsys):
    """It says so, and leaves every file as it is."""
    run = go(tiny, tmp_path / "run", "--max_steps=4")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    go(tiny, run, "--max_steps=4", "--resume")
    assert "finished" in capsys.readouterr().out.splitlines()[-1]
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_resume_where_nothing_can_be_written(tiny, tmp_path, capsys, monkeypatch):
    """On a read-only mount a finished run is finished; one that has steps to do cannot be."""

    def refuse(folder):
        raise UserError(f"{folder} cannot be written")

    run = go(tiny, tmp_path / "run", "--max_steps=4")
    monkeypatch.setattr(train.files, "why_unwritable", lambda folder: "Read-only file system")
    monkeypatch.setattr(train.files, "open_beside", refuse)
    go(tiny, run, "--max_steps=4", "--resume")
    assert capsys.readouterr().out.splitlines()[-1] == f"finished {run} at step 4"
    with pytest.raises(UserError, match="cannot be written"):
        go(tiny, run, "--max_steps=8", "--resume")


def test_resume_with_more_or_fewer_steps(tiny, tmp_path, capsys):
    """More: it goes on, and the old end's whole-split loss is not taken for a later step's. Fewer: done."""
    run = go(tiny, tmp_path / "run", "--max_steps=4", "--keep=9")
    assert checkpoint.read_state(run / "step_000004")["whole_val_loss"] == column(run, "whole_val_loss")[4]
    go(tiny, run, "--max_steps=12", "--keep=9", "--resume")
    states = [checkpoint.read_state(step) for step in checkpoint.steps(run)]
    assert [state["whole_val_loss"] is None for state in states] == [True, False, True, False]
    assert states[2]["bits_per_byte"] == pytest.approx(states[2]["val_loss"] / math.log(2) * 513 / 512)
    capsys.readouterr()
    go(tiny, rewound(run, 8, tmp_path / "short"), "--max_steps=8", "--resume")
    assert capsys.readouterr().out.splitlines()[-1].startswith("finished")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_printed_command_goes_on(tiny, tmp_path, fork, number):
    """The exit status is 128 + signal. The command alone, without a setting, ends the run like one that was
    left alone."""
    reference, run = tmp_path / "reference", tmp_path / "run"
    arguments = ["--max_steps=80", "--eval_interval=80", "--save_interval=80", "--dropout=0.1"]
    arguments += ["--warmup_steps=70"]
    other = fork(tiny, reference, *arguments)
    process = fork(tiny, run, *arguments)
    while process.is_alive() and not ((run / "metrics.jsonl").exists() and len(rows(run)) > 3):
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join(60)
    log = Path(f"{run}.log").read_text()
    step = checkpoint.newest_whole(run)[1]["step"]
    assert process.exitcode == 128 + number and 0 < step < 80
    said = f"stopped by {number.name} at step {step}: saved; go on with: "
    (command,) = [line.removeprefix(said) for line in log.splitlines() if line.startswith(said)]
    python, script, *options = shlex.split(command)
    assert (python, script, options) == ("python", "train.py", [f"--out_dir={run}", "--resume"])
    process = fork(*options)
    process.join(60), other.join(60)
    assert process.exitcode == other.exitcode == 0
    assert weights(run) == weights(reference) and rows(run) == rows(reference)


def test_a_signal_at_a_saving_step_saves_once(tiny, tmp_path, monkeypatch):
    """A second save would remove the first for a moment, and a kill in that moment would cost it."""
    saves, save = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda run, step, *rest: (saves.append(step), save(run, step, *rest))
    )
    sabotage(
        monkeypatch, lambda step, loss: (os.kill(os.getpid(), signal.SIGTERM), loss)[1] if step == 3 else loss
    )
    with pytest.raises(SystemExit):
        go(tiny, tmp_path / "run")
    assert saves == [0, 4]


def test_any_number_of_kill_9(tiny, tmp_path, fork):
    """Saving at every step, killed at random moments and in the midst of saves: the same in the end."""
    arguments = ["--max_steps=40", "--eval_interval=1", "--save_interval=1", "--dropout=0.1"]
    reference, run, rng = tmp_path / "reference", tmp_path / "run", random.Random(0)
    other = fork(tiny, reference, *arguments)
    kills, in_a_save = 0, 0
    for attempt in range(16):
        before = checkpoint.pointed(run, "latest")
        process = fork(tiny, run, *arguments, "--resume")
        while process.is_alive() and checkpoint.pointed(run, "latest") == before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        while attempt % 2 and process.is_alive() and not any(run.glob(".step_*.tmp")):
            pass
        process.kill()
        process.join(60)
        kills += process.exitcode == -signal.SIGKILL
        in_a_save += any(run.glob(".step_*.tmp"))
        if process.exitcode == 0:
            break
    process = fork(tiny, run, *arguments, "--resume")
    process.join(60), other.join(60)
    assert process.exitcode == other.exitcode == 0, Path(f"{run}.log").read_text()
    assert kills >= 4 and in_a_save >= 2, (kills, in_a_save)
    assert_same(run, reference)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_resume_passes_over_a_truncated_checkpoint(tiny, tmp_path, capsys, file):
    """It says which, goes on from the one before, and ends the same."""
    run = go(tiny, tmp_path / "run")
    reference = shutil.copytree(run, tmp_path / "reference")
    damaged = run / "step_000012" / file
    os.truncate(damaged, damaged.stat().st_size // 2)
    capsys.readouterr()
    go(tiny, run, "--resume")
    out = capsys.readouterr().out
    assert "passed over: " in out and "step_000012" in out and "resumed" in out and "at step 8 of 12" in out
    assert_same(run, reference)


# ----------------------------------------------------------------------------------------------------
# The same curve


@pytest.fixture(scope="session")
def curve(tiny, tmp_path_factory):
    """8 steps in one process, one micro-batch a step, every checkpoint kept."""
    torch.set_num_threads(1)
    return go(tiny, tmp_path_factory.mktemp("curve") / "run", *CURVE, "--micro_batch_size=8")


CURVE = ["--max_steps=8", "--keep=9", "--lr=1e-3"]


def assert_close(run, reference, tolerance):
    """Losses, gradient norms and validation losses at every step."""
    for key in ("loss", "grad_norm", "val_loss", "whole_val_loss"):
        found, expected = column(run, key), column(reference, key)
        assert found.keys() == expected.keys()
        assert max(abs(found[step] - expected[step]) for step in expected) < tolerance, key


def rewound(run, step, to):
    """A copy of a run as it was at `step`."""
    shutil.copytree(run, to)
    for folder in checkpoint.steps(to):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    (to / "latest").write_text(f"step_{step:06d}\n")
    return to


@pytest.mark.parametrize(
    "arguments", [["--micro_batch_size=2"], ["--micro_batch_size=4", "--activation_checkpointing"]]
)
def test_accumulation_gives_the_same_curve(tiny, tmp_path, curve, arguments):
    """Micro-batches and recomputation are no part of the mathematics."""
    assert_close(go(tiny, tmp_path / "run", *CURVE, *arguments), curve, 1e-5)


def test_torchrun_gives_the_same_curve(tiny, tmp_path, curve):
    """Two processes, two micro-batches each, as a user starts them; an evaluation's last window is alone."""
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        ROOT / "train.py",
    ]
    command += [tiny, f"--out_dir={run}", *CURVE, "--micro_batch_size=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_close(run, curve, 1e-5)
    assert done.stdout.count("finished") == 1  # only the first process speaks


def test_fsdp_gives_the_same_curve_and_the_same_files(tiny, tmp_path, fork, curve):
    """Sharded over two processes: the curve of one; and a checkpoint of either is resumed by the other."""
    sharded = ["--micro_batch_size=2", "--parallel=fsdp"]
    run = parallel(fork, tiny, tmp_path / "fsdp", *CURVE, *sharded)
    assert_close(run, curve, 1e-4)
    merged = go(tiny, rewound(run, 4, tmp_path / "merged"), *CURVE, "--resume")
    assert_close(merged, curve, 1e-4)
    split = parallel(fork, tiny, rewound(curve, 4, tmp_path / "split"), *CURVE, *sharded, "--resume")
    assert_close(split, curve, 1e-4)
    again = parallel(fork, tiny, rewound(run, 4, tmp_path / "again"), *CURVE, *sharded, "--resume")
    assert_same(again, run)


@pytest.mark.parametrize("kind", [SPARSE, GAINS], ids=["sparse", "gains"])
def test_other_vocabularies_on_two_processes(tiny, tmp_path, fork, kind):
    """Replicated or sharded, the curve of one process."""
    alone = go(tiny, tmp_path / "alone", *CURVE, *kind, "--micro_batch_size=8")
    for how in ("ddp", "fsdp"):
        options = [*CURVE, *kind, "--micro_batch_size=2", f"--parallel={how}"]
        assert_close(parallel(fork, tiny, tmp_path / how, *options), alone, 1e-4)


def test_muon_on_two_processes(tiny, tmp_path, fork, monkeypatch):
    """The curve of one process; it is refused where matrices are sharded, and for a run of AdamW."""
    muon = [*CURVE, "--optimizer=muon"]
    alone = go(tiny, tmp_path / "alone", *muon, "--micro_batch_size=8")
    assert_close(parallel(fork, tiny, tmp_path / "two", *muon, "--micro_batch_size=2"), alone, 1e-3)
    with pytest.raises(UserError, match="trained with --optimizer=muon"):
        go(tiny, alone, "--resume", "--optimizer=adamw")
    monkeypatch.setattr(train, "processes", lambda: (0, 0, 2))
    with pytest.raises(UserError, match="give --parallel=ddp"):
        go(tiny, tmp_path / "sharded", *muon, "--micro_batch_size=2", "--parallel=fsdp")


def test_muon_turns_the_matrices_of_blocks_alone():
    """Its first update is nearly orthogonal, as long as AdamW's; all other parameters get AdamW's."""
    c = train.TrainConfig(out_dir="", weight_decay=0.0, lr=0.01)
    models = {}
    for name in ("adamw", "muon"):
        torch.manual_seed(0)
        models[name] = ReFlow(
            ModelConfig(block_size=8, n_layer=1, n_head=2, n_embd=32, n_hidden=32, vocab_size=64)
        )
        optimizer = train.make_optimizer(
            models[name], dataclasses.replace(c, optimizer=name), torch.device("cpu")
        )
        start = {key: p.detach().clone() for key, p in models[name].named_parameters()}
        idx, y = torch.randint(64, (2, 64, 8), generator=torch.Generator().manual_seed(1))
        models[name](idx, y)[1].backward()
        optimizer.step()
        listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(listed) == sorted(map(id, models[name].parameters()))
    for key, p in models["muon"].named_parameters():
        update = (p - start[key]).detach()
        if key.startswith("blocks.") and p.dim() == 2:
            s = torch.linalg.svdvals(update)
            assert s.max() < 3 * s.median() and 0.1 < update.square().mean().sqrt() / c.lr < 0.4, key
        else:
            assert torch.equal(p, dict(models["adamw"].named_parameters())[key]), key


@pytest.mark.parametrize("how", FAULTS)
def test_two_processes_agree_on_a_fault_and_resume_bit_exactly(tiny, tmp_path, fork, how):
    """fp16, dropout; one process overflows in step 3: both skip it and halve their scale. Resumed from 4."""
    arguments = [
        "--max_steps=8",
        "--keep=9",
        "--dropout=0.1",
        "--dtype=fp16",
        "--micro_batch_size=2",
        f"--parallel={how}",
    ]
    run = parallel(fork, tiny, tmp_path / "run", *arguments, FAULT=how)
    assert list(column(run, "loss_scale").values()) == [65536] * 3 + [32768] * 5
    assert list(column(run, "skipped").values()) == [0] * 2 + [1] * 6
    again = rewound(run, 4, tmp_path / "again")
    assert_same(parallel(fork, tiny, again, *arguments, "--resume"), run)


def test_evaluation_does_not_change_training(tiny, tmp_path):
    """Neither when nor on how much."""
    often = go(tiny, tmp_path / "often", "--dropout=0.1", "--eval_interval=1", "--eval_sequences=3")
    rarely = go(tiny, tmp_path / "rarely", "--dropout=0.1", "--eval_interval=12", "--save_interval=12")
    assert column(often, "loss") == column(rarely, "loss") and weights(often) == weights(rarely)
    assert len(column(often, "val_loss")) == 13 and len(column(rarely, "val_loss")) == 2


def test_the_last_evaluation_takes_the_whole_split(tiny, tmp_path):
    """Its value is the mean over all windows, whatever the micro-batch."""
    run = go(tiny, tmp_path / "run", "--max_steps=4")
    model, _ = checkpoint.load_model(run / "step_000004")
    x, y = train.Dataset(tiny.parent / "corpus", "val", 16).windows(0, 999)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).item()
    assert column(run, "whole_val_loss") == {4: pytest.approx(expected, abs=1e-5)}
    state = checkpoint.read_state(run / "step_000004")
    assert state["bits_per_byte"] == pytest.approx(expected / math.log(2) * 513 / 512, abs=1e-5)


def test_it_learns(tiny, tmp_path):
    """Half of the next tokens follow from the last: the loss falls far below its start, log 320."""
    run = go(
        tiny, tmp_path / "run", "--max_steps=120", "--lr=1e-2", "--eval_interval=60", "--save_interval=60"
    )
    losses = column(run, "loss")
    assert losses[1] == pytest.approx(math.log(320), abs=0.3)
    assert losses[120] < 0.35 * losses[1] and column(run, "val_loss")[120] < 0.35 * losses[1]


# ----------------------------------------------------------------------------------------------------
# Faults


def test_fp16_overflow_skips_the_step_and_halves_the_scale(tiny, tmp_path, monkeypatch):
    """The step is counted, weights and moments stay bit for bit, and training goes on."""
    sabotage(monkeypatch, lambda step, loss: loss * math.inf if step == 2 else loss)
    run = go(tiny, tmp_path / "run", "--dtype=fp16", "--eval_interval=1", "--save_interval=1", "--keep=99")
    assert weights(run, 3) == weights(run, 2) and weights(run, 4) != weights(run, 3)
    table = {row["step"]: row for row in rows(run) if "loss_scale" in row}
    assert [table[step]["loss_scale"] for step in (2, 3, 4, 12)] == [65536, 65536, 32768, 32768]
    assert [table[step]["skipped"] for step in (2, 3, 4, 12)] == [0, 1, 1, 1]
    assert table[3]["loss"] is None and checkpoint.newest_whole(run)[1]["skipped"] == 1
    assert all(math.isfinite(row["loss"]) for step, row in table.items() if step != 3)


def nan_gradient(loss):
    """The same loss, with a gradient that is none."""
    loss = loss * 1
    loss.register_hook(lambda g: g * math.nan)
    return loss


@pytest.mark.parametrize("poison", [lambda loss: loss * math.nan, lambda loss: loss * math.inf, nan_gradient])
def test_nan_never_reaches_the_weights(tiny, tmp_path, monkeypatch, capsys, poison):
    """One bad step is skipped; after three in a row the run stops, its last checkpoint whole."""
    sabotage(monkeypatch, lambda step, loss: poison(loss) if step == 1 or step >= 5 else loss)
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        configurator.run(
            lambda: go(tiny, run, "--max_bad_steps=3", "--eval_interval=1", "--save_interval=1", "--keep=9")
        )
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in error and "step 8" in error and "3 times in a row" in error
    assert weights(run, 2) == weights(run, 1) != weights(run, 3)
    newest, state, damaged = checkpoint.newest_whole(run)
    assert (newest.name, damaged) == ("step_000007", []) and weights(run, 7) == weights(run, 5)
    model, _ = checkpoint.load_model(newest)
    assert all(p.isfinite().all() for p in model.parameters())
    assert state["skipped"] == 3 and column(run, "skipped")[2] == 1


def test_max_bad_steps_counts_only_those_in_a_row(tiny, tmp_path, monkeypatch):
    """Every other step fails, and the run comes to its end."""
    sabotage(monkeypatch, lambda step, loss: loss * math.nan if step % 2 else loss)
    run = go(tiny, tmp_path / "run", "--max_bad_steps=2")
    assert column(run, "skipped")[12] == 6


def test_a_nan_evaluation_does_not_end_the_search_for_the_best(tiny, tmp_path, monkeypatch):
    """A validation loss that is not finite is never the best, and the next finite one may be."""
    losses = iter([5.0, math.nan, 4.0, 4.5, 4.5])
    monkeypatch.setattr(train, "mean_loss", lambda *args: next(losses))
    run = go(tiny, tmp_path / "run")
    assert (
        checkpoint.find(run).name == "step_000008" and checkpoint.newest_whole(run)[1]["best_val_loss"] == 4.0
    )


def test_trains_without_git(tiny, tmp_path, monkeypatch):
    """The commit is a note in state.json, not a need."""
    monkeypatch.setenv("PATH", str(tmp_path))
    run = go(tiny, tmp_path / "run", "--max_steps=3")
    assert checkpoint.newest_whole(run)[1]["versions"]["commit"] is None


BAD = {
    "unknown key max_step: did you mean max_steps": ["--max_step=5"],
    "no dataset at .*prepare.py": ["--dataset=nowhere"],
    "batch_size=8 must be a multiple of 1 processes x micro_batch_size=3": ["--micro_batch_size=3"],
    "save_interval=6 and eval_interval=4: must satisfy save_interval %": ["--save_interval=6"],
    "max_steps=0: must satisfy max_steps >= 1": ["--max_steps=0"],
    "eval_sequences=0: must satisfy": ["--eval_sequences=0"],
    "warmup_steps=13 and max_steps=12: must satisfy": ["--warmup_steps=13"],
    "seed=-1: must satisfy 0 <= seed": ["--seed=-1"],
    "seed=12345678901234567890: expected an int": ["--seed=12345678901234567890"],
    "lr=nan: expected a finite float": ["--lr=nan"],
    "lr=-0.1: must satisfy": ["--lr=-0.1"],
    "beta1=2.0: must satisfy 0 <= beta1 < 1": ["--beta1=2"],
    "beta2=1.0: must satisfy 0 <= beta2 < 1": ["--beta2=1"],
    "weight_decay=-1.0: must satisfy": ["--weight_decay=-1"],
    "grad_clip=-1.0: must satisfy": ["--grad_clip=-1"],
    "norm_eps=0.0 must be": ["--norm_eps=0"],
    "rope_base=0.0 must be": ["--rope_base=0"],
    "recipe_init_std=-1.0 must be": ["--recipe_init_std=-1"],
    "vocab_size=1000000000000 must be at most": ["--vocab_size=1e12"],
    "n_layer=1000000000000 must be at most": ["--n_layer=1e12"],
    "this run needs about .* GiB of memory, cpu has": ["--n_hidden=16e6", "--n_embd=1024000"],
    "this run needs about .* GiB of memory": ["--batch_size=1e12", "--micro_batch_size=1e12"],
    "no device cuda:7 here": ["--device=cuda:7"],
    "no device cpu:x here": ["--device=cpu:x"],
    "n_embd=32 must be an even multiple of n_head=3": ["--n_head=3"],
    "one window takes block_size": ["--block_size=1024"],
    "dtype=int8: expected one of": ["--dtype=int8"],
    "no config file nowhere.py": ["nowhere.py"],
}


@pytest.mark.parametrize("match", BAD)
def test_bad_input_is_one_line(tiny, tmp_path, match):
    """It names what is wrong, and no folder is made."""
    with pytest.raises(UserError, match=match) as error:
        go(tiny, tmp_path / "run", *BAD[match])
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten_nor_mixed(tiny, tmp_path, capsys):
    """Without --resume, with another model, or on other data: one line, and not a byte is changed."""
    run = go(tiny, tmp_path / "run", "--max_steps=4")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for match, arguments in {
        "is at step 4 already: add --resume": [],
        "holds another model: n_embd=64 .was 32., vocab=dense .was factored.": [
            "--resume",
            "--n_embd=64",
            "--vocab=dense",
        ],
        "trained on other data": ["--resume", f"--dataset={write_corpus(tmp_path / 'other', seed=1)}"],
    }.items():
        with pytest.raises(UserError, match=match) as error:
            go(tiny, run, *arguments)
        assert "\n" not in str(error.value)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    changes = ("--max_steps=5", "--lr=1e-4", "--micro_batch_size=2", "--dtype=bf16")
    go(tiny, run, "--resume", *changes)  # these may change; some are said
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resuming with another")]
    assert said == [
        "resuming with another max_steps: 4 -> 5",
        "resuming with another lr: 0.003 -> 0.0001",
        "resuming with another dtype: float32 -> bfloat16",
    ]
    assert checkpoint.newest_whole(run)[1]["dtype"] == "bfloat16"


def test_resume_takes_the_runs_own_settings(tiny, tmp_path, monkeypatch, capsys):
    """All of them, wherever the folder lies now; the command line and a config file change them, and it is
    said. A combination is judged as a whole: save_interval=2 fits this run's eval_interval, not the nano's.
    """
    own = ["--max_steps=4", "--lr=2e-3", "--eval_interval=1", "--save_interval=4", "--n_embd=16"]
    run = go(tiny, tmp_path / "run", *own).rename(tmp_path / "moved")
    capsys.readouterr()

    def resume(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", f"--out_dir={run}", "--resume", *arguments])
        train.main()
        state = checkpoint.newest_whole(run)[1]["config"]["train"]
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resuming with")]
        return state["max_steps"], state["lr"], said

    assert resume() == (4, 2e-3, [])
    assert resume("--max_steps=6", "--save_interval=2") == (
        *(6, 2e-3),
        ["resuming with another max_steps: 4 -> 6"],
    )
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("max_steps = 8\nlr = 1e-3")
    changes = ["resuming with another max_steps: 6 -> 8", "resuming with another lr: 0.002 -> 0.001"]
    assert resume("mine.py") == (8, 1e-3, changes)


def test_a_run_is_trained_by_one_process_at_a_time(tiny, tmp_path, capsys):
    """The second command stops at once and changes nothing, with --resume and without."""
    run = go(tiny, tmp_path / "run", "--max_steps=4")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with files.lock(run):
        for more in ([], ["--resume"], ["--resume", "--max_steps=8"]):
            with pytest.raises(UserError, match=f"run is in use by process {os.getpid()} on .* since 20"):
                go(tiny, run, *more)
        go(tiny, run, "--dry_run")  # writes nothing
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_keeps_the_last_checkpoint(tiny, tmp_path, capsys):
    """In the save of step 8: one line, status 2; step 4 is whole, and the command in the line goes on."""
    reference = go(tiny, tmp_path / "reference")
    run, save_file = tmp_path / "run", checkpoint.save_file
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(tensors, path):
        if "step_000008" in str(path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        save_file(tensors, path)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(checkpoint, "save_file", full)
        try:
            configurator.run(lambda: go(tiny, run))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    command = f"python train.py --out_dir={run} --resume"
    error = f"error: {run}/step_000008: File too large: {run}/step_000004 is whole;"
    error += f" go on from it with: {command}\n"
    assert stopped.value.code == 2 and capsys.readouterr().err.endswith(error)
    assert not [path.name for path in run.iterdir() if ".tmp" in path.name]
    go(tiny, run, "--resume")
    assert_same(run, reference)


def test_a_folder_that_cannot_be_made(tiny):
    """Before the work, and in one line."""
    with pytest.raises(UserError, match="^/proc/none/run cannot be written: No such file or directory: give"):
        go(tiny, "/proc/none/run")


def test_profile(tiny, tmp_path, capsys):
    """A trace of three steps lies in the run's folder; the run is the same as without."""
    plain = go(tiny, tmp_path / "plain", "--max_steps=8")
    run = go(tiny, tmp_path / "run", "--max_steps=8", "--profile")
    assert f"profile of 3 steps in {run / 'trace.json'}: open it at" in capsys.readouterr().out
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#1", "ProfilerStep#2", "ProfilerStep#3"}
    assert any(
        "ReFlow" in event["name"] or "aten::mm" in event["name"] for event in events if "name" in event
    )
    assert_same(run, plain)
    go(tiny, run, "--max_steps=10", "--resume", "--profile")
    assert "no profile: it takes 4 steps" in capsys.readouterr().out


@pytest.mark.parametrize("clip, dtype", [(0.05, "fp32"), (0.05, "fp16"), (0, "fp32")])
def test_the_update_uses_a_gradient_of_norm_grad_clip(tiny, tmp_path, clip, dtype):
    """metrics.jsonl has the norm before that. 0 turns it off."""
    norms = []

    def note(optimizer, args, kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    hook = register_optimizer_step_pre_hook(note)
    try:
        run = go(tiny, tmp_path / "run", "--max_steps=4", f"--grad_clip={clip}", f"--dtype={dtype}")
    finally:
        hook.remove()
    before = list(column(run, "grad_norm").values())
    assert len(norms) == 4 and min(before) > 0.1
    assert norms == pytest.approx([clip] * 4 if clip else before, rel=1e-4)


def test_a_pickle_in_the_run_is_never_loaded(tiny, tmp_path):
    """--resume on a checkpoint whose weights are a pickle of the right size."""
    run, target = go(tiny, tmp_path / "run", "--max_steps=4"), tmp_path / "pwned"

    class Bomb:
        def __reduce__(self):
            return open, (str(target), "w")

    for step in checkpoint.steps(run):
        torch.save(Bomb(), step / "model.safetensors")
        state = json.loads((step / "state.json").read_text())
        (step / "state.json").write_text(json.dumps(state | checkpoint.fingerprints(step)))
    with pytest.raises(UserError, match="pickles are never loaded"):
        go(tiny, run, "--resume", "--max_steps=8")
    assert not target.exists()


def test_the_script_exits_with_2_and_one_line(tmp_path):
    """What a user sees of a UserError."""
    command = [sys.executable, ROOT / "train.py", "--dataset=nowhere", f"--out_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: no dataset at ")
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("message", ["no compiler\nand a long story", ""])
def test_compile_falls_back(tiny, tmp_path, capsys, monkeypatch, message):
    """It says that --compile is off, in one line, and the run is the plain one."""
    plain = go(tiny, tmp_path / "plain", "--dropout=0.1", "--max_steps=4")

    def fail(*args, **kwargs):
        raise RuntimeError(message)

    def compile(function):
        return fail

    for broken in (fail, compile):  # at once, or in the trial step
        monkeypatch.setattr(torch, "compile", broken)
        run = go(tiny, tmp_path / broken.__name__, "--dropout=0.1", "--max_steps=4", "--compile")
        reason = message.partition("\n")[0] or "RuntimeError"
        assert capsys.readouterr().out.splitlines().count(f"--compile is off: {reason}") == 1
        assert_same(run, plain)


def test_a_compiled_step_that_disagrees_is_not_used(tiny, tmp_path, capsys, monkeypatch):
    """The trial step computes another loss: off, and the weights are untouched by it."""
    plain = go(tiny, tmp_path / "plain", "--max_steps=4")
    monkeypatch.setattr(torch, "compile", lambda forward: lambda x, *_: x * math.nan)
    assert_same(go(tiny, tmp_path / "run", "--max_steps=4", "--compile"), plain)
    assert "--compile is off: a trial step differs" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------
# Loggers, optimiser, schedule, dry run


LOGGERS = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "torch.utils.tensorboard"}


@pytest.mark.parametrize("logger, module", LOGGERS.items())
def test_loggers(tiny, tmp_path, monkeypatch, logger, module):
    """They get the rows of metrics.jsonl; a missing package is one line that says what to install."""
    sent, ends = {}, []
    board = SimpleNamespace(
        add_scalar=lambda key, value, step: sent.setdefault(step, {}).update({key: value}),
        close=lambda: ends.append(1),
    )
    wandb = {"init": lambda **kwargs: None}
    wandb["log"] = lambda row, step: sent.setdefault(step, {}).update(row, step=step)
    wandb["finish"] = board.close
    fake = SimpleNamespace(SummaryWriter=lambda *args, **kwargs: board, **wandb)
    monkeypatch.setitem(sys.modules, module, fake)
    run = go(tiny, tmp_path / "run", "--max_steps=4", f"--logger={logger}")
    for row in rows(run):
        assert row.items() <= sent[row["step"]].items()
    assert ends == [1]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"--logger={logger} needs a package: pip install {logger}"):
        go(tiny, tmp_path / "other", f"--logger={logger}")


@pytest.mark.parametrize("vocab", ["factored", "topk", "sparse", "gains", "dense"])
def test_only_matrices_decay(vocab):
    """Every parameter is in one group, once; those with a weight decay are the ones with two axes."""
    c = train.TrainConfig(out_dir="", weight_decay=0.3)
    model = ReFlow(
        ModelConfig(
            block_size=8,
            n_layer=2,
            n_head=2,
            n_embd=8,
            n_hidden=8,
            vocab_size=32,
            vocab=vocab,
            top_k=2,
            n_nonzero=2,
            n_core=2,
        )
    )
    groups = train.make_optimizer(model, c, torch.device("cpu")).param_groups
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(map(id, model.parameters()))
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decays[id(p)] == (0.0 if p.dim() < 2 else 0.3), name


def test_gains_learn_ten_times_as_fast(tiny, tmp_path):
    """A first AdamW step moves a weight by the learning rate, and a gain by ten times that."""
    options = ["--max_steps=1", "--warmup_steps=0", "--lr=1e-3", "--min_lr=1e-3", "--grad_clip=0"]
    run = go(tiny, tmp_path / "run", *GAINS, *options)
    start, end = (checkpoint.load_tensors(run / f"step_{n:06d}/model.safetensors") for n in (0, 1))
    for name in ("vocab.gain.0", "vocab.gain.2", "norm.weight"):
        moved = (end[name] - start[name]).abs().median().item()
        assert moved == pytest.approx(1e-2 if "gain" in name else 1e-3, rel=0.05), name


def test_learning_rate():
    """A line up to the peak, half a cosine down to min_lr at the last update; a pure function of the step."""
    c = train.TrainConfig(out_dir="", lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=111)
    assert [train.learning_rate(step, c) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert [train.learning_rate(step, c) for step in (60, 110, 999)] == pytest.approx([0.55, 0.1, 0.1])
    rates = [train.learning_rate(step, c) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True) and rates == [
        train.learning_rate(s, c) for s in range(10, 111)
    ]
    for warmup in (0, 1):  # no division by zero at the edges
        c = train.TrainConfig(out_dir="", warmup_steps=warmup, max_steps=1)
        assert 0 < train.learning_rate(0, c) <= c.lr


def test_the_schedule_is_in_the_metrics(tiny, tmp_path):
    """The learning rate of each update is that of the number of updates before it."""
    run = go(tiny, tmp_path / "run")
    c = train.TrainConfig(out_dir="", lr=3e-3, min_lr=3e-4, warmup_steps=3, max_steps=12)
    assert column(run, "lr") == {step + 1: train.learning_rate(step, c) for step in range(12)}


@pytest.mark.parametrize("config", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_dry_run(config, tmp_path, monkeypatch, capsys):
    """For every config file: the parameters, and neither a text is read nor a file made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "Dataset", None)
    monkeypatch.setattr(sys, "argv", ["train.py", str(config), "--dry_run"])
    before = sorted(ROOT.glob("*")), sorted(ROOT.glob("data/*/*"))
    train.main()
    out = capsys.readouterr().out
    m, c = configurator.parse(ModelConfig, train.TrainConfig, argv=[str(config)])
    m = train.fitted(m, train.tokenizer_of(c.dataset))
    with torch.device("meta"):
        total = sum(p.numel() for p in ReFlow(m).parameters())
    assert f" {total:,} parameters" in out and "GiB" in out and "4 x T4" in out
    assert not list(tmp_path.iterdir()) and before == (sorted(ROOT.glob("*")), sorted(ROOT.glob("data/*/*")))


def test_a_dense_run_goes_on_with_sparse_recipes(tiny, tmp_path, capsys):
    """Half of the steps dense, a dictionary, the other half sparse: the same text and learning rates; the
    blocks keep their moments; places stay as the dictionary has them; loss goes on falling."""
    dense, to = go(tiny, tmp_path / "dense", "--vocab=dense", "--keep=9"), tmp_path / "sparse"
    options = ["--factor=sparse", "--n_signal=48", "--n_nonzero=6", "--n_core=4", f"--to={to}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", f"--run={dense / 'step_000004'}", *options])
        export.main()
        said = capsys.readouterr().out
        patch.setattr(sys, "argv", ["train.py", f"--out_dir={to}", "--resume"])
        before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
        train.main()
        for name, handler in before.items():
            signal.signal(name, handler)
    assert "as a dense model" in said and "resumed" in capsys.readouterr().out
    assert column(to, "lr") == {k: v for k, v in column(dense, "lr").items() if k > 4}
    weights, later = (checkpoint.load_tensors(to / f"step_{n:06d}/model.safetensors") for n in (4, 12))
    ours, theirs = (checkpoint.load_tensors(run / "step_000004/optimizer.safetensors") for run in (to, dense))
    assert ours and all(torch.equal(moment, theirs[name]) for name, moment in ours.items())
    assert not any(name.startswith("vocab.") for name in ours)
    assert torch.equal(weights["vocab.column"], later["vocab.column"])
    assert torch.equal(weights["vocab.count"], later["vocab.count"])
    assert len(weights["vocab.column"]) == 6 * 320 == weights["vocab.count"].sum()
    assert not torch.equal(weights["vocab.value"], later["vocab.value"])
    first, last = (json.loads((to / f"step_{n:06d}/state.json").read_text()) for n in (4, 12))
    assert last["val_loss"] < first["val_loss"] < 1.2 * column(dense, "val_loss")[4]


def test_init_from(tiny, tmp_path):
    """A new run has another's weights and shape, whatever the config file says; dropout is its own."""
    first = go(tiny, tmp_path / "first", "--max_steps=4", "--n_embd=16", "--vocab=topk", "--top_k=3")
    old, state = checkpoint.load_model(first / "step_000004")
    second = go(tiny, tmp_path / "second", f"--init_from={first}", "--max_steps=4", "--dropout=0.1")
    start, started = checkpoint.load_model(second / "step_000000")
    assert start.config == dataclasses.replace(old.config, dropout=0.1)
    assert all(map(torch.equal, start.state_dict().values(), old.state_dict().values()))
    assert started["val_loss"] == state["val_loss"]
    end, _ = checkpoint.load_model(second / "step_000004")
    assert not torch.equal(end.vocab.recipe, start.vocab.recipe)

    more = (f"--init_from={first}", "--dropout=0.1", "--max_steps=8", "--resume")
    assert checkpoint.find(go(tiny, second, *more)).name == "step_000008"
    with pytest.raises(UserError, match="decides the model: leave out --n_layer=1$"):
        go(tiny, second, *more, "--n_layer=1")
    shutil.rmtree(first)  # needed no more
    assert checkpoint.find(go(tiny, second, "--resume", "--max_steps=12")).name == "step_000012"


@pytest.mark.parametrize(
    "kind",
    [
        ["--vocab=factored", "--n_signal=12"],
        ["--vocab=topk", "--top_k=3"],
        ["--vocab=sparse", "--n_signal=24", "--n_nonzero=3", "--n_core=2"],
    ],
)
def test_recipes_from(kind, tiny, tmp_path):
    """A narrower run has another's recipes, times one number that keeps the size of E, and its places. With
    rate 0 they stay so, while the basis learns; with another rate they learn. It resumes to the same bits."""
    first = go(tiny, tmp_path / "first", "--max_steps=4", "--n_embd=16", *kind)
    old = checkpoint.load_model(first / "step_000004")[0].vocab
    more = (f"--recipes_from={first}", "--n_embd=8", "--n_head=2")
    second = go(tiny, tmp_path / "second", *more, "--recipe_rate=0", "--max_steps=4")
    start, end = (checkpoint.load_model(second / f"step_00000{n}")[0].vocab for n in (0, 4))
    for name in train.RECIPES:
        if (theirs := getattr(old, name, None)) is not None:
            ratio = getattr(start, name)[theirs != 0] / theirs[theirs != 0]
            assert ratio.std() < 1e-5 * ratio.mean() and torch.equal(getattr(start, name), getattr(end, name))
    for name, places in old.named_buffers():
        assert torch.equal(places, getattr(start, name))
    assert not torch.equal(start.basis, end.basis)

    whole = go(tiny, tmp_path / "whole", *more, "--recipe_rate=0", "--max_steps=8")
    shutil.rmtree(first)  # needed no more
    shutil.copytree(whole, tmp_path / "cut")
    for path in checkpoint.steps(tmp_path / "cut")[2:]:
        shutil.rmtree(path)
    (tmp_path / "cut" / "latest").write_text(checkpoint.steps(tmp_path / "cut")[-1].name)
    resumed = go(tiny, tmp_path / "cut", *more, "--recipe_rate=0", "--max_steps=8", "--resume")
    last = [checkpoint.load_tensors(run / "step_000008" / "model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_recipes_that_are_slow_move_less(tiny, tmp_path):
    first = go(tiny, tmp_path / "first", "--max_steps=4", "--vocab=factored")
    moved = []
    for rate in ("1", "0.1"):
        run = go(tiny, tmp_path / rate, f"--recipes_from={first}", f"--recipe_rate={rate}", "--max_steps=4")
        start, end = (checkpoint.load_model(run / f"step_00000{n}")[0].vocab.recipe for n in (0, 4))
        moved.append((end - start).norm().item())
    assert 0 < moved[1] < 0.2 * moved[0]


def test_recipes_from_decides_the_vocabulary(tiny, tmp_path):
    first = go(tiny, tmp_path / "first", "--max_steps=4", "--vocab=dense")
    with pytest.raises(UserError, match="has no recipes: its vocabulary is dense"):
        go(tiny, tmp_path / "second", f"--recipes_from={first}")
    with pytest.raises(UserError, match="leave out --n_signal=9$"):
        go(tiny, tmp_path / "second", f"--recipes_from={first}", "--n_signal=9")
    with pytest.raises(UserError, match="leave out --recipes_from"):
        go(tiny, tmp_path / "second", f"--recipes_from={first}", f"--init_from={first}")
    assert not list((tmp_path / "second").glob("*"))


def test_init_from_decides_the_model(tiny, tmp_path):
    first = go(tiny, tmp_path / "first", "--max_steps=3")
    with pytest.raises(UserError, match="decides the model: leave out --n_layer=1$"):
        go(tiny, tmp_path / "second", f"--init_from={first}", "--n_layer=1", "--dropout=0.1")
    with pytest.raises(UserError, match="no run nowhere"):
        go(tiny, tmp_path / "second", "--init_from=nowhere")
    assert not (tmp_path / "second").exists()


def test_init_from_on_two_processes(tiny, tmp_path, fork):
    first = go(tiny, tmp_path / "first", "--max_steps=3")
    for mode in ("ddp", "fsdp"):
        more = (f"--init_from={first}", "--max_steps=3", f"--parallel={mode}")
        run = parallel(fork, tiny, tmp_path / mode, *more)
        weights = [
            checkpoint.load_tensors(f / "model.safetensors")
            for f in (first / "step_000003", run / "step_000000")
        ]
        assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
