"""Data sets by name: name, entry of the catalogue, index, split, array.

`catalog.json` says of each set its title, licence, citation, page, the steps by hand, its files with checksums, image
counts and pins: sha256 of the labels, groups and splits that our results rest on.
"""

import hashlib
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from deepknn_lib.datasets.decode import INTERPOLATIONS, ImageSet, decode
from deepknn_lib.datasets.readers import CATALOG, READERS, Index, medmnist_info, split_file
from deepknn_lib.storage import data_dir, digest, unknown, write_csv

SPLITS, N_FOLDS, SEED = ("paper", "grouped"), 5, 2020  # the seed is that of the folds we draw ourselves
OTHER_SPLITS = {"skin7": ("dermamnist-c", "official")}  # ready-made parts that one set has besides
NO_GROUPS = "no groups are given: one patient may be in training and test, no check can show it, "
NO_GROUPS += "and the split grouped is one by image; name patients in groups.csv "
NO_GROUPS += "(columns file,patient_id; see data/README.md)"
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
        `grouped`: five folds of lesions or patients, so that no group is in both parts; for a folder without groups
        the split `paper`. Of skin7 alone, with one fold: `dermamnist-c`, the leak-free parts of Abhishek et al. (2025),
        whose validation images are in neither part; and `official`, all 10,015 images for training and the test images
        of ISIC 2018 Task 3.
    fold : int
        1..5, the fold to test on; the other four are for training. Ready-made parts are fold 1.
    image_size, interpolation : int and {"bilinear", "bicubic"}
        Side in pixels to which every image is squashed, as the paper did (256), and how; a pretrained backbone gets
        the interpolation that it was trained with.
    """
    index, everything, folds, doubts = _read(name, split, fold, image_size, interpolation)
    if doubts:
        warnings.warn(f"{name}: {'; '.join(doubts)}", stacklevel=2)
    entry, kinds = entry_of(name)[0], np.array(index.class_names)[index.labels]
    rows = pd.DataFrame({"image": index.ids, "group": index.groups, "class": kinds, "test_fold": folds})
    write_csv(rows, data_dir() / "splits" / f"{file_name(name)}-{split}.csv")
    info = {key: getattr(entry, key) for key in ("synthetic", "licence", "citation")}
    info |= {"split": split, "fold": fold, "smallest": int(np.bincount(index.labels).argmin())}
    info |= {"title": index.title or entry.title, "unit": index.unit}
    if len(index.class_names) < entry.n_classes:
        info["title"] += f", {len(index.class_names)} of its {entry.n_classes} classes"
    train, test = everything.take((folds != fold) & (folds >= 0)), everything.take(folds == fold)
    return Dataset(name, train, test, index.class_names, info)


def validation_part(data: Dataset) -> Dataset:
    """A fifth of the training part as test part, by group if the data are split so; the real test part is left out."""
    train, grouped = data.train, data.info["split"] != "paper"
    folds = group_folds(train.labels, train.groups) if grouped else image_folds(train.labels)
    part = replace(data, train=train.take(folds != 1), test=train.take(folds == 1))
    if data.info["smallest"] not in part.test.labels:
        told = f"the validation part has no images of {data.class_names[data.info['smallest']]}"
        raise ValueError(f"{data.name}: {told}; judge on the test part")
    return part


def dataset_digest(name, split="paper", fold=1, image_size=48, interpolation="bilinear") -> str:
    """Twelve digits of a sha256 of what `load_dataset` gives: class names, ids, labels, groups, split and pixels.

    With `split=None` the split is left out, for what is the same on every split, such as frozen features.
    """
    index, everything, folds, _ = _read(name, split, fold, image_size, interpolation)
    texts = ("\n".join(lines) for lines in (index.class_names, index.ids, index.groups))
    parts = [folds == fold] if split else []
    return digest(*texts, index.labels, *parts, hashlib.sha256(everything.images).hexdigest())


def _read(name: str, split: str | None, fold: int, size: int, interpolation: str) -> tuple:
    """The index of a set, all its images, its folds and doubts; ValueError for what is wrong or cannot be meant."""
    check_split(name, split or SPLITS[0], fold)
    if size < 16 or interpolation not in INTERPOLATIONS:
        what = f"image_size must be at least 16 pixels and interpolation one of {INTERPOLATIONS}"
        raise ValueError(f"{what}, got {size} and {interpolation!r}")
    index = index_of(name, split)
    folds = folds_of(name, index, split, fold) if split else None
    found, doubts = flaws(index, {split: folds} if split else {}, [fold]), []
    for severity, check, text in found:
        if severity == "error":
            raise ValueError(f"{name}: {check}: {text}")
        doubts += [text] * (severity == "warning")
    images = decode(index, name, file_name(name), size, interpolation)
    return index, ImageSet(images, index.labels, index.ids, index.groups), folds, doubts


def flaws(index: Index, folds: dict[str, np.ndarray], tested: Sequence[int] = range(1, N_FOLDS + 1)) -> list:
    """What makes a set unfit or doubtful, seen before any image is opened: rows of severity, check, text.

    `folds` holds by the name of a split the fold that tests on each row. What keeps a part from being judged is an
    "error" for the first of the folds that are `tested`, and a "warning" for the others.
    """
    names, found = np.array(index.class_names), [("warning", "layout", note) for note in index.notes]
    sizes = np.bincount(index.labels, minlength=len(names))
    for c in np.flatnonzero(sizes < N_FOLDS):
        told = f"{names[c]} has {sizes[c]} images; five folds need 5. Add images, or leave the class out"
        found.append(("error", "small classes", told))
    if not index.unit:
        found.append(("warning" if index.files else "note", "no groups", NO_GROUPS))
    elif alone := [name for c, name in enumerate(names) if len({*index.groups[index.labels == c]}) == 1]:
        told = f"all images of {', '.join(alone)} are of one {index.unit}, which no split can tell from the class"
        found.append(("warning", "parts", told))
    for split, of_image in folds.items():
        for fold in tested if (of_image > 0).all() else tested[:1]:
            rows = {"training": (of_image != fold) & (of_image >= 0), "test": of_image == fold}
            for part, held in rows.items():
                lacks = np.bincount(index.labels[held], minlength=len(names)) == 0
                if lacks.any():
                    bad = fold == tested[0] and (part == "training" or lacks[sizes.argmin()])
                    told = f"split {split}, fold {fold}: its {part} part has no images of "
                    found.append(("error" if bad else "warning", "parts", told + ", ".join(names[lacks])))
    return found


def distinct_splits(name: str, splits: Iterable[str]) -> list[str]:
    """Of some splits those that differ by more than chance: without groups `grouped` says no more than `paper`."""
    same = "paper" in splits and not index_of(name).unit
    return [split for split in splits if not (same and split == "grouped")]


def entry_of(name: str) -> tuple[SimpleNamespace, str, str]:
    """The catalogue's entry of a name, and what is before and after its colon; ValueError for an unknown name."""
    kind, _, argument = name.partition(":")
    if kind not in CATALOG or bool(argument) != bool(CATALOG[kind].argument):
        if Path(name).is_dir():
            raise ValueError(f"unknown data set {name!r}; did you mean folder:{name}?")
        raise unknown("data set", name, [f"{n}:{e.argument}".rstrip(":") for n, e in CATALOG.items()])
    return CATALOG[kind], kind, argument


def check_split(name: str, split: str, fold: int) -> None:
    """ValueError if there is no such data set, or the set has no such split and fold."""
    known = (*SPLITS, *OTHER_SPLITS.get(entry_of(name)[1], ()))
    if split not in known:
        raise unknown("split", split, known)
    if fold not in range(1, N_FOLDS + 1):
        raise ValueError(f"the fold is one of 1 to {N_FOLDS}, got {fold!r}")


def place(name: str) -> Path:
    """The folder of a set; FileNotFoundError, which says how to get it, if it is not there."""
    entry, kind, argument = entry_of(name)
    root = Path(argument).expanduser().resolve() if kind == "folder" else data_dir() / kind
    wanted = [medmnist_info(argument)["name"]] if kind == "medmnist" else entry.wanted
    if kind == "folder" and not root.is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {root}")
    if wanted and not any((root / file).exists() for file in wanted):
        command = f"Run `python -m deepknn_lib download {name}` ({entry.size}). " if entry.size else ""
        raise FileNotFoundError(f"{name} is not in {root}. {command}{by_hand(name)}")
    return root


def by_hand(name: str) -> str:
    """How to get a set without this program, in a sentence."""
    entry, kind, _ = entry_of(name)
    return f"By hand: {entry.steps} (the folder: {data_dir() / kind}; the page: {entry.page}; see data/README.md)"


def index_of(name: str, split: str = "paper") -> Index:
    """What a set holds, and what is wrong with its tables and folders, before any image is opened."""
    _, kind, argument = entry_of(name)
    root = place(name)
    try:
        return READERS[kind](root, argument, split)
    except Exception as error:  # half a file, a wrong checksum: torchvision and NumPy raise many kinds
        if kind not in ("mnist", "stl10", "medmnist"):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        remedy = f"Remove what is broken there and run `python -m deepknn_lib download {name}`"
        raise ValueError(f"{name} cannot be read in {root} ({reason}). {remedy}") from error


def folds_of(name: str, index: Index, split: str, fold: int = 1) -> np.ndarray:
    """The fold that tests each image, int64 (N,): 1..5, 0 for never, -1 for neither test nor training.

    ValueError or FileNotFoundError if there is no such fold, or the published folds are not there or do not fit.
    """
    single = entry_of(name)[1] == "folder" and not index.unit
    if split == "grouped" and not single:
        shared = len({*index.groups}) < len(index)
        by_group = shared or (len(index) <= MANY and index.parts is None)
        folds = group_folds(index.labels, index.groups) if by_group else image_folds(index.labels)
        for lesion, other in vars(entry_of(name)[0]).get("twins", {}).items():
            if other in index.groups:  # Pictures that are nearly the same are filed under two lesions.
                folds[index.groups == lesion] = folds[index.groups == other][0]
        return folds
    if index.parts is not None:
        folds = (index.parts == "test").astype(np.int64)
    else:
        folds = split_file(place(name), index, split) if name == "skin7" else image_folds(index.labels)
    if not (folds == fold).any():
        told = f"{name} has one test part in the split {split}, fold 1, not {fold}"
        raise ValueError(told if single else f"{told}; use split='grouped'")
    return folds


def image_folds(labels: np.ndarray) -> np.ndarray:
    """Five stratified folds of images: int64 (N,), 1..5. Views of one lesion may fall into different folds."""
    rng, folds = np.random.default_rng(SEED), np.zeros(len(labels), dtype=np.int64)
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        # A random start keeps the surplus images of small classes from all landing in fold 1.
        folds[members] = (np.arange(len(members)) + rng.integers(N_FOLDS)) % N_FOLDS + 1
    return folds


def group_folds(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Five folds stratified by class in which all images of a group share a fold: int64 (N,), 1..5.

    The groups with the most uneven class counts come first; each goes to the fold that leaves the classes spread most
    evenly. The folds are drawn here since those of scikit-learn's StratifiedGroupKFold, which these equal up to its
    version 1.7, changed with its next one: the same data must give the same split on every machine.
    """
    sizes, (names, group_of) = np.bincount(labels).clip(1), np.unique(groups, return_inverse=True)
    counts, held = np.zeros((len(names), len(sizes))), np.zeros((N_FOLDS, len(sizes)))
    np.add.at(counts, (group_of, labels), 1)
    np.random.RandomState(SEED).shuffle(counts)
    folds, each = np.zeros(len(names), dtype=np.int64), np.arange(N_FOLDS)
    for group in np.argsort(-counts.std(1), kind="stable"):
        trials = np.repeat(held[None], N_FOLDS, axis=0)  # with the group in the first fold, the second, …
        trials[each, each] += counts[group]
        uneven, best = (trials / sizes).std(1).mean(1), 0
        for fold in each[1:]:
            alike = np.isclose(uneven[fold], uneven[best])
            if uneven[fold] < uneven[best] or (alike and held[fold].sum() < held[best].sum()):
                best = fold
        held[best] += counts[group]
        folds[group] = best + 1
    return folds[group_of]


def file_name(name: str) -> str:
    """What the files made of a set are called; of two folders with one name they differ."""
    if entry_of(name)[1] != "folder":
        return re.sub(r"\W", "-", name)
    return f"folder-{place(name).name}-{digest(str(place(name)))}"


def available() -> dict[str, str]:
    """Each data set and whether it is there, or how to get it."""
    states = {}
    for name, entry in CATALOG.items():
        try:
            states[name] = entry.state or f"there: {place(name)}"
        except FileNotFoundError as error:
            states[name] = f"not there: {error}"
    return states
