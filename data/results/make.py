"""The tables of this folder, from the runs they are made of.

`python data/results/make.py` writes those whose runs are all done, and says of the others how many runs are missing;
with `--train` it trains what is missing first (about five hours on two cores). `--only skin7_finetune` makes some. The images and
weights have to be there: `skin7`, `chestxray3` and `sd198` (`python -m deepknn_lib verify skin7` and so on), and
DEEPKNN_WEIGHTS with `resnet18.pqf.safetensors` and `resnet50.pqf.safetensors`. Evidence needs all studies of a set.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from deepknn_lib import claims, experiments, tables
from deepknn_lib.runs import TABLE2, TABLE3, TABLE4, Run, grid, make_run, sweeps
from deepknn_lib.storage import whole_file

COMPARED = (*TABLE2, "triplet-ft")
SPLITS = {"skin7": ("paper", "grouped"), "chestxray3": ("paper", "grouped"), "sd198": ("paper",)}  # no groups known of sd198
FROZEN = {"backbone": "resnet50", "weights": "pqf", "image_size": 256}
TUNED = {"weights": "pqf"}
PAIRS = [("deep-knn", rival, 5) for rival in ("knn", "triplet", "ce-knn")] + [("deep-knn", "weighted-ce", 0), ("triplet", "knn", 5)]
PAIRS += [("deep-knn-ft", "deep-knn", 5), ("deep-knn-ft", "weighted-ce", 0), ("deep-knn-ft", "triplet-ft", 5)]
PAIRS += [("mlp-deep-knn", rival, 5) for rival in ("knn", "nca", "lmnn", "mlp-triplet", "mlp-ce")] + [("mlp-deep-knn", "mlp-ce", 0)]
CHANGED = (  # the ladder of README's "Why not 89?", one thing at a time
    {"backbone": "resnet50"}, {"image_size": 96}, {"image_size": 128}, {"epochs": 16, "lr_decay_every": 4},
    {"image_size": 96, "epochs": 16, "lr_decay_every": 4}, {"margin": 0.2}, {"margin": 1.0}, {"weights": "none"},
)  # fmt: skip


def studies() -> dict[str, list[Run]]:
    """The runs of every `<name>_runs.csv`."""
    found = {f"{name}_demo": grid(name, "demo", COMPARED, splits, (0, 1, 2)) for name, splits in SPLITS.items()}
    for name, seeds in (("skin7", (0, 1)), ("sd198", ())):  # of the whole-set search, which costs most
        found[f"{name}_sweeps"] = sweeps(name, "demo", (0, 1, 2))["K and M"] + sweeps(name, "demo", seeds)["search"]
    found["skin7_backbones"] = grid("skin7", "demo", TABLE4, ("grouped",), (0,), backbone="small-vgg")
    found["skin7_finetune"] = grid("skin7", "finetune", COMPARED, SPLITS["skin7"], (0, 1, 2), **TUNED)
    found["skin7_finetune_search"] = grid("skin7", "finetune", ("deep-knn-global",), ("grouped",), (0, 1), **TUNED)
    found["skin7_ladder"] = [
        make_run("skin7", "deep-knn", "finetune", split="paper", seed=0, **TUNED | change) for change in CHANGED
    ]
    found["skin7_table3"] = grid("skin7", "demo", TABLE3, SPLITS["skin7"], (0, 1, 2, 3, 4), **FROZEN)
    for name in ("chestxray3", "sd198"):
        found[f"{name}_pretrained"] = grid(name, "demo", ("knn",), SPLITS[name], (0,), **FROZEN)
    return found


def rows(study: str, results: list[experiments.Result]) -> pd.DataFrame:
    """One row a run and K_p; the runs of the paper's K and M in a sweep also vote with Table S4's K_p."""

    def votes(run: Run) -> tuple[int, ...]:
        if run.method != "deep-knn" or not study.endswith(("_sweeps", "_finetune")):
            return ()
        return (1, 3, 5, 7, 9) if (run.k, run.m) == (5, 5) else (run.k_predict,)

    made = (tables.results_table([result], votes(result.run)) for result in results)
    return pd.DataFrame([row for table in made for row in table.to_dict("records")])


def differences(results: list[experiments.Result]) -> pd.DataFrame:
    """Each pair of methods with its paired 95 % interval over images and seeds, in points; K_p = 5, `k_minus` 0: softmax."""
    found = []
    for split in dict.fromkeys(result.run.split for result in results):
        for method, minus, k_minus in PAIRS:
            first, second = (tables.select(results, split=split, method=name) for name in (method, minus))
            if first and second:
                table = tables.paired(first, second, 5, k_minus)
                found.append(table.assign(split=split, method=method, minus=minus, k_minus=k_minus))
    return pd.concat(found)


def evidence(studies: dict[str, list[experiments.Result]]) -> pd.DataFrame:
    """Every comparison that a claim needs, of a data set's studies."""
    compared = [result for results in studies.values() for result in results]
    swept = [r for name in studies if name.endswith("_sweeps") for r in studies[name] if r.run.method == "deep-knn"]
    usual = {result.run: result for result in compared if (result.run.k, result.run.m) == (5, 5)}
    return claims.evidence(usual.values(), variants=swept)


def main() -> int:
    """Write what can be written; 0 also where runs are missing, as the output says which."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--only", metavar="STUDY,STUDY", help=f"of {', '.join(studies())} (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    known, done = studies(), {}
    wanted = arguments.only.split(",") if arguments.only else list(known)
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"unknown study {', '.join(unknown)}; choose of {', '.join(known)}")
    for name in wanted:
        if arguments.train:
            print(f"{name}: {experiments.outlook(known[name])}", file=sys.stderr)
            experiments.execute_all(known[name])
        if missing := sum(not experiments.is_done(run) for run in known[name]):
            print(f"{name}: left as it is, {missing} of its {len(known[name])} runs are missing", file=sys.stderr)
            continue
        done[name] = [experiments.load(run) for run in known[name]]
        save(rows(name, done[name]), arguments.out / f"{name}_runs.csv")
        if name.endswith(("_demo", "_finetune", "_table3")):
            save(tables.history_table(done[name]), arguments.out / f"{name}_history.csv")
            save(differences(done[name]), arguments.out / f"{name}_differences.csv")
    for dataset in SPLITS:
        needed = [name for name in known if name.startswith(dataset) and not name.endswith("_ladder")]  # single runs
        if all(name in done for name in needed):
            save(evidence({name: done[name] for name in needed}), arguments.out / f"{dataset}_evidence.csv")
        elif any(name in done for name in needed):
            print(f"{dataset}_evidence.csv: left as it is, it needs {', '.join(needed)}", file=sys.stderr)
    return 0


def save(table: pd.DataFrame, path: Path) -> None:
    """As CSV, with six digits."""
    with whole_file(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    print(f"{path.name}: {len(table)} rows")


if __name__ == "__main__":
    raise SystemExit(main())
