"""Requests to the Hub, with huggingface_hub's addresses, headers and errors, and when to repeat them.

A request is repeated when it failed for a reason that may pass: time-outs, lost connections, a server that is busy or
down. Each such failure is logged in one line. What will not pass (no such file, no permission) is raised at once.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any, TypeVar

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx, parse_ratelimit_headers

from pldr_train.errors import DataError, UserError

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

PAUSE_VARIABLE = "PLDR_TRAIN_RETRY_PAUSE_S"
"""Environment variable: seconds of the first pause, 1 by default. Tests set a small one."""
LONGEST_PAUSE_S = 60.0
"""Pauses double up to this. The server may ask for a longer one."""
LONGEST_ASKED_S = 900.0
"""The longest pause that the server may ask for. The Hub's limits are per five minutes."""
GO_ON = "run the same command again: it goes on from the last checkpoint"

_REASONS = (
    ((httpx.TimeoutException, TimeoutError), "timed out"),
    ((httpx.ConnectError,), "cannot connect ({})"),
    ((httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError, ConnectionError), "connection lost ({})"),
)
_TIMED_OUT, _BUSY, _SERVER_ERROR = 408, 429, 500
_PARTIAL, _NOT_LOGGED_IN, _FORBIDDEN, _NOT_FOUND, _NOT_SATISFIABLE = 206, 401, 403, 404, 416
_NO_SUCH_REPOSITORY = ("RepoNotFound", "RevisionNotFound", "GatedRepo")
HTTP_ERRORS = (httpx.HTTPError, httpx.InvalidURL)
"""What a request raises beside DataError and OSError; `refusal` explains it."""

# Processes must not share a client's sockets, and another thread may hold its locks during a fork. So each process
# makes its own client and never uses an inherited one.
_clients: dict[int, httpx.Client] = {}


class TransientError(Exception):
    """A failure that may pass.

    Args:
        reason: a few words for messages.
        asked_s: pause that the server asks for; None: it does not.
    """

    def __init__(self, reason: str, asked_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.asked_s = reason, asked_s


def transient(error: BaseException) -> TransientError | None:
    """Return the failure behind an error (itself, or what it was raised from) if it may pass, else None."""
    for each in _causes(error):
        if isinstance(each, UserError | OfflineModeIsEnabled):
            return None
        if isinstance(each, TransientError):
            return each
        if isinstance(each, HfHubHTTPError | httpx.HTTPStatusError):
            return of_response(each.response)
        for kinds, reason in _REASONS:
            if isinstance(each, kinds):
                return TransientError(reason.format(str(each) or type(each).__name__))
    return None


def of_response(response: httpx.Response) -> TransientError | None:
    """Return the failure of an answer if it may pass (408, 429 or 5xx), else None."""
    status = response.status_code
    if status in (_TIMED_OUT, _BUSY) or status >= _SERVER_ERROR:
        return TransientError(f"HTTP {status}", _asked_pause_s(response.headers))
    return None


def with_retries(
    action: Callable[[], _T],
    what: str,
    address: str,
    retries: int,
    *,
    fix: str = GO_ON,
    sleep: Callable[[float], object] = time.sleep,
    rng: Callable[[], float] = random.random,
) -> _T:
    """Call `action` until it succeeds, at most 1 + `retries` times, with pauses of about 1, 2, 4, ... 60 s.

    Args:
        action: is repeated if it raises what `transient` knows; any other error passes through.
        what: is read, for messages, such as a file of a repository.
        address: where it is read from.
        retries: further tries after the first.
        fix: advice when all tries failed.
        sleep: waits for the seconds given.
        rng: in [0, 1), spreads the pauses of processes that failed at the same time.

    Raises:
        DataError: every try failed; names `what`, `address`, the last reason and the fix.
    """
    base_s = float(os.environ.get(PAUSE_VARIABLE, "1"))
    for attempt in count(1):
        try:
            return action()
        except Exception as error:
            failure = transient(error)
            if failure is None:
                raise
            if attempt > retries:
                raise DataError(
                    f"{what}: {failure.reason}, at the last of {attempt} tries ({address}). When the network and the "
                    f"Hub are up, {fix}. Or raise data.retries={retries}, or fetch the files ahead with "
                    "`pldr-train data download`"
                ) from error
        pause_s = _pause_s(attempt, failure.asked_s, base_s, rng())
        shown = f"{pause_s:.0f}" if pause_s >= 10 else f"{pause_s:.1f}"
        _log.warning(f"{what}: {failure.reason}; trying again in {shown} s ({attempt} of {retries})")
        sleep(pause_s)
    raise AssertionError


def _pause_s(attempt: int, asked_s: float | None, base_s: float, spread: float) -> float:
    """Return the seconds to wait after the given attempt; the first is 1."""
    doubled = min(LONGEST_PAUSE_S, base_s * 2.0 ** (attempt - 1))
    if asked_s is None:
        return doubled * (0.75 + spread / 2)
    return min(asked_s, LONGEST_ASKED_S) + doubled * spread  # never shorter than asked


def _causes(error: BaseException) -> Iterator[BaseException]:
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__


def _asked_pause_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that Retry-After or the Hub's rate limit asks to wait; None: nothing is asked."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds) + 1  # the Hub rounds down
    after = headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    try:
        return max(0.0, (parsedate_to_datetime(after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a zone
        return None


def endpoint() -> str:
    """Return the address of the Hub: HF_ENDPOINT, also if it was set after the library was loaded."""
    return (os.environ.get("HF_ENDPOINT") or str(constants.ENDPOINT)).rstrip("/")


def file_url(repository: str, commit: str, name: str) -> str:
    """Return the address of a data set's file."""
    url: str = hf_hub_url(repository, name, repo_type="dataset", revision=commit, endpoint=endpoint())
    return url


def read_range(url: str, start: int, stop: int, size: int) -> bytes:
    """Return the bytes [start, stop) of a file of `size` bytes.

    Raises what `transient` knows, or what `refusal` explains.
    """
    with stream(url, start, stop, size) as chunks:
        content = b"".join(chunks)
    if len(content) != stop - start:
        raise TransientError(f"{len(content):,} of {stop - start:,} bytes arrived")
    return content


@contextmanager
def stream(url: str, start: int, stop: int, size: int) -> Iterator[Iterator[bytes]]:
    """Yield the bytes [start, stop) of a file of `size` bytes as they arrive, perhaps fewer. Raises as `read_range`."""
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
    """Raise DataError if huggingface_hub may not use the network."""
    if constants.HF_HUB_OFFLINE:
        raise DataError(
            "HF_HUB_OFFLINE=1 forbids reading from the Hub; unset it, or fetch the files ahead with "
            "`pldr-train data download`"
        )


def refusal(error: Exception, what: str, address: str) -> Exception:
    """Return what to raise for an error that will not pass: FileNotFoundError for a missing file, else DataError."""
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
    """Make requests of huggingface_hub raise TransientError at the first failure, and time out.

    Otherwise it repeats some silently, waits for others without end, and takes a file for missing if its request timed
    out.
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
