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
        image.reduce(2).save(shown, "png")
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
            axis.imshow(image.transpose(1, 2, 0) if len(image) == 3 else image[0], cmap="gray", interpolation="nearest")
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


def convergence(history: pd.DataFrame, measures: dict[str, str]) -> plt.Figure:
    """Curves by epoch, a panel a measure, a colour a method: mean over runs, and the range they span."""
    figure, axes = plt.subplots(1, len(measures), figsize=(3.6 * len(measures) + 0.5, 3.3), squeeze=False)
    for axis, (column, label) in zip(axes[0], measures.items(), strict=True):
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
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    return figure


def embedding(panels: Iterable[tuple[str, np.ndarray, np.ndarray]], class_names: Sequence[str]) -> plt.Figure:
    """Maps side by side: (title, points (N, 2), labels (N,)) each; rare classes are drawn last, over the others."""
    panels = list(panels)
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 4.1 * rows), squeeze=False)
    for axis, (title, points, labels) in zip(axes.flat, panels, strict=False):
        order = np.argsort(-np.bincount(labels, minlength=len(class_names)))
        for c in order:
            of_class = labels == c
            axis.scatter(*points[of_class].T, s=9, color=CLASS_COLORS[c % 7], lw=0, alpha=0.8, label=class_names[c])
        axis.set_title(title)
        axis.set(xticks=[], yticks=[])
        sns.despine(ax=axis, left=True, bottom=True)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(handles), 7), markerscale=2)
    return figure
