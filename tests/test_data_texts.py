"""Text files as people write and name them: what is found, what is read, and each error in one line."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import UserError
from data import texts

BOM = b"\xef\xbb\xbf"


def read(folder, name, content):
    """The documents of one file."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(texts.documents(texts.find(str(path))))


def refused(action):
    """The one line of a UserError."""
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what is in a file ---


ROWS = [{"text": "one"}, {"text": ""}, {"text": " \n"}, {"text": None}, {"text": "a\u00e9 two\n"}]
LINES = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode() + b"\r\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", BOM + LINES),
        ("a.jsonl", BOM + b"\r\n\r\n" + LINES),
        ("A.JSONL", LINES),
        ("a.json", BOM + b"\n\n" + LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.json", BOM + b"\r\n \n" + json.dumps(ROWS, indent=2).encode()),
        ("a.jsonl.gz", gzip.compress(BOM + LINES, mtime=0)),
        ("a.json.bz2", bz2.compress(json.dumps(ROWS).encode())),
        ("a.jsonl.XZ", lzma.compress(LINES)),
    ],
)
def test_rows_as_editors_write_them(tmp_path, name, content):
    """A mark at the start, blank lines, CRLF and compression change nothing; blank rows are left out."""
    assert read(tmp_path, name, content) == ["one", "a\u00e9 two\n"]


def test_one_row_over_many_lines(tmp_path):
    assert read(tmp_path, "a.json", json.dumps({"id": 1, "text": "one"}, indent=2)) == ["one"]
    assert read(tmp_path, "b.json", " \n") == []


@pytest.mark.parametrize("name", ["a.txt", "notes.md", "A.TXT", "a.txt.gz"])
def test_plain_text(tmp_path, name):
    content = BOM + b"\r\n\r\none\r\n\r\ntwo\rthree\n\n"
    assert read(tmp_path, name, gzip.compress(content, mtime=0) if name.endswith("gz") else content) == [
        "one\n\ntwo\nthree"
    ]


def test_separator_means_the_same_in_every_format(tmp_path):
    """<|endoftext|> in a text ends a document, whatever file the text is in."""
    import pyarrow
    import pyarrow.parquet

    text = "<|endoftext|>one\n<|endoftext|>\n\ntwo <|endoftext|> \n<|endoftext|>"
    row = {"text": text}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert list(texts.documents([tmp_path / "a.parquet"])) == ["one", "two"]
    for name, content in (
        ("a.txt", text),
        ("a.md", text),
        ("a.jsonl", json.dumps(row)),
        ("a.json", json.dumps([row])),
    ):
        assert read(tmp_path, name, content) == ["one", "two"]


def test_separator_across_the_blocks_of_a_large_file(tmp_path, monkeypatch):
    class Slowly(io.FileIO):
        def read(self, _):
            return super().read(3)

    monkeypatch.setitem(texts.COMPRESSED, ".gz", Slowly)
    assert read(tmp_path, "a.txt.gz", "a\u00e9\U0001f642<|endoftext|>two" * 5) == [
        "a\u00e9\U0001f642",
        *["twoa\u00e9\U0001f642"] * 4,
        "two",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'\n{"text": "x"}\n\n{"text": \n', "a.jsonl, line 4: not JSON: Expecting value"),
        (
            "a.jsonl",
            b'\n{"text": "x"}\n{"body": "x"}',
            "a.jsonl, line 3: each row needs a field `text` that holds a string: it has 'body'",
        ),
        ("a.jsonl", b'{"text": 5}', "a.jsonl, line 1: each row needs a field `text`"),
        ("a.jsonl", b"[1]", "a.jsonl, line 1: each row needs a field `text`"),
        ("a.json", b'[\n{"text": "x"},\n{"text": x}\n]', "a.json, line 3: not JSON: Expecting value"),
        ("a.json", b'["x"]', "a.json, row 1: each row needs a field `text`"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}', "a.jsonl, line 2: byte 11, 0xe9, is not UTF-8"),
        ("a.json", b'[{"text": "x"},\n{"text": "\xe9"}]', "a.json, line 2: byte 11, 0xe9, is not UTF-8"),
        ("a.txt", b"x\ny\nab\xe9c", "a.txt, line 3: byte 3, 0xe9, is not UTF-8: save the file as UTF-8"),
        ("a.txt", b"x\nab\xc3", "a.txt, line 2: byte 3, 0xc3, is not UTF-8"),
        ("a.txt.gz", gzip.compress(b"x\nab\xe9c", mtime=0), "a.txt.gz, line 2: byte 3, 0xe9, is not UTF-8"),
        ("a.txt", "x\ny".encode("utf-16"), "a.txt: it is UTF-16: save it as UTF-8"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], "a.txt.gz: cut off or damaged: "),
        ("a.txt.gz", b"no gzip", "a.txt.gz: cut off or damaged: "),
        ("a.parquet", b"no parquet", "a.parquet: "),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, name, content, message):
    assert message in refused(lambda: read(tmp_path, name, content))


def test_parquet_without_a_text_column(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for rows in ([{"body": "x"}], [{"text": 1}]):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        message = refused(lambda: list(texts.documents([tmp_path / "a.parquet"])))
        assert "a.parquet: each row needs a field `text`" in message


# --- which files a source names ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """books/ with files of several kinds, in the current folder and in the home."""
    for name in (
        "b.txt",
        "a.MD",
        "sub/c.jsonl",
        "sub/deep/d.txt.gz",
        "e.pdf",
        "f",
        ".hidden/g.txt",
        ".h.txt",
    ):
        path = tmp_path / "books" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def found(source, **options):
    return [path.as_posix() for path in texts.find(source, **options)]


def test_a_folder_is_all_its_files(folder, capsys):
    """Sorted, from all below it, without hidden ones and those of unknown kinds, which are counted."""
    whole = ["books/a.MD", "books/b.txt", "books/sub/c.jsonl", "books/sub/deep/d.txt.gz"]
    assert found("books") == found("books/") == whole
    assert "books: 4 files, left out: 1 .pdf, 1 no ending" in capsys.readouterr().out
    assert found("books", out="books/sub") == whole[:2]  # not what is prepared inside
    assert found("book*") == whole
    assert found("~/books") == [f"{folder}/{path}" for path in whole]


def test_the_source_is_no_place_for_its_data_set(folder):
    assert refused(lambda: texts.find("books", out=folder / "books")) == (
        f"--out={folder / 'books'} is the folder of the source: give another"
    )


def test_globs_and_names_that_look_like_one(folder):
    assert found("books/*.txt") == ["books/b.txt"]
    assert found("books/**/*.txt.gz") == ["books/sub/deep/d.txt.gz"]
    (folder / "notes [1].md").write_text("x")
    assert found("notes [1].md") == ["notes [1].md"]
    assert found("~/notes [1].md") == [f"{folder}/notes [1].md"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("boks", "--source=boks: no such file or folder in .*: did you mean books"),
        ("books/none*.txt", "--source=books/none.*: no such file or folder"),
        (
            "books/e.pdf",
            "books/e.pdf: read are .parquet, .jsonl, .json, .txt, .md, and all but .parquet with .gz",
        ),
        ("books/f", "books/f: read are .parquet"),
        ("x y.jsonl.zst", "x y.jsonl.zst: unpack it first: zstd -d 'x y.jsonl.zst'"),
        ("x.parquet.gz", "x.parquet.gz: read are"),
        ("bare", r"--source=bare: no file to read \(1 .pdf\): read are"),
        ("empty", r"--source=empty: no file to read \(it is empty\)"),
    ],
)
def test_what_cannot_be_read_is_named(folder, source, message):
    for name in ("x y.jsonl.zst", "x.parquet.gz", "bare/a.pdf", "empty/.keep"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    with pytest.raises(UserError, match=message):
        texts.find(source)


def test_parquet_without_pyarrow_is_known_before_the_work(folder, monkeypatch):
    (folder / "books" / "z.parquet").touch()
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    assert refused(lambda: texts.find("books")) == (
        "books/z.parquet: parquet needs a package: pip install pyarrow"
    )


def test_a_file_that_cannot_be_opened_is_named(folder):
    (folder / "gone.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match="--source=gone.txt: no such file"):
        texts.find("gone.txt")
    assert refused(lambda: texts.fingerprints([folder / "books"])) == f"{folder}/books: Is a directory"


def test_stem_is_a_name_for_a_data_set():
    sources = {"books": "books", "books/*.txt": "books", "~/b/notes.jsonl.gz": "notes", "*.txt": "mine"}
    assert {source: texts.stem(source) for source in sources} == sources


def test_fingerprints_tell_contents_apart(tmp_path):
    """Equal for the same file elsewhere; different for a text of the same length and time."""
    for name, content in (("a/x.txt", "one"), ("b/x.txt", "one"), ("c/x.txt", "two")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
        os.utime(tmp_path / name, (0, 0))
    a, b, c = (texts.fingerprints([tmp_path / name / "x.txt"]) for name in "abc")
    assert a == b != c
    assert a[0][:2] == c[0][:2] == ["x.txt", 3]
