"""`openjepa bench evaluate`: features at inference speed, and neighbours among them."""

from __future__ import annotations

import copy
from statistics import median

import torch

from openjepa.bench.clock import Rows, in_turn, spread
from openjepa.engine.device import pick_autocast, pick_device, pick_precision
from openjepa.evaluate.features import EncoderFeatures, View
from openjepa.evaluate.knn import knn_predict
from openjepa.models.encoder import Encoder, Normalise
from openjepa.models.layers import compile_blocks
from openjepa.models.vit import ViT, ViTConfig

BATCH = 32
BANK, QUERIES, CLASSES = 50_000, 5_000, 1_000


def evaluate(repeats: int = 7) -> Rows:
    """ViT-S/16 features of the last four blocks, and k-NN among 50,000 of them."""
    device = pick_device("auto")
    precision = pick_precision("auto", device)
    autocast = pick_autocast(precision, device)
    config = ViTConfig(size="S")
    encoder = Encoder(ViT(config), Normalise((0.5,) * 3, (0.5,) * 3), "target_encoder").to(device).eval()
    compiled = copy.deepcopy(encoder)
    compile_blocks(compiled.vit.blocks)
    view = View(config.image_size, config.channels)
    images = torch.randint(256, (BATCH, 3, *config.image_size), dtype=torch.uint8)

    def as_in_training() -> None:
        """With autograd's record, in float32."""
        encoder.vit(encoder.normalise(images.to(device))).mean(1)

    times = in_turn(
        {
            "features, as in training": as_in_training,
            f"features, {precision}": lambda: EncoderFeatures(encoder, view, autocast, precision)(images),
            f"features, {precision}, compiled": lambda: EncoderFeatures(compiled, view, autocast, precision)(images),
        },
        repeats,
        2,
    )
    bank, queries = torch.randn(BANK, config.dim), torch.randn(QUERIES, config.dim)
    labels = torch.randint(CLASSES, (BANK,))
    knn = {f"k-NN among {BANK:,}": lambda: knn_predict(bank, labels, queries, CLASSES, device=device)}
    neighbours = in_turn(knn, repeats)
    return [
        {"what": what, "images_per_s": count / median(taken), **spread(taken)}
        for found, count in ((times, BATCH), (neighbours, QUERIES))
        for what, taken in found.items()
    ]
