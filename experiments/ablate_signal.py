"""
What does a single signal do? Remove each one, at the output, at the input, and at both.

    python experiments/ablate_signal.py --run=out/reflow-nano
    python experiments/ablate_signal.py --prompt="The capital of France is" --target=Paris

Method
    At the output the effect is exact and needs no forward pass. With A = norm(h) @ atoms.T, W the codes and p
    the distribution over tokens, removing signal s subtracts A_s C_s from the logits. The logit difference of
    target t and foil f changes by -A_s (C_ts - C_fs), log p_t by -A_s C_ts - K_s with K_s = log E_p[exp(-A_s
    C_vs)], and KL(p || p') = K_s + A_s E_p[C_vs]. Target: the model's top token; foil: its second.

    To remove can mean two things. *term* takes the signal's term out of the sum: C = W. *direction* projects
    its atom out of the final state: C = E @ atoms.T. A claim is measured in both and holds only if it holds
    in both. Signals are chosen to first order; what they do is exact. Unit: a held-out context of 24 tokens.
    One signal may be the strongest of many contexts: intervals resample signals, then contexts.

    Every dictionary has a strongest signal, so maxima are compared with maxima over equally many signals: of
    a larger dictionary a random part counts, anew for each context. Controls of a signal chosen on half of
    the contexts: the one chosen in the same way in each of 19 random rotations, of which the best counts, and
    in the null models. Rivals: PCA and ICA; of the plain GPT the coordinates of its E, and ICA of it.

    At the input, signal s is taken out of the embedding of every token of the context: a forward pass for
    each signal. Where all signals of 16 contexts need more than 5e12 operations, as many random ones as need
    no more are taken out, at least 20. This side is a description.

Cost
    Output side: seconds at any size. Input side: 5e12 operations, at 464M parameters 7e12: minutes on two
    cores.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
import numpy as np
import torch

import hooks
from attribution import (
    REMOVALS,
    contributions,
    exact_change,
    first_order_change,
    mixed,
    predict,
    remove_signals,
)
from configurator import UserError
from experiments.lab import Lab, Report, Scores, run_experiment
from experiments.lab.claims import LEAST_UNITS
from experiments.lab.plots import plot_scores, plot_waterfall
from experiments.lab.stats import estimate, random_mask
from hardware import flops_per_token
from reflow import Model

CLAIMS = {
    "generalizes": "a signal chosen on half of the prompts lowers log p of the top token on the other half",
    "strongest": "a prompt's strongest signal lowers log p of its top token more than in other dictionaries",
    "concentrated": "fewer signals hold 90 % of the contributions, by size, to top minus second logit",
}
PUBLISHED = "8.31 % to 0.03 % on one prompt, -5.7 nats (464M, OpenWebText)"
N_PROMPTS, PROMPT_LENGTH, N_INPUT_PROMPTS = 200, 24, 16
N_GAUGES = 99  # of the claim that needs no probabilities
INPUT_BUDGET = 5e12  # floating-point operations of the input side, beyond LEAST_UNITS signals


@dataclass
class AblateConfig:
    prompt: str = "The capital of France is"  # the prompt of the waterfall figure
    target: str = ""  # the token to explain, a word; empty: the model's own top token


def strongest(pred, d, size, removal="term"):
    """The signal, of `size` random ones, that lowers log p[target] most: (signal, change, KL), (N,) each."""
    change = first_order_change(pred, d, removal)
    left_out = ~torch.from_numpy(random_mask(*change.shape, size)).to(change.device)
    signal = change.masked_fill(left_out, torch.inf).argmin(1)
    return signal, *remove_signals(pred, d, signal, removal)


def chosen_signal(pred, d, removal):
    """(the signal that lowers log p most in the mean of even prompts, its drops on odd ones (N / 2,))."""
    signal = first_order_change(pred[::2], d, removal).mean(0).argmin()
    odd = pred[1::2]
    change, _ = remove_signals(odd, d, signal.expand(len(odd)), removal)
    return int(signal), -change


def drops(pred, size, d):
    """{what: drop of log p[target] (n,)} by each prompt's strongest signal, and by a chosen one."""
    found = {}
    for removal in REMOVALS:
        found["strongest", removal] = -strongest(pred, d, size, removal)[1]
        found["chosen", removal] = chosen_signal(pred, d, removal)[1]
    return found


def n_90(contributions):
    """How many of the contributions (N, S), largest first, make up 90 % of the sum of sizes, (N,)."""
    sizes = contributions.abs().sort(1, descending=True).values.double()
    return (sizes.cumsum(1) < 0.9 * sizes.sum(1, keepdim=True)).sum(1) + 1


def spreads(h, size, d):
    """{removal: n_90 of the logit differences (N,)}; codes (2N, S) of the targets and then of the foils.

    h (N, d): final states. Of a dictionary of more than `size` signals as many random ones count.
    """
    targets, foils = d.codes.chunk(2)
    counted = torch.from_numpy(random_mask(len(h), d.n_signals, size)).to(h)
    A = d.activations(h) * counted
    return {removal: n_90(A * mixed(targets - foils, d, removal)) for removal in REMOVALS}


def input_signals(config, n_signals, rng):
    """The signals that are removed at the input of a model of a ModelConfig, ids (m,): see Method."""
    each = N_INPUT_PROMPTS * PROMPT_LENGTH * flops_per_token(config, PROMPT_LENGTH) / 3  # a forward pass
    m = max(LEAST_UNITS, int(INPUT_BUDGET / each))
    return np.sort(rng.permutation(n_signals)[:m])


@torch.no_grad()
def ablate_input(net, d, prompt, signals, batch=64):
    """Normalised final states after each of `signals` (m,) leaves every embedding of prompt (T,), (m, d)."""
    embeddings = net.vocab.embed(prompt)  # (T, d)
    codes = d.codes[prompt]  # (T, S)
    states = []
    for s in signals.split(batch):
        removed = codes[:, s].T[:, :, None] * d.atoms[s][:, None]  # (batch, T, d)
        states.append(net.norm(hooks.resid_streams(net, embeddings - removed)[-1][:, -1]))
    return torch.cat(states)


def input_output_sizes(subject, prompts, signals):
    """Mean size, over `signals`, of the change of the logit difference by place of removal, {name: (n,)}."""
    pred, d, E = predict(subject.net, prompts), subject.dictionary, subject.E
    states = torch.stack([ablate_input(subject.net, d, prompt, signals) for prompt in prompts])  # (n, m, d)
    direction = E[pred.target] - E[pred.foil]  # (n, d)
    before = (pred.h * direction).sum(1, keepdim=True)  # (n, 1)
    at_output = -contributions(pred, d)[:, signals]  # (n, m)
    at_input = torch.einsum("nsd,nd->ns", states, direction) - before
    A_after = torch.einsum("nsd,sd->ns", states, d.atoms[signals])  # the signal's own activation afterwards
    both = at_input - A_after * (d.codes[pred.target] - d.codes[pred.foil])[:, signals]
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
        lab.words.tokenizer.token_id(config.target, lab.model.net.config.n_tokens)
    report = Report(lab, "ablate_signal", CLAIMS)
    prompts, _ = lab.heldout(N_PROMPTS, PROMPT_LENGTH)

    pred, d = predict(lab.model.net, prompts), lab.model.dictionary
    size = lab.least_signals()
    pairs = torch.cat([pred.target, pred.foil])
    plain_drops = plain_spreads = None
    if lab.baseline:
        own = predict(lab.baseline.net, prompts)
        own_pairs = torch.cat([own.target, own.foil])
        plain_drops = partial(drops, own, size)

        def plain_spreads(other):
            return spreads(own.h, d.n_signals, other.part(own_pairs))

    # What removing a signal does, in every dictionary.
    found = lab.compare(partial(drops, pred, size), plain=plain_drops)
    how = {"tokens": pairs, "n_gauges": N_GAUGES, "plain": plain_spreads}
    spread = lab.compare(partial(spreads, pred.h, d.n_signals), **how)
    nulls = {name: (predict(null.net, prompts), null.dictionary) for name, null in lab.nulls.items()}
    chosen, drop, which = {}, {}, {}
    for removal in REMOVALS:
        rotations = found["chosen", removal].gauges  # (19, N / 2)
        chosen[removal] = Scores({"native": found["chosen", removal].native})
        chosen[removal]["random directions"] = max(rotations, key=np.mean)
        for name, (untaught, other) in nulls.items():
            chosen[removal][name] = chosen_signal(untaught, other, removal)[1]
        drop[removal] = found["strongest", removal]
        which[removal] = "signals", strongest(pred, d, size, removal)[0].cpu().numpy()
    report.effect("generalizes", chosen, "prompts", published=PUBLISHED)
    report.signals("strongest", drop, "prompts", clusters=which)
    report.signals("concentrated", spread, "prompts", lower=True)
    signal, _ = chosen_signal(pred, d, "term")

    # For people: what the strongest terms do, beside the direction of word frequency.
    strong, _, divergence = strongest(pred, d, size)
    activation = (pred.h * d.atoms[strong]).sum(1)
    logits = hooks.unembed(lab.model.net, pred.h) - activation[:, None] * d.codes[:, strong].T
    flips = (logits.argmax(1) != pred.target).double().mean().item()
    mixture = frequency_direction(lab, d)
    along = (d.codes @ mixture).expand(len(prompts), -1)  # (N, n_tokens)
    change, _ = exact_change(d.activations(pred.h) @ mixture, along, pred.p, pred.target)
    drop["term"]["frequency"] = -change
    for removal, values in drop.items():
        report.scores("drop_strongest" if removal == "term" else f"drop_strongest, {removal}", values)
    chosen_prompts = torch.linspace(0, len(prompts) - 1, N_INPUT_PROMPTS).long()
    at_input = input_signals(lab.model.net.config, d.n_signals, lab.rng("input"))
    sizes = input_output_sizes(lab.model, prompts[chosen_prompts], torch.from_numpy(at_input).to(lab.device))
    for place, values in sizes.items():
        report.row(
            "mean size of change of logit difference", values.mean(), dictionary="native", control=place
        )
    report.numbers |= {
        "prompts": len(prompts),
        "flips": flips,
        "kl_strongest": divergence.mean().item(),
        "input_output_both": {place: vars(estimate(values)) for place, values in sizes.items()},
        "input_output_signals": len(at_input),
        "chosen_signal": signal,
    }
    promoted = lab.words.top(d.codes[:, signal])
    suppressed = lab.words.top(-d.codes[:, signal])
    by_place = ", ".join(f"{place} {estimate(values)}" for place, values in sizes.items())
    report.notes += [
        f"Signal {signal}, chosen on the even prompts, promotes {promoted} and suppresses {suppressed}.",
        f"Removing the strongest term of a prompt changes the top token on {flips:.0%} of prompts. Removing "
        f"the direction of word frequency lowers log p by {drop['term']['frequency'].mean():.2f} nats.",
        f"Mean size of the change of the logit difference, {N_INPUT_PROMPTS} prompts, {len(at_input)} of "
        f"{d.n_signals} signals: {by_place}.",
    ]
    means = {removal: values.means() for removal, values in drop.items()}
    each = [
        f"{found['native']:.2f} as a {removal} (rotations {min(found['gauges']):.2f} to "
        f"{max(found['gauges']):.2f})"
        for removal, found in means.items()
    ]
    title = f"Removing a prompt's strongest signal lowers log p by {' and by '.join(each)}"
    with report.figure("strongest", title, 1, 3, size=(13, 3.8)) as axes:
        for ax, (removal, values) in zip(axes, drop.items(), strict=False):
            plot_scores(ax, values, xlabel=f"drop of log p, nats, by each prompt's strongest {removal}")
        plot_scores(axes[2], spread["term"], xlabel="terms that hold 90 % of a logit difference")
    example(report, lab, config)
    return report


def example(report, lab, config):
    """One prompt: a table of its strongest signals, and a waterfall that sums to the logit difference."""
    model = Model(lab.checkpoint, lab.device, net=lab.model.net, words=lab.words)
    found = model.attribute(config.prompt, config.target or None)
    report.gallery = str(found.top(8))
    pair = f'"{config.prompt}": logit("{found.target}") - logit("{found.foil}")'
    for signal, value in enumerate(found.contributions):
        report.row("contribution", value, dictionary="native", signal=signal, prompt=pair)
    share = np.abs(found.contributions).max() / np.abs(found.contributions).sum()
    title = f'"{config.prompt}": the largest signal is {share:.0%} of all contributions'
    with report.figure("waterfall", title, size=(7, 3.8)) as ax:
        label = f'contribution to logit("{found.target}") - logit("{found.foil}"), nats; sums exactly'
        plot_waterfall(ax, found.contributions, xlabel=label)


if __name__ == "__main__":
    run_experiment(run, AblateConfig)
