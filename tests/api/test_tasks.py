"""The six task endpoints: what each does, for its owner and for nobody else."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import psycopg
import pytest

from tests.support.errors import TASK_NOT_FOUND
from tests.support.service_process import Client, Service
from tests.support.tasks import (
    CHANGES,
    KINDS_OF_CHANGE,
    NO_CHANGE,
    NO_TASK,
    wait_for_waiting_statements,
    what_is_stable,
)

TEXTS = [
    pytest.param(text, id=name)
    for name, text in {
        "blanks and line breaks around": "\r\n  \u00a0milk \t\u3000\n",
        "zero-width characters alone": "\u200b\u200d\ufeff",
        "an emoji of seven characters": "👩\u200d👩\u200d👧\u200d👦",
        "a combining accent": "cafe\u0301",
        "line separators": "a\u2028b\u2029c\u0085d",
        "control characters": "\x01\x1f\x7f\x1b[31m",
        "quotes and backslashes": r"""it's "a" \u0000 \n \\ task""",
        "SQL and placeholders": "'; DROP TABLE task; -- $1 %s %(a)s {task} {0} :b ?",
        "words of JSON": "null",
        "non-characters": "\uffff\ufffe\U0010ffff",
    }.items()
]

# --- Creating --------------------------------------------------------------------------------------------------------


def test_a_new_task_is_returned_with_what_the_server_adds(alice: Client) -> None:
    response = alice.post("/api/tasks", json={"title": "Buy milk"})
    task = response.json()
    assert response.status_code == 201
    assert response.headers["location"] == f"/api/tasks/{task['id']}"
    assert task == {
        "id": task["id"],
        "user_id": alice.user_id,
        "title": "Buy milk",
        "description": None,
        "completed": False,
        "created_at": task["created_at"],
        "updated_at": task["created_at"],
    }


@pytest.mark.parametrize("completed", [True, False])
@pytest.mark.parametrize("description", ["Two litres", None])
def test_a_task_is_created_with_all_its_fields(alice: Client, description: str | None, completed: bool) -> None:
    fields: dict[str, Any] = {"title": "Buy milk", "description": description, "completed": completed}
    task = alice.create(**fields)
    assert {name: task[name] for name in fields} == fields
    assert alice.get(f"/api/tasks/{task['id']}").json() == task


def test_the_location_of_a_new_task_leads_to_it(alice: Client) -> None:
    response = alice.post("/api/tasks", json={"title": "Buy milk"})
    assert alice.get(response.headers["location"]).json() == response.json()


def test_each_new_task_has_an_id_of_its_own(alice: Client, bob: Client) -> None:
    ids = [client.create()["id"] for client in (alice, bob, alice, bob)]
    assert len(set(ids)) == 4
    assert all(type(task_id) is int and task_id > 0 for task_id in ids)


def test_a_task_is_created_now(alice: Client) -> None:
    created_at = datetime.fromisoformat(alice.create()["created_at"])
    assert abs(created_at.timestamp() - time.time()) < 60


def test_creating_a_task_touches_no_other(service: Service, alice: Client, bob: Client) -> None:
    alice.create("hers")
    bob.create("his")
    before = service.rows(alice, bob)
    task = bob.create("new")
    after = service.rows(alice, bob)
    assert [row for row in after if row not in before] == service.sql("SELECT * FROM task WHERE id = %s", task["id"])
    assert [row for row in before if row not in after] == []


# --- Reading ---------------------------------------------------------------------------------------------------------


def test_a_task_is_got_by_its_id(alice: Client) -> None:
    task, other = alice.create("one", description="Two litres", completed=True), alice.create("two")
    response = alice.get(f"/api/tasks/{task['id']}")
    assert (response.status_code, response.json()) == (200, task)
    assert alice.get(f"/api/tasks/{other['id']}").json() == other


def test_a_stranger_finds_a_task_as_absent_as_one_that_never_was(alice: Client, bob: Client) -> None:
    task = alice.create()
    response, never = bob.get(f"/api/tasks/{task['id']}"), bob.get(f"/api/tasks/{NO_TASK}")
    assert (response.status_code, response.json()) == (404, TASK_NOT_FOUND)
    assert (never.status_code, never.content) == (404, response.content)
    assert what_is_stable(never) == what_is_stable(response)


def test_a_new_user_has_no_tasks(alice: Client, bob: Client) -> None:
    alice.create()
    response = bob.get("/api/tasks")
    assert (response.status_code, response.json()) == (200, {"items": []})


def test_the_list_has_the_tasks_of_the_caller_alone(alice: Client, bob: Client) -> None:
    hers, his = [alice.create(), alice.create()], [bob.create(), bob.create()]
    assert alice.tasks() == hers[::-1]
    assert bob.tasks() == his[::-1]


@pytest.mark.parametrize(
    ("query", "titles"),
    [
        ("", ["done", "pending"]),
        ("?status=all", ["done", "pending"]),
        ("?status=", ["done", "pending"]),
        ("?status", ["done", "pending"]),
        ("?%73tatus=pendin%67", ["pending"]),
        ("?status=x&status=completed", ["done"]),
        ("?status=pending", ["pending"]),
        ("?status=completed", ["done"]),
    ],
)
def test_the_list_holds_the_tasks_of_a_status(alice: Client, bob: Client, query: str, titles: list[str]) -> None:
    for client in (alice, bob):
        client.create("pending")
        client.create("done", completed=True)
    tasks = alice.get(f"/api/tasks{query}").json()["items"]
    assert [task["title"] for task in tasks] == titles
    assert {task["user_id"] for task in tasks} == {alice.user_id}


def test_a_task_in_the_list_is_the_task_by_itself(alice: Client) -> None:
    task = alice.create("one", description="Two litres", completed=True)
    assert alice.tasks() == [alice.get(f"/api/tasks/{task['id']}").json()] == [task]


@pytest.mark.parametrize("status", ["all", "pending", "completed"])
def test_the_list_is_newest_first_and_by_id_where_that_is_a_tie(service: Service, alice: Client, status: str) -> None:
    a, b, c, d = (alice.create(completed=status == "completed")["id"] for _ in range(4))
    service.sql("UPDATE task SET created_at = '2026-01-01T00:00Z' WHERE id = ANY(%s)", [b, c])
    service.sql("UPDATE task SET created_at = '2027-01-01T00:00Z' WHERE id = %s", a)
    service.sql("UPDATE task SET created_at = '2025-01-01T00:00Z' WHERE id = %s", d)
    assert [task["id"] for task in alice.tasks(status)] == [a, c, b, d]


def test_a_change_moves_no_task_in_the_list(alice: Client) -> None:
    first, second = alice.create()["id"], alice.create()["id"]
    alice.put(f"/api/tasks/{first}", json={"title": "changed"})
    assert [task["id"] for task in alice.tasks()] == [second, first]


# --- Changing: what happens to the owner's task, and to no other ----------------------------------------------------


@pytest.mark.parametrize(("method", "action", "body", "changes"), [*CHANGES, NO_CHANGE])
def test_a_change_happens_to_one_task_of_its_owner(
    service: Service, alice: Client, method: str, action: str, body: object, changes: dict[str, Any] | None
) -> None:
    task, other = alice.create(description="Two litres"), alice.create(description="Another")
    response = alice.request(method, f"/api/tasks/{task['id']}{action}", json=body)
    if changes is None:
        assert (response.status_code, response.content) == (204, b"")
        assert alice.tasks() == [other]
    else:
        changed = task | changes | {"updated_at": response.json()["updated_at"]}
        assert (response.status_code, response.json()) == (200, changed)
        assert (changed["updated_at"] > task["updated_at"]) == (changes != {})
        assert abs(datetime.fromisoformat(changed["updated_at"]).timestamp() - time.time()) < 60
        assert alice.tasks() == [other, changed]


@pytest.mark.parametrize(("method", "action", "body", "changes"), KINDS_OF_CHANGE)
def test_a_change_by_a_stranger_finds_no_task_and_changes_none(
    service: Service, alice: Client, bob: Client, method: str, action: str, body: object, changes: object
) -> None:
    task = alice.create(description="Two litres")
    bob.create(description="Two litres")
    before = service.rows(alice, bob)
    response = bob.request(method, f"/api/tasks/{task['id']}{action}", json=body)
    never = bob.request(method, f"/api/tasks/{NO_TASK}{action}", json=body)
    assert (response.status_code, response.json()) == (404, TASK_NOT_FOUND)
    assert (never.status_code, never.content) == (404, response.content)
    assert what_is_stable(never) == what_is_stable(response)
    assert service.rows(alice, bob) == before


@pytest.mark.parametrize(("method", "action", "body", "changes"), KINDS_OF_CHANGE)
def test_a_deleted_task_is_gone_for_every_change(
    service: Service, alice: Client, method: str, action: str, body: object, changes: object
) -> None:
    task = alice.create()
    assert alice.delete(f"/api/tasks/{task['id']}").status_code == 204
    response = alice.request(method, f"/api/tasks/{task['id']}{action}", json=body)
    assert (response.status_code, response.json()) == (404, TASK_NOT_FOUND)
    assert service.rows(alice) == []


@pytest.mark.parametrize("body", [{}, {"id": 1, "updated_at": None, "colour": "red"}])
def test_a_put_of_no_field_of_a_task_changes_nothing(service: Service, alice: Client, body: dict[str, Any]) -> None:
    task = alice.create(description="Two litres", completed=True)
    before = service.rows(alice)
    response = alice.put(f"/api/tasks/{task['id']}", json=body)
    assert (response.status_code, response.json()) == (200, task)
    assert service.rows(alice) == before


def test_a_whole_task_can_be_sent_back(alice: Client) -> None:
    task = alice.create(description="Two litres")
    response = alice.put(f"/api/tasks/{task['id']}", json=task | {"completed": True})
    assert (response.status_code, response.json()) == (
        200,
        task | {"completed": True, "updated_at": response.json()["updated_at"]},
    )


@pytest.mark.parametrize("wanted", [True, False])
def test_a_put_sets_completed_of_a_completed_task(alice: Client, wanted: bool) -> None:
    task, other = alice.create(completed=True), alice.create(completed=True)
    response = alice.put(f"/api/tasks/{task['id']}", json={"completed": wanted})
    assert (response.status_code, response.json()["completed"]) == (200, wanted)
    assert alice.tasks() == [other, response.json()]


# --- Completing ------------------------------------------------------------------------------------------------------

TOGGLES = [
    pytest.param({}, id="no body"),
    pytest.param({"content": b"", "headers": {"Content-Type": "application/json"}}, id="an empty body as JSON"),
    pytest.param({"json": {}}, id="an empty object"),
    pytest.param({"content": b"null", "headers": {"Content-Type": "application/json"}}, id="null, as axios sends it"),
    pytest.param({"content": b" null\n"}, id="null without its media type"),
    pytest.param({"json": {"done": True}}, id="no known field"),
]


@pytest.mark.parametrize("request_options", TOGGLES)
def test_completing_toggles(alice: Client, request_options: dict[str, Any]) -> None:
    task, other = alice.create(), alice.create()
    path = f"/api/tasks/{task['id']}/complete"
    responses = [alice.patch(path, **request_options) for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 200, 200]
    assert [response.json()["completed"] for response in responses] == [True, False, True]
    assert alice.tasks() == [other, responses[-1].json()]


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_completing_with_a_body_sets(alice: Client, before: bool, wanted: bool) -> None:
    task = alice.create(completed=before)
    for _ in range(2):
        response = alice.patch(f"/api/tasks/{task['id']}/complete", json={"completed": wanted})
        assert (response.status_code, response.json()["completed"]) == (200, wanted)


def test_completing_changes_no_other_field(service: Service, alice: Client) -> None:
    task = alice.create("one", description="Two litres")
    alice.patch(f"/api/tasks/{task['id']}/complete", json={"completed": True, "title": "two", "description": None})
    [stored] = alice.tasks()
    assert stored == task | {"completed": True, "updated_at": stored["updated_at"]}


def test_two_toggles_at_once_are_both_done(service: Service, alice: Client) -> None:
    task = alice.create()
    with ThreadPoolExecutor(2) as threads, psycopg.connect(service.database_url) as connection:
        connection.execute("SELECT FROM task WHERE id = %s FOR UPDATE", [task["id"]])
        toggles = [threads.submit(alice.patch, f"/api/tasks/{task['id']}/complete") for _ in range(2)]
        wait_for_waiting_statements(service, 1)
        time.sleep(0.1)  # until the other one has come too; it waits for its turn
        connection.rollback()
        results = [toggle.result().json()["completed"] for toggle in toggles]
    assert sorted(results) == [False, True]
    assert alice.tasks()[0]["completed"] is False


# --- What is kept, and what is ignored -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_kept_as_sent(service: Service, alice: Client, text: str) -> None:
    fields = {"title": text, "description": text}
    created, put = alice.create(text, description=text), alice.create(description="Two litres")
    put = alice.put(f"/api/tasks/{put['id']}", json=fields).json()
    assert alice.tasks() == [put, created]
    for task in (created, put):
        assert (task["title"], task["description"]) == (text, text)
        assert service.sql("SELECT title, description FROM task WHERE id = %s", task["id"]) == [(text, text)]


@pytest.mark.parametrize("text", ["", " \t\n\u3000"], ids=ascii)
def test_a_blank_description_is_kept_as_sent(alice: Client, text: str) -> None:
    task = alice.create(description=text)
    assert task["description"] == text
    assert alice.put(f"/api/tasks/{task['id']}", json={"description": text}).json()["description"] == text


FOREIGN = {"id": 1, "created_at": "2000-01-01T00:00:00+00:00", "updated_at": "2000-01-01T00:00:00+00:00"}


def test_a_client_cannot_set_what_belongs_to_the_server_in_a_new_task(
    service: Service, alice: Client, bob: Client
) -> None:
    hers = alice.create("hers")
    before = service.rows(alice)
    task = bob.create("his", **FOREIGN | {"id": hers["id"], "user_id": alice.user_id})
    assert task["user_id"] == bob.user_id
    assert task["id"] != hers["id"]
    assert task["created_at"] > hers["created_at"]
    assert task["updated_at"] == task["created_at"]
    assert bob.tasks() == [task]
    assert service.rows(alice) == before


@pytest.mark.parametrize("name", ["id", "user_id", "created_at", "updated_at"])
def test_a_client_cannot_change_what_belongs_to_the_server(
    service: Service, alice: Client, bob: Client, name: str
) -> None:
    task, his = alice.create(), bob.create()
    before = service.rows(bob)
    foreign = FOREIGN | {"id": his["id"], "user_id": bob.user_id}
    response = alice.put(f"/api/tasks/{task['id']}", json={"title": "new", name: foreign[name]})
    assert response.status_code == 200
    assert response.json() == task | {"title": "new", "updated_at": response.json()["updated_at"]}
    assert response.json()["updated_at"] > task["updated_at"]
    assert alice.tasks() == [response.json()]
    assert service.rows(bob) == before


@pytest.mark.parametrize(
    "value",
    ["null", "1e300", "9" * 300, "[" * 50 + "]" * 50, r'{"title": 1, "\u0000": "\ud800"}', f'"{"x" * 5000}"'],
    ids=lambda value: value[:9],
)
def test_unknown_fields_are_ignored_whatever_they_hold(alice: Client, value: str) -> None:
    names = ("colour", "Title", "", r"\u0000", r"\ud800", "__proto__", "id", "user_id", "created_at", "updated_at")
    unknown = ", ".join(f'"{name}": {value}' for name in names)
    response = alice.post("/api/tasks", content=f'{{"title": "one", {unknown}}}')
    task = response.json()
    assert (response.status_code, task["title"], task["user_id"]) == (201, "one", alice.user_id)
    response = alice.put(f"/api/tasks/{task['id']}", content=f'{{{unknown}, "title": "two"}}')
    assert (response.status_code, response.json()["title"]) == (200, "two")
    response = alice.patch(f"/api/tasks/{task['id']}/complete", content=f'{{{unknown}, "title": {value}}}')
    completed = task | {"title": "two", "completed": True, "updated_at": response.json()["updated_at"]}
    assert (response.status_code, response.json()) == (200, completed)


@pytest.mark.parametrize(
    "query",
    ["limit=-1&offset=x&user_id=bob&id=1&task_id=1", "Status=pending", "status[]=pending", "?status=pending",
     "%00=%ff", "&&=;", "a=1&" * 10_000, "&" * 50_000],
    ids=lambda query: query[:20],
)  # fmt: skip
def test_unknown_query_parameters_are_ignored(alice: Client, query: str) -> None:
    task, done = alice.create(), alice.create(completed=True)
    path = f"/api/tasks/{task['id']}"
    assert alice.get(f"/api/tasks?{query}").json()["items"] == [done, task]
    assert alice.get(f"{path}?{query}").json() == task
    assert alice.put(f"{path}?{query}", json={}).json() == task
    assert alice.patch(f"{path}/complete?{query}").json()["completed"] is True
    assert alice.delete(f"{path}?{query}").status_code == 204
    assert alice.post(f"/api/tasks?{query}", json={"title": "new"}).json()["user_id"] == alice.user_id
