"""
What do edits of recipe rows do, how local are they, and do a few signals carry them?

    python experiments/gene_tampering.py --run=out/reflow-nano
    python experiments/gene_tampering.py --run=out/reflow-nano --baseline=out/gpt2-new-nano

Method
    Three edits, each at the input, at the output and at both: *swap* exchanges the recipes of 32 pairs of
    tokens, *zero* removes these 64 rows, *add* adds one row norm of the sentiment direction of
    emotion_surgery to the 32 most common tokens. All rows of an edit change at once. Each of the 64 tokens
    ends two held-out contexts, one for efficacy and one as its paraphrase: the share of tokens for which the
    new token is likelier there than the old one.

    Output: log-odds of the new over the old token in contexts whose next token is the old one. Input: by how
    many nats the edit moves the prediction after the old token towards the unedited prediction after the new
    one, in KL. Tilt: log-odds of held-out positive against negative words after the test templates. Side
    effects: KL and loss added on held-out text with and without edited tokens; fluency of continuations
    under the unedited model.

    Unit of the swap: a pair of tokens. Unit of the added direction: a pair of held-out words, averaged over
    the templates; half of the difference that the sign of the direction makes. Controls: random edits of
    equal length, and the same edit of null models. The plain GPT is edited the same way.

    An edit of recipes is an edit of rows of E. A whole swap on both sides only renames two tokens: its size
    says that contexts tell them apart, and nothing about signals. The claim about signals keeps only the
    largest eighth of entries of each difference of recipes. What counts is |change of log-odds by few - by
    all|, over the mean size of the change by all: more is as wrong as less. Rivals are PCA and ICA; of the
    plain GPT the coordinates of its E, and ICA of it.

Cost
    60 forward passes over 128 contexts of 8 tokens, 30 over 24 templates, 16 over held-out text.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
import numpy as np
import torch

import hooks
from experiments.lab import Lab, Report, Scores, edits, run_experiment, sentiment
from experiments.lab.continuations import as_text, fluency, sample
from experiments.lab.edits import SIDES, edit, exchange, random_like, states_before, token_log_odds
from experiments.lab.plots import plot_scores

CLAIMS = {
    "swap": "exchanging the recipes of two tokens makes the model predict one for the other, more than "
    "random edits do and more than in null models",
    "tilt": "the sentiment direction in the rows of the most common tokens tilts the templates, more than "
    "random directions do and more than in null models",
    "few_signals": "an eighth of the signals comes nearer to the whole exchange than as many of other "
    "dictionaries (distance in log-odds, over the size of the whole)",
}
PUBLISHED = "edits of recipes flip sentiment everywhere, sentences stay grammatical (464M, OpenWebText)"
N_COMMON = 32  # tokens that get the sentiment direction
DRAWS = 4  # random edits


def measure_edits(lab, report, task, common, added, generator):
    """{"model, edit, side": {metric: value}} of every edit of the run's model and of the plain GPT."""
    table = {}
    for subject in [lab.model, lab.baseline] if lab.baseline else [lab.model]:
        net = hooks.with_embedding(subject.net, subject.E)
        before = edits.read(net, task)
        target = edits.next_log_probs(net, task.renamed)
        swap = exchange(subject.dictionary, task.old, task.new)
        changes = {
            "swap": (task.old, swap),
            "zero": (task.old, -subject.E[task.old]),
            "add": (common, added(subject)),
            "random": (task.old, random_like(subject.dictionary, swap, generator)),
        }
        for name, (rows, change) in changes.items():
            sides = SIDES if subject is lab.model and name != "random" else ["both"]
            for side in sides:
                after = edits.read(edit(subject, rows, change, side), task)
                found = edits.effects(before, after, target, task, rows)
                if name == "zero":  # two zero rows have equal logits
                    found = {metric: v for metric, v in found.items() if metric not in edits.COMPARISONS}
                table[f"{subject.name}, {name}, {side}"] = found
                for metric, value in found.items():
                    report.row(metric, value, model=subject.name, control=f"{name}, {side}")
    return table


def edits_as_text(table):
    """The effects of every edit, a line each, as text."""
    metrics = list(dict.fromkeys(metric for found in table.values() for metric in found))
    lines = ["Effects of every edit:"]
    lines += [f"  {i}  {metric}" for i, metric in enumerate(metrics, 1)]
    lines.append(" " * 24 + "".join(f"{i:8}" for i in range(1, len(metrics) + 1)))
    for name, found in table.items():
        cells = (f"{found[metric]:8.3f}" if metric in found else " " * 8 for metric in metrics)
        lines.append(f"{name:24}{''.join(cells)}")
    return "\n".join(lines)


def continue_edited(lab, report, task, edited):
    """Continuations of templates by the nets `edited`, {name: net}, as text; their fluency goes to rows."""
    prompts, tokenizer = task.prompts[::3], lab.words.tokenizer
    unedited = hooks.with_embedding(lab.model.net, lab.model.E)
    lines = ["Continuations of the first templates, not selected"]
    for name, net in {"unedited": unedited, **edited}.items():
        texts = sample(net, prompts, lab.seed)
        for metric, value in fluency(unedited, prompts, texts, tokenizer).items():
            report.row(f"continuations, {metric}", value, control=name)
        lines += ["", name, *(f"  {as_text(prompts[i] + texts[i], tokenizer)}" for i in range(3))]
    return "\n".join(lines)


def run(lab: Lab, config=None) -> Report:
    report = Report(lab, "gene_tampering", CLAIMS)
    model, d = lab.model, lab.model.dictionary
    build = sentiment.word_pairs(lab, "build")
    words = sentiment.word_pairs(lab, "held_out")
    barred = torch.cat([build, words], 1).flatten().cpu().numpy()
    known = lab.words.known_tokens()
    common = torch.from_numpy(known[~np.isin(known, barred)][:N_COMMON]).to(lab.device)
    task = edits.find_task(lab, words, barred)
    generator = lab.generator()

    # The swap: log-odds of the new token where the old one is next.
    def odds(net):
        return token_log_odds(net, states_before(net, task.contexts), task.old, task.new)

    before = {name: odds(hooks.with_embedding(s.net, s.E)) for name, s in lab.models.items()}

    def gain(subject, change):
        return (odds(edit(subject, task.old, change)) - before[subject.name]).mean(1)

    def swap(subject):
        return gain(subject, exchange(subject.dictionary, task.old, task.new))

    whole = exchange(d, task.old, task.new)
    random = [gain(model, random_like(d, whole, generator)) for _ in range(DRAWS)]
    swaps = Scores({"native": swap(model), "random": np.mean(random, axis=0)})
    for name, subject in lab.nulls.items():
        swaps[name] = swap(subject)

    def kept(subject, whole, other):
        """Change of log-odds by the largest entries alone, and how far it is from the whole, (n,) each."""
        k = max(d.eighth, subject.dictionary.eighth)
        few = gain(subject, exchange(other, task.old, task.new, k))
        return {"change": few, "distance": np.abs(few - whole) / np.abs(whole).mean()}

    plain = None
    if lab.baseline:
        swaps["baseline"] = swap(lab.baseline)
        plain = partial(kept, lab.baseline, swaps["baseline"])
    few = lab.compare(partial(kept, model, swaps.native), plain=plain)

    # The added direction: log-odds of sentiment after the templates.
    def added(subject):
        lengths = (subject.dictionary.codes[common] @ subject.dictionary.atoms).norm(dim=1, keepdim=True)
        return hooks.unit(sentiment.direction(subject.dictionary, build)) * lengths

    def logits(subject, change):
        net = edit(subject, common, change)
        return sentiment.word_logits(net, net.vocab.matrix(), task.prompts, words)

    def tilt(subject, change):
        return sentiment.pair_difference(logits(subject, change) - logits(subject, -change)) / 2

    noise = hooks.unit(random_like(d, added(model), generator)[:DRAWS])  # one direction for all rows
    lengths = model.E[common].norm(dim=1, keepdim=True)
    tilts = Scores({"native": tilt(model, added(model))})
    for name, subject in lab.nulls.items():
        tilts[name] = tilt(subject, added(subject))
    tilts["random"] = np.mean([tilt(model, direction * lengths) for direction in noise], axis=0)

    if lab.baseline:
        tilts["baseline"] = tilt(lab.baseline, added(lab.baseline))
    pairs = np.arange(len(task.old)) // 2
    controls = ("random", *lab.nulls)
    report.effect("swap", swaps, "pairs of tokens", controls, pairs)
    report.effect("tilt", tilts, "word pairs", controls, published=PUBLISHED)
    report.signals("few_signals", few["distance"], "pairs of tokens", groups=pairs, lower=True)
    report.scores("change by few signals", few["change"])

    table = measure_edits(lab, report, task, common, added, generator)
    edited = {
        "swap": edit(model, task.old, whole),
        "zero": edit(model, task.old, -model.E[task.old]),
        "add": edit(model, common, added(model)),
        "add, negative": edit(model, common, -added(model)),
    }
    report.gallery = edits_as_text(table) + "\n\n" + continue_edited(lab, report, task, edited)
    shares = {}
    for name, values in few["change"].items():
        whole = swaps["baseline"] if name.startswith("baseline") else swaps.native
        shares[name] = values.mean() / whole.mean()
    report.numbers |= {
        "tokens": len(task.old),
        "efficacy_before": (before["reflow"] > 0).mean(),
        "edits": table,
        "share_kept_by_k": shares,
    }
    draw(report, swaps, few["distance"], tilts, pairs, shares)
    return report


def draw(report, swaps, few, tilts, pairs, shares):
    """What a swap changes, how near a swap of few signals comes to it, what an added direction changes."""
    kept = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    title = (
        f"A swap of recipes moves the log-odds by {swaps.native.mean():.3g} nats, a random edit by "
        f"{swaps['random'].mean():.2g}; share kept by an eighth of the signals: {kept} "
        f"({report['few_signals'].verdict})"
    )
    with report.figure("edits", title, 1, 3, size=(13, 3.2)) as (left, middle, right):
        plot_scores(left, swaps, pairs, xlabel="swap: log-odds of the new token, nats")
        plot_scores(middle, few, pairs, xlabel="distance of an eighth of the signals from the whole swap")
        plot_scores(right, tilts, xlabel="added direction: positive over negative words, nats")
        for ax in (left, middle, right):
            ax.axvline(0, color="k", lw=0.8)


if __name__ == "__main__":
    run_experiment(run)
