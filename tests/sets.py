"""Made-up data sets in the layouts that the readers know, and the error that a call must end with."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image

from deepknn_lib.datasets import CATALOG
from deepknn_lib.datasets.synthetic import CLASS_NAMES

TASK = "ISIC2018_Task3_Training"
# what is refused, and what is said then: layout, file, what is done to it (its text as Latin-1), message
REFUSED = json.loads(Path(__file__).with_name("bad_input.json").read_text(encoding="utf-8"))
SKIN7 = [(f"ISIC_{n:07d}", CLASS_NAMES[n % 7], f"HAM_{n % 7}_{n // 14}", n // 7 % 5 + 1) for n in range(70)]
ROWS = pd.DataFrame(SKIN7, columns=["image", "dx", "lesion_id", "test_fold"])


def refused(said, call, *args, error=(ValueError, OSError)):
    """The message of the error that the call ends with, which is one line and matches `said`."""
    with pytest.raises(error, match=said) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def put(path, content):
    """A file of bytes, text, lines, a table or pixels; its folders are made, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, pd.DataFrame):
        content.to_csv(path, index=False, sep="\t" if path.suffix == ".tab" else ",")
    elif isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    else:
        path.write_text(content if isinstance(content, str) else "\n".join([*content, ""]))


def pictures(folder, ids):
    """An image for each id, whose colour tells which one it is."""
    for name in ids:
        n = int(name[5:])
        put(folder / f"{name}.jpg", np.full((45, 60, 3), (n, 2 * n, 255 - n), np.uint8))


def skin7(data):
    """The official layout: 70 images of 35 lesions, two views of each, and 14 images of the challenge's test part."""
    root, tested = data / "skin7", [(f"ISIC_{n:07d}", CLASS_NAMES[n % 7]) for n in range(90, 104)]
    for task, rows in ((TASK, ROWS), ("ISIC2018_Task3_Test", pd.DataFrame(tested, columns=["image", "dx"]))):
        pictures(root / f"{task}_Input", rows["image"])
        truth = rows[["image"]].assign(**{name.upper(): (rows["dx"] == name) * 1.0 for name in CLASS_NAMES})
        put(root / f"{task}_GroundTruth" / f"{task}_GroundTruth.csv", truth)
    put(root / f"{TASK}_LesionGroupings.csv", ROWS[["image", "lesion_id"]])
    put(root / "folds.csv", ROWS[["image", "test_fold"]])
    return root


def dataverse(data, metadata="HAM10000_metadata.csv"):
    """The same images as Harvard Dataverse has them: two folders, one table in another order, other columns."""
    root = data / "skin7"
    pictures(root / "HAM10000_images_part_1", ROWS["image"][:35])
    pictures(root / "HAM10000_images_part_2", ROWS["image"][35:])
    put(root / metadata, ROWS[::-1].rename(columns={"image": "image_id"})[["lesion_id", "image_id", "dx"]])
    put(root / "folds.csv", ROWS[["image", "test_fold"]])
    return root


def class_folders(root, numbers=range(10), groups=False):
    """Two classes of noise around a grey that `grey` tells from the file's name; two images of each patient."""
    rng, lines = np.random.default_rng(0), ["file,patient_id"]
    for c, name in enumerate(("healthy", "ill")):
        for n in numbers:
            noise = rng.integers(-15, 16, (48, 48)) + grey(f"{name}/{n}.png")
            put(root / name / f"{n}.png", noise.astype(np.uint8))
            lines.append(f"{name}/{n}.png,P{c}{n // 2}")
    if groups:
        put(root / "groups.csv", lines)
    return root


def grey(file):
    return 20 + 120 * ("ill" in file) + 8 * int(file.split("/")[-1][:-4])


def move(root, pattern, target):
    """Every file of the pattern to the target, a text with `{c}` for its folder and `{n}` for its name."""
    for path in sorted(root.glob(pattern)):
        new = root / target.format(path.stem, c=path.parent.name, n=path.stem)
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)


def labels(root):
    """The same without class folders: `labels.csv` above images/, named in several ways; its column tells patients."""
    lines = ["image,label,patient"]
    for name in ("healthy", "ill"):
        for n in range(10):
            image = ("images/{}.png", "deep/{}.png", "{}.png", "{}")[n % 4].format(f"{name}_{n}")
            lines.append(f"{image},{name},P{name[0]}{n // 2}")
    put(root / "labels.csv", lines)
    move(root, "*/*[02468].png", "images/{c}_{n}.png")
    move(root, "*/*[13579].png", "images/deep/{c}_{n}.png")
    return root


def parts(root):
    """The same as Training/ and Testing/ beside what an archive of a Mac holds."""
    move(root, "*/*[02468].png", "Training/{c}/{n}.png")
    move(root, "*/*[13579].png", "Testing/{c}/{n}.png")
    put(root / "__MACOSX" / "ill" / "._0.png", b"of a Mac")
    return root


def mnist(data):
    """Files as torchvision unpacks them: 50 training and 20 test images, brightness tells the digit."""
    for part, n in (("train", 50), ("t10k", 20)):
        digits, raw = np.arange(n, dtype=np.uint8) % 10, data / "mnist" / "MNIST" / "raw"
        images = struct.pack(">IIII", 2051, n, 28, 28) + np.repeat(digits * 20, 28 * 28).tobytes()
        put(raw / f"{part}-labels-idx1-ubyte", struct.pack(">II", 2049, n) + digits.tobytes())
        put(raw / f"{part}-images-idx3-ubyte", images)


def stl10(data):
    for part, n in (("train", 50), ("test", 20)):
        kinds, folder = np.arange(n, dtype=np.uint8) % 10, data / "stl10" / "stl10_binary"
        put(folder / f"{part}_y.bin", (kinds + 1).tobytes())
        put(folder / f"{part}_X.bin", np.repeat(kinds * 20, 3 * 96 * 96).tobytes())


def medmnist(data, file="bloodmnist_64.npz", shape=(64, 64, 3), classes=8):
    arrays = {}
    for part, n in (("train", 5 * classes), ("val", 2 * classes), ("test", 3 * classes)):
        kinds = arrays[f"{part}_labels"] = np.arange(n, dtype=np.uint8)[:, None] % classes
        arrays[f"{part}_images"] = np.repeat(kinds * 20, np.prod(shape)).reshape(n, *shape)
    np.savez_compressed(stream := io.BytesIO(), **arrays)
    put(data / "medmnist" / file, stream.getvalue())
    return data / "medmnist"


def saved(image, kind="TIFF", **options):
    """The bytes of the file that Pillow writes."""
    image.save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()


def dicom(stored, bits=8, jpeg=None, **tags):
    """The bytes of a DICOM file of uint8, uint16 or int16 (H, W), (frames, H, W) or (H, W, 3)."""
    header, file = pydicom.Dataset(), io.BytesIO()
    header.set_pixel_data(stored, "RGB" if stored.shape[-1] == 3 else "MONOCHROME2", bits)
    header.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    if jpeg:
        header.PixelData = pydicom.encaps.encapsulate([jpeg])
        header.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    for name, value in tags.items():
        setattr(header, name, value)
    header.save_as(file, enforce_file_format=True)
    return file.getvalue()


def pneumonia(data):
    """The layout of Kaggle's archive: a DICOM for each of 30 patients, a table with a row a box."""
    root, lines, names = data / "pneumonia", ["patientId,class"], [*CATALOG["pneumonia"].counts]
    for n in range(30):
        lines += [f"{n:08d}-aa,{names[n % 3]}"] * (3 if n % 3 == 2 else 1)
        image = np.full((64, 64), 5 * n, np.uint8)
        jpeg = saved(Image.fromarray(image), "JPEG", quality=95)
        put(root / "stage_2_train_images" / f"{n:08d}-aa.dcm", dicom(image, jpeg=jpeg))
    put(root / "stage_2_detailed_class_info.csv", lines)
    return root
