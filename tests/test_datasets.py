"""Data sets: layouts, splits, digests, and errors that say what to do. All files are made up; nothing is downloaded."""

import io
import os
import re
import shutil
import struct

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image

from deepknn_lib.datasets import (
    CATALOG,
    Rows,
    available,
    dataset_digest,
    decode,
    load,
    load_dataset,
    validation_part,
    verify,
)
from deepknn_lib.datasets.readers import PNEUMONIA_CLASSES
from deepknn_lib.datasets.synthetic import CLASS_NAMES
from deepknn_lib.storage import repository

TASK = "ISIC2018_Task3_Training"
ORDER = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]  # of the official columns


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder of this test's own."""
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def skin7(data):
    """A made-up tree in the official layout: 70 images of 50 lesions, two views of every fifth one."""
    root = data / "skin7"
    for part in ("Input", "GroundTruth"):
        (root / f"{TASK}_{part}").mkdir(parents=True)
    rows = []
    for number in range(70):
        name, kind = f"ISIC_{number:07d}", CLASS_NAMES[number % 7]
        row = {
            "image": name,
            "lesion_id": f"HAM_{number % 7}_{number // 14}",
            "test_fold": number // 7 % 5 + 1,
        }
        rows.append(row | {column: float(column == kind.upper()) for column in ORDER} | {"dx": kind})
        colour = (number, 3 * number, 255 - number)
        Image.new("RGB", (60, 45), colour).save(root / f"{TASK}_Input" / f"{name}.jpg")
    rows = pd.DataFrame(rows)
    rows[["image", *ORDER]].to_csv(root / f"{TASK}_GroundTruth" / f"{TASK}_GroundTruth.csv", index=False)
    rows[["image", "lesion_id"]].to_csv(root / f"{TASK}_LesionGroupings.csv", index=False)
    rows[["image", "test_fold"]].to_csv(root / "folds.csv", index=False)
    return root


def dataverse(skin7, metadata="HAM10000_metadata.csv"):
    """The same images as Harvard Dataverse has them: two folders, one table in another order, other columns."""
    numbers = range(69, -1, -1)
    rows = {
        "lesion_id": [f"HAM_{n % 7}_{n // 14}" for n in numbers],
        "image_id": [f"ISIC_{n:07d}" for n in numbers],
    }
    rows = pd.DataFrame(rows | {"dx": [CLASS_NAMES[n % 7] for n in numbers]})
    rows.to_csv(skin7 / metadata, index=False, sep="\t" if metadata.endswith(".tab") else ",")
    for number, file in enumerate(sorted((skin7 / f"{TASK}_Input").iterdir())):
        part = skin7 / f"HAM10000_images_part_{1 + number // 35}"
        part.mkdir(exist_ok=True)
        file.rename(part / file.name)
    for part in ("Input", "GroundTruth"):
        shutil.rmtree(skin7 / f"{TASK}_{part}")


def folder_set(root, groups=False):
    """Two classes of ten images of one grey each."""
    for c, name in enumerate(("healthy", "ill")):
        (root / name).mkdir(parents=True)
        for number in range(10):
            Image.new("L", (30, 20), 40 + 100 * c + number).save(root / name / f"{number}.png")
    if groups:
        lines = [
            f"{name}/{n}.png,P{c}{n // 2}" for c, name in enumerate(("healthy", "ill")) for n in range(10)
        ]
        (root / "groups.csv").write_text("\n".join(["file,patient_id", *lines]))
    return root


def fake_mnist(data):
    """Files as torchvision unpacks them: 50 training and 20 test images, brightness tells the digit."""
    raw = data / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 50), ("t10k", 20)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = np.repeat(labels * 20, 28 * 28)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes()
        )


def fake_stl10(data):
    folder = data / "stl10" / "stl10_binary"
    folder.mkdir(parents=True)
    for part, n in (("train", 50), ("test", 20)):
        labels = np.arange(n, dtype=np.uint8) % 10
        (folder / f"{part}_y.bin").write_bytes((labels + 1).tobytes())
        (folder / f"{part}_X.bin").write_bytes(np.repeat(labels * 20, 3 * 96 * 96).tobytes())


def fake_medmnist(data, name="bloodmnist_64.npz", size=64, colour=True, classes=8):
    (data / "medmnist").mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, n in (("train", 5 * classes), ("val", 2 * classes), ("test", 3 * classes)):
        labels, shape = np.arange(n) % classes, (n, size, size, 3) if colour else (n, size, size)
        values = np.broadcast_to(20 * labels.reshape(-1, *[1] * (len(shape) - 1)), shape)
        arrays |= {
            f"{part}_images": values.astype(np.uint8),
            f"{part}_labels": labels[:, None].astype(np.uint8),
        }
    np.savez_compressed(data / "medmnist" / name, **arrays)


def dicom(path, stored, photometric="MONOCHROME2", bits=8, jpeg=None, frames=None, **tags):
    """A DICOM file of uint8, uint16 or int16 (H, W), (frames, H, W) or (H, W, 3)."""
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = getattr(
        pydicom.uid, "JPEGBaseline8Bit" if jpeg else "ExplicitVRLittleEndian"
    )
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    colours = stored.ndim == 3 and not frames
    header.Rows, header.Columns = stored.shape[:2] if colours else stored.shape[-2:]
    header.SamplesPerPixel, header.PhotometricInterpretation = (3 if colours else 1), photometric
    tags |= {"PlanarConfiguration": 0} if colours else {"NumberOfFrames": frames} if frames else {}
    header.BitsAllocated, header.BitsStored, header.HighBit = 8 * stored.itemsize, bits, bits - 1
    header.PixelRepresentation = int(stored.dtype.kind == "i")
    for name, value in tags.items():
        setattr(header, name, value)
    header.PixelData = pydicom.encaps.encapsulate([jpeg]) if jpeg else stored.tobytes()
    header["PixelData"].VR = "OB" if stored.itemsize == 1 else "OW"
    header.save_as(path, enforce_file_format=True)
    return path


def rsna(data, patients=30):
    """The layout of Kaggle's archive: a DICOM a patient, a table with a row a box."""
    folder, lines = data / "pneumonia" / "stage_2_train_images", ["patientId,class"]
    folder.mkdir(parents=True)
    for number in range(patients):
        lines += [f"{number:08d}-aa,{PNEUMONIA_CLASSES[number % 3]}"] * (3 if number % 3 == 2 else 1)
        jpeg, grey = io.BytesIO(), np.full((64, 64), 5 * number, np.uint8)
        Image.fromarray(grey).save(jpeg, "JPEG", quality=95)
        dicom(folder / f"{number:08d}-aa.dcm", grey, jpeg=jpeg.getvalue())
    (data / "pneumonia" / "stage_2_detailed_class_info.csv").write_text("\n".join(lines))


def ids_of_all_folds(name):
    return [i for fold in range(1, 6) for i in load_dataset(name, "grouped", fold, 32).test.ids]


def test_lesions_leak_when_split_by_image_and_not_by_lesion():
    by_image, by_lesion = (load_dataset("lesions", split, image_size=32) for split in ("paper", "grouped"))
    shared = np.isin(by_image.test.groups, by_image.train.groups).mean()
    assert 0.25 < shared < 0.5  # 0.37 to 0.39 in the authors' Skin-7 folds
    assert not set(by_lesion.train.groups) & set(by_lesion.test.groups)
    for data in (by_image, by_lesion):
        assert len(data.train) + len(data.test) == 3000 and not set(data.train.ids) & set(data.test.ids)
        assert data.train.images.shape[1:] == (3, 32, 32) and data.train.images.dtype == np.uint8
        assert (
            data.class_names[data.info["smallest"]] == "df"
            and data.info["synthetic"]
            and data.info["grouped"]
        )
    ids = ids_of_all_folds("lesions")
    assert len(ids) == len(set(ids)) == 3000


def test_the_validation_part_is_a_fifth_of_the_training_part():
    for split in ("paper", "grouped"):
        data = load_dataset("lesions", split, image_size=32)
        part = validation_part(data)
        ids = [*part.train.ids, *part.test.ids]
        assert sorted(ids) == sorted(data.train.ids) and abs(len(part.test) / len(data.train) - 0.2) < 0.02
        assert bool(set(part.train.groups) & set(part.test.groups)) == (split == "paper")


def test_skin7_is_read_from_the_official_layout(skin7, capsys):
    load.tell.cache_clear()
    data = load_dataset("skin7", "paper", 2, 24)
    assert (
        data.class_names == CLASS_NAMES
        and not data.info["synthetic"]
        and data.test.images.shape == (14, 3, 24, 24)
    )
    number = int(data.test.ids[3].removeprefix("ISIC_"))
    assert data.test.labels[3] == number % 7 and data.test.groups[3] == f"HAM_{number % 7}_{number // 14}"
    assert abs(int(data.test.images[3][0].mean()) - number) <= 3  # the picture belongs to the label
    grouped = load_dataset("skin7", "grouped", 3, 24)
    assert not set(grouped.train.groups) & set(grouped.test.groups) and available()["skin7"].startswith(
        "there"
    )
    said = capsys.readouterr().out
    assert "CC BY-NC 4.0" in said and "Tschandl" in said and said.count("\n") == 1  # once a process
    written = skin7.parent / "splits" / "skin7-grouped.csv"
    rows, before = pd.read_csv(written).set_index("image"), written.stat().st_mtime_ns
    assert set(rows.index[rows["test_fold"] == 3]) == set(grouped.test.ids) and len(rows) == 70
    first = rows.loc[grouped.test.ids[0]]
    assert [first["group"], first["class"]] == [grouped.test.groups[0], CLASS_NAMES[grouped.test.labels[0]]]
    load_dataset("skin7", "grouped", 2, 24)
    assert written.stat().st_mtime_ns == before  # the same split, so the same file


@pytest.mark.parametrize("metadata", ["HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab"])
def test_skin7_from_dataverse_is_the_same_set_with_the_same_folds(skin7, metadata):
    official = [load_dataset("skin7", split, 1, 24) for split in ("paper", "grouped")]
    digests = [dataset_digest("skin7", split, 1, 24) for split in ("paper", "grouped")]
    dataverse(skin7, metadata)
    other = [load_dataset("skin7", split, 1, 24) for split in ("paper", "grouped")]
    for a, b in zip(official, other, strict=True):
        for part in ("train", "test"):
            for what in ("images", "labels", "ids", "groups"):
                assert np.array_equal(getattr(getattr(a, part), what), getattr(getattr(b, part), what)), what
    assert digests == [dataset_digest("skin7", split, 1, 24) for split in ("paper", "grouped")]


def test_skin7_without_its_authors_folds_has_the_other_split(skin7):
    (skin7 / "folds.csv").unlink()
    with pytest.raises(
        FileNotFoundError, match="download skin7.*DEEPKNN_SKIN7_FOLDS.*or use split='grouped'"
    ):
        load_dataset("skin7", "paper", 1, 24)
    assert len(load_dataset("skin7", "grouped", 1, 24).test)
    assert "there" in available()["skin7"] and "grouped split only" in available()["skin7"]
    found, checks = verify.of_dataset("skin7")
    assert "download skin7" in found.query("check == 'split: paper'")["detail"].item()
    assert "groups across the split: grouped" in set(checks["check"])


def test_class_folders_with_and_without_patients(data, tmp_path):
    name = f"folder:{folder_set(tmp_path / 'a b' / 'x')}"
    plain = load_dataset(name, "paper", 1, 16)
    assert (
        plain.class_names == ("healthy", "ill") and plain.info["title"] == "x" and not plain.info["grouped"]
    )
    wanted = [40 + 100 * c + int(i[-5]) for c, i in zip(plain.train.labels, plain.train.ids, strict=True)]
    assert plain.train.images[:, 0, 0, 0].tolist() == wanted and len(plain.test) == 4
    grouped = load_dataset(f"folder:{folder_set(tmp_path / 'c' / 'x', groups=True)}", "grouped", 1, 16)
    assert not set(grouped.train.groups) & set(grouped.test.groups)
    assert {*grouped.train.groups, *grouped.test.groups} == {f"P{c}{n}" for c in range(2) for n in range(5)}
    load_dataset(name, "grouped", 1, 16)  # of the same name: the other folder's split stays
    assert len(list((data / "splits").glob("folder-x-*-grouped.csv"))) == 2


def test_the_digest_is_of_contents(data, tmp_path):
    root = folder_set(tmp_path / "one", groups=True)
    name = f"folder:{root}"
    first = dataset_digest(name, "grouped", 1, 16)
    assert re.fullmatch("[0-9a-f]{12}", first)
    shutil.copytree(root, tmp_path / "two")
    os.utime(root / "ill" / "3.png", ns=(1, 1))
    assert (
        dataset_digest(name, "grouped", 1, 16)
        == first
        == dataset_digest(f"folder:{tmp_path / 'two'}", "grouped", 1, 16)
    )
    assert len({first, *(dataset_digest(name, "grouped", *more) for more in ((2, 16), (1, 17)))}) == 3
    Image.new("L", (30, 20), 7).save(root / "ill" / "3.png")  # replaced in place
    second = dataset_digest(name, "grouped", 1, 16)
    groups = (root / "groups.csv").read_text()
    (root / "groups.csv").write_text(groups.replace("ill/3.png,P11", "ill/3.png,P10"))
    assert len({first, second, dataset_digest(name, "grouped", 1, 16)}) == 3


@pytest.mark.parametrize("inside", ["", "images"])
def test_sd198_is_class_folders_with_its_own_split_files(data, inside):
    folder_set(data / "sd198" / inside)
    plain = load_dataset("sd198", "paper", 2, 16)
    assert plain.info["title"] == "SD-198, 2 of its 198 classes" and "request" in plain.info["licence"]
    if not inside:
        return
    files = sorted([*plain.train.ids.tolist(), *plain.test.ids.tolist()])
    (data / "sd198" / "8_2_split").mkdir()
    for fold in range(2):
        for part, chosen in (
            ("train", [f for n, f in enumerate(files) if n % 5 != fold]),
            ("val", files[fold::5]),
        ):
            lines = "".join(f"{file} 0\n" for file in chosen)
            (data / "sd198" / "8_2_split" / f"{part}_{fold + 1}.txt").write_text(lines)
    for part, file in (("train", files[0]), ("val", files[1])):  # of a selection of classes
        (data / "sd198" / "8_2_split" / f"{part}_9.txt").write_text(f"{file} 0\n")
    own = load_dataset("sd198", "paper", 2, 16)
    assert own.test.ids.tolist() == files[1::5] != plain.test.ids.tolist() and len(own.train) == 16
    with pytest.raises(ValueError, match="make 2 folds, and there is no fold 3"):
        load_dataset("sd198", "paper", 3, 16)
    with open(data / "sd198" / "8_2_split" / "val_1.txt", "a") as file:
        file.write(f"{files[1]} 0\n")
    with pytest.raises(ValueError, match=f"name {files[1]} twice in fold 1"):
        load_dataset("sd198", "paper", 1, 16)


def test_chestxray3_keeps_patients_together_and_is_called_a_stand_in(data):
    root = folder_set(data / "chestxray3", groups=True)
    found = load_dataset("chestxray3", "grouped", 1, 16)
    assert not set(found.train.groups) & set(found.test.groups) and "stand-in" in found.info["title"]
    (root / "groups.csv").unlink()  # without patients its split by group would leak and not say so
    with pytest.raises(FileNotFoundError, match="groups.csv with the columns file,patient_id"):
        load_dataset("chestxray3", "grouped", 1, 16)


def test_pneumonia_is_read_from_kaggles_layout_with_one_row_a_patient(data):
    rsna(data)
    found = load_dataset("pneumonia", "grouped", 1, 16)
    assert len(found.train) + len(found.test) == 30 and found.class_names == PNEUMONIA_CLASSES
    for name, label, image in zip(found.test.ids, found.test.labels, found.test.images, strict=True):
        assert label == int(name[:8]) % 3 and abs(int(image.mean()) - 5 * int(name[:8])) <= 2
    table = data / "pneumonia" / "stage_2_detailed_class_info.csv"
    table.write_text(table.read_text() + "\n00000000-aa,Lung Opacity")
    with pytest.raises(ValueError, match="duplicate id: 00000000-aa"):
        load_dataset("pneumonia", "grouped", 1, 16)


def test_digits_are_real_scans_that_need_no_download():
    data = load_dataset("digits", "paper", 1, 32)
    assert data.train.images.shape[1:] == (1, 32, 32) and data.class_names == tuple("0123456789")
    assert len(data.train) + len(data.test) == 1797 and data.train.labels.dtype == np.int64
    from sklearn.datasets import load_digits

    shrunk = data.test.images.reshape(-1, 8, 4, 8, 4).mean((2, 4))
    scan = load_digits().images[int(data.test.ids[0])] * 255 / 16  # the picture belongs to the id
    assert (
        np.corrcoef(shrunk[0].ravel(), scan.ravel())[0, 1] > 0.9
        and "stand-in for MNIST" in data.info["title"]
    )


@pytest.mark.parametrize(
    ("name", "make", "channels", "sizes"),
    [
        ("mnist", fake_mnist, 1, (50, 20, 10)),
        ("stl10", fake_stl10, 3, (50, 20, 10)),
        ("medmnist:bloodmnist@64", fake_medmnist, 3, (56, 24, 8)),
        (
            "medmnist:pneumoniamnist",
            lambda d: fake_medmnist(d, "pneumoniamnist.npz", 28, False, 2),
            1,
            (14, 6, 2),
        ),
        (
            "medmnist:retinamnist@28",
            lambda d: fake_medmnist(d, "retinamnist.npz", 28, True, 5),
            3,
            (35, 15, 5),
        ),
    ],
)
def test_official_parts_are_the_paper_split_and_grouped_has_five_folds(
    data, monkeypatch, name, make, channels, sizes
):
    monkeypatch.setattr("torchvision.datasets.STL10._check_integrity", lambda self: True)  # of the real files
    make(data)
    found = load_dataset(name, "paper", 1, 16)
    assert (len(found.train), len(found.test), len(found.class_names)) == sizes
    for part in (found.train, found.test):
        assert part.images.shape[1:] == (channels, 16, 16)
        assert (part.images == 20 * part.labels[:, None, None, None]).all()
    assert all(i.startswith("test/") for i in found.test.ids) and found.info["licence"]
    with pytest.raises(ValueError, match=f"{name} has one official test part.*not 2.*split='grouped'"):
        load_dataset(name, "paper", 2, 16)
    ids = ids_of_all_folds(name)
    assert len(ids) == len(set(ids)) == sum(sizes[:2])
    file = max(
        (p for p in data.joinpath(name.split(":")[0]).rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(
        ValueError, match=f"cannot be read in .*Remove what is broken there and run .*download {name}"
    ):
        load_dataset(name, "paper", 1, 24)


def test_ready_made_parts_are_the_paper_split(data, tmp_path):
    root = tmp_path / "xray"
    for part, numbers in (("train", range(6)), ("val", range(6, 8)), ("TEST", range(8, 12))):
        for c, name in enumerate(("healthy", "ill")):
            (root / part / name).mkdir(parents=True)
            for number in numbers:
                Image.new("L", (20, 20), 40 + 100 * c + number).save(root / part / name / f"{number}.png")
    found = load_dataset(f"folder:{root}", "paper", 1, 16)
    assert found.class_names == ("healthy", "ill") and (len(found.train), len(found.test)) == (16, 8)
    assert {i.split("/")[0] for i in found.test.ids} == {"TEST"}
    assert len(set(ids_of_all_folds(f"folder:{root}"))) == 24
    for name in ("train", "test"):  # classes may have these names
        shutil.copytree(root / "train" / "ill", tmp_path / "s" / name)
    assert load_dataset(f"folder:{tmp_path / 's'}", "paper", 1, 16).class_names == ("test", "train")


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("imagenet",), ValueError, "choose one of lesions, skin7, .*folder:<path to class folders>"),
        (("folder",), ValueError, "unknown data set 'folder'; choose one of lesions"),
        (("digits:8",), ValueError, "unknown data set 'digits:8'; choose one of lesions"),
        (("medmnist:pathmnist@32",), ValueError, "the sizes are 28, 64, 128 and 224"),
        (("medmnist:chestmnist",), ValueError, "2-D sets with one label an image: pathmnist, dermamnist"),
        (("medmnist:organmnist3d@28",), ValueError, "2-D sets with one label an image"),
        (("lesions", "random"), ValueError, "split is one of"),
        (("lesions", "paper", 6), ValueError, "fold one of 1..5"),
        (("lesions", "paper", 1, 8), ValueError, "at least 16 pixels"),
        (("folder:/no/such/folder",), FileNotFoundError, "there is no folder"),
        (
            ("skin7",),
            FileNotFoundError,
            "download skin7` .2.8 GB.. By hand: get the three Task 3.*skin7.*data/README.md",
        ),
        (("sd198",), FileNotFoundError, "By hand: ask its authors for it.*images/ holds the class folders"),
        (("chestxray3",), FileNotFoundError, "put the class folders bacteria, normal and virus there"),
        (("pneumonia",), FileNotFoundError, "download pneumonia.*your Kaggle account.*accept its rules"),
        (("medmnist:bloodmnist@64",), FileNotFoundError, "download medmnist:bloodmnist@64.*get the .npz"),
        (
            ("mnist",),
            FileNotFoundError,
            "download mnist` .12 MB.. By hand: put the four .gz files .*MNIST/raw",
        ),
        (("stl10",), FileNotFoundError, "download stl10` .2.6 GB.. By hand: put stl10_binary.tar.gz there"),
    ],
)
def test_what_cannot_be_loaded_says_why_and_touches_no_network(data, monkeypatch, arguments, error, said):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("used the network"))
    with pytest.raises(error, match=said) as caught:
        load_dataset(*arguments)
    assert "\n" not in str(caught.value) and not data.exists()
    assert error is ValueError or ":" in arguments[0] or available()[arguments[0]].startswith("not there: ")


def test_folds_are_stratified_repeatable_and_fast_for_many_images(monkeypatch, tmp_path, data):
    labels = np.repeat([0, 1, 2], [500, 53, 7])
    folds = load.image_folds(labels)
    for c in range(3):
        counts = np.bincount(folds[labels == c], minlength=6)[1:]
        assert counts.max() - counts.min() <= 1
    assert np.array_equal(folds, load.image_folds(labels))
    monkeypatch.setattr(load, "group_folds", lambda *_: pytest.fail("too slow for 100,000 groups"))
    monkeypatch.setattr(load, "MANY", 19)
    name = f"folder:{folder_set(tmp_path / 'many')}"
    assert set(load.folds_of(name, load.index_of(name), "grouped")) == {1, 2, 3, 4, 5}


def test_the_catalogue_says_what_a_user_must_know():
    for name, entry in CATALOG.items():
        assert (
            entry.title and entry.licence and entry.citation and (entry.page or name in ("lesions", "folder"))
        ), name
        assert not entry.remotes or entry.size, name
        for remote in entry.remotes:  # known by a checksum, or by what they say once they are read
            assert re.fullmatch(r"md5:[0-9a-f]{32}", remote["checksum"] or "") or "paper" in entry.pins, (
                remote
            )
        assert all(re.fullmatch("[0-9a-f]{64}", pin) for pin in entry.pins.values()), name
    guide = (repository() / "data" / "README.md").read_text(encoding="utf-8")
    assert all(re.search(rf"^\| `{name}[`:]", guide, re.M) for name in CATALOG)
    published = pd.read_csv(repository() / "data" / "paper" / "table1.csv").set_index("dataset")
    for name, theirs in (("skin7", "Skin-7"), ("pneumonia", "Pneumonia")):
        sizes = CATALOG[name].counts.values()
        assert [min(sizes), max(sizes)] == published.loc[theirs, ["smallest_class", "largest_class"]].tolist()


def test_contents_that_are_not_the_pinned_ones_are_told(skin7, monkeypatch):
    index = load.index_of("skin7")
    ours = verify.fingerprint(index.ids, np.array(CLASS_NAMES)[index.labels])
    assert ours == verify.fingerprint(
        index.ids[::-1], np.array(CLASS_NAMES)[index.labels[::-1]]
    )  # in any order
    monkeypatch.setattr(CATALOG["skin7"], "counts", {})
    monkeypatch.setattr(CATALOG["skin7"], "pins", {"labels": ours, "groups": "0" * 64})
    found, _ = verify.of_dataset("skin7")
    assert found[found["check"] == "pinned contents"]["item"].tolist() == ["groups"] and not verify.failed(
        found
    )


def test_parts_too_large_for_memory_stay_on_disk_and_hold_the_same(monkeypatch):
    whole = load_dataset("digits", "grouped", 1, 32).train
    monkeypatch.setattr(decode, "memory_limit", lambda: 0)
    rows = load_dataset("digits", "grouped", 1, 32).train
    assert isinstance(rows.images, Rows) and type(whole.images) is np.ndarray
    assert (rows.images.shape, rows.images.dtype, len(rows.images)) == (
        whole.images.shape,
        np.uint8,
        len(whole),
    )
    assert np.array_equal(np.asarray(rows.images), whole.images)
    for key in (
        5,
        -1,
        slice(3, 9, 2),
        np.array([3, 0, 7, 7, -1]),
        np.arange(len(whole)) % 3 == 0,
        np.array([], int),
    ):
        assert type(rows.images[key]) is np.ndarray and np.array_equal(rows.images[key], whole.images[key])
        part = rows.take(np.atleast_1d(np.arange(len(whole))[key]))
        assert isinstance(part.images, Rows) or not len(part)
        assert np.array_equal(part.images[:], whole.images[np.atleast_1d(np.arange(len(whole))[key])])
        assert np.array_equal(part.ids, whole.ids[np.atleast_1d(np.arange(len(whole))[key])])
    rows.images[:3][:] = 0
    assert np.array_equal(rows.images[:3], whole.images[:3])  # what comes out are copies
    with pytest.raises(IndexError):
        rows.images[len(whole)]


def test_memory_limit_is_half_of_the_machine(monkeypatch):
    assert 2**28 < decode.memory_limit() < 2**44
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert decode.memory_limit() == 4 * 10**9
