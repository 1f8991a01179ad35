"""Secrets and keys that are replaced by new ones."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

import service
from tests.support.issuer import (
    GENERATE,
    HASTY,
    KEY,
    KEYS,
    STRANGER,
    Key,
    by_an_unknown_key,
    failed_fetches,
    issuers_and_services,
    key_set,
    page,
)
from tests.support.service_process import SECRET, Client, token
from tests.support.settings import PYTHON, run_with_settings
from tests.support.tokens import (
    AUDIENCE,
    ISSUER,
    OLD_SECRET,
    STRICT_SECRET,
    ask_with,
    assert_refused,
    caller,
    claims,
    encode,
    new_user,
    sign,
    sign_strictly,
)
from tests.support.waiting import wait_until

# --- While the secret is rotated -------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [STRICT_SECRET, OLD_SECRET], ids=["new", "old"])
def test_a_token_by_the_new_or_the_old_secret_is_accepted(strict_http: Client, secret: str) -> None:
    user = new_user()
    for _ in range(2):  # the second one may come from the cache
        assert caller(strict_http, sign_strictly(user, secret=secret)) == user


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"exp": 1}, "Token has expired"),
        ({"sub": ""}, "Invalid token"),
        ({"aud": ISSUER}, "Invalid token"),
        ({"iss": AUDIENCE}, "Invalid token"),
    ],
    ids=str,
)
def test_a_token_by_the_old_secret_is_refused_in_the_same_words(
    strict_http: Client, changes: dict[str, Any], detail: str
) -> None:
    assert_refused(ask_with(strict_http, sign_strictly(new_user(), secret=OLD_SECRET, **changes)), detail)


@pytest.mark.parametrize(("algorithm", "digest"), [("HS512", "sha512"), ("EdDSA", "sha256")])
def test_the_old_secret_is_good_for_no_other_algorithm(strict_http: Client, algorithm: str, digest: str) -> None:
    payload = claims(new_user(), aud=AUDIENCE, iss=ISSUER)
    assert_refused(ask_with(strict_http, sign(payload, {"alg": algorithm}, key=OLD_SECRET.encode(), by=digest)))


def test_new_tokens_are_signed_with_the_new_secret() -> None:
    secrets = {"BETTER_AUTH_SECRET": STRICT_SECRET, "BETTER_AUTH_SECRET_OLD": OLD_SECRET}
    printed = run_with_settings([*PYTHON, "token", "alice"], **secrets)
    assert jwt.decode(printed.stdout.strip(), STRICT_SECRET, algorithms=["HS256"])["sub"] == "alice"


# --- Keys that come and go -------------------------------------------------------------------------------------------


def test_a_new_key_is_accepted_from_the_first_request_on_and_the_old_one_while_it_is_listed(database: str) -> None:
    old, new = KEYS["EdDSA"], KEYS["ES256"]
    with issuers_and_services(database, page(key_set(old))) as [(issuer, service)], service.client() as client:
        user = new_user()
        assert caller(client, old.sign(issuer.claims(user))) == user
        issuer.publish(new, old)
        assert caller(client, new.sign(issuer.claims(user))) == user
        assert caller(client, old.sign(issuer.claims(user, n=1))) == user
        assert len(issuer.paths) == 2


def test_a_key_made_up_by_somebody_keeps_the_next_new_one_out_of_no_request(database: str) -> None:
    with issuers_and_services(database, page(key_set(KEY))) as [(issuer, service)], service.client() as client:
        for algorithm in ("ES256", "RS256"):
            assert_refused(ask_with(client, by_an_unknown_key(issuer)))
            issuer.publish(KEY, KEYS[algorithm])
            user = new_user()
            assert caller(client, KEYS[algorithm].sign(issuer.claims(user))) == user
        assert len(issuer.paths) == 5


def test_the_keys_are_fetched_every_two_minutes() -> None:
    assert service.KEYS_REFRESH == 120


def test_the_keys_are_fetched_again_and_again_though_nobody_asks_for_one(database: str) -> None:
    old, new = KEYS["EdDSA"], KEYS["ES256"]
    constants = HASTY | {"service.KEYS_REFRESH": 0.3}
    with (
        issuers_and_services(database, page(key_set(old)), constants=constants) as [(issuer, service)],
        service.client() as client,
    ):
        used = old.sign(issuer.claims(new_user()))
        assert ask_with(client, used).json() == {"items": []}
        issuer.publish(new)
        wait_until(lambda: f'fetched the keys "{new.kid}"\n' in service.log)
        assert_refused(ask_with(client, used))
        issuer.behave(None)
        wait_until(lambda: failed_fetches(service) == 1)
        assert ask_with(client, new.sign(issuer.claims(new_user()))).json() == {"items": []}


def test_the_issuer_gets_no_cookie_back(database: str) -> None:
    """Else cookies of ever new names would make a head that it refuses, until the service is started anew."""
    cookies = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        cookies.append(request.headers.get("Cookie"))
        page(key_set(KEY), Set_Cookie="a=b")(request)

    with issuers_and_services(database, answer) as [(issuer, service)], service.client() as client:
        assert_refused(ask_with(client, by_an_unknown_key(issuer)))
        assert cookies == [None, None]


def test_a_retired_key_ends_for_every_token_when_the_keys_are_fetched_again(database: str) -> None:
    old, new = KEYS["EdDSA"], KEYS["ES256"]
    with (
        issuers_and_services(database, page(key_set(old, new)), BETTER_AUTH_SECRET=SECRET) as [(issuer, service)],
        service.client() as client,
    ):
        user = new_user()
        used, fresh = old.sign(issuer.claims(user)), old.sign(issuer.claims(user, n=1))
        others = [new.sign(issuer.claims(user)), token(user)]
        for text in (used, *others):
            assert caller(client, text) == user
        issuer.publish(new)
        assert_refused(ask_with(client, STRANGER.sign(issuer.claims(user))))
        for text in (used, fresh):
            assert_refused(ask_with(client, text))
        for text in others:
            assert caller(client, text) == user


MALFORMED: list[object] = [
    None,
    "keys",
    7,
    [],
    {"kty": "oct", "kid": "no secret"},
    {"kty": "RSA", "alg": ["RS256"]},
    Key("ES256", alg="none"),
    Key("ES256", kid=[]),
    Key("ES256", use=["sig"]),
    Key("EdDSA", x="\u00e9"),
    Key("EdDSA", x=7),
    # A private key of 40,000 bits that is none: to look for the missing parts of it takes a minute.
    {"kty": "RSA", "kid": "private", "e": "AQAB", "n": encode(b"\xff" * 5000), "d": encode(b"\x7f" * 5000)},
]


def test_keys_that_cannot_be_read_beside_a_good_one_do_no_harm(database: str) -> None:
    answers = page(key_set(*MALFORMED, KEY))
    with issuers_and_services(database, answers) as [(issuer, service)], service.client() as client:
        user = new_user()
        assert caller(client, KEY.sign(issuer.claims(user))) == user
        assert failed_fetches(service) == 0


def test_a_key_too_short_for_its_algorithm_verifies_nothing(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 7518, section 3.3, demands 2048 bits."""
    monkeypatch.setitem(GENERATE, "RS256", lambda: rsa.generate_private_key(65537, 1024))
    weak = Key("RS256")
    with issuers_and_services(database, page(key_set(weak, KEY))) as [(issuer, service)], service.client() as client:
        assert_refused(ask_with(client, weak.sign(issuer.claims(new_user()))))
        assert ask_with(client, KEY.sign(issuer.claims(new_user()))).status_code == 200


def test_a_key_that_comes_back_under_the_same_id_as_another_one_replaces_it(database: str) -> None:
    theirs = Key("EdDSA", kid=KEY.kid)
    with issuers_and_services(database, page(key_set(KEY))) as [(issuer, service)], service.client() as client:
        user = new_user()
        used = KEY.sign(issuer.claims(user))
        assert caller(client, used) == user
        issuer.publish(theirs)
        assert_refused(ask_with(client, STRANGER.sign(issuer.claims(user))))
        assert_refused(ask_with(client, used))
        assert caller(client, theirs.sign(issuer.claims(user), kid=KEY.kid)) == user
