"""
All twelve experiments on one run.

    python experiments/run_all.py                                  the newest run with signals
    python experiments/run_all.py --run=out/reflow-1 --only=ablate_signal,signal_lens

An experiment whose result is newer than the code and was made from the same checkpoints is skipped. A failure
stops nothing: it is shown, and the exit status is 1. `python experiments/report.py` then makes a page of it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import importlib
import json
import time
import traceback
from difflib import get_close_matches

from tqdm import tqdm

import configurator
from experiments import lab

NAMES = (
    *("nearest_neighbors", "semantic_clusters", "semantic_algebra", "sparsity_profile", "basis_geometry"),
    *("signal_codebook", "ablate_signal", "signal_lens", "emotion_surgery", "concept_inception"),
    *("gene_tampering", "crystallization"),
)


@dataclass
class RunAllConfig:
    only: str = ""  # names of experiments, separated by commas; empty: all
    again: bool = False  # also those that are up to date


def up_to_date(laboratory, name):
    """Whether the run holds this experiment's result for these very checkpoints, seed and code."""
    path = laboratory.results / name / "result.json"
    if not path.exists():
        return False
    code = [
        Path(__file__).with_name(f"{name}.py"),
        Path(lab.__file__),
        Path(lab.__file__).parents[1] / "model.py",
    ]
    if any(file.stat().st_mtime > path.stat().st_mtime for file in code):
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    return found.get("options") == {} and laboratory.identity().items() <= found.items()


def main():
    config, c = configurator.parse(lab.LabConfig, RunAllConfig)
    names = [name.strip() for name in c.only.split(",") if name.strip()] or NAMES
    for name in names:
        if name not in NAMES:
            nearest = get_close_matches(name, NAMES, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"one of {', '.join(NAMES)}"
            raise lab.UserError(f"--only={name}: no such experiment: {hint}")

    laboratory, start, failed = lab.Lab(config), time.perf_counter(), []
    for name in tqdm(names, unit="experiment", disable=not sys.stderr.isatty()):
        if not c.again and up_to_date(laboratory, name):
            tqdm.write(f"{name}: up to date")
            continue
        try:
            importlib.import_module(f"experiments.{name}").run(laboratory).save()
        except Exception as error:
            failed.append(name)
            if not isinstance(error, lab.UserError):
                traceback.print_exc()
            print(f"{name} failed: {error}", file=sys.stderr)
        print("\n" + "-" * 100, flush=True)
    done = len(names) - len(failed)
    print(f"{done} of {len(names)} experiments in {time.perf_counter() - start:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    configurator.run(main)
