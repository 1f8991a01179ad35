"""Every error: its status, its body to the letter, its headers, and which of two errors is told first."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.service_process import ROOT, Client, Service, new_user_id, token

LIMIT = 65_536
NO_TASK = "/api/tasks/4611686018427387904"

NOT_JSON = "The body must be valid JSON, encoded as UTF-8"
NOT_DECLARED_AS_JSON = "The body must be JSON, with Content-Type: application/json"
TOO_LARGE = f"The body must have at most {LIMIT} bytes"


def assert_error(response: httpx.Response, status: int, detail: str, **headers: str) -> None:
    """Assert that a response is this error to the letter, with these headers beside those of every answer."""
    assert (response.status_code, response.json()) == (status, {"detail": detail})
    assert_headers(response, headers)


def assert_invalid(response: httpx.Response, *errors: tuple[str, str]) -> None:
    """Assert that a response is the 422 with these fields and messages, in this order."""
    assert (response.status_code, response.json()) == (
        422,
        {
            "detail": "; ".join(f"{field} {message}" for field, message in errors),
            "errors": [{"field": field, "message": message} for field, message in errors],
        },
    )
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
    assert response.headers["content-type"] == "application/json"
    extra = {name: value for name, value in response.headers.items() if name not in usual}
    assert extra == {name.replace("_", "-").lower(): value for name, value in headers.items()}


@pytest.fixture
def untouched(service: Service, alice: Client, bob: Client) -> Iterator[str]:
    """The path of a task of Alice's. Whatever the test sends, her tasks and Bob's are in the end what they were."""
    task = alice.create(description="Two litres")
    bob.create()
    before = service.rows(alice, bob)
    yield f"/api/tasks/{task['id']}"
    assert service.rows(alice, bob) == before


@pytest.fixture
def delete(alice: Client, untouched: str) -> Callable[..., httpx.Response]:
    """A function that sends a DELETE with a body, which needs none and may have one, to the task of `untouched`."""
    return partial(alice.request, "DELETE", untouched)


@pytest.fixture(params=["POST", "PUT", "PATCH"])
def write(request: pytest.FixtureRequest, alice: Client, untouched: str) -> Callable[..., httpx.Response]:
    """A function that sends one of the three requests that have a body, the last two to the task of `untouched`."""
    path = {"POST": "/api/tasks", "PUT": untouched, "PATCH": f"{untouched}/complete"}[request.param]

    def send(**options: Any) -> httpx.Response:
        return alice.request(request.param, path, **options)

    return send


# --- 400: what is not JSON -------------------------------------------------------------------------------------------

BODY = '{"title": "milk", "completed": true}'

BROKEN: list[Any] = [
    pytest.param(content, id=name)
    for name, content in {
        "white space": b" \n",
        "half": b'{"title": "milk"',
        "two values": b"{} {}",
        "a trailing comma": b'{"title": "milk",}',
        "single quotes": b"{'title': 'milk'}",
        "a bare word": b"milk",
        "a form": b"title=milk",
        "a comment": b'{"title": "milk"} // now',
        "Python": b'{"title": None, "completed": True}',
        "a raw line break in a string": b'{"title": "mi\nlk"}',
        "a bad escape": b'{"title": "\\x41"}',
        "half an escape": b'{"title": "\\ud83"}',
        "no UTF-8": b"\xff\xfe",
        "no UTF-8 in a string": b'{"title": "caf\xe9"}',
        "an overlong NUL": b'{"title": "\xc0\x80"}',
        "a surrogate in UTF-8": b'{"title": "\xed\xa0\x80"}',
        "a byte order mark": BODY.encode("utf-8-sig"),
        "UTF-16": BODY.encode("utf-16"),
        "UTF-16-LE": BODY.encode("utf-16-le"),
        "UTF-16-BE": BODY.encode("utf-16-be"),
        "UTF-32": BODY.encode("utf-32"),
        "NUL": b"\0",
        "NaN": b'{"title": NaN}',
        "nested too deep": b"[" * 60_000,
        "objects nested too deep": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    }.items()
]
# Also in a field that is otherwise ignored.
ABSURD = {
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "a float beyond a double": "1e400",
    "a float far beyond a double": "-1e999999999",
    "an integer of 400 digits": "9" * 400,
    "an integer of 5000 digits": "9" * 5000,
    "a negative integer of 50000 digits": "-" + "9" * 50_000,
    "nested too deep": "[" * 30_000 + "]" * 30_000,
}
BROKEN += [
    pytest.param(f'{{"title": "milk", "x": {value}}}'.encode(), id=f"{n}, ignored") for n, value in ABSURD.items()
]


@pytest.mark.parametrize("content", BROKEN)
def test_what_is_not_json_is_refused(write: Callable[..., httpx.Response], content: bytes) -> None:
    assert_error(write(content=content, headers={"Content-Type": "application/json"}), 400, NOT_JSON)
    assert_error(write(content=content), 400, NOT_JSON)


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/json"}, {"Content-Type": "text/plain"}])
def test_an_empty_body_is_refused_where_one_is_needed(alice: Client, untouched: str, headers: dict[str, str]) -> None:
    assert_error(alice.post("/api/tasks", headers=headers), 400, NOT_JSON)
    assert_error(alice.put(untouched, headers=headers), 400, NOT_JSON)
    assert_error(alice.put(untouched, content=iter([b""]), headers=headers), 400, NOT_JSON)


@pytest.mark.parametrize("value", ["1e300", "-0", "0.1e-400", "9" * 300, "[" * 50 + "]" * 50, '"\\u0000\\ud800"', "{}"])
def test_odd_json_in_an_unknown_field_is_ignored(alice: Client, value: str) -> None:
    response = alice.post("/api/tasks", content=f'{{"x": {value}, "title": "milk"}}')
    assert (response.status_code, response.json()["title"]) == (201, "milk")


def test_the_last_of_two_equal_fields_counts(alice: Client) -> None:
    """As in browsers."""
    response = alice.post("/api/tasks", content='{"title": null, "title": "milk"}')
    assert (response.status_code, response.json()["title"]) == (201, "milk")


# --- 401: no token, or none that is good -----------------------------------------------------------------------------

EXPIRED = token("somebody", exp=int(time.time()) - 3600)
FORGED = token("somebody", secret="another secret that is also of 32 characters or more")


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "bearer",
        "Basic YWxpY2U6c2VjcmV0",
        f"Token {token()}",
        token(),
        f"Bearer{token()}",
    ],
    ids=["none", "empty", "scheme", "blank", "lower", "Basic", "Token", "no scheme", "no space"],
)
def test_who_sends_no_token_is_not_authenticated(service: Service, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    for path in ("/api/tasks", "/api/tasks/1", "/api/nothing"):
        status, answered, body = exchange(service, "GET", path, headers)
        assert (status, json.loads(body)) == (401, {"detail": "Not authenticated"})
        assert (answered["www-authenticate"], answered["content-type"]) == ("Bearer", "application/json")


@pytest.mark.parametrize(
    ("authorization", "detail"),
    [
        pytest.param(f"Bearer {EXPIRED}", "Token has expired", id="expired"),
        pytest.param(f"bearer {EXPIRED}", "Token has expired", id="expired, lower case"),
        pytest.param(f"Bearer {FORGED}", "Invalid token", id="another secret"),
        pytest.param(f"Bearer {token()}x", "Invalid token", id="another signature"),
        pytest.param(f"Bearer {token()} {token()}", "Invalid token", id="two tokens"),
        pytest.param("Bearer nonsense", "Invalid token", id="nonsense"),
        pytest.param("Bearer a.b.c", "Invalid token", id="three dots of nonsense"),
        pytest.param("Bearer \xff\xc3\xa9", "Invalid token", id="no ASCII"),
    ],
)
def test_a_token_that_is_not_good_is_refused(nobody: Client, authorization: str, detail: str) -> None:
    response = nobody.get("/api/tasks", headers={b"Authorization": authorization.encode("latin-1")})
    assert_error(response, 401, detail, WWW_Authenticate='Bearer error="invalid_token"')


def test_two_authorization_headers_are_refused(service: Service, alice: Client, bob: Client, untouched: str) -> None:
    """Even if both are valid: what stands before the service may have looked at the other one."""
    good, his = f"Bearer {token(alice.user_id)}", f"Bearer {token(bob.user_id)}"
    for first, last in ((good, good), (his, good), (good, his), (good, "none"), ("none", good), ("", good), (good, "")):
        headers = [("Authorization", first), ("Authorization", last)]
        for method, path in (("GET", untouched), ("DELETE", untouched), ("GET", "/api/nothing")):
            with service.client() as client:
                response = client.request(method, path, headers=headers)
            assert_error(response, 401, "Invalid token", WWW_Authenticate='Bearer error="invalid_token"')


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR", "Bearer  "])
def test_the_scheme_is_read_in_any_case(service: Service, alice: Client, scheme: str) -> None:
    task = alice.create()
    headers = {"Authorization": f"{scheme} {token(alice.user_id)}"}
    with service.client(headers=headers) as client:
        assert client.tasks() == [task]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("action", ["", "/complete", "/nothing", "/"])
def test_nothing_is_done_or_told_without_a_token(nobody: Client, untouched: str, method: str, action: str) -> None:
    for headers in ({}, {"Authorization": f"Bearer {FORGED}"}):
        response = nobody.request(method, untouched + action, headers=headers)
        assert response.status_code == 401
        assert "allow" not in response.headers
    for body in ({"title": "mine now"}, {"title": ""}):
        assert nobody.request(method, untouched + action, json=body).status_code == 401


# --- 404: no such task, no such path ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task_id",
    ["0", "00", "-1", "-0", "-7", str(2**62), str(2**63 - 1), str(2**63), str(-(2**63)), str(-(2**63) - 1),
     str(2**64 + 1), "9" * 20, "9" * 5000, "-" + "9" * 5000],
    ids=lambda task_id: task_id[:22],
)  # fmt: skip
def test_an_integer_that_names_no_task_is_not_found(alice: Client, untouched: str, task_id: str) -> None:
    path = f"/api/tasks/{task_id}"
    assert_error(alice.get(path), 404, "Task not found")
    assert_error(alice.put(path, json={"title": "new"}), 404, "Task not found")
    assert_error(alice.patch(f"{path}/complete"), 404, "Task not found")
    assert_error(alice.delete(path), 404, "Task not found")


def test_an_id_beyond_the_largest_is_not_taken_for_a_small_one(alice: Client, untouched: str) -> None:
    task_id = int(untouched.rpartition("/")[2])
    for other in (task_id + 2**32, task_id + 2**63, task_id + 2**64, -task_id):
        assert_error(alice.delete(f"/api/tasks/{other}"), 404, "Task not found")


UNKNOWN_PATHS = [
    "/nothing", "/healthz", "/health/live", "/healthy", "/Health", "/index.html", "/favicon.ico", "/task", "/tasks",
    "/api", "/api/", "/api/nothing", "/api/task", "/api/Tasks", "/API/tasks", "/api/tasks/1/2", "/api/tasks/1/nothing",
    "/api/tasks/complete/x", "/api/tasks/1/complete/x", "/api/tasks//", "/api//tasks", "//api/tasks",
    "/api/tasks/1//complete", "/api%2ftasks%2f%2f", "/docs/nothing", "/docs/x/y", "/docs/swagger_bundle.js/x",
    "/docs/..%2fservice.py", "/docs/%2e%2e%2fservice.py", "/docs/..%2f..%2fpyproject.toml", "/service.py", "/.env",
    "/sql/schema.sql", "/.postgres/secret", "/openapi.yaml", "/openapi", "/redoc;x=1", "/%00", "/%ff", "/health%20",
    "/api/tasks%20", "/health%0A", "/openapi.json%0A", "/docs%0A", "/%0A", "/api/tasks%0A", "/api/tasks/1/complete%0A",
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "PATCH"])
@pytest.mark.parametrize("path", UNKNOWN_PATHS)
def test_an_unknown_path_is_not_found(service: Service, alice: Client, method: str, path: str) -> None:
    """With exactly these bytes as the path: an HTTP client would put some of them in order first."""
    status, headers, body = exchange(service, method, path, {"Authorization": alice.headers["Authorization"]})
    assert (status, json.loads(body)) == (404, {"detail": "Not Found"})
    assert headers["content-type"] == "application/json"


def test_an_unknown_path_is_not_found_without_a_token_where_none_is_needed(nobody: Client) -> None:
    assert_error(nobody.get("/nothing"), 404, "Not Found")
    assert_error(nobody.post("/docs/nothing/else"), 404, "Not Found")


# --- 405: no such method ---------------------------------------------------------------------------------------------

ALLOW = {
    "/api/tasks": {"GET", "HEAD", "POST"},
    "/api/tasks/1": {"GET", "HEAD", "PUT", "DELETE"},
    "/api/tasks/x": {"GET", "HEAD", "PUT", "DELETE"},
    "/api/tasks/1/complete": {"PATCH"},
    "/": {"GET", "HEAD"},
    "/health": {"GET", "HEAD"},
    "/health/ready": {"GET", "HEAD"},
    "/docs": {"GET", "HEAD"},
    "/docs/swagger_bundle.js": {"GET", "HEAD"},
    "/redoc": {"GET", "HEAD"},
    "/openapi.json": {"GET", "HEAD"},
}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "PURGE"]


@pytest.mark.parametrize(
    ("method", "path"),
    [(method, path) for path, allowed in ALLOW.items() for method in METHODS if method not in allowed],
)
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_method_that_a_path_does_not_have_is_refused(alice: Client, method: str, path: str, slash: str) -> None:
    response = alice.request(method, path if path == "/" else path + slash)
    allowed = response.headers["allow"]
    assert set(allowed.split(", ")) == ALLOW[path]
    if method == "HEAD":
        assert (response.status_code, response.content) == (405, b"")
    else:
        assert_error(response, 405, "Method Not Allowed", Allow=allowed)


@pytest.mark.parametrize("path", ALLOW)
def test_every_allowed_method_is_there(alice: Client, path: str) -> None:
    for method in sorted(ALLOW[path]):
        assert alice.request(method, path).status_code not in (405, 500)


# --- 413: what is too large ------------------------------------------------------------------------------------------


def padded(length: int) -> bytes:
    """Return a body that is valid for POST, PUT and PATCH, of this many bytes."""
    body = b'{"title": "padded", "completed": true, "x": "%b"}'
    return body % (b"x" * (length - len(body % b"")))


def chunks(content: bytes) -> Iterator[bytes]:
    """Yield a body in parts, which makes HTTP clients send it chunked, without Content-Length."""
    for start in range(0, len(content), 10_000):
        yield content[start : start + 10_000]


@pytest.mark.parametrize("length", [LIMIT + 1, 5_000_000])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "with its length"])
def test_a_body_beyond_the_limit_is_refused(write: Callable[..., httpx.Response], length: int, chunked: bool) -> None:
    content = padded(length)
    assert_error(write(content=chunks(content) if chunked else content), 413, TOO_LARGE)


@pytest.mark.parametrize("length", [LIMIT + 1, 5_000_000])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "with its length"])
def test_a_deletion_with_a_body_beyond_the_limit_is_refused(
    delete: Callable[..., httpx.Response], length: int, chunked: bool
) -> None:
    content = padded(length)
    assert_error(delete(content=chunks(content) if chunked else content), 413, TOO_LARGE)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"null", b"{", b"\xff", b'{"title": 1}', b" " * LIMIT],
    ids=lambda content: ascii(content)[:9],
)
def test_what_the_body_of_a_deletion_says_means_nothing(alice: Client, bob: Client, content: bytes) -> None:
    task, other, his = alice.create(), alice.create(), bob.create()
    assert alice.request("DELETE", f"/api/tasks/{task['id']}", content=content).status_code == 204
    assert (alice.tasks(), bob.tasks()) == ([other], [his])


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "with its length"])
def test_a_task_is_deleted_once_the_whole_body_has_arrived(service: Service, alice: Client, chunked: bool) -> None:
    """What has arrived of the others looks like a deletion, and could be one whose rest is refused."""
    task = alice.create()
    path = f"/api/tasks/{task['id']}"
    framing = "Transfer-Encoding: chunked" if chunked else "Content-Length: 7"
    head = (
        f"DELETE {path} HTTP/1.1\r\nHost: here\r\nAuthorization: {alice.headers['Authorization']}\r\n{framing}\r\n\r\n"
    )
    body = [b"7\r\n", b'{"a', b'":1}', b"\r\n0\r\n", b"\r\n"] if chunked else [b'{"a', b'":1', b"}"]
    parts = [head.encode(), *body]
    for count in range(1, len(parts)):
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            for part in parts[:count]:
                connection.sendall(part)
                # Requests that come later than the part. They find the task, and change it before a deletion could.
                assert alice.get(path).status_code == 200
                assert alice.patch(f"{path}/complete").status_code == 200
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 204 ")
    assert alice.tasks() == []


def test_a_deletion_of_a_broken_body_deletes_nothing(service: Service, alice: Client, untouched: str) -> None:
    headers = {"Authorization": alice.headers["Authorization"], "Transfer-Encoding": "chunked"}
    for rest in (b"2\r\n{}\r\nnonsense\r\n\r\n", b"nonsense\r\n", b"2\r\n{}}"):
        status, answered, body = exchange(service, "DELETE", untouched, headers, rest)
        assert (status, answered["content-type"]) == (400, "application/json")
        assert json.loads(body).keys() == {"detail"}


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "with its length"])
def test_a_body_of_the_limit_is_read(service: Service, alice: Client, bob: Client, chunked: bool) -> None:
    def body() -> bytes | Iterator[bytes]:
        return chunks(padded(LIMIT)) if chunked else padded(LIMIT)

    task, his = alice.create(), bob.create()
    path = f"/api/tasks/{task['id']}"
    assert alice.patch(f"{path}/complete", content=body()).json()["completed"] is True
    assert alice.put(path, content=body()).json()["title"] == "padded"
    assert (response := alice.post("/api/tasks", content=body())).status_code == 201, response
    assert [task["title"] for task in alice.tasks()] == ["padded", "padded"]
    assert bob.tasks() == [his]


@pytest.mark.parametrize("declared", [LIMIT + 1, 10**9, 2**63 - 1])
@pytest.mark.parametrize("sent", [b"", b'{"title": "milk"', b" " * 1000], ids=["nothing", "a little", "a kilobyte"])
def test_a_body_that_is_declared_too_large_is_not_waited_for(
    service: Service, alice: Client, untouched: str, declared: int, sent: bytes
) -> None:
    writes = (("POST", "/api/tasks"), ("PUT", untouched), ("PATCH", f"{untouched}/complete"), ("DELETE", untouched))
    for method, path in writes:
        headers = {"Authorization": alice.headers["Authorization"], "Content-Length": str(declared)}
        status, _, body = exchange(service, method, path, headers, sent)
        assert (status, json.loads(body)) == (413, {"detail": TOO_LARGE})


def test_a_chunked_body_that_is_too_large_is_not_waited_for(service: Service, alice: Client, untouched: str) -> None:
    chunk = b"%x\r\n%b\r\n" % (LIMIT + 1, b" " * (LIMIT + 1))  # and no last chunk
    writes = (("POST", "/api/tasks"), ("PUT", untouched), ("PATCH", f"{untouched}/complete"), ("DELETE", untouched))
    for method, path in writes:
        headers = {"Authorization": alice.headers["Authorization"], "Transfer-Encoding": "chunked"}
        status, _, body = exchange(service, method, path, headers, chunk)
        assert (status, json.loads(body)) == (413, {"detail": TOO_LARGE})


@pytest.mark.parametrize("length", [LIMIT + 1, 200_000])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "with its length"])
def test_a_connection_goes_on_after_a_body_that_was_too_large_or_the_answer_says_that_it_ends(
    service: Service, alice: Client, length: int, chunked: bool
) -> None:
    """Or a router would send its next request, of whomever, on a connection that is about to close."""
    headers = {"Authorization": alice.headers["Authorization"]}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)) as connection:
        connection.auto_open = 0  # or one that was closed would be opened again in silence
        connection.connect()
        for _ in range(3):
            content = padded(length)
            connection.request("POST", "/api/tasks", chunks(content) if chunked else content, headers)
            response = connection.getresponse()
            assert (response.status, json.loads(response.read())) == (413, {"detail": TOO_LARGE})
            if response.headers.get("connection", "") == "close":
                break
            connection.request("GET", "/api/tasks", headers=headers)
            response = connection.getresponse()
            assert (response.status, json.loads(response.read())) == (200, {"items": []})
    assert alice.tasks() == []


# --- 415: what is not declared as JSON -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "media_type",
    ["application/json", "application/json;charset=utf-8", "application/json; charset=UTF-8", "Application/JSON",
     "application/json ; charset=utf-8", 'application/json; profile="a;b"', "application/merge-patch+json",
     "application/problem+json", "application/vnd.api+json; charset=utf-8", "application/vnd.a.b-c+json", None],
)  # fmt: skip
def test_what_is_declared_as_json_is_read(alice: Client, bob: Client, media_type: str | None) -> None:
    task, his = alice.create(), bob.create()
    headers = {} if media_type is None else {"Content-Type": media_type}
    path = f"/api/tasks/{task['id']}"
    assert alice.post("/api/tasks", content=BODY, headers=headers).status_code == 201
    assert alice.put(path, content='{"title": "milk"}', headers=headers).json()["title"] == "milk"
    assert alice.patch(f"{path}/complete", content=BODY, headers=headers).json()["completed"] is True
    assert bob.tasks() == [his]


@pytest.mark.parametrize(
    "media_type",
    ["text/plain", "text/plain;charset=UTF-8", "text/json", "text/html", "application/x-www-form-urlencoded",
     "multipart/form-data; boundary=x", "application/xml", "application/octet-stream", "application/jsonp", "json",
     "application/json-patch", "application/x-json", "application/ndjson", "application/+json", "image/svg+json",
     "application", "*/*", "text/plain; application/json", "application/json, text/plain", "nonsense"],
)  # fmt: skip
def test_what_is_declared_as_something_else_is_refused(write: Callable[..., httpx.Response], media_type: str) -> None:
    assert_error(write(content=BODY, headers={"Content-Type": media_type}), 415, NOT_DECLARED_AS_JSON)


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"])
def test_a_deletion_of_what_is_declared_as_something_else_is_refused(
    delete: Callable[..., httpx.Response], media_type: str
) -> None:
    assert_error(delete(content=BODY, headers={"Content-Type": media_type}), 415, NOT_DECLARED_AS_JSON)
    assert_error(delete(content=b"x", headers={"Content-Type": media_type}), 415, NOT_DECLARED_AS_JSON)


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "nonsense"])
def test_a_media_type_without_a_body_means_nothing(alice: Client, media_type: str) -> None:
    task, other = alice.create(), alice.create()
    headers = {"Content-Type": media_type}
    path = f"/api/tasks/{task['id']}"
    assert alice.patch(f"{path}/complete", headers=headers).json()["completed"] is True
    assert alice.patch(f"{path}/complete", content=b"", headers=headers).json()["completed"] is False
    assert alice.patch(f"{path}/complete", content=iter([b""]), headers=headers).json()["completed"] is True
    assert alice.get("/api/tasks", headers=headers).status_code == 200
    assert alice.get(path, headers=headers).status_code == 200
    assert alice.delete(path, headers=headers).status_code == 204
    assert alice.tasks() == [other]


# --- 422: JSON that says something wrong -----------------------------------------------------------------------------

BLANK = "must not be blank"
SURROGATE = "must not contain a lone surrogate"

BAD_TITLES: list[Any] = [
    pytest.param(value, message, id=name)
    for name, value, message in [
        ("null", None, "must be a string"),
        ("a number", 7, "must be a string"),
        ("a float", 1.5, "must be a string"),
        ("true", True, "must be a string"),
        ("a list", ["milk"], "must be a string"),
        ("an object", {"title": "milk"}, "must be a string"),
        ("too long", "x" * 201, "must have at most 200 characters"),
        ("too many astral characters", "\U0001d4b3" * 201, "must have at most 200 characters"),
        ("too many blanks around", "x" + " " * 200, "must have at most 200 characters"),
        ("far too long", "x" * 60_000, "must have at most 200 characters"),
        ("NUL", "mi\0lk", "must not contain NUL"),
        ("NUL at the end", "milk\0", "must not contain NUL"),
        ("NUL before a line break", "milk\0\n", "must not contain NUL"),
        ("NUL alone", "\0", "must not contain NUL"),
        ("NUL and a blank", " \0", "must not contain NUL"),
        ("a high surrogate", "milk \ud83d", SURROGATE),
        ("a low surrogate", "\ude00 milk", SURROGATE),
        ("surrogates in the wrong order", "\ude00\ud83d", SURROGATE),
    ]
]
# All that str.isspace calls white space.
BAD_TITLES += [
    pytest.param(blank, BLANK, id=f"blank {blank!a}") for blank in map(chr, range(0x10000)) if blank.isspace()
]
BAD_TITLES += [pytest.param(blank, BLANK, id=f"blank {blank!a}") for blank in ("", "   ", "\t\r\n\u3000\u2028", " \n")]
BAD_DESCRIPTIONS = [
    pytest.param(value, message, id=name)
    for name, value, message in [
        ("a number", 0, "must be a string or null"),
        ("false", False, "must be a string or null"),
        ("a list", [], "must be a string or null"),
        ("an object", {}, "must be a string or null"),
        ("too long", "x" * 2001, "must have at most 2000 characters"),
        ("too many astral characters", "\U0001d4b3" * 2001, "must have at most 2000 characters"),
        ("NUL", "Two\0litres", "must not contain NUL"),
        ("NUL at the end", "Two litres\0", "must not contain NUL"),
        ("NUL before a line break", "Two litres\0\n", "must not contain NUL"),
        ("a high surrogate", "\ud800", SURROGATE),
        ("a low surrogate", "\udfff", SURROGATE),
    ]
]
BAD_COMPLETED: list[Any] = [None, "true", "", 0, 1, 1.0, [], [True], {}]


@pytest.mark.parametrize(("title", "message"), BAD_TITLES)
def test_a_wrong_title_is_refused(alice: Client, untouched: str, title: object, message: str) -> None:
    body = json.dumps({"title": title})  # httpx would not encode a surrogate
    assert_invalid(alice.post("/api/tasks", content=body), ("title", message))
    assert_invalid(alice.put(untouched, content=body), ("title", message))


@pytest.mark.parametrize(("description", "message"), BAD_DESCRIPTIONS)
def test_a_wrong_description_is_refused(alice: Client, untouched: str, description: object, message: str) -> None:
    body = json.dumps({"title": "milk", "description": description})
    assert_invalid(alice.post("/api/tasks", content=body), ("description", message))
    assert_invalid(alice.put(untouched, content=body), ("description", message))


@pytest.mark.parametrize("completed", BAD_COMPLETED, ids=ascii)
def test_completed_must_be_a_boolean(write: Callable[..., httpx.Response], completed: object) -> None:
    assert_invalid(write(json={"title": "milk", "completed": completed}), ("completed", "must be true or false"))


def test_a_new_task_needs_a_title(alice: Client, untouched: str) -> None:
    assert_invalid(alice.post("/api/tasks", json={}), ("title", "is required"))
    assert_invalid(alice.post("/api/tasks", json={"Title": "milk", "description": "x"}), ("title", "is required"))


@pytest.mark.parametrize("body", ["[]", '[{"title": "milk"}]', '"milk"', '"null"', "7", "1.5", "true", "false"])
def test_a_body_must_be_an_object(write: Callable[..., httpx.Response], body: str) -> None:
    assert_invalid(write(content=body), ("body", "must be an object"))


def test_null_is_a_body_only_where_none_is_needed(alice: Client, untouched: str) -> None:
    """PATCH takes it for no body: see test_tasks.py."""
    assert_invalid(alice.post("/api/tasks", content="null"), ("body", "must be an object"))
    assert_invalid(alice.put(untouched, content="null"), ("body", "must be an object"))
    error = ("task_id", "must be a decimal integer")
    assert_invalid(alice.patch("/api/tasks/x/complete", content="null"), error)


@pytest.mark.parametrize(
    "status",
    ["=done", "=ALL", "=Pending", "=all,pending", "=all%20", "=%20all", "=1", "=true", "=null", "=all%00",
     "=%ff", "=completed%0A", "=%F0%9F%98%80"],
)  # fmt: skip
def test_an_unknown_status_is_refused(alice: Client, untouched: str, status: str) -> None:
    message = "must be one of all, pending, completed"
    assert_invalid(alice.get(f"/api/tasks?status{status}"), ("status", message))
    assert alice.get(f"{untouched}?status{status}").status_code == 200  # one task has no such parameter


NO_INTEGERS = [
    "abc", "1.0", "1_0", "+1", "%2B1", "%201", "1%20", "\uff11\uff12", "\u0663", "\u00b2", "1e3", "0x1", "1,2", "--1",
    "-", "%00", "1%00", "1%0A", "%0A", "null", "NaN", "1;2", "'", "1'%20OR%20'1'='1", "%ff", "x" * 5000, "complete",
]  # fmt: skip


@pytest.mark.parametrize("task_id", NO_INTEGERS, ids=lambda task_id: ascii(task_id[:20]))
def test_an_id_must_be_a_decimal_integer(alice: Client, untouched: str, task_id: str) -> None:
    error = ("task_id", "must be a decimal integer")
    path = f"/api/tasks/{task_id}"
    assert_invalid(alice.get(path), error)
    assert_invalid(alice.put(path, json={"title": "new"}), error)
    assert_invalid(alice.patch(f"{path}/complete"), error)
    assert_invalid(alice.patch(f"{path}/complete", json={"completed": True}), error)
    assert_invalid(alice.delete(path), error)


def test_all_that_is_wrong_is_told_at_once(alice: Client, untouched: str) -> None:
    wrong = {"title": " ", "description": 7, "completed": "yes", "colour": None}
    errors = [
        ("title", BLANK),
        ("description", "must be a string or null"),
        ("completed", "must be true or false"),
    ]
    in_path = ("task_id", "must be a decimal integer")
    assert_invalid(alice.post("/api/tasks", json=wrong), *errors)
    assert_invalid(alice.put(untouched, json=wrong), *errors)
    assert_invalid(alice.put("/api/tasks/x", json=wrong), in_path, *errors)
    assert_invalid(alice.patch("/api/tasks/x/complete", json=wrong), in_path, errors[2])
    assert_invalid(alice.put("/api/tasks/x", json=[]), in_path, ("body", "must be an object"))
    del wrong["title"]
    assert_invalid(alice.post("/api/tasks", json=wrong), ("title", "is required"), *errors[1:])
    assert_invalid(alice.put(untouched, json=wrong), *errors[1:])


def test_one_wrong_field_keeps_the_others_from_being_changed(alice: Client, untouched: str) -> None:
    """The fixture compares the rows."""
    assert_invalid(
        alice.put(untouched, json={"title": "new", "completed": None}), ("completed", "must be true or false")
    )
    assert_invalid(alice.put(untouched, json={"title": None, "description": None}), ("title", "must be a string"))


# --- 500: a bug ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty(new_database: Callable[[], str]) -> Iterator[Service]:
    """A service on a database in which every write of a task with the title `bug` raises what no one expects."""
    service = Service(new_database())
    service.wait_until_ready()
    service.sql("""
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'the secret of the database' USING ERRCODE = 'internal_error';
        END $$;
        CREATE TRIGGER fail BEFORE INSERT OR UPDATE ON task
            FOR EACH ROW WHEN (NEW.title = 'bug') EXECUTE FUNCTION fail();
        """)
    yield service
    service.remove()


def test_a_bug_is_logged_with_its_traceback_and_answered_without(faulty: Service) -> None:
    with faulty.client(new_user_id()) as client:
        response = client.post("/api/tasks", json={"title": "bug"}, headers={"X-Request-ID": "bug-1"})
        assert_error(response, 500, "Internal Server Error")
        assert response.headers["x-request-id"] == "bug-1"
        assert "id=bug-1" in faulty.log_line("bug-1")
        client.get("/api/tasks", headers={"X-Request-ID": "after"})
        faulty.log_line("after")  # what comes before it is there by now
    after_bug = faulty.log.partition("id=bug-1")[2]
    assert after_bug.partition("\n")[2].startswith("Traceback (most recent call last):\n")
    assert "the secret of the database" in after_bug


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "a"}], ids=["without a key", "with a key"])
def test_an_id_that_is_taken_already_is_a_bug(
    new_database: Callable[[], str], start_service: Callable[..., Service], headers: dict[str, str]
) -> None:
    """As after a restore that has left the sequence of the ids behind its table: nothing is the client's fault."""
    service = start_service(new_database())
    service.wait_until_ready()
    with service.client("alice") as alice:
        tasks = [alice.create(str(number)) for number in range(50)][::-1]
        before = service.rows(alice)
        service.sql("SELECT setval(pg_get_serial_sequence('task', 'id'), %s)", tasks[-1]["id"])
        for number in range(7):
            given = {"X-Request-ID": f"taken-{number}"}
            response = alice.post("/api/tasks", json={"title": "new"}, headers=headers | given)
            assert_error(response, 500, "Internal Server Error")
            assert " status=500 " in service.log_line(f"taken-{number}")
        assert alice.get("/health", headers={"X-Request-ID": "after"}).status_code == 200
        service.log_line("after")  # what comes before it is there by now
        assert service.log.count("Traceback (most recent call last):\n") == 7
        assert service.log.count("UniqueViolationError") >= 7
        assert service.rows(alice) == before
        service.sql("SELECT setval(pg_get_serial_sequence('task', 'id'), max(id)) FROM task")
        response = alice.post("/api/tasks", json={"title": "new"}, headers=headers)
        assert (response.status_code, alice.tasks()) == (201, [response.json(), *tasks])


def test_what_a_rule_of_the_database_refuses_is_no_bug(
    new_database: Callable[[], str], start_service: Callable[..., Service]
) -> None:
    """One that whoever runs the service has added: a constraint or a trigger."""
    service = start_service(new_database())
    service.wait_until_ready()
    service.sql("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'the secret of the database';
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON task
            FOR EACH ROW WHEN (NEW.title = 'trigger') EXECUTE FUNCTION refuse();
        ALTER TABLE task ADD CONSTRAINT task_no_x CHECK (title <> 'constraint');
        """)
    with service.client("alice") as alice:
        task = alice.create()
        for title in ("trigger", "constraint"):
            error = ("body", "is refused by the database")
            assert_invalid(alice.post("/api/tasks", json={"title": title}), error)
            assert_invalid(alice.put(f"/api/tasks/{task['id']}", json={"title": title}), error)
        assert alice.tasks() == [task]
    assert "Traceback" not in service.log


def test_an_exception_in_the_middle_of_an_answer_is_logged_with_the_status_that_was_sent(
    tmp_path: Path, new_database: Callable[[], str]
) -> None:
    program = (ROOT / "service.py").read_text()
    [routes] = re.findall("^ROUTES = .*\n", program, re.MULTILINE)
    breaks_off = """
class BreaksOff:
    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 201, "headers": [(b"content-length", b"9")]})
        raise OSError("this was too late")
ROUTES += [Route("/breaks-off", BreaksOff())]
"""
    (tmp_path / "service.py").write_text(program.replace(routes, routes + breaks_off))
    shutil.copytree(ROOT / "sql", tmp_path / "sql", ignore=shutil.ignore_patterns("__pycache__"))
    service = Service(new_database(), folder=tmp_path)
    try:
        service.wait_until_ready()
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{service.url}/breaks-off", headers={"X-Request-ID": "late"})
        assert "status=201" in service.log_line("late")
        httpx.get(f"{service.url}/health", headers={"X-Request-ID": "after"})
        service.log_line("after")
        assert service.log.count("Traceback") == service.log.count("OSError: this was too late") == 1
    finally:
        service.remove()


def test_a_bug_changes_nothing_and_harms_no_other_request(faulty: Service) -> None:
    with faulty.client(new_user_id()) as client, faulty.client(new_user_id()) as other:
        task, before = client.create(), other.create()
        path = f"/api/tasks/{task['id']}"
        for _ in range(20):  # more than there are connections
            assert_error(client.put(path, json={"title": "bug", "completed": True}), 500, "Internal Server Error")
        assert client.tasks() == [task]
        assert client.put(path, json={"title": "no bug"}).status_code == 200
        assert other.tasks() == [before]


def test_a_bug_is_answered_on_reads_too(faulty: Service) -> None:
    faulty.sql("ALTER TABLE task RENAME COLUMN description TO details")
    try:
        with faulty.client(new_user_id()) as client:
            assert_error(client.get("/api/tasks"), 500, "Internal Server Error")
            head = client.head("/api/tasks")
            assert (head.status_code, head.content) == (500, b"")
    finally:
        faulty.sql("ALTER TABLE task RENAME COLUMN details TO description")


# --- Which of several errors is told ---------------------------------------------------------------------------------

HUGE, TEXT, HALF, WRONG, FINE = padded(LIMIT + 1), {"Content-Type": "text/plain"}, b"{", b'{"title": 1}', b"{}"


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status"),
    [
        # what precedes 404 and 405 for what does not exist: nothing but 401
        ("POST", "/api/nothing", HUGE, TEXT, 404),
        ("POST", "/api/tasks/x", HUGE, TEXT, 405),
        ("DELETE", "/api/tasks/x/complete", HALF, TEXT, 405),
        # then 413, with all that could be wrong beside it, and one thing less in each line
        ("POST", "/api/tasks", HUGE, TEXT, 413),
        ("PUT", "/api/tasks/x", HUGE, TEXT, 413),
        ("DELETE", "/api/tasks/x", HUGE, TEXT, 413),
        ("PATCH", "/api/tasks/x/complete", HUGE, TEXT, 413),
        ("POST", "/api/tasks", HALF, TEXT, 415),
        ("PUT", "/api/tasks/x", HALF, TEXT, 415),
        ("DELETE", "/api/tasks/x", HALF, TEXT, 415),
        ("DELETE", NO_TASK, FINE, TEXT, 415),
        ("PATCH", "/api/tasks/x/complete", HALF, TEXT, 415),
        ("PUT", NO_TASK, WRONG, TEXT, 415),
        ("POST", "/api/tasks", HALF, {}, 400),
        ("PUT", "/api/tasks/x", HALF, {}, 400),
        ("PUT", "/api/tasks/x", b"", {}, 400),
        ("PATCH", "/api/tasks/x/complete", HALF, {}, 400),
        ("PUT", NO_TASK, HALF, {}, 400),
        ("PUT", "/api/tasks/x", FINE, {}, 422),
        ("PATCH", "/api/tasks/x/complete", FINE, {}, 422),
        ("PATCH", "/api/tasks/x/complete", b"", {}, 422),
        ("PATCH", "/api/tasks/x/complete", b"null", {}, 422),
        ("DELETE", "/api/tasks/x", b"", TEXT, 422),
        ("PUT", NO_TASK, WRONG, {}, 422),
        ("PATCH", f"{NO_TASK}/complete", b'{"completed": 1}', {}, 422),
        # and last what only the database knows
        ("PUT", NO_TASK, FINE, {}, 404),
        ("PATCH", f"{NO_TASK}/complete", FINE, {}, 404),
        ("PATCH", f"{NO_TASK}/complete", b"", TEXT, 404),
        ("PATCH", f"{NO_TASK}/complete", b"null", {}, 404),
        ("DELETE", NO_TASK, FINE, {}, 404),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_errors_are_told_in_a_fixed_order(
    alice: Client, nobody: Client, method: str, path: str, content: bytes, headers: dict[str, str], status: int
) -> None:
    assert alice.request(method, path, content=content, headers=headers).status_code == status
    without = nobody.request(method, path, content=content, headers=headers)
    assert_error(without, 401, "Not authenticated", WWW_Authenticate="Bearer")


def test_a_wrong_request_for_the_task_of_another_is_wrong_and_no_more(bob: Client, untouched: str) -> None:
    """It tells nothing of whether the task is there."""
    for path in (untouched, NO_TASK):
        assert_error(bob.put(path, content=HALF), 400, NOT_JSON)
        assert_error(bob.put(path, content=HUGE), 413, TOO_LARGE)
        assert_error(bob.put(path, content=FINE, headers=TEXT), 415, NOT_DECLARED_AS_JSON)
        assert_invalid(bob.put(path, json={"title": ""}), ("title", BLANK))
        assert_invalid(bob.patch(f"{path}/complete", json={"completed": 1}), ("completed", "must be true or false"))


def exchange(
    service: Service, method: str, path: str, headers: dict[str, str], body: bytes = b""
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send these very bytes and return the status, headers and body of the answer. It adds no Content-Length."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
    try:
        connection.putrequest(method, path)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        connection.send(body)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()
