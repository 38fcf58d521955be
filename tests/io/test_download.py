"""Downloads, from a server on this machine that stands in for every https host."""

import hashlib
import http.client
import http.server
import importlib.util
import os
import sys
import tempfile
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from sid_fast.errors import Fallback, UserError, WriteFailed
from sid_fast.io.cache import user_cache
from sid_fast.io.download import cache_folder, fetch, write_cache
from sid_fast.models.registry import load_network
from sid_fast.models.teachers import TEACHERS
from sid_fast.performance.compile import compile_blocks
from tests.helpers.networks import small_teacher
from tests.helpers.pickled import network_pickle

BODY = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(BODY).hexdigest()
URL = "https://example.invalid/nets/ok.pkl"


PAGES = {
    "login.pkl": b"<!DOCTYPE html><title>Sign in</title>",
    "denied.pkl": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "error.pkl": b'{"error": "not found"}',
    "pointer.pkl": b"version https://git-lfs.github.com/spec/v1\n",
    "empty.pkl": b"",
}


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
        elif page in PAGES:
            self.send_response(200)
            self.end_headers()  # without a length
            self.wfile.write(PAGES[page])
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
    with pytest.raises(UserError, match=f"{path} has sha256 {DIGEST}, not 0000.*delete it"):
        fetch(f"{URL}#sha256={'0' * 64}")
    path.unlink()
    with pytest.raises(UserError, match=f"ok.pkl has sha256 {DIGEST}, not 0000") as caught:
        fetch(f"{URL}#sha256={'0' * 64}")
    assert "cache" not in str(caught.value)  # the file is gone
    assert "tmp" not in str(caught.value)
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


@pytest.mark.parametrize(("page", "what"), [
    ("login.pkl", "an HTML page"), ("denied.pkl", "an XML document"), ("error.pkl", "a JSON file"),
    ("pointer.pkl", "a Git LFS pointer"), ("empty.pkl", "empty"),
])  # fmt: skip
def test_what_a_server_says_instead_of_the_file_is_not_kept(paths, tmp_path, page, what):
    url = f"https://example.invalid/{page}"
    for _ in "ab":
        with pytest.raises(UserError, match=f"{page} is {what}.*: check the URL"):
            fetch(url)
    assert cached(tmp_path) == []
    assert len(paths) == 2


def test_a_page_in_the_cache_is_downloaded_again(paths, tmp_path):
    path = fetch(URL)
    path.write_bytes(PAGES["login.pkl"])
    assert fetch(URL).read_bytes() == BODY


def test_a_damaged_download_says_which_file_to_delete(paths, tmp_path):
    (tmp_path / "net.pkl").write_bytes(network_pickle(small_teacher())[:1000])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PAGES, "cut.pkl", (tmp_path / "net.pkl").read_bytes())
        with pytest.raises(UserError, match=r"-cut\.pkl is cut short: delete it") as caught:
            load_network("https://example.invalid/cut.pkl")
    assert str(tmp_path / "cache") in str(caught.value)


@pytest.mark.parametrize("scheme", ["https", "http", "s3"])
def test_passwords_are_not_repeated(paths, tmp_path, capsys, scheme):
    with pytest.raises(UserError, match=rf"{scheme}://example\.invalid/ok\.pkl ") as caught:
        fetch(f"{scheme}://me:secret@example.invalid/ok.pkl")
    assert "secret" not in str(caught.value) + capsys.readouterr().err
    assert paths == []


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


def test_cache_that_cannot_be_written(paths, tmp_path, monkeypatch):
    path = fetch(URL)

    def refuse(**arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # root may write everywhere
    assert fetch(URL) == path  # what is there can still be read
    with pytest.raises(UserError, match=r"cache cannot be written .*: set SID_FAST_CACHE"):
        fetch("https://example.invalid/other.pkl")


def test_a_result_that_cannot_be_cached_is_a_warning():
    def fail():
        raise WriteFailed("content.txt cannot be written")

    with pytest.warns(Fallback, match=r"content\.txt cannot be written, or set SID_FAST_CACHE"):
        write_cache(fail)


def test_the_home_folder_in_the_cache_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SID_FAST_CACHE", "~/nets")
    assert cache_folder() == tmp_path / "nets"
    assert not (tmp_path / "~").exists()
    monkeypatch.setenv("SID_FAST_CACHE", "~nobody-of-this-name/nets")
    with pytest.raises(UserError, match="set SID_FAST_CACHE"):
        cache_folder()


def test_a_path_that_may_not_be_read_is_not_called_missing(monkeypatch):
    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        with pytest.raises(UserError, match=r"^net\.pkl cannot be read \(permission denied\)"):
            fetch("net.pkl")


def test_teachers(paths):
    site = "https://nvlabs-fi-cdn.nvidia.com"
    for name, teacher in TEACHERS.items():
        edm2 = name.startswith("edm2-")
        folder = f"edm2/posthoc-reconstructions/{name}-" if edm2 else "edm/pretrained/edm-"
        assert teacher.url.startswith(f"{site}/{folder}")
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


def test_compiled_code_goes_elsewhere_where_the_cache_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("SID_FAST_CACHE", str(tmp_path / "file"))
    with pytest.warns(Fallback, match="set SID_FAST_CACHE to a folder you can write to"):
        compile_blocks()
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")  # PyTorch sets its own default
    assert not chosen.startswith(str(tmp_path))
