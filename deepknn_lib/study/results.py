"""Tables of results: one row a run, their summary over seeds, paired differences; as CSV and as Markdown."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pandas as pd

from deepknn_lib import metrics
from deepknn_lib.criteria import LOSSES, TRIPLETS
from deepknn_lib.storage import figures_dir, repository, write_csv
from deepknn_lib.study.experiments import Result
from deepknn_lib.study.runs import METHODS, SOFTMAX, Run

SCORES = {"acc": "Acc", "mcr": "MCR", "rs": "RS"}
MEASURED = ("seconds", "eval_seconds", "device", "versions", "commit")  # another number or word in every run
KEYS = ("dataset", "split", "fold", "method", "backbone", "weights")
# The settings of a row, and the losses that read each; the loss None trains nothing.
_READ_BY = dict.fromkeys(("image_size", "seed", "normalize"), (*LOSSES, "nca", "lmnn", None))
_READ_BY |= dict.fromkeys(("epochs", "batch_size", "sampling"), LOSSES)
_READ_BY |= {"k": ("deep-knn",), "m": ("deep-knn",), "margin": ("deep-knn", *TRIPLETS), "soft": TRIPLETS}
_READ_BY |= {"class_power": ("weighted-ce",), "search_every": ("deep-knn",)}
_READ_BY |= dict.fromkeys(("lr", "warmup", "lr_decay_every", "precision"), LOSSES)
SETTINGS = tuple(_READ_BY)


def results_table(results: Iterable[Result], votes: tuple[int, ...] = ()) -> pd.DataFrame:
    """One row a run and K_p: settings (None where the loss reads none), scores in per cent, seconds, device, commit.

    `votes` are the values of K_p; if it is empty, those of each result. See data/results/README.md.
    """
    return pd.DataFrame([row for result in results for row in _rows(result, votes)])


def _rows(result: Result, votes: tuple[int, ...]) -> Iterator[dict]:
    run, trained, record = result.run, result.run.trained, result.record
    loss = METHODS[trained.method].loss
    about = {name: getattr(run, name) for name in KEYS}
    about |= {name: getattr(trained, name) if loss in losses else None for name, losses in _READ_BY.items()}
    about["margin"] = None if trained.soft else about["margin"]
    sizes = {f"n_{part}": len(result.arrays[f"{part}_labels"]) for part in ("train", "test")}
    origin = {name: record[name] for name in ("collapsed", "seconds", "device", "versions", "commit")}
    for k_predict in votes or result.votes:
        scores = result.scores(k_predict)
        if len(record["class_names"]) > 10:  # A recall for each would be too many columns.
            scores = {name: scores[name] for name in SCORES}
        yield about | {"k_predict": k_predict, "evaluate_on": run.evaluate_on} | sizes | scores | origin


def history_table(results: Iterable[Result]) -> pd.DataFrame:
    """Every epoch of every run that trained something, one row each."""
    trained = [result for result in results if METHODS[result.run.method].loss]
    about = [{name: getattr(result.run, name) for name in (*KEYS, "seed")} for result in trained]
    rows = [own | epoch for own, result in zip(about, trained, strict=True) for epoch in result.history]
    return pd.DataFrame(rows)


def predictions_table(results: Iterable[Result]) -> pd.DataFrame:
    """The class that each method and K_p (`method:k`) gives each test image; one row an image of a set, split and seed.

    ValueError if a method has two settings.
    """
    parts, where = {}, ["dataset", "split", "fold", "seed"]
    for result in results:
        run, arrays = result.run, result.arrays
        names = np.array(result.record["class_names"])
        images = {"image": arrays["test_ids"], "group": arrays["test_groups"]}
        images["label"] = names[arrays["test_labels"]]
        part = parts.setdefault(tuple(getattr(run, name) for name in where), pd.DataFrame(images))
        for k_predict in result.votes:
            column = f"{run.method}:{k_predict}"
            if column in part:
                raise ValueError(f"two settings of {run.method} on the same images; leave one out")
            part[column] = names[result.predict(k_predict)]
    return pd.concat(parts, names=where).droplevel(-1).reset_index()


def select(results: Iterable[Result], **fields) -> list[Result]:
    """The results whose run has these values, e.g. `select(results, method="deep-knn", split="grouped")`."""
    return [r for r in results if all(getattr(r.run, name) == value for name, value in fields.items())]


def over_seeds(rows: pd.DataFrame, keys: Iterable[str] = (), scores: Iterable[str] = SCORES) -> pd.DataFrame:
    """Mean and sd (`acc`, `acc_sd`, …) of results rows that agree in `keys` (if empty: every setting but the seed).

    `seeds` and `collapsed` count the runs.
    """
    keys = [*keys] or [*KEYS, "k_predict", "evaluate_on", *(name for name in SETTINGS if name != "seed")]
    scores = [*scores]
    grouped = rows.reindex(columns=[*keys, *scores, "collapsed"]).groupby(keys, sort=False, dropna=False)
    means = grouped[scores].mean().join(grouped[scores].std().add_suffix("_sd"))
    return means.assign(seeds=grouped.size(), collapsed=grouped["collapsed"].sum()).reset_index()


def summary(results: Iterable[Result]) -> pd.DataFrame:
    """Mean and sd over seeds, and a 95 % interval of the mean, one row a comparison's method and K_p.

    The interval answers "what if the test set had been drawn again?" by a bootstrap over groups of images. Where
    drawing changes nothing in the recall of the smallest class, as at 0 and 100 %, the interval is the exact binomial
    one (Clopper and Pearson) of as many groups. The sd answers "what if the seed had been another?".
    """
    results, keys = list(results), ["dataset", "split", "backbone", "method"]
    # The paper's RS on Skin-7 seems to be the recall of vasc; see data/README.md.
    rows = results_table(results).rename(columns={"recall_vasc": "vasc"})
    scores = [*SCORES, *rows.columns.intersection(["vasc"])]
    table = over_seeds(rows, [*keys, "k_predict"], scores)
    same = [(select(results, **row[keys]), row["k_predict"]) for _, row in table.iterrows()]
    same = [([result for result in found if k in result.votes], k) for found, k in same]
    several = any(len({unseeded(result.run).key for result in found}) > 1 for found, _ in same)
    if several or rows.duplicated([*keys, "k_predict", "seed"]).any():
        raise ValueError("there are several settings of a method; let seeds alone differ")
    return table.join(pd.DataFrame([_intervals(*one) for one in same]))


def unseeded(run: Run) -> Run:
    """The run that all those are alike which differ in seed and K_p."""
    return replace(run, seed=0, k_predict=5, base=run.base and unseeded(run.base))


def _intervals(seeds: list[Result], k_predict: int) -> dict[str, float]:
    """`acc_low`, `acc_high` and so on of the mean over results that differ in their seeds alone."""
    from scipy.stats import binomtest

    _check_images(seeds)
    labels = seeds[0].arrays["test_labels"]
    right = np.mean([result.predict(k_predict) == labels for result in seeds], axis=0)
    draws = _draws(seeds[0], right)
    ends = {score: metrics.interval(draws[score]) for score in SCORES}
    if not ends["rs"][0] < ends["rs"][1]:
        smallest = labels == seeds[0].record["smallest"]
        n = len(np.unique(seeds[0].arrays["test_groups"][smallest]))
        exact = binomtest(round(n * right[smallest].mean()), n).proportion_ci()
        ends["rs"] = 100 * exact.low, 100 * exact.high
    return {f"{s}_{end}": ends[s][n] for s in SCORES for n, end in enumerate(("low", "high"))}


def _draws(result: Result, correct: np.ndarray, **options) -> dict[str, np.ndarray]:
    """The bootstrap of `correct` over the test images of `result`."""
    arrays, record = result.arrays, result.record
    about = len(record["class_names"]), record["smallest"], arrays["test_groups"]
    return metrics.bootstrap(arrays["test_labels"], correct, *about, **options)


def _check_images(results: list[Result]) -> None:
    head, ids = results[0].run, results[0].arrays["test_ids"]
    for result in results:
        if result.run.dataset != head.dataset or not np.array_equal(result.arrays["test_ids"], ids):
            raise ValueError(f"not the same test images: {head.label} and {result.run.label}")


def paired(first: list[Result], second: list[Result], k_first=5, k_second=5, level=0.95) -> pd.DataFrame:
    """Difference of two methods (first − second) in points, with a paired bootstrap interval; one row a score.

    The two lists of results have the same seeds, each once, and the same test images, else a ValueError says so.
    `k_first` and `k_second` are their K_p, or SOFTMAX. The interval answers for other test images (whole groups are
    drawn) and for other seeds; with a single seed it answers for the images alone.
    """
    first, second = (sorted(results, key=lambda r: r.run.seed) for results in (first, second))
    seeds, others = ([result.run.seed for result in results] for results in (first, second))
    if seeds != others or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"a paired difference needs the same seeds, each once; got {seeds} and {others}")
    _check_images([*first, *second])
    head, labels = first[0], first[0].arrays["test_labels"]
    right = np.array([result.predict(k_first) == labels for result in first], dtype=float)
    gain = right - np.array([result.predict(k_second) == labels for result in second], dtype=float)
    draws = _draws(head, gain, draws=4000)  # At 99.5 %, ten draws lie beyond each end.
    mean = pd.Series(gain.mean(axis=0))
    recalls = mean.groupby(labels).mean()
    point = {"acc": mean.mean(), "mcr": recalls.mean(), "rs": recalls.get(head.record["smallest"], np.nan)}
    rows = [(name, 100 * point[s], *metrics.interval(draws[s], level)) for s, name in SCORES.items()]
    return pd.DataFrame(rows, columns=["score", "difference", "low", "high"])


def texts(template: str, table: pd.DataFrame, *names: str) -> list[str]:
    """The template, filled with these columns of each row."""
    return [template.format(*row) for row in table[[*names]].itertuples(index=False)]


def points(differences: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Rows of `paired` to read, one row for each `keys`: `+2.1 [+0.3, +4.0] *`; * means the interval excludes 0."""
    table = differences.assign(star=np.where(differences.eval("low > 0 or high < 0"), " *", ""))
    text = texts("{:+.1f} [{:+.1f}, {:+.1f}]{}", table, "difference", "low", "high", "star")
    table["text"] = np.char.replace(text, " [+nan, +nan]", "")
    wide = table.pivot_table("text", keys, "score", aggfunc="first", sort=False)
    return wide[[*SCORES.values()]].rename_axis(columns=None).reset_index()


def method_title(method: str, k_predict: int) -> str:
    """The name of a row of Table 2."""
    return METHODS[method].title + f", K_p = {k_predict}" * (k_predict != SOFTMAX)


def with_sd(table: pd.DataFrame, score: str) -> list[str]:
    """`72.4 ± 0.6` for each row; the mean alone where a single seed has no sd."""
    return [text.removesuffix(" ± nan") for text in texts("{:.1f} ± {:.1f}", table, score, f"{score}_sd")]


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A summary to read: `72.4 ± 0.6 [70.1, 74.5]`, one row a method; the backbone where there are several."""
    out = table[["split", "backbone"] if table["backbone"].nunique() > 1 else ["split"]].copy()
    rows = table[["method", "k_predict", "collapsed"]].itertuples(index=False)
    out["method"] = [method_title(m, k) + " (collapsed)" * bool(collapsed) for m, k, collapsed in rows]
    for score, name in SCORES.items():
        ends = texts(" [{:.1f}, {:.1f}]", table, f"{score}_low", f"{score}_high")
        out[name] = np.char.add(with_sd(table, score), np.char.replace(ends, " [nan, nan]", ""))
    if "vasc" in table:
        out["VASC recall"] = with_sd(table, "vasc")
    return out.assign(seeds=table["seeds"])


def paper(name: str) -> pd.DataFrame:
    """A table of data/paper/: as published, or the claims and the comparisons that they need."""
    return pd.read_csv(repository() / "data" / "paper" / f"{name}.csv")


def markdown(table: pd.DataFrame) -> str:
    """A pipe table; numbers have one decimal, missing values are a dash, and text is no HTML (a class may be `<b>`)."""
    text = table.map(lambda value: f"{value:.1f}" if isinstance(value, float) else str(value))
    text = text.replace({r"\|": r"\|", "<": "&lt;"}, regex=True).mask(table.isna(), "–")
    marks = ["---:" if pd.api.types.is_numeric_dtype(kind) else "---" for kind in table.dtypes]
    rows = [map(str, table.columns), marks, *text.to_numpy()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def save_rows(table: pd.DataFrame, name: str, folder: str = "tables") -> None:
    """Write `tables/<name>.csv` without the columns `MEASURED`; a table that has some goes whole to `machine/` too."""
    lasting = table.drop(columns=[*MEASURED], errors="ignore")
    write_csv(lasting, figures_dir() / folder / f"{name}.csv")
    if len(lasting.columns) < len(table.columns):
        write_csv(table, figures_dir() / "machine" / f"{name}.csv")
