"""sample.py: text in, text out, steering, and one line for every mistake."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import checkpoint
import sample
from configurator import UserError
from data.shards import Dataset
from data.tokenizer import END_OF_TEXT, gpt2
from model import ModelConfig, ReFlow
from tests.lab_fixtures import corpus, save_run, tiny, token, words
from tests.sentiment_fixtures import planted


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A working folder with one untrained run, out/tiny, over GPT-2's vocabulary; a context of 16 tokens."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = ModelConfig(block_size=16, n_layer=1, n_head=2, n_embd=8)
    model = ReFlow(config)
    state = {
        "config": {"model": asdict(config)},
        "val_loss": 10.8,
        "whole_val_loss": None,
        "bits_per_byte": 3.1,
    }
    run = tmp_path / "out" / "tiny"
    checkpoint.save(run, 0, dict(model.state_dict()), {}, state, keep=1, best=True)
    return run


def run(monkeypatch, capsys, *arguments):
    """Run the script; (what it printed as text, what it said on stderr)."""
    monkeypatch.setattr(sys, "argv", ["sample.py", "--device=cpu", "--dtype=fp32", *arguments])
    sample.main()
    return capsys.readouterr()


def test_samples_continue_the_prompt_and_follow_the_seed(out, monkeypatch, capsys):
    arguments = ("--prompt=The people", "--num_samples=3", "--max_new_tokens=40")  # beyond the context
    text, said = run(monkeypatch, capsys, *arguments)
    parts = text.split("\n" + "-" * 40 + "\n")
    assert len(parts) == 3 and all(part.startswith("The people") for part in parts)
    assert len(set(parts)) == 3
    assert "120 tokens" in said and "validation loss 10.8" in said
    assert run(monkeypatch, capsys, *arguments)[0] == text
    assert run(monkeypatch, capsys, *arguments, "--seed=1")[0] != text


def test_the_streamed_sample_is_the_decoded_one(out, monkeypatch, capsys):
    """Random tokens cut characters into pieces; what is streamed must still be the whole text."""
    arguments = ["--prompt=é", "--num_samples=1", "--max_new_tokens=60", "--temperature=1.5", "--top_k=None"]
    text, _ = run(monkeypatch, capsys, *arguments)
    model, _ = checkpoint.load_model(out / "step_000000")
    generator = torch.Generator().manual_seed(0)
    how = {"temperature": 1.5, "stop": END_OF_TEXT, "generator": generator}
    (tokens,) = model.generate([gpt2().encode_ordinary("é")], 60, **how)
    assert text == "é" + gpt2().decode(tokens) + "\n"


def test_a_sample_ends_at_the_end_of_text(out, monkeypatch, capsys):
    monkeypatch.setattr("model.sample_token", lambda logits, **how: torch.full((len(logits),), END_OF_TEXT))
    text, said = run(monkeypatch, capsys, "--prompt=A", "--num_samples=2")
    assert text == "A\n" + "-" * 40 + "\nA\n" and "0 tokens" in said


def test_prompts_from_files_empty_and_too_long(out, monkeypatch, capsys, tmp_path):
    (tmp_path / "story.txt").write_text("Once upon a time")
    text, _ = run(monkeypatch, capsys, "--prompt=FILE:story.txt", "--max_new_tokens=2")
    assert text.startswith("Once upon a time")
    _, said = run(monkeypatch, capsys, "--prompt=", "--max_new_tokens=2")
    assert "starting a new document" in said
    _, said = run(monkeypatch, capsys, "--prompt=" + " people" * 20, "--max_new_tokens=2")
    assert "prompt of 20 tokens: only the last 16 fit" in said


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--prompt=FILE:missing.txt"], "missing.txt"),
        (["--run=out/other"], "no run out/other: make one with: python train.py"),
        (["--temperature=-1"], "temperature=-1.0: must satisfy temperature == 0 or 0.001 <= temperature"),
        (["--temperature=1e-38"], "temperature=1e-38: must satisfy"),
        (["--temperature=nan"], "temperature=nan: expected a finite float"),
        (["--top_p=0"], "top_p=0.0: must satisfy 0 < top_p <= 1"),
        (["--top_k=-1"], "top_k=-1: must satisfy top_k >= 0"),
        (["--num_samples=1e12"], "num_samples=1000000000000: must satisfy 1 <= num_samples"),
        (["--seed=-1"], "seed=-1: must satisfy 0 <= seed"),
        (["--seed=12345678901234567890"], "seed=12345678901234567890: expected an int"),
        ([f"--steer=+s0:{'9' * 42}@0"], "s0:9*@0': the strength .* at most 1000"),
        (["--steer=+s0:nan@0"], "is not like"),
        (["--compare"], "give --steer"),
        (["--compare", "--steer=+antidisestablishment:1@0"], "take a word that is one token"),
        (["--dtype=fp8"], "dtype=fp8"),
        (["--promt=x"], "did you mean prompt"),
    ],
)
def test_mistakes_are_one_line(out, monkeypatch, capsys, arguments, match):
    with pytest.raises(UserError, match=match) as error:
        run(monkeypatch, capsys, *arguments)
    assert "\n" not in str(error.value)


def test_top_k_0_takes_all(out, monkeypatch, capsys):
    """As None does."""
    found = [run(monkeypatch, capsys, f"--top_k={k}", "--temperature=2")[0] for k in ("0", "None", "1")]
    assert found[0] == found[1] != found[2]


def test_without_a_run_the_release_is_taken_and_without_that_it_says_how_to_make_one(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    text, said = run(monkeypatch, capsys, "--max_new_tokens=1", "--num_samples=1")
    assert text.startswith("The American people") and "reflow-mini: no run under out/" in said
    monkeypatch.setattr(checkpoint, "RELEASES", tmp_path)
    with pytest.raises(UserError, match="no trained model under out/: make one with: python train.py"):
        run(monkeypatch, capsys)


# -- --steer


def test_steering_is_read():
    model = tiny()
    items = sample.read_steering("+joy:4@0-2, -s7:.5@1,+peace:2@0", model, gpt2())
    assert [(strength, list(layers)) for _, strength, layers in items] == [
        (4, [0, 1, 2]),
        (-0.5, [1]),
        (2, [0]),
    ]
    torch.testing.assert_close(items[0][0], model.vocab.matrix()[token("joy")])
    torch.testing.assert_close(items[1][0], model.vocab.basis[7])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not like"),
        ("joy:4@0", "not like"),
        ("+joy:four@0", "not like"),
        ("+joy@0", "not like"),
        ("+joy:1@0,", "not like"),
        ("+joy:1@3", "from 0 to 2"),
        ("+joy:1@2-1", "from 0 to 2"),
        ("+s16:1@0", "s0 to s15"),
        ("+antidisestablishment:1@0", "tokens: take a word"),
    ],
)
def test_mistakes_in_steering_are_one_line(text, match):
    with pytest.raises(UserError, match=match) as error:
        sample.read_steering(text, tiny(), gpt2())
    assert "\n" not in str(error.value)


def test_a_plain_gpt_is_steered_by_words_alone():
    model = tiny(vocab="dense")
    assert len(sample.read_steering("+joy:1@0", model, gpt2())) == 1
    with pytest.raises(UserError, match="no signals"):
        sample.read_steering("+s1:1@0", model, gpt2())


def test_strength_zero_changes_nothing_and_a_word_raises_its_logit():
    model, idx = tiny(), torch.arange(30).view(3, 10)
    model.vocab.recipe.data[token("joy")] *= 10
    plain = model(idx)[0]
    with sample.steered(model, sample.read_steering("+joy:0@0-2,-s3:0@1", model, gpt2())):
        assert torch.equal(model(idx)[0], plain)
    with sample.steered(model, sample.read_steering("+joy:8@2", model, gpt2())):
        pushed = model(idx)[0]
    assert (pushed[..., token("joy")] > plain[..., token("joy")]).all()
    assert (pushed.argmax(-1) == token("joy")).float().mean() > 0.5
    assert torch.equal(model(idx)[0], plain)  # and it ends


@pytest.mark.parametrize("vocab", ["factored", "topk", "dense"])
def test_cached_and_uncached_generation_agree_under_steering(vocab):
    model = tiny(1, vocab=vocab, **({"top_k": 4} if vocab == "topk" else {}))
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    with sample.steered(model, sample.read_steering("+joy:0.7@0-1,-peace:0.5@1", model, gpt2())):
        cached = model.generate(prompts, 12, temperature=0)
        assert cached == model.generate(prompts, 12, temperature=0, use_cache=False)
        assert cached == [model.generate([p], 12, temperature=0)[0] for p in prompts]
    assert cached != model.generate(prompts, 12, temperature=0)


def test_the_script_steers_and_stays_light_without(tmp_path, monkeypatch, capsys):
    folder = save_run(tmp_path / "run", planted(), "none")
    arguments = [f"--run={folder}", "--device=cpu", "--dtype=fp32", "--num_samples=2", "--max_new_tokens=5"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments, "--temperature=0", "--steer=+country:30@2"])
    sample.main()
    assert capsys.readouterr().out.count(" country" * 5) == 2
    code = "import sys, sample; sample.main(); assert not {'experiments', 'scipy'} & set(sys.modules)"
    root = Path(sample.__file__).parent
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=root, check=True, capture_output=True)


def test_compare_shows_the_same_samples_without_steering_first(out, monkeypatch, capsys):
    how = ("--num_samples=2", "--max_new_tokens=10", "--seed=3")
    steer = "--steer=+joy:2@1"
    plain = run(monkeypatch, capsys, *how)[0]
    pushed = run(monkeypatch, capsys, *how, steer)[0]
    text, said = run(monkeypatch, capsys, *how, steer, "--compare")
    assert plain != pushed and "40 tokens" in said
    assert text == f"== without --steer\n{plain}\n== with {steer}\n{pushed}"


def test_a_word_that_was_rare_in_training_is_said_to_be(tmp_path, monkeypatch, capsys):
    data = corpus(tmp_path / "data", repeats=150, n_words=20)
    folder = save_run(tmp_path / "run", tiny(), data)
    set_data(folder, data)
    how = (f"--run={folder}", "--max_new_tokens=1", "--steer=+{}:1@0,-s3:1@0")
    for word, note in {"quantum": "never seen", words(1)[0]: ""}.items():
        said = run(monkeypatch, capsys, *how[:2], how[2].format(word))[1]
        assert (f"--steer: {word} was {note} in training" in said) if note else "--steer:" not in said
    set_data(folder, tmp_path / "elsewhere")  # the text is not here: nothing is known of it
    assert "--steer" not in run(monkeypatch, capsys, *how[:2], how[2].format("music"))[1]


def set_data(folder, data):
    """Let a run have been trained on the data set at `data`, for 100 windows of it."""
    path = checkpoint.find(folder) / "state.json"
    state = json.loads(path.read_text())
    state["config"]["train"] |= {"dataset": str(data), "batch_size": 0}
    if (data / "meta.json").exists():
        state["data_sha256"] = Dataset(data, "val", 1).data_sha256
    path.write_text(json.dumps(state))


CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_a_question_is_wrapped_in_the_models_own_template():
    """In a sandbox: a template that reaches for Python is refused in one line."""
    assert sample.chat_prompt("Why?", {"chat_template": CHAT}) == "<|im_start|>user\nWhy?<|im_end|>\n"
    for template in ("{{ ''.__class__.__mro__ }}", "{% for %}", "{{ messages.append(1) }}", "{{ x.y.z }}"):
        with pytest.raises(UserError, match="template fails") as error:
            sample.chat_prompt("Why?", {"chat_template": template})
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no chat template"):
        sample.chat_prompt("Why?", {})
