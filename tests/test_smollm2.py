"""SmolLM2 as imported computes what transformers' own reader of the same file computes."""

import importlib.util
import math

import pytest
import torch

import checkpoint
from configurator import UserError
from data.sotu.prepare import embedded
from data.tokenizer import kept
from export import validation
from formats.gguf import bundled, read_gguf

WINDOWS, LENGTH = 4, 256  # of the embedded corpus
NEW_TOKENS = 64
RELEASE = checkpoint.RELEASES / "smollm2-signals"


@pytest.fixture(scope="module")
def path():
    try:
        return bundled("smollm2")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def ours(path):
    """(ReFlow, Tokenizer) of the file, in fp32."""
    found = read_gguf(path)
    return checkpoint.build_model(found.config, found.weights, path).eval(), found.tokenizer


@pytest.fixture(scope="module")
def theirs(path):
    """The same file as transformers reads it, in fp32."""
    transformers = pytest.importorskip("transformers")
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("transformers reads GGUF files with the package gguf")
    how = {"gguf_file": path.name, "dtype": torch.float32}
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, **how).eval()


@torch.no_grad()
def test_logits_and_bits_per_byte_are_those_of_transformers(ours, theirs):
    net, tokenizer = ours
    text = validation(embedded(tokenizer), tokenizer, LENGTH, "SmolLM2")
    difference, losses = 0.0, {"ours": [], "theirs": []}
    for x, y in zip(*text.windows(0, WINDOWS), strict=True):
        logits = {"ours": net(x[None])[0][0], "theirs": theirs(x[None]).logits[0]}  # (T, V)
        difference = max(difference, (logits["ours"] - logits["theirs"]).abs().max().item())
        for name, found in logits.items():
            losses[name].append(torch.nn.functional.cross_entropy(found, y).item())
    per_token = text.bytes / text.tokens * math.log(2)
    bits = {name: sum(found) / WINDOWS / per_token for name, found in losses.items()}
    print(f"largest difference of a logit {difference:.1e}; bits per byte {bits}")
    assert difference < 1e-3
    assert f"{bits['ours']:.4f}" == f"{bits['theirs']:.4f}"
    assert 0.9 < bits["ours"] < 1.3  # text it understands


@torch.no_grad()
def test_64_greedy_tokens_are_those_of_transformers(ours, theirs):
    net, tokenizer = ours
    prompt = tokenizer.encode_ordinary("Gravity is")
    (found,) = net.generate([prompt], NEW_TOKENS, temperature=0.0)
    how = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = theirs.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist()
    assert found == expected, tokenizer.decode(found)
    assert "curvature of spacetime" in tokenizer.decode(found)


@torch.no_grad()
def test_the_released_recipes_are_close_to_the_model_and_few():
    """The release of sparse recipes takes its blocks from out/smollm2, which `make smollm2` makes."""
    try:
        base = checkpoint.open_run("out/smollm2")
        found = checkpoint.open_run(RELEASE)
        net, own = base.load_model(), found.load_model()
    except UserError as error:
        pytest.skip(str(error))
    n, tokenizer = net.config.n_tokens, kept(base.path, base.state)
    recipes = own.vocab.recipes()[:n]
    assert (recipes[:, :-1] != 0).sum(1).float().mean() <= 64 and (recipes[:, -1] == 1).all()
    E = own.vocab.matrix()[:n]
    torch.testing.assert_close(recipes @ own.vocab.basis, E, rtol=1e-3, atol=1e-4)
    text = validation(embedded(tokenizer), tokenizer, LENGTH, "SmolLM2")
    kl = []
    for x in text.windows(0, WINDOWS)[0]:
        log_p, log_q = (model(x[None])[0][0, :, :n].log_softmax(-1) for model in (net, own))  # (T, n)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert 0.01 < torch.stack(kl).mean() < 0.5
