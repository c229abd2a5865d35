"""The paper's ten claims and its numbers, beside ours: results → evidence → verdicts, and cell by cell.

The rule was fixed before the numbers. `data/paper/comparisons.csv` lists the comparisons that each claim needs, and
`bounds.csv` there says what its words mean. Rivals that did not learn count for nothing.
"""

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd

from deepknn_lib import metrics
from deepknn_lib.study.experiments import Result
from deepknn_lib.study.results import SCORES, method_title, paired, paper, texts, with_sd
from deepknn_lib.study.runs import METHODS, PROFILES, Run

CLAIMS = tuple(f"C{number}" for number in range(1, 11))
LEVEL = 1 - 0.05 / len(CLAIMS)  # Bonferroni over the claims. Within a claim, all comparisons must hold.
COLUMNS = "claim dataset split setting comparison measure value low high side bound".split()
COLUMNS += ["seeds", "test_images", "alive", "dead"]
_FOLD = ["dataset", "split", "fold"]
_PLACE = [*_FOLD, "setting"]
_SIDES = ["result", "result_rival"]


def evidence(results: Iterable[Result], *, variants: Iterable[Result] = ()) -> pd.DataFrame:
    """Every comparison that the claims need and the results allow, one row a comparison and measure.

    `variants` are deep kNN with another K or M (C9). Runs judged on a validation part are passed over, and variants
    that differ from the results in anything else. ValueError if a method has two settings in one group of runs.

    The claim wants the interval `low`..`high` (at `LEVEL`, over `seeds` pairs of runs) on the `side` (`>`, `<`) of
    `bound`. Scores are in points; `epochs ratio` is a geometric mean; `ratio, train` and `ratio, test` are triplet's
    minus deep kNN's `metrics.compactness`. `alive` says that both methods learnt; `dead` names those that did not.
    """
    rule = paper("comparisons").merge(paper("bounds"), on="needed").to_dict("records")
    runs, rows = _table(results), []
    for (*_, method), same in runs.groupby([*_PLACE, "method"])["plain"]:
        if names := [f.name for f in fields(Run) if len({getattr(run, f.name) for run in same}) > 1]:
            told = f"{method}: two settings of one method, they differ in {', '.join(names)}"
            raise ValueError(f"{told}; leave one out, or pass runs with another K or M as `variants`")
    usual = runs[runs["method"] == "deep-knn"]
    varied = _matched(_table(variants), usual, [*_PLACE, "alike"]).query("k_m != k_m_rival")
    other_votes = usual.merge(varied[_PLACE].drop_duplicates()).assign(result_rival=lambda own: own["result"])
    for needed in rule:
        rows += _rows(needed, other_votes if needed["claim"] == "C9" else _pairs(needed, runs))
    robust = {needed["measure"]: needed for needed in rule if needed["claim"] == "C9"}
    for (ours, theirs), pairs in varied.groupby(["k_m", "k_m_rival"], sort=False):
        for needed in robust.values():
            rows += _rows(needed | {"comparison": f"{ours} − {theirs}", "k_method": 5}, pairs)
    return pd.DataFrame(sorted(rows, key=lambda row: CLAIMS.index(row["claim"])), columns=COLUMNS)


def setting(run: Run) -> str:
    """Where a run's features come from, in words: backbone, weights, image size, another fold, epochs."""
    if run.base:
        return setting(run.base)
    start = "from scratch" if run.weights == "none" else f"{Path(run.weights).name} weights"
    words = [run.backbone, start, f"{run.image_size} px"] + [f"fold {run.fold}"] * (run.fold != 1)
    return ", ".join(words + [f"{run.epochs} epochs"] * bool(METHODS[run.method].loss))


def _plain(run: Run) -> Run:
    """A run without what may differ between the runs of one setting."""
    return replace(run, seed=0, k_predict=5, base=run.base and _plain(run.base))


def _table(results: Iterable[Result]) -> pd.DataFrame:
    """One row a result on test images; runs that differ in no more than K, M and seed are `alike`."""
    rows = []
    for result in (result for result in results if result.run.evaluate_on == "test"):
        run, plain = result.run, _plain(result.run)
        alike, k_m = replace(plain, k=5, m=5), f"K = {run.k}, M = {run.m}"
        place = run.dataset, run.split, run.fold, setting(run)
        rows.append((*place, run.method, run.seed, result, plain, alike, k_m))
    return pd.DataFrame(rows, columns=[*_PLACE, "method", "seed", "result", "plain", "alike", "k_m"])


def _matched(ours: pd.DataFrame, rival: pd.DataFrame, on: list[str]) -> pd.DataFrame:
    """The runs of two methods by the seeds that both have: `result` and `result_rival`."""
    return ours.merge(rival, on=[*on, "seed"], suffixes=("", "_rival"))


def _pairs(needed: dict, runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that a comparison takes, beside each other, with their setting in words."""
    of = {method: runs[runs["method"] == method] for method in METHODS}
    if needed["claim"] == "C1":
        return _against_pretrained(runs[~runs["setting"].str.contains("from scratch")])
    pairs = _matched(of[needed["method"]], of[needed["rival"]], _PLACE)
    if needed["claim"] not in ("C2", "C5", "C10"):
        return pairs
    # These claims compare the two losses from each start: from the same weights, and after cross-entropy.
    later = _matched(of["deep-knn-ft"], of["triplet-ft"], _PLACE)
    return pd.concat([pairs, later.assign(setting=later["setting"] + ", from the cross-entropy network")])


def _against_pretrained(runs: pd.DataFrame) -> pd.DataFrame:
    """C1: deep kNN on the main backbone (most methods, then most runs) against kNN on each pretrained one."""
    methods = runs.groupby(_PLACE)["method"]
    runs = runs.assign(methods=methods.transform("nunique"), size=methods.transform("size"))
    deep = runs[runs["method"] == "deep-knn"].sort_values(["methods", "size"], ascending=False, kind="stable")
    main = deep[deep["setting"] == deep.groupby(_FOLD)["setting"].transform("first")]
    pairs = _matched(main, runs[runs["method"] == "knn"], _FOLD)
    both = zip(pairs["setting"], pairs["setting_rival"], strict=True)
    pairs["setting"] = [own if own.startswith(other) else f"{own} against {other}" for own, other in both]
    return pairs


def _rows(needed: dict, pairs: pd.DataFrame) -> list[dict]:
    """The rows of evidence for a row of the rule, one a setting."""
    places = [pairs["dataset"], pairs["split"], pairs["setting"]]
    if needed["claim"] == "C5":
        # There is one number a run. Settings in which both methods learnt are pooled.
        dead = ~pairs[_SIDES].map(lambda result: result.learnt).all(axis=1)
        places[2] = places[2].where(dead.groupby(places).transform("any"), "")
    return [_row(needed, part) for _, part in pairs.groupby(places, sort=False)]


def _row(needed: dict, pairs: pd.DataFrame) -> dict:
    """A row of evidence from the runs of two methods."""
    ours, rival, where = [*pairs["result"]], [*pairs["result_rival"]], "; ".join(pairs["setting"].unique())
    run, measure = ours[0].run, needed["measure"]
    own_dead, rival_dead = (not all(result.learnt for result in results) for results in (ours, rival))
    dead = [f"{run.method} itself"] * own_dead + [rival[0].run.method] * rival_dead
    if needed["claim"] == "C9" and own_dead and not rival_dead:
        # A K or M with which nothing is learnt counts against the claim.
        where, dead = f"{where}, learnt nothing", []
    row = needed | {"dataset": run.dataset, "split": run.split, "setting": where, "seeds": len(ours)}
    row |= {"test_images": len(ours[0].arrays["test_labels"]), "alive": not dead, "dead": " and ".join(dead)}
    if measure == "epochs ratio":
        return row | _epochs(pairs)
    if measure in SCORES.values():
        votes = (
            int(needed["k_method"]),
            int(needed["k_rival"]),
        )  # not whole in the table, where some are missing
        gaps = paired(ours, rival, *votes, LEVEL).set_index("score")
        return row | gaps.rename(columns={"difference": "value"}).loc[measure].to_dict()
    part = measure.removeprefix("ratio, ")
    arrays = [
        [(r.arrays[f"{part}_features"], r.arrays[f"{part}_labels"]) for r in rs] for rs in (ours, rival)
    ]
    own, other = ([metrics.compactness(*pair)["ratio"] for pair in of] for of in arrays)
    low, high = t_interval(np.subtract(other, own), LEVEL)
    return row | {"value": np.mean(other) - np.mean(own), "low": low, "high": high}


def _epochs(pairs: pd.DataFrame) -> dict:
    """C5: ratio of the epochs to the highest multiple of 5 % that all deep kNN runs of a setting reach.

    For a rival that never reaches it, the ratio is the most it can be, so that `low` is 0.
    """
    histories = pairs[_SIDES].map(lambda result: result.history)
    best = histories["result"].map(lambda history: max(row["train_acc"] for row in history))
    goals = (best.groupby(pairs["setting"]).transform("min") // 5 * 5).astype(int)
    first, last = ([*map(metrics.epochs_to_accuracy, histories[side], goals)] for side in histories)
    logs = np.log(np.divide(first, last))
    never = sum(np.array(last) > histories["result_rival"].map(len))
    low, high = np.exp(t_interval(logs, LEVEL)) * (not never, 1)
    levels = goals.groupby(pairs["setting"], sort=False).first()
    where = f"{'; '.join(levels.index)}, to {', '.join(map(str, levels))} %"
    where += f", never by {never} of {len(last)} triplet runs: last epoch + 1" * bool(never)
    return {"setting": where, "value": np.exp(logs.mean()), "low": low, "high": high, "test_images": np.nan}


def t_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's interval for the mean of independent runs; NaN for fewer than two runs."""
    if len(values) < 2:
        return np.nan, np.nan
    from scipy import stats

    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)  # 0 where all runs are alike
    return float(np.mean(values) - half), float(np.mean(values) + half)


def verdicts(evidence: pd.DataFrame) -> pd.DataFrame:
    """The verdict on each claim for every data set and split with any evidence (new, or read back from CSV).

    `replicated`: every interval lies on the claimed side. `not replicated`: one does not. `not tested`: no setting
    has every comparison with two seeds and a rival that learnt, or the method that the claim is about did not learn.
    A setting whose rival did not learn is left out. `why` is one sentence with the counts.
    """
    rows = evidence.assign(alive=evidence["alive"].astype(str) == "True", dead=evidence["dead"].fillna(""))
    found = []
    for (dataset, split), here in rows.groupby(["dataset", "split"], sort=False):
        found += [(claim, dataset, split, *_judge(claim, here[here["claim"] == claim])) for claim in CLAIMS]
    return pd.DataFrame(found, columns=["claim", "dataset", "split", "verdict", "why"])


def _judge(claim: str, rows: pd.DataFrame) -> tuple[str, str]:
    """The verdict on a claim, and the sentence why."""
    counts = rows["alive"] & (rows["seeds"] >= 2) & rows[["low", "high"]].notna().all(axis=1)
    rows, out = rows[counts], rows[~counts]
    reasons = (out["dead"] + " learnt nothing").where(out["dead"] != "", "a single seed or no interval")
    aside = ", ".join((reasons + " (" + out["setting"] + ")").unique())
    aside = f"; left out: {aside}" * bool(aside)
    missing = _missing(claim, rows) or "runs of the method that learnt" * (" itself" in aside)
    if missing:
        return "not tested", f"missing: {missing}{aside}."
    ends = rows[["low", "high"]].sub(rows["bound"], axis=0).mul(np.where(rows["side"] == ">", 1, -1), axis=0)
    worst, hold, against = ends.min(axis=1), sum(ends.min(axis=1) > 0), sum(ends.max(axis=1) < 0)
    said = f"{hold} of {len(rows)} comparisons hold"
    for words, number in (("undecided", len(rows) - hold - against), ("the other way", against)):
        said += f", {number} {words}" * bool(number)
    hardest = "{comparison} ({setting}), {measure} {value:.3g} [{low:.3g}, {high:.3g}]"
    row = rows.loc[worst.idxmin()]
    said += f"; the hardest: {hardest.format(**row)}, needed {row['side']} {row['bound']:g}{aside}."
    return "replicated" if hold == len(rows) else "not replicated", said


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


# The paper's tables, cell by cell: our data sets for each of the paper's, and our backbones for each of theirs.
_SETS = paper("our_sets").fillna("").rename(columns={"ours": "our_dataset"})
NOT_TO_BE_HAD = _SETS[_SETS["our_dataset"] == ""].set_index("dataset")["differs"].to_dict()
_THEIRS = ("vgg19", "resnet50", "densenet121", "seresnet50")
_OURS = [_THEIRS, *(PROFILES[profile]["backbones"] for profile in ("demo", "finetune", "paper"))]
_FAMILY = {own: theirs for names in _OURS for own, theirs in zip(names, _THEIRS, strict=True)}
_CELL = ["table", "dataset", "method", "backbone", "k_predict", "k", "m"]
_SETTING = ["dataset", "split", "backbone", "weights", "image_size", "epochs", "margin"]


def cells() -> pd.DataFrame:
    """Every score that the paper reports, one row a cell.

    The columns are `table` (`2`, `3`, `4`, `S2`, `S3`, `S4`), `dataset`, `method`, `backbone`, `k_predict`, `k`, `m`,
    `measure` (`acc`, `mcr`, `rs`) and `published`, in per cent.
    """
    parts, one_set = [], {"3": "Skin-7", "4": "SD-198", "S3": "SD-198"}
    for table in ("2", "3", "4", "S2", "S3", "S4"):
        part = paper(f"table{table.lower().replace('s', '_s')}")
        usual = {"dataset": one_set.get(table), "method": "deep-knn", "backbone": "resnet50", "k": 5, "m": 5}
        usual |= {"k_predict": part.get("k", 5), "table": table}  # Table S3 votes with K_p = K.
        part = part.assign(**{name: value for name, value in usual.items() if name not in part})
        parts.append(part.melt(_CELL, part.columns.intersection([*SCORES]), "measure", "published"))
    return pd.concat(parts, ignore_index=True)


def compare_with_paper(ours: pd.DataFrame) -> pd.DataFrame:
    """Each published cell with each of our results for it; where there is none, one row that says why.

    `ours` is of `results.over_seeds`, all data sets and settings together; trials on validation images are left out.

    The columns are those of `cells`, then `our_row` (in `ours`), `our_dataset` and the other settings; `ours`, `sd`,
    `seeds`, `collapsed` (runs); `difference` (ours − published, only on the paper's own images); `remark`, which
    says what differs, or why there is nothing.
    """
    tried = ours[ours["evaluate_on"] != "validation"].rename_axis("our_row").reset_index()
    tried = tried.rename(columns={name: f"our_{name}" for name in _SETTING})
    tried = tried.assign(backbone=tried["our_backbone"].map(_FAMILY)).fillna({"k": 5, "m": 5})
    tried = tried.merge(_SETS, on="our_dataset")
    found = pd.concat(tried.assign(measure=s, ours=tried[s], sd=tried[f"{s}_sd"]) for s in SCORES)
    keys, kept = [*_CELL[1:], "measure"], ["our_row", *(f"our_{name}" for name in _SETTING), "ours", "sd"]
    found = found[[*keys, *kept, "seeds", "collapsed", "differs"]].dropna(subset="ours")
    side = cells().merge(found, "left", keys)
    side["difference"] = (side["ours"] - side["published"]).where(side["differs"] == "")
    side["remark"] = [_remark(row) for row in side.to_dict("records")]
    return side.drop(columns="differs")


def _remark(row: dict) -> str:
    """What differs between a cell and a row of ours, or why there is none."""
    if pd.isna(row["ours"]):
        nothing = "not run: no result with this method, backbone and setting yet"
        return NOT_TO_BE_HAD.get(row["dataset"], nothing)
    own = row["our_backbone"] in (row["backbone"], *PROFILES["paper"]["backbones"])
    start = {"none": "from scratch", "imagenet": "ImageNet weights"}
    words = [row["differs"], "" if own else f"{row['our_backbone']} in place of {row['backbone']}"]
    words += [start.get(row["our_weights"], f"weights {row['our_weights']}")]
    words += [f"{row['our_image_size']:.0f} px"]
    words += [f"{row['collapsed']:.0f} of {row['seeds']:.0f} runs collapsed"] * bool(row["collapsed"])
    return ", ".join(filter(None, words)) + "; no difference taken" * bool(row["differs"])


def readable_cells(side: pd.DataFrame, table: str) -> pd.DataFrame:
    """One of the paper's tables (`2`, `3`, `4`, `S2`, `S3`, `S4`) to read: its rows, the paper's numbers and ours.

    `side` is of `compare_with_paper`. Runs of another setting or fold get a row of their own.
    """
    part = side[side["table"] == table].rename(columns={"sd": "ours_sd"})
    setting = texts(
        "{}, {}, {:.0f} px, {:.0f} epochs, α = {:g}", part, *(f"our_{name}" for name in _SETTING[2:])
    )
    part["our setting"] = [text.replace(", nan epochs", "").replace(", α = nan", "") for text in setting]
    part["our data"] = texts("{}, {} split", part, "our_dataset", "our_split")
    part["K, M"] = texts("{:.0f}, {:.0f}", part, "k", "m")
    part["paper"], part["ours"] = texts("{:.1f}", part, "published"), with_sd(part, "ours")
    part["ours − paper"] = texts("{:+.1f}", part, "difference")
    part["seeds"] = texts("{:.0f}", part, "seeds")
    keys, scores = [*_CELL, "our_row"], ["paper", "ours", "ours − paper"]
    joined = part.groupby(keys, dropna=False)[scores].agg(" / ".join)
    shown = part.drop(columns=scores).drop_duplicates(keys).merge(joined, on=keys)
    shown["method"] = list(map(method_title, shown["method"], shown["k_predict"]))
    extra = ["backbone"] * (table in ("2", "4")) + ["K, M"] * (table == "S3")
    names = ["dataset", "method", *extra, *scores, "seeds", "our data", "our setting", "remark"]
    shown = shown[names].rename(columns={"dataset": "paper's data"})
    return shown.replace(r".*\bnan\b.*", "–", regex=True)
