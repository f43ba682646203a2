"""
What an experiment's result.json holds, field by field.

    python experiments/lab/results.py        writes experiments/result.schema.json anew

Programs read results by `experiment` and `key`, never by the sentence of a claim. NaN and infinity are stored
as null.
"""

import json
import sys
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from checkpoint import write_atomically
from configurator import UserError

SCHEMA = Path(__file__).resolve().parents[1] / "result.schema.json"
FIELDS = ConfigDict(use_attribute_docstrings=True, extra="forbid", ser_json_inf_nan="null")


Verdict = Literal["supported", "not supported", "inconclusive", "description"]


@dataclass(config=FIELDS)
class Estimate:
    """A mean over units and its 95 % bootstrap interval, or another range where that is said."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self):
        if self.value is None:
            return "not a number"
        if self.low is None or self.high is None:  # an end that was infinite or NaN when it was stored
            return f"{self.value:.4g} (no interval)"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def error(self):
        """The distances to both ends, as matplotlib's error bars want them."""
        return [[self.value - self.low], [self.high - self.value]]


@dataclass(config=FIELDS)
class Outcome:
    """One of several ways to measure a claim that must hold in all of them."""

    verdict: Verdict
    """By this measurement alone."""
    reason: str
    """What decided it, for people."""
    measured: Estimate
    """The run's own value."""
    gain: Estimate | None = None
    """Measured minus the control that is hardest to beat, as in a claim."""
    weakest: str | None = None
    """Name of that control."""
    gauges: Estimate | None = None
    """signals: mean, smallest and largest value of the random changes."""
    p: float | None = None
    """signals: probability of a rank this high if the learned dictionary were one of the random ones."""


@dataclass(config=FIELDS)
class Claim:
    """A statement that can be false, with what decided it."""

    experiment: str
    """Name of the script, without its ending."""
    key: str
    """Name of the claim within its experiment: a key of the script's CLAIMS."""
    kind: Literal["effect", "signals", "gauge"]
    """effect: beats chance controls. signals: the learned dictionary beats its rotations and rival ones.
    gauge: describes how a measure that cannot see axes depends on the gauge; it is not decided."""
    claim: str
    """The sentence, for people. Programs use `key`."""
    verdict: Verdict
    """description: of a gauge claim, which is not decided."""
    reason: str
    """What decided the verdict, for people."""
    unit: str
    """What was resampled: words, prompts, targets, seeds, ..."""
    n: int
    """Number of independent units."""
    measured: Estimate
    """The run's own value."""
    controls: dict[str, Estimate]
    """The value of every control or rival, by name."""
    gain: Estimate | None = None
    """Measured minus the control that is hardest to beat, paired by unit; the sign is turned if `lower`."""
    weakest: str | None = None
    """Name of that control: the one whose gain has the lowest lower end."""
    gauge: Literal["rotation", "skewed"] | None = None
    """signals, gauge: how the random changes of the learned dictionary were drawn."""
    n_gauges: int | None = None
    """signals, gauge: how many of them."""
    gauges: Estimate | None = None
    """signals, gauge: their mean, smallest and largest value. A range over dictionaries, no interval."""
    beats_gauges: bool | None = None
    """signals: whether the learned dictionary is better than all but 5 % of them (p <= 0.05)."""
    p: float | None = None
    """signals: probability of a rank this high if the learned dictionary were one of the random ones."""
    lower: bool = False
    """Whether smaller values are better."""
    rests_on: dict[str, int] = field(default_factory=dict)
    """How many distinct things units share, {"signals": 7}: resampled first, then the units in them."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """Of a claim that must hold in several measurements: each of them, by name."""
    decided_by: str | None = None
    """Which outcome is the weakest: the claim's other fields are of that one."""
    questions: dict[str, Outcome] = field(default_factory=dict)
    """signals: parts of the claim, see lab/claims.py: "privileged", "worth training for"."""
    published: str = ""
    """The value that the reference system reports, with its scale, for orientation."""


@dataclass(config=FIELDS)
class Figure:
    file: str
    """Name of the file beside result.json."""
    title: str
    """The finding, with its numbers."""


@dataclass(config=FIELDS)
class Identity:
    """Which checkpoint a result belongs to."""

    name: str
    """The run's name."""
    step: int
    """Optimiser steps of its checkpoint."""
    config_sha256: str | None = None
    """SHA-256 of its configuration as sorted JSON; null for a study of several runs."""
    data_sha256: str | None = None
    """Identifies the text that it was trained on; null if that is unknown."""


@dataclass(config=FIELDS)
class Result:
    """One experiment on one run, or one study of several runs."""

    experiment: str
    """Name of the script, without its ending."""
    seconds: float
    """Time that it took."""
    run: Identity
    """The run under study; of a study, its folder and the most steps of a run."""
    val_loss: dict[str, float | None]
    """Validation loss, nats per token, by model."""
    made_from: dict[str, str]
    """SHA-256 of model.safetensors, by the run's name, of the run and of its baseline."""
    claims: list[Claim]
    """In the order of the script."""
    numbers: dict[str, Any]
    """Further measurements, named in the script."""
    notes: list[str]
    """Sentences for people."""
    gallery: str
    """Preformatted text for people: examples, chosen and not chosen."""
    figures: list[Figure]
    seed: int | None = None
    """Of every random choice: rotations, bootstrap, prompts. null for a study."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the script that were not the defaults. With any of them a result is a look, not a claim."""
    code_sha256: str | None = None
    """Of the script, its code and its word lists; null for results older than this field."""
    runs: list[Identity] | None = None
    """Of a study: the runs that it compares."""


RESULT = TypeAdapter(Result)


def to_json(result):
    """A Result as JSON text."""
    return RESULT.dump_json(result, indent=1).decode()


def read_result(path):
    """The Result in a file. Raises UserError that names the file, what is wrong and what to do."""
    try:
        return RESULT.validate_json(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        fault = f"{where}: {first['msg']}" if where else first["msg"]
        raise UserError(f"{path} is no result of this version ({fault}): run it again") from None


def schema():
    """The JSON schema of result.json, as text."""
    return json.dumps(RESULT.json_schema(), indent=1) + "\n"


if __name__ == "__main__":
    write_atomically(SCHEMA, schema())
    print(SCHEMA)
