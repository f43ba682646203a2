"""
The header of a GGUF file: its metadata and where its tensors lie.

The gguf package reads it, too: 20 times slower, and for minutes or without end where a damaged header claims
billions of entries. Here every count and length is checked against the file first. Nothing is executed.
Format: ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import UserError

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST = 2**20  # entries of a list, tensors, keys; vocabularies have up to 2**18
LONGEST = 2**24  # bytes of a string; a chat template has some thousands


@dataclass
class Tensor:
    shape: tuple  # as numpy has it: (rows, columns)
    kind: int  # ggml's number of its type
    start: int  # byte in the file at which it begins


@dataclass
class Header:
    path: Path
    metadata: dict  # key: value
    tensors: dict  # name: Tensor

    def get(self, key, kind=object, default=None):
        """The value of a key. UserError if it is missing, without a default, or of another type."""
        value = self.metadata.get(key, default)
        if value is None:
            raise UserError(f"{self.path}: {key} is missing")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{self.path}: {key}={str(value)[:40]!r} is no {kind.__name__}")
        return value


def is_gguf(path):
    """Whether a file begins as GGUF files do."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_header(path):
    """The Header of a GGUF file. UserError if it is none, or damaged."""
    path = Path(path)
    try:
        data = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if bytes(data[:4]) != MAGIC:
        raise UserError(f"{path} is no GGUF file")
    try:
        return Reader(path, memoryview(data)).header()
    except (struct.error, IndexError):
        raise UserError(f"{path} is cut off: its header goes beyond its {len(data):,} bytes") from None
    except ValueError as error:  # of UTF-8, too
        raise UserError(f"{path} is damaged: {error}") from None


class Reader:
    """Walks through the header. struct.error or ValueError where it cannot be right."""

    def __init__(self, path, data):
        self.path = path
        self.data = data
        self.at = len(MAGIC)

    def header(self):
        version = self.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} of GGUF is not 2 or 3")
        n_tensors = self.count("tensors", "Q")
        n_keys = self.count("keys", "Q")
        metadata = {}
        for _ in range(n_keys):
            key = self.string()
            if key in metadata:
                raise ValueError(f"its header has {key!r} twice")
            metadata[key] = self.value(self.scalar("I"))
        found = {}
        for _ in range(n_tensors):
            name, *tensor = self.tensor()
            if name in found:
                raise ValueError(f"its header has {name!r} twice")
            found[name] = tensor
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**16:
            raise ValueError(f"general.alignment={alignment}")
        start = math.ceil(self.at / alignment) * alignment
        tensors = {name: Tensor(shape, kind, start + at) for name, (shape, kind, at) in found.items()}
        return Header(self.path, metadata, tensors)

    def scalar(self, code):
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def count(self, what, code):
        """A number of things, each of which takes a byte at least."""
        n = self.scalar(code)
        if n > min(MOST, len(self.data)):
            raise ValueError(f"its header claims {n:,} {what}")
        return n

    def string(self):
        n = self.scalar("Q")
        if n > LONGEST or self.at + n > len(self.data):
            raise ValueError(f"its header claims a text of {n:,} bytes")
        self.at += n
        return bytes(self.data[self.at - n : self.at]).decode()

    def value(self, kind, depth=0):
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY or depth > 2:
            raise ValueError(f"a value of type {kind}")
        inner = self.scalar("I")
        n = self.count("entries", "Q")
        if inner in SCALARS:
            values = struct.unpack_from(f"<{n}{SCALARS[inner]}", self.data, self.at)
            self.at += struct.calcsize(f"<{n}{SCALARS[inner]}")
            return list(values)
        return [self.value(inner, depth + 1) for _ in range(n)]

    def tensor(self):
        """(name, shape, type, offset) of one tensor."""
        name = self.string()
        n_dims = self.scalar("I")
        if n_dims > 4:
            raise ValueError(f"{name} has {n_dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(n_dims))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")
