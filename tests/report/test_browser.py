"""The pages in a real browser: no error on the console, no request, no sideways scroll, in both colour schemes."""

import fcntl
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsim import runs
from fedsim.report import compare, report
from fedsim.report.groups import compare as compare_runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]
ANSWER_S = 60  # longest wait for the browser

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


class Browser:
    """One tab, driven over the DevTools protocol: messages of JSON, each ended by a zero byte, on fds 3 and 4."""

    def __init__(self, profile: Path) -> None:
        command_out, self._commands = _pipe()
        self._answers, answer_in = _pipe()
        shell = f'exec "$@" 3<&{command_out} 4>&{answer_in}'
        arguments = [*FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", CHROMIUM or "", *arguments],
            pass_fds=(command_out, answer_in),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_out)
        os.close(answer_in)
        self._rest, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Do one command and return its result; what else is reported meanwhile is kept in ``events``."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], ANSWER_S)
            data = os.read(self._answers, 1 << 20) if ready else b""
            assert data, "the browser is gone or hangs"
            self._rest += data
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def open(self, page: Path, *, width: int, height: int, scheme: str) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.send("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def evaluate(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Console errors and warnings, uncaught exceptions, log entries (a blocked resource is one)."""
        self.evaluate("0")  # whatever was reported before this answer is in
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]

    def requests(self) -> list[str]:
        sent = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def close(self) -> None:
        self._session = None
        self.send("Browser.close")
        self._process.wait(timeout=30)
        os.close(self._commands)
        os.close(self._answers)


def _pipe() -> tuple[int, int]:
    """Both ends above 9, so that neither is the 3 or 4 that the browser gets."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def pages(whole: Path, pruned: Path, make: Any, tmp_path: Path) -> dict[str, Path]:
    long = "x" * 300
    wide = make(conf=make.config(name=long, model__init=long), made=make.records(2))
    runs.write_json(wide / "environment.json", {long: long})
    folders = [runs.open_run(folder) for folder in (whole, wide)]
    return {
        "whole": report.write(whole),
        "wide": report.write(wide),
        "pruned": report.write(pruned),
        "compared": compare.write(compare_runs(folders), tmp_path / "compare.html"),
    }


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("<script>console.error('caught')</script>", "caught"),
        ("<script>throw new Error('thrown')</script>", "thrown"),
        ("<link rel=stylesheet href='missing.css'>", "missing.css"),
    ],
)
def test_the_browser_reports_what_a_faulty_page_does(browser: Browser, tmp_path: Path, body: str, what: str):
    page = tmp_path / "faulty.html"
    page.write_text(f"<!doctype html>{body}<div style='width: 2000px'>wide</div>")
    browser.open(page, width=390, height=844, scheme="light")
    assert what in " ".join(browser.complaints() + browser.requests())
    assert browser.evaluate("document.documentElement.scrollWidth") > 390


def test_pages_are_quiet_ask_for_nothing_and_fit_every_window(browser: Browser, pages: dict[str, Path]):
    grounds = set()
    for name, page in pages.items():
        for width, height in ((1280, 800), (390, 844)):
            for scheme in ("light", "dark"):
                browser.open(page, width=width, height=height, scheme=scheme)
                browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
                assert browser.complaints() == [], (name, width, scheme)
                assert browser.requests() == [page.as_uri()]
                assert browser.evaluate("document.documentElement.scrollWidth") <= width, (name, width, scheme)
                grounds.add((scheme, browser.evaluate("getComputedStyle(document.body).backgroundColor")))
    assert len(grounds) == 2


def test_accuracy_is_in_view_on_a_phone(browser: Browser, pages: dict[str, Path]):
    browser.open(pages["compared"], width=390, height=844, scheme="light")
    cells = "[...document.querySelectorAll('.grid tr > :nth-child(2)')]"
    assert browser.evaluate(f"{cells}[0].textContent") == "accuracy"
    assert browser.evaluate(f"Math.max(...{cells}.map(c => c.getBoundingClientRect().right))") <= 390


def test_chart_text_stands_out_from_its_card_in_both_schemes(browser: Browser, pages: dict[str, Path]):
    for scheme in ("light", "dark"):
        browser.open(pages["pruned"], width=1280, height=800, scheme=scheme)
        card = browser.evaluate("getComputedStyle(document.querySelector('figure')).backgroundColor")
        fills = browser.evaluate(
            "[...new Set([...document.querySelectorAll('figure svg text')].map(t => getComputedStyle(t).fill))]"
        )
        assert len(fills) >= 1
        assert min(_contrast(fill, card) for fill in fills) >= 4.5, (scheme, fills, card)


def _contrast(one: str, other: str) -> float:
    """Contrast ratio of two ``rgb(r, g, b)`` colours as WCAG 2.1 defines it."""
    low, high = sorted(_luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(c) / 255 for c in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
