"""Readers: each turns an entry of the catalogue, and a split, into an `Index`, or says what is wrong in the folder."""

import contextlib
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from deepknn_lib.datasets import synthetic
from deepknn_lib.storage import claim, digest

_ENTRIES = json.loads(Path(__file__).with_name("catalog.json").read_text(encoding="utf-8"))
CATALOG = {name: SimpleNamespace(**entry) for name, entry in _ENTRIES.items()}
PARTS = dict.fromkeys("train training val valid validation".split(), "train")
PARTS |= dict.fromkeys(("test", "testing"), "test")
SUFFIXES = ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .tif .tiff .webp .avif .jp2 .j2k .jpx .pbm .pgm .ppm .pnm"
SUFFIXES = {*SUFFIXES.split(), ".tga", ".pcx", ".psd", ".sgi", ".ico"}
DICOM = {".dcm", ".dicom", ".ima"}
TEXTS = {".csv", ".txt", ".md", ".json", ".xml", ".html", ".pdf", ".db", ".ini"}  # nobody misses them
COUNTER = re.compile(r"(.*\d.*?)[-_ .(]+\d{1,4}\)?")  # what numbers the images of one patient: 00002658_001
UNIT = re.compile(r"[_ ]?id$", re.I)  # what the name of a column of groups has besides the unit
FOLDS = {f"{n}": n for n in range(1, 6)} | {"train": 0, "val": -1, "test": 1}  # in files of splits


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
    unit: str = ""  # what a group is, such as "patient"; empty where no groups are given
    notes: tuple[str, ...] = ()  # what the reader left out or took on trust


def table(path: Path, *columns: str) -> pd.DataFrame:
    """A CSV (or tab-separated .tab) file with at least these columns, as text without outer spaces; or an error."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; see data/README.md for the layout")
    options = {"sep": "\t" if path.suffix == ".tab" else ",", "encoding": "utf-8-sig"}
    try:
        rows = pd.read_csv(path, dtype=str, na_filter=False, **options).rename(columns=str.strip)
        if not isinstance(rows.index, pd.RangeIndex):  # The first of too many fields became an index.
            raise ValueError("rows have more fields than the header; put text with commas in quotes")
    except ValueError as error:  # pandas' own errors and those of the encoding
        told = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as a table ({told}); save it as CSV in UTF-8") from error
    if rows.empty or any([*rows.columns].count(column) != 1 for column in columns):
        told = f"it has {', '.join(rows.columns)} and {len(rows)} rows"
        raise ValueError(f"{path} needs the columns {', '.join(columns)}, each once, and rows; {told}")
    return rows.apply(lambda column: column.str.strip())


def some(names: Sequence[str], what: str) -> str:
    """How many there are, and the first three by name."""
    return f"{len(names)} {what} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"


def _refuse(source: Path, images: Sequence[str], what: str) -> None:
    if len(images):
        raise ValueError(f"{source}: {some(images, 'images')} are {what}")


def check_rows(rows: pd.DataFrame, files: dict[str, Path], source: Path) -> None:
    """ValueError unless a table (`image`, `group`) names each file once, and gives it a group."""
    images = rows["image"]
    _refuse(source, images[images.duplicated()], "named twice; keep one row")
    _refuse(source, images[~images.isin([*files])], "without a file; unpack again, or remove the row")
    _refuse(source, sorted(files.keys() - {*images}), "files without a row; add one or remove the image")
    _refuse(source, images[rows["group"] == ""], "without a lesion or patient; give them one")


def index_of_rows(rows, files: dict[str, Path], names: tuple, source: Path, unit: str) -> Index:
    """The index of a table (`image`, `class`, perhaps `group`, `part`) and files by id; ValueError if they differ."""
    # Where a table has no groups, each image is a group of its own.
    rows = pd.DataFrame({"group": rows["image"]} | dict(rows)).sort_values("image", ignore_index=True)
    check_rows(rows, files, source)
    labels = rows["class"].map({name: label for label, name in enumerate(names)})
    _refuse(source, rows["image"][labels.isna()], f"of an unknown class; the classes are {', '.join(names)}")
    ids, groups = (rows[column].to_numpy(str) for column in ("image", "group"))
    known = {"parts": rows["part"].to_numpy(str) if "part" in rows else None, "unit": unit}
    return Index(labels.to_numpy(np.int64), ids, groups, names, [*map(files.get, ids)], **known)


def from_table(entry: SimpleNamespace, _: str) -> Index:
    """The index of a set by its layout in the catalogue: a table of images, classes and groups, and image files."""
    layout, columns, names = entry.layout, entry.layout["columns"], tuple(entry.counts)
    files = {path.stem: path for pattern in layout["images"] for path in entry.root.glob(pattern)}
    source = next(iter(sorted(entry.root.glob(layout["table"]))), entry.root / layout["table"])
    rows = table(source, *columns)[columns].drop_duplicates().set_axis(["image", "class", "group"], axis=1)
    return index_of_rows(rows, files, names, source, UNIT.sub("", columns[2]))


def challenge(root: Path, part: str) -> Index:
    """The "Training" or "Test" part of ISIC 2018 Task 3; a test image is a group of its own."""
    names, start = synthetic.CLASS_NAMES, f"ISIC2018_Task3_{part}_"
    source, columns = root / f"{start}GroundTruth/{start}GroundTruth.csv", [name.upper() for name in names]
    rows = table(source, "image", *columns)
    marks = rows[columns].apply(pd.to_numeric, errors="coerce").fillna(-1)
    clear = marks.isin((0, 1)).all(axis=1) & (marks.sum(axis=1) == 1)
    rows["class"] = marks.idxmax(axis=1).str.lower().where(clear, "no or several classes")
    if part == "Training":
        groupings = root / f"{start}LesionGroupings.csv"
        lesions = table(groupings, "image", "lesion_id").set_index("image")["lesion_id"]
        _refuse(groupings, lesions.index[lesions.index.duplicated()], "named twice; keep one row")
        rows["group"] = rows["image"].map(lesions).fillna("")
    files = {path.stem: path for path in root.glob(f"{start}Input/[!.]*.jpg")}
    return index_of_rows(rows, files, names, source, "lesion")


def skin7(entry: SimpleNamespace, split: str) -> Index:
    """HAM10000 as ISIC 2018 Task 3 or Harvard Dataverse has it, by lesion; `official` adds ISIC's test part."""
    there = (entry.root / "ISIC2018_Task3_Training_Input").exists()
    train = challenge(entry.root, "Training") if there else from_table(entry, split)
    if split != "official":
        return train
    test = challenge(entry.root, "Test")
    parts = np.repeat(["train", "test"], [len(train.ids), len(test.ids)])
    both = {of: np.append(getattr(train, of), getattr(test, of)) for of in ("labels", "ids", "groups")}
    return replace(train, **both, files=train.files + test.files, parts=parts)


def split_file(root: Path, index: Index, split: str) -> np.ndarray:
    """Skin7's folds as others published them: int64 (N,), 1..5, or 1 test, 0 training and -1 neither.

    `paper` is the authors' five folds, `dermamnist-c` the leak-free parts of Abhishek et al. (2025), in which an image
    without a row is for training. FileNotFoundError if the file is not there, ValueError if it does not fit.
    """
    own = Path(os.environ.get("DEEPKNN_SKIN7_FOLDS") or root / "folds.csv").expanduser()
    path = own if split == "paper" else root / "dermamnist_c.csv"
    fetched = [root / f"split_data_{fold}_fold_test.csv" for fold in range(1, 6)]
    if path.is_file():
        names = {"image_id": "image", "split": "fold", "part": "fold", "test_fold": "fold"}
        rows = table(path).rename(columns=names)
    elif split == "paper" and fetched[0].is_file():
        five = [table(part, "image_test").assign(fold=str(fold)) for fold, part in enumerate(fetched, 1)]
        rows, path = pd.concat(five, ignore_index=True), fetched[0]
        rows["image"] = rows["image_test"].str.removesuffix(".jpg")
    else:
        how = "run `python -m deepknn_lib download skin7`, point DEEPKNN_SKIN7_FOLDS at a CSV with the "
        how += "columns image,test_fold (see data/README.md), or use split='grouped'"
        raise FileNotFoundError(f"skin7's split {split} needs {path}: {how}")
    if not {"image", "fold"} <= {*rows}:
        raise ValueError(f"{path} needs the columns image and test_fold; it has {', '.join(rows)}")
    wrong = rows["image"].duplicated() | ~rows["fold"].isin([*FOLDS])
    _refuse(path, rows["image"][wrong], f"named twice, or in no fold of {', '.join(FOLDS)}; correct them")
    folds = rows.set_index("image")["fold"].map(FOLDS).reindex(index.ids)
    off = [*folds.index[folds.isna()]] if split == "paper" else [*{*rows["image"]} - {*index.ids}]
    _refuse(path, off, "named on one side only, here or among the files: is it this set's?")
    return folds.fillna(0).to_numpy(np.int64)


def own_images(entry: SimpleNamespace, _: str) -> Index:
    """Anyone's images with a `labels.csv`, or in class folders; ValueError if they and their tables do not fit.

    Class folders lie in the set's folder, in its `images/` if no other folder has images, or in `train/` and `test/`.
    Groups are the patients of `labels.csv`, else those of `groups.csv`, in the set's folder or beside a folder of
    images, else the lesions of `labels.csv`, else the patients in DICOM's headers.
    """
    root, unit = entry.root, ""
    others = [path for path in root.glob("[!._]*/") if path.name != "images"]
    alone = (root / "images").is_dir() and not any(images_in(path)[0] for path in others if path.is_dir())
    base = root / "images" if alone else root
    files, notes = images_in(base)
    source = root / "labels.csv"
    if not source.is_file() and (root.name == "images" or any("/" not in image for image in files)):
        source = root.parent / "labels.csv"  # beside a folder that is nothing but images
    if source.is_file():
        rows, unit = by_table(source, base, files, notes)
        _refuse(source, [*rows["image"]] * (rows["class"].nunique() < 2), "all of one class; two are needed")
        why = f"without a row in {source.name}"
    else:
        rows, why = by_folders(base, files, notes), "outside of the class folders"
    if left_out := files.keys() - {*rows["image"]}:
        notes.append(f"{some(sorted(left_out), 'images')} {why} are left out")
        files = {image: path for image, path in files.items() if image not in left_out}
    index = index_of_rows(rows, files, tuple(sorted({*rows["class"]} - {""})), source, unit)
    beside = source.parent if source.is_file() or root.name == "images" else root
    named = [path for folder in (root, beside) if (path := folder / "groups.csv").is_file()]
    if unit == "patient" or (unit and not named):
        return replace(index, notes=tuple(notes))
    if named:
        groups, unit = groups_in(named[0], base, files, left_out)
    else:
        groups, unit = patients_in_headers(files, notes)
        notes += [] if unit else likely_patients(index)
    return replace(index, groups=groups.reindex(index.ids).to_numpy(str), unit=unit, notes=tuple(notes))


def images_in(base: Path) -> tuple[dict[str, Path], list[str]]:
    """All images below a folder by their paths in it, and a note of other files; hidden files are not looked at."""
    from pydicom.misc import is_dicom

    images, others, seen = {}, {}, set()
    for folder, inner, names in os.walk(base, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # A link leads back.
            inner.clear()
            continue
        inner[:] = [name for name in inner if name[0] != "." and name != "__MACOSX"]
        seen.add(real)
        for path in (Path(folder, name) for name in names if name[0] != "."):
            if os.fsencode(path).decode(errors="replace") != str(path):
                raise ValueError(f"{path!a} is no name in UTF-8; rename it")
            if (suffix := path.suffix.lower()) not in TEXTS:
                known = suffix in SUFFIXES | DICOM or (path.is_file() and is_dicom(path))
                (images if known else others)[path.relative_to(base).as_posix()] = path
    told = f"{some(sorted(others), 'files')} are no images of a known kind and left out"
    return dict(sorted(images.items())), [told] * bool(others)


def by_table(source: Path, base: Path, files: dict[str, Path], notes: list[str]) -> tuple[pd.DataFrame, str]:
    """Image, class and perhaps group and part by `labels.csv`; and what a group is, if it has such a column."""
    given = table(source, "image", "label")
    units = {column: UNIT.sub("", column).lower() for column in given}
    columns = {unit: column for column, unit in units.items()}  # A patient may have several lesions.
    group = next((columns[unit] for unit in ("patient", "lesion", "group") if unit in columns), "")
    if unused := [column for column in given if column not in ("image", "label", "split", group)]:
        notes.append(f"{source.name}: the columns {', '.join(unused)} are not used")
    rows = pd.DataFrame({"image": full_ids(given["image"], base, source, files), "class": given["label"]})
    rows["group"] = given[group] if group else rows["image"]
    if "split" in given:
        told = given["split"].str.lower()
        rows["part"] = told.map(PARTS).fillna("")
        if {*rows["part"]} != {"train", "test"}:
            wrong = some(sorted({*told} - PARTS.keys()), "unknown words")
            raise ValueError(f"{source}: the column split needs train and test (perhaps val); it has {wrong}")
        if val := told.str.startswith("val").sum():
            notes.append(f"{val} images of the split val are put to the training part")
    return rows, units.get(group, "")


def full_ids(named: pd.Series, base: Path, source: Path, files: dict[str, Path]) -> pd.Series:
    """Ids of images that a table names with or without sub-folder and extension; what fits no file stays as it is."""
    short, start = {}, f"{os.path.relpath(base, source.parent)}/"
    for image in files:
        folder, _, file = image.rpartition("/")
        for alias in {file, file.rpartition(".")[0], f"{folder}/{file.rpartition('.')[0]}"}:
            short.setdefault(alias, []).append(image)
    names = named.str.replace("\\", "/").str.removeprefix("./").str.removeprefix(start)
    fitting = names.map(lambda name: [name] if name in files else short.get(name, [name]))
    if len(several := names[fitting.str.len() > 1]):
        raise ValueError(f"{source}: {some(several, 'names')} fit several files; write the sub-folder, too")
    return fitting.str[0]


def by_folders(base: Path, files: dict[str, Path], notes: list[str]) -> pd.DataFrame:
    """Image, class and perhaps part by folders; a ValueError says what to do with other ones."""
    paths = {image: image.split("/")[:-1] for image in files}
    tops = {path[0] for path in paths.values() if path}
    parts = {path[0] for path in paths.values() if len(path) > 1 and path[0].lower() in PARTS}
    depth = int({PARTS[part.lower()] for part in parts} == {"train", "test"})  # of the class folders
    used = {i: path for i, path in paths.items() if len(path) > depth and (not depth or path[0] in parts)}
    if told := other_layout(base, tops, parts, [*used.values()], depth):
        there = ", ".join(sorted(tops)) or "none"
        raise ValueError(f"{base} needs folders of 2 or more classes with images; it has {there}; {told}")
    rows = pd.DataFrame({"image": [*used], "class": [path[depth] for path in used.values()]})
    inner = {path[depth]: set() for path in used.values()}
    for path in used.values():
        inner[path[depth]].update(path[depth + 1 : depth + 2])
    if len(both := set.intersection(*inner.values())) > 1:
        notes.append(f"each class has {some(sorted(both), 'folders')}; are these the classes, or masks?")
    if depth:
        rows["part"] = [PARTS[path[0].lower()] for path in used.values()]
    return rows


def other_layout(base: Path, tops: set[str], parts: set[str], paths: list[list[str]], depth: int) -> str:
    """What to do if these paths, of images in folders, are not those of class folders; empty if they are."""
    if parts and not depth and all(top.lower() in PARTS for top in tops):
        told = f"class folders are in {', '.join(sorted(parts))} only: rename a part with class folders to test, or "
        return told + f"name one part for five folds of it, as in folder:{base / min(parts)}"
    sizes = Counter(path[depth] for path in paths)
    largest = max(sizes, key=sizes.get, default="")
    inside = [path for path in paths if path[depth] == largest]
    shared = os.path.commonprefix(inside)
    inner = sorted({path[len(shared)] for path in inside if len(path) > len(shared)})
    if len(inner) > 1 and len(paths) < len(inside) + 5:
        return f"it looks one level too high: use folder:{base.joinpath(*shared)} with {', '.join(inner)}"
    roots = [base / part for part in parts] if depth else [base]
    there = {path.name for root in roots for path in root.glob("[!.]*") if path.is_dir()}
    if tops and (empty := sorted(there - {*sizes, "__MACOSX"})):
        return f"{', '.join(empty)} has no images of a known kind: convert them, or remove it"
    alone = "put images into class folders, or write labels.csv with the columns image and label"
    return alone if len(sizes) < 2 else ""


def groups_in(source: Path, base: Path, files: dict[str, Path], left_out: set[str]) -> tuple[pd.Series, str]:
    """The group of each image by `groups.csv`, and what a group is."""
    given = table(source)
    if "file" not in given or given.shape[1] != 2:
        raise ValueError(f"{source} needs the column file and one more alone, such as patient_id")
    images = full_ids(given.pop("file"), base, source, files)
    rows = pd.DataFrame({"image": images, "group": given.iloc[:, 0]})[~images.isin(left_out)]
    check_rows(rows, files, source)
    return rows.set_index("image")["group"], UNIT.sub("", given.columns[0]) or "group"


def patients_in_headers(files: dict[str, Path], notes: list[str]) -> tuple[pd.Series, str]:
    """The group of each image by the PatientIDs of DICOM files, and what a group is; nothing if these are all one."""
    dicom = {i: path for i, path in files.items() if path.suffix.lower() not in SUFFIXES and path.is_file()}
    told = {i: who for i, path in dicom.items() if (who := patient_of(path, path.stat().st_mtime_ns))}
    if len({*told.values()}) < 2:
        notes += ["PatientID is the same in all DICOM files and tells no patients apart"] * bool(told)
        return pd.Series({i: i for i in files}), ""
    if without := sorted(files.keys() - told.keys()):
        notes.append(f"{some(without, 'images')} have no PatientID; each counts as one of another patient")
    return pd.Series({i: told.get(i, i) for i in files}), "patient"


@functools.cache
def patient_of(path: Path, _: int) -> str:
    """The PatientID in a DICOM file; empty if it has none or cannot be read."""
    from pydicom import dcmread

    with contextlib.suppress(Exception):  # Decoding says what is wrong with the file.
        header = dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
        return str(header.get("PatientID", "")).strip()
    return ""


def likely_patients(index: Index) -> list[str]:
    """A note if the names of many images look like several images of one patient, numbered or in a folder."""
    alike = {}
    for image, label in zip(index.ids.tolist(), index.labels, strict=True):
        inner = f"/{image}".partition(f"/{index.class_names[label]}/")[2].rpartition("/")[0]
        numbered = COUNTER.fullmatch(image.rpartition("/")[2].rpartition(".")[0])
        if inner or numbered:
            alike.setdefault(inner or numbered[1], []).append(image)
    several = [images for images in alike.values() if len(images) > 1]
    told = f"{sum(map(len, several))} images look like several of one patient, {len(several)} patients in all"
    return [f"{told}, as {' and '.join(several[0][:2])}"] if len(several) > 1 else []


def lesions(*_) -> Index:
    """The synthetic set, drawn at the size asked for."""
    key = digest(Path(synthetic.__file__), synthetic.LOOKS_FILE)
    return Index(*synthetic.describe(), synthetic.CLASS_NAMES, blocks=synthetic.draw, key=key, unit="lesion")


def digits(*_) -> Index:
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


def from_torchvision(entry: SimpleNamespace, _: str) -> Index:
    """MNIST and STL10 through torchvision, from the archives that `download` has fetched, which are removed then."""
    from torchvision.datasets import MNIST, STL10
    from torchvision.datasets.utils import extract_archive

    files = [entry.root / one["name"] for one in entry.remotes] if os.access(entry.root, os.W_OK) else []
    for archive in filter(Path.exists, files):
        with claim(archive), contextlib.suppress(FileNotFoundError):  # Another process has done it meanwhile.
            extract_archive(archive, archive.parent, remove_finished=True)
    if entry.kind == "mnist":
        train, test = (MNIST(entry.root, train=train) for train in (True, False))
        labels, images = (train.targets, test.targets), [part.data.numpy()[:, None] for part in (train, test)]
    else:
        train, test = (STL10(entry.root, part) for part in ("train", "test"))
        labels, images = (train.labels, test.labels), [train.data, test.data]
    known = {"blocks": lambda _: images, "key": digest(*images), "channels": images[0].shape[1]}
    return index_of_parts(dict(zip(("train", "test"), labels, strict=True)), entry.classes, **known)


def medmnist(entry: SimpleNamespace, _: str) -> Index:
    """A set of MedMNIST+; its validation part is put to the training part. No patients are known."""
    path, info, side = entry.root / entry.wanted[0], entry.about, entry.about["side"]
    stored = np.load(path, allow_pickle=False)  # An array is read when it is asked for, up to 14 GB.
    labels = {part: stored[f"{part}_labels"] for part in ("train", "val", "test")}

    def blocks(_: int) -> Iterator[np.ndarray]:
        for part, of_part in labels.items():
            try:
                images = stored[f"{part}_images"]
            except Exception as error:  # zipfile and zlib name wrong bytes in many ways
                remedy = f"remove it and run `python -m deepknn_lib download {entry.name}`"
                raise ValueError(f"{path}: {part}'s images cannot be read ({error!r}); {remedy}") from error
            if images.shape[:3] != (len(of_part), side, side):
                told = f"{len(of_part)} labels and images of {' × '.join(map(str, images.shape))}"
                raise ValueError(f"{path}: {part} has {told}; one label an image, {side} × {side}, is needed")
            yield images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)

    key = digest(f"{path.stat().st_size} {path.stat().st_mtime_ns} {path.stat().st_ctime_ns}")
    return index_of_parts(labels, info["label"].values(), blocks=blocks, key=key, channels=info["n_channels"])
