"""Creations that are safe to repeat: Idempotency-Key."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.support.conditions import (
    ANOTHER_BODY,
    BODY,
    FAULTS_OF_A_BODY,
    Task,
    assert_created,
    if_match,
    path_of,
    with_key,
)
from tests.support.fixtures import StartService
from tests.support.service_process import Client, Service
from tests.support.tasks import KINDS_OF_CHANGE

NOT_A_KEY = {"detail": "Idempotency-Key must have 1 to 255 visible ASCII characters"}

# --- Idempotency-Key -------------------------------------------------------------------------------------------------

KEYS = [
    "a", "~", "5f0c2b3e-8b1f-4f1e-9d53-0f6f5f0c2b3e", '"', "null", "a,b", "';DROP/**/TABLE/**/task;--",
    "!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~", "x" * 255,
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key[:30])
def test_one_key_makes_one_task(service: Service, alice: Client, bob: Client, key: str) -> None:
    task = assert_created(with_key(alice, key))
    assert task == task | BODY
    for _ in range(3):
        assert_created(with_key(alice, key), task)
    assert alice.tasks() == [task]
    his = assert_created(with_key(bob, key))
    assert (his["id"] != task["id"], his["user_id"], bob.tasks()) == (True, bob.user_id, [his])
    assert alice.tasks() == [task]


def test_keys_that_are_alike_are_not_the_same(alice: Client) -> None:
    """Another case, a beginning, a pattern, a quote too many, an escape, leading zeros."""
    keys = ["key", "KEY", "ke", "k%", "_ey", '"key', 'key"', '""key""', "'key'", "%6Bey", "\\key", "1", "01"]
    tasks = [assert_created(with_key(alice, key)) for key in keys]
    assert alice.tasks() == tasks[::-1]
    for key, task in zip(keys, tasks, strict=True):
        assert_created(with_key(alice, key), task)
    assert alice.tasks() == tasks[::-1]


@pytest.mark.parametrize("key", ["k", '"', "x" * 255], ids=lambda key: key[:3])
@pytest.mark.parametrize("quoted_first", [False, True], ids=["without quotes first", "with quotes first"])
def test_a_key_is_the_same_in_quotes_and_without(alice: Client, bob: Client, key: str, quoted_first: bool) -> None:
    """As the draft of the IETF writes it, and as everybody does. The longest one has 257 characters then."""
    first, second = (f'"{key}"', key) if quoted_first else (key, f'"{key}"')
    task = assert_created(with_key(alice, first))
    assert_created(with_key(alice, second), task)
    assert_created(with_key(alice, first), task)
    response = with_key(alice, second, {"title": "another"})
    assert (response.status_code, response.json()) == (422, ANOTHER_BODY)
    assert alice.tasks() == [task]
    his = assert_created(with_key(bob, second))
    assert (his["id"] != task["id"], bob.tasks()) == (True, [his])


@pytest.mark.parametrize(
    "key",
    [b"", b'""', b"a b", b'"a b"', b"a\tb", b"x" * 256, b'"' + b"x" * 256 + b'"', b'"' + b"x" * 255, b", ,",
     "é".encode("latin-1"), b"\x80"],
    ids=lambda key: ascii(key)[:20],
)  # fmt: skip
def test_what_cannot_be_a_key_is_refused(alice: Client, key: bytes) -> None:
    tasks = [with_key(alice, "a").json()]
    response = with_key(alice, key)
    assert (response.status_code, response.json()) == (400, NOT_A_KEY)
    assert alice.tasks() == tasks


@pytest.mark.parametrize(
    ("request_options", "status", "answer"),
    [
        ({"content": b" " * 65_537}, 413, FAULTS_OF_A_BODY["too large"][2]),
        (
            {"content": b"a", "headers": {"Content-Type": "text/plain"}},
            415,
            FAULTS_OF_A_BODY["not declared as JSON"][2],
        ),
        ({"content": b"{"}, 400, FAULTS_OF_A_BODY["no JSON"][2]),
        ({"json": {"title": ""}}, 400, NOT_A_KEY),
    ],
    ids=["413", "415", "400", "422"],
)
def test_what_cannot_be_a_key_is_told_in_its_place(
    alice: Client, request_options: dict[str, Any], status: int, answer: Task
) -> None:
    headers = request_options.get("headers", {}) | {"Idempotency-Key": "a b"}
    response = alice.post("/api/tasks", **request_options | {"headers": headers})
    assert (response.status_code, response.json()) == (status, answer)


@pytest.mark.parametrize("keys", [("a", "b"), ("a", "a"), ("", "a"), ('"a"', '"a"')])
def test_several_keys_are_refused(alice: Client, keys: tuple[str, ...]) -> None:
    headers = [("Idempotency-Key", key) for key in keys]
    response = alice.post("/api/tasks", json=BODY, headers=headers)
    assert (response.status_code, response.json()) == (400, NOT_A_KEY)
    assert alice.tasks() == []


def test_without_a_key_each_request_makes_a_task(alice: Client) -> None:
    tasks = [assert_created(alice.post("/api/tasks", json=BODY)) for _ in range(3)]
    tasks.append(assert_created(with_key(alice, "a")))
    tasks.append(assert_created(alice.post("/api/tasks", json=BODY)))
    assert len({task["id"] for task in tasks}) == 5
    assert alice.tasks() == tasks[::-1]


# Bodies that say the same, each with a first one.
PLAIN, FULL = b'{"title": "M\xc3\xbcsli"}', b'{"title": "a", "description": "b", "completed": true}'
SAME = {
    "white space": (PLAIN, b' {\n\t"title" :\r\n "M\xc3\xbcsli" } \n'),
    "escapes": (PLAIN, rb'{"title": "\u004d\u00FCsl\u0069"}'),
    "an escaped name": (PLAIN, b'{"\\u0074itle": "M\xc3\xbcsli"}'),
    "the defaults": (PLAIN, b'{"title": "M\xc3\xbcsli", "description": null, "completed": false}'),
    "a null alone": (PLAIN, b'{"description": null, "title": "M\xc3\xbcsli"}'),
    "another order": (FULL, b'{"completed": true, "description": "b", "title": "a"}'),
    "unknown fields": (
        FULL,
        b'{"id": 7, "title": "a", "description": "b", "completed": true, "user_id": "c", "x": [{}]}',
    ),
    "a surrogate pair": ('{"title": "😀"}'.encode(), b'{"title": "\\ud83d\\ude00"}'),
}
OTHER = {
    "a title with a blank": (PLAIN, b'{"title": "M\xc3\xbcsli "}'),
    "a title of other characters that look the same": (PLAIN, b'{"title": "Mu\\u0308sli"}'),
    "an empty description": (PLAIN, b'{"title": "M\xc3\xbcsli", "description": ""}'),
    "a description that is a word of JSON": (PLAIN, b'{"title": "M\xc3\xbcsli", "description": "null"}'),
    "completed": (PLAIN, b'{"title": "M\xc3\xbcsli", "completed": true}'),
    "not completed": (FULL, b'{"title": "a", "description": "b"}'),
    "title and description exchanged": (FULL, b'{"title": "b", "description": "a", "completed": true}'),
    "the two in one": (FULL, b'{"title": "a\\", \\"b", "completed": true}'),
}


def send_with_key(client: Client, key: str, content: bytes, media_type: str = "application/json") -> httpx.Response:
    return client.post("/api/tasks", content=content, headers={"Idempotency-Key": key, "Content-Type": media_type})


@pytest.mark.parametrize(("first", "second"), SAME.values(), ids=SAME)
def test_the_same_body_in_other_words_is_the_same(alice: Client, first: bytes, second: bytes) -> None:
    task = assert_created(send_with_key(alice, "a", first))
    assert_created(send_with_key(alice, "a", second), task)
    assert_created(send_with_key(alice, "a", first, "application/vnd.api+json; charset=utf-8"), task)
    other = assert_created(send_with_key(alice, "b", second))
    assert_created(send_with_key(alice, "b", first), other)
    assert alice.tasks() == [other, task]


@pytest.mark.parametrize(("first", "second"), OTHER.values(), ids=OTHER)
def test_another_body_with_the_same_key_is_refused(
    service: Service, alice: Client, bob: Client, first: bytes, second: bytes
) -> None:
    task = assert_created(send_with_key(alice, "a", first))
    before = service.rows(alice)
    response = send_with_key(alice, "a", second)
    assert (response.status_code, response.json()) == (422, ANOTHER_BODY)
    assert service.rows(alice) == before
    his = assert_created(send_with_key(bob, "a", second))
    assert_created(send_with_key(alice, "a", first), task)
    assert (service.rows(alice), bob.tasks()) == (before, [his])
    assert_created(send_with_key(alice, "b", second))


@pytest.mark.parametrize(
    ("status", "request_options"),
    [
        (422, {"json": BODY | {"completed": None}}),
        (400, {"content": json.dumps(BODY)[:-1].encode()}),
        (413, {"content": json.dumps(BODY).encode() + b" " * 65_536}),
        (415, {"content": json.dumps(BODY).encode(), "headers": {"Content-Type": "text/plain"}}),
        (401, {"json": BODY, "headers": {"Authorization": ""}}),
        (405, {"json": BODY, "method": "PUT"}),
    ],
    ids=str,
)  # fmt: skip
def test_a_request_that_failed_uses_no_key_up(
    service: Service, alice: Client, status: int, request_options: dict[str, Any]
) -> None:
    headers = request_options.get("headers", {}) | {"Idempotency-Key": "a"}
    for _ in range(2):
        response = alice.request(**{"method": "POST", "url": "/api/tasks"} | request_options | {"headers": headers})
        assert response.status_code == status
    assert service.rows(alice) == []
    task = assert_created(with_key(alice, "a"))
    assert task == task | BODY
    response = alice.request(**{"method": "POST", "url": "/api/tasks"} | request_options | {"headers": headers})
    assert response.status_code == status
    assert_created(with_key(alice, "a"), task)
    assert alice.tasks() == [task]


def test_a_creation_that_the_database_refuses_uses_no_key_up(database_url: str, start_service: StartService) -> None:
    service = start_service(database_url)
    service.wait_until_ready()
    service.sql("ALTER TABLE task ADD CONSTRAINT task_title_of_mine CHECK (title <> 'Buy milk')")
    with service.client("alice") as alice:
        assert with_key(alice, "a").status_code == 422
        assert with_key(alice, "a", BODY | {"title": "Buy bread"}).json()["title"] == "Buy bread"
        assert with_key(alice, "b").status_code == 422
        service.sql("ALTER TABLE task DROP CONSTRAINT task_title_of_mine")
        response = with_key(alice, "a")
        assert (response.status_code, response.json()) == (422, ANOTHER_BODY)
        assert_created(with_key(alice, "b"))
        assert [task["title"] for task in alice.tasks()] == ["Buy milk", "Buy bread"]


@pytest.mark.parametrize(("method", "action", "body", "changes"), [each for each in KINDS_OF_CHANGE if each.values[3]])
def test_a_repeated_creation_answers_with_the_task_as_it_is_now(
    alice: Client, method: str, action: str, body: object, changes: Task
) -> None:
    task = assert_created(with_key(alice, "a", {"title": "Buy milk"}))
    changed = alice.request(method, path_of(task) + action, json=body).json()
    assert changed == task | changes | {"updated_at": changed["updated_at"]}
    assert_created(with_key(alice, "a", {"title": "Buy milk"}), changed)
    assert alice.tasks() == [changed]
    if changes == {"title": "new"}:  # it is the body of the first time that counts
        response = with_key(alice, "a", {"title": "new"})
        assert (response.status_code, response.json()) == (422, ANOTHER_BODY)
    headers = if_match(changed)
    assert alice.put(path_of(task), json={"title": "last"}, headers=headers).status_code == 200


def test_a_key_makes_a_new_task_once_the_first_is_deleted(alice: Client, bob: Client) -> None:
    his = assert_created(with_key(bob, "a"))
    ids = set()
    for body in (BODY, BODY, {"title": "another"}):
        task = assert_created(with_key(alice, "a", body))
        ids.add(task["id"])
        assert_created(with_key(alice, "a", body), task)
        assert bob.delete(path_of(task)).status_code == 404
        assert_created(with_key(alice, "a", body), task)
        assert alice.tasks() == [task]
        assert alice.delete(path_of(task)).status_code == 204
        assert alice.get(path_of(task)).status_code == 404
    assert len(ids) == 3
    assert bob.tasks() == [his]


def test_a_key_of_somebody_else_tells_nothing(service: Service, alice: Client, bob: Client) -> None:
    """Whether alice has used it or not, bob's requests are answered alike, and hers too."""
    hers = assert_created(with_key(alice, "used"))
    before = service.rows(alice)
    for key in ("used", "unused"):
        first = with_key(bob, key, {"title": "his"})
        his = assert_created(first)
        assert his == first.json() | {"user_id": bob.user_id, "title": "his", "description": None, "completed": False}
        assert_created(with_key(bob, key, {"title": "his"}), his)
        response = with_key(bob, key)
        assert (response.status_code, response.json()) == (422, ANOTHER_BODY)
    assert service.rows(alice) == before
    assert_created(with_key(alice, "used"), hers)
    assert len(bob.tasks()) == 2
