"""Tidy results, their summary over seeds, paired differences; and tables as CSV and Markdown."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from deepknn_lib import metrics
from deepknn_lib.experiments import Result
from deepknn_lib.runs import METHODS
from deepknn_lib.storage import figures_dir, repository, whole_file

SCORES = {"acc": "Acc", "mcr": "MCR", "rs": "RS"}
_NOT_TRAINED = (
    "epochs", "batch_size", "sampling", "k", "m", "margin", "soft", "search_every", "lr", "warmup", "lr_decay_every",
)  # fmt: skip
SETTINGS = ("image_size", "seed", "normalize", *_NOT_TRAINED)
_UNUSED = {
    "weighted-ce": ("k", "m", "margin", "soft", "search_every"),
    "triplet": ("k", "m", "search_every"),
    "deep-knn": ("soft",),
}
KEYS = ("dataset", "split", "fold", "method", "backbone", "weights")
_LINEAR = ("nca", "lmnn")  # trained, but not by gradient steps on batches


def results_table(results: Iterable[Result], votes: tuple[int, ...] = ()) -> pd.DataFrame:
    """One row a run and K_p: settings, scores in per cent, seconds, device, versions, commit (see data/README.md).

    `votes` are the values of K_p; empty: those of the run's method.
    """
    rows = []
    for result in results:
        run, record, names = result.run, result.record, result.record["class_names"]
        labels, loss = result.arrays["test_labels"], METHODS[run.trained.method].loss
        unused = _NOT_TRAINED if loss is None or loss in _LINEAR else _UNUSED.get(loss, ())
        unused += ("margin",) * run.trained.soft
        for k_predict in votes or METHODS[run.method].votes:
            predictions = result.predict(k_predict)
            row = {n: getattr(run, n) for n in KEYS}
            row |= {n: None if n in unused else getattr(run.trained, n) for n in SETTINGS}
            row |= {"k_predict": k_predict, "evaluate_on": run.evaluate_on}
            row |= {"n_train": len(result.arrays["train_labels"]), "n_test": len(labels)}
            row |= metrics.scores(labels, predictions, len(names), record["smallest"])
            if len(names) <= 10:
                recalls = metrics.class_recalls(labels, predictions, len(names))
                row |= {f"recall_{name}": 100 * value for name, value in zip(names, recalls, strict=True)}
            row |= {n: record[n] for n in ("collapsed", "seconds", "device", "versions", "commit")}
            rows.append(row)
    return pd.DataFrame(rows)


def history_table(results: Iterable[Result]) -> pd.DataFrame:
    """Every epoch of every run that trained something, in long form."""
    trained = [r for r in results if METHODS[r.run.method].loss]
    return pd.DataFrame([{n: getattr(r.run, n) for n in (*KEYS, "seed")} | row for r in trained for row in r.history])


def select(results: Iterable[Result], **fields) -> list[Result]:
    """The results whose run has these values, e.g. `select(results, method="deep-knn", split="grouped")`."""
    return [r for r in results if all(getattr(r.run, n) == v for n, v in fields.items())]


def _correct(results: list[Result], k_predict: int) -> np.ndarray:
    """Share of the seeds that got each test image right."""
    return np.mean([r.predict(k_predict) == r.arrays["test_labels"] for r in results], axis=0)


def _draws(results: list[Result], correct: np.ndarray) -> dict[str, np.ndarray]:
    first = results[0]
    return metrics.bootstrap(
        first.arrays["test_labels"],
        correct,
        len(first.record["class_names"]),
        first.record["smallest"],
        first.arrays["test_groups"],
    )


def summary(results: Iterable[Result]) -> pd.DataFrame:
    """Per data set, split, backbone, method and K_p: mean and sd over seeds, and a 95 % bootstrap interval of the mean.

    The interval answers "what if the test set had been drawn again?" for the mean of these seeds; the sd answers
    "what if the seed had been another?". With a single seed sd is NaN.
    """
    results = list(results)
    table = results_table(results)
    keys = ["dataset", "split", "backbone", "method", "k_predict"]
    rows = []
    for values, group in table.groupby(keys, sort=False):
        row = dict(zip(keys, values, strict=True)) | {"seeds": len(group)}
        of_group = select(results, **{n: row[n] for n in ("dataset", "split", "backbone", "method")})
        draws = _draws(of_group, _correct(of_group, row["k_predict"]))
        for score in SCORES:
            low, high = metrics.interval(draws[score])
            row |= {
                score: group[score].mean(),
                f"{score}_sd": group[score].std(),
                f"{score}_low": low,
                f"{score}_high": high,
            }
        if "recall_vasc" in group:  # what the paper calls RS on Skin-7, it seems: see data/README.md
            row |= {"vasc": group["recall_vasc"].mean(), "vasc_sd": group["recall_vasc"].std()}
        rows.append(row | {"collapsed": int(group["collapsed"].sum())})
    return pd.DataFrame(rows)


def paired(
    first: list[Result], second: list[Result], k_first: int = 5, k_second: int = 5, level: float = 0.95
) -> pd.DataFrame:
    """Difference of two methods on the same test images and seeds, with a paired bootstrap interval.

    The interval answers for other test images (whole groups are drawn) and for other seeds; of a single seed it
    answers for the images alone.

    Parameters
    ----------
    first, second : list of Result
        Of one data set and split; the same seeds in any order, each once.
    k_first, k_second : int
        K_p of each; 0 is the network's own classifier.
    level : float
        Of the interval.

    Returns
    -------
    DataFrame
        One row a score: `score`, `difference` (first − second) in points, `low`, `high`.

    Raises
    ------
    ValueError
        If the two do not have the same seeds, or were not judged on the same test images.
    """
    seeds = [sorted(r.run.seed for r in results) for results in (first, second)]
    if seeds[0] != seeds[1] or not seeds[0] or len(set(seeds[0])) < len(seeds[0]):
        raise ValueError(f"a paired difference needs runs with the same seeds, each once; got {seeds[0]} and {seeds[1]}")
    head, partner = first[0], {r.run.seed: r for r in second}
    for r in (*first, *second):
        if r.run.dataset != head.run.dataset or not np.array_equal(r.arrays["test_ids"], head.arrays["test_ids"]):
            raise ValueError(f"not the same test images: {head.run.label} and {r.run.label}")
    labels = head.arrays["test_labels"]
    right = [(a.predict(k_first) == labels, partner[a.run.seed].predict(k_second) == labels) for a in first]
    differences = np.array([a.astype(np.float64) - b for a, b in right])
    n_classes, smallest = len(head.record["class_names"]), head.record["smallest"]
    # at a level of 99.5 % ten of four thousand draws lie beyond each end
    draws = metrics.bootstrap(labels, differences, n_classes, smallest, head.arrays["test_groups"], draws=4000)
    mean = differences.mean(0)
    recalls = [mean[labels == c].mean() if (labels == c).any() else np.nan for c in range(n_classes)]
    point = {"acc": 100 * mean.mean(), "mcr": 100 * np.nanmean(recalls), "rs": 100 * recalls[smallest]}
    rows = []
    for score, name in SCORES.items():
        low, high = metrics.interval(draws[score], level)
        rows.append({"score": name, "difference": point[score], "low": low, "high": high})
    return pd.DataFrame(rows)


def between_splits(first: list[Result], second: list[Result], k_predict: int = 5, level: float = 0.95) -> pd.DataFrame:
    """Difference of one method on two splits (first − second), with an interval; the test images differ, so it is wide.

    Parameters
    ----------
    first, second : list of Result
        One method's runs, the same number of seeds, on a split each.
    k_predict : int
        0 is the network's own classifier.
    level : float
        Of the interval, which answers for other test images (whole groups are drawn on each side) and other seeds.

    Returns
    -------
    DataFrame
        As of `paired`.
    """
    draws, points = [], []
    for side, results in enumerate((first, second)):
        labels, record = results[0].arrays["test_labels"], results[0].record
        right = np.array([r.predict(k_predict) == labels for r in results], dtype=np.float64)
        about = (len(record["class_names"]), record["smallest"])
        groups = results[0].arrays["test_groups"]
        draws.append(metrics.bootstrap(labels, right, *about, groups, draws=4000, seed=side))
        every = [metrics.scores(labels, r.predict(k_predict), *about) for r in results]
        points.append({score: np.mean([one[score] for one in every]) for score in SCORES})
    rows = []
    for score, name in SCORES.items():
        low, high = metrics.interval(draws[0][score] - draws[1][score], level)
        rows.append({"score": name, "difference": points[0][score] - points[1][score], "low": low, "high": high})
    return pd.DataFrame(rows)


def points(differences: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Rows of `paired` as people read them, a row for each `keys`: `+2.1 [+0.3, +4.0] *`; * the interval excludes 0."""
    star = np.where((differences["low"] > 0) | (differences["high"] < 0), " *", "")
    rows = zip(differences["difference"], differences["low"], differences["high"], star, strict=True)
    text = differences.assign(points=[f"{d:+.1f} [{low:+.1f}, {high:+.1f}]{s}" for d, low, high, s in rows])
    wide = text.pivot(index=keys, columns="score", values="points")[list(SCORES.values())]
    order = pd.MultiIndex.from_frame(differences[keys].drop_duplicates()) if len(keys) > 1 else differences[keys[0]].unique()
    return wide.loc[order].reset_index().rename_axis(columns=None)


def method_title(method: str, k_predict: int) -> str:
    """How a row of Table 2 is called."""
    return METHODS[method].title if k_predict == 0 else f"{METHODS[method].title}, K_p = {k_predict}"


def backbone_title(run) -> str:
    """Backbone and where its weights come from, of a Run or of a results row."""
    return f"{run.backbone}, " + ("from scratch" if run.weights == "none" else f"{run.weights} weights")


def with_sd(table: pd.DataFrame, score: str) -> list[str]:
    """`72.4 ± 0.6` for each row; the mean alone where a single seed has no sd."""
    pairs = zip(table[score], table[f"{score}_sd"], strict=True)
    return [f"{mean:.1f}" + ("" if np.isnan(sd) else f" ± {sd:.1f}") for mean, sd in pairs]


def with_interval(table: pd.DataFrame, score: str) -> list[str]:
    """`72.4 [70.1, 74.5]` for each row."""
    rows = zip(table[score], table[f"{score}_low"], table[f"{score}_high"], strict=True)
    return [f"{mean:.1f} [{low:.1f}, {high:.1f}]" for mean, low, high in rows]


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A summary as people read it: `72.4 ± 0.6 [70.1, 74.5]`, one row a method; the backbone where there are several."""
    out = pd.DataFrame({"split": table["split"]})
    if table["backbone"].nunique() > 1:
        out["backbone"] = table["backbone"]
    out["method"] = [
        method_title(m, k) + (" (collapsed)" if c else "")
        for m, k, c in zip(table["method"], table["k_predict"], table["collapsed"], strict=True)
    ]
    for score, name in SCORES.items():
        low, high = table[f"{score}_low"], table[f"{score}_high"]
        values = zip(with_sd(table, score), low, high, strict=True)
        out[name] = [f"{value} [{low:.1f}, {high:.1f}]" for value, low, high in values]
    if "vasc" in table:
        out["VASC recall"] = with_sd(table, "vasc")
    out["seeds"] = table["seeds"]
    return out


def paper(name: str) -> pd.DataFrame:
    """A table as published, from data/paper/."""
    return pd.read_csv(repository() / "data" / "paper" / f"{name}.csv")


def markdown(table: pd.DataFrame) -> str:
    """A pipe table; numbers with one decimal, missing values as a dash."""

    def cell(value) -> str:
        if isinstance(value, float):
            return "–" if np.isnan(value) else f"{value:.1f}"
        return "–" if value is None else str(value).replace("|", "\\|")

    numeric = [pd.api.types.is_numeric_dtype(table[column]) for column in table]
    lines = [
        "| " + " | ".join(map(str, table.columns)) + " |",
        "|" + "|".join("---:" if right else "---" for right in numeric) + "|",
    ]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


def save_rows(table: pd.DataFrame, name: str) -> None:
    """Write `tables/<name>.csv`: rows to work on, too many to read."""
    with whole_file(figures_dir() / "tables" / f"{name}.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def save_table(table: pd.DataFrame, name: str, caption: str, shown: pd.DataFrame | None = None) -> str:
    """Write `tables/<name>.csv` (every digit) and `.md` (`shown`, to read); return the Markdown with its caption."""
    text = f"**{caption}**\n\n{markdown(table if shown is None else shown)}\n"
    save_rows(table, name)
    with whole_file(figures_dir() / "tables" / f"{name}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Results rows, one a run, as mean and sd over seeds of runs that agree in every setting.

    Returns
    -------
    DataFrame
        Keys, `evaluate_on` and settings, then `acc`, `acc_sd` and so on, `seeds`, and how many `collapsed`.
    """
    keys = [*KEYS, "k_predict", "evaluate_on", *(n for n in SETTINGS if n != "seed")]
    rows = rows.reindex(columns=[*rows.columns, *(n for n in keys if n not in rows)])
    grouped = rows.groupby(keys, sort=False, dropna=False)
    means = grouped[[*SCORES]].agg(["mean", "std"])
    means.columns = [score if what == "mean" else f"{score}_sd" for score, what in means.columns]
    return means.assign(seeds=grouped.size(), collapsed=grouped["collapsed"].sum()).reset_index()
