"""Downloads that end in the right file or in none.

A file grows as ``<name>.part``, is resumed by HTTP range after a break, and gets its final name only once its digest is
right. A lock lets one process at a time download into a folder; the others then find the file there.
"""

import hashlib
import ipaddress
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import filelock

from fedsim.errors import DataError

Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, the bytes that are there, and how many there will be (None: the server does not say)."""

_ATTEMPTS = 4
_FIRST_WAIT_S = 0.5  # doubled after each failed attempt


class _GiveUpError(Exception):
    """The URL will not give the file, however often it is asked."""


class _TryAgainError(Exception):
    """The connection broke or the server is busy."""


def silent(name: str, done: int, total: int | None) -> None:
    """A progress callback that ignores everything."""


def fetch(
    urls: Sequence[str],
    destination: Path,
    *,
    digest: str,
    progress: Progress = silent,
    timeout_s: float = 30.0,
) -> None:
    """Download one file, unless it is there already.

    Args:
        urls: places that serve the same file, best first. HTTPS; plain HTTP only to this machine itself.
        destination: path of the file; its folder is made if needed.
        digest: of the whole file, ``"sha256:<hex>"`` or ``"md5:<hex>"``. MD5 guards against accidents only.
        progress: called after each chunk.
        timeout_s: how long a connection may stay silent, > 0.

    Raises:
        DataError: no URL gave the file. Names each, with what went wrong (for a wrong file: both digests).
        ValueError: the digest names another algorithm.
    """
    if not re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", digest):
        raise ValueError(f"digest must be 'sha256:<hex>' or 'md5:<hex>', got {digest!r}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(destination.parent / ".lock"):
            if not destination.exists():
                _from_any(urls, destination, digest, progress, timeout_s)
    except OSError as error:
        raise DataError(f"{destination}: cannot be written: {error}") from error


def _from_any(urls: Sequence[str], destination: Path, digest: str, progress: Progress, timeout_s: float) -> None:
    part = destination.with_name(destination.name + ".part")
    failures = []
    for url in urls:
        try:
            _from_one(url, part, digest, lambda done, total: progress(destination.name, done, total), timeout_s)
            part.replace(destination)
            return
        except _GiveUpError as error:
            failures.append(f"  {url}: {error}")
    raise DataError(
        f"{destination.name}: no source gave the file; get it by hand and put it into {destination.parent}\n"
        + "\n".join(failures)
    )


def _from_one(url: str, part: Path, digest: str, progress: Callable[[int, int | None], None], timeout_s: float) -> None:
    """Leave the right file at ``part``, or raise _GiveUpError."""
    failure = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_FIRST_WAIT_S * 2 ** (attempt - 1))
        try:
            _attempt(url, part, digest, progress, timeout_s)
            return
        except _TryAgainError as error:
            failure = str(error)
    raise _GiveUpError(f"{failure} ({_ATTEMPTS} attempts)")


def _attempt(url: str, part: Path, digest: str, progress: Callable[[int, int | None], None], timeout_s: float) -> None:
    resumed = part.exists() and part.stat().st_size > 0
    if resumed and _digest(part, digest) == digest:
        return  # broken off between the last byte and the rename
    _transfer(url, part, progress, timeout_s)
    if (found := _digest(part, digest)) != digest:
        part.unlink()
        problem = f"got a file with {found}, expected {digest}"
        # a resumed file may owe its fault to its old beginning; a whole one is simply the wrong file
        raise _TryAgainError(problem) if resumed else _GiveUpError(problem)


def _transfer(url: str, part: Path, progress: Callable[[int, int | None], None], timeout_s: float) -> None:
    """Append what ``part`` lacks, or write it anew if the server does not do ranges."""
    import httpx  # noqa: PLC0415  (0.1 s, and most runs download nothing)

    start = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    hooks = {"request": [lambda request: _refuse_plain_http(request.url.scheme, request.url.host)]}
    try:
        with (
            httpx.Client(timeout=timeout_s, follow_redirects=True, event_hooks=hooks) as client,
            client.stream("GET", url, headers=headers) as response,
        ):
            start = _accepted_start(response.status_code, response.headers.get("Content-Range", ""), start, part)
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else None
            _write(response.iter_raw(), part, start, lambda done: progress(done, total))
    except httpx.InvalidURL as error:
        raise _GiveUpError(str(error)) from error
    except httpx.HTTPError as error:
        raise _TryAgainError(str(error) or type(error).__name__) from error


def _accepted_start(status: int, content_range: str, start: int, part: Path) -> int:
    """Where the body that follows belongs, by the response's status."""
    if status == 200:
        return 0
    if status == 206 and content_range.startswith(f"bytes {start}-"):
        return start
    if status in (206, 416):  # another range than asked for, or none beyond what is here
        part.unlink(missing_ok=True)
        raise _TryAgainError(f"HTTP {status} with range {content_range!r} for a file broken off at byte {start}")
    if status >= 500 or status == 429:
        raise _TryAgainError(f"HTTP {status}")
    raise _GiveUpError(f"HTTP {status}")


def _write(chunks: Iterator[bytes], part: Path, start: int, progress: Callable[[int], None]) -> None:
    with part.open("ab" if start else "wb") as file:
        done = start
        for chunk in chunks:
            file.write(chunk)
            done += len(chunk)
            progress(done)


def _refuse_plain_http(scheme: str, host: str) -> None:
    """Also called for redirects, so that HTTPS cannot be led away from."""
    if scheme == "https" or (scheme == "http" and _is_loopback(host)):
        return
    raise _GiveUpError(f"only https is used, not {scheme}://{host}")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(path: Path, like: str) -> str:
    """Digest of a file, by the algorithm of ``like``."""
    algorithm = like.partition(":")[0]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return f"{algorithm}:{found.hexdigest()}"
