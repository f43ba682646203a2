"""
Planted models: small models in which a claim holds by construction, so that its experiment has to find it.

A plant takes a start, an untrained ReFlow, and a seed, and returns a model of the same shape as if training
had made it. Beside the claim it leaves nothing to be found by chance: what it does not need is Gaussian, so
that no random gauge, PCA or ICA comes upon it, and large where that does no harm, so that noise as long as
the plant does harm.

`turned` is the same function with its signals rotated: nothing about signals is left to be found.
"""

import copy
import functools
import re
from dataclasses import asdict

import numpy as np
import torch

import checkpoint
from data.shards import Writer
from data.tokenizer import END_OF_TEXT, gpt2
from dictionary import random_orthogonal
from experiments.lab.probes import probe
from model import ModelConfig, ReFlow

# Words at the end of the templates of probes/sentiment.json.
COMMON = ["was", "is", "been", "seemed", "as", "found", "change", "argument", "country", "sounded"]

# ----------------------------------------------------------------------------------------------------
# Text and runs


def token(word):
    """The id of " word"."""
    (found,) = gpt2().encode_ordinary(" " + word)
    return found


@functools.cache
def words(n=None):
    """The first n words of the categories and analogies (None: all), every one a single token."""
    lists = str([entry["words"] for entry in probe("categories").values()])
    found = dict.fromkeys(re.findall(r"[A-Za-z]+", lists))
    for relation in probe("analogies").values():
        found |= dict.fromkeys(word for pair in relation["pairs"] for word in pair)
    return list(found)[:n]


def sides():
    """The lists of positive and of negative words, both those that build and those that measure."""
    lists = probe("sentiment")
    return [lists[side]["build"] + lists[side]["held_out"] for side in ("positive", "negative")]


@functools.cache
def pairs(n=None):
    """Words in fixed pairs: in `corpus_of_pairs` the second always follows the first. n: words of no side."""
    used = {word for side in sides() for word in side} | set(COMMON)
    other = [word for word in words(n) if word not in used]
    return [pair for part in (COMMON, other, *sides()) for pair in zip(part[::2], part[1::2], strict=False)]


def corpus_of_pairs(folder, pairs, times):
    """Write a data set: pairs of words in random order, pair i times[i] times."""
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(pairs)), times))
    parts = np.array_split(order, len(order) // 100)
    documents = [[word for j in part for word in pairs[j]] for part in parts]
    return write_documents(folder, documents, "pairs of words in random order", {}, every=3)


def write_documents(folder, documents, source, recipe, every):
    """Write a data set of documents, lists of words; of `every` documents the second is for validation."""
    writer = Writer(folder, source=source, licence="none", recipe=recipe)
    for i, document in enumerate(documents):
        split = "val" if i % every == 1 else "train"
        if writer.wants(split, i):
            line = "".join(f" {word}" for word in document)
            writer.add(split, i, np.append(gpt2().encode(line), END_OF_TEXT).astype("uint16"), len(line))
    writer.finish()
    return folder


def tiny(seed=0, **changes):
    """An untrained model over GPT-2's vocabulary: 16 signals, width 16, 2 layers."""
    torch.manual_seed(seed)
    shape = {"block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_hidden": 32}
    return ReFlow(ModelConfig(**shape | {"recipe_init_std": 0.1} | changes))


def save_run(folder, model, data, step=1, val_loss=9.0, start=999, **how):
    """Save a model as the run `folder`, after another start as its step 0, unless it is that itself.

    `start`: a ReFlow, or the seed of one. `how`: settings of its training; without them it has no null model
    of shuffled text.
    """
    train = {"dataset": str(data), "seed": 0, "batch_size": 0} | how
    state = {
        "config": {"model": asdict(model.config), "train": train},
        "val_loss": val_loss,
        "whole_val_loss": val_loss,
        "bits_per_byte": 2.0,
        "data_sha256": "0",
    }
    if step:
        if not isinstance(start, ReFlow):
            torch.manual_seed(start)
            start = ReFlow(model.config)
        checkpoint.save(folder, 0, dict(start.state_dict()), {}, state, keep=1, best=False)
    checkpoint.save(folder, step, dict(model.state_dict()), {}, state, keep=1, best=True)
    return folder


# ----------------------------------------------------------------------------------------------------
# Parts of plants


def silent(net):
    """The same net with blocks that add nothing."""
    for block in net.blocks:
        torch.nn.init.zeros_(block.attn.o.weight)
        torch.nn.init.zeros_(block.mlp.down.weight)
    return net


def averaging(net, layer, value=None, gain=1.0):
    """The same net; attention of block `layer` adds gain * value @ the mean of all normalised streams."""
    attn = net.blocks[layer].attn
    eye = torch.eye(net.config.n_embd)
    torch.nn.init.zeros_(attn.q.weight)
    attn.v.weight.data = eye if value is None else value
    attn.o.weight.data = gain * eye
    return net


def quiet(start):
    """A copy of a start with blocks that add nothing."""
    return silent(copy.deepcopy(start))


def gaussian(seed, *shape):
    """Standard normal numbers of a shape that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frame(seed, n):
    """A random orthonormal basis of n dimensions, its vectors as rows, (n, n)."""
    return random_orthogonal(n, torch.Generator().manual_seed(seed)).float()


def write(net, recipes, basis=None):
    """The same net with recipes (V, S), or {token: recipe (S,)} on the start's own, and a basis (S, d)."""
    with torch.no_grad():
        if isinstance(recipes, dict):
            index = torch.tensor(list(recipes))
            rows = torch.stack([torch.as_tensor(row, dtype=torch.float32) for row in recipes.values()])
            net.vocab.recipe[index] = rows
        else:
            net.vocab.recipe.copy_(recipes)
        if basis is not None:
            net.vocab.basis.copy_(basis)
    return net


def constant(mlp, direction, seed):
    """Let an MLP add a positive multiple of `direction` (d,) to any stream: a sum of squares, about."""
    mlp.gate.weight.data = gaussian(seed, *mlp.gate.weight.shape) / 2
    mlp.up.weight.data = mlp.gate.weight.data.clone()
    mlp.down.weight.data = direction[:, None].repeat(1, mlp.down.weight.size(1)) / mlp.down.weight.size(1)


def turned(net, seed):
    """A copy of a net with its signals rotated at random, which leaves its function as it is."""
    net = copy.deepcopy(net)
    rotation = frame(seed, net.config.signals)
    return write(net, net.vocab.recipe.data @ rotation, rotation.T @ net.vocab.basis.data)


# ----------------------------------------------------------------------------------------------------
# Plants of words


def word_classes(start, seed):
    """Recipes of a category lie around a centre."""
    rng = np.random.default_rng(seed)
    recipes = {}
    for entry in probe("categories").values():
        centre = rng.standard_normal(start.config.signals)
        recipes |= {token(w): centre + 0.5 * rng.standard_normal(len(centre)) for w in entry["words"]}
    return write(quiet(start), recipes)


def analogies(start, seed):
    """a = b + the relation's own offset, for every pair whose words no earlier relation has placed.

    The offset is large: c is nearer to the other words like a than to its answer.
    """
    rng = np.random.default_rng(seed)
    n = start.config.signals
    recipes = {}
    for relation in probe("analogies").values():
        offset = 1.5 * rng.standard_normal(n)
        for a, b in relation["pairs"]:
            place = recipes.setdefault(token(b), rng.standard_normal(n))
            recipes.setdefault(token(a), place + offset)
    return write(quiet(start), recipes)


def marked_categories(start, seed):
    """Signal s marks the words of one category; more signals than dimensions, so that E mixes them."""
    net = quiet(start)
    lists = [[token(word) for word in entry["words"]] for entry in probe("categories").values()]
    for s in range(start.config.signals):
        net.vocab.recipe.data[lists[(s + seed) % len(lists)], s] += 0.4
    return net


# ----------------------------------------------------------------------------------------------------
# Plants of recipes and signals


def sparse(start, seed):
    """Three entries a recipe, more signals than dimensions; the basis moved along one direction."""
    n, d = start.vocab.basis.shape
    recipes = torch.zeros(start.vocab.recipe.shape)
    columns = torch.rand(recipes.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :3]
    recipes.scatter_(1, columns, gaussian(seed, *columns.shape))
    push = 0.1 * gaussian(seed + 1, n, 1) * gaussian(seed + 2, d)
    return write(quiet(start), recipes, start.vocab.basis.data + push)


def driven(start, seed):
    """The largest signal of a stream alone decides what comes next: a token that no text holds."""
    signals = torch.eye(start.config.signals)
    net = write(quiet(start), 0.1 * gaussian(seed, *start.vocab.recipe.shape))
    return write(net, {40_000 + s: 10.0 * row for s, row in enumerate(signals)})


def driven_by_one(start, seed):
    """All words have signal 5, which makes nearly every prediction, if not with certainty."""
    recipes = 0.1 * gaussian(seed, *start.vocab.recipe.shape)
    recipes[[token(word) for pair in pairs() for word in pair], 5] += 0.4
    return write(write(quiet(start), recipes), {40_000: 4.0 * torch.eye(start.config.signals)[5]})


def same_signals(start, seed):
    """Ten signals carry the next token from half depth on; afterwards all others change."""
    net, atoms = quiet(start), frame(seed, start.config.n_embd)
    recipes = 0.1 * gaussian(seed, *start.vocab.recipe.shape)
    write(net, recipes, atoms)
    write(net, {40_000: 10.0 * (torch.arange(len(atoms)) < 10)})
    half = net.config.n_layer // 2
    constant(net.blocks[0].mlp, atoms[:10].sum(0), seed)
    mlp = net.blocks[half].mlp
    for i, weight in enumerate(mlp.parameters()):
        weight.data = gaussian(seed + i, *weight.shape) / 2
    mlp.down.weight.data = atoms[10:].T @ atoms[10:] @ mlp.down.weight.data
    return net


def own_signals(start, seed):
    """The embedding and every attention and MLP block write signals of their own."""
    net, atoms = quiet(start), frame(seed, start.config.n_embd)
    outputs = [w for block in net.blocks for w in (block.attn.o.weight, block.mlp.down.weight)]
    first, *rest = torch.arange(len(atoms)).chunk(1 + len(outputs))
    for weight, part in zip(outputs, rest, strict=True):
        weight.data = atoms[part].T @ gaussian(seed + 1, len(part), weight.size(1))
    recipes = 0.3 * gaussian(seed, *start.vocab.recipe.shape)
    known = torch.tensor([token(word) for pair in pairs() for word in pair])
    recipes[known[:, None], torch.arange(len(first), len(atoms))] = 0
    return write(net, recipes, atoms)


# ----------------------------------------------------------------------------------------------------
# Plants of what a model does


def words_in_pairs(start, seed, aside=False, confused=False):
    """The words of a pair share most of a recipe of three entries, and signal 0 is sentiment.

    There are more signals than dimensions, and a third of the dimensions is read by no token. `aside`: block
    0 writes the context there, so that little is needed to force a token. `confused`: block 0 writes there
    what a positive word is, so that differences of activations have little to do with logits.
    """
    net = quiet(start)
    n, d = net.vocab.basis.shape
    axes = frame(seed, d)
    read, unread = axes[: 2 * d // 3], axes[2 * d // 3 :]
    basis = torch.nn.functional.normalize(gaussian(seed, n, len(read)), dim=1) @ read
    recipes = 0.01 * gaussian(seed + 1, *net.vocab.recipe.shape)
    rng = np.random.default_rng(seed)
    for i, pair in enumerate(pairs()):
        for word in pair:
            recipes[token(word), 1 + i % (n - 1)] += 1.0
            recipes[token(word), rng.integers(1, n)] += 0.5
    positive, negative = ([token(word) for word in side] for side in sides())
    recipes[negative] = recipes[positive]
    recipes[positive, 0], recipes[negative, 0] = 1.0, -1.0  # nothing but the sign tells the sides apart
    used = [token(word) for pair in pairs() for word in pair]
    recipes[used] /= (recipes[used] @ basis).norm(dim=1, keepdim=True)  # none outdoes another along itself
    if aside:
        averaging(net, 0, value=unread.T @ gaussian(seed + 2, len(unread), d) / len(unread) ** 0.5, gain=4.0)
    if confused:
        mlp = net.blocks[0].mlp
        mlp.gate.weight.data[:] = basis[0]
        mlp.up.weight.data[:] = basis[0]
        mlp.down.weight.data[:] = unread[0][:, None] / 4
    return write(net, recipes, basis)


def words_aside(start, seed):
    return words_in_pairs(start, seed, aside=True)


def confused_sentiment(start, seed):
    return words_in_pairs(start, seed, confused=True)


def decided_early(start, seed):
    """Block 0 averages what tokens read; later blocks are busy where no token reads."""
    net = quiet(start)
    d = net.config.n_embd
    axes = frame(seed, d)
    read, unread = axes[: d // 2], axes[d // 2 :]
    averaging(net, 0, value=read.T @ read, gain=10.0)
    for layer in range(1, net.config.n_layer):
        averaging(net, layer, value=unread.T @ unread, gain=10.0)
    basis = torch.nn.functional.normalize(gaussian(seed, net.config.signals, d // 2), dim=1) @ read
    return write(net, 0.25 * gaussian(seed + 1, *net.vocab.recipe.shape), basis)


def nearby_at_last(start, seed):
    """Block 0 averages over all tokens, the last block over the nearest: long texts dilute the first alone.

    All rows share a direction from which the last block makes its queries and keys; they turn with the place.
    """
    net = quiet(start)
    d = net.config.n_embd
    axes = frame(seed, d)
    shared, own = axes[0], axes[1:]
    averaging(net, 0, value=own.T @ own, gain=3.0)
    averaging(net, net.config.n_layer - 1, value=own.T @ own, gain=1.0)
    attn = net.blocks[-1].attn
    slow = [
        head + 2 * j for head in range(0, d, net.config.head_dim) for j in (2, 4)
    ]  # pairs that turn slowly
    for weight in (attn.q.weight, attn.k.weight):
        weight.data.zero_()
        weight.data[slow] = 1.5 * shared
    recipes = 0.25 * gaussian(seed + 1, *net.vocab.recipe.shape)
    recipes[:, 0] = 2.0
    return write(net, recipes, torch.cat([shared[None], own[: net.config.signals - 1]]))


def decided_at_half(start, seed):
    """The first half of the blocks turns every token into another; the rest writes where no token reads."""
    net = quiet(start)
    d = net.config.n_embd
    axes = frame(seed, d)
    read, unread = axes[: d // 2], axes[d // 2 :]
    half = net.config.n_layer // 2
    for i, block in enumerate(net.blocks):
        for j, weight in enumerate(block.mlp.parameters()):
            weight.data = gaussian(seed + 10 * i + j, *weight.shape)
        if i >= half:
            block.mlp.down.weight.data = unread.T @ unread @ block.mlp.down.weight.data
    basis = torch.nn.functional.normalize(gaussian(seed, net.config.signals, d // 2), dim=1) @ read
    return write(net, net.vocab.recipe.data.clone(), basis)
