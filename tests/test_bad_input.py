"""Bad input of every kind through the command line: an error that names file, reason and remedy, and nothing half-made."""

import csv
import os
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_acquire import at_home, site  # noqa: F401 (site is a fixture)
from test_datasets import dataverse, skin7  # noqa: F401 (skin7 is a fixture)

from deepknn_lib.cli import main


def textured(root, seed=0):
    """Two classes of ten images that differ, so that a clean set has nothing to report."""
    rng = np.random.default_rng(seed)
    for name in ("healthy", "ill"):
        (root / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(root / name / f"{number}.png")
    return root


def png_of(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def cut(root):
    whole = (root / "ill" / "3.png").read_bytes()
    (root / "ill" / "3.png").write_bytes(whole[: len(whole) // 2])


def groups(root, extra=(), leave_out=()):
    names = [f.relative_to(root).as_posix() for f in sorted(root.glob("*/*.png"))]
    rows = [f"{name},P{number}" for number, name in enumerate(names) if name not in leave_out]
    (root / "groups.csv").write_text("\n".join(["file,patient_id", *rows, *extra]))


def one_image_class(root):
    (root / "rare").mkdir()
    Image.new("RGB", (40, 40), "red").save(root / "rare" / "1.png")


# What is done to a good folder; what `run` says; what `verify` writes; whether verify can list anything at all.
FOLDERS = {
    "truncated": (cut, "3.png is cut off", "is cut off"),
    "zero bytes": (lambda r: (r / "ill" / "3.png").write_bytes(b""), "3.png is empty (0 bytes): copy", "is empty"),
    "text called .jpg": (lambda r: (r / "ill" / "x.jpg").write_text("no image"), "x.jpg is not an image", "'no image'"),
    "a page called .png": (lambda r: (r / "ill" / "x.png").write_text("<html>404"), "x.png is not an image", "<html>404"),
    "bomb": (lambda r: (r / "ill" / "3.png").write_bytes(png_of(60_000, 60_000)), "3.png holds more pixels", "shrink it"),
    "one image in a class": (one_image_class, "class 'rare' has 1 images; five folds need 5", "5 folds need"),
    "an empty class": (lambda r: (r / "rare").mkdir(), "empty class: rare has no images", "add some or remove the folder"),
    "a group row without image": (lambda r: groups(r, ["ill/99.png,P1"]), "row without image: ill/99.png", "remove the row"),
    "an image without group": (lambda r: groups(r, leave_out=["ill/3.png"]), "no group: ill/3.png", "add a row"),
    "an image in two groups": (lambda r: groups(r, ["ill/3.png,P9"]), "duplicate id: ill/3.png", "keep one of its rows"),
}
FATAL = {
    "an empty folder": (lambda r: [shutil.rmtree(p) for p in r.iterdir()], "sub-folder with images for each of at least 2"),
    "one class": (lambda r: shutil.rmtree(r / "ill"), "at least 2 classes; it has 1"),
    "no folder": (shutil.rmtree, "there is no folder"),
    "a table without columns": (lambda r: (r / "groups.csv").write_text("name\nx"), "groups.csv needs the columns file"),
    "a table in another encoding": (lambda r: (r / "groups.csv").write_bytes(b"file,p\n\xff\xfe"), "as CSV in UTF-8"),
}


def untouched(data):
    """Nothing half-made: no array, no run, no temporary file."""
    left = [p for p in Path(data).rglob("*") if p.is_file() and p.parent.name not in ("verify", "splits")]
    assert not left, left


def run(name, capsys, *more):
    status = main(["run", "--dataset", name, "--method", "knn", "--profile", "smoke", "--split", "grouped", *more])
    return status, capsys.readouterr().err


def verified(name, tmp_path):
    status = main(["verify", name, "--out", str(tmp_path / "found.csv")])
    with open(tmp_path / "found.csv", newline="", encoding="utf-8") as file:
        return status, list(csv.DictReader(file))


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_a_good_folder_passes(tmp_path, data, capsys):
    name = f"folder:{textured(tmp_path / 'my images é')}"
    status, rows = verified(name, tmp_path)
    assert status == 0 and not [r for r in rows if r["severity"] != "note"], rows
    assert run(name, capsys)[0] == 0


@pytest.mark.parametrize("harm, said, listed", FOLDERS.values(), ids=list(FOLDERS))
def test_a_bad_folder(tmp_path, data, capsys, harm, said, listed):
    root = textured(tmp_path / "my images é")
    harm(root)
    status, error = run(f"folder:{root}", capsys)
    assert status == 2 and said in error and error.startswith("error: ") and error.count("\n") == 1, error
    untouched(data)
    status, rows = verified(f"folder:{root}", tmp_path)
    errors = [f"{r['item']} {r['detail']}" for r in rows if r["severity"] == "error"]
    assert status == 1 and any(word in " ".join(errors) for word in listed.split("|")), errors


@pytest.mark.parametrize("harm, said", FATAL.values(), ids=list(FATAL))
@pytest.mark.parametrize("command", ["run", "verify"])
def test_a_folder_that_cannot_be_listed(tmp_path, data, capsys, harm, said, command):
    root = textured(tmp_path / "my images é")
    harm(root)
    more = ["--method", "knn", "--profile", "smoke", "--split", "grouped"] if command == "run" else []
    assert main([command, *(["--dataset"] if command == "run" else []), f"folder:{root}", *more]) == 2
    error = capsys.readouterr().err
    assert said in error and str(root) in error and error.count("\n") == 1
    untouched(data)


def test_all_bad_files_are_reported_and_not_just_the_first(tmp_path, data):
    root = textured(tmp_path / "x")
    for number in range(7):
        (root / "healthy" / f"{number}.png").write_bytes(b"")
    status, rows = verified(f"folder:{root}", tmp_path)
    assert status == 1
    assert [r["item"] for r in rows if r["check"] == "unreadable images"] == [f"healthy/{n}.png" for n in range(7)]


TABLES = {
    "a row without an image": (lambda r, t: next(r.rglob("ISIC_0000007.jpg")).unlink(), "row without image: ISIC_0000007"),
    "an image without a row": (
        lambda r, t: shutil.copy(next(r.rglob("*7.jpg")), r / "HAM10000_images_part_1" / "ISIC_9.jpg"), "image without row"),
    "an unknown class": (lambda r, t: t.write_text(t.read_text().replace(",nv,", ",naevus,", 1)), "unknown class: ISIC"),
    "a doubled id": (lambda r, t: t.write_text(t.read_text() + "\nHAM_0_0,ISIC_0000007,akiec,x,1,x,x"), "duplicate id"),
    "a row cut short": (lambda r, t: t.write_text(t.read_text() + "\nHAM_0_0,ISIC_0000007"), "unknown class: ISIC_0000007"),
    "no lesion": (lambda r, t: t.write_text(t.read_text().replace("HAM_0_0,", ",", 1)), "no group: ISIC"),
}  # fmt: skip


@pytest.mark.parametrize("harm, said", TABLES.values(), ids=list(TABLES))
def test_a_table_that_does_not_fit_its_images(skin7, tmp_path, capsys, harm, said):  # noqa: F811
    dataverse(skin7)
    harm(skin7, skin7 / "HAM10000_metadata.csv")
    status, error = run("skin7", capsys)
    assert status == 2 and said in error and "verify skin7" in error, error
    assert not list((skin7.parent / "cache").glob("*")) and not list(skin7.parent.glob("runs/*"))
    status, rows = verified("skin7", tmp_path)
    assert status == 1 and any(said.split(": ")[0] in f"{r['check']} {r['detail']}" for r in rows)


def two_classes_at_once(text):
    return text.replace("0.0,1.0", "1.0,1.0", 1)


def test_a_one_hot_row_with_two_classes(skin7, tmp_path, capsys):  # noqa: F811
    truth = next(skin7.glob("*/*GroundTruth.csv"))
    truth.write_text(two_classes_at_once(truth.read_text()))
    status, error = run("skin7", capsys)
    assert status == 2 and "unknown class" in error and " + " in error


def test_an_unreadable_folder(tmp_path, data, capsys, monkeypatch):
    root = textured(tmp_path / "x")
    if os.geteuid():
        (root / "ill").chmod(0)
    else:  # permissions do not stop root, so the system is made to refuse
        scandir = os.scandir

        def refuse(path="."):
            if str(path) == str(root / "ill"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
    status, error = run(f"folder:{root}", capsys)
    (root / "ill").chmod(0o755)
    assert status == 2 and f"{root / 'ill'} cannot be read (Permission denied); check its permissions" in error
    untouched(data)


def test_a_full_disk(tmp_path, data):
    """The system itself refuses: files of this process may not grow beyond 20 kB."""
    root = textured(tmp_path / "x")
    done = subprocess.run(
        [sys.executable, "-m", "deepknn_lib", "run", "--dataset", f"folder:{root}", "--method", "knn", "--profile", "smoke"],
        capture_output=True, text=True, env=os.environ | {"DEEPKNN_DATA": str(data)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert done.returncode == 2 and "Make room, name another folder in DEEPKNN_DATA" in done.stderr, done.stderr
    untouched(data)


@pytest.mark.parametrize("member, mode, said", [
    ("../outside.jpg", 0o100644, "outside.jpg"),
    ("/abs.jpg", 0o100644, "abs.jpg"),
    ("ISIC2018_Task3_Training_Input/link.jpg", 0o120777, "link"),
])  # fmt: skip
def test_a_zip_that_leaves_its_folder_or_holds_links(skin7, site, monkeypatch, capsys, member, mode, said):  # noqa: F811
    folder = site[0]
    for remote in ("LesionGroupings.csv", *(f"split_data_{n}_fold_test.csv" for n in range(1, 6))):
        name = remote if remote.startswith("split") else f"ISIC2018_Task3_Training_{remote}"
        (folder / name).write_text("image_test,label_test\n")
    for part in ("Input", "GroundTruth"):
        with zipfile.ZipFile(folder / f"ISIC2018_Task3_Training_{part}.zip", "w") as archive:
            archive.writestr(f"ISIC2018_Task3_Training_{part}/a.txt", "x")
            if part == "Input":
                info = zipfile.ZipInfo(member)
                info.external_attr = mode << 16
                archive.writestr(info, "/etc/passwd")
    shutil.rmtree(skin7)
    at_home(monkeypatch, "skin7", site)
    assert main(["download", "skin7"]) == 2
    error = capsys.readouterr().err
    assert said in error and "ISIC2018_Task3_Training_Input.zip" in error and error.count("\n") == 1
    assert not (skin7 / "ISIC2018_Task3_Training_Input").exists() and not list(skin7.parent.rglob("outside.jpg"))


def test_a_hundred_thousand_files_in_one_folder(tmp_path, data, capsys):
    """Nothing may be quadratic in the files, although all are copies of one."""
    root, wanted = textured(tmp_path / "many"), 100_000
    small = root / "ill" / "0.png"
    Image.new("L", (16, 16), 90).save(small)
    content = small.read_bytes()
    for number in range(wanted - 20):
        (root / "healthy" / f"n{number}.png").write_bytes(content)
    before = os.times().user
    status, rows = verified(f"folder:{root}", tmp_path)
    assert status == 1  # a copy of an image of the other class
    assert len([r for r in rows if r["check"] == "exact duplicates"]) == wanted - 20
    assert "100,000" in capsys.readouterr().out.replace("100000", "100,000") and os.times().user - before < 300
