"""
Signals that are facts: whose signals are the same in every seed, mean something and act, and at what price?

    python experiments/studies/facts.py
    python experiments/studies/facts.py --out=out/try --arms=dense,sparse --seeds=2 --steps=40
    python experiments/studies/facts.py --out=out/final --seeds=5 --first_seed=3 --steps=3000   the final runs

Method
    facts.md beside this script is the protocol: arms, hypotheses H1 to H6 and their thresholds. Its hash is
    in the result. Runs of one seed see the same tokens in the same order, so losses are paired by seed. Every
    start differs from seed to seed. Signals are compared over tokens seen 100 times in every run. After a
    kill the same command continues where it stopped.

Cost
    Five arms, three seeds, 2,000 steps: an hour of training on two cores with bf16 instructions, and then a
    quarter of an hour.
"""

import contextlib
import subprocess
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import threads
import numpy as np
import torch

import configurator
import dictionary
from checkpoint import Checkpoint, newest_whole
from configurator import UserError
from data.words import SHOWN_COUNT
from dictionary import Dictionary
from experiments.lab import Report
from experiments.lab.claims import N_GAUGES, TooFew, to_numpy
from experiments.lab.facts import acts, enriched, halves, missed
from experiments.lab.matching import (
    RECOVERED,
    SHARED,
    matches,
    null_matches,
    recovered,
    shared_directions,
)
from experiments.lab.probes import labelled
from experiments.lab.report import measure, save_and_print
from experiments.lab.results import Estimate
from experiments.lab.stats import regress_out, t_interval
from experiments.studies.runs import Study, trained_run
from files import check_writable, file_sha256

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = Path(__file__).with_suffix(".md")
ARMS = {  # options of train.py; of export.py for the sparse arm
    "dense": {"vocab": "dense"},
    "factored": {"vocab": "factored"},
    "topk": {"vocab": "topk", "top_k": 24},
    "gains": {"vocab": "gains", "reinject": True},
    "sparse": {"n_nonzero": 32, "n_core": 16},
}
SHAPE = {"n_embd": 128, "n_head": 4}  # half the mini's width: two seeds share more of a smaller E (LOG.md)
HYPOTHESES = {
    "equal_loss": "H1: its loss is at most 1 % above that of the dense model",
    "privileged": "H2: its signals write E more sparsely than 19 nulls do, and more are about a category",
    "same": "H3: its signals are the same in other seeds",
    "recoverable": "H4: an independent method finds its signals from its E alone",
    "meaning": "H5: at least 1.5 times as many of its signals are about a category as of the best rival's",
    "act": "H6: removing a signal lowers the words it is about twice as much as other signals at equal KL",
}
CLAIMS = {f"{arm}_{key}": f"{arm}: {text}" for arm in ARMS for key, text in HYPOTHESES.items()}
PRICE, PARTNER, MARGIN, STABLE, RICHER, STRONGER = 0.01, 0.5, 0.05, 0.3, 1.5, 2.0
SINGLE = 0.9  # of a row's energy: with more in one entry, a token is that signal
N_STATES = 256  # of neutral text, for H6


@dataclass
class FactsConfig:
    out: str = "out/facts"  # folder of the runs and of the result
    arms: str = ",".join(ARMS)  # which arms, with commas; dense is the baseline of all
    seeds: int = 3  # runs of each arm
    first_seed: int = 0  # theirs go up from this one; the final runs have 3 to 7
    steps: int = 2000  # of 2,048 tokens each
    dataset: str = "offline-gpt2-8192"  # a prepared data set in the tokens of a small vocabulary
    config: str = "config/gpt2_new_mini.py"  # whose shape and learning rates all arms have
    starts: int = 3  # of the method that H4 asks for

    def __post_init__(self):
        configurator.check(
            self, "seeds >= 2", "first_seed >= 0", "steps >= 8", "steps % 8 == 0", "starts >= 1"
        )
        if unknown := set(self.arms.split(",")) - set(ARMS):
            raise ValueError(f"--arms: {min(unknown)} is none of {', '.join(ARMS)}")
        if "dense" not in self.arms.split(","):
            raise ValueError("--arms must name dense, the baseline of all others")

    @property
    def all_seeds(self):
        return range(self.first_seed, self.first_seed + self.seeds)


# ----------------------------------------------------------------------------------------------------
# The runs


def folder_of(c, arm, seed):
    return Path(c.out).expanduser() / f"{arm}-seed{seed}"


def plan(c):
    """[(folder, [commands])] of all runs, one seed after the other; a dense run before its sparse one."""
    runs = []
    for seed in c.all_seeds:
        for arm in [arm for arm in ARMS if arm in c.arms.split(",")]:
            folder = folder_of(c, arm, seed)
            train = [ROOT / "train.py", f"--out_dir={folder}", "--resume"]
            if arm == "sparse":
                half = folder_of(c, "dense", seed) / f"step_{c.steps // 2:06d}"
                own = [f"--{key}={value}" for key, value in ARMS[arm].items()]
                export = [ROOT / "export.py", f"--run={half}", "--factor=sparse", f"--to={folder}"]
                runs.append((folder, [[*export, *own, f"--seed={seed}"], train]))
                continue
            options = {
                **ARMS[arm],
                **SHAPE,
                "dataset": c.dataset,
                "batch_size": 8,
                "micro_batch_size": 8,
                "max_steps": c.steps,
                "warmup_steps": c.steps // 20,
                "eval_interval": c.steps // 8,
                "save_interval": c.steps // 2,
                "seed": seed,
            }
            settings = [f"--{key}={value}" for key, value in options.items()]
            runs.append((folder, [[train[0], ROOT / c.config, *settings, *train[1:]]]))
    return runs


def finished(folder, steps):
    """The last Checkpoint of a run with its loss over the whole validation split; None if it has none yet."""
    path, state, _ = newest_whole(folder) if folder.is_dir() else (None, None, [])
    if path is None or state["step"] != steps or state["whole_val_loss"] is None:
        return None
    return Checkpoint(path, state)


def make_runs(c):
    """Train what is missing. Raises UserError."""
    runs = plan(c)
    for i, (folder, commands) in enumerate(runs):
        if finished(folder, c.steps):
            continue
        print(f"\n{folder} ({i + 1} of {len(runs)})", flush=True)
        for command in commands:
            if command[0].name == "export.py" and folder.exists():
                continue
            if subprocess.run([sys.executable, *map(str, command)]).returncode:
                raise UserError(f"{folder} failed: see above; the same command continues from here")


# ----------------------------------------------------------------------------------------------------
# What is measured


def single(d):
    """Which tokens of a Dictionary are one signal and little else, (V,): an anchor is its own signal."""
    energy = d.codes**2
    return to_numpy(energy.amax(1) > SINGLE * energy.sum(1))


class Signals:
    """Signals of one kind, a Dictionary in `found` for each of the `labs`, which are models of unlike seeds.

    Tokens that are one signal by themselves in any seed are left out of matches: where signals are made of
    tokens, these would match by construction.
    """

    def __init__(self, name, labs, found, counts):
        self.name, self.labs, self.found = name, labs, found
        self.counts = np.where(np.any([single(d) for d in found], axis=0), 0, counts)
        self.pairs = list(combinations(range(len(labs)), 2))
        self.is_wide = found[0].n_signals > found[0].atoms.size(1)
        self.least, self.means = self.over_pairs(found)

    def over_pairs(self, found):
        """Signals of one seed and their partners in another, of a Dictionary a seed in `found`.

        Returns the least |correlation| of each signal over the other seeds, (S,) a seed, and the mean of each
        pair of seeds, (pairs,).
        """
        codes = [to_numpy(d.codes) for d in found]
        sums = [[] for _ in codes]
        means = []
        for i, j in self.pairs:
            ours, theirs = matches(codes[i], codes[j], self.counts), matches(codes[j], codes[i], self.counts)
            sums[i].append(ours)
            sums[j].append(theirs)
            means.append(ours.mean())
        return [np.min(part, axis=0) for part in sums], np.array(means)

    @property
    def stable(self):
        """Share of signals that match above PARTNER with every other seed."""
        return float(np.mean([(least > PARTNER).mean() for least in self.least]))

    def null_match(self, rng):
        """Mean match of a pair of seeds under the null, (N_GAUGES,)."""
        a, b = (to_numpy(d.codes) for d in self.found[:2])
        return null_matches(a, b, self.counts, rng, "exchange" if self.is_wide else "rotation").mean(1)

    def ceiling(self, rng):
        """Correlations of the directions that E of two seeds share, mean over pairs, (d,)."""
        E = [to_numpy(lab.model.E) for lab in self.labs]
        return np.mean([shared_directions(E[i], E[j], self.counts, rng) for i, j in self.pairs], axis=0)

    def facts(self, words, abouts, rng, ratios=None):
        """[[fact]] by seed: signals that match with every other seed, are about a category, and act so."""
        found = []
        for i, (lab, d, least, about) in enumerate(
            zip(self.labs, self.found, self.least, abouts, strict=True)
        ):
            tried = (least > PARTNER) & about.found
            ratio = effects(lab, d, about, tried, words, rng) if ratios is None else ratios[i]
            found.append(
                [
                    {"signal": int(s), "about": words.names[about.category[s]], "match": float(least[s])}
                    for s in np.flatnonzero(tried & (ratio >= STRONGER))
                ]
            )
        return found


def rivals(lab, seed):
    """{name: Dictionary} of the plain GPT's E: its coordinates, PCA, ICA, codes in atoms and in tokens.

    Random starts are those of `seed`, another one for each run. ICA is missing if it failed.
    """
    E, counts = lab.model.E, lab.words.counts
    fit = torch.from_numpy(lab.words.tokens_to_fit(E.size(1)))
    found = {"E": lab.model.dictionary, "pca": dictionary.pca(E, fit)}
    with contextlib.suppress(UserError):
        found["ica"] = dictionary.ica(E, fit, seed)
    weights = torch.from_numpy(counts + 1.0).to(E)
    rest = E - (weights @ E) / weights.sum()
    n_nonzero = ARMS["sparse"]["n_nonzero"]
    most = torch.from_numpy(lab.words.by_count[: 4 * E.size(1)].copy())
    return found | {
        "sparse": dictionary.sparse(rest, 4 * E.size(1), n_nonzero, weights, seed, starts=1),
        "anchors": dictionary.anchored(rest, most, n_nonzero, weights),
    }


def null_dictionary(d, counts, generator):
    """A null of a Dictionary: a rotation of it where there are no more signals than dimensions.

    Else Gaussian atoms of the covariance of its product, in which that is coded with as many entries.
    """
    if d.n_signals <= d.atoms.size(1):
        return dictionary.rotated(d, generator)
    E, weights = d.matrix().cpu().float(), torch.from_numpy(counts + 1.0).float()
    atoms = torch.nn.functional.normalize(dictionary.gaussian_rows(E, d.n_signals, generator), dim=1)
    n = round(float((d.codes != 0).sum()) / len(d.codes))
    return Dictionary("gaussian", dictionary.encode(E, atoms, n, weights), atoms)


class Meaning:
    """The labelled words that all runs know, and how a dictionary's signals stand to their categories."""

    def __init__(self, lab, counts, rng):
        ids, labels, self.names = labelled(lab)
        self.log_frequency = np.log(counts[ids] + 1.0)
        self.ids, self.labels, self.first = ids, labels, halves(labels, rng)

    def of(self, d):
        """The Enriched of a Dictionary, log frequency regressed out."""
        return enriched(regress_out(to_numpy(d.codes[self.ids]), self.log_frequency), self.labels, self.first)

    def share(self, d):
        return float(self.of(d).found.mean())

    def members(self, category):
        """Ids of the half of a category's words that chose nothing."""
        return self.ids[(self.labels == category) & ~self.first]


def effects(lab, d, about, tried, words, rng):
    """`acts` of the signals `tried` (S,), for the categories that they are about, (S,): else not a number."""
    x, _ = lab.heldout(64, min(32, lab.model.net.config.block_size))
    with torch.no_grad():
        h = lab.model.net.encode(x).flatten(0, 1)
    h = h[torch.from_numpy(rng.permutation(len(h))[:N_STATES])]
    found = np.full(d.n_signals, np.nan)
    for s in np.flatnonzero(tried):
        members = words.members(about.category[s])
        found[s] = acts(lab.model.E, d.atoms, d.codes, h, s, members, rng)
    return found


# ----------------------------------------------------------------------------------------------------
# The hypotheses


def decide(passed, reason, measured, n, unit="seeds", controls=None, lower=False):
    """Fields of a Claim: `passed` is None where it cannot be said."""
    verdict = "inconclusive" if passed is None else "supported" if passed else "not supported"
    fields = {"kind": "effect", "verdict": verdict, "reason": reason, "unit": unit, "n": n, "lower": lower}
    return fields | {"measured": measured, "controls": controls or {}}


def about(values):
    """Mean and range of a few values, one a seed."""
    return Estimate(float(np.mean(values)), float(np.min(values)), float(np.max(values)))


class Arm:
    """The runs of one arm, one a seed, with their Signals."""

    def __init__(self, name, checkpoints):
        self.runs = [trained_run(ckpt) for ckpt in checkpoints]
        self.labs = [run.lab() for run in self.runs]
        self.losses = np.array([run.loss for run in self.runs])
        self.counts = np.min([lab.words.counts for lab in self.labs], axis=0)
        native = [dictionary.readable(lab.model.net) for lab in self.labs]
        self.signals = Signals(name, self.labs, native, self.counts)


def run(study, c):
    arms = {
        arm: Arm(arm, [finished(folder_of(c, arm, s), c.steps) for s in c.all_seeds])
        for arm in c.arms.split(",")
    }
    dense = arms["dense"]
    report = Report(study, "facts", {key: text for key, text in CLAIMS.items() if key.split("_")[0] in arms})
    rng = np.random.default_rng(0)
    report.numbers["protocol_sha256"] = file_sha256(PROTOCOL)
    often = int((dense.counts >= SHOWN_COUNT).sum())
    if often < 4 * dense.signals.found[0].n_signals:
        raise TooFew(f"only {often} tokens were seen {SHOWN_COUNT} times in training with each seed")

    plain = [rivals(lab, seed) for seed, lab in enumerate(dense.labs)]
    names = [name for name in plain[0] if all(name in found for found in plain)]
    words = Meaning(dense.labs[0], dense.counts, rng)
    rival = {}
    for name in names:
        signals = Signals(name, dense.labs, [found[name] for found in plain], dense.counts)
        abouts = [words.of(d) for d in signals.found]
        facts = signals.facts(words, abouts, rng)
        rival[name] = {
            "match": float(signals.means.mean()),
            "null": float(signals.null_match(rng).mean()),
            "stable": signals.stable,
            "enriched": float(np.mean([about.found.mean() for about in abouts])),
            "facts": [len(part) for part in facts],
            "list": facts[0],
        }
    report.numbers["rivals"] = rival
    for name, values in rival.items():
        for metric in ("match", "stable", "enriched"):
            report.row(metric, values[metric], model="dense", dictionary=name)
    table = {name: test_arm(report, arm, dense, rival, words, rng, c) for name, arm in arms.items()}
    report.numbers["arms"] = table
    report.gallery = gallery(table, rival)
    draw(report, table, rival)
    return report


def test_arm(report, arm, dense, rival, words, rng, c):
    """H1 to H6 of one arm: its claims and rows; its numbers."""
    n, signals = len(arm.runs), arm.signals

    def claim(key, passed, reason, measured, **fields):
        report.claim(f"{signals.name}_{key}", decide(passed, reason, measured, **({"n": n} | fields)))

    price = arm.losses / dense.losses - 1
    bound = t_interval(price)
    passed = None if n < 3 else bound.high <= PRICE
    claim("equal_loss", passed, f"the interval ends at {bound.high:.2%}", bound, lower=True)

    # H2: privileged
    gains, shares = [], []
    for lab, d in zip(arm.labs, signals.found, strict=True):
        k = max(1, d.n_signals // 32)
        E, counts = d.matrix(), lab.words.counts
        kept = np.flatnonzero(counts >= SHOWN_COUNT)
        nulls = [null_dictionary(d, counts, torch.Generator().manual_seed(i)) for i in range(N_GAUGES)]
        cut = [missed(E[kept], part.atoms, k, counts[kept]) for part in (d, *nulls)]
        share = [words.share(part) for part in (d, *nulls)]
        gains.append(min(cut[1:]) - cut[0])
        shares.append(share[0] - max(share[1:]))
    reason = (
        f"over the best null: {min(gains):.3f} of E's energy, {min(shares):.3f} of the signals (worst seed)"
    )
    claim("privileged", min(gains) > 0 and min(shares) > 0, reason, about(gains))

    # H3: the same in other seeds
    means, top = signals.means, signals.ceiling(rng)
    start = signals.over_pairs([dictionary.readable(lab.step0.net) for lab in arm.labs])[1]
    null = signals.null_match(rng)
    best = max(values["match"] for values in rival.values())
    half = top.clip(0).mean() / 2
    passed = means.mean() >= half and means.min() >= best + MARGIN and signals.stable >= STABLE
    reason = f"half of the ceiling is {half:.3f}, the best rival has {best:.3f}"
    reason += f", {signals.stable:.0%} of the signals are above {PARTNER}"
    controls = {"null": about(null), "step 0": about(start), "ceiling": about(top)}
    claim("same", passed, reason, about(means), n=len(means), unit="pairs", controls=controls)

    # H4: recoverable
    found = [
        recovered(d, lab.words.counts, i, c.starts, compared=signals.counts)
        for i, (lab, d) in enumerate(zip(arm.labs, signals.found, strict=True))
    ]
    reason = f"the worst start and seed has {min(found):.3f}"
    claim("recoverable", min(found) >= RECOVERED, reason, about(found))

    # H5: meaning, and H6: they act
    abouts = [words.of(d) for d in signals.found]
    share = [float(part.found.mean()) for part in abouts]
    best = max(values["enriched"] for values in rival.values())
    claim("meaning", min(share) >= RICHER * best, f"the best rival has {best:.3f}", about(share))
    ratios = [
        effects(lab, d, part, part.found, words, rng)
        for lab, d, part in zip(arm.labs, signals.found, abouts, strict=True)
    ]
    strong = [
        float((ratio[~np.isnan(ratio)] >= STRONGER).mean()) if (~np.isnan(ratio)).any() else 0.0
        for ratio in ratios
    ]
    reason = f"{np.mean(strong):.0%} of the signals that are about a category"
    claim("act", min(strong) >= 0.5, reason, about(strong))

    facts = signals.facts(words, abouts, rng, ratios)
    for run, loss, part in zip(arm.runs, arm.losses, facts, strict=True):
        report.row("facts", len(part), model=run.name)
        report.row("validation loss", loss, model=run.name)
    return {
        "losses": arm.losses.tolist(),
        "price": float(price.mean()),
        "match": float(means.mean()),
        "null": float(null.mean()),
        "step 0": float(start.mean()),
        "ceiling": float(2 * half),
        "shared directions": int((top > SHARED).sum()),
        "stable": signals.stable,
        "recovered": float(np.mean(found)),
        "enriched": float(np.mean(share)),
        "act": float(np.mean(strong)),
        "facts": [len(part) for part in facts],
        "list": facts[0],
    }


def gallery(table, rival):
    """One line for each arm and each rival on the plain E; below them the facts of the first seed."""
    columns = ("price", "match", "null", "ceiling", "stable", "recovered", "enriched", "act")
    lines = [f"{'':18}" + "".join(f"{name:>11}" for name in columns) + "   facts, by seed"]
    for arm, numbers in table.items():
        cells = "".join(f"{numbers[name]:11.3f}" for name in columns)
        lines.append(f"{arm:18}{cells}   {' '.join(map(str, numbers['facts']))}")
    for name, numbers in rival.items():
        cells = "".join(f"{numbers[key]:11.3f}" if key in numbers else f"{'':11}" for key in columns)
        lines.append(f"{'dense, ' + name:18}{cells}   {' '.join(map(str, numbers['facts']))}")
    for name, numbers in (table | {f"dense, {name}": rival[name] for name in rival}).items():
        listed = [f"s{fact['signal']} {fact['about']}" for fact in numbers["list"]]
        lines += [f"\nFacts of {name}, first seed: {', '.join(listed) or 'none'}"]
    return "\n".join(lines)


def draw(report, table, rival):
    """Stability against price: every arm between its null and its ceiling, every rival at no price."""
    n = sum(sum(numbers["facts"]) for numbers in table.values())
    title = f"Match of two seeds' signals against the price in loss; {n} facts in all arms and seeds"
    with report.figure("facts", title, size=(6, 3.6)) as ax:
        for arm, numbers in table.items():
            x = 100 * numbers["price"]
            ax.plot([x, x], [numbers["null"], numbers["ceiling"]], color="0.8", lw=5, solid_capstyle="butt")
            ax.plot(x, numbers["match"], "D", label=arm)
        for name, numbers in rival.items():
            ax.plot(0, numbers["match"], "o", mfc="none", label=f"dense, {name}")
        ax.set(xlabel="loss above the dense model, %", ylabel="mean |correlation| (bar: null to ceiling)")
        ax.legend(fontsize=7)


def main():
    (c,) = configurator.parse(FactsConfig)
    out = Path(c.out).expanduser()
    check_writable(out / "experiments")
    make_runs(c)
    checkpoints = [finished(folder, c.steps) for folder, _ in plan(c)]
    save_and_print(measure(run, Study(out, checkpoints), c))


if __name__ == "__main__":
    configurator.run(main)
