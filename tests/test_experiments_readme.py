"""experiments/README.md: its tables agree with the code."""

import ast
import re

import pytest

from experiments import basis_geometry, sparsity_profile
from experiments.lab import claims
from experiments.lab.report import COLUMNS, EXPERIMENTS, script
from experiments.run_all import NAMES
from experiments.studies import STUDIES

TEXT = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")


def claim_keys(experiment):
    """The keys of CLAIMS in a script, in order."""
    for node in ast.parse(script(experiment).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "CLAIMS":
            return list(ast.literal_eval(node.value))
    return []


@pytest.mark.parametrize("name", [*NAMES, *STUDIES])
def test_the_tables_have_every_experiment_and_claim(name):
    row = re.search(rf"^\| `{name}` \|.*$", TEXT, re.M)[0]
    keys = re.findall(r"`(\w+)`", row.split("|")[3])
    assert set(claim_keys(name)) <= set(keys)


def test_it_names_the_columns_and_thresholds_of_the_code():
    assert f"Columns: {', '.join(COLUMNS)}." in TEXT
    assert f"at least {claims.LEAST_UNITS} |" in TEXT
    assert f"| random rotations of the dictionary | at least {claims.N_GAUGES} |" in TEXT
    assert claims.N_GAUGES < sparsity_profile.N_GAUGES == basis_geometry.N_GAUGES == 99 and "99 where" in TEXT
    assert f"above {claims.ROUNDING:g}".replace("1e-05", "1e-5") in TEXT


def test_lines_are_short_outside_tables():
    lines = [line for line in TEXT.splitlines() if not line.startswith("|")]
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 160
