"""export.py: a folder that Hugging Face's own Llama computes alike, and models of others read back right."""

import json
import math
import os
import pickle
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any of these libraries is imported

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import export
import sample
import train
from configurator import UserError
from data.shards import Writer
from data.sotu.prepare import speeches
from data.tokenizer import END_OF_TEXT, encode, encoding
from model import ModelConfig, ReFlow

ROOT = Path(export.__file__).resolve().parent
SHAPE = {"block_size": 256, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_hidden": 48}
KINDS = {
    "factored": {"n_signal": 24},
    "wide": {"n_signal": 40, "rope_base": 500.0, "norm_eps": 1e-4},
    "topk": {"vocab": "topk", "n_signal": 24, "top_k": 5},
    "dense": {"vocab": "dense"},
    "gqa": {"n_kv_head": 2, "block_size": 1024},
}


@pytest.fixture
def llama():
    """The independent oracle: open a folder with transformers, in the precision given."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()

    def load(folder, dtype=torch.float32):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    return load


def random_model(kind, seed=0, **more):
    """A model whose every weight matters: norms that are not 1, attention neither flat nor sharp."""
    torch.manual_seed(seed)
    model = ReFlow(ModelConfig(**SHAPE | KINDS[kind] | more))
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(0.5, 1.5) if p.dim() == 1 else p.normal_(std=p.size(1) ** -0.5)
        for block in model.blocks:
            block.attn.q.weight *= 0.5
    return model.eval()


def save(model, run, **train_settings):
    """`model` as step 0 of a run; the run."""
    state = {"config": {"model": asdict(model.config), "train": {"dataset": "sotu"} | train_settings}}
    state |= {"val_loss": 5.0, "whole_val_loss": None, "best_val_loss": 5.0, "bits_per_byte": 1.5}
    weights = {name: w.contiguous() for name, w in model.state_dict().items()}
    checkpoint.save(run, 0, weights, {}, state, keep=1, best=True)
    return run


def go(*arguments, main=export.main):
    """`python export.py arguments` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        main()


def logits(model, idx):
    with torch.no_grad():
        out = model(idx)
    return out[0] if isinstance(model, ReFlow) else out.logits.float()


def ids(model, batch=2):
    """Real tokens, as long as the context."""
    high = min(model.config.vocab_size, END_OF_TEXT)
    return torch.randint(high, (batch, model.config.block_size), generator=torch.Generator().manual_seed(1))


# A language that needs every part of a model: a token is a permutation of the one three before it (so
# attention, and its positions), with some noise.
PERMUTATION = torch.randperm(64, generator=torch.Generator().manual_seed(3))


def language(rows, length, seed):
    """(rows, length + 1) ids below 64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(64, (rows, length + 1), generator=generator)
    noise = torch.rand(rows, length + 1, generator=generator) < 0.1
    for t in range(3, length + 1):
        x[:, t] = torch.where(noise[:, t], x[:, t], PERMUTATION[x[:, t - 3]])
    return x


def loss(config, weights):
    x = language(32, 32, seed=10_000)  # of the length trained on: beyond it a wrong reading may do better
    with torch.no_grad():
        return checkpoint.build_model(config, weights)(x[:, :-1], x[:, 1:])[1].item()


def trained_model(**more):
    torch.manual_seed(0)
    shape = {"block_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 64, "n_hidden": 96, "vocab_size": 128}
    model = ReFlow(ModelConfig(**shape | more))
    for block in model.blocks:  # so that the two cannot be mistaken for each other
        torch.nn.init.uniform_(block.norm1.weight, 0.5, 2.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, fused=True)
    for step in range(160):
        x = language(8, 32, seed=step)
        model(x[:, :-1], x[:, 1:])[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 160)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="session")
def trained():
    """{kind: a trained model}; the factored one has a square basis."""
    kinds = {"topk": {"vocab": "topk", "top_k": 12}, "dense": {"vocab": "dense"}, "gqa": {"n_kv_head": 1}}
    models = {kind: trained_model(n_layer=1, **more) for kind, more in kinds.items()}
    models["factored"] = trained_model()
    for kind, model in models.items():
        nats = loss(model.config, model.state_dict())
        assert nats < 2.8, kind  # without attention it would be log 64 = 4.16
    return models


# ----------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("kind", KINDS)
def test_llama_computes_the_same(kind, tmp_path, llama):
    """Logits over a whole context within 1e-4, for every vocabulary, GQA, other wavelengths and epsilons."""
    model = random_model(kind)
    go(f"--run={save(model, tmp_path / 'run')}", f"--to={tmp_path / 'hf'}")
    ours = logits(model, ids(model))
    assert ours.std() > 0.5
    torch.testing.assert_close(logits(llama(tmp_path / "hf"), ids(model)), ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["factored", "topk", "dense", "gqa"])
def test_trained_models_too(kind, trained, tmp_path, llama):
    """Logits, perplexity and 200 greedy tokens."""
    model = trained[kind]
    go(f"--run={save(model, tmp_path / 'run')}", f"--to={tmp_path / 'hf'}")
    hf, x = llama(tmp_path / "hf"), language(4, 63, seed=7)
    torch.testing.assert_close(logits(hf, x), logits(model, x), rtol=0, atol=1e-4)
    nats = model(x[:, :-1], x[:, 1:])[1].item()
    theirs = hf(input_ids=x, labels=x).loss.item()
    assert math.exp(theirs) == pytest.approx(math.exp(nats), rel=1e-5)
    prompt = x[:1, :8]
    (greedy,) = model.generate(prompt.tolist(), 200, temperature=0)
    out = hf.generate(prompt, max_new_tokens=200, do_sample=False)[0, 8:].tolist()
    assert out == greedy and len(set(greedy)) > 3


def test_padding_rows_are_never_generated(tmp_path, llama):
    """They have logits, for the same perplexity; here the largest ones. Both generate real tokens only."""
    model = random_model("factored")
    with torch.no_grad():
        model.vocab.recipe[model.config.n_tokens :] = model.vocab.recipe[:47] * 3
    go(f"--run={save(model, tmp_path / 'run')}", f"--to={tmp_path / 'hf'}")
    hf, prompt = llama(tmp_path / "hf"), [[10, 20, 30]]
    assert logits(model, ids(model)).argmax(-1).max() > END_OF_TEXT
    (greedy,) = model.generate(prompt, 50, temperature=0)
    out = hf.generate(torch.tensor(prompt), max_new_tokens=50, do_sample=False, eos_token_id=None)
    assert out[0, 3:].tolist() == greedy


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision(dtype, torch_dtype, tmp_path, llama):
    """Every weight is ours rounded once, E included; recipes and basis stay fp32."""
    model = random_model("factored")
    go(f"--run={save(model, tmp_path / 'run')}", f"--to={tmp_path / 'hf'}", f"--dtype={dtype}")
    hf = llama(tmp_path / "hf", "auto")
    assert hf.dtype == torch_dtype
    E = model.vocab.recipe.double() @ model.vocab.basis.double()
    assert torch.equal(hf.get_input_embeddings().weight, E.to(torch_dtype))
    extra = load_file(tmp_path / "hf/reflow.safetensors")
    assert torch.equal(extra["recipes"], model.vocab.recipe) and torch.equal(
        extra["basis"], model.vocab.basis
    )
    difference = logits(llama(tmp_path / "hf"), ids(model)) - logits(model, ids(model))
    assert difference.std() < 0.02 * logits(model, ids(model)).std()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """An export of a random factored model."""
    home = tmp_path_factory.mktemp("folder")
    run = save(random_model("factored"), home / "run", max_steps=7)
    go(f"--run={run}", f"--to={home / 'hf'}")
    return home / "hf"


def test_tokenizer(folder):
    """AutoTokenizer gives our ids: 10,000 strings over all of Unicode, and every tenth speech; and back."""
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    ranges = [(32, 127), (9, 14), (0x80, 0x3000), (0x3000, 0x10000), (0x10000, 0x110000), (32, 33)]
    texts = [path.read_text(encoding="utf-8") for path in speeches()[::10]]
    for _ in range(10_000):
        points = [rng.randrange(*rng.choice(ranges)) for _ in range(rng.randrange(1, 40))]
        texts.append("".join(chr(c) for c in points if not 0xD800 <= c < 0xE000))
    import tokenizers  # reads tokenizer.json alone, as other tools do

    alone = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
    for text, found, other in zip(texts, tokenizer(texts)["input_ids"], alone, strict=True):
        assert found == other.ids == encode(text).tolist(), repr(text)
        assert tokenizer.decode(found) == text
    assert tokenizer.eos_token_id == END_OF_TEXT and tokenizer.encode("<|endoftext|>") == [END_OF_TEXT]
    assert tokenizer.model_max_length == 256


def test_pipeline(folder, monkeypatch):
    """transformers' pipeline, from the folder alone, continues as we do."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(folder.parent)
    pipeline = transformers.pipeline("text-generation", "hf")
    (out,) = pipeline("The people of", max_new_tokens=12, do_sample=False, return_full_text=False)
    (greedy,) = random_model("factored").generate([encode("The people of").tolist()], 12, temperature=0)
    assert out["generated_text"] == encoding().decode(greedy)


def test_model_card(folder):
    """What it is, its data, its loss, and the commands."""
    card = (folder / "README.md").read_text()
    for part in ("24 signals", "`sotu`", "5.0000 nats", "export.py --run=", "pipeline(", "context 256"):
        assert part in card, part


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_is_a_run(kind, tmp_path, monkeypatch, capsys):
    """Half the size of the weights alone; sample.py and export.py read it, to the rounding of fp16."""
    model = random_model(kind)
    run, to = save(model, tmp_path / "run"), tmp_path / "release"
    for _ in range(2):  # a release of before is replaced
        go(f"--run={run}", "--form=reflow", "--dtype=fp16", f"--to={to}")
    assert {p.name for p in to.iterdir()} == {"model.safetensors", "state.json", "README.md"}
    size = sum(p.numel() for p in model.parameters()) * 2
    assert size <= (to / "model.safetensors").stat().st_size < size + 10_000
    found, state = checkpoint.load_model(checkpoint.find(to))
    for (name, a), b in zip(found.state_dict().items(), model.state_dict().values(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.half().float()), name
    assert state["val_loss"] == 5.0 and "5.0000 nats" in (to / "README.md").read_text(encoding="utf-8")
    go(f"--run={to}", "--prompt=a", "--max_new_tokens=2", main=sample.main)
    go(f"--run={to}", f"--to={tmp_path / 'hf'}")
    assert (tmp_path / "hf" / "config.json").exists()
    with pytest.raises(UserError, match="one checkpoint, not a run"):  # nothing to resume, nothing to mix
        go(f"--out_dir={to}", "--resume", "--device=cpu", main=train.main)


def test_only_an_export_is_replaced(tmp_path, monkeypatch):
    """A folder of something else is refused; a failed export leaves the one before, and nothing beside it."""
    run, to = save(random_model("factored"), tmp_path / "run"), tmp_path / "hf"
    go(f"--run={run}", f"--to={to}")
    before = (to / "README.md").read_text()
    go(f"--run={run}", f"--to={to}", "--dtype=bf16")
    after = (to / "README.md").read_text()
    assert before != after
    monkeypatch.setattr(export, "model_card", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(f"--run={run}", f"--to={to}")
    assert (to / "README.md").read_text() == after
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]
    with pytest.raises(UserError, match="is no export of before: give another folder"):
        go(f"--run={run}", f"--to={run}")
    with pytest.raises(UserError, match="give another folder"):
        go(f"--from={to}", f"--to={to}")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "--to is missing"),
        (["--to=x", "--from=y", "--run=z"], "give one"),
        (["--to=x", "--run=nowhere"], "no run nowhere"),
        (["--to=x", "--from=nowhere"], "nowhere"),
        (["--to=x", "--from="], "takes a Hugging Face folder"),
        (["--to=x", "--dtype=int8"], "dtype=int8"),
    ],
)
def test_mistakes_are_one_line(arguments, match, tmp_path, monkeypatch, corpus):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=match) as error:
        go(*arguments, f"--dataset={corpus}")
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()


def test_help_shows_the_options():
    command = [sys.executable, "export.py", "--help"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--from" in out.stdout and "--factor" in out.stdout


# ----------------------------------------------------------------------------------------------------
# Import of Hugging Face folders


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small prepared data set of real tokens."""
    path = tmp_path_factory.mktemp("corpus") / "text"
    writer = Writer(path, "words", "none", {}, shard_tokens=4096)
    for split in ("train", "val"):
        writer.add(split, 0, encode("The people of the United States " * 400), 12_800)
    writer.finish()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_export_and_import_are_inverse(kind, tmp_path, corpus):
    """Nothing is lost: kind, shape and every bit of every weight come back."""
    model = random_model(kind)
    go(f"--run={save(model, tmp_path / 'run')}", f"--to={tmp_path / 'hf'}")
    go(f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'back'}", f"--dataset={corpus}", "--sequences=2")
    back, state = checkpoint.load_model(checkpoint.find(tmp_path / "back"))
    original = model.state_dict()
    assert back.config.vocab == model.config.vocab
    assert back.state_dict().keys() == original.keys()
    assert all(torch.equal(w, original[name]) for name, w in back.state_dict().items())
    assert torch.equal(logits(back, ids(model)), logits(model, ids(model)))
    x = encode("The people of the United States " * 400)[: 2 * model.config.block_size + 1].astype("int64")
    x = torch.from_numpy(x[:-1]).view(2, -1), torch.from_numpy(x[1:]).view(2, -1)
    assert state["val_loss"] == pytest.approx(model(*x)[1].item(), rel=1e-5)


def test_a_folder_by_transformers(tmp_path, corpus, llama, capsys):
    """Random weights, GQA, its own file layout and no tokenizer: read as a dense run of the same logits."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        **{"vocab_size": 50304, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
        **{"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "initializer_range": 0.2},
        rope_parameters={"rope_type": "default", "rope_theta": 700.0},
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="2MB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    go(f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'run'}", f"--dataset={corpus}")
    assert "taken for GPT-2's" in capsys.readouterr().out
    model, _ = checkpoint.load_model(checkpoint.find(tmp_path / "run"))
    assert model.config.vocab == "dense"
    torch.testing.assert_close(logits(model, ids(model)), logits(theirs, ids(model)), rtol=0, atol=1e-4)


def test_changed_embeddings_do_not_get_their_old_recipes(folder, tmp_path, corpus, capsys):
    """Someone fine-tuned the export in place: what they changed must survive."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 1.001
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config, ours = export.read_llama(tmp_path)
    assert config.vocab == "dense" and "changed since" in capsys.readouterr().out
    assert torch.equal(ours["vocab.weight"], weights["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gpt2"}, "model_type=gpt2"),
        ({"attention_bias": True}, "attention_bias=True: only Llamas with attention_bias=False"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_type=llama3"),
        ({"head_dim": 64}, "head_dim=64"),
        ({"vocab_size": 32000}, "another tokenizer"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight is missing"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ has no place"),
        ({"num_hidden_layers": "two"}, "no Llama of a shape that fits"),
    ],
)
def test_what_a_reflow_cannot_compute_is_named(change, match, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=match) as error:
        export.read_llama(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_another_tokenizer_is_named(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"the": 1}}}))
    with pytest.raises(UserError, match="is not GPT-2's"):
        export.read_llama(tmp_path)


# ----------------------------------------------------------------------------------------------------
# Import of the reference system's checkpoints, imitated


def reference(
    model, attn="fused", mlp=("w1", "w2", "w3"), norms=("ln_1", "ln_2"), halves=False, basis="S x d"
):
    """A checkpoint of the reference system that computes what `model` does, with names and conventions of
    one's choice; `mlp` names gate, down and up."""
    c, ours, out = model.config, model.state_dict(), {}
    if c.vocab == "dense":
        out["wte.weight"] = ours["vocab.weight"]
    else:
        out["wte.vocab_to_signals.weight"] = ours["vocab.recipe"]
        transposed = basis == "d x S"
        out["wte.signal_basis"] = ours["vocab.basis"].T if transposed else ours["vocab.basis"]
    for i in range(c.n_layer):
        w = {role: ours[f"blocks.{i}.{role}.weight"] for role in export.LLAMA}
        if halves:
            w |= {role: export.to_halves(w[role], c.head_dim) for role in ("attn.q", "attn.k")}
        q, k, v, o = (w[f"attn.{x}"] for x in "qkvo")
        heads = {"c_attn": torch.cat([q, k, v]), "c_proj": o}
        if attn != "fused":
            heads = dict(zip(attn, (q, k, v, o), strict=True))
        block = {f"attn.{name}": weight for name, weight in heads.items()}
        block |= zip([f"mlp.{n}" for n in mlp], (w["mlp.gate"], w["mlp.down"], w["mlp.up"]), strict=True)
        block |= zip(norms, (w["norm1"], w["norm2"]), strict=True)
        out |= {f"h.{i}.{name}.weight": weight for name, weight in block.items()}
    out["ln_f.weight"] = ours["norm.weight"]
    return {f"transformer.{name}": weight.clone() for name, weight in out.items()}


def read(tmp_path, weights, prefix="", **outer):
    """The model that the importer makes of these weights in a torch file."""
    weights = {prefix + name: weight for name, weight in weights.items()}
    torch.save({"model": weights, "iter_num": 9, "optimizer": {"state": {}}} | outer, tmp_path / "ckpt.pt")
    source = export.read_reference(tmp_path / "ckpt.pt")
    picks = export.resolve(source.questions(), source.assemble, loss)
    return checkpoint.build_model(*source.assemble(picks)), picks


AMBIGUITIES = {
    "as published, as far as known": {},
    "basis transposed": {"basis": "d x S"},
    "gate and up exchanged": {"mlp": ("w3", "w2", "w1")},
    "halves": {"halves": True},
    "unfused": {"attn": ("wq", "wk", "wv", "wo")},
    "unfused, unnamed": {"attn": "bdca", "mlp": ("gate", "down", "up")},
    "norms unnamed": {"norms": ("b", "a")},
    "all at once": {"basis": "d x S", "mlp": ("c", "a", "b"), "halves": True, "norms": ("y", "x")},
}


@pytest.mark.parametrize("case", AMBIGUITIES)
def test_ambiguities_are_resolved(case, trained, tmp_path, capsys):
    """The one reading that computes what the original did is found, and every decision is printed."""
    model = trained["factored"]
    settings = {"n_head": 2, "block_size": 256}
    if case != "as published, as far as known":
        settings["model_config"] = "reflow"
    found, picks = read(tmp_path, reference(model, **AMBIGUITIES[case]), model_args=settings)
    assert torch.equal(logits(found, ids(model)), logits(model, ids(model)))
    out = capsys.readouterr().out
    assert all(f"{question}: " in out for question in picks) and "TOO CLOSE" not in out


@pytest.mark.parametrize("kind", ["topk", "dense", "gqa"])
@pytest.mark.parametrize("attn", ["fused", ("wq", "wk", "wv", "wo")])
def test_every_kind_of_reference(kind, attn, trained, tmp_path):
    """Also through torch.compile's prefix, with a rotary table in place of the number of heads."""
    model = trained[kind]
    c = model.config
    weights = reference(model, attn)
    if kind == "dense":
        weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    weights["freqs_cis"] = torch.zeros(256, c.head_dim // 2, 2)
    more = {"config": {"top_k": 12}} if kind == "topk" else {}
    found, _ = read(tmp_path, weights, "_orig_mod.", **more)
    assert (found.config.vocab, found.config.kv_heads) == (c.vocab, c.kv_heads)
    assert torch.equal(logits(found, ids(model)), logits(model, ids(model)))


def test_heads_are_tried(trained, tmp_path):
    found, picks = read(tmp_path, reference(trained["factored"]))
    assert picks["heads"] == 2 and found.config.n_head == 2


def test_what_cannot_be_told_is_said(tmp_path, capsys):
    """An untrained model has no loss to tell by."""
    torch.manual_seed(0)
    model = ReFlow(ModelConfig(block_size=64, n_layer=1, n_head=2, n_embd=64, n_hidden=96, vocab_size=128))
    read(tmp_path, reference(model), model_args={"n_head": 2})
    assert "TOO CLOSE to be sure" in capsys.readouterr().out


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"transformer.h.0.attn.c_attn.bias": torch.zeros(3)}, "no biases"),
        ({"transformer.wpe.weight": torch.zeros(4, 64)}, "no position embedding"),
        ({"transformer.h.0.extra.weight": torch.zeros(64, 64)}, "differ in their weights"),
        ({"transformer.other.weight": torch.zeros(64, 64)}, "has no place"),
        ({"transformer.ln_f.weight": None}, "no checkpoint of the reference system"),
        ({f"transformer.h.{i}.mlp.w1.weight": None for i in (0, 1)}, "mlp, in should be mlp.gate, mlp.up"),
        ({"transformer.wte.signal_basis": torch.zeros(7, 64)}, "does not fit 64 signals"),
        ({"transformer.wte.signal_basis": None}, "not vocab_to_signals and a basis"),
    ],
)
def test_unreadable_references_are_named(change, match, trained, tmp_path):
    weights = reference(trained["factored"]) | change
    weights = {name: w for name, w in weights.items() if w is not None}
    with pytest.raises(UserError, match=match) as error:
        read(tmp_path, weights)
    assert "\n" not in str(error.value)


def test_nothing_is_executed(tmp_path, capsys):
    torch.save({"model": {}, "config": Malicious()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="holds more than tensors"):
        export.read_reference(tmp_path / "evil.pt")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Malicious()))
    (tmp_path / "text.pt").write_text("hello")
    for name in ("raw.pkl", "text.pt", "missing.pt"):
        with pytest.raises(UserError, match=name):
            export.read_reference(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_an_imported_run_is_a_run(tmp_path, corpus, capsys, monkeypatch):
    """From a reference checkpoint by the command; then sampled, exported again and trained further."""
    monkeypatch.chdir(tmp_path)
    model = random_model("dense")
    torch.save(reference(model), "ckpt.pt")
    go("--from=ckpt.pt", "--to=out/it", f"--dataset={corpus}", "--sequences=2")
    assert "nats per token" in capsys.readouterr().out
    go("--prompt=The", "--max_new_tokens=3", main=sample.main)  # the newest run
    go("--to=hf")
    assert "Imported from `ckpt.pt`" in Path("hf/README.md").read_text()
    settings = {
        "out_dir": "out/on",
        "dataset": corpus,
        "init_from": "out/it",
        "max_steps": 1,
        "device": "cpu",
    }
    settings |= {"batch_size": 1, "micro_batch_size": 1, "eval_sequences": 1, "eval_interval": 1}
    settings |= {"save_interval": 1, "warmup_steps": 0}
    go(*(f"--{key}={value}" for key, value in settings.items()), main=train.main)
    start, _ = checkpoint.load_model(Path("out/on/step_000000"))
    end, _ = checkpoint.load_model(Path("out/on/step_000001"))
    read_back, _ = checkpoint.load_model(checkpoint.find("out/it"))
    assert all(map(torch.equal, start.state_dict().values(), read_back.state_dict().values()))
    assert not torch.equal(end.norm.weight, start.norm.weight)


# ----------------------------------------------------------------------------------------------------
# Dense to factored


@pytest.mark.parametrize("kind", ["identity", "rotation", "pca", "ica"])
def test_a_dense_model_factored_is_the_same_function(kind, tmp_path):
    if kind == "ica":
        pytest.importorskip("sklearn")
    model = random_model("dense")
    with torch.no_grad():  # independent sources of unequal strength, mixed: what PCA and ICA look for
        sources = torch.randn(50304, 32) * torch.randn(50304, 32).abs() * torch.linspace(0.5, 2, 32)
        model.vocab.weight.copy_(sources @ torch.linalg.qr(torch.randn(32, 32)).Q)
    run, to = save(model, tmp_path / "run"), tmp_path / "factored"
    go(f"--run={run}", f"--factor={kind}", f"--to={to}", "--seed=5")
    factored, state = checkpoint.load_model(checkpoint.find(to))
    assert factored.config == replace(model.config, vocab="factored", n_signal=32)
    assert state["val_loss"] == 5.0
    torch.testing.assert_close(logits(factored, ids(model)), logits(model, ids(model)), rtol=0, atol=2e-4)

    recipe, basis = factored.vocab.recipe.detach(), factored.vocab.basis.detach()
    orthogonal = torch.allclose(basis @ basis.T, torch.eye(32), atol=1e-4)
    assert orthogonal == (kind != "ica")
    assert torch.equal(basis, torch.eye(32)) == (kind == "identity")
    covariance = torch.cov(recipe[:50257].T)
    correlation = torch.corrcoef(recipe[:50257].T) - torch.eye(32)
    assert (correlation.abs().max() < 0.1) == (kind in ("pca", "ica"))
    if kind == "pca":
        assert torch.equal(covariance.diag().argsort(descending=True), torch.arange(32))
    if kind == "ica":  # each signal is one of the sources
        correlation = torch.corrcoef(torch.cat([recipe.T, sources.T]))[:32, 32:].abs()
        assert (correlation.amax(1) > 0.95).all()
    with pytest.raises(UserError, match="takes a dense model, this one is factored already"):
        go(f"--run={to}", "--factor=pca", f"--to={tmp_path / 'again'}")


def test_a_flat_embedding_has_no_independent_components():
    pytest.importorskip("sklearn")
    model = random_model("dense", n_embd=8)
    with torch.no_grad():
        model.vocab.weight.pow_(3)[:, 3] = 0
    with pytest.raises(UserError, match="does not fill its 8 dimensions"):
        export.factor(model, "ica")


# ----------------------------------------------------------------------------------------------------
# Other tools: examples/


def test_transformer_lens(folder, capsys):
    """Logits, and every hook that examples/lens.py maps to one of our modules."""
    pytest.importorskip("transformer_lens")
    from examples import lens

    model = random_model("factored")
    bridge, x, seen = lens.open_bridge(folder), ids(model)[:, :64], {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
    found, cache = bridge.run_with_cache(x)
    torch.testing.assert_close(found, logits(model, x), rtol=0, atol=1e-4)
    for ours, hook in lens.HOOKS.items():
        for i in range(2):
            value = seen[ours.format(i=i)].flatten(0, 1)  # (B T, width)
            if ours.endswith((".q", ".k")):
                value = export.to_halves(value.T, model.config.head_dim).T
            theirs = cache[hook.format(i=i)].reshape(value.shape)
            torch.testing.assert_close(theirs, value, rtol=0, atol=1e-4, msg=f"{ours} and {hook}")
    go(f"--export={folder}", f"--run={folder.parent / 'run'}", main=lens.main)
    assert "largest difference" in capsys.readouterr().out


def test_dictionary(folder, capsys):
    """Shapes of an SAE; the code of a token's embedding is its recipe; a decoded code lies in the span."""
    from examples import sae

    model = random_model("factored")
    dictionary, recipes = sae.open_dictionary(folder)
    assert dictionary.W_dec.shape == (24, 32) and dictionary.W_enc.shape == (32, 24)
    torch.testing.assert_close(dictionary.encode(model.vocab.matrix()), recipes, rtol=0, atol=1e-4)
    x = torch.randn(5, 3, 32)
    assert dictionary.encode(x).shape == (5, 3, 24)
    residue = (x - dictionary(x)) @ dictionary.W_dec.T  # least squares: orthogonal to every signal
    torch.testing.assert_close(residue, torch.zeros(5, 3, 24), rtol=0, atol=1e-4)
    go(f"--export={folder}", main=sae.main)
    assert "after block  1" in capsys.readouterr().out


def test_lm_eval(folder, monkeypatch):
    """The task of the repository gives our own scorer's log-likelihoods, pair by pair, and its accuracy."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from examples import minimal_pairs

    monkeypatch.chdir(ROOT)
    out = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype=float32",
        tasks=["minimal_pairs"],
        task_manager=TaskManager(include_path=str(ROOT / "examples/lm_eval"), include_defaults=False),
        device="cpu",
        batch_size=16,
        log_samples=True,
    )
    samples = sorted(out["samples"]["minimal_pairs"], key=lambda s: s["doc_id"])
    theirs = torch.tensor([[float(r[0]) for r in s["filtered_resps"]] for s in samples])
    ours = torch.tensor(minimal_pairs.score(random_model("factored")))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-3)
    accuracy = (ours[:, 0] > ours[:, 1]).float().mean().item()
    assert out["results"]["minimal_pairs"]["acc,none"] == pytest.approx(accuracy)
