"""Decoding: image files of any common kind become one uint8 array on disk, of which a part may stay there."""

import contextlib
import io
import math
import os
import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from deepknn_lib.storage import data_dir, digest, room_for, whole_file

INTERPOLATIONS = ("bilinear", "bicubic")
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


def open_image(path: Path) -> Image.Image:
    """One file as an upright 8-bit image in mode "RGB"; a ValueError says why not and what to do, without the path.

    EXIF's orientation is applied, transparent pixels lie over white, 16-bit greys are scaled, and of several frames or
    pages the first is taken; an ICC profile is ignored. DICOM is shown in its window, and MONOCHROME1 inverted.
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
        if image.mode[0] in "FI":
            tags, greys = getattr(image, "tag_v2", {}), np.asarray(image)
            low, high = greys.min(), greys.max()
            # TIFF's tag 258 is the number of bits, and tag 262 says whether zero is white.
            if image.mode == "F" or low < 0 or high > 65535 or 12 in tags.get(258, ()) or tags.get(262) == 0:
                raise ValueError(f"its numbers, {low:g} to {high:g}, are no 16-bit greys from black to white")
            image = Image.fromarray(np.rint(greys / 257).astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow and pydicom raise many kinds; each of them means this file
        what = f"{type(error).__name__}: {' '.join(str(error).split())}; {len(data)} bytes, first {data[:12]}"
        advice = "check that it may be read, get it again, or convert it to an 8-bit PNG"
        raise ValueError(f"cannot be read ({what}): {advice}") from error


def _dicom(file: io.BytesIO) -> Image.Image:
    from pydicom import dcmread
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

    header = dcmread(file)
    kind = header.PhotometricInterpretation
    if kind == "PALETTE COLOR" or "VOILUTSequence" in header or "ModalityLUTSequence" in header:
        raise ValueError("its values stand in a palette or table")
    low = -(1 << header.BitsStored - 1) if header.PixelRepresentation else 0
    ends = apply_modality_lut(np.array([low, low + (1 << header.BitsStored) - 1]), header)  # become 0 and 255
    values = apply_voi_lut(apply_modality_lut(pixel_array(header, index=0), header), header)
    shares = np.clip((values - ends[0]) / (ends[1] - ends[0]), 0, 1)
    shares = 1 - shares if kind == "MONOCHROME1" else shares
    return Image.fromarray(np.rint(shares * 255).astype(np.uint8)).convert("RGB")


def resize(images: np.ndarray, size: int, interpolation: str = "bilinear") -> np.ndarray:
    """Uint8 (N, C, H, W) to (N, C, size, size), averaged where it shrinks, as Pillow does it (within 1)."""
    given = torch.from_numpy(np.array(images, order="C"))
    return torch.nn.functional.interpolate(given, (size, size), mode=interpolation, antialias=True).numpy()


def each(index, size: int, work: Callable, told: str) -> Iterator:
    """What `work` makes of every image of an `Index`, uint8 (C, H, W), or the text why an image cannot be read."""
    from tqdm import tqdm

    def one(source: Path | np.ndarray):
        try:
            return work(np.asarray(open_image(source)).transpose(2, 0, 1) if index.files else source)
        except ValueError as error:
            return f"{source} {error}"

    # Pillow decodes without Python's lock, so that threads help; a block at a time bounds the memory.
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(index), desc=told, disable=None) as bar:
        for block in index.blocks(size) if index.blocks else [index.files]:
            for start in range(0, len(block), BLOCK):
                for result in pool.map(one, block[start : start + BLOCK]):
                    bar.update()
                    yield result


def decode(index, name: str, file_name: str, size: int, interpolation: str) -> np.ndarray:
    """All images of an `Index` squashed to squares, decoded once and then read from a copy on disk.

    They are uint8 (N, C, size, size), memory-mapped and read-only, so that a set larger than memory works. The copy is
    known by the files' paths, sizes and times of change. A ValueError tells of files that cannot be read (all are
    tried), an OSError of a full disk; nothing half made remains.
    """
    stats = ((path, path.stat()) for path in index.files if path.exists())
    key = index.key or digest(*(f"{path} {at.st_size} {at.st_mtime_ns}" for path, at in stats))
    path = data_dir() / "cache" / f"{file_name}-{size}-{interpolation}-{key}.uint8"
    shape = (len(index), index.channels, size, size)
    if not path.is_file():
        bad, told = [], f"`python -m deepknn_lib verify {shlex.quote(name)}` lists all"
        resized = each(index, size, lambda i: resize(i[None], size, interpolation), f"decoding {name}")
        with room_for(path), whole_file(path) as temporary, open(temporary, "wb") as file:
            for image in resized:
                # A memory map would end the process when the disk is full.
                bad.append(image) if isinstance(image, str) else file.write(image)
            if bad:
                raise ValueError(f"{len(bad)} of {len(index)} images are bad: {'; '.join(bad[:3])}. {told}")
            if file.tell() != math.prod(shape):
                raise ValueError(f"{name} has not {len(index)} images of {shape[1:]}; get it again")
    return np.memmap(path, np.uint8, "r", shape=shape)
