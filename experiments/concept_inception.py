"""
How hard must one push a token's own direction before the model says that token?

    python experiments/concept_inception.py --run=out/reflow-nano

Claims
  effect   a token's row of E forces the token at a smaller dose than another token's row or a random
           direction does, and than its own row does in the untrained model.
  signals  cut down to its largest eighth of signals, the recipe forces its token at a smaller dose than cut
           down under random rotations, PCA and ICA.

Method. For pairs of a target and a held-out context: alpha* is the smallest alpha at which adding alpha
residual norms of the target's unit direction, at the last position of the stream entering layer l, makes the
target the likeliest next token. A grid of alpha from 1/4 to 64, then bisection between the first success and
the failure below it. Success is not monotone in alpha: pairs that lose their target again are counted, and
those whose alpha* lies between two points of the grid and is lost by the second are missed. The claims are
about the middle layer, fixed beforehand, and the mean of log2 alpha*, where pairs that are never forced count
as 64 (the survival curves treat them as censored). Unit: a target of any frequency, with its context.

Entering the final norm there is a closed form. The norm only scales, so that the target t wins over a token v
exactly if (h + alpha |h| u) * w . (E_t - E_v) > 0, which is linear in alpha: every v gives a bound, and alpha
may be too small as well as too large. In E alone, geometry does much: along u = E_t the target gains |E_t|,
and nearly every other token less. Hence the control of an untrained model.

Collateral: KL of the next token after another context, at alpha*. Coherence: KL of the token after the target
when it was forced, against the same text unforced.

Cost: 21 forward passes of one token with cached keys in 40 contexts, for each of 35 sets of directions.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import numpy as np
import torch
from scipy.stats import spearmanr

from data.tokenizer import encoding
from experiments import lab
from model import KVCache

PUBLISHED = "critical alpha about 18.4, scale not stated (464M, OpenWebText)"
# Residual norms; fine where a target may win and lose again as its direction replaces the stream.
GRID = (0.25, *(2.0 ** (i / 4) for i in range(-4, 9)), 8.0, 64.0)
HALVINGS = 5  # of the cell found: alpha* to 1 % up to 4, to 7 % beyond 8
TARGETS, LENGTH = 40, 16  # each target in a context of its own, in tokens


class Contexts:
    """Contexts idx (n, T) held ready: everything but the last token of each is in a cache."""

    def __init__(self, net, idx):
        self.net, self.last, n = net, idx[:, -1:], len(idx)
        self.lengths = [idx.size(1) - 1] * n
        self.cache = KVCache(net.config, n, idx.size(1), idx.device, net.norm.weight.dtype)
        with torch.no_grad():
            net.encode(idx[:, :-1], self.cache)

    @torch.no_grad()
    def hidden(self, directions, alpha, layer):
        """Normalised final stream with alpha (n,) residual norms of unit directions (n, d) added, (n, d)."""

        def edit(x):  # (n, 1, d)
            return x + alpha.view(-1, 1, 1) * x.norm(dim=-1, keepdim=True) * directions[:, None]

        self.cache.lengths = self.lengths
        with lab.edited(self.net, {layer: edit}):
            return self.net.encode(self.last, self.cache)[:, -1]


def unit(v):
    """v (n, d) scaled to length 1."""
    return v / v.norm(dim=-1, keepdim=True)


def logits_of(dictionary, h):
    """h (n, d), normalised -> logits (n, n_tokens), through the signals."""
    return (h @ dictionary.atoms.T) @ dictionary.codes.T


def critical(subject, contexts, targets, directions, layer):
    """alpha* (n,), inf where no alpha of the grid forces; and whether forced once is forced on, (n,)."""

    def forced(alpha, rows):
        h = contexts.hidden(directions, alpha, layer)[rows]
        return logits_of(subject.dictionary, h).argmax(-1) == targets[rows]

    everyone = torch.ones_like(targets, dtype=torch.bool)
    hits = torch.stack([forced(torch.full_like(directions[:, 0], a), everyone) for a in GRID])  # (G, n)
    ever = hits.any(0)
    first = hits.int().argmax(0)  # (n,)
    after = torch.arange(len(GRID), device=hits.device)[:, None] >= first
    steady = (hits | ~after).all(0) & ever
    grid = torch.tensor((GRID[0] / 2, *GRID)).to(directions)
    low, high = grid[first], grid[first + 1]
    for _ in range(HALVINGS):
        middle = (low * high).sqrt()
        hit = torch.zeros_like(ever)
        hit[ever] = forced(middle, ever)
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
    return torch.where(ever, high, torch.inf).double().cpu().numpy(), steady.cpu().numpy()


def closed_form(E, weight, h, directions, targets):
    """Bounds (n,), (n,) of the alpha at which `targets` win entering the final norm; an empty range: never.

    E (V, d), weight (d,) of the norm, h (n, d) the stream, directions (n, d) of unit length.
    """
    E, h, directions = E.double(), h.double() * weight.double(), directions.double() * weight.double()
    norm = (h / weight.double()).norm(dim=-1, keepdim=True)
    a, b = h @ E.T, norm * (directions @ E.T)  # (n, V)
    a = a.gather(1, targets[:, None]) - a  # what the target leads by
    b = b.gather(1, targets[:, None]) - b  # and gains with alpha
    crossing = -a / b
    low = torch.where(b > 0, crossing, -torch.inf).amax(1).clamp(min=0)
    high = torch.where(b < 0, crossing, torch.inf).amin(1)
    tie = (b == 0) & (a <= 0)
    tie.scatter_(1, targets[:, None], False)
    return low, torch.where(tie.any(1), -torch.inf, high)


def last_layer(subject, h, directions, targets):
    """alpha* entering the final norm by the closed form, (n,), inf where never."""
    low, high = closed_form(subject.E, subject.net.norm.weight.detach(), h, directions, targets)
    return torch.where((low < high) & (low <= GRID[-1]), low, torch.inf).cpu().numpy()


def kaplan_meier(alpha):
    """Share of pairs not yet forced after each distinct finite alpha (inf: censored at the end): times, S."""
    times, deaths = np.unique(alpha[np.isfinite(alpha)], return_counts=True)
    at_risk = (alpha[:, None] >= times).sum(0)
    return times, np.cumprod(1 - deaths / at_risk)


def octaves(alpha):
    """log2 of alpha, between the ends of the grid."""
    return np.log2(np.clip(alpha, GRID[0] / 2, GRID[-1]))


def by_layer(alpha, statistic):
    """{model: {layer: statistic}} of {(model, layer): alpha*}."""
    found = {name: {} for name, _ in alpha}
    for (name, layer), values in alpha.items():
        found[name][str(layer)] = float(statistic(values))
    return found


def kl(base, other):
    """KL(base || other) of logits (n, V), (n,)."""
    return lab.kl(base.double().log_softmax(-1), other.double().log_softmax(-1)).cpu().numpy()


def pick_targets(laboratory):
    """Whole words seen in training, as many from each quarter of the ranks of frequency, (TARGETS,)."""
    parts = np.array_split(laboratory.known_words(letters=3), 4)
    rng = laboratory.rng("targets")
    return np.concatenate([rng.permutation(part)[: TARGETS // 4] for part in parts])


def run(laboratory):
    report = lab.Report(laboratory, "concept_inception")
    subject = laboratory.reflow
    n_layer, codes = subject.net.config.n_layer, subject.dictionary.codes
    middle, k = n_layer // 2, max(1, codes.shape[1] // 8)
    tokens = pick_targets(laboratory)
    idx, _ = laboratory.heldout(len(tokens), LENGTH)  # (n, T)
    tokens = tokens[: len(idx)]
    targets, other = (torch.from_numpy(t).to(laboratory.device) for t in (tokens, np.roll(tokens, 1)))
    rng = laboratory.rng("random")
    noise = torch.from_numpy(rng.standard_normal((len(idx), codes.shape[1]))).to(codes)
    contexts = {s.name: Contexts(s.net, idx) for s in laboratory.subjects}

    alpha, steady = {}, {}
    for s in laboratory.subjects:
        own = unit(s.E[targets])
        for layer in range(n_layer + 1) if s.name != "step 0" else (middle,):
            key = s.name, layer
            alpha[key], steady[key] = critical(s, contexts[s.name], targets, own, layer)

    def at_middle(v):
        return critical(subject, contexts["reflow"], targets, unit(v), middle)[0]

    def restricted(d):
        return lab.largest(d.codes[targets], min(k, len(d.atoms))) @ d.atoms

    native = alpha["reflow", middle]
    chance = {
        "another token": at_middle(subject.E[other]),
        "random": at_middle(noise @ subject.dictionary.atoms),
        "step 0": alpha["step 0", middle],
    }
    cut = {"native": at_middle(restricted(subject.dictionary))}
    cut |= {name: at_middle(restricted(d)) for name, d in laboratory.rivals(subject).items()}
    turned = np.stack([at_middle(restricted(d)) for d in laboratory.rotations(subject.dictionary)])
    report.claim(
        lab.effect(
            f"a token's direction, entering layer {middle} of {n_layer}, forces it at a smaller dose than"
            " others do (log2 residual norms)",
            octaves(native),
            {name: octaves(a) for name, a in chance.items()},
            "targets",
            lower=True,
            published=PUBLISHED,
        )
    )
    report.claim(
        lab.signals(
            f"the {k} largest of {codes.shape[1]} signals of its recipe force a token at a smaller dose than"
            " those of any other dictionary",
            octaves(cut["native"]),
            octaves(turned),
            {name: octaves(cut[name]) for name in laboratory.rivals(subject)},
            "targets",
            lower=True,
        )
    )

    # Other dictionaries and models where the answer is exact: entering the final norm.
    def entering_norm(s, v):
        streams = lab.run_blocks(s.net, s.net.vocab.embed(idx).detach())
        return last_layer(s, streams[-1][:, -1], unit(v), targets)

    exact = {s.name: entering_norm(s, s.E[targets]) for s in laboratory.subjects}
    exact["another token"] = entering_norm(subject, subject.E[other])
    both = np.isfinite(exact["reflow"]) & np.isfinite(alpha["reflow", n_layer])
    both &= exact["reflow"] > GRID[0]
    error = np.abs(alpha["reflow", n_layer] / np.where(both, exact["reflow"], 1) - 1)[both]

    h = contexts["reflow"].hidden(unit(subject.E[targets]), torch.zeros(len(idx)).to(codes), middle)
    before = logits_of(subject.dictionary, h)  # (n, n_tokens)
    rank = (before > before.gather(1, targets[:, None])).sum(1).cpu().numpy() + 1
    count = laboratory.counts[tokens]
    side, after_kl = collateral(subject, idx, targets, native, middle)

    for (name, layer), values in alpha.items():
        report.row("share forced", np.isfinite(values).mean(), model=name, layer=layer)
        report.row("median alpha*", np.median(values), model=name, layer=layer)
        report.row("share never lost again", steady[name, layer].mean(), model=name, layer=layer)
        for i, value in enumerate(values):
            report.row("alpha*", value, model=name, layer=layer, prompt=f"{i}: {lab.show(tokens[i])}")
    groups = {"native, k signals": cut["native"], "pca, k": cut["pca"], "ica, k": cut["ica"], **chance}
    for name, values in groups.items():
        report.row("share forced", np.isfinite(values).mean(), dictionary=name, layer=middle)
        report.row("mean log2 alpha*", octaves(values).mean(), dictionary=name, layer=middle)
    for name, values in exact.items():
        report.row("median alpha*, closed form", np.median(values), dictionary=name, layer=n_layer)
    for metric, values in (("KL elsewhere at alpha*", side), ("KL of the token after", after_kl)):
        report.row(metric, np.median(values) if len(values) else np.nan, layer=middle)

    forced = np.isfinite(native)
    report.numbers = {
        "pairs": len(idx),
        "layer": middle,
        "median_alpha": by_layer(alpha, np.median),
        "share_forced": by_layer(alpha, lambda a: np.isfinite(a).mean()),
        "share_forced_controls": {name: float(np.isfinite(a).mean()) for name, a in chance.items()},
        "share_forced_by_k_signals": {name: float(np.isfinite(a).mean()) for name, a in cut.items()}
        | {"rotated": float(np.isfinite(turned).mean())},
        "share_not_monotone": float((forced & ~steady["reflow", middle]).mean()),
        "closed_form_largest_relative_error": float(error.max()) if len(error) else None,
        "closed_form_share_forced": {name: float(np.isfinite(a).mean()) for name, a in exact.items()},
        "closed_form_median_alpha": {name: float(np.median(a)) for name, a in exact.items()},
        "spearman_alpha_rank": float(spearmanr(octaves(native), rank).statistic),
        "spearman_alpha_count": float(spearmanr(octaves(native), count).statistic),
        "median_kl_elsewhere": float(np.median(side)) if len(side) else None,
        "median_kl_token_after": float(np.median(after_kl)) if len(after_kl) else None,
    }
    report.gallery = f"The first pairs, not selected: alpha* entering layer {middle}\n\n"
    for i in range(12):
        text = repr(encoding().decode(idx[i].tolist()))[1:-1][-48:]
        found = f"{native[i]:6.2f}" if forced[i] else " never"
        report.gallery += f"{found}  {text:>48} |{lab.show(tokens[i])}  (rank {rank[i]} before)\n"
    report.notes.append(
        "A dose of 1 is as long as the stream itself; censored pairs count as 64. Entering the final norm "
        f"the grid finds {np.isfinite(alpha['reflow', n_layer]).mean():.1%} of pairs forced, the closed form "
        f"{np.isfinite(exact['reflow']).mean():.1%}."
    )
    figures(report, alpha, chance, cut, turned, count, rank, middle, n_layer)
    return report


@torch.no_grad()
def collateral(subject, idx, targets, alpha, layer):
    """At each finite alpha*: KL in another pair's context, and of the token after the target, (m,) each."""
    forced = np.isfinite(alpha)
    if not forced.any():
        return np.empty(0), np.empty(0)
    kept = torch.from_numpy(forced).to(idx.device)
    dose = torch.from_numpy(alpha[forced]).to(subject.E)
    u, none = unit(subject.E[targets[kept]]), torch.zeros_like(dose)
    elsewhere = Contexts(subject.net, idx.roll(1, 0)[kept])
    side = kl(
        logits_of(subject.dictionary, elsewhere.hidden(u, none, layer)),
        logits_of(subject.dictionary, elsewhere.hidden(u, dose, layer)),
    )
    said = torch.cat([idx, targets[:, None]], 1)[kept]  # (m, T + 1)

    def edit(x):
        x = x.clone()
        x[:, -2] += dose[:, None] * x[:, -2].norm(dim=-1, keepdim=True) * u
        return x

    plain = logits_of(subject.dictionary, subject.net.encode(said)[:, -1])
    with lab.edited(subject.net, {layer: edit}):
        return side, kl(plain, logits_of(subject.dictionary, subject.net.encode(said)[:, -1]))


def figures(report, alpha, chance, cut, turned, count, rank, middle, n_layer):
    plt = lab.pyplot()
    fig, (left, centre, right) = plt.subplots(1, 3, figsize=(12, 3.8))

    def survival(axes, values, **style):
        times, share = kaplan_meier(values)
        axes.step([GRID[0] / 2, *times, GRID[-1]], [1, *share, share[-1] if len(share) else 1], **style)

    def base(axes, title):
        axes.set_xscale("log", base=2)
        axes.set_title(title, loc="left")
        axes.set(xlabel="alpha, residual norms", ylabel="share of pairs not yet forced", ylim=(-0.03, 1.03))
        axes.legend(loc="lower right" if axes is left else "lower left", fontsize=7)

    native = alpha["reflow", middle]
    survival(left, native, where="post", color=lab.COLOURS["native"], label="own direction")
    survival(left, cut["native"], where="post", color=lab.COLOURS["native"], ls=":", label="own, k signals")
    for name in ("pca", "ica"):
        survival(left, cut[name], where="post", color=lab.COLOURS[name], ls=":", label=f"{name}, k")
    for i, values in enumerate(turned):
        colour, label = lab.COLOURS["rotated"], "rotations, k" if not i else None
        survival(left, values, where="post", color=colour, lw=0.5, ls=":", label=label)
    for name, colour in (("another token", "other"), ("random", "rotated"), ("step 0", "step 0")):
        survival(left, chance[name], where="post", color=lab.COLOURS[colour], label=name)
    base(left, f"directions, entering layer {middle}")
    for name, values, line in (("count", count, "-"), ("rank before", rank, "--")):
        low = values <= np.median(values)
        for part, label, colour in ((low, "low", "native"), (~low, "high", "ica")):
            style = {"color": lab.COLOURS[colour], "ls": line, "label": f"{label} {name}"}
            survival(centre, native[part], where="post", **style)
    base(centre, "by the target's training count and prior rank")
    for name in ("reflow", "baseline", "step 0"):
        layers = [layer for who, layer in alpha if who == name]
        means = [lab.estimate(octaves(alpha[name, layer])) for layer in layers]
        error = [[2**m.value - 2**m.low for m in means], [2**m.high - 2**m.value for m in means]]
        style = {"color": lab.COLOURS[name], "capsize": 2, "marker": ".", "label": name}
        if layers:
            right.errorbar(layers, [2**m.value for m in means], error, **style)
    right.set_yscale("log", base=2)
    right.set(
        xlabel="layer entered (last: the final norm)", ylabel="geometric mean of alpha*, residual norms"
    )
    right.set_xticks(range(n_layer + 1))
    right.legend()
    share = {name: np.isfinite(values).mean() for name, values in chance.items()}
    dose = {name: np.median(v[np.isfinite(v)]) for name, v in (("own", native), ("step 0", chance["step 0"]))}
    title = (
        f"{np.isfinite(native).mean():.0%} of pairs are forced by their own direction (median of these: "
        f"{dose['own']:.2g} residual norms), {share['another token']:.0%} by another token's, "
        f"{share['random']:.0%} by a random one; at step 0 {share['step 0']:.0%} "
        f"({dose['step 0']:.2g}); k signals beat rotations: {report.claims[1].verdict}"
    )
    report.figure(fig, "critical_alpha", title)


if __name__ == "__main__":
    lab.main(run)
