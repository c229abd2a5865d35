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

import pytest
import sets
from sets import TASK, put, refused

from deepknn_lib.datasets import CATALOG, dataset_digest, download, load_dataset

module = importlib.import_module("deepknn_lib.datasets.download")  # the package has the function of this name
BODY, ZEROS = random.Random(0).randbytes(400_000), bytes(400_000)
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


@pytest.fixture
def server(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        vars(server).update(files={"data.bin": BODY}, plan=[], asked=[])
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr("time.sleep", lambda _: None)
        yield server
        server.shutdown()


def left(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock")) if folder.exists() else []


ALL, CUT = "bytes=0-", {"cut": 131_072}
OTHER, LOST = "data.bin gave another file than expected .*(MD5|md5)", r"could not download .*data.bin \("
# the part that is there, its checksum, what the server does; which ranges are asked for, or what is said in the end
PLANS = {
    "cuts": (b"", MD5, [CUT, {"cut": 65_536}], [ALL, "bytes=131072-", "bytes=196608-"]),
    "a cut without ranges": (b"", MD5, [CUT, {"ranges": False}], [ALL, "bytes=131072-"]),
    "a file that changed": (b"", MD5, [CUT | {"body": ZEROS}], [ALL, "bytes=131072-", ALL]),
    "a part of an earlier call": (BODY[:99], MD5, [], ["bytes=99-"]),
    "a whole part is only compared": (BODY, MD5, [], ["bytes=400000-"]),
    "nothing to compare a part with": (BODY[:99], None, [], [ALL]),
    "not there": (b"", MD5, [{"status": 404}] * 4, f"{LOST}404"),
    "always a page": (b"", MD5, [{"body": b"<html>please log in</html>"}] * 4, OTHER),
    "always cut": (b"", MD5, [{"cut": 0, "ranges": False}] * 4, LOST),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_download_goes_on_where_it_stopped_or_says_the_steps_by_hand(server, tmp_path, case):
    part, checksum, plan, wanted = PLANS[case]
    how = (tmp_path / "data.bin", checksum, "By hand: open the page.")
    server.plan = list(plan)
    if part:  # as a killed process leaves it
        put(tmp_path / ".data.bin.part", part)
        put(tmp_path / "tmp1a2b3c4d", b"of pooch")
    if isinstance(wanted, str):
        error = ValueError if wanted == OTHER else FileNotFoundError
        told = refused(wanted, module.fetch, f"{server.url}/data.bin", *how, error=error)
        assert told.endswith("By hand: open the page.") and not server.plan
        assert left(tmp_path) == [".data.bin.part"] * (case == "always cut")
        return
    for _ in range(2):  # It is not fetched again.
        module.fetch(f"{server.url}/data.bin", *how)
        assert server.asked == wanted
        assert (tmp_path / "data.bin").read_bytes() == BODY and left(tmp_path) == ["data.bin"]


def at_home(monkeypatch, name, server):
    """The addresses of a set replaced by the local server's; checksums are those of the served files."""
    remotes = []
    for remote in CATALOG[name].remotes:
        file = Path(remote["url"]).name
        md5 = f"md5:{hashlib.md5(server.files.setdefault(file, BODY)).hexdigest()}"
        remotes.append(remote | {"url": f"{server.url}/{file}", "checksum": remote["checksum"] and md5})
    monkeypatch.setattr(CATALOG[name], "remotes", remotes)


def test_skin7_is_downloaded_unpacked_and_split(data, server, monkeypatch, tmp_path, capsys):
    root, files, third = sets.skin7(data), server.files, "split_data_3_fold_test.csv"
    before, one = dataset_digest("skin7", "paper", 2, 24), sets.ROWS["image"][0]
    for folder in [path for path in root.glob("ISIC2018_Task3_*") if path.is_dir()]:
        archive = shutil.make_archive(str(tmp_path / folder.name), "zip", root, folder.name)
        files[f"{folder.name}.zip"] = Path(archive).read_bytes()
    files[f"{TASK}_LesionGroupings.csv"] = (root / f"{TASK}_LesionGroupings.csv").read_bytes()
    for fold, rows in sets.ROWS.groupby("test_fold"):
        lines = ["image_test", *rows["image"] + ".jpg"]
        files[f"split_data_{fold}_fold_test.csv"] = "\n".join(lines).encode()
    files[Path(CATALOG["skin7"].remotes[7]["url"]).name] = f"image_id,split\n{one},test\n".encode()
    shutil.rmtree(data)
    at_home(monkeypatch, "skin7", server)
    good, files[third] = files[third], b"<html>rate limit"
    put(root / f".{TASK}_Input.zip.unpacking" / "old" / "x", "of a process that was killed")
    assert download("skin7") == root and "CC BY-NC 4.0" in capsys.readouterr().out
    refused(f"{third} needs the columns image_test", load_dataset, "skin7", "paper", 2, 24)
    (root / third).unlink()
    files[third], server.asked = good, []
    for _ in range(2):  # what was there is not fetched again
        assert download("skin7") == root and len(server.asked) == 1
    assert dataset_digest("skin7", "paper", 2, 24) == before and not list(root.glob("*.zip*"))
    assert load_dataset("skin7", "dermamnist-c", 1, 24).test.ids.tolist() == [one]
    assert not (root / "old").exists()
    official = load_dataset("skin7", "official", 1, 24)
    assert official.train.ids.tolist() == sets.ROWS["image"].tolist()
    assert official.test.ids.tolist() == [f"ISIC_{n:07d}" for n in range(90, 104)]
    assert official.test.labels.tolist() == [n % 7 for n in range(90, 104)]


def test_mnist_is_downloaded_and_read_by_torchvision(data, tmp_path, server, monkeypatch):
    sets.mnist(tmp_path / "made")
    for file in (tmp_path / "made" / "mnist" / "MNIST" / "raw").iterdir():
        server.files[f"{file.name}.gz"] = gzip.compress(file.read_bytes())
    at_home(monkeypatch, "mnist", server)
    server.plan = [{"status": 404}] * 4
    refused("404.*By hand: put the four .gz files", download, "mnist", error=FileNotFoundError)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", mock.Mock(side_effect=OSError(28, "No space left on device")))
        said = "cannot write to .*mnist .No space left on device.: make room .*, or name another"
        refused(said, download, "mnist", error=OSError)
    server.asked = []
    for _ in range(2):  # the archives are not needed any more, nor fetched again
        assert download("mnist") == data / "mnist" and len(server.asked) == 4
        assert len(load_dataset("mnist", "paper", 1, 16).test) == 20 and not [*data.rglob("*.gz")]
    next(data.rglob("train-labels*")).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("used the network"))
        refused("mnist cannot be read .*download mnist`", load_dataset, "mnist", "paper", 1, 16)
    assert download("mnist") == data / "mnist" and len(server.asked) == 5


def zipped(*members):
    """The bytes of a zip of (name, contents)."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for member in members:
            archive.writestr(*member)
    return file.getvalue()


def test_unpacking_leaves_what_is_there(tmp_path):
    put(tmp_path / "to" / "a", "mine")
    put(tmp_path / "set.zip", zipped(("a", b"theirs"), ("b", b"1")))
    module.unpack(tmp_path / "set.zip", tmp_path / "to")
    assert (tmp_path / "to" / "a").read_text() == "mine" and left(tmp_path / "to") == ["a", "b"]


FLIPPED = bytearray(WHOLE := zipped(("a/good", b"1"), ("a/bad", BODY)))
FLIPPED[len(WHOLE) // 2] ^= 1
ZIPS = {"cut": WHOLE[:-30], "page": b"<html>", "flipped": FLIPPED}
OUTSIDE = ["a/../../x", "/x", "C:x", "a\\x"]


@pytest.mark.parametrize("case", [*ZIPS, *OUTSIDE])
def test_harmful_and_broken_zips_leave_nothing(tmp_path, case):
    put(tmp_path / "set.zip", bytes(ZIPS.get(case) or zipped(("good", b"1"), (case, b"/etc/passwd"))))
    said = "its path is not inside the folder" if case in OUTSIDE else "remove the archive and get it again"
    refused(f"set.zip.* {said}", module.unpack, tmp_path / "set.zip", tmp_path / "to")
    assert left(tmp_path / "to") == [] and left(tmp_path) in (["set.zip"], ["set.zip", "to"])
