"""Running the notebooks in order: `./run_all.sh`, or `python -m deepknn_lib notebooks`."""

import argparse
import ast
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CLEAR = "\r\033[K"  # back to the start of the terminal's line, and empty it


@dataclass
class Outcome:
    """What became of one notebook; `state` is `passed`, `failed` or `stopped`."""

    name: str
    page: Path
    state: str = "stopped"
    seconds: float = 0.0
    runs: Counter = field(default_factory=Counter)

    def row(self) -> tuple[str, str, str, str]:
        """Name, minutes, runs cached or trained, state."""
        runs = ", ".join(f"{self.runs[how]} {how}" for how in ("trained", "cached") if self.runs[how])
        return self.name, f"{self.seconds / 60:.1f}", "unchanged" * self.runs["unchanged"] or runs or "-", self.state


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a run on `parser`."""
    add = parser.add_argument
    add("--profile", choices=("smoke", "demo", "finetune", "paper"), default="demo",
        help="smoke: a test; demo: two CPU cores (the default); finetune: a pretrained network; paper: as published, GPU")
    add("--dataset", default="lesions", metavar="NAME",
        help="lesions (embedded, synthetic; the default), skin7, or folder:PATH to class folders")
    add("--seeds", type=_seeds, default="", metavar="0,1,2", help="default: the profile's")
    add("--only", default="", metavar="03,04", help="numbers of the notebooks to run; default: all")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    add("--failfast", action="store_true", help="stop at the first notebook that fails")
    add("--save-outputs", action="store_true",
        help="for maintainers: also store the outputs in notebooks/ (lesions, demo and its seeds only)")
    parser.epilog = ("A notebook that passed is run again only when it, the library, the data or an option changed, or "
                     "a file it made is gone. To run all again, remove the folder notebooks/ among the figures.")


def _seeds(text: str) -> str:
    if text and not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers with commas between, like 0,1,2")
    return text


def run(args: argparse.Namespace) -> int:
    """Run the notebooks as `args` says and report.

    Returns
    -------
    int
        Exit status: 0 all passed, 1 one failed, 2 wrong options, 130 stopped by Ctrl-C.
    """
    from deepknn_lib.report import keep, remember, stamp, store_outputs, unchanged, write_index
    from deepknn_lib.storage import figures_dir

    try:
        dataset = _check(args)
        paths = choose(args.only)
        sources = {path: _read(path) for path in paths}
    except ValueError as error:
        print(f"error: {error}\nSee ./run_all.sh --help", file=sys.stderr)
        return 2
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{dataset}-{args.profile}")
    out = figures_dir() if (dataset, args.profile) == ("lesions", "demo") else figures_dir() / name
    guesses = {path: estimate(path, nb, args.profile, dataset) for path, nb in sources.items()}
    total = _about(sum(guesses.values()))
    print(f"{len(paths)} notebooks, profile {args.profile}, data set {dataset}{total}", flush=True)
    parameters = {"profile": args.profile, "dataset": dataset, "seeds": args.seeds, "device": args.device}
    outcomes, began, before, status = [], time.time(), dict(os.environ), 0
    try:
        with tempfile.TemporaryDirectory() as scratch:
            events = Path(scratch) / "events.jsonl"
            events.touch()
            os.environ |= {"DEEPKNN_FIGURES": str(out), "DEEPKNN_PROGRESS": str(events)}
            os.environ |= {"JUPYTER_PREFER_ENV_PATH": "1"}  # a kernel of this environment, not of the user's
            for path, notebook in sources.items():
                outcomes.append(Outcome(path.stem, out / "notebooks" / f"{path.stem}.html"))
                page, mark, started = outcomes[-1].page, stamp(notebook, parameters), time.time()
                if not args.save_outputs and (earlier := unchanged(page, mark, out)):
                    outcomes[-1].state, outcomes[-1].runs["unchanged"], began = "passed", 1, min(began, earlier)
                    print(f"{path.stem}   unchanged since it passed", flush=True)
                    continue
                page.with_suffix(".json").unlink(missing_ok=True)
                with Progress(outcomes[-1], guesses[path], events) as progress:
                    executed, trace = _execute(path, notebook, parameters, Path(scratch) / path.name)
                progress.finish("failed" if trace else "passed", trace)
                keep(executed, page)
                if trace and args.failfast:
                    break
                if not trace:
                    remember(page, mark, out, started)
                    _remember(f"{path.stem} {args.profile} {dataset}", outcomes[-1].seconds)
                    if args.save_outputs:
                        store_outputs(path, executed)
        write_index(out, outcomes, parameters, began)
    except KeyboardInterrupt:
        status = 130
    finally:
        os.environ.clear()
        os.environ.update(before)
    print(_summary(outcomes, len(paths), out, status))
    return status or int(any(outcome.state == "failed" for outcome in outcomes))


def _check(args: argparse.Namespace) -> str:
    from deepknn_lib.datasets import entry_of, place

    try:
        entry_of(args.dataset)
        own = place(args.dataset) if args.dataset.startswith("folder:") else None
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"--dataset: {error}") from error
    if args.device == "cuda":
        from deepknn_lib.execution import pick_device

        pick_device("cuda")
    if args.save_outputs and (args.dataset, args.profile, args.seeds) != ("lesions", "demo", ""):
        raise ValueError("--save-outputs is for lesions, demo and its seeds; leave the other options out")
    # the kernels run in notebooks/, so a path has to be absolute
    return f"folder:{own}" if own else args.dataset


def choose(only: str = "") -> list[Path]:
    """The notebooks with these numbers (`"03,04"`), in their own order; all of them when empty.

    Raises
    ------
    ValueError
        If a number has no notebook.
    """
    known = {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    wanted = {number.strip().zfill(2) for number in only.split(",")} if only else set(known)
    if not known or wanted - set(known):
        unknown = ", ".join(sorted(wanted - set(known))) or "any"
        there = ", ".join(known) or "none"
        raise ValueError(f"--only: no notebook {unknown} in {NOTEBOOKS}; the numbers there: {there}")
    return [path for number, path in known.items() if number in wanted]


def _read(path: Path):
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"cannot read {path} as a notebook ({error}); restore it from git") from error


def declared(notebook) -> set[str]:
    """Names assigned in the cell tagged `parameters`."""
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell.source))]
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _execute(path: Path, notebook, parameters: dict[str, str], target: Path) -> tuple:
    """The notebook as executed (so far), and the traceback or an empty text."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    trace = ""
    try:
        names = declared(notebook)
        papermill.execute_notebook(
            notebook, str(target), {name: value for name, value in parameters.items() if name in names},
            kernel_name="python3", cwd=str(path.parent), progress_bar=False, autosave_cell_every=0,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"])  # their log breaks the live line
    except PapermillExecutionError as error:
        trace = "\n".join(error.traceback) or str(error)
    except Exception as error:  # a kernel that died or did not start: the others go on all the same
        trace = f"{type(error).__name__}: {error}"
    return (_read(target) if target.is_file() else notebook), trace


class Progress:
    """The line of one notebook with its time, under the epoch lines that the library puts in `events`.

    On a terminal the line is rewritten every second; elsewhere there is one at the start and one at the end.
    """

    def __init__(self, outcome: Outcome, guess: float, events: Path):
        self.outcome, self.guess, self.live = outcome, guess, sys.stdout.isatty()
        self.file, self.rest, self.over = open(events, encoding="utf-8"), "", threading.Event()
        self.file.seek(0, os.SEEK_END)

    def __enter__(self):
        self.began = time.perf_counter()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        print(f"{self.outcome.name}{_about(self.guess)}", end="" if self.live else "\n", flush=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        self._forward()
        self.file.close()
        self.outcome.seconds = time.perf_counter() - self.began

    def _watch(self):
        while not self.over.wait(1):
            self._forward()
            if self.live:
                clock = _clock(time.perf_counter() - self.began)
                line = f"{self.outcome.name}   {clock}{_about(self.guess, ' / ')}"
                print(f"{CLEAR}{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def _forward(self):
        *lines, self.rest = (self.rest + self.file.read()).split("\n")
        for event in map(json.loads, lines):
            if event["event"] == "run":
                self.outcome.runs[event["status"]] += 1
            else:
                print(CLEAR * self.live + f"    {event['text']}", flush=True)

    def finish(self, state: str, trace: str) -> None:
        """Print how the notebook ended."""
        self.outcome.state = state
        name, _, runs, _ = self.outcome.row()
        print(CLEAR * self.live + f"{name}   {_clock(self.outcome.seconds)}   {state}   {runs}", flush=True)
        if trace:
            print(trace if self.live else re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", trace), flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}:{seconds:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _about(seconds: float, before: str = ", ") -> str:
    if not seconds:
        return ""
    return f"{before}~{seconds / 60:.0f} min" if seconds >= 90 else f"{before}~{seconds:.0f} s"


def _timings() -> tuple[Path, dict[str, float]]:
    from deepknn_lib.storage import data_dir

    path = data_dir() / "timings.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return path, {key: float(value) for key, value in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # absent or spoilt: only guesses are lost
        return path, {}


def _remember(key: str, seconds: float) -> None:
    from deepknn_lib.storage import whole_file

    path, known = _timings()
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(known | {key: round(seconds, 1)}, indent=1), encoding="utf-8")


def estimate(path: Path, notebook, profile: str, dataset: str) -> float:
    """Seconds a notebook will take: as last time, else as its metadata say, else 0 (unknown)."""
    written = notebook.metadata.get("deepknn", {}).get("minutes", {}).get(profile, 0)
    return _timings()[1].get(f"{path.stem} {profile} {dataset}", 60 * written)


def _summary(outcomes: list[Outcome], asked: int, out: Path, status: int) -> str:
    rows = [("notebook", "minutes", "runs", "result", "output")]
    for outcome in outcomes:
        rows.append((*outcome.row(), "-" if outcome.state == "stopped" else os.path.relpath(outcome.page)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    passed = sum(outcome.state == "passed" for outcome in outcomes)
    hint = "stopped, the next run goes on from here" if status else os.path.relpath(out / "index.html")
    return "\n".join(["", *lines, f"{passed} of {asked} notebooks passed; {hint}"])


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` and run."""
    description = "Run the notebooks in order and fill figures/."
    parser = argparse.ArgumentParser("./run_all.sh", description=description)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
