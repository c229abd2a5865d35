"""Decoding: image files of any common kind become one uint8 array on disk, of which a part may stay there."""

import contextlib
import functools
import io
import math
import os
import shlex
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from deepknn_lib.storage import claim, data_dir, digest, set_aside, sweep, whole_file

INTERPOLATIONS = ("bilinear", "bicubic")
DEEP = "FI"  # the first letter of Pillow's modes of more than 8 bits
CHECKSUM = 4  # bytes
BLOCK = 500  # images held in memory at a time
IN_MEMORY = 8 * 10**9  # bytes; a part of a data set that takes more stays on disk


class Rows:
    """Some rows of an array on disk; indexing reads just those asked for, as an ndarray."""

    def __init__(self, array: np.ndarray, index: np.ndarray) -> None:
        self.array, self.index = array, index
        self.shape, self.dtype, self.ndim = (len(index), *array.shape[1:]), array.dtype, array.ndim

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | slice | np.ndarray) -> np.ndarray:
        return np.asarray(np.take(self.array, self.index[key], axis=0))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class ImageSet:
    """Images with what is known of each."""

    images: np.ndarray | Rows  # uint8 (N, C, H, W); C is 3, or 1 for grey ones
    labels: np.ndarray  # int64 (N,)
    ids: np.ndarray  # str (N,)
    groups: np.ndarray  # str (N,): the lesion or patient that an image shows

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> "ImageSet":
        """The images at `index` (integers or a mask); of images on disk, over `IN_MEMORY` stay there."""
        whole = self.images if isinstance(self.images, Rows) else Rows(self.images, np.arange(len(self)))
        part = Rows(whole.array, whole.index[index])
        stays = isinstance(whole.array, np.memmap) and whole.array[:1].nbytes * len(part) > IN_MEMORY
        return ImageSet(part if stays else part[:], self.labels[index], self.ids[index], self.groups[index])


def open_image(path: Path, top: int = 65535) -> Image.Image:
    """One file as an upright 8-bit image in mode "RGB"; a ValueError says why not and what to do, without the path.

    EXIF's orientation is applied, transparent pixels lie over white, of several frames or pages the first is taken; an
    ICC profile is ignored. DICOM is shown in its window, and MONOCHROME1 inverted. Greys of 16 bits are scaled by the
    range in the file's header; without one `top` becomes white, more is refused, and `info["largest"]` is the largest.
    """
    data = b""
    try:
        data = path.read_bytes()
        if data[128:132] == b"DICM":
            return _dicom(io.BytesIO(data))
        image = Image.open(io.BytesIO(data))
        image.load()
        with contextlib.suppress(Exception):  # a broken EXIF block is no reason to refuse an image
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in DEEP:
            image = _grey(image, data, top)
        if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow and pydicom raise many kinds; each of them means this file
        what = f"{type(error).__name__}: {' '.join(str(error).split())}; {len(data)} bytes, first {data[:12]}"
        advice = "check that it may be read, get it again, or convert it to an 8-bit PNG"
        raise ValueError(f"cannot be read ({what}): {advice}") from error


def _grey(image: Image.Image, data: bytes, top: int) -> Image.Image:
    """Greys of more than 8 bits as 8 bits; see `open_image`. TIFF's tag 262 says whether zero is white."""
    greys, tags = np.asarray(image), getattr(image, "tag_v2", {})
    low, high = greys.min(), greys.max()
    if image.mode == "F" or low < 0 or high > 65535 or tags.get(262) == 0:
        raise ValueError(f"its numbers, {low:g} to {high:g}, are no 16-bit greys from black to white")
    told = _told_range(greys, data, tags)
    black, white = told or (0, top)
    if not told and high > top:
        raise ValueError(f"its greys go up to {high}, those of the set to {top}")
    shares = (greys.astype(float) - black) / ((white - black) / 255)
    made = Image.fromarray(np.rint(np.clip(shares, 0, 255)).astype(np.uint8))
    made.info = {} if told else {"largest": int(high)}
    return made


def _told_range(greys: np.ndarray, data: bytes, tags: dict) -> tuple[float, float] | None:
    """The values of black and white that the header of a PNG or TIFF tells."""
    if 341 in tags:  # TIFF's largest value; 340 is its smallest.
        black, white = (float(np.ravel(tags.get(tag, 0))[0]) for tag in (340, 341))
        return (black, white) if black < white else None
    png = data.startswith(b"\x89PNG")
    chunk = data.find(b"sBIT", 0, data.find(b"IDAT")) if png else -1  # how many bits mean something
    bits = data[chunk + 4] if chunk > 0 else tags.get(258, (16,))[0]
    if not 0 < bits < 16:
        return None
    # A PNG should hold few bits as the upper ones of 16. A program that did not know this leaves other bits set.
    upper = chunk > 0 and (greys.max() >= 1 << bits or not (greys % (1 << 16 - bits)).any())
    return 0, 65535 if upper else (1 << bits) - 1


def _dicom(file: io.BytesIO) -> Image.Image:
    from pydicom import dcmread
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

    header = dcmread(file)
    kind = header.PhotometricInterpretation
    if kind == "PALETTE COLOR" or "VOILUTSequence" in header or "ModalityLUTSequence" in header:
        raise ValueError("its values stand in a palette or table")
    low = -(1 << header.BitsStored - 1) if header.PixelRepresentation else 0
    ends = apply_modality_lut(np.array([low, low + (1 << header.BitsStored) - 1]), header)  # become 0 and 255
    ends = np.sort(ends) if header.get("WindowCenter") is None else ends  # A window turns with the slope.
    values = apply_modality_lut(pixel_array(header, index=0), header)
    values = apply_voi_lut(values, header) if kind.startswith("MONOCHROME") else values
    shares = np.clip((values - ends[0]) / (ends[1] - ends[0]), 0, 1)
    shares = 1 - shares if kind == "MONOCHROME1" else shares
    return Image.fromarray(np.rint(shares * 255).astype(np.uint8)).convert("RGB")


def deep_greys(files: Sequence[Path]) -> tuple[int, int, int]:
    """How many files are 16-bit greys that tell no range; their largest value; and white, the least 2^n - 1 above."""

    def largest(path: Path) -> int | None:
        with contextlib.suppress(Exception), Image.open(path) as header:
            return open_image(path).info.get("largest") if header.mode[0] in DEEP else None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [value for value in pool.map(largest, files) if value is not None]
    top = max(found, default=65535)
    return len(found), top, (1 << max(1, top.bit_length())) - 1


def resize(images: np.ndarray, size: int, interpolation: str = "bilinear") -> np.ndarray:
    """Uint8 (N, C, H, W) to (N, C, size, size), averaged where it shrinks, as Pillow does it (within 1)."""
    given = torch.from_numpy(np.array(images, order="C"))
    return torch.nn.functional.interpolate(given, (size, size), mode=interpolation, antialias=True).numpy()


def each(index, size: int, work: Callable, told: str, top: int | None = None) -> Iterator:
    """What `work` makes of each image of an `Index`, uint8 (C, H, W), in order; a text where one cannot be read.

    Greys of 16 bits that do not tell their range are scaled by `top`, or by as many bits as all of them use together.
    """
    from tqdm import tqdm

    top = top or deep_greys(index.files)[-1]

    def one(source: Path | np.ndarray):
        try:
            return work(source if index.blocks else np.asarray(open_image(source, top)).transpose(2, 0, 1))
        except ValueError as error:
            return f"{source} {error}"

    # Pillow decodes without Python's lock, so that threads help; a block at a time bounds the memory.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        blocks = index.blocks(size) if index.blocks else [index.files]
        parts = (block[start : start + BLOCK] for block in blocks for start in range(0, len(block), BLOCK))
        made = (image for part in parts for image in pool.map(one, part))
        yield from tqdm(made, told, len(index.labels), disable=None)


def decode(index, entry, size: int, interpolation: str) -> np.ndarray:
    """All images of an `Index` squashed to squares: uint8 (N, C, size, size), read-only and mapped from a copy on disk.

    The copy is known by the files' paths, sizes and times, and ends with its checksum; one that is damaged is set
    aside, with a warning, and made again. A ValueError tells of files that cannot be read (all are tried), an OSError
    of a full disk; nothing half made remains.
    """
    stats = ((path, path.stat()) for path in index.files if path.exists())
    key = index.key or digest(
        *(f"{path} {at.st_size} {at.st_mtime_ns} {at.st_ctime_ns}" for path, at in stats)
    )
    path = data_dir() / "cache" / f"{entry.file_name}-{size}-{interpolation}-{key}.uint8"
    shape = (len(index.labels), index.channels, size, size)

    def whole() -> bool:
        return path.is_file() and _is_whole(path, math.prod(shape), path.stat().st_mtime_ns)

    if not whole():
        with claim(path):
            if not whole():  # Another process may have made it meanwhile.
                sweep(0, f"cache/.*-{size}-{interpolation}-{key}.uint8")  # of killed processes
                _make(path, index, entry.name, shape, interpolation)
    return np.memmap(path, np.uint8, "r", shape=shape)


def _make(path: Path, index, name: str, shape: tuple, interpolation: str) -> None:
    """Decode all images into `path`; a damaged copy that is there is kept aside."""
    size, total, checksum, bad = shape[2], math.prod(shape), 0, []
    if path.exists() and path.stat().st_size != total:  # without a checksum: of an earlier version
        warnings.warn(set_aside(path, ValueError("its checksum is another one")), stacklevel=4)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        for image in each(index, size, lambda i: resize(i[None], size, interpolation), f"decoding {name}"):
            if isinstance(image, str):
                bad.append(image)
            else:
                file.write(image)  # A memory map would end the process when the disk is full.
                checksum = zlib.crc32(image, checksum)
        if bad:
            told = f"`python -m deepknn_lib verify {shlex.quote(name)}` lists all"
            raise ValueError(f"{len(bad)} of {shape[0]} images are bad: {'; '.join(bad[:3])}. {told}")
        if file.tell() != total:
            raise ValueError(f"{name} has not {shape[0]} images of {shape[1:]}; get it again")
        file.write(checksum.to_bytes(CHECKSUM, "little"))


@functools.cache
def _is_whole(path: Path, size: int, _: int) -> bool:
    """Whether a file holds `size` bytes and then their checksum; asked once a process, 2 GB in two seconds."""
    if path.stat().st_size != size + CHECKSUM:
        return False
    content = np.memmap(path, np.uint8, "r")
    return zlib.crc32(content[:-CHECKSUM]).to_bytes(CHECKSUM, "little") == content[-CHECKSUM:].tobytes()
