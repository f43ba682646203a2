"""
Look into a trained model: what each signal adds to a prediction, what a signal or a token is made of.

    python reflow.py why "The capital of France is" --target=Paris --foil=London
    python reflow.py signal 17
    python reflow.py token king
    python reflow.py neighbors queen --run=out/reflow-nano

In Python or a notebook:
    from reflow import load
    m = load("release/reflow-mini")
    m.attribute("The capital of France is", "Paris", foil="London").top(5)
    m.signal(17); m.token(" king"); m.neighbors(" king")
    m.generate("The people of", steer={" God": 0.1}, layers=range(0, 3))
    m.cache("The capital of France is")["blocks.2.resid_post"]

Contributions of signals are exact: they sum to the logit difference. The signals can be rotated or skewed
without changing the model, so attributions are shown beside those of random rotations, and neighbours beside
those in a random skewed gauge. A table is a look at one example, not a claim; claims are in experiments/.
"""

import re
import sys
import textwrap
from contextlib import ExitStack
from dataclasses import dataclass
from html import escape

import threads
import torch

import attribution
import checkpoint
import configurator
import dictionary
import hooks
from configurator import UserError
from data.datasets import run_words
from data.words import sightings
from hardware import pick_device

N_ROTATIONS = 5  # random rotations beside a table; an experiment takes 19
N_FREQUENT = 2000  # tokens whose mean is subtracted before cosines, as in experiments/nearest_neighbors.py
WIDTH = 100  # columns of a terminal
LOOK = "a look, not a claim"


class Card:
    """A table with a title and notes: text in a terminal, HTML in a notebook, `to_pandas()` a DataFrame."""

    def __init__(self, title, columns, rows, notes=()):
        self.title = title
        self.columns = columns
        self.rows = rows  # lists of int, float, text or None
        self.notes = [*notes, LOOK]

    def cells(self):
        """The table as text, [[cell]]."""

        def text(cell):
            if cell is None:
                return ""
            return f"{cell:.3f}" if isinstance(cell, float) else str(cell)

        return [[text(cell) for cell in row] for row in self.rows]

    def __repr__(self):
        table = [self.columns, *self.cells()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        is_text = [all(isinstance(row[i], str) for row in self.rows) for i in range(len(self.columns))]
        lines = [self.title]
        for row in table:
            cells = zip(row, widths, is_text, strict=True)
            line = "  ".join(f"{cell:{'<' if text else '>'}{width}}" for cell, width, text in cells)
            lines.append(cut(f"  {line}".rstrip()))
        return "\n".join(lines + [wrapped for note in self.notes for wrapped in wrap(note)])

    def _repr_html_(self):
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self.cells()]
        rows = "".join(f"<tr>{row}</tr>" for row in body)
        notes = "<br>".join(map(escape, self.notes))
        return f"<b>{escape(self.title)}</b><table><tr>{head}</tr>{rows}</table><small>{notes}</small>"

    def to_pandas(self):
        """The table as a DataFrame. Raises UserError without pandas."""
        try:
            import pandas
        except ImportError:
            raise UserError("to_pandas needs pandas: pip install pandas") from None
        return pandas.DataFrame(self.rows, columns=self.columns)


def cut(line):
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def wrap(text):
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


class Attribution:
    """What each signal adds to logit[target] - logit[foil] after one prompt; the sum is exact."""

    def __init__(self, model, prompt, pred):
        self.model = model
        self.prompt = prompt
        self.target = model.tokenizer.token_text(pred.target[0])
        self.foil = model.tokenizer.token_text(pred.foil[0])
        self.activations = model.dictionary.activations(pred.h)[0]  # (S,)
        self.contributions = attribution.contributions(pred, model.dictionary)[0].cpu().numpy()  # (S,)
        self.prediction = pred

    def rotated(self, k):
        """Sizes of the k largest contributions in each of N_ROTATIONS random rotations, (N_ROTATIONS, k)."""
        pred = self.prediction
        pair = self.model.dictionary.part([pred.target[0], pred.foil[0]])  # two rows: cheap to rotate
        sizes = []
        for seed in range(N_ROTATIONS):
            turned = dictionary.rotated(pair, torch.Generator().manual_seed(seed))
            terms = turned.activations(pred.h)[0] * (turned.codes[0] - turned.codes[1])  # (S,)
            sizes.append(terms.abs().topk(k).values)
        return torch.stack(sizes).cpu()

    def top(self, k=10):
        """A Card of the k largest contributions by size, of all others together, and of their sum."""
        if k < 1:
            raise UserError(f"top({k}): ask for at least one signal")
        values = torch.from_numpy(self.contributions)
        order = values.abs().argsort(descending=True)[:k]
        control = self.rotated(len(order))
        mean, largest = control.mean(0).tolist(), control.amax(0).tolist()
        size = values.abs().sum().clamp(min=1e-30)
        rows = []
        for i, s in enumerate(order.tolist()):
            codes = self.model.dictionary.codes[:, s] * self.activations[s].sign()
            ends = [self.model.top(sign * codes, 3) for sign in (1, -1)]
            share = f"{values[s].abs() / size:.1%}"
            rows.append([self.model.label(s), values[s].item(), share, mean[i], largest[i], *ends])
        rest = values.double().sum().item() - values[order].double().sum().item()
        share = f"{1 - values[order].abs().sum() / size:.1%}"
        rows.append([f"{len(values) - len(order)} others", rest, share, None, None, "", ""])
        rows.append(["sum", values.double().sum().item(), "100.0%", None, None, "", ""])
        title = f'"{self.prompt}": logit("{self.target}") - logit("{self.foil}"), nats, by {self.model.unit}'
        notes = [
            "The sum is exact. share: of the sizes of all contributions.",
            f"rotated: size of the contribution of this rank in {N_ROTATIONS} random rotations, "
            "mean and max.",
            self.model.left_out(),
        ]
        asked = (self.prediction.target[0], self.prediction.foil[0])
        notes += [self.model.name(token) for token in asked if self.model.is_rare(token)]
        columns = [self.model.unit, "nats", "share", "rotated", "max", "promotes here", "suppresses here"]
        return self.model.card(title, columns, rows, notes)

    def __repr__(self):
        return repr(self.top())

    def _repr_html_(self):
        return self.top()._repr_html_()


class Streams(dict):
    """The streams of a prompt by TransformerLens' names, with or without `hook_`; tensors (1, T, ...)."""

    def __missing__(self, name):
        short = name.replace("hook_", "").replace("ln_final.normalized", "ln_final")
        if short != name and short in self:
            return self[short]
        raise UserError(f"no stream {name}: there are {', '.join(self)}")

    def __repr__(self):
        return "\n".join(f"{name:22} {tuple(stream.shape)}" for name, stream in self.items())


def signal_or_word(text):
    """The number of a signal that is written as s17; any other text is a word."""
    found = re.fullmatch(r"s(\d+)", text)
    return int(found[1]) if found else text


def direction(net, name, tokenizer):
    """The direction (d,) to steer with: of a signal, by number, or the embedding of a word of one token."""
    if isinstance(name, str):
        token = tokenizer.token_id(name, net.config.n_tokens)
        return net.vocab.embed(torch.tensor([token], device=net.norm.weight.device))[0].detach()
    basis = getattr(net.vocab, "basis", None)
    if basis is None:
        raise UserError("a plain GPT has no signals, only words")
    if not 0 <= name < len(basis):
        raise UserError(f"no signal {name}: signals are s0 to s{len(basis) - 1}")
    return basis[name].detach()


class Model:
    """A trained model, its tokenizer and token counts. `net` and `words` are loaded unless given."""

    def __init__(self, ckpt, device="auto", net=None, words=None):
        self.checkpoint = ckpt
        self.device = pick_device(device) if isinstance(device, str) else device
        self.net = net or ckpt.load_model(self.device)
        self.dictionary = dictionary.native(self.net)
        self.words = words or run_words(ckpt.path, ckpt.state)
        self.tokenizer = self.words.tokenizer
        self.is_dense = self.net.config.vocab == "dense"
        self.unit = "coordinate" if self.is_dense else "signal"
        self.shown = self.words.shown_tokens()  # what tables choose from

    def __repr__(self):
        c = self.net.config
        kind = " (a plain GPT has no signals)" if self.is_dense else ""
        return (
            f"{self.checkpoint.name}, step {self.checkpoint.step}: {c.n_layer} layers, width {c.n_embd}, "
            f"{self.dictionary.n_signals} {self.unit}s{kind}"
        )

    # -- checking arguments ------------------------------------------------------------------------

    def encode(self, prompt):
        """A prompt as ids (1, T). Raises UserError."""
        ids = self.tokenizer.encode_ordinary(prompt)
        if not ids:
            raise UserError("the prompt is empty: give some words")
        if len(ids) > self.net.config.block_size:
            raise UserError(
                f"the prompt has {len(ids)} tokens: the context holds {self.net.config.block_size}"
            )
        return torch.tensor([ids], device=self.device)

    def token_id(self, word):
        """The id of a word that is one token of this model. Raises UserError."""
        return self.tokenizer.token_id(word, self.net.config.n_tokens)

    def check_signal(self, s):
        """UserError if there is no signal s."""
        last = self.dictionary.n_signals - 1
        if not 0 <= s <= last:
            raise UserError(f"no {self.unit} {s}: {self.unit}s are 0 to {last}")

    def label(self, s):
        """The number of signal s; what a sparse vocabulary has beside its signals says what it is."""
        c = self.net.config
        if c.vocab != "sparse" or s < c.signals:
            return str(s)
        return f"{s} {'core' if s < c.signals + c.n_core else 'mean'}"

    # -- what tables say about tokens --------------------------------------------------------------

    @property
    def least_shown(self):
        """How often training has seen the rarest token that tables list."""
        return int(self.words.counts[self.shown].min()) if len(self.shown) else 0

    def is_rare(self, token):
        """Whether tables leave a token out because training hardly saw it."""
        return int(self.words.counts[int(token)]) < self.least_shown

    def name(self, token):
        """A token for a title, with a mark if it is rare."""
        rare = f" (rare: {sightings(self.words.counts[int(token)])} in {self.words.where})"
        return f'"{self.tokenizer.token_text(token)}"{rare if self.is_rare(token) else ""}'

    def left_out(self):
        """The note that tells which tokens a table leaves out."""
        if self.words.where != "training":
            return "How often the model has read a token is not known: tables choose from all of them."
        return f"Tokens seen fewer than {self.least_shown} times in {self.words.where} are left out."

    def top(self, scores, k):
        """The k frequent tokens with the highest scores (n_tokens,), as text."""
        return self.words.top(scores, k, self.shown)

    def extremes(self, scores, k, largest=True):
        """[[text, score]] of the k frequent tokens with the largest or smallest scores (n_tokens,)."""
        shown = torch.from_numpy(self.shown).to(scores.device)
        best = scores[shown].topk(min(k, len(shown)), largest=largest)
        texts = [self.tokenizer.token_text(shown[i]) for i in best.indices]
        return [list(pair) for pair in zip(texts, best.values.tolist(), strict=True)]

    def card(self, title, columns, rows, notes):
        """A Card; for a plain GPT, a note says that its rows are coordinates."""
        if self.is_dense:
            notes = [*notes, "A plain GPT has no signals: these are the coordinates of its embedding E."]
        return Card(title, columns, rows, notes)

    # -- cards -------------------------------------------------------------------------------------

    def attribute(self, prompt, target=None, foil=None):
        """The Attribution of logit[target] - logit[foil]; None: the likeliest token, the likeliest other."""
        pred = attribution.predict(self.net, self.encode(prompt))
        if target is not None:
            pred.target[0] = self.token_id(target)
        if foil is not None:
            pred.foil[0] = self.token_id(foil)
        else:
            ranked = pred.p[0].topk(2).indices
            pred.foil[0] = ranked[1] if ranked[0] == pred.target[0] else ranked[0]
        if pred.foil[0] == pred.target[0]:
            raise UserError(
                f"target and foil are both {self.tokenizer.token_text(pred.target[0])!r}: give two tokens"
            )
        return Attribution(self, prompt, pred)

    def signal(self, s, k=10):
        """A Card of signal s: the known tokens with its largest and smallest codes."""
        self.check_signal(s)
        d = self.dictionary
        high, low = (self.extremes(d.codes[:, s], k, largest) for largest in (True, False))
        rows = [[*a, *b] for a, b in zip(high, low, strict=True)]
        usage = (d.part(self.shown).codes ** 2).sum(0)  # (S,)
        notes = [
            "Tied embedding: the tokens that it promotes at the output also carry it most at the input.",
            f"usage: {usage[s] / usage.sum():.2%} of the squared codes of these tokens, rank "
            f"{int((usage > usage[s]).sum()) + 1} of {d.n_signals}. Nearest: "
            + ", ".join(f"{i} (cosine {cosine:.2f})" for i, cosine in d.nearest_signals(s, 3)),
            self.left_out(),
        ]
        return self.card(
            f"{self.unit} {self.label(s)}", ["promotes", "code", "suppresses", "low code"], rows, notes
        )

    def token(self, word, k=8):
        """A Card of a token's recipe: its k largest codes by size, with the tokens of these signals."""
        token = self.token_id(word)
        recipe = self.dictionary.codes[token]  # (S,)
        rows = []
        for s in recipe.abs().topk(min(k, len(recipe))).indices.tolist():
            codes = self.dictionary.codes[:, s]
            rows.append([self.label(s), recipe[s].item(), self.top(codes, 4), self.top(-codes, 4)])
        near = ", ".join(
            f"{text} {value:.2f}" for text, value in self.nearest(self.dictionary.codes, token, 5)
        )
        notes = [
            f"{sightings(self.words.counts[token])} in {self.words.where}. Neighbours by recipe: {near}",
            self.left_out(),
        ]
        columns = [self.unit, "code", "it promotes", "it suppresses"]
        return self.card(f"{self.name(token)}, token {token}: recipe", columns, rows, notes)

    def nearest(self, codes, token, k):
        """[(text, cosine)] of the k listed tokens with centred rows of codes (V, n) nearest to its own."""
        frequent = torch.from_numpy(self.words.known_tokens()[:N_FREQUENT]).to(self.device)
        mean = codes[frequent].mean(0)
        shown = torch.from_numpy(self.shown).to(self.device)
        shown = shown[shown != token]
        cosine = torch.nn.functional.cosine_similarity(codes[shown] - mean, codes[token] - mean, dim=1)
        best = cosine.topk(min(k, len(shown)))
        return [
            (self.tokenizer.token_text(shown[i]), value.item())
            for value, i in zip(best.values, best.indices, strict=True)
        ]

    def neighbors(self, word, k=10):
        """A Card of a token's nearest tokens by recipe; controls: by row of E, and in a random skewed gauge.

        A rotation changes no cosine of recipes, so the random gauge is not orthogonal (dictionary.skewed).
        """
        token = self.token_id(word)
        gauge = dictionary.skewed(self.dictionary, torch.Generator().manual_seed(0))
        spaces = [self.dictionary.codes, self.dictionary.matrix(), gauge.codes]
        lists = [self.nearest(codes, token, k) for codes in spaces]
        rows = [[cell for pair in row for cell in pair] for row in zip(*lists, strict=True)]
        notes = [
            f"Cosines after subtracting the mean of the {N_FREQUENT} most frequent tokens.",
            self.left_out(),
            f"skewed: a random change of {self.unit}s that leaves every logit as it is.",
        ]
        columns = ["recipe", "cosine", "E", "cosine in E", "skewed", "cosine skewed"]
        return self.card(f"neighbours of {self.name(token)}", columns, rows, notes)

    # -- running -----------------------------------------------------------------------------------

    def generate(
        self, prompt, steer=None, layers=range(0, 3), max_new_tokens=50, temperature=0.8, top_k=200, seed=0
    ):
        """The prompt and its continuation. `steer`: {word or signal number: strength}, see hooks.steer."""
        if layers and not 0 <= min(layers) <= max(layers) <= self.net.config.n_layer:
            raise UserError(f"layers go from 0 to {self.net.config.n_layer}, the final norm")
        prompts = self.encode(prompt).tolist()
        how = {"temperature": temperature, "top_k": top_k, "stop": self.tokenizer.end_of_text}
        how["generator"] = torch.Generator(self.device).manual_seed(seed)
        with ExitStack() as stack:
            for name, strength in (steer or {}).items():
                stack.enter_context(
                    hooks.steer(self.net, direction(self.net, name, self.tokenizer), strength, layers)
                )
            (ids,) = self.net.generate(prompts, max_new_tokens, **how)
        return prompt + self.tokenizer.decode(ids)

    @torch.no_grad()
    def cache(self, prompt):
        """The Streams of a prompt: embed, blocks.{i}.resid_pre and resid_post, ln_final, signals."""
        streams = hooks.resid_streams(self.net, self.net.vocab.embed(self.encode(prompt)))
        found = Streams(embed=streams[0])
        for i, (before, after) in enumerate(zip(streams, streams[1:], strict=False)):
            found[f"blocks.{i}.resid_pre"] = before
            found[f"blocks.{i}.resid_post"] = after
        found["ln_final"] = self.net.norm(streams[-1])
        found["signals"] = self.dictionary.activations(found["ln_final"])
        return found


def load(run=None, device="auto"):
    """The Model of a run, a step_... folder or a release. None: see `checkpoint.default_run`."""
    return Model(checkpoint.open_run(run), device)


@dataclass
class LookConfig:
    run: str | None = None  # a run's folder or one of its step_... folders; None: the newest with signals
    target: str | None = None  # why: the token to explain; None: the likeliest
    foil: str | None = None  # why: the token that it is compared with; None: the likeliest other one
    k: int = 10  # rows of the table
    device: str = "auto"  # auto: cuda, then mps, then cpu


def main():
    argv = sys.argv[1:]
    if {"-h", "--help"} & set(argv):
        configurator.parse(LookConfig)
    usage = (
        'usage: python reflow.py why "The capital of France is" | signal 17 | token king | neighbors queen'
    )
    if len(argv) < 2 or argv[0] not in ("why", "signal", "token", "neighbors") or argv[1].startswith("--"):
        raise UserError(usage)
    command, what, *rest = argv
    (c,) = configurator.parse(LookConfig, argv=rest)
    if c.k < 1:
        raise UserError(f"--k={c.k}: at least 1")
    if command == "signal" and not what.isdecimal():
        raise UserError(f"signal {what}: give the number of a signal, such as 17")
    model = load(c.run, c.device)
    if command == "why":
        print(model.attribute(what, c.target, c.foil).top(c.k))
    elif command == "signal":
        print(model.signal(int(what), c.k))
    else:
        print(getattr(model, command)(what, c.k))


if __name__ == "__main__":
    configurator.run(main)
