"""Checkpoints of the reference system, imitated: names and conventions of many kinds are read right."""

import pickle

import pytest
import torch

import checkpoint
from configurator import UserError
from formats.reference import open_reference, read_reference
from model import ModelConfig, ReFlow
from tests.formats_fixtures import ids, logits, loss, reference, trained_model


def read(tmp_path, weights, prefix="", **outer):
    """The model that the importer makes of these weights in a torch file."""
    weights = {prefix + name: weight for name, weight in weights.items()}
    torch.save({"model": weights, "iter_num": 9, "optimizer": {"state": {}}} | outer, tmp_path / "ckpt.pt")
    return checkpoint.build_model(*read_reference(tmp_path / "ckpt.pt", loss))


AMBIGUITIES = {
    "as published, as far as known": {},
    "basis transposed": {"basis": "d x S"},
    "gate and up exchanged": {"mlp": ("w3", "w2", "w1")},
    "halves": {"halves": True},
    "unfused": {"attn": ("wq", "wk", "wv", "wo")},
    "unfused, unnamed": {"attn": "bdca", "mlp": ("gate", "down", "up")},
    "norms unnamed": {"norms": ("b", "a")},
    "all at once": {"basis": "d x S", "mlp": ("c", "a", "b"), "halves": True, "norms": ("y", "x")},
}


@pytest.mark.parametrize("case", AMBIGUITIES)
def test_ambiguities_are_resolved(case, tmp_path, capsys):
    """The one reading that computes what the original did is found, and every decision is printed."""
    model = trained_model("factored")
    settings = {"n_head": 2, "block_size": 256}
    if case != "as published, as far as known":
        settings["model_config"] = "reflow"
    found = read(tmp_path, reference(model, **AMBIGUITIES[case]), model_args=settings)
    assert torch.equal(logits(found, ids(model)), logits(model, ids(model)))
    out = capsys.readouterr().out
    questions = open_reference(tmp_path / "ckpt.pt").readings()[0]
    assert all(f"{question}: " in out for question in questions) and "TOO CLOSE" not in out


@pytest.mark.parametrize("kind", ["topk", "dense", "gqa"])
@pytest.mark.parametrize("attn", ["fused", ("wq", "wk", "wv", "wo")])
def test_every_kind_of_reference(kind, attn, tmp_path):
    """Also through torch.compile's prefix, with a rotary table in place of the number of heads."""
    model = trained_model(kind)
    c = model.config
    weights = reference(model, attn)
    if kind == "dense":
        weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    weights["freqs_cis"] = torch.zeros(256, c.head_dim // 2, 2)
    more = {"config": {"top_k": 12}} if kind == "topk" else {}
    found = read(tmp_path, weights, "_orig_mod.", **more)
    assert (found.config.vocab, found.config.kv_heads) == (c.vocab, c.kv_heads)
    assert torch.equal(logits(found, ids(model)), logits(model, ids(model)))


def test_heads_are_tried(tmp_path, capsys):
    found = read(tmp_path, reference(trained_model("factored")))
    assert found.config.n_head == 2 and "heads: 2 (loss" in capsys.readouterr().out


def test_what_cannot_be_told_is_said(tmp_path, capsys):
    """An untrained model has no loss to tell by."""
    torch.manual_seed(0)
    model = ReFlow(ModelConfig(block_size=64, n_layer=1, n_head=2, n_embd=64, n_hidden=96, vocab_size=128))
    read(tmp_path, reference(model), model_args={"n_head": 2})
    assert "TOO CLOSE to be sure" in capsys.readouterr().out


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"transformer.h.0.attn.c_attn.bias": torch.zeros(3)}, "no biases"),
        ({"transformer.wpe.weight": torch.zeros(4, 64)}, "no position embedding"),
        ({"transformer.h.0.extra.weight": torch.zeros(64, 64)}, "differ in their weights"),
        ({"transformer.other.weight": torch.zeros(64, 64)}, "has no place"),
        ({"transformer.ln_f.weight": None}, "is no reference checkpoint"),
        (
            {f"transformer.h.{i}.mlp.w1.weight": None for i in (0, 1)},
            "for norm1, .* is wanted, found",
        ),
        ({"transformer.wte.signal_basis": torch.zeros(7, 64)}, "does not fit 64 signals"),
        ({"transformer.wte.signal_basis": None}, "not vocab_to_signals and a basis"),
    ],
)
def test_unreadable_references_are_named(change, match, tmp_path):
    weights = reference(trained_model("factored")) | change
    weights = {name: w for name, w in weights.items() if w is not None}
    with pytest.raises(UserError, match=match) as error:
        read(tmp_path, weights)
    assert "\n" not in str(error.value)


def test_nothing_is_executed(tmp_path, capsys):
    torch.save({"model": {}, "config": Malicious()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="holds more than tensors"):
        open_reference(tmp_path / "evil.pt")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Malicious()))
    (tmp_path / "text.pt").write_text("hello")
    for name in ("raw.pkl", "text.pt", "missing.pt"):
        with pytest.raises(UserError, match=name):
            open_reference(tmp_path / name)
    assert "executed" not in capsys.readouterr().out
