"""Claims: the subject, the times, the audience and the issuer."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.support.service_process import Client, Service
from tests.support.tokens import (
    AUDIENCE,
    BEYOND_LEEWAY,
    ISSUER,
    STRICT_SECRET,
    WITHIN_LEEWAY,
    ask_with,
    assert_refused,
    caller,
    claims,
    new_user,
    sign,
    sign_strictly,
)

# --- The subject -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", [7, None, ["alice"], "", "😀" * 256, "a\0b", "\ud83d"], ids=ascii)
def test_a_subject_that_cannot_be_a_user_is_refused(http: Client, subject: object) -> None:
    assert_refused(ask_with(http, sign(claims("", sub=subject))))


def test_a_token_without_a_subject_is_refused(http: Client) -> None:
    payload = claims("") | {"id": new_user(), "user_id": new_user(), "email": "alice@example.com"}
    del payload["sub"]
    assert_refused(ask_with(http, sign(payload)))


def test_the_session_cookie_cache_of_better_auth_is_no_token(http: Client) -> None:
    """It is signed with the same secret, but says that a session was cached, not who calls an API."""
    user = {"id": new_user(), "email": "alice@example.com", "emailVerified": True}
    session = {"id": "s", "token": "t", "userId": user["id"], "expiresAt": "2099-01-01T00:00:00.000Z"}
    payload = {"session": session, "user": user, "updatedAt": 1, "version": "1", "iat": 1, "exp": 4_000_000_000}
    assert_refused(ask_with(http, sign(payload)))


@pytest.mark.parametrize(
    "subject",
    ["7", "😀" * 254, " ", "a\nb", "'; DROP TABLE task; --", "null\\u0000", "\u202ealice"],
    ids=ascii,
)
def test_any_other_text_of_at_most_255_characters_is_a_user(http: Client, subject: str) -> None:
    for user in (subject, f"{subject}!"):  # the longest have 255 characters with it
        sent = sign(claims(user))
        assert caller(http, sent) == user
        assert {task["user_id"] for task in ask_with(http, sent).json()["items"]} == {user}


def test_subjects_that_only_look_alike_are_different_users(http: Client) -> None:
    name = new_user()
    users = [name, name.upper(), f"{name} ", f" {name}", f"{name}\n", f"{name}é", f"{name}e\u0301", f"{name}%"]
    for user in users:
        assert ask_with(http, sign(claims(user))).json() == {"items": []}, ascii(user)
        assert caller(http, sign(claims(user))) == user


def test_a_subject_given_twice_is_not_the_first_one(http: Client) -> None:
    """A reader of JSON takes the last one, or refuses it: RFC 7519, section 4."""
    first, last = new_user(), new_user()
    assert caller(http, sign(claims(first))) == first
    response = ask_with(http, sign(f'{{"sub": "{first}", "exp": 4000000000, "sub": "{last}"}}'))
    assert (response.status_code, response.json()) in ((200, {"items": []}), (401, {"detail": "Invalid token"}))


def test_a_subject_writes_no_line_of_its_own_into_the_log(service: Service, http: Client) -> None:
    forged = "method=GET path=/forged-by-a-subject status=200 ms=0.1 id=forged"
    for line_break in ("\n", "\r", "\r\n", "\x85", "\u2028", "\x0b"):
        response = ask_with(http, sign(claims(f"x{line_break}{forged}")))
        assert response.status_code == 200
        line = service.log_line(response.headers["x-request-id"])
        assert line.startswith('method=GET path="/api/tasks" status=200 ')
    assert not [line for line in service.log.splitlines() if line.startswith(forged)]


# --- The time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ago", [BEYOND_LEEWAY, 10**10], ids=["a while ago", "before 1970"])
def test_a_token_that_has_expired_is_refused_as_such(http: Client, ago: float) -> None:
    assert_refused(ask_with(http, sign(claims(new_user(), exp=int(time.time() - ago)))), "Token has expired")
    assert_refused(ask_with(http, sign(claims(new_user(), exp=time.time() - ago))), "Token has expired")


def test_a_forged_token_is_not_told_that_it_has_expired(http: Client) -> None:
    assert_refused(ask_with(http, sign(claims(new_user(), exp=1), key=b"another secret, of 32 characters or more")))


def test_a_token_without_an_expiry_is_refused(http: Client) -> None:
    payload = claims(new_user())
    del payload["exp"]
    assert_refused(ask_with(http, sign(payload)))


@pytest.mark.parametrize(
    "expiry",
    ['"4000000000"', "true", "null", "[4000000000]", "NaN", "Infinity", "-1e400", "9" * 5000],
    ids=lambda text: text[:30],
)
def test_an_expiry_that_is_no_finite_number_is_refused(http: Client, expiry: str) -> None:
    assert_refused(ask_with(http, sign(f'{{"sub": "{new_user()}", "exp": {expiry}}}')))


@pytest.mark.parametrize("expiry", ["4000000000.75", "9223372036854775808", "1e300"])
def test_any_finite_number_in_the_future_is_an_expiry(http: Client, expiry: str) -> None:
    user = new_user()
    assert caller(http, sign(f'{{"sub": "{user}", "exp": {expiry}}}')) == user


def test_an_expiry_beyond_a_double_is_finite_too(http: Client) -> None:
    endless = sign(f'{{"sub": "{new_user()}", "exp": 1{"0" * 400}}}')
    for _ in range(2):  # the second one may come from the cache
        assert ask_with(http, endless).json() == {"items": []}


def test_the_clocks_may_differ_a_little(http: Client) -> None:
    now, user = time.time(), new_user()
    assert caller(http, sign(claims(user, exp=now - WITHIN_LEEWAY))) == user
    assert caller(http, sign(claims(user, iat=now + WITHIN_LEEWAY, nbf=now + WITHIN_LEEWAY))) == user
    assert caller(http, sign(claims(user, iat=now - 10**6, nbf=now - 10**6))) == user


@pytest.mark.parametrize("claim", ["iat", "nbf"])
def test_a_token_of_the_future_is_refused(http: Client, claim: str) -> None:
    assert_refused(ask_with(http, sign(claims(new_user(), **{claim: time.time() + BEYOND_LEEWAY}))))


@pytest.mark.parametrize("claim", ["iat", "nbf"])
@pytest.mark.parametrize("value", ['"soon"', "null", "NaN", "Infinity"])
def test_a_start_that_is_no_finite_number_is_refused(http: Client, claim: str, value: str) -> None:
    assert_refused(ask_with(http, sign(f'{{"sub": "{new_user()}", "exp": 4000000000, "{claim}": {value}}}')))


# --- The audience, the issuer, the secret ----------------------------------------------------------------------------


@pytest.mark.parametrize("claim", ["aud", "iss"])
def test_where_none_is_configured_any_audience_and_issuer_is_fine(http: Client, claim: str) -> None:
    user = new_user()
    for value in ("https://anybody.example.com", "", None, 7, ["a", "b"], {"a": 1}):
        assert caller(http, sign(claims(user, **{claim: value}))) == user


@pytest.mark.parametrize("audience", [AUDIENCE, ["x", AUDIENCE]])
def test_a_token_for_the_configured_audience_is_accepted(strict_http: Client, audience: object) -> None:
    user = new_user()
    assert caller(strict_http, sign_strictly(user, aud=audience)) == user


@pytest.mark.parametrize("claim", ["aud", "iss"])
def test_a_token_for_another_audience_or_by_another_issuer_is_refused(strict_http: Client, claim: str) -> None:
    right = AUDIENCE if claim == "aud" else ISSUER
    other = ISSUER if claim == "aud" else AUDIENCE
    wrong: list[Any] = [other, f"{right}/", right[:-1], f"{right}.evil.example", right.upper(), "", "*", None, 7]
    for value in [*wrong, [], [other], [right[:-1]], {right: 1}, list(right)]:
        assert_refused(ask_with(strict_http, sign_strictly(new_user(), **{claim: value})))


@pytest.mark.parametrize("claim", ["aud", "iss"])
def test_a_token_that_does_not_name_the_configured_audience_and_issuer_is_refused(
    strict_http: Client, claim: str
) -> None:
    payload = claims(new_user(), aud=AUDIENCE, iss=ISSUER)
    del payload[claim]
    assert_refused(ask_with(strict_http, sign(payload, key=STRICT_SECRET.encode())))


def test_the_issuer_is_one_and_not_a_list(strict_http: Client) -> None:
    assert_refused(ask_with(strict_http, sign_strictly(new_user(), iss=[ISSUER])))


def test_an_expired_token_is_told_so_where_an_audience_is_configured_too(strict_http: Client) -> None:
    assert_refused(ask_with(strict_http, sign_strictly(new_user(), exp=1)), "Token has expired")


def test_the_secret_is_used_as_its_utf_8_text(strict_http: Client) -> None:
    user, secret = new_user(), STRICT_SECRET
    assert caller(strict_http, sign_strictly(user)) == user
    payload = claims(user, aud=AUDIENCE, iss=ISSUER)
    for key in (
        secret.strip().encode(),
        secret.encode("utf-16-le"),
        secret.encode("ascii", "ignore"),
        secret.encode("ascii", "replace"),
    ):
        assert_refused(ask_with(strict_http, sign(payload, key=key)))
    assert_refused(ask_with(strict_http, sign(payload)))
