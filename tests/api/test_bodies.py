"""Bodies: no JSON, too large, declared as something else, with something wrong in it, and just valid."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Callable, Iterator
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

Answers = Callable[..., list[httpx.Response]]


@pytest.fixture
def writes(untouched: str) -> dict[str, str]:
    """The requests that may have a body, by their methods: three that take one, and a deletion, which needs none."""
    return {"POST": "/api/tasks", "PUT": untouched, "PATCH": f"{untouched}/complete", "DELETE": untouched}


@pytest.fixture
def write(alice: Client, writes: dict[str, str]) -> Answers:
    """A function that sends the three that take a body."""

    def send(**options: Any) -> list[httpx.Response]:
        return [alice.request(method, path, **options) for method, path in writes.items() if method != "DELETE"]

    return send


# --- 400: what is not JSON -------------------------------------------------------------------------------------------

BODY = '{"title": "milk", "completed": true}'

NOT_JSON_BODIES = {
    "white space": b" \n",
    "no end": b'{"title": "milk"',
    "two values": b"{} {}",
    "a NUL after the end": BODY.encode() + b"\0",
    "a trailing comma": b'{"title": "milk",}',
    "single quotes": b"{'title': 'milk'}",
    "no quotes": b"{title: null}",
    "a form": b"title=milk",
    "a comment": b'{"title": "milk"} // now',
    "Python": b'{"title": "milk", "completed": True}',
    "a raw line break in a string": b'{"title": "mi\nlk"}',
    "a bad escape": b'{"title": "\\x41"}',
    "half an escape": b'{"title": "\\ud83"}',
    "no UTF-8": b'{"title": "caf\xe9"}',
    "no UTF-8 in an unknown field": b'{"title": "milk", "completed": true, "x": "\xfe"}',
    "half a character": b'{"title": "\xf0\x9f\x98"}',
    "an overlong NUL": b'{"title": "\xc0\x80"}',
    "a surrogate in UTF-8": b'{"title": "\xed\xa0\x80"}',
    "a byte order mark": BODY.encode("utf-8-sig"),
    "UTF-16": BODY.encode("utf-16"),
    "UTF-16 without a mark": BODY.encode("utf-16-le"),
    "UTF-32 without a mark": BODY.encode("utf-32-be"),
    "nested too deep": b"[" * 60_000,
}
# Also in a field that is otherwise ignored.
NOT_JSON_VALUES = {
    "NaN": "NaN",
    "-Infinity": "-Infinity",
    "a float beyond a double": "1e400",
    "a float of 60,000 digits": "9" * 60_000 + ".0",
    "an integer of 400 digits": "9" * 400,
    "an integer of 60,000 digits": "-" + "9" * 60_000,
    "a number in a list": "[1, {}, -1e999999999]",
    "a leading zero": "01",
    "no digit after the point": "1.",
    "a digit of another script": "\uff11",
    "nesting too deep": "[" * 30_000 + "]" * 30_000,
}
NOT_JSON_BODIES |= {
    f"{name} in an unknown field": f'{{"title": "milk", "completed": true, "x": {value}}}'.encode()
    for name, value in NOT_JSON_VALUES.items()
}


@pytest.mark.parametrize("content", NOT_JSON_BODIES.values(), ids=NOT_JSON_BODIES)
def test_what_is_not_json_is_refused(write: Answers, content: bytes) -> None:
    for response in write(content=content):
        assert_error(response, 400, NOT_JSON)


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}], ids=str)
def test_an_empty_body_is_refused_where_one_is_needed(alice: Client, untouched: str, headers: dict[str, str]) -> None:
    assert_error(alice.post("/api/tasks", headers=headers), 400, NOT_JSON)
    assert_error(alice.put(untouched, headers=headers), 400, NOT_JSON)
    assert_error(alice.put(untouched, content=iter([b""]), headers=headers), 400, NOT_JSON, connection="close")


def test_white_space_around_the_body_is_json(alice: Client) -> None:
    response = alice.post("/api/tasks", content=b"\r\n\t " + b" " * 60_000 + b'{"title": "milk"}' + b" \n")
    assert (response.status_code, response.json()["title"]) == (201, "milk")


def test_the_last_of_two_equal_fields_is_both_checked_and_kept(alice: Client) -> None:
    """As in browsers."""
    response = alice.post("/api/tasks", content='{"title": null, "title": "milk", "completed": 7, "completed": true}')
    task = response.json()
    assert (response.status_code, task["title"], task["completed"]) == (201, "milk", True)
    assert_invalid(alice.post("/api/tasks", content='{"title": "milk", "title": " "}'), ("title", BLANK))
    assert alice.tasks() == [task]


# --- 413: what is too large ------------------------------------------------------------------------------------------


def chunks(content: bytes) -> Iterator[bytes]:
    """Yield a body in parts, which makes HTTP clients send it chunked, without Content-Length."""
    for start in range(0, len(content), 10_000):
        yield content[start : start + 10_000]


framings = pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "with its length"])


@pytest.mark.parametrize("length", [LIMIT + 1, 5_000_000])
@framings
def test_a_body_beyond_the_limit_is_refused(alice: Client, writes: dict[str, str], length: int, chunked: bool) -> None:
    content = padded(length)
    for method, path in writes.items():
        response = alice.request(method, path, content=chunks(content) if chunked else content)
        assert_error(response, 413, TOO_LARGE, **({"connection": "close"} if chunked else {}))


@framings
def test_a_body_of_the_limit_is_read(alice: Client, bob: Client, chunked: bool) -> None:
    def body() -> bytes | Iterator[bytes]:
        return chunks(padded(LIMIT)) if chunked else padded(LIMIT)

    task, his = alice.create(), bob.create()
    path = f"/api/tasks/{task['id']}"
    assert alice.patch(f"{path}/complete", content=body()).json()["completed"] is True
    assert alice.put(path, content=body()).json()["title"] == "padded"
    assert alice.post("/api/tasks", content=body()).status_code == 201
    assert [task["title"] for task in alice.tasks()] == ["padded", "padded"]
    assert alice.request("DELETE", path, content=body()).status_code == 204
    assert bob.tasks() == [his]


@pytest.mark.parametrize(("declared", "sent"), [(LIMIT + 1, b""), (10**15, b" "), (2**64 - 1, b'{"title": "milk"}')])
def test_a_body_that_is_declared_too_large_is_not_waited_for(
    service: Service, alice: Client, writes: dict[str, str], declared: int, sent: bytes
) -> None:
    for method, path in writes.items():
        headers = {"Authorization": alice.headers["Authorization"], "Content-Length": str(declared)}
        answer = exchange(service, method, path, headers, sent)
        assert (answer.status, answer.json()) == (413, {"detail": TOO_LARGE}), method


@pytest.mark.parametrize("media_type", ["application/json", "text/plain"])
def test_a_chunked_body_that_is_too_large_is_not_waited_for(
    service: Service, alice: Client, writes: dict[str, str], media_type: str
) -> None:
    chunk = b"%x\r\n%b\r\n" % (LIMIT + 1, b" " * (LIMIT + 1))  # and no last chunk
    for method, path in writes.items():
        headers = {"Authorization": alice.headers["Authorization"], "Transfer-Encoding": "chunked"}
        answer = exchange(service, method, path, headers | {"Content-Type": media_type}, chunk)
        assert (answer.status, answer.json()) == (413, {"detail": TOO_LARGE}), method


@framings
def test_a_connection_goes_on_after_a_body_that_was_too_large_or_the_answer_says_that_it_ends(
    service: Service, alice: Client, chunked: bool
) -> None:
    """Or a router would send its next request, of whomever, on a connection that is about to close."""
    headers = {"Authorization": alice.headers["Authorization"]}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)) as connection:
        connection.auto_open = 0  # or one that was closed would be opened again in silence
        connection.connect()
        for length in (LIMIT + 1, 200_000, LIMIT + 1):
            content = padded(length)
            connection.request("POST", "/api/tasks", chunks(content) if chunked else content, headers)
            response = connection.getresponse()
            assert (response.status, json.loads(response.read())) == (413, {"detail": TOO_LARGE}), length
            if response.headers.get("connection", "") == "close":
                break
            connection.request("GET", "/api/tasks", headers=headers)
            response = connection.getresponse()
            assert (response.status, json.loads(response.read())) == (200, {"items": []}), length
    assert alice.tasks() == []


# --- The body of a deletion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"{}", b"null", b'{"title": 1}', b"7"], ids=ascii)
def test_what_the_body_of_a_deletion_says_means_nothing(alice: Client, bob: Client, content: bytes) -> None:
    task, other, his = alice.create(), alice.create(), bob.create()
    assert alice.request("DELETE", f"/api/tasks/{task['id']}", content=content).status_code == 204
    assert (alice.tasks(), bob.tasks()) == ([other], [his])


@pytest.mark.parametrize("content", [b"{", b"\xff", b"NaN"], ids=ascii)
def test_a_deletion_with_a_body_that_is_no_json_deletes_nothing(alice: Client, content: bytes) -> None:
    task = alice.create()
    response = alice.request("DELETE", f"/api/tasks/{task['id']}", content=content)
    assert_error(response, 400, NOT_JSON)
    assert alice.tasks() == [task]


@framings
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
                assert alice.get(path).status_code == 200, part
                assert alice.patch(f"{path}/complete").status_code == 200, part
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 204 ")
    assert alice.tasks() == []


# --- 415: what is not declared as JSON -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "media_type",
    ["application/json", "Application/JSON ; charset=UTF-8", 'application/json;profile="a;b"',
     "application/merge-patch+json", "application/vnd.a.b-c+json; charset=utf-8", None],
)  # fmt: skip
def test_what_is_declared_as_json_is_read(alice: Client, media_type: str | None) -> None:
    headers = {} if media_type is None else {"Content-Type": media_type}
    path = f"/api/tasks/{alice.create()['id']}"
    assert alice.post("/api/tasks", content=BODY, headers=headers).status_code == 201
    assert alice.put(path, content='{"title": "milk"}', headers=headers).json()["title"] == "milk"
    assert alice.patch(f"{path}/complete", content=BODY, headers=headers).json()["completed"] is True
    assert alice.request("DELETE", path, content=BODY, headers=headers).status_code == 204


@pytest.mark.parametrize(
    "media_type",
    ["text/plain;charset=UTF-8", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
     "application/jsonp", "application/ndjson", "json", "application/+json", "image/svg+json",
     "text/plain; application/json", "application/json, text/plain"],
)  # fmt: skip
def test_what_is_declared_as_something_else_is_refused(alice: Client, writes: dict[str, str], media_type: str) -> None:
    for method, path in writes.items():
        response = alice.request(method, path, content=BODY, headers={"Content-Type": media_type})
        assert_error(response, 415, NOT_DECLARED_AS_JSON)


def test_a_media_type_without_a_body_means_nothing(alice: Client) -> None:
    task, other = alice.create(), alice.create()
    headers = {"Content-Type": "text/plain"}
    path = f"/api/tasks/{task['id']}"
    assert alice.patch(f"{path}/complete", headers=headers).json()["completed"] is True
    assert alice.patch(f"{path}/complete", content=b"", headers=headers).json()["completed"] is False
    assert alice.patch(f"{path}/complete", content=iter([b""]), headers=headers).json()["completed"] is True
    assert alice.get("/api/tasks", headers=headers).status_code == 200
    assert alice.get(path, headers=headers).status_code == 200
    assert alice.delete(path, headers=headers).status_code == 204
    assert alice.tasks() == [other]


# --- 422: JSON that says something wrong -----------------------------------------------------------------------------

CHARACTERS = "must not contain NUL or a lone surrogate"
ALL_BLANKS = "".join(character for character in map(chr, range(0x10000)) if character.isspace())

BAD_TITLES: list[Any] = [
    pytest.param(value, message, id=name)
    for name, value, message in [
        ("null", None, "must be a string"),
        ("a number", 7, "must be a string"),
        ("a list", ["milk"], "must be a string"),
        ("empty", "", BLANK),
        ("spaces", "   ", BLANK),
        ("all that str.isspace calls white space", ALL_BLANKS, BLANK),
        ("too long", "x" * 201, "must have at most 200 characters"),
        ("too many astral characters", "\U0001d4b3" * 201, "must have at most 200 characters"),
        ("too many blanks around", "x" + " " * 200, "must have at most 200 characters"),
        ("NUL", "mi\0lk", CHARACTERS),
        ("NUL before a line break", "milk\0\n", CHARACTERS),
        ("NUL and a blank", " \0", CHARACTERS),
        ("a high surrogate", "milk \ud83d", CHARACTERS),
        ("surrogates in the wrong order", "\ude00\ud83d", CHARACTERS),
    ]
]
BAD_DESCRIPTIONS = [
    pytest.param(value, message, id=name)
    for name, value, message in [
        ("a number", 0, "must be a string or null"),
        ("a list", [], "must be a string or null"),
        ("too long", "x" * 2001, "must have at most 2000 characters"),
        ("too many astral characters", "\U0001d4b3" * 2001, "must have at most 2000 characters"),
        ("NUL", "Two\0litres", CHARACTERS),
        ("NUL before a line break", "Two litres\0\n", CHARACTERS),
        ("a low surrogate", "\udfff", CHARACTERS),
    ]
]
BAD_COMPLETED: list[Any] = [None, "true", 0, 1, []]


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
def test_completed_must_be_a_boolean(write: Answers, completed: object) -> None:
    for response in write(json={"title": "milk", "completed": completed}):
        assert_invalid(response, ("completed", "must be true or false"))


def test_a_new_task_needs_a_title(alice: Client, untouched: str) -> None:
    assert_invalid(alice.post("/api/tasks", json={}), ("title", "is required"))
    assert_invalid(alice.post("/api/tasks", json={"Title": "milk", "description": "x"}), ("title", "is required"))


@pytest.mark.parametrize("body", ['[{"title": "milk"}]', "[]", '"null"', "0", "false"])
def test_a_body_must_be_an_object(write: Answers, body: str) -> None:
    for response in write(content=body):
        assert_invalid(response, ("body", "must be an object"))


def test_null_is_a_body_only_where_none_is_needed(alice: Client, untouched: str) -> None:
    """PATCH takes it for no body: see test_tasks.py."""
    assert_invalid(alice.post("/api/tasks", content="null"), ("body", "must be an object"))
    assert_invalid(alice.put(untouched, content="null"), ("body", "must be an object"))


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


# --- What is just valid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("character", "ensure_ascii"),
    [("a", False), ("\u0301", False), ("\U0001d4b3", False), ("\U0001d4b3", True), ("\x01", True)],
    ids=ascii,
)
def test_the_longest_texts_are_kept(alice: Client, character: str, ensure_ascii: bool) -> None:
    """In their longest form too, of twelve bytes for a character."""
    fields = {"title": character * 200, "description": character * 2000}
    content = json.dumps(fields, ensure_ascii=ensure_ascii).encode()
    response = alice.post("/api/tasks", content=content)
    assert response.status_code == 201
    assert response.json() == response.json() | fields
    assert alice.put(f"/api/tasks/{response.json()['id']}", content=content).json()["title"] == fields["title"]
    assert alice.tasks()[0] == alice.tasks()[0] | fields
