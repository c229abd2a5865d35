"""Getting a data set: `python -m deepknn_lib download NAME`. Nothing else in the library downloads data."""

import csv
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from deepknn_lib.catalog import remotes_of
from deepknn_lib.datasets import entry_of, how, listing_of, place
from deepknn_lib.download import fetch, locked, unpack
from deepknn_lib.storage import data_dir, whole_file

COMPETITION = "rsna-pneumonia-detection-challenge"


def download(name: str) -> Path:
    """Download a set into its folder and unpack it there; what is there already is left as it is.

    Raises
    ------
    ValueError
        If the set cannot be downloaded (the message says how to get it), or what came is not what was expected.
    OSError
        If there is no network, the server refuses, or the disk is full; the message ends with the steps by hand.
    """
    entry, _ = entry_of(name)
    kind = name.partition(":")[0]
    root = data_dir() / kind
    print(f"{entry.title}. Licence: {entry.licence}. Cite: {entry.citation}")
    if not entry.page or not (entry.wanted or kind == "medmnist"):
        raise ValueError(f"{name} needs no download" if kind != "folder" else f"{name} is your own; nothing to download")
    if not entry.size:
        raise ValueError(f"{name} cannot be downloaded by a program. {how(name)}")
    unpacked = kind in ("mnist", "stl10")  # by torchvision, when they are first read
    if unpacked and (root / entry.wanted[0]).exists():
        return root
    manual = f"By hand: {entry.steps} (folder {root}, page {entry.page})"
    with locked(root, "download"):  # around all of it: an archive is removed once it is unpacked
        if kind == "pneumonia":
            _from_kaggle(root, manual)
        for remote in remotes_of(name):
            _one(remote, root, manual)
        if kind == "skin7":
            _assemble_folds(root, manual)
    if unpacked:
        listing_of(name)
    return place(name)


def _one(remote, root: Path, manual: str) -> None:
    """One file, unpacked where it is a zip; the archive is then removed, for it would double what the set takes."""
    target = root / remote.name
    done = target.with_suffix("") if target.suffix == ".zip" else root / "folds.csv" if "fold" in target.name else target
    if done.exists() and done != target:
        return
    path = fetch(replace(remote, name=target.name), target.parent, manual)
    if path.suffix == ".zip":
        unpack(path, root)
        path.unlink()


def _assemble_folds(root: Path, manual: str) -> None:
    """The authors' five files of test images as one, `folds.csv`: image,test_fold."""
    if (root / "folds.csv").is_file():
        return
    files = {fold: root / f"split_data_{fold}_fold_test.csv" for fold in range(1, 6)}
    rows = []
    for fold, path in files.items():
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
        if not lines or lines[0][:1] != ["image_test"]:
            raise ValueError(f"{path} is not one of the authors' split files (no column image_test). Remove it. {manual}")
        rows += [(line[0].removesuffix(".jpg"), fold) for line in lines[1:] if line]
    with whole_file(root / "folds.csv") as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("image", "test_fold"), *sorted(rows)])
    for path in files.values():
        path.unlink()


def _from_kaggle(root: Path, manual: str) -> None:
    """The RSNA competition's archive through Kaggle's own client, with the user's own account."""
    if (root / "stage_2_train_images").is_dir():
        return
    client = shutil.which("kaggle") or shutil.which("kaggle", path=str(Path(sys.executable).parent))
    if not client:
        raise ValueError(
            "pneumonia is downloaded by Kaggle's own client: `pip install kaggle`, then put your API token where it says "
            f"(kaggle.com, Settings, API) and join the competition. {manual}"
        )
    root.mkdir(parents=True, exist_ok=True)
    command = [client, "competitions", "download", "-c", COMPETITION, "-p", str(root)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    archive = root / f"{COMPETITION}.zip"
    if done.returncode or not archive.is_file():
        reason = (done.stderr.strip().splitlines() or ["no archive came"])[-1]
        advice = "Check your API token, and accept the competition's rules on its page"
        raise ValueError(f"Kaggle's client failed ({reason}). {advice}. {manual}")
    unpack(archive, root)
    archive.unlink()
