"""Figures in one style, saved as PNG and PDF with their captions."""

import io
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from PIL import Image

from deepknn_lib.storage import figures_dir, whole_file
from deepknn_lib.study.results import SCORES, method_title
from deepknn_lib.study.runs import SOFTMAX

# Okabe and Ito's colours, which colour-blind readers can tell apart, for Table 2; others for the other methods.
_COLORS = """knn 7f7f7f, triplet e69f00, deep-knn 0072b2, weighted-ce 009e73, ce-knn 56b4e9, deep-knn-ft cc79a7,
    triplet-ft a65c00, deep-knn-global 000000, nca b5b500, lmnn 8c3bb1, mlp-triplet d55e00, mlp-ce 66c2a5,
    mlp-deep-knn 3b4cc0, semi-hard ffd92f, supcon 8b0000, proxy-anchor 1b4d3e, multi-similarity 7b3294,
    nca-loss f4a6a0"""
COLORS = {method: f"#{color}" for method, color in (pair.split() for pair in _COLORS.split(","))}
CLASS_COLORS = ("#d55e00", "#e69f00", "#009e73", "#000000", "#0072b2", "#b5b5b5", "#cc79a7")
SAME, OTHER = "#0072b2", "#d55e00"  # frames of neighbours: of the query's class, and of another
SPLIT_TITLES = {"paper": "split by image (the paper's kind)", "grouped": "split by lesion or patient"}
_MEASURES = {"train_acc": "training accuracy, per cent", "active": "share of active terms"}


def use_style() -> None:
    """Set the one style of every figure."""
    sizes = {"axes.titlesize": 11, "axes.labelsize": 10, "legend.fontsize": 9}
    sizes |= {"xtick.labelsize": 9, "ytick.labelsize": 9}
    look = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "pdf.fonttype": 42}
    saving = {"figure.dpi": 100, "savefig.dpi": 200, "savefig.bbox": "tight"}
    rc = sizes | look | saving | {"figure.constrained_layout.use": True}
    sns.set_theme(context="notebook", style="ticks", font="DejaVu Sans", rc=rc)


def save_figure(figure: plt.Figure, name: str, title: str, caption: str, alt: str) -> bytes:
    """Write `<name>.png` and `.pdf` to the figures folder, close the figure, return a smaller PNG for a notebook.

    Title, caption and `alt` (what the figure shows, for those who cannot see it) are kept inside the PNG.
    """
    about, path = {"Title": title, "Description": caption, "Comment": alt}, figures_dir() / f"{name}.png"
    with whole_file(path) as temporary:
        figure.savefig(temporary, metadata=about | {"Software": None})
    with whole_file(path.with_suffix(".pdf")) as temporary:
        figure.savefig(temporary, metadata={"Title": title, "Subject": caption, "CreationDate": None})
    plt.close(figure)
    shown = io.BytesIO()
    with Image.open(path) as image:  # On a page, half the size and 256 colours are enough.
        image.convert("RGB").reduce(2).quantize(256).save(shown, "png")
    return shown.getvalue()


def draw(axis: plt.Axes, image: np.ndarray) -> None:
    """Show an image, uint8 (C, H, W), on an axis."""
    image = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
    axis.imshow(image, cmap="gray", interpolation="nearest")


def image_grid(rows: Sequence, row_titles: Sequence[str], *, columns: int, scale: float = 0.85) -> plt.Figure:
    """Rows of images, each row uint8 (n, C, H, W); where n is less than `columns`, places stay empty."""
    size = (columns * scale + 1.2, len(rows) * scale)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for line, images, title in zip(axes, rows, row_titles, strict=True):
        line[0].text(-0.15, 0.5, title, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
        for axis, image in zip(line, images, strict=False):
            draw(axis, image)
        for axis in line:
            axis.set_axis_off()
    return figure


def comparison(table: pd.DataFrame) -> plt.Figure:
    """Scores of every method with their intervals: a panel a score, a marker a split. `table`: `results.summary`."""
    rows = list(dict.fromkeys(zip(table["method"], table["k_predict"], strict=True)))
    splits = list(dict.fromkeys(table["split"]))
    figure, axes = plt.subplots(1, len(SCORES), figsize=(10.5, 0.42 * len(rows) + 1.5), sharey=True)
    titles = ("Accuracy", "Mean class recall", "Recall, smallest class")
    for axis, score, title in zip(axes, SCORES, titles, strict=True):
        for value in table.to_dict("records"):
            number, row = splits.index(value["split"]), (value["method"], value["k_predict"])
            at, color = rows.index(row) + 0.22 * (number - (len(splits) - 1) / 2), COLORS[row[0]]
            axis.plot([value[f"{score}_low"], value[f"{score}_high"]], [at, at], color=color, lw=1.8)
            axis.plot(value[score], at, "os"[number % 2], color=color, ms=6, mfc="white" if number else color)
        axis.set(title=title, xlabel="per cent")
        axis.grid(axis="x", color="0.9")
    axes[0].set_yticks(range(len(rows)), [method_title(*row).replace("K_p", "$K_p$") for row in rows])
    axes[0].set_ylabel("method")
    axes[0].invert_yaxis()
    marks = [plt.Line2D([], [], color="0.3", lw=1.8, label=SPLIT_TITLES[split]) for split in splits]
    for i, mark in enumerate(marks):
        mark.set(marker="os"[i % 2], markerfacecolor="white" if i else "0.3")
    figure.legend(handles=marks, loc="outside lower center", ncols=len(splits))
    return figure


def convergence(panels: Iterable[tuple[str, pd.DataFrame, str]], columns: int = 3) -> plt.Figure:
    """Curves by epoch, a colour a method: mean over runs, and the range they span.

    Each panel is a title, rows of `results.history_table`, and the name of the column to draw.
    """
    panels = list(panels)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (3.6 * columns + 0.5, 2.9 * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis, (title, history, column) in zip(axes.flat, panels, strict=False):
        for method, part in history.dropna(subset=[column]).groupby("method", sort=False):
            curve = part.groupby("epoch")[column].agg(["mean", "min", "max"])
            style = {"color": COLORS[method], "label": method_title(method, SOFTMAX)}
            axis.plot(curve.index, curve["mean"], marker="o", ms=3, lw=1.8, **style)
            axis.fill_between(curve.index, curve["min"], curve["max"], color=COLORS[method], alpha=0.18, lw=0)
        axis.set(title=title, xlabel="epoch", ylabel=_MEASURES.get(column, column.replace("_", " ")))
        axis.grid(axis="y", color="0.9")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    drawn = [pair for axis in axes.flat for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    shown = {name: line for line, name in drawn}
    columns = 2 if len(shown) == 4 else min(len(shown), 3)
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=columns)
    return figure


def embedding(panels: Iterable[tuple], class_names: Sequence[str], *, height: float = 4.1) -> plt.Figure:
    """Maps, two a row: (title, points (N, 2), labels (N,)) each; rare classes are drawn last, over the others.

    There are seven colours, and another marker for every seven classes. `height` of a row is in inches.
    """
    panels = list(panels)
    columns, rows = min(len(panels), 2), -(-len(panels) // 2)
    size = (1.12 * height * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, points, labels) in zip(axes.flat, panels, strict=False):
        for c in np.argsort(-np.bincount(labels, minlength=len(class_names)), kind="stable"):
            style = {"color": CLASS_COLORS[c % 7], "marker": "o^sDv"[c // 7 % 5], "s": 9 if c < 7 else 14}
            axis.scatter(*points[labels == c].T, lw=0, alpha=0.8, label=class_names[c], **style)
        axis.set_title(title)
    if len(class_names) <= 35:  # Seven colours and five markers tell no more classes apart.
        handles, names = axes.flat[0].get_legend_handles_labels()
        drawn = dict(zip(names, handles, strict=True))
        columns = min(len(class_names), 10 if max(map(len, class_names)) < 4 else 7)
        place = {"loc": "outside lower center", "ncols": columns, "markerscale": 2}
        figure.legend([drawn[name] for name in class_names], class_names, **place)
    return figure


def neighbors(rows: Sequence[dict], *, scale: float = 0.7) -> plt.Figure:
    """Queries, one a row on the left, and the images nearest to each, in frames that tell whose class they are of.

    Each row has `title`, text beside the query; `query`, uint8 (C, H, W), or None for an empty place; `images`, uint8
    (k, C, H, W), nearest first; `texts`, k titles; `same`, k booleans: of the query's true class (solid blue frame) or
    not (dashed orange); optionally `marked`, k booleans: these titles are bold. `scale` is an image's side in inches.
    """
    k = max(len(row["images"]) for row in rows)
    widths = [1, 0.12] + [1] * k
    size = (sum(widths) * scale + 1.5, len(rows) * (scale + 0.24) + 0.1)
    figure, axes = plt.subplots(len(rows), k + 2, figsize=size, squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_axis_off()
    for line, row in zip(axes, rows, strict=True):
        line[0].text(
            -0.1, 0.5, row["title"], transform=line[0].transAxes, ha="right", va="center", fontsize=9
        )
        if row["query"] is not None:
            draw(line[0], row["query"])
        marked = row.get("marked", [False] * len(row["images"]))
        near = zip(line[2:], row["images"], row["texts"], row["same"], marked, strict=False)
        for axis, image, text, same, bold in near:
            draw(axis, image)
            axis.set_axis_on()
            color, dash = (SAME, "-") if same else (OTHER, (0, (1.5, 0.8)))
            axis.spines[:].set(visible=True, color=color, linewidth=2.5, linestyle=dash, capstyle="butt")
            axis.set_title(text, fontsize=7.5, color=color, pad=3.5, fontweight="bold" if bold else "normal")
    return figure
