"""The search that chose the settings: as many trials for every method of a profile, judged on validation images.

`trials.json` holds the trials. Each trains with one setting and is judged on a fifth of the *training* part of the
split by lesion: no lesion is on both sides, and no test image has a part in it. `python data/results/trials.py` adds a
profile's trials to its table in this folder and prints those that it chooses. The images have to be there, and
DEEPKNN_WEIGHTS has to name a folder with the `pqf` weights. `earlier` is a first search; its table does not say when
the learning rate was halved, and here it is after 4 epochs.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import fields
from pathlib import Path

import pandas as pd

from deepknn_lib.storage import write_csv
from deepknn_lib.study import experiments, results
from deepknn_lib.study.runs import METHODS, SOFTMAX, Run, make_run

FOLDER = Path(__file__).parent
TRIALS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
# The settings that are tried
CHOSEN = ("lr", "margin", "soft", "class_power", "warmup", "normalize", "sampling")


def trials(dataset: str, profile: str, method: str, **changes) -> list[Run]:
    """The runs of a method's trials, with fields of `Run` changed; ValueError, which names those that have trials."""
    search = TRIALS.get(profile, {"trials": {}})
    if method not in search["trials"]:
        known = ", ".join(search["trials"]) or "none"
        raise ValueError(f"no trials for {method!r} in profile {profile!r}; methods that have: {known}")
    # A trial starts from the defaults of `Run`, not from what an earlier search has chosen.
    shared = {name: getattr(Run, name) for name in CHOSEN}
    shared |= {"split": "grouped", "seed": 0, "evaluate_on": "validation"}
    if METHODS[method].loss == "weighted-ce":
        shared |= {"normalize": "none", "sampling": "random"}
    shared |= search["on features" if METHODS[method].on_features else "all"]
    settings = [shared | trial | changes for trial in search["trials"][method]]
    return [make_run(dataset, method, search.get("profile", profile), **one) for one in settings]


def scored(rows: pd.DataFrame) -> pd.DataFrame:
    """Every trial among rows of `results_table`: settings, mean `acc` and `mcr` over `seeds`, and if it is `chosen`.

    The highest mean of Acc and MCR is chosen (K_p = 5; cross-entropy by its softmax), of each data set, backbone,
    weights and method. A trial with a collapsed run is never chosen, and rows of test images have no part.
    """
    votes = [SOFTMAX if METHODS[method].loss == "weighted-ce" else 5 for method in rows["method"]]
    judged = rows[(rows["evaluate_on"] == "validation") & (rows["k_predict"] == votes)]
    search = ["dataset", "backbone", "weights", "method"]
    others = (*search, "seed", "k_predict")
    settings = [f.name for f in fields(Run) if f.name in judged and f.name not in others]
    over_seeds = judged.groupby([*search, *settings], sort=False, dropna=False)
    counts = {"seeds": over_seeds.size(), "collapsed": over_seeds["collapsed"].sum()}
    means = over_seeds[["acc", "mcr"]].mean().assign(**counts).reset_index()
    alive = means[means["collapsed"] == 0]
    first = (alive["acc"] + alive["mcr"]).groupby([alive[name] for name in search], sort=False).idxmax()
    return means.assign(chosen=means.index.isin(first))


def best(rows: pd.DataFrame) -> pd.DataFrame:
    """The chosen trial of each method; see `scored`."""
    every = scored(rows)
    return every[every["chosen"]]


def main(argv: list[str] | None = None) -> int:
    """Run trials, add them to the table, print the chosen ones."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="skin7")
    parser.add_argument("--profile", choices=TRIALS, default="demo")
    parser.add_argument("--methods", metavar="A,B", help="default: all that have trials")
    parser.add_argument("--seeds", default="0", metavar="0,1,2", help="default: 0; the MLPs had 0,1,2")
    parser.add_argument("--backbone", help="in place of the profile's, like the two that follow")
    parser.add_argument("--weights")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--jobs", type=int, help="runs at once (default: the cores, or 1 on a GPU)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="add to this CSV (default: the profile's)")
    asked = parser.parse_args(argv)
    search = TRIALS[asked.profile]
    out = asked.out or FOLDER / search["file"]
    given = {n: getattr(asked, n) for n in ("backbone", "weights", "image_size") if getattr(asked, n)}
    try:
        wanted = asked.methods.split(",") if asked.methods else search["trials"]
        seeds = [int(seed) for seed in asked.seeds.split(",")]
        runs = [trials(asked.dataset, asked.profile, m, **given, seed=s) for m in wanted for s in seeds]
        rows = results.results_table(experiments.execute_all(sum(runs, []), jobs=asked.jobs))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if out.is_file():
        known = pd.read_csv(out)
        if "class_power" not in known:  # Tables made before there was this setting have its default.
            known["class_power"] = known["method"].map({"weighted-ce": 1.0, "mlp-ce": 1.0})
        same = [*results.KEYS, *results.SETTINGS, "k_predict", "evaluate_on"]
        rows = pd.concat([known, rows], ignore_index=True).drop_duplicates(same, keep="last")
    write_csv(rows, out)
    chosen = best(rows)
    print(results.markdown(chosen[["method", *CHOSEN]].astype(str).join(chosen[["acc", "mcr"]])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
