"""A run with a tokenizer of its own: trained, sampled, released, exported; never mixed with another."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoint
from configurator import UserError
from data.datasets import run_words, text_folder
from data.shards import Dataset
from data.tokenizer import kept, load
from experiments.lab import nulls
from tests.formats_fixtures import go, logits, write_corpus
from tests.test_tokenizer import kept_file, small

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"block_size": 32, "n_layer": 1, "n_head": 1, "n_embd": 8, "n_hidden": 8, "n_signal": 4}
TRAIN = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 2, "warmup_steps": 1, "eval_interval": 2}
SETTINGS = [f"--{key}={value}" for key, value in (SHAPE | TRAIN | {"save_interval": 2}).items()]


def train(*arguments):
    """train.py on the CPU; (exit status, all that it wrote)."""
    command = [sys.executable, str(ROOT / "train.py"), *SETTINGS, "--device=cpu", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module", params=["gpt2-300", "file"])
def run(request, tmp_path_factory):
    """A run of two steps on text in tokens of gpt2-300, and of a tokenizer that is no GPT-2's."""
    home = tmp_path_factory.mktemp("home")
    name = request.param if request.param != "file" else kept_file(small("smollm"), home)
    tokenizer = load(name)
    text = write_corpus(home / "text", tokenizer)
    code, out = train(f"--dataset={text}", f"--out_dir={home / 'run'}")
    assert code == 0, out
    rows = 64 * -(-tokenizer.n_tokens // 64)  # padded to a multiple of 64
    assert checkpoint.open_run(home / "run").model_config["vocab_size"] == rows
    return home / "run", tokenizer


def test_a_run_keeps_its_tokenizer(run, tmp_path):
    """Where it goes: release, Hugging Face and back, with the same ids and the same logits."""
    folder, tokenizer = run
    ckpt = checkpoint.open_run(folder)
    assert ckpt.load_model().config.n_tokens == tokenizer.n_tokens < ckpt.model_config["vocab_size"]
    go(f"--run={folder}", "--form=reflow", f"--to={tmp_path / 'release'}")
    go(f"--run={folder}", f"--to={tmp_path / 'hf'}")
    go(f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'back'}", f"--dataset={folder.parent / 'text'}")
    text = "The people, 12 of them"
    for place in (folder, tmp_path / "release", tmp_path / "back"):
        ckpt = checkpoint.open_run(place)
        found = kept(ckpt.path, ckpt.state)
        assert (
            found.sha256 == tokenizer.sha256
            and found.encode(text).tolist() == tokenizer.encode(text).tolist()
        )
        words = run_words(ckpt.path, ckpt.state)
        assert words.tokenizer.sha256 == tokenizer.sha256 and len(words.counts) == tokenizer.n_tokens


def test_transformers_reads_the_export_alike(run, tmp_path):
    import torch

    transformers = pytest.importorskip("transformers")
    folder, tokenizer = run
    go(f"--run={folder}", f"--to={tmp_path / 'hf'}")
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").encode("The people, 12 of\n\n them 345")
    assert ids == tokenizer.encode_ordinary("The people, 12 of\n\n them 345")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours, ids = checkpoint.open_run(folder).load_model(), torch.tensor([ids])
    assert torch.allclose(logits(ours, ids), logits(theirs, ids), atol=1e-4)


def test_mixing_is_refused_in_one_line_that_names_both(run, tmp_path):
    folder, tokenizer = run
    other = write_corpus(tmp_path / "other")
    code, out = train(f"--dataset={other}", f"--out_dir={folder}", "--resume")
    last = out.strip().splitlines()[-1]
    assert code == 2 and "gpt2" in last and tokenizer.name in last and str(folder) in last
    command = [sys.executable, str(ROOT / "train.py"), f"--init_from={folder}", f"--dataset={other}"]
    command += [f"--out_dir={tmp_path / 'tuned'}", "--device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "holds tokens of gpt2" in last and f"has {tokenizer.name}" in last
    state = checkpoint.open_run(folder).state
    state["config"]["train"]["dataset"] = str(other)
    with pytest.raises(UserError, match=f"holds tokens of gpt2, .* has {tokenizer.name}"):
        text_folder(checkpoint.open_run(folder).path, state)


@pytest.mark.parametrize(("name", "rows"), [("books", 50304), ("none-gpt2-1000", 1024)])
def test_a_plan_has_the_rows_that_the_data_will_ask_for(name, rows):
    """Data that is not here yet: its name says which tokens it will hold, else it is GPT-2's."""
    code, out = train(f"--dataset={name}", "--dry_run")
    assert code == 0 and f"--vocab_size={rows} " in out


def test_too_few_rows_are_refused(run, tmp_path):
    folder, tokenizer = run
    text = folder.parent / "text"
    code, out = train(f"--dataset={text}", f"--out_dir={tmp_path / 'x'}", "--vocab_size=200")
    assert code == 2 and f"vocab_size=200 is too small for {tokenizer.name}" in out


def test_a_missing_tokenizer_is_named(run, tmp_path):
    folder, tokenizer = run
    if not tokenizer.files:
        pytest.skip("known by its name")
    text = write_corpus(tmp_path / "text", tokenizer)
    (text / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="text/tokenizer.json is missing"):
        Dataset(text, "val", 8).check_tokenizer(Dataset(text, "val", 8).tokenizer, "it")


def test_padding_and_control_tokens(run, monkeypatch, capsys):
    """A sample never holds a padding row, and a prompt may end a document."""
    import sample

    folder, tokenizer = run
    arguments = [f"--run={folder}", "--prompt=The<|endoftext|>people", "--max_new_tokens=8", "--device=cpu"]
    monkeypatch.setattr("sys.argv", ["sample.py", *arguments])
    sample.main()
    assert "people" in capsys.readouterr().out


def test_its_null_model_has_its_tokenizer(run, tmp_path):
    """Trained on its own tokens in random order, by train.py."""
    folder, tokenizer = run
    ckpt = checkpoint.open_run(folder)
    start = checkpoint.load_model(folder / "step_000000")[0]
    counts = run_words(ckpt.path, ckpt.state).counts
    null = nulls.shuffled_text(ckpt, start, counts, tmp_path / "nulls")
    assert kept(null.path, null.state).sha256 == tokenizer.sha256
    assert null.load_model().config.n_tokens == tokenizer.n_tokens


def test_a_chat_template_goes_along(run, tmp_path):
    """To GGUF and to Hugging Face, and back from both."""
    folder, tokenizer = run
    shutil.copytree(folder, tmp_path / "run")
    path = checkpoint.find(tmp_path / "run") / "state.json"
    chat = {"chat_template": "{{ messages[0].content }}", "end_of_turn": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | chat))
    go(f"--run={tmp_path / 'run'}", f"--to={tmp_path / 'hf'}")
    go(f"--run={tmp_path / 'run'}", "--form=gguf", f"--to={tmp_path / 'm.gguf'}")
    for source in ("hf", "m.gguf"):
        go(
            f"--from={tmp_path / source}",
            f"--to={tmp_path / source}-back",
            f"--dataset={folder.parent / 'text'}",
        )
        state = checkpoint.open_run(tmp_path / f"{source}-back").state
        assert {key: state[key] for key in chat} == chat
