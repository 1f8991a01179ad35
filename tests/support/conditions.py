"""What the headers of conditions and keys may say, and requests that say it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support.service_process import Client

Task = dict[str, Any]

MOVED_ON = {"detail": "The task has changed since the version that If-Match names"}
ANOTHER_BODY = {
    "detail": "body is not the one that this Idempotency-Key was first sent with",
    "errors": [{"field": "body", "message": "is not the one that this Idempotency-Key was first sent with"}],
}

# What a client can say with If-Match and If-None-Match about a version whose tag is {}, or <> without its quotes. Each
# line is one of the header's.
NAMES_IT = {
    "its tag": "{}",
    "a list": '"a","b",\t{} , "c"',
    "a list with nothing between commas": ',, {}, ,"a",',
    "lines of which it is the last": '"a", "b"\n{}',
    "it beside a weak tag and the empty one": 'W/"a", "", {}',
    "it beside a tag with a comma and odd characters": '"!#\\\'/,~\x80\xe9\xff", {}',
    "it beside a thousand others": ", ".join(f'"{number}"' for number in range(1000)) + ", {}",
}
ANY = {"an asterisk": "*"}
NAMES_IT_WEAKLY = {"the weak tag": "W/{}", "lines with the weak tag": '"a"\nW/{}\nW/"b"'}
NAMES_ANOTHER = {
    "another tag": '"a"',
    "a list of others": '"a", W/"b",\t"c"',
    "the empty tag": '""',
    "an asterisk in quotes": '"*"',
    "more than the tag": '"<>."',
    "no text but commas": ", ,",
    "no text": "",
}
# Tags that could be a version of a task, or look like one: the service reads them as times.
NAMES_ANOTHER_VERSION = {
    "a version before": '"2000-01-01T00:00:00.000001+00:00"',
    "the last moment of all": '"9999-12-31T23:59:59.999999+00:00"',
    "a version before the first year in UTC": '"0001-01-01T00:00:00+23:59"',
    "a version after the last year in UTC": '"9999-12-31T23:59:59-23:59"',
    "a version of no year": '"10000-01-01T00:00:00+00:00"',
    "no version": '"2026-02-30T00:00:00+00:00"',
    "infinity": '"infinity", "-infinity"',
    "a date": '"2026-01-31"',
    "SQL": '"\' OR true --"',
}
IS_NO_LIST = {
    "no quotes": "<>",
    "no last quote": '"<>',
    "a lower-case w": "w/{}",
    "a space after W/": "W/ {}",
    "no comma": '{} "a"',
    "not even a space": "{}{}",
    "a word before it": "a, {}",
    "a space in a tag": '"a b", {}',
    "a quote in a tag": '"a"b", {}',
    "an escaped quote in a tag": r'"a\"b", {}',
    "an asterisk before it": "*, {}",
    "an asterisk in a line after it": "{}\n*",
    "two lines of an asterisk": "*\n*",
}
EVERYTHING = NAMES_IT | ANY | NAMES_IT_WEAKLY | NAMES_ANOTHER | NAMES_ANOTHER_VERSION | IS_NO_LIST


def cases(said: dict[str, Any]) -> list[Any]:
    return [pytest.param(value, id=name) for name, value in said.items()]


def lines(name: str, said: str, etag: str) -> list[tuple[bytes, bytes]]:
    """Return the lines of a header that says this about a version."""
    tag = etag.removeprefix("W/")
    text = said.replace("{}", tag).replace("<>", tag.strip('"'))
    return [(name.encode(), line.encode("latin-1")) for line in text.split("\n")]


def etag_of(task: Task) -> str:
    """Return the ETag of a task, as a client makes it of a task from anywhere."""
    return f'"{task["updated_at"]}"'


def path_of(task: Task) -> str:
    return f"/api/tasks/{task['id']}"


def if_match(task: Task) -> dict[str, str]:
    return {"If-Match": etag_of(task)}


def change_in_turn(client: Client, task: Task, number: int) -> Task:
    """Change a task in one of four ways, on the condition that it is still what it was; return what it is now."""
    method, action, body = [
        ("PUT", "", {"title": f"title {number}"}),
        ("PATCH", "/complete", None),
        ("PUT", "", {"description": None}),
        ("PATCH", "/complete", {"completed": True}),
    ][number % 4]
    response = client.request(method, path_of(task) + action, json=body, headers=if_match(task))
    assert (response.status_code, response.headers["etag"]) == (200, etag_of(response.json()))
    changed: Task = response.json()
    return changed


def wrong(field: str, message: str) -> Task:
    return {"detail": f"{field} {message}", "errors": [{"field": field, "message": message}]}


FAULTS_OF_A_BODY: dict[str, tuple[dict[str, Any], int, Task]] = {
    "too large": ({"content": b" " * 65_537}, 413, {"detail": "The body must have at most 65536 bytes"}),
    "no JSON": ({"content": b"{"}, 400, {"detail": "The body must be valid JSON, encoded as UTF-8"}),
    "not declared as JSON": (
        {"content": b"{}", "headers": {"Content-Type": "text/plain"}},
        415,
        {"detail": "The body must be JSON, with Content-Type: application/json"},
    ),
    "no object": ({"json": []}, 422, wrong("body", "must be an object")),
    "a field that is wrong": ({"json": {"completed": 1}}, 422, wrong("completed", "must be true or false")),
}
BODY = {"title": "Buy milk", "description": "Two litres", "completed": True}


def with_key(client: Client, key: str | bytes, body: object = BODY) -> httpx.Response:
    key = key.encode() if isinstance(key, str) else key
    return client.post("/api/tasks", json=body, headers={b"Idempotency-Key": key})


def assert_created(response: httpx.Response, task: Task | None = None) -> Task:
    """Check the answer to a creation, of the task if one is given, and return the task."""
    created: Task = response.json()
    assert (response.status_code, created) == (201, task or created)
    assert response.headers["location"] == path_of(created)
    assert response.headers["etag"] == etag_of(created)
    assert created.keys() >= {"id", "user_id", "title", "description", "completed", "created_at", "updated_at"}
    return created
