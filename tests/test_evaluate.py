"""Claims about evaluation: equal to independent implementations, blind to the test set while choosing."""

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from openjepa.data.sources import Source, open_source
from openjepa.errors import UserError
from openjepa.evaluate import linear, suite
from openjepa.evaluate.features import Images, extract, raw_pixels
from openjepa.evaluate.knn import knn_predict
from openjepa.evaluate.linear import linear_probe
from openjepa.recipes.pretrain import random_encoder


def clusters(
    n: int, classes: int = 4, d: int = 12, noise: float = 1.2, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, d))
    labels = rng.integers(0, classes, n)
    return torch.from_numpy(centres[labels] + noise * rng.normal(size=(n, d))).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("k", [1, 10, 50])
def test_knn_equals_scikit_learn(k):
    (x, y), (z, _) = clusters(400), clusters(150, seed=1)
    x, z = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(z, dim=1)

    def votes(distance):  # cosine distance to the weight of a vote
        return np.exp((1 - distance) / 0.07)

    reference = KNeighborsClassifier(k, metric="cosine", weights=votes, algorithm="brute").fit(x, y).predict(z)
    assert (knn_predict(x, y, z, 4, ks=(k,), chunk=37)[k].numpy() == reference).all()


def test_the_probe_reaches_logistic_regression():
    (x, y), (z, t) = clusters(4000), clusters(2000, seed=1)
    reference = LogisticRegression(C=1e4, max_iter=1000).fit(x, y).score(z, t)
    assert linear_probe(x[:, None], y, z[:, None], t, 4).accuracy == pytest.approx(reference, abs=0.015)


def test_heads_trained_together_equal_heads_trained_alone():
    x, y = clusters(600)
    heads = [linear.Head("last", 0.1, 0.0), linear.Head("last", 0.01, 5e-4)]
    together, _ = linear.fit(x, y, 4, heads, 0)
    for i, head in enumerate(heads):
        assert torch.allclose(together[:, 4 * i : 4 * i + 4], linear.fit(x, y, 4, [head], 0)[0], atol=1e-5)


def test_wide_features_give_the_same_probe_in_their_span():
    (x, y), (z, _) = clusters(60, d=200), clusters(50, d=200, seed=1)
    heads = [linear.Head("last", 0.03, 5e-4)]
    narrow, narrow_unseen = linear.standardise(x, z)
    assert narrow.shape == (60, 60)
    mean, std = x.mean(0), x.std(0, correction=0)
    outputs = []
    for known, unseen in ((narrow, narrow_unseen), ((x - mean) / std, (z - mean) / std)):
        weights, bias = linear.fit(known, y, 4, heads, 0)
        outputs.append(unseen @ weights + bias)
    assert torch.allclose(*outputs, atol=1e-3)


def test_the_head_is_chosen_without_the_test_set():
    (x, y), (z, t) = clusters(600), clusters(200, seed=1)
    honest = linear_probe(x[:, None], y, z[:, None], t, 4)
    shuffled = linear_probe(x[:, None], y, z[:, None], t.flip(0), 4)
    assert honest.chosen == shuffled.chosen
    assert honest.sweep == shuffled.sweep


def test_both_feature_sets_compete():
    (x, y), (z, t) = clusters(600), clusters(300, seed=1)
    noise = torch.randn(900, 12, generator=torch.Generator().manual_seed(0))
    train = torch.stack([x, x, x, noise[:600]], 1)  # the last layer says nothing, those before do
    test = torch.stack([z, z, z, noise[600:]], 1)
    result = linear_probe(train, y, test, t, 4)
    assert result.chosen.features == "concat4"
    assert {head.features for head, _ in result.sweep} == {"last", "concat4"}


def test_features_are_pooled_normed_layers(tiny, folder):
    encoder = random_encoder(tiny)
    images = Images(open_source(str(folder)), range(6), (32, 32), 3)
    import contextlib

    features = extract(encoder.vit, images, encoder.normalise, contextlib.nullcontext, layers=2, batch_size=4)
    assert features.shape == (6, 2, 24)
    expected = encoder(torch.stack([images[i] for i in range(6)])).mean(1)
    assert torch.allclose(features[:, -1], expected, atol=1e-5)
    assert raw_pixels(images).shape == (6, 1, 32 * 32 * 3)


class Renamed(Source):
    """The folder's images under other class names or labels."""

    def __init__(self, base: Source, classes: list[str] | None = None, labels: np.ndarray | None = None) -> None:
        self.base = base
        self.classes = {"label": classes} if classes else {}
        self.labels = {"label": labels if labels is not None else base.labels["label"]} if classes else {}

    def __len__(self):
        return len(self.base)

    def read(self, index):
        return self.base.read(index)

    def name(self, index):
        return self.base.name(index)


def test_the_suite_scores_encoders_beside_raw_pixels(tiny, folder):
    source = open_source(str(folder))
    encoders = {"pretrained": random_encoder(tiny)}
    quiet = Console(quiet=True)
    results = suite.evaluate(encoders, source, source, ["knn", "linear"], "cpu", "fp32", quiet)
    assert {(r["protocol"], r["of"]) for r in results} == {
        (p, o) for p in ("knn", "linear") for o in ("pretrained", "raw pixels")
    }
    assert all(0 <= r["accuracy"] <= 1 for r in results)
    # blue and red images: raw pixels tell them apart
    assert next(r["accuracy"] for r in results if (r["protocol"], r["of"]) == ("linear", "raw pixels")) == 1.0
    reordered = Renamed(source, ["red", "blue"], 1 - source.labels["label"])
    again = suite.evaluate(encoders, source, reordered, ["knn"], "cpu", "fp32", quiet)
    assert [r["accuracy"] for r in again] == [r["accuracy"] for r in results if r["protocol"] == "knn"]


@pytest.mark.parametrize(
    ("test_classes", "protocols", "says"),
    [
        (["blue", "green"], ["knn"], "such as 'green'"),
        (None, ["knn"], "needs labels"),
        (["blue", "red"], ["knnn"], "did you mean 'knn'"),
    ],
)
def test_mistakes_are_refused(tiny, folder, test_classes, protocols, says):
    source = open_source(str(folder))
    with pytest.raises(UserError, match=says):
        suite.evaluate(
            {"x": random_encoder(tiny)},
            source,
            Renamed(source, test_classes),
            protocols,
            "cpu",
            "fp32",
            Console(quiet=True),
        )
