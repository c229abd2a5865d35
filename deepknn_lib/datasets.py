"""Data sets by name: images in one uint8 array, labels, ids, groups, and a split.

`lesions` is made on the spot (synthetic), `digits` comes with scikit-learn, torchvision downloads `mnist` and `stl10`;
`sources` reads what lies in files. data/README.md says how to get each and where to put it.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deepknn_lib import sources, splits
from deepknn_lib.sources import ImageSet, Read
from deepknn_lib.storage import data_dir, whole_file

SPLITS = ("paper", "grouped")
OFFICIAL = ("mnist", "stl10")  # their split="paper" is the official training and test part


@dataclass(frozen=True)
class Dataset:
    """A training and a test part, and what a reader has to know about the set.

    Attributes
    ----------
    train, test : ImageSet
    class_names : tuple of str
        In the order of the labels.
    info : dict
        `title`, `synthetic` (bool), `licence`, `citation`, and `smallest`, the label of the class with the
        fewest images in the whole set (the paper's RS is its recall).
    """

    name: str
    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    info: dict = field(default_factory=dict)


def load_dataset(name: str, split: str = "paper", fold: int = 1, image_size: int = 48) -> Dataset:
    """Load a data set, decoding it on first use.

    Parameters
    ----------
    name : str
        A key of `DATASETS`; `folder:<path>` takes anyone's class folders.
    split : {"paper", "grouped"}
        `paper`: five folds of images (for `skin7` the authors', from a file), or the official two parts (`mnist`,
        `stl10`). `grouped`: five folds of lesions or patients, so that no group is in both parts.
    fold : int
        1..5, the fold to test on; the other four are for training. The official parts are fold 1.
    image_size : int
        Side in pixels to which every image is squashed, as the paper did (256). All images are held in memory:
        for `mnist` choose about 32.

    Raises
    ------
    ValueError
        If the name, split or fold is unknown, or the files contradict each other.
    FileNotFoundError
        If the set is not there; the message says what to put where.
    """
    kind, _, argument = name.partition(":")
    if kind not in DATASETS or bool(argument) != (kind == "folder"):
        known = ", ".join(known for known in DATASETS if known != "folder")
        raise ValueError(f"unknown data set {name!r}; choose {known} or folder:<path to class folders>")
    if split not in SPLITS or fold not in range(1, splits.N_FOLDS + 1):
        raise ValueError(f"split is one of {SPLITS} and fold one of 1..{splits.N_FOLDS}, got {split!r} and {fold!r}")
    official = kind in OFFICIAL and split == "paper"
    if official and fold != 1:
        raise ValueError(f"{name} has one official test part, fold 1, and no fold {fold}; five folds: split='grouped'")
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16 pixels, got {image_size}")
    everything, class_names, info = DATASETS[kind](image_size, argument)
    counts = np.bincount(everything.labels, minlength=len(class_names))
    if counts.min() < splits.N_FOLDS:
        raise ValueError(
            f"{name}: class {class_names[counts.argmin()]!r} has {counts.min()} images; five folds need 5 or more. "
            "Add images, or leave the class out"
        )
    if official:
        folds = np.where(np.char.startswith(everything.ids, "test"), 1, 2)
    elif split == "grouped" and kind not in OFFICIAL:
        folds = splits.group_folds(everything.labels, everything.groups)
    elif kind == "skin7":
        folds = splits.folds_from_csv(sources.skin7_folds(), everything.ids)
    else:  # also where every image is its own group, and there are too many for group_folds
        folds = splits.image_folds(everything.labels)
    info |= {"split": split, "fold": fold, "smallest": int(counts.argmin())}
    return Dataset(name, everything.take(folds != fold), everything.take(folds == fold), class_names, info)


def available() -> dict[str, str]:
    """Each data set and whether it is there, or how to get it."""
    states = {"lesions": "there: synthetic, made on first use", "digits": "there: real, comes with scikit-learn"}
    for name in sources.PLACES:
        try:
            states[name] = f"there: {sources.place(name)}"
            if name == "skin7":
                sources.skin7_folds()
        except FileNotFoundError as error:
            states[name] = f"{states[name]}; grouped split only: {error}" if name in states else f"not there: {error}"
    states["folder"] = "folder:PATH, a folder with a sub-folder of images for each class"
    return {name: states[name] for name in DATASETS}


def _kept(name: str, make: Callable[[], ImageSet]) -> ImageSet:
    """What `make` returns, from its copy on disk if there is one."""
    cache = data_dir() / "cache" / f"{name}.npz"
    if not cache.is_file():
        made = make()
        with whole_file(cache) as temporary:
            np.savez(temporary, images=made.images, labels=made.labels, ids=made.ids, groups=made.groups)
    with np.load(cache, allow_pickle=False) as stored:
        return ImageSet(*(stored[key] for key in ("images", "labels", "ids", "groups")))


def _lesions(image_size: int, _: str) -> Read:
    from deepknn_lib import looks, synthetic

    source = b"".join(Path(module.__file__).read_bytes() for module in (looks, synthetic))
    digest = hashlib.sha256(source).hexdigest()[:12]
    images = _kept(f"lesions-{image_size}-{digest}", lambda: synthetic.make_lesions(size=image_size))
    info = {
        "title": "lesions (synthetic stand-in for Skin-7)",
        "synthetic": True,
        "licence": "MIT, made by deepknn_lib.synthetic",
        "citation": "this repository",
    }
    return images, synthetic.CLASS_NAMES, info


def _digits(image_size: int, _: str) -> Read:
    from sklearn.datasets import load_digits

    scans = load_digits()  # 0 to 16
    images = _resize((scans.images * (255 / 16)).round().astype(np.uint8)[:, None], image_size)
    ids = np.array([f"{number:04d}" for number in range(len(images))])
    info = {
        "title": "digits (UCI, real 8 × 8 scans; an offline stand-in for MNIST)",
        "synthetic": False,
        "licence": "CC BY 4.0",
        "citation": "Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998)",
    }
    return ImageSet(images, scans.target.astype(np.int64), ids, ids), tuple("0123456789"), info


def _mnist(image_size: int, _: str) -> Read:
    def part(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
        from torchvision.datasets import MNIST

        data = MNIST(root, train=name == "train", download=True)
        return data.data.numpy()[:, None], data.targets.numpy()

    info = {
        "title": "MNIST",
        "synthetic": False,
        "licence": "CC BY-SA 3.0",
        "citation": "LeCun, Bottou, Bengio & Haffner, Gradient-based learning applied to document recognition, "
        "Proceedings of the IEEE 86 (1998)",
    }
    return _kept(f"mnist-{image_size}", lambda: _official("mnist", image_size, part)), tuple("0123456789"), info


def _stl10(image_size: int, _: str) -> Read:
    def part(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
        from torchvision.datasets import STL10

        data = STL10(root, name, download=True)
        return data.data, data.labels

    names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    info = {
        "title": "STL10",
        "synthetic": False,
        "licence": "none stated; the images come from ImageNet",
        "citation": "Coates, Lee & Ng, An analysis of single-layer networks in unsupervised feature learning, AISTATS 2011",
    }
    return _kept(f"stl10-{image_size}", lambda: _official("stl10", image_size, part)), names, info


def _official(name: str, image_size: int, part: Callable[[Path, str], tuple[np.ndarray, np.ndarray]]) -> ImageSet:
    """Both parts in one; the ids say which is which."""
    root = data_dir() / name
    try:
        parts = {which: part(root, which) for which in ("train", "test")}
    except Exception as error:  # no network, half a file, a wrong checksum: torchvision raises many kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise FileNotFoundError(
            f"{name} could not be downloaded into {root}, or read there ({reason}). Remove what is half there. "
            f"{sources.PLACES[name][2]}; see data/README.md"
        ) from error
    images = np.concatenate([_resize(pixels, image_size) for pixels, _ in parts.values()])
    labels = np.concatenate([labels for _, labels in parts.values()]).astype(np.int64)
    ids = np.array([f"{which}/{n:05d}" for which, (pixels, _) in parts.items() for n in range(len(pixels))])
    return ImageSet(images, labels, ids, ids)


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    """Uint8 (N, C, H, W) to (N, C, size, size), a block at a time, so that the floats between stay few."""
    import torch

    out = np.empty((*images.shape[:2], size, size), dtype=np.uint8)
    for start in range(0, len(images), 1000):
        block = torch.from_numpy(np.ascontiguousarray(images[start : start + 1000])).float()
        resized = torch.nn.functional.interpolate(block, size=(size, size), mode="bilinear", antialias=True)
        out[start : start + 1000] = resized.round().clamp(0, 255).byte().numpy()
    return out


DATASETS = {
    "lesions": _lesions,
    "skin7": sources.skin7,
    "sd198": sources.sd198,
    "chestxray3": sources.chestxray3,
    "stl10": _stl10,
    "mnist": _mnist,
    "digits": _digits,
    "folder": sources.folder,
}
