"""Readers: each turns a folder in a known layout into an `Index`, or says what is wrong in it, and opens no image."""

import json
import os
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
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".dcm"}
PARTS = {"train": "train", "val": "train", "valid": "train", "validation": "train", "test": "test"}
FOLDS = {"12345"[n]: n + 1 for n in range(5)} | {"train": 0, "val": -1, "test": 1}  # in files of splits


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
    channels: int = 3
    title: str = ""  # where it says more than the catalogue's

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_grouped(self) -> bool:
        """Whether several images share a lesion or patient."""
        return len(set(self.groups)) < len(self)


def table(path: Path, *columns: str) -> pd.DataFrame:
    """The named columns of a CSV (or tab-separated .tab) file as text; an error that names the file if it is bad."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; see data/README.md for the layout")
    options = {"sep": "\t" if path.suffix == ".tab" else ",", "encoding": "utf-8-sig", "index_col": False}
    try:
        rows = pd.read_csv(path, dtype=str, na_filter=False, **options)
    except ValueError as error:  # pandas' own errors and those of the encoding
        raise ValueError(f"{path} cannot be read as a table ({error}); save it as CSV in UTF-8") from error
    if not set(columns) <= set(rows.columns):
        raise ValueError(f"{path} needs the columns {', '.join(columns)}; it has {', '.join(rows.columns)}")
    return rows[list(columns)] if columns else rows


def index_of_rows(rows: pd.DataFrame, files: dict[str, Path], names: tuple, source: Path) -> Index:
    """The index of a table's rows (image, class, group) and the files by id; ValueError if they do not fit."""
    rows = rows.set_axis(["image", "class", "group"], axis=1).sort_values("image", ignore_index=True)
    images = rows["image"]
    checks = {
        "named twice; keep one row": images[images.duplicated()],
        "without a file; unpack again, or remove the row": images[~images.isin([*files])],
        "files without a row; add one or remove the image": sorted(files.keys() - {*images}),
        f"of an unknown class; the classes are {', '.join(names)}": images[~rows["class"].isin(names)],
        "without a lesion or patient; give them one": images[rows["group"] == ""],
    }
    for what, wrong in checks.items():
        if len(wrong):
            raise ValueError(f"{source}: {len(wrong)} images ({', '.join([*wrong][:3])}) are {what}")
    labels = rows["class"].map({name: label for label, name in enumerate(names)}).to_numpy(np.int64)
    ids, groups = (rows[column].to_numpy(str) for column in ("image", "group"))
    return Index(labels, ids, groups, names, [*map(files.get, ids)])


def from_table(root: Path, *_: str, name: str = "pneumonia") -> Index:
    """The index of a set by its layout in the catalogue: a table of images, classes and groups, and image files."""
    layout, names = CATALOG[name].layout, tuple(CATALOG[name].counts)
    files = {path.stem: path for pattern in layout["images"] for path in root.glob(pattern)}
    source = next(iter(sorted(root.glob(layout["table"]))), root / layout["table"])
    return index_of_rows(table(source, *layout["columns"]).drop_duplicates(), files, names, source)


def challenge(root: Path, part: str) -> Index:
    """The "Training" or "Test" part of ISIC 2018 Task 3; a test image is a group of its own."""
    names, start = synthetic.CLASS_NAMES, f"ISIC2018_Task3_{part}_"
    source, columns = root / f"{start}GroundTruth/{start}GroundTruth.csv", [name.upper() for name in names]
    rows = table(source, "image", *columns)
    marks = rows[columns].apply(pd.to_numeric, errors="coerce").fillna(-1)
    clear = marks.isin((0, 1)).all(axis=1) & (marks.sum(axis=1) == 1)
    rows["class"] = marks.idxmax(axis=1).str.lower().where(clear, "no or several classes")
    rows["group"] = rows["image"]
    if part == "Training":
        lesions = table(root / f"{start}LesionGroupings.csv", "image", "lesion_id").set_index("image")
        rows["group"] = rows["image"].map(lesions["lesion_id"]).fillna("")
    files = {path.stem: path for path in root.glob(f"{start}Input/[!.]*.jpg")}
    return index_of_rows(rows[["image", "class", "group"]], files, names, source)


def skin7(root: Path, _: str, split: str) -> Index:
    """HAM10000 as ISIC 2018 Task 3 or Harvard Dataverse has it, by lesion; `official` adds ISIC's test part."""
    there = (root / "ISIC2018_Task3_Training_Input").exists()
    train = challenge(root, "Training") if there else from_table(root, name="skin7")
    if split != "official":
        return train
    both = train, challenge(root, "Test")
    arrays = [np.concatenate([getattr(part, of) for part in both]) for of in ("labels", "ids", "groups")]
    parts = np.repeat(["train", "test"], [*map(len, both)])
    return Index(*arrays, train.class_names, both[0].files + both[1].files, parts=parts)


def split_file(root: Path, index: Index, split: str) -> np.ndarray:
    """Skin7's folds as others published them: int64 (N,), 1..5, or 1 test, 0 training and -1 neither.

    `paper` is the authors' five folds, `dermamnist-c` the leak-free parts of Abhishek et al. (2025), in which an image
    without a row is for training. FileNotFoundError if the file is not there, ValueError if it does not fit.
    """
    path = Path(os.environ.get("DEEPKNN_SKIN7_FOLDS") or root / "folds.csv").expanduser()
    path = path if split == "paper" else root / "dermamnist_c.csv"
    fetched = [root / f"split_data_{fold}_fold_test.csv" for fold in range(1, 6)]
    if split == "paper" and not path.is_file() and fetched[0].is_file():
        five = [table(path, "image_test").assign(fold=str(fold)) for fold, path in enumerate(fetched, 1)]
        rows, path = pd.concat(five, ignore_index=True), fetched[0]
        rows["image"] = rows["image_test"].str.removesuffix(".jpg")
    elif path.is_file():
        names = {"image_id": "image", "split": "fold", "part": "fold", "test_fold": "fold"}
        rows = table(path).rename(columns=names)
    else:
        how = "run `python -m deepknn_lib download skin7`, point DEEPKNN_SKIN7_FOLDS at a CSV with the "
        how += "columns image,test_fold (see data/README.md), or use split='grouped'"
        raise FileNotFoundError(f"skin7's split {split} needs {path}: {how}")
    if not {"image", "fold"} <= {*rows}:
        raise ValueError(f"{path} needs the columns image and test_fold; it has {', '.join(rows)}")
    wrong = rows[rows["image"].duplicated() | ~rows["fold"].isin([*FOLDS])]
    if len(wrong):
        line, image = wrong.index[0] + 2, wrong["image"].iloc[0]
        what = f"{image!r} is there again, or its fold is not one of {', '.join(FOLDS)}"
        raise ValueError(f"{path}, line {line}: {what}; correct or remove it")
    folds = rows.set_index("image")["fold"].map(FOLDS).reindex(index.ids)
    off = [*folds.index[folds.isna()]] if split == "paper" else [*{*rows["image"]} - {*index.ids}]
    if off:
        raise ValueError(f"{path} and the images differ by {len(off)}, as {off[0]}: is it this set's?")
    return folds.fillna(0).to_numpy(np.int64)


def class_folders(root: Path, argument: str, _: str) -> Index:
    """Class folders in `root` or its `images/`, or in `train/` and `test/` there; groups from `groups.csv`."""
    base, source = root / "images" if (root / "images").is_dir() else root, root / "groups.csv"
    folders, nested = ([p for p in base.glob(depth) if p.is_dir()] for depth in ("[!.]*", "[!.]*/[!.]*"))
    nested = [path for path in nested if path.parent.name.lower() in PARTS]
    ready_made = {PARTS[path.parent.name.lower()] for path in nested} == {"train", "test"}
    folders = nested if ready_made else folders
    found = sorted(path for folder in folders for path in folder.glob("[!.]*"))
    files = {path.relative_to(base).as_posix(): path for path in found if path.suffix.lower() in SUFFIXES}
    names = sorted({path.name for path in folders})
    empty = ", ".join({*names} - {path.parent.name for path in files.values()})
    if len(names) < 2 or empty:
        what = f"{base} needs folders of 2 or more classes with images; it has {', '.join(names) or 'none'}"
        raise ValueError(f"{what}; {empty} is empty: remove it" if empty else what)
    rows = pd.DataFrame({"file": [*files], "group": [*files]})
    if source.is_file():
        rows = table(source)
        if "file" not in rows or rows.shape[1] == 1:
            raise ValueError(f"{source} needs the column file and one more, such as patient_id")
    images = rows.pop("file").str.removeprefix("images/")
    kinds = [Path(image).parent.name for image in images]
    rows = pd.DataFrame({"image": images, "class": kinds, "group": rows.iloc[:, 0]})
    index = index_of_rows(rows, files, tuple(names), source)
    parts = np.array([PARTS[image.split("/")[0].lower()] for image in index.ids]) if ready_made else None
    return replace(index, parts=parts, title=root.name if argument else "")


def lesions(_: Path, __: str, ___: str) -> Index:
    """The synthetic set, drawn at the size asked for."""
    key = digest(Path(synthetic.__file__), synthetic.LOOKS_FILE)
    return Index(*synthetic.describe(), synthetic.CLASS_NAMES, blocks=synthetic.draw, key=key)


def digits(_: Path, __: str, ___: str) -> Index:
    """The scans that come with scikit-learn, whose values go from 0 to 16."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = (scans.images * (255 / 16)).round().astype(np.uint8)[:, None]
    ids = np.array([f"{number:04d}" for number in range(len(images))])
    known = {"blocks": lambda _: [images], "key": digest(images), "channels": 1}
    return Index(scans.target.astype(np.int64), ids, ids, tuple("0123456789"), **known)


def index_of_parts(labels: dict[str, np.ndarray], names: Iterable[str], **known) -> Index:
    """The index of "train", "test" and perhaps "val", which is put to the training part, and `known` fields of it."""
    ids = np.array([f"{part}/{n:06d}" for part, of_part in labels.items() for n in range(len(of_part))])
    parts = np.array([PARTS[image.split("/")[0]] for image in ids])
    numbers = np.concatenate([np.ravel(of_part) for of_part in labels.values()]).astype(np.int64)
    return Index(numbers, ids, ids, tuple(names), parts=parts, **known)


def mnist(root: Path, _: str, __: str) -> Index:
    """MNIST through torchvision, which unpacks what `download` has fetched."""
    from torchvision.datasets import MNIST

    train, test = (MNIST(root, train=train, download=True) for train in (True, False))
    images, labels = [part.data.numpy()[:, None] for part in (train, test)], (train.targets, test.targets)
    known = {"blocks": lambda _: images, "key": digest(*images), "channels": 1}
    return index_of_parts({"train": labels[0], "test": labels[1]}, "0123456789", **known)


def stl10(root: Path, _: str, __: str) -> Index:
    """STL10 through torchvision, which unpacks what `download` has fetched."""
    from torchvision.datasets import STL10

    train, test = (STL10(root, part, download=True) for part in ("train", "test"))
    known = {"blocks": lambda _: (train.data, test.data), "key": digest(train.data, test.data)}
    return index_of_parts({"train": train.labels, "test": test.labels}, CATALOG["stl10"].classes, **known)


def medmnist_info(argument: str) -> dict:
    """What the medmnist package says of `<flag>@<size>` (28 if left out), and of its file the name, url, checksum."""
    from medmnist import INFO

    flag, _, size = argument.partition("@")
    usable = [f for f, about in INFO.items() if not f.endswith("3d") and "multi-label" not in about["task"]]
    if flag not in usable or size not in ("", "28", "64", "128", "224"):
        what = f"medmnist:{argument}: the sizes are 28, 64, 128 and 224, as in medmnist:bloodmnist@64"
        raise ValueError(f"{what}; the 2-D sets with one label an image are {', '.join(usable)}")
    end = "" if size in ("", "28") else f"_{size}"
    info = INFO[flag] | {"name": f"{flag}{end}.npz", "made": "", "size": size or "28"}
    return info | {"url": info[f"url{end}"], "checksum": f"md5:{info[f'MD5{end}']}"}


def medmnist(root: Path, argument: str, _: str) -> Index:
    """A set of MedMNIST+; its validation part is put to the training part. No patients are known."""
    info = medmnist_info(argument)
    path = root / info["name"]
    stored = np.load(path, allow_pickle=False)  # An array is read when it is asked for, up to 14 GB.
    labels = {part: stored[f"{part}_labels"] for part in ("train", "val", "test")}
    title = f"{info['python_class']} (MedMNIST+, {info['size']} × {info['size']})"

    def blocks(_: int) -> Iterator[np.ndarray]:
        for part in labels:
            try:
                images = stored[f"{part}_images"]
            except Exception as error:  # zipfile and zlib name wrong bytes in many ways
                remedy = f"remove it and run `python -m deepknn_lib download medmnist:{argument}`"
                raise ValueError(f"{path}: {part}'s images cannot be read ({error!r}); {remedy}") from error
            yield images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)

    key = digest(f"{path.stat().st_size} {path.stat().st_mtime_ns}")
    known = {"channels": info["n_channels"], "title": title, "blocks": blocks, "key": key}
    return index_of_parts(labels, info["label"].values(), **known)


READERS = dict.fromkeys(("sd198", "chestxray3", "folder"), class_folders) | {"pneumonia": from_table}
READERS |= {read.__name__: read for read in (lesions, skin7, medmnist, stl10, mnist, digits)}
