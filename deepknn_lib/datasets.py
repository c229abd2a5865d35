"""Data sets by name: images in one uint8 array, labels, ids, groups, and a split.

`catalog` lists them; data/README.md says how to get each and where to put it.
"""

import csv
import functools
import hashlib
import io
import multiprocessing
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deepknn_lib import sources, splits
from deepknn_lib.catalog import DATASETS, Entry, remotes_of
from deepknn_lib.images import ImageSet, Listing, decode
from deepknn_lib.storage import data_dir, whole_file

SPLITS = ("paper", "grouped")
MANY = 5000  # images; StratifiedGroupKFold over as many groups takes long, and they need none of it when all differ


@dataclass(frozen=True)
class Dataset:
    """A training and a test part, and what a reader has to know about the set.

    Attributes
    ----------
    train, test : ImageSet
    class_names : tuple of str
        In the order of the labels.
    info : dict
        `title`, `synthetic` (bool), `licence`, `citation`, and `smallest`, the label of the class with the
        fewest images in the whole set (the paper's RS is its recall).
    """

    name: str
    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    info: dict = field(default_factory=dict)


def entry_of(name: str) -> tuple[Entry, str]:
    """The catalogue's entry of a name, and what follows the colon; ValueError for a name that there is not."""
    kind, _, argument = name.partition(":")
    if kind not in DATASETS or bool(argument) != bool(DATASETS[kind].argument):
        known = ", ".join(f"{n}:{e.argument}" if e.argument else n for n, e in DATASETS.items())
        raise ValueError(f"unknown data set {name!r}; choose one of {known}")
    return DATASETS[kind], argument


def place(name: str) -> Path:
    """The folder of a set; FileNotFoundError, which says how to get it, if it is not there."""
    entry, argument = entry_of(name)
    kind = name.partition(":")[0]
    if kind == "folder":
        root = Path(argument).expanduser().resolve()
        if not root.is_dir():
            raise FileNotFoundError(f"{name}: there is no folder {root}")
        return root
    root = data_dir() / kind
    wanted = [remote.name for remote in remotes_of(name)] if kind == "medmnist" else entry.wanted
    if wanted and not any((root / file).exists() for file in wanted):
        raise FileNotFoundError(f"{name} is not in {root}. {how(name)}")
    return root


def how(name: str) -> str:
    """How to get a set, in a sentence or two."""
    entry, _ = entry_of(name)
    command = f"Run `python -m deepknn_lib download {name}` ({entry.size}), or by hand: " if entry.size else ""
    steps = f"{entry.steps} ({data_dir() / name.partition(':')[0]}; the page: {entry.page}; see data/README.md)"
    return command + (steps if command else steps[:1].upper() + steps[1:])


def listing_of(name: str, image_size: int = 48) -> Listing:
    """What a set holds, and what is wrong with its tables and folders, before any image is opened."""
    entry, argument = entry_of(name)
    return entry.read(place(name), argument, image_size)


def folds_of(name: str, listing: Listing, split: str, fold: int = 1) -> np.ndarray:
    """The fold in which each image is tested, int64 (N,), 1..5; 0 for images that a ready-made split never tests.

    Raises
    ------
    ValueError, FileNotFoundError
        If there is no such fold, or the published folds are not there or do not fit.
    """
    entry, _ = entry_of(name)
    folds = entry.folds(place(name), listing, fold) if entry.folds and split == "paper" else None
    if folds is None and split == "paper" and listing.parts is not None:
        if fold != 1:
            raise ValueError(f"{name} has one official test part, fold 1, and no fold {fold}; five folds: split='grouped'")
        folds = (listing.parts == "test").astype(np.int64)
    own_groups = len(np.unique(listing.groups)) < len(listing)
    if folds is None and split == "grouped" and (own_groups or len(listing) <= MANY and listing.parts is None):
        folds = splits.group_folds(listing.labels, listing.groups)
    return splits.image_folds(listing.labels) if folds is None else folds


def load_dataset(name: str, split: str = "paper", fold: int = 1, image_size: int = 48) -> Dataset:
    """Load a data set, decoding it on first use; the split is left as a CSV of ids in `data_dir()/splits`.

    Parameters
    ----------
    name : str
        A key of `DATASETS`; `folder:<path>` takes anyone's class folders, `medmnist:<flag>@<size>` a set of MedMNIST+.
    split : {"paper", "grouped"}
        `paper`: five folds of images (for `skin7` the authors', from a file), or the ready-made parts (`mnist`,
        `stl10`, `medmnist`, a folder with `train/` and `test/`, SD-198's own split files). `grouped`: five folds of
        lesions or patients, so that no group is in both parts.
    fold : int
        1..5, the fold to test on; the other four are for training. Ready-made parts are fold 1.
    image_size : int
        Side in pixels to which every image is squashed, as the paper did (256). A part that takes more than half of
        the memory stays on disk.

    Raises
    ------
    ValueError
        If the name, split or fold is unknown, or the files contradict each other.
    FileNotFoundError
        If the set is not there; the message says how to get it.
    OSError
        If a folder cannot be read or the disk is full.
    """
    entry, _ = entry_of(name)
    if split not in SPLITS or fold not in range(1, splits.N_FOLDS + 1):
        raise ValueError(f"split is one of {SPLITS} and fold one of 1..{splits.N_FOLDS}, got {split!r} and {fold!r}")
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16 pixels, got {image_size}")
    listing = listing_of(name, image_size)
    if listing.problems:
        first = "; ".join(f"{p.check}: {p.item} {p.reason}" for p in listing.problems[:3])
        told = f"`python -m deepknn_lib verify {shlex.quote(name)}` lists all"
        raise ValueError(f"{name}: {len(listing.problems)} problems. {first}. {told}")
    counts = np.bincount(listing.labels, minlength=len(listing.class_names))
    if counts.min() < splits.N_FOLDS:
        raise ValueError(
            f"{name}: class {listing.class_names[counts.argmin()]!r} has {counts.min()} images; five folds need 5 or more. "
            "Add images, or leave the class out"
        )
    folds = folds_of(name, listing, split, fold)
    write_folds(name, listing, split, fold, folds)
    tell(name)
    everything = ImageSet(decode(listing, image_size, cache_name(name), name), listing.labels, listing.ids, listing.groups)
    info = {
        "title": listing.title or entry.title,
        "synthetic": entry.synthetic,
        "licence": entry.licence,
        "citation": entry.citation,
        "split": split,
        "fold": fold,
        "smallest": int(counts.argmin()),
    }
    return Dataset(name, everything.take(folds != fold), everything.take(folds == fold), listing.class_names, info)


def cache_name(name: str) -> str:
    """What the files made of a set are called."""
    kind, _, argument = name.partition(":")
    return f"folder-{place(name).name}" if kind == "folder" else re.sub(r"\W", "-", name)


def write_folds(name: str, listing: Listing, split: str, fold: int, folds: np.ndarray) -> Path:
    """The split as a CSV, `image,group,class,test_fold`, written anew only if it changed."""
    ready_made = f"-{fold}" if (folds == 0).any() else ""
    path = data_dir() / "splits" / f"{cache_name(name)}-{split}{ready_made}.csv"
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "group", "class", "test_fold"])
    kinds = np.array(listing.class_names)[listing.labels]
    writer.writerows(zip(listing.ids.tolist(), listing.groups.tolist(), kinds.tolist(), folds.tolist(), strict=True))
    if not path.is_file() or path.read_text(encoding="utf-8") != text.getvalue():
        with whole_file(path) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8")
    return path


@functools.cache
def tell(name: str) -> None:
    """Print the licence and citation of a set of others, once a process."""
    entry, argument = entry_of(name)
    if not entry.synthetic and entry.page and multiprocessing.parent_process() is None:
        print(f"{name}: {entry.title}. Licence: {entry.licence}. Cite: {entry.citation}")


def fingerprint(ids: np.ndarray, values: np.ndarray) -> str:
    """sha256 over the sorted lines `<id>,<value>`: the same for any layout, order and line endings of the files."""
    lines = sorted(f"{i},{v}" for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def available() -> dict[str, str]:
    """Each data set and whether it is there, or how to get it."""
    states = {}
    for name, entry in DATASETS.items():
        if entry.synthetic:
            states[name] = "there: synthetic, made on first use"
        elif entry.argument:
            states[name] = f"{name}:{entry.argument}"
        elif not entry.wanted:
            states[name] = "there: real, comes with scikit-learn"
        else:
            try:
                states[name] = f"there: {place(name)}"
                if entry.folds is sources.skin7_folds:
                    sources.skin7_folds_file(place(name))
            except FileNotFoundError as error:
                states[name] = f"{states[name]}; grouped split only: {error}" if name in states else f"not there: {error}"
    return states
