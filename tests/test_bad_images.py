# ruff: noqa: F811 (fixtures)
"""Images of every kind become upright 8-bit RGB; bad input is an error that names file, reason and remedy."""

import io
import os
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pydicom
import pytest
import sets
from PIL import Image, ImageCms, ImageOps
from sets import class_folders, data, dicom, refused  # noqa: F401

from deepknn_lib.datasets import decode, load_dataset, verify
from deepknn_lib.datasets.decode import open_image, resize
from deepknn_lib.datasets.readers import Index


def png(width, height, depth, colour, rows):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    parts = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def over_white(colours, alpha):
    return colours * (alpha / 255)[..., None] + 255 - alpha[..., None]


def window(values, centre, width):
    """DICOM PS3.3 C.11.2.1.2."""
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1) * 255


def lut(depth):
    table = pydicom.Dataset()
    table.LUTDescriptor, table["LUTDescriptor"].VR = [4096, 0, depth], "US"
    table.add_new("LUTData", "US", (4095 - np.arange(4096)).tolist())
    return [table]


RNG = np.random.default_rng(0)
NOISE, ALPHA = RNG.integers(0, 256, (30, 40, 3), np.uint8), np.tile(np.uint8([0, 255, 100, 200]), (30, 10))
BLOCKS = RNG.integers(0, 256, (2, 3, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)  # JPEG keeps flat blocks
DEEP = np.array([0, 128, 129, 255, 256, 32768, 65535, *RNG.integers(0, 65536, 41)], np.uint16).reshape(6, 8)
GREY, SIXTEEN, SHORT = NOISE[..., 0], np.rint(DEEP / 257)[..., None], DEEP.reshape(4, 4, 3).astype(">u2")
SHORT_PNG = png(4, 4, 16, 2, b"".join(b"\0" + row.tobytes() for row in SHORT))
COLOURED, CLEAR = Image.fromarray(NOISE), Image.fromarray(np.dstack([NOISE, ALPHA]))
FOUR, INDEXED = NOISE[0, :4], Image.frombytes("P", (40, 30), (GREY % 4).tobytes())
INDEXED.putpalette(FOUR.ravel().tolist())
FLAT, SRGB, LAB = COLOURED.convert("L").convert("RGB"), *map(ImageCms.createProfile, ("sRGB", "LAB"))
PROFILE, RED = ImageCms.ImageCmsProfile(LAB).tobytes(), Image.new("RGB", (9, 7), "red")
SEVERAL = {"save_all": True, "append_images": [Image.new("RGB", (9, 7), "blue")]}
INKS, KEY = [(255 - ink) * (255 - 60) / 255 for ink in (40, 90, 10)], tuple(NOISE[3, 4].tolist())
# what is saved (or its bytes), under which name and options; the pixels that are wanted; by how much they may differ
GOOD = {
    "grey": (Image.fromarray(GREY), "a.png", {}, GREY[..., None], 0),
    "bilevel": (Image.fromarray(GREY > 127), "a.tif", {}, (GREY > 127)[..., None] * 255, 0),
    "palette": (INDEXED, "a.gif", {}, FOUR[GREY % 4], 0),
    "one clear": (INDEXED, "a.png", {"transparency": 2}, np.where(GREY[..., None] % 4 == 2, 255, FOUR[GREY % 4]), 0),
    "grey and alpha": (Image.fromarray(np.dstack([GREY, ALPHA])), "a.png", {}, over_white(NOISE[..., :1], ALPHA), 1),
    "alpha": (CLEAR, "a.png", {}, over_white(NOISE, ALPHA), 1),
    "alpha of TIFF": (CLEAR, "a.tif", {}, over_white(NOISE, ALPHA), 1),
    "key": (COLOURED, "a.png", {"transparency": KEY}, np.where((NOISE == KEY).all(-1)[..., None], 255, NOISE), 0),
    "CMYK": (Image.new("CMYK", (16, 16), (40, 90, 10, 60)), "a.jpg", {"quality": 100}, INKS, 3),
    "YCbCr": (Image.fromarray(BLOCKS).convert("YCbCr"), "a.tif", {"compression": "jpeg", "quality": 100}, BLOCKS, 3),
    "LAB": (ImageCms.profileToProfile(FLAT, SRGB, LAB, outputMode="LAB"), "a.tif", {}, np.asarray(FLAT), 4),
    "16 bits": (Image.fromarray(DEEP), "a.png", {}, SIXTEEN, 0),
    "big end first": (Image.frombytes("I;16B", (8, 6), DEEP.astype(">u2").tobytes()), "a.tif", {}, SIXTEEN, 0),
    "16 of 32 bits": (Image.fromarray(DEEP.astype(np.int32)), "a.tif", {}, SIXTEEN, 0),
    "16 bits of colour": (SHORT_PNG, "a.png", {}, SHORT / 257, 1),
    "zero is white": (Image.fromarray(DEEP), "a.tif", {"tiffinfo": {262: 0}}, 255 - SIXTEEN, 0),
    "first frame": (RED, "a.gif", SEVERAL, [255, 0, 0], 0),
    "first page": (RED, "a.tif", SEVERAL, [255, 0, 0], 0),
    "an ICC profile": (COLOURED, "a.png", {"icc_profile": PROFILE}, NOISE, 0),
    "broken EXIF": (COLOURED, "a.png", {"exif": b"Exif\0\0MM\0*garbage"}, NOISE, 0),
    "any name": (COLOURED, "Ångström ß 皮膚 .PNG", {}, NOISE, 0),
}  # fmt: skip
UPRIGHT = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip
for turn, upright in UPRIGHT.items():
    exif, flat, wanted = Image.Exif(), Image.fromarray(BLOCKS), upright(BLOCKS)
    exif[274] = turn
    GOOD[f"JPEG {turn}"] = flat, "a.jpg", {"exif": exif, "quality": 100, "subsampling": 0}, wanted, 3
    GOOD[f"PNG {turn}"] = flat, "a.png", {"exif": exif}, wanted, 0
    GOOD[f"WebP {turn}"] = flat, "a.webp", {"exif": exif, "lossless": True}, wanted, 0
    GOOD[f"16 bits {turn}"] = Image.fromarray(DEEP), "a.png", {"exif": exif}, upright(SIXTEEN), 0
    for how in ("raw", "tiff_lzw"):  # Pillow itself turns a TIFF while loading it
        GOOD[f"TIFF {how} {turn}"] = flat, "a.tif", {"compression": how, "tiffinfo": {274: turn}}, wanted, 0
RAMP, TWELVE = np.arange(256, dtype=np.uint8).reshape(8, 32), np.arange(0, 4096, 16, np.uint16).reshape(8, 32)
SIGNED, INVERTED = (TWELVE.astype(np.int32) * 16 - 32768).astype(np.int16), {"photometric": "MONOCHROME1"}
COLOURS, PALETTE = RNG.integers(0, 65536, (3, 256)).astype(np.uint16), {"photometric": "PALETTE COLOR"}
for colour, values in zip(("Red", "Green", "Blue"), COLOURS, strict=True):
    PALETTE[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
    PALETTE[f"{colour}PaletteColorLookupTableData"] = values.tobytes()
BITS, WINDOW = {"bits": 12}, {"bits": 12, "WindowCenter": "1500", "WindowWidth": "800"}
RESCALED = BITS | {"RescaleSlope": "2", "RescaleIntercept": "-1024"}
HOUNSFIELD = RESCALED | {"WindowCenter": ["40", "9"], "WindowWidth": ["400", "9"]}
DICOM = {
    "8 bits": (RAMP, {}, RAMP),
    "inverted": (RAMP, INVERTED, 255 - RAMP),
    "first frame": (np.stack([RAMP, RAMP[::-1], RAMP * 0]), {}, RAMP),
    "12 bits": (TWELVE, BITS, TWELVE / 4095 * 255),
    "signed": (SIGNED, {"bits": 16}, (SIGNED.astype(float) + 32768) / 257),
    "window": (TWELVE, WINDOW, window(TWELVE, 1500, 800)),
    "window, inverted": (TWELVE, WINDOW | INVERTED, 255 - window(TWELVE, 1500, 800)),
    "rescaled window": (TWELVE, HOUNSFIELD, window(TWELVE * 2.0 - 1024, 40, 400)),
    "rescaled": (TWELVE, RESCALED, TWELVE / 4095 * 255),
    "window as table": (TWELVE, BITS | {"VOILUTSequence": lut(12)}, (4095 - TWELVE) / 4095 * 255),
    "values as table": (TWELVE, BITS | {"ModalityLUTSequence": lut(16)}, (4095 - TWELVE) / 65535 * 255),
    "colours": (NOISE, {"photometric": "RGB"}, NOISE),
    "palette": (RAMP, PALETTE, COLOURS[:, RAMP].transpose(1, 2, 0) / 257),
}
for case, (stored, tags, wanted) in DICOM.items():
    for name in ("a.dcm", "no suffix", "named.png"):
        GOOD[f"DICOM: {case}, {name}"] = dicom(stored, **tags), name, {}, np.atleast_3d(wanted), 0.51


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(("image", "name", "options", "wanted", "off"), GOOD.values(), ids=list(GOOD))
def test_every_kind_of_image_becomes_upright_rgb(tmp_path, image, name, options, wanted, off):
    path = tmp_path / name
    path.write_bytes(image) if isinstance(image, bytes) else image.save(path, **options)
    found = open_image(path)
    assert found.mode == "RGB" and np.abs(np.asarray(found).astype(int) - wanted).max() <= off


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
        theirs = np.asarray(upright.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
        ours = resize(np.asarray(open_image(path)).transpose(2, 0, 1)[None], size)[0].transpose(1, 2, 0)
        assert np.abs(ours - theirs).max() <= 1 and np.abs(ours - theirs).mean() < 0.01, path.name


def cut(share, kind):
    COLOURED.save(stream := io.BytesIO(), kind)
    return stream.getvalue()[: int(len(stream.getvalue()) * share)]


def harm(root, pattern, content):
    """Puts bytes, pixels or a link (a text) there; replaces one text by another (a pair); or removes it (None)."""
    for path in [*root.glob(pattern)] or [root / pattern]:
        path.parent.mkdir(exist_ok=True)
        if content is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif isinstance(content, tuple):
            assert content[0] in path.read_text()
            path.write_text(path.read_text().replace(*content, 1))
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content) if isinstance(content, bytes) else Image.fromarray(content).save(path)


PAGE, HAM, TRUTH, GROUPS, FOLDS = b"<html>404", "HAM*.csv", "*/*GroundTruth.csv", "groups.csv", "folds.csv"
FRACTIONS, LARGE, NEGATIVE = np.float32([[0, 0.5, 1]]), np.int32([[70000, 5]]), np.int32([[-1, 5]])
BOMB, NO_CLASS = png(60_000, 60_000, 8, 2, b"\0"), "unknown class: ISIC.* as 'no or several classes'"
# of a good set which file, and what is done to it; what loading says; `verify` lists these errors
BAD = {
    "cut JPEG": ("folder", "ill/x.jpg", cut(2 / 3, "JPEG"), "x.jpg is cut off.*download it again"),
    "stub of a JPEG": ("folder", "ill/x.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF", "x.jpg is cut off"),
    "cut PNG": ("folder", "ill/x.png", cut(0.5, "PNG"), "x.png is cut off"),
    "cut TIFF": ("folder", "ill/x.tif", cut(0.5, "TIFF"), "x.tif is cut off"),
    "cut DICOM": ("folder", "ill/x.dcm", dicom(RAMP)[:-100], "x.dcm is cut off"),
    "zero bytes": ("folder", "ill/3.png", b"", r"3.png is empty \(0 bytes\): copy or download it again"),
    "text called .jpg": ("folder", "ill/x.jpg", b"I am no image", "x.jpg is not an image, it begins with b'I am no i"),
    "a page called .png": ("folder", "ill/3.png", PAGE, "3.png is not an image, it begins with b'<html>"),
    "a page called .dcm": ("folder", "ill/x.dcm", PAGE * 20, "x.dcm is not an image.*<html>"),
    "noise called .bmp": ("folder", "ill/x.bmp", bytes(range(200, 256)) * 4, "x.bmp is not an image"),
    "bomb": ("folder", "ill/3.png", BOMB, "3.png holds more pixels than Pillow allows: shrink it"),
    "fractions": ("folder", "ill/x.tif", FRACTIONS, "x.tif holds numbers from 0 to 1, not whole.*convert it to 8 or"),
    "over 16 bits": ("folder", "ill/x.tif", LARGE, "numbers from 5 to 70000, not whole ones from 0 to 65535"),
    "negative numbers": ("folder", "ill/x.tif", NEGATIVE, "numbers from -1 to 5"),
    "a folder called .png": ("folder", "ill/y.png/.x", b"", "y.png cannot be opened .*Is a directory"),
    "a broken link": ("folder", "ill/z.png", "gone", "z.png cannot be opened .No such file"),
    "one image in a class": ("folder", "rare/1.png", NOISE, "class 'rare' has 1 images; five folds need 5"),
    "an empty class": ("folder", "rare/.x", b"", "empty class: rare has no images.*add some or remove"),
    "a group, no image": ("patients", GROUPS, ("ill/9.", "ill/99.png,P1\nill/9."), "row without image: ill/99"),
    "no group row": ("patients", GROUPS, ("ill/3.png,P11\n", ""), "image without row: ill/3.png.*add a row"),
    "no group": ("patients", GROUPS, ("ill/3.png,P11", "ill/3.png,"), "no group: ill/3.png.*give it one"),
    "two groups": ("patients", GROUPS, ("ill/4", "ill/3.png,P9\nill/4"), "duplicate id: ill/3.png.*keep one of its"),
    "a row without image": ("dataverse", "*/*07.jpg", None, "row without image: ISIC_0000007"),
    "an image without row": ("dataverse", "HAM10000_images_part_1/ISIC_9.jpg", NOISE, "image without row: ISIC_9 "),
    "an unknown class": ("dataverse", HAM, (",nv", ",naevus"), "unknown class: .*as 'naevus'; the classes are akiec"),
    "a doubled id": ("dataverse", HAM, ("dx\n", "dx\nHAM_0_0,ISIC_0000007,akiec\n"), "duplicate id: ISIC_0000007"),
    "a row cut short": ("dataverse", HAM, ("ISIC_0000008,bcc", "ISIC_0000008"), "unknown class: ISIC_0000008"),
    "no lesion": ("dataverse", HAM, ("HAM_0_0,", ","), "no group: ISIC"),
    "two classes": ("skin7", TRUTH, ("0.0,1.0", "1.0,1.0"), NO_CLASS),
    "no class": ("skin7", TRUTH, ("0.0,1.0", "0.0,0.0"), NO_CLASS),
    "twice a class": ("skin7", TRUTH, ("0.0,1.0", "0.0,2.0"), NO_CLASS),
    "an empty lesion": ("skin7", "*Groupings.csv", ("HAM_0_0", ""), "no group: ISIC_0000000"),
    "two folds": ("skin7", FOLDS, ("0000001,", "0000000,"), "line 3: 'ISIC_0000000' is there again; correct or remove"),
    "fold 7": ("skin7", FOLDS, ("0000001,1", "0000001,7"), "line 3: 'ISIC_0000001' has test_fold '7',.* not 1..5"),
    "other folds": ("skin7", FOLDS, ("ISIC_0000001", "x"), "no fold to 1 images, .* ISIC_0000001; is it this set's"),
    "two boxes": ("pneumonia", "*.csv", ("class\n", "class\n00000000-aa,Lung Opacity\n"), "duplicate id: 00000000-aa"),
}  # fmt: skip
FATAL = {  # here `verify` says the same, and nothing else
    "an empty folder": ("folder", "*", None, "each of at least 2 classes; it has 0"),
    "one class": ("folder", "ill", None, "at least 2 classes; it has 1"),
    "a table without file": ("patients", GROUPS, ("file", "name"), "groups.csv needs the columns file"),
    "a table without groups": ("patients", GROUPS, b"file\nx", "groups.csv needs the column file and one more"),
    "another encoding": ("patients", GROUPS, b"file,p\n\xff\xfe,", "save it as CSV in UTF-8"),
    "an empty table": ("patients", GROUPS, b"", "groups.csv cannot be read as a table"),
    "a missing column": ("dataverse", HAM, ("dx", "diagnosis"), "csv needs the columns image_id, dx, lesion_id"),
    "a missing table": ("skin7", "*Groupings.csv", None, "Groupings.csv is missing; see data/README.md"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD | FATAL)
def test_bad_input_is_refused_and_verify_finds_it(data, case):
    layout, path, content, said = (BAD | FATAL)[case]
    name, split = {"dataverse": "skin7"}.get(layout, layout), "paper" if layout == "skin7" else "grouped"
    if layout in ("folder", "patients"):
        root = class_folders(data.parent / "my images é", groups=layout == "patients")
        name = f"folder:{root}"
    else:
        root = getattr(sets, layout)(data)
    harm(root, path, content)
    refused(said, load_dataset, name, split, 1, 24)
    assert not list((data / "cache").glob("*"))  # nothing half made
    if case in FATAL:
        refused(said, verify.of_dataset, name)
    else:
        assert verify.failed(verify.of_dataset(name)[0])


def test_all_bad_files_are_tried_and_verify_lists_them(data):
    root = class_folders(data / "a b")
    assert verify.of_dataset(f"folder:{root}")[0].empty
    harm(root, "healthy/[0-6].png", b"")
    said = r"7 of 20 images.*0.png.*1.png.*2.png.*verify 'folder:.*a b'` lists all"
    refused(said, load_dataset, f"folder:{root}", "paper", 1, 24)
    found, _ = verify.of_dataset(f"folder:{root}")
    assert found["item"].tolist() == [f"healthy/{n}.png" for n in range(7)]


def test_an_unreadable_folder_and_too_little_memory(data, monkeypatch):
    root, listdir = class_folders(data / "x"), os.listdir
    with monkeypatch.context() as patch:  # permissions do not stop root; a path that is no folder does
        patch.setattr(os, "listdir", lambda path: listdir(__file__ if str(path).endswith("/ill") else path))
        refused(
            r"ill cannot be read \(Not a directory\); check its permissions", load_dataset, f"folder:{root}"
        )
    monkeypatch.setattr(Image, "open", lambda _: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):  # which is not the file's fault
        open_image(root / "ill" / "3.png")


def test_a_full_disk_is_said_before_and_while_decoding(data, monkeypatch):
    name, usage = f"folder:{class_folders(data / 'x')}", type(shutil.disk_usage("/"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10))
        said = "No space left .*take 0.000 GB, .*cache has 0.000 GB free. Make room, name"
        refused(said, load_dataset, name, "paper", 1, 24, error=OSError)
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    code += f"from deepknn_lib.datasets import load_dataset; load_dataset({name!r}, 'paper', 1, 24)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "File too large" in done.stderr and "another folder in DEEPKNN_DATA" in done.stderr
    assert not list((data / "cache").iterdir())


def test_decoding_happens_once_and_in_order(data, monkeypatch):
    for n in range(600):  # more than a block; some take longer
        (path := data / "many" / "ab"[n // 300] / f"{n}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (700, 700) if n % 90 == 0 else (8, 8), (0, n // 256, n % 256)).save(path)
    for _ in range(2):
        found = load_dataset(f"folder:{data / 'many'}", "paper", 1, 16).train
        numbers = found.images[:, 1, 5, 5].astype(int) * 256 + found.images[:, 2, 9, 2]
        assert [f"{'ab'[n // 300]}/{n}.png" for n in numbers] == found.ids.tolist()
        monkeypatch.setattr(decode, "open_image", lambda _: pytest.fail("decoded again"))


def test_verify_is_quick_with_many_copies(tmp_path):
    """Nothing may be quadratic in the files."""
    Image.new("L", (16, 16), 90).save(tmp_path / "a.png")
    before, ids, labels = os.times().user, np.arange(5000).astype(str), np.arange(5000) // 2500
    found = verify.verify(Index(labels, ids, ids, ("a", "b"), [tmp_path / "a.png"] * 5000), {}, {})
    assert (found["check"] == "exact duplicates").sum() == 4999 and os.times().user - before < 25
