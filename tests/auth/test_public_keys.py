"""Who the caller is where an issuer's public keys prove it: a real issuer, which may be down, slow, ill or hostile."""

from __future__ import annotations

import base64
import contextlib
import gzip
import itertools
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import service
from tests.support.postgres import free_port
from tests.support.service_process import SECRET, Client, Service, token
from tests.support.settings import PYTHON, refusal, run
from tests.support.tokens import (
    BEYOND_LEEWAY,
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

NO_KEYS = {"detail": "The keys to verify tokens with are not available right now, try again soon"}
SESSION_CACHE = "better-auth:session-cache"

AUTH_ORIGIN = "https://auth.example.com"
AUDIENCE = "https://app.example.com"
ISSUER = "https://login.example.com"

BY_DEFAULT = "/api/auth/jwks"
ELSEWHERE = "/tenants/7/keys?version=2"

PAUSE = 2.1
"""Seconds after which a service that has asked the issuer for an unknown key asks again for another one."""

HEALING = 5
"""Seconds in which a new key is accepted, whatever the issuer was like before, or anybody sends."""

PROMPT = 1.5
"""Seconds that an answer may take which waits for nothing, on a machine that does other things too."""

# --- An issuer -------------------------------------------------------------------------------------------------------

GENERATE: dict[str, Callable[[], Any]] = {
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ES384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ES512": lambda: ec.generate_private_key(ec.SECP521R1()),
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "PS256": lambda: rsa.generate_private_key(65537, 2048),
}


class Key:
    """A key pair with an id. `jwk` is its public half with some members changed; one that is None is left out."""

    def __init__(self, algorithm: str, **members: Any) -> None:
        self.algorithm = algorithm
        self.private = GENERATE[algorithm]()
        self.kid = f"{algorithm}-{uuid.uuid4().hex}"
        jwk = json.loads(jwt.get_algorithm_by_name(algorithm).to_jwk(self.private.public_key()))
        self.jwk = without_none(jwk | {"kid": self.kid, "alg": algorithm} | members)

    def sign(self, payload: dict[str, Any], by: str = "", **header: Any) -> str:
        """Return a token made by hand, so that its header can be one that no library would make."""
        by = by or self.algorithm
        parts = (without_none({"alg": by, "kid": self.kid} | header), payload)
        text = ".".join(encode(json.dumps(part).encode()) for part in parts)
        return f"{text}.{encode(jwt.get_algorithm_by_name(by).sign(text.encode(), self.private))}"


def without_none(members: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


def key_set(*keys: object) -> bytes:
    """Return the text of a JSON Web Key Set of keys and of whatever else shall stand beside them."""
    return json.dumps({"keys": [key.jwk if isinstance(key, Key) else key for key in keys]}).encode()


Answer = Callable[[BaseHTTPRequestHandler], None]


class Issuer:
    """A server on 127.0.0.1 that gives any path the same answer: a set of keys, unless told otherwise."""

    def __init__(self, *keys: object) -> None:
        self.answer: Answer | None = None
        self.paths: list[str] = []
        self.most_at_once = 0
        self.lock = threading.Lock()
        self.waiting: list[socket.socket] = []
        self.server = self.bind(0)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self.publish(*keys)

    def bind(self, port: int) -> ThreadingHTTPServer:
        """Return a server that does not listen yet, and keeps others from its port."""
        server = ThreadingHTTPServer(("127.0.0.1", port), self.handler(), bind_and_activate=False)
        server.server_bind()
        return server

    def publish(self, *keys: object) -> None:
        self.behave(page(key_set(*keys)))

    def behave(self, answer: Answer | None) -> None:
        """Give this answer from now on; with None, be down."""
        was_up, self.answer = self.answer is not None, answer
        if answer and not was_up:
            self.server.server_activate()
            threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        elif was_up and not answer:
            self.server.shutdown()
            self.server.server_close()
            self.server = self.bind(self.port)

    def close(self) -> None:
        self.behave(None)
        self.server.server_close()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with issuer.lock:
                    issuer.paths.append(self.path)
                    issuer.waiting = [*filter(is_open, issuer.waiting), self.connection]
                    issuer.most_at_once = max(issuer.most_at_once, len(issuer.waiting))
                with contextlib.suppress(OSError):
                    if issuer.answer:
                        issuer.answer(self)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler

    def claims(self, user_id: str, **changes: Any) -> dict[str, Any]:
        """Return what Better Auth puts into a token; a claim that is given as None is left out."""
        return without_none(claims(user_id, iss=self.url, aud=self.url) | changes)


def is_open(connection: socket.socket) -> bool:
    """Return whether the client has not hung up."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def page(content: bytes, status: int = 200, **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(content)

    return answer


def raw(content: bytes) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(content)

    return answer


def hang(request: BaseHTTPRequestHandler) -> None:
    while is_open(request.connection):
        time.sleep(0.02)


def drip(beginning: bytes) -> Answer:
    """Send this at once, and then a space at a time for ever, which neither a header nor a JSON text minds."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(beginning)
        while True:
            time.sleep(0.5)
            request.wfile.write(b" ")

    return answer


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_no_keys(response: httpx.Response) -> None:
    assert (response.status_code, response.json()) == (503, NO_KEYS)
    assert re.fullmatch("[1-9]", response.headers["retry-after"])
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["content-type"] == "application/json"
    assert "www-authenticate" not in response.headers  # a client would log its user out


# --- Its keys, and services that know of it --------------------------------------------------------------------------

KEYS = {algorithm: Key(algorithm) for algorithm in ("EdDSA", "ES256", "ES512", "RS256", "PS256")}
KEY = KEYS["EdDSA"]
WITHOUT_ALGORITHM = {algorithm: Key(algorithm, alg=None) for algorithm in ("EdDSA", "ES256", "ES512", "RS256")}
STRANGER = Key("EdDSA")
"""A key that the issuer never lists."""

SHARED_SECRET = b"a secret that everybody can read in the key set"
OCT = {"kty": "oct", "kid": "oct", "alg": "HS256", "k": encode(SHARED_SECRET)}
ENCRYPTION = Key("ES256", use="enc")
UNKNOWN_KINDS: list[object] = [
    {},
    {"kty": "AKP", "alg": "ML-DSA-44", "kid": "post-quantum", "pub": "AAAA"},
    {"kty": "OKP", "crv": "X25519", "kid": "x25519", "x": encode(bytes(32))},
    {"kty": "EC", "kid": "no coordinates"},
    {"kty": "RSA", "alg": "RSA-OAEP", "kid": "no numbers"},
    Key("ES384"),
]


@pytest.fixture(scope="module")
def database(new_database: Callable[[], str]) -> str:
    """The URL of the database that all services here share."""
    return new_database()


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    """An issuer that is well: no test takes a key from it."""
    keys = [*UNKNOWN_KINDS, OCT, ENCRYPTION, *KEYS.values(), *WITHOUT_ALGORITHM.values()]
    with contextlib.closing(Issuer(*keys)) as issuer:
        yield issuer


@contextlib.contextmanager
def running(database: str, *settings: dict[str, Any]) -> Iterator[list[Service]]:
    """Services, all started at once, without a secret unless given one. In the end no log of theirs tells of a bug."""
    services = [Service(database, wait=False, **{"BETTER_AUTH_SECRET": ""} | variables) for variables in settings]
    try:
        for service in services:
            service.wait_until_ready()
        yield services
        for service in services:
            assert service.process.poll() is None, service.log  # or another process got its port
            assert not re.search("Traceback|status=500", service.log), service.log
    finally:
        for service in services:
            service.process.terminate()
        for service in services:
            service.remove()


@contextlib.contextmanager
def issuers_and_services(
    database: str, *answers: Answer | None, **variables: str
) -> Iterator[list[tuple[Issuer, Service]]]:
    """Issuers of the test's own, which give these answers from the beginning, each with a service that knows of it."""
    with contextlib.ExitStack() as stack:
        issuers = [stack.enter_context(contextlib.closing(Issuer())) for _ in answers]
        for issuer, answer in zip(issuers, answers, strict=True):
            issuer.behave(answer)
        settings = [{"BETTER_AUTH_URL": issuer.url} | variables for issuer in issuers]
        services = stack.enter_context(running(database, *settings))
        yield list(zip(issuers, services, strict=True))


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
    with running(database, *settings.values()) as services, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(service.client()) for service in services]
        yield dict(zip(settings, clients, strict=True))


def assert_all_refused(client: Client, *tokens: str) -> None:
    """Assert that each token is refused, all at once: those that name unknown keys wait for the next fetch."""

    def assert_one_refused(sent: str) -> None:
        with Client(str(client.base_url)) as own:  # one is not as safe to share between threads as it should be
            assert_refused(ask(own, sent))

    with ThreadPoolExecutor(len(tokens)) as threads:
        list(threads.map(assert_one_refused, tokens))


# --- Tokens that are accepted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_token_by_any_of_the_algorithms_proves_its_subject(
    http: dict[str, Client], issuer: Issuer, algorithm: str
) -> None:
    user = new_user()
    sent = KEYS[algorithm].sign(issuer.claims(user))
    assert ask(http["keys"], sent).json() == {"items": []}
    assert caller(http["keys"], sent) == user
    assert {task["user_id"] for task in ask(http["keys"], sent).json()["items"]} == {user}


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
        assert_refused(ask(http["keys elsewhere"], KEY.sign(claims(user, **right | wrong))))


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
        assert_refused(ask(client, KEY.sign(issuer.claims(user, **{claim: wrong}))))
        assert_refused(ask(client, sign(without_none(claims(user, **{claim: wrong})))))
    other = "iss" if claim == "aud" else "aud"
    assert_refused(ask(client, KEY.sign(issuer.claims(user, **{claim: value, other: value}))))
    assert caller(client, sign(claims(user, **{claim: value, other: "anything"}))) == user


# --- Keys and algorithms that do not belong together -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["keys", "keys and secret", "only JWKS_URL"])
@pytest.mark.parametrize("algorithm", KEYS)
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
            assert_refused(ask(http[name], sign(issuer.claims(new_user()), {"alg": "HS256"} | header, key=secret)))


@pytest.mark.parametrize("name", ["keys", "keys and secret", "only JWKS_URL"])
def test_a_secret_that_the_issuer_publishes_is_not_taken(http: dict[str, Client], issuer: Issuer, name: str) -> None:
    for header in ({"kid": "oct"}, {}):
        assert_refused(ask(http[name], sign(issuer.claims(new_user()), {"alg": "HS256"} | header, key=SHARED_SECRET)))


def test_a_token_by_the_secret_is_refused_where_there_are_only_keys(http: dict[str, Client], issuer: Issuer) -> None:
    for header in ({}, {"kid": KEY.kid}, {"kid": "unknown"}):
        assert_refused(ask(http["keys"], sign(issuer.claims(new_user()), {"alg": "HS256"} | header)))


def test_the_id_of_a_public_key_leads_a_token_by_the_secret_nowhere(http: dict[str, Client]) -> None:
    user = new_user()
    assert caller(http["keys and secret"], sign(claims(user), {"alg": "HS256", "kid": KEY.kid})) == user


@pytest.mark.parametrize("secret", [SECRET, OLD_SECRET], ids=["new", "old"])
def test_neither_secret_stands_in_for_a_public_key(http: dict[str, Client], issuer: Issuer, secret: str) -> None:
    user, key = new_user(), secret.encode()
    assert caller(http["keys and two secrets"], sign(claims(user), key=key)) == user
    for algorithm in KEYS:
        header = {"alg": algorithm, "kid": KEYS[algorithm].kid}
        assert_refused(ask(http["keys and two secrets"], sign(issuer.claims(user), header, key=key)))


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_token_by_a_key_is_refused_where_there_is_only_a_secret(
    nobody: Client, issuer: Issuer, algorithm: str
) -> None:
    assert_refused(ask(nobody, KEYS[algorithm].sign(issuer.claims(new_user()))))


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "", None, "EdDSA ", "eddsa", ["EdDSA"], 7])
def test_a_token_of_no_known_algorithm_is_refused(http: dict[str, Client], issuer: Issuer, algorithm: object) -> None:
    header = encode(json.dumps({"alg": algorithm, "kid": KEY.kid}).encode())
    unsigned = f"{header}.{encode(json.dumps(issuer.claims(new_user())).encode())}."
    signature = KEY.sign(issuer.claims(new_user())).rpartition(".")[2]
    for name in ("keys", "keys and secret"):
        assert_refused(ask(http[name], unsigned))
        assert_refused(ask(http[name], unsigned + signature))
        assert_refused(ask(http[name], KEY.sign(issuer.claims(new_user()), alg=algorithm)))


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_key_is_good_for_its_own_algorithm_alone(http: dict[str, Client], issuer: Issuer, algorithm: str) -> None:
    payload = issuer.claims(new_user())
    for other in KEYS.keys() - {algorithm}:
        assert_refused(ask(http["keys"], KEYS[algorithm].sign(payload, kid=KEYS[other].kid)))
        assert_refused(ask(http["keys"], KEYS[algorithm].sign(payload, alg=other)))
        assert_refused(ask(http["keys"], KEYS[algorithm].sign(payload, alg=other, kid=KEYS[other].kid)))


@pytest.mark.parametrize(("algorithm", "other"), [("RS256", "PS256"), ("PS256", "RS256"), ("RS256", "RS512")])
def test_an_rsa_key_of_one_algorithm_signs_by_no_other(
    http: dict[str, Client], issuer: Issuer, algorithm: str, other: str
) -> None:
    assert_refused(ask(http["keys"], KEYS[algorithm].sign(issuer.claims(new_user()), by=other)))


def test_a_key_that_is_for_encryption_verifies_nothing(http: dict[str, Client], issuer: Issuer) -> None:
    assert_refused(ask(http["keys"], ENCRYPTION.sign(issuer.claims(new_user()))))


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
        assert_refused(ask(http["keys"], KEY.sign(issuer.claims(new_user()), **header)))


def test_a_signature_fits_no_other_claims(http: dict[str, Client], issuer: Issuer) -> None:
    mine, theirs = (KEY.sign(issuer.claims(new_user())).split(".") for _ in range(2))
    assert_refused(ask(http["keys"], ".".join([*theirs[:2], mine[2]])))
    assert_refused(ask(http["keys"], ".".join([*mine[:2], ""])))


def base64_bytes(text: bytes) -> bytes:
    return base64.urlsafe_b64decode(text + b"==")


# --- Claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", ["aud", "iss"])
def test_a_token_for_or_by_anybody_else_is_refused(http: dict[str, Client], issuer: Issuer, claim: str) -> None:
    wrong = [f"{issuer.url}/", f"{issuer.url}/some/path/", issuer.url[:-1], issuer.url.upper(), issuer.url[7:], "*", ""]
    for value in [*wrong, None, 7, True, [], ["https://app.example.com"], [f"{issuer.url}/"], {issuer.url: 1}]:
        assert_refused(ask(http["keys"], KEY.sign(issuer.claims(new_user(), **{claim: value}))))


def test_the_audience_may_be_one_of_several_and_the_issuer_may_not(http: dict[str, Client], issuer: Issuer) -> None:
    user = new_user()
    assert caller(http["keys"], KEY.sign(issuer.claims(user, aud=["x", issuer.url]))) == user
    assert_refused(ask(http["keys"], KEY.sign(issuer.claims(user, iss=[issuer.url]))))


@pytest.mark.parametrize("name", ["keys", "only JWKS_URL"])
def test_an_expiry_and_a_subject_are_required(http: dict[str, Client], issuer: Issuer, name: str) -> None:
    for value in (None, "4000000000", True, [4000000000], {"exp": 1}, float("inf"), float("nan")):
        assert_refused(ask(http[name], KEY.sign(issuer.claims(new_user(), exp=value))))
    for subject in (None, "", 7, True, ["alice"], {"id": "alice"}, "x" * 256, "a\0b", "\ud83d"):
        assert_refused(ask(http[name], KEY.sign(issuer.claims("", sub=subject))))


def test_the_times_in_a_token_are_checked_with_a_small_leeway(http: dict[str, Client], issuer: Issuer) -> None:
    user, now, client = new_user(), int(time.time()), http["keys"]
    assert caller(client, KEY.sign(issuer.claims(user, exp=now - WITHIN_LEEWAY))) == user
    assert caller(client, KEY.sign(issuer.claims(user, nbf=now + WITHIN_LEEWAY, iat=now + WITHIN_LEEWAY))) == user
    assert_refused(ask(client, KEY.sign(issuer.claims(user, exp=now - BEYOND_LEEWAY))), "Token has expired")
    for claim in ("nbf", "iat"):
        assert_refused(ask(client, KEY.sign(issuer.claims(user, **{claim: now + BEYOND_LEEWAY}))))


def test_only_a_token_that_is_right_otherwise_is_told_that_it_has_expired(
    http: dict[str, Client], issuer: Issuer
) -> None:
    assert_refused(ask(http["keys"], STRANGER.sign(issuer.claims(new_user(), exp=1), kid=KEY.kid)))
    assert_refused(ask(http["keys"], STRANGER.sign(issuer.claims(new_user(), exp=1))))


@pytest.mark.parametrize("name", ["keys", "keys and secret", "only JWKS_URL"])
def test_the_session_cache_of_better_auth_is_no_token(http: dict[str, Client], issuer: Issuer, name: str) -> None:
    """It has a subject, and is signed with the same keys; only its audience tells it apart."""
    for audience in (SESSION_CACHE, [SESSION_CACHE], [issuer.url, SESSION_CACHE], [SESSION_CACHE, issuer.url]):
        assert_refused(ask(http[name], KEY.sign(issuer.claims(new_user(), aud=audience))))


@pytest.mark.parametrize("audience", [SESSION_CACHE, [SESSION_CACHE], ["x", SESSION_CACHE]])
def test_the_session_cache_is_no_token_by_the_secret_either(
    http: dict[str, Client], nobody: Client, audience: object
) -> None:
    for client in (http["keys and secret"], nobody):
        assert_refused(ask(client, sign(claims(new_user(), aud=audience))))


def test_the_session_cache_by_the_secret_has_no_subject(http: dict[str, Client], nobody: Client) -> None:
    payload = without_none({"session": {"userId": new_user()}, "user": {"id": new_user()}} | claims("", sub=None))
    for client in (http["keys and secret"], nobody):
        assert_refused(ask(client, sign(payload)))


# --- An issuer that is down, ill or hostile --------------------------------------------------------------------------

# Most of these would give the stranger's key to a service that believes them.
FORGED = key_set(STRANGER)
PADDED = FORGED[:-1] + b', "padding": "' + b"x" * 50_000_000 + b'"}'


def redirect(status: int) -> Answer:
    """Send the client to another host, which happens to be us, for the stranger's key."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        if request.path == BY_DEFAULT:
            location = f"http://{request.headers['Host']}/forged".replace("127.0.0.1", "localhost")
            page(FORGED, status, Location=location)(request)
        else:
            page(FORGED)(request)

    return answer


MOODS: dict[str, dict[str, Answer | None]] = {
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


def check_outage(issuer: Issuer, service: Service, answer: Answer | None) -> None:
    known, fresh, last, *forged = (
        key.sign(issuer.claims(new_user())) for key in (KEY, KEY, KEY, STRANGER, STRANGER, STRANGER)
    )
    with service.client() as client:
        # No keys were ever had.
        for text in (known, forged[0]):
            assert_no_keys(ask(client, text))
        assert client.get("/health").status_code == 200
        assert failures(service) == 1

        issuer.publish(KEY)
        wait_until(lambda: ask(client, known).status_code == 200, HEALING)
        assert_refused(ask(client, forged[0]))

        issuer.behave(answer)
        time.sleep(PAUSE)
        assert_no_keys(ask(client, forged[1]))
        for text in (known, fresh):
            assert ask(client, text).json() == {"items": []}
        assert_no_keys(ask(client, forged[2]))
        assert ask(client, last).json() == {"items": []}
        assert failures(service) == 2
        assert set(issuer.paths) <= {BY_DEFAULT}
        assert not any(text.rpartition(".")[2] in service.log for text in (known, fresh, last, *forged))


def failures(service: Service) -> int:
    """Return how often the log says that no keys could be fetched."""
    return len(re.findall("no keys could be fetched: .", service.log))


def test_each_new_reason_is_logged_once_and_no_token_ever(database: str) -> None:
    with issuers_and_services(database, page(FORGED, 500)) as [(issuer, service)], service.client() as client:
        sent = KEY.sign(issuer.claims(new_user()))

        def ask_until_the_issuer_has_been_asked(times: int) -> None:
            wait_until(lambda: ask(client, sent).status_code == 503 and len(issuer.paths) == times, HEALING)

        ask_until_the_issuer_has_been_asked(times=2)  # the service has asked once by itself
        issuer.behave(page(b"no JSON"))
        ask_until_the_issuer_has_been_asked(times=3)
        lines = [line for line in service.log.splitlines() if "no keys could be fetched" in line]
        assert len(lines) == 2, lines
        assert all(line.startswith(f"{issuer.url}{BY_DEFAULT}: ") for line in lines)
        assert ("500" in lines[0], "JSON" in lines[1]) == (True, True)
        assert not any(part in service.log for part in sent.split("."))


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
            assert_refused(ask(client, by_an_unknown_key(issuer)))
            issuer.publish(KEY, KEYS[algorithm])
            user = new_user()
            assert caller(client, KEYS[algorithm].sign(issuer.claims(user))) == user
        assert len(issuer.paths) == 5


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
        assert_refused(ask(client, STRANGER.sign(issuer.claims(user))))
        for text in (used, fresh):
            assert_refused(ask(client, text))
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
]


def test_keys_that_cannot_be_read_beside_a_good_one_do_no_harm(database: str) -> None:
    answers = page(key_set(*MALFORMED, KEY))
    with issuers_and_services(database, answers) as [(issuer, service)], service.client() as client:
        user = new_user()
        assert caller(client, KEY.sign(issuer.claims(user))) == user
        assert failures(service) == 0


def test_a_key_too_short_for_its_algorithm_verifies_nothing(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 7518, section 3.3, demands 2048 bits."""
    monkeypatch.setitem(GENERATE, "RS256", lambda: rsa.generate_private_key(65537, 1024))
    weak = Key("RS256")
    with issuers_and_services(database, page(key_set(weak, KEY))) as [(issuer, service)], service.client() as client:
        assert_refused(ask(client, weak.sign(issuer.claims(new_user()))))
        assert ask(client, KEY.sign(issuer.claims(new_user()))).status_code == 200


@pytest.mark.long
def test_a_key_that_comes_back_under_the_same_id_as_another_one_replaces_it(database: str) -> None:
    theirs = Key("EdDSA", kid=KEY.kid)
    with issuers_and_services(database, page(key_set(KEY))) as [(issuer, service)], service.client() as client:
        user = new_user()
        used = KEY.sign(issuer.claims(user))
        assert caller(client, used) == user
        issuer.publish(theirs)
        assert_refused(ask(client, STRANGER.sign(issuer.claims(user))))
        assert_refused(ask(client, used))
        assert caller(client, theirs.sign(issuer.claims(user), kid=KEY.kid)) == user


# --- Floods and slowness ---------------------------------------------------------------------------------------------


def by_an_unknown_key(issuer: Issuer) -> str:
    """Return a token whose key nobody has named before."""
    return STRANGER.sign(issuer.claims("nobody"), kid=f"unknown-{uuid.uuid4().hex}")


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
                    assert_refused(ask(client, by_an_unknown_key(issuer)))

        stack.callback(enough.set)
        started = time.monotonic()
        floods = [threads.submit(flood) for _ in range(50)]
        wait_until(lambda: len(issuer.paths) == 2, HEALING)
        issuer.publish(KEY, new)
        asked = time.monotonic()
        for text in (KEY.sign(issuer.claims(user)), token(user)):
            assert ask(client, text).json() == {"items": []}
        assert time.monotonic() - asked < PROMPT, "what needs no new key does not wait"
        assert ask(client, new.sign(issuer.claims(user))).json() == {"items": []}
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
            assert_no_keys(ask(client, by_an_unknown_key(issuer)))

    with service.client() as client, ThreadPoolExecutor(20) as threads:
        asked = time.monotonic()
        waiting = [threads.submit(wait_for_keys) for _ in range(20)]
        while not all(answer.done() for answer in waiting):
            started = time.monotonic()
            assert client.get("/health").status_code == 200
            for text in others:
                assert ask(client, text).status_code == 200
            assert time.monotonic() - started < PROMPT
            time.sleep(0.05)
        assert time.monotonic() - asked < 7  # a pause of 2 seconds, a fetch of 3, and a busy machine
        for answer in waiting:
            answer.result()
    assert issuer.most_at_once == 1


# --- The settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("BETTER_AUTH_URL", "ftp://auth.example.com"),
        ("BETTER_AUTH_URL", "https:///some/path"),
        ("BETTER_AUTH_URL", "https://user:hunterswordfish@auth.example.com"),
        ("BETTER_AUTH_URL", "https://auth.example.com:hunter"),
        ("JWKS_URL", "https://user:hunterswordfish@auth.example.com/keys"),
    ],
)
def test_a_bad_url_is_refused_in_one_sentence(name: str, url: str) -> None:
    assert refusal(**{name: url}) == f"{name} must be a URL like https://app.example.com."


def origins(*urls: str) -> list[str]:
    """Return what the service reads as the origins of URLs, or as no URL."""

    def origin(url: str) -> str:
        try:
            return service.http_origin("X", url)
        except service.SettingError as error:
            return str(error)

    return [origin(url) for url in urls]


def test_an_origin_is_read_as_browsers_read_it() -> None:
    expected = {
        "https://app.example.com": "https://app.example.com",
        "https://app.example.com/": "https://app.example.com",
        "HTTPS://App.Example.COM/some/Path/?query=1#fragment": "https://app.example.com",
        "https://app.example.com:443/": "https://app.example.com",
        "https://app.example.com:80": "https://app.example.com:80",
        "http://localhost:80": "http://localhost",
        "http://localhost:443": "http://localhost:443",
        "http://localhost:3000/api/auth": "http://localhost:3000",
        "http://[::1]:3000/": "http://[::1]:3000",
        "http://[::1]:80": "http://[::1]",
        "https://app.example.com/@someone": "https://app.example.com",
    }
    assert origins(*expected) == [*expected.values()]


def test_what_browsers_do_not_read_has_no_origin() -> None:
    urls = ["auth.example.com", "//auth.example.com", "https://", "https://:443", "http://a:65536", "http://a:-1",
            "http://[::1", "http://a:\u0663", "https://a\tb", "javascript:alert(1)", "file:///etc/passwd",
            "https://user@auth.example.com"]  # fmt: skip
    assert origins(*urls) == ["X must be a URL like https://app.example.com."] * len(urls)


def test_spaces_around_a_url_do_no_harm_and_within_it_they_do() -> None:
    assert origins(" https://app.example.com ", "https://app.example.com\n") == ["https://app.example.com"] * 2
    assert origins("https://app example.com") == ["X must be a URL like https://app.example.com."]


def test_no_token_can_be_made_without_a_secret() -> None:
    stopped = run([*PYTHON, "token", "alice"], BETTER_AUTH_SECRET="", BETTER_AUTH_URL=AUTH_ORIGIN)
    assert (stopped.returncode != 0, stopped.stdout) == (True, "")
    assert re.fullmatch(r"error: BETTER_AUTH_SECRET [^\n]+\n", stopped.stderr)


@pytest.mark.parametrize(("name", "value"), [("HTTPS_PROXY", "garbage://proxy"), ("SSL_CERT_FILE", "/nowhere/ca.pem")])
def test_an_environment_in_which_no_request_can_be_made_is_told_in_one_sentence(name: str, value: str) -> None:
    stopped = run(PYTHON, **{"BETTER_AUTH_URL": AUTH_ORIGIN, name: value})
    assert stopped.returncode != 0
    assert re.fullmatch(r"error: HTTP requests cannot be made in this environment: [^\n]+\.\n", stopped.stderr)


def test_the_query_of_a_url_is_not_logged(database: str, start_service: Callable[..., Service]) -> None:
    url = f"http://127.0.0.1:{free_port()}/jwks"
    service = start_service(database, BETTER_AUTH_SECRET="", JWKS_URL=f"{url}?key=hunterswordfish")
    wait_until(lambda: f"{url}: no keys could be fetched: " in service.log, HEALING)
    assert "hunter" not in service.log
