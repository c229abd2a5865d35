"""Downloads against a server on this machine that misbehaves in every known way; zips that are broken or meant to harm."""

import hashlib
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from deepknn_lib import download
from deepknn_lib.download import Remote, fetch, unpack

BODY = random.Random(0).randbytes(400_000)
MD5 = "md5:" + hashlib.md5(BODY).hexdigest()
MANUAL = "Get it by hand: open the page, put data.bin into the folder."


class Handler(BaseHTTPRequestHandler):
    """Serves `server.body` as the next entry of `server.plan` says, or as `server.always` does."""

    def do_GET(self):
        server = self.server
        with server.guard:
            how = server.plan.pop(0) if server.plan else server.always
            server.requests.append(dict(self.headers))
        if "to" in how:
            self.send_response(302)
            self.send_header("Location", how["to"])
            return self.end_headers()
        body, etag = how.get("body", b"" if "status" in how else server.body), how.get("etag", server.etag)
        start, wanted = 0, self.headers.get("Range") if server.ranges else None
        if wanted and self.headers.get("If-Range", etag) == etag or wanted and how.get("glue"):
            start = int(wanted.removeprefix("bytes=").rstrip("-")) + how.get("shift", 0)
        if how.get("status", 200) == 200 and start >= len(body):
            how = {"status": 416, "body": b""}
            body, start = b"", 0
        self.send_response(how.get("status", 206 if start else 200))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if etag:
            self.send_header("ETag", etag)
        length = how.get("length", len(body) - start)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Content-Type", how.get("type", "application/octet-stream"))
        self.end_headers()
        rest = body[start:]
        try:
            if "pause" in how:
                self.put(rest[: how["pause"]])
                server.go.wait(10)
                rest = rest[how["pause"] :]
            self.put(rest[: how.get("cut")])
        except OSError:
            pass  # the client has gone

    def put(self, data):
        self.wfile.write(data)
        with self.server.guard:
            self.server.sent += len(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    vars(server).update(body=BODY, etag='"one"', ranges=True, plan=[], always={}, requests=[], sent=0)
    server.guard, server.go, server.url = threading.Lock(), threading.Event(), f"http://127.0.0.1:{server.server_port}/data"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.go.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(download, "WAITS", (0, 0.01))
    monkeypatch.setattr(download, "TIMEOUT", (2, 0.4))


@pytest.fixture
def get(server, tmp_path):
    """Fetches the server's file into `get.folder`; what is known of it and the url can be given."""

    def get(checksum=MD5, size=None, url=None, name="data.bin"):
        return fetch(Remote(url or server.url, name, checksum, size), get.folder, MANUAL)

    get.folder = tmp_path / "data"
    return get


def left(folder):
    """What a download or an unpacking left behind, but for lock files."""
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock")) if folder.exists() else []


def fails(error, get, *words, parts=(), **known):
    """The call fails with a one-line message that holds the words; of the file only a part may be left."""
    with pytest.raises(error) as caught:
        get(**known)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (*words, "data.bin")), message
    assert message.endswith(MANUAL) and left(get.folder) == list(parts)
    return caught.value


PART = [".data.bin.part", ".data.bin.part.etag"]


def holds_it(get, server, most=400_000):
    assert (get.folder / "data.bin").read_bytes() == BODY and left(get.folder) == ["data.bin"]
    assert server.sent <= most


@pytest.mark.parametrize("known", [{}, {"checksum": None}, {"checksum": None, "size": len(BODY)}, {"size": len(BODY)}])
def test_plain_download_happens_once(get, server, known):
    assert get(**known) == get.folder / "data.bin" == get(**known)
    holds_it(get, server)
    assert len(server.requests) == 1


def test_sha256_and_a_server_that_tells_no_length(get, server):
    server.always = {"length": None}
    get("sha256:" + hashlib.sha256(BODY).hexdigest().upper())
    holds_it(get, server)


def test_a_file_that_is_there_needs_no_server_and_no_writable_folder(get, monkeypatch):
    get.folder.mkdir()
    (get.folder / "data.bin").write_bytes(BODY)
    monkeypatch.setattr(download, "locked", None)
    for known in ({}, {"checksum": None}, {"size": len(BODY)}):
        get(url="http://127.0.0.1:1/", **known)


@pytest.mark.parametrize("known", [{}, {"size": len(BODY)}, {"checksum": None, "size": len(BODY)}])
def test_a_wrong_file_of_the_user_is_named_and_kept(get, server, known):
    get.folder.mkdir()
    (get.folder / "data.bin").write_bytes(BODY[:1000])
    with pytest.raises(ValueError, match=r"data.bin is not the file of .*: expected .*, got .*; remove or replace it"):
        get(**known)
    assert (get.folder / "data.bin").read_bytes() == BODY[:1000] and not server.requests


def test_a_cut_connection_goes_on_where_it_stopped(get, server):
    server.plan = [{"cut": 150_000}, {"cut": 100_000}]
    get()
    holds_it(get, server)
    assert [r.get("Range") for r in server.requests] == [None, "bytes=150000-", "bytes=250000-"]
    assert server.requests[1]["If-Range"] == '"one"'


def test_many_cuts_are_borne_as_long_as_bytes_come(get, server):
    server.always = {"cut": 50_000}
    get()
    holds_it(get, server)
    assert len(server.requests) == 8 > download.TRIES


def test_without_ranges_a_cut_starts_anew_and_gives_up_in_the_end(get, server):
    server.ranges = False
    server.plan = [{"cut": 150_000}]
    get()
    holds_it(get, server, len(BODY) + 150_000)
    (get.folder / "data.bin").unlink()
    server.requests, server.always = [], {"cut": 150_000}
    fails(FileNotFoundError, get, "could not download", server.url, parts=PART)
    assert len(server.requests) == download.TRIES


def test_a_later_call_goes_on(get, server, monkeypatch):
    server.always = {"cut": 0}
    server.plan = [{"cut": 150_000}]
    fails(FileNotFoundError, get, parts=PART)
    server.always = {}
    get()
    holds_it(get, server)


@pytest.mark.parametrize("known", [{}, {"checksum": None}, {"checksum": None, "size": len(BODY)}])
@pytest.mark.parametrize("glue", [False, True])
def test_a_file_that_changed_meanwhile_is_not_glued(get, server, known, glue):
    server.plan = [{"cut": 150_000, "body": bytes(len(BODY)), "etag": '"old"'}, {"glue": glue}]
    get(**known)
    holds_it(get, server, 150_000 + 2 * len(BODY))


def test_without_a_validator_only_a_checksum_lets_it_go_on(get, server):
    server.etag = None
    server.plan = [{"cut": 150_000}]
    get()
    assert "Range" in server.requests[1] and "If-Range" not in server.requests[1]
    (get.folder / "data.bin").unlink()
    server.plan, server.requests = [{"cut": 150_000}], []
    get(checksum=None, size=len(BODY))
    assert "Range" not in server.requests[1]
    (get.folder / "data.bin").unlink()
    server.plan = [{"cut": 150_000, "body": bytes(len(BODY))}]
    get()  # glued, noticed, and fetched anew
    holds_it(get, server, 10**9)


def test_a_weak_etag_is_no_validator(get, server):
    server.etag = 'W/"one"'
    server.plan = [{"cut": 150_000}]
    get(checksum=None)
    assert "Range" not in server.requests[1]


@pytest.mark.parametrize("extra", [0, 5])
def test_a_part_that_is_too_long_is_thrown_away(get, server, extra):
    get.folder.mkdir()
    (get.folder / ".data.bin.part").write_bytes(bytes(len(BODY) + extra))
    get()
    assert [r.get("Range") for r in server.requests] == [f"bytes={len(BODY) + extra}-", None]  # 416 in between
    holds_it(get, server)


def test_a_range_that_starts_elsewhere_is_not_glued(get, server):
    server.plan = [{"cut": 150_000}, {"shift": -7}]
    get(checksum=None)
    holds_it(get, server, 10**9)


def test_a_whole_part_is_only_compared(get, server):
    get.folder.mkdir()
    (get.folder / ".data.bin.part").write_bytes(BODY)
    os.link(get.folder / ".data.bin.part", get.folder / "tmpabc")  # killed while comparing
    get(size=len(BODY))
    assert not server.requests
    holds_it(get, server)


def test_a_length_that_is_too_big(get, server):
    server.plan = [{"length": len(BODY) + 9}]
    get(checksum=None)
    holds_it(get, server, 2 * len(BODY))
    (get.folder / "data.bin").unlink()
    server.always = {"length": len(BODY) + 9}
    fails(FileNotFoundError, get, "cut after 400000 of 400009 bytes", parts=PART)


@pytest.mark.parametrize("known", [{}, {"checksum": None, "size": len(BODY)}])
def test_a_length_that_is_too_small(get, server, known):
    server.plan = [{"length": 1000}]
    get(**known)
    holds_it(get, server, 2 * len(BODY))
    (get.folder / "data.bin").unlink()
    server.always, server.requests = {"length": 1000}, []
    fails(ValueError, get, "another file than expected", "may have changed at its home", **known)
    assert len(server.requests) == 2


def test_more_bytes_than_expected_without_a_length(get, server):
    server.always = {"length": None}
    fails(ValueError, get, "expected 1000 bytes, got more", size=1000)


def test_wrong_bytes_once_and_twice(get, server):
    wrong = bytes(len(BODY))
    server.plan = [{"body": wrong}]
    get()
    holds_it(get, server, 2 * len(BODY))
    (get.folder / "data.bin").unlink()
    server.always, server.requests = {"body": wrong}, []
    fails(ValueError, get, f"expected {MD5} but got {hashlib.md5(wrong).hexdigest()}", server.url, "may have changed")
    assert [r.get("Range") for r in server.requests] == [None, None]


@pytest.mark.parametrize("known", [{}, {"checksum": None}, {"checksum": None, "size": len(BODY)}])
def test_a_web_page_in_place_of_the_file(get, server, known):
    server.always = {"body": b"<html>please log in</html>", "type": "text/html; charset=utf-8"}
    fails(ValueError, get, server.url, **known)
    if known:
        assert get(name="page.html", checksum=None).read_bytes().startswith(b"<html>")


def test_redirects(get, server):
    server.plan = [{"to": server.url + "/elsewhere"}]
    get()
    holds_it(get, server)
    (get.folder / "data.bin").unlink()
    server.always = {"to": server.url}
    fails(FileNotFoundError, get, "redirects")


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_is_not_tried_again(get, server, status):
    server.always = {"status": status}
    fails(FileNotFoundError, get, f"HTTP {status}", server.url)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_overloaded_server_is_tried_again(get, server, status):
    server.plan = [{"cut": 150_000}, {"status": status}, {"status": status}]
    get()
    holds_it(get, server, 2 * len(BODY))
    assert server.requests[3]["Range"] == "bytes=150000-"  # the part outlives the refusals
    (get.folder / "data.bin").unlink()
    server.always, server.requests = {"status": status}, []
    fails(FileNotFoundError, get, f"HTTP {status}")
    assert len(server.requests) == download.TRIES


def test_a_server_that_stalls(get, server, capfd):
    server.plan = [{"pause": 131_072}]
    get()
    holds_it(get, server)
    assert "trying again" in capfd.readouterr().err


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/data.bin", "nonsense", "http:///data.bin"])
def test_nothing_answers(get, url):
    error = fails(FileNotFoundError, get, f"could not download {url} (", url=url)
    assert error.__cause__ is not None


def run(code, *arguments, **options):
    """A process that downloads; its waits are short, too."""
    start = "import sys; from pathlib import Path; from deepknn_lib import download; download.WAITS = (0,);"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", start + code, *map(str, arguments)], **pipes, **options)


CALL = "print(download.fetch(download.Remote(sys.argv[1], 'data.bin', sys.argv[3]), Path(sys.argv[2]), 'By hand.'))"


def until(what):
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGINT"])
def test_a_killed_process_leaves_a_part_to_go_on_from(get, server, signal):
    import signal as signals

    server.plan = [{"pause": 262_144}]
    # a test run in the background of a shell inherits that Ctrl-C is ignored
    heed = {"preexec_fn": lambda: signals.signal(signals.SIGINT, signals.SIG_DFL)}
    process = run(CALL, server.url, get.folder, MD5, **heed)
    until(lambda: (get.folder / ".data.bin.part").exists() and (get.folder / ".data.bin.part").stat().st_size >= 196_608)
    process.send_signal(getattr(signals, signal))
    process.communicate(timeout=100)
    assert left(get.folder) == PART
    server.plan = []
    get()
    assert int(server.requests[-1]["Range"][6:-1]) >= 196_608
    holds_it(get, server, len(BODY) + 65_536)


def test_two_processes_download_once(get, server):
    server.always = {"pause": 100_000}
    first = run(CALL, server.url, get.folder, MD5)
    until(lambda: server.requests)
    second = run(CALL, server.url, get.folder, MD5)
    said = second.stderr.readline()
    server.go.set()
    for process in (first, second):
        out, _ = process.communicate(timeout=100)
        assert process.returncode == 0 and out.strip() == str(get.folder / "data.bin")
    assert "waiting for another process" in said and len(server.requests) == 1
    holds_it(get, server)


def test_a_full_disk_while_writing(get, server):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000));"
    process = run(limit + CALL, server.url, get.folder, MD5)
    _, error = process.communicate(timeout=100)
    last = error.strip().splitlines()[-1]
    assert last.startswith("OSError: no room for") and "250000 more bytes needed" in last and last.endswith("By hand.")
    assert left(get.folder) == PART and len(server.requests) == 1
    get()
    holds_it(get, server, 2 * len(BODY) - 150_000)


@pytest.mark.parametrize("known", [{}, {"checksum": None, "size": len(BODY)}])
def test_a_disk_that_is_too_small_is_noticed_before(get, server, known, monkeypatch):
    server.plan, server.always = [{"cut": 150_000}], {"cut": 0}
    fails(FileNotFoundError, get, parts=PART, **known)
    server.always = {}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=249_999))
    fails(OSError, get, "250000 more bytes needed, 249999 free", "make room", parts=PART, **known)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=250_000))
    get(**known)
    holds_it(get, server, 2 * len(BODY))


def test_a_folder_that_cannot_be_written_to(get, server, monkeypatch):
    get.folder.write_text("a file")
    with pytest.raises(PermissionError, match="cannot write to the folder .*data.*make it writable"):
        get()
    get.folder.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="permission denied.*DEEPKNN_DATA"):
        get()
    assert not server.requests


def test_import_needs_nothing_heavy():
    code = "print([m for m in ('pooch', 'requests', 'urllib3', 'filelock') if m in sys.modules])"
    assert run(code).communicate(timeout=100)[0].strip() == "[]"


def zipped(path, *members, method=zipfile.ZIP_DEFLATED):
    """A zip of (name or ZipInfo, contents)."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, contents in members:
            archive.writestr(name, contents)
    return path


def refused(error, archive, folder, *words):
    before = left(folder)
    with pytest.raises(error) as caught:
        unpack(archive, folder)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (str(archive), *words)), message
    assert left(folder) == before and not list(folder.parent.glob("x*"))
    return message


def test_unpack_and_once_more(tmp_path):
    names = ["images/Größe ü 1.png", "images/deep er/b.txt", "top.csv", "日本/ё.jpg"]
    junk = [("__MACOSX/._top.csv", b"x"), ("images/.DS_Store", b"x")]
    archive = zipped(tmp_path / "set.zip", ("images/", b""), *((n, n.encode()) for n in names), *junk)
    for folder in (tmp_path / "other", tmp_path):
        unpack(archive, folder)
        for name in names:
            assert (folder / name).read_bytes() == name.encode()
    assert left(tmp_path / "other") == ["images", "top.csv", "日本"]
    assert not list(tmp_path.rglob(".DS_Store"))
    (tmp_path / "top.csv").unlink()
    stamp = (tmp_path / "images").stat().st_mtime_ns
    unpack(archive, tmp_path)  # what is missing comes back, the rest stays
    assert (tmp_path / "top.csv").exists() and (tmp_path / "images").stat().st_mtime_ns == stamp


def test_unpack_overwrites_nothing(tmp_path):
    archive, folder = zipped(tmp_path / "set.zip", ("a/one.txt", b"1"), ("b.txt", b"2")), tmp_path / "to"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "one.txt").write_bytes(b"mine")
    refused(FileExistsError, archive, folder, "one.txt")
    assert (folder / "a" / "one.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "C:\\x", "C:x", "..\\x", "a\\x"])
def test_members_that_leave_the_folder(tmp_path, name):
    member = zipfile.ZipInfo("y")
    member.filename = name
    archive = zipped(tmp_path / "set.zip", ("good.txt", b"1"), (member, b"2"))
    refused(ValueError, archive, tmp_path / "to", repr(name), "not inside the folder")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_members_that_are_no_files(tmp_path, kind):
    member = zipfile.ZipInfo("link")
    member.external_attr = (kind | 0o777) << 16
    refused(ValueError, zipped(tmp_path / "set.zip", ("good", b""), (member, b"/")), tmp_path / "to", "'link'", "special")


@pytest.mark.parametrize("twin", ["a/one.txt", "A/ONE.txt", "./a/one.txt"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_doubled_members(tmp_path, twin):
    archive = zipped(tmp_path / "set.zip", ("a/one.txt", b"1"), (twin, b"2"))
    refused(ValueError, archive, tmp_path / "to", repr(twin), "twice")


def test_a_member_that_is_a_file_and_a_folder(tmp_path):
    refused(ValueError, zipped(tmp_path / "set.zip", ("a", b"1"), ("a/b", b"2")), tmp_path / "to", "a/b")


def test_encrypted_members(tmp_path):
    archive = zipped(tmp_path / "set.zip", ("secret", b"1"))
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    archive.write_bytes(data)
    refused(ValueError, archive, tmp_path / "to", "'secret'", "encrypted", "by hand")


def test_broken_zips(tmp_path):
    archive = zipped(tmp_path / "set.zip", ("a/good", b"1"), ("a/bad", BODY), method=zipfile.ZIP_STORED)
    whole = archive.read_bytes()
    for data in (whole[:-30], whole[: len(whole) // 2], b"<html>no zip</html>", b""):
        archive.write_bytes(data)
        refused(ValueError, archive, tmp_path / "to", "broken", "get it again")
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    archive.write_bytes(damaged)
    refused(ValueError, archive, tmp_path / "to", "a/bad", "CRC")
    with pytest.raises(ValueError, match="holds no files"):
        unpack(zipped(archive), tmp_path / "to")
    archive.unlink()
    refused(FileNotFoundError, archive, tmp_path / "to")


def test_random_damage_is_an_error_or_harmless(tmp_path):
    archive, dice = zipped(tmp_path / "set.zip", ("a/ä", BODY[:900]), ("b", bytes(900))), random.Random(0)
    whole = archive.read_bytes()
    for number in range(150):
        data, folder = bytearray(whole), tmp_path / f"to{number}"
        for _ in range(3):
            data[dice.randrange(len(data))] = dice.randrange(256)
        archive.write_bytes(data)
        try:
            unpack(archive, folder)
        except ValueError as error:
            assert str(archive) in str(error) and left(folder) == []
        shutil.rmtree(folder)


def test_zip_bombs(tmp_path, monkeypatch):
    archive, folder = tmp_path / "set.zip", tmp_path / "to"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("small", b"1")
        file.writestr("huge", bytes(1000))
        file.filelist[1].file_size = 3 * 10**9  # as the directory declares it
    refused(ValueError, archive, folder, "'huge'", "3000000001 bytes")
    zipped(archive, ("zeros", bytes(10**6)))
    unpack(archive, folder)  # far over the ratio, but too small to harm
    monkeypatch.setattr(download, "BOMB_BYTES", 10**5)
    refused(ValueError, archive, folder, "'zeros'")
    unpack(zipped(archive, ("noise", BODY)), folder)


def test_a_disk_too_small_to_unpack(tmp_path, monkeypatch):
    archive = zipped(tmp_path / "set.zip", ("noise", BODY))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=399_999))
        refused(OSError, archive, tmp_path / "to", "400000 bytes needed, 399999 free")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000));"
        "download.unpack(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    _, error = run(code, archive, tmp_path / "to").communicate(timeout=100)
    assert "no room to unpack" in error.splitlines()[-1] and "noise" in error and left(tmp_path / "to") == []


def test_what_a_killed_unpacking_left_is_swept(tmp_path):
    archive = zipped(tmp_path / "set.zip", ("a/new", b"1"))
    (tmp_path / ".set.zip.unpacking" / "a").mkdir(parents=True)
    (tmp_path / ".set.zip.unpacking" / "a" / "old").write_text("")
    unpack(archive, tmp_path)
    assert left(tmp_path) == ["a", "set.zip"] and left(tmp_path / "a") == ["new"]
