"""Intervals over a few seeds, and their verdicts."""

import numpy as np
import pytest

from experiments.lab import claims
from experiments.lab.stats import t_interval


def test_t_interval_and_its_verdicts():
    found = t_interval(np.array([1.0, 2.0, 3.0]))
    assert (found.value, found.low) == (pytest.approx(2), pytest.approx(2 - 4.3027 / np.sqrt(3), abs=1e-3))
    assert claims.below(np.array([-1.0, -1.1, -0.9]), 0.0, "seeds")["verdict"] == "supported"
    assert claims.below(np.array([-1.0, 1.1, -0.9]), 0.0, "seeds")["verdict"] == "not supported"
    assert claims.below(np.array([-1.0, -1.1]), 0.0, "seeds")["verdict"] == "inconclusive"
