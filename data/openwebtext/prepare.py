"""OpenWebText, 8,013,769 web pages, or any text of your own, as token shards.

    pip install datasets
    python data/openwebtext/prepare.py                      # all of it
    python data/openwebtext/prepare.py --limit_docs=100000  # the first pages only, and no more is downloaded

The full set is about 9.04B training and 4.4M validation tokens: 18 GB of shards, beside 54 GB in the cache of
`datasets`. Killed, it goes on from the last whole shard when the same command is given again.

Own text, a file or a quoted glob of .parquet, .jsonl or .json (field `text`) or .txt (a document a file, or
documents separated by <|endoftext|>), written to a folder of its own:

    python data/openwebtext/prepare.py --source='books/*.txt' --out=data/mine --val_every=20
"""

import glob
import hashlib
import json
import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator
from configurator import UserError
from data.shards import Writer
from data.tokenizer import encode, encoding


@dataclass
class PrepareConfig:
    source: str | None = (
        None  # own text: path or quoted glob of .parquet/.jsonl/.json/.txt; None: OpenWebText
    )
    out: str = "data/openwebtext"  # folder to write
    limit_docs: int | None = None  # only the first N documents
    val_every: int = 2000  # one document in about N goes to validation
    shard_tokens: int = 100_000_000  # tokens in a shard file (200 MB)
    num_proc: int = os.cpu_count() or 1  # tokenizer threads; the result does not depend on it

    def __post_init__(self):
        if min(self.val_every, self.shard_tokens, self.num_proc, self.limit_docs or 1) < 1:
            raise ValueError("val_every, shard_tokens, num_proc and limit_docs must be 1 or more")


def is_val(index, val_every):
    """A document's split depends on its place alone, hashed: no period of the source can line up with it."""
    digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % val_every == 0


def openwebtext(cfg):
    """Yield the texts of OpenWebText, from the cache of `datasets` or the hub."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("OpenWebText comes through the datasets package: pip install datasets") from None
    # The full name: the bare "openwebtext" of old is a loading script, which datasets >= 4 refuses to run.
    options = {"streaming": True} if cfg.limit_docs is not None else {"num_proc": cfg.num_proc}
    try:
        rows = load_dataset("Skylion007/openwebtext", split="train", **options)
    except OSError as error:  # no network, no such dataset, disk full
        raise UserError(f"OpenWebText cannot be loaded: {error}") from None
    for batch in rows.iter(batch_size=1000):
        yield from batch["text"]


def local_files(source):
    """Return the paths that `source` names, sorted. UserError if there is none, or one of an unknown kind."""
    paths = [Path(path) for path in sorted(glob.glob(source, recursive=True))]
    if not paths:
        raise UserError(f"--source={source}: no such file")
    for path in paths:
        if path.suffix not in READERS:
            raise UserError(f"{path}: not one of {', '.join(READERS)}")
    return paths


def local_texts(paths):
    """Yield the texts of local files. UserError names the file that cannot be read."""
    for path in paths:
        try:
            for text in READERS[path.suffix](path):
                if text:
                    yield text.encode("utf-8", "replace").decode()  # JSON may spell half a surrogate pair
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: each row needs a field `text` that holds a string") from None
        except (OSError, ValueError) as error:  # also damaged JSON, parquet and UTF-8
            raise UserError(f"{path}: {error}") from None


def read_parquet(path):
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if "text" not in file.schema_arrow.names:
            raise KeyError("text")
        for batch in file.iter_batches(batch_size=1000, columns=["text"]):
            yield from batch.column(0).to_pylist()


def read_jsonl(path):
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)["text"]


def read_json(path):
    """A .json file is one list of objects, or lines like .jsonl."""
    with open(path, encoding="utf-8") as file:
        is_list = file.read(1) == "["
    if not is_list:
        yield from read_jsonl(path)
        return
    for row in json.loads(path.read_text(encoding="utf-8")):
        yield row["text"]


def read_txt(path):
    rest = ""
    with open(path, encoding="utf-8") as file:
        while block := file.read(2**26):
            *whole, rest = (rest + block).split("<|endoftext|>")
            yield from (text.strip() for text in whole)
    yield rest.strip()


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".json": read_json, ".txt": read_txt}


def chunks(documents, size=2**20):
    """Group (split, index, text) into lists of about `size` characters: a tenth of a second of work."""
    chunk, length = [], 0
    for document in documents:
        chunk.append(document)
        length += len(document[-1])
        if length >= size:
            yield chunk
            chunk, length = [], 0
    yield chunk


def encode_chunk(chunk):
    """Return (split, index, tokens, UTF-8 bytes) for each (split, index, text)."""
    return [(split, index, encode(text), len(text.encode())) for split, index, text in chunk]


def encode_in_order(documents, num_proc):
    """Yield encoded chunks in order, while threads (tiktoken releases the GIL) work on those that follow.

    The queue is long enough to keep every thread busy while a shard is written, and bounded, as memory is.
    """
    encoding()  # built once, before the threads would each begin to
    with ThreadPoolExecutor(num_proc) as pool:
        queue = deque()
        for chunk in chunks(documents):
            queue.append(pool.submit(encode_chunk, chunk))
            if len(queue) > 8 * num_proc:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def prepare(cfg):
    """Write the dataset to cfg.out unless it is there. Return what meta.json holds, None if it was there."""
    from tqdm import tqdm

    if cfg.source is None:
        source, licence = "OpenWebText (Skylion007/openwebtext)", "collection: CC0"
        recipe, texts = {}, openwebtext(cfg)
    else:
        paths = local_files(cfg.source)
        # Names and sizes, not folders: the same files give the same data hash wherever they lie.
        source, licence = f"{len(paths)} local files", "unknown"
        recipe, texts = {"files": [[path.name, path.stat().st_size] for path in paths]}, local_texts(paths)
    recipe |= {"val_every": cfg.val_every, "limit_docs": cfg.limit_docs}

    writer = Writer(cfg.out, source, licence, recipe, cfg.shard_tokens)
    if writer.finished:
        print(f"{cfg.out} is already there")
        return None

    progress = tqdm(total=cfg.limit_docs, unit=" documents", unit_scale=True, disable=None)

    def wanted():
        for index, text in enumerate(islice(texts, cfg.limit_docs)):
            split = "val" if is_val(index, cfg.val_every) else "train"
            if writer.wants(split, index):
                yield split, index, text
            else:
                progress.update()

    start, n_bytes = time.perf_counter(), 0
    with progress:
        for chunk in encode_in_order(wanted(), cfg.num_proc):
            for split, index, tokens, size in chunk:
                writer.add(split, index, tokens, size)
                n_bytes += size
            progress.update(len(chunk))
        meta = writer.finish()
    for name, counts in meta["splits"].items():
        print(f"{cfg.out}: {name} {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    print(f"{n_bytes / 1e6 / (time.perf_counter() - start):.1f} MB of text a second")
    return meta


def main():
    (cfg,) = configurator.parse(PrepareConfig)
    prepare(cfg)


if __name__ == "__main__":
    configurator.run(main)
