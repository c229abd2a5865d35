"""Decoding: image files of any common kind become one uint8 array on disk, of which a part may stay there."""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms

from deepknn_lib.storage import data_dir, digest, whole_file

MAGIC = (b"\xff\xd8", b"\x89PNG", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"RIFF")  # how such files begin
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # from an EXIF orientation to PIL.Image.Transpose
BLOCK = 500  # images decoded at a time
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class Rows:
    """Some rows of an array on disk; indexing reads just those asked for, as an ndarray."""

    def __init__(self, array: np.ndarray, index: np.ndarray) -> None:
        self.array, self.index = array, index
        self.shape, self.dtype, self.ndim = (len(index), *array.shape[1:]), array.dtype, array.ndim

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: "int | slice | np.ndarray") -> np.ndarray:
        return np.array(self.array[self.index[key]])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class ImageSet:
    """Images with what is known of each.

    Attributes
    ----------
    images : ndarray or Rows, uint8, (N, C, H, W)
        C is 3, or 1 for grey ones.
    labels : ndarray, int64, (N,)
    ids, groups : ndarray, str, (N,)
        A group is the lesion or patient that an image shows.
    """

    images: "np.ndarray | Rows"
    labels: np.ndarray
    ids: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> "ImageSet":
        """The images at `index` (integers or a mask); of images on disk, more than half of the memory stay there."""
        whole = isinstance(self.images, Rows)
        array, rows = (self.images.array, self.images.index) if whole else (self.images, np.arange(len(self)))
        part = Rows(array, rows[index])
        stays = isinstance(array, np.memmap) and array[:1].nbytes * len(part) > memory_limit()
        return ImageSet(part if stays else part[:], self.labels[index], self.ids[index], self.groups[index])


def memory_limit() -> int:
    """Bytes that images from disk may take in memory: half of what the machine has."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 * 10**9


def open_image(path: Path) -> Image.Image:
    """One file as an upright 8-bit image in mode "RGB".

    EXIF's orientation is applied, transparent pixels lie over white, 16-bit greys are scaled (65535 becomes 255), and
    of several frames or pages the first is taken; an ICC profile is ignored. DICOM is shown in its window if it has
    one, and MONOCHROME1 inverted. A ValueError says why the file cannot be read and what to do, without the path.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"cannot be opened ({error.strerror}): check that it is there and may be read"
        ) from error
    if not data:
        raise ValueError("is empty (0 bytes): copy or download it again")
    is_dicom, turn = data[128:132] == b"DICM", None
    try:
        if is_dicom:
            return _dicom(io.BytesIO(data))
        image = Image.open(io.BytesIO(data))
        image.load()
        with contextlib.suppress(Exception):  # a broken EXIF block is no reason to refuse an image
            turn = TURNS.get(image.getexif().get(0x0112))
        image = _rgb(image)
        return image if turn is None else image.transpose(turn)
    except Image.DecompressionBombError as error:
        raise ValueError(f"holds more pixels than Pillow allows: shrink it ({error})") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow and pydicom raise many kinds; every one means this file
        known = is_dicom or data.startswith(MAGIC)
        what = (
            "is cut off, damaged or of an unknown kind"
            if known
            else f"is not an image, it begins with {data[:20]}"
        )
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{what}: download it again, or convert it to 8 or 16 bits ({reason})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        return ImageCms.profileToProfile(
            image, *map(ImageCms.createProfile, ("LAB", "sRGB")), outputMode="RGB"
        )
    if image.mode[0] in "FI":
        values, tags = (
            np.asarray(image),
            getattr(image, "tag_v2", {}),
        )  # a TIFF's 258: bits; 262: what zero means
        top = 4095 if 12 in tags.get(258, ()) else 65535
        if image.mode == "F" or values.min() < 0 or values.max() > top:
            raise ValueError(
                f"numbers from {values.min():g} to {values.max():g}, not whole ones from 0 to {top}"
            )
        greys = (values.astype(np.int32) * 255 + top // 2) // top
        greys = 255 - greys if tags.get(262) == 0 else greys
        greys[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(greys.astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white, image = Image.new("RGB", image.size, "white"), image.convert("RGBA")
        white.paste(image, mask=image.getchannel("A"))  # colours under full transparency are often garbage
        return white
    return image.convert("RGB")


def _dicom(file: io.BytesIO) -> Image.Image:
    from pydicom import dcmread
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

    header = dcmread(file)
    values, kind = pixel_array(header, index=0), header.PhotometricInterpretation
    low = -(1 << header.BitsStored - 1) if header.PixelRepresentation else 0
    span = np.array([low, low + (1 << header.BitsStored) - 1])  # what becomes 0 and 255
    if kind == "PALETTE COLOR":
        values = apply_color_lut(values, header)[..., :3]
        span = np.array([0, np.iinfo(values.dtype).max])
    elif kind.startswith("MONOCHROME"):
        tables = [header[name][0] for name in ("VOILUTSequence", "ModalityLUTSequence") if header.get(name)]
        values = apply_modality_lut(values, header)
        # a table's values have a depth of their own, and whole numbers find their place in it
        span = (
            np.array([0, (1 << tables[0].LUTDescriptor[2]) - 1])
            if tables
            else apply_modality_lut(span, header)
        )
        values = apply_voi_lut(np.rint(values).astype(np.int32) if tables else values, header)
    shares = np.clip((values - span[0]) / (span[1] - span[0]), 0, 1)
    shares = 1 - shares if kind == "MONOCHROME1" else shares
    return Image.fromarray(np.rint(shares * 255).astype(np.uint8)).convert("RGB")


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Uint8 (N, C, H, W) to (N, C, size, size): bilinear, averaged where it shrinks, as Pillow does it (within 1)."""
    given = torch.from_numpy(np.array(images, order="C"))
    return torch.nn.functional.interpolate(given, (size, size), mode="bilinear", antialias=True).numpy()


def decode(index, image_size: int, file_name: str, name: str) -> tuple[np.ndarray, str]:
    """All images of an `Index` squashed to squares: decoded once, then read from a copy on disk.

    Returns the images, uint8 (N, C, image_size, image_size), memory-mapped and read-only, so that a set larger than
    memory works; and the sha256 of these pixels. The copy is known by the files' paths, sizes and times of change.

    Raises
    ------
    ValueError, OSError
        Files cannot be read (all are tried); the disk has no room. Nothing half made remains.
    """
    from tqdm import tqdm

    path = data_dir() / "cache" / f"{file_name}-{image_size}-{index.key or _stamp(index.files)}.npy"
    about, shape = path.with_suffix(".json"), (len(index), index.channels, image_size, image_size)
    if not (path.is_file() and about.is_file()):
        path.parent.mkdir(parents=True, exist_ok=True)
        total, needed, header = hashlib.sha256(), math.prod(shape), {"descr": "|u1", "fortran_order": False}
        try:
            if shutil.disk_usage(path.parent).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with whole_file(path) as temporary, open(temporary, "wb") as file:
                np.lib.format.write_array_header_1_0(file, header | {"shape": shape})
                start = (
                    file.tell()
                )  # written as a file: through a memory map a full disk would end the process
                for block in tqdm(_blocks(index, image_size, name), f"decoding {name}", disable=None):
                    file.write(block)
                    total.update(block)
                if file.tell() - start != needed:
                    raise ValueError(
                        f"{name}: its images are not {len(index)} of {shape[1:]}; fetch it again"
                    )
            with whole_file(about) as temporary:
                temporary.write_text(json.dumps({"sha256": total.hexdigest()}), encoding="utf-8")
        except OSError as error:
            if error.errno not in FULL:
                raise
            free = shutil.disk_usage(path.parent).free / 1e9
            what = f"the images of {name} take {needed / 1e9:.3f} GB, {path.parent} has {free:.3f} GB free"
            remedy = "Make room, name another folder in DEEPKNN_DATA, or give a smaller --image-size"
            raise OSError(error.errno, f"{error.strerror}: {what}. {remedy}") from error
    sha256 = json.loads(about.read_text(encoding="utf-8"))["sha256"]
    return np.load(path, mmap_mode="r", allow_pickle=False), sha256


def _stamp(files: list[Path]) -> str:
    with contextlib.suppress(FileNotFoundError):
        return digest(*(f"{path} {(at := path.stat()).st_size} {at.st_mtime_ns}" for path in files))
    return "missing"  # and reading the files will say which


def _blocks(index, size: int, name: str) -> Iterator[np.ndarray]:
    """The images in order, a block at a time; a ValueError at the end if files could not be read."""

    def read(path: Path) -> np.ndarray | str:
        try:
            return resize(np.asarray(open_image(path)).transpose(2, 0, 1)[None], size)
        except ValueError as error:
            return f"{path} {error}"

    if index.blocks:
        yield from (resize(block, size) for block in index.blocks(size))
    bad = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without Python's lock
        for start in range(0, len(index.files), BLOCK):
            found = list(pool.map(read, index.files[start : start + BLOCK]))
            bad += [image for image in found if isinstance(image, str)]
            if not bad:
                yield np.concatenate(found)
    if bad:
        what = (
            f"{len(bad)} of {len(index)} images cannot be read; replace or remove them: {'; '.join(bad[:3])}"
        )
        raise ValueError(f"{what}. `python -m deepknn_lib verify {shlex.quote(name)}` lists all")
