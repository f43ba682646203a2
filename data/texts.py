"""Text files of one's own: which ones a source names, what is in them, and the documents they hold.

    paths = find("books")                  a file, a folder with all below it, or a glob; `~` is the home
    prints = fingerprints(paths)           name, size and SHA-256 of each: what the data set is made of
    for text in documents(paths): ...      never blank

.parquet, .jsonl and .json have one document a row, in the field `text`; .txt and .md are one document a file.
`<|endoftext|>` in a text of any of them ends a document and begins the next one. All but .parquet may be
compressed: .gz, .bz2, .xz. Every error is a UserError that names the file, and the line if there is one.
"""

import bz2
import codecs
import glob
import gzip
import hashlib
import importlib.util
import json
import lzma
import shlex
import zlib
from collections import Counter
from difflib import get_close_matches
from pathlib import Path

from configurator import UserError

SEPARATOR = "<|endoftext|>"
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
UNPACK = {".zst": "zstd -d", ".zip": "unzip", ".tar": "tar -xf", ".tgz": "tar -xf", ".7z": "7z x"}
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def ending(path):
    """What decides how a file is read: its lower-case suffix, below the one of a compression."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def readable(path):
    compressed = path.suffix.lower() in COMPRESSED
    return ending(path) in READERS and not (compressed and ending(path) == ".parquet")


def stem(source):
    """A name for the data set of a source: books of books/*.txt or ~/books.jsonl.gz."""
    parts = [part for part in Path(source).parts if not any(mark in part for mark in "*?[~/")]
    return parts[-1].split(".")[0] if parts and parts[-1].split(".")[0] else "mine"


def what_is_read():
    return f"{', '.join(READERS)}, and all but .parquet with {', '.join(COMPRESSED)} behind it"


def find(source, out=None):
    """The files that `source` names, sorted; of a folder, those of a known ending that are not in `out`."""
    path = Path(source).expanduser()
    paths = [path]
    if not path.exists():  # else it is no pattern: names may hold square brackets
        paths = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.exists())
    if not paths:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        beside = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        near = "".join(
            f": did you mean {path.parent / n}?" for n in get_close_matches(path.name, beside, n=1)
        )
        raise UserError(f"--source={source}: no such file or folder{where}{near}")
    if out and any(path.is_dir() and path.resolve() == Path(out).resolve() for path in paths):
        raise UserError(f"--out={out} is the folder of the source: give another")
    if any(path.is_dir() for path in paths):
        paths = in_folders(source, paths, out)
    for path in paths:
        if not readable(path):
            tool = UNPACK.get(path.suffix.lower())
            why = (
                f"unpack it first: {tool} {shlex.quote(str(path))}" if tool else f"read are {what_is_read()}"
            )
            raise UserError(f"{path}: {why}")
        if ending(path) == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise UserError(f"{path}: parquet needs a package: pip install pyarrow")
    return paths


def in_folders(source, paths, out):
    """The files among `paths` and, where one is a folder, the readable ones anywhere in it, sorted."""
    found, left_out = set(), Counter()
    for path in paths:
        if not path.is_dir():
            found.add(path)
            continue
        for file in path.rglob("*"):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if hidden or not file.is_file() or (out and file.resolve().is_relative_to(Path(out).resolve())):
                continue
            if readable(file):
                found.add(file)
            else:
                left_out[file.suffix or "no ending"] += 1
    left = ", ".join(f"{n} {suffix}" for suffix, n in left_out.most_common(5))
    if not found:
        raise UserError(
            f"--source={source}: no file to read ({left or 'it is empty'}): read are {what_is_read()}"
        )
    print(f"{source}: {len(found)} files" + (f", left out: {left}" if left else ""))
    return sorted(found)


def fingerprints(paths):
    """[[name, bytes, SHA-256], ...] of files. Names without folders: the same files are the same anywhere."""
    from tqdm import tqdm

    total = sum(path.stat().st_size for path in paths)
    prints = []
    with tqdm(
        total=total, desc="hash", unit="B", unit_scale=True, leave=False, disable=total < 2**30 or None
    ) as bar:
        for path in paths:
            try:
                with open(path, "rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from None
            prints.append([path.name, path.stat().st_size, sha256])
            bar.update(prints[-1][1])
    return prints


def stamps(paths):
    """Size and time of each file: cheap, to see whether one was written to meanwhile."""
    stats = [path.stat() if path.exists() else None for path in paths]
    return [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]


def documents(paths):
    """Yield the texts of local files, none of them blank."""
    for path in paths:
        try:
            yield from split(READERS[ending(path)](path))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}{not_utf8(path, error)}") from None
        except DAMAGED as error:
            raise UserError(f"{path}: cut off or damaged: {first_line(error)}") from None
        except (OSError, ValueError) as error:  # pyarrow's, too
            raise UserError(f"{path}: {getattr(error, 'strerror', None) or first_line(error)}") from None


def split(texts):
    """Yield the documents of rows: each is one, or several around <|endoftext|>; blank ones are left out."""
    for text in texts:
        if SEPARATOR not in text:
            if text and not text.isspace():
                yield text
            continue
        yield from filter(None, map(str.strip, text.split(SEPARATOR)))


def first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def open_binary(path):
    return COMPRESSED.get(path.suffix.lower(), open)(path, "rb")


def not_utf8(path, error):
    """Where the first byte is that is not UTF-8, and what to do."""
    with open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return ": it is UTF-16: save it as UTF-8"
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte {error.start + 1}, 0x{line[error.start]:02x},"
                return f", line {number}: {byte} is not UTF-8: save the file as UTF-8"
    return f": {error}"


def text_of(row, where):
    """The document of a row; None is a blank one. UserError without a field `text` that holds a string."""
    text = row.get("text", 0) if isinstance(row, dict) else 0
    if not isinstance(text, str | None):
        has = f": it has {', '.join(map(repr, list(row)[:5]))}" if isinstance(row, dict) else ""
        raise UserError(f"{where}: each row needs a field `text` that holds a string{has}")
    return (text or "").encode("utf-8", "replace").decode()  # JSON may spell half a surrogate pair


def read_parquet(path):
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if "text" not in file.schema_arrow.names:
            text_of(dict.fromkeys(file.schema_arrow.names, ""), path)
        for batch in file.iter_batches(batch_size=1000, columns=["text"]):
            yield from (text_of(row, path) for row in batch.to_pylist())


def read_jsonl(path):
    with open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not line.isspace() and line:
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: not JSON: {error.msg}") from None
                yield text_of(row, f"{path}, line {number}")


def read_json(path):
    """A .json file is one list of rows, one row, or a row a line like .jsonl."""
    with open_binary(path) as file:
        first = next((line for line in file if line.strip(codecs.BOM_UTF8 + b" \t\r\n")), b"")
    try:
        is_row = isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except ValueError:
        is_row = False
    if is_row:
        yield from read_jsonl(path)
        return
    with open_binary(path) as file:
        text = file.read().decode("utf-8-sig")
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield text_of(row, f"{path}, row {number}")


def read_txt(path):
    """Yield parts of a file at its separators: a file of many documents need not fit in memory."""
    rest = ""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open_binary(path) as file:
        while block := file.read(2**26):
            *whole, rest = (rest + decoder.decode(block)).split(SEPARATOR)
            yield from map(tidy, whole)
    yield tidy(rest + decoder.decode(b"", final=True))


def tidy(text):
    """Text with plain line ends, without the blank space around it."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


READERS = {
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".txt": read_txt,
    ".md": read_txt,
}
