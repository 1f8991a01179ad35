"""Nobody reaches anybody else's tasks. The checks pass on the service, and fail for every statement that is broken."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from datetime import UTC
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import dict_row

from tests.support.copies import copy_program
from tests.support.fixtures import StartService
from tests.support.query_module import STATEMENTS, import_query_module
from tests.support.service_process import ROOT, Client, Service, token

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

    def insert_many(self, user_id: str, count: int) -> None:
        """Insert every other one completed, many in the same microsecond, and the later ones of an earlier time."""
        statement = """
            INSERT INTO task (user_id, title, completed, created_at)
            SELECT %s, 'task ' || number, number %% 2 = 0, now() - number / 200 * interval '1 second'
            FROM generate_series(1, %s) AS number
        """
        self.connection.execute(statement, (user_id, count))

    def tasks(self) -> dict[int, Task]:
        """Return everybody's tasks by their ids, newest first, as the API is to show them."""
        tasks = self.connection.execute("SELECT * FROM task ORDER BY created_at DESC, id DESC").fetchall()
        for task in tasks:
            del task["idempotency_key"], task["request_hash"]
            for name in ("created_at", "updated_at"):
                task[name] = task[name].astimezone(UTC).isoformat()
        return {task["id"]: task for task in tasks}

    def request(
        self, user_id: str, method: str, path: str, body: object = None, conditions: dict[str, str] | None = None
    ) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token(user_id)}"} | (conditions or {})
        return self.client.request(method, path, headers=headers, json=body)

    def list(self, user_id: str, query: str) -> object:
        """Return the JSON of a list; fail if it does not end."""
        headers = {"Authorization": f"Bearer {token(user_id)}"}
        body = b""
        with self.client.stream("GET", f"/api/tasks?{query}", headers=headers) as response:
            assert response.status_code == 200
            for part in response.iter_bytes():
                body += part
                assert len(body) <= 2**20
        return json.loads(body)


def answer(response: httpx.Response) -> tuple[int, bytes, dict[str, str]]:
    """Return all of an answer that may not tell a stranger's task from none."""
    headers = {name: value for name, value in response.headers.items() if name not in ("date", "x-request-id")}
    return response.status_code, response.content, headers


def if_match(task: Task) -> dict[str, str]:
    return {"If-Match": f'"{task["updated_at"]}"'}


STALE = {"If-Match": '"2000-01-01T00:00:00+00:00"'}
LATER = {"If-Match": '"2999-01-01T00:00:00+00:00"'}


def check_one(service: Service, method: str, path: str, body: object, change: Callable[[Task], Task | None]) -> None:
    """Check a request for one task: its owner gets what `change` makes of it, a stranger what nobody has."""
    with Scene(service) as scene:
        before = scene.tasks()
        for user_id in scene.users:
            absent = scene.request(user_id, method, path.format(2**62), body)
            assert absent.status_code == 404
            assert absent.json() == {"detail": "Task not found"}
            for task_id, task in before.items():
                if task["user_id"] in set(scene.users) - {user_id} and task["title"] == "first":
                    for conditions in ({}, if_match(task), STALE, LATER, {"If-Match": "*"}):
                        response = scene.request(user_id, method, path.format(task_id), body, conditions)
                        assert answer(response) == answer(absent)
            assert scene.tasks() == before

        for user_id in scene.users:
            own = [task for task in before.values() if task["user_id"] == user_id]
            for task, conditions in zip(own, ({}, if_match(own[1])), strict=True):
                expected = scene.tasks()
                task_id = task["id"]
                for other_version in () if method == "GET" else (STALE, LATER):
                    response = scene.request(user_id, method, path.format(task_id), body, other_version)
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


def check_list(service: Service, *statuses: str) -> None:
    """Check lists that fill one page and lists that fill several, with tasks of one moment across their borders."""
    with Scene(service) as scene:
        scene.insert_many(scene.users[2], 900)
        before = scene.tasks()
        for user_id in scene.users:
            own = [task for task in before.values() if task["user_id"] == user_id]
            shown = {
                "all": own,
                "pending": [task for task in own if not task["completed"]],
                "completed": [task for task in own if task["completed"]],
            }
            for status in statuses:
                found = scene.list(user_id, f"status={status}&user_id=somebody")
                if found != {"items": shown[status]}:  # outside of an assert, which would write down the difference
                    raise AssertionError(user_id, status)
        assert scene.tasks() == before


def check_list_all(service: Service) -> None:
    check_list(service, "all")


def check_list_by_status(service: Service) -> None:
    check_list(service, "pending", "completed")


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


def check_key(service: Service) -> None:
    """Check that a key gives its own task again to each user, when all of them have used it, and others beside it."""
    with Scene(service) as scene:
        made = {}
        for key, users in (("b", scene.users), ("a", reversed(scene.users)), ("c", scene.users)):
            for user_id in users:
                response = scene.request(user_id, "POST", "/api/tasks", {"title": "keyed"}, {"Idempotency-Key": key})
                assert response.status_code == 201
                made[user_id, key] = response.json()
        assert len({task["id"] for task in made.values()}) == len(made)
        before = scene.tasks()
        for (user_id, key), task in made.items():
            response = scene.request(user_id, "POST", "/api/tasks", {"title": "keyed"}, {"Idempotency-Key": key})
            assert (response.status_code, response.json()) == (201, task)
            assert task["user_id"] == user_id
            response = scene.request(user_id, "POST", "/api/tasks", {"title": "another"}, {"Idempotency-Key": key})
            assert response.status_code == 422
        assert scene.tasks() == before


CHECKS = {
    "list_tasks.sql": check_list_all,
    "list_tasks_by_status.sql": check_list_by_status,
    "get_task.sql": check_get,
    "create_task.sql": check_create,
    "get_task_by_key.sql": check_key,
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
    "more": {
        "user_id = $1": "user_id >= $1",
        # In the order of the index the caller's own row would come first, and the first one is taken.
        "user_id = $1\n  AND idempotency_key = $3": "user_id >= $1 AND idempotency_key = $3 ORDER BY user_id DESC",
    },
    "or true": {"user_id = $1": "user_id = $1 OR true"},
    "or true in parentheses": {"user_id = $1": "(user_id = $1 OR true)"},
    "or the next condition": {"user_id = $1\n  AND ": "user_id = $1 OR "},
    "prefix": {"user_id = $1": "starts_with(user_id, $1)", "VALUES ($1,": "VALUES (left($1, 12),"},
    "pattern": {"user_id = $1": "user_id LIKE $1"},
    "case": {"user_id = $1": "lower(user_id) = lower($1)", "VALUES ($1,": "VALUES (lower($1),"},
    "padding": {"user_id = $1": "btrim(user_id) = btrim($1)", "VALUES ($1,": "VALUES (btrim($1),"},
    "given away": {
        "UPDATE task\nSET ": "UPDATE task\nSET user_id = 'somebody else', ",
        "DO NOTHING": "DO UPDATE SET user_id = 'somebody else ' || task.id",
    },
    "a second row": {
        "VALUES ($1, $3, $4, $5, $6, $7)": "VALUES ($1, $3, $4, $5, $6, $7), ('somebody else', $3, $4, $5, $6, $7)",
    },
    "another parameter": {"VALUES ($1, $3, $4, $5,": "VALUES ($5, $3, $4, $1,"},
    "anybody's key": {"ON CONFLICT (user_id, ": "ON CONFLICT ("},
    "a key by case": {"ON CONFLICT (user_id, ": "ON CONFLICT (lower(user_id), "},
}
# A conflict has an index by which it is found.
INDEX_BROKEN = {
    "anybody's key": {"ON task (user_id, idempotency_key)": "ON task (idempotency_key)"},
    "a key by case": {"ON task (user_id, idempotency_key)": "ON task (lower(user_id), idempotency_key)"},
}

# These stay within one user, so that the rule of the query module has nothing against them.
PAGE = "AND (created_at, id) < ($3, $4)"
ORDER = "ORDER BY created_at DESC, id DESC"
ROW_BROKEN = {
    "id dropped": {"AND id = $3": "AND $3::bigint IS NOT NULL"},
    "id less": {"AND id = $3": "AND id <= $3"},
    "id more": {"AND id = $3": "AND id >= $3"},
    "version dropped": {"coalesce(updated_at = ANY($4), true)": "coalesce($4::timestamptz[] IS NOT NULL, true)"},
    "version negated": {"coalesce(updated_at = ANY(": "coalesce(updated_at <> ALL("},
    "version less": {"coalesce(updated_at = ANY(": "coalesce(updated_at <= ANY("},
    "version more": {"coalesce(updated_at = ANY(": "coalesce(updated_at >= ANY("},
    "no version is none": {"= ANY($4), true)": "= ANY($4), false)"},
    "key dropped": {
        "VALUES ($1, $3, $4,": "VALUES ($1, nullif($3, $3), $4,",
        "AND idempotency_key = $3": "AND $3::text IS NOT NULL",
    },
    "key negated": {"AND idempotency_key = $3": "AND idempotency_key <> $3"},
    "key less": {"AND idempotency_key = $3": "AND idempotency_key <= $3"},
    "hash dropped": {
        "VALUES ($1, $3, $4,": "VALUES ($1, $3, nullif($4, $4),",
        "request_hash = $4 AS": "$4::text IS NOT NULL AS",
    },
    "conflict that changes": {
        "DO NOTHING": "DO UPDATE SET title = excluded.title, request_hash = excluded.request_hash"
    },
    "status dropped": {"AND completed = $6": "AND $6::boolean IS NOT NULL"},
    "status negated": {"AND completed = $6": "AND completed <> $6"},
    "status less": {"AND completed = $6": "AND completed <= $6"},
    "page dropped": {PAGE: "AND $3::timestamptz IS NOT NULL AND $4::bigint IS NOT NULL"},
    "page with the last task again": {PAGE: PAGE.replace("<", "<=")},
    "page before": {PAGE: PAGE.replace("<", ">")},
    "page by the time": {PAGE: "AND created_at < $3 AND $4::bigint IS NOT NULL"},
    "page by the time and the last moment again": {PAGE: "AND created_at <= $3 AND $4::bigint IS NOT NULL"},
    "page by the id": {PAGE: "AND id < $4 AND $3::timestamptz IS NOT NULL"},
    "page by each": {PAGE: "AND created_at <= $3 AND id < $4"},
    "order by the id": {ORDER: "ORDER BY id DESC"},
    "order by the time": {ORDER: "ORDER BY created_at DESC, id"},
    "order backwards": {ORDER: "ORDER BY created_at, id"},
    "order of the last change": {ORDER: "ORDER BY updated_at DESC, id DESC"},
    "limit less": {"LIMIT $5": "LIMIT $5 - 1"},
    "limit more": {"LIMIT $5": "LIMIT $5 + 1"},
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
UNBOUND = {name: mutants(name, CALLER_BROKEN) for name in STATEMENTS}
# The others are only other texts for one of these, which matters to the rule of the query module and to no answer.
SAME_ROWS = ("itself", "not null", "or true in parentheses")
WAYS = [
    way
    for way in dict.fromkeys(way for broken in MUTANTS.values() for way in broken)
    if way.rpartition(" ")[0] not in SAME_ROWS
]

LOOKUPS = {"get_task.sql", "get_task_by_key.sql"}
"""What a change sends that has found no row, and a creation whose key is taken: the checks of those need these too."""


def broken_in(way: str, *, lookups: bool) -> dict[str, str]:
    """Return the mutants of a way by their statements: of those that other statements need, or of the others."""
    return {name: broken[way] for name, broken in MUTANTS.items() if way in broken and (name in LOOKUPS) == lookups}


RUNS = [(way, lookups) for way in WAYS for lookups in (True, False) if broken_in(way, lookups=lookups)]


def schema_for(way: str) -> dict[str, str]:
    """Return the schema that a way to break a statement needs, if it needs one of its own."""
    schema = (ROOT / "sql" / "schema.sql").read_text()
    for old, new in INDEX_BROKEN.get(way.rpartition(" ")[0], {}).items():
        assert schema.count(old) == 1
        return {"schema.sql": schema.replace(old, new)}
    return {}


def copy_with_mutants(folder: Path, statements: dict[str, str], *, rule: bool, comparison: bool) -> Path:
    """Copy the program with some statements replaced, and with what the query module has against them.

    That is the rule for their texts, and the comparison of each row's user with the caller.
    """
    module = copy_program(folder, {f"sql/{name}": text for name, text in statements.items()}) / "sql" / "__init__.py"
    for kept, error in ((rule, "ValueError"), (comparison, "RuntimeError")):
        text, found = re.subn(rf"raise {error}\(.*\)", "pass", module.read_text())
        assert found == 1
        if not kept:
            module.write_text(text)
    return folder


def test_every_statement_has_a_check_and_several_mutants() -> None:
    assert set(CHECKS) == set(STATEMENTS)
    assert [name for name in STATEMENTS if len(UNBOUND[name]) < 5] == []
    texts = [text for replacements in (CALLER_BROKEN | ROW_BROKEN).values() for text in replacements]
    assert [text for text in texts if not any(text in without_comments(name) for name in STATEMENTS)] == []


@pytest.mark.parametrize("name", STATEMENTS)
def test_every_clause_that_chooses_rows_has_a_mutant(name: str) -> None:
    clauses = re.findall(r"(?m)^ *(?:VALUES|ON CONFLICT|WHERE|AND|ORDER BY|LIMIT) .*$", without_comments(name))
    assert len(clauses) >= 2
    for clause in clauses:
        assert any(clause not in mutant.splitlines() for mutant in MUTANTS[name].values()), clause


def accepted(folder: Path, name: str, mutant: str) -> bool:
    """Return whether the query module accepts a statement in the place of another."""
    folder.mkdir()
    copy_program(folder, {f"sql/{name}": mutant})
    try:
        import_query_module(folder)
    except ValueError as error:
        return f"sql/{name}" not in str(error)
    return True


@pytest.mark.parametrize("name", STATEMENTS)
def test_the_query_module_refuses_each_mutant(tmp_path: Path, name: str) -> None:
    assert [way for way, mutant in UNBOUND[name].items() if accepted(tmp_path / way, name, mutant)] == []
    assert accepted(tmp_path / "none", name, without_comments(name))


@pytest.mark.parametrize("name", STATEMENTS)
def test_the_service_does_not_start_with_a_mutant(
    start_service: StartService, database_url: str, tmp_path: Path, name: str
) -> None:
    mutant = next(iter(MUTANTS[name].values()))
    folder = copy_with_mutants(tmp_path, {name: mutant}, rule=True, comparison=True)
    service = start_service(database_url, folder=folder, wait=False)
    assert service.process.wait(20) != 0
    assert f"sql/{name}" in service.log


def passes(check: Callable[[Service], None], service: Service) -> bool:
    try:
        check(service)
    except AssertionError:
        return False
    return True


def errors(service: Service) -> list[str]:
    """Return the errors in the log that a traceback ends with."""
    return re.findall(r"^(?:[a-z_]+\.)*(\w+(?:Error|Exception): .*)", service.log, re.MULTILINE)


@pytest.mark.parametrize(("way", "lookups"), RUNS)
def test_each_mutant_is_caught_by_the_check_of_its_statement(
    start_service: StartService, database_url: str, tmp_path: Path, way: str, lookups: bool
) -> None:
    """One copy of the service has every statement broken that can be in this way, but for those that these need."""
    broken = broken_in(way, lookups=lookups)
    folder = copy_with_mutants(tmp_path, broken | schema_for(way), rule=False, comparison=False)
    service = start_service(database_url, folder=folder)
    service.wait_until_ready()
    assert [name for name in broken if passes(CHECKS[name], service)] == []
    assert errors(service) == []  # of PostgreSQL: such a mutant would prove nothing


def test_no_check_fails_for_a_copy_without_a_mutant(
    start_service: StartService, database_url: str, tmp_path: Path
) -> None:
    service = start_service(database_url, folder=copy_with_mutants(tmp_path, {}, rule=False, comparison=False))
    service.wait_until_ready()
    assert [name for name, check in CHECKS.items() if not passes(check, service)] == []


# --- The comparison of each row with the caller ----------------------------------------------------------------------

FOREIGN = "RuntimeError: a statement has returned a row of somebody else"


# Without an index of its own a conflict that is broken finds no row at all.
FOREIGN_RUNS = [
    (way, lookups) for way, lookups in RUNS if way.rpartition(" ")[0] in CALLER_BROKEN.keys() - INDEX_BROKEN.keys()
]


def requests(name: str, ids: list[int]) -> list[tuple[str, str, object]]:
    """Return requests that send a statement: method, path, body."""
    keyed: list[tuple[str, str, object]] = [("POST", "/api/tasks", {"title": title}) for title in ("keyed", "another")]
    found: dict[str, list[tuple[str, str, object]]] = {
        "list_tasks.sql": [("GET", "/api/tasks", None)],
        "list_tasks_by_status.sql": [("GET", f"/api/tasks?status={each}", None) for each in ("pending", "completed")],
        "create_task.sql": keyed,
        "get_task_by_key.sql": keyed,
        "get_task.sql": [("GET", f"/api/tasks/{task_id}", None) for task_id in ids],
        "update_task.sql": [("PUT", f"/api/tasks/{task_id}", {"title": "changed"}) for task_id in ids],
        "complete_task.sql": [("PATCH", f"/api/tasks/{task_id}/complete", None) for task_id in ids],
        "delete_task.sql": [("DELETE", f"/api/tasks/{task_id}", None) for task_id in ids],
    }
    return found[name]


@pytest.mark.parametrize(("way", "lookups"), FOREIGN_RUNS)
def test_a_row_that_a_mutant_finds_of_somebody_else_is_an_error_and_no_answer(
    start_service: StartService, database_url: str, tmp_path: Path, way: str, lookups: bool
) -> None:
    broken = broken_in(way, lookups=lookups)
    service = start_service(database_url, folder=copy_with_mutants(tmp_path, broken, rule=False, comparison=True))
    service.wait_until_ready()
    for name in broken:
        statuses = []
        with Scene(service) as scene:
            # The tasks of the others first, or a user could have deleted what is to be found of it.
            for own in (False, True):
                for user_id in scene.users:
                    ids = [task_id for task_id, task in scene.tasks().items() if (task["user_id"] == user_id) == own]
                    key = {"Idempotency-Key": "one-for-all"} if own or name == "get_task_by_key.sql" else {}
                    for method, path, body in requests(name, ids):
                        response = scene.request(user_id, method, path, body, key)
                        shown = [json.loads(each) for each in re.findall(r'"user_id":("[^"]*")', response.text)]
                        assert set(shown) <= {user_id}
                        statuses.append(response.status_code)
                        if response.status_code == 500:
                            assert response.json() == {"detail": "Internal Server Error"}
        assert 500 in statuses, name
    assert set(errors(service)) == {FOREIGN}


def test_a_row_that_a_mutant_finds_of_somebody_else_ends_a_list_that_has_begun(
    start_service: StartService, database_url: str, tmp_path: Path
) -> None:
    mutant = without_comments("list_tasks.sql").replace("user_id = $1", "(user_id = $1 OR created_at < '2001-01-01')")
    folder = copy_with_mutants(tmp_path, {"list_tasks.sql": mutant}, rule=False, comparison=True)
    service = start_service(database_url, folder=folder)
    service.wait_until_ready()
    with Scene(service) as scene:
        user_id, other = scene.users[:2]
        scene.insert_many(user_id, 1500)
        old = "INSERT INTO task (user_id, title, created_at) VALUES (%s, 'a secret', '2000-01-01 00:00Z')"
        scene.connection.execute(old, (other,))
        parts: list[bytes] = []
        headers = {"Authorization": f"Bearer {token(user_id)}"}
        with scene.client.stream("GET", "/api/tasks", headers=headers) as response:
            assert response.status_code == 200
            with pytest.raises(httpx.RemoteProtocolError):
                parts.extend(response.iter_raw())
    received = b"".join(parts)
    assert received.startswith(b'{"items":[{"id":')
    assert not received.endswith(b"]}")
    assert set(re.findall(rb'"user_id":"([^"]*)"', received)) == {user_id.encode()}
    assert b"a secret" not in received
    assert errors(service)[-1] == FOREIGN
