"""README.md of what is exported: one template, filled in by what is true of the model."""

import pytest

import checkpoint
from formats.cards import model_card
from tests.formats_fixtures import random_model, save


def card(tmp_path, kind, form, dtype="fp32", **train_settings):
    model = random_model(kind)
    ckpt = checkpoint.open_run(save(model, tmp_path / "run", **train_settings))
    return model_card(ckpt, model, tmp_path / "nano", form, dtype)


@pytest.mark.parametrize("form", ["llama", "reflow"])
def test_both_say_what_the_model_is(form, tmp_path):
    """What it is, its data, its loss, and the commands."""
    text = card(tmp_path, "factored", form)
    command = f"--form={form} --dtype=fp32"
    for part in ("# nano", "24 signals", "`sotu`", "5.0000 nats", "context 256", "export.py --run=", command):
        assert part in text, part
    assert "rounded" not in text and "rounded" in card(tmp_path, "factored", form, "fp16")
    assert "5 to a token" in card(tmp_path, "topk", form)


def test_each_says_how_it_is_used(tmp_path):
    """Only a Llama folder has the hub's header, and only one with signals explains reflow.safetensors."""
    llama = card(tmp_path, "factored", "llama")
    assert llama.startswith("---\nlibrary_name: transformers") and "pipeline(" in llama
    assert "reflow.safetensors" in llama and "reflow.safetensors" not in card(tmp_path, "dense", "llama")
    release = card(tmp_path, "factored", "reflow")
    assert release.startswith("# nano") and "sample.py --run=" in release and "pipeline(" not in release


def test_an_imported_model_names_its_source(tmp_path):
    assert "Imported from `ckpt.pt`." in card(tmp_path, "dense", "llama", imported_from="ckpt.pt")
