"""The download of BSD400, from a server on this machine with a registry of five small files."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepreg_fast import data
from deepreg_fast.errors import DataError

FILES = {f"test_{i:03d}.png": bytes([i]) * (100 + i) for i in range(1, 6)}
REGISTRY = {name: hashlib.sha256(body).hexdigest() for name, body in FILES.items()}


class Server(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        self.cut: set[str] = set()
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/data"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.removeprefix("/data/")
        self.server.asked.append(name)
        body = self.server.files.get(name)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if name in self.server.cut else body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    httpd = Server()
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_download_fetches_everything_once(server: Server, tmp_path: Path):
    steps: list[tuple[int, int]] = []
    folder = tmp_path / "new" / "bsd"
    got = data.download_bsd400(folder, server.url, REGISTRY, lambda done, total: steps.append((done, total)))
    assert got == folder
    assert contents(folder) == FILES
    assert steps == [(i, 5) for i in range(6)]
    server.asked.clear()
    data.download_bsd400(folder, server.url + "/", REGISTRY)
    assert server.asked == []


def test_download_fetches_again_what_is_missing_or_damaged(server: Server, tmp_path: Path):
    data.download_bsd400(tmp_path, server.url, REGISTRY)
    (tmp_path / "test_002.png").unlink()
    (tmp_path / "test_004.png").write_bytes(b"half")
    server.asked.clear()
    data.download_bsd400(tmp_path, server.url, REGISTRY)
    assert server.asked == ["test_002.png", "test_004.png"]
    assert contents(tmp_path) == FILES


def test_wrong_hash_is_thrown_away_and_the_good_files_stay(server: Server, tmp_path: Path):
    server.files["test_003.png"] = b"not that image"
    with pytest.raises(DataError, match=r"test_003\.png with the SHA-256.*thrown away"):
        data.download_bsd400(tmp_path, server.url, REGISTRY)
    good = {name: FILES[name] for name in ("test_001.png", "test_002.png")}
    assert contents(tmp_path) == good
    server.files["test_003.png"] = FILES["test_003.png"]
    server.asked.clear()
    data.download_bsd400(tmp_path, server.url, REGISTRY)
    assert server.asked == ["test_003.png", "test_004.png", "test_005.png"]
    assert contents(tmp_path) == FILES


def test_a_wrong_hash_leaves_the_file_that_was_there(server: Server, tmp_path: Path):
    (tmp_path / "test_001.png").write_bytes(b"mine")
    server.files["test_001.png"] = b"not that image"
    with pytest.raises(DataError, match="thrown away"):
        data.download_bsd400(tmp_path, server.url, REGISTRY)
    assert contents(tmp_path) == {"test_001.png": b"mine"}


def test_interrupted_transfer_leaves_nothing_under_the_name(server: Server, tmp_path: Path):
    server.cut.add("test_002.png")
    with pytest.raises(DataError, match=r"test_002\.png"):
        data.download_bsd400(tmp_path, server.url, REGISTRY)
    assert contents(tmp_path) == {"test_001.png": FILES["test_001.png"]}
    server.cut.clear()
    data.download_bsd400(tmp_path, server.url, REGISTRY)
    assert contents(tmp_path) == FILES


def test_missing_file_on_the_server_and_no_server(server: Server, tmp_path: Path):
    del server.files["test_001.png"]
    with pytest.raises(DataError, match=r"download failed \(404.*run the same command again"):
        data.download_bsd400(tmp_path, server.url, REGISTRY)
    with pytest.raises(DataError, match="download failed"):
        data.download_bsd400(tmp_path, "http://127.0.0.1:1/data", REGISTRY)
    with pytest.raises(DataError, match="download failed"):
        data.download_bsd400(tmp_path, "no-url", REGISTRY)
    assert contents(tmp_path) == {}


def test_download_into_a_place_that_cannot_be_a_folder(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(DataError, match="cannot be made"):
        data.download_bsd400(file, "http://127.0.0.1:1", REGISTRY)
    assert file.read_text() == "x"


def test_download_onto_a_folder_of_that_name(server: Server, tmp_path: Path):
    (tmp_path / "test_001.png").mkdir()
    with pytest.raises(DataError, match=r"test_001\.png cannot be written"):
        data.download_bsd400(tmp_path, server.url, REGISTRY)
    assert (tmp_path / "test_001.png").is_dir()


def test_the_upstream_address_is_pinned_to_a_commit():
    assert re.fullmatch(r"https://[^/]+/cszn/DnCNN/[0-9a-f]{40}/.*/Train400/", data.BASE_URL)
