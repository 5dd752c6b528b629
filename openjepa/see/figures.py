"""Charts of a run and of measurements: how training went, what it is worth, what it costs. Pictures of images are in `pictures`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from openjepa.evaluate.scores import SHARES, dense
from openjepa.evaluate.suite import spelled

BLUE, GREY, ORANGE, INK = "#2f6fde", "#b9bfca", "#e0812b", "#22262e"
COSTS = {"batch": "images a step", "tokens": "patches an image", "width": "encoder width"}
SPENT = {  # what `openjepa bench fleet` says that a device's time goes to
    "images_s": ("images", BLUE),
    "few_images_s": ("images being few", "#a9c3f2"),
    "update_s": ("update", "#2fa36b"),
    "slowest_device_s": ("slowest device", ORANGE),
    "network_s": ("network", "#d6496b"),
    "data_s": ("data", INK),
    "saving_failing_s": ("saving, failing", "#8d5bd6"),
}
PANELS = {  # of what a run logs
    "loss": "loss",
    "feature_std": "feature spread over images",
    "feature_rank": "effective rank",
    "feature_cosine": "cosine between images",
    "knn_accuracy": "k-NN accuracy",
}
TARGETS = ("#e0812b", "#2fa36b", "#8d5bd6", "#d6496b")


def curves_figure(metrics: Sequence[dict[str, float]], earlier: Sequence[dict[str, float]] = ()) -> Figure:
    """Loss beside what the loss does not tell: spread, rank and cosine of the features, k-NN accuracy.

    earlier: what the run logged whose encoder this one began with: grey, its steps end at 0. Its loss is another one.
    """
    panels = [(key, title) for key, title in PANELS.items() if any(key in m for m in metrics)]
    rows = -(-len(panels) // 3)
    columns = -(-len(panels) // rows)
    figure = Figure(figsize=(3.1 * columns, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (key, title) in zip(axes, panels, strict=False):
        theirs = [(m["step"] - earlier[-1]["step"], m[key]) for m in earlier if key in m and key != "loss"]
        points = [(m["step"], m[key]) for m in metrics if key in m]
        for line, colour in ((theirs, GREY), (points, BLUE)):
            if line:
                axis.plot(
                    *zip(*line, strict=True), color=colour, linewidth=1.6, marker="o" if len(line) < 15 else None, ms=3
                )
        axis.set_title(title, fontsize=10, color=INK)
        axis.set_xlabel("step", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        values = [value for _, value in (*theirs, *points)]
        low, high = min(0.0, *values), max(values)
        if key == "loss" and high > 1.5 * min(values):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            if high < 10 * min(values):  # perhaps no power of ten between them
                axis.yaxis.set_minor_formatter("{x:g}")
        else:
            axis.set_ylim(low, high + 0.05 * (high - low) or 1.0)  # the line itself whole, too
        tidy(axis)
    return figure


def scores_figure(records: Sequence[dict[str, Any]]) -> Figure | None:
    """What can be shown in percent, of the encoder and its controls with 95 % intervals; a group a task and protocol."""
    records = [r for r in records if r["metric"] in SHARES]
    if not records:
        return None
    names = list(dict.fromkeys(r["of"] for r in records))
    groups = list(dict.fromkeys((spelled(r), r["task"]) for r in records))
    found = {(spelled(r), r["task"], r["of"]): r for r in records}
    figure = Figure(figsize=(max(4.5, 1.25 * len(groups) + 1.5), 3.0), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(names)
    for j, name in enumerate(names):
        at = [i for i, group in enumerate(groups) if (*group, name) in found]
        mine = [found[(*groups[i], name)] for i in at]
        heights = 100 * np.array([r["value"] for r in mine])
        ends = 100 * np.array([r["interval"] or (r["value"], r["value"]) for r in mine]).reshape(-1, 2)
        bars = axis.bar(
            np.array(at) + (j - (len(names) - 1) / 2) * width,
            heights,
            0.92 * width,
            label=name,
            color=(BLUE, ORANGE, GREY)[j % 3],
            yerr=np.abs(ends.T - heights),
            error_kw={"elinewidth": 0.8, "ecolor": INK},
        )
        axis.bar_label(bars, fmt="%.0f", fontsize=7, color=INK, padding=1)
    axis.set_xticks(range(len(groups)), [f"{task}\n{protocol}" for protocol, task in groups], fontsize=8)
    axis.set_ylabel("%", fontsize=8)
    axis.legend(frameon=False, fontsize=8, ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1))
    tidy(axis)
    return figure


def confusion_figure(records: Sequence[dict[str, Any]]) -> Figure:
    """A square a task: rows are true classes, columns what they are taken for, each row's shares."""
    figure = Figure(figsize=(3.4 * len(records), 3.4), layout="constrained")
    for axis, record in zip(np.atleast_1d(figure.subplots(1, len(records))), records, strict=True):
        classes = record["classes"]
        counts = dense(record["details"]["confusion"], len(classes))
        axis.imshow(counts / np.maximum(1, counts.sum(1, keepdims=True)), cmap="Blues", vmin=0, vmax=1)
        axis.set_title(record["task"], fontsize=10, color=INK)
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel("taken for", fontsize=8)
        axis.set_ylabel("is", fontsize=8)
        if len(classes) <= 24:
            axis.set_xticks(range(len(classes)), classes, fontsize=7, rotation=90)
            axis.set_yticks(range(len(classes)), classes, fontsize=7)
        if len(classes) <= 12:
            for i, j in np.argwhere(counts):
                share = counts[i, j] / counts[i].sum()
                colour = "white" if share > 0.5 else INK
                axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=colour)
    return figure


def classes_figure(records: Sequence[dict[str, Any]]) -> Figure:
    """A row of bars a task: each class's own score; many classes are sorted, the best and the worst named."""
    figure = Figure(figsize=(7.6, 2.3 * len(records)), layout="constrained")
    for axis, record in zip(np.atleast_1d(figure.subplots(len(records), 1)), records, strict=True):
        known = [
            (s, c) for s, c in zip(record["details"]["per_class"], record["classes"], strict=True) if s is not None
        ]
        if len(known) > 24:
            known.sort(key=lambda entry: -entry[0])
        axis.bar(range(len(known)), [100 * share for share, _ in known], 0.8, color=BLUE)
        if len(known) <= 24:
            names = [name for _, name in known]
            crowded = len(names) * max(map(len, names), default=0) > 100  # letters that fit beside each other
            axis.set_xticks(range(len(names)), names, fontsize=7, rotation=90 if crowded else 0)
        else:
            axis.set_xticks([])
            ends = [", ".join(name for _, name in part) for part in (known[:3], known[-3:])]
            axis.set_xlabel(f"best: {ends[0]}    worst: {ends[1]}", fontsize=8)
        axis.set_title(record["task"], fontsize=10, color=INK)
        axis.set_ylabel("%", fontsize=8)
        tidy(axis)
    return figure


def cost_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Seconds of a step beside its work, as the batch, the patches and the width grow: `openjepa bench scaling`.

    Where the work's line and the points part, something else than matrix products takes the time.
    """
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(3.1 * len(axes), 2.7), layout="constrained")
    for axis, name in zip(np.atleast_1d(figure.subplots(1, len(axes))), axes, strict=True):
        mine = [row for row in rows if row["axis"] == name]
        at = [row["value"] for row in mine]
        fastest = max(row["gflops"] for row in mine)
        low, high = ([row[end] for row in mine] for end in ("min_s", "max_s"))
        axis.plot(
            at, [row["gflop"] / fastest for row in mine], color=GREY, linewidth=1.6, label="its work at the best rate"
        )
        axis.vlines(at, low, high, color=BLUE, linewidth=1)
        axis.plot(at, [row["median_s"] for row in mine], "o", color=BLUE, ms=4, label="measured")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(at, [str(value) for value in at])
        axis.minorticks_off()
        axis.set_title(COSTS.get(name, name), fontsize=10, color=INK)
        axis.set_ylabel("seconds a step" if name == axes[0] else "", fontsize=8)
        tidy(axis)
    figure.axes[0].legend(frameon=False, fontsize=7)
    return figure


def fleet_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Images a second beside what as many single devices would do, and what a device's time goes to: `openjepa bench fleet`."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4.3 * len(models), 5.4), layout="constrained")
    above, below = figure.subplots(2, len(models), squeeze=False)
    for axis, time, model in zip(above, below, models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        paper = [row for row in mine if row["batch"] == mine[0]["batch"]]
        filled = [row for row in mine if row not in paper]
        devices = [row["devices"] for row in paper]
        axis.plot(
            devices,
            [n * mine[0]["images_per_s"] for n in devices],
            color=GREY,
            linewidth=1.6,
            label="as one, times as many",
        )
        for part, colour, name in (
            (paper, BLUE, f"batch {paper[0]['batch']:,}"),
            (filled, ORANGE, "128 images a device"),
        ):
            at = [row["devices"] for row in part]
            axis.plot(at, [row["images_per_s"] for row in part], color=colour, linewidth=1.6, label=name)
            axis.plot(at, [row["simulated_images_per_s"] for row in part], "o", color=colour, ms=5, mfc="none")
        axis.plot([], [], "o", color=INK, ms=5, mfc="none", label="simulated")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(devices, [str(n) for n in devices])
        axis.minorticks_off()
        axis.set_title(model, fontsize=10, color=INK)
        axis.set_xlabel("H100s", fontsize=8)
        tidy(axis)
        left = np.zeros(len(mine))
        for key, (spent, colour) in SPENT.items():
            shares = [100 * row[key] / sum(row[k] for k in SPENT) for row in mine]
            time.barh(range(len(mine)), shares, 0.7, left=left, color=colour, label=spent)
            left += shares
        time.set_yticks(range(len(mine)), [f"{row['devices']}, batch {row['batch']:,}" for row in mine])
        time.invert_yaxis()
        time.set_xlim(0, 100)
        time.set_xlabel("% of a device's time", fontsize=8)
        tidy(time)
    above[0].set_ylabel("images/s", fontsize=8)
    above[0].legend(frameon=False, fontsize=7)
    figure.legend(*below[0].get_legend_handles_labels(), frameon=False, fontsize=7, ncols=7, loc="outside lower center")
    return figure


def comparison_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy along seconds, steps and images seen, a line a method, every seed thin: `openjepa bench compare` (figures 1, 5)."""
    names = list(dict.fromkeys(row["who"] for row in rows if row["step"]))
    pixels = [row for row in rows if row["who"] == "raw pixels"][:1]  # none while it is not done
    shown = {"seconds": "seconds of training", "step": "steps", "images": "images seen"}
    figure = Figure(figsize=(10.4, 5.2), layout="constrained")
    for axes, metric in zip(figure.subplots(2, len(shown), sharex="col", sharey="row"), ("linear", "knn"), strict=True):
        for axis, along in zip(axes, shown, strict=True):
            for (style, colour), name in zip(product(("-", "--", ":"), (BLUE, *TARGETS)), names, strict=False):
                mine = [row for row in rows if row["who"] == name]
                begun = [row for row in rows if row["who"] == f"{name}, random weights"]
                seeds = list(dict.fromkeys(row["seed"] for row in mine))
                lines = []
                for seed in seeds:
                    line = sorted((r for r in (*begun, *mine) if r["seed"] == seed), key=lambda r: r["step"])
                    lines.append(([r[along] for r in line], [100 * r[metric] for r in line]))
                    axis.plot(*lines[-1], color=colour, linewidth=0.7, alpha=0.5)
                axis.plot(*mean_line(lines), f"o{style}", color=colour, linewidth=1.8, ms=3.5, label=name)
            for row in pixels:
                axis.axhline(100 * row[metric], color=GREY, linewidth=1.2, linestyle="--", label="raw pixels")
            axis.set_ylabel(
                f"{'linear probe' if metric == 'linear' else 'k-NN'}, %" if along == "seconds" else "", fontsize=9
            )
            axis.set_xlabel(shown[along] if metric == "knn" else "", fontsize=9)
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.xaxis.set_major_formatter("{x:,.0f}")
            tidy(axis)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    return figure


def mean_line(lines: Sequence[tuple[list[float], list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of several (x, y), which may have other numbers of points: at the longest one's shares of the way."""
    longest = max((x for x, _ in lines), key=len)
    shares = np.array(longest) / max(longest[-1], 1e-9)
    along = [[np.interp(shares, np.array(x) / max(x[-1], 1e-9), values) for values in (x, y)] for x, y in lines]
    x, y = np.mean(along, 0)
    return x, y


def labels_figure(means: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy against the number of labels, a line a learner, bars the deviation over draws: `openjepa labels`."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, colour in zip(dict.fromkeys(mean["of"] for mean in means), (BLUE, ORANGE, GREY), strict=False):
        mine = [mean for mean in means if mean["of"] == name]
        at, values = [mean["labels"] for mean in mine], [100 * mean["value"] for mean in mine]
        bars = [np.nan if mean["spread"] is None else 100 * mean["spread"] for mean in mine]  # one draw has none
        axis.errorbar(
            at, values, bars, color=colour, linewidth=1.8, marker="o", ms=4, elinewidth=1, capsize=3, label=name
        )
    axis.set_xscale("log")
    at = list(dict.fromkeys(mean["labels"] for mean in means))
    axis.set_xticks(at, [f"{count:,}" for count in at])
    axis.minorticks_off()
    axis.set_xlabel("labelled images", fontsize=9)
    axis.set_ylabel("test accuracy, %", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    tidy(axis)
    return figure


# ---------------------------------------------------------------- shared


def canvas(rows: int, columns: int, *names: str) -> tuple[Figure, np.ndarray]:
    """A figure of bare image axes, rows named at the left."""
    figure = Figure(figsize=(1.25 * columns + 0.2, 1.25 * rows + 0.15))
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.015, h_pad=0.015, wspace=0.01, hspace=0.01))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set_visible(False)
    for row, name in enumerate(names):
        axes[row][0].set_ylabel(name, fontsize=9, color=INK)
    return figure, axes


def tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, which="both")
    axis.grid(axis="y", color="#e8eaee", linewidth=0.8)
    axis.set_axisbelow(True)


def to_pixels(image: Tensor) -> np.ndarray:
    """uint8 [C, H, W] to float [H, W, 3] in [0, 1]."""
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return image.permute(1, 2, 0).numpy() / 255.0


def patch_map(index: Tensor, grid: tuple[int, int], patch: int) -> np.ndarray:
    """Patch indices to a pixel mask, bool [H, W]."""
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    mask[index.numpy()] = True
    return mask.reshape(grid).repeat(patch, 0).repeat(patch, 1)
