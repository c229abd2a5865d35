"""Images of every kind become upright 8-bit RGB; bad input of every kind is an error that names file, reason and remedy."""

import io
import os
import resource
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image, ImageCms, ImageOps
from test_datasets import data, dataverse, dicom, skin7  # noqa: F401 (fixtures)

from deepknn_lib.datasets import decode, load_dataset, verify
from deepknn_lib.datasets.decode import open_image, resize

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8)
GREY, RAMP = NOISE[..., 0], np.arange(256, dtype=np.uint8).reshape(8, 32)
BLOCKS = RNG.integers(0, 256, (2, 3, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)  # JPEG keeps flat blocks
DEEP = np.array([0, 128, 129, 255, 256, 32768, 65535, *RNG.integers(0, 65536, 41)], np.uint16).reshape(6, 8)
ALPHA = np.tile(np.array([0, 255, 100, 200], np.uint8), (30, 10))
TWELVE = np.arange(0, 4096, 16, dtype=np.uint16).reshape(8, 32)
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


def pixels(path):
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def png(width, height, depth, colour, rows):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_once(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, options in (
        ("a.jpg", {"quality": 100, "subsampling": 0}),
        ("a.png", {}),
        ("a.webp", {"lossless": True}),
    ):
        Image.fromarray(BLOCKS).save(tmp_path / name, exif=exif, **options)
    for compression in ("raw", "tiff_lzw"):  # Pillow turns a TIFF while loading it
        Image.fromarray(BLOCKS).save(
            tmp_path / f"{compression}.tif", tiffinfo={274: orientation}, compression=compression
        )
    for path in tmp_path.glob("*.*"):
        assert np.abs(pixels(path) - UPRIGHT[orientation](BLOCKS)).max() <= (
            3 if path.suffix == ".jpg" else 0
        ), path
    Image.fromarray(DEEP).save(tmp_path / "deep.png", exif=exif)
    assert (pixels(tmp_path / "deep.png")[..., 0] == UPRIGHT[orientation](np.rint(DEEP / 257))).all()


def over_white(colours, alpha):
    return (colours * (alpha / 255.0)[..., None]) + 255 * (1 - alpha / 255.0)[..., None]


def palette():
    image = Image.new("P", (40, 30))
    image.putdata((GREY % 4).ravel().tolist())
    image.putpalette(NOISE[0, :4].ravel().tolist())
    return image


SRGB, LAB = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
FLAT = Image.fromarray(BLOCKS).convert("L").convert("RGB")
BIG_ENDIAN = Image.frombytes("I;16B", (8, 6), DEEP.astype(">u2").tobytes())
FRAMES = [Image.new("RGB", (9, 7), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
SEVERAL = {"save_all": True, "append_images": FRAMES[1:]}
# what is saved, under which name and options; the pixels that are wanted; by how much they may differ
GOOD = {
    "grey": (Image.fromarray(GREY), "a.png", {}, GREY[..., None], 0),
    "bilevel": (Image.fromarray(GREY > 127), "a.tif", {}, (GREY > 127)[..., None] * 255, 0),
    "palette": (palette(), "a.gif", {}, NOISE[0, :4][GREY % 4], 0),
    "palette, one clear": (palette(), "a.png", {"transparency": 2},
                           np.where((GREY % 4 == 2)[..., None], 255, NOISE[0, :4][GREY % 4]), 0),
    "grey and alpha": (Image.fromarray(np.dstack([GREY, ALPHA])), "a.png", {}, over_white(NOISE[..., :1], ALPHA), 1),
    "alpha": (Image.fromarray(np.dstack([NOISE, ALPHA])), "a.png", {}, over_white(NOISE, ALPHA), 1),
    "alpha of TIFF": (Image.fromarray(np.dstack([NOISE, ALPHA])), "a.tif", {}, over_white(NOISE, ALPHA), 1),
    "key colour": (Image.fromarray(NOISE), "a.png", {"transparency": tuple(NOISE[3, 4].tolist())},
                   np.where((NOISE == NOISE[3, 4]).all(-1, keepdims=True), 255, NOISE), 0),
    "CMYK": (Image.new("CMYK", (16, 16), (40, 90, 10, 60)), "a.jpg", {"quality": 100},
             [(255 - c) * (255 - 60) / 255 for c in (40, 90, 10)], 3),
    "YCbCr": (Image.fromarray(BLOCKS).convert("YCbCr"), "a.tif", {"compression": "jpeg", "quality": 100}, BLOCKS, 3),
    "LAB": (ImageCms.profileToProfile(FLAT, SRGB, LAB, outputMode="LAB"), "a.tif", {}, np.asarray(FLAT), 4),
    "16 bits": (Image.fromarray(DEEP), "a.png", {}, np.rint(DEEP / 257)[..., None], 0),
    "16 bits, big end first": (BIG_ENDIAN, "a.tif", {}, np.rint(DEEP / 257)[..., None], 0),
    "16 of 32 bits": (Image.fromarray(DEEP.astype(np.int32)), "a.tif", {}, np.rint(DEEP / 257)[..., None], 0),
    "zero is white": (Image.fromarray(DEEP), "a.tif", {"tiffinfo": {262: 0}}, 255 - np.rint(DEEP / 257)[..., None], 0),
    "first frame": (FRAMES[0], "a.gif", SEVERAL, [255, 0, 0], 0),
    "first page": (FRAMES[0], "a.tif", SEVERAL, [255, 0, 0], 0),
    "an ICC profile": (Image.fromarray(NOISE), "a.png", {"icc_profile": ImageCms.ImageCmsProfile(LAB).tobytes()}, NOISE, 0),
    "broken EXIF": (Image.fromarray(NOISE), "a.png", {"exif": b"Exif\0\0MM\0*garbage"}, NOISE, 0),
    "any name": (Image.fromarray(NOISE), "Ångström ß 皮膚 .PNG", {}, NOISE, 0),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(("image", "name", "options", "wanted", "off"), GOOD.values(), ids=list(GOOD))
def test_every_kind_of_image_becomes_rgb(tmp_path, image, name, options, wanted, off):
    image.save(tmp_path / name, **options)
    assert np.abs(pixels(tmp_path / name) - np.asarray(wanted)).max() <= off


def test_sixteen_bits_of_colour(tmp_path):
    deep = RNG.integers(0, 65536, (4, 5, 3)).astype(">u2")
    (tmp_path / "a.png").write_bytes(png(5, 4, 16, 2, b"".join(b"\0" + row.tobytes() for row in deep)))
    assert np.abs(pixels(tmp_path / "a.png") - deep / 257).max() <= 1


def window(values, centre, width):
    """DICOM PS3.3 C.11.2.1.2."""
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1) * 255


def lut(depth):
    table = pydicom.Dataset()
    table.LUTDescriptor = [4096, 0, depth]
    table["LUTDescriptor"].VR = "US"
    table.add_new("LUTData", "US", (4095 - np.arange(4096)).tolist())
    return [table]


SIGNED = (TWELVE.astype(np.int32) * 16 - 32768).astype(np.int16)
STACK = np.stack([RAMP, RAMP[::-1], RAMP * 0])
COLOURS = RNG.integers(0, 65536, (3, 256)).astype(np.uint16)
RGB = ("Red", "Green", "Blue")
PALETTE = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16] for name in RGB}
PALETTE |= {f"{n}PaletteColorLookupTableData": c.tobytes() for n, c in zip(RGB, COLOURS, strict=True)}
WINDOW = {"WindowCenter": "1500", "WindowWidth": "800"}
HOUNSFIELD = {
    "RescaleSlope": "2",
    "RescaleIntercept": "-1024",
    "WindowCenter": ["40", "9"],
    "WindowWidth": ["400", "9"],
}
DICOM = {
    "8 bits": (RAMP, {}, RAMP),
    "inverted": (RAMP, {"photometric": "MONOCHROME1"}, 255 - RAMP),
    "first frame": (STACK, {"frames": 3}, RAMP),
    "12 bits": (TWELVE, {"bits": 12}, TWELVE / 4095 * 255),
    "signed": (SIGNED, {"bits": 16}, (SIGNED.astype(float) + 32768) / 257),
    "window": (TWELVE, {"bits": 12, **WINDOW}, window(TWELVE, 1500, 800)),
    "window, inverted": (
        TWELVE,
        {"bits": 12, "photometric": "MONOCHROME1", **WINDOW},
        255 - window(TWELVE, 1500, 800),
    ),
    "rescaled window": (TWELVE, {"bits": 12, **HOUNSFIELD}, window(TWELVE * 2.0 - 1024, 40, 400)),
    "rescaled": (TWELVE, {"bits": 12, "RescaleSlope": "0.5", "RescaleIntercept": "-10"}, TWELVE / 4095 * 255),
    "window as table": (TWELVE, {"bits": 12, "VOILUTSequence": lut(12)}, (4095 - TWELVE) / 4095 * 255),
    "values as table": (TWELVE, {"bits": 12, "ModalityLUTSequence": lut(16)}, (4095 - TWELVE) / 65535 * 255),
}


@pytest.mark.parametrize(("stored", "tags", "wanted"), DICOM.values(), ids=list(DICOM))
def test_dicom_greys(tmp_path, stored, tags, wanted):
    for name in ("a.dcm", "no suffix", "named.png"):
        found = pixels(dicom(tmp_path / name, stored, **tags))
        assert np.abs(found - wanted[..., None]).max() <= 0.51


def test_dicom_colours(tmp_path):
    assert (pixels(dicom(tmp_path / "a.dcm", NOISE, "RGB")) == NOISE).all()
    found = pixels(dicom(tmp_path / "b.dcm", RAMP, "PALETTE COLOR", **PALETTE))
    assert (found == np.rint(COLOURS[:, RAMP].transpose(1, 2, 0) / 257)).all()


@pytest.mark.parametrize("size", [16, 48, 256])
def test_squashed_images_are_as_pillow_has_them(tmp_path, size):
    """Committed results rest on Pillow's pixels; ours may be 1 of 255 off, in one value of a hundred."""
    y, x = np.mgrid[:450, :600]
    photo = Image.fromarray(np.dstack([x * 255 // 600, y * 255 // 450, (x * y) % 256]).astype(np.uint8))
    photo.save(tmp_path / "a.jpg", progressive=True, quality=60)
    photo.convert("L").save(tmp_path / "b.png")
    Image.new("RGB", (1, 3000), (10, 20, 30)).save(tmp_path / "c.png")
    for path in tmp_path.glob("*.*"):
        upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        theirs = np.asarray(upright.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        off = np.abs(
            resize(np.asarray(open_image(path)).transpose(2, 0, 1)[None], size)[0].astype(int) - theirs
        )
        assert off.max() <= 1 and off.mean() < 0.01, path.name


# Bad input


def textured(root):
    """Two classes of ten images that differ, so that a clean set has nothing to report."""
    rng = np.random.default_rng(0)
    for name in ("healthy", "ill"):
        (root / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(
                root / name / f"{number}.png"
            )
    return root


def put(content, name="3.png"):
    """Something in place of an image of the second class; bytes, or an array that Pillow saves."""

    def harm(root):
        path = root / "ill" / name
        content.save(path) if isinstance(content, Image.Image) else path.write_bytes(content)

    return harm


def groups(extra=(), leave_out=()):
    def harm(root):
        names = [f.relative_to(root).as_posix() for f in sorted(root.glob("*/*.png"))]
        rows = [f"{name},P{number}" for number, name in enumerate(names) if name not in leave_out]
        (root / "groups.csv").write_text("\n".join(["file,patient_id", *rows, *extra]))

    return harm


def cut(share, suffix):
    stream = io.BytesIO()
    Image.fromarray(NOISE).save(stream, {"jpg": "JPEG", "png": "PNG", "tif": "TIFF"}[suffix])
    return put(stream.getvalue()[: int(len(stream.getvalue()) * share)], f"x.{suffix}")


def folder_called(name):
    return lambda root: (root / "ill" / name).mkdir()


def one_image_class(root):
    (root / "rare").mkdir()
    Image.new("RGB", (40, 40), "red").save(root / "rare" / "1.png")


def cut_dicom(root):
    path = dicom(root / "ill" / "x.dcm", RAMP)
    path.write_bytes(path.read_bytes()[:-100])


FRACTIONS = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
LARGE, NEGATIVE = (Image.fromarray(np.array([[a, 5]], np.int32)) for a in (70000, -1))
WITHOUT_COLUMN = "groups.csv needs the column file and one more"
# what is done to a good folder; what loading says
BAD = {
    "cut JPEG": (cut(2 / 3, "jpg"), "x.jpg is cut off.*download it again"),
    "stub of a JPEG": (put(b"\xff\xd8\xff\xe0\0\x10JFIF", "x.jpg"), "x.jpg is cut off"),
    "cut PNG": (cut(0.5, "png"), "x.png is cut off"),
    "cut TIFF": (cut(0.5, "tif"), "x.tif is cut off"),
    "zero bytes": (put(b""), r"3.png is empty \(0 bytes\): copy or download it again"),
    "text called .jpg": (
        put(b"I am no image", "x.jpg"),
        "x.jpg is not an image, it begins with b'I am no image'",
    ),
    "a page called .png": (put(b"<html><head>404"), "3.png is not an image, it begins with b'<html>"),
    "a page called .dcm": (put(b"<html><head>404" * 20, "x.dcm"), "x.dcm is not an image.*<html>"),
    "noise called .bmp": (put(bytes(range(200, 256)) * 4, "x.bmp"), "x.bmp is not an image"),
    "bomb": (put(png(60_000, 60_000, 8, 2, b"\0")), "3.png holds more pixels than Pillow allows: shrink it"),
    "fractions": (
        put(FRACTIONS, "x.tif"),
        "x.tif .*numbers from 0 to 1, not whole ones.*convert it to 8 or 16 bits|F",
    ),
    "more than 16 bits": (put(LARGE, "x.tif"), "numbers from 5 to 70000, not whole ones from 0 to 65535"),
    "negative numbers": (put(NEGATIVE, "x.tif"), "numbers from -1 to 5"),
    "a cut DICOM": (cut_dicom, "x.dcm is cut off"),
    "a folder called .png": (folder_called("y.png"), "y.png cannot be opened .*Is a directory"),
    "a broken link": (
        lambda r: os.symlink("gone", r / "ill" / "z.png"),
        "z.png cannot be opened .No such file",
    ),
    "one image in a class": (one_image_class, "class 'rare' has 1 images; five folds need 5"),
    "an empty class": (lambda r: (r / "rare").mkdir(), "empty class: rare has no images.*add some or remove"),
    "a group row without image": (groups(["ill/99.png,P1"]), "row without image: ill/99.png.*remove the row"),
    "an image without group row": (
        groups(leave_out=["ill/3.png"]),
        "image without row: ill/3.png.*add a row",
    ),
    "an image without group": (groups(["ill/3.png,"], ["ill/3.png"]), "no group: ill/3.png.*give it one"),
    "an image in two groups": (groups(["ill/3.png,P9"]), "duplicate id: ill/3.png.*keep one of its rows"),
}
FATAL = {
    "an empty folder": (
        lambda r: [shutil.rmtree(p) for p in r.iterdir()],
        "each of at least 2 classes; it has 0",
    ),
    "one class": (lambda r: shutil.rmtree(r / "ill"), "at least 2 classes; it has 1"),
    "no folder": (shutil.rmtree, "there is no folder"),
    "a table without file": (
        lambda r: (r / "groups.csv").write_text("name\nx"),
        "groups.csv needs the columns file",
    ),
    "a table without groups": (lambda r: (r / "groups.csv").write_text("file\nx"), WITHOUT_COLUMN),
    "another encoding": (
        lambda r: (r / "groups.csv").write_bytes(b"file,p\n\xff\xfe,"),
        "save it as CSV in UTF-8",
    ),
    "an empty table": (lambda r: (r / "groups.csv").write_bytes(b""), "groups.csv cannot be read as a table"),
}


@pytest.mark.parametrize(("harm", "said"), [*BAD.values(), *FATAL.values()], ids=[*BAD, *FATAL])
def test_a_bad_folder(tmp_path, data, harm, said):  # noqa: F811
    root = textured(tmp_path / "my images é")
    harm(root)
    with pytest.raises((ValueError, OSError), match=said) as error:
        load_dataset(f"folder:{root}", "grouped", 1, 24)
    assert "\n" not in str(error.value) and not list((data / "cache").glob("*"))  # nothing half made
    if (harm, said) in FATAL.values():
        with pytest.raises((ValueError, OSError), match=said):
            verify.of_dataset(f"folder:{root}")
    else:
        found, _ = verify.of_dataset(f"folder:{root}")
        assert verify.failed(found) and (found["severity"] == "error").sum() == 1


def test_all_bad_files_are_tried_and_verify_lists_them(tmp_path, data):  # noqa: F811
    root = textured(tmp_path / "a b")
    for number in range(7):
        (root / "healthy" / f"{number}.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"7 of 20 images.*0.png.*1.png.*2.png.*verify 'folder:.*a b'` lists all"
    ):
        load_dataset(f"folder:{root}", "paper", 1, 24)
    found, _ = verify.of_dataset(f"folder:{root}")
    assert found["item"].tolist() == [f"healthy/{n}.png" for n in range(7)]


def change(old, new):
    def harm(root, table):
        table.write_text(table.read_text().replace(old, new, 1))

    return harm


def copy_of_an_image(root, table):
    shutil.copy(next(root.rglob("*7.jpg")), root / "HAM10000_images_part_1" / "ISIC_9.jpg")


TABLES = {
    "a row without image": (
        lambda r, t: next(r.rglob("*07.jpg")).unlink(),
        "row without image: ISIC_0000007",
    ),
    "an image without row": (copy_of_an_image, "image without row: ISIC_9 "),
    "an unknown class": (
        change(",nv", ",naevus"),
        "unknown class: ISIC_.*is in .*as 'naevus'; the classes are akiec",
    ),
    "a doubled id": (
        lambda r, t: t.write_text(t.read_text() + "HAM_0_0,ISIC_0000007,akiec"),
        "duplicate id: ISIC_0000007",
    ),
    "a row cut short": (change("ISIC_0000008,bcc", "ISIC_0000008"), "unknown class: ISIC_0000008"),
    "no lesion": (change("HAM_0_0,", ","), "no group: ISIC"),
    "a missing column": (change("dx", "diagnosis"), "metadata.csv needs the columns image_id, dx, lesion_id"),
}


@pytest.mark.parametrize(("harm", "said"), TABLES.values(), ids=list(TABLES))
def test_a_table_that_does_not_fit_its_images(skin7, harm, said):  # noqa: F811
    dataverse(skin7)
    harm(skin7, skin7 / "HAM10000_metadata.csv")
    with pytest.raises(ValueError, match=said):
        load_dataset("skin7", "grouped", 1, 24)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("*/*GroundTruth.csv", ("0.0,1.0", "1.0,1.0"), "unknown class: ISIC.* as 'no or several classes'"),
        ("*/*GroundTruth.csv", ("0.0,1.0", "0.0,0.0"), "unknown class: ISIC.* as 'no or several classes'"),
        ("*/*GroundTruth.csv", ("0.0,1.0", "0.0,2.0"), "unknown class: ISIC.* as 'no or several classes'"),
        ("*Groupings.csv", ("HAM_0_0", ""), "no group: ISIC_0000000"),
        ("folds.csv", ("0000001,", "0000000,"), "line 3: 'ISIC_0000000' is there again; correct or remove"),
        (
            "folds.csv",
            ("0000001,1", "0000001,7"),
            "line 3: 'ISIC_0000001' has test_fold '7', which is not 1..5",
        ),
        (
            "folds.csv",
            ("ISIC_0000001", "other"),
            "gives no fold to 1 images, the first is ISIC_0000001; is it this set's",
        ),
    ],
)
def test_official_tables_that_do_not_fit(skin7, file, text, said):  # noqa: F811
    change(*text)(skin7, next(skin7.glob(file)))
    with pytest.raises(ValueError, match=said):
        load_dataset("skin7", "paper", 1, 24)


def test_a_missing_table_is_named(skin7):  # noqa: F811
    next(skin7.glob("*Groupings.csv")).unlink()
    with pytest.raises(FileNotFoundError, match="LesionGroupings.csv is missing; see data/README.md"):
        load_dataset("skin7", "grouped", 1, 24)


def test_an_unreadable_folder(tmp_path, data, monkeypatch):  # noqa: F811
    root, listdir = textured(tmp_path / "x"), os.listdir

    def refuse(path):  # permissions do not stop root, so the system is made to refuse
        if str(path) == str(root / "ill"):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(OSError, match=r"ill cannot be read \(Permission denied\); check its permissions"):
        load_dataset(f"folder:{root}")


def test_too_little_memory_is_not_the_files_fault(tmp_path, monkeypatch):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", lambda _: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        open_image(tmp_path / "a.png")


def test_a_full_disk_is_said_before_and_while_decoding(tmp_path, data, monkeypatch):  # noqa: F811
    name = f"folder:{textured(tmp_path / 'x')}"
    with monkeypatch.context() as patch:
        usage = type(shutil.disk_usage(tmp_path))(10**12, 10**12, 10)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(
            OSError, match="No space left .*take 0.000 GB, .*cache has 0.000 GB free. Make room, name"
        ):
            load_dataset(name, "paper", 1, 24)
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    code += f"from deepknn_lib.datasets import load_dataset; load_dataset({name!r}, 'paper', 1, 24)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert "File too large" in done.stderr and "another folder in DEEPKNN_DATA" in done.stderr and resource
    assert not list((data / "cache").iterdir())


def test_decoding_happens_once_and_in_order(tmp_path, data, monkeypatch):  # noqa: F811
    root = tmp_path / "many"
    for c, name in enumerate("ab"):
        (root / name).mkdir(parents=True)
        for number in range(600):
            side = 700 if number % 90 == 0 else 8  # some take longer
            Image.new("RGB", (side, side), (c, number // 256, number % 256)).save(
                root / name / f"{number}.png"
            )
    for _ in range(2):
        found = load_dataset(f"folder:{root}", "paper", 1, 16).train
        numbers = found.images[:, 1, 5, 5].astype(int) * 256 + found.images[:, 2, 9, 2]
        assert [
            f"{'ab'[c]}/{n}.png" for c, n in zip(found.labels, numbers, strict=True)
        ] == found.ids.tolist()
        monkeypatch.setattr(decode, "open_image", lambda _: pytest.fail("decoded again"))


def test_verify_is_quick_with_many_copies(tmp_path, data):  # noqa: F811
    """Nothing may be quadratic in the files."""
    root, copies = textured(tmp_path / "many"), 20_000
    Image.new("L", (16, 16), 90).save(root / "ill" / "0.png")
    for number in range(copies):
        (root / "healthy" / f"n{number}.png").write_bytes((root / "ill" / "0.png").read_bytes())
    before = os.times().user
    found, _ = verify.of_dataset(f"folder:{root}")
    assert (found["check"] == "exact duplicates").sum() == copies and os.times().user - before < 100
    assert pd.unique(found["severity"][found["check"] == "duplicates across classes"]).tolist() == ["error"]
