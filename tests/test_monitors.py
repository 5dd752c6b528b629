import pytest
import torch

from openjepa.engine.monitors import collapse_warning, effective_rank, feature_statistics, weight_distance


def test_effective_rank_against_known_matrices():
    orthogonal = torch.linalg.qr(torch.randn(50, 8))[0]
    assert effective_rank(orthogonal).item() == pytest.approx(8, rel=1e-3)
    one = torch.randn(50, 1) @ torch.randn(1, 8)
    assert effective_rank(one).item() == pytest.approx(1, abs=0.05)
    # singular values 3 and 1: p = 3/4, 1/4, entropy 0.5623
    two = torch.diag(torch.tensor([3.0, 1.0]))
    assert effective_rank(two).item() == pytest.approx(1.7548, rel=1e-3)


def test_features_that_differ_between_images_are_alive():
    torch.manual_seed(0)
    statistics = feature_statistics(torch.randn(32, 16, 24))
    assert statistics["feature_std"] > 0.8
    assert statistics["feature_rank"] > 15
    assert abs(statistics["feature_cosine"]) < 0.1
    assert collapse_warning(statistics, 32, 24) is None


def test_a_handful_of_images_gives_no_false_alarm():
    one = feature_statistics(torch.randn(1, 16, 24))
    assert collapse_warning(one, 8, 24)
    assert collapse_warning(one, 1, 24) is None


def test_the_rank_is_taken_over_all_images():
    first_half_dead = torch.randn(64, 64, 24)
    first_half_dead[:32] = 0.01 * torch.randn(32, 64, 1)
    assert feature_statistics(first_half_dead)["feature_rank"] > 15


@pytest.mark.parametrize("kind", ["constant", "position only", "one direction"])
def test_collapse_is_seen_and_named(kind):
    torch.manual_seed(0)
    noise = 0.01 * torch.randn(32, 16, 64)
    if kind == "constant":
        features = torch.randn(64).expand(32, 16, 64) + noise
    elif kind == "position only":
        features = torch.randn(16, 64).expand(32, 16, 64) + noise
    else:
        features = torch.randn(32, 16, 1) * torch.randn(64) + 0.001 * torch.randn(32, 16, 64)
    warning = collapse_warning(feature_statistics(features), 32, 64)
    assert warning
    assert "schedule.ema" in warning


def test_weight_distance_is_relative():
    a, b = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        b.weight.fill_(2.0)
        a.weight.fill_(3.0)
    assert weight_distance(a, b) == pytest.approx(0.5)
