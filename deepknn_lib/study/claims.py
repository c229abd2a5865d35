"""The paper's ten claims and its numbers, beside ours: results → evidence → verdicts, and cell by cell.

The rule was fixed before the numbers. `data/paper/comparisons.csv` lists the comparisons that each claim needs, and
`BOUNDS` says what its words mean. Rivals that did not learn count for nothing.
"""

import math
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd

from deepknn_lib import metrics
from deepknn_lib.study.experiments import Result
from deepknn_lib.study.results import SCORES, method_title, paired, paper, with_sd
from deepknn_lib.study.runs import METHODS, PROFILES, SOFTMAX, Run

CLAIMS = tuple(f"C{number}" for number in range(1, 11))
LEVEL = 1 - 0.05 / len(CLAIMS)  # Bonferroni over the claims. Within a claim, all comparisons must hold.
BOUNDS = {
    "better": 0.0,
    "tighter": 0.0,
    "close": -2.4,  # points: twice the largest standard deviation over runs that the paper states
    "robust": -3.4,  # points: the largest range of a score in the paper's Table S3
    "far fewer": 0.5,  # less than half the epochs
}
COLUMNS = "claim dataset split setting comparison measure value low high side bound".split()
COLUMNS += ["seeds", "test_images", "alive", "dead"]
_ITSELF = " itself"  # marks, in `dead`, the method that the claim is about
# C2, C5 and C10 compare the two losses from each start: from the same weights, and after cross-entropy.
_STARTS = {"": ("deep-knn", "triplet"), ", from the cross-entropy network": ("deep-knn-ft", "triplet-ft")}
Seeds = dict[int, Result]
Pairs = list[tuple[str, list, list]]  # setting, results of the method, those of its rival by the same seeds


def evidence(results: Iterable[Result], *, variants: Iterable[Result] = ()) -> pd.DataFrame:
    """Every comparison that the claims need and the results allow, one row a comparison and measure.

    `variants` are deep kNN with another K or M (C9). Runs judged on a validation part are passed over, and variants
    that differ from the results in anything else. ValueError if a method has two settings in one group of runs.

    The claim wants the interval `low`..`high` (at `LEVEL`, over `seeds` pairs of runs) on the `side` (`>`, `<`) of
    `bound`. Scores are in points; `epochs ratio` is a geometric mean; `ratio, train` and `ratio, test` are triplet's
    minus deep kNN's `metrics.compactness`. `alive` says that both methods learnt; `dead` names those that did not.
    """
    rule, groups = paper("comparisons"), _groups(results)
    variants = [result for result in variants if result.run.evaluate_on == "test"]
    rows = []
    for needed in rule[rule["claim"] != "C9"].to_dict("records"):
        pairs = _pairs(needed["claim"], needed["method"], needed["rival"], groups)
        rows += [_row(needed, *pair) for pair in pairs]
    for key, methods in groups.items():
        rows += _robust(rule[rule["claim"] == "C9"], key[-1], methods.get("deep-knn", {}), variants)
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


def _groups(results: Iterable[Result]) -> dict[tuple, dict[str, Seeds]]:
    """Results by data set, split, fold and setting, then by method, then by seed."""
    groups = {}
    for result in (result for result in results if result.run.evaluate_on == "test"):
        run = result.run
        key = run.dataset, run.split, run.fold, setting(run)
        seeds = groups.setdefault(key, {}).setdefault(run.method, {})
        one, other = _plain(next(iter(seeds.values()), result).run), _plain(run)
        if names := [f.name for f in fields(Run) if getattr(one, f.name) != getattr(other, f.name)]:
            told = f"{run.label}: two settings of one method, they differ in {', '.join(names)}"
            raise ValueError(f"{told}; leave one out, or pass runs with another K or M as `variants`")
        seeds[run.seed] = result
    return groups


def _matched(where: str, ours: Seeds, rival: Seeds) -> Pairs:
    """The runs of the seeds that both have; empty if there are none."""
    seeds = sorted(set(ours) & set(rival))
    return [(where, [ours[seed] for seed in seeds], [rival[seed] for seed in seeds])] if seeds else []


def _pairs(claim: str, method: str, rival: str, groups: dict) -> Pairs:
    """The runs that a comparison of a claim takes, within each group; C1 and C5 take them across groups."""
    if claim == "C1":
        return _against_pretrained(groups)
    starts = _STARTS if claim in ("C2", "C5", "C10") else {"": (method, rival)}
    found = []
    for (*_, where), methods in groups.items():
        for start, (a, b) in starts.items():
            found += _matched(where + start, methods.get(a, {}), methods.get(b, {}))
    if claim != "C5":
        return found
    pooled = {}  # There is one number a run, so that the settings are taken together; not those with a dead method.
    for where, ours, rivals in found:
        place = ours[0].run.dataset, ours[0].run.split, where if _dead(ours) or _dead(rivals) else ""
        for known, new in zip(pooled.setdefault(place, ([], [], [])), ([where], ours, rivals), strict=True):
            known.extend(new)
    return [("; ".join(words), ours, rivals) for words, ours, rivals in pooled.values()]


def _against_pretrained(groups: dict) -> Pairs:
    """C1: deep kNN on the main pretrained backbone (most methods, then most runs) against kNN on each there is."""
    found, pretrained = [], {key: of for key, of in groups.items() if "from scratch" not in key[-1]}
    for place in dict.fromkeys(key[:3] for key in pretrained):
        here = {key[-1]: methods for key, methods in pretrained.items() if key[:3] == place}
        size = {own: (len(of), sum(map(len, of.values()))) for own, of in here.items() if "deep-knn" in of}
        for other, methods in here.items() if size else ():
            own = max(size, key=size.get)
            words = own if own.startswith(other) else f"{own} against {other}"
            found += _matched(words, here[own]["deep-knn"], methods.get("knn", {}))
    return found


def _dead(results: list[Result]) -> bool:
    """Whether one of the runs collapsed or learnt nothing."""
    return not all(result.learnt for result in results)


def _row(needed: dict, where: str, ours: list[Result], rival: list[Result], k_predict: int = 5) -> dict:
    """A row of evidence: `needed` is the row of the rule; scores are by K_p = 5, or cross-entropy's own softmax."""
    run, measure = ours[0].run, needed["measure"]
    dead = [run.method + _ITSELF] * _dead(ours) + [rival[0].run.method] * _dead(rival)
    row = needed | {"dataset": run.dataset, "split": run.split, "setting": where, "seeds": len(ours)}
    row |= {"bound": BOUNDS[needed["needed"]], "test_images": len(ours[0].arrays["test_labels"])}
    row |= {"alive": not dead, "dead": " and ".join(dead)}
    if measure == "epochs ratio":
        return row | _epochs(where, ours, rival)
    if measure in SCORES.values():
        k_rival = SOFTMAX if rival[0].run.method == "weighted-ce" else 5
        gaps = paired(ours, rival, k_predict, k_rival, LEVEL).rename(columns={"difference": "value"})
        return row | gaps.set_index("score").loc[measure].to_dict()
    parts = [f"{measure.removeprefix('ratio, ')}_{what}" for what in ("features", "labels")]
    both = [[metrics.compactness(*map(r.arrays.get, parts))["ratio"] for r in rs] for rs in (ours, rival)]
    low, high = metrics.t_interval(gaps := np.subtract(*both[::-1]), LEVEL)
    return row | {"value": gaps.mean(), "low": low, "high": high}


def _epochs(where: str, ours: list[Result], rival: list[Result]) -> dict:
    """C5: ratio of the epochs to the highest multiple of 5 % that all deep kNN runs of a setting reach.

    For a rival that never reaches it, the ratio is the most it can be, so that `low` is 0.
    """
    best = {}
    for r in ours:
        best.setdefault((setting(r.run), r.run.method), []).append(max(row["train_acc"] for row in r.history))
    levels = {place: 5 * math.floor(min(values) / 5) for place, values in best.items()}
    goals = [levels[setting(r.run), r.run.method] for r in ours]
    pairs = [list(zip(rs, goals, strict=True)) for rs in (ours, rival)]
    epochs = [[metrics.epochs_to_accuracy(r.history, goal) for r, goal in of] for of in pairs]
    logs = np.log(np.divide(*epochs))
    never = sum(epoch > len(r.history) for epoch, r in zip(epochs[1], rival, strict=True))
    low, high = np.exp(metrics.t_interval(logs, LEVEL)) * (not never, 1)
    where += f", to {', '.join(map(str, levels.values()))} %"
    where += f", never by {never} of {len(rival)} triplet runs: last epoch + 1" * bool(never)
    return {"setting": where, "value": math.exp(logs.mean()), "low": low, "high": high, "test_images": np.nan}


def _robust(rule: pd.DataFrame, where: str, reference: Seeds, variants: list[Result]) -> list[dict]:
    """C9: other K and M, trained anew; where there are such runs, also other K_p on the same features."""
    found, rows = {}, []
    for result in variants if reference else ():
        run, like = _plain(result.run), _plain(next(iter(reference.values())).run)
        if run != like and replace(run, k=like.k, m=like.m) == like:
            words = f"K = {run.k}, M = {run.m} − K = {like.k}, M = {like.m}"
            found.setdefault(words, {})[result.run.seed] = result
    for words, seeds in found.items():
        for needed in rule.drop_duplicates("measure").assign(comparison=words).to_dict("records"):
            rows += [_row(needed, *pair) for pair in _matched(where, seeds, reference)]
    for row in (row for row in rows if row["dead"] and not _dead(list(reference.values()))):
        # A K or M with which nothing is learnt counts against the claim.
        row |= {"alive": True, "dead": "", "setting": row["setting"] + ", learnt nothing"}
    for needed in rule.to_dict("records") if found else ():
        k_predict = int(needed["comparison"].split()[2])  # "K_p = 1 − K_p = 5"
        rows += [_row(needed, *pair, k_predict) for pair in _matched(where, reference, reference)]
    return rows


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
    counts = rows["alive"] & (rows["seeds"] >= 2) & rows[["low", "high"]].notna().all(axis=1)
    rows, out = rows[counts], rows[~counts]
    reasons = [f"{dead} learnt nothing" if dead else "a single seed or no interval" for dead in out["dead"]]
    aside = dict.fromkeys(f"{why} ({where})" for why, where in zip(reasons, out["setting"], strict=True))
    aside = "; left out: " + ", ".join(aside) if aside else ""
    missing = _missing(claim, rows)
    if missing or _ITSELF in aside:
        return "not tested", f"missing: {missing or 'runs of the method that learnt'}{aside}."
    sign = np.where(rows["side"] == ">", 1, -1)
    ends = np.sort([sign * (rows["low"] - rows["bound"]), sign * (rows["high"] - rows["bound"])], axis=0)
    hold, against = ends[0] > 0, ends[1] < 0
    said = f"{sum(hold)} of {len(rows)} comparisons hold"
    for words, number in (("undecided", sum(~hold & ~against)), ("the other way", sum(against))):
        said += f", {number} {words}" * bool(number)
    hardest = "{comparison} ({setting}), {measure} {value:.3g} [{low:.3g}, {high:.3g}]"
    worst = rows.iloc[ends[0].argmin()]
    said += f"; the hardest: {hardest.format(**worst)}, needed {worst.side} {worst.bound:g}{aside}."
    return "replicated" if hold.all() else "not replicated", said


def _missing(claim: str, rows: pd.DataFrame) -> str:
    """What the best setting still lacks; empty when one setting has every comparison."""
    rule = paper("comparisons").query("claim == @claim")
    needed = rule["comparison"] + ": " + rule["measure"]
    had = [set(part["comparison"] + ": " + part["measure"]) for _, part in rows.groupby("setting")] or [set()]
    missing = min(([one for one in needed if one not in of_setting] for of_setting in had), key=len)
    if not missing and claim == "C7" and rows["setting"].str.split(",").str[0].nunique() < 2:
        missing = ["a second backbone"]  # The claim says "whatever the backbone".
    if not missing and claim == "C9":
        varied = rows["comparison"].str.extract(r"^K = (\d+), M = (\d+) − K = (\d+), M = (\d+)$").dropna()
        missing = [f"another {name}" for n, name in enumerate("KM") if (varied[n] == varied[n + 2]).all()]
    return ", ".join(missing)


# The paper's tables, cell by cell: our data sets for each of the paper's, and our backbones for each of theirs.
_SETS = paper("our_sets").fillna("")
OURS = {name: dict(zip(p["ours"], p["differs"], strict=True)) for name, p in _SETS.groupby("dataset")}
NOT_TO_BE_HAD = {name: sets[""] for name, sets in OURS.items() if "" in sets}
_NAMES = [("vgg19", "resnet50", "densenet121", "seresnet50")]
_NAMES += [PROFILES[profile]["backbones"] for profile in ("demo", "finetune", "paper")]
_RELATIVES = {names[0]: names for names in zip(*_NAMES, strict=True)}
_SETTING = ("dataset", "split", "backbone", "weights", "image_size", "epochs", "margin")
_CELL = ["table", "dataset", "method", "backbone", "k_predict", "k", "m"]


def cells() -> pd.DataFrame:
    """Every score that the paper reports, one row a cell.

    The columns are `table` (`2`, `3`, `4`, `S2`, `S3`, `S4`), `dataset`, `method`, `backbone`, `k_predict`, `k`, `m`,
    `measure` (`acc`, `mcr`, `rs`) and `published`, in per cent.
    """
    parts, one_set = [], {"3": "Skin-7", "4": "SD-198", "S3": "SD-198"}
    for table in ("2", "3", "4", "S2", "S3", "S4"):
        part = paper(f"table{table.lower().replace('s', '_s')}").assign(table=table)
        usual = {"dataset": one_set.get(table), "method": "deep-knn", "backbone": "resnet50", "k": 5, "m": 5}
        usual |= {"k_predict": part.get("k", 5)}  # Table S3 votes with K_p = K
        part = part.assign(**{name: value for name, value in usual.items() if name not in part})
        parts.append(part.melt(_CELL, [n for n in SCORES if n in part], "measure", "published"))
    return pd.concat(parts, ignore_index=True)


def compare_with_paper(ours: pd.DataFrame) -> pd.DataFrame:
    """Each published cell with each of our results for it; where there is none, one row that says why.

    `ours` is of `results.over_seeds`, all data sets and settings together; trials on validation images are left out.

    The columns are those of `cells`, then `our_row` (in `ours`), `our_dataset` and the other settings; `ours`, `sd`,
    `seeds`, `collapsed` (runs); `difference` (ours − published, only on the paper's own images); `remark`, which
    says what differs, or why there is nothing.
    """
    out, ours = [], ours[ours["evaluate_on"] != "validation"]
    for cell in cells().to_dict("records"):
        sets, measure = OURS[cell["dataset"]], cell["measure"]
        fits = ours["dataset"].isin(sets) & ours["backbone"].isin(_RELATIVES[cell["backbone"]])
        fits &= (ours[["method", "k_predict"]] == [cell["method"], cell["k_predict"]]).all(axis=1)
        fits &= (ours[["k", "m"]].isna() | (ours[["k", "m"]] == [cell["k"], cell["m"]])).all(axis=1)
        found = ours[fits & ours[measure].notna()].to_dict("index")
        for number, row in found.items():
            side = {f"our_{name}": row[name] for name in _SETTING} | {"our_row": number, "ours": row[measure]}
            side |= {"sd": row[f"{measure}_sd"], "seeds": row["seeds"], "collapsed": row["collapsed"]}
            side["difference"] = np.nan if sets[row["dataset"]] else row[measure] - cell["published"]
            out.append(cell | side | {"remark": _remark(cell, row)})
        if not found:
            why = sets.get("", "not run: no result with this method, backbone and setting yet")
            out.append(cell | {"remark": why})
    columns = [*_CELL, "measure", "published", "our_row", *(f"our_{name}" for name in _SETTING), "ours", "sd"]
    return pd.DataFrame(out).reindex(columns=[*columns, "seeds", "collapsed", "difference", "remark"])


def _remark(cell: dict, row: dict) -> str:
    """What differs between a cell and a row of ours."""
    images = OURS[cell["dataset"]][row["dataset"]]
    own = row["backbone"] in (cell["backbone"], *PROFILES["paper"]["backbones"])
    start = {"none": "from scratch", "imagenet": "ImageNet weights"}.get(
        row["weights"], f"weights {row['weights']}"
    )
    differs = [images, "" if own else f"{row['backbone']} in place of {cell['backbone']}", start]
    differs += [f"{row['image_size']:.0f} px"]
    differs += [f"{row['collapsed']:.0f} of {row['seeds']:.0f} runs collapsed"] * bool(row["collapsed"])
    return ", ".join(filter(None, differs)) + "; no difference taken" * bool(images)


def readable_cells(side: pd.DataFrame, table: str) -> pd.DataFrame:
    """One of the paper's tables (`2`, `3`, `4`, `S2`, `S3`, `S4`) to read: its rows, the paper's numbers and ours.

    `side` is of `compare_with_paper`. Runs of another setting or fold get a row of their own.
    """
    rows, part = [], side[side["table"] == table]
    for keys, of in part.groupby([*_CELL[1:], "our_row"], sort=False, dropna=False):
        (dataset, method, backbone, k_predict, k, m, _), first = keys, of.iloc[0]
        row = {"paper's data": dataset, "method": method_title(method, k_predict), "backbone": backbone}
        row |= {"K, M": f"{k}, {m}", "paper": " / ".join(f"{value:.1f}" for value in of["published"])}
        row |= dict.fromkeys(("ours", "ours − paper", "seeds", "our data", "our setting"), "–")
        if pd.notna(first["ours"]):
            words = f"{first['our_backbone']}, {first['our_weights']}, {first['our_image_size']:.0f} px"
            words += f", {first['our_epochs']:.0f} epochs" * pd.notna(first["our_epochs"])
            words += f", α = {first['our_margin']:g}" * pd.notna(first["our_margin"])
            row |= {"ours": " / ".join(with_sd(of.rename(columns={"sd": "ours_sd"}), "ours"))}
            if of["difference"].notna().all():
                row["ours − paper"] = " / ".join(f"{value:+.1f}" for value in of["difference"])
            data = f"{first['our_dataset']}, {first['our_split']} split"
            row |= {"seeds": f"{first['seeds']:.0f}", "our data": data, "our setting": words}
        rows.append(row | {"remark": first["remark"]})
    unused = ["backbone"] * (table not in ("2", "4")) + ["K, M"] * (table != "S3")
    return pd.DataFrame(rows).drop(columns=unused)
