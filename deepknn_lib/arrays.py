"""Readers of sets that come as arrays: drawn here, from scikit-learn, torchvision or MedMNIST."""

import functools
import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deepknn_lib.images import Listing
from deepknn_lib.storage import data_dir, whole_file

BLOCK = 1000  # images read at a time


def lesions(_: Path, __: str, size: int) -> Listing:
    """The synthetic set, drawn at the size asked for; what is known of the images is kept beside them."""
    from deepknn_lib import looks, synthetic

    source = b"".join(Path(module.__file__).read_bytes() for module in (looks, synthetic))
    key = f"{size}-{hashlib.sha256(source).hexdigest()[:12]}"
    drawn = functools.cache(lambda: synthetic.make_lesions(size=size))
    rows = data_dir() / "cache" / f"lesions-{key}-rows.npz"
    if not rows.is_file():
        with whole_file(rows) as temporary:
            np.savez(temporary, labels=drawn().labels, ids=drawn().ids, groups=drawn().groups)
    with np.load(rows, allow_pickle=False) as kept:
        labels, ids, groups = (kept[name] for name in ("labels", "ids", "groups"))
    return Listing(labels, ids, groups, synthetic.CLASS_NAMES, blocks=lambda: iter([drawn().images]), key=key)


def digits(_: Path, __: str, ___: int) -> Listing:
    """The scans that come with scikit-learn."""
    from sklearn.datasets import load_digits

    scans = load_digits()  # 0 to 16
    images = (scans.images * (255 / 16)).round().astype(np.uint8)[:, None]
    ids = np.array([f"{number:04d}" for number in range(len(images))])
    names = tuple("0123456789")
    return Listing(scans.target.astype(np.int64), ids, ids, names, blocks=lambda: iter([images]), key="digits", channels=1)


def mnist(root: Path, _: str, __: int) -> Listing:
    """MNIST through torchvision."""

    def part(train: bool) -> tuple[np.ndarray, np.ndarray]:
        from torchvision.datasets import MNIST

        data = MNIST(root, train=train, download=True)  # unpacks what `download` has fetched
        return data.data.numpy()[:, None], data.targets.numpy()

    return _official("mnist", root, part, tuple("0123456789"))


def stl10(root: Path, _: str, __: int) -> Listing:
    """STL10 through torchvision."""

    def part(train: bool) -> tuple[np.ndarray, np.ndarray]:
        from torchvision.datasets import STL10

        data = STL10(root, "train" if train else "test", download=True)
        return data.data, data.labels

    names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    return _official("stl10", root, part, names)


def _official(name: str, root: Path, part, names: tuple[str, ...]) -> Listing:
    """Both parts in one listing; the ids say which is which."""
    try:
        parts = {"train": part(True), "test": part(False)}
    except Exception as error:  # half a file, a wrong checksum: torchvision raises many kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{name} cannot be read in {root} ({reason}). Remove that folder and run `python -m deepknn_lib download {name}`"
        ) from error
    labels = np.concatenate([labels for _, labels in parts.values()]).astype(np.int64)
    which = np.repeat(list(parts), [len(labels) for _, labels in parts.values()])
    ids = np.array([f"{part}/{n:05d}" for part, (_, labels) in parts.items() for n in range(len(labels))])
    images = [pixels for pixels, _ in parts.values()]
    digest = hashlib.sha256(labels.tobytes() + str([pixels.shape for pixels in images]).encode()).hexdigest()[:12]
    return Listing(
        labels,
        ids,
        ids,
        names,
        blocks=lambda: (block for pixels in images for block in _blocks(pixels)),
        key=f"{name}-{digest}",
        channels=images[0].shape[1],
        parts=which,
    )


def _blocks(pixels: np.ndarray) -> Iterator[np.ndarray]:
    return (pixels[start : start + BLOCK] for start in range(0, len(pixels), BLOCK))


def medmnist_info(argument: str) -> tuple[dict, int, str]:
    """What the medmnist package says of `<flag>@<size>` (size 28 if left out), the size, and the file's name.

    Raises
    ------
    ValueError
        If there is no such set or size, or its images have no single label each.
    """
    from medmnist import INFO

    flag, _, size = argument.partition("@")
    size = size or "28"
    usable = [f for f, about in INFO.items() if not f.endswith("3d") and not about["task"].startswith("multi-label")]
    if flag not in usable:
        raise ValueError(f"medmnist:{argument}: choose one of the 2-D sets with one label an image: {', '.join(usable)}")
    if size not in {"28", "64", "128", "224"}:
        raise ValueError(f"medmnist:{argument}: the sizes are 28, 64, 128 and 224, as in medmnist:{flag}@64")
    return INFO[flag], int(size), f"{flag}.npz" if size == "28" else f"{flag}_{size}.npz"


def medmnist(root: Path, argument: str, _: int) -> Listing:
    """A set of MedMNIST+; its validation part is put to the training part. No patients are known."""
    info, size, name = medmnist_info(argument)
    archive, parts = root / name, ("train", "val", "test")
    try:
        with np.load(archive, allow_pickle=False) as stored:
            labels = {part: stored[f"{part}_labels"].astype(np.int64).reshape(-1) for part in parts}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{archive} cannot be read ({error}). Remove it and run `python -m deepknn_lib download medmnist:{argument}`"
        ) from error
    names = tuple(info["label"][str(number)] for number in range(len(info["label"])))
    every = np.concatenate(list(labels.values()))
    if every.min() < 0 or every.max() >= len(names):
        raise ValueError(f"{archive} holds the label {every.max()}, but {argument} has {len(names)} classes; get it again")
    ids = np.array([f"{part}/{n:06d}" for part in parts for n in range(len(labels[part]))])
    return Listing(
        every,
        ids,
        ids,
        names,
        blocks=lambda: (block for part in parts for block in _npz_blocks(archive, f"{part}_images")),
        key=f"{archive.stat().st_size}-{archive.stat().st_mtime_ns}",
        channels=info["n_channels"],
        parts=np.repeat(["train", "train", "test"], [len(labels[part]) for part in parts]),
        title=f"{info['python_class']} (MedMNIST+, {size} × {size})",
    )


def _npz_blocks(archive: Path, name: str) -> Iterator[np.ndarray]:
    """Images uint8 (n, C, H, W) of one array of an .npz, a block at a time: at 224 pixels an array may be 14 GB."""
    with zipfile.ZipFile(archive) as stored, stored.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if fortran or dtype != np.uint8 or len(shape) not in (3, 4):
            raise ValueError(f"{archive}: {name} is {dtype} {shape}, not bytes (N, H, W) or (N, H, W, 3); get it again")
        each = int(np.prod(shape[1:]))
        for start in range(0, shape[0], BLOCK):
            n = min(BLOCK, shape[0] - start)
            block = np.frombuffer(bytearray(file.read(n * each)), dtype=np.uint8).reshape(n, *shape[1:])
            yield block[:, None] if block.ndim == 3 else block.transpose(0, 3, 1, 2)
