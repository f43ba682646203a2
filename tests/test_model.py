"""The model contract: vocabularies, chunked loss, backbone, generation, cost. CPU, seconds; own oracles."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from configurator import UserError
from hardware import flops_per_token, parameter_table, pick_device, pick_dtype
from model import (
    IGNORE,
    N_TOKENS,
    CausalAttention,
    DenseVocab,
    ModelConfig,
    ReFlow,
    linear,
    packed,
    rope_table,
    sample_token,
)

TINY = {"block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 16, "n_hidden": 24, "vocab_size": 61}
KINDS = {
    "factored": {"n_signal": 12},
    "topk": {"vocab": "topk", "n_signal": 12, "top_k": 5},
    "sparse": {"vocab": "sparse", "n_signal": 20, "n_nonzero": 3, "n_core": 2},
    "gains": {"vocab": "gains", "n_signal": 12},
    "layered": {"vocab": "gains", "n_signal": 12, "reinject": True},
    "dense": {"vocab": "dense"},
    "grouped": {"n_kv_head": 2},
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
CORELESS = KINDS["sparse"] | {"n_core": 0}


def build(gain=1.0, **fields):
    """A tiny float64 model whose blocks do something, the more the larger `gain`: as it starts in training,
    it would only repeat its input."""
    torch.manual_seed(0)
    model = ReFlow(ModelConfig(**{**TINY, **fields})).double().eval()
    with torch.no_grad():
        for name, w in model.named_parameters():
            if w.dim() == 1:
                w.normal_(1, 0.2)
            else:
                w.normal_(std=(gain if "blocks" in name else 1.0) * max(w.size(1), 1) ** -0.5)
    if model.config.vocab == "sparse":  # some rows have one entry more or less than others, one has none
        count = model.vocab.count
        count[:6] += torch.tensor([1, -1, 1, -1, 3, -3], dtype=count.dtype)
        rows = [torch.randperm(20)[:n].sort().values for n in count.tolist()]
        model.vocab.column.copy_(torch.cat(rows))
    return model


def batch(model, B=3, T=8, seed=1):
    """Random token ids and targets, each (B, T)."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.rows, (2, B, T), generator=rng).unbind()


def gradients(model, loss):
    """A gradient for each parameter, by name; those held by the model are left as they were."""
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


def error(a, b):
    """Relative distance of a from the truth b, in norm."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# --- the vocabulary ---


def codes_by_mask(model):
    """The recipes by the contract: a topk recipe keeps those of its k largest entries that are positive."""
    recipe = model.vocab.recipe
    if model.config.vocab in ("factored", "gains"):
        return recipe
    larger = (recipe.unsqueeze(1) > recipe.unsqueeze(2)).sum(
        2
    )  # (V, S): how many of a row's entries beat this one
    return recipe * ((larger < model.config.top_k) & (recipe > 0))


def tables(model):
    """(E at the input, [E before each block], E at the output) by the contract, by plain autograd."""
    vocab, c = model.vocab, model.config
    if c.vocab == "sparse":
        S, entries, at = c.n_signal, vocab.value.split(vocab.count.tolist()), vocab.column
        rows = []
        for values, places in zip(entries, at.split(vocab.count.tolist()), strict=True):
            rows.append(torch.zeros(S).double().index_put((places.long(),), values))
        E = torch.stack(rows) @ vocab.basis[:S] + vocab.core @ vocab.basis[S:-1] + vocab.basis[-1]
        return E, [], E
    E = codes_by_mask(model) @ vocab.basis
    if c.vocab != "gains":
        return E, [], E
    first, *others = [(vocab.recipe * gain) @ vocab.basis for gain in vocab.gain]
    return first, others, E


def loss_with_built_matrix(model, idx, targets):
    """The loss with E built and used on both sides, by plain autograd; only the blocks are the model's."""
    E_in, injected, E = tables(model)
    c = model.config
    cos, sin = rope_table(c.block_size, c.head_dim, c.rope_base, idx.device)
    x = F.embedding(idx, E_in)
    for i, block in enumerate(model.blocks):
        x = x + F.embedding(idx, injected[i]) if injected else x
        x = block(x, cos[: idx.size(1)], sin[: idx.size(1)])
    return F.cross_entropy((model.norm(x) @ E.T).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("kind", ["factored", "topk", "sparse", "gains", "layered"])
def test_every_vocabulary_is_the_same_mathematics_as_building_E(kind):
    """Loss and every gradient agree with a model that builds E each step; over chunks, the last one short."""
    model = build(**KINDS[kind])
    model.vocab.chunk = 7
    idx, targets = batch(model)
    truth = loss_with_built_matrix(model, idx, targets)
    loss = model(idx, targets)[1]
    assert loss.item() == pytest.approx(truth.item(), rel=1e-10)
    expected = gradients(model, truth)
    for name, grad in gradients(model, loss).items():
        assert error(grad, expected[name]) < 1e-10, name


@pytest.mark.parametrize("kind", [*KINDS.values(), CORELESS], ids=[*KINDS, "coreless"])
def test_a_logit_is_the_sum_over_its_signals(kind):
    """logit[v] = sum_s A[s] * recipe[v, s] at every position, and the interface agrees with itself."""
    model = build(**kind).float()
    idx, _ = batch(model)
    h = model.encode(idx)
    A, codes = model.vocab.signals(h), model.vocab.recipes()
    logits = model(idx)[0]
    summed = (A.unsqueeze(-2) * codes).sum(-1)  # (B, T, V)
    torch.testing.assert_close(logits, summed, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits, h @ model.vocab.matrix().T, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.vocab.embed(idx), model.vocab.input_matrix()[idx], rtol=0, atol=1e-5)


def test_topk_recipes_are_sparse_and_positive():
    """Recipes equal the mask by rank; some rows have fewer positive entries than k."""
    model = build(**KINDS["topk"])
    kept = model.vocab.recipes()
    assert torch.equal(kept, codes_by_mask(model))
    assert set((kept != 0).sum(1).tolist()) >= {3, 4, 5}


def test_sparse_recipes_have_their_entries_where_they_were_put():
    """As many as the budget has; the places are fixed in training, the core and the mean are columns beside
    them. Other places, loaded in the same tensors, are noticed."""
    torch.manual_seed(0)
    model = ReFlow(ModelConfig(**TINY, **KINDS["sparse"]))
    before = model.vocab.recipes()
    assert before.shape == (61, 20 + 2 + 1) and (before[:, -1] == 1).all()
    assert ((before[:, :20] != 0).sum(1) == 3).all()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(*batch(model))[1].backward()
    optimizer.step()
    after = model.vocab.recipes()
    assert torch.equal(before[:, :20] != 0, after[:, :20] != 0) and not torch.equal(before, after)
    other = ReFlow(ModelConfig(**TINY, **KINDS["sparse"]))
    assert not torch.equal(other.vocab.matrix(), model.vocab.matrix())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.vocab.matrix(), model.vocab.matrix())


def test_gains_start_around_one_with_a_spread():
    """At the input log-normal, before the blocks around zero: the stream starts as a factored one's."""
    torch.manual_seed(0)
    model = ReFlow(
        ModelConfig(**{**TINY, "n_embd": 400, "n_signal": 2000, "vocab": "gains", "reinject": True})
    )
    first, *others = model.vocab.gain
    assert abs(first.log().mean()) < 0.05 and first.log().std().item() == pytest.approx(0.7, rel=0.05)
    assert len(others) == 2
    for gain in others:
        assert abs(gain.mean()) < 0.01 and gain.std().item() == pytest.approx(0.1, rel=0.05)


def test_rotating_the_signals_changes_a_model_with_gains():
    """The function fixes the axes: recipe R and R' basis are another one, but signals in another order,
    with their gains, are the same."""
    model = build(**KINDS["gains"])
    idx, _ = batch(model)
    before = model(idx)[0]
    vocab, order, R = model.vocab, torch.randperm(12), torch.linalg.qr(torch.randn(12, 12).double())[0]
    with torch.no_grad():
        for p in (vocab.recipe.T, vocab.basis, vocab.gain[0]):
            p.copy_(p[order].clone())
    torch.testing.assert_close(model(idx)[0], before, rtol=0, atol=1e-10)
    with torch.no_grad():
        vocab.recipe.copy_(vocab.recipe @ R)
        vocab.basis.copy_(R.T @ vocab.basis)
    assert error(model(idx)[0], before) > 0.01


def test_rotating_the_signals_leaves_the_logits():
    """recipe R and R' basis are the same model, for any orthogonal R: signals are a choice of gauge."""
    model = build(**KINDS["factored"]).float()
    idx, _ = batch(model)
    before = model(idx)[0]
    R = torch.linalg.qr(torch.randn(12, 12))[0]
    with torch.no_grad():
        model.vocab.recipe.copy_(model.vocab.recipe @ R)
        model.vocab.basis.copy_(R.T @ model.vocab.basis)
    torch.testing.assert_close(model(idx)[0], before, rtol=0, atol=1e-4)


# --- the chunked loss ---


def problem(N=50, V=96, S=16, scale=1.0, dtype=torch.float32):
    """z (N, S) in `dtype`, codes (V, S) in fp32 or fp64, targets (N,); the first two want gradients."""
    torch.manual_seed(0)
    z = (scale * torch.randn(N, S)).to(dtype).requires_grad_()
    codes = nn.Parameter(torch.randn(V, S, dtype=torch.promote_types(dtype, torch.float32)))
    return z, codes, torch.randint(V, (N,))


def chunked(z, codes, targets, chunk=7, grad_scale=1.0):
    """The model's loss for the logits z @ codes.T: a dense vocabulary's signals are its input."""
    vocab = DenseVocab(ModelConfig(1, 1, 1, codes.size(1), vocab_size=len(codes), vocab="dense"))
    vocab.weight, vocab.chunk = codes, chunk
    return vocab.loss(z, targets, grad_scale)


def full(z, codes, targets):
    """The same by torch, from all logits at once, in z's precision as under autocast."""
    logits = z @ codes.to(z.dtype).T
    exact = torch.promote_types(z.dtype, torch.float32)
    return F.cross_entropy(logits.to(exact), targets, ignore_index=IGNORE)


def true_gradients(z, codes, targets):
    z, codes = (x.detach().double().requires_grad_() for x in (z, codes))
    return torch.autograd.grad(full(z, codes, targets), (z, codes))


@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_chunks_do_not_change_the_loss(chunk):
    """Chunks of 1, not dividing N, of N and larger: torch's loss and gradients; no_grad gives that loss."""
    z, codes, targets = problem()
    loss = chunked(z, codes, targets, chunk)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(full(z, codes, targets).item(), rel=1e-6)
    for grad, truth in zip(
        torch.autograd.grad(loss, (z, codes)), true_gradients(z, codes, targets), strict=True
    ):
        assert error(grad, truth) < 1e-6
    with torch.no_grad():
        assert chunked(z, codes, targets, chunk).equal(loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients_are_as_good_as_unchunked(dtype):
    """At loss scale 65536, against float64: at most 1.5 times the error of the plain half-precision path."""
    z, codes, targets = problem(N=300, V=512, scale=0.5, dtype=dtype)
    truth, scale = true_gradients(z, codes, targets), 65536.0
    ours = torch.autograd.grad(scale * chunked(z, codes, targets, 4, scale), (z, codes))
    plain = torch.autograd.grad(scale * full(z, codes, targets), (z, codes))
    for a, b, t in zip(ours, plain, truth, strict=True):
        assert error(a / scale, t) <= 1.5 * error(b / scale, t) < 0.02


@pytest.mark.parametrize(
    ("grad_scale", "upstream"), [(1.0, 1.0), (8.0, 8.0), (1.0, 3.0), (65536.0, 0.1), (2.0, 0.0)]
)
def test_grad_scale_is_only_a_hint(grad_scale, upstream):
    """Whatever scale the gradient was formed at, it is exact for the upstream gradient that comes."""
    z, codes, targets = problem()
    grads = torch.autograd.grad(upstream * chunked(z, codes, targets, grad_scale=grad_scale), (z, codes))
    for grad, truth in zip(grads, true_gradients(z, codes, targets), strict=True):
        if upstream:
            assert error(grad, upstream * truth) < 1e-6
        else:
            assert not grad.any()


def test_ignored_targets_count_for_nothing():
    """Chunks with some, and with only ignored targets: torch's loss and gradients, none for those rows."""
    z, codes, targets = problem()
    targets[[0, 3, 20, 49]] = IGNORE
    targets[7:14] = IGNORE
    loss = chunked(z, codes, targets, chunk=7)
    assert loss.item() == pytest.approx(full(z, codes, targets).item(), rel=1e-6)
    grads = torch.autograd.grad(loss, (z, codes))
    for grad, truth in zip(grads, true_gradients(z, codes, targets), strict=True):
        assert error(grad, truth) < 1e-6
    assert not grads[0][targets == IGNORE].any()


def test_nothing_but_ignored_targets_is_no_loss():
    """Zero loss and zero gradients, where torch's mean over nothing is nan."""
    z, codes, targets = problem()
    loss = chunked(z, codes, targets.fill_(IGNORE))
    assert loss.item() == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (z, codes)))


def test_extreme_logits_give_the_exact_loss():
    """Logits beyond 1e4, targets whose probability underflows: still torch's finite loss and gradients."""
    torch.manual_seed(0)
    z = 100.0 * torch.eye(6)
    z = torch.cat([z, -z, 0 * z]).requires_grad_()
    codes = nn.Parameter(100.0 * torch.randint(-3, 4, (11, 6)))  # integers: every logit is exact
    targets = (z @ codes.T).argmin(1)
    loss = chunked(z, codes, targets, chunk=4)
    assert 1e4 < loss.item() == pytest.approx(full(z.double(), codes.double(), targets).item(), rel=1e-6)
    for grad, truth in zip(
        torch.autograd.grad(loss, (z, codes)), true_gradients(z, codes, targets), strict=True
    ):
        assert error(grad, truth) < 1e-6


def test_gradients_match_finite_differences():
    """Central differences in float64, entry by entry, of both inputs."""
    z, codes, targets = problem(N=5, V=7, S=4, dtype=torch.float64)
    targets[2] = IGNORE
    grads = torch.autograd.grad(chunked(z, codes, targets, chunk=2), (z, codes))
    for x, grad in zip((z, codes), grads, strict=True):
        flat, numeric, step = x.detach().view(-1), torch.empty(x.numel(), dtype=x.dtype), 1e-5
        for i in range(x.numel()):
            sides = []
            for shift in (step, -2 * step):
                flat[i] += shift
                sides.append(chunked(z, codes, targets, chunk=2).item())
            flat[i] += step
            numeric[i] = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(grad.flatten(), numeric, rtol=1e-7, atol=1e-9)


def test_a_loss_is_differentiated_once():
    """A second backward, and a gradient of the gradient, are errors and not wrong numbers."""
    loss = chunked(*problem())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()
    z, codes, targets = problem()
    grad = torch.autograd.grad(chunked(z, codes, targets).square(), z, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class LargestTensor(TorchDispatchMode):
    """Entries of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize("vocab", ["factored", "topk", "dense"])
def test_the_logits_are_never_all_held(vocab):
    """No tensor of a training step exceeds a chunk's logits or the recipes; all logits are 16 times that."""
    model = build(**{**KINDS[vocab], "vocab_size": 512, "n_signal": None}).float().train()
    model.vocab.chunk = chunk = 16
    idx, targets = batch(model, B=32, T=8)
    with LargestTensor() as largest:
        model(idx, targets)[1].backward()
    assert largest.numel == chunk * 512 == 512 * model.config.n_embd


# --- the loss inside autograd ---


def test_gradients_accumulate_over_backward_calls():
    """Two micro-steps leave the sum of their gradients, as plain losses do; parameter hooks see them."""
    model = build(**KINDS["factored"])
    a, b = batch(model, seed=1), batch(model, seed=2)
    ga, gb = gradients(model, model(*a)[1]), gradients(model, model(*b)[1])
    seen, accumulated = [], []
    model.vocab.recipe.register_hook(lambda grad: seen.append(grad.clone()))
    model.vocab.recipe.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.clone()))
    for inputs in (a, b):
        model(*inputs)[1].backward()
    for name, weight in model.named_parameters():
        assert error(weight.grad, ga[name] + gb[name]) < 1e-12, name
    ra, rb = ga["vocab.recipe"], gb["vocab.recipe"]
    for got, expected in zip(seen + accumulated, (ra, rb, ra, ra + rb), strict=True):
        assert error(got, expected) < 1e-12


@each_kind
def test_every_parameter_gets_a_gradient(kind):
    model = build(**kind)
    for name, grad in gradients(model, model(*batch(model))[1]).items():
        assert grad.isfinite().all() and grad.any(), name


@each_kind
def test_overfits_one_batch(kind):
    """From its own start, AdamW drives the loss on one batch below 0.1."""
    torch.manual_seed(0)
    model = ReFlow(ModelConfig(**{**TINY, **kind, "n_embd": 32, "n_hidden": 64}))
    idx = torch.randperm(60).view(4, 15)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for _ in range(150):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        if loss < 0.1:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"loss {loss.item():.3f} after 150 steps")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(dropout):
    """Blocks run twice, with the same dropout; loss and gradients are identical to the bit."""
    model = build(dropout=dropout).train()
    calls, results = [], []
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(5)
        loss = model(*batch(model))[1]
        results.append((loss, gradients(model, loss), len(calls)))
    (loss, grads, _), (same_loss, same_grads, _) = results
    assert [n for *_, n in results] == [1, 3]
    assert loss.equal(same_loss)
    assert all(grads[name].equal(same_grads[name]) for name in grads)


def test_dropout_acts_in_training_only():
    """Training losses vary with the seed; in eval mode the model is the one without dropout."""
    model, without = build(dropout=0.3), build()
    inputs = batch(model)
    assert model(*inputs)[1].equal(without(*inputs)[1])
    model.train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(*inputs)[1].item())
    assert losses[0] == losses[1] != losses[2]


@each_kind
def test_autocast_keeps_loss_and_gradients_in_fp32(kind):
    """bf16 products, an fp32 residual stream, loss and gradients, and the loss of fp32 to bf16's accuracy."""
    model = build(**kind).float()
    truth = model(*batch(model))[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode(batch(model)[0]).dtype == torch.float32
        assert model(batch(model)[0])[0].dtype == torch.float32
        loss = model(*batch(model))[1]
    assert loss.dtype == torch.float32 and not loss.equal(truth)
    assert loss.item() == pytest.approx(truth.item(), rel=0.02)
    assert all(grad.dtype == torch.float32 for grad in gradients(model, loss).values())


# --- the backbone ---


def reference_logits(model, idx):
    """The whole model again for one sequence idx (T,): complex RoPE, attention head by head."""
    c, w, T = model.config, dict(model.named_parameters()), len(idx)
    E = w["vocab.weight"] if c.vocab == "dense" else w["vocab.recipe"] @ w["vocab.basis"]
    D = c.n_embd // c.n_head
    angles = torch.arange(T).double()[:, None] * c.rope_base ** (-2 * torch.arange(D // 2).double() / D)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)  # the contract: angles to fp32
    causal = torch.ones(T, T).tril().bool()

    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * gain

    def turned(x):  # (T, D)
        return torch.view_as_real(torch.view_as_complex(x.reshape(T, D // 2, 2)) * turn).reshape(T, D)

    x = E[idx]
    for i in range(c.n_layer):
        p = {name.removeprefix(f"blocks.{i}."): weight for name, weight in w.items()}
        h = norm(x, p["norm1.weight"])
        heads = []
        for head in range(c.n_head):
            at, kv = head * D, head * c.n_kv_head // c.n_head * D
            q = turned(h @ p["attn.q.weight"][at : at + D].T)
            k = turned(h @ p["attn.k.weight"][kv : kv + D].T)
            v = h @ p["attn.v.weight"][kv : kv + D].T
            scores = (q @ k.T / math.sqrt(D)).masked_fill(~causal, -math.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ p["attn.o.weight"].T
        h = norm(x, p["norm2.weight"])
        gate = h @ p["mlp.gate.weight"].T
        x = x + (gate * gate.sigmoid() * (h @ p["mlp.up.weight"].T)) @ p["mlp.down.weight"].T
    return norm(x, w["norm.weight"]) @ E.T


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("vocab", ["dense", "factored"])
def test_logits_equal_an_independent_implementation(vocab, n_kv_head):
    model = build(**KINDS[vocab], n_kv_head=n_kv_head, norm_eps=1e-3, rope_base=100.0)
    idx, _ = batch(model, T=16)
    expected = torch.stack([reference_logits(model, row) for row in idx])
    torch.testing.assert_close(model(idx)[0], expected, rtol=0, atol=1e-8)


def attention_and_gradients(f, q, k, v, upstream):
    """[output, gradients of q, k and v] of an attention f(q, k, v)."""
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    y = f(q, k, v)
    y.backward(upstream.to(y))
    return [y.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_attention_in_blocks_equals_the_whole_in_fp64(length, dtype, tolerance):
    """Forward and backward, for lengths that fill the blocks of queries and lengths that do not."""
    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(2, 3, length, 8).to(dtype) for _ in range(4))

    def whole(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    exact = attention_and_gradients(whole, *(t.double() for t in (q, k, v, upstream)))
    for found, expected in zip(
        attention_and_gradients(CausalAttention.apply, q, k, v, upstream), exact, strict=True
    ):
        assert found.dtype == dtype
        assert (found.double() - expected).norm() <= tolerance * (expected.norm() + 0.1 * upstream.norm())


@each_kind
def test_a_token_never_sees_later_ones(kind):
    """Changing token 5 changes the logits from there on and none before."""
    model = build(**kind)
    idx, _ = batch(model)
    changed = idx.clone()
    changed[:, 5] = (idx[:, 5] + 1) % 61
    moved = (model(changed)[0] - model(idx)[0]).abs().amax(-1)  # (B, T)
    assert moved[:, :5].max() < 1e-12 < 1e-6 < moved[:, 5:].min()


def test_more_tokens_than_the_context_are_refused():
    model = build()
    with pytest.raises(ValueError, match="17 tokens are more than block_size=16"):
        model.encode(torch.zeros(1, 17, dtype=torch.long))


def test_module_names_are_stable():
    """Every documented module runs once a forward pass under a plain hook, and gives the documented width."""
    model, shapes = build(n_kv_head=2), {}
    d, kv = 16, 8
    block = {
        "": d,
        ".norm1": d,
        ".norm2": d,
        ".attn.q": d,
        ".attn.k": kv,
        ".attn.v": kv,
        ".attn": d,
        ".mlp": d,
    }
    widths = {f"blocks.{i}{name}": width for i in (0, 1) for name, width in block.items()} | {"norm": d}
    for name in widths:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: shapes.setdefault(name, []).append(tuple(out.shape))
        )
    model(batch(model)[0])
    assert shapes == {name: [(3, 8, width)] for name, width in widths.items()}


def test_weights_start_as_documented():
    """Orthonormal basis, normal recipes, residual projections smaller by sqrt(2 n_layer), gains of one."""
    torch.manual_seed(0)
    model = ReFlow(ModelConfig(16, 8, 4, 64, vocab_size=500, recipe_init_std=0.3))
    torch.testing.assert_close(model.vocab.basis @ model.vocab.basis.T, torch.eye(64), rtol=0, atol=1e-5)
    assert model.vocab.recipe.std().item() == pytest.approx(0.3, rel=0.05)
    for name, weight in model.blocks.named_parameters():
        expected = 0.02 / 4 if name.endswith(("o.weight", "down.weight")) else 0.02
        if "norm" in name:
            assert (weight == 1).all(), name
        else:
            assert weight.std().item() == pytest.approx(expected, rel=0.05), name


# --- generation ---

PROMPTS = [[3], [5, 1, 4, 1, 5, 9, 2], [2] * 16, list(range(20)), list(range(40, 20, -1)) * 2]


def greedy(model, prompt, steps):
    """Greedy decoding by whole forward passes; a full context loses its first half."""
    context, out = list(prompt), []
    for _ in range(steps):
        while len(context) > model.config.block_size:
            context = context[model.config.block_size // 2 :]
        out.append(model(torch.tensor([context]))[0][0, -1].argmax().item())
        context.append(out[-1])
    return out


@each_kind
def test_generation_equals_whole_forward_passes(kind):
    """Cached and uncached, ragged and one by one, far past an odd block_size: the same greedy tokens."""
    model = build(gain=4, block_size=13, **kind)
    expected = [greedy(model, prompt, 40) for prompt in PROMPTS]
    assert min(len(set(row)) for row in expected) >= 5  # not a loop
    assert model.generate(PROMPTS, 40, temperature=0) == expected
    assert model.generate(PROMPTS, 40, temperature=0, use_cache=False) == expected
    assert [model.generate([prompt], 40, temperature=0)[0] for prompt in PROMPTS] == expected


def test_the_cache_saves_work():
    """After the prompts one token a row is encoded at a step, but for the one where a window moves."""
    model, widths = build(), []
    model.norm.register_forward_hook(lambda module, args, out: widths.append(out.size(1)))
    model.generate([[1, 2, 3], [4]], 16, temperature=0)
    assert widths == [3] + 13 * [1] + [15, 1]  # row 0 has 17 tokens at step 14; row 1 then has 15


def test_stop_ends_a_row():
    """A row ends at its first stop token, which is left out; the stream then gives None, ends with all."""
    model = build(gain=4)
    whole = model.generate(PROMPTS, 30, temperature=0)
    stop = whole[1][4]
    ends = [row.index(stop) if stop in row else 30 for row in whole]
    assert min(ends) < max(ends) == 30
    assert model.generate(PROMPTS, 30, temperature=0, stop=stop) == [
        row[:end] for row, end in zip(whole, ends, strict=True)
    ]
    steps = list(model.stream(PROMPTS, 30, temperature=0, stop=stop))
    for i, (row, end) in enumerate(zip(whole, ends, strict=True)):
        assert [step[i] for step in steps] == (row[: end + 1] + [None] * 30)[:30]
    assert len(list(model.stream(PROMPTS[1:2], 30, temperature=0, stop=stop))) == ends[1] + 1


def test_padding_rows_are_never_sampled():
    """Rows from 50257 on, made by far the likeliest, come out neither greedily nor at random."""
    model = build(vocab_size=50304, n_embd=8, n_head=2, n_hidden=8, n_layer=1)
    with torch.no_grad():
        model.vocab.recipe[N_TOKENS:] *= 1000
    assert model.config.n_tokens == N_TOKENS
    assert (model(torch.arange(5).unsqueeze(1))[0].argmax(-1) >= N_TOKENS).all()
    for how in ({"temperature": 0}, {}, {"top_k": 100}, {"top_p": 0.9}):
        rows = model.generate([[i] for i in range(5)], 10, generator=torch.Generator().manual_seed(0), **how)
        assert max(map(max, rows)) < N_TOKENS


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}], ids=str)
def test_narrow_sampling_is_greedy(how):
    model = build(gain=4)
    assert model.generate(PROMPTS, 20, **how) == model.generate(PROMPTS, 20, temperature=0)


def test_a_seed_fixes_the_sample():
    """The same generator seed gives the same tokens, cached or not; another seed gives others."""
    model = build(gain=4)
    first, again, uncached, other = (
        model.generate(PROMPTS, 20, use_cache=cache, generator=torch.Generator().manual_seed(seed))
        for seed, cache in ((1, True), (1, True), (1, False), (2, True))
    )
    assert first == again == uncached != other


@pytest.mark.parametrize(
    ("how", "weights"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25, 0.09, 0.0225, 0.0025]),
        ({"temperature": 2.0}, [0.5**0.5, 0.3**0.5, 0.15**0.5, 0.05**0.5]),
        ({"top_k": 2}, [0.5, 0.3, 0, 0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.6}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.9}, [0.5, 0.3, 0.15, 0]),
        ({"top_k": 3, "top_p": 0.6, "temperature": 2.0}, [0.5**0.5, 0.3**0.5, 0, 0]),
    ],
    ids=str,
)
def test_samples_follow_the_distribution(how, weights):
    """Frequencies over 20,000 draws lie within 4.5 binomial standard deviations; what is cut never comes."""
    order, n = torch.tensor([2, 0, 3, 1]), 20_000
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[order] + 7  # in no order, and unnormalised
    tokens = sample_token(logits.expand(n, 4), generator=torch.Generator().manual_seed(0), **how)
    p = torch.tensor(weights)[order] / sum(weights)
    counts = tokens.bincount(minlength=4)
    assert ((counts - n * p).abs() <= 4.5 * (n * p * (1 - p)).sqrt()).all(), counts / n


def test_a_model_that_has_sampled_in_inference_mode_still_trains():
    """What generation leaves behind (the table of angles) can be used by a training step."""
    model = build(block_size=23)
    with torch.inference_mode():
        model.generate([[1]], 2)
    assert gradients(model, model(*batch(model))[1])["blocks.0.attn.q.weight"].any()


# --- shapes, cost and precision ---

PUBLISHED = {
    "reflow_1_small": (46_471_680, {"n_layer": 6, "n_head": 8, "n_embd": 512, "n_signal": 512}),
    "reflow_1": (463_668_224, {"n_layer": 32, "n_signal": 1024}),
    "reflow_1_big": (515_056_640, {"n_layer": 36}),
    "gpt2_new": (514_008_064, {"n_layer": 36, "vocab": "dense"}),
    "reflow_1_topk": (463_668_224, {"n_layer": 32, "vocab": "topk"}),
    "reflow_1_lite": (337_839_104, {"n_layer": 32, "n_kv_head": 4, "n_hidden": 2048}),
}


@pytest.mark.parametrize(("parameters", "fields"), PUBLISHED.values(), ids=PUBLISHED)
def test_parameter_counts_are_the_published_ones(parameters, fields):
    with torch.device("meta"):
        model = ReFlow(ModelConfig(**{"block_size": 1024, "n_head": 16, "n_embd": 1024, **fields}))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(parameter_table(model).values()) == parameters


def test_parameter_table_names_every_part():
    block = {"attention": 2 * (2 * 16 * 16 + 2 * 16 * 8), "mlp": 2 * 3 * 16 * 24, "norms": 5 * 16}
    factored, dense = build(n_signal=12, n_kv_head=2), build(vocab="dense", n_kv_head=2)
    assert parameter_table(factored) == {"recipe": 61 * 12, "basis": 12 * 16, **block}
    assert parameter_table(dense) == {"embedding": 61 * 16, **block}


@each_kind
def test_flops_equal_a_count_of_the_forward_pass(kind):
    """Three times torch's own count of a forward pass, whose attention is done in full, as plain products."""
    model = build(**kind)
    idx, targets = batch(model, B=2, T=16)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, targets)
    counted = 3 * counter.get_total_flops() / idx.numel()
    assert flops_per_token(model.config, 16) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"block_size": 0}, "block_size"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_head": 0}, "n_head"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"n_embd": 18}, "n_embd=18 .* n_head=4"),
        ({"n_embd": 12}, "n_embd=12 .* n_head=4"),  # an odd head has no pairs to rotate
        ({"n_kv_head": 3}, "n_head=4 .* n_kv_head=3"),
        ({"n_kv_head": 0}, "n_head=4 .* n_kv_head=0"),
        ({"n_kv_head": 8}, "n_head=4 .* n_kv_head=8"),
        ({"n_signal": 0}, "n_signal"),
        ({"n_hidden": 0}, "n_hidden"),
        ({"vocab": "dense", "n_signal": 8}, "vocab=dense .* n_signal=8"),
        ({"vocab": "topk", "n_signal": 8, "top_k": 9}, "top_k=9 .* n_signal=8"),
        ({"vocab": "topk", "top_k": 0}, "top_k=0"),
        ({"vocab": "sparse", "n_signal": 8, "n_nonzero": 9}, "n_nonzero=9 .* n_signal=8"),
        ({"vocab": "sparse", "n_nonzero": 4, "n_core": -1}, "n_core=-1 .* n_embd=16"),
        ({"reinject": True}, "reinject=True is for vocab=gains"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
    ],
    ids=str,
)
def test_invalid_configs_name_their_fields(fields, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig(**{**TINY, **fields})


@pytest.mark.parametrize(("n_embd", "n_hidden"), [(96, 256), (512, 1536), (1024, 2816)])
def test_sizes_left_out_follow_the_width(n_embd, n_hidden):
    """Hidden width 8/3 n_embd up to a multiple of 256, as many signals as coordinates, a key head a head."""
    config = ModelConfig(16, 1, 4, n_embd)
    assert (config.hidden, config.signals, config.kv_heads) == (n_hidden, n_embd, 4)


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        ("cuda", (7, 5), torch.float16),
        ("cuda:0", (7, 5), torch.float16),
        ("cuda", (8, 0), torch.bfloat16),
        ("cuda", (12, 0), torch.bfloat16),
        ("cpu", {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_bf16": False, "avx2": True}, torch.float32),
        ("cpu", {}, torch.float32),
        ("mps", None, torch.float32),
    ],
    ids=str,
)
def test_precision_follows_the_hardware(monkeypatch, device, capability, expected):
    """bf16 where there are instructions for it, fp16 on a T4, else fp32; a name given is taken."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capability)
    assert pick_dtype(device) == expected
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert pick_dtype(device, name) == dtype


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(1, 1, "cuda"), (1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")]
)
def test_auto_takes_the_best_device(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert pick_device() == torch.device(expected)
    assert pick_device("cpu") == torch.device("cpu")


def test_a_device_that_is_not_here_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1", "gpu"):
        with pytest.raises(UserError, match=f"no device {name} here"):
            pick_device(name)


@pytest.mark.parametrize("rows", [1, 2, 5, 64, 65])
@pytest.mark.parametrize("shape", [(48, 32), (70_000, 64)])  # beside and beyond what counts as large
def test_few_rows_give_the_plain_product(rows, shape):
    """The product that generation takes for few rows is that of float64, whatever the layout of its input."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    for x in (torch.randn(rows, 1, shape[1]), torch.randn(shape[1], rows, 1).permute(1, 2, 0)):
        want = x.double() @ weight.double().T
        found = linear(x, weight)
        assert found.shape == want.shape
        assert (found - want).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", ["factored", "topk", "dense"])
def test_every_vocabulary_computes_its_loss_in_the_precision_asked_for(vocab, dtype, monkeypatch):
    """The three large products of the loss: fp32 without autocast, half precision with it, for every kind."""
    shape = {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8, "n_hidden": 8, "vocab_size": 32}
    net = ReFlow(ModelConfig(**shape, vocab=vocab, top_k=2))
    idx = torch.randint(32, (2, 9))
    seen = []
    plain = torch.mm

    def record(a, b, **kwargs):
        seen.append((a.dtype, b.dtype))
        return plain(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", record)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        net(idx[:, :-1], idx[:, 1:])[1].backward()
    assert len(seen) == 2 and set(seen) == {(dtype, dtype)}
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("rows", [1, 3, 64, 65])
def test_packed_weights_give_the_plain_product(rows):
    """Packing is undone at the end, also after an error."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 32).bfloat16(), torch.randn(48, 32).bfloat16()
    with pytest.raises(ZeroDivisionError), packed([weight, weight], rows):
        product = linear(x, weight)
        _ = 1 / 0
    exact = x.double() @ weight.double().T
    assert (product.double() - exact).norm() < 5e-3 * exact.norm()
    assert not hasattr(weight, "packed")


def test_generation_leaves_no_packed_weights():
    """Weights may change after it: a stream that is given up half way holds none either."""
    model = build(**KINDS["factored"]).bfloat16()
    prompts = [[1, 2], [3, 4]]  # for one alone, none are packed
    before = model.generate(prompts, 4, temperature=0)
    next(model.stream(prompts, 4, temperature=0))
    assert not any(hasattr(p, "packed") for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1.5)
    assert model.generate(prompts, 4, temperature=0) != before
