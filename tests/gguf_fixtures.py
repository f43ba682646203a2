"""GGUF files, written by hand: independent of the gguf package and of ours."""

import struct


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(v):
    """A metadata value with its type."""
    if isinstance(v, bool):
        return struct.pack("<I?", 7, v)
    if isinstance(v, int):
        return struct.pack("<II", 4, v)
    if isinstance(v, float):
        return struct.pack("<If", 6, v)
    if isinstance(v, str):
        return struct.pack("<I", 8) + string(v)
    inner, one = (8, string) if v and isinstance(v[0], str) else (5, lambda x: struct.pack("<i", x))
    return struct.pack("<IIQ", 9, inner, len(v)) + b"".join(map(one, v))


def gguf(metadata, tensors=()):
    """The bytes of a GGUF file; `tensors` are (name, fp32 array)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(string(key) + value(v) for key, v in metadata.items())
    body = b""
    for name, array in tensors:
        dims = array.shape[::-1]
        head += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, len(body))
        body += array.astype("<f4").tobytes()
        body += bytes(-len(body) % 32)
    return head + bytes(-len(head) % 32) + body


def tokenizer_metadata(vocabulary, unused=0):
    """The keys of a Vocabulary, with `unused` tokens after it."""
    n = len(vocabulary.tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens + [f"[PAD{i}]" for i in range(unused)],
        "tokenizer.ggml.token_type": [3 if i in vocabulary.control else 1 for i in range(n)] + [5] * unused,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in vocabulary.merges],
    }


def write_tokenizer_gguf(path, vocabulary, unused=0):
    """A GGUF file that holds a Vocabulary and nothing else."""
    path.write_bytes(gguf({"general.architecture": "llama"} | tokenizer_metadata(vocabulary, unused)))
