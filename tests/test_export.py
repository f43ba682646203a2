"""export.py: what it replaces and refuses, runs that are made of other models, dense models factored."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import checkpoint
import configurator
import export
import files
import sample
import train
from configurator import UserError
from formats import llama
from tests.formats_fixtures import go, ids, logits, random_model, reference, save, write_corpus

ROOT = Path(export.__file__).resolve().parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small prepared data set of real tokens."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def test_only_an_export_is_replaced(tmp_path, monkeypatch):
    """A folder of something else is refused; a failed export leaves the one before, and nothing beside it."""
    run, to = save(random_model("factored"), tmp_path / "run"), tmp_path / "hf"
    go(f"--run={run}", f"--to={to}")
    before = (to / "README.md").read_text()
    go(f"--run={run}", f"--to={to}", "--dtype=bf16")
    after = (to / "README.md").read_text()
    assert before != after
    monkeypatch.setattr(llama, "model_card", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(f"--run={run}", f"--to={to}")
    assert (to / "README.md").read_text() == after
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]
    with files.lock(to), pytest.raises(UserError, match="hf is in use by process .* since"):
        go(f"--run={run}", f"--to={to}")
    with pytest.raises(UserError, match="only an export replaces an export: give another folder"):
        go(f"--run={run}", f"--to={run}")
    with pytest.raises(UserError, match="give another folder"):
        go(f"--from={to}", f"--to={to}")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "--to is missing"),
        (["--to=x", "--from=y", "--run=z"], "give one"),
        (["--to=x", "--run=nowhere"], "no run nowhere"),
        (["--to=x", "--from=nowhere"], "nowhere"),
        (["--to=x", "--from="], "takes a Hugging Face folder"),
        (["--to=x", "--dtype=int8"], "dtype=int8"),
        (["--to=x", "--from=y", "--dtype=bf16"], "--form and --dtype are for what goes out"),
        (["--to=x", "--factor=pca", "--form=reflow"], "--form and --dtype are for what goes out"),
        (["--to=."], "--to=. is there already; .* give another folder"),
    ],
)
def test_mistakes_are_one_line(arguments, match, tmp_path, monkeypatch, corpus):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=match) as error:
        go(*arguments, f"--dataset={corpus}")
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    """Whatever its JSON holds: a list, a number, a model of somebody else's."""
    run = save(random_model("factored"), tmp_path / "run")
    for i, content in enumerate(("[]", "3", "{", '{"model_type": "llama"}', '"reflow"')):
        other = tmp_path / f"other{i}"
        other.mkdir()
        (other / "config.json").write_text(content)
        with pytest.raises(UserError, match=f"--to={other} is there already"):
            go(f"--run={run}", f"--to={other}")
        assert [p.name for p in other.iterdir()] == ["config.json"]


@pytest.mark.parametrize("form", ["llama", "reflow"])
def test_a_place_that_cannot_be_written_is_an_error_before_the_work(form, tmp_path, monkeypatch):
    run = save(random_model("factored"), tmp_path / "run")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(checkpoint.Checkpoint, "load_model", None)
    with pytest.raises(UserError, match="file/hf cannot be written: Not a directory: give another folder"):
        go(f"--run={run}", f"--to={tmp_path / 'file' / 'hf'}", f"--form={form}")


@pytest.mark.parametrize("arguments", [["--form=llama"], ["--form=reflow"], ["--factor=pca"]])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(arguments, tmp_path):
    """A limit on the size of files stands for it: safetensors has an error of its own."""
    resource = pytest.importorskip("resource")
    run, to = save(random_model("dense"), tmp_path / "run"), tmp_path / "to"
    if "--factor=pca" not in arguments:
        go(f"--run={run}", f"--to={to}", *arguments)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            go(f"--run={run}", f"--to={to}", *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    where = to / "step_000000" if "--factor=pca" in arguments else to
    assert (
        configurator.explain(error.value) == f"{where}: File too large: free some space, or write elsewhere"
    )
    left = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path != to or path in before}
    assert left == before


def test_a_file_of_a_folder_is_not_the_folder(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(UserError, match=f"is one file of a model: name its folder, --from={tmp_path}$"):
        go(f"--from={tmp_path / 'model.safetensors'}", f"--to={tmp_path / 'x'}")


def test_a_damaged_run_is_named(tmp_path):
    """Truncated weights, then a state.json that is none."""
    run = save(random_model("factored"), tmp_path / "run")
    weights, state = (run / "step_000000" / name for name in ("model.safetensors", "state.json"))
    weights.write_bytes(weights.read_bytes()[:-100])
    for match in ("model.safetensors has .* bytes instead of", "state.json is missing or damaged"):
        with pytest.raises(UserError, match=match) as error:
            go(f"--run={run}", f"--to={tmp_path / 'hf'}")
        assert "\n" not in str(error.value) and not (tmp_path / "hf").exists()
        state.write_text("[]")


def test_damaged_weights_are_not_handed_on(tmp_path, monkeypatch):
    """Whatever their size: a release would get a hash of its own."""
    monkeypatch.setattr(checkpoint, "VERIFIED", 10)
    run = save(random_model("factored"), tmp_path / "run")
    with open(run / "step_000000" / "model.safetensors", "r+b") as file:
        file.seek(-64, 2)
        file.write(bytes(64))
    checkpoint.load_model(run / "step_000000")
    for form in ("llama", "reflow"):
        with pytest.raises(UserError, match="model.safetensors is damaged: its SHA-256"):
            go(f"--run={run}", f"--to={tmp_path / 'to'}", f"--form={form}")
    assert not (tmp_path / "to").exists()


def test_a_model_of_another_tokenizer_is_refused(tmp_path, corpus):
    torch.save(reference(random_model("dense", vocab_size=32000)), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="32,000 tokens, its tokenizer gpt2 has 50,257"):
        go(f"--from={tmp_path / 'ckpt.pt'}", f"--to={tmp_path / 'x'}", f"--dataset={corpus}")


def test_help_shows_the_options():
    command = [sys.executable, "export.py", "--help"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--from" in out.stdout and "--factor" in out.stdout


def test_an_imported_run_is_a_run(tmp_path, corpus, capsys, monkeypatch):
    """From a reference checkpoint by the command; then sampled, exported again and trained further."""
    monkeypatch.chdir(tmp_path)
    model = random_model("dense")
    torch.save(reference(model), "ckpt.pt")
    go("--from=ckpt.pt", "--to=out/it", f"--dataset={corpus}", "--sequences=2")
    assert "nats per token" in capsys.readouterr().out
    go("--prompt=The", "--max_new_tokens=3", main=sample.main)  # the newest run
    go("--to=hf")
    assert "Imported from `ckpt.pt`" in Path("hf/README.md").read_text()
    settings = {
        "out_dir": "out/on",
        "dataset": corpus,
        "init_from": "out/it",
        "max_steps": 1,
        "device": "cpu",
    }
    settings |= {"batch_size": 1, "micro_batch_size": 1, "eval_sequences": 1, "eval_interval": 1}
    settings |= {"save_interval": 1, "warmup_steps": 0}
    go(*(f"--{key}={value}" for key, value in settings.items()), main=train.main)
    start, _ = checkpoint.load_model(Path("out/on/step_000000"))
    end, _ = checkpoint.load_model(Path("out/on/step_000001"))
    read_back, _ = checkpoint.load_model(checkpoint.find("out/it"))
    assert all(map(torch.equal, start.state_dict().values(), read_back.state_dict().values()))
    assert not torch.equal(end.norm.weight, start.norm.weight)


@pytest.mark.parametrize("kind", ["identity", "rotation", "pca", "ica"])
def test_a_dense_model_factored_is_the_same_function(kind, tmp_path):
    if kind == "ica":
        pytest.importorskip("sklearn")
    model = random_model("dense")
    with torch.no_grad():  # independent sources of unequal strength, mixed: what PCA and ICA look for
        sources = torch.randn(50304, 32) * torch.randn(50304, 32).abs() * torch.linspace(0.5, 2, 32)
        model.vocab.weight.copy_(sources @ torch.linalg.qr(torch.randn(32, 32)).Q)
    run, to = save(model, tmp_path / "run"), tmp_path / "factored"
    go(f"--run={run}", f"--factor={kind}", f"--to={to}", "--seed=5")
    factored, state = checkpoint.load_model(checkpoint.find(to))
    assert factored.config == replace(model.config, vocab="factored", n_signal=32)
    assert state["val_loss"] == 5.0
    torch.testing.assert_close(logits(factored, ids(model)), logits(model, ids(model)), rtol=0, atol=2e-4)

    recipe, basis = factored.vocab.recipe.detach(), factored.vocab.basis.detach()
    orthogonal = torch.allclose(basis @ basis.T, torch.eye(32), atol=1e-4)
    assert orthogonal == (kind != "ica")
    assert torch.equal(basis, torch.eye(32)) == (kind == "identity")
    covariance = torch.cov(recipe[:50257].T)
    correlation = torch.corrcoef(recipe[:50257].T) - torch.eye(32)
    assert (correlation.abs().max() < 0.1) == (kind in ("pca", "ica"))
    if kind == "pca":
        assert torch.equal(covariance.diag().argsort(descending=True), torch.arange(32))
    if kind == "ica":  # each signal is one of the sources
        correlation = torch.corrcoef(torch.cat([recipe.T, sources.T]))[:32, 32:].abs()
        assert (correlation.amax(1) > 0.95).all()
    with pytest.raises(UserError, match="takes a dense model, this one is factored already"):
        go(f"--run={to}", "--factor=pca", f"--to={tmp_path / 'again'}")


def test_a_flat_embedding_has_no_independent_components():
    pytest.importorskip("sklearn")
    model = random_model("dense", n_embd=8)
    with torch.no_grad():
        model.vocab.weight.pow_(3)[:, 3] = 0
    with pytest.raises(UserError, match="does not fill its 8 dimensions"):
        export.factor(model, "ica")
