"""A release is a run of one checkpoint without its optimiser."""

import pytest
import torch

import checkpoint
import sample
import train
from configurator import UserError
from tests.formats_fixtures import KINDS, go, random_model, save


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_is_a_run(kind, tmp_path, monkeypatch, capsys):
    """Half the size of the weights alone; sample.py and export.py read it, to the rounding of fp16."""
    model = random_model(kind)
    run, to = save(model, tmp_path / "run"), tmp_path / "release"
    for _ in range(2):  # a release of before is replaced
        go(f"--run={run}", "--form=reflow", "--dtype=fp16", f"--to={to}")
    assert {p.name for p in to.iterdir()} == {"model.safetensors", "state.json", "README.md"}
    size = sum(p.numel() for p in model.parameters()) * 2
    assert size <= (to / "model.safetensors").stat().st_size < size + 10_000
    found, state = checkpoint.load_model(checkpoint.find(to))
    for (name, a), b in zip(found.state_dict().items(), model.state_dict().values(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.half().float()), name
    assert state["val_loss"] == 5.0 and "5.0000 nats" in (to / "README.md").read_text(encoding="utf-8")
    go(f"--run={to}", "--prompt=a", "--max_new_tokens=2", main=sample.main)
    go(f"--run={to}", f"--to={tmp_path / 'hf'}")
    assert (tmp_path / "hf" / "config.json").exists()
    with pytest.raises(UserError, match="one checkpoint, not a run"):  # nothing to resume, nothing to mix
        go(f"--out_dir={to}", "--resume", "--device=cpu", main=train.main)
