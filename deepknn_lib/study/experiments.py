"""Executing runs, or loading what was executed before: `results = execute_all(grid("lesions"))`."""

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from deepknn_lib import estimators
from deepknn_lib.datasets import Dataset, Rows, dataset_digest, load_dataset, validation_part
from deepknn_lib.models import Network, build_network, extract_features, preprocessing, weights_file
from deepknn_lib.neighbors import majority_vote, nearest_neighbors
from deepknn_lib.storage import data_dir, digest, repository, whole_file
from deepknn_lib.study.runs import METHODS, SOFTMAX, Run
from deepknn_lib.training import collapsed, fit


@dataclass(frozen=True)
class Result:
    """A run that was executed.

    `arrays` holds `train_features` (N, D), `train_labels`, `train_ids`, `train_groups`, the same of the test part, and
    `test_logits` (N, C) where there is a classifier. `history` is that of `training.fit`, empty when nothing was
    trained. `record` has settings, class names and counts, data digest, seconds, device, versions and commit.
    """

    run: Run
    arrays: dict[str, np.ndarray]
    history: list[dict]
    record: dict
    _predicted: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def learnt(self) -> bool:
        """Whether the vote is more accurate on training images than calling all the largest class, by a point."""
        counts = self.record["class_counts"]["train"]
        return not self.history or self.history[-1]["train_acc"] > 100 * max(counts) / sum(counts) + 1

    def predict(self, k_predict: int | None = None) -> np.ndarray:
        """Predicted classes of the test images, int64 (N,), by the vote of K_p neighbours or by the `SOFTMAX`."""
        k_predict = self.run.k_predict if k_predict is None else k_predict
        if k_predict == SOFTMAX:
            return self.arrays["test_logits"].argmax(1)
        if k_predict not in self._predicted:
            names = ("test_features", "train_features", "train_labels")
            queries, gallery, labels = (torch.from_numpy(self.arrays[name]) for name in names)
            distances, indices = nearest_neighbors(queries, gallery, k_predict)
            votes = majority_vote(labels[indices], distances, len(self.record["class_names"]))
            self._predicted[k_predict] = votes.numpy()
        return self._predicted[k_predict]


def parts(run: Run) -> Dataset:
    """The data of a run; with `evaluate_on="validation"` its test part is a fifth of the training part."""
    how = preprocessing(run.backbone, run.weights)["interpolation"]
    data = load_dataset(run.dataset, run.split, run.fold, run.image_size, how)
    return data if run.evaluate_on == "test" else validation_part(data)


@cache
def _digest_of(dataset, split, fold, image_size, backbone, weights) -> str:
    how, file = preprocessing(backbone, weights)["interpolation"], weights_file(backbone, weights)
    content = dataset_digest(dataset, split, fold, image_size, how)
    return digest(content, file) if file and file.is_file() else content


def data_digest(run: Run) -> str:
    """Digest of what a run reads: images, labels, groups, split and a file of weights; `execute` takes it anew."""
    return _digest_of(run.dataset, run.split, run.fold, run.image_size, run.backbone, run.weights)


def folder_of(run: Run) -> Path:
    """Where a run on these data is kept: `run.json`, `history.csv`, `features.npz`, `model.safetensors`."""
    return data_dir() / "runs" / f"{run.key}-{data_digest(run)}"


def is_done(run: Run) -> bool:
    """Whether the run was executed before, on the same data."""
    return (folder_of(run) / "run.json").is_file()


def load(run: Run) -> Result:
    """The result of a run that is done."""
    arrays, record = _stored(folder_of(run))
    history = pd.read_csv(folder_of(run) / "history.csv", float_precision="round_trip").to_dict("records")
    return Result(run, arrays, history, record)


def _stored(folder: Path) -> tuple[dict, dict]:
    with np.load(folder / "features.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return arrays, json.loads((folder / "run.json").read_text(encoding="utf-8"))


def execute(run: Run, device: str = "auto") -> Result:
    """Execute a run, or load it if that was done before on the same data; see `execute_all`."""
    return execute_all([run], device)[0]


def execute_all(runs: Iterable[Run], device: str = "auto", jobs: int | None = None) -> list[Result]:
    """Execute runs, or load them: one after the other on a GPU, on CPUs side by side, a core each; or `jobs` at once.

    Each distinct training is done once, and one that was begun is resumed. The results are in the order of `runs`. The
    first run that fails (its data, backbone, weights or device are not to be had, or it diverges) raises a ValueError,
    FileNotFoundError or FloatingPointError. What was done before stays, and nothing of the failed run does.
    """
    from joblib import Parallel, cpu_count, delayed
    from tqdm import tqdm

    _digest_of.cache_clear()  # files may have been replaced since
    runs, jobs = list(runs), jobs or (1 if pick_device(device).type == "cuda" else cpu_count())
    new = [run for run in runs if not is_done(run)]
    for run in {run.key: run for run in runs if run not in new}.values():
        report(event="run", status="cached", label=run.label)
    bases = {run.base.key: run.base for run in new if run.base and not is_done(run.base)}
    others = {run.key: run.trained for run in new if run.key not in bases}
    workers = min(jobs, max(len(bases), len(others), 1))
    carry_out = _carry_out if workers == 1 else partial(_in_worker, os.getpid())
    parallel = Parallel(workers, "loky", return_as="generator_unordered", batch_size=1)
    quiet = "DEEPKNN_PROGRESS" in os.environ or not new
    with tqdm(total=len(bases) + len(others), desc="training", unit="run", disable=quiet) as bar:
        for wave in (bases, others):  # what others start from comes first
            tasks = [(run, folder_of(run), run.base and folder_of(run.base)) for run in wave.values()]
            for _ in parallel(delayed(carry_out)(*task, data_digest(task[0]), device) for task in tasks):
                bar.update()
    return [load(run) for run in runs]


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU if there is one; ValueError for a device that there is not."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no GPU; use --device cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


@cache
def _end_with(parent: int) -> None:
    """End this process when its parent, the process that asked for the runs, is gone."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_worker(parent: int, *what) -> None:
    """Execute a run in a process of its own, on one core."""
    _end_with(parent)
    torch.set_num_threads(1)
    os.environ.setdefault("DEEPKNN_PROGRESS", os.devnull)  # several would write over one another's line
    _carry_out(*what)


def _carry_out(run: Run, folder: Path, base: Path | None, data: str, device: str) -> None:
    """Execute `run` and leave `folder` whole; `base` is the folder of the run that it starts from, which is there."""
    from safetensors.torch import save_file

    where, started = pick_device(device), time.perf_counter()
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    checkpoint = folder.with_name(folder.name + ".checkpoint.pt")
    execute_one = _on_features if METHODS[run.method].on_features else _on_images
    with warnings.catch_warnings(record=True) as said:  # a worker's would end in the cell of a notebook
        arrays, history, state, about = execute_one(run, base, checkpoint, where)
    for text in dict.fromkeys(str(one.message) for one in said if issubclass(one.category, UserWarning)):
        report(event="warning", text=f"{run.label}: {text}")
    record = {"run": asdict(run), "data": data, "collapsed": collapsed(history, run.config)} | about
    threads = f"cpu ({torch.get_num_threads()} threads a run)"
    record["device"] = torch.cuda.get_device_name() if where.type == "cuda" else threads
    record |= {"seconds": time.perf_counter() - started, "versions": versions(), "commit": commit()}
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    fresh.mkdir(parents=True, exist_ok=True)
    try:
        np.savez(fresh / "features.npz", **arrays)
        save_file({n: t.contiguous().cpu() for n, t in state.items()}, fresh / "model.safetensors")
        pd.DataFrame(history or {"epoch": []}).to_csv(fresh / "history.csv", index=False)
        (fresh / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        try:
            fresh.rename(folder)
        except OSError:  # another process finished the same run first; its entry is as good
            if not (folder / "run.json").is_file():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    checkpoint.unlink(missing_ok=True)
    report(event="run", status="trained", label=run.label)


def network_of(run: Run, n_classes: int, weights: str) -> Network:
    """The network of a run on images, before its training, from these weights."""
    n_classes = n_classes if METHODS[run.method].loss == "weighted-ce" else None
    options = {"n_classes": n_classes, "normalize": run.normalize, "seed": run.seed}
    return build_network(run.backbone, weights=weights, **options)


def _on_images(run: Run, base: Path | None, checkpoint: Path, where: torch.device) -> tuple:
    """Features of both parts, history, the network's tensors, and what is known of the data."""
    from safetensors.torch import load_file

    data, loss = parts(run), METHODS[run.method].loss
    network = network_of(run, len(data.class_names), "none" if base else run.weights).to(where)
    if base:  # its backbone; the classifier is dropped, as the paper does for deep kNN*
        own = {n: t for n, t in load_file(base / "model.safetensors").items() if n.startswith("backbone.")}
        network.load_state_dict(network.state_dict() | own)
    both, arrays, counts = {"train": data.train, "test": data.test}, {}, {}
    for part, held in both.items():
        arrays |= {f"{part}_labels": held.labels, f"{part}_ids": held.ids, f"{part}_groups": held.groups}
        counts[part] = np.bincount(held.labels, minlength=len(data.class_names)).tolist()
    about = {"class_names": data.class_names, "class_counts": counts}
    about |= {name: data.info[name] for name in ("smallest", "synthetic")}
    if not loss:
        return arrays | _frozen(network, run, both), [], network.state_dict(), about
    images = (data.train.images, data.test.images)  # `Rows` stay on disk
    train, test = (i if isinstance(i, Rows) else torch.from_numpy(i).to(where) for i in images)
    labels = torch.from_numpy(data.train.labels)
    history = fit(network, train, labels, run.config, checkpoint=checkpoint, on_epoch=partial(_tell, run))
    arrays["train_features"] = extract_features(network, train).cpu().numpy()
    features = extract_features(network, test)
    arrays["test_features"] = features.cpu().numpy()
    if network.classifier:
        arrays["test_logits"] = network.classifier(features).detach().cpu().numpy()
    return arrays, history, network.state_dict(), about


def _frozen(network: Network, run: Run, both: dict) -> dict[str, np.ndarray]:
    """Features of an untrained or pretrained backbone: the same on every split, so made once and kept by image."""
    content = _digest_of(run.dataset, None, 1, run.image_size, run.backbone, run.weights)
    seed = run.seed if run.weights == "none" else 0
    name = digest(content, run.backbone, run.weights, run.normalize, str(seed))
    path, known = data_dir() / "features" / f"{run.dataset.split(':')[0]}-{run.backbone}-{name}.npz", {}
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            known = dict(zip(stored["ids"].tolist(), stored["features"], strict=True))
    if not all(i in known for held in both.values() for i in held.ids.tolist()):
        for held in both.values():
            images = Rows(held.images, np.arange(len(held)))  # not the whole set at once on a GPU
            features = extract_features(network, images).cpu().numpy()
            known |= dict(zip(held.ids.tolist(), features, strict=True))
        with whole_file(path) as temporary:
            np.savez(temporary, ids=np.array(list(known)), features=np.stack(list(known.values())))
    return {f"{part}_features": np.stack([known[i] for i in held.ids]) for part, held in both.items()}


def _on_features(run: Run, base: Path, *_) -> tuple:
    """The same for a method that learns on the feature vectors of the base run (Table 3)."""
    arrays, record = _stored(base)
    estimator = estimators.from_run(run)
    estimator.fit(arrays["train_features"], arrays["train_labels"], on_epoch=partial(_tell, run))
    if SOFTMAX in METHODS[run.method].votes:
        arrays["test_logits"] = estimator.logits(arrays["test_features"])
    arrays |= {name: estimator.transform(arrays[name]) for name in ("train_features", "test_features")}
    about = {name: record[name] for name in ("class_names", "smallest", "synthetic", "class_counts")}
    return arrays, estimator.history_, estimator.state_, about


def _tell(run: Run, row: dict) -> None:
    """Report an epoch of this run."""
    active = "" if np.isnan(row["active"]) else f", {row['active']:.0%} active"
    spent = row["seconds"] + row["eval_seconds"]
    text = f"{run.label}: epoch {row['epoch']}/{run.epochs}, loss {row['loss']:.3f}{active}, "
    report(event="epoch", text=f"{text}train kNN {row['train_acc']:.1f} %, {spent:.1f} s")


def report(**event: str) -> None:
    """Tell whoever runs the notebooks; on a terminal epochs go to stderr, one line that is rewritten."""
    path = os.environ.get("DEEPKNN_PROGRESS")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
    elif event["event"] == "warning":
        print(f"\nwarning: {event['text']}", file=sys.stderr)
    elif event["event"] == "epoch" and sys.stderr.isatty():
        print(f"\r\033[K{event['text']}", end="", file=sys.stderr, flush=True)


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
