"""Claims about the order of an epoch: every image once, the same for whoever asks, in no memory."""

import tracemalloc

import numpy as np
import pytest

from openjepa.data import order as order_module
from openjepa.data.order import LISTED, Feistel, epoch_order
from openjepa.rng import permutation


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 1000, 4097, 100_003])
def test_a_computed_order_shows_every_image_once(n):
    found = Feistel(0, "order 0", n)[np.arange(n)]
    assert found.dtype == np.int64
    assert (np.bincount(found, minlength=n) == 1).all()


def test_more_images_than_are_listed_come_once_each(monkeypatch):
    monkeypatch.setattr(order_module, "LISTED", 2**16)
    n = 2**16 + 1
    assert isinstance(epoch_order(0, "order", 0, n), Feistel)
    assert (np.bincount(epoch_order(0, "order", 0, n)[np.arange(n)], minlength=n) == 1).all()


def test_fewer_images_keep_the_order_they_always_had():
    assert np.array_equal(epoch_order(3, "order", 2, 1000), permutation(3, "order", 2, 1000))


def test_any_place_is_known_without_the_others():
    n = 14_000_000
    places = np.array([0, 5, n // 2, n - 1])
    found = epoch_order(0, "order", 7, n)
    assert isinstance(found, Feistel)
    assert np.array_equal(found[places], epoch_order(0, "order", 7, n)[places])
    assert [int(found[int(place)]) for place in places] == found[places].tolist()


def test_epochs_and_seeds_have_orders_of_their_own():
    n, places = 14_000_000, np.arange(1000)
    others = [epoch_order(seed, "order", epoch, n)[places] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (others[a] == others[b]).mean() < 0.01


def test_a_computed_order_is_as_even_as_chance():
    """Of the first tenth of an epoch, each hundredth of the images has its share: chi-square with 99 degrees of freedom."""
    n = 2_000_000
    counts = np.bincount(Feistel(0, "order 0", n)[np.arange(n // 10)] // (n // 100), minlength=100)
    expected = n / 1000
    assert 50 < ((counts - expected) ** 2 / expected).sum() < 160  # below 1e-4 by chance on either side


def test_neighbouring_places_hold_unrelated_images():
    n = 2_000_000
    found = Feistel(0, "order 0", n)[np.arange(20_000)].astype(float)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03


def test_the_order_of_a_large_set_takes_no_memory():
    tracemalloc.start()
    try:
        found = epoch_order(0, "order", 0, 10 * LISTED)
        found[np.arange(256)]
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()
