"""Figures in one style: scores with intervals, and curves by epoch."""

import math

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from deepknn_lib.study.results import SCORES, method_title
from deepknn_lib.study.runs import METHODS, SOFTMAX

# Methods of Table 2 have the colours of Okabe and Ito, which colour-blind readers can tell apart.
COLORS = {name: method.color for name, method in METHODS.items()}
SPLITS = {"paper": "split by image (the paper's kind)", "grouped": "split by lesion or patient"}
_MEASURES = {"train_acc": "training accuracy, per cent", "active": "share of active triplets"}


def comparison(table: pd.DataFrame) -> plt.Figure:
    """Scores of every method with their intervals: a panel a score, a marker a split. `table`: `results.summary`."""
    rows = list(dict.fromkeys(zip(table["method"], table["k_predict"], strict=True)))
    marks = [{"marker": "o", "lw": 1.8}, {"marker": "s", "mfc": "white", "lw": 1.8}]
    looks = dict(zip(table["split"].unique(), marks, strict=False))
    figure, axes = plt.subplots(1, len(SCORES), figsize=(10.5, 0.42 * len(rows) + 1.5), sharey=True)
    titles = ("Accuracy", "Mean class recall", "Recall, smallest class")
    for axis, score, title in zip(axes, SCORES, titles, strict=True):
        for value in table.to_dict("records"):
            beside = [*looks].index(value["split"]) - (len(looks) - 1) / 2
            at = rows.index((value["method"], value["k_predict"])) + 0.22 * beside
            color = COLORS[value["method"]]
            axis.plot([value[f"{score}_low"], value[f"{score}_high"]], [at, at], color=color, lw=1.8)
            axis.plot(value[score], at, ms=6, color=color, **looks[value["split"]])
        axis.set(title=title, xlabel="per cent (better →)")
        axis.grid(axis="x", color="0.9")
    axes[0].set_yticks(range(len(rows)), [method_title(*row).replace("K_p", "$K_p$") for row in rows])
    axes[0].set_ylabel("method")
    axes[0].invert_yaxis()
    named = {SPLITS.get(split, f"split {split}"): look for split, look in looks.items()}
    lines = [plt.Line2D([], [], label=name, color="0.3", **look) for name, look in named.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    return figure


def convergence(panels: list[tuple[str, pd.DataFrame, str]], columns: int = 3) -> plt.Figure:
    """Curves by epoch, mean and range over runs; a panel is a title, rows of `results.history_table` and a column."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = 3.6 * columns + 0.5, 2.9 * rows + 0.4
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    look = {"errorbar": ("pi", 100), "marker": "o", "markersize": 4, "markeredgewidth": 0, "legend": False}
    methods = {}
    for axis, (title, history, column) in zip(axes.flat, panels, strict=False):
        drawn = history.dropna(subset=column)
        if len(drawn):
            sns.lineplot(drawn, x="epoch", y=column, hue="method", palette=COLORS, ax=axis, **look)
        methods |= dict.fromkeys(drawn["method"])
        axis.set(title=title, xlabel="epoch", ylabel=_MEASURES.get(column, column.replace("_", " ")))
        axis.grid(axis="y", color="0.9")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    line = {"marker": "o", "ms": 4, "lw": 1.8}
    lines = [plt.Line2D([], [], label=method_title(m, SOFTMAX), color=COLORS[m], **line) for m in methods]
    ncols = 2 if len(lines) == 4 else min(len(lines), 3)
    figure.legend(handles=lines, loc="outside lower center", ncols=ncols)
    return figure
