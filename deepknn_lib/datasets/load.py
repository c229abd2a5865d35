"""Data sets by name: a name is looked up once, and its folder, index, split and images follow from it."""

import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd

from deepknn_lib.datasets import readers
from deepknn_lib.datasets.decode import INTERPOLATIONS, ImageSet, decode
from deepknn_lib.storage import data_dir, digest, unknown, write_csv

SPLITS, N_FOLDS, SEED = ("paper", "grouped"), 5, 2020  # the seed is that of the folds we draw ourselves
FOLDS = range(1, N_FOLDS + 1)
NO_GROUPS = "no groups are given: one patient may be in training and test, no check can show it, and the split grouped "
NO_GROUPS += "is one by image; name patients in groups.csv (columns file,patient_id; see data/README.md)"
MANY = 5000  # images; our split by group takes long over as many groups, and needs none of it when all differ


@dataclass(frozen=True)
class Dataset:
    """A training and a test part; the class names in the order of the labels; and what a reader has to know.

    `info` holds `title`, `synthetic` (bool), `licence`, `citation`, `split`, `fold`, `unit` (what a group is, such as
    "patient"; empty if none are given) and `smallest`, the label of the class with the fewest images in the whole set.
    """

    name: str
    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    info: dict


class Finding(NamedTuple):
    """What is wrong, doubtful or worth knowing in a data set; a row of `verify`'s table."""

    severity: str  # "error", "warning" or "note"
    check: str
    item: str = ""  # the image, class, group or split
    other: str = ""  # the second image of a pair
    detail: str = ""


def load_dataset(name, split="paper", fold=1, image_size=48, interpolation="bilinear") -> Dataset:
    """Load a data set, decoding it on first use; the split is left as a CSV of ids in `data_dir()/splits`.

    ValueError or OSError if an argument is unknown, files are missing, bad or contradict each other, a part cannot be
    judged, or the disk is full. The message says what to do; for a set that is not there, how to get it. A UserWarning
    says what was left out of a folder, and that images of one patient may be in both parts where no groups are given.

    Parameters
    ----------
    name : str
        A key of `CATALOG`; `folder:<path>` takes anyone's class folders, `medmnist:<flag>@<size>` a set of MedMNIST+.
    split : {"paper", "grouped", "dermamnist-c", "official"}
        `paper`: five folds of images (for `skin7` the authors'), or the ready-made parts where a set has them.
        `grouped`: five folds of lesions or patients, none in both parts; for a folder without groups the split `paper`.
        Of skin7 alone, with one fold: `dermamnist-c`, the leak-free parts of Abhishek et al. (2025), whose validation
        images are in neither part; and `official`, which tests on the test images of ISIC 2018 Task 3.
    fold : int
        1..5, the fold to test on; the other four are for training. Ready-made parts are fold 1.
    image_size, interpolation : int and {"bilinear", "bicubic"}
        Side in pixels to which every image is squashed (256 in the paper), and how, as a backbone was pretrained.
    """
    entry, index, folds, everything, doubts = _read(name, split, fold, image_size, interpolation)
    if doubts:
        warnings.warn(f"{name}: {'; '.join(doubts)}", stacklevel=2)
    kinds = np.array(index.class_names)[index.labels]
    rows = pd.DataFrame({"image": index.ids, "group": index.groups, "class": kinds, "test_fold": folds})
    write_csv(rows, data_dir() / "splits" / f"{entry.file_name}-{split}.csv")
    info = {key: getattr(entry, key) for key in ("title", "synthetic", "licence", "citation")}
    info |= dict(split=split, fold=fold, unit=index.unit, smallest=int(np.bincount(index.labels).argmin()))
    if len(index.class_names) < entry.n_classes:
        info["title"] += f", {len(index.class_names)} of its {entry.n_classes} classes"
    train, test = everything.take((folds != fold) & (folds >= 0)), everything.take(folds == fold)
    return Dataset(name, train, test, index.class_names, info)


def validation_part(data: Dataset) -> Dataset:
    """A fifth of the training part as test part, by group if the data are split so; the real test part is left out."""
    train, tested = data.train, {*data.test.groups}
    apart = len({*train.groups}) < len(train) and tested.isdisjoint(train.groups)
    grouped = apart or data.info["split"] != "paper"
    folds = group_folds(train.labels, train.groups) if grouped else image_folds(train.labels)
    part = replace(data, train=train.take(folds != 1), test=train.take(folds == 1))
    lacks = np.bincount(part.train.labels, minlength=len(data.class_names)) == 0
    lacks[data.info["smallest"]] |= data.info["smallest"] not in part.test.labels
    if lacks.any():
        told = f"beside or in the validation part are no images of {', '.join(np.array(data.class_names)[lacks])}"
        raise ValueError(f"{data.name}: {told}; judge on the test part")
    return part


def dataset_digest(name, split="paper", fold=1, image_size=48, interpolation="bilinear") -> str:
    """Twelve digits of a sha256 of what `load_dataset` gives: class names, ids, labels, groups, split and pixels."""
    _, index, folds, everything, _ = _read(name, split, fold, image_size, interpolation)
    texts = ("\n".join(lines) for lines in (index.class_names, index.ids, index.groups))
    unseen = [folds < 0] * bool((folds < 0).any())  # neither in training nor in the test
    return digest(*texts, index.labels, folds == fold, *unseen, hashlib.sha256(everything.images).hexdigest())


def _read(name: str, split: str, fold: int, size: int, interpolation: str) -> tuple:
    """A set by its name, its index, folds, images and doubts; ValueError for what is wrong or cannot be meant."""
    entry = check_split(name, split, fold)
    if size < 16 or interpolation not in INTERPOLATIONS:
        what = f"image_size must be at least 16 pixels and interpolation one of {INTERPOLATIONS}"
        raise ValueError(f"{what}, got {size} and {interpolation!r}")
    index = index_of(entry, split)
    folds = folds_of(entry, index, split, fold)
    found = [*flaws(index, {split: folds}, [fold])]
    for error in (one for one in found if one.severity == "error"):
        raise ValueError(f"{name}: {error.check}: {error.detail}")
    images = ImageSet(decode(index, entry, size, interpolation), index.labels, index.ids, index.groups)
    doubts, tested = [one.detail for one in found if one.severity == "warning"], folds == fold
    both = {*index.groups[tested]} & {*index.groups[~tested & (folds >= 0)]}
    if both and entry.kind == "folder":  # The published splits of other sets are what they are.
        doubts.append(
            f"{readers.some(sorted(both), index.unit + 's')} are in training and test; take the split grouped"
        )
    return entry, index, folds, images, doubts


def check_split(name: str, split: str, fold: int) -> SimpleNamespace:
    """The data set of a name; ValueError if there is none, or the set has no such split and fold."""
    entry = entry_of(name)
    if split not in entry.splits:
        raise unknown("split", split, entry.splits)
    if fold not in FOLDS:
        raise ValueError(f"the fold is one of 1 to {N_FOLDS}, got {fold!r}")
    return entry


def entry_of(name: str) -> SimpleNamespace:
    """The catalogue's entry of a name, and with it `name`, `kind`, `root`, `file_name` and `by_hand`.

    `root` is the folder of the set; `file_name` begins the names of files made of it. ValueError for an unknown name.
    """
    kind, _, argument = name.partition(":")
    if kind not in readers.CATALOG or bool(argument) != bool(readers.CATALOG[kind].argument):
        if Path(name).is_dir():
            raise ValueError(f"unknown data set {name!r}; did you mean folder:{name}?")
        raise unknown("data set", name, [f"{n}:{e.argument}".rstrip(":") for n, e in readers.CATALOG.items()])
    known = vars(readers.CATALOG[kind]) | {"name": name, "kind": kind, "root": data_dir() / kind}
    known["file_name"] = re.sub(r"\W", "-", name)
    if kind == "folder":
        root = known["root"] = Path(argument).expanduser().resolve()
        known |= {"title": root.name, "file_name": f"folder-{root.name[:40]}-{digest(str(root))}"}
    elif kind == "medmnist":
        known |= _medmnist(argument)
    where = f"the folder: {known['root']}; the page: {known['page']}; see data/README.md"
    return SimpleNamespace(**known, by_hand=f"By hand: {known['steps']} ({where})")


def place(entry: SimpleNamespace) -> Path:
    """The folder of an entry; FileNotFoundError, which says how to get the set, if it is not there."""
    if entry.kind == "folder" and not entry.root.is_dir():
        raise FileNotFoundError(f"{entry.name}: there is no folder {entry.root}")
    if entry.wanted and not any((entry.root / file).exists() for file in entry.wanted):
        command = f"Run `python -m deepknn_lib download {entry.name}` ({entry.size}). " if entry.size else ""
        raise FileNotFoundError(f"{entry.name} is not in {entry.root}. {command}{entry.by_hand}")
    return entry.root


def _medmnist(argument: str) -> dict:
    """What the entry of `<flag>@<size>` (28 if left out) has besides, by what the medmnist package says of the set."""
    from medmnist import INFO

    flag, _, size = argument.partition("@")
    usable = [f for f, about in INFO.items() if not f.endswith("3d") and "multi-label" not in about["task"]]
    if flag not in usable or size not in ("", "28", "64", "128", "224"):
        what = f"medmnist:{argument}: the sizes are 28, 64, 128 and 224, as in medmnist:bloodmnist@64"
        raise ValueError(f"{what}; the 2-D sets with one label an image are {', '.join(usable)}")
    info, side, end = INFO[flag], int(size or 28), "" if size in ("", "28") else f"_{size}"
    file = {"name": f"{flag}{end}.npz", "url": info[f"url{end}"], "made": ""}
    file["checksum"] = f"md5:{info[f'MD5{end}']}"
    title = f"{info['python_class']} (MedMNIST+, {side} × {side})"
    return {"title": title, "remotes": [file], "wanted": [file["name"]], "about": info | {"side": side}}


def index_of(entry: SimpleNamespace, split: str | None = None) -> readers.Index:
    """What a set holds (skin7 more in its split `official`), and what is wrong in its tables and folders."""
    root = place(entry)
    try:
        return getattr(readers, entry.reader)(entry, split)
    except Exception as error:  # half a file, a wrong checksum: torchvision and NumPy raise many kinds
        if entry.kind not in ("mnist", "stl10", "medmnist"):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        remedy = f"Remove what is broken there and run `python -m deepknn_lib download {entry.name}`"
        raise ValueError(f"{entry.name} cannot be read in {root} ({reason}). {remedy}") from error


def folds_of(entry: SimpleNamespace, index: readers.Index, split: str, fold: int = 1) -> np.ndarray:
    """The fold that tests each image, int64 (N,): 1..5, 0 for never, -1 for neither test nor training.

    ValueError or FileNotFoundError if there is no such fold, or the published folds are not there or do not fit.
    """
    single = entry.kind == "folder" and not index.unit
    if split == "grouped" and not single:
        shared = len({*index.groups}) < len(index.groups)
        by_group = shared or (len(index.groups) <= MANY and index.parts is None)
        folds = group_folds(index.labels, index.groups) if by_group else image_folds(index.labels)
        for group, other in entry.twins.items():
            if other in index.groups:  # Pictures that are nearly the same are filed under two lesions.
                folds[index.groups == group] = folds[index.groups == other][0]
        return folds
    if index.parts is not None:
        folds = (index.parts == "test").astype(np.int64)
    elif entry.kind == "skin7":
        folds = readers.split_file(entry.root, index, split)
    else:
        folds = image_folds(index.labels)
    if not (folds == fold).any():
        told = f"{entry.name} has one test part in the split {split}, fold 1, not {fold}"
        raise ValueError(told if single else f"{told}; use split='grouped'")
    return folds


def distinct_splits(name: str, splits: Iterable[str]) -> list[str]:
    """Of some splits those that differ by more than chance: without groups `grouped` says no more than `paper`."""
    same = "paper" in splits and not index_of(entry_of(name)).unit
    return [split for split in splits if not (same and split == "grouped")]


def image_folds(labels: np.ndarray) -> np.ndarray:
    """Five stratified folds of images: int64 (N,), 1..5. Views of one lesion may fall into different folds."""
    rng, folds = np.random.default_rng(SEED), np.zeros(len(labels), dtype=np.int64)
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        # A random start keeps the surplus images of small classes from all landing in fold 1.
        folds[members] = (np.arange(len(members)) + rng.integers(N_FOLDS)) % N_FOLDS + 1
    return folds


def group_folds(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Five folds of about equal size in which all images of a group share a fold: int64 (N,), 1..5.

    These are the folds of scikit-learn's StratifiedGroupKFold up to its version 1.7, on which our results rest. It
    shuffles the class counts of the groups and not the groups, so that the classes are spread no better than by chance.
    """
    sizes, (names, group_of) = np.bincount(labels).clip(1), np.unique(groups, return_inverse=True)
    counts, held = np.zeros((len(names), len(sizes))), np.zeros((N_FOLDS, len(sizes)))
    np.add.at(counts, (group_of, labels), 1)
    np.random.RandomState(SEED).shuffle(counts)
    folds = np.zeros(len(names), dtype=np.int64)
    for group in np.argsort(-counts.std(1), kind="stable"):
        trials = held + np.eye(N_FOLDS)[..., None] * counts[group]  # It is in the first fold, the second, …
        uneven, full, best = (trials / sizes).std(1).mean(1).tolist(), held.sum(1).tolist(), 0
        for fold in range(1, N_FOLDS):
            alike = abs(uneven[fold] - uneven[best]) <= 1e-8 + 1e-5 * uneven[best]  # NumPy's isclose
            if uneven[fold] < uneven[best] or (alike and full[fold] < full[best]):
                best = fold
        held[best] += counts[group]
        folds[group] = best + 1
    return folds[group_of]


def flaws(index: readers.Index, folds: dict[str, np.ndarray], tested=FOLDS) -> Iterator[Finding]:
    """What makes a set unfit or doubtful, seen before any image is opened.

    `folds` holds by the name of a split the fold that tests on each row. What keeps a part from being judged is an
    "error" for the first of the folds that are `tested`, and a "warning" for the others.
    """
    yield from (Finding("warning", "layout", detail=note) for note in index.notes)
    names = np.array(index.class_names)
    sizes = np.bincount(index.labels, minlength=len(names))
    for c in np.flatnonzero(sizes < N_FOLDS):
        told = f"{names[c]} has {sizes[c]} images; five folds need 5. Add images, or leave the class out"
        yield Finding("error", "small classes", detail=told)
    if not index.unit:
        yield Finding("warning" if index.files else "note", "no groups", detail=NO_GROUPS)
    elif alone := [name for c, name in enumerate(names) if len({*index.groups[index.labels == c]}) == 1]:
        told = f"all images of {', '.join(alone)} are of one {index.unit}, which no split can tell from the class"
        yield Finding("warning", "parts", detail=told)
    for split, of_image in folds.items():
        for fold in tested if (of_image > 0).all() else tested[:1]:
            training = (of_image != fold) & (of_image >= 0)
            for part, held in (("training", training), ("test", of_image == fold)):
                lacks = np.bincount(index.labels[held], minlength=len(names)) == 0
                if lacks.any():
                    bad = fold == tested[0] and (part == "training" or lacks[sizes.argmin()])
                    told = f"split {split}, fold {fold}: its {part} part has no images of {', '.join(names[lacks])}"
                    told += "; take another fold"
                    yield Finding("error" if bad else "warning", "parts", detail=told)


def available() -> dict[str, str]:
    """Each data set and whether it is there, or how to get it."""
    states = {}
    for name, entry in readers.CATALOG.items():
        try:
            states[name] = entry.state or f"there: {place(entry_of(name))}"
        except FileNotFoundError as error:
            states[name] = f"not there: {error}"
    return states
