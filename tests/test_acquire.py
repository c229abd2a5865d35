"""`python -m deepknn_lib download NAME`, against a server and a Kaggle client on this machine."""

import functools
import gzip
import hashlib
import os
import shutil
import sys
import threading
import zipfile
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_datasets import SKIN7_CLASSES, fake_medmnist, fake_mnist, rsna
from test_datasets import skin7 as skin7_tree  # noqa: F401 (a fixture)

from deepknn_lib import catalog, download
from deepknn_lib.cli import main
from deepknn_lib.datasets import load_dataset


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that a local server serves, with what was asked of it."""
    folder = tmp_path / "site"
    folder.mkdir()
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(download, "WAITS", (0, 0.01))
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def md5(path):
    return f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"


def at_home(monkeypatch, name, site):
    """The catalogue's addresses of a set replaced by the local ones; checksums and sizes are those of the served files."""
    folder, url, _ = site
    remotes = []
    for remote in catalog.DATASETS[name].remotes:
        file = folder / Path(remote.url).name
        known = md5(file) if remote.checksum else None
        remotes.append(replace(remote, url=f"{url}/{file.name}", checksum=known, size=remote.size and file.stat().st_size))
    monkeypatch.setitem(catalog.DATASETS, name, replace(catalog.DATASETS[name], remotes=tuple(remotes)))


@pytest.fixture
def isic(skin7_tree, site, monkeypatch):  # noqa: F811
    """The official files of the made-up Skin-7 on the local server, and an empty data folder."""
    folder = site[0]
    kinds = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
    for part in ("Input", "GroundTruth"):
        inside = f"ISIC2018_Task3_Training_{part}"
        with zipfile.ZipFile(folder / f"{inside}.zip", "w") as archive:
            for file in sorted((skin7_tree / inside).iterdir()):
                archive.write(file, f"{inside}/{file.name}")
            archive.writestr(f"{inside}/LICENSE.txt", "CC BY-NC")
    shutil.copy(skin7_tree / "ISIC2018_Task3_Training_LesionGroupings.csv", folder)
    for fold in range(1, 6):
        chosen = [n for n in range(70) if n // 7 % 5 + 1 == fold]
        lines = [f"ISIC_{n:07d}.jpg,{kinds.index(SKIN7_CLASSES[n % 7].upper())}" for n in chosen]
        (folder / f"split_data_{fold}_fold_test.csv").write_text("\n".join(["image_test,label_test", *lines, ""]))
    before = load_dataset("skin7", "paper", 2, 24)
    monkeypatch.delenv("DEEPKNN_SKIN7_FOLDS")
    shutil.rmtree(skin7_tree.parent)
    at_home(monkeypatch, "skin7", site)
    return skin7_tree, before, site


def test_skin7_is_downloaded_unpacked_and_split_as_its_authors_did(isic, capsys):
    root, before, (_, _, asked) = isic
    assert main(["download", "skin7"]) == 0
    said = capsys.readouterr().out
    assert "CC BY-NC 4.0" in said and f"skin7 is in {root}" in said and "verify skin7" in said
    after = load_dataset("skin7", "paper", 2, 24)
    assert after.test.ids.tolist() == before.test.ids.tolist() and (after.test.images == before.test.images).all()
    assert not list(root.glob("*.zip")) and not list(root.glob("split_data*")) and (root / "folds.csv").is_file()
    number = len(asked)
    assert main(["download", "skin7"]) == 0 and len(asked) == number == 8  # what is there is not fetched again


def test_a_download_of_skin7_that_stopped_goes_on(isic, capsys):
    root, _, (folder, _, asked) = isic
    hidden = folder.parent / "later.zip"
    (folder / "ISIC2018_Task3_Training_Input.zip").rename(hidden)
    assert main(["download", "skin7"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "404" in error
    assert "https://challenge.isic-archive.com/data/#2018" in error and str(root) in error and "LesionGroupings" in error
    with pytest.raises(FileNotFoundError, match="download skin7"):
        load_dataset("skin7")
    hidden.rename(folder / "ISIC2018_Task3_Training_Input.zip")
    number = len(asked)
    assert main(["download", "skin7"]) == 0
    assert not any("GroundTruth" in path for path in asked[number:])
    assert len(load_dataset("skin7", "grouped", 1, 24).test)


def test_wrong_bytes_are_refused_and_nothing_of_them_stays(isic, capsys):
    root, _, (folder, _, _) = isic
    archive = folder / "ISIC2018_Task3_Training_Input.zip"
    archive.write_bytes(archive.read_bytes()[:-1] + b"x")
    assert main(["download", "skin7"]) == 2
    assert "md5" in capsys.readouterr().err.lower()
    assert not (root / "ISIC2018_Task3_Training_Input").exists() and not list(root.glob("*Input.zip"))


def test_an_error_page_in_place_of_the_folds_is_refused(isic, capsys):
    root, _, (folder, _, _) = isic
    (folder / "split_data_3_fold_test.csv").write_text("<html>rate limit</html>")
    assert main(["download", "skin7"]) == 2
    assert "split_data_3_fold_test.csv" in capsys.readouterr().err and not (root / "folds.csv").exists()


def test_mnist_is_downloaded_and_read_by_torchvision(tmp_path, site, monkeypatch, capsys):
    fake_mnist(tmp_path / "made")
    for file in (tmp_path / "made" / "mnist" / "MNIST" / "raw").iterdir():
        (site[0] / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    at_home(monkeypatch, "mnist", site)
    known = [(f"{Path(r.name).name}", r.checksum.removeprefix("md5:")) for r in catalog.DATASETS["mnist"].remotes]
    monkeypatch.setattr("torchvision.datasets.MNIST.resources", known)
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])  # it downloads nothing itself
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "data"))
    assert main(["download", "mnist"]) == 0
    data = load_dataset("mnist", "paper", 1, 16)
    assert (len(data.train), len(data.test)) == (50, 20)
    for archive in (tmp_path / "data").rglob("*.gz"):
        archive.unlink()  # not needed any more, nor fetched again
    number = len(site[2])
    assert main(["download", "mnist"]) == 0 and len(site[2]) == number


def test_medmnist_is_downloaded_by_the_addresses_of_its_package(tmp_path, site, monkeypatch):
    import medmnist

    fake_medmnist(tmp_path)
    file = (tmp_path / "medmnist" / "bloodmnist_64.npz").rename(site[0] / "bloodmnist_64.npz")
    about = medmnist.INFO["bloodmnist"] | {"url_64": f"{site[1]}/{file.name}?download=1", "MD5_64": md5(file)[4:]}
    monkeypatch.setitem(medmnist.INFO, "bloodmnist", about)
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "data"))
    assert main(["download", "medmnist:bloodmnist@64"]) == 0
    assert len(load_dataset("medmnist:bloodmnist@64", "paper", 1, 16).test) == 24


def test_without_a_network_there_is_one_error_with_the_steps_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "WAITS", (0, 0.01))
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "data"))
    entry = catalog.DATASETS["mnist"]
    nowhere = tuple(replace(remote, url="http://127.0.0.1:9/x.gz") for remote in entry.remotes)
    monkeypatch.setitem(catalog.DATASETS, "mnist", replace(entry, remotes=nowhere))
    assert main(["download", "mnist"]) == 2
    *tries, error = capsys.readouterr().err.rstrip().split("\n")
    assert error.startswith("error: could not download") and all("trying again" in line for line in tries)
    assert entry.page in error and "train-images-idx3-ubyte.gz" in error and str(tmp_path / "data" / "mnist") in error


@pytest.mark.parametrize("name, said", [
    ("sd198", "cannot be downloaded by a program. Ask its authors"),
    ("chestxray3", "cannot be downloaded by a program. Get the chest X-rays"),
    ("lesions", "needs no download"),
    ("digits", "needs no download"),
    ("folder:/tmp/x", "is your own"),
    ("imagenet", "unknown data set 'imagenet'"),
])  # fmt: skip
def test_what_cannot_be_downloaded_says_why(name, said, capsys):
    assert main(["download", name]) == 2
    assert said in capsys.readouterr().err


def client(folder, monkeypatch, *lines):
    """A Kaggle client in `folder` that does what `lines` of Python say with `out`, the folder it is given."""
    folder.mkdir()
    check = "assert sys.argv[1:5] == ['competitions', 'download', '-c', 'rsna-pneumonia-detection-challenge']"
    start = ["import shutil, sys", "out = sys.argv[sys.argv.index('-p') + 1]", check]
    (folder / "kaggle.py").write_text("\n".join([*start, *lines]))
    # not as the script's own first line: the path of this Python may hold a space
    (folder / "kaggle").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder / "kaggle.py"}" "$@"\n')
    (folder / "kaggle").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_pneumonia_comes_through_kaggles_client(tmp_path, monkeypatch):
    rsna(tmp_path)
    archive = shutil.make_archive(str(tmp_path / "made"), "zip", tmp_path / "pneumonia")
    shutil.rmtree(tmp_path / "pneumonia")
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "data"))
    client(tmp_path / "bin", monkeypatch, f"shutil.copy({archive!r}, out + '/rsna-pneumonia-detection-challenge.zip')")
    assert main(["download", "pneumonia"]) == 0
    assert len(load_dataset("pneumonia", "grouped", 1, 16).test) == 6
    assert not list((tmp_path / "data" / "pneumonia").glob("*.zip"))
    assert main(["download", "pneumonia"]) == 0


@pytest.mark.parametrize("lines, said", [
    (["sys.exit('403 - Forbidden - You must accept this competition')"], "403 - Forbidden"),
    (["print('nothing')"], "no archive came"),
])  # fmt: skip
def test_a_failing_kaggle_client_is_quoted(tmp_path, monkeypatch, capsys, lines, said):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "data"))
    client(tmp_path / "bin", monkeypatch, *lines)
    assert main(["download", "pneumonia"]) == 2
    error = capsys.readouterr().err
    assert said in error and "accept the competition's rules" in error and "rsna-pneumonia-detection-challenge" in error


def test_without_kaggles_client_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert main(["download", "pneumonia"]) == 2
    assert "pip install kaggle" in capsys.readouterr().err
