"""Write the README's three blocks, trained model, results and speed, from paper/results."""

import textwrap

import bench
from configurator import UserError
from paper.reading import (
    PAPER,
    SUBJECT,
    claims,
    gauges,
    has_plain,
    judged,
    load,
    of_kind,
    result,
    supported,
)

README = PAPER.parent / "README.md"
SHORT = ("peak: ", "train: factored", "train: dense", "train: llama")
SHOWN_SPEED = {  # results of bench.py in the README: the rows of each
    "bench-bf16": SHORT
    + ("train: llama, as shipped", "train: gpt-2 block, as shipped", "train: gpt-2 block fp32, as shipped")
    + ("bandwidth: ", "sample: cached 1", "sample: cached 16", "sample: llama 1"),
    "bench": SHORT,
}


def number(e):
    """An Estimate as text, three digits."""
    if e.value is None:
        return "–"
    return f"{e.value:.3g} [{e.low:.3g}, {e.high:.3g}]"


def n_claims(found):
    """How many claims, as text."""
    return f"{len(found)} claim{'' if len(found) == 1 else 's'}"


def paragraph(*sentences, indent=""):
    """Sentences as a paragraph of lines that fit; `indent` is that of all lines but the first."""
    options = {"subsequent_indent": indent, "break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(" ".join(sentences), 155, **options)


# ----------------------------------------------------------------------------------------------------
# Results. Every sentence counts what is there; one that would not hold is left out.


def finding(run):
    """What the experiments on a run found, as Markdown."""
    found = claims(run).values()
    effects = of_kind("effect", found)
    signals = of_kind("signals", found)
    special = supported(signals)
    n_described = len(found) - len(judged(found))
    beats = [claim for claim in signals if claim.beats_gauges]
    beaten = [claim for claim in beats if claim.verdict != "supported"]
    lost = [claim for claim in signals if claim.verdict == "not supported"]
    rivals = (
        "PCA, ICA, the embedding itself or a plain GPT"
        if has_plain(run)
        else "PCA, ICA or the embedding itself"
    )
    main = (
        f"The learned signals are better than every alternative in {len(special)} of {len(signals)}"
        " comparisons (signals claims)."
    )
    if lost:
        main += (
            f" In {len(lost)}, random rotations of the signals, {rivals} do as well within the uncertainty,"
            " or better."
        )
    nulls = result(run, "ablate_signal").numbers.get("nulls", {})
    sentences = [
        f"**{main}**",
        f"Of {len(effects)} effect claims (the model does something at all), {len(supported(effects))} are"
        " supported: they beat every chance control, among them three null models: one untrained, one moved"
        " by noise, and one trained on tokens in random order.",
        *(f"The last of these is {text}." for name, text in nulls.items() if name == "shuffled text"),
        f"The learned signals beat their random rotations in {len(beats)} of the {len(signals)} signals"
        " claims.",
    ]
    if beaten:
        sentences.append(f"In {len(beaten)} of these {len(beats)}, they do not clearly beat {rivals}.")
    if n_described:
        sentences.append(
            f"{n_described} further comparisons of cosines with other spaces cannot see axes:"
            " they are descriptions (kind gauge), without a verdict."
        )
    parts = [paragraph(*sentences)]
    if special:
        listed = [paragraph(f"- `{claim.experiment}`: {claim.claim}", indent="  ") for claim in special]
        parts += ["Supported signals claims:", "\n".join(listed)]
    return "\n\n".join(parts)


def about_model(run):
    """Which model the results are of, and its loss beside that of the others, as Markdown."""
    runs = load("runs")
    names = [name for name in SUBJECT["runs"].values() if name in runs]
    losses = ", ".join(f"`{name}` {runs[name]['whole_val_loss']:.3f}" for name in names)
    return paragraph(
        f"The model is `{run}`: {runs[run]['parameters']:,} parameters,"
        f" {runs[run]['tokens'] / 1e6:.2f}M training tokens.",
        f"Validation losses in nats per token, one seed each: {losses}.",
    )


def about_plain(run):
    """How the coordinates of the plain GPT's embedding do in the signals claims, as Markdown."""
    plain = SUBJECT["coordinates"]
    own = of_kind("signals", claims(run).values())
    other = of_kind("signals", claims(plain).values())
    n_own = sum(bool(claim.beats_gauges) for claim in own)
    n_other = sum(bool(claim.beats_gauges) for claim in other)
    is_rival = [claim for claim in other if "E" in claim.controls or "baseline" in claim.controls]
    sentences = [
        f"`{plain}` is a control without factors: a plain GPT with the coordinates of its embedding"
        " as signals.",
        f"Its coordinates beat their random rotations in {n_other} of {n_claims(other)}.",
    ]
    if n_other >= n_own:
        sentences.append("A basis can therefore be privileged without a factored vocabulary.")
    sentences += [
        f"They beat every control in {len(supported(other))} of {n_claims(other)}.",
        f"In {n_claims(is_rival)} this model is one of the controls, so it cannot win.",
    ]
    return paragraph(*sentences)


def table(names):
    """The claims with a published counterpart, measured on some runs, as Markdown."""
    lines = [
        f"| claim | published | {' | '.join(f'`{name}`' for name in names)} |",
        "|---" * (2 + len(names)) + "|",
    ]
    found = {name: claims(name) for name in names}
    for key, claim in found[names[0]].items():
        if claim.published:
            measured = [found[name][key] for name in names]
            cells = [f"`{claim.experiment}`: {claim.claim}", claim.published]
            cells += [f"{number(c.measured)}, {c.verdict}: {c.reason}" for c in measured]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def trained_block():
    """The README's results on a trained model, beside those of the small one, as Markdown."""
    runs, small = load("runs"), SUBJECT["runs"]["factored"]
    (_, own), *others = gauges().items()
    found = {name: claims(name).values() for name in (own, small)}

    def share(kind, name):
        of = of_kind(kind, found[name])
        return f"{len(supported(of))} of {len(of)}"

    turned = [
        f"With {words} as signals the same model supports"
        f" {len(supported(of_kind('signals', claims(name).values())))}."
        for words, name in others
    ]
    if any("rotation" in words for words, _ in others):
        turned.append("What a random rotation supports is chance: it stands for no axes.")
    nulls = result(own, "ablate_signal").numbers["nulls"]
    return "\n\n".join(
        [
            paragraph(
                f"**On a fully trained model, {share('effect', own)} effect claims are supported; on"
                f" `{small}`, {share('effect', small)}. Of the signals claims, its own coordinates as signals"
                f" support {share('signals', own)}, the learned signals of `{small}`"
                f" {share('signals', small)}.**",
                *turned,
            ),
            paragraph(
                f"`{own}` is SmolLM2-135M-Instruct, {runs[own]['parameters']:,} parameters,"
                f" {runs[own]['bits_per_byte']:.3f} bits per byte on windows of the embedded corpus"
                f" (`{small}`: {runs[small]['bits_per_byte']:.3f} on its own validation split)."
                f" Its null models: {'; '.join(f'{name}, {text}' for name, text in nulls.items())}.",
            ),
            "Claims with a published counterpart; the published models have 464M or 515M parameters:",
            table([own, small]),
            "![SmolLM2 by layer: injections, patching; dose and response; the signals of one prediction]"
            "(paper/figures/trained.svg)",
        ]
    )


def results_block():
    """The README's results: the finding in words, then claims with a published counterpart, one figure."""
    run = SUBJECT["runs"]["factored"]
    parts = [
        finding(run),
        about_model(run),
        about_plain(run),
        paragraph(
            "The figure shows all signals claims on one scale. The band is the range of random rotations,"
            " the diamond is the learned signals."
        ),
        "![Each signals claim: learned signals against random rotations and rival dictionaries]"
        "(paper/figures/rivals.svg)",
    ]
    return "\n\n".join(parts)


# ----------------------------------------------------------------------------------------------------
# Speed, and the file


def speed_block():
    """The README's speed figures: some of the rows that bench.py printed, as Markdown."""
    lines = []
    for name, rows in SHOWN_SPEED.items():
        found = load(name)
        c = found["config"]
        model = c["config"].removeprefix("config/").removesuffix(".py")
        machine = found.get("machine")
        lines += [
            bench.describe(machine) if machine else "float32, no bf16 instructions",
            f"{model}, {c['batch_size']} x {c['length']} tokens; medians (lowest to highest) of"
            f" {c['rounds']} interleaved rounds",
        ]
        for part in ("train", "sample"):
            shown = {row: numbers for row, numbers in found[part].items() if row in rows}
            if shown:
                lines.append(part)
                lines += [f"  {line}" for line in bench.show(part, shown)]
        lines.append("")
    return "\n".join(["```", *lines[:-1], "```"])


def readme():
    """The README with its generated blocks as they should be. Raises UserError if it has no marks."""
    text = README.read_text(encoding="utf-8")
    blocks = {"trained": trained_block(), "results": results_block(), "speed": speed_block()}
    for name, block in blocks.items():
        begin = f"<!-- {name}: written by paper/build.py -->"
        end = f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, mark, after = rest.partition(end)
        if not mark:
            raise UserError(f"{README} has no marks '{begin}' and '{end}' around its {name}")
        text = f"{before}{begin}\n{block}\n{end}{after}"
    return text
