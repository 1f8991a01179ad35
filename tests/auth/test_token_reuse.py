"""A token that comes again is still the same user's, and no longer good than it says."""

from __future__ import annotations

import json
import time

import pytest

from tests.support.fixtures import Figures, StartService
from tests.support.service_process import SECRET, Client, Service, token
from tests.support.tokens import (
    ask_with,
    assert_refused,
    caller,
    claims,
    encode,
    new_user,
    sign,
)
from tests.support.waiting import wait_until
from tests.support.wire import Raw

LEEWAY = 2
"""Seconds: for the test that has to see it end."""

# --- The same token again --------------------------------------------------------------------------------------------


def test_the_same_token_again_is_the_same_user(http: Client) -> None:
    users = [new_user(), new_user()]
    tokens = {user: sign(claims(user)) for user in users}
    for user in users * 3:
        assert caller(http, tokens[user]) == user
    assert {task["user_id"] for task in ask_with(http, tokens[users[0]]).json()["items"]} == {users[0]}


def test_a_variant_of_a_token_that_was_good_is_refused(http: Client) -> None:
    user, other = new_user(), new_user()
    good = sign(claims(user))
    assert caller(http, good) == user
    header, payload, signature = good.split(".")
    theirs = encode(json.dumps(claims(other)).encode())
    none = encode(b'{"alg": "none"}')
    for variant in (
        *(f"{header}.{theirs}.{signature}", f"{header}.{payload}.", f"{header}.{payload}", f"{none}.{payload}."),
        *(
            f"{header}.{payload}.{signature[:-4]}",
            f"{header}.{payload}.{'A' * 43}",
            good.swapcase(),
            good[1:],
            f"{good}x",
        ),
        *(f"{none}.{payload}.{signature}", f"{header}.{payload}A.{signature}", f"{good} {good}", f"{good},{good}"),
    ):
        assert_refused(ask_with(http, variant))
    assert caller(http, good) == user


@pytest.mark.fault
def test_a_token_that_was_used_before_it_expired_ends_with_the_leeway(
    database: str, start_service: StartService, figures: Figures
) -> None:
    service = start_service(database, constants={"service.LEEWAY": LEEWAY})
    service.wait_until_ready()
    with service.client() as http:
        user, expiry = new_user(), time.time() + 1
        short = sign(claims(user, exp=expiry))
        wait_until(lambda: ask_with(http, short).status_code != 200, LEEWAY + 5)
        assert time.time() >= expiry + LEEWAY
        assert_refused(ask_with(http, short), "Token has expired")
    figures("A token expires while it is in the cache", "401 when the leeway is over")


def test_a_crowd_of_users_takes_nobody_s_place(start_service: StartService, database_url: str) -> None:
    """More of them than a process remembers. The first one is the first that this process has seen."""
    service = start_service(database_url, constants={"service.CACHED_TOKENS": 20})
    service.wait_until_ready()
    http = service.client()
    users = [new_user() for _ in range(50)]
    tokens = [sign(claims(user)) for user in users]
    assert caller(http, tokens[0]) == users[0]
    with Raw(service) as connection:
        for text in tokens:
            connection.send("GET /api/nothing", f"Authorization: Bearer {text}")
            assert connection.answer().status == 404
    for index in (0, 1, -2, -1):
        assert caller(http, tokens[index]) == users[index]
        assert {task["user_id"] for task in ask_with(http, tokens[index]).json()["items"]} == {users[index]}
    header, _, signature = tokens[0].split(".")
    assert_refused(ask_with(http, f"{header}.{tokens[1].split('.')[1]}.{signature}"))
    http.close()


def test_the_log_holds_no_token_and_no_secret(service: Service, http: Client) -> None:
    good, bad = token(new_user()), sign(claims(new_user()), key=b"another secret, of 32 characters or more")
    for text, status in ((good, 200), (bad, 401)):
        response = ask_with(http, text)
        assert response.status_code == status
        service.log_line(response.headers["x-request-id"])
        assert text not in service.log
        assert text.split(".")[2] not in service.log
    assert SECRET not in service.log
