"""Images: what a data set lists, and all of them in one array on disk."""

import contextlib
import errno
import hashlib
import math
import os
import shlex
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepknn_lib.pixels import open_image, resize, squash
from deepknn_lib.storage import data_dir, whole_file

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".dcm"}
AHEAD, STEP = 256, 1000  # images decoded before their turn to be written; rows handled at a time


class Rows:
    """Some rows (integers or a mask) of an array on disk; indexing reads just those asked for, as an ndarray."""

    def __init__(self, array: "np.ndarray | Rows", index: np.ndarray) -> None:
        self.array, self.index = array, np.arange(len(array))[index]
        self.shape, self.dtype, self.ndim = (*self.index.shape, *array.shape[1:]), array.dtype, array.ndim
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: "int | slice | np.ndarray") -> np.ndarray:
        rows = self.index[key]
        if rows.ndim == 0:
            return np.array(self.array[rows])
        order = np.argsort(rows, kind="stable")  # a disk is read fastest from front to back
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for part in np.array_split(order, len(order) // STEP + 1):
            out[part] = self.array[rows[part]]
        return out

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


def memory_limit() -> int:
    """Bytes that images from disk may take in memory: half of what the machine has."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 * 10**9


@dataclass(frozen=True)
class ImageSet:
    """Images with what is known of each.

    Attributes
    ----------
    images : ndarray or Rows, uint8, (N, C, H, W)
        C is 3, or 1 for grey ones.
    labels : ndarray, int64, (N,)
    ids : ndarray, str, (N,)
    groups : ndarray, str, (N,)
        The lesion or patient an image shows.
    """

    images: "np.ndarray | Rows"
    labels: np.ndarray
    ids: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> "ImageSet":
        """The images at `index` (integers or a mask); of images on disk, more than `memory_limit()` stay there."""
        if isinstance(self.images, np.memmap | Rows):
            images = Rows(self.images, index)
            images = images if images.nbytes > memory_limit() else images[:]
        else:
            images = self.images[index]
        return ImageSet(images, self.labels[index], self.ids[index], self.groups[index])


class Problem(NamedTuple):
    """One thing wrong with a data set: which check found it, in which file or row, why and what to do."""

    check: str
    item: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """What a data set holds, before any image is opened.

    Attributes
    ----------
    labels : ndarray, int64, (N,)
    ids, groups : ndarray, str, (N,)
        As in `ImageSet`.
    class_names : tuple of str
    files : list of Path
        One a row; empty when the set comes as arrays.
    blocks : callable, optional
        Of a set that comes as arrays: gives an iterator over uint8 (n, C, H, W), in the order of the rows.
    key : str
        Names what made the arrays, for the copy on disk (files are known by size and time of change).
    parts : ndarray of "train" and "test", optional
        Where the set comes in two parts.
    problems : list of Problem
        What is wrong with the tables and folders themselves.
    channels : int
        3, or 1 for grey arrays.
    title : str
        Says more than the catalogue's title, where it does.
    """

    labels: np.ndarray
    ids: np.ndarray
    groups: np.ndarray
    class_names: tuple[str, ...]
    files: list[Path] = field(default_factory=list)
    blocks: Callable[[], Iterator[np.ndarray]] | None = None
    key: str = ""
    parts: np.ndarray | None = None
    problems: list[Problem] = field(default_factory=list)
    channels: int = 3
    title: str = ""

    def __len__(self) -> int:
        return len(self.labels)


def decode(listing: Listing, image_size: int, name: str, dataset: str = "") -> np.ndarray:
    """All images squashed to a square: decoded once, then read from a copy on disk, whose file name begins with `name`.

    The copy is keyed by the files' paths, sizes and times of change, or by `listing.key`. `dataset` is what
    `python -m deepknn_lib verify` calls the set, if that is not `name`.

    Returns
    -------
    ndarray, uint8, (N, C, image_size, image_size)
        Memory-mapped, so a set larger than memory works; writing into it does not change the copy on disk.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        Files are missing; cannot be read (all are tried); the disk has no room. Nothing half made remains.
    """
    stamp = listing.key if listing.blocks else _stamp(listing.files)
    digest = hashlib.sha256(stamp.encode(errors="surrogateescape")).hexdigest()[:12]
    path = data_dir() / "cache" / f"{name}-{image_size}-{digest}.npy"
    if not path.is_file():
        blocks = _from_arrays(listing, image_size) if listing.blocks else _from_files(listing, image_size, dataset or name)
        with contextlib.closing(blocks):
            _write(path, blocks, (len(listing), listing.channels, image_size, image_size), name)
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except OSError:  # Linux maps no more than memory and swap for copy-on-write
        return np.load(path, mmap_mode="r", allow_pickle=False)


def _stamp(files: list[Path]) -> str:
    lines, missing = [], []
    for path in files:
        try:
            found = path.stat()
        except OSError:
            found = None
        if found and stat.S_ISREG(found.st_mode):
            lines.append(f"{path} {found.st_size} {found.st_mtime_ns}")
        else:
            missing.append(path)
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(files)} images are missing, the first is {missing[0]}")
    return "\n".join(lines)


def _from_arrays(listing: Listing, size: int) -> Iterator[np.ndarray]:
    for block in listing.blocks():
        for start in range(0, len(block), STEP):
            yield resize(np.ascontiguousarray(block[start : start + STEP]), size)


def _from_files(listing: Listing, size: int, dataset: str) -> Iterator[np.ndarray]:
    def read(path: Path) -> np.ndarray | str:
        try:
            return squash(open_image(path), size)[None]
        except ValueError as error:
            return f"{path} {error}"

    files, bad = listing.files, []
    pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes without Python's lock
    try:
        waiting = deque(pool.submit(read, path) for path in files[:AHEAD])
        for number in range(len(files)):
            result = waiting.popleft().result()
            waiting.extend(pool.submit(read, path) for path in files[number + AHEAD : number + AHEAD + 1])
            if isinstance(result, str):
                bad.append(result)
            elif not bad:
                yield result
    finally:
        pool.shutdown(cancel_futures=True)
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(files)} images cannot be read; replace or remove them: {'; '.join(bad[:3])}. "
            f"`python -m deepknn_lib verify {shlex.quote(dataset)}` lists all"
        )


def _write(path: Path, blocks: Iterator[np.ndarray], shape: tuple[int, ...], name: str) -> None:
    """One .npy file, by ordinary writes: through a memory map a full disk would end the process."""
    from tqdm import tqdm

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if shutil.disk_usage(path.parent).free < math.prod(shape):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            rows = 0
            with tqdm(total=shape[0], desc=f"decoding {name}", disable=None) as bar:
                for block in blocks:
                    if block.shape[1:] != shape[1:]:
                        raise ValueError(f"{name}: images of {block.shape[1]} channels, not {shape[1]}; fetch it again")
                    rows += len(block)
                    file.write(block)
                    bar.update(len(block))
            if rows != shape[0]:
                raise ValueError(f"{name}: {rows} images for {shape[0]} labels; fetch it again")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        needed, free = math.prod(shape) / 1e9, shutil.disk_usage(path.parent).free / 1e9
        raise OSError(
            error.errno,
            f"{error.strerror}: the decoded images of {name} take {needed:.3f} GB, {path.parent} has {free:.3f} GB free. "
            "Make room, name another folder in DEEPKNN_DATA, or give a smaller --image-size",
        ) from error
