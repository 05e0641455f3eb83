"""Bytes of files in a repository of the Hub: one attempt each, with huggingface_hub's addresses, headers and errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx

from pldr_train.data.sources.retry import TransientError, of_response, transient
from pldr_train.errors import DataError

_PARTIAL, _NOT_LOGGED_IN, _FORBIDDEN, _NOT_FOUND, _NOT_SATISFIABLE = 206, 401, 403, 404, 416
_NO_SUCH_REPOSITORY = ("RepoNotFound", "RevisionNotFound", "GatedRepo")
HTTP_ERRORS = (httpx.HTTPError, httpx.InvalidURL)
"""What a request raises beside DataError and OSError; `refusal` explains it."""

# A client's sockets must not be shared between processes, and its locks may be held by another thread while a process
# forks: each process makes its own and leaves what it inherited alone.
_clients: dict[int, httpx.Client] = {}


def endpoint() -> str:
    """Address of the Hub: HF_ENDPOINT, also where it was set after the library was loaded."""
    return (os.environ.get("HF_ENDPOINT") or str(constants.ENDPOINT)).rstrip("/")


def file_url(repository: str, commit: str, name: str) -> str:
    """Address of a data set's file."""
    url: str = hf_hub_url(repository, name, repo_type="dataset", revision=commit, endpoint=endpoint())
    return url


def read_range(url: str, start: int, stop: int, size: int) -> bytes:
    """The bytes [start, stop) of a file of `size` bytes.

    Raises what `retry.transient` knows, or what `refusal` explains.
    """
    with stream(url, start, stop, size) as chunks:
        content = b"".join(chunks)
    if len(content) != stop - start:
        raise TransientError(f"{len(content):,} of {stop - start:,} bytes arrived")
    return content


@contextmanager
def stream(url: str, start: int, stop: int, size: int) -> Iterator[Iterator[bytes]]:
    """The bytes [start, stop) of a file of `size` bytes as they arrive, perhaps fewer. Raises as `read_range`."""
    refuse_offline()
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if (start, stop) != (0, size):
        headers["Range"] = f"bytes={start}-{stop - 1}"
    with _client().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if response.status_code == _NOT_SATISFIABLE:
            raise OSError(f"is shorter than the {size:,} bytes that the repository lists")
        hf_raise_for_status(response)
        if "Range" in headers and response.status_code != _PARTIAL:
            raise DataError(
                f"{url}: the server sends the whole file where a part is asked for; fetch the files ahead with "
                "`pldr-train data download`"
            )
        yield response.iter_raw()


def refuse_offline() -> None:
    """Raise DataError where huggingface_hub may not use the network."""
    if constants.HF_HUB_OFFLINE:
        raise DataError(
            "HF_HUB_OFFLINE=1 forbids reading from the Hub; unset it, or fetch the files ahead with "
            "`pldr-train data download`"
        )


def refusal(error: Exception, what: str, address: str) -> Exception:
    """What to raise for an error that will not pass: FileNotFoundError for a missing file, else DataError."""
    if isinstance(error, HfHubHTTPError):
        status, code = error.response.status_code, error.response.headers.get("X-Error-Code")
        if status == _NOT_FOUND and code not in _NO_SUCH_REPOSITORY:
            return FileNotFoundError(f"no such file at {address}")
        fix = "open the address in a browser to see why"
        if status in (_NOT_LOGGED_IN, _FORBIDDEN):
            fix = (
                "set HF_TOKEN to a token that may read the repository, and accept its terms on its page if it has some"
            )
        return DataError(f"{what}: HTTP {status}{f' {code}' if code else ''} ({address}); {fix}")
    return DataError(
        f"{what}: {str(error) or type(error).__name__} ({address}); check HF_ENDPOINT and the proxy's settings"
    )


@contextmanager
def library_tries_once() -> Iterator[None]:
    """Inside, requests that huggingface_hub makes by itself raise TransientError at once, and time out.

    It would otherwise repeat some of them unsaid, wait for others without end, and take a file for missing when a
    request for it timed out.
    """
    client = get_session()
    send = client.send

    def send_once(request: httpx.Request, **options: Any) -> httpx.Response:
        timeouts = request.extensions.get("timeout") or {}
        if not any(timeouts.values()):
            request.extensions["timeout"] = httpx.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT).as_dict()
        try:
            response: httpx.Response = send(request, **options)
        except httpx.TransportError as error:
            passing = transient(error)
            if passing is None:
                raise
            raise passing from error
        failure = of_response(response)
        if failure is not None:
            response.close()
            raise failure
        return response

    vars(client)["send"] = send_once
    try:
        yield
    finally:
        vars(client).pop("send", None)


def _client() -> httpx.Client:
    process = os.getpid()
    if process not in _clients:
        _clients.setdefault(process, httpx.Client(follow_redirects=True))
    return _clients[process]
