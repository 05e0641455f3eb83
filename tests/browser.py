"""A headless Chromium under the tests' control: real clicks and keys, and what the page complained of."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_KEYS = {
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Home": 36,
    "End": 35,
    "Enter": 13,
    "Tab": 9,
}
_PATIENCE_S = 90


def find_browser() -> str | None:
    """The first that is installed."""
    return next((path for name in BROWSERS if (path := shutil.which(name)) is not None), None)


def options(profile: Path) -> list[str]:
    """What every start of the browser is given."""
    return [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1400,1000",
        "--hide-scrollbars", "--disable-dev-shm-usage", f"--user-data-dir={profile}",
    ]  # fmt: skip


class Tab:
    """One page, driven over the browser's debugging pipe."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._rest = b""
        self._number = 0
        self.complaints: list[str] = []
        """Errors of scripts, of the console and of the page's policy."""
        self._loaded = False
        target = self._ask("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        self._session = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True}, None)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")

    def _ask(self, method: str, values: dict[str, Any] | None = None, session: str | None = "own") -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": values or {}}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                found: dict[str, Any] = answer["result"]
                return found

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            more = os.read(self._from, 1 << 20)
            assert more, "the browser has ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, values: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = values["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.complaints.append(values["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning"):
            self.complaints.append(str(values["args"]))
        elif method == "Page.loadEventFired":
            self._loaded = True

    def open(self, address: str) -> None:
        """Load a page and wait for its scripts."""
        self._loaded = False
        self._ask("Page.navigate", {"url": address})
        while not self._loaded:
            self._next()

    def size(self, width: int, height: int, theme: str = "light") -> None:
        """Of the window, and what the system prefers."""
        view = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", view)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self._ask("Emulation.setEmulatedMedia", {"features": features})

    def ask(self, script: str) -> Any:
        """The value of an expression, waited for if it is a promise."""
        values = {"expression": script, "returnByValue": True, "awaitPromise": True}
        answer = self._ask("Runtime.evaluate", values)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def settle(self) -> None:
        """Wait until what was asked for has been drawn."""
        frame = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))"
        self.ask(frame)

    def press(self, key: str) -> None:
        """A key, on whatever has the focus."""
        values = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        if key == "Enter":
            values["text"] = "\r"
        for kind in ("keyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", values | {"type": kind})
        self.settle()

    def place(self, selector: str, across: float = 0.5, down: float = 0.5) -> tuple[float, float]:
        """Scroll an element into sight; a point of it, as shares of its width and height."""
        found = f"document.querySelector({json.dumps(selector)})"
        scroll = f"{found}.scrollIntoView({{ block: 'center', behavior: 'instant' }})"
        for _ in (1, 2):  # what comes into sight may grow
            self.ask(scroll)
            self.settle()
        left, top, width, height = self.ask(f"""(() => {{
          const box = {found}.getBoundingClientRect();
          return [box.left, box.top, box.width, box.height];
        }})()""")
        return left + width * across, top + height * down

    def point(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """Move the pointer onto an element."""
        x, y = self.place(selector, across, down)
        self._ask("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
        self.settle()

    def click(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """Click an element."""
        x, y = self.place(selector, across, down)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            values = {"type": kind, "x": x, "y": y, "button": "left" if kind != "mouseMoved" else "none"}
            self._ask("Input.dispatchMouseEvent", values | {"clickCount": 1})
        self.settle()

    def picture(self, path: Path) -> None:
        """Write what the window shows as a PNG."""
        self.settle()
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", {"format": "png"})["data"]))


@contextmanager
def opened_tab(browser: str, profile: Path) -> Iterator[Tab]:
    """A browser with one empty page."""
    pipes = [os.pipe(), os.pipe()]
    # High numbers, so that giving two of them to the browser as 3 and 4 overwrites none.
    high = [[fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in pipe] for pipe in pipes]
    for pipe in pipes:
        for end in pipe:
            os.close(end)
    (browser_reads, we_write), (we_read, browser_writes) = high
    line = f'exec "$@" 3<&{browser_reads} 4>&{browser_writes}'
    command = ["bash", "-c", line, "bash", browser, *options(profile), "--remote-debugging-pipe"]
    process = subprocess.Popen(
        command, pass_fds=(browser_reads, browser_writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(browser_reads)
    os.close(browser_writes)
    try:
        yield Tab(we_write, we_read)
    finally:
        with contextlib.suppress(OSError):
            os.close(we_write)
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(we_read)
