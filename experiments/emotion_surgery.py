"""
Does a sentiment direction made of recipes steer the model, and do a few signals carry it?

    python experiments/emotion_surgery.py --run=out/reflow-nano

Claims
  effect   adding the direction raises held-out positive words over held-out negative ones: further than a
           random direction, the same words with shuffled labels, or the same recipe in the untrained model.
  effect   it steers further than the difference of mean activations and than the plain GPT's direction.
  signals  cut down to its largest eighth of signals, it steers further than cut down under random rotations,
           PCA and ICA.

Method. v = (mean recipe of positive words - mean recipe of negative words) @ atoms, which is the difference
of their mean rows of E: a plain GPT has the same surgery, and only the third claim is about signals. v is
added to the stream entering the first half of the blocks, at equal length: in norms of the vectors steered.
Words that build v and words that measure it are disjoint; positive and negative ones are paired by frequency
in training, so that sentiment is not frequency. Response: the logit of a positive word minus its partner's;
slope: its regression on the strength, -2 to 2. All prompts share one direction, so many prompts are no proof
that it carries sentiment; the unit is a pair of held-out words, averaged over the test templates. By prompt:
logmeanexp logit of the positive words minus that of the negative ones, with the share of prompts that go the
wrong way (Tan et al., 2407.12404). DiffMean (2501.17148): mean stream behind the steered blocks at a positive
word less that at a negative one. Judge: continuations, with their loss under the unsteered model, zlib ratio
and distinct bigrams, and words of VADER's lexicon that did not build v. The strength is chosen on the dev
templates by the harmonic mean of concept and fluency, and reported on the test templates.

Cost: 40 forward passes over 4 strengths of 24 short prompts, and 156 continuations of 12 tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import zlib

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from configurator import UserError
from data.tokenizer import encoding
from experiments import lab

PUBLISHED = 'flips "terrible" to "great"; works entering layers 0 to 12 of 32 (464M, OpenWebText)'
STRENGTHS = (-2.0, -1.0, 1.0, 2.0)  # residual norms, symmetric: a slope needs no intercept
CHOICES = (0.5, 1.0, 2.0)  # strengths to choose among
NEW_TOKENS = 12  # of a continuation
DRAWS = 5  # random directions, and shufflings of the labels


def word_pairs(laboratory, split, least=3):
    """Ids of positive and of negative words seen in training, paired by how often, (2, n)."""
    probe = laboratory.probe("sentiment")
    sides = [[laboratory.known(w, least) for w in probe[p][split]] for p in ("positive", "negative")]
    sides = [np.array([i for i in ids if i is not None], int) for ids in sides]
    if not all(map(len, sides)):
        raise UserError("the run has not seen the sentiment words of probes/sentiment.json in training")
    logs = [np.log(laboratory.counts[ids]) for ids in sides]
    chosen = linear_sum_assignment(np.abs(logs[0][:, None] - logs[1]))
    pairs = np.stack([ids[i] for ids, i in zip(sides, chosen, strict=True)])
    return torch.from_numpy(pairs).to(laboratory.device)


def direction(dictionary, pairs, k=None):
    """(mean code of pairs[0] - mean code of pairs[1]), its k largest entries (None: all), @ atoms, (d,)."""
    code = dictionary.codes[pairs[0]].mean(0) - dictionary.codes[pairs[1]].mean(0)  # (S,)
    return (code if k is None else lab.largest(code, k)) @ dictionary.atoms


def diff_mean(net, prompts, pairs, layer):
    """Mean stream entering `layer` at a word of pairs[0] after a prompt, less that of pairs[1], (d,)."""
    length = min(map(len, prompts))
    tails = torch.tensor([p[-length:] for p in prompts], device=pairs.device)  # (P, length)
    words = pairs.flatten()  # (2n,)
    idx = torch.cat([tails.repeat_interleave(len(words), 0), words.repeat(len(tails))[:, None]], 1)
    seen = []
    with lab.edited(net, {layer: lambda x: seen.append(x[:, -1]) or x}), torch.no_grad():
        for part in idx.split(256):
            net.encode(part)
    mean = torch.cat(seen).view(len(tails), *pairs.shape, -1).mean((0, 2))  # (2, d)
    return mean[0] - mean[1]


def dose_response(subject, prompts, v, layers, words, strengths=STRENGTHS):
    """Logits of `words` (2, n) after each prompt under each strength of v, (strengths, P, 2, n)."""
    rows = prompts * len(strengths)
    dose = torch.tensor(strengths, device=v.device).repeat_interleave(len(prompts)).view(-1, 1, 1)
    with lab.steering(subject.net, v, dose, layers):
        h = lab.last_hidden(subject.net, rows, batch=len(rows))  # (strengths * P, d)
    logits = (h @ subject.E[words.flatten()].T).view(len(strengths), len(prompts), *words.shape)
    return logits.double().cpu().numpy()


def slope(y, strengths=STRENGTHS):
    """Least-squares slope of y (strengths, ...) on strengths that are symmetric about zero."""
    s = np.array(strengths)
    return np.tensordot(s, y, 1) / (s**2).sum()


def by_word(logits):
    """(strengths, P, 2, n) -> slope of each pair of words, averaged over prompts, (n,)."""
    return slope(logits[:, :, 0] - logits[:, :, 1]).mean(0)


def tilt(logits):
    """(..., 2, n) -> log mean exp of the positive logits minus that of the negative ones, (...)."""
    positive, negative = np.moveaxis(np.logaddexp.reduce(logits, axis=-1), -1, 0)
    return positive - negative


def fluency(net, prompts, texts):
    """Continuations (lists of ids) of prompts judged by `net`: loss in nats, zlib ratio, distinct bigrams."""
    rows = [p + t for p, t in zip(prompts, texts, strict=True)]
    idx = lab.padded(rows, net.norm.weight.device)
    at = torch.arange(1, idx.size(1), device=idx.device)
    first, end = (torch.tensor([len(r) for r in part], device=idx.device) for part in (prompts, rows))
    new = (at >= first[:, None]) & (at < end[:, None])  # (B, width - 1)
    with torch.no_grad():
        h = torch.cat([net.encode(part[:, :-1]) for part in idx.split(64)])
    parts = zip(h[new].split(512), idx[:, 1:][new].split(512), strict=True)
    losses = torch.cat([F.cross_entropy(lab.logits(net, a), b, reduction="none") for a, b in parts])
    text = "\n".join(encoding().decode(t) for t in texts).encode()
    bigrams = [pair for t in texts for pair in zip(t, t[1:], strict=False)]
    return {
        "loss": losses.double().mean().item(),
        "zlib ratio": len(zlib.compress(text, 9)) / max(len(text), 1),
        "distinct-2": len(set(bigrams)) / max(len(bigrams), 1),
    }


def harmonic(concept, fluent):
    """Harmonic mean of two scores, 0 if either is not positive."""
    return 2 * concept * fluent / (concept + fluent) if min(concept, fluent) > 0 else 0.0


def continuations(laboratory, net, prompts, v, layers, strengths):
    """{strength: a sampled continuation of each prompt, lists of ids}."""
    rows = prompts * len(strengths)
    dose = torch.tensor(strengths, device=v.device).repeat_interleave(len(prompts)).view(-1, 1, 1)
    generator = torch.Generator(laboratory.device).manual_seed(laboratory.seed)
    with lab.steering(net, v, dose, layers):
        out = net.generate(rows, NEW_TOKENS, generator=generator)
    return {s: out[i * len(prompts) : (i + 1) * len(prompts)] for i, s in enumerate(strengths)}


def judge(subject, prompts, v, layers, words, texts):
    """{size: {concept, fluency, harmonic}} of continuations by strength; a size averages both signs of it.

    Concept: probability of the lists' right side given either, 0.5 scaled to 0 and 1 to 1. Fluency: ratio of
    the perplexities of unsteered and steered continuations, at most 1.
    """
    doses = tuple(texts)
    tilts = dict(zip(doses, tilt(dose_response(subject, prompts, v, layers, words, doses)), strict=True))
    fluent = {s: fluency(subject.net, prompts, t) for s, t in texts.items()}
    scores = {}
    for size in sorted({abs(s) for s in doses} - {0.0}):
        signs = (size, -size)
        concept = np.mean([2 / (1 + np.exp(-np.sign(s) * tilts[s])) - 1 for s in signs])
        ratio = np.mean([min(1, np.exp(fluent[0.0]["loss"] - fluent[s]["loss"])) for s in signs])
        total = harmonic(concept, ratio)
        scores[size] = {"concept": concept, "fluency": ratio, "harmonic": total}
    return scores, fluent


@torch.no_grad()
def neutral_kl(net, x, v, layers, strengths):
    """{strength: KL(unsteered || steered) of the next token after each token of x (n, T), nats, (n * T,)}."""

    base, out = lab.log_p(net, net.encode(x)), {}  # (n, T, n_tokens)
    for s in strengths:
        with lab.steering(net, v, s, layers):
            out[s] = lab.kl(base, lab.log_p(net, net.encode(x))).flatten().cpu().numpy()
    return out


def run(laboratory):
    report = lab.Report(laboratory, "emotion_surgery")
    subject, net = laboratory.reflow, laboratory.reflow.net
    probe, encode = laboratory.probe("sentiment"), encoding().encode_ordinary
    dev, test = ([encode(t) for t in probe["templates"][part]] for part in ("dev", "test"))
    build, words = word_pairs(laboratory, "build"), word_pairs(laboratory, "held_out")
    layers = range(max(1, net.config.n_layer // 2))
    k = max(1, len(subject.dictionary.atoms) // 8)

    def respond(who, v):
        return dose_response(who, test, v, layers, words)

    v = direction(subject.dictionary, build)
    rng = laboratory.rng("directions")
    everyone = build.flatten()
    shuffles = [everyone[torch.from_numpy(rng.permutation(len(everyone)))] for _ in range(DRAWS)]
    noise = torch.from_numpy(rng.standard_normal((DRAWS, len(subject.dictionary.atoms)))).to(v)
    logits = {
        "native": respond(subject, v),
        "native, k signals": respond(subject, direction(subject.dictionary, build, k)),
        "diffmean": respond(subject, diff_mean(net, dev[:8], build, layers[-1] + 1)),
        "step 0": respond(laboratory.step0, direction(laboratory.step0.dictionary, build)),
    }
    for name, d in laboratory.rivals(subject).items():
        logits[f"{name}, k signals"] = respond(subject, direction(d, build, min(k, len(d.atoms))))
    if laboratory.baseline:
        d = laboratory.baseline.dictionary
        logits["baseline"] = respond(laboratory.baseline, direction(d, build))
        logits["baseline, k coordinates"] = respond(
            laboratory.baseline, direction(d, build, len(d.atoms) // 8)
        )
    random = [respond(subject, code @ subject.dictionary.atoms) for code in noise]
    shuffled = [respond(subject, direction(subject.dictionary, s.view_as(build))) for s in shuffles]
    rotated = [respond(subject, direction(d, build, k)) for d in laboratory.rotations(subject.dictionary)]

    units = {name: by_word(y) for name, y in logits.items()}
    chance = {
        "random": np.mean([by_word(y) for y in random], axis=0),
        "shuffled labels": np.mean([by_word(y) for y in shuffled], axis=0),
        "step 0": units["step 0"],
    }
    report.claim(
        lab.effect(
            "the recipe direction raises held-out positive words over negative ones (nats per residual norm)",
            units["native"],
            chance,
            "word pairs",
            published=PUBLISHED,
        )
    )
    report.claim(
        lab.effect(
            "it steers further than a difference of mean activations and than the plain GPT's direction",
            units["native"],
            {name: units[name] for name in ("diffmean", "baseline") if name in units},
            "word pairs",
        )
    )
    turned = np.stack([by_word(y) for y in rotated])
    report.claim(
        lab.signals(
            f"its {k} largest of {len(subject.dictionary.atoms)} signals steer further than those of any"
            " other dictionary, at equal length",
            units["native, k signals"],
            turned,
            {name: units[f"{name}, k signals"] for name in laboratory.rivals(subject)},
            "word pairs",
        )
    )

    prompts = {name: slope(tilt(y)) for name, y in logits.items()}  # (P,) each
    prompts["rotated, k signals"] = slope(tilt(np.stack(rotated, 1))).mean(0)
    prompts["random"] = slope(tilt(np.stack(random, 1))).mean(0)
    for name, values in prompts.items():
        report.row("slope over prompts", values.mean(), dictionary=name)
        report.row("anti-steerable share", (values < 0).mean(), dictionary=name)
        for i, value in enumerate(values):
            report.row("slope of a prompt", value, dictionary=name, prompt=f"test {i}")
    for name, values in (units | chance | {"rotated, k signals": turned.mean(0)}).items():
        report.row("slope over word pairs", values.mean(), dictionary=name)
    for name, y in logits.items():
        for s, values in zip(STRENGTHS, tilt(y), strict=True):
            report.row("tilt, nats", values.mean(), dictionary=name, control=f"strength {s:g}")

    # What it costs. The strength is chosen on the dev templates.
    doses = (0.0, *CHOICES, *(-s for s in CHOICES))
    dev = dev[::2]  # continuations are dear
    texts = continuations(laboratory, net, dev, v, layers, doses)
    scores, dev_fluency = judge(subject, dev, v, layers, words, texts)
    best = max(scores, key=lambda s: scores[s]["harmonic"])
    texts = continuations(laboratory, net, test, v, layers, (0.0, best, -best))
    tested, test_fluency = judge(subject, test, v, layers, words, texts)
    for split, found in (("dev", dev_fluency), ("test", test_fluency)):
        for s, values in found.items():
            for metric, value in values.items():
                report.row(f"continuations, {metric}", value, control=f"{split}, strength {s:g}")
    lexicon = {
        side: {laboratory.known(w, 1) for w in probe["lexicon"][side]} - set(everyone.tolist()) - {None}
        for side in ("positive", "negative")
    }
    judged = {}
    for s, found in texts.items():
        said = {side: sum(t in ids for text in found for t in text) for side, ids in lexicon.items()}
        judged[f"{s:g}"] = said
        for side, n in said.items():
            report.row(f"{side} words of the lexicon said", n, control=f"test, strength {s:g}")
    x, _ = laboratory.heldout(8, 8)
    kl = neutral_kl(net, x, v, layers, doses)
    for s, values in kl.items():
        report.row("KL on held-out text", values.mean(), control=f"strength {s:g}")

    native = units["native"].mean()
    report.numbers = {
        "word_pairs": words.shape[1],
        "slope": {name: float(values.mean()) for name, values in (units | chance).items()},
        "slope_rotated_k": float(turned.mean()),
        "share_kept_by_k_signals": float(units["native, k signals"].mean() / native),
        "anti_steerable_share": {name: float((p < 0).mean()) for name, p in prompts.items()},
        "strength": best,
        "dev_scores": {f"{s:g}": value for s, value in scores.items()},
        "test_scores": tested[best],
        "test_continuations": {f"{s:g}": value for s, value in test_fluency.items()},
        "lexicon_words_said": judged,
        "kl_neutral": {f"{s:g}": float(values.mean()) for s, values in kl.items()},
    }
    report.gallery = (
        f"Continuations of the first test templates, not selected; strength {best:g} residual norms\n"
    )
    for i, prompt in enumerate(test[:4]):
        report.gallery += f"\n{encoding().decode(prompt)} ...\n"
        for s in (-best, 0.0, best):
            report.gallery += f"  {s:+5.2g} {repr(encoding().decode(texts[s][i]))[1:-1]}\n"
    report.notes.append(
        "The direction is the same in recipe space and in E: only the claim about k signals is about recipes."
    )
    figures(report, logits, random, prompts, scores, kl, best)
    return report


def figures(report, logits, random, prompts, scores, kl, best):
    plt = lab.pyplot()
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8))
    shown = {
        "native": ("native", "-", "recipe direction"),
        "native, k signals": ("native", ":", "its k signals"),
        "diffmean": ("other", "-", "DiffMean of activations"),
        "baseline": ("baseline", "-", "plain GPT"),
        "step 0": ("step 0", "-", "step 0"),
    }
    for name, (colour, line, label) in shown.items():
        if name in logits:
            left.plot(STRENGTHS, tilt(logits[name]).mean(1), line, color=lab.COLOURS[colour], label=label)
    left.plot(
        STRENGTHS, tilt(np.stack(random, 1)).mean((1, 2)), color=lab.COLOURS["random"], label="random, mean"
    )
    left.set(xlabel="strength, residual norms", ylabel="positive over negative words, nats")
    left.legend()
    order = [
        n for n in ("native", "native, k signals", "rotated, k signals", "pca, k signals") if n in prompts
    ]
    order += [n for n in ("ica, k signals", "diffmean", "baseline", "step 0", "random") if n in prompts]
    for i, name in enumerate(order):
        colour = lab.COLOURS.get(name.split(",")[0], lab.COLOURS["other"])
        values = np.sort(prompts[name])
        middle.plot(values, i + np.linspace(-0.3, 0.3, len(values)), ".", color=colour)
        middle.plot(values.mean(), i, "k|", markersize=14)
    middle.axvline(0, color="k", linewidth=0.8)
    middle.set_yticks(range(len(order)), order)
    middle.invert_yaxis()
    middle.set(xlabel="slope of a test prompt, nats per residual norm")
    sizes = list(scores)
    for metric, line in (("concept", "--"), ("fluency", ":"), ("harmonic", "-")):
        right.plot(sizes, [scores[s][metric] for s in sizes], line, color=lab.COLOURS["native"], label=metric)
    right.plot(sizes, [np.mean([kl[s].mean(), kl[-s].mean()]) for s in sizes], color="k", label="KL, nats")
    right.axvline(best, color=lab.COLOURS["random"], linewidth=0.8)
    right.set_xscale("log", base=2)
    right.set(xlabel="strength, residual norms", ylabel="score, dev templates; KL on held-out text")
    right.legend()
    slopes, wrong = report.numbers["slope"], report.numbers["anti_steerable_share"]["native"]
    title = (
        f"{slopes['native']:.3g} logits per residual norm between held-out positive and negative words, "
        f"{slopes['random']:.2g} for a random direction, {slopes['step 0']:.2g} at step 0; {wrong:.0%} of "
        f"prompts go the wrong way; k signals beat rotations: {report.claims[2].verdict}"
    )
    report.figure(fig, "surgery", title)


if __name__ == "__main__":
    lab.main(run)
