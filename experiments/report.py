"""
One self-contained HTML page of a run: what holds in words, claims, figures, a card for each signal.

    python experiments/report.py                  the newest run with signals
    python experiments/report.py --run=out/reflow-1

The page is <run>/experiments/report.html. Its record holds results that belong together: they were made from
the run's present weights, with one baseline and one seed, without options of the script. Other results are
left out, with the reason. Results of an earlier version of the code are marked. Results with options of the
script are looks and come last.
"""

import base64
import sys
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path
from shlex import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads
from tqdm import tqdm

import checkpoint
import configurator
import files
import metrics
from configurator import UserError
from experiments.lab.lab import Lab, LabConfig, check_writable, results_folder, run_identity
from experiments.lab.report import LOOKS, code_sha256, method
from experiments.lab.results import read_result
from experiments.run_all import NAMES
from explorer import report as parts_of
from explorer.cards import Cards
from files import file_sha256


@dataclass
class ReportConfig:
    run: str | None = None  # a run's folder or one of its step_... folders; None: the newest with signals
    results: str | None = None  # the folder that was given to the experiments; None: the run's own


# ----------------------------------------------------------------------------------------------------
# Which results belong to the run


def read_results(folder):
    """({name: Result} of the experiments in a folder, {name: why a result cannot be read})."""
    results = {}
    unreadable = {}
    for name in NAMES:
        path = folder / name / "result.json"
        if not path.exists():
            continue
        try:
            results[name] = read_result(path)
        except UserError as error:
            unreadable[name] = str(error)
    return results, unreadable


def conditions(result):
    """(seed, weights of the baseline): equal for all results of a record."""
    baseline = {name: sha for name, sha in result.made_from.items() if name != result.run.name}
    return result.seed, tuple(sorted(baseline.items()))


def weights_fault(result, ckpt):
    """Why a result was not made from the weights of a Checkpoint, as they are now; None if it was."""
    if result.run != run_identity(ckpt):
        return f"made from another run or configuration: {result.run.name}, step {result.run.step}"
    if result.made_from.get(ckpt.name) != file_sha256(ckpt.weights):
        return f"made from other weights of {ckpt.name}"
    return None


def sort_results(results, ckpt):
    """({name: Result} of the record, {name: why another is left out}).

    Where seeds or baselines differ, those of the most results are the record's.
    """
    left_out = {}
    for name, result in results.items():
        fault = weights_fault(result, ckpt)
        if fault is None and result.options:
            fault = f"made with {spell(result.options)}: a look, not the record"
        if fault:
            left_out[name] = fault
    kept = {name: result for name, result in results.items() if name not in left_out}
    if kept:
        usual = Counter(map(conditions, kept.values())).most_common(1)[0][0]
        usual_seed, _ = usual
        for name, result in kept.items():
            if result.seed != usual_seed:
                left_out[name] = f"made with seed {result.seed}; the others have seed {usual_seed}"
            elif conditions(result) != usual:
                baseline = ", ".join(key for key in result.made_from if key != result.run.name) or "none"
                left_out[name] = f"made with another baseline or word lists ({baseline}) than the others"
    record = {name: result for name, result in kept.items() if name not in left_out}
    return record, left_out


def is_old(result):
    """Whether another version of the code made a result."""
    return result.code_sha256 != code_sha256(result.experiment)


def spell(options):
    """Options as on the command line."""
    return " ".join(quote(f"--{key}={value}") for key, value in options.items())


# ----------------------------------------------------------------------------------------------------
# The page


def command(text):
    return f"<code>{escape(text)}</code>"


def picture(figure, folder, again):
    """A figure as HTML with the picture inside; if its file is missing, the command that makes it."""
    path = folder / figure.file
    if not path.exists():
        return f"<p class=mark>The figure {escape(figure.file)} is missing. Run {command(again)}</p>"
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(figure.title)}" src="data:image/png;base64,{data}">'
    return f"<div class=scroll>{image}</div>"


def section(result, folder, place):
    """One experiment: what it asks, its verdicts with reasons, figures, examples, its method.

    `folder` holds its figures; `place` is the run on the command line. A look shows no verdicts.
    """
    name = result.experiment
    again = f"python experiments/{name}.py --run={place} {spell(result.options)}".rstrip()
    title, anchor = name.replace("_", " "), name
    if result.options:
        title, anchor = f"{title}, a look: {spell(result.options)}", f"look-{name}"
    question, paragraphs = method(name)
    parts = [f'<h2 id="{anchor}">{escape(title)}</h2>', f"<p>{escape(question)}</p>"]
    if is_old(result):
        parts.append(f"<p class=mark>Made by an earlier version of the code. Run {command(again)}</p>")
    parts.append("<ul>")
    for claim in result.claims:
        verdict = "" if result.options else parts_of.badge(claim.verdict)
        parts.append(
            f"<li>{verdict} {escape(claim.claim)}<br><small>{escape(claim.reason)}; "
            f"n = {claim.n} {escape(claim.unit)} of one model</small></li>"
        )
    parts.append("</ul>")
    parts += [picture(figure, folder, again) for figure in result.figures]
    parts += [f"<p>{escape(note)}</p>" for note in result.notes]
    if result.gallery:
        parts.append(f"<pre>{escape(result.gallery)}</pre>")
    _, cost = method(name, "Cost")
    texts = [*paragraphs, *(f"Cost: {text}" for text in cost)]
    details = "".join(f"<p>{escape(text)}</p>" for text in texts)
    parts.append(f"<details><summary>Method, cost</summary>{details}</details>")
    return "\n".join(parts)


def notices(record, left_out, place):
    """What is missing, left out or old, each with the command that brings it up to date."""
    parts = []
    seeds = {result.seed for result in record.values()} - {0}
    run_all = f"python experiments/run_all.py --run={place}" + "".join(f" --seed={seed}" for seed in seeds)
    missing = [name for name in NAMES if name not in record and name not in left_out]
    if missing:
        again = command(f"{run_all} --only={','.join(missing)}")
        parts.append(f"<p>Not run or failed: {', '.join(missing)}. Run {again}</p>")
    if left_out:
        again = command(f"{run_all} --only={','.join(left_out)}")
        reasons = "".join(f"<li>{name}: {escape(reason)}</li>" for name, reason in left_out.items())
        parts.append(
            f"<div class=mark>Left out, because they do not belong here:<ul>{reasons}</ul>Run {again}</div>"
        )
    old = [name for name, result in record.items() if is_old(result)]
    if old:
        again = command(f"{run_all} --only={','.join(old)}")
        parts.append(
            f"<p class=mark>Made by an earlier version of the code: {', '.join(old)}. Run {again}</p>"
        )
    return "".join(parts)


def look_part(looks, left_out, folder, place):
    """The part of the page for looks: those of these weights, and why others are left out."""
    if not looks and not left_out:
        return ""
    reasons = "".join(f"<li>{name}: {escape(reason)}</li>" for name, reason in left_out.items())
    return (
        "<h1>Looks</h1><p>Results with options of the script: examples, not part of the record.</p>"
        + (f"<div class=mark>Left out:<ul>{reasons}</ul></div>" if reasons else "")
        + "\n".join(section(look, folder / name, place) for name, look in looks.items())
    )


def page(ckpt, folder, record, left_out, looks, looks_left_out, cards=None):
    """The page of the results in a folder, as text. record, looks {name: Result}, left out {name: reason}.

    `cards`: the Cards of the run's signals, or why there are none.
    """
    place = place_of(ckpt)
    losses = {}
    for result in record.values():
        losses |= {model: loss for model, loss in result.val_loss.items() if loss is not None}
    claims = [claim for result in record.values() for claim in result.claims]
    verdicts = [claim.verdict for claim in claims if claim.kind != "gauge"]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("supported", "not supported", "inconclusive"))
    described = f" {len(claims) - len(verdicts)} descriptions." if len(verdicts) < len(claims) else ""
    sections = "".join(section(result, folder / name, place) for name, result in record.items())
    curves = parts_of.training(metrics.curves(ckpt.run)) or "<p>No metrics.jsonl lies beside this run.</p>"
    signals = f"<p>{escape(str(cards))}</p>" if not isinstance(cards, Cards) else parts_of.signal_list(cards)
    entries = {"summary": "What holds, in words", "claims": "All claims", "training": "Training"}
    entries |= {name: name.replace("_", " ") for name in record}
    entries |= {"signals": "A card for each signal", "glossary": "Glossary"}
    contents = "".join(f'<li><a href="#{key}">{text}</a></li>' for key, text in entries.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(ckpt.name)}: experiments</title><style>{parts_of.STYLE}</style></head><body>
<h1>{escape(ckpt.name)}, step {ckpt.step:,}: what survives its controls</h1>
<p>Validation loss, nats per token: {", ".join(f"{k} {v:.3f}" for k, v in losses.items())}.
{len(verdicts)} claims: {counts}.{described}</p>
<nav aria-label="contents"><ul>{contents}</ul></nav>
<h2 id="summary">What holds, in words</h2>{parts_of.in_words(claims)}
<h2 id="claims">All claims</h2>
<p>An <b>effect</b> claim is supported if the 95 % bootstrap interval of its gain over every chance control
lies above zero; a <b>signals</b> claim if the learned dictionary ranks in the best 5 % of itself and at least
19 random rotations (they leave the model's function unchanged) and beats every rival (PCA, ICA, ...). Not
supported means that these data do not show it. A <b>gauge</b> line describes a measure of cosines, which
cannot see axes, in other spaces and in random changes of gauge. It has no verdict.</p>
{notices(record, left_out, place)}{parts_of.claim_list(claims)}
<h2 id="training">Training</h2><div class=figures>{curves}</div>
{sections}
<h2 id="signals">A card for each signal</h2>
<p>What a signal promotes and suppresses, and where in held-out text it is strongest, beside the signal of a
random rotation that has the same rank by usage. What both show says nothing about the learned signals.
<code>python explore.py --run={place}</code> shows them on a prompt of your own.</p>{signals}
<h2 id="glossary">Glossary</h2>{parts_of.glossary()}
{look_part(looks, looks_left_out, folder / LOOKS, place)}
<script>{parts_of.SCRIPT}</script></body></html>
"""


def cards_of(ckpt, results):
    """The Cards of a run with their contexts, or why there are none."""
    try:
        cards = Cards(Lab(LabConfig(run=str(ckpt.path if ckpt.named else ckpt.run), results=results)))
    except UserError as reason:
        return str(reason)
    with tqdm(desc="contexts", disable=None) as bar:
        cards.read_contexts(lambda done, total: (bar.reset(total), bar.update(done)))
    return cards


def place_of(ckpt):
    """A Checkpoint as --run takes it."""
    return files.shortest(ckpt.path if ckpt.named else ckpt.run)


def main():
    (c,) = configurator.parse(ReportConfig)
    ckpt = checkpoint.open_run(c.run)
    folder = results_folder(ckpt, c.results)
    results, unreadable = read_results(folder)
    record, left_out = sort_results(results, ckpt)
    left_out |= unreadable
    looks, looks_left_out = read_results(folder / LOOKS)
    for name in list(looks):
        fault = weights_fault(looks[name], ckpt)
        if fault:
            looks_left_out[name] = fault
            del looks[name]
    if not record and not looks:
        first = [f" ({name}: {reason})" for name, reason in left_out.items()][:1]
        again = f"run python experiments/run_all.py --run={place_of(ckpt)}"
        raise UserError(f"no results of this run in {folder}{''.join(first)}: {again}")
    check_writable(folder)
    path = folder / "report.html"
    cards = cards_of(ckpt, c.results)
    checkpoint.write_atomically(path, page(ckpt, folder, record, left_out, looks, looks_left_out, cards))
    print(f"{path}: {len(record)} experiments, {path.stat().st_size / 1e6:.1f} MB")
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")


if __name__ == "__main__":
    configurator.run(main)
