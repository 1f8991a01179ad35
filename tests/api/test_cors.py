"""Which origins may read which answers, and what a preflight grants."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.answers import ALL, APP, OTHER_APP
from tests.support.conditions import BODY, path_of
from tests.support.service_process import Client, Service

# --- CORS ------------------------------------------------------------------------------------------------------------

EXPOSED = {"etag", "location", "retry-after", "x-request-id"}
STRANGERS = [
    "https://evil.example.com", "http://app.example.com", "https://app.example.com:8443", "https://app.example.com/",
    "https://app.example.com.evil.com", "https://evilapp.example.com", "https://example.com", "http://localhost:3000",
    "null", "*", "",
]  # fmt: skip


def names(header: str) -> set[str]:
    """Return the members of a header that is a list."""
    return {name.strip().lower() for name in header.split(",")}


@pytest.mark.parametrize(("name", "origin"), [*((name, APP) for name in ALL), ("200 GET list", OTHER_APP)])
def test_an_allowed_origin_may_read_every_answer(send: Callable[..., httpx.Response], name: str, origin: str) -> None:
    headers = send(name, Origin=origin).headers
    assert headers.get_list("access-control-allow-origin") == [origin]
    assert headers.get_list("access-control-allow-credentials") == ["true"]
    assert names(headers["access-control-expose-headers"]) == EXPOSED
    assert "origin" in names(headers["vary"])


@pytest.mark.parametrize("name", ALL)
def test_another_origin_may_read_no_answer(send: Callable[..., httpx.Response], name: str) -> None:
    assert "access-control-allow-origin" not in send(name, Origin=STRANGERS[0]).headers
    assert "access-control-allow-origin" not in send(name).headers


@pytest.mark.parametrize("origin", STRANGERS)
def test_an_origin_is_allowed_as_a_whole_or_not_at_all(send: Callable[..., httpx.Response], origin: str) -> None:
    assert "access-control-allow-origin" not in send("200 GET list", Origin=origin).headers
    assert "access-control-allow-origin" not in send("401 GET", Origin=origin).headers


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
    "path", ["/api/tasks", "/api/tasks/", "/api/tasks/1", "/api/tasks/1/complete", "/health", "/x"]
)
@pytest.mark.parametrize("method", METHODS)
def test_a_preflight_of_an_allowed_origin_is_granted_without_a_token(
    configured: Service, method: str, path: str
) -> None:
    response = preflight(configured, APP, method, ", ".join(REQUEST_HEADERS), path)
    assert response.status_code in (200, 204)
    assert response.headers.get_list("access-control-allow-origin") == [APP]
    assert response.headers["access-control-allow-credentials"] == "true"
    assert names(response.headers["access-control-allow-methods"]) == names(",".join(METHODS))
    assert (
        names(response.headers["access-control-allow-headers"]) - SAFELISTED
        == names(",".join(REQUEST_HEADERS)) - SAFELISTED
    )
    assert "origin" in names(response.headers["vary"])


@pytest.mark.parametrize("headers", [*REQUEST_HEADERS, "authorization", "authorization,content-type", ""])
def test_a_preflight_is_granted_for_each_header(configured: Service, headers: str) -> None:
    response = preflight(configured, OTHER_APP, "PATCH", headers)
    assert response.status_code in (200, 204)
    assert response.headers["access-control-allow-origin"] == OTHER_APP


@pytest.mark.parametrize("origin", STRANGERS)
def test_a_preflight_of_another_origin_is_refused(configured: Service, origin: str) -> None:
    response = preflight(configured, origin, "GET", "Authorization")
    assert response.status_code >= 400
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(("method", "headers"), [("TRACE", ""), ("PURGE", ""), ("get", ""), ("GET", "X-Forwarded-For")])
def test_a_preflight_for_anything_else_is_refused(configured: Service, method: str, headers: str) -> None:
    response = preflight(configured, APP, method, headers)
    assert response.status_code >= 400


def test_a_preflight_does_nothing(configured: Service) -> None:
    before = configured.sql("SELECT * FROM task")
    for method, path in (("DELETE", "/api/tasks/1"), ("PATCH", "/api/tasks/1/complete"), ("POST", "/api/tasks")):
        preflight(configured, APP, method, path=path)
    assert configured.sql("SELECT * FROM task") == before


# --- Browsers --------------------------------------------------------------------------------------------------------

ORIGIN = {"Origin": "http://localhost:3000"}


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match", "Idempotency-Key"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_a_preflight_allows_the_conditions(nobody: Client, method: str, header: str) -> None:
    for asked in (header, header.lower(), f"authorization,content-type,{header.lower()}"):
        headers = ORIGIN | {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": asked}
        response = nobody.options("/api/tasks/1", headers=headers)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == ORIGIN["Origin"]
        assert header.lower() in re.split(", *", response.headers["access-control-allow-headers"].lower())


CROSS_ORIGIN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "200 GET": ("GET", "", {}),
    "200 PUT": ("PUT", "", {"json": {"title": "new"}}),
    "200 PATCH": ("PATCH", "/complete", {}),
    "204 DELETE": ("DELETE", "", {"headers": {"If-Match": "*"}}),
    "304 GET": ("GET", "", {"headers": {"If-None-Match": "*"}}),
    "304 HEAD": ("HEAD", "", {"headers": {"If-None-Match": "*"}}),
    "412 PUT": ("PUT", "", {"json": {}, "headers": {"If-Match": '"a"'}}),
    "412 PATCH": ("PATCH", "/complete", {"headers": {"If-Match": '"a"'}}),
    "412 DELETE": ("DELETE", "", {"headers": {"If-Match": '"a"'}}),
}


@pytest.mark.parametrize("name", CROSS_ORIGIN)
def test_a_page_of_an_allowed_origin_may_read_the_answer_and_its_etag(alice: Client, name: str) -> None:
    method, action, options = CROSS_ORIGIN[name]
    task = alice.create()
    headers = options.get("headers", {})
    response = alice.request(method, path_of(task) + action, **options | {"headers": headers | ORIGIN})
    assert response.status_code == int(name[:3])
    assert response.headers["access-control-allow-origin"] == ORIGIN["Origin"]
    assert response.headers["access-control-allow-credentials"] == "true"
    assert "etag" in re.split(", *", response.headers["access-control-expose-headers"].lower())
    assert "origin" in response.headers["vary"].lower()
    other = alice.create()
    headers = headers | {"Origin": "https://evil.example.com"}
    response = alice.request(method, path_of(other) + action, **options | {"headers": headers})
    assert response.status_code == int(name[:3])
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("key", ["a", "a b"])
def test_a_page_of_an_allowed_origin_may_read_the_answer_to_a_creation_with_a_key(alice: Client, key: str) -> None:
    for status, body in ((201, BODY), (201, BODY), (422, {"title": "another"})):
        response = alice.post("/api/tasks", json=body, headers=ORIGIN | {"Idempotency-Key": key})
        assert response.status_code == (status if key == "a" else 400)
        assert response.headers["access-control-allow-origin"] == ORIGIN["Origin"]
        assert {"etag", "location"} <= {*re.split(", *", response.headers["access-control-expose-headers"].lower())}
