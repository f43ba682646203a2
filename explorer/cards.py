"""
A card for each signal of a run, and for signals of a random rotation beside them.

Where in held-out text a signal is strongest and weakest is computed once a run and kept in contexts.json
among its results. The rotation leaves the model's function as it is: what its cards show as well says nothing
about the learned signals. A signal stands beside the rotated one of the same rank by usage.
"""

import json
import threading
import time
from contextlib import suppress

import numpy as np
import torch

import dictionary
from checkpoint import write_atomically
from configurator import UserError
from experiments.lab.claims import TooFew, to_numpy
from experiments.lab.probes import labelled
from experiments.lab.stats import rank_sums, regress_out
from experiments.signal_codebook import SAMPLE, column_shapes, p_values
from files import file_sha256
from reflow import Model

FILE = "contexts.json"
WINDOWS, LENGTH = 192, 32  # of held-out text
FIRST = 4  # tokens of a window that are context alone
CONTEXTS = 4  # shown of each end
BINS = 24
PAUSE = 0.01  # seconds between windows


class Cards:
    """The cards of a Lab's run. `lock` is held while the model runs."""

    def __init__(self, lab):
        self.lab = lab
        self.model = Model(lab.checkpoint, lab.device, net=lab.model.net, words=lab.words)
        native = self.model.dictionary
        turned = dictionary.rotated(native, torch.Generator().manual_seed(0))
        self.dictionaries = {"native": native, "rotated": turned}
        self.tables = {}
        self.lock = threading.RLock()
        self.progress = (0, 1)  # windows read, of all
        self.contexts = None
        self.missing = None  # why there are no contexts

    def table(self, name):
        """What the cards of a dictionary have in common, {quantity: (S,)}; z and q of word classes (C, S)."""
        with self.lock:  # made once, whoever asks
            if name not in self.tables:
                self.tables[name] = self.make_table(name)
        return self.tables[name]

    def make_table(self, name):
        """See `table`."""
        from scipy.stats import false_discovery_control  # takes a second to import

        d, words = self.dictionaries[name], self.lab.words
        usage = to_numpy((d.part(self.model.shown).codes ** 2).sum(0))
        sample = self.lab.rng("cards").permutation(words.known_tokens())[:SAMPLE]
        found = column_shapes(to_numpy(d.part(sample).codes), np.log(words.counts[sample]))
        found |= {"usage": usage / usage.sum(), "rank": np.argsort(np.argsort(-usage))}
        with suppress(TooFew):  # the words of categories
            ids, labels, names = labelled(self.lab)
            codes = regress_out(to_numpy(d.part(ids).codes), np.log(words.counts[ids]))
            z = rank_sums(codes, labels)
            q = false_discovery_control(p_values(z).ravel()).reshape(z.shape)
            found |= {"classes": names, "z": z, "q": q}
        return found

    def matched(self, s):
        """The rotated signal of the usage rank of native signal s."""
        rank = self.table("native")["rank"][s]
        return int(np.flatnonzero(self.table("rotated")["rank"] == rank)[0])

    def card(self, name, s, k=8):
        """All about signal s of a dictionary, as JSON."""
        self.model.check_signal(s)
        d, table = self.dictionaries[name], self.table(name)
        high, low = (self.model.extremes(d.codes[:, s], k, largest) for largest in (True, False))
        columns = ("class", "Spearman with log frequency", "skew", "excess kurtosis", "usage", "rank")
        found = {column: table[column][s] for column in columns}
        found |= {"signal": s, "dictionary": name, "high": high, "low": low}
        found |= {"classes": [], "neighbours": d.nearest_signals(s, 4)}
        if "z" in table:
            z, q = table["z"][:, s], table["q"][:, s]
            best = np.argsort(-np.abs(z))[:5]
            enriched = [c for c in best if q[c] <= 0.05] or best[:1]
            found["classes"] = [[table["classes"][c], z[c], q[c]] for c in enriched]
        if self.contexts:
            part = self.contexts[name]
            found["histogram"] = part["histogram"][s]
            found |= {end: [self.context(*place) for place in part[end][s]] for end in ("strong", "weak")}
        return found

    def context(self, window, at, value):
        """A place in the held-out text as [text before, the token, text after, activation]."""
        ids, tokenizer = self.contexts["windows"][window], self.model.tokenizer
        ends = [tokenizer.decode(part) for part in (ids[:at], ids[at + 1 :])]
        return [ends[0], tokenizer.token_shown(ids[at]), ends[1], value]

    @property
    def path(self):
        return self.lab.results / FILE

    def key(self):
        """What the contexts depend on: weights, text and sizes."""
        sizes = [WINDOWS, LENGTH, FIRST, CONTEXTS, BINS]
        return [file_sha256(self.lab.checkpoint.weights), self.lab.text.name, *sizes]

    def read_contexts(self, report=lambda done, total: None):
        """Read the contexts, or find and keep them. `report(done, total)` is told of progress."""
        for name in self.dictionaries:  # the first card need not wait for it
            self.table(name)
        with suppress(OSError, ValueError, KeyError, TypeError):  # none, or of older code
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            if kept["key"] == self.key():
                self.contexts = kept
                return
        try:
            x, _ = self.lab.heldout(WINDOWS, LENGTH)
        except UserError as reason:
            self.missing = str(reason)
            return
        activations = {name: [] for name in self.dictionaries}
        self.progress = (0, len(x))
        for part in x.split(2):
            time.sleep(PAUSE)  # the page's own questions come first
            with self.lock, torch.no_grad():
                h = self.model.net.encode(part)[:, FIRST:]  # (4, LENGTH - FIRST, d)
                for name, d in self.dictionaries.items():
                    activations[name].append(d.activations(h))
            self.progress = (self.progress[0] + len(part), len(x))
            report(*self.progress)
        found = {"key": self.key(), "windows": x.tolist()}
        for name, parts in activations.items():
            A = torch.cat(parts).cpu()  # (windows, LENGTH - FIRST, S)
            found[name] = {"strong": places(A, 1), "weak": places(A, -1), "histogram": histograms(A)}
        with suppress(OSError):  # a folder that cannot be written: they last as long as the process
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(found))
        self.contexts = found


def places(A, sign):
    """[[[window, token, activation]]] of each signal's extremes in A (n, T, S), one a window at most."""
    best, at = (sign * A).max(1)  # (n, S) each
    values, windows = best.topk(min(CONTEXTS, len(A)), dim=0)  # (CONTEXTS, S)
    at = at.gather(0, windows) + FIRST
    rows = zip(windows.T.tolist(), at.T.tolist(), values.T.tolist(), strict=True)
    return [[[w, t, round(sign * v, 4)] for w, t, v in zip(*row, strict=True)] for row in rows]


def histograms(A):
    """[[lowest, highest, counts]] of the activations of each signal, A (n, T, S)."""
    found = []
    for column in A.flatten(0, 1).T.numpy():
        counts, edges = np.histogram(column, BINS)
        found.append([float(edges[0]), float(edges[-1]), counts.tolist()])
    return found
