"""Figures in one style: scores with intervals, curves by epoch, and every comparison of the claims."""

import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from deepknn_lib.study.claims import CLAIMS, comparisons
from deepknn_lib.study.results import SCORES, method_title
from deepknn_lib.study.runs import SOFTMAX

# Methods of Table 2 have the colours of Okabe and Ito, which colour-blind readers can tell apart.
_STYLE = json.loads(Path(__file__).with_name("style.json").read_text(encoding="utf-8"))
COLORS = _STYLE["colors"]
SPLITS = {"paper": "split by image (the paper's kind)", "grouped": "split by lesion or patient"}
_OF_SPLIT = {"paper": {"color": "#d55e00"}, "grouped": {"color": "#0072b2"}}
_MEASURES = {"train_acc": "training accuracy, per cent", "active": "share of active terms"}


def use_style() -> None:
    """Set the one style of every figure."""
    sns.set_theme(context="notebook", style="ticks", font="DejaVu Sans", rc=_STYLE["rc"])


def in_one_point(features: np.ndarray) -> bool:
    """Whether most images have the same features (N, D), as far as float32 can tell: there is nothing to map then.

    UMAP would show classes that are not there, since it takes equal neighbours in the order of the rows, and t-SNE
    would end the process.
    """
    off = np.abs(features - np.median(features, axis=0)).max(axis=1)
    return bool(np.median(off) <= 1e-4 * np.abs(features).max())


def _legend(figure: plt.Figure, looks: dict[str, dict], ncols: int) -> None:
    """A legend below all panels: a name and its look, as of a line."""
    lines = [plt.Line2D([], [], **look) for look in looks.values()]
    figure.legend(lines, [*looks], loc="outside lower center", ncols=ncols)


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
        axis.set(title=title, xlabel="per cent (right is better)")
        axis.grid(axis="x", color="0.9")
    axes[0].set_yticks(range(len(rows)), [method_title(*row).replace("K_p", "$K_p$") for row in rows])
    axes[0].set_ylabel("method")
    axes[0].invert_yaxis()
    _legend(figure, {SPLITS[split]: {"color": "0.3"} | look for split, look in looks.items()}, len(looks))
    return figure


def convergence(panels: list[tuple[str, pd.DataFrame, str]], columns: int = 3) -> plt.Figure:
    """Curves by epoch, a colour a method: mean over runs, and the range they span.

    Each panel is a title, rows of `results.history_table`, and the name of the column to draw.
    """
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
    looks = {method_title(method, SOFTMAX): line | {"color": COLORS[method]} for method in methods}
    _legend(figure, looks, 2 if len(looks) == 4 else min(len(looks), 3))
    return figure


def forest(evidence: pd.DataFrame) -> plt.Figure:
    """Every comparison in points: ours as intervals (95 %; thin: the rule's level), the paper's as diamonds.

    A row is a comparison in a setting, a colour a split; what the rule does not count is pale. C5 and C10 are not in
    points and have no row; RS stands in the panel of MCR.
    """
    rows = comparisons(evidence).query("measure in @SCORES.values()")
    place = rows["setting"].str.replace(r", [^,]+ weights|, from scratch|, \d+ (px|epochs)", "", regex=True)
    place = "  (" + rows["dataset"] + ", " + place.str.replace("the cross-entropy network", "CE") + ")"
    rows["label"] = rows["claim"] + "  " + rows["comparison"]
    rows["label"] += rows["measure"].map({"RS": ", RS"}).fillna("") + place
    in_order = rows.drop_duplicates("label")
    in_order = in_order.sort_values("claim", key=lambda claims: claims.map(CLAIMS.index), kind="stable")
    labels, first = [*in_order["label"]], np.flatnonzero(in_order["claim"] != in_order["claim"].shift())
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.2 * len(labels) + 1.6), sharey=True)
    of_paper = {"color": "black", "mfc": "white", "marker": "D", "ms": 4}
    for row in rows.to_dict("records"):
        axis, line = axes[int(row["measure"] != "Acc")], labels.index(row["label"])
        at = line + (0.17 if row["split"] == "grouped" else -0.17)
        look = _OF_SPLIT[row["split"]] | {"alpha": 1 if row["says"] else 0.3}
        axis.plot([row["low"], row["high"]], [at, at], lw=0.8, **look)
        axis.plot([row["low_95"], row["high_95"]], [at, at], lw=2.2, **look)
        axis.plot(row["value"], at, "o", ms=3.5, **look)
        axis.plot(row["paper"], line, zorder=5, **of_paper)
    for axis, title in zip(axes, ("Acc", "MCR (RS where the row says so)"), strict=True):
        axis.axvline(0, color="0.4", lw=0.8)
        for line in first:  # of a claim
            axis.axhline(line - 0.5, color="0.4", lw=0.6)
        axis.set(title=title, xlabel="difference, points", ylim=(len(labels) - 0.5, -0.5))
        axis.grid(color="0.92")
    axes[0].set_yticks(range(len(labels)), [label.replace("K_p", "$K_p$") for label in labels], fontsize=7)
    ours = {"lw": 2.2, "marker": "o", "ms": 3.5}
    looks = {SPLITS[split]: look | ours for split, look in _OF_SPLIT.items()}
    looks["the paper's (ResNet-50, by image)"] = of_paper | {"lw": 0}
    looks["not counted"] = ours | {"color": "0.8"}
    _legend(figure, looks, 4)
    return figure
