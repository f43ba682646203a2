"""
After which layer does an intervention no longer change the outcome, and is that a matter of signals?

    python experiments/crystallization.py --run=out/reflow-nano

Claims
  effect   early injections count and late ones do not: at equal relative norm, another token's direction put
           into the first third of the layers changes the logit difference more than into the last third, than
           a random direction does, and than before training.
  effect   the decision reaches the last token earlier than in a plain GPT of the same shape and than in an
           untrained model (layer of 50 % recovery).
  effect   it reaches the last token later after a long context than after none.

Method. Injection: E[target] at a strength in norms of the vector it is added to, at all positions or at the
last one alone; the outcome is logit[target] - logit[top token before]. Interchange (activation patching,
Zhang & Nanda, 2309.16042): of a minimal pair of prompts, the clean stream replaces the corrupted one at one
layer and place; recovery is (patched - corrupted) / (clean - corrupted) of the logit difference. Its mean is
a ratio of means, each pair with the sign of its denominator: defined even where a model prefers the wrong
word. Crossing: the layer from which the recovery at the last token stays above one half, interpolated. Lens
depth: the first layer from which KL(final || logit lens) stays below 0.5 nat.

No claim of kind signals: an intervention on the stream touches no dictionary, so every rotation gives the
same number exactly. What it can be compared with is a model without signals, the baseline; where the two
differ, it may be the seed. Unit: a held-out window or a minimal pair. Layer l is the stream that enters
block l; thirds are rounded up.

Cost: what is done to the last token leaves the keys and values of the others alone, so it takes that token's
pass only. All positions and places: about 30 forward passes of 1,000 tokens a model at 4 layers, 100 at 36
(thinned to 13 layers): minutes on a GPU, an hour on two cores for 0.5B parameters.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataclasses import asdict, dataclass

import numpy as np
import torch

from data.tokenizer import encode
from experiments import lab
from experiments.signal_lens import lens
from model import KVCache, rope_table

PUBLISHED = "injection effective in layers 0 to 12, inert beyond 18 (of 36; 515M, OpenWebText)"
PUBLISHED_LONG = "the boundary moved from about layer 18 to 28 (of 36; 515M, OpenWebText)"
WINDOWS, LENGTH = 64, 16
STRENGTHS, TESTED = (0.5, 1.0, 2.0), 1.0  # residual norms
PLACES = ("changed", "between", "last")
NAT = 0.5
MOST_LAYERS = 13  # swept with whole forward passes


def layers_of(n_layer):
    """At most MOST_LAYERS layers from 0 to n_layer."""
    return np.unique(np.linspace(0, n_layer, min(n_layer + 1, MOST_LAYERS)).round().astype(int))


@torch.no_grad()
def last_token(net, idx, lengths):
    """A function (x (B, d), start) -> streams (n_layer + 1 - start, B, d) of each row's last token alone.

    idx (B, T) is padded on the right; x enters block `start`. Keys and values of all other tokens are those
    of idx, computed once: what happens at the last token changes none of them.
    """
    c = net.config
    cache = KVCache(c, len(idx), max(lengths), idx.device, net.kv_dtype())
    net.encode(idx[:, : max(lengths) - 1], cache, [n - 1 for n in lengths])
    at = cache.advance(idx.device)  # (B, 1)
    cos, sin = (t[at].unsqueeze(1) for t in rope_table(c.block_size, c.head_dim, c.rope_base, idx.device))

    @torch.no_grad()
    def run(x, start=0):
        streams = [x[:, None]]  # (B, 1, d) each
        for layer in range(start, c.n_layer):
            streams.append(net.blocks[layer](streams[-1], cos, sin, cache, layer))
        return torch.cat(streams, dim=1).transpose(0, 1)

    return run


def difference(net, E, stream, plus, minus):
    """logit[plus] - logit[minus] of final streams (B, d); plus and minus (B,) -> (B,)."""
    return (net.norm(stream) * (E[plus] - E[minus])).sum(-1)


def moved(x, unit, strength):
    """x (..., d) plus `strength` of its own norms of unit, per row."""
    return x + strength * x.norm(dim=-1, keepdim=True) * unit


@torch.no_grad()
def injection(net, E, idx, unit, plus, minus, strengths, layers, where):
    """Logit difference before (B,) and after unit (B, d) is put in (B, len(strengths), len(layers))."""
    streams = lab.run_blocks(net, net.vocab.embed(idx))
    run = last_token(net, idx, [idx.size(1)] * len(idx)) if where == "last" else None

    def final(strength, layer):
        if where == "last":
            return run(moved(streams[layer][:, -1], unit, strength), layer)[-1]
        return lab.run_blocks(net, moved(streams[layer], unit[:, None], strength), layer)[-1][:, -1]

    after = [[difference(net, E, final(a, layer), plus, minus) for layer in layers] for a in strengths]
    after = torch.stack([torch.stack(row, dim=1) for row in after], dim=1)
    return difference(net, E, streams[-1][:, -1], plus, minus), after


class Pairs:
    """Minimal pairs: clean, corrupted (B, T), padded on the right; correct, other, last (B,).

    Prompts keep their last `block_size` tokens; `contexts` are texts to come before them, or None.
    """

    def __init__(self, pairs, contexts, block_size, device):
        head = [contexts[p["context"]] + " " if contexts else "" for p in pairs]
        clean, corrupted = (
            [encode(h + p[side]).tolist()[-block_size:] for h, p in zip(head, pairs, strict=True)]
            for side in ("clean", "corrupted")
        )
        self.lengths = [len(c) for c in clean]
        self.clean, self.corrupted = (lab.padded(side, device) for side in (clean, corrupted))
        ids = [[encode(" " + p[side])[0] for p in pairs] for side in ("correct", "other")]
        self.correct, self.other = (torch.tensor(i, dtype=torch.long, device=device) for i in ids)
        self.last = torch.tensor(self.lengths, device=device) - 1

    def places(self):
        """Masks (B, T): the tokens that differ; those after the first of them; the last token."""
        at = torch.arange(self.clean.size(1), device=self.clean.device)
        changed = self.clean != self.corrupted
        last = at == self.last[:, None]
        between = (changed.cumsum(1) > 0) & ~changed & (at < self.last[:, None])
        return dict(zip(PLACES, (changed, between, last), strict=True))


@torch.no_grad()
def last_recovery(net, E, pairs):
    """Patch the last token: (patched - corrupted) (B, n_layer + 1) and (clean - corrupted) (B,)."""
    runs = [last_token(net, idx, pairs.lengths) for idx in (pairs.clean, pairs.corrupted)]
    rows = torch.arange(len(pairs.clean))
    streams = [
        run(net.vocab.embed(idx[rows, pairs.last]))
        for run, idx in zip(runs, (pairs.clean, pairs.corrupted), strict=True)
    ]
    clean, corrupted = (difference(net, E, s[-1], pairs.correct, pairs.other) for s in streams)
    patched = [
        difference(net, E, runs[1](x, layer)[-1], pairs.correct, pairs.other)
        for layer, x in enumerate(streams[0])
    ]
    return torch.stack(patched, 1) - corrupted[:, None], clean - corrupted


@torch.no_grad()
def place_recovery(net, E, pairs, masks, layers):
    """Patch the places of each mask (B, T): patched - corrupted, (len(masks), len(layers), B)."""
    ends = (pairs.clean, pairs.corrupted)
    clean, corrupted = (lab.run_blocks(net, net.vocab.embed(idx)) for idx in ends)
    rows = torch.arange(len(pairs.clean))

    def read(stream):
        return difference(net, E, stream[rows, pairs.last], pairs.correct, pairs.other)

    def patched(mask, layer):
        x = torch.where(mask[..., None], clean[layer], corrupted[layer])
        return read(lab.run_blocks(net, x, layer)[-1]) - read(corrupted[-1])

    return torch.stack([torch.stack([patched(mask, layer) for layer in layers]) for mask in masks])


def crossing(curves, layers):
    """Where curves (..., L) over layers (L,) rise above one half for good, interpolated, (...)."""
    curves, layers = np.asarray(curves, float), np.asarray(layers, float)
    below = curves[..., :-1] < 0.5  # the last value is 1
    i = below.shape[-1] - 1 - below[..., ::-1].argmax(-1)  # the last layer below
    a, b = (np.take_along_axis(curves, j[..., None], -1)[..., 0] for j in (i, i + 1))
    share = np.divide(0.5 - a, b - a, out=np.zeros_like(a), where=b > a).clip(0, 1)
    return np.where(below.any(-1), layers[i] + share * (layers[i + 1] - layers[i]), layers[0])


def ratio(change, whole, rng, resamples=2000):
    """Ratio of means of change (B, L) to whole (B,), signs aligned: (L,), and that of resampled pairs."""
    sign, n = np.sign(whole), len(whole)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples)  # (R, B)
    size, aligned = np.abs(whole), change * sign[:, None]
    return aligned.sum(0) / size.sum(), (weights @ aligned) / (weights @ size)[:, None]


def lens_depth(kl):
    """First layer from which kl (n, L), 0 at the last, stays below NAT, (n,)."""
    above = kl >= NAT
    return np.where(above.any(1), kl.shape[1] - above[:, ::-1].argmax(1), 0)


@torch.no_grad()
def inject(laboratory, report, layers):
    """Held-out windows: ({(model or random, where, strength): change (n, layers)}, {model: KL (n, L)})."""
    subject = laboratory.reflow
    x, _ = laboratory.heldout(WINDOWS, min(LENGTH, subject.net.config.block_size))
    tops, kl = {}, {}
    for s in laboratory.subjects:
        streams = torch.stack(lab.run_blocks(s.net, s.net.vocab.embed(x)), dim=1)[:, :, -1]  # (n, L, d)
        top, divergence = lens(s.net, streams)
        tops[s.name], kl[s.name] = top[:, -1], lab.array(divergence)
        report.row(f"lens depth, KL below {NAT} nat", lens_depth(kl[s.name]).mean(), model=s.name)
    # A window's target is a common token, drawn anew where it is a model's top token already.
    draws = laboratory.rng("targets").choice(laboratory.known_tokens()[:500], (len(x), 8))
    taken = (draws[:, :, None] == np.stack([lab.array(t) for t in tops.values()], 1)[:, None]).any(2)
    target = torch.from_numpy(draws[np.arange(len(x)), taken.argmin(1)]).to(laboratory.device)
    generator = torch.Generator().manual_seed(laboratory.seed)
    noise = torch.randn(len(x), subject.E.size(1), generator=generator).to(laboratory.device)
    moves = {}
    for name, s in [(s.name, s) for s in laboratory.subjects] + [("random", subject)]:
        direction = noise if name == "random" else s.E[target]
        unit = direction / direction.norm(dim=1, keepdim=True)
        strengths = STRENGTHS if name == "reflow" else (TESTED,)
        for where, swept in (("all", layers), ("last", range(len(s.net.blocks) + 1))):
            what = s.net, s.E, x, unit, target, tops[s.name], strengths, swept, where
            before, after = map(lab.array, injection(*what))  # (n,), (n, strengths, layers)
            for i, strength in enumerate(strengths):
                moves[name, where, strength] = after[:, i] - before[:, None]
                for layer, values in zip(swept, after[:, i].T, strict=True):
                    at = {"model": s.name, "layer": layer, "pos": where}
                    at["control"] = f"{'random, ' * (name == 'random')}{strength} norms"
                    report.row("change of logit difference", (values - before).mean(), **at)
                    report.row("target overtakes", (values > 0).mean(), **at)
    return moves, kl


@dataclass
class Patching:
    """What patching minimal pairs in one model gave."""

    pairs: Pairs
    whole: np.ndarray  # clean - corrupted, (B,)
    points: np.ndarray  # crossing of each pair, (B,)
    curve: np.ndarray  # mean recovery at the last token by layer, (n_layer + 1,)
    band: np.ndarray  # its 95 % interval over pairs, (2, n_layer + 1)
    crossing: lab.Estimate  # of the curve


def patch(subject, pairs, rng):
    """Recovery at the last token by layer, and where it crosses one half: a Patching."""
    change, whole = map(lab.array, last_recovery(subject.net, subject.E, pairs))  # (B, L), (B,)
    every = np.arange(change.shape[1])
    each = np.divide(change, whole[:, None], out=np.zeros_like(change), where=whole[:, None] != 0)
    curve, resampled = ratio(change, whole, rng)
    band, interval = (np.percentile(v, [2.5, 97.5], 0) for v in (resampled, crossing(resampled, every)))
    crossed = lab.Estimate(float(crossing(curve, every)), *map(float, interval))
    return Patching(pairs, whole, crossing(each, every), curve, band, crossed)


def run(laboratory):
    report = lab.Report(laboratory, "crystallization")
    subjects, subject = laboratory.subjects, laboratory.reflow
    n_layer, others = len(subject.net.blocks), [s.name for s in subjects[1:]]
    layers = layers_of(n_layer)

    moves, kl = inject(laboratory, report, layers)
    early, late = layers < n_layer / 3, (layers >= n_layer * 2 // 3) & (layers < n_layer)

    def third(name, which):
        return moves[name, "all", TESTED][:, which].mean(1)

    report.claim(
        lab.effect(
            f"another token's direction ({TESTED:g} residual norm, all positions) in the first third of the "
            "layers changes the outcome more than in the last third (change of logit difference)",
            third("reflow", early),
            {"last third": third("reflow", late), "random direction": third("random", early)}
            | {"step 0": third("step 0", early)},
            "windows",
            published=PUBLISHED,
        )
    )

    # The last token must be the same in both prompts. Every third pair, which keeps all templates, comes
    # after a long context as well and has other places patched.
    probe, rng = laboratory.probe("agreement"), laboratory.rng("pairs")
    where = subject.net.config.block_size, laboratory.device
    texts = [p for p in probe["pairs"] if encode(p["clean"])[-1] == encode(p["corrupted"])[-1]]
    batches = {"short": Pairs(texts, None, *where)}
    batches["long"] = Pairs(texts[::3], probe["contexts"], *where)
    found = {(s.name, length): patch(s, batches[length], rng) for s in subjects for length in batches}
    fewer, maps = Pairs(texts[::3], None, *where), {}
    places = fewer.places()
    for s in subjects:
        change = lab.array(place_recovery(s.net, s.E, fewer, list(places.values()), layers))
        whole = found[s.name, "short"].whole[::3]
        maps[s.name] = np.stack([ratio(c.T, whole, rng, resamples=1)[0] for c in change])  # (places, layers)
        for place, values in zip(places, maps[s.name], strict=True):
            for layer, value in zip(layers, values, strict=True):
                report.row("recovery", value, model=s.name, control="short", layer=layer, pos=place)
    for (name, length), f in found.items():
        report.row("crossing, last token", f.crossing.value, model=name, control=length)
        for layer, value in enumerate(f.curve):
            report.row("recovery, last token", value, model=name, control=length, layer=layer, pos="last")

    report.claim(
        lab.effect(
            f"the decision reaches the last token earlier than in {' and in '.join(others)} (layer of 50 % "
            "recovery)",
            found["reflow", "short"].points,
            {name: found[name, "short"].points for name in others},
            "pairs",
            lower=True,
        )
    )
    report.claim(
        lab.effect(
            "after a long context it reaches the last token later than after none (layer of 50 % recovery)",
            found["reflow", "long"].points,
            {"short": found["reflow", "short"].points[::3]},
            "pairs",
            published=PUBLISHED_LONG,
        )
    )

    right = {name: float((found[name, "short"].whole > 0).mean()) for name in ("reflow", *others)}
    report.numbers = {
        "crossing": {", ".join(key): asdict(f.crossing) for key, f in found.items()},
        "lens depth": {name: asdict(lab.estimate(lens_depth(v))) for name, v in kl.items()},
        "injection": {", ".join(map(str, key)): v.mean(0) for key, v in moves.items()},
        "layers": layers,
        "pairs told apart": right,
    }
    report.notes.append(
        "Pairs told apart the right way round: "
        + ", ".join(f"{name} {share:.0%}" for name, share in right.items())
        + ". A pair counts by the size of its logit difference, whatever the sign."
    )
    report.gallery = gallery(texts, found["reflow", "short"])
    curve_figure(report, moves, found, kl, layers)
    most = int(np.abs(found["reflow", "short"].whole).argmax())
    example = Pairs([texts[most]], None, *where)
    at = torch.eye(example.clean.size(1), dtype=torch.bool, device=laboratory.device)[:, None]  # (T, 1, T)
    grid = lab.array(place_recovery(subject.net, subject.E, example, at, layers))[:, :, 0]  # (T, layers)
    map_figure(report, maps, grid / found["reflow", "short"].whole[most], example, layers)
    return report


def gallery(texts, found):
    """Ten pairs, evenly spaced and not chosen, as text."""
    lines = ["minimal pairs, not chosen: logit difference, clean - corrupted; layer of 50 % recovery"]
    for i in range(0, len(texts), max(1, len(texts) // 10)):
        p = texts[i]
        lines.append(
            f"  {found.whole[i]:+6.2f}  {found.points[i]:4.1f}  {p['clean']} [{p['correct']}] | "
            f"{p['corrupted']} [{p['other']}]"
        )
    return "\n".join(lines)


def curve_figure(report, moves, found, kl, layers):
    plt = lab.pyplot()
    fig, (a, b, c) = plt.subplots(1, 3, figsize=(12.5, 4.4), layout="constrained")
    for (name, where, strength), values in moves.items():
        if strength == TESTED and where == "all":
            lab.banded(a, layers, values, name, label=name)
        elif strength == TESTED:
            lab.banded(a, range(values.shape[1]), values, name, "o:")
    a.plot([], [], "k-", label="all positions")
    a.plot([], [], "k:", label="last position")
    a.set(xlabel="layer of injection", ylabel="change of logit difference, nats")
    for (name, length), f in found.items():
        dash = "o-" if length == "short" else "o--"
        b.plot(
            f.curve, dash, ms=3, color=lab.COLOURS[name], label=f"{name}, {length}: {f.crossing.value:.1f}"
        )
        b.fill_between(range(len(f.curve)), *f.band, color=lab.COLOURS[name], alpha=0.12, lw=0)
    b.axhline(0.5, color="k", lw=0.8)
    b.set(xlabel="layer patched at the last token", ylabel="recovery of the logit difference")
    for name, values in kl.items():
        lab.banded(c, range(values.shape[1]), values, name, label=name)
    c.axhline(NAT, color="k", lw=0.8)
    c.set(xlabel="layer of the logit lens", ylabel="KL(final || lens), nats")
    c.set_yscale("symlog", linthresh=0.1)
    c.set_ylim(bottom=0)
    for ax, columns in ((a, 3), (b, 3), (c, 3)):
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(fontsize=7, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1)
    claim = report.claims[0]
    title = (
        f"An injection in the first third of the layers moves the outcome by {claim.measured.value:.2f} "
        f"nats, in the last by {claim.controls['last third'].value:.2f} ({claim.verdict}); half of the "
        "decision is at the last token at layer "
        + ", ".join(f"{f.crossing.value:.1f} ({name})" for (name, n), f in found.items() if n == "short")
    )
    report.figure(fig, "curves", title)


def map_figure(report, maps, grid, example, layers):
    plt = lab.pyplot()
    widths = [1] * len(maps) + [1.6]
    fig, axes = plt.subplots(
        1, len(widths), figsize=(3 + 2.6 * len(maps), 3.8), width_ratios=widths, layout="constrained"
    )
    tokens = [lab.show(t).replace(" ", "\u00b7") for t in example.clean[0]]
    images = [(f"{name}, mean of pairs", m, PLACES) for name, m in maps.items()]
    images.append(("reflow, the pair it tells apart most", grid, tokens))
    for ax, (name, values, labels) in zip(axes, images, strict=True):
        image = ax.imshow(values.T, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", origin="lower")
        ax.set_title(name)
        ax.set_yticks(range(len(layers)), layers)
        ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        ax.set_xlabel("tokens patched")
        ax.grid(False)
    axes[0].set_ylabel("layer patched")
    fig.colorbar(image, ax=axes[-1], label="recovery of the logit difference")
    middle = len(layers) // 2
    changed, _, last = maps["reflow"][:, middle]
    title = (
        f"Clean stream patched into the corrupted run: at layer {layers[middle]} of {layers[-1]} the changed "
        f"tokens still carry {changed:.0%} of the decision and the last token {last:.0%}"
    )
    report.figure(fig, "patching", title)


if __name__ == "__main__":
    lab.main(run)
