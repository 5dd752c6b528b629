"""Data sets by name, and suites of them: the paper's tables, and a round of transfer sets.

A set is looked for in a root folder, then where torchvision or the hub has it. In the root it is a folder of its name with
`train` and `val` (or `test`) in it: folders, Parquet files or shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openjepa.errors import UserError, nearest

TESTS = ("val", "validation", "valid", "test")  # what the part that is scored may be called; the first that is there


@dataclass(frozen=True)
class DataSet:
    """Where a set comes from when the root has none, its protocol, and how its images are seen.

    folders: other names it goes by in the root. share: of the longest central crop; 0.875 is "resize 256, crop 224".
    """

    train: str = ""
    test: str = ""
    protocol: str = "linear:transfer"
    folders: tuple[str, ...] = ()
    share: float = 0.875


# Protocols, D.2, and the sets of torchvision and the hub that have a training and a test part.
SETS: dict[str, DataSet] = {
    "imagenet": DataSet(protocol="linear:imagenet", folders=("imagenet1k", "ILSVRC2012")),
    "cifar100": DataSet("torchvision:CIFAR100:train", "torchvision:CIFAR100:test"),
    "places205": DataSet(protocol="linear:places205"),
    "inat18": DataSet(protocol="linear:inat18", folders=("inaturalist2018",)),
    "clevr": DataSet(protocol="linear:clevr_count", folders=("CLEVR_v1.0", "CLEVR")),
    "cifar10": DataSet("torchvision:CIFAR10:train", "torchvision:CIFAR10:test"),
    "places365": DataSet("torchvision:Places365:train-standard", "torchvision:Places365:val", "linear:places205"),
    "food101": DataSet("torchvision:Food101:train", "torchvision:Food101:test"),
    "pets": DataSet("torchvision:OxfordIIITPet:trainval", "torchvision:OxfordIIITPet:test"),
    "flowers102": DataSet("torchvision:Flowers102:train", "torchvision:Flowers102:test"),
    "dtd": DataSet("torchvision:DTD:train", "torchvision:DTD:test"),
    "aircraft": DataSet("torchvision:FGVCAircraft:trainval", "torchvision:FGVCAircraft:test"),
    "stl10": DataSet("torchvision:STL10:train", "torchvision:STL10:test"),
    "svhn": DataSet("torchvision:SVHN:train", "torchvision:SVHN:test"),
    "eurosat": DataSet("hf:timm/eurosat-rgb:train", "hf:timm/eurosat-rgb:test"),
}

SCENES = ("scenes:10000", "scenes:10000-12000")  # take CLEVR's place where it is not at hand


@dataclass(frozen=True)
class Row:
    """One question of a suite. table: of the paper. tasks: those asked about, or all."""

    table: str
    data: str
    protocols: tuple[str, ...]
    tasks: tuple[str, ...] | None = None


SUITES: dict[str, list[Row]] = {
    "paper": [
        Row("table 1", "imagenet", ("linear:imagenet",)),
        Row("table 2", "imagenet", ("lowshot:paper",)),
        Row("tables 3 and 5", "cifar100", ("linear:transfer",)),
        Row("tables 3 and 5", "places205", ("linear:places205",)),
        Row("tables 3 and 5", "inat18", ("linear:inat18",)),
        Row("tables 4 and 5", "clevr", ("linear:clevr_count",), ("count",)),
        Row("tables 4 and 5", "clevr", ("linear:clevr_dist",), ("distance",)),
        Row("table 15", "imagenet", ("finetune:full",)),
    ],
    "transfer": [Row("", name, ("knn", entry.protocol)) for name, entry in SETS.items() if name != "clevr"],
}


@dataclass(frozen=True)
class Found:
    """A data set that is at hand."""

    name: str
    train: str
    test: str
    share: float


def find(name: str, root: Path | None, fetch: bool = True) -> Found:
    """A data set by its name. fetch: from torchvision or the hub, if the root has none. Raises UserError."""
    entry = SETS.get(name, DataSet(share=1.0))
    for folder in (name, *entry.folders) if root else ():
        assert root
        if (root / folder).is_dir():
            return in_folder(name, root / folder, entry.share)
    if name == "clevr":
        return Found("scenes, in place of clevr", *SCENES, 1.0)
    if entry.train and not fetch:
        raise UserError(f"{name} is not in --root: --sets {name} fetches it")
    if entry.train:
        return Found(name, entry.train, entry.test, entry.share)
    if name in SETS:
        raise UserError(
            f"{name} is nowhere to be had but in a folder: --root DIR with DIR/{name}/train and DIR/{name}/val"
        )
    here = f" in {root}" if root else ""
    raise UserError(f"no data set '{name}'{here}: a folder of --root, or one of {', '.join(SETS)}{nearest(name, SETS)}")


def in_folder(name: str, folder: Path, share: float) -> Found:
    """Its training and its test part. Raises UserError if one is missing."""
    if name == "clevr":
        return Found(name, f"clevr:{folder}:train", f"clevr:{folder}:val", share)
    train, test = part_of(folder, ("train",)), part_of(folder, TESTS)
    if not train or not test:
        missing = "train" if not train else " or ".join(TESTS)
        raise UserError(f"{folder} has no part {missing}: a folder, *.parquet or *.tar of that name")
    return Found(name, train, test, share)


def part_of(folder: Path, names: Sequence[str]) -> str | None:
    """The SPEC of the first part that is there: a folder, one file, or several."""
    for name in names:
        if (folder / name).is_dir():
            return str(folder / name)
        for ending in ("parquet", "tar"):
            if (folder / f"{name}.{ending}").exists():
                return str(folder / f"{name}.{ending}")
            if any(folder.glob(f"{name}-*.{ending}")):
                return str(folder / f"{name}-*.{ending}")
    return None
