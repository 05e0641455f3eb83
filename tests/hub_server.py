"""A Hugging Face Hub of data sets and models on this machine, with faults at will.

It speaks the part of the Hub's interface that `datasets`, `huggingface_hub` and this package use to list and read
repositories, and to push models. A repository is a data set or a model as it is asked for. For a test:

    with HubServer({"owner/name": {"data/train-0.parquet": b"..."}}) as server:
        server.use(monkeypatch, tmp_path)                  # in this process and those forked from it; or
        subprocess.run(..., env=os.environ | server.environment(tmp_path)); or
        run_cli(..., variables=server.environment(tmp_path), before=server.client(tmp_path))
        server.add_fault("*/resolve/*train-0*", status=503, times=2)
        ...
        assert server.reads("data/train-0.parquet") == [(0, 100)]
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import lru_cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

Files = Mapping[str, bytes]


@dataclass
class Request:
    """What a client asked for."""

    method: str
    path: str
    """Unquoted, without the query."""
    range: tuple[int, int] | None
    """Bytes [start, stop) asked for, if a part was."""
    headers: dict[str, str]
    status: int = 0
    sent_bytes: int = 0
    """Of the body."""


@dataclass
class _Fault:
    pattern: str
    times: float
    status: int | None
    headers: dict[str, str]
    delay_s: float
    cut_after: int | None
    cut: str
    methods: tuple[str, ...]


@dataclass
class _Repository:
    commits: list[dict[str, bytes]] = field(default_factory=list)
    tags: dict[str, int] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def sha(self, index: int) -> str:
        content = [(name, _digests(data)) for name, data in sorted(self.commits[index].items())]
        return hashlib.sha1(repr((index, content)).encode()).hexdigest()

    def find(self, revision: str) -> int | None:
        if revision == "main":
            return len(self.commits) - 1
        by_sha = {self.sha(index): index for index in range(len(self.commits))}
        return self.tags.get(revision, by_sha.get(revision))


class HubServer:
    """Data sets served under `endpoint` while the `with` block lasts.

    Args:
        repositories: files of each data set's first commit, by their names.
        page_size: entries that a listing of files gives at once.
        redirect: whether files are answered with a redirect to another path, as the Hub does for large ones.
        token: that gated data sets want.
    """

    def __init__(
        self,
        repositories: Mapping[str, Files | Path],
        page_size: int = 1000,
        redirect: bool = False,
        token: str = "hf_right",
    ) -> None:
        self.repositories: dict[str, _Repository] = {}
        self.page_size, self.redirect, self.token = page_size, redirect, token
        self.owners = {"me"}
        """Under whom the token may make models."""
        self.ranges = True
        """Whether parts of files can be had."""
        self.is_hub = True
        """Otherwise it answers everything with a page, as many a proxy does."""
        self.requests: list[Request] = []
        self._faults: list[_Fault] = []
        self._lock, self._closing = threading.Lock(), threading.Event()
        for name, files in repositories.items():
            self.commit(name, _files_of(files))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads, self._server.block_on_close = True, False
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repository: str, files: Files, tag: str | None = None) -> str:
        """Make these the files of `main`, and give the commit's SHA."""
        kept = self.repositories.setdefault(repository, _Repository())
        kept.commits.append(dict(files))
        if tag is not None:
            kept.tags[tag] = len(kept.commits) - 1
        return kept.sha(len(kept.commits) - 1)

    def add_fault(
        self,
        pattern: str,
        *,
        times: float = 1,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        delay_s: float = 0.0,
        cut_after: int | None = None,
        cut: str = "reset",
        methods: tuple[str, ...] = ("GET", "POST", "HEAD"),
    ) -> None:
        """Go wrong on the next `times` requests whose path matches `pattern` (fnmatch, of the unquoted path).

        Args:
            pattern: for example "*/resolve/*/a.parquet", "*/tree/*", "*".
            times: how often; math.inf for ever.
            status: answer this: 404 is a file that vanished, 401 and 403 refuse, 429 and 5xx may pass.
            headers: of that answer, such as Retry-After.
            delay_s: seconds before the answer.
            cut_after: bytes of the body that arrive.
            cut: how it is cut: "reset" the connection, "close" it early, or send "short": a smaller Content-Length.
            methods: that are concerned.
        """
        fault = _Fault(pattern, times, status, dict(headers or {}), delay_s, cut_after, cut, methods)
        with self._lock:
            self._faults.append(fault)

    def mend(self) -> None:
        """Take all faults away."""
        with self._lock:
            self._faults.clear()

    def reads(self, name: str | None = None) -> list[tuple[int, int] | None]:
        """Ranges of the GET requests for a file (None: of any) that were answered with bytes, in order."""
        return [
            request.range
            for request in self.requests
            if request.method == "GET"
            and "/resolve/" in request.path
            and request.status in (200, 206)
            and (name is None or request.path.endswith(f"/{name}"))
        ]

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables that send another process's requests here, and its caches below `folder`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(folder / "hf_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PLDR_TRAIN_RETRY_PAUSE_S": "0.01",
            "NO_PROXY": "127.0.0.1",
        }

    def use(self, monkeypatch: Any, folder: Path, timeout_s: float = 10.0) -> None:
        """Do the same to this process, whose libraries are loaded; what it forks follows."""
        for name, value in self.environment(folder).items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        for module, values in _settings(self.endpoint, folder, timeout_s).items():
            for name, value in values.items():
                monkeypatch.setattr(module, name, value, raising=False)

    def client(self, folder: Path) -> Callable[[], None]:
        """What does the same to a process forked from the server of processes; its environment is given besides."""
        return partial(_send_here, self.endpoint, folder)

    def _fault_of(self, method: str, path: str) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and method in fault.methods and fnmatch(path, fault.pattern):
                    fault.times -= 1
                    return fault
        return None


def _settings(endpoint: str, folder: Path, timeout_s: float) -> dict[Any, dict[str, Any]]:
    """What loaded libraries have made of the environment's variables, by module."""
    import datasets.config
    from huggingface_hub import constants

    home = folder / "hf_home"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    return {
        constants: {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DOWNLOAD_TIMEOUT": timeout_s,
            "HF_HUB_ETAG_TIMEOUT": timeout_s,
        },
        datasets.config: {
            "HF_ENDPOINT": endpoint,
            "HUB_DATASETS_URL": endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}",
            "HF_UPDATE_DOWNLOAD_COUNTS": False,
            "HF_HUB_OFFLINE": False,
            "HF_DATASETS_CACHE": home / "datasets",
            "DOWNLOADED_DATASETS_PATH": home / "datasets" / "downloads",
            "EXTRACTED_DATASETS_PATH": home / "datasets" / "downloads" / "extracted",
        },
    }


def _send_here(endpoint: str, folder: Path) -> None:
    for module, values in _settings(endpoint, folder, 10.0).items():
        for name, value in values.items():
            setattr(module, name, value)


def _files_of(files: Files | Path) -> Files:
    if isinstance(files, Path):
        return {path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()}
    return files


class _AnswerError(Exception):
    """An answer other than what was asked for."""

    def __init__(self, status: int, code: str = "", message: str = "", **more: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.more = status, code, message, more


def _handler_of(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        server_of = hub

    return Handler


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server_of: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        hub, split = self.server_of, urlsplit(self.path)
        path = unquote(split.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.request_seen = Request(self.command, path, None, {k.lower(): v for k, v in self.headers.items()})
        hub.requests.append(self.request_seen)
        fault = hub._fault_of(self.command, path)
        try:
            if fault is not None and fault.delay_s:
                hub._closing.wait(fault.delay_s)
            if fault is not None and fault.status is not None:
                code = "EntryNotFound" if fault.status == 404 else ""
                return self._send(fault.status, b'{"error": "a fault"}', {"X-Error-Code": code} | fault.headers)
            if not hub.is_hub:
                return self._send(200, b"<html>Welcome</html>", {"Content-Type": "text/html"})
            self._answer(split.path, parse_qs(split.query), body, fault)
        except _AnswerError as answer:
            headers = {"X-Error-Code": answer.code, "X-Error-Message": answer.message}
            self._send(answer.status, json.dumps({"error": answer.message, **answer.more}).encode(), headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self, quoted: str, query: dict[str, list[str]], body: bytes, fault: _Fault | None) -> None:
        parts = [unquote(part) for part in quoted.split("/")[1:]]
        if parts[:2] == ["api", "whoami-v2"]:
            self._check_token()
            return self._send_json({"type": "user", "name": "me", "orgs": []}, fault)
        if parts[:2] == ["api", "validate-yaml"]:
            return self._send_json({"errors": [], "warnings": []}, fault)
        if parts == ["api", "repos", "create"]:
            return self._send_json(self._create(json.loads(body)), fault)
        if parts[:2] == ["api", "models"] and len(parts) >= 5 and parts[4] in ("preupload", "commit"):
            return self._send_json(self._push("/".join(parts[2:4]), parts[4], body), fault)
        if parts[:2] in (["api", "datasets"], ["api", "models"]) and len(parts) >= 4:
            name, rest = "/".join(parts[2:4]), parts[4:]
            return self._send_json(self._api(name, rest, query, body), fault)
        for prefix in (["datasets"], ["cdn", "datasets"], ["cdn"], []):
            at = len(prefix)
            if parts[:at] == prefix and parts[at + 2 : at + 3] == ["resolve"]:
                name, revision = "/".join(parts[at : at + 2]), parts[at + 3]
                return self._send_file(name, revision, "/".join(parts[at + 4 :]), prefix[:1] == ["cdn"], fault)
        raise _AnswerError(404)

    def _check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.server_of.token}":
            raise _AnswerError(401, "", "Invalid username or password.")

    def _create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        self._check_token()
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] not in self.server_of.owners:
            raise _AnswerError(403, "", f"You don't have the rights to create a model under {wanted['organization']}")
        if name in self.server_of.repositories:
            raise _AnswerError(409, "", "You already created this model repo", url=f"{self.server_of.endpoint}/{name}")
        self.server_of.commit(name, {".gitattributes": b""})
        # Versions of the client say it in either way.
        self.server_of.repositories[name].private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        return {"url": f"{self.server_of.endpoint}/{name}", "name": name}

    def _push(self, name: str, what: str, body: bytes) -> dict[str, Any]:
        self._check_token()
        sha, files = self._at(name, "main")
        if what == "preupload":
            paths = [each["path"] for each in json.loads(body)["files"]]
            return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        lines = [json.loads(line) for line in body.splitlines()]
        added = {
            each["value"]["path"]: base64.b64decode(each["value"]["content"]) for each in lines if each["key"] == "file"
        }
        sha = self.server_of.commit(name, {**files, **added})
        return {"commitUrl": f"{self.server_of.endpoint}/{name}/commit/{sha}", "commitOid": sha}

    def _at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """SHA and files of a revision."""
        repository = self.server_of.repositories.get(name)
        may = self.headers.get("Authorization") == f"Bearer {self.server_of.token}"
        if repository is None or (repository.private and not may):  # the Hub says so to who is not logged in
            raise _AnswerError(401, "RepoNotFound", "Repository not found")
        if repository.gated and self.headers.get("Authorization") != f"Bearer {self.server_of.token}":
            raise _AnswerError(401, "GatedRepo", f"Access to dataset {name} is restricted")
        index = repository.find(revision)
        if index is None:
            raise _AnswerError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository.sha(index), repository.commits[index]

    def _api(self, name: str, rest: list[str], query: dict[str, list[str]], body: bytes) -> Any:
        kind = rest[0] if rest else "revision"
        if kind == "refs":
            sha, _ = self._at(name, "main")
            tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": sha} for tag in self._tags(name)]
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": sha}
            return {"branches": [main], "tags": tags, "converts": [], "pullRequests": []}
        sha, files = self._at(name, rest[1] if len(rest) > 1 else "main")
        if kind == "revision":
            siblings = [_sibling(each, files[each]) for each in sorted(files)]
            private = self.server_of.repositories[name].private
            return {"_id": sha[:24], "id": name, "sha": sha, "siblings": siblings, "private": private, "gated": False}
        if kind == "paths-info":
            paths = parse_qs(body.decode()).get("paths", [])
            return [_file_entry(path, files[path]) for path in paths if path in files]
        if kind == "tree":
            return self._tree(files, "/".join(rest[2:]), query)
        raise _AnswerError(404)

    def _tags(self, name: str) -> list[str]:
        return list(self.server_of.repositories[name].tags)

    def _tree(self, files: dict[str, bytes], folder: str, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path in sorted(files):
            if not path.startswith(prefix):
                continue
            inner = path[len(prefix) :].split("/")
            for depth in range(1, len(inner)):
                if recursive or depth == 1:
                    between = prefix + "/".join(inner[:depth])
                    entries[between] = {"type": "directory", "path": between, "oid": _sha1(between.encode()), "size": 0}
            if recursive or len(inner) == 1:
                entries[path] = _file_entry(path, files[path])
        if folder and not entries:
            raise _AnswerError(404, "EntryNotFound", f"{folder} does not exist")
        first = int(query.get("cursor", ["0"])[0])
        stop = first + self.server_of.page_size
        if stop < len(entries):
            further = urlencode({key: values[0] for key, values in query.items()} | {"cursor": str(stop)})
            self.next_page = f"{self.server_of.endpoint}{urlsplit(self.path).path}?{further}"
        return [entries[path] for path in sorted(entries)][first:stop]

    def _send_json(self, content: Any, fault: _Fault | None) -> None:
        link = self.__dict__.pop("next_page", None)
        headers = {"Content-Type": "application/json"} | ({"Link": f'<{link}>; rel="next"'} if link else {})
        self._send(200, json.dumps(content).encode(), headers, fault)

    def _send_file(self, name: str, revision: str, path: str, at_cdn: bool, fault: _Fault | None) -> None:
        sha, files = self._at(name, revision)
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            return self._send(404, b"Entry not found", headers | {"X-Error-Code": "EntryNotFound"})
        content = files[path]
        entry = _file_entry(path, content)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers |= {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if self.server_of.redirect and "lfs" in entry and not at_cdn:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{etag}"'}
            return self._send(302, b"", headers | {"Location": f"/cdn{urlsplit(self.path).path}"})
        wanted = self.headers.get("Range")
        if wanted is None or not self.server_of.ranges:
            return self._send(200, content, headers, fault)
        start, stop = _range_of(wanted, len(content))
        self.request_seen.range = (start, stop)
        if start >= len(content):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, content[start:stop], headers, fault)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], fault: _Fault | None = None) -> None:
        cut = fault.cut if fault is not None and fault.cut_after is not None else None
        arriving = body if fault is None or fault.cut_after is None else body[: fault.cut_after]
        self.request_seen.status = status
        self.send_response(status)
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(arriving if cut == "short" else body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(arriving)
            self.request_seen.sent_bytes = len(arriving)
        self.wfile.flush()
        if cut in ("reset", "close"):
            self.close_connection = True
        if cut == "reset":
            time.sleep(0.02)  # what was sent should arrive before the reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def _range_of(header: str, size: int) -> tuple[int, int]:
    first, _, last = header.removeprefix("bytes=").partition("-")
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(int(last) + 1, size) if last else size


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@lru_cache(maxsize=10_000)
def _digests(content: bytes) -> tuple[str, str]:
    """Git's digest of a file, and the SHA-256 that it has as a large one."""
    return _sha1(b"blob %d\0" % len(content) + content), hashlib.sha256(content).hexdigest()


def _file_entry(path: str, content: bytes) -> dict[str, Any]:
    git, sha256 = _digests(content)
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git}
    if not path.endswith((".md", ".yaml", ".txt", ".json", ".jsonl")):
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return entry


def _sibling(path: str, content: bytes) -> dict[str, Any]:
    entry = _file_entry(path, content)
    found: dict[str, Any] = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
    if "lfs" in entry:
        large = entry["lfs"]
        found["lfs"] = {"sha256": large["oid"], "size": large["size"], "pointerSize": large["pointerSize"]}
    return found


def readme(configs: Mapping[str, Mapping[str, str]], default: str | None = None) -> bytes:
    """A README whose header names the files of each config's splits: {config: {split: glob}}."""
    lines: Iterator[str] = (
        f"- config_name: {config}\n"
        + ("  default: true\n" if config == default else "")
        + "  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {path}\n" for split, path in splits.items())
        for config, splits in configs.items()
    )
    return ("---\nconfigs:\n" + "".join(lines) + "---\n# A data set\n").encode()
