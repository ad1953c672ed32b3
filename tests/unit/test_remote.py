"""Reading models by HTTP ranges, against a server on this machine that can misbehave."""

import pickle
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from pyggml import cli, formats
from pyggml.errors import PyggmlError
from pyggml.formats import remote, shards
from pyggml.formats import split as splitting
from pyggml.formats.source import FIRST_READ

WEIGHTS = {f"t{i}": np.full((256, 1024), i, np.float32) for i in range(4)}         # 1 MB each


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.mode, self.log, self.sent = folder, "", [], 0

    def handle_error(self, request, client_address):
        """A client that hangs up before it has everything is what some tests are about."""

    def url(self, name, host="127.0.0.1"):
        return f"http://{host}:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, status, data=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.server.mode == "cut" and status == 206:
            data = data[:len(data) // 2]
        self.server.sent += len(data)
        self.wfile.write(data)

    def do_GET(self):
        server, path = self.server, self.path
        server.log.append((path, dict(self.headers)))
        if server.mode == "busy" and len(server.log) < 3 or server.mode == "down":
            return self.reply(503)
        if path.startswith("/redirect/"):
            return self.reply(302, Location=server.url(path.removeprefix("/redirect/"), "localhost"))
        if path == "/to-file":
            return self.reply(302, Location="file:///etc/passwd")
        if path == "/loop":
            return self.reply(302, Location=server.url("loop"))
        file = server.folder / path.split("/resolve/main/")[-1].lstrip("/")
        if server.mode in ("401", "403"):
            return self.reply(int(server.mode))
        if not file.exists():
            return self.reply(404)
        data = file.read_bytes()
        tag = f'"{len(server.log)}"' if server.mode == "changing" else '"1"'
        if server.mode == "plain":
            return self.reply(200, data, ETag=tag)
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        if first >= len(data):
            return self.reply(416)
        last = min(last, len(data) - 1)
        shown = first + 1 if server.mode == "shifted" else first
        return self.reply(206, data[first:last + 1], ETag=tag, Content_Range=f"bytes {shown}-{last}/{len(data)}")


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    served = Server(tmp_path)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    formats.write(tmp_path / "m.gguf", {"general.name": "remote", "words": ["w"] * 10}, WEIGHTS)
    yield served
    served.shutdown()
    served.server_close()
    thread.join()


def test_only_what_is_looked_at_is_fetched(server, capsys):
    url = server.url("m.gguf")
    assert cli.main(["info", url, "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "remote" in out and "256 x 1024" in out and "4.19 MB" in out
    assert len(server.log) == 1 and server.sent == FIRST_READ
    file = formats.open(url)
    np.testing.assert_array_equal(file["t2"].numpy(), WEIGHTS["t2"])
    assert server.sent == 2 * FIRST_READ + WEIGHTS["t2"].nbytes


def test_a_large_header_is_fetched_once(server, tmp_path):
    tokens = [f"token number {i}" for i in range(150_000)]
    formats.write(tmp_path / "v.gguf", {"tokenizer.ggml.tokens": tokens})
    file = formats.open(server.url("v.gguf"))
    assert file.kv["tokenizer.ggml.tokens"] == tokens
    assert server.sent == (tmp_path / "v.gguf").stat().st_size and len(server.log) <= 4


def test_hub_addresses(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url("redirect"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    file = formats.open("hf:user/repo/m.gguf")
    assert file.kv["general.name"] == "remote" and file.path == "hf:user/repo/m.gguf"
    (asked, headers), (_, elsewhere) = server.log
    assert asked == "/redirect/user/repo/resolve/main/m.gguf" and headers["Authorization"] == "Bearer secret"
    assert "Authorization" not in elsewhere and elsewhere["Range"].startswith("bytes=0-")
    data = pickle.dumps(file)                       # by its address
    assert b"secret" not in data and pickle.loads(data).kv["general.name"] == "remote"
    for wrong in ("hf:user/m.gguf", "hf:", "hf:a/b/"):
        with pytest.raises(PyggmlError, match="hf:user/repo/file.gguf"):
            formats.open(wrong)


def test_split_models(server, tmp_path):
    file = formats.open(tmp_path / "m.gguf")
    splitting.split(file, str(tmp_path / "p"), splitting.plan(file, 2))
    whole = formats.open(server.url("p-00002-of-00002.gguf"))
    assert list(whole.tensors) == list(WEIGHTS) and whole.kv["general.name"] == "remote"
    np.testing.assert_array_equal(whole["t3"].numpy(), WEIGHTS["t3"])
    (tmp_path / shards.part_path("p", 1, 2)).unlink()
    with pytest.raises(PyggmlError, match="p-00001-of-00002.gguf: status 404"):
        formats.open(server.url("p-00002-of-00002.gguf"))


def test_tools_take_addresses(server, tmp_path, capsys):
    url = server.url("m.gguf")
    assert cli.main(["diff", url, str(tmp_path / "m.gguf")]) == 0
    assert cli.main(["extract", url, "t1", "-o", str(tmp_path / "t1.npy")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "t1.npy"), WEIGHTS["t1"])
    assert cli.main(["hash", url]) == 0 and cli.main(["check", url]) == 0


@pytest.mark.parametrize("mode, name, says", [
    ("", "none.gguf", "status 404: there is no such file"),
    ("401", "m.gguf", "status 401: the server asks for a login"),
    ("403", "m.gguf", "status 403"),
    ("down", "m.gguf", "status 503; tried 3 times"),
    ("plain", "m.gguf", "does not send parts of files; download"),
    ("shifted", "m.gguf", "the server sent bytes 1 to"),
    ("cut", "m.gguf", r"the connection ended after \d+ of \d+ bytes; tried 3 times"),
    ("", "to-file", "an address that is not http"),
    ("", "loop", "redirects in a circle"),
    ("", "empty.gguf", "status 416"),
    ("", "page.gguf", "an HTML page"),
    ("", "cut.gguf", "offset 0x"),
])
def test_errors_are_one_sentence(server, tmp_path, capsys, mode, name, says):
    server.mode = mode
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "page.gguf").write_bytes(b"<!doctype html><html></html>")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:100])
    assert cli.main(["info", server.url(name)]) == 1
    error = capsys.readouterr().err
    assert re.search(says, error) and error.count("\n") == 1 and server.url(name) in error


def test_a_busy_server_is_asked_again(server):
    server.mode = "busy"
    assert formats.open(server.url("m.gguf")).kv["general.name"] == "remote" and len(server.log) == 3


def test_a_file_that_changes_meanwhile(server):
    server.mode = "changing"
    file = formats.open(server.url("m.gguf"))
    with pytest.raises(PyggmlError, match="changed on the server"):
        file["t3"].numpy()


def test_a_small_file_needs_no_ranges(server, tmp_path):
    server.mode = "plain"
    formats.write(tmp_path / "s.gguf", {"a": 1})
    assert formats.open(server.url("s.gguf")).kv["a"] == 1


def test_no_server():
    with pytest.raises(PyggmlError, match="tried 3 times"):
        formats.open("http://127.0.0.1:9/m.gguf")
