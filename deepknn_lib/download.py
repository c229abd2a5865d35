"""Downloads that go on where they stopped, are checked and appear whole or not at all; zips, unpacked the same way."""

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
import time
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

TRIES = 5  # in a row that bring no further byte
WAITS = (1, 2, 4, 8)  # seconds before the next try
TIMEOUT = (10, 60)  # seconds to connect, and between two bytes
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
BOMB_RATIO, BOMB_BYTES = 200, 10**9  # images hardly shrink, tables 20:1; a small zip may hold an odd file, a big one not


@dataclass(frozen=True)
class Remote:
    """A file to download: where it is, its name in the folder it goes to, its checksum and its size in bytes.

    The checksum is "md5:…" or "sha256:…", or None where the contents are checked after reading.
    """

    url: str
    name: str
    checksum: str | None = None
    size: int | None = None


def fetch(remote: Remote, folder: Path, manual: str) -> Path:
    """The file in `folder`, downloaded if it is not there yet.

    What has come when a download stops is kept as `.<name>.part`; the next call goes on from there. `manual`, a
    sentence, says how to get the file by hand: it ends the message of every failed download.

    Raises
    ------
    FileNotFoundError
        If the server cannot be reached, refuses, or keeps cutting the connection.
    ValueError
        If what the server gives (twice), or what lies in `folder` already, is not the expected file.
    OSError
        If the disk is too small; PermissionError if `folder` cannot be written to.
    """
    path = folder / remote.name
    if _is_there(remote, path):  # asked without the lock, so that a read-only folder serves too
        return path
    with locked(folder, remote.name):
        if not _is_there(remote, path):  # another process may have brought it meanwhile
            _download(remote, path, manual)
    return path


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip into `folder`, whole or not at all; what of it lies there already is left as it is.

    Raises
    ------
    ValueError
        If the archive is broken, or holds what no data set does: paths out of the folder, links, encrypted or doubled
        members, far more bytes than its size allows.
    OSError
        If the disk is too small; FileExistsError if another file is in the way, PermissionError if `folder` cannot be
        written to.
    """
    from tqdm import tqdm

    with locked(folder, archive.name), contextlib.ExitStack() as stack:
        hold = folder / f".{archive.name}.unpacking"
        shutil.rmtree(hold, ignore_errors=True)  # of a process that was killed
        stack.callback(shutil.rmtree, hold, ignore_errors=True)
        with _blaming(f"{archive}"):
            zipped = stack.enter_context(zipfile.ZipFile(archive))
        members = _members(archive, zipped.infolist(), folder)
        for member in tqdm(members, f"unpacking {archive.name}", disable=None):
            with _blaming(f"{archive}, member {member.filename!r}"):
                zipped.extract(member, hold)
        for top in dict.fromkeys(PurePosixPath(m.filename).parts[0] for m in members):
            os.rename(hold / top, folder / top)


def _is_there(remote: Remote, path: Path) -> bool:
    if not os.path.lexists(path):
        return False
    expected, got = f"{remote.size} bytes", f"{path.stat().st_size} bytes" if path.is_file() else "no file"
    if path.is_file() and remote.size in (None, path.stat().st_size):
        if remote.checksum is None:
            return True
        import pooch

        algorithm = remote.checksum.partition(":")[0]
        expected, got = remote.checksum.lower(), f"{algorithm}:{pooch.file_hash(path, algorithm)}"
    if got != expected:
        raise ValueError(f"{path} is not the file of {remote.url}: expected {expected}, got {got}; remove or replace it")
    return True


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """One process at a time. The lock file stays: once removed, one that waits and one that comes could both hold it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / f".{name}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "permission denied")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that is busy with {name}", file=sys.stderr)
            held = lock.acquire()
    except OSError as error:
        advice = "make it writable, or point DEEPKNN_DATA elsewhere"
        raise PermissionError(f"cannot write to the folder {folder} ({error.strerror}); {advice}") from error
    with held:
        yield


def _download(remote: Remote, path: Path, manual: str) -> None:
    """Pooch compares the checksum and places the file; the bytes and the tries are ours, as it cannot resume."""
    import pooch
    import requests
    from urllib3.exceptions import HTTPError

    pooch.get_logger().setLevel("WARNING")  # a progress bar is enough
    part = path.with_name(f".{path.name}.part")
    home = pooch.create(path.parent, "", registry={path.name: remote.checksum}, urls={path.name: remote.url})
    for stray in path.parent.glob("tmp*"):  # of a process that was killed while pooch compared
        if part.exists() and stray.samefile(part):
            stray.unlink()

    def downloader(_: str, temporary: str, __: pooch.Pooch) -> None:
        os.unlink(temporary)  # empty; a kill is to leave the part only
        _receive(remote, part)
        try:
            os.link(part, temporary)  # the part stays until the checksum is known to be right
        except OSError:  # a file system without links
            os.replace(part, temporary)

    furthest, failures, wrong = 0, 0, 0
    while True:
        try:
            home.fetch(path.name, downloader=downloader)
            return _drop(part)
        except (requests.RequestException, HTTPError) as error:
            reason, got = _reason(error), _size(part)
            furthest, failures = max(got, furthest), 1 if got > furthest else failures + 1
            status = getattr(getattr(error, "response", None), "status_code", 0)
            passing = isinstance(error, (requests.ConnectionError, requests.Timeout, HTTPError))
            if failures == TRIES or not (passing or status >= 500 or status == 429):
                raise FileNotFoundError(f"could not download {remote.url} ({reason}). {manual}") from error
        except ValueError as error:
            _drop(part)
            wrong, reason = wrong + 1, _reason(error).partition(". Deleted")[0]
            if wrong == 2:
                what = f"{remote.url} gave another file than expected, twice ({reason}); it may have changed at its home"
                raise ValueError(f"{what}. {manual}") from error
        except OSError as error:
            if error.errno not in FULL:
                raise
            advice = "make room, or point DEEPKNN_DATA at another disk, and run it again"
            raise OSError(f"no room for {path} ({error.strerror}); {advice}. {manual}") from error
        wait = WAITS[min(failures + wrong, len(WAITS)) - 1]
        print(f"{path.name}: {reason}; trying again in {wait} s", file=sys.stderr)
        time.sleep(wait)


def _receive(remote: Remote, part: Path) -> None:
    """Bring `part` to the whole file, going on from what it holds where nothing wrong can come of it unnoticed."""
    import requests
    from tqdm import tqdm

    mark = Path(f"{part}.etag")  # the ETag or date that came with it, by which the server knows whether it still fits
    seen = mark.read_text() if mark.exists() else ""
    if _size(part) > (remote.size or sys.maxsize) or not (seen or remote.checksum):
        _drop(part)
    have = _size(part)
    if have and have == remote.size:
        return
    headers = {"Accept-Encoding": "identity"}  # ranges count the bytes as they are sent
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": seen} if seen else {})
    with requests.get(remote.url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        answer.raw.enforce_content_length = False  # compared below, once all that came is written
        found, code = answer.headers, answer.status_code
        etag = found.get("ETag", "W/")
        now = found.get("Last-Modified", "") if etag.startswith("W/") else etag  # a weak ETag cannot vouch for bytes
        span = re.match(r"bytes (\d+)-\d+/(\d+)", found.get("Content-Range", ""))
        goes_on = bool(have and code == 206 and span and int(span[1]) == have and (not seen or now in ("", seen)))
        if not goes_on and code in (200, 206, 416):
            _drop(part)
            if have and code != 200:
                return _receive(remote, part)  # anew, and this time without a range
            have = 0
        if code != 200 and not goes_on:
            raise requests.HTTPError(f"HTTP {code} {answer.reason}", response=answer)
        length, kind = found.get("Content-Length", ""), found.get("Content-Type", "no type")
        told = int(span[2]) if goes_on else int(length) if length.isdigit() else None
        whole = told if remote.size is None else remote.size
        if told not in (None, whole):
            raise ValueError(f"expected {whole} bytes, got {told} bytes of {kind}")
        if remote.size is remote.checksum is None and kind.startswith("text/html") and not remote.name.endswith(".html"):
            raise ValueError("a web page came in its place")
        try:
            if whole is not None and whole - have > shutil.disk_usage(part.parent).free:
                raise OSError(errno.ENOSPC, "the disk is too small")
            bar = tqdm(total=whole, initial=have, unit="B", unit_scale=True, desc=remote.name, disable=None)
            with open(part, "ab") as file, bar:
                if not have:
                    mark.write_text(now)
                for chunk in answer.raw.stream(1 << 16, decode_content=False):
                    have += file.write(chunk)
                    bar.update(len(chunk))
                    if remote.size is not None and have > remote.size:
                        raise ValueError(f"expected {remote.size} bytes, got more, of {kind}")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in FULL:
                raise
            needed = "an unknown number of" if whole is None else whole - _size(part)
            free = shutil.disk_usage(part.parent).free
            raise OSError(errno.ENOSPC, f"{error.strerror}: {needed} more bytes needed, {free} free") from error
    if whole is not None and have < whole:
        raise requests.ConnectionError(f"the connection was cut after {have} of {whole} bytes")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _drop(part: Path) -> None:
    for path in (part, Path(f"{part}.etag")):
        path.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """What went wrong, in one line, without the layers that urllib3 and requests wrap it in."""
    inner = error.args[0] if error.args else type(error).__name__
    return " ".join(str(getattr(inner, "reason", inner)).split())


@contextlib.contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Turn the many kinds of errors of `zipfile` and its decoders into one that says what is broken."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        if getattr(error, "errno", None) in FULL:
            raise OSError(f"{what}: no room to unpack it ({error.strerror}); make room and unpack it again") from error
        raise ValueError(f"{what}: broken ({error!r}); remove the archive and get it again") from error


def _members(archive: Path, infos: list[zipfile.ZipInfo], folder: Path) -> list[zipfile.ZipInfo]:
    """The members to unpack, once all are known to be safe: nothing is written before."""
    members, seen = [], set()
    for member in infos:
        name, path = member.filename, PurePosixPath(member.filename)
        if "__MACOSX" in path.parts[:1] or path.name == ".DS_Store":
            continue
        key = unicodedata.normalize("NFC", str(path)).casefold()  # as Windows and macOS tell names apart
        wrong = {
            "its path is not inside the folder": re.search(r"^/|^.:|\\|(^|/)\.\.(/|$)|^[./]*$", name),
            "a link or special file": stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR),
            "encrypted": member.flag_bits & 1,
            "there twice": key in seen and not member.is_dir(),
        }
        for why in (w for w in wrong if wrong[w]):
            raise ValueError(f"{archive}, member {name!r}: {why}; look into the archive and unpack it by hand")
        members.append(member)
        seen.add(key)
    if not members:
        raise ValueError(f"{archive} holds no files; remove it and get it again")
    total, packed = sum(m.file_size for m in members), archive.stat().st_size
    if total > BOMB_BYTES and total > BOMB_RATIO * packed:  # of the archive: members may share their packed bytes
        name = max(members, key=lambda m: m.file_size).filename
        raise ValueError(f"{archive}, member {name!r}: {total} bytes in all are too many for {packed} packed; remove it")
    there = [m for m in members if os.path.lexists(folder / PurePosixPath(m.filename).parts[0])]
    for member in there:
        path = folder / member.filename
        if not (path.is_dir() if member.is_dir() else path.is_file() and path.stat().st_size == member.file_size):
            raise FileExistsError(f"{archive}: {path} differs from it or is missing; move away what is in {folder} first")
    members = [m for m in members if m not in there]
    total, free = sum(m.file_size for m in members), shutil.disk_usage(folder).free
    if total > free:
        raise OSError(f"{archive}: no room to unpack it in {folder}: {total} bytes needed, {free} free; make room")
    return members
