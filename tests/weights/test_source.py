import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from novajax.core.errors import WeightsError
from novajax.weights.source import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 100,
    "chat_template.jinja": b"{{ x }}",
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "original/params.json": b"{}",
    "consolidated.safetensors": b"again",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        type(self).asked.append(path)
        if path.startswith("/api/models/org/name/revision/main"):
            self.reply(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": []}).encode(), body, "application/json")
        elif path.startswith(f"/api/models/org/name/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for name, data in FILES.items()
            ]
            self.reply(json.dumps(tree).encode(), body, "application/json")
        elif path.startswith(f"/org/name/resolve/{COMMIT}/"):
            self.reply(FILES[path.split("/", 5)[5]], body, "application/octet-stream")
        elif path.startswith("/api/models/org/name/revision/"):
            self.reply(b"{}", body, "application/json", 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            self.reply(b"{}", body, "application/json", 404, {"X-Error-Code": "RepoNotFound"})

    def reply(self, data: bytes, body: bool, kind: str, status: int = 200, extra: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(data)), "X-Repo-Commit": COMMIT}
        headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
        for key, value in (headers | (extra or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub():
    class Recorder(Hub):
        asked = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", Recorder.asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_directory_is_itself(tmp_path: Path):
    assert resolve(str(tmp_path)).directory == tmp_path.resolve()
    assert resolve(str(tmp_path)).commit is None


@pytest.mark.parametrize("spec", ["", "/no/such/place", "a/b/c", "one-word", "../x", "org/name@", "org/na me", "org/name@re vision"])
def test_neither_directory_nor_id(spec: str, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(WeightsError, match="neither a directory here nor a hub id"):
        resolve(spec)


def test_a_file_is_refused(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="name the directory"):
        resolve(str(tmp_path / "model.safetensors"))


def test_a_hub_id_is_fetched_once_and_pinned_to_its_commit(tmp_path: Path, hub: tuple[str, list[str]]):
    endpoint, asked = hub
    source = resolve("org/name", cache_dir=tmp_path, endpoint=endpoint)
    assert (source.name, source.commit, source.pinned) == ("org/name", COMMIT, f"org/name@{COMMIT}")
    assert {path.name for path in source.directory.iterdir()} == {"config.json", "model.safetensors", "chat_template.jinja"}
    assert (source.directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    before = len(asked)
    assert resolve(source.pinned, cache_dir=tmp_path, endpoint=endpoint) == source
    assert len(asked) == before, "a pinned id that is in the cache asks nobody"
    assert resolve("org/name", cache_dir=tmp_path, endpoint="http://127.0.0.1:9") == source, "an unreachable hub: the cached main"


@pytest.mark.parametrize(
    ("spec", "why"),
    [("org/other", "has no such model"), ("org/name@gone", "this revision does not"), (f"org/name@{'f' * 40}", "org/name@f")],
)
def test_what_the_hub_refuses_is_told_with_id_and_revision(tmp_path: Path, hub: tuple[str, list[str]], spec: str, why: str):
    with pytest.raises(WeightsError, match=why) as error:
        resolve(spec, cache_dir=tmp_path, endpoint=hub[0])
    assert (spec if "@" in spec else spec + "@main") in error.value.message


def test_no_hub_and_no_cache(tmp_path: Path):
    with pytest.raises(WeightsError, match="org/name@main: the hub cannot be reached"):
        resolve("org/name", cache_dir=tmp_path, endpoint="http://127.0.0.1:9")


def test_offline_mode_uses_the_cache_and_no_socket(tmp_path: Path, hub: tuple[str, list[str]]):
    source = resolve("org/name", cache_dir=tmp_path, endpoint=hub[0])
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise SystemExit('a socket was opened')\n"
        "socket.socket.connect = refuse\n"
        "from pathlib import Path\n"
        "from novajax.weights.source import resolve\n"
        "print(resolve('org/name', cache_dir=Path(sys.argv[1])).directory)\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.strip() == str(source.directory), done.stderr
