"""data/tokenizer.py: any byte-level BPE, equal to an independent implementation, kept and never mixed."""

import json
import random
import sys
import unicodedata

import pytest

from configurator import UserError
from data import tokenizer
from data.tokenizer import load
from tests.gguf_fixtures import write_tokenizer_gguf

TEXT = "The  American people, 1,234 of them — don't  say «naïve» 東京 🙂\n\n\tat 10:45 PM.  "
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "1 2", "' s", "r e", "Ġ Ġ", "Ċ Ċ", "e r", "he r"]


def small(pre, control=("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
    """A Vocabulary whose ids have another order than its merges: control, merges, bytes."""
    merges = [tuple(m.split(" ")) for m in MERGES]
    tokens = [*control, *("".join(m) for m in reversed(merges)), *reversed(tokenizer.letters())]
    return tokenizer.Vocabulary(tokens, merges, frozenset(range(len(control))), pre)


def random_texts(n, seed=0):
    """Strings of code points of all kinds, among them many that decide where text is cut."""
    rng = random.Random(seed)
    ranges = [(32, 126)] * 4 + [
        (0, 0x2FF),
        (0x300, 0x2FFF),
        (0x3000, 0xD7FF),
        (0xE000, 0xFFFF),
        (0x1F300, 0x1F64F),
    ]
    spaces = " \n\t\r\u00a0\u2003\u3000\u2028'sdlvemtr0123456789"
    for _ in range(n):
        some = [
            rng.choice(spaces) if rng.random() < 0.4 else chr(rng.randint(*rng.choice(ranges)))
            for _ in range(rng.randint(1, 30))
        ]
        yield "".join(c for c in some if unicodedata.category(c) != "Cn")


@pytest.fixture(params=list(tokenizer.PATTERNS))
def pre(request):
    return request.param


def kept_file(vocabulary, folder):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(vocabulary.as_json()))
    return path


def test_ids_equal_those_of_an_independent_implementation(pre, tmp_path):
    """On 10,000 random Unicode strings and real text, ids out of the order of merges."""
    tokenizers = pytest.importorskip("tokenizers")
    path = kept_file(small(pre), tmp_path)
    theirs, ours = tokenizers.Tokenizer.from_file(str(path)), load(path)
    for text in [TEXT, *random_texts(10_000)]:
        ids = ours.encode_ordinary(text)
        assert ids == theirs.encode(text).ids, repr(text)
        assert ours.decode(ids) == text


@pytest.mark.parametrize("name", ["gpt2", "gpt2-300", "gpt2-8192"])
def test_a_prefix_of_gpt2_has_its_ids_and_holds_every_text(name):
    ours, whole = load(name), load("gpt2")
    for text in [TEXT, *random_texts(500)]:
        ids = ours.encode_ordinary(text)
        assert ours.decode(ids) == text and max(ids, default=0) < ours.end_of_text
        assert [ours.token_bytes(i) for i in ids] == [whole.token_bytes(i) for i in ids]
    assert ours.encode_prompt("a<|endoftext|>")[-1] == ours.end_of_text == ours.n_tokens - 1
    assert ours.end_of_text not in ours.encode_ordinary("a<|endoftext|>")


def test_a_piece_of_a_character_is_shown_by_its_bytes():
    """In tables and in errors; what is text stays as it is, U+FFFD included."""
    ours = load("gpt2")
    shown = [ours.token_shown(i) for i in ours.encode_ordinary("🙂 é 字")]
    assert shown == ["<0xF0 0x9F>", "<0x99 0x82>", " é", " <0xE5>", "<0xAD>", "<0x97>"]
    assert ours.token_text(ours.encode_ordinary("字")[0]) == "<0xE5 0xAD>"
    assert ours.token_text(4210) == ours.decode([4210]) == "\ufffd"
    with pytest.raises(UserError, match="pieces: ' <0xE5>' '<0xAD>' '<0x97>'"):
        ours.token_id("字", ours.n_tokens)


def test_control_tokens_count_in_prompts_alone(tmp_path):
    ours = load(kept_file(small("smollm"), tmp_path))
    assert ours.encode_prompt("<|im_start|>12<|im_end|>") == [1, *ours.encode_ordinary("12"), 2]
    assert len(ours.encode_ordinary("<|im_start|>")) > 1
    assert ours.decode([1, 2]) == "<|im_start|><|im_end|>"


def test_a_gguf_and_a_json_of_the_same_tokenizer_are_the_same(pre, tmp_path):
    path = tmp_path / "m.gguf"
    write_tokenizer_gguf(path, small(pre), unused=3)
    gguf, other = load(path), load(kept_file(small(pre), tmp_path))
    assert (gguf.sha256, gguf.name, gguf.n_tokens) == (other.sha256, other.name, other.n_tokens)
    assert gguf.encode(TEXT).tolist() == other.encode(TEXT).tolist()


@pytest.mark.parametrize("name", ["gpt2", "gpt2-8192"])
def test_gpt2_is_known_in_a_file(name, tmp_path):
    """A file that holds GPT-2's tokenizer is GPT-2's: its runs and data sets go together with ours."""
    assert load(kept_file(load(name).vocabulary, tmp_path)) is load(name)
    write_tokenizer_gguf(tmp_path / "m.gguf", load(name).vocabulary)
    assert load(tmp_path / "m.gguf") is load(name)


def test_what_is_kept_reads_the_same_for_ever(tmp_path):
    ours = load(kept_file(small("llama-bpe"), tmp_path))
    folder = tmp_path / "kept"
    folder.mkdir()
    for name, content in ours.files.items():
        (folder / name).write_bytes(content)
    again = tokenizer.kept(folder, ours.entry)
    assert again.sha256 == ours.sha256 and again.encode(TEXT).tolist() == ours.encode(TEXT).tolist()
    with pytest.raises(UserError, match="another tokenizer"):
        tokenizer.kept(folder, ours.entry | {"tokenizer_sha256": "0"})
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="is missing"):
        tokenizer.kept(folder, ours.entry)


def test_a_byte_without_a_token_is_refused(tmp_path):
    v = small("gpt-2")
    tokens = [token for token in v.tokens if token != "x"]
    ours = load(kept_file(tokenizer.Vocabulary(tokens, v.merges, v.control, v.pre), tmp_path))
    assert ours.decode(ours.encode("the other")) == "the other"
    with pytest.raises(UserError, match="0x78"):
        ours.encode("the next")


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda j: j["model"].update(type="WordPiece"), "only byte-level BPE"),
        (lambda j: j["model"].update(type="Unigram"), "only byte-level BPE"),
        (lambda j: j["model"]["vocab"].update({"▁the": len(j["model"]["vocab"]) + 3}), "not of a byte-level"),
        (lambda j: j["model"]["merges"].append("q q"), "which is no token"),
        (lambda j: j["model"]["merges"].append("qqq"), "no pairs"),
        (lambda j: j["model"]["vocab"].update(q=10_000), "are not 0 to"),
        (lambda j: j.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda j: j.update(pre_tokenizer={"type": "Whitespace"}), "in another way"),
        (lambda j: j.update(added_tokens=[]), "are not 0 to"),
        (lambda j: j.update(model=None), "damaged"),
        (lambda j: j.clear(), "damaged"),
    ],
)
def test_what_is_no_such_tokenizer_is_named(change, why, tmp_path):
    content = small("gpt-2").as_json()
    change(content)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=why) as error:
        load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("name", ["gpt2-100", "gpt2-50256", "gpt3", "nowhere/tokenizer.json"])
def test_unknown_names_are_refused(name):
    with pytest.raises(UserError, match="gpt2"):
        load(name)


def test_importing_it_loads_no_encoder():
    import subprocess

    code = "import sys, data.tokenizer; print('tiktoken' in sys.modules, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split() == ["False", "False"]
