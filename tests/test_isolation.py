"""Nobody reaches anybody else's tasks. The checks pass on the service, and fail for every statement that is broken."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable
from datetime import UTC
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import dict_row

from tests.service_process import ROOT, Client, Service, token
from tests.test_query_module import STATEMENTS, copy_query_module, import_query_module

Task = dict[str, Any]


# --- The checks: each takes a service, and makes users of its own on it ----------------------------------------------


def lookalikes() -> list[str]:
    """Return ids that a careless comparison takes for one another: a prefix, another case, padding, a pattern."""
    name = f"Ann-{uuid.uuid4().hex}"
    return [name, name + "2", name.lower(), name + " ", name[:-1] + "%"]


class Scene:
    """Users with two tasks each, one of them completed, put into the database of a service without its help."""

    def __init__(self, service: Service) -> None:
        self.client = service.client()
        self.connection = psycopg.connect(service.database_url, autocommit=True, row_factory=dict_row)
        self.users = lookalikes()
        for user_id in self.users:
            for title, completed in (("first", False), ("second", True)):
                self.insert(user_id, title, completed)

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()
        self.connection.close()

    def insert(self, user_id: str, title: str, completed: bool) -> None:
        statement = "INSERT INTO task (user_id, title, description, completed) VALUES (%s, %s, %s, %s)"
        self.connection.execute(statement, (user_id, title, f"of {user_id}", completed))

    def tasks(self) -> dict[int, Task]:
        """Return everybody's tasks by their ids, newest first, as the API is to show them."""
        tasks = self.connection.execute("SELECT * FROM task ORDER BY created_at DESC, id DESC").fetchall()
        for task in tasks:
            del task["idempotency_key"]
            for name in ("created_at", "updated_at"):
                task[name] = f"{task[name].astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}+00:00"
        return {task["id"]: task for task in tasks}

    def request(
        self, user_id: str, method: str, path: str, body: object = None, conditions: dict[str, str] | None = None
    ) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token(user_id)}"} | (conditions or {})
        return self.client.request(method, path, headers=headers, json=body)


def answer(response: httpx.Response) -> tuple[int, bytes, dict[str, str]]:
    """Return all of an answer that may not tell a stranger's task from none."""
    headers = {name: value for name, value in response.headers.items() if name not in ("date", "x-request-id")}
    return response.status_code, response.content, headers


def if_match(task: Task) -> dict[str, str]:
    return {"If-Match": f'"{task["updated_at"]}"'}


STALE = {"If-Match": '"2000-01-01T00:00:00.000000+00:00"'}


def check_one(service: Service, method: str, path: str, body: object, change: Callable[[Task], Task | None]) -> None:
    """Check a request for one task: its owner gets what `change` makes of it, a stranger what nobody has."""
    with Scene(service) as scene:
        before = scene.tasks()
        for user_id in scene.users:
            absent = scene.request(user_id, method, path.format(2**62), body)
            assert absent.status_code == 404
            assert absent.json() == {"detail": "Task not found"}
            for task_id, task in before.items():
                if task["user_id"] in set(scene.users) - {user_id}:
                    for conditions in ({}, if_match(task), STALE, {"If-Match": "*"}):
                        response = scene.request(user_id, method, path.format(task_id), body, conditions)
                        assert answer(response) == answer(absent)
            assert scene.tasks() == before

        for user_id in scene.users:
            own = [task for task in before.values() if task["user_id"] == user_id]
            for task, conditions in zip(own, ({}, if_match(own[1])), strict=True):
                expected = scene.tasks()
                task_id = task["id"]
                if method != "GET":
                    response = scene.request(user_id, method, path.format(task_id), body, STALE)
                    assert response.status_code == 412
                    assert scene.tasks() == expected
                response = scene.request(user_id, method, path.format(task_id), body, conditions)
                changed = change(expected.pop(task_id))
                found = scene.tasks()
                if changed is None:
                    assert response.status_code == 204
                else:
                    assert response.status_code == 200
                    assert response.json() == found[task_id]
                    if method != "GET":
                        assert found[task_id]["updated_at"] > changed["updated_at"]
                        changed["updated_at"] = found[task_id]["updated_at"]
                    expected[task_id] = changed
                assert found == expected


def check_get(service: Service) -> None:
    check_one(service, "GET", "/api/tasks/{}", None, lambda task: task)


def check_update(service: Service) -> None:
    body = {"title": "changed", "description": None, "id": 1, "user_id": "somebody else"}
    check_one(service, "PUT", "/api/tasks/{}", body, lambda task: task | {"title": "changed", "description": None})


def check_complete(service: Service) -> None:
    path = "/api/tasks/{}/complete"
    check_one(service, "PATCH", path, None, lambda task: task | {"completed": not task["completed"]})
    check_one(service, "PATCH", path, {"completed": True}, lambda task: task | {"completed": True})


def check_delete(service: Service) -> None:
    check_one(service, "DELETE", "/api/tasks/{}", None, lambda task: None)


def check_list(service: Service) -> None:
    with Scene(service) as scene:
        before = scene.tasks()
        for user_id in scene.users:
            for status, shown in (("all", {False, True}), ("pending", {False}), ("completed", {True})):
                response = scene.request(user_id, "GET", f"/api/tasks?status={status}&user_id=somebody")
                own = [task for task in before.values() if task["user_id"] == user_id and task["completed"] in shown]
                assert (response.status_code, response.json()) == (200, {"items": own})
        assert scene.tasks() == before


def check_create(service: Service) -> None:
    with Scene(service) as scene:
        for user_id, other in zip(scene.users, reversed(scene.users), strict=True):
            before = scene.tasks()
            task_id = next(iter(before))
            body = {"title": "new", "id": task_id, "user_id": other}
            response = scene.request(user_id, "POST", "/api/tasks", body)
            assert response.status_code == 201
            task = response.json()
            assert (task["user_id"], task["title"], task["description"]) == (user_id, "new", None)
            assert scene.tasks() == before | {task["id"]: task}
            assert task["id"] not in before

        key = {"Idempotency-Key": "one-for-all"}
        for user_id in scene.users:
            before = scene.tasks()
            response = scene.request(user_id, "POST", "/api/tasks", {"title": "keyed"}, key)
            assert response.status_code == 201
            task = response.json()
            assert (task["user_id"], task["title"], task["description"]) == (user_id, "keyed", None)
            assert task["id"] not in before
            after = before | {task["id"]: task}
            assert scene.tasks() == after
            response = scene.request(user_id, "POST", "/api/tasks", {"title": "keyed"}, key)
            assert (response.status_code, response.json()) == (201, task)
            assert scene.tasks() == after
            assert scene.request(user_id, "POST", "/api/tasks", {"title": "another"}, key).status_code == 422
            assert scene.tasks() == after


CHECKS = {
    "list_tasks.sql": check_list,
    "get_task.sql": check_get,
    "create_task.sql": check_create,
    "update_task.sql": check_update,
    "complete_task.sql": check_complete,
    "delete_task.sql": check_delete,
}


@pytest.mark.parametrize("check", CHECKS.values())
def test_nobody_reaches_the_tasks_of_anybody_else(service: Service, check: Callable[[Service], None]) -> None:
    check(service)


def test_an_id_that_two_users_have_names_a_task_of_each(service: Service, alice: Client, bob: Client) -> None:
    """Ids are unique within a user: a sharded database may give the same one out twice."""
    task_id = uuid.uuid4().int >> 70
    with psycopg.connect(service.database_url) as connection:
        for client in (alice, bob):
            statement = "INSERT INTO task (id, user_id, title) VALUES (%s, %s, %s)"
            connection.execute(statement, (task_id, client.user_id, client.user_id))
    path = f"/api/tasks/{task_id}"
    (untouched,) = bob.tasks()
    assert alice.get(path).json()["user_id"] == alice.user_id
    assert alice.put(path, json={"title": "hers"}).json()["title"] == "hers"
    assert alice.patch(f"{path}/complete").json()["completed"] is True
    assert alice.delete(path).status_code == 204
    assert bob.get(path).json() == untouched
    assert (alice.tasks(), bob.tasks()) == ([], [untouched])


# --- The statements, broken ------------------------------------------------------------------------------------------

# A name for each way, and what is written in the place of what. $1 stays in use, or PostgreSQL could not tell its type.
CALLER_BROKEN = {
    "dropped": {
        "user_id = $1": "$1::text IS NOT NULL",
        "VALUES ($1,": "VALUES (coalesce('somebody else', $1),",
    },
    "itself": {"user_id = $1": "user_id = user_id AND $1::text IS NOT NULL"},
    "not null": {"user_id = $1": "user_id IS NOT NULL AND $1::text IS NOT NULL"},
    "negated": {"user_id = $1": "user_id <> $1"},
    "less": {"user_id = $1": "user_id <= $1"},
    "more": {"user_id = $1": "user_id >= $1"},
    "or true": {"user_id = $1": "user_id = $1 OR true"},
    "or true in parentheses": {"user_id = $1": "(user_id = $1 OR true)"},
    "or the row": {
        "user_id = $1\n  AND id = $2": "user_id = $1 OR id = $2",
        "user_id = $1\n      AND {status}": "user_id = $1 OR {status}",
    },
    "prefix": {"user_id = $1": "starts_with(user_id, $1)", "VALUES ($1,": "VALUES (left($1, 12),"},
    "pattern": {"user_id = $1": "user_id LIKE $1"},
    "case": {"user_id = $1": "lower(user_id) = lower($1)", "VALUES ($1,": "VALUES (lower($1),"},
    "padding": {"user_id = $1": "btrim(user_id) = btrim($1)", "VALUES ($1,": "VALUES (btrim($1),"},
    "given away": {
        "UPDATE task\nSET ": "UPDATE task\nSET user_id = 'somebody else', ",
        "DO UPDATE SET ": "DO UPDATE SET user_id = 'somebody else ' || task.id, ",
    },
    "a second row": {"VALUES ($1, $2, $3, $4, $5)": "VALUES ($1, $2, $3, $4, $5), ('somebody else', $2, $3, $4, $5)"},
    "another parameter": {"VALUES ($1, $2, $3,": "VALUES ($3, $2, $1,"},
    "anybody's key": {"ON CONFLICT (user_id, ": "ON CONFLICT ("},
    "a key by case": {"ON CONFLICT (user_id, ": "ON CONFLICT (lower(user_id), "},
}
# A conflict has an index by which it is found.
INDEX_BROKEN = {
    "anybody's key": {"ON task (user_id, split_part(": "ON task (split_part("},
    "a key by case": {"ON task (user_id, split_part(": "ON task (lower(user_id), split_part("},
}

# These stay within one user, so that the rule of the query module has nothing against them.
ROW_BROKEN = {
    "id dropped": {"AND id = $2": "AND $2::bigint IS NOT NULL"},
    "id less": {"AND id = $2": "AND id <= $2"},
    "id more": {"AND id = $2": "AND id >= $2"},
    "version dropped": {"coalesce({version} = ANY(": "coalesce('' <> ALL("},
    "version negated": {"coalesce({version} = ANY(": "coalesce({version} <> ALL("},
    "key dropped": {"VALUES ($1, $2, $3, $4, $5)": "VALUES ($1, nullif($2, $2), $3, $4, $5)"},
    "body of the key dropped": {
        "WHERE task.idempotency_key = excluded.idempotency_key": "WHERE task.idempotency_key <> ''"
    },
}


def without_comments(name: str) -> str:
    return re.sub(r"(?m)^--.*\n", "", (ROOT / "sql" / name).read_text())


def mutants(name: str, ways: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the broken versions of a statement: one for each way, and for each place where it applies."""
    statement = without_comments(name)
    return {
        f"{way} {place}": statement[: found.start()] + new + statement[found.end() :]
        for way, replacements in ways.items()
        for old, new in replacements.items()
        for place, found in enumerate(re.finditer(re.escape(old), statement), 1)
    }


MUTANTS = {name: mutants(name, CALLER_BROKEN | ROW_BROKEN) for name in STATEMENTS}
UNBOUND = [(name, way) for name in STATEMENTS for way in mutants(name, CALLER_BROKEN)]
WAYS = list(dict.fromkeys(way for broken in MUTANTS.values() for way in broken))


def schema_for(way: str) -> dict[str, str]:
    """Return the schema that a way to break a statement needs, if it needs one of its own."""
    schema = (ROOT / "sql" / "schema.sql").read_text()
    for old, new in INDEX_BROKEN.get(way.rpartition(" ")[0], {}).items():
        assert schema.count(old) == 1
        return {"schema.sql": schema.replace(old, new)}
    return {}


def copy_project(folder: Path, statements: dict[str, str], *, rule: bool) -> Path:
    """Copy what the service runs from, with some statements replaced, and with the rule of the query module or not."""
    for name in ("service.py", "Procfile"):
        shutil.copy(ROOT / name, folder)
    module = copy_query_module(folder, statements) / "__init__.py"
    if not rule:
        text, found = re.subn(r"raise ValueError\(.*\)", "pass", module.read_text())
        assert found
        module.write_text(text)
    return folder


def test_every_statement_has_a_check_and_several_mutants() -> None:
    assert set(CHECKS) == set(STATEMENTS)
    assert [name for name in STATEMENTS if len(mutants(name, CALLER_BROKEN)) < 5] == []
    texts = [text for replacements in (CALLER_BROKEN | ROW_BROKEN).values() for text in replacements]
    assert [text for text in texts if not any(text in without_comments(name) for name in STATEMENTS)] == []


@pytest.mark.parametrize(("name", "way"), UNBOUND)
def test_the_query_module_refuses_each_mutant(tmp_path: Path, name: str, way: str) -> None:
    copy = copy_query_module(tmp_path, {name: MUTANTS[name][way]})
    with pytest.raises(ValueError, match=f"sql/{name}"):
        import_query_module(copy)


@pytest.mark.parametrize("name", STATEMENTS)
def test_the_service_does_not_start_with_a_mutant(
    start_service: Callable[..., Service], database_url: str, tmp_path: Path, name: str
) -> None:
    mutant = next(iter(MUTANTS[name].values()))
    service = start_service(database_url, folder=copy_project(tmp_path, {name: mutant}, rule=True), wait=False)
    assert service.process.wait(20) != 0
    assert f"sql/{name}" in service.log


def passes(check: Callable[[Service], None], service: Service) -> bool:
    try:
        check(service)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("way", ["not at all", *WAYS])
def test_a_check_fails_for_each_mutant_and_for_nothing_else(
    start_service: Callable[..., Service], database_url: str, tmp_path: Path, way: str
) -> None:
    """One copy of the service has every statement that can be broken in this way broken: no check needs two of them."""
    broken = {name: mutants[way] for name, mutants in MUTANTS.items() if way in mutants}
    service = start_service(database_url, folder=copy_project(tmp_path, broken | schema_for(way), rule=False))
    assert {name for name, check in CHECKS.items() if not passes(check, service)} == set(broken)
    errors = set(re.findall(r"^(?:asyncpg\.exceptions\.)?(\w+Error)", service.log, re.MULTILINE))
    # Where a mutant finds or makes several tasks instead of one. Any other error is of a mutant that proves nothing.
    assert errors <= {"CardinalityViolationError", "ValueError"}
