"""
Hugging Face Llama folders, out and in.

The product of recipes and basis is one matrix, so a reFlow *is* a Llama with tied embeddings. Only the order
of query and key rows differs: positions rotate adjacent pairs here, the two halves of a head there. Recipes
and basis travel beside it in reflow.safetensors, which other tools do not read.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import checkpoint
from configurator import UserError
from data.tokenizer import END, END_OF_TEXT, Tokenizer, gpt2, kept, load
from files import file_sha256
from formats.cards import model_card
from hardware import DTYPES
from model import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
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
HASHES = "SHA256SUMS"  # of the weights, as `sha256sum -c` reads it
OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.txt")  # of SentencePiece and WordPiece
ROTARY = ("attn.q.weight", "attn.k.weight")  # our weights whose rows Llama orders otherwise


@dataclass
class Imported:
    """What other tools' files hold."""

    config: ModelConfig
    weights: dict  # {our name: fp32 tensor}
    tokenizer: Tokenizer
    chat: dict  # {"chat_template": Jinja, "end_of_turn": id}, or {}


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
    net = ckpt.load_model(verified=True)
    tokenizer = kept(ckpt.path, ckpt.state)
    ends = tokenizer.end_of_text, ckpt.state.get("end_of_turn", tokenizer.end_of_text)
    with checkpoint.whole_folder(to) as folder:
        write_json(folder / "config.json", llama_config(net.config, DTYPES[dtype], *ends))
        write_json(folder / "generation_config.json", generation_config(net.config, *ends))
        save_file(llama_weights(net, DTYPES[dtype]), folder / "model.safetensors", {"format": "pt"})
        if net.config.vocab != "dense":
            save_file(signal_weights(net), folder / "reflow.safetensors", {"format": "pt"})
        hashes = checkpoint.fingerprints(folder)["sha256"]
        lines = [f"{sha}  {name}\n" for name, sha in hashes.items()]
        (folder / HASHES).write_text("".join(lines), encoding="utf-8")
        write_tokenizer(folder, net.config.block_size, tokenizer, ends, ckpt.state.get("chat_template"))
        (folder / "README.md").write_text(model_card(ckpt, net, to, "llama", dtype), encoding="utf-8")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def llama_config(c, dtype, bos=END_OF_TEXT, eos=END_OF_TEXT):
    """config.json of LlamaForCausalLM for a ModelConfig; documents begin after `bos`, texts end with `eos`.

    `reflow` in it is ours, other tools ignore it.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.rows,
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
        "tie_word_embeddings": c.vocab != "gains",
        "bos_token_id": bos,
        "eos_token_id": eos,
        "dtype": str(dtype).removeprefix("torch."),
        "reflow": asdict(c),
    }


def generation_config(c, bos, eos):
    """generation_config.json for a ModelConfig; documents begin after `bos`, texts end with `eos`.

    Padding rows of the vocabulary are never sampled.
    """
    settings = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": bos}
    if c.rows > c.n_tokens:
        settings["suppress_tokens"] = list(range(c.n_tokens, c.rows))
    return settings


def folded(net):
    """(E at the input, E at the output), (V, d) each, of a ReFlow: the same one unless its input has gains.

    A product is formed in fp64, so that it is rounded once. Raises UserError for what no Llama computes.
    """
    if net.config.reinject:
        raise UserError(
            "reinject=True adds the embedding before every block: no Llama does, only --form=reflow keeps it"
        )
    recipes = net.vocab.recipes().detach()  # (V, d) of a dense vocabulary, else (V, S)
    if net.config.vocab == "dense":
        return recipes, recipes
    recipes, basis = recipes.double(), net.vocab.basis.detach().double()
    E = recipes @ basis
    return (recipes * net.vocab.gain[0].detach().double()) @ basis if net.config.vocab == "gains" else E, E


def llama_weights(net, dtype):
    """{Llama's name: weight} of a ReFlow, in `dtype`."""
    ours = net.state_dict()
    E_in, E_out = folded(net)
    weights = {EMBEDDING: E_in} | ({} if E_in is E_out else {HEAD: E_out})
    for name, theirs in llama_names(net.config.n_layer).items():
        is_rotary = name.endswith(ROTARY)
        weights[theirs] = to_halves(ours[name], net.config.head_dim) if is_rotary else ours[name]
    return {name: weight.to(dtype).contiguous() for name, weight in weights.items()}


def signal_weights(net):
    """What folding would lose: `recipes` (V, S), as the model uses them, and `basis` (S, d).

    Beside them what else the vocabulary holds: of a topk one `recipe`, before ReLU and Top-K; of a sparse one
    its entries, their places and the core; of one with gains these.
    """
    weights = {"recipes": net.vocab.recipes().detach().contiguous(), "basis": net.vocab.basis.detach()}
    others = net.vocab.state_dict()
    if net.config.vocab != "topk":
        others.pop("recipe", None)  # it is `recipes`
    return others | weights


def write_tokenizer(folder, block_size, tokenizer, ends, template=None):
    """A Tokenizer in Hugging Face's formats; GPT-2's in those of old, too.

    `ends`: ids of the tokens before a document and at the end of a text. `template`: of a chat.
    """
    v = tokenizer.vocabulary
    write_json(folder / "tokenizer.json", v.as_json())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    if tokenizer.name == "gpt2":
        settings["tokenizer_class"] = "GPT2Tokenizer"
        write_json(folder / "vocab.json", {token: i for i, token in enumerate(v.tokens)})
        merges = "\n".join(" ".join(merge) for merge in v.merges)
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    bos, eos = (v.tokens[i] for i in ends)
    settings |= {"bos_token": bos, "eos_token": eos, "unk_token": bos, "pad_token": bos}
    settings |= {"add_prefix_space": False, "add_bos_token": False, "clean_up_tokenization_spaces": False}
    if template:
        settings["chat_template"] = template
    write_json(folder / "tokenizer_config.json", settings)


# ----------------------------------------------------------------------------------------------------
# In


def read_llama(folder):
    """The Imported model of a Hugging Face Llama folder. UserError for what a reFlow cannot compute.

    It is dense, unless the folder carries a reflow.safetensors whose product is its embedding.
    """
    if not (folder / "config.json").exists():
        weight_files(folder)  # an adapter has none: say so
    settings = read_json(folder / "config.json")
    files = weight_files(folder)
    note_changes(folder, files)
    check_settings(settings, folder)
    tokenizer = read_tokenizer(folder)
    config = fitted(model_config(settings, folder), tokenizer, folder)
    weights = read_weights(folder, files, config, has_gains(settings))
    E, head = weights.pop("vocab.weight"), weights.pop(HEAD, None)
    config, vocabulary = read_vocabulary(folder, config, settings.get("reflow", {}), E, head)
    weights = {name: checkpoint.to_fp32(weight) for name, weight in (weights | vocabulary).items()}
    return Imported(config, weights, tokenizer, chat_template(folder, settings))


def check_rows(config, tokenizer, source):
    """UserError if a ModelConfig has fewer rows than a Tokenizer has tokens."""
    if config.rows < tokenizer.n_tokens:
        raise UserError(
            f"{source}: {config.rows:,} tokens, its tokenizer {tokenizer.name} has "
            f"{tokenizer.n_tokens:,}: another tokenizer"
        )


def fitted(config, tokenizer, source):
    """The ModelConfig with as many tokens as a Tokenizer has. UserError if it has fewer rows."""
    check_rows(config, tokenizer, source)
    if config.rows > tokenizer.n_tokens:
        n_rows = config.rows - tokenizer.n_tokens
        print(f"{n_rows} rows after the {tokenizer.n_tokens:,} tokens are padding: no token uses them")
    return tokenizer.rows_of(config)


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


def has_gains(settings):
    """Whether config.json is of an export whose input and output differ by gains of the signals."""
    return settings.get("reflow", {}).get("vocab") == "gains"


def check_settings(settings, folder):
    """UserError that names the first thing in config.json that a reFlow cannot compute."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    for key, value, wanted in (
        ("model_type", settings.get("model_type"), "llama"),
        ("hidden_act", settings.get("hidden_act", "silu"), "silu"),
        ("attention_bias", settings.get("attention_bias", False), False),
        ("mlp_bias", settings.get("mlp_bias", False), False),
        ("tie_word_embeddings", settings.get("tie_word_embeddings", False), not has_gains(settings)),
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


def read_tokenizer(folder):
    """The Tokenizer of a folder; GPT-2's for one without. UserError for one that is not supported."""
    if (folder / "tokenizer.json").exists():
        tokenizer = load(folder / "tokenizer.json")
    elif (folder / "vocab.json").exists():
        tokenizer = gpt2()
        known = {token: i for i, token in enumerate(tokenizer.vocabulary.tokens)}
        if {END: END_OF_TEXT} | read_json(folder / "vocab.json") != known:
            raise UserError(f"{folder / 'vocab.json'} is not GPT-2's: save the tokenizer as tokenizer.json")
    else:
        others = [name for name in OTHER_TOKENIZERS if (folder / name).exists()]
        if others:
            raise UserError(f"{folder / others[0]}: only tokenizer.json, byte-level BPE, is supported")
        print(f"{folder} holds no tokenizer: taken for GPT-2's")
        tokenizer = gpt2()
    if added := added_tokens(folder, tokenizer):
        names = ", ".join(f"{token} ({id})" for token, id in list(added.items())[:8])
        more = f" and {len(added) - 8} more" if len(added) > 8 else ""
        raise UserError(
            f"{folder} adds {names}{more} to the {tokenizer.n_tokens:,} tokens of its tokenizer.json:"
            " save the tokenizer again as a tokenizer.json with all of them"
        )
    return tokenizer


def added_tokens(folder, tokenizer):
    """{token: id} of those that the folder's other files add to its Tokenizer. Raises UserError."""
    tokens = {}
    known = tokenizer.vocabulary.tokens
    for name, key in (
        ("tokenizer_config.json", "added_tokens_decoder"),  # {id: {"content": ...}, ...}
        ("added_tokens.json", None),  # {token: id, ...}
    ):
        content = read_json(folder / name) if (folder / name).exists() else {}
        try:
            if key is None:
                tokens |= {token: int(id) for token, id in content.items()}
            else:
                tokens |= {entry["content"]: int(id) for id, entry in content.get(key, {}).items()}
        except (TypeError, ValueError, KeyError, AttributeError):
            raise UserError(
                f"{folder / name}: {key} is no list of tokens: save the tokenizer again"
            ) from None
    return {token: id for token, id in tokens.items() if not 0 <= id < len(known) or known[id] != token}


def chat_template(folder, settings):
    """{"chat_template": Jinja, "end_of_turn": id} of a folder with these settings; {} if it has none."""
    path = folder / "chat_template.jinja"
    config = (
        read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    )
    template = path.read_text(encoding="utf-8") if path.exists() else config.get("chat_template")
    ends = settings.get("eos_token_id")
    end = ends[0] if isinstance(ends, list) and ends else ends
    if not isinstance(template, str) or not isinstance(end, int):
        return {}
    return {"chat_template": template, "end_of_turn": end}


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


def note_changes(folder, paths):
    """Say which weights of an export are not those that were written, by the SHA256SUMS beside them."""
    if not (folder / HASHES).exists():
        return
    lines = (folder / HASHES).read_text(encoding="utf-8", errors="replace").splitlines()
    expected = {name: sha for sha, _, name in (line.partition("  ") for line in lines)}
    for path in [*paths, folder / "reflow.safetensors"]:
        if path.name in expected and path.exists() and file_sha256(path) != expected[path.name]:
            print(f"{path} is not what was exported, by {HASHES}: changed since, or damaged")


def read_weights(folder, files, config, untied=False):
    """{our name: weight} of these files of a folder, in the precision they are stored in. UserError.

    The head is left out, unless it is `untied`, a matrix of its own.
    """
    theirs = {}
    for path in files:
        theirs |= checkpoint.load_tensors(path)
    head = theirs.pop(HEAD, None)
    names = {"vocab.weight": EMBEDDING} | llama_names(config.n_layer)
    missing = [name for name in names.values() if name not in theirs]
    if missing:
        raise UserError(f"{folder}: weight {missing[0]} is missing ({len(missing)} in all)")
    if head is not None and not untied and not torch.equal(head, theirs[EMBEDDING]):
        raise UserError(f"{folder}: lm_head is not tied to the embedding: not supported")
    unknown = [name for name in theirs if name not in names.values() and "rotary_emb" not in name]
    if unknown:
        raise UserError(f"{folder}: weight {min(unknown)} has no place in reFlow: not supported")
    ours = {name: theirs[their_name] for name, their_name in names.items()}
    for name in ours:
        if name.endswith(ROTARY):
            ours[name] = to_pairs(ours[name], config.head_dim)
    return ours | ({HEAD: head} if untied and head is not None else {})


def read_vocabulary(folder, config, original, E, head=None):
    """(ModelConfig, {our name: weight}) with recipes and basis of reflow.safetensors, if they still give E.

    `original` is the ModelConfig that was exported, as a dict. E (V, d) comes as it is stored, `head` (V, d)
    beside it if the output has a matrix of its own. It stays dense without such a file, and where somebody
    has trained it since the export; UserError then, if the two differ.
    """
    path = folder / "reflow.safetensors"
    kind = original.get("vocab")
    if not path.exists() or kind not in ("factored", "topk", "sparse", "gains"):
        if head is not None:
            raise UserError(f"{folder}: {HEAD} is not tied to the embedding: not supported")
        print("vocabulary: dense")
        return config, {"vocab.weight": E}
    extra = checkpoint.load_tensors(path)
    recipes = extra.pop("recipes")  # (V, S)
    basis = extra["basis"]  # (S, d)
    gains = extra["gain.0"].double() if kind == "gains" else 1.0
    pairs = [(E, recipes.double() * gains)] + ([] if head is None else [(head, recipes.double())])
    if not all(is_product(stored, codes @ basis.double()) for stored, codes in pairs):
        changed = f"{path} does not give the embedding, which was changed since"
        if head is not None:
            raise UserError(f"{changed}; {HEAD} is not tied to it: not supported")
        print(f"vocabulary: dense: {changed}")
        return config, {"vocab.weight": E}
    print(f"vocabulary: {kind}, from {path}")
    fields = ("vocab", "n_signal", "top_k", "n_nonzero", "n_core")
    config = replace(config, **{key: original[key] for key in fields if key in original})
    if kind in ("factored", "gains"):
        extra["recipe"] = recipes
    return config, {f"vocab.{name}": weight for name, weight in extra.items()}


def is_product(stored, product):
    """Whether a matrix, as it is stored, is this one (fp64) up to its precision."""
    if product.shape != stored.shape:
        return False
    eps = torch.finfo(stored.dtype).eps
    return (product - stored.double()).norm() <= eps * stored.double().norm()
