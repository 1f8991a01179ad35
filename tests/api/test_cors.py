"""Which origins may read which answers, and what a preflight grants."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from tests.support.answers import APP, EACH_STATUS, OTHER_APP
from tests.support.service_process import Client, Service

# --- CORS ------------------------------------------------------------------------------------------------------------

EXPOSED = {"etag", "location", "retry-after", "x-request-id"}
STRANGERS = [
    "https://evil.example.com", "http://app.example.com", "https://app.example.com:8443", "https://app.example.com/",
    "https://app.example.com.evil.com", "https://evilapp.example.com", "http://localhost:3000", "null", "*",
]  # fmt: skip


def names(header: str) -> set[str]:
    """Return the members of a header that is a list."""
    return {name.strip().lower() for name in header.split(",")}


@pytest.mark.parametrize("name", EACH_STATUS)
def test_an_allowed_origin_may_read_every_answer_and_another_may_read_none(
    send: Callable[..., httpx.Response], name: str
) -> None:
    headers = send(name, Origin=APP).headers
    assert headers.get_list("access-control-allow-origin") == [APP]
    assert headers.get_list("access-control-allow-credentials") == ["true"]
    assert names(headers["access-control-expose-headers"]) == EXPOSED
    assert "origin" in names(headers["vary"])
    assert "access-control-allow-origin" not in send(name, Origin=STRANGERS[0]).headers
    assert "access-control-allow-origin" not in send(name).headers


@pytest.mark.parametrize("origin", STRANGERS)
def test_an_origin_is_allowed_as_a_whole_or_not_at_all(
    configured: Service, send: Callable[..., httpx.Response], origin: str
) -> None:
    assert "access-control-allow-origin" not in send("200 GET list", Origin=origin).headers
    assert "access-control-allow-origin" not in send("401 GET", Origin=origin).headers
    response = preflight(configured, origin, "GET", "Authorization")
    assert response.status_code == 400
    assert "access-control-allow-origin" not in response.headers


def test_each_of_several_origins_is_allowed(send: Callable[..., httpx.Response]) -> None:
    for origin in (APP, OTHER_APP):
        assert send("200 GET list", Origin=origin).headers.get_list("access-control-allow-origin") == [origin]


def test_an_answer_for_one_origin_is_never_taken_for_another(send: Callable[..., httpx.Response]) -> None:
    """A cache that has the answer to one origin, or to none, must ask again for another."""
    for origin in ({}, {"Origin": APP}, {"Origin": STRANGERS[0]}):
        assert "origin" in names(send("200 GET list", **origin).headers["vary"])


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:3000", "http://localhost:5173"])
def test_the_usual_origins_are_allowed_where_none_are_configured(nobody: Client, origin: str) -> None:
    response = nobody.get("/api/tasks", headers={"Origin": origin})
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (401, origin)
    assert "access-control-allow-origin" not in nobody.get("/api/tasks", headers={"Origin": APP}).headers


METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
REQUEST_HEADERS = ["Authorization", "Content-Type", "If-Match", "If-None-Match", "Idempotency-Key", "X-Request-ID"]

SAFELISTED = {"accept", "accept-language", "content-language", "content-type"}
"""What browsers let any origin send anyway."""


def preflight(
    service: Service, origin: str, method: str, headers: str = "", path: str = "/api/tasks"
) -> httpx.Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": method}
    if headers:
        asked["Access-Control-Request-Headers"] = headers
    with service.client() as client:
        return client.options(path, headers=asked)


@pytest.mark.parametrize(
    ("method", "path"),
    [*((method, "/api/tasks/1") for method in METHODS), ("PATCH", "/api/tasks/1/complete/"), ("GET", "/x")],
)
def test_a_preflight_of_an_allowed_origin_is_granted_without_a_token(
    configured: Service, method: str, path: str
) -> None:
    response = preflight(configured, APP, method, ", ".join(REQUEST_HEADERS), path)
    assert response.is_success
    assert response.headers.get_list("access-control-allow-origin") == [APP]
    assert response.headers["access-control-allow-credentials"] == "true"
    assert names(response.headers["access-control-allow-methods"]) == names(",".join(METHODS))
    assert (
        names(response.headers["access-control-allow-headers"]) - SAFELISTED
        == names(",".join(REQUEST_HEADERS)) - SAFELISTED
    )
    assert "origin" in names(response.headers["vary"])


@pytest.mark.parametrize("headers", ["authorization,content-type,if-match", "idempotency-key", ""])
def test_a_preflight_is_granted_for_headers_as_browsers_ask_for_them(configured: Service, headers: str) -> None:
    """In lower case, without spaces, and only for those that the page sends."""
    response = preflight(configured, OTHER_APP, "PATCH", headers)
    assert response.is_success
    assert response.headers["access-control-allow-origin"] == OTHER_APP


@pytest.mark.parametrize(("method", "headers"), [("TRACE", ""), ("get", ""), ("GET", "X-Forwarded-For")])
def test_a_preflight_for_anything_else_is_refused(configured: Service, method: str, headers: str) -> None:
    assert preflight(configured, APP, method, headers).status_code == 400
