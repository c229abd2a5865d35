"""Readers of image files: each turns a folder in a known layout into a `Listing`, with all that is wrong in it."""

import csv
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from deepknn_lib.images import SUFFIXES, Listing, Problem

SKIN7_CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
PNEUMONIA_CLASSES = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")
SKIN7_LAYOUTS = ("ISIC2018_Task3_Training_Input", "HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab")
PARTS = {"train": "train", "val": "train", "valid": "train", "validation": "train", "test": "test"}


def table(path: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of a CSV (or tab-separated .tab) file; an error that names it if it is not there or lacks a column."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; see data/README.md for the layout")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tab" else ",")
            if not set(columns) <= set(reader.fieldnames or ()):
                raise ValueError(f"{path} needs the columns {', '.join(columns)}; it has {reader.fieldnames}")
            return list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table ({error}); save it as CSV in UTF-8") from error


def listed(rows: list[tuple[str, str, str]], files: dict[str, Path], names: tuple[str, ...], source: Path) -> Listing:
    """A listing from a table of labels and the files that are there; what does not fit together becomes a problem.

    Parameters
    ----------
    rows : list of (id, class, group)
    files : dict
        Image files by id.
    names : tuple of str
        The classes there are.
    source : Path
        The table, to be named in problems.
    """
    problems, kept = [], {}
    rows = sorted(tuple(value or "" for value in row) for row in rows)  # a short row of a CSV has None at its end
    for image, kind, group in rows:
        if image in kept:
            problems.append(Problem("duplicate id", image, f"is in {source} again; keep one of its rows"))
        elif kind not in names:
            problems.append(Problem("unknown class", image, f"is {kind!r} in {source}; the classes are {', '.join(names)}"))
        elif image not in files:
            problems.append(Problem("row without image", image, f"is in {source}, but no file is; unpack the images again"))
        elif not group:
            problems.append(Problem("no group", image, f"has no lesion or patient in {source}; give it one"))
        else:
            kept[image] = (names.index(kind), group)
    known = {image for image, _, _ in rows}
    for image in sorted(files.keys() - known):
        problems.append(Problem("image without row", str(files[image]), f"has no row in {source}; add one or remove it"))
    ids = list(kept)
    labels = np.array([kept[i][0] for i in ids], dtype=np.int64)
    groups = np.array([kept[i][1] for i in ids], dtype=str)
    return Listing(labels, np.array(ids, dtype=str), groups, names, [files[i] for i in ids], problems=problems)


def images_in(folder: Path, suffixes: set[str] = SUFFIXES) -> list[Path]:
    """The image files right inside a folder, by name."""
    try:
        found = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise OSError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
    return [folder / name for name in sorted(found) if Path(name).suffix.lower() in suffixes]


def skin7(root: Path, _: str, __: int) -> Listing:
    """HAM10000, as the official files of ISIC 2018 Task 3 or those of Harvard Dataverse; groups are lesions."""
    official, *dataverse = SKIN7_LAYOUTS
    if not (root / official).exists():
        metadata = next(root / name for name in dataverse if (root / name).exists())
        rows = [(r["image_id"], r["dx"], r["lesion_id"]) for r in table(metadata, "image_id", "dx", "lesion_id")]
        folders = [p for p in (root, root / "HAM10000_images_part_1", root / "HAM10000_images_part_2") if p.is_dir()]
        files = {file.stem: file for folder in folders for file in images_in(folder, {".jpg"})}
        return listed(rows, files, SKIN7_CLASSES, metadata)
    truth = root / "ISIC2018_Task3_Training_GroundTruth" / "ISIC2018_Task3_Training_GroundTruth.csv"
    groupings = root / "ISIC2018_Task3_Training_LesionGroupings.csv"
    lesion = {row["image"]: row["lesion_id"] for row in table(groupings, "image", "lesion_id")}
    columns, rows = [name.upper() for name in SKIN7_CLASSES], []
    for row in table(truth, "image", *columns):
        chosen = [name for name in SKIN7_CLASSES if row[name.upper()] in {"1", "1.0"}]
        zeros = sum(row[column] in {"0", "0.0"} for column in columns)
        kind = chosen[0] if len(chosen) == 1 and zeros == len(columns) - 1 else " + ".join(chosen) or "none"
        rows.append((row["image"], kind, lesion.get(row["image"], "")))
    files = {file.stem: file for file in images_in(root / official, {".jpg"})}
    return listed(rows, files, SKIN7_CLASSES, truth)


def skin7_folds_file(root: Path) -> Path:
    """Where the authors' folds are; FileNotFoundError, which says how to get them, if they are not there."""
    given = os.environ.get("DEEPKNN_SKIN7_FOLDS")
    path = Path(given).expanduser() if given else root / "folds.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"skin7's paper split needs the authors' folds, and there is no {path}. Get them with `python -m deepknn_lib "
            "download skin7`, point DEEPKNN_SKIN7_FOLDS at a CSV with the columns image,test_fold (see data/README.md), or "
            "use split='grouped'"
        )
    return path


def skin7_folds(root: Path, listing: Listing, _: int) -> np.ndarray:
    """The authors' five folds of images."""
    from deepknn_lib.splits import folds_from_csv

    return folds_from_csv(skin7_folds_file(root), listing.ids)


def pneumonia(root: Path, _: str, __: int) -> Listing:
    """The RSNA Pneumonia Detection Challenge as Kaggle's archive unpacks; one row a patient, who is the group."""
    info = root / "stage_2_detailed_class_info.csv"
    rows = {(row["patientId"], row["class"]) for row in table(info, "patientId", "class")}  # a row a box: many a patient
    files = {file.stem: file for file in images_in(root / "stage_2_train_images", {".dcm"})}
    return listed([(patient, kind, patient) for patient, kind in rows], files, PNEUMONIA_CLASSES, info)


def sd198(root: Path, _: str, size: int) -> Listing:
    """SD-198, or those of its classes that are there, as class folders; every image is its own group."""
    listing = folder(root, "", size)
    n_classes = len(listing.class_names)
    return replace(listing, title="SD-198" if n_classes == 198 else f"SD-198, {n_classes} of its 198 classes")


def sd198_folds(root: Path, listing: Listing, fold: int) -> np.ndarray | None:
    """A fold of SD-198's own split files: `fold` for its test images, 0 for the others; None if no files fit these images.

    A pair of files, `…train_1.txt` with `…val_1.txt` or `…test_1.txt`, is a fold; each line is a file below `images/`
    and a number. Pairs that hold other images (of a selection of classes) are passed over; the others are counted by name.

    Raises
    ------
    ValueError
        If an image is named twice in a pair, or there is no such fold.
    """
    pairs, known = {}, set(listing.ids.tolist())
    for path in sorted([*root.glob("*.txt"), *root.glob("*/*.txt")]):
        part = re.search("train|val|test", path.name)
        if part:
            lines = [line.rsplit(maxsplit=1)[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            stem = path.with_name(path.name.replace(part[0], "*", 1))
            pairs.setdefault(stem, {})["train" if part[0] == "train" else "test"] = lines
    fitting = [p for _, p in sorted(pairs.items()) if set(p.get("train", [])) | set(p.get("test", [])) == known]
    if not fitting:
        return None
    if fold > len(fitting):
        raise ValueError(f"sd198's own split files in {root} make {len(fitting)} folds, and there is no fold {fold}")
    counts = Counter(fitting[fold - 1]["train"] + fitting[fold - 1]["test"])
    if max(counts.values()) > 1:
        twice = counts.most_common(1)[0][0]
        raise ValueError(f"sd198's split files in {root} name {twice} twice in fold {fold}; an image is in one part, once")
    return np.where(np.isin(listing.ids, fitting[fold - 1]["test"]), fold, 0)


def chestxray3(root: Path, _: str, size: int) -> Listing:
    """Chest X-rays of three classes as class folders, with their patients: a stand-in for the RSNA Pneumonia set."""
    return replace(folder(root, "", size), title="")


def folder(root: Path, _: str, __: int) -> Listing:
    """Class folders in `root` or in its `images/`, or in `train/` and `test/` there; groups from `groups.csv`.

    Raises
    ------
    ValueError, OSError
        If it has fewer than two classes or cannot be read.
    """
    base = root / "images" if (root / "images").is_dir() else root
    inside = _subfolders(base)
    parts = {p: PARTS[p.name.lower()] for p in inside if p.name.lower() in PARTS and _subfolders(p)}
    if not {"train", "test"} <= set(parts.values()):
        parts = {}
    classes = [(c, parts[p]) for p in parts for c in _subfolders(p)] if parts else [(c, "") for c in inside]
    names = tuple(sorted({c.name for c, _ in classes}))
    if len(names) < 2:
        raise ValueError(f"{base} must hold a sub-folder with images for each of at least 2 classes; it has {len(names)}")
    number = {name: label for label, name in enumerate(names)}
    found = [(file, number[c.name], part) for c, part in classes for file in images_in(c)]
    ids = np.array([file.relative_to(base).as_posix() for file, _, _ in found], dtype=str)
    labels = np.array([label for _, label, _ in found], dtype=np.int64)
    problems = [
        Problem("empty class", names[label], f"has no images in {base}; add some or remove the folder")
        for label in np.setdiff1d(np.arange(len(names)), labels)
    ]
    groups = _groups(root / "groups.csv", ids, problems) if (root / "groups.csv").is_file() else ids
    return Listing(
        labels,
        ids,
        groups,
        names,
        [file for file, _, _ in found],
        parts=np.array([part for _, _, part in found]) if parts else None,
        problems=problems,
        title=root.name,
    )


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise OSError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error


def _groups(path: Path, ids: np.ndarray, problems: list[Problem]) -> np.ndarray:
    """The group of each image by the first column of `groups.csv` that is not `file`; what does not fit is a problem."""
    rows = table(path, "file")
    column = next((c for c in (rows[0] if rows else {}) if c and c != "file"), None)
    if column is None:
        raise ValueError(f"{path} needs the column file and one more, such as patient_id, and at least one row")
    group, known = {}, set(ids.tolist())
    for row in rows:
        image = (row["file"] or "").removeprefix("images/")
        if image in group:
            problems.append(Problem("duplicate id", image, f"is in {path} again; keep one of its rows"))
        elif image not in known:
            problems.append(Problem("row without image", image, f"is in {path}, but no file is; remove the row"))
        group.setdefault(image, row[column] or "")
    for image in ids:
        if not group.get(image):
            problems.append(Problem("no group", str(image), f"has no group in {path}; add a row with its patient"))
    return np.array([group.get(i) or i for i in ids.tolist()], dtype=str)
