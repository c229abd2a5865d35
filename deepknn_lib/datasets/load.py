"""Data sets by name: name, entry of the catalogue, index, split, array.

`catalog.json` says of each set its title, licence, citation, page, the steps by hand, its files with checksums, image
counts and pins: sha256 of the labels, groups and splits that our results rest on.
"""

import functools
import json
import multiprocessing
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from deepknn_lib.datasets.decode import ImageSet, decode
from deepknn_lib.datasets.readers import PUBLISHED_FOLDS, READERS, Index, medmnist_info, skin7_folds_file
from deepknn_lib.storage import data_dir, digest, whole_file

SPLITS, N_FOLDS = ("paper", "grouped"), 5
SEED = 2020  # of the folds we draw ourselves
MANY = 5000  # images; StratifiedGroupKFold takes long over as many groups, and they need none of it when all differ
_ENTRIES = json.loads(Path(__file__).with_name("catalog.json").read_text(encoding="utf-8"))
CATALOG = {name: SimpleNamespace(**entry) for name, entry in _ENTRIES.items()}


@dataclass(frozen=True)
class Dataset:
    """A training and a test part; the class names in the order of the labels; and what a reader has to know.

    `info` holds `title`, `synthetic` (bool), `licence`, `citation`, `split`, `fold`, `grouped` (whether several images
    share a lesion or patient) and `smallest`, the label of the class with the fewest images in the whole set.
    """

    name: str
    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    info: dict = field(default_factory=dict)


def load_dataset(name: str, split: str = "paper", fold: int = 1, image_size: int = 48) -> Dataset:
    """Load a data set, decoding it on first use; the split is left as a CSV of ids in `data_dir()/splits`.

    Parameters
    ----------
    name : str
        A key of `CATALOG`; `folder:<path>` takes anyone's class folders, `medmnist:<flag>@<size>` a set of MedMNIST+.
    split : {"paper", "grouped"}
        `paper`: five folds of images (for `skin7` the authors', from a file), or the ready-made parts (`mnist`,
        `stl10`, `medmnist`, a folder with `train/` and `test/`, SD-198's own split files). `grouped`: five folds of
        lesions or patients, so that no group is in both parts.
    fold : int
        1..5, the fold to test on; the other four are for training. Ready-made parts are fold 1.
    image_size : int
        Side in pixels to which every image is squashed, as the paper did (256).

    Raises
    ------
    ValueError, OSError
        The name, split or fold is unknown, the files contradict each other, or the disk is full. FileNotFoundError if
        the set is not there; the message says how to get it.
    """
    entry, index, folds, images, _ = _open(name, split, fold, image_size)
    write_folds(name, index, split, fold, folds)
    tell(name)
    everything = ImageSet(images, index.labels, index.ids, index.groups)
    info = {key: getattr(entry, key) for key in ("title", "synthetic", "licence", "citation")}
    info |= {"split": split, "fold": fold, "smallest": int(np.bincount(index.labels).argmin())}
    info |= {"title": index.title or entry.title, "grouped": len(set(index.groups)) < len(index)}
    return Dataset(
        name, everything.take(folds != fold), everything.take(folds == fold), index.class_names, info
    )


def validation_part(data: Dataset) -> Dataset:
    """A fifth of the training part as test part, by group if the data are split so; the real test part is left out."""
    train, grouped = data.train, data.info["split"] == "grouped"
    folds = group_folds(train.labels, train.groups) if grouped else image_folds(train.labels)
    return replace(data, train=train.take(folds != 1), test=train.take(folds == 1))


def dataset_digest(name: str, split: str = "paper", fold: int = 1, image_size: int = 48) -> str:
    """Twelve digits of a sha256 of what `load_dataset` gives: class names, ids, labels, groups, split and pixels."""
    _, index, folds, _, pixels = _open(name, split, fold, image_size)
    texts = ("\n".join(lines) for lines in (index.class_names, index.ids, index.groups))
    return digest(*texts, index.labels, folds == fold, pixels)


def _open(
    name: str, split: str, fold: int, size: int
) -> tuple[SimpleNamespace, Index, np.ndarray, np.ndarray, str]:
    """Entry, index, folds, images and their sha256 of a set that has no problem."""
    entry = entry_of(name)[0]
    if split not in SPLITS or fold not in range(1, N_FOLDS + 1):
        raise ValueError(f"split is one of {SPLITS} and fold one of 1..{N_FOLDS}, got {split!r} and {fold!r}")
    if size < 16:
        raise ValueError(f"image_size must be at least 16 pixels, got {size}")
    index = index_of(name)
    if index.problems:
        first = "; ".join(f"{p.check}: {p.item} {p.reason}" for p in index.problems[:3])
        told = f"`python -m deepknn_lib verify {shlex.quote(name)}` lists all"
        raise ValueError(f"{name}: {len(index.problems)} problems. {first}. {told}")
    counts = np.bincount(index.labels, minlength=len(index.class_names))
    if counts.min() < N_FOLDS:
        what = f"class {index.class_names[counts.argmin()]!r} has {counts.min()} images; five folds need 5 or more"
        raise ValueError(f"{name}: {what}. Add images, or leave the class out")
    return entry, index, folds_of(name, index, split, fold), *decode(index, size, file_name(name), name)


def entry_of(name: str) -> tuple[SimpleNamespace, str, str]:
    """The catalogue's entry of a name, and what is before and after its colon; ValueError for an unknown name."""
    kind, _, argument = name.partition(":")
    if kind not in CATALOG or bool(argument) != bool(CATALOG[kind].argument):
        known = ", ".join(f"{n}:{e.argument}" if e.argument else n for n, e in CATALOG.items())
        raise ValueError(f"unknown data set {name!r}; choose one of {known}")
    return CATALOG[kind], kind, argument


def place(name: str) -> Path:
    """The folder of a set; FileNotFoundError, which says how to get it, if it is not there."""
    entry, kind, argument = entry_of(name)
    root = Path(argument).expanduser().resolve() if kind == "folder" else data_dir() / kind
    if kind == "folder" and not root.is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {root}")
    wanted = [medmnist_info(argument)[2]] if kind == "medmnist" else entry.wanted
    if wanted and not any((root / file).exists() for file in wanted):
        command = f"Run `python -m deepknn_lib download {name}` ({entry.size}). " if entry.size else ""
        raise FileNotFoundError(f"{name} is not in {root}. {command}{by_hand(name)}")
    return root


def by_hand(name: str) -> str:
    """How to get a set without this program, in a sentence."""
    entry, kind, _ = entry_of(name)
    return f"By hand: {entry.steps} (the folder: {data_dir() / kind}; the page: {entry.page}; see data/README.md)"


def index_of(name: str) -> Index:
    """What a set holds, and what is wrong with its tables and folders, before any image is opened."""
    _, kind, argument = entry_of(name)
    root = place(name)
    try:
        return READERS[kind](root, argument)
    except (
        Exception
    ) as error:  # half a file, a wrong checksum: torchvision, zipfile and NumPy raise many kinds
        if kind not in ("mnist", "stl10", "medmnist"):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        remedy = f"Remove what is broken there and run `python -m deepknn_lib download {name}`"
        raise ValueError(f"{name} cannot be read in {root} ({reason}). {remedy}") from error


def folds_of(name: str, index: Index, split: str, fold: int = 1) -> np.ndarray:
    """The fold in which each image is tested, int64 (N,), 1..5; 0 for images that a ready-made split never tests.

    ValueError or FileNotFoundError if there is no such fold, or the published folds are not there or do not fit.
    """
    published = PUBLISHED_FOLDS.get(entry_of(name)[1]) if split == "paper" else None
    folds = published(place(name), index, fold) if published else None
    if folds is None and split == "paper" and index.parts is not None:
        if fold != 1:
            raise ValueError(
                f"{name} has one official test part, fold 1, not {fold}; five folds: split='grouped'"
            )
        return (index.parts == "test").astype(np.int64)
    own_groups = len(set(index.groups)) < len(index)
    if split == "grouped" and (own_groups or len(index) <= MANY and index.parts is None):
        return group_folds(index.labels, index.groups)
    return image_folds(index.labels) if folds is None else folds


def image_folds(labels: np.ndarray) -> np.ndarray:
    """Five stratified folds of images: int64 (N,), 1..5. Views of one lesion may fall into different folds."""
    rng, folds = np.random.default_rng(SEED), np.zeros(len(labels), dtype=np.int64)
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        # a random start, so that the surplus images of small classes do not all land in fold 1
        folds[members] = (np.arange(len(members)) + rng.integers(N_FOLDS)) % N_FOLDS + 1
    return folds


def group_folds(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Five folds stratified by class in which all images of a group share a fold: int64 (N,), 1..5."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = np.zeros(len(labels), dtype=np.int64)
    splitter = StratifiedGroupKFold(n_splits=N_FOLDS, shuffle=True, random_state=SEED)
    for number, (_, test) in enumerate(splitter.split(labels, labels, groups), start=1):
        folds[test] = number
    return folds


def file_name(name: str) -> str:
    """What the files made of a set are called; of two folders with one name they differ."""
    kind, argument = entry_of(name)[1:]
    return (
        f"folder-{place(name).name}-{digest(str(place(name)))}"
        if kind == "folder"
        else re.sub(r"\W", "-", name)
    )


def write_folds(name: str, index: Index, split: str, fold: int, folds: np.ndarray) -> None:
    """The split as a CSV, `image,group,class,test_fold`, written anew only if it changed."""
    ready_made = f"-{fold}" if (folds == 0).any() else ""
    path = data_dir() / "splits" / f"{file_name(name)}-{split}{ready_made}.csv"
    kinds = np.array(index.class_names)[index.labels]
    rows = pd.DataFrame({"image": index.ids, "group": index.groups, "class": kinds, "test_fold": folds})
    text = rows.to_csv(index=False, lineterminator="\n")
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


@functools.cache
def tell(name: str) -> None:
    """Print the licence and citation of a set of others, once a process."""
    entry = entry_of(name)[0]
    if entry.page and multiprocessing.parent_process() is None:
        print(f"{name}: {entry.title}. Licence: {entry.licence}. Cite: {entry.citation}")


def available() -> dict[str, str]:
    """Each data set and whether it is there, or how to get it."""
    states = {}
    for name, entry in CATALOG.items():
        there = "synthetic, made on first use" if entry.synthetic else "real, comes with scikit-learn"
        states[name] = f"{name}:{entry.argument}" if entry.argument else f"there: {there}"
        try:
            states[name] = f"there: {place(name)}" if entry.wanted else states[name]
        except FileNotFoundError as error:
            states[name] = f"not there: {error}"
    try:
        skin7_folds_file(data_dir() / "skin7")
    except FileNotFoundError as error:
        states["skin7"] += f"; grouped split only: {error}" if states["skin7"].startswith("there") else ""
    return states
