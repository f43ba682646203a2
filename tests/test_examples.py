"""examples/: other people's tools on an exported folder see what we see."""

from pathlib import Path

import pytest
import torch

import export
from data.tokenizer import gpt2
from formats.llama import to_halves
from tests.formats_fixtures import export_folder, go, ids, logits, random_model

ROOT = Path(export.__file__).resolve().parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The export of a random factored model."""
    return export_folder(tmp_path_factory.mktemp("folder"))


def test_transformer_lens(folder, capsys):
    """Logits, and every hook that examples/lens.py maps to one of our modules."""
    pytest.importorskip("transformer_lens")
    from examples import lens

    model = random_model("factored")
    bridge, x, seen = lens.open_bridge(folder), ids(model)[:, :64], {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
    found, cache = bridge.run_with_cache(x)
    torch.testing.assert_close(found, logits(model, x), rtol=0, atol=1e-4)
    for ours, hook in lens.HOOKS.items():
        for i in range(2):
            value = seen[ours.format(i=i)].flatten(0, 1)  # (B T, width)
            if ours.endswith((".q", ".k")):
                value = to_halves(value.T, model.config.head_dim).T
            theirs = cache[hook.format(i=i)].reshape(value.shape)
            torch.testing.assert_close(theirs, value, rtol=0, atol=1e-4, msg=f"{ours} and {hook}")
    go(f"--export={folder}", f"--run={folder.parent / 'run'}", main=lens.main)
    assert "largest difference" in capsys.readouterr().out


def test_dictionary(folder, capsys):
    """Shapes of an SAE; the code of a token's embedding is its recipe; a decoded code lies in the span."""
    from examples import sae

    model = random_model("factored")
    dictionary, recipes = sae.open_dictionary(folder)
    assert dictionary.W_dec.shape == (24, 32) and dictionary.W_enc.shape == (32, 24)
    torch.testing.assert_close(dictionary.encode(model.vocab.matrix()), recipes, rtol=0, atol=1e-4)
    x = torch.randn(5, 3, 32)
    assert dictionary.encode(x).shape == (5, 3, 24)
    residue = (x - dictionary(x)) @ dictionary.W_dec.T  # least squares: orthogonal to every signal
    torch.testing.assert_close(residue, torch.zeros(5, 3, 24), rtol=0, atol=1e-4)
    go(f"--export={folder}", main=sae.main)
    assert "after block  1" in capsys.readouterr().out


def test_lm_eval(folder, monkeypatch):
    """The task of the repository gives our own scorer's log-likelihoods, pair by pair, and its accuracy."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from examples import minimal_pairs

    monkeypatch.chdir(ROOT)
    out = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype=float32",
        tasks=["minimal_pairs"],
        task_manager=TaskManager(include_path=str(ROOT / "examples/lm_eval"), include_defaults=False),
        device="cpu",
        batch_size=16,
        log_samples=True,
    )
    samples = sorted(out["samples"]["minimal_pairs"], key=lambda s: s["doc_id"])
    theirs = torch.tensor([[float(r[0]) for r in s["filtered_resps"]] for s in samples])
    ours = torch.tensor(minimal_pairs.score(random_model("factored"), gpt2()))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-3)
    accuracy = (ours[:, 0] > ours[:, 1]).float().mean().item()
    assert out["results"]["minimal_pairs"]["acc,none"] == pytest.approx(accuracy)
