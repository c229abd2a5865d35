"""The tables of this folder, from the runs they are made of.

`python data/results/make.py` writes every table whose runs are all done, and says of the others what is missing. With
`--train` it trains what is missing first, about a day on two cores; `skin7_128` and `skin7_paper` need a GPU. The
images have to be there (`python -m deepknn_lib verify skin7`, `chestxray3`, `sd198`), and DEEPKNN_WEIGHTS has to name a
folder with `resnet18.pqf.safetensors` and `resnet50.pqf.safetensors`. The tables of trials are made by `trials.py`.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, make_scorer
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from deepknn_lib import metrics
from deepknn_lib.datasets import Dataset, load_dataset
from deepknn_lib.neighbors import majority_vote, nearest_neighbors
from deepknn_lib.storage import write_csv
from deepknn_lib.study import claims, experiments, results
from deepknn_lib.study.runs import TABLE2, TABLE3, TABLE4, Run, grid, make_run, sweeps

GIVEN = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
TABLES, PAIRS, LADDER, COUNTED, AT_64 = GIVEN.values()
COMPARED = (*TABLE2, "triplet-ft")
PAIR = ("knn", "weighted-ce", "ce-knn", "deep-knn")  # the two main rivals and what each is measured against
SPLITS = {"skin7": ("paper", "grouped"), "chestxray3": ("paper", "grouped"), "sd198": ("paper",)}
FROZEN = {"backbone": "resnet50", "weights": "pqf", "image_size": 256}
TUNED = {"weights": "pqf"}
Results = list[experiments.Result]


def studies() -> dict[str, list[Run]]:
    """The runs of each study; `datasets` has none."""
    found = {f"{name}_demo": grid(name, "demo", COMPARED, SPLITS[name], (0, 1, 2)) for name in SPLITS}
    for name, seeds in (("skin7", (0, 1)), ("sd198", ())):  # the seeds of whole-set search, which costs most
        of_k_and_m = sweeps(name, "demo", (0, 1, 2))["K and M"]
        found[f"{name}_sweeps"] = of_k_and_m + sweeps(name, "demo", seeds)["search"]
    found["skin7_backbones"] = grid("skin7", "demo", TABLE4, ("grouped",), (0,), backbone="small-vgg")
    searches = [(seed, method) for seed in (0, 1) for method in ("deep-knn", "deep-knn-global")]
    found["skin7_search"] = [at_64(method, split="grouped", seed=seed) for seed, method in searches]
    found |= {"skin7_128": at_128(), "skin7_64": tuned_at_64()}
    # The same runs as some of skin7_128, whose predictions stayed on the GPU's machine.
    plan = [((*PAIR, "triplet"), ("grouped",), (0, 1, 2)), ((*PAIR, "triplet"), ("paper",), (0, 1))]
    plan += [(("deep-knn-ft",), SPLITS["skin7"], (0, 1)), (("semi-hard", "supcon"), ("grouped",), (0, 1))]
    found["skin7_128_cpu"] = [run for part in plan for run in grid("skin7", "finetune", *part, **TUNED)]
    larger = {"image_size": 160, "epochs": 20, "lr_decay_every": 4}
    found["skin7_160"] = grid("skin7", "finetune", PAIR, ("paper",), (0,), **TUNED, **larger)
    for name, split in (("sd198", "paper"), ("chestxray3", "grouped")):
        found[f"{name}_128"] = grid(name, "finetune", PAIR, (split,), (0, 1), **TUNED)
    found["skin7_table3"] = grid("skin7", "demo", TABLE3, SPLITS["skin7"], (0, 1, 2, 3, 4), **FROZEN)
    for name in ("chestxray3", "sd198"):
        found[f"{name}_pretrained"] = grid(name, "demo", ("knn",), SPLITS[name], (0,), **FROZEN)
    found["skin7_ladder"] = [at_64("deep-knn", **{"split": "paper"} | step) for step in LADDER]
    found["skin7_leak"] = grid("skin7", "demo", ("knn",), ("paper",), (0,), **FROZEN)
    found["skin7_logistic"] = [run for run in at_128() if run.method == "knn"]
    return found | {"skin7_paper": on_a_gpu(), "datasets": []}


def at_64(method: str, **given) -> Run:
    """A run of deep kNN on Skin-7 at 64 pixels, as it was before the profile `finetune` had 128."""
    return make_run("skin7", method, "finetune", **TUNED | AT_64 | given)


def at_128() -> list[Run]:
    """The profile `finetune` on Skin-7, all rivals, one seed by each split and a second one of the main pair."""
    every = (*TABLE2, "semi-hard", "supcon", "proxy-anchor")
    plan = [("grouped", 0, (*every, "triplet-ft", "multi-similarity", "nca-loss")), ("paper", 0, every)]
    plan += [("dermamnist-c", 0, ("knn", "weighted-ce", "ce-knn", "deep-knn", "deep-knn-ft", "supcon"))]
    plan += [("grouped", 1, ("deep-knn", "weighted-ce", "ce-knn"))]
    given = [(method, {"split": split, "seed": seed}) for split, seed, methods in plan for method in methods]
    return [make_run("skin7", method, "finetune", **TUNED | where) for method, where in given]


def tuned_at_64() -> list[Run]:
    """The profile `finetune`, whose rivals were tuned, with two seeds, at 64 pixels for want of a GPU."""
    every = {"paper": PAIR, "grouped": (*PAIR, "deep-knn-ft", "triplet", "semi-hard", "supcon")}
    order = [
        (seed, split, method) for seed in (0, 1) for split, methods in every.items() for method in methods
    ]
    given = TUNED | {"image_size": 64}
    return [make_run("skin7", m, "finetune", **given, split=split, seed=seed) for seed, split, m in order]


def on_a_gpu() -> list[Run]:
    """The profile `paper` on Skin-7 by lesion: one seed, and 21 epochs in place of 60."""
    given = {"split": "grouped", "seed": 0, "weights": "pqf"}
    whole = given | {"epochs": 21, "lr_decay_every": 5}
    start = given | {"base": make_run("skin7", "weighted-ce", "paper", **whole)}
    changes = {"knn": given, "weighted-ce": whole, "ce-knn": start, "deep-knn": whole, "semi-hard": whole}
    changes |= {"deep-knn-ft": start | {"epochs": 10, "lr_decay_every": 2}, "supcon": whole}
    return [make_run("skin7", method, "paper", **settings) for method, settings in changes.items()]


def files() -> dict[str, tuple[Callable[[Results], pd.DataFrame], list[str]]]:
    """Each table: what makes it of results, and the studies that the results come from."""
    found = {"datasets": (counts, ["datasets"]), "skin7_leak": (leak, ["skin7_leak"])}
    found["skin7_logistic"] = logistic, ["skin7_logistic"]
    makers = {"history": results.history_table, "differences": differences}
    makers |= {"evidence": evidence, "predictions": results.predictions_table}
    kinds = {name: name.partition("_")[2] for name in studies() if name not in found}
    for name, kind in kinds.items():
        found[f"{name}_runs"] = partial(rows, every_vote=kind in ("sweeps", "128_cpu")), [name]
        tables = TABLES.get(name, TABLES.get(kind, ()))
        found |= {f"{name}_{table}": (makers[table], [name]) for table in tables}
    alone = ("ladder", "paper", "160", "128", "64")  # they have their own evidence, or none
    compared = [name for name, kind in kinds.items() if kind not in alone]
    for dataset in dict.fromkeys(name.split("_")[0] for name in compared):
        found[f"{dataset}_evidence"] = evidence, [name for name in compared if name.startswith(dataset)]
    return found


def rows(found: Results, every_vote: bool) -> pd.DataFrame:
    """One row a run and K_p; with `every_vote`, deep kNN has Table S4's K_p at the paper's K and M, else K_p = K."""

    def votes(run: Run) -> tuple[int, ...]:
        if run.method != "deep-knn" or not every_vote:
            return ()
        return (1, 3, 5, 7, 9) if (run.k, run.m) == (5, 5) else (run.k_predict,)

    tables = [results.results_table([result], votes(result.run)) for result in found]
    return pd.DataFrame([row for table in tables for row in table.to_dict("records")])


def differences(found: Results) -> pd.DataFrame:
    """Each pair of methods with its paired 95 % interval in points; K_p = 5, and `k_minus` is that of `minus`."""
    tables = []
    for split in dict.fromkeys(result.run.split for result in found):
        for method, minus, k_minus in PAIRS:
            both = [results.select(found, split=split, method=name) for name in (method, minus)]
            seeds = set.intersection(*({result.run.seed for result in side} for side in both))
            if seeds:
                first, second = ([result for result in side if result.run.seed in seeds] for side in both)
                table = results.paired(first, second, 5, k_minus)
                tables.append(table.assign(split=split, method=method, minus=minus, k_minus=k_minus))
    return pd.concat(tables)


def evidence(found: Results) -> pd.DataFrame:
    """Every comparison that a claim needs, from all studies of a data set."""
    usual = {result.run: result for result in found if (result.run.k, result.run.m) == (5, 5)}
    return claims.evidence(usual.values(), variants=[result for result in found if result.run not in usual])


def leak(found: Results) -> pd.DataFrame:
    """What a test image's own lesion in the training part is worth: the vote with it minus without it, in points."""
    (result,), arrays = found, found[0].arrays
    most = np.unique(arrays["train_groups"], return_counts=True)[1].max()
    parts = (torch.from_numpy(arrays[f"{part}_features"]) for part in ("test", "train"))
    distances, near = nearest_neighbors(*parts, 5 + int(most))
    own = torch.from_numpy(arrays["train_groups"][near.numpy()] == arrays["test_groups"][:, None])
    last = own.int().argsort(dim=1, stable=True)  # The images of the own lesion go behind all others.
    distances, near = distances.gather(1, last), near.gather(1, last)
    labels = torch.from_numpy(arrays["train_labels"])[near]
    n_classes = len(result.record["class_names"])
    votes = {k: majority_vote(labels[:, :k], distances[:, :k], n_classes).numpy() for k in (1, 5)}
    without = replace(result, _predicted=votes)
    names = ("dataset", "method", "backbone", "weights", "image_size")
    about = {name: getattr(result.run, name) for name in names}
    about |= {"seeds": 1, "k_predict": 0, "measure": "with - without twins, by image"}
    tables = [results.paired([result], [without], k, k).assign(**about | {"k_predict": k}) for k in votes]
    return pd.concat(tables)[[*about, "score", "difference", "low", "high"]]


def logistic(found: Results) -> pd.DataFrame:
    """Logistic regression on the frozen features of kNN runs, and its difference from their vote of five, in points.

    Of eight trials, four penalties and classes weighted or not, the best mean of Acc and MCR on a fifth of the training
    part is taken: groups stay together, and no test image has a part in it.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    tried = {"logisticregression__C": [0.001, 0.01, 0.1, 1.0]}
    tried["logisticregression__class_weight"] = [None, "balanced"]
    table = []
    for result in found:
        arrays, record = result.arrays, result.record
        features, labels, groups = (arrays[f"train_{name}"] for name in ("features", "labels", "groups"))
        fold = next(StratifiedGroupKFold(5, shuffle=True, random_state=0).split(features, labels, groups))
        search = GridSearchCV(model, tried, scoring=make_scorer(acc_and_mcr), cv=[fold])
        predicted = search.fit(features, labels).predict(arrays["test_features"])
        names = ("dataset", "split", "backbone", "weights", "image_size")
        about = {name: getattr(result.run, name) for name in names}
        about |= {name.split("__")[1]: value or "none" for name, value in search.best_params_.items()}
        n_classes = len(record["class_names"])
        about |= metrics.scores(arrays["test_labels"], predicted, n_classes, record["smallest"])
        about["commit"] = experiments.commit()
        gap = results.paired([replace(result, _predicted={5: predicted})], [result], 5, 5)
        table += [about | row for row in gap.to_dict("records")]
    return pd.DataFrame(table)


def acc_and_mcr(labels: np.ndarray, predictions: np.ndarray) -> float:
    """What a trial of `logistic` is judged by: the sum of Acc and MCR, each 0 to 1."""
    return accuracy_score(labels, predictions) + balanced_accuracy_score(labels, predictions)


def counts(found: list[Dataset]) -> pd.DataFrame:
    """Images and classes, counted, of the paper's sets that we have."""
    table = []
    for data in found:
        (title, remark), sizes = COUNTED[data.name], np.bincount(np.r_[data.train.labels, data.test.labels])
        row = {"dataset": title, "our_name": data.name, "classes": len(sizes), "train": len(data.train)}
        row |= {"test": len(data.test), "smallest_class": sizes.min(), "largest_class": sizes.max()}
        table.append(row | {"remark": remark})
    return pd.DataFrame(table)


def is_done(run: Run) -> bool:
    """Whether the run was executed before, on the data that are there now."""
    return experiments.Entry.of(run).result() is not None


def main(argv: list[str] | None = None) -> int:
    """Write what can be written; 0 also where something is missing, as the output says what."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train the runs that are missing")
    names = ", ".join(studies())
    parser.add_argument("--only", metavar="STUDY,STUDY", help=f"some of {names} (default: all)")
    parser.add_argument("--jobs", type=int, help="runs at once (default: the cores, or 1 on a GPU)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path(__file__).parent)
    arguments = parser.parse_args(argv)
    known, done = studies(), {}
    wanted = arguments.only.split(",") if arguments.only else list(known)
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"unknown study {', '.join(unknown)}; choose of {names}")
    for name in wanted:
        try:
            if arguments.train and known[name]:
                experiments.execute_all(known[name], jobs=arguments.jobs)
            if missing := sum(not is_done(run) for run in known[name]):
                told = f"{missing} of its {len(known[name])} runs are missing"
                print(f"{name}: left as it is, {told}", file=sys.stderr)
            else:
                counted = COUNTED if name == "datasets" else ()
                done[name] = [*experiments.execute_all(known[name]), *map(load_dataset, counted)]
        except (OSError, ValueError) as error:  # A data set or weights are not there.
            print(f"{name}: left as it is. {error}", file=sys.stderr)
    for name, (make, needed) in files().items():
        if set(needed) <= set(done):
            table = make([result for study in needed for result in done[study]])
            write_csv(table, arguments.out / f"{name}.csv")
            print(f"{name}.csv: {len(table)} rows")
        elif set(needed) & set(done):
            print(f"{name}.csv: left as it is, it needs {', '.join(needed)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
