"""Bodies, ids, queries, paths and methods that no client of good will sends.

Each has an answer of the contract. None is a bug's way in, or anybody's way to the tasks of another.
"""

from __future__ import annotations

import pytest

from tests.support.errors import NOT_AUTHENTICATED, TASK_NOT_FOUND
from tests.support.service_process import Client, Service
from tests.support.wire import (
    Raw,
    RawAnswer,
    ask,
    bearer,
)

NOT_JSON = {"detail": "The body must be valid JSON, encoded as UTF-8"}
NOT_AN_OBJECT = {"detail": "body must be an object", "errors": [{"field": "body", "message": "must be an object"}]}
NO_INTEGER = {
    "detail": "task_id must be a decimal integer",
    "errors": [{"field": "task_id", "message": "must be a decimal integer"}],
}
NO_STATUS = {
    "detail": "status must be one of all, pending, completed",
    "errors": [{"field": "status", "message": "must be one of all, pending, completed"}],
}
NOT_FOUND = {"detail": "Not Found"}
NOT_ALLOWED = {"detail": "Method Not Allowed"}

WRITES = [("POST", "/api/tasks"), ("PUT", "/api/tasks/{id}"), ("PATCH", "/api/tasks/{id}/complete")]

# --- Bodies ----------------------------------------------------------------------------------------------------------

OBJECT = '{"title": "x", "completed": true}'
NOT_JSON_BODIES = {
    "white space": b" \t\r\n",
    "60,000 brackets": b"[" * 60_000,
    "12,000 braces": b'{"a":' * 12_000,
    "30,000 pairs of brackets": b"[" * 30_000 + b"]" * 30_000,
    "a deep unknown field": b'{"title": "x", "completed": true, "a": ' + b"[" * 9_000 + b"]" * 9_000 + b"}",
    "4,000 digits": b"1" * 4_000,
    "60,000 digits": b"1" * 60_000,
    "4,000 digits as the title": b'{"completed": true, "title": ' + b"9" * 4_000 + b"}",
    "4,000 digits in an unknown field": b'{"title": "x", "completed": true, "n": ' + b"9" * 4_000 + b"}",
    "60,000 digits in an unknown field": b'{"title": "x", "completed": true, "n": -' + b"9" * 60_000 + b"}",
    "60,000 digits with a point": b'{"title": "x", "completed": true, "n": %s.0}' % (b"9" * 60_000),
    **{
        f"{number} in an unknown field": b'{"title": "x", "completed": true, "n": [%s]}' % number.encode()
        for number in ("1e400", "-1e400", "1E+999999999", "NaN", "-NaN", "Infinity", "-Infinity", "inf", "01", "+1",
                       ".5", "1.", "0x10", "1_000", "1e", "--1", "\uff11")
    },
    **{
        f"{value} as the title": b'{"completed": true, "title": %s}' % value.encode()
        for value in ("NaN", "1e400", "True")
    },
    **{
        f"{encoding}{' with a mark' if mark else ''}": (mark + OBJECT).encode(encoding)
        for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-7", "utf-8")
        for mark in ("", "\ufeff")
        if (encoding, mark) not in (("utf-8", ""), ("utf-7", ""))
    },
    "Latin-1": '{"title": "é", "completed": true}'.encode("latin-1"),
    "a byte of no character": b'{"title": "\xff", "completed": true}',
    "a byte of no character in an unknown field": b'{"title": "x", "completed": true, "a": "\xfe"}',
    "an overlong slash": b'{"title": "\xc0\xaf", "completed": true}',
    "an overlong NUL": b'{"title": "a\xc0\x80", "completed": true}',
    "an encoded surrogate": b'{"title": "\xed\xa0\x80", "completed": true}',
    "a pair of encoded surrogates": b'{"title": "\xed\xa0\xbd\xed\xb8\x80", "completed": true}',
    "beyond Unicode": b'{"title": "\xf4\x90\x80\x80", "completed": true}',
    "half a character": b'{"title": "\xf0\x9f\x98", "completed": true}',
    "a raw NUL": b'{"title": "a\0b", "completed": true}',
    "a NUL after the end": OBJECT.encode() + b"\0",
    "a raw line break": b'{"title": "a\nb", "completed": true}',
    "two objects": OBJECT.encode() * 2,
    "an object and a word": OBJECT.encode() + b" x",
    "no end": OBJECT.encode()[:-1],
    "no end of the string": b'{"title": "x',
    "a trailing comma": b'{"title": "x", "completed": true,}',
    "single quotes": b"{'title': 'x', 'completed': true}",
    "no quotes": b'{title: "x", completed: true}',
    "a comment": b'{"title": "x", "completed": true /* done */}',
    "a bad escape": b'{"title": "\\x41", "completed": true}',
    "half an escape": b'{"title": "\\u12", "completed": true}',
    "undefined": b'{"title": "x", "completed": undefined}',
    "a form": b"title=x&completed=true",
    "XML": b"<title>x</title>",
    "compressed": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_JSON_BODIES)
def test_a_body_that_is_not_json_in_utf_8_changes_nothing(alice: Client, bob: Client, name: str) -> None:
    task, other = alice.create("mine"), bob.create("theirs")
    for method, path in WRITES:
        response = alice.request(
            method,
            path.format(id=task["id"]),
            content=NOT_JSON_BODIES[name],
            headers={"Content-Type": "application/json"},
        )
        assert (response.status_code, response.json()) == (400, NOT_JSON), method
    assert (alice.tasks(), bob.tasks()) == ([task], [other])


def test_an_empty_body_is_refused_where_there_has_to_be_one(alice: Client) -> None:
    task = alice.create("mine")
    for method, path in WRITES[:2]:
        response = alice.request(method, path.format(id=task["id"]), content=b"")
        assert (response.status_code, response.json()) == (400, NOT_JSON), method
    assert alice.tasks() == [task]


@pytest.mark.parametrize("body", ["[]", "null", "true", "7", "-0.0", '"title"', '""', '[{"title": "x"}]', "[[]]"])
def test_a_body_that_is_no_object_changes_nothing(alice: Client, bob: Client, body: str) -> None:
    task, other = alice.create("mine"), bob.create("theirs")
    for method, path in WRITES[:2] if body == "null" else WRITES:  # null toggles, as no body does
        response = alice.request(method, path.format(id=task["id"]), content=body)
        assert (response.status_code, response.json()) == (422, NOT_AN_OBJECT), method
    assert (alice.tasks(), bob.tasks()) == ([task], [other])


@pytest.mark.parametrize("field", ["title", "description"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\\u0000b", "must not contain NUL"),
        ("\\u0000", "must not contain NUL"),
        ("a\\ud83d", "must not contain a lone surrogate"),
        ("\\ude00\\ud83d", "must not contain a lone surrogate"),
        ("\\uD800\\uD800", "must not contain a lone surrogate"),
        ("😀\\udfff", "must not contain a lone surrogate"),
    ],
)
def test_text_that_postgresql_cannot_hold_is_refused(alice: Client, field: str, text: str, message: str) -> None:
    task = alice.create("mine")
    body = f'{{"title": "x", "{field}": "{text}"}}'
    for method, path in WRITES[:2]:
        response = alice.request(method, path.format(id=task["id"]), content=body.encode())
        errors = [{"field": field, "message": message}]
        assert (response.status_code, response.json()) == (422, {"detail": f"{field} {message}", "errors": errors})
    assert alice.tasks() == [task]


def test_text_that_postgresql_cannot_hold_is_no_matter_in_a_field_that_is_ignored(alice: Client) -> None:
    body = rb'{"title": "x", "\u0000": "\u0000", "\ud800": {"\udfff": "\ud800"}, "": null}'
    response = alice.post("/api/tasks", content=body)
    assert (response.status_code, response.json()["title"]) == (201, "x")


def test_an_escaped_pair_of_surrogates_is_a_character(alice: Client) -> None:
    response = alice.post("/api/tasks", content=rb'{"title": "\ud83d\ude00", "description": "\u00e9\uD83D\uDE00"}')
    assert response.status_code == 201
    assert (response.json()["title"], response.json()["description"]) == ("😀", "é😀")


def test_of_a_field_given_twice_the_last_one_is_both_checked_and_kept(alice: Client) -> None:
    response = alice.post("/api/tasks", content=b'{"title": "", "title": "x", "completed": 7, "completed": true}')
    assert (response.status_code, response.json()["title"], response.json()["completed"]) == (201, "x", True)
    response = alice.post("/api/tasks", content=b'{"title": "x", "title": " "}')
    errors = [{"field": "title", "message": "must not be blank"}]
    assert (response.status_code, response.json()) == (422, {"detail": "title must not be blank", "errors": errors})
    assert len(alice.tasks()) == 1


def test_unknown_fields_may_be_of_any_shape(alice: Client) -> None:
    deep = b"[" * 200 + b"]" * 200
    numbers = b"[9223372036854775808, 1e300, -1E-300, 0.1, -0]"
    body = b'{"title": "x", "__proto__": {"completed": true}, "Title": 7, "a": %s, "n": %s}' % (deep, numbers)
    response = alice.post("/api/tasks", content=body)
    assert (response.status_code, response.json()["completed"]) == (201, False)


def test_a_body_cannot_name_another_owner_or_task(alice: Client, bob: Client) -> None:
    task, other = alice.create("mine"), bob.create("theirs")
    body = other | {"title": "changed", "sub": bob.user_id, "user": {"id": bob.user_id}}
    created = alice.post("/api/tasks", json=body).json()
    changed = alice.put(f"/api/tasks/{task['id']}", json=body).json()
    assert (created["user_id"], changed["user_id"], changed["id"]) == (alice.user_id, alice.user_id, task["id"])
    assert changed["created_at"] == task["created_at"]
    assert created["id"] not in (task["id"], other["id"])
    assert bob.tasks() == [other]


@pytest.mark.parametrize("extra", [b"", b" " * 60_000])
def test_white_space_around_the_body_is_json(alice: Client, extra: bytes) -> None:
    response = alice.post("/api/tasks", content=b"\r\n\t " + extra + b'{"title": "x"}' + b" \n")
    assert response.status_code == 201


# --- Ids -------------------------------------------------------------------------------------------------------------

ABSENT = [
    *("0", "-1", "-0", "00", str(2**63 - 1), str(2**63), str(2**64 + 1), str(-(2**63)), str(-(2**63) - 1), "1" * 30),
    *("1" * 5_000, "0" * 5_000, "-" + "1" * 5_000, "9" * 60_000, "-" + "0" * 30 + "1"),
]
NO_IDS = [
    *("%EF%BC%91%EF%BC%92", "1_0", "+1", "1.0", "1%00", "1%0A", "%0A1", "%201", "1%20", "%091", "1e3", "%00", "%0A"),
    *("-", "--1", "1-", "+", "0x1", "0b1", "1L", "1n", "NaN", "Infinity", "null", "true", "%D9%A1", "%C2%B2", "%C2%BD"),
    *("%FF", "%C0%AF", "%ED%A0%80", "%F0%9F%92%A9", "1,2", "1;2", "*", "%25", "%", "%zz", "1%3D1", "'", "1%20OR%201=1"),
    *("%E2%88%921", "1%E2%80%8B", "{task_id}", "...", "1:1", "undefined", "a" * 60_000, "abc"),
]
ONE_TASK = [("GET", ""), ("HEAD", ""), ("PUT", ""), ("DELETE", ""), ("PATCH", "/complete")]


def ask_for_id(service: Service, client: Client, method: str, text: str, suffix: str) -> RawAnswer:
    headers = [bearer(client), "Content-Type: application/json", "Content-Length: 2"]
    return ask(service, f"{method} /api/tasks/{text}{suffix}", *headers, content=b"{}")


@pytest.mark.parametrize("text", ABSENT, ids=lambda text: text[:25])
def test_an_integer_that_no_task_has_is_not_found(service: Service, alice: Client, bob: Client, text: str) -> None:
    tasks, others = [alice.create("mine")], [bob.create("theirs")]
    for method, suffix in ONE_TASK:
        answer = ask_for_id(service, alice, method, text, suffix)
        assert answer.status == 404, method
        assert method == "HEAD" or answer.json() == TASK_NOT_FOUND
    assert (alice.tasks(), bob.tasks()) == (tasks, others)


@pytest.mark.parametrize("text", NO_IDS, ids=lambda text: text[:25])
def test_an_id_that_is_no_decimal_integer_is_refused(service: Service, alice: Client, bob: Client, text: str) -> None:
    tasks, others = [alice.create("mine")], [bob.create("theirs")]
    for method, suffix in ONE_TASK:
        answer = ask_for_id(service, alice, method, text, suffix)
        assert answer.status == 422, method
        assert method == "HEAD" or answer.json() == NO_INTEGER
    assert (alice.tasks(), bob.tasks()) == (tasks, others)


def test_a_task_of_somebody_else_is_as_absent_as_none_in_every_disguise(
    service: Service, alice: Client, bob: Client
) -> None:
    task, other = alice.create("mine"), bob.create("theirs")
    for text in (f"{other['id']}", f"00{other['id']}", f"%3{str(other['id'])[0]}{str(other['id'])[1:]}"):
        for method, suffix in ONE_TASK:
            answer = ask_for_id(service, alice, method, text, suffix)
            assert answer.status == 404, method
            assert method == "HEAD" or answer.json() == TASK_NOT_FOUND
    assert (alice.tasks(), bob.tasks()) == ([task], [other])


# --- Queries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query",
    ["", "&&&=&=", "?status=x", "status[]=x", "Status=x", "%73tatus2=x", "a=%zz", "%=%", "%00=%00", "a=%ff",
     "a=%ED%A0%80", "a=1&" * 10_000, "a=" + "x" * 50_000, "&" * 50_000, "status=all", "%73tatus=%61ll",
     "limit=-1&offset=x&user_id=bob"],
    ids=lambda query: query[:25],
)  # fmt: skip
def test_unknown_parameters_of_any_shape_are_ignored(service: Service, alice: Client, bob: Client, query: str) -> None:
    task, other = alice.create("mine"), bob.create("theirs")
    answer = ask(service, f"GET /api/tasks?{query}", bearer(alice))
    assert (answer.status, answer.json()) == (200, {"items": [task]})
    assert bob.tasks() == [other]


@pytest.mark.parametrize(
    "status",
    ["x", "ALL", "Pending", "%00", "all%00", "all%0A", "%20all", "all+", "all,pending", "%", "%zz", "%ff",
     "%ED%A0%80", "true", "null", "'%20OR%20'1'='1", "%EF%BD%81ll", "pending%2Ccompleted", "x" * 60_000],
    ids=lambda status: status[:25],
)  # fmt: skip
def test_an_unknown_status_is_refused(service: Service, alice: Client, status: str) -> None:
    answer = ask(service, f"GET /api/tasks?status={status}", bearer(alice))
    assert (answer.status, answer.json()) == (422, NO_STATUS)


def test_an_empty_status_is_none(service: Service, alice: Client) -> None:
    tasks = [alice.create("completed", completed=True), alice.create("pending")]
    for query in ("status=", "status", "status=&status="):
        answer = ask(service, f"GET /api/tasks?{query}", bearer(alice))
        assert (answer.status, answer.json()) == (200, {"items": tasks[::-1]})


def test_a_status_given_twice_is_one_of_the_two(service: Service, alice: Client) -> None:
    pending, completed = alice.create("pending"), alice.create("completed", completed=True)
    answer = ask(service, "GET /api/tasks?status=pending&status=completed", bearer(alice))
    assert answer.status == 422 or answer.json()["items"] in ([pending], [completed])
    answer = ask(service, "GET /api/tasks?status=x&status=y", bearer(alice))
    assert (answer.status, answer.json()) == (422, NO_STATUS)


# --- Paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/api/tasks", "/api/tasks/", "/api/tasks/1", "/api/tasks/1/complete", "/api/", "/api/nothing", "/api/tasks//",
     "/%61pi/tasks", "/api%2Ftasks", "/api%2ftasks/1", "/%61%70%69%2F%74%61%73%6B%73", "/api/tasks%0A", "/api/tasks%00",
     "/api/../health", "/api/%2e%2e/health", "/api//tasks", "/api/tasks?status=x", "/api/tasks#x", "/api/tasks;x=1",
     "http://localhost/api/tasks", "http://elsewhere.example/%61pi/tasks/1", "https://user:pass@x:1/api/tasks"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "TRACE", "OPTIONS", "PROPFIND"])
def test_whatever_is_under_api_needs_a_token_however_it_is_spelt(service: Service, method: str, path: str) -> None:
    answer = ask(service, f"{method} {path}")
    assert (answer.status, answer.json()) == (401, NOT_AUTHENTICATED)
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path",
    ["//api/tasks", "/API/tasks", "/Api/tasks", "/./api/tasks", "/x/../api/tasks", "/%2fapi/tasks", "/%252fapi/tasks",
     "/api%252Ftasks", "/apitasks", "/tasks", "/x", "/.env", "/.git/config", "/service.py", "/docs/..%2fservice.py",
     "/docs/%2e%2e/%2e%2e/etc/passwd", "/docs/__init__.py", "/docs/", "*", "/\\api\\tasks", "/api\\tasks", "/%00"],
)  # fmt: skip
@pytest.mark.parametrize("signed_in", [True, False])
def test_what_only_looks_like_a_path_is_not_found(service: Service, alice: Client, path: str, signed_in: bool) -> None:
    alice.create("mine")
    answer = ask(service, f"GET {path}", *([bearer(alice)] if signed_in else []))
    if path == "/docs/":
        assert answer.status == 200  # the same resource as /docs
    else:
        assert (answer.status, answer.json()) == (404, NOT_FOUND)


@pytest.mark.parametrize(
    "path",
    ["/api", "/api/", "/api/nothing", "/api/tasks//", "/api//tasks", "/api/tasks/%2F", "/api/tasks/1%2F2",
     "/api/tasks/1/x", "/api/tasks/1/complete/x", "/api/tasks/1/complete//", "/api/tasks/../tasks", "/api/./tasks",
     "/api/tasks%00", "/api/tasks%20", "/api/tasks%0A", "/api/tasks%0a/", "/api/tasks/1/complete%0A", "/api/Tasks",
     "/api/tasks/1/Complete"],
)  # fmt: skip
def test_a_path_under_api_that_does_not_exist_is_not_found(service: Service, alice: Client, path: str) -> None:
    alice.create("mine")
    for method in ("GET", "PATCH"):
        answer = ask(service, f"{method} {path}", bearer(alice))
        assert (answer.status, answer.json()) == (404, NOT_FOUND)


@pytest.mark.parametrize("path", ["/health%0A", "/health/ready%0a", "/openapi.json%0A", "/docs%0A", "/%0A"])
def test_a_line_break_at_its_end_is_part_of_the_path(service: Service, path: str) -> None:
    answer = ask(service, f"GET {path}")
    assert (answer.status, answer.json()) == (404, NOT_FOUND)


def test_a_line_break_at_the_end_of_the_path_changes_no_task(service: Service, alice: Client) -> None:
    task = alice.create("mine")
    answer = ask(service, f"PATCH /api/tasks/{task['id']}/complete%0A", bearer(alice))
    assert (answer.status, answer.json()) == (404, NOT_FOUND)
    assert alice.tasks() == [task]


def test_escaped_letters_name_the_same_resource(service: Service, alice: Client, bob: Client) -> None:
    task, other = alice.create("mine"), bob.create("theirs")
    for path in ("/%61pi/tasks", "/api%2Ftasks", "/api/tasks/", "http://elsewhere.example/api/tasks", "/api/tasks#x"):
        answer = ask(service, f"GET {path}", bearer(alice))
        assert (answer.status, answer.json()) == (200, {"items": [task]})
    assert bob.tasks() == [other]


@pytest.mark.parametrize("path", ["/api/tasks/\u00e9", "/\u00ff", "/api/tasks?status=\u00ff", "http://localhost"])
def test_what_is_no_request_target_is_a_bad_request(service: Service, alice: Client, path: str) -> None:
    assert ask(service, f"GET {path}".encode(), bearer(alice)).status == 400
    assert ask(service, f"GET {path}".encode("latin-1"), bearer(alice)).status == 400


@pytest.mark.parametrize(
    "requested", ["bytes=99999999-", "bytes=x-y", "bytes=5-1", "lines=1-2", "x", "bytes=" + "1" * 5_000 + "-"]
)
def test_a_range_that_a_file_does_not_have_is_ignored_or_refused_in_json(nobody: Client, requested: str) -> None:
    response = nobody.get("/docs/redoc.js", headers={"Range": requested})
    assert response.status_code in (200, 400, 416)
    if response.status_code != 200:
        assert response.headers["content-type"] == "application/json"
        assert response.json().keys() == {"detail"}


@pytest.mark.parametrize("requested", ["0-0," * 99 + "5-9", "0-," * 99 + "0-", "0-," * 10_000, "-1,-2,-3"])
def test_a_crowd_of_ranges_is_no_more_than_the_file(nobody: Client, requested: str) -> None:
    whole = len(nobody.get("/docs/redoc.js").content)
    response = nobody.get("/docs/redoc.js", headers={"Range": f"bytes={requested}"})
    assert response.status_code in (200, 206)
    assert len(response.content) <= whole


# --- Methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["TRACE", "OPTIONS", "PROPFIND", "QUERY", "MKCOL", "LINK"])
@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/api/tasks", {"GET", "HEAD", "POST"}),
        ("/api/tasks/1", {"GET", "HEAD", "PUT", "DELETE"}),
        ("/api/tasks/x", {"GET", "HEAD", "PUT", "DELETE"}),
        ("/api/tasks/1/complete", {"PATCH"}),
        ("/health", {"GET", "HEAD"}),
    ],
)
def test_a_method_that_nobody_offers_is_not_allowed(
    service: Service, alice: Client, method: str, path: str, allowed: set[str]
) -> None:
    answer = ask(service, f"{method} {path}", bearer(alice))
    assert (answer.status, answer.json()) == (405, NOT_ALLOWED)
    assert set(answer.headers["allow"].split(", ")) == allowed
    assert bearer(alice) not in str(answer)  # TRACE would be the way to read it


def test_no_header_or_parameter_overrides_the_method(service: Service, alice: Client) -> None:
    task = alice.create("mine")
    for name in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"):
        answer = ask(service, f"POST /api/tasks/{task['id']}?_method=DELETE", bearer(alice), f"{name}: DELETE")
        assert (answer.status, answer.json()) == (405, NOT_ALLOWED)
        answer = ask(service, f"GET /api/tasks/{task['id']}?_method=DELETE", bearer(alice), f"{name}: DELETE")
        assert (answer.status, answer.json()) == (200, task)
    assert alice.tasks() == [task]


@pytest.mark.parametrize(
    "line", ["get /api/tasks", "Get /api/tasks", "FOO /api/tasks", "CONNECT localhost:443", "", "GET"]
)
def test_what_is_no_http_is_a_bad_request(service: Service, alice: Client, line: str) -> None:
    with Raw(service) as connection:
        connection.socket.sendall(f"{line} HTTP/1.1\r\nHost: x\r\n{bearer(alice)}\r\n\r\n".encode())
        assert connection.answer().status == 400
        assert connection.is_closed()
