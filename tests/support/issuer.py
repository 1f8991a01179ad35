"""An issuer of tokens, with keys, and services that know of it."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.support.service_process import Service
from tests.support.tokens import (
    claims,
    encode,
)

AUTH_ORIGIN = "https://auth.example.com"

BY_DEFAULT = "/api/auth/jwks"

HASTY: dict[str, object] = {"service.KEYS_PAUSE": 0.03}
"""Constants of a service that fetches keys almost as soon as it needs them, for tests of anything else."""

HEALING = 5
"""Seconds in which a new key is accepted, whatever the issuer was like before, or anybody sends."""

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


Responder = Callable[[BaseHTTPRequestHandler], None]


class Issuer:
    """A server on 127.0.0.1 that gives any path the same answer: a set of keys, unless told otherwise."""

    def __init__(self, *keys: object) -> None:
        self.answer: Responder | None = None
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

    def behave(self, answer: Responder | None) -> None:
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


def page(content: bytes, status: int = 200, **headers: str) -> Responder:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(content)

    return answer


KEYS = {algorithm: Key(algorithm) for algorithm in ("EdDSA", "ES256", "ES512", "RS256", "PS256")}
KEY = KEYS["EdDSA"]
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


@contextlib.contextmanager
def running_services(database: str, *settings: dict[str, Any]) -> Iterator[list[Service]]:
    """Services, all started at once, without a secret unless given one. In the end no log of theirs tells of a bug.

    The settings are what `Service` takes.
    """
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
    database: str, *answers: Responder | None, **options: Any
) -> Iterator[list[tuple[Issuer, Service]]]:
    """Issuers of the test's own, which give these answers from the beginning, each with a service that knows of it."""
    with contextlib.ExitStack() as stack:
        issuers = [stack.enter_context(contextlib.closing(Issuer())) for _ in answers]
        for issuer, answer in zip(issuers, answers, strict=True):
            issuer.behave(answer)
        settings = [{"BETTER_AUTH_URL": issuer.url, "constants": HASTY} | options for issuer in issuers]
        services = stack.enter_context(running_services(database, *settings))
        yield list(zip(issuers, services, strict=True))


def failed_fetches(service: Service) -> int:
    """Return how often the log says that no keys could be fetched."""
    return len(re.findall("no keys could be fetched: .", service.log))


def by_an_unknown_key(issuer: Issuer) -> str:
    """Return a token whose key nobody has named before."""
    return STRANGER.sign(issuer.claims("nobody"), kid=f"unknown-{uuid.uuid4().hex}")
