import ast
import errno
import hashlib
import io
import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from deepknn_lib import images
from deepknn_lib.images import ImageSet, Listing, Rows, decode, memory_limit, open_image, resize, squash

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8)
BLOCKS = RNG.integers(0, 256, (2, 3, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)  # JPEG keeps flat blocks


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder of this test's own."""
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def pixels(path):
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def reason(path):
    with pytest.raises(ValueError) as error:
        open_image(path)
    assert str(path) not in str(error.value) and path.name not in str(error.value)
    return str(error.value)


def listing(files=(), n=None, **more):
    n = len(files) if n is None else n
    ids = np.array([str(i) for i in range(n)])
    return Listing(np.zeros(n, np.int64), ids, ids, ("a",), files=list(files), **more)


def write_images(folder, n, size=8):
    """Files whose colour is their number."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{i}.png" for i in range(n)]
    for i, file in enumerate(files):
        Image.new("RGB", (size, size), (i // 256, i % 256, 7)).save(file)
    return files


def test_needs_only_numpy_when_imported():
    tree = ast.parse(Path(images.__file__).read_text(encoding="utf-8"))
    names = [a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert {n.split(".")[0] for n in names} <= sys.stdlib_module_names | {"numpy", "deepknn_lib"}


# One file


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("options", [("jpg", {"quality": 100, "subsampling": 0}), ("png", {}), ("webp", {"lossless": True})])
def test_exif_orientation(tmp_path, orientation, options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{options[0]}"
    Image.fromarray(BLOCKS).save(path, exif=exif, **options[1])
    wanted = UPRIGHT[orientation](BLOCKS)
    assert pixels(path).shape == wanted.shape
    assert np.abs(pixels(path) - wanted).max() <= (3 if path.suffix == ".jpg" else 0)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_tiff_orientation_once(tmp_path, orientation, compression):
    """Pillow turns a TIFF while loading it: turning it again would be wrong."""
    path = tmp_path / "a.tif"
    Image.fromarray(BLOCKS).save(path, tiffinfo={274: orientation}, compression=compression)
    assert (pixels(path) == UPRIGHT[orientation](BLOCKS)).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_orientation_of_deep_greys_and_of_broken_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = RNG.integers(0, 256, (3, 5), dtype=np.uint16)
    Image.fromarray(deep * 257).save(tmp_path / "a.png", exif=exif)
    assert (pixels(tmp_path / "a.png")[..., 0] == np.rot90(deep, -1)).all()
    for garbage in (b"Exif\0\0MM\0*garbage", b"Exif\0\0XXXXXXXXXX"):
        Image.fromarray(NOISE).save(tmp_path / "b.png", exif=garbage)
        assert (pixels(tmp_path / "b.png") == NOISE).all()


def test_grey_and_bilevel(tmp_path):
    Image.fromarray(NOISE[..., 0]).save(tmp_path / "l.png")
    assert (pixels(tmp_path / "l.png") == NOISE[..., :1]).all()
    bits = NOISE[..., 0] > 127
    for name in ("1.png", "1.tif", "1.bmp"):
        Image.fromarray(bits).save(tmp_path / name)
        assert (pixels(tmp_path / name) == bits[..., None] * 255).all()


def test_palette_with_and_without_transparency(tmp_path):
    colours = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
    index = RNG.integers(0, 4, (6, 7), dtype=np.uint8)
    image = Image.new("P", (7, 6))
    image.putdata(index.ravel().tolist())
    image.putpalette(colours.ravel().tolist())
    for name in ("p.png", "p.gif", "p.bmp"):
        image.save(tmp_path / name)
        assert (pixels(tmp_path / name) == colours[index]).all()
    white = np.where((index == 2)[..., None], 255, colours[index])
    for name in ("t.png", "t.gif"):
        image.save(tmp_path / name, transparency=2)
        assert (pixels(tmp_path / name) == white).all()
    image.save(tmp_path / "half.png", transparency=bytes([255, 0, 128, 255]))
    alpha = np.array([255, 0, 128, 255])[index][..., None]
    assert np.abs(pixels(tmp_path / "half.png") - (colours[index] * alpha + 255 * (255 - alpha)) / 255).max() <= 1


@pytest.mark.parametrize(("mode", "suffix"), [("LA", "png"), ("RGBA", "png"), ("RGBA", "tif"), ("RGBA", "webp")])
def test_alpha_lies_over_white(tmp_path, mode, suffix):
    alpha = np.tile(np.array([0, 255, 100, 200], np.uint8), (30, 10))
    colours = NOISE[..., : len(mode) - 1]  # under alpha 0 as well, where they are garbage
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    Image.fromarray(np.dstack([colours, alpha])).save(path, **options)
    with Image.open(path) as image:
        assert image.mode == mode
    share = alpha[..., None] / 255
    assert np.abs(pixels(path) - (colours * share + 255 * (1 - share))).max() <= 1
    assert (pixels(path)[alpha == 0] == 255).all() and (pixels(path)[alpha == 255] == colours[alpha == 255]).all()


def test_key_colour_of_rgb_and_grey_png_is_white(tmp_path):
    image = Image.fromarray(NOISE)
    image.save(tmp_path / "a.png", transparency=tuple(NOISE[3, 4].tolist()))
    wanted = np.where((NOISE == NOISE[3, 4]).all(-1, keepdims=True), 255, NOISE)
    assert (pixels(tmp_path / "a.png") == wanted).all()
    deep = np.array([[300, 301], [0, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "b.png", transparency=300)
    assert pixels(tmp_path / "b.png")[..., 0].tolist() == [[255, 1], [0, 255]]


@pytest.mark.parametrize("cmyk", [(0, 255, 255, 0), (255, 0, 0, 0), (0, 0, 0, 255), (40, 90, 10, 60)])
def test_cmyk_jpeg(tmp_path, cmyk):
    Image.new("CMYK", (16, 16), cmyk).save(tmp_path / "a.jpg", quality=100)
    wanted = [(255 - c) * (255 - cmyk[3]) / 255 for c in cmyk[:3]]
    assert np.abs(pixels(tmp_path / "a.jpg") - wanted).max() <= 3


def test_ycbcr_and_lab_tiff(tmp_path):
    Image.fromarray(BLOCKS).convert("YCbCr").save(tmp_path / "y.tif", compression="jpeg", quality=100)
    assert np.abs(pixels(tmp_path / "y.tif") - BLOCKS).max() <= 3
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    grey = Image.fromarray(BLOCKS).convert("L").convert("RGB")
    ImageCms.profileToProfile(grey, *profiles, outputMode="LAB").save(tmp_path / "l.tif")
    assert np.abs(pixels(tmp_path / "l.tif") - np.asarray(grey)).max() <= 4


def test_sixteen_bits_are_scaled(tmp_path):
    deep = np.array([0, 128, 129, 255, 256, 32768, 65535, *RNG.integers(0, 65536, 41)], np.uint16).reshape(6, 8)
    wanted = np.rint(deep / 65535 * 255)
    Image.fromarray(deep).save(tmp_path / "a.png")
    Image.fromarray(deep).save(tmp_path / "a.tif")
    Image.frombytes("I;16B", (8, 6), deep.astype(">u2").tobytes()).save(tmp_path / "b.tif")
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "i.tif")  # 32 bits, of which 16 are used
    for name in ("a.png", "a.tif", "b.tif", "i.tif"):
        assert (pixels(tmp_path / name) == wanted[..., None]).all(), name
    assert (tmp_path / "b.tif").read_bytes()[:2] == b"MM"
    Image.fromarray(deep).save(tmp_path / "zero-is-white.tif", tiffinfo={262: 0})
    assert (pixels(tmp_path / "zero-is-white.tif") == 255 - wanted[..., None]).all()


def png(width, height, depth, colour, rows):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bits_of_colour(tmp_path):
    deep = RNG.integers(0, 65536, (4, 5, 3)).astype(">u2")
    (tmp_path / "a.png").write_bytes(png(5, 4, 16, 2, b"".join(b"\0" + row.tobytes() for row in deep)))
    assert np.abs(pixels(tmp_path / "a.png") - deep / 257).max() <= 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), "holds fractions (0 to 1)"),
        (np.array([[0, 70000]], np.int32), "outside 0 to 65535 (0 to 70000)"),
        (np.array([[-1, 5]], np.int32), "outside 0 to 65535 (-1 to 5)"),
    ],
)
def test_other_numbers_are_refused(tmp_path, values, said):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert said in reason(tmp_path / "a.tif") and "convert it to 8 or 16 bits" in reason(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_first_of_several_frames(tmp_path, name):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 3
    assert (pixels(tmp_path / name) == [255, 0, 0]).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1)])
def test_extreme_shapes(tmp_path, shape):
    Image.new("RGB", shape, (10, 20, 30)).save(tmp_path / "a.png")
    squashed = squash(open_image(tmp_path / "a.png"), 24)
    assert squashed.shape == (3, 24, 24) and (squashed == np.array([10, 20, 30])[:, None, None]).all()


@pytest.mark.parametrize("size", [16, 48, 256])
def test_ordinary_files_are_as_pillow_has_them(tmp_path, size):
    """Committed results rest on Pillow's pixels; ours may be 1 of 255 off, in one value of a hundred."""
    y, x = np.mgrid[:450, :600]
    photo = np.dstack([x * 255 // 600, y * 255 // 450, (x * y) % 256]).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo).save(tmp_path / "rgb.jpg")
    Image.fromarray(photo).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(photo).save(tmp_path / "progressive.jpg", progressive=True, quality=60)
    Image.fromarray(photo[..., 2]).save(tmp_path / "grey.jpg")
    Image.fromarray(photo).save(tmp_path / "rgb.png")
    Image.fromarray(photo[..., 2]).save(tmp_path / "grey.png")
    Image.fromarray(photo).convert("CMYK").save(tmp_path / "cmyk.jpg")
    for path in sorted(tmp_path.glob("*.*g")):
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            theirs = np.asarray(upright.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        ours = squash(open_image(path), size)
        off = np.abs(ours.astype(int) - theirs)
        assert ours.dtype == np.uint8 and off.max() <= 1 and off.mean() < 0.01, path.name


def test_icc_profile_is_ignored(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.fromarray(NOISE).save(tmp_path / "a.png", icc_profile=profile)
    assert (pixels(tmp_path / "a.png") == NOISE).all()


def test_names_with_spaces_and_letters_of_all_kinds(tmp_path, data):
    not_utf8 = [os.fsdecode(b"latin-\xe9.png")] if sys.platform == "linux" else []
    files = [tmp_path / name for name in ("with space.png", "Ångström ß 皮膚.PNG", *not_utf8)]
    for file in files:
        Image.fromarray(NOISE).save(file, "PNG")
    assert decode(listing(files), 16, "été", "été").shape == (len(files), 3, 16, 16)


# Files that are no image


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_files_that_are_no_image(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "whole.jpg", quality=95)
    whole = (tmp_path / "whole.jpg").read_bytes()
    Image.fromarray(NOISE).save(tmp_path / "whole.png")
    broken = (tmp_path / "whole.png").read_bytes()
    Image.fromarray(NOISE).save(tmp_path / "whole.tif", compression="tiff_lzw")
    made = {
        "cut.jpg": (whole[: len(whole) * 2 // 3], "is cut off or damaged"),
        "stub.jpg": (whole[:10], "is cut off"),
        "cut.png": (broken[: len(broken) // 2], "is cut off or damaged"),
        "stub.png": (broken[:12], "is cut off, damaged or of an unknown kind"),
        "cut.tif": ((tmp_path / "whole.tif").read_bytes()[:1000], "is cut off"),
        "zero.jpg": (b"", "is empty (0 bytes): copy or download it again"),
        "text.jpg": (b"I am no image,\nnot at all", "is not an image (it begins with 'I am no image, not at all')"),
        "html.png": (b"<html><head>404", "is not an image (it begins with '<html><head>404')"),
        "noise.bmp": (bytes(range(200, 256)) * 4, "is not an image (it begins with"),
        "html.dcm": (b"<html><head>404" * 20, "is not a DICOM file (it begins with '<html>"),
        "bomb.png": (png(60000, 60000, 8, 2, b""), "holds more pixels than Pillow's limit of 178 million: shrink it"),
    }
    for name, (content, said) in made.items():
        (tmp_path / name).write_bytes(content)
        assert said in reason(tmp_path / name), (name, reason(tmp_path / name))
    assert "3600000000" in reason(tmp_path / "bomb.png")
    assert "No such file" in reason(tmp_path / "gone.png")
    (tmp_path / "folder.png").mkdir()
    assert "cannot be opened" in reason(tmp_path / "folder.png")


def test_large_images_are_read_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (12, 12), "red").save(tmp_path / "large.png")
    Image.new("RGB", (15, 15), "red").save(tmp_path / "too large.png")
    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("error")
        before = list(warnings.filters)
        found = list(pool.map(pixels, [tmp_path / "large.png"] * 200))
        assert warnings.filters == before
    assert all((f == [255, 0, 0]).all() for f in found)
    assert "shrink it" in reason(tmp_path / "too large.png")
    assert Image.MAX_IMAGE_PIXELS == 100


def test_too_little_memory_is_not_the_files_fault(tmp_path, monkeypatch):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", lambda _: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        open_image(tmp_path / "a.png")


# DICOM


def dicom(path, stored, photometric="MONOCHROME2", bits=8, jpeg=None, frames=None, **tags):
    pydicom = pytest.importorskip("pydicom")
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit if jpeg else pydicom.uid.ExplicitVRLittleEndian
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    colours = stored.ndim == 3 and not frames
    header.Rows, header.Columns = stored.shape[:2] if colours else stored.shape[-2:]
    header.SamplesPerPixel, header.PhotometricInterpretation = (3 if colours else 1), photometric
    if colours:
        header.PlanarConfiguration = 0
    if frames:
        header.NumberOfFrames = frames
    header.BitsAllocated, header.BitsStored, header.HighBit = 8 * stored.itemsize, bits, bits - 1
    header.PixelRepresentation = int(stored.dtype.kind == "i")
    for name, value in tags.items():
        setattr(header, name, value)
    header.PixelData = pydicom.encaps.encapsulate([jpeg]) if jpeg else stored.tobytes()
    header["PixelData"].VR = "OB" if stored.itemsize == 1 else "OW"
    header.save_as(path, enforce_file_format=True)
    return path


RAMP = np.arange(256, dtype=np.uint8).reshape(8, 32)
TWELVE = np.arange(0, 4096, 16, dtype=np.uint16).reshape(8, 32)


def grey(path):
    found = pixels(path)
    assert (found == found[..., :1]).all()
    return found[..., 0]


def test_dicom_of_eight_bits(tmp_path):
    assert (grey(dicom(tmp_path / "a.dcm", RAMP)) == RAMP).all()
    assert (grey(dicom(tmp_path / "b.dcm", RAMP, "MONOCHROME1")) == 255 - RAMP).all()
    assert (grey(dicom(tmp_path / "no suffix", RAMP)) == RAMP).all()
    assert (grey(dicom(tmp_path / "named.png", RAMP)) == RAMP).all()
    stack = np.stack([RAMP, RAMP[::-1], RAMP * 0])
    assert (grey(dicom(tmp_path / "c.dcm", stack, frames=3)) == RAMP).all()
    rgb = dicom(tmp_path / "d.dcm", NOISE, "RGB")
    assert (pixels(rgb) == NOISE).all()


def test_dicom_as_of_the_pneumonia_set(tmp_path):
    """8 bits, MONOCHROME2, JPEG baseline."""
    stream = io.BytesIO()
    smooth = np.add.outer(np.arange(64), np.arange(64) * 2).astype(np.uint8)
    Image.fromarray(smooth).save(stream, "JPEG", quality=90)
    path = dicom(tmp_path / "a.dcm", smooth, jpeg=stream.getvalue())
    with Image.open(stream) as image:
        assert (grey(path) == np.asarray(image)).all()
    path.write_bytes(path.read_bytes()[:-900])
    assert "is DICOM, but cannot be decoded" in reason(path)


def test_dicom_of_more_bits(tmp_path):
    assert (grey(dicom(tmp_path / "a.dcm", TWELVE, bits=12)) == np.rint(TWELVE / 4095 * 255)).all()
    signed = (TWELVE.astype(np.int32) * 16 - 32768).astype(np.int16)
    found = grey(dicom(tmp_path / "b.dcm", signed, bits=16))
    assert (found == np.rint((signed.astype(float) + 32768) / 65535 * 255)).all()


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_dicom_window(tmp_path, photometric):
    """The formula is that of DICOM PS3.3 C.11.2.1.2."""
    path = dicom(tmp_path / "a.dcm", TWELVE, photometric, 12, WindowCenter="1500", WindowWidth="800")
    wanted = np.clip((TWELVE - 1499.5) / 799 + 0.5, 0, 1)
    wanted = 1 - wanted if photometric == "MONOCHROME1" else wanted
    assert np.abs(grey(path) - wanted * 255).max() <= 0.51
    rescaled = {"RescaleSlope": "2", "RescaleIntercept": "-1024"}
    path = dicom(tmp_path / "b.dcm", TWELVE, photometric, 12, WindowCenter=["40", "9"], WindowWidth=["400", "9"], **rescaled)
    wanted = np.clip((TWELVE * 2.0 - 1024 - 39.5) / 399 + 0.5, 0, 1)
    wanted = 1 - wanted if photometric == "MONOCHROME1" else wanted
    assert np.abs(grey(path) - wanted * 255).max() <= 0.51


def test_dicom_rescaling_alone_changes_nothing(tmp_path):
    """Without a window the whole range becomes 0 to 255, in whichever unit it is."""
    path = dicom(tmp_path / "a.dcm", TWELVE, bits=12, RescaleSlope="0.5", RescaleIntercept="-10")
    assert (grey(path) == np.rint(TWELVE / 4095 * 255)).all()


def test_dicom_tables(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    table = pydicom.Dataset()
    table.LUTDescriptor = [4096, 0, 12]
    table["LUTDescriptor"].VR = "US"
    values = 4095 - np.arange(4096)
    table.add_new("LUTData", "US", values.tolist())
    tenths = {"RescaleSlope": "0.1", "RescaleIntercept": "0"}  # a table wants whole numbers
    path = dicom(tmp_path / "a.dcm", TWELVE, bits=12, VOILUTSequence=[table], **tenths)
    assert (grey(path) == np.rint(values[np.rint(TWELVE / 10).astype(int)] / 4095 * 255)).all()
    table.LUTDescriptor = [4096, 0, 16]
    path = dicom(tmp_path / "b.dcm", TWELVE, bits=12, ModalityLUTSequence=[table])
    assert (grey(path) == np.rint(values[TWELVE] / 65535 * 255)).all()
    colours = RNG.integers(0, 65536, (3, 256)).astype(np.uint16)
    names = ("Red", "Green", "Blue")
    tags = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16] for name in names}
    tags |= {f"{n}PaletteColorLookupTableData": c.tobytes() for n, c in zip(names, colours, strict=True)}
    path = dicom(tmp_path / "c.dcm", RAMP, "PALETTE COLOR", **tags)
    assert (pixels(path) == np.rint(colours[:, RAMP].transpose(1, 2, 0) / 257)).all()


def test_dicom_errors(tmp_path, monkeypatch):
    pydicom = pytest.importorskip("pydicom")
    path = dicom(tmp_path / "a.dcm", RAMP)
    header = pydicom.dcmread(path)
    del header.PixelData
    header.save_as(tmp_path / "b.dcm")
    assert "is DICOM, but cannot be decoded" in reason(tmp_path / "b.dcm")
    path.write_bytes(path.read_bytes()[:-100])
    assert "is DICOM, but cannot be decoded" in reason(path)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "`pip install pydicom`" in reason(path)


# All of them


def test_rows_are_in_order_under_threads(tmp_path, data):
    folder = tmp_path / "a"
    files = write_images(folder, 700)
    for i in range(0, 700, 90):  # these take longer
        Image.new("RGB", (1500, 1500), (i // 256, i % 256, 7)).save(files[i])
    random.Random(0).shuffle(files)
    found = decode(listing(files), 16, "some")
    numbers = [int(file.stem) for file in files]
    assert found.shape == (700, 3, 16, 16) and found.dtype == np.uint8
    assert (found[:, 0, 5, 5].astype(int) * 256 + found[:, 1, 9, 2] == numbers).all() and (found[:, 2] == 7).all()


def test_decoded_once_into_the_file_it_always_was(tmp_path, data, monkeypatch):
    files = write_images(tmp_path / "a", 5)
    stamp = "\n".join(f"{f} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)
    kept = data / "cache" / f"some-16-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.npy"
    first = decode(listing(files), 16, "some")
    assert list((data / "cache").iterdir()) == [kept]
    assert isinstance(first, np.memmap) and first.flags.writeable and (np.load(kept) == first).all()
    torch.from_numpy(first)[0] = 99  # neither warns nor reaches the file
    opened = []
    monkeypatch.setattr(Image, "open", lambda *_: opened.append(1))
    again = decode(listing(files), 16, "some")
    assert not opened and isinstance(again, np.memmap) and again[0, 1].max() == 0
    np.save(kept, np.full((5, 3, 16, 16), 42, np.uint8))  # as of the code before this module
    assert (decode(listing(files), 16, "some") == 42).all()
    monkeypatch.undo()
    monkeypatch.setenv("DEEPKNN_DATA", str(data))
    os.utime(files[3], ns=(1, 1))
    assert (decode(listing(files), 16, "some")[:, 1, 0, 0] == range(5)).all()
    assert len(list((data / "cache").iterdir())) == 2


def test_sets_larger_than_memory_can_be_mapped(tmp_path, data, monkeypatch):
    """Linux refuses a copy-on-write map that is larger than memory and swap."""
    load, modes = np.load, []

    def refuses(path, mmap_mode, **more):
        modes.append(mmap_mode)
        if mmap_mode == "c":
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return load(path, mmap_mode=mmap_mode, **more)

    monkeypatch.setattr(np, "load", refuses)
    found = decode(listing(write_images(tmp_path / "a", 3)), 16, "some")
    assert modes == ["c", "r"] and isinstance(found, np.memmap) and found.shape == (3, 3, 16, 16)


def test_many_files_take_one_look_each_and_little_memory(tmp_path, data, monkeypatch):
    files = write_images(tmp_path / "a", 2000, 16)
    stat, opened, looks, opens, ahead = Path.stat, Image.open, [], [], []

    def first_is_slow(image, size):
        if image.getpixel((0, 0))[:2] == (0, 0):  # the one file that all others have to wait for
            time.sleep(0.7)
            ahead.append(len(opens))
        return squash(image, size)

    monkeypatch.setattr(images, "squash", first_is_slow)
    monkeypatch.setattr(Path, "stat", lambda self, **more: looks.append(self.suffix) or stat(self, **more))
    monkeypatch.setattr(Image, "open", lambda file: opens.append(1) or opened(file))
    tracemalloc.start()
    found = decode(listing(files), 64, "many")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert looks.count(".png") == 2000 and len(opens) == 2000 and ahead[0] <= 256
    assert found.nbytes == 2000 * 3 * 64 * 64 and peak < found.nbytes / 3, peak


def test_missing_and_bad_files(tmp_path, data):
    files = write_images(tmp_path / "a b", 600)
    bad = [5, 6, 300, 301, 599]
    for i in bad:
        files[i].write_bytes(b"<html>")
    with pytest.raises(ValueError) as error:
        decode(listing(files), 16, "some", "folder:/a b")
    said = str(error.value)
    assert said.startswith(f"5 of 600 images cannot be read; replace or remove them: {files[5]} is not an image")
    assert [i for i in bad if str(files[i]) in said] == [5, 6, 300]
    assert said.endswith("`python -m deepknn_lib verify 'folder:/a b'` lists all")
    for i in (7, 300):
        files[i].unlink()
    files[7].mkdir()
    with pytest.raises(FileNotFoundError, match=f"^2 of 600 images are missing, the first is {files[7]}$"):
        decode(listing(files), 16, "some")
    assert not list((data / "cache").iterdir())


def test_too_little_room_is_said_before_anything_is_opened(tmp_path, data, monkeypatch):
    files = write_images(tmp_path / "a", 5)
    usage = type(images.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(images.shutil, "disk_usage", lambda _: usage(10**12, 10**12, 5 * 3 * 2000 * 2000 - 1))
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(OSError) as error:
        decode(listing(files), 2000, "some")
    assert error.value.errno == errno.ENOSPC
    for part in ("take 0.060 GB", f"{data / 'cache'} has 0.060 GB free", "DEEPKNN_DATA", "smaller --image-size"):
        assert part in str(error.value)
    assert not list((data / "cache").iterdir())


FULL = """
import resource, numpy as np
from deepknn_lib.images import Listing, decode
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
ids = np.arange(200).astype(str)
blocks = lambda: iter([np.zeros((20, 3, 32, 32), np.uint8)] * 10)
try:
    decode(Listing(np.zeros(200, int), ids, ids, ("a",), blocks=blocks, key="k"), 32, "some")
except OSError as error:
    print(error)
"""


def test_a_full_disk_leaves_nothing(data):
    result = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "File too large: the decoded images of some take 0.001 GB" in result.stdout and "DEEPKNN_DATA" in result.stdout
    assert not list((data / "cache").iterdir())


def test_other_errors_of_the_disk_are_passed_on(data, monkeypatch):
    def blocks():
        yield np.zeros((1, 3, 8, 8), np.uint8)
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error$"):
        decode(listing(n=2, blocks=blocks, key="k"), 16, "some")
    assert not list((data / "cache").iterdir())


def whole(arrays, size):
    """All at once, in floats."""
    floats = torch.from_numpy(arrays).float()
    resized = torch.nn.functional.interpolate(floats, size=(size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).byte().numpy()


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_resized_block_by_block(data, channels):
    arrays = RNG.integers(0, 256, (2300, channels, 12, 10), dtype=np.uint8)
    calls = []

    def blocks():
        calls.append(1)
        yield from np.split(arrays, [7, 2200])

    made = listing(n=2300, blocks=blocks, key="source 1", channels=channels)
    found = decode(made, 16, "some")
    assert isinstance(found, np.memmap) and (np.abs(found.astype(int) - whole(arrays, 16)) <= 1).all()
    assert (resize(arrays, 16) == found).all() and (resize(arrays[..., :10, :], 10) == arrays[..., :10, :]).all()
    assert (decode(made, 16, "some") == found).all() and calls == [1]
    kept = {f"some-16-{hashlib.sha256(b'source 1').hexdigest()[:12]}.npy"}
    assert {p.name for p in (data / "cache").iterdir()} == kept
    decode(listing(n=2300, blocks=blocks, key="source 2", channels=channels), 16, "some")
    assert calls == [1, 1]


def test_arrays_that_do_not_fit_the_table(data):
    grey = np.zeros((10, 1, 8, 8), np.uint8)
    for n, channels in ((9, 1), (11, 1), (10, 3)):
        with pytest.raises(ValueError, match="some: .*fetch it again"):
            decode(listing(n=n, blocks=lambda: iter([grey]), key="k", channels=channels), 16, "some")
    with pytest.raises(ValueError, match="0 images for 4 labels"):
        decode(listing(n=4, blocks=lambda: iter([]), key="k"), 16, "some")
    assert not list((data / "cache").iterdir())


def test_arrays_take_little_memory(data):
    def blocks():
        for start in range(0, 3000, 100):
            yield np.full((100, 3, 64, 64), start // 100, np.uint8)

    made = listing(n=3000, blocks=blocks, key="k")
    decode(listing(n=100, blocks=lambda: iter([next(blocks())]), key="first"), 64, "warm up")
    tracemalloc.start()
    found = decode(made, 64, "some")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < found.nbytes / 5, peak
    assert (found[:, 0, 0, 0] == np.arange(3000) // 100).all()


# Parts that stay on disk


INDICES = [
    np.array([3, 0, 7, 7, -1]),
    [4, 2],
    np.array([], dtype=int),
    np.arange(10) % 3 == 0,
    np.zeros(10, bool),
    slice(2, 9, 3),
    slice(None, None, -1),
    slice(0, 0),
]


@pytest.fixture
def on_disk(tmp_path):
    stored = RNG.integers(0, 256, (10, 3, 4, 5), dtype=np.uint8)
    np.save(tmp_path / "a.npy", stored)
    return np.load(tmp_path / "a.npy", mmap_mode="c"), stored


@pytest.mark.parametrize("outer", [np.arange(10), np.array([9, 1, 1, 0, 4, 5, 6, 8, 2, -10]), np.ones(10, bool)])
def test_rows_index_as_arrays_do(on_disk, outer, monkeypatch):
    monkeypatch.setattr(images, "STEP", 3)  # several reads
    mapped, stored = on_disk
    rows, wanted = Rows(mapped, outer), stored[outer]
    assert (len(rows), rows.shape, rows.dtype, rows.ndim, rows.nbytes) == (10, (10, 3, 4, 5), np.uint8, 4, 600)
    for index in INDICES:
        found = rows[index]
        assert type(found) is np.ndarray and found.shape == wanted[index].shape and (found == wanted[index]).all(), index
        again = Rows(rows, index)
        assert len(again) == len(wanted[index]) and (np.asarray(again) == wanted[index]).all()
    for index in (0, 9, -1, np.int64(4)):
        assert type(rows[index]) is np.ndarray and (rows[index] == wanted[index]).all()
    assert (np.asarray(rows) == wanted).all() and type(np.asarray(rows)) is np.ndarray
    assert np.asarray(rows, dtype=np.float32).dtype == rows.__array__(np.float32).dtype == np.float32
    assert [row.tolist() for row in rows] == wanted.tolist()
    rows[:][:] = 0
    rows[0][:] = 0
    assert (np.asarray(rows) == wanted).all()  # what comes out are copies
    for index in (10, -11, np.array([10]), np.ones(9, bool)):
        with pytest.raises(IndexError):
            rows[index]


def test_rows_read_no_more_than_asked_for(on_disk):
    class Counting(np.ndarray):
        def __getitem__(self, key):
            read.extend(np.atleast_1d(key).tolist())
            return super().__getitem__(key)

    read, counting = [], on_disk[1].view(Counting)
    assert Rows(counting, np.array([8, 3, 5]))[np.array([0, 1])].shape == (2, 3, 4, 5)
    assert read == [3, 8]


@pytest.mark.parametrize("index", INDICES)
def test_take(on_disk, index, monkeypatch):
    mapped, stored = on_disk
    labels, ids, groups = np.arange(10), np.arange(10).astype(str), np.arange(10).astype(str)
    small = ImageSet(mapped, labels, ids, groups).take(index)
    assert type(small.images) is np.ndarray and (small.images == stored[index]).all()
    monkeypatch.setattr(images, "memory_limit", lambda: stored[index].nbytes)
    assert type(ImageSet(mapped, labels, ids, groups).take(index).images) is np.ndarray
    monkeypatch.setattr(images, "memory_limit", lambda: stored[index].nbytes - 1)
    part = ImageSet(mapped, labels, ids, groups).take(index)
    assert isinstance(part.images, Rows) and (np.asarray(part.images) == stored[index]).all()
    assert (part.labels == labels[index]).all() and (part.ids == ids[index]).all() and (part.groups == groups[index]).all()
    monkeypatch.setattr(images, "memory_limit", lambda: -1)
    assert isinstance(part.take([]).images, Rows)
    plain = ImageSet(stored, labels, ids, groups).take(index)
    assert type(plain.images) is np.ndarray and (plain.images == stored[index]).all()
    monkeypatch.undo()
    both = part.take(slice(None, None, 2))
    assert type(both.images) is np.ndarray and (both.images == stored[index][::2]).all() and len(both) == len(both.labels)


def test_memory_limit(monkeypatch):
    if sys.platform == "linux":
        kibibytes = int(Path("/proc/meminfo").read_text().split()[1])
        assert abs(memory_limit() - kibibytes * 512) < 2**28
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert memory_limit() == 4 * 10**9
