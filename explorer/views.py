"""
What the page asks for, as JSON. Numbers come from reflow.py, attribution.py, hooks.py and the experiments.
"""

import functools
import threading
import time

import torch
import torch.nn.functional as F

import attribution
import dictionary
import hooks
import reflow
from configurator import UserError
from data.words import sightings
from experiments.lab.analogies import METHODS
from experiments.lab.stats import exchanged
from explorer.cards import Cards
from explorer.edits import edited

MOST_TOKENS = 256  # of a prompt; the last ones are read
MOST_COLUMNS = 64  # of the heat map
BARS = 12
ABOUT_SIGNALS = ("signal_codebook", "ablate_signal")  # experiments whose claims are about single signals
STRONG = 8  # signals of a recipe that tokens may share


class Explorer:
    """One model in memory. `record()` gives the results of its experiments, `others` those of other runs.

    `beside`: the name of the one among `others` that stands beside from the start, if any.
    """

    def __init__(self, lab, record, others, beside=None):
        self.lab = lab
        self.cards = Cards(lab)
        self.model = self.cards.model
        self.lock = self.cards.lock
        self.record = record
        self.others = others  # {name: function like record}
        self.beside = beside
        self.own_claims = None  # read anew whenever a page is opened
        self.streams = functools.lru_cache(8)(self._streams)
        self.ends = functools.lru_cache(4096)(self._ends)
        self.fitting = threading.Lock()
        self.fitted = {}
        self.shared = functools.cache(self._shared)
        self.turns = functools.cache(self._turns)

    # -- shared ------------------------------------------------------------------------------------

    def ids(self, text):
        """(ids of a prompt as a tuple, how many tokens before them are left out)."""
        tokenizer, config = self.model.tokenizer, self.model.net.config
        ids = tokenizer.encode_prompt(text) or [tokenizer.end_of_text]  # a document begins after the last
        kept = ids[-min(MOST_TOKENS, config.block_size) :]
        return tuple(kept), len(ids) - len(kept)

    @torch.no_grad()
    def _streams(self, ids):
        """Streams (T, d) of a prompt entering each layer and the final norm."""
        net = self.model.net
        streams = {}

        def keep(resid, layer):
            streams[layer] = resid[0]
            return resid

        places = {layer: functools.partial(keep, layer=layer) for layer in range(net.config.n_layer + 1)}
        with self.lock, hooks.edit_resid(net, places):
            net.encode(torch.tensor([ids], device=self.model.device))
        return [streams[layer] for layer in places]

    def dictionary(self, name):
        """native, rotated, pca or ica of the model's E. UserError if ICA fails."""
        if name in self.cards.dictionaries:
            return self.cards.dictionaries[name]
        with self.fitting:  # once, whoever asks
            if name not in self.fitted:
                self.fitted[name] = self.fit(name)
        return self.fitted[name]

    def fit(self, name):
        """pca or ica of the model's E, fitted to the tokens that the experiments fit it to."""
        E = self.lab.model.E
        fit = torch.from_numpy(self.lab.words.tokens_to_fit(E.size(1)))
        return dictionary.pca(E, fit) if name == "pca" else dictionary.ica(E, fit, self.lab.seed)

    def _ends(self, name, s):
        """The words that a signal promotes and suppresses, three each."""
        codes = self.dictionary(name).codes[:, s]
        return [self.model.top(sign * codes, 3) for sign in (1, -1)]

    def token_of(self, word):
        """The id of a token given as an id or as a word; None stays None. UserError."""
        if isinstance(word, str):
            return self.model.token_id(word)
        if word is not None and not 0 <= word < self.model.net.config.n_tokens:
            raise UserError(f"no token {word}: tokens are 0 to {self.model.net.config.n_tokens - 1}")
        return word

    def name(self, token):
        return self.model.tokenizer.token_text(token)

    def place(self, ids, position, layer=None):
        """(position, layer) within a prompt and the model. UserError."""
        position = len(ids) - 1 if position is None else position
        layer = self.model.net.config.n_layer if layer is None else layer
        if position >= len(ids) or layer > self.model.net.config.n_layer:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the model {self.model.net.config.n_layer} layers"
            )
        return position, layer

    def likeliest(self, p, k=BARS, before=None):
        """The k likeliest tokens of p (n_tokens,)."""
        best = p.topk(min(k, len(p))).indices.tolist()
        rows = [{"id": i, "text": self.name(i), "p": p[i].item()} for i in best]
        if before is not None:
            for row in rows:
                row["before"] = before[row["id"]].item()
        return rows

    def pair(self, p, target, foil):
        """Ids of target (None: the likeliest token) and foil (None: the logit alone). UserError."""
        target, foil = self.token_of(target), self.token_of(foil)
        target = int(p.argmax()) if target is None else target
        if target == foil:
            raise UserError(f"target and foil are both {self.name(target)!r}: give two tokens")
        return target, foil

    def difference(self, codes, target, foil):
        """Row of codes (S,) whose product with the activations is the logit, or the difference of two."""
        return codes[target] if foil is None else codes[target] - codes[foil]

    def explained(self, target, foil, terms, order, dictionary, own):
        """A logit, or the difference of two, as the sum of terms (S,): those of `order`, and all others.

        `own`: what else is known of each of the signals of `order`, dicts.
        """
        rows = [
            {"signal": s, "value": terms[s].item(), "ends": self.ends(dictionary, s), **more}
            for s, more in zip(order.tolist(), own, strict=True)
        ]
        total = terms.double().sum().item()
        return {
            "target": {"id": target, "text": self.name(target)},
            "foil": None if foil is None else {"id": foil, "text": self.name(foil)},
            "terms": rows,
            "n_others": len(terms) - len(order),
            "others": total - terms[order].double().sum().item(),
            "sum": total,
        }

    # -- calls -------------------------------------------------------------------------------------

    def run(self):
        """What the page says of the model."""
        m, state = self.model, self.lab.checkpoint.state
        self.own_claims = None
        config = m.net.config
        return {
            "name": self.lab.checkpoint.name,
            "loss": state.get("whole_val_loss") or state.get("val_loss"),
            "n_layer": config.n_layer,
            "n_embd": config.n_embd,
            "n_signals": m.dictionary.n_signals,
            "vocab": config.vocab,
            "unit": m.unit,
            "word": self.common_word(),
            "place": str(self.lab.checkpoint.run),
            "runs": list(self.others),
            "beside": self.beside,
        }

    def common_word(self):
        """A frequent word of five letters or more, to begin with."""
        words = self.lab.words.known_words(letters=5)
        return self.name(words[0] if len(words) else self.model.shown[0]).strip()

    def contexts(self):
        """How far the contexts of signals are."""
        done, total = self.cards.progress
        return {"ready": self.cards.contexts is not None, "done": done, "total": total} | {
            "missing": self.cards.missing
        }

    @torch.no_grad()
    def read(self, text):
        """The tokens of a prompt with their surprisal, nats."""
        ids, dropped = self.ids(text)
        streams = self.streams(ids)
        with self.lock:
            logits = hooks.logit_lens(self.model.net, streams[-1])[:-1]  # (T - 1, n_tokens)
        following = torch.tensor(ids[1:], device=logits.device)
        losses = F.cross_entropy(logits, following, reduction="none").tolist() if len(following) else []
        rows = zip(ids, [None, *losses], strict=True)
        shown = self.model.tokenizer.token_shown
        tokens = [{"id": i, "text": shown(i), "surprisal": loss} for i, loss in rows]
        return {"tokens": tokens, "dropped": dropped, "empty": not text}

    @torch.no_grad()
    def position(self, text, position, layer, target, foil, dictionary):
        """The next token after a position, and a logit (or a difference of two) as a sum over signals."""
        ids, _ = self.ids(text)
        position, layer = self.place(ids, position, layer)
        net, d = self.model.net, self.dictionary(dictionary)
        with self.lock:
            h = net.norm(self.streams(ids)[layer][position])  # (d,)
            logits = hooks.unembed(net, h)  # (n_tokens,)
        p = logits.softmax(-1)
        target, foil = self.pair(p, target, foil)
        terms = d.activations(h) * self.difference(d.codes, target, foil)  # (S,)
        order = terms.abs().argsort(descending=True)[:BARS]
        asked = [target] if foil is None else [target, foil]
        sizes = self.rotated_sizes(h, asked, len(order))
        exact = logits[target] - (0 if foil is None else logits[foil])
        controls = [{"rotated": size} for size in sizes]
        return self.explained(target, foil, terms, order, dictionary, controls) | {
            "layer": layer,
            "top": self.likeliest(p),
            "logit": exact.item(),
            "notes": [self.model.name(token) for token in asked if self.model.is_rare(token)],
        }

    def _turns(self):
        """The rotations of reflow.Attribution, each as the Dictionary whose recipes are the rotation."""
        basis = self.model.dictionary.basis
        plain = dictionary.Dictionary("native", torch.eye(len(basis), device=basis.device), basis)
        seeds = range(reflow.N_ROTATIONS)
        return [dictionary.rotated(plain, torch.Generator().manual_seed(seed)) for seed in seeds]

    def rotated_sizes(self, h, asked, k):
        """Mean sizes of the k largest terms in random rotations, as in reflow.Attribution, a list."""
        recipes = self.model.dictionary.recipes[asked]  # of two tokens alone: cheap
        sizes = []
        for turn in self.turns():
            turned = dictionary.Dictionary("rotated", recipes @ turn.recipes, turn.basis)
            terms = turned.activations(h) * self.difference(turned.codes, 0, 1 if len(asked) > 1 else None)
            sizes.append(terms.abs().topk(k).values)
        return torch.stack(sizes).mean(0).tolist()

    @torch.no_grad()
    def lens(self, text, position, signal):
        """Layers x positions: the likeliest token of the logit lens and its p, or a signal's activation.

        Of a long prompt, MOST_COLUMNS tokens around the position; `first` is the first of them.
        """
        ids, _ = self.ids(text)
        position, _ = self.place(ids, position)
        first = max(0, min(position - MOST_COLUMNS // 2, len(ids) - MOST_COLUMNS))
        net, rows = self.model.net, []
        if signal is not None:
            self.model.check_signal(signal)
        for stream in self.streams(ids):
            with self.lock:
                h = net.norm(stream[first : first + MOST_COLUMNS])  # (T, d)
                if signal is not None:
                    rows.append(
                        [[None, value] for value in (h @ self.model.dictionary.atoms[signal]).tolist()]
                    )
                    continue
                p, best = hooks.unembed(net, h).softmax(-1).max(-1)
            texts = [self.name(i) for i in best]
            rows.append([list(cell) for cell in zip(texts, p.tolist(), strict=True)])
        return {"first": first, "rows": rows}

    @torch.no_grad()
    def signal(self, signal, text=None, position=None):
        """The card of a signal beside that of a rotated one, and what removing them does after a prompt."""
        cards = [self.cards.card("native", signal)]
        cards.append(self.cards.card("rotated", self.cards.matched(signal)))
        if text is not None:
            ids, _ = self.ids(text)
            position, _ = self.place(ids, position)
            with self.lock:
                h = self.model.net.norm(self.streams(ids)[-1][position])[None]  # (1, d)
                p = hooks.unembed(self.model.net, h).softmax(-1)
            target, foil = p.topk(2).indices.T
            pred = attribution.Prediction(h, p.double(), target, foil)
            for card in cards:
                d, s = (
                    self.cards.dictionaries[card["dictionary"]],
                    torch.tensor([card["signal"]]).to(h.device),
                )
                change, kl = attribution.remove_signals(pred, d, s)
                card["ablation"] = {"token": self.name(target[0]), "change": change.item(), "kl": kl.item()}
        if self.own_claims is None:
            self.own_claims = self.claims()["claims"]
        about = [claim for claim in self.own_claims if claim["experiment"] in ABOUT_SIGNALS]
        return {"cards": cards, "contexts": self.contexts(), "claims": about}

    def strongest(self, text, position):
        """The signals whose activation after a prompt is largest by size: numbers to open."""
        ids, _ = self.ids(text)
        position, _ = self.place(ids, position)
        with self.lock:
            h = self.model.net.norm(self.streams(ids)[-1][position])
        return {"signals": self.model.dictionary.activations(h).abs().topk(8).indices.tolist()}

    def _shared(self):
        """The strongest signals of each shown token, with their sign, (n, STRONG): s + 1 or -(s + 1)."""
        codes = self.model.dictionary.codes[torch.from_numpy(self.model.shown).to(self.model.device)]
        index = codes.abs().topk(min(STRONG, codes.size(1))).indices  # (n, STRONG)
        return (index + 1) * codes.gather(1, index).sign().long()

    @torch.no_grad()
    def token(self, word):
        """A token's recipe, its neighbours in three spaces, and words that share its strong signals."""
        m, token = self.model, self.token_of(word)
        recipe = m.dictionary.codes[token]  # (S,)
        order = recipe.abs().argsort(descending=True)[:BARS].tolist()
        spaces = {"recipe": m.dictionary.codes, "E": self.lab.model.E}
        shuffled = exchanged(m.words.counts, self.lab.rng("shuffled"))  # as in lab.shuffled
        spaces["shuffled recipes"] = m.dictionary.part(shuffled).codes
        own = recipe.abs().topk(min(STRONG, len(recipe))).indices
        own = (own + 1) * recipe[own].sign().long()
        common = torch.isin(self.shared(), own).sum(1)  # (n,)
        best = [i for i in common.topk(min(11, len(common))).indices.tolist() if m.shown[i] != token][:10]
        return {
            "id": token,
            "text": self.name(token),
            "seen": f"{sightings(m.words.counts[token])} in {m.words.where}",
            "rare": m.is_rare(token),
            "recipe": [
                {"signal": s, "value": recipe[s].item(), "ends": self.ends("native", s)}
                | {"share": (recipe[s] ** 2 / (recipe**2).sum().clamp(min=1e-30)).item()}
                for s in order
            ],
            "neighbours": {name: m.nearest(codes, token, 10) for name, codes in spaces.items()},
            "sharing": [[self.name(m.shown[i]), common[i].item()] for i in best],
            "strong": len(own),
        }

    @torch.no_grad()
    def arithmetic(self, plus, minus, also):
        """The words nearest to plus - minus + also by 3CosAdd, and nearest to plus and to also alone."""
        m = self.model
        a, b, c = (self.token_of(word) for word in (minus, plus, also))
        codes = m.dictionary.codes
        frequent = torch.from_numpy(m.words.known_tokens()[: reflow.N_FREQUENT]).to(codes.device)
        mean = codes[frequent].mean(0)
        shown = torch.from_numpy(m.shown).to(codes.device)
        rows = F.normalize(codes[shown] - mean, dim=1)
        cosines = [rows @ F.normalize(codes[word] - mean, dim=0) for word in (a, b, c)]
        asked = torch.isin(shown, torch.tensor([a, b, c], device=shown.device))
        found = {}
        for method in ("3CosAdd", "only b", "only c"):
            best = METHODS[method](*cosines).masked_fill(asked, -torch.inf).topk(min(8, len(shown) - 3))
            texts = [self.name(shown[i]) for i in best.indices]
            found[method] = [list(pair) for pair in zip(texts, best.values.tolist(), strict=True)]
        return {"words": [self.name(word) for word in (b, a, c)], "lists": found}

    @torch.no_grad()
    def edit(self, text, position, target, foil, edits):
        """The distribution and the sum over signals at a position, without and with edits."""
        start = time.perf_counter()
        ids, _ = self.ids(text)
        position, _ = self.place(ids, position)
        streams, n_layer = self.streams(ids), self.model.net.config.n_layer
        A0, logits0 = self.after(ids, position, streams, [], True)
        at_output = all(min(edit.layers(n_layer)) == n_layer for edit in edits)
        A, logits = self.after(ids, position, streams, edits, at_output)
        log_p0, log_p = logits0.double().log_softmax(-1), logits.double().log_softmax(-1)
        target, foil = self.pair(log_p0, target, foil)
        row = self.difference(self.model.dictionary.recipes, target, foil)
        before, after = A0 * row, A * row  # (S,)
        order = torch.maximum(before.abs(), after.abs()).argsort(descending=True)[:BARS]
        ticks = [{"before": value} for value in before[order].tolist()]
        return self.explained(target, foil, after, order, "native", ticks) | {
            "exact": at_output,
            "top": self.likeliest(log_p.exp(), before=log_p0.exp()),
            "sum_before": before.double().sum().item(),
            "kl": hooks.kl(log_p0, log_p).item(),
            "ms": 1000 * (time.perf_counter() - start),
        }

    def after(self, ids, position, streams, edits, at_output):
        """(activations (S,), logits (n_tokens,)) at a position under edits; no forward pass at the output."""
        net = self.model.net
        with self.lock, edited(self.model, edits):
            if at_output:
                h = net.norm(streams[-1][None, position, None])[0, 0]  # the norm's hooks want (1, 1, d)
            else:
                h = net.encode(torch.tensor([ids[: position + 1]], device=self.model.device))[0, -1]
            A = net.vocab.signals(h)
            return A, F.linear(A, self.model.dictionary.recipes)

    @torch.no_grad()
    def price(self, edits):
        """KL on held-out text, nats per token, of the edits and of their control."""
        x, _ = self.lab.heldout(8, 24)
        found = {}
        log_p = self.heldout_log_probs(x, [], None)
        for name, control in (("edits", None), ("random direction", 0)):
            found[name] = hooks.kl(log_p, self.heldout_log_probs(x, edits, control)).mean().item()
        return found | {"tokens": x.numel()}

    def heldout_log_probs(self, x, edits, control):
        """Log-probabilities (tokens, n_tokens) of windows x (n, T)."""
        net = self.model.net
        with self.lock, edited(self.model, edits, control):
            return hooks.log_probs(net, net.encode(x).flatten(0, 1))

    def continuations(self, text, edits, n, temperature, seed):
        """Continue a prompt by n tokens without edits, with them, and with their control, from one seed.

        Yields (which, token) for one after the other. The model is free for others between two tokens.
        """
        ids, _ = self.ids(text)
        for edit in edits:
            edit.layers(self.model.net.config.n_layer)  # a mistake is an error now
        stop = self.model.tokenizer.end_of_text
        ways = [([], None), (edits, None), (edits, seed)] if edits else [([], None)]
        streams = []
        for _ in ways:
            generator = torch.Generator(self.model.device).manual_seed(seed)
            how = {"temperature": temperature, "top_k": 200, "generator": generator, "stop": stop}
            streams.append(self.model.net.stream([list(ids)], n, **how))
        going = set(range(len(ways)))
        while going:
            for i in sorted(going):
                with self.lock, edited(self.model, *ways[i]):
                    (token,) = next(streams[i], [None])
                if token is None or token == stop:
                    going.discard(i)
                else:
                    yield i, token

    def claims(self, run=None):
        """The claims of this run, or of another one by its name, and its training curves."""
        if run is not None and run not in self.others:
            raise UserError(f"no run {run!r} here: there are {', '.join(self.others) or 'no others'}")
        return self.record() if run is None else self.others[run]()
