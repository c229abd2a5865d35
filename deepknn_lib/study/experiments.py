"""Executing runs, or loading what was executed before: `results = execute_all(grid("lesions"))`."""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from deepknn_lib import estimators, metrics, storage
from deepknn_lib.datasets import Dataset, Rows, dataset_digest, load_dataset, validation_part
from deepknn_lib.models import Network, build_network, extract_features, preprocessing, weights_file
from deepknn_lib.neighbors import majority_vote, nearest_neighbors
from deepknn_lib.storage import claim, data_dir, digest, repository, whole_file
from deepknn_lib.study.runs import METHODS, SOFTMAX, Run
from deepknn_lib.training import collapsed, fit

FILES = ("features.npz", "history.csv", "model.safetensors")  # of a run, besides run.json
_KINDS = (FileNotFoundError, OSError, FloatingPointError, ValueError)  # errors whose message says what to do
_ONE_AT_A_TIME = threading.Lock()  # of the runs that a worker of a cluster executes


@dataclass(frozen=True)
class Result:
    """A run that was executed.

    `arrays` holds `train_features` (N, D), `train_labels`, `train_ids`, `train_groups`, the same of the test part, and
    `test_logits` (N, C) where there is a classifier. `history` is that of `training.fit`, empty when nothing was
    trained. `record` has settings, scores, class names and counts, data digest, seconds, device, versions and commit.
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

    def scores(self, k_predict: int | None = None) -> dict[str, float]:
        """`acc`, `mcr`, `rs` and the `recall_<class>` of every class, in per cent; NaN where a class has no images."""
        names, labels, votes = self.record["class_names"], self.arrays["test_labels"], self.predict(k_predict)
        recalls = (100 * metrics.class_recalls(labels, votes, len(names))).tolist()
        of_classes = {f"recall_{name}": recall for name, recall in zip(names, recalls, strict=True)}
        return metrics.scores(labels, votes, len(names), self.record["smallest"]) | of_classes


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
    return _folder(run, data_digest(run))


def _folder(run: Run, data: str) -> Path:
    return data_dir() / "runs" / f"{run.key}-{data}"


def is_done(run: Run) -> bool:
    """Whether the run was executed before, on the same data; what is there but not whole is set aside."""
    return _entry(folder_of(run)) is not None


def load(run: Run) -> Result:
    """The result of a run that is done; ValueError if it is not, or if its files are not those that were written."""
    return Result(run, *_stored(folder_of(run)))


def _stored(folder: Path, *more: str) -> tuple[dict, list[dict], dict]:
    """Arrays, history and record of an entry; ValueError if these files, or those named, are not whole."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        written = record.pop("checksums")  # An entry of an earlier version has none.
        found = _checksums(folder, record, *FILES[:2], *more)
        if changed := [name for name in found if found[name] != written[name]]:
            raise ValueError(f"{', '.join(changed)} changed since")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} does not hold a run as it was written: {error!r}") from error
    with np.load(folder / "features.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    history = pd.read_csv(folder / "history.csv", float_precision="round_trip").to_dict("records")
    return arrays, history, record


def _checksums(folder: Path, record: dict, *names: str) -> dict[str, str]:
    return {name: digest(folder / name) for name in names} | {"run.json": digest(json.dumps(record))}


def _entry(folder: Path, *more: str) -> tuple[dict, list[dict], dict] | None:
    """The same, or None where nothing is; what is there but not whole is set aside, with a warning."""
    try:
        return _stored(folder, *more) if folder.exists() else None
    except ValueError as error:
        report(event="warning", text=storage.set_aside(folder, error))


def execute(run: Run, device: str = "auto") -> Result:
    """Execute a run, or load it if that was done before on the same data; see `execute_all`."""
    return execute_all([run], device)[0]


def execute_all(runs: Iterable[Run], device="auto", jobs=None, cluster="", failed=None) -> list[Result]:
    """Execute runs, or load them: one after the other on a GPU, on CPUs side by side, a core each; or `jobs` at once.

    Each distinct training is done once, also where several processes ask for it, and one that was begun is resumed. The
    results are in the order of `runs`. A run that fails (its data, backbone, weights or device are not to be had, or it
    diverges) leaves the others going, and nothing of it stays. At the end one ValueError, OSError, FloatingPointError
    or RuntimeError names all that failed; or the dict `failed` gets them with their errors, and their results are None.
    Ctrl-C ends all processes; its KeyboardInterrupt says how many runs are done.

    `cluster` is the address of a Dask scheduler, whose workers then execute the runs: one at a time each, on all of the
    worker's threads, or on its GPU where workers have the resource `GPU`. They need this library, and the images in a
    data folder of their own; what a run starts from travels with it, and its files come back, so that no disk need be
    shared. When a worker dies, another one does its run again.
    """
    from joblib import cpu_count
    from tqdm import tqdm

    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    jobs = jobs or (1 if cluster or pick_device(device).type == "cuda" else cpu_count())
    _digest_of.cache_clear()  # files may have been replaced since
    storage.sweep()
    runs, errors = list(runs), {}
    asked = {run.key: run for run in runs}
    found = {key: entry for key, run in asked.items() if (entry := _entry(folder_of(run)))}
    for key in found:
        report(event="run", status="cached", label=asked[key].label)
    bases = {run.base.key: run.base for key, run in asked.items() if run.base and key not in found}
    bases = {key: run for key, run in bases.items() if not _entry(folder_of(run), *FILES)}
    others = [run.trained for key, run in asked.items() if key not in found and key not in bases]
    done, total = len(found), len(found) + len(bases) + len(others)
    jobs = min(jobs, max(len(bases), len(others), 1))
    quiet = "DEEPKNN_PROGRESS" in os.environ or done == total
    with tqdm(total=total - done, desc="training", unit="run", disable=quiet) as bar:
        try:
            with _workers(jobs, cluster if done < total else "") as send:
                for wave in ([*bases.values()], others):  # what others start from comes first
                    for wait in (False, True):  # what another process is at comes last
                        tasks, wave = wave, []
                        for run, how, said in _outcomes(send, tasks, errors, device, wait):
                            for text in said:
                                report(event="warning", text=f"{run.label}: {text}")
                            if how == "claimed":
                                wave.append(run)
                            elif isinstance(how, Exception):
                                errors[run.key] = run, how
                            else:
                                done += 1
                                report(event="run", status=how, label=run.label)
                            bar.update(how != "claimed")
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{done} of {total} done") from None
    if errors and failed is None:
        first = next(error for _, error in errors.values())
        kind = next(kind for kind in (*_KINDS, RuntimeError) if isinstance(first, kind))
        raise kind("; ".join(f"{run.label}: {error}" for run, error in errors.values())) from first
    if errors:
        failed |= {run: errors[run.key][1] for run in runs if run.key in errors}
    made = (run for key, run in asked.items() if key not in found and key not in errors)
    found |= {run.key: _stored(folder_of(run)) for run in made}
    return [Result(run, *found[run.key]) if run.key in found else None for run in runs]


def _outcomes(send: Callable, runs: list[Run], errors: dict, device: str, wait: bool) -> Iterator[tuple]:
    """Each run, how it ended and its warnings, as they end: `trained`, `cached`, `claimed`, or an error."""
    from joblib import Parallel

    left = [run for run in runs if not run.base or run.base.key not in errors]
    for run in (run for run in runs if run not in left):
        base, error = errors[run.base.key]
        yield run, ValueError(f"{base.label}, which it starts from, failed: {error}"), []
    tasks = [(run, device, wait, data_digest(run), run.base and data_digest(run.base)) for run in left]
    parallel, mask = Parallel(return_as="generator_unordered", batch_size=1), signal.pthread_sigmask
    mask(signal.SIG_BLOCK, [signal.SIGINT])  # Workers inherit it; they end with this process.
    try:
        ended = parallel(send(*task) for task in tasks)
    finally:
        mask(signal.SIG_UNBLOCK, [signal.SIGINT])
    try:
        with contextlib.closing(ended):
            for run, how, said in ended:
                left.remove(run)
                if isinstance(how, dict):  # the files, from a cluster
                    _put(folder_of(run), how)
                    how = "trained"
                yield run, how, said
    except BrokenProcessPool:
        told = "a process was killed, perhaps for want of memory; do fewer runs at once (--jobs)"
        yield from ((run, RuntimeError(told), []) for run in left)


@contextlib.contextmanager
def _workers(jobs: int, cluster: str) -> Iterator[Callable]:
    """Make joblib use processes of this machine, or a Dask cluster; gives what makes a joblib task of a run."""
    from joblib import delayed, parallel_config

    if not cluster:
        told = os.getpid(), {name: value for name, value in os.environ.items() if name.startswith("DEEPKNN_")}
        with parallel_config("loky", n_jobs=jobs, initializer=_begin_worker, initargs=told):
            yield partial(delayed(_attempt), _carry_out)
        return
    try:
        from distributed import Client
        from joblib._dask import DaskDistributedBackend
    except ImportError as error:
        raise ValueError("a cluster needs Dask: pip install '.[cluster]', here and on the workers") from error

    class Backend(DaskDistributedBackend):
        """That of joblib, which waits for ever for a run that Dask gave up, and executes here where one worker is."""

        def effective_n_jobs(self, n_jobs):
            return max(2, super().effective_n_jobs(n_jobs))

        def submit(self, func, callback=None):
            def told(future):
                if future.exception():
                    callback([(run, RuntimeError(f"Dask gave it up: {future.exception()}"), [])])

            future, run = super().submit(func, callback), func.items[0][1][1]
            future.add_done_callback(told)
            return future

    def send(run, device, wait, data, base):
        files = base and _files(_folder(run.base, base))
        return delayed(_attempt)(_on_worker, run, device, data, base, files)

    try:
        client = Client(cluster, timeout="10s", set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        told = f"no Dask scheduler answers at {cluster} ({error})"
        raise OSError(f"{told}; start one with `dask scheduler`, and workers") from error
    with client:
        has_gpu = any(
            "GPU" in worker["resources"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()
        )
        with parallel_config(Backend(client=client, **{"resources": {"GPU": 1}} if has_gpu else {})):
            yield send


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU if there is one; ValueError for a device that there is not."""
    if device not in ("auto", "cpu", "cuda"):
        raise storage.unknown("device", device, ("auto", "cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no GPU; use --device cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _begin_worker(parent: int, environment: dict[str, str]) -> None:
    """Make a process ready to execute runs, on one core, and to end when its parent is gone, which asked for them."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(1)
    # Several workers would write over one another's line.
    os.environ.update({"DEEPKNN_PROGRESS": os.devnull} | environment)


def _on_worker(run: Run, device: str, data: str, base: str | None, files: dict | None) -> dict[str, bytes]:
    """Execute a run on a worker of a cluster, in its own data folder, and return the files."""
    from distributed import get_worker

    os.environ.setdefault("DEEPKNN_PROGRESS", os.devnull)
    with _ONE_AT_A_TIME:
        torch.set_num_threads(get_worker().state.nthreads)
        _digest_of.cache_clear()
        if data_digest(run) != data:
            told = f"the worker {get_worker().address} has other images or weights in its {data_dir()}"
            raise ValueError(f"{told}; copy those of this machine there")
        if base:
            _put(_folder(run.base, base), files)
        _carry_out(run, device, True, data, base)
        return _files(_folder(run, data))


def _files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("run.json", *FILES)}


def _put(folder: Path, files: dict[str, bytes]) -> None:
    """Put the files of a run in place, unless they are there."""
    with claim(folder):
        if not _entry(folder, *FILES):
            with whole_file(folder) as fresh:
                fresh.mkdir()
                for name, content in files.items():
                    (fresh / name).write_bytes(content)


def _attempt(work: Callable, run: Run, *what) -> tuple[Run, object, list[str]]:
    """The run, what `work` returned or the error that it raised, and its warnings: a run that fails ends no other."""
    with warnings.catch_warnings(record=True) as said:  # a worker's would end in the cell of a notebook
        try:
            how = work(run, *what)
        except _KINDS as error:
            how = error
        except Exception as error:  # torch has kinds of its own, such as for want of memory
            how = RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    texts = dict.fromkeys(str(one.message) for one in said if issubclass(one.category, UserWarning))
    return run, how, [*texts]


def _carry_out(run: Run, device: str, wait: bool, data: str, base: str | None) -> str:
    """Execute `run` and leave its files; `data` and `base` are the digests of its data and its base's.

    Returns `trained`, or `cached` if another process did it; if one is at it, waits, or returns `claimed`.
    """
    folder, start = _folder(run, data), run.base and _folder(run.base, base)
    with claim(folder, wait) as mine:
        if not mine or _entry(folder, *FILES):
            return "cached" if mine else "claimed"
        storage.sweep(0, f"runs/.{folder.name}*")  # of a process that was killed, as the claim is ours
        where, started = pick_device(device), time.perf_counter()
        torch.backends.cudnn.benchmark = True  # all batches have one shape
        checkpoint = folder.with_name(folder.name + ".checkpoint.pt")
        try:
            _ = checkpoint.is_file() and storage.load_state(checkpoint)
        except ValueError as error:
            warnings.warn(storage.set_aside(checkpoint, error), stacklevel=2)
        execute_one = _on_features if METHODS[run.method].on_features else _on_images
        arrays, history, state, about = execute_one(run, start, checkpoint, where)
        record = {"run": asdict(run), "data": data, "collapsed": collapsed(history, run.config)} | about
        threads = f"cpu ({torch.get_num_threads()} threads a run)"
        record["device"] = torch.cuda.get_device_name() if where.type == "cuda" else threads
        record |= {"seconds": time.perf_counter() - started, "versions": versions(), "commit": commit()}
        with whole_file(folder) as fresh:
            _write(fresh, Result(run, arrays, history, record), state)
        checkpoint.unlink(missing_ok=True)
    return "trained"


def _write(folder: Path, result: Result, state: dict[str, torch.Tensor]) -> None:
    """Write the files of a run; `run.json` has the scores for each K_p, and digests of itself and the other files."""
    from safetensors.torch import save_file

    folder.mkdir()
    np.savez(folder / "features.npz", **result.arrays)
    save_file({n: t.contiguous().cpu() for n, t in state.items()}, folder / "model.safetensors")
    pd.DataFrame(result.history or {"epoch": []}).to_csv(folder / "history.csv", index=False)
    record = result.record | {"scores": scores_of(result)}
    record["checksums"] = _checksums(folder, record, *FILES)
    (folder / "run.json").write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")


def scores_of(result: Result) -> list[dict]:
    """The scores for each K_p that is reported, as JSON has them: None for what is no number."""
    every = dict.fromkeys((*METHODS[result.run.method].votes, result.run.k_predict))
    rows = ({"k_predict": k} | result.scores(k) for k in every)
    return [{name: None if np.isnan(value) else value for name, value in row.items()} for row in rows]


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
    with claim(path):
        try:
            with np.load(path, allow_pickle=False) as stored:
                known = dict(zip(stored["ids"].tolist(), stored["features"], strict=True))
                if stored["checksum"] != digest(stored["ids"], stored["features"]):
                    raise ValueError("its arrays are not those that were written")
        except FileNotFoundError:
            pass
        except Exception as error:  # NumPy raises many kinds
            known = {}
            warnings.warn(storage.set_aside(path, error), stacklevel=2)
        if not all(i in known for held in both.values() for i in held.ids.tolist()):
            for held in both.values():
                images = Rows(held.images, np.arange(len(held)))  # not the whole set at once on a GPU
                features = extract_features(network, images).cpu().numpy()
                known |= dict(zip(held.ids.tolist(), features, strict=True))
            arrays = {"ids": np.array(list(known)), "features": np.stack(list(known.values()))}
            with whole_file(path) as temporary:
                np.savez(temporary, **arrays, checksum=digest(*arrays.values()))
    return {f"{part}_features": np.stack([known[i] for i in held.ids]) for part, held in both.items()}


def _on_features(run: Run, base: Path, *_) -> tuple:
    """The same for a method that learns on the feature vectors of the base run (Table 3)."""
    arrays, _, record = _stored(base)
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
