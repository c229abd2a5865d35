"""How fast the library is, next to what others use for the same work: `python -m deepknn_lib bench`.

What is compared is in `bench_training` and `bench_data`; here is how. Contenders take turns in one process on one machine,
warm, many times. Each has a row, a rival's with the ratio: its seconds over ours, median over turns: above 1 ours is faster.
"""

import argparse
import contextlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from deepknn_lib import execution
from deepknn_lib.storage import data_dir, repository, whole_file

PARTS = {"step": "bench_training", "loss": "bench_training", "images": "bench_data", "search": "bench_data",
         "start": "bench_data", "epoch": "bench_training"}  # where each is  # fmt: skip
OURS, PML, FAISS, SKLEARN = "deepknn_lib", "pytorch-metric-learning", "FAISS IndexFlatL2", "scikit-learn brute"
_MODULES = {PML: "pytorch_metric_learning", FAISS: "faiss"}  # the extras; without them their rows say so
COLUMNS = ("part", "what", "setting", "median", "low", "high", "unit", "repetitions", "ratio", "target", "met", "peak_mb",
           "note", "machine", "versions", "commit")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command on `parser`."""
    parser.add_argument("--only", metavar="PART,PART", help=f"of {', '.join(PARTS)} (default: all; epoch needs a GPU)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, metavar="DIR", help="for tables and figures (default: benchmarks/results; "
                        "--quick: bench/ in the data folder)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")


def run(arguments: argparse.Namespace) -> int:
    """Measure what `arguments` ask for, and print it; 0 also where a target is missed, as the table says which."""
    from deepknn_lib import tables

    folder = data_dir() / "bench" if arguments.quick else repository() / "benchmarks" / "results"
    parts = arguments.only.split(",") if arguments.only else []
    table = bench(parts, arguments.out or folder, arguments.device, arguments.quick)
    shown = table[["part", "what", "setting", "median", "unit", "ratio", "target", "met", "peak_mb", "note"]]
    shown = shown.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
    print(tables.markdown(shown.replace("nan", "").fillna("").astype(str)))
    return 0


def bench(parts: list[str], out: Path, device: str, quick: bool) -> "pd.DataFrame":  # noqa: F821
    """Measure, and leave a table and a figure a part in `out` as soon as that part is done.

    Parameters
    ----------
    parts : list of str
        Of `PARTS`; none: all that the device can do.
    out : Path
    device : {"auto", "cpu", "cuda"}
    quick : bool
        Tiny sizes and few repetitions: to see that everything runs.

    Returns
    -------
    DataFrame
        `COLUMNS`. `median`, `low` and `high` are of all repetitions, in `unit`; `met` is empty where nothing is asked.

    Raises
    ------
    ValueError
        If a part is unknown or needs a GPU; if two contenders do not compute the same.
    """
    import pandas as pd

    where = execution.pick_device(device)
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"unknown part {', '.join(map(repr, unknown))}; choose of {', '.join(PARTS)}")
    if where.type == "cpu" and "epoch" in parts:
        raise ValueError("the part 'epoch' needs a GPU; leave it out")
    done = []
    about = {"machine": machine(where), "versions": _versions(), "commit": execution.commit()}
    for part in parts or [part for part in PARTS if where.type == "cuda" or part != "epoch"]:
        print(f"bench: {part}", file=sys.stderr, flush=True)
        measured = getattr(importlib.import_module(f"deepknn_lib.{PARTS[part]}"), part)(where, quick)
        table = pd.DataFrame([{"part": part} | row | about for rows in measured for row in rows]).reindex(columns=COLUMNS)
        with whole_file(out / f"{part}.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")
        draw(table, out)
        done.append(table.astype(object))  # columns that are empty in one part keep the others' kinds
    return pd.concat(done, ignore_index=True).infer_objects()


def machine(device: torch.device) -> str:
    """What it ran on, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    text = f"{name[1] if name else platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
    text += f"{torch.get_num_threads()} torch threads"
    return f"{text}, {torch.cuda.get_device_name()}" if device.type == "cuda" else text


def _versions() -> str:
    text = execution.versions()
    for name in ("torchvision", "scikit-learn", "pytorch-metric-learning", "faiss-cpu"):
        try:
            text += f", {name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            text += f", no {name}"
    return text


def alternate(
    contenders: dict[str, Callable], device: torch.device, least: int, most: int, *, seconds: float = 20, warm: bool = True
) -> dict[str, np.ndarray]:
    """Seconds of every call of every contender, in turns, whose order is turned round each time.

    `least` turns, and more up to `most` while `seconds` last. A contender that times itself returns its seconds, as a float.
    """
    names, times = list(contenders), {name: [] for name in contenders}
    for name in names if warm else ():
        contenders[name]()
    begun, turn = time.perf_counter(), 0
    while turn < least or turn < most and time.perf_counter() - begun < seconds:
        for name in names[:: -1 if turn % 2 else 1]:
            _wait(device)
            started = time.perf_counter()
            own = contenders[name]()
            _wait(device)
            times[name].append(own if isinstance(own, float) else time.perf_counter() - started)
        turn += 1
    return {name: np.array(spent) for name, spent in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rows_of(setting: str, times: dict[str, np.ndarray], least: float | None = None, images: int = 0, **more) -> list[dict]:
    """A row a contender; the first is ours. `least`: the target of the first rival's ratio. With `images`, rates."""
    rows, ours = [], next(iter(times.values()))
    for number, (what, spent) in enumerate(times.items()):
        values = images / spent if images else spent
        row = {"what": what, "setting": setting, "median": np.median(values), "low": values.min(), "high": values.max()}
        row |= {"unit": "images/s" if images else "s", "repetitions": len(values)} | more
        if number:
            row["ratio"] = np.median(spent / ours)
        if number == 1 and least:
            row |= judged(row["ratio"], f"ratio >= {least:.3g}", row["ratio"] >= least)
        rows.append(row)
    return rows


def judged(value: float, target: str, met: bool) -> dict:
    """The columns `target` and `met` for a value, which may not have been measured."""
    return {"target": target, "met": bool(met)} if np.isfinite(value) else {"target": target}


def slope(sizes: Iterable[float], values: Iterable[float]) -> float:
    """The power of size that values grow with, by a line through the logarithms; NaN without two values above 0."""
    kept = [pair for pair in zip(sizes, values, strict=True) if pair[1] > 0]
    return float(np.polyfit(*np.log(kept).T, 1)[0]) if len(kept) > 1 else float("nan")


def high_water() -> float:
    """Peak resident MB; on Linux since the last call where the system lets us forget, else since the program started."""
    status = Path("/proc/self/status")  # ru_maxrss would begin at the memory of the process that started this one
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if found:
        return int(found[1]) * 1024 / 1e6
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e6
    return float("nan")


def installed(what: str) -> bool:
    """Whether a rival can be measured."""
    return what not in _MODULES or importlib.util.find_spec(_MODULES[what]) is not None


def absent(what: str, setting: str) -> dict:
    """The row of a rival that is not installed."""
    return {"what": what, "setting": setting, "note": 'skipped, not installed: pip install -e ".[bench]"'}


def peak_mb(part: str, what: str, device: str, *shape: int | str) -> float:
    """MB that one call takes at its peak above its inputs: resident on a CPU, allocated on a GPU."""
    from deepknn_lib import bench_data, bench_training

    make, where = {"loss": bench_training.losses, "search": bench_data.searches}[part], torch.device(device)
    make(*(min(int(n), 96) for n in shape), where, False)[what]()  # loads the kernels and starts the threads
    call = make(*map(int, shape), where, False)[what]
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    high_water()  # forgets
    before = high_water()
    call()
    return high_water() - before


def fresh_peak(part: str, what: str, device: torch.device, shape: tuple[int, ...], quick: bool) -> float:
    """`peak_mb` in a process of its own, as memory that another call has had would be used again unseen."""
    if quick:
        return peak_mb(part, what, device.type, *shape)
    code = "import sys; from deepknn_lib.bench import peak_mb; print(peak_mb(*sys.argv[1:]))"
    command = [sys.executable, "-c", code, part, what, device.type, *map(str, shape)]
    done = subprocess.run(command, cwd=repository(), check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def draw(table: "pd.DataFrame", folder: Path) -> None:  # noqa: F821
    """A figure a part, `<part>.png` and `.pdf`: the losses over the batch size, the others as bars; ours is blue."""
    import matplotlib.pyplot as plt

    from deepknn_lib import plots

    plots.use_style()
    for part, rows in table.groupby("part", sort=False):
        rows = rows.dropna(subset="median")
        if rows.empty:
            continue
        figure = (_curves if part == "loss" else _bars)(rows)
        figure.suptitle(f"{part}, on {rows['machine'].iloc[0]}", fontsize=9)
        for suffix, undated in ((".png", "Software"), (".pdf", "CreationDate")):
            with whole_file(folder / f"{part}{suffix}") as temporary:
                figure.savefig(temporary, metadata={"Title": f"deepknn_lib bench: {part}", undated: None})
        plt.close(figure)


def _bars(rows: "pd.DataFrame"):  # noqa: F821
    """A panel a setting: medians, with lines from the lowest to the highest, and what each rival's ratio is."""
    import matplotlib.pyplot as plt

    from deepknn_lib.plots import COLORS

    panels = list(rows.groupby(["setting", "unit"], sort=False))
    bars = [len(panel) for _, panel in panels]
    figure, axes = plt.subplots(len(panels), 1, figsize=(8.5, sum(bars) * 0.42 + len(bars) * 0.95 + 0.4), squeeze=False,
                                height_ratios=[n + 0.6 for n in bars])  # fmt: skip
    for axis, ((setting, unit), panel) in zip(axes.flat, panels, strict=True):
        ours = [not number or what.startswith(OURS) for number, what in enumerate(panel["what"])]
        colors = [COLORS["deep-knn" if own else "triplet"] for own in ours]
        spread = (panel["median"] - panel["low"]).to_numpy(), (panel["high"] - panel["median"]).to_numpy()
        axis.barh(range(len(panel)), panel["median"], color=colors, xerr=spread, height=0.7, ecolor="0.25", capsize=3)
        for y, row in enumerate(panel.itertuples()):
            ratio = f" (ratio {row.ratio:.3g})" if np.isfinite(row.ratio) else ""
            value = f"{row.median:,.0f}" if row.median >= 100 else f"{row.median:.3g}"
            axis.text(row.high, y, f"  {value}{ratio}", va="center", fontsize=9)
        axis.set_xlim(0, panel["high"].max() * 1.35)
        axis.set_yticks(range(len(panel)), panel["what"])
        axis.invert_yaxis()
        axis.set(title=setting, xlabel=unit)
    return figure


def _curves(rows: "pd.DataFrame"):  # noqa: F821
    """Seconds, and peak memory, over the batch size: a colour a contender, a dash a width."""
    import matplotlib.pyplot as plt

    from deepknn_lib.plots import COLORS

    timed = rows[rows["unit"] == "s"]
    sizes = timed["setting"].str.extract(r"B=(\d+), D=(\d+)").astype(int)
    timed = timed.assign(size=sizes[0], width=sizes[1])
    colors = dict(zip(dict.fromkeys(timed["what"]), (COLORS["deep-knn"], COLORS["triplet"]), strict=False))
    dashes = dict(zip(sorted(set(timed["width"])), ("-", "--", ":"), strict=False))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharex=True)
    panels = (("median", "seconds: loss and gradient"), ("peak_mb", "MB at the peak, above the inputs"))
    for axis, (column, title) in zip(axes, panels, strict=True):
        for (what, width), line in timed[timed[column] > 0].groupby(["what", "width"], sort=False):
            style = {"linestyle": dashes[width], "color": colors[what], "marker": "o", "ms": 4}
            axis.plot(line["size"], line[column], label=f"{what}, D = {width}", **style)
        axis.set(xscale="log", yscale="log", xlabel="B, images in a batch", title=title)
        axis.set_xticks(sorted(set(timed["size"])), sorted(set(timed["size"])), rotation=45)
        axis.xaxis.minorticks_off()
        axis.grid(color="0.9")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
