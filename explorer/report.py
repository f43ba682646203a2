"""
Parts of the page that experiments/report.py makes: what held in words, claims to sort, signals to search.

All as HTML text. Figures are SVG, 360 units wide, which is the width of a phone.
"""

from html import escape
from pathlib import Path

from tqdm import tqdm

from experiments.lab.claims import PLURAL
from experiments.lab.plots import COLOURS

HERE = Path(__file__).resolve().parent
STYLE = (HERE / "report.css").read_text(encoding="utf-8")
SCRIPT = (HERE / "report.js").read_text(encoding="utf-8")
GLOSSARY = HERE.parent / "experiments" / "README.md"
WIDTH, LABELS, VALUES, ROW = 360, 118, 52, 22  # of a figure: all, names, numbers, a line


def number(x):
    """A number for people: three figures, no powers of ten unless there are many."""
    return "&ndash;" if x is None else f"{x:.3g}"


def badge(verdict):
    return f'<span class="v {verdict.split()[0]}">{escape(verdict)}</span>'


def anchor(claim):
    return f"claim-{claim.experiment}-{claim.key}"


def link(claim):
    return f'<a href="#{anchor(claim)}">{escape(claim.claim)}</a>'


# ----------------------------------------------------------------------------------------------------
# What held, in words


def in_words(claims):
    """What holds, what does not and what surprised, of a list of Claims."""
    decided = [claim for claim in claims if claim.kind != "gauge"]
    by_kind = {kind: [c for c in decided if c.kind == kind] for kind in ("effect", "signals")}
    parts = []
    for kind, meaning in (
        ("effect", "The model does something that no control does"),
        ("signals", "The learned signals are better than random rotations and every rival"),
    ):
        held = [c for c in by_kind[kind] if c.verdict == "supported"]
        if by_kind[kind]:
            parts.append(f"<p><b>{meaning}</b> in {len(held)} of {len(by_kind[kind])} claims. ")
            parts.append("It holds that:</p>" + bullets(held) if held else "</p>")
    open_ = [c for c in decided if c.verdict == "inconclusive"]
    failed = [c for c in decided if c.verdict == "not supported"]
    if failed:
        parts.append(
            f"<details><summary>Not supported: {len(failed)} claims</summary>{bullets(failed)}</details>"
        )
    if open_:
        parts.append(f"<details><summary>Inconclusive: {len(open_)}</summary>{bullets(open_)}</details>")
    worse = sum(is_worse(claim) for claim in by_kind["signals"])
    if worse:
        parts.append(f"<p>In {worse} of the signals claims a rival is clearly better.</p>")
    if surprising := surprises(decided):
        lines = "".join(f"<li>{link(claim)}: {escape(why)}</li>" for claim, why in surprising)
        parts.append(f"<p><b>Against expectation</b>:</p><ul>{lines}</ul>")
    return "".join(parts)


def is_worse(claim):
    """Whether a control of a Claim is clearly better: the interval of the gain lies below zero."""
    return claim.gain is not None and claim.gain.high is not None and claim.gain.high < 0


def surprises(claims):
    """[(Claim, why)]: effects that a control shows more of, and published ones that are not found."""
    found = []
    for claim in claims:
        if claim.kind == "effect" and is_worse(claim):
            found.append((claim, f"{claim.weakest} does better, by {-claim.gain.value:.3g}"))
        elif claim.published and claim.verdict == "not supported":
            found.append((claim, f"not found here; published: {claim.published}"))
    return found


def bullets(claims):
    return "<ul>" + "".join(f"<li>{link(claim)}</li>" for claim in claims) + "</ul>"


# ----------------------------------------------------------------------------------------------------
# Claims


def claim_list(claims):
    """All Claims, to be sorted and filtered, each with its figure."""
    if not claims:
        return ""
    tools = (
        '<form class=tools><label>show <select name=verdict><option value="">all verdicts'
        "<option>supported<option>not supported<option>inconclusive<option>description</select></label>"
        '<label>kind <select name=kind><option value="">all<option>effect<option>signals<option>gauge'
        "</select></label><label>sort by <select name=sort><option value=order>experiment"
        "<option value=verdict>verdict<option value=kind>kind</select></label>"
        "<label>find <input name=find type=search></label> <output></output></form>"
    )
    return tools + '<div class="items">' + "".join(map(one_claim, claims)) + "</div>"


def one_claim(claim):
    """A Claim as an item that opens."""
    published = f"<p>published: {escape(claim.published)}</p>" if claim.published else ""
    decided = (
        f" Decided by {escape(claim.decided_by)}, the weakest of its measurements."
        if claim.decided_by
        else ""
    )
    return (
        f'<details class=item id="{anchor(claim)}" data-verdict="{claim.verdict}" data-kind="{claim.kind}">'
        f"<summary>{badge(claim.verdict)} {escape(claim.claim)} <small>{number(claim.measured.value)}, "
        f"{claim.kind}</small></summary>{forest(claim)}"
        f"<p>{escape(claim.reason)}; n = {claim.n} {escape(claim.unit)} of one model.{decided}</p>{published}"
        f'<p><a href="#{claim.experiment}">{claim.experiment}: method</a> &middot; '
        f'<a href="#glossary">glossary</a></p></details>'
    )


def forest(claim):
    """A Claim's measured value with its interval above its random changes and controls, as SVG."""
    rows = [("measured", claim.measured, COLOURS["native"])]
    if claim.gauges is not None:
        rows.append((f"{claim.n_gauges} {PLURAL[claim.gauge]}", claim.gauges, COLOURS["gauges"]))
    rows += [(name, e, COLOURS.get(name, "#777777")) for name, e in claim.controls.items()]
    rows = [row for row in rows if row[1].value is not None]
    ends = [x for _, e, _ in rows for x in (e.value, e.low, e.high) if x is not None]
    if not ends:
        return ""
    low, high = min(ends), max(ends)
    room = WIDTH - LABELS - VALUES - 12

    def x(value):
        return LABELS + room * (value - low) / ((high - low) or 1)

    parts = []
    if low < 0 < high:
        parts.append(f'<line class=zero x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{ROW * len(rows)}"/>')
    for i, (name, e, colour) in enumerate(rows):
        y = ROW * i + ROW / 2
        shown = name if len(name) <= 18 else name[:17] + "…"
        parts.append(f'<text x="0" y="{y + 4}">{escape(shown)}<title>{escape(name)}</title></text>')
        if e.low is not None and e.high is not None:
            width = 8 if colour == COLOURS["gauges"] else 2
            ends = f'x1="{x(e.low):.1f}" x2="{x(e.high):.1f}" y1="{y}" y2="{y}"'
            parts.append(f'<line {ends} stroke="{colour}" stroke-width="{width}"/>')
        parts.append(f'<circle cx="{x(e.value):.1f}" cy="{y}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH}" y="{y + 4}" text-anchor="end">{number(e.value)}</text>')
    height = ROW * len(rows)
    parts.append(f'<text class=dim x="{LABELS}" y="{height + 12}">{number(low)}</text>')
    parts.append(
        f'<text class=dim x="{LABELS + room}" y="{height + 12}" text-anchor="end">{number(high)}</text>'
    )
    return svg(height + 16, parts, f"{claim.claim}: values and 95 % intervals")


def svg(height, parts, label):
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


# ----------------------------------------------------------------------------------------------------
# Training, signals, words


def training(curves):
    """The curves {quantity in words: [[step, value]]} of a run as figures."""
    return "".join(f"<figure>{curve(points, words)}</figure>" for words, points in curves.items())


def curve(points, label):
    """[[step, value]] as SVG."""
    values = [value for _, value in points]
    low, high, last = min(values), max(values), max(points[-1][0], 1)
    places = [(WIDTH * s / last, 24 + 90 * (high - v) / ((high - low) or 1)) for s, v in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return svg(
        134,
        [
            f'<text x="0" y="12">{escape(label)}</text>',
            f'<polyline points="{line}" fill="none" stroke="{COLOURS["native"]}" stroke-width="1.5"/>',
            f'<text class=dim x="{WIDTH}" y="12" text-anchor="end">highest {number(high)}</text>',
            f'<text class=dim x="0" y="130">lowest {number(low)}</text>',
            f'<text class=dim x="{WIDTH}" y="130" text-anchor="end">step {last:,}</text>',
        ],
        f"{label}, from {low:.3g} to {high:.3g}",
    )


def signal_list(cards):
    """A card of every signal of a run's Cards, with search."""
    n, unit = cards.model.dictionary.n_signals, cards.model.unit
    search = "<label>find a signal by its words <input name=find type=search></label>"
    items = [signal(cards, s, unit) for s in tqdm(range(n), desc="signals", disable=None)]
    return f'<form class=tools>{search} <output></output></form><div class="items">{"".join(items)}</div>'


def signal(cards, s, unit):
    """The card of a signal beside that of a rotated one, as an item that opens."""
    native, rotated = cards.card("native", s), cards.card("rotated", cards.matched(s))
    high, low = (" ".join(text.strip() for text, _ in native[end][:5]) for end in ("high", "low"))
    return (
        f"<details class=item><summary><b>{s}</b> + {escape(high)} <small>&minus; {escape(low)}</small>"
        f"</summary><div class=pair>{half(native, f'{unit} {s}')}"
        f"{half(rotated, 'random rotation: the control')}</div></details>"
    )


def half(card, title):
    """One of the two cards."""
    ends = [" ".join(escape(text.strip()) for text, _ in card[end]) for end in ("high", "low")]
    classes = ", ".join(f"{escape(name)} z {z:.1f}, q {q:.2g}" for name, z, q in card["classes"])
    parts = [
        f"<div><h4>{title}</h4><p>promotes {ends[0]}<br>suppresses {ends[1]}</p><p><small>{card['class']}, "
        f"correlation with log frequency {card['Spearman with log frequency']:.2f}, rank {card['rank'] + 1} "
        f"by usage{'; word classes: ' + classes if classes else ''}</small></p>"
    ]
    if "histogram" in card:
        parts.append(histogram(*card["histogram"]))
        for end in ("strong", "weak"):
            lines = [
                f"<p class=context>{escape(before[-90:])}<mark>{escape(token)}</mark>{escape(after[:60])}</p>"
                for before, token, after, _ in card[end][:2]
            ]
            parts.append(f"<small>{end}est at</small>{''.join(lines)}")
    return "".join(parts) + "</div>"


def histogram(low, high, counts):
    """Counts in equal bins from low to high, as SVG."""
    step, most = WIDTH / len(counts), max(counts)
    bars = [
        f'<rect class=bar x="{i * step:.1f}" y="{40 - 40 * n / most:.1f}" width="{step - 1:.1f}" '
        f'height="{40 * n / most:.1f}"/>'
        for i, n in enumerate(counts)
    ]
    bars.append(f'<text class=dim x="0" y="54">{number(low)}</text>')
    bars.append(f'<text class=dim x="{WIDTH}" y="54" text-anchor="end">{number(high)}</text>')
    return svg(58, bars, f"activations on held-out text from {low:.2g} to {high:.2g}")


def glossary():
    """The glossary of experiments/README.md as HTML."""
    _, _, text = GLOSSARY.read_text(encoding="utf-8").partition("## Glossary")
    rows = [line.strip("|").split("|", 1) for line in text.splitlines() if line.startswith("|")][2:]
    return (
        "<dl>"
        + "".join(f"<dt>{escape(t.strip())}</dt><dd>{escape(d.strip())}</dd>" for t, d in rows)
        + "</dl>"
    )
