"""Executing runs, or loading what was executed before: `results = [execute(run) for run in grid("lesions")]`."""

import csv
import json
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from deepknn_lib import splits
from deepknn_lib.datasets import Dataset, load_dataset
from deepknn_lib.execution import carry_out, pick_device, report
from deepknn_lib.neighbors import majority_vote, nearest_neighbors
from deepknn_lib.runs import METHODS, Run
from deepknn_lib.storage import data_dir


@dataclass(frozen=True)
class Result:
    """A run that was executed: features, predictions and history.

    Attributes
    ----------
    arrays : dict of ndarray
        `train_features` (N, D), `train_labels`, `train_ids`, and the same of the test part with `test_groups`;
        `test_logits` (N, C) where there is a classifier.
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

    @property
    def learnt(self) -> bool:
        """Whether training went anywhere: not collapsed, and its kNN training accuracy above the largest class's share.

        Batch-hard triplets stay active also in a run that learns, so `active` does not tell; true where nothing is trained.
        """
        counts = self.record["class_counts"]["train"]
        dull = 100 * max(counts) / sum(counts)
        return not self.record["collapsed"] and (not self.history or self.history[-1]["train_acc"] > dull + 1)

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
    told = bool(os.environ.get("DEEPKNN_PROGRESS"))  # whoever runs the notebooks shows every epoch himself
    if pick_device(device).type == "cuda" or workers <= 1:
        todo = {run.key: run for run in runs if run.key in new}.values()
        for run in tqdm(todo, desc="training", unit="run", disable=told or not new):
            _ensure(run, device)  # in the order asked for; a base is trained when the first run needs it
    else:
        on_images = [r for r in new.values() if not METHODS[r.method].on_features]
        for run in {(r.dataset, r.split, r.fold, r.image_size): r for r in on_images}.values():
            parts(run)  # decoded once, here, not by every worker
        context = multiprocessing.get_context("spawn")
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
        report(event="run", status="cached", label=run.label)
    return [load(run) for run in runs]


def outlook(runs: Iterable[Run], workers: int = 1) -> str:
    """What is left of `runs` and their bases, and how long it will take by what their kind took before, in a sentence."""
    runs = {one.key: one for run in runs for one in (run.base, run) if one}.values()
    left = [run for run in runs if not is_done(run)]
    kind = ("dataset", "backbone", "image_size", "epochs")
    spent: dict[tuple, list[float]] = {}
    for path in (data_dir() / "runs").glob("*/run.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        about = tuple(record["run"].get(name) for name in kind)
        for key in (about, (*about, record["run"]["method"])):
            spent.setdefault(key, []).append(record["seconds"])
    seconds = []
    for run in left:
        about = tuple(getattr(run, name) for name in kind)
        known = spent.get((*about, run.method), spent.get(about))
        seconds.append(sum(known) / len(known) if known else float("nan"))
    known = [value for value in seconds if value == value]
    guess = f"about {sum(known) / len(known) * len(left) / workers / 60:.0f} minutes" if known else "time not known yet"
    return f"{len(runs)} runs: {len(runs) - len(left)} done, {len(left)} to do" + (f", {guess}" if left else "")


def _start_worker() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("DEEPKNN_PROGRESS", os.devnull)  # several workers would write over one another's line


def _ensure(run: Run, device: str) -> None:
    """Have the run done."""
    if is_done(run):
        report(event="run", status="cached", label=run.label)
    else:
        trained = run.trained
        if trained.base and not is_done(trained.base):
            _ensure(trained.base, device)
        base = folder_of(trained.base) if trained.base else None
        carry_out(trained, lambda: parts(trained), folder_of(run), base, device)
        report(event="run", status="trained", label=run.trained.label)
