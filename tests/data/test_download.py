import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fedsim.data import download
from fedsim.errors import DataError

CONTENT = bytes(range(256)) * 400
DIGEST = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture(autouse=True)
def no_waiting_and_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "_FIRST_WAIT_S", 0.0)


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[str | None]]]:
    """A real server on this machine; gives its URL and a list that collects the Range header of each request."""
    ranges: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ranges.append(self.headers.get("Range"))
            answer(self)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/file.bin", ranges
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def whole(request: BaseHTTPRequestHandler) -> None:
    """Serves everything, and knows no ranges."""
    send(request, 200, CONTENT)


def send(
    request: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: dict[str, str] | None = None,
    cut: int | None = None,
) -> None:
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body[:cut])


def with_ranges(request: BaseHTTPRequestHandler, cut: int | None = None) -> None:
    """Serves what a range asks for, and breaks off after ``cut`` bytes."""
    if wanted := request.headers.get("Range"):
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(CONTENT):
            send(request, 416, b"", {"Content-Range": f"bytes */{len(CONTENT)}"})
            return
        part = {"Content-Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"}
        send(request, 206, CONTENT[start:], part, cut)
    else:
        send(request, 200, CONTENT, cut=cut)


def breaking(request: BaseHTTPRequestHandler) -> None:
    with_ranges(request, cut=40_000)


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_the_right_file_arrives_whole_and_progress_ends_at_its_size(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    with serving(whole) as (url, _):
        download.fetch(
            [url],
            tmp_path / "new" / "f",
            digest=DIGEST,
            progress=lambda name, done, total: seen.append((name, done, total)),
        )
    assert (tmp_path / "new" / "f").read_bytes() == CONTENT
    assert seen[-1] == ("f", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert leftovers(tmp_path / "new") == {"f"}


def test_a_download_that_breaks_off_is_resumed_where_it_broke(tmp_path: Path) -> None:
    with serving(breaking) as (url, ranges):
        download.fetch([url], tmp_path / "f", digest=DIGEST)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert ranges == [None, "bytes=40000-", "bytes=80000-"]


def test_a_part_left_by_an_earlier_run_is_continued(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT[:1000])
    with serving(with_ranges) as (url, ranges):
        download.fetch([url], tmp_path / "f", digest=DIGEST)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert ranges == ["bytes=1000-"]


def test_a_whole_part_is_taken_without_asking(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT)
    with serving(whole) as (url, ranges):
        download.fetch([url], tmp_path / "f", digest=DIGEST)
    assert ranges == []
    assert leftovers(tmp_path) == {"f"}


def test_a_server_that_ignores_ranges_starts_the_file_anew(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(b"x" * 1000)
    with serving(whole) as (url, ranges):
        download.fetch([url], tmp_path / "f", digest=DIGEST)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert ranges == ["bytes=1000-"]


@pytest.mark.parametrize("beginning", [b"x" * 1000, b"x" * len(CONTENT)], ids=["resumed by 206", "refused by 416"])
def test_a_part_with_a_wrong_beginning_is_thrown_away_and_fetched_again(tmp_path: Path, beginning: bytes) -> None:
    (tmp_path / "f.part").write_bytes(beginning)
    with serving(with_ranges) as (url, ranges):
        download.fetch([url], tmp_path / "f", digest=DIGEST)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert ranges == [f"bytes={len(beginning)}-", None]


def test_rubbish_is_deleted_and_reported_with_url_and_both_digests(tmp_path: Path) -> None:
    serves_rubbish = serving(lambda request: send(request, 200, b"<html>sign in</html>"))
    with serves_rubbish as (url, ranges), pytest.raises(DataError) as caught:
        download.fetch([url], tmp_path / "f", digest=DIGEST)
    got = hashlib.sha256(b"<html>sign in</html>").hexdigest()
    assert all(part in str(caught.value) for part in (url, DIGEST, f"sha256:{got}", str(tmp_path)))
    assert leftovers(tmp_path) == set()
    assert len(ranges) == 1, "the same rubbish should not be fetched twice"


def test_the_next_mirror_is_tried_and_continues_the_part_of_the_first(tmp_path: Path) -> None:
    def dies(request: BaseHTTPRequestHandler) -> None:
        if request.headers.get("Range"):
            send(request, 503, b"")
        else:
            breaking(request)

    with serving(dies) as (bad, _), serving(with_ranges) as (good, ranges):
        download.fetch([bad, good], tmp_path / "f", digest=DIGEST)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert ranges == ["bytes=40000-"]


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (503, 4)])
def test_a_missing_file_is_asked_for_once_and_a_busy_server_four_times(
    tmp_path: Path, status: int, requests: int
) -> None:
    refuses = serving(lambda request: send(request, status, b""))
    with refuses as (url, ranges), pytest.raises(DataError, match=f"HTTP {status}"):
        download.fetch([url], tmp_path / "f", digest=DIGEST)
    assert len(ranges) == requests
    assert leftovers(tmp_path) == set()


def test_a_server_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with serving(whole) as (url, _):
        pass
    with pytest.raises(DataError, match=re.escape(url)):
        download.fetch([url], tmp_path / "f", digest=DIGEST)


def test_plain_http_is_refused_except_to_this_machine_also_after_a_redirect(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only https"):
        download.fetch(["http://example.invalid/f"], tmp_path / "f", digest=DIGEST)
    away = {"Location": "http://example.invalid/f"}
    redirects = serving(lambda request: send(request, 302, b"", away))
    with redirects as (url, _), pytest.raises(DataError, match=r"only https is used, not http://example\.invalid"):
        download.fetch([url], tmp_path / "f", digest=DIGEST)


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"mine")
    with serving(whole) as (url, ranges):
        download.fetch([url], tmp_path / "f", digest=DIGEST)
    assert (tmp_path / "f").read_bytes() == b"mine"
    assert ranges == []


def test_two_downloads_at_once_fetch_the_file_once(tmp_path: Path) -> None:
    with serving(whole) as (url, ranges), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: download.fetch([url], tmp_path / "f", digest=DIGEST), range(4)))
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert len(ranges) == 1


def test_md5_digests_are_understood_and_others_refused(tmp_path: Path) -> None:
    with serving(whole) as (url, _):
        download.fetch([url], tmp_path / "f", digest="md5:" + hashlib.md5(CONTENT).hexdigest())
    with pytest.raises(ValueError, match="digest must be"):
        download.fetch(["https://example.invalid"], tmp_path / "g", digest="crc32:00000000")


def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be written"):
        download.fetch(["https://example.invalid"], tmp_path / "f" / "g", digest=DIGEST)
