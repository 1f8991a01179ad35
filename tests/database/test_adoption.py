"""How the table of another program is adopted: that of the FastAPI + SQLModel backend, and that of version 1.0."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from datetime import datetime
from typing import Any

import asyncpg
import psycopg
import pytest

from sql import Queries, Refused
from sql.database import ADOPT, Connection
from sql.database import apply_schema as apply_on
from sql.database import connect as connect_as_service
from tests.support.batches import values_of
from tests.support.database import connect, execute, name_of
from tests.support.fixtures import StartService
from tests.support.service_process import Client, Service, running
from tests.support.tables import (
    BEYOND_A_LIMIT,
    CHECKS,
    COLUMNS,
    INDEXES,
    MANY_ROWS,
    TABLES,
    VERSION_1_0,
    WITHOUT_KEYS,
    apply_schema,
    checks,
    columns,
    fingerprint,
    indexes,
    insert,
    make,
    old_table,
    on,
)

RFC_3339 = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{6})?\+00:00"
SERIAL = ["bigint", "NO", "nextval('task_id_seq'::regclass)", None]
OLD_INDEXES = {"public.task USING btree (id)", "public.task USING btree (user_id)"}
INDEX_OF_1_0 = (
    "public.task USING btree (user_id, split_part(idempotency_key, ' '::text, 1)) WHERE (idempotency_key IS NOT NULL)"
)
OF_1_0 = ["1.0", "1.0, adopted", "1.0, without keys", "1.0, adopted, without keys"]


# --- The table afterwards


@on("old", "old, nullable", *OF_1_0)
def test_the_table_becomes_the_new_one(database_url: str, tables: str) -> None:
    make(database_url, tables + MANY_ROWS)
    adopted, has_keys = "SERIAL" in tables, "split_part" in tables and WITHOUT_KEYS not in tables
    expected = COLUMNS | {"id": SERIAL if adopted else ["bigint", "NO", None, "BY DEFAULT"]}
    assert columns(database_url).items() >= expected.items()
    assert checks(database_url) == CHECKS
    key = OLD_INDEXES if adopted else {"public.task USING btree (user_id, id)"}
    assert indexes(database_url) == INDEXES | key | ({INDEX_OF_1_0} if has_keys else set())


@on("1.0", "1.0, adopted, without keys")
def test_a_table_of_version_1_0_is_not_rewritten(database_url: str, tables: str) -> None:
    execute(database_url, tables + MANY_ROWS)
    values = "id, user_id, title, description, completed, created_at, updated_at, pg_relation_filenode('task')"
    before = execute(database_url, f"SELECT {values} FROM task ORDER BY id")
    apply_schema(database_url)
    assert execute(database_url, f"SELECT {values} FROM task ORDER BY id") == before
    assert len(before) == 5000


@on("fresh", "old, nullable", "1.0, adopted", "1.0, without keys")
def test_adopting_by_hand_even_twice_does_no_harm(database_url: str, tables: str) -> None:
    make(database_url, tables)
    execute(database_url, MANY_ROWS + "UPDATE task SET idempotency_key = id, request_hash = id WHERE id < 99")

    def definitions() -> list[tuple[Any, ...]]:
        """Return all but the numbers of what is made anew: the constraints of the times, and the trigger."""
        return sorted((kind, name, rest) for kind, _, name, rest in fingerprint(database_url))

    before = definitions()
    for _ in range(2):
        execute(database_url, ADOPT)
        assert definitions() == before
    apply_schema(database_url)
    assert definitions() == before


# --- The tasks of the old backend


TIMES = "ALTER COLUMN created_at TYPE {0}, ALTER COLUMN updated_at TYPE {0}"
TEXTS = ", ".join(f"ALTER COLUMN {name} TYPE text" for name in ("user_id", "title", "description"))
WITHOUT_NULL = "UPDATE task SET description = ''; ALTER TABLE task ALTER description SET NOT NULL"
OUR_TYPES = f"ALTER COLUMN id TYPE bigint, {TEXTS}, {TIMES.format('timestamptz')}"
OUR_DEFAULTS = (
    "ALTER COLUMN completed SET DEFAULT false, ALTER COLUMN created_at SET DEFAULT now(), "
    "ALTER COLUMN updated_at SET DEFAULT now()"
)


@pytest.mark.parametrize(
    "changes",
    [
        TIMES.format("timestamptz"),
        "ALTER COLUMN updated_at TYPE timestamptz",
        "ALTER COLUMN id TYPE bigint",
        OUR_TYPES,
        f"{TIMES.format('timestamptz(0)')}, ALTER COLUMN id TYPE bigint, {OUR_DEFAULTS}",
        f"{OUR_TYPES}, {OUR_DEFAULTS}, ALTER COLUMN title DROP NOT NULL",
        f"{OUR_TYPES}, {OUR_DEFAULTS}; {WITHOUT_NULL}",
    ],
)
def test_an_old_table_that_somebody_has_begun_to_convert_becomes_the_new_one(database_url: str, changes: str) -> None:
    execute(database_url, old_table() + MANY_ROWS)
    execute(database_url, f"ALTER DATABASE {name_of(database_url)} SET timezone = 'Pacific/Auckland'")
    execute(database_url, f"SET timezone = 'UTC'; ALTER TABLE task {changes}")
    instants = "SELECT id, extract(epoch FROM created_at), extract(epoch FROM updated_at) FROM task ORDER BY id"
    before = execute(database_url, instants)
    apply_schema(database_url)
    assert columns(database_url).items() >= (COLUMNS | {"id": SERIAL}).items()
    assert execute(database_url, instants) == before
    execute(database_url, "INSERT INTO task (user_id, title) VALUES ('alice', 'new')")


def test_an_adopted_table_takes_the_texts_that_the_contract_allows(
    database_url: str, start_service: StartService
) -> None:
    execute(database_url, old_table().replace("2000", "100").replace("200", "100"))
    with start_service(database_url).client("alice") as alice:
        assert alice.create("é" * 200, description="x" * 2000) in alice.tasks()


@pytest.mark.parametrize(
    ("nullable", "timezone"),
    [(True, "UTC"), (False, "Pacific/Auckland"), (True, "America/St_Johns")],
)
def test_adoption_keeps_every_row_and_every_instant(database_url: str, nullable: bool, timezone: str) -> None:
    """5000 rows cover every hour of the clock changes of these places in 2024."""
    execute(database_url, f"ALTER DATABASE {name_of(database_url)} SET timezone = '{timezone}'")
    execute(database_url, old_table(nullable=nullable) + MANY_ROWS)
    rest = "id, user_id, title, description, completed"
    before = execute(database_url, f"SELECT {rest}, created_at, updated_at FROM task ORDER BY id")
    apply_schema(database_url)
    utc = "created_at AT TIME ZONE 'UTC', updated_at AT TIME ZONE 'UTC'"
    after = execute(database_url, f"SELECT {rest}, {utc} FROM task ORDER BY id")
    assert len(after) == 5000
    assert after == before


def test_an_adopted_task_has_its_old_times_in_the_api(database_url: str, start_service: StartService) -> None:
    """02:30 of that day is no time of the clock in Auckland, whose zone the database has."""
    execute(
        database_url,
        f"""
        ALTER DATABASE {name_of(database_url)} SET timezone = 'Pacific/Auckland';
        {old_table()}
        INSERT INTO task (user_id, title, completed, created_at, updated_at)
        SELECT unnest(ARRAY['alice', 'bob']), 'old', true, '2024-09-29 02:30:00.12', '2024-09-29 14:30:00';
        """,
    )
    service = start_service(database_url)
    with service.client("alice") as alice, service.client("bob") as bob:
        started = time.time()
        new = alice.create("new")
        [first, second] = alice.tasks()
        [bobs] = bob.tasks()
    assert first == new
    assert second == second | {
        "user_id": "alice", "title": "old", "description": None, "completed": True,
        "created_at": "2024-09-29T02:30:00.120000+00:00", "updated_at": "2024-09-29T14:30:00+00:00",
    }  # fmt: skip
    assert bobs == second | {"id": bobs["id"], "user_id": "bob"}
    assert abs(datetime.fromisoformat(new["created_at"]).timestamp() - started) < 60


FIRST, LAST = "0001-01-01T00:00:00.000001+00:00", "9999-12-31T00:00:00+00:00"
BEFORE_FIRST = ["-infinity", "0044-03-15 BC", "0001-12-31 23:59:59.999999 BC", "0001-01-01"]
BEHIND_LAST = ["infinity", "20000-01-01", "10000-01-01", "9999-12-31 23:59:59.999999"]


def tasks_at(user_id: str, moments: list[str]) -> str:
    """Return the statement that gives a user 101 tasks of each moment."""
    return f"""
        INSERT INTO task (user_id, title, completed, created_at, updated_at)
        SELECT '{user_id}', n, false, moment, moment
        FROM generate_series(1, 101) AS n, unnest(ARRAY{moments}::timestamp[]) AS moment;
    """


WITHOUT_LIMITS = VERSION_1_0 + "ALTER TABLE task DROP CONSTRAINT task_created_at, DROP CONSTRAINT task_updated_at;"


@pytest.mark.parametrize(
    ("before", "after"),
    [(old_table(), ""), (old_table(), VERSION_1_0), (WITHOUT_LIMITS, "")],
    ids=["old", "old, adopted by 1.0", "1.0 without limits"],
)
def test_tasks_at_and_beyond_the_ends_of_time_are_listed_once_and_can_be_changed(
    database_url: str, start_service: StartService, before: str, after: str
) -> None:
    """More than fit one page, so that the next one begins between tasks of one moment."""
    execute(database_url, f"{before}{tasks_at('first', BEFORE_FIRST)}{tasks_at('last', BEHIND_LAST)}{after}")
    service = start_service(database_url)
    for user, moment in (("first", FIRST), ("last", LAST)):
        rows = execute(database_url, f"SELECT id FROM task WHERE user_id = '{user}' ORDER BY id DESC")
        with service.client(user) as owner:
            tasks = owner.tasks()
            assert [(task["id"],) for task in tasks] == rows
            assert len(rows) == 404
            assert {(task["created_at"], task["updated_at"]) for task in tasks} == {(moment, moment)}
            assert owner.tasks("pending") == tasks
            for position in (0, 99, 100, 101, 349, 350, 403):
                tasks[position] = assert_can_be_changed(owner, tasks[position])
            assert owner.tasks() == tasks
            assert owner.tasks("pending") == [task for task in tasks if not task["completed"]]
            assert owner.tasks("completed") == [task for task in tasks if task["completed"]]


def assert_can_be_changed(owner: Client, task: dict[str, Any]) -> dict[str, Any]:
    """Change a task at the version that a list has shown, which moves it forward, and return it."""
    path, etag = f"/api/tasks/{task['id']}", f'"{task["updated_at"]}"'
    assert owner.get(path).headers["etag"] == etag
    response = owner.put(path, json={"completed": True}, headers={"If-Match": etag})
    assert response.status_code == 200, response.text
    changed: dict[str, Any] = response.json()
    assert changed == task | {"completed": True, "updated_at": changed["updated_at"]}
    assert changed["updated_at"] > task["updated_at"]
    assert response.headers["etag"] == f'"{changed["updated_at"]}"'
    assert owner.put(path, json={"completed": False}, headers={"If-Match": etag}).status_code == 412
    return changed


# Rows that the old backend let in, each of a user of its own, beside a row of bob's that nobody touches. Times beyond
# the limits are above.
BROKEN = {
    "a blank title": "(102, '{user}', E' \\u3000 ', 'x', false, '2024-01-01', '2024-01-01')",
    "nothing at all": "(107, '{user}', NULL, NULL, NULL, NULL, NULL)",
    "infinite times": "(108, '{user}', 'x', 'x', false, 'infinity', 'infinity')",
    "times before all": "(109, '{user}', 'x', 'x', false, '-infinity', '-infinity')",
    "the last time": "(113, '{user}', 'x', 'x', false, '9999-12-31 23:59:59.999999', '9999-12-31 23:59:59.999999')",
    "the id zero": "(0, '{user}', 'x', 'x', false, '2024-01-01', '2024-01-01')",
}
UNOWNED = "(201, NULL, 'nobody''s', 'x', false, '2024-01-01', '2024-01-01'), (202, '', '', '', false, NULL, NULL)"
BOBS = "(301, 'bob', 'bob''s', 'x', false, '2024-01-01', '2024-01-01')"


@pytest.fixture(scope="module", params=["", VERSION_1_0], ids=["at once", "after 1.0"])
def adopted(request: pytest.FixtureRequest, new_database: Callable[[], str]) -> Iterator[Service]:
    """The service on an old table that holds every kind of broken row, with another table that refers to it."""
    url = new_database()
    broken = ", ".join(row.format(user=user) for user, row in BROKEN.items())
    execute(
        url,
        f"""
        {old_table(nullable=True)}
        INSERT INTO task VALUES {broken}, {UNOWNED}, {BOBS};
        SELECT setval('task_id_seq', 301);
        CREATE TABLE comment (task_id integer NOT NULL REFERENCES task (id) ON DELETE CASCADE);
        INSERT INTO comment SELECT id FROM task;
        {request.param}
        """,
    )
    with running(url) as service:
        yield service


@pytest.fixture
def bobs_row_is_untouched(adopted: Service) -> Iterator[None]:
    row = "SELECT task::text FROM task WHERE user_id = 'bob' AND id = 301"
    before = execute(adopted.database_url, row)
    yield
    assert len(before) == 1
    assert execute(adopted.database_url, row) == before


@pytest.mark.usefixtures("bobs_row_is_untouched")
@pytest.mark.parametrize("user", BROKEN)
def test_a_row_that_breaks_the_rules_can_be_used_by_its_owner(adopted: Service, user: str) -> None:
    with adopted.client(user) as owner:
        [task] = owner.tasks()
        path = f"/api/tasks/{task['id']}"
        assert set(task) >= {"id", "user_id", "title", "description", "completed", "created_at", "updated_at"}
        assert isinstance(task["title"], str)
        assert task["completed"] is False
        assert_times(task)
        assert owner.get(path).json() == task
        assert owner.get(f"/api/tasks/{2**64}").status_code == 404  # not the one with the id zero
        assert owner.put(path, json={}).json() == task

        done = owner.patch(f"{path}/complete")
        assert done.json() == task | {"completed": True, "updated_at": done.json()["updated_at"]}
        assert_times(done.json())
        assert done.json()["updated_at"] > task["updated_at"]

        described = owner.put(path, json={"description": "y"}).json()
        assert described == done.json() | {"description": "y", "updated_at": described["updated_at"]}
        assert owner.put(path, json={"title": "mended"}).json()["title"] == "mended"

        assert owner.delete(path).status_code == 204
        assert owner.tasks() == []


def assert_times(task: dict[str, Any]) -> None:
    for name in ("created_at", "updated_at"):
        assert re.fullmatch(RFC_3339, str(task[name])), task[name]


def test_rows_that_nobody_owns_are_kept(adopted: Service) -> None:
    assert execute(adopted.database_url, "SELECT id FROM task WHERE user_id = '' ORDER BY id") == [(201,), (202,)]


def test_a_new_row_beyond_a_limit_is_refused_among_old_ones(adopted: Service) -> None:
    with connect(adopted.database_url) as connection:
        for constraint, fields in [case for case in BEYOND_A_LIMIT if "id" not in case[1]]:
            with pytest.raises(psycopg.DatabaseError) as refusal:
                insert(connection, fields)
            if isinstance(refusal.value, psycopg.errors.StringDataRightTruncation):  # the old column type says it first
                assert constraint in ("task_user_id", "task_title", "task_description")
            else:
                assert (refusal.value.sqlstate, refusal.value.diag.constraint_name) == ("23514", constraint)


@on("old", "1.0", "1.0, adopted")
def test_where_no_old_row_breaks_a_rule_no_new_one_can(database_url: str, tables: str) -> None:
    """Not even with an id below those of the old rows. The columns have no lengths in their types."""
    without_lengths = re.sub("VARCHAR[(][0-9]+[)]", "VARCHAR", tables)
    make(database_url, without_lengths + MANY_ROWS + "DELETE FROM task WHERE id = 7")
    with connect(database_url) as connection:
        for constraint, fields in BEYOND_A_LIMIT:
            with pytest.raises(psycopg.errors.CheckViolation) as refusal:
                insert(connection, {"id": 7} | fields)
            assert refusal.value.diag.constraint_name == constraint


def test_ids_go_on_after_the_old_ones(adopted: Service) -> None:
    with adopted.client("carol") as carol:
        first, second = carol.create(), carol.create()
    assert 301 < first["id"] < second["id"] < 2**31


def test_ids_go_on_beyond_32_bits(adopted: Service) -> None:
    execute(adopted.database_url, "SELECT setval('task_id_seq', 2147483647)")
    with adopted.client("dave") as dave, adopted.client("bob") as bob:
        task = dave.create()
        assert task["id"] == 2**31
        assert dave.get(f"/api/tasks/{task['id']}").json() == task
        assert bob.get(f"/api/tasks/{task['id']}").status_code == 404
        assert dave.delete(f"/api/tasks/{task['id']}").status_code == 204
    execute(adopted.database_url, "SELECT setval('task_id_seq', 1000)")


def test_a_foreign_key_to_a_task_survives(adopted: Service) -> None:
    with connect(adopted.database_url) as connection:
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            connection.execute("INSERT INTO comment VALUES (999999)")
        with adopted.client("erin") as erin:
            kept, deleted = erin.create(), erin.create()
            for task in (kept, deleted):
                connection.execute("INSERT INTO comment VALUES (%s)", [task["id"]])
            assert erin.delete(f"/api/tasks/{deleted['id']}").status_code == 204
        ids = [kept["id"], deleted["id"]]
        assert connection.execute("SELECT * FROM comment WHERE task_id = ANY(%s)", [ids]).fetchall() == [(kept["id"],)]


def test_a_foreign_key_of_the_old_backend_refuses_without_a_500(database_url: str, start_service: StartService) -> None:
    """SQLModel backends often refer to Better Auth's table of users, and comments to tasks, without any cascade."""
    execute(
        database_url,
        f"""
        {old_table()}
        CREATE TABLE "user" (id text PRIMARY KEY);
        INSERT INTO "user" VALUES ('alice');
        ALTER TABLE task ADD FOREIGN KEY (user_id) REFERENCES "user" (id);
        CREATE TABLE comment (task_id integer REFERENCES task (id));
        """,
    )
    service = start_service(database_url)
    said = "is refused by the database"
    refused = {"detail": f"body {said}", "errors": [{"field": "body", "message": said}]}
    with service.client("alice") as alice, service.client("nobody's") as unknown:
        task = alice.create()
        execute(database_url, f"INSERT INTO comment VALUES ({task['id']})")
        for response in (unknown.post("/api/tasks", json={"title": "x"}), alice.delete(f"/api/tasks/{task['id']}")):
            assert (response.status_code, response.json()) == (422, refused)
        assert alice.tasks() == [task]
        assert unknown.tasks() == []


# --- Other schemas


@pytest.mark.parametrize(
    ("tables", "where"),
    [
        ("", "app"),
        *((f"SET search_path = {schema}; {table}", schema)
          for table in (old_table(), VERSION_1_0) for schema in ("app", "public")),
    ],
    ids=["fresh", "old in the first", "old in the second", "1.0 in the first", "1.0 in the second"],
)  # fmt: skip
def test_the_table_may_be_in_any_schema_of_the_search_path(database_url: str, tables: str, where: str) -> None:
    execute(database_url, f"CREATE SCHEMA app; ALTER DATABASE {name_of(database_url)} SET search_path = app, public")
    execute(database_url, tables)
    for _ in range(2):
        apply_schema(database_url)
    made = execute(database_url, "SELECT schemaname FROM pg_tables WHERE tablename = 'task'")
    assert made == [(where,)]
    assert checks(database_url) == CHECKS
    assert indexes(database_url) >= {index.replace("public.", f"{where}.") for index in INDEXES}


@pytest.mark.parametrize("neighbour", [TABLES["fresh"], VERSION_1_0], ids=["2.0", "1.0"])
@on("old", "1.0")
def test_a_namesake_in_another_schema_is_left_alone(database_url: str, neighbour: str, tables: str) -> None:
    """Two services may share a database, each with a schema of its own before the public one."""
    execute(database_url, neighbour)
    if not neighbour:
        apply_schema(database_url)
    execute(database_url, MANY_ROWS)
    before = fingerprint(database_url)
    execute(database_url, f"CREATE SCHEMA app; SET search_path = app; {tables}")
    apply_schema(database_url, search_path="app, public")
    assert fingerprint(database_url) == before
    assert indexes(database_url, "app.task") >= {index.replace("public.", "app.") for index in INDEXES}


# --- The keys of version 1.0


CREATE_BY_1_0 = """
    INSERT INTO task (user_id, idempotency_key, title, description, completed)
    VALUES (%s, %s, %s, %s, %s)
    ON CONFLICT (user_id, split_part(idempotency_key, ' ', 1)) WHERE idempotency_key IS NOT NULL
    DO UPDATE SET idempotency_key = excluded.idempotency_key
    WHERE task.idempotency_key = excluded.idempotency_key
    RETURNING id
"""
"""The statement by which processes of version 1.0 create tasks."""

REUSED = "is not the one that this Idempotency-Key was first sent with"
BODIES: dict[str, dict[str, Any]] = {
    "a": {"title": "a task"},
    "B": {"title": "a task"},
    "b": {"title": '"Grüße" \\ 😀', "description": "two\nlines", "completed": True},
    "".join(map(chr, range(0x21, 0x7F))): {"title": "x", "description": ""},
}


def hash_of(body: dict[str, Any]) -> str:
    """Return what version 1.0 keeps of a body beside its key."""
    fields = {"title": body["title"], "description": body.get("description"), "completed": body.get("completed", False)}
    sent = {name: value for name, value in fields.items() if value is not None}
    return hashlib.sha256(json.dumps(sent).encode()).hexdigest()


def create_by_1_0(url: str, user_id: str, key: str | None, body: dict[str, Any]) -> int:
    """Create a task as version 1.0 does, and return its id."""
    values = [key and f"{key} {hash_of(body)}", body["title"], body.get("description"), body.get("completed", False)]
    with connect(url) as connection:
        [(task_id,)] = connection.execute(CREATE_BY_1_0.encode(), [user_id, *values]).fetchall()
    return int(task_id)


def create(client: Client, key: str, body: dict[str, Any]) -> int:
    """Create a task by the present service, and return its id."""
    response = client.post("/api/tasks", json=body, headers={"Idempotency-Key": key})
    assert response.status_code == 201, response.text
    return int(response.json()["id"])


def assert_refused(client: Client, key: str) -> None:
    response = client.post("/api/tasks", json={"title": "another"}, headers={"Idempotency-Key": key})
    error = {"detail": f"body {REUSED}", "errors": [{"field": "body", "message": REUSED}]}
    assert (response.status_code, response.json()) == (422, error)


@on("1.0", "1.0, adopted")
def test_a_key_of_version_1_0_still_gives_the_task_that_it_made(
    database_url: str, start_service: StartService, tables: str
) -> None:
    execute(database_url, tables)
    made = {(user, key): create_by_1_0(database_url, user, key, BODIES[key]) for user in ("a", "b") for key in BODIES}
    create_by_1_0(database_url, "a", None, {"title": "a task"})
    service = start_service(database_url)
    kept = execute(database_url, "SELECT user_id, idempotency_key, request_hash FROM task ORDER BY id")
    assert kept == [*((user, key, hash_of(BODIES[key])) for user, key in made), ("a", None, None)]
    for user in ("a", "b"):
        with service.client(user) as client:
            tasks = client.tasks()
            for key, body in BODIES.items():
                assert create(client, key, body) == made[user, key]
                assert_refused(client, key)
            assert client.tasks() == tasks


@pytest.mark.parametrize(
    ("tables", "restarted"),
    [(TABLES["1.0"], True), (TABLES["1.0, adopted"], False)],
    ids=["1.0, restarted", "adopted, running"],
)
def test_a_key_makes_one_task_whichever_version_it_is_sent_to(
    database_url: str, start_service: StartService, tables: str, restarted: bool
) -> None:
    """While processes of version 1.0 still run, or have started once more and applied their schema."""
    make(database_url, tables)
    if restarted:
        execute(database_url, VERSION_1_0)
    with start_service(database_url).client("alice") as alice:
        for number, (key, body) in enumerate(BODIES.items(), 1):
            old_first = create_by_1_0(database_url, "alice", f"1{key}", body)
            assert create(alice, f"1{key}", body) == old_first
            new_first = create(alice, f"2{key}", body)
            assert create_by_1_0(database_url, "alice", f"2{key}", body) == new_first
            for task_id, its_key in ((old_first, f"1{key}"), (new_first, f"2{key}")):
                assert create_by_1_0(database_url, "alice", its_key, body) == create(alice, its_key, body) == task_id
                assert_refused(alice, its_key)
            assert len(alice.tasks()) == 2 * number
        create_by_1_0(database_url, "alice", None, {"title": "without a key"})
        assert len(alice.tasks()) == 2 * len(BODIES) + 1
    kept = execute(database_url, "SELECT DISTINCT request_hash FROM task WHERE idempotency_key NOT LIKE '% %'")
    assert {request_hash for (request_hash,) in kept} == {hash_of(body) for body in BODIES.values()}


def test_twenty_requests_with_one_key_make_one_task_through_two_processes(
    database_url: str, start_service: StartService
) -> None:
    """The unique index of 1.0, of which the statement of the present service knows nothing, refuses some of them."""
    execute(database_url, VERSION_1_0)
    services = [start_service(database_url) for _ in range(2)]
    barrier = threading.Barrier(20)

    def send(client: Client, key: str) -> int:
        barrier.wait(30)
        return create(client, key, {"title": "once"})

    with ThreadPoolExecutor(20) as threads, ExitStack() as stack:
        clients = [stack.enter_context(service.client("alice")) for service in services for _ in range(10)]
        for number in range(1, 16):
            assert len(set(threads.map(send, clients, [f"key-{number}"] * 20))) == 1
            assert len(clients[0].tasks()) == number


GATE = """
    CREATE FUNCTION gate(text) RETURNS text IMMUTABLE LANGUAGE plpgsql SET lock_timeout = 0
        AS 'BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN $1; END';
    DROP INDEX task_user_id_idempotency_key_idx;
    CREATE INDEX ON task (gate(title));
    CREATE UNIQUE INDEX {index} ON task (user_id, split_part(idempotency_key, ' ', 1))
        WHERE idempotency_key IS NOT NULL;
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION $$refused$$; END';
    CREATE TRIGGER refuse BEFORE INSERT ON task FOR EACH ROW WHEN (NEW.title = 'refused') EXECUTE FUNCTION refuse();
"""
"""Holds up an insertion, while somebody has the lock 1, after it has found its key free and before it takes the key."""
AT_THE_GATE = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"


async def race(url: str) -> list[Any]:
    """Create a task twice with one key, each alone after its batch has been refused, and both at the gate at once."""
    async with AsyncExitStack() as stack:
        calls = []
        for _ in range(2):
            options: dict[str, Any] = {"connect": connect_as_service, "connection_class": Connection}
            pool = asyncpg.create_pool(url, min_size=0, max_size=4, **options)
            queries = Queries(await stack.enter_async_context(pool))
            await apply_on(queries.pool)
            queries.schema_applied = True
            calls.append(queries.create_task("alice", None, None, values_of("refused")))
            calls.append(queries.create_task("bob", "once", "its hash", values_of("a task")))
        keeper = await asyncpg.connect(url)
        await keeper.execute("SELECT pg_advisory_lock(1)")
        created = asyncio.gather(*calls, return_exceptions=True)
        try:
            async with asyncio.timeout(7):
                while await keeper.fetchval(AT_THE_GATE) < 2:
                    await asyncio.sleep(0.01)
        finally:
            await keeper.close()
        return await created


# That of version 1.0, and one that REINDEX CONCURRENTLY builds.
@pytest.mark.parametrize("index", ["task_user_id_idempotency_key_idx", "task_idempotency_key_idx_ccnew"])
def test_a_creation_that_loses_the_race_for_its_key_gets_the_task_of_the_winner(database_url: str, index: str) -> None:
    execute(database_url, VERSION_1_0 + GATE.replace("{index}", index))
    first_refused, first, second_refused, second = asyncio.run(race(database_url))
    assert [type(result) for result in (first_refused, second_refused)] == [Refused, Refused]
    assert [result for result in (first, second) if isinstance(result, Exception)] == []
    assert (first["id"], first["title"]) == (second["id"], "a task")
    assert execute(database_url, "SELECT count(*) FROM task") == [(1,)]
