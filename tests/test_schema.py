"""The schema: what it refuses, how it is applied by many at once, and how it adopts the table of the old backend."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import psycopg
import pytest
from psycopg import sql

from tests.service_process import ROOT, SECRET, Client, Service, environment, procfile_line, running

SCHEMA = (ROOT / "sql" / "schema.sql").read_text()
UNAVAILABLE = {"detail": "The database is not available right now, try again soon"}
PASSWORD = "hunter2-of-the-tests"
RFC_3339 = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}\+00:00"

BLANK = "".join(character for character in map(chr, range(sys.maxunicode + 1)) if character.isspace())

BEYOND_A_LIMIT: list[tuple[str, dict[str, Any]]] = [
    ("task_user_id", {"user_id": ""}),
    ("task_user_id", {"user_id": "x" * 256}),
    ("task_id", {"id": 0}),
    ("task_id", {"id": -1}),
    ("task_title", {"title": ""}),
    ("task_title", {"title": BLANK}),
    ("task_title", {"title": "x" * 201}),
    ("task_title", {"title": " " * 200 + "x"}),
    ("task_description", {"description": "x" * 2001}),
    *((f"task_{column}", {column: timestamp})
      for column in ("created_at", "updated_at")
      for timestamp in ("infinity", "-infinity", "10000-01-01 00:00Z", "0001-12-31 23:59:59.999999Z BC")),
]  # fmt: skip

AT_A_LIMIT: list[dict[str, Any]] = [
    {"user_id": "x"},
    {"user_id": "😀" * 255},
    {"id": 1},
    {"id": 2**63 - 1},
    {"title": "x"},
    {"title": "😀" * 200},
    {"title": BLANK + "x" + BLANK},
    {"title": "\u200b"},  # invisible, and no white space to str.isspace
    {"description": ""},
    {"description": None},
    {"description": "😀" * 2000},
    {"created_at": "0001-01-01 00:00Z", "updated_at": "9999-12-31 23:59:59.999999Z"},
    {"created_at": "9999-12-31 23:59:59.999999Z", "updated_at": "0001-01-01 00:00Z"},
]


def connect(url: str) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(url, autocommit=True)


def execute(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Send one statement, or several in one transaction, and return the rows."""
    with connect(url) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def insert(connection: psycopg.Connection[tuple[Any, ...]], fields: dict[str, Any]) -> None:
    """Insert a task as another program would."""
    row = {"user_id": "alice", "title": "a task"} | fields
    statement = sql.SQL("INSERT INTO task ({}) VALUES ({})").format(
        sql.SQL(", ").join(map(sql.Identifier, row)), sql.SQL(", ").join(map(sql.Literal, row.values()))
    )
    connection.execute(statement)


def columns(url: str) -> dict[str, list[Any]]:
    """Return the type of each column, whether it may be null, its default, and how it is generated."""
    rows = execute(
        url,
        """
        SELECT column_name, data_type, is_nullable, column_default, identity_generation
        FROM information_schema.columns
        WHERE table_name = 'task'
        """,
    )
    return {name: rest for name, *rest in rows}


def checks(url: str) -> set[str]:
    """Return the names of the table's check constraints."""
    return {
        name
        for (name,) in execute(
            url, "SELECT conname FROM pg_constraint WHERE conrelid = 'task'::regclass AND contype = 'c'"
        )
    }


def indexes(url: str) -> set[str]:
    """Return the definitions of the table's indexes, without their names."""
    definitions = execute(url, "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = 'task'::regclass")
    return {definition.partition(" ON ")[2] for (definition,) in definitions}


def fingerprint(url: str) -> list[tuple[Any, ...]]:
    """Return what differs as soon as the table is rewritten or anything of it is made anew."""
    return execute(
        url,
        """
        SELECT 'table', oid, relfilenode::text, relnatts::text FROM pg_class WHERE oid = 'task'::regclass
        UNION ALL
        SELECT 'column', attnum, attname, concat_ws(' ', format_type(atttypid, atttypmod), attnotnull, atthasdef)
        FROM pg_attribute WHERE attrelid = 'task'::regclass
        UNION ALL
        SELECT 'constraint', oid, conname, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE conrelid = 'task'::regclass
        UNION ALL
        SELECT 'index', indexrelid, '', pg_get_indexdef(indexrelid)
        FROM pg_index WHERE indrelid = 'task'::regclass
        UNION ALL
        SELECT 'row', 0, '', task::text FROM task
        ORDER BY 1, 2, 3, 4
        """,
    )


def old_table(*, nullable: bool = False) -> str:
    """Return the statements by which SQLModel makes the table of the old backend, or a laxer relative of it."""
    null = "" if nullable else "NOT NULL"
    return f"""
        CREATE TABLE task (
            id SERIAL NOT NULL,
            user_id VARCHAR(255) {null},
            title VARCHAR(200) {null},
            description VARCHAR(2000),
            completed BOOLEAN {null},
            created_at TIMESTAMP WITHOUT TIME ZONE {null},
            updated_at TIMESTAMP WITHOUT TIME ZONE {null},
            PRIMARY KEY (id)
        );
        CREATE INDEX ix_task_user_id ON task (user_id);
    """


MANY_ROWS = """
    INSERT INTO task (user_id, title, description, completed, created_at, updated_at)
    SELECT 'user-' || n % 50, 'task ' || n, nullif('x', repeat('x', n % 2)), n % 3 = 0, moment, moment + n * '1 s'::interval
    FROM (SELECT n, '2024-01-01'::timestamp + n * '97 min 0.000001 s'::interval AS moment FROM generate_series(1, 5000) AS n)
        AS numbered;
"""  # noqa: E501

both_variants = pytest.mark.parametrize("nullable", [False, True], ids=["not null", "nullable"])


# --- A fresh database


@pytest.fixture(scope="module")
def fresh_url(new_database: Callable[[], str]) -> str:
    """A database with the schema and nothing else; tests leave nothing in it."""
    url = new_database()
    execute(url, SCHEMA)
    return url


@pytest.fixture
def fresh(fresh_url: str) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """A connection whose changes are undone after the test."""
    with psycopg.connect(fresh_url) as connection:
        yield connection
        connection.rollback()


def test_a_fresh_database_gets_the_table(fresh_url: str) -> None:
    assert columns(fresh_url) == {
        "user_id": ["text", "NO", None, None],
        "id": ["bigint", "NO", None, "BY DEFAULT"],
        "title": ["text", "NO", None, None],
        "description": ["text", "YES", None, None],
        "completed": ["boolean", "NO", "false", None],
        "created_at": ["timestamp with time zone", "NO", "now()", None],
        "updated_at": ["timestamp with time zone", "NO", "now()", None],
        "idempotency_key": ["text", "YES", None, None],
    }
    assert checks(fresh_url) == {
        "task_user_id", "task_id", "task_title", "task_description", "task_created_at", "task_updated_at",
    }  # fmt: skip


def test_the_key_and_the_index_begin_with_the_user(fresh_url: str) -> None:
    assert indexes(fresh_url) == {
        "public.task USING btree (user_id, id)",
        "public.task USING btree (user_id, created_at DESC, id DESC)",
        "public.task USING btree (user_id, created_at DESC, id DESC) WHERE (NOT completed)",
        "public.task USING btree (user_id, split_part(idempotency_key, ' '::text, 1))"
        " WHERE (idempotency_key IS NOT NULL)",
    }
    key = execute(fresh_url, "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'task_pkey'")
    assert key == [("PRIMARY KEY (user_id, id)",)]


@pytest.mark.parametrize(("constraint", "fields"), BEYOND_A_LIMIT)
def test_a_row_beyond_a_limit_is_refused_by_name(
    fresh: psycopg.Connection[tuple[Any, ...]], constraint: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation) as refusal:
        insert(fresh, fields)
    assert refusal.value.diag.constraint_name == constraint


@pytest.mark.parametrize(("constraint", "fields"), BEYOND_A_LIMIT)
def test_a_change_beyond_a_limit_is_refused_by_name(
    fresh: psycopg.Connection[tuple[Any, ...]], constraint: str, fields: dict[str, Any]
) -> None:
    insert(fresh, {})
    [(column, value)] = fields.items()
    with pytest.raises(psycopg.errors.CheckViolation) as refusal:
        fresh.execute(sql.SQL("UPDATE task SET {} = {}").format(sql.Identifier(column), sql.Literal(value)))
    assert refusal.value.diag.constraint_name == constraint


@pytest.mark.parametrize("fields", AT_A_LIMIT)
def test_a_row_at_a_limit_is_accepted_unchanged(
    fresh: psycopg.Connection[tuple[Any, ...]], fields: dict[str, Any]
) -> None:
    insert(fresh, fields)
    [(column, value), *_] = fields.items()
    if column in ("created_at", "updated_at"):
        value = fresh.execute(sql.SQL("SELECT {}::timestamptz").format(sql.Literal(value))).fetchall()[0][0]
    assert fresh.execute(sql.SQL("SELECT {} FROM task").format(sql.Identifier(column))).fetchall() == [(value,)]


@pytest.mark.parametrize("column", ["user_id", "id", "title", "completed", "created_at", "updated_at"])
def test_only_a_description_and_a_key_may_be_null(fresh: psycopg.Connection[tuple[Any, ...]], column: str) -> None:
    with pytest.raises(psycopg.errors.NotNullViolation) as refusal:
        insert(fresh, {column: None})
    assert refusal.value.diag.column_name == column


@pytest.mark.parametrize("character", BLANK, ids=[f"U+{ord(character):04X}" for character in BLANK])
def test_a_title_of_white_space_is_refused(fresh: psycopg.Connection[tuple[Any, ...]], character: str) -> None:
    for title in (character, character * 200, f" {character} "):
        with pytest.raises(psycopg.errors.CheckViolation) as refusal, fresh.transaction():
            insert(fresh, {"title": title})
        assert refusal.value.diag.constraint_name == "task_title"


def test_blank_means_what_python_means_in_all_of_unicode(fresh: psycopg.Connection[tuple[Any, ...]]) -> None:
    """The constraint itself is asked about every character that PostgreSQL can store."""
    [(definition,)] = fresh.execute("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'task_title'")
    characters = [chr(code) for code in range(1, sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    refused = fresh.execute(
        sql.SQL("SELECT title FROM unnest(%s::text[]) AS title WHERE NOT ({})").format(
            sql.SQL(definition.removeprefix("CHECK "))
        ),
        [characters],
    )
    assert {title for (title,) in refused} == set(BLANK)


def test_another_writer_may_leave_the_rest_to_the_defaults(fresh: psycopg.Connection[tuple[Any, ...]]) -> None:
    insert(fresh, {})
    insert(fresh, {})
    rows = fresh.execute("SELECT description, completed, created_at = now(), updated_at = now() FROM task").fetchall()
    [first, second] = fresh.execute("SELECT id FROM task ORDER BY id").fetchall()
    assert rows == [(None, False, True, True)] * 2
    assert 0 < first[0] < second[0]


def test_two_users_may_have_tasks_with_one_id(fresh: psycopg.Connection[tuple[Any, ...]]) -> None:
    insert(fresh, {"user_id": "alice", "id": 7})
    insert(fresh, {"user_id": "bob", "id": 7})
    with pytest.raises(psycopg.errors.UniqueViolation):
        insert(fresh, {"user_id": "bob", "id": 7})


def test_a_key_is_there_once_for_each_user(fresh: psycopg.Connection[tuple[Any, ...]]) -> None:
    """What follows the first space is no part of it. Rows without a key are as many as they like."""
    for user_id, key in [("alice", "a 1"), ("alice", "A 1"), ("alice", "b 1"), ("bob", "a 1"), ("alice", None)]:
        insert(fresh, {"user_id": user_id, "idempotency_key": key})
    insert(fresh, {"idempotency_key": None})
    for key in ("a 1", "a 2", "a"):
        with pytest.raises(psycopg.errors.UniqueViolation) as refusal, fresh.transaction():
            insert(fresh, {"user_id": "alice", "idempotency_key": key})
        assert refusal.value.diag.constraint_name == "task_user_id_idempotency_key_idx"


def test_the_longest_key_of_the_longest_user_id_fits_the_index(fresh: psycopg.Connection[tuple[Any, ...]]) -> None:
    """Of characters that do not compress."""
    choices = random.Random(1)
    user_id = "".join(chr(choices.randrange(0x10000, 0x110000)) for _ in range(255))
    key = "".join(chr(choices.randrange(0x21, 0x7F)) for _ in range(255))
    insert(fresh, {"user_id": user_id, "idempotency_key": f"{key} {'0' * 64}"})
    with pytest.raises(psycopg.errors.UniqueViolation):
        insert(fresh, {"user_id": user_id, "idempotency_key": f"{key} {'1' * 64}"})


WITHOUT_KEYS = "ALTER TABLE task DROP COLUMN idempotency_key;"
"""Makes the table of the version before keys of the present one."""


@pytest.mark.parametrize("tables", ["", old_table()], ids=["fresh", "adopted"])
def test_a_table_without_keys_gets_them_and_is_not_rewritten(database_url: str, tables: str) -> None:
    execute(database_url, tables + SCHEMA)
    complete = columns(database_url), indexes(database_url)
    execute(database_url, MANY_ROWS + WITHOUT_KEYS)
    rows = "SELECT id, user_id, title, description, completed, created_at, updated_at FROM task ORDER BY id"
    file = "SELECT pg_relation_filenode('task')"
    before = execute(database_url, rows), execute(database_url, file)
    assert (columns(database_url), indexes(database_url)) != complete
    execute(database_url, SCHEMA)
    assert (columns(database_url), indexes(database_url)) == complete
    assert (execute(database_url, rows), execute(database_url, file)) == before
    assert len(before[0]) == 5000


def test_applying_the_schema_again_changes_nothing(database_url: str) -> None:
    execute(database_url, SCHEMA + MANY_ROWS)
    before = fingerprint(database_url)
    for _ in range(2):
        execute(database_url, SCHEMA)
        assert fingerprint(database_url) == before
    assert len([kind for kind, *_ in before if kind == "row"]) == 5000


@pytest.mark.parametrize(
    "setting", ["DateStyle = 'SQL, DMY'", "timezone = 'Pacific/Auckland'", "standard_conforming_strings = off"]
)
def test_the_limits_do_not_depend_on_the_settings_of_the_database(database_url: str, setting: str) -> None:
    execute(database_url, f"ALTER DATABASE {name_of(database_url)} SET {setting}")
    execute(database_url, SCHEMA)
    with connect(database_url) as connection:
        connection.execute("SET DateStyle = 'ISO'; SET standard_conforming_strings = on")
        for fields in AT_A_LIMIT:
            insert(connection, {"user_id": "bob"} | fields)
        for constraint, fields in BEYOND_A_LIMIT:
            with pytest.raises(psycopg.errors.CheckViolation) as refusal:
                insert(connection, fields)
            assert refusal.value.diag.constraint_name == constraint


def name_of(url: str) -> str:
    return urlsplit(url).path.removeprefix("/")


# --- Many at once


async def apply_by_many(url: str, tables: str, rounds: int) -> None:
    """Apply the schema on eight connections at once, again and again; raise the first error."""
    connections = [await asyncpg.connect(url) for _ in range(8)]
    try:
        for _ in range(rounds):
            await connections[0].execute(f"DROP TABLE IF EXISTS task; {tables}")
            await asyncio.gather(*(connection.execute(SCHEMA) for connection in connections))
    finally:
        for connection in connections:
            await connection.close()


@pytest.mark.parametrize(
    "tables",
    ["", old_table(), old_table(nullable=True), SCHEMA + WITHOUT_KEYS],
    ids=["fresh", "old", "old, nullable", "without keys"],
)
def test_eight_connections_can_apply_the_schema_at_once(database_url: str, tables: str) -> None:
    asyncio.run(apply_by_many(database_url, tables, rounds=10))
    assert len(checks(database_url)) == 6


@pytest.mark.parametrize("tables", ["", old_table() + MANY_ROWS], ids=["fresh", "old"])
def test_eight_processes_can_start_at_once(
    database_url: str, start_service: Callable[..., Service], tables: str
) -> None:
    execute(database_url, tables)
    services = [start_service(database_url, wait=False) for _ in range(8 if not tables else 2)]
    for service in services:
        service.wait_until_ready(60)
    for service in services:
        with service.client("alice") as alice:
            alice.create()
        assert not re.search("waiting for the database|error|traceback", service.log, re.IGNORECASE), service.log
    with services[0].client("alice") as alice:
        assert len(alice.tasks()) == len(services)


# --- The table of the old backend


@both_variants
def test_an_old_table_becomes_the_new_one(database_url: str, nullable: bool) -> None:
    execute(database_url, old_table(nullable=nullable) + MANY_ROWS + SCHEMA)
    assert columns(database_url) == {
        "id": ["bigint", "NO", "nextval('task_id_seq'::regclass)", None],
        "user_id": ["text", "NO", None, None],
        "title": ["text", "NO", None, None],
        "description": ["text", "YES", None, None],
        "completed": ["boolean", "NO", "false", None],
        "created_at": ["timestamp with time zone", "NO", "now()", None],
        "updated_at": ["timestamp with time zone", "NO", "now()", None],
        "idempotency_key": ["text", "YES", None, None],
    }
    assert checks(database_url) == {
        "task_user_id", "task_id", "task_title", "task_description", "task_created_at", "task_updated_at",
    }  # fmt: skip
    assert indexes(database_url) == {
        "public.task USING btree (id)",
        "public.task USING btree (user_id)",
        "public.task USING btree (user_id, created_at DESC, id DESC)",
        "public.task USING btree (user_id, created_at DESC, id DESC) WHERE (NOT completed)",
        "public.task USING btree (user_id, split_part(idempotency_key, ' '::text, 1))"
        " WHERE (idempotency_key IS NOT NULL)",
    }


@pytest.mark.parametrize(
    "changes",
    [
        "ALTER COLUMN created_at TYPE timestamptz, ALTER COLUMN updated_at TYPE timestamptz",
        "ALTER COLUMN updated_at TYPE timestamptz",
        "ALTER COLUMN id TYPE bigint",
    ],
)
def test_an_old_table_that_somebody_has_begun_to_convert_becomes_the_new_one(database_url: str, changes: str) -> None:
    execute(database_url, old_table() + MANY_ROWS)
    execute(database_url, f"ALTER DATABASE {name_of(database_url)} SET timezone = 'Pacific/Auckland'")
    execute(database_url, f"SET timezone = 'UTC'; ALTER TABLE task {changes}")
    instants = "SELECT id, extract(epoch FROM created_at), extract(epoch FROM updated_at) FROM task ORDER BY id"
    before = execute(database_url, instants)
    execute(database_url, SCHEMA)
    assert {name: kind for name, (kind, *_) in columns(database_url).items()} == {
        "id": "bigint", "user_id": "text", "title": "text", "description": "text", "completed": "boolean",
        "created_at": "timestamp with time zone", "updated_at": "timestamp with time zone", "idempotency_key": "text",
    }  # fmt: skip
    assert execute(database_url, instants) == before
    execute(database_url, "INSERT INTO task (user_id, title) VALUES ('alice', 'new')")


def test_an_adopted_table_takes_the_texts_that_the_contract_allows(
    database_url: str, start_service: Callable[..., Service]
) -> None:
    execute(database_url, old_table().replace("2000", "100").replace("200", "100"))
    with start_service(database_url).client("alice") as alice:
        assert alice.create("é" * 200, description="x" * 2000) in alice.tasks()


@both_variants
def test_applying_the_schema_to_an_adopted_table_changes_nothing(database_url: str, nullable: bool) -> None:
    execute(database_url, old_table(nullable=nullable) + MANY_ROWS + SCHEMA)
    before = fingerprint(database_url)
    execute(database_url, SCHEMA)
    assert fingerprint(database_url) == before


@pytest.mark.parametrize(
    ("nullable", "timezone"),
    [(False, "UTC"), (True, "UTC"), (False, "Pacific/Auckland"), (True, "America/St_Johns"), (False, "Asia/Kathmandu")],
)
def test_adoption_keeps_every_row_and_every_instant(database_url: str, nullable: bool, timezone: str) -> None:
    """5000 rows cover every hour of the clock changes of these places in 2024."""
    execute(database_url, f"ALTER DATABASE {name_of(database_url)} SET timezone = '{timezone}'")
    execute(database_url, old_table(nullable=nullable) + MANY_ROWS)
    rest = "id, user_id, title, description, completed"
    before = execute(database_url, f"SELECT {rest}, created_at, updated_at FROM task ORDER BY id")
    execute(database_url, SCHEMA)
    after = execute(
        database_url,
        f"SELECT {rest}, created_at AT TIME ZONE 'UTC', updated_at AT TIME ZONE 'UTC' FROM task ORDER BY id",
    )
    assert len(after) == 5000
    assert after == before


def test_an_adopted_task_has_its_old_times_in_the_api(database_url: str, start_service: Callable[..., Service]) -> None:
    """02:30 of that day is no time of the clock in Auckland, whose zone the database has."""
    execute(
        database_url,
        f"""
        ALTER DATABASE {name_of(database_url)} SET timezone = 'Pacific/Auckland';
        {old_table()}
        INSERT INTO task (user_id, title, completed, created_at, updated_at)
        VALUES ('alice', 'old', true, '2024-09-29 02:30:00.12', '2024-09-29 14:30:00'),
               ('bob', 'old', true, '2024-09-29 02:30:00.12', '2024-09-29 14:30:00');
        """,
    )
    service = start_service(database_url)
    with service.client("alice") as alice, service.client("bob") as bob:
        started = time.time()
        new = alice.create("new")
        [first, second] = alice.tasks()
        [bobs] = bob.tasks()
    assert first == new
    assert second == {
        "id": second["id"],
        "user_id": "alice",
        "title": "old",
        "description": None,
        "completed": True,
        "created_at": "2024-09-29T02:30:00.120000+00:00",
        "updated_at": "2024-09-29T14:30:00.000000+00:00",
    }
    assert bobs == second | {"id": bobs["id"], "user_id": "bob"}
    [(seconds,)] = execute(
        database_url, f"SELECT extract(epoch FROM '{new['created_at']}'::timestamptz)::float8"
    )  # fmt: skip
    assert abs(seconds - started) < 60


def test_a_task_whose_times_cannot_be_written_is_not_lost(new_database: Callable[[], str]) -> None:
    """As a table that had timestamps with a zone before it had the constraints may hold."""
    url = new_database()
    with running(url) as service, service.client("alice") as alice:
        execute(url, "ALTER TABLE task DROP CONSTRAINT task_created_at, DROP CONSTRAINT task_updated_at")
        execute(url, "INSERT INTO task VALUES ('alice', 7, 'x', NULL, false, 'infinity', '-infinity')")
        [task] = alice.tasks()
        assert (task["id"], task["created_at"], task["updated_at"]) == (7, "", "")
        assert alice.get("/api/tasks/7").json() == task
        assert alice.put("/api/tasks/7", json={"title": "y"}).json()["title"] == "y"


# Rows that the old backend let in, each of a user of its own, beside a row of bob's that nobody touches.
BROKEN = {
    "an empty title": "(101, '{user}', '', 'x', false, '2024-01-01', '2024-01-01')",
    "a blank title": "(102, '{user}', E' \\u3000 ', 'x', false, '2024-01-01', '2024-01-01')",
    "no title": "(103, '{user}', NULL, 'x', false, '2024-01-01', '2024-01-01')",
    "no completed": "(104, '{user}', 'x', 'x', NULL, '2024-01-01', '2024-01-01')",
    "no created_at": "(105, '{user}', 'x', 'x', false, NULL, '2024-01-01')",
    "no updated_at": "(106, '{user}', 'x', 'x', false, '2024-01-01', NULL)",
    "nothing at all": "(107, '{user}', NULL, NULL, NULL, NULL, NULL)",
    "infinite times": "(108, '{user}', 'x', 'x', false, 'infinity', 'infinity')",
    "times before all": "(109, '{user}', 'x', 'x', false, '-infinity', '-infinity')",
    "times in a far future": "(110, '{user}', 'x', 'x', false, '20000-01-01', '20000-01-01')",
    "times before Christ": "(111, '{user}', 'x', 'x', false, '0044-03-15 BC', '0044-03-15 BC')",
    "the id zero": "(0, '{user}', 'x', 'x', false, '2024-01-01', '2024-01-01')",
    "an id below zero": "(-3, '{user}', 'x', 'x', false, '2024-01-01', '2024-01-01')",
}
UNOWNED = "(201, NULL, 'nobody''s', 'x', false, '2024-01-01', '2024-01-01'), (202, '', '', '', false, NULL, NULL)"
BOBS = "(301, 'bob', 'bob''s', 'x', false, '2024-01-01', '2024-01-01')"


@pytest.fixture(scope="module")
def adopted(new_database: Callable[[], str]) -> Iterator[Service]:
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
        assert set(task) == {"id", "user_id", "title", "description", "completed", "created_at", "updated_at"}
        assert isinstance(task["title"], str)
        assert task["completed"] is False
        assert_times(task)
        assert owner.get(path).json() == task
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
    assert re.fullmatch(RFC_3339, str(task["created_at"])), task["created_at"]
    assert re.fullmatch(RFC_3339, str(task["updated_at"])), task["updated_at"]


def test_rows_that_nobody_owns_are_kept(adopted: Service) -> None:
    assert execute(adopted.database_url, "SELECT id FROM task WHERE user_id = '' ORDER BY id") == [(201,), (202,)]


@pytest.mark.parametrize(("constraint", "fields"), [case for case in BEYOND_A_LIMIT if "id" not in case[1]])
def test_a_new_row_beyond_a_limit_is_refused_among_old_ones(
    adopted: Service, constraint: str, fields: dict[str, Any]
) -> None:
    with connect(adopted.database_url) as connection, pytest.raises(psycopg.DatabaseError) as refusal:
        insert(connection, fields)
    diagnostics = refusal.value.diag
    if isinstance(refusal.value, psycopg.errors.StringDataRightTruncation):  # the old column type says it first
        assert constraint in ("task_user_id", "task_title", "task_description")
    else:
        assert (diagnostics.sqlstate, diagnostics.constraint_name) == ("23514", constraint)


@pytest.fixture(scope="module")
def adopted_clean_url(new_database: Callable[[], str]) -> str:
    """An old table, without lengths in its column types, of which no row breaks a rule. There is no row 7."""
    url = new_database()
    execute(url, re.sub("VARCHAR[(][0-9]+[)]", "VARCHAR", old_table()) + MANY_ROWS + "DELETE FROM task WHERE id = 7")
    execute(url, SCHEMA)
    return url


@pytest.mark.parametrize(("constraint", "fields"), BEYOND_A_LIMIT)
def test_where_no_old_row_breaks_a_rule_no_new_one_can(
    adopted_clean_url: str, constraint: str, fields: dict[str, Any]
) -> None:
    """Not even with an id below those of the old rows."""
    with psycopg.connect(adopted_clean_url) as connection:
        with pytest.raises(psycopg.errors.CheckViolation) as refusal:
            insert(connection, {"id": 7} | fields)
        connection.rollback()
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


def test_a_foreign_key_of_the_old_backend_refuses_without_a_500(
    database_url: str, start_service: Callable[..., Service]
) -> None:
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
    refused = {
        "detail": "body is refused by the database",
        "errors": [{"field": "body", "message": "is refused by the database"}],
    }
    with service.client("alice") as alice, service.client("nobody's") as unknown:
        task = alice.create()
        execute(database_url, f"INSERT INTO comment VALUES ({task['id']})")
        for response in (unknown.post("/api/tasks", json={"title": "x"}), alice.delete(f"/api/tasks/{task['id']}")):
            assert (response.status_code, response.json()) == (422, refused)
        assert alice.tasks() == [task]
        assert unknown.tasks() == []


# --- Other schemas


def schema_of_tables(url: str) -> list[tuple[Any, ...]]:
    return execute(url, "SELECT schemaname FROM pg_tables WHERE tablename = 'task' ORDER BY 1")


@pytest.mark.parametrize(
    ("tables", "where"),
    [
        ("", "app"),
        ("SET search_path = app;" + old_table(), "app"),
        ("SET search_path = public;" + old_table(), "public"),
    ],
    ids=["fresh", "old in the first schema", "old in the second"],
)
def test_the_table_may_be_in_any_schema_of_the_search_path(database_url: str, tables: str, where: str) -> None:
    execute(database_url, f"CREATE SCHEMA app; ALTER DATABASE {name_of(database_url)} SET search_path = app, public")
    execute(database_url, tables)
    for _ in range(2):
        execute(database_url, SCHEMA)
    assert schema_of_tables(database_url) == [(where,)]
    assert len(checks(database_url)) == 6
    assert f"{where}.task USING btree (user_id, created_at DESC, id DESC)" in indexes(database_url)


def test_a_namesake_in_another_schema_is_left_alone(database_url: str) -> None:
    """Two services may share a database, each with a schema of its own before the public one."""
    execute(database_url, SCHEMA + MANY_ROWS)
    before = fingerprint(database_url)
    execute(database_url, "CREATE SCHEMA app; SET search_path = app;" + old_table())
    execute(database_url, "SET search_path = app, public;" + SCHEMA)
    assert fingerprint(database_url) == before
    made = "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = 'app.task'::regclass"
    for part in ("(user_id, created_at DESC, id DESC)", "(user_id, split_part(idempotency_key"):
        assert any(part in definition for (definition,) in execute(database_url, made))


# --- A role that owns nothing


@pytest.fixture
def role(database_url: str) -> Iterator[str]:
    """A role that may create nothing in the test's database."""
    name = f"app_{uuid.uuid4().hex[:12]}"
    execute(database_url, f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'; REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    yield name
    execute(database_url, f"DROP OWNED BY {name}; DROP ROLE {name}")


def grants(role: str, *, serial: bool = False) -> str:
    sequence = f"GRANT USAGE ON SEQUENCE task_id_seq TO {role};" if serial else ""
    return f"GRANT SELECT, INSERT, UPDATE, DELETE ON task TO {role}; {sequence}"


def url_as(role: str, url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{role}:{PASSWORD}@{parts.hostname}:{parts.port}").geturl()


@pytest.mark.parametrize("tables", ["", old_table()], ids=["fresh", "adopted"])
def test_a_role_that_owns_nothing_runs_on_a_table_that_is_there(
    database_url: str, role: str, start_service: Callable[..., Service], tables: str
) -> None:
    execute(database_url, tables + SCHEMA + grants(role, serial=bool(tables)))
    service = start_service(url_as(role, database_url))
    with service.client("alice") as alice, service.client("bob") as bob:
        use_one_task(alice)
        kept = alice.create()
        assert alice.tasks() == [kept]
        assert bob.tasks() == []
    assert "waiting for the database" not in service.log


def use_one_task(client: Client) -> None:
    """Create, get, complete, change and delete a task."""
    task = client.create()
    path = f"/api/tasks/{task['id']}"
    assert client.get(path).json() == task
    assert client.patch(f"{path}/complete").json()["completed"] is True
    assert client.put(path, json={"title": "changed"}).json()["title"] == "changed"
    assert client.delete(path).status_code == 204


@pytest.mark.long
def test_a_role_that_owns_nothing_waits_for_the_table(
    database_url: str, role: str, start_service: Callable[..., Service]
) -> None:
    service = start_service(url_as(role, database_url))
    with service.client("alice") as alice:
        for response in (
            alice.get("/health/ready"),
            alice.get("/api/tasks"),
            alice.post("/api/tasks", json={"title": "x"}),
        ):
            assert (response.status_code, response.json()) == (503, UNAVAILABLE)
            assert int(response.headers["retry-after"]) > 0
        reasons = [line for line in service.log.splitlines() if "permission denied for schema public" in line]
        assert len(reasons) == 1
        assert "Traceback" not in service.log
        assert PASSWORD not in service.log

        execute(database_url, SCHEMA + grants(role))
        service.wait_until_ready()
        use_one_task(alice)


# --- python service.py migrate


def migrate(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f"exec env {procfile_line('release')}"],
        cwd=ROOT,
        env=environment(DATABASE_URL=url, BETTER_AUTH_SECRET=SECRET),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("tables", ["", old_table(nullable=True) + MANY_ROWS], ids=["fresh", "old"])
def test_migrate_applies_the_schema_and_may_be_repeated(database_url: str, tables: str) -> None:
    execute(database_url, tables)
    for _ in range(2):
        result = migrate(database_url)
        assert (result.returncode, result.stderr) == (0, "")
        assert len(checks(database_url)) == 6


def assert_one_sentence(result: subprocess.CompletedProcess[str], reason: str) -> None:
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert reason in result.stderr
    assert PASSWORD not in result.stderr
    assert result.stdout == ""


def test_migrate_says_that_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"postgresql://app:{PASSWORD}@127.0.0.1:{unused.getsockname()[1]}/tasks"
        assert_one_sentence(migrate(url), "Connect call failed")


def test_migrate_says_that_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://app:{PASSWORD}@127.0.0.1:{silent.getsockname()[1]}/tasks?connect_timeout=1"
        result = migrate(url)
    assert_one_sentence(result, "imeout")
    assert not result.stderr.rstrip().endswith(":")


def test_migrate_says_that_the_database_is_not_there(database_url: str) -> None:
    assert_one_sentence(migrate(f"{database_url}_absent"), f'database "{name_of(database_url)}_absent" does not exist')


def test_migrate_says_that_the_role_may_create_nothing(database_url: str, role: str) -> None:
    assert_one_sentence(migrate(url_as(role, database_url)), "permission denied for schema public")


def test_migrate_says_what_stands_in_the_way_of_adoption_and_changes_nothing(database_url: str) -> None:
    """PostgreSQL says this in two lines."""
    execute(database_url, old_table(nullable=True) + MANY_ROWS)
    execute(database_url, "CREATE VIEW titles AS SELECT id, title FROM task; UPDATE task SET title = NULL WHERE id < 9")
    before = fingerprint(database_url)
    assert_one_sentence(migrate(database_url), "used by a view")
    assert fingerprint(database_url) == before


# --- Indexes


@pytest.fixture(scope="module", params=["", old_table()], ids=["fresh", "adopted"])
def filled_url(request: pytest.FixtureRequest, new_database: Callable[[], str]) -> str:
    """A database with 100 tasks of each of 50 users."""
    url = new_database()
    execute(url, request.param + SCHEMA + MANY_ROWS)
    execute(url, "ANALYZE task")
    return url


CLIENTS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'"


def test_no_request_reads_the_whole_table(filled_url: str, start_service: Callable[..., Service]) -> None:
    """PostgreSQL counts the scans; a connection that ends hands in its counts."""
    counts = "SELECT seq_scan, idx_scan FROM pg_stat_user_tables WHERE relname = 'task'"
    [(sequential, by_index)] = execute(filled_url, counts)
    service = start_service(filled_url)
    with service.client("user-7") as client:
        for _ in range(10):
            assert len(client.tasks()) == 100
            use_one_task(client)
    service.stop()
    while execute(filled_url, CLIENTS) != [(1,)]:
        time.sleep(0.05)
    [(sequential_after, by_index_after)] = execute(filled_url, counts)
    assert sequential_after == sequential
    assert by_index_after >= by_index + 50
