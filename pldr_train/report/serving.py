"""The page on a port of this machine, read anew when the runs' files change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pldr_train.report.page import content_of, data_text, render_page, snapshots_of
from pldr_train.report.runs import Run

ADDRESS = "127.0.0.1"


class LiveReport:
    """The newest content, made at most once for each change of the files.

    Args:
        runs: read on at every request.
        problems: what cannot be shown.
    """

    def __init__(self, runs: Sequence[Run], problems: Sequence[str]) -> None:
        self._runs, self._problems = runs, problems
        self._lock = threading.Lock()
        self._content: dict[str, Any] | None = None
        self._states: list[str] = []
        self._version = 0
        self._snapshots: tuple[tuple[int, ...], dict[str, Any]] | None = None

    def newest(self) -> tuple[str, dict[str, Any]]:
        """Return a tag that changes with the content, and the content."""
        with self._lock:
            changed = [run.read_on() for run in self._runs]
            states = [f"{run.state} {run.snapshots.version}" for run in self._runs]
            if self._content is None or any(changed) or states != self._states:
                self._content, self._states = content_of(self._runs, self._problems, live=True), states
                self._version += 1
            return f'"{id(self):x}-{self._version}"', self._content

    def newest_snapshots(self) -> tuple[str, dict[str, Any]]:
        """As `newest`, of the matrices for the heatmaps."""
        with self._lock:
            for run in self._runs:
                run.snapshots.read_on()
            versions = tuple(run.snapshots.version for run in self._runs)
            if self._snapshots is None or self._snapshots[0] != versions:
                self._snapshots = versions, snapshots_of(self._runs)
            return f'"{id(self):x}-{"-".join(map(str, versions))}"', self._snapshots[1]

    def answers(self) -> dict[str, Callable[[], Answer]]:
        """Return what is answered at each place."""
        return {"/": self._page, "/data.json": self._data, "/snapshots.json": self._matrices}

    def _page(self) -> Answer:
        return page_answer(render_page(self.newest()[1], self.newest_snapshots()[1]))

    def _data(self) -> Answer:
        tag, content = self.newest()
        return Answer("application/json", data_text(content).encode(), tag)

    def _matrices(self) -> Answer:
        tag, content = self.newest_snapshots()
        return Answer("application/json", data_text(content).encode(), tag)


@dataclass(frozen=True)
class Answer:
    """What the server says at a place."""

    kind: str
    """Its media type."""
    body: bytes
    tag: str | None = None
    """Of this content; a browser that has it already gets no body."""


def page_answer(page: str) -> Answer:
    """Return the answer with an HTML page."""
    return Answer("text/html; charset=utf-8", page.encode())


def serve(answers: Mapping[str, Callable[[], Answer]], port: int) -> ThreadingHTTPServer:
    """Bind the port (0: any free one) on this machine alone; `serve_forever` of the result answers.

    Args:
        answers: by place, such as "/data.json"; called at each request.
        port: to listen on.
    """
    return _Server((ADDRESS, port), type("_Handler", (_Handler,), {"answers": answers}))


class _Server(ThreadingHTTPServer):
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    answers: Mapping[str, Callable[[], Answer]]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer what there is at a place."""
        # A page elsewhere whose name leads here must not read the runs: browsers say what name they asked for.
        if self.headers.get("Host", "").rpartition(":")[0] not in (ADDRESS, "localhost"):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"ask for 127.0.0.1 or localhost\n")
            return
        make = self.answers.get(self.path.partition("?")[0])
        if make is None:
            there = " and ".join(", ".join(self.answers).rsplit(", ", 1))
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", f"only {there} are here\n".encode())
            return
        answer = make()
        if answer.tag is not None and self.headers.get("If-None-Match") == answer.tag:
            self._answer(HTTPStatus.NOT_MODIFIED, None, b"", answer.tag)
        else:
            self._answer(HTTPStatus.OK, answer.kind, answer.body, answer.tag)

    def _answer(self, status: HTTPStatus, kind: str | None, body: bytes, tag: str | None = None) -> None:
        try:
            self.send_response(status)
            if kind is not None:
                self.send_header("Content-Type", kind)
            if tag is not None:
                self.send_header("ETag", tag)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:  # the browser left
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Requests are of no interest in the terminal."""
