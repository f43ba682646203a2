"""
What dose of a token's own direction makes the model predict that token?

    python experiments/concept_inception.py --run=out/reflow-nano

Method
    Each target token t has a held-out context of its own. alpha* is the smallest dose alpha at which
    resid + alpha |resid| u makes t the top token. The stream is changed at the last position alone, entering
    layer l; u is the unit vector along the target's row E_t. The search takes a grid of doses from 1/4 to 64
    norms of the stream, then bisects between the first dose that forces t and the dose before it. A larger
    dose may lose t again; rows.csv has the share of pairs forced and never lost again.

    Both claims are about log2 alpha* at the middle layer, n_layer // 2. A pair that no dose forces counts as
    64. Few signals: u is the target's recipe, cut down to its largest eighth of signals, times the atoms.
    What counts is the distance of log2 alpha* from that along the whole recipe: sooner is as wrong as later.
    Rivals are PCA and ICA; of the plain GPT the coordinates of its E, and ICA of it.

    Controls of the own direction: another token's, a random one in the span of the atoms, and the null
    models, since geometry alone forces tokens: along E_t, logit t grows faster than nearly all others.

    Entering the final norm there is a closed form. The norm only scales, so t wins over a token v exactly if
    (resid + alpha |resid| u) * w . (E_t - E_v) > 0, where w is the norm's weight. This is linear in alpha, so
    every v gives a lower or an upper bound. Unit: a target of any frequency, with its context.

Cost
    21 forward passes of one token in 40 contexts, for each of 27 + 2 (n_layer + 1) sets of directions.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
import numpy as np
import torch

import hooks
from dictionary import top_k
from experiments.lab import Lab, Report, Scores, run_experiment
from experiments.lab.claims import to_numpy
from experiments.lab.plots import COLOURS, plot_band

CLAIMS = {
    "forces": "a token's own direction, entering the middle layer, forces it at a smaller dose than other "
    "directions do, and than in null models (log2 residual norms)",
    "few_signals": "the largest eighth of the signals of its recipe forces a token at a dose nearer to that "
    "of the whole recipe than in other dictionaries (distance in log2 residual norms)",
}
PUBLISHED = "critical alpha about 18.4, scale not stated (464M, OpenWebText)"
# Residual norms; fine where a target may win and lose again as its direction replaces the stream.
GRID = (0.25, *(2.0 ** (i / 4) for i in range(-4, 9)), 8.0, 64.0)
HALVINGS = 5  # of the cell found: alpha* to 1 % up to 4, to 7 % beyond 8
N_TARGETS, LENGTH = 40, 16  # contexts, tokens


class Contexts:
    """A model at the last token of contexts idx (n, T); the tokens before it are run once."""

    def __init__(self, net, idx):
        self.net = net
        self.last_token = hooks.LastToken(net, idx)
        self.resid = self.last_token.streams(self.last_token.embed())  # (n_layer + 1, n, d)

    def final(self, direction, alpha, layer):
        """Normalised final states (n, d) after alpha (n,) norms of direction (n, d) enter `layer`."""
        resid = hooks.add_direction(self.resid[layer], direction, alpha[:, None])
        return self.net.norm(self.last_token.streams(resid, layer)[-1])


@torch.no_grad()
def critical_dose(contexts, targets, direction, layer):
    """alpha* (n,), inf where no dose of GRID forces; whether every larger dose forces too, (n,)."""

    def forces(alpha):
        h = contexts.final(direction, alpha, layer)
        return hooks.unembed(contexts.net, h).argmax(-1) == targets

    hits = torch.stack([forces(torch.full_like(direction[:, 0], alpha)) for alpha in GRID])  # (G, n)
    ever = hits.any(0)
    first = hits.int().argmax(0)  # (n,)
    after_first = torch.arange(len(GRID), device=hits.device)[:, None] >= first
    steady = ever & (hits | ~after_first).all(0)
    doses = torch.tensor([GRID[0] / 2, *GRID]).to(direction)
    low = doses[first]
    high = doses[first + 1]
    for _ in range(HALVINGS):
        middle = (low * high).sqrt()
        hit = forces(middle)
        low = torch.where(hit, low, middle)
        high = torch.where(hit, middle, high)
    return to_numpy(torch.where(ever, high, torch.inf)), to_numpy(steady)


def closed_form(E, weight, resid, direction, targets):
    """Bounds (n,), (n,) of the doses that force `targets` (n,) entering the final norm; an empty range: none.

    E (V, d), weight (d,) of the norm, resid (n, d) the stream, direction (n, d).
    """
    E, weight, resid = E.double(), weight.double(), resid.double()
    norm = resid.norm(dim=-1, keepdim=True)
    logits = (resid * weight) @ E.T  # (n, V), up to the scale of the norm
    slopes = norm * (hooks.unit(direction.double()) * weight) @ E.T  # (n, V), of the logits in the dose
    lead = logits.gather(1, targets[:, None]) - logits
    gain = slopes.gather(1, targets[:, None]) - slopes
    crossing = -lead / gain
    low = torch.where(gain > 0, crossing, -torch.inf).amax(1).clamp(min=0)
    high = torch.where(gain < 0, crossing, torch.inf).amin(1)
    never = (gain == 0) & (lead <= 0)  # tokens that lead at every dose
    never.scatter_(1, targets[:, None], False)
    return low, torch.where(never.any(1), -torch.inf, high)


def exact_dose(subject, resid, direction, targets):
    """alpha* entering the final norm by the closed form, (n,), inf where no dose up to the largest forces."""
    low, high = closed_form(subject.E, subject.net.norm.weight.detach(), resid, direction, targets)
    return to_numpy(torch.where((low < high) & (low <= GRID[-1]), low, torch.inf))


def share_forced(alpha):
    """Share of pairs that some dose forces."""
    return np.isfinite(alpha).mean()


def by_layer(alpha, statistic):
    """{model: {layer: statistic}} of {(model, layer): alpha*}."""
    found = {name: {} for name, _ in alpha}
    for (name, layer), values in alpha.items():
        found[name][layer] = statistic(values)
    return found


def octaves(alpha):
    """log2 of alpha (n,), between the ends of the grid."""
    return np.log2(np.clip(alpha, GRID[0] / 2, GRID[-1]))


def survival(alpha):
    """The distinct finite alpha (m,), and the share of all pairs not yet forced at each, (m,)."""
    doses, counts = np.unique(alpha[np.isfinite(alpha)], return_counts=True)
    return doses, 1 - counts.cumsum() / len(alpha)


def choose_targets(lab):
    """Whole words seen in training, else any tokens, as many from each quarter of frequency, (N_TARGETS,)."""
    words = lab.words.known_words(letters=3)
    quarters = np.array_split(words if len(words) >= N_TARGETS else lab.words.known_tokens(), 4)
    rng = lab.rng("targets")
    return np.concatenate([rng.permutation(part)[: N_TARGETS // 4] for part in quarters])


@torch.no_grad()
def run(lab: Lab, config=None) -> Report:
    report = Report(lab, "concept_inception", CLAIMS)
    model, d = lab.model, lab.model.dictionary
    n_layer = len(model.net.blocks)
    middle = n_layer // 2  # the layer of both claims
    tokens = choose_targets(lab)
    idx, _ = lab.heldout(len(tokens), LENGTH)  # (n, T), a context for each
    tokens = tokens[: len(idx)]
    targets = torch.from_numpy(tokens).to(lab.device)
    contexts = {name: Contexts(subject.net, idx) for name, subject in lab.models.items()}

    # The target's own direction in every model, entering every layer.
    alpha, exact = {}, {}
    for name, subject in lab.models.items():
        direction = subject.E[targets]
        for layer in [middle] if name in lab.nulls else range(n_layer + 1):
            values, steady = critical_dose(contexts[name], targets, direction, layer)
            alpha[name, layer] = values
            at = {"model": name, "layer": layer}
            report.row("share never lost again", steady.mean(), **at)
            for i, value in enumerate(values):
                report.row("alpha*", value, prompt=f"{i}: {lab.words.text(tokens[i])}", **at)
        exact[name] = exact_dose(subject, contexts[name].resid[-1], direction, targets)

    # Other directions, and recipes of few signals, entering the middle layer.
    def measure(direction, name="reflow"):
        return critical_dose(contexts[name], targets, direction, middle)[0]

    def kept(subject, other):
        """alpha* along the largest entries of each recipe, and how far it is from that along E_t, (n,)."""
        cut = top_k(other.codes, max(d.eighth, subject.dictionary.eighth)) @ other.atoms
        few = measure(cut, subject.name)
        return {"alpha": few, "distance": np.abs(octaves(few) - octaves(alpha[subject.name, middle]))}

    noise = torch.from_numpy(lab.rng("random").standard_normal((len(idx), d.n_signals))).to(d.codes)
    own = Scores({"native": alpha["reflow", middle]} | {name: alpha[name, middle] for name in lab.nulls})
    own["another token"] = measure(model.E[targets.roll(1)])
    own["random"] = measure(noise @ d.atoms)
    few = lab.compare(
        partial(kept, model),
        tokens=tokens,
        plain=lab.baseline and (lambda other: kept(lab.baseline, other.part(tokens))),
    )
    report.effect("forces", own.map(octaves), "targets", lower=True, published=PUBLISHED)
    report.signals("few_signals", few["distance"], "targets", lower=True)
    report.scores("share_forced_controls", own.map(np.isfinite))
    report.scores("share_forced_by_k_signals", few["alpha"].map(np.isfinite))

    # Entering the final norm: the search against the closed form.
    last = alpha["reflow", n_layer]
    both = np.isfinite(exact["reflow"]) & np.isfinite(last) & (exact["reflow"] > GRID[0])
    error = np.abs(last[both] / exact["reflow"][both] - 1)
    report.numbers |= {
        "pairs": len(idx),
        "layer": middle,
        "median_alpha": by_layer(alpha, np.median),
        "share_forced": by_layer(alpha, share_forced),
        "closed_form_largest_relative_error": error.max(initial=0),
        "closed_form_share_forced": {name: share_forced(values) for name, values in exact.items()},
        "closed_form_median_alpha": {name: np.median(values) for name, values in exact.items()},
    }
    report.notes.append(
        "At a dose of 1 the added vector is as long as the stream. Entering the final norm, the search finds "
        f"{share_forced(last):.1%} of the pairs forced, the closed form {share_forced(exact['reflow']):.1%}."
    )
    before = hooks.logit_lens(model.net, contexts["reflow"].resid[-1])  # (n, n_tokens)
    rank = to_numpy((before > before.gather(1, targets[:, None])).sum(1)) + 1
    report.gallery = gallery(lab, idx, tokens, own.native, rank, middle)
    draw(report, alpha, own, few["alpha"], lab.words.counts[tokens], rank, middle)
    return report


def gallery(lab, idx, tokens, alpha, rank, layer):
    """The first twelve pairs, not chosen, as text."""
    lines = [f"The first pairs, not chosen: alpha* entering layer {layer} (inf: never)"]
    for i in range(min(12, len(tokens))):
        text = "".join(lab.words.text(token) for token in idx[i])[-48:]
        lines.append(f"{alpha[i]:6.2f}  {text:>48} |{lab.words.text(tokens[i])}  (rank {rank[i]:.0f} before)")
    return "\n".join(lines)


def plot_survival(ax, alpha, name, dash="-", label=None, width=1.5):
    """Draw the share of pairs not yet forced over the dose."""
    doses, share = survival(alpha)
    x = [GRID[0] / 2, *doses, GRID[-1]]
    y = [1, *share, 1 - share_forced(alpha)]
    ax.step(x, y, dash, where="post", color=COLOURS[name], lw=width, label=label)


def draw(report, alpha, own, few, count, rank, layer):
    """Shares not yet forced, by direction and by the target's frequency and rank; mean doses by layer."""
    share = {name: f"{share_forced(values):.0%}" for name, values in own.items()}
    title = (
        f"{share['native']} of pairs are forced by their own direction, {share['another token']} by another "
        f"token's, {share['random']} by a random one, {share['step 0']} by their own before training"
    )
    with report.figure("critical_alpha", title, 1, 3, size=(12, 3.8)) as (left, centre, right):
        for i, values in enumerate(few.gauges):
            plot_survival(left, values, "gauges", ":", None if i else "rotations, few signals", width=0.5)
        for name, values in few.items():
            plot_survival(left, values, name, ":", f"{name}, few signals")
        for name, values in own.items():
            plot_survival(left, values, "other" if name == "another token" else name, label=name)
        for name, values, dash in (("count", count, "-"), ("rank before", rank, "--")):
            is_low = values <= np.median(values)
            plot_survival(centre, own.native[is_low], "native", dash, f"low {name}")
            plot_survival(centre, own.native[~is_low], "ica", dash, f"high {name}")
        for ax in (left, centre):
            ax.set_xscale("log", base=2)
            ax.set(xlabel=f"alpha into layer {layer}, residual norms", ylabel="share of pairs not yet forced")
        for name, doses in by_layer(alpha, octaves).items():
            plot_band(right, list(doses), np.stack(list(doses.values()), axis=1), name, label=name)
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set(xlabel="layer entered (last: the final norm)", ylabel="mean log2 alpha*, residual norms")
        for ax in (left, centre, right):
            ax.legend(fontsize=7)


if __name__ == "__main__":
    run_experiment(run)
