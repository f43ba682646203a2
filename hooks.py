"""
The residual stream of a ReFlow: read it, edit it, steer it, run the model from the middle.

`layer` is the block that a stream enters: 0 is the embedding, n_layer the input of the final norm. So layer l
is TransformerLens' blocks.{l}.hook_resid_pre, and blocks.{l-1}.hook_resid_post. Functions that return logits
leave the padding rows of the vocabulary out.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from configurator import UserError
from model import FixedVocab, KVCache, ReFlow, rope_table

# ----------------------------------------------------------------------------------------------------
# Reading


@torch.no_grad()
def unembed(net, h):
    """Normalised final states h (..., d) -> logits (..., n_tokens), fp32."""
    return F.linear(net.vocab.signals(h), net.vocab.recipes()[: net.config.n_tokens])


@torch.no_grad()
def logit_lens(net, resid):
    """Residual streams (..., d) of any layer -> logits (..., n_tokens) through the final norm.

    nostalgebraist, "interpreting GPT: the logit lens", 2020.
    """
    return unembed(net, net.norm(resid))


def log_probs(net, h):
    """Normalised final states h (..., d) -> log-probabilities (..., n_tokens), float64."""
    return unembed(net, h).double().log_softmax(-1)


def kl(log_p, log_q):
    """KL(p || q), nats, of log-probabilities (..., n_tokens), (...)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def lens_by_layer(net, resid):
    """Logit lens of streams resid (n, L, d): top tokens (n, L), and KL(last layer || layer), nats, (n, L)."""
    final = log_probs(net, net.norm(resid[:, -1]))  # (n, n_tokens)
    top = []
    divergence = []
    for layer in range(resid.size(1)):  # the logits of one layer at a time
        logits = logit_lens(net, resid[:, layer])
        top.append(logits.argmax(-1))
        divergence.append(kl(final, logits.double().log_softmax(-1)))
    return torch.stack(top, 1), torch.stack(divergence, 1)


def padded(rows, device):
    """Rows of ids of any lengths as a tensor (n, longest), filled on the right, where causality hides it."""
    longest = max(map(len, rows))
    return torch.tensor([list(row) + [0] * (longest - len(row)) for row in rows], device=device)


@torch.no_grad()
def final_states(net, prompts, batch=64):
    """Normalised final state at the last token of each prompt (lists of ids, lengths may differ), (n, d)."""
    out = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        last = torch.tensor([len(p) - 1 for p in part])
        out.append(net.encode(padded(part, net.norm.weight.device))[torch.arange(len(part)), last])
    return torch.cat(out)


@torch.no_grad()
def token_losses(net, x, y, batch=512):
    """Cross-entropy of every token, nats: ids x and next ids y (n, T) -> (n, T)."""
    h = torch.cat([net.encode(part) for part in x.split(8)]).flatten(0, 1)  # (n * T, d)
    parts = zip(h.split(batch), y.flatten().split(batch), strict=True)
    losses = [F.cross_entropy(unembed(net, states), ids, reduction="none") for states, ids in parts]
    return torch.cat(losses).view_as(y)


# ----------------------------------------------------------------------------------------------------
# Running from a layer


def check_streams(net):
    """UserError if a stream in the middle does not decide what follows."""
    if net.config.reinject:
        raise UserError(
            "reinject=True adds the tokens' embeddings before every block: nothing runs from a layer alone"
        )


@torch.no_grad()
def resid_streams(net, resid, layer=0):
    """Streams [resid, after block `layer`, ..., after the last], (B, T, d) each; resid enters `layer`.

    Raises UserError for a model that adds its embedding before every block.
    """
    check_streams(net)
    c = net.config
    cos, sin = rope_table(c.block_size, c.head_dim, c.rope_base, resid.device)
    streams = [resid]
    for block in net.blocks[layer:]:
        streams.append(block(streams[-1], cos[: resid.size(1)], sin[: resid.size(1)]))
    return streams


class LastToken:
    """The last token of each row alone: keys and values of the tokens before it are computed once.

    An edit of the last token's stream changes nothing before it, so it needs a forward pass of one token.
    idx (B, T) is padded on the right; `lengths` are the rows' tokens (None: T each). Raises UserError as
    `resid_streams` does.
    """

    @torch.no_grad()
    def __init__(self, net, idx, lengths=None):
        check_streams(net)
        c = net.config
        self.net = net
        lengths = lengths or [idx.size(1)] * len(idx)
        self.cache = KVCache(c, len(idx), max(lengths), idx.device, net.kv_dtype())
        net.encode(idx[:, : max(lengths) - 1], self.cache, [n - 1 for n in lengths])
        at = self.cache.advance(idx.device)  # (B, 1)
        table = rope_table(c.block_size, c.head_dim, c.rope_base, idx.device)
        self.cos, self.sin = (angles[at].unsqueeze(1) for angles in table)  # (B, 1, 1, head_dim / 2)
        rows = torch.arange(len(idx), device=idx.device)
        self.ids = idx[rows, torch.tensor(lengths, device=idx.device) - 1]  # (B,)

    @torch.no_grad()
    def embed(self):
        """The last tokens' embeddings (B, d)."""
        return self.net.vocab.embed(self.ids)

    @torch.no_grad()
    def streams(self, resid, layer=0):
        """Streams (n_layer + 1 - layer, B, d) of the last token for resid (B, d) entering `layer`."""
        streams = [resid[:, None]]  # (B, 1, d) each
        for i in range(layer, self.net.config.n_layer):
            streams.append(self.net.blocks[i](streams[-1], self.cos, self.sin, self.cache, i))
        return torch.cat(streams, dim=1).transpose(0, 1)


# ----------------------------------------------------------------------------------------------------
# Editing


@contextmanager
def edit_resid(net, edits):
    """While open, the stream resid (B, T, d) entering layer l is edits[l](resid)."""
    places = [*net.blocks, net.norm]
    handles = [
        places[layer].register_forward_pre_hook(lambda _, args, edit=edit: (edit(args[0]), *args[1:]))
        for layer, edit in edits.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def resid_pre(net, idx, layer):
    """The stream entering `layer` for ids idx (B, T), (B, T, d)."""
    seen = []

    def keep(resid):
        seen.append(resid)
        return resid

    with edit_resid(net, {layer: keep}):
        net.encode(idx)
    return seen[0]


def unit(v):
    """v (..., d) scaled to length 1; zero stays zero."""
    return v / v.norm(dim=-1, keepdim=True).clamp(min=1e-30)


def add_direction(resid, direction, strength):
    """resid (..., d) plus `strength` of its own norms of the direction (broadcast to resid), (..., d).

    A norm is that of the very vector changed, so one strength means the same at every layer and token.
    """
    return resid + strength * resid.norm(dim=-1, keepdim=True) * unit(direction)


def steer(net, direction, strength, layers, positions=slice(None)):
    """A context in which `add_direction` changes the stream entering each of `layers` at `positions`.

    `direction` is (d,), or (B, 1, d) to give each row its own; `strength` a float, or (B, 1, 1).
    """

    def edit(resid):
        resid = resid.clone()
        resid[:, positions] = add_direction(resid[:, positions], direction, strength)
        return resid

    return edit_resid(net, dict.fromkeys(layers, edit))


def with_embedding(net, E_in, E_out=None):
    """A ReFlow that shares all of `net` but its vocabulary: another E (n_tokens, d), or one for each side.

    Raises UserError where one E cannot serve both sides, or where blocks read it, too.
    """
    check_streams(net)
    if net.config.vocab == "gains" and E_out is None:
        raise UserError("vocab=gains has gains at its input: one E for both sides would be another model")
    with torch.device("meta"):  # takes no memory and no time
        other = ReFlow(net.config)
    other.blocks = net.blocks
    other.norm = net.norm
    other.vocab = FixedVocab(E_in, E_out)
    return other.train(net.training)
