"""The paper's ten claims: results → evidence → a word on each comparison → a word on each claim.

`data/paper/comparisons.csv` lists the comparisons that each claim needs, and `bounds.csv` says what its words mean;
both were fixed before the numbers. Rivals that did not learn count for nothing.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from deepknn_lib import metrics
from deepknn_lib.study.experiments import Result
from deepknn_lib.study.results import SCORES, paired, paper, texts, unseeded
from deepknn_lib.study.runs import METHODS, Run

CLAIMS = tuple(f"C{number}" for number in range(1, 11))
LEVEL = 1 - 0.05 / len(CLAIMS)  # Bonferroni over the claims. Within a claim, all comparisons must hold.
NUMBERS = ["value", "low", "high", "low_95", "high_95"]
COLUMNS = ["claim", "dataset", "split", "setting", "comparison", "measure", *NUMBERS, "side", "bound"]
COLUMNS += ["seeds", "test_images", "alive", "dead"]
_IMAGES = ["dataset", "split", "fold"]
_SIDES = ["result", "result_rival"]
_TWO_LOSSES = ("C2", "C5", "C10")  # claims on deep kNN and triplet


def evidence(results: Iterable[Result], *, variants: Iterable[Result] = ()) -> pd.DataFrame:
    """Every comparison that the claims need and the results allow, one row a comparison and measure.

    `variants` are deep kNN with another K or M (C9). Runs judged on a validation part are passed over, and variants
    that differ from the results in anything else. ValueError if a method has two settings in one group of runs.

    The claim wants the interval `low`..`high` (at `LEVEL`, over `seeds` pairs of runs) on the `side` of `bound`. Scores
    are in points; `epochs ratio` is a geometric mean; `ratio, train` and `ratio, test` are triplet's minus deep kNN's
    `metrics.compactness`. `dead` names the methods that did not learn.
    """
    runs, varied = _table(results), _table(variants)
    varied = _matched(varied, runs[runs["method"] == "deep-knn"], [*_IMAGES, "setting", "alike"], "m:1")
    varied = varied[varied["k_m"] != varied["k_m_rival"]]
    rule = paper("comparisons").merge(paper("bounds"), on="needed")
    groups = rule.groupby(["claim", "comparison"], sort=False)
    asked = [(needed, _pairs(needed.iloc[0], runs, varied)) for _, needed in groups]
    robust = rule[rule["claim"] == "C9"].drop_duplicates("measure").assign(k_method=5)
    for names, pairs in varied.groupby(["k_m", "k_m_rival"], sort=False):
        asked.append((robust.assign(comparison=" − ".join(names)), pairs))
    asked.sort(key=lambda one: CLAIMS.index(one[0]["claim"].iloc[0]))
    rows = [_rows(needed, group) for needed, pairs in asked for group in _groups(needed, pairs)]
    return pd.concat(rows or [pd.DataFrame(columns=COLUMNS)], ignore_index=True)[COLUMNS]


def setting(run: Run) -> str:
    """Where a run's features come from, in words: backbone, weights, image size, another fold, epochs."""
    run = run.base or run
    start = "from scratch" if run.weights == "none" else f"{Path(run.weights).name} weights"
    words = [run.backbone, start, f"{run.image_size} px"] + [f"fold {run.fold}"] * (run.fold != 1)
    return ", ".join(words + [f"{run.epochs} epochs"] * bool(METHODS[run.method].loss))


def _table(results: Iterable[Result]) -> pd.DataFrame:
    """One row a result on test images; those that differ in no more than K, M and seed are `alike`."""
    rows = []
    for run, result in ((result.run, result) for result in results if result.run.evaluate_on == "test"):
        alike = replace(unseeded(run), k=5, m=5)
        keys = [run.dataset, run.split, run.fold, setting(run), run.method, run.seed]
        rows.append([*keys, alike, f"K = {run.k}, M = {run.m}", result])
    table = pd.DataFrame(rows, columns=[*_IMAGES, "setting", "method", "seed", "alike", "k_m", "result"])
    if (table.groupby([*_IMAGES, "setting", "method"])["alike"].nunique() > 1).any():
        raise ValueError("there are several settings of a method; let seeds, K and M alone differ")
    return table


def _matched(ours: pd.DataFrame, rival: pd.DataFrame, on: list[str], kind: str = "1:1") -> pd.DataFrame:
    """The runs of two methods by the seeds that both have; MergeError, a ValueError, where a method has two."""
    return ours.merge(rival, on=[*on, "seed"], suffixes=("", "_rival"), validate=kind)


def _pairs(needed: pd.Series, runs: pd.DataFrame, varied: pd.DataFrame) -> pd.DataFrame:
    """The runs that a comparison takes, each beside its rival's."""
    if needed["claim"] == "C1":
        return _beside_pretrained(runs)
    of, place = {method: runs[runs["method"] == method] for method in METHODS}, [*_IMAGES, "setting"]
    pairs = _matched(of[needed["method"]], of[needed["rival"]], place)
    if needed["claim"] in _TWO_LOSSES:  # They are compared from the same weights, and after cross-entropy.
        later = _matched(of["deep-knn-ft"], of["triplet-ft"], place)
        later["setting"] += ", from the cross-entropy network"
        return pd.concat([pairs, later], ignore_index=True)
    if needed["claim"] == "C9":
        return pairs.merge(varied[place].drop_duplicates())
    return pairs


def _beside_pretrained(runs: pd.DataFrame) -> pd.DataFrame:
    """C1: deep kNN on the main backbone, which has most runs, beside kNN on each pretrained one."""
    pretrained = runs[~runs["setting"].str.contains("from scratch")]
    deep, knn = (pretrained[pretrained["method"] == method] for method in ("deep-knn", "knn"))
    settings = deep.groupby(_IMAGES)["setting"]
    main = settings.transform(lambda names: names.value_counts(sort=False).idxmax())
    pairs = _matched(deep[deep["setting"] == main], knn, _IMAGES, "1:m")
    both = zip(pairs["setting"], pairs["setting_rival"], strict=True)
    names = [own if own.startswith(other) else f"{own} against {other}" for own, other in both]
    return pairs.assign(setting=names)


def _groups(needed: pd.DataFrame, pairs: pd.DataFrame) -> list[pd.DataFrame]:
    """The pairs that are judged together: those of a setting, and for C5 those of all in which every run learnt."""
    place = pairs["setting"]
    if needed["claim"].iloc[0] == "C5":  # It has one number a run.
        learnt = pairs[_SIDES].map(lambda result: result.learnt).all(axis=1)
        place = place.mask(learnt.groupby([pairs["dataset"], pairs["split"], place]).transform("all"), "")
    return [group for _, group in pairs.groupby(["dataset", "split", place], sort=False)]


def _rows(needed: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """The rows of evidence, one a measure, from pairs that are judged together."""
    ours, rival = ([*pairs[side]] for side in _SIDES)
    run, claim = ours[0].run, needed["claim"].iloc[0]
    measure = {"C5": _epochs, "C10": _ratios}.get(claim, _scores)
    numbers, note = measure(needed.iloc[0], pairs)
    sides = {f"{run.method} itself": ours, rival[0].run.method: rival}
    dead = [name for name, side in sides.items() if not all(result.learnt for result in side)]
    if claim == "C9" and dead == ["deep-knn itself"]:
        # A K or M with which nothing is learnt counts against the claim.
        note, dead = ", learnt nothing", []
    about = {"dataset": run.dataset, "split": run.split, "seeds": len(ours)}
    about |= {"setting": "; ".join(pairs["setting"].unique()) + note, "dead": " and ".join(dead)}
    about |= {"test_images": len(ours[0].arrays["test_labels"]), "alive": not dead}
    numbers = pd.DataFrame.from_dict(numbers, "index", columns=NUMBERS)
    return needed.join(numbers, on="measure").assign(**about)


def _scores(needed: pd.Series, pairs: pd.DataFrame) -> tuple[dict, str]:
    """`NUMBERS` of the difference in each score, in points; like the two measures below with a note on the setting."""
    ours, rival = ([*pairs[side]] for side in _SIDES)
    votes = needed[["k_method", "k_rival"]].astype(int)
    strict, usual = (paired(ours, rival, *votes, level).set_index("score") for level in (LEVEL, 0.95))
    both = strict.join(usual[["low", "high"]], rsuffix="_95")
    return {score: [*numbers] for score, *numbers in both.itertuples()}, ""


def _ratios(_: pd.Series, pairs: pd.DataFrame) -> tuple[dict, str]:
    """C10: how much less compact triplet's classes are, in each part."""
    numbers = {}
    for part in ("train", "test"):
        names = f"{part}_features", f"{part}_labels"
        arrays = pairs[_SIDES].map(lambda result, names=names: [result.arrays[name] for name in names])
        ratios = arrays.map(lambda pair: metrics.compactness(*pair)["ratio"])
        numbers[f"ratio, {part}"] = over_runs(ratios["result_rival"] - ratios["result"])
    return numbers, ""


def _epochs(_: pd.Series, pairs: pd.DataFrame) -> tuple[dict, str]:
    """C5: ratio of the epochs to the highest multiple of 5 % that all deep kNN runs of a setting reach.

    For a rival that never reaches it, the ratio is the most it can be, so that `low` is 0.
    """
    histories = pairs[_SIDES].map(lambda result: result.history)
    best = histories["result"].map(lambda history: max(row["train_acc"] for row in history))
    goals = (best.groupby(pairs["setting"]).transform("min") // 5 * 5).astype(int)
    first, last = (np.array([*map(metrics.epochs_to_accuracy, histories[side], goals)]) for side in _SIDES)
    numbers = np.exp(over_runs(np.log(first / last)))
    levels = goals.groupby(pairs["setting"], sort=False).first()
    note = f", to {', '.join(map(str, levels))} %"
    if never := sum(last > histories["result_rival"].map(len)):
        numbers[[NUMBERS.index("low"), NUMBERS.index("low_95")]] = 0
        note += f", never by {never} of {len(last)} triplet runs: last epoch + 1"
    return {"epochs ratio": numbers}, note


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
    dead, enough = rows["dead"].fillna(""), np.where(rows["measure"].isin(SCORES.values()), 2, 3)
    few = rows["seeds"].map({1: "a single seed", 2: "two runs"})
    reasons = [dead + " learnt nothing", few, "no interval"]
    rows["aside"] = np.select([dead != "", rows["seeds"] < enough, rows["low"].isna()], reasons, "")
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
    found = []
    for place, rows in comparisons(evidence).groupby(["dataset", "split"], sort=False):
        found += [(claim, *place, *_verdict(claim, rows[rows["claim"] == claim])) for claim in CLAIMS]
    return pd.DataFrame(found, columns=["claim", "dataset", "split", "verdict", "why"])


def _verdict(claim: str, rows: pd.DataFrame) -> tuple[str, str]:
    """The verdict and why, from judged comparisons of one data set and split."""
    out, rows = rows[rows["says"] == ""], rows[rows["says"] != ""]
    aside = ", ".join(dict.fromkeys(texts("{} ({})", out, "aside", "setting")))
    end = f"; left out: {aside}." if aside else "."
    missing = _missing(claim, rows)
    if not missing and " itself" in aside:
        missing = ["runs of the method that learnt"]
    if missing:
        return "not tested", f"missing: {', '.join(missing)}{end}"
    hold, undecided, against = map([*rows["says"]].count, ("holds", "undecided", "contradicted"))
    said = f"{hold} of {len(rows)} comparisons hold, {undecided} undecided, {against} contradicted; "
    said += "the hardest: {comparison} ({setting}), {measure} {value:.3g} [{low:.3g}, {high:.3g}], "
    said += "needed {side} {bound:g}"
    why = said.format(**rows.loc[rows["margin"].idxmin()]) + end
    if against:
        return f"contradicted ({against} of {len(rows)})", why
    if hold == len(rows):
        return "holds", why
    return f"holds in part ({hold} of {len(rows)})" if hold else "undecided", why


def _missing(claim: str, rows: pd.DataFrame) -> list[str]:
    """What the best setting still lacks; empty when one setting has every comparison."""
    needed = texts("{}: {}", paper("comparisons").query("claim == @claim"), "comparison", "measure")
    had = [texts("{}: {}", part, "comparison", "measure") for _, part in rows.groupby("setting")] or [[]]
    missing = min(([one for one in needed if one not in of_setting] for of_setting in had), key=len)
    if not missing and claim == "C7" and rows["setting"].str.split(",").str[0].nunique() < 2:
        return ["a second backbone"]  # The claim says "whatever the backbone".
    if not missing and claim == "C9":
        k_and_m = r"^K = (?P<K>\d+), M = (?P<M>\d+) − K = (?P<K_5>\d+), M = (?P<M_5>\d+)$"
        varied = rows["comparison"].str.extract(k_and_m).dropna()
        return [f"another {name}" for name in "KM" if (varied[name] == varied[f"{name}_5"]).all()]
    return missing
