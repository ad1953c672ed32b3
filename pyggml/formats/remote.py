"""Models on a web server, read by byte ranges: looking at one fetches its header only, taking a tensor fetches that tensor.

Addresses are http:// and https:// URLs, and hf:user/repo/file.gguf (hf:user/repo@revision/file.gguf) on the Hugging Face hub;
HF_TOKEN opens private repositories there, HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import mmap
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from typing import Any

import numpy as np

from pyggml.errors import GGUFError, PyggmlError
from pyggml.formats.values import printable

TIMEOUT, ATTEMPTS, PAUSE = 30.0, 3, 0.5         # seconds for a reply; tries of a request; seconds between the first two
_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+?))?/(?P<file>[^@]+)")
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def url_of(address: str) -> tuple[str, dict[str, str]]:
    """The URL behind an address, and the headers that are for its host alone."""
    if not address.startswith("hf:"):
        return address, {}
    match = _HUB.fullmatch(address)
    if not match:
        raise PyggmlError(f"{printable(address)}: is not of the form hf:user/repo/file.gguf")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN")
    url = f"{hub}/{match['repo']}/resolve/{urllib.parse.quote(match['revision'] or 'main', safe='')}/{urllib.parse.quote(match['file'])}"
    return url, {"Authorization": f"Bearer {token}"} if token else {}


def _opener() -> urllib.request.OpenerDirector:
    """Opens http and https alone, whatever a server redirects to."""
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(),
                    urllib.request.HTTPRedirectHandler(), urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor(),
                    urllib.request.UnknownHandler()):
        opener.add_handler(handler)
    return opener


class HttpFile:
    """A source over HTTP, of which the `first` bytes are fetched at once.

    Every reply is checked: the range that was asked for, all its bytes, of the same version of the file.
    """

    map: mmap.mmap | None = None

    def __init__(self, address: str, first: int) -> None:
        self.name = address
        self._url, self._secret = url_of(address)
        self._opener, self._tag = _opener(), ""
        self.size = -1
        self._first = first
        self._head = self._fetch(0, first)

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return HttpFile, (self.name, self._first)           # by its address, without what was fetched and without the token

    def head(self, n: int) -> Any:
        have = len(self._head)
        if have < min(n, self.size):
            self._head = np.concatenate([self._head, self._fetch(have, min(n, self.size) - have)])
        return self._head.data

    def array(self, offset: int, n: int) -> np.ndarray:
        if offset + n <= len(self._head):
            return self._head[offset:offset + n]
        return self._fetch(offset, n)

    def verify(self) -> None:
        """Every reply was checked when it came."""

    def close(self) -> None:
        """No connection stays open."""

    def _fetch(self, offset: int, n: int) -> np.ndarray:
        if not n:
            return np.empty(0, np.uint8)
        for attempt in range(ATTEMPTS):
            try:
                return self._request(offset, n)
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 429:
                    raise self._fail(_explain(error.code)) from None
                problem: str = _explain(error.code)
            except urllib.error.URLError as error:
                problem = str(error.reason)
            except (OSError, HTTPException) as error:
                problem = str(error) or type(error).__name__
            if attempt + 1 < ATTEMPTS:
                time.sleep(PAUSE * 2 ** attempt)
        raise self._fail(f"{problem}; tried {ATTEMPTS} times")

    def _fail(self, text: str) -> GGUFError:
        return GGUFError(f"{printable(self.name)}: {printable(text)}")

    def _request(self, offset: int, n: int) -> np.ndarray:
        request = urllib.request.Request(self._url, headers={
            "Range": f"bytes={offset}-{offset + n - 1}", "Accept-Encoding": "identity", "User-Agent": "pyggml"})
        for name, value in self._secret.items():
            request.add_unredirected_header(name, value)        # not for the host that a redirect leads to
        with self._opener.open(request, timeout=TIMEOUT) as reply:
            tag = reply.headers.get("ETag", "") + reply.headers.get("Last-Modified", "")
            if self.size >= 0 and tag != self._tag:
                raise self._fail("the file changed on the server while it was read; try again")
            self._tag = tag
            return self._whole(reply, n) if reply.status == 200 else self._part(reply, offset, n)

    def _part(self, reply: Any, offset: int, n: int) -> np.ndarray:
        match = _RANGE.fullmatch(reply.headers.get("Content-Range", ""))
        if reply.status != 206 or not match:
            raise self._fail(f"the server's reply (status {reply.status}) is not the part of the file that was asked for")
        first, last, size = map(int, match.groups())
        if first != offset or last != min(offset + n, size) - 1 or (self.size >= 0 and size != self.size):
            raise self._fail(f"the server sent bytes {first} to {last} of {size}, asked for {offset} to {offset + n - 1}")
        self.size = size
        return _body(reply, last - first + 1)

    def _whole(self, reply: Any, n: int) -> np.ndarray:
        """The reply of a server that knows no ranges: enough for a small file."""
        length = reply.headers.get("Content-Length", "")
        if self.size >= 0 or not length.isdecimal() or int(length) > n:
            raise self._fail("the server does not send parts of files; download the file")
        self.size = int(length)
        return _body(reply, self.size)


def _body(reply: Any, n: int) -> np.ndarray:
    data = np.empty(n, np.uint8)
    view, done = memoryview(data.data), 0
    while done < n:
        got = reply.readinto(view[done:])
        if not got:
            raise HTTPException(f"the connection ended after {done} of {n} bytes")
        done += got
    return data


def _explain(code: int) -> str:
    if 300 <= code < 400:
        return f"status {code}: the server redirects in a circle, or to an address that is not http"
    return {401: "status 401: the server asks for a login; set HF_TOKEN for a private repository",
            403: "status 403: access is not allowed; accept the model's terms, or set HF_TOKEN", 404: "status 404: there is no such file",
            416: "status 416: the file is empty or shorter than expected"}.get(code, f"the server answers with status {code}")
