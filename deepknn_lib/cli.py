"""The command line: `python -m deepknn_lib notebooks | datasets | download | verify | run | grid | predict`."""

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file

from deepknn_lib.datasets import CATALOG, available, download, verify
from deepknn_lib.datasets.load import SPLITS, distinct_splits
from deepknn_lib.storage import check_writable, write_csv
from deepknn_lib.study import predict, results, runner, runs
from deepknn_lib.study.cache import Entry, write_run
from deepknn_lib.study.experiments import execute, execute_all
from deepknn_lib.study.runs import METHODS, PROFILES, Run, make_run

# A run's settings that are options; the others have an option of their own, or none.
SETTINGS = [one for one in fields(Run) if one.name not in "dataset method split seed loss base".split()]


def main(argv: list[str] | None = None) -> int:
    """Run a command: 0 if it did what was asked, 1 if some runs failed, 2 and a line on why if it cannot be done."""
    try:
        asked = build_parser().parse_args(argv)
        return asked.run(asked) or 0
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; kept apart so that the README's commands can be checked against it."""
    parser = argparse.ArgumentParser(prog="python -m deepknn_lib", description="Deep kNN, reproduced.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str):
        made = commands.add_parser(name, help=text)
        made.set_defaults(run=run)
        return made

    runner.add_arguments(command("notebooks", runner.run, "run the notebooks in order, as run_all.sh does"))
    command("datasets", _datasets, "list the data sets, their licences, and whether each is there")
    fetch = command("download", _download, "get a data set, or be told how")
    check = command("verify", lambda asked: verify.report(asked.dataset, asked.out), "check a data set")
    check.add_argument("--out", type=Path, metavar="FILE", help="the findings as CSV")
    for one in (fetch, check):
        one.add_argument("dataset", metavar="NAME", help="skin7, medmnist:pathmnist@64, folder:PATH, …")
    run = command("run", _run, "train and judge one method once")
    run.add_argument("--method", required=True, metavar="NAME", help=f"one of {', '.join(METHODS)}")
    run.add_argument("--split", default="paper", help="paper, grouped, or another of the set's")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--out", type=Path, metavar="DIR", help="also copy the run's files there")
    grid = command("grid", _grid, "train and judge all methods, seeds and splits; resumes where it stopped")
    grid.add_argument("--methods", type=_list, default=runs.TABLE2, metavar="A,B", help="default: Table 2's")
    grid.add_argument("--splits", type=_list, default=SPLITS, metavar="A,B", help="default: paper,grouped")
    grid.add_argument("--seeds", type=_numbers, metavar="0,1,2", help="default: the profile's")
    grid.add_argument("--sweeps", action="store_true", help="then whole-set search, and K and M of Table S3")
    grid.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: all cores; 1 on a GPU)")
    grid.add_argument("--cluster", default="", metavar="tcp://HOST:PORT", help="do them on a Dask cluster")
    tables = {"out": "results rows", "history": "every epoch", "predictions": "the class of each test image"}
    for name, what in tables.items():
        grid.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write to this CSV: {what}")
    for one, several in ((run, ""), (grid, "; several with commas")):
        one.add_argument("--dataset", default="lesions", help=f"lesions, skin7, folder:PATH, …{several}")
        told = f"settings: {', '.join(PROFILES)} (%(default)s)"
        one.add_argument("--profile", default="demo", metavar="NAME", help=told)
        one.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
        group = one.add_argument_group("settings of the run, in place of the profile's")
        for setting in SETTINGS:
            kind = int if setting.default is None else type(setting.default)
            how = {"type": kind, "metavar": kind.__name__}
            how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
            group.add_argument(f"--{setting.name.replace('_', '-')}", **how)
    told = "classify images with a run; show their neighbours"
    judge = command("predict", lambda of: predict.report(of.folder, of.images, of.out, of.figure), told)
    add = judge.add_argument
    add("--run", required=True, type=Path, metavar="DIR", dest="folder", help="as run --out wrote it")
    add("--images", required=True, type=Path, metavar="PATH", help="an image, or a folder of images")
    add("--out", type=Path, metavar="FILE", help="the table as CSV (default: it is printed)")
    add("--figure", type=Path, metavar="FILE", help="the images with their neighbours (.png, .pdf)")
    return parser


def _list(text: str) -> list[str]:
    if not (parts := [part.strip() for part in text.split(",") if part.strip()]):
        raise argparse.ArgumentTypeError("it is empty; give names with commas between")
    return list(dict.fromkeys(parts))


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() for part in _list(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers with commas between, like 0,1,2")
    return list(dict.fromkeys(map(int, _list(text))))


def _datasets(_: argparse.Namespace) -> None:
    for name, state in available().items():
        entry = CATALOG[name]
        count, classes = sum(entry.counts.values()), len(entry.counts)
        held = f" {count:,} images in {classes} classes." if count else ""
        print(f"{name}: {entry.title}.{held} Licence: {entry.licence}. Cite: {entry.citation}\n    {state}")
        if entry.page:
            print(f"    page: {entry.page}")


def _download(asked: argparse.Namespace) -> None:
    where = download(asked.dataset)
    print(f"{asked.dataset} is in {where}. Check it: python -m deepknn_lib verify {asked.dataset}")


def _given(asked: argparse.Namespace, *outputs: Path | None) -> dict:
    """The settings given; or an error, before anything starts: outputs that cannot be written, a wrong launcher."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        told = "torchrun or its like (WORLD_SIZE) would do the same runs in every process"
        raise ValueError(f"{told}; use grid --jobs N, or grid --cluster on several GPUs or machines")
    for path in filter(None, outputs):
        check_writable(path)
    given = {setting.name: getattr(asked, setting.name) for setting in SETTINGS}
    return {name: value for name, value in given.items() if value is not None}


def _run(asked: argparse.Namespace) -> None:
    given = _given(asked, asked.out and asked.out / "run.json")
    run = make_run(asked.dataset, asked.method, asked.profile, split=asked.split, seed=asked.seed, **given)
    result = execute(run, asked.device)
    scores = result.reported_scores()
    if asked.out:  # The files in the cache may name another K_p or method that shares the training.
        write_run(asked.out, result, load_file(Entry.of(run).folder / "model.safetensors"))
    if sys.stdout.isatty():
        table = pd.DataFrame(scores).rename(columns=results.SCORES | {"k_predict": "K_p"})
        print(results.markdown(table.iloc[:, :14]))  # the recalls of ten classes
    else:
        print(json.dumps({"run": Entry.of(run).name, "scores": scores}))


def _grid(asked: argparse.Namespace) -> int:
    given = _given(asked, asked.out, asked.history, asked.predictions)
    own, profile, failed = asked.dataset.startswith("folder:"), asked.profile, {}
    names = [asked.dataset] if own else _list(asked.dataset)  # a path may have commas
    names = [make_run(name, "knn", profile).dataset for name in names]  # or a ValueError
    splits = {name: distinct_splits(name, asked.splits) for name in names}
    compared, searched, counted = [], [], []
    # In an order that makes every finished run count: a whole comparison on every set, then the next seed.
    for seed in asked.seeds or PROFILES[profile]["seeds"]:
        for name in names:
            compared += runs.grid(name, profile, asked.methods, splits[name], (seed,), **given)
            changed = runs.sweeps(name, profile, (seed,), **given) if asked.sweeps else {}
            searched += changed.get("search", [])
            counted += changed.get("K and M", [])
    every = compared + searched + counted
    found = execute_all(every, asked.device, asked.jobs, asked.cluster, failed)
    done, judged = ([result for result in part if result] for part in (found, found[: len(compared)]))
    if asked.out and done:
        write_csv(results.results_table(done), asked.out)
    if asked.history and done:
        write_csv(results.history_table(done), asked.history)
    if asked.predictions and judged:
        write_csv(results.predictions_table(judged), asked.predictions)
    for name in names:
        if of_set := results.select(judged, dataset=name):
            if len(names) > 1:
                print(name)
            print(results.markdown(results.readable(results.summary(of_set))))
    for run, error in failed.items():
        print(f"failed: {run.label}: {error}", file=sys.stderr)
    return int(bool(failed))
