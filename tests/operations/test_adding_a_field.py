"""The README's way to add a field, made in a copy of the project: the field works, and all else still does.

One copy adds a date that may be null, which the README tells. The same edits add an integer with limits and a default.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.support.copies import copy_committed
from tests.support.readme import README
from tests.support.service_process import Client, Service, environment, new_user_id

DUE_DATE = """\
--- a/service.py
+++ b/service.py
@@
     "completed": {"type": "boolean", "examples": [True]},
+    "due_date": {"type": ["string", "null"], "format": "date", "examples": ["2026-01-31", None]},
 }
--- a/sql/database.py
+++ b/sql/database.py
@@
-COLUMNS = ("id", "user_id", "title", "description", "completed", "created_at", "updated_at")
+COLUMNS = ("id", "user_id", "title", "description", "completed", "due_date", "created_at", "updated_at")
--- a/sql/schema.sql
+++ b/sql/schema.sql
@@
+-- Tables that were there before get it too.
+ALTER TABLE task ADD COLUMN IF NOT EXISTS due_date date;
+
 -- The pages of a list are read off these two, in their order: all tasks, and those of one status.
--- a/sql/create_task.sql
+++ b/sql/create_task.sql
@@
-INSERT INTO task (user_id, idempotency_key, request_hash, title, description, completed)
-VALUES ($1, $3, $4, $5, $6, $7)
+INSERT INTO task (user_id, idempotency_key, request_hash, title, description, completed, due_date)
+VALUES ($1, $3, $4, $5, $6, $7, $8)
--- a/sql/update_task.sql
+++ b/sql/update_task.sql
@@
     completed = CASE WHEN $9 THEN $10 ELSE completed END,
+    due_date = CASE WHEN $11 THEN $12 ELSE due_date END,
"""

PRIORITY = """\
--- a/service.py
+++ b/service.py
@@
     "completed": {"type": "boolean", "examples": [True]},
+    "priority": {"type": "integer", "minimum": 1, "maximum": 5, "examples": [3]},
 }
-DEFAULTS = {"completed": False}  # of a new task; the other fields default to null
+DEFAULTS = {"completed": False, "priority": 3}  # of a new task; the other fields default to null
--- a/sql/database.py
+++ b/sql/database.py
@@
-COLUMNS = ("id", "user_id", "title", "description", "completed", "created_at", "updated_at")
+COLUMNS = ("id", "user_id", "title", "description", "completed", "priority", "created_at", "updated_at")
--- a/sql/schema.sql
+++ b/sql/schema.sql
@@
+ALTER TABLE task ADD COLUMN IF NOT EXISTS priority integer NOT NULL DEFAULT 3
+    CONSTRAINT task_priority CHECK (priority BETWEEN 1 AND 5);
+
 -- The pages of a list are read off these two, in their order: all tasks, and those of one status.
--- a/sql/create_task.sql
+++ b/sql/create_task.sql
@@
-INSERT INTO task (user_id, idempotency_key, request_hash, title, description, completed)
-VALUES ($1, $3, $4, $5, $6, $7)
+INSERT INTO task (user_id, idempotency_key, request_hash, title, description, completed, priority)
+VALUES ($1, $3, $4, $5, $6, $7, $8)
--- a/sql/update_task.sql
+++ b/sql/update_task.sql
@@
     completed = CASE WHEN $9 THEN $10 ELSE completed END,
+    priority = CASE WHEN $11 THEN $12 ELSE priority END,
"""
TESTS = ["tests/api/test_tasks.py", "tests/api/test_openapi.py"]


def changed(file: Path, hunks: str) -> str:
    """Return the text of a file after the changes of a diff, each of which has to fit exactly one place."""
    text = file.read_text()
    for hunk in re.split(r"^@@\n", hunks, flags=re.MULTILINE)[1:]:
        before, after = (
            "".join(line[1:] + "\n" for line in hunk.splitlines() if line[:1] in kept) for kept in (" -", " +")
        )
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


def copy_with(diff: str, folder: Path) -> Path:
    """Copy the project and make the changes of a diff in the copy."""
    copy_committed(folder)
    for name, hunks in re.findall(r"^--- a/.*\n\+\+\+ b/(.*)\n((?:.*\n)*?)(?=^--- |\Z)", diff, re.MULTILINE):
        (folder / name).write_text(changed(folder / name, hunks))
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the project in which tasks have a due date."""
    folder = copy_with(DUE_DATE, tmp_path_factory.mktemp("with-a-due-date"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def other_project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy in which they have a priority."""
    folder = copy_with(PRIORITY, tmp_path_factory.mktemp("with-a-priority"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def service(project: Path, new_database: Callable[[], str]) -> Iterator[Service]:
    yield from running(project, new_database())


@pytest.fixture(scope="module")
def other_service(other_project: Path, new_database: Callable[[], str]) -> Iterator[Service]:
    yield from running(other_project, new_database())


@pytest.fixture
def carol(other_service: Service) -> Iterator[Client]:
    """A client whose tasks have a priority; those of `alice` have a due date."""
    with other_service.client(new_user_id()) as client:
        yield client


def running(folder: Path, database_url: str) -> Iterator[Service]:
    service = Service(database_url, folder=folder)
    service.wait_until_ready()
    yield service
    service.remove()


def test_the_readme_tells_these_edits() -> None:
    [section] = re.findall(r"^\*\*Adding a field\*\*.*?(?=^## )", README, re.MULTILINE | re.DOTALL)
    files = re.findall(r"^[0-9]\. `([^`]+)`", section, re.MULTILINE)
    assert files == re.findall("^--- a/(.*)", DUE_DATE, re.MULTILINE)
    told = [code for code in re.findall("`([^`]+)`", section) if "due_date" in code and " " in code]
    assert len(told) == 3
    for code in told:
        assert code in DUE_DATE


def test_it_takes_five_edits() -> None:
    for diff in (DUE_DATE, PRIORITY):
        assert re.findall("^--- a/(.*)", diff, re.MULTILINE) == [
            "service.py", "sql/database.py", "sql/schema.sql", "sql/create_task.sql", "sql/update_task.sql"
        ]  # fmt: skip
        assert len(re.findall("^@@", diff, re.MULTILINE)) == 5


# --- A date that may be null -----------------------------------------------------------------------------------------


def test_a_date_is_stored_changed_and_cleared(alice: Client) -> None:
    task = alice.create("Buy milk", due_date="2026-01-31")
    assert task["due_date"] == "2026-01-31"
    path = f"/api/tasks/{task['id']}"
    assert alice.get(path).json() == task
    assert alice.tasks() == [task]
    moved = alice.put(path, json={"due_date": "2026-02-28"}).json()
    assert moved == task | {"due_date": "2026-02-28", "updated_at": moved["updated_at"]}
    assert moved["updated_at"] > task["updated_at"]
    assert alice.put(path, json={"title": "Buy more milk"}).json()["due_date"] == "2026-02-28"
    assert alice.patch(f"{path}/complete").json()["due_date"] == "2026-02-28"
    assert alice.put(path, json={"due_date": None}).json()["due_date"] is None
    assert alice.create("Buy bread")["due_date"] is None
    assert alice.create("Buy jam", due_date=None)["due_date"] is None


@pytest.mark.parametrize("date", ["0001-01-01", "2024-02-29", "9999-12-31"])
def test_every_date_comes_back_as_it_was_sent(alice: Client, date: str) -> None:
    task = alice.create(due_date=date)
    assert task["due_date"] == date
    assert alice.tasks() == [task]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "must be a string or null"),
        (True, "must be a string or null"),
        ("soon", "must be a date like 2026-01-31"),
        ("", "must be a date like 2026-01-31"),
        ("2026-02-30", "must be a date like 2026-01-31"),
        ("2026-2-3", "must be a date like 2026-01-31"),
        ("20260203", "must be a date like 2026-01-31"),
        ("2026-W05-2", "must be a date like 2026-01-31"),
        ("2026-02-03 ", "must be a date like 2026-01-31"),
        ("2026-02-03T00:00:00Z", "must be a date like 2026-01-31"),
        ("\uff12\uff10\uff12\uff16-02-03", "must be a date like 2026-01-31"),
        ("2026-02-03\0", "must be a date like 2026-01-31"),
    ],
)
def test_a_wrong_date_is_told(alice: Client, value: object, message: str) -> None:
    task = alice.create("Buy milk")
    for method, path in (("POST", "/api/tasks"), ("PUT", f"/api/tasks/{task['id']}")):
        response = alice.request(method, path, json={"title": "Buy bread", "due_date": value})
        assert (response.status_code, response.json()) == (
            422,
            {"detail": f"due_date {message}", "errors": [{"field": "due_date", "message": message}]},
        )
    assert alice.tasks() == [task]


def test_a_key_is_for_one_date(alice: Client) -> None:
    key = {"Idempotency-Key": "k"}
    body = {"title": "Buy milk", "due_date": "2026-01-31"}
    first = alice.post("/api/tasks", json=body, headers=key)
    assert first.status_code == 201
    assert alice.post("/api/tasks", json=body, headers=key).json() == first.json()
    for other in ({"due_date": "2026-02-01"}, {"due_date": None}, {}):
        assert alice.post("/api/tasks", json={"title": "Buy milk"} | other, headers=key).status_code == 422
    assert alice.tasks() == [first.json()]


def schemas_of(service: Service) -> dict[str, Any]:
    schemas: dict[str, Any] = httpx.get(f"{service.url}/openapi.json").json()["components"]["schemas"]
    return schemas


def test_a_date_is_documented(service: Service) -> None:
    schemas = schemas_of(service)
    for name in ("Task", "NewTask", "TaskChanges"):
        published = schemas[name]["properties"]["due_date"]
        assert (published["type"], published["format"]) == (["string", "null"], "date")
    assert "due_date" in schemas["Task"]["required"]
    assert "due_date" not in schemas["NewTask"]["required"]
    errors = schemas["ValidationError"]["properties"]["errors"]
    assert "due_date" in errors["items"]["properties"]["field"]["enum"]


# --- An integer that has limits and a default ------------------------------------------------------------------------


def test_an_integer_is_stored_and_changed(carol: Client) -> None:
    task = carol.create("Buy milk", priority=1)
    assert type(task["priority"]) is int
    assert task["priority"] == 1
    path = f"/api/tasks/{task['id']}"
    assert carol.get(path).json() == task
    assert carol.tasks() == [task]
    assert carol.put(path, json={"priority": 5}).json()["priority"] == 5
    assert carol.put(path, json={"title": "Buy more milk"}).json()["priority"] == 5
    assert carol.patch(f"{path}/complete").json()["priority"] == 5


def test_a_new_task_without_it_has_the_default(carol: Client) -> None:
    assert carol.create("Buy milk")["priority"] == 3
    assert carol.create("Buy bread", priority=3)["priority"] == 3
    assert [task["priority"] for task in carol.tasks()] == [3, 3]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "must be from 1 to 5"),
        (9, "must be from 1 to 5"),
        (-(10**30), "must be from 1 to 5"),
        (2.5, "must be an integer"),
        ("3", "must be an integer"),
        (True, "must be an integer"),
        (None, "must be an integer"),
        ([3], "must be an integer"),
    ],
)
def test_a_wrong_integer_is_told(carol: Client, value: object, message: str) -> None:
    task = carol.create("Buy milk")
    for method, path in (("POST", "/api/tasks"), ("PUT", f"/api/tasks/{task['id']}")):
        response = carol.request(method, path, json={"title": "Buy bread", "priority": value})
        assert (response.status_code, response.json()) == (
            422,
            {"detail": f"priority {message}", "errors": [{"field": "priority", "message": message}]},
        )
    assert carol.tasks() == [task]


def test_a_key_is_for_one_integer_and_the_default_is_one(carol: Client) -> None:
    key = {"Idempotency-Key": "k"}
    first = carol.post("/api/tasks", json={"title": "Buy milk"}, headers=key)
    assert first.status_code == 201
    again = carol.post("/api/tasks", json={"title": "Buy milk", "priority": 3}, headers=key)
    assert (again.status_code, again.json()) == (201, first.json())
    assert carol.post("/api/tasks", json={"title": "Buy milk", "priority": 4}, headers=key).status_code == 422


def test_an_integer_is_documented(other_service: Service) -> None:
    schemas = schemas_of(other_service)
    for name in ("NewTask", "TaskChanges"):
        published = schemas[name]["properties"]["priority"]
        assert (published["type"], published["minimum"], published["maximum"]) == ("integer", 1, 5)
    assert schemas["Task"]["properties"]["priority"]["type"] == "integer"
    assert "priority" in schemas["Task"]["required"]
    assert "priority" not in schemas["NewTask"]["required"]
    assert '"priority": 3' in schemas["NewTask"]["description"]


# --- A database that was there before --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "before", "after"), [("due_date", None, "2026-01-31"), ("priority", 3, 5)], ids=["date", "integer"]
)
def test_a_database_that_was_there_before_gets_the_field_at_the_next_start(
    request: pytest.FixtureRequest,
    start_service: Callable[..., Service],
    database_url: str,
    field: str,
    before: object,
    after: object,
) -> None:
    folder = request.getfixturevalue("project" if field == "due_date" else "other_project")
    body, key, user_id = {"title": "Buy milk", "description": "Two litres"}, {"Idempotency-Key": "k"}, new_user_id()
    old = start_service(database_url)
    old.wait_until_ready()
    with old.client(user_id) as client:
        task = client.post("/api/tasks", json=body, headers=key).json()
        assert field not in task
        new = start_service(database_url, folder=folder)
        new.wait_until_ready()
        assert client.tasks() == [task], "a process without the field serves on"
        with new.client(user_id) as new_client:
            assert new_client.tasks() == [task | {field: before}]
            other = client.create("by a process without the field")
            assert new_client.get(f"/api/tasks/{other['id']}").json() == other | {field: before}
            replay = new_client.post("/api/tasks", json=body, headers=key)
            assert (replay.status_code, replay.json()) == (201, task | {field: before}), "the request is the same"
            changed = new_client.put(f"/api/tasks/{task['id']}", json={field: after}).json()
            assert changed == task | {field: after, "updated_at": changed["updated_at"]}
    again = start_service(database_url, folder=folder)
    again.wait_until_ready()
    with again.client(user_id) as client:
        assert client.get(f"/api/tasks/{task['id']}").json() == changed, "nothing is done a second time"


def test_a_table_of_another_program_gets_the_field_too(
    project: Path, start_service: Callable[..., Service], database_url: str
) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(
            """
            CREATE TABLE task (
                id serial PRIMARY KEY, user_id varchar NOT NULL, title varchar(200) NOT NULL, description varchar,
                completed boolean NOT NULL, created_at timestamp NOT NULL, updated_at timestamp NOT NULL
            );
            INSERT INTO task (user_id, title, completed, created_at, updated_at)
            VALUES ('alice', 'Buy milk', false, '2026-01-01', '2026-01-01')
            """
        )
    service = start_service(database_url, folder=project)
    service.wait_until_ready()
    with service.client("alice") as client:
        [task] = client.tasks()
        assert (task["title"], task["due_date"]) == ("Buy milk", None)
        changed = client.put(f"/api/tasks/{task['id']}", json={"due_date": "2026-01-31"}).json()
        assert client.tasks() == [changed]
        assert changed == task | {"due_date": "2026-01-31", "updated_at": changed["updated_at"]}


@pytest.mark.long
def test_the_tests_of_tasks_and_of_the_document_pass(project: Path) -> None:
    # One test knows all the fields of a task, to see that there is no other.
    command = [sys.executable, "-m", "pytest", "-q", "-k", "not returned_with_what_the_server_adds", *TESTS]
    run = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:]
