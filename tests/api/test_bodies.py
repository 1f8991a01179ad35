"""Bodies that are refused: no JSON, too large, declared as something else, or with something wrong in it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest

from tests.support.errors import (
    BLANK,
    LIMIT,
    NOT_DECLARED_AS_JSON,
    NOT_JSON,
    TOO_LARGE,
    assert_error,
    assert_invalid,
    padded,
)
from tests.support.service_process import Client, Service
from tests.support.wire import exchange


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


# --- 413: what is too large ------------------------------------------------------------------------------------------


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
