"""Tokens: where one is looked for, its form, its algorithm and its header, and in what words it is refused."""

from __future__ import annotations

import hmac
import json
import socket
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.support.service_process import SECRET, Client, Service, token
from tests.support.tokens import (
    HS256,
    ask_with,
    assert_refused,
    caller,
    claims,
    encode,
    new_user,
    sign,
)
from tests.support.wire import ask

# --- The header ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["bearer", "bEaReR"])
def test_the_scheme_is_read_in_any_case(http: Client, scheme: str) -> None:
    response = http.get("/api/tasks", headers={"Authorization": f"{scheme} {token(new_user())}"})
    assert (response.status_code, response.json()) == (200, {"items": []})


@pytest.mark.parametrize("header", ["", "Bearer", "Basic YWxpY2U6c2VjcmV0", "Bearerx.y.z", "x.y.z"])
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
    headers = [("Authorization", client.headers["authorization"]) for client in (alice, bob)]
    assert_refused(http.get("/api/tasks", headers=headers))


@pytest.mark.parametrize("content", [b"\xff\xfe", "é.é.é".encode(), b"a b", b"a, b"])
def test_bytes_that_are_no_token_are_refused(http: Client, content: bytes) -> None:
    assert_refused(ask_with(http, content))


def test_a_nul_in_the_header_reaches_nothing(service: Service) -> None:
    answer = ask(service, "GET /api/tasks", f"Authorization: Bearer {token(new_user())}\0")
    assert answer.status == 400


# --- The form of a token ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_token_with_an_empty_part_is_refused(http: Client, missing: int) -> None:
    parts = token(new_user()).split(".")
    parts[missing] = ""
    assert_refused(ask_with(http, ".".join(parts)))


def test_a_token_of_too_few_or_too_many_parts_is_refused(http: Client) -> None:
    good = token(new_user())
    header, payload, signature = good.split(".")
    for text in (
        *(".", "..", "...", "x", header, payload, f"{header}.{payload}", f"{payload}.{signature}"),
        *(f".{good}", f"{good}.", f"{good}.{signature}", f"{header}.{header}.{payload}.{signature}", good * 2),
    ):
        assert_refused(ask_with(http, text))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_token_with_one_changed_character_is_refused(http: Client, part: int) -> None:
    parts = token(new_user()).split(".")
    middle = len(parts[part]) // 2  # not the last one, some of whose bits mean nothing
    changed = "A" if parts[part][middle] != "A" else "B"
    parts[part] = parts[part][:middle] + changed + parts[part][middle + 1 :]
    assert_refused(ask_with(http, ".".join(parts)))


def test_the_signature_of_one_token_does_not_fit_another(http: Client) -> None:
    mine, theirs = token(new_user()).split("."), token(new_user()).split(".")
    assert_refused(ask_with(http, ".".join([*mine[:2], theirs[2]])))
    assert_refused(ask_with(http, ".".join([*theirs[:2], mine[2]])))


@pytest.mark.parametrize("key", [b"", b"another secret, of 32 characters or more", SECRET.encode()[:-1]])
def test_a_token_by_another_secret_is_refused(http: Client, key: bytes) -> None:
    assert_refused(ask_with(http, sign(claims(new_user()), key=key)))


@pytest.mark.parametrize(
    "header",
    ["", "[]", '"HS256"', "{", "{}", "[" * 10_000, '{"a":' * 8000],
    ids=lambda header: repr(header[:20]),
)
def test_a_token_whose_header_is_no_object_with_an_algorithm_is_refused(http: Client, header: str) -> None:
    assert_refused(ask_with(http, sign(claims(new_user()), header)))
    assert_refused(ask_with(http, f"{encode(header.encode())}.e30."))


@pytest.mark.parametrize(
    "payload",
    ["", "[]", '"alice"', "{", "{}", "[" * 10_000],
    ids=lambda payload: repr(payload[:20]),
)
def test_a_signed_payload_that_is_no_object_with_claims_is_refused(http: Client, payload: str) -> None:
    assert_refused(ask_with(http, sign(payload)))


def test_a_signed_payload_that_is_deep_is_no_bug(http: Client) -> None:
    """How deep the claims of its issuer may be that nobody here reads depends on the Python."""
    user = new_user()
    fine = json.dumps(claims(user))[:-1] + ', "a": ' + "[" * 200 + "]" * 200 + "}"
    assert caller(http, sign(fine)) == user
    response = ask_with(http, sign(fine.replace("[" * 200, "[" * 20_000).replace("]" * 200, "]" * 20_000)))
    assert response.json() in ({"items": []}, {"detail": "Invalid token"})


@pytest.mark.parametrize("text", ["." * 60_000, "eyJhbGciOiJIUzI1NiJ9." + "a" * 60_000 + ".a"], ids=["dots", "payload"])
def test_a_token_of_60_kilobytes_is_refused_like_a_short_one(http: Client, text: str) -> None:
    assert_refused(ask_with(http, text))


def test_an_opaque_session_token_is_no_jwt(http: Client) -> None:
    assert_refused(ask_with(http, "k3y.c2lnbmF0dXJl"))


# --- The algorithm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["none", "nOnE", "", None, ["none"], {}])
def test_a_token_of_no_algorithm_is_refused(http: Client, algorithm: object) -> None:
    text = f"{encode(json.dumps({'alg': algorithm}).encode())}.{encode(json.dumps(claims(new_user())).encode())}"
    for signature in ("", ".", f".{encode(b'none')}"):
        assert_refused(ask_with(http, text + signature))
    assert_refused(ask_with(http, sign(claims(new_user()), {"alg": algorithm})))
    assert_refused(ask_with(http, sign(claims(new_user()), {"alg": algorithm}, key=b"")))


@pytest.mark.parametrize("algorithm", ["hs256", "HS256\0", ["HS256"]])
def test_an_algorithm_that_is_only_like_hs256_is_refused(http: Client, algorithm: object) -> None:
    assert_refused(ask_with(http, sign(claims(new_user()), {"alg": algorithm})))


def test_a_header_without_an_algorithm_is_refused(http: Client) -> None:
    assert_refused(ask_with(http, sign(claims(new_user()), {"typ": "JWT"})))


@pytest.mark.parametrize(("algorithm", "digest"), [("HS384", "sha384"), ("HS512", "sha512")])
def test_a_longer_hash_by_the_right_secret_is_refused(http: Client, algorithm: str, digest: str) -> None:
    assert_refused(ask_with(http, sign(claims(new_user()), {"alg": algorithm}, by=digest)))
    assert_refused(ask_with(http, sign(claims(new_user()), {"alg": "HS256"}, by=digest)))
    assert_refused(ask_with(http, sign(claims(new_user()), {"alg": algorithm}, by="sha256")))


def test_an_asymmetric_signature_is_refused_where_there_is_only_a_secret(http: Client) -> None:
    rsa_key = rsa.generate_private_key(65537, 2048)
    keys: dict[str, Any] = {
        "RS256": rsa_key,
        "PS256": rsa_key,
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    }
    for algorithm, key in keys.items():
        assert_refused(ask_with(http, jwt.encode(claims(new_user()), key, algorithm=algorithm)))


# --- The rest of the header ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kid", ["../../../../../../dev/null", "' OR 1=1 --"])
def test_the_key_id_leads_to_no_other_key(http: Client, kid: str) -> None:
    user = new_user()
    for key in (b"", kid.encode()):
        assert_refused(ask_with(http, sign(claims(user), HS256 | {"kid": kid}, key=key)))
    assert caller(http, sign(claims(user), HS256 | {"kid": kid})) == user


def test_a_key_or_an_address_of_one_in_the_header_is_not_looked_at(http: Client) -> None:
    key = b"a key of the attacker's own, of 32 characters"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/jwks"
        jwk = {"kty": "oct", "k": encode(key), "alg": "HS256"}
        header = HS256 | {"jku": url, "x5u": url, "jwk": jwk, "x5c": [url], "kid": url}
        user = new_user()
        assert_refused(ask_with(http, sign(claims(user, iss=url), header, key=key)))
        assert caller(http, sign(claims(user, iss=url), header)) == user
        listener.setblocking(False)  # whoever needed it would have asked before the answers above
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("critical", [["x"], ["b64", "x"], [], "b64", None, [7]])
def test_a_critical_extension_that_nobody_knows_is_refused(http: Client, critical: object) -> None:
    assert_refused(ask_with(http, sign(claims(new_user()), HS256 | {"crit": critical, "x": 1})))


@pytest.mark.parametrize("critical", [{}, {"crit": ["b64"]}])
def test_an_unencoded_payload_is_refused(http: Client, critical: dict[str, Any]) -> None:
    header = encode(json.dumps(HS256 | {"b64": False} | critical).encode())
    payload = json.dumps(claims(new_user()))
    for signed, sent in ((payload, payload), (payload, ""), (encode(payload.encode()), encode(payload.encode()))):
        signature = encode(hmac.digest(SECRET.encode(), f"{header}.{signed}".encode(), "sha256"))
        assert_refused(ask_with(http, f"{header}.{sent}.{signature}"))


def test_a_header_field_given_twice_cannot_turn_the_signature_off(http: Client) -> None:
    for header in ('{"alg": "HS256", "alg": "none"}', '{"alg": "none", "alg": "HS256"}'):
        payload = encode(json.dumps(claims(new_user())).encode())
        assert_refused(ask_with(http, f"{encode(header.encode())}.{payload}."))
        assert_refused(ask_with(http, sign(claims(new_user()), header, key=b"")))
