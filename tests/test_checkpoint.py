"""Run directories: whole or not at all, kept by one rule, read without ever unpickling, found by name."""

import errno
import json
import os
import pickle
import resource
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
from checkpoint import UserError, find, load_model, load_tensors, newest_whole, point, read_state, steps
from model import ModelConfig, ReFlow

CONFIG = ModelConfig(block_size=8, n_layer=1, n_head=2, n_embd=8, n_hidden=8, vocab_size=32)


def tensors(seed):
    """({name: weight}, {name.exp_avg: ...}) of a tiny model."""
    torch.manual_seed(seed)
    weights = {name: p.detach() for name, p in ReFlow(CONFIG).named_parameters()}
    return weights, {f"{name}.exp_avg": torch.randn_like(p) for name, p in weights.items()}


def save(run, step, keep=2, best=False):
    """Checkpoint `step`, whose tensors are a function of the step."""
    checkpoint.save(run, step, *tensors(step), {"config": {"model": asdict(CONFIG)}}, keep, best)
    return run / f"step_{step:06d}"


def assert_holds(folder, step):
    """`folder` is a whole checkpoint, and that of `step`."""
    assert read_state(folder)["step"] == step
    for file, expected in zip(checkpoint.WEIGHTS, tensors(step), strict=True):
        found = load_tensors(folder / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 0, 4 (the best) and 8."""
    folder = tmp_path / "out" / "a"
    for step in (0, 4, 8):
        save(folder, step, best=step == 4)
    return folder


# ----------------------------------------------------------------------------------------------------
# Writing


def test_round_trip(run):
    """What was saved comes back, as tensors and as a model that computes the same; nothing else stays."""
    assert_holds(run / "step_000008", 8)
    model, state = load_model(run / "step_000008")
    original = ReFlow(CONFIG)
    original.load_state_dict(tensors(8)[0])
    idx = torch.arange(8)[None]
    # Close, not equal: a mapped file is aligned otherwise than fresh memory, and BLAS rounds by alignment.
    assert torch.allclose(model(idx)[0], original.eval()(idx)[0], atol=1e-6) and not model.training
    assert state["step"] == 8 and state["config"]["model"] == asdict(CONFIG)
    assert sorted(p.name for p in run.iterdir()) == [
        "best",
        "latest",
        "step_000000",
        "step_000004",
        "step_000008",
    ]


def test_who_may_read_a_checkpoint_is_what_the_umask_says(tmp_path):
    """A group on a shared disk reads the weights as well as state.json."""
    before = os.umask(0o027)
    try:
        save(tmp_path / "a", 1)
    finally:
        os.umask(before)
    files = list((tmp_path / "a" / "step_000001").iterdir())
    assert len(files) == 3 and {file.stat().st_mode & 0o777 for file in files} == {0o640}


class Crash(BaseException):
    """The process dies here."""


OPERATIONS = ((checkpoint, "save_file"), (os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"))


def crash(patch, at):
    """Let operation number `at` of those that touch the disk end half done, and the process with it."""
    count = iter(range(10**6))

    def failing(name, original):
        def wrapper(*args, **kwargs):
            if next(count) != at:
                return original(*args, **kwargs)
            if name == "save_file":
                original(*args, **kwargs)
                os.truncate(args[1], args[1].stat().st_size // 2)
            if name == "rmtree":
                for path in list(args[0].glob("*"))[:1]:
                    path.unlink()
            raise Crash(name)

        return wrapper

    for module, name in OPERATIONS:
        patch.setattr(module, name, failing(name, getattr(module, name)))


def test_a_crash_anywhere_in_a_save_leaves_a_whole_checkpoint(tmp_path):
    """Die at any disk operation of a save. The newest is then the old or the new one, whole; `latest`
    names a whole one; and the next save ends as if nothing had happened."""
    seen, crashed = set(), []
    for at in range(100):
        run = tmp_path / f"run{at}"
        for step in (0, 2, 4):
            save(run, step)
        with pytest.MonkeyPatch.context() as patch:
            crash(patch, at)
            try:
                save(run, 8, best=True)
                break
            except Crash as error:
                crashed.append(str(error))
        newest, state, damaged = newest_whole(run)
        assert state["step"] in (4, 8) and not damaged
        assert_holds(newest, state["step"])
        assert read_state(find(run))["step"] in (4, 8)
        assert read_state(run / checkpoint.pointed(run, "latest"))["step"] in (4, 8)
        seen.add(state["step"])
        save(run, 8, best=True)
        assert_holds(find(run), 8)
        left = sorted(p.name for p in run.iterdir() if not p.name.startswith("."))
        assert left == ["best", "latest", "step_000000", "step_000004", "step_000008"]
    assert seen == {4, 8} and set(crashed) == {name for _, name in OPERATIONS}


@pytest.mark.parametrize(
    "keep, best, kept",
    [
        (1, None, [0, 50]),
        (2, None, [0, 40, 50]),
        (3, None, [0, 30, 40, 50]),
        (2, 20, [0, 20, 40, 50]),
        (9, 20, range(0, 51, 10)),
    ],
)
def test_retention(tmp_path, keep, best, kept):
    """Step 0, the best and the `keep` newest stay; the others go."""
    for step in range(0, 51, 10):
        save(tmp_path, step, keep, best=step == best)
    assert [p.name for p in checkpoint.steps(tmp_path)] == [f"step_{step:06d}" for step in kept]
    assert find(tmp_path).name == f"step_{50 if best is None else best:06d}"


def test_steps_sort_as_numbers(tmp_path):
    """Beyond 999,999 the names have seven digits; the newest is still the newest, and the oldest goes."""
    for step in (0, 999_998, 999_999, 1_000_000, 1_000_001):
        save(tmp_path, step, keep=3)
    assert [p.name for p in checkpoint.steps(tmp_path)][1:] == ["step_999999", "step_1000000", "step_1000001"]
    assert newest_whole(tmp_path)[1]["step"] == 1_000_001


# ----------------------------------------------------------------------------------------------------
# Damaged and foreign files


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(path, target, legacy=False):
    """A pickle at `path`, as torch.save writes it, that makes the file `target` when it is loaded."""
    if legacy:
        path.write_bytes(pickle.dumps(Bomb(target)))
    else:
        torch.save({"model": Bomb(target)}, path)


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "half a file": lambda step: truncated(step / "model.safetensors"),
    "half the moments": lambda step: truncated(step / "optimizer.safetensors"),
    "a file missing": lambda step: (step / "optimizer.safetensors").unlink(),
    "no state": lambda step: (step / "state.json").unlink(),
    "half a state": lambda step: truncated(step / "state.json"),
    "a foreign state": lambda step: (step / "state.json").write_text("[1, 2]"),
    "a stranger's state": lambda step: (step / "state.json").write_text('{"step": 8, "sizes": []}'),
    "a state without sizes": lambda step: (step / "state.json").write_text('{"step": 8, "sizes": {}}'),
    "binary state": lambda step: (step / "state.json").write_bytes(b"\xff\xfe\x80"),
    "an empty folder": lambda step: [path.unlink() for path in step.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_newest_whole_passes_over_a_damaged_one(run, damage):
    """It answers with the one before, and one line that names what is damaged."""
    DAMAGES[damage](run / "step_000008")
    newest, state, messages = newest_whole(run)
    assert newest.name == "step_000004" and state["step"] == 4
    assert len(messages) == 1 and "step_000008" in messages[0] and "\n" not in messages[0]
    with pytest.raises(UserError, match="step_000008"):
        load_model(run / "step_000008")


def zeroed(path):
    """A block in the midst of a file becomes zeros; its length stays."""
    with open(path, "r+b") as f:
        f.seek(path.stat().st_size // 2)
        f.write(bytes(64))


@pytest.mark.parametrize("file", checkpoint.WEIGHTS)
def test_zeroed_bytes_are_found(run, file):
    """By whatever loads the model, and by a resumption in either file, which takes the one before."""
    zeroed(run / "step_000008" / file)
    newest, _, messages = newest_whole(run, verified=True)
    assert newest.name == "step_000004" and f"step_000008/{file} is damaged: its SHA-256" in messages[0]
    if file == "model.safetensors":
        with pytest.raises(UserError, match=f"{file} is damaged: its SHA-256 .*another checkpoint"):
            load_model(run / "step_000008")


def test_a_checkpoint_without_hashes_opens_as_before(run):
    """Those of earlier versions; and weights too large to be read twice are verified on demand."""
    path = run / "step_000008" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in state.items() if key != "sha256"}))
    assert newest_whole(run, verified=True)[1]["step"] == 8
    load_model(run / "step_000008")
    zeroed(run / "step_000004" / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "VERIFIED", 10)
        load_model(run / "step_000004")
        with pytest.raises(UserError, match="model.safetensors is damaged: its SHA-256"):
            load_model(run / "step_000004", verified=True)


def test_a_full_disk_is_an_oserror_and_nothing_stays(run):
    """Whatever file meets it, safetensors' own error included; the checkpoints before are whole."""
    before = sorted(run.iterdir())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (1000, (run / "step_000008" / "model.safetensors").stat().st_size + 10, 10):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            with pytest.raises(OSError) as error:
                save(run, 12)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert error.value.errno == errno.EFBIG and error.value.strerror == "File too large"
        assert sorted(run.iterdir()) == before and newest_whole(run, verified=True)[1]["step"] == 8


def test_newest_whole_of_nothing(run, tmp_path):
    """No run, or none that is whole: None, and a message for each damaged one."""
    assert newest_whole(tmp_path / "nowhere") == (None, None, [])
    for step in checkpoint.steps(run):
        truncated(step / "model.safetensors")
    newest, state, messages = newest_whole(run)
    assert newest is state is None and len(messages) == 3


@pytest.mark.parametrize("legacy", [False, True], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("reader", [find, load_tensors, load_model])
def test_pickles_are_refused_and_never_loaded(run, tmp_path, reader, legacy):
    """A pickle as --run, or for the weights, its size in state.json or not: one line, and nothing is run."""
    target, weights = tmp_path / "pwned", run / "step_000008" / "model.safetensors"
    pickled(weights, target, legacy)
    offered = weights.parent if reader is load_model else weights
    with pytest.raises(UserError) as error:
        reader(offered)
    assert "\n" not in str(error.value)
    if reader is load_model:
        state = json.loads((offered / "state.json").read_text())
        state |= checkpoint.fingerprints(offered)
        (offered / "state.json").write_text(json.dumps(state))
        with pytest.raises(UserError, match="pickles are never loaded"):
            reader(offered)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))  # the bomb is live
    assert target.exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"not safetensors, but longer than a header", None])
def test_load_tensors_refuses_what_is_no_safetensors_file(run, content):
    """Empty, short, foreign or truncated (None): one line that names the file."""
    path = run / "step_000008" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    with pytest.raises(UserError, match="model.safetensors is not a whole safetensors file"):
        load_tensors(path)
    path.unlink()
    with pytest.raises(UserError, match="no file .*model.safetensors"):
        load_tensors(path)


@pytest.mark.parametrize(
    "config, match",
    [
        ({"n_embd": 16}, "fit"),
        ({"n_layer": 2}, "fit"),
        ({"n_head": 3}, "n_head=3"),
        ({"colour": "red"}, "colour"),
        (None, "state.json is missing or damaged"),
    ],
)
def test_load_model_refuses_what_does_not_fit(run, config, match):
    """A state.json of another shape, of no valid shape, with an unknown field, or without one: one line."""
    path = run / "step_000008" / "state.json"
    state = json.loads(path.read_text())
    state["config"] = {} if config is None else {"model": state["config"]["model"] | config}
    path.write_text(json.dumps(state if config is not None else {"sizes": state["sizes"]}))
    with pytest.raises(UserError, match=match) as error:
        load_model(path.parent)
    assert "\n" not in str(error.value)


def test_load_model_refuses_other_weights(run):
    """A whole safetensors file with other names in it."""
    step = run / "step_000008"
    save_file({"foreign": torch.zeros(3)}, step / "model.safetensors")
    state = json.loads((step / "state.json").read_text())
    (step / "state.json").write_text(json.dumps(state | checkpoint.fingerprints(step)))
    with pytest.raises(UserError, match="do not fit") as error:
        load_model(step)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------
# Finding


def test_find(run):
    """A run means its best, without one its latest; a step folder itself."""
    assert find(run) == find(str(run)) == run / "step_000004"
    assert find(run / "step_000000") == run / "step_000000"
    (run / "best").unlink()
    assert find(run) == run / "step_000008"


def test_without_a_name_the_newest_run_with_signals_is_taken_and_said(run, capsys):
    """Else the newest run, else the release: one line on stderr says which one and why."""
    out = run.parent

    def taken():
        path = find(out=out)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("--run=")
        return path, said

    save(out / "b", 0)
    os.utime(out / "b" / "latest", (1, 1))
    assert taken()[0] == run / "step_000004" and "newest run with signals" in taken()[1]
    os.utime(run / "latest", (0, 0))
    assert taken()[0] == find(out / "b") == out / "b" / "step_000000"
    make_dense(out / "b")
    assert taken()[0] == run / "step_000004"
    make_dense(run)
    assert taken()[0] == out / "b" / "step_000000" and "none has signals" in taken()[1]
    path = find(out=out / "nowhere")
    assert path.parent == checkpoint.RELEASES
    assert f"{path.name}: no run under" in capsys.readouterr().err
    find(run)
    assert capsys.readouterr().err == ""


def make_dense(run):
    """Let the checkpoint that a run means say that it has no signals."""
    path = find(run) / "state.json"
    state = json.loads(path.read_text())
    state["config"]["model"]["vocab"] = "dense"
    path.write_text(json.dumps(state))


def test_near_names_are_offered_wherever_runs_live(run, tmp_path, monkeypatch):
    """Beside the name, under out/, among the releases, in the current folder; but no folder without a run."""
    (tmp_path / "elsewhere" / "tests").mkdir(parents=True)
    save(tmp_path / "elsewhere" / "here", 0)
    monkeypatch.chdir(tmp_path)
    for name, meant in {
        "a": "out/a",
        "reflow-mni": "(release|out)/reflow-mini",  # out/ of the repository, if it has been trained
        "out/reflow-mini": "(release|out)/reflow-mini",
        "elsewhere/hre": "elsewhere/here",
        "out/a/step_00004": "out/a/step_000004",
    }.items():
        with pytest.raises(UserError, match=f"no run {name}: did you mean .*{meant}"):
            find(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/out/a") == run / "step_000004"  # a shell leaves the ~ of --run=~/out/a as it is
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="did you mean here"):
        find("out/heer")
    with pytest.raises(UserError, match="no run test: make one"):
        find("test")


def test_find_says_what_is_missing(run, tmp_path):
    """Each error is one line that says what to do."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.pt").write_bytes(b"")
    cases = {
        "no run .*python train.py": {"run": tmp_path / "nowhere"},
        f"no run .*did you mean .*{run.name}": {"run": run.parent / (run.name + "x")},
        "empty holds no checkpoint: .*python train.py": {"run": tmp_path / "empty"},
        "model.pt is a file: --run takes a folder": {"run": tmp_path / "model.pt"},
        "a holds no checkpoint": {"run": run},
    }
    for step in steps(run):
        shutil.rmtree(step)
    for match, arguments in cases.items():
        with pytest.raises(UserError, match=match) as error:
            find(**arguments)
        assert "\n" not in str(error.value)


def test_find_does_without_pointers(run):
    """A kill may come between a checkpoint and the pointers to it."""
    newest = steps(run)[-1]
    for pointer in ("best", "latest"):
        point(run, pointer, "step_999999")
    assert find(run) == newest
    (run / "step_foo").mkdir()  # somebody's own
    assert find(run) == newest
