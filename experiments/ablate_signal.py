"""
What does a single signal do? Remove each one, at the output, at the input, and at both.

    python experiments/ablate_signal.py --run=out/reflow-nano
    python experiments/ablate_signal.py --prompt="The capital of France is" --target=Paris

Method
    At the output the effect is exact and needs no forward pass. With A = norm(h) @ atoms.T, W the codes and p
    the distribution over tokens, removing signal s subtracts A_s W_s from the logits. The logit difference of
    target t and foil f changes by -A_s (W_ts - W_fs), log p_t by -A_s W_ts - K_s with K_s = log E_p[exp(-A_s
    W_vs)], and KL(p || p') = K_s + A_s E_p[W_vs]. First order for all S signals at once, exact for the
    strongest of a prompt. At the input, signal s is taken out of the embedding of every token of the prompt:
    S forward passes. Target: the model's top token; foil: its second. Unit: a held-out context of 24 tokens.
    Every dictionary has a strongest signal, so maxima are compared with maxima. Control of a chosen signal:
    random directions in the span of the codes, of the same size, and the untrained model's own chosen signal.

Cost
    Output side: seconds at any size. Input side: 16 x S forward passes of 24 tokens (464M parameters: 0.3
    PFLOP, an hour and a half on two cores, a minute on a GPU).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
import numpy as np
import torch

import hooks
from attribution import contributions, exact_change, first_order_change, predict, remove_signals
from configurator import UserError
from data.words import token_id
from experiments.lab import Lab, Report, Scores, run_experiment
from experiments.lab.plots import plot_scores, plot_waterfall
from experiments.lab.stats import estimate
from reflow import Model

CLAIMS = {
    "generalizes": "a signal chosen on half of the prompts lowers log p of the top token on the other half",
    "strongest": "a prompt's strongest signal lowers log p of its top token more than in other dictionaries",
    "concentrated": "fewer signals hold 90 % of the contributions, by size, to top minus second logit",
}
PUBLISHED = "8.31 % to 0.03 % on one prompt, -5.7 nats (464M, OpenWebText)"
N_PROMPTS, PROMPT_LENGTH, N_INPUT_PROMPTS = 200, 24, 16
N_RANDOM = 5  # random directions


@dataclass
class AblateConfig:
    prompt: str = "The capital of France is"  # the prompt of the waterfall figure
    target: str = ""  # the token to explain, a word; empty: the model's own top token


def strongest(pred, d):
    """Each prompt's signal that lowers log p[target] most, first order: (signal, exact change, KL), (N,)."""
    signal = first_order_change(pred, d).argmin(1)
    return signal, *remove_signals(pred, d, signal)


def n_90(contributions):
    """How many of the contributions (N, S), largest first, make up 90 % of the sum of sizes, (N,)."""
    sizes = contributions.abs().sort(1, descending=True).values.double()
    return (sizes.cumsum(1) < 0.9 * sizes.sum(1, keepdim=True)).sum(1) + 1


def split_half(subject, prompts, generator):
    """(signal chosen on the even prompts, its drop of log p on the odd ones, that of random directions)."""
    pred, d = predict(subject.net, prompts), subject.dictionary
    signal = int(first_order_change(pred, d)[::2].mean(0).argmin())
    odd = pred[1::2]
    activation = odd.h @ d.atoms[signal]  # (N / 2,)
    column = d.codes[:, signal]  # (n_tokens,)
    chosen, _ = exact_change(activation, column.expand(len(odd.h), -1), odd.p, odd.target)
    drops = []
    for _ in range(N_RANDOM):
        direction = d.codes @ torch.randn(d.n_signals, generator=generator).to(odd.h)  # (n_tokens,)
        direction = direction * column.norm() / direction.norm()
        sign = torch.randn(len(odd.h), generator=generator).sign().to(odd.h)
        change, _ = exact_change(sign * activation.abs(), direction.expand(len(odd.h), -1), odd.p, odd.target)
        drops.append(-change)
    return signal, -chosen, torch.stack(drops).mean(0)


@torch.no_grad()
def ablate_input(net, d, prompt, batch=64):
    """Normalised final states after each signal is taken out of every embedding of prompt (T,), (S, d)."""
    embeddings = net.vocab.embed(prompt)  # (T, d)
    codes = d.codes[prompt]  # (T, S)
    states = []
    for s in torch.arange(d.n_signals, device=prompt.device).split(batch):
        removed = codes[:, s].T[:, :, None] * d.atoms[s][:, None]  # (batch, T, d)
        states.append(net.norm(hooks.resid_streams(net, embeddings - removed)[-1][:, -1]))
    return torch.cat(states)


def input_output_sizes(subject, prompts):
    """Mean size of the change of the logit difference, by the place of removal, {name: (n,)}."""
    pred, d, E = predict(subject.net, prompts), subject.dictionary, subject.E
    states = torch.stack([ablate_input(subject.net, d, prompt) for prompt in prompts])  # (n, S, d)
    direction = E[pred.target] - E[pred.foil]  # (n, d)
    before = (pred.h * direction).sum(1, keepdim=True)  # (n, 1)
    at_output = -contributions(pred, d)  # (n, S)
    at_input = torch.einsum("nsd,nd->ns", states, direction) - before
    A_after = torch.einsum("nsd,sd->ns", states, d.atoms)  # the ablated signal's own activation afterwards
    both = at_input - A_after * (d.codes[pred.target] - d.codes[pred.foil])
    parts = {"input": at_input, "output": at_output, "both": both, "interaction": both - at_input - at_output}
    return {name: change.abs().mean(1).cpu().numpy() for name, change in parts.items()}


def frequency_direction(lab, d):
    """The unit mixture (S,) of signals that fits log frequency in training best."""
    known = lab.words.known_tokens()
    W = d.part(known).codes.double().cpu()
    y = torch.from_numpy(np.log(lab.words.counts[known]))
    fit = torch.linalg.lstsq(W - W.mean(0), (y - y.mean())[:, None]).solution[:, 0]
    return (fit / fit.norm()).to(d.codes)


def run(lab: Lab, config: AblateConfig | None = None) -> Report:
    config = config or AblateConfig()
    if not config.prompt:
        raise UserError("--prompt is empty: give some words")
    if config.target:  # before the work
        token_id(config.target, lab.model.net.config.n_tokens)
    report = Report(lab, "ablate_signal", CLAIMS)
    prompts, _ = lab.heldout(N_PROMPTS, PROMPT_LENGTH)
    generator = lab.generator()

    # A signal chosen on one half of the prompts, tested on the other half.
    signal, chosen, random = split_half(lab.model, prompts, generator)
    _, untrained, _ = split_half(lab.step0, prompts, generator)
    drops = Scores({"native": chosen, "random direction": random, "step 0": untrained})
    report.effect("generalizes", drops, "prompts", published=PUBLISHED)

    # The strongest signal of each prompt, and how concentrated the logit difference is, in every dictionary.
    pred, d = predict(lab.model.net, prompts), lab.model.dictionary
    drop = lab.compare(lambda d: -strongest(pred, d)[1])
    spread = lab.compare(lambda d: n_90(contributions(pred, d)))
    report.signals("strongest", drop, "prompts")
    report.signals("concentrated", spread, "prompts", lower=True)
    if lab.baseline:
        plain = predict(lab.baseline.net, prompts)
        _, change, _ = strongest(plain, lab.baseline.dictionary)
        drop["baseline"] = -change
    mixture = frequency_direction(lab, d)
    along = (d.codes @ mixture).expand(len(prompts), -1)  # (N, n_tokens)
    change, _ = exact_change(d.activations(pred.h) @ mixture, along, pred.p, pred.target)
    drop["frequency"] = -change
    report.scores("drop_strongest", drop)

    which, _, divergence = strongest(pred, d)
    activation = (pred.h * d.atoms[which]).sum(1)
    logits = hooks.unembed(lab.model.net, pred.h) - activation[:, None] * d.codes[:, which].T
    flips = (logits.argmax(1) != pred.target).double().mean().item()
    chosen_prompts = torch.linspace(0, len(prompts) - 1, N_INPUT_PROMPTS).long()
    sizes = input_output_sizes(lab.model, prompts[chosen_prompts])
    for place, values in sizes.items():
        report.row(
            "mean size of change of logit difference", values.mean(), dictionary="native", control=place
        )
    report.numbers |= {
        "prompts": len(prompts),
        "flips": flips,
        "kl_strongest": divergence.mean().item(),
        "input_output_both": {place: vars(estimate(values)) for place, values in sizes.items()},
        "chosen_signal": signal,
    }
    promoted = lab.words.top(d.codes[:, signal])
    suppressed = lab.words.top(-d.codes[:, signal])
    by_place = ", ".join(f"{place} {estimate(values)}" for place, values in sizes.items())
    report.notes += [
        f"Signal {signal}, chosen on the even prompts, promotes {promoted} and suppresses {suppressed}.",
        f"Removing the strongest signal of a prompt changes the top token on {flips:.0%} of prompts. "
        f"Removing the direction of word frequency lowers log p by {drop['frequency'].mean():.2f} nats.",
        f"Mean size of the change of the logit difference, {N_INPUT_PROMPTS} prompts: {by_place}.",
    ]
    means = drop.means()
    title = (
        f"Removing a prompt's strongest signal lowers log p by {means['native']:.2f}; that of a "
        f"random rotation by {np.mean(means['gauges']):.2f} (up to {np.max(means['gauges']):.2f})"
    )
    with report.figure("strongest", title, 1, 2) as (left, right):
        plot_scores(left, drop, xlabel="drop of log p, nats, by each prompt's strongest signal")
        plot_scores(right, spread, xlabel="signals that hold 90 % of a logit difference")
    example(report, lab, config)
    return report


def example(report, lab, config):
    """One prompt: a table of its strongest signals, and a waterfall that sums to the logit difference."""
    model = Model(lab.checkpoint, lab.device, net=lab.model.net, words=lab.words)
    found = model.attribute(config.prompt, config.target or None)
    report.gallery = str(found.top(8))
    share = np.abs(found.contributions).max() / np.abs(found.contributions).sum()
    title = f'"{config.prompt}": the largest signal is {share:.0%} of all contributions'
    with report.figure("waterfall", title, size=(7, 3.8)) as ax:
        label = f'contribution to logit("{found.target}") - logit("{found.foil}"), nats; sums exactly'
        plot_waterfall(ax, found.contributions, xlabel=label)


if __name__ == "__main__":
    run_experiment(run, AblateConfig)
