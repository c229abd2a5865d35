"""Readers: each turns a folder in a known layout into an `Index`, with all that is wrong in it, and opens no image."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from deepknn_lib.datasets import synthetic
from deepknn_lib.storage import digest

_ENTRIES = json.loads(Path(__file__).with_name("catalog.json").read_text(encoding="utf-8"))
CATALOG = {name: SimpleNamespace(**entry) for name, entry in _ENTRIES.items()}
PNEUMONIA_CLASSES = tuple(CATALOG["pneumonia"].counts)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".dcm")
PARTS = {"train": "train", "val": "train", "valid": "train", "validation": "train", "test": "test"}


@dataclass(frozen=True)
class Index:
    """What a data set holds, before any image is opened; row i of every array belongs to image i."""

    labels: np.ndarray  # int64 (N,)
    ids: np.ndarray  # str (N,)
    groups: np.ndarray  # str (N,): the lesion or patient
    class_names: tuple[str, ...]
    files: list[Path] = field(default_factory=list)  # one a row, or none and then blocks
    blocks: Callable[[int], Iterator[np.ndarray]] | None = None  # from a size to uint8 (n, channels, H, W)
    key: str = ""  # names what made the arrays; files are known by size and time of change
    parts: np.ndarray | None = None  # "train" or "test" (N,), where a set comes in two parts
    problems: tuple[tuple[str, str, str], ...] = ()  # check, file or row, why and what to do
    channels: int = 3
    title: str = ""  # where it says more than the catalogue's

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_grouped(self) -> bool:
        """Whether several images share a lesion or patient."""
        return len(set(self.groups)) < len(self)


def table(path: Path, *columns: str) -> pd.DataFrame:
    """A CSV (or tab-separated .tab) file as text, named columns first; an error that names the file if it is bad."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; see data/README.md for the layout")
    options = {"sep": "\t" if path.suffix == ".tab" else ",", "encoding": "utf-8-sig", "index_col": False}
    try:
        rows = pd.read_csv(path, dtype=str, na_filter=False, **options)
    except ValueError as error:  # pandas' own errors and those of the encoding
        raise ValueError(f"{path} cannot be read as a table ({error}); save it as CSV in UTF-8") from error
    if not set(columns) <= set(rows.columns):
        raise ValueError(f"{path} needs the columns {', '.join(columns)}; it has {', '.join(rows.columns)}")
    return rows[[*columns, *rows.columns.difference(columns, sort=False)]]


def index_of_rows(rows: pd.DataFrame, files: dict[str, Path], names: tuple, source: Path) -> Index:
    """The index of a table's rows (image, class, group) and the files by id; what does not fit is a problem."""
    rows = rows.set_axis(["image", "class", "group"], axis=1).sort_values("image", ignore_index=True)
    absent, unknown = ~rows["image"].isin(list(files)), ~rows["class"].isin(names)
    checks = {
        "duplicate id": (rows["image"].duplicated(), " again; keep one of its rows"),
        "row without image": (absent, " without a file; unpack again, or remove the row"),
        "unknown class": (unknown, f"; the classes are {', '.join(names)}"),
        "no group": (rows["group"] == "", " without a lesion or patient; give it one"),
    }
    problems, fits = [], pd.Series(True, rows.index)
    for check, (wrong, what) in checks.items():
        told = rows[fits & wrong][["image", "class"]].itertuples(index=False)
        problems += [(check, image, f"is in {source} as {kind!r}{what}") for image, kind in told]
        fits &= ~wrong
    reason = f"is not in {source}; add a row or remove the image"
    missing = sorted(files.keys() - set(rows["image"]))
    problems += [("image without row", image, reason) for image in missing]
    rows = rows[fits]
    labels = rows["class"].map({name: label for label, name in enumerate(names)}).to_numpy(np.int64)
    ids, groups = rows["image"].to_numpy(str), rows["group"].to_numpy(str)
    return Index(labels, ids, groups, names, [files[image] for image in ids], problems=tuple(problems))


def files_of(root: Path, layout: dict) -> dict[str, Path]:
    """The images of a layout of the catalogue, by their names without suffix."""
    return {path.stem: path for pattern in layout["images"] for path in root.glob(pattern)}


def skin7(root: Path, _: str) -> Index:
    """HAM10000, as the official files of ISIC 2018 Task 3 or those of Harvard Dataverse; groups are lesions."""
    layout, names = CATALOG["skin7"].layouts["official"], synthetic.CLASS_NAMES
    source, columns = root / layout["table"], [name.upper() for name in names]
    if (root / layout["images"][0]).parent.exists():
        lesions = table(root / layout["groups"], "image", "lesion_id")
        truth = table(source, "image", *columns)
        rows = truth.merge(lesions, "left", "image").fillna("")
        marks = rows[columns].apply(pd.to_numeric, errors="coerce").fillna(-1)
        clear = marks.isin((0, 1)).all(axis=1) & (marks.sum(axis=1) == 1)
        rows["class"] = marks.idxmax(axis=1).str.lower().where(clear, "no or several classes")
        rows = rows[["image", "class", "lesion_id"]]
    else:
        layout = CATALOG["skin7"].layouts["dataverse"]
        source = next(path for path in sorted(root.glob(layout["table"])) if path.is_file())
        rows = table(source, *layout["columns"])[layout["columns"]]
    return index_of_rows(rows, files_of(root, layout), names, source)


def folds_file(root: Path) -> Path:
    """Where the authors' folds are; FileNotFoundError, which says how to get them, if they are not there."""
    path = Path(os.environ.get("DEEPKNN_SKIN7_FOLDS") or root / "folds.csv").expanduser()
    if not path.is_file():
        how = "get them with `python -m deepknn_lib download skin7`, point DEEPKNN_SKIN7_FOLDS at a CSV with the"
        how += f" columns image,test_fold (see data/README.md), or use split='grouped'; there is no {path}"
        raise FileNotFoundError(f"skin7's paper split needs the authors' folds: {how}")
    return path


def skin7_folds(root: Path, index: Index, _: int) -> np.ndarray:
    """The authors' five folds of images: int64 (N,), 1..5; ValueError if the file does not name every image once."""
    path = folds_file(root)
    folds = table(path, "image", "test_fold")
    again = folds["image"].duplicated()
    for row, image, fold in folds[again | ~folds["test_fold"].isin(list("12345"))].itertuples():
        what = "is there again" if again[row] else f"has test_fold {fold!r}, not 1..5"
        raise ValueError(f"{path}, line {row + 2}: {image!r} {what}; correct or remove it")
    found = folds.set_index("image")["test_fold"].reindex(index.ids)
    missing = found.index[found.isna()]
    if len(missing):
        what = f"{len(missing)} images, the first is {missing[0]}"
        raise ValueError(f"{path} gives no fold to {what}; is it this set's?")
    return found.to_numpy(np.int64)


def dermamnist_c(root: Path, index: Index) -> np.ndarray:
    """The leak-free parts of Abhishek et al. (2025): 1 for their test images, 0 for train, -1 for validation."""
    path = root / "dermamnist_c.csv"
    if not path.is_file():
        how = "get them with `python -m deepknn_lib download skin7` (see data/README.md), or use split='grouped'"
        raise FileNotFoundError(f"skin7's split dermamnist-c needs its parts: {how}; there is no {path}")
    rows = table(path)
    image, part = (
        next((n for n in names if n in rows), None) for names in (("image", "image_id"), ("part", "split"))
    )
    codes = {"train": 0, "val": -1, "test": 1}
    if not (image and part) or rows[image].duplicated().any() or not rows[part].isin(list(codes)).all():
        raise ValueError(
            f"{path} needs an image (or image_id) once a row, and a part (or split): {', '.join(codes)}"
        )
    found = rows.set_index(image)[part].map(codes).reindex(index.ids)
    if unknown := set(rows[image]) - set(index.ids):
        raise ValueError(f"{path} names {len(unknown)} images that are not in this set; is it this set's?")
    return found.fillna(0).to_numpy(np.int64)  # who is not in the file is in train


def pneumonia(root: Path, _: str) -> Index:
    """The RSNA Pneumonia Detection Challenge as Kaggle's archive unpacks; one image a patient, who is the group."""
    layout = CATALOG["pneumonia"].layouts["kaggle"]
    source, columns = root / layout["table"], layout["columns"]
    rows = table(source, *columns)[columns].drop_duplicates()  # it has a row a box
    return index_of_rows(rows[[*columns, columns[0]]], files_of(root, layout), PNEUMONIA_CLASSES, source)


def inside(folder: Path, *suffixes: str) -> list[Path]:
    """What lies right inside a folder and ends so, by name, without hidden files."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise OSError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
    return [folder / name for name in names if not suffixes or name.lower().endswith(suffixes)]


def class_folders(root: Path, argument: str) -> Index:
    """Class folders in `root` or its `images/`, or in `train/` and `test/` there; groups from `groups.csv`."""
    base, source = root / "images" if (root / "images").is_dir() else root, root / "groups.csv"
    folders = [path for path in inside(base) if path.is_dir()]
    nested = [c for part in folders if part.name.lower() in PARTS for c in inside(part) if c.is_dir()]
    ready_made = {PARTS[path.parent.name.lower()] for path in nested} == {"train", "test"}
    folders = nested if ready_made else folders
    names = tuple(sorted({path.name for path in folders}))
    if len(names) < 2:
        raise ValueError(f"{base} must hold a folder for each of at least 2 classes; it has {len(names)}")
    found = [path for folder in folders for path in inside(folder, *SUFFIXES)]
    files = {path.relative_to(base).as_posix(): path for path in found}
    listed = pd.DataFrame({"file": list(files), "group": list(files)}, dtype=str)
    if source.is_file():
        listed = table(source, "file")
        if listed.shape[1] == 1:
            raise ValueError(f"{source} needs the column file and one more, such as patient_id")
    images = listed["file"].str.removeprefix("images/")
    kinds = [Path(image).parent.name for image in images]
    rows = pd.DataFrame({"image": images, "class": kinds, "group": listed.iloc[:, 1]})
    index = index_of_rows(rows, files, names, source)
    reason = f"has no images in {base}; add some or remove the folder"
    empty = sorted(set(names) - {path.parent.name for path in found})
    problems = (*index.problems, *(("empty class", name, reason) for name in empty))
    parts = np.array([PARTS[image.split("/")[0].lower()] for image in index.ids]) if ready_made else None
    return replace(index, parts=parts, problems=problems, title=root.name if argument else "")


def sd198_folds(root: Path, index: Index, fold: int) -> np.ndarray | None:
    """A fold of SD-198's own split files: `fold` for its test images, 0 for others; None if no files fit the images.

    A pair of files, `…train_1.txt` with `…val_1.txt` or `…test_1.txt`, is a fold; each line is a file below `images/`
    and a number. Pairs that hold other images (of a selection of classes) are passed over.
    """
    rows, where = [], f"sd198's split files in {root}"
    for path in sorted([*root.glob("*.txt"), *root.glob("*/*.txt")]):
        if part := re.search("train|val|test", path.name):
            pair = path.with_name(path.name.replace(part[0], "*"))
            lines = path.read_text(encoding="utf-8").splitlines()
            rows += [(pair, line.rsplit(maxsplit=1)[0], part[0] != "train") for line in lines if line.strip()]
    pairs = pd.DataFrame(rows, columns=["pair", "file", "is_test"]).groupby("pair")
    fitting = [pair for _, pair in pairs if set(pair["file"]) == set(index.ids)]
    if not fitting:
        return None
    if fold > len(fitting):
        raise ValueError(f"{where} make {len(fitting)} folds, and there is no fold {fold}")
    pair = fitting[fold - 1]
    for image in pair["file"][pair["file"].duplicated()]:
        raise ValueError(f"{where} name {image} twice in fold {fold}; keep one of the lines")
    return np.where(np.isin(index.ids, pair["file"][pair["is_test"]].to_numpy(str)), fold, 0)


def lesions(_: Path, __: str) -> Index:
    """The synthetic set, drawn at the size asked for."""
    key = digest(Path(synthetic.__file__), synthetic.LOOKS_FILE)
    return Index(*synthetic.describe(), synthetic.CLASS_NAMES, blocks=synthetic.draw, key=key)


def index_of_parts(labels: dict[str, np.ndarray], names: Iterable[str], **known) -> Index:
    """The index of "train", "test" and perhaps "val", which is put to the training part, and `known` fields of it."""
    ids = np.array([f"{part}/{n:06d}" for part, of_part in labels.items() for n in range(len(of_part))])
    parts = np.array([PARTS[image.split("/")[0]] for image in ids])
    numbers = np.concatenate([np.ravel(of_part) for of_part in labels.values()]).astype(np.int64)
    return Index(numbers, ids, ids, tuple(names), parts=parts, **known)


def digits(_: Path, __: str) -> Index:
    """The scans that come with scikit-learn, whose values go from 0 to 16."""
    from sklearn.datasets import load_digits

    scans, names = load_digits(), tuple(CATALOG["digits"].classes)
    images = (scans.images * (255 / 16)).round().astype(np.uint8)[:, None]
    ids = np.array([f"{number:04d}" for number in range(len(images))])
    known = {"blocks": lambda _: [images], "key": digest(images), "channels": 1}
    return Index(scans.target.astype(np.int64), ids, ids, names, **known)


def mnist(root: Path, _: str) -> Index:
    """MNIST through torchvision, which unpacks what `download` has fetched."""
    from torchvision.datasets import MNIST

    train, test = (MNIST(root, train=train, download=True) for train in (True, False))
    labels, images = {"train": train.targets, "test": test.targets}, [train.data.numpy(), test.data.numpy()]
    known = {"blocks": lambda _: (part[:, None] for part in images), "key": digest(*images), "channels": 1}
    return index_of_parts(labels, CATALOG["mnist"].classes, **known)


def stl10(root: Path, _: str) -> Index:
    """STL10 through torchvision, which unpacks what `download` has fetched."""
    from torchvision.datasets import STL10

    train, test = (STL10(root, part, download=True) for part in ("train", "test"))
    labels, images = {"train": train.labels, "test": test.labels}, [train.data, test.data]
    known = {"blocks": lambda _: images, "key": digest(*images)}
    return index_of_parts(labels, CATALOG["stl10"].classes, **known)


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
    """A set of MedMNIST+; its validation part is put to the training part. No patients are known.

    A part is read into memory whole when it is decoded, which takes up to 14 GB at 224 pixels.
    """
    info, size, name = medmnist_info(argument)
    path, parts = root / name, ("train", "val", "test")
    with np.load(path, allow_pickle=False) as stored:
        labels = {part: stored[f"{part}_labels"] for part in parts}

    def blocks(_: int) -> Iterator[np.ndarray]:
        with np.load(path, allow_pickle=False) as stored:
            for part in parts:
                images = stored[f"{part}_images"]
                yield images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)

    known = {"channels": info["n_channels"], "title": f"{info['python_class']} (MedMNIST+, {size} × {size})"}
    known |= {"blocks": blocks, "key": digest(f"{path.stat().st_size} {path.stat().st_mtime_ns}")}
    return index_of_parts(labels, [info["label"][str(n)] for n in range(len(info["label"]))], **known)


READERS = dict.fromkeys(("sd198", "chestxray3", "folder"), class_folders)
READERS |= {read.__name__: read for read in (lesions, skin7, pneumonia, medmnist, stl10, mnist, digits)}
PUBLISHED_FOLDS = {"skin7": skin7_folds, "sd198": sd198_folds}
