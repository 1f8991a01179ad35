"""An issuer that is down, ill, hostile or slow, and floods of keys that it does not know."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler

import httpx
import pytest

from tests.support.issuer import (
    BY_DEFAULT,
    ENCRYPTION,
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

NO_KEYS = {"detail": "The keys to verify tokens with are not available right now, try again soon"}

PAUSE = 2.1
"""Seconds after which a service that has asked the issuer for an unknown key asks again for another one."""

PROMPT = 1.5
"""Seconds that an answer may take which waits for nothing, on a machine that does other things too."""

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


MOODS: dict[str, dict[str, Responder | None]] = {
    "usual": {
        "down": None,
        "an error": page(FORGED, 500),
        "a redirect": redirect(302),
        "50 megabytes": page(PADDED),
        "nothing": page(b""),
    },
    "slow": {
        "hangs": hang,
        "drips": drip(b""),
        "drips headers": drip(b"HTTP/1.1 200 OK\r\nX: "),
        "drips keys": drip(b"HTTP/1.1 200 OK\r\n\r\n" + FORGED),
    },
    "another status": {
        "not found": page(FORGED, 404),
        "not allowed": page(FORGED, 401),
        "no content": page(b"", 204),
        "not modified": page(b"", 304),
        "moved": redirect(301),
        "moved for now": redirect(307),
        "moved for good": redirect(308),
    },
    "no answer": {
        "hangs up": raw(b""),
        "no HTTP": raw(b"SSH-2.0-OpenSSH_9.6\r\n" + FORGED),
        "ends too early": page(FORGED, Content_Length="9999"),
        "50 megabytes in a few": lambda request: page(gzip.compress(PADDED), Content_Encoding="gzip")(request),
    },
    "no keys": {
        "no key": page(key_set()),
        "no key of use": page(key_set(*UNKNOWN_KINDS, OCT, ENCRYPTION)),
        "something else": page(b'{"message": "Not found"}'),
        "null as keys": page(b'{"keys": null}'),
        "a number as keys": page(b'{"keys": 7}'),
        "an object as keys": page(b'{"keys": {"kid": {}}}'),
    },
    "no object": {
        "HTML": page(b"<!doctype html><title>Sign in</title>", Content_Type="text/html"),
        "a list": page(b"[]"),
        "null": page(b"null"),
        "a number": page(b"7"),
        "a string": page(b'"keys"'),
        "nested too deep": page(b'{"keys":' * 8000),
        "too many digits": page(b'{"keys": [' + b"7" * 6000 + b"]}"),
        "another encoding": page(b"\xff\xfe" + b"\xd8\x00" * 9),
    },
}


@pytest.mark.parametrize("moods", ["usual", *(pytest.param(name, marks=pytest.mark.long) for name in [*MOODS][1:])])
def test_an_issuer_that_cannot_be_asked_or_believed_is_an_outage_for_tokens_by_unknown_keys_alone(
    database: str, moods: str
) -> None:
    answers = MOODS[moods]
    with issuers_and_services(database, *answers.values()) as pairs, ThreadPoolExecutor(len(pairs)) as threads:
        checks = [threads.submit(check_outage, *pair, answers[name]) for pair, name in zip(pairs, answers, strict=True)]
    errors = []
    for name, done in zip(answers, checks, strict=True):
        if isinstance(error := done.exception(), Exception):
            error.add_note(f"The issuer's mood: {name}")
            errors.append(error)
    if errors:
        raise ExceptionGroup(moods, errors)


def check_outage(issuer: Issuer, service: Service, answer: Responder | None) -> None:
    known, fresh, last, *forged = (
        key.sign(issuer.claims(new_user())) for key in (KEY, KEY, KEY, STRANGER, STRANGER, STRANGER)
    )
    with service.client() as client:
        # No keys were ever had.
        for text in (known, forged[0]):
            assert_no_keys(ask_with(client, text))
        assert client.get("/health").status_code == 200
        assert failed_fetches(service) == 1

        issuer.publish(KEY)
        wait_until(lambda: ask_with(client, known).status_code == 200, HEALING)
        assert_refused(ask_with(client, forged[0]))

        issuer.behave(answer)
        time.sleep(PAUSE)
        assert_no_keys(ask_with(client, forged[1]))
        for text in (known, fresh):
            assert ask_with(client, text).json() == {"items": []}
        assert_no_keys(ask_with(client, forged[2]))
        assert ask_with(client, last).json() == {"items": []}
        assert failed_fetches(service) == 2
        assert set(issuer.paths) <= {BY_DEFAULT}
        assert not any(text.rpartition(".")[2] in service.log for text in (known, fresh, last, *forged))


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
        issuers_and_services(database, page(key_set(KEY)), BETTER_AUTH_SECRET=SECRET) as [(issuer, service)],
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
        asked = time.monotonic()
        for text in (KEY.sign(issuer.claims(user)), token(user)):
            assert ask_with(client, text).json() == {"items": []}
        assert time.monotonic() - asked < PROMPT, "what needs no new key does not wait"
        assert ask_with(client, new.sign(issuer.claims(user))).json() == {"items": []}
        assert time.monotonic() - asked < HEALING
        enough.set()
        for done in floods:
            done.result()
        assert len(issuer.paths) <= (time.monotonic() - started) / 2 + 3  # the first of them was before the flood
        assert issuer.most_at_once == 1


def test_a_slow_issuer_keeps_those_waiting_who_need_it_but_not_for_long_and_nobody_else(database: str) -> None:
    with (
        issuers_and_services(database, page(key_set(KEY)), hang, BETTER_AUTH_SECRET=SECRET) as pairs,
        ThreadPoolExecutor(len(pairs)) as threads,
    ):
        pairs[0][0].behave(hang)  # the other one has been hanging from the beginning
        others = ([KEY.sign(pairs[0][0].claims("known")), token("known")], [token("known")])
        checks = [threads.submit(check_slowness, *pair, texts) for pair, texts in zip(pairs, others, strict=True)]
    for check in checks:
        check.result()


def check_slowness(issuer: Issuer, service: Service, others: list[str]) -> None:
    def wait_for_keys() -> None:
        with service.client() as client:
            assert_no_keys(ask_with(client, by_an_unknown_key(issuer)))

    with service.client() as client, ThreadPoolExecutor(20) as threads:
        asked = time.monotonic()
        waiting = [threads.submit(wait_for_keys) for _ in range(20)]
        while not all(answer.done() for answer in waiting):
            started = time.monotonic()
            assert client.get("/health").status_code == 200
            for text in others:
                assert ask_with(client, text).status_code == 200
            assert time.monotonic() - started < PROMPT
            time.sleep(0.05)
        assert time.monotonic() - asked < 7  # a pause of 2 seconds, a fetch of 3, and a busy machine
        for answer in waiting:
            answer.result()
    assert issuer.most_at_once == 1
