"""Look at what a run makes of some images: a folder of pictures and a page that holds them all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from openjepa.data.decode import Raw
from openjepa.data.sources import Source, open_source, read_file
from openjepa.engine.device import pick_device
from openjepa.engine.whole import new_folder, refuse_full, refuse_unwritable, write_whole
from openjepa.errors import UserError, printable
from openjepa.evaluate.features import Images, readable
from openjepa.masking import Grid
from openjepa.models.encoder import Encoder
from openjepa.recipes.exchange import Trained, load_run
from openjepa.recipes.methods import METHODS
from openjepa.recipes.pretrain import own_images, random_encoder
from openjepa.recipes.surprise import PatchView, judge_of, surprise_of, view_of, without_predictor
from openjepa.rng import permutation
from openjepa.see import pictures
from openjepa.see.patches import attention, likeness, nearest, pooled, seen
from openjepa.see.report import Section, write_report

MOST = 16  # images that are looked at together
BASIS = 64  # reference images that colours and likeness are measured against
USUAL = 200  # reference images that tell what surprise is usual
SEARCHED = 1500  # reference images that neighbours are looked for in
FOUND = 7  # neighbours of each image


@dataclass(frozen=True, kw_only=True)
class Looking:
    """What `openjepa inspect` is asked."""

    run: str
    images: list[str]  # files, or SPECs of a few images
    out: Path
    patches: tuple[Grid, ...] = ()  # row and column of each; none: the middle
    reference: str | None = None  # none: the images that the run was trained on
    block: Grid | None = None  # of the surprise
    attention_block: int = -1
    share: float = 1.0
    squash: bool = False
    device: str = "auto"


@dataclass
class Found:
    """What was drawn: sections by the name of their file, and what could not be."""

    sections: dict[str, Section] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def pictures(self) -> dict[str, str]:
        """Each file and what it shows."""
        return {f"{name}.png": section.title.lower() for name, section in self.sections.items()}

    def add(self, name: str, title: str, text: str, figure: Figure) -> None:
        self.sections[name] = Section(title, text, figure)


class Files(Source):
    """Some image files and images of other sources, one after another."""

    def __init__(self, words: list[str], size: Grid) -> None:
        """Raises UserError for a word that is neither a file nor a SPEC, and for more than MOST images."""
        self.labels, self.classes = {}, {}
        self.items: list[tuple[str, Source | None, int]] = []
        for word in words:
            if Path(word).is_file() and not word.endswith((".parquet", ".tar")):
                self.items.append((word, None, 0))
                continue
            source = open_source(word, size)
            self.items += [(source.name(i), source, i) for i in range(min(len(source), MOST + 1))]
        if len(self.items) > MOST:
            raise UserError(f"{', '.join(words[:3])}: more than {MOST} images: look at fewer at a time")

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> Raw:
        name, source, place = self.items[index]
        return source.read(place) if source else read_file(name)

    def name(self, index: int) -> str:
        return printable(self.items[index][0])


def inspect(asked: Looking) -> Found:
    """Write DIR/NAME.png of everything that the run's method allows, DIR/index.html and DIR/inspect.json. Raises UserError."""
    refuse_full(asked.out)
    refuse_unwritable(asked.out)
    trained = load_run(asked.run)
    model, source = trained.recipe.model, Files(asked.images, trained.recipe.model.image_size)
    view = view_of(trained, None, asked.share, asked.squash)
    images = looked_at(source, view)
    patches = chosen_patches(asked.patches, model.grid)
    found = Found()
    reference = reference_of(asked, trained, found)
    encoder = Encoder(trained.method.product, trained.normalise, trained.method.product_name()).to(
        pick_device(asked.device)
    )
    basis, others = None, None
    names: list[str] = []
    if reference:
        basis, others, names = sampled(reference, view_of(trained, reference, asked.share, asked.squash))
    names_here = [source.name(i) for i in range(len(source))]
    found.numbers = {"run": asked.run, "step": trained.step, "images": names_here, "patches": patches}

    masks = (
        METHODS[trained.recipe.method]
        .views(trained.recipe)
        .masks(trained.recipe.seed, 0, np.arange(len(images)), np.arange(len(images)))
    )
    found.add("masks", "Masks", trained.method.task, pictures.masks_figure(images, masks, model.grid))
    draw_patches(found, asked, encoder, random_encoder(trained.recipe), images, basis, patches)
    draw_surprise(found, asked, trained, reference, images)
    if others is not None:
        draw_neighbours(found, encoder, images, others, names)
    with new_folder(asked.out) as folder:
        for name, section in found.sections.items():
            assert isinstance(section.figure, Figure)
            section.figure.savefig(folder / f"{name}.png", dpi=150)
        where = f"patch{'es' * (len(patches) > 1)} {' and '.join(f'{row},{column}' for row, column in patches)}"
        lead = f"{asked.run} at step {trained.step}, {where} of a grid of {model.grid[0]}x{model.grid[1]}"
        title = f"openjepa inspect: {trained.run.resolve().name}"
        write_report(folder / "index.html", title, lead, [*found.sections.values()])
        write_whole(folder / "inspect.json", json.dumps(found.numbers, indent=1) + "\n")
    return found


# ---------------------------------------------------------------- what is looked at


def looked_at(source: Source, view: PatchView) -> Tensor:
    """uint8 [n, channels, H, W]. Raises UserError for what is no image, too large, or smaller than a patch."""
    images = Images(source, np.arange(len(source)), view)
    return torch.stack([images[i] for i in range(len(images))])


def chosen_patches(patches: Sequence[Grid], grid: Grid) -> list[Grid]:
    """Those asked for, or the middle. Raises UserError for one outside the grid."""
    for row, column in patches:
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise UserError(
                f"--patch {row},{column} is outside the grid of {grid[0]}x{grid[1]} patches, which are counted from 0"
            )
    return list(dict.fromkeys(patches)) or [(grid[0] // 2, grid[1] // 2)]


def reference_of(asked: Looking, trained: Trained, found: Found) -> Source | None:
    """The images to compare with: those asked for, or the run's own where they can still be had."""
    size = trained.recipe.model.image_size
    if asked.reference:
        return open_source(asked.reference, size)
    try:
        return own_images(trained.run, size)
    except UserError as error:
        found.notes.append(
            f"no images to compare with, so no neighbours and raw energies alone (--reference SPEC): {error}"
        )
        return None


def sampled(reference: Source, view: PatchView) -> tuple[Tensor, Tensor, list[str]]:
    """A fixed random choice: a few for measures, more to be searched, and the names of those."""
    chosen = permutation(0, "inspect", 0, len(reference))[:SEARCHED]
    everything, indices = readable(reference, chosen, view)
    return everything[:BASIS], everything, [reference.name(i) for i in indices]


# ---------------------------------------------------------------- pictures


def draw_patches(found: Found, asked: Looking, encoder: Encoder, control: Encoder, images: Tensor, basis: Tensor | None,
                 patches: Sequence[Grid]) -> None:  # fmt: skip
    """PCA of all patches, attention and likeness of those chosen."""
    grid = encoder.vit.config.grid
    of = "the reference's" if basis is not None else "these"
    found.add(
        "pca",
        "What patches look alike",
        f"The three principal directions of {of} patch features as red, green and blue, the same for all images.",
        pictures.pca_figure([("pretrained", encoder), ("random", control)], images, basis),
    )
    try:
        weights = attention(encoder, images, asked.attention_block)
    except ValueError as error:
        raise UserError(f"--attention-block: {error}") from error
    features = seen(encoder, images)
    centre = None if basis is None else seen(encoder, basis).mean(0)
    for row, column in patches:
        place, several = row * grid[1] + column, len(patches) > 1
        of_it, which = (f"-{row}-{column}", f" {row},{column}") if several else ("", "")
        found.add(
            f"attention{of_it}",
            f"What the patch{which} attends to",
            "The framed patch's attention to all patches in one block of the encoder: the mean of its heads, and heads alone; "
            "each picture from 0 to its own largest weight.",
            pictures.attention_figure(images, weights, place, grid),
        )
        maps = torch.stack([likeness(features, i, place, centre) for i in range(len(images))])
        found.add(
            f"likeness{of_it}",
            f"What is like the patch{which}",
            "Cosine of the framed patch's features with all patches of all images, from 0 (pale) to 1 (dark red)"
            + ("." if centre is None else ", less what the reference has at each place."),
            pictures.likeness_figure(images, maps, place, grid),
        )


def draw_surprise(found: Found, asked: Looking, trained: Trained, reference: Source | None, images: Tensor) -> None:
    if refusal := without_predictor(trained):
        found.notes.append(f"no surprise map: {refusal}")
        return
    surprise = surprise_of(trained, asked.block, device=asked.device)
    text = "How far the predictor is from the target encoder's features of a patch, hidden with its block and told from the rest"
    if reference is None:
        figure = pictures.surprise_figure(images, surprise.energies(images).numpy())
    else:
        judge = judge_of(surprise, trained, reference, view_of(trained, reference, asked.share, asked.squash), USUAL)
        energies, unusual, scores = judge(images)
        below = [float((judge.usual.scores < s).mean()) for s in scores]
        found.numbers["surprise"] = [
            {"score": float(s), "above": share} for s, share in zip(scores, below, strict=True)
        ]
        text += "; below, how unusual that is beside the reference. Above, the most unusual patch, and the share of "
        text += f"{len(judge.usual.scores)} reference images that stay under it"
        figure = pictures.surprise_figure(images, energies, unusual, judge.usual.scores)
    found.add("surprise", "What surprises", text + ".", figure)


def draw_neighbours(found: Found, encoder: Encoder, images: Tensor, others: Tensor, names: list[str]) -> None:
    cosines, index = nearest(pooled(encoder, images), pooled(encoder, others), FOUND)
    found.numbers["neighbours"] = [
        [{"path": names[i], "cosine": round(c, 4)} for c, i in zip(values, places, strict=True)]
        for values, places in zip(cosines.tolist(), index.tolist(), strict=True)
    ]
    found.add(
        "neighbours",
        "What images look alike",
        f"The nearest of {len(others)} reference images by cosine of pooled features.",
        pictures.found_figure(images, [others[row] for row in index], cosines.tolist()),
    )
