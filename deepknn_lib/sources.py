"""Readers of image files: each turns a folder in a known layout into an `ImageSet`, class names and `info`."""

import csv
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepknn_lib.storage import data_dir, whole_file

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
SKIN7_CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
# Of the sets that are not made here: what must lie in data_dir()/<name>, where it comes from, what to put there.
PLACES = {
    "skin7": (
        "ISIC2018_Task3_Training_Input",
        "from the ISIC Challenge 2018 data page",
        "Unpack the three ISIC 2018 Task 3 training downloads (Input, GroundTruth, LesionGroupings) there",
    ),
    "sd198": ("", "from its authors, by request", "Put its class folders there"),
    "chestxray3": (
        "groups.csv",
        "from Mendeley Data, Kermany et al. 2018",
        "Put the class folders bacteria, normal and virus there, and groups.csv with the columns file,patient_id",
    ),
    "mnist": (
        "MNIST/raw/train-images-idx3-ubyte",
        "downloaded on first use, 12 MB",
        "Without a network, put the four .gz files (train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
        "t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz) into its folder MNIST/raw",
    ),
    "stl10": (
        "stl10_binary/train_X.bin",
        "downloaded on first use, 2.6 GB",
        "Without a network, put stl10_binary.tar.gz there",
    ),
}


@dataclass(frozen=True)
class ImageSet:
    """Images with what is known of each.

    Attributes
    ----------
    images : ndarray, uint8, (N, C, H, W)
        C is 3, or 1 for grey ones.
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


Read = tuple[ImageSet, tuple[str, ...], dict]  # images, class names, info


def place(name: str) -> Path:
    """The folder of a set in `PLACES`; FileNotFoundError, which says what to put where, if it is not there."""
    wanted, origin, advice = PLACES[name]
    root = data_dir() / name
    if name == "skin7" and not (root / wanted).exists() and (data_dir() / wanted).exists():
        return data_dir()  # unpacked one folder higher
    if not (root / wanted).exists():
        raise FileNotFoundError(f"{name} is not in {root} ({origin}). {advice}; see data/README.md")
    return root


def skin7_folds() -> Path:
    """The authors' folds; FileNotFoundError, which says how to get them, if they are not there."""
    given = os.environ.get("DEEPKNN_SKIN7_FOLDS")
    path = Path(given).expanduser() if given else place("skin7") / "folds.csv"
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


def skin7(image_size: int, _: str) -> Read:
    """HAM10000 in the official layout of ISIC 2018 Task 3; groups are lesions."""
    root = place("skin7")
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


def sd198(image_size: int, _: str) -> Read:
    """SD-198, or those of its classes that are there, as class folders; every image is its own group."""
    images, class_names, info = folder(image_size, str(place("sd198")))
    title = "SD-198" if len(class_names) == 198 else f"SD-198, {len(class_names)} of its 198 classes"
    return images, class_names, info | {
        "title": title,
        "licence": "research use, by request from its authors",
        "citation": "Sun et al., A benchmark for automatic visual classification of clinical skin disease images, ECCV 2016",
    }


def chestxray3(image_size: int, _: str) -> Read:
    """Chest X-rays of three classes as class folders, with their patients: a stand-in for the RSNA Pneumonia set."""
    images, class_names, info = folder(image_size, str(place("chestxray3")))
    return images, class_names, info | {
        "title": "chest X-rays (Kermany 2018; a stand-in for Pneumonia)",
        "licence": "CC BY 4.0",
        "citation": "Kermany et al., Identifying medical diagnoses and treatable diseases by image-based deep learning, "
        "Cell 172 (2018)",
    }


def folder(image_size: int, argument: str) -> Read:
    """Class folders in the folder `argument` or in its `images/`; groups from `groups.csv`, if there is one."""
    root = Path(argument).expanduser().resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"folder:{argument}: there is no folder {root}")
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
