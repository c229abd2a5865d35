"""Figures in one style, saved as PNG and PDF with their captions."""

import io
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from PIL import Image

from deepknn_lib.storage import figures_dir, whole_file
from deepknn_lib.tables import SCORES, method_title

# Okabe-Ito colours, told apart by colour-blind readers too; blue and orange as in the paper's Fig. 2
COLORS = {
    "knn": "#7f7f7f",
    "triplet": "#e69f00",
    "deep-knn": "#0072b2",
    "weighted-ce": "#009e73",
    "ce-knn": "#56b4e9",
    "deep-knn-ft": "#cc79a7",
    "triplet-ft": "#a65c00",
    "deep-knn-global": "#56b4e9",
    "nca": "#b5b500",
    "lmnn": "#8c6bb1",
    "mlp-triplet": "#e69f00",
    "mlp-ce": "#009e73",
    "mlp-deep-knn": "#0072b2",
}
CLASS_COLORS = ("#d55e00", "#e69f00", "#009e73", "#000000", "#0072b2", "#b5b5b5", "#cc79a7")
SPLIT_TITLES = {"paper": "split by image (the paper's kind)", "grouped": "split by lesion or patient"}


def use_style() -> None:
    """The one style of every figure."""
    sns.set_theme(context="notebook", style="ticks", font="DejaVu Sans", rc={
        "figure.dpi": 100, "savefig.dpi": 200, "savefig.bbox": "tight", "figure.constrained_layout.use": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "axes.labelsize": 10,
        "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "legend.frameon": False,
        "pdf.fonttype": 42,
    })  # fmt: skip


def save_figure(figure: plt.Figure, name: str, title: str, caption: str, alt: str) -> bytes:
    """Write `<name>.png` and `.pdf` to the figures folder, caption inside; return a PNG to show in a notebook.

    Parameters
    ----------
    figure : Figure
        Closed afterwards.
    name : str
        File name without suffix.
    title, caption : str
        Kept in the PNG's text fields, where the gallery finds them.
    alt : str
        What the figure shows, for those who cannot see it.
    """
    about = {"Title": title, "Description": caption, "Comment": alt}
    folder = figures_dir()
    with whole_file(folder / f"{name}.png") as temporary:
        figure.savefig(temporary, metadata=about | {"Software": None})
    with whole_file(folder / f"{name}.pdf") as temporary:
        figure.savefig(temporary, metadata={"Title": title, "Subject": caption, "CreationDate": None})
    plt.close(figure)
    shown = io.BytesIO()
    with Image.open(folder / f"{name}.png") as image:  # half the size is enough on a page, and drawing again is slow
        image.convert("RGB").reduce(2).quantize(256).save(shown, "png")  # photographs take four tenths of the space
    return shown.getvalue()


def image_grid(
    rows: Sequence[np.ndarray], row_titles: Sequence[str], *, columns: int, scale: float = 0.85
) -> plt.Figure:
    """Rows of images: each row uint8 (n, C, H, W); what is missing to `columns` stays empty."""
    figure, axes = plt.subplots(len(rows), columns, figsize=(columns * scale + 1.2, len(rows) * scale), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, images, title in zip(axes, rows, row_titles, strict=True):
        row[0].text(-0.15, 0.5, title, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
        for axis, image in zip(row, images, strict=False):
            draw(axis, image)
    return figure


def comparison(table: pd.DataFrame) -> plt.Figure:
    """Scores of every method with their intervals: a panel a score, a marker a split. `table`: `tables.summary`."""
    rows = table.drop_duplicates(["method", "k_predict"])[["method", "k_predict"]].itertuples(index=False)
    rows = [tuple(row) for row in rows]
    splits = list(dict.fromkeys(table["split"]))
    figure, axes = plt.subplots(1, len(SCORES), figsize=(10.5, 0.42 * len(rows) + 1.5), sharey=True)
    for axis, (score, name) in zip(axes, SCORES.items(), strict=True):
        for number, split in enumerate(splits):
            part = table[table["split"] == split].set_index(["method", "k_predict"])
            for y, row in enumerate(rows):
                if row not in part.index:
                    continue
                at, value = y + 0.22 * (number - (len(splits) - 1) / 2), part.loc[row]
                color = COLORS[row[0]]
                axis.plot([value[f"{score}_low"], value[f"{score}_high"]], [at, at], color=color, lw=1.8)
                axis.plot(value[score], at, "os"[number % 2], color=color, ms=6, mfc="white" if number else color)
        axis.set_title({"Acc": "Accuracy", "MCR": "Mean class recall", "RS": "Recall, smallest class"}[name])
        axis.set_xlabel("per cent")
        axis.grid(axis="x", color="0.9")
    axes[0].set_yticks(range(len(rows)), [method_title(*row).replace("K_p", "$K_p$") for row in rows])
    axes[0].invert_yaxis()
    marks = [
        plt.Line2D([], [], color="0.3", marker="os"[i % 2], mfc="white" if i else "0.3", lw=1.8, label=SPLIT_TITLES[s])
        for i, s in enumerate(splits)
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(splits))
    return figure


def convergence(panels: Iterable[tuple[str, pd.DataFrame, str]], columns: int = 3) -> plt.Figure:
    """Curves by epoch, a colour a method: mean over runs, and the range they span.

    Each panel: title, rows of `tables.history_table`, and the column to draw.
    """
    panels = list(panels)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns + 0.5, 2.9 * rows + 0.4), squeeze=False)
    for axis, (label, history, column) in zip(axes.flat, panels, strict=False):
        for method, part in history.groupby("method", sort=False):
            by_epoch = part.dropna(subset=[column]).groupby("epoch")[column]
            if not len(by_epoch):
                continue
            mean = by_epoch.mean()
            title = method_title(method, 0)
            axis.plot(mean.index, mean, color=COLORS[method], marker="o", ms=3, lw=1.8, label=title)
            axis.fill_between(mean.index, by_epoch.min(), by_epoch.max(), color=COLORS[method], alpha=0.18, lw=0)
        axis.set_xlabel("epoch")
        axis.set_title(label)
        axis.grid(axis="y", color="0.9")
        axis.xaxis.get_major_locator().set_params(integer=True)
    shown = {name: line for axis in axes.flat for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=2 if len(shown) == 4 else min(len(shown), 3))
    return figure


def embedding(
    panels: Iterable[tuple[str, np.ndarray, np.ndarray]], class_names: Sequence[str], *, height: float = 4.1
) -> plt.Figure:
    """Maps side by side, two a row: (title, points (N, 2), labels (N,)) each; rare classes are drawn last, over the others.

    Seven colours, and another marker for every seven classes; `height` of a row in inches.
    """
    panels = list(panels)
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.12 * height * columns, height * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, points, labels) in zip(axes.flat, panels, strict=False):
        order = np.argsort(-np.bincount(labels, minlength=len(class_names)), kind="stable")
        for c in order:
            style = {"color": CLASS_COLORS[c % 7], "marker": "o^sDv"[c // 7 % 5], "s": 9 if c < 7 else 14}
            axis.scatter(*points[labels == c].T, lw=0, alpha=0.8, label=class_names[c], **style)
        axis.set_title(title)
    if len(class_names) <= 35:  # more than 7 colours and 5 markers tell apart
        drawn = dict(zip(*reversed(axes.flat[0].get_legend_handles_labels()), strict=True))
        columns = 10 if max(map(len, class_names)) < 4 else 7
        handles = [drawn[name] for name in class_names]
        figure.legend(handles, class_names, loc="outside lower center", ncols=min(len(handles), columns), markerscale=2)
    return figure


SAME, OTHER = "#0072b2", "#d55e00"  # frames of neighbours: of the query's class, and of another


def neighbors(rows: Sequence[dict], *, scale: float = 0.7) -> plt.Figure:
    """Queries, one a row on the left, and the images nearest to each, in frames that say whose class they are of.

    Parameters
    ----------
    rows : sequence of dict
        `title`, text beside the query; `query`, uint8 (C, H, W), or None to leave its place empty; `images`, uint8
        (k, C, H, W), nearest first; `texts`, k titles; `same`, k booleans: of the query's true class (solid blue frame)
        or not (dashed orange). Optionally `marked`, k booleans: these titles are bold.
    scale : float
        Side of an image in inches.
    """
    k = max(len(row["images"]) for row in rows)
    widths = [1, 0.12] + [1] * k
    size = (sum(widths) * scale + 1.5, len(rows) * (scale + 0.24) + 0.1)
    figure, axes = plt.subplots(len(rows), k + 2, figsize=size, squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_axis_off()
    for line, row in zip(axes, rows, strict=True):
        line[0].text(-0.1, 0.5, row["title"], transform=line[0].transAxes, ha="right", va="center", fontsize=9)
        if row["query"] is not None:
            draw(line[0], row["query"])
        marked = row.get("marked", [False] * len(row["images"]))
        for axis, image, text, same, bold in zip(line[2:], row["images"], row["texts"], row["same"], marked, strict=False):
            draw(axis, image)
            color = SAME if same else OTHER
            axis.set_axis_on()
            dash = "-" if same else (0, (1.5, 0.8))
            axis.spines[:].set(visible=True, color=color, linewidth=2.5, linestyle=dash, capstyle="butt")
            axis.set_title(text, fontsize=7.5, color=color, pad=3.5, fontweight="bold" if bold else "normal")
    return figure


def draw(axis: plt.Axes, image: np.ndarray) -> None:
    """Show an image, uint8 (C, H, W), on an axis."""
    axis.imshow(image.transpose(1, 2, 0) if len(image) == 3 else image[0], cmap="gray", interpolation="nearest")
