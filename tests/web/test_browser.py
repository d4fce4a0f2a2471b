"""The page in a real browser: load, ask, move the slider, compare, upload, two visitors at once.

`make test-web` runs these. With $SHOTS=FOLDER the pictures of the documentation are written there.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from atp_patch.web.requests import scene
from atp_patch.web.uploads import MAX_MB

pytestmark = [pytest.mark.web, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_MS = 180_000
# Runs the demo, and notes every other computer that it would talk to.
GUARDED = """
import runpy, socket, sys
log = sys.argv.pop(1)
def guarded(name):
    real = getattr(socket.socket, name)
    def connect(self, address, *more):
        remote = self.family in (socket.AF_INET, socket.AF_INET6)
        if remote and address[0] not in ("127.0.0.1", "::1"):
            with open(log, "a") as file:
                print(address, file=file)
        return real(self, address, *more)
    setattr(socket.socket, name, connect)
guarded("connect"), guarded("connect_ex")
lookup = socket.getaddrinfo
def getaddrinfo(host, *more, **other):
    if host not in (None, "127.0.0.1", "localhost", "::1"):
        with open(log, "a") as file:
            print(host, file=file)
    return lookup(host, *more, **other)
socket.getaddrinfo = getaddrinfo
runpy.run_module("atp_patch.demo", run_name="__main__")
"""


@dataclass(frozen=True)
class Server:
    """A running page.

    Attributes:
        address: its address.
        process: the process.
        talked_to: the file with every other computer that it would have talked to.
    """

    address: str
    process: subprocess.Popen[str]
    talked_to: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("web")
    uploads = folder / "uploads"
    uploads.mkdir()
    argv = ["--web", "--model", "builtin-dynamic", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", GUARDED, str(folder / "talked"), *argv],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(uploads)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    told = process.stderr.readline()
    address = re.search(r"http://127\.0\.0\.1:\d+", told)
    assert address, told + process.stderr.read()
    yield Server(address[0], process, folder / "talked")
    tab = HTTPConnection(address[0].removeprefix("http://"))  # which is still open at the end
    tab.request("GET", "/gradio_api/heartbeat/open")
    assert tab.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    tab.close()
    rest = process.stderr.read()
    assert "Traceback" not in rest, rest
    assert list(uploads.glob("atp_patch-web-*")) == []
    assert not (folder / "talked").exists(), (folder / "talked").read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


class Visitor:
    """One browser window on the page; the pages' requests and errors are noted."""

    def __init__(self, browser: Any, server: Server) -> None:
        self.context = browser.new_context(viewport={"width": 1400, "height": 1060})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.outside: list[str] = []
        self.errors: list[str] = []
        own = (server.address, "data:", "blob:")
        self.page.on("request", lambda r: r.url.startswith(own) or self.outside.append(r.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(server.address)
        self.page.locator("#scenes img").nth(5).wait_for()

    def pick(self, number: int) -> None:
        """Pick a scene, and wait for what is kept of it."""
        before = self.kept()
        self.page.locator("#scenes img").nth(number).click()
        self.wait_for(lambda: self.kept() not in ("", before))
        self.idle()

    def ask(self, question: str) -> None:
        """Ask, and wait for both answers."""
        self.page.locator("#question textarea, #question input").fill(question)
        asked = len(self.answers("first"))
        self.page.locator("#ask").click()
        self.wait_for(lambda: len(self.answers("first")) > asked)
        self.idle()

    def answers(self, side: str) -> list[str]:
        """The answers on one side."""
        found = self.page.locator(f"#chat-{side} .bot .message-content, #chat-{side} .bot p")
        return [text.strip() for text in found.all_inner_texts() if text.strip()]

    def kept(self, number: int = 0) -> str:
        """The overlay as it is shown."""
        images = self.page.locator("#kept img")
        return images.nth(number).get_attribute("src") if images.count() > number else ""

    def status(self) -> str:
        """The line above the answers."""
        return self.page.locator("#status").inner_text().strip()

    def idle(self) -> None:
        """Wait until nothing is at work."""
        self.wait_for(lambda: "Working" not in self.status())
        sides = ("plain", "first", "second")
        self.wait_for(lambda: all("Loading content" not in self.answers(side) for side in sides))

    def wait_for(self, condition: Any) -> None:
        """Wait for something to be so."""
        deadline = time.monotonic() + WAIT_MS / 1000
        while not condition():
            assert time.monotonic() < deadline, f"in vain; the status is {self.status()!r}"
            self.page.wait_for_timeout(200)

    def shot(self, name: str) -> None:
        """Write a picture of the page where $SHOTS says."""
        if "SHOTS" in os.environ:
            self.page.screenshot(path=Path(os.environ["SHOTS"], name), full_page=True)


@pytest.fixture
def visitor(browser: Any, server: Server) -> Iterator[Visitor]:
    made = Visitor(browser, server)
    yield made
    assert made.outside == []
    assert made.errors == []
    made.context.close()


def test_it_listens_on_this_computer_alone(server: Server) -> None:
    port = int(server.address.rpartition(":")[2])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]
    assert f":{port:04X} " not in Path("/proc/net/tcp6").read_text()


def test_load_and_ask_twice(visitor: Visitor) -> None:
    visitor.pick(0)
    picture = scene(53, "dynamic")
    first, second = picture.questions[0], picture.questions[1]
    visitor.ask(first.text)
    assert visitor.answers("plain") == [first.answer]
    assert len(visitor.answers("first")) == 1
    visitor.shot("web_kept.png")
    visitor.ask(second.text)
    assert visitor.answers("plain") == [first.answer, second.answer]
    visitor.page.get_by_role("tab", name="Costs").click()
    costs = visitor.page.locator("#costs img").first
    costs.wait_for()
    assert re.search(
        r"plain 168 visual tokens.*; atp 4\d visual tokens", costs.get_attribute("alt")
    )
    visitor.page.get_by_role("tab", name="Scores").click()
    visitor.page.locator("#scores img").wait_for()


def test_the_slider_changes_the_overlay(visitor: Visitor) -> None:
    visitor.pick(0)
    before = visitor.kept()
    slider = visitor.page.locator("input[type=range]").first
    box = slider.bounding_box()
    visitor.page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2)
    visitor.wait_for(lambda: visitor.kept() not in ("", before))
    visitor.idle()
    assert visitor.status() == ""
    wide = visitor.kept()
    visitor.page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + box["height"] / 2)
    visitor.wait_for(lambda: visitor.kept() not in ("", wide))


def test_a_budget_that_cannot_be_is_told_in_a_sentence(visitor: Visitor) -> None:
    visitor.pick(0)
    slider = visitor.page.locator("input[type=range]").first
    box = slider.bounding_box()
    visitor.page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    alert = visitor.page.get_by_role("alert").filter(has_text="tokens")
    alert.wait_for()
    assert alert.inner_text().endswith(".")


def test_two_methods_are_compared(visitor: Visitor) -> None:
    visitor.pick(1)
    assert not visitor.page.locator("#chat-second").is_visible()
    visitor.page.get_by_label("Compare with a second method").check()
    visitor.wait_for(lambda: visitor.kept(1) != "")
    visitor.ask(scene(0, "dynamic").questions[0].text)
    visitor.wait_for(lambda: len(visitor.answers("second")) == 1)
    assert visitor.kept(0) != visitor.kept(1)
    assert "divprune" in visitor.page.locator("#kept").inner_text()
    visitor.shot("web_compare.png")
    visitor.page.get_by_role("tab", name="Costs").click()
    visitor.page.locator("#costs img").first.wait_for()


@pytest.mark.parametrize("kind", ["broken", "whole", "large"])
def test_uploads(kind: str, visitor: Visitor, tmp_path: Path) -> None:
    path = tmp_path / "mine.png"
    scene(7, "dynamic").image.save(path)
    data = path.read_bytes()
    if kind == "broken":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "large":
        path.write_bytes(data + bytes(MAX_MB * 1_100_000))
    visitor.page.locator("#upload input[type=file]").set_input_files(path)
    if kind == "whole":
        visitor.wait_for(lambda: visitor.kept() != "")
        visitor.ask("Name the colour of the background.")
        assert visitor.answers("plain") == [
            each.answer for each in scene(7, "dynamic").questions if each.task == "background"
        ]
    elif kind == "broken":
        visitor.page.get_by_role("alert").filter(has_text="mine.png cannot be read").wait_for()
        visitor.pick(2)
        assert visitor.status() == "", "the page goes on"
    else:
        visitor.page.get_by_text(re.compile("exceeds|too large|maximum", re.I)).first.wait_for()
        assert visitor.kept() == ""


def test_two_browsers_at_once(browser: Any, server: Server) -> None:
    visitors = [Visitor(browser, server) for _ in range(2)]
    numbers, indices = (0, 3), (53, 2)
    for one, number in zip(visitors, numbers, strict=True):
        one.page.locator("#scenes img").nth(number).click()
    for one in visitors:
        one.wait_for(lambda one=one: one.kept() != "")
    questions = [scene(index, "dynamic").questions[1] for index in indices]
    for one, question in zip(visitors, questions, strict=True):
        one.page.locator("#question textarea, #question input").fill(question.text)
        one.page.locator("#ask").click()
    for one, question in zip(visitors, questions, strict=True):
        one.wait_for(lambda one=one: len(one.answers("first")) == 1)
        one.idle()
        assert one.answers("plain") == [question.answer]
    assert visitors[0].kept() != visitors[1].kept()
    for one in visitors:
        assert one.errors == one.outside == []
        one.context.close()
