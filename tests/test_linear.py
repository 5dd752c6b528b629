"""Claims about probes on features: equal to independent implementations, blind to the test set while choosing."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from timm.optim import Lars

from openjepa.errors import UserError
from openjepa.evaluate import knn, linear
from openjepa.evaluate.features import Features
from openjepa.evaluate.knn import knn_predict
from openjepa.evaluate.linear import Cached, Head, LinearConfig, Probe

CPU = torch.device("cpu")
FAST = LinearConfig(epochs=10, min_steps=600)


def clusters(
    n: int, classes: int = 4, d: int = 12, noise: float = 1.2, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, d))
    labels = rng.integers(0, classes, n)
    return torch.from_numpy(centres[labels] + noise * rng.normal(size=(n, d))).float(), torch.from_numpy(labels)


def held(x: torch.Tensor) -> Features:
    """Features [n, D] or [n, layers, D] as the store gives them."""
    return Features((x if x.ndim == 3 else x[:, None]).numpy(), np.arange(len(x)))


def feed(x: torch.Tensor, labels: torch.Tensor, **more: object) -> Cached:
    return Cached(held(x), np.arange(len(x)), labels, ["last"], 0, **more)


def probe(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, config: LinearConfig = FAST) -> linear.LinearResult:
    return Probe(config, held(x), y, 4, CPU).run(held(z))


# ---------------------------------------------------------------- k-NN


@pytest.mark.parametrize("k", [1, 10, 50])
def test_knn_equals_scikit_learn(k, monkeypatch):
    monkeypatch.setattr(knn, "QUERIES", 37)
    monkeypatch.setattr(knn, "BANK", 64)  # compared piece by piece
    (x, y), (z, _) = clusters(400), clusters(150, seed=1)
    x, z = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(z, dim=1)

    def votes(distance):  # cosine distance to the weight of a vote
        return np.exp((1 - distance) / 0.07)

    reference = KNeighborsClassifier(k, metric="cosine", weights=votes, algorithm="brute").fit(x, y).predict(z)
    assert (knn_predict(x, y, z, 4, ks=(k,))[k].numpy() == reference).all()


# ---------------------------------------------------------------- heads


def test_the_probe_reaches_logistic_regression():
    (x, y), (z, _) = clusters(4000), clusters(2000, seed=1)
    reference = LogisticRegression(C=1e4, max_iter=1000).fit(x, y).predict(z)
    predictions = probe(x, y, z, LinearConfig()).predictions
    assert (predictions.numpy() == reference).mean() > 0.97


@pytest.mark.parametrize("norm", ["none", "batch", "batch_plain"])
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_heads_trained_together_equal_torch_and_timm_trained_alone(norm, optimizer):
    """Five steps of batch norm, linear layer and optimiser, by the libraries: the same weights to rounding."""
    x, y = clusters(64)
    x = 3 * x + 1
    heads = [Head("last", norm, 1.0, 0.0), Head("last", norm, 0.3, 5e-2), Head("last", norm, 0.1, 5e-4)]
    config = LinearConfig(
        optimizer=optimizer, nesterov=optimizer == "sgd", batch_size=32, initial_std=0.1, decay_bias=True
    )
    group = linear.Group(heads, 12, 4, config, CPU, seed=3)
    start = group.parameters["weight"][:, 0].clone()
    for step in range(5):
        part = slice(32 * (step % 2), 32 * (step % 2) + 32)
        group.step(x[part], y[part], 1.0, half=False)
    for i, head in enumerate(heads):
        affine = norm == "batch"
        normalise = (
            torch.nn.Identity() if norm == "none" else torch.nn.BatchNorm1d(12, 1e-5 if affine else 1e-6, affine=affine)
        )
        layer = torch.nn.Linear(12, 4)
        layer.weight.data, layer.bias.data = start.T.clone(), torch.zeros(4)
        free = [*normalise.parameters()]
        if optimizer == "sgd":
            groups = [{"params": layer.parameters(), "weight_decay": head.weight_decay}, {"params": free}]
            library = torch.optim.SGD([g for g in groups if g["params"]], head.lr, momentum=0.9, nesterov=True)
        else:  # what is no matrix is neither adapted nor decayed
            weight = {"params": [layer.weight], "weight_decay": head.weight_decay, "always_adapt": True}
            library = Lars([weight, {"params": [layer.bias, *free]}], head.lr, momentum=0.9, trust_coeff=0.001)
        for step in range(5):
            part = slice(32 * (step % 2), 32 * (step % 2) + 32)
            library.zero_grad()
            torch.nn.functional.cross_entropy(layer(normalise(x[part])), y[part]).backward()
            library.step()
        assert torch.allclose(group.parameters["weight"][:, i], layer.weight.T, atol=2e-5)
        assert torch.allclose(group.parameters["bias"][0, i], layer.bias, atol=2e-5)
        normalise.eval()
        assert torch.allclose(group.logits(x)[:, i], layer(normalise(x)), atol=2e-4)


def test_products_in_half_precision_change_little():
    (x, y), (z, t) = clusters(2000), clusters(1000, seed=1)
    heads = LinearConfig().heads[:4]
    config = replace(FAST, norms=("none",))
    scores = []
    for half in (False, True):
        (group,) = linear.fit(feed(x, y), [replace(h, norm="none") for h in heads], config, 4, CPU, 0, half)
        scores.append((group.logits(z).argmax(-1) == t[:, None]).float().mean(0))
    assert torch.allclose(*scores, atol=0.01)


def test_wide_features_give_the_same_probe_in_their_span():
    (x, y), (z, _) = clusters(60, d=200), clusters(50, d=200, seed=1)
    head = [Head("last", "standard", 0.03, 5e-4)]
    standard = linear.Standard(held(x), np.arange(60), "last")
    assert standard.width == 60
    rotated = linear.fit(feed(x, y, standards={"last": standard}), head, FAST, 4, CPU, 0)[0].logits(standard(z))
    wide = linear.Standard(held(x), np.arange(60), "last")
    wide.basis, wide.width = None, 200
    plain = linear.fit(feed(x, y, standards={"last": wide}), head, FAST, 4, CPU, 0)[0].logits(wide(z))
    assert torch.allclose(rotated, plain, atol=1e-3)


def test_rates_fall_as_told():
    steps = LinearConfig(milestones=(2, 4), warmup_epochs=1)
    assert [round(linear.rate(s, 60, 10, steps), 6) for s in (0, 5, 10, 19, 20, 39, 40)] == [
        0, 0.5, 1, 1, 0.1, 0.1, 0.01]  # fmt: skip
    cosine = [linear.rate(s, 100, 10, LinearConfig(final=0.01)) for s in range(100)]
    assert cosine[0] == 1
    assert all(a > b for a, b in pairwise(cosine))
    assert cosine[50] == pytest.approx(0.505)
    assert cosine[-1] == pytest.approx(0.01, abs=1e-3)


# ---------------------------------------------------------------- the choice


def test_the_head_is_chosen_without_the_test_set():
    (x, y), (z, _) = clusters(600), clusters(200, seed=1)
    honest, other = probe(x, y, z), probe(x, y, z.flip(0))
    assert honest.chosen == other.chosen
    assert honest.sweep == other.sweep
    assert torch.equal(honest.predictions, other.predictions.flip(0))


def test_both_feature_sets_compete():
    (x, y), (z, _) = clusters(600), clusters(300, seed=1)
    noise = torch.randn(900, 12, generator=torch.Generator().manual_seed(0))
    train = torch.stack([x, x, x, noise[:600]], 1)  # the last layer says nothing, those before do
    test = torch.stack([z, z, z, noise[600:]], 1)
    result = probe(train, y, test)
    assert result.chosen.features == "concat4"
    assert {head.features for head, _ in result.sweep} == {"last", "concat4"}


def test_validation_and_fitting_share_no_image():
    fitting, validation = linear.split(100, 0.2, seed=0)
    assert sorted([*fitting, *validation]) == list(range(100))
    assert len(validation) == 20
    assert [len(part) for part in linear.split(2, 0.01, seed=0)] == [1, 1]


def test_features_that_do_not_fit_in_memory_give_the_same_probe(monkeypatch):
    (x, y), (z, _) = clusters(300), clusters(100, seed=1)
    inside = probe(x, y, z)
    monkeypatch.setattr(linear, "IN_MEMORY", 0)
    outside = probe(x, y, z)
    assert inside.sweep == outside.sweep
    assert torch.equal(inside.predictions, outside.predictions)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"features": ()}, "one value at least"),
        ({"features": ("first",)}, "unknown 'first'"),
        ({"validation": 1.0}, "between 0 and 1"),
        ({"views": "crop"}, "views none"),
    ],
)
def test_impossible_sweeps_are_refused(values, says):
    with pytest.raises(UserError, match=says):
        LinearConfig(**values)


def test_every_recipe_has_the_papers_heads():
    assert len(linear.RECIPES["imagenet"].heads) == 32
    assert len(linear.RECIPES["mae"].heads) == 1
    assert {head.norm for head in linear.RECIPES["transfer"].heads} == {"none", "batch"}
