"""An issuer that is down, ill, hostile or slow, and floods of keys that it does not know."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx
import pytest

from tests.support.database import terminate
from tests.support.fixtures import StartService
from tests.support.issuer import (
    BY_DEFAULT,
    ENCRYPTION,
    HASTY,
    HEALING,
    KEY,
    KEYS,
    OCT,
    STRANGER,
    UNKNOWN_KINDS,
    Issuer,
    Responder,
    by_an_unknown_key,
    failed_fetches,
    is_open,
    issuers_and_services,
    key_set,
    page,
)
from tests.support.service_process import SECRET, Service, token
from tests.support.tokens import (
    ask_with,
    assert_refused,
    new_user,
)
from tests.support.waiting import wait_until
from tests.support.wire import Raw

NO_KEYS = {"detail": "The keys to verify tokens with are not available right now, try again soon"}

PAUSE = 0.7
"""Seconds between two fetches, for the test that counts them."""

# --- An issuer -------------------------------------------------------------------------------------------------------


def raw(content: bytes) -> Responder:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(content)

    return answer


def hang(request: BaseHTTPRequestHandler) -> None:
    while is_open(request.connection):
        time.sleep(0.02)


def drip(beginning: bytes) -> Responder:
    """Send this at once, and then a space at a time for ever, which neither a header nor a JSON text minds."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(beginning)
        while True:
            time.sleep(0.5)
            request.wfile.write(b" ")

    return answer


def assert_no_keys(response: httpx.Response) -> None:
    assert (response.status_code, response.json()) == (503, NO_KEYS)
    assert re.fullmatch("[1-9]", response.headers["retry-after"])
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["content-type"] == "application/json"
    assert "www-authenticate" not in response.headers  # a client would log its user out


# --- An issuer that is down, ill or hostile --------------------------------------------------------------------------

# Most of these would give the stranger's key to a service that believes them.
FORGED = key_set(STRANGER)
PADDED = FORGED[:-1] + b', "padding": "' + b"x" * 50_000_000 + b'"}'


def redirect(status: int) -> Responder:
    """Send the client to another host, which happens to be us, for the stranger's key."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        if request.path == BY_DEFAULT:
            location = f"http://{request.headers['Host']}/forged".replace("127.0.0.1", "localhost")
            page(FORGED, status, Location=location)(request)
        else:
            page(FORGED)(request)

    return answer


# What an issuer may be like, other than right.
MOODS: dict[str, Responder | None] = {
    "down": None,
    "an error": page(FORGED, 500),
    "not found": page(FORGED, 404),
    "no content": page(b"", 204),
    "moved": redirect(302),
    "moved for good": redirect(308),
    "hangs": hang,
    "drips headers": drip(b"HTTP/1.1 200 OK\r\nX: "),
    "drips keys": drip(b"HTTP/1.1 200 OK\r\n\r\n" + FORGED),
    "hangs up": raw(b""),
    "no HTTP": raw(b"SSH-2.0-OpenSSH_9.6\r\n" + FORGED),
    "ends too early": page(FORGED, Content_Length="9999"),
    "nothing": page(b""),
    "50 megabytes": page(PADDED),
    "50 megabytes in a few": page(gzip.compress(PADDED, 1), Content_Encoding="gzip"),
    "no key": page(key_set()),
    "no key of use": page(key_set(*UNKNOWN_KINDS, OCT, ENCRYPTION)),
    "something else": page(b'{"message": "Not found"}'),
    "null as keys": page(b'{"keys": null}'),
    "an object as keys": page(b'{"keys": {"kid": {}}}'),
    "HTML": page(b"<!doctype html><title>Sign in</title>", Content_Type="text/html"),
    "a list": page(b"[]"),
    "nested too deep": page(b'{"keys":' * 8000),
    "too many digits": page(b'{"keys": [' + b"7" * 6000 + b"]}"),
    "another encoding": page(b"\xff\xfe" + b"\xd8\x00" * 9),
}
IMPATIENT = HASTY | {"service.KEYS_TIMEOUT": 0.4}


@pytest.fixture(scope="module")
def pair(database: str) -> Iterator[tuple[Issuer, Service]]:
    """An issuer, and a service that has its key."""
    with issuers_and_services(database, page(key_set(KEY)), constants=IMPATIENT) as [(issuer, service)]:
        yield issuer, service


@pytest.mark.parametrize("mood", MOODS)
def test_an_issuer_that_cannot_be_asked_or_believed_is_an_outage_for_tokens_by_unknown_keys_alone(
    pair: tuple[Issuer, Service], mood: str
) -> None:
    issuer, service = pair
    known, fresh, last, *forged = (
        key.sign(issuer.claims(new_user())) for key in (KEY, KEY, KEY, STRANGER, STRANGER, STRANGER)
    )
    issuer.publish(KEY)
    with service.client() as client:
        assert_refused(ask_with(client, forged[0]))
        assert ask_with(client, known).json() == {"items": []}
        failed = failed_fetches(service)
        issuer.behave(MOODS[mood])
        assert_no_keys(ask_with(client, forged[1]))
        for text in (known, fresh):
            assert ask_with(client, text).json() == {"items": []}
        assert_no_keys(ask_with(client, forged[2]))
        assert ask_with(client, last).json() == {"items": []}
        assert failed_fetches(service) == failed + 1
        assert set(issuer.paths) == {BY_DEFAULT}
        assert not any(text.rpartition(".")[2] in service.log for text in (known, fresh, last, *forged))


@pytest.mark.parametrize("mood", ["down", "an error", "hangs", "no key of use"])
def test_where_no_keys_were_ever_had_every_token_by_one_is_an_outage_until_there_are_some(
    database: str, mood: str
) -> None:
    with (
        issuers_and_services(database, MOODS[mood], constants=IMPATIENT) as [(issuer, service)],
        service.client() as client,
    ):
        known, forged = (key.sign(issuer.claims(new_user())) for key in (KEY, STRANGER))
        for text in (known, forged):
            assert_no_keys(response := ask_with(client, text))
            assert f'error="{NO_KEYS["detail"]}"' in service.log_line(response.headers["x-request-id"])
        assert client.get("/health/ready").status_code == 200
        assert failed_fetches(service) == 1
        issuer.publish(KEY)
        wait_until(lambda: ask_with(client, known).status_code == 200, HEALING)
        assert_refused(ask_with(client, forged))


def test_each_new_reason_is_logged_once_and_no_token_ever(database: str) -> None:
    with issuers_and_services(database, page(FORGED, 500)) as [(issuer, service)], service.client() as client:
        sent = KEY.sign(issuer.claims(new_user()))

        def ask_until_the_issuer_has_been_asked(times: int) -> None:
            wait_until(lambda: ask_with(client, sent).status_code == 503 and len(issuer.paths) == times, HEALING)

        ask_until_the_issuer_has_been_asked(times=2)  # the service has asked once by itself
        issuer.behave(page(b"no JSON"))
        ask_until_the_issuer_has_been_asked(times=3)
        lines = [line for line in service.log.splitlines() if "no keys could be fetched" in line]
        assert len(lines) == 2, lines
        assert all(line.startswith(f"{issuer.url}{BY_DEFAULT}: ") for line in lines)
        assert ("500" in lines[0], "JSON" in lines[1]) == (True, True)
        assert not any(part in service.log for part in sent.split("."))


# --- Floods and slowness ---------------------------------------------------------------------------------------------


def test_a_flood_of_unknown_keys_neither_reaches_the_issuer_nor_keeps_a_new_key_out(database: str) -> None:
    new, user, sent, enough = KEYS["ES256"], new_user(), itertools.count(), threading.Event()
    with (
        issuers_and_services(
            database, page(key_set(KEY)), BETTER_AUTH_SECRET=SECRET, constants={"service.KEYS_PAUSE": PAUSE}
        ) as [(issuer, service)],
        service.client() as client,
        ThreadPoolExecutor(50) as threads,
        contextlib.ExitStack() as stack,
    ):

        def flood() -> None:
            with service.client() as client:  # which is not as safe to share between threads as it should be
                while next(sent) < 200 or not enough.is_set():
                    assert_refused(ask_with(client, by_an_unknown_key(issuer)))

        stack.callback(enough.set)
        started = time.monotonic()
        floods = [threads.submit(flood) for _ in range(50)]
        wait_until(lambda: len(issuer.paths) == 2, HEALING)
        issuer.publish(KEY, new)
        for text in (KEY.sign(issuer.claims(user)), token(user)):
            assert ask_with(client, text).json() == {"items": []}
        assert ask_with(client, new.sign(issuer.claims(user))).json() == {"items": []}
        enough.set()
        for done in floods:
            done.result()
        assert len(issuer.paths) <= (time.monotonic() - started) / PAUSE + 3  # the first of them was before the flood
        assert issuer.most_at_once == 1


def test_a_slow_issuer_keeps_those_waiting_who_need_it_but_not_for_long_and_nobody_else(database: str) -> None:
    constants = HASTY | {"service.KEYS_TIMEOUT": 1.0}
    answers = page(key_set(KEY)), hang
    with issuers_and_services(database, *answers, BETTER_AUTH_SECRET=SECRET, constants=constants) as pairs:
        pairs[0][0].behave(hang)  # the other one has been hanging from the beginning
        others = ([KEY.sign(pairs[0][0].claims("known")), token("known")], [token("known")])
        for pair, texts in zip(pairs, others, strict=True):
            check_slowness(*pair, texts)


def check_slowness(issuer: Issuer, service: Service, others: list[str]) -> None:
    def wait_for_keys() -> None:
        with service.client() as client:
            assert_no_keys(ask_with(client, by_an_unknown_key(issuer)))

    with service.client() as client, ThreadPoolExecutor(20) as threads:
        waiting = [threads.submit(wait_for_keys) for _ in range(20)]
        served = 0
        while not any(answer.done() for answer in waiting):
            assert client.get("/health").status_code == 200
            for text in others:
                assert ask_with(client, text).status_code == 200
            served += 1
        assert served > 5  # who had to wait for the issuer as well would be answered when the others are
        for answer in waiting:
            answer.result(10)
    assert issuer.most_at_once == 1


def test_a_name_server_that_never_tells_the_issuers_address_keeps_nobody_from_the_database(
    database: str, start_service: StartService, tmp_path: Path
) -> None:
    """Nothing ends such a lookup, and those of the database's name are made in the same threads."""
    aliases = tmp_path / "aliases"
    os.mkfifo(aliases)  # glibc reads this file first for a name without a dot, and waits for somebody who writes to it
    service = start_service(
        database.replace("127.0.0.1", "localhost"),
        JWKS_URL="http://issuer/keys",
        HOSTALIASES=str(aliases),
        constants=HASTY | {"service.KEYS_TIMEOUT": 0.1},
    )
    with service.client() as client:
        for _ in range(6):
            assert_no_keys(ask_with(client, STRANGER.sign({"sub": "somebody"})))
        assert "no keys could be fetched: TimeoutError" in service.log
        terminate(database)
        assert ask_with(client, token(new_user())).json() == {"items": []}
    service.stop(signal.SIGKILL)  # the lookups would delay another stop


def test_who_hangs_up_waits_for_the_issuer_no_longer_and_ends_no_fetch_that_others_wait_for(database: str) -> None:
    new, go = KEYS["ES256"], threading.Event()

    def held(request: BaseHTTPRequestHandler) -> None:
        go.wait(10)
        page(key_set(KEY, new))(request)

    with (
        issuers_and_services(database, page(key_set(KEY))) as [(issuer, service)],
        service.client() as client,
        Raw(service) as leaving,
        ThreadPoolExecutor(1) as threads,
    ):
        issuer.behave(held)
        bearer = f"Authorization: Bearer {by_an_unknown_key(issuer)}"
        leaving.send("POST /api/tasks", bearer, "X-Request-ID: leaving", "Content-Length: 2", content=b"{}")
        staying = threads.submit(ask_with, client, new.sign(issuer.claims(new_user())))
        wait_until(lambda: len(issuer.paths) == 2, HEALING)
        leaving.socket.shutdown(socket.SHUT_RDWR)
        assert " status=499 " in service.log_line("leaving")
        assert not staying.done()
        go.set()
        assert staying.result().json() == {"items": []}
        assert len(issuer.paths) == 2
