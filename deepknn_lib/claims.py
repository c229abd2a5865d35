"""The paper's ten claims judged by a rule that was fixed before any number: results → evidence → verdicts."""
import math
from collections.abc import Iterable
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from deepknn_lib import embeddings, metrics, tables
from deepknn_lib.experiments import Result
from deepknn_lib.runs import METHODS, Run

CLAIMS = tuple(f"C{number}" for number in range(1, 11))
LEVEL = 1 - 0.05 / len(CLAIMS)  # Bonferroni over the claims; within one all comparisons must hold, which needs no more
CLOSE = 2.4  # points; 'close', 'no worse': twice the largest standard deviation over runs that the paper states
ROBUST = 3.4  # points; 'robust': the largest range of a score in the paper's own Table S3
FAR_FEWER = 0.5  # 'far fewer' epochs: less than half
MIN_SEEDS = 2  # a single run says nothing about other seeds
MIN_BACKBONES = 2  # of C7, 'whatever the backbone'; the paper has four
K_PREDICT = (1, 3, 7, 9)  # of Table S4, beside 5

WORDS = {
    "knn": "kNN", "triplet": "triplet", "deep-knn": "deep kNN", "weighted-ce": "weighted CE", "ce-knn": "kNN on CE features",
    "deep-knn-ft": "deep kNN*", "triplet-ft": "triplet", "deep-knn-global": "deep kNN with whole-set search", "nca": "NCA",
    "lmnn": "LMNN", "mlp-deep-knn": "MLP + deep kNN", "mlp-triplet": "MLP + triplet", "mlp-ce": "MLP + CE",
}  # fmt: skip
_BETTER, _NO_WORSE = {"Acc": 0.0, "MCR": 0.0}, {"Acc": -CLOSE, "MCR": -CLOSE}
SCORED = {  # claim: (method, its rivals, what the difference must be above)
    "C1": ("deep-knn", ("knn",), _BETTER),
    "C2": ("deep-knn", ("triplet",), _BETTER),
    "C3": ("deep-knn", ("weighted-ce",), _NO_WORSE | {"RS": 0.0}),
    "C4": ("deep-knn-ft", ("deep-knn", "weighted-ce"), _BETTER),
    "C6": ("mlp-deep-knn", ("knn", "nca", "lmnn", "mlp-triplet", "mlp-ce"), _BETTER),
    "C7": ("deep-knn", ("ce-knn",), _BETTER),
    "C8": ("deep-knn", ("deep-knn-global",), _NO_WORSE),
}
NEEDED = {
    claim: [(f"{WORDS[ours]} − {WORDS[rival]}", measure) for rival in rivals for measure in bounds]
    for claim, (ours, rivals, bounds) in SCORED.items()
} | {
    "C5": [("deep kNN / triplet", "epochs ratio")],
    "C9": [(f"K_p = {k} − K_p = 5", measure) for k in K_PREDICT for measure in ("Acc", "MCR")],
    "C10": [("triplet − deep kNN", f"ratio, {part}") for part in ("train", "test")],
}
COLUMNS = ["claim", "dataset", "split", "setting", "comparison", "measure", "value", "low", "high", "side", "bound"]
COLUMNS += ["seeds", "test_images", "alive", "dead"]
# The two losses from the same start; a triplet that cannot start from nothing may still do so from a trained network.
STARTS = {"": ("deep-knn", "triplet"), ", from the cross-entropy network": ("deep-knn-ft", "triplet-ft")}
_ITSELF = " itself"  # in `dead`: the method that the claim is about
Seeds = dict[int, Result]


def evidence(
    results: Iterable[Result], *, variants: Iterable[Result] = (), packed: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Every comparison that the claims need and the results allow.

    Parameters
    ----------
    results : iterable of Result
        Of any data sets and splits; those judged on a validation part are passed over.
    variants : iterable of Result
        Deep kNN with another K or M (C9); runs that differ from `results` in anything else are passed over.
    packed : DataFrame, optional
        Rows `dataset, split, backbone, method, seed, part, ratio` of `embeddings.compactness` (C10), else measured here.

    Returns
    -------
    DataFrame
        One row a comparison and measure, over `seeds` pairs of runs. The claim wants the interval `low`..`high` (at
        `LEVEL`) on the `side` (`>`, `<`) of `bound`. Scores are in points; `epochs ratio` is a geometric mean;
        `ratio, train` and `ratio, test` are differences of within- over between-class distance. `alive`: no method
        compared collapsed or learnt nothing; `dead` names those that did.

    Raises
    ------
    ValueError
        If a method has two settings in one group (see `setting`), or two methods have different test images.
    """
    groups, variants = _groups(results), [result for result in variants if result.run.evaluate_on == "test"]
    rows = _pretrained(groups) + _speed(groups)
    for methods in groups.values():
        for claim in ("C3", "C4", "C6", "C7", "C8"):  # C1 compares across groups
            ours, rivals, bounds = SCORED[claim]
            for rival in rivals:
                rows += _scored(claim, methods.get(ours), methods.get(rival), bounds)
        for start, pair in STARTS.items():
            rows += _scored("C2", *map(methods.get, pair), _BETTER, start=start, comparison="deep kNN − triplet")
            rows += _packing(*_matched(*map(methods.get, pair)), packed, start)
        rows += _robust(methods.get("deep-knn", {}), variants)
    return pd.DataFrame(sorted(rows, key=lambda row: CLAIMS.index(row["claim"])), columns=COLUMNS)


def _group(run: Run) -> tuple:
    """What the methods of a comparison share: where the features come from, and how long that was trained."""
    if run.base:
        return _group(run.base)
    epochs = run.epochs if METHODS[run.method].loss else 0
    return run.dataset, run.split, run.fold, run.backbone, run.weights, run.image_size, epochs


def setting(run: Run) -> str:
    """A run's group in words: backbone (up to the first comma), weights, image size, fold if not the first, epochs."""
    _, _, fold, backbone, weights, image_size, epochs = _group(run)
    words = [backbone, "from scratch" if weights == "none" else f"{Path(weights).name} weights", f"{image_size} px"]
    return ", ".join(words + [f"fold {fold}"] * (fold != 1) + [f"{epochs} epochs"] * bool(epochs))


def _plain(run: Run) -> Run:
    """A run without what may differ between the runs of one setting."""
    return replace(run, seed=0, k_predict=5, base=run.base and _plain(run.base))


def _groups(results: Iterable[Result]) -> dict[tuple, dict[str, Seeds]]:
    """Results by group, then by method, then by seed."""
    groups = {}
    for result in (result for result in results if result.run.evaluate_on == "test"):
        run = result.run
        seeds = groups.setdefault(_group(run), {}).setdefault(run.method, {})
        one, other = _plain(next(iter(seeds.values()), result).run), _plain(run)
        names = [f.name for f in fields(Run) if getattr(one, f.name) != getattr(other, f.name)]
        if names:
            raise ValueError(f"{run.label}: two settings of one method, they differ in {', '.join(names)}; leave one out, "
                             "or pass runs with another K or M as `variants`")  # fmt: skip
        seeds[run.seed] = result
    return groups


def _dead(results: list[Result]) -> bool:
    """Whether a run collapsed or learnt nothing."""
    return not all(result.learnt for result in results)


def _row(claim: str, ours: list[Result], rival: list[Result], start: str = "", **values) -> dict:
    run, (first, second) = ours[0].run, [WORDS[results[0].run.method] for results in (ours, rival)]
    dead = [first + _ITSELF] * _dead(ours) + [second] * _dead(rival)
    row = {"claim": claim, "dataset": run.dataset, "split": run.split, "setting": setting(run) + start, "seeds": len(ours)}
    row |= {"comparison": f"{first} − {second}", "test_images": len(ours[0].arrays["test_labels"])}
    return row | {"alive": not dead, "dead": " and ".join(dead)} | values


def _matched(ours: Seeds | None, rival: Seeds | None) -> tuple[list[Result], list[Result]]:
    """The runs of the seeds that both have."""
    seeds = sorted(set(ours or {}) & set(rival or {}))
    return [ours[seed] for seed in seeds], [rival[seed] for seed in seeds]


def _scored(claim: str, ours: Seeds | None, rival: Seeds | None, bounds: dict, k_ours: int = 5, **words) -> list[dict]:
    """Differences of the scores, paired by image and seed; K_p = 5, and the network's own classifier for weighted CE."""
    first, second = _matched(ours, rival)
    if not first:
        return []
    k_rival = 0 if second[0].run.method == "weighted-ce" else 5
    gaps = tables.paired(first, second, k_ours, k_rival, LEVEL).rename(columns={"difference": "value"}).set_index("score")
    rows = [{"measure": measure, "side": ">", "bound": bound} | dict(gaps.loc[measure]) for measure, bound in bounds.items()]
    return [_row(claim, first, second, **(row | words)) for row in rows]


def _pretrained(groups: dict) -> list[dict]:
    """C1: deep kNN on the main pretrained backbone (most methods, then most runs) against kNN on each there is."""
    rows = []
    pretrained = {key: methods for key, methods in groups.items() if key[4] != "none"}
    for place in dict.fromkeys(key[:3] for key in pretrained):
        here = [methods for key, methods in pretrained.items() if key[:3] == place]
        heads = sorted(here, key=lambda methods: (-len(methods), -sum(map(len, methods.values()))))
        main = next((methods["deep-knn"] for methods in heads if "deep-knn" in methods), {})
        for knn in (methods["knn"] for methods in here if main and "knn" in methods):
            own, other = (setting(next(iter(seeds.values())).run) for seeds in (main, knn))
            words = own if own.startswith(other) else f"{own} against {other}"
            rows += _scored("C1", main, knn, SCORED["C1"][2], setting=words)
    return rows


def _robust(reference: Seeds, variants: list[Result]) -> list[dict]:
    """C9: other K and M, trained anew; where there are such runs, also other K_p on the same features."""
    found = {}
    for run, result in ((result.run, result) for result in variants if reference):
        like = _plain(next(iter(reference.values())).run)
        if _plain(run) != like and replace(_plain(run), k=like.k, m=like.m) == like:
            words = f"K = {run.k}, M = {run.m} − K = {like.k}, M = {like.m}"
            found.setdefault(words, {})[run.seed] = result
    bounds = {"Acc": -ROBUST, "MCR": -ROBUST}
    rows = [r for words, seeds in found.items() for r in _scored("C9", seeds, reference, bounds, comparison=words)]
    for row in (row for row in rows if row["dead"] and not _dead(list(reference.values()))):
        row |= {"alive": True, "dead": "", "setting": row["setting"] + ", learnt nothing"}  # the worst of not being robust
    votes = [(k, f"K_p = {k} − K_p = 5") for k in K_PREDICT if found]
    return rows + [r for k, words in votes for r in _scored("C9", reference, reference, bounds, k_ours=k, comparison=words)]


def _speed(groups: dict) -> list[dict]:
    """C5: epochs to the highest multiple of 5 % that all deep kNN runs of a setting reach; `low` 0 if a rival never does."""
    pooled = {}
    for ((dataset, split, *key), methods), (start, pair) in product(groups.items(), STARTS.items()):
        ours, rival = _matched(*map(methods.get, pair))
        if ours:
            level = 5 * math.floor(min(max(row["train_acc"] for row in result.history) for result in ours) / 5)
            epochs = np.array([[metrics.arrival(result.history, level) for result in results] for results in (ours, rival)])
            logs = list(np.log(epochs[0] / epochs[1]))
            never = sum(epoch > len(result.history) for epoch, result in zip(epochs[1], rival, strict=True))
            words = f", never by {never} of {len(rival)} triplet runs: last epoch + 1" * bool(never)
            words = f"{setting(ours[0].run)}{start}, to {level} %{words}"
            place = (dataset, split, *((start, *key) if _dead(ours) or _dead(rival) else ()))
            pooled.setdefault(place, []).append((ours, rival, logs, words))
    rows = []
    for parts in pooled.values():
        ours, rival, logs = (sum((part[n] for part in parts), []) for n in range(3))
        low, high = np.exp(metrics.t_interval(logs, LEVEL)) * (not any("never by" in part[3] for part in parts), 1)
        values = {"measure": "epochs ratio", "value": math.exp(np.mean(logs)), "low": low, "high": high, "side": "<",
                  "bound": FAR_FEWER, "setting": "; ".join(part[3] for part in parts), "test_images": np.nan}
        rows.append(_row("C5", ours, rival, comparison="deep kNN / triplet", **values))
    return rows


def _ratio(result: Result, part: str, packed: pd.DataFrame | None) -> float:
    """Within- over between-class distance of a run's features, from `packed` if given (NaN if it is not there)."""
    if packed is None:
        return embeddings.compactness(result.arrays[f"{part}_features"], result.arrays[f"{part}_labels"])["ratio"]
    names = [f.name for f in fields(Run) if f.name in packed]
    same = (packed[names] == [getattr(result.run, name) for name in names]).all(axis=1) & (packed["part"] == part)
    return packed.loc[same, "ratio"].mean()


def _packing(ours: list[Result], rival: list[Result], packed: pd.DataFrame | None, start: str) -> list[dict]:
    """C10: triplet's ratio minus deep kNN's; smaller is tighter."""
    rows = []
    for part, side in (("train", "<"), ("test", ">")) if ours else ():
        gaps = [_ratio(b, part, packed) - _ratio(a, part, packed) for a, b in zip(ours, rival, strict=True)]
        if gaps := [gap for gap in gaps if not np.isnan(gap)]:
            values = {"value": np.mean(gaps), "seeds": len(gaps), "side": side, "bound": 0.0, "measure": f"ratio, {part}"}
            values |= dict(zip(("low", "high"), metrics.t_interval(gaps, LEVEL), strict=True))
            rows.append(_row("C10", ours, rival, start, comparison="triplet − deep kNN", **values))
    return rows


def verdicts(evidence: pd.DataFrame) -> pd.DataFrame:
    """The verdict on each claim, for every data set and split with any evidence (live, or read back from CSV).

    `replicated`: every interval lies on the claimed side; `not replicated`: one does not; `not tested`: no setting has
    every comparison with several seeds and a rival that trained, or the method that the claim is about died. A setting
    whose rival died is left out where another has it all. `why` is one sentence with the numbers.
    """
    alive = evidence["alive"].astype(str) == "True"
    backbone = evidence["setting"].map(lambda words: words.partition(",")[0])
    rows = evidence.assign(alive=alive, dead=evidence["dead"].fillna("").astype(str), backbone=backbone)
    found = []
    for (dataset, split), here in rows.groupby(["dataset", "split"], sort=False):
        found += [(claim, dataset, split, *_judge(claim, here[here["claim"] == claim])) for claim in CLAIMS]
    return pd.DataFrame(found, columns=["claim", "dataset", "split", "verdict", "why"])


def _judge(claim: str, rows: pd.DataFrame) -> tuple[str, str]:
    counts = rows["alive"] & (rows["seeds"] >= MIN_SEEDS) & rows[["low", "high"]].notna().all(axis=1)
    rows, aside = rows[counts], _aside(rows[~counts])
    lacking = _lacking(claim, rows)
    if lacking or _ITSELF in aside:
        return "not tested", "; ".join(filter(None, [lacking, aside])) + "."
    up = rows["side"] == ">"
    holds = np.where(up, rows["low"] > rows["bound"], rows["high"] < rows["bound"])
    wrong = np.where(up, rows["high"] < rows["bound"], rows["low"] > rows["bound"])
    room = np.where(up, rows["low"] - rows["bound"], rows["bound"] - rows["high"])
    said = [f"{holds.sum()} of {len(rows)} comparisons hold"]
    for words, which in (("the other way", wrong), ("undecided", ~holds & ~wrong)):
        said += [f"{words}: {_numbers(rows[which])}"] * which.any()
    said += [f"the closest: {_numbers(rows.iloc[[room.argmin()]])}"] * holds.all()
    said += [f"{rows['backbone'].nunique()} backbones, the paper has 4"] * (claim == "C7")
    return "replicated" if holds.all() else "not replicated", "; ".join(filter(None, [*said, aside])) + "."


def _lacking(claim: str, rows: pd.DataFrame) -> str:
    """What a claim still needs; empty when one setting has it all."""
    missing = NEEDED[claim]
    for _, of_setting in rows.groupby("setting"):
        had = set(zip(of_setting["comparison"], of_setting["measure"], strict=True))
        missing = min(missing, [pair for pair in NEEDED[claim] if pair not in had], key=len)
    if missing:
        where, measures = " on pretrained backbones" if claim == "C1" else "", {}
        for comparison, measure in missing:
            measures.setdefault(comparison, []).append(measure)
        return f"missing{where}: " + ", ".join(f"{words} ({', '.join(had)})" for words, had in measures.items())
    if claim == "C7" and rows["backbone"].nunique() < MIN_BACKBONES:
        return f"a single backbone, at least {MIN_BACKBONES} are needed"
    if claim == "C9":
        varied = rows["comparison"].str.extract(r"^K = (\d+), M = (\d+) − K = (\d+), M = (\d+)$").dropna()
        absent = [name for n, name in enumerate("KM") if not (varied[n] != varied[n + 2]).any()]
        return f"no run with another {' or '.join(absent)}" if absent else ""
    return ""


def _aside(rows: pd.DataFrame) -> str:  # rows that do not count, and why
    why = np.where(rows["alive"], "a single seed or no interval", rows["dead"] + " collapsed or learnt nothing")
    said = dict.fromkeys(f"{reason} ({words})" for reason, words in zip(why, rows["setting"], strict=True))
    return "left out: " + ", ".join(said) if said else ""


def _numbers(rows: pd.DataFrame, most: int = 4) -> str:
    words = "{comparison} ({setting}) {measure} {value:.3g} [{low:.3g}, {high:.3g}], needed {side} {bound:g}"
    said = [words.format(**row) for row in rows.head(most).to_dict("records")]
    return " and ".join(said) + (f" and {len(rows) - most} more" if len(rows) > most else "")
