"""A download ends whole and checked, or with one clear line and a part that can be continued."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from http_server import Answer, Server

from hybridzoo.checkpoints import containers, files, transfer
from hybridzoo.checkpoints.transfer import DownloadError, Policy, fetch

CONTENT = bytes(range(256)) * 2400  # 600 kB
OTHER = CONTENT[::-1]
SHA = hashlib.sha256(CONTENT).hexdigest()
URL = "/weights.pth"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(**{"weights.pth": CONTENT}).running() as running:
        yield running


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights.pth"


def get(server: Server, target: Path, **changes: object) -> list[float]:
    """Fetch without waiting -> the waits there would have been."""
    waits: list[float] = []
    fetch(server.url + URL, target, policy=Policy(**{"stall": 5.0, "sleep": waits.append, **changes}))
    return waits


def left(target: Path) -> list[str]:
    """Names of what lies in the folder, the lock aside."""
    return sorted(p.name for p in target.parent.iterdir() if p.name != ".locks")


def test_a_download_gives_the_file_and_its_hash(server: Server, target: Path) -> None:
    received = fetch(server.url + URL, target, sha256=SHA.upper())
    assert received is not None
    assert (received.size, received.sha256, received.etag) == (len(CONTENT), SHA, f'"{SHA}"')
    assert target.read_bytes() == CONTENT
    assert left(target) == ["weights.pth"]
    assert server.requests[0].headers["User-Agent"].startswith("hybridzoo/")
    assert fetch(server.url + URL, target) is None
    assert len(server.requests) == 1


@pytest.mark.parametrize("cut", [0, 1, 100_000, len(CONTENT) - 1])
def test_a_cut_download_is_resumed(server: Server, target: Path, cut: int) -> None:
    server.script = [Answer(cut=cut)]
    assert len(get(server, target)) == 1
    assert target.read_bytes() == CONTENT
    assert server.sent() == len(CONTENT), "no byte was sent twice"
    assert server.requests[1].headers.get("Range") == (f"bytes={cut}-" if cut else None)
    assert left(target) == ["weights.pth"]


def test_a_connection_closed_before_the_response_is_retried(server: Server, target: Path) -> None:
    server.script = [Answer(status=0), Answer(status=0)]
    assert len(get(server, target)) == 2
    assert target.read_bytes() == CONTENT


def test_a_later_call_resumes(server: Server, target: Path) -> None:
    server.script = [Answer(cut=200_000), *[Answer(status=503)] * 2]
    with pytest.raises(DownloadError, match=r"503 .*; 200,000 bytes are kept; try again to resume"):
        get(server, target, attempts=2)
    assert not target.exists()
    get(server, target)
    assert target.read_bytes() == CONTENT
    assert server.sent() == len(CONTENT)


def test_a_server_without_ranges_starts_over(server: Server, target: Path) -> None:
    server.ranges = False
    server.script = [Answer(cut=200_000)]
    get(server, target)
    assert target.read_bytes() == CONTENT
    assert server.sent() == len(CONTENT) + 200_000


def test_without_a_mark_of_the_version_it_starts_over(server: Server, target: Path) -> None:
    """Two versions of a file could be glued together."""
    server.etags = False
    server.script = [Answer(cut=200_000)]
    get(server, target)
    assert target.read_bytes() == CONTENT
    assert "Range" not in server.requests[1].headers


def test_the_date_of_change_marks_a_version_too(server: Server, target: Path) -> None:
    server.script = [
        Answer(cut=200_000, headers={"ETag": 'W/"weak"', "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"})
    ]
    get(server, target)
    assert server.requests[1].headers["If-Range"] == "Wed, 01 Jan 2025 00:00:00 GMT"
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("careless", [False, True], ids=["server starts over", "server sends the rest of the new file"])
def test_parts_of_different_versions_are_not_joined(server: Server, target: Path, careless: bool) -> None:
    server.script = [Answer(cut=200_000), *[Answer(status=503)] * 2]
    with pytest.raises(DownloadError):
        get(server, target, attempts=2)
    server.files[URL] = OTHER
    if careless:  # ignores If-Range
        span = f"bytes 200000-{len(OTHER) - 1}/{len(OTHER)}"
        server.script = [Answer(status=206, body=OTHER[200_000:], headers={"Content-Range": span})]
    get(server, target)
    assert target.read_bytes() == OTHER


def test_a_part_of_another_address_is_not_continued(server: Server, target: Path) -> None:
    server.files["/older.pth"] = OTHER
    server.script = [Answer(cut=200_000)]
    with pytest.raises(DownloadError):
        fetch(server.url + "/older.pth", target, policy=Policy(attempts=1))
    get(server, target)
    assert target.read_bytes() == CONTENT


def test_a_complete_part_needs_no_request(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed just before the last step."""

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.Part, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            get(server, target)
    assert not target.exists()
    get(server, target)
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_part_that_the_server_refuses_is_discarded(server: Server, target: Path) -> None:
    server.script = [Answer(cut=200_000), Answer(status=416)]
    get(server, target)
    assert target.read_bytes() == CONTENT


def test_a_body_shorter_than_announced_never_becomes_the_file(server: Server, target: Path) -> None:
    server.always = Answer(headers={"Content-Length": str(len(CONTENT) + 7)})
    with pytest.raises(DownloadError, match=r"cut after 614,400 of 614,407 bytes"):
        get(server, target, attempts=3)
    assert not target.exists()


def test_an_empty_answer_never_becomes_the_file(server: Server, target: Path) -> None:
    server.always = Answer(body=b"")
    with pytest.raises(DownloadError, match="empty file"):
        get(server, target, attempts=2)
    assert not target.exists()


@pytest.mark.parametrize("header", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_web_page_is_not_weights(server: Server, target: Path, header: str) -> None:
    server.always = Answer(body=b"\n<!DOCTYPE html><html>log in</html>", headers={"Content-Type": header})
    with pytest.raises(DownloadError, match="leads to a web page, not to weights"):
        get(server, target)
    assert len(server.requests) == 1
    assert not target.exists()
    server.always = Answer()
    get(server, target)
    assert target.read_bytes() == CONTENT


def test_a_complete_file_of_another_kind_is_discarded(server: Server, target: Path) -> None:
    """The body is cut, and nothing says how long it was; then it comes whole, and is a zip archive."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("data", CONTENT)
    server.files[URL] = whole.getvalue()
    server.script = [Answer(cut=200_000, headers={"Content-Length": ""})]
    url = server.url + URL
    with pytest.raises(DownloadError, match=r"pth: the downloaded file is not usable and was discarded: it is cut"):
        fetch(url, target, flaw=containers.flaw)
    assert left(target) == []
    fetch(url, target, flaw=containers.flaw)
    assert target.read_bytes() == whole.getvalue()


@pytest.mark.parametrize("packing", ["gzip", "br, gzip"])
def test_compressed_responses_are_refused(server: Server, target: Path, packing: str) -> None:
    server.script = [Answer(headers={"Content-Encoding": packing})]
    with pytest.raises(DownloadError, match=rf"weights\.pth: is sent with encoding {packing}, which was not requested"):
        get(server, target)
    get(server, target)
    assert target.read_bytes() == CONTENT


def test_an_unrequested_partial_response_is_refused(server: Server, target: Path) -> None:
    server.always = Answer(status=206, headers={"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"})
    with pytest.raises(DownloadError, match=r"the server sends a part of the file, but the whole file was requested"):
        get(server, target)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("ftp://127.0.0.1:9/x", "redirects from http to ftp://127.0.0.1:9/x, which is not followed"),
        ("file:///etc/passwd", "not allowed"),
        ("http://[::1", "redirects to an invalid address"),
        ("http://127.0.0.1:abc/", "redirects to an invalid address"),
        (f"http://{'a' * 70}.com/", "redirects to an invalid address"),
        (URL, "302 and redirects in a circle"),
    ],
)
def test_redirects_that_are_not_followed(server: Server, target: Path, place: str, says: str) -> None:
    server.always = Answer(status=302, headers={"Location": place})
    with pytest.raises(DownloadError, match=rf"/weights\.pth: .*{says}") as caught:
        get(server, target, attempts=2)
    assert "\n" not in str(caught.value)
    assert left(target) == []


def test_no_redirect_leaves_encryption() -> None:
    redirects, asked = transfer._Redirects(), urllib.request.Request("https://example.com/x")
    with pytest.raises(DownloadError, match=r"redirects from https to http://example.com/x, which is not followed"):
        redirects.redirect_request(asked, None, 302, "Found", {}, "http://example.com/x")
    assert redirects.redirect_request(asked, None, 302, "Found", {}, "https://example.com/y").host == "example.com"


def test_a_login_is_sent_only_to_its_host(server: Server, target: Path) -> None:
    with Server(**{"there.pth": CONTENT}).running() as other:
        server.script = [
            Answer(status=307, headers={"Location": "/moved.pth"}),
            Answer(status=302, headers={"Location": f"{other.url}/there.pth"}),
        ]
        fetch(server.url + URL, target, token="secret")
        assert [request.headers.get("Authorization") for request in server.requests] == ["Bearer secret"] * 2
        assert [request.headers.get("Authorization") for request in other.requests] == [None]
    assert target.read_bytes() == CONTENT


def test_a_file_must_have_the_hash_that_the_hub_sends(server: Server, target: Path) -> None:
    """The file is elsewhere, and another one; a later attempt, which sees no promise, does not forget it."""
    promised = hashlib.sha256(OTHER).hexdigest()
    with Server(**{"there.pth": CONTENT}).running() as other:
        there = {"Location": f"{other.url}/there.pth"}
        other.script = [Answer(cut=200_000)]
        server.script = [
            Answer(status=302, headers={**there, "X-Linked-Etag": f'"{promised}"'}),
            Answer(status=302, headers=there),
        ]
        with pytest.raises(DownloadError, match=rf"has SHA-256 {SHA}, expected {promised}; it was discarded"):
            get(server, target)
    assert left(target) == []


def test_google_drives_page_is_named() -> None:
    assert "Google Drive asks to confirm" in transfer._is_a_page("https://drive.google.com/uc?id=1")
    assert "Google" not in transfer._is_a_page("https://example.com/weights.pth")


@pytest.mark.parametrize(
    ("status", "says"), [(404, "no such file"), (410, "removed"), (403, "forbidden"), (401, "login")]
)
def test_a_missing_file_is_reported_at_once(server: Server, target: Path, status: int, says: str) -> None:
    server.always = Answer(status=status)
    with pytest.raises(DownloadError, match=rf"weights\.pth: the server answers {status} .*{says}") as caught:
        get(server, target)
    assert len(server.requests) == 1
    assert "\n" not in str(caught.value)
    assert left(target) == []


def test_waits_grow_and_follow_the_server(server: Server, target: Path) -> None:
    date = formatdate(time.time() + 60, usegmt=True)
    server.script = [
        *[Answer(status=code) for code in (500, 502, 503)],
        Answer(status=429, headers={"Retry-After": "7"}),
        Answer(status=503, headers={"Retry-After": date}),
    ]
    waits = get(server, target, attempts=9, first_wait=1.0)
    assert target.read_bytes() == CONTENT
    assert all(
        low <= wait <= high for wait, low, high in zip(waits, [0.5, 1, 2, 7, 57], [1.5, 3, 6, 7, 61], strict=True)
    )


def test_a_requested_wait_of_an_hour_is_an_error(server: Server, target: Path) -> None:
    server.always = Answer(status=429, headers={"Retry-After": "3600"})
    with pytest.raises(DownloadError, match=r"429 .* requests a wait of 3600 s"):
        get(server, target)
    assert len(server.requests) == 1


def test_it_gives_up(server: Server, target: Path) -> None:
    server.always = Answer(status=503)
    with pytest.raises(DownloadError, match=r"/weights\.pth: the server answers 503") as caught:
        get(server, target, attempts=3)
    assert "kept" not in str(caught.value), "nothing is"
    assert len(server.requests) == 3


def test_progress_resets_the_count_of_failures(server: Server, target: Path) -> None:
    server.script = [Answer(cut=100_000), Answer(status=503), Answer(cut=100_000), Answer(status=503)]
    get(server, target, attempts=2 + 1)
    assert target.read_bytes() == CONTENT
    assert server.sent() == len(CONTENT)


def test_a_server_that_always_cuts_and_starts_over_is_given_up(server: Server, target: Path) -> None:
    server.ranges = False
    server.always = Answer(cut=1000)
    with pytest.raises(DownloadError, match="cut after 1,000 of"):
        get(server, target, attempts=3)
    assert len(server.requests) <= 4


def test_a_silent_connection_is_lost_and_a_slow_one_is_not(server: Server, target: Path) -> None:
    server.script = [Answer(stall=1.0)]
    began = time.monotonic()
    assert len(get(server, target, stall=0.2)) == 1
    assert time.monotonic() - began < 0.9
    assert target.read_bytes() == CONTENT
    target.unlink()
    server.script = [Answer(pace=0.05)]  # half a second in all
    assert get(server, target, stall=0.2) == []


def test_no_network(target: Path) -> None:
    with pytest.raises(DownloadError, match="no connection"):
        fetch("http://127.0.0.1:9/weights.pth", target, policy=Policy(attempts=2, first_wait=0.01))
    assert left(target) == []


def test_a_file_with_a_wrong_hash_is_discarded(server: Server, target: Path) -> None:
    wanted = hashlib.sha256(OTHER).hexdigest()
    with pytest.raises(DownloadError, match=rf"has SHA-256 {SHA}, expected {wanted}; it was discarded"):
        fetch(server.url + URL, target, sha256=wanted)
    assert left(target) == []


class FullDisk:
    """A file on which some bytes fit."""

    def __init__(self, file: object, room: int) -> None:
        self._file, self._room = file, room

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def write(self, block: bytes) -> None:
        self._file.write(block[: self._room])
        if len(block) > self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._room -= len(block)


def test_a_full_disk_keeps_the_downloaded_part(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = files.Part.append
    with monkeypatch.context() as patch:
        patch.setattr(files.Part, "append", lambda part: FullDisk(append(part), 300_000))
        with pytest.raises(DownloadError, match=r"the disk is full; free some space and try again to resume"):
            get(server, target)
    assert len(server.requests) == 1, "a full disk is no reason to try again"
    assert not target.exists()
    kept = target.with_name("weights.pth.part").stat().st_size
    assert kept == 300_000
    get(server, target)
    assert server.requests[-1].headers["Range"] == f"bytes={kept}-"
    assert target.read_bytes() == CONTENT


def test_too_little_disk_space_is_reported_before_the_download(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = transfer.shutil.disk_usage("/")
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        DownloadError,
        match=r"needs 614,400 bytes, .*cache has 1,000 free; make room, or choose another folder by TORCH_HOME",
    ):
        get(server, target)
    assert not target.with_name("weights.pth.part").exists()


@pytest.mark.parametrize("where", ["folder", "file"])
def test_a_read_only_cache_is_named(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    if where == "folder":
        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        monkeypatch.setattr(files.Part, "append", refuse)
    with pytest.raises(
        DownloadError, match=r"cache: cannot be written \(Permission denied\); choose another folder by TORCH_HOME"
    ):
        get(server, target)
    assert len(server.requests) <= 1


def test_links_are_replaced_not_followed(server: Server, target: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    target.parent.mkdir()
    for name in ("weights.pth.part", "weights.pth.part.json"):
        (target.parent / name).symlink_to(precious)
    target.symlink_to(tmp_path / "nowhere")
    get(server, target)
    assert precious.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    assert not target.is_symlink()
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.com/x", "/etc/passwd", "http://", "http://[::1"])
def test_only_http_addresses_are_accepted(target: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="only http and https"):
        fetch(url, target)


def test_a_folder_with_the_files_name(server: Server, target: Path) -> None:
    target.mkdir(parents=True)
    with pytest.raises(DownloadError, match=r"weights\.pth: is a folder; move it away"):
        get(server, target)


def test_proxies_of_the_environment_are_used(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    fetch("http://weights.invalid/weights.pth", target)
    assert target.read_bytes() == CONTENT
    assert server.requests[0].path == "http://weights.invalid/weights.pth"


# The download alone, without the seconds that the package's PyTorch takes to start.
DOWNLOADING = """
import pathlib, sys, types
root = pathlib.Path(sys.argv[1])
for name, folder in (("hybridzoo", root), ("hybridzoo.checkpoints", root / "checkpoints")):
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__, package.__version__ = [str(folder)], "test"
from hybridzoo.checkpoints.transfer import fetch
print("ready", flush=True)
sys.stdin.readline()
print(fetch(sys.argv[2], pathlib.Path(sys.argv[3])))
"""


def fetching(url: str, target: Path) -> subprocess.Popen[str]:
    """Another process that downloads and says how."""
    root = Path(transfer.__file__).resolve().parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", DOWNLOADING, str(root), url, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_killed_process_is_continued_by_the_next(server: Server, target: Path) -> None:
    server.script = [Answer(pace=0.2)]
    process = fetching(server.url + URL, target)
    part = target.with_name("weights.pth.part")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    start(process)
    until = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size >= 1 << 16):
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = part.stat().st_size
    assert 0 < kept < len(CONTENT)
    assert not target.exists()
    get(server, target)
    assert target.read_bytes() == CONTENT
    again = next(request for request in server.gets() if "Range" in request.headers)
    assert again.headers["Range"] == f"bytes={kept}-"
    assert again.sent == len(CONTENT) - kept
    assert left(target) == ["weights.pth"]


def test_of_two_processes_one_downloads(server: Server, target: Path) -> None:
    server.always = Answer(pace=0.05)
    processes = [fetching(server.url + URL, target) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        start(process)
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert sorted(line.startswith("Received") for line in said) == [False, True], said
    assert len(server.requests) == 1
    assert server.sent() == len(CONTENT)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("headers", "limits", "says"),
    [
        ({"Content-Length": ""}, {"largest": 200_000}, "sends more than 200,000 bytes and does not end"),
        ({"Content-Length": ""}, {"spare": 1 << 62}, "does not end"),
        ({"Content-Length": "99999999999"}, {}, "the server announces 99,999,999,999 bytes"),
        ({"Content-Length": "9" * 5000}, {}, "the server announces 99,999,999,999,999,999,999 bytes"),
    ],
)
def test_a_server_that_never_ends(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], limits: dict[str, int],
    says: str,
) -> None:  # fmt: skip
    """It stops at a stated limit, tries no other time, and leaves nothing on the disk."""
    if "spare" in limits:  # a disk with room for half of it
        usage = shutil.disk_usage(target.parents[1])
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(CONTENT)))
    server.always = Answer(headers=headers)
    with pytest.raises(DownloadError, match=says):
        get(server, target, **limits)
    assert left(target) == []
    assert len(server.requests) == 1


def test_a_server_that_is_too_slow(server: Server, target: Path) -> None:
    server.always = Answer(pace=0.05)
    with pytest.raises(DownloadError, match=r"the server is too slow .* try again to resume"):
        get(server, target, patience=0.1, slowest=10_000_000)
    server.always = Answer()
    get(server, target)
    assert target.read_bytes() == CONTENT
    assert any("Range" in request.headers for request in server.gets())
