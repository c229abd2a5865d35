"""The command line: `python -m deepknn_lib notebooks | datasets | download | verify | run | grid | predict`."""

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

_CHOSEN = ("dataset", "method", "split", "seed", "loss", "base")  # have an option of their own, or none


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; kept apart so that the README's commands can be checked against it."""
    from deepknn_lib.datasets.load import SPLITS
    from deepknn_lib.study import runner
    from deepknn_lib.study.runs import METHODS, PROFILES, TABLE2, Run

    parser = argparse.ArgumentParser(prog="python -m deepknn_lib", description="Deep kNN, reproduced.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str):
        made = commands.add_parser(name, help=text)
        made.set_defaults(run=run)
        return made

    runner.add_arguments(command("notebooks", runner.run, "run the notebooks in order, as run_all.sh does"))
    command("datasets", _datasets, "list the data sets, their licences, and whether each is there")
    download = command("download", _download, "get a data set, or be told how")
    verify = command("verify", _verify, "check a data set before anything is trained on it")
    verify.add_argument("--out", type=Path, metavar="FILE", help="the findings as CSV")
    for one in (download, verify):
        one.add_argument("dataset", metavar="NAME", help="skin7, medmnist:pathmnist@64, folder:PATH, …")
    run = command("run", _run, "train and judge one method once")
    run.add_argument("--method", required=True, metavar="NAME", help=f"one of {', '.join(METHODS)}")
    run.add_argument("--split", default="paper", help="paper, grouped, or another of the set's")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--out", type=Path, metavar="DIR", help="also copy the run's files there")
    grid = command("grid", _grid, "train and judge all methods, seeds and splits; resumes where it stopped")
    grid.add_argument("--methods", type=_list, default=TABLE2, metavar="A,B", help="default: Table 2's")
    grid.add_argument("--splits", type=_list, default=SPLITS, metavar="A,B", help="default: paper,grouped")
    grid.add_argument("--seeds", type=_numbers, metavar="0,1,2", help="default: the profile's")
    grid.add_argument("--sweeps", action="store_true", help="then whole-set search, and K and M of Table S3")
    grid.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: all cores; 1 on a GPU)")
    grid.add_argument("--cluster", default="", metavar="tcp://HOST:PORT", help="do them on a Dask cluster")
    tables = {"out": "results rows", "history": "every epoch", "predictions": "the class of each test image"}
    for name, what in tables.items():
        grid.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write to this CSV: {what}")
    predict = command("predict", _predict, "classify new images with a finished run; show their neighbours")
    add = predict.add_argument
    add("--run", required=True, type=Path, metavar="DIR", dest="folder", help="as run --out wrote it")
    add("--images", required=True, type=Path, metavar="PATH", help="an image, or a folder of images")
    add("--out", type=Path, metavar="FILE", help="the table as CSV (default: it is printed)")
    add("--figure", type=Path, metavar="FILE", help="the images with their neighbours (.png, .pdf)")
    for one, several in ((run, ""), (grid, "; several with commas")):
        one.add_argument("--dataset", default="lesions", help=f"lesions, skin7, folder:PATH, …{several}")
        told = f"settings: {', '.join(PROFILES)} (%(default)s)"
        one.add_argument("--profile", default="demo", metavar="NAME", help=told)
        one.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
        settings = one.add_argument_group("settings of the run, in place of the profile's")
        for field in (field for field in fields(Run) if field.name not in _CHOSEN):
            kind = int if field.default is None else type(field.default)
            how = {"type": kind, "metavar": kind.__name__}
            how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
            settings.add_argument(f"--{field.name.replace('_', '-')}", **how)
    return parser


def _list(text: str) -> list[str]:
    if not (parts := [part.strip() for part in text.split(",") if part.strip()]):
        raise argparse.ArgumentTypeError("it is empty; give names with commas between")
    return list(dict.fromkeys(parts))


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() for part in _list(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers with commas between, like 0,1,2")
    return [int(part) for part in _list(text)]


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 when it did what was asked, else one line says why.

    The status is 1 when some runs failed, 2 when the command could not be meant or done, 130 after Ctrl-C.
    """
    try:
        arguments = build_parser().parse_args(argv)
        return arguments.run(arguments) or 0
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        told = str(stopped) or "nothing is lost"
        print(f"\nstopped, {told}; the same command goes on from here", file=sys.stderr)
        return 130


def _datasets(_: argparse.Namespace) -> None:
    from deepknn_lib.datasets import CATALOG, available

    for name, state in available().items():
        entry = CATALOG[name]
        count, classes = sum(entry.counts.values()), len(entry.counts)
        held = f" {count:,} images in {classes} classes." if count else ""
        print(f"{name}: {entry.title}.{held} Licence: {entry.licence}. Cite: {entry.citation}\n    {state}")
        if entry.page:
            print(f"    page: {entry.page}")


def _download(arguments: argparse.Namespace) -> None:
    from deepknn_lib.datasets import download

    where = download(arguments.dataset)
    print(f"{arguments.dataset} is in {where}. Check it: python -m deepknn_lib verify {arguments.dataset}")


def _verify(arguments: argparse.Namespace) -> int:
    from deepknn_lib.datasets import verify

    return verify.report(arguments.dataset, arguments.out)


def _given(arguments: argparse.Namespace, *outputs: Path | None) -> dict:
    """The settings given; or an error, before anything starts: outputs that cannot be written, a wrong launcher."""
    from deepknn_lib.storage import check_writable
    from deepknn_lib.study.runs import Run

    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        told = "torchrun or its like (WORLD_SIZE) would do the same runs in every process"
        raise ValueError(f"{told}; use grid --jobs N, or grid --cluster on several GPUs or machines")
    for path in filter(None, outputs):
        check_writable(path)
    given = {field.name: getattr(arguments, field.name) for field in fields(Run) if field.name not in _CHOSEN}
    return {name: value for name, value in given.items() if value is not None}


def _run(arguments: argparse.Namespace) -> None:
    import pandas as pd
    from safetensors.torch import load_file

    from deepknn_lib.study import results
    from deepknn_lib.study.cache import write_run
    from deepknn_lib.study.experiments import execute, folder_of
    from deepknn_lib.study.runs import make_run

    chosen = {"split": arguments.split, "seed": arguments.seed}
    chosen |= _given(arguments, arguments.out and arguments.out / "run.json")
    run = make_run(arguments.dataset, arguments.method, arguments.profile, **chosen)
    result = execute(run, arguments.device)
    if arguments.out:
        state = load_file(folder_of(run) / "model.safetensors")
        write_run(arguments.out, result, state)  # with this method and K_p, which another run may share
    scores = result.reported_scores()
    if sys.stdout.isatty():
        table = pd.DataFrame(scores).rename(columns=results.SCORES | {"k_predict": "K_p"})
        print(results.markdown(table.iloc[:, :14]))  # the recalls of ten classes
    else:
        print(json.dumps({"run": run.key, "scores": scores}))


def _grid(arguments: argparse.Namespace) -> int:
    from deepknn_lib.datasets.load import distinct_splits
    from deepknn_lib.storage import write_csv
    from deepknn_lib.study import results, runs
    from deepknn_lib.study.experiments import execute_all

    own, profile = arguments.dataset.startswith("folder:"), arguments.profile  # a path may have commas
    names, outputs = (
        [arguments.dataset] if own else _list(arguments.dataset),
        ("out", "history", "predictions"),
    )
    changes, failed = _given(arguments, *(getattr(arguments, name) for name in outputs)), {}
    runs.make_run(names[0], "knn", profile)  # A ValueError names the profiles.
    # In an order that makes every finished run count: a whole comparison on every set, then the next seed.
    order = [(s, name) for s in arguments.seeds or runs.PROFILES[profile]["seeds"] for name in names]
    methods, splits = arguments.methods, {n: distinct_splits(n, arguments.splits) for n in names}
    compared = [run for s, n in order for run in runs.grid(n, profile, methods, splits[n], (s,), **changes)]
    swept = [runs.sweeps(name, profile, (s,), **changes) for s, name in order if arguments.sweeps]
    asked = compared + [run for kind in ("search", "K and M") for one in swept for run in one[kind]]
    done = execute_all(asked, arguments.device, arguments.jobs, arguments.cluster, failed)
    compared, done = ([result for result in part if result] for part in (done[: len(compared)], done))
    tables = (
        (results.results_table, done),
        (results.history_table, done),
        (results.predictions_table, compared),
    )
    for name, (table, of) in zip(outputs, tables, strict=True):
        if of and (path := getattr(arguments, name)):
            write_csv(table(of), path)
    for name in names:
        if mine := results.select(compared, dataset=name):
            print(results.markdown(results.readable(results.summary(mine))))
    for run, error in failed.items():
        print(f"failed: {run.label}: {error}", file=sys.stderr)
    return int(bool(failed))


def _predict(asked: argparse.Namespace) -> int:
    from deepknn_lib.study import predict

    return predict.report(asked.folder, asked.images, asked.out, asked.figure)
