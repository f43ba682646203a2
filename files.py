"""
Files and folders on the disk: one writer at a time, whole files, paths as one would type them.

    with files.lock(folder):
        ...                     a second command that asks for `folder` meanwhile stops in one line
"""

import contextlib
import functools
import hashlib
import os
import socket
import tempfile
import time
from pathlib import Path

from configurator import UserError

try:
    import fcntl
except ImportError:  # Windows: nothing is held
    fcntl = None


@contextlib.contextmanager
def lock(folder, wait=False):
    """Hold `folder`, which need not exist, until the block ends or the process does, kill -9 included.

    If another process holds it: UserError that names that process, or with `wait`, wait for its end. The lock
    is a file beside the folder, out/.reflow-nano.lock, or inside it where its parent cannot be written.
    UserError if neither can be.
    """
    folder = Path(folder).resolve()
    file = None if fcntl is None else acquire(folder, wait)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                os.unlink(file.name)  # first: who opens it from now on makes a new one
            file.close()


def acquire(folder, wait):
    """The locked file of a folder, open."""
    while True:
        file = open_beside(folder)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{folder} is in use by {owner}: wait for its end, or give another folder"
            ) from None
        except OSError:  # a file system without locks
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                break
        file.close()  # its owner removed it in this moment
    text = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with contextlib.suppress(OSError):  # a full disk: the lock holds without these words
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), text.encode())
    return file


def open_beside(folder):
    """The file that stands for a folder, opened for reading and writing."""
    with contextlib.suppress(OSError):  # the open below says why
        folder.parent.mkdir(parents=True, exist_ok=True)
    beside, inside = folder.with_name(f".{folder.name}.lock"), folder / ".lock"
    for path in (beside, inside):
        try:
            return open(path, "a+", encoding="utf-8")
        except OSError as error:
            if path == beside or folder.is_dir():
                reason = error.strerror
    raise UserError(f"{folder} cannot be written: {reason}: give another folder")


def shortest(path):
    """`path` as one would type it in the current folder."""
    path = Path(path).resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def sha256(path):
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path):
    """SHA-256 of a file, read again only when its time or size has changed."""
    stat = os.stat(path)
    return sha256_of_version(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache
def sha256_of_version(path, mtime_ns, size):
    return sha256(path)


def why_unwritable(folder):
    """Make `folder`; why no file can be written in it, None if one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.strerror
    return None


def check_writable(folder):
    """Make `folder`; UserError, before the work, if no file can be written in it."""
    if reason := why_unwritable(folder):
        raise UserError(f"{folder} cannot be written: {reason}: give another folder")


def replace_file(path, *parts):
    """Write bytes-like `parts` to `path` so that readers and crashes see the old or the whole new file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.writelines(parts)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
