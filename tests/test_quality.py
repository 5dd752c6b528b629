"""Claims about what features are worth without labels, and about what predictions are worth."""

import math

import pytest
import torch
from sklearn.metrics import confusion_matrix

from openjepa.evaluate.quality import alpha_req, lidar, rankme
from openjepa.evaluate.scores import accuracy, bootstrap, dense


def spectrum(values: list[float], n: int = 200) -> torch.Tensor:
    """Centred features [n, D] with these singular values."""
    torch.manual_seed(0)
    x = torch.randn(n, len(values), dtype=torch.float64)
    left = torch.linalg.qr(x - x.mean(0))[0]
    right = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right


def test_rankme_of_known_spectra():
    assert rankme(spectrum([1.0] * 8)) == pytest.approx(8, rel=1e-6)
    assert rankme(spectrum([3.0, 1.0])) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert rankme(spectrum([1.0, 0.0, 0.0])) == pytest.approx(1)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_finds_the_slope_of_a_power_law(alpha):
    eigenvalues = [i**-alpha for i in range(1, 65)]
    assert alpha_req(spectrum([math.sqrt(v) for v in eigenvalues])) == pytest.approx(alpha, rel=1e-6)


def test_lidar_by_hand():
    """Three images in two dimensions: whitened between-scatter diag(4, 1) x (1 / 0.5) has eigenvalue shares 0.8 and 0.2."""
    centres = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    noise = 0.1 * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    views = centres[:, None] + noise[None]
    expected = math.exp(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))
    assert lidar(views, delta=0.0) == pytest.approx(expected, rel=1e-6)
    assert lidar(views + 7, delta=0.0) == pytest.approx(expected, rel=1e-6)
    noisy = views.clone()
    noisy[..., 0] = centres[:, None, 0] + 10 * noise[None, :, 0]  # what changes between views of an image counts less
    assert lidar(noisy, delta=0.0) != pytest.approx(expected, rel=0.01)


def test_lidar_ignores_directions_that_do_not_tell_images_apart():
    torch.manual_seed(0)
    told = torch.randn(50, 1, 3).expand(50, 8, 3)
    views = torch.cat([told + 0.01 * torch.randn(50, 8, 3), torch.randn(50, 8, 13)], dim=2)
    assert 2.5 < lidar(views) < 3.5
    assert rankme(views.flatten(0, 1)) > 12


def test_scores_agree_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels, predictions = (torch.randint(0, 5, (300,), generator=generator) for _ in range(2))
    labels[labels == 3] = 2  # a class without test images
    found = accuracy(predictions, labels, 5)
    assert (dense(found.details["confusion"], 5) == confusion_matrix(labels, predictions, labels=range(5))).all()
    assert found.value == pytest.approx(float((labels == predictions).float().mean()))
    per_class = found.details["per_class"]
    assert per_class[3] is None
    assert per_class[0] == pytest.approx(float((predictions[labels == 0] == 0).float().mean()))
    assert found.details["mean_per_class"] == pytest.approx(sum(s for s in per_class if s is not None) / 4)
    low, high = found.interval
    assert low < found.value < high


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        low, high = bootstrap(torch.rand(500, generator=generator) < 0.7)
        covered += low <= 0.7 <= high
    assert 0.92 < covered / 400 < 0.98
