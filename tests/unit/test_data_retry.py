"""Trying again: what is repeated, how long the pauses are, what is said, and how it ends."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import hf_raise_for_status, httpx

from pldr_train.data.sources.hub_http import PAUSE_VARIABLE, TransientError, transient, with_retries
from pldr_train.errors import DataError
from tests.messages import collected


def answer(status, headers=None):
    """The error that an answer of the Hub is raised as."""
    request = httpx.Request("GET", "http://hub/file")
    with pytest.raises(httpx.HTTPError) as caught:
        hf_raise_for_status(httpx.Response(status, headers=headers, request=request))
    return caught.value


def attempts(errors, retries=8, spread=0.5):
    """What an action that raises these one after the other comes to: its value, what was said, and the pauses."""
    slept, left = [], list(errors)

    def action():
        if left:
            raise left.pop(0)
        return "bytes"

    with collected() as said:
        try:
            value = with_retries(
                action, "a/b: x.parquet", "http://hub/x", retries, sleep=slept.append, rng=lambda: spread
            )
        except Exception as error:
            value = error
    return value, said, slept


@pytest.fixture(autouse=True)
def _pauses_as_they_are(monkeypatch):
    monkeypatch.delenv(PAUSE_VARIABLE, raising=False)


PASSING = [
    (answer(503), "HTTP 503"),
    (answer(500), "HTTP 500"),
    (answer(429), "HTTP 429"),
    (answer(408), "HTTP 408"),
    (httpx.ReadTimeout("slow"), "timed out"),
    (httpx.ConnectTimeout("slow"), "timed out"),
    (TimeoutError(), "timed out"),
    (httpx.ConnectError("refused"), "cannot connect (refused)"),
    (httpx.ReadError("reset"), "connection lost (reset)"),
    (httpx.RemoteProtocolError("peer closed"), "connection lost (peer closed)"),
    (ConnectionResetError(), "connection lost (ConnectionResetError)"),
    (TransientError("3 of 5 bytes arrived"), "3 of 5 bytes arrived"),
]


@pytest.mark.parametrize(("error", "reason"), PASSING)
def test_what_may_pass_is_tried_again_and_said(error, reason):
    value, said, slept = attempts([error])
    assert (value, slept) == ("bytes", [1.0])
    assert said == [f"a/b: x.parquet: {reason}; trying again in 1.0 s (1 of 8)"]


@pytest.mark.parametrize(
    "error",
    [answer(404), answer(401), answer(403), answer(416), KeyError("x"), FileNotFoundError("x"), OSError("disk full")],
)
def test_what_will_not_pass_comes_through_at_once(error):
    assert attempts([error]) == (error, [], [])


def test_offline_and_a_users_error_are_final_whatever_they_came_from():
    assert transient(OfflineModeIsEnabled("offline")) is None
    wrapped = DataError("said already")
    wrapped.__cause__ = httpx.ReadTimeout("slow")
    assert transient(wrapped) is None
    cause = RuntimeError("a library's own")
    cause.__cause__ = httpx.ReadTimeout("slow")
    assert transient(cause).reason == "timed out"


def test_pauses_double_up_to_a_minute_and_are_spread_by_a_quarter():
    _, _, slept = attempts([answer(503)] * 8, retries=8)
    assert slept == [1, 2, 4, 8, 16, 32, 60, 60]
    assert attempts([answer(503)] * 3, spread=0.0)[2] == [0.75, 1.5, 3.0]
    assert attempts([answer(503)] * 3, spread=1.0)[2] == [1.25, 2.5, 5.0]


def test_the_first_pause_can_be_set(monkeypatch):
    monkeypatch.setenv(PAUSE_VARIABLE, "0.01")
    assert attempts([answer(503)] * 2)[2] == [0.01, 0.02]


def test_the_pause_that_the_server_asks_for_is_kept():
    assert attempts([answer(429, {"Retry-After": "7"})], spread=0.0) == (
        "bytes",
        ["a/b: x.parquet: HTTP 429; trying again in 7.0 s (1 of 8)"],
        [7.0],
    )
    assert attempts([answer(503, {"Retry-After": "7"})], spread=0.5)[2] == [7.5]
    limits = {"RateLimit": '"resolvers";r=0;t=240', "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300'}
    assert attempts([answer(429, limits)], spread=0.0)[2] == [241]
    assert attempts([answer(503, {"RateLimit": '"resolvers";r=17;t=240'})])[2] == [1.0]
    assert attempts([answer(429, {"Retry-After": "86400"})], spread=0.0)[2] == [900]
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    (pause,) = attempts([answer(429, {"Retry-After": later})], spread=0.0)[2]
    assert 90 < pause <= 100
    for nonsense in ("soon", "-5", ""):
        assert attempts([answer(429, {"Retry-After": nonsense})])[2] == [1.0]


def test_after_the_last_try_the_message_names_file_address_reason_and_fix():
    error, said, slept = attempts([answer(503), httpx.ReadTimeout("slow"), answer(502)], retries=2)
    assert isinstance(error, DataError)
    assert str(error) == (
        "a/b: x.parquet: HTTP 502, at the last of 3 tries (http://hub/x). When the network and the Hub are up, "
        "run the same command again: it goes on from the last checkpoint. Or raise data.retries=2, or fetch the files "
        "ahead with `pldr-train data download`"
    )
    assert [line.rpartition("(")[2] for line in said] == ["1 of 2)", "2 of 2)"]
    assert len(slept) == 2
    assert isinstance(attempts([answer(503)], retries=0)[0], DataError)
