"""The README's blocks say what the results hold: the finding first, in words."""

from experiments.lab.results import read_result, to_json
from paper import reading, readme
from tests.paper_fixtures import RUN, change_claims, copy_results


def test_the_readme_shows_these_results():
    """The README's two blocks are what paper/build.py writes from the committed results."""
    assert readme.readme() == readme.README.read_text(encoding="utf-8"), "run python paper/build.py"


def test_the_block_says_its_finding_in_words_first_and_in_lines_that_fit():
    block = readme.results_block()
    finding, _ = block.split("\n|", 1)
    assert finding.startswith("**The learned signals") and len(finding.split()) > 50
    text = [line for line in block.splitlines() if not line.startswith("|")]
    assert len(text) <= 40 and len(readme.speed_block().splitlines()) <= 26
    for line in (block + readme.speed_block()).splitlines():
        assert line.startswith("|") or len(line) <= 160, line


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
    for words in ("Supported signals claims", "do not clearly beat", "by construction"):
        assert words not in block
    assert "therefore be privileged" in block  # the plain GPT does as well as none
    change_claims(results, win)
    block = " ".join(readme.results_block().split())
    assert block.startswith(
        f"**The learned signals are better than every alternative in {n} of {n} comparisons"
    )
    assert "do as well" not in block and "do not clearly beat" not in block
    assert "Supported signals claims" in block and "by construction in 7 of" in block
    for path in results.glob(f"{reading.SUBJECT['coordinates']}/*.json"):
        result = read_result(path)
        for claim in result.claims:
            fail(claim)
        path.write_text(to_json(result), encoding="utf-8")
    assert "therefore be privileged" not in readme.results_block()
