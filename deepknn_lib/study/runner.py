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
from functools import partial
from pathlib import Path
from string import Template
from unittest.mock import patch
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
READ = "deepknn_lib/**/*.py deepknn_lib/**/*.json notebooks/exercises/*.py data/paper/*.csv data/results/*.csv".split()
# The index opens with these figures, of which a report on a folder of one's own has the last three.
MAIN = "claims_forest figure2_skin7 yourself_map table2_comparison recalls umap".split()
BOLD = "<style>math [mathvariant^=bold] {font-weight: bold}</style>"  # browsers leave out the attribute
SYNTHETIC = "The lesions are synthetic: drawings, whose numbers show that the code works, no more."
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
        parameters, marks = _asked(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}\nSee ./run_all.sh --help", file=sys.stderr)
        return 2
    folder = re.sub(r"[^A-Za-z0-9.]+", "-", f"{parameters['dataset']}-{args.profile}")
    out, rows, status = figures_dir() / ("" if folder == "lesions-demo" else folder), [], 0
    told = {"DEEPKNN_FIGURES": str(out), "JUPYTER_PREFER_ENV_PATH": "1"}  # a kernel of this environment
    with tempfile.NamedTemporaryFile() as events, patch.dict(os.environ, told, DEEPKNN_PROGRESS=events.name):
        threading.Thread(target=_tell, args=[events.name], daemon=True).start()
        try:
            for path, mark in marks.items():
                rows.append(_one(path, parameters, mark, out, args.save_outputs))
                if args.failfast and rows[-1][-1] == "failed":
                    break
            _index(out, rows, parameters)
        except KeyboardInterrupt:
            status = 130
            print("\nStopped. The next run goes on from here.")
    for row in [("notebook", "minutes", "result"), *rows]:
        print("{:34}{:>8}   {}".format(*row))
    failed = sum(state == "failed" for *_, state in rows)
    print(f"{len(rows) - failed} of {len(marks)} notebooks passed; the pages are in {os.path.relpath(out)}")
    return status or int(failed > 0)


def _asked(args: argparse.Namespace) -> tuple[dict[str, str], dict[Path, str]]:
    """The notebooks' parameters, and each notebook with a digest of all that its outputs come from; or ValueError."""
    if args.profile not in PROFILES:
        raise ValueError(f"DEEPKNN_PROFILE is {args.profile!r}; choose one of {', '.join(PROFILES)}")
    if not re.fullmatch(r"(\d{1,9}(,\d{1,9})*)?", args.seeds):
        raise ValueError(f"--seeds: {args.seeds!r}; give whole numbers with commas between, like 0,1,2")
    if args.save_outputs and (args.dataset, args.profile, args.seeds) != ("lesions", "demo", ""):
        raise ValueError("--save-outputs is for lesions, demo and its seeds; leave the other options out")
    known = {}
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        if known.setdefault(path.name[:2], path) != path:
            told = f"{known[path.name[:2]].name} and {path.name} have one number; rename one of them"
            raise ValueError(f"notebooks/: {told}, or move it away")
    folder = place(entry_of(args.dataset)) if entry_of(args.dataset).kind == "folder" else None
    wanted = {number.strip().zfill(2) for number in args.only.split(",") if number}
    wanted = wanted or {*known} - {*OTHERS * bool(folder)}
    if unknown := ", ".join(wanted - {*known}):
        raise ValueError(f"--only: no notebook {unknown}; the numbers there: {', '.join(known)}")
    # The kernels run in notebooks/, so that a path has to be absolute.
    parameters = {"profile": args.profile, "dataset": f"folder:{folder}" if folder else args.dataset}
    parameters |= {"seeds": args.seeds, "device": args.device}
    images = [(str(file), file.stat().st_mtime_ns) for file in sorted(folder.rglob("*"))] if folder else []
    given = sorted(item for item in os.environ.items() if item[0].startswith("DEEPKNN_"))
    seen = [parameters | {"device": pick_device(args.device).type}, images, given, available(), versions()]
    files, marks = sorted(file for pattern in READ for file in repository().glob(pattern)), {}
    paths = [known[number] for number in sorted(wanted)]
    solutions = [path.parent / "solutions" / path.name for path in paths if args.save_outputs]
    for path in paths + [path for path in solutions if path.exists()]:
        cells = [(cell.cell_type, cell.source) for cell in nbformat.read(path, as_version=4).cells]
        marks[path] = digest(repr([cells, seen]), *files)
    return parameters, marks


def _tell(name: str) -> None:
    """Print the epochs and warnings that the library appends to the file of this name, until the file is gone."""
    with open(name) as events:
        while os.path.exists(name):
            for event in map(json.loads, events):
                print(f"    {event['text']}\n" if "text" in event else "", end="", flush=True)
            time.sleep(0.5)


def _one(path: Path, parameters: dict, mark: str, out: Path, save: bool) -> tuple[str, str, str]:
    """Run a notebook if something changed, and write its page: its name, minutes and `passed` or so."""
    import papermill

    name = path.relative_to(NOTEBOOKS).with_suffix("").as_posix()
    page, began, trace = out / "notebooks" / f"{name}.html", time.time(), ""
    note = page.with_suffix(".json")  # what a notebook that passed was made from, and what it made
    known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() and not save else {"mark": ""}
    if known["mark"] == mark and all((out / file).exists() for file in known["files"]):
        print(f"{name}: unchanged since it passed", flush=True)
        return name, "0.0", "unchanged"
    note.unlink(missing_ok=True)
    print(f"{name}: started", flush=True)
    with whole_file(page.with_suffix(".ipynb")) as target:
        nbformat.write(nbformat.read(path, as_version=4), target)
        options = {"kernel_name": "python3", "cwd": path.parent, "progress_bar": False}
        options["extra_arguments"] = ["--IPKernelApp.log_level=CRITICAL"]
        try:
            papermill.execute_notebook(path, target, parameters, **options)
        except Exception as error:  # A cell failed, or a kernel died; the other notebooks go on.
            trace = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", f"\n{type(error).__name__}: {error}")
        executed = nbformat.read(target, as_version=4)
    _write(page, _page(executed, path, page, parameters["dataset"]))
    state, minutes = "failed" if trace else "passed", f"{(time.time() - began) / 60:.1f}"
    print(f"{name}: {state} after {minutes} minutes{trace}", flush=True)
    if not trace:
        if save:
            _store_outputs(path, executed)
        made = [str(p.relative_to(out)) for p in out.rglob("*.*") if p.stat().st_mtime >= began]
        _write(note, json.dumps({"mark": mark, "files": made}))
    return name, minutes, state


def _page(executed: "nbformat.NotebookNode", path: Path, page: Path, dataset: str) -> str:
    """The page of a notebook that was run, in the words of its data set; it needs no network, also for formulas."""
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer
    from nbconvert.preprocessors import TagRemovePreprocessor

    from deepknn_lib.study.notebook import reworded

    def moved(link: re.Match) -> str:  # from where the notebook is to where its page is
        to = os.path.relpath(path.parent / link[1], page.parent)
        return f'href="{link[1][:-5]}html"' if re.fullmatch(r"\d\d_\w+\.ipynb", link[1]) else f'href="{to}"'

    for cell in (cell for cell in executed.cells if cell.cell_type == "markdown"):
        cell.source = reworded(cell.source, dataset)
    pages = HTMLExporter(template_name="classic", log_level="ERROR")  # This template writes the alt texts.
    folded = TagRemovePreprocessor(remove_input_tags={"hide-input"}, enabled=True)
    pages.register_preprocessor(folded, enabled=True)
    inline, block = staticmethod(_formula), staticmethod(partial(_formula, display="block"))
    with patch.multiple(IPythonRenderer, inline_math=inline, block_math=block):
        text = pages.from_notebook_node(executed, {"metadata": {"name": path.stem}})[0]
    fetched = r"<!-- Load mathjax.*?End of mathjax configuration -->|<script[^>]*(src=|module).*?</script>"
    text = re.sub(fetched, "", text, flags=re.S).replace("</head>", f"{BOLD}</head>", 1)
    return re.sub(r'href="((?:\.\./|solutions/|\d\d_)[^"#]*)"', moved, text)


def _formula(tex: str, display: str = "inline") -> str:
    """A formula as MathML, which browsers draw by themselves; what is none, such as a class `a$b`, stays text."""
    from latex2mathml.converter import convert

    try:
        return convert(re.sub(r"\\tag\{(.*?)\}", r"\\qquad (\1)", tex), display=display)
    except Exception:  # its own and those of the XML that it writes
        return html.escape(f"${tex}$")


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


def _index(out: Path, rows: list[tuple[str, str, str]], parameters: dict[str, str]) -> None:
    """Write `index.html`: what was run, each notebook with its question, the main figures; the rest is folded."""
    from deepknn_lib.study.notebook import SMOKE, reworded

    books, pictures = "", {}
    for name, minutes, state in (row for row in rows if "/" not in row[0]):
        first = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells[0].source
        title, question = re.match(
            r"# ([^\n]*)(?:.*?\*\*Question\.\*\* (.*?)(?=\n\n|\n- |\Z))?", first, re.S
        ).groups("")
        question = reworded(question.replace("*", ""), parameters["dataset"])
        told = html.escape(question), state if state == "failed" else f"{minutes} min"
        books += f'<tr><td><a href="notebooks/{name}.html">{html.escape(title)}</a><td>{told[0]}<td>{told[1]}'
    for path in sorted(out.glob("*.png")):
        with Image.open(path) as image:
            words = [html.escape(image.info.get(name, "")) for name in ("Comment", "Title", "Description")]
        figure = '<figure><a href="{0}.pdf"><img src="{0}.png" alt="{1}"></a><figcaption><b>{2}.</b> {3}</figcaption>'
        pictures[path.stem] = figure.format(quote(path.stem), *words) + "</figure>"
    shown = [path.relative_to(out).as_posix() for path in sorted(out.glob("*/*.md"))]  # tables/ and machine/
    tables = [f'<li><a href="{path}">{path.split("/")[1][:-3]}</a>' for path in shown]
    told = {"asked": html.escape(", ".join([*filter(None, parameters.values()), versions()])), "books": books}
    notes = [SMOKE] * (parameters["profile"] == "smoke") + [SYNTHETIC] * (parameters["dataset"] == "lesions")
    told |= {"notes": " ".join(notes), "tables": "".join(tables)}
    told |= {"main": "".join(pictures.pop(name, "") for name in MAIN)}  # before the rest, which they leave
    told |= {"n": len(pictures), "rest": "".join(pictures.values())}
    template = Template(Path(__file__).with_name("index.html").read_text(encoding="utf-8"))
    _write(out / "index.html", template.substitute(told))


if __name__ == "__main__":
    parser = argparse.ArgumentParser("./run_all.sh", description="Run the notebooks and fill figures/.")
    add_arguments(parser)
    parser.parse_args(["--help"])
