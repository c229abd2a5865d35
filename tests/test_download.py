"""Downloads against a server on this machine; zips that are broken or meant to harm."""

import gzip
import hashlib
import importlib
import io
import os
import random
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import medmnist
import pytest
import sets
from sets import SKIN7, TASK, put, refused

from deepknn_lib.datasets import CATALOG, dataset_digest, download, load_dataset

module = importlib.import_module("deepknn_lib.datasets.download")  # the package has the function of this name
BODY, ZEROS, GONE = random.Random(0).randbytes(400_000), bytes(400_000), FileNotFoundError
MD5 = f"md5:{hashlib.md5(BODY).hexdigest()}"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` as the next entry of `server.plan` says."""

    def do_GET(self):
        how = self.server.plan.pop(0) if self.server.plan else {}
        self.server.asked.append(self.headers.get("Range", ""))
        body = how.get("body", self.server.files.get(Path(self.path).name))
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if how.get("ranges", True) else 0
        status = how.get("status", 404 if body is None else 206 if start else 200)
        status, body = (416, b"") if status == 206 and start >= len(body) else (status, body or b"")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) - start if status < 300 else 0))
        self.end_headers()
        self.wfile.write(body[start:][: how.get("cut")] if status < 300 else b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    vars(server).update(files={"data.bin": BODY}, plan=[], asked=[])
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    yield server
    server.shutdown()
    server.server_close()


def left(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock")) if folder.exists() else []


def get(server, folder, checksum=MD5, url=None):
    """Fetch the file; the ranges that were asked for."""
    folder.mkdir(exist_ok=True)
    module.fetch(url or f"{server.url}/data.bin", folder / "data.bin", checksum, "By hand: open the page.")
    assert (folder / "data.bin").read_bytes() == BODY and left(folder) == ["data.bin"]
    return server.asked


ALL, CUT, PAGE = "bytes=0-", {"cut": 131_072}, {"body": b"<html>please log in</html>"}
OTHER, LOST = "data.bin gave another file than expected .*(MD5|md5)", r"could not download .*data.bin \("
# the part that is there, its checksum, what the server does; which ranges are asked for, or what is said in the end
PLANS = {
    "nothing wrong": (b"", MD5, [], [ALL]),
    "cuts": (b"", MD5, [CUT, {"cut": 65_536}], [ALL, "bytes=131072-", "bytes=196608-"]),
    "a cut without ranges": (b"", MD5, [CUT, {"ranges": False}], [ALL, "bytes=131072-"]),
    "an overloaded server": (b"", MD5, [CUT, {"status": 503}], [ALL, "bytes=131072-", "bytes=131072-"]),
    "wrong bytes once": (b"", MD5, [{"body": ZEROS}], [ALL, ALL]),
    "a file that changed": (b"", MD5, [CUT | {"body": ZEROS}], [ALL, "bytes=131072-", ALL]),
    "a part of an earlier call": (BODY[:99], MD5, [], ["bytes=99-"]),
    "a whole part is only compared": (BODY, MD5, [], ["bytes=400000-"]),
    "nothing to compare a part with": (BODY[:99], None, [], [ALL]),
    "not there": (b"", MD5, [{"status": 404}] * 4, f"{LOST}404"),
    "always wrong bytes": (b"", MD5, [{"body": ZEROS}] * 4, OTHER),
    "always a page": (b"", MD5, [PAGE] * 4, OTHER),
    "always cut": (b"", MD5, [{"cut": 0, "ranges": False}] * 4, LOST),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_download_goes_on_where_it_stopped_or_says_the_steps_by_hand(server, tmp_path, case):
    part, checksum, plan, wanted = PLANS[case]
    folder, server.plan = tmp_path / "x", list(plan)
    if part:
        put(folder / ".data.bin.part", part)
    if isinstance(wanted, str):
        error = ValueError if wanted == OTHER else GONE
        assert refused(wanted, get, server, folder, error=error).endswith("By hand: open the page.")
        assert left(folder) == [".data.bin.part"] * (case == "always cut") and not server.plan
        nowhere = "http://127.0.0.1:1/"
        refused(f"could not download {nowhere}", get, server, folder, MD5, nowhere, error=GONE)
        return
    for _ in range(2):  # It is not fetched again.
        assert get(server, folder, checksum) == wanted


@pytest.mark.parametrize(("where", "call", "number"), [(os, "replace", 28), (Path, "mkdir", 13)])
def test_what_stands_in_the_way_is_named(server, data, monkeypatch, where, call, number):
    at_home(monkeypatch, "stl10", server)
    monkeypatch.setattr(where, call, mock.Mock(side_effect=OSError(number, os.strerror(number))))
    said = f"cannot write to .*stl10 .{os.strerror(number)}.: make room or make it writable, or name another"
    refused(said, download, "stl10", error=OSError)


def at_home(monkeypatch, name, server):
    """The addresses of a set replaced by the local server's; checksums are those of the served files."""
    remotes = []
    for remote in CATALOG[name].remotes:
        file = Path(remote["url"]).name
        md5 = hashlib.md5(server.files.setdefault(file, BODY)).hexdigest()
        checksum = remote["checksum"] and f"md5:{md5}"
        remotes.append(remote | {"url": f"{server.url}/{file}", "checksum": checksum})
    monkeypatch.setattr(CATALOG[name], "remotes", remotes)


def test_skin7_is_downloaded_unpacked_and_split(data, server, monkeypatch, tmp_path, capsys):
    root, files, third = sets.skin7(data), server.files, "split_data_3_fold_test.csv"
    sets.skin7_test(root)
    before, images = dataset_digest("skin7", "paper", 2, 24), f"{TASK}_Input.zip"
    for folder in [path for path in root.glob("ISIC2018_Task3_*") if path.is_dir()]:
        archive = shutil.make_archive(str(tmp_path / folder.name), "zip", root, folder.name)
        files[f"{folder.name}.zip"] = Path(archive).read_bytes()
    files[f"{TASK}_LesionGroupings.csv"] = (root / f"{TASK}_LesionGroupings.csv").read_bytes()
    for fold, rows in sets.ROWS.groupby("test_fold"):
        table = rows.assign(image_test=rows["image"] + ".jpg")[["image_test"]]
        files[f"split_data_{fold}_fold_test.csv"] = table.to_csv(index=False).encode()
    files[Path(CATALOG["skin7"].remotes[7]["url"]).name] = f"image_id,split\n{SKIN7[0][0]},test\n".encode()
    shutil.rmtree(data)
    at_home(monkeypatch, "skin7", server)
    good, files[third], kept = files[third], b"<html>rate limit", files.pop(images)
    refused("404.*By hand: get the three Task 3.*challenge.isic-archive.com", download, "skin7", error=GONE)
    files[images] = kept
    assert download("skin7") == root and "CC BY-NC 4.0" in capsys.readouterr().out
    refused(f"{third} needs the columns image_test", load_dataset, "skin7", "paper", 2, 24)
    (root / third).unlink()
    files[third], server.asked = good, []
    for _ in range(2):  # what was there is not fetched again
        assert download("skin7") == root and len(server.asked) == 1
    assert dataset_digest("skin7", "paper", 2, 24) == before and not list(root.glob("*.zip"))
    sizes = [len(load_dataset("skin7", split, 1, 24).test) for split in ("dermamnist-c", "official")]
    assert sizes == [1, 14]


def test_mnist_is_downloaded_and_read_by_torchvision(data, tmp_path, server, monkeypatch):
    sets.mnist(tmp_path / "made")
    for file in (tmp_path / "made" / "mnist" / "MNIST" / "raw").iterdir():
        server.files[f"{file.name}.gz"] = gzip.compress(file.read_bytes())
    at_home(monkeypatch, "mnist", server)
    known = [(Path(r["name"]).name, r["checksum"].removeprefix("md5:")) for r in CATALOG["mnist"].remotes]
    monkeypatch.setattr("torchvision.datasets.MNIST.resources", known)
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])  # none of its own
    download("mnist")
    found = load_dataset("mnist", "paper", 1, 16)
    assert (len(found.train), len(found.test)) == (50, 20)
    for archive in data.rglob("*.gz"):
        archive.unlink()  # not needed any more, nor fetched again
    assert download("mnist") == data / "mnist" and len(server.asked) == 4


def test_medmnist_is_downloaded_by_the_addresses_of_its_package(data, tmp_path, server, monkeypatch):
    sets.medmnist(tmp_path)
    server.files["bloodmnist_64.npz"] = body = (tmp_path / "medmnist" / "bloodmnist_64.npz").read_bytes()
    about = {"url_64": f"{server.url}/bloodmnist_64.npz", "MD5_64": hashlib.md5(body).hexdigest()}
    monkeypatch.setitem(medmnist.INFO, "bloodmnist", medmnist.INFO["bloodmnist"] | about)
    download("medmnist:bloodmnist@64")
    assert len(load_dataset("medmnist:bloodmnist@64", "paper", 1, 16).test) == 24


def zipped(*members):
    """The bytes of a zip of (name, contents)."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, contents in members:
            info = zipfile.ZipInfo("y")
            info.filename = name
            archive.writestr(info, contents)
    return file.getvalue()


def test_unpack_and_once_more(tmp_path):
    names, folder = ["images/Größe ü 1.png", "images/deep er/b.txt", "top.csv"], tmp_path / "to"
    put(folder / ".set.zip.unpacking" / "old" / "x", "of a process that was killed")
    put(folder / "top.csv", "mine")
    for _ in range(2):
        put(tmp_path / "set.zip", zipped(("images/", b""), *((n, n.encode()) for n in names)))
        module.unpack(tmp_path / "set.zip", folder)
        assert left(folder) == ["images", "top.csv"] and (folder / "top.csv").read_text() == "mine"
        assert all((folder / name).read_bytes() == name.encode() for name in names[:2])


WHOLE = zipped(("a/good", b"1"), ("a/bad", BODY))
FLIPPED, LOCKED = bytearray(WHOLE), bytearray(WHOLE)
FLIPPED[len(WHOLE) // 2] ^= 1
LOCKED[WHOLE.index(b"PK\1\2") + 8] |= 1
OUTSIDE = ["../x", "/x", "a/../../x", "C:\\x", "C:x", "..\\x", "a\\x"]
ZIPS = {name: zipped(("good", b"1"), (name, b"/etc/passwd")) for name in OUTSIDE}
ZIPS |= {"cut": WHOLE[:-30], "half": WHOLE[: len(WHOLE) // 2], "page": b"<html>", "nothing": b""}
ZIPS |= {"flipped": FLIPPED, "encrypted": LOCKED}


@pytest.mark.parametrize("case", ZIPS)
def test_harmful_and_broken_zips_leave_nothing(tmp_path, case):
    (tmp_path / "set.zip").write_bytes(ZIPS[case])
    outside = "set.zip, member .*its path is not inside the folder"
    said = outside if case in OUTSIDE else "set.zip is broken .*remove the archive and get it again"
    refused(said, module.unpack, tmp_path / "set.zip", tmp_path / "to")
    assert left(tmp_path / "to") == [] and left(tmp_path) in (["set.zip"], ["set.zip", "to"])
