"""
After which layer does an intervention no longer change the outcome?

    python experiments/crystallization.py --run=out/reflow-nano
    python experiments/crystallization.py --run=out/reflow-nano --baseline=out/gpt2-new-nano

Method
    Injection: E[target], scaled to the norm of the residual stream, is added to the stream at one layer, at
    all positions or at the last one alone. The outcome is logit[target] - logit[top token before]. The
    control is a random direction. Thirds of the layers are rounded up.

    Interchange (activation patching; Zhang & Nanda, 2309.16042): of a minimal pair of prompts, the clean
    stream replaces the corrupted one at one layer and place. Recovery is (patched - corrupted) / (clean -
    corrupted) of the logit difference. Its mean is a ratio of means, each pair with the sign of its
    denominator, so that it is defined even where a model prefers the wrong word. Crossing: the layer from
    which the recovery at the last token stays above one half, interpolated.

    Lens depth: the first layer from which KL(final || logit lens) stays below 0.5 nats. Layer l is the
    stream that enters block l. Unit: a held-out window, or a minimal pair.

    No claim is of kind signals: an intervention on the stream touches no dictionary, so every rotation gives
    the same number. The plain GPT is another model, and where it differs the seed may be the reason.

Cost
    An intervention at the last token takes a forward pass of that token alone. All positions and places take
    about 30 forward passes of 1,000 tokens for each model at 4 layers, and 100 at 36 layers, of which 13 are
    swept: minutes on a GPU, an hour on two cores for 0.5B parameters.
"""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
import numpy as np
import torch

import hooks
from experiments.lab import Lab, Report, Scores, run_experiment
from experiments.lab.claims import to_numpy
from experiments.lab.patching import (
    PLACES,
    Pairs,
    logit_difference,
    mean_recovery,
    minimal_pairs,
    patch_places,
    recover,
)
from experiments.lab.plots import COLOURS, plot_band, plot_heat_map
from experiments.lab.stats import estimate

CLAIMS = {
    "early_injection": "another token's direction changes the outcome more in the first third of the layers "
    "than in the last, than a random direction does, and than in null models",
    "earlier": "half of the decision reaches the last token at an earlier layer than in the other models",
    "long_context": "half of the decision reaches the last token later after a long context than after none, "
    "and by more layers than in null models",
}
PUBLISHED = "injection effective in layers 0 to 12, inert beyond 18 (of 36; 515M, OpenWebText)"
PUBLISHED_LONG = "the boundary moved from about layer 18 to 28 (of 36; 515M, OpenWebText)"
N_WINDOWS, LENGTH = 64, 16
STRENGTH = 1.0  # norms of the residual stream
MAX_KL = 0.5  # nats, below which a prediction of the logit lens counts as final
MAX_LAYERS = 13  # swept with whole forward passes


def swept_layers(n_layer):
    """At most MAX_LAYERS layers from 0 to n_layer, evenly spaced."""
    return np.unique(np.linspace(0, n_layer, min(n_layer + 1, MAX_LAYERS)).round().astype(int))


@torch.no_grad()
def injection(subject, idx, direction, plus, minus, layers, where, strength=STRENGTH):
    """Change of logit[plus] - logit[minus] when direction (B, d) enters idx (B, T), (B, len(layers))."""
    net = subject.net
    streams = hooks.resid_streams(net, net.vocab.embed(idx))
    last_token = hooks.LastToken(net, idx)

    def final(layer):
        if where == "last":
            resid = hooks.add_direction(streams[layer][:, -1], direction, strength)  # (B, d)
            return last_token.streams(resid, layer)[-1]
        resid = hooks.add_direction(streams[layer], direction[:, None], strength)  # (B, T, d)
        return hooks.resid_streams(net, resid, layer)[-1][:, -1]

    before = logit_difference(subject, streams[-1][:, -1], plus, minus)
    after = [logit_difference(subject, final(layer), plus, minus) for layer in layers]
    return torch.stack(after, dim=1) - before[:, None]


def choose_targets(lab, tops):
    """A common token for each window, ids (n,), that is no model's top token there; tops (n, models)."""
    draws = lab.rng("targets").choice(lab.words.known_tokens()[:500], (len(tops), 8))
    taken = (draws[:, :, None] == tops[:, None]).any(2)  # (n, 8)
    return torch.from_numpy(draws[np.arange(len(draws)), taken.argmin(1)]).to(lab.device)


def lens_depth(kl):
    """First layer from which kl (n, L), which is 0 at the last one, stays below MAX_KL, (n,)."""
    above = kl >= MAX_KL
    return np.where(above.any(1), kl.shape[1] - above[:, ::-1].argmax(1), 0)


@torch.no_grad()
def inject(lab, report, layers):
    """({(model or "random", "all" or "last"): changes (n, layers)}, {model: KL(final || lens) (n, L)})."""
    x, _ = lab.heldout(N_WINDOWS, min(LENGTH, lab.model.net.config.block_size))
    tops, kl = {}, {}
    models = lab.models
    for name, subject in models.items():
        streams = hooks.resid_streams(subject.net, subject.net.vocab.embed(x))
        top, divergence = hooks.lens_by_layer(subject.net, torch.stack(streams, dim=1)[:, :, -1])
        tops[name] = top[:, -1]
        kl[name] = to_numpy(divergence)
    target = choose_targets(lab, torch.stack(list(tops.values()), 1).cpu().numpy())
    noise = torch.randn(len(x), lab.model.E.size(1), generator=lab.generator()).to(lab.device)
    directions = [(name, subject, subject.E[target]) for name, subject in models.items()]
    changes = {}
    for name, subject, direction in [*directions, ("random", lab.model, noise)]:
        for where, swept in (("all", layers), ("last", range(kl[subject.name].shape[1]))):
            change = to_numpy(injection(subject, x, direction, target, tops[subject.name], swept, where))
            changes[name, where] = change
            at = {"model": subject.name, "pos": where, "strength": STRENGTH}
            at["dictionary"] = "random" if name == "random" else ""
            for layer, values in zip(swept, change.T, strict=True):
                report.row("change of logit difference", values.mean(), layer=layer, **at)
    return changes, kl


def interchange(lab, report, layers, texts):
    """({(model, "short" or "long"): Recovery}, {model: mean recovery by place and layer})."""
    rng = lab.rng("pairs")
    shape = lab.words.tokenizer, lab.model.net.config.block_size, lab.device
    fewer = Pairs(texts[::3], *shape)  # every third keeps all templates
    batches = {"short": Pairs(texts, *shape)}
    batches["long"] = Pairs(texts[::3], *shape, lab.probe("agreement")["contexts"])
    found, maps = {}, {}
    for name, subject in lab.models.items():
        for length, pairs in batches.items():
            recovery = recover(subject, pairs, rng)
            found[name, length] = recovery
            at = {"model": name, "control": length}
            report.row("crossing, last token", recovery.crossing.value, **at)
            for layer, value in enumerate(recovery.curve):
                report.row("recovery, last token", value, layer=layer, pos="last", **at)
    for subject in lab.subjects:
        whole = found[subject.name, "short"].whole[::3]
        changes = to_numpy(patch_places(subject, fewer, fewer.places(), layers))  # (places, layers, B)
        maps[subject.name] = np.stack([mean_recovery(change.T, whole) for change in changes])
        for place, values in zip(PLACES, maps[subject.name], strict=True):
            for layer, value in zip(layers, values, strict=True):
                report.row("recovery", value, model=subject.name, control="short", layer=layer, pos=place)
    return found, maps


def run(lab: Lab, config=None) -> Report:
    report = Report(lab, "crystallization", CLAIMS)
    n_layer = len(lab.model.net.blocks)
    layers = swept_layers(n_layer)
    early = layers < n_layer / 3
    late = (layers >= n_layer * 2 // 3) & (layers < n_layer)

    changes, kl = inject(lab, report, layers)
    native = changes["reflow", "all"]
    thirds = Scores({"native": native[:, early].mean(1), "last third": native[:, late].mean(1)})
    thirds["random direction"] = changes["random", "all"][:, early].mean(1)
    for name in lab.nulls:
        thirds[name] = changes[name, "all"][:, early].mean(1)
    report.effect("early_injection", thirds, "windows", published=PUBLISHED)

    # The last token must be the same in both prompts of a pair.
    texts = minimal_pairs(lab.probe("agreement")["pairs"], lab.words.tokenizer)
    found, maps = interchange(lab, report, layers, texts)
    short = found["reflow", "short"]
    points = {name: recovery.points for (name, length), recovery in found.items() if length == "short"}
    points = Scores({"native": points.pop("reflow"), **points})
    report.effect("earlier", points, "pairs", lower=True)
    later = {name: found[name, "long"].points - found[name, "short"].points[::3] for name in lab.models}
    contexts = Scores({"native": later["reflow"], "no difference": np.zeros(len(later["reflow"]))})
    for name in lab.nulls:
        contexts[name] = later[name]
    report.effect("long_context", contexts, "pairs", published=PUBLISHED_LONG)

    right = {name: np.mean(found[name, "short"].whole > 0) for name in lab.models}
    report.numbers |= {
        "crossing": {", ".join(key): asdict(recovery.crossing) for key, recovery in found.items()},
        "lens depth": {name: asdict(estimate(lens_depth(values))) for name, values in kl.items()},
        "injection": {", ".join(key): values.mean(0) for key, values in changes.items()},
        "layers": layers,
        "pairs told apart": right,
    }
    shares = ", ".join(f"{name} {share:.0%}" for name, share in right.items())
    report.notes.append(f"Pairs told apart the right way round: {shares}.")
    report.gallery = gallery(texts, short)
    draw_curves(report, changes, found, {s.name: kl[s.name] for s in lab.subjects}, layers)
    most = int(np.abs(short.whole).argmax())
    draw_maps(report, lab, maps, texts[most], short.whole[most], layers)
    return report


def gallery(texts, recovery):
    """Ten pairs, evenly spaced and not chosen, as text."""
    lines = ["minimal pairs, not chosen: logit difference, clean - corrupted; layer of 50 % recovery"]
    for i in range(0, len(texts), max(1, len(texts) // 10)):
        words = "{clean} [{correct}] | {corrupted} [{other}]".format(**texts[i])
        lines.append(f"  {recovery.whole[i]:+6.2f}  {recovery.points[i]:4.1f}  {words}")
    return "\n".join(lines)


def draw_curves(report, changes, found, kl, layers):
    """Injection, recovery at the last token, and the logit lens, layer by layer."""
    claim = report["early_injection"]
    crossed = ", ".join(f"{found[name, 'short'].crossing.value:.1f} ({name})" for name in kl)
    title = (
        f"An injection in the first third of the layers moves the outcome by {claim.measured.value:.2f} "
        f"nats, in the last by {claim.controls['last third'].value:.2f} ({claim.verdict}); half of the "
        f"decision is at the last token at layer {crossed}"
    )
    with report.figure("curves", title, 1, 3, size=(12.5, 4.4)) as axes:
        left, middle, right = axes
        for name in (*kl, "random"):
            plot_band(left, layers, changes[name, "all"], name, label=name)
            plot_band(left, range(changes[name, "last"].shape[1]), changes[name, "last"], name, "o:")
        left.plot([], [], "k:", label="last position")
        for name, length, dash in ((n, *how) for n in kl for how in (("short", "o-"), ("long", "o--"))):
            r = found[name, length]
            middle.plot(r.curve, dash, ms=3, color=COLOURS[name], label=f"{name}, {length}")
            middle.fill_between(range(len(r.curve)), *r.band, color=COLOURS[name], alpha=0.12, lw=0)
        for name, values in kl.items():
            plot_band(right, range(values.shape[1]), values, name, label=name)
        middle.axhline(0.5, color="k", lw=0.8)
        right.axhline(MAX_KL, color="k", lw=0.8)
        left.set(xlabel="layer of the injection", ylabel="change of the logit difference, nats")
        middle.set(xlabel="layer patched at the last token", ylabel="recovery of the logit difference")
        right.set_yscale("symlog", linthresh=0.1)
        right.set(xlabel="layer of the logit lens", ylabel="KL(final || lens), nats", ylim=(0, None))
        for ax in axes:
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1)


def draw_maps(report, lab, maps, text, whole, layers):
    """Recovery by place and layer: the mean of pairs in each model, and every token of one pair."""
    pair = Pairs([text], lab.words.tokenizer, lab.model.net.config.block_size, lab.device)
    each_token = torch.eye(pair.clean.size(1), dtype=torch.bool, device=lab.device)[:, None]  # (T, 1, T)
    change = to_numpy(patch_places(lab.model, pair, each_token, layers))[:, :, 0]  # (T, layers)
    tokens = [lab.words.text(token).replace(" ", "\u00b7") for token in pair.clean[0]]
    panels = [(f"{name}, mean of pairs", values, PLACES) for name, values in maps.items()]
    panels.append(("reflow, the pair it tells apart most", change / whole, tokens))
    middle = len(layers) // 2
    changed, _, last = maps["reflow"][:, middle]
    title = (
        f"Clean stream patched into the corrupted run: at layer {layers[middle]} of {layers[-1]} the changed "
        f"tokens still carry {changed:.0%} of the decision and the last token {last:.0%}"
    )
    widths = [1] * len(maps) + [1.6]
    size = (3 + 2.6 * len(maps), 3.8)
    with report.figure("patching", title, 1, len(panels), size, width_ratios=widths) as axes:
        for ax, (name, values, places) in zip(axes, panels, strict=True):
            label = "recovery of the logit difference" if ax is axes[-1] else None
            plot_heat_map(ax, values.T, places, layers, label, limit=1)
            ax.set(title=name, xlabel="tokens patched", ylabel="layer patched")
            ax.invert_yaxis()  # layer 0 at the bottom


if __name__ == "__main__":
    run_experiment(run)
