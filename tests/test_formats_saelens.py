"""Signals as dictionaries of SAELens: what they encode and decode; loaded by SAELens itself where it is."""

import json

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
from configurator import UserError
from tests.formats_fixtures import go, ids, logits, random_model, save


@pytest.fixture(scope="module", params=["factored", "wide", "topk", "sparse"])
def exported(request, tmp_path_factory):
    """(model, folder of its dictionaries); written twice, so that the second replaces the first."""
    home = tmp_path_factory.mktemp(request.param)
    model = random_model(request.param)
    run = save(model, home / "run")
    for _ in range(2):
        go(f"--run={run}", "--form=saelens", f"--to={home / 'sae'}")
    return model, home / "sae"


def read(folder):
    """(encode, decode) of a dictionary by its files alone: linear, as its configuration says."""
    w = load_file(folder / "sae_weights.safetensors")
    c = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    S, d = w["W_dec"].shape
    assert (c["architecture"], c["k"], c["d_sae"], c["d_in"]) == ("abstopk", S, S, d)
    assert w["W_enc"].shape == (d, S) and not w["b_enc"].any() and not w["b_dec"].any()
    return lambda x: x @ w["W_enc"], lambda codes: codes @ w["W_dec"]


def by_saelens(folder):
    """The same by SAELens."""
    SAE = pytest.importorskip("sae_lens").SAE
    sae = SAE.load_from_disk(folder)
    return sae.encode, sae.decode


@pytest.mark.parametrize("reader", [read, by_saelens])
@torch.no_grad()
def test_logits_are_codes_times_recipes_and_streams_come_back(exported, reader):
    """reading sees the state before the gain of the final norm. Where signals are fewer than dimensions,
    writing gives back what lies in their span."""
    model, folder = exported
    codes = load_file(folder / "recipes.safetensors")["codes"]
    idx = ids(model)[:, :32]
    h = model.encode(idx)
    encode, _ = reader(folder / "reading")
    found = encode(h / model.norm.weight) @ codes.T
    expected = logits(model, idx)[..., : len(codes)]
    if model.config.vocab == "sparse":  # the core and the shared row are no signals
        d, S = model.vocab, model.config.n_signal
        expected = expected - h @ (d.core @ d.basis[S:-1] + d.basis[-1])[: len(codes)].T
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    encode, decode = reader(folder / "writing")
    x = torch.randn(8, model.config.n_embd)
    once = decode(encode(x))
    torch.testing.assert_close(decode(encode(once)), once, rtol=1e-3, atol=1e-4)
    if model.config.signals >= model.config.n_embd:
        torch.testing.assert_close(once, x, rtol=1e-3, atol=1e-3)


def test_a_plain_gpt_has_no_dictionary(tmp_path):
    run = save(random_model("dense"), tmp_path / "run")
    with pytest.raises(UserError, match="has no signals"):
        go(f"--run={run}", "--form=saelens", f"--to={tmp_path / 'sae'}")
    with pytest.raises(UserError, match="writes fp32"):
        go(f"--run={run}", "--form=saelens", "--dtype=fp16", f"--to={tmp_path / 'sae'}")
    assert checkpoint.find(run)
