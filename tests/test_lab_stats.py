"""Statistics: intervals cover the truth as often as stated; the rest by hand or closed form."""

import numpy as np
import pytest

from experiments.lab.stats import (
    benjamini_hochberg,
    estimate,
    gini,
    kurtosis,
    regress_out,
    t_interval,
)


def test_the_interval_covers_the_truth_as_often_as_stated():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(300):
        e = estimate(rng.exponential(size=80), seed=i)
        hits += e.low <= 1 <= e.high
    assert 0.90 <= hits / 300 <= 0.98


def test_groups_widen_the_interval():
    """Ten equal values from each of 20 groups hold no more information than 20 values."""
    values = np.repeat(np.random.default_rng(0).standard_normal(20), 10)
    alone = estimate(values)
    grouped = estimate(values, np.repeat(np.arange(20), 10))
    assert (grouped.high - grouped.low) > 2 * (alone.high - alone.low)
    assert grouped.value == pytest.approx(values.mean())


def test_the_interval_over_clusters_covers_the_truth_where_that_over_units_does_not():
    """30 signals of 2 to 19 prompts each; half of the variance is between signals."""
    rng = np.random.default_rng(0)
    hits = {"clusters": 0, "units": 0}
    for i in range(200):
        cluster = np.repeat(np.arange(30), rng.integers(2, 20, 30))
        values = rng.standard_normal(30)[cluster] + rng.standard_normal(len(cluster))
        for name, e in {
            "clusters": estimate(values, None, cluster, seed=i),
            "units": estimate(values),
        }.items():
            hits[name] += e.low <= 0 <= e.high
    assert 0.88 <= hits["clusters"] / 200 and hits["units"] / 200 < 0.7


def test_one_cluster_is_resampled_within():
    values = np.random.default_rng(0).standard_normal(50)
    assert estimate(values, None, np.zeros(50)) == estimate(values)


def test_no_value_gives_no_number():
    found = estimate([])
    assert np.isnan([found.value, found.low, found.high]).all()


def test_t_interval_by_hand():
    found = t_interval(np.array([1.0, 2.0, 3.0]))
    half = 4.3027 / np.sqrt(3)  # quantile of t with two degrees of freedom, times the standard error
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half), abs=1e-3)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_values_bound_nothing(n):
    found = t_interval(np.arange(n))
    assert (found.low, found.high) == (-np.inf, np.inf)


def test_a_regression_takes_out_what_the_nuisance_and_its_square_explain():
    rng = np.random.default_rng(0)
    nuisance = rng.normal(size=200)
    noise = rng.normal(size=(200, 3))
    explained = 5 + nuisance[:, None] * [1, -2, 0] + nuisance[:, None] ** 2 * [0, 3, 1]
    found = regress_out(explained + noise, nuisance)
    assert np.abs(regress_out(explained, nuisance)).max() < 1e-9
    assert np.allclose(found, regress_out(noise, nuisance))
    assert np.abs(found.T @ np.vander(nuisance, 3)).max() < 1e-9


def test_benjamini_hochberg_by_hand():
    p = np.array([0.01, 0.02, 0.03, 0.04, 0.05])
    assert benjamini_hochberg(p).all()
    assert benjamini_hochberg([0.011, 0.9, 0.5, 0.7, 0.6]).sum() == 0
    assert benjamini_hochberg([0.009, 0.9, 0.5, 0.7, 0.6]).tolist() == [True] + [False] * 4


def test_gini_and_kurtosis_of_known_rows():
    rng = np.random.default_rng(0)
    gauss = rng.standard_normal((20, 20000))
    one = np.eye(1, 1000)
    assert gini(gauss).mean() == pytest.approx(np.sqrt(2) - 1, abs=5e-3)
    assert gini(np.ones((1, 50)))[0] == pytest.approx(0)
    assert gini(one)[0] == pytest.approx(0.999)
    assert kurtosis(gauss).mean() == pytest.approx(0, abs=0.05)
    assert kurtosis(rng.laplace(size=(20, 20000))).mean() == pytest.approx(3, abs=0.2)
