"""
Edits of a model while it runs: signals or directions of words, scaled or added.

    from explorer.edits import Edit, edited
    from reflow import load

    m = load("release/reflow-mini")
    with edited(m, [Edit("add", "God", 0.15, "layers", 0, 2)]):
        print(m.generate("The people of"))

    add     the direction, `value` times as long as the stream, enters the stream (hooks.steer)
    scale   what there is of it is multiplied by `value`; 0 removes it

    input   the embeddings of all tokens; a signal is scaled there in every recipe
    layers  the streams entering blocks `start` to `stop`, n_layer being the final norm
    output  the input of the final norm; a signal is scaled in the sum that makes the logits, exactly

The control of an edit writes what the edit writes, of equal size at every token, in a random direction.
"""

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

import hooks
import reflow
from configurator import UserError
from model import Vocab


@dataclass
class Edit:
    op: Literal["add", "scale"]
    name: Annotated[int, Field(ge=0)] | Annotated[str, Field(max_length=100)]  # a signal, or a word
    value: Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]
    place: Literal["input", "layers", "output"] = "output"
    start: Annotated[int, Field(ge=0)] = 0
    stop: Annotated[int, Field(ge=0)] = 0

    def layers(self, n_layer):
        """The layers whose stream it changes. UserError if the model has no such layers."""
        if self.place != "layers":
            return range(0, 1) if self.place == "input" else range(n_layer, n_layer + 1)
        if not self.start <= self.stop <= n_layer:
            raise UserError(f"layers {self.start} to {self.stop}: they go up from 0 to {n_layer}")
        return range(self.start, self.stop + 1)


class Unbuilt(Vocab):
    """A vocabulary without what it builds for speed, which would not know of edits."""

    def __init__(self, vocab):
        super().__init__()
        self.embed, self.signals, self.recipes = vocab.embed, vocab.signals, vocab.recipes
        self.matrix = vocab.matrix


def scaled(x, value, read, write):
    """x (..., n), its part along `read` (n,), of length 1, times `value`; the change goes along `write`."""
    return x + (value - 1) * (x @ read)[..., None] * write


@contextmanager
def replaced(vocab, name, make):
    """While open, the method `name` of a vocabulary is make(the method)."""
    before = vars(vocab).get(name)
    setattr(vocab, name, make(getattr(vocab, name)))
    try:
        yield
    finally:
        if before is None:
            delattr(vocab, name)
        else:
            setattr(vocab, name, before)


@contextmanager
def edited(model, edits, control=None):
    """While open, a reflow.Model runs with `edits`; `control`: the seed of random directions instead."""
    vocab = model.net.vocab
    with ExitStack() as stack:
        if edits and type(vocab).built is not Vocab.built:
            stack.enter_context(replaced(vocab, "built", lambda built: lambda: Unbuilt(vocab)))
        for i, edit in enumerate(edits):
            generator = None if control is None else torch.Generator().manual_seed(1000 * control + i)
            stack.enter_context(one(model, edit, generator))
        yield


@contextmanager
def in_embeddings(net, column, s, write):
    """While open, `write` (d,) is added to each token's embedding, times column (n_tokens, 1) of signal s."""
    gain = getattr(net.vocab, "gain", None)  # of vocab=gains, at the input and before each block
    own = column if gain is None else column * gain[0][s]
    with ExitStack() as stack:
        stack.enter_context(
            replaced(net.vocab, "embed", lambda embed: lambda idx: embed(idx) + own[idx] * write)
        )
        if net.config.reinject:

            def injected(inject):
                return lambda idx, layer: inject(idx, layer) + column[idx] * gain[1 + layer][s] * write

            stack.enter_context(replaced(net.vocab, "inject", injected))
        yield


def random_like(v, generator):
    """v (n,), or with a generator a random direction of the same length."""
    if generator is None:
        return v
    return hooks.unit(torch.randn(v.shape, generator=generator).to(v)) * v.norm()


def one(model, edit, generator):
    """The context of a single edit."""
    net, d = model.net, model.dictionary
    layers = edit.layers(net.config.n_layer)
    is_signal = isinstance(edit.name, int)
    if is_signal:
        model.check_signal(edit.name)
        atom, direction = d.basis[edit.name], d.atoms[edit.name]  # (d,) each
    else:
        atom = direction = hooks.unit(reflow.direction(net, edit.name, model.tokenizer))
    if edit.op == "add":
        return hooks.steer(net, random_like(direction, generator), edit.value, layers)
    if is_signal and edit.place == "output":  # of A (..., S), so a term of every logit
        own = torch.eye(d.n_signals, device=atom.device)[edit.name]
        change = partial(scaled, value=edit.value, read=own, write=random_like(own, generator))
        return replaced(net.vocab, "signals", lambda signals: lambda h: change(signals(h)))
    write = random_like(atom if edit.place == "input" else direction, generator)
    if is_signal and edit.place == "input":
        return in_embeddings(net, (edit.value - 1) * d.recipes[:, edit.name, None], edit.name, write)
    change = partial(scaled, value=edit.value, read=direction, write=write)
    return hooks.edit_resid(net, dict.fromkeys(layers, change))
