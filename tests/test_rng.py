import numpy as np

from openjepa.rng import Draws, permutation


def test_a_row_depends_on_its_counter_alone():
    together = Draws(0, "x", np.arange(100)).uniform(7)
    alone = Draws(0, "x", [42]).uniform(7)
    assert np.array_equal(together[42], alone[0])


def test_numbers_go_on_where_they_were():
    whole = Draws(0, "x", [3]).uniform(10)
    draws = Draws(0, "x", [3])
    assert np.array_equal(np.concatenate([draws.uniform(4), draws.uniform(6)], 1), whole)


def test_seeds_purposes_and_counters_give_unrelated_numbers():
    base = Draws(0, "x", np.arange(20_000)).uniform(1)[:, 0]
    for other in (
        Draws(1, "x", np.arange(20_000)),
        Draws(0, "y", np.arange(20_000)),
        Draws(0, "x", np.arange(1, 20_001)),
    ):
        assert abs(np.corrcoef(base, other.uniform(1)[:, 0])[0, 1]) < 0.03  # four standard errors


def test_uniform_is_uniform_in_rows_and_columns():
    x = Draws(5, "x", np.arange(1000)).uniform(100)
    for axis in (0, 1):
        counts = np.stack([np.histogram(v, 10, (0, 1))[0] for v in np.moveaxis(x, axis, 0)[:50]])
        expected = x.shape[axis - 1] / 10
        chi2 = ((counts - expected) ** 2 / expected).sum(1)
        assert chi2.mean() < 9 + 4 * np.sqrt(18 / 50)
    assert 0 <= x.min() < x.max() < 1


def test_integers_reach_both_ends():
    assert set(Draws(0, "x", np.arange(500)).integers(5, 1).ravel()) == {0, 1, 2, 3, 4}


def test_permutations_are_whole_and_differ_by_epoch():
    a, b = permutation(0, "order", 0, 1000), permutation(0, "order", 1, 1000)
    assert sorted(a) == list(range(1000))
    assert (a == b).mean() < 0.02
