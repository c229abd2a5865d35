"""Data sets: layouts, splits, and errors that say what to do. All files are made up here; nothing is downloaded."""

import struct
import subprocess
import sys
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from deepknn_lib import splits
from deepknn_lib.datasets import DATASETS, available, load_dataset
from deepknn_lib.sources import SKIN7_CLASSES, decode


@pytest.fixture
def skin7(tmp_path, monkeypatch):
    """A made-up tree in the official layout: 70 images of 50 lesions, two views of every fifth one."""
    root = tmp_path / "data" / "skin7"
    (root / "ISIC2018_Task3_Training_Input").mkdir(parents=True)
    (root / "ISIC2018_Task3_Training_GroundTruth").mkdir()
    truth = ["image,MEL,NV,BCC,AKIEC,BKL,DF,VASC"]
    groups, folds = ["image,lesion_id,diagnosis_confirm_type"], ["image,test_fold"]
    for number in range(70):
        name, lesion = f"ISIC_{number:07d}", f"HAM_{number % 7}_{number // 14}"
        one_hot = ["0.0"] * 7
        one_hot[["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"].index(SKIN7_CLASSES[number % 7].upper())] = "1.0"
        truth.append(",".join([name, *one_hot]))
        groups.append(f"{name},{lesion},histopathology")
        folds.append(f"{name},{number // 7 % 5 + 1}")
        Image.new("RGB", (60, 45), (number, 3 * number, 255 - number)).save(
            root / "ISIC2018_Task3_Training_Input" / f"{name}.jpg"
        )
    (root / "ISIC2018_Task3_Training_GroundTruth" / "ISIC2018_Task3_Training_GroundTruth.csv").write_text("\n".join(truth))
    (root / "ISIC2018_Task3_Training_LesionGroupings.csv").write_text("\n".join(groups))
    (tmp_path / "folds.csv").write_text("\n".join(folds))
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DEEPKNN_SKIN7_FOLDS", str(tmp_path / "folds.csv"))
    return root


def test_lesions_leak_when_split_by_image_and_not_by_lesion():
    by_image, by_lesion = load_dataset("lesions", "paper", image_size=32), load_dataset("lesions", "grouped", image_size=32)
    shared = np.isin(by_image.test.groups, by_image.train.groups).mean()
    assert 0.25 < shared < 0.5  # 0.37 to 0.39 in the authors' Skin-7 folds
    assert not set(by_lesion.train.groups) & set(by_lesion.test.groups)
    for data in (by_image, by_lesion):
        assert len(data.train) + len(data.test) == 3000 and not set(data.train.ids) & set(data.test.ids)
        assert data.train.images.shape[1:] == (3, 32, 32) and data.train.images.dtype == np.uint8
        assert set(data.test.labels) == set(range(7)) and data.class_names[data.info["smallest"]] == "df"
        assert data.info["synthetic"]


def test_five_folds_test_every_image_once():
    tested = np.concatenate([load_dataset("lesions", "grouped", fold, 32).test.ids for fold in range(1, 6)])
    assert len(tested) == len(set(tested)) == 3000


def test_skin7_is_read_from_the_official_layout(skin7):
    data = load_dataset("skin7", "paper", 2, 24)
    assert data.class_names == SKIN7_CLASSES and not data.info["synthetic"]
    assert len(data.test) == 14 and data.test.images.shape == (14, 3, 24, 24)
    number = int(data.test.ids[3].removeprefix("ISIC_"))
    assert data.test.labels[3] == number % 7 and data.test.groups[3] == f"HAM_{number % 7}_{number // 14}"
    assert abs(int(data.test.images[3][0].mean()) - number) <= 3  # the picture belongs to the label
    assert "there" in available()["skin7"]
    grouped = load_dataset("skin7", "grouped", 1, 24)
    assert not set(grouped.train.groups) & set(grouped.test.groups)


def test_skin7_that_is_not_there_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="Unpack the three ISIC 2018 Task 3 training downloads"):
        load_dataset("skin7")
    assert available()["skin7"].startswith("not there")


def test_skin7_without_folds_points_to_the_other_split(skin7, monkeypatch):
    monkeypatch.delenv("DEEPKNN_SKIN7_FOLDS")
    with pytest.raises(FileNotFoundError, match="DEEPKNN_SKIN7_FOLDS.*or use split='grouped'"):
        load_dataset("skin7", "paper", 1, 24)
    assert len(load_dataset("skin7", "grouped", 1, 24).test)


@pytest.mark.parametrize("harm, said", [
    (lambda r: (r / "ISIC2018_Task3_Training_Input" / "ISIC_0000007.jpg").unlink(), "1 of 70 images are missing"),
    (lambda r: (r / "ISIC2018_Task3_Training_Input" / "ISIC_0000007.jpg").write_bytes(b""), "ISIC_0000007.jpg"),
    (lambda r: (r / "ISIC2018_Task3_Training_Input" / "ISIC_0000007.jpg").write_text("no image"), "cannot be read"),
    (lambda r: (r / "ISIC2018_Task3_Training_LesionGroupings.csv").write_text("image,lesion_id\n"), "no lesion for 70"),
    (lambda r: (r / "ISIC2018_Task3_Training_LesionGroupings.csv").unlink(), "is missing"),
    (lambda r: next(r.glob("*/*.csv")).write_text("image,NV\nx,1\n"), "needs the columns"),
])  # fmt: skip
def test_a_broken_skin7_names_the_file_and_leaves_nothing(skin7, harm, said):
    harm(skin7)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        load_dataset("skin7", "grouped", 1, 24)
    assert not list(skin7.parent.glob("cache/*"))


@pytest.mark.parametrize("line, said", [
    ("ISIC_0000000,2", "names an image again"),
    ("ISIC_0009999,7", "test_fold '7'"),
])  # fmt: skip
def test_a_wrong_fold_file_names_the_line(skin7, tmp_path, line, said):
    with open(tmp_path / "folds.csv", "a") as file:
        file.write("\n" + line)
    with pytest.raises(ValueError, match=f"line 72.*{said}"):
        load_dataset("skin7", "paper", 1, 24)


def test_a_fold_file_of_another_set_is_refused(skin7, tmp_path):
    (tmp_path / "folds.csv").write_text("image,test_fold\nother,1\n")
    with pytest.raises(ValueError, match="gives no fold to 70 images"):
        load_dataset("skin7", "paper", 1, 24)


def folder_set(root, groups=None):
    for c, name in enumerate(("healthy", "ill")):
        (root / name).mkdir(parents=True)
        for number in range(10):
            Image.new("L", (30, 20), 40 + 100 * c).save(root / name / f"{number}.png")
    if groups:
        both = enumerate(("healthy", "ill"))
        lines = [f"{name}/{number}.png,P{c}{number // 2}" for c, name in both for number in range(10)]
        (root / "groups.csv").write_text("\n".join(["file,patient_id", *lines]))
    return root


def test_anyones_class_folders_with_and_without_patients(tmp_path):
    plain = load_dataset(f"folder:{folder_set(tmp_path / 'a b' / 'plain')}", "paper", 1, 16)
    assert plain.class_names == ("healthy", "ill") and len(plain.test) == 4 and plain.train.images.shape[1:] == (3, 16, 16)
    assert set(plain.test.images[plain.test.labels == 1].flat) == {140}
    grouped = load_dataset(f"folder:{folder_set(tmp_path / 'patients', groups=True)}", "grouped", 1, 16)
    assert not set(grouped.train.groups) & set(grouped.test.groups)
    assert set(grouped.train.groups) | set(grouped.test.groups) == {f"P{c}{n}" for c in range(2) for n in range(5)}


@pytest.mark.parametrize("arguments, error, said", [
    (("imagenet",), ValueError, "choose lesions, skin7, sd198, chestxray3, stl10, mnist, digits or folder:<path"),
    (("folder",), ValueError, "unknown data set 'folder'; choose lesions"),
    (("digits:8",), ValueError, "unknown data set 'digits:8'; choose lesions"),
    (("lesions", "random"), ValueError, "split is one of"),
    (("lesions", "paper", 6), ValueError, "fold one of 1..5"),
    (("lesions", "paper", 1, 8), ValueError, "at least 16 pixels"),
    (("folder:/no/such/folder",), FileNotFoundError, "there is no folder"),
])  # fmt: skip
def test_what_cannot_be_meant_is_an_error(arguments, error, said):
    with pytest.raises(error, match=said):
        load_dataset(*arguments)


@pytest.mark.parametrize("inside", ["", "images"])
def test_sd198_is_class_folders_and_says_how_many_are_there(tmp_path, monkeypatch, inside):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    folder_set(tmp_path / "sd198" / inside)
    data = load_dataset("sd198", "grouped", 1, 16)
    assert data.class_names == ("healthy", "ill") and data.info["title"] == "SD-198, 2 of its 198 classes"
    assert "request" in data.info["licence"] and "ECCV 2016" in data.info["citation"] and not data.info["synthetic"]
    assert available()["sd198"].startswith("there: ")


def test_chestxray3_keeps_patients_together_and_is_called_a_stand_in(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    root = folder_set(tmp_path / "chestxray3", groups=True)
    data = load_dataset("chestxray3", "grouped", 1, 16)
    assert not set(data.train.groups) & set(data.test.groups) and len(data.train) + len(data.test) == 20
    assert "stand-in" in data.info["title"] and "RSNA" not in data.info["title"] and data.info["licence"] == "CC BY 4.0"
    (root / "groups.csv").unlink()  # without patients its split by group would leak and not say so
    with pytest.raises(FileNotFoundError, match="groups.csv with the columns file,patient_id"):
        load_dataset("chestxray3", "grouped", 1, 16)


@pytest.mark.parametrize("name, said", [
    ("sd198", "by request.*Put its class folders there"),
    ("chestxray3", "Put the class folders bacteria, normal and virus there"),
])  # fmt: skip
def test_a_set_that_is_not_there_says_what_to_put_where(tmp_path, monkeypatch, name, said):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / name}.*{said}.*data/README.md"):
        load_dataset(name)
    assert available()[name].startswith("not there: ")


def test_digits_are_real_scans_that_need_no_download():
    data = load_dataset("digits", "paper", 1, 32)
    assert data.train.images.shape[1:] == (1, 32, 32) and data.train.images.dtype == np.uint8
    assert len(data.train) + len(data.test) == 1797 and data.class_names == tuple("0123456789")
    assert data.train.images.max() > 240 and data.train.labels.dtype == np.int64
    assert "stand-in for MNIST" in data.info["title"] and not data.info["synthetic"]
    shrunk = data.test.images.reshape(-1, 8, 4, 8, 4).mean((2, 4))
    from sklearn.datasets import load_digits

    scan = load_digits().images[int(data.test.ids[0])] * 255 / 16  # the picture belongs to the id
    assert np.corrcoef(shrunk[0].ravel(), scan.ravel())[0, 1] > 0.9


def fake_mnist(root):
    """Files as torchvision unpacks them: 50 training and 20 test images, brightness tells the digit."""
    raw = root / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 50), ("t10k", 20)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = np.repeat(labels * 20, 28 * 28)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())


def fake_stl10(root):
    """Files as torchvision unpacks them: 50 training and 20 test images, brightness tells the class."""
    folder = root / "stl10" / "stl10_binary"
    folder.mkdir(parents=True)
    for part, n in (("train", 50), ("test", 20)):
        labels = np.arange(n, dtype=np.uint8) % 10
        (folder / f"{part}_y.bin").write_bytes((labels + 1).tobytes())
        (folder / f"{part}_X.bin").write_bytes(np.repeat(labels * 20, 3 * 96 * 96).tobytes())


@pytest.mark.parametrize("name, channels", [("mnist", 1), ("stl10", 3)])
def test_official_parts_are_the_papers_split_and_grouped_has_five_folds(tmp_path, monkeypatch, name, channels):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.STL10._check_integrity", lambda self: True)  # checksums of the real files
    {"mnist": fake_mnist, "stl10": fake_stl10}[name](tmp_path)
    data = load_dataset(name, "paper", 1, 16)
    assert (len(data.train), len(data.test)) == (50, 20) and len(data.class_names) == 10
    assert data.test.images.shape == (20, channels, 16, 16) and data.test.images.dtype == np.uint8
    assert (data.test.images == 20 * data.test.labels[:, None, None, None]).all()
    assert all(i.startswith("test/") for i in data.test.ids) and not data.info["synthetic"] and data.info["licence"]
    with pytest.raises(ValueError, match=f"{name} has one official test part.*no fold 2.*split='grouped'"):
        load_dataset(name, "paper", 2, 16)
    tested = np.concatenate([load_dataset(name, "grouped", fold, 16).test.ids for fold in range(1, 6)])
    assert len(tested) == len(set(tested)) == 70
    assert available()[name].startswith("there: ")


@pytest.mark.parametrize("name, said", [
    ("mnist", "put the four .gz files .*MNIST/raw"),
    ("stl10", "put stl10_binary.tar.gz there"),
])  # fmt: skip
def test_what_cannot_be_downloaded_says_what_to_put_where(tmp_path, monkeypatch, name, said):
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    monkeypatch.setattr(f"torchvision.datasets.{name}.download_and_extract_archive", no_network)
    with pytest.raises(FileNotFoundError, match=f"{name} could not be downloaded into .*no network.*{said}") as caught:
        load_dataset(name, "paper", 1, 32)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("cache/*"))
    assert "on first use" in available()[name]


def test_half_a_file_is_told_with_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    fake_mnist(tmp_path)
    half = tmp_path / "mnist" / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    half.write_bytes(half.read_bytes()[:5000])
    with pytest.raises(FileNotFoundError, match="or read there .*Remove what is half there.*put the four .gz files"):
        load_dataset("mnist", "paper", 1, 16)


def test_listing_the_sets_loads_no_package_and_names_all():
    code = "import sys; from deepknn_lib.datasets import available; print(*available()); assert not "
    code += "{'torchvision', 'sklearn', 'PIL'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == list(DATASETS) and not done.returncode, done.stderr


def test_a_folder_with_one_class_or_a_tiny_class_is_an_error(tmp_path):
    (tmp_path / "one" / "only").mkdir(parents=True)
    with pytest.raises(ValueError, match="at least 2 classes"):
        load_dataset(f"folder:{tmp_path / 'one'}")
    root = folder_set(tmp_path / "tiny")
    (root / "rare").mkdir()
    Image.new("RGB", (20, 20)).save(root / "rare" / "1.jpg")
    with pytest.raises(ValueError, match="class 'rare' has 1 images; five folds need 5"):
        load_dataset(f"folder:{root}", "paper", 1, 16)


def test_images_are_decoded_once_and_turned_upright(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "data"))
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # the left half is white …
    exif = image.getexif()
    exif[0x0112] = 6  # … and the camera says: turn clockwise, so that it is the top half
    image.save(tmp_path / "turned.png", exif=exif)
    first = decode([tmp_path / "turned.png"], 16, "x")
    assert first[0, 0, 2].mean() > 250 and first[0, 0, -3].mean() < 5
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("decoded again"))
    assert np.array_equal(decode([tmp_path / "turned.png"], 16, "x"), first)


def test_image_folds_are_stratified_and_repeatable():
    labels = np.repeat([0, 1, 2], [500, 53, 7])
    folds = splits.image_folds(labels)
    for c in range(3):
        counts = np.bincount(folds[labels == c], minlength=6)[1:]
        assert counts.max() - counts.min() <= 1
    assert np.array_equal(folds, splits.image_folds(labels))
