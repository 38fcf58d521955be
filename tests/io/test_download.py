"""Downloads, from a server on this machine that stands in for every https host."""

import hashlib
import http.client
import http.server
import importlib.util
import os
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from sid_fast.errors import UserError
from sid_fast.io.cache import user_cache
from sid_fast.io.download import cache_folder, fetch
from sid_fast.models.teachers import TEACHERS
from sid_fast.performance.compile import compile_blocks

BODY = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(BODY).hexdigest()
URL = "https://example.invalid/nets/ok.pkl"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.paths.append(self.path)
        page = self.path.rpartition("/")[2].partition("?")[0]
        if page == "missing.pkl":
            self.send_error(404)
        elif page in ("to-https.pkl", "to-http.pkl"):
            self.send_response(302)
            self.send_header("Location", URL if page == "to-https.pkl" else URL.replace("s:", ":"))
            self.end_headers()
        else:
            self.send_response(200)
            if page != "unsized.pkl":
                self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY[:-7] if page == "short.pkl" else BODY)

    def log_message(self, *args):
        pass


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """The paths the server was asked for; all https goes to it, and the cache is empty."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.paths = []
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()

    def https_open(self, request):
        request.host = f"127.0.0.1:{server.server_port}"
        return self.do_open(http.client.HTTPConnection, request)

    def http_open(self, request):
        raise AssertionError("unencrypted request")

    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open", https_open)
    monkeypatch.setattr(urllib.request.HTTPHandler, "http_open", http_open)
    monkeypatch.setenv("SID_FAST_CACHE", str(tmp_path / "cache"))
    yield server.paths
    server.shutdown()
    server.server_close()
    thread.join()


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_downloads_once(paths, tmp_path, capsys):
    path = fetch(URL)
    assert path.read_bytes() == BODY
    assert path.parent == tmp_path / "cache"
    assert path.name.endswith("-ok.pkl")
    assert f"{URL}#sha256={DIGEST}" in capsys.readouterr().err
    assert fetch(URL) == path
    assert paths == ["/nets/ok.pkl"]
    assert fetch("https://example.invalid/other/ok.pkl") != path
    assert fetch("https://example.invalid/ok.pkl?version=a/b") not in (path, None)
    assert len(cached(tmp_path)) == 3


def test_local_paths_are_returned_as_they_are(tmp_path, monkeypatch):
    (tmp_path / "net.pkl").touch()
    assert fetch(str(tmp_path / "net.pkl")) == tmp_path / "net.pkl"
    monkeypatch.chdir(tmp_path)
    assert str(fetch("net.pkl")) == "net.pkl"
    with pytest.raises(UserError, match=r"^none\.pkl does not exist: .*https"):
        fetch("none.pkl")


def test_digests(paths, tmp_path, capsys):
    path = fetch(f"{URL}#sha256={DIGEST.upper()}")
    assert path.read_bytes() == BODY
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=f"has sha256 {DIGEST}, not 0000"):  # of the cached file
        fetch(f"{URL}#sha256={'0' * 64}")
    path.unlink()
    with pytest.raises(UserError, match=f"has sha256 {DIGEST}, not 0000"):
        fetch(f"{URL}#sha256={'0' * 64}")
    assert cached(tmp_path) == []
    for fragment in "sha256=12", "md5=" + "0" * 64, "x":
        with pytest.raises(UserError, match="64 hexadecimal"):
            fetch(f"{URL}#{fragment}")


@pytest.mark.parametrize("scheme", ["http", "ftp", "file", "HTTP", "httpss", ""])
def test_only_https(paths, tmp_path, scheme):
    with pytest.raises(UserError, match="not an https URL"):
        fetch(f"{scheme}://example.invalid/ok.pkl")
    assert paths == []


def test_redirects_stay_encrypted(paths, tmp_path):
    assert fetch("https://example.invalid/to-https.pkl").read_bytes() == BODY
    with pytest.raises(UserError, match=r"http://example\.invalid/nets/ok\.pkl is not an https"):
        fetch("https://example.invalid/to-http.pkl")
    assert len(cached(tmp_path)) == 1


@pytest.mark.parametrize(
    ("page", "match"),
    [
        ("missing.pkl", r"missing\.pkl: the server answered 404 Not Found"),
        ("short.pkl", rf"short\.pkl ended after {len(BODY) - 7} of {len(BODY)} bytes"),
        ("a b.pkl", "cannot be downloaded"),
        ("ä.pkl", "cannot be downloaded"),
    ],
)
def test_failed_downloads_leave_nothing(paths, tmp_path, page, match):
    with pytest.raises(UserError, match=match):
        fetch(f"https://example.invalid/{page}")
    assert cached(tmp_path) == []


@pytest.mark.parametrize("error", [TimeoutError("timed out"), ConnectionResetError("reset")])
def test_network_errors(paths, tmp_path, monkeypatch, error):
    def fail(self, request):
        raise error

    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open", fail)
    with pytest.raises(UserError, match=rf"ok\.pkl cannot be downloaded \({error}\)"):
        fetch(URL)
    assert cached(tmp_path) == []


def test_a_body_of_unknown_length(paths):
    assert fetch("https://example.invalid/unsized.pkl").read_bytes() == BODY


def test_several_processes_at_once(paths, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(fetch, [URL] * 8))
    assert len(set(results)) == 1
    assert results[0].read_bytes() == BODY
    assert len(cached(tmp_path)) == 1


def test_cache_that_cannot_be_made(paths, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SID_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set SID_FAST_CACHE"):
        fetch(URL)


def test_teachers(paths):
    for teacher in TEACHERS.values():
        assert teacher.url.startswith("https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-")
    assert fetch(TEACHERS["ffhq64"].source).name.endswith("-edm-ffhq-64x64-uncond-vp.pkl")
    assert paths == ["/edm/pretrained/edm-ffhq-64x64-uncond-vp.pkl"]
    with pytest.raises(UserError, match="not 4d5dcc1f"):  # ours is not what the server gave
        fetch(TEACHERS["cifar10-uncond"].source)


@pytest.mark.parametrize("chosen", [None, "", "elsewhere"])
def test_the_cache_needs_no_platformdirs(tmp_path, monkeypatch, chosen):
    """A bare GPU machine lacks it; the cache is then where platformdirs would put it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("SID_FAST_CACHE", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", chosen and str(tmp_path / chosen))
    expected = tmp_path / (chosen or ".cache") / "sid_fast"
    if sys.platform == "linux" and importlib.util.find_spec("platformdirs"):
        assert user_cache() == expected
    monkeypatch.setitem(sys.modules, "platformdirs", None)  # importing it fails
    assert user_cache() == expected
    assert cache_folder() == expected
    assert expected.is_dir()
    compile_blocks()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(expected / "inductor")
