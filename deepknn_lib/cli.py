"""The command line: `python -m deepknn_lib notebooks | datasets | download | verify | run | grid | tune | bench`."""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; kept apart so that the README's commands can be checked against it."""
    from deepknn_lib import bench, pipeline
    from deepknn_lib.runs import METHODS, PROFILES

    parser = argparse.ArgumentParser(prog="python -m deepknn_lib", description="Deep kNN, reproduced.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    notebooks = commands.add_parser("notebooks", help="run the notebooks in order (what run_all.sh does)")
    pipeline.add_arguments(notebooks)

    commands.add_parser("datasets", help="list the data sets, their licences, and whether each is there")
    download = commands.add_parser("download", help="get a data set, or be told how")
    verify = commands.add_parser("verify", help="check a data set before anything is trained on it")
    for command in (download, verify):
        command.add_argument("dataset", metavar="NAME", help="skin7, medmnist:pathmnist@64, folder:PATH, …")
    verify.add_argument("--out", type=Path, metavar="FILE", help="the findings as CSV (default: verify/NAME.csv in the data "
                        "folder)")  # fmt: skip

    run = commands.add_parser("run", help="train and judge one method once")
    grid = commands.add_parser(
        "grid", help="train and judge all methods, seeds and both splits; resumes where it stopped"
    )
    tune = commands.add_parser("tune", help="run every method's trials on a validation part and write them down")
    for command in (run, grid, tune):
        command.add_argument("--dataset", default="lesions", help="lesions, skin7, folder:PATH, … (default: %(default)s; "
                             "grid: several with commas)")  # fmt: skip
        command.add_argument("--profile", default="demo", choices=PROFILES, help="settings (default: %(default)s)")
        command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    run.add_argument("--method", required=True, choices=METHODS)
    run.add_argument("--split", default="paper", choices=("paper", "grouped"))
    run.add_argument("--fold", type=int, help="1 to 5, the fold to test on (default: 1)")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--epochs", type=int, help="default: the profile's")
    run.add_argument("--out", type=Path, metavar="DIR", help="also copy run.json, history.csv, features.npz and "
                     "model.safetensors there")  # fmt: skip
    for command in (grid, tune):
        command.add_argument("--methods", help="comma-separated (default: those of the paper's Table 2; tune: all)")
    for command in (run, grid, tune):
        command.add_argument("--backbone", help="small-resnet or a timm model, such as resnet50 (default: the profile's)")
        command.add_argument("--weights", metavar="FILE", help="safetensors file, tag, 'imagenet' or 'none' (default: the "
                             "profile's)")  # fmt: skip
        command.add_argument("--image-size", type=int, metavar="PIXELS", help="default: the profile's")
    tune.add_argument("--seeds", default="0", help="comma-separated (default: %(default)s)")
    tune.add_argument("--out", type=Path, required=True, metavar="FILE", help="add the trials to this CSV")
    grid.add_argument("--sweeps", action="store_true", help="then whole-set search, and K and M as in Table S3")
    grid.add_argument("--splits", help="paper, grouped or both, comma-separated (default: both)")
    grid.add_argument("--seeds", help="comma-separated, such as 0,1,2 (default: the profile's)")
    grid.add_argument("--out", type=Path, metavar="FILE", help="write the results rows to this CSV")
    bench.add_arguments(commands.add_parser("bench", help="measure speed beside torchvision, FAISS, scikit-learn and "
                                            "pytorch-metric-learning"))  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 when it did what was asked, 2 when it could not be meant, with one line that says why."""
    arguments = build_parser().parse_args(argv)
    try:
        return COMMANDS[arguments.command](arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _notebooks(arguments: argparse.Namespace) -> int:
    from deepknn_lib import pipeline

    return pipeline.run(arguments)


def _datasets(_: argparse.Namespace) -> int:
    from deepknn_lib.datasets import DATASETS, available

    for name, state in available().items():
        entry = DATASETS[name]
        counts = f" {sum(entry.counts.values()):,} images in {len(entry.counts)} classes." if entry.counts else ""
        pinned = ", ".join(f"{remote.url} ({remote.checksum or 'checked by its contents'})" for remote in entry.remotes)
        print(f"{name}: {entry.title}.{counts} Licence: {entry.licence}. Cite: {entry.citation}\n    {state}")
        for line in filter(None, (entry.page and f"page: {entry.page}", pinned and f"files: {pinned}")):
            print(f"    {line}")
    return 0


def _download(arguments: argparse.Namespace) -> int:
    from deepknn_lib.acquire import download

    print(f"{arguments.dataset} is in {download(arguments.dataset)}. "
          f"Check it: python -m deepknn_lib verify {arguments.dataset}")  # fmt: skip
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from deepknn_lib import verify

    return verify.report(arguments.dataset, arguments.out)


def _run(arguments: argparse.Namespace) -> int:
    from deepknn_lib import tables
    from deepknn_lib.experiments import execute, folder_of
    from deepknn_lib.runs import make_run

    run = make_run(
        arguments.dataset,
        arguments.method,
        arguments.profile,
        **_given(arguments, "split", "fold", "seed", "backbone", "epochs", "weights", "image_size"),
    )
    result = execute(run, arguments.device)
    if arguments.out:
        shutil.copytree(folder_of(run), arguments.out, dirs_exist_ok=True)
    rows = tables.results_table([result])[["k_predict", "acc", "mcr", "rs"]]
    print(json.dumps({"run": run.key, "scores": rows.to_dict("records")}))
    return 0


def _given(arguments: argparse.Namespace, *names: str) -> dict:
    """The options among `names` that were given."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _grid(arguments: argparse.Namespace) -> int:
    from deepknn_lib import tables
    from deepknn_lib.execution import pick_device
    from deepknn_lib.experiments import execute_all, outlook
    from deepknn_lib.runs import PROFILES, grid, sweeps
    from deepknn_lib.storage import whole_file

    options = _given(arguments, "backbone", "weights", "image_size")
    chosen = {"methods": arguments.methods.split(",")} if arguments.methods else {}
    if arguments.splits:
        chosen["split_names"] = arguments.splits.split(",")
    seeds = [int(s) for s in arguments.seeds.split(",")] if arguments.seeds else PROFILES[arguments.profile]["seeds"]
    names = arguments.dataset.split(",") if not arguments.dataset.startswith("folder:") else [arguments.dataset]
    # in an order that makes every finished run count: a whole comparison on every set, then the next seed
    runs = [r for s in seeds for n in names for r in grid(n, arguments.profile, seeds=(s,), **chosen, **options)]
    n_compared = len(runs)
    if arguments.sweeps:
        swept = [sweeps(n, arguments.profile, (s,), **options) for s in seeds for n in names]
        runs += [r for kind in ("search", "K and M") for one in swept for r in one[kind]]
    alone = pick_device(arguments.device).type == "cuda"
    print(outlook(runs, 1 if alone else os.cpu_count() or 1), file=sys.stderr)
    results = execute_all(runs, arguments.device)
    if arguments.out:
        with whole_file(arguments.out) as temporary:
            tables.results_table(results).to_csv(temporary, index=False, float_format="%.6g")
    for name in names:
        mine = [r for r in results[:n_compared] if r.run.dataset == name]
        print(tables.markdown(tables.readable(tables.summary(mine))))
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    import pandas as pd

    from deepknn_lib import tables, tuning
    from deepknn_lib.experiments import execute_all
    from deepknn_lib.storage import whole_file

    methods = arguments.methods.split(",") if arguments.methods else list(tuning.TRIALS.get(arguments.profile, {}))
    if not methods:
        raise ValueError(f"no trials in profile {arguments.profile!r}; profiles that have: {', '.join(tuning.TRIALS)}")
    changes = _given(arguments, "backbone", "weights", "image_size")
    changes = [changes | {"seed": int(seed)} for seed in arguments.seeds.split(",")]
    runs = [r for m in methods for one in changes for r in tuning.trials(arguments.dataset, arguments.profile, m, **one)]
    rows = tables.results_table(execute_all(runs, arguments.device))
    if arguments.out.is_file():
        rows = pd.concat([pd.read_csv(arguments.out), rows], ignore_index=True).drop_duplicates(
            [*tables.KEYS, *tables.SETTINGS, "k_predict", "evaluate_on"], keep="last"
        )
    with whole_file(arguments.out) as temporary:
        rows.to_csv(temporary, index=False, float_format="%.6g")
    chosen = tuning.best(rows)
    settings = ["method", "lr", "margin", "soft", "warmup", "normalize", "sampling"]
    print(tables.markdown(chosen[settings].astype(str).join(chosen[["acc", "mcr"]])))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from deepknn_lib import bench

    return bench.run(arguments)


COMMANDS = {
    "notebooks": _notebooks,
    "datasets": _datasets,
    "download": _download,
    "verify": _verify,
    "run": _run,
    "grid": _grid,
    "tune": _tune,
    "bench": _bench,
}
