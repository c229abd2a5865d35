"""Running the notebooks in order: `./run_all.sh`, or `python -m deepknn_lib notebooks`."""

import argparse
import html
import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

if __name__ != "__main__":  # `./run_all.sh --help` starts this file as a program, without any package.
    import nbformat
    from PIL import Image

    from deepknn_lib.datasets import available
    from deepknn_lib.datasets.load import entry_of, place
    from deepknn_lib.storage import digest, figures_dir, repository, whole_file
    from deepknn_lib.study.experiments import pick_device, versions

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
PROFILES = ("smoke", "demo", "finetune", "paper")
READ = ("deepknn_lib/**/*.py", "deepknn_lib/**/*.json", "data/paper/*.csv", "data/results/*.csv")
SYNTHETIC = "**Synthetic data.** A program drew these images: the numbers show that the code works, no more."


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
        parameters = {"profile": args.profile, "dataset": _dataset(args)}
        parameters |= {"seeds": args.seeds, "device": args.device}
        marks = {path: _mark(path, parameters) for path in choose(args.only)}
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}\nSee ./run_all.sh --help", file=sys.stderr)
        return 2
    folder = re.sub(r"[^A-Za-z0-9.]+", "-", f"{parameters['dataset']}-{args.profile}")
    out, rows, status = figures_dir() / ("" if folder == "lesions-demo" else folder), [], 0
    before = dict(os.environ)
    try:
        with tempfile.NamedTemporaryFile() as events:
            os.environ |= {"DEEPKNN_FIGURES": str(out), "DEEPKNN_PROGRESS": events.name}
            os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # a kernel of this environment, not of the user's
            threading.Thread(target=_tell, args=[open(events.name)], daemon=True).start()
            for path, mark in marks.items():
                rows.append(_one(path, parameters, mark, out, args.save_outputs))
                if args.failfast and rows[-1][-1] == "failed":
                    break
        _index(out, rows, parameters)
    except KeyboardInterrupt:
        status = 130
        print("\nStopped. The next run goes on from here.")
    finally:
        os.environ.clear()
        os.environ.update(before)
    for row in [("notebook", "minutes", "result"), *rows]:
        print("{:34}{:>8}   {}".format(*row))
    failed = sum(state == "failed" for *_, state in rows)
    print(f"{len(rows) - failed} of {len(marks)} notebooks passed; the pages are in {os.path.relpath(out)}")
    return status or int(failed > 0)


def _dataset(args: argparse.Namespace) -> str:
    """The data set, a folder by its absolute path; ValueError if an option cannot be meant."""
    if args.profile not in PROFILES:
        raise ValueError(f"DEEPKNN_PROFILE is {args.profile!r}; choose one of {', '.join(PROFILES)}")
    if not re.fullmatch(r"(\d{1,9}(,\d{1,9})*)?", args.seeds):
        raise ValueError(f"--seeds: {args.seeds!r}; give whole numbers with commas between, like 0,1,2")
    if args.save_outputs and (args.dataset, args.profile, args.seeds) != ("lesions", "demo", ""):
        raise ValueError("--save-outputs is for lesions, demo and its seeds; leave the other options out")
    # The kernels run in notebooks/, so that a path has to be absolute.
    return f"folder:{place(args.dataset)}" if entry_of(args.dataset)[1] == "folder" else args.dataset


def choose(only: str = "") -> list[Path]:
    """The notebooks with these numbers (`"03,04"`), in order; all if empty. ValueError if a number has none."""
    known = {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    wanted = {number.strip().zfill(2) for number in only.split(",")} if only else set(known)
    if not known or wanted - set(known):
        unknown, there = ", ".join(sorted(wanted - set(known))) or "any", ", ".join(known) or "none"
        raise ValueError(f"--only: no notebook {unknown} in {NOTEBOOKS}; the numbers there: {there}")
    return [path for number, path in known.items() if number in wanted]


def _mark(path: Path, parameters: dict[str, str]) -> str:
    """A digest of all that a notebook's outputs come from: itself, the library, the data, options and versions."""
    try:
        cells = [(cell.cell_type, cell.source) for cell in nbformat.read(path, as_version=4).cells]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"cannot read {path} as a notebook ({error}); restore it from git") from error
    kind, _, folder = parameters["dataset"].partition(":")
    images = sorted(Path(folder).rglob("*")) if kind == "folder" else []
    seen = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in images]
    asked = parameters | {"device": pick_device(parameters["device"]).type}
    given = [os.environ.get(name) for name in ("DEEPKNN_DATA", "DEEPKNN_WEIGHTS", "DEEPKNN_SKIN7_FOLDS")]
    files = sorted(file for pattern in READ for file in repository().glob(pattern))
    return digest(repr([cells, asked, seen, given, available(), versions()]), *files)


def _tell(events: TextIO) -> None:
    """Print the epochs and warnings that the library appends to the file `events`, until the file is gone."""
    while os.path.exists(events.name):
        for event in map(json.loads, events):
            if "text" in event:
                print(f"    {event['text']}", flush=True)
        time.sleep(0.5)


def _one(path: Path, parameters: dict, mark: str, out: Path, save: bool) -> tuple[str, str, str]:
    """Run a notebook if something changed, and write its page: its name, minutes and `passed` or so."""
    import papermill

    page, began, trace = out / "notebooks" / f"{path.stem}.html", time.time(), ""
    note = page.with_suffix(".json")  # what a notebook that passed was made from, and what it made
    known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() and not save else {"mark": ""}
    if known["mark"] == mark and all((out / name).exists() for name in known["files"]):
        print(f"{path.stem}: unchanged since it passed", flush=True)
        return path.stem, "0.0", "unchanged"
    note.unlink(missing_ok=True)
    print(f"{path.stem}: started", flush=True)
    with whole_file(page.with_suffix(".ipynb")) as target:
        nbformat.write(nbformat.read(path, as_version=4), target)
        options = {"kernel_name": "python3", "cwd": path.parent, "progress_bar": False}
        options["extra_arguments"] = ["--IPKernelApp.log_level=CRITICAL"]
        try:
            papermill.execute_notebook(path, target, parameters, **options)
        except Exception as error:  # A cell failed, or a kernel died; the other notebooks go on.
            trace = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", f"\n{type(error).__name__}: {error}")
        executed = nbformat.read(target, as_version=4)
    _page(executed, page)
    state, minutes = "failed" if trace else "passed", f"{(time.time() - began) / 60:.1f}"
    print(f"{path.stem}: {state} after {minutes} minutes{trace}", flush=True)
    if save and not trace:
        store_outputs(path, executed)
    if not trace:
        made = [str(p.relative_to(out)) for p in out.rglob("*.*") if p.stat().st_mtime >= began]
        with whole_file(note) as temporary:
            temporary.write_text(json.dumps({"mark": mark, "files": made}), encoding="utf-8")
    return path.stem, minutes, state


def _page(notebook: "nbformat.NotebookNode", page: Path) -> None:
    """Write a notebook as HTML."""
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter(log_level="ERROR").from_notebook_node(notebook, {"metadata": {"name": page.stem}})
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):  # nbconvert does not read the alt text.
            alt = output.metadata.get("image/png", {}).get("alt", "figure")
            body = body.replace("No description has been provided for this image", html.escape(alt), 1)
    with whole_file(page) as temporary:
        temporary.write_text(body, encoding="utf-8")


def store_outputs(path: Path, executed: "nbformat.NotebookNode") -> None:
    """Put the outputs of the notebook `executed` into the notebook at `path`; nothing else in it changes."""
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    ran = [cell for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    pairs = [pair for pair in zip(notebook.cells, ran, strict=True) if pair[0].cell_type == "code"]
    for count, (cell, new) in enumerate(pairs, start=1):
        cell.execution_count, cell.outputs = count, new.outputs
        for output in (output for output in cell.outputs if "execution_count" in output):
            output.execution_count = count
    with whole_file(path) as temporary:
        nbformat.write(notebook, temporary)


def _index(out: Path, rows: list[tuple[str, str, str]], parameters: dict[str, str]) -> None:
    """Write `index.html`: what was run, each notebook, and every figure and table in `out`."""
    asked = ", ".join(f"{name} {value}" for name, value in parameters.items() if value)
    text = ["# Deep kNN for medical image classification, reproduced", f"{asked}; {versions()}"]
    text += [SYNTHETIC] * (parameters["dataset"] == "lesions") + ["## Notebooks"]
    lines = [f"| [{name}](notebooks/{name}.html) | {minutes} | {state} |" for name, minutes, state in rows]
    text += ["\n".join(["| notebook | minutes | result |", "|---|---|---|", *lines]), "## Figures"]
    for path in sorted(out.glob("*.png")):
        with Image.open(path) as image:
            words = [html.escape(image.info.get(name, "")) for name in ("Title", "Description", "Comment")]
        title, caption, alt = words
        text += [f"![{alt}]({quote(path.name)})", f"**{title}.** {caption} [PDF]({quote(path.stem)}.pdf)"]
    text += ["## Tables", *(path.read_text(encoding="utf-8") for path in sorted(out.glob("tables/*.md")))]
    cell = nbformat.v4.new_markdown_cell("\n\n".join(text))
    _page(nbformat.v4.new_notebook(cells=[cell]), out / "index.html")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("./run_all.sh", description="Run the notebooks and fill figures/.")
    add_arguments(parser)
    parser.parse_args(["--help"])
