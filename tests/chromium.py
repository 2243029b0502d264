"""A headless Chromium driven over a pipe (DevTools protocol), for tests of pages: no package, no port, no network."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 240.0  # seconds for one answer, on a slow and loaded machine
# The browser reads commands from descriptor 3 and writes to 4.
LAUNCH = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 20) for n in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def browser() -> str | None:
    """The command of a Chromium that is installed, None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab: what it logged, asked for and refused, and what can be done with it."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers = commands, answers
        self.buffer, self.count, self.session = b"", 0, None
        self.problems: list[str] = []  # console errors and warnings, exceptions, refusals
        self.asked: list[str] = []  # URLs
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; events that come before it are noted."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.commands, data) :]
        until = time.monotonic() + PATIENCE
        while True:
            answer = self._next(until)
            if answer.get("id") == self.count:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def open(self, url: str) -> None:
        """Load a page and wait for its load event, also where only the fragment is another."""
        if url != "about:blank":
            self.open("about:blank")
        self.problems.clear()
        self.asked.clear()
        self.loaded = False
        self.call("Page.navigate", url=url)
        until = time.monotonic() + PATIENCE
        while not self.loaded:
            self._next(until)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression (promises are awaited)."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The first true value of an expression."""
        until = time.monotonic() + PATIENCE
        while not (value := self.ask(expression)):
            assert time.monotonic() < until, f"{expression} stayed false; {self.problems}"
            time.sleep(0.2)
        return value

    def frames(self, count: int = 2) -> None:
        """Wait for frames to be drawn."""
        for _ in range(count):
            self.ask("new Promise(done => requestAnimationFrame(() => done(1)))")

    def press(self, key: str) -> None:
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def look(self, width: int, height: int, *, dark: bool = False, mobile: bool = False, scale: float = 1) -> None:
        """Size of the window and colour scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def shot(self, whole: bool = False, **options: Any) -> bytes:
        """PNG of what is seen, or of the whole page."""
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **options)
        return base64.b64decode(told["data"])

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(until - time.monotonic(), 0))
            assert ready, f"the browser does not answer; {self.problems}"
            part = os.read(self.answers, 1 << 20)
            assert part, "the browser ended"
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, facts: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(facts["exceptionDetails"].get("exception", facts["exceptionDetails"])))
        elif method == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(a.get("value", a.get("description"))) for a in facts["args"]))
        elif method == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
            text = facts["entry"]["text"]
            # What a software driver says of its speed is no fault of a page.
            if "GL Driver Message (OpenGL, Performance" not in text:
                self.problems.append(text)
        elif method == "Network.requestWillBeSent":
            self.asked.append(facts["request"]["url"])


@contextlib.contextmanager
def page(folder: Path, *flags: str) -> Iterator[Page]:
    """A tab of a fresh browser whose profile lies in ``folder``; WebGL 2 is done in software unless a flag forbids."""
    to_read, commands = os.pipe()
    answers, to_write = os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio"]
    options += ["--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "--no-first-run"]
    options += [
        "--disable-background-networking",
        "--disable-component-update",
        *(flags or ["--enable-unsafe-swiftshader"]),
    ]
    command = [sys.executable, "-c", LAUNCH, str(to_read), str(to_write), str(browser()), *options]
    with open(folder / "browser.log", "wb") as log:
        done = subprocess.Popen(command, pass_fds=(to_read, to_write), stdout=log, stderr=log)
    os.close(to_read)
    os.close(to_write)
    try:
        yield Page(commands, answers)
    finally:
        os.close(commands)
        os.close(answers)
        with contextlib.suppress(subprocess.TimeoutExpired):
            done.wait(10)
        done.kill()
        done.wait()
