"""Getting a data set: `python -m deepknn_lib download NAME`. Nothing else in the library downloads data."""

import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pandas as pd

from deepknn_lib.datasets.decode import room_for
from deepknn_lib.datasets.load import by_hand, entry_of, index_of, place
from deepknn_lib.datasets.readers import CATALOG, medmnist_info, table
from deepknn_lib.storage import data_dir, whole_file

RETRIES, TIMEOUT = 3, (10, 60)  # after a first try; seconds to connect, and between two bytes


def download(name: str) -> Path:
    """Download a set into its folder and unpack it there; what is there already is left as it is.

    A ValueError says that the set cannot be downloaded, or that another file came than expected; an OSError that there
    is no network, the server refuses, or the disk is full. Both end with the steps by hand.
    """
    from filelock import FileLock

    entry, kind, argument = entry_of(name)
    root, remotes, manual = data_dir() / kind, entry.remotes, by_hand(name)
    print(f"{entry.title}. Licence: {entry.licence}. Cite: {entry.citation}")
    if not entry.size:
        why = "is your own" if kind == "folder" else "needs no download"
        raise ValueError(f"{name} {f'cannot be downloaded by a program. {manual}' if entry.wanted else why}")
    if kind == "medmnist":
        info, size, file = medmnist_info(argument)
        end = "" if size == "28" else f"_{size}"
        checksum = f"md5:{info[f'MD5{end}']}"
        remotes = [{"url": info[f"url{end}"], "name": file, "checksum": checksum, "made": ""}]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".download.lock"):
            if kind == "pneumonia" and not (root / "stage_2_train_images").exists():
                _from_kaggle(root, manual)
            for remote in remotes:
                path, made = root / remote["name"], remote["made"]
                if not (made and (root / made).exists()):
                    fetch(remote["url"], path, remote["checksum"], manual)
                    if path.suffix == ".zip":
                        unpack(path, root)
                        path.unlink()
            if kind == "skin7" and not (root / "folds.csv").exists():
                _assemble_folds(root, manual)
    except PermissionError as error:
        advice = "make it writable, or point DEEPKNN_DATA elsewhere"
        raise PermissionError(f"cannot write to the folder {root} ({error.strerror}); {advice}") from error
    if kind in ("mnist", "stl10"):
        index_of(name)  # unpacks them
    return place(name)


def fetch(url: str, path: Path, checksum: str | None, manual: str) -> None:
    """Download a file unless it is there; what has come when a download stops is kept, and gone on from.

    `manual` ends the message of every error: FileNotFoundError if the server cannot be reached, refuses or keeps
    cutting the connection, ValueError if it gives another file, OSError if the disk is full.
    """
    import pooch
    import requests

    if path.exists():
        if checksum and checksum != (found := f"md5:{pooch.file_hash(path, 'md5')}"):
            what = f"expected {checksum}, got {found}; remove or replace it"
            raise ValueError(f"{path} is not the file of {url}: {what}")
        return
    part = path.with_name(f".{path.name}.part")
    if not checksum:
        part.unlink(missing_ok=True)  # nothing would tell whether the rest belongs to it
    pooch.get_logger().setLevel("WARNING")
    files = {"registry": {path.name: checksum}, "urls": {path.name: url}, "retry_if_failed": RETRIES}
    advice = f"make room, or point DEEPKNN_DATA at another disk, and run it again. {manual}"
    try:
        with room_for(f"no room for {path}", advice):
            home = pooch.create(path.parent, "", **files)
            home.fetch(path.name, downloader=lambda url, out, _: _resume(url, out, part))
    except requests.RequestException as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"could not download {url} ({reason}). {manual}") from error
    except ValueError as error:
        raise ValueError(f"{url} gave another file than expected ({error}). {manual}") from error


def _resume(url: str, out: str, part: Path) -> None:
    """Bring `part` to the whole file and move it to `out`, where pooch compares its checksum before it is used."""
    import requests
    from tqdm import tqdm

    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code != 416:  # all bytes are there, and the checksum says whether they are right
            answer.raise_for_status()
            answer.raw.enforce_content_length = True
            have = have if answer.status_code == 206 else 0  # a server without ranges sends it all
            total = have + int(answer.headers.get("Content-Length", 0))
            bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.name, disable=None)
            with open(part, "ab" if have else "wb") as file, bar:
                for chunk in answer.iter_content(1 << 16):
                    bar.update(file.write(chunk))
    os.replace(part, out)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip into `folder`, whole or not at all; what of it lies there already is left as it is.

    ValueError if it is broken or holds links or paths out of the folder; OSError if the disk is full.
    """
    hold = folder / f".{archive.name}.unpacking"
    shutil.rmtree(hold, ignore_errors=True)  # of a process that was killed
    try:
        with room_for(f"{archive}: no room to unpack it in {folder}", "make room"):
            with zipfile.ZipFile(archive) as zipped:
                for member in zipped.infolist():
                    name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
                    outside = re.search(r"^/|^.:|\\|(^|/)\.\.(/|$)", name)
                    if outside or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                        what = "its path is not inside the folder, or it is a link; unpack the rest by hand"
                        raise ValueError(f"{archive}, member {name!r}: {what}")
                zipped.extractall(hold)
        for path in hold.iterdir():
            if not (folder / path.name).exists():
                path.rename(folder / path.name)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive} is broken ({error}); remove the archive and get it again") from error
    finally:
        shutil.rmtree(hold, ignore_errors=True)


def _assemble_folds(root: Path, manual: str) -> None:
    """The authors' five files of test images as one, `folds.csv`: image,test_fold."""
    paths = [root / f"split_data_{fold}_fold_test.csv" for fold in range(1, 6)]
    try:
        images = [table(path, "image_test")["image_test"].str.removesuffix(".jpg") for path in paths]
    except ValueError as error:
        raise ValueError(f"{error}. The five files were removed; run it again. {manual}") from error
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    folds = pd.concat(dict(enumerate(images, 1)), names=["test_fold"]).rename("image").reset_index()
    with whole_file(root / "folds.csv") as temporary:
        folds.sort_values("image").to_csv(temporary, columns=["image", "test_fold"], index=False)


def _from_kaggle(root: Path, manual: str) -> None:
    """The RSNA competition's archive through Kaggle's own client, with the user's own account."""
    client = shutil.which("kaggle") or shutil.which("kaggle", path=str(Path(sys.executable).parent))
    if not client:
        what = "`pip install kaggle`, put your API token where it says and join the competition"
        raise ValueError(f"pneumonia is downloaded by Kaggle's own client: {what}. {manual}")
    competition = CATALOG["pneumonia"].competition
    command = [client, "competitions", "download", "-c", competition, "-p", str(root)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    archive = root / f"{competition}.zip"
    if done.returncode or not archive.is_file():
        reason = (done.stderr.strip().splitlines() or ["no archive came"])[-1]
        advice = "Check your API token, and accept the competition's rules on its page"
        raise ValueError(f"Kaggle's client failed ({reason}). {advice}. {manual}")
    unpack(archive, root)
    archive.unlink()
