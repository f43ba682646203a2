"""
The whole reFlow model: a decoder-only transformer whose vocabulary is a product of two matrices.

    E = W_recipe (V x S) @ W_basis (S x d)

A row of W_recipe is a token's *recipe*: how much of each of the S shared *signals* it mixes. A row of W_basis
is the direction of a signal in the residual stream. E is both the input embedding and the output head, so
every logit is exactly a sum over signals: logit[v] = sum_s A[s] * W_recipe[v, s], A = norm(h) @ W_basis.T.

The backbone is a standard one: pre-norm RMSNorm (Zhang & Sennrich, 2019), rotary positions on adjacent pairs
(Su et al., 2021), SwiGLU (Shazeer, 2020), grouped-query attention (Ainslie et al., 2023), no biases.

Modules take PyTorch's forward hooks. Their names are stable; TransformerLens' names are on the right:

    vocab                              hook_embed (vocab.embed), unembed (vocab.logits)
    blocks.{i}                         blocks.{i}.hook_resid_post
    blocks.{i}.norm1 / .norm2          blocks.{i}.ln1.hook_out / .ln2.hook_out
    blocks.{i}.attn.q / .k / .v        blocks.{i}.attn.hook_q / hook_k / hook_v (heads side by side)
    blocks.{i}.attn                    blocks.{i}.hook_attn_out
    blocks.{i}.mlp                     blocks.{i}.hook_mlp_out
    norm                               ln_final.hook_out
"""

import math
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

N_TOKENS = 50257  # GPT-2's
IGNORE = -100  # a target that is left out of the loss, as in torch


@dataclass
class ModelConfig:
    block_size: int  # longest context, in tokens
    n_layer: int  # transformer blocks
    n_head: int  # query heads; n_embd / n_head is the head width
    n_embd: int  # width of the residual stream, d
    vocab_size: int | None = None  # rows of the vocabulary, V; None: its tokens and padding, a multiple of 64
    n_kv_head: int | None = None  # key and value heads, each shared by n_head / n_kv_head query heads
    n_signal: int | None = None  # signals, S; None: n_embd
    n_hidden: int | None = None  # SwiGLU width; None: 8/3 n_embd rounded up to a multiple of 256
    vocab: Literal["factored", "topk", "sparse", "gains", "dense"] = "factored"  # config/README.md
    top_k: int = 64  # topk only: a recipe keeps its k largest positive signals
    n_nonzero: int = 32  # sparse only: signals of a recipe, on average over all rows
    n_core: int = 16  # sparse only: rank of the dense part beside the recipes
    reinject: bool = False  # gains only: add the embedding before every block again
    dropout: float = 0.0  # on the embedding and on what each block adds; 0 for pre-training
    norm_eps: float = 1e-6  # RMSNorm's epsilon
    rope_base: float = 10000.0  # wavelength base of the rotary positions
    recipe_init_std: float = 0.02  # std of the recipes at the start (of E itself for a dense vocabulary)
    n_token: int | None = None  # rows that are tokens, the others are padding; None: GPT-2's 50,257, or all

    def __post_init__(self):
        if min(self.block_size, self.n_layer, self.n_head, self.n_embd, self.rows) < 1:
            raise ValueError("block_size, n_layer, n_head, n_embd and vocab_size must be at least 1")
        for name in ("block_size", "n_embd", "n_signal", "n_hidden", "vocab_size", "n_token"):
            if (getattr(self, name) or 0) > 2**24:
                raise ValueError(f"{name}={getattr(self, name)} must be at most 2**24")
        if self.n_layer > 4096:
            raise ValueError(f"n_layer={self.n_layer} must be at most 4096")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(f"n_embd={self.n_embd} must be an even multiple of n_head={self.n_head}")
        if self.kv_heads < 1 or self.n_head % self.kv_heads:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if self.signals < 1 or self.hidden < 1:
            raise ValueError("n_signal and n_hidden must be at least 1")
        if self.n_token is not None and not 1 <= self.n_token <= self.rows:
            raise ValueError(f"n_token={self.n_token} must be from 1 to vocab_size={self.rows}")
        if self.vocab == "dense" and self.n_signal is not None:
            raise ValueError(f"vocab=dense has no signals: leave out n_signal={self.n_signal}")
        if self.vocab == "topk" and not 1 <= self.top_k <= self.signals:
            raise ValueError(f"top_k={self.top_k} must be between 1 and n_signal={self.signals}")
        if self.vocab == "sparse" and not 1 <= self.n_nonzero <= self.signals:
            raise ValueError(f"n_nonzero={self.n_nonzero} must be between 1 and n_signal={self.signals}")
        if self.vocab == "sparse" and not 0 <= self.n_core <= self.n_embd:
            raise ValueError(f"n_core={self.n_core} must be between 0 and n_embd={self.n_embd}")
        if self.reinject and self.vocab != "gains":
            raise ValueError(f"reinject=True is for vocab=gains, not for vocab={self.vocab}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if not 1e-12 <= self.norm_eps < 1:
            raise ValueError(f"norm_eps={self.norm_eps} must be at least 1e-12 and below 1")
        if not 0 <= self.recipe_init_std <= 100:
            raise ValueError(f"recipe_init_std={self.recipe_init_std} must be from 0 to 100")
        if not 1 < self.rope_base < 1e12:
            raise ValueError(f"rope_base={self.rope_base} must be above 1 and below 1e12")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def kv_heads(self):
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def signals(self):
        return self.n_embd if self.n_signal is None else self.n_signal

    @property
    def hidden(self):
        return 256 * math.ceil(8 * self.n_embd / 3 / 256) if self.n_hidden is None else self.n_hidden

    @property
    def rows(self):
        """Rows of the vocabulary, V; by default a multiple of 64, for which matrix products are fast."""
        return 64 * math.ceil((self.n_token or N_TOKENS) / 64) if self.vocab_size is None else self.vocab_size

    @property
    def n_tokens(self):
        """Rows that are real tokens; the others are padding and must never be sampled, ranked or counted."""
        return min(self.rows, N_TOKENS) if self.n_token is None else self.n_token


# ----------------------------------------------------------------------------------------------------
# The vocabulary, and the loss over it


CACHED_ROWS = 32  # of the loss on a CPU; 16 to 64 are as fast (LOG.md)


def to_gradient(logits, targets, scale, p):
    """Sum of the cross-entropies of logits (n, V), fp32; the logits become its gradient times `scale`.

    No gradient if `scale` is None. `p` (n, V) is a buffer in fp32 (fp64 for fp64). Every pass is in place: on
    a CPU, fresh memory for a temporary takes longer than the arithmetic.
    """
    valid = (targets != IGNORE).unsqueeze(1)  # (n, 1)
    y = targets.unsqueeze(1).where(valid, 0)  # (n, 1)
    p.copy_(logits)
    torch.softmax(p, dim=-1, out=p)
    p_y = p.gather(1, y)  # (n, 1)
    if p.device.type == "cpu" and p_y.min() >= torch.finfo(p.dtype).tiny:
        nll = -p_y.log()
    else:  # the probability may be 0; on a GPU, asking would wait for it
        # log sum exp, from the largest logit and its probability
        lse = logits.amax(1, keepdim=True).to(p) - p.amax(1, keepdim=True).log()  # (n, 1)
        nll = lse - logits.gather(1, y)
    loss = (nll * valid).sum()
    if scale is not None:
        p.scatter_add_(1, y, p.new_full((1, 1), -1.0).expand_as(y))
        logits.copy_(p.mul_(valid * scale))
    return loss


def add_product(total, a, b, first):
    """total (V, S) += a (V, C) @ b (C, S), a and b may be of lower precision; `first`: = instead of +=."""
    if total.dtype == b.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
        return
    product = a @ b
    if first:
        total.copy_(product)
        return
    # An addition of two precisions makes a temporary of the higher one: on a CPU, one that fits the cache.
    rows = 2048 if total.device.type == "cpu" else len(total)
    for part, addend in zip(total.split(rows), product.split(rows), strict=True):
        part += addend


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of logits z (N, S) @ codes.T (S, V), never holding more than `chunk` rows of them.

    `forward` turns the logits of a chunk into their gradient at once: computing them again in `backward`
    would cost a third more. It assumes an upstream gradient of `grad_scale`, and `backward` corrects for the
    true one. In fp16, give the loss scale as `grad_scale`: without it p / N below 6e-8 would become 0. The
    loss and the gradient of `codes` are summed in fp32 (fp64 for fp64 inputs). Differentiable once.
    """

    @staticmethod
    def forward(ctx, z, codes, targets, grad_scale, chunk, with_grad):
        exact = torch.promote_types(z.dtype, torch.float32)
        for_codes = with_grad and ctx.needs_input_grad[1]  # frozen recipes need none
        weight = codes.to(z.dtype)  # once, not once a chunk
        n_valid = (targets != IGNORE).sum().clamp(min=1).to(exact)
        loss = torch.zeros((), dtype=exact, device=z.device)
        if with_grad:
            grad_z = torch.empty_like(z)
        if for_codes:
            grad_codes = (torch.empty_like if len(z) else torch.zeros_like)(codes, dtype=exact)
        # All chunks share buffers: on a CPU, fresh memory for each would cost a tenth of the time. There, the
        # probabilities of few rows at a time stay in the cache.
        rows = min(chunk, len(z))
        logits = z.new_empty(rows, len(codes))
        p = z.new_empty(min(rows, CACHED_ROWS) if z.device.type == "cpu" else rows, len(codes), dtype=exact)
        scale = grad_scale / n_valid
        for start in range(0, len(z), chunk):
            z_c, y = z[start : start + chunk], targets[start : start + chunk]
            logits = logits[: len(z_c)]  # (C, V)
            torch.mm(z_c, weight.T, out=logits)
            for few, few_y in zip(logits.split(len(p)), y.split(len(p)), strict=True):
                loss += to_gradient(few, few_y, scale if with_grad else None, p[: len(few)])
            if with_grad:
                torch.mm(logits, weight, out=grad_z[start : start + chunk])
            if for_codes:
                add_product(grad_codes, logits.T, z_c, first=start == 0)
        if with_grad:
            grad_codes = grad_codes.to(codes.dtype) if for_codes else None
            ctx.grads, ctx.grad_scale = (grad_z, grad_codes), grad_scale
        return loss / n_valid

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        if ctx.grads is None:
            raise RuntimeError("ChunkedCrossEntropy can be differentiated once: run the forward pass again")
        (grad_z, grad_codes), ctx.grads = ctx.grads, None
        factor = upstream / ctx.grad_scale
        if factor != 1:
            grad_z = grad_z.mul_(factor)
            grad_codes = None if grad_codes is None else grad_codes.mul_(factor)
        return grad_z, grad_codes, None, None, None, None


FEW_ROWS = 64  # rows up to which `linear` takes the ways that are fast in generation
HAS_AMX = torch.cpu.get_capabilities().get("amx_bf16", False)


@contextmanager
def packed(weights, rows):
    """A context in which `linear` reads those `weights` that are bf16 on a CPU in oneDNN's own layout.

    oneDNN rearranges a plain matrix in every product. For few rows, a product with a plain matrix takes two
    to three times as long (LOG.md). torch.compile emits the same operators. With AMX a single row needs none.
    """
    done = []
    try:
        for weight in weights:
            fits = weight.dim() == 2 and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
            if (rows > 1 or not HAS_AMX) and fits and not hasattr(weight, "packed"):
                with suppress(
                    AttributeError, RuntimeError
                ):  # a torch without oneDNN, or without this operator
                    weight.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
                    done.append(weight)
        yield
    finally:
        for weight in done:
            del weight.packed


def linear(x, weight):
    """F.linear, x (..., n) and weight (m, n) -> (..., m), fast also for the few rows of generation.

    MKL's fp32 kernels read a tall matrix up to four times as fast when it is the left factor (LOG.md). For a
    single row they reach half of the memory's bandwidth, so for a large matrix the row is taken four times.
    """
    rows, large = x.numel() // x.size(-1), weight.numel() > 2**22
    packed = getattr(weight, "packed", None)
    if HAS_AMX and rows == 1 and x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu":
        return torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
    if packed is not None and rows <= FEW_ROWS and x.dtype == weight.dtype:
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if plain or rows > FEW_ROWS or (rows == 1 and not large):
        return F.linear(x, weight)
    few = x.reshape(rows, -1).contiguous()
    few = few if rows > 1 else few.repeat(4, 1)
    return (weight @ few.T)[:, :rows].T.contiguous().view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight)


class Vocab(nn.Module):
    """What all vocabularies share. A subclass defines `embed`, `signals`, `recipes` and `matrix`."""

    chunk = 1024  # tokens whose logits the loss holds at a time

    def built(self):
        """The same vocabulary for one forward pass; may compute once what input and output share."""
        return self

    def input_matrix(self):
        """What `embed` reads, (V, d): E itself, unless the input has gains of its own."""
        return self.matrix()

    def logits(self, h):
        """h (..., d), normalised -> logits (..., V)."""
        return linear(self.signals(h), self.recipes())

    def loss(self, h, targets, grad_scale=1.0):
        """h (N, d), normalised, targets (N,) -> mean cross-entropy over targets that are not IGNORE, fp32."""
        z, codes = self.signals(h), self.recipes()
        device = z.device.type
        if torch.is_autocast_enabled(device):
            # A dense vocabulary's signals are the fp32 stream: all kinds must use the same precision.
            z = z.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return ChunkedCrossEntropy.apply(
                z, codes, targets, grad_scale, self.chunk, torch.is_grad_enabled()
            )


class FactoredVocab(Vocab):
    """E = recipe @ basis. Training never forms E: input and output multiply by recipe and basis in turn."""

    def __init__(self, config):
        super().__init__()
        self.recipe = nn.Parameter(torch.empty(config.rows, config.signals))
        self.basis = nn.Parameter(torch.empty(config.signals, config.n_embd))

    def embed(self, idx):
        """idx (B, T) -> (B, T, d)."""
        return F.embedding(idx, self.recipe) @ self.basis

    def signals(self, h):
        """h (..., d), normalised -> A (..., S), the weight of each signal in the logits."""
        return linear(h, self.basis)

    def recipes(self):
        """(V, S)."""
        return self.recipe

    def matrix(self):
        """E (V, d)."""
        return self.recipes() @ self.basis

    def reset_parameters(self, std):
        nn.init.normal_(self.recipe, std=std)
        nn.init.orthogonal_(self.basis)  # condition number 1; a square Gaussian one starts in the thousands


class TopKVocab(FactoredVocab):
    """A factored vocabulary with hard sparsity: a recipe keeps its top_k largest positive entries."""

    def __init__(self, config):
        super().__init__(config)
        self.top_k = config.top_k

    def sparsify(self, rows):
        values, index = F.relu(rows).topk(self.top_k, dim=-1, sorted=False)
        return torch.zeros_like(rows).scatter(-1, index, values)

    def embed(self, idx):
        return self.sparsify(F.embedding(idx, self.recipe)) @ self.basis

    def recipes(self):
        return self.sparsify(self.recipe)


class DenseVocab(Vocab):
    """The plain tied embedding, seen as a factored one: its signals are the residual coordinates."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.rows, config.n_embd))

    def embed(self, idx):
        return F.embedding(idx, self.weight)

    def signals(self, h):
        return h

    def recipes(self):
        return self.weight

    def matrix(self):
        return self.weight

    def reset_parameters(self, std):
        nn.init.normal_(self.weight, std=std)


class FixedVocab(DenseVocab):
    """E given as tensors: E_in (V, d) is read at the input, E_out (V, d) at the output."""

    def __init__(self, E_in, E_out=None):
        Vocab.__init__(self)  # it has no parameters
        self.E_in = E_in
        self.weight = E_in if E_out is None else E_out

    def embed(self, idx):
        return F.embedding(idx, self.E_in)

    def input_matrix(self):
        return self.E_in


class GainsVocab(FactoredVocab):
    """A factored vocabulary whose signals have gains at the input: E_in = recipe @ diag(gain) @ basis.

    Here rotated recipes give another function. Two matrices recipe @ diag(g) @ basis with distinct ratios of
    gains determine the recipes up to order, sign and scale, if both factors have full rank (Harshman, 1972).
    The output needs no gains: the lengths of basis rows serve as such. With `reinject`, the embedding is
    added to the stream again before every block, each time with other gains.
    """

    def __init__(self, config):
        super().__init__(config)
        n_gain = 1 + config.n_layer * config.reinject
        self.gain = nn.ParameterList(torch.empty(config.signals) for _ in range(n_gain))  # no weight decay

    def embed(self, idx):
        return (F.embedding(idx, self.recipe) * self.gain[0]) @ self.basis

    def inject(self, idx, layer):
        """What is added to the stream before block `layer`, for ids idx (B, T), (B, T, d)."""
        return (F.embedding(idx, self.recipe) * self.gain[1 + layer]) @ self.basis

    def input_matrix(self):
        return (self.recipe * self.gain[0]) @ self.basis

    def reset_parameters(self, std):
        super().reset_parameters(std)
        # Ratios near 1 would determine little. Starts are random: gains that agree between seeds are learned.
        self.gain[0].data.log_normal_(mean=0.0, std=0.7)
        for gain in self.gain[1:]:
            nn.init.normal_(gain, std=0.1)


class SparseProduct(torch.autograd.Function):
    """A sparse matrix times `basis` (S, d), (V, d): `value` (n,) holds its entries, row by row.

    `places` is Places. The product and its gradients are sums of few rows, computed by embedding_bag; torch's
    own gradient of the basis takes several times as long on a CPU. Differentiable once.
    """

    @staticmethod
    def forward(ctx, value, basis, places):
        ctx.save_for_backward(value, basis)
        ctx.places = places
        return F.embedding_bag(places.column, basis, places.row_start, mode="sum", per_sample_weights=value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        value, basis = ctx.saved_tensors
        p, grad = ctx.places, grad.contiguous()
        grad_value = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad, basis, p.column, p.row_start, p.row, 0
        )
        order = p.by_column
        grad_basis = F.embedding_bag(
            p.row[order], grad, p.column_start, mode="sum", per_sample_weights=value[order]
        )
        return grad_value, grad_basis, None


class Places:
    """Where the n entries of a sparse (V, S) matrix are: `row` and `column` (n,), row by row, int32."""

    def __init__(self, column, count, n_columns):
        self.column = column
        self.row = torch.repeat_interleave(count)  # (n,)
        self.row_start = count.cumsum(0, dtype=torch.int32) - count  # (V,)
        self.by_column = column.argsort(stable=True)  # (n,)
        uses = torch.bincount(column, minlength=n_columns).int()  # (S,)
        self.column_start = uses.cumsum(0, dtype=torch.int32) - uses


class SparseVocab(Vocab):
    """Recipes with few signed entries in fixed places, plus a dense part that is not interpreted.

    E = recipes @ basis, where a recipe has three parts: its entries among the first `n_signal` columns, the
    token's row of `core`, and a 1 for the last row of the basis, which all tokens share. The core's rows of
    the basis and the shared row are not signals: a rotation of the core leaves E as it is. A new model has
    its entries in random places; `export.py --factor=sparse` takes those of a dictionary of a dense model.
    """

    def __init__(self, config):
        super().__init__()
        V, self.n_signal = config.rows, config.signals
        self.value = nn.Parameter(torch.empty(V * config.n_nonzero))  # entries, row by row; no weight decay
        self.core = nn.Parameter(torch.empty(V, config.n_core))
        self.basis = nn.Parameter(torch.empty(config.signals + config.n_core + 1, config.n_embd))
        self.register_buffer("column", torch.zeros(len(self.value), dtype=torch.int32))
        self.register_buffer("count", torch.full((V,), config.n_nonzero, dtype=torch.int32))  # of each row
        self.known = None

    @staticmethod
    def tensors(codes, core, basis, n_nonzero):
        """The state of a vocabulary with codes (V, S), at most n_nonzero of them a row on average.

        core (V, n_core); basis (S + n_core + 1, d): signals, core, the row that all tokens share.
        """
        taken = codes != 0
        unspent = n_nonzero * len(codes) - int(taken.sum())  # rows that are coded exactly need no more
        taken.view(-1)[(~taken).flatten().nonzero().flatten()[:unspent]] = True
        places = {"column": taken.nonzero()[:, 1].int(), "count": taken.sum(1).int()}
        return places | {"value": codes[taken], "core": core, "basis": basis}

    def places(self):
        """The Places of the entries."""
        if self.known is None or self.known[:2] != (id(self.column), self.column._version):
            places = Places(self.column, self.count, self.n_signal)
            self.known = (id(self.column), self.column._version, places)
        return self.known[2]

    def built(self):
        """The product, formed once."""
        found = FixedVocab(self.matrix())
        found.chunk = self.chunk
        return found

    def embed(self, idx):
        return F.embedding(idx, self.matrix())

    def signals(self, h):
        """h (..., d), normalised -> (..., S + n_core + 1); the last columns are the core's and the mean's."""
        return linear(h, self.basis)

    def recipes(self):
        places, S = self.places(), self.n_signal
        entries = self.core.new_zeros(len(self.core), S).index_put((places.row, places.column), self.value)
        return torch.cat([entries, self.core, self.core.new_ones(len(self.core), 1)], 1)

    def matrix(self):
        signals, core, mean = self.basis.split([self.n_signal, self.core.size(1), 1])
        with torch.autocast(self.basis.device.type, enabled=False):
            dense = torch.addmm(mean[0], self.core, core)  # (V, d)
            return dense + SparseProduct.apply(self.value, signals, self.places())

    def logits(self, h):
        return self.built().logits(h)

    def loss(self, h, targets, grad_scale=1.0):
        return self.built().loss(h, targets, grad_scale)

    def reset_parameters(self, std):
        V, S = len(self.core), self.n_signal
        n = len(self.value) // V  # entries of a row
        self.column.copy_(torch.rand(V, S).topk(n).indices.sort().values.flatten())
        nn.init.normal_(self.value, std=std * math.sqrt(S / n))  # rows as long as those of a factored one
        nn.init.normal_(self.core, std=std)
        nn.init.normal_(self.basis, std=self.basis.size(1) ** -0.5)
        nn.init.zeros_(self.basis[-1])


VOCABS = {
    "factored": FactoredVocab,  # recipes @ basis
    "topk": TopKVocab,  # the same with at most top_k entries in a recipe, all positive
    "sparse": SparseVocab,  # few signed entries in fixed places, beside a dense core
    "gains": GainsVocab,  # factored, with a gain for each signal at the input
    "dense": DenseVocab,  # one matrix, as in a plain GPT
}


# ----------------------------------------------------------------------------------------------------
# The backbone


@lru_cache(maxsize=8)
def rope_table(length, head_dim, base, device):
    """cos and sin of every position's angles, each (length, head_dim / 2), always fp32."""
    with torch.inference_mode(False):  # the cached table must also work in a training step
        freqs = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float64), freqs)
        return angles.cos().float().to(device), angles.sin().float().to(device)


def rotate(x, cos, sin):
    """Rotate adjacent pairs of x (B, H, T, D); cos and sin (T, D / 2) or (B, 1, T, D / 2), fp32."""
    pairs = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2))  # (B, H, T, D / 2, 2)
    if x.device.type == "cpu":  # as complex numbers: a third of the passes over memory, the same bits
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    else:
        a, b = pairs.unbind(-1)  # (B, H, T, D / 2) each
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


class KVCache:
    """Keys and values of the tokens seen, for every layer; rows of the batch may have different lengths.

    The first call fills it with a prompt of any length (rows padded on the right); later ones add one token.
    """

    def __init__(self, config, batch, capacity, device, dtype):
        shape = (config.n_layer, batch, config.kv_heads, capacity, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = None  # tokens of each row, a list; None before the first call
        self.mask = None  # (B, 1, 1, longest), only while rows differ in length
        self.at = None  # where in (B, H_kv, capacity, D) the newest token goes

    def advance(self, device):
        """Make room for one more token in each row; return its positions (B, 1)."""
        positions = torch.tensor(self.lengths, device=device)
        self.lengths = [n + 1 for n in self.lengths]
        longest = max(self.lengths)
        ragged = min(self.lengths) < longest
        held = torch.arange(longest, device=device) <= positions[:, None]  # (B, longest)
        self.mask = held[:, None, None] if ragged else None
        rows = torch.arange(len(positions), device=device)
        self.at = (rows, slice(None), positions) if ragged else (slice(None), slice(None), longest - 1)
        return positions[:, None]

    def append(self, layer, k, v):
        """Write one token's k, v (B, H_kv, 1, D); return all of them so far (B, H_kv, longest, D)."""
        longest = max(self.lengths)
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            store[self.at] = new[:, :, 0]
        return self.k[layer, :, :, :longest], self.v[layer, :, :, :longest]


class CausalAttention(torch.autograd.Function):
    """Causal attention softmax(q k^T / sqrt(D)) v of q, k, v (B, H, T, D).

    For CPUs, where torch's fused kernel takes up to twice the time (LOG.md): `rows` queries at a time,
    against the keys that they see. It keeps the probabilities for the backward pass, half of (B, H, T, T).
    Differentiable once.
    """

    rows = 128

    @staticmethod
    def forward(ctx, q, k, v):
        shape = q.shape
        q, k, v = (t.flatten(0, 1) for t in (q * shape[-1] ** -0.5, k, v))  # (B * H, T, D)
        y = torch.empty_like(q)
        n = min(CausalAttention.rows, shape[-2])
        future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        kept = []
        for start, stop in row_blocks(shape[-2]):
            scores = torch.bmm(q[:, start:stop], k[:, :stop].mT)  # (B * H, stop - start, stop)
            n = stop - start
            scores[:, :, start:].masked_fill_(future[:n, :n], -math.inf)
            p = scores.softmax(-1)
            y[:, start:stop] = torch.bmm(p, v[:, :stop])
            kept.append(p)
        ctx.save_for_backward(q, k, v, y, *kept)
        return y.view(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, y, *kept = ctx.saved_tensors
        shape = grad.shape
        grad = grad.flatten(0, 1).to(y)  # (B * H, T, D)
        exact = torch.promote_types(q.dtype, torch.float32)
        # The softmax's gradient subtracts sum(p * dL/dp) over keys, which is y * dL/dy (Dao et al., 2022).
        shift = (grad.to(exact) * y).sum(-1, keepdim=True).to(y)  # (B * H, T, 1)
        grad_q = torch.empty_like(q)
        grad_k = torch.zeros_like(k, dtype=exact)
        grad_v = torch.zeros_like(v, dtype=exact)
        for (start, stop), p in zip(row_blocks(shape[-2]), kept, strict=True):
            part = grad[:, start:stop]
            grad_v[:, :stop] += torch.bmm(p.mT, part)
            grad_scores = torch.baddbmm(shift[:, start:stop], part, v[:, :stop].mT, beta=-1).mul_(p)
            grad_q[:, start:stop] = torch.bmm(grad_scores, k[:, :stop])
            grad_k[:, :stop] += torch.bmm(grad_scores.mT, q[:, start:stop])
        grad_q *= shape[-1] ** -0.5
        return grad_q.view(shape), grad_k.to(k).view(shape), grad_v.to(v).view(shape)


def row_blocks(length):
    """[(start, stop)] of the blocks of queries of CausalAttention."""
    starts = range(0, length, CausalAttention.rows)
    return [(start, min(start + CausalAttention.rows, length)) for start in starts]


def causal_attention(q, k, v):
    """q, k, v (B, H, T, D) -> (B, H, T, D)."""
    if q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):  # q, k and v are in its precision already
            return CausalAttention.apply(q, k, v)
    # is_causal, not a mask: that would cost (T, T) memory on a T4
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.n_embd, config.n_embd, bias=False)
        self.k = Linear(config.n_embd, config.kv_heads * config.head_dim, bias=False)
        self.v = Linear(config.n_embd, config.kv_heads * config.head_dim, bias=False)
        self.o = Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, cache=None, layer=0):
        """x (B, T, d) -> (B, T, d)."""
        B, T, _ = x.shape
        heads = (B, T, -1, self.head_dim)
        q, k, v = (f(x).view(heads).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, H, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = q.size(1) // k.size(1)  # query heads on one key head
        if cache is not None and cache.lengths is not None:
            k, v = cache.append(layer, k, v)
            # The one new token sees every key, so queries that share a key head are rows of one product.
            q = q.reshape(B, k.size(1), group, self.head_dim)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask)  # (B, H_kv, group, D)
        else:
            if cache is not None:
                cache.k[layer, :, :, :T], cache.v[layer, :, :, :T] = k, v
            if group > 1:  # enable_gqa would leave the fused kernels on a T4
                k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            y = causal_attention(q, k, v)
        y = y.reshape(B, -1, T, self.head_dim).transpose(1, 2).reshape(B, T, -1)
        return self.o(y)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        """x (..., d) -> (..., d). A single row on a CPU takes 3 operations instead of 9 (LOG.md)."""
        single = x.numel() == x.size(-1) and x.device.type == "cpu" and not torch.is_grad_enabled()
        if not single:
            return super().forward(x)
        length = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).item()
        return x * (length**2 / x.numel() + self.eps) ** -0.5 * self.weight


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = Linear(config.n_embd, config.hidden, bias=False)
        self.up = Linear(config.n_embd, config.hidden, bias=False)
        self.down = Linear(config.hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = config.dropout

    def forward(self, x, cos, sin, cache=None, layer=0):
        x = x + F.dropout(self.attn(self.norm1(x), cos, sin, cache, layer), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class ReFlow(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vocab = VOCABS[config.vocab](config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.activation_checkpointing = False  # recompute blocks in backward: less memory, a third more work
        self.reset_parameters()

    def reset_parameters(self):
        if self.norm.weight.is_meta:  # only shapes are wanted
            return
        self.vocab.reset_parameters(self.config.recipe_init_std)
        for name, weight in self.blocks.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)

    def encode(self, idx, cache=None, lengths=None, vocab=None):
        """idx (B, T) -> normalised final residual stream (B, T, d).

        `lengths`: tokens of each row, for a cache (None: T each). `vocab`: this model's `vocab.built()`, if
        the caller has it.
        """
        vocab = vocab or self.vocab.built()
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}")
        c = self.config
        cos, sin = rope_table(c.block_size, c.head_dim, c.rope_base, idx.device)  # (block_size, head_dim / 2)
        if cache is not None and cache.lengths is not None:
            at = cache.advance(idx.device)  # (B, 1)
            cos, sin = cos[at].unsqueeze(1), sin[at].unsqueeze(1)  # (B, 1, 1, head_dim / 2)
        else:
            cos, sin = cos[:T], sin[:T]

        x = vocab.embed(idx).to(self.norm.weight.dtype)  # the residual stream stays fp32 under autocast
        x = F.dropout(x, c.dropout, self.training)
        for i, block in enumerate(self.blocks):
            if c.reinject:
                x = x + vocab.inject(idx, i).to(x)
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache, i)
        if cache is not None and cache.lengths is None:
            cache.lengths = lengths or [T] * B
        return self.norm(x)

    def forward(self, idx, targets=None, grad_scale=1.0):
        """idx (B, T) -> (logits (B, T, V) fp32, None); with targets (B, T) -> (None, mean loss), no logits.

        Targets of IGNORE are left out. `grad_scale`: see ChunkedCrossEntropy; it matters only in fp16.
        """
        vocab = self.vocab.built()
        h = self.encode(idx, vocab=vocab)
        if targets is None:
            logits = vocab.logits(h)
            return logits.to(torch.promote_types(logits.dtype, torch.float32)), None
        return None, vocab.loss(h.flatten(0, 1), targets.flatten(), grad_scale)

    # -- generation ---------------------------------------------------------------------------------

    @torch.no_grad()
    def stream(self, prompts, max_new_tokens, *, stop=None, use_cache=True, **how):
        """Continue B prompts (lists of token ids, lengths may differ) together; yield a list of B ids a step.

        A row that has produced `stop` yields None from then on; the stream ends when all have. `how` goes to
        `sample_token`. When a context outgrows block_size, its last half is encoded anew and generation goes
        on from there. The window depends only on the length, so cached and uncached, batched and single
        generation give the same tokens.
        """
        if not all(map(len, prompts)):
            raise ValueError("a prompt needs at least one token")
        rows, done, cache, starts = [list(p) for p in prompts], [False] * len(prompts), None, None
        device, capacity = self.norm.weight.device, self.config.block_size
        capacity = min(capacity, max(map(len, rows)) + max_new_tokens)
        vocab = self.vocab.built()
        recipes = vocab.recipes()  # once: for a Top-K vocabulary it is a sort of every row
        with packed([*self.blocks.parameters(), recipes], len(rows)):
            for _ in range(max_new_tokens):
                fresh, starts = starts, [window_start(len(row), self.config.block_size) for row in rows]
                if use_cache and fresh == starts:
                    idx = torch.tensor([row[-1:] for row in rows], device=device)  # (B, 1)
                    h = self.encode(idx, cache, vocab=vocab)[:, -1]  # (B, d)
                else:
                    windows = [row[start:] for row, start in zip(rows, starts, strict=True)]
                    lengths = [len(w) for w in windows]
                    if use_cache:
                        cache = KVCache(self.config, len(rows), capacity, device, self.kv_dtype())
                    # Padded on the right, where causality hides it.
                    padded = [w + [0] * (max(lengths) - len(w)) for w in windows]
                    idx = torch.tensor(padded, device=device)  # (B, longest)
                    h = self.encode(idx, cache, lengths, vocab)  # (B, longest, d)
                    h = h[torch.arange(len(rows)), torch.tensor(lengths) - 1]  # (B, d)
                logits = linear(vocab.signals(h), recipes).float()  # (B, V)
                tokens = sample_token(logits[:, : self.config.n_tokens], **how).tolist()
                for row, token in zip(rows, tokens, strict=True):
                    row.append(token)
                yield [None if finished else token for token, finished in zip(tokens, done, strict=True)]
                done = [finished or token == stop for token, finished in zip(tokens, done, strict=True)]
                if all(done):
                    return

    def kv_dtype(self):
        device = self.norm.weight.device.type
        on = torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if on else self.norm.weight.dtype

    def generate(self, prompts, max_new_tokens, **how):
        """Like `stream`, but returns everything: a list of B lists of new ids, without `stop`."""
        out = [[] for _ in prompts]
        for tokens in self.stream(prompts, max_new_tokens, **how):
            for row, token in zip(out, tokens, strict=True):
                if token is not None and token != how.get("stop"):
                    row.append(token)
        return out


def window_start(length, block_size):
    """First token of the context: 0 while all fits, then moved on by whole half blocks."""
    half = max(block_size // 2, 1)
    return max(0, math.ceil((length - block_size) / half)) * half


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """logits (B, n) -> ids (B,). top_p keeps the smallest set of tokens that holds that much probability."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, ids, n = logits / temperature, None, logits.size(-1)
    nucleus = top_p is not None and top_p < 1
    if nucleus or (top_k or n) < n:
        logits, ids = logits.topk(min(top_k or n, n))  # (B, k), largest first
    p = logits.softmax(-1)
    if nucleus:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the mass before already suffices; the first is kept
    # Not torch.multinomial: it draws a random number for every entry, tens of milliseconds on a CPU.
    mass = p.cumsum(-1)  # (B, k)
    u = torch.rand(len(p), 1, device=p.device, generator=generator) * mass[:, -1:]
    drawn = torch.searchsorted(mass, u, right=True).clamp(max=p.size(-1) - 1)  # (B, 1)
    return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1)
