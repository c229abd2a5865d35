"""Decoding: image files of any common kind become one uint8 array on disk, of which a part may stay there."""

import contextlib
import errno
import hashlib
import io
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from deepknn_lib.storage import data_dir, digest, whole_file

MAGIC = (b"\xff\xd8", b"\x89PNG", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"RIFF")  # how image files begin
INTERPOLATIONS = ("bilinear", "bicubic")
BLOCK = 500  # images held in memory at a time


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
        """The images at `index` (integers or a mask); of images on disk, more than half of the memory stay there."""
        whole = self.images if isinstance(self.images, Rows) else Rows(self.images, np.arange(len(self)))
        part = Rows(whole.array, whole.index[index])
        stays = isinstance(whole.array, np.memmap) and whole.array[:1].nbytes * len(part) > memory_limit()
        return ImageSet(part if stays else part[:], self.labels[index], self.ids[index], self.groups[index])


def memory_limit() -> int:
    """Bytes that images from disk may take in memory: half of what the machine has."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 * 10**9


@contextlib.contextmanager
def room_for(what: str, advice: str) -> Iterator[None]:
    """The OSError of a full disk begins with `what` and ends with the advice."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise OSError(error.errno, f"{what} ({error.strerror}); {advice}") from error


def open_image(path: Path) -> Image.Image:
    """One file as an upright 8-bit image in mode "RGB"; a ValueError says why not and what to do, without the path.

    EXIF's orientation is applied, transparent pixels lie over white, 16-bit greys are scaled (65535 becomes 255), and
    of several frames or pages the first is taken; an ICC profile is ignored. DICOM is shown in its window if it has
    one, and MONOCHROME1 inverted.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be opened ({error.strerror}): check that it may be read") from error
    if not data:
        raise ValueError("is empty (0 bytes): copy or download it again")
    is_dicom = data[128:132] == b"DICM"
    try:
        if is_dicom:
            return _dicom(io.BytesIO(data))
        image = Image.open(io.BytesIO(data))
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow and pydicom raise many kinds; each of them means this file
        what = f"is not an image, it begins with {data[:20]}: download it again, or convert it"
        if is_dicom or data.startswith(MAGIC):
            what = "is cut off, damaged or of an unknown kind: download it again, or convert it"
        if isinstance(error, Image.DecompressionBombError):
            what = "holds more pixels than Pillow allows: shrink it"
        raise ValueError(f"{what} ({type(error).__name__}: {' '.join(str(error).split())})") from error
    with contextlib.suppress(Exception):  # a broken EXIF block is no reason to refuse an image
        ImageOps.exif_transpose(image, in_place=True)
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        lab, rgb = map(ImageCms.createProfile, ("LAB", "sRGB"))
        return ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    if image.mode[0] in "FI":
        tags, values = getattr(image, "tag_v2", {}), np.asarray(image)  # TIFF's 258: bits, 262: what zero is
        top = 4095 if 12 in tags.get(258, ()) else 65535
        if image.mode == "F" or values.min() < 0 or values.max() > top:
            what = f"numbers from {values.min():g} to {values.max():g}, not whole ones from 0 to {top}"
            raise ValueError(f"holds {what}: convert it to 8 or 16 bits")
        greys = (values.astype(np.int32) * 255 + top // 2) // top
        greys = 255 - greys if tags.get(262) == 0 else greys
        greys[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(greys.astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _dicom(file: io.BytesIO) -> Image.Image:
    from pydicom import dcmread
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

    header = dcmread(file)
    values, kind = pixel_array(header, index=0), header.PhotometricInterpretation
    low = -(1 << header.BitsStored - 1) if header.PixelRepresentation else 0
    ends = np.array([low, low + (1 << header.BitsStored) - 1])  # what becomes 0 and 255
    if kind == "PALETTE COLOR":
        values = apply_color_lut(values, header)[..., :3]
        ends = np.array([0, np.iinfo(values.dtype).max])
    elif kind.startswith("MONOCHROME"):
        values, ends = apply_modality_lut(values, header), apply_modality_lut(ends, header)
        tables = [header[name][0] for name in ("VOILUTSequence", "ModalityLUTSequence") if header.get(name)]
        if tables:  # Their values have a depth of their own, and only whole numbers find their place in one.
            ends = np.array([0, (1 << tables[0].LUTDescriptor[2]) - 1])
            values = np.rint(values).astype(np.int32)
        values = apply_voi_lut(values, header)
    shares = np.clip((values - ends[0]) / (ends[1] - ends[0]), 0, 1)
    shares = 1 - shares if kind == "MONOCHROME1" else shares
    return Image.fromarray(np.rint(shares * 255).astype(np.uint8)).convert("RGB")


def resize(images: np.ndarray, size: int, interpolation: str = "bilinear") -> np.ndarray:
    """Uint8 (N, C, H, W) to (N, C, size, size), averaged where it shrinks, as Pillow does it (within 1)."""
    given = torch.from_numpy(np.array(images, order="C"))
    return torch.nn.functional.interpolate(given, (size, size), mode=interpolation, antialias=True).numpy()


def each(index, size: int, work: Callable, told: str) -> Iterator:
    """What `work` makes of every image of an `Index`, in order: of its path, or of uint8 (C, H, W) near that size."""
    from tqdm import tqdm

    # Pillow decodes without Python's lock, so that threads help; a block at a time bounds the memory.
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(index), desc=told, disable=None) as bar:
        for block in index.blocks(size) if index.blocks else [index.files]:
            for start in range(0, len(block), BLOCK):
                for result in pool.map(work, block[start : start + BLOCK]):
                    bar.update()
                    yield result


def decode(index, name: str, file_name: str, size: int, interpolation: str) -> tuple[np.ndarray, str]:
    """All images of an `Index` squashed to squares, decoded once and then read from a copy on disk.

    Returns uint8 (N, C, size, size), memory-mapped and read-only, so that a set larger than memory works, and the
    sha256 of these pixels. The copy is known by the files' paths, sizes and times of change. A ValueError tells of
    files that cannot be read (all are tried), an OSError of a full disk; nothing half made remains.
    """
    stats = ((path, path.stat()) for path in index.files if path.exists())
    key = index.key or digest(*(f"{path} {at.st_size} {at.st_mtime_ns}" for path, at in stats))
    how = "" if interpolation == "bilinear" else f"-{interpolation}"
    path = data_dir() / "cache" / f"{file_name}-{size}{how}-{key}.uint8"
    checksum, shape = path.with_suffix(".sha256"), (len(index), index.channels, size, size)

    def read(source: Path | np.ndarray) -> np.ndarray | str:
        try:
            pixels = np.asarray(open_image(source)).transpose(2, 0, 1) if isinstance(source, Path) else source
        except ValueError as error:
            return f"{source} {error}"
        return resize(pixels[None], size, interpolation)

    if not (path.is_file() and checksum.is_file()):
        path.parent.mkdir(parents=True, exist_ok=True)
        needed, free, total, bad = math.prod(shape), shutil.disk_usage(path.parent).free, hashlib.sha256(), []
        advice = f"the images take {needed / 1e9:.3f} GB, {path.parent} has {free / 1e9:.3f} GB free. "
        advice += "Make room, name another folder in DEEPKNN_DATA, or give a smaller --image-size"
        full = room_for(f"no room to decode {name}", advice)
        with full, whole_file(path) as temporary, open(temporary, "wb") as file:
            if free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for image in each(index, size, read, f"decoding {name}"):
                if isinstance(image, str):
                    bad.append(image)
                else:
                    file.write(image)  # A memory map would end the process when the disk is full.
                    total.update(image)
            if bad:
                what = f"{len(bad)} of {len(index)} images cannot be read; replace or remove them"
                told = f"`python -m deepknn_lib verify {shlex.quote(name)}` lists all"
                raise ValueError(f"{what}: {'; '.join(bad[:3])}. {told}")
            if file.tell() != needed:
                raise ValueError(f"{name} has not {len(index)} images of {shape[1:]}; fetch it again")
        with whole_file(checksum) as temporary:
            temporary.write_text(total.hexdigest(), encoding="utf-8")
    return np.memmap(path, np.uint8, "r", shape=shape), checksum.read_text(encoding="utf-8")
