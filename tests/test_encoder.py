"""Claims about inference: features and maps of images of any size."""

import numpy as np
import pytest
import torch

from openjepa.errors import UserError
from openjepa.recipes.exchange import load
from tests.helpers import images


def test_patches_features_and_maps_are_the_same_numbers(trained):
    encoder = load(trained)
    x = images(3, 16, 48)  # not the size it trained at
    assert encoder(x).shape == (3, 4 * 12, 24)
    assert encoder.features(x, layers=2).shape == (3, 2 * 24)
    assert encoder.features(x).shape == (3, 2 * 24)  # four asked for, two there
    assert torch.equal(encoder.features(x, layers=1), encoder(x).mean(1))
    assert torch.equal(encoder.features(x, layers=1, pool="none"), encoder(x))
    first, last = encoder.intermediate(x, layers=[0, -1])
    assert first.shape == last.shape == (3, 24, 4, 12)
    assert torch.equal(last.flatten(2).transpose(1, 2), encoder(x))
    both = encoder.features(x, layers=2, pool="none")
    assert torch.equal(both[..., :24], first.flatten(2).transpose(1, 2))


def test_inner_layers_are_normed_too(trained):
    encoder = load(trained)
    x = images(2, 24, 40)
    (first,) = encoder.intermediate(x, layers=[0])
    raw = encoder.vit.blocks[0](encoder.vit.embed(encoder.normalise(x)))
    assert torch.allclose(first.flatten(2).transpose(1, 2), encoder.vit.norm(raw), atol=1e-6)


def test_images_of_any_number_type_are_the_same_images(trained):
    encoder = load(trained)
    whole = (images(2, 24, 40) * 255).to(torch.uint8)
    expected = encoder(whole)
    assert torch.allclose(encoder(whole / 255), expected, atol=1e-5)
    assert torch.allclose(encoder(whole.double() / 255), expected, atol=1e-5)
    assert (encoder.bfloat16()(whole / 255).float() - expected).abs().max() < 0.1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (torch.zeros(1, 3, 18, 40), "do not divide"),
        (torch.zeros(1, 3, 0, 40), "do not divide"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int64), "give uint8"),
        (torch.zeros(3, 16, 16), r"\[batch, channels, height, width\]"),
        (torch.zeros(1, 1, 16, 16), "3 channels"),
        (torch.zeros(1, 16, 16, 3), "3 channels"),
        (np.zeros((1, 3, 16, 16)), "images are a ndarray"),
        (None, "images are a NoneType"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(trained, wrong, says):
    with pytest.raises(ValueError, match=says):
        load(trained)(wrong)


def test_layers_and_pools_that_are_not_there(trained):
    encoder, x = load(trained), images(1, 24, 40)
    with pytest.raises(ValueError, match="this encoder has 2"):
        encoder.intermediate(x, layers=[2])
    with pytest.raises(ValueError, match=r"give a list, such as \[1\]"):
        encoder.intermediate(x, layers=1)
    for wrong in ({"layers": 0}, {"pool": "max"}):
        with pytest.raises(ValueError, match="at least one layer"):
            encoder.features(x, **wrong)


def test_a_run_knows_what_it_is(trained):
    for more in ({"heads": 2}, {"image_size": 32}):
        with pytest.raises(UserError, match="knows its heads and image size"):
            load(trained, **more)
