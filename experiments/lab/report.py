"""
What an experiment found: claims, rows, numbers, figures; printed, saved as a folder, shown in a notebook.
"""

import ast
import base64
import csv
import hashlib
import textwrap
import time
from contextlib import contextmanager
from html import escape
from pathlib import Path

import numpy as np

import checkpoint
import configurator
import files
from experiments.lab import claims as rules
from experiments.lab import plots, precision
from experiments.lab.claims import Scores
from experiments.lab.lab import Lab, LabConfig, check_writable
from experiments.lab.results import Figure, Result, to_json
from files import file_sha256

EXPERIMENTS = Path(__file__).resolve().parents[1]
ROOT = EXPERIMENTS.parent
CODE = (
    "attribution.py",
    "dictionary.py",
    "hooks.py",
    "model.py",
    "recoding.py",
    "reflow.py",
)  # at the root
UNITS = "units.npz"  # the values of every claim, by unit: what pooling.py reads
LOOKS = "looks"  # folder for results with options of one's own
COLUMNS = (
    "model",
    "dictionary",
    "control",
    "layer",
    "pos",
    "signal",
    "prompt",
    "strength",
    "n_signals",
    "metric",
    "value",
)


class Report:
    """The result of one experiment, as it grows. CLAIMS of the script gives the sentence of every key."""

    def __init__(self, lab, experiment, sentences, options=None):
        self.lab = lab
        self.experiment = experiment
        self.sentences = sentences
        self.options = options or {}  # those of the script that are not the defaults
        self.claims = []
        self.rows = []
        self.numbers = {}
        self.notes = []
        self.figures = []
        self.gallery = ""  # preformatted text: examples, chosen and not chosen
        self._pictures = {}  # file name -> bytes
        self._units = {}  # "key/way/name" -> values by unit
        lab.report = self
        self._start = time.perf_counter()
        self._code_sha256 = code_sha256(experiment)  # now: a file may change while the experiment runs

    # -- what an experiment says ------------------------------------------------------------------

    def effect(self, key, scores, unit, against=None, groups=None, lower=False, clusters=None, published=""):
        """Claim that scores.native (n,) beats the controls named in `against` (None: all other entries).

        {name: Scores} of several ways to measure it: the claim holds if it holds in each of them. `clusters`
        may then be one for each way.
        """
        how = {"against": against, "groups": groups, "lower": lower, "clusters": clusters}
        self.decide(rules.effect, key, scores, unit, published, how)

    def signals(self, key, scores, unit, against=None, groups=None, lower=False, clusters=None, published=""):
        """Claim that scores.native (n,) beats scores.gauges and the rivals `against`; else like `effect`."""
        how = {"against": against, "groups": groups, "lower": lower, "clusters": clusters}
        self.decide(rules.signals, key, scores, unit, published, how)

    def gauge(self, key, scores, unit, groups=None, published=""):
        """Description of scores.native (n,) beside scores.gauges and other spaces."""
        self.decide(rules.gauge, key, scores, unit, published, {"groups": groups})

    def decide(self, rule, key, scores, unit, published, how):
        """Add the claim that a rule makes of Scores, or of {way: Scores}, and keep the scores."""
        outcomes = {}
        for way, part in ({"": scores} if isinstance(scores, Scores) else scores).items():
            own = {name: value[way] if isinstance(value, dict) else value for name, value in how.items()}
            outcomes[way] = rule(part, unit, **own)
            self.scores(f"{key}, {way}" if way else key, part)
            self.keep_units(f"{key}/{way}", part, own.get("against"), own["groups"])
        self.claim(key, outcomes[""] if "" in outcomes else rules.weaker(outcomes), published)

    def keep_units(self, place, scores, against, groups):
        """Keep what decides a claim for units.npz: values by unit, groups, and means of the gauges."""
        names = scores if against is None else ("native", *against)
        found = {name: scores[name].astype("float32") for name in names if name in scores}
        if groups is not None:
            found["(groups)"] = np.unique(np.asarray(groups), return_inverse=True)[1]
        if scores.gauges is not None:
            found["(gauges)"] = scores.gauges.mean(1)
        self._units |= {f"{place}/{name}": values for name, values in found.items()}

    def claim(self, key, fields, published=""):
        """Add a claim by its key and the fields that a rule of lab/claims.py gave."""
        self.claims.append(rules.make_claim(self.experiment, key, self.sentences[key], fields, published))

    def stop(self, reason):
        """The claims that are not decided yet are inconclusive, for a reason."""
        decided = {claim.key for claim in self.claims}
        source = script(self.experiment).read_text(encoding="utf-8")
        for key in self.sentences:
            if key not in decided:
                kinds = [kind for kind in ("signals", "gauge") if f'report.{kind}("{key}"' in source]
                self.claim(key, rules.missing(kinds[0] if kinds else "effect", reason))
        self.notes.append(f"Not all was measured: {reason}.")

    def scores(self, metric, scores, **where):
        """Write the means of Scores to rows.csv and to numbers, under `metric`."""
        for name, values in scores.items():
            self.row(metric, np.mean(values), dictionary=name, **where)
        for i, values in enumerate(scores.gauges if scores.gauges is not None else ()):
            self.row(metric, np.mean(values), **{"dictionary": scores.gauge, "control": f"{i}"} | where)
        if not where:
            self.numbers[metric] = scores.means()

    def about_nulls(self, texts):
        """Say what the null models are, {name: text}: in numbers, and in a note if one is missing."""
        if "nulls" not in self.numbers:
            missing = [f"{name} {text}" for name, text in texts.items() if text.startswith("missing")]
            instead = " That of frequencies takes its place." if "frequencies" in texts else ""
            self.notes += [f"A null model is not among the controls, {text}.{instead}" for text in missing]
        self.numbers["nulls"] = texts

    def row(self, metric, value, **where):
        """One line of rows.csv; `where` are the other COLUMNS."""
        unknown = where.keys() - set(COLUMNS)
        assert not unknown, f"unknown columns: {unknown}"
        self.rows.append({"metric": metric, "value": value} | where)

    @contextmanager
    def figure(self, name, title, rows=1, columns=1, size=(9, 3.6), **grid):
        """Yield axes; the figure is kept under `name`. The title states the finding with its numbers."""
        with plots.figure(rows, columns, size, **grid) as (fig, axes):
            yield axes
            plots.set_title(fig, title)
            self._pictures[f"{name}.png"] = plots.to_png(fig)
        self.figures.append(Figure(f"{name}.png", title))

    def __getitem__(self, key):
        """The Claim with this key."""
        return next(claim for claim in self.claims if claim.key == key)

    # -- where it goes ----------------------------------------------------------------------------

    @property
    def folder(self):
        """<run>/experiments/<name>. With own options it is in looks/: a look leaves the record alone."""
        parent = self.lab.results / LOOKS if self.options else self.lab.results
        return parent / self.experiment

    def result(self):
        """All of it as a Result."""
        notes = list(self.notes)
        words = vars(self.lab).get("words")  # if they were asked for
        if words is not None and words.where != "training":
            notes.append(f"Nobody here knows the model's training text: tokens are counted in {words.where}.")
        subject = getattr(self.lab, "model", None)  # a study has several
        if subject is not None and precision.is_rounded(subject.net):
            notes.append("The products of the blocks were rounded to bf16 (--dtype=fp32: they are not).")
        return Result(
            experiment=self.experiment,
            seconds=round(time.perf_counter() - self._start, 2),
            claims=self.claims,
            numbers=plain(self.numbers),
            notes=notes,
            gallery=self.gallery,
            figures=self.figures,
            options=plain(self.options),
            code_sha256=self._code_sha256,
            **self.lab.identity(),
        )

    def save(self):
        """Write the folder, whole or not at all, and return the Result."""
        result = self.result()
        with files.lock(self.folder, wait=True), checkpoint.whole_folder(self.folder) as new:
            for name, data in self._pictures.items():
                (new / name).write_bytes(data)
            with open(new / "rows.csv", "w", newline="", encoding="utf-8") as f:
                writer = csv.DictWriter(f, COLUMNS, restval="")
                writer.writeheader()
                writer.writerows(self.rows)
            np.savez_compressed(new / UNITS, **self._units)
            (new / "result.json").write_text(to_json(result), encoding="utf-8")
        return result

    def _repr_html_(self):
        return result_html(self.result(), self._pictures)


def plain(value):
    """A value as JSON can hold it: plain numbers, None for those that are not finite."""
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value.item() if hasattr(value, "item") else value


def script(experiment):
    """The file of an experiment or a study."""
    path = EXPERIMENTS / f"{experiment}.py"
    return path if path.exists() else EXPERIMENTS / "studies" / f"{experiment}.py"


def code_sha256(experiment):
    """Hash of all code that a result depends on: the script, lab/, the word lists, the model's modules."""
    files = [
        script(experiment),
        *(EXPERIMENTS / "lab").glob("*.py"),
        *script(experiment).parent.glob("runs.py"),  # what the studies share
        *(EXPERIMENTS / "probes").glob("*.json"),
    ]
    files += [ROOT / name for name in CODE]
    files += [ROOT / "data" / name for name in ("datasets.py", "shards.py", "tokenizer.py", "words.py")]
    hashes = [f"{path.relative_to(ROOT)} {file_sha256(path)}" for path in sorted(files)]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def method(experiment, section="Method"):
    """(question, [paragraphs of a section: Method or Cost]) of a script, from its docstring."""
    source = script(experiment).read_text(encoding="utf-8")
    question, _, rest = configurator.read_docstring(ast.get_docstring(ast.parse(source)) or experiment)
    paragraphs = []
    heading = ""
    for text in rest.split("\n\n"):
        if not text.startswith(" "):  # a new section: its heading, then its first paragraph
            heading, _, text = text.partition("\n")
        if heading == section:
            paragraphs.append(" ".join(text.split()))
    return " ".join(question.split()), paragraphs


# ----------------------------------------------------------------------------------------------------
# Showing a result


def table(result):
    """A Result as text for a terminal."""
    losses = [f"{name} {loss:.3f}" for name, loss in result.val_loss.items() if loss is not None]
    head = f"{result.experiment}: {result.run.name}, step {result.run.step}"
    lines = [head + (f" (validation loss: {', '.join(losses)})" if losses else "")]
    for claim in result.claims:
        lines += ["", *textwrap.wrap(f"{claim.kind}: {claim.claim}", 104)]
        values = {"measured": claim.measured}
        if claim.gauges is not None:
            values[f"{claim.n_gauges} {rules.PLURAL[claim.gauge]} (range)"] = claim.gauges
        values |= claim.controls
        if claim.outcomes:
            values = {f"{claim.decided_by}, {name}": value for name, value in values.items()}
            values |= {
                f"{name}, measured": outcome.measured
                for name, outcome in claim.outcomes.items()
                if name != claim.decided_by
            }
        width = max(map(len, values))
        lines += [f"  {name:{width}}  {value}" for name, value in values.items()]
        if claim.published:
            lines.append(f"  {'published':{width}}  {claim.published}")
        of = " of one model" if result.runs is None else ""
        decided = f"  -> {claim.verdict}: {claim.reason} (n = {claim.n} {claim.unit}{of})"
        lines += textwrap.wrap(decided, 104, subsequent_indent="     ") if claim.outcomes else [decided]
        for question, outcome in claim.questions.items():
            lines.append(f"     {question}: {outcome.verdict}: {outcome.reason}")
    if result.gallery:
        lines += ["", result.gallery.rstrip()]
    for note in result.notes:
        lines += ["", *textwrap.wrap(note, 104)]
    return "\n".join(lines)


def result_html(result, pictures):
    """A Result as HTML for a notebook: its claims in a table, its figures."""
    rows = []
    for claim in result.claims:
        cells = (claim.key, claim.kind, claim.claim, str(claim.measured), claim.reason, claim.verdict)
        rows.append(
            "<tr>" + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in cells) + "</tr>"
        )
    head = "".join(
        f"<th>{name}</th>" for name in ("key", "kind", "claim", "measured", "decided by", "verdict")
    )
    images = []
    for figure in result.figures:
        data = base64.b64encode(pictures[figure.file]).decode()
        images.append(
            f'<img alt="{escape(figure.title)}" src="data:image/png;base64,{data}" style="max-width:100%">'
        )
    title = f"<b>{escape(result.experiment)}</b>: {escape(result.run.name)}, step {result.run.step}"
    return f"{title}<table><tr>{head}</tr>{''.join(rows)}</table>{''.join(images)}"


def measure(run, lab, *own):
    """The Report of run(lab, *own). If text or words do not suffice, what is left is inconclusive."""
    lab.report = None
    try:
        return run(lab, *own)
    except rules.TooFew as reason:
        if lab.report is None:
            raise
        lab.report.stop(str(reason))
        return lab.report


def save_and_print(report):
    """Save a report; print it and where it is."""
    result = report.save()
    print(table(result))
    print(f"\n{report.folder}/  ({result.seconds:.1f} s)")
    if report.options:
        print("With options of your own this is a look: the run's record in its other folder is unchanged.")


def run_experiment(run, *configs):
    """A script's last line: parse the command line, run on the run asked for, save and print the report."""

    def main():
        config, *own = configurator.parse(LabConfig, *configs)
        lab = Lab(config)
        check_writable(lab.results)
        report = measure(run, lab, *own)
        report.options = configurator.differences(*own)
        save_and_print(report)

    configurator.run(main)
