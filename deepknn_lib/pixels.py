"""Pixels: one image file of any common kind made into upright 8-bit RGB."""

import contextlib
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

MAGIC = (b"\xff\xd8", b"\x89PNG", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"RIFF")  # how such files begin
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # from an EXIF orientation to PIL.Image.Transpose
_opening = threading.Lock()  # warnings.catch_warnings is for one thread at a time


def open_image(path: Path) -> "Image":
    """One file as an upright 8-bit image in mode "RGB".

    EXIF's orientation is applied, transparent pixels lie over white, 16-bit greys are scaled (65535 becomes 255), and
    of several frames or pages the first is taken; an ICC profile is ignored. DICOM: rescaled, in its window if it has
    one, MONOCHROME1 inverted. ValueError: why the file cannot be read and what to do, without the path.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        file = open(path, "rb", buffering=1 << 16)  # mostly read before the lock below
        head = file.read(132)
    except OSError as error:
        raise ValueError(f"cannot be opened ({error.strerror}): check that it is there and may be read") from error
    with file:
        file.seek(0)
        begin = f"it begins with {' '.join(head[:40].decode(errors='replace').split())!r}"
        if head[128:] == b"DICM":
            return _dicom(file)
        if not head:
            raise ValueError("is empty (0 bytes): copy or download it again")
        if path.suffix.lower() == ".dcm":
            raise ValueError(f"is not a DICOM file ({begin}): download it again, or name it for what it is")
        try:
            with _opening, warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice that size is an error
                image = Image.open(file)
            image.load()
        except MemoryError:
            raise
        except Image.DecompressionBombError as error:
            limit = f"Pillow's limit of {2 * Image.MAX_IMAGE_PIXELS // 10**6} million"
            raise ValueError(f"holds more pixels than {limit}: shrink it ({error})") from error
        except UnidentifiedImageError as error:
            what = "is cut off, damaged or of an unknown kind" if head.startswith(MAGIC) else "is not an image"
            raise ValueError(f"{what} ({begin}): download it again, or convert it") from error
        except Exception as error:  # Pillow raises many kinds; every one means this file
            raise ValueError(f"is cut off or damaged: download it again ({type(error).__name__}: {error})") from error
        turn = None
        with contextlib.suppress(Exception):  # a broken EXIF block is no reason to refuse an image
            turn = TURNS.get(image.getexif().get(0x0112))
        return _rgb(image) if turn is None else _rgb(image).transpose(turn)


def _rgb(image: "Image") -> "Image":
    from PIL import Image, ImageCms

    if image.mode == "LAB":
        return ImageCms.profileToProfile(image, *map(ImageCms.createProfile, ("LAB", "sRGB")), outputMode="RGB")
    if image.mode[0] in "FI":
        values, tags = np.asarray(image), getattr(image, "tag_v2", {})  # a TIFF's 258: bits; 262: what zero means
        top = 4095 if 12 in tags.get(258, ()) else 65535
        if image.mode == "F" or values.min() < 0 or values.max() > top:
            kind = "fractions" if image.mode == "F" else f"numbers outside 0 to {top}"
            raise ValueError(f"holds {kind} ({values.min():g} to {values.max():g}): convert it to 8 or 16 bits")
        greys = (values.astype(np.int32) * 255 + top // 2) // top
        greys = 255 - greys if tags.get(262) == 0 else greys
        greys[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(greys.astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white, image = Image.new("RGB", image.size, "white"), image.convert("RGBA")
        white.paste(image, mask=image.getchannel("A"))  # colours under full transparency are often garbage
        return white
    return image.convert("RGB")


def _dicom(file: BinaryIO) -> "Image":
    from PIL import Image

    try:
        from pydicom import dcmread
        from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array
    except ImportError as error:
        raise ValueError("is a DICOM file, which needs pydicom 3: `pip install pydicom`") from error
    try:
        header = dcmread(file)
        values, kind = pixel_array(header, index=0), header.PhotometricInterpretation
        low = -(1 << header.BitsStored - 1) if values.ndim == 2 and header.PixelRepresentation else 0
        span = np.array([low, low + (1 << header.BitsStored) - 1])  # what becomes 0 and 255
        if kind == "PALETTE COLOR":
            values = apply_color_lut(values, header)[..., :3]
            span = np.array([0, np.iinfo(values.dtype).max])
        elif kind.startswith("MONOCHROME"):
            tables = [header[name][0] for name in ("VOILUTSequence", "ModalityLUTSequence") if header.get(name)]
            values = apply_modality_lut(values, header)
            # a table's values have a depth of their own, and whole numbers find their place in it
            span = np.array([0, (1 << tables[0].LUTDescriptor[2]) - 1]) if tables else apply_modality_lut(span, header)
            values = apply_voi_lut(np.rint(values).astype(np.int32) if tables else values, header)
        shares = np.clip((values - span[0]) / (span[1] - span[0]), 0, 1)
        shares = 1 - shares if kind == "MONOCHROME1" else shares
        return Image.fromarray(np.rint(shares * 255).astype(np.uint8)).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # pydicom raises many kinds; some name the package that is missing
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"is DICOM, but cannot be decoded: install what it needs, or convert it ({reason})") from error


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Uint8 (N, C, H, W) to (N, C, size, size): bilinear, averaged where it shrinks, as Pillow does it (within 1 of 255)."""
    import torch

    resized = torch.nn.functional.interpolate(torch.from_numpy(images), (size, size), mode="bilinear", antialias=True)
    return resized.contiguous().numpy()


def squash(image: "Image", size: int) -> np.ndarray:
    """An RGB image squashed to a square: uint8 (3, size, size)."""
    return resize(np.array(image).transpose(2, 0, 1)[None], size)[0]
