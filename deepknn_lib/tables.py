"""Tidy results, their summary over seeds, paired differences; and tables as CSV and Markdown."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from deepknn_lib import metrics
from deepknn_lib.experiments import Result
from deepknn_lib.runs import METHODS
from deepknn_lib.storage import figures_dir, repository, whole_file

SCORES = {"acc": "Acc", "mcr": "MCR", "rs": "RS"}
_SETTINGS = ("image_size", "seed", "normalize", "epochs", "batch_size", "sampling", "k", "m", "margin", "lr")
_NOT_TRAINED = ("epochs", "batch_size", "sampling", "k", "m", "margin", "lr")


def results_table(results: Iterable[Result]) -> pd.DataFrame:
    """One row a run and K_p: settings, scores in per cent, seconds, device, versions, commit (see data/README.md)."""
    rows = []
    for result in results:
        run, record, names = result.run, result.record, result.record["class_names"]
        labels, loss = result.arrays["test_labels"], METHODS[run.trained.method].loss
        unused = _NOT_TRAINED if loss is None else ("k", "m", "margin") if loss == "weighted-ce" else ()
        for k_predict in METHODS[run.method].votes:
            predictions = result.predict(k_predict)
            row = {n: getattr(run, n) for n in ("dataset", "split", "fold", "method", "backbone", "weights")}
            row |= {n: None if n in unused else getattr(run.trained, n) for n in _SETTINGS}
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
    keys = ("dataset", "split", "fold", "method", "backbone", "weights", "seed")
    rows = [
        {n: getattr(r.run, n) for n in keys} | row for r in results if METHODS[r.run.method].loss for row in r.history
    ]
    return pd.DataFrame(rows)


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
    """Per data set, split, method and K_p: mean and sd over seeds, and a 95 % bootstrap interval of the mean.

    The interval answers "what if the test set had been drawn again?" for the mean of these seeds; the sd answers
    "what if the seed had been another?". With a single seed sd is NaN.
    """
    results = list(results)
    table = results_table(results)
    keys = ["dataset", "split", "method", "k_predict"]
    rows = []
    for (dataset, split, method, k_predict), group in table.groupby(keys, sort=False):
        of_group = select(results, dataset=dataset, split=split, method=method)
        draws = _draws(of_group, _correct(of_group, int(k_predict)))
        row = dict(zip(keys, (dataset, split, method, int(k_predict)), strict=True)) | {"seeds": len(group)}
        for score in SCORES:
            low, high = metrics.interval(draws[score])
            row |= {
                score: group[score].mean(),
                f"{score}_sd": group[score].std(),
                f"{score}_low": low,
                f"{score}_high": high,
            }
        rows.append(row | {"collapsed": int(group["collapsed"].sum())})
    return pd.DataFrame(rows)


def paired(results: Iterable[Result], split: str, a: tuple[str, int], b: tuple[str, int]) -> pd.DataFrame:
    """Difference a − b on the same test images, with a 95 % paired bootstrap interval.

    Parameters
    ----------
    results : iterable of Result
        Of one data set; both methods with the same seeds.
    split : str
    a, b : tuple of (str, int)
        Method and K_p.

    Returns
    -------
    DataFrame
        One row a score: `score`, `difference` in points, `low`, `high`.

    Raises
    ------
    ValueError
        If the two were not run with the same seeds.
    """
    results = list(results)
    first, second = (select(results, split=split, method=method) for method, _ in (a, b))
    if sorted(r.run.seed for r in first) != sorted(r.run.seed for r in second) or not first:
        raise ValueError(f"{a[0]} and {b[0]} need runs with the same seeds on the {split} split")
    difference = _correct(first, a[1]) - _correct(second, b[1])
    draws = _draws(first, difference)
    labels = first[0].arrays["test_labels"]
    by_class = [100 * difference[labels == c].mean() for c in np.unique(labels)]
    smallest = labels == first[0].record["smallest"]
    point = {"acc": 100 * difference.mean(), "mcr": np.mean(by_class), "rs": 100 * difference[smallest].mean()}
    rows = []
    for score, name in SCORES.items():
        low, high = metrics.interval(draws[score])
        rows.append({"score": name, "difference": point[score], "low": low, "high": high})
    return pd.DataFrame(rows)


def method_title(method: str, k_predict: int) -> str:
    """How a row of Table 2 is called."""
    return METHODS[method].title if k_predict == 0 else f"{METHODS[method].title}, K_p = {k_predict}"


def backbone_title(run) -> str:
    """Backbone and where its weights come from, of a Run or of a results row."""
    return f"{run.backbone}, " + ("from scratch" if run.weights == "none" else f"{run.weights} weights")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A summary as people read it: `72.4 ± 0.6 [70.1, 74.5]`, one row a method."""
    out = pd.DataFrame(
        {
            "split": table["split"],
            "method": [
                method_title(m, k) + (" (collapsed)" if c else "")
                for m, k, c in zip(table["method"], table["k_predict"], table["collapsed"], strict=True)
            ],
        }
    )
    for score, name in SCORES.items():
        sd = table[f"{score}_sd"]
        out[name] = [
            f"{mean:.1f}" + ("" if np.isnan(s) else f" ± {s:.1f}") + f" [{low:.1f}, {high:.1f}]"
            for mean, s, low, high in zip(table[score], sd, table[f"{score}_low"], table[f"{score}_high"], strict=True)
        ]
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


def beside(published: pd.DataFrame, ours: pd.DataFrame) -> pd.DataFrame:
    """The paper's rows and our summary in columns of their own, one row a method and K_p; a dash where one has none."""

    def three(row, style) -> str:
        return " / ".join(style(row, score) for score in SCORES)

    def with_sd(row, score) -> str:
        sd = row[f"{score}_sd"]
        return f"{row[score]:.1f}" + ("" if np.isnan(sd) else f" ± {sd:.1f}")

    rows = []
    for method, k_predict in ours[["method", "k_predict"]].drop_duplicates().itertuples(index=False):
        match = published[(published["method"] == method) & (published["k_predict"] == k_predict)]
        row = {"method": method_title(method, k_predict)}
        row["paper"] = three(match.iloc[0], lambda r, score: f"{r[score]:.1f}") if len(match) else "–"
        for split in ours["split"].unique():
            of_split = ours[(ours["split"] == split) & (ours["method"] == method) & (ours["k_predict"] == k_predict)]
            row[f"ours, {split} split"] = three(of_split.iloc[0], with_sd) if len(of_split) else "–"
        rows.append(row)
    return pd.DataFrame(rows)


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Committed rows, one a run, as mean ± sd over seeds of runs that agree in everything else that matters."""
    keys = ["dataset", "split", "method", "k_predict", "backbone", "weights", "image_size", "epochs"]
    out = []
    for _, group in rows.groupby(keys, sort=False, dropna=False):
        first = group.iloc[0]
        row = {"dataset": first["dataset"], "split": first["split"]}
        row["method"] = method_title(first["method"], first["k_predict"])
        row["backbone"] = f"{backbone_title(first)}, {first['image_size']} px"
        for score, name in SCORES.items():
            sd = group[score].std()
            row[name] = f"{group[score].mean():.1f}" + ("" if np.isnan(sd) else f" ± {sd:.1f}")
        out.append(row | {"seeds": len(group)})
    return pd.DataFrame(out)
