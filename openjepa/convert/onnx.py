"""The encoder as an ONNX graph that normalises images itself; the batch is free, the image size fixed."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from openjepa.errors import needs
from openjepa.models.encoder import Encoder

OPSET = 18
LARGEST = 1_900_000_000  # bytes in one file; above, the weights lie beside it


class Graph(nn.Module):
    """images float32 [B, C, H, W] in [0, 1] to patches [B, N, D] and their mean [B, D]."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.vit, self.normalise = encoder.vit, encoder.normalise

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.vit(self.normalise(images))
        return patches, patches.mean(1)


def write(file: Path, encoder: Encoder) -> None:
    """Raises UserError if the extra is missing."""
    with needs("onnx"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    config = encoder.vit.config
    images = torch.zeros(2, config.channels, *config.image_size)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # the exporter talks at length
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            Graph(encoder).eval(),
            (images,),
            file,
            input_names=["images"],
            output_names=["patches", "mean"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            external_data=sum(p.nbytes for p in encoder.parameters()) > LARGEST,
            verbose=False,
        )
