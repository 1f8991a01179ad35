"""Tokens by an issuer's public keys: which are accepted, and which key and algorithm belong together."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.support.issuer import (
    AUTH_ORIGIN,
    BY_DEFAULT,
    ENCRYPTION,
    HASTY,
    KEY,
    KEYS,
    OCT,
    SHARED_SECRET,
    STRANGER,
    UNKNOWN_KINDS,
    Issuer,
    Key,
    key_set,
    running_services,
    without_none,
)
from tests.support.service_process import SECRET, Client, token
from tests.support.tokens import (
    BEYOND_LEEWAY,
    OLD_SECRET,
    WITHIN_LEEWAY,
    ask_with,
    assert_refused,
    caller,
    claims,
    encode,
    new_user,
    sign,
)

SESSION_CACHE = "better-auth:session-cache"
AUDIENCE = "https://app.example.com"
ISSUER = "https://login.example.com"
ELSEWHERE = "/tenants/7/keys?version=2"

# --- Its keys, and services that know of it --------------------------------------------------------------------------
WITHOUT_ALGORITHM = {algorithm: Key(algorithm, alg=None) for algorithm in ("EdDSA", "ES256", "ES512", "RS256")}


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    """An issuer that is well: no test takes a key from it."""
    keys = [*UNKNOWN_KINDS, OCT, ENCRYPTION, *KEYS.values(), *WITHOUT_ALGORITHM.values()]
    with contextlib.closing(Issuer(*keys)) as issuer:
        yield issuer


@pytest.fixture(scope="module")
def http(database: str, issuer: Issuer) -> Iterator[dict[str, Client]]:
    """Clients, without a token, of services that differ in their settings."""
    url = f"{issuer.url}/some/path/"
    settings = {
        "keys": {"BETTER_AUTH_URL": url},
        "keys and secret": {"BETTER_AUTH_URL": url, "BETTER_AUTH_SECRET": SECRET},
        "keys and two secrets": {
            "BETTER_AUTH_URL": url,
            "BETTER_AUTH_SECRET": SECRET,
            "BETTER_AUTH_SECRET_OLD": OLD_SECRET,
        },
        "keys elsewhere": {"BETTER_AUTH_URL": f"{AUTH_ORIGIN}/some/path/", "JWKS_URL": issuer.url + ELSEWHERE},
        "only JWKS_URL": {"JWKS_URL": issuer.url + ELSEWHERE},
        "audience": {"BETTER_AUTH_URL": url, "BETTER_AUTH_SECRET": SECRET, "JWT_AUDIENCE": AUDIENCE},
        "issuer": {"BETTER_AUTH_URL": url, "BETTER_AUTH_SECRET": SECRET, "JWT_ISSUER": ISSUER},
    }
    hasty = [{"constants": HASTY} | each for each in settings.values()]
    with running_services(database, *hasty) as services, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(service.client()) for service in services]
        yield dict(zip(settings, clients, strict=True))


def assert_all_refused(client: Client, *tokens: str) -> None:
    """Assert that each token is refused, all at once: those that name unknown keys wait for the next fetch."""

    def assert_one_refused(sent: str) -> None:
        with Client(str(client.base_url)) as own:  # one is not as safe to share between threads as it should be
            assert_refused(ask_with(own, sent))

    with ThreadPoolExecutor(len(tokens)) as threads:
        list(threads.map(assert_one_refused, tokens))


# --- Tokens that are accepted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_token_by_any_of_the_algorithms_proves_its_subject(
    http: dict[str, Client], issuer: Issuer, algorithm: str
) -> None:
    user = new_user()
    sent = KEYS[algorithm].sign(issuer.claims(user))
    assert ask_with(http["keys"], sent).json() == {"items": []}
    assert caller(http["keys"], sent) == user
    assert {task["user_id"] for task in ask_with(http["keys"], sent).json()["items"]} == {user}


@pytest.mark.parametrize("algorithm", [*WITHOUT_ALGORITHM, "PS256"])
def test_a_key_that_names_no_algorithm_is_good_for_those_of_its_kind(
    http: dict[str, Client], issuer: Issuer, algorithm: str
) -> None:
    user = new_user()
    key = WITHOUT_ALGORITHM["RS256" if algorithm == "PS256" else algorithm]
    assert caller(http["keys"], key.sign(issuer.claims(user), by=algorithm)) == user


def test_both_kinds_of_token_are_accepted_side_by_side(http: dict[str, Client], issuer: Issuer) -> None:
    user = new_user()
    for sent in (KEY.sign(issuer.claims(user)), token(user), KEYS["ES256"].sign(issuer.claims(user))) * 2:
        assert caller(http["keys and secret"], sent) == user


@pytest.mark.parametrize("claim", ["aud", "iss"])
def test_beside_an_issuer_a_token_by_the_secret_may_still_be_for_anybody(
    http: dict[str, Client], issuer: Issuer, claim: str
) -> None:
    user = new_user()
    for value in ("https://anybody.example.com", issuer.url, "", 7, ["a", "b"]):
        assert caller(http["keys and secret"], sign(claims(user, **{claim: value}))) == user


def test_the_keys_are_where_the_settings_say_and_the_path_of_better_auth_url_is_not_part_of_that(
    http: dict[str, Client], issuer: Issuer
) -> None:
    for client in http.values():
        assert client.get("/health").status_code == 200
    assert set(issuer.paths) == {BY_DEFAULT, ELSEWHERE}


def test_jwks_url_moves_the_keys_and_leaves_the_audience_and_the_issuer(
    http: dict[str, Client], issuer: Issuer
) -> None:
    user = new_user()
    right = {"aud": AUTH_ORIGIN, "iss": AUTH_ORIGIN}
    assert caller(http["keys elsewhere"], KEY.sign(claims(user, **right))) == user
    for wrong in ({"aud": issuer.url}, {"iss": issuer.url}, {"iss": f"{AUTH_ORIGIN}/some/path/"}):
        assert_refused(ask_with(http["keys elsewhere"], KEY.sign(claims(user, **right | wrong))))


def test_with_jwks_url_alone_any_audience_and_issuer_is_fine(http: dict[str, Client]) -> None:
    user = new_user()
    for changes in ({}, {"aud": "anybody"}, {"aud": ["a", "b"], "iss": "anybody"}):
        assert caller(http["only JWKS_URL"], KEY.sign(claims(user, **changes))) == user


@pytest.mark.parametrize(("name", "claim", "value"), [("audience", "aud", AUDIENCE), ("issuer", "iss", ISSUER)])
def test_a_configured_audience_or_issuer_is_required_of_both_kinds_and_replaces_the_origin(
    http: dict[str, Client], issuer: Issuer, name: str, claim: str, value: str
) -> None:
    user, client = new_user(), http[name]
    assert caller(client, KEY.sign(issuer.claims(user, **{claim: value}))) == user
    assert caller(client, sign(claims(user, **{claim: value}))) == user
    for wrong in (issuer.url, f"{value}/", None):
        assert_refused(ask_with(client, KEY.sign(issuer.claims(user, **{claim: wrong}))))
        assert_refused(ask_with(client, sign(without_none(claims(user, **{claim: wrong})))))
    other = "iss" if claim == "aud" else "aud"
    assert_refused(ask_with(client, KEY.sign(issuer.claims(user, **{claim: value, other: value}))))
    assert caller(client, sign(claims(user, **{claim: value, other: "anything"}))) == user


# --- Keys and algorithms that do not belong together -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["keys", "keys and secret"])
@pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "RS256"])  # one of each kind of key
def test_a_public_key_is_no_secret(http: dict[str, Client], issuer: Issuer, algorithm: str, name: str) -> None:
    key = KEYS[algorithm]
    public = key.private.public_key()
    texts = [
        public.public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo) for encoding in (Encoding.PEM, Encoding.DER)
    ]
    texts += [public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH), json.dumps(key.jwk).encode(), key_set(key)]
    members = [key.jwk[member].encode() for member in ("x", "n") if member in key.jwk]
    texts += [*members, *(base64_bytes(member) for member in members), texts[0].strip(), b""]
    for secret in texts:
        for header in ({}, {"kid": key.kid}):
            assert_refused(ask_with(http[name], sign(issuer.claims(new_user()), {"alg": "HS256"} | header, key=secret)))


@pytest.mark.parametrize("name", ["keys", "keys and secret"])
def test_a_secret_that_the_issuer_publishes_is_not_taken(http: dict[str, Client], issuer: Issuer, name: str) -> None:
    for header in ({"kid": "oct"}, {}):
        assert_refused(
            ask_with(http[name], sign(issuer.claims(new_user()), {"alg": "HS256"} | header, key=SHARED_SECRET))
        )


def test_a_token_by_the_secret_is_refused_where_there_are_only_keys(http: dict[str, Client], issuer: Issuer) -> None:
    for header in ({}, {"kid": KEY.kid}, {"kid": "unknown"}):
        assert_refused(ask_with(http["keys"], sign(issuer.claims(new_user()), {"alg": "HS256"} | header)))


def test_the_id_of_a_public_key_leads_a_token_by_the_secret_nowhere(http: dict[str, Client]) -> None:
    user = new_user()
    assert caller(http["keys and secret"], sign(claims(user), {"alg": "HS256", "kid": KEY.kid})) == user


@pytest.mark.parametrize("secret", [SECRET, OLD_SECRET], ids=["new", "old"])
def test_neither_secret_stands_in_for_a_public_key(http: dict[str, Client], issuer: Issuer, secret: str) -> None:
    user, key = new_user(), secret.encode()
    assert caller(http["keys and two secrets"], sign(claims(user), key=key)) == user
    for algorithm in KEYS:
        header = {"alg": algorithm, "kid": KEYS[algorithm].kid}
        assert_refused(ask_with(http["keys and two secrets"], sign(issuer.claims(user), header, key=key)))


@pytest.mark.parametrize("algorithm", ["EdDSA", "RS256"])
def test_a_token_by_a_key_is_refused_where_there_is_only_a_secret(
    nobody: Client, issuer: Issuer, algorithm: str
) -> None:
    assert_refused(ask_with(nobody, KEYS[algorithm].sign(issuer.claims(new_user()))))


@pytest.mark.parametrize("algorithm", ["none", "NONE", None, "eddsa", ["EdDSA"]])
def test_a_token_of_no_known_algorithm_is_refused(http: dict[str, Client], issuer: Issuer, algorithm: object) -> None:
    header = encode(json.dumps({"alg": algorithm, "kid": KEY.kid}).encode())
    unsigned = f"{header}.{encode(json.dumps(issuer.claims(new_user())).encode())}."
    signature = KEY.sign(issuer.claims(new_user())).rpartition(".")[2]
    for name in ("keys", "keys and secret"):
        assert_refused(ask_with(http[name], unsigned))
        assert_refused(ask_with(http[name], unsigned + signature))
        assert_refused(ask_with(http[name], KEY.sign(issuer.claims(new_user()), alg=algorithm)))


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_key_is_good_for_its_own_algorithm_alone(http: dict[str, Client], issuer: Issuer, algorithm: str) -> None:
    payload = issuer.claims(new_user())
    for other in KEYS.keys() - {algorithm}:
        assert_refused(ask_with(http["keys"], KEYS[algorithm].sign(payload, kid=KEYS[other].kid)))
        assert_refused(ask_with(http["keys"], KEYS[algorithm].sign(payload, alg=other)))
        assert_refused(ask_with(http["keys"], KEYS[algorithm].sign(payload, alg=other, kid=KEYS[other].kid)))


@pytest.mark.parametrize(("algorithm", "other"), [("RS256", "PS256"), ("PS256", "RS256"), ("RS256", "RS512")])
def test_an_rsa_key_of_one_algorithm_signs_by_no_other(
    http: dict[str, Client], issuer: Issuer, algorithm: str, other: str
) -> None:
    assert_refused(ask_with(http["keys"], KEYS[algorithm].sign(issuer.claims(new_user()), by=other)))


def test_a_key_that_is_for_encryption_verifies_nothing(http: dict[str, Client], issuer: Issuer) -> None:
    assert_refused(ask_with(http["keys"], ENCRYPTION.sign(issuer.claims(new_user()))))


def test_a_token_by_a_key_that_is_not_listed_is_refused(http: dict[str, Client], issuer: Issuer) -> None:
    kids: list[Any] = [STRANGER.kid, KEY.kid, "", None, 7, [KEY.kid], {"kid": KEY.kid}]
    assert_all_refused(http["keys"], *(STRANGER.sign(issuer.claims(new_user()), kid=kid) for kid in kids))


def test_a_token_names_its_key(http: dict[str, Client], issuer: Issuer) -> None:
    kids: list[Any] = [None, "", [KEY.kid], KEY.kid[:-1], KEY.kid.upper(), f" {KEY.kid}"]
    assert_all_refused(http["keys"], *(KEY.sign(issuer.claims(new_user()), kid=kid) for kid in kids))


def test_the_keys_that_a_token_brings_along_are_not_looked_at(http: dict[str, Client], issuer: Issuer) -> None:
    with contextlib.closing(Issuer(STRANGER)) as elsewhere:
        url = f"{elsewhere.url}{BY_DEFAULT}"
        header: dict[str, Any] = {"jwk": STRANGER.jwk, "jku": url, "x5u": url, "x5c": ["MIIB"]}
        payloads = [issuer.claims(new_user(), iss=origin) for origin in (issuer.url, elsewhere.url)]
        tokens = [STRANGER.sign(each, kid=kid, **header) for each in payloads for kid in (STRANGER.kid, KEY.kid, url)]
        assert_all_refused(http["keys"], *tokens)
        assert elsewhere.paths == []


def test_a_critical_extension_that_nobody_knows_is_refused(http: dict[str, Client], issuer: Issuer) -> None:
    headers: list[dict[str, Any]] = [{"crit": ["x"], "x": 1}, {"b64": False}, {"b64": False, "crit": ["b64"]}]
    for header in headers:
        assert_refused(ask_with(http["keys"], KEY.sign(issuer.claims(new_user()), **header)))


def test_a_signature_fits_no_other_claims(http: dict[str, Client], issuer: Issuer) -> None:
    mine, theirs = (KEY.sign(issuer.claims(new_user())).split(".") for _ in range(2))
    assert_refused(ask_with(http["keys"], ".".join([*theirs[:2], mine[2]])))
    assert_refused(ask_with(http["keys"], ".".join([*mine[:2], ""])))


def base64_bytes(text: bytes) -> bytes:
    return base64.urlsafe_b64decode(text + b"==")


# --- Claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", ["aud", "iss"])
def test_a_token_for_or_by_anybody_else_is_refused(http: dict[str, Client], issuer: Issuer, claim: str) -> None:
    wrong = [f"{issuer.url}/", f"{issuer.url}/some/path/", issuer.url[:-1], issuer.url.upper(), issuer.url[7:], "*", ""]
    for value in [*wrong, None, 7, True, [], ["https://app.example.com"], [f"{issuer.url}/"], {issuer.url: 1}]:
        assert_refused(ask_with(http["keys"], KEY.sign(issuer.claims(new_user(), **{claim: value}))))


def test_the_audience_may_be_one_of_several_and_the_issuer_may_not(http: dict[str, Client], issuer: Issuer) -> None:
    user = new_user()
    assert caller(http["keys"], KEY.sign(issuer.claims(user, aud=["x", issuer.url]))) == user
    assert_refused(ask_with(http["keys"], KEY.sign(issuer.claims(user, iss=[issuer.url]))))


@pytest.mark.parametrize("name", ["keys", "only JWKS_URL"])
def test_an_expiry_and_a_subject_are_required(http: dict[str, Client], issuer: Issuer, name: str) -> None:
    for value in (None, "4000000000", True, [4000000000], {"exp": 1}, float("inf"), float("nan")):
        assert_refused(ask_with(http[name], KEY.sign(issuer.claims(new_user(), exp=value))))
    for subject in (None, "", 7, True, ["alice"], {"id": "alice"}, "x" * 256, "a\0b", "\ud83d"):
        assert_refused(ask_with(http[name], KEY.sign(issuer.claims("", sub=subject))))


def test_the_times_in_a_token_are_checked_with_a_small_leeway(http: dict[str, Client], issuer: Issuer) -> None:
    user, now, client = new_user(), int(time.time()), http["keys"]
    assert caller(client, KEY.sign(issuer.claims(user, exp=now - WITHIN_LEEWAY))) == user
    assert caller(client, KEY.sign(issuer.claims(user, nbf=now + WITHIN_LEEWAY, iat=now + WITHIN_LEEWAY))) == user
    assert_refused(ask_with(client, KEY.sign(issuer.claims(user, exp=now - BEYOND_LEEWAY))), "Token has expired")
    for claim in ("nbf", "iat"):
        assert_refused(ask_with(client, KEY.sign(issuer.claims(user, **{claim: now + BEYOND_LEEWAY}))))


def test_only_a_token_that_is_right_otherwise_is_told_that_it_has_expired(
    http: dict[str, Client], issuer: Issuer
) -> None:
    assert_refused(ask_with(http["keys"], STRANGER.sign(issuer.claims(new_user(), exp=1), kid=KEY.kid)))
    assert_refused(ask_with(http["keys"], STRANGER.sign(issuer.claims(new_user(), exp=1))))


@pytest.mark.parametrize("name", ["keys", "only JWKS_URL"])
def test_the_session_cache_of_better_auth_is_no_token(http: dict[str, Client], issuer: Issuer, name: str) -> None:
    """It has a subject, and is signed with the same keys; only its audience tells it apart."""
    for audience in (SESSION_CACHE, [SESSION_CACHE], [issuer.url, SESSION_CACHE], [SESSION_CACHE, issuer.url]):
        assert_refused(ask_with(http[name], KEY.sign(issuer.claims(new_user(), aud=audience))))


@pytest.mark.parametrize("audience", [SESSION_CACHE, ["x", SESSION_CACHE]])
def test_the_session_cache_is_no_token_by_the_secret_either(
    http: dict[str, Client], nobody: Client, audience: object
) -> None:
    for client in (http["keys and secret"], nobody):
        assert_refused(ask_with(client, sign(claims(new_user(), aud=audience))))


def test_the_session_cache_by_the_secret_has_no_subject(http: dict[str, Client], nobody: Client) -> None:
    payload = without_none({"session": {"userId": new_user()}, "user": {"id": new_user()}} | claims("", sub=None))
    for client in (http["keys and secret"], nobody):
        assert_refused(ask_with(client, sign(payload)))
