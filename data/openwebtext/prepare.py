"""OpenWebText, 8,013,769 web pages, or any text of your own, as token shards.

    python data/openwebtext/prepare.py --source=books --out=mine    # own text: a file, folder or quoted glob
    python data/openwebtext/prepare.py                              # OpenWebText; pip install datasets
    python data/openwebtext/prepare.py --limit_docs=100000          # its first pages only

OpenWebText is about 9.04B training and 4.4M validation tokens: 18 GB of shards. It is streamed: nothing else
is kept on the disk. Killed, it goes on from the last whole shard when the same command is given again: the
pages before that are downloaded again, but not tokenised.

Own text: .parquet, .jsonl or .json with a document a row in the field `text`, .txt or .md with a document a
file; all but .parquet also as .gz, .bz2 or .xz. `<|endoftext|>` separates documents in all of them. A folder
means all such files anywhere in it. `--out=mine` is data/mine, which `train.py --dataset=mine` takes; a path
is that folder.

One document in about val_every is validation. If that leaves a split without any, as with a single file,
validation is the last twentieth of the text (1 / val_every if that is more), cut where a paragraph ends.
"""

import hashlib
import os
import shlex
import shutil
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
from data import texts as local
from data.shards import SPLITS, Writer, hold, how_to_train, in_tokens, locate
from data.tokenizer import load
from files import shortest

PAGES = 8_013_769  # in OpenWebText
SHARDS_GB = 18


@dataclass
class PrepareConfig:
    source: str | None = None  # own text: a file, a folder or a quoted glob; None: OpenWebText
    out: str | None = None  # name in data/, or path of a folder; own text needs one; None: openwebtext
    limit_docs: int | None = None  # only the first N documents
    val_every: int = 2000  # one document in about N goes to validation
    shard_tokens: int = 100_000_000  # tokens in a shard file (200 MB)
    tokenizer: str = "gpt2"  # gpt2, gpt2-8192, a tokenizer.json or the folder that holds one, a GGUF file
    num_proc: int = os.cpu_count() or 1  # tokenizer threads; the result does not depend on it

    def __post_init__(self):
        if min(self.shard_tokens, self.num_proc, self.limit_docs or 1) < 1:
            raise ValueError("shard_tokens, num_proc and limit_docs must be 1 or more")
        if self.limit_docs == 0:
            raise ValueError("limit_docs=0: must be 1 or more")
        if self.val_every < 2:
            raise ValueError(
                f"val_every={self.val_every}: must be 2 or more, or no text is left for training"
            )
        if "" in (self.source, self.out):
            raise ValueError("source and out must not be empty")
        if self.source is not None and self.out is None:
            name = shlex.quote(local.stem(self.source))
            raise ValueError(f"--source needs the name of the dataset to make: add --out={name}")


def is_val(index, val_every):
    """A document's split depends on its place alone, hashed: no period of the source can line up with it."""
    digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % val_every == 0


def end_share(val_every):
    """With too few documents for one in val_every, the last 1 / end_share of the text is validation."""
    return min(val_every, 20)


def border(texts, val_every):
    """None if each split gets a document by `is_val`, else the character at which validation begins."""
    seen, total = set(), 0
    for index, text in enumerate(texts):
        seen.add(is_val(index, val_every))
        if len(seen) == 2:
            return None
        total += len(text)
    if total < 2:
        raise UserError("there is no text in the source, or too little for training and validation")
    return total - -(-total // end_share(val_every))


def paragraph_end(text, at):
    """The end of a paragraph, line or word before character `at`, unless what follows it would be doubled."""
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, max(1, 2 * at - len(text)), at)
        if found > 0:
            return found + len(mark)
    return at


def divide(texts, val_every, border=None):
    """Yield (split, index, text): by `is_val`, or if there is a `border`, validation is what follows it."""
    position = 0
    for index, text in enumerate(texts):
        if border is None:
            yield SPLITS[is_val(index, val_every)], index, text
            continue
        at = min(max(border - position, 0), len(text))
        position += len(text)
        if 0 < at < len(text):
            at = paragraph_end(text, at)
        for split, part in zip(SPLITS, (text[:at], text[at:]), strict=True):
            if part.strip():
                yield split, index, part if part == text else part.strip()


def openwebtext():
    """Yield the texts of OpenWebText, streamed from the hub."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("OpenWebText comes through the datasets package: pip install datasets") from None
    try:
        # The full name: the bare "openwebtext" of old is a loading script, which datasets >= 4 refuses.
        rows = load_dataset("Skylion007/openwebtext", split="train", streaming=True)
        yield from stream(rows)
    except Exception as error:  # of the network, in as many classes as there are packages below `datasets`
        raise UserError(
            f"OpenWebText cannot be read: {local.first_line(error)}: try again on a network that reaches "
            "huggingface.co (whole shards are kept), or give files of your own with --source"
        ) from None


def stream(rows):
    for batch in rows.iter(batch_size=1000):
        yield from local.split(batch["text"])


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


def encode_chunk(chunk, tokenizer):
    """Return (split, index, tokens, UTF-8 bytes) for each (split, index, text)."""
    return [(split, index, tokenizer.encode(text), len(text.encode())) for split, index, text in chunk]


def encode_in_order(documents, num_proc, tokenizer):
    """Yield encoded chunks in order, while threads (tiktoken releases the GIL) work on those that follow.

    The queue is long enough to keep every thread busy while a shard is written, and bounded, as memory is.
    """
    tokenizer.encode("")  # built once, before the threads would each begin to
    with ThreadPoolExecutor(num_proc) as pool:
        queue = deque()
        for chunk in chunks(documents):
            queue.append(pool.submit(encode_chunk, chunk, tokenizer))
            if len(queue) > 8 * num_proc:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def prepare(cfg):
    """Write the dataset to cfg.out unless it is there. Return what meta.json holds, None if it was there."""
    tokenizer = load(cfg.tokenizer)
    folder = locate(cfg.out or in_tokens("openwebtext", tokenizer))
    if cfg.source is not None and (folder / "prepare.py").exists():
        raise UserError(f"--out={cfg.out} is the place of another dataset: give a name of your own")
    with hold(folder):
        return write(cfg, folder, tokenizer)


def write(cfg, folder, tokenizer):
    """`prepare` into `folder`, which nobody else writes."""
    paths = [] if cfg.source is None else local.find(cfg.source, out=folder)
    stamps = local.stamps(paths)

    def texts():
        return islice(local.documents(paths) if paths else openwebtext(), cfg.limit_docs)

    if paths:
        source, licence = f"{len(paths)} local files", "unknown"
        recipe = {"files": local.fingerprints(paths)}
    else:
        source, licence = "OpenWebText (Skylion007/openwebtext)", "collection: CC0"
        recipe = {}
    recipe |= {"val_every": cfg.val_every, "limit_docs": cfg.limit_docs}
    whole = not paths and (cfg.limit_docs or PAGES) >= PAGES
    start_of_val = None if whole else border(texts(), cfg.val_every)
    if start_of_val is not None:
        recipe["split"] = f"the last 1/{end_share(cfg.val_every)} of the text, cut where a paragraph ends"

    writer = Writer(folder, source, licence, recipe, cfg.shard_tokens, tokenizer)
    if writer.finished:
        print(f"{shortest(folder)} is already there: {how_to_train(folder)}")
        return None
    free = shutil.disk_usage(folder).free / 1e9 + 2e-9 * writer.tokens_in_shards()
    if whole and free < SHARDS_GB:
        raise UserError(
            f"OpenWebText needs {SHARDS_GB} GB in {folder}, where {free:.1f} GB are free: "
            "give another folder with --out, or --limit_docs"
        )
    if start_of_val is not None:
        print(f"too few documents for one in {cfg.val_every} to be validation: it is {recipe['split']}")

    n_bytes = 0
    start, progress = time.perf_counter(), bar(total=cfg.limit_docs)

    def wanted():
        for split, index, text in divide(texts(), cfg.val_every, start_of_val):
            if writer.wants(split, index):
                yield split, index, text
            else:
                progress.update()

    with progress:
        for chunk in encode_in_order(wanted(), cfg.num_proc, tokenizer):
            for split, index, tokens, size in chunk:
                writer.add(split, index, tokens, size)
                n_bytes += size
            progress.update(len(chunk))
        for path, before, now in zip(paths, stamps, local.stamps(paths), strict=True):
            if before != now:
                raise UserError(f"{path} changed while it was read: give the same command again")
        meta = writer.finish()
    for name, counts in meta["splits"].items():
        print(f"{shortest(folder)}: {name} {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    print(f"{n_bytes / 1e6 / (time.perf_counter() - start):.1f} MB of text a second; {how_to_train(folder)}")
    return meta


def bar(total):
    from tqdm import tqdm

    return tqdm(total=total, unit=" documents", unit_scale=True, disable=None)


def main():
    (cfg,) = configurator.parse(PrepareConfig)
    prepare(cfg)


if __name__ == "__main__":
    configurator.run(main)
