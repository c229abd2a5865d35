"""Executing runs, or loading what was executed before: `results = execute_all(grid("lesions"))`."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib import metadata

import numpy as np
import torch
from joblib import cpu_count
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from deepknn_lib import storage
from deepknn_lib.datasets import Dataset, Rows, dataset_digest, load_dataset, validation_part
from deepknn_lib.datasets.decode import deep_greys
from deepknn_lib.datasets.load import entry_of, index_of
from deepknn_lib.models import Network, build_network, extract_features, preprocessing
from deepknn_lib.storage import claim, data_dir, repository, whole_file
from deepknn_lib.study.cache import Entry, Result, content_digest, write_run
from deepknn_lib.study.runs import METHODS, SOFTMAX, Run
from deepknn_lib.study.workers import KINDS, Ended, on_cluster, on_processes
from deepknn_lib.training import collapsed, fit

FEW = "k_predict is {}, but only {} training images can vote"


def execute(run: Run, device: str = "auto") -> Result:
    """Execute a run, or load it if that was done before on the same data; see `execute_all`."""
    return execute_all([run], device)[0]


def execute_all(runs: Iterable[Run], device="auto", jobs=None, cluster="", failed=None) -> list[Result]:
    """Execute runs, or load them: one after the other on a GPU, on CPUs side by side, a core each; or `jobs` at once.

    Each distinct training is done once, also where several processes ask for it, and one that was begun is resumed. The
    results are in the order of `runs`. A run that fails leaves the others going, and nothing of it stays. At the end
    one ValueError, OSError, FloatingPointError or RuntimeError names all that failed; or the dict `failed` gets them
    with their errors, and their results are None. Ctrl-C's KeyboardInterrupt says how many runs are done.

    `cluster` is the address of a Dask scheduler, whose workers then execute the runs: one at a time each, on all of the
    worker's threads, or on its GPU where workers have the resource `GPU`. They need this library, and the images in a
    data folder of their own. When a worker dies, another one does its run again.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    jobs = jobs or (1 if cluster or pick_device(device).type == "cuda" else cpu_count())
    content_digest.cache_clear()  # Files may have been replaced since.
    storage.sweep()
    runs = list(runs)
    entries = {run: Entry.of(run) for run in runs}
    found = {entry: result for entry in dict.fromkeys(entries.values()) if (result := entry.result())}
    # Of runs that share a training, the one with the fewest votes is trained, as it asks for least.
    least = {entry: entry for entry in sorted(entries.values(), key=lambda entry: -entry.run.k_predict)}
    missing = [least[entry] for entry in entries.values() if entry not in found]
    bases = dict.fromkeys(entry.base for entry in missing if entry.base and entry.base not in found)
    todo = dict.fromkeys([base for base in bases if not base.result()] + missing)
    spread = partial(on_cluster, cluster) if cluster else partial(on_processes, min(jobs, len(todo) or 1))
    errors, total = {}, len(found) + len(todo)
    quiet = "DEEPKNN_PROGRESS" in os.environ or not todo
    try:
        for ended in tqdm(_train_all(todo, spread, device), "training", len(todo), unit="run", disable=quiet):
            if ended.error:
                errors[ended.entry] = ended.error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{total - len(todo) - len(errors)} of {total} done") from None
    found |= {entry: entry.result() for entry in missing if entry not in errors}
    wrong = {run: errors[entry] for run, entry in entries.items() if entry in errors}
    for run, entry in entries.items():
        if entry in found and run.k_predict > (n := len(found[entry].arrays["train_labels"])):
            wrong[run] = ValueError(FEW.format(run.k_predict, n))
    if wrong and failed is None:
        first = next(iter(wrong.values()))
        kind = next(kind for kind in KINDS if isinstance(first, kind))
        raise kind("; ".join(f"{run.label}: {error}" for run, error in wrong.items())) from first
    if wrong:
        failed |= wrong
    return [None if run in wrong else replace(found[entries[run]], run=run) for run in runs]


def _train_all(todo: dict[Entry, None], spread: Callable, device: str) -> Iterator[Ended]:
    """Empty `todo`, bases first, and tell how each ended; what another process is at is tried again at the end."""
    told = set()
    while todo:
        ready = [entry for entry in todo if entry.base not in todo]
        before = len(todo)
        for ended in spread(partial(_train, device=device), ready):
            for text in ended.warnings:
                if text not in told:  # that of the data comes with every run
                    report(f"{ended.entry.run.label}: {text}", warning=True)
            told.update(ended.warnings)
            if ended.value or ended.error:
                del todo[ended.entry]
                yield ended
            if ended.error:
                why = ValueError(f"{ended.entry.run.label}, which it starts from, failed: {ended.error}")
                for entry in [entry for entry in todo if entry.base == ended.entry]:
                    del todo[entry]
                    yield Ended(entry, None, why)
        if len(todo) == before:
            time.sleep(1)


def _train(entry: Entry, device: str) -> bool:
    """Execute the run of an entry and leave its files, unless they are there; False if another process is at it."""
    with claim(entry.folder, wait=False) as mine:
        if not mine or entry.result():
            return mine
        if Entry.of(entry.run) != entry:
            content_digest.cache_clear()  # This process may have read files that were replaced since.
        if Entry.of(entry.run) != entry:
            told = f"{platform.node()} has other images or weights in its {data_dir()} than the run is for"
            raise ValueError(f"{told}; copy them there, or begin anew if they were replaced just now")
        storage.sweep(0, f"runs/.{entry.name}*")  # of a process that was killed, as the claim is ours
        storage.read_whole(entry.checkpoint, storage.load_state)  # A damaged one is set aside.
        on_features = METHODS[entry.run.method].on_features  # They learn on the CPU.
        where, started = pick_device("cpu" if on_features else device), time.perf_counter()
        torch.backends.cudnn.benchmark = True  # all batches have one shape
        try:
            result, state = (_on_features if on_features else _on_images)(entry, where)
        except (ValueError, FloatingPointError):  # It would end so again.
            entry.checkpoint.unlink(missing_ok=True)
            raise
        threads = f"cpu ({torch.get_num_threads()} threads a run)"
        device = torch.cuda.get_device_name() if where.type == "cuda" else threads
        how = {"device": device, "seconds": time.perf_counter() - started, "versions": versions()}
        how |= {"commit": commit(), "data": entry.data, "collapsed": collapsed(result.history, entry.run)}
        with whole_file(entry.folder) as fresh:
            write_run(fresh, replace(result, record=result.record | how), state)
        entry.checkpoint.unlink(missing_ok=True)
    return True


def _on_images(entry: Entry, where: torch.device) -> tuple[Result, dict[str, Tensor]]:
    """Train on images, where there is a loss; gives the result, and the network's tensors."""
    run, data = entry.run, parts(entry.run)
    both, names = {"train": data.train, "test": data.test}, data.class_names
    if run.k_predict > len(data.train):
        raise ValueError(FEW.format(run.k_predict, len(data.train)))
    network = network_of(run, len(names)).to(where)
    if entry.base:  # Its classifier is dropped, as the paper does for deep kNN*.
        own = load_file(entry.base.folder / "model.safetensors")
        backbone = {n.removeprefix("backbone."): t for n, t in own.items() if n.startswith("backbone.")}
        network.backbone.load_state_dict(backbone)
    images = {part: held.images for part, held in both.items()}  # `Rows` stay on disk.
    images |= {p: torch.from_numpy(i).to(where) for p, i in images.items() if not isinstance(i, Rows)}
    history, options = [], {"checkpoint": entry.checkpoint, "on_epoch": partial(_tell_epoch, run)}
    if METHODS[run.method].loss:
        history = fit(network, images["train"], torch.from_numpy(data.train.labels), run.config, **options)
    features = {part: extract_features(network, some) for part, some in images.items()}
    arrays = {f"{part}_features": some.cpu().numpy() for part, some in features.items()}
    if network.classifier:
        arrays["test_logits"] = network.classifier(features["test"]).detach().cpu().numpy()
    for part, held in both.items():
        arrays |= {f"{part}_labels": held.labels, f"{part}_ids": held.ids, f"{part}_groups": held.groups}
    counts = {part: np.bincount(held.labels, minlength=len(names)).tolist() for part, held in both.items()}
    record = {"class_names": names, "class_counts": counts}
    record |= {name: data.info[name] for name in ("smallest", "synthetic")}
    count, _, white = deep_greys(index_of(entry_of(run.dataset), run.split).files)
    record |= {"white": white if count else None, "images": images_of(run)}  # of 16-bit greys; for predict
    return Result(run, arrays, history, record), network.state_dict()


def _on_features(entry: Entry, _: torch.device) -> tuple[Result, dict[str, Tensor]]:
    """The same for a method that learns on the feature vectors of the base (Table 3)."""
    from deepknn_lib import estimators

    run, base, estimator = entry.run, entry.base.result(), estimators.from_run(entry.run)
    arrays, told = base.arrays, partial(_tell_epoch, run)
    estimator.fit(arrays["train_features"], arrays["train_labels"], on_epoch=told)
    if SOFTMAX in METHODS[run.method].votes:
        arrays["test_logits"] = estimator.logits(arrays["test_features"])
    arrays |= {name: estimator.transform(arrays[name]) for name in ("train_features", "test_features")}
    record = {name: base.record[name] for name in ("class_names", "class_counts", "smallest", "synthetic")}
    return Result(run, arrays, estimator.history_, record), estimator.state_


def network_of(run: Run, n_classes: int, state: dict[str, Tensor] | None = None) -> Network:
    """The network of a run on images as its training begins, or with the tensors that the training left."""
    run = run.trained
    weights = "none" if state or run.base else run.weights  # The state or the base brings its own.
    options = {"weights": weights, "normalize": run.normalize, "seed": run.seed}
    options["n_classes"] = n_classes if METHODS[run.method].loss == "weighted-ce" else None
    network = build_network(run.backbone, **options)
    if state:
        network.load_state_dict(state)
        # Features for which nothing was trained were made in float32.
        network.precision = run.precision if METHODS[run.method].loss else "float32"
    pixels = preprocessing(run.backbone, run.weights)  # They are no part of the state.
    network.mean, network.std = torch.tensor(pixels["mean"]), torch.tensor(pixels["std"])
    return network


def parts(run: Run) -> Dataset:
    """The data of a run; with `evaluate_on="validation"` its test part is a fifth of the training part."""
    how = preprocessing(run.backbone, run.weights)["interpolation"]
    data = load_dataset(run.dataset, run.split, run.fold, run.image_size, how)
    return data if run.evaluate_on == "test" else validation_part(data)


def images_of(run: Run) -> str:
    """A digest of the images, labels and split of a run, without those of its weights."""
    how = preprocessing(run.backbone, run.weights)["interpolation"]
    return dataset_digest(run.dataset, run.split, run.fold, run.image_size, how)


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU if there is one; ValueError for a device that there is not."""
    if device not in ("auto", "cpu", "cuda"):
        raise storage.unknown("device", device, ("auto", "cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no GPU; use --device cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _tell_epoch(run: Run, row: dict) -> None:
    active = "" if np.isnan(row["active"]) else f", {row['active']:.0%} active"
    spent = row["seconds"] + row["eval_seconds"]
    text = f"{run.label}: epoch {row['epoch']}/{run.epochs}, loss {row['loss']:.3f}{active}, "
    report(f"{text}train kNN {row['train_acc']:.1f} %, {spent:.1f} s")


def report(text: str, warning: bool = False) -> None:
    """Tell whoever runs the notebooks; on a terminal an epoch goes to stderr, one line that is rewritten."""
    if path := os.environ.get("DEEPKNN_PROGRESS"):
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{text}\n")
    elif warning:
        print(f"\nwarning: {text}", file=sys.stderr)
    elif sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def versions() -> str:
    """Versions that a result depends on, in one line."""
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "timm", "numpy"))
    return f"python {platform.python_version()}, {packages}"


def commit() -> str:
    """Short hash of the checkout's commit, with `+` when files differ from it; empty outside git."""
    command = "git describe --always --dirty=+ --abbrev=10 --exclude=*".split()
    try:
        return subprocess.run(command, cwd=repository(), capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
