"""Data sets that torchvision knows."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from openjepa.data.decode import Raw
from openjepa.data.sources import Source, cache_folder
from openjepa.errors import UserError, first_line, nearest


class TorchvisionSource(Source):
    """torchvision:NAME[:SPLIT], downloaded to the cache."""

    def __init__(self, rest: str) -> None:
        import torchvision.datasets as library

        name, _, split = rest.partition(":")
        if name not in library.__all__:
            raise UserError(f"data 'torchvision:{rest}': no such data set{nearest(name, library.__all__)}")
        kind = getattr(library, name)
        which: dict[str, Any] = {"split": split or "train"}
        if "train" in inspect.signature(kind).parameters:
            if split not in ("", "train", "test"):
                raise UserError(f"data 'torchvision:{rest}': {name} has the splits train and test")
            which = {"train": split != "test"}
        try:
            self.data = kind(root=str(cache_folder() / "torchvision"), download=True, **which)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"data 'torchvision:{rest}': {first_line(error)}") from error
        self.spec = rest
        targets = next((getattr(self.data, n) for n in ("targets", "_labels", "labels") if hasattr(self.data, n)), None)
        self.labels, self.classes = {}, {}
        if targets is not None:
            self.labels["label"] = np.array(targets, dtype=np.int64)
            count = int(self.labels["label"].max()) + 1
            self.classes["label"] = [str(c) for c in getattr(self.data, "classes", range(count))]

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> Raw:
        image: Raw = self.data[index][0]
        return image

    def name(self, index: int) -> str:
        return f"torchvision:{self.spec} image {index}"
