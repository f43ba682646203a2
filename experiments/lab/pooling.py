"""
Results of several seeds of one configuration as one result: the unit of a claim about training is the model.

A claim of one run holds for that model: its interval counts prompts or words. A pooled claim resamples models
first, then the units of each. Of few models that interval is too narrow, so the mean gains of the models must
also lie above zero by a t interval. Fewer than three models decide nothing.
"""

from pathlib import Path

import numpy as np

import checkpoint
from configurator import UserError
from experiments.lab import claims as rules
from experiments.lab.claims import Scores, make_claim
from experiments.lab.report import UNITS
from experiments.lab.results import Identity, Result, read_result, to_json
from experiments.lab.stats import estimate, t_interval

LEAST_MODELS = 3
TRAINING = ("batch_size", "max_steps", "lr", "min_lr", "warmup_steps", "weight_decay", "beta1", "beta2")
TRAINING += ("grad_clip", "init_from")


def why_not(checkpoints):
    """Why Checkpoints are not seeds of one configuration, a text; "" if they are."""

    def settings(ckpt):
        training = {key: ckpt.train_config.get(key) for key in TRAINING}
        return ckpt.model_config | training | {"data": ckpt.state.get("data_sha256"), "step": ckpt.step}

    first = settings(checkpoints[0])
    for other in map(settings, checkpoints[1:]):
        for key, value in other.items():
            if value != first.get(key):
                return f"{key} is {first.get(key)} and {value}"
    seeds = [ckpt.train_config.get("seed") for ckpt in checkpoints]
    return "" if len(set(seeds)) == len(seeds) else f"their seeds are {', '.join(map(str, seeds))}"


def pooled_folder(checkpoints, elsewhere=None):
    """Where pooled results go: pooled/<names>/ beside the runs, or in the folder of --results."""
    parent = checkpoints[0].run.parent if elsewhere is None else Path(elsewhere).expanduser()
    return parent / "pooled" / "+".join(ckpt.name for ckpt in checkpoints)


def read_units(folder):
    """{(key, way): {name: array}} of the units.npz of a result. Raises UserError."""
    found = {}
    try:
        with np.load(folder / UNITS, allow_pickle=False) as units:
            for place, values in units.items():
                key, way, name = place.split("/", 2)
                found.setdefault((key, way), {})[name] = values
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / UNITS} cannot be read ({error}): run the experiment with --again"
        ) from None
    return found


def pool_claim(claims, units):
    """One Claim of the same claim in M models: Claims, and of each {way: {name: values}}."""
    first = claims[0]
    undecided = [claim.reason for claim in claims if claim.verdict == "inconclusive"]
    if undecided:
        fields = rules.missing(first.kind, f"inconclusive in {len(undecided)} models: {undecided[0]}")
    else:
        outcomes = {way: pool_way(first, [found[way] for found in units]) for way in units[0]}
        fields = rules.weaker(outcomes) if len(outcomes) > 1 else next(iter(outcomes.values()))
    return make_claim(first.experiment, first.key, first.claim, fields, first.published)


def pool_way(claim, units):
    """Fields of a Claim, by its rule, for M models of which each has {name: values (n,)}."""
    named = [{name: v for name, v in found.items() if not name.startswith("(")} for found in units]
    names = [name for name in named[0] if all(name in found for found in named)]
    every = {name for found in named for name in found}
    sizes = [len(found["native"]) for found in named]
    model = np.repeat(np.arange(len(units)), sizes)
    own = [found.get("(groups)", np.arange(n)) for found, n in zip(units, sizes, strict=True)]
    groups = np.concatenate(own)
    groups = np.unique(np.stack([model, groups]), axis=1, return_inverse=True)[1].ravel()
    pooled = Scores({name: np.concatenate([found[name] for found in named]) for name in names})
    pooled.missing = dict.fromkeys(sorted(every - set(names)), "it was not measured in every model")
    if claim.gauges is not None:
        means = np.average([found["(gauges)"] for found in units], axis=0, weights=sizes)  # (K,)
        pooled.gauges = means[:, None]
        pooled.gauge = claim.gauge
    if claim.kind == "gauge":
        found = rules.gauge(pooled, claim.unit)
        controls = {name: estimate(values, groups, model) for name, values in pooled.rivals.items()}
        return found | {"measured": estimate(pooled.native, groups, model), "controls": controls}

    rule = rules.signals if claim.kind == "signals" else rules.effect
    found = rule(pooled, claim.unit, None, groups, claim.lower, ("models", model))
    if len(units) < LEAST_MODELS:
        return found | {"verdict": "inconclusive", "reason": f"only {len(units)} models; {found['reason']}"}
    sign = -1 if claim.lower else 1
    for name in names[1:]:
        over_models = t_interval([sign * np.mean(each["native"] - each[name]) for each in named])
        if found["verdict"] == "supported" and not over_models.low > 0:
            reason = f"mean gain of a model over {name}: {over_models} (t); {found['reason']}"
            return found | {"verdict": "not supported", "reason": reason}
    return found


def pool(name, folders, identities):
    """The pooled Result of an experiment whose results are in `folders`, one for each model."""
    results = [read_result(folder / name / "result.json") for folder in folders]
    units = [read_units(folder / name) for folder in folders]
    by_key = [{claim.key: claim for claim in result.claims} for result in results]
    claims = []
    for key in by_key[0]:
        ways = [{way: values for (of, way), values in found.items() if of == key} for found in units]
        claims.append(pool_claim([found[key] for found in by_key], ways))
    losses = [result.val_loss.get("reflow") for result in results]
    names = [identity.name for identity in identities]
    return Result(
        experiment=name,
        seconds=sum(result.seconds for result in results),
        run=Identity("+".join(names), max(identity.step for identity in identities)),
        val_loss=dict(zip(names, losses, strict=True)),
        made_from={run: sha for result in results for run, sha in result.made_from.items()},
        claims=claims,
        numbers={},
        notes=[f"Pooled over {len(names)} models: {', '.join(names)}."],
        gallery="",
        figures=[],
        seed=results[0].seed,
        code_sha256=results[0].code_sha256,
        runs=identities,
    )


def save(result, folder):
    """Write a pooled Result into <folder>/<experiment>/, whole or not at all."""
    with checkpoint.whole_folder(folder / result.experiment) as new:
        (new / "result.json").write_text(to_json(result), encoding="utf-8")


def table(results):
    """Pooled Results as text: a line for each claim."""
    lines = [f"{'':43} {'pooled':14} {'measured':26} gain over the control that is hardest to beat"]
    for result in results:
        for claim in result.claims:
            gain = "" if claim.gain is None else f"{claim.weakest}: {claim.gain}"
            found = claim.reason if claim.verdict == "inconclusive" else f"{claim.measured!s:26} {gain}"
            start = f"{result.experiment:18} {claim.key:15} {claim.kind:8} {claim.verdict:14}"
            lines.append(f"{start} {found}".rstrip())
    return "\n".join(lines)
