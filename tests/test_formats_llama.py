"""A folder that Hugging Face's own Llama computes alike, and Llama folders of others read back right."""

import json
import math
import random
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from configurator import UserError
from data.sotu.prepare import speeches
from data.tokenizer import END_OF_TEXT, gpt2, kept, load
from formats.llama import END, read_llama
from tests.formats_fixtures import (
    KINDS,
    export_folder,
    go,
    ids,
    language,
    logits,
    random_model,
    save,
    trained_model,
    write_corpus,
)


@pytest.fixture
def llama():
    """The independent oracle: open a folder with transformers, in the precision given."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()

    def load(folder, dtype=torch.float32):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    return load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The export of a random factored model."""
    return export_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small prepared data set of real tokens."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.mark.parametrize("kind", KINDS)
def test_llama_computes_the_same(kind, tmp_path, llama):
    """Logits over a whole context within 1e-4, for every vocabulary, GQA, other wavelengths and epsilons."""
    model = random_model(kind)
    go(f"--run={save(model, tmp_path / 'run')}", f"--to={tmp_path / 'hf'}")
    ours = logits(model, ids(model))
    assert ours.std() > 0.5
    torch.testing.assert_close(logits(llama(tmp_path / "hf"), ids(model)), ours, rtol=0, atol=1e-4)


def test_embeddings_before_every_block_are_no_llama(tmp_path):
    run = save(random_model("gains", reinject=True), tmp_path / "run")
    for form in ([f"--to={tmp_path / 'hf'}"], ["--form=gguf", f"--to={tmp_path / 'm.gguf'}"]):
        with pytest.raises(UserError, match="reinject=True .* only --form=reflow keeps it"):
            go(f"--run={run}", *form)
    go(f"--run={run}", "--form=reflow", f"--to={tmp_path / 'release'}")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["release", "run"]


@pytest.mark.parametrize("kind", ["factored", "topk", "dense", "gqa"])
def test_trained_models_too(kind, tmp_path, llama):
    """Logits, perplexity and 200 greedy tokens."""
    model = trained_model(kind)
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
        assert found == other.ids == gpt2().encode(text).tolist(), repr(text)
        assert tokenizer.decode(found) == text
    assert tokenizer.eos_token_id == END_OF_TEXT and tokenizer.encode("<|endoftext|>") == [END_OF_TEXT]
    assert tokenizer.model_max_length == 256


def test_pipeline(folder, monkeypatch):
    """transformers' pipeline, from the folder alone, continues as we do."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(folder.parent)
    pipeline = transformers.pipeline("text-generation", "hf")
    (out,) = pipeline("The people of", max_new_tokens=12, do_sample=False, return_full_text=False)
    prompt = gpt2().encode_ordinary("The people of")
    (greedy,) = random_model("factored").generate([prompt], 12, temperature=0)
    assert out["generated_text"] == gpt2().decode(greedy)


# ----------------------------------------------------------------------------------------------------
# In


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
    tokens = gpt2().encode("The people of the United States " * 400)
    x = tokens[: 2 * model.config.block_size + 1].astype("int64")
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


@pytest.mark.parametrize("file", ["model.safetensors", "reflow.safetensors"])
def test_zeroed_bytes_in_an_export_are_noticed(folder, tmp_path, capsys, file):
    """By the import, and by sha256sum."""
    read_llama(folder)
    assert "SHA256SUMS" not in capsys.readouterr().out
    check = ["sha256sum", "--check", "--strict", "--status", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder).returncode == 0
    copy(folder, tmp_path, file)
    content = bytearray((folder / file).read_bytes())
    content[-64:] = bytes(64)
    (tmp_path / file).write_bytes(content)
    read_llama(tmp_path)
    said = capsys.readouterr().out
    assert f"{tmp_path / file} is not what was exported, by SHA256SUMS: changed since, or damaged" in said
    assert subprocess.run(check, cwd=tmp_path).returncode == 1


def test_changed_embeddings_do_not_get_their_old_recipes(folder, tmp_path, corpus, capsys):
    """Someone fine-tuned the export in place: what they changed must survive."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 1.001
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    found = read_llama(tmp_path)
    config, ours = found.config, found.weights
    said = capsys.readouterr().out
    assert config.vocab == "dense" and "does not give the embedding, which was changed since" in said
    assert f"{tmp_path / 'model.safetensors'} is not what was exported, by SHA256SUMS" in said
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
        read_llama(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_smaller_vocabulary_is_another_tokenizer(folder, tmp_path, corpus):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 32000}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="32,000 tokens, .*another tokenizer"):
        go(f"--from={tmp_path}", f"--to={tmp_path / 'run'}", f"--dataset={corpus}")


def test_a_tokenizer_that_cannot_be_read_is_named(folder, tmp_path):
    """Also one of GPT-2's size with two words exchanged that came without merges."""
    exchanged = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    exchanged["\u0120the"], exchanged["\u0120of"] = exchanged["\u0120of"], exchanged["\u0120the"]
    copy(folder, tmp_path, "tokenizer.json", "vocab.json")
    for name, content, why in (
        ("tokenizer.json", {"model": {"vocab": {"the": 1}}}, "only byte-level BPE"),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": [["the", -1.5]]}}, "only byte-level BPE"),
        ("vocab.json", exchanged, "is not GPT-2's"),
        ("tokenizer.model", "SentencePiece", "only tokenizer.json"),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"{name}.*{why}"):
            read_llama(tmp_path)
        (tmp_path / name).unlink()


def copy(folder, to, *but):
    """A folder of links to the files of another, all `but` these."""
    for file in folder.iterdir():
        if file.name not in but:
            (to / file.name).symlink_to(file)


def test_added_tokens_come_along(folder, tmp_path, corpus):
    """As transformers saves them: the run has a tokenizer of its own, which goes out with it again."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<|user|>"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(50260)
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=r"holds tokens of gpt2, .*hf has gpt-2-\w{8}: prepare"):
        go(f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'run'}", f"--dataset={corpus}")
    assert not (tmp_path / "run").exists()
    own = write_corpus(tmp_path / "own", load(tmp_path / "hf"))
    go(f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'run'}", f"--dataset={own}", "--sequences=1")
    ckpt = checkpoint.open_run(tmp_path / "run")
    ours = kept(ckpt.path, ckpt.state)
    text = "The <|user|> of [PAD] the"
    assert ours.encode_prompt(text) == tokenizer.encode(text)
    assert ckpt.load_model().config.n_tokens == 50259
    go(f"--run={tmp_path / 'run'}", f"--to={tmp_path / 'again'}")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("added_tokens.json", {"<|user|>": 50257}, r"adds <\|user\|> \(50257\) to"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"50256": {"content": END}}}, None),
        ("tokenizer_config.json", {"added_tokens_decoder": {"50300": {"content": "x"}}}, r"adds x \(50300\)"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": 3}}, "no list of tokens"),
        ("tokenizer_config.json", [], "holds no JSON object"),
        ("added_tokens.json", {f"<{i}>": 50257 + i for i in range(20)}, r"<7> \(50264\) and 12 more"),
    ],
)
def test_every_place_of_added_tokens_is_read(name, content, match, folder, tmp_path, capsys):
    copy(folder, tmp_path, name)
    (tmp_path / name).write_text(json.dumps(content))
    if match is None:
        read_llama(tmp_path)
        assert "47 rows after the 50,257 tokens are padding" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=match) as error:
            read_llama(tmp_path)
        assert "\n" not in str(error.value)


def test_other_weights_beside_the_model_are_left_alone(folder, tmp_path):
    """model.safetensors decides, or its index: not an adapter, another layout or a stray copy."""
    whole = read_llama(folder)
    copy(folder, tmp_path)
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "copy.safetensors"):
        save_file({"tok_embeddings.weight": torch.zeros(1)}, tmp_path / name)
    assert equal(read_llama(tmp_path), whole)

    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert equal(read_llama(tmp_path), whole)

    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="model-2.safetensors is missing, model.safetensors.index.json names"):
        read_llama(tmp_path)
    for damaged in ({"weight_map": [1]}, {}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="index.json has no weight_map"):
            read_llama(tmp_path)


def equal(one, other):
    """Whether two Imported are the same."""
    same = all(torch.equal(w, other.weights[name]) for name, w in one.weights.items())
    return one.config == other.config and same


def test_an_adapter_alone_is_named(folder, tmp_path):
    copy(folder, tmp_path, "model.safetensors", "reflow.safetensors")
    with pytest.raises(UserError, match="holds no model.safetensors: .*as save_pretrained"):
        read_llama(tmp_path)
    save_file({"lora_A": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"an adapter without its model: merge .*merge_and_unload\(\)"):
        read_llama(tmp_path)


def test_an_adapter_alone_has_no_config(tmp_path):
    """As peft saves it."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter without its model"):
        read_llama(tmp_path)


def test_damaged_files_are_named(folder, tmp_path):
    copy(folder, tmp_path, "config.json")
    for content, match in (
        (None, "config.json: No such file"),
        ("[1]", "holds no JSON object"),
        ("{", "config"),
    ):
        if content:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=match) as error:
            read_llama(tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(UserError, match="model.safetensors is not a whole safetensors file"):
        read_llama(tmp_path)
