"""Readers: each turns a folder in a known layout into an `Index`, or says what is wrong in it, and opens no image."""

import functools
import json
import os
import re
from collections import Counter
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
SUFFIXES = ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .tif .tiff .webp .avif .jp2 .j2k .jpx .pbm .pgm .ppm .pnm"
SUFFIXES = {*SUFFIXES.split(), ".tga", ".pcx", ".psd", ".sgi", ".ico"}
DICOM = {".dcm", ".dicom", ".ima"}
TEXTS = {".csv", ".txt", ".md", ".json", ".xml", ".html", ".pdf", ".db", ".ini"}  # nobody misses them
PARTS = {name: "train" for name in ("train", "training", "val", "valid", "validation")}
PARTS |= {"test": "test", "testing": "test"}
UNIT = re.compile(r"[_ ]?id$", re.I)  # what the name of a column of groups has besides the unit
COUNTER = re.compile(r"(.*\d.*?)[-_ .(]+\d{1,4}\)?")  # what numbers the images of one patient: 00002658_001
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
    title: str = ""  # where it says more than the catalogue's
    unit: str = ""  # what a group is, such as "patient"; empty where no groups are given
    notes: tuple[str, ...] = ()  # what the reader left out or took on trust

    def __len__(self) -> int:
        return len(self.labels)


def table(path: Path, *columns: str) -> pd.DataFrame:
    """A CSV (or tab-separated .tab) file with at least these columns, as text; an error names the file if it is bad."""
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


def some(names: Iterable[str], what: str) -> str:
    """How many there are, and the first three by name."""
    names = [*names]
    return f"{len(names)} {what} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"


def index_of_rows(rows, files: dict[str, Path], names: tuple, source: Path, unit: str, **known) -> Index:
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
            raise ValueError(f"{source}: {some(wrong, 'images')} are {what}")
    labels = rows["class"].map({name: label for label, name in enumerate(names)}).to_numpy(np.int64)
    ids, groups = (rows[column].to_numpy(str) for column in ("image", "group"))
    return Index(labels, ids, groups, names, [*map(files.get, ids)], unit=unit, **known)


def from_table(root: Path, *_: str, name: str = "pneumonia") -> Index:
    """The index of a set by its layout in the catalogue: a table of images, classes and groups, and image files."""
    layout, names = CATALOG[name].layout, tuple(CATALOG[name].counts)
    columns = layout["columns"]
    files = {path.stem: path for pattern in layout["images"] for path in root.glob(pattern)}
    source = next(iter(sorted(root.glob(layout["table"]))), root / layout["table"])
    rows = table(source, *columns)[columns].drop_duplicates()
    return index_of_rows(rows, files, names, source, UNIT.sub("", columns[2]))


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
        groupings = root / f"{start}LesionGroupings.csv"
        lesions = table(groupings, "image", "lesion_id").set_index("image")["lesion_id"]
        if lesions.index.has_duplicates:
            twice = lesions.index[lesions.index.duplicated()]
            raise ValueError(f"{groupings}: {some(twice, 'images')} are named twice; keep one row")
        rows["group"] = rows["image"].map(lesions).fillna("")
    files = {path.stem: path for path in root.glob(f"{start}Input/[!.]*.jpg")}
    return index_of_rows(rows[["image", "class", "group"]], files, names, source, "lesion")


def skin7(root: Path, _: str, split: str) -> Index:
    """HAM10000 as ISIC 2018 Task 3 or Harvard Dataverse has it, by lesion; `official` adds ISIC's test part."""
    there = (root / "ISIC2018_Task3_Training_Input").exists()
    train = challenge(root, "Training") if there else from_table(root, name="skin7")
    if split != "official":
        return train
    test = challenge(root, "Test")
    parts = np.repeat(["train", "test"], [len(train), len(test)])
    both = {of: np.append(getattr(train, of), getattr(test, of)) for of in ("labels", "ids", "groups")}
    return replace(train, **both, files=train.files + test.files, parts=parts)


def split_file(root: Path, index: Index, split: str) -> np.ndarray:
    """Skin7's folds as others published them: int64 (N,), 1..5, or 1 test, 0 training and -1 neither.

    `paper` is the authors' five folds, `dermamnist-c` the leak-free parts of Abhishek et al. (2025), in which an image
    without a row is for training. FileNotFoundError if the file is not there, ValueError if it does not fit.
    """
    path = Path(os.environ.get("DEEPKNN_SKIN7_FOLDS") or root / "folds.csv").expanduser()
    path = path if split == "paper" else root / "dermamnist_c.csv"
    fetched = [root / f"split_data_{fold}_fold_test.csv" for fold in range(1, 6)]
    if path.is_file():
        names = {"image_id": "image", "split": "fold", "part": "fold", "test_fold": "fold"}
        rows = table(path).rename(columns=names)
    elif split == "paper" and fetched[0].is_file():
        five = [table(path, "image_test").assign(fold=str(fold)) for fold, path in enumerate(fetched, 1)]
        rows, path = pd.concat(five, ignore_index=True), fetched[0]
        rows["image"] = rows["image_test"].str.removesuffix(".jpg")
    else:
        how = "run `python -m deepknn_lib download skin7`, point DEEPKNN_SKIN7_FOLDS at a CSV with the "
        how += "columns image,test_fold (see data/README.md), or use split='grouped'"
        raise FileNotFoundError(f"skin7's split {split} needs {path}: {how}")
    if not {"image", "fold"} <= {*rows}:
        raise ValueError(f"{path} needs the columns image and test_fold; it has {', '.join(rows)}")
    wrong = rows[rows["image"].duplicated() | ~rows["fold"].isin([*FOLDS])]
    if len(wrong):
        what = f"{wrong['image'].iloc[0]!r} is there again, or its fold is not one of {', '.join(FOLDS)}"
        raise ValueError(f"{path}, line {wrong.index[0] + 2}: {what}; correct or remove it")
    folds = rows.set_index("image")["fold"].map(FOLDS).reindex(index.ids)
    off = [*folds.index[folds.isna()]] if split == "paper" else [*{*rows["image"]} - {*index.ids}]
    if off:
        raise ValueError(f"{path} and the images differ by {len(off)}, as {off[0]}: is it this set's?")
    return folds.fillna(0).to_numpy(np.int64)


def own_images(root: Path, argument: str, _: str) -> Index:
    """Anyone's images with a `labels.csv`, or in class folders; ValueError if they and their tables do not fit.

    Class folders lie in `root`, in its `images/`, or in `train/` and `test/` there. Groups are those of `labels.csv`,
    else of `groups.csv`, else the patients in DICOM's headers.
    """
    base, source = root / "images" if (root / "images").is_dir() else root, root / "labels.csv"
    files, notes = images_in(base)
    if not source.is_file() and any("/" not in image for image in files):
        source = root.parent / "labels.csv"  # beside a folder that is nothing but images
    rows, unit, more = by_table(source, base, files) if source.is_file() else by_folders(base, files)
    known = rows.drop_duplicates("image").set_index("image")
    if left_out := sorted(files.keys() - {*known.index}):
        why = f"without a row in {source.name}" if source.is_file() else "outside of the class folders"
        notes.append(f"{some(left_out, 'images')} {why} are left out")
    files, notes = {image: path for image, path in files.items() if image in known.index}, notes + more
    if not unit and (root / "groups.csv").is_file():
        source, groups = root / "groups.csv", table(root / "groups.csv")
        if "file" not in groups or groups.shape[1] == 1:
            raise ValueError(f"{source} needs the column file and one more, such as patient_id")
        images = full_ids(groups.pop("file"), base, source, files)
        unit, kinds = UNIT.sub("", groups.columns[0]) or "group", images.map(known["class"])
        rows = pd.DataFrame({"image": images, "class": kinds, "group": groups.iloc[:, 0]})
        rows = rows[~images.isin(left_out)]
    elif not unit:
        unit, more = by_header(rows, files)
        notes += more
    names, rows = tuple(sorted({*known["class"]} - {""})), rows[["image", "class", "group"]]
    index = index_of_rows(rows, files, names, source, unit, notes=tuple(notes))
    parts = known["part"].reindex(index.ids).to_numpy(str)
    return replace(index, parts=parts if all(parts) else None, title=root.name if argument else "")


def images_in(base: Path) -> tuple[dict[str, Path], list[str]]:
    """All images below a folder by their paths in it, and a note of other files; hidden files are not looked at."""
    images, others, seen = {}, {}, set()
    for folder, inner, names in os.walk(base, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # A link leads back.
            inner.clear()
            continue
        inner[:] = [name for name in inner if name[0] != "." and name != "__MACOSX"]
        seen.add(real)
        for path in (Path(folder, name) for name in names if name[0] != "."):
            if path.suffix.lower() not in TEXTS:
                (images if is_image(path) else others)[path.relative_to(base).as_posix()] = path
    told = f"{some(sorted(others), 'files')} are no images of a known kind and left out"
    return dict(sorted(images.items())), [told] * bool(others)


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name, or begins as DICOM does."""
    named = path.suffix.lower() in SUFFIXES | DICOM
    if named or not path.is_file():
        return named
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def by_table(source: Path, base: Path, files: dict[str, Path]) -> tuple[pd.DataFrame, str, list[str]]:
    """Image, class, group and part by `labels.csv`; what a group is, if it has such a column; and notes."""
    rows = (
        table(source, "image", "label")
        .drop(columns="class", errors="ignore")
        .rename(columns={"label": "class"})
    )
    units = {column: UNIT.sub("", column).lower() for column in rows}
    group = next((column for column, unit in units.items() if unit in ("patient", "lesion", "group")), "")
    unused = [column for column in rows if column not in ("image", "class", "split", group)]
    notes = [f"{source.name}: the columns {', '.join(unused)} are not used"] * bool(unused)
    images = full_ids(rows["image"], base, source, files)
    rows = rows.assign(image=images, group=rows[group] if group else images, part="")
    if "split" in rows:
        told = rows["split"].str.strip().str.lower()
        rows["part"] = told.map(PARTS).fillna("")
        if {*rows["part"]} != {"train", "test"}:
            wrong = some(sorted({*told} - PARTS.keys()), "unknown words")
            raise ValueError(f"{source}: the column split needs train and test (perhaps val); it has {wrong}")
        if val := told.str.startswith("val").sum():
            notes.append(f"{val} images of the split val are put to the training part")
    return rows, units.get(group, ""), notes


def by_folders(base: Path, files: dict[str, Path]) -> tuple[pd.DataFrame, str, list[str]]:
    """The same by folders, without groups; a ValueError names the layout if it is another one, and says what to do."""
    paths = [image.split("/") for image in files]
    tops = {path[0] for path in paths if len(path) > 1}
    nested = {path[0] for path in paths if len(path) > 2 and path[0].lower() in PARTS}
    depth = int({PARTS[top.lower()] for top in nested} == {"train", "test"})
    used = [path for path in paths if len(path) > depth + 1 and (not depth or path[0] in nested)]
    sizes = Counter(path[depth] for path in used)
    inside = [path for top in (nested if depth else ".") for path in (base / top).glob("[!.]*")]
    empty = sorted({path.name for path in inside if path.is_dir()} - {*sizes, "__MACOSX"})
    inside = [path[:-1] for path in used if path[depth] == max(sizes, key=sizes.get)]  # of the largest class
    shared = os.path.commonprefix(inside)
    inner, told = sorted({path[len(shared)] for path in inside if len(path) > len(shared)}), ""
    if nested and not depth and all(top.lower() in PARTS for top in tops):
        told = f"class folders are in {', '.join(sorted(nested))} only: rename a part with class folders to test, or "
        told += f"name one part for five folds of it, as in folder:{base / min(nested)}"
    elif len(inner) > 1 and len(used) < len(inside) + 5:
        told = f"it looks one level too high: use folder:{base.joinpath(*shared)} with {', '.join(inner)}"
    elif empty and tops:
        told = f"{', '.join(empty)} has no images of a known kind: convert them, or remove it"
    elif len(sizes) < 2:
        told = "put images into class folders, or write labels.csv with the columns image and label"
    if told:
        there = ", ".join(sorted(tops)) or "none"
        raise ValueError(f"{base} needs folders of 2 or more classes with images; it has {there}; {told}")
    rows = [(*["/".join(path)] * 2, path[depth], PARTS[path[0].lower()] if depth else "") for path in used]
    return pd.DataFrame(rows, columns=["image", "group", "class", "part"]), "", []


def by_header(rows: pd.DataFrame, files: dict[str, Path]) -> tuple[str, list[str]]:
    """Put the PatientIDs of DICOM files into the groups, unless all are the same; what a group is then, and notes."""
    dicom = {i: path for i, path in files.items() if path.suffix.lower() not in SUFFIXES and path.is_file()}
    told = {i: who for i, path in dicom.items() if (who := patient_of(path, path.stat().st_mtime_ns))}
    if len({*told.values()}) < 2:
        same = "PatientID is the same in all DICOM files and tells no patients apart"
        return "", [same] * bool(told) + likely_patients(rows)
    rows["group"] = rows["image"].map(told).fillna(rows["group"])
    without = sorted(files.keys() - told.keys())
    note = f"{some(without, 'images')} have no PatientID; each counts as one of another patient"
    return "patient", [note] * bool(without)


@functools.cache
def patient_of(path: Path, _: int) -> str:
    """The PatientID in a DICOM file; empty if it has none or cannot be read."""
    from pydicom import dcmread

    try:
        header = dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
        return str(header.get("PatientID", "")).strip()
    except Exception:  # Decoding says what is wrong with the file.
        return ""


def likely_patients(rows: pd.DataFrame) -> list[str]:
    """A note if the names of many images look like several images of one patient, numbered or in a folder."""
    alike = {}
    for image, name in zip(rows["image"], rows["class"], strict=True):
        *folders, file = image.split("/")
        inner = "/".join(folders[folders.index(name) + 1 :]) if name in folders else ""
        numbered = COUNTER.fullmatch(file.rpartition(".")[0])
        if inner or numbered:
            alike.setdefault(inner or numbered[1], []).append(image)
    several = [images for images in alike.values() if len(images) > 1]
    told = f"{sum(map(len, several))} images look like several of one patient, {len(several)} patients in all"
    return [f"{told}, as {' and '.join(several[0][:2])}"] if len(several) > 1 else []


def full_ids(named: pd.Series, base: Path, source: Path, files: dict[str, Path]) -> pd.Series:
    """Ids of images that a table names with or without sub-folder and extension; what fits no file stays as it is."""
    short, start = {}, f"{os.path.relpath(base, source.parent)}/"
    for image in files:
        folder, _, file = image.rpartition("/")
        for alias in {file, file.rpartition(".")[0], f"{folder}/{file.rpartition('.')[0]}"}:
            short.setdefault(alias, []).append(image)
    names = named.str.strip().str.replace("\\", "/").str.removeprefix("./").str.removeprefix(start)
    several = [name for name in names if name not in files and len(short.get(name, ())) > 1]
    if several:
        raise ValueError(f"{source}: {some(several, 'names')} fit several files; write the sub-folder, too")
    return names.map(lambda name: name if name in files else short.get(name, [name])[0])


def lesions(_: Path, __: str, ___: str) -> Index:
    """The synthetic set, drawn at the size asked for."""
    key = digest(Path(synthetic.__file__), synthetic.LOOKS_FILE)
    return Index(*synthetic.describe(), synthetic.CLASS_NAMES, blocks=synthetic.draw, key=key, unit="lesion")


def digits(_: Path, __: str, ___: str) -> Index:
    """The scans that come with scikit-learn, whose values go from 0 to 16."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = (scans.images * (255 / 16)).round().astype(np.uint8)[:, None]
    ids = np.array([f"{number:04d}" for number in range(len(images))])
    known = {"blocks": lambda _: [images], "key": digest(images), "channels": 1}
    return Index(scans.target.astype(np.int64), ids, ids, tuple("0123456789"), **known)


def index_of_parts(labels: dict[str, np.ndarray], names: Iterable[str], images=None, **known) -> Index:
    """The index of "train", "test" and perhaps "val", which is put to the training part, and `known` fields of it."""
    ids = np.array([f"{part}/{n:06d}" for part, of_part in labels.items() for n in range(len(of_part))])
    parts = np.array([PARTS[image.split("/")[0]] for image in ids])
    numbers = np.concatenate([np.ravel(of_part) for of_part in labels.values()]).astype(np.int64)
    if images:
        known = {"blocks": lambda _: images, "key": digest(*images), "channels": images[0].shape[1]}
    return Index(numbers, ids, ids, tuple(names), parts=parts, **known)


def mnist(root: Path, _: str, __: str) -> Index:
    """MNIST through torchvision, which unpacks what `download` has fetched."""
    from torchvision.datasets import MNIST

    train, test = (MNIST(root, train=train, download=True) for train in (True, False))
    images = [part.data.numpy()[:, None] for part in (train, test)]
    return index_of_parts({"train": train.targets, "test": test.targets}, "0123456789", images)


def stl10(root: Path, _: str, __: str) -> Index:
    """STL10 through torchvision, which unpacks what `download` has fetched."""
    from torchvision.datasets import STL10

    train, test = (STL10(root, part, download=True) for part in ("train", "test"))
    labels = {"train": train.labels, "test": test.labels}
    return index_of_parts(labels, CATALOG["stl10"].classes, [train.data, test.data])


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
    labels, side = {}, int(info["size"])
    for part in ("train", "val", "test"):
        if missing := sorted({f"{part}_images", f"{part}_labels"} - {*stored.files}):
            raise ValueError(f"{path} has no {' and no '.join(missing)}")
        labels[part] = stored[f"{part}_labels"]
        with stored.zip.open(f"{part}_images.npy") as file:  # Its header says how large the array is.
            np.lib.format.read_magic(file)
            count, *shape = np.lib.format.read_array_header_1_0(file)[0]
        if count != len(labels[part]) or shape[:2] != [side, side]:
            held = f"{count} images of {shape[0]} × {shape[1]} pixels and {len(labels[part])} labels"
            raise ValueError(f"{path}: its part {part} has {held}, not as many of {side} × {side}")

    def blocks(_: int) -> Iterator[np.ndarray]:
        for part in labels:
            try:
                images = stored[f"{part}_images"]
            except Exception as error:  # zipfile and zlib name wrong bytes in many ways
                remedy = f"remove it and run `python -m deepknn_lib download medmnist:{argument}`"
                raise ValueError(f"{path}: {part}'s images cannot be read ({error!r}); {remedy}") from error
            yield images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)

    known = {"title": f"{info['python_class']} (MedMNIST+, {side} × {side})", "channels": info["n_channels"]}
    known |= {"blocks": blocks, "key": digest(f"{path.stat().st_size} {path.stat().st_mtime_ns}")}
    return index_of_parts(labels, info["label"].values(), **known)


READERS = dict.fromkeys(("sd198", "chestxray3", "folder"), own_images) | {"pneumonia": from_table}
READERS |= {read.__name__: read for read in (lesions, skin7, medmnist, stl10, mnist, digits)}
