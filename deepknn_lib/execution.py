"""One run, executed into its folder: network, training, features, and where it all came from."""

import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from deepknn_lib.datasets import Dataset
from deepknn_lib.images import Rows
from deepknn_lib.models import Network, build_network
from deepknn_lib.runs import CODE, METHODS, Run
from deepknn_lib.storage import data_dir, repository, whole_file
from deepknn_lib.training import collapsed, extract_features, fit, on_device


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU if there is one."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no GPU; use --device cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def carry_out(run: Run, parts: Callable[[], Dataset], folder: Path, base: Path | None, device: str) -> None:
    """Execute `run` and leave `folder` whole: `run.json`, `history.csv`, `features.npz`, `model.safetensors`.

    `parts` loads its data. `base` is the folder of the run that this one starts from; it has to be there.
    """
    from safetensors.torch import save_file

    where = pick_device(device)
    if os.environ.get("DEEPKNN_DETERMINISTIC"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts
        torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    checkpoint = folder.with_name(folder.name + ".checkpoint.safetensors")
    if METHODS[run.method].on_features:
        arrays, history, state, about = _on_features(run, base)
    else:
        data = parts()
        arrays, history, state = _on_images(run, data, base, checkpoint, where)
        about = {"class_names": data.class_names, "smallest": data.info["smallest"], "synthetic": data.info["synthetic"]}
        about["class_counts"] = {"train": _counts(data.train, data), "test": _counts(data.test, data)}
        for part, held in (("train", data.train), ("test", data.test)):
            arrays |= {f"{part}_labels": held.labels, f"{part}_ids": held.ids, f"{part}_groups": held.groups}
    record = {"run": asdict(run)} | about
    record |= {
        "collapsed": collapsed(history, run.recipe) if history else False,
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
        save_file({n: t.contiguous().cpu() for n, t in state.items()}, fresh / "model.safetensors")
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


def _on_images(run: Run, data: Dataset, base: Path | None, checkpoint: Path, where: torch.device) -> tuple:
    """Features of both parts, history, and the network's tensors."""
    from safetensors.torch import load_file

    loss = METHODS[run.method].loss
    network = build_network(
        run.backbone,
        weights="none" if base else run.weights,
        n_classes=len(data.class_names) if loss == "weighted-ce" else None,
        normalize=run.normalize,
        seed=run.seed,
    )
    if base:  # its backbone; the classifier is dropped, as the paper does for deep kNN*
        state = load_file(base / "model.safetensors")
        own = {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}
        network.backbone.load_state_dict(own)
    network.to(where)
    if os.environ.get("DEEPKNN_COMPILE"):
        network.backbone.compile()  # in place: names of weights stay as they are
    if not loss:
        return _frozen(network, run, data, where), [], network.state_dict()
    images = on_device(data.train.images, where)
    labels = torch.from_numpy(data.train.labels)
    history = fit(network, images, labels, run.recipe, checkpoint=checkpoint, on_epoch=_teller(run))
    arrays = {"train_features": extract_features(network, images).cpu().numpy()}
    tested = extract_features(network, on_device(data.test.images, where))
    arrays["test_features"] = tested.cpu().numpy()
    if network.classifier is not None:
        with torch.no_grad():
            arrays["test_logits"] = network.classifier(tested).float().cpu().numpy()
    return arrays, history, network.state_dict()


def _frozen(network: Network, run: Run, data: Dataset, where: torch.device) -> dict[str, np.ndarray]:
    """Features of an untrained or pretrained backbone: the same on every split, so made once and kept by image."""
    what = [CODE, run.dataset, run.image_size, run.backbone, run.weights, run.normalize]
    what.append(run.seed if run.weights == "none" else None)
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    path = data_dir() / "features" / f"{run.dataset.split(':')[0]}-{run.backbone}-{run.weights.split('/')[-1]}-{digest}.npz"
    known = {}
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            known = dict(zip(stored["ids"].tolist(), stored["features"], strict=True))
    parts = {"train": data.train, "test": data.test}
    if not all(i in known for held in parts.values() for i in held.ids.tolist()):
        for held in parts.values():
            images = Rows(held.images, np.arange(len(held)))  # not the whole set at once on a GPU
            known |= dict(zip(held.ids.tolist(), extract_features(network, images).cpu().numpy(), strict=True))
        with whole_file(path) as temporary:
            np.savez(temporary, ids=np.array(list(known)), features=np.stack(list(known.values())))
    return {f"{part}_features": np.stack([known[i] for i in held.ids.tolist()]) for part, held in parts.items()}


def _on_features(run: Run, base: Path) -> tuple:
    """The same for a method that learns on the feature vectors of the base run (Table 3), and what is known of them."""
    from deepknn_lib import estimators

    with np.load(base / "features.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    record = json.loads((base / "run.json").read_text(encoding="utf-8"))
    estimator = estimators.from_run(run)
    estimator.fit(arrays["train_features"], arrays["train_labels"], on_epoch=_teller(run))
    if 0 in METHODS[run.method].votes:
        arrays["test_logits"] = estimator.logits(arrays["test_features"])
    arrays |= {name: estimator.transform(arrays[name]) for name in ("train_features", "test_features")}
    about = {name: record[name] for name in ("class_names", "smallest", "synthetic", "class_counts")}
    return arrays, estimator.history_, estimator.state(), about


def _teller(run: Run):
    """What reports an epoch of this run."""

    def tell(row: dict) -> None:
        active = "" if np.isnan(row["active"]) else f", {row['active']:.0%} active"
        spent = row["seconds"] + row["eval_seconds"]
        text = f"{run.label}: epoch {row['epoch']}/{run.epochs}, loss {row['loss']:.3f}{active}, "
        report(event="epoch", text=f"{text}train kNN {row['train_acc']:.1f} %, {spent:.1f} s")

    return tell


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


def report(**event: str) -> None:
    """Tell whoever runs the notebooks; in an interactive session epochs go to stderr, one line that is rewritten."""
    path = os.environ.get("DEEPKNN_PROGRESS")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
    elif event["event"] == "epoch" and sys.stderr.isatty():
        print(f"\r\033[K{event['text']}", end="", file=sys.stderr, flush=True)
