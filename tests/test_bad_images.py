"""Images of every kind become upright 8-bit RGB; bad input is an error that names file, reason and remedy."""

import re
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sets
from PIL import Image, ImageCms, PngImagePlugin
from sets import class_folders, dicom, put, refused, saved

from deepknn_lib.datasets import decode, load_dataset, verify
from deepknn_lib.datasets.decode import open_image, resize


def tiff(values, bits=12):
    """The bytes of a TIFF whose greys are packed into 12 bits each, and say so."""
    bits_of_all = "".join(f"{value:0{bits}b}" for value in values.ravel())
    packed, (height, width) = int(bits_of_all, 2).to_bytes(len(bits_of_all) // 8, "big"), values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", 9) + entries + bytes(4)


RNG = np.random.default_rng(0)
NOISE, ALPHA = RNG.integers(0, 256, (30, 40, 3), np.uint8), np.tile(np.uint8([0, 255, 100, 200]), (30, 10))
CLEAR, SHADED = (Image.fromarray(np.dstack([part, ALPHA])) for part in (NOISE[..., 0], NOISE))
OVER_WHITE = NOISE[..., :1] * (ALPHA / 255)[..., None] + 255 - ALPHA[..., None]
BLOCKS = RNG.integers(0, 256, (2, 3, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)  # JPEG keeps flat blocks
DEEP = np.array([0, 128, 129, 255, 256, 32768, 65535, *RNG.integers(0, 65536, 41)], np.uint16).reshape(6, 8)
LOW, SIXTEEN = DEEP >> 4, np.rint(DEEP / 257)[..., None]
RANGED, TWELVE_BITS = np.clip((LOW[..., None] - 1000.0) / 2000, 0, 1) * 255, LOW[..., None] / 4095 * 255
COLOURED, FLAT, UPRIGHT = Image.fromarray(NOISE), Image.fromarray(BLOCKS), np.rot90(BLOCKS, -1)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
IGNORED = {"icc_profile": PROFILE, "exif": b"Exif\0\0MM\0*garbage"}
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (9, 7), "blue")]}
KEY, TURNED, MEANT = tuple(NOISE[3, 4].tolist()), Image.Exif(), PngImagePlugin.PngInfo()
TURNED[274] = 6
MEANT.add(b"sBIT", bytes([12]))
# what is saved (or its bytes), under which name and options; the pixels that are wanted; by how much they may differ
GOOD = {
    "alpha": (CLEAR, "a.png", {}, OVER_WHITE, 1), "profile, broken EXIF": (COLOURED, "a.png", IGNORED, NOISE, 0),
    "colours and alpha": (SHADED, "a.png", {}, NOISE * (ALPHA / 255)[..., None] + 255 - ALPHA[..., None], 1),
    "CMYK": (Image.new("CMYK", (16, 16), (40, 90, 10, 60)), "a.jpg", {"quality": 100}, [164.4, 126.2, 187.4], 3),
    "key": (COLOURED, "a.png", {"transparency": KEY}, np.where((NOISE == KEY).all(-1)[..., None], 255, NOISE), 0),
    "big end first": (Image.frombytes("I;16B", (8, 6), DEEP.astype(">u2").tobytes()), "a.tif", {}, SIXTEEN, 0),
    "12 upper bits of 16": (Image.fromarray(LOW * 16), "a.png", {"pnginfo": MEANT}, LOW[..., None] * 16 / 257, 0.51),
    "12 lower bits of 16": (Image.fromarray(LOW), "a.png", {"pnginfo": MEANT}, TWELVE_BITS, 0.51),
    "TIFF of 12 bits": (tiff(LOW), "a.tif", {}, TWELVE_BITS, 0.51),
    "PNG's word in TIFF": (Image.fromarray(DEEP), "a.tif", {"description": "sBIT\x05"}, SIXTEEN, 0),
    "a range in TIFF": (Image.fromarray(LOW), "a.tif", {"tiffinfo": {340: 1000.0, 341: 3000.0}}, RANGED, 0.51),
    "first frame": (Image.new("RGB", (9, 7), "red"), "a.gif", FRAMES, [255, 0, 0], 0),
    "turned": (FLAT, "Ångström ß 皮膚 .JPG", {"exif": TURNED, "quality": 100, "subsampling": 0}, UPRIGHT, 3),
    "turned, 16 bits": (Image.fromarray(DEEP), "a.png", {"exif": TURNED}, np.rot90(SIXTEEN, -1), 0),
    # Pillow itself turns a TIFF while loading it.
    "turned TIFF": (FLAT, "a.tif", {"compression": "raw", "tiffinfo": {274: 6}}, UPRIGHT, 0),
    "turned TIFF, LZW": (FLAT, "a.tif", {"compression": "tiff_lzw", "tiffinfo": {274: 6}}, UPRIGHT, 0),
}  # fmt: skip
RAMP, TWELVE = np.arange(256, dtype=np.uint8).reshape(8, 32), np.arange(0, 4096, 16, np.uint16).reshape(8, 32)
SIGNED = (TWELVE.astype(np.int32) * 16 - 32768).astype(np.int16)
RESCALED = {"bits": 12, "RescaleSlope": "2", "RescaleIntercept": "-1024"}
HOUNSFIELD = RESCALED | {"WindowCenter": ["40", "9"], "WindowWidth": ["400", "9"]}
WINDOWED = np.clip((TWELVE * 2.0 - 1024 - 39.5) / 399 + 0.5, 0, 1) * 255  # DICOM PS3.3 C.11.2.1.2
DICOM = {
    "first frame": (np.stack([RAMP, RAMP[::-1], RAMP * 0]), {}, RAMP),
    "colours, without window": (NOISE, {"WindowCenter": "40", "WindowWidth": "9"}, NOISE),
    "rescaled": (TWELVE, RESCALED, TWELVE / 4095 * 255),
    "slope below 0": (TWELVE, RESCALED | {"RescaleSlope": "-1"}, 255 - TWELVE / 4095 * 255),
    "signed": (SIGNED, {"bits": 16}, (SIGNED.astype(float) + 32768) / 257),
    "window, inverted": (TWELVE, HOUNSFIELD | {"PhotometricInterpretation": "MONOCHROME1"}, 255 - WINDOWED),
}  # fmt: skip
for case, (stored, tags, wanted) in DICOM.items():
    GOOD[f"DICOM: {case}"] = dicom(stored, **tags), "any name", {}, np.atleast_3d(wanted), 0.51


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(("image", "name", "options", "wanted", "off"), GOOD.values(), ids=list(GOOD))
def test_every_kind_of_image_becomes_upright_rgb(tmp_path, image, name, options, wanted, off):
    path = tmp_path / name
    path.write_bytes(image) if isinstance(image, bytes) else image.save(path, **options)
    found = open_image(path)
    assert found.mode == "RGB" and np.abs(np.asarray(found).astype(int) - wanted).max() <= off


@pytest.mark.parametrize("size", [16, 256])
def test_squashed_images_are_as_pillow_has_them(tmp_path, size):
    """Committed results rest on Pillow's pixels; ours may be 1 of 255 off, in one value of a hundred."""
    y, x = np.mgrid[:450, :600]
    photo = Image.fromarray(np.dstack([x * 255 // 600, y * 255 // 450, (x * y) % 256]).astype(np.uint8))
    photo.save(tmp_path / "a.jpg", progressive=True, quality=60)
    Image.new("RGB", (1, 3000), (10, 20, 30)).save(tmp_path / "b.png")
    for path in tmp_path.iterdir():
        theirs = np.asarray(Image.open(path).resize((size, size), Image.Resampling.BILINEAR)).astype(int)
        ours = resize(np.asarray(open_image(path)).transpose(2, 0, 1)[None], size)[0].transpose(1, 2, 0)
        assert np.abs(ours - theirs).max() <= 1 and np.abs(ours - theirs).mean() < 0.01, path.name


MADE = {
    **{f"cut {kind}": saved(COLOURED, kind)[:1200] for kind in ("JPEG", "PNG", "TIFF")},
    "cut DICOM": dicom(RAMP)[:-100], "DICOM with a palette": dicom(RAMP, PhotometricInterpretation="PALETTE COLOR"),
    "fractions": saved(Image.fromarray(np.float32([[0, 0.5, 1]]))),
    "over 16 bits": saved(Image.fromarray(np.int32([[70000, 5]]))), "noise": saved(COLOURED),
    "negative numbers": saved(Image.fromarray(np.int32([[-1, 5]]))),
    "zero is white": saved(Image.fromarray(DEEP), tiffinfo={262: 0}),
}  # fmt: skip


def harm(root, pattern, content):
    """Puts a text, an image, a link or arrays there; replaces a text (a pair) or the end; moves or removes it."""
    for path in [*root.glob(pattern)] or [root / pattern]:
        if content == "remove":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif isinstance(content, list):
            assert content[0] in path.read_text()
            put(path, path.read_text().replace(*content, 1))
        elif "to" in content:
            path.rename(root / content["to"])
        elif shapes := content.get("arrays"):  # an array without a shape is left out
            arrays = {name: array for name, array in np.load(path).items() if shapes.get(name, [0])}
            resized = {name: np.resize(arrays[name], shape) for name, shape in shapes.items() if shape}
            np.savez(path, **arrays | resized)
        elif member := content.get("zeroed"):  # a part of an archive
            whole, start = path.read_bytes(), zipfile.ZipFile(path).getinfo(member).header_offset + 200
            put(path, whole[:start] + bytes(20) + whole[start + 20 :])
        elif end := content.get("end"):
            put(path, path.read_bytes()[: -len(end)] + end.encode())
        elif "link" in content:
            path.symlink_to(content["link"])
        else:
            put(path, content["text"].encode("latin-1") if "text" in content else MADE[content["made"]])


@pytest.mark.parametrize("case", [*sets.REFUSED["verify lists it"], *sets.REFUSED["verify refuses, too"]])
def test_bad_input_is_refused_and_verify_finds_it(data, case):
    listed = sets.REFUSED["verify lists it"]
    layout, path, content, said = (listed | sets.REFUSED["verify refuses, too"])[case]
    root, split = data.parent / "my images é", "paper" if layout in ("skin7", "medmnist") else "grouped"
    name = {"dataverse": "skin7", "medmnist": "medmnist:bloodmnist@64"}.get(layout, layout)
    if layout in ("folder", "patients", "labels", "parts", "high"):
        class_folders(root / ("archive" * (layout == "high")), groups=layout == "patients")
        name = f"folder:{root}"
    if make := getattr(sets, layout, None):
        root = make(root if layout in ("labels", "parts") else data)
    harm(root, path, content)
    refused(said, load_dataset, name, split, 1, 24)
    assert not list((data / "cache").glob("*.uint8"))  # nothing half made
    if case in listed:
        assert "error" in {*verify.of_dataset(name)[0]["severity"]}
    else:
        refused(said, verify.of_dataset, name)


def test_too_little_memory_and_a_full_disk_are_not_the_files_fault(data, monkeypatch):
    root = class_folders(data / "x")
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    code += f"from deepknn_lib.datasets import load_dataset; load_dataset('folder:{root}', 'paper', 1, 24)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "File too large" in done.stderr and "name another folder in DEEPKNN_DATA" in done.stderr
    assert [path.suffix for path in (data / "cache").iterdir()] == [".lock"]
    monkeypatch.setattr(Image, "open", lambda _: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        open_image(root / "ill" / "3.png")


def test_decoding_happens_once_and_in_order_also_for_two_at_a_time(data, monkeypatch):
    name, opened = f"folder:{data / 'many [2]'}", []
    for n in range(600):  # more than a block; some take longer
        pixels = np.full((700, 700, 3) if n % 90 == 0 else (8, 8, 3), (0, n // 256, n % 256), np.uint8)
        put(data / "many [2]" / "ab"[n // 300] / f"{n}.png", pixels)
    monkeypatch.setattr(decode, "open_image", lambda *how: opened.append(how) or open_image(*how))
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: load_dataset(name, "paper", 1, 16).train, range(2)):
            numbers = found.images[:, 1, 5, 5].astype(int) * 256 + found.images[:, 2, 9, 2]
            assert [f"{'ab'[n // 300]}/{n}.png" for n in numbers] == found.ids.tolist()
    assert len(opened) == 600
    (made,) = (data / "cache").glob("*.uint8")
    made.rename(made.with_name(f".{made.name}.{'0' * 32}.tmp.uint8"))  # as a killed process leaves it
    load_dataset(name, "paper", 1, 16)
    assert sorted((data / "cache").iterdir()) == [made.with_name(f".{made.name}.lock"), made]


def test_deep_greys_are_scaled_by_the_bits_that_their_set_uses(data):
    root = class_folders(data / "deep")
    wanted = load_dataset(f"folder:{root}", "paper", 1, 48).train.images.astype(int)
    for bits, factor in (("8", 1), ("12", 16), ("16", 257)):
        for path in root.glob("*/*.png"):
            pixels = np.asarray(Image.open(path)).astype(np.uint16) * np.uint16(factor)
            put(data / bits / path.relative_to(root), pixels)
        found = load_dataset(f"folder:{data / bits}", "paper", 1, 48).train.images
        assert np.abs(found - wanted).max() <= (bits == "12"), bits  # 4095 is not 16 times 255
    table = verify.of_dataset(f"folder:{data / '12'}")[0].set_index("check")["detail"]
    assert re.match("20 images of 16 bits use values up to 3[0-9]{3}; 4095 is", table["range of values"])


@pytest.mark.parametrize(("keep", "zeros", "named"), [(None, 9999, True), (-9, 0, True), (-4, 0, False)])
def test_a_damaged_copy_is_named_set_aside_and_made_again(data, keep, zeros, named):
    name = f"folder:{class_folders(data / 'x', groups=True)}"
    before = load_dataset(name, "grouped", 1, 24)
    (path,) = (data / "cache").glob("*.uint8")
    whole = path.read_bytes()
    path.write_bytes((bytes(zeros) + whole[zeros:])[:keep])
    with warnings.catch_warnings(record=True) as said:
        assert np.array_equal(load_dataset(name, "grouped", 1, 24).train.images, before.train.images)
    assert path.read_bytes() == whole and len([*path.parent.glob(f".damaged-{path.name}-*")]) == named
    # A copy that lacks four bytes is one of an earlier version.
    assert ["is not whole (its checksum" in str(one.message) for one in said] == [True] * named
