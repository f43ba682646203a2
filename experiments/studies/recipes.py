"""
How few signals does a token of a trained model need, and of which dictionary?

    python experiments/studies/recipes.py --run=out/smollm2
    python experiments/studies/recipes.py --run=out/gpt2-new-nano --budgets=16,32

Method
    The recipes of a dense run are sparse codes of its E in the metric of upcycle.py, with a budget of entries
    a row, on average over the matrix. All dictionaries share the metric, the pursuit and the budget; they
    differ in their atoms: learned (dictionary.sparse), frequent rows of E, Gaussian atoms of the covariance
    of the rows, those of a TopK autoencoder, NMF, ICA, PCA and the coordinates. The last three have d atoms,
    the others --n_signal. The codes replace E at input and output; KL is that of the model with them to the
    model as it is, on held-out windows of the lab's text. Nothing is distilled. Statistics are of --text.
    Two halves of the vocabulary are given dictionaries of their own: atoms are signals of the model, not of
    the fit, if the halves have the same ones. Unit: a window; an atom.
    `gallery` in result.json lists the strongest learned atoms, those that both halves find most alike, and
    random ones: tokens of the largest and smallest codes, and the held-out text in whose states they are
    strongest. `examples` are the recipes of a few words. Both are looks, not claims.

Cost
    With SmolLM2-135M about an hour of two cores.
"""

import contextlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import threads
import numpy as np
import torch

import configurator
import dictionary
import recoding
from configurator import UserError
from data.datasets import find_dataset
from data.shards import Dataset
from data.tokenizer import kept
from dictionary import Dictionary, partners
from experiments.lab import Lab, Report, Scores, sae
from experiments.lab.claims import to_numpy
from experiments.lab.report import run_experiment
from hardware import one_thread

CLAIMS = {
    "learned": "at equal entries, recipes in learned atoms predict nearer to the model than in any rival's",
    "halves": "two halves of the vocabulary have the same atoms, more than Gaussian rows have",
}
NMF_ROWS = 4096  # rows, at most, that NMF is fitted to
HALF_ROUNDS = 6
WORDS = ("king", "Paris", "three", "Monday", "running")  # whose recipes are shown
N_SHOWN, N_TOKENS, N_CONTEXTS = 8, 8, 3  # signals of a kind, tokens and contexts of each
BEFORE = 12  # tokens of a context


@dataclass
class RecipesConfig:
    text: str | None = None  # a prepared data set in the run's tokens to take statistics of; None: the lab's
    tokens: int = 131_072  # of it
    budgets: str = "32,64"  # entries a row, with commas
    n_signal: int | None = None  # atoms; None: 4 n_embd
    starts: int = 1  # random starts of the learned dictionary
    rounds: int = 8  # of it
    windows: int = 32  # of held-out text
    length: int = 128  # tokens of a window
    steps: int = 1000  # of the autoencoder

    def __post_init__(self):
        self.n_entries = sorted({int(n) for n in self.budgets.split(",") if n.strip().isdigit()})
        if not self.n_entries or self.n_entries[0] < 1:
            raise ValueError(f"--budgets={self.budgets}: give numbers of entries, for example 32,64,128")
        configurator.check(
            self, "tokens >= 1024", "starts >= 1", "rounds >= 1", "windows >= 1", "length >= 8"
        )

    def sizes(self, d):
        """(atoms, entries a row that they are learned with: the middle budget) for width d."""
        return self.n_signal or 4 * d, self.n_entries[len(self.n_entries) // 2]


@one_thread()
def positive_parts(seen, n_atoms, seed):
    """Atoms (n_atoms, d) of the rows' positive and negative parts, side by side (NMF; Lee & Seung, 1999)."""
    from sklearn.decomposition import MiniBatchNMF

    some = seen.weights.topk(min(NMF_ROWS, len(seen.rows))).indices
    rows = seen.rows[some]
    both = torch.cat([rows.clamp(min=0), (-rows).clamp(min=0)], 1).numpy()  # (n, 2 d)
    n = min(n_atoms, len(rows))
    nmf = MiniBatchNMF(n, batch_size=1024, max_iter=20, random_state=seed, tol=0).fit(both)
    up, down = torch.from_numpy(nmf.components_).float().chunk(2, dim=1)  # (n_atoms, d)
    return torch.nn.functional.normalize(up - down, dim=1)


def all_atoms(seen, c, seed):
    """({name: atoms (S, d) of length 1} of the Rows of E, learned ones and rivals; what the fit says)."""
    S, n = c.sizes(seen.rows.size(1))
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize
    often = seen.weights.topk(min(recoding.SAMPLE, len(seen.rows))).indices.sort().values
    learned = dictionary.sparse(seen.rows, S, n, seen.weights, seed, c.starts, c.rounds, recoding.SAMPLE)
    encoder = sae.train(seen.rows, seen.weights, S, n, c.steps, seed=seed)
    found = {
        "learned": learned.atoms,
        "tokens": unit(seen.rows[seen.weights.topk(min(S, len(seen.rows))).indices], dim=1),
        "Gaussian": unit(dictionary.gaussian_rows(seen.rows, S, generator), dim=1),
        "autoencoder": encoder.atoms.detach(),
        "NMF": positive_parts(seen, S, seed),
        "PCA": dictionary.pca(seen.rows, often).atoms,
        "coordinates": unit(torch.linalg.inv(seen.back.double()).float(), dim=1),
    }
    with contextlib.suppress(UserError):
        found["ICA"] = dictionary.ica(seen.rows, often, seed).atoms
    return found, learned.fit


def halves(seen, c, seed):
    """How alike atoms of two halves of the rows are: [(|cosine| of partners (S,), atoms, atoms)].

    Of the rows, then of Gaussian ones.
    """
    S, n = c.sizes(seen.rows.size(1))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(seen.rows), generator=generator)
    found = []
    for rows in (seen.rows, dictionary.gaussian_rows(seen.rows, len(seen.rows), generator)):
        parts = []
        for i, half in enumerate(order.chunk(2)):
            some = (rows[half], S, n, seen.weights[half], seed + i, 1, HALF_ROUNDS, recoding.SAMPLE // 2)
            parts.append(dictionary.sparse(*some).atoms)
        found.append((partners(*parts), *parts))
    return found


def statistics(lab, c):
    """The Rows of E of the lab's model, in the metric of `c.text`."""
    net, ckpt = lab.model.net, lab.checkpoint
    tokenizer = kept(ckpt.path, ckpt.state)
    folder = find_dataset(c.text, tokenizer) if c.text else lab.text
    text = Dataset(folder, "train", min(256, net.config.block_size))
    text.check_tokenizer(tokenizer, ckpt.path)
    windows = text.batch(0, max(1, min(c.tokens // text.block_size, text.n_windows)), 0)[0]
    E = net.vocab.matrix().detach().float().cpu()[: net.config.n_tokens]
    return recoding.rows_of(E, *recoding.statistics(recoding.read(net, windows, contextlib.nullcontext), E))


def run(lab: Lab, c: RecipesConfig) -> Report:
    report = Report(lab, "recipes", CLAIMS)
    net = lab.model.net
    if net.config.vocab != "dense":
        raise UserError(
            f"{lab.model.name} has the vocabulary {net.config.vocab}: only a dense one can be coded"
        )
    seen = statistics(lab, c)
    atoms, fit = all_atoms(seen, c, 0)
    report.numbers["fit"] = fit
    x, y = lab.heldout(c.windows, min(c.length, net.config.block_size))
    held = torch.cat([x, y[:, -1:]], 1)  # (n, T + 1)
    h = recoding.final_states(net, held, contextlib.nullcontext)
    kl = {n: {} for n in c.n_entries}
    for name, own in atoms.items():
        codes_of = dictionary.encodings(seen.rows, own, c.n_entries, seen.weights)
        for n, codes in zip(c.n_entries, codes_of, strict=True):
            if (name, n) == ("learned", c.sizes(seen.rows.size(1))[1]):
                learned = Dictionary(name, codes, own @ seen.back)
            E = seen.matrix(codes, own)
            found = recoding.measure(net, h, E, held, contextlib.nullcontext)
            kl[n][name] = found["KL"].numpy()
            where = {"dictionary": name, "n_signals": n}
            for quantity, values in found.items():
                report.row(quantity, values.mean().item(), **where)
            report.row("missed", dictionary.fit_of(seen.rows, codes, own, seen.weights)["missed"], **where)
            report.row("explained", recoding.explained(net, h, E), **where)
    scores = {}
    for n, found in kl.items():
        scores[f"{n} entries"] = Scores({"native": found.pop("learned")} | found)
    report.effect("learned", scores, "windows", lower=True)
    (own, *parts), (null, *_) = halves(seen, c, 0)
    report.effect("halves", Scores({"native": own, "Gaussian": null}), "atoms")
    report.numbers["KL"] = {n: part.means() for n, part in scores.items()}
    report.numbers["halves"] = {"match": float(own.mean()), "above .9": float((own > 0.9).mean())}
    alike = np.min([partners(atoms["learned"], part) for part in parts], axis=0)
    report.numbers["gallery"] = gallery(lab, learned, alike, held[:, :-1], h)
    report.numbers["examples"] = examples(lab, learned)
    draw(report, scores, c)
    return report


def gallery(lab, d, alike, windows, h):
    """{kind: [card]} of signals of a Dictionary: the strongest, the most alike ones, random ones.

    alike (S,): how close an atom's partners in two halves are. h (n, T, d): final states of windows (n, T).
    """
    energy = to_numpy((d.codes[lab.words.known_tokens()] ** 2).sum(0))  # (S,)
    chosen = {
        "strongest": np.argsort(-energy)[:N_SHOWN],
        "most alike in two halves": np.argsort(-alike)[:N_SHOWN],
        "random": lab.rng("gallery").permutation(d.n_signals)[:N_SHOWN],
    }
    cards = {}
    for kind, signals in chosen.items():
        cards[kind] = []
        for s in map(int, signals):
            card = {"signal": s, "energy": energy[s] / energy.sum(), "alike": alike[s]}
            card |= {"tokens": extremes(lab, d, s), "contexts": contexts(lab, d.atoms[s], windows, h)}
            cards[kind].append(card)
    return cards


def extremes(lab, d, s):
    """{"high", "low"}: tokens, as text, whose codes of signal s are the most above and below zero."""
    codes, tokens = to_numpy(d.codes[:, s]), lab.words.shown_tokens()
    return {
        name: lab.words.top(torch.from_numpy(signed), N_TOKENS, tokens[signed[tokens] > 0])
        for name, signed in (("high", codes), ("low", -codes))
    }


def contexts(lab, atom, windows, h):
    """[[text before, last token read]] where an atom (d,) adds most to its tokens' logits, one a window."""
    best, at = (h.cpu() @ atom).max(1)  # (n,) each
    found = []
    for i in best.topk(N_CONTEXTS).indices.tolist():
        ids = windows[i, : at[i] + 1].tolist()
        found.append([lab.words.tokenizer.decode(ids[-BEFORE:-1]), lab.words.text(ids[-1])])
    return found


def examples(lab, d):
    """{word: [entry]}: the largest entries of recipes, by share of the sum of squares, with their tokens."""
    found = {}
    for word in WORDS:
        token = lab.words.known(word, 0)
        if token is None:
            continue
        part = d.codes[token] ** 2  # (S,)
        found[word] = [
            {
                "signal": s,
                "code": float(d.codes[token, s]),
                "share": float(part[s] / part.sum()),
                "tokens": extremes(lab, d, s)["high" if d.codes[token, s] > 0 else "low"],
            }
            for s in part.topk(min(N_TOKENS, int((part > 0).sum()))).indices.tolist()
        ]
    return found


def draw(report, scores, c):
    """KL against entries, a line for each dictionary."""
    parts = [part.means() for part in scores.values()]
    best = math.exp(np.mean([np.log(part["native"]) for part in parts]))
    title = f"KL to the model as it is, learned atoms: {best:.2f} nats (geometric mean over budgets)"
    with report.figure("recipes", title, size=(5.5, 3.6)) as ax:
        for name in parts[0]:
            label = "learned" if name == "native" else name
            ax.plot(c.n_entries, [part[name] for part in parts], "o-", label=label)
        ax.set(xlabel="entries of a recipe, mean", ylabel="KL, nats per token", xscale="log", yscale="log")
        ax.legend(fontsize=7)


if __name__ == "__main__":
    run_experiment(run, RecipesConfig)
