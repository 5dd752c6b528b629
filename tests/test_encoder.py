"""Claims about inference: features and maps of images of any size."""

import pytest
import torch

from openjepa.recipes.exchange import load
from tests.helpers import images


def test_features_and_maps_on_any_size(trained):
    encoder = load(trained)
    x = images(3, 16, 48)
    assert encoder(x).shape == (3, 4 * 12, 24)
    assert encoder.features(x, layers=2).shape == (3, 2 * 24)
    assert encoder.features(x).shape == (3, 2 * 24)  # four asked for, two there
    assert torch.equal(encoder.features(x, layers=1), encoder(x).mean(1))
    assert torch.equal(encoder.features(x, layers=1, pool="none"), encoder(x))
    first, last = encoder.intermediate(x, layers=[0, -1])
    assert first.shape == last.shape == (3, 24, 4, 12)
    assert torch.equal(last.flatten(2).transpose(1, 2), encoder(x))
    assert not torch.equal(first, last)
    with pytest.raises(ValueError, match="layers"):
        encoder.intermediate(x, layers=[2])
    with pytest.raises(ValueError, match="do not divide"):
        encoder(images(1, 18, 40))
    for wrong in ({"layers": 0}, {"pool": "max"}):
        with pytest.raises(ValueError, match="at least one layer"):
            encoder.features(x, **wrong)
    with pytest.raises(ValueError, match="give uint8"):
        encoder(torch.zeros(1, 3, 16, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[batch, channels, height, width\]"):
        encoder(images(1, 16, 16)[0])
