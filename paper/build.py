"""
Build paper/paper.pdf from paper/results: draw the figures, set the text, write the README's two blocks.

    make paper
    python paper/build.py

No number is typed in: text, figures and blocks read claims by their keys. `python paper/collect.py` refreshes
the results.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
from checkpoint import write_atomically
from configurator import UserError
from experiments.lab.report import method
from experiments.run_all import NAMES
from experiments.studies import STUDIES
from paper.draw import draw
from paper.reading import PAPER, load
from paper.readme import README, readme

METHODS = PAPER / "methods.json"  # for the appendix


def methods():
    """JSON of {"experiments" or "studies": {name: {"question": text, "method": [paragraphs]}}}."""
    found = {}
    for group, names in (("experiments", NAMES), ("studies", STUDIES)):
        found[group] = {}
        for name in names:
            question, paragraphs = method(name)
            found[group][name] = {"question": question, "method": paragraphs}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def main():
    configurator.parse()  # no settings: only --help
    start = time.perf_counter()
    load("bench")  # the text needs it; the figures need everything else
    draw()
    write_atomically(METHODS, methods())
    try:
        import typst
    except ImportError:
        raise UserError("the paper needs a package: pip install -r requirements-dev.txt") from None
    try:
        typst.compile(PAPER / "paper.typ", output=PAPER / "paper.pdf", root=PAPER.parent)
    except typst.TypstError as error:
        raise UserError(f"paper/paper.typ does not compile:\n{error.diagnostic}") from None
    write_atomically(README, readme())
    print(f"paper/paper.pdf, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    configurator.run(main)
