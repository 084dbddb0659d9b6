"""Average ranks, against scipy's."""

import numpy as np
import pytest
from scipy.stats import rankdata

from sae_runner.ranks import average_ranks


@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_scipys_with_and_without_ties(seed):
    rng = np.random.default_rng(seed)
    for values in (rng.normal(size=(40, 12)), rng.integers(0, 4, (40, 12)), rng.random(7)):
        np.testing.assert_array_equal(average_ranks(values), rankdata(values, axis=-1))


def test_of_nothing_there_are_none():
    assert average_ranks(np.zeros(0)).shape == (0,)
