"""The README's blocks say what the results hold: the finding first, in words."""

from paper import reading, readme
from tests.paper_fixtures import RUN, change_claims, change_results, copy_results


def test_the_readme_shows_these_results():
    """The README's blocks are what paper/build.py writes from the committed results."""
    assert readme.readme() == readme.README.read_text(encoding="utf-8"), "run python paper/build.py"


def test_the_block_says_its_finding_in_words_first_and_in_lines_that_fit():
    block = readme.results_block()
    finding, _ = block.split("\n!", 1)
    assert finding.startswith("**The learned signals") and len(finding.split()) > 50
    text = [line for line in block.splitlines() if not line.startswith("|")]
    assert len(text) <= 40 and len(readme.speed_block().splitlines()) <= 26
    for line in (block + readme.speed_block()).splitlines():
        assert line.startswith("|") or len(line) <= 160, line


def test_the_trained_model_stands_beside_the_small_one_with_what_its_results_hold(tmp_path, monkeypatch):
    """Counts and verdicts follow the results of either; every published claim has a line."""
    results = copy_results(tmp_path, monkeypatch)
    trained = next(iter(reading.gauges().values()))
    change_claims(results, lambda claim: setattr(claim, "verdict", "not supported"))
    change_results(results.glob(f"{trained}/*.json"), lambda claim: setattr(claim, "verdict", "supported"))
    found = reading.claims(trained).values()
    n_effects, n_signals = (len(reading.of_kind(kind, found)) for kind in ("effect", "signals"))
    text = " ".join(readme.trained_block().split())
    assert f"{n_effects} of {n_effects} effect claims are supported; on `{RUN}`, 0 of" in text
    assert f"support {n_signals} of {n_signals}, the learned signals of `{RUN}` 0 of" in text
    lines = [line for line in readme.trained_block().splitlines() if line.startswith("| `")]
    assert len(lines) == sum(bool(claim.published) for claim in found)
    assert all(", supported: " in line and ", not supported: " in line for line in lines)
    assert all(line.startswith("|") or len(line) <= 160 for line in readme.trained_block().splitlines())


def test_what_the_block_says_follows_the_results(tmp_path, monkeypatch):
    """Its sentences count what is there; those that would not hold are left out."""
    results = copy_results(tmp_path, monkeypatch)

    def fail(claim):
        claim.verdict = "not supported"
        claim.beats_gauges = None if claim.gauge is None else False

    def win(claim):
        claim.verdict = "supported"
        claim.beats_gauges = None if claim.gauge is None else True

    n = len(reading.of_kind("signals", reading.claims(RUN).values()))
    change_claims(results, fail)
    block = " ".join(readme.results_block().split())
    assert block.startswith(
        f"**The learned signals are better than every alternative in 0 of {n} comparisons"
    )
    assert f"In {n}, random rotations of the signals" in block
    n_described = len(reading.claims(RUN)) - len(reading.judged(reading.claims(RUN).values()))
    assert n_described and f"{n_described} further comparisons of cosines" in block
    assert "Supported signals claims" not in block and "do not clearly beat" not in block
    assert "therefore be privileged" in block  # the plain GPT does as well as none
    change_claims(results, win)
    block = " ".join(readme.results_block().split())
    assert block.startswith(
        f"**The learned signals are better than every alternative in {n} of {n} comparisons"
    )
    assert "do as well" not in block and "do not clearly beat" not in block
    assert "Supported signals claims" in block
    change_results(results.glob(f"{reading.SUBJECT['coordinates']}/*.json"), fail)
    assert "therefore be privileged" not in readme.results_block()


def test_it_says_whether_a_plain_model_was_a_rival(tmp_path, monkeypatch):
    results = copy_results(tmp_path, monkeypatch)
    change_results(results.glob(f"{RUN}/*.json"), lambda claim: claim.controls.pop("baseline", None))
    assert "a plain GPT do as well" not in " ".join(readme.results_block().split())
    change_results(
        results.glob(f"{RUN}/*.json"), lambda claim: claim.controls.update(baseline=claim.measured)
    )
    block = " ".join(readme.results_block().split())
    assert "the embedding itself or a plain GPT do as well" in block
