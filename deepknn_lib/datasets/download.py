"""Getting a data set: `python -m deepknn_lib download NAME`. Nothing else in the library downloads data."""

import os
import shutil
import zipfile
import zlib
from pathlib import Path

from deepknn_lib.datasets.load import entry_of, index_of, place
from deepknn_lib.storage import claim, room_for

RETRIES, TIMEOUT = 3, (10, 60)  # after a first try; seconds to connect, and between two bytes


def download(name: str) -> Path:
    """Download a set into its folder and unpack it there; what is unpacked already is left as it is.

    A ValueError says that the set cannot be downloaded, or that another file came than expected; an OSError that there
    is no network, the server refuses, or the disk is full. The message says what to do.
    """
    entry = entry_of(name)
    print(f"{entry.title}. Licence: {entry.licence}. Cite: {entry.citation}")
    if not entry.remotes:
        what = f"{name} cannot be downloaded by a program. {entry.by_hand}"
        raise ValueError(what if entry.page and entry.wanted else f"{name} needs no download")
    with room_for(root := entry.root), claim(root / "download"):
        for remote in entry.remotes:
            if not (root / (remote["made"] or remote["name"])).exists():
                fetch(remote["url"], root / remote["name"], remote["checksum"], entry.by_hand)
                if remote["name"].endswith(".zip"):
                    unpack(root / remote["name"], root)
    index_of(entry)  # Torchvision unpacks its sets when they are first read.
    return place(entry)


def fetch(url: str, path: Path, checksum: str | None, manual: str) -> None:
    """Download a file; what has come when a download stops is kept, and gone on from.

    `manual` ends the message of the error: a FileNotFoundError if the server cannot be reached, refuses or keeps
    cutting the connection, a ValueError if it gives another file.
    """
    import pooch
    import requests
    from tqdm import tqdm

    part = path.with_name(f".{path.name}.part")
    for left in path.parent.glob("tmp????????"):  # pooch's own, of a process that was killed
        left.unlink()
    if not checksum:
        part.unlink(missing_ok=True)  # Nothing would tell whether the rest belongs to it.

    def resume(url: str, out: str, _: pooch.Pooch) -> None:
        """Bring `part` to the whole file and move it to `out`, where pooch compares its checksum before it is used."""
        have = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            if answer.status_code != 416:  # It means that no byte is left to fetch; the checksum judges them.
                answer.raise_for_status()
                answer.raw.enforce_content_length = True
                mode = "ab" if answer.status_code == 206 else "wb"  # A server without ranges sends it all.
                with open(part, mode) as file, tqdm(unit="B", unit_scale=True, disable=None) as bar:
                    for chunk in answer.iter_content(1 << 16):
                        bar.update(file.write(chunk))
        os.replace(part, out)

    pooch.get_logger().setLevel("WARNING")
    files = {"registry": {path.name: checksum}, "urls": {path.name: url}, "retry_if_failed": RETRIES}
    try:
        pooch.create(path.parent, "", **files).fetch(path.name, downloader=resume)
    except requests.RequestException as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"could not download {url} ({reason}). {manual}") from error
    except ValueError as error:
        raise ValueError(f"{url} gave another file than expected ({error}). {manual}") from error


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip into `folder`, whole or not at all, and remove it; ValueError if it is broken or meant to harm."""
    hold = folder / f".{archive.name}.unpacking"
    shutil.rmtree(hold, ignore_errors=True)  # of a process that was killed
    try:
        with zipfile.ZipFile(archive) as zipped:
            for name in zipped.namelist():
                if ":" in name or "\\" in name or name.startswith("/") or ".." in name.split("/"):
                    raise ValueError(f"{archive}, member {name!r}: its path is not inside the folder")
            zipped.extractall(hold)
        for path in hold.iterdir():
            if not (folder / path.name).exists():
                path.rename(folder / path.name)
        archive.unlink()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive} is broken ({error}); remove the archive and get it again") from error
    finally:
        shutil.rmtree(hold, ignore_errors=True)
