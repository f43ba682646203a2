"""Gaps over the dense model: paired by seed, at equal depth and at equal parameters, with planted values."""

import numpy as np
import pytest

from configurator import UserError
from experiments.lab.results import read_result
from experiments.studies import convergence
from tests.lab_fixtures import corpus, tiny
from tests.studies_fixtures import open_study, save_trained, table_of

SIZES = ("2x64", "3x96", "4x128")


def planted(gap):
    """Losses of 5 - 0.1 log(parameters) for dense models, `gap` above it for factored ones, noise by seed."""
    rng = np.random.default_rng(0)
    losses = {}
    for i, size in enumerate(SIZES):
        for kind, parameters in (("dense", 10e6 * 2**i), ("factored", 8e6 * 2**i)):
            for seed in range(3):
                noise = 1 + 0.01 * np.random.default_rng(seed).standard_normal()  # shared by a pair
                loss = (5 - 0.1 * np.log(parameters)) * noise * (1 + (kind == "factored") * gap)
                loss *= 1 + 1e-4 * rng.standard_normal()
                losses[kind, size, seed] = loss, parameters
    return table_of(losses)


def test_gaps_are_paired_by_seed():
    """Noise of 1 % that both models of a seed share does not hide a gap of 2 %."""
    table = planted(0.02)
    expected = (5 - 0.1 * np.log(8e6 * 4)) / (5 - 0.1 * np.log(10e6 * 4)) * 1.02 - 1
    found = convergence.gaps_at_equal_depth(table, "factored", "4x128")
    assert np.allclose(list(found.values()), expected, atol=5e-4)
    del table["factored", "4x128"][1]
    assert list(convergence.gaps_at_equal_depth(table, "factored", "4x128")) == [0, 2]


def test_gap_at_equal_parameters_is_the_planted_one():
    same, extrapolated = convergence.gaps_at_equal_parameters(planted(0.02), "factored", "4x128")
    assert np.allclose(same, 0.02, atol=1e-3) and not extrapolated
    _, extrapolated = convergence.gaps_at_equal_parameters(planted(0.02), "factored", "2x64")
    assert extrapolated


def save_study(folder, seeds=3):
    """Factored runs with a loss 2 % above that of the dense ones."""
    data = corpus(folder / "data", repeats=6)
    for seed in range(seeds):
        for kind, loss in (("factored", 5.1), ("dense", 5.0)):
            model = tiny(seed, vocab=kind)
            save_trained(folder / "runs" / f"{kind}{seed}", model, data, seed, loss + 0.01 * seed)


def test_from_files_to_a_result(tmp_path):
    """A gap of 2 % is below 3 %; one size alone leaves nothing to interpolate between."""
    save_study(tmp_path)
    study = open_study(f"{tmp_path}/runs/*", tmp_path / "results")
    convergence.run(study).save()
    result = read_result(tmp_path / "results" / "experiments" / "convergence" / "result.json")
    equal_depth, equal_parameters = result.claims
    assert equal_depth.key == "equal_depth" and equal_depth.verdict == "supported"
    assert equal_depth.measured.value == pytest.approx(0.02, abs=1e-3)
    assert equal_parameters.key == "equal_parameters" and equal_parameters.verdict == "inconclusive"
    assert result.numbers["factored 2x16"]["equal_depth"]["value"] == equal_depth.measured.value
    assert len(result.runs) == 6


def test_runs_of_one_kind_are_refused(tmp_path):
    save_study(tmp_path, seeds=1)
    with pytest.raises(UserError, match="no factored and dense runs"):
        convergence.run(open_study(f"{tmp_path}/runs/factored*", tmp_path))
