"""Data sets by name: images in one uint8 array, labels, ids, groups, and a split.

`lesions` is made on the spot (synthetic). `skin7` is read from the official ISIC 2018 Task 3 files. `folder:<path>`
takes anyone's class folders. data/README.md says how to get each and where to put it.
"""

import csv
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deepknn_lib import splits
from deepknn_lib.storage import data_dir, whole_file

SPLITS = ("paper", "grouped")
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class ImageSet:
    """Images with what is known of each.

    Attributes
    ----------
    images : ndarray, uint8, (N, C, H, W)
    labels : ndarray, int64, (N,)
    ids : ndarray, str, (N,)
    groups : ndarray, str, (N,)
        The lesion or patient an image shows.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> "ImageSet":
        """The images at `index` (integers or a mask)."""
        return ImageSet(self.images[index], self.labels[index], self.ids[index], self.groups[index])


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
        `lesions`, `skin7` or `folder:<path>`.
    split : {"paper", "grouped"}
        `paper`: five folds of images (for `skin7` the authors', from a file). `grouped`: five folds of lesions or
        patients, so that no group is in both parts.
    fold : int
        1..5, the fold to test on; the other four are for training.
    image_size : int
        Side in pixels to which every image is squashed, as the paper did (256).

    Raises
    ------
    ValueError
        If the name, split or fold is unknown, or the files contradict each other.
    FileNotFoundError
        If the set is not there; the message says what to put where.
    """
    kind, _, argument = name.partition(":")
    if kind not in DATASETS or bool(argument) != (kind == "folder"):
        raise ValueError(f"unknown data set {name!r}; choose lesions, skin7 or folder:<path to class folders>")
    if split not in SPLITS or fold not in range(1, splits.N_FOLDS + 1):
        raise ValueError(f"split is one of {SPLITS} and fold one of 1..{splits.N_FOLDS}, got {split!r} and {fold!r}")
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16 pixels, got {image_size}")
    everything, class_names, info = DATASETS[kind](image_size, argument)
    counts = np.bincount(everything.labels, minlength=len(class_names))
    if counts.min() < splits.N_FOLDS:
        raise ValueError(
            f"{name}: class {class_names[counts.argmin()]!r} has {counts.min()} images; five folds need 5 or more. "
            "Add images, or leave the class out"
        )
    if split == "grouped":
        folds = splits.group_folds(everything.labels, everything.groups)
    elif kind == "skin7":
        folds = splits.folds_from_csv(_skin7_folds(), everything.ids)
    else:
        folds = splits.image_folds(everything.labels)
    info |= {"split": split, "fold": fold, "smallest": int(counts.argmin())}
    return Dataset(name, everything.take(folds != fold), everything.take(folds == fold), class_names, info)


def available() -> dict[str, str]:
    """Each data set and whether it is there, or how to get it."""
    state = {"lesions": "there: synthetic, made on first use"}
    try:
        root = _skin7_root()
        state["skin7"] = f"there: {root}"
        _skin7_folds()
    except FileNotFoundError as error:
        state["skin7"] = f"{state['skin7']}; grouped split only: {error}" if "skin7" in state else f"not there: {error}"
    return state | {"folder": "folder:PATH, a folder with a sub-folder of images for each class"}


def _lesions(image_size: int, _: str) -> tuple[ImageSet, tuple[str, ...], dict]:
    from deepknn_lib import looks, synthetic

    source = b"".join(Path(module.__file__).read_bytes() for module in (looks, synthetic))
    digest = hashlib.sha256(source).hexdigest()[:12]
    cache = data_dir() / "cache" / f"lesions-{image_size}-{digest}.npz"
    if not cache.is_file():
        made = synthetic.make_lesions(size=image_size)
        with whole_file(cache) as temporary:
            np.savez(temporary, images=made.images, labels=made.labels, ids=made.ids, groups=made.groups)
    with np.load(cache, allow_pickle=False) as stored:
        images = ImageSet(*(stored[key] for key in ("images", "labels", "ids", "groups")))
    info = {
        "title": "lesions (synthetic stand-in for Skin-7)",
        "synthetic": True,
        "licence": "MIT, made by deepknn_lib.synthetic",
        "citation": "this repository",
    }
    return images, synthetic.CLASS_NAMES, info


SKIN7_CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")


def _skin7_root() -> Path:
    places = [data_dir() / "skin7", data_dir()]
    for place in places:
        if (place / "ISIC2018_Task3_Training_Input").is_dir():
            return place
    raise FileNotFoundError(
        f"skin7 is not there: no folder ISIC2018_Task3_Training_Input in {places[0]} or {places[1]}. Unpack the "
        "three ISIC 2018 Task 3 training downloads (Input, GroundTruth, LesionGroupings) there; see data/README.md"
    )


def _skin7_folds() -> Path:
    given = os.environ.get("DEEPKNN_SKIN7_FOLDS")
    path = Path(given).expanduser() if given else _skin7_root() / "folds.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"skin7's paper split needs the authors' folds, and there is no {path}. Point DEEPKNN_SKIN7_FOLDS at a "
            "CSV with the columns image,test_fold (data/README.md says how to make it), or use split='grouped'"
        )
    return path


def _rows(path: Path, *columns: str) -> list[dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; see data/README.md for the layout")
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not set(columns) <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} needs the columns {', '.join(columns)}; it has {reader.fieldnames}")
        return list(reader)


def _skin7(image_size: int, _: str) -> tuple[ImageSet, tuple[str, ...], dict]:
    root = _skin7_root()
    truth = root / "ISIC2018_Task3_Training_GroundTruth" / "ISIC2018_Task3_Training_GroundTruth.csv"
    columns = [name.upper() for name in SKIN7_CLASSES]
    rows = _rows(truth, "image", *columns)
    try:
        one_hot = np.array([[float(row[column]) for column in columns] for row in rows])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{truth}: a class column holds something that is not a number ({error})") from error
    ids = np.array([row["image"] for row in rows])
    if not (one_hot.sum(1) == 1).all() or len(set(ids)) != len(ids):
        raise ValueError(f"{truth} must give every image once, with exactly one class; download it again")
    groupings = root / "ISIC2018_Task3_Training_LesionGroupings.csv"
    lesion = {row["image"]: row["lesion_id"] for row in _rows(groupings, "image", "lesion_id")}
    ungrouped = [i for i in ids if i not in lesion]
    if ungrouped:
        raise ValueError(f"{groupings} has no lesion for {len(ungrouped)} images, the first is {ungrouped[0]}")
    files = [root / "ISIC2018_Task3_Training_Input" / f"{image}.jpg" for image in ids]
    images = decode(files, image_size, "skin7")
    info = {
        "title": "Skin-7 (HAM10000, ISIC 2018 Task 3)",
        "synthetic": False,
        "licence": "CC BY-NC 4.0",
        "citation": "Tschandl, Rosendahl & Kittler, The HAM10000 dataset, Scientific Data 5 (2018)",
    }
    return ImageSet(images, one_hot.argmax(1), ids, np.array([lesion[i] for i in ids])), SKIN7_CLASSES, info


def _folder(image_size: int, argument: str) -> tuple[ImageSet, tuple[str, ...], dict]:
    root = Path(argument).expanduser().resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"folder:{argument}: there is no folder {root}")
    # the class folders may lie in the folder itself or in `images/`
    base = root / "images" if (root / "images").is_dir() else root
    classes = sorted(p for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [f for c in classes for f in sorted(c.iterdir()) if f.suffix.lower() in SUFFIXES]
    class_names = tuple(c.name for c in classes)
    if len(classes) < 2:
        raise ValueError(
            f"{base} must hold a sub-folder with images for each of at least 2 classes; it has {len(classes)}"
        )
    labels = np.array([class_names.index(f.parent.name) for f in files], dtype=np.int64)
    ids = np.array([f.relative_to(base).as_posix() for f in files])
    groups = ids
    if (root / "groups.csv").is_file():
        rows = _rows(root / "groups.csv", "file")
        column = next((c for c in (rows[0] if rows else {}) if c != "file"), None)
        table = {row["file"].removeprefix("images/"): row[column] for row in rows} if column else {}
        lost = [i for i in ids if i not in table]
        if lost:
            raise ValueError(f"{root / 'groups.csv'} has no group for {len(lost)} images, the first is {lost[0]}")
        groups = np.array([table[i] for i in ids])
    info = {"title": root.name, "synthetic": False, "licence": "the user's own", "citation": "the user's own"}
    return ImageSet(decode(files, image_size, f"folder-{root.name}"), labels, ids, groups), class_names, info


def decode(files: list[Path], image_size: int, name: str) -> np.ndarray:
    """All images squashed to a square, decoded once and kept: uint8 (N, 3, image_size, image_size).

    The copy on disk is keyed by the files' paths, sizes and times of change.

    Raises
    ------
    FileNotFoundError, ValueError
        If images are missing or cannot be read; the first few are named.
    """
    from PIL import Image, ImageOps
    from tqdm import tqdm

    missing = [f for f in files if not f.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(files)} images are missing, the first is {missing[0]}")
    stamp = "\n".join(f"{f} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)
    cache = data_dir() / "cache" / f"{name}-{image_size}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.npy"
    if cache.is_file():
        return np.load(cache, allow_pickle=False)

    def read(path: Path) -> np.ndarray | str:
        try:
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
                squashed = upright.resize((image_size, image_size), Image.Resampling.BILINEAR, reducing_gap=3)
                return np.asarray(squashed).transpose(2, 0, 1)
        except Exception as error:  # Pillow raises many kinds; every one means this file
            return f"{path} ({type(error).__name__}: {error})"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read_all = list(tqdm(pool.map(read, files), total=len(files), desc=f"decoding {name}", disable=None))
    bad = [r for r in read_all if isinstance(r, str)]
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(files)} images cannot be read; replace or remove them: " + "; ".join(bad[:3])
        )
    images = np.stack(read_all)
    with whole_file(cache) as temporary:
        np.save(temporary, images)
    return images


DATASETS = {"lesions": _lesions, "skin7": _skin7, "folder": _folder}
