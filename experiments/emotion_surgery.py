"""
Does a sentiment direction made of recipes steer the model, and do a few signals carry it?

    python experiments/emotion_surgery.py --run=out/reflow-nano

Method
    Direction: v = (mean recipe of positive words - mean recipe of negative words) @ atoms. This is the
    difference of the mean rows of E, so a plain GPT allows the same steering. Only the claim about signals
    is about recipes: it cuts the difference of recipes down to its largest eighth of entries. What counts is
    |slope by few - slope by all|, over the mean size of the slopes by all: more is as wrong as less. Rivals
    are PCA and ICA; of the plain GPT the coordinates of its E, and ICA of it.

    Steering: `strength` norms of the residual stream of v are added to the stream entering each of the first
    half of the blocks, at all positions. Words that build v do not measure it.

    Response: the logit of a positive word minus that of its partner, a negative word of like frequency; its
    slope is the regression on the strengths -2, -1, 1, 2. Unit: a pair of held-out words, averaged over the
    test templates, since all prompts share one direction. Tilt: the log-odds of the positive against the
    negative words. Anti-steerable: prompts whose tilt has a negative slope (Tan et al., 2407.12404).

    Controls: random mixtures of signals, shuffled labels of the words, null models. Rivals: DiffMean
    (Wu et al., 2501.17148), the mean stream behind the steered blocks at a positive word minus that at a
    negative one; the plain GPT.

    Side effects: fluency of sampled continuations under the unsteered model; words of VADER's lexicon in
    them that did not build v; KL on held-out text. The strength is chosen on the dev templates by the
    harmonic mean of concept and fluency, and reported on the test templates.

Cost
    40 forward passes over 4 strengths of 24 short prompts, and 156 continuations of 12 tokens.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
import numpy as np
import torch

import hooks
from experiments.lab import Lab, Report, Scores, nulls, run_experiment, sentiment
from experiments.lab.continuations import as_text, fluency, sample
from experiments.lab.plots import plot_curves, plot_scores

CLAIMS = {
    "steers": "a sentiment direction made of recipes raises held-out positive words over negative ones, more "
    "than random directions and shuffled labels do and more than in null models",
    "beats_diffmean": "the sentiment direction steers further than a difference of mean activations and than "
    "the plain GPT's direction",
    "few_signals": "an eighth of the signals of the sentiment direction steers more nearly like all of it "
    "than as many of other dictionaries do (distance of slopes, over their size)",
}
PUBLISHED = 'flips "terrible" to "great"; works entering layers 0 to 12 of 32 (464M, OpenWebText)'
STRENGTHS = (-2.0, -1.0, 1.0, 2.0)  # residual norms; symmetric, so that a slope needs no intercept
CHOICES = (0.5, 1.0, 2.0)  # strengths of which the best is chosen for the continuations
CONTROLS = ("random", "shuffled labels", *nulls.NAMES)
DRAWS = 5  # random directions, and shufflings of the labels


def per_row(strengths, n_prompts, device):
    """The strength of each row when `n_prompts` prompts are repeated for every strength, (rows, 1, 1)."""
    return torch.tensor(strengths, device=device).repeat_interleave(n_prompts).view(-1, 1, 1)


def dose_response(subject, prompts, v, layers, words, strengths=STRENGTHS):
    """Logits of `words` (2, n) after each prompt under each strength of v, (strengths, P, 2, n)."""
    rows = prompts * len(strengths)
    with hooks.steer(subject.net, v, per_row(strengths, len(prompts), v.device), layers):
        logits = sentiment.word_logits(subject.net, subject.E, rows, words, batch=len(rows))
    return logits.reshape(len(strengths), len(prompts), *words.shape)


def slope(y, strengths=STRENGTHS):
    """Least-squares slope of y (strengths, ...) on strengths that are symmetric about zero, (...)."""
    s = np.array(strengths)
    return np.tensordot(s, y, 1) / (s**2).sum()


def summarize(logits):
    """Logits (strengths, P, 2, n) -> slope of each pair (n,) and prompt (P,), tilt (P, strengths)."""
    tilt = sentiment.log_odds(logits)  # (strengths, P)
    return {
        "slope": sentiment.pair_difference(slope(logits)),
        "slope of a prompt": slope(tilt),
        "tilt": tilt.T,
    }


def mean(responses):
    """The mean of several results of `summarize`."""
    return {metric: np.mean([found[metric] for found in responses], axis=0) for metric in responses[0]}


def harmonic_mean(concept, fluent):
    """Harmonic mean of two scores, 0 if either is not positive."""
    return 2 * concept * fluent / (concept + fluent) if min(concept, fluent) > 0 else 0.0


def judge(tilts, losses):
    """{size: {concept, fluency, harmonic}} of tilts (P,) and losses by strength; a size averages its signs.

    Concept: probability of the right word list given either of the two, scaled from [0.5, 1] to [0, 1].
    Fluency: ratio of the perplexities of unsteered and steered continuations, at most 1.
    """
    scores = {}
    for size in sorted({abs(s) for s in losses} - {0.0}):
        signs = (size, -size)
        concept = np.mean([2 / (1 + np.exp(-np.sign(s) * tilts[s])) - 1 for s in signs])
        fluent = np.mean([min(1, np.exp(losses[0.0] - losses[s])) for s in signs])
        scores[size] = {"concept": concept, "fluency": fluent, "harmonic": harmonic_mean(concept, fluent)}
    return scores


@torch.no_grad()
def neutral_kl(net, x, v, layers, strengths):
    """{strength: mean KL(unsteered || steered) of the next token after each token of x (n, T), nats}."""
    base = hooks.log_probs(net, net.encode(x))  # (n, T, n_tokens)
    found = {}
    for s in strengths:
        with hooks.steer(net, v, s, layers):
            found[s] = hooks.kl(base, hooks.log_probs(net, net.encode(x))).mean().item()
    return found


def side_effects(lab, report, part, prompts, v, layers, words, strengths):
    """Continuations of the prompts by strength, lists of ids, and their scores by size (see `judge`)."""
    net = lab.model.net
    with hooks.steer(net, v, per_row(strengths, len(prompts), v.device), layers):
        out = sample(net, prompts * len(strengths), lab.seed)
    texts = {s: out[i * len(prompts) : (i + 1) * len(prompts)] for i, s in enumerate(strengths)}
    fluent = {s: fluency(net, prompts, continued, lab.words.tokenizer) for s, continued in texts.items()}
    for s, values in fluent.items():
        for metric, value in values.items():
            report.row(f"continuations, {metric}", value, control=part, strength=s)
    tilts = sentiment.log_odds(dose_response(lab.model, prompts, v, layers, words, strengths))
    losses = {s: values["loss"] for s, values in fluent.items()}
    return texts, judge(dict(zip(strengths, tilts, strict=True)), losses)


def compare_directions(lab, respond, build, prompts, layer):
    """{metric: Scores} of respond(subject, v) for the direction that `build` (2, n) builds and its controls.

    DiffMean reads the stream entering `layer` after the prompts.
    """

    def built(subject, pairs):
        return respond(subject, sentiment.direction(subject.dictionary, pairs))

    model, d = lab.model, lab.model.dictionary
    labels = build.flatten()
    rng = lab.rng("directions")
    shuffles = [labels[torch.from_numpy(rng.permutation(len(labels)))].view_as(build) for _ in range(DRAWS)]
    mixtures = torch.from_numpy(rng.standard_normal((DRAWS, d.n_signals))).to(d.codes)
    found = {
        "native": built(model, build),
        "random": mean([respond(model, code @ d.atoms) for code in mixtures]),
        "shuffled labels": mean([built(model, pairs) for pairs in shuffles]),
        "diffmean": respond(model, sentiment.diff_mean(model.net, prompts, build, layer)),
    }
    found |= {name: built(subject, build) for name, subject in lab.nulls.items()}
    if lab.baseline:
        found["baseline"] = built(lab.baseline, build)
    return {metric: Scores({name: r[metric] for name, r in found.items()}) for metric in found["native"]}


def run(lab: Lab, config=None) -> Report:
    report = Report(lab, "emotion_surgery", CLAIMS)
    dev = sentiment.templates(lab, "dev")
    test = sentiment.templates(lab, "test")
    build = sentiment.word_pairs(lab, "build")
    words = sentiment.word_pairs(lab, "held_out")
    layers = range(max(1, lab.model.net.config.n_layer // 2))

    def respond(subject, v):
        return summarize(dose_response(subject, test, v, layers, words))

    # The whole direction, its controls and its rivals.
    whole = compare_directions(lab, respond, build, dev[:8], layers[-1] + 1)
    slopes = whole["slope"]
    steers = Scores({name: slopes[name] for name in ("native", *CONTROLS) if name in slopes})
    rivals = Scores({name: values for name, values in slopes.items() if name not in CONTROLS})
    report.effect("steers", steers, "word pairs", published=PUBLISHED)
    report.effect("beats_diffmean", rivals, "word pairs")

    # The direction cut down to few signals, in every dictionary, against the whole one.
    k = lab.model.dictionary.eighth

    def kept(subject, whole, d):
        """Slope by the largest entries alone, and how far it is from that by all, (n,) each."""
        cut = sentiment.direction(d, build, max(k, subject.dictionary.eighth))
        few = respond(subject, cut)["slope"]
        return {"slope": few, "distance": np.abs(few - whole) / np.abs(whole).mean()}

    plain = partial(kept, lab.baseline, slopes["baseline"]) if lab.baseline else None
    few = lab.compare(partial(kept, lab.model, slopes.native), plain=plain)
    report.signals("few_signals", few["distance"], "word pairs", lower=True)

    report.scores("slope by few signals", few["slope"])
    report.scores("slope", slopes)
    report.scores("anti_steerable_share", whole["slope of a prompt"].map(lambda values: values < 0))
    for i, s in enumerate(STRENGTHS):
        report.scores("tilt, nats", whole["tilt"].map(lambda values, i=i: values[:, i]), strength=s)

    # What steering costs. The strength is chosen on the dev templates, of which half are continued.
    v = sentiment.direction(lab.model.dictionary, build)
    strengths = (0.0, *CHOICES, *(-s for s in CHOICES))
    _, scores = side_effects(lab, report, "dev", dev[::2], v, layers, words, strengths)
    best = max(scores, key=lambda size: scores[size]["harmonic"])
    texts, tested = side_effects(lab, report, "test", test, v, layers, words, (0.0, best, -best))
    lexicon = sentiment.lexicon(lab, barred=build.flatten().tolist())
    for s, continued in texts.items():
        tokens = np.concatenate(continued)
        for side, ids in lexicon.items():
            report.row(f"{side} words of the lexicon", np.isin(tokens, ids).sum(), control="test", strength=s)
    x, _ = lab.heldout(8, 8)
    kl = neutral_kl(lab.model.net, x, v, layers, strengths)
    for s, value in kl.items():
        report.row("KL on held-out text", value, strength=s)

    report.numbers |= {
        "word_pairs": words.size(1),
        "share_kept_by_k_signals": few["slope"].native.mean() / slopes.native.mean(),
        "strength": best,
        "dev_scores": {f"{size:g}": values for size, values in scores.items()},
        "test_scores": tested[best],
        "kl_neutral": {f"{s:g}": value for s, value in kl.items()},
    }
    lines = [f"Continuations of the first test templates, not selected; strength {best:g} residual norms"]
    for i, prompt in enumerate(test[:4]):
        lines += ["", f"{as_text(prompt, lab.words.tokenizer)} ..."]
        lines += [f"  {s:+5.2g} {as_text(texts[s][i], lab.words.tokenizer)}" for s in (-best, 0.0, best)]
    report.gallery = "\n".join(lines)
    draw(report, whole, few["distance"], scores, kl, best)
    return report


def draw(report, whole, few, scores, kl, best):
    """Tilt by strength; slopes of prompts; slopes of word pairs by few signals; the cost on dev templates."""
    slopes = report.numbers["slope"]
    title = (
        f"{slopes['native']:.3g} nats per residual norm between held-out positive and negative words, "
        f"{slopes['random']:.2g} by random directions, {slopes['step 0']:.2g} at step 0; "
        f"{report.numbers['anti_steerable_share']['native']:.0%} of prompts respond the opposite way; "
        f"few signals steer like all, more than in other dictionaries: {report['few_signals'].verdict}"
    )
    with report.figure("surgery", title, 2, 2, size=(10, 6.6)) as ((tilt, prompts), (signals, cost)):
        plot_curves(tilt, STRENGTHS, whole["tilt"])
        tilt.set(xlabel="strength, residual norms", ylabel="tilt, nats")
        tilt.legend(fontsize=7)
        plot_scores(prompts, whole["slope of a prompt"], xlabel="slope of the tilt, mean of test templates")
        plot_scores(signals, few, xlabel="distance of the slope by an eighth of the signals")
        sizes = list(scores)
        for metric, dash in (("concept", "--"), ("fluency", ":"), ("harmonic", "-")):
            cost.plot(sizes, [scores[size][metric] for size in sizes], dash, color="k", label=metric)
        both_signs = [np.mean([kl[size], kl[-size]]) for size in sizes]
        cost.plot(sizes, both_signs, label="KL on held-out text, nats")
        cost.axvline(best, color="k", lw=0.8)
        cost.set(xlabel="strength, residual norms", ylabel="score, dev templates")
        cost.legend(fontsize=7)
        prompts.axvline(0, color="k", lw=0.8)
        signals.axvline(0, color="k", lw=0.8)


if __name__ == "__main__":
    run_experiment(run)
