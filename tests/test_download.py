"""Fetching the official weights, from a server of our own that answers as the hub does."""

import hashlib
import http.server
import re
import threading
from typing import ClassVar

import pytest

from ControlNet.cldm.files import ModelError
from ControlNet.cldm.weights import download_sd15

pytest.importorskip("huggingface_hub")

CONTENT = bytes(range(256)) * 20_000  # 5 MB
NAME = "control_sd15_canny.pth"


class Hub(http.server.BaseHTTPRequestHandler):
    """/<repository>/resolve/main/<file> redirects to where the bytes are, with their size and checksum."""

    content = CONTENT
    checksum = hashlib.sha256(CONTENT).hexdigest()
    stop_after: ClassVar[list[int]] = []  # bytes of the next answers, then whole ones
    ranges = True
    requests: ClassVar[list[str]] = []

    def do_HEAD(self):
        cls = type(self)
        cls.requests.append(f"HEAD {self.path}")
        if self.path != "/lllyasviel/ControlNet/resolve/main/models/control_sd15_canny.pth":
            self.send_error(404)
            return
        self.send_response(302)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("X-Linked-Size", str(len(cls.content)))
        self.send_header("X-Linked-Etag", f'"{cls.checksum}"')
        self.send_header("Location", f"http://localhost:{self.server.server_port}/bytes")  # of another host
        self.end_headers()

    def do_GET(self):
        cls = type(self)
        cls.requests.append(f"GET {self.headers.get('Range', 'all')}")
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(first[1]) if first and cls.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(cls.content) - start))
        self.end_headers()
        end = start + cls.stop_after.pop(0) if cls.stop_after else len(cls.content)
        self.wfile.write(cls.content[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """(handler class, address)"""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before a further try
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500_000)  # less is not kept of what breaks off
    handler = type("Handler", (Hub,), {"requests": [], "stop_after": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_is_fetched_once(hub, tmp_path):
    handler, endpoint = hub
    folder = tmp_path / "models"
    assert download_sd15(folder, endpoint) == folder / NAME
    assert (folder / NAME).read_bytes() == CONTENT
    assert files(folder) == [NAME]
    asked = list(handler.requests)
    download_sd15(folder, endpoint)
    assert handler.requests == asked


def test_a_connection_that_breaks_is_taken_up_again(hub, tmp_path):
    handler, endpoint = hub
    handler.stop_after = [2_000_000, 1_500_000]
    download_sd15(tmp_path, endpoint)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert handler.requests[-1] == "GET bytes=3500000-"


def test_a_download_that_broke_off_leaves_nothing_behind(hub, tmp_path):
    handler, endpoint = hub
    handler.stop_after = [2_000_000] + [0] * 9
    with pytest.raises(ModelError, match=r"can't fetch .*start it again"):
        download_sd15(tmp_path, endpoint)
    assert files(tmp_path) == []
    handler.stop_after = []
    download_sd15(tmp_path, endpoint)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert files(tmp_path) == [NAME]


def test_other_contents_than_promised_are_thrown_away(hub, tmp_path):
    handler, endpoint = hub
    handler.content = CONTENT[::-1]
    with pytest.raises(ModelError, match="is not the official file"):
        download_sd15(tmp_path, endpoint)
    assert files(tmp_path) == []
    handler.content = CONTENT
    download_sd15(tmp_path, endpoint)
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_a_file_that_broke_off_is_fetched_anew(hub, tmp_path):
    """Somebody's browser may have left it there: the zip's table says that more should follow."""
    import torch

    _, endpoint = hub
    torch.save({"a": torch.zeros(50_000)}, tmp_path / NAME)
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:100_000])
    download_sd15(tmp_path, endpoint)
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_no_connection_is_said_in_words(tmp_path):
    with pytest.raises(ModelError, match=r"can't fetch http://127.0.0.1:9/lllyasviel.*copy the file to"):
        download_sd15(tmp_path, "http://127.0.0.1:9")


def test_a_hub_without_the_file_is_said_in_words(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("ControlNet.cldm.weights.OFFICIAL_FILE", "models/elsewhere.pth")
    with pytest.raises(ModelError, match=r"can't fetch .*elsewhere.pth \(.*404"):
        download_sd15(tmp_path, hub[1])


def test_a_folder_that_can_not_be_written_is_said_in_words(hub, tmp_path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(ModelError, match=r"can't save .*models"):
        download_sd15(tmp_path / "models", hub[1])
