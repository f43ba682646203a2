"""
What does a single signal do? Remove each one, at the output, at the input, and at both.

    python experiments/ablate_signal.py --run=out/reflow-nano --prompt="The capital of France is"

Claims
  effect   the signal that lowers the model's top token most on one half of the prompts lowers it on the other
           half by more than a random direction of equal size, and than the untrained model's own such signal.
  signals  the strongest signal of each prompt is stronger than the strongest of random rotations, PCA, ICA
           (maximum against maximum, since any dictionary has a strongest one).
  signals  fewer signals hold 90 % of the absolute contributions to a logit difference than under rotations,
           PCA, ICA.

Method. At the output the effect is exact and needs no forward pass: with A = norm(h) @ atoms.T, p the
distribution over tokens and W the codes, removing signal s gives logits z - A_s W_s, so the logit difference
of t and f changes by -A_s (W_ts - W_fs) and log p_t by -A_s W_ts - K_s, K_s = log E_p[exp(-A_s W_vs)]; the
divergence is KL(p || p') = K_s + A_s E_p[W_vs]. First order for all S at once, exact for the strongest. Zero
ablation sets A_s to 0, mean ablation to its mean over prompts, resample ablation to its value on another
prompt. At the input signal s is taken out of the embedding of every token of the prompt: S forward passes as
a batch; for the other prompts attribution patching (gradient times change), whose correlation with the exact
effect is stated. Target: the model's top token; foil: its second. Unit: a held-out context of 24 tokens.

Cost: output side seconds at any size; input side 16 x S forward passes of 24 tokens (for 464M parameters 0.3
PFLOP: an hour and a half on two cores, a minute on a GPU).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from data.tokenizer import encoding
from experiments import lab

PUBLISHED = "8.31 % to 0.03 % on one prompt, -5.7 nats (464M, OpenWebText)"
N_PROMPTS, LENGTH, N_INPUT = 200, 24, 16


@dataclass
class AblateConfig:
    prompt: str = "The capital of France is"  # the prompt of the waterfall figure
    target: str = ""  # the token to explain, a word; empty: the model's own top token


def output_side(h, dictionary, p, target, foil):
    """Closed forms for every signal: h (N, d) normalised, p (N, V), target, foil (N,) ->
    (A (N, S), change of the logit difference (N, S), first-order change of log p_target (N, S))."""
    A = h @ dictionary.atoms.T
    W = dictionary.codes
    mean = p.to(W) @ W  # (N, S), E_p[W_s]
    return A, -A * (W[target] - W[foil]), -A * (W[target] - mean)


def exact(A, W, p, target):
    """One signal a row: A (N,), its codes W (N, V), p (N, V), target (N,) -> (change of log p_target, KL).

    In p's precision; W is centred by E_p first, so that a small divergence is not lost to rounding.
    """
    A, W = A.to(p)[:, None], W.to(p)
    W = W - (p * W).sum(1, keepdim=True)
    K = torch.logsumexp(p.log() - A * W, 1)  # a plain exp overflows for a signal of thousands of nats
    return (-A * W.gather(1, target[:, None]))[:, 0] - K, K


def strongest(h, dictionary, p, target, foil, part=64):
    """Each prompt's signal that lowers log p_target most: (signal (N,), exact change (N,), KL (N,))."""
    A, _, first = output_side(h, dictionary, p, target, foil)
    signal = first.argmin(1)
    out = [
        exact(A[i, signal[i]], dictionary.codes[:, signal[i]].T, p[i], target[i])
        for i in torch.arange(len(h), device=h.device).split(part)
    ]
    change, kl = (torch.cat(x) for x in zip(*out, strict=True))
    return signal, change, kl


def n_90(contributions):
    """How many of the contributions (N, S), largest first, make up 90 % of the sum of sizes, (N,)."""
    sizes = contributions.abs().sort(1, descending=True).values.double()
    return ((sizes.cumsum(1) < 0.9 * sizes.sum(1, keepdim=True)).sum(1) + 1).cpu().numpy()


@torch.no_grad()
def input_side(net, dictionary, idx, part=64):
    """Every signal taken out of the embeddings of idx (T,): normalised final stream at the end, (S, d)."""
    x = net.vocab.embed(idx)  # (T, d)
    codes = dictionary.codes[idx]  # (T, S)
    hidden = []
    for s in torch.arange(codes.size(1), device=idx.device).split(part):
        removed = codes[:, s].T.unsqueeze(2) * dictionary.atoms[s].unsqueeze(1)  # (part, T, d)
        hidden.append(net.norm(lab.run_blocks(net, x - removed)[-1][:, -1]))
    return torch.cat(hidden)


def attribution(net, x, target, foil):
    """Gradient of the logit difference with respect to the embeddings of idx, x (N, T): (N, T, d)."""
    e = net.vocab.embed(x).detach().requires_grad_()
    with lab.edited(net, {0: lambda _: e}):
        h = net.encode(x)[:, -1]
    rows = net.vocab.matrix()
    (h * (rows[target] - rows[foil])).sum().backward()
    return e.grad


def measure(subject, x):
    """(h, p, target, foil) of a model at the end of the contexts x (N, T); p (N, n_tokens)."""
    with torch.no_grad():
        h = torch.cat([subject.net.encode(part)[:, -1] for part in x.split(64)])
        p = lab.logits(subject.net, h).softmax(-1)
    top = p.topk(2).indices
    return h, p, top[:, 0], top[:, 1]


def chosen_on_dev(subject, x, generator):
    """(signal chosen on the even prompts, its drops of log p on the odd ones, those of random directions)."""
    h, p, target, foil = measure(subject, x)
    d = subject.dictionary
    A, _, first = output_side(h, d, p, target, foil)
    signal = int(first[0::2].mean(0).argmin())
    h, p, target, A = h[1::2], p[1::2], target[1::2], A[1::2]
    own, _ = exact(A[:, signal], d.codes[:, signal].expand(len(h), -1), p, target)
    size = A[:, signal].abs() * d.codes[:, signal].norm()
    controls = []
    for _ in range(5):
        u = torch.randn(d.codes.size(1), generator=generator).to(h)
        direction = d.codes @ u  # (V,), a random mixture of the same columns
        sign = torch.randn(len(h), generator=generator).sign().to(h)
        change, _ = exact(sign * size / direction.norm(), direction.expand(len(h), -1), p, target)
        controls.append(-change.cpu().numpy())
    return signal, -own.cpu().numpy(), np.mean(controls, axis=0)


def run(laboratory, c=None):
    c = c or AblateConfig()
    if not c.prompt:
        raise lab.UserError("--prompt is empty: give some words")
    report = lab.Report(laboratory, "ablate_signal")
    subject = laboratory.reflow
    x, _ = laboratory.heldout(N_PROMPTS, LENGTH)
    generator = torch.Generator().manual_seed(laboratory.seed)

    signal, drop, chance = chosen_on_dev(subject, x, generator)
    _, drop0, _ = chosen_on_dev(laboratory.step0, x, generator)
    report.claim(
        lab.effect(
            "the signal chosen on one half of the prompts lowers log p of the top token on the other half",
            drop,
            {"random direction": chance, "step 0": drop0},
            "prompts",
            published=PUBLISHED,
        )
    )

    # The strongest signal of each prompt, and how concentrated a logit difference is, in every dictionary.
    h, p, target, foil = measure(subject, x)
    turned = list(laboratory.rotations(subject.dictionary))
    rivals = laboratory.rivals(subject)
    drops, spread, changes = {}, {}, {}
    everything = {"native": subject.dictionary, **rivals} | {f"rotated {i}": d for i, d in enumerate(turned)}
    for name, d in everything.items():
        A, change, first = output_side(h, d, p, target, foil)
        which, exact_change, kl = strongest(h, d, p, target, foil)
        drops[name], spread[name] = -exact_change.cpu().numpy(), n_90(change)
        changes[name] = np.sort(-first.mean(0).cpu().numpy())[::-1]
        report.row("drop of log p, strongest signal", drops[name].mean(), dictionary=name)
        report.row("KL, strongest signal", kl.mean().item(), dictionary=name)
        report.row("signals for 90 % of the contributions", spread[name].mean(), dictionary=name)
        if name == "native":
            native = A, change, which
    if laboratory.baseline:
        base = measure(laboratory.baseline, x)
        d = laboratory.baseline.dictionary
        drops["baseline"] = -strongest(base[0], d, *base[1:])[1].cpu().numpy()
        spread["baseline"] = n_90(output_side(base[0], d, *base[1:])[1])
        for metric, values in (("drop of log p, strongest signal", drops), ("signals for 90 %", spread)):
            report.row(metric, values["baseline"].mean(), model="baseline", dictionary="native")
    spins = [f"rotated {i}" for i in range(len(turned))]
    texts = (
        "the strongest signal of a prompt lowers log p of its top token by more than in other dictionaries",
        "fewer signals hold 90 % of the contributions, by size, to top minus second logit",
    )
    for text, values, lower in ((texts[0], drops, False), (texts[1], spread, True)):
        others = {name: values[name] for name in ("pca", "ica")}
        turned_values = [values[name] for name in spins]
        report.claim(lab.signals(text, values["native"], turned_values, others, "prompts", lower=lower))

    # The other ablations, the frequency direction, and the input side.
    A, change, which = native
    W = subject.dictionary.codes
    gap = W[target] - W[foil]  # (N, S)
    other = torch.randperm(len(A), generator=generator).to(A.device)
    kinds = {"zero": change, "mean": -(A - A.mean(0)) * gap, "resample": -(A - A[other]) * gap}
    rows = torch.arange(len(A))
    for kind, values in kinds.items():
        for s, value in enumerate(values.abs().mean(0).tolist()):
            report.row("output side, mean size", value, dictionary="native", control=kind, signal=s)
    frequency, correlation = frequency_direction(laboratory, subject.dictionary)
    along = subject.dictionary.codes @ frequency  # (V,)
    removed, _ = exact((h @ subject.dictionary.atoms.T) @ frequency, along.expand(len(h), -1), p, target)
    drops["frequency"] = -removed.cpu().numpy()
    report.row("drop of log p", drops["frequency"].mean(), control="frequency direction")

    chosen = torch.linspace(0, len(x) - 1, N_INPUT).long()
    hidden = torch.stack([input_side(subject.net, subject.dictionary, x[i]) for i in chosen])  # (n, S, d)
    E = subject.E
    direction = E[target[chosen]] - E[foil[chosen]]  # (n, d)
    before = (h[chosen] * direction).sum(1, keepdim=True)
    at_input = (hidden * direction[:, None]).sum(2) - before  # (n, S)
    A_after = (hidden * subject.dictionary.atoms).sum(
        2
    )  # (n, S), the ablated signal's own activation afterwards
    both = at_input - A_after * gap[chosen]
    gradient = attribution(subject.net, x, target, foil)  # (N, T, d)
    screen = -(W[x] * (gradient @ subject.dictionary.atoms.T)).sum(1)  # (N, S)
    r = float(np.corrcoef(screen[chosen].flatten().cpu(), at_input.flatten().cpu())[0, 1])
    parts = {
        "input": at_input,
        "output": change[chosen],
        "both": both,
        "interaction": both - at_input - change[chosen],
    }
    sizes = {name: lab.estimate(v.abs().mean(1).cpu().numpy()) for name, v in parts.items()}
    for name, value in sizes.items():
        report.row("mean size of change of logit difference", value.value, dictionary="native", control=name)
    for s, value in enumerate(screen.abs().mean(0).tolist()):
        report.row("input side, mean size", value, dictionary="native", control="attribution", signal=s)

    flips = (lab.logits(subject.net, h) - A[rows, which][:, None] * W[:, which].T).argmax(1) != target
    report.numbers = {
        "prompts": len(x),
        "drop_strongest": {k: float(np.mean(v)) for k, v in drops.items()},
        "n_90": {k: float(np.mean(v)) for k, v in spread.items()},
        "flips": float(flips.float().mean()),
        "input_output_both": {k: vars(v) for k, v in sizes.items()},
        "attribution_r": r,
        "chosen_signal": signal,
        "chosen_signal_frequency_spearman": correlation[signal],
    }
    report.notes += [
        f"Signal {signal}, chosen on the even prompts: Spearman correlation of its codes with log frequency "
        f"{correlation[signal]:.2f}; promotes {words(W[:, signal], laboratory)}, suppresses "
        f"{words(-W[:, signal], laboratory)}.",
        f"Removing the strongest signal of a prompt changes the top token on {flips.float().mean():.0%} of "
        f"prompts; removing the frequency direction lowers log p by {drops['frequency'].mean():.2f}.",
        f"Mean size of the change of the logit difference over all signals: input {sizes['input']}, output "
        f"{sizes['output']}, both {sizes['both']}, interaction {sizes['interaction']} ({N_INPUT} prompts); "
        f"attribution patching correlates with the exact input effect at r = {r:.2f}.",
    ]
    example(report, laboratory, c)
    figures(report, changes, drops, spins)
    return report


def frequency_direction(laboratory, dictionary):
    """(unit mixture (S,) of signals that fits log frequency best, each signal's Spearman with it, a list)."""
    from scipy.stats import rankdata

    known = laboratory.known_tokens()
    W = dictionary.codes[torch.from_numpy(known).to(dictionary.codes.device)].double().cpu()
    y = np.log(laboratory.counts[known])
    fit = torch.linalg.lstsq(W - W.mean(0), torch.from_numpy(y - y.mean())[:, None]).solution[:, 0]
    ranks = rankdata(W.numpy(), axis=0)
    correlation = np.corrcoef(ranks.T, rankdata(y))[-1, :-1]
    return (fit / fit.norm()).to(dictionary.codes), correlation.tolist()


def words(scores, laboratory, k=6):
    """The k tokens seen in training with the highest scores (V,), as text."""
    known = torch.from_numpy(laboratory.known_tokens()).to(scores.device)
    return " ".join(lab.show(known[i]).strip() for i in scores[known].topk(k).indices)


def example(report, laboratory, c):
    """The command line's prompt: a table for the gallery, a waterfall that sums to the logit difference."""
    subject, tokenizer = laboratory.reflow, encoding()
    ids = tokenizer.encode_ordinary(c.prompt)[-subject.net.config.block_size :]
    x = torch.tensor([ids], device=laboratory.device)
    h, p, target, foil = measure(subject, x)
    if c.target:
        target[0] = tokenizer.encode_ordinary(" " + c.target)[0]
        foil = torch.where(p.argmax(1) == target, foil, p.argmax(1))
    d = subject.dictionary
    A, change, _ = output_side(h, d, p, target, foil)
    order = change[0].argsort()
    top = order[:8]
    effects, kls = exact(A[0, top], d.codes[:, top].T, p.double().expand(8, -1), target.expand(8))
    hidden = input_side(subject.net, d, x[0])
    before = (h[0] * (subject.E[target[0]] - subject.E[foil[0]])).sum()
    at_input = hidden @ (subject.E[target[0]] - subject.E[foil[0]]) - before
    p_t = p[0, target[0]].item()
    names, p_f = [lab.show(i[0]) for i in (target, foil)], p[0, foil[0]].item()
    lines = [
        f'"{c.prompt}" -> "{names[0]}" {p_t:.2%}, "{names[1]}" {p_f:.2%}; one signal removed:',
        f"{'signal':>7} {'logit diff':>10} {'p after':>8} {'KL':>7} {'input':>10}  promotes | suppresses",
    ]
    for i, s in enumerate(top.tolist()):
        column = d.codes[:, s] * A[0, s].sign()
        after = p_t * np.exp(effects[i].item())
        lines.append(
            f"{s:>7} {change[0, s].item():>10.3f} {after:>8.2%} {kls[i].item():>7.3f} "
            f"{at_input[s].item():>10.3f}  {words(column, laboratory, 4)} | {words(-column, laboratory, 4)}"
        )
    report.gallery = "\n".join(lines)
    for s, value in enumerate(change[0].tolist()):
        report.row("change of logit difference", value, signal=s, prompt=c.prompt, dictionary="native")

    plt = lab.pyplot()
    contributions = -change[0].cpu().numpy()  # what each signal adds to the logit difference
    big = np.argsort(-np.abs(contributions))[:12]
    rest = contributions.sum() - contributions[big].sum()
    labels = [f"signal {s}" for s in big] + [f"{len(contributions) - 12} others", "logit difference"]
    values = [*contributions[big], rest, contributions.sum()]
    starts = [*np.concatenate([[0], np.cumsum(values[:-2])]), 0]
    colours = [lab.COLOURS["native"] if v > 0 else lab.COLOURS["ica"] for v in values[:-1]] + ["k"]
    fig, ax = plt.subplots(figsize=(7, 3.8))
    ax.barh(labels, values, left=starts, color=colours)
    ax.invert_yaxis()
    ax.axvline(0, color="k", lw=0.5)
    ax.set_xlabel(f'contribution to logit("{names[0]}") - logit("{names[1]}"); sums exactly')
    share = np.abs(contributions[big[0]]) / np.abs(contributions).sum()
    report.figure(fig, "waterfall", f'"{c.prompt}": the largest signal is {share:.0%} of all contributions')


def figures(report, changes, drops, spins):
    plt = lab.pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    spun = np.stack([changes[name] for name in spins])
    ranks = np.arange(1, spun.shape[1] + 1)
    left.fill_between(
        ranks,
        spun.min(0),
        spun.max(0),
        color=lab.COLOURS["rotated"],
        alpha=0.5,
        label=f"{len(spins)} rotations",
    )
    for name in ("native", "pca", "ica"):
        left.plot(ranks[: len(changes[name])], changes[name], color=lab.COLOURS[name], label=name)
    left.set(
        xlabel="rank of the signal",
        ylabel="mean drop of log p, nats (first order)",
        xscale="log",
        yscale="symlog",
    )
    left.legend()
    names = [n for n in ("native", "pca", "ica", "baseline") if n in drops]
    means = {n: lab.estimate(drops[n]) for n in names}
    turned = [drops[n].mean() for n in spins]
    right.scatter(turned, np.full(len(turned), -1), color=lab.COLOURS["rotated"], s=14)
    for i, n in enumerate(names):
        m = means[n]
        right.errorbar(m.value, i, xerr=m.bars, fmt="o", color=lab.COLOURS[n], capsize=3)
    right.set_yticks(range(-1, len(names)), ["rotations", *names])
    right.set_xlabel("drop of log p, nats, by each prompt's strongest signal")
    title = (
        f"Removing a prompt's strongest signal lowers log p by {means['native'].value:.2f}; "
        f"the strongest of a random rotation by {np.mean(turned):.2f} (up to {np.max(turned):.2f})"
    )
    report.figure(fig, "strongest", title)


if __name__ == "__main__":
    lab.main(run, AblateConfig)
