"""A release is a run of one checkpoint without its optimiser."""

import json

import pytest
import torch

import checkpoint
import sample
import train
from configurator import UserError
from data.datasets import run_words
from data.shards import Dataset
from formats.release import write_release
from tests.formats_fixtures import KINDS, go, random_model, save, write_corpus


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_is_a_run(kind, tmp_path, monkeypatch, capsys):
    """Half the size of the weights alone; sample.py and export.py read it, to the rounding of fp16."""
    model = random_model(kind)
    run, to = save(model, tmp_path / "run"), tmp_path / "release"
    for _ in range(2):  # a release of before is replaced
        go(f"--run={run}", "--form=reflow", "--dtype=fp16", f"--to={to}")
    assert {p.name for p in to.iterdir()} == {"model.safetensors", "state.json", "README.md"}
    size = sum(p.numel() for p in model.parameters()) * 2
    size += sum(b.numel() for b in model.buffers()) * 2  # places are integers
    assert size <= (to / "model.safetensors").stat().st_size < size + 10_000
    found, state = checkpoint.load_model(checkpoint.find(to))
    for (name, a), b in zip(found.state_dict().items(), model.state_dict().values(), strict=True):
        expected = b.half().float() if b.is_floating_point() else b
        assert a.dtype == expected.dtype and torch.equal(a, expected), name
    assert state["val_loss"] == 5.0 and "5.0000 nats" in (to / "README.md").read_text(encoding="utf-8")
    go(f"--run={to}", "--prompt=a", "--max_new_tokens=2", main=sample.main)
    go(f"--run={to}", f"--to={tmp_path / 'hf'}")
    assert (tmp_path / "hf" / "config.json").exists()
    with pytest.raises(UserError, match="one checkpoint, not a run"):  # nothing to resume, nothing to mix
        go(f"--out_dir={to}", "--resume", "--device=cpu", main=train.main)


def test_a_release_brings_its_counts(tmp_path):
    """Words are still known by what the model was trained on where the training text is gone."""
    data = write_corpus(tmp_path / "data")
    run = save(random_model("factored", block_size=16), tmp_path / "run", dataset=str(data))
    path = run / "step_000000" / "state.json"
    sha = {"data_sha256": Dataset(data, "val", 1).data_sha256}
    path.write_text(json.dumps(json.loads(path.read_text()) | sha))
    ckpt = checkpoint.open_run(run)
    expected = run_words(ckpt.path, ckpt.state).counts
    write_release(ckpt, tmp_path / "release", "fp16")
    data.rename(tmp_path / "elsewhere")
    write_release(checkpoint.open_run(tmp_path / "release"), tmp_path / "again", "fp16")  # it keeps them
    for folder in ("release", "again"):
        released = checkpoint.open_run(tmp_path / folder)
        found = run_words(released.path, released.state).counts
        assert found.sum() > 1000 and (found == expected).all(), folder


def test_a_release_with_a_base_has_only_what_is_its_own(tmp_path, monkeypatch):
    """The blocks come from the run that has them; an error says what to do if it is not there."""
    monkeypatch.chdir(tmp_path)
    dense, own = random_model("dense"), random_model("sparse", seed=1)
    for part in ("blocks", "norm"):
        getattr(own, part).load_state_dict(getattr(dense, part).state_dict())
    base = save(dense, tmp_path / "out" / "base", imported_from="smollm2: some/file.gguf")
    run, to = save(own, tmp_path / "run"), tmp_path / "release"
    path = run / "step_000000" / "state.json"
    chat = {"chat_template": "{{ messages }}", "end_of_turn": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | chat))
    go(f"--run={run}", "--form=reflow", "--dtype=fp16", f"--base={base}", f"--to={to}")
    assert chat.items() <= checkpoint.read_state(to).items()
    written = checkpoint.load_tensors(to / "model.safetensors")
    assert set(written) == {name for name in own.state_dict() if name.startswith("vocab.")}
    found, _ = checkpoint.load_model(checkpoint.find(to), verified=True)
    for name, weight in own.state_dict().items():
        ours = name.startswith("vocab.") and weight.is_floating_point()
        assert torch.equal(found.state_dict()[name], weight.half().float() if ours else weight), name
    assert not (to / "counts.safetensors").exists(), "the training text of an imported model is not known"
    go(f"--run={to}", "--prompt=a", "--max_new_tokens=2", main=sample.main)
    assert "--from=smollm2 --to=out/base" in (to / "README.md").read_text(encoding="utf-8")

    path = base / "step_000000" / "state.json"
    state = json.loads(path.read_text())
    state["config"]["train"]["imported_from"] = "another"
    path.write_text(json.dumps(state | {"sha256": {"model.safetensors": "0"}}))
    with pytest.raises(UserError, match="made with another out/base"):
        checkpoint.load_model(checkpoint.find(to))
    base.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="python export.py --from=smollm2 --to=out/base"):
        checkpoint.load_model(checkpoint.find(to))
    other = save(random_model("dense", seed=5), tmp_path / "other")
    with pytest.raises(UserError, match="no weight in common"):
        go(f"--run={run}", "--form=reflow", f"--base={other}", f"--to={tmp_path / 'no'}")
