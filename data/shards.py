"""Token shards: the format, the writer and the loader.

A corpus is a folder of `train_000000.bin ...`, `val_000000.bin ...` and `meta.json`. A shard is a header of
256 little-endian int32 (magic 20240520, version 1, token count, zeros) followed by that many uint16 tokens:
the format of llm.c and modded-nanogpt, readable by both. meta.json, written last, says what the shards hold;
it has no timestamps, so the same text always gives the same bytes and the same `data_sha256`.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
import sys
from difflib import get_close_matches
from pathlib import Path

import numpy as np

import files
from configurator import UserError
from data.tokenizer import gpt2, is_gpt2, kept
from files import check_writable, replace_file, shortest

MAGIC, VERSION = 20240520, 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
SPLITS = ("train", "val")
DATA = Path(__file__).resolve().parent


def user_cache():
    """The folder for data sets where the checkout cannot be written."""
    home = Path.home()
    system = {"win32": os.environ.get("LOCALAPPDATA"), "darwin": home / "Library" / "Caches"}.get(
        sys.platform
    )
    return Path(os.environ.get("XDG_CACHE_HOME") or system or home / ".cache") / "reflow"


def locate(name):
    """The folder that `--dataset=name` and `--out=name` mean.

    A path, such as ./books or ~/text/books, is that folder. A plain name is data/<name> in this repository;
    if no data set is there, a prepared folder of that name in the user's cache or right here.
    """
    path = Path(name).expanduser()
    if path.name != str(name):
        return path
    places = [DATA / path, user_cache() / path, path]
    return next((place for place in places if (place / "meta.json").exists()), places[0])


def in_tokens(corpus, tokenizer):
    """The name of a corpus in the tokens of a Tokenizer: its own in GPT-2's, else <its own>-<tokenizer>."""
    return corpus if tokenizer.name == "gpt2" else f"{corpus}-{tokenizer.name}"


def read_name(name):
    """(corpus, name of its tokenizer) of a data set's name: offline-gpt2-8192 is offline in gpt2-8192."""
    corpus, tokenizer = re.fullmatch(r"(.*?)(?:-(gpt2-\d+))?", name, re.DOTALL).groups()
    return corpus, tokenizer or "gpt2"


def as_argument(folder):
    """What --dataset= takes for `folder` in any current folder, quoted for a shell: its name, or its path."""
    folder = Path(folder).resolve()
    named = folder.parent in (DATA, user_cache().resolve()) and locate(folder.name) == folder
    return shlex.quote(folder.name if named else str(folder))


def how_to_train(folder):
    """The command that trains on a data set, as it is typed here."""
    script = shlex.quote(str(shortest(DATA.parent / "train.py")))
    return f"train on it: python {script} --dataset={as_argument(folder)}"


@contextlib.contextmanager
def disk_errors(folder, kept="what is whole stays"):
    """An OSError, such as a full disk, becomes a UserError: nothing is lost, the same command goes on."""
    try:
        yield
    except OSError as error:
        where, why = error.filename or folder, error.strerror or error
        raise UserError(f"{where}: {why}: {kept}; put that right, and the same command goes on") from None


def hold(folder, wait=False):
    """`files.lock` of a corpus's folder; none for a finished corpus where nothing can be written."""
    if (folder / "meta.json").exists() and files.why_unwritable(folder):
        return contextlib.nullcontext()
    return files.lock(folder, wait)


def write_shard(path, tokens):
    """Write `tokens` (n,) uint16 as one shard; return its entry for meta.json: file, tokens, sha256."""
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    tokens = tokens.astype("<u2", copy=False)
    replace_file(path, header, tokens)
    digest = hashlib.sha256(header)
    digest.update(tokens)
    return {"file": path.name, "tokens": len(tokens), "sha256": digest.hexdigest()}


class Writer:
    """Cut a stream of documents into the shards of a corpus; killed at any moment, resume to identical bytes.

    source, licence: plain text for meta.json. recipe: a JSON-able dict of all that decides the text (files,
    limits, versions). tokenizer: a Tokenizer, None: GPT-2's; another one's file is kept beside the shards.
    `progress.json` notes, at each whole shard, where in which document its split goes on.
    A new Writer with the same recipe reads it and `wants` only what the shards do not hold yet; with another
    recipe it starts over.

        writer = Writer(folder, source, licence, recipe)
        if not writer.finished:
            for index, (split, text) in enumerate(documents):  # always in the same order
                if writer.wants(split, index):
                    writer.add(split, index, tokenizer.encode(text), len(text.encode()))
            writer.finish()

    UserError if the folder holds a finished corpus of another recipe: that is never overwritten.
    """

    def __init__(self, folder, source, licence, recipe, shard_tokens=100_000_000, tokenizer=None):
        if not 0 < shard_tokens < 2**31:
            raise UserError(f"shard_tokens={shard_tokens}: the header's count is an int32: 1 to {2**31 - 1}")
        self.folder = Path(folder)
        self.shard_tokens = shard_tokens
        self.tokenizer = tokenizer or gpt2()
        if self.tokenizer.n_tokens > 2**16:
            raise UserError(f"{self.tokenizer}: shards hold ids below 65,536: take a smaller tokenizer")
        self.meta = {
            "version": VERSION,
            **self.tokenizer.entry,
            "vocab_size": self.tokenizer.n_tokens,
            "source": source,
            "licence": licence,
            "recipe": {**recipe, "shard_tokens": shard_tokens},
        }
        self.meta = json.loads(json.dumps(self.meta))  # as it will be read back: tuples are lists
        self.finished = self._is_finished()
        if self.finished:
            return
        check_writable(self.folder)
        # What the whole shards of a split hold: the documents and bytes before `document`, and its first
        # `offset` tokens.
        empty = {"document": 0, "offset": 0, "documents": 0, "bytes": 0, "shards": []}
        self.closed = self._read_progress() or dict.fromkeys(SPLITS, empty)
        self.documents = {split: self.closed[split]["documents"] for split in SPLITS}
        self.bytes = {split: self.closed[split]["bytes"] for split in SPLITS}
        self.next = {split: self.closed[split]["document"] for split in SPLITS}
        # Memory is used only as they fill: a small corpus stays small.
        self.buffers = {split: np.empty(shard_tokens, "<u2") for split in SPLITS}
        self.filled = dict.fromkeys(SPLITS, 0)

    def _is_finished(self):
        meta = read_json(self.folder / "meta.json")
        if meta is None:
            return False
        if changed := changes(meta, self.meta):
            raise UserError(
                f"{self.folder} holds a finished dataset of another {changed}: "
                f"write to another folder, or delete {self.folder / 'meta.json'} to replace it"
            )
        return True

    def _read_progress(self):
        """Return the state of an unfinished run of the same settings; else clear the folder, return None."""
        progress = read_json(self.folder / "progress.json")
        if progress is not None:
            shards = [shard["file"] for split in SPLITS for shard in progress["closed"][split]["shards"]]
            if progress["meta"] == self.meta and all((self.folder / shard).exists() for shard in shards):
                print(f"{self.folder}: going on after {len(shards)} finished shards")
                return progress["closed"]
            changed = changes(progress["meta"], self.meta) or "shards, which are missing"
            print(f"{self.folder}: unfinished, of another {changed}: starting over")
            (self.folder / "progress.json").unlink()
        for split in SPLITS:
            for stale in self.folder.glob(f"{split}_*.bin*"):  # .tmp, too
                stale.unlink()

    def wants(self, split, index):
        """False if document `index` lies in whole shards already, so that it need not be tokenised again."""
        return index >= self.closed[split]["document"]

    def tokens_in_shards(self):
        """Tokens that whole shards hold already."""
        return sum(shard["tokens"] for split in SPLITS for shard in self.closed[split]["shards"])

    def add(self, split, index, tokens, n_bytes):
        """Append document `index` (its place in the source, increasing): tokens (n,), and its UTF-8 bytes."""
        tokens = np.append(tokens, np.uint16(self.tokenizer.end_of_text))
        closed = self.closed[split]
        offset = closed["offset"] if index == closed["document"] else 0  # begun in a shard of the run before
        while offset < len(tokens):
            start = self.filled[split]
            piece = tokens[offset : offset + self.shard_tokens - start]
            self.buffers[split][start : start + len(piece)] = piece
            self.filled[split] += len(piece)
            offset += len(piece)
            if self.filled[split] == self.shard_tokens:
                self._close_shard(split, index, offset)
        self.documents[split] += 1
        self.bytes[split] += n_bytes
        self.next[split] = index + 1

    def _close_shard(self, split, document, offset):
        shards = self.closed[split]["shards"]
        path = self.folder / f"{split}_{len(shards):06d}.bin"
        with self._disk_errors():
            shard = write_shard(path, self.buffers[split][: self.filled[split]])
        self.filled[split] = 0
        self.closed[split] = {
            "document": document,
            "offset": offset,
            "documents": self.documents[split],
            "bytes": self.bytes[split],
            "shards": [*shards, shard],
        }
        # The other split's open shard is not saved: a resumed run tokenises its documents again, only those.
        progress = {"meta": self.meta, "closed": self.closed}
        with self._disk_errors():
            replace_file(self.folder / "progress.json", json.dumps(progress).encode())

    def _disk_errors(self):
        n = sum(len(self.closed[split]["shards"]) for split in SPLITS)
        return disk_errors(self.folder, f"{n} whole shards are kept")

    def finish(self):
        """Write the last, shorter shards, then meta.json; return that. UserError if a split is empty."""
        for split in SPLITS:
            if not self.documents[split]:
                purpose = {"train": "training", "val": "validation"}[split]
                raise UserError(f"{self.folder}: no text is left for {purpose}: give more text")
            if self.filled[split]:
                self._close_shard(split, self.next[split], 0)
        splits = {}
        for split in SPLITS:
            shards = self.closed[split]["shards"]
            splits[split] = {
                "tokens": sum(shard["tokens"] for shard in shards),
                "documents": self.documents[split],
                "bytes": self.bytes[split],
                "shards": shards,
            }
        meta = self.meta | {"splits": splits}
        with self._disk_errors():
            for name, content in self.tokenizer.files.items():
                replace_file(self.folder / name, content)
            replace_file(self.folder / "meta.json", json.dumps(meta, indent=1).encode())
        (self.folder / "progress.json").unlink(missing_ok=True)
        return meta


def changes(old, new):
    """What differs between two data sets of the same folder, before their shards, in words; "" if nothing."""
    words = [key for key in new if key != "recipe" and old.get(key) != new[key]]
    old, new = old.get("recipe", {}), new["recipe"]
    differing = [key for key in old | new if old.get(key) != new.get(key)]
    for key in differing:
        a, b = old.get(key), new.get(key)
        if key == "files" and a and b:
            before = [entry for entry in a if entry not in b]
            names = sorted({entry[0] for entry in before + [entry for entry in b if entry not in a]})
            words.append(f"content of {', '.join(names[:3])}{', ...' * (len(names) > 3)}" if names else key)
        elif isinstance(a, list | dict | None) and isinstance(b, list | dict | None):
            words.append(key)
        else:
            words.append(f"{key} ({a}, now {b})")
    return ", ".join(words)


def how_to_get(folder):
    """What to do about a missing data set: its prepare.py, the nearest name, else how to make one."""
    corpus, tokenizer = read_name(folder.name)
    if (script := folder.with_name(corpus) / "prepare.py").exists():
        return f"run python {shortest(script)}" + (f" --tokenizer={tokenizer}" if tokenizer != "gpt2" else "")
    beside = list(DATA.glob("*/prepare.py"))
    for place in (Path(), user_cache(), DATA, folder.parent):  # of two of a name, the last one wins
        beside += place.glob("*/meta.json")
    places = {path.parent.name: path.parent for path in beside}
    if near := get_close_matches(folder.name, places, n=1):
        return f"did you mean --dataset={as_argument(places[near[0]])}?"
    source = next((path for path in (folder, Path(folder.name)) if path.exists()), "FILES")
    script = shortest(DATA / "openwebtext" / "prepare.py")
    out = shlex.quote(folder.name.split(".")[0])
    command = f"python {script} --source={shlex.quote(str(source))} --out={out}"
    return f"make it of your own text: {command}"


def read_json(path):
    """Return a JSON file's content, None if there is no such file. UserError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise UserError(f"{path} is damaged: delete it and prepare the data again") from None


class Dataset:
    """The windows of one split, and batches that are a pure function of (seed, step).

    Window i of a shard is its tokens [i*T, i*T + T], T = block_size: T inputs and the T targets one further
    on. Every token but the first, and fewer than T at the end of a shard, is a target exactly once. Shards
    are memory-mapped, so a corpus may be larger than memory.

    Attributes: `n_windows`; `tokens` and `bytes` of the split (bits per byte = nats per token / ln 2 * tokens
    / bytes); `data_sha256`, which identifies the text, its order and the tokenizer; `meta`, all of
    meta.json; `tokenizer`. verify=True reads every shard once and checks its hash. UserError names a damaged
    file.
    """

    def __init__(self, folder, split, block_size, verify=False):
        self.folder = Path(folder)
        self.block_size = block_size
        script = self.folder / "prepare.py"
        prepare = f"run python {shortest(script)}" if script.exists() else "run the prepare.py that writes it"
        self.remedy = f"delete {shortest(self.folder / 'meta.json')} and {prepare}"
        meta = read_json(self.folder / "meta.json")
        if meta is None:
            raise UserError(f"no dataset at {shortest(folder)}: {how_to_get(self.folder)}")
        if not isinstance(meta, dict):
            raise UserError(f"{shortest(self.folder / 'meta.json')} is damaged: {self.remedy}")
        name = meta.get("tokenizer", "gpt2")
        known = not is_gpt2(name) or gpt2(name).sha256 == meta.get("tokenizer_sha256")
        if meta.get("version") != VERSION or not known:  # the file of another tokenizer is read when needed
            raise UserError(
                f"{self.folder / 'meta.json'}: made by another version or tokenizer: {self.remedy}"
            )
        self.data_sha256 = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
        self.meta = meta
        try:
            counts = meta["splits"][split]
            self.tokens, self.bytes = counts["tokens"], counts["bytes"]
            self.n_tokens = int(meta["vocab_size"])
            entries = [(self.folder / e["file"], e["tokens"], e["sha256"]) for e in counts["shards"]]
        except (KeyError, TypeError):
            raise UserError(f"{shortest(self.folder / 'meta.json')} is damaged: {self.remedy}") from None
        self.paths = [path for path, _, _ in entries]
        self.shards = [self._open(path, n_tokens) for path, n_tokens, _ in entries]
        if verify:
            for (path, _, sha256), shard in zip(entries, self.shards, strict=True):
                self._verify(path, shard, sha256)
        # Windows before each shard, and in all: first_window[s] <= window < first_window[s + 1] is in shard
        # s.
        self.first_window = np.cumsum([0] + [max(0, len(shard) - 1) // block_size for shard in self.shards])
        self.n_windows = int(self.first_window[-1])
        if not self.n_windows:
            raise UserError(self._too_small(split))
        self._orders = {}  # (seed, epoch) -> permutation

    @functools.cached_property
    def tokenizer(self):
        """The Tokenizer that made the shards. UserError if its file is missing."""
        return kept(self.folder, self.meta)

    def check_tokenizer(self, tokenizer, whose):
        """UserError unless the shards were made with this Tokenizer, that of `whose`."""
        if self.meta.get("tokenizer_sha256") != tokenizer.sha256:
            raise UserError(
                f"{shortest(self.folder)} holds tokens of {self.meta.get('tokenizer')}, {whose} has "
                f"{tokenizer.name}: prepare the text with its tokenizer (--tokenizer of prepare.py)"
            )

    def _too_small(self, split):
        """Why there is no window, and what to do about it."""
        largest = max(map(len, self.shards), default=0)
        where = f"{largest:,} tokens" + " in its largest shard" * (len(self.shards) > 1)
        ways = ["prepare more text"]
        recipe = self.meta.get("recipe", {})
        if split == "val" and "val_every" in recipe and "split" not in recipe:
            ways.append(f"prepare it with a smaller --val_every than {recipe['val_every']}")
        if largest > 1:
            ways.append(f"give --block_size={largest - 1} or less")
        return (
            f"{shortest(self.folder)}: {split} has {where}, one window takes block_size + 1 = "
            f"{self.block_size + 1:,}: {', or '.join(ways)}"
        )

    def _open(self, path, n_tokens):
        """Map a shard's tokens, (n,) uint16, after checking what can be checked without reading them."""
        if not path.exists():
            raise UserError(f"{path} is missing: {self.remedy}")
        header = np.fromfile(path, "<i4", HEADER_INTS)
        expected = {"magic": MAGIC, "version": VERSION, "token count": n_tokens}
        for (name, value), found in zip(expected.items(), header.tolist(), strict=False):
            if found != value:
                raise UserError(f"{path}: {name} is {found}, not {value}: {self.remedy}")
        size, expected_size = path.stat().st_size, HEADER_BYTES + 2 * n_tokens
        if size != expected_size:
            raise UserError(f"{path}: {size} bytes, not {expected_size}: {self.remedy}")
        return np.memmap(path, "<u2", mode="r", offset=HEADER_BYTES)

    def _verify(self, path, shard, sha256):
        self._check_range(path, shard)
        if files.sha256(path) != sha256:
            raise UserError(f"{path}: SHA-256 differs from meta.json: {self.remedy}")

    def _check_range(self, path, tokens):
        if (largest := tokens.max()) >= self.n_tokens:
            raise UserError(
                f"{path}: token {largest} is outside the vocabulary of {self.n_tokens}: {self.remedy}"
            )

    def _gather(self, windows):
        """Return (x, y), int64 tensors (B, T), for window numbers (B,)."""
        import torch  # here, so that preparing data needs no torch

        T = self.block_size
        tokens = np.empty((len(windows), T + 1), np.uint16)
        which = np.searchsorted(self.first_window, windows, side="right") - 1  # (B,) shard of each window
        for row, shard, window in zip(tokens, which, windows - self.first_window[which], strict=True):
            row[:] = self.shards[shard][window * T : window * T + T + 1]
        if tokens.size and tokens.max() >= self.n_tokens:
            row = tokens.max(axis=1).argmax()
            self._check_range(self.paths[which[row]], tokens[row])
        x, y = tokens[:, :-1], tokens[:, 1:]
        return torch.from_numpy(x.astype(np.int64)), torch.from_numpy(y.astype(np.int64))

    def _order(self, seed, epoch):
        """The permutation of all windows in one epoch, (n_windows,) int32 where that is enough."""
        if (seed, epoch) not in self._orders:
            if len(self._orders) == 2:  # a batch straddles two epochs at most, unless the corpus is tiny
                del self._orders[min(self._orders)]
            dtype = np.int32 if self.n_windows < 2**31 else np.int64
            self._orders[seed, epoch] = np.random.default_rng([seed, epoch]).permutation(
                np.arange(self.n_windows, dtype=dtype)
            )
        return self._orders[seed, epoch]

    def batch(self, step, batch_size, seed, rank=0, world_size=1, shuffle=True):
        """Return rank's slice of global batch `step`: x, y int64 tensors (batch_size / world_size, T).

        Sample j of step k is number g = k * batch_size + j of the run: the (g mod n_windows)-th of epoch g //
        n_windows, each epoch a fresh permutation of all windows (or, without shuffle, their order on disk).
        It depends on nothing else: not on the number of ranks, nor on what was asked for before. Ranks take
        consecutive slices.
        """
        if batch_size % world_size:
            raise UserError(f"batch_size={batch_size} does not divide over {world_size} processes")
        share = batch_size // world_size
        first = step * batch_size + rank * share
        epochs, positions = np.divmod(np.arange(first, first + share), self.n_windows)
        windows = positions
        if shuffle:
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                windows[now] = self._order(seed, epoch)[positions[now]]
        return self._gather(windows)

    def windows(self, start, stop):
        """Return windows start..stop-1 as they lie on disk, fewer at the end: x, y int64 tensors (n, T)."""
        return self._gather(np.arange(start, min(stop, self.n_windows)))
