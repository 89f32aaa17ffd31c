"""A Hugging Face Hub on this machine: what its library asks of one, for folders as repositories."""

import hashlib
import json
import shutil
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from glm_fused.checkpoint.paths import bundled_folder

NAME = "makers/demo-model"
WEIGHTS = "model.safetensors"


class Hub:
    """What a server has, and how it behaves.

    Attributes:
        folders: the repositories, by name; each has the one branch main.
        asked: of each request (method, path, range).
        breaks: bytes of a file after which a connection is cut, by file; each once.
        slow: files that stop after half of their bytes until `release` is set.
        refuses: a repository's status and the code that tells why.
    """

    def __init__(self, folders):
        self.folders, self.asked = dict(folders), []
        self.breaks, self.slow, self.refuses = {}, set(), {}
        self.release = threading.Event()
        self.url = ""

    def commit(self, name):
        """The commit of main, which the files' names and bytes decide."""
        state = hashlib.sha1(name.encode())
        for path, file in self.files(name).items():
            state.update(path.encode() + file.read_bytes())
        return state.hexdigest()

    def files(self, name):
        folder = self.folders[name]
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path for path in found}

    def fetched(self, ending=""):
        """The files whose bytes were asked for."""
        paths = [path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]
        return [path.split("/", 5)[5] for path in paths if path.endswith(ending)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        if name not in self.hub.folders:
            return self._fail(404, "RepoNotFound")
        if name in self.hub.refuses:
            return self._fail(*self.hub.refuses[name])
        rest = parts[4:] if is_api else parts[2:]
        commit = self.hub.commit(name)
        if len(rest) > 1 and rest[1] not in ("main", commit):
            return self._fail(404, "RevisionNotFound")
        if is_api and rest[:1] == ["tree"]:
            return self._json([
                {"type": "file", "path": path, "size": file.stat().st_size, "oid": _etag(file)}
                for path, file in self.hub.files(name).items()
            ])  # fmt: skip
        if is_api:
            siblings = [{"rfilename": path} for path in self.hub.files(name)]
            return self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings})
        file = self.hub.files(name).get("/".join(rest[2:]))
        if rest[0] != "resolve" or file is None:
            return self._fail(404, "EntryNotFound")
        return self._file(file, commit, body)

    def _file(self, file, commit, body):
        data = file.read_bytes()
        total, first, last = len(data), 0, len(data) - 1
        if asked := self.headers.get("Range"):
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end), last) if end else last
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{_etag(file)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.end_headers()
        if not body:
            return
        part = data[first : last + 1]
        if file.name in self.hub.slow:
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.hub.release.wait(60)
            part = part[len(part) // 2 :]
        cut = self.hub.breaks.pop(file.name, None)
        with suppress(OSError):  # maybe nobody waits for it any more
            self.wfile.write(part if cut is None else part[:cut])
        if cut is not None:
            self.close_connection = True

    def _json(self, document):
        text = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _fail(self, status, code):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serving(folders):
    """A `Hub` of these folders, by the names of repositories, at its ``url``."""
    hub = Hub(folders)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def repository(tmp_path):
    """The bundled model, with files beside it that no model needs."""
    folder = tmp_path / "repository"
    shutil.copytree(bundled_folder(), folder)
    (folder / "README.md").write_text("# A model")
    (folder / "pytorch_model.bin").write_bytes(b"weights that nobody reads")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    (folder / "original" / WEIGHTS).write_bytes(b"others")
    return folder


@pytest.fixture
def hub(monkeypatch, repository, tmp_path):
    """A Hub with the repository, which the Hub's library asks, with a cache that is empty yet."""
    with serving({NAME: repository}) as hub:
        files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        for name, value in (
            ("HUGGINGFACE_CO_URL_TEMPLATE", files),
            ("ENDPOINT", hub.url),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_OFFLINE", False),
        ):
            monkeypatch.setattr(constants, name, value)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield hub
