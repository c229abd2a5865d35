"""What `python -m deepknn_lib bench` compares around training: images, the search of neighbours, and the start."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from deepknn_lib.bench import FAISS, OURS, SKLEARN, absent, alternate, fresh_peak, installed, judged, rows_of
from deepknn_lib.storage import data_dir, repository

_AGREE = 0.999  # of the neighbours that another search finds have to be ours: the others are ties


def images(device: torch.device, quick: bool) -> Iterator[list[dict]]:
    """Images a second into a training step: random crops and flips, normalised, on the device, in batches of 96."""
    from torchvision import datasets as theirs
    from torchvision import transforms as t

    from deepknn_lib.augment import MEAN, STD, crop_size, normalize, random_crop_flip
    from deepknn_lib.datasets import load_dataset
    from deepknn_lib.training import on_device

    count, size = (70, 64) if quick else (1000, 256)
    with tempfile.TemporaryDirectory() as name:
        root = _jpegs(Path(name) / "photographs", count)
        steps = [t.Resize((size, size)), t.RandomCrop(crop_size(size)), t.RandomHorizontalFlip(), t.ToTensor()]
        folder = theirs.ImageFolder(root, t.Compose([*steps, t.Normalize(MEAN, STD)]))
        workers = 1 if quick else os.cpu_count()
        loader = torch.utils.data.DataLoader(folder, 96, shuffle=True, num_workers=workers, persistent_workers=True,
                                             pin_memory=device.type == "cuda")  # fmt: skip
        generator = torch.Generator().manual_seed(0)

        def torchvision() -> None:
            for batch, labels in loader:
                batch.to(device, non_blocking=True), labels.to(device, non_blocking=True)

        def load() -> list:
            data = load_dataset(f"folder:{root}", image_size=size)
            return [on_device(part.images, device) for part in (data.train, data.test)]

        def epoch(parts: list) -> None:
            for part in parts:
                for index in torch.randperm(len(part), generator=generator).to(device).split(96):
                    crops = random_crop_flip(part[index], crop_size(size), generator)
                    normalize(crops).contiguous(memory_format=torch.channels_last)

        def first() -> None:
            shutil.rmtree(Path(name) / "data", ignore_errors=True)
            epoch(load())

        with mock.patch.dict(os.environ, {"DEEPKNN_DATA": str(Path(name) / "data")}):
            decoded, rival = load(), f"torchvision, {workers} workers"
            for state, call, least in (
                ("decoded before", lambda: epoch(decoded), 20.0 if device.type == "cuda" else 3.0),
                ("first epoch, decoding included", first, 1.0),
            ):
                times = alternate({OURS: call, rival: torchvision}, device, 3, 3 if quick else 5, seconds=40)
                yield rows_of(f"{state}: {count} JPEGs of 600 x 450", times, least, images=count)


def _jpegs(root: Path, count: int) -> Path:
    from PIL import Image

    from deepknn_lib.synthetic import make_lesions

    lesions = make_lesions(count, 16 if count < 100 else 128)
    for number, (image, label) in enumerate(zip(lesions.images, lesions.labels, strict=True)):
        (root / f"class{label}").mkdir(parents=True, exist_ok=True)
        large = Image.fromarray(image.transpose(1, 2, 0)).resize((600, 450), Image.Resampling.BICUBIC)
        large.save(root / f"class{label}" / f"{number:05d}.jpg", quality=90)
    return root


def searches(n_queries: int, n_gallery: int, width: int, device: torch.device, _: bool = True) -> dict[str, Callable]:
    """The rows of the five nearest, by every exact search there is."""
    from sklearn.neighbors import NearestNeighbors

    from deepknn_lib import search as neighbor_search
    from deepknn_lib.neighbors import nearest_neighbors

    rng = np.random.default_rng(0)
    queries, gallery = (rng.standard_normal((n, width), dtype=np.float32) for n in (n_queries, n_gallery))
    there = [torch.from_numpy(part).to(device) for part in (queries, gallery)]
    calls = {OURS: lambda: nearest_neighbors(*there, 5)[1]}
    if installed(FAISS):
        import faiss

        def flat() -> np.ndarray:
            index = faiss.IndexFlatL2(width)
            index.add(gallery)
            return index.search(queries, 5)[1]

        calls[FAISS] = flat

    def brute(part: slice = slice(None)) -> np.ndarray:
        return NearestNeighbors(n_neighbors=5, algorithm="brute").fit(gallery).kneighbors(queries[part])[1]

    def alone() -> torch.Tensor:
        with mock.patch.object(neighbor_search, "FAISS_FROM", float("inf")):
            return nearest_neighbors(*there, 5)[1]

    return calls | {SKLEARN: brute} | ({f"{OURS} without FAISS": alone} if FAISS in calls and device.type == "cpu" else {})


def _expected(search_part: Callable, n_queries: int) -> float:
    """Seconds of a search of all queries, from a few of them and twice as many."""
    few = max(n_queries // 100, 1)
    trial = {count: lambda count=count: search_part(slice(0, count)) for count in (few, 2 * few)}
    short, long = (spent.min() for spent in alternate(trial, torch.device("cpu"), 1, 1).values())
    return short + max(long - short, 0) * (n_queries / few - 1)


def search(device: torch.device, quick: bool) -> Iterator[list[dict]]:
    """Exact search of the five nearest: Q queries in G rows of D features. The others search on the CPU in any case."""
    shapes = ((200, 800, 64), (100, 10_000, 32)) if quick else ((2005, 8005, 2048), (10_000, 1_000_000, 128))
    for shape in shapes:
        setting, calls = "Q={:,}, G={:,}, D={:,}".format(*shape), searches(*shape, device)
        rest = [] if FAISS in calls else [absent(FAISS, setting)]
        expected = _expected(calls[SKLEARN], shape[0])
        if expected > 60:
            del calls[SKLEARN]
            rest.append({"what": SKLEARN, "setting": setting, "note": f"skipped, it would take about {expected:.0f} s"})
        found = {what: np.sort(np.asarray(torch.as_tensor(call()).cpu())) for what, call in calls.items()}
        notes = {}
        for what, indices in found.items():
            same = np.mean([len(np.intersect1d(*pair)) / 5 for pair in zip(indices, found[OURS], strict=True)])
            if same < _AGREE:
                raise ValueError(f"{what} and {OURS} agree on {same:.2%} of the neighbours only at {setting}")
            notes[what] = f"{same:.4%} of its neighbours are ours" + ", on the CPU" * (device.type == "cuda")
        times = alternate(calls, device, 3, 3 if quick else 30, seconds=60, warm=False)  # they just were
        rows = rows_of(setting, times, 1.0 if FAISS in calls else None)
        peak = fresh_peak("search", OURS, device, shape, quick)
        rows[0] |= {"peak_mb": peak} | judged(peak, "peak <= 1000 MB", peak <= 1000)
        yield rows[:1] + [row | {"note": notes[row["what"]]} for row in rows[1:]] + rest


def start(device: torch.device, quick: bool) -> Iterator[list[dict]]:
    """Importing the library, and how long `python -m deepknn_lib run` takes to its first training step."""
    from deepknn_lib.datasets import load_dataset

    def importing(module: str) -> Callable:
        return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], cwd=repository(), check=True)

    calls = {f"import {name}": importing(name) for name in (OURS, "torch")}
    times = alternate(calls, torch.device("cpu"), 1 if quick else 5, 1 if quick else 5, warm=not quick)
    yield rows_of("a fresh process", times, 1 / 2)
    load_dataset("lesions", image_size=32)  # drawn on first use, which is not to be measured
    waits = np.array([_until_training(device) for _ in range(1 if quick else 5)])
    wait = np.median(waits)
    (row,) = rows_of("until training starts: smoke profile, deep-knn, cached lesions", {f"python -m {OURS} run": waits})
    yield [row | judged(wait, "median <= 10 s", wait <= 10)]


def _until_training(device: torch.device) -> float:
    """Seconds from the start of the process to its first step: to the end of the only epoch, without that epoch's own."""
    import pandas as pd

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cache").mkdir()
        for path in (data_dir() / "cache").glob("lesions-32-*"):
            shutil.copy(path, folder / "cache")
        progress = folder / "progress"
        surroundings = os.environ | {"DEEPKNN_DATA": name, "DEEPKNN_PROGRESS": str(progress)}
        command = [sys.executable, "-m", OURS, "run", "--profile", "smoke", "--method", "deep-knn"]
        command += ["--device", device.type, "--out", str(folder / "run")]
        started, ended = time.perf_counter(), None
        process = subprocess.Popen(command, cwd=repository(), env=surroundings, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if ended is None and progress.is_file() and "epoch" in progress.read_text(encoding="utf-8"):
                ended = time.perf_counter()
            time.sleep(0.005)
        if process.returncode or ended is None:
            raise OSError(f"`{' '.join(command[1:])}` ended with {process.returncode}")
        epoch = pd.read_csv(folder / "run" / "history.csv").iloc[0]
        return ended - started - epoch["seconds"] - epoch["eval_seconds"]
