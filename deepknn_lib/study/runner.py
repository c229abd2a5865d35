"""Running the notebooks in order: `./run_all.sh`, or `python -m deepknn_lib notebooks`."""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TextIO
from unittest.mock import patch

if __name__ != "__main__":  # `./run_all.sh --help` starts this file as a program, without any package.
    import nbformat
    import numpy as np

    from deepknn_lib.datasets import available
    from deepknn_lib.datasets.load import entry_of, index_of
    from deepknn_lib.storage import digest, figures_dir, repository, whole_file
    from deepknn_lib.study.experiments import pick_device, versions

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
PROFILES = ("smoke", "demo", "finetune", "paper")
READ = [f"deepknn_lib/**/*.{kind}" for kind in ("py", "json", "html")]
READ += ["notebooks/exercises/*.py", "data/paper/*.csv", "data/results/*.csv"]
OTHERS = ("02", "03")  # notebooks on points and digits, which a report on one's own images leaves out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a run on `parser`."""
    add, profile = parser.add_argument, os.environ.get("DEEPKNN_PROFILE") or "demo"
    told = "smoke: a test; demo: two CPU cores; finetune: pretrained; paper: its network and size, GPU"
    add("--profile", choices=PROFILES, default=profile, help=f"{told} (default: DEEPKNN_PROFILE, else demo)")
    told = "lesions (embedded, synthetic; the default), skin7, or folder:PATH to class folders"
    add("--dataset", default="lesions", metavar="NAME", help=told)
    add("--seeds", default="", metavar="0,1,2", help="default: the profile's")
    add("--only", default="", metavar="03,04", help="numbers of the notebooks to run; default: all")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    add("--failfast", action="store_true", help="stop at the first notebook that fails")
    told = "for maintainers: also store the outputs in notebooks/ (lesions, demo and its seeds only)"
    add("--save-outputs", action="store_true", help=told)
    parser.epilog = """A notebook that passed is run again only when it, the library, the data or an option changed,
        or a file it made is gone. To run all again, remove the folder notebooks/ among the figures."""


def run(args: argparse.Namespace) -> int:
    """Run the notebooks as `args` says, write pages and `index.html` to the figures folder, and report.

    The exit status is 0 if all passed, 1 if one failed, 2 for wrong options, 130 if Ctrl-C stopped the run.
    """
    try:
        parameters, marks = plan(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}\nSee ./run_all.sh --help", file=sys.stderr)
        return 2
    from deepknn_lib.study import pages

    folder = f"{entry_of(args.dataset).file_name}-{args.profile}"
    out, rows, stopped = figures_dir() / ("" if folder == "lesions-demo" else folder), [], False
    with _kernels_write_to(out):
        try:
            for path, mark in marks.items():
                rows.append(_one(path, mark, parameters, out, args.save_outputs))
                if args.failfast and rows[-1][-1] == "failed":
                    break
            _write(out / "index.html", pages.index(out, rows, parameters, NOTEBOOKS))
        except KeyboardInterrupt:
            stopped = True
            print("\nStopped. The next run goes on from here.")
    for row in [("notebook", "minutes", "result"), *rows]:
        print("{:34}{:>8}   {}".format(*row))
    failed = sum(state == "failed" for *_, state in rows)
    print(f"{len(rows) - failed} of {len(marks)} notebooks passed; the pages are in {os.path.relpath(out)}")
    return 130 if stopped else int(failed > 0)


def plan(args: argparse.Namespace) -> tuple[dict[str, str], dict[Path, str]]:
    """The notebooks' parameters, and each notebook with a digest of all that its outputs come from; or ValueError."""
    if args.profile not in PROFILES:
        raise ValueError(f"DEEPKNN_PROFILE is {args.profile!r}; choose one of {', '.join(PROFILES)}")
    if not re.fullmatch(r"(\d{1,9}(,\d{1,9})*)?", args.seeds):
        raise ValueError(f"--seeds: {args.seeds!r}; give whole numbers with commas between, like 0,1,2")
    if args.save_outputs and (args.dataset, args.profile, args.seeds) != ("lesions", "demo", ""):
        raise ValueError("--save-outputs is for lesions, demo and its seeds; leave the other options out")
    entry = entry_of(args.dataset)
    own = entry.kind == "folder"
    paths = _chosen(args.only, OTHERS if own else ())
    dataset = f"folder:{entry.root}" if own else args.dataset  # absolute, as kernels run in notebooks/
    parameters = {"profile": args.profile, "dataset": dataset, "seeds": args.seeds, "device": args.device}
    if args.save_outputs:
        solutions = [path.parent / "solutions" / path.name for path in paths]
        paths += [path for path in solutions if path.exists()]
    return parameters, _marks(paths, parameters, index_of(entry), entry.root)


def _chosen(only: str, left_out: tuple[str, ...]) -> list[Path]:
    """The notebooks with these numbers, or all but those left out; ValueError for a number that none or two have."""
    known = {}
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        other = known.setdefault(path.name[:2], path)
        if other != path:
            told = f"{other.name} and {path.name} have one number; rename one of them, or move it away"
            raise ValueError(f"notebooks/: {told}")
    wanted = {number.strip().zfill(2) for number in only.split(",") if number} or {*known} - {*left_out}
    if unknown := ", ".join(wanted - {*known}):
        raise ValueError(f"--only: no notebook {unknown}; the numbers there: {', '.join(known)}")
    return [path for number, path in known.items() if number in wanted]


def _marks(paths: list[Path], parameters: dict[str, str], index, root: Path) -> dict[Path, str]:
    """A digest for each notebook, of its cells and of all that it reads: the images of an `Index`, tables, weights."""
    named = [os.environ.get(name, "") for name in ("DEEPKNN_WEIGHTS", "DEEPKNN_SKIN7_FOLDS")]
    named = [Path(path).expanduser() for path in named if path]
    tables = {*root.glob("*.csv"), *named, *(path for folder in named for path in folder.glob("*"))}
    there = [(path, path.stat()) for path in [*index.files, *sorted(tables)] if path.is_file()]
    images = [(str(path), of.st_size, of.st_mtime_ns, of.st_ctime_ns) for path, of in there]
    arrays = [np.ravel(of).tolist() for of in (index.labels, index.groups, index.parts)]
    images += [index.class_names, index.unit, index.key, *arrays]
    given = sorted(item for item in os.environ.items() if item[0].startswith("DEEPKNN_"))
    device = pick_device(parameters["device"]).type
    seen = [parameters | {"device": device}, images, given, available(), versions()]
    files = sorted(file for pattern in READ for file in repository().glob(pattern))
    cells = {path: nbformat.read(path, as_version=4).cells for path in paths}
    sources = {path: [(cell.cell_type, cell.source) for cell in of] for path, of in cells.items()}
    return {path: digest(repr([source, seen]), *files) for path, source in sources.items()}


@contextlib.contextmanager
def _kernels_write_to(out: Path):
    """Kernels that start meanwhile write their figures to `out`, and the epochs that they tell are printed."""
    told = {"DEEPKNN_FIGURES": str(out), "JUPYTER_PREFER_ENV_PATH": "1"}  # a kernel of this environment
    for name in ("DEEPKNN_DATA", "DEEPKNN_WEIGHTS", "DEEPKNN_SKIN7_FOLDS"):  # Kernels run in another folder.
        if path := os.environ.get(name):
            told[name] = str(Path(path).expanduser().resolve())
    with tempfile.NamedTemporaryFile() as events, patch.dict(os.environ, told, DEEPKNN_PROGRESS=events.name):
        threading.Thread(target=_tell, args=[open(events.name, encoding="utf-8")], daemon=True).start()
        yield


def _tell(events: TextIO) -> None:
    """Print the epochs and warnings that the library appends to this file, until its name is gone."""
    with events:
        while os.path.exists(events.name):
            for line in events:
                print(f"    {line}", end="", flush=True)
            time.sleep(0.5)


def _one(path: Path, mark: str, parameters: dict, out: Path, save: bool) -> tuple[str, str, str]:
    """Run a notebook and write its page, unless nothing changed since it passed: name, minutes, `passed` or so."""
    from deepknn_lib.study import pages

    name, began = path.relative_to(NOTEBOOKS).with_suffix("").as_posix(), time.time()
    page = out / "notebooks" / f"{name}.html"
    note = page.with_suffix(".json")  # what a notebook that passed was made from, and what it made
    known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() and not save else {"mark": ""}
    if known["mark"] == mark and all((out / file).exists() for file in known["files"]):
        print(f"{name}: unchanged since it passed", flush=True)
        return name, "0.0", "unchanged"
    note.unlink(missing_ok=True)
    print(f"{name}: started", flush=True)
    executed, error = _execute(path, page.with_suffix(".ipynb"), parameters)
    _write(page, pages.page(executed, path, page, parameters["dataset"]))
    state, minutes = "failed" if error else "passed", f"{(time.time() - began) / 60:.1f}"
    print(f"{name}: {state} after {minutes} minutes{error}", flush=True)
    if not error:
        if save:
            _store_outputs(path, executed)
        made = [str(p.relative_to(out)) for p in out.rglob("*.*") if p.stat().st_mtime >= began]
        _write(note, json.dumps({"mark": mark, "files": made}))
    return name, minutes, state


def _execute(path: Path, copy: Path, parameters: dict[str, str]) -> tuple["nbformat.NotebookNode", str]:
    """Run a notebook, and keep it with its outputs in `copy`: what became of it, and its error or an empty text."""
    import papermill

    error, options = "", {"kernel_name": "python3", "cwd": path.parent, "progress_bar": False}
    options["extra_arguments"] = ["--IPKernelApp.log_level=CRITICAL"]
    with whole_file(copy) as target:
        nbformat.write(nbformat.read(path, as_version=4), target)
        try:
            papermill.execute_notebook(path, target, parameters, **options)
        except Exception as failure:  # A cell failed, or a kernel died; the other notebooks go on.
            error = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", f"\n{type(failure).__name__}: {failure}")
        return nbformat.read(target, as_version=4), error


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _store_outputs(path: Path, executed: "nbformat.NotebookNode") -> None:
    """Put the outputs of `executed` into the notebook at `path`; nothing else in it changes."""
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    new = (cell for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", []))
    pairs = [pair for pair in zip(notebook.cells, new, strict=True) if pair[0].cell_type == "code"]
    for count, (cell, source) in enumerate(pairs, start=1):
        cell.execution_count, cell.outputs = count, source.outputs
        for output in (output for output in cell.outputs if "execution_count" in output):
            output.execution_count = count
    _write(path, nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("./run_all.sh", description="Run the notebooks and fill figures/.")
    add_arguments(parser)
    parser.parse_args(["--help"])
