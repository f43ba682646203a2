"""
A run under study: its model, the controls of its model and of its dictionary, and its text.
"""

import functools
import hashlib
import json
import zlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from shlex import quote
from typing import Literal

import numpy as np
import torch

import checkpoint
import configurator
import dictionary
import files
import hooks
from checkpoint import Checkpoint
from configurator import UserError
from data.datasets import is_imported, run_words, text_folder
from data.shards import Dataset
from data.words import LEAST_COUNT
from dictionary import Dictionary
from experiments.lab import nulls
from experiments.lab.claims import LEAST_UNITS, N_GAUGES, Scores, TooFew
from experiments.lab.precision import rounded
from experiments.lab.probes import PROBES, own_probes, probe
from experiments.lab.results import Identity
from experiments.lab.stats import exchanged
from files import file_sha256
from hardware import keep_freed_memory, one_thread, pick_device
from model import ModelConfig, ReFlow


@dataclass
class LabConfig:
    run: str | None = None  # a run's folder or one of its step_... folders; None: the newest with signals
    baseline: str | None = None  # a plain GPT of the same shape and data; None: one beside the run, if any
    seed: int = 0  # of every random choice: rotations, bootstrap, prompts
    device: str = "auto"  # auto: cuda, then mps, then cpu
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of products in blocks, see lab/precision.py
    results: str | None = None  # folder for results, in a folder named after the run; None: in the run's
    probes: str | None = None  # folder of word lists of one's own, see probes/README.md; None: those in it

    def __post_init__(self):
        configurator.check(self, configurator.SEED)


@dataclass
class Subject:
    """A model under study, and the dictionary that is studied in it (None: its own)."""

    name: str  # reflow, baseline, shuffled, or a name of nulls.NAMES
    net: ReFlow
    val_loss: float | None = None
    dictionary: Dictionary = None
    checkpoint: Checkpoint | None = None

    def __post_init__(self):
        self.dictionary = self.dictionary or dictionary.native(self.net)

    @functools.cached_property
    def E(self):
        """(n_tokens, d), without padding rows."""
        return self.dictionary.matrix()


def open_subject(name, ckpt, device, dtype="auto"):
    """The Subject of a Checkpoint, its weights verified; `dtype` as in LabConfig. Raises UserError."""
    loss = ckpt.state.get("whole_val_loss") or ckpt.state.get("val_loss")
    return Subject(name, rounded(ckpt.load_model(device, verified=True), dtype), loss, checkpoint=ckpt)


def shape_of(ckpt):
    """What a model shares with its plain baseline."""
    return {key: ckpt.model_config.get(key) for key in ("n_layer", "n_embd", "n_head", "block_size")}


def find_baseline(ckpt):
    """The newest dense run in the same folder with the same shape, data and number of steps; None if none.

    There is none beside an imported run: nobody here knows what its neighbour was trained on.
    """
    if is_imported(ckpt.state):
        return None
    for run in checkpoint.runs(ckpt.run.parent):
        for path in reversed(checkpoint.steps(run)):  # its best may be of another step
            try:
                found = Checkpoint(path, checkpoint.read_state(path))
            except UserError:  # a damaged one
                continue
            same = found.step == ckpt.step and not baseline_faults(ckpt, found)
            if same and path != ckpt.path:
                return found
    return None


def baseline_faults(ckpt, other):
    """Why `other` is no plain GPT of the shape and data of `ckpt`, a list of texts; empty if it is one."""
    faults = []
    if other.model_config["vocab"] != "dense":
        faults.append(f"its vocabulary is {other.model_config['vocab']}, not dense")
    for key, value in shape_of(ckpt).items():
        if other.model_config.get(key) != value:
            faults.append(f"{key} is {other.model_config.get(key)}, not {value}")
    if other.state.get("data_sha256") != ckpt.state.get("data_sha256"):
        faults.append("it was trained on other data")
    return faults


def open_baseline(name, ckpt):
    """The Checkpoint of a run given as the baseline of another. Raises UserError if it is no fit."""
    found = checkpoint.open_run(name)
    faults = baseline_faults(ckpt, found)
    if faults:
        raise UserError(f"--baseline={name} is no plain GPT of the same shape and data: {faults[0]}")
    return found


def train_baseline(ckpt):
    """The command that trains a plain GPT of the shape, data and steps of a Checkpoint."""
    keys = ("dataset", "batch_size", "micro_batch_size", "max_steps", "warmup_steps", "lr", "min_lr", "seed")
    train = {key: ckpt.train_config[key] for key in keys if key in ckpt.train_config}
    train["optimizer"] = ckpt.train_config.get("optimizer", "adamw")
    shape = ckpt.model_config | {"vocab": "dense", "n_signal": None, "top_k": None}
    if replace(ModelConfig(**ckpt.model_config), vocab_size=None).rows == shape["vocab_size"]:
        shape |= {"vocab_size": None, "n_token": None}  # train.py has them from the data
    wanted = {key: value for key, value in (shape | train).items() if value is not None}
    commands = []
    for path in sorted((checkpoint.RELEASES.parent / "config").glob("gpt2_new*.py")):
        own = {key: value for _, key, value in configurator.read_file(path)}
        given = {field.name: field.default for field in fields(ModelConfig)}
        given |= {"seed": 0, "optimizer": "adamw"} | own
        changes = {key: value for key, value in wanted.items() if given.get(key) != value}
        if changes:
            changes["out_dir"] = f"out/{ckpt.name}-baseline"
        parts = [f"python train.py config/{path.name}", *(quote(f"--{k}={v}") for k, v in changes.items())]
        commands.append((len(changes), " ".join(parts)))
    return min(commands)[1]


def results_folder(ckpt, elsewhere=None):
    """The folder of the results of a Checkpoint: the run's own, or one with its name in `elsewhere`."""
    if elsewhere is None:
        return ckpt.results
    return (
        Path(elsewhere).expanduser()
        / ckpt.name
        / (ckpt.path.name if ckpt.named and ckpt.path != ckpt.run else "")
    )


def check_writable(folder):
    """UserError if no file can be written in a folder of results."""
    if reason := files.why_unwritable(folder):
        raise UserError(f"{folder} cannot be written ({reason}): give --results=FOLDER")


class Lab:
    """A run, its controls and its text. Everything beyond the run itself is made on first use."""

    def __init__(self, config=None):
        self.config = config or LabConfig()
        self.seed = self.config.seed
        self.device = pick_device(self.config.device)
        keep_freed_memory()
        self.checkpoint = checkpoint.open_run(self.config.run)
        self.model = self.open("reflow", self.checkpoint)
        self.own_probes = own_probes(Path(self.config.probes).expanduser()) if self.config.probes else {}
        self.report = None  # the Report that is being made
        self._rivals = {}  # name of a subject -> its PCA and ICA
        self.missing = {}  # name of a subject -> {rival that could not be found: why}

    @property
    def results(self):
        """The folder of this run's results."""
        return results_folder(self.checkpoint, self.config.results)

    def open(self, name, ckpt):
        """The Subject of a Checkpoint."""
        return open_subject(name, ckpt, self.device, self.config.dtype)

    # -- models that it is compared with -----------------------------------------------------------

    @functools.cached_property
    def baseline(self):
        """A plain GPT of the same shape and data, or None (said once, with how to make one)."""
        if self.config.baseline is None:
            found = find_baseline(self.checkpoint)
            if found is None:
                if not is_imported(self.checkpoint.state):  # nobody here can train the like of that
                    command = train_baseline(self.checkpoint)
                    print(f"no baseline beside this run: give --baseline, or make one: {command}")
                return None
        else:
            found = open_baseline(self.config.baseline, self.checkpoint)
        return self.open("baseline", found)

    @functools.cached_property
    def step0(self):
        """The untrained model: the run's own step 0, or a fresh start of the same configuration."""
        train = self.checkpoint.train_config
        untrained = not train.get("init_from") and not train.get("imported_from")  # else step 0 knows a lot
        path = self.checkpoint.run / "step_000000"
        if untrained and path.is_dir() and path != self.checkpoint.path:
            return self.open("step 0", Checkpoint(path, checkpoint.read_state(path)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(train.get("seed", self.seed))
            net = ReFlow(ModelConfig(**self.checkpoint.model_config))
        return Subject("step 0", rounded(net.to(self.device).eval(), self.config.dtype))

    @functools.cached_property
    def noise(self):
        """Step 0 plus Gaussian noise as long as what training added."""
        generator = torch.Generator().manual_seed(int(self.rng("noise").integers(2**31)))
        return Subject("noise", nulls.add_noise(self.step0.net, self.model.net, generator).eval())

    @functools.cached_property
    def shuffled_text(self):
        """Step 0 trained on the run's tokens in random order, kept beside the run; None if there is none."""
        folder = (self.results if self.config.results else self.checkpoint.run) / "nulls"
        found = nulls.shuffled_text(self.checkpoint, self.step0.net, self.words.counts, folder)
        return found and self.open("shuffled text", found)

    @functools.cached_property
    def frequencies(self):
        """Noise that has the frequencies of tokens, where there is no model of shuffled text."""
        generator = torch.Generator().manual_seed(int(self.rng("frequencies").integers(2**31)))
        net = nulls.frequencies(self.noise.net, self.model.net, self.words.counts, generator)
        return Subject("frequencies", net.eval())

    @property
    def nulls(self):
        """{name: Subject} of the models that no text has taught, the controls of an effect (lab/nulls.py).

        "step 0", "noise" and "shuffled text" or, where that cannot be had, "frequencies". The report in the
        making says what they are.
        """
        found = [self.step0, self.noise, self.shuffled_text]
        if found[-1] is None and nulls.has_substitute(self.checkpoint):
            found[-1] = self.frequencies
        if self.report is not None:
            self.report.about_nulls(self.about_nulls())
        return {subject.name: subject for subject in found if subject is not None}

    def about_nulls(self):
        """{name: text} of what the null models of this run are."""
        start = "the run's own start" if self.step0.checkpoint else "a fresh start of the same shape"
        found = {"step 0": start, "noise": f"{start} plus noise as long as what training added"}
        steps, why_none = nulls.steps_of(self.checkpoint)
        share = f"{steps:,} of the run's {self.checkpoint.step:,} steps"
        found["shuffled text"] = f"missing: {why_none}" if why_none else f"{start}, trained for {share}"
        if why_none and nulls.has_substitute(self.checkpoint):
            fit = f"what the counts of tokens in {self.words.where} tell of the vocabulary's rows"
            found["frequencies"] = f"noise, and {fit}"
        return found

    @functools.cached_property
    def shuffled(self):
        """The trained model with its recipes exchanged among tokens of like frequency (within one octave)."""
        d = self.model.dictionary.part(exchanged(self.words.counts, self.rng("shuffled")))
        d.name = "shuffled"
        return Subject("shuffled", hooks.with_embedding(self.model.net, d.matrix()), dictionary=d)

    @property
    def subjects(self):
        """The run's model, its baseline if there is one, and the untrained model."""
        found = [self.model, self.baseline, self.step0]
        return [subject for subject in found if subject is not None]

    @property
    def models(self):
        """{name: Subject} of the run's model, its baseline if there is one, and the null models."""
        return {subject.name: subject for subject in self.subjects} | self.nulls

    def identity(self):
        """What a result belongs to and is made from; with the same code, equal means the same result."""
        trained = [subject for subject in (self.model, self.baseline) if subject is not None]
        return {
            "run": run_identity(self.checkpoint),
            "val_loss": {subject.name: subject.val_loss for subject in trained},
            "seed": self.seed,
            "made_from": {s.checkpoint.name: file_sha256(s.checkpoint.weights) for s in trained}
            | self.own_probes,
        }

    # -- dictionaries -------------------------------------------------------------------------------

    def gauges(self, native, change=dictionary.rotated, n=N_GAUGES):
        """n random rotations (or another `change`) of a dictionary, one by one.

        They are the same in every claim of a run, so its signals claims are not independent of one another.
        """
        for i in range(n):
            yield change(native, torch.Generator().manual_seed(self.seed * 1000 + i))

    def rivals(self, subject=None):
        """{"pca": Dictionary, "ica": Dictionary} of a subject's E, fitted to all tokens that training knows.

        How ICA went is written to the numbers of the report that is being made. If it failed, it is not
        there, and self.missing says why.
        """
        subject = subject or self.model
        if subject.name not in self._rivals:
            fit = torch.from_numpy(self.words.tokens_to_fit(subject.E.size(1)))
            with one_thread():
                E = subject.dictionary.matrix()
            found = {"pca": dictionary.pca(E, fit)}
            try:
                found["ica"] = dictionary.ica(E, fit, self.seed)
            except UserError as error:
                self.missing[subject.name] = {"ica": str(error)}
            self._rivals[subject.name] = found
        found = self._rivals[subject.name]
        if self.report is not None:
            how = found["ica"].fit if "ica" in found else self.missing[subject.name]["ica"]
            self.report.numbers.setdefault("fit of ICA", {})[subject.name] = how
        return found

    def plain_rivals(self):
        """{name: Dictionary} of the plain GPT: coordinates of its E, ICA of it; {} if there is none."""
        if self.baseline is None:
            return {}
        found = {"baseline": self.baseline.dictionary}
        if ica := self.rivals(self.baseline).get("ica"):
            found["baseline ica"] = ica
        return found

    def least_signals(self):
        """The size of the smallest dictionary that is compared: maxima are taken over so many signals."""
        found = [self.model.dictionary, *self.rivals().values(), *self.plain_rivals().values()]
        return min(d.n_signals for d in found)

    def compare(
        self, measure, subject=None, tokens=None, change=dictionary.rotated, n_gauges=N_GAUGES, plain=None
    ):
        """Scores of measure(Dictionary) -> values (n, ...) for native, n_gauges rotations of it, PCA and ICA.

        A measure that returns {metric: values} gives {metric: Scores}. `tokens` (m,): dictionaries of these
        tokens alone, so that codes are (m, S). `subject`: whose E (None: the run's). `change`: rotated, or
        skewed where rotations change nothing. `n_gauges`: more than the least 19 where a measure is cheap.
        `plain`: the measure of whole dictionaries of the plain GPT, its own and ICA, as further rivals.
        One random dictionary is in memory at a time.
        """
        subject = subject or self.model

        def part(d):
            return d if tokens is None else d.part(tokens)

        native = part(subject.dictionary)
        named = {"native": measure(native)}
        named |= {name: measure(part(d)) for name, d in self.rivals(subject).items()}
        gauges = [measure(d) for d in self.gauges(native, change, n_gauges)]
        kind = "skewed" if change is dictionary.skewed else "rotation"
        missing = dict(self.missing.get(subject.name, {}))
        if plain:
            named |= {name: plain(d) for name, d in self.plain_rivals().items()}
            missing |= {f"baseline {name}": why for name, why in self.missing.get("baseline", {}).items()}
        if isinstance(named["native"], dict):
            return {
                key: Scores(pick(named, key), [found[key] for found in gauges], kind, missing)
                for key in named["native"]
            }
        return Scores(named, gauges, kind, missing)

    # -- words and text -----------------------------------------------------------------------------

    def rng(self, *key):
        """A numpy generator that depends on the seed and on `key` (strings) alone."""
        return np.random.default_rng([self.seed, zlib.crc32("/".join(key).encode())])

    def generator(self):
        """A torch generator that depends on the seed alone."""
        return torch.Generator().manual_seed(self.seed)

    @functools.cached_property
    def words(self):
        """The tokens by how often they were in training (data.words.Words). TooFew if almost none was."""
        words = run_words(self.checkpoint.path, self.checkpoint.state)
        known = len(words.known_tokens())
        if known < LEAST_UNITS:
            raise TooFew(f"only {known} tokens were seen {LEAST_COUNT} times in {words.where}")
        return words

    @functools.cached_property
    def text(self):
        """Folder of the held-out text: the run's own data set, else the embedded corpus."""
        return text_folder(self.checkpoint.path, self.checkpoint.state)

    def probe(self, name):
        """The word lists of a kind: those of --probes, else of experiments/probes/."""
        return probe(name, Path(self.config.probes or PROBES).expanduser())

    def heldout(self, n, length):
        """At most n windows of validation text, spread evenly, x, y (n, length).

        No document ends in a window. If fewer than 20 windows are such, the documents are short, and windows
        are packed as in training: <|endoftext|> may be anywhere but at their last token and the next one.
        Raises TooFew if fewer than 20 (or n) are left.
        """
        needed = min(n, LEAST_UNITS)
        try:
            dataset = Dataset(self.text, "val", length)
        except UserError as error:
            raise TooFew(f"only 0 windows of {length} tokens of held-out text: {error}") from None
        x, y = dataset.windows(0, dataset.n_windows)
        ends = torch.cat([x, y[:, -1:]], 1) == dataset.tokenizer.end_of_text  # (windows, length + 1)
        kept = ~ends.any(1)
        if kept.sum() < needed:
            kept = ~ends[:, -2:].any(1)
            if self.report is not None:
                self.report.numbers[f"windows of {length} tokens packed"] = int(kept.sum())
        if kept.sum() < needed:
            raise TooFew(
                f"only {kept.sum()} windows of {length} tokens of held-out text, {needed} are needed"
            )
        chosen = kept.nonzero().flatten()
        chosen = chosen[torch.linspace(0, len(chosen) - 1, min(n, len(chosen))).long()]
        return x[chosen].to(self.device), y[chosen].to(self.device)


def pick(named, key):
    """{name: table[key]} of {name: {key: values}}."""
    return {name: table[key] for name, table in named.items()}


def run_identity(ckpt):
    """Run, step, configuration and data of a Checkpoint, an Identity."""
    config = json.dumps(ckpt.state["config"], sort_keys=True).encode()
    return Identity(ckpt.name, ckpt.step, hashlib.sha256(config).hexdigest(), ckpt.state.get("data_sha256"))
