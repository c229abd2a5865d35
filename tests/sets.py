"""Made-up data sets in the layouts that the readers know, and the error that a call must end with."""

import io
import json
import shutil
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
PNEUMONIA_CLASSES = tuple(CATALOG["pneumonia"].counts)
# what is refused, and what is said then: layout, file, what is done to it (its text as Latin-1), message
REFUSED = json.loads(Path(__file__).with_name("bad_input.json").read_text(encoding="utf-8"))
ORDER = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]  # of the official columns
# of each image its id, class, lesion and fold
SKIN7 = [(f"ISIC_{n:07d}", CLASS_NAMES[n % 7], f"HAM_{n % 7}_{n // 14}", n // 7 % 5 + 1) for n in range(70)]


def refused(said, call, *args, error=(ValueError, OSError)):
    """The message of the error that the call ends with, which is one line and matches `said`."""
    with pytest.raises(error, match=said) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def challenge(root, task, rows):
    """Images and one-hot classes as a part of the challenge has them; the colour tells which image it is."""
    for part in ("Input", "GroundTruth"):
        (root / f"{task}_{part}").mkdir(parents=True)
    for name, n in zip(rows["image"], rows["image"].str[5:].astype(int), strict=True):
        Image.new("RGB", (60, 45), (n, 2 * n, 255 - n)).save(root / f"{task}_Input" / f"{name}.jpg")
    truth = rows[["image"]].assign(**{name: (rows["dx"] == name.lower()) * 1.0 for name in ORDER})
    truth.to_csv(root / f"{task}_GroundTruth" / f"{task}_GroundTruth.csv", index=False)


def skin7_test(root):
    """Fourteen images of the challenge's test part."""
    rows = [(f"ISIC_{n:07d}", CLASS_NAMES[n % 7]) for n in range(90, 104)]
    challenge(root, "ISIC2018_Task3_Test", pd.DataFrame(rows, columns=["image", "dx"]))


def skin7(data):
    """The official layout: 70 images of 35 lesions, two views of each."""
    root, rows = data / "skin7", pd.DataFrame(SKIN7, columns=["image", "dx", "lesion_id", "test_fold"])
    challenge(root, TASK, rows)
    rows[["image", "lesion_id"]].to_csv(root / f"{TASK}_LesionGroupings.csv", index=False)
    rows[["image", "test_fold"]].to_csv(root / "folds.csv", index=False)
    return root


def dataverse(data, metadata="HAM10000_metadata.csv"):
    """The same images as Harvard Dataverse has them: two folders, one table in another order, other columns."""
    root = data / "skin7" if (data / "skin7").exists() else skin7(data)
    rows = pd.DataFrame([(lesion, name, dx) for name, dx, lesion, _ in reversed(SKIN7)])
    separator = "\t" if metadata.endswith(".tab") else ","
    rows.to_csv(root / metadata, index=False, sep=separator, header=["lesion_id", "image_id", "dx"])
    first, second = (root / f"HAM10000_images_part_{part}" for part in (1, 2))
    (root / f"{TASK}_Input").rename(first)
    second.mkdir()
    for name, *_ in SKIN7[35:]:
        (first / f"{name}.jpg").rename(second / f"{name}.jpg")
    shutil.rmtree(root / f"{TASK}_GroundTruth")
    return root


def class_folders(root, numbers=range(10), groups=False):
    """Two classes of noise around a grey that `grey` tells from the file's name; two images of each patient."""
    rng, lines = np.random.default_rng(0), ["file,patient_id"]
    for c, name in enumerate(("healthy", "ill")):
        (root / name).mkdir(parents=True)
        for n in numbers:
            noise = rng.integers(-15, 16, (48, 48)) + grey(f"{name}/{n}.png")
            Image.fromarray(noise.astype(np.uint8)).save(root / name / f"{n}.png")
            lines.append(f"{name}/{n}.png,P{c}{n // 2}")
    if groups:
        (root / "groups.csv").write_text("\n".join([*lines, ""]))
    return root


def labels(root):
    """The same without class folders: `labels.csv` above images/, named in several ways; its column tells patients."""
    (root / "images" / "deep").mkdir(parents=True)
    lines = ["image,label,patient"]
    for path in sorted(root.glob("*/*.png")):
        n, new = int(path.stem), f"{path.parent.name}_{path.stem}"
        path.rename(root / "images" / ("deep" if n % 2 else ".") / f"{new}.png")
        named = (f"images/{new}.png", f"deep/{new}.png", f"{new}.png", new)[n % 4]
        lines.append(f"{named},{path.parent.name},P{new[0]}{n // 2}")
        (root / "labels.csv").write_text("\n".join([*lines, ""]))
    for name in ("healthy", "ill"):
        (root / name).rmdir()
    return root


def parts(root):
    """The same as Training/ and Testing/ beside what an archive of a Mac holds."""
    for n, path in enumerate(sorted(root.glob("*/*.png"))):
        target = root / ("Training", "Testing")[n % 2] / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    (root / "__MACOSX").mkdir()
    for name in ("healthy", "ill"):
        (root / name / "._0.png").write_bytes(b"of a Mac")
        (root / name).rename(root / "__MACOSX" / name)
    return root


def grey(file):
    return 20 + 120 * ("ill" in file) + 8 * int(file.split("/")[-1][:-4])


def mnist(data):
    """Files as torchvision unpacks them: 50 training and 20 test images, brightness tells the digit."""
    (raw := data / "mnist" / "MNIST" / "raw").mkdir(parents=True)
    for part, n in (("train", 50), ("t10k", 20)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = struct.pack(">IIII", 2051, n, 28, 28) + np.repeat(labels * 20, 28 * 28).tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)


def stl10(data):
    (folder := data / "stl10" / "stl10_binary").mkdir(parents=True)
    for part, n in (("train", 50), ("test", 20)):
        labels = np.arange(n, dtype=np.uint8) % 10
        (folder / f"{part}_y.bin").write_bytes((labels + 1).tobytes())
        (folder / f"{part}_X.bin").write_bytes(np.repeat(labels * 20, 3 * 96 * 96).tobytes())


def medmnist(data, file="bloodmnist_64.npz", shape=(64, 64, 3), classes=8):
    (data / "medmnist").mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, n in (("train", 5 * classes), ("val", 2 * classes), ("test", 3 * classes)):
        labels = np.arange(n, dtype=np.uint8)[:, None] % classes
        images = np.repeat(labels * 20, np.prod(shape)).reshape(n, *shape)
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    np.savez_compressed(data / "medmnist" / file, **arrays)
    return data / "medmnist"


def saved(image, kind="TIFF", **options):
    """The bytes of the file that Pillow writes."""
    image.save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()


def dicom(stored, photometric="MONOCHROME2", bits=8, jpeg=None, **tags):
    """The bytes of a DICOM file of uint8, uint16 or int16 (H, W), (frames, H, W) or (H, W, 3)."""
    header, file = pydicom.Dataset(), io.BytesIO()
    header.set_pixel_data(stored, "RGB" if photometric == "RGB" else "MONOCHROME2", bits)
    header.PhotometricInterpretation = photometric
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
    (folder := data / "pneumonia" / "stage_2_train_images").mkdir(parents=True)
    lines = ["patientId,class"]
    for n in range(30):
        lines += [f"{n:08d}-aa,{PNEUMONIA_CLASSES[n % 3]}"] * (3 if n % 3 == 2 else 1)
        image = np.full((64, 64), 5 * n, np.uint8)
        jpeg = saved(Image.fromarray(image), "JPEG", quality=95)
        (folder / f"{n:08d}-aa.dcm").write_bytes(dicom(image, jpeg=jpeg))
    (folder.parent / "stage_2_detailed_class_info.csv").write_text("\n".join([*lines, ""]))
    return folder.parent
