"""Who the caller is: which tokens prove a user, which are refused and in what words, and that nothing else counts."""

from __future__ import annotations

import hmac
import json
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.support.service_process import ROOT, SECRET, Client, Service, environment, token
from tests.support.tokens import (
    BEYOND_LEEWAY,
    HS256,
    OLD_SECRET,
    WITHIN_LEEWAY,
    ask,
    assert_refused,
    caller,
    claims,
    encode,
    new_user,
    sign,
)

LEEWAY = 30
"""Seconds: for the tests that have to see it end."""

STRICT_SECRET = "Schlüssel, 密码, 🔑 and a few letters more"
AUDIENCE = "https://app.example.com"
ISSUER = "https://auth.example.com"


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[Client]:
    """A client without a token. When all are done with it the service still answers, and no bug is in its log."""
    printed = len(service.log)
    with service.client() as client:
        yield client
        assert client.get("/health/ready").status_code == 200
    assert not re.search(r"Traceback|status=5", service.log[printed:])


@pytest.fixture(scope="module")
def strict_http(new_database: Callable[[], str]) -> Iterator[Client]:
    """A client of a service with an audience, an issuer and secrets beyond ASCII, in the poorest of locales."""
    service = Service(
        new_database(), wait=False, LC_ALL="C", BETTER_AUTH_SECRET=STRICT_SECRET, BETTER_AUTH_SECRET_OLD=OLD_SECRET,
        JWT_AUDIENCE=AUDIENCE, JWT_ISSUER=ISSUER,
    )  # fmt: skip
    try:
        service.wait_until_ready()
        with service.client() as client:
            yield client
    finally:
        service.remove()


# --- The header ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
def test_the_scheme_is_read_in_any_case(http: Client, scheme: str) -> None:
    response = http.get("/api/tasks", headers={"Authorization": f"{scheme} {token(new_user())}"})
    assert (response.status_code, response.json()) == (200, {"items": []})


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Basic YWxpY2U6c2VjcmV0", "Token x.y.z", "Bearerx.y.z", "x.y.z", "Bearer:x"],
)
def test_a_header_without_a_bearer_token_is_no_authentication(http: Client, header: str) -> None:
    assert_refused(http.get("/api/tasks", headers={"Authorization": header}), "Not authenticated")


def test_a_request_without_a_header_is_not_authenticated(http: Client) -> None:
    assert_refused(http.get("/api/tasks"), "Not authenticated")


def test_a_token_anywhere_but_in_the_header_counts_for_nothing(http: Client) -> None:
    good = token(new_user())
    assert_refused(http.get("/api/tasks", params={"access_token": good, "token": good}), "Not authenticated")
    headers = {"Cookie": f"better-auth.session_token={good}; token={good}", "X-Authorization": f"Bearer {good}"}
    assert_refused(http.get("/api/tasks", headers=headers), "Not authenticated")
    response = http.post("/api/tasks", data={"access_token": good})
    assert_refused(response, "Not authenticated")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/tasks"),
        ("HEAD", "/api/tasks"),
        ("POST", "/api/tasks"),
        ("GET", "/api/tasks/{id}"),
        ("PUT", "/api/tasks/{id}"),
        ("DELETE", "/api/tasks/{id}"),
        ("PATCH", "/api/tasks/{id}/complete"),
    ],
)
def test_no_endpoint_does_anything_for_a_bad_token(alice: Client, bob: Client, method: str, path: str) -> None:
    task, other = alice.create("mine"), bob.create("theirs")
    forged = sign(claims(str(alice.user_id)), key=b"another secret, of 32 characters or more")
    response = bob.request(
        method, path.format(id=task["id"]), json={"title": "x"}, headers={"Authorization": f"Bearer {forged}"}
    )
    assert response.status_code == 401
    assert response.content == (b"" if method == "HEAD" else b'{"detail":"Invalid token"}')
    assert (alice.tasks(), bob.tasks()) == ([task], [other])


def test_two_authorization_headers_do_not_mix_two_users(http: Client, alice: Client, bob: Client) -> None:
    """Which of the two counts, or whether either does, is nobody's to rely on; that it is one of them, is."""
    task, other = alice.create("mine"), bob.create("theirs")
    headers = [("Authorization", client.headers["authorization"]) for client in (alice, bob)]
    response = http.get("/api/tasks", headers=headers)
    assert response.status_code == 401 or response.json()["items"] in ([task], [other])


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", "é.é.é".encode(), b"a b", b"a, b", b'"a.b.c"', b"\xc0\xae." * 2, b"%00"]
)
def test_bytes_that_are_no_token_are_refused(http: Client, content: bytes) -> None:
    assert_refused(ask(http, content))


def test_a_nul_in_the_header_reaches_nothing(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        good = token(new_user()).encode()
        connection.sendall(b"GET /api/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + good + b"\0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 40")


# --- The form of a token ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_token_with_an_empty_part_is_refused(http: Client, missing: int) -> None:
    parts = token(new_user()).split(".")
    parts[missing] = ""
    assert_refused(ask(http, ".".join(parts)))


def test_a_token_of_too_few_or_too_many_parts_is_refused(http: Client) -> None:
    good = token(new_user())
    header, payload, signature = good.split(".")
    for text in (
        *(".", "..", "...", "x", header, payload, f"{header}.{payload}", f"{payload}.{signature}"),
        *(f".{good}", f"{good}.", f"{good}.{signature}", f"{header}.{header}.{payload}.{signature}", good * 2),
    ):
        assert_refused(ask(http, text))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_token_with_one_changed_character_is_refused(http: Client, part: int) -> None:
    parts = token(new_user()).split(".")
    middle = len(parts[part]) // 2  # not the last one, some of whose bits mean nothing
    changed = "A" if parts[part][middle] != "A" else "B"
    parts[part] = parts[part][:middle] + changed + parts[part][middle + 1 :]
    assert_refused(ask(http, ".".join(parts)))


def test_the_signature_of_one_token_does_not_fit_another(http: Client) -> None:
    mine, theirs = token(new_user()).split("."), token(new_user()).split(".")
    assert_refused(ask(http, ".".join([*mine[:2], theirs[2]])))
    assert_refused(ask(http, ".".join([*theirs[:2], mine[2]])))


@pytest.mark.parametrize(
    "key",
    [b"", b"\0" * 32, b"another secret, of 32 characters or more", SECRET.encode()[:-1], OLD_SECRET.encode()],
)
def test_a_token_by_another_secret_is_refused(http: Client, key: bytes) -> None:
    assert_refused(ask(http, sign(claims(new_user()), key=key)))


@pytest.mark.parametrize(
    "header",
    [
        "",
        "null",
        "[]",
        "7",
        '"HS256"',
        "{",
        "{}",
        '{"alg": "HS256"',
        '{"alg": "HS256",}',
        "[" * 10_000,
        '{"a":' * 8000,
    ],
    ids=lambda header: repr(header[:20]),
)
def test_a_token_whose_header_is_no_object_with_an_algorithm_is_refused(http: Client, header: str) -> None:
    assert_refused(ask(http, sign(claims(new_user()), header)))
    assert_refused(ask(http, f"{encode(header.encode())}.e30."))


@pytest.mark.parametrize(
    "payload",
    ["", "null", "[]", "7", '"alice"', "{", "{}", "[" * 10_000, '{"a":' * 8000],
    ids=lambda payload: repr(payload[:20]),
)
def test_a_signed_payload_that_is_no_object_with_claims_is_refused(http: Client, payload: str) -> None:
    assert_refused(ask(http, sign(payload)))


def test_a_signed_payload_that_is_deep_is_fine_or_refused_but_no_bug(http: Client) -> None:
    user = new_user()
    fine = json.dumps(claims(user))[:-1] + ', "a": ' + "[" * 200 + "]" * 200 + "}"
    assert caller(http, sign(fine)) == user
    assert_refused(ask(http, sign(fine.replace("[" * 200, "[" * 5000).replace("]" * 200, "]" * 5000))))


@pytest.mark.parametrize(
    "text", ["a" * 60_000, "." * 60_000, "=" * 60_000, "eyJhbGciOiJIUzI1NiJ9." + "a" * 60_000 + ".a"]
)
def test_a_token_of_60_kilobytes_is_refused_like_a_short_one(http: Client, text: str) -> None:
    assert_refused(ask(http, text))


@pytest.mark.parametrize("text", ["session-token", "k3y.c2lnbmF0dXJl", "a7f3.Zm9vYmFy%2Bw%3D%3D"])
def test_an_opaque_session_token_is_no_jwt(http: Client, text: str) -> None:
    assert_refused(ask(http, text))


# --- The algorithm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "nOnE", "none ", "", None, True, 0, [], ["none"], {}])
def test_a_token_of_no_algorithm_is_refused(http: Client, algorithm: object) -> None:
    text = f"{encode(json.dumps({'alg': algorithm}).encode())}.{encode(json.dumps(claims(new_user())).encode())}"
    for signature in ("", ".", f".{encode(b'none')}"):
        assert_refused(ask(http, text + signature))
    assert_refused(ask(http, sign(claims(new_user()), {"alg": algorithm})))
    assert_refused(ask(http, sign(claims(new_user()), {"alg": algorithm}, key=b"")))


@pytest.mark.parametrize("algorithm", ["hs256", "HS256 ", "HS256\0", "SHA256", ["HS256"], {"HS256": 1}])
def test_an_algorithm_that_is_only_like_hs256_is_refused(http: Client, algorithm: object) -> None:
    assert_refused(ask(http, sign(claims(new_user()), {"alg": algorithm})))


def test_a_header_without_an_algorithm_is_refused(http: Client) -> None:
    assert_refused(ask(http, sign(claims(new_user()), {"typ": "JWT"})))


@pytest.mark.parametrize(("algorithm", "digest"), [("HS384", "sha384"), ("HS512", "sha512")])
def test_a_longer_hash_by_the_right_secret_is_refused(http: Client, algorithm: str, digest: str) -> None:
    assert_refused(ask(http, sign(claims(new_user()), {"alg": algorithm}, by=digest)))
    assert_refused(ask(http, sign(claims(new_user()), {"alg": "HS256"}, by=digest)))
    assert_refused(ask(http, sign(claims(new_user()), {"alg": algorithm}, by="sha256")))


def test_an_asymmetric_signature_is_refused_where_there_is_only_a_secret(http: Client) -> None:
    rsa_key = rsa.generate_private_key(65537, 2048)
    keys: dict[str, Any] = {
        "RS256": rsa_key,
        "PS256": rsa_key,
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    }
    for algorithm, key in keys.items():
        assert_refused(ask(http, jwt.encode(claims(new_user()), key, algorithm=algorithm)))


# --- The rest of the header ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kid", ["", "../../../../../../dev/null", "/proc/sys/kernel/ostype", "' OR 1=1 --", "| id", "\0"]
)
def test_the_key_id_leads_to_no_other_key(http: Client, kid: str) -> None:
    user = new_user()
    for key in (b"", b"Linux\n", b"\n", kid.encode()):
        assert_refused(ask(http, sign(claims(user), HS256 | {"kid": kid}, key=key)))
    assert caller(http, sign(claims(user), HS256 | {"kid": kid})) == user


def test_a_key_or_an_address_of_one_in_the_header_is_not_looked_at(http: Client) -> None:
    key = b"a key of the attacker's own, of 32 characters"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/jwks"
        jwk = {"kty": "oct", "k": encode(key), "alg": "HS256"}
        header = HS256 | {"jku": url, "x5u": url, "jwk": jwk, "x5c": [url], "kid": url}
        user = new_user()
        assert_refused(ask(http, sign(claims(user, iss=url), header, key=key)))
        assert caller(http, sign(claims(user, iss=url), header)) == user
        listener.settimeout(0.3)
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize("critical", [["exp"], ["x"], ["b64", "x"], [], "b64", None, [7], [None], {"b64": 1}])
def test_a_critical_extension_that_nobody_knows_is_refused(http: Client, critical: object) -> None:
    assert_refused(ask(http, sign(claims(new_user()), HS256 | {"crit": critical, "x": 1})))


@pytest.mark.parametrize("critical", [{}, {"crit": ["b64"]}])
def test_an_unencoded_payload_is_refused(http: Client, critical: dict[str, Any]) -> None:
    header = encode(json.dumps(HS256 | {"b64": False} | critical).encode())
    payload = json.dumps(claims(new_user()))
    for signed, sent in ((payload, payload), (payload, ""), (encode(payload.encode()), encode(payload.encode()))):
        signature = encode(hmac.digest(SECRET.encode(), f"{header}.{signed}".encode(), "sha256"))
        assert_refused(ask(http, f"{header}.{sent}.{signature}"))


def test_a_header_field_given_twice_cannot_turn_the_signature_off(http: Client) -> None:
    for header in ('{"alg": "HS256", "alg": "none"}', '{"alg": "none", "alg": "HS256"}'):
        payload = encode(json.dumps(claims(new_user())).encode())
        assert_refused(ask(http, f"{encode(header.encode())}.{payload}."))
        assert_refused(ask(http, sign(claims(new_user()), header, key=b"")))


# --- The subject -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "subject",
    [
        7,
        0,
        1.5,
        True,
        False,
        None,
        [],
        ["alice"],
        {},
        {"id": 1},
        "",
        "x" * 256,
        "😀" * 256,
        "a\0b",
        "\0",
        "\ud83d",
        "a\udfff",
    ],
    ids=ascii,
)
def test_a_subject_that_cannot_be_a_user_is_refused(http: Client, subject: object) -> None:
    assert_refused(ask(http, sign(claims("", sub=subject))))


def test_a_token_without_a_subject_is_refused(http: Client) -> None:
    payload = claims("") | {"id": new_user(), "user_id": new_user(), "email": "alice@example.com"}
    del payload["sub"]
    assert_refused(ask(http, sign(payload)))


def test_the_session_cookie_cache_of_better_auth_is_no_token(http: Client) -> None:
    """It is signed with the same secret, but says that a session was cached, not who calls an API."""
    user = {"id": new_user(), "email": "alice@example.com", "emailVerified": True}
    session = {"id": "s", "token": "t", "userId": user["id"], "expiresAt": "2099-01-01T00:00:00.000Z"}
    payload = {"session": session, "user": user, "updatedAt": 1, "version": "1", "iat": 1, "exp": 4_000_000_000}
    assert_refused(ask(http, sign(payload)))


@pytest.mark.parametrize(
    "subject",
    ["x", "7", "é" * 254, "x" * 254, "😀" * 254, " ", "a b", "it's \"quoted\"", "a\nb", "\t", "\x7f\x85\u2028", "a=b",
     "'; DROP TABLE task; --", "%", "$1", "null", "null\\u0000", "{}", "\u202ealice", "\ufeff"],
    ids=ascii,
)  # fmt: skip
def test_any_other_text_of_at_most_255_characters_is_a_user(http: Client, subject: str) -> None:
    for user in (subject, f"{subject}!"):  # the longest have 255 characters with it
        sent = sign(claims(user))
        assert caller(http, sent) == user
        assert {task["user_id"] for task in ask(http, sent).json()["items"]} == {user}


def test_subjects_that_only_look_alike_are_different_users(http: Client) -> None:
    name = new_user()
    users = [
        name,
        name.upper(),
        f"{name} ",
        f" {name}",
        f"{name}\n",
        f"{name}\u200b",
        f"{name}é",
        f"{name}e\u0301",
        f"{name}%",
    ]
    for user in users:
        assert ask(http, sign(claims(user))).json() == {"items": []}, ascii(user)
        assert caller(http, sign(claims(user))) == user


def test_a_subject_given_twice_is_not_the_first_one(http: Client) -> None:
    """A reader of JSON takes the last one, or refuses it: RFC 7519, section 4."""
    first, last = new_user(), new_user()
    assert caller(http, sign(claims(first))) == first
    response = ask(http, sign(f'{{"sub": "{first}", "exp": 4000000000, "sub": "{last}"}}'))
    assert (response.status_code, response.json()) in ((200, {"items": []}), (401, {"detail": "Invalid token"}))


def test_a_subject_writes_no_line_of_its_own_into_the_log(service: Service, http: Client) -> None:
    forged = "method=GET path=/forged-by-a-subject status=200 ms=0.1 id=forged"
    for line_break in ("\n", "\r", "\r\n", "\x85", "\u2028", "\x0b"):
        response = ask(http, sign(claims(f"x{line_break}{forged}")))
        assert response.status_code == 200
        line = service.log_line(response.headers["x-request-id"])
        assert line.startswith("method=GET path=/api/tasks status=200 ")
    assert not [line for line in service.log.splitlines() if line.startswith(forged)]


# --- The time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ago",
    [
        *(BEYOND_LEEWAY, 86_400, 10**9, 10**10),
        pytest.param(time.time(), id="since 1970"),
        pytest.param(time.time() + 1, id="since before 1970"),
    ],
)
def test_a_token_that_has_expired_is_refused_as_such(http: Client, ago: float) -> None:
    assert_refused(ask(http, sign(claims(new_user(), exp=int(time.time() - ago)))), "Token has expired")
    assert_refused(ask(http, sign(claims(new_user(), exp=time.time() - ago))), "Token has expired")


def test_a_forged_token_is_not_told_that_it_has_expired(http: Client) -> None:
    assert_refused(ask(http, sign(claims(new_user(), exp=1), key=b"another secret, of 32 characters or more")))


def test_a_token_without_an_expiry_is_refused(http: Client) -> None:
    payload = claims(new_user())
    del payload["exp"]
    assert_refused(ask(http, sign(payload)))


@pytest.mark.parametrize(
    "expiry",
    ['"123"', '"4000000000"', '"4e9"', '"2099-01-01T00:00:00Z"', '""', "true", "false", "null", "[]", "[4000000000]",
     "{}", "NaN", "Infinity", "-Infinity", "1e400", "-1e400", '"NaN"', "9" * 5000],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_an_expiry_that_is_no_finite_number_is_refused(http: Client, expiry: str) -> None:
    assert_refused(ask(http, sign(f'{{"sub": "{new_user()}", "exp": {expiry}}}')))


@pytest.mark.parametrize("expiry", ["4000000000.75", "4e9", "9223372036854775808", "1e300", f"1{'0' * 30}"])
def test_any_finite_number_in_the_future_is_an_expiry(http: Client, expiry: str) -> None:
    user = new_user()
    assert caller(http, sign(f'{{"sub": "{user}", "exp": {expiry}}}')) == user


def test_an_expiry_beyond_a_double_is_no_bug(http: Client) -> None:
    endless = sign(f'{{"sub": "{new_user()}", "exp": 1{"0" * 400}}}')
    for _ in range(2):  # the second one may come from the cache
        response = ask(http, endless)
        assert (response.status_code, response.json()) in ((200, {"items": []}), (401, {"detail": "Invalid token"}))


def test_the_clocks_may_differ_a_little(http: Client) -> None:
    now, user = time.time(), new_user()
    assert caller(http, sign(claims(user, exp=now - WITHIN_LEEWAY))) == user
    assert caller(http, sign(claims(user, iat=now + WITHIN_LEEWAY, nbf=now + WITHIN_LEEWAY))) == user
    assert caller(http, sign(claims(user, iat=now - 10**6, nbf=now - 10**6))) == user


@pytest.mark.parametrize("claim", ["iat", "nbf"])
@pytest.mark.parametrize("ahead", [BEYOND_LEEWAY, 86_400, 10**12, 0.5 + BEYOND_LEEWAY])
def test_a_token_of_the_future_is_refused(http: Client, claim: str, ahead: float) -> None:
    assert_refused(ask(http, sign(claims(new_user(), **{claim: time.time() + ahead}))))


@pytest.mark.parametrize("claim", ["iat", "nbf"])
@pytest.mark.parametrize(
    "value", ['"soon"', '""', "null", "[]", "{}", "NaN", "Infinity", "-Infinity", "1e400", "9" * 5000]
)
def test_a_start_that_is_no_finite_number_is_refused(http: Client, claim: str, value: str) -> None:
    assert_refused(ask(http, sign(f'{{"sub": "{new_user()}", "exp": 4000000000, "{claim}": {value}}}')))


# --- The same token again --------------------------------------------------------------------------------------------


def test_the_same_token_again_is_the_same_user(http: Client) -> None:
    users = [new_user(), new_user()]
    tokens = {user: sign(claims(user)) for user in users}
    for user in users * 3:
        assert caller(http, tokens[user]) == user
    assert {task["user_id"] for task in ask(http, tokens[users[0]]).json()["items"]} == {users[0]}


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
        assert_refused(ask(http, variant))
    assert caller(http, good) == user


@pytest.mark.long
def test_a_token_is_not_good_for_longer_because_it_was_used(http: Client) -> None:
    user = new_user()
    dying = sign(claims(user, exp=time.time() - LEEWAY + 3))
    for _ in range(3):
        assert caller(http, dying) == user
    time.sleep(4.5)
    for _ in range(2):
        assert_refused(ask(http, dying), "Token has expired")
    assert len(ask(http, sign(claims(user))).json()["items"]) == 3


@pytest.mark.long
@pytest.mark.fault
def test_a_token_that_was_used_before_it_expired_ends_with_the_leeway(
    http: Client, figures: Callable[[str, str], None]
) -> None:
    user = new_user()
    short = sign(claims(user, exp=time.time() + 2))
    assert caller(http, short) == user
    time.sleep(4)
    assert caller(http, short) == user
    time.sleep(LEEWAY)
    assert_refused(ask(http, short), "Token has expired")
    figures("A token expires while it is in the cache", f"401 after the leeway of {LEEWAY} s")


def test_a_crowd_of_users_takes_nobody_s_place(start_service: Callable[..., Service], database_url: str) -> None:
    """More of them than a process remembers. The first one is the first that this process has seen."""
    service = start_service(database_url)
    service.wait_until_ready()
    http = service.client()
    users = [new_user() for _ in range(5000)]
    tokens = [sign(claims(user)) for user in users]
    assert caller(http, tokens[0]) == users[0]
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        for text in tokens:
            head = f"GET /api/nothing HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {text}\r\n\r\n"
            connection.sendall(head.encode())
            answer = b""
            while not answer.endswith(b"}"):
                received = connection.recv(65_536)
                assert received
                answer += received
            assert answer.startswith(b"HTTP/1.1 404 Not Found\r\n")
    for index in (0, 1, -2, -1):
        assert caller(http, tokens[index]) == users[index]
        assert {task["user_id"] for task in ask(http, tokens[index]).json()["items"]} == {users[index]}
    header, _, signature = tokens[0].split(".")
    assert_refused(ask(http, f"{header}.{tokens[1].split('.')[1]}.{signature}"))
    http.close()


def test_the_log_holds_no_token_and_no_secret(service: Service, http: Client) -> None:
    good, bad = token(new_user()), sign(claims(new_user()), key=b"another secret, of 32 characters or more")
    for text, status in ((good, 200), (bad, 401)):
        response = ask(http, text)
        assert response.status_code == status
        service.log_line(response.headers["x-request-id"])
        assert text not in service.log
        assert text.split(".")[2] not in service.log
    assert SECRET not in service.log


# --- The audience, the issuer, the secret ----------------------------------------------------------------------------


@pytest.mark.parametrize("claim", ["aud", "iss"])
@pytest.mark.parametrize("value", ["https://anybody.example.com", "", None, 7, True, [], ["a", "b"], {"a": 1}])
def test_where_none_is_configured_any_audience_and_issuer_is_fine(http: Client, claim: str, value: object) -> None:
    user = new_user()
    assert caller(http, sign(claims(user, **{claim: value}))) == user


def sign_strictly(user_id: str, *, secret: str = STRICT_SECRET, **changes: Any) -> str:
    right = {"aud": AUDIENCE, "iss": ISSUER}
    return sign(claims(user_id, **(right | changes)), key=secret.encode())


@pytest.mark.parametrize("audience", [AUDIENCE, [AUDIENCE], ["x", AUDIENCE]])
def test_a_token_for_the_configured_audience_is_accepted(strict_http: Client, audience: object) -> None:
    user = new_user()
    assert caller(strict_http, sign_strictly(user, aud=audience)) == user


@pytest.mark.parametrize("claim", ["aud", "iss"])
def test_a_token_for_another_audience_or_by_another_issuer_is_refused(strict_http: Client, claim: str) -> None:
    right = AUDIENCE if claim == "aud" else ISSUER
    other = ISSUER if claim == "aud" else AUDIENCE
    wrong: list[Any] = [
        other,
        f"{right}/",
        right[:-1],
        f"{right}.evil.example",
        right.upper(),
        f" {right}",
        "",
        "*",
        None,
        7,
        True,
    ]
    for value in [*wrong, [], [other], [right[:-1]], {right: 1}, {}, list(right)]:
        assert_refused(ask(strict_http, sign_strictly(new_user(), **{claim: value})))


@pytest.mark.parametrize("claim", ["aud", "iss"])
def test_a_token_that_does_not_name_the_configured_audience_and_issuer_is_refused(
    strict_http: Client, claim: str
) -> None:
    payload = claims(new_user(), aud=AUDIENCE, iss=ISSUER)
    del payload[claim]
    assert_refused(ask(strict_http, sign(payload, key=STRICT_SECRET.encode())))


def test_the_issuer_is_one_and_not_a_list(strict_http: Client) -> None:
    assert_refused(ask(strict_http, sign_strictly(new_user(), iss=[ISSUER])))


def test_an_expired_token_is_told_so_where_an_audience_is_configured_too(strict_http: Client) -> None:
    assert_refused(ask(strict_http, sign_strictly(new_user(), exp=1)), "Token has expired")


def test_the_secret_is_used_as_its_utf_8_text(strict_http: Client) -> None:
    user, secret = new_user(), STRICT_SECRET
    assert caller(strict_http, sign_strictly(user)) == user
    payload = claims(user, aud=AUDIENCE, iss=ISSUER)
    for key in (secret.encode("utf-16-le"), secret.encode("ascii", "ignore"), secret.encode("ascii", "replace")):
        assert_refused(ask(strict_http, sign(payload, key=key)))
    assert_refused(ask(strict_http, sign(payload)))


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
        ({"exp": None}, "Invalid token"),
        ({"sub": ""}, "Invalid token"),
        ({"aud": ISSUER}, "Invalid token"),
        ({"iss": AUDIENCE}, "Invalid token"),
        ({"nbf": 4_000_000_000}, "Invalid token"),
    ],
    ids=str,
)
@pytest.mark.parametrize("secret", [STRICT_SECRET, OLD_SECRET], ids=["new", "old"])
def test_a_token_by_the_old_secret_is_refused_in_the_same_words(
    strict_http: Client, secret: str, changes: dict[str, Any], detail: str
) -> None:
    assert_refused(ask(strict_http, sign_strictly(new_user(), secret=secret, **changes)), detail)


@pytest.mark.parametrize(("algorithm", "digest"), [("HS384", "sha384"), ("HS512", "sha512"), ("EdDSA", "sha256")])
def test_the_old_secret_is_good_for_no_other_algorithm(strict_http: Client, algorithm: str, digest: str) -> None:
    payload = claims(new_user(), aud=AUDIENCE, iss=ISSUER)
    assert_refused(ask(strict_http, sign(payload, {"alg": algorithm}, key=OLD_SECRET.encode(), by=digest)))


def test_new_tokens_are_signed_with_the_new_secret() -> None:
    settings = environment(
        DATABASE_URL="postgresql://nowhere.example", BETTER_AUTH_SECRET=STRICT_SECRET, BETTER_AUTH_SECRET_OLD=OLD_SECRET
    )
    printed = subprocess.run(
        ["python", "service.py", "token", "alice"], cwd=ROOT, env=settings, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert jwt.decode(printed, STRICT_SECRET, algorithms=["HS256"])["sub"] == "alice"
