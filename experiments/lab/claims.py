"""
Scores, and the rules that turn them into verdicts.

    effect    The measured value beats chance. For every control (null model, shuffled recipes, random
              direction, ...) the lower end of the 95 % bootstrap interval of the paired difference must be
              above zero.
    signals   The learned dictionary is special. It must beat all but 5 % of at least 19 random changes of
              itself that leave the model's function as it is: if it were one of them, that had a probability
              of 5 %. And it must beat every rival (PCA, ICA, the plain GPT, ...) as an effect does. Two parts
              of this are given apart. Privileged: it beats the random changes and PCA of its own E. Worth
              training for: it beats every dictionary of the plain GPT. That ICA of its own E does as well
              counts against a claim, and not against these two: then its signals can be recovered from E.
    gauge     A description: the value in this gauge, in rival spaces, and its range over random gauges. What
              depends on the gauge through cosines alone cannot see axes, so there is no p and no verdict.

A claim is inconclusive if there are fewer than 20 independent units, no control, fewer than 19 random
changes, if a rival is missing, or if a difference is not a number. A gain below 1e-5 of the mean measured
size counts as rounding, not as a gain. No other threshold exists. The random changes are the same for all
claims of a run, so its signals claims are not independent of one another.
"""

from dataclasses import fields

import numpy as np

from configurator import UserError
from experiments.lab.results import Claim, Estimate, Outcome
from experiments.lab.stats import estimate, t_interval

LEAST_UNITS = 20  # independent units below which a claim is inconclusive
N_GAUGES = 19  # random changes of the dictionary: the fewest that can give p = 0.05
ROUNDING = 1e-5  # of the mean measured size
VERDICTS = ("not supported", "inconclusive", "supported")  # the weakest first
OUTCOME = [field.name for field in fields(Outcome)]
PLURAL = {"rotation": "rotations", "skewed": "skewed gauges"}  # of Scores.gauge, in texts


class TooFew(UserError):
    """The text or the words of a run do not suffice: claims not yet decided are inconclusive."""


class Scores(dict):
    """{name: values (n, ...)}, one value a unit, of one measurement on several dictionaries or models.

    "native" is the run's own. `gauges` (K, n, ...) holds the same for K random changes of the native
    dictionary (None where they make no sense); `gauge` says of which kind these are. `missing`: {rival that
    could not be found: why}.
    """

    def __init__(self, values=(), gauges=None, gauge="rotation", missing=None):
        super().__init__({name: to_numpy(v) for name, v in dict(values).items()})
        self.gauges = None if gauges is None else np.stack([to_numpy(v) for v in gauges])
        self.gauge = gauge
        self.missing = dict(missing or {})

    def __setitem__(self, name, values):
        super().__setitem__(name, to_numpy(values))

    @property
    def native(self):
        return self["native"]

    @property
    def rivals(self):
        """All but the native values."""
        return {name: values for name, values in self.items() if name != "native"}

    def map(self, f):
        """The Scores of f(values) for every entry, for example one column of values (n, L)."""
        gauges = None if self.gauges is None else np.stack([f(values) for values in self.gauges])
        return Scores({name: f(values) for name, values in self.items()}, gauges, self.gauge, self.missing)

    def means(self):
        """{name: mean}, a list for the gauges."""
        found = {name: float(np.mean(values)) for name, values in self.items()}
        if self.gauges is not None:
            found["gauges"] = [float(np.mean(values)) for values in self.gauges]
        return found


def to_numpy(values):
    """A tensor or array as float64 in numpy."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, float)


def effect(scores, unit, against=None, groups=None, lower=False, clusters=None):
    """Does scores.native (n,) beat each control named in `against` (None: all others)? Fields of a Claim.

    `groups` (n,): units that are not independent of one another. `lower`: smaller is better. `clusters`:
    (name, (n,)), what units share, for example ("signals", the strongest one of each prompt): the evidence
    rests on that many, and they are resampled before the units in them.
    """
    return compared(scores, unit, against, groups, lower, clusters)[0]


def compared(scores, unit, against, groups, lower, clusters):
    """(fields of an effect, {control: gain over it}); arguments as in `effect`."""
    measured = scores.native
    controls = scores.rivals if against is None else {name: scores[name] for name in against}
    missing = {name: why for name, why in scores.missing.items() if against is None or name in against}
    n = len(measured) if groups is None else len(np.unique(groups))
    shared, cluster = clusters or ("", None)
    sign = -1 if lower else 1
    gains = {name: estimate(sign * (measured - v), groups, cluster) for name, v in controls.items()}
    rests_on = {} if cluster is None else {shared: len(np.unique(cluster))}
    fields = {
        "kind": "effect",
        "unit": unit,
        "n": n,
        "rests_on": rests_on,
        "measured": estimate(measured, groups, cluster),
        "controls": {name: estimate(values, groups, cluster) for name, values in controls.items()},
        "lower": lower,
    }
    return fields | judged(gains, measured, n, unit, rests_on, missing), gains


def judged(gains, measured, n, unit, rests_on, missing=None):
    """Verdict, reason, gain and weakest control of {control: gain} of measured values; fields of a Claim."""
    overflowed = [name for name, gain in gains.items() if np.isnan(gain.low)]
    weakest = min(gains, key=lambda name: gains[name].low, default=None)
    if overflowed:
        weakest = overflowed[0]

    if missing:
        name, why = next(iter(missing.items()))
        verdict, reason = "inconclusive", f"{name} is missing: {why}"
    elif weakest is None:
        verdict, reason = "inconclusive", "no control"
    elif n < LEAST_UNITS:
        verdict, reason = "inconclusive", f"only {n} {unit}"
    elif overflowed:
        verdict, reason = "inconclusive", f"the gain over {weakest} is not a number"
    else:
        is_gain = gains[weakest].low > ROUNDING * np.abs(measured).mean()
        verdict = "supported" if is_gain else "not supported"
        reason = f"gain over {weakest}: {gains[weakest]}"
    reason += "".join(f"; rests on {many} distinct {name}" for name, many in rests_on.items())
    return {"verdict": verdict, "reason": reason, "gain": gains.get(weakest), "weakest": weakest}


def signals(scores, unit, against=None, groups=None, lower=False, clusters=None):
    """Fields of a Claim: the native dictionary beats scores.gauges (K, n) and the rivals in `against`."""
    found, gains = compared(scores, unit, against, groups, lower, clusters)
    sign = -1 if lower else 1
    means = np.asarray(scores.gauges, float).mean(1)  # (K,)
    n_gauges = len(means)
    beaten = sign * means < sign * np.mean(scores.native)  # one that is not a number is not beaten
    p = float((1 + (~beaten).sum()) / (n_gauges + 1))
    plural = PLURAL[scores.gauge]
    beats = bool(p <= 0.05)
    many = n_gauges if beaten.all() else f"{beaten.sum()} of {n_gauges}"
    ranked = f"beats {many} {plural} (p = {p:.2g})"

    if found["n"] < LEAST_UNITS or n_gauges < N_GAUGES:
        verdict, reason = "inconclusive", f"only {found['n']} {unit}, {n_gauges} {plural}"
    elif scores.missing and found["verdict"] == "inconclusive":
        verdict, reason = "inconclusive", found["reason"]
    elif not beats:
        verdict, reason = "not supported", f"random {plural} do as well: {ranked}"
    elif found["controls"] and found["verdict"] != "supported":
        verdict, reason = found["verdict"], f"{ranked}, but: {found['reason']}"
    else:
        also = f"; {found['reason']}" if found["controls"] else ""
        verdict, reason = "supported", f"{ranked}{also}"

    def asked(of, first=None):
        """The Outcome against rivals whose names begin so, unless `first`, (verdict, reason), decides it."""
        some = {name: gain for name, gain in gains.items() if name.startswith(of)}
        part = judged(some, scores.native, found["n"], unit, found["rests_on"])
        if not some:
            part["reason"] = "none of these was measured"
        if first is not None and (first[0] != "supported" or not some):
            part |= {"verdict": first[0], "reason": first[1]}
        return Outcome(measured=found["measured"], **part)

    if n_gauges < N_GAUGES or found["n"] < LEAST_UNITS:
        ranking = ("inconclusive", reason)
    else:
        ranking = ("supported" if beats else "not supported", ranked)
    return found | {
        "kind": "signals",
        "questions": {
            "privileged": asked("pca", ranking),
            "worth training for": asked("baseline"),
        },
        "verdict": verdict,
        "reason": reason,
        "gauge": scores.gauge,
        "n_gauges": n_gauges,
        "gauges": over_gauges(means),
        "beats_gauges": beats,
        "p": p,
    }


def gauge(scores, unit, groups=None):
    """Fields of a Claim that describes: the value in the learned gauge, in each rival space, in others."""
    means = np.asarray(scores.gauges, float).mean(1)  # (K,)
    drawn = over_gauges(means)
    measured = estimate(scores.native, groups)
    n = len(scores.native) if groups is None else len(np.unique(groups))
    spread = f"{PLURAL[scores.gauge]} from {drawn.low:.4g} to {drawn.high:.4g}"
    return {
        "kind": "gauge",
        "verdict": "inconclusive" if n < LEAST_UNITS else "description",
        "reason": f"only {n} {unit}" if n < LEAST_UNITS else f"{measured.value:.4g}; {spread}",
        "unit": unit,
        "n": n,
        "measured": measured,
        "controls": {name: estimate(values, groups) for name, values in scores.rivals.items()},
        "gauge": scores.gauge,
        "n_gauges": len(means),
        "gauges": drawn,
    }


def over_gauges(means):
    """Mean, smallest and largest of the means (K,) over random gauges, an Estimate."""
    return Estimate(float(means.mean()), float(means.min()), float(means.max()))


def weaker(outcomes):
    """Fields of a Claim that holds only if it holds in each of {name: fields}: those of the weakest outcome.

    Weakest: not supported before inconclusive before supported, then the gain with the lowest lower end in
    units of the mean measured size.
    """

    def strength(name):
        found = outcomes[name]
        gain = found.get("gain")
        low = -np.inf if gain is None or np.isnan(gain.low) else gain.low
        return VERDICTS.index(found["verdict"]), low / max(abs(found["measured"].value), 1e-30)

    weakest = min(outcomes, key=strength)
    parts = [f"{name}: {found['verdict']}, {found['reason']}" for name, found in outcomes.items()]
    also = {name: Outcome(**{key: found.get(key) for key in OUTCOME}) for name, found in outcomes.items()}
    fields = outcomes[weakest] | {"reason": ". ".join(parts), "outcomes": also, "decided_by": weakest}
    if asked := [found["questions"] for found in outcomes.values() if "questions" in found]:
        fields["questions"] = {
            question: min((part[question] for part in asked), key=lambda o: VERDICTS.index(o.verdict))
            for question in asked[0]
        }
    return fields


def below(values, limit, unit, controls=None):
    """Is the mean of values (n,) below `limit`? By a t interval over few units. Fields of a Claim."""
    found = t_interval(values)
    is_below = found.high < limit
    if len(values) < 3:
        verdict, reason = "inconclusive", f"only {len(values)} {unit}"
    else:
        verdict = "supported" if is_below else "not supported"
        reason = f"the interval is {'' if is_below else 'not '}below {limit:g}"
    return {
        "kind": "effect",
        "verdict": verdict,
        "reason": reason,
        "unit": unit,
        "n": len(values),
        "measured": found,
        "controls": controls or {},
        "lower": True,
    }


def missing(kind, reason):
    """Nothing was measured, for a reason. Fields of a Claim."""
    nothing = Estimate(None, None, None)
    fields = {"verdict": "inconclusive", "reason": reason, "unit": "units", "n": 0}
    return {"kind": kind, "measured": nothing, "controls": {}} | fields


def make_claim(experiment, key, sentence, fields, published=""):
    """The Claim of an experiment with this key."""
    return Claim(experiment=experiment, key=key, claim=sentence, published=published, **fields)
