"""Tokens of all kinds, and what the service makes of them."""

from __future__ import annotations

import base64
import hmac
import json
import time
import uuid
from typing import Any

import httpx

from tests.support.service_process import SECRET, Client

# The leeway is called small: what is this far off is within it, or is not, whatever small is taken to mean.
WITHIN_LEEWAY = 10
BEYOND_LEEWAY = 120
OLD_SECRET = "Schlüssel, 密码, 🔑 of the months before that"

HS256 = {"typ": "JWT", "alg": "HS256"}


def new_user() -> str:
    return f"user-{uuid.uuid4().hex}"


def claims(user_id: str, **changes: Any) -> dict[str, Any]:
    return {"sub": user_id, "iat": int(time.time()), "exp": int(time.time()) + 3600} | changes


def encode(content: bytes) -> str:
    """Return base64url without padding (RFC 7515, section 2)."""
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def sign(
    payload: dict[str, Any] | str,
    header: dict[str, Any] | str = HS256,
    key: bytes = SECRET.encode(),
    by: str = "sha256",
) -> str:
    """Return a token made by hand, so that it can be one that no library would make."""
    parts = (part if isinstance(part, str) else json.dumps(part) for part in (header, payload))
    text = ".".join(encode(part.encode()) for part in parts)
    return f"{text}.{encode(hmac.digest(key, text.encode(), by))}"


def ask_with(http: Client, token: str | bytes) -> httpx.Response:
    content = token.encode() if isinstance(token, str) else token
    return http.get("/api/tasks", headers={b"Authorization": b"Bearer " + content})


def caller(http: Client, token: str) -> str:
    """Return the user that a token proves, as the owner of a task made with it."""
    response = http.post("/api/tasks", json={"title": "mine"}, headers={"Authorization": f"Bearer {token}"})
    assert response.status_code == 201, response.text
    return str(response.json()["user_id"])


def assert_refused(response: httpx.Response, detail: str = "Invalid token") -> None:
    challenge = "Bearer" if detail == "Not authenticated" else 'Bearer error="invalid_token"'
    assert (response.status_code, response.json()) == (401, {"detail": detail})
    assert response.headers["www-authenticate"] == challenge
    assert response.headers["content-type"] == "application/json"


STRICT_SECRET = " Schlüssel, 密码, 🔑 and a few letters more\n"
AUDIENCE = "https://app.example.com"
ISSUER = "https://auth.example.com"


def sign_strictly(user_id: str, *, secret: str = STRICT_SECRET, **changes: Any) -> str:
    right = {"aud": AUDIENCE, "iss": ISSUER}
    return sign(claims(user_id, **(right | changes)), key=secret.encode())
