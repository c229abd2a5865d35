"""Training and test parts: by image, as the paper did, or by group (lesion, patient), so that nothing leaks."""

import csv
from pathlib import Path

import numpy as np

N_FOLDS = 5
SEED = 2020  # of the folds we draw ourselves


def image_folds(labels: np.ndarray) -> np.ndarray:
    """Five stratified folds of images: int64 (N,), 1..5. Views of one lesion may fall into different folds."""
    rng = np.random.default_rng(SEED)
    folds = np.zeros(len(labels), dtype=np.int64)
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


def folds_from_csv(path: Path, ids: np.ndarray) -> np.ndarray:
    """Folds from a file with the columns `image,test_fold`: int64 (N,), 1..5.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file is missing, lacks a column, or does not name every image exactly once.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no fold file at {path}; see data/README.md for where the authors' folds come from")
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not {"image", "test_fold"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} needs the columns image,test_fold; it has {reader.fieldnames}")
        rows = [(row["image"], row["test_fold"]) for row in reader]
    folds = {}
    for line, (image, fold) in enumerate(rows, start=2):
        if image in folds or fold not in {"1", "2", "3", "4", "5"}:
            problem = "names an image again" if image in folds else f"has test_fold {fold!r}, which is not 1..5"
            raise ValueError(f"{path}, line {line}: {image!r} {problem}; correct or remove that line")
        folds[image] = int(fold)
    missing = [str(i) for i in ids if i not in folds]
    if missing:
        raise ValueError(f"{path} gives no fold to {len(missing)} images, the first is {missing[0]}; is it this set's?")
    return np.array([folds[i] for i in ids], dtype=np.int64)
