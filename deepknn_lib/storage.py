"""Where data lives, files that appear whole or not at all, claims on them, and a short digest of contents."""

import contextlib
import difflib
import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

_NO_ROOM = "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ENOTDIR EEXIST".split()
_OF_DISK = ("inline_container", "I/O error")  # what torch and safetensors say of such errors


def data_dir() -> Path:
    """The folder for downloads, caches and runs: `DEEPKNN_DATA`, else `data/` of this checkout."""
    return Path(os.environ.get("DEEPKNN_DATA") or repository() / "data").expanduser().resolve()


def figures_dir() -> Path:
    """The folder that figures and tables are written to: `DEEPKNN_FIGURES`, else `figures/` of this checkout."""
    return Path(os.environ.get("DEEPKNN_FIGURES") or repository() / "figures").expanduser().resolve()


def repository() -> Path:
    """Root of the checkout this library is imported from."""
    return Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def room_for(what: Path) -> Iterator[None]:
    """Make the folder that `what` lies in; the OSError of a disk that is full or read-only says what to do."""
    try:
        what.parent.mkdir(parents=True, exist_ok=True)
        yield
    except Exception as error:
        told, number = str(getattr(error, "strerror", None) or error), getattr(error, "errno", errno.ENOSPC)
        of_disk = isinstance(error, OSError) or any(words in told for words in _OF_DISK)
        if not of_disk or errno.errorcode.get(number) not in _NO_ROOM or told.startswith("cannot write to"):
            raise
        advice = "make room or make it writable, or name another folder in DEEPKNN_DATA or DEEPKNN_FIGURES"
        raise OSError(number, f"cannot write to {what} ({told:.100}): {advice}") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it once the block has ended without an error.

    What was at `path` stays until then, also when the machine stops. The block may make a folder, if there is none yet.
    No two temporary paths are alike, also of hosts or containers whose process ids are. OSError if the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp{path.suffix}")
    try:
        with room_for(path):
            yield temporary
            if temporary.is_file():
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """OSError, rather now than after an hour, if no file can be put at `path`."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder; name a file")
    with room_for(path):
        tempfile.TemporaryFile(dir=path.parent).close()


@contextlib.contextmanager
def claim(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold `path` until the block ends: others that claim it wait, or with `wait=False` get False in place of True.

    The claim is a lock of the operating system (flock) on the file `.<name>.lock` beside `path`, which stays. It ends
    with its process, also by SIGKILL, and holds between containers with equal process ids and hosts that share a disk.
    Where the file system has no locks nobody waits: work may be done twice, but nothing is damaged.
    """
    from filelock import FileLock, Timeout

    lock, mine = FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False), True
    with room_for(path):
        try:
            lock.acquire(blocking=wait)
        except Timeout:
            mine = False
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
    try:
        yield mine
    finally:
        lock.release()


def read_whole(path: Path, read: Callable[[Path], object]) -> object | None:
    """What `read` makes of a file or folder; None if there is none, or it is not whole, and set aside."""
    if not path.exists():
        return None
    try:
        return read(path)
    except MemoryError:
        raise
    except Exception as error:  # NumPy and torch raise many kinds
        if getattr(error, "errno", None) not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise  # It may not be read, or too many files are open: that says nothing about the file.
        warnings.warn(set_aside(path, error), stacklevel=2)


def set_aside(path: Path, why: Exception) -> str:
    """Rename what is not whole, so that it is made again, and return the sentence that says so."""
    aside = path.with_name(f".damaged-{path.name}-{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(FileNotFoundError):  # Another process was the first to find it.
        path.rename(aside)
    return f"{path} is not whole ({why!s:.300}); it is now called {aside.name}, and is made again"


def sweep(hours: float = 24, *names: str) -> None:
    """Remove what killed processes left half written in `data_dir()`, or in it under these names, once it is so old."""
    for name in names or (".*", "*/.*"):
        for path in data_dir().glob(f"{name}.{'[0-9a-f]' * 32}.tmp*"):
            with contextlib.suppress(OSError):  # Another process sweeps too, or the folder is another user's.
                if time.time() - path.stat().st_mtime >= 3600 * hours:
                    _remove(path)


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that there is not: those there are, and before them those that may be meant."""
    close = " or ".join(difflib.get_close_matches(str(name), known := list(known)))
    meant = f", did you mean {close}? Choose" if close else "; choose"
    return ValueError(f"unknown {what} {name!r}{meant} one of {', '.join(known)}")


def write_csv(table, path: Path) -> None:
    """Write a data frame, numbers with six digits; text that a spreadsheet would run as a formula gets a quote."""
    # A number with a sign is none, alone or with its interval in brackets.
    formula = re.compile(r"[=@\t\r]|[+-](?!\d*\.?\d+($| \[[^a-zA-Z|]*$))")

    def safe(value):
        return f"'{value}" if isinstance(value, str) and formula.match(value) else value

    table = table.map(safe).rename(columns=safe)
    with whole_file(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")


def digest(*parts: bytes | str | Path | np.ndarray) -> str:
    """Twelve hexadecimal digits of the sha256 of the parts: bytes, text, the content of files, arrays."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = f"{part.dtype} {part.shape}".encode() + np.ascontiguousarray(part).tobytes()
        elif isinstance(part, Path):
            part = part.read_bytes()
        elif isinstance(part, str):
            part = part.encode(errors="surrogateescape")
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:12]


def load_state(path: Path) -> dict:
    """What `torch.save` wrote, read without unpickling code; ValueError if the file is not whole."""
    import torch

    try:
        if (bad := zipfile.ZipFile(path).testzip()) is not None:  # torch does not compare checksums
            raise ValueError(f"{bad} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path} cannot be read ({error!r:.200}); remove it to begin anew") from error
