"""
What the twelve experiments share: models and controls, dictionaries, words and text, statistics, output.

A *dictionary* is one way to write the token embedding as a product, codes (V x S) @ atoms (S x d) = E. The
learned one is called native. Any invertible R gives another, (codes R)(R^-1 atoms), of the *same function*:
what a rotated dictionary shows as well is no fact about the learned signals. Hence two kinds of claim:

    effect    the measured value beats chance: the 95 % bootstrap interval of the paired difference to every
              chance control (untrained model, shuffled recipes, random direction, ...) lies above zero.
    signals   the native dictionary is special: it beats all of at least 19 random rotations of itself (under
              the null hypothesis that the learned basis is one of them, that has a probability of 5 %), and
              the interval of its paired difference to every rival (PCA, ICA, the plain GPT, ...) is above 0.

"supported" says that; "not supported" that the data do not; "inconclusive" that there are fewer than 20
independent units (words, questions, prompts) or no control to compare with. No other threshold exists.
"""

import csv
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import textwrap
import time
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import checkpoint
import configurator
from configurator import UserError
from data.datasets import COUNTS, find_dataset, token_counts
from data.shards import Dataset
from data.tokenizer import END_OF_TEXT, encoding
from dictionary import Dictionary, ica, native, pca, rotated, skewed  # noqa: F401
from dictionary import top_k as largest  # noqa: F401
from hardware import keep_freed_memory, pick_device
from hooks import edit_resid as edited  # noqa: F401
from hooks import final_states as last_hidden  # noqa: F401
from hooks import kl, padded, token_losses  # noqa: F401
from hooks import log_probs as log_p  # noqa: F401
from hooks import logit_lens as read_out  # noqa: F401
from hooks import resid_streams as run_blocks  # noqa: F401
from hooks import steer as steering  # noqa: F401
from hooks import unembed as logits  # noqa: F401
from hooks import with_embedding as with_matrix
from model import ModelConfig, ReFlow

ROTATIONS = 19  # the fewest that can give p = 0.05
LEAST = 20  # independent units below which a claim is inconclusive
PROBES = Path(__file__).parent / "probes"


@dataclass
class LabConfig:
    run: str | None = None  # a run's folder or one of its step_... folders; None: the newest with signals
    baseline: str | None = None  # a plain GPT of the same shape and data; None: one beside the run, if any
    seed: int = 0  # of every random choice: rotations, bootstrap, prompts
    device: str = "auto"  # auto: cuda, then mps, then cpu; always fp32


# ----------------------------------------------------------------------------------------------------
# Models


@dataclass
class Subject:
    """A model under study. E (n_tokens, d) has no padding rows."""

    name: str
    net: ReFlow
    val_loss: float | None
    dictionary: Dictionary = None
    step: Path | None = None  # its checkpoint folder

    def __post_init__(self):
        self.dictionary = self.dictionary or native(self.net)

    @functools.cached_property
    def E(self):
        return self.dictionary.codes @ self.dictionary.atoms


def open_subject(name, step, device):
    """(Subject, state) of a checkpoint folder, in fp32. Raises UserError."""
    net, state = checkpoint.load_model(step, device)
    loss = state.get("whole_val_loss") or state.get("val_loss")
    return Subject(name, net, loss, step=step), state


def newest_with_signals(out="out"):
    """The checkpoint folder of the newest run under `out` that is no plain GPT, else of the newest."""
    for run in checkpoint.runs(out):
        step = checkpoint.find(run)
        if checkpoint.read_state(step)["config"]["model"]["vocab"] != "dense":
            return step
    return checkpoint.find(None, out)


def results_folder(run, step):
    """Where results of `--run=run` go: <run>/experiments, or the step_... folder's own if that was named."""
    named = run is not None and Path(run).resolve() == step.resolve()
    return (step if named else step.parent) / "experiments"


class Lab:
    """A run, its controls and its text. Everything beyond the run itself is made on first use."""

    def __init__(self, config):
        self.config, self.seed = config, config.seed
        self.device = pick_device(config.device)
        keep_freed_memory()
        self.step = checkpoint.find(config.run) if config.run else newest_with_signals()
        self.folder, self.results = self.step.parent, results_folder(config.run, self.step)
        self.reflow, self.state = open_subject("reflow", self.step, self.device)
        self._rivals = {}  # name of a subject -> its PCA and ICA

    @functools.cached_property
    def baseline(self):
        """A plain GPT of the same shape and data, or None (said once, with how to make one)."""
        if self.config.baseline is not None:
            step = checkpoint.find(self.config.baseline)
        else:
            step = self._find_baseline()
        if step is None:
            print("no baseline beside this run: train config/gpt2_new_nano.py (or _mini), or give --baseline")
            return None
        return open_subject("baseline", step, self.device)[0]

    def _find_baseline(self):
        """The newest dense run in the same folder with the same backbone, data and number of steps."""

        def key(state):
            m = state["config"]["model"]
            shape = [m[k] for k in ("n_layer", "n_embd", "n_head", "block_size")]
            return shape, state["step"], state.get("data_sha256")

        for run in checkpoint.runs(self.folder.parent):
            for step in reversed(checkpoint.steps(run)):  # its best may be of another step
                try:
                    state = checkpoint.read_state(step)
                except UserError:
                    continue
                dense = state["config"]["model"]["vocab"] == "dense"
                if dense and step != self.step and key(state) == key(self.state):
                    return step
        return None

    @functools.cached_property
    def step0(self):
        """The untrained model: the run's own step 0, or a fresh start of the same configuration."""
        train = self.state["config"].get("train", {})
        untrained = not train.get("init_from") and not train.get("imported_from")  # else step 0 knows a lot
        if untrained and (self.folder / "step_000000").is_dir() and self.step.name != "step_000000":
            return open_subject("step 0", self.folder / "step_000000", self.device)[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(train.get("seed", self.seed))
            net = ReFlow(ModelConfig(**self.state["config"]["model"]))
        return Subject("step 0", net.to(self.device).eval(), None)

    @functools.cached_property
    def shuffled(self):
        """The trained model with its recipes exchanged among tokens of like frequency (within one octave)."""
        octave = np.log2(np.maximum(self.counts, 0.5)).astype(int)  # (n_tokens,), -1 for a token never seen
        permutation, rng = np.arange(len(octave)), self.rng("shuffled")
        for i in np.unique(octave):
            part = np.flatnonzero(octave == i)
            permutation[part] = rng.permutation(part)
        d = self.reflow.dictionary
        shuffled = Dictionary("shuffled", d.codes[torch.from_numpy(permutation).to(self.device)], d.atoms)
        net = with_matrix(self.reflow.net, shuffled.codes @ shuffled.atoms)
        return Subject("shuffled", net, None, shuffled)

    @property
    def subjects(self):
        """reFlow, its baseline if there is one, and the untrained model."""
        return [s for s in (self.reflow, self.baseline, self.step0) if s is not None]

    def identity(self):
        """What a result belongs to and is made from; with the same code, equal means the same result."""
        trained = [s for s in (self.reflow, self.baseline) if s is not None]
        weights = {run_name(s.step): s.step / "model.safetensors" for s in trained}
        return {
            "run": run_identity(self.step, self.state),
            "val_loss": {s.name: s.val_loss for s in trained},
            "seed": self.seed,
            "made_from": {name: file_sha256(path) for name, path in weights.items()},
        }

    # -- dictionaries of a subject ------------------------------------------------------------------

    def rotations(self, dictionary, change=rotated):
        """19 random rotations (or another `change`) of a dictionary, the same everywhere, one at a time."""
        for i in range(ROTATIONS):
            yield change(dictionary, torch.Generator().manual_seed(self.seed * 1000 + i))

    def rivals(self, subject):
        """{"pca": Dictionary, "ica": Dictionary} of the subject's E, fitted to tokens seen in training."""
        if subject.name not in self._rivals:
            enough = max(len(self.known_tokens()), 4 * subject.E.size(1))  # even after a few steps
            fit = torch.from_numpy(self.by_count[:enough]).to(self.device)
            self._rivals[subject.name] = {"pca": pca(subject.E, fit), "ica": ica(subject.E, fit, self.seed)}
        return self._rivals[subject.name]

    # -- words and text -----------------------------------------------------------------------------

    def rng(self, *key):
        """A numpy generator that depends on the seed and on `key` (strings) alone."""
        return np.random.default_rng([self.seed, zlib.crc32("/".join(key).encode())])

    @functools.cached_property
    def data(self):
        """Folder of the text: the run's own dataset, else the embedded corpus."""
        root = Path(__file__).resolve().parents[1] / "data"
        name = self.state["config"].get("train", {}).get("dataset", "sotu")
        for folder in (root / name, Path(name)):
            if (folder / "meta.json").exists():
                return folder
        if name != "sotu":
            counts = "" if (self.step / COUNTS).exists() else "token counts and "
            print(f"the run's dataset {name} is not here: {counts}held-out text from data/sotu")
        return find_dataset("sotu")

    @functools.cached_property
    def counts(self):
        """How often each token was in the text of training, (n_tokens,); a release brings them along."""
        if (self.step / COUNTS).exists():
            return checkpoint.load_tensors(self.step / COUNTS)["counts"].numpy()
        return token_counts(self.state, self.data)

    @functools.cached_property
    def by_count(self):
        """All token ids, the most frequent in training first, (n_tokens,)."""
        return np.argsort(-self.counts, kind="stable")

    def known_tokens(self, least=5):
        """Ids of the tokens seen at least `least` times in training, most frequent first, (n,)."""
        return self.by_count[self.counts[self.by_count] >= least]

    def known_words(self, letters=2):
        """Those known tokens that are a space and at least so many letters, most frequent first, (n,)."""
        known = self.known_tokens()
        texts = [encoding().decode([t]) for t in known]
        return known[[t[0] == " " and t[1:].isalpha() and len(t) > letters for t in texts]]

    def known(self, word, least=5):
        """The id of " word" if it is one token, seen at least `least` times in training; else None."""
        tokens = encoding().encode_ordinary(" " + word)
        return tokens[0] if len(tokens) == 1 and self.counts[tokens[0]] >= least else None

    def probe(self, name):
        """The contents of probes/<name>.json."""
        return json.loads((PROBES / f"{name}.json").read_text(encoding="utf-8"))

    def categories(self, least=5):
        """{category: [ids]} of the labelled words that the model has seen, categories of at least four."""
        found = {
            name: [self.known(w, least) for w in c["words"]] for name, c in self.probe("categories").items()
        }
        found = {name: [i for i in ids if i is not None] for name, ids in found.items()}
        return {name: ids for name, ids in found.items() if len(ids) >= 4}

    def heldout(self, n, length):
        """At most n windows of validation text, spread evenly, no document's end inside: x, y (n, length)."""
        dataset = Dataset(self.data, "val", length)
        x, y = dataset.windows(0, dataset.n_windows)
        whole = ~((x == END_OF_TEXT).any(1) | (y == END_OF_TEXT).any(1))
        chosen = whole.nonzero().flatten()
        chosen = chosen[torch.linspace(0, len(chosen) - 1, min(n, len(chosen))).long()]
        return x[chosen].to(self.device), y[chosen].to(self.device)


# ----------------------------------------------------------------------------------------------------
# Running a model


def array(x):
    """A tensor as float64 in numpy."""
    return x.double().cpu().numpy()


def show(token):
    """A token as text for a table or a figure."""
    text = encoding().decode([int(token)])
    return repr(text)[1:-1] if text.strip() else repr(text)


# ----------------------------------------------------------------------------------------------------
# Statistics. Everything a claim is about is a mean over units (words, questions, prompts, tokens)


@dataclass
class Estimate:
    value: float
    low: float  # 95 % percentile bootstrap
    high: float

    def __str__(self):
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def bars(self):
        """The interval as matplotlib's error bars want it."""
        return [[self.value - self.low], [self.high - self.value]]


def estimate(values, groups=None, resamples=2000, seed=0):
    """Mean of values (n,) and its bootstrap interval; `groups` (n,) are resampled whole if given."""
    values = np.asarray(values, float)
    if not len(values):
        return Estimate(np.nan, np.nan, np.nan)
    groups = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums, sizes = np.bincount(groups, values), np.bincount(groups)
    rng, n = np.random.default_rng(seed), len(sums)
    means = []
    for _ in range(0, resamples, 100):  # in parts: (100, n) counts at a time
        weights = rng.multinomial(n, np.full(n, 1 / n), size=100)
        means.append((weights @ sums) / (weights @ sizes))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def benjamini_hochberg(p, rate=0.05):
    """Which p-values (n,) are discoveries at a false discovery rate (Benjamini & Hochberg, 1995), (n,)."""
    p = np.asarray(p)
    order = np.argsort(p)
    passed = np.nonzero(p[order] <= rate * np.arange(1, len(p) + 1) / len(p))[0]
    found = np.zeros(len(p), bool)
    found[order[: passed[-1] + 1 if len(passed) else 0]] = True
    return found


def gini(rows):
    """Gini coefficient of |rows| (n, S), 0 for even to 1 for sparse, (n,): Hurley & Rickard, 0811.4706."""
    x = np.sort(np.abs(rows), axis=1)
    n = x.shape[1]
    return 2 * (x * np.arange(1, n + 1)).sum(1) / (n * x.sum(1)) - (n + 1) / n


def kurtosis(rows):
    """Excess kurtosis of rows (n, S), 0 for a Gaussian, (n,)."""
    x = rows - rows.mean(1, keepdims=True)
    return (x**4).mean(1) / (x**2).mean(1) ** 2 - 3


@dataclass
class Claim:
    claim: str  # a sentence that can be false
    kind: str  # effect or signals
    verdict: str  # supported, not supported or inconclusive
    reason: str  # what decided it
    unit: str
    n: int  # independent units
    measured: Estimate
    controls: dict = field(default_factory=dict)  # name -> Estimate
    published: str = ""  # the reference system's value, for orientation
    lower: bool = False  # whether less is better


def effect(claim, measured, chance, unit, groups=None, lower=False, published=""):
    """Does `measured` (n,), one value a unit, beat each of chance {name: (n,)}, the same units? A Claim.

    `lower`: smaller is better. `groups` (n,): units that are not independent of one another.
    """
    n = len(measured) if groups is None else len(np.unique(groups))
    controls = {name: estimate(v, groups) for name, v in chance.items()}
    sign = -1 if lower else 1
    gains = {name: estimate(sign * (np.asarray(measured) - v), groups) for name, v in chance.items()}
    # What is no number compares with nothing: it comes first, and nothing is concluded.
    worst = min(gains.items(), key=lambda item: (not np.isnan(item[1].low), item[1].low), default=None)
    if n < LEAST or worst is None:
        verdict, reason = "inconclusive", f"only {n} {unit}" if worst else "no control"
    elif np.isnan(worst[1].low):
        verdict, reason = "inconclusive", f"the gain over {worst[0]} is not a number"
    else:
        rounding = 1e-5 * np.abs(measured).mean()  # a gain below it is none
        verdict = "supported" if worst[1].low > rounding else "not supported"
        reason = f"gain over {worst[0]}: {worst[1]}"
    found = estimate(measured, groups)
    return Claim(claim, "effect", verdict, reason, unit, n, found, controls, published, lower)


def signals(
    claim, measured, rotations, rivals, unit, groups=None, lower=False, published="", gauges="rotations"
):
    """Is the native dictionary special? measured (n,), rotations (K, n), rivals {name: (n,)}. A Claim.

    `gauges` says what the K others are, where they are not rotations.
    """
    sign = -1 if lower else 1
    means = np.asarray(rotations, float).mean(1)  # (K,)
    p = (1 + (sign * means >= sign * np.mean(measured)).sum()) / (len(means) + 1)
    against = effect(claim, measured, rivals, unit, groups, lower)
    others = f"{len(means)} {gauges}"
    if against.n < LEAST or len(means) < ROTATIONS:
        verdict, reason = "inconclusive", f"only {against.n} {unit}, {others}"
    elif p > 0.05:
        verdict, reason = "not supported", f"random {gauges} do as well (p = {p:.2f}, {others})"
    elif rivals and against.verdict != "supported":
        verdict, reason = "not supported", f"beats {others} (p = {p:.2f}), but: {against.reason}"
    else:
        also = f"; {against.reason}" if rivals else ""
        verdict, reason = "supported", f"beats {others} (p = {p:.2f}){also}"
    spread = Estimate(*map(float, (means.mean(), means.min(), means.max())))  # over the K, not over units
    controls = {f"{others} (range)": spread, **against.controls}
    measured = against.measured
    return Claim(claim, "signals", verdict, reason, unit, against.n, measured, controls, published, lower)


# ----------------------------------------------------------------------------------------------------
# Output

COLUMNS = ("model", "dictionary", "control", "layer", "pos", "signal", "prompt", "metric", "value")

# Okabe and Ito's colours, told apart by colour-blind readers; one meaning each in all figures.
COLOURS = {
    "native": "#0072B2",
    "reflow": "#0072B2",
    "rotated": "#999999",
    "pca": "#E69F00",
    "ica": "#D55E00",
    "baseline": "#009E73",
    "step 0": "#CC79A7",
    "shuffled": "#56B4E9",
    "random": "#999999",
    "other": "#F0E442",
    "E": "#000000",
}


def pyplot():
    """matplotlib.pyplot, without a display, in the style of all figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
        }
        | {"legend.frameon": False, "figure.dpi": 110, "savefig.dpi": 150, "axes.titlesize": 9}
    )
    return plt


def banded(ax, x, values, name, dash="o-", label=None):
    """Draw the mean of values (n, len(x)) over x with its 95 % interval."""
    band = [estimate(column, resamples=500) for column in values.T]
    ax.plot(x, [e.value for e in band], dash, ms=3, color=COLOURS[name], label=label)
    ax.fill_between(x, [e.low for e in band], [e.high for e in band], color=COLOURS[name], alpha=0.15, lw=0)


class Report:
    """What an experiment found; `save` prints it and writes its folder, whole or not at all."""

    def __init__(self, lab, name):
        self.lab, self.name, self.start = lab, name, time.perf_counter()
        self.claims, self.rows, self.numbers, self.notes, self.figures = [], [], {}, [], []
        self.gallery = ""  # preformatted text for the reader: examples, chosen and not chosen
        self.folder = lab.results / name
        self._pictures = {}  # file name -> bytes
        self.options = {}  # of the experiment, where they are not the defaults

    def claim(self, claim):
        self.claims.append(claim)

    def row(self, metric, value, **where):
        """One line of rows.csv; `where` are the other COLUMNS."""
        assert where.keys() <= set(COLUMNS), f"unknown columns: {where.keys() - set(COLUMNS)}"
        self.rows.append({"metric": metric, "value": value} | where)

    def figure(self, fig, name, title):
        """Save a figure; its title states the finding with its numbers."""
        width = int(fig.get_figwidth() * 13)
        fig.suptitle("\n".join(textwrap.wrap(title, width)), x=0.01, ha="left", fontsize=10)
        fig.set_layout_engine("constrained")
        fig.savefig(picture := io.BytesIO(), format="png")
        self._pictures[f"{name}.png"] = picture.getvalue()
        pyplot().close(fig)
        self.figures.append({"file": f"{name}.png", "title": title})

    def save(self):
        result = {"experiment": self.name, "seconds": round(time.perf_counter() - self.start, 2)}
        result |= self.lab.identity() | {"options": self.options}
        result |= {
            "claims": [asdict(c) for c in self.claims],
            "numbers": self.numbers,
            "notes": self.notes,
            "gallery": self.gallery,
            "figures": self.figures,
        }
        new = self.folder.with_name(f".{self.name}.{os.getpid()}.tmp")
        new.mkdir(parents=True)
        for name, data in self._pictures.items():
            (new / name).write_bytes(data)
        with open(new / "rows.csv", "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        (new / "result.json").write_text(json.dumps(finite(result), indent=1), encoding="utf-8")
        shutil.rmtree(self.folder, ignore_errors=True)
        os.rename(new, self.folder)
        print(table(result))
        print(f"\n{self.folder}/  ({result['seconds']:.1f} s)")


def finite(value):
    """A result as JSON can hold it: plain numbers, None for those that are not finite."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [finite(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value.item() if hasattr(value, "item") else value


@functools.lru_cache
def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def run_name(step):
    """The name of the run that a checkpoint folder belongs to; a release is a run of its own."""
    return (step.parent if step.name.startswith("step_") else step).name


def run_identity(step, state):
    """What a result belongs to: run, step, configuration and data."""
    config = json.dumps(state["config"], sort_keys=True).encode()
    return {
        "name": run_name(step),
        "step": state["step"],
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "data_sha256": state.get("data_sha256"),
    }


def table(result):
    """A result as text."""
    losses = ", ".join(f"{k} {v:.3f}" for k, v in result["val_loss"].items() if v is not None)
    run = result["run"]
    lines = [
        f"{result['experiment']}: {run['name']}, step {run['step']}"
        + (f" (validation loss: {losses})" if losses else "")
    ]
    for c in result["claims"]:
        wrapped = textwrap.wrap(f"{c['kind']}: {c['claim']}", 104)
        lines += ["", *wrapped]
        rows = [("measured", c["measured"]), *c["controls"].items()]
        width = max(len(name) for name, _ in rows)
        lines += [f"  {name:{width}}  {Estimate(**value)}" for name, value in rows]
        if c["published"]:
            lines.append(f"  {'published':{width}}  {c['published']}")
        lines.append(f"  -> {c['verdict']}: {c['reason']} (n = {c['n']} {c['unit']})")
    if result["gallery"]:
        lines += ["", result["gallery"].rstrip()]
    for note in result["notes"]:
        lines += ["", *textwrap.wrap(note, 104)]
    return "\n".join(lines)


def main(run, *configs):
    """A script's last line: parse the command line, run on the run asked for, save and print the report."""

    def go():
        config, *own = configurator.parse(LabConfig, *configs)
        report = run(Lab(config), *own)
        report.options = configurator.differences(*own)
        report.save()

    configurator.run(go)
