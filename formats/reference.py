"""
Checkpoints of the reference system, torch files (.pt), in.

Only some of their names are known. What names and shapes do not tell is tried: every reading that they allow,
and the one with the lowest loss on plain text is kept. Nothing in such a file is executed.
"""

import contextlib
import itertools
import math
import pickle
import re
from dataclasses import dataclass

import torch
from tqdm import tqdm

from configurator import UserError
from formats.llama import to_pairs
from model import ModelConfig

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
TOO_CLOSE = 0.01  # nats per token: below it the loss does not tell two readings apart


def read_reference(path, loss):
    """(ModelConfig, {our name: weight}) of a torch file; prints how each question was decided.

    `loss(config, weights)` gives nats per token. Raises UserError.
    """
    reference = open_reference(path)
    return reference.read_as(best_reading(reference, loss))


@dataclass
class Reference:
    """The weights of a reference checkpoint, fp32, under their own names. A *reading* {question: answer} says
    which weight has which role in a block, and how else they make a model."""

    vocab: dict  # {name below transformer.wte: tensor}; {"": E (V, d)} for a plain embedding
    blocks: list  # [{name below transformer.h.N: tensor}, ...]
    norm: torch.Tensor  # (d,)
    rope_table: tuple | None  # (positions, head_dim / 2), the shape of the rotary table, if it was saved
    settings: dict  # config and model_args, as they were saved

    def setting(self, *names):
        """The first of these settings that says something, or None."""
        return next((self.settings[name] for name in names if self.settings.get(name)), None)

    def readings(self):
        """All readings that names, shapes and settings allow. Raises UserError."""
        d = len(self.norm)
        n_head = self.setting("n_head", "n_heads", "num_heads")
        if n_head is None and self.rope_table is not None:
            n_head = d // (2 * self.rope_table[1])
        likely = [d // head_dim for head_dim in (32, 64, 128) if d % head_dim == 0]
        questions = self.vocab_questions()
        questions["heads"] = [n_head] if n_head else likely
        questions["rotary positions"] = ["adjacent pairs", "halves"]
        choices = itertools.product(block_roles(self.blocks[0], d), *questions.values())
        return [roles | dict(zip(questions, answers, strict=True)) for roles, *answers in choices]

    def vocab_questions(self):
        """{question: [answers]} about the vocabulary."""
        if self.vocab.keys() == {""}:
            return {}
        if len(self.vocab) != 2 or "vocab_to_signals" not in self.vocab:
            raise UserError(f"transformer.wte: not vocab_to_signals and a basis, but {', '.join(self.vocab)}")
        S = min(self.vocab["vocab_to_signals"].shape)  # there are more tokens than signals
        d = len(self.norm)
        shape = tuple(self.basis.shape)
        ways = [way for way, fit in {"S x d": (S, d), "d x S": (d, S)}.items() if shape == fit]
        if not ways:
            raise UserError(f"transformer.wte: a basis of {shape} does not fit {S} signals of width {d}")
        plain = "as they are"
        sparse = f"ReLU and Top-{self.setting('top_k', 'topk', 'k') or min(64, S)}"
        kind = self.setting("model_config")
        if kind is None:
            return {"basis": ways, "recipes": [plain, sparse]}
        return {"basis": ways, "recipes": [sparse if "topk" in str(kind) else plain]}

    @property
    def basis(self):
        """The tensor beside vocab_to_signals, (S, d) or (d, S)."""
        return next(tensor for name, tensor in self.vocab.items() if name != "vocab_to_signals")

    def read_vocab(self, reading):
        """({our name: weight}, {field of ModelConfig: value}) of the vocabulary."""
        if "basis" not in reading:
            return {"vocab.weight": self.vocab[""]}, {"vocab": "dense", "vocab_size": len(self.vocab[""])}
        recipe = self.vocab["vocab_to_signals"]
        recipe = recipe if len(recipe) > recipe.shape[1] else recipe.T  # (V, S)
        basis = self.basis if reading["basis"] == "S x d" else self.basis.T  # (S, d)
        settings = {"vocab": "factored", "n_signal": len(basis), "vocab_size": len(recipe)}
        if reading["recipes"] != "as they are":
            settings |= {"vocab": "topk", "top_k": int(reading["recipes"].rpartition("-")[2])}
        return {"vocab.recipe": recipe, "vocab.basis": basis}, settings

    def read_as(self, reading):
        """(ModelConfig, {our name: weight}) of one reading. ValueError if no model has such a shape."""
        d = len(self.norm)
        n_head = reading["heads"]
        blocks = [read_block(block, reading) for block in self.blocks]
        n_kv_head, rest = divmod(len(blocks[0]["attn.k"]) * n_head, d)
        if rest:
            raise ValueError(f"attn.k does not have a whole number of the {n_head} heads")
        weights, vocab_settings = self.read_vocab(reading)
        config = ModelConfig(
            block_size=self.setting("block_size") or (self.rope_table or [1024])[0],
            n_layer=len(blocks),
            n_head=n_head,
            n_embd=d,
            n_kv_head=n_kv_head,
            n_hidden=len(blocks[0]["mlp.gate"]),
            **vocab_settings,
        )
        weights["norm.weight"] = self.norm
        for i, block in enumerate(blocks):
            if reading["rotary positions"] == "halves":
                for role in ("attn.q", "attn.k"):
                    block[role] = to_pairs(block[role], config.head_dim)
            weights |= {f"blocks.{i}.{role}.weight": weight for role, weight in block.items()}
        return config, weights


# ----------------------------------------------------------------------------------------------------
# The file


def open_reference(path):
    """The Reference in a torch file. UserError if it holds anything that a reFlow has no place for."""
    data = unpickle(path)
    parts = {key: value for key, value in data.items() if isinstance(value, dict)}
    vocab = {}
    blocks = {}  # by number
    norms = []
    head = None
    rope_table = None
    for name, tensor in parts.get("model", parts.get("state_dict", data)).items():
        if not isinstance(tensor, torch.Tensor) or tensor.dim() > 3:  # a causal mask has 4
            continue
        short = re.sub(r"^((_orig_mod|module)\.)+|\.weight$", "", name)  # of torch.compile and DDP
        block = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", short)
        word = re.fullmatch(r"transformer\.wte\.?(.*)", short)
        if short.endswith("freqs_cis"):
            rope_table = tuple(tensor.shape[:2])
        elif short.endswith("bias") or short.startswith("transformer.wpe"):
            raise UserError(f"{path}: {name}: reFlow has no biases and no position embedding")
        elif block:
            blocks.setdefault(int(block[1]), {})[block[2]] = tensor.float()
        elif word:
            vocab[word[1]] = tensor.float()
        elif short == "lm_head":
            head = tensor.float()
        elif short.startswith("transformer.") and tensor.dim() == 1:
            norms.append(tensor.float())
        else:
            raise UserError(f"{path}: {name} has no place in reFlow")
    if len(norms) != 1 or not blocks or not vocab:
        raise UserError(f"{path} is no reference checkpoint: transformer.h, .wte or .ln_f is missing")
    if head is not None and "" in vocab and not torch.equal(head, vocab[""]):
        raise UserError(f"{path}: lm_head is not tied to transformer.wte: not supported")
    numbers = sorted(blocks)
    blocks = [blocks[i] for i in numbers]
    if numbers != list(range(len(blocks))) or any(block.keys() != blocks[0].keys() for block in blocks):
        raise UserError(f"{path}: blocks are missing or differ in their weights")
    settings = parts.get("config", {}) | parts.get("model_args", {})
    return Reference(vocab, blocks, norms[0], rope_table, settings)


def unpickle(path):
    """The dict in a torch file, by torch's unpickler for tensors and plain values only. Raises UserError."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = str(error).splitlines()[0]
        raise UserError(f"{path} holds more than tensors and plain values ({what}): not loaded") from None
    except Exception as error:  # whatever a file of another kind makes torch throw
        raise UserError(f"{path} is no whole torch file: {' '.join(str(error).split())[:200]}") from None
    return data if isinstance(data, dict) else {}


# ----------------------------------------------------------------------------------------------------
# A block, and the choice


def role_of(name):
    """The role that the name of a weight tells, or None."""
    return next((role for role, pattern in ROLES.items() if re.search(pattern, name)), None)


def block_roles(block, d):
    """[{role: name}, ...]: every way in which shapes and names allow to read a block {name: tensor}.

    Raises UserError if there is none.
    """
    hidden = next((w.shape[1] for w in block.values() if w.dim() == 2 and len(w) == d != w.shape[1]), None)
    shapes = {"norm1": (d,), "norm2": (d,)}
    shapes |= {"mlp.gate": (hidden, d), "mlp.up": (hidden, d), "mlp.down": (d, hidden)}
    heights = [
        len(w)
        for name, w in block.items()
        if w.dim() == 2 and w.shape[1] == d and (len(w) != hidden or role_of(name) == "attn.qkv")
    ]  # of the attention's weights
    if max(heights, default=d) > d:
        shapes |= {"attn.qkv": (max(heights), d), "attn.o": (d, d)}
    else:  # keys and values may have fewer heads
        kv_width = min(heights, default=d)
        shapes |= {"attn.q": (d, d), "attn.k": (kv_width, d), "attn.v": (kv_width, d), "attn.o": (d, d)}
    fitting = [
        [name for name, w in block.items() if w.shape == shape and role_of(name) in (None, role)]
        for role, shape in shapes.items()
    ]
    ways = itertools.product(*fitting) if len(block) == len(shapes) else []
    ways = [dict(zip(shapes, names, strict=True)) for names in ways if len(set(names)) == len(names)]
    if not ways:
        found = ", ".join(f"{name} {tuple(w.shape)}" for name, w in block.items())
        raise UserError(f"transformer.h: one weight each for {', '.join(shapes)} is wanted, found {found}")
    return ways


def read_block(block, reading):
    """{role: weight} of a block {name: tensor}, query, key and value apart."""
    named = {role: block[name] for role, name in reading.items() if role in ROLES}
    if "attn.qkv" in named:
        qkv = named.pop("attn.qkv")  # (d + 2 * kv_heads * head_dim, d)
        d = qkv.shape[1]
        named["attn.q"] = qkv[:d]
        named["attn.k"], named["attn.v"] = qkv[d:].chunk(2)
    return named


def best_reading(reference, loss):
    """The reading whose model has the lowest loss; prints how each question was decided.

    `loss(config, weights)` gives nats per token. UserError if no reading has a finite one.
    """
    readings = reference.readings()
    trials = []  # (nats per token, reading)
    for reading in tqdm(readings, desc="trying", disable=None):
        with contextlib.suppress(ValueError, TypeError):  # no model has this shape
            nats = loss(*reference.read_as(reading))
            if math.isfinite(nats):
                trials.append((nats, reading))
    if not trials:
        raise UserError("no way to read this checkpoint gives a finite loss: it does not fit reFlow")
    lowest, best = min(trials, key=lambda trial: trial[0])
    for question, answer in best.items():
        how = "names and shapes allow nothing else"
        if any(reading[question] != answer for reading in readings):
            others = [nats for nats, reading in trials if reading[question] != answer]
            rival = min(others, default=math.inf)
            doubt = "; TOO CLOSE to be sure" if rival - lowest < TOO_CLOSE else ""
            how = f"loss {lowest:.4f}; best otherwise {rival:.4f}{doubt}"
        print(f"{question}: {answer} ({how})")
    return best
