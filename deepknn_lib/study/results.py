"""Tables of results: one row a run, their summary over seeds, paired differences; as CSV and as Markdown."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from deepknn_lib import metrics
from deepknn_lib.storage import figures_dir, repository, whole_file
from deepknn_lib.study.experiments import Result
from deepknn_lib.study.runs import METHODS, SOFTMAX

SCORES = {"acc": "Acc", "mcr": "MCR", "rs": "RS"}
KEYS = ("dataset", "split", "fold", "method", "backbone", "weights")
_TRAINING = ("epochs", "batch_size", "sampling", "k", "m", "margin", "soft", "search_every", "lr", "warmup")
_TRAINING += ("lr_decay_every",)
SETTINGS = ("image_size", "seed", "normalize", *_TRAINING)
# Settings that a loss does not read: their cells stay empty. Other losses read no setting of triplets.
_UNUSED = dict.fromkeys((None, "nca", "lmnn"), _TRAINING) | {"deep-knn": ("soft",)}
_UNUSED |= dict.fromkeys(("triplet", "semi-hard"), ("k", "m", "search_every"))
_NO_TRIPLETS = ("k", "m", "margin", "soft", "search_every")


def results_table(results: Iterable[Result], votes: tuple[int, ...] = ()) -> pd.DataFrame:
    """One row a run and K_p: settings, scores in per cent, seconds, device, versions, commit (see data/README.md).

    `votes` are the values of K_p; if it is empty, those of the run's method are taken.
    """
    rows = []
    for result in results:
        run, record, names = result.run, result.record, result.record["class_names"]
        labels = result.arrays["test_labels"]
        unused = _UNUSED.get(METHODS[run.trained.method].loss, _NO_TRIPLETS) + ("margin",) * run.trained.soft
        for k_predict in votes or METHODS[run.method].votes:
            predictions = result.predict(k_predict)
            row = {name: getattr(run, name) for name in KEYS}
            row |= {name: None if name in unused else getattr(run.trained, name) for name in SETTINGS}
            row |= {"k_predict": k_predict, "evaluate_on": run.evaluate_on}
            row |= {"n_train": len(result.arrays["train_labels"]), "n_test": len(labels)}
            row |= metrics.scores(labels, predictions, len(names), record["smallest"])
            if len(names) <= 10:
                recalls = 100 * metrics.class_recalls(labels, predictions, len(names))
                row |= {f"recall_{name}": value for name, value in zip(names, recalls, strict=True)}
            rows.append(
                row
                | {name: record[name] for name in ("collapsed", "seconds", "device", "versions", "commit")}
            )
    return pd.DataFrame(rows)


def history_table(results: Iterable[Result]) -> pd.DataFrame:
    """Every epoch of every run that trained something, one row each."""
    trained = [result for result in results if METHODS[result.run.method].loss]
    names = (*KEYS, "seed")
    return pd.DataFrame([{n: getattr(r.run, n) for n in names} | row for r in trained for row in r.history])


def select(results: Iterable[Result], **fields) -> list[Result]:
    """The results whose run has these values, e.g. `select(results, method="deep-knn", split="grouped")`."""
    return [r for r in results if all(getattr(r.run, name) == value for name, value in fields.items())]


def _draws(results: list[Result], values: np.ndarray, **options) -> dict[str, np.ndarray]:
    """The bootstrap of `values` on the test images of `results`."""
    arrays, record = results[0].arrays, results[0].record
    about = len(record["class_names"]), record["smallest"], arrays["test_groups"]
    return metrics.bootstrap(arrays["test_labels"], values, *about, **options)


def summary(results: Iterable[Result]) -> pd.DataFrame:
    """Mean and sd over seeds, and a 95 % bootstrap interval of the mean, one row a comparison's method and K_p.

    The interval answers "what if the test set had been drawn again?" for the mean of these seeds. The sd answers
    "what if the seed had been another?" and is NaN for a single seed.
    """
    results, rows = list(results), []
    keys = ["dataset", "split", "backbone", "method", "k_predict"]
    for values, group in results_table(results).groupby(keys, sort=False):
        row = dict(zip(keys, values, strict=True)) | {"seeds": len(group)}
        same = select(results, **{name: row[name] for name in keys[:-1]})
        right = np.mean([r.predict(row["k_predict"]) == r.arrays["test_labels"] for r in same], axis=0)
        draws = _draws(same, right)
        for score in SCORES:
            row |= {score: group[score].mean(), f"{score}_sd": group[score].std()}
            row |= dict(zip((f"{score}_low", f"{score}_high"), metrics.interval(draws[score]), strict=True))
        if "recall_vasc" in group:  # The paper's RS on Skin-7 seems to be this recall; see data/README.md.
            row |= {"vasc": group["recall_vasc"].mean(), "vasc_sd": group["recall_vasc"].std()}
        rows.append(row | {"collapsed": int(group["collapsed"].sum())})
    return pd.DataFrame(rows)


def paired(
    first: list[Result], second: list[Result], k_first: int = 5, k_second: int = 5, level: float = 0.95
) -> pd.DataFrame:
    """Difference of two methods (first − second) in points, with a paired bootstrap interval; one row a score.

    The two have the same seeds, each once, and the same test images, else a ValueError says so. `k_first` and
    `k_second` are their K_p, or SOFTMAX. The interval answers for other test images (whole groups are drawn) and for
    other seeds; with a single seed it answers for the images alone.
    """
    seeds = [sorted(r.run.seed for r in results) for results in (first, second)]
    if seeds[0] != seeds[1] or not seeds[0] or len(set(seeds[0])) < len(seeds[0]):
        raise ValueError(
            f"a paired difference needs the same seeds, each once; got {seeds[0]} and {seeds[1]}"
        )
    head, partner = first[0], {r.run.seed: r for r in second}
    labels, ids = head.arrays["test_labels"], head.arrays["test_ids"]
    for r in (*first, *second):
        if r.run.dataset != head.run.dataset or not np.array_equal(r.arrays["test_ids"], ids):
            raise ValueError(f"not the same test images: {head.run.label} and {r.run.label}")
    right = [(a.predict(k_first) == labels, partner[a.run.seed].predict(k_second) == labels) for a in first]
    differences = np.array([a.astype(np.float64) - b for a, b in right])
    draws = _draws(first, differences, draws=4000)  # At 99.5 %, ten draws lie beyond each end.
    mean, smallest = differences.mean(0), head.record["smallest"]
    recalls = {c: mean[labels == c].mean() for c in np.unique(labels)}
    point = {"acc": mean.mean(), "mcr": np.mean(list(recalls.values())), "rs": recalls.get(smallest, np.nan)}
    rows = [(name, 100 * point[s], *metrics.interval(draws[s], level)) for s, name in SCORES.items()]
    return pd.DataFrame(rows, columns=["score", "difference", "low", "high"])


def points(differences: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Rows of `paired` to read, one row for each `keys`: `+2.1 [+0.3, +4.0] *`; * means the interval excludes 0."""
    columns = zip(*(differences[name] for name in ("difference", "low", "high")), strict=True)
    text = [f"{d:+.1f} [{low:+.1f}, {high:+.1f}]" + " *" * (low > 0 or high < 0) for d, low, high in columns]
    named = differences[keys].assign(score=differences["score"], text=text)
    rows = [
        dict(zip(keys, values, strict=True)) | dict(zip(part["score"], part["text"], strict=True))
        for values, part in named.groupby(keys, sort=False)
    ]
    return pd.DataFrame(rows)[[*keys, *SCORES.values()]]


def method_title(method: str, k_predict: int) -> str:
    """The name of a row of Table 2."""
    return METHODS[method].title if k_predict == SOFTMAX else f"{METHODS[method].title}, K_p = {k_predict}"


def with_sd(table: pd.DataFrame, score: str) -> list[str]:
    """`72.4 ± 0.6` for each row; the mean alone where a single seed has no sd."""
    pairs = zip(table[score], table[f"{score}_sd"], strict=True)
    return [f"{mean:.1f}" + ("" if np.isnan(sd) else f" ± {sd:.1f}") for mean, sd in pairs]


def with_interval(table: pd.DataFrame, score: str) -> list[str]:
    """`72.4 [70.1, 74.5]` for each row."""
    rows = zip(table[score], table[f"{score}_low"], table[f"{score}_high"], strict=True)
    return [f"{mean:.1f} [{low:.1f}, {high:.1f}]" for mean, low, high in rows]


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A summary to read: `72.4 ± 0.6 [70.1, 74.5]`, one row a method; the backbone where there are several."""
    several = table["backbone"].nunique() > 1
    out = table[["split", "backbone"] if several else ["split"]].copy()
    rows = zip(table["method"], table["k_predict"], table["collapsed"], strict=True)
    out["method"] = [method_title(m, k) + " (collapsed)" * bool(collapsed) for m, k, collapsed in rows]
    for score, name in SCORES.items():
        values = zip(with_sd(table, score), table[f"{score}_low"], table[f"{score}_high"], strict=True)
        out[name] = [f"{value} [{low:.1f}, {high:.1f}]" for value, low, high in values]
    if "vasc" in table:
        out["VASC recall"] = with_sd(table, "vasc")
    return out.assign(seeds=table["seeds"])


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and sd over seeds of results rows that agree in every setting; `seeds` and `collapsed` count the runs."""
    keys = [*KEYS, "k_predict", "evaluate_on", *(name for name in SETTINGS if name != "seed")]
    rows = rows.reindex(columns=[*rows.columns, *(name for name in keys if name not in rows)])
    grouped = rows.groupby(keys, sort=False, dropna=False)
    means = grouped[[*SCORES]].agg(["mean", "std"])
    means.columns = [score if what == "mean" else f"{score}_sd" for score, what in means.columns]
    return means.assign(seeds=grouped.size(), collapsed=grouped["collapsed"].sum()).reset_index()


def paper(name: str) -> pd.DataFrame:
    """A table of data/paper/: as published, or the claims and the comparisons that they need."""
    return pd.read_csv(repository() / "data" / "paper" / f"{name}.csv")


def markdown(table: pd.DataFrame) -> str:
    """A pipe table; numbers have one decimal, missing values are a dash."""

    def cell(value) -> str:
        if isinstance(value, float):
            return "–" if np.isnan(value) else f"{value:.1f}"
        return "–" if value is None else str(value).replace("|", "\\|")

    marks = ("---:" if pd.api.types.is_numeric_dtype(table[name]) else "---" for name in table)
    rows = [map(str, table.columns), marks, *(map(cell, row) for row in table.itertuples(index=False))]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def save_rows(table: pd.DataFrame, name: str) -> None:
    """Write `tables/<name>.csv`: rows to work with, too many to read."""
    with whole_file(figures_dir() / "tables" / f"{name}.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def save_table(table: pd.DataFrame, name: str, caption: str, shown: pd.DataFrame | None = None) -> str:
    """Write `tables/<name>.csv` (every digit) and `.md` (`shown`, to read); return the Markdown with its caption."""
    text = f"**{caption}**\n\n{markdown(table if shown is None else shown)}\n"
    save_rows(table, name)
    with whole_file(figures_dir() / "tables" / f"{name}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text
