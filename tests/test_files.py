"""Exclusive use of a folder: the second command stops and names the first; a kill -9 frees the folder."""

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import files
from configurator import UserError
from files import lock

ROOT = Path(files.__file__).resolve().parent
HOLDER = "import files, sys, time\nwith files.lock(sys.argv[1]):\n print('held', flush=True)\n time.sleep(60)"


@pytest.fixture
def hold():
    """hold(folder) starts a process that holds it, and returns the process."""
    processes = []

    def hold(folder):
        command = [sys.executable, "-c", HOLDER, str(folder)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.wait()


def test_the_second_stops_and_names_the_first(tmp_path, hold):
    """Whatever the spelling of the folder, and before it exists. Another folder is free."""
    folder = tmp_path / "out" / "run"
    first = hold(folder)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for spelling in (folder, str(folder), tmp_path / "link" / "run"):
        with pytest.raises(UserError) as error, lock(spelling):
            pass
        message = str(error.value)
        assert f"process {first.pid} on {socket.gethostname()} since 20" in message and "\n" not in message
    with lock(tmp_path / "out" / "other"):
        assert not folder.exists()


def test_a_full_disk_does_not_break_the_lock(tmp_path):
    """The words about its owner do not fit; what is written next meets the error and names its own file."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        with lock(tmp_path / "run"):
            command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
            second = subprocess.run(command, cwd=ROOT, capture_output=True)
            assert second.returncode == 1 and b"is in use by another process" in second.stderr
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


def test_a_kill_9_gives_it_free(tmp_path, hold):
    first = hold(tmp_path / "run")
    first.send_signal(signal.SIGKILL)
    first.wait()
    with lock(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())  # nothing stays


def test_the_end_of_the_block_gives_it_free(tmp_path):
    """Also after an error, which comes through."""
    for _ in range(2):
        with pytest.raises(KeyError), lock(tmp_path / "run"):
            raise KeyError
    assert not list(tmp_path.iterdir())


def test_wait(tmp_path, hold):
    """With `wait` the second goes on when the first has ended."""
    first = hold(tmp_path / "run")
    os.kill(first.pid, signal.SIGSTOP)
    command = [sys.executable, "-c", HOLDER.replace("[1]", "[1], wait=True"), str(tmp_path / "run")]
    second = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.5)
    first.kill()
    assert second.stdout.readline() == "held\n"
    second.kill()
    second.wait()


def test_a_parent_that_cannot_be_written(tmp_path):
    """Then the lock is inside; with no such folder either, one line says why."""
    message = "^/proc/none/run cannot be written: No such file or directory: give another folder$"
    with pytest.raises(UserError, match=message), lock("/proc/none/run"):
        pass
    (tmp_path / "run").mkdir()
    beside = tmp_path / ".run.lock"
    beside.mkdir()  # so it cannot be opened
    with lock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} "), lock(tmp_path / "run"):
            pass
    assert not (tmp_path / "run" / ".lock").exists()
