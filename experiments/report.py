"""
One self-contained HTML page of a run's experiments: verdicts, figures, galleries.

    python experiments/report.py                  the newest run under out/, to <run>/experiments/report.html
    python experiments/report.py --run=out/reflow-1
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ast
import base64
import json
from html import escape

import checkpoint
import configurator
from checkpoint import write_atomically
from configurator import UserError
from experiments.lab import newest_with_signals, results_folder
from experiments.run_all import NAMES


@dataclass
class ReportConfig:
    run: str | None = None  # a run's folder; None: the newest with signals under out/


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid var(--line); }
td.n { white-space: nowrap; font-variant-numeric: tabular-nums; }
img { width: 100%; background: #fff; border-radius: 4px; margin: 1rem 0 0; }
pre { overflow-x: auto; background: var(--soft); padding: .75rem; border-radius: 4px; font-size: .8rem; }
.v { white-space: nowrap; border-radius: 1rem; padding: .1rem .6rem; font-size: .8rem; color: #fff; }
.supported { background: #007a55; } .not { background: #b04a00; } .inconclusive { background: #666; }
details { margin: .5rem 0; } summary { cursor: pointer; }
"""


def number(estimate):
    """An estimate as HTML: value and interval."""
    if estimate["value"] is None or estimate["value"] != estimate["value"]:
        return "&ndash;"
    return f"{estimate['value']:.3g} <small>[{estimate['low']:.3g}, {estimate['high']:.3g}]</small>"


def badge(verdict):
    return f'<span class="v {verdict.split()[0]}">{escape(verdict)}</span>'


def summary(results):
    """The table of all claims."""
    rows = []
    for result in results:
        for claim in result["claims"]:
            controls = "<br>".join(f"{escape(k)}: {number(v)}" for k, v in claim["controls"].items())
            published = (
                f"<br><small>published: {escape(claim['published'])}</small>" if claim["published"] else ""
            )
            link = f'<a href="#{result["experiment"]}">{result["experiment"]}</a>'
            cells = [
                ("", f"{link}<br><small>{claim['kind']}</small><br>{badge(claim['verdict'])}"),
                ("", escape(claim["claim"]) + published),
                (" class=n", number(claim["measured"])),
                (" class=n", controls),
            ]
            rows.append("<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in cells) + "</tr>")
    head = "<tr><th>experiment</th><th>claim</th><th>measured</th><th>controls</th></tr>"
    return f"<div class=scroll><table>{head}{''.join(rows)}</table></div>"


def section(result, folder):
    """One experiment: what it asks, its verdicts with reasons, figures, examples."""
    name = result["experiment"]
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    question, *_ = (ast.get_docstring(ast.parse(source)) or name).split("\n\n")
    parts = [f'<h2 id="{name}">{escape(name.replace("_", " "))}</h2>', f"<p>{escape(question)}</p>", "<ul>"]
    for claim in result["claims"]:
        parts.append(
            f"<li>{badge(claim['verdict'])} {escape(claim['claim'])}<br><small>{escape(claim['reason'])}; "
            f"n = {claim['n']} {escape(claim['unit'])}</small></li>"
        )
    parts.append("</ul>")
    for figure in result["figures"]:
        data = base64.b64encode((folder / figure["file"]).read_bytes()).decode()
        parts.append(f'<img alt="{escape(figure["title"])}" src="data:image/png;base64,{data}">')
    parts += [f"<p>{escape(note)}</p>" for note in result["notes"]]
    if result["gallery"]:
        parts.append(f"<pre>{escape(result['gallery'])}</pre>")
    docs = escape(ast.get_docstring(ast.parse(source)) or "")
    parts.append(f"<details><summary>Claims, method, cost</summary><pre>{docs}</pre></details>")
    return "\n".join(parts)


def page(results, missing, folder):
    """The whole page as text. `results` belong to one run."""
    run, losses = results[0]["run"], {}
    for result in results:
        losses |= {k: v for k, v in result["val_loss"].items() if v is not None}
    verdicts = [claim["verdict"] for result in results for claim in result["claims"]]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("supported", "not supported", "inconclusive"))
    lost = f"<p>Not run or failed: {', '.join(missing)}.</p>" if missing else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run["name"])}: experiments</title><style>{STYLE}</style></head><body>
<h1>{escape(run["name"])}, step {run["step"]:,}: what survives its controls</h1>
<p>Validation loss, nats per token: {", ".join(f"{k} {v:.3f}" for k, v in losses.items())}.
{len(verdicts)} claims: {counts}.</p>
<p>An <b>effect</b> claim is supported if the 95 % bootstrap interval of its gain over every chance control
lies above zero; a <b>signals</b> claim if the learned dictionary beats at least 19 random rotations of
itself, which are the same function, and every rival (PCA, ICA, ...). Not supported means that these data do
not show it.</p>
{lost}{summary(results)}
{"".join(section(result, folder / result["experiment"]) for result in results)}
</body></html>
"""


def main():
    (c,) = configurator.parse(ReportConfig)
    folder = results_folder(c.run, checkpoint.find(c.run) if c.run else newest_with_signals())
    found = [name for name in NAMES if (folder / name / "result.json").exists()]
    if not found:
        raise UserError(f"no results in {folder}: run python experiments/run_all.py")
    results = [json.loads((folder / n / "result.json").read_text(encoding="utf-8")) for n in found]
    path = folder / "report.html"
    write_atomically(path, page(results, [n for n in NAMES if n not in found], folder))
    print(f"{path}: {len(found)} experiments, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    configurator.run(main)
