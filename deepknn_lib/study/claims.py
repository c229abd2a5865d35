"""The paper's ten claims: results → evidence → a word on each comparison → a word on each claim.

The rule was fixed before the numbers: `data/paper/comparisons.csv` lists the comparisons that each claim needs, and
`bounds.csv` says what its words mean. Rivals that did not learn count for nothing.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from deepknn_lib import metrics
from deepknn_lib.study.experiments import Result
from deepknn_lib.study.results import SCORES, paired, paper, texts
from deepknn_lib.study.runs import METHODS, Run

CLAIMS = tuple(f"C{number}" for number in range(1, 11))
LEVEL = 1 - 0.05 / len(CLAIMS)  # Bonferroni over the claims. Within a claim, all comparisons must hold.
NUMBERS = ["value", "low", "high", "low_95", "high_95"]
COLUMNS = ["claim", "dataset", "split", "setting", "comparison", "measure", *NUMBERS, "side", "bound"]
COLUMNS += ["seeds", "test_images", "alive", "dead"]
_PLACE = ["dataset", "split", "fold", "setting"]
_SIDES = ["result", "result_rival"]


def evidence(results: Iterable[Result], *, variants: Iterable[Result] = ()) -> pd.DataFrame:
    """Every comparison that the claims need and the results allow, one row a comparison and measure.

    `variants` are deep kNN with another K or M (C9). Runs judged on a validation part are passed over, and variants
    that differ from the results in anything else. ValueError if a method has two settings in one group of runs.

    The claim wants the interval `low`..`high` (at `LEVEL`, over `seeds` pairs of runs) on the `side` of `bound`. Scores
    are in points; `epochs ratio` is a geometric mean; `ratio, train` and `ratio, test` are triplet's minus deep kNN's
    `metrics.compactness`. `dead` names the methods that did not learn.
    """
    runs, rows = _table(results), [pd.DataFrame(columns=COLUMNS)]
    varied = _matched(_table(variants), runs[runs["method"] == "deep-knn"], [*_PLACE, "alike"], "m:1")
    names = varied["k_m"] + " − " + varied["k_m_rival"]
    varied = varied.assign(comparison=names, place=varied["setting"]).query("k_m != k_m_rival")
    rule = paper("comparisons").merge(paper("bounds"), on="needed")
    robust = rule[rule["claim"] == "C9"].drop_duplicates("measure").assign(k_method=5)
    rule = pd.concat([rule, *(robust.assign(comparison=name) for name in varied["comparison"].unique())])
    for claim in CLAIMS:
        for name, needed in rule[rule["claim"] == claim].groupby("comparison", sort=False):
            tried = varied[varied["comparison"] == name]
            pairs = tried if len(tried) else _pairs(needed.iloc[0], runs, varied)
            groups = pairs.groupby(["dataset", "split", "place"], sort=False)
            rows += [_rows(needed, part, claim) for _, part in groups]
    return pd.concat(rows[1:] or rows, ignore_index=True)[COLUMNS]


def setting(run: Run) -> str:
    """Where a run's features come from, in words: backbone, weights, image size, another fold, epochs."""
    run = run.base or run
    start = "from scratch" if run.weights == "none" else f"{Path(run.weights).name} weights"
    words = [run.backbone, start, f"{run.image_size} px"] + [f"fold {run.fold}"] * (run.fold != 1)
    return ", ".join(words + [f"{run.epochs} epochs"] * bool(METHODS[run.method].loss))


def _table(results: Iterable[Result]) -> pd.DataFrame:
    """One row a result on test images; those that differ in no more than K, M and seed are `alike`."""
    rows, one = [], {"seed": 0, "k_predict": 5}
    for run, result in ((result.run, result) for result in results if result.run.evaluate_on == "test"):
        alike = replace(run, **one, k=5, m=5, base=run.base and replace(run.base, **one))
        keys = [run.dataset, run.split, run.fold, setting(run), run.method, run.seed]
        rows.append([*keys, alike, f"K = {run.k}, M = {run.m}", result])
    return pd.DataFrame(rows, columns=[*_PLACE, "method", "seed", "alike", "k_m", "result"])


def _matched(ours: pd.DataFrame, rival: pd.DataFrame, on: list[str], kind: str = "1:1") -> pd.DataFrame:
    """The runs of two methods by the seeds that both have; MergeError, a ValueError, where a method has two."""
    return ours.merge(rival, on=[*on, "seed"], suffixes=("", "_rival"), validate=kind)


def _pairs(needed: pd.Series, runs: pd.DataFrame, varied: pd.DataFrame) -> pd.DataFrame:
    """The runs that a comparison takes, side by side; those of one `place` (a setting, mostly) are judged together."""
    of, claim = {method: runs[runs["method"] == method] for method in METHODS}, needed["claim"]
    pairs = _matched(of[needed["method"]], of[needed["rival"]], _PLACE)
    if claim == "C9":
        pairs = pairs.merge(varied[_PLACE].drop_duplicates())
    if claim == "C1":  # Deep kNN on the main backbone, which has most runs, against each pretrained one.
        scratch = runs["setting"].str.contains("from scratch")
        deep, knn = (runs[~scratch & (runs["method"] == method)] for method in ("deep-knn", "knn"))
        sizes = deep.groupby(_PLACE[:3])["setting"]
        main = sizes.transform(lambda names: names.value_counts(sort=False).idxmax())
        pairs = _matched(deep[deep["setting"] == main], knn, _PLACE[:3], "1:m")
        both = zip(pairs["setting"], pairs["setting_rival"], strict=True)
        pairs["setting"] = [own if own.startswith(other) else f"{own} against {other}" for own, other in both]
    if claim in ("C2", "C5", "C10"):  # The two losses from the same weights, and after cross-entropy.
        later = _matched(of["deep-knn-ft"], of["triplet-ft"], _PLACE)
        later["setting"] += ", from the cross-entropy network"
        pairs = pd.concat([pairs, later])
    if claim != "C5":
        return pairs.assign(place=pairs["setting"])
    # C5 has one number a run. Settings in which both methods learnt are pooled.
    dead = ~pairs[_SIDES].map(lambda result: result.learnt).all(axis=1)
    dead = dead.groupby([pairs[name] for name in ("dataset", "split", "setting")]).transform("any")
    return pairs.assign(place=pairs["setting"].where(dead, ""))


def _rows(needed: pd.DataFrame, pairs: pd.DataFrame, claim: str) -> pd.DataFrame:
    """The rows of evidence, one a measure, from the runs of two methods in one place."""
    ours, rival = ([*pairs[side]] for side in _SIDES)
    run, where, numbers = ours[0].run, "; ".join(pairs["setting"].unique()), {}
    sides = (f"{run.method} itself", ours), (rival[0].run.method, rival)
    dead = [name for name, side in sides if not all(result.learnt for result in side)]
    if claim == "C9" and dead == ["deep-knn itself"]:
        # A K or M with which nothing is learnt counts against the claim.
        where, dead = f"{where}, learnt nothing", []
    if claim == "C5":
        where, numbers["epochs ratio"] = _epochs(pairs)
    elif claim == "C10":
        for part in ("train", "test"):
            names = f"{part}_features", f"{part}_labels"
            arrays = pairs[_SIDES].map(lambda result, names=names: [result.arrays[name] for name in names])
            ratios = arrays.map(lambda pair: metrics.compactness(*pair)["ratio"])
            numbers[f"ratio, {part}"] = over_runs(ratios["result_rival"] - ratios["result"])
    else:
        votes = needed[["k_method", "k_rival"]].iloc[0].astype(int)
        strict, usual = (paired(ours, rival, *votes, level).to_numpy() for level in (LEVEL, 0.95))
        numbers = {row[0]: [*row[1:], *more[2:]] for row, more in zip(strict, usual, strict=True)}
    numbers = pd.DataFrame.from_dict(numbers, "index", columns=NUMBERS)
    about = {"dataset": run.dataset, "split": run.split, "setting": where, "seeds": len(ours)}
    about["test_images"] = len(ours[0].arrays["test_labels"])
    return needed.join(numbers, on="measure").assign(**about, alive=not dead, dead=" and ".join(dead))


def _epochs(pairs: pd.DataFrame) -> tuple[str, np.ndarray]:
    """C5: ratio of the epochs to the highest multiple of 5 % that all deep kNN runs of a setting reach.

    For a rival that never reaches it, the ratio is the most it can be, so that `low` is 0.
    """
    histories = pairs[_SIDES].map(lambda result: result.history)
    best = histories["result"].map(lambda history: max(row["train_acc"] for row in history))
    goals = (best.groupby(pairs["setting"]).transform("min") // 5 * 5).astype(int)
    first, last = (np.array([*map(metrics.epochs_to_accuracy, histories[side], goals)]) for side in _SIDES)
    levels = goals.groupby(pairs["setting"], sort=False).first()
    never = sum(last > histories["result_rival"].map(len))
    where = f"{'; '.join(levels.index)}, to {', '.join(map(str, levels))} %"
    where += f", never by {never} of {len(last)} triplet runs: last epoch + 1" * bool(never)
    return where, np.exp(over_runs(np.log(first / last))) * [1, not never, 1, not never, 1]


def over_runs(values: np.ndarray) -> np.ndarray:
    """`NUMBERS` of the mean of independent runs, by Student's t; one run or two tell no interval: NaN."""
    from scipy import stats

    error = stats.sem(values) if len(values) > 2 else np.nan  # 0 where all runs are alike
    strict, usual = (error * stats.t.ppf((1 + level) / 2, len(values) - 1) for level in (LEVEL, 0.95))
    return np.mean(values) + np.array([0, -strict, strict, -usual, usual])


def comparisons(evidence: pd.DataFrame) -> pd.DataFrame:
    """Rows of `evidence` (new, or read back from CSV), each judged, with the paper's difference beside ours.

    `says` is `holds` or `contradicted` where the whole interval lies on the claimed or on the other side (by `margin`),
    else `undecided`; it is empty where the row does not count, and `aside` says why. `paper` is the paper's difference
    in points (its ResNet-50, split by image), where the images are the paper's; `inside` says whether it lies in our
    interval of 95 %: `yes`, `no`, or empty.
    """
    rows = evidence.merge(paper("differences"), "left")
    dead, few = rows["dead"].fillna(""), rows["seeds"] < 3 - rows["measure"].isin(SCORES.values())
    one_or_two = rows["seeds"].map({1: "a single seed", 2: "two runs"})
    reasons = [dead + " learnt nothing", one_or_two, "no interval"]
    rows["aside"] = np.select([dead != "", few, rows["low"].isna()], reasons, "")
    ends = rows[["low", "high"]].sub(rows["bound"], axis=0).mul(np.where(rows["side"] == ">", 1, -1), axis=0)
    rows["margin"] = ends.min(axis=1)
    told = [rows["aside"] != "", rows["margin"] > 0, ends.max(axis=1) < 0]
    rows["says"] = np.select(told, ["", "holds", "contradicted"], "undecided")
    known = rows[["paper", "low_95"]].notna().all(axis=1)
    return rows.assign(inside=np.select([~known, rows.eval("low_95 <= paper <= high_95")], ["", "yes"], "no"))


def verdicts(evidence: pd.DataFrame) -> pd.DataFrame:
    """The verdict on each claim for every data set and split with any evidence (new, or read back from CSV).

    `holds`: every comparison does. `holds in part (7 of 10)`: some do, none is contradicted. `undecided`: none holds,
    none is contradicted. `contradicted (2 of 10)`: so many are. `not tested`: no setting has every comparison with
    enough seeds and a rival that learnt, or the method that the claim is about did not learn. A setting whose rival
    did not learn is left out. `why` is one sentence with the counts.
    """
    groups, found = comparisons(evidence).groupby(["dataset", "split"], sort=False), []
    for place, here in groups:
        for claim in CLAIMS:
            rows, out = (here[(here["claim"] == claim) & (here["says"].eq("") == no)] for no in (False, True))
            aside = ", ".join(dict.fromkeys(texts("{} ({})", out, "aside", "setting")))
            aside = f"; left out: {aside}." if aside else "."
            if missing := _missing(claim, rows) or "runs of the method that learnt" * (" itself" in aside):
                found.append((claim, *place, "not tested", f"missing: {missing}{aside}"))
                continue
            hold, undecided, against = map([*rows["says"]].count, ("holds", "undecided", "contradicted"))
            said = f"{hold} of {len(rows)} comparisons hold, {undecided} undecided, {against} contradicted; "
            said += "the hardest: {comparison} ({setting}), {measure} {value:.3g} [{low:.3g}, {high:.3g}], "
            said += "needed {side} {bound:g}"
            word = "contradicted" if against else "holds in part" if hold < len(rows) else "holds"
            count = f" ({against or hold} of {len(rows)})" * (word != "holds")
            word = word + count if against or hold else "undecided"
            found.append((claim, *place, word, said.format(**rows.loc[rows["margin"].idxmin()]) + aside))
    return pd.DataFrame(found, columns=["claim", "dataset", "split", "verdict", "why"])


def _missing(claim: str, rows: pd.DataFrame) -> str:
    """What the best setting still lacks; empty when one setting has every comparison."""
    needed = texts("{}: {}", paper("comparisons").query("claim == @claim"), "comparison", "measure")
    had = [texts("{}: {}", part, "comparison", "measure") for _, part in rows.groupby("setting")] or [[]]
    missing = min(([one for one in needed if one not in of_setting] for of_setting in had), key=len)
    if not missing and claim == "C7" and rows["setting"].str.split(",").str[0].nunique() < 2:
        missing = ["a second backbone"]  # The claim says "whatever the backbone".
    if not missing and claim == "C9":
        varied = rows["comparison"].str.extract(r"^K = (\d+), M = (\d+) − K = (\d+), M = (\d+)$").dropna()
        missing = [f"another {name}" for n, name in enumerate("KM") if (varied[n] == varied[n + 2]).all()]
    return ", ".join(missing)
