"""
Signals and predictions at every layer: what is there when, and which block wrote it?

    python experiments/signal_lens.py --run=out/reflow-nano
    python experiments/signal_lens.py --run=out/reflow-nano --baseline=out/gpt2-new-nano

Method
    Signal lens: A_l = norm(resid_l) @ atoms.T are the signals at layer l. A_l @ codes.T is the logit lens
    (nostalgebraist, 2020). Agreement: its top token is the final top token. An untrained model hardly
    changes its stream, so that all its layers agree; what counts is therefore the agreement gained over
    that of the embedding. Overlap: of the ten signals that raise the final top token's logit most in the
    end, the share that is among the ten that raise it most at layer l. Ten of many are harder to meet than
    ten of few: of a larger dictionary a random part of equal size counts, anew for each context.

    Direct attribution: the stream is the sum of the embedding and the outputs of all attention and MLP
    blocks. With the scale of the final norm frozen, every signal is the same sum, exactly, and so is every
    logit. Who writes a signal: cov(part, sum) / var(sum) over contexts, which adds up to 1 over the parts.

    Unit: a held-out window of 32 tokens, at its last token. Half depth is after n_layer // 2 blocks.
    Controls of the agreement: the null models, and the final top token of another context. Rivals of the
    claims about signals: PCA and ICA; of the plain GPT the coordinates of its E, and ICA of it.

Cost
    One forward pass of 128 windows of 32 tokens for each model, and the logits of n_layer + 1 layers at
    their last tokens.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
import numpy as np
import torch

import hooks
from experiments.lab import Lab, Report, Scores, run_experiment
from experiments.lab.claims import to_numpy
from experiments.lab.plots import plot_band, plot_curves, plot_heat_map
from experiments.lab.stats import random_mask

CLAIMS = {
    "lens_half": "the first half of the blocks brings the logit lens to the final top token",
    "overlap_half": "more of the ten signals that carry the final top token are there at half depth",
    "one_writer": "one block writes a signal: the largest share of one block in what is written is larger",
}
N_WINDOWS, LENGTH = 128, 32
TOP = 10  # signals


@torch.no_grad()
def decompose_resid(net, idx):
    """What the embedding and each attention and MLP block add to the stream at the last token, (n, C, d)."""
    parts = []
    with ExitStack() as stack:
        for block in net.blocks:
            for module in (block.attn, block.mlp):
                handle = module.register_forward_hook(lambda _, args, out: parts.append(out[:, -1]))
                stack.callback(handle.remove)
        net.encode(idx)
    return torch.stack([net.vocab.embed(idx[:, -1]), *parts], dim=1)


def part_names(net):
    """The names of the parts that `decompose_resid` returns."""
    return ["embed", *(f"{kind} {i}" for i in range(len(net.blocks)) for kind in ("attn", "mlp"))]


def attribute(net, parts, d):
    """Contribution of each part (n, C, d) to each final signal, (n, C, S); the sum over parts is exact."""
    mean_square = parts.sum(1, keepdim=True).pow(2).mean(-1, keepdim=True)  # (n, 1, 1)
    scale = (mean_square + net.norm.eps).rsqrt()  # of the whole stream, the same for every part
    return (parts * scale * net.norm.weight.to(parts)) @ d.atoms.to(parts).T


def overlap(net, resid, token, d, size, k=TOP):
    """Share of the k signals that raise `token` (n,) most at the end that do so at each layer, (n, L).

    Of each context `size` random signals count.
    """
    raises = d.activations(net.norm(resid)) * d.codes[token][:, None]  # (n, L, S)
    counted = torch.from_numpy(random_mask(len(token), d.n_signals, size)).to(raises.device)
    raises = raises.masked_fill(~counted[:, None], -torch.inf)
    largest = raises.topk(min(k, size, d.n_signals), dim=2).indices
    chosen = torch.zeros_like(raises).scatter(2, largest, 1.0)
    return (chosen * chosen[:, -1:]).sum(2) / chosen[:, -1:].sum(2)


def largest_share(contributions):
    """Share of the largest part in the sizes of all parts, mean over signals: (n, C, S) -> (n,)."""
    sizes = contributions.abs()
    return (sizes.amax(1) / sizes.sum(1).clamp(min=1e-30)).mean(1)


def variance_shares(contributions):
    """cov(part, sum) / var(sum) over contexts, for every signal: (n, C, S) -> (C, S), columns add up to 1."""
    centred = contributions - contributions.mean(0)
    whole = centred.sum(1)  # (n, S)
    return torch.einsum("ncs,ns->cs", centred, whole) / whole.pow(2).sum(0).clamp(min=1e-30)


@dataclass
class Depth:
    """One model at every layer, at the last token of n contexts."""

    parts: torch.Tensor  # (n, C, d), what each block adds
    resid: torch.Tensor  # (n, n_layer + 1, d), streams before the first block, after it, ..., after the last
    top: torch.Tensor  # (n, n_layer + 1), top tokens of the logit lens
    kl: np.ndarray  # (n, n_layer + 1), KL(final || lens), nats

    def agreement(self, token):
        """Whether the lens' top token is `token` (n,), at every layer, (n, n_layer + 1)."""
        return to_numpy(self.top == token[:, None])


def read_depth(net, idx):
    """The Depth of a model for contexts idx (n, T)."""
    parts = decompose_resid(net, idx)
    resid = parts.cumsum(1)[:, ::2]  # a block adds two parts
    top, kl = hooks.lens_by_layer(net, resid)
    return Depth(parts, resid, top, to_numpy(kl))


def measure(net, depth, size, d):
    """In one dictionary: the overlap at every layer (n, L), and the largest writer's share (n,)."""
    return {
        "overlap": overlap(net, depth.resid, depth.top[:, -1], d, size),
        "share": largest_share(attribute(net, depth.parts, d)),
    }


@torch.no_grad()
def run(lab: Lab, config=None) -> Report:
    report = Report(lab, "signal_lens", CLAIMS)
    net, native = lab.model.net, lab.model.dictionary
    x, _ = lab.heldout(N_WINDOWS, min(LENGTH, net.config.block_size))
    layers = range(len(net.blocks) + 1)
    half = len(net.blocks) // 2

    # The logit lens of every model.
    depths = {name: read_depth(subject.net, x) for name, subject in lab.models.items()}
    own = depths["reflow"]
    token = own.top[:, -1]  # (n,), the final top token of each context
    agreement = {name: depth.agreement(depth.top[:, -1]) for name, depth in depths.items()}
    agreed = Scores({"native": agreement["reflow"]} | {name: agreement[name] for name in lab.nulls})
    agreed["another context"] = own.agreement(token.roll(-1))
    report.effect("lens_half", agreed.map(lambda v: v[:, half] - v[:, 0]), "contexts")
    for name, depth in depths.items():
        for layer in layers:
            where = {"model": name, "layer": layer}
            report.row("agreement with the final top token", agreement[name][:, layer].mean(), **where)
            report.row("KL(final || lens)", depth.kl[:, layer].mean(), **where)

    # Signals that carry the top token, and blocks that write signals, in every dictionary.
    size = lab.least_signals()
    plain = lab.baseline and partial(measure, lab.baseline.net, depths["baseline"], size)
    found = lab.compare(partial(measure, net, own, size), plain=plain)
    report.signals("overlap_half", found["overlap"].map(lambda v: v[:, half]), "contexts")
    report.signals("one_writer", found["share"], "contexts")
    for layer in layers:
        at_layer = found["overlap"].map(lambda v, layer=layer: v[:, layer])
        report.scores(f"overlap@{TOP} with the final signals", at_layer, layer=layer)

    # The sum over parts and signals is the logit of the top token, up to rounding.
    contributions = attribute(net, own.parts.double(), native)  # (n, C, S)
    summed = (contributions.sum(1) * native.codes[token].double()).sum(1)
    logit = hooks.logit_lens(net, own.resid[:, -1]).gather(1, token[:, None])[:, 0]
    error = float((summed - logit.double()).abs().max())
    shares = to_numpy(variance_shares(contributions))  # (C, S)
    names = part_names(net)
    for part, row in zip(names, shares, strict=True):
        for signal, share in enumerate(row):
            report.row("share of a signal's variance", share, signal=signal, control=part)
    report.numbers |= {
        "agreement": {name: values.mean(0) for name, values in agreement.items()},
        "kl": {name: depth.kl.mean(0) for name, depth in depths.items()},
        "share of variance": dict(zip(names, shares.mean(1), strict=True)),
        "largest error of the sum": error,
    }
    report.notes.append(
        f"Contributions sum to the top token's logit within {error:.1e}. With unrelated signals the overlap "
        f"would be {min(TOP, size)}/{size}."
    )
    report.gallery = gallery(lab, x, own, contributions, native, names)

    draw(report, depths, agreement, found["overlap"], shares, names)
    return report


def gallery(lab, x, depth, contributions, d, names):
    """Eight contexts, evenly spaced and not chosen, as text."""
    lines = ["logit lens, eight contexts, not chosen: top token after 0, 1, ... blocks; strongest signals"]
    for i in range(0, len(x), max(1, len(x) // 8)):
        raises = contributions[i].sum(0) * d.codes[depth.top[i, -1]].double()  # (S,)
        writer = contributions[i].abs().argmax(0)  # (S,)
        strongest = raises.argsort(descending=True)[:3].tolist()
        signals = [f"{s} ({raises[s]:+.1f}, {names[writer[s]]})" for s in strongest]
        tops = " -> ".join(lab.words.text(token) for token in depth.top[i])
        lines.append(f"  ...{''.join(lab.words.text(token) for token in x[i, -8:])}")
        lines.append(f"      {tops};  signals {', '.join(signals)}")
    return "\n".join(lines)


def draw(report, depths, agreement, overlaps, shares, names):
    """Agreement, divergence and overlap by layer; the writers of the first 64 signals."""
    layers = range(agreement["reflow"].shape[1])
    half = layers[-1] // 2
    claim = report["overlap_half"]
    title = (
        f"At half depth the lens has the final top token in {agreement['reflow'][:, half].mean():.0%} of "
        f"contexts; of the {TOP} signals that carry it {claim.measured.value:.0%} are there, "
        f"{claim.gauges.value:.0%} in random rotations ({claim.verdict})"
    )
    with report.figure("lens", title, 2, 2, size=(10, 6.6)) as ((left, right), (lower_left, lower_right)):
        for name, depth in depths.items():
            plot_band(left, layers, agreement[name], name, label=name)
            plot_band(right, layers, depth.kl, name, label=name)
        plot_curves(lower_left, layers, overlaps)
        left.set(ylabel="contexts with the final top token")
        right.set(ylabel="KL(final || lens), nats")
        right.set_yscale("symlog", linthresh=0.01)
        lower_left.set(ylabel=f"overlap@{TOP} with the final signals")
        for ax in (left, right, lower_left):
            ax.set(xlabel="blocks before the lens")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.legend()
        shown = shares[:, :64]
        labels = [s if s % 8 == 0 else "" for s in range(shown.shape[1])]
        fontsize = 7 if len(names) < 20 else 4
        plot_heat_map(lower_right, shown, labels, names, "share of the signal's variance", fontsize=fontsize)
        lower_right.set(xlabel="signal")


if __name__ == "__main__":
    run_experiment(run)
