"""
Signals and predictions at every layer: what is there when, and which block wrote it?

    python experiments/signal_lens.py --run=out/reflow-nano

Claims
  effect   the first half of the blocks brings the prediction nearer: it turns the logit lens' top token into
           the final one in more contexts than before training, and than into another context's.
  signals  the signals that carry the final top token are there at half depth: of the ten with the largest
           contribution to its logit, more are among the ten largest there than with the signals of random
           rotations, PCA and ICA.
  signals  one block writes a signal: the largest share of one block in all that is written to a signal is
           larger than for the signals of random rotations, PCA and ICA.

Method. Signal lens: A_l = norm(resid_l) @ atoms^T; logits_l = A_l @ codes^T is the logit lens of
nostalgebraist (2020). Agreement: the final layer's top token; KL(final || lens) in float64. An untrained
model passes its input through, so that all its layers agree: agreement is counted as gained over the
embedding's. Direct attribution: the stream is a sum of the embedding and the outputs of attention and MLP
blocks; with the final norm's scale frozen, so are the signals, exactly, and, times the recipes, the logits.
Who writes a signal: cov(part, whole) / var(whole) over contexts, which sums to 1 over the blocks.

Unit: a held-out window, at its last token. Half depth is after n_layer // 2 blocks, k = 10, fixed beforehand.

Cost: one forward pass of 128 windows of 32 tokens for each model, and n_layer + 1 times their last logits.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contextlib import ExitStack

import numpy as np
import torch

from experiments import lab

WINDOWS, LENGTH = 128, 32
TOP = 10


@torch.no_grad()
def written(net, idx):
    """What the embedding and every attention and MLP block add to the stream at the last token, (n, C, d)."""
    modules = [net.vocab, *(m for block in net.blocks for m in (block.attn, block.mlp))]
    parts = []
    with ExitStack() as stack:
        for module in modules[1:]:
            handle = module.register_forward_hook(lambda m, args, out: parts.append(out[:, -1]))
            stack.callback(handle.remove)
        net.encode(idx)
    return torch.stack([net.vocab.embed(idx[:, -1]), *parts], dim=1)


def names_of(net):
    """The names of what `written` returns."""
    return ["embed", *(f"{kind} {i}" for i in range(len(net.blocks)) for kind in ("attn", "mlp"))]


def frozen_norm(net, parts):
    """The final norm of the sum of parts (n, C, d), applied to each with the sum's own scale, (n, C, d)."""
    scale = parts.sum(1, keepdim=True).pow(2).mean(-1, keepdim=True).add(net.norm.eps).rsqrt()
    return parts * scale * net.norm.weight.to(parts)


def attribution(net, parts, dictionary):
    """Contribution of every part (n, C, d) to every signal (n, C, S); they sum to the final signals."""
    return frozen_norm(net, parts) @ dictionary.atoms.to(parts).T


def streams_of(parts):
    """Streams before the first block, after it, ..., after the last: (n, n_layer + 1, d)."""
    return parts.cumsum(1)[:, ::2]


def lens(net, streams):
    """Logit lens of streams (n, L, d): top tokens (n, L), and KL(last || each) in nats, float64 (n, L)."""
    final = lab.log_p(net, net.norm(streams[:, -1]))  # (n, V)
    top, kl = [], []
    for layer in range(streams.size(1)):  # one layer's logits at a time
        logits = lab.read_out(net, streams[:, layer])
        top.append(logits.argmax(-1))
        kl.append(lab.kl(final, logits.double().log_softmax(-1)))
    return torch.stack(top, 1), torch.stack(kl, 1)


def overlap(net, streams, tokens, dictionary, k):
    """Share of the k signals that most raise `tokens` (n,) finally which do so at each layer, (n, L)."""
    signals = net.norm(streams) @ dictionary.atoms.T  # (n, L, S)
    raises = signals * dictionary.codes[tokens][:, None]
    chosen = torch.zeros_like(raises).scatter(2, raises.topk(min(k, raises.size(2)), dim=2).indices, 1.0)
    return (chosen * chosen[:, -1:]).sum(2) / chosen[:, -1:].sum(2)


def largest_share(contributions):
    """Mean over signals of the largest part's share of all parts' sizes: (n, C, S) -> (n,)."""
    sizes = contributions.abs()
    return (sizes.amax(1) / sizes.sum(1).clamp(min=1e-30)).mean(1)


def writers(contributions):
    """cov(part, whole) / var(whole) over contexts, of every signal: (n, C, S) -> (C, S), columns sum to 1."""
    centred = contributions - contributions.mean(0)
    whole = centred.sum(1)  # (n, S)
    return torch.einsum("ncs,ns->cs", centred, whole) / whole.pow(2).sum(0).clamp(min=1e-30)


@torch.no_grad()
def run(laboratory):
    report = lab.Report(laboratory, "signal_lens")
    subject = laboratory.reflow
    length = min(LENGTH, subject.net.config.block_size)
    x, _ = laboratory.heldout(WINDOWS, length)
    n_layer = subject.net.config.n_layer
    half, other = n_layer // 2, torch.arange(1, len(x) + 1) % len(x)

    seen, agreement, gained, curves = {}, {}, {}, {}
    for s in laboratory.subjects:
        parts = written(s.net, x)
        streams = streams_of(parts)
        top, kl = lens(s.net, streams)
        same = lab.array(top == top[:, -1:])  # (n, L)
        gained[s.name] = same[:, half] - same[:, 0]
        curves[s.name], agreement[s.name] = lab.array(kl), same
        seen[s.name] = parts, streams, top
        for layer in range(n_layer + 1):
            report.row("agreement with the final top token", same[:, layer].mean(), model=s.name, layer=layer)
            report.row("KL(final || lens)", curves[s.name][:, layer].mean(), model=s.name, layer=layer)

    parts, streams, tops = seen["reflow"]
    tokens, own_parts = tops[:, -1], parts.double()
    shuffled = lab.array(tops == tokens[other, None])
    gained["another context"] = shuffled[:, half] - shuffled[:, 0]

    report.claim(
        lab.effect(
            f"the first {half} of {n_layer} blocks bring the logit lens to the final top token "
            "(agreement gained, share of contexts)",
            gained["reflow"],
            {name: gained[name] for name in ("step 0", "another context")},
            "contexts",
        )
    )

    dictionaries = {"native": subject.dictionary, **laboratory.rivals(subject)}
    dictionaries |= {f"rotated {i}": d for i, d in enumerate(laboratory.rotations(subject.dictionary))}
    early, share = {}, {}
    frozen = frozen_norm(subject.net, own_parts).float()  # (n, C, d), once for all dictionaries
    for name, d in dictionaries.items():
        early[name] = lab.array(overlap(subject.net, streams, tokens, d, TOP))  # (n, L)
        share[name] = lab.array(largest_share(frozen @ d.atoms.T))
    if laboratory.baseline:
        base, (parts, plain, top) = laboratory.baseline, seen["baseline"]
        early["baseline"] = lab.array(overlap(base.net, plain, top[:, -1], base.dictionary, TOP))
        share["baseline"] = lab.array(largest_share(attribution(base.net, parts, base.dictionary)))
    for name, values in early.items():
        for layer in range(n_layer + 1):
            report.row(f"overlap@{TOP} with final", values[:, layer].mean(), dictionary=name, layer=layer)
        report.row("largest writer's share", share[name].mean(), dictionary=name)
    spun = [name for name in dictionaries if name.startswith("rotated")]
    for claim, values in (
        (
            f"the {TOP} signals that carry the final top token are there at half depth (overlap@{TOP})",
            {name: v[:, half] for name, v in early.items()},
        ),
        ("one block writes a signal (share of the largest)", share),
    ):
        report.claim(
            lab.signals(
                claim,
                values["native"],
                [values[name] for name in spun],
                {name: values[name] for name in ("pca", "ica")},
                "contexts",
            )
        )

    # Completeness, checked on the way: parts -> signals -> logit of the top token.
    contributions = attribution(subject.net, own_parts, subject.dictionary)  # (n, C, S)
    whole = contributions.sum(1)  # (n, S)
    summed = (whole * subject.dictionary.codes[tokens].double()).sum(1)
    logit = lab.read_out(subject.net, streams[:, -1]).gather(1, tokens[:, None])[:, 0].double()
    by_writer = lab.array(writers(contributions))  # (C, S)
    names = names_of(subject.net)
    for s in range(by_writer.shape[1]):
        for c, name in enumerate(names):
            report.row("share of a signal's variance", by_writer[c, s], signal=s, control=name)
    report.numbers = {
        "agreement": {name: v.mean(0).tolist() for name, v in agreement.items()},
        "kl": {name: v.mean(0).tolist() for name, v in curves.items()},
        "overlap at half depth": {name: float(v[:, half].mean()) for name, v in early.items()},
        "largest writer's share": {name: float(v.mean()) for name, v in share.items()},
        "share of variance": dict(zip(names, by_writer.mean(1).tolist(), strict=True)),
        "largest error of the sum": float((summed - logit).abs().max()),
    }
    report.notes.append(
        f"Attributions sum to the top token's logit within {report.numbers['largest error of the sum']:.1e}. "
        f"With unrelated signals overlap@{TOP} would be {TOP}/S; PCA, ICA and a plain GPT may have another S."
    )
    report.gallery = gallery(x, tops, contributions, subject.dictionary, names, by_writer)
    figures(report, agreement, curves, early, by_writer, names, half)
    return report


def gallery(x, tops, contributions, dictionary, names, by_writer):
    """Eight contexts, evenly spaced and not chosen, as text; then the writers of signals 0 to 9."""
    lines = ["logit lens, eight contexts, not chosen: top token after 0, 1, ... blocks; strongest signals"]
    for i in range(0, len(x), max(1, len(x) // 8)):
        raises = contributions[i].sum(0) * dictionary.codes[tops[i, -1]].double()
        strong = raises.argsort(descending=True)[:3].tolist()
        by = [f"{s} ({raises[s]:+.1f}, {names[int(contributions[i, :, s].abs().argmax())]})" for s in strong]
        lines.append(f"  ...{''.join(lab.show(t) for t in x[i, -8:])}")
        lines.append(f"      {' -> '.join(lab.show(t) for t in tops[i])};  signals {', '.join(by)}")
    lines.append("who writes signals 0 to 9, not chosen (share of variance, the largest three)")
    for s in range(min(10, by_writer.shape[1])):
        best = np.argsort(-by_writer[:, s])[:3]
        lines.append(f"  {s:4d}  " + ", ".join(f"{names[c]} {by_writer[c, s]:.2f}" for c in best))
    return "\n".join(lines)


def figures(report, agreement, curves, early, by_writer, names, half):
    plt = lab.pyplot()
    fig, axes = plt.subplots(2, 2, figsize=(10, 6.6), layout="constrained")
    for ax, values, label in (
        (axes[0, 0], agreement, "share of contexts with the final top token"),
        (axes[0, 1], curves, "KL(final || lens), nats"),
    ):
        for name, v in values.items():
            lab.banded(ax, range(v.shape[1]), v, name, label=name)
        ax.set(xlabel="blocks before the lens", ylabel=label)
        ax.legend()
    axes[0, 1].set_yscale("symlog", linthresh=0.01)
    spun = np.array([v.mean(0) for name, v in early.items() if name.startswith("rotated")])
    grid = range(spun.shape[1])
    axes[1, 0].fill_between(
        grid, spun.min(0), spun.max(0), color=lab.COLOURS["rotated"], alpha=0.5, label="19 rotations, range"
    )
    for name in ("native", "pca", "ica", "baseline"):
        if name in early:
            axes[1, 0].plot(early[name].mean(0), "o-", ms=3, color=lab.COLOURS[name], label=name)
    axes[1, 0].set(xlabel="blocks before the lens", ylabel=f"overlap@{TOP} with the final signals")
    axes[1, 0].legend()
    shown = by_writer[:, :64]
    limit = np.abs(shown).max()
    image = axes[1, 1].imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes[1, 1].set(xlabel="signal (the first 64)", yticks=range(len(names)))
    axes[1, 1].set_yticklabels(names, fontsize=7 if len(names) < 20 else 4)
    axes[1, 1].grid(False)
    fig.colorbar(image, ax=axes[1, 1], label="share of the signal's variance")
    for ax in axes.flat[:3]:
        ax.xaxis.get_major_locator().set_params(integer=True)
    numbers = report.numbers
    title = (
        f"At half depth the lens has the final top token in {agreement['reflow'][:, half].mean():.0%} of "
        f"contexts; of the {TOP} signals that carry it {numbers['overlap at half depth']['native']:.0%} "
        f"are there, {spun[:, half].mean():.0%} for random rotations ({report.claims[1].verdict})"
    )
    report.figure(fig, "lens", title)


if __name__ == "__main__":
    lab.main(run)
