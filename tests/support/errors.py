"""Errors to the letter."""

from __future__ import annotations

import httpx

TASK_NOT_FOUND = {"detail": "Task not found"}
NOT_AUTHENTICATED = {"detail": "Not authenticated"}
NO_HTTP = {"detail": "The request must be valid HTTP/1.1"}
LIMIT = 65_536

NOT_JSON = "The body must be valid JSON, encoded as UTF-8"
NOT_DECLARED_AS_JSON = "The body must be JSON, with Content-Type: application/json"
TOO_LARGE = f"The body must have at most {LIMIT} bytes"


def assert_error(response: httpx.Response, status: int, detail: str, **headers: str) -> None:
    """Assert that a response is this error to the letter, with these headers beside those of every answer."""
    assert (response.status_code, response.json()) == (status, {"detail": detail}), asked(response)
    assert_headers(response, headers)


def assert_invalid(response: httpx.Response, *errors: tuple[str, str]) -> None:
    """Assert that a response is the 422 with these fields and messages, in this order."""
    assert (response.status_code, response.json()) == (
        422,
        {
            "detail": "; ".join(f"{field} {message}" for field, message in errors),
            "errors": [{"field": field, "message": message} for field, message in errors],
        },
    ), asked(response)
    assert_headers(response, {})


def assert_headers(response: httpx.Response, headers: dict[str, str]) -> None:
    usual = {
        "date",
        "content-length",
        "content-type",
        "cache-control",
        "vary",
        "x-content-type-options",
        "x-request-id",
    }
    assert response.headers["content-type"] == "application/json", asked(response)
    extra = {name: value for name, value in response.headers.items() if name not in usual}
    assert extra == {name.replace("_", "-").lower(): value for name, value in headers.items()}, asked(response)


def asked(response: httpx.Response) -> str:
    """Return what a response answers, for tests that send several requests."""
    return f"{response.request.method} {response.request.url.raw_path[:100]!r}"


def padded(length: int) -> bytes:
    """Return a body that is valid for POST, PUT and PATCH, of this many bytes."""
    body = b'{"title": "padded", "completed": true, "x": "%b"}'
    return body % (b"x" * (length - len(body % b"")))


BLANK = "must not be blank"
