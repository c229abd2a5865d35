"""Figures in one style, saved as PNG and PDF with their captions."""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from PIL import Image

from deepknn_lib.storage import figures_dir, whole_file
from deepknn_lib.study.results import SCORES, method_title
from deepknn_lib.study.runs import SOFTMAX

# Methods of Table 2 have the colours of Okabe and Ito, which colour-blind readers can tell apart.
_STYLE = json.loads(Path(__file__).with_name("style.json").read_text(encoding="utf-8"))
COLORS = _STYLE["colors"]
CLASS_COLORS = ("#d55e00", "#e69f00", "#009e73", "#000000", "#0072b2", "#b5b5b5", "#cc79a7")
SAME, OTHER = "#0072b2", "#d55e00"  # frames of neighbours: of the query's class, and of another
SPLIT_TITLES = {"paper": "split by image (the paper's kind)", "grouped": "split by lesion or patient"}
_MEASURES = {"train_acc": "training accuracy, per cent", "active": "share of active terms"}


def use_style() -> None:
    """Set the one style of every figure."""
    sns.set_theme(context="notebook", style="ticks", font="DejaVu Sans", rc=_STYLE["rc"])


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


def _grid(rows: int, columns: int, width: float, height: float, **options) -> tuple[plt.Figure, np.ndarray]:
    """A figure and its axes (rows, columns), all switched off until something is drawn there."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def _beside(axis: plt.Axes, text: str) -> None:
    """Write a text on the left of an axis."""
    axis.text(-0.12, 0.5, text, transform=axis.transAxes, ha="right", va="center", fontsize=9)


def image_grid(rows: Sequence, row_titles: Sequence[str], *, columns: int, scale: float = 0.85) -> plt.Figure:
    """Rows of images, each row uint8 (n, C, H, W); where n is less than `columns`, places stay empty."""
    figure, axes = _grid(len(rows), columns, columns * scale + 1.2, len(rows) * scale)
    for line, images, title in zip(axes, rows, row_titles, strict=True):
        _beside(line[0], title)
        for axis, image in zip(line, images, strict=False):
            draw(axis, image)
    return figure


def comparison(table: pd.DataFrame) -> plt.Figure:
    """Scores of every method with their intervals: a panel a score, a marker a split. `table`: `results.summary`."""
    rows = list(dict.fromkeys(zip(table["method"], table["k_predict"], strict=True)))
    splits = list(table["split"].unique())
    looks = [{"marker": "os"[i % 2], "markerfacecolor": "white" if i else None} for i in range(len(splits))]
    figure, axes = plt.subplots(1, len(SCORES), figsize=(10.5, 0.42 * len(rows) + 1.5), sharey=True)
    titles = ("Accuracy", "Mean class recall", "Recall, smallest class")
    for axis, score, title in zip(axes, SCORES, titles, strict=True):
        for value in table.to_dict("records"):
            row, number = (value["method"], value["k_predict"]), splits.index(value["split"])
            at, color = rows.index(row) + 0.22 * (number - (len(splits) - 1) / 2), COLORS[row[0]]
            axis.plot([value[f"{score}_low"], value[f"{score}_high"]], [at, at], color=color, lw=1.8)
            axis.plot(value[score], at, color=color, ms=6, **looks[number])
        axis.set(title=title, xlabel="per cent")
        axis.grid(axis="x", color="0.9")
    axes[0].set_yticks(range(len(rows)), [method_title(*row).replace("K_p", "$K_p$") for row in rows])
    axes[0].set_ylabel("method")
    axes[0].invert_yaxis()
    marks = [plt.Line2D([], [], color="0.3", lw=1.8, **look) for look in looks]
    titles = [SPLIT_TITLES[split] for split in splits]
    figure.legend(marks, titles, loc="outside lower center", ncols=len(splits))
    return figure


def convergence(panels: Iterable[tuple[str, pd.DataFrame, str]], columns: int = 3) -> plt.Figure:
    """Curves by epoch, a colour a method: mean over runs, and the range they span.

    Each panel is a title, rows of `results.history_table`, and the name of the column to draw.
    """
    panels = list(panels)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _grid(rows, columns, 3.6 * columns + 0.5, 2.9 * rows + 0.4)
    look = {"errorbar": ("pi", 100), "marker": "o", "markersize": 4, "markeredgewidth": 0, "legend": False}
    methods = {}
    for axis, (title, history, column) in zip(axes.flat, panels, strict=False):
        drawn = history.dropna(subset=column)
        if len(drawn):
            sns.lineplot(drawn, x="epoch", y=column, hue="method", palette=COLORS, ax=axis, **look)
        methods |= dict.fromkeys(drawn["method"])
        axis.set_axis_on()
        axis.set(title=title, xlabel="epoch", ylabel=_MEASURES.get(column, column.replace("_", " ")))
        axis.grid(axis="y", color="0.9")
        axis.xaxis.get_major_locator().set_params(integer=True)
    lines = [plt.Line2D([], [], color=COLORS[m], marker="o", ms=4, lw=1.8) for m in methods]
    columns = 2 if len(lines) == 4 else min(len(lines), 3)
    names = [method_title(method, SOFTMAX) for method in methods]
    figure.legend(lines, names, loc="outside lower center", ncols=columns)
    return figure


def embedding(panels: Iterable[tuple], class_names: Sequence[str], *, height: float = 4.1) -> plt.Figure:
    """Maps, two a row: (title, points (N, 2), labels (N,)) each; rare classes are drawn last, over the others.

    There are seven colours, and another marker for every seven classes. `height` of a row is in inches.
    """
    panels = list(panels)
    columns, rows = min(len(panels), 2), -(-len(panels) // 2)
    figure, axes = _grid(rows, columns, 1.12 * height * columns, height * rows)
    for axis, (title, points, labels) in zip(axes.flat, panels, strict=False):
        for c in np.argsort(-np.bincount(labels, minlength=len(class_names)), kind="stable"):
            style = {"color": CLASS_COLORS[c % 7], "marker": "o^sDv"[c // 7 % 5], "s": 9 if c < 7 else 14}
            axis.scatter(*points[labels == c].T, lw=0, alpha=0.8, label=class_names[c], **style)
        axis.set_title(title)
    if len(class_names) <= 35:  # Seven colours and five markers tell no more classes apart.
        handles, names = axes.flat[0].get_legend_handles_labels()
        handles = [handles[names.index(name)] for name in class_names]
        columns = min(len(class_names), 10 if max(map(len, class_names)) < 4 else 7)
        figure.legend(handles, class_names, loc="outside lower center", ncols=columns, markerscale=2)
    return figure


def neighbors(rows: Sequence[dict]) -> plt.Figure:
    """Queries, one a row on the left, and the images nearest to each, in frames that tell whose class they are of.

    Each row has `title`, text beside the query; `query`, uint8 (C, H, W), or None for an empty place; `images`, uint8
    (k, C, H, W), nearest first; `texts`, k titles; `same`, k booleans: of the query's true class (solid blue frame) or
    not (dashed orange); optionally `marked`, k booleans: these titles are bold.
    """
    k = max(len(row["images"]) for row in rows)
    widths = [1, 0.12] + [1] * k
    figure, axes = _grid(
        len(rows), k + 2, 0.7 * sum(widths) + 1.5, 0.94 * len(rows) + 0.1, width_ratios=widths
    )
    for line, row in zip(axes, rows, strict=True):
        _beside(line[0], row["title"])
        if row["query"] is not None:
            draw(line[0], row["query"])
        marked = row.get("marked", [False] * k)
        near = zip(line[2:], row["images"], row["texts"], row["same"], marked, strict=False)
        for axis, image, text, same, bold in near:
            draw(axis, image)
            axis.set(xticks=[], yticks=[])
            axis.set_axis_on()
            color, dash = (SAME, "-") if same else (OTHER, (0, (1.5, 0.8)))
            axis.spines[:].set(visible=True, color=color, linewidth=2.5, linestyle=dash, capstyle="butt")
            axis.set_title(text, fontsize=7.5, color=color, pad=3.5, fontweight="bold" if bold else "normal")
    return figure
