"""
What do edits of recipe rows do, how local are they, and do a few signals carry them?

    python experiments/gene_tampering.py --run=out/reflow-nano

Claims
  effect   exchanging the recipes of two tokens makes the model say one for the other: the log-odds of the new
           over the old token rise, where the old one is next, by more than under an edit of equal length in a
           random direction, and than under the same edit of the untrained model.
  effect   adding a sentiment direction to the rows of the commonest tokens tilts held-out positive words over
           negative ones: more than a random direction of equal length, and than in the untrained model.
  signals  the exchange cut down to the largest eighth of signals of each difference keeps more of that than
           cut down under random rotations, PCA and ICA.

Method. Three edits, each at the input side, the output side and both: *swap* 32 pairs of tokens, *zero* these
64 rows, *add* one row norm of the direction of emotion_surgery to the 32 commonest tokens. All rows of an
edit are changed at once. Each token has two held-out contexts that it ends, one to test the edit and one as
its paraphrase; efficacy is the share in which the new token is likelier there than the old one. Said: the
log-odds of the new over the old token, where the old one is next. Meant: how much nearer the prediction after
the old token comes to that after the new one, in KL. Unit of the swap: a pair of tokens; of the added
direction: a pair of held-out words, averaged over the test templates (see emotion_surgery). Specificity: KL
and loss on held-out text that holds no edited token, beside text that does. Fluency: continuations under the
unedited model.

An edit of recipes is an edit of rows of E, and a whole swap on both sides only renames two tokens: its size
says that contexts tell them apart, nothing about signals. The plain GPT is edited the same way.

Cost: 46 forward passes over 128 contexts of 8 tokens, 30 over 24 templates, 14 over held-out text.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import numpy as np
import torch

from configurator import UserError
from data.tokenizer import encoding
from experiments import lab
from experiments.emotion_surgery import direction, fluency, tilt, word_pairs

PUBLISHED = "edits of recipes flip sentiment everywhere, sentences stay grammatical (464M, OpenWebText)"
TOKENS, CONTEXTS, LENGTH = 64, 2, 8  # edited tokens; contexts of each; their tokens
COMMON = 32  # tokens that get the sentiment direction
DRAWS = 4  # random edits
NEW_TOKENS = 12  # of a continuation
SIDES = {"input": (True, False), "output": (False, True), "both": (True, True)}


def edit(subject, rows, change, side="both"):
    """The subject's model with `change` (n, d) added to rows (n,) of E at a side."""
    E = subject.E.index_add(0, rows, change)
    reads, writes = (E if on else subject.E for on in SIDES[side])
    return lab.with_matrix(subject.net, reads, writes)


def exchange(dictionary, old, new, k=None):
    """What turns rows `old` (n,) into `new`, (n, d); k: the largest entries of each code's change alone."""
    change = dictionary.codes[new] - dictionary.codes[old]  # (n, S)
    return (change if k is None else lab.largest(change, k)) @ dictionary.atoms


def noise_like(dictionary, change, generator):
    """A random direction in the span of the atoms for each row of change (n, d), of its length, (n, d)."""
    codes = torch.randn(len(change), len(dictionary.atoms), generator=generator).to(change)
    random = codes @ dictionary.atoms
    return random * (change.norm(dim=1) / random.norm(dim=1))[:, None]


def find_contexts(x, y, eligible, n_tokens, rng):
    """Tokens that end CONTEXTS contexts of LENGTH tokens in windows x, y (n, T), and the contexts.

    Returns ids (n,), even, and texts (n, CONTEXTS, LENGTH + 1) whose last token is the id.
    """
    both = torch.cat([x, y[:, -1:]], 1).unfold(1, LENGTH + 1, 1).flatten(0, 1)  # (N, LENGTH + 1)
    last = both[:, -1].cpu().numpy()
    counts = np.bincount(last, minlength=int(eligible.max()) + 1)
    enough = eligible[counts[eligible] >= CONTEXTS]
    chosen = rng.permutation(enough)[:n_tokens]
    chosen = chosen[: len(chosen) // 2 * 2]
    where = [rng.permutation(np.flatnonzero(last == t))[:CONTEXTS] for t in chosen]
    return chosen, both[np.array(where, int).reshape(len(chosen), -1)]


@torch.no_grad()
def said(net, texts, old, new):
    """Logit of `new` (n,) minus that of `old` where texts (n, C, T + 1) end in `old`, (n, C)."""
    h = torch.cat([net.encode(part)[:, -1] for part in texts[..., :-1].flatten(0, 1).split(128)])
    rows = net.vocab.matrix()  # edited models hold it ready
    odds = (h.unflatten(0, texts.shape[:2]) * (rows[new] - rows[old])[:, None]).sum(-1)
    return odds.double().cpu().numpy()


@torch.no_grad()
def follow(net, texts):
    """log_p of what follows the first context of each token, texts (n, C, T + 1) -> (n, n_tokens)."""
    return lab.log_p(net, net.encode(texts[:, 0])[:, -1])


@torch.no_grad()
def log_p_old(net, texts, old):
    """Log-probability of `old` (n,) where texts (n, C, T + 1) end in it, (n, C)."""
    p = lab.log_p(net, net.encode(texts[..., :-1].flatten(0, 1))[:, -1])  # (n * C, n_tokens)
    return p.gather(1, old.repeat_interleave(texts.shape[1])[:, None]).view(texts.shape[:2]).cpu().numpy()


def meant(aim, before, after):
    """KL(aim || before) - KL(aim || after) of log-probabilities (n, n_tokens), (n,).

    The aim is what follows in the unedited model when the context ends in the new token.
    """
    return (aim.exp() * (after - before)).sum(-1)


@torch.no_grad()
def damage(edited, x, y, base):
    """Loss added and KL(before || after) at each token of x, y (n, T), (n, T) each; base: log_p before."""
    now = lab.log_p(edited, edited.encode(x))
    gather = [p.gather(-1, y[..., None])[..., 0] for p in (base, now)]
    return gather[0] - gather[1], lab.kl(base, now)


@torch.no_grad()
def responses(net, prompts, words):
    """Logits of `words` (2, n) after each prompt, (P, 2, n)."""
    rows = net.vocab.matrix()[words.flatten()]
    return (lab.last_hidden(net, prompts) @ rows.T).unflatten(-1, words.shape).double().cpu().numpy()


def run(laboratory):
    report = lab.Report(laboratory, "gene_tampering")
    subject, device = laboratory.reflow, laboratory.device
    probe, encode = laboratory.probe("sentiment"), encoding().encode_ordinary
    prompts = [encode(t) for t in probe["templates"]["test"]]
    build, words = word_pairs(laboratory, "build"), word_pairs(laboratory, "held_out")
    known = laboratory.known_tokens()
    eligible = laboratory.known_words(letters=1)
    sentiment = torch.cat([build, words], 1).flatten().cpu().numpy()
    eligible = eligible[~np.isin(eligible, sentiment)]  # so that edits of words cannot tilt by renaming these
    tokens, contexts = find_contexts(
        *laboratory.heldout(2000, 4 * LENGTH), eligible, TOKENS, laboratory.rng("tokens")
    )
    if not len(tokens):
        raise UserError(f"no word of the training text is {CONTEXTS} times in the held-out text")
    old = torch.from_numpy(tokens).to(device)
    new = old.view(-1, 2).flip(1).flatten()
    pairs = np.arange(len(tokens)) // 2
    common = torch.from_numpy(known[~np.isin(known, sentiment)][:COMMON]).to(device)
    k = max(1, len(subject.dictionary.atoms) // 8)
    generator = torch.Generator().manual_seed(laboratory.seed)
    plain = {s.name: lab.with_matrix(s.net, s.E) for s in laboratory.subjects}

    # The swap: what is said where the old token is next.
    odds_before = {s.name: said(plain[s.name], contexts, old, new) for s in laboratory.subjects}

    def gain(s, change, side="both"):
        odds = said(edit(s, old, change, side), contexts, old, new)
        return (odds - odds_before[s.name]).mean(1)

    whole = exchange(subject.dictionary, old, new)
    gains = {s.name: gain(s, exchange(s.dictionary, old, new)) for s in laboratory.subjects}
    random = [gain(subject, noise_like(subject.dictionary, whole, generator)) for _ in range(DRAWS)]
    gains["random"] = np.mean(random, axis=0)
    cut = {"native": gain(subject, exchange(subject.dictionary, old, new, k))}
    for name, d in laboratory.rivals(subject).items():
        cut[name] = gain(subject, exchange(d, old, new, min(k, len(d.atoms))))
    spins = laboratory.rotations(subject.dictionary)
    turned = np.stack([gain(subject, exchange(d, old, new, k)) for d in spins])
    if laboratory.baseline:
        d = laboratory.baseline.dictionary
        cut["baseline"] = gain(laboratory.baseline, exchange(d, old, new, len(d.atoms) // 8))

    # The added direction: what the templates say.
    def added(d, few=None):
        v = direction(d, build, few)
        return (v / v.norm()) * (d.codes[common] @ d.atoms).norm(dim=1, keepdim=True)

    def lean(s, change, side="both"):
        """Half of the difference that the sign of `change` makes, (P, 2, n)."""
        up, down = (responses(edit(s, common, sign * change, side), prompts, words) for sign in (1, -1))
        return (up - down) / 2

    def by_word(y):
        return (y[:, 0] - y[:, 1]).mean(0)

    leans = {s.name: lean(s, added(s.dictionary)) for s in laboratory.subjects}
    leans["k signals"] = lean(subject, added(subject.dictionary, k))
    noise = noise_like(subject.dictionary, added(subject.dictionary), generator)
    # One direction for all rows, as in the edit that it is compared with.
    noise = [noise[i] / noise[i].norm() * subject.E[common].norm(dim=1, keepdim=True) for i in range(DRAWS)]
    leans["random"] = np.mean([lean(subject, change) for change in noise], axis=0)

    report.claim(
        lab.effect(
            "exchanging two tokens' recipes makes the model say one for the other (log-odds, nats)",
            gains["reflow"],
            {name: gains[name] for name in ("random", "step 0")},
            "pairs of tokens",
            pairs,
        )
    )
    report.claim(
        lab.effect(
            f"the sentiment direction in the rows of the {len(common)} commonest tokens tilts the templates "
            "(nats per row norm)",
            by_word(leans["reflow"]),
            {name: by_word(leans[name]) for name in ("random", "step 0")},
            "word pairs",
            published=PUBLISHED,
        )
    )
    report.claim(
        lab.signals(
            f"{k} of {len(subject.dictionary.atoms)} signals keep more of the exchange than as many of any "
            "other dictionary (log-odds, nats)",
            cut["native"],
            turned,
            {name: cut[name] for name in laboratory.rivals(subject)},
            "pairs of tokens",
            pairs,
        )
    )

    # Every edit at every side: reach, locality, cost.
    x, y = laboratory.heldout(12, 8)
    table = {}
    for s in (s for s in laboratory.subjects if s.name != "step 0"):
        net = plain[s.name]
        with torch.no_grad():
            base = lab.log_p(net, net.encode(x))
        renamed = torch.cat([contexts[:, :, :-1], new.expand(CONTEXTS, -1).T[..., None]], 2)
        aim, after_old = follow(net, renamed), follow(net, contexts)
        tilt_before = tilt(responses(net, prompts, words)).mean()
        edits = {
            "swap": (old, exchange(s.dictionary, old, new)),
            "zero": (old, -s.E[old]),
            "add": (common, added(s.dictionary)),
        }
        edits["random"] = (old, noise_like(s.dictionary, edits["swap"][1], generator))
        for name, (rows, change) in edits.items():
            touched = (torch.isin(x, rows) | torch.isin(y, rows)).any(1).cpu().numpy()
            for side in SIDES if s is subject and name != "random" else ("both",):
                edited = edit(s, rows, change, side)
                loss, kl = (v.cpu().numpy() for v in damage(edited, x, y, base))
                odds = said(edited, contexts, old, new)
                found = {
                    "efficacy": (odds[:, : CONTEXTS // 2] > 0).mean(),
                    "paraphrase": (odds[:, CONTEXTS // 2 :] > 0).mean(),
                    "said, nats": (odds - odds_before[s.name]).mean(),
                    "meant, nats": meant(aim, after_old, follow(edited, contexts)).mean().item(),
                    "tilt, nats": tilt(responses(edited, prompts, words)).mean() - tilt_before,
                }
                if name == "zero":  # two zero rows have equal logits: what counts is what they lose
                    drop = log_p_old(net, contexts, old) - log_p_old(edited, contexts, old)
                    del found["efficacy"], found["paraphrase"], found["said, nats"], found["meant, nats"]
                    found["log p lost"] = drop.mean()
                for part, mask in (("with", touched), ("without", ~touched)):
                    if mask.any():
                        found[f"loss added, text {part}"] = loss[mask].mean()
                        found[f"KL, text {part}"] = kl[mask].mean()
                table[s.name, name, side] = found
                for metric, value in found.items():
                    report.row(metric, value, model=s.name, control=f"{name}, {side}")
    spoken = {"unedited": plain["reflow"]}
    spoken |= {
        "swap": edit(subject, old, whole),
        "zero": edit(subject, old, -subject.E[old]),
        "add": edit(subject, common, added(subject.dictionary)),
        "add, negative": edit(subject, common, -added(subject.dictionary)),
    }
    some, fluent = prompts[::3], {}
    for name, net in spoken.items():
        sampler = torch.Generator(device).manual_seed(laboratory.seed)
        out = net.generate(some, NEW_TOKENS, generator=sampler)
        fluent[name] = fluency(plain["reflow"], some, out)
        report.gallery += f"\n{name}\n"
        for prompt, text in zip(some[:3], out, strict=False):
            report.gallery += "  " + repr(encoding().decode(prompt + text))[1:-1] + "\n"
        for metric, value in fluent[name].items():
            report.row(f"continuations, {metric}", value, control=name)
    report.gallery = "Continuations of the first templates, not selected\n" + report.gallery

    before = odds_before["reflow"]
    report.numbers = {
        "tokens": len(tokens),
        "efficacy_before": float((before > 0).mean()),
        "edits": {", ".join(key): {m: float(v) for m, v in found.items()} for key, found in table.items()},
        "said": {name: float(g.mean()) for name, g in gains.items()},
        "said_by_k": {name: float(g.mean()) for name, g in cut.items()} | {"rotated": float(turned.mean())},
        "share_kept_by_k": {
            name: float(g.mean() / gains["baseline" if name == "baseline" else "reflow"].mean())
            for name, g in (cut | {"rotated": turned}).items()
        },
        "tilt": {name: float(by_word(y).mean()) for name, y in leans.items()},
        "anti_steerable_share": {name: float((tilt(y) < 0).mean()) for name, y in leans.items()},
        "fluency": fluent,
    }
    report.notes.append(
        f"Before any edit the new token is likelier than the old in {(before > 0).mean():.0%} of contexts."
    )
    figures(report, table, gains, cut, turned, pairs)
    return report


def figures(report, table, gains, cut, turned, pairs):
    plt = lab.pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 4), width_ratios=[1.9, 1])
    keys = [key for key in table if key[0] == "reflow"] + [key for key in table if key[0] == "baseline"]
    columns = ["efficacy", "paraphrase", "log p lost", "said, nats", "meant, nats", "tilt, nats"]
    columns += [f"{m}, text {part}" for part in ("with", "without") for m in ("loss added", "KL")]
    left.axis("off")
    cells = [[f"{table[key][c]:.3f}" if c in table[key] else "" for c in columns] for key in keys]
    labels = [f"{edit}, {side}" if model == "reflow" else f"{edit}, plain GPT" for model, edit, side in keys]
    heads = [
        c.replace(", text", "").replace(", ", " ").replace(" ", "\n").replace("\np", " p") for c in columns
    ]
    grid = left.table(cells, rowLabels=labels, colLabels=heads, loc="center", cellLoc="right")
    grid.auto_set_font_size(False)
    grid.set_fontsize(7)
    for (row, _), cell in grid.get_celld().items():
        cell.set_linewidth(0.2)
        cell.set_height(0.17 if row == 0 else 0.055)
    bars = {"whole": gains["reflow"], "whole, plain GPT": gains.get("baseline")}
    bars |= {"random": gains["random"], "step 0": gains["step 0"]}
    few = f"{max(1, report.lab.reflow.dictionary.atoms.shape[0] // 8)} signals, "
    bars |= {few + name: values for name, values in cut.items()}
    bars = {name: values for name, values in bars.items() if values is not None}
    colours = {"whole": "native", "whole, plain GPT": "baseline"}
    for i, (name, values) in enumerate(bars.items()):
        m = lab.estimate(values, pairs)
        colour = lab.COLOURS[colours.get(name, name.removeprefix(few))]
        right.barh(i, m.value, color=colour, xerr=m.bars, capsize=2)
    right.plot(turned.mean(1), np.full(len(turned), len(bars)), ".", color=lab.COLOURS["rotated"])
    right.set_yticks(range(len(bars) + 1), [*bars, few + "rotated"])
    right.invert_yaxis()
    right.axvline(0, color="k", linewidth=0.8)
    right.set(xlabel="log-odds of the new over the old token, nats gained")
    kept = report.numbers["share_kept_by_k"]
    title = (
        f"A swap of recipes moves the log-odds by {gains['reflow'].mean():.3g} nats, a random edit by "
        f"{gains['random'].mean():.2g}; an eighth of the signals keeps {kept['native']:.0%} of it, rotated "
        f"{kept['rotated']:.0%}, PCA {kept['pca']:.0%}, ICA {kept['ica']:.0%}: {report.claims[2].verdict}"
    )
    report.figure(fig, "edits", title)


if __name__ == "__main__":
    lab.main(run)
