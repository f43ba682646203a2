"""
Does every claim find what was planted for it, and refuse what no text has taught?

    python experiments/audit.py                        all twelve; writes the table in README.md
    python experiments/audit.py --only=ablate_signal   some of them, printed alone

Method
    A plant (lab/plants.py) is a small model in which a claim holds by construction. Found: of 3 plants, drawn
    with different seeds, how many are supported. Error rate: of 20 null models of each kind, how many are
    supported, with the 95 % interval of Clopper and Pearson (1934). A null model is studied as if it were the
    run: its own controls are drawn anew.

    noise           the plant's start, plus Gaussian noise as long as the plant is from it
    shuffled text   a model trained on tokens in random order; its control sees another order
    turned          the plant itself with its signals rotated, the same function: for claims about signals

    Models have 2 or 3 layers and 16 to 64 signals. Words and prompts are fewer than for a real run, see
    SIZES. An interval includes the chance level: 2.5 % for a single control, 5 % for 19 random changes.

Cost
    800 experiments and 40 trainings of small models. 12 minutes on two cores (LOG.md).
"""

import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import configurator
import files
from experiments.lab import Lab, LabConfig, continuations, nulls, plants, plots
from experiments.lab.report import measure
from experiments.run_all import chosen

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- audit: written by experiments/audit.py -->", "<!-- end of audit -->"
PLANTS, NULLS = 3, 20  # draws of each kind
HOW = {"batch_size": 16, "micro_batch_size": 16, "lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 5}
STEPS = 60  # of training on shuffled text
SIZES = {  # fewer words and prompts, so that a draw takes a second
    "nearest_neighbors": {"POOL": 500},
    "semantic_clusters": {"POOL": 500, "PERMUTATIONS": 19},
    "semantic_algebra": {"QUESTIONS": 200},
    "sparsity_profile": {"N_TOKENS": 200, "DIVISORS": (8,), "N_WINDOWS": 20},
    "basis_geometry": {"TOKENS": 400},
    "ablate_signal": {"N_PROMPTS": 60, "N_INPUT_PROMPTS": 1},
    "signal_lens": {"N_WINDOWS": 64},
    "concept_inception": {"N_TARGETS": 24, "HALVINGS": 2, "GRID": (0.25, 0.5, 1.0, 2.0, 4.0, 64.0)},
    "gene_tampering": {"SIDES": ()},
}


@dataclass(frozen=True)
class Case:
    """A plant, and the claims of one experiment that it is for."""

    experiment: str
    plant: object  # a function of lab/plants.py
    shape: dict  # beside that of plants.tiny
    effects: tuple = ()  # keys of claims
    signals: tuple = ()


WIDE, MORE, FULL = {"n_embd": 32}, {"n_embd": 32, "n_signal": 64}, {"n_embd": 48, "n_signal": 64}
HALF = {"n_embd": 32, "n_signal": 16}
CASES = (
    Case("nearest_neighbors", plants.word_classes, WIDE, ("category", "category_apart")),
    Case("semantic_clusters", plants.word_classes, WIDE, ("silhouette",)),
    Case("semantic_algebra", plants.analogies, WIDE, ("analogies",)),
    Case("sparsity_profile", plants.words_in_pairs, FULL, ("sparse",), ("privileged", "truncation")),
    Case("basis_geometry", plants.sparse, MORE, ("movement",), ("privileged",)),
    Case("signal_codebook", plants.marked_categories, {"n_signal": 64}, ("enriched",), ("separates",)),
    Case("ablate_signal", plants.driven_by_one, {}, ("generalizes",)),
    Case("ablate_signal", plants.driven, {}, (), ("strongest", "concentrated")),
    Case("signal_lens", plants.decided_at_half, {}, ("lens_half",)),
    Case("signal_lens", plants.same_signals, WIDE, (), ("overlap_half",)),
    Case("signal_lens", plants.own_signals, WIDE, (), ("one_writer",)),
    Case("emotion_surgery", plants.confused_sentiment, FULL, ("steers", "beats_diffmean"), ("few_signals",)),
    Case("concept_inception", plants.words_aside, FULL, ("forces",), ("few_signals",)),
    Case("gene_tampering", plants.words_in_pairs, FULL, ("swap", "tilt"), ("few_signals",)),
    Case("crystallization", plants.decided_early, HALF | {"n_layer": 3}, ("early_injection", "earlier")),
    Case("crystallization", plants.nearby_at_last, HALF, ("long_context",)),
)


def make_text(folder):
    """The data set of all draws: pairs of words, those of the templates most often."""
    pairs = plants.pairs()
    times = np.random.default_rng(0).integers(10, 50, len(pairs))
    times[: len(plants.COMMON) // 2] = 80
    return plants.corpus_of_pairs(folder, pairs, times)


def train_shuffled(seed, out, data):
    """A run trained on shuffled text: its folder, a run like any other."""
    start = plants.tiny(seed + 100, n_embd=32)
    how = HOW | {"seed": seed, "max_steps": STEPS}
    run = plants.save_run(out / f"real-{seed}", start, data, step=STEPS, start=start, **how)
    ckpt = checkpoint.open_run(run)
    counts = Lab(LabConfig(run=str(run), device="cpu")).words.counts
    return nulls.shuffled_text(ckpt, start, counts, out / f"shuffled-{seed}").run


def draw(number, kind, seed, out, data):
    """The folder of a run: the plant of case `number`, or a null model of its kind."""
    case = CASES[number]
    if kind == "shuffled text":
        return next((out / f"shuffled-{seed}").glob("shuffled-*"))
    start = plants.tiny(seed + 1000, **case.shape)
    net = case.plant(start, seed)
    if kind == "noise":
        net = nulls.add_noise(start, net, torch.Generator().manual_seed(seed))
    if kind == "turned":
        net = plants.turned(net, seed)
    folder = out / f"{number}-{kind}-{seed}" / "run"
    return plants.save_run(folder, net, data, start=start)


def verdicts(number, kind, seed, out, data):
    """{key: verdict} of the claims of a case's experiment on one draw."""
    experiment = import_module(f"experiments.{CASES[number].experiment}")
    run = draw(number, kind, seed, out, data)
    report = measure(experiment.run, Lab(LabConfig(run=str(run), device="cpu", seed=seed)))
    return {claim.key: claim.verdict for claim in report.claims}


def shrink(set_value=setattr):
    """Let experiments run at SIZES, without pictures."""
    set_value(continuations, "NEW_TOKENS", 1)
    set_value(plots, "to_png", lambda figure: b"")
    for name, sizes in SIZES.items():
        for constant, value in sizes.items():
            set_value(import_module(f"experiments.{name}"), constant, value)


def prepare():
    """A process for draws: on one thread, and silent."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    shrink()


def kinds(case):
    """{kind of draw: number of them} of a case."""
    found = {"plant": PLANTS, "noise": NULLS}
    found |= {"shuffled text": NULLS} if case.effects else {}
    return found | ({"turned": NULLS} if case.signals else {})


def audit(numbers, out):
    """{(number of a case, kind): [{key: verdict} of every draw]}."""
    data = make_text(out / "text")
    found = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, prepare) as pool:
        if any(CASES[number].effects for number in numbers):
            trainings = [pool.submit(train_shuffled, seed, out, data) for seed in range(NULLS)]
            for future in tqdm(as_completed(trainings), "trainings", NULLS, disable=None):
                future.result()
        jobs = {}
        for number in numbers:
            for kind, n in kinds(CASES[number]).items():
                for seed in range(n):
                    jobs[pool.submit(verdicts, number, kind, seed, out, data)] = number, kind
        for future in tqdm(as_completed(jobs), "experiments", len(jobs), disable=None):
            found.setdefault(jobs[future], []).append(future.result())
    return found


def rate(found, key):
    """The cell of a kind of null: supported of decided, with the interval of the rate."""
    from scipy.stats import binomtest  # takes a second to import

    counts = Counter(verdict[key] for verdict in found)
    n = counts.total() - counts["inconclusive"]
    if not n:
        return "inconclusive"
    interval = binomtest(counts["supported"], n).proportion_ci()
    return f"{counts['supported']} of {n} [{interval.low:.2f}, {interval.high:.2f}]"


def table(numbers, found):
    """The rows of the table, as Markdown."""
    lines = ["| experiment | claim | plant | found | noise | shuffled text | turned |", "|" + "---|" * 7]
    for number in numbers:
        case = CASES[number]
        plant = case.plant.__name__.replace("_", " ")
        for key in (*case.effects, *case.signals):
            n_found = sum(verdict[key] == "supported" for verdict in found[number, "plant"])
            nulls = ["noise", "shuffled text"] if key in case.effects else ["noise", "", "turned"]
            rates = [rate(found[number, kind], key) if kind else "" for kind in nulls]
            cells = [f"`{case.experiment}`", f"`{key}`", plant, f"{n_found} of {PLANTS}", *rates]
            lines.append(f"| {' | '.join(cells + [''] * (7 - len(cells)))} |")
    return "\n".join(lines)


def write(text):
    """Put the table into README.md, between its marks."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    files.replace_file(README, f"{before}{BEGIN}\n{text}\n{END}{after}".encode())


@dataclass
class AuditConfig:
    only: str = ""  # names of experiments, separated by commas; empty: all, and README.md is written


def main():
    (c,) = configurator.parse(AuditConfig)
    numbers = [i for i, case in enumerate(CASES) if case.experiment in chosen(c.only)]
    with tempfile.TemporaryDirectory() as out:
        text = table(numbers, audit(numbers, Path(out)))
    print(text)
    if not c.only:
        write(text)


if __name__ == "__main__":
    configurator.run(main)
