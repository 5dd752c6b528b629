"""How good features are, told without labels: RankMe, α-ReQ and LiDAR.

They compare runs of one family, not of several (their papers' caution, and ours): a higher RankMe or LiDAR, and an
α-ReQ nearer to 1, tend to go with a better linear probe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openjepa.errors import UserError

ALPHA_RANGE = (11, 50)  # eigenvalues that the slope is fitted to, from 1: α-ReQ, section 3
LIDAR_DELTA = 1e-4  # added to the within-scatter's diagonal: LiDAR, algorithm 1


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """How many images tell it: RankMe's and α-ReQ's, and LiDAR's with its augmented views of each."""

    images: int = 25600
    lidar_images: int = 1000
    lidar_views: int = 10

    def __post_init__(self) -> None:
        if self.images < 2 or self.lidar_images < 2 or self.lidar_views < 2:
            raise UserError("quality: images, lidar_images and lidar_views are at least 2")


def rankme(features: Tensor) -> float:
    """RankMe (Garrido et al., 2023, arXiv 2210.02885): exp of the entropy of the normalised singular values.

    features: [n, D], as they are (the paper does not centre). Between 1 and min(n, D).
    """
    return entropy_rank(torch.linalg.svdvals(features.double()))


def alpha_req(features: Tensor) -> float:
    """α-ReQ (Agrawal et al., 2022): the slope α of log eigenvalue i of the covariance ~ -α log i.

    features: [n, D]. Fitted to eigenvalues 11 to 50, or to all that are there and above zero.
    """
    centred = features.double() - features.double().mean(0)
    eigenvalues = torch.linalg.svdvals(centred).square() / len(features)
    first, last = ALPHA_RANGE
    kept = eigenvalues[first - 1 : last] if len(eigenvalues) >= last else eigenvalues
    index = torch.arange(1, len(eigenvalues) + 1, dtype=torch.float64)
    x = (index[first - 1 : last] if len(eigenvalues) >= last else index).log()
    alive = kept > eigenvalues[0] * 1e-12
    x, y = x[alive], kept[alive].log()
    if len(x) < 2:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    return float(-(x @ y) / (x @ x))


def lidar(views: Tensor, delta: float = LIDAR_DELTA) -> float:
    """LiDAR (Thilak et al., 2024, arXiv 2312.04000): the entropy rank of the linear-discriminant matrix.

    views: [n, q, D], q augmented views of each of n images; each image is a class of its own. Between 1 and
    min(n - 1, D).
    """
    views = views.double()
    n, q, d = views.shape
    means = views.mean(1)  # n D
    between = (means - means.mean(0)).T @ (means - means.mean(0)) / (n - 1)
    scatter = (views - means[:, None]).flatten(0, 1)
    within = scatter.T @ scatter / (n * (q - 1)) + delta * torch.eye(d, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors * values.rsqrt() @ vectors.T
    return entropy_rank(torch.linalg.eigvalsh(whiten @ between @ whiten).clamp(min=0))


def entropy_rank(values: Tensor) -> float:
    """exp of the entropy of non-negative values that are normalised to sum 1."""
    p = values / values.sum()
    return float(torch.exp(-(p * torch.where(p > 0, p, torch.ones_like(p)).log()).sum()))
