"""Pictures made of images: what was hidden, what patches and images look alike, where attention goes, what surprises."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from openjepa.masking import Grid, Masks, TokenMasks
from openjepa.models.encoder import Encoder
from openjepa.see.figures import BLUE, INK, TARGETS, canvas, patch_map, to_pixels
from openjepa.see.patches import Palette, nearest, pooled, seen

HEAT, ENERGY = "YlOrRd", "magma"
LIGHT, OPAQUE = 0.35, 0.85  # how far an image under a map is lightened, and how much a map's highest value hides of it


def masks_figure(images: Tensor, masks: Masks | TokenMasks, grid: Grid) -> Figure:
    """Rows: the image, what is seen of it, what is to be predicted, block by block. images uint8 [n, 3, H, W]."""
    n, _, height, _ = images.shape
    p = height // grid[0]
    figure, axes = canvas(3, n, "image", "context", "targets")
    for i in range(n):
        pixels = to_pixels(images[i])
        if isinstance(masks, TokenMasks):
            first = masks.hidden[i, 0]  # of several crops
            context, targets = (~first).nonzero()[:, 0], [first.nonzero()[:, 0]]
        else:
            length = masks.context.shape[-1] if masks.lengths is None else int(masks.lengths[i, 0])
            context, targets = masks.context[i, 0, :length], [*masks.targets[i]]
        seen = patch_map(context, grid, p)
        blocks = pixels * 0.25 + 0.7
        for j, block in enumerate(targets):
            inside = patch_map(block, grid, p)
            blocks[inside] = 0.7 * pixels[inside] + 0.3 * np.array(to_rgb(TARGETS[j % len(TARGETS)]))
        axes[0][i].imshow(pixels)
        axes[1][i].imshow(np.where(seen[..., None], pixels, 0.93))
        axes[2][i].imshow(blocks)
    return figure


def pca_figure(encoders: Sequence[tuple[str, Encoder]], images: Tensor, basis: Tensor | None = None) -> Figure:
    """First three principal components of the patch features as red, green and blue, aligned over the images.

    basis: the images that the components are of, uint8 [m, 3, H, W]: those shown unless told.
    """
    figure, axes = canvas(1 + len(encoders), len(images), "image", *(name for name, _ in encoders))
    for i, image in enumerate(images):
        axes[0][i].imshow(to_pixels(image))
    for row, (_, encoder) in enumerate(encoders, start=1):
        features = seen(encoder, images)  # [n, N, D]
        palette = Palette.of(features if basis is None else seen(encoder, basis))
        for i, colours in enumerate(palette(features)):
            axes[row][i].imshow(colours.reshape(*encoder.vit.config.grid, 3), interpolation="nearest")
    return figure


def neighbours_figure(encoder: Encoder, images: Tensor, queries: int = 6, count: int = 7) -> Figure:
    """Each row: an image, then those whose pooled features are nearest by cosine. images uint8 [n, 3, H, W]."""
    features = pooled(encoder, images)
    queries = min(queries, len(images))
    found = nearest(features[:queries], features, count + 1)[1]
    return found_figure(images[:queries], [images[row[1:]] for row in found])


def found_figure(queries: Tensor, found: Sequence[Tensor], cosines: Sequence[Sequence[float]] | None = None) -> Figure:
    """Each row: an image, framed, then what was found for it, with its cosine.

    queries: uint8 [q, 3, H, W]; found: q of [count, 3, H, W]; cosines: q of [count].
    """
    figure, axes = canvas(len(queries), 1 + max(map(len, found)))
    for row, (query, others) in enumerate(zip(queries, found, strict=True)):
        for column, image in enumerate((query, *others)):
            axes[row][column].imshow(to_pixels(image))
        for side in axes[row][0].spines.values():
            side.set(visible=True, color=BLUE, linewidth=2)
        for axis, cosine in zip(axes[row][1:], cosines[row] if cosines else (), strict=False):
            axis.set_xlabel(f"{cosine:.3f}", fontsize=7, color=INK, labelpad=1)
    axes[0][0].set_title("query", fontsize=9, color=INK)
    return figure


def attention_figure(images: Tensor, weights: Tensor, patch: int, grid: Grid, heads: int = 6) -> Figure:
    """Each row: an image with the patch that asks, the mean of all heads, some heads alone, each on its own scale.

    images: uint8 [n, 3, H, W]; weights: [n, heads, N, N].
    """
    shown = min(heads, weights.shape[1])
    figure, axes = canvas(len(images), 2 + shown)
    for row, (image, own) in enumerate(zip(images, weights[:, :, patch], strict=True)):
        pixels = to_pixels(image)
        axes[row][0].imshow(pixels)
        mark(axes[row][0], patch, grid, pixels.shape)
        for column, values in enumerate((own.mean(0), *own[:shown]), start=1):
            heat(axes[row][column], pixels, values.view(grid).numpy(), 0.0, float(values.max()))
            mark(axes[row][column], patch, grid, pixels.shape)
    for axis, name in zip(axes[0], ("patch", "all heads", *(f"head {h}" for h in range(shown))), strict=True):
        axis.set_title(name, fontsize=9, color=INK)
    return figure


def likeness_figure(images: Tensor, maps: Tensor, patch: int, grid: Grid) -> Figure:
    """Row i: where all images are like the patch of image i, which is marked. images: uint8 [n, 3, H, W]; maps: [n, n, N]."""
    figure, axes = canvas(len(images), 1 + len(images))
    for row, (image, own) in enumerate(zip(images, maps, strict=True)):
        axes[row][0].imshow(to_pixels(image))
        mark(axes[row][0], patch, grid, image.shape[1:])
        for column, values in enumerate(own, start=1):
            heat(axes[row][column], to_pixels(images[column - 1]), values.view(grid).numpy(), 0.0, 1.0)
    axes[0][0].set_title("patch", fontsize=9, color=INK)
    for number, axis in enumerate(axes[0][1:], start=1):
        axis.set_title(f"image {number}", fontsize=9, color=INK)
    return figure


def surprise_figure(images: Tensor, energies: np.ndarray, unusual: np.ndarray | None = None,
                    usual: np.ndarray | None = None, masks: Sequence[np.ndarray] | None = None) -> Figure:  # fmt: skip
    """Rows: the image (with the outline of what is truly odd), its energies, and where it is unusual; above, its score and rank.

    images: uint8 [n, 3, H, W]; energies, unusual: [n, rows, columns]; usual: scores of reference images; masks: n of [H, W].
    """
    names = ["image", "energy"] + ([] if unusual is None else ["unusual"])
    figure, axes = canvas(len(names), len(images), *names)
    top = float(np.quantile(energies, 0.995))
    for i, image in enumerate(images):
        pixels = to_pixels(image)
        axes[0][i].imshow(pixels)
        if masks is not None and masks[i].any():
            axes[0][i].contour(masks[i] != 0, levels=[0.5], colors=[TARGETS[0]], linewidths=1.2)
        axes[1][i].imshow(energies[i], cmap=ENERGY, vmin=0, vmax=top, interpolation="nearest")
        if unusual is not None and usual is not None:
            heat(axes[2][i], pixels, unusual[i], *ends(usual))
            highest = float(unusual[i].max())
            text = f"{highest:.1f}\nabove {100 * (usual < highest).mean():.0f} % of usual"
            axes[0][i].set_title(text, fontsize=7, color=INK)
    return figure


# ---------------------------------------------------------------- parts of them


def ends(usual: np.ndarray) -> tuple[float, float]:
    """What is nothing and what is all in a map of what is unusual, by the scores of reference images."""
    return float(np.median(usual)) / 2, 1.5 * float(np.quantile(usual, 0.95))


def heat(axis: Axes, pixels: np.ndarray, values: np.ndarray, low: float, high: float) -> None:
    """A map over a greyed image. pixels: [H, W, 3]; values: [rows, columns]."""
    axis.imshow(heated(pixels, values, low, high))


def heated(pixels: np.ndarray, values: np.ndarray, low: float, high: float) -> np.ndarray:
    """An image in grey under a map of its patches, nothing where that is low.

    pixels: [H, W, 3]; values: [rows, columns]. Returns [H, W, 3], 0 to 1.
    """
    grey = LIGHT + (1 - LIGHT) * pixels.mean(-1, keepdims=True)
    share = ((values - low) / max(high - low, 1e-12)).clip(0, 1)
    rows, columns = (np.arange(n) * m // n for n, m in zip(pixels.shape, values.shape, strict=False))
    share = share[np.ix_(rows, columns)]
    cover = OPAQUE * share[..., None]
    mixed: np.ndarray = (1 - cover) * grey + cover * colormaps[HEAT](share)[..., :3]
    return mixed.clip(0, 1)  # rounding


def mark(axis: Axes, patch: int, grid: Grid, size: Sequence[int]) -> None:
    """A frame around a patch. size: height and width of the image, in pixels."""
    h, w = size[0] / grid[0], size[1] / grid[1]
    place = (patch % grid[1] * w - 0.5, patch // grid[1] * h - 0.5)
    for colour, width in (("white", 3.4), (BLUE, 1.8)):  # seen on any sky
        axis.add_patch(Rectangle(place, w, h, fill=False, edgecolor=colour, linewidth=width))
