"""
Compare the results of experiments, claim by claim and number by number.

    python tests/compare_results.py OLD NEW              two folders of results: <run>/experiments
    python tests/compare_results.py OLD NEW --tolerance=1e-4

Verdicts must be equal, numbers to a relative tolerance (absolute below 1). A number or a claim that only one
side has is listed too. Exit status 1 if anything differs.
"""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
from experiments.lab.results import read_result

WORDS = ("claim", "reason", "published")  # sentences may be reworded


@dataclass
class CompareConfig:
    tolerance: float = 1e-6  # relative; absolute for numbers below 1
    words: bool = False  # compare sentences as well
    shared: bool = False  # compare only what both sides have


def leaves(value, path=()):
    """{path: leaf} of nested dicts and lists."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {path: value}
    found = {}
    for key, part in items:
        found |= leaves(part, (*path, str(key)))
    return found


def equal(a, b, tolerance):
    """Whether two leaves are the same: numbers by tolerance, all else exactly."""
    numbers = [isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b)]
    if all(numbers):
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
    return a == b


def compare(old, new, tolerance=1e-6, words=False, shared=False):
    """The differences of two Results, a list of lines: claims by key first, then numbers by path."""
    skip = () if words else WORDS
    sides = []
    for result in (old, new):
        found = {}
        for claim in result.claims:
            fields = {key: value for key, value in asdict(claim).items() if key not in skip}
            found |= leaves(fields, (claim.key,))
        sides.append(found | leaves(result.numbers, ("numbers",)))
    before, after = sides
    lines = []
    for path in sorted(before.keys() | after.keys()):
        name = ".".join(path)
        if shared and (before.get(path) is None or after.get(path) is None):
            continue
        if path not in after:
            lines.append(f"{name}: only before: {before[path]}")
        elif path not in before:
            lines.append(f"{name}: only after: {after[path]}")
        elif not equal(before[path], after[path], tolerance):
            lines.append(f"{name}: {before[path]} -> {after[path]}")
    return lines


def main():
    folders = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("--")]
    (c,) = configurator.parse(CompareConfig, argv=[a for a in sys.argv[1:] if a.startswith("-")])
    if len(folders) != 2:
        raise configurator.UserError("give two folders of results: OLD NEW")
    old, new = folders
    n_different = 0
    for path in sorted(old.glob("*/result.json")):
        name = path.parent.name
        if not (new / name / "result.json").exists():
            print(f"{name}: no result in {new}")
            n_different += 1
            continue
        lines = compare(
            read_result(path), read_result(new / name / "result.json"), c.tolerance, c.words, c.shared
        )
        n_different += len(lines)
        print(f"{name}: {len(lines) or 'no'} differences")
        for line in lines:
            print(f"  {line}")
    sys.exit(bool(n_different))


if __name__ == "__main__":
    configurator.run(main)
