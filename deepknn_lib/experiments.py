"""Executing runs, or loading what was executed before: `results = [execute(run) for run in grid("lesions")]`."""

import csv
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from deepknn_lib import splits
from deepknn_lib.datasets import Dataset, load_dataset
from deepknn_lib.models import build_network
from deepknn_lib.neighbors import majority_vote, nearest_neighbors
from deepknn_lib.runs import METHODS, Run
from deepknn_lib.storage import data_dir, repository
from deepknn_lib.training import collapsed, extract_features, fit


@dataclass(frozen=True)
class Result:
    """A run that was executed: features, predictions and history.

    Attributes
    ----------
    arrays : dict of ndarray
        `train_features` (N, D), `train_labels`, `train_ids`, and the same of the test part with `test_groups`;
        `test_logits` (N, C) where the network has a classifier.
    history : list of dict
        See `training.fit`; empty when nothing was trained.
    record : dict
        Settings, class names, seconds, device, versions, commit.
    """

    run: Run
    arrays: dict[str, np.ndarray]
    history: list[dict]
    record: dict
    _predicted: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def predict(self, k_predict: int | None = None) -> np.ndarray:
        """Predicted classes of the test images, int64 (N,); `k_predict` defaults to the run's."""
        k_predict = self.run.k_predict if k_predict is None else k_predict
        if k_predict not in self._predicted:
            self._predicted[k_predict] = self._vote(k_predict) if k_predict else self.arrays["test_logits"].argmax(1)
        return self._predicted[k_predict]

    def _vote(self, k_predict: int) -> np.ndarray:
        names = ("test_features", "train_features", "train_labels")
        queries, gallery, labels = (torch.from_numpy(self.arrays[name]) for name in names)
        distances, indices = nearest_neighbors(queries, gallery, k_predict)
        return majority_vote(labels[indices], distances, len(self.record["class_names"])).numpy()


def parts(run: Run) -> Dataset:
    """The data of a run; with `evaluate_on="validation"` its test part is a fifth of the training part."""
    data = load_dataset(run.dataset, run.split, run.fold, run.image_size)
    if run.evaluate_on == "test":
        return data
    train = data.train
    by_group = run.split == "grouped"
    folds = splits.group_folds(train.labels, train.groups) if by_group else splits.image_folds(train.labels)
    return replace(data, train=train.take(folds != 1), test=train.take(folds == 1))


def folder_of(run: Run) -> Path:
    """Where a run is kept: `run.json`, `history.csv`, `features.npz`, `model.safetensors`."""
    return data_dir() / "runs" / run.key


def is_done(run: Run) -> bool:
    """Whether the run was executed before."""
    return (folder_of(run) / "run.json").is_file()


def load(run: Run) -> Result:
    """The result of a run that is done."""
    folder = folder_of(run)
    with np.load(folder / "features.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    with open(folder / "history.csv", newline="", encoding="utf-8") as file:
        history = [{n: int(v) if n == "epoch" else float(v) for n, v in row.items()} for row in csv.DictReader(file)]
    return Result(run, arrays, history, json.loads((folder / "run.json").read_text(encoding="utf-8")))


def execute(run: Run, device: str = "auto") -> Result:
    """Execute a run, or load it if that was done before; resume it if that was begun.

    Parameters
    ----------
    run : Run
    device : {"auto", "cpu", "cuda"}

    Raises
    ------
    ValueError, FileNotFoundError
        If the run's data, backbone or weights are not to be had; nothing is left behind then.
    """
    _ensure(run, device)
    return load(run)


def execute_all(runs: Iterable[Run], device: str = "auto") -> list[Result]:
    """Execute runs, each distinct training once: one after the other on a GPU, on CPUs side by side, a core each.

    Parameters
    ----------
    runs : iterable of Run
    device : {"auto", "cpu", "cuda"}

    Returns
    -------
    list of Result
        In the order of `runs`.

    Raises
    ------
    ValueError, FileNotFoundError, FloatingPointError
        From the first run that fails; those already done stay done.
    """
    from tqdm import tqdm

    runs = list(runs)
    bases = [run.base for run in runs if run.base]
    waves = [list({run.key: run.trained for run in wave if not is_done(run)}.values()) for wave in (bases, runs)]
    waves[1] = [run for run in waves[1] if run.key not in {base.key for base in waves[0]}]
    new = {run.key: run for wave in waves for run in wave}
    workers = min(os.cpu_count() or 1, max(map(len, waves)))
    if pick_device(device).type == "cuda" or workers <= 1:
        for run in {run.key: run for run in runs if run.key in new}.values():
            _ensure(run, device)  # in the order asked for; a base is trained when the first run needs it
    else:
        for run in {(r.dataset, r.split, r.fold, r.image_size): r for r in new.values()}.values():
            parts(run)  # decoded once, here, not by every worker
        context = multiprocessing.get_context("spawn")
        told = bool(os.environ.get("DEEPKNN_PROGRESS"))  # whoever runs the notebooks shows every epoch himself
        with (
            ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool,
            tqdm(total=len(new), desc="training", unit="run", disable=told) as bar,
        ):
            for wave in waves:
                futures = [pool.submit(_ensure, run, "cpu") for run in wave]
                try:
                    for future in as_completed(futures):
                        future.result()
                        bar.update()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    for run in {run.key: run for run in runs if run.key not in new}.values():
        _report(event="run", status="cached", label=run.label)
    return [load(run) for run in runs]


def _start_worker() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("DEEPKNN_PROGRESS", os.devnull)  # several workers would write over one another's line


def _ensure(run: Run, device: str) -> None:
    """Have the run done."""
    if is_done(run):
        _report(event="run", status="cached", label=run.label)
    else:
        _train(run.trained, folder_of(run), device)
        _report(event="run", status="trained", label=run.trained.label)


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU if there is one."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no GPU; use --device cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _train(run: Run, folder: Path, device: str) -> None:
    from safetensors.torch import save_file

    where = pick_device(device)
    data = parts(run)
    started = time.perf_counter()
    loss = METHODS[run.method].loss
    network = build_network(
        run.backbone,
        weights="none" if run.base else run.weights,
        n_classes=len(data.class_names) if loss == "weighted-ce" else None,
        normalize=run.normalize,
        seed=run.seed,
    )
    if run.base:
        _start_from(network, run.base, device)
    network.to(where)
    images = torch.from_numpy(data.train.images).to(where)
    labels = torch.from_numpy(data.train.labels)
    checkpoint = folder.with_name(folder.name + ".checkpoint.safetensors")
    history = []
    if loss:

        def tell(row: dict) -> None:
            active = "" if loss == "weighted-ce" else f", {row['active']:.0%} active"
            spent = row["seconds"] + row["eval_seconds"]
            text = f"{run.label}: epoch {row['epoch']}/{run.epochs}, loss {row['loss']:.3f}{active}, "
            _report(event="epoch", text=f"{text}train kNN {row['train_acc']:.1f} %, {spent:.1f} s")

        history = fit(network, images, labels, run.recipe, checkpoint=checkpoint, on_epoch=tell)
    arrays = {}
    for part, held in (("train", data.train), ("test", data.test)):
        features = extract_features(network, torch.from_numpy(held.images).to(where))
        if part == "test" and network.classifier is not None:
            with torch.no_grad():
                arrays["test_logits"] = network.classifier(features).float().cpu().numpy()
        arrays |= {f"{part}_features": features.cpu().numpy(), f"{part}_labels": held.labels}
        arrays |= {f"{part}_ids": held.ids, f"{part}_groups": held.groups}
    record = {
        "run": asdict(run),
        "class_names": data.class_names,
        "class_counts": {"train": _counts(data.train, data), "test": _counts(data.test, data)},
        "smallest": data.info["smallest"],
        "synthetic": data.info["synthetic"],
        "collapsed": collapsed(history, run.recipe) if loss else False,
        "seconds": time.perf_counter() - started,
        "device": torch.cuda.get_device_name()
        if where.type == "cuda"
        else f"cpu ({torch.get_num_threads()} threads a run)",
        "versions": versions(),
        "commit": commit(),
    }
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        np.savez(fresh / "features.npz", **arrays)
        save_file({n: t.contiguous().cpu() for n, t in network.state_dict().items()}, fresh / "model.safetensors")
        with open(fresh / "history.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(history[0]) if history else ["epoch"])
            writer.writeheader()
            writer.writerows(history)
        (fresh / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        try:
            fresh.rename(folder)
        except OSError:  # another process finished the same run first; its entry is as good
            if not (folder / "run.json").is_file():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    checkpoint.unlink(missing_ok=True)


def _start_from(network: torch.nn.Module, base: Run, device: str) -> None:
    """Put the backbone of the base run into `network`; its classifier is dropped, as the paper does for deep kNN*."""
    from safetensors.torch import load_file

    if not is_done(base):
        _ensure(base, device)
    state = load_file(folder_of(base) / "model.safetensors")
    backbone = {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}
    network.backbone.load_state_dict(backbone)


def _counts(part, data: Dataset) -> list[int]:
    return np.bincount(part.labels, minlength=len(data.class_names)).tolist()


def versions() -> str:
    """Versions that a result depends on, in one line."""
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "timm", "numpy"))
    return f"python {platform.python_version()}, {packages}"


def commit() -> str:
    """Short hash of the checkout's commit, with `+` when files differ from it; empty outside git."""
    git = ["git", "-C", str(repository())]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def _report(**event: str) -> None:
    """Tell whoever runs the notebooks; in an interactive session epochs go to stderr, one line that is rewritten."""
    path = os.environ.get("DEEPKNN_PROGRESS")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
    elif event["event"] == "epoch" and sys.stderr.isatty():
        print(f"\r\033[K{event['text']}", end="", file=sys.stderr, flush=True)
