"""Readers: each turns a folder in a known layout into an `Index`, with all that is wrong in it, and opens no image."""

import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from deepknn_lib.datasets import synthetic
from deepknn_lib.storage import digest

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".dcm")
PNEUMONIA_CLASSES = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")
STL10_CLASSES = tuple("airplane bird car cat deer dog horse monkey ship truck".split())
PARTS = {"train": "train", "val": "train", "valid": "train", "validation": "train", "test": "test"}
BLOCK = 500  # images read at a time


class Problem(NamedTuple):
    """One thing wrong with a data set: which check found it, in which file or row, why and what to do."""

    check: str
    item: str
    reason: str


@dataclass(frozen=True)
class Index:
    """What a data set holds, before any image is opened; row i of every array belongs to image i."""

    labels: np.ndarray  # int64 (N,)
    ids: np.ndarray  # str (N,)
    groups: np.ndarray  # str (N,): the lesion or patient
    class_names: tuple[str, ...]
    files: list[Path] = field(default_factory=list)  # one a row, or none and then blocks
    blocks: Callable[[int], Iterator[np.ndarray]] | None = (
        None  # from an image size to uint8 (n, channels, H, W)
    )
    key: str = ""  # names what made the arrays; files are known by size and time of change
    parts: np.ndarray | None = None  # "train" or "test" (N,), where a set comes in two parts
    problems: tuple[Problem, ...] = ()
    channels: int = 3
    title: str = ""  # where it says more than the catalogue's

    def __len__(self) -> int:
        return len(self.labels)


def table(path: Path, *columns: str) -> pd.DataFrame:
    """A CSV (or tab-separated .tab) file as text; an error that names it if it is missing or lacks a column."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; see data/README.md for the layout")
    options = {"sep": "\t" if path.suffix == ".tab" else ",", "encoding": "utf-8-sig", "index_col": False}
    try:
        rows = pd.read_csv(path, dtype=str, na_filter=False, **options)
    except ValueError as error:  # pandas' own errors and those of the encoding
        raise ValueError(f"{path} cannot be read as a table ({error}); save it as CSV in UTF-8") from error
    if not set(columns) <= set(rows.columns):
        raise ValueError(f"{path} needs the columns {', '.join(columns)}; it has {', '.join(rows.columns)}")
    return rows


def inside(folder: Path, *suffixes: str) -> list[Path]:
    """What lies right inside a folder and ends so, by name, without hidden files."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise OSError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
    return [folder / name for name in names if not suffixes or name.lower().endswith(suffixes)]


def index_of_files(rows: Iterable[tuple], files: dict[str, Path], names: tuple, source: Path) -> Index:
    """The index of a table's rows (id, class, group) and the files by id; what does not fit is a problem."""
    problems, kept, rows = [], {}, sorted(rows)
    for image, kind, group in rows:
        wrong = {
            "duplicate id": (image in kept, "again; keep one of its rows"),
            "row without image": (
                image not in files,
                "but no file is; unpack the images again, or remove the row",
            ),
            "unknown class": (kind not in names, f"as {kind!r}; the classes are {', '.join(names)}"),
            "no group": (not group, "without a lesion or patient; give it one"),
        }
        found = [(check, reason) for check, (is_wrong, reason) in wrong.items() if is_wrong][:1]
        problems += [Problem(check, image, f"is in {source}, {reason}") for check, reason in found]
        if not found:
            kept[image] = (names.index(kind), group)
    for image in sorted(files.keys() - {image for image, _, _ in rows}):
        problems.append(
            Problem("image without row", image, f"is not in {source}; add a row or remove the image")
        )
    labels, groups = np.array(list(kept.values()), str).reshape(-1, 2).T
    ids, paths = np.array(list(kept), str), [files[image] for image in kept]
    return Index(labels.astype(np.int64), ids, groups, names, paths, problems=tuple(problems))


def skin7(root: Path, _: str) -> Index:
    """HAM10000, as the official files of ISIC 2018 Task 3 or those of Harvard Dataverse; groups are lesions."""
    names, task = synthetic.CLASS_NAMES, "ISIC2018_Task3_Training"
    if (root / f"{task}_Input").exists():
        source, folders = root / f"{task}_GroundTruth" / f"{task}_GroundTruth.csv", [root / f"{task}_Input"]
        columns = [name.upper() for name in names]
        truth, lesions = table(source, "image", *columns), root / f"{task}_LesionGroupings.csv"
        lesion = dict(table(lesions, "image", "lesion_id")[["image", "lesion_id"]].to_numpy())
        marks = truth[columns].apply(pd.to_numeric, errors="coerce").to_numpy()
        clear = np.isin(marks, (0, 1)).all(1) & (marks.sum(1) == 1)
        kinds = np.where(clear, np.array(names)[np.nan_to_num(marks).argmax(1)], "no or several classes")
        rows = [
            (image, kind, lesion.get(image, "")) for image, kind in zip(truth["image"], kinds, strict=True)
        ]
    else:
        source = next(path for path in sorted(root.glob("HAM10000_metadata*")) if path.is_file())
        folders = [root, *filter(Path.is_dir, root.glob("HAM10000_images_part_[12]"))]
        columns = ["image_id", "dx", "lesion_id"]
        rows = table(source, *columns)[columns].itertuples(index=False, name=None)
    files = {path.stem: path for folder in folders for path in inside(folder, ".jpg")}
    return index_of_files(rows, files, names, source)


def skin7_folds_file(root: Path) -> Path:
    """Where the authors' folds are; FileNotFoundError, which says how to get them, if they are not there."""
    path = Path(os.environ.get("DEEPKNN_SKIN7_FOLDS") or root / "folds.csv").expanduser()
    if not path.is_file():
        how = "get them with `python -m deepknn_lib download skin7`, point DEEPKNN_SKIN7_FOLDS at a CSV with the"
        how += " columns image,test_fold (see data/README.md), or use split='grouped'"
        raise FileNotFoundError(
            f"skin7's paper split needs the authors' folds, and there is no {path}: {how}"
        )
    return path


def skin7_folds(root: Path, index: Index, _: int) -> np.ndarray:
    """The authors' five folds of images: int64 (N,), 1..5; ValueError if the file does not name every image once."""
    path = skin7_folds_file(root)
    folds = table(path, "image", "test_fold")
    again = folds["image"].duplicated()
    for row in np.flatnonzero(again | ~folds["test_fold"].isin(list("12345")))[:1]:
        what = (
            "is there again"
            if again[row]
            else f"has test_fold {folds['test_fold'][row]!r}, which is not 1..5"
        )
        raise ValueError(
            f"{path}, line {row + 2}: {folds['image'][row]!r} {what}; correct or remove that line"
        )
    found = folds.set_index("image")["test_fold"].reindex(index.ids)
    for image in found.index[found.isna()][:1]:
        what = f"gives no fold to {found.isna().sum()} images, the first is {image}"
        raise ValueError(f"{path} {what}; is it this set's?")
    return found.to_numpy().astype(np.int64)


def pneumonia(root: Path, _: str) -> Index:
    """The RSNA Pneumonia Detection Challenge as Kaggle's archive unpacks; one image a patient, who is the group."""
    source = root / "stage_2_detailed_class_info.csv"
    known = table(source, "patientId", "class")[
        ["patientId", "class"]
    ].drop_duplicates()  # it has a row a box
    rows = [(patient, kind, patient) for patient, kind in known.itertuples(index=False)]
    files = {path.stem: path for path in inside(root / "stage_2_train_images", ".dcm")}
    return index_of_files(rows, files, PNEUMONIA_CLASSES, source)


def sd198(root: Path, _: str) -> Index:
    """SD-198, or those of its classes that are there, as class folders; every image is its own group."""
    index = chestxray3(root, "")
    n_classes = len(index.class_names)
    return replace(index, title="SD-198" if n_classes == 198 else f"SD-198, {n_classes} of its 198 classes")


def sd198_folds(root: Path, index: Index, fold: int) -> np.ndarray | None:
    """A fold of SD-198's own split files: `fold` for its test images, 0 for others; None if no files fit the images.

    A pair of files, `…train_1.txt` with `…val_1.txt` or `…test_1.txt`, is a fold; each line is a file below `images/`
    and a number. Pairs that hold other images (of a selection of classes) are passed over.
    """
    pairs, known = {}, set(index.ids.tolist())
    for path in sorted([*root.glob("*.txt"), *root.glob("*/*.txt")]):
        if part := re.search("train|val|test", path.name):
            lines = path.read_text(encoding="utf-8").splitlines()
            pair = pairs.setdefault(
                path.with_name(path.name.replace(part[0], "*", 1)), {"train": [], "test": []}
            )
            pair["train" if part[0] == "train" else "test"] = [
                line.rsplit(maxsplit=1)[0] for line in lines if line.strip()
            ]
    fitting = [pair for _, pair in sorted(pairs.items()) if {*pair["train"], *pair["test"]} == known]
    if not fitting:
        return None
    if fold > len(fitting):
        raise ValueError(
            f"sd198's split files in {root} make {len(fitting)} folds, and there is no fold {fold}"
        )
    pair = fitting[fold - 1]
    image, count = Counter(pair["train"] + pair["test"]).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"sd198's split files in {root} name {image} twice in fold {fold}; keep one of the lines"
        )
    return np.where(np.isin(index.ids, pair["test"]), fold, 0)


def folder(root: Path, _: str) -> Index:
    """Anyone's class folders."""
    return replace(chestxray3(root, ""), title=root.name)


def chestxray3(root: Path, _: str) -> Index:
    """Class folders in `root` or its `images/`, or in `train/` and `test/` there; groups from `groups.csv`."""
    base, source = root / "images" if (root / "images").is_dir() else root, root / "groups.csv"
    folders = [path for path in inside(base) if path.is_dir()]
    nested = [c for part in folders if part.name.lower() in PARTS for c in inside(part) if c.is_dir()]
    is_split = {PARTS[path.parent.name.lower()] for path in nested} == {"train", "test"}
    folders = nested if is_split else folders
    names = tuple(sorted({path.name for path in folders}))
    if len(names) < 2:
        what = "must hold a sub-folder with images for each of at least 2 classes"
        raise ValueError(f"{base} {what}; it has {len(names)}")
    found = [path for folder in folders for path in inside(folder, *SUFFIXES)]
    files = {path.relative_to(base).as_posix(): path for path in found}
    group = zip(files, files, strict=True)
    if source.is_file():
        listed = table(source, "file")
        columns = [name for name in listed.columns if name != "file"]
        if not columns:
            raise ValueError(f"{source} needs the column file and one more, such as patient_id")
        group = zip(listed["file"].str.removeprefix("images/"), listed[columns[0]], strict=True)
    rows = [(image, Path(image).parent.name, group) for image, group in group]
    index = index_of_files(rows, files, names, source)
    reason = f"has no images in {base}; add some or remove the folder"
    empty = sorted(set(names) - {path.parent.name for path in found})
    problems = (*index.problems, *(Problem("empty class", name, reason) for name in empty))
    which = [PARTS[image.split("/")[0].lower()] for image in index.ids.tolist()] if is_split else None
    return replace(index, parts=np.array(which) if is_split else None, problems=problems)


def lesions(_: Path, __: str) -> Index:
    """The synthetic set, drawn at the size asked for."""
    key = digest(Path(synthetic.__file__), synthetic.LOOKS_FILE)
    return Index(*synthetic.describe(), synthetic.CLASS_NAMES, blocks=synthetic.draw, key=key)


def digits(_: Path, __: str) -> Index:
    """The scans that come with scikit-learn."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = (scans.images * (255 / 16)).round().astype(np.uint8)[:, None]  # from 0 to 16
    ids = np.array([f"{number:04d}" for number in range(len(images))])
    index = index_of_arrays({"": (images, scans.target)}, tuple("0123456789"))
    return replace(index, ids=ids, groups=ids, parts=None)


def mnist(root: Path, _: str) -> Index:
    """MNIST through torchvision, which unpacks what `download` has fetched."""
    from torchvision.datasets import MNIST

    parts = {part: MNIST(root, train=part == "train", download=True) for part in ("train", "test")}
    arrays = {part: (data.data.numpy()[:, None], data.targets.numpy()) for part, data in parts.items()}
    return index_of_arrays(arrays, tuple("0123456789"))


def stl10(root: Path, _: str) -> Index:
    """STL10 through torchvision, which unpacks what `download` has fetched."""
    from torchvision.datasets import STL10

    parts = {part: STL10(root, part, download=True) for part in ("train", "test")}
    return index_of_arrays({part: (data.data, data.labels) for part, data in parts.items()}, STL10_CLASSES)


def index_of_arrays(parts: dict[str, tuple[np.ndarray, np.ndarray]], names: tuple[str, ...]) -> Index:
    """The index of parts with images uint8 (n, C, H, W) and labels (n,); every image is its own group."""
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts.values(), strict=True))
    ids = np.array([f"{part}/{n:05d}" for part, (_, of_part) in parts.items() for n in range(len(of_part))])
    more = {"parts": np.array([i.split("/")[0] for i in ids.tolist()]), "channels": images.shape[1]}
    more["blocks"] = lambda _: (images[start : start + BLOCK] for start in range(0, len(images), BLOCK))
    return Index(labels.astype(np.int64), ids, ids, names, key=digest(images), **more)


def medmnist_info(argument: str) -> tuple[dict, str, str]:
    """What the medmnist package says of `<flag>@<size>` (28 if left out; else a ValueError), the size, the file."""
    from medmnist import INFO

    flag, _, size = argument.partition("@")
    usable = [f for f, about in INFO.items() if not f.endswith("3d") and "multi-label" not in about["task"]]
    if flag not in usable:
        what = f"choose one of the 2-D sets with one label an image: {', '.join(usable)}"
        raise ValueError(f"medmnist:{argument}: {what}")
    if size not in ("", "28", "64", "128", "224"):
        raise ValueError(f"medmnist:{argument}: the sizes are 28, 64, 128 and 224, as in medmnist:{flag}@64")
    return INFO[flag], size or "28", f"{flag}.npz" if size in ("", "28") else f"{flag}_{size}.npz"


def medmnist(root: Path, argument: str) -> Index:
    """A set of MedMNIST+; its validation part is put to the training part. No patients are known."""
    info, size, name = medmnist_info(argument)
    path, parts = root / name, ("train", "val", "test")
    with np.load(path, allow_pickle=False) as stored:
        labels = {part: stored[f"{part}_labels"].astype(np.int64).reshape(-1) for part in parts}
    ids = np.array([f"{part}/{n:06d}" for part in parts for n in range(len(labels[part]))])
    names = tuple(info["label"][str(n)] for n in range(len(info["label"])))
    more = {"channels": info["n_channels"], "title": f"{info['python_class']} (MedMNIST+, {size} × {size})"}
    more["parts"] = np.repeat(["train", "train", "test"], [len(labels[part]) for part in parts])
    more["blocks"] = lambda _: (block for part in parts for block in _npz_blocks(path, f"{part}_images"))
    key = digest(f"{path.stat().st_size} {path.stat().st_mtime_ns}")
    return Index(np.concatenate(list(labels.values())), ids, ids, names, key=key, **more)


def _npz_blocks(path: Path, name: str) -> Iterator[np.ndarray]:
    """Images uint8 (n, C, H, W) of an array in an .npz, a block at a time: at 224 pixels an array may have 14 GB."""
    with zipfile.ZipFile(path) as stored, stored.open(f"{name}.npy") as file:
        np.lib.format.read_magic(file)
        (n, *shape), _, _ = np.lib.format.read_array_header_1_0(file)
        for start in range(0, n, BLOCK):
            rows = min(BLOCK, n - start)
            block = np.frombuffer(file.read(rows * math.prod(shape)), np.uint8).reshape(rows, *shape)
            yield block[:, None] if block.ndim == 3 else block.transpose(0, 3, 1, 2)


_READERS = (lesions, skin7, pneumonia, sd198, chestxray3, medmnist, stl10, mnist, digits, folder)
READERS = {reader.__name__: reader for reader in _READERS}
PUBLISHED_FOLDS = {"skin7": skin7_folds, "sd198": sd198_folds}
