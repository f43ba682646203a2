"""
The notebooks: their code cells run as they are, without jupyter, and their outputs are committed.

That of SmolLM2 takes minutes and a package: it is run by hand.

After a change: jupyter nbconvert --to notebook --execute --inplace notebooks/tour.ipynb
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BY_HAND = ["smollm2"]
OUTPUT_FIELDS = {
    "stream": {"name", "text"},
    "display_data": {"data", "metadata"},
    "execute_result": {"data", "metadata", "execution_count"},
}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text(lines):
    """Source or text of a notebook: a string or a list of lines."""
    return lines if isinstance(lines, str) else "".join(lines)


def run_cells(notebook):
    """Run all code cells in one namespace; what each shows: printed text, then its last expression."""
    namespace = {"__name__": "__main__"}
    shown = []
    for cell in code_cells(notebook):
        *lines, last = text(cell["source"]).rstrip().split("\n")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                last = compile(last, "cell", "eval")  # no cell ends inside a statement of several lines
            except SyntaxError:
                lines, last = [*lines, last], None
            exec(compile("\n".join(lines), "cell", "exec"), namespace)
            value = None if last is None else eval(last, namespace)
        if value is not None and hasattr(value, "_repr_html_"):
            assert value._repr_html_().startswith("<b>")
        shown.append(out.getvalue() + ("" if value is None else repr(value)))
    return shown


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_there_is_a_tour():
    assert "tour" in [path.stem for path in NOTEBOOKS]


def test_a_notebook_is_valid_nbformat_4(path):
    """The required fields of https://nbformat.readthedocs.io/en/latest/format_description.html."""
    notebook = read(path)
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] >= 5
    assert isinstance(notebook["metadata"], dict)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(0 < len(name) <= 64 for name in ids)
    for cell in notebook["cells"]:
        fields = {"id", "cell_type", "metadata", "source"}
        if cell["cell_type"] == "code":
            fields |= {"execution_count", "outputs"}
        assert cell.keys() == fields and cell["cell_type"] in ("markdown", "code")
    for output in (output for cell in code_cells(notebook) for output in cell["outputs"]):
        kind = output["output_type"]
        assert kind in OUTPUT_FIELDS, f"{kind}: a cell failed"
        assert output.keys() == {"output_type"} | OUTPUT_FIELDS[kind]


def test_outputs_are_committed_in_order_and_small(path):
    cells = code_cells(read(path))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells)
    assert path.stat().st_size < 200_000
    assert str(ROOT) not in path.read_text(encoding="utf-8")


def test_cells_run_and_show_what_is_committed(path, monkeypatch):
    """Words, not numbers: the last digits depend on the machine."""
    if path.stem in BY_HAND:
        pytest.skip("it takes minutes and a package: run by hand")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    notebook = read(path)
    for cell, shown in zip(code_cells(notebook), run_cells(notebook), strict=True):
        committed = [text(o["data"]["text/plain"]) for o in cell["outputs"] if "data" in o]
        committed += [text(o["text"]) for o in cell["outputs"] if o.get("name") == "stdout"]
        assert shown
        if " at 0x" not in shown:
            first = next(line for line in "\n".join(committed).split("\n") if line)
            assert first.split("  ")[0] in shown
