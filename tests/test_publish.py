"""Pushing a doctor to a hub: a server that speaks the hub's protocol takes the files, or refuses them."""

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import pytest

from llmdoctor.errors import LLMDoctorError, LoadError
from llmdoctor.training.publish import push_to_hub

FILES = {
    "README.md": b"# A card\n",
    "doctor.json": b'{"base_model": "m"}',
    "adapter/adapter_model.safetensors": bytes(range(256)),
}


class Hub(ThreadingHTTPServer):
    """Keeps what is committed; with ``refusal`` it answers every request with that status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Talk)
        self.files: dict[str, bytes] = {}
        self.made: dict[str, object] = {}
        self.refusal = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Talk(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self._body()
        if self.server.refusal:
            self._say(self.server.refusal, {"error": "no"})
        elif self.path == "/api/repos/create":
            self.server.made = json.loads(body)
            self._say(200, {"url": f"{self.server.url}/org/doctor"})
        elif self.path == "/api/validate-yaml":  # of the model card
            self._say(200, {"errors": [], "warnings": []})
        elif self.path.startswith("/api/models/org/doctor/preupload/main"):
            named = [file["path"] for file in json.loads(body)["files"]]
            self._say(
                200,
                {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in named]},
            )
        elif self.path.startswith("/api/models/org/doctor/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._say(200, {"commitUrl": f"{self.server.url}/org/doctor/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self._say(404, {"error": self.path})

    def do_GET(self) -> None:
        self._say(404, {"error": self.path})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _say(self, status: int, what: object) -> None:
        body = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {**FILES, ".cache/junk": b"x"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_the_hub_gets_the_files_of_the_folder_and_nothing_hidden(hub: Hub, folder: Path) -> None:
    assert push_to_hub(folder, "org/doctor", private=True) == f"{hub.url}/org/doctor"
    assert hub.files == FILES
    assert (hub.made["name"], hub.made["organization"]) == ("doctor", "org")
    assert hub.made.get("visibility") == "private" or hub.made.get("private")  # newer and older clients


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refusal_is_one_line(hub: Hub, folder: Path, status: int) -> None:
    hub.refusal = status
    with pytest.raises(LLMDoctorError, match=f"^cannot send .* to org/doctor: .*{status}") as caught:
        push_to_hub(folder, "org/doctor")
    assert "\n" not in str(caught.value)
    assert hub.files == {}


@pytest.mark.parametrize("held", [b"", b"{", b"[" * 5000, b"[]", b"{}", b'{"base_model": [1]}', b"\xff"])
def test_a_damaged_doctor_is_not_sent(hub: Hub, folder: Path, held: bytes) -> None:
    (folder / "doctor.json").write_bytes(held)
    with pytest.raises(LoadError, match=r"doctor\.json"):
        push_to_hub(folder, "org/doctor")
    assert hub.made == {}
